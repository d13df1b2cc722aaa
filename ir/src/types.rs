use crate::{DType, OpError, QuantParams, Shape, limits::MAX_TENSOR_BYTES};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is known of a value before it is computed: element type, shape, and the grid when it is quantized.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Shape,
    /// The grid of a quantized integer tensor; `None` for real numbers and for plain integers such as indices.
    pub quant: Option<QuantParams>,
}

impl TensorType {
    /// A type without a grid.
    pub fn new(dtype: DType, shape: Shape) -> TensorType {
        TensorType { dtype, shape, quant: None }
    }

    /// `f32` of this shape; for tests and builders.
    pub fn f32(dims: &[usize]) -> Result<TensorType, OpError> {
        Ok(TensorType::new(DType::F32, Shape::new(dims)?))
    }

    /// A quantized type; fails where the grid does not fit dtype and shape.
    pub fn quantized(dtype: DType, shape: Shape, quant: QuantParams) -> Result<TensorType, OpError> {
        quant.check(dtype, &shape)?;
        Ok(TensorType { dtype, shape, quant: Some(quant) })
    }

    /// The same type with another shape. A per-axis grid must be dealt with by the caller.
    pub fn with_shape(&self, shape: Shape) -> TensorType {
        TensorType { shape, ..self.clone() }
    }

    /// Bytes a dense tensor of this type takes.
    pub fn bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    /// Fails where the tensor would be larger than [`MAX_TENSOR_BYTES`].
    pub fn check_size(&self) -> Result<(), OpError> {
        if self.bytes() > MAX_TENSOR_BYTES {
            return Err(OpError::too_large(format!(
                "a tensor {self} takes {} bytes, above the limit of {MAX_TENSOR_BYTES}",
                self.bytes()
            )));
        }
        Ok(())
    }

    /// Scale and zero point of a tensor quantized as a whole.
    pub fn per_tensor(&self) -> Option<(f32, i32)> {
        self.quant.as_ref().and_then(QuantParams::as_per_tensor)
    }
}

/// `f32[1x3x224x224]`, with the grid behind it when quantized.
impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.dtype, self.shape)?;
        match &self.quant {
            Some(q) => write!(f, " {{{q:?}}}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
