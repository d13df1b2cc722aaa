//! Ops of ONNX's first versions, which converters of Core ML and Caffe2 wrote, and which runtimes still take at any opset;
//! and how ops that there still are were written before opset 7.

use super::{compose::Result, lengths, ml::constants};
use crate::{
    OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::{SliceSpec, UnaryKind},
};

/// The second operand of a function of two in the shape in which it broadcasts. Before opset 7 it does so only where the
/// attribute `broadcast` says it: its dimensions are those of the first operand from `axis` on, the last ones where there is
/// none.
pub(super) fn aligned(node: &mut Node<'_, '_>, a: ValueId, b: ValueId) -> Result<ValueId> {
    if node.opset() >= 7 {
        return Ok(b);
    }
    let (broadcasts, axis) = (node.flag("broadcast", false)?, node.optional_int("axis")?);
    let (of, own) = (node.shape(a), node.shape(b));
    let misfit = || OpError::shape(format!("{} does not broadcast to {}", node.ty(b), node.ty(a)));
    let start = match axis.filter(|_| broadcasts) {
        Some(axis) => usize::try_from(if axis < 0 { axis + of.rank() as i64 } else { axis }).ok(),
        None => of.rank().checked_sub(own.rank()),
    };
    let behind = start.and_then(|start| of.rank().checked_sub(start + own.rank())).ok_or_else(misfit)?;
    if !broadcasts && of != own {
        let why = format!("is not 1, and {} is not {}", node.ty(b), node.ty(a));
        return Err(NodeError::attribute("broadcast", why));
    }
    let dims: Vec<usize> = own.iter().copied().chain(std::iter::repeat_n(1, behind)).collect();
    match own.elements() {
        // Scalars of any rank.
        1 => node.shaped("aligned", [0; 0], b),
        _ => node.shaped("aligned", dims, b),
    }
}

/// A slope of PRelu in the shape in which it broadcasts: before opset 7, one for each channel.
pub(super) fn slope_of_channels(node: &mut Node<'_, '_>, x: ValueId, slope: ValueId) -> Result<ValueId> {
    let (of, own) = (node.shape(x), node.shape(slope));
    match own.dims() {
        &[n] if node.opset() < 7 && of.rank() > 1 && n == of[1] => {
            let dims: Vec<usize> = [n].into_iter().chain(std::iter::repeat_n(1, of.rank() - 2)).collect();
            node.shaped("slope_of_channels", dims, slope)
        }
        _ => Ok(slope),
    }
}

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
