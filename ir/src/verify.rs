use crate::{Graph, Kind, NodeId, Op, TensorType, ValueId};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt};

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

/// Checks a graph: its structure, and that it holds nothing its stage does not allow.
///
/// | stage | what may not stand in it |
/// |---|---|
/// | `Float` | `FakeQuant`; the integer ops `QConv`, `QMatMul`, `QAveragePool`, `QUnary`, `QBinary` |
/// | `FakeQuant` | the integer ops |
/// | `Int8` | `FakeQuant`, `BatchNorm` |
/// | `Placed` | `BatchNorm` (fake-quant graphs are placed as they are); an op without a device; an op that uses the result of an op on another device, unless that is a `Transfer` to its own device; a `Transfer` that is not on the device it hands to |
///
/// Quantize, dequantize, what quantizes at run time and moves of quantized values are legal everywhere: models bring them. That every operand of an
/// integer op has a grid is a matter of its type inference, which is repeated here.
pub fn verify(graph: &Graph) -> Result<(), VerifyError> {
    if graph.order().len() != graph.len() {
        return Err(VerifyError {
            node: graph.name.clone(),
            op: "graph".into(),
            reason: "nodes depend on each other in a cycle".into(),
        });
    }
    for (id, node) in graph.nodes() {
        let checked = structure(graph, id).and_then(|()| match node.op() {
            Some(op) => allowed(graph.stage, op).and_then(|()| match graph.stage {
                Stage::Placed => placement(graph, id, op),
                _ => Ok(()),
            }),
            None => Ok(()),
        });
        checked.map_err(|reason| VerifyError {
            node: node.name.clone(),
            op: graph.mnemonic(id).into(),
            reason,
        })?;
    }
    outputs(graph)
}

/// Slots are contiguous, operands exist, and the types are those of inference.
fn structure(graph: &Graph, id: NodeId) -> Result<(), String> {
    let node = graph.node(id);
    let slots = graph.slots(id);
    if !slots.iter().copied().eq((0..).take(slots.len())) {
        return Err(format!("operand slots {slots:?} are not 0, 1, 2…"));
    }
    let operands = graph.operands(id);
    if let Some(v) = operands.iter().find(|v| !exists(graph, **v)) {
        return Err(format!("operand {v} does not exist"));
    }
    match node.kind() {
        Kind::Op(op) => {
            let types: Vec<&TensorType> = operands.iter().map(|&v| graph.ty(v)).collect();
            let inferred = op.infer(&types).map_err(|e| e.to_string())?;
            if inferred != node.outputs() {
                return Err(format!("typed {:?}, but its operands make it {inferred:?}", node.outputs()));
            }
        }
        Kind::Constant(tensor) => {
            let ty = graph.ty(id.out());
            if (tensor.dtype(), tensor.shape()) != (ty.dtype, &ty.shape) {
                return Err(format!("typed {ty}, but holds {}", tensor.ty()));
            }
        }
        Kind::Input => {}
    }
    Ok(())
}

fn exists(graph: &Graph, value: ValueId) -> bool {
    graph.contains(value.node) && usize::from(value.port) < graph.node(value.node).outputs().len()
}

fn allowed(stage: Stage, op: &Op) -> Result<(), String> {
    let is_integer_op =
        matches!(op, Op::QConv(_) | Op::QMatMul(_) | Op::QAveragePool(_) | Op::QUnary(_) | Op::QBinary(_));
    let legal = match stage {
        Stage::Float => !is_integer_op && !matches!(op, Op::FakeQuant(_)),
        Stage::FakeQuant => !is_integer_op,
        Stage::Int8 => !matches!(op, Op::FakeQuant(_) | Op::BatchNorm(_)),
        Stage::Placed => !matches!(op, Op::BatchNorm(_)),
    };
    if legal { Ok(()) } else { Err(format!("may not stand in a graph of stage {stage}")) }
}

fn placement(graph: &Graph, id: NodeId, op: &Op) -> Result<(), String> {
    let Some(own) = graph.node(id).device else {
        return Err("has no device".into());
    };
    if let Op::Transfer(transfer) = op {
        return match transfer.to == own {
            true => Ok(()),
            false => Err(format!("is on {own}, but hands its operand to {}", transfer.to)),
        };
    }
    for v in graph.operands(id) {
        let producer = graph.node(v.node);
        if producer.op().is_some() && producer.device != Some(own) {
            return Err(format!(
                "is on {own} and uses `{}` of another device without a Transfer",
                producer.name
            ));
        }
    }
    Ok(())
}

/// Results exist and their names are unique.
fn outputs(graph: &Graph) -> Result<(), VerifyError> {
    let mut names = BTreeSet::new();
    for output in graph.outputs() {
        let reason = if !exists(graph, output.value) {
            format!("value {} does not exist", output.value)
        } else if !names.insert(&output.name) {
            "another output has this name".into()
        } else {
            continue;
        };
        return Err(VerifyError { node: output.name.clone(), op: "output".into(), reason });
    }
    Ok(())
}
