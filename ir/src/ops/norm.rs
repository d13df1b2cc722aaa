//! Normalisations.

use super::{
    Layout, Operator, arity,
    conv::{all_f32, operand},
};
use crate::{
    DType, OpError, Tensor, TensorType,
    numerics::{
        math::{self, Real},
        normalize, total,
    },
};
use serde::{Deserialize, Serialize};

/// y = (x − mean)·(scale/√(variance + ε)) + bias for each index of the channel axis, with fixed statistics; each
/// operation in f32, as bracketed.
///
/// Operands: x, scale, bias, mean, variance; the last four of one element a channel.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BatchNorm {
    /// Added to the variance.
    pub epsilon: f32,
    /// The channel axis: 1, or the last one under [`Layout::ChannelsLast`].
    pub axis: usize,
}

/// y = x / (bias + alpha/size · Σ x²)^beta, the sum over `size` neighbouring channels.
///
/// In f32: squares are summed from the first channel to the last, b = bias + (alpha/size)·sum, y = x·exp(−beta·ln b)
/// by [`numerics::math`](crate::numerics::math).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Lrn {
    /// Number of channels in a sum: from c − ⌊(size−1)/2⌋ to c + ⌈(size−1)/2⌉.
    pub size: usize,
    /// Scaling parameter.
    pub alpha: f32,
    /// Exponent.
    pub beta: f32,
    /// Offset.
    pub bias: f32,
    /// Layout of operand and result.
    pub layout: Layout,
}

/// exp(x − max)/Σ exp(x − max) along an axis, or its logarithm (x − max) − ln Σ exp(x − max); in f32, the sum in the
/// order of [`total`]. One NaN, or an infinite maximum, makes NaN of what depends on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Softmax {
    /// The axis that sums to 1.
    pub axis: usize,
    /// Whether the logarithm is taken (LogSoftmax).
    pub log: bool,
}

/// y = (x − mean)/std for each index of the channel axis: u8 pixels to what a network was trained on, by
/// [`numerics::normalize`](crate::numerics::normalize). A grid of the operand is of no account.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Normalize {
    /// The channel axis.
    pub axis: usize,
    /// Mean of each channel, in units of a pixel.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel, likewise; finite and above 0.
    pub std: Vec<f32>,
}

impl Normalize {
    /// The result for a pixel of channel `c`.
    pub fn apply(&self, pixel: u8, c: usize) -> f32 {
        normalize(pixel, self.mean[c], self.std[c])
    }
}

impl Operator for Normalize {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype != DType::U8 {
            return Err(OpError::dtype(format!("takes u8, got {x}")));
        }
        let channels = x.shape.get(self.axis).copied();
        if channels != Some(self.mean.len()) || channels != Some(self.std.len()) {
            return Err(OpError::shape(format!(
                "{} means and {} deviations along axis {} of {x}",
                self.mean.len(),
                self.std.len(),
                self.axis
            )));
        }
        let usable = |s: &f32| s.is_finite() && *s > 0.0;
        if !self.mean.iter().all(|m| m.is_finite()) || !self.std.iter().all(usable) {
            return Err(OpError::attribute("means must be finite, deviations finite and above 0"));
        }
        Ok(vec![TensorType::new(DType::F32, x.shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let shape = &results[0].shape;
        let (stride, channels) = (shape.strides()[self.axis], shape[self.axis]);
        let pixels = operands[0].as_slice::<u8>()?.iter().enumerate();
        let numbers = pixels.map(|(i, &p)| self.apply(p, i / stride % channels)).collect();
        Ok(vec![Tensor::from_vec::<f32>(shape.clone(), numbers)?])
    }
}

impl Operator for BatchNorm {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, params @ ..] = arity::<5>(operands)?;
        all_f32(operands)?;
        if self.axis >= x.shape.rank() {
            return Err(OpError::shape(format!("axis {} of {x}", self.axis)));
        }
        let channels = x.shape[self.axis];
        for (name, p) in ["scale", "bias", "mean", "variance"].iter().zip(&params) {
            if p.shape.dims() != [channels] {
                return Err(OpError::shape(format!("{name} must have {channels} elements, got {p}")));
            }
        }
        if !self.epsilon.is_finite() {
            return Err(OpError::attribute(format!("epsilon {}", self.epsilon)));
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
        let values = operands.iter().map(|t| t.as_slice::<f32>()).collect::<Result<Vec<_>, _>>()?;
        let [x, scale, bias, mean, variance] = values[..] else {
            return Err(OpError::Arity { expected: "5".into(), got: values.len() });
        };
        let factors: Vec<f32> =
            scale.iter().zip(variance).map(|(s, v)| s / (v + self.epsilon).sqrt()).collect();
        let (stride, channels) = (shape.strides()[self.axis], shape[self.axis]);
        let normalised = x.iter().enumerate().map(|(i, x)| {
            let c = i / stride % channels;
            (x - mean[c]) * factors[c] + bias[c]
        });
        Ok(vec![Tensor::from_vec::<f32>(shape.clone(), normalised.collect())?])
    }
}

impl Operator for Lrn {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        all_f32(operands)?;
        self.layout.split(&x.shape)?;
        if self.size == 0 {
            return Err(OpError::attribute("size 0"));
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
        let axis = self.layout.channel_axis(shape.rank());
        let (stride, channels) = (shape.strides()[axis], shape[axis]);
        let factor = self.alpha / self.size as f32;
        let (before, after) = ((self.size - 1) / 2, self.size / 2);
        let normalised = x.iter().enumerate().map(|(i, &v)| {
            let c = i / stride % channels;
            let (first, last) = (c.saturating_sub(before), c.saturating_add(after).min(channels - 1));
            let origin = i - c * stride;
            let squares = (first..=last).map(|c| x[origin + c * stride] * x[origin + c * stride]);
            let base = self.bias + factor * squares.fold(0.0, |sum, s| sum + s);
            v * math::exp(-self.beta * math::ln(base))
        });
        Ok(vec![Tensor::from_vec::<f32>(shape.clone(), normalised.collect())?])
    }
}

impl Operator for Softmax {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let x = operand(operands, 0)?.clone();
        arity::<1>(operands)?;
        all_f32(operands)?;
        if self.axis >= x.shape.rank() {
            return Err(OpError::attribute(format!("axis {} of {x}", self.axis)));
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
        let mut y = operands[0].as_slice::<f32>()?.to_vec();
        let (stride, extent) = (shape.strides()[self.axis], shape[self.axis]);
        for first in (0..y.len()).filter(|i| i / stride % extent == 0) {
            let at = |i: usize| first + i * stride;
            let max = (0..extent).fold(f32::NEG_INFINITY, |max, i| max.larger(y[at(i)]));
            let exponentials = (0..extent).map(|i| math::exp(y[at(i)] - max));
            let sum = total(exponentials, 0.0, |sum, e| sum + e, |a, b| a + b);
            for i in 0..extent {
                let x = y[at(i)] - max;
                y[at(i)] = if self.log { x - math::ln(sum) } else { math::exp(x) / sum };
            }
        }
        Ok(vec![Tensor::from_vec(shape.clone(), y)?])
    }
}
