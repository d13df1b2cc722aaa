//! How the values of a tensor are distributed, for people: few bins and a few percentiles of a [`Histogram`].

use super::{Seen, Statistics, histogram::BINS};
use serde::{Deserialize, Serialize};

/// The percentiles that are told.
pub const PERCENTILES: [f64; 7] = [0.01, 0.1, 1.0, 50.0, 99.0, 99.9, 99.99];

/// How the finite elements of a value are distributed over samples.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Distribution {
    /// Number of finite elements.
    pub elements: u64,
    /// Number of elements that are infinite or no numbers.
    pub not_finite: u64,
    /// The smallest.
    pub min: f32,
    /// The largest.
    pub max: f32,
    /// The elements that the shares of [`PERCENTILES`] do not exceed, to the width of a bin of the histogram of 4,096 bins on
    /// either side of zero.
    pub percentiles: Vec<f32>,
    /// Where the first bin begins.
    pub first: f64,
    /// Width of each bin.
    pub width: f64,
    /// Elements in each bin.
    pub counts: Vec<u64>,
}

impl Distribution {
    /// One of the [`PERCENTILES`]; `None` of another one.
    pub fn percentile(&self, percent: f64) -> Option<f32> {
        let at = PERCENTILES.iter().position(|p| *p == percent)?;
        self.percentiles.get(at).copied()
    }
}

impl Statistics {
    /// How the elements of a value are distributed, in at most `bins` bins of equal width; `None` where no histogram was kept
    /// of it, or nothing finite was seen.
    pub fn distribution(&self, name: &str, bins: usize) -> Option<Distribution> {
        self.seen.get(name)?.distribution(bins)
    }
}

impl Seen {
    fn distribution(&self, bins: usize) -> Option<Distribution> {
        let histogram = self.histogram.as_ref()?;
        let (first, last) = histogram.ends()?;
        let joined = (last - first + 1).div_ceil(bins.max(1));
        let counts = histogram.counts();
        let percentile = |p: f64| {
            let rank = (p / 100.0 * histogram.total() as f64).ceil().max(1.0) as u64;
            let mut below = 0;
            let at = counts.iter().position(|n| {
                below += n;
                below >= rank
            });
            let edge = (at.unwrap_or(last) as f64 + 1.0 - BINS as f64) * histogram.width();
            (edge as f32).clamp(self.min, self.max)
        };
        Some(Distribution {
            elements: histogram.total(),
            not_finite: self.not_finite,
            min: self.min,
            max: self.max,
            percentiles: PERCENTILES.into_iter().map(percentile).collect(),
            first: (first as f64 - BINS as f64) * histogram.width(),
            width: joined as f64 * histogram.width(),
            counts: counts[first..=last].chunks(joined).map(|bins| bins.iter().sum()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::{Calibrator, Collector};
    use qcc_ir::text;

    #[test]
    fn few_bins_hold_all_that_many_did() {
        let graph =
            text::parse("qir 1\ngraph \"g\" stage float\n%0 = input \"x\" : f32[1x4]\noutput \"y\" = %0\n")
                .unwrap();
        let value = graph.inputs()[0].out();
        let mut collector = Collector::of_values(&graph, [value], Calibrator::Percentile(99.99));
        let values: Vec<f32> = (0..10_000).map(|i| i as f32 / 100.0 - 20.0).chain([f32::NAN]).collect();
        collector.record(value, 0, &values);
        let statistics = collector.into_statistics();
        for bins in [1, 7, 64, 100_000] {
            let d = statistics.distribution("x", bins).unwrap();
            assert!(d.counts.len() <= bins, "{} of {bins}", d.counts.len());
            assert_eq!((d.counts.iter().sum::<u64>(), d.elements, d.not_finite), (10_000, 10_000, 1));
            assert!(d.first <= -20.0 && d.first + d.width * d.counts.len() as f64 > 79.98, "{d:?}");
            assert_eq!((d.min, d.max), (-20.0, 79.99));
            for (p, expected) in [(1.0, -19.0), (50.0, 30.0), (99.9, 79.89)] {
                let got = d.percentile(p).unwrap();
                assert!((got - expected).abs() < 0.05, "{p}: {got}");
            }
        }
        assert!(statistics.distribution("y", 8).is_none());
    }
}
