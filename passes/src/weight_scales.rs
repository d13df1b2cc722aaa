//! Scales of weights of the least squared error.
//!
//! The scale with the largest weight at the largest code clips nothing. A finer one clips the largest weights and rounds all
//! others better; which of them has the least error Σ (w − ŵ)² is found by trying (Nagel et al. 2021, "A white paper on
//! neural network quantization", 3.1). Where weights are rounded by the moments of their inputs afterwards, what was clipped
//! is made up for as what was rounded is.

use qcc_ir::numerics::fake_quant;

/// Parts of the scale that clips nothing which are tried: below half of it clipping always costs more.
const TRIED: std::ops::RangeInclusive<u32> = 64..=128;

/// The scale of some weights with codes from −`codes` to `codes`, and what is left of the squared error.
pub(crate) fn least_error(weights: &[f32], codes: i32) -> (f64, f64) {
    let largest = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
    let whole = f64::from(largest) / f64::from(codes);
    let error = |scale: f64| -> f64 {
        let scale = scale as f32;
        if !scale.is_normal() {
            return f64::INFINITY;
        }
        let of = |w: &f32| f64::from(w - fake_quant(*w, scale, 0, -codes, codes)).powi(2);
        weights.iter().map(of).sum()
    };
    let clipping_nothing = error(whole);
    let mut best = (whole, clipping_nothing);
    for part in TRIED.rev() {
        let scale = whole * f64::from(part) / f64::from(*TRIED.end());
        let own = error(scale);
        if own < best.1 {
            best = (scale, own);
        }
    }
    let is_error = clipping_nothing > 0.0 && clipping_nothing.is_finite();
    (best.0, if is_error { best.1 / clipping_nothing } else { 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlier_is_clipped_where_that_pays_and_nothing_is_where_it_does_not() {
        // 4,000 weights up to 1 and one of 1.5.
        let mut weights: Vec<f32> = (0..4000).map(|i| (i * 7919 % 4001) as f32 / 2000.5 - 1.0).collect();
        weights.push(1.5);
        let (scale, left) = least_error(&weights, 127);
        assert!(scale < 1.49 / 127.0 && left < 1.0, "{scale} {left}");
        // Codes themselves lose nothing by the scale that has them all.
        let codes: Vec<f32> = (-127..=127).map(|q| q as f32 * 0.25).collect();
        assert_eq!(least_error(&codes, 127), (0.25, 1.0));
        assert_eq!(least_error(&[0.0; 9], 127).0, 0.0);
        assert_eq!(least_error(&[f32::MIN_POSITIVE; 2], 127).1, 1.0);
    }
}
