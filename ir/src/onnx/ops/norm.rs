//! Normalisations.

use crate::{
    OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        BatchNorm, Binary, BinaryKind, Layout, Lrn, Reduce, ReduceKind, Reshape, Softmax, Unary, UnaryKind,
    },
};

pub(super) fn batch_normalization(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let roles = ["X", "scale", "B", "mean", "var"];
    let mut operands = Vec::with_capacity(roles.len());
    for (slot, role) in roles.into_iter().enumerate() {
        operands.push(node.operand(slot, role)?);
    }
    // How fast training moves the statistics.
    node.ignore(&["momentum"]);
    let epsilon = node.float("epsilon", 1e-5)?;
    if node.opset() < 9 && !node.flag("spatial", true)? {
        return Err(NodeError::attribute("spatial", "is 0: statistics of each element are not supported"));
    }
    let trains = node.opset() >= 14 && node.flag("training_mode", false)?;
    if trains || (1..node.results()).any(|port| node.wants(port)) {
        let why = "computes statistics of the batch, as in training; export the model in inference mode";
        return Err(OpError::unsupported(why).into());
    }
    node.emit(BatchNorm { epsilon, axis: 1 }, &operands)
}

/// (x − mean)/√(variance + epsilon)·scale + bias, mean and variance of all axes from `axis` on: in these steps, each in
/// the type of x, whatever `stash_type` says of the first ones.
pub(super) fn layer_normalization(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, scale) = (node.operand(0, "X")?, node.operand(1, "Scale")?);
    let bias = node.optional(2);
    node.ignore(&["stash_type"]);
    let epsilon = node.float("epsilon", 1e-5)?;
    let shape = node.shape(x);
    let axis = node.int("axis", -1)?;
    let first = shape
        .axis(axis)
        .ok_or_else(|| NodeError::attribute("axis", format!("is {axis} for {}", node.ty(x))))?;
    if (1..node.results()).any(|port| node.wants(port)) {
        return Err(OpError::unsupported("gives out mean or deviation, as for training").into());
    }
    for v in [scale].into_iter().chain(bias) {
        if shape.broadcast(&node.shape(v)).as_ref() != Some(&shape) {
            return Err(OpError::shape(format!("{} does not broadcast to {}", node.ty(v), node.ty(x))).into());
        }
    }
    let binary = |kind| Binary { kind };
    let mean = || Reduce { kind: ReduceKind::Mean, axes: (first..shape.rank()).collect(), keep_dims: true };
    let centre = node.emit_part("mean", mean(), &[x])?;
    let centred = node.emit_part("centred", binary(BinaryKind::Sub), &[x, centre])?;
    let squares = node.emit_part("squares", binary(BinaryKind::Mul), &[centred, centred])?;
    let variance = node.emit_part("variance", mean(), &[squares])?;
    let epsilon = node.constant_part("epsilon", Tensor::scalar(epsilon));
    let variance = node.emit_part("above_zero", binary(BinaryKind::Add), &[variance, epsilon])?;
    let deviation = node.emit_part("deviation", Unary { kind: UnaryKind::Sqrt }, &[variance])?;
    let y = node.emit_part("normalised", binary(BinaryKind::Div), &[centred, deviation])?;
    match bias {
        None => node.emit(binary(BinaryKind::Mul), &[y, scale]),
        Some(bias) => {
            let y = node.emit_part("scaled", binary(BinaryKind::Mul), &[y, scale])?;
            node.emit(binary(BinaryKind::Add), &[y, bias])
        }
    }
}

pub(super) fn lrn(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    let size = node.int("size", 0)?;
    let size = usize::try_from(size)
        .ok()
        .filter(|&s| s > 0)
        .ok_or_else(|| NodeError::attribute("size", format!("is {size} or missing")))?;
    let (alpha, beta) = (node.float("alpha", 1e-4)?, node.float("beta", 0.75)?);
    let bias = node.float("bias", 1.0)?;
    node.emit(Lrn { size, alpha, beta, bias, layout: Layout::ChannelsFirst }, &[x])
}

pub(super) fn softmax(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let coerces = node.opset() < 13;
    softmax_of(node, x, false, coerces)
}

pub(super) fn log_softmax(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let coerces = node.opset() < 13;
    softmax_of(node, x, true, coerces)
}

/// Before opset 13 the operand counts as a matrix (`coerces`): all dimensions from `axis` on are one.
pub(super) fn softmax_of(
    node: &mut Node<'_, '_>,
    x: ValueId,
    log: bool,
    coerces: bool,
) -> Result<ValueId, NodeError> {
    let shape = node.shape(x);
    let axis = node.int("axis", if coerces { 1 } else { -1 })?;
    let last = shape.rank().checked_sub(1);
    let at = match shape.axis(axis) {
        Some(at) => at,
        // A matrix of one column.
        None if coerces && axis == shape.rank() as i64 => shape.rank(),
        None => return Err(NodeError::attribute("axis", format!("is {axis} for {}", node.ty(x)))),
    };
    if !coerces || Some(at) == last {
        return node.emit(Softmax { axis: at, log }, &[x]);
    }
    let rows = shape[..at].iter().product::<usize>();
    let columns = shape[at..].iter().product::<usize>();
    let matrix = node.emit_part("matrix", Reshape { shape: Shape::new([rows, columns])? }, &[x])?;
    let y = node.emit_part("rows", Softmax { axis: 1, log }, &[matrix])?;
    node.emit(Reshape { shape }, &[y])
}
