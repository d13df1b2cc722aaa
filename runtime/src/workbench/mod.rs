//! The accuracy workbench: what quantization does to a model, layer by layer, and what it gains.
//!
//! [`facts`] runs a model in float and quantized on samples and on the clock, and says what it has found as [`Facts`], which can
//! be written as JSON and are what the pages of `qcc report` show. [`compare`] sets two of them side by side.
//! `docs/report.md` tells what each figure means.
//!
//! ```
//! # fn main() -> Result<(), qcc_runtime::Error> {
//! use qcc_runtime::{Compiler, bundled, workbench::{Setup, facts}};
//!
//! let compiler = Compiler::new().calibration(bundled::calibration()?.limit(32)).preprocess(bundled::preprocess());
//! let graph = compiler.import_onnx(bundled::FASHION_RESNET8)?;
//! let setup = Setup { samples: 8, reps: 3, ..Setup::new("fashion_resnet8", compiler) };
//! let facts = facts(&setup, graph, &|_, _, _| {})?;
//! for (layer, local) in facts.by_local_error().iter().take(3) {
//!     println!("{}: {local}", layer.name);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Everything is observed on a bounded number of samples ([`Setup::samples`]), and takes memory that does not depend on it: for
//! each thread the values of one batch in float, fake-quant and int8, and 64 KiB a layer for its histogram. What is observed
//! does not depend on the number of threads; times do.

mod compare;
mod diff;
mod facts;
mod observation;
mod suggestions;
mod time;

pub use compare::{Change, Comparison, LayerChange, compare};
pub use diff::{Diff, DiffSetup, DiffSide, TensorDiff, diff};
pub use facts::*;
pub use suggestions::{comparison, remarks, suggestions};

use crate::{
    Calibrated, Compiler, Error, Feed, Model, Precision, Program, Run, Samples, Threads, bench,
    data::dead_leaves, evaluate, graph_inputs, program::ProgramError,
};
use observation::{Observation, observe_layers};
use qcc_ir::{Device, Graph, NodeId, Op};
use qcc_passes::{NoteKind, Report, weight_channels};
use std::collections::{BTreeMap, BTreeSet};

/// Samples that layers are observed on where nothing else is said.
pub const SAMPLES: usize = 64;
/// Timed runs where nothing else is said.
pub const REPS: usize = 50;
/// Bins of histograms, groups of channels.
const MOST_PARTS: usize = 64;
const LEAST_PARTS: usize = 8;
/// Layers beyond which these become fewer, so that all layers together have no more.
const DETAILED_LAYERS: usize = 500;

/// What to look at, and how closely.
#[derive(Clone)]
pub struct Setup {
    /// What the model is called.
    pub model: String,
    /// All options of compilation and calibration. Its precision is what is looked at.
    pub compiler: Compiler,
    /// What accuracy is measured on, with labels or without; and what layers are observed on, in place of the calibration
    /// samples.
    pub images: Option<Samples>,
    /// Samples that layers are observed on, at most.
    pub samples: usize,
    /// Timed runs of each contender.
    pub reps: usize,
    /// Threads that evaluate.
    pub threads: Threads,
    /// The command line, for suggestions.
    pub command: Option<Vec<String>>,
}

impl Setup {
    /// With the defaults, and no images.
    pub fn new(model: impl Into<String>, compiler: Compiler) -> Setup {
        let (images, command, threads) = (None, None, Threads::one());
        Setup { model: model.into(), compiler, images, samples: SAMPLES, reps: REPS, threads, command }
    }
}

/// Is told what is being done, and how much of it is, of how much.
pub type Progress<'a> = dyn Fn(&str, usize, usize) + Sync + 'a;

/// Finds out all about a float graph and what the compiler of the setup makes of it.
///
/// The graph may be quantized already: then float is the same graph without the grids of its activations. Without calibration
/// samples ranges are made as [`Compiler::calibrate`] makes them, and layers are observed on made-up inputs. With
/// [`Precision::Float`] there is one contender, and nothing about errors.
///
/// # Errors
/// Where the model cannot be compiled or calibrated, samples cannot be read or do not fit it, or it cannot be run.
pub fn facts(setup: &Setup, graph: Graph, progress: &Progress<'_>) -> Result<Facts, Error> {
    let prepared = setup.compiler.prepare(graph)?;
    let compiler = setup.compiler.without_noise_for(&prepared).into_owned();
    let precision = compiler.options.precision;
    let calibrated = precision.is_calibrated().then(|| compiler.calibrate(&prepared)).transpose()?;
    let mut programs = Vec::new();
    let mut report = Report::default();
    for contender in contenders(precision) {
        let (program, own) =
            compiler.clone().precision(contender).lower_with_report(&prepared, calibrated.as_ref())?;
        programs.push(program);
        report = own;
    }
    let jit = compiler.jit_options()?;
    let models = programs.iter().map(|p| p.jit(&jit)).collect::<Result<Vec<Model>, _>>()?;

    let (feed, samples) = observed_samples(setup, &compiler, prepared.graph())?;
    let mut observing = |done, total| progress("observing layers", done, total);
    let seen = observe_layers(&compiler, &prepared, calibrated.as_ref(), &feed, &mut observing)?;
    let (accuracy, images, no_accuracy) = accuracy(setup, &models, progress)?;

    let inputs = match prepared.graph().inputs() {
        [] => Vec::new(),
        _ => feed.batch(0)?,
    };
    let timed = bench(&programs, &jit, Some(&inputs), setup.reps, &mut |d, t| progress("timing", d, t))?;
    let (Some(float), Some(subject), Some(program)) =
        (timed.runs.first(), timed.runs.last(), programs.last())
    else {
        return Err(Error::Evaluation("nothing was timed".into()));
    };
    let layers = layers(prepared.graph(), program, &report, &seen, float, subject);
    let time = time::time_facts(float, subject, &layers);
    let contenders = contender_facts(&programs, &models, &timed.runs, &accuracy, &seen)?;
    let conditions = Conditions {
        qcc: env!("CARGO_PKG_VERSION").into(),
        command: setup.command.clone(),
        isa: timed.isa.clone(),
        threads: timed.threads,
        reps: setup.reps,
        samples,
        images,
        no_accuracy,
        calibration: calibrated.as_ref().filter(|_| !prepared.brings_grids()).map(calibration_facts),
        brings_grids: prepared.brings_grids(),
        precision,
        requant: subject.requant,
        weights: compiler.options.weights,
        weight_bits: compiler.options.weight_bits,
        repairs: calibrated.as_ref().map(|c| c.summary().repairs).filter(|r| *r != qcc_passes::Repairs::NONE),
        float_layers: compiler.policy.float().map(String::from).collect(),
        pins: compiler.options.pins.iter().map(|(n, d)| (n.clone(), d.name().into())).collect(),
        gains_by_narrow_weights: subject.gains_by_narrow_weights,
        is_tuned: !program.tunings().is_empty(),
        host: timed.host.clone(),
    };
    let mut facts = Facts {
        format: FORMAT,
        model: setup.model.clone(),
        verdict: Vec::new(),
        grade: Grade::Unknown,
        contenders,
        edges: edges(prepared.graph(), &layers),
        layers,
        time,
        findings: findings(&report),
        next: Vec::new(),
        explanation: report.to_string(),
        conditions,
    };
    facts.findings.extend(disturbance(&facts.contenders));
    facts.grade = grade(&facts);
    facts.verdict = verdict(&facts);
    facts.next = suggestions(&facts);
    Ok(facts)
}

/// What is compared, float first and the subject last.
fn contenders(precision: Precision) -> Vec<Precision> {
    match precision {
        Precision::Float => vec![Precision::Float],
        Precision::FakeQuant => vec![Precision::Float, Precision::FakeQuant],
        Precision::Int8 => vec![Precision::Float, Precision::FakeQuant, Precision::Int8],
        Precision::Int8Dynamic => vec![Precision::Float, Precision::Int8Dynamic],
    }
}

/// Samples from all over those that there are, as many as are wanted: images, else those for calibration, else made-up ones.
fn observed_samples(setup: &Setup, compiler: &Compiler, graph: &Graph) -> Result<(Feed, SampleFacts), Error> {
    let inputs = graph_inputs(graph);
    let samples = match setup.images.as_ref().or(compiler.samples.as_ref()) {
        Some(samples) => samples.clone(),
        None => dead_leaves(&inputs, &compiler.preprocess)?.unwrap_or_else(Samples::noise),
    };
    let feed = samples.spread(setup.samples).bind(&inputs, &compiler.preprocess)?;
    let found = SampleFacts {
        origin: samples.origin().into(),
        count: feed.samples(),
        is_made_up: samples.is_noise(),
    };
    Ok((feed, found))
}

/// Accuracy of each model on the images, what these are, and why there is none where the results are no scores.
type Evaluated = (Option<Vec<Accuracy>>, Option<SampleFacts>, Option<String>);

fn accuracy(setup: &Setup, models: &[Model], progress: &Progress<'_>) -> Result<Evaluated, Error> {
    let (Some(samples), Some(first)) = (&setup.images, models.first()) else { return Ok((None, None, None)) };
    let feed = samples.bind(first.inputs(), &setup.compiler.preprocess)?;
    let images = SampleFacts {
        origin: samples.origin().into(),
        count: feed.samples(),
        is_made_up: samples.is_noise(),
    };
    let found = evaluate(models, &feed, &setup.threads, &|done, total| progress("evaluating", done, total));
    let found = match found {
        Ok(found) => found,
        // Boxes, masks or sentences.
        Err(Error::Evaluation(why)) => return Ok((None, Some(images), Some(why))),
        Err(e) => return Err(e),
    };
    let of = |s: crate::Score| Accuracy {
        samples: found.samples,
        top1: s.top1,
        top5: s.top5,
        agreement: s.agreement,
        sqnr: Some(crate::Decibels(s.sqnr_db)).filter(|d| d.0 > f64::NEG_INFINITY),
    };
    Ok((Some(found.scores.into_iter().map(of).collect()), Some(images), None))
}

fn calibration_facts(calibrated: &Calibrated) -> CalibrationFacts {
    let summary = calibrated.summary();
    CalibrationFacts {
        origin: summary.origin.clone(),
        samples: summary.samples,
        calibrator: summary.calibrator.to_string(),
        is_made_up: summary.synthetic,
        batch_norms: summary.batch_norms,
        is_measured: summary.measured.is_some(),
    }
}

fn contender_facts(
    programs: &[Program],
    models: &[Model],
    runs: &[Run],
    accuracy: &Option<Vec<Accuracy>>,
    seen: &Observation,
) -> Result<Vec<Contender>, Error> {
    let mut contenders = Vec::new();
    for (i, ((program, model), run)) in programs.iter().zip(models).zip(runs).enumerate() {
        let memory = model.memory();
        let sqnr = match run.precision {
            Precision::Float => None,
            Precision::FakeQuant => seen.results,
            Precision::Int8 | Precision::Int8Dynamic => seen.results_int8.or(seen.results),
        };
        contenders.push(Contender {
            name: match run.requant {
                Some(mode) => format!("{} {}", run.precision.name(), mode.name()),
                None => run.precision.name().into(),
            },
            precision: run.precision,
            requant: run.requant,
            accuracy: accuracy.as_ref().and_then(|a| a.get(i).copied()),
            sqnr,
            latency_ms: run.latency_ms,
            load_ms: run.load_ms,
            file_bytes: file_bytes(program)?,
            weight_bytes: memory.weights,
            arena_bytes: memory.arena,
            code_bytes: memory.code,
            memory_mib: run.memory_mib,
            requant_share: run.requant_share,
            macs: model.macs(),
        });
    }
    Ok(contenders)
}

/// Bytes of the `.qcc` file of a program.
fn file_bytes(program: &Program) -> Result<u64, Error> {
    let failed =
        |e| ProgramError { path: "a temporary file".into(), source: crate::ContainerError::Write(e) };
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("model.qcc");
    program.save(&path)?;
    Ok(path.metadata().map_err(failed)?.len())
}

/// The notes of passes about why a node is where it is.
fn reasons(report: &Report) -> BTreeMap<&str, String> {
    const PLACING: [&str; 4] = ["insert_fake_quant", "lower_to_int8", "quantize_dynamic", "assign_devices"];
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in report.records.iter().filter(|r| PLACING.contains(&r.pass)) {
        for note in record.of(NoteKind::Declined) {
            let own = reasons.entry(&note.node).or_default();
            // Two passes may decline for one reason.
            if !own.contains(&note.text.as_str()) {
                own.push(&note.text);
            }
        }
    }
    reasons.into_iter().map(|(node, texts)| (node, texts.join("; "))).collect()
}

/// What looks wrong.
fn findings(report: &Report) -> Vec<Finding> {
    let finding = |note: &qcc_passes::Note| Finding { subject: note.node.clone(), text: note.text.clone() };
    let of_lint = |f: &qcc_passes::Finding| Finding {
        subject: f.subject.to_string().replace('`', ""),
        text: format!("{}; {} [{}]", f.what, f.advice, f.rule),
    };
    let mut findings: Vec<Finding> = Vec::new();
    for finding in report.findings.iter().map(of_lint).chain(report.warnings().map(finding)) {
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings
}

/// A median that is so many times the fastest run is not that of a machine that has nothing else to do.
const DISTURBED: f64 = 1.4;

/// That times were disturbed, where they were.
fn disturbance(contenders: &[Contender]) -> Option<Finding> {
    let factor = |c: &Contender| c.latency_ms.median / c.latency_ms.min.max(f64::MIN_POSITIVE);
    let worst = contenders.iter().max_by(|a, b| factor(a).total_cmp(&factor(b)))?;
    (factor(worst) > DISTURBED).then(|| Finding {
        subject: "times".into(),
        text: format!(
            "the median run in {} took {:.1} times as long as the fastest one ({} and {}): something else was running on this \
             machine, and comparisons of times mean little. Try again when it is quiet, or with more --reps",
            worst.name,
            factor(worst),
            time::milliseconds(worst.latency_ms.median),
            time::milliseconds(worst.latency_ms.min)
        ),
    })
}

/// The nodes that are layers: inputs and what is computed of them, in the order of execution. A model that brings grids has nodes
/// that round; these are none.
fn layer_nodes(graph: &Graph) -> Vec<NodeId> {
    let computed = graph.computed();
    let is_layer = |n: &NodeId| computed.contains(n) && !matches!(graph.op(*n), Some(Op::FakeQuant(_)));
    graph.order().into_iter().filter(is_layer).collect()
}

fn layers(
    graph: &Graph,
    program: &Program,
    report: &Report,
    seen: &Observation,
    float: &Run,
    subject: &Run,
) -> Vec<LayerFacts> {
    let nodes = layer_nodes(graph);
    let names: BTreeSet<&str> = nodes.iter().map(|&n| graph.node(n).name.as_str()).collect();
    let mut times = time::layer_times(float, subject, &names);
    let reasons = reasons(report);
    let parts = (MOST_PARTS * DETAILED_LAYERS / nodes.len().max(DETAILED_LAYERS)).max(LEAST_PARTS);
    let placed = program.graph();
    let layer = |node: NodeId| {
        let name = graph.node(node).name.clone();
        let ty = graph.ty(node.out());
        let own = placed.find(&name).filter(|&n| placed.op(n).is_some());
        let is_input = graph.op(node).is_none();
        let computed = match own.and_then(|n| placed.node(n).device) {
            _ if is_input => Computed::Input,
            None => Computed::Fused,
            Some(Device::Int8Jit) => Computed::Int8,
            Some(Device::FloatJit) => Computed::Float,
            Some(Device::Interpreter) => Computed::Interpreter,
        };
        LayerFacts {
            op: graph.mnemonic(node).into(),
            lowered: own.map(|n| placed.mnemonic(n).into()),
            dtype: ty.dtype.to_string(),
            shape: ty.shape.dims().to_vec(),
            macs: graph.macs(node),
            computed,
            reason: reasons.get(name.as_str()).cloned(),
            time: times.remove(&name).unwrap_or_default(),
            error: seen.error(&name),
            values: seen.distribution(&name, parts),
            grid: seen.grid(&name),
            weights: weights(seen, &name, parts),
            channels: seen.channels(&name, parts),
            name,
        }
    };
    nodes.into_iter().map(layer).collect()
}

/// Weights of a layer: those of the quantized graph, which have scales, where there is one.
fn weights(seen: &Observation, layer: &str, parts: usize) -> Option<WeightFacts> {
    let graph = seen.quantized.as_ref().unwrap_or(&seen.float);
    let channels = weight_channels(graph, graph.find(layer)?)?;
    let magnitude = |c: &qcc_passes::ChannelWeights| f64::from(c.max.max(-c.min));
    let mut magnitudes: Vec<f64> = channels.iter().map(magnitude).collect();
    magnitudes.sort_by(f64::total_cmp);
    let (median, most) = (*magnitudes.get(magnitudes.len() / 2)?, *magnitudes.last()?);
    let grouped_by = channels.len().div_ceil(parts);
    let joined = |group: &[qcc_passes::ChannelWeights]| {
        let join =
            |a: qcc_passes::ChannelWeights, b: &qcc_passes::ChannelWeights| qcc_passes::ChannelWeights {
                min: a.min.min(b.min),
                max: a.max.max(b.max),
                scale: a.scale.zip(b.scale).map(|(a, b)| a.max(b)),
            };
        group.iter().skip(1).fold(group[0], join)
    };
    Some(WeightFacts {
        channels: channels.len(),
        grouped_by,
        groups: channels.chunks(grouped_by).map(joined).collect(),
        zero_channels: magnitudes.iter().filter(|m| **m == 0.0).count(),
        spread: if median > 0.0 { most / median } else { 1.0 },
    })
}

fn edges(graph: &Graph, layers: &[LayerFacts]) -> Vec<Edge> {
    let nodes = layer_nodes(graph);
    let numbers: BTreeMap<NodeId, usize> = nodes.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    let mut edges = BTreeSet::new();
    for (to, &node) in nodes.iter().enumerate() {
        for mut operand in graph.operands(node) {
            while let Some(Op::FakeQuant(_)) = graph.op(operand.node) {
                operand = graph.operand(operand.node, 0);
            }
            edges.extend(numbers.get(&operand.node).map(|&from| (from, to)));
        }
    }
    let device = |i: usize| match layers[i].computed {
        // Pictures and tokens come as the model takes them.
        Computed::Input => Some(Computed::Float),
        Computed::Fused => None,
        other => Some(other),
    };
    let edge = |(from, to)| {
        let converts = device(from).zip(device(to)).is_some_and(|(a, b)| a != b);
        Edge { from, to, converts }
    };
    edges.into_iter().map(edge).collect()
}

/// See [`Grade`].
fn grade(facts: &Facts) -> Grade {
    const CLOSE: (f64, f64) = (0.98, 30.0);
    const FAIR: (f64, f64) = (0.95, 20.0);
    let Some(subject) = facts.subject() else { return Grade::Unknown };
    if subject.precision == Precision::Float {
        return Grade::Float;
    }
    let of = |value: f64, (close, fair): (f64, f64)| match value {
        v if v >= close => Grade::Close,
        v if v >= fair => Grade::Fair,
        _ => Grade::Far,
    };
    match (subject.accuracy, subject.sqnr) {
        (Some(accuracy), _) => of(accuracy.agreement, (CLOSE.0, FAIR.0)),
        (None, Some(sqnr)) if !facts.conditions.samples.is_made_up => of(sqnr.0, (CLOSE.1, FAIR.1)),
        _ => Grade::Unknown,
    }
}

/// The outcome, a sentence each.
fn verdict(facts: &Facts) -> Vec<String> {
    let (Some(float), Some(subject)) = (facts.contenders.first(), facts.subject()) else { return Vec::new() };
    let mut sentences = Vec::new();
    let latency = time::milliseconds(subject.latency_ms.median);
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    if subject.precision == Precision::Float {
        sentences.push(format!("{} takes {latency} in float.", facts.model));
        if let Some(top1) = subject.accuracy.and_then(|a| a.top1) {
            sentences.push(format!("Top-1 is {}.", percent(top1)));
        }
        return sentences;
    }
    let smaller = float.file_bytes as f64 / subject.file_bytes.max(1) as f64;
    sentences.push(format!(
        "{} is {} float ({latency} instead of {}), and its file is {smaller:.1} times smaller.",
        subject.name,
        time::compared(subject.latency_ms.median, float.latency_ms.median),
        time::milliseconds(float.latency_ms.median),
    ));
    let accuracy = subject.accuracy.zip(float.accuracy);
    if let Some((own, reference)) = accuracy {
        let top1 = own.top1.zip(reference.top1).map_or(String::new(), |(own, float)| {
            format!("; top-1 is {}, that of float {}", percent(own), percent(float))
        });
        sentences.push(format!(
            "It agrees with float on {} of {} images{top1}.",
            percent(own.agreement),
            own.samples
        ));
    } else if let Some(sqnr) = subject.sqnr {
        let samples = &facts.conditions.samples;
        let what = if samples.is_made_up { "made-up samples, which says little" } else { "samples" };
        sentences.push(format!(
            "Its results have a signal-to-noise ratio of {sqnr} against float on {} {what}. Accuracy was not measured.",
            samples.count
        ));
    }
    if let Some((worst, db)) = facts.by_local_error().first() {
        let median = facts.median_local().unwrap_or(*db);
        let cause =
            facts.cause(worst).map_or(String::new(), |cause| format!(" Most of its noise is by {cause}."));
        sentences.push(match facts.outlier() {
            Some(_) => format!(
                "The layer to look at is `{}`: alone it has {db}, where the median layer has {median}.{cause}",
                worst.name
            ),
            None => format!(
                "No layer stands out: the worst one alone, `{}`, has {db}, the median one {median}.{cause}",
                worst.name
            ),
        });
    }
    sentences
}

#[cfg(test)]
mod tests;
