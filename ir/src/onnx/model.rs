//! A model file, parsed and checked as far as that does not need shapes.

use super::{
    ImportError,
    attribute::{self, Attribute},
    external::ExternalFiles,
    tensor, wire,
};
use crate::{DType, Tensor, limits::MAX_MODEL_BYTES};
use bytes::Bytes;
use onnx_protobuf::{
    GraphProto, Message, ModelProto, NodeProto, ValueInfoProto, tensor_shape_proto::dimension, type_proto,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    fs,
    path::Path,
};

/// Versions of the `ai.onnx` operator set that import knows.
pub const OPSETS: std::ops::RangeInclusive<i64> = 7..=24;

/// Versions of the file format that import knows.
const IR_VERSIONS: std::ops::RangeInclusive<i64> = 3..=14;

/// One dimension of an input as the model declares it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Dim {
    /// A number.
    Known(usize),
    /// A name, such as `N`; equal names are equal numbers.
    Symbol(String),
    /// Neither.
    Unknown,
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// An input of a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InputInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions; `None` where the model declares no rank.
    pub dims: Option<Vec<Dim>>,
}

/// A node as the file has it, with its tensors decoded.
pub(super) struct NodeDef {
    /// The node's name; its first output's where it has none.
    pub(super) name: String,
    pub(super) op: String,
    /// Empty for ONNX itself.
    pub(super) domain: String,
    /// An empty name is an operand that is left out.
    pub(super) inputs: Vec<String>,
    /// An empty name is a result that is not wanted.
    pub(super) outputs: Vec<String>,
    pub(super) attributes: BTreeMap<String, Attribute>,
}

/// An ONNX model: parsed, validated, independent of input shapes.
///
/// Cloned weights share their bytes, and so do the graphs made by [`graph`](Model::graph).
pub struct Model {
    pub(super) name: String,
    ir_version: i64,
    pub(super) opsets: BTreeMap<String, i64>,
    pub(super) inputs: Vec<InputInfo>,
    /// Names of the results and the element types that the file declares for them.
    pub(super) outputs: Vec<(String, Option<DType>)>,
    pub(super) initializers: BTreeMap<String, Tensor>,
    /// Producers before consumers.
    pub(super) nodes: Vec<NodeDef>,
}

impl Model {
    /// Reads a model file. External data is read from the model's folder, and from nowhere else.
    pub fn load(path: &Path) -> Result<Model, ImportError> {
        let read = |source| ImportError::Read { path: path.into(), source };
        let meta = fs::metadata(path).map_err(read)?;
        if !meta.is_file() {
            return Err(read(std::io::Error::other("not a regular file")));
        }
        if meta.len() > MAX_MODEL_BYTES as u64 {
            return Err(ImportError::NotAModel(format!(
                "the file has {} bytes, and protocol buffers end at {MAX_MODEL_BYTES}",
                meta.len()
            )));
        }
        let bytes = fs::read(path).map_err(read)?;
        Model::read(&bytes, &mut ExternalFiles::beside(path))
    }

    /// Parses a model that is in memory. Refuses external data: there is no folder to look for it.
    pub fn parse(bytes: impl Into<Bytes>) -> Result<Model, ImportError> {
        Model::read(&bytes.into(), &mut ExternalFiles::none())
    }

    fn read(bytes: &[u8], files: &mut ExternalFiles) -> Result<Model, ImportError> {
        if bytes.len() > MAX_MODEL_BYTES {
            return Err(ImportError::NotAModel(format!("it has more than {MAX_MODEL_BYTES} bytes")));
        }
        if let Some(what) = wire::what_else(bytes) {
            return Err(ImportError::NotAModel(what));
        }
        wire::scan(bytes)?;
        let proto = ModelProto::parse_from_bytes(bytes).map_err(|e| ImportError::Parse(e.to_string()))?;
        Model::validate(proto, files)
    }

    fn validate(mut proto: ModelProto, files: &mut ExternalFiles) -> Result<Model, ImportError> {
        let Some(mut graph) = proto.graph.take() else {
            return Err(ImportError::NotAModel("it has no graph".into()));
        };
        let opsets = opsets(&proto)?;
        if !proto.functions.is_empty() {
            // A node that calls one has the function's domain, and is listed as not supported.
            check_function_names(&proto)?;
        }
        let initializers = initializers(&mut graph, files)?;
        let nodes = std::mem::take(&mut graph.node)
            .into_iter()
            .enumerate()
            .map(|(i, n)| node(i, n, files))
            .collect::<Result<Vec<_>, _>>()?;
        let inputs = inputs(&graph, &initializers)?;
        let outputs = graph.output.iter().map(output).collect::<Result<Vec<_>, _>>()?;
        let nodes = in_order(nodes, &inputs, &initializers, &outputs)?;
        let name = if graph.name.is_empty() { "model".into() } else { graph.name };
        Ok(Model { name, ir_version: proto.ir_version, opsets, inputs, outputs, initializers, nodes })
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The inputs that a caller supplies, in the model's order. An initializer that is declared as an input is not one.
    pub fn inputs(&self) -> &[InputInfo] {
        &self.inputs
    }

    /// Names of the results, in the model's order.
    pub fn outputs(&self) -> impl Iterator<Item = &str> {
        self.outputs.iter().map(|(name, _)| name.as_str())
    }

    /// Version of the file format.
    pub fn ir_version(&self) -> i64 {
        self.ir_version
    }

    /// Version of the `ai.onnx` operator set; 0 where the model imports others only.
    pub fn opset(&self) -> i64 {
        self.opsets.get("").copied().unwrap_or(0)
    }

    /// How often each op occurs, by name; those of other domains as `domain::name`.
    pub fn op_histogram(&self) -> BTreeMap<String, usize> {
        let mut histogram = BTreeMap::new();
        for n in &self.nodes {
            let key = match n.domain.as_str() {
                "" => n.op.clone(),
                domain => format!("{domain}::{}", n.op),
            };
            *histogram.entry(key).or_insert(0) += 1;
        }
        histogram
    }

    /// Bytes of all stored weights.
    pub fn weight_bytes(&self) -> usize {
        self.initializers.values().map(|t| t.bytes().len()).sum()
    }
}

fn structure<T>(why: String) -> Result<T, ImportError> {
    Err(ImportError::Structure(why))
}

/// The domain's canonical name: ONNX's own may be spelled out.
fn canonical(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn opsets(proto: &ModelProto) -> Result<BTreeMap<String, i64>, ImportError> {
    let version = |why: String| Err(ImportError::Version(why));
    if proto.ir_version == 0 && proto.opset_import.is_empty() {
        return Err(ImportError::NotAModel("it has neither an IR version nor an opset".into()));
    }
    if !IR_VERSIONS.contains(&proto.ir_version) {
        return version(format!(
            "the model's IR version is {}; supported are {} to {}",
            proto.ir_version,
            IR_VERSIONS.start(),
            IR_VERSIONS.end()
        ));
    }
    if proto.opset_import.is_empty() {
        return version("the model does not say which opset it uses (opset_import is missing)".into());
    }
    let mut opsets = BTreeMap::new();
    for import in &proto.opset_import {
        let domain = canonical(&import.domain);
        if domain.is_empty() && !OPSETS.contains(&import.version) {
            return version(format!(
                "the model uses opset {}; supported are {} to {}",
                import.version,
                OPSETS.start(),
                OPSETS.end()
            ));
        }
        match opsets.insert(domain.to_owned(), import.version) {
            Some(other) if other != import.version => {
                let domain = if domain.is_empty() { "ai.onnx" } else { domain };
                return version(format!("opsets {other} and {} of domain {domain} at once", import.version));
            }
            _ => {}
        }
    }
    Ok(opsets)
}

fn check_function_names(proto: &ModelProto) -> Result<(), ImportError> {
    let mut seen = BTreeSet::new();
    for f in &proto.functions {
        if !seen.insert((&f.domain, &f.name, &f.overload)) {
            return structure(format!("function `{}` of domain {:?} is defined twice", f.name, f.domain));
        }
    }
    Ok(())
}

fn initializers(
    graph: &mut GraphProto,
    files: &mut ExternalFiles,
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
    for mut t in std::mem::take(&mut graph.initializer) {
        let name = std::mem::take(&mut t.name);
        let tensor = tensor::decode(t, &name, files)?;
        keep(name, tensor)?;
    }
    for sparse in std::mem::take(&mut graph.sparse_initializer) {
        let name = sparse.values.name.clone();
        let tensor = tensor::decode_sparse(sparse, &name, files)?;
        keep(name, tensor)?;
    }
    Ok(initializers)
}

fn node(index: usize, n: NodeProto, files: &mut ExternalFiles) -> Result<NodeDef, ImportError> {
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
    let attributes = attribute::decode_all(&name, &n.op_type, n.attribute, files)?;
    let domain = canonical(&n.domain).to_owned();
    Ok(NodeDef { name, op: n.op_type, domain, inputs: n.input, outputs: n.output, attributes })
}

fn inputs(
    graph: &GraphProto,
    initializers: &BTreeMap<String, Tensor>,
) -> Result<Vec<InputInfo>, ImportError> {
    let mut seen = BTreeSet::new();
    let mut inputs = Vec::new();
    for v in &graph.input {
        if v.name.is_empty() {
            return structure("an input has no name".into());
        }
        if !seen.insert(v.name.as_str()) {
            return structure(format!("two inputs have the name `{}`", v.name));
        }
        let info = input(v)?;
        match initializers.get(&v.name) {
            None => inputs.push(info),
            Some(default) => check_default(&info, default)?,
        }
    }
    Ok(inputs)
}

fn input(v: &ValueInfoProto) -> Result<InputInfo, ImportError> {
    let refuse = |reason: String| ImportError::Input { input: v.name.clone(), reason };
    let Some(type_proto::Value::TensorType(ty)) = v.type_.as_ref().and_then(|t| t.value.as_ref()) else {
        return Err(refuse("only inputs that are tensors are supported".into()));
    };
    let dtype = tensor::dtype(ty.elem_type).map_err(refuse)?;
    let dim = |d: &onnx_protobuf::tensor_shape_proto::Dimension| match &d.value {
        Some(dimension::Value::DimValue(n)) => {
            let n = usize::try_from(*n).map_err(|_| refuse(format!("dimension {n} is negative")))?;
            Ok(Dim::Known(n))
        }
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => Ok(Dim::Symbol(name.clone())),
        _ => Ok(Dim::Unknown),
    };
    let dims = ty.shape.as_ref().map(|s| s.dim.iter().map(dim).collect::<Result<Vec<_>, _>>()).transpose()?;
    Ok(InputInfo { name: v.name.clone(), dtype, dims })
}

/// An initializer that is declared as an input, too, is a constant (before IR version 4 all had to be declared).
fn check_default(declared: &InputInfo, default: &Tensor) -> Result<(), ImportError> {
    let fits = |dims: &Vec<Dim>| {
        let shape = default.shape();
        let agrees = |(d, &n): (&Dim, &usize)| !matches!(d, Dim::Known(k) if *k != n);
        dims.len() == shape.rank() && dims.iter().zip(shape.iter()).all(agrees)
    };
    if declared.dtype == default.dtype() && declared.dims.as_ref().is_none_or(fits) {
        return Ok(());
    }
    Err(ImportError::Input {
        input: declared.name.clone(),
        reason: format!(
            "the initializer of this name is {}, which is not what the input declares",
            default.ty()
        ),
    })
}

fn output(v: &ValueInfoProto) -> Result<(String, Option<DType>), ImportError> {
    if v.name.is_empty() {
        return structure("an output of the graph has no name".into());
    }
    let dtype = match v.type_.as_ref().and_then(|t| t.value.as_ref()) {
        Some(type_proto::Value::TensorType(t)) if t.elem_type != 0 => {
            let refuse = |why| ImportError::Structure(format!("output `{}`: {why}", v.name));
            Some(tensor::dtype(t.elem_type).map_err(refuse)?)
        }
        _ => None,
    };
    Ok((v.name.clone(), dtype))
}

/// Checks that names define a graph, and sorts nodes so that producers come first; otherwise in the file's order.
fn in_order(
    nodes: Vec<NodeDef>,
    inputs: &[InputInfo],
    initializers: &BTreeMap<String, Tensor>,
    outputs: &[(String, Option<DType>)],
) -> Result<Vec<NodeDef>, ImportError> {
    let given: BTreeSet<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
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
    for (name, _) in outputs {
        if !is_given(name) && !producer.contains_key(name.as_str()) {
            return structure(format!("output `{name}` of the graph is not the result of any node"));
        }
        if !seen.insert(name) {
            return structure(format!("two outputs of the graph have the name `{name}`"));
        }
    }
    let order = sort(&nodes, &producer, is_given)?;
    let mut slots: Vec<Option<NodeDef>> = nodes.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|i| slots[i].take()).collect())
}

/// Indices of nodes, producers first; among those that are ready, the first in the file first.
fn sort(
    nodes: &[NodeDef],
    producer: &BTreeMap<&str, usize>,
    is_given: impl Fn(&str) -> bool,
) -> Result<Vec<usize>, ImportError> {
    let mut consumers = vec![Vec::new(); nodes.len()];
    let mut waiting = vec![0usize; nodes.len()];
    for (i, n) in nodes.iter().enumerate() {
        for name in n.inputs.iter().filter(|name| !name.is_empty() && !is_given(name)) {
            let Some(&p) = producer.get(name.as_str()) else {
                return structure(format!(
                    "node `{}` ({}) uses `{name}`, which nothing defines",
                    n.name, n.op
                ));
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
fn cycle(nodes: &[NodeDef], producer: &BTreeMap<&str, usize>, waiting: &[usize]) -> String {
    // Every node that waits has a producer that waits, so going back ends in a cycle.
    let back = |i: usize| {
        let producers = nodes[i].inputs.iter().filter_map(|name| producer.get(name.as_str()).copied());
        producers.into_iter().find(|&p| waiting[p] > 0)
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
