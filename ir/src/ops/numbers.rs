//! Elements of any numeric type in the arithmetic that ops compute in.

use crate::{DType, Element, OpError, Shape, Tensor};

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
            DType::S8 | DType::S4 => Numbers::Int(map(x, |x: i8| x.into())?),
            DType::U8 | DType::U4 => Numbers::Int(map(x, |x: u8| x.into())?),
            DType::Bool => Numbers::Int(map(x, |x: u8| i128::from(x != 0))?),
            DType::S16 => Numbers::Int(map(x, |x: i16| x.into())?),
            DType::U16 => Numbers::Int(map(x, |x: u16| x.into())?),
            DType::S32 => Numbers::Int(map(x, |x: i32| x.into())?),
            DType::U32 => Numbers::Int(map(x, |x: u32| x.into())?),
            DType::S64 => Numbers::Int(map(x, |x: i64| x.into())?),
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

    /// As a tensor of `dtype`: floats are rounded once to floats; to integers they are truncated and saturate, NaN
    /// becoming 0; integers wrap to integers; to `bool` whatever is not 0 is true.
    pub(super) fn encode(self, dtype: DType, shape: Shape) -> Result<Tensor, OpError> {
        match self {
            Numbers::F32(x) if dtype == DType::F32 => Ok(Tensor::from_vec(shape, x)?),
            Numbers::F32(x) => float(&x, |x| x.into(), dtype, shape),
            Numbers::F64(x) => float(&x, |x| x, dtype, shape),
            Numbers::Int(x) if dtype == DType::F32 => {
                Ok(Tensor::from_vec(shape, x.into_iter().map(|x| x as f32).collect())?)
            }
            Numbers::Int(x) if dtype.is_float() => float(&x, |x| x as f64, dtype, shape),
            Numbers::Int(x) if dtype == DType::Bool => integer(&x, |x| i128::from(x != 0), dtype, shape),
            Numbers::Int(x) => integer(&x, |x| wrap(x, dtype), dtype, shape),
        }
    }
}

/// Every number fits f64 exactly but integers above 2^53, which only bf16 and f64 can come from: rounded to f64 first.
fn float<T: Copy>(
    elements: &[T],
    value: impl Fn(T) -> f64,
    dtype: DType,
    shape: Shape,
) -> Result<Tensor, OpError> {
    fn collect<T: Element>(
        shape: Shape,
        elements: impl Iterator<Item = f64>,
        f: impl Fn(f64) -> T,
    ) -> Result<Tensor, OpError> {
        Ok(Tensor::from_vec(shape, elements.map(f).collect())?)
    }
    let values = elements.iter().map(|&x| value(x));
    match dtype {
        DType::F32 => collect(shape, values, |x| x as f32),
        DType::F16 => collect(shape, values, half::f16::from_f64),
        DType::BF16 => collect(shape, values, half::bf16::from_f64),
        DType::F64 => collect(shape, values, |x| x),
        DType::Bool => integer(elements, |x| i128::from(value(x) != 0.0), dtype, shape),
        _ => {
            let (lo, hi) = range(dtype);
            integer(elements, |x| (value(x) as i128).clamp(lo, hi), dtype, shape)
        }
    }
}

/// The integer modulo 2^bits, in the range of the type.
fn wrap(x: i128, dtype: DType) -> i128 {
    let (lo, hi) = range(dtype);
    (x.wrapping_sub(lo)).rem_euclid(hi - lo + 1) + lo
}

fn integer<T: Copy>(
    elements: &[T],
    value: impl Fn(T) -> i128,
    dtype: DType,
    shape: Shape,
) -> Result<Tensor, OpError> {
    let values = elements.iter().map(|&x| value(x));
    Ok(match dtype {
        DType::S8 | DType::S4 => {
            Tensor::from_vec_as(dtype, shape, values.map(|x| x as i8).collect::<Vec<_>>())
        }
        DType::U8 | DType::U4 | DType::Bool => {
            Tensor::from_vec_as(dtype, shape, values.map(|x| x as u8).collect::<Vec<_>>())
        }
        DType::S16 => Tensor::from_vec(shape, values.map(|x| x as i16).collect()),
        DType::U16 => Tensor::from_vec(shape, values.map(|x| x as u16).collect()),
        DType::S32 => Tensor::from_vec(shape, values.map(|x| x as i32).collect()),
        DType::U32 => Tensor::from_vec(shape, values.map(|x| x as u32).collect()),
        DType::S64 => Tensor::from_vec(shape, values.map(|x| x as i64).collect()),
        DType::U64 => Tensor::from_vec(shape, values.map(|x| x as u64).collect()),
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => {
            return Err(OpError::dtype(format!("{dtype} is not an integer type")));
        }
    }?)
}
