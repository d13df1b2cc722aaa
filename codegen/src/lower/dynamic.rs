//! Quantization by grids that are chosen at run time.

use super::{Lowerer, Lowering, product, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        dynamic::{self, Rows},
        wide,
    },
};
use qcc_ir::{Graph, NodeId, Op};

pub(super) const DYNAMIC_QUANTIZE: Lowerer = Lowerer { supported, lower };

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    product::check_extents(graph, node)
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, DynamicQuantize);
    let operand = cx.graph.operand(node, 0);
    let (rows, len) = op.split(cx.graph.shape(operand));
    let [scales, zeros] = [cx.view(node.port(1))?, cx.view(node.port(2))?];
    // Bytes from row to row: of all shapes that are dense, and of pairs, the same between any two neighbours.
    let stride = scales.strides[..op.axis].last().copied().unwrap_or(0);
    let rows = Rows {
        rows,
        len,
        x: cx.location(operand)?,
        codes: cx.location(node.out())?,
        scales: scales.location,
        zeros: zeros.location,
        stride,
    };
    let work = cx.current_work();
    if wide::quantize_rows(cx, &rows, work)? {
        return Ok(());
    }
    dynamic::quantize_rows(cx, &rows, work)
}
