//! `qcc compile`.

use crate::{
    args::{Compile, Emit, MixedOptions},
    failure::Failure,
    table::{bytes, table},
    terminal::Terminal,
};
use qcc_runtime::{
    Calibration, Calibrators, Compiler, DynamicProgram, Error, Event, Goal, ListingKind, MixedPrecision,
    Policy, Precision, Program, Repairs, Samples, Target, TuneReport, WeightBits,
    ir::{Graph, onnx, text},
    is_program, tune,
};
use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

pub(crate) fn run(args: &Compile, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    if let Some(pass) = &args.stop_after {
        super::check_pass(pass, &[])?;
        if !matches!(args.emit, Emit::Onnx | Emit::Qir) {
            return Err(Failure::Usage("--stop-after goes with --emit onnx or --emit qir".into()));
        }
    }
    if args.dynamic
        && (args.emit != Emit::Qcc || args.tune || args.images.image_input || is_program(&args.model))
    {
        let why = "--dynamic makes a .qcc of an .onnx file, whose code is made when it runs: it goes with no other --emit, \
                   with --tune or with --image-input";
        return Err(Failure::Usage(why.into()));
    }
    if args.tune && args.emit != Emit::Qcc {
        return Err(Failure::Usage("--tune goes with --emit qcc: other forms hold no tilings".into()));
    }
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    let compiler = compiler.precision(args.precision);
    let compiler = args.requant.requant.iter().fold(compiler, |c, &mode| c.requant(mode));
    let written = match args.emit {
        Emit::Qcc => emit_program(args, &compiler, &terminal, out),
        Emit::Onnx | Emit::Qir => {
            let told = terminal.clone();
            emit_graph(args, &compiler, move |event| told.event(event), out)
        }
        Emit::Clif | Emit::Asm => emit_listing(args, &compiler, out),
    };
    terminal.clear();
    written
}

fn emit_program(
    args: &Compile,
    compiler: &Compiler,
    terminal: &Terminal,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let path = args.output.clone().unwrap_or_else(|| args.model.with_extension("qcc"));
    if is_stdout(&path) {
        return Err(Failure::Usage("a .qcc file cannot go to standard output; give a name with -o".into()));
    }
    if path == args.model {
        return Err(Failure::Usage(format!(
            "`{}` is the model itself; give another name with -o",
            path.display()
        )));
    }
    if args.dynamic {
        let program = compiler.dynamic_program(&args.model)?;
        program.save(&path)?;
        let size = std::fs::metadata(&path).map_or(0, |m| m.len());
        writeln!(out, "{}: {}, {}", path.display(), describe_dynamic(&program), bytes(size))?;
        return Ok(());
    }
    let mut program = match goal(args)? {
        Some(goal) => mixed_program(args, compiler, &goal, &path, terminal, out)?,
        None => compiler.program_of_file(&args.model)?,
    };
    explain(args, &program, out)?;
    if args.tune {
        let budget = Duration::from_secs(args.tune_seconds);
        let (tuned, report) = tune(&program, &compiler.jit_options()?, budget, &mut |done, total| {
            terminal.progress("tuning", done, total);
        })?;
        terminal.clear();
        print_tuning(&report, out)?;
        program = tuned;
    }
    program.save(&path)?;
    let size = std::fs::metadata(&path).map_or(0, |m| m.len());
    writeln!(out, "{}: {}, {}", path.display(), describe(&program), bytes(size))?;
    Ok(())
}

/// What layers are to stay float for, if any are.
fn goal(args: &Compile) -> Result<Option<Goal>, Failure> {
    let MixedOptions { min_sqnr, max_drop, validate, objective, save_policy } = &args.mixed;
    let target = match (min_sqnr, max_drop, validate) {
        (Some(db), ..) => Some(Target::MinSqnr(*db)),
        (None, Some(points), Some(path)) => {
            Some(Target::MaxDrop { points: *points, samples: Samples::open(path)? })
        }
        _ => None,
    };
    let goal = Goal { target, is_latency: objective.is_some() };
    if goal.target.is_none() && !goal.is_latency {
        return match save_policy {
            Some(_) => {
                Err(Failure::Usage("--save-policy goes with --min-sqnr, --max-drop or --objective".into()))
            }
            None => Ok(None),
        };
    }
    if args.precision != Precision::Int8 || args.dynamic || is_program(&args.model) {
        let why = "--min-sqnr, --max-drop and --objective are for int8 of an .onnx file in known shapes";
        return Err(Failure::Usage(why.into()));
    }
    Ok(Some(goal))
}

/// A program some of whose layers are float, and the policy that says which.
fn mixed_program(
    args: &Compile,
    compiler: &Compiler,
    goal: &Goal,
    path: &Path,
    terminal: &Terminal,
    out: &mut impl Write,
) -> Result<Program, Failure> {
    let prepared = compiler.prepare(compiler.import_file(&args.model)?)?;
    let calibrated = compiler.calibrate(&prepared)?;
    let found = compiler.mixed_precision(&prepared, &calibrated, goal)?;
    let program = compiler.program_of_policy(&prepared, &calibrated, found.policy.clone())?;
    terminal.clear();
    let file = args.mixed.save_policy.clone().unwrap_or_else(|| path.with_extension("policy.toml"));
    let model = args.model.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Policy::save(&file, &found.policy_text(&model)).map_err(Error::from)?;
    print_mixed(&found, out)?;
    writeln!(out, "{}: edit it and give it back with --policy", file.display())?;
    Ok(program)
}

fn print_mixed(found: &MixedPrecision, out: &mut impl Write) -> Result<(), Failure> {
    if let Some(t) = &found.timing {
        writeln!(
            out,
            "a run takes {:.3} ms in float, {:.3} in int8 and {:.3} with {} layers in float; {} looked slower in int8",
            t.float_ms,
            t.int8_ms,
            t.mixed_ms,
            t.float.len(),
            t.slower.len()
        )?;
    }
    for attempt in &found.attempts {
        let mark = if attempt.is_enough { "enough" } else { "not enough" };
        let reached = found.measure.map_or_else(String::new, |m| m.describe(attempt.reached));
        writeln!(out, "  {:3} layers float: {reached}, {mark}", attempt.float_layers)?;
    }
    let float: Vec<&str> = found.policy.float().collect();
    let which = match &float[..] {
        [] => String::new(),
        some => format!(": {}", some.join(", ")),
    };
    writeln!(
        out,
        "{} of {} layers stay float for {}{which}",
        float.len(),
        found.policy.layers.len(),
        found.goal
    )?;
    Ok(())
}

fn print_tuning(report: &TuneReport, out: &mut impl Write) -> Result<(), Failure> {
    let (timed, candidates) = report.timed;
    writeln!(
        out,
        "tuned {} layers ({} different): timed {timed} of {candidates} other tilings, {} are faster",
        report.layers,
        report.problems,
        report.changes.len()
    )?;
    if report.changes.is_empty() {
        return Ok(());
    }
    let mut rows = table(vec!["layers", "tiling", "was", "time"], 3);
    for change in &report.changes {
        let layers = match &change.layers[..] {
            [one] => one.clone(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
            [] => String::new(),
        };
        let gain = format!("{:+.1} %", 100.0 * (change.ratio - 1.0));
        rows.add_row([layers, change.to.to_string(), change.from.to_string(), gain]);
    }
    let (before, after) = report.median_ms;
    writeln!(
        out,
        "{rows}\na run takes {after:.3} ms, before {before:.3} ms ({:+.1} %)",
        100.0 * (after / before - 1.0)
    )?;
    Ok(())
}

/// Precision and how it came about, such as `int8, q15, ranges of 100 samples`.
fn describe(program: &Program) -> String {
    let info = program.info();
    let mut parts = vec![info.precision.name().to_string()];
    if info.precision == Precision::Int8 {
        parts.push(info.requant.name().into());
    }
    let has_codes = matches!(info.precision, Precision::Int8 | Precision::Int8Dynamic);
    if has_codes && info.weight_bits == WeightBits::Seven {
        parts.push("weights of 7 bits".into());
    }
    if info.reestimated > 0 {
        parts.push(format!("statistics of {} batch norms recomputed", info.reestimated));
    }
    parts.extend(info.calibration.as_ref().map(ranges));
    parts.extend(info.pixels.as_ref().map(super::pixels));
    parts.join(", ")
}

/// The same for a program of any shapes.
fn describe_dynamic(program: &DynamicProgram) -> String {
    let info = program.info();
    let mut parts = vec![info.precision.name().to_string()];
    parts.extend(
        info.statistics
            .as_ref()
            .map(|s| format!("statistics of {} batch norms recomputed", s.batch_norms.len())),
    );
    parts.extend(info.calibrated.as_ref().map(|c| ranges(c.summary())));
    let inputs = program.model().inputs().iter().map(ToString::to_string);
    parts.push(format!("any shapes of {}", inputs.collect::<Vec<_>>().join(", ")));
    parts.join(", ")
}

fn ranges(c: &Calibration) -> String {
    let how = match &c.measured {
        Some(m) => format!(" by {} (measured)", m.calibrators),
        None if c.calibrator == Calibrators::default() => String::new(),
        None => format!(" by {}", c.calibrator),
    };
    let repaired = match c.repairs {
        Repairs::NONE => String::new(),
        repairs => format!(", repaired: {repairs}"),
    };
    let ranges = match (c.synthetic, c.samples) {
        (true, _) if c.batch_norms > 0 => {
            format!("ranges{how} of the statistics of {} batch norms (without data)", c.batch_norms)
        }
        (true, _) => "ranges of synthetic noise (for timing only)".into(),
        (false, 0) => format!("ranges of {}", c.origin),
        (false, n) => format!("ranges{how} of {n} samples from {}", c.origin),
    };
    ranges + &repaired
}

fn explain(args: &Compile, program: &Program, out: &mut impl Write) -> Result<(), Failure> {
    if args.options.explain {
        write!(out, "{}", program.info().report)?;
    }
    Ok(())
}

/// Where a quantized graph still has an ONNX form.
const LAST_FAKE_QUANT_PASS: &str = "insert_fake_quant";

fn emit_graph(
    args: &Compile,
    compiler: &Compiler,
    tell: impl Fn(Event<'_>) + Send + Sync + 'static,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let stop = match (&args.stop_after, args.emit, args.precision) {
        (Some(pass), ..) => Some(pass.as_str()),
        (None, Emit::Onnx, Precision::FakeQuant | Precision::Int8) => Some(LAST_FAKE_QUANT_PASS),
        (None, Emit::Onnx, Precision::Int8Dynamic) => {
            let why = "ONNX has no op that quantizes rows when a model runs: --emit onnx takes --precision float or int8";
            return Err(Failure::Usage(why.into()));
        }
        _ => None,
    };
    let compiler = &compiler.clone().interchange(args.emit == Emit::Onnx && args.stop_after.is_none());
    let graph = if is_program(&args.model) {
        let program = compiler.program_of_file(&args.model)?;
        explain(args, &program, out)?;
        program.graph().clone()
    } else {
        graph_after(args, compiler, tell, stop, out)?
    };
    let bytes = match args.emit {
        Emit::Onnx => onnx::export(&graph)?,
        _ => text::print(&graph).into_bytes(),
    };
    deliver(args, &bytes, out)
}

/// The graph after a pass: the last time it ran, if it ran more than once. Without a pass, the graph that is ready for
/// what is to be written: folded and fused for ONNX, placed for the text form.
fn graph_after(
    args: &Compile,
    compiler: &Compiler,
    tell: impl Fn(Event<'_>) + Send + Sync + 'static,
    stop: Option<&str>,
    out: &mut impl Write,
) -> Result<Graph, Failure> {
    let seen: Arc<Mutex<Option<Graph>>> = Arc::default();
    let compiler = {
        let (seen, stop) = (seen.clone(), stop.map(String::from));
        compiler.clone().observer(move |event| {
            if let Event::Pass { name, graph } = &event
                && stop.as_deref() == Some(*name)
            {
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some((*graph).clone());
            }
            tell(event);
        })
    };
    let taken = || seen.lock().unwrap_or_else(PoisonError::into_inner).take();
    let imported = compiler.import_file(&args.model)?;
    if let Some(graph) = taken() {
        return Ok(graph);
    }
    let prepared = compiler.prepare(imported)?;
    // A pass that runs here may run again later, but what was asked for is the graph before quantization, unless the
    // precision says otherwise.
    if let Some(graph) = taken() {
        return Ok(graph);
    }
    if stop.is_none() && args.emit == Emit::Onnx {
        return Ok(prepared.graph().clone());
    }
    let is_calibrated = args.precision.is_calibrated();
    let calibrated = is_calibrated.then(|| compiler.calibrate(&prepared)).transpose()?;
    let program = compiler.lower(&prepared, calibrated.as_ref())?;
    explain(args, &program, out)?;
    match (taken(), stop) {
        (Some(graph), _) => Ok(graph),
        (None, None) => Ok(program.graph().clone()),
        (None, Some(pass)) => {
            Err(Failure::Usage(format!("pass `{pass}` does not run for {}", args.precision.name())))
        }
    }
}

fn emit_listing(args: &Compile, compiler: &Compiler, out: &mut impl Write) -> Result<(), Failure> {
    let compiler = compiler.clone().listing(true);
    let program = compiler.program_of_file(&args.model)?;
    explain(args, &program, out)?;
    let kind = if args.emit == Emit::Clif { ListingKind::Clif } else { ListingKind::Asm };
    let text = compiler.jit(&program)?.listing(kind);
    deliver(args, text.as_bytes(), out)
}

/// Writes to the file that was asked for, or to standard output; ONNX, which is no text, beside the model.
fn deliver(args: &Compile, bytes: &[u8], out: &mut impl Write) -> Result<(), Failure> {
    let beside = || match args.emit {
        Emit::Onnx => PathBuf::from(format!(
            "{}.{}.onnx",
            args.model.with_extension("").display(),
            args.precision.name()
        )),
        _ => PathBuf::from("-"),
    };
    let path = args.output.clone().unwrap_or_else(beside);
    if is_stdout(&path) {
        return Ok(out.write_all(bytes)?);
    }
    super::write(&path, bytes)?;
    writeln!(out, "{}: {}", path.display(), crate::table::bytes(bytes.len() as u64))?;
    Ok(())
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}
