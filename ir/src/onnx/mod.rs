//! ONNX import and export.
//!
//! [`Model`] is a file, parsed and validated, with its symbolic dimensions; [`Model::graph`] binds them and makes the
//! concrete [`Graph`](crate::Graph) that everything else works on. Files are untrusted: see
//! [`limits`](crate::limits) for what they may ask for. Nothing here panics or allocates by what a file claims.
//!
//! To add an op: one line in the table of `ops/mod.rs` and one function in the file of its family there.

mod attribute;
mod body;
mod error;
mod export;
mod external;
mod functions;
mod import;
mod model;
mod ops;
mod packed;
mod partial;
mod splice;
mod tensor;
mod value;
mod wire;

pub use error::{ImportError, NodeError, UnsupportedOp};
pub use export::{ExportError, ExportOptions, export, export_with};
pub use import::{Bindings, Imported, Part};
pub use model::{Dim, InputInfo, Model, OPSETS};
pub use packed::Packed;
pub use partial::{Eager, Rest};
pub use value::{Form, MapKey, Strings, Texts, Value, ValueKind, read_value};

#[cfg(test)]
mod tests;
