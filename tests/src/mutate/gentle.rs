//! Changes that leave a model well-formed: names stay defined, tensors as long as their shapes say. More of these mutants get
//! as far as kernels.

use super::{Mutator, count_graphs, nth_graph, tensors::extreme_elements};
use crate::random::Random;
use onnx_protobuf::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

impl Mutator {
    /// One of these changes, somewhere.
    pub(super) fn change(&self, model: &mut ModelProto, random: &mut Random) {
        if random.one_in(24)
            && let Some(opset) = model.opset_import.first_mut()
        {
            opset.version = (opset.version + random.below(7) as i64 - 3).clamp(7, 25);
        }
        let Some(graph) = model.graph.as_mut() else { return };
        let mut at = random.below(count_graphs(graph));
        let Some(graph) = nth_graph(graph, &mut at) else { return };
        match random.below(12) {
            0..=3 => {
                let Some(at) = random.index(&graph.node) else { return };
                self.change_attribute(&mut graph.node[at], random);
            }
            4 => self.change_op(graph, random),
            5..=6 => rewire(graph, random),
            7 => convert(graph, random),
            8..=9 => {
                let Some(at) = random.index(&graph.initializer) else { return };
                match random.below(3) {
                    0 => extreme_elements(&mut graph.initializer[at], random),
                    1 => resize(&mut graph.initializer[at], random),
                    _ => regroup(&mut graph.initializer[at].dims, random),
                }
            }
            10 => {
                let Some(at) = random.index(&graph.input) else { return };
                change_dimension(&mut graph.input[at], random);
            }
            _ => {
                let Some(at) = random.index(&graph.node) else { return };
                if let Some(slot) = random.index(&graph.node[at].input) {
                    graph.node[at].input[slot].clear();
                }
            }
        }
    }

    /// A small number in the place of another, or what another node says of the same attribute.
    fn change_attribute(&self, node: &mut NodeProto, random: &mut Random) {
        let at = random.index(&node.attribute);
        let other = (0..16).find_map(|_| self.any_node(random).filter(|n| n.op_type == node.op_type));
        let Some(at) = at.filter(|_| !random.one_in(6)) else {
            // One that the op has elsewhere.
            let taken = other.and_then(|n| random.pick(&n.attribute).cloned());
            node.attribute.extend(taken.filter(|a| node.attribute.iter().all(|own| own.name != a.name)));
            return;
        };
        let a = &mut node.attribute[at];
        let same = |n: NodeProto| n.attribute.into_iter().find(|o| o.name == a.name && o.type_ == a.type_);
        if let Some(same) = other.and_then(same).filter(|_| random.one_in(3)) {
            *a = same;
            return;
        }
        self.change_value(a, random);
    }

    fn change_value(&self, a: &mut AttributeProto, random: &mut Random) {
        const SMALL: [i64; 12] = [0, 1, 2, 3, 4, 5, 8, 16, 33, -1, -2, -3];
        let mut small = || SMALL[random.below(SMALL.len())];
        match a.type_.enum_value_or_default() {
            AttributeType::INT => a.i = small(),
            AttributeType::INTS if !a.ints.is_empty() => {
                let value = small();
                let at = random.below(a.ints.len());
                a.ints[at] = value;
            }
            AttributeType::STRING => {
                // A word that some op knows, mostly the one of another mode.
                let word = (0..32).find_map(|_| {
                    let node = self.any_node(random)?;
                    node.attribute.into_iter().find(|o| o.name == a.name).map(|o| o.s)
                });
                a.s = word.unwrap_or_default();
            }
            AttributeType::TENSOR => {
                if let Some(t) = a.t.as_mut() {
                    extreme_elements(t, random);
                }
            }
            AttributeType::GRAPH => {}
            _ => self.mutate_value(a, random),
        }
    }

    /// Another op that takes and gives as many values.
    fn change_op(&self, graph: &mut GraphProto, random: &mut Random) {
        let Some(at) = random.index(&graph.node) else { return };
        let node = &mut graph.node[at];
        let fits = |n: &NodeProto| n.input.len() == node.input.len() && n.output.len() == node.output.len();
        if let Some(other) = (0..16).find_map(|_| self.any_node(random).filter(fits)) {
            (node.op_type, node.domain, node.attribute) = (other.op_type, other.domain, other.attribute);
        }
    }
}

/// An operand becomes another value that is there by then.
fn rewire(graph: &mut GraphProto, random: &mut Random) {
    let Some(at) = random.index(&graph.node) else { return };
    let before = graph.node[..at].iter().flat_map(|n| &n.output);
    let constants = graph.initializer.iter().map(|t| &t.name);
    let known = graph.input.iter().map(|i| &i.name).chain(constants).chain(before);
    let known: Vec<String> = known.filter(|n| !n.is_empty()).cloned().collect();
    let slot = random.index(&graph.node[at].input);
    if let (Some(slot), Some(name)) = (slot, random.pick(&known)) {
        graph.node[at].input[slot].clone_from(name);
    }
}

/// Converts an operand to another element type.
fn convert(graph: &mut GraphProto, random: &mut Random) {
    let Some(at) = random.index(&graph.node) else { return };
    let Some(slot) = random.index(&graph.node[at].input) else { return };
    let name = graph.node[at].input[slot].clone();
    if name.is_empty() {
        return;
    }
    let result = format!("{name} converted {}", random.below(1000));
    let to = AttributeProto {
        name: "to".into(),
        type_: AttributeType::INT.into(),
        i: 1 + random.below(16) as i64,
        ..Default::default()
    };
    let cast = NodeProto {
        op_type: "Cast".into(),
        input: vec![name],
        output: vec![result.clone()],
        attribute: vec![to],
        ..Default::default()
    };
    graph.node[at].input[slot] = result;
    graph.node.insert(at, cast);
}

/// Another length of an axis, with as many elements as that takes.
fn resize(t: &mut TensorProto, random: &mut Random) {
    const LENGTHS: [i64; 8] = [0, 1, 2, 3, 5, 8, 17, 33];
    let elements =
        |dims: &[i64]| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
    let Some(old) = elements(&t.dims).filter(|&n| n > 0) else { return };
    let Some(axis) = random.index(&t.dims) else { return };
    let mut dims = t.dims.clone();
    dims[axis] = LENGTHS[random.below(LENGTHS.len())];
    let Some(new) = elements(&dims).filter(|&n| n <= 1 << 16) else { return };
    t.dims = dims;
    cycle(&mut t.raw_data, old, new);
    cycle(&mut t.float_data, old, new);
    cycle(&mut t.int32_data, old, new);
    cycle(&mut t.int64_data, old, new);
    cycle(&mut t.double_data, old, new);
    cycle(&mut t.uint64_data, old, new);
    cycle(&mut t.string_data, old, new);
}

/// What `old` elements were is repeated or cut to `new` ones.
fn cycle<T: Clone>(data: &mut Vec<T>, old: usize, new: usize) {
    // Four bits lie in half a byte: such tensors become too long, and are refused.
    let len = (data.len() / old).max(1) * new;
    *data = if data.is_empty() { Vec::new() } else { data.iter().cycle().take(len).cloned().collect() };
}

/// Other dimensions of as many elements.
fn regroup(dims: &mut Vec<i64>, random: &mut Random) {
    match (random.below(3), random.index(dims)) {
        (0, Some(at)) if dims.len() > 1 => {
            let other = random.below(dims.len());
            dims.swap(at, other);
        }
        (1, Some(at)) if at + 1 < dims.len() => {
            let next = dims.remove(at + 1);
            dims[at] = dims[at].saturating_mul(next);
        }
        _ => dims.insert(random.below(dims.len() + 1), 1),
    }
}

/// Another length, or any, of an axis of an input.
fn change_dimension(info: &mut ValueInfoProto, random: &mut Random) {
    let ty = info.type_.as_mut().and_then(|t| t.value.as_mut());
    let Some(type_proto::Value::TensorType(ty)) = ty else { return };
    let Some(shape) = ty.shape.as_mut() else { return };
    let Some(at) = random.index(&shape.dim) else { return };
    const LENGTHS: [i64; 8] = [0, 1, 2, 3, 5, 7, 17, 40];
    let value = match random.one_in(4) {
        true => dimension::Value::DimParam("N".into()),
        false => dimension::Value::DimValue(LENGTHS[random.below(LENGTHS.len())]),
    };
    shape.dim[at] = Dimension { value: Some(value), ..Default::default() };
}
