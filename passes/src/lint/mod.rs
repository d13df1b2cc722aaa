//! What looks wrong with a model or with its data, each thing with what to do about it.
//!
//! A [`Finding`] is of a [`Rule`]; `docs/lint.md` tells of every rule how it decides, with its thresholds and their reasons.
//! Rules about the model are passes ([`batch_norms`] before batch norms are folded, [`weights`] once they are); rules about
//! samples are functions of what was seen of them ([`samples`], [`statistics`], [`clipping`]).

pub(crate) mod batch_norms;
mod clipping;
pub(crate) mod samples;
mod statistics;
pub(crate) mod weights;

pub use clipping::Clipping;
pub use statistics::{
    ActiveChannels, FEWEST_SAMPLES, InputFit, Normalisation, divergence, fitted_normalisation, mismatches,
};

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// What looks wrong, of what, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked for.
    pub rule: Rule,
    /// How much it matters.
    pub level: Level,
    /// Where it was found.
    pub subject: Subject,
    /// What was found: a clause without a full stop.
    pub what: String,
    /// What to do: a clause without a full stop.
    pub advice: String,
}

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Results are likely to be worse for it than they need to be.
    Warning,
    /// Good to know: the model may be fine as it is.
    Hint,
}

impl Level {
    /// The spelling of reports.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Warning => "warning",
            Level::Hint => "hint",
        }
    }
}

/// Where something was found.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// The model as a whole.
    Model,
    /// The samples as a whole.
    Samples,
    /// A node of the model, by name.
    Node(String),
    /// A value of the prepared graph, by the name that [`value_name`](crate::value_name) gives it.
    Value(String),
    /// An input of the model, by name.
    Input(String),
    /// Some of the samples of an input; at most [`MOST_NAMED`] of them.
    Some {
        /// The input, or the value that is computed of these samples.
        of: String,
        /// The first of them.
        samples: Vec<Sample>,
    },
}

/// One sample.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Its number in the data, from 0.
    pub number: u64,
    /// Its file, where it has one of its own.
    pub file: Option<String>,
    /// The number of the sample that it is a copy of, for copies.
    pub copy_of: Option<u64>,
}

/// Samples that a finding names; more are counted.
pub const MOST_NAMED: usize = 8;

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => f.write_str(file)?,
            None => write!(f, "{}", self.number)?,
        }
        match self.copy_of {
            Some(first) => write!(f, " (a copy of {first})"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Model => f.write_str("the model"),
            Subject::Samples => f.write_str("the samples"),
            Subject::Node(name) | Subject::Value(name) | Subject::Some { of: name, .. } => {
                write!(f, "`{name}`")
            }
            Subject::Input(name) => write!(f, "input `{name}`"),
        }
    }
}

impl Finding {
    pub(crate) fn new(
        rule: Rule,
        subject: Subject,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding { rule, level: rule.level(), subject, what: what.into(), advice: advice.into() }
    }

    /// Gives its samples the numbers that they have in the data, and their files. `place` tells both of a sample by its
    /// number among those that were taken.
    pub fn locate(&mut self, place: &dyn Fn(u64) -> (u64, Option<String>)) {
        let Subject::Some { samples, .. } = &mut self.subject else { return };
        for sample in samples {
            (sample.number, sample.file) = place(sample.number);
            sample.copy_of = sample.copy_of.map(|first| place(first).0);
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.what)?;
        if let Subject::Some { samples, .. } = &self.subject {
            let named: Vec<String> = samples.iter().map(Sample::to_string).collect();
            let more = if samples.len() == MOST_NAMED { "…" } else { "" };
            write!(f, ", among them {}{more}", named.join(", "))?;
        }
        write!(f, "; {} [{}]", self.advice, self.rule.name())
    }
}

/// A name that is that of no [`Rule`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no rule `{name}`; there are {}", Rule::ALL.map(Rule::name).join(", "))]
pub struct UnknownRule {
    name: String,
}

macro_rules! rules {
    ($($(#[doc = $doc:literal])+ $rule:ident = $name:literal, $level:ident;)*) => {
        /// What is looked for.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum Rule {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $rule,)*
        }

        impl Rule {
            /// All of them: first those about models, then those about data.
            pub const ALL: [Rule; [$($name),*].len()] = [$(Rule::$rule),*];

            /// The spelling of the command line.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Rule::$rule => $name,)*
                }
            }

            /// How much its findings matter.
            pub const fn level(self) -> Level {
                match self {
                    $(Rule::$rule => Level::$level,)*
                }
            }
        }
    };
}

rules! {
    /// The running statistics of batch norms are those of initialisation.
    BatchNormNeverUpdated = "batch-norm-never-updated", Warning;
    /// A batch norm amplifies single channels far above the others.
    BatchNormExploding = "batch-norm-exploding", Warning;
    /// A variance of a batch norm is not positive, or what it makes of its parameters is not finite.
    BatchNormNotFinite = "batch-norm-not-finite", Warning;
    /// Weights that are no numbers.
    WeightsNotFinite = "weights-not-finite", Warning;
    /// Output channels whose weights are far larger than those of most, where they share a grid.
    WeightsOutlierChannels = "weights-outlier-channels", Warning;
    /// Single weights far larger than the others of their channel.
    WeightsOutliers = "weights-outliers", Warning;
    /// Output channels without weights.
    WeightsDeadChannels = "weights-dead-channels", Hint;
    /// Output channels with the weights of other ones.
    WeightsDuplicateChannels = "weights-duplicate-channels", Hint;
    /// Ranges of few samples.
    SamplesTooFew = "samples-too-few", Warning;
    /// Samples that are copies of others.
    SamplesIdentical = "samples-identical", Warning;
    /// Samples all of whose elements are equal.
    SamplesConstant = "samples-constant", Warning;
    /// Numbers that are not finite, in samples or in what is computed of them.
    SamplesNotFinite = "samples-not-finite", Warning;
    /// Samples that look like pixels which were not normalised.
    InputNotNormalised = "input-not-normalised", Warning;
    /// Samples that look as if they had been normalised twice.
    InputNormalisedTwice = "input-normalised-twice", Warning;
    /// Samples of very large numbers.
    InputLarge = "input-large", Warning;
    /// Samples on another scale than that of the training data, by the first batch norms.
    InputNormalisation = "input-normalisation", Warning;
    /// Samples with red and blue exchanged, by the first batch norms.
    InputChannelOrder = "input-channel-order", Warning;
    /// Statistics of a batch norm that are not those of what it gets on the samples.
    BatchNormMismatch = "batch-norm-mismatch", Warning;
    /// A value that is the same whatever the sample.
    ActivationConstant = "activation-constant", Warning;
    /// A layer most of whose channels are the same whatever the sample.
    ActivationDeadChannels = "activation-dead-channels", Hint;
    /// Values of other samples that are beyond the ranges which were found.
    ActivationSaturates = "activation-saturates", Warning;
}

impl FromStr for Rule {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Rule, UnknownRule> {
        Rule::ALL.into_iter().find(|r| r.name() == text).ok_or_else(|| UnknownRule { name: text.into() })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `1 of 8 channels has`, `3 of 8 channels have`.
pub(crate) fn channels(count: usize, of: usize) -> String {
    format!("{count} of {of} channels {}", if count == 1 { "has" } else { "have" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_names_of_their_own_by_which_they_are_found() {
        for rule in Rule::ALL {
            assert_eq!(rule.name().parse(), Ok(rule));
            assert!(rule.name().chars().all(|c| c.is_ascii_lowercase() || c == '-'));
        }
        let unknown = "no-such-rule".parse::<Rule>().unwrap_err().to_string();
        assert!(unknown.contains("`no-such-rule`") && unknown.contains("batch-norm-never-updated"));
    }

    #[test]
    fn a_finding_names_its_samples_by_where_they_come_from() {
        let sample = |number, copy_of| Sample { number, file: None, copy_of };
        let subject = Subject::Some { of: "x".into(), samples: vec![sample(1, None), sample(3, Some(1))] };
        let mut finding = Finding::new(Rule::SamplesIdentical, subject, "found", "do");
        assert_eq!(finding.to_string(), "`x`: found, among them 1, 3 (a copy of 1); do [samples-identical]");
        finding.locate(&|i| (10 * i, (i == 1).then(|| "cat.jpg".into())));
        assert_eq!(
            finding.to_string(),
            "`x`: found, among them cat.jpg, 30 (a copy of 10); do [samples-identical]"
        );
    }
}
