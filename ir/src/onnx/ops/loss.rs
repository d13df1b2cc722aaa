//! Losses.

use super::compose::Result;
use crate::{
    OpError, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{BinaryKind, GatherElements, Reduce, ReduceKind, Softmax, UnaryKind},
};

/// −x of the class that is the target, weighted.
pub(super) fn negative_log_likelihood(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    likelihood(node, x)
}

/// The same of LogSoftmax over the classes, which is the second result.
pub(super) fn softmax_cross_entropy(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let x = node.operand(0, "scores")?;
    let logarithms = node.emit_part("log_prob", Softmax { axis: 1, log: true }, &[x])?;
    Ok(vec![likelihood(node, logarithms)?, logarithms])
}

/// The loss of `[batch, classes, …]` and targets `[batch, …]`, with weights of classes, if there are any. Targets that are
/// to be ignored weigh nothing; the mean is one of weights.
fn likelihood(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
    let target = node.operand(1, "target")?;
    let weights = node.optional(2);
    node.check_float("the first operand", x)?;
    let ignored = node.optional_int("ignore_index")?;
    let (dtype, shape) = (node.ty(x).dtype, node.shape(x));
    let targets = node.shape(target);
    let fits = shape.rank() >= 2 && targets[..] == [&shape[..1], &shape[2..]].concat();
    if !fits {
        let why =
            format!("targets {} are not one for each of {} but its classes", node.ty(target), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let counts = match ignored {
        None => None,
        Some(ignored) => {
            let number = Tensor::scalar(ignored);
            let number = node.constant_part("ignored", number);
            let number = node.cast_to("ignored_target", node.ty(target).dtype, number)?;
            let is_ignored = node.binary("is_ignored", BinaryKind::Equal, target, number)?;
            Some(node.unary("counts", UnaryKind::Not, is_ignored)?)
        }
    };
    let class = match counts {
        None => target,
        Some(counts) => {
            let any = node.constant_part("any", Tensor::scalar(0i64));
            let any = node.cast_to("any_class", node.ty(target).dtype, any)?;
            node.chosen("class", counts, target, any)?
        }
    };
    let mut column = targets.to_vec();
    column.insert(1, 1);
    let class_column = node.shaped("class_column", column, class)?;
    let picked = node.emit_part("picked", GatherElements { axis: 1 }, &[x, class_column])?;
    let picked = node.shaped("likelihood", targets, picked)?;
    let mut loss = node.unary("loss", UnaryKind::Neg, picked)?;
    let mut weight = weights.map(|weights| node.gathered("weight", 0, weights, class)).transpose()?;
    if let Some(weight) = weight {
        loss = node.mul("weighted", loss, weight)?;
    }
    if let Some(counts) = counts {
        let none = node.number("none", 0.0, dtype)?;
        loss = node.chosen("counted", counts, loss, none)?;
        let counted = node.cast_to("counted_weight", dtype, counts)?;
        weight = Some(match weight {
            None => counted,
            Some(weight) => node.mul("weight_that_counts", weight, counted)?,
        });
    }
    let all = |kind| Reduce { kind, axes: (0..shape.rank() - 1).collect(), keep_dims: false };
    match (node.string("reduction", "mean")?, weight) {
        ("none", _) => Ok(loss),
        ("sum", _) => node.emit(all(ReduceKind::Sum), &[loss]),
        ("mean", None) => node.emit(all(ReduceKind::Mean), &[loss]),
        ("mean", Some(weight)) => {
            let sum = node.emit_part("sum", all(ReduceKind::Sum), &[loss])?;
            // Where all have one weight, it counts as often as there are targets.
            let weight = node.expanded("weights", node.shape(loss), weight)?;
            let total = node.emit_part("total_weight", all(ReduceKind::Sum), &[weight])?;
            node.div("", sum, total)
        }
        (other, _) => Err(NodeError::attribute("reduction", format!("is {other:?}"))),
    }
}
