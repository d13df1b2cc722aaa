//! Normalisations.

use super::{compose::Result, reduce::axes};
use crate::{
    DType, OpError, Shape, ValueId,
    onnx::{NodeError, import::Node, tensor},
    ops::{BatchNorm, BinaryKind, Layout, Lrn, ReduceKind, Reshape, Softmax, UnaryKind},
};

pub(super) fn batch_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let roles = ["X", "scale", "B", "mean", "var"];
    let mut operands = Vec::with_capacity(roles.len());
    for (slot, role) in roles.into_iter().enumerate() {
        operands.push(node.operand(slot, role)?);
    }
    let momentum = node.float("momentum", 0.9)?;
    let epsilon = node.float("epsilon", 1e-5)?;
    if node.opset() < 9 && !node.flag("spatial", true)? {
        return Err(NodeError::attribute("spatial", "is 0: statistics of each element are not supported"));
    }
    if node.opset() < 7 {
        node.ignore(&["is_test"]);
    }
    if node.opset() >= 14 && node.flag("training_mode", false)? {
        return trained(node, &operands, epsilon, momentum);
    }
    if (1..node.results()).any(|port| node.wants(port)) {
        let why = "gives out statistics, as in training before opset 14; export the model in inference mode";
        return Err(OpError::unsupported(why).into());
    }
    Ok(vec![node.emit(BatchNorm { epsilon, axis: 1 }, &operands)?])
}

/// By the statistics of the batch, which the running ones are moved towards.
fn trained(
    node: &mut Node<'_, '_>,
    operands: &[ValueId],
    epsilon: f32,
    momentum: f32,
) -> Result<Vec<ValueId>> {
    let &[x, scale, bias, old_mean, old_variance] = operands else {
        return Err(NodeError::MissingOperand { slot: 4, role: "var" });
    };
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let wide = node.widened("wide", x)?;
    let (dtype, rank) = (node.ty(wide).dtype, node.shape(x).rank());
    let axes: Vec<usize> = (0..rank).filter(|&d| d != 1).collect();
    let mean = node.reduced("mean", ReduceKind::Mean, axes.clone(), wide)?;
    let difference = node.sub("centred", wide, mean)?;
    let squares = node.mul("squares", difference, difference)?;
    let variance = node.reduced("variance", ReduceKind::Mean, axes, squares)?;
    let term = node.number("epsilon", epsilon.into(), dtype)?;
    let above_zero = node.add("above_zero", variance, term)?;
    let deviation = node.unary("deviation", UnaryKind::Sqrt, above_zero)?;
    let y = node.div("normalised", difference, deviation)?;
    let scale = node.cast_to("wide_scale", dtype, scale)?;
    let bias = node.cast_to("wide_bias", dtype, bias)?;
    let (scale, bias) = (by_channel(node, "scale", scale, x)?, by_channel(node, "bias", bias, x)?);
    let y = scale_and_shift(node, if dtype == own { "" } else { "wide_result" }, y, scale, Some(bias))?;
    let mut results = vec![node.cast_to("", own, y)?];
    for (part, now, old) in [("running_mean", mean, old_mean), ("running_var", variance, old_variance)] {
        let (shape, to) = (node.shape(old), node.ty(old).dtype);
        let now = node.shaped(&format!("{part}_now"), shape, now)?;
        let old = node.cast_to(&format!("{part}_old"), dtype, old)?;
        let keeps = node.number(&format!("{part}_momentum"), momentum.into(), dtype)?;
        let takes = node.number(&format!("{part}_rest"), 1.0 - f64::from(momentum), dtype)?;
        let kept = node.mul(&format!("{part}_kept"), old, keeps)?;
        let taken = node.mul(&format!("{part}_taken"), now, takes)?;
        let moved = node.add(&format!("{part}_moved"), kept, taken)?;
        results.push(node.cast_to(part, to, moved)?);
    }
    Ok(results)
}

/// The axes from the attribute `axis` on, over which a layer is normalised.
fn layer_axes(node: &mut Node<'_, '_>, x: ValueId) -> Result<Vec<usize>> {
    let first = node.axis_of("axis", -1, x)?;
    Ok((first..node.shape(x).rank()).collect())
}

/// The value in the type that the first stage of a normalisation is computed in: what `stash_type` says, but not in fewer
/// digits than the value has.
fn stashed(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
    node.check_float("the operand", x)?;
    let code = node.int("stash_type", 1)?;
    let code = i32::try_from(code).map_err(|_| NodeError::attribute("stash_type", format!("is {code}")))?;
    let stash = tensor::dtype(code).map_err(|e| NodeError::attribute("stash_type", e))?;
    let to = match (node.ty(x).dtype, stash) {
        (_, DType::F64) => DType::F64,
        (DType::F16 | DType::BF16, DType::F32) => DType::F32,
        (own, other) if other.is_float() => own,
        (_, other) => return Err(NodeError::attribute("stash_type", format!("is {other}, not a float"))),
    };
    node.cast_to("stashed", to, x)
}

/// The parts of a normalisation: x − mean, the mean, and √(variance + epsilon), over axes.
struct Centred {
    difference: ValueId,
    mean: ValueId,
    deviation: ValueId,
}

fn centre(node: &mut Node<'_, '_>, x: ValueId, axes: &[usize], epsilon: f32) -> Result<Centred> {
    let mean = node.reduced("mean", ReduceKind::Mean, axes.to_vec(), x)?;
    let difference = node.sub("centred", x, mean)?;
    let squares = node.mul("squares", difference, difference)?;
    let deviation = root_of_mean(node, squares, axes, epsilon)?;
    Ok(Centred { difference, mean, deviation })
}

/// √(mean of squares + epsilon).
fn root_of_mean(node: &mut Node<'_, '_>, squares: ValueId, axes: &[usize], epsilon: f32) -> Result<ValueId> {
    let variance = node.reduced("variance", ReduceKind::Mean, axes.to_vec(), squares)?;
    let epsilon = node.number("epsilon", epsilon.into(), node.ty(variance).dtype)?;
    let variance = node.add("above_zero", variance, epsilon)?;
    node.unary("deviation", UnaryKind::Sqrt, variance)
}

/// y·scale + bias, where there is a bias. The last step has the name `part`.
fn scale_and_shift(
    node: &mut Node<'_, '_>,
    part: &str,
    y: ValueId,
    scale: ValueId,
    bias: Option<ValueId>,
) -> Result<ValueId> {
    match bias {
        None => node.mul(part, y, scale),
        Some(bias) => {
            let y = node.mul("scaled", y, scale)?;
            node.add(part, y, bias)
        }
    }
}

/// Fails unless the value broadcasts to x without making it larger.
fn check_broadcast(node: &Node<'_, '_>, v: ValueId, x: ValueId) -> Result<()> {
    let shape = node.shape(x);
    if shape.broadcast(&node.shape(v)).as_ref() == Some(&shape) {
        return Ok(());
    }
    Err(OpError::shape(format!("{} does not broadcast to {}", node.ty(v), node.ty(x))).into())
}

/// (x − mean)/√(variance + epsilon)·scale + bias, mean and variance of all axes from `axis` on: in these steps, in the
/// type of `stash_type`, which the other results, mean and 1/√(variance + epsilon), have too. The first one is rounded
/// to the type of x once, where ONNX's own definition does so before the scale, too.
pub(super) fn layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, scale) = (node.operand(0, "X")?, node.operand(1, "Scale")?);
    let bias = node.optional(2);
    let epsilon = node.float("epsilon", 1e-5)?;
    layer_of(node, x, scale, bias, epsilon)
}

/// The layer normalisation of these values, by the node's attributes but for epsilon.
pub(super) fn layer_of(
    node: &mut Node<'_, '_>,
    x: ValueId,
    scale: ValueId,
    bias: Option<ValueId>,
    epsilon: f32,
) -> Result<Vec<ValueId>> {
    let axes = layer_axes(node, x)?;
    for v in [scale].into_iter().chain(bias) {
        check_broadcast(node, v, x)?;
    }
    let wide = stashed(node, x)?;
    let Centred { difference, mean, deviation } = centre(node, wide, &axes, epsilon)?;
    let y = node.div("normalised", difference, deviation)?;
    let (own, wide) = (node.ty(x).dtype, node.ty(y).dtype);
    let scale = node.cast_to("wide_scale", wide, scale)?;
    let bias = bias.map(|bias| node.cast_to("wide_bias", wide, bias)).transpose()?;
    let y = scale_and_shift(node, if own == wide { "" } else { "wide" }, y, scale, bias)?;
    let y = node.cast_to("", own, y)?;
    if !node.wants(1) && !node.wants(2) {
        return Ok(vec![y]);
    }
    let inverse = node.unary("inverse_deviation", UnaryKind::Reciprocal, deviation)?;
    Ok(vec![y, mean, inverse])
}

/// x/√(mean of squares + epsilon)·scale, over all axes from `axis` on.
pub(super) fn rms_normalization(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, scale) = (node.operand(0, "X")?, node.operand(1, "scale")?);
    let epsilon = node.float("epsilon", 1e-5)?;
    rms_of(node, x, scale, epsilon)
}

/// The same of these values, by the node's attributes but for epsilon.
pub(super) fn rms_of(node: &mut Node<'_, '_>, x: ValueId, scale: ValueId, epsilon: f32) -> Result<ValueId> {
    let axes = layer_axes(node, x)?;
    check_broadcast(node, scale, x)?;
    let wide = stashed(node, x)?;
    let squares = node.mul("squares", wide, wide)?;
    let deviation = root_of_mean(node, squares, &axes, epsilon)?;
    let y = node.div("normalised", wide, deviation)?;
    // The result has the type of the scale, which may be another one than that of x.
    let y = node.cast_to("narrowed", node.ty(scale).dtype, y)?;
    node.mul("", y, scale)
}

/// The same of these values along the last axis, as a part of the node.
pub(super) fn rms_part(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    scale: ValueId,
    epsilon: f32,
) -> Result<ValueId> {
    let own = node.ty(x).dtype;
    let wide = node.widened(&format!("{part}_wide"), x)?;
    let last = node.shape(x).rank().saturating_sub(1);
    let squares = node.mul(&format!("{part}_squares"), wide, wide)?;
    let mean = node.reduced(&format!("{part}_mean"), ReduceKind::Mean, vec![last], squares)?;
    let epsilon = node.number(&format!("{part}_epsilon"), epsilon.into(), node.ty(mean).dtype)?;
    let above_zero = node.add(&format!("{part}_above_zero"), mean, epsilon)?;
    let root = node.unary(&format!("{part}_root"), UnaryKind::Sqrt, above_zero)?;
    let y = node.div(&format!("{part}_normalised"), wide, root)?;
    let scale = node.widened(&format!("{part}_scale"), scale)?;
    let y = node.mul(&format!("{part}_scaled"), y, scale)?;
    node.cast_to(part, own, y)
}

/// A vector with an element a channel, as it broadcasts to x of channels first.
fn by_channel(node: &mut Node<'_, '_>, part: &str, v: ValueId, x: ValueId) -> Result<ValueId> {
    let shape = node.shape(x);
    let channels = shape.get(1).copied().unwrap_or(0);
    if node.shape(v).dims() != [channels] {
        let why = format!("takes one number a channel of {}, got {}", node.ty(x), node.ty(v));
        return Err(OpError::shape(why).into());
    }
    let mut dims = vec![1; shape.rank() - 1];
    dims[0] = channels;
    node.shaped(part, dims, v)
}

/// (x − mean)·(scale/√(variance + epsilon)) + bias, mean and variance of each channel of each image.
pub(super) fn instance_normalization(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let (scale, bias) = (node.operand(1, "scale")?, node.operand(2, "B")?);
    node.check_float("input", x)?;
    let epsilon = node.float("epsilon", 1e-5)?;
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let (scale, bias) = (by_channel(node, "scale", scale, x)?, by_channel(node, "bias", bias, x)?);
    let dtype = node.ty(x).dtype;
    let wide = node.widened("wide", x)?;
    let axes: Vec<usize> = (2..spatial.len() + 2).collect();
    let Centred { difference, deviation, .. } = centre(node, wide, &axes, epsilon)?;
    let (scale, bias) = (node.widened("wide_scale", scale)?, node.widened("wide_bias", bias)?);
    let factor = node.div("factor", scale, deviation)?;
    let y = node.mul("scaled", difference, factor)?;
    let narrows = node.ty(y).dtype != dtype;
    let y = node.add(if narrows { "shifted" } else { "" }, y, bias)?;
    node.cast_to("", dtype, y)
}

/// (x − mean)/√(variance + epsilon)·scale + bias, mean and variance of each group of channels of each image. Before opset
/// 21, scale and bias have one number a group; from then on, one a channel.
pub(super) fn group_normalization(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let (scale, bias) = (node.operand(1, "scale")?, node.operand(2, "bias")?);
    let epsilon = node.float("epsilon", 1e-5)?;
    let groups = node.count("num_groups")?.ok_or_else(|| NodeError::attribute("num_groups", "is missing"))?;
    let shape = node.shape(x);
    let by_group = node.opset() < 21;
    let wide = if by_group { node.widened("wide", x)? } else { stashed(node, x)? };
    let y = normalised_groups(node, x, wide, groups, epsilon)?;
    if by_group {
        let (scale, bias) = (by_channel(node, "scale", scale, y)?, by_channel(node, "bias", bias, y)?);
        let y = node.mul("scaled", y, scale)?;
        let y = node.add("shifted", y, bias)?;
        return node.shaped("", shape, y);
    }
    let y = node.shaped("channels", shape, y)?;
    let (scale, bias) = (by_channel(node, "scale", scale, x)?, by_channel(node, "bias", bias, x)?);
    scale_and_shift(node, "", y, scale, Some(bias))
}

/// (x − mean)/√(variance + epsilon) of each group of channels of each image, `[batch, groups, elements]`: of `wide`, which is
/// x in the type that is computed in, in the type of x.
fn normalised_groups(
    node: &mut Node<'_, '_>,
    x: ValueId,
    wide: ValueId,
    groups: usize,
    epsilon: f32,
) -> Result<ValueId> {
    let (batch, channels, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(OpError::attribute(format!("{groups} groups of {channels} channels")).into());
    }
    let extent = spatial.iter().product::<usize>().saturating_mul(channels / groups);
    let grouped = node.shaped("groups", [batch, groups, extent], wide)?;
    let Centred { difference, deviation, .. } = centre(node, grouped, &[2], epsilon)?;
    let y = node.div("normalised", difference, deviation)?;
    node.cast_to("narrowed", node.ty(x).dtype, y)
}

/// The group normalisation of an x of channels first, in the type that is computed in.
pub(super) fn group_of(
    node: &mut Node<'_, '_>,
    x: ValueId,
    scale: ValueId,
    bias: ValueId,
    groups: usize,
    epsilon: f32,
) -> Result<ValueId> {
    let y = normalised_groups(node, x, x, groups, epsilon)?;
    let y = node.shaped("channels", node.shape(x), y)?;
    let (scale, bias) = (by_channel(node, "scale", scale, x)?, by_channel(node, "bias", bias, x)?);
    scale_and_shift(node, "affine", y, scale, Some(bias))
}

/// (x − mean)/(deviation + 1e-9), over axes.
pub(super) fn mean_variance_normalization(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    let given = node.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    let axes = axes("axes", &node.shape(x), &given)?;
    let dtype = node.ty(x).dtype;
    let wide = node.widened("wide", x)?;
    let Centred { difference, deviation, .. } = centre(node, wide, &axes, 0.0)?;
    let least = node.number("least", 1e-9, node.ty(deviation).dtype)?;
    let deviation = node.add("positive", deviation, least)?;
    let narrows = node.ty(deviation).dtype != dtype;
    let y = node.div(if narrows { "normalised" } else { "" }, difference, deviation)?;
    node.cast_to("", dtype, y)
}

/// x over its norm along an axis; 0 where that is 0.
pub(super) fn lp_normalization(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let axis = node.axis_of("axis", -1, x)?;
    let kind = match node.int("p", 2)? {
        1 => ReduceKind::L1,
        2 => ReduceKind::L2,
        other => return Err(NodeError::attribute("p", format!("is {other}, neither 1 nor 2"))),
    };
    let dtype = node.ty(x).dtype;
    let norm = node.reduced("norm", kind, vec![axis], x)?;
    let zero = node.number("zero", 0.0, dtype)?;
    let none = node.binary("is_zero", BinaryKind::Equal, norm, zero)?;
    let none = node.cast_to("one_for_zero", dtype, none)?;
    let norm = node.add("divisor", norm, none)?;
    node.div("", x, norm)
}

pub(super) fn lrn(node: &mut Node<'_, '_>) -> Result<ValueId> {
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

pub(super) fn softmax(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let coerces = node.opset() < 13;
    softmax_of(node, x, false, coerces)
}

pub(super) fn log_softmax(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let coerces = node.opset() < 13;
    softmax_of(node, x, true, coerces)
}

/// Before opset 13 the operand counts as a matrix (`coerces`): all dimensions from `axis` on are one.
pub(super) fn softmax_of(node: &mut Node<'_, '_>, x: ValueId, log: bool, coerces: bool) -> Result<ValueId> {
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
        return softmax_along(node, "", at, log, x);
    }
    let rows = shape[..at].iter().product::<usize>();
    let columns = shape[at..].iter().product::<usize>();
    let matrix = node.emit_part("matrix", Reshape { shape: Shape::new([rows, columns])? }, &[x])?;
    let y = softmax_along(node, "rows", 1, log, matrix)?;
    node.emit(Reshape { shape }, &[y])
}

/// Of f64, which [`Softmax`] does not take, in steps.
fn softmax_along(node: &mut Node<'_, '_>, part: &str, axis: usize, log: bool, x: ValueId) -> Result<ValueId> {
    if node.ty(x).dtype != DType::F64 {
        return node.step(part, Softmax { axis, log }, &[x]);
    }
    let largest = node.reduced("largest", ReduceKind::Max, vec![axis], x)?;
    let below = node.sub("below", x, largest)?;
    let powers = node.unary("powers", UnaryKind::Exp, below)?;
    let total = node.reduced("total", ReduceKind::Sum, vec![axis], powers)?;
    match log {
        false => node.div(part, powers, total),
        true => {
            let total = node.unary("log_total", UnaryKind::Log, total)?;
            node.sub(part, below, total)
        }
    }
}
