//! Normalisations.

use crate::{
    OpError, Shape, ValueId,
    onnx::{NodeError, import::Node},
    ops::{BatchNorm, Layout, Lrn, Reshape, Softmax},
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
    softmax_like(node, false)
}

pub(super) fn log_softmax(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    softmax_like(node, true)
}

/// Before opset 13 the operand counts as a matrix: all dimensions from `axis` on are one.
fn softmax_like(node: &mut Node<'_, '_>, log: bool) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let shape = node.shape(x);
    let coerces = node.opset() < 13;
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
