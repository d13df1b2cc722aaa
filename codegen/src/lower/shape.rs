//! Ops that move elements and compute none: strided copies.

use super::{Lowerer, Lowering, lowerer};
use crate::{
    CodegenError,
    kernels::{
        gather::{self, Gather},
        map::{self, View},
        wide::{self, Planes},
    },
    module::Location,
};
use qcc_ir::{
    DType, Graph, NodeId, Op,
    ops::{Concat, Pad, PadMode, Slice},
};

/// Ops whose result is their operand's bytes. The plan gives both one place, so there is nothing to emit.
pub(super) const ALIAS: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: |_, _: NodeId| Ok(()) };

pub(super) const TRANSPOSE: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: transpose };
pub(super) const SLICE: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: slice };
pub(super) const CONCAT: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: concat };
pub(super) const PAD: Lowerer = Lowerer { supported: pad_supported, lower: pad };
pub(super) const EXPAND: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: expand };
pub(super) const GATHER: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: gather };

/// A step that copies bytes.
pub(super) fn copy(
    cx: &mut Lowering,
    kernel: &str,
    from: Location,
    to: Location,
    bytes: u64,
) -> Result<(), CodegenError> {
    let dims = [bytes as usize];
    let view = |location| View::dense(location, DType::U8, &dims);
    map::copy(cx, kernel, &dims, view(from), view(to))
}

/// The op's own attributes; lowerings are only called for the op that names them in the table.
macro_rules! attributes {
    ($cx:expr, $node:expr, $op:ident) => {
        match $cx.graph.op($node) {
            Some(Op::$op(op)) => op,
            _ => return Ok(()),
        }
    };
}
pub(super) use attributes;

fn transpose(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let t = attributes!(cx, node, Transpose);
    let operand = cx.graph.operand(node, 0);
    if cx.plan.fused_into.contains_key(&operand.node) {
        // The elementwise op writes its result in this order.
        return match cx.graph.op(operand.node).and_then(lowerer) {
            Some(inner) => (inner.lower)(cx, operand.node),
            None => Ok(()),
        };
    }
    let dims = cx.graph.shape(node.out()).to_vec();
    let from = cx.operand_view(node, 0)?.permuted(&t.perm);
    let to = cx.result_view(node)?;
    if to.dtype == DType::F32
        && let Some(planes) = Planes::new(cx, &dims, &from, &to).filter(|p| p.channels() > 1)
    {
        let work = cx.current_work();
        return wide::interleave(cx, "transpose", &planes, (&from, &to), work);
    }
    map::copy(cx, "transpose", &dims, from, to)
}

fn slice(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let Slice { axes } = attributes!(cx, node, Slice);
    let dims = cx.graph.shape(node.out()).to_vec();
    let mut from = cx.operand_view(node, 0)?;
    for (stride, axis) in from.strides.iter_mut().zip(axes) {
        from.offset += *stride * axis.start as i64;
        *stride *= axis.step as i64;
    }
    let to = cx.result_view(node)?;
    map::copy(cx, "slice", &dims, from, to)
}

fn concat(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let &Concat { axis } = attributes!(cx, node, Concat);
    let mut to = cx.result_view(node)?;
    for (slot, operand) in cx.graph.operands(node).into_iter().enumerate() {
        let dims = cx.graph.shape(operand).to_vec();
        let from = cx.operand_view(node, slot)?;
        // Parts that were written where they belong are there already.
        if !from.is_same_place(&to) {
            map::copy(cx, "concat", &dims, from, to.clone())?;
        }
        to.offset += to.strides[axis] * dims[axis] as i64;
    }
    Ok(())
}

fn pad_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    match graph.op(node) {
        Some(Op::Pad(pad)) => {
            let x = graph.ty(graph.operand(node, 0));
            // A copy for each border reads elements of the operand only: not those that it repeats more than once.
            let most = |extent: usize| match pad.mode {
                PadMode::Constant { .. } => usize::MAX,
                PadMode::Edge => {
                    if extent > 0 {
                        usize::MAX
                    } else {
                        0
                    }
                }
                PadMode::Reflect => extent.saturating_sub(1),
                PadMode::Wrap => extent,
            };
            let pads = pad.before.iter().zip(&pad.after).map(|(a, b)| a.max(b));
            if x.shape.iter().zip(pads).any(|(&extent, &count)| count > most(extent)) {
                return Err("its borders repeat elements more than once".into());
            }
            pad.fill(x).map(|_| ()).map_err(|e| e.to_string())
        }
        _ => Ok(()),
    }
}

/// The elements, then the borders axis by axis: those of an axis span the earlier axes with their borders and the later
/// ones without, so that each element is written once and the corners of a mirror come out right.
fn pad(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let Pad { before, after, mode } = attributes!(cx, node, Pad);
    let Some(&ty) = cx.operand_types(node).first() else { return Ok(()) };
    let from = cx.operand_view(node, 0)?;
    let result = cx.result_view(node)?;
    let mut inner = result.clone();
    for (&stride, &n) in result.strides.iter().zip(before) {
        inner.offset += stride * n as i64;
    }
    map::copy(cx, "pad", &ty.shape, from, inner.clone())?;

    let rank = ty.shape.rank();
    let fill = match mode {
        PadMode::Constant { .. } => {
            let Some(Op::Pad(op)) = cx.graph.op(node) else { return Ok(()) };
            let bytes = op.fill(ty).map_err(|e| cx.refuse(node, e))?;
            let at = Location::Weights(cx.weights(&bytes, ty.dtype.size())?);
            Some(View::along(at, ty.dtype, None, rank))
        }
        _ => None,
    };
    // What is complete so far: grows from the elements to the whole.
    let (mut region, mut dims) = (inner, ty.shape.to_vec());
    for axis in 0..rank {
        let stride = region.strides[axis];
        let extent = dims[axis] as i64;
        for (count, is_front) in [(before[axis] as i64, true), (after[axis] as i64, false)] {
            let mut border = region.clone();
            border.offset += stride * if is_front { -count } else { extent };
            let source = match &fill {
                Some(fill) => fill.clone(),
                None => {
                    // The element that the border's first one repeats, and the direction of the others.
                    let (first, step) = match mode {
                        PadMode::Edge if is_front => (0, 0),
                        PadMode::Edge => (extent - 1, 0),
                        PadMode::Reflect if is_front => (count, -1),
                        PadMode::Reflect => (extent - 2, -1),
                        PadMode::Wrap if is_front => (extent - count, 1),
                        PadMode::Wrap | PadMode::Constant { .. } => (0, 1),
                    };
                    let mut source = region.clone();
                    source.offset += stride * first;
                    source.strides[axis] = stride * step;
                    source
                }
            };
            let mut border_dims = dims.clone();
            border_dims[axis] = count as usize;
            map::copy(cx, "pad_border", &border_dims, source, border)?;
        }
        region.offset -= stride * before[axis] as i64;
        dims[axis] += before[axis] + after[axis];
    }
    Ok(())
}

fn expand(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let dims = cx.graph.shape(node.out()).to_vec();
    let from = cx.operand_view(node, 0)?.broadcast_to(cx.graph.shape(cx.graph.operand(node, 0)), &dims);
    let to = cx.result_view(node)?;
    map::copy(cx, "expand", &dims, from, to)
}

/// Constant indices as first index and step, where they are evenly spaced and in range.
fn progression(graph: &Graph, node: NodeId, axis: usize) -> Option<(i64, i64)> {
    let indices = graph.constant_value(graph.operand(node, 1))?.to_i64()?;
    let extent = graph.shape(graph.operand(node, 0))[axis] as i64;
    let front: Vec<i64> = indices.iter().map(|&i| if i < 0 { i.saturating_add(extent) } else { i }).collect();
    let first = front.first().copied().unwrap_or(0);
    let step = front.get(1).map_or(0, |second| second - first);
    let is_even =
        front.iter().all(|i| (0..extent).contains(i)) && front.windows(2).all(|w| w[1] - w[0] == step);
    is_even.then_some((first, step))
}

/// Whether the picked elements are a view of the operand.
pub(super) fn is_progression(graph: &Graph, node: NodeId, axis: usize) -> bool {
    progression(graph, node, axis).is_some()
}

fn gather(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let axis = attributes!(cx, node, Gather).axis;
    let Some((first, step)) = progression(cx.graph, node, axis) else { return gather_rows(cx, node, axis) };
    let count = cx.graph.shape(cx.graph.operand(node, 1)).elements();
    let mut dims = cx.graph.shape(cx.graph.operand(node, 0)).to_vec();
    dims[axis] = count;
    let mut from = cx.operand_view(node, 0)?;
    from.offset += from.strides[axis] * first;
    from.strides[axis] *= step;
    // The axes of the indices are one axis of the copy: they lie densely in the result.
    let result = cx.graph.ty(node.out());
    let to = View::dense(cx.location(node.out())?, result.dtype, &dims);
    map::copy(cx, "gather", &dims, from, to)
}

/// By indices of any kind.
fn gather_rows(cx: &mut Lowering, node: NodeId, axis: usize) -> Result<(), CodegenError> {
    let [data, indices] = [0, 1].map(|slot| cx.graph.operand(node, slot));
    let ty = cx.graph.ty(data).clone();
    let gather = Gather {
        x: cx.source(data)?,
        indices: cx.source(indices)?,
        y: cx.location(node.out())?,
        index: cx.graph.ty(indices).dtype,
        axis,
        extent: ty.shape[axis],
        count: cx.graph.shape(indices).elements(),
        row_bytes: ty.shape[axis + 1..].iter().product::<usize>() * ty.dtype.size(),
    };
    gather::lower(cx, gather, ty.shape[..axis].iter().product())
}
