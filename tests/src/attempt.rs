//! What becomes of a model file that may be damaged: it is imported, compiled and run as a user would do it.

use crate::mutate::Random;
use qcc_ir::{
    DType, Graph, Shape, Tensor,
    onnx::{Bindings, Dim, ImportError, Imported, Model},
};
use qcc_runtime::{Backend, Compiler, DynamicModel, Error, Precision, Samples};
use std::{collections::BTreeSet, path::Path};

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
    let shapes = shapes(&model, random);
    let bindings = Bindings {
        shapes: shapes.iter().map(|(name, _, dims)| (name.clone(), dims.clone())).collect(),
        ..Bindings::default()
    };
    let bytes = shapes.iter().map(|(_, dtype, dims)| bytes(*dtype, dims)).fold(0, u64::saturating_add);
    if bytes > bounds.memory {
        // A caller would have to have them first; import may refuse the model nevertheless.
        model.import(&bindings).map_err(|e| refused("import")(&e))?;
        return Ok(Outcome::Long);
    }
    let names = model.op_histogram().into_keys();
    let imported = model.import(&bindings).map_err(|e| refused("import")(&e))?;
    ops.extend(names);
    let graph = match &imported {
        Imported::Whole(graph, _) => Some(graph),
        Imported::Part(part) => Some(&part.graph),
        Imported::Wants(_) => None,
    };
    let work = graph.map_or(0, work);
    let precision = match random.below(8) {
        0 => Precision::FakeQuant,
        1 | 2 => Precision::Int8,
        _ => Precision::Float,
    };
    let is_interpreted = random.one_in(4);
    let compiler = Compiler::new().precision(precision).max_memory(bounds.memory);
    let limit = if is_interpreted { bounds.work / 8 } else { bounds.work };
    let failed = |e: Error| Outcome::Refused("compile or run", kind_of(&e));
    if work > limit {
        if let Imported::Whole(graph, _) = imported {
            compiler.precision(Precision::Float).compile_graph(graph).map_err(failed)?;
        }
        return Ok(Outcome::Long);
    }
    let backend = match is_interpreted {
        true => Backend::Interpreter,
        // Calibration on noise: few samples are enough to come through it.
        false => Backend::Jit(Box::new(compiler.calibration(Samples::noise().limit(2)))),
    };
    let inputs: Vec<Tensor> =
        shapes.iter().filter_map(|(_, dtype, dims)| input(*dtype, dims, random)).collect();
    DynamicModel::new(model, "mutant", backend).run(&inputs).map_err(failed)?;
    Ok(Outcome::Ran)
}

/// Shapes of all inputs, where the file says no number a small one.
fn shapes(model: &Model, random: &mut Random) -> Vec<(String, DType, Vec<usize>)> {
    let symbols: [usize; 3] = std::array::from_fn(|_| 1 + random.below(4));
    let dim = |d: &Dim| match d {
        Dim::Known(n) => *n,
        Dim::Symbol(name) => symbols[name.len() % symbols.len()],
        Dim::Unknown => symbols[0],
    };
    let shape = |dims: &Option<Vec<Dim>>| dims.iter().flatten().map(dim).collect();
    model.inputs().iter().map(|i| (i.name.clone(), i.dtype, shape(&i.dims))).collect()
}

fn bytes(dtype: DType, dims: &[usize]) -> u64 {
    dims.iter().fold(dtype.size() as u64, |n, &d| n.saturating_mul(d as u64))
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
