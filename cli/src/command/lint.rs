//! `qcc lint`.

use crate::{
    args::{Denied, Lint},
    failure::Failure,
};
use qcc_runtime::{Compiler, Finding, Level, ProgramFile, Samples, is_program};
use serde::Serialize;
use std::io::Write;

/// What is written as JSON.
#[derive(Serialize)]
struct Found<'a> {
    model: String,
    findings: &'a [Finding],
}

pub(crate) fn run(args: &Lint, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    // What is found is printed as the result; what else is to be said while it is looked for are warnings as ever.
    let (compiler, terminal) =
        super::compiler(&args.options, &args.preprocess, args.tier.isa.as_deref(), quiet)?;
    let findings = findings(args, &compiler)?;
    terminal.clear();
    for finding in &findings {
        writeln!(out, "{}: {finding}", finding.level.name())?;
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let (warnings, hints) = (count(Level::Warning), count(Level::Hint));
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    writeln!(out, "{}: {}, {}", args.model.display(), plural(warnings, "warning"), plural(hints, "hint"))?;
    if let Some(path) = &args.json {
        let found = Found { model: args.model.display().to_string(), findings: &findings };
        super::write(path, serde_json::to_string_pretty(&found)?)?;
    }
    let is_denied =
        |f: &&Finding| args.deny.iter().any(|d| matches!(d, Denied::All) || *d == Denied::One(f.rule));
    match findings.iter().filter(is_denied).count() {
        0 => Ok(()),
        found => {
            out.flush()?;
            Err(Failure::Denied { found })
        }
    }
}

fn findings(args: &Lint, compiler: &Compiler) -> Result<Vec<Finding>, Failure> {
    if is_program(&args.model) {
        return match ProgramFile::load(&args.model, compiler.memory_limit())? {
            ProgramFile::Placed(program) => Ok(program.info().findings.clone()),
            ProgramFile::Dynamic(program) => {
                let calibrated = program.info().calibrated.iter();
                Ok(calibrated.flat_map(|c| c.findings().iter().cloned()).collect())
            }
        };
    }
    let others = args.images.as_ref().map(|path| Samples::open(path)).transpose()?;
    let graph = compiler.import_file(&args.model)?;
    Ok(compiler.lint(graph, others.as_ref())?)
}
