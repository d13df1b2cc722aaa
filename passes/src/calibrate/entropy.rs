//! The range for which quantization loses the least information.

use super::{
    Range,
    histogram::{BINS, Histogram},
    search::least_cost,
};
use crate::insert_fake_quant::grid_of;

/// The range whose grid gives the least Kullback-Leibler divergence of what is left of the distribution from what it was:
/// TensorRT's calibration by entropy (Migacz, "8-bit inference with TensorRT", GTC 2017), as ONNX Runtime and MXNet have it,
/// for u8 grids with a zero point, where the ends of a range need not be as far from zero.
pub(crate) fn range(histogram: &Histogram, seen: Range) -> Range {
    let sums = Sums::new(histogram);
    let divergence = |range| sums.divergence(range).unwrap_or(f64::INFINITY);
    least_cost(seen, divergence)
}

/// Sums over all bins below each, so that a candidate costs a step for each code and not for each bin.
struct Sums {
    width: f64,
    /// Counts, of which that of zero is damped.
    counts: Vec<f64>,
    /// Of counts.
    below: Vec<f64>,
    /// Of c·ln c.
    logs_below: Vec<f64>,
    /// Of bins that are not empty.
    filled_below: Vec<f64>,
}

impl Sums {
    fn new(histogram: &Histogram) -> Sums {
        let mut counts: Vec<f64> = histogram.counts().iter().map(|&n| n as f64).collect();
        // Zeros (of a ReLU, of padding) are a code and lose nothing. As a spike within the bins that share their code they
        // would drown all other values: they count as their neighbours do (as in NVIDIA's pytorch-quantization).
        counts[BINS] = counts[BINS].min(counts[BINS + 1].max(counts[BINS - 1]));
        let running = |f: &dyn Fn(f64) -> f64| {
            let mut sum = 0.0;
            let sums = counts.iter().map(|&c| {
                sum += f(c);
                sum
            });
            std::iter::once(0.0).chain(sums).collect::<Vec<f64>>()
        };
        Sums {
            width: histogram.width(),
            below: running(&|c| c),
            logs_below: running(&log_of),
            filled_below: running(&|c| if c > 0.0 { 1.0 } else { 0.0 }),
            counts,
        }
    }

    /// Σ p·ln(p/q) in nats. The reference p is the histogram within the range, whose last bins on either side also hold all
    /// that lies beyond, as it will be there. The candidate q has the histogram within the range alone, and the mass of each
    /// code spread evenly over those of its bins that are not empty. `None` where codes are finer than bins, of which nothing
    /// can be told, or where nothing is within.
    fn divergence(&self, range: Range) -> Option<f64> {
        let grid = grid_of(range).ok()?;
        let bins_a_step = f64::from(grid.scale) / self.width;
        let total = *self.below.last()?;
        if bins_a_step < 1.0 || total == 0.0 {
            return None;
        }
        // The first bin of each code, and the end: code n takes what rounds to it, from n − ½ to n + ½ steps.
        let edge = |n: f64| {
            let bin = ((n - 0.5) * bins_a_step).round() + BINS as f64;
            bin.clamp(0.0, self.counts.len() as f64) as usize
        };
        let [lo, hi] = [grid.lo, grid.hi].map(|code| f64::from(code - grid.zero_point));
        let (first, end) = (edge(lo), edge(hi + 1.0));
        let filled = |bin: &usize| self.counts[*bin] > 0.0;
        let (lowest, highest) = ((first..end).find(filled)?, (first..end).rev().find(filled)?);
        let (below, above) = (self.below[first], total - self.below[end]);
        let within = total - below - above;
        // Σ P·ln P − Σ P·ln Q, code by code.
        let (mut own, mut crossed) = (self.logs_below[end] - self.logs_below[first], 0.0);
        for (bin, more) in [(lowest, below), (highest, above)] {
            own += log_of(self.counts[bin] + more) - log_of(self.counts[bin]);
        }
        let mut begin = first;
        for code in grid.lo..=grid.hi {
            let next = edge(f64::from(code - grid.zero_point) + 1.0);
            let mass = self.below[next] - self.below[begin];
            if mass > 0.0 {
                let beyond = |bin: usize, more: f64| if (begin..next).contains(&bin) { more } else { 0.0 };
                let bins = self.filled_below[next] - self.filled_below[begin];
                crossed += (mass + beyond(lowest, below) + beyond(highest, above)) * (mass / bins).ln();
            }
            begin = next;
        }
        Some((own - crossed) / total + (within / total).ln())
    }
}

/// c·ln c, and 0 for 0.
fn log_of(count: f64) -> f64 {
    if count > 0.0 { count * count.ln() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::{Extremes, histogram::Counters, tests::Random};

    fn histogram(values: &[f32]) -> (Histogram, Range) {
        let mut h = Histogram::new();
        let seen = Extremes::of(values);
        h.add(values, &seen, &mut Counters::new());
        (h, Range { min: seen.min, max: seen.max })
    }

    /// By its definition, bin by bin.
    fn defined(h: &Histogram, range: Range) -> f64 {
        let grid = grid_of(range).unwrap();
        let mut counts: Vec<f64> = h.counts().iter().map(|&n| n as f64).collect();
        counts[BINS] = counts[BINS].min(counts[BINS + 1].max(counts[BINS - 1]));
        let code = |bin: usize| {
            let middle = (bin as f64 - BINS as f64 + 0.5) * h.width();
            (middle / f64::from(grid.scale)).round() as i64 + i64::from(grid.zero_point)
        };
        let inside: Vec<usize> = (0..counts.len()).filter(|&b| (0..=255).contains(&code(b))).collect();
        let (lowest, highest) = (
            *inside.iter().find(|&&b| counts[b] > 0.0).unwrap(),
            *inside.iter().rfind(|&&b| counts[b] > 0.0).unwrap(),
        );
        let mut p: Vec<f64> = inside.iter().map(|&b| counts[b]).collect();
        p[lowest - inside[0]] += (0..inside[0]).map(|b| counts[b]).sum::<f64>();
        p[highest - inside[0]] +=
            (inside[inside.len() - 1] + 1..counts.len()).map(|b| counts[b]).sum::<f64>();
        let q: Vec<f64> = inside
            .iter()
            .map(|&b| {
                let of_code = || inside.iter().filter(|&&o| code(o) == code(b)).map(|&o| counts[o]);
                let filled = of_code().filter(|c| *c > 0.0).count().max(1) as f64;
                if counts[b] > 0.0 { of_code().sum::<f64>() / filled } else { 0.0 }
            })
            .collect();
        let (all_p, all_q) = (p.iter().sum::<f64>(), q.iter().sum::<f64>());
        let pairs = p.iter().zip(&q).filter(|(p, _)| **p > 0.0);
        pairs.map(|(p, q)| p / all_p * ((p / all_p) / (q / all_q)).ln()).sum()
    }

    #[test]
    fn sums_give_what_the_definition_does() {
        let mut random = Random(11);
        let values: Vec<f32> = (0..30_000).map(|_| random.normal()).collect();
        let (h, seen) = histogram(&values);
        let sums = Sums::new(&h);
        for share in [1.0, 0.8, 0.5] {
            // A step of a whole number of bins, where edges of codes and of bins cannot be rounded apart.
            let range = Range { min: seen.min * share, max: seen.max };
            let step = f64::from(grid_of(range).unwrap().scale) / h.width();
            let (expected, got) = (defined(&h, range), sums.divergence(range).unwrap());
            assert!((got - expected).abs() < 0.1 * expected.abs() + 1e-4, "{step}: {got} {expected}");
            assert!(got >= -1e-12);
        }
    }

    #[test]
    fn a_long_tail_is_clipped_and_what_is_dense_is_kept() {
        let mut random = Random(12);
        let mut values: Vec<f32> = (0..100_000).map(|_| random.normal().abs()).collect();
        // One in a thousand is somewhere up to twenty times as far.
        values.extend((0..100).map(|_| 4.0 + 76.0 * random.uniform()));
        let (h, seen) = histogram(&values);
        let found = range(&h, seen);
        assert!(found.min == 0.0 && found.max > 2.5 && found.max < 0.75 * seen.max, "{found:?} of {seen:?}");
        let uniform: Vec<f32> = (0..100_000).map(|_| random.uniform() - 0.25).collect();
        let (h, seen) = histogram(&uniform);
        let found = range(&h, seen);
        assert!(found.min < -0.24 && found.max > 0.73, "{found:?}");
    }

    #[test]
    fn zeros_of_a_relu_do_not_drown_the_rest() {
        let mut random = Random(13);
        let values: Vec<f32> = (0..100_000).map(|_| random.normal().max(0.0)).collect();
        let (h, seen) = histogram(&values);
        assert!(range(&h, seen).max > 2.5);
        let (h, seen) = histogram(&[0.0; 5]);
        assert_eq!(range(&h, seen), Range { min: 0.0, max: 0.0 });
    }
}
