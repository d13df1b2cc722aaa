//! Batch norms get statistics of samples in the place of those that the model came with.

use crate::{
    ChannelMoments, Context, Pass, PassError, Record,
    edit::{add_f32, f32_constant},
};
use qcc_ir::{DType, Graph, NodeId, Op, ops::BatchNorm};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
pub(crate) const REESTIMATE_BATCH_NORMS: Pass = Pass { name: "reestimate_batch_norms", run };

/// Means and variances of what batch norms get on samples, by the names of their nodes in the model.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct BatchNormStatistics {
    /// Number of samples.
    pub samples: u64,
    /// Of each batch norm.
    pub batch_norms: BTreeMap<String, RunningStatistics>,
}

/// What a batch norm takes off and divides by.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RunningStatistics {
    /// The mean of each channel.
    pub mean: Vec<f32>,
    /// The variance of each channel, of all elements.
    pub variance: Vec<f32>,
}

impl From<&ChannelMoments> for RunningStatistics {
    fn from(moments: &ChannelMoments) -> RunningStatistics {
        let narrow = |v: &[f64]| v.iter().map(|x| *x as f32).collect();
        RunningStatistics { mean: narrow(moments.mean()), variance: narrow(&moments.variance()) }
    }
}

/// The batch norms of a model, at import, that depend on none of which the statistics are not known yet: whose inputs are as they
/// will be. None where all are known.
pub fn next_batch_norms(graph: &Graph, known: &BatchNormStatistics) -> Vec<NodeId> {
    let mut waiting: BTreeSet<NodeId> = BTreeSet::new();
    let mut next = Vec::new();
    for node in graph.order() {
        let is_unknown =
            parameters(graph, node).is_some() && !known.batch_norms.contains_key(&graph.node(node).name);
        let waits = graph.operands(node).iter().any(|v| waiting.contains(&v.node));
        if is_unknown && !waits {
            next.push(node);
        }
        if is_unknown || waits {
            waiting.insert(node);
        }
    }
    next
}

/// Gives the batch norms of a model these statistics, as far as they have any.
///
/// # Errors
/// Where the number of channels is another one.
pub fn set_statistics(graph: &mut Graph, statistics: &BatchNormStatistics) -> Result<(), PassError> {
    for node in graph.order() {
        let name = graph.node(node).name.clone();
        if let (Some(of), Some(_)) = (statistics.batch_norms.get(&name), parameters(graph, node)) {
            set(graph, node, &name, of)?;
        }
    }
    graph.remove_dead();
    Ok(())
}

fn set(graph: &mut Graph, node: NodeId, name: &str, of: &RunningStatistics) -> Result<(), PassError> {
    let mean = add_f32(graph, &format!("{name}_mean"), &[of.mean.len()], of.mean.clone())?;
    let variance = add_f32(graph, &format!("{name}_variance"), &[of.variance.len()], of.variance.clone())?;
    graph.set_operand(node, 3, mean)?;
    graph.set_operand(node, 4, variance)?;
    Ok(())
}

/// A batch norm of f32 whose statistics are constants, and these.
fn parameters(graph: &Graph, node: NodeId) -> Option<(BatchNorm, [&[f32]; 2])> {
    let Some(Op::BatchNorm(bn)) = graph.op(node) else { return None };
    let operands = graph.operands(node);
    let is_float = graph.ty(operands[0]).dtype == DType::F32 && graph.constant_value(operands[0]).is_none();
    let statistics = [f32_constant(graph, operands[3])?, f32_constant(graph, operands[4])?];
    is_float.then(|| (bn.clone(), statistics))
}

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let Some(statistics) = &ctx.options.statistics else { return Ok(()) };
    for node in graph.order() {
        if !matches!(graph.op(node), Some(Op::BatchNorm(_))) {
            continue;
        }
        let name = graph.node(node).name.clone();
        let Some((bn, [mean, variance])) = parameters(graph, node) else {
            record.declined(&name, "its statistics are computed by the model");
            continue;
        };
        let Some(of) = statistics.batch_norms.get(&name) else {
            record.declined(&name, "it did not run on the samples");
            continue;
        };
        let distance = distance(&bn, [mean, variance], of);
        set(graph, node, &name, of)?;
        let text = format!(
            "mean and variance of {} samples, {distance:.3} nats a channel from those that it had",
            statistics.samples
        );
        record.applied(&name, text);
    }
    graph.remove_dead();
    Ok(())
}

/// How far the distribution on the samples is from the one that a batch norm had: see [`divergence`](crate::lint::divergence), without
/// a bound.
fn distance(bn: &BatchNorm, [mean, variance]: [&[f32]; 2], of: &RunningStatistics) -> f64 {
    let epsilon = f64::from(bn.epsilon);
    let channels = mean.iter().zip(variance).zip(of.mean.iter().zip(&of.variance));
    let each = channels.map(|((m, v), (seen_m, seen_v))| {
        let square = f64::from(*v) + epsilon;
        let ratio = (f64::from(*seen_v) + epsilon) / square;
        let shift = (f64::from(*seen_m) - f64::from(*m)).powi(2) / square;
        0.5 * (ratio + shift - 1.0 - ratio.ln())
    });
    each.sum::<f64>() / mean.len().max(1) as f64
}
