//! Where two computations of a network part: two models, two precisions of one, or a model and what another runtime has stored.

use crate::{
    Calibrated, Compiler, Error, Feed, Precision, Prepared, Samples, SquaredError, TensorInfo, Threads,
    graph_inputs,
    observe::{Batch, Observed, observe},
    sqnr::decibels,
};
use qcc_ir::{Graph, NodeId, Op, Output, Shape, Tensor, ValueId, onnx};
use qcc_passes::{Options, equalizable_values, product_channels, set_statistics, value_name};
use serde::{Serialize, Serializer};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// One side of a comparison.
#[derive(Clone)]
pub enum DiffSide {
    /// A model, computed in a compiler's precision, with the shapes that it has bound.
    Model {
        /// What to call it.
        name: String,
        /// The model as its file has it.
        model: Arc<onnx::Model>,
        /// Precision, calibration and all else.
        compiler: Box<Compiler>,
    },
    /// Tensors by the names that they have in a model, from one run of another runtime.
    Stored {
        /// What to call them.
        name: String,
        /// By name; numbers of any type.
        tensors: BTreeMap<String, Tensor>,
    },
}

/// What counts as parting.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct DiffSetup {
    /// The signal-to-noise ratio, in dB, below which tensors differ; where nothing is said, what is usual for the precisions.
    pub threshold_db: Option<f64>,
}

/// Two computations, tensor by tensor.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Diff {
    /// The side that is taken for right.
    pub a: String,
    /// The other one.
    pub b: String,
    /// Number of samples.
    pub samples: usize,
    /// The ratio below which tensors differ, in dB.
    pub threshold_db: f64,
    /// Tensors that both sides have, in the order of execution.
    pub tensors: Vec<TensorDiff>,
    /// Names of tensors that differ though all compared tensors that they are computed of do not: the first is where the sides part.
    pub parts_at: Vec<String>,
    /// Tensors of other shapes: name, shape of `a`, shape of `b`.
    pub other_shapes: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Names that only one side has.
    pub only_a: Vec<String>,
    /// Likewise.
    pub only_b: Vec<String>,
}

/// One tensor on both sides.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TensorDiff {
    /// Its name in the model.
    pub name: String,
    /// The node of the model that computes it; `None` of an input.
    pub node: Option<String>,
    /// Its shape in a batch.
    pub shape: Vec<usize>,
    /// Largest |a − b|.
    pub largest: f64,
    /// Largest |a|, for comparison.
    pub magnitude: f64,
    /// Signal-to-noise ratio, 10·log₁₀(Σ a²/Σ (a − b)²), in dB; infinite where they are equal, and then `null` in JSON.
    #[serde(serialize_with = "finite")]
    pub sqnr_db: f64,
    /// Σ a·b/√(Σ a²·Σ b²): below 1 where they differ by more than a factor. 1 where both are zero.
    pub cosine: f64,
    /// Elements that are finite on one side alone, or infinities of other signs.
    pub not_finite: u64,
    /// The ratio that it would have if the compared tensors that it is computed of were equal, in dB: with noise over signal r, and r₀ the
    /// largest of theirs, −10·log₁₀(r − r₀). `None` where nothing comes in here, so that r is not above r₀.
    pub own_db: Option<f64>,
    /// The compared tensors that it is computed of.
    pub computed_of: Vec<String>,
}

fn finite<S: Serializer>(db: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    Some(*db).filter(|db| db.is_finite()).serialize(serializer)
}

/// What is below it, in dB, is another result: floats that are summed in another order are above 100.
const FLOATS: f64 = 60.0;
/// Int8 and fake-quant, or two modes of requantization: the same grids, and single codes that are one step off.
const SAME_GRIDS: f64 = 20.0;
/// Quantized against float: what sound networks of 8 bits have in their deepest layers.
const QUANTIZED: f64 = 15.0;
/// Bytes of tensors that are seen at once, on one side and thread; more are seen in several runs.
const MOST_BYTES: usize = 256 << 20;
/// In float, a value of a fused network is the tensor of the model that is as near as this, in dB.
const SAME: f64 = 60.0;
/// Ops behind a product that may have become part of it: bias, batch norm, residual, clamp, and what they are spelled as.
const MOST_FUSED: usize = 12;

/// Runs both sides on the same samples and compares the tensors that have the same name on both.
///
/// A float model is run with each of its ops by itself, so that it has all tensors of its file. Of a quantized one there are those
/// that are rounded, and its results; a value of the fused network goes by the name of the tensor that it equals in float.
/// Sums are folded in the order of samples: the result does not depend on the number of threads. Memory does not depend on the number
/// of samples.
///
/// # Errors
/// Where the sides take different inputs, have no tensor in common, samples do not fit, or a model cannot be compiled.
pub fn diff(a: &DiffSide, b: &DiffSide, samples: &Samples, setup: &DiffSetup) -> Result<Diff, Error> {
    let lead = match (a, b) {
        (DiffSide::Model { compiler, .. }, _) | (_, DiffSide::Model { compiler, .. }) => compiler,
        (DiffSide::Stored { .. }, DiffSide::Stored { .. }) => {
            return Err(refused("two stored results have no order of execution: give a model on one side"));
        }
    };
    let sides = [Side::of(a, samples)?, Side::of(b, samples)?];
    let feed = common_feed(&sides, lead, samples)?;
    let [left, right] = &sides;
    let ours: BTreeMap<&str, Vec<usize>> = left.types();
    let theirs: BTreeMap<&str, Vec<usize>> = right.types();
    let order = if matches!(left.source, Source::Stored(_)) { right } else { left };
    let (mut names, mut other_shapes) = (Vec::new(), Vec::new());
    for name in order.names() {
        let (Some(x), Some(y)) = (ours.get(name), theirs.get(name)) else { continue };
        match x == y {
            true => names.push(name.to_string()),
            false => other_shapes.push((name.to_string(), x.clone(), y.clone())),
        }
    }
    let only = |of: &Side, other: &BTreeMap<&str, Vec<usize>>| {
        of.names().filter(|n| !other.contains_key(n)).map(String::from).collect::<Vec<_>>()
    };
    let (only_a, only_b) = (only(left, &theirs), only(right, &ours));
    if names.is_empty() {
        let first = |names: &[String]| names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        return Err(refused(&format!(
            "no tensor has the same name and shape on both sides: {} has {}; {} has {}",
            left.name,
            first(&only_a),
            right.name,
            first(&only_b)
        )));
    }
    let mut sums = Vec::with_capacity(names.len());
    for group in groups(&names, &ours) {
        sums.extend(compared(&sides, group, &feed, lead)?);
    }
    let threshold = setup.threshold_db.unwrap_or_else(|| usual_threshold(left, right));
    let tensors = tensors(order, &names, &ours, &sums);
    let is_below = |t: &TensorDiff| t.sqnr_db.is_nan() || t.sqnr_db < threshold || t.not_finite > 0;
    let below: BTreeSet<&str> = tensors.iter().filter(|t| is_below(t)).map(|t| t.name.as_str()).collect();
    let is_first = |t: &&TensorDiff| is_below(t) && !t.computed_of.iter().any(|o| below.contains(o.as_str()));
    Ok(Diff {
        a: left.name.clone(),
        b: right.name.clone(),
        samples: feed.samples(),
        threshold_db: threshold,
        parts_at: tensors.iter().filter(is_first).map(|t| t.name.clone()).collect(),
        tensors,
        other_shapes,
        only_a,
        only_b,
    })
}

impl Diff {
    /// The tensors at which most noise comes in, the worst first.
    pub fn sources(&self, count: usize) -> Vec<&TensorDiff> {
        let own = |t: &TensorDiff| t.own_db.unwrap_or(f64::INFINITY);
        let mut sources: Vec<&TensorDiff> = self.tensors.iter().filter(|t| t.own_db.is_some()).collect();
        sources.sort_by(|a, b| own(a).total_cmp(&own(b)));
        sources.truncate(count);
        sources
    }
}

fn refused(why: &str) -> Error {
    Error::Evaluation(why.into())
}

fn usual_threshold(a: &Side, b: &Side) -> f64 {
    let is_rounded = |s: &Side| matches!(&s.source, Source::Quantized { .. } | Source::Dynamic { .. });
    match (is_rounded(a), is_rounded(b)) {
        (false, false) => FLOATS,
        (true, true) => SAME_GRIDS,
        _ => QUANTIZED,
    }
}

/// One side, ready to run.
struct Side {
    name: String,
    /// The model's own graph, in whose terms tensors depend on each other; none of what is stored.
    imported: Option<Imported>,
    compiler: Option<Compiler>,
    source: Source,
}

/// A model before any pass.
struct Imported {
    graph: Graph,
    /// Its tensors, in the order of execution.
    tensors: Vec<(String, ValueId)>,
}

enum Source {
    /// Each tensor by itself.
    Float,
    /// Rounded values of the graph at `Stage::FakeQuant`, by the tensors that they stand for.
    Quantized {
        graph: Graph,
        options: Box<Options>,
        values: Vec<Standing>,
    },
    /// Results of products of the prepared graph.
    Dynamic {
        graph: Graph,
        options: Box<Options>,
        values: Vec<Standing>,
    },
    Stored(BTreeMap<String, Tensor>),
}

/// A value that stands for a tensor of the model.
struct Standing {
    tensor: String,
    shape: Vec<usize>,
    value: ValueId,
    /// Factors of channels by which it is larger than the tensor, and their axis.
    scales: Option<(usize, Vec<f32>)>,
}

impl Side {
    fn of(contender: &DiffSide, samples: &Samples) -> Result<Side, Error> {
        let (name, model, compiler) = match contender {
            DiffSide::Stored { name, tensors } => {
                let source = Source::Stored(tensors.clone());
                return Ok(Side { name: name.clone(), imported: None, compiler: None, source });
            }
            DiffSide::Model { name, model, compiler } => (name.clone(), model, compiler),
        };
        let failed = |e| Error::Import { path: name.clone(), source: Box::new(e) };
        let (mut graph, tensors) = model.named_graph(compiler.bindings()).map_err(failed)?;
        // Both precisions of a model have the same statistics of batch norms.
        let compiler = compiler.estimated(&graph)?.image_input(false);
        if let Some(statistics) = &compiler.options.statistics {
            set_statistics(&mut graph, statistics)?;
        }
        let reached = graph.computed();
        let tensors = tensors.into_iter().filter(|(_, v)| reached.contains(&v.node) && is_number(&graph, *v));
        let imported = Imported { tensors: tensors.collect(), graph };
        let source = match compiler.options.precision {
            Precision::Float => Source::Float,
            Precision::FakeQuant | Precision::Int8 => quantized(&imported, &compiler, samples)?,
            Precision::Int8Dynamic => dynamic(&imported, &compiler, samples)?,
        };
        Ok(Side { name, imported: Some(imported), compiler: Some(compiler), source })
    }

    /// Names of its tensors, in the order of execution.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match (&self.source, &self.imported) {
            (Source::Stored(tensors), _) => Box::new(tensors.keys().map(String::as_str)),
            (Source::Quantized { values, .. } | Source::Dynamic { values, .. }, _) => {
                Box::new(values.iter().map(|s| s.tensor.as_str()))
            }
            (Source::Float, Some(imported)) => Box::new(imported.tensors.iter().map(|(n, _)| n.as_str())),
            (Source::Float, None) => Box::new(std::iter::empty()),
        }
    }

    /// Shapes of its tensors.
    fn types(&self) -> BTreeMap<&str, Vec<usize>> {
        match (&self.source, &self.imported) {
            (Source::Stored(tensors), _) => {
                tensors.iter().map(|(n, t)| (n.as_str(), t.shape().to_vec())).collect()
            }
            (Source::Quantized { values, .. } | Source::Dynamic { values, .. }, _) => {
                values.iter().map(|s| (s.tensor.as_str(), s.shape.clone())).collect()
            }
            (Source::Float, Some(i)) => {
                i.tensors.iter().map(|(n, v)| (n.as_str(), i.graph.shape(*v).to_vec())).collect()
            }
            (Source::Float, None) => BTreeMap::new(),
        }
    }

    /// The graph that shows these tensors; none of what is stored.
    fn observed(&self, names: &[String]) -> Result<Option<Observed>, Error> {
        let Some(compiler) = &self.compiler else { return Ok(None) };
        let values = |of: &[Standing]| -> Vec<ValueId> {
            let value = |name: &String| of.iter().find(|s| s.tensor == *name).map(|s| s.value);
            names.iter().filter_map(value).collect()
        };
        match (&self.source, &self.imported) {
            (Source::Float, Some(imported)) => {
                let (graph, shown) = imported.shown(names)?;
                Ok(Some(Observed::new(compiler, &graph, &shown)?))
            }
            (
                Source::Quantized { graph, options, values: of }
                | Source::Dynamic { graph, options, values: of },
                _,
            ) => Ok(Some(Observed::lowered(compiler, graph, &values(of), (**options).clone())?)),
            _ => Ok(None),
        }
    }

    /// The numbers of a tensor in a batch, of the samples that count.
    fn numbers<'b>(
        &'b self,
        batch: &'b Batch<'_>,
        place: (usize, usize),
        name: &str,
    ) -> Result<Cow<'b, [f32]>, Error> {
        let no_numbers = || refused(&format!("`{name}` of {} is no tensor of numbers", self.name));
        let tensor = match &self.source {
            Source::Stored(tensors) => tensors.get(name).ok_or_else(no_numbers)?,
            _ => batch.values.get(place.0).and_then(|v| v.get(place.1)).ok_or_else(no_numbers)?,
        };
        let count = match tensor.shape().first() == Some(&batch.size) && batch.size > 0 {
            true => tensor.shape().elements() / batch.size * batch.samples,
            false => tensor.shape().elements(),
        };
        let mut numbers = match tensor.as_slice::<f32>() {
            Ok(elements) => Cow::Borrowed(&elements[..count]),
            Err(_) => {
                let wide = tensor.to_f64();
                Cow::Owned(wide.into_iter().take(count).map(|x| x as f32).collect())
            }
        };
        if let Source::Quantized { values, .. } | Source::Dynamic { values, .. } = &self.source
            && let Some((axis, scales)) =
                values.iter().find(|s| s.tensor == name).and_then(|s| s.scales.as_ref())
        {
            let inner = tensor.shape()[axis + 1..].iter().product::<usize>().max(1);
            let unscale = |(i, x): (usize, &mut f32)| *x /= scales[i / inner % scales.len()];
            numbers.to_mut().iter_mut().enumerate().for_each(unscale);
        }
        Ok(numbers)
    }
}

impl Imported {
    /// A graph of floats whose results are these tensors.
    fn shown(&self, names: &[String]) -> Result<(Graph, Vec<ValueId>), Error> {
        let values: BTreeMap<&str, ValueId> = self.tensors.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let mut graph = self.graph.clone();
        let output =
            |name: &String| values.get(name.as_str()).map(|&value| Output { name: name.clone(), value });
        graph.set_outputs(names.iter().filter_map(output).collect());
        graph.remove_dead();
        qcc_passes::prepare(&mut graph, &float_options(), &mut |_, _| {})?;
        let shown = graph.outputs().iter().map(|o| o.value).collect();
        Ok((graph, shown))
    }

    /// The node that computes a tensor; none of an input.
    fn node(&self, value: ValueId) -> Option<String> {
        let node = self.graph.node(value.node);
        node.op().map(|_| node.name.clone())
    }
}

fn float_options() -> Options {
    Options { precision: Precision::Float, capability: qcc_codegen::capability, ..Options::default() }
}

fn is_number(graph: &Graph, value: ValueId) -> bool {
    let ty = graph.ty(value);
    ty.quant.is_none() && (ty.dtype.is_float() || ty.dtype.is_integer()) && ty.shape.elements() > 0
}

/// A quantized network, and which tensors of the model its rounded values and results are.
fn quantized(imported: &Imported, compiler: &Compiler, samples: &Samples) -> Result<Source, Error> {
    let prepared = compiler.prepare(imported.graph.clone())?;
    let calibrated = match prepared.brings_grids() {
        true => None,
        false => Some(compiler.calibrate(&prepared)?),
    };
    let options = compiler.lowering_options(&prepared);
    let mut graph = prepared.graph().clone();
    let none = qcc_passes::Ranges::default();
    let ranges = calibrated.as_ref().map_or(&none, Calibrated::ranges);
    qcc_passes::quantize(&mut graph, ranges, &options, &mut |_, _| {})?;
    let reached = graph.computed();
    let mut rounded: Vec<(ValueId, ValueId)> = Vec::new();
    for node in graph.order().into_iter().filter(|n| reached.contains(n)) {
        if let Some(Op::FakeQuant(_)) = graph.op(node) {
            rounded.push((graph.operand(node, 0), node.out()));
        }
    }
    let rounded: Vec<(String, ValueId)> =
        rounded.into_iter().map(|(source, value)| (value_name(&graph, source), value)).collect();
    let mut values = standing(imported, &prepared, &rounded, compiler, samples)?;
    let axes: BTreeMap<String, usize> = equalizable_values(prepared.graph())
        .into_iter()
        .map(|(value, axis)| (value_name(prepared.graph(), value), axis))
        .collect();
    for (value, name) in values.iter_mut() {
        value.scales = axes.get(name).copied().zip(ranges.scales.get(name).cloned());
    }
    let mut values: Vec<Standing> = values.into_iter().map(|(value, _)| value).collect();
    results(imported, &graph, &mut values);
    Ok(Source::Quantized { graph, options: Box::new(options), values })
}

/// The same for what is quantized when it runs: the results of products.
fn dynamic(imported: &Imported, compiler: &Compiler, samples: &Samples) -> Result<Source, Error> {
    let prepared = compiler.prepare(imported.graph.clone())?;
    let options = compiler.lowering_options(&prepared);
    let mut graph = prepared.graph().clone();
    qcc_passes::quantize(&mut graph, &qcc_passes::Ranges::default(), &options, &mut |_, _| {})?;
    let products = graph.order().into_iter().filter(|&n| product_channels(&graph, n).is_some());
    let products: Vec<(String, ValueId)> = products.map(|n| (value_name(&graph, n.out()), n.out())).collect();
    let values = standing(imported, &prepared, &products, compiler, samples)?;
    let mut values: Vec<Standing> = values.into_iter().map(|(value, _)| value).collect();
    results(imported, &graph, &mut values);
    Ok(Source::Dynamic { graph, options: Box::new(options), values })
}

/// Adds the results of the model, and brings all into the order of execution.
fn results(imported: &Imported, graph: &Graph, values: &mut Vec<Standing>) {
    for output in graph.outputs() {
        if values.iter().all(|s| s.tensor != output.name) && is_number(graph, output.value) {
            let shape = graph.shape(output.value).to_vec();
            values.push(Standing { tensor: output.name.clone(), shape, value: output.value, scales: None });
        }
    }
    let order: BTreeMap<&str, usize> = imported.tensors.iter().map(|(n, _)| n.as_str()).zip(0..).collect();
    values.sort_by_key(|s| (order.get(s.tensor.as_str()).copied().unwrap_or(usize::MAX), s.tensor.clone()));
}

/// Which tensors of a model some values of its fused network stand for: of each value, given by the name that it has before it is
/// quantized, the last of the tensors behind the node of that name which it equals in float. It is found on the first batch of
/// samples.
fn standing(
    imported: &Imported,
    prepared: &Prepared,
    values: &[(String, ValueId)],
    compiler: &Compiler,
    samples: &Samples,
) -> Result<Vec<(Standing, String)>, Error> {
    let names: BTreeMap<ValueId, &str> =
        imported.tensors.iter().rev().map(|(n, v)| (*v, n.as_str())).collect();
    let fused = prepared.graph();
    let mut found: BTreeMap<String, (Standing, String)> = BTreeMap::new();
    let mut asked: Vec<(usize, ValueId, Vec<&str>)> = Vec::new();
    for (i, (name, value)) in values.iter().enumerate() {
        let Some(node) = fused.find(name) else { continue };
        let shape = fused.shape(node.out()).to_vec();
        if fused.op(node).is_none() {
            if names.values().any(|n| n == name) {
                let own = Standing { tensor: name.clone(), shape, value: *value, scales: None };
                found.entry(name.clone()).or_insert((own, name.clone()));
            }
            continue;
        }
        let candidates = candidates(imported, name, &names, fused.shape(node.out()));
        if !candidates.is_empty() {
            asked.push((i, node.out(), candidates));
        }
    }
    let feed = samples.bind(&graph_inputs(&imported.graph), &compiler.preprocess)?;
    let batch = feed.batch(0)?;
    for group in asked.chunks(group_length(&asked, fused)) {
        let shown: Vec<ValueId> = group.iter().map(|(_, value, _)| *value).collect();
        let own = run_once(&Observed::new(compiler, fused, &shown)?, &batch)?;
        let wanted: BTreeSet<&str> = group.iter().flat_map(|(_, _, c)| c.iter().copied()).collect();
        let wanted: Vec<String> = wanted.into_iter().map(String::from).collect();
        let (graph, shown) = imported.shown(&wanted)?;
        let theirs = run_once(&Observed::new(compiler, &graph, &shown)?, &batch)?;
        let theirs: BTreeMap<&str, &Tensor> = wanted.iter().map(String::as_str).zip(&theirs).collect();
        for ((i, value, candidates), own) in group.iter().zip(&own) {
            let own = own.as_slice::<f32>().unwrap_or_default();
            let is_same = |name: &&&str| {
                let other = theirs.get(**name).and_then(|t| t.to_f32()).unwrap_or_default();
                other.len() == own.len() && SquaredError::of(own, &other).sqnr_db() >= SAME
            };
            // The last of them: what a ReLU leaves as it is equals it before and behind.
            if let Some(&tensor) = candidates.iter().rev().find(is_same) {
                let (name, rounded) = &values[*i];
                let shape = fused.shape(*value).to_vec();
                let own = Standing { tensor: tensor.into(), shape, value: *rounded, scales: None };
                found.entry(tensor.into()).or_insert((own, name.clone()));
            }
        }
    }
    Ok(found.into_values().collect())
}

/// Tensors that what a node has become may stand for: its own result, and what is computed of it alone.
fn candidates<'a>(
    imported: &'a Imported,
    name: &str,
    names: &BTreeMap<ValueId, &'a str>,
    shape: &Shape,
) -> Vec<&'a str> {
    let graph = &imported.graph;
    let mut candidates = Vec::new();
    let Some(mut node) = graph.find(name).filter(|&n| graph.op(n).is_some()) else { return candidates };
    for _ in 0..MOST_FUSED {
        if let Some(name) = names.get(&node.out()).filter(|_| graph.shape(node.out()) == shape) {
            candidates.push(*name);
        }
        match graph.sole_use(node.out()) {
            Some(next) => node = next.node,
            None => break,
        }
    }
    candidates
}

/// How many of these values, and of the tensors that they may stand for, are looked at in one run.
fn group_length(asked: &[(usize, ValueId, Vec<&str>)], graph: &Graph) -> usize {
    let bytes = |(_, value, candidates): &(usize, ValueId, Vec<&str>)| {
        graph.ty(*value).bytes().saturating_mul(1 + candidates.len())
    };
    let most = asked.iter().map(bytes).max().unwrap_or(1).max(1);
    (MOST_BYTES / most).max(1)
}

fn run_once(observed: &Observed, batch: &[Tensor]) -> Result<Vec<Tensor>, Error> {
    observed.session(Threads::one()).run(batch)
}

/// The samples for both sides, which must take the same.
fn common_feed(sides: &[Side; 2], compiler: &Compiler, samples: &Samples) -> Result<Feed, Error> {
    let inputs: Vec<Vec<TensorInfo>> =
        sides.iter().filter_map(|s| s.imported.as_ref()).map(|i| graph_inputs(&i.graph)).collect();
    let Some(first) = inputs.first() else { return Err(refused("there is no model to run")) };
    for other in &inputs[1..] {
        let types = |inputs: &[TensorInfo]| inputs.iter().map(|i| i.ty.clone()).collect::<Vec<_>>();
        let names = |inputs: &[TensorInfo]| inputs.iter().map(|i| i.name.clone()).collect::<Vec<_>>();
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        let is_turned = names(first) != names(other) && sorted(names(first)) == sorted(names(other));
        if types(first) != types(other) || is_turned {
            let told = |inputs: &[TensorInfo]| {
                inputs.iter().map(|i| format!("{}: {}", i.name, i.ty)).collect::<Vec<_>>().join(", ")
            };
            return Err(refused(&format!(
                "models can only be compared where they take the same inputs in the same order; these take {} and {}",
                told(first),
                told(other)
            )));
        }
    }
    let feed = samples.bind(first, &compiler.preprocess)?;
    let is_stored = sides.iter().any(|s| matches!(s.source, Source::Stored(_)));
    if is_stored && feed.batches() > 1 {
        return Err(refused(&format!(
            "stored tensors are of one run, and there are {} batches of samples: give the input of that run",
            feed.batches()
        )));
    }
    Ok(feed)
}

/// Names in groups whose tensors fit into memory.
fn groups<'a>(names: &'a [String], shapes: &BTreeMap<&str, Vec<usize>>) -> Vec<&'a [String]> {
    let bytes = |name: &String| {
        let elements = shapes.get(name.as_str()).map_or(0, |s| s.iter().product::<usize>());
        elements.saturating_mul(size_of::<f32>())
    };
    let (mut groups, mut start, mut taken) = (Vec::new(), 0, 0);
    for (i, name) in names.iter().enumerate() {
        let more = bytes(name);
        if i > start && taken + more > MOST_BYTES {
            groups.push(&names[start..i]);
            (start, taken) = (i, 0);
        }
        taken += more;
    }
    groups.push(&names[start..]);
    groups
}

/// Sums over one tensor on both sides.
#[derive(Clone, Copy, Default)]
struct Sums {
    error: SquaredError,
    dot: f64,
    square: f64,
    largest: f64,
    magnitude: f64,
    not_finite: u64,
}

impl Sums {
    fn of(a: &[f32], b: &[f32]) -> Sums {
        let mut sums = Sums::default();
        for (&a, &b) in a.iter().zip(b) {
            if a.is_finite() && b.is_finite() {
                let (a, b) = (f64::from(a), f64::from(b));
                sums.error.noise += (a - b) * (a - b);
                sums.error.signal += a * a;
                sums.dot += a * b;
                sums.square += b * b;
                sums.largest = sums.largest.max((a - b).abs());
                sums.magnitude = sums.magnitude.max(a.abs());
            } else {
                sums.not_finite += u64::from(a != b && !(a.is_nan() && b.is_nan()));
            }
        }
        sums
    }

    fn add(&mut self, other: &Sums) {
        self.error += other.error;
        self.dot += other.dot;
        self.square += other.square;
        self.largest = self.largest.max(other.largest);
        self.magnitude = self.magnitude.max(other.magnitude);
        self.not_finite += other.not_finite;
    }

    fn cosine(&self) -> f64 {
        let product = (self.error.signal * self.square).sqrt();
        match product > 0.0 {
            true => (self.dot / product).clamp(-1.0, 1.0),
            false if self.error.signal == self.square => 1.0,
            false => 0.0,
        }
    }
}

/// Runs both sides, and sums up how some tensors differ.
fn compared(
    sides: &[Side; 2],
    names: &[String],
    feed: &Feed,
    compiler: &Compiler,
) -> Result<Vec<Sums>, Error> {
    let mut graphs = Vec::new();
    let mut places = [0; 2];
    for (side, place) in sides.iter().zip(&mut places) {
        *place = graphs.len();
        graphs.extend(side.observed(names)?);
    }
    let mut sums = vec![Sums::default(); names.len()];
    observe(
        &graphs,
        feed,
        &compiler.threads_of_calibration()?,
        || (),
        |(), batch| {
            let of = |(i, name): (usize, &String)| {
                let [a, b] = [0, 1].map(|s| sides[s].numbers(batch, (places[s], i), name));
                let (a, b) = (a?, b?);
                match a.len() == b.len() {
                    true => Ok(Sums::of(&a, &b)),
                    false => Err(refused(&format!("`{name}` has {} elements and {}", a.len(), b.len()))),
                }
            };
            names.iter().enumerate().map(of).collect::<Result<Vec<_>, Error>>()
        },
        |of_batch| {
            sums.iter_mut().zip(&of_batch).for_each(|(sum, s)| sum.add(s));
            Ok(())
        },
    )?;
    Ok(sums)
}

/// What is known of each tensor, with those that it is computed of.
fn tensors(
    order: &Side,
    names: &[String],
    shapes: &BTreeMap<&str, Vec<usize>>,
    sums: &[Sums],
) -> Vec<TensorDiff> {
    let Some(imported) = &order.imported else { return Vec::new() };
    let graph = &imported.graph;
    let values: BTreeMap<&str, ValueId> = imported.tensors.iter().map(|(n, v)| (n.as_str(), *v)).collect();
    let mut compared: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (i, name) in names.iter().enumerate() {
        if let Some(value) = values.get(name.as_str()) {
            compared.entry(*value).or_insert(i);
        }
    }
    // Of each node, the compared tensors that its operands are or are computed of without others between.
    let mut behind: BTreeMap<NodeId, BTreeSet<usize>> = BTreeMap::new();
    for node in graph.order() {
        let mut of = BTreeSet::new();
        for operand in graph.operands(node) {
            match compared.get(&operand) {
                Some(&i) => _ = of.insert(i),
                None => of.extend(behind.get(&operand.node).into_iter().flatten().copied()),
            }
        }
        behind.insert(node, of);
    }
    let ratios: Vec<f64> = sums.iter().map(|s| s.error.ratio()).collect();
    let tensor = |(i, name): (usize, &String)| {
        let value = values.get(name.as_str()).copied();
        let of = value.and_then(|v| behind.get(&v.node)).cloned().unwrap_or_default();
        let own = ratios[i] - of.iter().map(|&j| ratios[j]).fold(0.0, f64::max);
        TensorDiff {
            name: name.clone(),
            node: value.and_then(|v| imported.node(v)),
            shape: shapes.get(name.as_str()).cloned().unwrap_or_default(),
            largest: sums[i].largest,
            magnitude: sums[i].magnitude,
            sqnr_db: sums[i].error.sqnr_db(),
            cosine: sums[i].cosine(),
            not_finite: sums[i].not_finite,
            own_db: (own > 0.0).then(|| decibels(own)),
            computed_of: of.iter().map(|&j| names[j].clone()).collect(),
        }
    };
    names.iter().enumerate().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundled;
    use qcc_ir::{
        numerics::RequantMode,
        ops::{Clamp, MatMul, Unary, UnaryKind},
    };
    use qcc_passes::{BatchNormStatistics, Repairs};

    fn compiler(precision: Precision) -> Compiler {
        Compiler::new()
            .precision(precision)
            .calibration(bundled::calibration().unwrap().limit(24))
            .preprocess(bundled::preprocess())
    }

    fn model() -> Arc<onnx::Model> {
        Arc::new(onnx::Model::parse(bundled::FASHION_RESNET8.to_vec()).unwrap())
    }

    fn contender(compiler: Compiler) -> DiffSide {
        DiffSide::Model { name: "fashion".into(), model: model(), compiler: Box::new(compiler) }
    }

    fn images(count: usize) -> Samples {
        bundled::test_images().unwrap().limit(count)
    }

    fn found(a: Compiler, b: Compiler) -> Diff {
        diff(&contender(a), &contender(b), &images(6), &DiffSetup::default()).unwrap()
    }

    fn of<'a>(diff: &'a Diff, name: &str) -> &'a TensorDiff {
        diff.tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn a_model_is_itself_in_all_tensors_of_its_file() {
        let same = found(compiler(Precision::Float), compiler(Precision::Float));
        assert_eq!((same.samples, same.parts_at.len(), same.threshold_db), (6, 0, FLOATS));
        // 9 convolutions with batch norms, 7 ReLUs, 3 sums, pool, flatten, product, and the input.
        assert_eq!(same.tensors.len(), 9 + 9 + 7 + 3 + 3 + 1);
        assert!(same.tensors.iter().all(|t| t.largest == 0.0 && t.own_db.is_none() && t.magnitude > 0.0));
        assert!(same.only_a.is_empty() && same.only_b.is_empty() && same.other_shapes.is_empty());
        let order: Vec<&str> = same.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!((order[0], order[order.len() - 1]), ("image", "logits"));
        let relu = of(&same, "/stem/stem.2/Relu_output_0");
        assert_eq!(relu.computed_of, ["/stem/stem.1/BatchNormalization_output_0"]);
        assert_eq!(relu.node.as_deref(), Some("/stem/stem.2/Relu"));
    }

    #[test]
    fn the_batch_norm_that_was_changed_is_where_two_models_part() {
        let float = compiler(Precision::Float);
        let graph = float.import_onnx(bundled::FASHION_RESNET8).unwrap();
        let mut known = float.estimate_batch_norms(&graph).unwrap();
        let name = "/l2/b1/BatchNormalization";
        known.batch_norms.retain(|n, _| n == name);
        known.batch_norms.get_mut(name).unwrap().mean[3] += 5.0;
        let changed: BatchNormStatistics = known;
        let other = float.clone().batch_norm_statistics(changed);
        let parted = found(float, other);
        assert_eq!(parted.parts_at, ["/l2/b1/BatchNormalization_output_0"]);
        assert_eq!(parted.sources(1)[0].name, parted.parts_at[0]);
        assert_eq!(of(&parted, "/l2/c1/Conv_output_0").largest, 0.0);
        let behind = of(&parted, "logits");
        assert!(behind.sqnr_db < 60.0 && behind.cosine < 1.0, "{behind:?}");
    }

    #[test]
    fn quantized_values_go_by_the_tensors_that_they_stand_for() {
        let same_for_threads = |threads: usize| {
            let threads = Threads::new(threads).unwrap();
            let of = |p| compiler(p).repairs(Repairs::NONE).calibration_threads(threads.clone());
            found(of(Precision::Float), of(Precision::Int8))
        };
        let int8 = same_for_threads(1);
        assert_eq!(same_for_threads(3), int8);
        assert_eq!((int8.threshold_db, int8.parts_at.len()), (QUANTIZED, 0));
        let names: Vec<&str> = int8.tensors.iter().map(|t| t.name.as_str()).collect();
        // A convolution that took a batch norm and a ReLU is what the ReLU made.
        for (there, not) in [
            ("/stem/stem.2/Relu_output_0", "/stem/stem.0/Conv_output_0"),
            ("/l1/Relu_1_output_0", "/l1/Add_output_0"),
        ] {
            assert!(names.contains(&there) && !names.contains(&not), "{names:?}");
        }
        assert!(int8.tensors.iter().all(|t| t.sqnr_db > 20.0 && t.sqnr_db < 80.0 && t.cosine > 0.99));
        let equalized = compiler(Precision::Int8).repairs(Repairs { equalize: 1.0, ..Repairs::NONE });
        let equalized = found(compiler(Precision::Float), equalized);
        assert!(
            equalized.tensors.len() == int8.tensors.len() && equalized.parts_at.is_empty(),
            "{equalized:?}"
        );

        // What is seen of int8 is what the model computes.
        let own = compiler(Precision::Int8).repairs(Repairs::NONE);
        let program = own.program_of_graph(own.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
        let model = own.jit(&program).unwrap();
        let feed = images(1).bind(model.inputs(), &bundled::preprocess()).unwrap();
        let batch = feed.batch(0).unwrap();
        let logits = crate::Session::new(&model).run(&[(&batch[0]).into()]).unwrap().swap_remove(0);
        let stored = DiffSide::Stored {
            name: "stored".into(),
            tensors: [("logits".to_string(), logits)].into_iter().collect(),
        };
        let seen = diff(&stored, &contender(own), &images(1), &DiffSetup::default()).unwrap();
        assert_eq!((seen.tensors.len(), seen.tensors[0].largest), (1, 0.0));
    }

    #[test]
    fn precisions_and_modes_are_compared_on_the_same_grids() {
        let plain = |p| compiler(p).repairs(Repairs::NONE);
        let fake = found(plain(Precision::FakeQuant), plain(Precision::Int8));
        assert_eq!((fake.threshold_db, fake.parts_at.len()), (SAME_GRIDS, 0));
        let modes = [RequantMode::Q15, RequantMode::Shift].map(|m| plain(Precision::Int8).requant(m));
        let [q15, shift] = modes;
        let modes = found(q15, shift);
        assert!(modes.parts_at.is_empty() && modes.tensors.iter().any(|t| t.largest > 0.0));
        assert_eq!(of(&modes, "image").largest, 0.0);
    }

    #[test]
    fn products_that_are_quantized_when_they_run_are_compared() {
        let mut seed = 1u32;
        let mut numbers = |count: usize| -> Vec<f32> {
            let mut next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
            };
            (0..count).map(|_| next()).collect()
        };
        let mut graph = Graph::new("products");
        let mut value = graph.input("x", qcc_ir::TensorType::f32(&[8, 128]).unwrap()).unwrap();
        for i in 0..2 {
            let weights = Tensor::from_vec(Shape::new([128, 128]).unwrap(), numbers(128 * 128)).unwrap();
            let weights = graph.constant("w", weights);
            let op = MatMul { bias: false, residual: false, clamp: Clamp::NONE };
            value = graph.add(&format!("product{i}"), op, &[value, weights]).unwrap().out();
            let relu = Unary { kind: UnaryKind::Relu };
            value = graph.add(&format!("relu{i}"), relu, &[value]).unwrap().out();
        }
        graph.output("y", value);
        let model = Arc::new(onnx::Model::parse(onnx::export(&graph).unwrap()).unwrap());
        let of = |precision| DiffSide::Model {
            name: "products".into(),
            model: model.clone(),
            compiler: Box::new(Compiler::new().precision(precision)),
        };
        let [float, dynamic] = [Precision::Float, Precision::Int8Dynamic].map(of);
        let found = diff(&float, &dynamic, &Samples::noise(), &DiffSetup::default()).unwrap();
        // Each product is what the ReLU behind it makes.
        assert_eq!(found.tensors.len(), 2, "{found:?}");
        assert!(found.tensors.iter().all(|t| t.sqnr_db > 25.0 && t.sqnr_db < 60.0), "{found:?}");
        assert_eq!((found.tensors[1].name.as_str(), found.threshold_db), ("y", QUANTIZED));
    }

    #[test]
    fn stored_tensors_are_compared_by_name_and_must_fit() {
        let float = contender(compiler(Precision::Float));
        let of_shape = |dims: &[usize]| Tensor::zeros(qcc_ir::DType::F32, Shape::new(dims).unwrap());
        let stored = |tensors: &[(&str, Tensor)]| DiffSide::Stored {
            name: "stored".into(),
            tensors: tensors.iter().map(|(n, t)| (n.to_string(), t.clone())).collect(),
        };
        let run = |b: &DiffSide, samples: &Samples| diff(&float, b, samples, &DiffSetup::default());
        let zeros = stored(&[
            ("logits", of_shape(&[1, 10])),
            ("/Flatten_output_0", of_shape(&[64])),
            ("other", of_shape(&[1])),
        ]);
        let found = run(&zeros, &images(1)).unwrap();
        assert_eq!((found.tensors.len(), found.parts_at.as_slice()), (1, &["logits".to_string()][..]));
        assert_eq!((found.tensors[0].sqnr_db, found.tensors[0].cosine), (0.0, 0.0));
        assert_eq!(found.other_shapes, [("/Flatten_output_0".to_string(), vec![1, 64], vec![64])]);
        assert_eq!(found.only_b, ["other"]);
        let mut odd = vec![0.0f32; 10];
        odd[3] = f32::NAN;
        let odd = Tensor::from_vec(Shape::new([1, 10]).unwrap(), odd).unwrap();
        let found = run(&stored(&[("logits", odd)]), &images(1)).unwrap();
        assert_eq!(found.tensors[0].not_finite, 1);
        let refused = |b: &DiffSide, samples: &Samples| run(b, samples).unwrap_err().to_string();
        assert!(refused(&zeros, &images(2)).contains("there are 2 batches"));
        let strange = refused(&stored(&[("x", of_shape(&[1]))]), &images(1));
        assert!(strange.contains("no tensor has the same name") && strange.contains("image"), "{strange}");
        let nothing = diff(&zeros, &zeros, &images(1), &DiffSetup::default()).unwrap_err().to_string();
        assert!(nothing.contains("give a model"), "{nothing}");
        // A threshold of one's own.
        let strict = DiffSetup { threshold_db: Some(1000.0) };
        let own = contender(compiler(Precision::Int8));
        assert!(!diff(&float, &own, &images(1), &strict).unwrap().parts_at.is_empty());
    }
}
