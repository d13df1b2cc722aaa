//! The founding experiment: float against fake-quant against int8 in every requantization mode, on one trained network
//! (accuracy and speed) and on ResNet-50 for CIFAR-100 (speed).

use crate::{
    BenchReport, Calibrated, Compiler, Error, JitOptions, Precision, Prepared, Program, Run, Samples,
    Threads, bench, bundled, evaluate, zoo,
};
use qcc_ir::{Graph, numerics::RequantMode};

/// The name of the trained network in the report.
pub const TRAINED: &str = "fashion_resnet8";
/// The name of the large network in the report.
pub const LARGE: &str = "resnet50-cifar100";

/// Programs of one model: float, fake-quant, and int8 in each of these modes (in the model's default where there are
/// none), as far as `precisions` has them. The model is prepared and calibrated once.
///
/// # Errors
/// Where the model cannot be calibrated or lowered.
pub fn programs(
    compiler: &Compiler,
    graph: Graph,
    precisions: &[Precision],
    modes: &[RequantMode],
) -> Result<Vec<Program>, Error> {
    let prepared = compiler.prepare(graph)?;
    compiler.check_policy(&prepared)?;
    let is_quantized = precisions.iter().any(|p| p.is_calibrated());
    let calibrated = is_quantized.then(|| compiler.calibrate(&prepared)).transpose()?;
    programs_of(compiler, &prepared, calibrated.as_ref(), precisions, modes)
}

/// [`programs`] of a model that was prepared and, where a precision needs it, calibrated before.
///
/// # Errors
/// Where the model cannot be lowered.
pub fn programs_of(
    compiler: &Compiler,
    prepared: &Prepared,
    calibrated: Option<&Calibrated>,
    precisions: &[Precision],
    modes: &[RequantMode],
) -> Result<Vec<Program>, Error> {
    let mut programs = Vec::new();
    for &precision in precisions {
        let with = compiler.clone().precision(precision);
        match precision {
            Precision::Int8 if !modes.is_empty() => {
                for &mode in modes {
                    programs.push(with.clone().requant(mode).lower(prepared, calibrated)?);
                }
            }
            Precision::Int8 | Precision::Int8Dynamic | Precision::Float | Precision::FakeQuant => {
                programs.push(with.lower(prepared, calibrated)?)
            }
        }
    }
    Ok(programs)
}

/// What the experiment compares. Its networks are convolutions: grids that are chosen at run time have no place in them.
const PRECISIONS: [Precision; 3] = [Precision::Float, Precision::FakeQuant, Precision::Int8];

/// How the experiment is run.
pub struct Setup {
    /// Tier, threads and observer; everything else is set by the experiment.
    pub compiler: Compiler,
    /// Repetitions of each timing.
    pub reps: usize,
}

/// Runs the experiment. `progress` is told the model, and how much of its part is done, of how much.
///
/// # Errors
/// Where a model cannot be compiled or run; there is nothing in it that depends on the user's files.
pub fn experiment(
    setup: &Setup,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<BenchReport, Error> {
    let jit = setup.compiler.jit_options()?;
    let trained =
        setup.compiler.clone().calibration(bundled::calibration()?).preprocess(bundled::preprocess());
    let graph = trained.import_onnx(bundled::FASHION_RESNET8)?;
    let trained = programs(&trained, graph, &PRECISIONS, &RequantMode::ALL)?;
    let mut report =
        named(TRAINED, bench(&trained, &jit, None, setup.reps, &mut |d, t| progress(TRAINED, d, t))?);
    accuracy(&trained, &jit, &mut report)?;

    // Its weights are random: noise is as good as any input.
    let large = setup.compiler.clone().calibration(Samples::noise().limit(2));
    let large = programs(&large, zoo::build(LARGE)?, &PRECISIONS, &RequantMode::ALL)?;
    let timed = bench(&large, &jit, None, setup.reps, &mut |d, t| progress(LARGE, d, t))?;
    report.host = timed.host.clone();
    report.runs.extend(named(LARGE, timed).runs);
    Ok(report)
}

fn named(model: &str, mut report: BenchReport) -> BenchReport {
    report.runs.iter_mut().for_each(|r| r.model = Some(model.into()));
    report
}

fn accuracy(programs: &[Program], jit: &JitOptions, report: &mut BenchReport) -> Result<(), Error> {
    let models = programs.iter().map(|p| p.jit(jit)).collect::<Result<Vec<_>, _>>()?;
    let Some(first) = models.first() else { return Ok(()) };
    let feed = bundled::test_images()?.bind(first.inputs(), &bundled::preprocess())?;
    let found = evaluate(&models, &feed, &Threads::new(0)?, &|_, _| {})?;
    for (run, score) in report.runs.iter_mut().zip(found.scores) {
        run.accuracy = Some(score);
    }
    Ok(())
}

/// What the experiment found, in one sentence; `None` where the report has not all of it.
pub fn conclusion(report: &BenchReport) -> Option<String> {
    let of = |model: &str, precision, mode: Option<RequantMode>| {
        report.runs.iter().find(|r| {
            r.model.as_deref() == Some(model)
                && r.precision == precision
                && (mode.is_none() || r.requant == mode)
        })
    };
    let fastest = |model: &str| {
        let int8 = report
            .runs
            .iter()
            .filter(|r| r.model.as_deref() == Some(model) && r.precision == Precision::Int8);
        int8.min_by(|a, b| a.latency_ms.median.total_cmp(&b.latency_ms.median))
    };
    let best = fastest(LARGE)?;
    let float = of(LARGE, Precision::Float, None)?;
    let fake = of(LARGE, Precision::FakeQuant, None)?;
    let share = |mode| of(LARGE, Precision::Int8, Some(mode))?.requant_share;
    let mode = best.requant?;
    let trained = of(TRAINED, Precision::Int8, Some(mode))?.accuracy.as_ref()?;
    let trained_float = of(TRAINED, Precision::Float, None)?.accuracy.as_ref()?;
    Some(format!(
        "On {LARGE} int8 ({mode}) is {} than float and fake-quant is {}; requantization takes {} of the time of int8 \
         with shift, {} with q15 and {} with float multipliers; on {TRAINED} top-1 is {} for int8 ({mode}) and {} for \
         float, a difference of {:+.2} points.",
        compared(best, float),
        compared(fake, float),
        price(share(RequantMode::Shift)?),
        price(share(RequantMode::Q15)?),
        price(share(RequantMode::Float)?),
        percent(trained.top1?),
        percent(trained_float.top1?),
        100.0 * (trained.top1? - trained_float.top1?),
        mode = mode.name(),
    ))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A share that was found by a difference, which noise can swallow.
fn price(share: f64) -> String {
    if share < 0.0005 { "too little to measure".into() } else { percent(share) }
}

/// `2.10 times faster` or `1.30 times slower`, by medians.
fn compared(run: &Run, other: &Run) -> String {
    let ratio = other.latency_ms.median / run.latency_ms.median;
    if ratio >= 1.0 { format!("{ratio:.2} times faster") } else { format!("{:.2} times slower", 1.0 / ratio) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Latency, Losses, Score};

    fn run(model: &str, precision: Precision, requant: Option<RequantMode>, ms: f64, top1: f64) -> Run {
        Run {
            model: Some(model.into()),
            precision,
            requant,
            latency_ms: Latency { median: ms, min: ms, p90: ms },
            gmacs: 1.0,
            peak_fraction: 0.5,
            gains_by_narrow_weights: false,
            requant_share: requant.map(|m| if m == RequantMode::Shift { 0.25 } else { 0.125 }),
            requant_share_of_layers: None,
            load_ms: 1.0,
            load: Vec::new(),
            first_run_ms: 1.0,
            memory_mib: None,
            footprint_bytes: 0,
            lost: Losses::default(),
            accuracy: (model == TRAINED).then_some(Score {
                top1: Some(top1),
                top5: Some(1.0),
                agreement: 1.0,
                sqnr_db: 30.0,
            }),
            layers: Vec::new(),
        }
    }

    #[test]
    fn the_sentence_says_what_the_figures_say() {
        let mut runs = Vec::new();
        for model in [TRAINED, LARGE] {
            runs.push(run(model, Precision::Float, None, 10.0, 0.92));
            runs.push(run(model, Precision::FakeQuant, None, 13.0, 0.915));
            for (mode, ms) in RequantMode::ALL.into_iter().zip([5.0, 6.0, 4.0, 4.5, 4.8]) {
                runs.push(run(model, Precision::Int8, Some(mode), ms, 0.918));
            }
        }
        let report = BenchReport { isa: "avx2".into(), threads: 1, host: None, runs };
        let text = conclusion(&report).unwrap();
        let best = RequantMode::ALL[2].name();
        assert!(
            text.starts_with(&format!("On resnet50-cifar100 int8 ({best}) is 2.50 times faster")),
            "{text}"
        );
        assert!(text.contains("fake-quant is 1.30 times slower"), "{text}");
        assert!(text.contains("25.0 % of the time of int8 with shift, 12.5 % with q15"), "{text}");
        assert!(text.contains("91.8 % for int8") && text.contains("-0.20 points"), "{text}");
        let mut cheap = report.clone();
        cheap.runs.iter_mut().for_each(|r| r.requant_share = r.requant.map(|_| 0.0));
        assert!(conclusion(&cheap).unwrap().contains("too little to measure with q15"));
        let half = BenchReport { runs: report.runs[..7].to_vec(), ..report };
        assert_eq!(conclusion(&half), None);
    }
}
