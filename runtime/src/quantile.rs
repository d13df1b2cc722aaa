//! Quantiles of measurements.

/// Samples by size. Their quantiles are samples that occurred: of an even number, the median is the lower one in the
/// middle.
pub(crate) struct Sorted(Vec<f64>);

impl Sorted {
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Sorted {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        Sorted(samples)
    }

    /// The smallest sample that a share `q` of all does not exceed; `None` of no samples.
    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        let rank = (self.0.len() as f64 * q).ceil().max(1.0) as usize - 1;
        self.0.get(rank).copied()
    }
}

/// The median; `None` of no samples.
pub(crate) fn median(samples: impl IntoIterator<Item = f64>) -> Option<f64> {
    Sorted::of(samples).quantile(0.5)
}
