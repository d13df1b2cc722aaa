//! Constants, and what shapes tell.

use crate::{
    OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Expand, Reshape},
};

pub(super) fn constant(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let mut found = Vec::new();
    found.extend(node.tensor("value")?);
    if node.opset() >= 11 {
        found.extend(node.tensor("sparse_value")?);
    }
    if node.opset() >= 12 {
        found.extend(node.optional_float("value_float")?.map(Tensor::scalar));
        found.extend(node.optional_int("value_int")?.map(Tensor::scalar));
        if let Some(v) = node.floats("value_floats")? {
            found.push(vector(v)?);
        }
        if let Some(v) = node.ints("value_ints")? {
            found.push(vector(v)?);
        }
    }
    let mut found = found.into_iter();
    match (found.next(), found.next()) {
        (Some(value), None) => Ok(node.constant(value)),
        _ => Err(NodeError::attribute(
            "value",
            "or one of its other forms must stand once, and not be a string",
        )),
    }
}

fn vector<T: crate::Element>(elements: Vec<T>) -> Result<Tensor, NodeError> {
    let shape = Shape::new([elements.len()])?;
    Ok(Tensor::from_vec(shape, elements).map_err(OpError::from)?)
}

pub(super) fn constant_of_shape(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let dims = node.known_ints(0, "input")?.ok_or(NodeError::MissingOperand { slot: 0, role: "input" })?;
    let shape = Shape::new(super::lengths("input", &dims)?)?;
    let value = match node.tensor("value")? {
        Some(v) if v.shape().elements() == 1 => v,
        Some(v) => {
            return Err(NodeError::attribute("value", format!("must have one element, not {}", v.ty())));
        }
        None => Tensor::scalar(0f32),
    };
    let element = node.constant_part("value", value);
    let scalar = node.emit_part("scalar", Reshape { shape: Shape::scalar() }, &[element])?;
    node.emit(Expand { shape }, &[scalar])
}

/// The dimensions, of which `start` and `end` (from opset 15) choose a part.
pub(super) fn shape(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let rank = shape.rank() as i64;
    let (start, end) = match node.opset() >= 15 {
        true => (node.int("start", 0)?, node.int("end", rank)?),
        false => (0, rank),
    };
    let place = |i: i64| (if i < 0 { i.saturating_add(rank) } else { i }).clamp(0, rank) as usize;
    let part = shape.get(place(start)..place(end)).unwrap_or_default();
    let dims = part.iter().map(|&d| d as i64).collect();
    Ok(node.constant(vector::<i64>(dims)?))
}

pub(super) fn size(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let elements = node.ty(x).shape.elements() as i64;
    Ok(node.constant(Tensor::scalar(elements)))
}
