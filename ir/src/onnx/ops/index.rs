//! Ops that pick by index, and those that find indices.

use super::{
    elementwise::{binary_part, cast_part},
    lengths,
    shape::{axis, known_axis, reshape_part},
};
use crate::{
    DType, OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        ArgExtreme, Binary, BinaryKind, Cast, Cumulate, CumulateKind, Expand, Gather, GatherElements,
        GatherNd, ScatterElements, ScatterNd, TopK, Transpose, Update, Where,
    },
};

/// 0, 1, 2… as s64.
pub(super) fn counting(node: &mut Node<'_, '_>, part: &str, n: usize) -> Result<ValueId, NodeError> {
    let shape = Shape::new([n])?;
    let ty = TensorType::new(DType::S64, shape.clone());
    node.computed(part, &ty, || Ok(Tensor::from_vec(shape, (0..n as i64).collect())?))
}

/// 0, 1, 2… along an axis of a tensor of this rank, as s64.
pub(super) fn counting_along(
    node: &mut Node<'_, '_>,
    part: &str,
    n: usize,
    axis: usize,
    rank: usize,
) -> Result<ValueId, NodeError> {
    let vector = counting(node, &format!("{part}_vector"), n)?;
    let mut dims = vec![1; rank];
    dims[axis] = n;
    reshape_part(node, part, vector, dims)
}

pub(super) fn gather(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, indices) = (node.operand(0, "data")?, node.operand(1, "indices")?);
    let shape = node.shape(x);
    let axis = axis(node, &shape, Some(0))?;
    if let Some(known) = node.constant_value(indices).and_then(Tensor::to_i64) {
        let extent = shape[axis] as i64;
        if let Some(i) = known.iter().find(|i| !(-extent..extent).contains(i)) {
            let why = format!("index {i} is out of range for axis {axis} of {}", node.ty(x));
            return Err(OpError::shape(why).into());
        }
    }
    node.emit(Gather { axis }, &[x, indices])
}

pub(super) fn gather_elements(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, indices) = (node.operand(0, "data")?, node.operand(1, "indices")?);
    let shape = node.shape(x);
    let axis = axis(node, &shape, Some(0))?;
    node.emit(GatherElements { axis }, &[x, indices])
}

pub(super) fn gather_nd(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, indices) = (node.operand(0, "data")?, node.operand(1, "indices")?);
    let batch_dims = if node.opset() >= 12 { node.int("batch_dims", 0)? } else { 0 };
    let batch_dims = lengths("batch_dims", &[batch_dims])?[0];
    node.emit(GatherNd { batch_dims }, &[x, indices])
}

/// Sums and products came with opset 16, the rest with 18.
fn update(node: &mut Node<'_, '_>) -> Result<Update, NodeError> {
    let opset = node.opset();
    let name = if opset >= 16 { node.string("reduction", "none")? } else { "none" };
    match name {
        "none" => Ok(Update::Replace),
        "add" => Ok(Update::Add),
        "mul" => Ok(Update::Mul),
        "max" if opset >= 18 => Ok(Update::Max),
        "min" if opset >= 18 => Ok(Update::Min),
        other => Err(NodeError::attribute("reduction", format!("is {other:?} at opset {opset}"))),
    }
}

fn scattered(node: &mut Node<'_, '_>) -> Result<[ValueId; 3], NodeError> {
    Ok([node.operand(0, "data")?, node.operand(1, "indices")?, node.operand(2, "updates")?])
}

/// Also the op `Scatter` of opsets 9 and 10.
pub(super) fn scatter_elements(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let operands = scattered(node)?;
    let shape = node.shape(operands[0]);
    let axis = axis(node, &shape, Some(0))?;
    let update = update(node)?;
    node.emit(ScatterElements { axis, update }, &operands)
}

pub(super) fn scatter_nd(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let operands = scattered(node)?;
    let update = update(node)?;
    node.emit(ScatterNd { update }, &operands)
}

/// The cache with the update of each batch written from its index on.
pub(super) fn tensor_scatter(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (cache, update) = (node.operand(0, "past_cache")?, node.operand(1, "update")?);
    let starts = node.optional(2);
    let (shape, part) = (node.shape(cache), node.shape(update));
    let axis = axis(node, &shape, Some(-2))?;
    let circular = match node.string("mode", "linear")? {
        "linear" => false,
        "circular" => true,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    let rank = shape.rank();
    if axis == 0 || part.rank() != rank || (0..rank).any(|d| d != axis && part[d] != shape[d]) {
        let why = format!("axis {axis} of {} updated by {}", node.ty(cache), node.ty(update));
        return Err(OpError::shape(why).into());
    }
    let mut places = counting_along(node, "steps", part[axis], axis, rank)?;
    if let Some(starts) = starts {
        let mut dims = vec![1; rank];
        dims[0] = shape[0];
        let starts = reshape_part(node, "starts", starts, dims)?;
        let starts = cast_part(node, "starts_s64", starts, DType::S64)?;
        places = binary_part(node, "places", BinaryKind::Add, places, starts)?;
    }
    if circular {
        let length = node.constant_part("length", Tensor::scalar(shape[axis].max(1) as i64));
        places = binary_part(node, "around", BinaryKind::Modulo, places, length)?;
    }
    let places = node.emit_part("indices", Expand { shape: part }, &[places])?;
    node.emit(ScatterElements { axis, update: Update::Replace }, &[cache, places, update])
}

/// Of each batch the elements up to its length in reverse.
pub(super) fn reverse_sequence(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, lengths) = (node.operand(0, "input")?, node.operand(1, "sequence_lens")?);
    let (batch, time) = (node.int("batch_axis", 1)?, node.int("time_axis", 0)?);
    let shape = node.shape(x);
    if !matches!((batch, time), (0, 1) | (1, 0)) || shape.rank() < 2 {
        let why = format!("is {batch} and `time_axis` {time}, for {}; they must be 0 and 1", node.ty(x));
        return Err(NodeError::attribute("batch_axis", why));
    }
    let (batch, time) = (batch as usize, time as usize);
    // To [batch, time, …] and back.
    let perm: Vec<usize> = [batch, time].into_iter().chain(2..shape.rank()).collect();
    let lengths = reshape_part(node, "lengths", lengths, vec![shape[batch], 1])?;
    let steps = counting_along(node, "steps", shape[time], 1, 2)?;
    let one = node.constant_part("one", Tensor::scalar(1i64));
    let last = binary_part(node, "last", BinaryKind::Sub, lengths, one)?;
    let reversed = binary_part(node, "reversed", BinaryKind::Sub, last, steps)?;
    let within = binary_part(node, "within", BinaryKind::Less, steps, lengths)?;
    let places = node.emit_part("places", Where {}, &[within, reversed, steps])?;
    let places = reshape_part(node, "tuples", places, vec![shape[batch], shape[time], 1])?;
    let x = node.emit_part("batches", Transpose { perm: perm.clone() }, &[x])?;
    let y = node.emit_part("picked", GatherNd { batch_dims: 1 }, &[x, places])?;
    // A swap of two axes is its own inverse.
    node.emit(Transpose { perm }, &[y])
}

fn arg_extreme(node: &mut Node<'_, '_>, largest: bool) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let axis = axis(node, &shape, Some(0))?;
    let keep_dims = node.flag("keepdims", true)?;
    let last = node.opset() >= 12 && node.flag("select_last_index", false)?;
    node.emit(ArgExtreme { largest, axis, keep_dims, last }, &[x])
}

pub(super) fn arg_max(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    arg_extreme(node, true)
}

pub(super) fn arg_min(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    arg_extreme(node, false)
}

/// How many is an attribute before opset 10 and an operand from then on. Results are sorted even where they need not be.
pub(super) fn top_k(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "X")?;
    let shape = node.shape(x);
    let axis = axis(node, &shape, Some(-1))?;
    let k = match node.opset() >= 10 {
        true => node.known_ints(1, "K")?.and_then(|k| k.first().copied()),
        false => node.optional_int("k")?,
    };
    let k = lengths("k", &[k.ok_or_else(|| NodeError::attribute("k", "is missing"))?])?[0];
    let mut largest = true;
    if node.opset() >= 11 {
        largest = node.flag("largest", true)?;
        node.ignore(&["sorted"]);
    }
    let places = node.emit_part("indices", TopK { k, axis, largest }, &[x])?;
    Ok(vec![node.emit(GatherElements { axis }, &[x, places])?, places])
}

fn cumulate(node: &mut Node<'_, '_>, kind: CumulateKind) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let axis = known_axis(node, 1, &node.shape(x))?;
    let (exclusive, reverse) = (node.flag("exclusive", false)?, node.flag("reverse", false)?);
    node.emit(Cumulate { kind, axis, exclusive, reverse }, &[x])
}

pub(super) fn cum_sum(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    cumulate(node, CumulateKind::Sum)
}

pub(super) fn cum_prod(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    cumulate(node, CumulateKind::Product)
}

/// One number of any type, as an integer.
fn whole_number(t: &Tensor, role: &'static str) -> Result<i64, NodeError> {
    let number = t.to_i64().or_else(|| t.to_f32().map(|v| v.iter().map(|&x| x as i64).collect()));
    match number.as_deref() {
        Some(&[n]) => Ok(n),
        _ => Err(OpError::shape(format!("{role} must be one number, got {}", t.ty())).into()),
    }
}

/// Which of 0, 1, 2… an index is. Negative ones count from the back; those out of range are none.
pub(super) fn one_hot(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let indices = node.operand(0, "indices")?;
    let depth = node.required(1, "depth")?;
    let values = node.operand(2, "values")?;
    let depth = lengths("depth", &[whole_number(&depth, "depth")?])?[0];
    if node.ty(values).shape.dims() != [2] {
        return Err(OpError::shape(format!("values must be a vector of 2, got {}", node.ty(values))).into());
    }
    let mut dims = node.shape(indices).to_vec();
    let at = node.int("axis", -1)?;
    let axis = Shape::new([dims.clone(), vec![1]].concat())?.axis(at);
    let axis = axis.ok_or_else(|| {
        NodeError::attribute("axis", format!("is {at}, for indices of rank {}", dims.len()))
    })?;
    dims.insert(axis, 1);
    let rank = dims.len();
    let indices = cast_part(node, "integers", indices, DType::S64)?;
    let indices = reshape_part(node, "apart", indices, dims)?;
    let zero = node.constant_part("zero", Tensor::scalar(0i64));
    let length = node.constant_part("depth", Tensor::scalar(depth as i64));
    let negative = binary_part(node, "negative", BinaryKind::Less, indices, zero)?;
    let from_back = binary_part(node, "from_back", BinaryKind::Add, indices, length)?;
    let indices = node.emit_part("places", Where {}, &[negative, from_back, indices])?;
    let steps = counting_along(node, "steps", depth, axis, rank)?;
    let hot = binary_part(node, "hot", BinaryKind::Equal, indices, steps)?;
    let [off, on] = [0, 1].map(|i| {
        let index = node.constant_part("which", Tensor::scalar(i as i64));
        node.emit_part(if i == 0 { "off" } else { "on" }, Gather { axis: 0 }, &[values, index])
    });
    node.emit(Where {}, &[hot, on?, off?])
}

/// 1 where the first of the largest elements along the axis is, 0 elsewhere. Before opset 13 all dimensions from the axis
/// on are one.
pub(super) fn hardmax(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let (shape, dtype) = (node.shape(x), node.ty(x).dtype);
    let coerces = node.opset() < 13;
    let given = node.int("axis", if coerces { 1 } else { -1 })?;
    let at = match shape.axis(given) {
        Some(at) => at,
        None if coerces && given == shape.rank() as i64 => shape.rank(),
        None => return Err(NodeError::attribute("axis", format!("is {given} for {}", node.ty(x)))),
    };
    let (mut lines, mut axis) = (x, at);
    if coerces {
        let dims = vec![shape[..at].iter().product(), shape[at..].iter().product()];
        lines = reshape_part(node, "matrix", x, dims)?;
        axis = 1;
    }
    let along = node.shape(lines);
    let largest = ArgExtreme { largest: true, axis, keep_dims: true, last: false };
    let largest = node.emit_part("largest", largest, &[lines])?;
    let steps = counting_along(node, "steps", along[axis], axis, along.rank())?;
    let is_largest = node.emit_part("is_largest", Binary { kind: BinaryKind::Equal }, &[largest, steps])?;
    if !coerces {
        return node.emit(Cast { to: dtype }, &[is_largest]);
    }
    let y = cast_part(node, "numbers", is_largest, dtype)?;
    super::shape::reshape_to(node, y, shape.to_vec())
}
