//! Graphs as files have them: that of a model, of an attribute, and of a function.

use super::{
    ImportError,
    attribute::{self, Attribute},
    external::ExternalFiles,
    model::canonical,
    tensor,
    value::{self, TextTable},
};
use crate::{DType, Tensor};
use onnx_protobuf::{GraphProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
};

/// Nodes that compute values from inputs, initializers and, in a graph that is an attribute, values around it.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Body {
    /// Names of the inputs.
    pub(super) inputs: Vec<String>,
    /// Names of the results and the element types that the file declares for them.
    pub(super) outputs: Vec<(String, Option<DType>)>,
    pub(super) initializers: BTreeMap<String, Tensor>,
    /// Producers before consumers.
    pub(super) nodes: Vec<Arc<NodeDef>>,
    /// Names that the graph uses and does not define, each once.
    pub(super) captures: Vec<String>,
}

/// A node as the file has it, with its tensors decoded.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct NodeDef {
    /// The node's name; its first output's where it has none.
    pub(super) name: String,
    pub(super) op: String,
    /// Empty for ONNX itself.
    pub(super) domain: String,
    /// The version of the domain; `None` where it is not imported.
    pub(super) version: Option<i64>,
    /// An empty name is an operand that is left out.
    pub(super) inputs: Vec<String>,
    /// An empty name is a result that is not wanted.
    pub(super) outputs: Vec<String>,
    pub(super) attributes: BTreeMap<String, Attribute>,
}

impl NodeDef {
    /// Names of the values that the node reads, those that its graphs take from around it among them.
    pub(super) fn reads(&self) -> impl Iterator<Item = &str> {
        let operands = self.inputs.iter().filter(|name| !name.is_empty());
        operands.chain(self.bodies().flat_map(|body| &body.captures)).map(String::as_str)
    }

    /// The graphs among its attributes.
    pub(super) fn bodies(&self) -> impl Iterator<Item = &Body> {
        self.attributes.values().filter_map(|a| match a {
            Attribute::Graph(body) => Some(&**body),
            _ => None,
        })
    }
}

/// What decoding a graph needs besides its message.
pub(super) struct Decoder<'a> {
    /// Where external data is.
    pub(super) files: &'a mut ExternalFiles,
    /// Texts of the model so far.
    pub(super) texts: &'a mut TextTable,
    /// Versions of the domains.
    pub(super) opsets: &'a BTreeMap<String, i64>,
    /// Whether attributes may refer to those of a call.
    pub(super) in_function: bool,
}

fn structure<T>(why: String) -> Result<T, ImportError> {
    Err(ImportError::Structure(why))
}

/// Decodes a graph. `inputs` are the names of those that are no initializers.
pub(super) fn decode(
    mut graph: GraphProto,
    inputs: impl FnOnce(&GraphProto, &BTreeMap<String, Tensor>) -> Result<Vec<String>, ImportError>,
    decoder: &mut Decoder<'_>,
) -> Result<Body, ImportError> {
    let tensors = std::mem::take(&mut graph.initializer);
    let initializers = initializers(tensors, std::mem::take(&mut graph.sparse_initializer), decoder)?;
    let nodes = std::mem::take(&mut graph.node)
        .into_iter()
        .enumerate()
        .map(|(i, n)| node(i, n, decoder).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let inputs = inputs(&graph, &initializers)?;
    let outputs = graph.output.iter().map(output).collect::<Result<Vec<_>, _>>()?;
    Body { inputs, outputs, initializers, nodes, captures: Vec::new() }.in_order()
}

/// Decodes a graph that is an attribute.
pub(super) fn decode_attribute(graph: GraphProto, decoder: &mut Decoder<'_>) -> Result<Body, ImportError> {
    let names = |graph: &GraphProto, _: &BTreeMap<String, Tensor>| {
        let mut seen = BTreeSet::new();
        let names = graph.input.iter().map(|v| match (v.name.as_str(), seen.insert(&v.name)) {
            ("", _) => structure("an input of a graph in an attribute has no name".into()),
            (name, false) => structure(format!("two inputs have the name `{name}`")),
            (name, true) => Ok(name.to_owned()),
        });
        names.collect()
    };
    decode(graph, names, decoder)
}

fn initializers(
    tensors: Vec<TensorProto>,
    sparse: Vec<SparseTensorProto>,
    decoder: &mut Decoder<'_>,
) -> Result<BTreeMap<String, Tensor>, ImportError> {
    let mut initializers = BTreeMap::new();
    let mut keep = |name: String, tensor: Tensor| {
        if name.is_empty() {
            return structure("an initializer has no name".into());
        }
        match initializers.insert(name.clone(), tensor) {
            Some(_) => structure(format!("two initializers have the name `{name}`")),
            None => Ok(()),
        }
    };
    for mut t in tensors {
        let name = std::mem::take(&mut t.name);
        let tensor = tensor::decode(t, &name, decoder.files, decoder.texts)?;
        keep(name, tensor)?;
    }
    for sparse in sparse {
        let name = sparse.values.name.clone();
        let tensor = tensor::decode_sparse(sparse, &name, decoder.files, decoder.texts)?;
        keep(name, tensor)?;
    }
    Ok(initializers)
}

pub(super) fn node(index: usize, n: NodeProto, decoder: &mut Decoder<'_>) -> Result<NodeDef, ImportError> {
    let name = match (n.name.as_str(), n.output.iter().find(|o| !o.is_empty())) {
        ("", Some(output)) => output.clone(),
        ("", None) => format!("{}_{index}", n.op_type),
        (name, _) => name.to_owned(),
    };
    if n.op_type.is_empty() {
        return structure(format!("node `{name}` has no op"));
    }
    if n.output.iter().all(String::is_empty) {
        return structure(format!("node `{name}` ({}) has no output", n.op_type));
    }
    let attributes = attribute::decode_all(&name, &n.op_type, n.attribute, decoder)?;
    let domain = canonical(&n.domain).to_owned();
    let version = decoder.opsets.get(&domain).copied();
    Ok(NodeDef { name, op: n.op_type, domain, version, inputs: n.input, outputs: n.output, attributes })
}

fn output(v: &ValueInfoProto) -> Result<(String, Option<DType>), ImportError> {
    if v.name.is_empty() {
        return structure("an output of the graph has no name".into());
    }
    let dtype = match v.type_.as_ref().and_then(value::kind) {
        Some((_, t)) if t.elem_type != 0 => {
            let refuse = |why| ImportError::Structure(format!("output `{}`: {why}", v.name));
            Some(tensor::dtype(t.elem_type).map_err(refuse)?)
        }
        _ => None,
    };
    Ok((v.name.clone(), dtype))
}

impl Body {
    /// Checks that names define a graph, sorts nodes so that producers come first (otherwise in the file's order), and
    /// finds what comes from around it.
    pub(super) fn in_order(self) -> Result<Body, ImportError> {
        let Body { inputs, outputs, initializers, nodes, .. } = self;
        let (nodes, captures) = in_order(nodes, &inputs, &initializers, &outputs)?;
        Ok(Body { inputs, outputs, initializers, nodes, captures })
    }
}

impl Body {
    /// Fails where a name is used that nothing defines.
    pub(super) fn check_closed(&self) -> Result<(), ImportError> {
        let Some(name) = self.captures.first() else { return Ok(()) };
        match self.nodes.iter().find(|n| n.reads().any(|r| r == name)) {
            Some(n) => {
                structure(format!("node `{}` ({}) uses `{name}`, which nothing defines", n.name, n.op))
            }
            None => structure(format!("output `{name}` of the graph is not the result of any node")),
        }
    }
}

/// The nodes with producers first, and the names that nothing here defines.
fn in_order(
    nodes: Vec<Arc<NodeDef>>,
    inputs: &[String],
    initializers: &BTreeMap<String, Tensor>,
    outputs: &[(String, Option<DType>)],
) -> Result<(Vec<Arc<NodeDef>>, Vec<String>), ImportError> {
    let given: BTreeSet<&str> = inputs.iter().map(String::as_str).collect();
    let is_given = |name: &str| given.contains(name) || initializers.contains_key(name);
    let mut producer: BTreeMap<&str, usize> = BTreeMap::new();
    for (i, n) in nodes.iter().enumerate() {
        for o in n.outputs.iter().filter(|o| !o.is_empty()) {
            if is_given(o) {
                return structure(format!(
                    "node `{}` ({}) writes `{o}`, which is an input or initializer",
                    n.name, n.op
                ));
            }
            if let Some(other) = producer.insert(o, i) {
                let other = &nodes[other];
                return structure(format!(
                    "nodes `{}` ({}) and `{}` ({}) both write `{o}`",
                    other.name, other.op, n.name, n.op
                ));
            }
        }
    }
    let mut seen = BTreeSet::new();
    if outputs.is_empty() {
        return structure("the graph has no outputs".into());
    }
    let mut captures = BTreeSet::new();
    for (name, _) in outputs {
        if !is_given(name) && !producer.contains_key(name.as_str()) {
            captures.insert(name.clone());
        }
        if !seen.insert(name) {
            return structure(format!("two outputs of the graph have the name `{name}`"));
        }
    }
    let order = sort(&nodes, &producer, is_given, &mut captures)?;
    let sorted = order.into_iter().map(|i| nodes[i].clone()).collect();
    Ok((sorted, captures.into_iter().collect()))
}

/// Indices of nodes, producers first; among those that are ready, the first in the file first. Names that nothing here
/// defines go to `captures`.
fn sort(
    nodes: &[Arc<NodeDef>],
    producer: &BTreeMap<&str, usize>,
    is_given: impl Fn(&str) -> bool,
    captures: &mut BTreeSet<String>,
) -> Result<Vec<usize>, ImportError> {
    let mut consumers = vec![Vec::new(); nodes.len()];
    let mut waiting = vec![0usize; nodes.len()];
    for (i, n) in nodes.iter().enumerate() {
        for name in n.reads().filter(|name| !is_given(name)) {
            let Some(&p) = producer.get(name) else {
                captures.insert(name.to_owned());
                continue;
            };
            consumers[p].push(i);
            waiting[i] += 1;
        }
    }
    let mut ready: BinaryHeap<_> = (0..nodes.len()).filter(|&i| waiting[i] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(Reverse(i)) = ready.pop() {
        order.push(i);
        for &c in &consumers[i] {
            waiting[c] -= 1;
            if waiting[c] == 0 {
                ready.push(Reverse(c));
            }
        }
    }
    if order.len() < nodes.len() {
        return structure(format!(
            "the nodes {} depend on each other in a cycle",
            cycle(nodes, producer, &waiting)
        ));
    }
    Ok(order)
}

/// The nodes of one cycle among those that still wait, as `a` → `b` → `a`.
fn cycle(nodes: &[Arc<NodeDef>], producer: &BTreeMap<&str, usize>, waiting: &[usize]) -> String {
    // Every node that waits has a producer that waits, so going back ends in a cycle.
    let back = |i: usize| {
        let mut producers = nodes[i].reads().filter_map(|name| producer.get(name).copied());
        producers.find(|&p| waiting[p] > 0)
    };
    let mut path: Vec<usize> = Vec::new();
    let mut at = waiting.iter().position(|&w| w > 0);
    let mut place = vec![None; nodes.len()];
    while let Some(i) = at {
        if let Some(start) = place[i] {
            path.drain(..start);
            path.push(i);
            break;
        }
        place[i] = Some(path.len());
        path.push(i);
        at = back(i);
    }
    path.reverse();
    path.iter().take(12).map(|&i| format!("`{}`", nodes[i].name)).collect::<Vec<_>>().join(" → ")
}
