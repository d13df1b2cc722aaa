//! Convolutions.

use super::window::{kernel_shape, window};
use crate::{
    OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Clamp, Conv, Layout, Window},
};

pub(super) fn conv(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let bias = node.optional(2);
    convolution(node, x, w, bias)
}

/// The float convolution of these values, by the node's attributes.
pub(super) fn convolution(
    node: &mut Node<'_, '_>,
    x: ValueId,
    w: ValueId,
    bias: Option<ValueId>,
) -> Result<ValueId, NodeError> {
    let (window, groups) = window_and_groups(node, x, w)?;
    let conv = Conv {
        window,
        groups,
        layout: Layout::ChannelsFirst,
        bias: bias.is_some(),
        residual: false,
        clamp: Clamp::NONE,
    };
    let operands: Vec<ValueId> = [x, w].into_iter().chain(bias).collect();
    node.emit(conv, &operands)
}

/// The attributes of a convolution of x, channels first, by w.
pub(super) fn window_and_groups(
    node: &mut Node<'_, '_>,
    x: ValueId,
    w: ValueId,
) -> Result<(Window, usize), NodeError> {
    let (_, _, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let weights = node.shape(w);
    if weights.rank() != spatial.len() + 2 {
        let (w, x) = (node.ty(w), node.ty(x));
        return Err(OpError::shape(format!("weights {w} do not have the rank of the input {x}")).into());
    }
    let kernel = weights[2..].to_vec();
    if let Some(declared) = kernel_shape(node)?.filter(|k| *k != kernel) {
        let why = format!("is {declared:?}, but the weights are {}", node.ty(w));
        return Err(NodeError::attribute("kernel_shape", why));
    }
    let window = window(node, kernel, &spatial, true)?;
    let groups = node.int("group", 1)?;
    let groups = usize::try_from(groups)
        .ok()
        .filter(|&g| g > 0)
        .ok_or_else(|| NodeError::attribute("group", format!("is {groups}")))?;
    Ok((window, groups))
}
