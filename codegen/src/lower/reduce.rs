//! Reductions.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::line::{self, Line, has_reduce},
};
use qcc_ir::{DType, Graph, NodeId, Op, ops::Reduce};

pub(super) const REDUCE: Lowerer = Lowerer { supported, lower };

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::Reduce(op)) = graph.op(node) else { return Ok(()) };
    let x = graph.ty(graph.operand(node, 0));
    if x.dtype != DType::F32 || !has_reduce(op.kind) {
        return Err(format!("no vector form of {:?} of {}", op.kind, x.dtype));
    }
    match merged(&x.shape, op) {
        Some(_) => Ok(()),
        None => Err("the reduced axes do not stand next to each other".into()),
    }
}

/// The reduced axes as one, axes of length 1 aside.
fn merged(dims: &[usize], op: &Reduce) -> Option<Line> {
    let kept: Vec<usize> = (0..dims.len()).filter(|&d| dims[d] != 1).collect();
    let extents: Vec<usize> = kept.iter().map(|&d| dims[d]).collect();
    let axes: Vec<usize> = (0..kept.len()).filter(|&i| op.axes.contains(&kept[i])).collect();
    Line::new(&extents, &axes)
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Reduce);
    let operand = cx.graph.operand(node, 0);
    let Some(line) = merged(cx.graph.shape(operand), op) else { return Ok(()) };
    let places = (cx.location(operand)?, cx.location(node.out())?);
    let work = cx.current_work();
    line::reduce(cx, line, op.kind, places, work)
}
