//! Elements of any numeric type in the arithmetic that ops compute in.

use crate::{
    DType, Element, OpError, Shape, Tensor,
    numerics::{PowerRounding, small_float, small_float_code},
};
use std::cmp::Ordering;

/// Decoded elements. f16 and bf16 are computed in f32 and rounded once; integers and booleans in 128 bits, which hold
/// every type exactly, so that wrapping is a matter of [`encode`](Numbers::encode) alone.
#[derive(Clone, Debug)]
pub(super) enum Numbers {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Int(Vec<i128>),
}

/// Smallest and largest value of an integer type or `bool`.
fn range(dtype: DType) -> (i128, i128) {
    match dtype {
        DType::S64 => (i64::MIN.into(), i64::MAX.into()),
        DType::U64 => (0, u64::MAX.into()),
        DType::Bool => (0, 1),
        _ => dtype.integer_range().map_or((0, 0), |(lo, hi)| (lo.into(), hi.into())),
    }
}

fn map<T: Element, U>(x: &Tensor, f: impl Fn(T) -> U) -> Result<Vec<U>, OpError> {
    Ok(x.as_slice::<T>()?.iter().copied().map(f).collect())
}

impl Numbers {
    /// The elements of a tensor.
    pub(super) fn decode(x: &Tensor) -> Result<Numbers, OpError> {
        Ok(match x.dtype() {
            DType::F32 => Numbers::F32(map(x, |x: f32| x)?),
            DType::F16 => Numbers::F32(map(x, half::f16::to_f32)?),
            DType::BF16 => Numbers::F32(map(x, half::bf16::to_f32)?),
            DType::F64 => Numbers::F64(map(x, |x: f64| x)?),
            DType::S8 | DType::S4 | DType::S2 => Numbers::Int(map(x, |x: i8| x.into())?),
            DType::U8 | DType::U4 | DType::U2 => Numbers::Int(map(x, |x: u8| x.into())?),
            small @ (DType::F8E4M3Fn
            | DType::F8E4M3Fnuz
            | DType::F8E5M2
            | DType::F8E5M2Fnuz
            | DType::F8E8M0
            | DType::F4E2M1) => Numbers::F32(map(x, |code| small_float(small, code))?),
            DType::Bool => Numbers::Int(map(x, |x: u8| i128::from(x != 0))?),
            DType::S16 => Numbers::Int(map(x, |x: i16| x.into())?),
            DType::U16 => Numbers::Int(map(x, |x: u16| x.into())?),
            DType::S32 => Numbers::Int(map(x, |x: i32| x.into())?),
            DType::U32 => Numbers::Int(map(x, |x: u32| x.into())?),
            DType::S64 | DType::Str => Numbers::Int(map(x, |x: i64| x.into())?),
            DType::U64 => Numbers::Int(map(x, |x: u64| x.into())?),
        })
    }

    /// The least number of a type: −∞ of floats.
    pub(super) fn lowest(dtype: DType) -> Numbers {
        match dtype {
            DType::F64 => Numbers::F64(vec![f64::NEG_INFINITY]),
            _ if dtype.is_float() => Numbers::F32(vec![f32::NEG_INFINITY]),
            _ => Numbers::Int(vec![range(dtype).0]),
        }
    }

    /// As a tensor of `dtype`: floats are rounded once to floats; to integers they are truncated and saturate (to those of
    /// four bits and fewer they wrap, as ONNX has it), NaN becoming 0; integers are rounded once to floats and wrap to integers; to `bool` whatever is not 0 is true.
    pub(super) fn encode(self, dtype: DType, shape: Shape) -> Result<Tensor, OpError> {
        match self {
            Numbers::F32(x) if dtype == DType::F32 => Ok(Tensor::from_vec(shape, x)?),
            Numbers::F32(x) => encode(&x, dtype, shape),
            Numbers::F64(x) => encode(&x, dtype, shape),
            Numbers::Int(x) => encode(&x, dtype, shape),
        }
    }
}

/// A decoded element on its way to another type.
trait Number: Copy {
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
    /// As f32, rounded to odd: towards zero, but with the last bit set where anything was lost. Rounding that again,
    /// to a type of at most 22 bits, gives what one rounding would.
    fn to_odd(self) -> f32;
    /// As an integer of the type.
    fn to_integer(self, dtype: DType) -> i128;
    fn is_zero(self) -> bool;
}

impl Number for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn to_f64(self) -> f64 {
        self.into()
    }
    fn to_odd(self) -> f32 {
        self
    }
    fn to_integer(self, dtype: DType) -> i128 {
        f64::from(self).to_integer(dtype)
    }
    fn is_zero(self) -> bool {
        self == 0.0
    }
}

impl Number for f64 {
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn to_odd(self) -> f32 {
        let nearest = self as f32;
        odd(nearest, f64::from(nearest).abs().partial_cmp(&self.abs()))
    }
    fn to_integer(self, dtype: DType) -> i128 {
        let (lo, hi) = range(dtype);
        match dtype {
            DType::S2 | DType::U2 | DType::S4 | DType::U4 => (self as i128).to_integer(dtype),
            _ => (self as i128).clamp(lo, hi),
        }
    }
    fn is_zero(self) -> bool {
        self == 0.0
    }
}

impl Number for i128 {
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn to_f64(self) -> f64 {
        self as f64
    }
    fn to_odd(self) -> f32 {
        let nearest = self as f32;
        odd(nearest, Some((nearest as i128).abs().cmp(&self.abs())))
    }
    fn to_integer(self, dtype: DType) -> i128 {
        let (lo, hi) = range(dtype);
        self.wrapping_sub(lo).rem_euclid(hi - lo + 1) + lo
    }
    fn is_zero(self) -> bool {
        self == 0
    }
}

/// The number rounded to odd, from the one rounded to nearest and how their magnitudes compare.
fn odd(nearest: f32, than_exact: Option<Ordering>) -> f32 {
    match than_exact {
        Some(Ordering::Greater) => f32::from_bits((nearest.to_bits() - 1) | 1),
        Some(Ordering::Less) => f32::from_bits(nearest.to_bits() | 1),
        _ => nearest,
    }
}

fn encode<N: Number>(x: &[N], dtype: DType, shape: Shape) -> Result<Tensor, OpError> {
    fn collect<N: Number, T: Element>(
        x: &[N],
        dtype: DType,
        shape: Shape,
        f: impl Fn(N) -> T,
    ) -> Result<Tensor, OpError> {
        Ok(Tensor::from_vec_as(dtype, shape, x.iter().map(|&x| f(x)).collect())?)
    }
    let integer = |x: N| x.to_integer(dtype);
    match dtype {
        DType::F32 => collect(x, dtype, shape, N::to_f32),
        DType::F64 => collect(x, dtype, shape, N::to_f64),
        DType::F16 => collect(x, dtype, shape, |x| half::f16::from_f32(x.to_odd())),
        DType::BF16 => collect(x, dtype, shape, |x| half::bf16::from_f32(x.to_odd())),
        DType::Bool => collect(x, dtype, shape, |x| u8::from(!x.is_zero())),
        DType::S8 | DType::S4 | DType::S2 => collect(x, dtype, shape, |x| integer(x) as i8),
        DType::U8 | DType::U4 | DType::U2 => collect(x, dtype, shape, |x| integer(x) as u8),
        DType::F8E4M3Fn
        | DType::F8E4M3Fnuz
        | DType::F8E5M2
        | DType::F8E5M2Fnuz
        | DType::F8E8M0
        | DType::F4E2M1 => {
            collect(x, dtype, shape, |x| small_float_code(dtype, x.to_odd(), true, PowerRounding::Up))
        }
        DType::S16 => collect(x, dtype, shape, |x| integer(x) as i16),
        DType::U16 => collect(x, dtype, shape, |x| integer(x) as u16),
        DType::S32 => collect(x, dtype, shape, |x| integer(x) as i32),
        DType::U32 => collect(x, dtype, shape, |x| integer(x) as u32),
        DType::S64 => collect(x, dtype, shape, |x| integer(x) as i64),
        DType::Str => Err(OpError::dtype("a number as a text")),
        DType::U64 => collect(x, dtype, shape, |x| integer(x) as u64),
    }
}
