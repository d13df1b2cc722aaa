//! `qcc eval`.

use crate::{
    args::{Eval, Modes},
    failure::Failure,
    table::{decimal, percent, table},
    terminal::Terminal,
};
use qcc_runtime::{
    Compiler, Model, Precision, Preprocess, Samples, Threads, evaluate, experiment::programs_of, is_program,
};
use serde_json::json;
use std::io::Write;

pub(crate) fn run(args: &Eval, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) =
        super::compiler(&args.options, &args.preprocess, args.tier.isa.as_deref(), quiet)?;
    let (models, preprocess) = models(args, &compiler, &terminal)?;
    terminal.clear();
    let Some(first) = models.first() else { return Ok(()) };
    let mut samples = Samples::open(&args.images)?;
    if let Some(labels) = &args.labels {
        samples = samples.with_labels(labels)?;
    }
    if let Some(n) = args.limit {
        samples = samples.limit(n);
    }
    let feed = samples.bind(first.inputs(), &preprocess)?;
    let threads = Threads::new(args.threads)?;
    let found =
        evaluate(&models, &feed, &threads, &|done, total| terminal.progress("evaluating", done, total))?;
    terminal.clear();
    if feed.labels().is_none() {
        terminal.warn("no labels: only the agreement of the models is measured; give --labels");
    }
    if args.options.explain {
        for model in &models {
            write!(out, "{}", model.info().report)?;
        }
    }

    let reference = name_of(first);
    let against = [format!("agrees with {reference}"), format!("SQNR to {reference}, dB")];
    let header = vec!["precision", "top-1", "top-5", &against[0], &against[1]];
    let mut rows = table(header, 1);
    for (i, (model, score)) in models.iter().zip(&found.scores).enumerate() {
        let to_reference = |text: String| if i == 0 { "-".to_string() } else { text };
        rows.add_row([
            name_of(model),
            percent(score.top1, 2),
            percent(score.top5, 2),
            to_reference(percent(Some(score.agreement), 2)),
            to_reference(decimal(Some(score.sqnr_db), 1)),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "{} samples of {}, {} on {}",
        found.samples,
        samples.origin(),
        args.model.display(),
        first.tier()
    )?;
    if let Some(path) = &args.json {
        let model = |(model, score)| json!({ "model": name_of(model), "score": score });
        let scores: Vec<_> = models.iter().zip(&found.scores).map(model).collect();
        let report = json!({ "samples": found.samples, "scores": scores });
        super::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// The models to compare, what they are compared with first, and how images become their inputs.
fn models(
    args: &Eval,
    compiler: &Compiler,
    terminal: &Terminal,
) -> Result<(Vec<Model>, Preprocess), Failure> {
    let mut models = Vec::new();
    if is_program(&args.model) {
        let model = compiler.compile_file(&args.model)?;
        let preprocess = super::preprocess_of(&args.preprocess, model.info())?;
        if let Some(reference) = &args.reference {
            let float = compiler.clone().precision(Precision::Float).preprocess(preprocess.clone());
            let float = float.image_input(model.info().pixels.is_some());
            models.push(float.compile_file(reference)?);
        }
        models.push(model);
        return Ok((models, preprocess));
    }
    if args.reference.is_some() {
        return Err(Failure::Usage(
            "--reference goes with a .qcc model; an .onnx is its own reference".into(),
        ));
    }
    let wanted: Vec<Precision> =
        Precision::ALL.into_iter().filter(|p| *p == Precision::Float || args.precision.contains(p)).collect();
    let prepared = compiler.prepare(compiler.import_file(&args.model)?)?;
    let is_quantized = wanted.iter().any(|p| p.is_calibrated());
    let calibrated = is_quantized.then(|| compiler.calibrate(&prepared)).transpose()?;
    if let (Some(calibrated), Some(_)) = (&calibrated, &args.options.calibration.calibrate) {
        for finding in compiler.saturation(&prepared, calibrated, &Samples::open(&args.images)?)? {
            terminal.warn(&finding.to_string());
        }
    }
    for program in programs_of(compiler, &prepared, calibrated.as_ref(), &wanted, &Modes::of(&args.requant))?
    {
        models.push(compiler.jit(&program)?);
    }
    Ok((models, super::preprocess(&args.preprocess)))
}

/// `float`, `fake-quant`, or `int8 q15`.
fn name_of(model: &Model) -> String {
    let info = model.info();
    match info.precision {
        Precision::Int8 => format!("int8 {}", info.requant.name()),
        other => other.name().into(),
    }
}
