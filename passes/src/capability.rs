//! Which ops have an integer form.

use crate::edit::{activations, f32_constant, is_move};
use qcc_ir::{
    DType, Graph, NodeId, Op,
    ops::{BinaryKind, Pad, PadMode, PoolKind, UnaryKind},
};

/// Products of a u8 by an s8 that a 32-bit sum can hold at full range, bias included.
const MAX_SUM: usize = 65_000;

/// Whether the op has an integer form, by its attributes and operand types; otherwise why it stays float.
///
/// # Errors
/// The reason, as a phrase.
pub fn int8_capability(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(op) = graph.op(node) else {
        return Err("it computes nothing".into());
    };
    let result = graph.ty(node.out());
    if matches!(op, Op::Quantize(_) | Op::Dequantize(_) | Op::FakeQuant(_)) || result.quant.is_some() {
        return Err("it is quantized by the model itself".into());
    }
    if result.dtype != DType::F32 {
        return Err(format!("its result is {}, not f32", result.dtype));
    }
    if let Some((_, v)) = activations(graph, node).iter().find(|(_, v)| graph.ty(*v).dtype != DType::F32) {
        return Err(format!("it takes {}, not f32", graph.ty(*v).dtype));
    }
    match op {
        Op::Conv(c) if c.window.rank() != 2 => {
            Err(format!("convolutions over {} spatial dimensions have no integer form", c.window.rank()))
        }
        Op::Conv(c) => product(graph, node, 0, c.bias),
        Op::MatMul(_) if graph.shape(graph.operand(node, 1)).rank() != 2 => {
            Err("its second operand is not one constant matrix".into())
        }
        Op::MatMul(m) => product(graph, node, 1, m.bias),
        Op::Pool(p) if p.window.rank() != 2 => {
            Err(format!("pools over {} spatial dimensions have no integer form", p.window.rank()))
        }
        Op::Pool(p) => match p.kind {
            PoolKind::Average { .. } if p.window.taps().saturating_mul(255) > i32::MAX as usize => {
                Err("the sum over its window overflows 32 bits".into())
            }
            _ => Ok(()),
        },
        Op::Binary(b) => match b.kind {
            BinaryKind::Add | BinaryKind::Sub | BinaryKind::Mul => constants_are_finite(graph, node),
            kind => Err(format!("{kind:?} has no integer form")),
        },
        Op::Unary(u) => match u.kind {
            UnaryKind::Log | UnaryKind::Reciprocal => {
                Err(format!("{:?} is singular at 0, which every grid contains", u.kind))
            }
            _ => Ok(()),
        },
        Op::Pad(Pad { mode: PadMode::Constant { value }, .. }) if *value != 0.0 => {
            Err(format!("it pads with {value}, which need not be on the grid"))
        }
        Op::Gather(_) if graph.constant_value(graph.operand(node, 0)).is_some() => {
            Err("it looks up a constant table".into())
        }
        op if is_move(op) || matches!(op, Op::Resample(_)) => constants_are_finite(graph, node),
        op => Err(format!("{} has no integer form", op.mnemonic())),
    }
}

/// Checks constants and sums of a convolution or matrix product with outputs along axis `out` of the weights.
fn product(graph: &Graph, node: NodeId, out: usize, has_bias: bool) -> Result<(), String> {
    let operands = graph.operands(node);
    let finite = |slot: usize, what: &str| {
        let values = f32_constant(graph, operands[slot]).ok_or(format!("its {what} are not constant"))?;
        match values.iter().all(|x| x.is_finite()) {
            true => Ok(()),
            false => Err(format!("its {what} are not finite")),
        }
    };
    finite(1, "weights")?;
    if has_bias {
        finite(2, "bias values")?;
    }
    let shape = graph.shape(operands[1]);
    if shape.elements() == 0 {
        return Err("its weights are empty".into());
    }
    let sum = shape.elements() / shape[out];
    if sum > MAX_SUM {
        return Err(format!("a sum of {sum} products can leave 32 bits (the limit is {MAX_SUM})"));
    }
    constants_are_finite(graph, node)
}

/// Constants among the activations get a grid of their own; all of them must fit one.
fn constants_are_finite(graph: &Graph, node: NodeId) -> Result<(), String> {
    let activations = activations(graph, node);
    let mut constants = activations.iter().filter_map(|(_, v)| f32_constant(graph, *v));
    if constants.clone().count() == activations.len() {
        return Err("all its operands are constant".into());
    }
    match constants.all(|c| c.iter().all(|x| x.is_finite())) {
        true => Ok(()),
        false => Err("a constant operand is not finite".into()),
    }
}

/// Whether the op is what int8 is for: by these a region of int8 ops pays for its quantization.
pub(crate) fn gains(op: &Op) -> bool {
    matches!(op, Op::Conv(_) | Op::MatMul(_))
}
