//! A model file, parsed and checked as far as that does not need shapes.

use super::{
    ImportError,
    body::{self, Body, Decoder},
    external::ExternalFiles,
    functions::Functions,
    splice, tensor,
    value::{self, Form, TextTable, Texts, ValueKind},
    wire,
};
use crate::{
    DType, Tensor,
    limits::{MAX_MEMORY_BYTES, MAX_MODEL_BYTES},
    memory::MemoryError,
};
use bytes::Bytes;
use onnx_protobuf::{
    GraphProto, Message, ModelProto, OperatorSetIdProto, ValueInfoProto, tensor_shape_proto::dimension,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::Arc,
};

/// Versions of the `ai.onnx` operator set that import knows.
pub const OPSETS: std::ops::RangeInclusive<i64> = 1..=27;

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
    /// Whether it is a tensor, or else what these are of.
    pub kind: ValueKind,
}

impl std::fmt::Display for InputInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, self.dtype)?;
        match &self.dims {
            None => f.write_str(" of any rank"),
            Some(dims) => {
                let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
                write!(f, "[{}]", dims.join("x"))
            }
        }
    }
}

impl InputInfo {
    /// Whether a tensor of this type is one that the model declares.
    pub fn takes(&self, dtype: DType, dims: &[usize]) -> bool {
        let fits = |declared: &Vec<Dim>| {
            let agrees = |(d, &n): (&Dim, &usize)| !matches!(d, Dim::Known(k) if *k != n);
            declared.len() == dims.len() && declared.iter().zip(dims).all(agrees)
        };
        dtype == self.dtype && self.dims.as_ref().is_none_or(fits)
    }
}

/// An ONNX model: parsed, validated, independent of input shapes.
///
/// Cloned weights share their bytes, and so do the graphs made by [`graph`](Model::graph).
pub struct Model {
    pub(super) name: String,
    pub(super) ir_version: i64,
    pub(super) opsets: BTreeMap<String, i64>,
    pub(super) inputs: Vec<InputInfo>,
    pub(super) body: Body,
    /// Bytes that import may take for what it computes.
    pub(super) max_memory: u64,
    pub(super) texts: Arc<TextTable>,
    /// What outputs are declared to be.
    pub(super) output_kinds: Vec<ValueKind>,
}

impl Model {
    /// Reads a model file. External data is read from the model's folder, and from nowhere else.
    pub fn load(path: &Path) -> Result<Model, ImportError> {
        Model::load_within(path, MAX_MEMORY_BYTES)
    }

    /// The same, for a model that may take this many bytes of memory: it is refused before it does where its files are larger,
    /// and so is what import would compute of it.
    pub fn load_within(path: &Path, max_memory: u64) -> Result<Model, ImportError> {
        let bytes = read_file(path, max_memory)?;
        Model::read(&bytes, &mut ExternalFiles::beside(path, max_memory), max_memory)
    }

    /// Parses a model that is in memory. Refuses external data: there is no folder to look for it.
    pub fn parse(bytes: impl Into<Bytes>) -> Result<Model, ImportError> {
        Model::read(&bytes.into(), &mut ExternalFiles::none(), MAX_MEMORY_BYTES)
    }

    pub(super) fn read(
        bytes: &[u8],
        files: &mut ExternalFiles,
        max_memory: u64,
    ) -> Result<Model, ImportError> {
        Ok(Model { max_memory, ..Model::validate(parse(bytes)?, files)? })
    }

    fn validate(mut proto: ModelProto, files: &mut ExternalFiles) -> Result<Model, ImportError> {
        let Some(mut graph) = proto.graph.take() else {
            return Err(ImportError::NotAModel("it has no graph".into()));
        };
        let opsets = opsets(&proto)?;
        let mut texts = TextTable::default();
        let functions = Functions::decode(std::mem::take(&mut proto.functions), files, &mut texts)?;
        let name = if graph.name.is_empty() { "model".into() } else { std::mem::take(&mut graph.name) };
        let kind =
            |o: &ValueInfoProto| o.type_.as_ref().and_then(value::kind).map_or(ValueKind::TENSOR, |(k, _)| k);
        let output_kinds = graph.output.iter().map(kind).collect();
        let mut decoder = Decoder { files, texts: &mut texts, opsets: &opsets, in_function: false };
        let mut declared = Vec::new();
        let names = |graph: &GraphProto, initializers: &BTreeMap<String, Tensor>| {
            declared = inputs(graph, initializers)?;
            Ok(declared.iter().map(|i| i.name.clone()).collect())
        };
        let body = body::decode(graph, names, &mut decoder)?;
        body.check_closed()?;
        let body = functions.expand(body)?;
        Ok(Model {
            name,
            ir_version: proto.ir_version,
            opsets,
            inputs: declared,
            body,
            max_memory: MAX_MEMORY_BYTES,
            texts: Arc::new(texts),
            output_kinds,
        })
    }

    /// The memory that the model may take, in bytes.
    pub fn max_memory(&self) -> u64 {
        self.max_memory
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
        self.body.outputs.iter().map(|(name, _)| name.as_str())
    }

    /// What the results are declared to be, in the model's order.
    pub fn output_kinds(&self) -> &[ValueKind] {
        &self.output_kinds
    }

    /// The texts of the model, for one run.
    pub fn texts(&self) -> Texts {
        Texts::new(self.texts.clone())
    }

    /// The same model for inputs of these forms, whose own inputs are all tensors: those of a sequence are `name[0]`,
    /// `name[1]` and so on.
    ///
    /// # Errors
    /// Where an input is not of a form that the model declares.
    pub fn in_forms(&self, forms: &[Form]) -> Result<Model, ImportError> {
        let (mut inputs, mut nodes) = (Vec::new(), Vec::new());
        for (info, form) in self.inputs.iter().zip(forms) {
            let mut made = match (form, info.kind) {
                (Form::Tensor, ValueKind { is_sequence: false, .. }) => {
                    inputs.push(InputInfo { kind: ValueKind::TENSOR, ..info.clone() });
                    continue;
                }
                (Form::Sequence(n), ValueKind { is_sequence: true, .. }) => {
                    let names: Vec<String> = (0..*n).map(|i| format!("{}[{i}]", info.name)).collect();
                    // Each element has lengths of its own.
                    let open = |d: &Dim| if let Dim::Known(n) = d { Dim::Known(*n) } else { Dim::Unknown };
                    let dims = info.dims.as_ref().map(|dims| dims.iter().map(open).collect::<Vec<_>>());
                    let of = |name: &String| InputInfo {
                        name: name.clone(),
                        dtype: info.dtype,
                        dims: dims.clone(),
                        kind: ValueKind::TENSOR,
                    };
                    inputs.extend(names.iter().map(of));
                    splice::sequence(&info.name, &names, Some(info.dtype))
                }
                (Form::Absent, ValueKind { is_optional: true, .. }) => splice::absent(&info.name),
                _ => {
                    let reason = match info.kind {
                        ValueKind { is_sequence: true, .. } => "takes a sequence of tensors",
                        ValueKind { is_optional: true, .. } => "takes a tensor, or nothing",
                        _ => "takes a tensor",
                    };
                    return Err(ImportError::Input { input: info.name.clone(), reason: reason.into() });
                }
            };
            made.outputs = vec![info.name.clone()];
            nodes.push(Arc::new(made));
        }
        let mut body = self.body.clone();
        body.inputs = inputs.iter().map(|i| i.name.clone()).collect();
        nodes.append(&mut body.nodes);
        body.nodes = nodes;
        Ok(self.with(inputs, body))
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
        for n in &self.body.nodes {
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
        self.body.initializers.values().map(|t| t.bytes().len()).sum()
    }
}

/// The bytes of a model file that may take this many bytes of memory.
pub(super) fn read_file(path: &Path, max_memory: u64) -> Result<Vec<u8>, ImportError> {
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
    // The bytes of the file, and what the parser makes of them.
    MemoryError::check("reading the model file", meta.len().saturating_mul(2), max_memory)?;
    fs::read(path).map_err(read)
}

/// The message that these bytes are.
pub(super) fn parse(bytes: &[u8]) -> Result<ModelProto, ImportError> {
    if bytes.len() > MAX_MODEL_BYTES {
        return Err(ImportError::NotAModel(format!("it has more than {MAX_MODEL_BYTES} bytes")));
    }
    if let Some(what) = wire::what_else(bytes) {
        return Err(ImportError::NotAModel(what));
    }
    wire::scan(bytes)?;
    ModelProto::parse_from_bytes(bytes).map_err(|e| ImportError::Parse(e.to_string()))
}

fn structure<T>(why: String) -> Result<T, ImportError> {
    Err(ImportError::Structure(why))
}

/// The domain's canonical name: ONNX's own may be spelled out.
pub(super) fn canonical(domain: &str) -> &str {
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
    opset_imports(&proto.opset_import)
}

/// Versions of operator sets, by domain.
pub(super) fn opset_imports(imports: &[OperatorSetIdProto]) -> Result<BTreeMap<String, i64>, ImportError> {
    let version = |why: String| Err(ImportError::Version(why));
    let mut opsets = BTreeMap::new();
    for import in imports {
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
    let Some((kind, ty)) = v.type_.as_ref().and_then(value::kind) else {
        return Err(refuse("only tensors, sequences of them and optional ones are supported".into()));
    };
    let dtype = tensor::dtype(ty.elem_type).map_err(refuse)?;
    let dim = |d: &onnx_protobuf::tensor_shape_proto::Dimension| match &d.value {
        // What PaddlePaddle writes for a length that is not known.
        Some(dimension::Value::DimValue(-1)) => Ok(Dim::Unknown),
        Some(dimension::Value::DimValue(n)) => {
            let n = usize::try_from(*n).map_err(|_| refuse(format!("dimension {n} is negative")))?;
            Ok(Dim::Known(n))
        }
        // What Paddle's exporter calls every dimension that it does not know.
        Some(dimension::Value::DimParam(name)) if name == "?" => Ok(Dim::Unknown),
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => Ok(Dim::Symbol(name.clone())),
        _ => Ok(Dim::Unknown),
    };
    let dims = ty
        .shape
        .as_ref()
        .map(|s| s.dim.iter().map(dim).collect::<Result<Vec<_>, ImportError>>())
        .transpose()?;
    Ok(InputInfo { name: v.name.clone(), dtype, dims, kind })
}

/// An initializer that is declared as an input, too, is a constant (before IR version 4 all had to be declared).
fn check_default(declared: &InputInfo, default: &Tensor) -> Result<(), ImportError> {
    if declared.takes(default.dtype(), default.shape()) {
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
