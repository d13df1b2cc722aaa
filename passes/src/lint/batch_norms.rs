//! Batch norms whose parameters look wrong. It runs while they are ops of their own.

use super::{Finding, Rule, Subject, channels};
use crate::{
    Context, Pass, PassError, Record,
    affine::Parameters,
    edit::f32_constant,
    fold_batch_norm::{affine_of, is_never_updated},
};
use qcc_ir::{Graph, NodeId, Op, ops::BatchNorm};

/// See the module.
pub(crate) const LINT_BATCH_NORMS: Pass = Pass { name: "lint_batch_norms", run };

/// A factor that no trained channel has: the largest of sound networks are between 50 and 150.
const HUGE_FACTOR: f64 = 1e3;
/// How far above those of most channels (three quarters of them) a gain is that goes with such a factor: where all are as
/// large, the network computes with small numbers.
const ABOVE_OTHERS: f64 = 10.0;
/// How far it is above them to be out of proportion whatever the factor. In sound networks channels are up to 40 times the median.
const FAR_ABOVE_OTHERS: f64 = 100.0;
/// Channels below this share of the largest gain are dead, and no measure.
const NOTHING: f64 = 1e-6;
/// Names in one message.
const MOST_NAMES: usize = 8;

const REESTIMATE: &str = "recompute the statistics from samples (--reestimate-bn with --calibrate), and mend the training: \
     statistics move only in training mode and with a momentum above 0 (TensorFlow 1: run UPDATE_OPS with each step)";

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let mut stale = Vec::new();
    let mut seen = 0;
    for node in graph.order() {
        let Some(Op::BatchNorm(bn)) = graph.op(node) else { continue };
        let operands = graph.operands(node);
        let parameters: Option<Vec<&[f32]>> = operands[1..].iter().map(|&v| f32_constant(graph, v)).collect();
        let Some(parameters) = parameters else { continue };
        let name = &graph.node(node).name;
        seen += 1;
        if is_never_updated(parameters[2], parameters[3]) {
            stale.push(name.clone());
        } else {
            not_finite(name, bn, &parameters, ctx, record);
            exploding(graph, node, bn, &parameters, ctx, record);
        }
    }
    if !stale.is_empty() && stale.len() == seen {
        let what = format!(
            "mean 0 and variance 1 in every batch norm ({}): the statistics were never updated",
            listed(&stale)
        );
        ctx.find(Finding::new(Rule::BatchNormNeverUpdated, Subject::Model, what, REESTIMATE), record);
        return Ok(());
    }
    for name in stale {
        let what = "a batch norm with mean 0 and variance 1 in every channel, unlike others of the model: its statistics were \
                    never updated";
        ctx.find(Finding::new(Rule::BatchNormNeverUpdated, Subject::Node(name), what, REESTIMATE), record);
    }
    Ok(())
}

/// The first names, and how many more there are.
fn listed(names: &[String]) -> String {
    let first = names.iter().take(MOST_NAMES).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(MOST_NAMES) {
        None | Some(0) => first,
        Some(more) => format!("{first} and {more} more"),
    }
}

fn not_finite(name: &str, bn: &BatchNorm, parameters: &[&[f32]], ctx: &Context<'_>, record: &mut Record) {
    let variance = parameters[3];
    let affine = affine_of(bn, parameters);
    let negative = variance.iter().filter(|v| v.is_sign_negative() && **v != 0.0 || **v + bn.epsilon <= 0.0);
    let broken = affine.factor.iter().zip(&affine.shift).filter(|(f, s)| !f.is_finite() || !s.is_finite());
    for (bad, what) in [
        (negative.count(), "a variance that is not positive"),
        (broken.count(), "a factor or shift that is not finite"),
    ] {
        if bad > 0 {
            let finding = Finding::new(
                Rule::BatchNormNotFinite,
                Subject::Node(name.into()),
                format!("{} {what}", channels(bad, variance.len())),
                "take a checkpoint from before the training diverged, or recompute the statistics (--reestimate-bn)",
            );
            ctx.find(finding, record);
        }
    }
}

/// Channels that are amplified beyond all others. Where the product before it is known, its weights count: a filter of next to
/// nothing may have a variance of next to nothing.
fn exploding(
    graph: &Graph,
    node: NodeId,
    bn: &BatchNorm,
    parameters: &[&[f32]],
    ctx: &Context<'_>,
    record: &mut Record,
) {
    let factors = affine_of(bn, parameters).factor;
    if factors.iter().any(|f| !f.is_finite()) {
        return;
    }
    let weights = largest_weights(graph, node).filter(|w| w.len() == factors.len());
    let gains: Vec<f64> = match &weights {
        Some(largest) => factors.iter().zip(largest).map(|(f, w)| f.abs() * w).collect(),
        None => factors.iter().map(|f| f.abs()).collect(),
    };
    let most = gains.iter().copied().fold(0.0, f64::max);
    let mut sorted: Vec<f64> = gains.iter().copied().filter(|g| *g > NOTHING * most).collect();
    sorted.sort_by(f64::total_cmp);
    let Some(&usual) = sorted.get(sorted.len().saturating_sub(1) * 3 / 4) else { return };
    let is_huge = |c: usize| factors[c].abs() > HUGE_FACTOR && gains[c] > ABOVE_OTHERS * usual;
    let is_above = |c: usize| gains[c] > FAR_ABOVE_OTHERS * usual;
    let found: Vec<usize> = (0..gains.len()).filter(|&c| is_huge(c) || is_above(c)).collect();
    let Some(&worst) = found.iter().max_by(|&&a, &&b| gains[a].total_cmp(&gains[b])) else { return };
    let what = format!(
        "{} a gain out of all proportion: channel {worst} is multiplied by {:.3e} for its variance of {:.3e}, and with its weights comes to {:.0} times what three quarters of the channels do",
        channels(found.len(), gains.len()),
        factors[worst],
        parameters[3][worst],
        gains[worst] / usual
    );
    let advice = "recompute the statistics (--reestimate-bn); if it stays, look for a channel that hardly ever fires, or train with a \
                  larger epsilon";
    ctx.find(
        Finding::new(Rule::BatchNormExploding, Subject::Node(graph.node(node).name.clone()), what, advice),
        record,
    );
}

/// The largest magnitude of the weights of each channel of the product before a batch norm, if there is one.
fn largest_weights(graph: &Graph, node: NodeId) -> Option<Vec<f64>> {
    let parameters = Parameters::of(graph, graph.operand(node, 0).node).ok()?;
    let mut largest = vec![0f64; parameters.bias().len()];
    for (i, &w) in parameters.weights().iter().enumerate() {
        let (out, _) = parameters.channels(i);
        largest[out] = largest[out].max(f64::from(w).abs());
    }
    Some(largest)
}
