//! Matrix products.

use super::{
    Clamp, Operator,
    conv::{all_f32, check_extras, check_weights, operand, per_tensor, requantizer},
};
use crate::{
    DType, OpError, OutputGrid, Shape, Tensor, TensorType,
    numerics::{RequantMode, Requantizer},
};
use serde::{Deserialize, Serialize};

/// y = clamp(a·b + bias + residual), in f32: `[…, M, K]·[…, K, N]` with leading dimensions broadcast.
///
/// Operands: a and b of rank 2 or more; bias `[N]` if [`bias`](Self::bias); a tensor of the result's shape if
/// [`residual`](Self::residual). Gemm's scaling and transposes, and vectors, are expressed by other ops at import.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MatMul {
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// Bounds on the result.
    pub clamp: Clamp,
}

/// [`MatMul`] on quantized operands: `[…, M, K]` u8 with one grid by `[K, N]` s8, symmetric, one scale a column or
/// one for all; bias s32 `[N]`; residual u8 with one grid.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QMatMul {
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// The formula of the requantization.
    pub requant: RequantMode,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

fn product_shape(a: &Shape, b: &Shape) -> Result<Shape, OpError> {
    let (ra, rb) = (a.rank(), b.rank());
    if ra < 2 || rb < 2 {
        return Err(OpError::shape(format!("takes matrices, got {a:?} and {b:?}")));
    }
    if a[ra - 1] != b[rb - 2] {
        return Err(OpError::shape(format!(
            "inner dimensions differ: {a:?} has {}, {b:?} has {}",
            a[ra - 1],
            b[rb - 2]
        )));
    }
    let lead = Shape::new(&a[..ra - 2])?.broadcast(&Shape::new(&b[..rb - 2])?);
    let mut dims: Vec<usize> =
        lead.ok_or_else(|| OpError::shape(format!("{a:?} and {b:?} do not broadcast")))?.into();
    dims.extend([a[ra - 2], b[rb - 1]]);
    Ok(Shape::new(dims)?)
}

impl MatMul {
    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }
}

impl QMatMul {
    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }

    /// The requantization of this op for these weights and bias, as interpreter and kernels use it.
    pub fn requantizer(
        &self,
        types: &[&TensorType],
        weights: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Requantizer, OpError> {
        let residual = self.residual_slot().map(|s| types[s]);
        requantizer(types[0], types[1], residual, weights, 1, bias, self.requant, self.output)
    }
}

impl Operator for MatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        all_f32(operands)?;
        self.clamp.check()?;
        let y = product_shape(&a.shape, &b.shape)?;
        check_extras(
            operands,
            self.bias.then_some((DType::F32, y[y.rank() - 1])),
            self.residual.then_some((DType::F32, &y)),
        )?;
        Ok(vec![TensorType::new(DType::F32, y)])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

impl Operator for QMatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        per_tensor(a, "input")?;
        if b.shape.rank() != 2 {
            return Err(OpError::shape(format!("weights must be a matrix, got {b}")));
        }
        check_weights(b, 1)?;
        self.output.check()?;
        if self.output.dtype != DType::U8 {
            return Err(OpError::quant(format!("writes u8, not {}", self.output.dtype)));
        }
        let y = product_shape(&a.shape, &b.shape)?;
        check_extras(
            operands,
            self.bias.then_some((DType::S32, b.shape[1])),
            self.residual.then_some((DType::U8, &y)),
        )?;
        if let Some(slot) = self.residual_slot() {
            per_tensor(operands[slot], "residual")?;
        }
        Ok(vec![TensorType::quantized(DType::U8, y, self.output.params()?)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

fn product_macs(operands: &[&TensorType], results: &[TensorType]) -> u64 {
    let a = &operands[0].shape;
    results[0].shape.elements() as u64 * a[a.rank() - 1] as u64
}
