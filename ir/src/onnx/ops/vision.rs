//! Ops of vision: regions, deformed convolutions, images from their columns, and grids of places.

use super::{
    compose::Result,
    lengths, matmul,
    window::{kernel_shape, list},
};
use crate::{
    DType, OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{GridSample, MaxRoiPool, RoiAlign, SampleMode, SamplePadding, ScatterElements, SliceSpec, Update},
};

/// Before opset 16 the centre of the first element is at 0.
pub(super) fn roi_align(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, rois) = (node.operand(0, "X")?, node.operand(1, "rois")?);
    let images = node.operand(2, "batch_indices")?;
    let half_pixel = match node.opset() {
        ..16 => false,
        _ => match node.string("coordinate_transformation_mode", "half_pixel")? {
            "half_pixel" => true,
            "output_half_pixel" => false,
            other => {
                return Err(NodeError::attribute("coordinate_transformation_mode", format!("is {other:?}")));
            }
        },
    };
    let largest = match node.string("mode", "avg")? {
        "avg" => false,
        "max" => true,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    let samples = lengths("sampling_ratio", &[node.int("sampling_ratio", 0)?])?[0];
    let op = RoiAlign {
        height: node.count("output_height")?.unwrap_or(1),
        width: node.count("output_width")?.unwrap_or(1),
        samples,
        scale: node.float("spatial_scale", 1.0)?,
        half_pixel,
        largest,
    };
    let own = node.ty(x).dtype;
    let (x, rois) = (node.widened("wide", x)?, node.widened("wide_rois", rois)?);
    let images = node.cast_to("images", DType::S64, images)?;
    let y = node.step(if node.ty(x).dtype == own { "" } else { "bins" }, op, &[x, rois, images])?;
    node.cast_to("", own, y)
}

pub(super) fn max_roi_pool(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, rois) = (node.operand(0, "X")?, node.operand(1, "rois")?);
    let bins = node.ints("pooled_shape")?.unwrap_or_default();
    let [height, width] = lengths("pooled_shape", &bins)?[..] else {
        return Err(NodeError::attribute("pooled_shape", format!("is {bins:?}, not a height and a width")));
    };
    let op = MaxRoiPool { height, width, scale: node.float("spatial_scale", 1.0)? };
    let own = node.ty(x).dtype;
    let (x, rois) = (node.widened("wide", x)?, node.widened("wide_rois", rois)?);
    let y = node.step(if node.ty(x).dtype == own { "" } else { "bins" }, op, &[x, rois])?;
    node.cast_to("", own, y)
}

/// A convolution whose taps are moved by offsets: samples of the image, as columns, by a product with the weights.
pub(super) fn deform_conv(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let offset = node.operand(2, "offset")?;
    let (bias, mask) = (node.optional(3), node.optional(4));
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let (x, w) = (node.widened("wide", x)?, node.widened("wide_W", w)?);
    let offset = node.widened("wide_offset", offset)?;
    let (x_shape, w_shape, o_shape) = (node.shape(x), node.shape(w), node.shape(offset));
    let (&[batch, channels, ..], &[outputs, per_group, kh, kw], &[_, _, oh, ow]) =
        (x_shape.dims(), w_shape.dims(), o_shape.dims())
    else {
        let why = format!("takes images, got {}, {} and {}", node.ty(x), node.ty(w), node.ty(offset));
        return Err(OpError::unsupported(why).into());
    };
    if let Some(declared) = kernel_shape(node)?.filter(|k| *k != [kh, kw]) {
        return Err(NodeError::attribute("kernel_shape", format!("is {declared:?}, of {}", node.ty(w))));
    }
    let groups = node.count("group")?.unwrap_or(1);
    let offset_groups = node.count("offset_group")?.unwrap_or(1);
    let taps = kh * kw;
    let fits = x_shape.rank() == 4
        && per_group.checked_mul(groups) == Some(channels)
        && outputs.is_multiple_of(groups)
        && channels.is_multiple_of(offset_groups)
        && o_shape[0] == batch
        && offset_groups.checked_mul(2 * taps) == Some(o_shape[1]);
    if !fits {
        let why = format!("image {}, weights {} and offsets {}", node.ty(x), node.ty(w), node.ty(offset));
        return Err(OpError::shape(why).into());
    }
    let strides = list(node, "strides", 2, 1)?;
    let dilations = list(node, "dilations", 2, 1)?;
    let pads = list(node, "pads", 4, 0)?;
    // Images of one group of channels each, and the places of their samples: rows are taps and results.
    let images = batch * offset_groups;
    let apart = node.shaped("groups", [images, channels / offset_groups, x_shape[2], x_shape[3]], x)?;
    let offsets = node.shaped("offsets", [images, taps, 2, oh, ow], offset)?;
    let mut places = Vec::new();
    for (d, part) in ["rows", "columns"].into_iter().enumerate() {
        let spec = SliceSpec { start: d, len: 1, step: 1 };
        let moved = node.sliced(&format!("{part}_offset"), 2, spec, offsets)?;
        let moved = node.shaped(&format!("{part}_moved"), [images, taps, oh, ow], moved)?;
        let (extent, kernel) = (x_shape[2 + d], [kh, kw]);
        let base = |tap: usize, y: usize, x: usize| {
            let at = if d == 0 { tap / kernel[1] } else { tap % kernel[1] };
            let out = if d == 0 { y } else { x };
            // Attributes may be of any size.
            out as f64 * strides[d] as f64 + at as f64 * dilations[d] as f64 - pads[d] as f64
        };
        let at = |i: usize| base(i / (oh * ow), i / ow % oh, i % ow);
        let (dtype, shape) = (node.ty(moved).dtype, Shape::new([1, taps, oh, ow])?);
        let base = node.numbers(&format!("{part}_base"), dtype, shape, at)?;
        let at = node.add(&format!("{part}_at"), moved, base)?;
        // (2·place + 1)/extent − 1: −1 to 1 from edge to edge.
        let factor = node.number(&format!("{part}_factor"), 2.0 / extent.max(1) as f64, dtype)?;
        let shift = node.number(&format!("{part}_shift"), 1.0 / extent.max(1) as f64 - 1.0, dtype)?;
        let at = node.mul(&format!("{part}_scaled"), at, factor)?;
        let at = node.add(&format!("{part}_grid"), at, shift)?;
        places.push(node.shaped(&format!("{part}_apart"), [images, taps * oh, ow, 1], at)?);
    }
    let grid = node.joined("grid", 3, &[places[1], places[0]])?;
    let op = GridSample { mode: SampleMode::Linear, padding: SamplePadding::Zeros, align_corners: false };
    let mut columns = node.emit_part("samples", op, &[apart, grid])?;
    if let Some(mask) = mask {
        let mask = node.widened("wide_mask", mask)?;
        let mask = node.shaped("mask", [images, 1, taps * oh, ow], mask)?;
        columns = node.mul("masked", columns, mask)?;
    }
    let columns = node.shaped("columns_matrix", [batch, groups, per_group * taps, oh * ow], columns)?;
    let w = node.shaped("weights", [1, groups, outputs / groups, per_group * taps], w)?;
    let y = matmul::product_of(node, "product", w, columns)?;
    let mut y = node.shaped("results", [batch, outputs, oh, ow], y)?;
    if let Some(bias) = bias {
        let bias = node.widened("wide_bias", bias)?;
        let bias = node.shaped("bias", [outputs, 1, 1], bias)?;
        y = node.add("biased", y, bias)?;
    }
    node.cast_to("", own, y)
}

/// The blocks of an image, summed where they overlap: added at their places in the padded image, of which the pads are then
/// left out.
pub(super) fn col2im(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let dims = |node: &mut Node<'_, '_>, slot: usize, role: &'static str| {
        let given = node.known_ints(slot, role)?.ok_or(NodeError::MissingOperand { slot, role })?;
        lengths(role, &given)
    };
    let (image, block) = (dims(node, 1, "image_shape")?, dims(node, 2, "block_shape")?);
    let n = image.len();
    let (strides, dilations) = (list(node, "strides", n, 1)?, list(node, "dilations", n, 1)?);
    let pads = list(node, "pads", 2 * n, 0)?;
    let misfit = |node: &Node<'_, '_>| {
        let why = format!("blocks {block:?} of an image {image:?} in {}", node.ty(x));
        NodeError::from(OpError::shape(why))
    };
    let &[batch, rows, count] = node.shape(x).dims() else { return Err(misfit(node)) };
    let taps = Shape::new(block.clone())?.elements();
    if block.len() != n || taps == 0 || !rows.is_multiple_of(taps) {
        return Err(misfit(node));
    }
    let mut padded = Vec::new();
    let mut blocks = Vec::new();
    for d in 0..n {
        let whole = image[d].saturating_add(pads[d]).saturating_add(pads[n + d]);
        let span = (block[d] - 1).saturating_mul(dilations[d]).saturating_add(1);
        if strides[d] == 0 || whole < span {
            return Err(misfit(node));
        }
        padded.push(whole);
        blocks.push((whole - span) / strides[d] + 1);
    }
    let area = Shape::new(padded.clone())?;
    if Shape::new(blocks.clone())?.elements() != count {
        return Err(misfit(node));
    }
    let indices = Shape::new([1, taps, count])?;
    let ty = TensorType::new(DType::S64, indices.clone());
    let indices = node.computed("places", &ty, || {
        let (steps, own) = (area.strides(), (block_places(&block), block_places(&blocks)));
        let at = |tap: &[usize], b: &[usize]| -> i64 {
            let axis = |d: usize| (b[d] * strides[d] + tap[d] * dilations[d]) * steps[d];
            (0..n).map(axis).sum::<usize>() as i64
        };
        let all = own.0.iter().flat_map(|tap| own.1.iter().map(|b| at(tap, b))).collect();
        Ok(Tensor::from_vec(indices, all)?)
    })?;
    let images = batch * (rows / taps);
    let indices = node.expanded("all_places", [images, taps, count], indices)?;
    let indices = node.shaped("flat_places", [images, taps * count], indices)?;
    let flat = node.shaped("flat", [images, taps * count], x)?;
    let dtype = node.ty(x).dtype;
    let zero = node.constant_part("zero", Tensor::zeros(dtype, Shape::scalar()));
    let zeros = node.expanded("zeros", [images, area.elements()], zero)?;
    let op = ScatterElements { axis: 1, update: Update::Add };
    let sums = node.emit_part("sums", op, &[zeros, indices, flat])?;
    let mut y = node.shaped("padded", [&[batch, rows / taps], &padded[..]].concat(), sums)?;
    for d in 0..n {
        let kept = SliceSpec { start: pads[d], len: image[d], step: 1 };
        y = node.sliced(&format!("cut{d}"), 2 + d, kept, y)?;
    }
    Ok(y)
}

/// All tuples of indices below these extents, the last one fastest.
fn block_places(extents: &[usize]) -> Vec<Vec<usize>> {
    extents.iter().fold(vec![Vec::new()], |all, &n| {
        all.iter().flat_map(|head| (0..n).map(move |i| [&head[..], &[i]].concat())).collect()
    })
}

/// The places that an affine map takes those of a grid to, as [`grid_sample`](super::resize::grid_sample) reads them.
pub(super) fn affine_grid(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let theta = node.operand(0, "theta")?;
    node.check_float("theta", theta)?;
    let size = node.known_ints(1, "size")?.ok_or(NodeError::MissingOperand { slot: 1, role: "size" })?;
    let size = lengths("size", &size)?;
    let align = node.flag("align_corners", false)?;
    let n = size.len().saturating_sub(2);
    let (own, wide) = (node.ty(theta).dtype, node.widened("wide", theta)?);
    if !matches!(n, 2 | 3) || node.shape(theta).dims() != [size[0], n, n + 1] {
        let why = format!("a size {size:?} for maps {}", node.ty(theta));
        return Err(OpError::shape(why).into());
    }
    let extents = &size[2..];
    let at = |i: usize, extent: usize| match align {
        true if extent > 1 => 2.0 * i as f64 / (extent - 1) as f64 - 1.0,
        true => -1.0,
        false => (2.0 * i as f64 + 1.0) / extent as f64 - 1.0,
    };
    let places = Shape::new(extents)?.elements();
    let base = Shape::new([1, places, n + 1])?;
    let dtype = node.ty(wide).dtype;
    // The last dimension comes first in a place, and 1 behind all.
    let steps = Shape::new(extents)?.strides();
    let coordinate = |i: usize| {
        let (place, axis) = (i / (n + 1), i % (n + 1));
        let axis = (n - 1).checked_sub(axis);
        axis.map_or(1.0, |axis| at(place / steps[axis] % extents[axis], extents[axis]))
    };
    let base = node.numbers("base", dtype, base, coordinate)?;
    let maps = node.permuted("maps", [0, 2, 1], wide)?;
    let grid = matmul::product_of(node, "places", base, maps)?;
    let grid =
        node.shaped(if dtype == own { "" } else { "grid" }, [&[size[0]], extents, &[n]].concat(), grid)?;
    node.cast_to("", own, grid)
}
