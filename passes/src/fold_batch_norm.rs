//! Batch norms with fixed statistics become part of the weights before or after them, or a multiplication and an
//! addition.

use crate::{
    ChannelStatistics, Context, Pass, PassError, Record,
    affine::{Affine, fold_into_consumer, fold_into_producer},
    edit::{add_f32, f32_constant, live_op, replace},
};
use qcc_ir::{
    Graph, NodeId, Op, Shape, ValueId,
    ops::{BatchNorm, Binary, BinaryKind, Reshape, Unary, UnaryKind},
};

/// See the module.
pub(crate) const FOLD_BATCH_NORM: Pass = Pass { name: "fold_batch_norm", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(Op::BatchNorm(bn)) = live_op(graph, node).cloned() else {
            continue;
        };
        let name = graph.node(node).name.clone();
        let operands = graph.operands(node);
        let statistics: Option<Vec<&[f32]>> = operands[1..].iter().map(|&v| f32_constant(graph, v)).collect();
        let Some(statistics) = statistics else {
            compute(graph, node, &bn)?;
            record.declined(&name, "its parameters are not constant: it is computed from them");
            continue;
        };
        let affine = affine_of(&bn, &statistics);
        let behind = statistics_behind(&name, &bn, &statistics);
        if ctx.options.pin(graph, node).is_some() {
            to_affine(graph, node, operands[0], bn.axis, affine)?;
            record.declined(&name, "pinned to a device: became a multiplication and an addition");
            continue;
        }
        // Its result is that of the op before it from then on, or of an addition of its own name, or part of what is behind it.
        let folded = match fold_into_producer(graph, operands[0], &affine)? {
            Ok(into) => {
                let text = format!("folded into `{into}` before it");
                ctx.batch_norms.borrow_mut().insert(into, behind.clone());
                Ok(text)
            }
            Err(before) => match fold_into_consumer(graph, node.out(), &affine)? {
                Ok(into) => Ok(format!("folded into `{into}` after it")),
                Err(after) => Err(format!("before: {before}; after: {after}")),
            },
        };
        match folded {
            Ok(text) => {
                replace(graph, node, operands[0])?;
                record.applied(&name, text);
            }
            Err(why) => {
                to_affine(graph, node, operands[0], bn.axis, affine)?;
                ctx.batch_norms.borrow_mut().insert(name.clone(), behind);
                record.declined(&name, format!("became a multiplication and an addition ({why})"));
            }
        }
    }
    Ok(())
}

/// How far means and variances of a batch norm of many channels may all be from those of initialisation: some steps with a small
/// momentum are no training, and no trained batch norm is so near in every channel.
const UNTRAINED: f32 = 1e-2;
const MANY: usize = 8;

/// Statistics as they are initialised: mean 0 and variance 1 in every channel, or nearly so where there are many channels.
pub(crate) fn is_never_updated(mean: &[f32], variance: &[f32]) -> bool {
    let most = if mean.len() >= MANY { UNTRAINED } else { 1e-6 };
    mean.iter().all(|m| m.abs() < most) && variance.iter().all(|v| (v - 1.0).abs() < most)
}

/// factor = γ/√(σ² + ε), shift = β − μ·factor, in f64.
pub(crate) fn affine_of(bn: &BatchNorm, statistics: &[&[f32]]) -> Affine {
    let [scale, bias, mean, variance] = [0, 1, 2, 3].map(|i| statistics[i].iter().map(|&x| f64::from(x)));
    let factor: Vec<f64> = scale.zip(variance).map(|(g, v)| g / (v + f64::from(bn.epsilon)).sqrt()).collect();
    let shift = bias.zip(mean).zip(&factor).map(|((b, m), f)| b - m * f).collect();
    Affine { axis: Some(bn.axis), factor, shift }
}

/// The distribution behind a batch norm on what the model was trained on.
fn statistics_behind(name: &str, bn: &BatchNorm, parameters: &[&[f32]]) -> ChannelStatistics {
    let [scale, bias, mean, variance] = [0, 1, 2, 3].map(|i| parameters[i]);
    let epsilon = f64::from(bn.epsilon);
    let stabiliser = |(g, v): (&f32, &f32)| f64::from(*g).powi(2) * epsilon / (f64::from(*v) + epsilon);
    ChannelStatistics {
        axis: bn.axis,
        mean: bias.iter().map(|&b| b.into()).collect(),
        deviation: scale.iter().map(|&g| f64::from(g).abs()).collect(),
        stabiliser: scale.iter().zip(variance).map(stabiliser).collect(),
        batch_norm: name.into(),
        is_trained: !is_never_updated(mean, variance),
    }
}

/// The node as x·factor + shift. The addition keeps the node's name.
fn to_affine(
    graph: &mut Graph,
    node: NodeId,
    x: ValueId,
    axis: usize,
    affine: Affine,
) -> Result<(), PassError> {
    let name = graph.node(node).name.clone();
    let mut dims = vec![1; graph.shape(x).rank() - axis];
    dims[0] = affine.factor.len();
    let narrow = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect();
    let factor = add_f32(graph, &format!("{name}_factor"), &dims, narrow(affine.factor))?;
    let shift = add_f32(graph, &format!("{name}_shift"), &dims, narrow(affine.shift))?;
    let scaled = graph.add(&format!("{name}_scaled"), Binary { kind: BinaryKind::Mul }, &[x, factor])?;
    graph.rewrite(node, Binary { kind: BinaryKind::Add }, &[scaled.out(), shift])?;
    graph.remove_dead();
    Ok(())
}

/// The node as the ops of its definition, for parameters that are only known when the model runs.
fn compute(graph: &mut Graph, node: NodeId, bn: &BatchNorm) -> Result<(), PassError> {
    let name = graph.node(node).name.clone();
    let [x, scale, bias, mean, variance] = graph.operands(node)[..] else {
        return Ok(());
    };
    let mut dims = vec![1; graph.shape(x).rank() - bn.axis];
    dims[0] = graph.shape(x)[bn.axis];
    let shape = Shape::new(dims).map_err(|e| PassError::op(&name, "BatchNorm", e.into()))?;
    let mut broadcast = [scale, bias, mean, variance];
    for (v, what) in broadcast.iter_mut().zip(["scale", "bias", "mean", "variance"]) {
        let reshape = Reshape { shape: shape.clone() };
        *v = graph.add(&format!("{name}_{what}"), reshape, &[*v])?.out();
    }
    let [scale, bias, mean, variance] = broadcast;
    let binary = |graph: &mut Graph, what: &str, kind, a, b| {
        graph.add(&format!("{name}_{what}"), Binary { kind }, &[a, b]).map(NodeId::out)
    };
    let epsilon = add_f32(graph, &format!("{name}_epsilon"), &[], vec![bn.epsilon])?;
    let variance = binary(graph, "stabilised", BinaryKind::Add, variance, epsilon)?;
    let deviation =
        graph.add(&format!("{name}_deviation"), Unary { kind: UnaryKind::Sqrt }, &[variance])?.out();
    let centred = binary(graph, "centred", BinaryKind::Sub, x, mean)?;
    let normal = binary(graph, "normal", BinaryKind::Div, centred, deviation)?;
    let scaled = binary(graph, "scaled", BinaryKind::Mul, normal, scale)?;
    graph.rewrite(node, Binary { kind: BinaryKind::Add }, &[scaled, bias])?;
    Ok(())
}
