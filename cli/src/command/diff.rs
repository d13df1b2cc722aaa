//! `qcc diff`.

use super::inputs::{self, Source};
use crate::{
    args::Diff,
    failure::Failure,
    table::{decimal, elided, table},
};
use qcc_runtime::{
    Compiler, Error, Precision, Preprocess, Samples,
    ir::{Shape, Tensor, numerics::RequantMode, onnx},
    is_program, read_arrays,
    workbench::{self, DiffSetup, DiffSide, TensorDiff, diff},
};
use std::{io::Write, path::Path, sync::Arc};

/// Tensors that are listed.
const MOST: usize = 5;
/// Names of tensors are cut to this width.
const WIDTH: usize = 48;

pub(crate) fn run(args: &Diff, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    if args.preprocess.image_input {
        let why = "--image-input is for models that are compiled: here both sides take normalised images";
        return Err(Failure::Usage(why.into()));
    }
    let (compiler, terminal) =
        super::compiler(&args.options, &args.preprocess, args.tier.isa.as_deref(), quiet)?;
    let is_model = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx"));
    if let Some(program) = args.sides.iter().find(|p| is_program(p)) {
        let why = "has no tensors by the names of a model: give the .onnx that it was made of";
        return Err(Failure::Usage(format!("`{}` {why}", program.display())));
    }
    let Some(lead) = args.sides.iter().find(|p| is_model(p)) else {
        return Err(Failure::Usage("one side at least must be a model (.onnx)".into()));
    };
    let (compiler, samples) = samples(args, &compiler, lead)?;
    if args.input.is_empty() && args.images.is_none() {
        terminal.warn("no --input and no --images: the sides are compared on noise");
    }
    let precisions = pair(
        &args.precision,
        match args.sides.len() {
            1 => [Precision::Float, Precision::Int8],
            _ => [Precision::Float; 2],
        },
    );
    let modes: [Option<RequantMode>; 2] = match args.requant[..] {
        [] => [None; 2],
        [one] => [Some(one); 2],
        [first, second, ..] => [Some(first), Some(second)],
    };
    let mut models: Vec<(&Path, Arc<onnx::Model>)> = Vec::new();
    let mut contenders = Vec::new();
    for (i, (precision, mode)) in precisions.into_iter().zip(modes).enumerate() {
        let path = args.sides.get(i).unwrap_or(&args.sides[0]);
        if !is_model(path) {
            contenders.push(stored(path, lead, &compiler)?);
            continue;
        }
        let known = models.iter().find(|(p, _)| p == path).map(|(_, model)| model.clone());
        let model = match known {
            Some(model) => model,
            None => Arc::new(load(path, &compiler)?),
        };
        models.push((path, model.clone()));
        let own = mode.iter().fold(compiler.clone().precision(precision), |c, &mode| c.requant(mode));
        let what = match (precision, mode) {
            (Precision::Int8, Some(mode)) => format!("int8 {}", mode.name()),
            _ => precision.name().to_string(),
        };
        let name = format!("{} ({what})", path.display());
        contenders.push(DiffSide::Model { name, model, compiler: Box::new(own) });
    }
    let setup = DiffSetup { threshold_db: args.threshold };
    let found = diff(&contenders[0], &contenders[1], &samples, &setup)?;
    terminal.clear();
    print(&found, out)?;
    if let Some(path) = &args.json {
        super::write(path, serde_json::to_string_pretty(&found)?)?;
    }
    match found.parts_at.first() {
        Some(tensor) if args.check => {
            out.flush()?;
            Err(Failure::Parted { tensor: tensor.clone() })
        }
        _ => Ok(()),
    }
}

/// One for both, or one for each.
fn pair<T: Copy>(given: &[T], default: [T; 2]) -> [T; 2] {
    match given {
        [] => default,
        [one] => [*one; 2],
        [first, second, ..] => [*first, *second],
    }
}

fn load(path: &Path, compiler: &Compiler) -> Result<onnx::Model, Failure> {
    let failed = |e| Error::Import { path: path.display().to_string(), source: Box::new(e) };
    Ok(onnx::Model::load_within(path, compiler.memory_limit()).map_err(failed)?)
}

/// Tensors by name; one alone is the first output of the model.
fn stored(path: &Path, model: &Path, compiler: &Compiler) -> Result<DiffSide, Failure> {
    let mut tensors = read_arrays(path)?;
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"))
        && let ([(name, _)], Some(output)) = (&mut tensors[..], load(model, compiler)?.outputs().next())
    {
        *name = output.into();
    }
    Ok(DiffSide::Stored { name: path.display().to_string(), tensors: tensors.into_iter().collect() })
}

/// What to run, and the compiler for its shapes.
fn samples(args: &Diff, compiler: &Compiler, model: &Path) -> Result<(Compiler, Samples), Failure> {
    if let Some(path) = &args.images {
        return Ok((compiler.clone(), Samples::open(path)?.limit(args.limit)));
    }
    if args.input.is_empty() {
        return Ok((compiler.clone(), Samples::noise().limit(args.limit)));
    }
    let model = compiler.dynamic_file(model)?;
    let images: Preprocess = super::preprocess(&args.preprocess);
    let tensors = inputs::of_model(Source::Files(&args.input), &model, compiler, &images)?;
    let mut compiler = compiler.clone();
    let mut arrays = Vec::new();
    for (info, tensor) in model.model().inputs().iter().zip(tensors) {
        compiler = compiler.shape(&info.name, tensor.shape().to_vec());
        let whole: Vec<usize> = std::iter::once(1).chain(tensor.shape().iter().copied()).collect();
        let shape = Shape::new(whole).map_err(|e| Failure::Usage(format!("input `{}`: {e}", info.name)))?;
        let whole = Tensor::from_bytes(tensor.dtype(), shape, tensor.bytes().clone());
        let whole = whole.map_err(|e| Failure::Usage(format!("input `{}`: {e}", info.name)))?;
        arrays.push((info.name.clone(), whole));
    }
    Ok((compiler, Samples::from_arrays(arrays)?))
}

fn print(found: &workbench::Diff, out: &mut impl Write) -> Result<(), Failure> {
    let header = vec!["tensor", "shape", "", "largest", "of", "SQNR dB", "own dB", "cosine"];
    let mut rows = table(header, 3);
    for t in &found.tensors {
        let parts = found.parts_at.first() == Some(&t.name);
        let also = found.parts_at.contains(&t.name);
        let mark = match (parts, also) {
            (true, _) => "parts here",
            (false, true) => "and here",
            (false, false) => "",
        };
        rows.add_row([
            elided(&t.name, WIDTH),
            Shape::new(t.shape.clone()).map_or_else(|_| String::new(), |s| s.to_string()),
            mark.to_string(),
            format!("{:.3e}", t.largest),
            format!("{:.3e}", t.magnitude),
            ratio(t),
            decimal(t.own_db, 1),
            format!("{:.6}", t.cosine),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(out, "{} against {}, on {} samples", found.b, found.a, found.samples)?;
    let named = |t: &TensorDiff| match &t.node {
        Some(node) if *node != t.name => format!("`{}` (of `{node}`)", t.name),
        _ => format!("`{}`", t.name),
    };
    let sources = found.sources(MOST);
    if !sources.is_empty() {
        let each = sources.iter().map(|t| format!("{} ({} dB)", named(t), decimal(t.own_db, 1)));
        writeln!(out, "most noise comes in at {}", each.collect::<Vec<_>>().join(", "))?;
    }
    let few = |names: &[String]| {
        let more = if names.len() > MOST { ", …" } else { "" };
        format!("{}{more}", names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", "))
    };
    for (side, names) in [(&found.a, &found.only_a), (&found.b, &found.only_b)] {
        if !names.is_empty() {
            writeln!(out, "{} tensors of {side} alone: {}", names.len(), few(names))?;
        }
    }
    for (name, a, b) in &found.other_shapes {
        writeln!(out, "`{name}` has the shape {a:?} and {b:?}")?;
    }
    let first = found.parts_at.first().and_then(|name| found.tensors.iter().find(|t| t.name == *name));
    match first {
        Some(t) => {
            writeln!(out, "they part at {}: {} dB, below {:.0}", named(t), ratio(t), found.threshold_db)?
        }
        None => writeln!(out, "they do not part: no tensor is below {:.0} dB", found.threshold_db)?,
    }
    Ok(())
}

/// A ratio in dB, or what is instead of one.
fn ratio(t: &TensorDiff) -> String {
    match (t.not_finite, t.sqnr_db) {
        (0, db) if db == f64::INFINITY => "equal".into(),
        (0, db) => format!("{db:.1}"),
        (n, _) => format!("{n} not finite"),
    }
}
