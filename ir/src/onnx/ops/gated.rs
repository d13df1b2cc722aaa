//! Norms, activations and sums with gates that ONNX Runtime writes in place of chains of ONNX's ops. They are computed in f32
//! and rounded to the type of their operands where their definitions say so.

use super::{compose::Result, contrib_attention::required_count};
use crate::{
    OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::{ReduceKind, UnaryKind},
};

/// x + y·gate, a gate for each row.
pub(super) fn gated_add(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, y) = (node.operand(0, "X")?, node.operand(1, "Y")?);
    let gate = node.operand(2, "gate")?;
    if !node.is_left_out(3) {
        return Err(OpError::unsupported(
            "projects its gate with gate_weight, which ONNX Runtime does on CUDA alone: multiply before the op",
        )
        .into());
    }
    let (shape, gates) = (node.shape(x), node.shape(gate));
    let rows = shape.split_last().map(|(_, rows)| [rows, &[1]].concat());
    if node.shape(y) != shape || rows.is_none_or(|rows| *gates != *rows) {
        let why = format!("{} and {} with gates {}", node.ty(x), node.ty(y), node.ty(gate));
        return Err(OpError::shape(why).into());
    }
    let gated = node.mul("gated", y, gate)?;
    node.add("", x, gated)
}

/// z·sigmoid(z) with z = alpha·x, or x times a scale that is an operand.
pub(super) fn scaled_silu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let alpha = node.float("alpha", 1.0)?;
    let wide = node.widened("wide", x)?;
    let dtype = node.ty(wide).dtype;
    let scale = match node.optional(1) {
        Some(scale) => {
            let scale = node.shaped("scale", [], scale)?;
            node.cast_to("wide_scale", dtype, scale)?
        }
        None => node.number("alpha", alpha.into(), dtype)?,
    };
    let scaled = node.mul("scaled", wide, scale)?;
    let scaled = node.cast_to("scaled_narrow", own, scaled)?;
    let gate = node.unary("gate", UnaryKind::Sigmoid, scaled)?;
    node.mul("", scaled, gate)
}

/// x/√(mean of squares + epsilon) of each `size` elements of the last axis, in f32, as rows `[…, groups, size]`.
fn normalised_rows(node: &mut Node<'_, '_>, x: ValueId, size: usize) -> Result<ValueId> {
    node.check_float("X", x)?;
    let epsilon = node.float("epsilon", 1e-5)?;
    let shape = node.shape(x);
    let Some((&width, lead)) = shape.split_last().filter(|(w, _)| size > 0 && w.is_multiple_of(size)) else {
        return Err(OpError::shape(format!("{} in groups of {size}", node.ty(x))).into());
    };
    let wide = node.widened("wide", x)?;
    let rows = node.shaped("groups", [lead, &[width / size, size]].concat(), wide)?;
    let squares = node.mul("squares", rows, rows)?;
    let mean = node.reduced("mean", ReduceKind::Mean, vec![lead.len() + 1], squares)?;
    let epsilon = node.number("epsilon", epsilon.into(), node.ty(mean).dtype)?;
    let above_zero = node.add("above_zero", mean, epsilon)?;
    let root = node.unary("root", UnaryKind::Sqrt, above_zero)?;
    node.div("normalised", rows, root)
}

/// The norm by the root of the mean of squares of each group of as many elements as there are scales, times the function of a
/// gate.
pub(super) fn gated_rms_norm(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, scale, gate) = (node.operand(0, "X")?, node.operand(1, "scale")?, node.operand(2, "gate")?);
    let (shape, own) = (node.shape(x), node.ty(x).dtype);
    let kind = match node.string("activation", "silu")? {
        "silu" | "swish" => UnaryKind::Silu,
        "sigmoid" => UnaryKind::Sigmoid,
        other => return Err(NodeError::attribute("activation", format!("is {other:?}"))),
    };
    let &[size] = node.shape(scale).dims() else {
        return Err(OpError::shape(format!("scale must be a vector, got {}", node.ty(scale))).into());
    };
    if node.shape(gate) != shape {
        return Err(OpError::shape(format!("gate {} of {}", node.ty(gate), node.ty(x))).into());
    }
    let rows = normalised_rows(node, x, size)?;
    let scale = node.widened("wide_scale", scale)?;
    let scaled = node.mul("scaled", rows, scale)?;
    let y = node.shaped("flat", shape, scaled)?;
    let gate = node.widened("wide_gate", gate)?;
    let gate = node.unary("gate", kind, gate)?;
    let narrows = node.ty(y).dtype != own;
    let y = node.mul(if narrows { "product" } else { "" }, y, gate)?;
    node.cast_to("", own, y)
}

/// The norm by the root of the mean of squares of each branch: of the last axis, or of one of `num_branches` parts of it.
pub(super) fn branchwise_rms_norm(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let (shape, own) = (node.shape(x), node.ty(x).dtype);
    let branches = match node.int("num_branches", 0)? {
        0 => None,
        _ => Some(required_count(node, "num_branches")?),
    };
    let (branches, size) = match (shape.dims(), branches) {
        ([.., branches, size], None) => (*branches, *size),
        ([.., width], Some(n)) if width.is_multiple_of(n) => (n, width / n),
        _ => return Err(OpError::shape(format!("branches of {}", node.ty(x))).into()),
    };
    let scale = node.optional(1);
    let rows = normalised_rows(node, x, size)?;
    let lead = shape.elements() / branches.saturating_mul(size).max(1);
    let mut y = node.shaped("branches", [lead, branches, size], rows)?;
    if let Some(scale) = scale {
        let dims: &[usize] = if node.shape(scale).dims() == [size] { &[size] } else { &[branches, size] };
        let scale = node.shaped("scale", dims, scale)?;
        let scale = node.cast_to("wide_scale", node.ty(y).dtype, scale)?;
        y = node.mul("scaled", y, scale)?;
    }
    let y = node.shaped("flat", shape, y)?;
    node.cast_to("", own, y)
}

/// How fast a state decays, decay_scale·softplus(a + dt_bias), and how much of it is written anew, sigmoid(b).
pub(super) fn linear_attention_gate(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (a, bias) = (node.operand(0, "a")?, node.operand(1, "dt_bias")?);
    let (scale, b) = (node.operand(2, "decay_scale")?, node.optional(3));
    let own = node.ty(a).dtype;
    let a = node.widened("wide", a)?;
    let sum = node.add("sum", a, bias)?;
    let rate = node.unary("rate", UnaryKind::Softplus, sum)?;
    let narrows = node.ty(rate).dtype != own;
    let decay = node.mul(if narrows { "decay" } else { "" }, rate, scale)?;
    let decay = node.cast_to("", own, decay)?;
    let Some(b) = b else { return Ok(vec![decay]) };
    Ok(vec![decay, node.unary("beta", UnaryKind::Sigmoid, b)?])
}
