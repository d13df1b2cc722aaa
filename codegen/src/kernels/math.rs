//! The elementary functions of `qcc_ir::numerics::math` on lanes: the same operations in the same order, so the same
//! bits.

use super::lanes::{FloatComparison, Lanes};
use qcc_ir::{numerics::math, ops::UnaryKind};

/// c₀·xⁿ + … + cₙ.
fn horner<L: Lanes>(l: &mut L, x: L::Value, coefficients: &[f32]) -> L::Value {
    let mut sum = l.f32(coefficients[0]);
    for &c in &coefficients[1..] {
        let product = l.fmul(sum, x);
        let c = l.f32(c);
        sum = l.fadd(product, c);
    }
    sum
}

fn scaled<L: Lanes>(l: &mut L, x: L::Value, c: f32) -> L::Value {
    let c = l.f32(c);
    l.fmul(x, c)
}

fn plus<L: Lanes>(l: &mut L, x: L::Value, c: f32) -> L::Value {
    let c = l.f32(c);
    l.fadd(x, c)
}

fn power_of_two<L: Lanes>(l: &mut L, n: L::Value) -> L::Value {
    let bias = l.i32(127);
    let n = l.iadd(n, bias);
    let bits = l.shift_left(n, 23);
    l.as_f32(bits)
}

pub(crate) fn exp<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let clamped = l.within(x, math::EXP_MIN, math::EXP_MAX);
    let n = scaled(l, clamped, math::LOG2_E);
    let n = l.nearest(n);
    let t = scaled(l, n, math::LN_2_HI);
    let high = l.fsub(clamped, t);
    let low = scaled(l, n, math::LN_2_LO);
    let r = l.fsub(high, low);
    let square = l.fmul(r, r);
    let p = horner(l, r, &math::EXP_POLYNOMIAL);
    let p = l.fmul(p, square);
    let p = l.fsub(p, low);
    let p = l.fadd(p, high);
    let p = plus(l, p, 1.0);
    let n = l.truncate(n);
    let half = l.shift_right(n, 1);
    let rest = l.isub(n, half);
    let (low, high) = (power_of_two(l, half), power_of_two(l, rest));
    let y = l.fmul(p, low);
    let y = l.fmul(y, high);
    let nan = l.is_nan(x);
    l.select(nan, x, y)
}

pub(crate) fn ln<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let least = l.f32(f32::MIN_POSITIVE);
    let denormal = l.less(x, least);
    let up = scaled(l, x, math::DENORMAL_SCALE);
    let normal = l.select(denormal, up, x);
    let bits = l.as_i32(normal);
    let half = l.i32(math::SQRT_HALF_BITS);
    let shifted = l.isub(bits, half);
    let n = l.shift_right(shifted, 23);
    let (scaled_by, zero) = (l.i32(23), l.i32(0));
    let scaled_by = l.select(denormal, scaled_by, zero);
    let n = l.isub(n, scaled_by);
    let n = l.to_f32(n);
    let mantissa = l.i32(0x007f_ffff);
    let f = l.and(shifted, mantissa);
    let f = l.iadd(f, half);
    let f = l.as_f32(f);
    let one = l.f32(1.0);
    let f = l.fsub(f, one);
    let square = l.fmul(f, f);
    let tail = horner(l, f, &math::LN_POLYNOMIAL);
    let tail = l.fmul(tail, f);
    let tail = l.fmul(tail, square);
    let t = scaled(l, n, math::LN_2_LO);
    let tail = l.fadd(tail, t);
    let t = scaled(l, square, 0.5);
    let tail = l.fsub(tail, t);
    let y = l.fadd(f, tail);
    let t = scaled(l, n, math::LN_2_HI);
    let y = l.fadd(y, t);
    let zero = l.f32(0.0);
    let is_zero = l.compare_f32(FloatComparison::Equal, x, zero);
    let lowest = l.f32(f32::NEG_INFINITY);
    let y = l.select(is_zero, lowest, y);
    let negative = l.is_negative(x);
    let nan = l.f32(f32::NAN);
    let y = l.select(negative, nan, y);
    let highest = l.f32(f32::INFINITY);
    let finite = l.less(x, highest);
    l.select(finite, y, x)
}

/// An odd function of x: `small` where |x| is below a limit, else `large`, which is that of |x|, with the sign of x.
fn odd<L: Lanes>(
    l: &mut L,
    x: L::Value,
    magnitude: L::Value,
    limit: f32,
    small: L::Value,
    large: L::Value,
) -> L::Value {
    let opposite = l.neg(large);
    let negative = l.is_negative(x);
    let large = l.select(negative, opposite, large);
    let limit = l.f32(limit);
    let is_small = l.less(magnitude, limit);
    l.select(is_small, small, large)
}

pub(crate) fn tanh<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let square = l.fmul(x, x);
    let small = horner(l, square, &math::TANH_POLYNOMIAL);
    let small = l.fmul(small, square);
    let small = l.fmul(small, x);
    let small = l.fadd(small, x);
    let magnitude = l.abs(x);
    let twice = l.fadd(magnitude, magnitude);
    let e = exp(l, twice);
    let e = plus(l, e, 1.0);
    let two = l.f32(2.0);
    let quotient = l.fdiv(two, e);
    let one = l.f32(1.0);
    let large = l.fsub(one, quotient);
    odd(l, x, magnitude, math::TANH_SMALL, small, large)
}

/// e^−|x|.
fn exp_of_minus_magnitude<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let magnitude = l.abs(x);
    let minus = l.neg(magnitude);
    exp(l, minus)
}

pub(crate) fn sigmoid<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let t = exp_of_minus_magnitude(l, x);
    let one = l.f32(1.0);
    let negative = l.is_negative(x);
    let sum = l.fadd(one, t);
    let rounded = l.fsub(sum, one);
    let lost = l.fsub(t, rounded);
    let numerator = l.select(negative, t, one);
    let y = l.fdiv(numerator, sum);
    let correction = l.fmul(y, lost);
    l.fsub(y, correction)
}

pub(crate) fn erf<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let square = l.fmul(x, x);
    let small = horner(l, square, &math::ERF_POLYNOMIAL);
    let small = l.fmul(small, x);
    let small = l.fadd(small, x);
    let magnitude = l.abs(x);
    let limit = l.f32(math::ERF_MAX);
    let magnitude = l.smaller(limit, magnitude);
    let exponent = horner(l, magnitude, &math::ERF_TAIL);
    let exponent = l.fmul(exponent, magnitude);
    let exponent = l.fsub(exponent, magnitude);
    let e = exp(l, exponent);
    let one = l.f32(1.0);
    let large = l.fsub(one, e);
    odd(l, x, magnitude, math::ERF_SMALL, small, large)
}

pub(crate) fn softplus<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    let t = exp_of_minus_magnitude(l, x);
    let one = l.f32(1.0);
    let u = l.fadd(one, t);
    let rounded = l.fsub(u, one);
    let zero = l.f32(0.0);
    let lost = l.compare_f32(FloatComparison::Equal, rounded, zero);
    let log_u = ln(l, u);
    let quotient = l.fdiv(t, rounded);
    let product = l.fmul(log_u, quotient);
    let log = l.select(lost, t, product);
    let positive = l.larger(x, zero);
    l.fadd(positive, log)
}

/// Whether [`unary`] has the function.
pub(crate) fn has_unary(kind: UnaryKind) -> bool {
    use UnaryKind::*;
    // The library has its own functions of angles; `Not` is of booleans.
    !matches!(kind, Sin | Cos | Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh | Not)
}

/// [`UnaryKind::apply`] on four lanes, for the kinds that [`has_unary`] names; of others the operand.
pub(crate) fn unary<L: Lanes>(l: &mut L, kind: UnaryKind, x: L::Value) -> L::Value {
    use UnaryKind::*;
    let negative = |l: &mut L, yes: L::Value, no: L::Value| {
        let mask = l.is_negative(x);
        l.select(mask, yes, no)
    };
    match kind {
        Identity => x,
        Sin | Cos | Tan | Asin | Acos | Atan | Sinh | Cosh | Asinh | Acosh | Atanh | Not => x,
        Relu => {
            let zero = l.f32(0.0);
            l.larger(zero, x)
        }
        LeakyRelu { alpha } => {
            let y = scaled(l, x, alpha);
            negative(l, y, x)
        }
        Clip { lo, hi } => l.within(x, lo, hi),
        Sigmoid => sigmoid(l, x),
        Tanh => tanh(l, x),
        HardSigmoid { alpha, beta } => {
            let y = scaled(l, x, alpha);
            let y = plus(l, y, beta);
            l.within(y, 0.0, 1.0)
        }
        HardSwish => {
            let y = scaled(l, x, (1.0 / 6.0) as f32);
            let y = plus(l, y, 0.5);
            let y = l.within(y, 0.0, 1.0);
            l.fmul(x, y)
        }
        Silu => {
            let y = sigmoid(l, x);
            l.fmul(x, y)
        }
        Gelu => {
            let y = scaled(l, x, std::f64::consts::FRAC_1_SQRT_2 as f32);
            let y = erf(l, y);
            half_of_one_plus(l, x, y)
        }
        GeluTanh => {
            let square = l.fmul(x, x);
            let cube = l.fmul(square, x);
            let t = scaled(l, cube, 0.044715);
            let inner = l.fadd(x, t);
            let y = scaled(l, inner, SQRT_2_BY_PI);
            let y = tanh(l, y);
            half_of_one_plus(l, x, y)
        }
        Elu { alpha } => {
            let y = exp_minus_one(l, x, alpha);
            negative(l, y, x)
        }
        Selu { alpha, gamma } => {
            let y = exp_minus_one(l, x, alpha);
            let zero = l.f32(0.0);
            let positive = l.less(zero, x);
            let y = l.select(positive, x, y);
            scaled(l, y, gamma)
        }
        Celu { alpha } => {
            let divisor = l.f32(alpha);
            let y = l.fdiv(x, divisor);
            let y = exp_minus_one(l, y, alpha);
            negative(l, y, x)
        }
        Swish { alpha } => {
            let y = scaled(l, x, alpha);
            let y = sigmoid(l, y);
            l.fmul(x, y)
        }
        ThresholdedRelu { alpha } => {
            let (alpha, zero) = (l.f32(alpha), l.f32(0.0));
            // So that NaN stays.
            let low = l.compare_f32(FloatComparison::LessOrEqual, x, alpha);
            l.select(low, zero, x)
        }
        Shrink { lambda, bias } => {
            let (lo, hi) = (l.f32(-lambda), l.f32(lambda));
            let (below, above) = (l.less(x, lo), l.less(hi, x));
            let nan = l.is_nan(x);
            let (bias, zero) = (l.f32(bias), l.f32(0.0));
            let (up, down) = (l.fadd(x, bias), l.fsub(x, bias));
            let y = l.select(nan, x, zero);
            let y = l.select(above, down, y);
            l.select(below, up, y)
        }
        Mish => {
            let y = softplus(l, x);
            let y = tanh(l, y);
            l.fmul(x, y)
        }
        Softplus => softplus(l, x),
        Softsign => {
            let y = l.abs(x);
            let y = plus(l, y, 1.0);
            l.fdiv(x, y)
        }
        Exp => exp(l, x),
        Log => ln(l, x),
        Sqrt => l.sqrt(x),
        Reciprocal => {
            let one = l.f32(1.0);
            l.fdiv(one, x)
        }
        Erf => erf(l, x),
        Neg => l.neg(x),
        Abs => l.abs(x),
        Sign => {
            let (zero, minus) = (l.f32(0.0), l.f32(-1.0));
            let y = negative(l, minus, x);
            let positive = l.less(zero, x);
            let one = l.f32(1.0);
            l.select(positive, one, y)
        }
        Floor => l.floor(x),
        Ceil => l.ceil(x),
        Round => l.nearest(x),
    }
}

/// √(2/π), rounded to f32.
const SQRT_2_BY_PI: f32 = 0.797_884_6;

/// ½·x·(1 + y), in this order.
fn half_of_one_plus<L: Lanes>(l: &mut L, x: L::Value, y: L::Value) -> L::Value {
    let half = scaled(l, x, 0.5);
    let y = plus(l, y, 1.0);
    l.fmul(half, y)
}

/// alpha·(eˣ − 1).
fn exp_minus_one<L: Lanes>(l: &mut L, x: L::Value, alpha: f32) -> L::Value {
    let e = exp(l, x);
    let one = l.f32(1.0);
    let e = l.fsub(e, one);
    scaled(l, e, alpha)
}

/// [`quantize`](qcc_ir::numerics::quantize): a grid whose constants are lanes.
pub(crate) struct Grid<V> {
    pub(crate) scale: V,
    /// As s32; absent where it is 0.
    pub(crate) zero_point: Option<V>,
    /// lo − zero_point and hi − zero_point, as f32.
    pub(crate) least: V,
    /// See `least`.
    pub(crate) most: V,
}

impl<V: Copy> Grid<V> {
    /// round(x / scale) within the bounds, as s32.
    pub(crate) fn steps<L: Lanes<Value = V>>(&self, l: &mut L, x: V) -> V {
        let quotient = l.fdiv(x, self.scale);
        let rounded = l.nearest(quotient);
        let above = l.larger(rounded, self.least);
        let within = l.smaller(above, self.most);
        l.truncate(within)
    }

    /// The code of a real number, as s32.
    pub(crate) fn quantize<L: Lanes<Value = V>>(&self, l: &mut L, x: V) -> V {
        let steps = self.steps(l, x);
        self.zero_point.map_or(steps, |z| l.iadd(steps, z))
    }

    /// The real number of so many steps.
    pub(crate) fn real<L: Lanes<Value = V>>(&self, l: &mut L, steps: V) -> V {
        let steps = l.to_f32(steps);
        l.fmul(steps, self.scale)
    }

    /// The real number of a code, as s32.
    pub(crate) fn dequantize<L: Lanes<Value = V>>(&self, l: &mut L, code: V) -> V {
        let steps = self.zero_point.map_or(code, |z| l.isub(code, z));
        self.real(l, steps)
    }
}
