//! What the weights of a product are like, channel by channel.

use crate::edit::{Product, channel_runs, f32_constant, has_weights};
use qcc_ir::{Graph, NodeId, Op, QuantParams, Tensor};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The weights of one output channel.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct ChannelWeights {
    /// The smallest.
    pub min: f32,
    /// The largest.
    pub max: f32,
    /// The step of their grid; `None` where they are float.
    pub scale: Option<f32>,
}

/// The weights of a convolution or matrix product by output channel, in a float or a fake-quantized graph; `None` of other nodes,
/// and where they are not constant or not finite.
pub fn weight_channels(graph: &Graph, node: NodeId) -> Option<Vec<ChannelWeights>> {
    let axis = match Product::of(graph, node).filter(|_| has_weights(graph, node))? {
        Product::Conv(_) => 0,
        Product::MatMul(_) => 1,
    };
    let operand = *graph.operands(node).get(1)?;
    let (weights, params): (Cow<'_, [f32]>, Option<QuantParams>) = match graph.op(operand.node) {
        None => (f32_constant(graph, operand)?.into(), None),
        Some(Op::FakeQuant(f)) => {
            (f32_constant(graph, graph.operand(operand.node, 0))?.into(), Some(f.params.clone()))
        }
        Some(op @ Op::Dequantize(_)) => {
            let codes = graph.operand(operand.node, 0);
            let (tensor, ty) = (graph.constant_value(codes)?, graph.ty(codes));
            let results = op.infer(&[ty]).ok()?;
            let numbers: Tensor = op.eval(&[tensor], &[ty], &results).ok()?.pop()?;
            (numbers.as_slice::<f32>().ok()?.to_vec().into(), ty.quant.clone())
        }
        Some(_) => return None,
    };
    let shape = graph.shape(operand);
    let mut channels =
        vec![ChannelWeights { min: f32::INFINITY, max: f32::NEG_INFINITY, scale: None }; shape[axis]];
    for (c, run) in channel_runs(&weights, shape, axis) {
        for &w in run {
            channels[c].min = channels[c].min.min(w);
            channels[c].max = channels[c].max.max(w);
        }
    }
    if let Some(params) = params {
        for (c, channel) in channels.iter_mut().enumerate() {
            channel.scale = Some(params.at(c).0);
        }
    }
    channels.iter().all(|c| c.min.is_finite() && c.max.is_finite()).then_some(channels)
}
