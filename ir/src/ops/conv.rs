//! Convolutions.

use super::{Operator, Window};
use crate::{
    DType, OpError, OutputGrid, QuantParams, Shape, Tensor, TensorType,
    numerics::{ChannelBounds, RequantMode, Requantizer, ResidualInput, WeightSums},
};
use serde::{Deserialize, Serialize};

/// Where the channels of an activation stand. Weights are always `[out, in/groups, kernel…]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Layout {
    /// `[N, C, spatial…]`, as ONNX has it.
    ChannelsFirst,
    /// `[N, spatial…, C]`, as the kernels want it.
    ChannelsLast,
}

impl Layout {
    /// The axis of the channels in a tensor of `rank` dimensions.
    pub fn channel_axis(self, rank: usize) -> usize {
        match self {
            Layout::ChannelsFirst => 1,
            Layout::ChannelsLast => rank - 1,
        }
    }

    /// Splits `[N, C, spatial…]` or `[N, spatial…, C]` into batch, channels and spatial extents.
    pub fn split(self, shape: &Shape) -> Result<(usize, usize, Vec<usize>), OpError> {
        if shape.rank() < 3 {
            return Err(OpError::shape(format!(
                "takes batch, channels and at least one spatial dimension, got {shape:?}"
            )));
        }
        let axis = self.channel_axis(shape.rank());
        let spatial = (1..shape.rank()).filter(|&d| d != axis).map(|d| shape[d]);
        Ok((shape[0], shape[axis], spatial.collect()))
    }

    /// The opposite of [`split`](Self::split).
    pub fn join(self, batch: usize, channels: usize, spatial: &[usize]) -> Result<Shape, OpError> {
        let mut dims = vec![batch];
        dims.extend(spatial);
        dims.insert(self.channel_axis(dims.len() + 1), channels);
        Ok(Shape::new(dims)?)
    }
}

/// Inclusive bounds on a float result; infinite where there is none. A fused ReLU is `[0, ∞]`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Clamp {
    /// Lower bound.
    pub lo: f32,
    /// Upper bound.
    pub hi: f32,
}

impl Clamp {
    /// No bounds.
    pub const NONE: Clamp = Clamp { lo: f32::NEG_INFINITY, hi: f32::INFINITY };
    /// `max(x, 0)`.
    pub const RELU: Clamp = Clamp { lo: 0.0, hi: f32::INFINITY };

    /// Whether it bounds nothing.
    pub fn is_none(self) -> bool {
        self == Clamp::NONE
    }

    /// The value within the bounds: the lower first, then the upper; NaN stays.
    pub fn apply(self, x: f32) -> f32 {
        let above = if x < self.lo { self.lo } else { x };
        if above > self.hi { self.hi } else { above }
    }

    /// First `self`, then `next`.
    pub fn then(self, next: Clamp) -> Clamp {
        Clamp { lo: next.apply(self.lo), hi: next.apply(self.hi) }
    }

    pub(super) fn check(self) -> Result<(), OpError> {
        if self.lo.is_nan() || self.hi.is_nan() {
            return Err(OpError::attribute("a clamp bound is NaN"));
        }
        Ok(())
    }
}

/// y = clamp(conv(x, w) + bias + residual), in f32.
///
/// Operands: x; w `[out, in/groups, kernel…]`; bias `[out]` if [`bias`](Self::bias); a tensor of the result's shape
/// if [`residual`](Self::residual).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Conv {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Number of groups that the channels are split into.
    pub groups: usize,
    /// Layout of x, residual and result.
    pub layout: Layout,
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// Bounds on the result.
    pub clamp: Clamp,
}

/// [`Conv`] on quantized operands: accumulates in s32 and requantizes once.
///
/// Operands: x (u8, one grid); w (s8, symmetric, one scale an output channel or one for all); bias (s32, in units of
/// s_x·s_w) if [`bias`](Self::bias); residual (u8, one grid) if [`residual`](Self::residual). Padding holds z_x.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QConv {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Number of groups that the channels are split into.
    pub groups: usize,
    /// Layout of x, residual and result.
    pub layout: Layout,
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// The formula of the requantization.
    pub requant: RequantMode,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// The result shape of a convolution, after all checks that do not depend on element types.
pub(super) fn conv_shape(
    x: &Shape,
    w: &Shape,
    window: &Window,
    groups: usize,
    layout: Layout,
) -> Result<Shape, OpError> {
    let (batch, channels, spatial) = layout.split(x)?;
    if w.rank() != spatial.len() + 2 {
        return Err(OpError::shape(format!("weights {w:?} do not have the rank of input {x:?}")));
    }
    if groups == 0 || !channels.is_multiple_of(groups) || !w[0].is_multiple_of(groups) {
        return Err(OpError::attribute(format!(
            "{groups} groups do not divide {channels} input and {} output channels",
            w[0]
        )));
    }
    if w[1] != channels / groups {
        return Err(OpError::shape(format!(
            "weights {w:?} take {} channels a group, input {x:?} has {}",
            w[1],
            channels / groups
        )));
    }
    if w[2..] != window.kernel[..] {
        return Err(OpError::shape(format!("weights {w:?} do not have kernel extents {:?}", window.kernel)));
    }
    layout.join(batch, w[0], &window.output(&spatial, false)?)
}

impl Conv {
    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }
}

impl QConv {
    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }

    /// The axis of the weights that the output channels are along.
    pub const CHANNEL_AXIS: usize = 0;

    /// The requantization of this op for weights of these sums (along [`CHANNEL_AXIS`](Self::CHANNEL_AXIS)) and this
    /// bias, as interpreter and kernels use it.
    pub fn requantizer(
        &self,
        types: &[&TensorType],
        weights: &[WeightSums],
        bias: Option<&Tensor>,
    ) -> Result<Requantizer, OpError> {
        let bounds = weight_bounds(types[0], weights, bias)?;
        let residual = self.residual_slot().map(|s| types[s]);
        requantizer(types[0], types[1], residual, &bounds, self.requant, self.output)
    }
}

/// The bounds of each output channel's accumulators, by the sums of its weights.
pub(super) fn weight_bounds(
    x: &TensorType,
    weights: &[WeightSums],
    bias: Option<&Tensor>,
) -> Result<Vec<ChannelBounds>, OpError> {
    let (_, z_x) = per_tensor(x, "input")?;
    let bias = bias.map(|b| b.as_slice::<i32>()).transpose()?;
    let bounds = weights.iter().enumerate().map(|(c, own)| own.bounds(bias.map_or(0, |b| b[c]), z_x));
    Ok(bounds.collect())
}

/// Builds the requantizer of a product with these bounds of each output channel's accumulators.
pub(super) fn requantizer(
    x: &TensorType,
    w: &TensorType,
    residual: Option<&TensorType>,
    bounds: &[ChannelBounds],
    mode: RequantMode,
    grid: OutputGrid,
) -> Result<Requantizer, OpError> {
    let (s_x, _) = per_tensor(x, "input")?;
    let w_grid = w.quant.as_ref().ok_or_else(|| OpError::quant("weights without a grid"))?;
    let factor = |c: usize| {
        let (s_w, s_y) = (w_grid.at(c).0, grid.scale);
        match mode {
            // In f32, in this order, as ONNX Runtime does: a factor that is a bit off moves ties.
            RequantMode::Float => (s_x * s_w / s_y).into(),
            _ => f64::from(s_x) * f64::from(s_w) / f64::from(s_y),
        }
    };
    let factors: Vec<f64> = (0..bounds.len()).map(factor).collect();
    let residual = residual
        .map(|r| per_tensor(r, "residual"))
        .transpose()?
        .map(|(s, z)| ResidualInput { factor: f64::from(s) / f64::from(grid.scale), zero_point: z });
    Requantizer::new(mode, &factors, grid, residual, bounds).map_err(|e| OpError::quant(e.to_string()))
}

/// The codes of accumulators whose channels are along `axis`.
pub(super) fn requantized(
    requantizer: &Requantizer,
    shape: &Shape,
    axis: usize,
    sums: &[i32],
    residual: Option<&[u8]>,
) -> Result<Tensor, OpError> {
    let (stride, channels) = (shape.strides()[axis], shape[axis]);
    let codes = sums.iter().enumerate().map(|(i, &acc)| {
        let r = residual.map_or(0, |r| r[i].into());
        requantizer.apply(acc, i / stride % channels, r) as u8
    });
    Ok(Tensor::from_vec::<u8>(shape.clone(), codes.collect())?)
}

/// Scale and zero point of a u8 operand that must have one grid as a whole.
pub(super) fn per_tensor(ty: &TensorType, what: &str) -> Result<(f32, i32), OpError> {
    match ty.per_tensor() {
        Some(grid) if ty.dtype == DType::U8 => Ok(grid),
        _ => Err(OpError::quant(format!("the {what} must be u8 with one scale and zero point, got {ty}"))),
    }
}

/// Checks s8 weights: symmetric, per tensor or per output channel.
pub(super) fn check_weights(ty: &TensorType, channel_axis: usize) -> Result<(), OpError> {
    let symmetric = |q: &QuantParams| {
        q.zero_points().iter().all(|&z| z == 0) && q.axis().is_none_or(|a| a == channel_axis)
    };
    match &ty.quant {
        Some(q) if ty.dtype == DType::S8 && symmetric(q) => Ok(()),
        _ => Err(OpError::quant(format!(
            "weights must be s8 with zero points 0 and scales along axis {channel_axis}, got {ty}"
        ))),
    }
}

/// Checks the optional operands of an accumulating op behind the first `required` ones: a bias of one element a channel, a
/// residual like the result.
pub(super) fn check_extras(
    operands: &[&TensorType],
    required: usize,
    bias: Option<(DType, usize)>,
    residual: Option<(DType, &Shape)>,
) -> Result<(), OpError> {
    let expected = required + usize::from(bias.is_some()) + usize::from(residual.is_some());
    if operands.len() != expected {
        return Err(OpError::Arity { expected: expected.to_string(), got: operands.len() });
    }
    if let Some((dtype, channels)) = bias {
        let b = operands[required];
        if b.dtype != dtype || b.shape.dims() != [channels] {
            return Err(OpError::shape(format!("the bias must be {dtype}[{channels}], got {b}")));
        }
    }
    if let Some((dtype, shape)) = residual {
        let r = operands[expected - 1];
        if r.dtype != dtype || r.shape != *shape {
            return Err(OpError::shape(format!(
                "the residual must be {dtype}[{shape}] like the result, got {r}"
            )));
        }
    }
    Ok(())
}

/// Fails unless all operands are f32.
pub(super) fn all_f32(operands: &[&TensorType]) -> Result<(), OpError> {
    match operands.iter().find(|t| t.dtype != DType::F32) {
        Some(t) => Err(OpError::dtype(format!("takes f32, got {t}"))),
        None => Ok(()),
    }
}

/// Where a window stands: what [`for_each_window`] visits.
pub(super) struct Placed<'a> {
    /// Index of the result in channel 0, row-major.
    pub(super) y: usize,
    /// Position among the results, one entry a spatial dimension.
    pub(super) position: &'a [usize],
    /// For each tap the index of its element in channel 0, row-major, or `None` in the padding.
    pub(super) taps: &'a [Option<usize>],
    /// Distance of neighbouring channels in x.
    pub(super) x_channel: usize,
    /// Distance of neighbouring channels in y.
    pub(super) y_channel: usize,
}

/// Visits the windows of a convolution or pool, in the order of the results, batch by batch.
pub(super) fn for_each_window(
    x: &Shape,
    y: &Shape,
    window: &Window,
    layout: Layout,
    mut f: impl FnMut(Placed<'_>),
) -> Result<(), OpError> {
    let (batch, _, spatial) = layout.split(x)?;
    let (_, _, out_spatial) = layout.split(y)?;
    let (x_strides, y_strides) = (x.strides(), y.strides());
    let axis = layout.channel_axis(x.rank());
    let spatial_axes: Vec<usize> = (1..x.rank()).filter(|&d| d != axis).collect();
    let positions: usize = out_spatial.iter().product();
    let mut taps = vec![None; window.taps()];
    for n in 0..batch {
        for p in 0..positions {
            let position = unravel(p, &out_spatial);
            let at: usize = position.iter().zip(&spatial_axes).map(|(&i, &d)| i * y_strides[d]).sum();
            for (t, tap) in taps.iter_mut().enumerate() {
                let offset = unravel(t, &window.kernel);
                *tap = (0..offset.len()).try_fold(n * x_strides[0], |at, d| {
                    (position[d] * window.strides[d] + offset[d] * window.dilations[d])
                        .checked_sub(window.pads_begin[d])
                        .filter(|&i| i < spatial[d])
                        .map(|i| at + i * x_strides[spatial_axes[d]])
                });
            }
            f(Placed {
                y: n * y_strides[0] + at,
                position: &position,
                taps: &taps,
                x_channel: x_strides[axis],
                y_channel: y_strides[axis],
            });
        }
    }
    Ok(())
}

/// Visits each product of a convolution: `f(result index, x index or None in the padding, w index)`, all row-major,
/// results in order and the taps of one result in the order (channel in group, tap) of the weights.
pub(super) fn for_each_product(
    x: &Shape,
    w: &Shape,
    y: &Shape,
    window: &Window,
    groups: usize,
    layout: Layout,
    mut f: impl FnMut(usize, Option<usize>, usize),
) -> Result<(), OpError> {
    let (out_channels, per_group_in) = (w[0], w[1]);
    let per_group_out = out_channels / groups;
    for_each_window(x, y, window, layout, |at| {
        for o in 0..out_channels {
            let first = o / per_group_out * per_group_in;
            for c in 0..per_group_in {
                for (t, tap) in at.taps.iter().enumerate() {
                    let x_index = tap.map(|i| i + (first + c) * at.x_channel);
                    f(at.y + o * at.y_channel, x_index, (o * per_group_in + c) * at.taps.len() + t);
                }
            }
        }
    })
}

/// The multi-dimensional index of flat index `i`.
pub(super) fn unravel(mut i: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (at, &d) in index.iter_mut().zip(dims).rev() {
        *at = i % d;
        i /= d;
    }
    index
}

impl Operator for Conv {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (x, w) = (operand(operands, 0)?, operand(operands, 1)?);
        all_f32(operands)?;
        self.clamp.check()?;
        let y = conv_shape(&x.shape, &w.shape, &self.window, self.groups, self.layout)?;
        check_extras(
            operands,
            2,
            self.bias.then_some((DType::F32, w.shape[0])),
            self.residual.then_some((DType::F32, &y)),
        )?;
        Ok(vec![TensorType::new(DType::F32, y)])
    }

    /// Each sum in f32, taps in the order of the weights, bias first, residual last.
    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, w) = (operands[0].as_slice::<f32>()?, operands[1].as_slice::<f32>()?);
        let y = &results[0].shape;
        let axis = self.layout.channel_axis(y.rank());
        let (stride, channels) = (y.strides()[axis], y[axis]);
        let mut sums = vec![0f32; y.elements()];
        if self.bias {
            let bias = operands[2].as_slice::<f32>()?;
            for (i, s) in sums.iter_mut().enumerate() {
                *s = bias[i / stride % channels];
            }
        }
        for_each_product(
            operands[0].shape(),
            operands[1].shape(),
            y,
            &self.window,
            self.groups,
            self.layout,
            |y, xi, wi| {
                if let Some(xi) = xi {
                    sums[y] += x[xi] * w[wi];
                }
            },
        )?;
        if let Some(slot) = self.residual_slot() {
            for (s, r) in sums.iter_mut().zip(operands[slot].as_slice::<f32>()?) {
                *s += r;
            }
        }
        for s in &mut sums {
            *s = self.clamp.apply(*s);
        }
        Ok(vec![Tensor::from_vec(y.clone(), sums)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        conv_macs(operands, results)
    }
}

impl Operator for QConv {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (x, w) = (operand(operands, 0)?, operand(operands, 1)?);
        per_tensor(x, "input")?;
        check_weights(w, 0)?;
        self.output.check()?;
        if self.output.dtype != DType::U8 {
            return Err(OpError::quant(format!("writes u8, not {}", self.output.dtype)));
        }
        let y = conv_shape(&x.shape, &w.shape, &self.window, self.groups, self.layout)?;
        check_extras(
            operands,
            2,
            self.bias.then_some((DType::S32, w.shape[0])),
            self.residual.then_some((DType::U8, &y)),
        )?;
        if let Some(slot) = self.residual_slot() {
            per_tensor(operands[slot], "residual")?;
        }
        Ok(vec![TensorType::quantized(DType::U8, y, self.output.params()?)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, w) = (operands[0].as_slice::<u8>()?, operands[1].as_slice::<i8>()?);
        let (_, z_x) = per_tensor(types[0], "input")?;
        let bias = self.bias.then(|| operands[2]);
        let sums = WeightSums::by_channel(operands[1], Self::CHANNEL_AXIS)?;
        let requantizer = self.requantizer(types, &sums, bias)?;
        let y = &results[0].shape;
        let axis = self.layout.channel_axis(y.rank());
        let (stride, channels) = (y.strides()[axis], y[axis]);
        let mut sums = vec![0i32; y.elements()];
        if let Some(bias) = bias {
            let bias = bias.as_slice::<i32>()?;
            for (i, s) in sums.iter_mut().enumerate() {
                *s = bias[i / stride % channels];
            }
        }
        // (q_x − z_x)·q_w: the padding holds z_x and so adds nothing. Partial sums may wrap, the whole may not:
        // `requantizer` has checked that.
        for_each_product(
            operands[0].shape(),
            operands[1].shape(),
            y,
            &self.window,
            self.groups,
            self.layout,
            |y, xi, wi| {
                if let Some(xi) = xi {
                    sums[y] = sums[y].wrapping_add((i32::from(x[xi]) - z_x) * i32::from(w[wi]));
                }
            },
        )?;
        let residual = self.residual_slot().map(|s| operands[s].as_slice::<u8>()).transpose()?;
        Ok(vec![requantized(&requantizer, y, axis, &sums, residual)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        conv_macs(operands, results)
    }
}

pub(super) fn conv_macs(operands: &[&TensorType], results: &[TensorType]) -> u64 {
    let w = &operands[1].shape;
    let each = w[1..].iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
    (results[0].shape.elements() as u64).saturating_mul(each)
}

/// Operand `slot`, or the arity error.
pub(super) fn operand<'a>(operands: &[&'a TensorType], slot: usize) -> Result<&'a TensorType, OpError> {
    operands
        .get(slot)
        .copied()
        .ok_or(OpError::Arity { expected: format!("at least {}", slot + 1), got: operands.len() })
}
