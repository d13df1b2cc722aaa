//! What batch norms say about the values behind them, and how to make noise look like it: calibration without data.

use crate::{
    PassError,
    affine::Affine,
    edit::{Product, add_f32, has_weights},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, Use, ValueId,
    ops::{Binary, BinaryKind, Clamp, Reduce, ReduceKind, Slice, SliceSpec, Unary, UnaryKind},
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

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
    /// What of the square of the deviation is not from data but from the batch norm's epsilon: γ²·ε/(σ² + ε). All of it in
    /// channels that are dead.
    pub stabiliser: Vec<f64>,
    /// The name of the batch norm.
    pub batch_norm: String,
    /// Whether its statistics are others than those of initialisation.
    pub is_trained: bool,
}

impl ChannelStatistics {
    /// Those of factor·x + shift.
    pub(crate) fn then(&mut self, affine: &Affine) {
        let of = |values: &[f64], c: usize| values[if affine.axis.is_some() { c } else { 0 }];
        let moments = self.mean.iter_mut().zip(&mut self.deviation).zip(&mut self.stabiliser);
        for (c, ((mean, deviation), stabiliser)) in moments.enumerate() {
            let factor = of(&affine.factor, c);
            *mean = *mean * factor + of(&affine.shift, c);
            *deviation *= factor.abs();
            *stabiliser *= factor * factor;
        }
    }
}

/// Elements of a channel in a batch below which they say nothing of its distribution: then it stays as it is.
const FEWEST: usize = 16;
/// The share of the variance of a channel that is between pictures; the rest is within one. Without it an average over all
/// pixels would be the same for every picture, and so would be all that is computed of it.
const BETWEEN: f32 = 0.5;
/// The least variance that is divided by: that of channels in which nothing varies.
const LEAST_VARIANCE: f32 = 1e-12;

/// A prepared float graph whose values are as they were in training, whatever its input: where a value was that of a batch
/// norm, each channel of what is computed is brought to the mean and deviation that the batch norm gave it. That is the
/// batch norm in training mode, over the samples and pixels of one batch, for what was folded; the residual and the clamp
/// that became part of the op before it come after it again. Half of the variance is made that of pictures as a whole, by
/// the value that the channel has at one pixel: for z of mean 0 and deviation 1,
///
/// ```text
/// β + |γ|·(√½·z + √½·z[middle])
/// ```
///
/// The map tells for values of the graph which value of the new one stands for them; those that are missing in it are
/// their own. None stands for the results of the last products with weights: how far scores go is a matter of features that
/// speak for the same class at once, of which batch norms say nothing, so they had better get no range. The map is empty where
/// no batch norm says anything.
///
/// Ranges that are found on it are those of real inputs as far as first and second moments make them: all layers but the
/// first see those of the training data. (Statistics of batch norms instead of data: Nagel et al., "Data-free quantization
/// through weight equalization and bias correction", ICCV 2019; Cai et al., "ZeroQ", CVPR 2020, which search for inputs that
/// have them.)
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn renormalised(
    graph: &Graph,
    statistics: &BTreeMap<String, ChannelStatistics>,
) -> Result<(Graph, BTreeMap<ValueId, Option<ValueId>>), PassError> {
    let mut normal = graph.clone();
    let mut moved = BTreeMap::new();
    for (name, wanted) in statistics {
        let Some(node) = graph.find(name).filter(|&n| graph.op(n).is_some()) else { continue };
        let rank = graph.shape(node.out()).rank();
        let shape = graph.shape(node.out());
        let fits = wanted.axis < rank
            && shape[wanted.axis] == wanted.mean.len()
            && shape.elements() / wanted.mean.len().max(1) >= FEWEST;
        if fits && graph.op(node).is_some_and(|op| !matches!(op, Op::BatchNorm(_))) {
            moved.insert(node.out(), Some(renormalise(&mut normal, node, wanted)?));
        }
    }
    if !moved.is_empty() {
        let heads = graph.order().into_iter().filter(|&n| is_head(graph, n));
        heads.for_each(|n| _ = moved.entry(n.out()).or_default());
    }
    Ok((normal, moved))
}

/// Whether a node is a product with weights and none is behind it: what gives scores.
fn is_head(graph: &Graph, node: NodeId) -> bool {
    let is_product = |n: NodeId| Product::of(graph, n).is_some();
    let mut behind: Vec<NodeId> = graph.uses(node.out()).into_iter().map(|u| u.node).collect();
    let mut seen = BTreeSet::new();
    while let Some(next) = behind.pop() {
        if is_product(next) {
            return false;
        }
        if seen.insert(next) {
            let outputs = 0..graph.node(next).outputs().len() as u16;
            behind.extend(outputs.flat_map(|p| graph.uses(next.port(p))).map(|u| u.node));
        }
    }
    is_product(node) && has_weights(graph, node)
}

/// Brings the channels of what a node computes, before it adds a residual or clamps, to these statistics.
fn renormalise(graph: &mut Graph, node: NodeId, wanted: &ChannelStatistics) -> Result<ValueId, PassError> {
    let name = graph.node(node).name.clone();
    let value = node.out();
    let bare = Bare::of(graph, node)?;
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
    // One pixel stands for what an image has of a channel as a whole, beside what varies within the image.
    let pixel = |d: usize| match d == 0 || d == wanted.axis {
        true => SliceSpec { start: 0, len: shape[d], step: 1 },
        false => SliceSpec { start: shape[d] / 2, len: 1, step: 1 },
    };
    let offset = add("pixel", Slice { axes: (0..shape.rank()).map(pixel).collect() }.into(), &[scaled])?;
    let between = add_f32(graph, &format!("{name}_between"), &[], vec![BETWEEN.sqrt()])?;
    let within = add_f32(graph, &format!("{name}_within"), &[], vec![(1.0 - BETWEEN).sqrt()])?;
    let mut add = |what: &str, op: Op, operands: &[ValueId]| {
        graph.add(&format!("{name}_{what}"), op, operands).map(NodeId::out)
    };
    let offset = add("offset", binary(BinaryKind::Mul), &[offset, between])?;
    let texture = add("texture", binary(BinaryKind::Mul), &[scaled, within])?;
    let mixed = add("mixed", binary(BinaryKind::Add), &[texture, offset])?;
    let result = add("normal", binary(BinaryKind::Add), &[mixed, beta])?;
    bare.finish(graph, &name, result)
}

/// An op that computes what its batch norm made, and what it did behind it: adding a residual, and a clamp.
struct Bare {
    uses: Vec<Use>,
    /// Which outputs of the graph it is.
    results: Vec<usize>,
    residual: Option<ValueId>,
    clamp: Clamp,
}

impl Bare {
    /// Takes residual and clamp off a node.
    fn of(graph: &mut Graph, node: NodeId) -> Result<Bare, PassError> {
        let value = node.out();
        let outputs = graph.outputs().iter().enumerate();
        let results = outputs.filter(|(_, o)| o.value == value).map(|(i, _)| i).collect();
        let mut bare = Bare { uses: graph.uses(value), results, residual: None, clamp: Clamp::NONE };
        if let Some(mut product) = Product::of(graph, node) {
            let mut operands = graph.operands(node);
            if std::mem::replace(product.residual(), false) {
                bare.residual = operands.pop();
            }
            bare.clamp = std::mem::replace(product.clamp(), Clamp::NONE);
            graph.rewrite(node, product.op(), &operands)?;
        }
        Ok(bare)
    }

    /// Puts them behind a value, and lets who read the node read that.
    fn finish(self, graph: &mut Graph, name: &str, value: ValueId) -> Result<ValueId, PassError> {
        let mut result = value;
        if let Some(residual) = self.residual {
            let sum = Binary { kind: BinaryKind::Add };
            result = graph.add(&format!("{name}_sum"), sum, &[result, residual])?.out();
        }
        if !self.clamp.is_none() {
            let kind = UnaryKind::Clip { lo: self.clamp.lo, hi: self.clamp.hi };
            result = graph.add(&format!("{name}_clamped"), Unary { kind }, &[result])?.out();
        }
        for u in self.uses {
            graph.set_operand(u.node, u.slot.into(), result)?;
        }
        self.results.into_iter().for_each(|i| graph.set_output(i, result));
        Ok(result)
    }
}

/// A prepared graph that shows what its batch norms made, before residuals and clamps which became part of the same ops. The map has
/// the value for each of the statistics that fits the graph, and what stands for the result of the op.
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn behind_batch_norms(
    graph: &Graph,
    statistics: &BTreeMap<String, ChannelStatistics>,
) -> Result<(Graph, BTreeMap<String, [ValueId; 2]>), PassError> {
    let mut bare = graph.clone();
    let mut values = BTreeMap::new();
    for (name, of) in statistics {
        let Some(node) = graph.find(name).filter(|&n| graph.op(n).is_some()) else { continue };
        let shape = graph.shape(node.out());
        let fits = of.axis < shape.rank() && shape[of.axis] == of.mean.len() && shape.elements() > 0;
        if fits && graph.ty(node.out()).dtype == DType::F32 {
            let taken = Bare::of(&mut bare, node)?;
            let result = taken.finish(&mut bare, name, node.out())?;
            values.insert(name.clone(), [node.out(), result]);
        }
    }
    Ok((bare, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, calibrate::tests::Random, prepare};
    use qcc_ir::{
        Shape, Tensor, TensorType, interpreter,
        ops::{BatchNorm, Conv, Layout, Window},
    };

    #[test]
    fn channels_get_the_mean_and_deviation_of_their_batch_norm() {
        let mut random = Random(4);
        let mut graph = Graph::new("test");
        let x = graph.input("x", TensorType::f32(&[1, 2, 24, 24]).unwrap()).unwrap();
        let mut constant = |graph: &mut Graph, name: &str, dims: &[usize], of: &dyn Fn(f32) -> f32| {
            let n = dims.iter().product();
            add_f32(graph, name, dims, (0..n).map(|_| of(random.normal())).collect()).unwrap()
        };
        let w = constant(&mut graph, "w", &[3, 2, 1, 1], &|x| x);
        let conv = Conv {
            window: Window {
                kernel: vec![1; 2],
                strides: vec![1; 2],
                dilations: vec![1; 2],
                pads_begin: vec![0; 2],
                pads_end: vec![0; 2],
            },
            groups: 1,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
            layout: Layout::ChannelsFirst,
        };
        let conv = graph.add("conv", conv, &[x, w]).unwrap().out();
        let [gamma, beta, mean] =
            ["gamma", "beta", "mean"].map(|name| constant(&mut graph, name, &[3], &|x| 2.0 * x));
        let variance = constant(&mut graph, "variance", &[3], &|x| 1.0 + x * x);
        let bn = BatchNorm { axis: 1, epsilon: 1e-5 };
        let bn = graph.add("bn", bn, &[conv, gamma, beta, mean, variance]).unwrap().out();
        let y = graph.add("relu", Unary { kind: UnaryKind::Relu }, &[bn]).unwrap().out();
        graph.output("y", y);
        let (betas, gammas) = (f32_of(&graph, beta), f32_of(&graph, gamma));
        let report = prepare(&mut graph, &Options::default(), &mut |_, _| {}).unwrap();
        assert_eq!(report.batch_norms.keys().collect::<Vec<_>>(), ["conv"]);
        assert!(Product::of(&graph, conv.node).is_some_and(|mut p| !p.clamp().is_none()));
        let (mut normal, places) = renormalised(&graph, &report.batch_norms).unwrap();
        // What stands for it is behind the clamp; what the clamp takes has the moments.
        let clamped = places[&conv].unwrap();
        assert_ne!(clamped, conv);
        let before = normal.operand(clamped.node, 0);
        normal.output("before", before);
        let elements = (0..2 * 24 * 24).map(|_| 5.0 + 3.0 * random.normal()).collect();
        let input = Tensor::from_vec::<f32>(Shape::new([1, 2, 24, 24]).unwrap(), elements).unwrap();
        let found = interpreter::run(&normal, &[input]).unwrap();
        let before = found[1].to_f32().unwrap();
        for (c, channel) in before.chunks_exact(24 * 24).enumerate() {
            let n = channel.len() as f32;
            let mean = channel.iter().sum::<f32>() / n;
            let deviation = (channel.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
            // The picture as a whole is off by what one pixel of it is.
            let share = BETWEEN.sqrt();
            assert!((deviation / (gammas[c].abs() * (1.0 - BETWEEN).sqrt()) - 1.0).abs() < 1e-3);
            assert!((mean - betas[c]).abs() < 5.0 * share * gammas[c].abs(), "{mean} {}", betas[c]);
        }
        assert_eq!(found[0].to_f32().unwrap(), before.iter().map(|x| x.max(0.0)).collect::<Vec<_>>());
    }

    fn f32_of(graph: &Graph, value: ValueId) -> Vec<f32> {
        crate::edit::f32_constant(graph, value).unwrap().to_vec()
    }
}
