//! The elementary functions of `qcc_ir::numerics::math` on four lanes: the same operations in the same order, so the
//! same bits.

use super::vector::{cast, f32x4, i32x4, larger, less, select, smaller, within};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    condcodes::FloatCC,
    types::{F32X4, I32X4},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{numerics::math, ops::UnaryKind};

/// c₀·xⁿ + … + cₙ.
fn horner(b: &mut FunctionBuilder, x: Value, coefficients: &[f32]) -> Value {
    let mut sum = f32x4(b, coefficients[0]);
    for &c in &coefficients[1..] {
        let product = b.ins().fmul(sum, x);
        let c = f32x4(b, c);
        sum = b.ins().fadd(product, c);
    }
    sum
}

fn scaled(b: &mut FunctionBuilder, x: Value, c: f32) -> Value {
    let c = f32x4(b, c);
    b.ins().fmul(x, c)
}

fn plus(b: &mut FunctionBuilder, x: Value, c: f32) -> Value {
    let c = f32x4(b, c);
    b.ins().fadd(x, c)
}

fn is_negative(b: &mut FunctionBuilder, x: Value) -> Value {
    let zero = f32x4(b, 0.0);
    less(b, x, zero)
}

fn power_of_two(b: &mut FunctionBuilder, n: Value) -> Value {
    let bias = i32x4(b, 127);
    let n = b.ins().iadd(n, bias);
    let bits = b.ins().ishl_imm_u(n, 23);
    cast(b, F32X4, bits)
}

pub(crate) fn exp(b: &mut FunctionBuilder, x: Value) -> Value {
    let clamped = within(b, x, math::EXP_MIN, math::EXP_MAX);
    let n = scaled(b, clamped, math::LOG2_E);
    let n = b.ins().nearest(n);
    let t = scaled(b, n, math::LN_2_HI);
    let high = b.ins().fsub(clamped, t);
    let low = scaled(b, n, math::LN_2_LO);
    let r = b.ins().fsub(high, low);
    let square = b.ins().fmul(r, r);
    let p = horner(b, r, &math::EXP_POLYNOMIAL);
    let p = b.ins().fmul(p, square);
    let p = b.ins().fsub(p, low);
    let p = b.ins().fadd(p, high);
    let p = plus(b, p, 1.0);
    let n = b.ins().x86_cvtt2dq(I32X4, n);
    let half = b.ins().sshr_imm_u(n, 1);
    let rest = b.ins().isub(n, half);
    let (low, high) = (power_of_two(b, half), power_of_two(b, rest));
    let y = b.ins().fmul(p, low);
    let y = b.ins().fmul(y, high);
    let nan = b.ins().fcmp(FloatCC::Unordered, x, x);
    select(b, nan, x, y)
}

pub(crate) fn ln(b: &mut FunctionBuilder, x: Value) -> Value {
    let least = f32x4(b, f32::MIN_POSITIVE);
    let denormal = less(b, x, least);
    let up = scaled(b, x, math::DENORMAL_SCALE);
    let normal = select(b, denormal, up, x);
    let bits = cast(b, I32X4, normal);
    let half = i32x4(b, math::SQRT_HALF_BITS);
    let shifted = b.ins().isub(bits, half);
    let n = b.ins().sshr_imm_u(shifted, 23);
    let less_scale = i32x4(b, 23);
    let denormal_bits = cast(b, I32X4, denormal);
    let less_scale = b.ins().band(denormal_bits, less_scale);
    let n = b.ins().isub(n, less_scale);
    let n = b.ins().fcvt_from_sint(F32X4, n);
    let mantissa = i32x4(b, 0x007f_ffff);
    let f = b.ins().band(shifted, mantissa);
    let f = b.ins().iadd(f, half);
    let f = cast(b, F32X4, f);
    let one = f32x4(b, 1.0);
    let f = b.ins().fsub(f, one);
    let square = b.ins().fmul(f, f);
    let tail = horner(b, f, &math::LN_POLYNOMIAL);
    let tail = b.ins().fmul(tail, f);
    let tail = b.ins().fmul(tail, square);
    let t = scaled(b, n, math::LN_2_LO);
    let tail = b.ins().fadd(tail, t);
    let t = scaled(b, square, 0.5);
    let tail = b.ins().fsub(tail, t);
    let y = b.ins().fadd(f, tail);
    let t = scaled(b, n, math::LN_2_HI);
    let y = b.ins().fadd(y, t);
    let zero = f32x4(b, 0.0);
    let is_zero = b.ins().fcmp(FloatCC::Equal, x, zero);
    let lowest = f32x4(b, f32::NEG_INFINITY);
    let y = select(b, is_zero, lowest, y);
    let negative = is_negative(b, x);
    let nan = f32x4(b, f32::NAN);
    let y = select(b, negative, nan, y);
    let highest = f32x4(b, f32::INFINITY);
    let finite = less(b, x, highest);
    select(b, finite, y, x)
}

pub(crate) fn tanh(b: &mut FunctionBuilder, x: Value) -> Value {
    let square = b.ins().fmul(x, x);
    let small = horner(b, square, &math::TANH_POLYNOMIAL);
    let small = b.ins().fmul(small, square);
    let small = b.ins().fmul(small, x);
    let small = b.ins().fadd(small, x);
    let magnitude = b.ins().fabs(x);
    let twice = b.ins().fadd(magnitude, magnitude);
    let e = exp(b, twice);
    let e = plus(b, e, 1.0);
    let two = f32x4(b, 2.0);
    let quotient = b.ins().fdiv(two, e);
    let one = f32x4(b, 1.0);
    let large = b.ins().fsub(one, quotient);
    let opposite = b.ins().fneg(large);
    let negative = is_negative(b, x);
    let large = select(b, negative, opposite, large);
    let limit = f32x4(b, math::TANH_SMALL);
    let is_small = less(b, magnitude, limit);
    select(b, is_small, small, large)
}

/// e^−|x|.
fn exp_of_minus_magnitude(b: &mut FunctionBuilder, x: Value) -> Value {
    let magnitude = b.ins().fabs(x);
    let minus = b.ins().fneg(magnitude);
    exp(b, minus)
}

pub(crate) fn sigmoid(b: &mut FunctionBuilder, x: Value) -> Value {
    let t = exp_of_minus_magnitude(b, x);
    let one = f32x4(b, 1.0);
    let negative = is_negative(b, x);
    let sum = b.ins().fadd(one, t);
    let rounded = b.ins().fsub(sum, one);
    let lost = b.ins().fsub(t, rounded);
    let numerator = select(b, negative, t, one);
    let y = b.ins().fdiv(numerator, sum);
    let correction = b.ins().fmul(y, lost);
    b.ins().fsub(y, correction)
}

pub(crate) fn erf(b: &mut FunctionBuilder, x: Value) -> Value {
    let square = b.ins().fmul(x, x);
    let small = horner(b, square, &math::ERF_POLYNOMIAL);
    let small = b.ins().fmul(small, x);
    let small = b.ins().fadd(small, x);
    let magnitude = b.ins().fabs(x);
    let limit = f32x4(b, math::ERF_MAX);
    let magnitude = smaller(b, limit, magnitude);
    let exponent = horner(b, magnitude, &math::ERF_TAIL);
    let exponent = b.ins().fmul(exponent, magnitude);
    let exponent = b.ins().fsub(exponent, magnitude);
    let e = exp(b, exponent);
    let one = f32x4(b, 1.0);
    let large = b.ins().fsub(one, e);
    let opposite = b.ins().fneg(large);
    let negative = is_negative(b, x);
    let large = select(b, negative, opposite, large);
    let limit = f32x4(b, math::ERF_SMALL);
    let is_small = less(b, magnitude, limit);
    select(b, is_small, small, large)
}

pub(crate) fn softplus(b: &mut FunctionBuilder, x: Value) -> Value {
    let t = exp_of_minus_magnitude(b, x);
    let one = f32x4(b, 1.0);
    let u = b.ins().fadd(one, t);
    let rounded = b.ins().fsub(u, one);
    let zero = f32x4(b, 0.0);
    let lost = b.ins().fcmp(FloatCC::Equal, rounded, zero);
    let log_u = ln(b, u);
    let quotient = b.ins().fdiv(t, rounded);
    let product = b.ins().fmul(log_u, quotient);
    let log = select(b, lost, t, product);
    let positive = larger(b, x, zero);
    b.ins().fadd(positive, log)
}

/// Whether [`unary`] has the function.
pub(crate) fn has_unary(kind: UnaryKind) -> bool {
    // The library's sine and cosine are its own; `Not` is of booleans.
    !matches!(kind, UnaryKind::Sin | UnaryKind::Cos | UnaryKind::Not)
}

/// [`UnaryKind::apply`] on four lanes, for the kinds that [`has_unary`] names; of others the operand.
pub(crate) fn unary(b: &mut FunctionBuilder, kind: UnaryKind, x: Value) -> Value {
    use UnaryKind::*;
    let negative = |b: &mut FunctionBuilder, yes: Value, no: Value| {
        let mask = is_negative(b, x);
        select(b, mask, yes, no)
    };
    match kind {
        Identity | Sin | Cos | Not => x,
        Relu => {
            let zero = f32x4(b, 0.0);
            larger(b, zero, x)
        }
        LeakyRelu { alpha } => {
            let y = scaled(b, x, alpha);
            negative(b, y, x)
        }
        Clip { lo, hi } => within(b, x, lo, hi),
        Sigmoid => sigmoid(b, x),
        Tanh => tanh(b, x),
        HardSigmoid { alpha, beta } => {
            let y = scaled(b, x, alpha);
            let y = plus(b, y, beta);
            within(b, y, 0.0, 1.0)
        }
        HardSwish => {
            let y = scaled(b, x, (1.0 / 6.0) as f32);
            let y = plus(b, y, 0.5);
            let y = within(b, y, 0.0, 1.0);
            b.ins().fmul(x, y)
        }
        Silu => {
            let y = sigmoid(b, x);
            b.ins().fmul(x, y)
        }
        Gelu => {
            let y = scaled(b, x, std::f64::consts::FRAC_1_SQRT_2 as f32);
            let y = erf(b, y);
            half_of_one_plus(b, x, y)
        }
        GeluTanh => {
            let square = b.ins().fmul(x, x);
            let cube = b.ins().fmul(square, x);
            let t = scaled(b, cube, 0.044715);
            let inner = b.ins().fadd(x, t);
            let y = scaled(b, inner, SQRT_2_BY_PI);
            let y = tanh(b, y);
            half_of_one_plus(b, x, y)
        }
        Elu { alpha } => {
            let y = exp_minus_one(b, x, alpha);
            negative(b, y, x)
        }
        Selu { alpha, gamma } => {
            let y = exp_minus_one(b, x, alpha);
            let zero = f32x4(b, 0.0);
            let positive = less(b, zero, x);
            let y = select(b, positive, x, y);
            scaled(b, y, gamma)
        }
        Mish => {
            let y = softplus(b, x);
            let y = tanh(b, y);
            b.ins().fmul(x, y)
        }
        Softplus => softplus(b, x),
        Softsign => {
            let y = b.ins().fabs(x);
            let y = plus(b, y, 1.0);
            b.ins().fdiv(x, y)
        }
        Exp => exp(b, x),
        Log => ln(b, x),
        Sqrt => b.ins().sqrt(x),
        Reciprocal => {
            let one = f32x4(b, 1.0);
            b.ins().fdiv(one, x)
        }
        Erf => erf(b, x),
        Neg => b.ins().fneg(x),
        Abs => b.ins().fabs(x),
        Sign => {
            let (zero, minus) = (f32x4(b, 0.0), f32x4(b, -1.0));
            let y = negative(b, minus, x);
            let positive = less(b, zero, x);
            let one = f32x4(b, 1.0);
            select(b, positive, one, y)
        }
        Floor => b.ins().floor(x),
        Ceil => b.ins().ceil(x),
        Round => b.ins().nearest(x),
    }
}

/// √(2/π), rounded to f32.
const SQRT_2_BY_PI: f32 = 0.797_884_6;

/// ½·x·(1 + y), in this order.
fn half_of_one_plus(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    let half = scaled(b, x, 0.5);
    let y = plus(b, y, 1.0);
    b.ins().fmul(half, y)
}

/// alpha·(eˣ − 1).
fn exp_minus_one(b: &mut FunctionBuilder, x: Value, alpha: f32) -> Value {
    let e = exp(b, x);
    let one = f32x4(b, 1.0);
    let e = b.ins().fsub(e, one);
    scaled(b, e, alpha)
}

/// The code of a real number as s32: [`quantize`](qcc_ir::numerics::quantize) on four lanes, `scale` and `zero_point`
/// lane by lane; `zero_point` may be `None` for 0.
pub(crate) struct Grid {
    pub(crate) scale: Value,
    /// As s32; absent where it is 0.
    pub(crate) zero_point: Option<Value>,
    /// lo − zero_point and hi − zero_point, as f32.
    pub(crate) least: Value,
    /// See `least`.
    pub(crate) most: Value,
}

impl Grid {
    /// round(x / scale) within the bounds, still in f32.
    pub(crate) fn steps(&self, b: &mut FunctionBuilder, x: Value) -> Value {
        let quotient = b.ins().fdiv(x, self.scale);
        let rounded = b.ins().nearest(quotient);
        let above = larger(b, rounded, self.least);
        smaller(b, above, self.most)
    }

    /// The code.
    pub(crate) fn quantize(&self, b: &mut FunctionBuilder, x: Value) -> Value {
        let steps = self.steps(b, x);
        let q = b.ins().x86_cvtt2dq(I32X4, steps);
        match self.zero_point {
            Some(z) => b.ins().iadd(q, z),
            None => q,
        }
    }
}
