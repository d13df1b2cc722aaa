//! Batch norms with fixed statistics become part of the weights before or after them, or a multiplication and an
//! addition.

use crate::{
    Context, Pass, PassError, Record,
    affine::{Affine, fold_into_consumer, fold_into_producer},
    edit::{add_f32, f32_constant, replace},
};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{BatchNorm, Binary, BinaryKind},
};

/// See the module.
pub(crate) const FOLD_BATCH_NORM: Pass = Pass { name: "fold_batch_norm", run };

/// Factors above this say that a variance is next to nothing; int8 weights would be all but one channel's.
const HUGE_FACTOR: f64 = 1e4;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let mut stale = Vec::new();
    let mut seen = 0;
    for node in graph.order() {
        let Some(Op::BatchNorm(bn)) = graph.op(node).cloned() else {
            continue;
        };
        let name = graph.node(node).name.clone();
        let operands = graph.operands(node);
        let statistics: Option<Vec<&[f32]>> = operands[1..].iter().map(|&v| f32_constant(graph, v)).collect();
        let Some(statistics) = statistics else {
            record.declined(&name, "its parameters are not constant");
            continue;
        };
        seen += 1;
        if is_stale(statistics[2], statistics[3]) {
            stale.push(name.clone());
        }
        let affine = affine_of(&bn, &statistics);
        lint(&name, &bn, statistics[3], &affine, record);
        if ctx.options.pin(graph, node).is_some() {
            to_affine(graph, node, operands[0], bn.axis, affine)?;
            record.declined(&name, "pinned to a device: became a multiplication and an addition");
            continue;
        }
        let folded = match fold_into_producer(graph, operands[0], &affine)? {
            Ok(into) => Ok(format!("folded into `{into}` before it")),
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
                record.declined(&name, format!("became a multiplication and an addition ({why})"));
            }
        }
    }
    if seen > 0 && stale.len() == seen {
        record.warning(
            &graph.name,
            format!(
                "running mean 0 and variance 1 in every batch norm ({}): the statistics were never updated; \
                 train with momentum or re-estimate them",
                stale.join(", ")
            ),
        );
    }
    Ok(())
}

/// Statistics as they are initialised: mean 0 and variance 1 in every channel.
fn is_stale(mean: &[f32], variance: &[f32]) -> bool {
    mean.iter().all(|m| m.abs() < 1e-6) && variance.iter().all(|v| (v - 1.0).abs() < 1e-6)
}

/// factor = γ/√(σ² + ε), shift = β − μ·factor, in f64.
fn affine_of(bn: &BatchNorm, statistics: &[&[f32]]) -> Affine {
    let [scale, bias, mean, variance] = [0, 1, 2, 3].map(|i| statistics[i].iter().map(|&x| f64::from(x)));
    let factor: Vec<f64> = scale.zip(variance).map(|(g, v)| g / (v + f64::from(bn.epsilon)).sqrt()).collect();
    let shift = bias.zip(mean).zip(&factor).map(|((b, m), f)| b - m * f).collect();
    Affine { axis: Some(bn.axis), factor, shift }
}

fn lint(name: &str, bn: &BatchNorm, variance: &[f32], affine: &Affine, record: &mut Record) {
    let count = |bad: usize, what: &str, record: &mut Record| {
        if bad > 0 {
            record.warning(name, format!("{bad} of {} channels have {what}", variance.len()));
        }
    };
    let negative = variance.iter().filter(|v| v.is_sign_negative() && **v != 0.0 || **v + bn.epsilon <= 0.0);
    count(negative.count(), "a variance that is not positive", record);
    let broken = affine.factor.iter().zip(&affine.shift).filter(|(f, s)| !f.is_finite() || !s.is_finite());
    count(broken.count(), "a factor or shift that is not finite", record);
    let huge = affine.factor.iter().filter(|f| f.is_finite() && f.abs() > HUGE_FACTOR);
    count(huge.count(), &format!("a factor above {HUGE_FACTOR}: a variance of next to nothing"), record);
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
