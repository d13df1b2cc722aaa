//! Convolutions and matrix products of codes whose results are floats: what integers cost, without a second rounding.

use super::{
    Clamp, Layout, Operator, Window,
    conv::{check_extras, check_weights, conv_macs, conv_shape, for_each_product, operand, per_tensor},
    matmul::{for_each_row, product_macs, product_shape, start},
};
use crate::{
    DType, OpError, Shape, Tensor, TensorType,
    numerics::{Dequantizer, DynamicGrid, WeightSums},
};
use serde::{Deserialize, Serialize};

/// How sums of products of codes become floats, and what is added to them.
///
/// Operands: A u8; B s8, symmetric, one scale an output channel or one for all; scale f32 and zero point s32 of A if
/// [`grids`](Self::grids) (otherwise the type of A has one grid); bias f32 of one element an output channel if
/// [`bias`](Self::bias); f32 of the result's shape if [`residual`](Self::residual). With c the output channel the result is
///
/// ```text
/// y = clamp(f32(Σ (q_a − z_a)·q_b)·(s_a·s_b[c]) + bias[c] + residual)
/// ```
///
/// by [`Dequantizer::apply`].
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct ToFloat {
    /// Whether the grids of A are known at run time.
    pub grids: bool,
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// Bounds on the result.
    pub clamp: Clamp,
}

impl ToFloat {
    /// Operand slot of the scales of A, where they are known at run time.
    pub const SCALE_SLOT: usize = 2;
    /// Operand slot of the zero points of A, likewise.
    pub const ZERO_POINT_SLOT: usize = 3;

    /// Nothing besides the product.
    pub fn plain(grids: bool) -> ToFloat {
        ToFloat { grids, bias: false, residual: false, clamp: Clamp::NONE }
    }

    /// Operands that are always there.
    fn required(&self) -> usize {
        if self.grids { Self::ZERO_POINT_SLOT + 1 } else { 2 }
    }

    /// Operand slot of the bias, if there is one.
    pub fn bias_slot(&self) -> Option<usize> {
        self.bias.then_some(self.required())
    }

    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(self.required() + usize::from(self.bias))
    }

    /// What makes floats of the sums, as interpreter and kernels use it: of weights of this type and these sums (along
    /// their output channels).
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

    /// Checks what both ops have in common, for results of this shape; `rows` is the shape of A where each of its rows may
    /// have a grid.
    fn check(
        &self,
        operands: &[&TensorType],
        channel_axis: usize,
        y: &Shape,
        rows: Option<&Shape>,
    ) -> Result<(), OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        check_weights(b, channel_axis)?;
        self.clamp.check()?;
        if self.grids {
            if a.dtype != DType::U8 || a.quant.is_some() {
                return Err(OpError::dtype(format!("takes plain codes of u8, got {a}")));
            }
            check_grids(operand(operands, Self::SCALE_SLOT)?, DType::F32, rows)?;
            check_grids(operand(operands, Self::ZERO_POINT_SLOT)?, DType::S32, rows)?;
        } else {
            per_tensor(a, "input")?;
        }
        check_extras(
            operands,
            self.required(),
            self.bias.then_some((DType::F32, b.shape[channel_axis])),
            self.residual.then_some((DType::F32, y)),
        )
    }

    /// The grids of the rows of A.
    fn grids_of<'t>(&self, operands: &[&'t Tensor], a: &TensorType) -> Result<Grids<'t>, OpError> {
        if !self.grids {
            let (scale, zero_point) = per_tensor(a, "input")?;
            return Ok(Grids::One(DynamicGrid { scale, zero_point }));
        }
        let scales = operands[Self::SCALE_SLOT].as_slice::<f32>()?;
        let zero_points = operands[Self::ZERO_POINT_SLOT].as_slice::<i32>()?;
        Ok(Grids::Known { scales, zero_points })
    }

    /// The floats of whole sums; `place(i)` is the row of A and the output channel of the i-th.
    fn floats(
        &self,
        sums: &[i32],
        operands: &[&Tensor],
        types: &[&TensorType],
        channel_axis: usize,
        place: impl Fn(usize) -> (usize, usize),
    ) -> Result<Vec<f32>, OpError> {
        let weights = WeightSums::by_channel(operands[1], channel_axis)?;
        let dequantizer = self.dequantizer(types[1], &weights, self.bias_slot().map(|s| operands[s]))?;
        let grids = self.grids_of(operands, types[0])?;
        let residual = self.residual_slot().map(|s| operands[s].as_slice::<f32>()).transpose()?;
        let number = |(i, &acc): (usize, &i32)| {
            let (row, channel) = place(i);
            dequantizer.apply(acc, channel, grids.at(row), residual.map(|r| r[i]))
        };
        Ok(sums.iter().enumerate().map(number).collect())
    }
}

/// The grids of the rows of an operand.
enum Grids<'t> {
    /// One for all.
    One(DynamicGrid),
    /// Scales and zero points, each of rows or of all.
    Known { scales: &'t [f32], zero_points: &'t [i32] },
}

impl Grids<'_> {
    fn at(&self, row: usize) -> DynamicGrid {
        match self {
            Grids::One(grid) => *grid,
            Grids::Known { scales, zero_points } => {
                let [scale_at, zero_at] =
                    [scales.len(), zero_points.len()].map(|n| if n == 1 { 0 } else { row });
                DynamicGrid { scale: scales[scale_at], zero_point: zero_points[zero_at] }
            }
        }
    }
}

/// Fails unless there is one of this type for all, or for each row of an operand of this shape.
fn check_grids(ty: &TensorType, dtype: DType, rows: Option<&Shape>) -> Result<(), OpError> {
    let of_rows = |a: &Shape| {
        let is_row =
            |(i, (&own, &of_a)): (usize, (&usize, &usize))| own == if i + 1 == a.rank() { 1 } else { of_a };
        ty.shape.rank() == a.rank() && ty.shape.iter().zip(a.iter()).enumerate().all(is_row)
    };
    if ty.dtype != dtype || ty.quant.is_some() || !(ty.shape.elements() == 1 || rows.is_some_and(of_rows)) {
        let of = rows.map_or_else(|| "of all".into(), |a| format!("of all or of each row of {a:?}"));
        return Err(OpError::shape(format!("takes {dtype} {of}, got {ty}")));
    }
    Ok(())
}

/// [`MatMul`](super::MatMul) of codes by [`ToFloat`]: A `[…, M, K]`, B `[K, N]`. Grids that are known at run time are one of
/// each row (`[…, M, 1]`) or one of all.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QMatMulToFloat {
    /// What becomes of sums.
    pub to: ToFloat,
}

impl QMatMulToFloat {
    /// The axis of the weights that the output channels are along.
    pub const CHANNEL_AXIS: usize = 1;
}

/// [`Conv`](super::Conv) of codes by [`ToFloat`]. A grid that is known at run time is one of all. Padding holds
/// z_a, which is a code.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QConvToFloat {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Number of groups that the channels are split into.
    pub groups: usize,
    /// Layout of A, residual and result.
    pub layout: Layout,
    /// What becomes of sums.
    pub to: ToFloat,
}

impl QConvToFloat {
    /// The axis of the weights that the output channels are along.
    pub const CHANNEL_AXIS: usize = 0;
}

impl Operator for QMatMulToFloat {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        if b.shape.rank() != 2 {
            return Err(OpError::shape(format!("weights must be a matrix, got {b}")));
        }
        let y = product_shape(&a.shape, &b.shape)?;
        self.to.check(operands, Self::CHANNEL_AXIS, &y, Some(&a.shape))?;
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
        let columns = y[y.rank() - 1];
        let place = |i: usize| (i / columns, i % columns);
        let floats = self.to.floats(&sums, operands, types, Self::CHANNEL_AXIS, place)?;
        Ok(vec![Tensor::from_vec::<f32>(y.clone(), floats)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

impl Operator for QConvToFloat {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        let y = conv_shape(&a.shape, &b.shape, &self.window, self.groups, self.layout)?;
        self.to.check(operands, Self::CHANNEL_AXIS, &y, None)?;
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
        // Of a zero point that is no code, the lowest byte.
        let zero = i32::from(self.to.grids_of(operands, types[0])?.at(0).zero_point as u8);
        let mut sums = vec![0i32; y.elements()];
        for_each_product(
            operands[0].shape(),
            operands[1].shape(),
            y,
            &self.window,
            self.groups,
            self.layout,
            |y, ai, bi| {
                let code = ai.map_or(zero, |ai| i32::from(a[ai]));
                sums[y] = sums[y].wrapping_add(code.wrapping_mul(i32::from(b[bi])));
            },
        )?;
        let axis = self.layout.channel_axis(y.rank());
        let (stride, channels) = (y.strides()[axis], y[axis]);
        let place = |i: usize| (0, i / stride % channels);
        let floats = self.to.floats(&sums, operands, types, Self::CHANNEL_AXIS, place)?;
        Ok(vec![Tensor::from_vec::<f32>(y.clone(), floats)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        conv_macs(operands, results)
    }
}
