//! `qcc bench`.

use crate::{
    args::{Bench, Modes},
    failure::Failure,
    table::{decimal, percent, table},
    terminal::Terminal,
};
use qcc_runtime::{
    BenchReport, Compiler, Precision, Program, Run, Threads, bench,
    experiment::{self, Setup, conclusion, experiment, programs},
    is_program, measure_peaks,
};
use std::{io::Write, path::Path};

pub(crate) fn run(args: &Bench, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    let compiler = compiler.threads(Threads::new(args.threads.threads)?);
    let report = match &args.model {
        Some(model) => of_model(args, &compiler, &terminal, model, out)?,
        None => founding_experiment(args, &compiler, &terminal, out)?,
    };
    if let Some(path) = &args.json {
        super::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

fn of_model(
    args: &Bench,
    compiler: &Compiler,
    terminal: &Terminal,
    path: &Path,
    out: &mut impl Write,
) -> Result<BenchReport, Failure> {
    let jit = compiler.jit_options()?;
    let programs = if is_program(path) {
        vec![Program::load(path)?]
    } else {
        let precisions: Vec<Precision> =
            Precision::ALL.into_iter().filter(|p| args.precision.contains(p)).collect();
        programs(compiler, compiler.import_file(path)?, &precisions, &Modes::of(&args.requant))?
    };
    if args.options.explain {
        for program in &programs {
            write!(out, "{}", program.info().report)?;
        }
    }
    terminal.spin("measuring the peak of this CPU");
    let peaks = measure_peaks(&jit)?;
    let report = bench(&programs, &jit, args.reps, Some(peaks), &mut |done, total| {
        terminal.progress("timing", done, total);
    })?;
    terminal.clear();
    writeln!(out, "{}, {}", path.display(), conditions(args, &report))?;
    print(args, report.runs.iter(), out)?;
    Ok(report)
}

fn founding_experiment(
    args: &Bench,
    compiler: &Compiler,
    terminal: &Terminal,
    out: &mut impl Write,
) -> Result<BenchReport, Failure> {
    if !args.options.shape.is_empty() || args.options.calibration.calibrate.is_some() {
        let why = "without a model the founding experiment runs, which has shapes and samples of its own";
        return Err(Failure::Usage(why.into()));
    }
    terminal.spin("measuring the peak of this CPU");
    let peaks = measure_peaks(&compiler.jit_options()?)?;
    let setup = Setup { compiler: compiler.clone(), reps: args.reps, peaks: Some(peaks) };
    let report = experiment(&setup, &mut |model, done, total| terminal.progress(model, done, total))?;
    terminal.clear();
    for (model, what) in [
        (experiment::TRAINED, "trained on Fashion-MNIST, 28x28; accuracy on 1,000 test images"),
        (experiment::LARGE, "random weights, 32x32; speed only"),
    ] {
        writeln!(out, "{model}: {what}\n{}", conditions(args, &report))?;
        print(args, report.runs.iter().filter(|r| r.model.as_deref() == Some(model)), out)?;
        writeln!(out)?;
    }
    if let Some(sentence) = conclusion(&report) {
        writeln!(out, "{sentence}")?;
    }
    Ok(report)
}

fn conditions(args: &Bench, report: &BenchReport) -> String {
    let threads = if report.threads == 1 { "1 thread".into() } else { format!("{} threads", report.threads) };
    format!("{}, {threads}, {} runs each", report.isa, args.reps)
}

fn print<'r>(
    args: &Bench,
    runs: impl Iterator<Item = &'r Run> + Clone,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let float = runs.clone().find(|r| r.precision == Precision::Float).map(|r| r.latency_ms.median);
    let has_accuracy = runs.clone().any(|r| r.accuracy.is_some());
    let mut header = vec![
        "precision",
        "median ms",
        "min ms",
        "x float",
        "GMAC/s",
        "of peak",
        "requant",
        "load ms",
        "memory MiB",
    ];
    if has_accuracy {
        header.extend(["top-1", "agrees"]);
    }
    let mut rows = table(header, 1);
    for run in runs.clone() {
        let mut row = vec![
            name_of(run),
            format!("{:.3}", run.latency_ms.median),
            format!("{:.3}", run.latency_ms.min),
            decimal(float.map(|f| f / run.latency_ms.median), 2),
            format!("{:.1}", run.gmacs),
            percent(run.peak_fraction, 1),
            percent(run.requant_share, 1),
            format!("{:.1}", run.load_ms),
            decimal(run.memory_mib, 1),
        ];
        if has_accuracy {
            row.push(percent(run.accuracy.as_ref().and_then(|a| a.top1), 1));
            row.push(percent(run.accuracy.as_ref().map(|a| a.agreement), 1));
        }
        rows.add_row(row);
    }
    writeln!(out, "{rows}")?;
    if args.layers {
        runs.map(|run| print_layers(run, out)).collect::<Result<(), _>>()?;
    }
    Ok(())
}

fn name_of(run: &Run) -> String {
    match run.requant {
        Some(mode) => format!("{} {}", run.precision.name(), mode.name()),
        None => run.precision.name().into(),
    }
}

fn print_layers(run: &Run, out: &mut impl Write) -> Result<(), Failure> {
    let total: f64 = run.layers.iter().map(|l| l.ms).sum();
    let mut rows = table(vec!["layer", "op", "device", "kernel", "ms", "share", "GMAC/s"], 4);
    for layer in &run.layers {
        rows.add_row([
            layer.name.clone(),
            layer.op.into(),
            layer.device.into(),
            layer.kernel.clone(),
            format!("{:.4}", layer.ms),
            percent((total > 0.0).then(|| layer.ms / total), 1),
            decimal((layer.gmacs > 0.0).then_some(layer.gmacs), 1),
        ]);
    }
    writeln!(out, "\n{}\n{rows}", name_of(run))?;
    Ok(())
}
