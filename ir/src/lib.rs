//! The intermediate representation of qcc: a typed graph, the ops with their inference rules and reference
//! semantics, the integer numerics, the text form, and ONNX import and export.
//!
//! Everything that computes a number is defined here once, as scalar code. The interpreter runs these definitions;
//! the kernels of `qcc-codegen` are tested to equal them (bit for bit wherever integers are involved).

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod dtype;
mod error;
mod graph;
mod quant;
mod record;
mod shape;
mod tensor;
mod types;

pub mod interpreter;
pub mod limits;
pub mod memory;
pub mod numerics;
pub mod onnx;
pub mod ops;
pub mod text;
mod verify;

pub use dtype::DType;
pub use error::{Error, OpError};
pub use graph::{Device, Graph, Kind, Node, NodeId, Output, Use, ValueId};
pub use ops::Op;
pub use quant::{OutputGrid, QuantParams};
pub use record::{GraphRecord, KindRecord, NodeRecord, OutputRecord, ValueRecord};
pub use shape::{Shape, ShapeError};
pub use tensor::{Element, Tensor, TensorError};
pub use types::TensorType;
pub use verify::{Stage, VerifyError, verify};
