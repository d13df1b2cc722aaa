//! Which ops have an integer form.

use crate::edit::{activations, f32_constant, has_weights, is_move};
use qcc_ir::{
    DType, Graph, NodeId, Op,
    ops::{BinaryKind, Pad, PadMode, PoolKind, UnaryKind},
};

/// Products of a u8 by an s8 that a 32-bit sum can hold at full range, bias included.
const MAX_SUM: usize = 65_000;

/// Products of a u8 by a u8, zero points taken off, that a 32-bit sum can hold at full range, bias included.
const MAX_ACTIVATION_SUM: usize = 32_500;

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
        Op::MatMul(m) if !has_weights(graph, node) => product_of_activations(graph, node, m.bias),
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
    check_finite(graph, node, 1, "weights")?;
    if has_bias {
        check_finite(graph, node, 2, "bias values")?;
    }
    let shape = graph.shape(graph.operand(node, 1));
    if shape.elements() == 0 {
        return Err("its weights are empty".into());
    }
    let sum = shape.elements() / shape[out];
    if sum > MAX_SUM {
        return Err(format!("a sum of {sum} products can leave 32 bits (the limit is {MAX_SUM})"));
    }
    constants_are_finite(graph, node)
}

/// Checks sums and bias of a matrix product of two activations.
fn product_of_activations(graph: &Graph, node: NodeId, has_bias: bool) -> Result<(), String> {
    let [a, b] = [0, 1].map(|slot| graph.shape(graph.operand(node, slot)));
    if a.elements() == 0 || b.elements() == 0 {
        return Err("its operands are empty".into());
    }
    let sum = a[a.rank() - 1];
    if sum > MAX_ACTIVATION_SUM {
        return Err(format!(
            "a sum of {sum} products of two activations can leave 32 bits (the limit is {MAX_ACTIVATION_SUM})"
        ));
    }
    if has_bias {
        check_finite(graph, node, 2, "bias values")?;
    }
    constants_are_finite(graph, node)
}

/// Fails unless the operand in this slot is constant and finite.
fn check_finite(graph: &Graph, node: NodeId, slot: usize, what: &str) -> Result<(), String> {
    let values = f32_constant(graph, graph.operand(node, slot));
    match values.ok_or(format!("its {what} are not constant"))?.iter().all(|x| x.is_finite()) {
        true => Ok(()),
        false => Err(format!("its {what} are not finite")),
    }
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

/// What converting an element between float and integers costs, in multiply-accumulates that integers save: about 0.1 ns
/// beside 0.0075 ns, measured with 512-bit vectors; narrower ones slow both down alike.
const SAVED_BY_CONVERSION: u64 = 13;

/// Whether the node is what int8 is for: by these a region of int8 ops pays for its quantization. Convolutions, products
/// with weights, and products of two activations that are worth converting all of their values for.
pub(crate) fn gains(graph: &Graph, node: NodeId) -> bool {
    match graph.op(node) {
        Some(Op::Conv(_)) => true,
        Some(Op::MatMul(_)) if has_weights(graph, node) => true,
        Some(Op::MatMul(_)) => {
            let values = activations(graph, node).into_iter().map(|(_, v)| v).chain([node.out()]);
            let elements: u64 = values.map(|v| graph.shape(v).elements() as u64).sum();
            graph.macs(node) >= SAVED_BY_CONVERSION * elements
        }
        _ => false,
    }
}
