//! `qcc zoo`.

use crate::{args::Zoo, failure::Failure, table::bytes};
use qcc_runtime::{
    ir::onnx::{ExportOptions, export_with},
    zoo,
};
use std::io::Write;

pub(crate) fn run(args: &Zoo, out: &mut impl Write) -> Result<(), Failure> {
    let graph = zoo::build(&args.name)?;
    // These networks treat each image alike, so that the batch may be left open.
    let model = export_with(&graph, &ExportOptions { batch: Some("batch".into()) })?;
    super::write(&args.output, &model)?;
    writeln!(out, "{}: {}", args.output.display(), bytes(model.len() as u64))?;
    Ok(())
}
