//! Interpolation along an axis.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        line::Line,
        resample::{self, MAX_TAPS, Sums},
    },
};
use qcc_ir::{
    Graph, NodeId, Op, OpError,
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

fn line(cx: &Lowering, node: NodeId, axis: usize) -> Result<Line, CodegenError> {
    let dims = cx.graph.shape(cx.graph.operand(node, 0));
    let refuse = || cx.refuse(node, OpError::attribute(format!("axis {axis} of {dims}")));
    Line::new(dims, &[axis]).ok_or_else(refuse)
}

fn lower_resample(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op: &Resample = attributes!(cx, node, Resample);
    let x = cx.graph.operand(node, 0);
    let places = (cx.location(x)?, cx.location(node.out())?);
    let taps = op.taps(cx.graph.shape(x)[op.axis]);
    let work = cx.current_work();
    let line = line(cx, node, op.axis)?;
    match op.is_pick() {
        true => {
            let line = Line { inner: line.inner * cx.graph.ty(x).dtype.size() as i64, ..line };
            resample::resample(cx, line, &Sums::Pick(&taps), places, work)
        }
        false => resample::resample(cx, line, &Sums::Float(&taps), places, work),
    }
}

fn lower_q_resample(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op: &QResample = attributes!(cx, node, QResample);
    let x = cx.graph.operand(node, 0);
    let places = (cx.location(x)?, cx.location(node.out())?);
    let taps = op.fixed_taps(cx.graph.ty(x)).map_err(|e| cx.refuse(node, e))?;
    let line = line(cx, node, op.resample.axis)?;
    let work = cx.current_work();
    resample::resample(cx, line, &Sums::Fixed(&taps, op.output), places, work)
}
