//! Pools.

use super::window::{kernel_shape, window};
use crate::{
    ValueId,
    onnx::{NodeError, import::Node},
    ops::{Layout, Pool, PoolKind, Window},
};

pub(super) fn max_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    // The order of the indices, which are not supported as a result.
    node.ignore(&["storage_order"]);
    let has_dilations = node.opset() >= 10;
    let x = node.operand(0, "X")?;
    pool(node, x, PoolKind::Max, has_dilations)
}

pub(super) fn average_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    average_of(node, x)
}

/// The average pool of this value, by the node's attributes.
pub(super) fn average_of(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId, NodeError> {
    let count_include_pad = node.flag("count_include_pad", false)?;
    let has_dilations = node.opset() >= 19;
    pool(node, x, PoolKind::Average { count_include_pad }, has_dilations)
}

fn pool(
    node: &mut Node<'_, '_>,
    x: ValueId,
    kind: PoolKind,
    has_dilations: bool,
) -> Result<ValueId, NodeError> {
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let kernel = kernel_shape(node)?.ok_or_else(|| NodeError::attribute("kernel_shape", "is missing"))?;
    let ceil_mode = node.opset() >= 10 && node.flag("ceil_mode", false)?;
    let window = window(node, kernel, &spatial, has_dilations)?;
    node.emit(Pool { kind, window, ceil_mode, layout: Layout::ChannelsFirst }, &[x])
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
