//! What a function of elements is made of: operations on lanes of 32 bits. Such a function is written once; Cranelift
//! makes 128-bit vectors of it, [`wide`](super::wide) wider ones, with the same bits.
//!
//! A value is a vector of f32 or s32 lanes, or a mask, as comparisons give it. Integers wrap.

use super::vector::{self, cast, f32x4, i32x4};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    condcodes::{FloatCC, IntCC},
    types::{F32X4, I16X8, I32X4},
};
use cranelift_frontend::FunctionBuilder;

/// A function of elements, one from each operand, all in lanes of 32 bits: 8 and 16-bit operands come widened, truth
/// values as 0 and 1; a result of such a type saturates.
pub(crate) trait Elementwise {
    /// The result's lanes.
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value;
}

/// Emits operations on lanes.
pub(crate) trait Lanes {
    /// Lanes, or a mask.
    type Value: Copy;

    fn f32(&mut self, x: f32) -> Self::Value;
    fn i32(&mut self, x: i32) -> Self::Value;

    fn fadd(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn fsub(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn fmul(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn fdiv(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    /// `if x > y { x } else { y }`: y where one is NaN, as `maxps` has it.
    fn larger(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    /// `if x < y { x } else { y }`: y where one is NaN, as `minps` has it.
    fn smaller(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn sqrt(&mut self, x: Self::Value) -> Self::Value;
    fn floor(&mut self, x: Self::Value) -> Self::Value;
    fn ceil(&mut self, x: Self::Value) -> Self::Value;
    /// To an integer, half to even.
    fn nearest(&mut self, x: Self::Value) -> Self::Value;
    /// x·y + z, rounded once, where f64 holds it exactly.
    fn multiply_add(&mut self, x: Self::Value, y: Self::Value, z: Self::Value) -> Self::Value;
    fn abs(&mut self, x: Self::Value) -> Self::Value;
    fn neg(&mut self, x: Self::Value) -> Self::Value;

    fn iadd(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn isub(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn imul(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn imax(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn imin(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn and(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn or(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn xor(&mut self, x: Self::Value, y: Self::Value) -> Self::Value;
    fn shift_left(&mut self, x: Self::Value, count: u32) -> Self::Value;
    /// With the sign.
    fn shift_right(&mut self, x: Self::Value, count: u32) -> Self::Value;
    /// x·m₁ + y·m₂, where x and y are within 0 and 2^15 − 1.
    fn weighted_sum(&mut self, x: Self::Value, y: Self::Value, m1: i16, m2: i16) -> Self::Value;

    /// The integer towards 0, where 32 bits hold it; the least one elsewhere.
    fn truncate(&mut self, x: Self::Value) -> Self::Value;
    /// The integer that is nearest, half to even, where 32 bits hold it; the least one elsewhere.
    fn round(&mut self, x: Self::Value) -> Self::Value;
    /// An integer as a float.
    fn to_f32(&mut self, x: Self::Value) -> Self::Value;
    /// The same bits as an integer.
    fn as_i32(&mut self, x: Self::Value) -> Self::Value;
    /// The same bits as a float.
    fn as_f32(&mut self, x: Self::Value) -> Self::Value;

    /// A mask; false where one is NaN, but for [`FloatComparison::Unordered`].
    fn compare_f32(&mut self, how: FloatComparison, x: Self::Value, y: Self::Value) -> Self::Value;
    fn compare_i32(&mut self, how: IntegerComparison, x: Self::Value, y: Self::Value) -> Self::Value;
    /// Lanes of `yes` where the mask is set, of `no` elsewhere.
    fn select(&mut self, mask: Self::Value, yes: Self::Value, no: Self::Value) -> Self::Value;

    /// `x < y`.
    fn less(&mut self, x: Self::Value, y: Self::Value) -> Self::Value {
        self.compare_f32(FloatComparison::Less, x, y)
    }

    fn is_negative(&mut self, x: Self::Value) -> Self::Value {
        let zero = self.f32(0.0);
        self.less(x, zero)
    }

    fn is_nan(&mut self, x: Self::Value) -> Self::Value {
        self.compare_f32(FloatComparison::Unordered, x, x)
    }

    /// First the lower bound, then the upper; NaN stays. A bound that is infinite bounds nothing.
    fn within(&mut self, x: Self::Value, lo: f32, hi: f32) -> Self::Value {
        let lo = self.f32(lo);
        let above = self.larger(lo, x);
        let hi = self.f32(hi);
        self.smaller(hi, above)
    }

    /// A mask as 1 and 0.
    fn truth(&mut self, mask: Self::Value) -> Self::Value {
        let (one, zero) = (self.i32(1), self.i32(0));
        self.select(mask, one, zero)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum FloatComparison {
    Less,
    LessOrEqual,
    Equal,
    /// Whether one is NaN.
    Unordered,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum IntegerComparison {
    Greater,
    Equal,
}

/// Operations that are one instruction of Cranelift.
macro_rules! instructions {
    ($($name:ident($($x:ident),+) = $instruction:ident;)*) => { $(
        fn $name(&mut self, $($x: Value),+) -> Value {
            self.ins().$instruction($($x),+)
        }
    )* };
}

/// Four lanes.
impl Lanes for FunctionBuilder<'_> {
    type Value = Value;

    fn f32(&mut self, x: f32) -> Value {
        f32x4(self, x)
    }

    fn i32(&mut self, x: i32) -> Value {
        i32x4(self, x)
    }

    instructions! {
        fadd(x, y) = fadd;
        fsub(x, y) = fsub;
        fmul(x, y) = fmul;
        fdiv(x, y) = fdiv;
        sqrt(x) = sqrt;
        floor(x) = floor;
        ceil(x) = ceil;
        nearest(x) = nearest;
        abs(x) = fabs;
        neg(x) = fneg;
        iadd(x, y) = iadd;
        isub(x, y) = isub;
        imul(x, y) = imul;
        imax(x, y) = smax;
        imin(x, y) = smin;
        and(x, y) = band;
        or(x, y) = bor;
        xor(x, y) = bxor;
    }

    fn larger(&mut self, x: Value, y: Value) -> Value {
        vector::larger(self, x, y)
    }

    fn smaller(&mut self, x: Value, y: Value) -> Value {
        vector::smaller(self, x, y)
    }

    fn shift_left(&mut self, x: Value, count: u32) -> Value {
        self.ins().ishl_imm_u(x, i64::from(count))
    }

    fn shift_right(&mut self, x: Value, count: u32) -> Value {
        self.ins().sshr_imm_u(x, i64::from(count))
    }

    fn weighted_sum(&mut self, x: Value, y: Value, m1: i16, m2: i16) -> Value {
        let factors = i32x4(self, pair(m1, m2));
        let high = self.ins().ishl_imm_u(y, 16);
        let both = self.ins().bor(x, high);
        let [x, y] = [both, factors].map(|v| cast(self, I16X8, v));
        // Which Cranelift makes one `pmaddwd`.
        let (xl, yl) = (self.ins().swiden_low(x), self.ins().swiden_low(y));
        let (xh, yh) = (self.ins().swiden_high(x), self.ins().swiden_high(y));
        let (low, high) = (self.ins().imul(xl, yl), self.ins().imul(xh, yh));
        self.ins().iadd_pairwise(low, high)
    }

    fn truncate(&mut self, x: Value) -> Value {
        self.ins().x86_cvtt2dq(I32X4, x)
    }

    fn round(&mut self, x: Value) -> Value {
        let whole = self.ins().nearest(x);
        self.ins().x86_cvtt2dq(I32X4, whole)
    }

    /// In f64: not every CPU that runs this fuses.
    fn multiply_add(&mut self, x: Value, y: Value, z: Value) -> Value {
        let upper = std::array::from_fn(|i| (8 + i % 8) as u8);
        let halves = [x, y, z].map(|v| {
            let high = vector::shuffle(self, v, v, upper);
            let high = cast(self, F32X4, high);
            [v, high].map(|v| self.ins().fvpromote_low(v))
        });
        let [low, high] = [0, 1].map(|half| {
            let [x, y, z] = halves.map(|h| h[half]);
            let product = self.ins().fmul(x, y);
            let sum = self.ins().fadd(product, z);
            self.ins().fvdemote(sum)
        });
        let join = std::array::from_fn(|i| if i < 8 { i } else { 8 + i } as u8);
        let sum = vector::shuffle(self, low, high, join);
        cast(self, F32X4, sum)
    }

    fn to_f32(&mut self, x: Value) -> Value {
        self.ins().fcvt_from_sint(F32X4, x)
    }

    fn as_i32(&mut self, x: Value) -> Value {
        cast(self, I32X4, x)
    }

    fn as_f32(&mut self, x: Value) -> Value {
        cast(self, F32X4, x)
    }

    fn compare_f32(&mut self, how: FloatComparison, x: Value, y: Value) -> Value {
        let condition = match how {
            FloatComparison::Less => FloatCC::LessThan,
            FloatComparison::LessOrEqual => FloatCC::LessThanOrEqual,
            FloatComparison::Equal => FloatCC::Equal,
            FloatComparison::Unordered => FloatCC::Unordered,
        };
        self.ins().fcmp(condition, x, y)
    }

    fn compare_i32(&mut self, how: IntegerComparison, x: Value, y: Value) -> Value {
        let condition = match how {
            IntegerComparison::Greater => IntCC::SignedGreaterThan,
            IntegerComparison::Equal => IntCC::Equal,
        };
        self.ins().icmp(condition, x, y)
    }

    fn select(&mut self, mask: Value, yes: Value, no: Value) -> Value {
        vector::select(self, mask, yes, no)
    }
}

/// Two factors of `pmaddwd`, the first in the low half.
pub(super) fn pair(m1: i16, m2: i16) -> i32 {
    (u32::from(m1 as u16) | u32::from(m2 as u16) << 16) as i32
}
