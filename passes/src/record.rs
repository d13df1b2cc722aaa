//! What passes report.

use crate::{ChannelStatistics, Finding};
use qcc_ir::{Error, OpError, VerifyError};
use serde::Serialize;
use std::{collections::BTreeMap, fmt};

/// What a [`Note`] is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NoteKind {
    /// Something the pass did.
    Applied,
    /// Something the pass is there for and did not do, with the reason.
    Declined,
    /// Something that is not as it should be in how the model was compiled.
    Warning,
}

/// One line about one node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Note {
    /// What it is about.
    pub kind: NoteKind,
    /// The node's name; the model's where a note is about all of it.
    pub node: String,
    /// What was done, or why not.
    pub text: String,
}

/// What one run of one pass did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Record {
    /// The pass.
    pub pass: &'static str,
    /// How many times it was applied.
    pub applied: usize,
    /// Details.
    pub notes: Vec<Note>,
}

impl Record {
    pub(crate) fn new(pass: &'static str) -> Record {
        Record { pass, applied: 0, notes: Vec::new() }
    }

    pub(crate) fn applied(&mut self, node: &str, text: impl Into<String>) {
        self.applied += 1;
        self.note(NoteKind::Applied, node, text);
    }

    /// Something to know that is not counted as done.
    pub(crate) fn told(&mut self, node: &str, text: impl Into<String>) {
        self.note(NoteKind::Applied, node, text);
    }

    pub(crate) fn declined(&mut self, node: &str, text: impl Into<String>) {
        self.note(NoteKind::Declined, node, text);
    }

    pub(crate) fn warning(&mut self, node: &str, text: impl Into<String>) {
        self.note(NoteKind::Warning, node, text);
    }

    fn note(&mut self, kind: NoteKind, node: &str, text: impl Into<String>) {
        self.notes.push(Note { kind, node: node.into(), text: text.into() });
    }

    /// Notes of one kind.
    pub fn of(&self, kind: NoteKind) -> impl Iterator<Item = &Note> {
        self.notes.iter().filter(move |n| n.kind == kind)
    }
}

/// The records of one part of the pipeline, in order.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Report {
    /// One a pass.
    pub records: Vec<Record>,
    /// What batch norms that are part of other ops now tell of the values behind them: by the name of the op, of its result
    /// before a residual is added or a clamp applied.
    pub batch_norms: BTreeMap<String, ChannelStatistics>,
    /// What looks wrong with the model or its data.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The record of the last run of the pass with this name.
    pub fn record(&self, pass: &str) -> Option<&Record> {
        self.records.iter().rev().find(|r| r.pass == pass)
    }

    /// All warnings about how the model was compiled, in order; what looks wrong with the model itself is in `findings`.
    pub fn warnings(&self) -> impl Iterator<Item = &Note> {
        self.records.iter().flat_map(|r| r.of(NoteKind::Warning))
    }

    /// This report followed by another.
    pub fn then(mut self, next: Report) -> Report {
        self.records.extend(next.records);
        self.batch_norms.extend(next.batch_norms);
        self.findings.extend(next.findings);
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for record in &self.records {
            writeln!(f, "{}: {}", record.pass, record.applied)?;
            for Note { kind, node, text } in &record.notes {
                let mark = match kind {
                    NoteKind::Applied => "",
                    NoteKind::Declined => "not: ",
                    NoteKind::Warning => "warning: ",
                };
                writeln!(f, "  {mark}`{node}`: {text}")?;
            }
        }
        for finding in &self.findings {
            writeln!(f, "{}: {finding}", finding.level.name())?;
        }
        Ok(())
    }
}

/// What stops a pass.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PassError {
    /// An op refused what the pass made of it.
    #[error(transparent)]
    Graph(#[from] Error),
    /// The graph is not what its stage says: a bug in the pass.
    #[error("after pass {pass}: {source}")]
    Invalid {
        /// The pass.
        pass: &'static str,
        /// What is wrong.
        source: VerifyError,
    },
    /// A value that needs a grid was not calibrated.
    #[error("value `{value}` has no range; calibrate the prepared graph that is to be quantized")]
    MissingRange {
        /// Name of the value.
        value: String,
    },
    /// The model cannot take pixels.
    #[error("input `{input}` cannot take pixels: {reason}")]
    ImageInput {
        /// The input, or all of them.
        input: String,
        /// Why not.
        reason: String,
    },
    /// A pin names a node that the model does not have.
    #[error("no node `{pin}` to pin{}", did_you_mean(near))]
    UnknownPin {
        /// The name given.
        pin: String,
        /// Names of the model that are close to it.
        near: Vec<String>,
    },
    /// A pin asks for a device that cannot run the node.
    #[error("node `{node}` cannot run on {device}: {reason}")]
    Pin {
        /// The node.
        node: String,
        /// The device asked for.
        device: qcc_ir::Device,
        /// Why it cannot.
        reason: String,
    },
}

impl PassError {
    /// An [`OpError`] of the node it is about.
    pub(crate) fn op(node: &str, op: &str, source: OpError) -> PassError {
        PassError::Graph(Error::Node { node: node.into(), op: op.into(), source })
    }
}

fn did_you_mean(near: &[String]) -> String {
    match near {
        [] => String::new(),
        names => format!(
            "; did you mean {}?",
            names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
        ),
    }
}
