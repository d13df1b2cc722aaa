use crate::{ShapeError, TensorError, VerifyError};

/// Why an op does not accept its operands or attributes. Carries no node: [`Error::Node`] adds it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OpError {
    /// Too few or too many operands.
    #[error("takes {expected} operands, got {got}")]
    Arity {
        /// What the op takes, such as `2` or `2 to 4`.
        expected: String,
        /// What it got.
        got: usize,
    },
    /// An operand of a type that the op does not take.
    #[error("{0}")]
    DType(String),
    /// Shapes that do not fit the op or each other.
    #[error("{0}")]
    Shape(String),
    /// An attribute out of its domain.
    #[error("{0}")]
    Attribute(String),
    /// Scales, zero points or grids that cannot be used.
    #[error("{0}")]
    Quant(String),
    /// More memory than the limits allow.
    #[error("{0}")]
    TooLarge(String),
    /// Valid, but not implemented.
    #[error("{0}")]
    Unsupported(String),
}

impl OpError {
    /// An [`OpError::Shape`].
    pub fn shape(why: impl Into<String>) -> OpError {
        OpError::Shape(why.into())
    }
    /// An [`OpError::DType`].
    pub fn dtype(why: impl Into<String>) -> OpError {
        OpError::DType(why.into())
    }
    /// An [`OpError::Attribute`].
    pub fn attribute(why: impl Into<String>) -> OpError {
        OpError::Attribute(why.into())
    }
    /// An [`OpError::Quant`].
    pub fn quant(why: impl Into<String>) -> OpError {
        OpError::Quant(why.into())
    }
    /// An [`OpError::TooLarge`].
    pub fn too_large(why: impl Into<String>) -> OpError {
        OpError::TooLarge(why.into())
    }
    /// An [`OpError::Unsupported`].
    pub fn unsupported(why: impl Into<String>) -> OpError {
        OpError::Unsupported(why.into())
    }
}

impl From<ShapeError> for OpError {
    fn from(e: ShapeError) -> OpError {
        OpError::TooLarge(e.to_string())
    }
}

impl From<TensorError> for OpError {
    fn from(e: TensorError) -> OpError {
        OpError::Shape(e.to_string())
    }
}

/// What can go wrong with a graph.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A node refused its operands or attributes.
    #[error("node `{node}` ({op}): {source}")]
    Node {
        /// The node's name.
        node: String,
        /// The op's mnemonic.
        op: String,
        /// The reason.
        source: OpError,
    },
    /// A graph input was given a tensor of another type, or none.
    #[error("input `{input}`: {reason}")]
    Input {
        /// The input's name.
        input: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A recorded graph is malformed.
    #[error("record of node `{node}`: {reason}")]
    Record {
        /// The node's (or output's) name.
        node: String,
        /// What is wrong.
        reason: String,
    },
    /// The graph does not satisfy its stage.
    #[error(transparent)]
    Verify(#[from] VerifyError),
}
