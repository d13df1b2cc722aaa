//! Quantization at run time: grids that are chosen for the numbers at hand, and matrix products of their codes.

use super::{
    Clamp, Operator, arity,
    conv::{check_extras, check_weights, operand},
    matmul::{for_each_row, product_macs, product_shape, start},
};
use crate::{
    DType, OpError, Shape, Tensor, TensorType,
    numerics::{Dequantizer, DynamicGrid, WeightSums},
};
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

/// y = clamp(A·B + bias + residual) as f32, of codes: [`MatMul`](super::MatMul) whose first operand was quantized by
/// [`DynamicQuantize`].
///
/// Operands: A `[…, M, K]` u8; B `[K, N]` s8, symmetric, one scale a column or one for all; scales f32 and zero points s32
/// of A, one of each row (`[…, M, 1]`) or one of all; bias f32 `[N]` if [`bias`](Self::bias); f32 of the result's shape if
/// [`residual`](Self::residual). The result is
///
/// ```text
/// y[m, n] = clamp(f32(Σ_k (q_a[m, k] − z_a[m])·q_b[k, n])·(s_a[m]·s_b[n]) + bias[n] + residual[m, n])
/// ```
///
/// by [`Dequantizer::apply`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DynamicMatMul {
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// Bounds on the result.
    pub clamp: Clamp,
}

impl DynamicMatMul {
    /// The axis of the weights that the output channels are along.
    pub const CHANNEL_AXIS: usize = 1;
    /// Operand slot of the scales of A.
    pub const SCALE_SLOT: usize = 2;
    /// Operand slot of the zero points of A.
    pub const ZERO_POINT_SLOT: usize = 3;
    /// Operands that are always there.
    const REQUIRED: usize = 4;

    /// Operand slot of the bias, if there is one.
    pub fn bias_slot(&self) -> Option<usize> {
        self.bias.then_some(Self::REQUIRED)
    }

    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(Self::REQUIRED + usize::from(self.bias))
    }

    /// What makes floats of the sums, as interpreter and kernels use it: of weights of this type and these sums (along
    /// [`CHANNEL_AXIS`](Self::CHANNEL_AXIS)).
    ///
    /// # Errors
    /// Where a sum could leave 32 bits.
    pub fn dequantizer(
        &self,
        weights: &TensorType,
        sums: &[WeightSums],
        bias: Option<&Tensor>,
    ) -> Result<Dequantizer, OpError> {
        let grid = weights.quant.as_ref().ok_or_else(|| OpError::quant("weights without a grid"))?;
        let scales = (0..sums.len()).map(|c| grid.at(c).0).collect();
        let bias = bias.map(|b| b.as_slice::<f32>().map(<[f32]>::to_vec)).transpose()?;
        Dequantizer::new(sums, scales, bias, self.clamp).map_err(OpError::quant)
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

impl Operator for DynamicMatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        if a.dtype != DType::U8 || a.quant.is_some() {
            return Err(OpError::dtype(format!("takes plain codes of u8, got {a}")));
        }
        check_weights(b, Self::CHANNEL_AXIS)?;
        if b.shape.rank() != 2 {
            return Err(OpError::shape(format!("weights must be a matrix, got {b}")));
        }
        self.clamp.check()?;
        let y = product_shape(&a.shape, &b.shape)?;
        for (slot, dtype) in [(Self::SCALE_SLOT, DType::F32), (Self::ZERO_POINT_SLOT, DType::S32)] {
            check_of_rows(operand(operands, slot)?, dtype, &a.shape)?;
        }
        check_extras(
            operands,
            Self::REQUIRED,
            self.bias.then_some((DType::F32, b.shape[1])),
            self.residual.then_some((DType::F32, &y)),
        )?;
        Ok(vec![TensorType::new(DType::F32, y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let y = &results[0].shape;
        let (a, b) = (operands[0].as_slice::<u8>()?, operands[1].as_slice::<i8>()?);
        let mut sums = start::<i32>(y, None);
        for_each_row(operands[0].shape(), operands[1].shape(), y, |row, a_at, b_at| {
            let sums = &mut sums[row];
            for (&a, b) in a[a_at].iter().zip(b[b_at].chunks(sums.len())) {
                let a = i32::from(a);
                sums.iter_mut().zip(b).for_each(|(s, &b)| *s = s.wrapping_add(a * i32::from(b)));
            }
        });
        let weights = WeightSums::by_channel(operands[1], Self::CHANNEL_AXIS)?;
        let dequantizer = self.dequantizer(types[1], &weights, self.bias_slot().map(|s| operands[s]))?;
        let scales = operands[Self::SCALE_SLOT].as_slice::<f32>()?;
        let zeros = operands[Self::ZERO_POINT_SLOT].as_slice::<i32>()?;
        let residual = self.residual_slot().map(|s| operands[s].as_slice::<f32>()).transpose()?;
        let columns = y[y.rank() - 1];
        let number = |(i, &acc): (usize, &i32)| {
            let (row, channel) = (i / columns, i % columns);
            let [scale_at, zero_at] = [scales.len(), zeros.len()].map(|n| if n == 1 { 0 } else { row });
            let grid = DynamicGrid { scale: scales[scale_at], zero_point: zeros[zero_at] };
            dequantizer.apply(acc, channel, grid, residual.map(|r| r[i]))
        };
        Ok(vec![Tensor::from_vec::<f32>(y.clone(), sums.iter().enumerate().map(number).collect())?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

/// Fails unless there is one of this type for each row of `a`, or one for all.
fn check_of_rows(ty: &TensorType, dtype: DType, a: &Shape) -> Result<(), OpError> {
    let is_row =
        |(i, (&own, &of_a)): (usize, (&usize, &usize))| own == if i + 1 == a.rank() { 1 } else { of_a };
    let of_rows = ty.shape.rank() == a.rank() && ty.shape.iter().zip(a.iter()).enumerate().all(is_row);
    if ty.dtype != dtype || ty.quant.is_some() || !(of_rows || ty.shape.elements() == 1) {
        return Err(OpError::shape(format!("takes {dtype} of all or of each row of {a:?}, got {ty}")));
    }
    Ok(())
}
