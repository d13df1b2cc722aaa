//! `qcc report`.

use crate::{args::Report, failure::Failure, table::bytes};
use qcc_report::{comparison_page, from_json, page, to_json};
use qcc_runtime::{
    Samples, Threads, is_program,
    workbench::{self, Facts, Setup},
};
use std::{env, io::Write, path::Path};

pub(crate) fn run(args: &Report, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    if let ([before, after], Some(output)) = (&args.compare[..], &args.output) {
        return compare(before, after, output, out);
    }
    let Some(model) = &args.model else { return Ok(()) };
    if is_program(model) {
        let why = "a report compares with float, which a .qcc file does not hold: give the .onnx, with the same options";
        return Err(Failure::Usage(why.into()));
    }
    let (compiler, terminal) =
        super::compiler(&args.options, &args.preprocess, args.tier.isa.as_deref(), quiet)?;
    let mut compiler = compiler.precision(args.precision).threads(Threads::new(args.threads.threads)?);
    if let Some(mode) = args.requant.requant {
        compiler = compiler.requant(mode);
    }
    let graph = compiler.import_file(model)?;
    let name = model.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
    let setup = Setup {
        images: images(args)?,
        samples: args.report_samples,
        reps: args.reps,
        threads: Threads::new(0)?,
        command: Some(env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect()),
        ..Setup::new(name, compiler)
    };
    let facts = workbench::facts(&setup, graph, &|what, done, total| terminal.progress(what, done, total))?;
    terminal.clear();
    if args.options.explain {
        write!(out, "{}", facts.explanation)?;
    }
    let output = args.output.clone().unwrap_or_else(|| model.with_extension("report.html"));
    let html = page(&facts).map_err(|source| failed(&output, source))?;
    super::write(&output, &html)?;
    if let Some(path) = &args.json {
        super::write(path, &to_json(&facts).map_err(|source| failed(path, source))?)?;
    }
    print(&facts, out)?;
    writeln!(out, "{}: {}", output.display(), bytes(html.len() as u64))?;
    Ok(())
}

fn images(args: &Report) -> Result<Option<Samples>, Failure> {
    let Some(path) = &args.images else { return Ok(None) };
    let mut samples = Samples::open(path)?;
    if let Some(labels) = &args.labels {
        samples = samples.with_labels(labels)?;
    }
    Ok(Some(match args.limit {
        Some(n) => samples.limit(n),
        None => samples,
    }))
}

/// The outcome, and the first of what to try.
fn print(facts: &Facts, out: &mut impl Write) -> Result<(), Failure> {
    facts.verdict.iter().try_for_each(|sentence| writeln!(out, "{sentence}"))?;
    for suggestion in facts.next.iter().take(3) {
        writeln!(out, "try {}: {}", suggestion.options.join(" "), suggestion.reason)?;
    }
    Ok(())
}

fn compare(before: &Path, after: &Path, output: &Path, out: &mut impl Write) -> Result<(), Failure> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path)
            .map_err(|source| Failure::Read { path: path.display().to_string(), source })?;
        from_json(&text).map_err(|source| failed(path, source))
    };
    let comparison = workbench::compare(read(before)?, read(after)?);
    let html = comparison_page(&comparison).map_err(|source| failed(output, source))?;
    super::write(output, &html)?;
    comparison.verdict.iter().try_for_each(|sentence| writeln!(out, "{sentence}"))?;
    writeln!(out, "{}: {}", output.display(), bytes(html.len() as u64))?;
    Ok(())
}

fn failed(path: &Path, source: qcc_report::ReportError) -> Failure {
    Failure::Report { path: path.display().to_string(), source }
}
