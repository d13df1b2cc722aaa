use crate::{Error, OpError, ShapeError, memory::MemoryError};
use std::{fmt, path::PathBuf};

/// Why a model cannot be imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Not a model, damaged or not.
    #[error("this is not an ONNX model: {0}")]
    NotAModel(String),
    /// The file does not keep to the wire format of protocol buffers, or claims more than the limits allow.
    #[error("malformed model file, byte {offset}: {reason}")]
    Wire {
        /// Where the field starts that is at fault.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The file keeps to the wire format, but the parser of the schema refuses it.
    #[error("malformed model file: {0}")]
    Parse(String),
    /// The file is of a version that is not supported, or does not say which.
    #[error("{0}")]
    Version(String),
    /// Values and nodes that do not make a graph: cycles, names used twice, values that nothing defines.
    #[error("{0}")]
    Structure(String),
    /// A weight or other stored tensor whose data does not fit its type.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// The tensor's name, or where it stands.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Weights in another file that cannot or must not be read.
    #[error("external data of tensor `{tensor}`: {reason}")]
    ExternalData {
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// An input whose type is not usable or whose shape is not known.
    #[error("input `{input}`: {reason}")]
    Input {
        /// The input's name.
        input: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// More memory than the model may take.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A node whose operands or attributes are not usable.
    #[error("node `{node}` ({op}): {source}")]
    Node {
        /// The node's name; its first output's where it has none.
        node: String,
        /// The ONNX op.
        op: String,
        /// The reason.
        source: NodeError,
    },
    /// Ops that are not supported: all of them.
    #[error("{}", list(.0))]
    UnsupportedOps(Vec<UnsupportedOp>),
}

/// A node whose op is not supported.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnsupportedOp {
    /// The node's name; its first output's where it has none.
    pub node: String,
    /// The op.
    pub op: String,
    /// The op's domain; `ai.onnx` for ONNX itself.
    pub domain: String,
    /// The version of the domain that the model imports; `None` where it does not import it.
    pub version: Option<i64>,
}

impl fmt::Display for UnsupportedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node `{}`: {} of domain {}", self.node, self.op, self.domain)?;
        match self.version {
            Some(v) => write!(f, " (opset {v})"),
            None => write!(f, " (which the model does not import)"),
        }
    }
}

fn list(ops: &[UnsupportedOp]) -> String {
    // A model of ten thousand unknown nodes needs no more lines than this to be understood.
    const SHOWN: usize = 40;
    let mut text = match ops.len() {
        1 => "one of the model's nodes is not supported:".to_owned(),
        n => format!("{n} of the model's nodes are not supported:"),
    };
    for op in ops.iter().take(SHOWN) {
        text.push_str(&format!("\n  {op}"));
    }
    if ops.len() > SHOWN {
        text.push_str(&format!("\n  and {} more", ops.len() - SHOWN));
    }
    text
}

/// Why a node cannot be imported. Carries no node: [`ImportError::Node`] adds it.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The op refuses operands or attributes.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A required operand is absent.
    #[error("operand {slot} ({role}) is missing")]
    MissingOperand {
        /// Its place, from 0.
        slot: usize,
        /// What ONNX calls it.
        role: &'static str,
    },
    /// More operands than the op has at this version.
    #[error("operand {slot} (`{value}`) is one more than the op takes at opset {opset}")]
    ExtraOperand {
        /// Its place, from 0.
        slot: usize,
        /// The value's name.
        value: String,
        /// The model's opset.
        opset: i64,
    },
    /// An operand that decides over shapes is computed at run time.
    #[error(
        "operand {slot} ({role}, `{value}`) must be known at compile time, but it depends on the model's inputs"
    )]
    NotConstant {
        /// Its place, from 0.
        slot: usize,
        /// What ONNX calls it.
        role: &'static str,
        /// The value's name.
        value: String,
    },
    /// The value of an operand is needed, not only its type, each time the model runs.
    #[error("operand {slot} ({role}, `{value}`) is computed with by value, which compiled graphs cannot")]
    ByValue {
        /// Its place, from 0.
        slot: usize,
        /// What ONNX calls it.
        role: &'static str,
        /// The value's name.
        value: String,
    },
    /// A result that the op does not have, or that is not supported.
    #[error("result {port} (`{value}`) is not supported")]
    Result {
        /// Its place, from 0.
        port: usize,
        /// The value's name.
        value: String,
    },
    /// An attribute is missing, unknown, of the wrong type, or out of its domain.
    #[error("attribute `{name}` {reason}")]
    Attribute {
        /// The attribute.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl NodeError {
    pub(super) fn attribute(name: &str, reason: impl Into<String>) -> NodeError {
        NodeError::Attribute { name: name.into(), reason: reason.into() }
    }
}

/// The graph's refusal without the node: import names the ONNX node instead.
impl From<Error> for NodeError {
    fn from(e: Error) -> NodeError {
        match e {
            Error::Node { source, .. } => source.into(),
            Error::Input { reason, .. } => OpError::Shape(reason).into(),
            // Not what building a graph answers.
            e @ (Error::Record { .. } | Error::Verify(_)) => OpError::Unsupported(e.to_string()).into(),
        }
    }
}

impl From<ShapeError> for NodeError {
    fn from(e: ShapeError) -> NodeError {
        OpError::from(e).into()
    }
}
