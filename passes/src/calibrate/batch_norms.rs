//! What batch norms say about the values behind them, and how to make noise look like it: calibration without data.

use crate::{
    PassError,
    affine::Affine,
    edit::{Product, add_f32},
};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryKind, Clamp, Reduce, ReduceKind, Unary, UnaryKind},
};
use serde::Serialize;
use std::collections::BTreeMap;

/// The distribution of a value on the data that a model was trained on, as far as a batch norm tells it: behind one, each
/// channel has the mean β and the standard deviation |γ|.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ChannelStatistics {
    /// Axis of channels.
    pub axis: usize,
    /// Mean of each channel.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel.
    pub deviation: Vec<f64>,
}

impl ChannelStatistics {
    /// Those of factor·x + shift.
    pub(crate) fn then(&mut self, affine: &Affine) {
        let of = |values: &[f64], c: usize| values[if affine.axis.is_some() { c } else { 0 }];
        for (c, (mean, deviation)) in self.mean.iter_mut().zip(&mut self.deviation).enumerate() {
            *mean = *mean * of(&affine.factor, c) + of(&affine.shift, c);
            *deviation *= of(&affine.factor, c).abs();
        }
    }
}

/// The least variance that is divided by: that of channels in which nothing varies.
const LEAST_VARIANCE: f32 = 1e-12;

/// A prepared float graph whose values are as they were in training, whatever its input: where a value was that of a batch
/// norm, each channel of what is computed is brought to the mean and deviation that the batch norm gave it. That is the
/// batch norm in training mode, over the samples and pixels of one batch, for what was folded; the residual and the clamp
/// that became part of the op before it come after it again. Its values are compared to those of the graph by the map, from
/// values of the graph; those that are missing in it are their own.
///
/// Ranges that are found on it with noise are those of inputs unlike any noise, as all layers but the first few see the
/// first and second moments of the training data. (Statistics of batch norms instead of data: Nagel et al., "Data-free
/// quantization through weight equalization and bias correction", ICCV 2019; Cai et al., "ZeroQ", CVPR 2020, which search
/// for inputs that have them.)
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn renormalised(
    graph: &Graph,
    statistics: &BTreeMap<String, ChannelStatistics>,
) -> Result<(Graph, BTreeMap<ValueId, ValueId>), PassError> {
    let mut normal = graph.clone();
    let mut moved = BTreeMap::new();
    for (name, wanted) in statistics {
        let Some(node) = graph.find(name).filter(|&n| graph.op(n).is_some()) else { continue };
        let rank = graph.shape(node.out()).rank();
        let fits = wanted.axis < rank && graph.shape(node.out())[wanted.axis] == wanted.mean.len();
        if fits && graph.op(node).is_some_and(|op| !matches!(op, Op::BatchNorm(_))) {
            moved.insert(node.out(), renormalise(&mut normal, node, wanted)?);
        }
    }
    Ok((normal, moved))
}

/// Brings the channels of what a node computes, before it adds a residual or clamps, to these statistics.
fn renormalise(graph: &mut Graph, node: NodeId, wanted: &ChannelStatistics) -> Result<ValueId, PassError> {
    let name = graph.node(node).name.clone();
    let value = node.out();
    let uses = graph.uses(value);
    let results: Vec<usize> =
        graph.outputs().iter().enumerate().filter(|(_, o)| o.value == value).map(|(i, _)| i).collect();
    let (mut residual, mut clamp) = (None, Clamp::NONE);
    if let Some(mut product) = Product::of(graph, node) {
        let mut operands = graph.operands(node);
        if std::mem::replace(product.residual(), false) {
            residual = operands.pop();
        }
        clamp = std::mem::replace(product.clamp(), Clamp::NONE);
        graph.rewrite(node, product.op(), &operands)?;
    }
    let shape = graph.shape(value).clone();
    let axes: Vec<usize> = (0..shape.rank()).filter(|&d| d != wanted.axis).collect();
    let mut add = |what: &str, op: Op, operands: &[ValueId]| {
        graph.add(&format!("{name}_{what}"), op, operands).map(NodeId::out)
    };
    let binary = |kind| Op::from(Binary { kind });
    let mean =
        |axes: &[usize]| Op::from(Reduce { kind: ReduceKind::Mean, axes: axes.to_vec(), keep_dims: true });
    let average = add("mean", mean(&axes), &[value])?;
    let centred = add("centred", binary(BinaryKind::Sub), &[value, average])?;
    let square = add("square", binary(BinaryKind::Mul), &[centred, centred])?;
    let variance = add("variance", mean(&axes), &[square])?;
    let mut dims = vec![1; shape.rank()];
    dims[wanted.axis] = shape[wanted.axis];
    let narrow = |v: &[f64]| v.iter().map(|x| *x as f32).collect::<Vec<f32>>();
    let least = add_f32(graph, &format!("{name}_least"), &[], vec![LEAST_VARIANCE])?;
    let gamma = add_f32(graph, &format!("{name}_gamma"), &dims, narrow(&wanted.deviation))?;
    let beta = add_f32(graph, &format!("{name}_beta"), &dims, narrow(&wanted.mean))?;
    let mut add = |what: &str, op: Op, operands: &[ValueId]| {
        graph.add(&format!("{name}_{what}"), op, operands).map(NodeId::out)
    };
    let variance = add("stable", binary(BinaryKind::Add), &[variance, least])?;
    let deviation = add("deviation", Unary { kind: UnaryKind::Sqrt }.into(), &[variance])?;
    let factor = add("factor", binary(BinaryKind::Div), &[gamma, deviation])?;
    let scaled = add("scaled", binary(BinaryKind::Mul), &[centred, factor])?;
    let mut result = add("normal", binary(BinaryKind::Add), &[scaled, beta])?;
    if let Some(residual) = residual {
        result = add("sum", binary(BinaryKind::Add), &[result, residual])?;
    }
    if !clamp.is_none() {
        let kind = UnaryKind::Clip { lo: clamp.lo, hi: clamp.hi };
        result = add("clamped", Unary { kind }.into(), &[result])?;
    }
    for u in uses {
        graph.set_operand(u.node, u.slot.into(), result)?;
    }
    results.into_iter().for_each(|i| graph.set_output(i, result));
    Ok(result)
}
