//! What ends the program before its time.

use qcc_runtime::{Error, TierError, passes::PassError};
use std::{error, io, process::ExitCode};

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line asks for something that cannot be.
    #[error("{0}")]
    Usage(String),
    /// The model, data or machine is at fault.
    #[error(transparent)]
    Runtime(#[from] Error),
    /// A file that the command itself reads.
    #[error("cannot read `{path}`")]
    Read {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Cases that did not pass.
    #[error("{failed} of {of} cases failed")]
    Tests {
        /// How many.
        failed: usize,
        /// Of how many.
        of: usize,
    },
    /// Something was found that was not to be.
    #[error("{found} of the findings are of rules that are denied")]
    Denied {
        /// How many.
        found: usize,
    },
    /// Two sides that were to be the same.
    #[error("they part at `{tensor}`")]
    Parted {
        /// The first tensor that differs.
        tensor: String,
    },
    /// A file that the command itself writes.
    #[error("cannot write `{path}`")]
    Write {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The graph has no form of the kind that was asked for.
    #[error("cannot write this graph as ONNX")]
    Export(#[from] qcc_runtime::ir::onnx::ExportError),
    /// There is no page, or a file holds no facts.
    #[error("`{path}`: {source}")]
    Report {
        /// The file.
        path: String,
        /// Why.
        source: qcc_report::ReportError,
    },
    /// Figures that JSON cannot hold: a defect of qcc.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
    /// Standard output is gone.
    #[error("cannot write to standard output")]
    Stdout(#[from] io::Error),
}

macro_rules! through_runtime {
    ($($source:ty),* $(,)?) => {$(
        impl From<$source> for Failure {
            fn from(e: $source) -> Failure {
                Failure::Runtime(e.into())
            }
        }
    )*};
}

through_runtime!(
    qcc_runtime::DataError,
    qcc_runtime::ProgramError,
    qcc_runtime::ThreadsError,
    qcc_runtime::zoo::ZooError,
    qcc_runtime::CodegenError,
    TierError,
);

impl Failure {
    /// Whether the reader of standard output has had enough: not an error.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Failure::Stdout(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }

    /// 2 where another command line would help, 1 where another model or other data would.
    pub(crate) fn exit_code(&self) -> ExitCode {
        use qcc_runtime::DataError;
        let is_usage = matches!(
            self,
            Failure::Usage(_)
                | Failure::Runtime(
                    Error::Tier(_)
                        | Error::Threads(_)
                        | Error::Data(DataError::Preprocess(_))
                        | Error::Pass(
                            PassError::UnknownPin { .. }
                                | PassError::Pin { .. }
                                | PassError::ImageInput { .. }
                        )
                )
        );
        ExitCode::from(if is_usage { 2 } else { 1 })
    }

    /// The message and its causes, on one line. Causes that a message already tells are not told twice.
    pub(crate) fn message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = error::Error::source(self);
        while let Some(e) = cause {
            let said = e.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            cause = e.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let e = Failure::Write { path: "a.qcc".into(), source: io::Error::other("disk full") };
        assert_eq!(e.message(), "cannot write `a.qcc`: disk full");
        let e = Failure::from(TierError::None);
        assert_eq!(e.message().matches("x86-64-v2").count(), 1);
    }
}
