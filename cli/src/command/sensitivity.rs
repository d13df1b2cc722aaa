//! `qcc sensitivity`.

use crate::{
    args::Sensitivity,
    failure::Failure,
    table::{decimal, grouped, table},
};
use qcc_runtime::Precision;
use std::io::Write;

pub(crate) fn run(args: &Sensitivity, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let (compiler, terminal) = super::compiler(&args.options, &args.images, args.tier.isa.as_deref(), quiet)?;
    let compiler = compiler.precision(Precision::Int8);
    let compiler = args.requant.requant.iter().fold(compiler, |c, &mode| c.requant(mode));
    let prepared = compiler.prepare(compiler.import_file(&args.model)?)?;
    let calibrated = compiler.calibrate(&prepared)?;
    let found = compiler.sensitivity(&prepared, &calibrated)?;
    terminal.clear();
    let mut rows = table(
        vec!["layer", "op", "multiply-accumulates", "dB if it alone is int8", "dB if it alone is float"],
        2,
    );
    for layer in found.layers.iter().take(args.top.unwrap_or(usize::MAX)) {
        rows.add_row([
            layer.layer.clone(),
            layer.op.into(),
            grouped(layer.macs),
            decimal(Some(layer.alone_db), 1),
            decimal(Some(layer.without_db), 2),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "{} layers; all of them int8: {:.2} dB. Signal to noise of the results on {} samples, with ranges of {}",
        found.layers.len(),
        found.int8_db,
        found.samples,
        found.fitted
    )?;
    if let Some(path) = &args.json {
        super::write(path, serde_json::to_string_pretty(&found)?)?;
    }
    Ok(())
}
