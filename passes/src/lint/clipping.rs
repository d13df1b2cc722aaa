//! What grids of activations cut off.

use super::{Finding, Rule, Subject};
use crate::Range;
use std::ops::AddAssign;

/// How much more noise than rounding may come from what is cut off. A grid of least error is below 1.
const MOST_OVER_ROUNDING: f64 = 4.0;
/// The least noise over signal that is told of, 25 dB: networks of 8 bits have 20 to 35 dB in their results, so that more than this in one
/// value sets the error of all. (ResNet8's scores, calibrated on 100 of 2,000 images, are cut off to 31 dB, which the softmax behind them
/// does not notice.)
const LEAST_RATIO: f64 = 1.0 / 300.0;
/// How much more than on the calibration samples it must be: some calibrators cut off on purpose.
const MORE_THAN_CALIBRATED: f64 = 4.0;
/// Steps of a grid of 8 bits.
const STEPS: f64 = 255.0;

/// What of a value was beyond its range on some samples. Sums of floats: add batches in their order.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Clipping {
    /// Elements.
    pub elements: u64,
    /// Those that are beyond the range by more than half a step of its grid.
    pub beyond: u64,
    /// Σ (x − clipped x)².
    pub noise: f64,
    /// Σ x².
    pub signal: f64,
    /// The smallest and the largest element, 0 included.
    pub seen: (f32, f32),
}

/// A range as its grid has it: with zero, in steps of a 255th.
fn grid(range: Range) -> (f64, f64, f64) {
    let (lo, hi) = (f64::from(range.min.min(0.0)), f64::from(range.max.max(0.0)));
    (lo, hi, (hi - lo) / STEPS)
}

impl Clipping {
    /// Of these elements. What is not finite is left out.
    pub fn of(elements: &[f32], range: Range) -> Clipping {
        let (lo, hi, step) = grid(range);
        let mut clipping = Clipping { elements: elements.len() as u64, ..Clipping::default() };
        for &x in elements.iter().filter(|x| x.is_finite()) {
            let wide = f64::from(x);
            let excess = wide - wide.clamp(lo, hi);
            clipping.beyond += u64::from(excess.abs() > step / 2.0);
            clipping.noise += excess * excess;
            clipping.signal += wide * wide;
            clipping.seen = (clipping.seen.0.min(x), clipping.seen.1.max(x));
        }
        clipping
    }

    /// What to say of a value of this range with such clipping on so many other samples, where on the calibration samples it
    /// had another.
    pub fn finding(
        &self,
        value: &str,
        range: Range,
        samples: usize,
        calibrated: &Clipping,
    ) -> Option<Finding> {
        let (lo, hi, step) = grid(range);
        let rounding = step * step / 12.0 * self.elements as f64;
        let mean = |c: &Clipping| c.noise / c.elements.max(1) as f64;
        let is_harmful = self.noise > MOST_OVER_ROUNDING * rounding && self.noise > LEAST_RATIO * self.signal;
        if !is_harmful || mean(self) <= MORE_THAN_CALIBRATED * mean(calibrated) {
            return None;
        }
        let share = |c: &Clipping| 100.0 * c.beyond as f64 / c.elements.max(1) as f64;
        let (min, max) = (lo.min(self.seen.0.into()), hi.max(self.seen.1.into()));
        let growth = match hi - lo {
            0.0 => "of zero alone would have to be".to_string(),
            width => format!("would have to grow by {:.0} % to", 100.0 * ((max - min) / width - 1.0)),
        };
        let what = format!(
            "{:.3} % of its elements on {samples} other samples are beyond its range of {lo:.4} to {hi:.4} ({:.3} % on the calibration \
             samples), which {growth} {min:.4} to {max:.4}; cutting them off costs {:.1} times the error of rounding",
            share(self),
            share(calibrated),
            match rounding {
                0.0 => f64::INFINITY,
                rounding => self.noise / rounding,
            },
        );
        let advice = "calibrate on more samples, such as these are (--calibrate), or by a calibrator that cuts off less \
                      (--calibrator min-max, or for this value VALUE=min-max)";
        Some(Finding::new(Rule::ActivationSaturates, Subject::Value(value.into()), what, advice))
    }
}

impl AddAssign for Clipping {
    fn add_assign(&mut self, other: Clipping) {
        self.elements += other.elements;
        self.beyond += other.beyond;
        self.noise += other.noise;
        self.signal += other.signal;
        self.seen = (self.seen.0.min(other.seen.0), self.seen.1.max(other.seen.1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::tests::Random;

    #[test]
    fn what_is_cut_off_is_told_where_it_costs_more_than_rounding_and_was_not_meant() {
        let range = Range { min: -4.0, max: 4.0 };
        let mut random = Random(5);
        let mut of = |spread: f32| {
            let elements: Vec<f32> = (0..5000).map(|_| spread * random.normal()).collect();
            Clipping::of(&elements, range)
        };
        let calibrated = of(0.9);
        assert_eq!(of(1.0).finding("x", range, 10, &calibrated), None);
        let found = of(2.0).finding("x", range, 10, &calibrated).unwrap();
        assert_eq!(found.subject, Subject::Value("x".into()));
        assert!(
            found.what.contains("on 10 other samples") && found.what.contains("would have to grow by"),
            "{found}"
        );
        // A calibrator that cuts off as much on its own samples knows what it does.
        assert_eq!(of(2.0).finding("x", range, 10, &of(2.0)), None);
        let mut sum = of(1.0);
        sum += of(2.0);
        assert_eq!(sum.elements, 10_000);
        assert!(sum.seen.1 > 4.0 && sum.beyond > 0);
        let nothing = Range { min: 0.0, max: 0.0 };
        let found = Clipping::of(&[1.0], nothing).finding("x", nothing, 1, &Clipping::default()).unwrap();
        assert!(found.what.contains("of zero alone would have to be 0.0000 to 1.0000"), "{found}");
    }
}
