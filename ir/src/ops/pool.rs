//! Pools.

use super::{
    Layout, Operator, Window, arity,
    conv::{for_each_window, per_tensor, unravel},
    numbers::Numbers,
};
use crate::{
    DType, Element, OpError, OutputGrid, Shape, Tensor, TensorType,
    numerics::{Multiplier, Rescaling, float_average},
    tensor::with_element,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a pool makes of its window.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum PoolKind {
    /// The largest element, NaN if there is one; padding does not take part. A window of padding alone gives the
    /// least value of the type (−∞).
    Max,
    /// The sum, in the order of the taps, divided by the number of elements; 0 for a window of none.
    Average {
        /// Whether padding counts as elements of value 0 (what `ceil_mode` adds beyond it never counts).
        count_include_pad: bool,
    },
}

/// Maximum or average over windows. The maximum also of quantized values, whose grid it keeps.
///
/// A global pool is one whose kernel is the whole input.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// What is made of a window.
    pub kind: PoolKind,
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Whether a last, partial window counts.
    pub ceil_mode: bool,
    /// Layout of operand and result.
    pub layout: Layout,
}

/// Where in the operand the largest element of each window stands, as s64: the first one of a NaN or, without one, of the
/// largest elements, in the order of the taps. The operand has channels first.
///
/// A place is an index into the whole operand, `(n·C + c)·Πextents + i`, with i the index of the element among those of
/// its channel. A window of padding alone has −1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ArgMaxPool {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Whether a last, partial window counts.
    pub ceil_mode: bool,
    /// Whether i counts the first spatial dimension fastest, rather than the last.
    pub column_major: bool,
}

/// An average [`Pool`] of quantized values: the integer sum of q − z_x, times s_x/(s_y·count) as a
/// [`Multiplier`](crate::numerics::Multiplier), one rounding, or as [`float_average`](crate::numerics::float_average).
/// Windows of no element at all give real 0.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QAveragePool {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Whether a last, partial window counts.
    pub ceil_mode: bool,
    /// Whether padding counts as elements of value 0.
    pub count_include_pad: bool,
    /// Layout of operand and result.
    pub layout: Layout,
    /// The formula of the rescaling.
    pub rescaling: Rescaling,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// The factor of the sums of a [`QAveragePool`]'s windows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum AverageRescale {
    /// In integers.
    FixedPoint(Multiplier),
    /// f32(sum)·factor, rounded half to even.
    Float(f32),
}

impl AverageRescale {
    /// The rescaled sum, without the output's zero point.
    pub fn apply(self, sum: i32) -> i64 {
        match self {
            AverageRescale::FixedPoint(m) => m.apply(sum),
            AverageRescale::Float(factor) => (sum as f32 * factor).round_ties_even() as i64,
        }
    }
}

impl QAveragePool {
    /// The factor of a sum over `count` elements: s_x/(s_y·count). `None` for a count of 0, whose average is real 0, and for
    /// a factor beyond its form's range.
    pub fn rescale(&self, operand: &TensorType, count: usize) -> Option<AverageRescale> {
        let (scale, _) = operand.per_tensor()?;
        let s_y = self.output.scale;
        match self.rescaling {
            _ if count == 0 => None,
            Rescaling::FixedPoint => {
                let factor = f64::from(scale) / (f64::from(s_y) * count as f64);
                Multiplier::new(factor).map(AverageRescale::FixedPoint)
            }
            Rescaling::Float => float_average(scale, s_y, count).map(AverageRescale::Float),
        }
    }

    /// How many elements the average at `position` (one index a spatial dimension) divides by.
    pub fn count(&self, input: &[usize], position: &[usize]) -> usize {
        counted(&self.window, input, position, self.count_include_pad)
    }
}

impl Pool {
    /// How many elements an average at `position` (one index a spatial dimension) divides by.
    pub fn count(&self, input: &[usize], position: &[usize]) -> usize {
        let count_include_pad = self.kind == PoolKind::Average { count_include_pad: true };
        counted(&self.window, input, position, count_include_pad)
    }
}

fn pool_shape(x: &Shape, window: &Window, ceil: bool, layout: Layout) -> Result<Shape, OpError> {
    let (batch, channels, spatial) = layout.split(x)?;
    layout.join(batch, channels, &window.output(&spatial, ceil)?)
}

/// How many taps of the window at `position` an average divides by: those inside the input, or inside the input and
/// its padding.
fn counted(window: &Window, input: &[usize], position: &[usize], count_include_pad: bool) -> usize {
    (0..window.rank())
        .map(|d| {
            let start = position[d] * window.strides[d];
            let (first, end) = match count_include_pad {
                true => (0, window.pads_begin[d] + input[d] + window.pads_end[d]),
                false => (window.pads_begin[d], window.pads_begin[d] + input[d]),
            };
            (0..window.kernel[d])
                .map(|t| start + t * window.dilations[d])
                .filter(|i| (first..end).contains(i))
                .count()
        })
        .product()
}

fn max_pool<T: Element>(pool: &Pool, x: &Tensor, y: &Shape) -> Result<Tensor, OpError> {
    let dtype = x.dtype();
    let lowest = Numbers::lowest(dtype).encode(dtype, Shape::scalar())?.as_slice::<T>()?[0];
    let mut largest = vec![lowest; y.elements()];
    let channels = y.get(pool.layout.channel_axis(y.rank())).copied().unwrap_or(0);
    let elements = x.as_slice::<T>()?;
    for_each_window(x.shape(), y, &pool.window, pool.layout, |at| {
        for c in 0..channels {
            let values = at.taps.iter().flatten().map(|i| elements[i + c * at.x_channel]);
            let is_nan = |x: T| x.partial_cmp(&x).is_none();
            let larger = |max: T, x: T| if x > max || is_nan(x) { x } else { max };
            largest[at.y + c * at.y_channel] = values.fold(lowest, larger);
        }
    })?;
    Ok(Tensor::from_vec_as(dtype, y.clone(), largest)?)
}

impl Operator for Pool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let allowed = match self.kind {
            PoolKind::Max => x.quant.is_none() || x.per_tensor().is_some(),
            PoolKind::Average { .. } => x.dtype == DType::F32,
        };
        if !allowed || x.dtype == DType::Bool {
            return Err(OpError::dtype(format!("{:?} pool of {x}", self.kind)));
        }
        let y = pool_shape(&x.shape, &self.window, self.ceil_mode, self.layout)?;
        Ok(vec![x.with_shape(y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0], &results[0].shape);
        if self.kind == PoolKind::Max {
            return Ok(vec![with_element!(x.dtype(), T => max_pool::<T>(self, x, y)?)]);
        }
        let elements = x.as_slice::<f32>()?;
        let (_, channels, spatial) = self.layout.split(x.shape())?;
        let mut means = vec![0f32; y.elements()];
        for_each_window(x.shape(), y, &self.window, self.layout, |at| {
            let count = self.count(&spatial, at.position);
            for c in 0..channels {
                let values = at.taps.iter().flatten().map(|i| elements[i + c * at.x_channel]);
                let sum = values.fold(0f32, |sum, x| sum + x);
                means[at.y + c * at.y_channel] = if count == 0 { 0.0 } else { sum / count as f32 };
            }
        })?;
        Ok(vec![Tensor::from_vec(y.clone(), means)?])
    }
}

fn arg_max_pool<T: Element>(pool: &ArgMaxPool, x: &Tensor, y: &Shape) -> Result<Tensor, OpError> {
    let channels = y.get(1).copied().unwrap_or(0);
    let elements = x.as_slice::<T>()?;
    let extents = &x.shape()[2..];
    let area: usize = extents.iter().product();
    let place = |i: usize| match pool.column_major {
        false => i as i64,
        true => {
            let index = unravel(i % area, extents);
            let reversed = index.iter().zip(extents).rev().fold(0, |at, (&i, &d)| at * d + i);
            (i / area * area + reversed) as i64
        }
    };
    let mut places = vec![-1i64; y.elements()];
    for_each_window(x.shape(), y, &pool.window, Layout::ChannelsFirst, |at| {
        for c in 0..channels {
            let taps = at.taps.iter().flatten().map(|i| i + c * at.x_channel);
            let is_nan = |x: T| x.partial_cmp(&x).is_none();
            let larger = |best: usize, i: usize| {
                let (max, x) = (elements[best], elements[i]);
                if x > max || is_nan(x) && !is_nan(max) { i } else { best }
            };
            if let Some(best) = taps.reduce(larger) {
                places[at.y + c * at.y_channel] = place(best);
            }
        }
    })?;
    Ok(Tensor::from_vec(y.clone(), places)?)
}

impl Operator for ArgMaxPool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype == DType::Bool {
            return Err(OpError::dtype(format!("takes numbers, got {x}")));
        }
        let y = pool_shape(&x.shape, &self.window, self.ceil_mode, Layout::ChannelsFirst)?;
        Ok(vec![TensorType::new(DType::S64, y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0], &results[0].shape);
        Ok(vec![with_element!(x.dtype(), T => arg_max_pool::<T>(self, x, y)?)])
    }
}

impl Operator for QAveragePool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        per_tensor(&x, "input")?;
        self.output.check()?;
        let y = pool_shape(&x.shape, &self.window, self.ceil_mode, self.layout)?;
        if self.window.taps() as u64 * 255 > i32::MAX as u64 {
            return Err(OpError::too_large(format!(
                "a window of {} elements overflows a 32-bit sum",
                self.window.taps()
            )));
        }
        if self.rescale(&x, 1).is_none() || self.rescale(&x, self.window.taps()).is_none() {
            return Err(OpError::quant(format!(
                "the step of {x} is too far from the output's {}",
                self.output.scale
            )));
        }
        Ok(vec![TensorType::quantized(self.output.dtype, y, self.output.params()?)?])
    }
    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0], &results[0].shape);
        let codes = x.as_slice::<u8>()?;
        let (_, zero) = per_tensor(types[0], "input")?;
        let (_, channels, spatial) = self.layout.split(x.shape())?;
        let OutputGrid { zero_point, lo, hi, .. } = self.output;
        let mut means = vec![0u8; y.elements()];
        let mut rescales = BTreeMap::new();
        for_each_window(x.shape(), y, &self.window, self.layout, |at| {
            let count = self.count(&spatial, at.position);
            let rescale = *rescales.entry(count).or_insert_with(|| self.rescale(types[0], count));
            for c in 0..channels {
                let values = at.taps.iter().flatten().map(|i| codes[i + c * at.x_channel]);
                let sum: i32 = values.map(|q| i32::from(q) - zero).sum();
                let mean = rescale.map_or(0, |r| r.apply(sum)) + i64::from(zero_point);
                means[at.y + c * at.y_channel] = mean.clamp(lo.into(), hi.into()) as u8;
            }
        })?;
        Ok(vec![Tensor::from_bytes(results[0].dtype, y.clone(), means.into())?])
    }
}
