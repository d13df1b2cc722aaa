//! `qcc inspect`.

use crate::{
    args::Inspect,
    failure::Failure,
    table::{bytes, grouped, table},
};
use qcc_runtime::{
    Compiler, DynamicProgram, Program, ProgramFile, Samples,
    ir::{
        Graph, Kind,
        onnx::{Imported, Model, ValueKind},
    },
    is_program,
};
use std::{collections::BTreeMap, io::Write};

pub(crate) fn run(args: &Inspect, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, None, quiet)?;
    let compiler = compiler.precision(args.precision);
    let mut compiler = args.requant.requant.iter().fold(compiler, |c, &mode| c.requant(mode));
    if args.options.calibration.calibrate.is_none() {
        // A plan does not depend on ranges: no warning is due.
        compiler = compiler.calibration(Samples::noise().limit(1));
    }
    let program = if is_program(&args.model) {
        let program = match ProgramFile::load(&args.model, compiler.memory_limit())? {
            ProgramFile::Placed(program) => *program,
            ProgramFile::Dynamic(program) => {
                describe_dynamic(&program, out)?;
                program.program(&compiler, &args.model.display().to_string())?
            }
        };
        describe_program(&program, out)?;
        describe(program.graph(), out)?;
        program
    } else {
        let graph = match compiler.import_file(&args.model) {
            Ok(graph) => graph,
            Err(error) => match divided(args, &compiler) {
                // Parts of it are compiled when the values are there on which the next ones depend.
                Some((model, first)) => {
                    terminal.clear();
                    describe_onnx(args, out)?;
                    return describe_divided(&model, first, &compiler, out);
                }
                None => return Err(error.into()),
            },
        };
        describe_onnx(args, out)?;
        describe(&graph, out)?;
        compiler.program_of_graph(graph)?
    };
    terminal.clear();
    if args.options.explain {
        write!(out, "{}", program.info().report)?;
    }
    writeln!(out, "plan for {}:", program.info().precision.name())?;
    write!(out, "{}", program.info().plan)?;
    Ok(())
}

fn describe_onnx(args: &Inspect, out: &mut impl Write) -> Result<(), Failure> {
    let size = std::fs::metadata(&args.model).map_or(0, |m| m.len());
    writeln!(out, "{}: ONNX, {}", args.model.display(), bytes(size))?;
    Ok(())
}

/// A model that is not one graph of tensors, and what can be known of it before it runs; `None` where it is no model that runs.
fn divided(args: &Inspect, compiler: &Compiler) -> Option<(Model, Option<Graph>)> {
    let model = Model::load_within(&args.model, compiler.memory_limit()).ok()?;
    if model.inputs().iter().any(|i| i.kind != ValueKind::TENSOR) {
        return Some((model, None));
    }
    let first = match model.import(compiler.bindings()).ok()? {
        Imported::Whole(graph, _) => Some(graph),
        Imported::Part(part) => Some(part.graph),
        Imported::Wants(_) => None,
    };
    Some((model, first))
}

/// Inputs and outputs as the file declares them, its ops, and the plan of what comes first.
fn describe_divided(
    model: &Model,
    first: Option<Graph>,
    compiler: &Compiler,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let form = |kind: ValueKind| match kind {
        ValueKind { is_optional: true, .. } => ", which may be left out",
        ValueKind { is_sequence: true, .. } => ", a sequence of these",
        _ => "",
    };
    for input in model.inputs() {
        writeln!(out, "input  {input}{}", form(input.kind))?;
    }
    for name in model.outputs() {
        writeln!(out, "output {name}")?;
    }
    writeln!(out, "weights {}", bytes(model.weight_bytes() as u64))?;
    let mut rows = table(vec!["op of the file", "count"], 1);
    for (op, count) in model.op_histogram() {
        rows.add_row([op, count.to_string()]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "compiled in parts while it runs (`qcc run`): texts, or values that data decide over, come between"
    )?;
    let has_ops = |graph: &Graph| graph.nodes().any(|(_, node)| matches!(node.kind(), Kind::Op(_)));
    if let Some(graph) = first.filter(has_ops) {
        let program = compiler.program_of_graph(graph)?;
        writeln!(out, "plan of the first part for {}:", program.info().precision.name())?;
        write!(out, "{}", program.info().plan)?;
    }
    Ok(())
}

fn describe_dynamic(program: &DynamicProgram, out: &mut impl Write) -> Result<(), Failure> {
    writeln!(out, "takes any shapes, and compiles for each when it first comes:")?;
    for input in program.model().inputs() {
        writeln!(out, "input  {input}")?;
    }
    writeln!(out, "In the shapes given, or with a batch of 1:")?;
    Ok(())
}

fn describe_program(program: &Program, out: &mut impl Write) -> Result<(), Failure> {
    let info = program.info();
    writeln!(
        out,
        "compiled by qcc {} to {}, requantization {}, weights of {} bits",
        info.qcc,
        info.precision.name(),
        info.requant.name(),
        info.weight_bits.count()
    )?;
    if let Some(pixels) = &info.pixels {
        writeln!(out, "{}", super::pixels(pixels))?;
    }
    for tuning in program.tunings() {
        writeln!(out, "tuned for {}: tilings of {} layers", tuning.tier, tuning.tilings.len())?;
    }
    if let Some(c) = &info.calibration {
        let worth = if c.synthetic && c.batch_norms == 0 { " (synthetic: for timing only)" } else { "" };
        writeln!(out, "calibrated on {} samples of {}{worth}", c.samples, c.origin)?;
    }
    Ok(())
}

fn describe(graph: &Graph, out: &mut impl Write) -> Result<(), Failure> {
    for &id in graph.inputs() {
        writeln!(out, "input  {}: {}", graph.node(id).name, graph.ty(id.out()))?;
    }
    for output in graph.outputs() {
        writeln!(out, "output {}: {}", output.name, graph.ty(output.value))?;
    }
    let mut ops: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    let (mut parameters, mut weight_bytes) = (0, 0);
    for (id, node) in graph.nodes() {
        match node.kind() {
            Kind::Constant(tensor) => {
                parameters += tensor.shape().elements() as u64;
                weight_bytes += tensor.bytes().len() as u64;
            }
            Kind::Op(_) => {
                let (count, macs) = ops.entry(graph.mnemonic(id)).or_default();
                *count += 1;
                *macs += graph.macs(id);
            }
            Kind::Input => {}
        }
    }
    let macs: u64 = ops.values().map(|(_, macs)| macs).sum();
    writeln!(
        out,
        "parameters {} ({}), multiply-accumulates {}",
        grouped(parameters),
        bytes(weight_bytes),
        grouped(macs)
    )?;
    let mut rows = table(vec!["op", "count", "multiply-accumulates"], 1);
    for (op, (count, macs)) in ops {
        rows.add_row([op.to_string(), count.to_string(), grouped(macs)]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}
