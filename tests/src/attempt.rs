//! What becomes of a model file that may be damaged: it is imported, compiled and run as a user would do it.

use crate::{random::Random, sealed};
use qcc_ir::{
    DType, Graph, Shape, Tensor,
    onnx::{Bindings, Dim, Form, ImportError, Imported, InputInfo, Model, Strings, Value, ValueKind},
};
use qcc_runtime::{
    Backend, Compiler, DynamicModel, Error, Precision, Program, ProgramFile, Samples, Session, TensorView,
};
use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

/// What an attempt may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Memory, in bytes, that models are allowed.
    pub memory: u64,
    /// Multiply-accumulates and elements of a run: beyond them, a model is compiled but not run. It would take long, and
    /// would be right to.
    pub work: u64,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { memory: 200 << 20, work: 200_000_000 }
    }
}

/// The end of an attempt.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// Refused, at this stage, with this kind of error.
    Refused(&'static str, String),
    /// Compiled, but too much to run.
    Long,
    /// Results came out.
    Ran,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Refused(stage, kind) => write!(f, "refused, {stage}: {kind}"),
            Outcome::Long => f.write_str("compiled, too long to run"),
            Outcome::Ran => f.write_str("ran"),
        }
    }
}

/// An attempt: its end, and the ops of the model if it got as far as a graph.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// How it ended.
    pub outcome: Outcome,
    /// Names of its ops.
    pub ops: BTreeSet<String>,
}

/// Imports, compiles and runs a model; the seed chooses shapes that the file leaves open, values, precision and backend.
pub fn attempt(file: &Path, seed: u64, bounds: Bounds) -> Attempt {
    let mut random = Random::new(!seed);
    let mut ops = BTreeSet::new();
    let outcome = match stages(file, &mut random, bounds, &mut ops) {
        Ok(outcome) | Err(outcome) => outcome,
    };
    Attempt { outcome, ops }
}

fn stages(
    file: &Path,
    random: &mut Random,
    bounds: Bounds,
    ops: &mut BTreeSet<String>,
) -> Result<Outcome, Outcome> {
    let refused = |stage| move |e: &ImportError| Outcome::Refused(stage, kind(e));
    let model = Model::load_within(file, bounds.memory).map_err(|e| refused("file")(&e))?;
    let inputs = Inputs::of(&model, random);
    if inputs.bytes() > bounds.memory / 4 {
        // A caller would have to have them first; import may refuse the model nevertheless.
        model.import(&inputs.bindings()).map_err(|e| refused("import")(&e))?;
        return Ok(Outcome::Long);
    }
    let names = model.op_histogram().into_keys();
    let values = inputs.values(random);
    let graph = inputs.import(&model, &values).map_err(|e| refused("import")(&e))?;
    ops.extend(names);
    let work = graph.as_ref().map_or(0, work);
    let precision = match random.below(8) {
        0 => Precision::FakeQuant,
        1 | 2 => Precision::Int8,
        3 => Precision::Int8Dynamic,
        _ => Precision::Float,
    };
    let is_interpreted = random.one_in(4);
    let compiler = Compiler::new().precision(precision).max_memory(bounds.memory);
    // Calibration on noise: few samples are enough to come through it.
    let compiler = compiler.calibration(Samples::noise().limit(2));
    let limit = if is_interpreted { bounds.work / 8 } else { bounds.work };
    let failed = |e: Error| Outcome::Refused("compile or run", kind_of(&e));
    if work > limit {
        if let Some(graph) = graph {
            compiler.precision(Precision::Float).compile_graph(graph).map_err(failed)?;
        }
        return Ok(Outcome::Long);
    }
    if random.one_in(8) {
        return through_a_file(file, &compiler, graph, &values, random, bounds);
    }
    let backend = match is_interpreted {
        true => Backend::Interpreter,
        false => Backend::Jit(Box::new(compiler)),
    };
    DynamicModel::new(model, "mutant", backend).run_values(&values).map_err(failed)?;
    Ok(Outcome::Ran)
}

/// Compiles to a `.qcc` file, of open shapes or of these, and runs what is read from it; of some, what is read from the file
/// after it was damaged.
fn through_a_file(
    file: &Path,
    compiler: &Compiler,
    graph: Option<Graph>,
    values: &[Value],
    random: &mut Random,
    bounds: Bounds,
) -> Result<Outcome, Outcome> {
    let failed = |e: Error| Outcome::Refused("compile to a file", kind_of(&e));
    let path = file.with_extension("qcc");
    match graph.filter(|_| random.one_in(2)) {
        Some(graph) => {
            compiler.program_of_graph(graph).and_then(|p| Ok(p.save(&path)?)).map_err(failed)?;
        }
        None => compiler.dynamic_program(file).and_then(|p| Ok(p.save(&path)?)).map_err(failed)?,
    }
    let is_damaged = random.one_in(2);
    let other = |e: &dyn std::fmt::Display| Outcome::Refused("file of a program", e.to_string());
    if is_damaged {
        let mut bytes = fs::read(&path).map_err(|e| other(&e))?;
        sealed::damage(&mut bytes, random);
        fs::write(&path, bytes).map_err(|e| other(&e))?;
    }
    let read = |e: Error| Outcome::Refused(if is_damaged { "damaged .qcc" } else { ".qcc" }, kind_of(&e));
    match ProgramFile::load(&path, bounds.memory).map_err(read)? {
        ProgramFile::Placed(program) => run_placed(&program, compiler, bounds).map_err(read),
        ProgramFile::Dynamic(program) => {
            program.model_with(compiler, "mutant").run_values(values).map_err(read)?;
            Ok(Outcome::Ran)
        }
    }
}

/// Runs a program on zeros, which fit its inputs whatever these have become.
fn run_placed(program: &Program, compiler: &Compiler, bounds: Bounds) -> Result<Outcome, Error> {
    let model = compiler.jit(program)?;
    let types = model.inputs().iter().map(|i| (i.ty.dtype, i.ty.shape.clone()));
    let size = |(dtype, shape): (DType, Shape)| bytes(dtype, &shape);
    if types.clone().map(size).fold(0, u64::saturating_add) > bounds.memory
        || work(program.graph()) > bounds.work
    {
        return Ok(Outcome::Long);
    }
    let inputs: Vec<Tensor> = types.map(|(dtype, shape)| Tensor::zeros(dtype, shape)).collect();
    let views: Vec<TensorView<'_>> = inputs.iter().map(Into::into).collect();
    Session::new(&model).run(&views)?;
    Ok(Outcome::Ran)
}

/// What is chosen for the inputs of a model, before there are any: forms and shapes.
struct Inputs<'m> {
    declared: Vec<(&'m InputInfo, Form, Vec<usize>)>,
}

impl Inputs<'_> {
    /// Small numbers where the file says none.
    fn of<'m>(model: &'m Model, random: &mut Random) -> Inputs<'m> {
        let symbols: [usize; 3] = std::array::from_fn(|_| 1 + random.below(4));
        let dim = |d: &Dim| match d {
            Dim::Known(n) => *n,
            Dim::Symbol(name) => symbols[name.len() % symbols.len()],
            Dim::Unknown => symbols[0],
        };
        let mut form = |info: &InputInfo| match info.kind {
            kind if kind.is_optional && random.one_in(2) => Form::Absent,
            kind if kind.is_sequence => Form::Sequence(random.below(4)),
            _ => Form::Tensor,
        };
        let choose = |info: &'m InputInfo| {
            let dims = info.dims.iter().flatten().map(dim).collect();
            (info, form(info), dims)
        };
        Inputs { declared: model.inputs().iter().map(choose).collect() }
    }

    fn bytes(&self) -> u64 {
        let of = |(info, form, dims): &(&InputInfo, Form, Vec<usize>)| {
            bytes(info.dtype, dims).saturating_mul(form.tensors() as u64)
        };
        self.declared.iter().map(of).fold(0, u64::saturating_add)
    }

    fn bindings(&self) -> Bindings {
        let shapes = self.declared.iter().map(|(info, _, dims)| (info.name.clone(), dims.clone()));
        Bindings { shapes: shapes.collect(), ..Bindings::default() }
    }

    /// The graph, or that of the first part, where it does not depend on values.
    fn import(&self, model: &Model, values: &[Value]) -> Result<Option<Graph>, ImportError> {
        let imported = match model.texts().flatten(values) {
            Some((forms, tensors))
                if self.declared.iter().any(|(info, ..)| info.kind != ValueKind::TENSOR) =>
            {
                let formed = model.in_forms(&forms)?;
                let names = formed.inputs().iter().map(|i| i.name.clone());
                let shapes = names.zip(tensors.iter().map(|t| t.shape().to_vec())).collect();
                formed.import(&Bindings { shapes, ..Bindings::default() })?
            }
            _ => model.import(&self.bindings())?,
        };
        Ok(match imported {
            Imported::Whole(graph, _) => Some(graph),
            Imported::Part(part) => Some(part.graph),
            Imported::Wants(_) => None,
        })
    }

    fn values(&self, random: &mut Random) -> Vec<Value> {
        let mut value = |(info, form, dims): &(&InputInfo, Form, Vec<usize>)| match form {
            Form::Absent => Value::Absent,
            Form::Sequence(n) => {
                Value::Sequence((0..*n).map(|_| element(info.dtype, dims, random)).collect())
            }
            _ => element(info.dtype, dims, random),
        };
        self.declared.iter().map(&mut value).collect()
    }
}

/// A tensor or texts; nothing for a shape that is none, which import refuses.
fn element(dtype: DType, dims: &[usize], random: &mut Random) -> Value {
    if dtype != DType::Str {
        return input(dtype, dims, random).map_or(Value::Absent, Value::Tensor);
    }
    const TEXTS: [&str; 8] = ["", "a", "two words", "3", "-1e9", "\u{e4}\u{1f980}", "NaN", " .* "];
    let Ok(shape) = Shape::new(dims) else { return Value::Absent };
    let texts = (0..shape.elements()).map(|_| Arc::from(TEXTS[random.below(TEXTS.len())])).collect();
    Strings::new(shape, texts).map_or(Value::Absent, Value::Strings)
}

fn bytes(dtype: DType, dims: &[usize]) -> u64 {
    // A caller's text, and its number.
    const TEXT: u64 = 64;
    let size = if dtype == DType::Str { TEXT } else { dtype.size() as u64 };
    dims.iter().fold(size, |n, &d| n.saturating_mul(d as u64))
}

/// Zeros, small numbers, or any bits. `None` for a shape that is none, which import has refused.
fn input(dtype: DType, dims: &[usize], random: &mut Random) -> Option<Tensor> {
    let shape = Shape::new(dims).ok()?;
    let n = shape.elements() * dtype.size();
    let bytes: Vec<u8> = match random.below(4) {
        0 => vec![0; n],
        1 if dtype != DType::Bool => (0..n).map(|_| random.bits() as u8).collect(),
        _ if dtype == DType::F32 => {
            (0..shape.elements()).flat_map(|_| (random.below(64) as f32 / 16.0 - 2.0).to_le_bytes()).collect()
        }
        _ => (0..n).map(|i| u8::from(i % dtype.size() == 0 && random.one_in(2))).collect(),
    };
    // Bits that are no value of the type, of four bits or of truth values, are refused.
    Tensor::from_bytes(dtype, shape.clone(), bytes.into()).ok().or(Some(Tensor::zeros(dtype, shape)))
}

/// Multiply-accumulates and elements of a run.
fn work(graph: &Graph) -> u64 {
    let node = |(id, n): (_, &qcc_ir::Node)| {
        let elements: usize = n.outputs().iter().map(|ty| ty.shape.elements()).sum();
        graph.macs(id).saturating_add(elements as u64)
    };
    graph.nodes().map(node).fold(0, u64::saturating_add)
}

/// The kind of an error, without what it says of this model.
fn kind(e: &ImportError) -> String {
    match e {
        ImportError::Node { source, .. } => format!("node: {}", variant(source)),
        other => variant(other),
    }
}

fn kind_of(e: &Error) -> String {
    match e {
        Error::Import { source, .. } => format!("import: {}", kind(source)),
        other => variant(other),
    }
}

/// The name of a variant, as `Debug` spells it, with that of the error in it where errors of another crate are wrapped.
fn variant(e: &impl std::fmt::Debug) -> String {
    let text = format!("{e:?}");
    let mut words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    match (words.next().unwrap_or_default(), words.next()) {
        (outer @ ("Op" | "Codegen" | "Graph" | "Pass" | "Data"), Some(inner)) => format!("{outer}: {inner}"),
        (outer, _) => outer.to_owned(),
    }
}
