//! Between real numbers and the integers of a grid.

use super::{Operator, arity};
use crate::{DType, OpError, QuantParams, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// Real numbers to codes by [`numerics::quantize`](crate::numerics::quantize).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Quantize {
    /// Integer type of the result, at most 16 bits wide.
    pub dtype: DType,
    /// The grid.
    pub params: QuantParams,
}

/// Codes of the operand's grid to f32 by [`numerics::dequantize`](crate::numerics::dequantize).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Dequantize {}

/// Real numbers rounded to a grid by [`numerics::fake_quant`](crate::numerics::fake_quant).
///
/// For `S32` (a bias) the bounds are those of 24 bits, within which f32 is exact.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FakeQuant {
    /// Integer type whose range bounds the codes.
    pub dtype: DType,
    /// Smallest code, at least the type's smallest (−127 for symmetric weights).
    pub lo: i32,
    /// Largest code.
    pub hi: i32,
    /// The grid.
    pub params: QuantParams,
}

/// The same integers read on another grid, or as plain ones where there is none.
///
/// Imported models compute integers and say only later, in the op that dequantizes them, what they stand for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AssumeGrid {
    /// The grid that the result has.
    pub params: Option<QuantParams>,
}

impl Operator for Quantize {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype != DType::F32 || self.dtype.size() > 2 {
            return Err(OpError::dtype(format!("quantize {x} to {}", self.dtype)));
        }
        Ok(vec![TensorType::quantized(self.dtype, x.shape, self.params.clone())?])
    }
}

impl Operator for Dequantize {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_none() {
            return Err(OpError::quant(format!("{x} has no grid")));
        }
        Ok(vec![TensorType::new(DType::F32, x.shape)])
    }
}

impl Operator for FakeQuant {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype != DType::F32 {
            return Err(OpError::dtype(format!("takes f32, got {x}")));
        }
        self.params.check(self.dtype, &x.shape)?;
        let (lo, hi) = self.dtype.integer_range().unwrap_or((0, 0));
        if i64::from(self.lo) < lo || i64::from(self.hi) > hi || self.lo > self.hi {
            return Err(OpError::quant(format!(
                "codes {}..={} are not a range of {}",
                self.lo, self.hi, self.dtype
            )));
        }
        Ok(vec![x])
    }
}

impl Operator for AssumeGrid {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if !x.dtype.is_integer() {
            return Err(OpError::quant(format!("{x} cannot have a grid")));
        }
        if let Some(params) = &self.params {
            params.check(x.dtype, &x.shape)?;
        }
        Ok(vec![TensorType { quant: self.params.clone(), ..x }])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        Ok(vec![operands[0].clone()])
    }
}
