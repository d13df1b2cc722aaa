//! Interpolation along an axis.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::resample::{self, MAX_TAPS, Rows, Sums},
};
use qcc_ir::{
    Graph, NodeId, Op,
    ops::{QResample, Resample},
};

pub(super) const RESAMPLE: Lowerer = Lowerer { supported, lower: lower_resample };
pub(super) const Q_RESAMPLE: Lowerer = Lowerer { supported, lower: lower_q_resample };

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let resample = match graph.op(node) {
        Some(Op::Resample(op)) => op,
        Some(Op::QResample(op)) => &op.resample,
        _ => return Ok(()),
    };
    match resample.taps_of_each() {
        ..=MAX_TAPS => Ok(()),
        taps => Err(format!("each element is the sum of {taps} others: at most {MAX_TAPS} have kernels")),
    }
}

/// `inner` in elements of `size` bytes.
fn rows(cx: &Lowering, node: NodeId, axis: usize, size: usize) -> Rows {
    let shape = cx.graph.shape(cx.graph.operand(node, 0));
    Rows {
        outer: shape[..axis].iter().product(),
        n: shape[axis],
        inner: shape[axis + 1..].iter().product::<usize>() * size,
    }
}

fn lower_resample(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op: &Resample = attributes!(cx, node, Resample);
    let x = cx.graph.operand(node, 0);
    let places = (cx.location(x)?, cx.location(node.out())?);
    let taps = op.taps(cx.graph.shape(x)[op.axis]);
    let work = cx.current_work();
    match op.is_pick() {
        true => {
            let rows = rows(cx, node, op.axis, cx.graph.ty(x).dtype.size());
            resample::resample(cx, rows, &Sums::Pick(&taps), places, work)
        }
        false => resample::resample(cx, rows(cx, node, op.axis, 1), &Sums::Float(&taps), places, work),
    }
}

fn lower_q_resample(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op: &QResample = attributes!(cx, node, QResample);
    let x = cx.graph.operand(node, 0);
    let places = (cx.location(x)?, cx.location(node.out())?);
    let taps = op.fixed_taps(cx.graph.ty(x)).map_err(|e| cx.refuse(node, e))?;
    let rows = rows(cx, node, op.resample.axis, 1);
    let work = cx.current_work();
    resample::resample(cx, rows, &Sums::Fixed(&taps, op.output), places, work)
}
