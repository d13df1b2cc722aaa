//! `qcc bench`.

use crate::{
    args::{Bench, LayerOrder, Modes},
    failure::Failure,
    table::{bytes, decimal, elided, percent, table},
    terminal::Terminal,
};
use qcc_runtime::{
    BenchReport, Compiler, Host, Layer, MemoryLevel, Precision, Run, TIERS, Threads, Tier, bench,
    experiment::{self, Setup, conclusion, experiment, programs},
    is_program,
};
use std::{collections::BTreeMap, io::Write, path::Path};

pub(crate) fn run(args: &Bench, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    if args.peaks {
        return peaks(args, &terminal, out);
    }
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

/// What one core can do at best, by tier.
fn peaks(args: &Bench, terminal: &Terminal, out: &mut impl Write) -> Result<(), Failure> {
    let tiers = Tier::available();
    let mut hosts = Vec::with_capacity(tiers.len());
    for tier in tiers {
        terminal.spin(&format!("measuring {tier}"));
        hosts.push(Host::measure(tier, u64::MAX)?);
    }
    terminal.clear();
    let Some(first) = hosts.first() else { return Ok(()) };
    writeln!(out, "{}, one core\n", first.cpu)?;
    let levels: Vec<String> = first.memory.iter().map(|l| format!("{} GB/s", l.name)).collect();
    let header = ["tier", "int8 GMAC/s", "float GMAC/s"];
    let mut rows = table(header.into_iter().chain(levels.iter().map(String::as_str)).collect(), 1);
    for tier in &TIERS {
        match hosts.iter().find(|h| h.isa == tier.name) {
            Some(host) => {
                let mut row = vec![host.isa.clone()];
                row.extend([host.peaks.int8, host.peaks.float].map(|p| format!("{:.1}", p / 1e9)));
                row.extend(host.memory.iter().map(|l| format!("{:.1}", l.gb_per_s)));
                rows.add_row(row)
            }
            None => rows.add_row([tier.name, "not of this CPU"]),
        };
    }
    writeln!(out, "{rows}\n\n{}", buffers(&first.memory))?;
    match &args.json {
        Some(path) => super::write(path, serde_json::to_string_pretty(&BTreeMap::from([("tiers", &hosts)]))?),
        None => Ok(()),
    }
}

/// What the bandwidths were measured on.
fn buffers(levels: &[MemoryLevel]) -> String {
    let level = |l: &MemoryLevel| {
        let of = l.capacity_bytes.map_or(String::new(), |c| format!(" of {}", bytes(c)));
        format!("{} {}{of}", l.name, bytes(l.buffer_bytes))
    };
    format!("Buffers read: {}.", levels.iter().map(level).collect::<Vec<_>>().join(", "))
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
        vec![compiler.program_of_file(path)?]
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
    terminal.spin("measuring this CPU");
    let report = bench(&programs, &jit, args.reps, &mut |done, total| {
        terminal.progress("timing", done, total);
    })?;
    terminal.clear();
    writeln!(out, "{}, {}", path.display(), conditions(args, &report))?;
    print_host(&report, out)?;
    print(args, report.runs.iter(), out)?;
    if let Some(hint) = narrow_weights(&report) {
        writeln!(out, "{hint}")?;
    }
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
    let setup = Setup { compiler: compiler.clone(), reps: args.reps };
    let report = experiment(&setup, &mut |model, done, total| terminal.progress(model, done, total))?;
    terminal.clear();
    print_host(&report, out)?;
    writeln!(out)?;
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

/// That the CPU would be faster with other weights, where it would.
fn narrow_weights(report: &BenchReport) -> Option<String> {
    let host = report.host.as_ref().filter(|_| report.runs.iter().any(|r| r.gains_by_narrow_weights))?;
    let [all, narrow] = [host.peaks.int8, host.peaks.int8_narrow].map(|p| p / 1e9);
    Some(format!(
        "With weights of 7 bits (--weight-bits 7) one core would reach {narrow:.0} instead of {all:.0} GMAC/s in int8 on \
         {}, at some cost in accuracy.",
        host.isa
    ))
}

fn conditions(args: &Bench, report: &BenchReport) -> String {
    let threads = if report.threads == 1 { "1 thread".into() } else { format!("{} threads", report.threads) };
    format!("{}, {threads}, {} runs each", report.isa, args.reps)
}

fn print_host(report: &BenchReport, out: &mut impl Write) -> Result<(), Failure> {
    let Some(host) = &report.host else { return Ok(()) };
    let level = |l: &MemoryLevel| format!("{} {:.0}", l.name, l.gb_per_s);
    writeln!(
        out,
        "{}: one core reaches {:.0} GMAC/s in int8 and {:.0} in float, and reads {} GB/s",
        host.cpu,
        host.peaks.int8 / 1e9,
        host.peaks.float / 1e9,
        host.memory.iter().map(level).collect::<Vec<_>>().join(", "),
    )?;
    Ok(())
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
        "mem MiB",
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
            percent(Some(run.peak_fraction), 1),
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
    if let Some(order) = args.layers {
        runs.clone().try_for_each(|run| print_layers(run, order, out))?;
    }
    Ok(())
}

fn name_of(run: &Run) -> String {
    match run.requant {
        Some(mode) => format!("{} {}", run.precision.name(), mode.name()),
        None => run.precision.name().into(),
    }
}

/// Widths of names in the table of layers, which with its figures is to fit into 100 columns.
const NAME_WIDTH: usize = 19;
const KERNEL_WIDTH: usize = 20;

fn print_layers(run: &Run, order: LayerOrder, out: &mut impl Write) -> Result<(), Failure> {
    let mut layers: Vec<&Layer> = run.layers.iter().collect();
    if order == LayerOrder::Lost {
        layers.sort_by(|a, b| b.lost_ms.total_cmp(&a.lost_ms));
    }
    let header = vec![
        "layer", "kernel", "us", "time", "GMAC/s", "peak", "KB", "MAC/B", "bound", "by", "lost", "requant",
    ];
    let mut rows = table(header, 2);
    rows.column_iter_mut().skip(2).for_each(|column| {
        column.set_padding((0, 0));
    });
    for layer in layers {
        let has_macs = layer.macs > 0;
        rows.add_row([
            elided(&layer.name, NAME_WIDTH),
            kernel(layer),
            micros(layer.ms),
            percent(Some(layer.share), 0),
            decimal(has_macs.then_some(layer.gmacs), 0),
            percent(layer.peak_fraction, 0),
            kilobytes(layer.bytes.total()),
            decimal(has_macs.then_some(layer.intensity), 0),
            micros(layer.bound_ms()),
            if layer.is_memory_bound() { "mem".into() } else { "MAC".into() },
            micros(layer.lost_ms),
            percent(layer.requant_ms.map(|r| r / layer.min_ms.max(f64::MIN_POSITIVE)), 0),
        ]);
    }
    let sum = |of: fn(&Layer) -> f64| run.layers.iter().map(of).sum::<f64>();
    rows.add_row([
        "total".into(),
        String::new(),
        micros(sum(|l| l.ms)),
        percent(Some(sum(|l| l.share)), 0),
        format!("{:.0}", run.gmacs),
        percent(Some(run.peak_fraction), 0),
        kilobytes(run.layers.iter().map(|l| l.bytes.total()).sum()),
        String::new(),
        micros(run.lost.bound_ms),
        String::new(),
        micros(sum(|l| l.lost_ms)),
        percent(run.requant_share_of_layers, 0),
    ]);
    writeln!(out, "\n{}\n{rows}", name_of(run))?;
    writeln!(out, "{}", run.lost.sentence(&run.layers, run.latency_ms.median))?;
    Ok(())
}

/// The kernel without the tier, which stands above the table, or the device where there is no code of its own.
fn kernel(layer: &Layer) -> String {
    let name = layer.kernel.split("__").next().unwrap_or_default();
    let mut name: String = name.chars().take(KERNEL_WIDTH).collect();
    if name.is_empty() {
        name.push_str(layer.device);
    }
    name
}

/// Microseconds: three digits at least, where there are any.
fn micros(ms: f64) -> String {
    let us = 1e3 * ms;
    let decimals = if us < 9.995 { 2 } else { usize::from(us < 99.95) };
    format!("{us:.decimals$}")
}

/// Thousands of bytes.
fn kilobytes(bytes: u64) -> String {
    let kb = bytes as f64 / 1e3;
    if kb < 99.95 { format!("{kb:.1}") } else { format!("{kb:.0}") }
}
