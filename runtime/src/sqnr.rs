//! Signal-to-noise ratios: how far what was computed is from what was expected.

use serde::{Deserialize, Serialize};
use std::{fmt, ops::AddAssign};

/// Sums of squares of expected numbers, and of the distance of others to them. They add up over batches; floats not the same
/// in every order, so add them in that of the batches.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct SquaredError {
    /// Σ (got − expected)².
    pub noise: f64,
    /// Σ expected².
    pub signal: f64,
}

impl SquaredError {
    /// Of so many numbers, pair by pair.
    pub fn of(got: &[f32], expected: &[f32]) -> SquaredError {
        let mut sum = SquaredError::default();
        for (&g, &e) in got.iter().zip(expected) {
            let (g, e) = (f64::from(g), f64::from(e));
            sum.noise += (g - e) * (g - e);
            sum.signal += e * e;
        }
        sum
    }

    /// Noise over signal; 0 where nothing differs, whatever the signal is.
    pub fn ratio(self) -> f64 {
        if self.noise == 0.0 { 0.0 } else { self.noise / self.signal }
    }

    /// Signal-to-noise ratio in dB, 10·log₁₀(signal/noise); infinite where nothing differs.
    pub fn sqnr_db(self) -> f64 {
        decibels(self.ratio())
    }

    /// [`sqnr_db`](Self::sqnr_db), where it is a number: there is none of infinite values, nor of noise over silence.
    pub fn decibels(self) -> Option<Decibels> {
        Some(Decibels(self.sqnr_db())).filter(|d| d.0 > f64::NEG_INFINITY)
    }

    /// The mean of noise over signal of several tensors, of those that have any signal.
    pub fn mean_ratio(of_tensors: &[SquaredError]) -> f64 {
        let ratios: Vec<f64> = of_tensors.iter().filter(|s| s.signal > 0.0).map(|s| s.ratio()).collect();
        ratios.iter().sum::<f64>() / ratios.len().max(1) as f64
    }
}

impl AddAssign for SquaredError {
    fn add_assign(&mut self, other: SquaredError) {
        self.noise += other.noise;
        self.signal += other.signal;
    }
}

/// A signal-to-noise ratio in dB, infinite where nothing differs. As text for machines it is a number, or `exact`.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug, Serialize, Deserialize)]
#[serde(into = "WrittenDecibels", try_from = "WrittenDecibels")]
pub struct Decibels(pub f64);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WrittenDecibels {
    Number(f64),
    Word(String),
}

impl From<Decibels> for WrittenDecibels {
    fn from(d: Decibels) -> WrittenDecibels {
        if d.0.is_finite() { WrittenDecibels::Number(d.0) } else { WrittenDecibels::Word(EXACT.into()) }
    }
}

impl TryFrom<WrittenDecibels> for Decibels {
    type Error = String;
    fn try_from(written: WrittenDecibels) -> Result<Decibels, String> {
        match written {
            WrittenDecibels::Number(db) => Ok(Decibels(db)),
            WrittenDecibels::Word(word) if word == EXACT => Ok(Decibels(f64::INFINITY)),
            WrittenDecibels::Word(word) => Err(format!("`{word}` is no ratio in dB")),
        }
    }
}

const EXACT: &str = "exact";

impl fmt::Display for Decibels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_finite() { write!(f, "{:.1} dB", self.0) } else { f.write_str(EXACT) }
    }
}

/// The signal-to-noise ratio in dB of a ratio of noise over signal.
pub(crate) fn decibels(noise_over_signal: f64) -> f64 {
    -10.0 * noise_over_signal.log10()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_decibels_are_a_factor_of_ten_in_energy() {
        let error = SquaredError::of(&[1.0, 2.0, 3.0], &[1.0, 2.0, 2.0]);
        assert_eq!((error.noise, error.signal, error.ratio()), (1.0, 9.0, 1.0 / 9.0));
        assert_eq!(SquaredError { noise: 1.0, signal: 1000.0 }.sqnr_db(), 30.0);
        assert_eq!(SquaredError::default().sqnr_db(), f64::INFINITY);
        let silent = SquaredError { noise: 1.0, signal: 0.0 };
        assert_eq!(SquaredError::mean_ratio(&[error, silent]), error.ratio());
    }
}
