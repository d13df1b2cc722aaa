//! Sequences and optional values: what import knows the elements of. None of them is in a graph; their tensors are.

use super::{compose::Result, elementwise};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{
        NodeError,
        attribute::Attribute,
        body::NodeDef,
        import::{Held, Node},
        splice::{constant, node as def, splice, with},
    },
    ops::SliceSpec,
};

/// The elements of an operand that is a sequence.
fn elements(
    node: &mut Node<'_, '_>,
    slot: usize,
    role: &'static str,
) -> Result<(Vec<ValueId>, Option<DType>)> {
    match node.held(slot) {
        Some(Held::Sequence(elements, dtype)) => Ok((elements, dtype)),
        Some(_) => Err(OpError::dtype(format!("{role} is no sequence")).into()),
        None => Err(NodeError::MissingOperand { slot, role }),
    }
}

fn sequence(node: &Node<'_, '_>, elements: Vec<ValueId>, dtype: Option<DType>) -> Result<Vec<Held>> {
    let dtype = elements.first().map(|&v| node.ty(v).dtype).or(dtype);
    if let Some(&other) = elements.iter().find(|&&v| Some(node.ty(v).dtype) != dtype) {
        return Err(OpError::dtype(format!("{} among elements of another type", node.ty(other))).into());
    }
    Ok(vec![Held::Sequence(elements, dtype)])
}

pub(super) fn sequence_construct(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let elements = node.operands("inputs")?;
    sequence(node, elements, None)
}

pub(super) fn sequence_empty(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let dtype = elementwise::dtype("dtype", node.int("dtype", 1)?)?;
    sequence(node, Vec::new(), Some(dtype))
}

/// The place that an operand names among `count`, counted from the back where negative.
fn position(node: &mut Node<'_, '_>, slot: usize, count: usize) -> Result<Option<usize>> {
    let Some(t) = node.known(slot, "position")? else { return Ok(None) };
    let given = match t.to_i64().as_deref() {
        Some(&[i]) => i,
        _ => return Err(OpError::shape(format!("position must be one integer, got {}", t.ty())).into()),
    };
    let from_front = if given < 0 { given.saturating_add(count as i64) } else { given };
    let at = usize::try_from(from_front).ok().filter(|&i| i <= count);
    at.map(Some).ok_or_else(|| OpError::shape(format!("position {given} of {count} elements")).into())
}

pub(super) fn sequence_at(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let (elements, _) = elements(node, 0, "input_sequence")?;
    let at =
        position(node, 1, elements.len())?.ok_or(NodeError::MissingOperand { slot: 1, role: "position" })?;
    let element = elements.get(at).copied();
    let count = elements.len();
    element
        .map(|v| vec![Held::Value(v)])
        .ok_or_else(|| OpError::shape(format!("position {at} of {count} elements")).into())
}

pub(super) fn sequence_insert(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let (mut elements, dtype) = elements(node, 0, "input_sequence")?;
    let new = node.operand(1, "tensor")?;
    let at = position(node, 2, elements.len())?.unwrap_or(elements.len());
    elements.insert(at, new);
    sequence(node, elements, dtype)
}

pub(super) fn sequence_erase(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let (mut elements, dtype) = elements(node, 0, "input_sequence")?;
    let last = elements.len().saturating_sub(1);
    let at = position(node, 1, elements.len())?.unwrap_or(last);
    if at >= elements.len() {
        return Err(OpError::shape(format!("position {at} of {} elements", elements.len())).into());
    }
    elements.remove(at);
    sequence(node, elements, dtype)
}

pub(super) fn sequence_length(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let (elements, _) = elements(node, 0, "input_sequence")?;
    Ok(vec![Held::Value(node.constant(Tensor::scalar(elements.len() as i64)))])
}

/// Parts of a tensor along an axis: of one length each, or of lengths of their own.
pub(super) fn split_to_sequence(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let x = node.operand(0, "input")?;
    let axis = node.axis_of("axis", 0, x)?;
    let keeps = node.flag("keepdims", true)?;
    let extent = node.shape(x)[axis];
    let split = node.known(1, "split")?;
    let lengths = match &split {
        None => vec![1; extent],
        Some(t) => {
            let given = super::lengths("split", &t.to_i64().unwrap_or_default())?;
            match (t.shape().rank(), &given[..]) {
                (0, &[each]) if each > 0 => {
                    (0..extent.div_ceil(each)).map(|i| each.min(extent - i * each)).collect()
                }
                (1, _) if given.iter().fold(0usize, |n, &l| n.saturating_add(l)) == extent => given,
                _ => return Err(OpError::shape(format!("parts {given:?} of {extent}")).into()),
            }
        }
    };
    let (mut start, mut parts) = (0, Vec::new());
    for (i, len) in lengths.into_iter().enumerate() {
        let part = node.sliced(&format!("part{i}"), axis, SliceSpec { start, len, step: 1 }, x)?;
        start += len;
        parts.push(match split.is_none() && !keeps {
            true => {
                let mut dims = node.shape(part).to_vec();
                dims.remove(axis);
                node.shaped(&format!("element{i}"), dims, part)?
            }
            false => part,
        });
    }
    let dtype = node.ty(x).dtype;
    sequence(node, parts, Some(dtype))
}

pub(super) fn concat_from_sequence(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let (mut elements, _) = elements(node, 0, "input_sequence")?;
    let stacks = node.flag("new_axis", false)?;
    let Some(&first) = elements.first() else {
        return Err(OpError::shape("puts together the elements of an empty sequence").into());
    };
    let given = node.optional_int("axis")?.ok_or_else(|| NodeError::attribute("axis", "is missing"))?;
    let mut shape = node.shape(first).to_vec();
    if stacks {
        shape.push(1);
    }
    let axis = Shape::new(shape.clone())?.axis(given);
    let axis =
        axis.ok_or_else(|| NodeError::attribute("axis", format!("is {given} for {}", node.ty(first))))?;
    if stacks {
        for (i, element) in elements.iter_mut().enumerate() {
            let mut dims = node.shape(*element).to_vec();
            if axis > dims.len() {
                return Err(OpError::shape(format!("{} among others", node.ty(*element))).into());
            }
            dims.insert(axis, 1);
            *element = node.shaped(&format!("row{i}"), dims, *element)?;
        }
    }
    Ok(vec![Held::Value(node.joined("", axis, &elements)?)])
}

/// A value that is there, or none.
pub(super) fn optional(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    // The type of what is not there.
    node.ignore(&["type"]);
    Ok(vec![node.held(0).unwrap_or(Held::Absent)])
}

pub(super) fn optional_has_element(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let is_there = !matches!(node.held(0), None | Some(Held::Absent));
    let truth = Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![is_there.into()]);
    Ok(vec![Held::Value(node.constant(truth.map_err(OpError::from)?))])
}

pub(super) fn optional_get_element(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    match node.held(0) {
        None | Some(Held::Absent) => Err(OpError::shape("takes a value that is not there").into()),
        Some(held) => Ok(vec![held]),
    }
}

pub(super) fn identity(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    match node.held(0) {
        Some(held) => Ok(vec![held]),
        None => Err(NodeError::MissingOperand { slot: 0, role: "input" }),
    }
}

/// A graph for each element of sequences; tensors among the operands are the same each time.
pub(super) fn sequence_map(node: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let body = node.graph_attribute("body")?;
    let (operands, outputs) = (node.operand_names(), node.result_names());
    let held: Vec<Option<Held>> = (0..operands.len()).map(|slot| node.held(slot)).collect();
    let (count, _) = elements(node, 0, "input_sequence")?;
    let count = count.len();
    if body.inputs.len() != operands.len() || body.outputs.len() < outputs.len() {
        let why =
            format!("the body takes {} inputs and has {} results", body.inputs.len(), body.outputs.len());
        return Err(OpError::shape(why).into());
    }
    let prefix = node.splice_prefix();
    let (mut nodes, mut results) = (Vec::new(), vec![Vec::new(); outputs.len()]);
    for i in 0..count {
        let index = format!("{prefix}{i}/index");
        nodes.push(constant(&index, Tensor::scalar(i as i64)));
        let mut inputs = Vec::new();
        for (slot, (name, held)) in operands.iter().zip(&held).enumerate() {
            inputs.push(match held {
                Some(Held::Sequence(all, _)) if all.len() != count => {
                    let why = format!("sequences of {count} and {} elements", all.len());
                    return Err(OpError::shape(why).into());
                }
                Some(Held::Sequence(..)) => {
                    let element = format!("{prefix}{i}/element {slot}");
                    nodes.push(def("SequenceAt", &element, &[name, &index], &element));
                    element
                }
                _ => (*name).to_owned(),
            });
        }
        let names: Vec<String> = (0..outputs.len()).map(|o| format!("{prefix}{i}/result {o}")).collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let wanted: Vec<&str> = names.iter().map(String::as_str).collect();
        nodes.extend(splice(body, &format!("{prefix}{i}/"), &inputs, &wanted));
        results.iter_mut().zip(names).for_each(|(all, name)| all.push(name));
    }
    for (o, (all, output)) in results.iter().zip(&outputs).enumerate().filter(|(_, (_, o))| !o.is_empty()) {
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        nodes.push(match all.is_empty() {
            false => def("SequenceConstruct", output, &all, output),
            true => {
                let code = body.outputs[o].1.map_or(1, crate::onnx::tensor::dtype_code);
                with(def("SequenceEmpty", output, &[], output), "dtype", Attribute::Int(code.into()))
            }
        });
    }
    Ok(nodes)
}
