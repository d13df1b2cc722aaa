//! Pools.

use super::{
    fused::{channels_first, channels_last},
    lengths,
    window::{kernel_shape, list, window},
};
use crate::{
    OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        ArgMaxPool, BinaryKind, Layout, Pool, PoolKind, ReduceKind, ScatterElements, UnaryKind, Update,
        Window,
    },
};

/// The largest elements and, where they are wanted, their places in the whole operand; row by row or, with
/// `storage_order` 1, column by column.
pub(super) fn max_pool(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "X")?;
    let column_major = node.flag("storage_order", false)?;
    let since_10 = node.opset() >= 10;
    let pool = pool_of(node, x, PoolKind::Max, (since_10, since_10))?;
    let Pool { window, ceil_mode, .. } = pool.clone();
    let y = node.emit(pool, &[x])?;
    if !node.wants(1) {
        return Ok(vec![y]);
    }
    let places = node.emit_part("indices", ArgMaxPool { window, ceil_mode, column_major }, &[x])?;
    Ok(vec![y, places])
}

pub(super) fn average_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    average_of(node, x)
}

/// The average pool of this value, by the node's attributes.
pub(super) fn average_of(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId, NodeError> {
    let count_include_pad = node.flag("count_include_pad", false)?;
    let has = (node.opset() >= 19, node.opset() >= 10);
    let pool = pool_of(node, x, PoolKind::Average { count_include_pad }, has)?;
    node.emit(pool, &[x])
}

/// The pool that the node's attributes describe.
fn pool_of(
    node: &mut Node<'_, '_>,
    x: ValueId,
    kind: PoolKind,
    (has_dilations, has_ceil_mode): (bool, bool),
) -> Result<Pool, NodeError> {
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let kernel = kernel_shape(node)?.ok_or_else(|| NodeError::attribute("kernel_shape", "is missing"))?;
    let ceil_mode = has_ceil_mode && node.flag("ceil_mode", false)?;
    let window = window(node, kernel, &spatial, has_dilations)?;
    Ok(Pool { kind, window, ceil_mode, layout: Layout::ChannelsFirst })
}

/// The largest codes of windows of channels last.
pub(super) fn nhwc_max_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let x = channels_first(node, "channels_first", x)?;
    let pool = pool_of(node, x, PoolKind::Max, (true, true))?;
    let y = node.emit_part("pool", pool, &[x])?;
    channels_last(node, "", y)
}

/// Elements put back at the places that a max pool took them from, and 0 elsewhere. Places count in the whole result.
///
/// With pads, the extents that a pool of these attributes would have had at least; an operand says where there were more.
pub(super) fn max_unpool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, places) = (node.operand(0, "X")?, node.operand(1, "I")?);
    let (batch, channels, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    if node.shape(places) != node.shape(x) {
        let why = format!("places {} are not those of {}", node.ty(places), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let kernel = kernel_shape(node)?.ok_or_else(|| NodeError::attribute("kernel_shape", "is missing"))?;
    let n = spatial.len();
    let (strides, pads) = (list(node, "strides", n, 1)?, list(node, "pads", 2 * n, 0)?);
    let given = node.known_ints(2, "output_shape")?;
    if kernel.len() != n {
        return Err(NodeError::attribute("kernel_shape", format!("has {} entries for {n}", kernel.len())));
    }
    let dims = match given {
        Some(given) => lengths("output_shape", &given)?,
        None => {
            let extent = |d: usize| {
                let last = spatial[d].checked_sub(1)?.checked_mul(strides[d])?.checked_add(kernel[d])?;
                last.checked_sub(pads[d].checked_add(pads[n + d])?)
            };
            let extents = (0..n).map(extent).collect::<Option<Vec<_>>>();
            let extents =
                extents.ok_or_else(|| OpError::shape("pads are larger than what they are cut from"))?;
            [&[batch, channels], &extents[..]].concat()
        }
    };
    let shape = Shape::new(dims)?;
    TensorType::new(node.ty(x).dtype, shape.clone()).check_size()?;
    let (dtype, count) = (node.ty(x).dtype, node.shape(x).elements());
    let zero = node.constant_part("zero", Tensor::zeros(dtype, Shape::scalar()));
    let zeros = node.expanded("zeros", [shape.elements()], zero)?;
    let flat_places = node.shaped("places", [count], places)?;
    let flat = node.shaped("elements", [count], x)?;
    let scatter = ScatterElements { axis: 0, update: Update::Replace };
    let y = node.emit_part("scattered", scatter, &[zeros, flat_places, flat])?;
    node.shaped("", shape, y)
}

/// (Σ |x|^p)^(1/p) over windows: the sum is an average that counts all taps, times their number.
pub(super) fn lp_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    let p = exponent(node)?;
    let since_18 = node.opset() >= 18;
    let kind = PoolKind::Average { count_include_pad: true };
    let mut pool = pool_of(node, x, kind, (since_18, since_18))?;
    let spatial = node.shape(x)[2..].to_vec();
    let positions = pool.window.output(&spatial, pool.ceil_mode)?;
    // A last window that runs over the end counts all its taps where what it runs over is padding.
    pool.ceil_mode = false;
    for (d, n) in positions.into_iter().enumerate() {
        let last = n.saturating_sub(1).saturating_mul(pool.window.strides[d]);
        let end = last.saturating_add(pool.window.span(d));
        pool.window.pads_end[d] = end.saturating_sub(spatial[d].saturating_add(pool.window.pads_begin[d]));
    }
    let taps = pool.window.taps();
    norm_by(node, x, p, |node, powers| {
        let mean = node.emit_part("mean", pool, &[powers])?;
        let taps = node.number("taps", taps as f64, node.ty(mean).dtype)?;
        node.mul("sum", mean, taps)
    })
}

pub(super) fn global_lp_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    let p = exponent(node)?;
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let axes = (2..spatial.len() + 2).collect();
    norm_by(node, x, p, |node, powers| node.reduced("sum", ReduceKind::Sum, axes, powers))
}

/// The attribute p.
fn exponent(node: &mut Node<'_, '_>) -> Result<i64, NodeError> {
    match node.int("p", 2)? {
        p if p >= 1 => Ok(p),
        p => Err(NodeError::attribute("p", format!("is {p}, not at least 1"))),
    }
}

/// sum(|x|^p)^(1/p), for a sum of the caller's.
fn norm_by<'a, 'm>(
    node: &mut Node<'a, 'm>,
    x: ValueId,
    p: i64,
    sum: impl FnOnce(&mut Node<'a, 'm>, ValueId) -> Result<ValueId, NodeError>,
) -> Result<ValueId, NodeError> {
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let x = node.widened("wide", x)?;
    let dtype = node.ty(x).dtype;
    let powers = match p {
        2 => node.mul("powers", x, x)?,
        _ => node.unary("magnitudes", UnaryKind::Abs, x)?,
    };
    let powers = match p {
        1 | 2 => powers,
        _ => {
            let p = node.number("p", p as f64, dtype)?;
            node.binary("powers", BinaryKind::Pow, powers, p)?
        }
    };
    let total = sum(node, powers)?;
    let part = if dtype == own { "" } else { "norm" };
    let norm = match p {
        1 => total,
        2 => node.unary(part, UnaryKind::Sqrt, total)?,
        _ => {
            let root = node.number("root", 1.0 / p as f64, dtype)?;
            node.binary(part, BinaryKind::Pow, total, root)?
        }
    };
    node.cast_to("", own, norm)
}

pub(super) fn global_max_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    global(node, x, PoolKind::Max)
}

pub(super) fn global_average_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    global(node, x, PoolKind::Average { count_include_pad: false })
}

/// A pool over all of the spatial dimensions of this value.
pub(super) fn global(node: &mut Node<'_, '_>, x: ValueId, kind: PoolKind) -> Result<ValueId, NodeError> {
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let window = Window::new(spatial);
    node.emit(Pool { kind, window, ceil_mode: false, layout: Layout::ChannelsFirst }, &[x])
}
