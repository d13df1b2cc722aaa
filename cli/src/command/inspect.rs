//! `qcc inspect`.

use crate::{
    args::Inspect,
    failure::Failure,
    table::{bytes, grouped, table},
};
use qcc_runtime::{
    DynamicProgram, Program, ProgramFile, Samples,
    ir::{Graph, Kind},
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
        let graph = compiler.import_file(&args.model)?;
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
