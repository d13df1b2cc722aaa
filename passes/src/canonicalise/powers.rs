//! Powers with exponents that take no logarithm.

use super::Did;
use crate::{PassError, edit::f32_scalar};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryKind, Reduce, ReduceKind, Unary, UnaryKind},
};

/// Powers of x that take no logarithm: products, and a root where the sign of 0 shows in no result.
pub(super) fn power(graph: &mut Graph, node: NodeId, x: ValueId, exponent: f32) -> Result<Did, PassError> {
    let multiply = Binary { kind: BinaryKind::Mul };
    match exponent {
        2.0 => {
            graph.rewrite(node, multiply, &[x, x])?;
            Ok(Some("a square is a product"))
        }
        3.0 | 4.0 => {
            let name = format!("{}_square", graph.node(node).name);
            let square = graph.add(&name, multiply.clone(), &[x, x])?.out();
            graph.rewrite(node, multiply, &[square, if exponent == 3.0 { x } else { square }])?;
            Ok(Some("a small power is a product of products"))
        }
        0.5 => {
            // √−0 is −0, and −∞ has no root; their powers are 0 and ∞: magnitudes and squares are neither.
            if !is_never_negative(graph, x) {
                return Ok(None);
            }
            graph.rewrite(node, Unary { kind: UnaryKind::Sqrt }, &[x])?;
            Ok(Some("the power of a half is a root"))
        }
        _ => Ok(None),
    }
}

/// Whether no element is below 0, −0 or −∞, by the ops that make it.
fn is_never_negative(graph: &Graph, value: ValueId) -> bool {
    let operand = |slot| graph.operand(value.node, slot);
    match graph.op(value.node) {
        Some(Op::Unary(Unary { kind: UnaryKind::Abs | UnaryKind::Exp | UnaryKind::Sigmoid })) => true,
        Some(Op::Binary(Binary { kind: BinaryKind::Mul })) => operand(0) == operand(1),
        // A variance and an epsilon.
        Some(Op::Binary(Binary { kind: BinaryKind::Add })) => {
            f32_scalar(graph, operand(1)).is_some_and(|c| c > 0.0) && is_never_negative(graph, operand(0))
        }
        Some(Op::Reduce(Reduce { kind: ReduceKind::Mean | ReduceKind::Sum, .. })) => {
            is_never_negative(graph, operand(0))
        }
        _ => false,
    }
}
