//! Timing: programs of one model next to each other.

use crate::{
    Error, Feed, JitOptions, Model, Precision, Preprocess, Program, ProgramError, Samples, Score, Session,
    TensorView, container::ContainerError, memory, model::output_views,
};
use qcc_codegen::{dense::spec::Product, peak};
use qcc_ir::numerics::RequantMode;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What a host can do at best on one thread, in multiply-accumulates a second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Peaks {
    /// u8 by s8 into s32.
    pub int8: f64,
    /// f32.
    pub float: f64,
}

/// Measures what one core reaches with the instructions of a tier. Takes a fraction of a second.
///
/// # Errors
/// Where no memory can be had for code.
pub fn measure_peaks(jit: &JitOptions) -> Result<Peaks, Error> {
    let measure = |product| Ok::<f64, Error>(1e9 * peak::measure(jit.tier, product)?);
    Ok(Peaks { int8: measure(Product::U8S8)?, float: measure(Product::F32)? })
}

/// The timings of one model, as `qcc bench --json` writes them.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BenchReport {
    /// Name of the tier.
    pub isa: String,
    /// Threads of every run.
    pub threads: usize,
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
    /// The same as a share of the measured peak of the threads in use, in the program's arithmetic.
    pub peak_fraction: Option<f64>,
    /// Share of the time that goes into requantization (in fake-quant: into rounding to grids). Integers: by the
    /// difference to the same code that narrows its accumulators without requantizing them, the fastest run of each;
    /// noise may make it 0.
    pub requant_share: Option<f64>,
    /// From a `.qcc` file to a session that is ready.
    pub load_ms: f64,
    /// Memory that loading and the first run took at their peak, in MiB; `None` where the system does not tell.
    pub memory_mib: Option<f64>,
    /// Accuracy; where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Score>,
    /// Times of the layers, in their order.
    pub layers: Vec<Layer>,
}

/// Milliseconds over the repetitions.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Latency {
    /// Half of the runs were faster.
    pub median: f64,
    /// The fastest run.
    pub min: f64,
    /// Nine of ten runs were faster.
    pub p90: f64,
}

/// The time of one layer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Layer {
    /// Name of the node.
    pub name: String,
    /// Its op.
    pub op: &'static str,
    /// Mean time of a run.
    pub ms: f64,
    /// Where it runs.
    pub device: &'static str,
    /// Name of the kernel.
    pub kernel: String,
    /// 10⁹ multiply-accumulates a second; 0 for ops that have none.
    pub gmacs: f64,
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

/// A program that is timed.
struct Contestant {
    session: Session,
    times: Vec<Duration>,
}

impl Contestant {
    fn new(model: &Model) -> Contestant {
        Contestant { session: Session::new(model), times: Vec::new() }
    }

    fn turn(&mut self, inputs: &[TensorView<'_>], reps: usize) -> Result<(), Error> {
        let model = self.session.model().clone();
        let mut buffers: Vec<Vec<u8>> = model.outputs().iter().map(|o| vec![0; o.ty.bytes()]).collect();
        let mut views = output_views(model.outputs(), &mut buffers);
        for i in 0..WARM_UP + reps {
            let start = Instant::now();
            self.session.run_into(inputs, &mut views)?;
            if i >= WARM_UP {
                self.times.push(start.elapsed());
            }
        }
        Ok(())
    }
}

/// Times programs of one model: each is written to a `.qcc` file, loaded, and then all take turns on the same input.
///
/// `peaks` is the host's, if measured. `progress` is told how many turns are done, of how many.
///
/// # Errors
/// Where a program cannot be written to a temporary file, compiled, or run.
pub fn bench(
    programs: &[Program],
    jit: &JitOptions,
    reps: usize,
    peaks: Option<Peaks>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BenchReport, Error> {
    let reps = reps.max(1);
    let mut loaded = Vec::with_capacity(programs.len());
    for program in programs {
        loaded.push(load(program, jit)?);
    }
    let mut contestants: Vec<Contestant> = loaded.iter().map(|l| Contestant::new(&l.model)).collect();
    // What requantization costs is a property of the mode, but what is left without it is not: one is enough.
    let pack_only = programs.iter().find(|p| p.info().precision == Precision::Int8);
    let pack_only =
        pack_only.map(|p| p.jit(&JitOptions { measure_pack_only: true, ..jit.clone() })).transpose()?;
    contestants.extend(pack_only.as_ref().map(Contestant::new));

    let Some(first) = loaded.first() else { return Ok(BenchReport::new(jit, Vec::new())) };
    let feed = noise_feed(&first.model)?;
    let batch = match &feed {
        Some(feed) => feed.batch(0)?,
        None => Vec::new(),
    };
    let inputs: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
    let rounds = ROUNDS.min(reps);
    let turns = rounds * contestants.len();
    let mut turn = 0;
    for round in 0..rounds {
        let share = reps * (round + 1) / rounds - reps * round / rounds;
        for contestant in &mut contestants {
            contestant.turn(&inputs, share)?;
            turn += 1;
            progress(turn, turns);
        }
    }
    let bare = pack_only.and_then(|_| contestants.pop()).map(|c| Latency::of(&c.times).min);
    let mut runs = Vec::with_capacity(loaded.len());
    for (loaded, contestant) in loaded.into_iter().zip(contestants) {
        runs.push(loaded.report(contestant, &inputs, reps, bare, peaks)?);
    }
    Ok(BenchReport::new(jit, runs))
}

/// Noise for a model's inputs, if it has any.
pub(crate) fn noise_feed(model: &Model) -> Result<Option<Feed>, Error> {
    match model.inputs() {
        [] => Ok(None),
        inputs => Ok(Some(Samples::noise().bind(inputs, &Preprocess::default())?)),
    }
}

struct Loaded {
    model: Model,
    load: Duration,
    memory: Option<u64>,
}

/// Loads a program as a user would: from a file.
fn load(program: &Program, jit: &JitOptions) -> Result<Loaded, Error> {
    let failed = |e| ProgramError { path: "a temporary file".into(), source: ContainerError::Write(e) };
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("model.qcc");
    program.save(&path)?;
    let before = memory::begin_peak();
    let start = Instant::now();
    let model = Program::load(&path)?.jit(jit)?;
    let mut session = Session::new(&model);
    let load = start.elapsed();
    if let Some(feed) = noise_feed(&model)? {
        let batch = feed.batch(0)?;
        let views: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
        session.run(&views)?;
    }
    let memory = before.and_then(|before| Some(memory::peak()?.saturating_sub(before)));
    Ok(Loaded { model, load, memory })
}

impl Loaded {
    fn report(
        self,
        mut contestant: Contestant,
        inputs: &[TensorView<'_>],
        reps: usize,
        bare: Option<f64>,
        peaks: Option<Peaks>,
    ) -> Result<Run, Error> {
        let latency = Latency::of(&contestant.times);
        contestant.session.start_profile();
        for _ in 0..reps.min(20) {
            contestant.session.run(inputs)?;
        }
        let layers: Vec<Layer> = contestant.session.profile().into_iter().map(Layer::of).collect();
        let info = self.model.info();
        let gmacs = self.model.macs() as f64 / 1e6 / latency.median;
        let threads = self.model.threads().count() as f64;
        let peak = peaks.map(|p| match info.precision {
            Precision::Int8 => p.int8,
            Precision::Float | Precision::FakeQuant => p.float,
        });
        let requant_share = match info.precision {
            Precision::Float => None,
            Precision::FakeQuant => Some(share_of(&layers, "FakeQuant")),
            Precision::Int8 => bare.map(|bare| (1.0 - bare / latency.min).max(0.0)),
        };
        Ok(Run {
            model: None,
            precision: info.precision,
            requant: Some(info.requant).filter(|_| info.precision == Precision::Int8),
            latency_ms: latency,
            gmacs,
            peak_fraction: peak.map(|p| gmacs * 1e9 / (p * threads)),
            requant_share,
            load_ms: milliseconds(self.load),
            memory_mib: self.memory.map(|m| m as f64 / f64::from(1 << 20)),
            accuracy: None,
            layers,
        })
    }
}

impl BenchReport {
    fn new(jit: &JitOptions, runs: Vec<Run>) -> BenchReport {
        BenchReport { isa: jit.tier.name.into(), threads: jit.threads.count(), runs }
    }
}

/// Share of the layers' time that layers of one op take.
fn share_of(layers: &[Layer], op: &str) -> f64 {
    let total: f64 = layers.iter().map(|l| l.ms).sum();
    let of_op: f64 = layers.iter().filter(|l| l.op == op).map(|l| l.ms).sum();
    if total > 0.0 { of_op / total } else { 0.0 }
}

impl Layer {
    fn of(layer: crate::LayerTime) -> Layer {
        let ms = milliseconds(layer.time);
        let gmacs = if ms > 0.0 { layer.macs as f64 / 1e6 / ms } else { 0.0 };
        let (name, op, device, kernel) = (layer.name, layer.op, layer.device.name(), layer.kernel);
        Layer { name, op, ms, device, kernel, gmacs }
    }
}

impl Latency {
    /// Quantiles are times that occurred: of an even number of runs, the median is the lower one in the middle.
    fn of(times: &[Duration]) -> Latency {
        let mut ms: Vec<f64> = times.iter().copied().map(milliseconds).collect();
        ms.sort_by(f64::total_cmp);
        let quantile = |q: f64| {
            let rank = (ms.len() as f64 * q).ceil().max(1.0) as usize - 1;
            ms.get(rank).copied().unwrap_or(f64::NAN)
        };
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

    #[test]
    fn shares_are_of_all_layers() {
        let layer =
            |op, ms| Layer { name: String::new(), op, ms, device: "", kernel: String::new(), gmacs: 0.0 };
        assert_eq!(
            share_of(&[layer("FakeQuant", 1.0), layer("Conv", 2.0), layer("FakeQuant", 1.0)], "FakeQuant"),
            0.5
        );
        assert_eq!(share_of(&[], "FakeQuant"), 0.0);
    }
}
