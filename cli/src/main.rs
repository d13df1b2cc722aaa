//! The `qcc` command: arguments, files, progress and tables around the library `qcc-runtime`.

mod args;
mod command;
mod failure;
mod table;
mod terminal;

use args::{Cli, Command};
use clap::Parser;
use failure::Failure;
use std::{
    io::{BufWriter, Write, stderr, stdout},
    process::ExitCode,
};

fn main() -> ExitCode {
    let Cli { command, quiet } = Cli::parse();
    match run(&command, quiet) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_broken_pipe() => ExitCode::SUCCESS,
        Err(e) => {
            // Nobody is left to be told if standard error is gone.
            let _ = writeln!(stderr(), "error: {}", e.message());
            e.exit_code()
        }
    }
}

fn run(command: &Command, quiet: u8) -> Result<(), Failure> {
    let mut out = BufWriter::new(stdout());
    match command {
        Command::Compile(args) => command::compile::run(args, quiet, &mut out),
        Command::Run(args) => command::run::run(args, quiet, &mut out),
        Command::Eval(args) => command::eval::run(args, quiet, &mut out),
        Command::Bench(args) => command::bench::run(args, quiet, &mut out),
        Command::Report(args) => command::report::run(args, quiet, &mut out),
        Command::Inspect(args) => command::inspect::run(args, quiet, &mut out),
        Command::Diff(args) => command::diff::run(args, quiet, &mut out),
        Command::Lint(args) => command::lint::run(args, quiet, &mut out),
        Command::Sensitivity(args) => command::sensitivity::run(args, quiet, &mut out),
        Command::Test(args) => command::test::run(args, quiet, &mut out),
        Command::Zoo(args) => command::zoo::run(args, &mut out),
    }?;
    Ok(out.flush()?)
}
