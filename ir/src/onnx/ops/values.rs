//! Ops whose results have a shape that follows from values: they are computed here.

use super::{lengths, shape::reshape_part};
use crate::{
    DType, Element, OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Gather, by_size},
    tensor::with_element,
};
use std::cmp::Ordering;

/// `start`, `start + delta`… while `limit` is not reached.
pub(super) fn range(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let start = node.required(0, "start")?;
    let limit = node.required(1, "limit")?;
    let delta = node.required(2, "delta")?;
    let parts = [&start, &limit, &delta];
    let dtype = start.dtype();
    if parts.iter().any(|t| t.dtype() != dtype || t.shape().elements() != 1) || dtype == DType::Bool {
        let types = parts.map(|t| t.ty().to_string()).join(", ");
        return Err(OpError::dtype(format!("takes three numbers of one type, got {types}")).into());
    }
    match dtype {
        DType::F64 => {
            let number = |t: &Tensor| t.as_slice::<f64>().map(|v| v[0]).map_err(OpError::from);
            let (start, limit, delta) = (number(&start)?, number(&limit)?, number(&delta)?);
            let n = steps_of_floats(start, limit, delta)?;
            progression(node, dtype, n, |i| start + i as f64 * delta)
        }
        _ if dtype.is_float() => {
            let number = |t: &Tensor| t.to_f32().map_or(f32::NAN, |v| v[0]);
            let (start, limit, delta) = (number(&start), number(&limit), number(&delta));
            let n = steps_of_floats(start.into(), limit.into(), delta.into())?;
            let at = |i: usize| start + i as f32 * delta;
            match dtype {
                DType::F32 => progression(node, dtype, n, at),
                DType::F16 => progression(node, dtype, n, |i| half::f16::from_f32(at(i))),
                _ => progression(node, dtype, n, |i| half::bf16::from_f32(at(i))),
            }
        }
        _ => {
            let number = |t: &Tensor| t.to_i64().map_or(0, |v| v[0]).into();
            let (start, limit, delta): (i128, i128, i128) = (number(&start), number(&limit), number(&delta));
            if delta == 0 {
                return Err(OpError::attribute("delta is 0").into());
            }
            let (span, step) = if delta > 0 { (limit - start, delta) } else { (start - limit, -delta) };
            let n = usize::try_from((span.max(0) + step - 1) / step).unwrap_or(usize::MAX);
            let at = |i: usize| start + i as i128 * delta;
            match dtype {
                DType::S64 => progression(node, dtype, n, |i| at(i) as i64),
                DType::S32 => progression(node, dtype, n, |i| at(i) as i32),
                DType::S16 => progression(node, dtype, n, |i| at(i) as i16),
                _ => Err(OpError::dtype(format!("takes floats, s16, s32 or s64, got {dtype}")).into()),
            }
        }
    }
}

fn steps_of_floats(start: f64, limit: f64, delta: f64) -> Result<usize, NodeError> {
    let steps = ((limit - start) / delta).ceil();
    match steps.is_finite() {
        // Saturates: what is too much is refused by its size.
        true => Ok(steps.max(0.0) as usize),
        false => {
            let why = format!("from {start} to {limit} by {delta} are not so many steps");
            Err(OpError::attribute(why).into())
        }
    }
}

fn progression<T: Element>(
    node: &mut Node<'_, '_>,
    dtype: DType,
    n: usize,
    at: impl Fn(usize) -> T,
) -> Result<ValueId, NodeError> {
    let shape = Shape::new([n])?;
    let ty = TensorType::new(dtype, shape.clone());
    node.computed("values", &ty, || Ok(Tensor::from_vec(shape, (0..n).map(at).collect())?))
}

/// Places as s64.
fn places(
    node: &mut Node<'_, '_>,
    part: &str,
    places: impl ExactSizeIterator<Item = i64>,
) -> Result<ValueId, NodeError> {
    let shape = Shape::new([places.len()])?;
    let ty = TensorType::new(DType::S64, shape.clone());
    node.computed(part, &ty, || Ok(Tensor::from_vec(shape, places.collect())?))
}

/// Fails for floats that are only stored: their codes are not compared.
fn check_compared(x: &Tensor) -> Result<(), NodeError> {
    match x.dtype().is_small_float() || x.dtype() == DType::Str {
        true => Err(OpError::dtype(format!("{} is only stored and moved; cast it", x.ty())).into()),
        false => Ok(()),
    }
}

/// The indices of elements that are not 0, one row for each axis.
pub(super) fn non_zero(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.required(0, "X")?;
    check_compared(&x)?;
    let found: Vec<usize> = with_element!(x.dtype(), T => {
        let zero = <T as bytemuck::Zeroable>::zeroed();
        let elements = x.as_slice::<T>().map_err(OpError::from)?;
        (0..elements.len()).filter(|&i| elements[i] != zero).collect()
    });
    let shape = Shape::new([x.shape().rank(), found.len()])?;
    let ty = TensorType::new(DType::S64, shape.clone());
    node.computed("indices", &ty, || {
        let mut indices = Vec::with_capacity(shape.elements());
        for (&stride, &extent) in x.shape().strides().iter().zip(x.shape().iter()) {
            indices.extend(found.iter().map(|&i| (i / stride % extent) as i64));
        }
        Ok(Tensor::from_vec(shape, indices)?)
    })
}

/// The slices (or elements of the flattened operand) where the condition is true.
pub(super) fn compress(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let condition = node.required(1, "condition")?;
    let shape = node.shape(x);
    let given = node.optional_int("axis")?;
    let axis = match given {
        None => 0,
        Some(a) => shape.axis(a).ok_or_else(|| {
            NodeError::attribute("axis", format!("is {a}, for a tensor of rank {}", shape.rank()))
        })?,
    };
    let length = if given.is_some() { shape[axis] } else { shape.elements() };
    let truths = condition.to_i64().filter(|_| condition.dtype() == DType::Bool).unwrap_or_default();
    if condition.dtype() != DType::Bool || condition.shape().rank() != 1 || truths.len() > length {
        let why = format!("condition {} for {length} slices of {}", condition.ty(), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let kept: Vec<usize> = (0..truths.len()).filter(|&i| truths[i] != 0).collect();
    let x = if given.is_some() { x } else { reshape_part(node, "flat", x, vec![length])? };
    let kept = places(node, "kept", kept.iter().map(|&i| i as i64))?;
    node.emit(Gather { axis }, &[x, kept])
}

/// The different slices (or elements), where each stood first, which one each is, and how often each stands. NaNs are
/// equal to each other.
pub(super) fn unique(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let sorted = node.flag("sorted", true)?;
    // What nobody reads may be as large as the rest.
    let of_slices = node.result_names().len() > 2;
    unique_of(node, sorted, of_slices)
}

/// The same, in order of size or in the order in which they come. The last two results, the group of each slice and the size
/// of each group, are there if they are asked for.
pub(super) fn unique_of(
    node: &mut Node<'_, '_>,
    sorted: bool,
    of_slices: bool,
) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "X")?;
    let mut known = node.required(0, "X")?;
    if known.dtype() == DType::Str {
        known = super::strings::ranks(node, &known)?;
    }
    check_compared(&known)?;
    let shape = known.shape().clone();
    let (x, axis, shape) = match node.optional_int("axis")? {
        None => {
            let flat = vec![shape.elements()];
            (reshape_part(node, "flat", x, flat.clone())?, 0, Shape::new(flat)?)
        }
        Some(a) => {
            let axis = shape.axis(a).ok_or_else(|| {
                NodeError::attribute("axis", format!("is {a}, for a tensor of rank {}", shape.rank()))
            })?;
            (x, axis, shape)
        }
    };
    let length = shape[axis];
    if u32::try_from(length).is_err() {
        return Err(OpError::too_large(format!("{length} slices are compared")).into());
    }
    // Of sorting, and of what the results take.
    let scratch = TensorType::new(DType::S64, Shape::new([length, 4])?);
    scratch.check_size()?;
    let groups = with_element!(known.dtype(), T => {
        let elements = known.as_slice::<T>().map_err(OpError::from)?;
        Groups::of(elements, &shape, axis, sorted)
    });
    let first = places(node, "first", groups.all().map(|g| g[0].into()))?;
    let mut results = vec![node.emit(Gather { axis }, &[x, first])?, first];
    if of_slices {
        results.push(places(node, "inverse", groups.of_slices().into_iter().map(i64::from))?);
        results.push(places(node, "counts", groups.all().map(|g| g.len() as i64))?);
    }
    Ok(results)
}

/// Equal slices along an axis, by number.
struct Groups {
    /// The slices, group by group.
    slices: Vec<u32>,
    /// Where each group begins and ends in them.
    groups: Vec<(u32, u32)>,
}

impl Groups {
    /// Of fewer than 2^32 slices.
    fn of<T: Element>(x: &[T], shape: &Shape, axis: usize, sorted: bool) -> Groups {
        let (length, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
        let outer: usize = shape[..axis].iter().product();
        let order = |&a: &u32, &b: &u32| {
            (0..outer)
                .flat_map(|o| {
                    let run = |i: u32| &x[(o * length + i as usize) * inner..][..inner];
                    run(a).iter().zip(run(b))
                })
                .map(|(a, b)| by_size(a, b))
                .find(|&o| o != Ordering::Equal)
                .unwrap_or(Ordering::Equal)
        };
        let mut slices: Vec<u32> = (0..length as u32).collect();
        // Stable, so that the first slice of a group is its first one in the tensor.
        slices.sort_by(order);
        let mut end = 0;
        let next = |group: &[u32]| {
            let begin = end;
            end += group.len() as u32;
            (begin, end)
        };
        let mut groups: Vec<(u32, u32)> =
            slices.chunk_by(|a, b| order(a, b) == Ordering::Equal).map(next).collect();
        if !sorted {
            groups.sort_by_key(|&(begin, _)| slices[begin as usize]);
        }
        Groups { slices, groups }
    }

    /// The slices of each group in their order.
    fn all(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.groups.iter().map(|&(begin, end)| &self.slices[begin as usize..end as usize])
    }

    /// The group of each slice.
    fn of_slices(&self) -> Vec<u32> {
        let mut of_slice = vec![0; self.slices.len()];
        for (g, group) in self.all().enumerate() {
            group.iter().for_each(|&i| of_slice[i as usize] = g as u32);
        }
        of_slice
    }
}

/// The axes that `axes` names, or all; each once.
pub(super) fn some_axes(node: &mut Node<'_, '_>, shape: &Shape) -> Result<Vec<usize>, NodeError> {
    let Some(given) = node.ints("axes")? else { return Ok((0..shape.rank()).collect()) };
    super::reduce::axes("axes", shape, &given)?;
    Ok(given.iter().filter_map(|&a| shape.axis(a)).collect())
}

/// The middle of longer axes, and shorter ones with as much before as behind them; what is odd goes behind.
pub(super) fn center_crop_pad(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    use crate::ops::{Pad, PadMode, Slice, SliceSpec};
    let x = node.operand(0, "input_data")?;
    let target = node.known_ints(1, "shape")?.ok_or(NodeError::MissingOperand { slot: 1, role: "shape" })?;
    let target = lengths("shape", &target)?;
    let shape = node.shape(x);
    let axes = some_axes(node, &shape)?;
    if target.len() != axes.len() {
        let why = format!("shape {target:?} for {} axes of {}", axes.len(), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let mut kept: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
    let (mut before, mut after) = (vec![0; shape.rank()], vec![0; shape.rank()]);
    for (&axis, &len) in axes.iter().zip(&target) {
        let extent = shape[axis];
        if len < extent {
            kept[axis] = SliceSpec { start: (extent - len) / 2, len, step: 1 };
        } else {
            before[axis] = (len - extent) / 2;
            after[axis] = len - extent - before[axis];
        }
    }
    let mut y = x;
    if kept.iter().zip(shape.iter()).any(|(k, &d)| k.len != d) {
        y = node.emit_part("cropped", Slice { axes: kept }, &[y])?;
    }
    if before.iter().chain(&after).any(|&p| p > 0) {
        y = node.emit(Pad { before, after, mode: PadMode::Constant { value: 0.0 } }, &[y])?;
    }
    Ok(y)
}
