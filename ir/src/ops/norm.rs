//! Normalisations.

use super::{
    Layout, Operator, arity,
    conv::{all_f32, operand},
};
use crate::{OpError, TensorType};
use serde::{Deserialize, Serialize};

/// y = (x − mean)/√(variance + ε)·scale + bias for each index of the channel axis, with fixed statistics.
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

/// exp(x − max)/Σ exp(x − max) along an axis, or its logarithm.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Softmax {
    /// The axis that sums to 1.
    pub axis: usize,
    /// Whether the logarithm is taken (LogSoftmax).
    pub log: bool,
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
}
