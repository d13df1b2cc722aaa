use crate::{DType, Shape, TensorType, numerics::small_float};
use bytes::Bytes;
use ndarray::{ArrayViewD, IxDyn};
use std::fmt;

/// A Rust type that holds elements of some [`DType`]s.
pub trait Element: bytemuck::Pod + Send + Sync + PartialOrd + fmt::Debug {
    /// The type a tensor built from a `Vec<Self>` gets.
    const DTYPE: DType;
    /// Whether a tensor of `dtype` is stored as `Self`.
    fn holds(dtype: DType) -> bool {
        dtype == Self::DTYPE
    }
}

macro_rules! elements {
    ($($t:ty => $d:ident $(| $other:ident)*),* $(,)?) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            fn holds(dtype: DType) -> bool {
                matches!(dtype, DType::$d $(| DType::$other)*)
            }
        }
    )*};
}

elements! {
    f32 => F32,
    half::f16 => F16,
    half::bf16 => BF16,
    f64 => F64,
    i8 => S8 | S4 | S2,
    u8 => U8 | U4 | U2 | Bool | F8E4M3Fn | F8E4M3Fnuz | F8E5M2 | F8E5M2Fnuz | F8E8M0 | F4E2M1,
    i16 => S16,
    u16 => U16,
    i32 => S32,
    u32 => U32,
    i64 => S64 | Str,
    u64 => U64,
}

/// Evaluates an expression with a type name bound to the Rust type that holds elements of a [`DType`].
macro_rules! with_element {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::S8 | $crate::DType::S4 | $crate::DType::S2 => {
                type $t = i8;
                $body
            }
            $crate::DType::U8
            | $crate::DType::U4
            | $crate::DType::Bool
            | $crate::DType::F8E4M3Fn
            | $crate::DType::F8E4M3Fnuz
            | $crate::DType::F8E5M2
            | $crate::DType::F8E5M2Fnuz
            | $crate::DType::F8E8M0
            | $crate::DType::F4E2M1
            | $crate::DType::U2 => {
                type $t = u8;
                $body
            }
            $crate::DType::S16 => {
                type $t = i16;
                $body
            }
            $crate::DType::U16 => {
                type $t = u16;
                $body
            }
            $crate::DType::S32 => {
                type $t = i32;
                $body
            }
            $crate::DType::U32 => {
                type $t = u32;
                $body
            }
            $crate::DType::S64 | $crate::DType::Str => {
                type $t = i64;
                $body
            }
            $crate::DType::U64 => {
                type $t = u64;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// A dense, row-major, immutable tensor. Cloning shares the data.
///
/// The bytes may come from anywhere (a vector, a mapped file); they are always aligned for their type.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Shape,
    data: Bytes,
}

/// Data that does not fit the type it is said to have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The number of bytes is not what dtype and shape ask for.
    #[error("a tensor {dtype}[{shape}] takes {expected} bytes, got {got}")]
    Length {
        /// Element type.
        dtype: DType,
        /// Shape.
        shape: Shape,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// Elements asked for as a type that does not hold them.
    #[error("a tensor of {dtype} was read as {asked}")]
    DType {
        /// The tensor's type.
        dtype: DType,
        /// The type asked for.
        asked: DType,
    },
}

/// Lets `Bytes` own a typed vector, so that its alignment is kept.
struct Owner<T>(Vec<T>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Tensor {
    /// A tensor of `shape` from its elements in row-major order.
    pub fn from_vec<T: Element>(shape: Shape, elements: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::from_vec_as(T::DTYPE, shape, elements)
    }

    /// Like [`from_vec`](Self::from_vec), for types that share a Rust type (such as `bool` and `u4` in `u8`, `s4` in `i8`).
    pub fn from_vec_as<T: Element>(
        dtype: DType,
        shape: Shape,
        elements: Vec<T>,
    ) -> Result<Tensor, TensorError> {
        if !T::holds(dtype) {
            return Err(TensorError::DType { dtype, asked: T::DTYPE });
        }
        Tensor::checked(dtype, shape, Bytes::from_owner(Owner(elements)))
    }

    /// A tensor over little-endian bytes, shared when they are aligned and copied when not.
    pub fn from_bytes(dtype: DType, shape: Shape, data: Bytes) -> Result<Tensor, TensorError> {
        if (data.as_ptr() as usize).is_multiple_of(dtype.size()) {
            return Tensor::checked(dtype, shape, data);
        }
        let mut words = vec![0u64; data.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..data.len()].copy_from_slice(&data);
        let aligned = Bytes::from_owner(Owner(words)).slice(..data.len());
        Tensor::checked(dtype, shape, aligned)
    }

    fn checked(dtype: DType, shape: Shape, data: Bytes) -> Result<Tensor, TensorError> {
        let expected = shape.elements() * dtype.size();
        if data.len() != expected {
            return Err(TensorError::Length { dtype, shape, expected, got: data.len() });
        }
        Ok(Tensor { dtype, shape, data })
    }

    /// A scalar.
    pub fn scalar<T: Element>(value: T) -> Tensor {
        Tensor { dtype: T::DTYPE, shape: Shape::scalar(), data: Bytes::from_owner(Owner(vec![value])) }
    }

    /// All zeros (false for `bool`).
    pub fn zeros(dtype: DType, shape: Shape) -> Tensor {
        let bytes = shape.elements() * dtype.size();
        let words = vec![0u64; bytes.div_ceil(8)];
        Tensor { dtype, shape, data: Bytes::from_owner(Owner(words)).slice(..bytes) }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The type, without a grid: a tensor does not know how its integers are to be read.
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.dtype, self.shape.clone())
    }

    /// The bytes, little-endian.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// The elements in row-major order.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        if !T::holds(self.dtype) {
            return Err(TensorError::DType { dtype: self.dtype, asked: T::DTYPE });
        }
        // No bytes may come with a pointer of any alignment.
        Ok(if self.data.is_empty() { &[] } else { bytemuck::cast_slice(&self.data) })
    }

    /// The elements as an n-dimensional view.
    pub fn view<T: Element>(&self) -> Result<ArrayViewD<'_, T>, TensorError> {
        let slice = self.as_slice()?;
        ArrayViewD::from_shape(IxDyn(&self.shape), slice).map_err(|_| TensorError::Length {
            dtype: self.dtype,
            shape: self.shape.clone(),
            expected: self.shape.elements() * self.dtype.size(),
            got: self.data.len(),
        })
    }

    /// The same data under another shape of as many elements.
    pub fn reshaped(&self, shape: Shape) -> Result<Tensor, TensorError> {
        Tensor::checked(self.dtype, shape, self.data.clone())
    }

    /// The elements of an integer or bool tensor widened to 64 bits (`u64` above `i64::MAX` wraps); `None` for floats.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        fn widen<T: Element>(t: &Tensor, f: impl Fn(T) -> i64) -> Option<Vec<i64>> {
            t.as_slice::<T>().ok().map(|s| s.iter().copied().map(f).collect())
        }
        match self.dtype {
            DType::S64 => widen(self, |x: i64| x),
            DType::U64 => widen(self, |x: u64| x as i64),
            DType::S32 => widen(self, |x: i32| x.into()),
            DType::U32 => widen(self, |x: u32| x.into()),
            DType::S16 => widen(self, |x: i16| x.into()),
            DType::U16 => widen(self, |x: u16| x.into()),
            DType::S8 | DType::S4 | DType::S2 => widen(self, |x: i8| x.into()),
            DType::U8 | DType::U4 | DType::U2 | DType::Bool => widen(self, |x: u8| x.into()),
            _ => None,
        }
    }

    /// The elements of a float tensor as `f32` (rounded from `f64`); `None` for integers.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match self.dtype {
            DType::F32 => self.as_slice::<f32>().ok().map(<[f32]>::to_vec),
            DType::F16 => self.as_slice::<half::f16>().ok().map(|s| s.iter().map(|x| x.to_f32()).collect()),
            DType::BF16 => self.as_slice::<half::bf16>().ok().map(|s| s.iter().map(|x| x.to_f32()).collect()),
            DType::F64 => self.as_slice::<f64>().ok().map(|s| s.iter().map(|x| *x as f32).collect()),
            small if small.is_small_float() => {
                Some(self.data.iter().map(|&code| small_float(small, code)).collect())
            }
            _ => None,
        }
    }
}

impl Tensor {
    /// The elements as `f64`: exact but for 64-bit integers beyond 2^53.
    pub fn to_f64(&self) -> Vec<f64> {
        match (self.as_slice::<f64>(), self.as_slice::<u64>(), self.to_f32(), self.to_i64()) {
            (Ok(wide), ..) => wide.to_vec(),
            (_, Ok(unsigned), ..) => unsigned.iter().map(|&x| x as f64).collect(),
            (_, _, Some(floats), _) => floats.into_iter().map(f64::from).collect(),
            (_, _, _, Some(integers)) => integers.into_iter().map(|x| x as f64).collect(),
            _ => Vec::new(),
        }
    }
}

/// Equal type and equal bits (so a NaN equals itself, and 0.0 differs from −0.0).
impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.data == other.data
    }
}

/// The type; never the contents, which may be megabytes.
impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}[{}])", self.dtype, self.shape)
    }
}
