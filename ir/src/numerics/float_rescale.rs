//! Factors in f32 of the integer ops that are not products of matrices, as ONNX Runtime has them: what
//! [`RequantMode::Float`](super::RequantMode::Float) is for those that are.

use super::fixed_point::power;
use crate::OutputGrid;
use serde::{Deserialize, Serialize};

/// How sums, products and averages of codes become codes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum Rescaling {
    /// By integer factors and a rounding shift.
    #[default]
    FixedPoint,
    /// In f32, rounded half to even: given the same codes, ONNX Runtime's x86 kernels make the same of them.
    Float,
}

/// Factors of a quantized sum or difference: fma(q₁, r₁, fma(q₂, r₂, c)), rounded half to even, is the code. The zero
/// points of operands and result are in c = z_y − fma(r₁, z₁, r₂·z₂). Each operation is rounded to f32 (ONNX Runtime's
/// `MlasQLinearAdd` on CPUs that fuse).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FloatAddRescale {
    /// s₁/s_y.
    pub r1: f32,
    /// s₂/s_y; negative for a difference.
    pub r2: f32,
    /// What is neither's.
    pub c: f32,
}

/// q·r + t, rounded once: f64 holds it exactly within the range of [`FloatAddRescale::new`].
fn fma(q: i32, r: f32, t: f32) -> f32 {
    (f64::from(q) * f64::from(r) + f64::from(t)) as f32
}

impl FloatAddRescale {
    /// Factors for operands of these steps (negative to be subtracted) and zero points. `None` where a factor's magnitude is
    /// not in [2^−12, 2^7): within it, products and sums are multiples of 2^−35 below 2^17, so that f64 holds them exactly
    /// and CPUs that do not fuse get the same bits.
    pub fn new(scales: [f32; 2], zero_points: [i32; 2], output: OutputGrid) -> Option<FloatAddRescale> {
        let [r1, r2] = scales.map(|s| s / output.scale);
        let fits = |r: f32| (power(-12)..power(7)).contains(&f64::from(r.abs()));
        let [z1, z2] = zero_points;
        let c = output.zero_point as f32 - fma(z1, r1, r2 * z2 as f32);
        (fits(r1) && fits(r2)).then_some(FloatAddRescale { r1, r2, c })
    }

    /// The code of two codes of 8 bits, before it is bounded.
    pub fn apply(self, q1: i32, q2: i32) -> i32 {
        fma(q1, self.r1, fma(q2, self.r2, self.c)).round_ties_even() as i32
    }
}

/// Factor of a quantized product: f32(u₁·u₂)·r + z_y with u = q − zero_point, each operation rounded to f32, then half to
/// even (ONNX Runtime's `MlasQLinearMul`).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FloatMulRescale {
    /// s₁·s₂/s_y.
    pub r: f32,
    /// Zero point of the result.
    pub z: f32,
}

impl FloatMulRescale {
    /// The factor for operands of these steps. `None` where it is not above 0 and below 2^12.
    pub fn new([s1, s2]: [f32; 2], output: OutputGrid) -> Option<FloatMulRescale> {
        let r = s1 * s2 / output.scale;
        (r > 0.0 && f64::from(r) < power(12)).then_some(FloatMulRescale { r, z: output.zero_point as f32 })
    }

    /// The code of operands less their zero points, before it is bounded. They are within ±255.
    pub fn apply(self, u1: i32, u2: i32) -> i32 {
        ((u1 * u2) as f32 * self.r + self.z).round_ties_even() as i32
    }
}

/// Factor of the sum of a pool's window: s_x/(s_y·count), each operation rounded to f32; the sum is converted, multiplied and
/// rounded half to even (ONNX Runtime's `MlasQLinearGlobalAveragePool`).
///
/// `None` where the factor is not above 0 and below 2^20.
pub fn float_average(scale: f32, output_scale: f32, count: usize) -> Option<f32> {
    let factor = scale / (output_scale * count as f32);
    (factor > 0.0 && f64::from(factor) < power(20)).then_some(factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    fn grid(scale: f32, zero_point: i32) -> OutputGrid {
        OutputGrid::full(DType::U8, scale, zero_point).unwrap()
    }

    #[test]
    fn sums_round_as_a_fused_multiplication_does() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for _ in 0..20_000 {
            let scales = [next(), next()].map(|n| ((n % 19_000) as f32 / 1000.0 - 12.0).exp2());
            let zeros = [next(), next()].map(|n| (n % 256) as i32);
            let Some(r) = FloatAddRescale::new(scales, zeros, grid(1.0, (next() % 256) as i32)) else {
                continue;
            };
            let (a, b) = ((next() % 256) as i32, (next() % 256) as i32);
            let fused = (a as f32).mul_add(r.r1, (b as f32).mul_add(r.r2, r.c));
            assert_eq!(r.apply(a, b), fused.round_ties_even() as i32, "{r:?} {a} {b}");
        }
    }

    #[test]
    fn golden_vectors() {
        let sum = FloatAddRescale::new([0.5, 0.25], [10, 20], grid(0.5, 7)).unwrap();
        assert_eq!(sum, FloatAddRescale { r1: 1.0, r2: 0.5, c: -13.0 });
        assert_eq!(
            [sum.apply(20, 21), sum.apply(21, 21), sum.apply(0, 0)],
            [18, 18, -13],
            "ties go to even codes"
        );
        let product = FloatMulRescale::new([0.5, 0.5], grid(0.5, 3)).unwrap();
        assert_eq!([product.apply(3, 1), product.apply(-3, 1), product.apply(255, -255)], [4, 2, -32510]);
        assert_eq!(float_average(0.5, 0.25, 4), Some(0.5));
    }

    #[test]
    fn what_leaves_its_range_is_refused() {
        assert_eq!(FloatAddRescale::new([128.0, 1.0], [0, 0], grid(1.0, 0)), None);
        assert_eq!(FloatAddRescale::new([1.0, 1e-4], [0, 0], grid(1.0, 0)), None);
        assert_eq!(FloatMulRescale::new([1e-30, 1e-30], grid(1.0, 0)), None);
        assert_eq!(float_average(1e30, 1e-30, 4), None);
    }
}
