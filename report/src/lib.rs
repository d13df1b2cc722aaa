//! Pages about what quantization does to a model: one HTML file each, which needs no network.
//!
//! [`page`] shows [`Facts`], [`comparison_page`] two of them side by side. Everything that is shown is in these, which are written
//! as JSON with [`to_json`] and read with [`from_json`]; nothing is computed here but how it looks. Charts are made with plotly,
//! whose script is part of the page, the graph is laid out by layout-rs, and whatever comes from a model is escaped. A
//! Content-Security-Policy forbids the page every request.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use qcc_runtime::{Compiler, bundled, workbench::{Setup, facts}};
//!
//! let compiler = Compiler::new().calibration(bundled::calibration()?.limit(32)).preprocess(bundled::preprocess());
//! let graph = compiler.import_onnx(bundled::FASHION_RESNET8)?;
//! let setup = Setup { samples: 8, reps: 3, ..Setup::new("fashion_resnet8", compiler) };
//! let facts = facts(&setup, graph, &|_, _, _| {})?;
//! assert_eq!(qcc_report::from_json(&qcc_report::to_json(&facts)?)?, facts);
//! let page = qcc_report::page(&facts)?;
//! assert!(page.starts_with("<!DOCTYPE html>"));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod charts;
mod comparison;
mod details;
mod figures;
mod frame;
mod graph;
mod page;

pub use comparison::comparison_page;
pub use page::page;

use qcc_runtime::workbench::{FORMAT, Facts};
use serde::Deserialize;

/// Why there is no page, or no facts in a file.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file is no JSON, or has other fields.
    #[error("these are no facts of `qcc report --json`")]
    Json(#[from] serde_json::Error),
    /// Another version wrote it.
    #[error(
        "these facts are of format {found}, this qcc knows format {FORMAT}: make them again with `qcc report --json`"
    )]
    Format {
        /// The format of the file.
        found: u32,
    },
    /// The data of charts could not be packed.
    #[error("cannot pack the charts")]
    Pack(#[from] std::io::Error),
}

/// Facts as JSON: see `docs/report.md`.
///
/// # Errors
/// Where a number has no form in JSON: a defect of qcc.
pub fn to_json(facts: &Facts) -> Result<String, ReportError> {
    Ok(serde_json::to_string(facts)?)
}

/// Reads what [`to_json`] has written.
///
/// # Errors
/// Where it is something else, or of another format.
pub fn from_json(text: &str) -> Result<Facts, ReportError> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let Version { format: found } = serde_json::from_str(text)?;
    if found != FORMAT {
        return Err(ReportError::Format { found });
    }
    let facts: Facts = serde_json::from_str(text)?;
    let count = facts.layers.len();
    match facts.edges.iter().all(|e| e.from < count && e.to < count) {
        true => Ok(facts),
        false => Err(ReportError::Json(serde::de::Error::custom("an edge of the graph leads to no layer"))),
    }
}
