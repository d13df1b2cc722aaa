//! The range for which the squared error of quantization is least.

use super::{
    Range,
    histogram::{BINS, Histogram},
    search::least_cost,
};
use crate::insert_fake_quant::grid_of;

/// 1.5·2^52: rounds an f64 of magnitude below 2^51 to an integer that is added to it.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// The range whose u8 grid, with its zero point where [`grid_of`] puts it, has the least expected squared error of rounding
/// and clipping, over a histogram whose values are spread evenly within each bin. (As "MSE" in Nagel et al., "A White Paper
/// on Neural Network Quantization", 2021, section 3.1; "OMSE" in Choukroun et al., 2019.)
pub(crate) fn range(histogram: &Histogram, seen: Range) -> Range {
    least_cost(seen, |range| squared_error(histogram, range).unwrap_or(f64::INFINITY))
}

/// The mean squared error of values on the grid over a range; `None` where there is no grid, or no value.
///
/// For a grid of step s and codes n from n₀ to n₁ (zero is n = 0), a value x has the code n(x) = clamp(round(x/s), n₀, n₁)
/// and the error e = x − n·s. The integral of e² from 0 to x has a closed form within and beyond the grid,
///
/// ```text
/// E(x) = s³·(n(x)/12 + (x/s − n(x))³/3),
/// ```
///
/// so a bin from a to b adds its count times (E(b) − E(a))/(b − a), exactly, however many steps lie within it.
pub(crate) fn squared_error(histogram: &Histogram, range: Range) -> Option<f64> {
    let (first, last) = histogram.ends()?;
    let grid = grid_of(range).ok()?;
    let step = f64::from(grid.scale);
    let [lo, hi] = [grid.lo, grid.hi].map(|code| f64::from(code - grid.zero_point));
    let bins_a_step = step / histogram.width();
    let steps_a_bin = 1.0 / bins_a_step;
    let integral = |edge: usize| {
        let x = (edge as f64 - BINS as f64) * steps_a_bin;
        let n = ((x + ROUNDER) - ROUNDER).clamp(lo, hi);
        let e = x - n;
        n / 12.0 + e * e * e / 3.0
    };
    let mut sum = 0.0;
    let mut before = integral(first);
    for (bin, &n) in histogram.counts()[first..=last].iter().enumerate() {
        let after = integral(first + bin + 1);
        sum += n as f64 * (after - before);
        before = after;
    }
    Some(sum * bins_a_step * step * step / histogram.total() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::{
        Extremes,
        histogram::Counters,
        tests::{Random, quantized},
    };

    fn histogram(values: &[f32]) -> (Histogram, Range) {
        let mut h = Histogram::new();
        let seen = Extremes::of(values);
        h.add(values, &seen, &mut Counters::new());
        (h, Range { min: seen.min, max: seen.max })
    }

    fn measured(values: &[f32], range: Range) -> f64 {
        let error = |x: &f32| f64::from(x - quantized(*x, range)).powi(2);
        values.iter().map(error).sum::<f64>() / values.len() as f64
    }

    #[test]
    fn the_error_is_that_of_quantized_values() {
        let mut random = Random(5);
        let values: Vec<f32> = (0..40_000).map(|_| random.normal()).collect();
        let (h, seen) = histogram(&values);
        for share in [1.0, 0.7, 0.5, 0.2] {
            let range = Range { min: seen.min * share, max: seen.max * share * share };
            let (expected, got) = (measured(&values, range), squared_error(&h, range).unwrap());
            assert!((got / expected - 1.0).abs() < 0.03, "{share}: {got} {expected}");
        }
    }

    #[test]
    fn uniform_values_are_not_clipped() {
        let mut random = Random(6);
        let values: Vec<f32> = (0..50_000).map(|_| 4.0 * random.uniform() - 1.0).collect();
        let (h, seen) = histogram(&values);
        let found = range(&h, seen);
        // Clipping t off one end costs t³/3 a unit of density and saves a share of t of s²/12: t is below a step.
        let step = 4.0 / 255.0;
        assert!((found.min + 1.0).abs() < 1.5 * step && (found.max - 3.0).abs() < 1.5 * step, "{found:?}");
    }

    /// The known optima of clipping for 8 bits: of a Gaussian 3.92σ, of a Laplacian 9.89b (ACIQ: Banner et al., "Post
    /// training 4-bit quantization of convolutional networks", 2019, there for 2^8 intervals).
    #[test]
    fn gaussian_and_laplacian_values_are_clipped_where_theory_says() {
        let mut random = Random(7);
        let normal: Vec<f32> = (0..1_000_000).map(|_| random.normal()).collect();
        let laplace: Vec<f32> = (0..1_000_000)
            .map(|_| {
                let u = random.uniform() - 0.5;
                -u.signum() * (1.0 - 2.0 * u.abs()).max(1e-7).ln()
            })
            .collect();
        for (values, optimum) in [(normal, 3.92), (laplace, 9.89)] {
            let (h, seen) = histogram(&values);
            let found = range(&h, seen);
            let (lo, hi) = (-found.min / optimum, found.max / optimum);
            assert!((0.9..1.1).contains(&lo) && (0.9..1.1).contains(&hi), "{optimum}: {found:?} of {seen:?}");
            assert!(measured(&values, found) < measured(&values, seen));
        }
    }

    #[test]
    fn one_side_and_nothing_at_all_have_ranges() {
        let mut random = Random(8);
        let values: Vec<f32> = (0..20_000).map(|_| random.normal().max(0.0)).collect();
        let (h, seen) = histogram(&values);
        let found = range(&h, seen);
        assert!(found.min == 0.0 && found.max > 3.0 && found.max <= seen.max, "{found:?}");
        let (h, seen) = histogram(&[0.0; 10]);
        assert_eq!(range(&h, seen), Range { min: 0.0, max: 0.0 });
        let (h, seen) = histogram(&[2.5; 10]);
        assert!((range(&h, seen).max - 2.5).abs() < 0.01);
    }
}
