//! Between real numbers and the integers of a grid.

use super::{Operator, arity, numbers::Numbers};
use crate::{DType, OpError, QuantParams, Shape, Tensor, TensorType, numerics};
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
/// The codes less the zero point are within ±2^24 (of an `S32` bias), where f32 holds every integer.
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

/// Largest magnitude of a code less its zero point that [`FakeQuant`] may produce.
const FAKE_QUANT_MAX: i64 = 1 << 24;

/// The bounds of a type of at most 16 bits.
fn code_range(dtype: DType) -> Result<(i32, i32), OpError> {
    match dtype.integer_range() {
        Some((lo, hi)) if dtype.size() <= 2 => Ok((lo as i32, hi as i32)),
        _ => Err(OpError::dtype(format!("codes of {dtype}"))),
    }
}

/// f of each element and the scale and zero point of its place along the grid's axis.
fn along_grid<T, U>(
    elements: &[T],
    shape: &Shape,
    params: &QuantParams,
    f: impl Fn(&T, (f32, i32)) -> U,
) -> Vec<U> {
    let (stride, extent) = params.axis().map_or((1, 1), |a| (shape.strides()[a], shape[a]));
    elements.iter().enumerate().map(|(i, x)| f(x, params.at(i / stride % extent))).collect()
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (lo, hi) = code_range(self.dtype)?;
        let x = operands[0].as_slice::<f32>()?;
        let code = |x: &f32, (scale, zero)| numerics::quantize(*x, scale, zero, lo, hi).into();
        let codes = along_grid(x, &results[0].shape, &self.params, code);
        Ok(vec![Numbers::Int(codes).encode(self.dtype, results[0].shape.clone())?])
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

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let shape = &results[0].shape;
        let Some(params) = &types[0].quant else {
            return Err(OpError::quant(format!("{} has no grid", types[0])));
        };
        let codes = operands[0].to_i64().ok_or_else(|| OpError::dtype("codes that are not integers"))?;
        let numbers =
            along_grid(&codes, shape, params, |&q, (scale, zero)| numerics::dequantize(q, scale, zero));
        Ok(vec![Tensor::from_vec::<f32>(shape.clone(), numbers)?])
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
        let exact = |code: i32, zero: i32| (i64::from(code) - i64::from(zero)).abs() <= FAKE_QUANT_MAX;
        if !self.params.zero_points().iter().all(|&z| exact(self.lo, z) && exact(self.hi, z)) {
            return Err(OpError::quant(format!(
                "codes {}..={} less their zero point leave ±2^24, within which f32 holds every integer",
                self.lo, self.hi
            )));
        }
        Ok(vec![x])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let shape = &results[0].shape;
        let x = operands[0].as_slice::<f32>()?;
        let round = |x: &f32, (scale, zero)| numerics::fake_quant(*x, scale, zero, self.lo, self.hi);
        Ok(vec![Tensor::from_vec(shape.clone(), along_grid(x, shape, &self.params, round))?])
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
