//! Timing: programs of one model next to each other.

use crate::{
    DynamicModel, Error, Host, JitOptions, Layer, LoadPhase, Losses, Model, Precision, Preprocess, Program,
    ProgramError, Samples, Score, Session, TensorView, WeightBits, container::ContainerError,
    layers::Profiles, memory, model::output_views, quantile::Sorted,
};
use qcc_ir::{Tensor, numerics::RequantMode};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The timings of one model, as `qcc bench --json` writes them: see `docs/benchmark.md`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BenchReport {
    /// Name of the tier.
    pub isa: String,
    /// Threads of every run.
    pub threads: usize,
    /// What one core of the host can do with the tier; `None` without runs.
    pub host: Option<Host>,
    /// One for each precision and requantization.
    pub runs: Vec<Run>,
}

/// The timing of one program.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Run {
    /// The model; only where a report is about several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What it computes with.
    pub precision: Precision,
    /// Requantization; `None` without integers.
    #[serde(serialize_with = "requant_name")]
    pub requant: Option<RequantMode>,
    /// Time of one run.
    pub latency_ms: Latency,
    /// 10⁹ multiply-accumulates a second, by the median.
    pub gmacs: f64,
    /// The same as a share of the measured peak of the threads in use, of each layer in its arithmetic.
    pub peak_fraction: f64,
    /// Whether this CPU multiplied the weights, which were quantized to 8 bits, faster if they had 7.
    pub gains_by_narrow_weights: bool,
    /// Share of the time that goes into requantization (in fake-quant: into rounding to grids). Integers: by the
    /// difference to the same code that narrows its accumulators without requantizing them, the fastest run of each;
    /// noise may make it 0.
    pub requant_share: Option<f64>,
    /// The same by the sum of the layers' differences.
    pub requant_share_of_layers: Option<f64>,
    /// From a `.qcc` file to a session that is ready.
    pub load_ms: f64,
    /// Where that time went.
    pub load: Vec<LoadPhase>,
    /// The first run, which fills caches and pages.
    pub first_run_ms: f64,
    /// Memory that loading and the first run took at their peak, in MiB; `None` where the system does not tell.
    pub memory_mib: Option<f64>,
    /// Bytes that a run touches: weights, intermediate values, inputs and outputs.
    pub footprint_bytes: u64,
    /// Accuracy; where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Score>,
    /// What the run takes beyond the bounds of its layers.
    pub lost: Losses,
    /// The layers, in the order in which they run.
    pub layers: Vec<Layer>,
}

/// Milliseconds over the repetitions.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Half of the runs were faster.
    pub median: f64,
    /// The fastest run.
    pub min: f64,
    /// Nine of ten runs were faster.
    pub p90: f64,
}

fn requant_name<S: serde::Serializer>(mode: &Option<RequantMode>, s: S) -> Result<S::Ok, S::Error> {
    match mode {
        Some(mode) => s.serialize_some(mode.name()),
        None => s.serialize_none(),
    }
}

/// Contestants take turns this often, so that a disturbance of the machine hits them all.
const ROUNDS: usize = 5;
/// Runs that are not timed, at the beginning of each turn: the others have filled the caches with theirs.
const WARM_UP: usize = 2;
/// Runs in which every layer is timed, at most. They are runs of their own: reading the clock at every step would
/// lengthen the others.
const PROFILED: usize = 25;

/// What is timed.
enum Subject {
    /// A program, into memory of the caller.
    Whole(Session),
    /// A model of whose parts each decides what the next one is.
    Parts(DynamicModel),
}

struct Contestant {
    subject: Subject,
    times: Vec<Duration>,
    profiles: Profiles,
}

impl Contestant {
    fn new(subject: Subject) -> Contestant {
        Contestant { subject, times: Vec::new(), profiles: Profiles::default() }
    }

    fn turn(&mut self, inputs: &[Tensor], reps: usize, profiled: usize) -> Result<(), Error> {
        match &mut self.subject {
            Subject::Whole(session) => {
                let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
                let model = session.model().clone();
                let mut buffers: Vec<Vec<u8>> =
                    model.outputs().iter().map(|o| vec![0; o.ty.bytes()]).collect();
                let mut outputs = output_views(model.outputs(), buffers.iter_mut().map(|b| &mut b[..]));
                time(&mut self.times, reps, || session.run_into(&views, &mut outputs))?;
                for _ in 0..profiled {
                    session.start_profile();
                    let start = Instant::now();
                    session.run_into(&views, &mut outputs)?;
                    let run = start.elapsed();
                    self.profiles.add(session.profile(), run);
                }
                session.stop_profile();
            }
            Subject::Parts(model) => {
                time(&mut self.times, reps, || model.run(inputs).map(drop))?;
                for _ in 0..profiled {
                    let start = Instant::now();
                    let (_, layers) = model.profile(inputs)?;
                    self.profiles.add(layers, start.elapsed());
                }
            }
        }
        Ok(())
    }
}

/// Adds the times of so many runs, after those that warm up.
fn time(
    times: &mut Vec<Duration>,
    reps: usize,
    mut run: impl FnMut() -> Result<(), Error>,
) -> Result<(), Error> {
    for i in 0..WARM_UP + reps {
        let start = Instant::now();
        run()?;
        if i >= WARM_UP {
            times.push(start.elapsed());
        }
    }
    Ok(())
}

/// Times programs of one model: each is written to a `.qcc` file, loaded, and then all take turns on the same inputs, which
/// are noise where none are given. The host is measured too.
///
/// `progress` is told how many turns are done, of how many.
///
/// # Errors
/// Where a program cannot be written to a temporary file, compiled, or run.
pub fn bench(
    programs: &[Program],
    jit: &JitOptions,
    inputs: Option<&[Tensor]>,
    reps: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BenchReport, Error> {
    let mut loaded = Vec::with_capacity(programs.len());
    for program in programs {
        loaded.push(load(program, jit, inputs)?);
    }
    let inputs = match (inputs, loaded.first().and_then(|l| l.models.first())) {
        (None, Some(model)) => noise(model)?,
        (inputs, _) => inputs.unwrap_or_default().to_vec(),
    };
    let session = |l: &Loaded| l.models.iter().map(Session::new).map(Subject::Whole).next();
    let contestants = loaded.iter().filter_map(session).map(Contestant::new).collect();
    // What requantization costs is a property of the mode, but what is left without it is not: one is enough.
    let pack_only = programs.iter().find(|p| p.info().precision == Precision::Int8);
    let pack_only =
        pack_only.map(|p| p.jit(&JitOptions { measure_pack_only: true, ..jit.clone() })).transpose()?;
    let bare = pack_only.map(|model| Contestant::new(Subject::Whole(Session::new(&model))));
    compete(loaded, contestants, bare, jit, &inputs, reps, progress)
}

/// Times models on inputs of theirs as whoever runs them does: outputs are memory of their own. What a first run of these
/// shapes takes to compile is told as the time to load.
///
/// # Errors
/// Where a model does not take the inputs.
pub fn bench_dynamic(
    models: &[DynamicModel],
    jit: &JitOptions,
    inputs: &[Tensor],
    reps: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BenchReport, Error> {
    let mut loaded = Vec::with_capacity(models.len());
    for model in models {
        loaded.push(specialise(model, inputs)?);
    }
    let contestants = models.iter().map(|m| Contestant::new(Subject::Parts(m.clone()))).collect();
    compete(loaded, contestants, None, jit, inputs, reps, progress)
}

/// All take turns, also one that does not requantize.
fn compete(
    loaded: Vec<Loaded>,
    mut contestants: Vec<Contestant>,
    bare: Option<Contestant>,
    jit: &JitOptions,
    inputs: &[Tensor],
    reps: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BenchReport, Error> {
    let reps = reps.max(1);
    let mut report =
        BenchReport { isa: jit.tier.name.into(), threads: jit.threads.count(), host: None, runs: Vec::new() };
    if loaded.is_empty() {
        return Ok(report);
    }
    let host = Host::measure(jit.tier, loaded.iter().map(|l| footprint(&l.models)).max().unwrap_or(0))?;
    let has_bare = bare.is_some();
    contestants.extend(bare);
    let rounds = ROUNDS.min(reps);
    let turns = rounds * contestants.len();
    let mut turn = 0;
    for round in 0..rounds {
        let part = |of: usize| of * (round + 1) / rounds - of * round / rounds;
        for contestant in &mut contestants {
            contestant.turn(inputs, part(reps), part(reps.min(PROFILED)))?;
            turn += 1;
            progress(turn, turns);
        }
    }
    let bare = if has_bare { contestants.pop() } else { None };
    for (loaded, contestant) in loaded.into_iter().zip(contestants) {
        report.runs.extend(loaded.report(&contestant, bare.as_ref(), &host));
    }
    report.host = Some(host);
    Ok(report)
}

/// Bytes that a run touches.
fn footprint(models: &[Model]) -> u64 {
    let of = |model: &Model| {
        let memory = model.memory();
        let outside: usize = model.inputs().iter().chain(model.outputs()).map(|t| t.ty.bytes()).sum();
        memory.weights + memory.arena + outside as u64
    };
    models.iter().map(of).sum()
}

/// Noise for a model's inputs.
pub(crate) fn noise(model: &Model) -> Result<Vec<Tensor>, Error> {
    match model.inputs() {
        [] => Ok(Vec::new()),
        inputs => Ok(Samples::noise().bind(inputs, &Preprocess::default())?.batch(0)?),
    }
}

/// A model that is ready, and what that took.
struct Loaded {
    /// Its parts.
    models: Vec<Model>,
    load: Duration,
    first_run: Duration,
    memory: Option<u64>,
}

/// Loads a program as a user would: from a file.
fn load(program: &Program, jit: &JitOptions, inputs: Option<&[Tensor]>) -> Result<Loaded, Error> {
    let failed = |e| ProgramError { path: "a temporary file".into(), source: ContainerError::Write(e) };
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("model.qcc");
    program.save(&path)?;
    let before = memory::begin_peak();
    let start = Instant::now();
    let model = Program::load(&path)?.jit(jit)?;
    let mut session = Session::new(&model);
    let load = start.elapsed();
    let inputs = inputs.map_or_else(|| noise(&model), |given| Ok(given.to_vec()))?;
    let start = Instant::now();
    session.run(&inputs.iter().map(TensorView::from).collect::<Vec<_>>())?;
    let first_run = start.elapsed();
    Ok(Loaded { models: vec![model], load, first_run, memory: taken(before) })
}

/// Runs a model for the first time.
fn specialise(model: &DynamicModel, inputs: &[Tensor]) -> Result<Loaded, Error> {
    let before = memory::begin_peak();
    let start = Instant::now();
    let run = model.run(inputs)?;
    let first_run = start.elapsed().saturating_sub(run.compile_time + run.calibration_time);
    Ok(Loaded { models: run.models, load: run.compile_time, first_run, memory: taken(before) })
}

/// Memory that was taken at the peak since then.
fn taken(before: Option<u64>) -> Option<u64> {
    before.and_then(|before| Some(memory::peak()?.saturating_sub(before)))
}

impl Loaded {
    /// `None` of a model without a part.
    fn report(self, contestant: &Contestant, bare: Option<&Contestant>, host: &Host) -> Option<Run> {
        let first = self.models.first()?;
        let info = first.info();
        let latency = Latency::of(&contestant.times);
        let threads = first.threads().count();
        let footprint = footprint(&self.models);
        let bare = bare.filter(|_| info.precision == Precision::Int8);
        let layers = contestant.profiles.layers(bare.map(|b| &b.profiles), host, footprint, threads);
        let gmacs = self.models.iter().map(Model::macs).sum::<u64>() as f64 / 1e6 / latency.median;
        let at_peak: f64 = layers.iter().map(|l| l.compute_ms).sum();
        // Weights that the model brought as codes stay as they are.
        let are_quantized = info.precision == Precision::Int8 && info.calibration.is_some();
        let gains_by_narrow_weights = host.peaks.int8_narrow > host.peaks.int8
            && are_quantized
            && info.weight_bits == WeightBits::Eight
            && layers.iter().any(|l| l.is_product_of_codes() && !l.by_narrow_weights);
        let fastest: f64 = layers.iter().map(|l| l.min_ms).sum();
        let differences: f64 = layers.iter().filter_map(|l| l.requant_ms).sum();
        let (requant_share, requant_share_of_layers) = match info.precision {
            Precision::Float | Precision::Int8Dynamic => (None, None),
            Precision::FakeQuant => {
                let share = share_of(&layers, "FakeQuant");
                (Some(share), Some(share))
            }
            Precision::Int8 => (
                bare.map(|bare| (1.0 - Latency::of(&bare.times).min / latency.min).max(0.0)),
                Some(if fastest > 0.0 { differences / fastest } else { 0.0 }),
            ),
        };
        Some(Run {
            model: None,
            precision: info.precision,
            requant: Some(info.requant).filter(|_| info.precision == Precision::Int8),
            latency_ms: latency,
            gmacs,
            peak_fraction: at_peak / latency.median,
            gains_by_narrow_weights,
            requant_share,
            requant_share_of_layers,
            load_ms: milliseconds(self.load),
            load: self.models.iter().flat_map(Model::load_phases).collect(),
            first_run_ms: milliseconds(self.first_run),
            memory_mib: self.memory.map(|m| m as f64 / f64::from(1 << 20)),
            footprint_bytes: footprint,
            accuracy: None,
            lost: Losses::of(&layers, contestant.profiles.between_layers_ms(host)),
            layers,
        })
    }
}

/// Share of the layers' time that layers of one op take.
fn share_of(layers: &[Layer], op: &str) -> f64 {
    layers.iter().filter(|l| l.op == op).map(|l| l.share).sum()
}

impl Latency {
    fn of(times: &[Duration]) -> Latency {
        let ms = Sorted::of(times.iter().copied().map(milliseconds));
        let quantile = |q: f64| ms.quantile(q).unwrap_or(f64::NAN);
        Latency { median: quantile(0.5), min: quantile(0.0), p90: quantile(0.9) }
    }
}

fn milliseconds(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_times_that_occurred() {
        let times: Vec<Duration> = (1..=10).rev().map(Duration::from_millis).collect();
        assert_eq!(Latency::of(&times), Latency { median: 5.0, min: 1.0, p90: 9.0 });
        assert_eq!(Latency::of(&times[..1]), Latency { median: 10.0, min: 10.0, p90: 10.0 });
    }
}
