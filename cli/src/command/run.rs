//! `qcc run`.

use crate::{
    args::Run,
    failure::Failure,
    table::{decimal, table},
};
use comfy_table::Table;
use qcc_runtime::{
    LoadPhase, Model, Preprocess, Samples, Session, TensorInfo, TensorView, Threads, ir::Tensor, read_npy,
    top, write_npy,
};
use std::{
    collections::BTreeSet,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub(crate) fn run(args: &Run, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    let compiler = compiler.precision(args.precision);
    let compiler = args.requant.requant.iter().fold(compiler, |c, &mode| c.requant(mode));
    let compiler = compiler.threads(Threads::new(args.threads.threads)?);
    let model = compiler.compile_file(&args.model)?;
    terminal.clear();
    if args.options.explain {
        write!(out, "{}", model.info().report)?;
    }
    let inputs = if args.zeros {
        model.inputs().iter().map(|i| Tensor::zeros(i.ty.dtype, i.ty.shape.clone())).collect()
    } else {
        read_inputs(args, &model)?
    };
    let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
    let start = Instant::now();
    let mut session = Session::new(&model);
    let outputs = session.run(&views)?;
    let first = start.elapsed();
    for (info, tensor) in model.outputs().iter().zip(&outputs) {
        writeln!(out, "{}: {}[{}], {}", info.name, info.ty.dtype, info.ty.shape, summary(tensor))?;
    }
    if let Some(k) = args.top {
        print_top(&model, &outputs, k, out)?;
    }
    if args.timings {
        writeln!(out, "{}", timings(&model, first))?;
    }
    if let Some(folder) = &args.output_dir {
        write_outputs(&model, &outputs, folder)?;
    }
    Ok(())
}

/// Where the time to the first output went.
fn timings(model: &Model, first_run: Duration) -> Table {
    let (beside, following): (Vec<_>, Vec<_>) = model.load_phases().into_iter().partition(|p| p.meanwhile);
    let first_run = first_run.as_secs_f64() * 1e3;
    let total = following.iter().map(|p| p.ms).sum::<f64>() + first_run;
    let named = |p: LoadPhase| (p.name.to_string(), p.ms);
    let beside = beside.into_iter().map(|p| (format!("meanwhile: {}", p.name), p.ms));
    let first_and_total = [("the first run".to_string(), first_run), ("together".to_string(), total)];
    let mut table = table(vec!["phase", "ms"], 1);
    for (phase, ms) in following.into_iter().map(named).chain(first_and_total).chain(beside) {
        table.add_row(vec![phase, decimal(Some(ms), 2)]);
    }
    table
}

fn read_inputs(args: &Run, model: &Model) -> Result<Vec<Tensor>, Failure> {
    let preprocess = super::preprocess_of(&args.images, model.info())?;
    let wanted = || {
        let inputs = model.inputs().iter().map(|i| format!("{}: {}[{}]", i.name, i.ty.dtype, i.ty.shape));
        inputs.collect::<Vec<_>>().join(", ")
    };
    if let [file] = &args.input[..]
        && split(file, model.inputs()).is_none()
        && !model.inputs().is_empty()
    {
        // One file for all: an npz has arrays by name, and one input needs none.
        return read(model.inputs(), Path::new(file), &preprocess);
    }
    let mut given: Vec<Option<Tensor>> = vec![None; model.inputs().len()];
    for text in &args.input {
        let Some((at, file)) = split(text, model.inputs()) else {
            let why = format!("`{text}` does not begin with an input and `=`; the model takes {}", wanted());
            return Err(Failure::Usage(why));
        };
        let mut tensors = read(&model.inputs()[at..=at], &file, &preprocess)?;
        if given[at].replace(tensors.swap_remove(0)).is_some() {
            return Err(Failure::Usage(format!("input `{}` is given twice", model.inputs()[at].name)));
        }
    }
    let missing: Vec<&str> = model
        .inputs()
        .iter()
        .zip(&given)
        .filter(|(_, g)| g.is_none())
        .map(|(i, _)| i.name.as_str())
        .collect();
    if !missing.is_empty() {
        let why = format!(
            "no file for {}: give --input INPUT=FILE or --zeros; the model takes {}",
            missing.join(", "),
            wanted()
        );
        return Err(Failure::Usage(why));
    }
    Ok(given.into_iter().flatten().collect())
}

/// Which input `INPUT=FILE` names. Names of inputs may hold `=` as well as files.
fn split(text: &str, inputs: &[TensorInfo]) -> Option<(usize, PathBuf)> {
    inputs.iter().enumerate().find_map(|(i, input)| {
        let file = text.strip_prefix(&input.name)?.strip_prefix('=')?;
        Some((i, file.into()))
    })
}

/// The first sample of a file for some inputs.
fn read(inputs: &[TensorInfo], file: &Path, preprocess: &Preprocess) -> Result<Vec<Tensor>, Failure> {
    if let [input] = inputs
        && file.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"))
    {
        // An array of just the input's type needs no interpretation.
        let tensor = read_npy(file)?;
        if tensor.dtype() == input.ty.dtype && *tensor.shape() == input.ty.shape {
            return Ok(vec![tensor]);
        }
    }
    Ok(Samples::open(file)?.bind(inputs, preprocess)?.batch(0)?)
}

/// Range and mean, in one phrase.
fn summary(tensor: &Tensor) -> String {
    let values = numbers(tensor);
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

fn numbers(tensor: &Tensor) -> Vec<f64> {
    match (tensor.as_slice::<f64>(), tensor.to_f32(), tensor.to_i64()) {
        (Ok(wide), ..) => wide.to_vec(),
        (_, Some(floats), _) => floats.into_iter().map(f64::from).collect(),
        (_, _, Some(integers)) => integers.into_iter().map(|x| x as f64).collect(),
        _ => Vec::new(),
    }
}

fn print_top(model: &Model, outputs: &[Tensor], k: usize, out: &mut impl Write) -> Result<(), Failure> {
    let (Some(info), Some(tensor)) = (model.outputs().first(), outputs.first()) else { return Ok(()) };
    let values: Vec<f32> = numbers(tensor).into_iter().map(|x| x as f32).collect();
    let rows = if info.ty.shape.rank() > 1 { info.ty.shape[0].max(1) } else { 1 };
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

fn write_outputs(model: &Model, outputs: &[Tensor], folder: &Path) -> Result<(), Failure> {
    let failed = |source| Failure::Write { path: folder.display().to_string(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut taken = BTreeSet::new();
    for (info, tensor) in model.outputs().iter().zip(outputs) {
        let name = file_name(&info.name, &mut taken);
        write_npy(&folder.join(format!("{name}.npy")), tensor)?;
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
    use qcc_runtime::ir::{DType, Shape, TensorType};

    #[test]
    fn names_of_outputs_stay_in_the_folder() {
        let mut taken = BTreeSet::new();
        let mut name = |n: &str| file_name(n, &mut taken);
        assert_eq!(name("logits"), "logits");
        assert_eq!(name("../../etc/passwd"), "_.._.._etc_passwd");
        assert_eq!((name("a/b"), name("a:b"), name("")), ("a_b".into(), "a_b_1".into(), "_".into()));
    }

    #[test]
    fn inputs_are_told_from_files_by_the_names_of_the_model() {
        let ty = TensorType::new(DType::F32, Shape::scalar());
        let inputs = ["x", "a=b"].map(|n| TensorInfo { name: n.into(), ty: ty.clone() });
        assert_eq!(split("a=b=c=d.npy", &inputs), Some((1, "c=d.npy".into())));
        assert_eq!(split("y=f.npy", &inputs), None);
    }

    #[test]
    fn summaries_leave_out_what_is_not_finite() {
        let t = Tensor::from_vec(Shape::new([3]).unwrap(), vec![1.0f32, f32::NAN, 3.0]).unwrap();
        assert_eq!(summary(&t), "from 1.000000 to 3.000000, mean 2.000000, 1 not finite");
    }
}
