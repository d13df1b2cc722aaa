//! Ops of ONNX's first versions, which converters of Core ML and Caffe2 wrote, and which runtimes still take at any opset.

use super::{compose::Result, lengths, ml::constants};
use crate::{
    OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::{SliceSpec, UnaryKind},
};

/// A number of the operand's type that an attribute gives.
fn factor(node: &mut Node<'_, '_>, name: &'static str, default: f32, like: ValueId) -> Result<ValueId> {
    let value = node.float(name, default)?;
    node.number(name, value.into(), node.ty(like).dtype)
}

/// alpha·x + beta.
pub(super) fn affine(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    let (alpha, beta) = (factor(node, "alpha", 1.0, x)?, factor(node, "beta", 0.0, x)?);
    let y = node.mul("scaled", x, alpha)?;
    node.add("", y, beta)
}

/// scale·x.
pub(super) fn scale(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let scale = factor(node, "scale", 1.0, x)?;
    node.mul("", x, scale)
}

/// scale·x + bias, of each channel.
pub(super) fn image_scaler(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let scale = factor(node, "scale", 1.0, x)?;
    let bias = node.floats("bias")?.unwrap_or_default();
    let y = node.mul("scaled", x, scale)?;
    let bias = constants(node, "bias", [bias.len(), 1, 1], &bias, x)?;
    node.add("", y, bias)
}

/// alpha·ln(1 + e^(beta·x)).
pub(super) fn parametric_softplus(node: &mut Node<'_, '_>) -> Result<ValueId> {
    function_between(node, UnaryKind::Softplus)
}

/// alpha·tanh(beta·x).
pub(super) fn scaled_tanh(node: &mut Node<'_, '_>) -> Result<ValueId> {
    function_between(node, UnaryKind::Tanh)
}

fn function_between(node: &mut Node<'_, '_>, kind: UnaryKind) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let (alpha, beta) = (factor(node, "alpha", 1.0, x)?, factor(node, "beta", 1.0, x)?);
    let y = node.mul("scaled", x, beta)?;
    let y = node.unary("function", kind, y)?;
    node.mul("", y, alpha)
}

/// An image without a border, or the part of a size behind one: left, top, right and bottom.
pub(super) fn crop(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let border = lengths("border", &node.ints("border")?.unwrap_or_default())?;
    let scale = node.ints("scale")?.map(|s| lengths("scale", &s)).transpose()?;
    let shape = node.shape(x);
    let (&[_, _, height, width], &[left, top, right, bottom]) = (shape.dims(), &border[..]) else {
        return Err(NodeError::attribute("border", format!("is {border:?}, of {}", node.ty(x))));
    };
    let kept = match scale.as_deref() {
        Some(&[h, w]) => Some((h, w)),
        Some(_) => None,
        None => {
            height.checked_sub(top.saturating_add(bottom)).zip(width.checked_sub(left.saturating_add(right)))
        }
    };
    let fits = |(h, w): &(usize, usize)| {
        top.saturating_add(*h) <= height && left.saturating_add(*w) <= width && *h > 0 && *w > 0
    };
    let (h, w) = kept
        .filter(fits)
        .ok_or_else(|| OpError::shape(format!("border {border:?} and size {scale:?} of {}", node.ty(x))))?;
    let rows = node.sliced("rows", 2, SliceSpec { start: top, len: h, step: 1 }, x)?;
    node.sliced("", 3, SliceSpec { start: left, len: w, step: 1 }, rows)
}
