//! Quantization at run time: grids that are chosen for the numbers at hand.

use super::{Operator, arity};
use crate::{DType, OpError, Shape, Tensor, TensorType, numerics::DynamicGrid};
use serde::{Deserialize, Serialize};

/// Real numbers to codes of grids that are chosen for them: one for each index of the dimensions before
/// [`axis`](Self::axis), of all elements behind. 0 makes one grid of all, as ONNX's DynamicQuantizeLinear; the last axis one
/// of each row.
///
/// Operand: x f32. Results: codes u8 of its shape; scales f32 and zero points s32, which have 1 for each dimension from the
/// axis on. They are those of [`DynamicGrid`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DynamicQuantize {
    /// The first dimension that shares a grid; at most the rank.
    pub axis: usize,
}

impl DynamicQuantize {
    /// Grids of x, and elements of each.
    pub fn split(&self, x: &Shape) -> (usize, usize) {
        (x[..self.axis].iter().product(), x[self.axis..].iter().product())
    }
}

impl Operator for DynamicQuantize {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype != DType::F32 {
            return Err(OpError::dtype(format!("quantizes f32, got {x}")));
        }
        let rank = x.shape.rank();
        if self.axis > rank {
            return Err(OpError::attribute(format!("axis {} of rank {rank}", self.axis)));
        }
        let mut dims = x.shape.to_vec();
        dims[self.axis..].fill(1);
        let grids = Shape::new(dims)?;
        let result = |dtype, shape| TensorType::new(dtype, shape);
        Ok(vec![result(DType::U8, x.shape), result(DType::F32, grids.clone()), result(DType::S32, grids)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0].as_slice::<f32>()?;
        let (count, elements) = self.split(operands[0].shape());
        let rows = || (0..count).map(|i| &x[i * elements..][..elements]);
        let grids: Vec<DynamicGrid> = rows().map(DynamicGrid::of).collect();
        let codes = rows().zip(&grids).flat_map(|(row, grid)| row.iter().map(|&x| grid.code(x))).collect();
        let (scales, zeros) = grids.iter().map(|g| (g.scale, g.zero_point)).unzip();
        let [of_codes, of_grids, _] = [0, 1, 2].map(|i| results[i].shape.clone());
        Ok(vec![
            Tensor::from_vec::<u8>(of_codes, codes)?,
            Tensor::from_vec::<f32>(of_grids.clone(), scales)?,
            Tensor::from_vec::<i32>(of_grids, zeros)?,
        ])
    }
}
