//! Ops that ONNX Runtime's optimiser writes in place of several of ONNX's: put together again from what they stand for.

use super::{compose::Result, conv, norm};
use crate::{
    OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::UnaryKind,
};

/// A convolution, what is added to it, and an activation.
pub(super) fn conv(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let (bias, added) = (node.optional(2), node.optional(3));
    let mut y = conv::convolution(node, x, w, bias)?;
    if let Some(added) = added {
        y = node.add("sum", y, added)?;
    }
    activation(node, y)
}

/// The attributes `activation` and `activation_params`.
fn activation(node: &mut Node<'_, '_>, y: ValueId) -> Result<ValueId> {
    let name = node.string("activation", "")?;
    let parameters = node.floats("activation_params")?.unwrap_or_default();
    let parameter = |i: usize, default: f32| parameters.get(i).copied().unwrap_or(default);
    let kind = match name {
        "" => return Ok(y),
        "Relu" => UnaryKind::Relu,
        "Tanh" => UnaryKind::Tanh,
        "Sigmoid" => UnaryKind::Sigmoid,
        "LeakyRelu" => UnaryKind::LeakyRelu { alpha: parameter(0, 0.01) },
        "Clip" => UnaryKind::Clip { lo: parameter(0, f32::NEG_INFINITY), hi: parameter(1, f32::INFINITY) },
        "HardSigmoid" => UnaryKind::HardSigmoid { alpha: parameter(0, 0.2), beta: parameter(1, 0.5) },
        other => return Err(NodeError::attribute("activation", format!("is {other:?}"))),
    };
    node.unary("activation", kind, y)
}

/// alpha·A'·B', of which the last two dimensions are exchanged where the attributes say so.
pub(super) fn matmul(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let (a_swapped, b_swapped) = (node.flag("transA", false)?, node.flag("transB", false)?);
    if node.flag("transBatchA", false)? || node.flag("transBatchB", false)? {
        return Err(OpError::unsupported("exchanges batch and rows of its operands").into());
    }
    let alpha = node.float("alpha", 1.0)?;
    let a = swapped(node, "A_transposed", a, a_swapped)?;
    let b = swapped(node, "B_transposed", b, b_swapped)?;
    if alpha == 1.0 {
        return node.product("", a, b);
    }
    let y = node.product("product", a, b)?;
    let alpha = node.number("alpha", alpha.into(), node.ty(y).dtype)?;
    node.mul("", y, alpha)
}

fn swapped(node: &mut Node<'_, '_>, part: &str, x: ValueId, swaps: bool) -> Result<ValueId> {
    let rank = node.shape(x).rank();
    if !swaps || rank < 2 {
        return Ok(x);
    }
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 1, rank - 2);
    node.permuted(part, perm, x)
}

/// The function of x and a bias, where there is one.
fn biased(node: &mut Node<'_, '_>, kind: UnaryKind) -> Result<ValueId> {
    let x = node.operand(0, "A")?;
    let x = match node.optional(1) {
        None => x,
        Some(bias) => node.add("biased", x, bias)?,
    };
    node.unary("", kind, x)
}

pub(super) fn gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.unary("", UnaryKind::Gelu, x)
}

pub(super) fn bias_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    biased(node, UnaryKind::Gelu)
}

pub(super) fn fast_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    biased(node, UnaryKind::GeluTanh)
}

/// x·sigmoid(alpha·x).
pub(super) fn quick_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    let alpha = node.float("alpha", 1.702)?;
    let alpha = node.number("alpha", alpha.into(), node.ty(x).dtype)?;
    let scaled = node.mul("scaled", x, alpha)?;
    let gate = node.unary("gate", UnaryKind::Sigmoid, scaled)?;
    node.mul("", x, gate)
}

/// A layer normalisation of a sum, which is the fourth result.
pub(super) fn skip_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, skip) = (node.operand(0, "input")?, node.operand(1, "skip")?);
    let (gamma, beta, bias) = (node.operand(2, "gamma")?, node.optional(3), node.optional(4));
    let sum = skipped(node, x, skip, bias)?;
    let normalised = norm::layer_of(node, sum, gamma, beta)?;
    Ok(with_sum(normalised, sum))
}

/// The same without the mean and a shift.
pub(super) fn skip_simplified_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, skip) = (node.operand(0, "input")?, node.operand(1, "skip")?);
    let (gamma, bias) = (node.operand(2, "gamma")?, node.optional(3));
    let sum = skipped(node, x, skip, bias)?;
    let y = norm::rms_of(node, sum, gamma)?;
    Ok(with_sum(vec![y], sum))
}

fn skipped(node: &mut Node<'_, '_>, x: ValueId, skip: ValueId, bias: Option<ValueId>) -> Result<ValueId> {
    if (1..3).any(|port| node.wants(port)) {
        return Err(OpError::unsupported("gives out mean or deviation, as for training").into());
    }
    let sum = node.add("sum", x, skip)?;
    match bias {
        None => Ok(sum),
        Some(bias) => node.add("biased_sum", sum, bias),
    }
}

/// Results 0 and 3; those between them are not asked for.
fn with_sum(normalised: Vec<ValueId>, sum: ValueId) -> Vec<ValueId> {
    let y = normalised.first().copied().unwrap_or(sum);
    vec![y, y, y, sum]
}
