//! `qcc run`.

use super::{
    inputs::{self, Source},
    values,
};
use crate::{
    args::Run,
    failure::Failure,
    table::{decimal, table},
};
use comfy_table::Table;
use qcc_runtime::{
    Compiler, DynamicModel, LoadPhase, Model, Preprocess, Program, ProgramFile, Session, TensorView, Threads,
    ValueRun,
    ir::{Tensor, onnx::Value},
    is_program, top,
};
use std::{
    collections::BTreeSet,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

pub(crate) fn run(args: &Run, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    let compiler = compiler.precision(args.precision);
    let compiler = args.requant.requant.iter().fold(compiler, |c, &mode| c.requant(mode));
    let compiler = compiler.threads(Threads::new(args.threads.threads)?);
    let start = Instant::now();
    let images = super::preprocess(&args.images);
    let ran = match is_program(&args.model) {
        false => {
            let model = compiler.dynamic_file(&args.model)?;
            run_dynamic(args, &compiler, &model, start.elapsed(), &images)?
        }
        true => match ProgramFile::load(&args.model, compiler.memory_limit())? {
            ProgramFile::Placed(program) => run_program(args, &compiler, &program)?,
            ProgramFile::Dynamic(program) => {
                let model = program.model_with(&compiler, args.model.display().to_string());
                let images = super::images_or(images, &program.info().preprocess);
                run_dynamic(args, &compiler, &model, start.elapsed(), &images)?
            }
        },
    };
    terminal.clear();
    if args.options.explain {
        for model in &ran.parts {
            write!(out, "{}", model.info().report)?;
        }
    }
    for (name, value) in &ran.outputs {
        match value {
            Value::Tensor(t) => writeln!(out, "{name}: {}, {}", values::describe(value), summary(t))?,
            _ => writeln!(out, "{name}: {}", values::describe(value))?,
        }
    }
    if let (Some(k), Some((_, Value::Tensor(tensor)))) = (args.top, ran.outputs.first()) {
        print_top(tensor, k, out)?;
    }
    if args.timings {
        writeln!(out, "{}", timings(&ran))?;
    }
    if let Some(folder) = &args.output_dir {
        write_outputs(&ran.outputs, folder)?;
    }
    Ok(())
}

/// What a run gave.
struct Ran {
    /// By name, in the order of the model's signature.
    outputs: Vec<(String, Value)>,
    /// What the model was compiled to.
    parts: Vec<Model>,
    /// Milliseconds of what came before machine code was made, by name.
    before: Vec<(&'static str, f64)>,
    first_run: Duration,
}

fn run_program(args: &Run, compiler: &Compiler, program: &Program) -> Result<Ran, Failure> {
    let model = compiler.jit(program)?;
    let preprocess = super::preprocess_of(&args.images, model.info())?;
    let inputs = inputs::read(source(args), model.inputs(), Vec::new(), &preprocess)?;
    let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
    let start = Instant::now();
    let outputs = Session::new(&model).run(&views)?;
    let first_run = start.elapsed();
    let names = model.outputs().iter().map(|o| o.name.clone());
    let outputs = outputs.into_iter().map(Value::Tensor);
    Ok(Ran { outputs: names.zip(outputs).collect(), parts: vec![model], before: Vec::new(), first_run })
}

/// Shapes are those of arrays that are given, or what the command line and the model say.
fn run_dynamic(
    args: &Run,
    compiler: &Compiler,
    model: &DynamicModel,
    read: Duration,
    images: &Preprocess,
) -> Result<Ran, Failure> {
    let inputs = values::of_model(source(args), model, compiler, images)?;
    let start = Instant::now();
    let ValueRun { outputs, run } = model.run_values(&inputs)?;
    let all = start.elapsed();
    let names = model.model().outputs().map(str::to_owned);
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let mut before = vec![("read the file", ms(read))];
    if !run.calibration_time.is_zero() {
        before.push(("calibration", ms(run.calibration_time)));
    }
    before.push(("import, passes and code", ms(run.compile_time)));
    let first_run = all.saturating_sub(run.compile_time + run.calibration_time);
    Ok(Ran { outputs: names.zip(outputs).collect(), parts: run.models, before, first_run })
}

/// Where the inputs come from.
fn source(args: &Run) -> Source<'_> {
    if args.zeros { Source::Zeros } else { Source::Files(&args.input) }
}

/// Where the time to the first output went.
fn timings(ran: &Ran) -> Table {
    let phases = ran.parts.iter().flat_map(Model::load_phases);
    let (beside, following): (Vec<_>, Vec<_>) = phases.partition(|p| p.meanwhile);
    let first_run = ran.first_run.as_secs_f64() * 1e3;
    let named = |p: LoadPhase| (p.name.to_string(), p.ms);
    let mut rows: Vec<(String, f64)> = ran.before.iter().map(|(name, ms)| (name.to_string(), *ms)).collect();
    // Making code is a part of what came before, where that is there.
    let (own, part) = if rows.is_empty() { (following, Vec::new()) } else { (Vec::new(), following) };
    rows.extend(own.into_iter().map(named));
    rows.push(("the first run".to_string(), first_run));
    let total = rows.iter().map(|(_, ms)| ms).sum::<f64>();
    rows.push(("together".to_string(), total));
    rows.extend(part.into_iter().map(named).map(|(name, ms)| (format!("of that: {name}"), ms)));
    rows.extend(beside.into_iter().map(named).map(|(name, ms)| (format!("meanwhile: {name}"), ms)));
    let mut table = table(vec!["phase", "ms"], 1);
    for (phase, ms) in rows {
        table.add_row(vec![phase, decimal(Some(ms), 2)]);
    }
    table
}

/// Range and mean, in one phrase.
fn summary(tensor: &Tensor) -> String {
    let values = tensor.to_f64();
    let (mut min, mut max, mut sum, mut odd) = (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0usize);
    for x in &values {
        if !x.is_finite() {
            odd += 1;
            continue;
        }
        (min, max, sum) = (min.min(*x), max.max(*x), sum + x);
    }
    let finite = values.len() - odd;
    let range = match finite {
        0 => "no finite values".to_string(),
        n => format!("from {min:.6} to {max:.6}, mean {:.6}", sum / n as f64),
    };
    if odd > 0 { format!("{range}, {odd} not finite") } else { range }
}

fn print_top(tensor: &Tensor, k: usize, out: &mut impl Write) -> Result<(), Failure> {
    let values: Vec<f32> = tensor.to_f64().into_iter().map(|x| x as f32).collect();
    let rows = if tensor.shape().rank() > 1 { tensor.shape()[0].max(1) } else { 1 };
    let width = (values.len() / rows).max(1);
    for (i, row) in values.chunks(width).enumerate() {
        if rows > 1 {
            writeln!(out, "row {i}")?;
        }
        for (index, value) in top(row, k) {
            writeln!(out, "{index:>6}  {value:.6}")?;
        }
    }
    Ok(())
}

fn write_outputs(outputs: &[(String, Value)], folder: &Path) -> Result<(), Failure> {
    let failed = |source| Failure::Write { path: folder.display().to_string(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut taken = BTreeSet::new();
    for (name, value) in outputs {
        values::write(value, folder, &file_name(name, &mut taken))?;
    }
    Ok(())
}

/// A name from a model as a file name: a model must not choose where files go.
fn file_name(name: &str, taken: &mut BTreeSet<String>) -> String {
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let base: String = name.chars().map(plain).take(200).collect();
    let base = if base.is_empty() || base.starts_with('.') { format!("_{base}") } else { base };
    let mut candidate = base.clone();
    let mut i = 1;
    while !taken.insert(candidate.clone()) {
        candidate = format!("{base}_{i}");
        i += 1;
    }
    candidate
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_runtime::ir::Shape;

    #[test]
    fn names_of_outputs_stay_in_the_folder() {
        let mut taken = BTreeSet::new();
        let mut name = |n: &str| file_name(n, &mut taken);
        assert_eq!(name("logits"), "logits");
        assert_eq!(name("../../etc/passwd"), "_.._.._etc_passwd");
        assert_eq!((name("a/b"), name("a:b"), name("")), ("a_b".into(), "a_b_1".into(), "_".into()));
    }

    #[test]
    fn summaries_leave_out_what_is_not_finite() {
        let t = Tensor::from_vec(Shape::new([3]).unwrap(), vec![1.0f32, f32::NAN, 3.0]).unwrap();
        assert_eq!(summary(&t), "from 1.000000 to 3.000000, mean 2.000000, 1 not finite");
    }
}
