//! The ways to choose a range, and which of them is for which value.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// How a range is chosen from what was seen.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Calibrator {
    /// The smallest and the largest value.
    MinMax,
    /// Averages of the smallest and the largest value of each sample, in the order of samples, of which the newest has this
    /// weight c: `min ← min + c·(min of sample − min)`, beginning with the first sample. (`MovingAverageMinMaxObserver` of
    /// PyTorch, where c is `averaging_constant`; `MovingAverageQuantize` of TensorFlow, where 1 − c is the decay.)
    MovingAverage(f64),
    /// On either side, the value beyond which 100 − p percent of the values lie (to the resolution of a histogram of
    /// 4,096 bins from 0 to the next power of two above the largest magnitude).
    Percentile(f64),
    /// The range that loses the least information: least Kullback-Leibler divergence of the clipped and rounded distribution
    /// (TensorRT's calibration by entropy).
    Entropy,
    /// The range of the least mean squared error of clipping and rounding.
    Mse,
}

/// The weight of a new sample where nothing else is said: that of PyTorch, and a decay of 0.99 in TensorFlow.
const AVERAGING: f64 = 0.01;
/// The percentile where none is said.
const PERCENTILE: f64 = 99.99;

/// A name of no calibrator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no calibrator: there are min-max, moving-average[:C] (weight of a new sample, above 0, at most 1), \
     percentile[:P] (above 50, at most 100), entropy and mse"
)]
pub struct UnknownCalibrator(String);

impl Calibrator {
    /// What [`Choice::Auto`] chooses among.
    pub const CANDIDATES: [Calibrator; 5] = [
        Calibrator::MinMax,
        Calibrator::Percentile(99.999),
        Calibrator::Percentile(99.99),
        Calibrator::Mse,
        Calibrator::Entropy,
    ];

    /// Whether it needs to know how values are distributed, and not their extremes alone.
    pub(crate) fn needs_histogram(self) -> bool {
        match self {
            Calibrator::MinMax | Calibrator::MovingAverage(_) => false,
            Calibrator::Percentile(_) | Calibrator::Entropy | Calibrator::Mse => true,
        }
    }
}

impl FromStr for Calibrator {
    type Err = UnknownCalibrator;

    /// The spelling of the command line, such as `mse` or `percentile:99.9`.
    fn from_str(text: &str) -> Result<Calibrator, UnknownCalibrator> {
        let refuse = || UnknownCalibrator(text.into());
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<f64>().map_err(|_| refuse())?)),
            None => (text, None),
        };
        match (name, number) {
            ("min-max", None) => Ok(Calibrator::MinMax),
            ("entropy", None) => Ok(Calibrator::Entropy),
            ("mse", None) => Ok(Calibrator::Mse),
            ("moving-average", c) => {
                let c = Some(c.unwrap_or(AVERAGING)).filter(|c| *c > 0.0 && *c <= 1.0);
                c.map(Calibrator::MovingAverage).ok_or_else(refuse)
            }
            ("percentile", p) => {
                let p = Some(p.unwrap_or(PERCENTILE)).filter(|p| *p > 50.0 && *p <= 100.0);
                p.map(Calibrator::Percentile).ok_or_else(refuse)
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Calibrator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Calibrator::MinMax => f.write_str("min-max"),
            Calibrator::MovingAverage(c) => write!(f, "moving-average:{c}"),
            Calibrator::Percentile(p) => write!(f, "percentile:{p}"),
            Calibrator::Entropy => f.write_str("entropy"),
            Calibrator::Mse => f.write_str("mse"),
        }
    }
}

/// One calibrator, or the best.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// This one.
    One(Calibrator),
    /// Whichever of [`Calibrator::CANDIDATES`] has the least error when it is measured: for the network, and then for
    /// single values where that is better.
    Auto,
}

impl From<Calibrator> for Choice {
    fn from(calibrator: Calibrator) -> Choice {
        Choice::One(calibrator)
    }
}

impl FromStr for Choice {
    type Err = UnknownCalibrator;

    /// The spelling of the command line: that of a [`Calibrator`], or `auto`.
    fn from_str(text: &str) -> Result<Choice, UnknownCalibrator> {
        match text {
            "auto" => Ok(Choice::Auto),
            _ => text.parse().map(Choice::One),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::One(calibrator) => calibrator.fmt(f),
            Choice::Auto => f.write_str("auto"),
        }
    }
}

/// Which calibrator is for which value.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Calibrators {
    /// For all values that have none of their own.
    pub all: Choice,
    /// Those of single values, by the name of the node in the prepared graph (`name:1` for a second output).
    pub values: BTreeMap<String, Calibrator>,
}

impl Default for Calibrators {
    fn default() -> Calibrators {
        Calibrator::MinMax.into()
    }
}

impl<C: Into<Choice>> From<C> for Calibrators {
    fn from(all: C) -> Calibrators {
        Calibrators { all: all.into(), values: BTreeMap::new() }
    }
}

impl Calibrators {
    /// The calibrator of a value; `None` where it is to be measured.
    pub fn of(&self, value: &str) -> Option<Calibrator> {
        let all = match self.all {
            Choice::One(calibrator) => Some(calibrator),
            Choice::Auto => None,
        };
        self.values.get(value).copied().or(all)
    }
}

impl fmt::Display for Calibrators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.all.fmt(f)?;
        match self.values.len() {
            0 => Ok(()),
            1 => f.write_str(" but for 1 value"),
            n => write!(f, " but for {n} values"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for c in Calibrator::CANDIDATES.into_iter().chain([Calibrator::MovingAverage(0.25)]) {
            assert_eq!(c.to_string().parse(), Ok(c));
            assert_eq!(c.to_string().parse(), Ok(Choice::One(c)));
        }
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("moving-average".parse(), Ok(Calibrator::MovingAverage(0.01)));
        assert_eq!("percentile".parse(), Ok(Calibrator::Percentile(99.99)));
        for bad in ["", "kl", "percentile:4", "percentile:NaN", "percentile:", "moving-average:0", "mse:1"] {
            assert!(bad.parse::<Calibrator>().is_err(), "{bad}");
        }
    }
}
