//! Programs: what a `.qcc` file holds.

use crate::{
    Preprocess,
    container::{self, ContainerError},
};
use bytes::Bytes;
use qcc_ir::{DType, Graph, GraphRecord, Shape, Stage, Tensor, numerics::RequantMode};
use qcc_passes::{Calibrator, Precision};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A model after the passes: quantized, laid out and placed, but not yet machine code. It runs on every tier.
#[derive(Clone)]
pub struct Program {
    graph: Graph,
    info: ProgramInfo,
}

/// How a program was made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Version of the qcc that made it.
    pub qcc: String,
    /// What it computes with.
    pub precision: Precision,
    /// The requantization that was asked for; means nothing without integers.
    pub requant: RequantMode,
    /// Where the ranges of activations come from; `None` for float.
    pub calibration: Option<Calibration>,
    /// How images become inputs, so that who runs it need not say it again.
    pub preprocess: Preprocess,
    /// What the passes did and declined, as text.
    pub report: String,
    /// Every op with its device and the reason for it, as text.
    pub plan: String,
}

/// Where the ranges of activations come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Calibration {
    /// File, folder, or what else it was.
    pub origin: String,
    /// Number of samples.
    pub samples: u64,
    /// How ranges were chosen.
    pub calibrator: Calibrator,
    /// Whether the samples were noise: good for timing, worth nothing for accuracy.
    pub synthetic: bool,
}

/// Why a `.qcc` file cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[error("`{path}`: {source}")]
pub struct ProgramError {
    /// The file.
    pub path: String,
    /// What is wrong.
    pub source: ContainerError,
}

/// What stands in the record of a file.
#[derive(Serialize, Deserialize)]
struct Record {
    info: ProgramInfo,
    graph: GraphRecord,
    /// Types of the blobs, which hold the graph's constants.
    blobs: Vec<(DType, Shape)>,
}

impl Program {
    pub(crate) fn new(graph: Graph, info: ProgramInfo) -> Program {
        Program { graph, info }
    }

    /// The graph, at `Stage::Placed`.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// How it was made.
    pub fn info(&self) -> &ProgramInfo {
        &self.info
    }

    /// Writes a `.qcc` file, in one step: an existing file is replaced as a whole or stays as it is.
    ///
    /// # Errors
    /// Where the folder or the disk does not take it.
    pub fn save(&self, path: &Path) -> Result<(), ProgramError> {
        let failed = |source| ProgramError { path: path.display().to_string(), source };
        let (graph, tensors) = self.graph.to_record();
        let types = tensors.iter().map(|t| (t.dtype(), t.shape().clone())).collect();
        let blobs: Vec<Bytes> = tensors.iter().map(|t| t.bytes().clone()).collect();
        let record = Record { info: self.info.clone(), graph, blobs: types };
        let bytes =
            postcard::to_allocvec(&record).map_err(|e| failed(ContainerError::Malformed(e.to_string())))?;
        container::write(path, &bytes, &blobs).map_err(failed)
    }

    /// Maps a `.qcc` file. Weights are used where they are mapped. The file must not be shortened or written to in
    /// place while the program is in use; replacing it (as [`save`](Self::save) does) is safe.
    ///
    /// # Errors
    /// Where the file is not a `.qcc` file of this version, or is damaged in any way.
    pub fn load(path: &Path) -> Result<Program, ProgramError> {
        let failed = |source| ProgramError { path: path.display().to_string(), source };
        let contents = container::open(path).map_err(failed)?;
        Program::of(contents).map_err(failed)
    }

    fn of(contents: container::Contents) -> Result<Program, ContainerError> {
        let malformed = |e: &dyn std::fmt::Display| ContainerError::Malformed(e.to_string());
        let (record, rest): (Record, &[u8]) =
            postcard::take_from_bytes(&contents.record).map_err(|e| malformed(&e))?;
        if !rest.is_empty() {
            return Err(malformed(&format!("{} bytes after the record", rest.len())));
        }
        if record.blobs.len() != contents.blobs.len() {
            let why = format!("{} types for {} blobs", record.blobs.len(), contents.blobs.len());
            return Err(malformed(&why));
        }
        let typed = record.blobs.into_iter().zip(contents.blobs);
        let tensors = typed.map(|((dtype, shape), bytes)| Tensor::from_bytes(dtype, shape, bytes));
        let tensors = tensors.collect::<Result<Vec<_>, _>>().map_err(|e| malformed(&e))?;
        let graph = Graph::from_record(record.graph, &tensors).map_err(|e| malformed(&e))?;
        if graph.stage != Stage::Placed {
            return Err(malformed(&format!("a graph at stage {}", graph.stage)));
        }
        qcc_ir::verify(&graph).map_err(|e| malformed(&e))?;
        Ok(Program { graph, info: record.info })
    }
}
