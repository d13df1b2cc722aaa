use super::{ChannelBounds, WeightSums, quantize};
use crate::ops::Clamp;

/// The largest code of a [`DynamicGrid`].
const LARGEST_CODE: i32 = 255;

/// A grid of u8 that is chosen for the numbers that it is to hold, when they are known: what ONNX's
/// DynamicQuantizeLinear chooses.
///
/// ```text
/// lo    = min(0, min x)
/// hi    = max(0, max x)
/// scale = (hi − lo) / 255                      1 where that is 0; NaN where an x is NaN or infinite
/// zero  = quantize(−lo; scale, 0, 0, 255)      so that 0 is a code
/// q     = quantize(x; scale, zero, 0, 255)
/// ```
///
/// each operation in f32, with [`quantize`]. Of numbers that lie farther apart than f32 reaches, the scale is infinite. In
/// either case all codes and the zero point are 0, and what is computed with the scale is NaN, as a product of floats
/// would be NaN or infinite.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DynamicGrid {
    /// Step of the grid: above 0, or NaN.
    pub scale: f32,
    /// Code of 0.
    pub zero_point: i32,
}

impl DynamicGrid {
    /// The grid of these numbers.
    pub fn of(x: &[f32]) -> DynamicGrid {
        let lo = x.iter().fold(0f32, |lo, &x| if x < lo { x } else { lo });
        let hi = x.iter().fold(0f32, |hi, &x| if x > hi { x } else { hi });
        let step = (hi - lo) / LARGEST_CODE as f32;
        let scale = match x.iter().all(|x| x.is_finite()) {
            false => f32::NAN,
            true if step == 0.0 => 1.0,
            true => step,
        };
        DynamicGrid { scale, zero_point: quantize(-lo, scale, 0, 0, LARGEST_CODE) }
    }

    /// The code of a number.
    pub fn code(self, x: f32) -> u8 {
        quantize(x, self.scale, self.zero_point, 0, LARGEST_CODE) as u8
    }
}

/// Turns the sums of a product of u8 by s8 into floats: the one definition that interpreter and kernels share. The grid of the
/// first operand is known beforehand, or one of each row or of all when it is computed.
#[derive(Clone, PartialEq, Debug)]
pub struct Dequantizer {
    /// Σ q_w of each channel.
    pub sums: Vec<i32>,
    /// Scale of each channel's weights.
    pub scales: Vec<f32>,
    /// What is added to each channel, if anything is.
    pub bias: Option<Vec<f32>>,
    /// Bounds on the result.
    pub clamp: Clamp,
}

impl Dequantizer {
    /// Constants for channels with these weights.
    ///
    /// # Errors
    /// Where Σ (q_x − zero)·q_w can leave 32 bits, whatever the codes and the zero point: a magnitude of 255·Σ|q_w|.
    ///
    /// # Panics
    /// Where there are not as many scales, or biases, as channels.
    pub fn new(
        weights: &[WeightSums],
        scales: Vec<f32>,
        bias: Option<Vec<f32>>,
        clamp: Clamp,
    ) -> Result<Dequantizer, String> {
        assert_eq!(scales.len(), weights.len(), "one scale a channel");
        assert!(bias.as_ref().is_none_or(|b| b.len() == weights.len()), "one bias a channel");
        for (c, own) in weights.iter().enumerate() {
            let reach = own.reach_of_any_grid();
            if reach.reach() > i32::MAX.into() {
                let reach = reach.reach();
                return Err(format!("the accumulator of channel {c} can reach {reach}, beyond 32 bits"));
            }
        }
        // Each is within its magnitude, which is within 32 bits.
        let sums = weights.iter().map(|own| own.total as i32).collect();
        Ok(Dequantizer { sums, scales, bias, clamp })
    }

    /// The same for rows of one scale that is known, as its kernels have it: scales hold that of the rows, too, so that it is 1
    /// for [`apply`](Self::apply), and products by it change nothing.
    pub fn with_scale(&self, of_rows: f32) -> Dequantizer {
        let scales = self.scales.iter().map(|of_channel| of_rows * of_channel).collect();
        Dequantizer { scales, ..self.clone() }
    }

    /// The number of accumulator `acc` = Σ q_x·q_w of `channel`, in a row of this grid; `residual` is added last, before
    /// the bounds.
    ///
    /// ```text
    /// y = clamp(f32(acc − zero·Σ q_w)·(scale_row·scale_channel) + bias + residual)
    /// ```
    ///
    /// from left to right, each operation in f32 and none fused with another; what is not there is not added. The integer
    /// is exact modulo 2^32, and its end value fits.
    pub fn apply(&self, acc: i32, channel: usize, row: DynamicGrid, residual: Option<f32>) -> f32 {
        let sum = acc.wrapping_sub(row.zero_point.wrapping_mul(self.sums[channel]));
        let mut y = sum as f32 * (row.scale * self.scales[channel]);
        if let Some(bias) = &self.bias {
            y += bias[channel];
        }
        if let Some(residual) = residual {
            y += residual;
        }
        self.clamp.apply(y)
    }
}

impl WeightSums {
    /// Bounds of Σ (q_x − zero)·q_w over all u8 inputs and zero points.
    fn reach_of_any_grid(self) -> ChannelBounds {
        let magnitude = self.magnitude.saturating_mul(LARGEST_CODE.into());
        ChannelBounds { min: -magnitude, max: magnitude }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(x: &[f32]) -> (DynamicGrid, Vec<u8>) {
        let grid = DynamicGrid::of(x);
        (grid, x.iter().map(|&x| grid.code(x)).collect())
    }

    #[test]
    fn grids_hold_zero_and_both_ends() {
        let (grid, q) = codes(&[-1.0, 0.0, 4.1]);
        assert_eq!((grid.scale, grid.zero_point), (0.02, 50));
        assert_eq!(q, [0, 50, 255]);
        // Of one sign alone, too.
        assert_eq!(codes(&[3.0, 5.1]), (DynamicGrid { scale: 5.1 / 255.0, zero_point: 0 }, vec![150, 255]));
        assert_eq!(codes(&[-5.1, -3.0]).1, [0, 105]);
    }

    #[test]
    fn zeros_and_what_is_next_to_them() {
        assert_eq!(codes(&[0.0, -0.0]), (DynamicGrid { scale: 1.0, zero_point: 0 }, vec![0, 0]));
        assert_eq!(codes(&[]).0, DynamicGrid { scale: 1.0, zero_point: 0 });
        // A range that has no 255th part.
        assert_eq!(codes(&[1e-45]), (DynamicGrid { scale: 1.0, zero_point: 0 }, vec![0]));
        // One whose 255th part is rounded by much: codes saturate.
        let (grid, q) = codes(&[-200.0 * 1e-45, 160.0 * 1e-45]);
        assert_eq!((grid.scale, grid.zero_point), (1e-45, 200));
        assert_eq!(q, [0, 255]);
    }

    #[test]
    fn what_is_not_finite_makes_the_scale_so() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (grid, q) = codes(&[1.0, x, -2.0]);
            assert!(grid.scale.is_nan() && grid.zero_point == 0, "{x}: {grid:?}");
            assert_eq!(q, [0, 0, 0]);
        }
        let (grid, q) = codes(&[f32::MAX, f32::MIN]);
        assert_eq!((grid, q), (DynamicGrid { scale: f32::INFINITY, zero_point: 0 }, vec![0, 0]));
    }

    #[test]
    fn sums_that_could_leave_32_bits_are_refused() {
        let of = |magnitude| {
            let weights = [WeightSums { total: 0, magnitude }];
            Dequantizer::new(&weights, vec![1.0], None, Clamp::NONE)
        };
        assert!(of(i64::from(i32::MAX) / 255).is_ok());
        assert!(of(i64::from(i32::MAX) / 255 + 1).unwrap_err().contains("beyond 32 bits"));
    }

    #[test]
    fn numbers_are_made_in_the_order_of_the_equation() {
        let weights = [WeightSums { total: -3, magnitude: 7 }];
        let clamp = Clamp { lo: -1.0, hi: 1.0 };
        let d = Dequantizer::new(&weights, vec![0.1], Some(vec![0.7]), clamp).unwrap();
        let row = DynamicGrid { scale: 0.3, zero_point: 10 };
        assert_eq!(d.apply(-29, 0, row, Some(-0.2)), 1f32 * (0.3 * 0.1) + 0.7 + -0.2);
        assert_eq!(d.apply(1000, 0, row, None), 1.0);
        assert_eq!(d.apply(-1000, 0, row, None), -1.0);
    }
}
