use qcc_ir::{OpError, memory::MemoryError};

/// Why a graph could not be compiled or a compiled model could not run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CodegenError {
    /// The graph is not at `Stage::Placed`, or a node has no device.
    #[error("node `{node}` has no device: run the placement pass before compiling")]
    NotPlaced {
        /// The node.
        node: String,
    },
    /// A node placed on generated code that has no lowering.
    #[error("node `{node}` ({op}) cannot be compiled: {reason}; place it on the interpreter")]
    Unsupported {
        /// The node.
        node: String,
        /// Its op.
        op: &'static str,
        /// What is missing.
        reason: String,
    },
    /// More memory than a model may take.
    #[error("{what} would take {bytes} bytes, above the limit of {limit}")]
    TooLarge {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// More memory than this model was allowed.
    #[error(transparent)]
    OverMemory(#[from] MemoryError),
    /// The system gave no memory.
    #[error("no {bytes} bytes of memory for the weights: {reason}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system says.
        reason: String,
    },
    /// The CPU lacks a tier's instructions.
    #[error("this CPU cannot run tier {tier}: choose one of those it has")]
    TierUnavailable {
        /// The tier's name.
        tier: &'static str,
    },
    /// The machine code generator refused a function: a defect of qcc, not of the model.
    #[error("generating `{function}` failed: {reason}")]
    Backend {
        /// The function.
        function: String,
        /// What the generator says.
        reason: String,
    },
    /// A node's operands or attributes that reached code generation but cannot be computed.
    #[error("node `{node}` ({op}): {source}")]
    Node {
        /// The node.
        node: String,
        /// Its op.
        op: &'static str,
        /// The reason.
        source: OpError,
    },
    /// The buffers given to a run are not those of the model.
    #[error("{what}: expected {expected}, got {got}")]
    Buffers {
        /// Which buffers, such as ``bytes of input `image` ``.
        what: String,
        /// What the model takes.
        expected: usize,
        /// What was given.
        got: usize,
    },
}
