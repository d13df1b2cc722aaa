//! Ops that move elements.

use super::{elementwise::binary_part, index::counting_along, lengths, reduce::axes};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        Binary, BinaryKind, Cast, Concat, Expand, Pad, PadMode, Reshape, Slice, SliceSpec, Transpose, Where,
    },
};

pub(super) fn axis(node: &mut Node<'_, '_>, shape: &Shape, default: Option<i64>) -> Result<usize, NodeError> {
    let given = node.optional_int("axis")?.or(default);
    let given = given.ok_or_else(|| NodeError::attribute("axis", "is missing"))?;
    shape.axis(given).ok_or_else(|| {
        NodeError::attribute("axis", format!("is {given}, for a tensor of rank {}", shape.rank()))
    })
}

/// The axis that an operand names, which must be known.
pub(super) fn known_axis(node: &mut Node<'_, '_>, slot: usize, shape: &Shape) -> Result<usize, NodeError> {
    let given = node.known_ints(slot, "axis")?.ok_or(NodeError::MissingOperand { slot, role: "axis" })?;
    let axis = if let [axis] = given[..] { shape.axis(axis) } else { None };
    axis.ok_or_else(|| OpError::shape(format!("axis {given:?} of a tensor of rank {}", shape.rank())).into())
}

/// The element count of dimensions, if it is one that can be.
fn product(dims: &[usize]) -> Result<usize, NodeError> {
    Ok(Shape::new(dims)?.elements())
}

/// The same elements under another shape, as a part of the node.
pub(super) fn reshape_part(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    dims: Vec<usize>,
) -> Result<ValueId, NodeError> {
    let shape = Shape::new(dims)?;
    match node.shape(x) == shape {
        true => Ok(x),
        false => node.emit_part(part, Reshape { shape }, &[x]),
    }
}

pub(super) fn reshape_to(
    node: &mut Node<'_, '_>,
    x: ValueId,
    dims: Vec<usize>,
) -> Result<ValueId, NodeError> {
    let shape = Shape::new(dims)?;
    node.emit(Reshape { shape }, &[x])
}

/// A 0 stands for the dimension of the operand (unless `allowzero`), a −1 for what is left.
pub(super) fn reshape(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let target = node.ints_by_opset("shape", 5, 1)?;
    let target = target.ok_or(NodeError::MissingOperand { slot: 1, role: "shape" })?;
    let allow_zero = node.opset() >= 14 && node.flag("allowzero", false)?;
    let from = node.shape(x);
    let bad = |why: &str| NodeError::from(OpError::shape(format!("shape {target:?} of {from:?} {why}")));
    let mut dims = Vec::with_capacity(target.len());
    let mut open = None;
    for (i, &d) in target.iter().enumerate() {
        dims.push(match d {
            0 if !allow_zero => *from.get(i).ok_or_else(|| bad("copies a dimension that is not there"))?,
            -1 if open.is_some() => return Err(bad("has more than one -1")),
            -1 => {
                open = Some(i);
                1
            }
            d => usize::try_from(d).map_err(|_| bad("has a negative dimension"))?,
        });
    }
    if let Some(i) = open {
        let (rest, all) = (product(&dims)?, from.elements());
        if rest == 0 || !all.is_multiple_of(rest) {
            return Err(bad("leaves no whole number for -1"));
        }
        dims[i] = all / rest;
    }
    reshape_to(node, x, dims)
}

pub(super) fn flatten(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let shape = node.shape(x);
    let rank = shape.rank() as i64;
    let axis = node.int("axis", 1)?;
    let least = if node.opset() >= 11 { -rank } else { 0 };
    if !(least..=rank).contains(&axis) {
        return Err(NodeError::attribute("axis", format!("is {axis}, for a tensor of rank {rank}")));
    }
    let at = if axis < 0 { axis + rank } else { axis } as usize;
    let dims = vec![shape[..at].iter().product(), shape[at..].iter().product()];
    reshape_to(node, x, dims)
}

pub(super) fn squeeze(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let gone = match node.ints_by_opset("axes", 13, 1)? {
        Some(given) => axes("axes", &shape, &given)?,
        None => (0..shape.rank()).filter(|&d| shape[d] == 1).collect(),
    };
    if let Some(d) = gone.iter().find(|&&d| shape[d] != 1) {
        return Err(OpError::shape(format!("axis {d} of {} is not of length 1", node.ty(x))).into());
    }
    let dims = (0..shape.rank()).filter(|d| !gone.contains(d)).map(|d| shape[d]).collect();
    reshape_to(node, x, dims)
}

pub(super) fn unsqueeze(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let given =
        node.ints_by_opset("axes", 13, 1)?.ok_or_else(|| NodeError::attribute("axes", "is missing"))?;
    let shape = node.shape(x);
    // Axes count in the result.
    let ones = Shape::new(vec![1; shape.rank().saturating_add(given.len())])?;
    let new = axes("axes", &ones, &given)?;
    let mut old = shape.iter().copied();
    let dims = (0..ones.rank()).filter_map(|d| if new.contains(&d) { Some(1) } else { old.next() }).collect();
    reshape_to(node, x, dims)
}

pub(super) fn transpose(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let perm = match node.ints("perm")? {
        Some(perm) => lengths("perm", &perm)?,
        None => (0..node.ty(x).shape.rank()).rev().collect(),
    };
    node.emit(Transpose { perm }, &[x])
}

pub(super) fn concat(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let operands = node.operands("inputs")?;
    let shape = node.shape(operands[0]);
    let axis = axis(node, &shape, if node.opset() < 4 { Some(1) } else { None })?;
    match operands[..] {
        [only] => Ok(only),
        _ => node.emit(Concat { axis }, &operands),
    }
}

/// Sizes of the parts are an attribute before opset 13 and an operand from then on; without them, equal parts, of
/// which the last may be smaller from opset 18 on.
pub(super) fn split(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "input")?;
    let shape = node.shape(x);
    let axis = axis(node, &shape, Some(0))?;
    let length = shape[axis];
    let results = node.results();
    let given = node.ints_by_opset("split", 13, 1)?;
    let parts = if node.opset() >= 18 { node.optional_int("num_outputs")? } else { None };
    let sizes = match (given, parts) {
        (Some(_), Some(_)) => {
            return Err(NodeError::attribute("num_outputs", "stands beside the sizes in split"));
        }
        (Some(sizes), None) => lengths("split", &sizes)?,
        (None, Some(parts)) if parts != results as i64 => {
            return Err(NodeError::attribute(
                "num_outputs",
                format!("is {parts}, but there are {results} outputs"),
            ));
        }
        (None, uneven) => {
            if uneven.is_none() && !length.is_multiple_of(results) {
                let why = format!("axis {axis} of {} has no {results} equal parts", node.ty(x));
                return Err(OpError::shape(why).into());
            }
            let each = length.div_ceil(results);
            (0..results).map(|i| each.min(length.saturating_sub(i * each))).collect()
        }
    };
    let total = sizes.iter().try_fold(0usize, |n, &s| n.checked_add(s));
    if total != Some(length) || sizes.len() != results {
        let why = format!("sizes {sizes:?} for {results} outputs of axis {axis} of {}", node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let mut start = 0;
    let mut values = Vec::with_capacity(results);
    for (i, len) in sizes.into_iter().enumerate() {
        let mut parts: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
        parts[axis] = SliceSpec { start, len, step: 1 };
        start += len;
        values.push(node.emit_part(&i.to_string(), Slice { axes: parts }, &[x])?);
    }
    Ok(values)
}

/// Before opset 10 the places are attributes; from then on they are operands, and there are steps.
pub(super) fn slice(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let missing = |name| NodeError::attribute(name, "is missing");
    let starts = node.ints_by_opset("starts", 10, 1)?.ok_or_else(|| missing("starts"))?;
    let ends = node.ints_by_opset("ends", 10, 2)?.ok_or_else(|| missing("ends"))?;
    let given = node.ints_by_opset("axes", 10, 3)?;
    let steps = if node.opset() >= 10 { node.known_ints(4, "steps")? } else { None };
    let n = starts.len();
    let given = given.unwrap_or_else(|| (0..n as i64).collect());
    let steps = steps.unwrap_or_else(|| vec![1; n]);
    if ends.len() != n || given.len() != n || steps.len() != n {
        let why = format!("{n} starts, {} ends, {} axes, {} steps", ends.len(), given.len(), steps.len());
        return Err(OpError::shape(why).into());
    }
    // For the check that none stands twice.
    axes("axes", &shape, &given)?;
    let mut parts: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
    for i in 0..n {
        let Some(axis) = shape.axis(given[i]) else { continue };
        parts[axis] = part(shape[axis], starts[i], ends[i], steps[i])?;
    }
    if parts.iter().zip(shape.iter()).all(|(p, &d)| *p == SliceSpec::all(d)) {
        return Ok(x);
    }
    node.emit(Slice { axes: parts }, &[x])
}

/// NumPy's rules: places count from the back where negative, and those beyond an end mean the end. Exporters write the
/// smallest and largest 64-bit numbers for "to the end".
fn part(extent: usize, start: i64, end: i64, step: i64) -> Result<SliceSpec, NodeError> {
    if step == 0 {
        return Err(OpError::attribute("a step is 0").into());
    }
    let d = extent as i128;
    let from_front = |i: i64| i128::from(i) + if i < 0 { d } else { 0 };
    let (lowest, highest) = if step > 0 { (0, d) } else { (-1, d - 1) };
    // A start before the first element is the first, even going backwards.
    let start = from_front(start).clamp(0, highest.max(0));
    let end = from_front(end).clamp(lowest, highest.max(lowest));
    let step = i128::from(step);
    let len = if step > 0 { (end - start + step - 1) / step } else { (start - end - step - 1) / -step };
    let len = if extent == 0 { 0 } else { len.max(0) as usize };
    // A step beyond the extent takes one element like any other such step.
    let step = if len <= 1 { 1 } else { step as isize };
    Ok(SliceSpec { start: if len == 0 { 0 } else { start as usize }, len, step })
}

/// Before opset 11 the pads are an attribute. Negative ones cut, which is done first.
pub(super) fn pad(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let mut x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let rank = shape.rank();
    let pads = match node.opset() {
        1 => node.ints("paddings")?,
        _ => node.ints_by_opset("pads", 11, 1)?,
    };
    let pads = pads.ok_or_else(|| NodeError::attribute("pads", "is missing"))?;
    let mode = node.string("mode", "constant")?;
    let fill = fill(node, x)?;
    let mode = match mode {
        "constant" => PadMode::Constant { value: fill },
        "reflect" => PadMode::Reflect,
        "edge" => PadMode::Edge,
        "wrap" if node.opset() >= 19 => PadMode::Wrap,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    let axes: Vec<usize> = match if node.opset() >= 18 { node.known_ints(3, "axes")? } else { None } {
        None => (0..rank).collect(),
        Some(given) => {
            axes("axes", &shape, &given)?;
            given.iter().filter_map(|&a| shape.axis(a)).collect()
        }
    };
    if pads.len() != 2 * axes.len() {
        let why = format!("has {} entries for {} axes", pads.len(), axes.len());
        return Err(NodeError::attribute("pads", why));
    }
    let (mut before, mut after) = (vec![0; rank], vec![0; rank]);
    let mut kept: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
    for (i, &axis) in axes.iter().enumerate() {
        let (b, a) = (pads[i], pads[i + axes.len()]);
        let cut = |p: i64| usize::try_from(p.min(0).unsigned_abs()).unwrap_or(usize::MAX);
        let left = shape[axis].checked_sub(cut(b)).and_then(|n| n.checked_sub(cut(a)));
        let len = left.ok_or_else(|| {
            OpError::shape(format!("pads {b} and {a} cut more than axis {axis} of {} has", node.ty(x)))
        })?;
        kept[axis] = SliceSpec { start: if len == 0 { 0 } else { cut(b) }, len, step: 1 };
        (before[axis], after[axis]) = (b.max(0) as usize, a.max(0) as usize);
    }
    if kept.iter().zip(shape.iter()).any(|(k, &d)| k.len != d) {
        x = node.emit_part("cut", Slice { axes: kept }, &[x])?;
    }
    if before.iter().chain(&after).all(|&p| p == 0) {
        return Ok(x);
    }
    node.emit(Pad { before, after, mode }, &[x])
}

/// The number that a constant pad holds. On quantized values the model gives its code; the IR wants the real number.
fn fill(node: &mut Node<'_, '_>, x: ValueId) -> Result<f64, NodeError> {
    let value = if node.opset() < 11 {
        f64::from(node.float("value", 0.0)?)
    } else {
        match node.known(2, "constant_value")? {
            None => 0.0,
            Some(t) => number(&t, node.ty(x).dtype)?,
        }
    };
    Ok(match node.ty(x).per_tensor() {
        Some((scale, zero_point)) => (value - f64::from(zero_point)) * f64::from(scale),
        None => value,
    })
}

/// The one element of a tensor of this type, if f64 holds it.
fn number(t: &Tensor, dtype: DType) -> Result<f64, NodeError> {
    if t.dtype() != dtype || t.shape().elements() != 1 {
        return Err(OpError::dtype(format!("the constant must be one {dtype}, not {}", t.ty())).into());
    }
    let float = match dtype {
        DType::F64 => t.as_slice::<f64>().ok().map(|v| v[0]),
        _ => t.to_f32().map(|v| f64::from(v[0])),
    };
    let value = float.or_else(|| t.to_i64().map(|v| v[0] as f64).filter(|v| v.abs() <= 2f64.powi(53)));
    Ok(value.ok_or_else(|| OpError::unsupported("a pad with an integer above 2^53"))?)
}

/// The operand and the target broadcast to each other.
pub(super) fn expand(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let dims = node.known_ints(1, "shape")?.ok_or(NodeError::MissingOperand { slot: 1, role: "shape" })?;
    let target = Shape::new(lengths("shape", &dims)?)?;
    let from = node.shape(x);
    let shape = from
        .broadcast(&target)
        .ok_or_else(|| OpError::shape(format!("{} does not broadcast to {target:?}", node.ty(x))))?;
    if shape == from {
        return Ok(x);
    }
    node.emit(Expand { shape }, &[x])
}

/// A new dimension before each repeated one, which is then expanded and merged with it.
pub(super) fn tile(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let given =
        node.known_ints(1, "repeats")?.ok_or(NodeError::MissingOperand { slot: 1, role: "repeats" })?;
    let repeats = lengths("repeats", &given)?;
    let from = node.shape(x);
    if repeats.len() != from.rank() {
        return Err(OpError::shape(format!("{} repeats of {}", repeats.len(), node.ty(x))).into());
    }
    let (mut apart, mut repeated, mut merged) = (vec![], vec![], vec![]);
    for (&d, &r) in from.iter().zip(&repeats) {
        if r != 1 {
            apart.push(1);
            repeated.push(r);
        }
        apart.push(d);
        repeated.push(d);
        merged.push(
            d.checked_mul(r).ok_or_else(|| OpError::too_large(format!("axis of {d} repeated {r} times")))?,
        );
    }
    let merged = Shape::new(merged)?;
    if repeats.iter().all(|&r| r == 1) {
        return Ok(x);
    }
    let apart = node.emit_part("apart", Reshape { shape: Shape::new(apart)? }, &[x])?;
    let repeated = node.emit_part("repeated", Expand { shape: Shape::new(repeated)? }, &[apart])?;
    node.emit(Reshape { shape: merged }, &[repeated])
}

/// What [`depth_to_space`] and [`space_to_depth`] have in common: the operand, its batch, channels and area, and the side
/// of a block.
fn blocks(node: &mut Node<'_, '_>) -> Result<(ValueId, [usize; 4], usize), NodeError> {
    let x = node.operand(0, "input")?;
    let size = node.optional_int("blocksize")?.unwrap_or(0);
    let side = usize::try_from(size).ok().filter(|s| (1..=1 << 16).contains(s));
    let side = side.ok_or_else(|| NodeError::attribute("blocksize", format!("is {size} or missing")))?;
    match *node.shape(x).dims() {
        [n, c, h, w] => Ok((x, [n, c, h, w], side)),
        _ => Err(OpError::shape(format!("takes a tensor of rank 4, got {}", node.ty(x))).into()),
    }
}

fn not_whole(node: &Node<'_, '_>, x: ValueId, side: usize) -> NodeError {
    OpError::shape(format!("{} has no whole blocks of side {side}", node.ty(x))).into()
}

/// Channels in groups of a block's area each become blocks of pixels.
pub(super) fn depth_to_space(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, [n, c, h, w], side) = blocks(node)?;
    // Of the channels either the block or the group is the outer part.
    let block_first = match if node.opset() >= 11 { node.string("mode", "DCR")? } else { "DCR" } {
        "DCR" => true,
        "CRD" => false,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    if !c.is_multiple_of(side * side) {
        return Err(not_whole(node, x, side));
    }
    let depth = c / (side * side);
    let (apart, perm) = match block_first {
        true => (vec![n, side, side, depth, h, w], vec![0, 3, 4, 1, 5, 2]),
        false => (vec![n, depth, side, side, h, w], vec![0, 1, 4, 2, 5, 3]),
    };
    let apart = reshape_part(node, "apart", x, apart)?;
    let moved = node.emit_part("moved", Transpose { perm }, &[apart])?;
    let long = |d: usize| d.checked_mul(side).ok_or_else(|| not_whole(node, x, side));
    let dims = vec![n, depth, long(h)?, long(w)?];
    reshape_to(node, moved, dims)
}

/// Blocks of pixels become channels, those of one place in the block together.
pub(super) fn space_to_depth(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, [n, c, h, w], side) = blocks(node)?;
    if !h.is_multiple_of(side) || !w.is_multiple_of(side) {
        return Err(not_whole(node, x, side));
    }
    let (rows, columns) = (h / side, w / side);
    let apart = reshape_part(node, "apart", x, vec![n, c, rows, side, columns, side])?;
    let moved = node.emit_part("moved", Transpose { perm: vec![0, 3, 5, 1, 2, 4] }, &[apart])?;
    let depth = c.checked_mul(side * side).ok_or_else(|| not_whole(node, x, side))?;
    reshape_to(node, moved, vec![n, depth, rows, columns])
}

/// column − row − `shift` of each place of matrices compared with 0.
fn by_diagonal(
    node: &mut Node<'_, '_>,
    [rows, columns]: [usize; 2],
    shift: i64,
    kind: BinaryKind,
) -> Result<ValueId, NodeError> {
    let row = counting_along(node, "row", rows, 0, 2)?;
    let column = counting_along(node, "column", columns, 1, 2)?;
    // Beyond the matrices all diagonals are alike.
    let shift = shift.clamp(-(rows as i64) - 1, columns as i64 + 1);
    let shift = node.constant_part("shift", Tensor::scalar(shift));
    let start = binary_part(node, "start", BinaryKind::Add, row, shift)?;
    node.emit_part("mask", Binary { kind }, &[column, start])
}

/// The triangle above or below a diagonal, 0 elsewhere.
pub(super) fn trilu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let shift = node.known(1, "k")?.and_then(|k| k.to_i64()).and_then(|k| k.first().copied()).unwrap_or(0);
    let upper = node.flag("upper", true)?;
    let (shape, dtype) = (node.shape(x), node.ty(x).dtype);
    let &[.., rows, columns] = shape.dims() else {
        return Err(OpError::shape(format!("takes matrices, got {}", node.ty(x))).into());
    };
    let kind = if upper { BinaryKind::GreaterOrEqual } else { BinaryKind::LessOrEqual };
    let mask = by_diagonal(node, [rows, columns], shift, kind)?;
    let zero = node.constant_part("zero", Tensor::zeros(dtype, Shape::scalar()));
    node.emit(Where {}, &[mask, x, zero])
}

/// 1 on a diagonal, 0 elsewhere, in the shape of the operand.
pub(super) fn eye_like(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let shift = node.int("k", 0)?;
    let to = match node.optional_int("dtype")? {
        Some(code) => super::elementwise::dtype("dtype", code)?,
        None => node.ty(x).dtype,
    };
    let [rows, columns] = *node.shape(x).dims() else {
        return Err(OpError::shape(format!("takes a matrix, got {}", node.ty(x))).into());
    };
    let mask = by_diagonal(node, [rows, columns], shift, BinaryKind::Equal)?;
    node.emit(Cast { to }, &[mask])
}
