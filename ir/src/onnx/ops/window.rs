//! Attributes that convolutions and pools share.

use super::lengths;
use crate::{
    OpError,
    onnx::{NodeError, import::Node},
    ops::Window,
};

/// Reads strides, dilations, pads and auto_pad for a kernel of these extents over these spatial dimensions.
pub(super) fn window(
    node: &mut Node<'_, '_>,
    kernel: Vec<usize>,
    spatial: &[usize],
    has_dilations: bool,
) -> Result<Window, NodeError> {
    let n = spatial.len();
    if kernel.len() != n {
        return Err(OpError::attribute(format!("kernel {kernel:?} over {n} spatial dimensions")).into());
    }
    let strides = list(node, "strides", n, 1)?;
    let dilations = if has_dilations { list(node, "dilations", n, 1)? } else { vec![1; n] };
    let pads = list(node, "pads", 2 * n, 0)?;
    let auto_pad = node.string("auto_pad", "NOTSET")?;
    let window = Window::new(kernel).strides(strides).dilations(dilations);
    let is_padded = pads.iter().any(|&p| p != 0);
    let upper = match auto_pad {
        "NOTSET" => return Ok(window.pads(&pads[..n], &pads[n..])),
        _ if is_padded => {
            return Err(NodeError::attribute("auto_pad", "stands beside pads, which it would override"));
        }
        "VALID" => return Ok(window),
        "SAME_UPPER" => true,
        "SAME_LOWER" => false,
        other => return Err(NodeError::attribute("auto_pad", format!("is {other:?}, which does not exist"))),
    };
    // With the kernel within the padding, every check of extents is done before they are used here.
    window.clone().pads(spatial, spatial).output(spatial, false).or_else(|e| match e {
        OpError::Shape(_) => Ok(vec![]),
        e => Err(e),
    })?;
    let (mut begin, mut end) = (vec![0; n], vec![0; n]);
    for d in 0..n {
        let outputs = spatial[d].div_ceil(window.strides[d]);
        let needed = outputs.saturating_sub(1) * window.strides[d] + window.span(d);
        let total = needed.saturating_sub(spatial[d]);
        (begin[d], end[d]) =
            if upper { (total / 2, total.div_ceil(2)) } else { (total.div_ceil(2), total / 2) };
    }
    Ok(window.pads(begin, end))
}

/// A list of `n` lengths that are `default` where the attribute is absent.
pub(super) fn list(
    node: &mut Node<'_, '_>,
    name: &'static str,
    n: usize,
    default: usize,
) -> Result<Vec<usize>, NodeError> {
    let Some(values) = node.ints(name)? else { return Ok(vec![default; n]) };
    if values.len() != n {
        return Err(NodeError::attribute(name, format!("has {} entries where {n} are needed", values.len())));
    }
    lengths(name, &values)
}

/// The kernel_shape attribute.
pub(super) fn kernel_shape(node: &mut Node<'_, '_>) -> Result<Option<Vec<usize>>, NodeError> {
    node.ints("kernel_shape")?.map(|k| lengths("kernel_shape", &k)).transpose()
}
