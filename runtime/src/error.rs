use crate::{
    BindError, DataError, PolicyError, ProgramError, TierError, threads::ThreadsError, zoo::ZooError,
};
use qcc_codegen::CodegenError;
use qcc_ir::{memory::MemoryError, onnx::ImportError};
use qcc_passes::PassError;

/// What can go wrong between a model file and its results.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ONNX file is not usable.
    #[error("`{path}`: {source}")]
    Import {
        /// The file.
        path: String,
        /// What is wrong.
        source: Box<ImportError>,
    },
    /// More memory would be needed than is allowed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The `.qcc` file is not usable.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The graph is not usable.
    #[error(transparent)]
    Graph(#[from] qcc_ir::Error),
    /// A pass cannot do its work.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// No code can be generated, or it cannot run.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// Samples, labels or images are not usable.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Inputs or outputs are not the model's.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The instructions asked for are not there.
    #[error(transparent)]
    Tier(#[from] TierError),
    /// The threads asked for are not there.
    #[error(transparent)]
    Threads(#[from] ThreadsError),
    /// The peak of this CPU cannot be measured.
    #[error(transparent)]
    Peak(#[from] qcc_codegen::peak::PeakError),
    /// A synthetic model cannot be built.
    #[error(transparent)]
    Zoo(#[from] ZooError),
    /// A policy is not usable, or not the model's.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Ranges cannot be chosen as they were to be.
    #[error("{0}")]
    Calibration(String),
    /// Models that cannot be compared with each other, or labels that are no classes of the model.
    #[error("{0}")]
    Evaluation(String),
}
