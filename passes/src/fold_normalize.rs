//! Means and deviations of pixels become part of the first convolution, so that it reads the picture as it is.
//!
//! With x = (p − mean)/std for a pixel p of channel c and u = p − z for a common z, a convolution is
//! Σ w·x = Σ (w/std)·u + Σ (w/std)·(z − mean): other weights and another bias. Where it is padded, x = 0 is u = mean − z:
//! its border becomes a constant, joined to the image. On the grid of the pixels (scale 1, zero point z) that constant is
//! the mean rounded to a whole pixel, so that results at the border are exact only for whole means.
//!
//! Nothing is folded where the pixels are codes as they are: see [`pixel_range`].

use crate::{
    Context, Pass, PassError, Range, Record,
    affine::{Affine, fold_into_consumer},
    capability::int8_capability,
    edit::{add_f32, conv_behind, f32_constant},
    insert_fake_quant::grid_of,
};
use qcc_ir::{
    Graph, NodeId, Op, ValueId, numerics,
    ops::{Concat, Conv, Normalize, Window},
};

/// See the module.
pub(crate) const FOLD_NORMALIZE: Pass = Pass { name: "fold_normalize", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(Op::Normalize(op)) = graph.op(node).cloned() else { continue };
        let name = graph.node(node).name.clone();
        if pixel_range(&op).is_some() {
            record.declined(&name, "on its grid, pixels are codes as they are");
            continue;
        }
        if ctx.options.keep_normalize {
            record.declined(&name, "it is to be kept");
            continue;
        }
        match target(graph, ctx, node, &op) {
            // On a copy: a fold that turns out to overflow leaves the graph as it was.
            Ok(conv) => {
                let mut folded = graph.clone();
                match fold(&mut folded, node, &op, &conv)? {
                    Ok(text) => {
                        *graph = folded;
                        record.applied(&name, text);
                    }
                    Err(why) => record.declined(&name, why),
                }
            }
            Err(why) => record.declined(&name, format!("normalises when the model runs: {why}")),
        }
    }
    Ok(())
}

/// The range of a normalised image, where on the grid over it the code of each pixel, in every channel, is the pixel:
/// then quantizing a normalised image gives the image back.
pub(crate) fn pixel_range(op: &Normalize) -> Option<Range> {
    let ends = (0..op.mean.len()).map(|c| Range { min: op.apply(0, c), max: op.apply(255, c) });
    let range = ends.reduce(Range::union)?;
    let grid = grid_of(range).ok()?;
    pixels_are_codes(op, (grid.scale, grid.zero_point)).then_some(range)
}

/// Whether each pixel, normalised and quantized to a u8 grid of this scale and zero point, is its own code.
pub(crate) fn pixels_are_codes(op: &Normalize, (scale, zero_point): (f32, i32)) -> bool {
    let code = |p: u8, c| numerics::quantize(op.apply(p, c), scale, zero_point, 0, 255);
    (0..op.mean.len()).all(|c| (0..=255).all(|p: u8| code(p, c) == i32::from(p)))
}

/// The convolution that takes the normalised image, and can be rewritten to take pixels.
struct Target {
    node: NodeId,
    conv: Conv,
}

fn target(graph: &Graph, ctx: &Context<'_>, node: NodeId, op: &Normalize) -> Result<Target, String> {
    let conv = conv_behind(graph, node.out(), op.axis)?;
    let name = &graph.node(conv).name;
    if ctx.options.keeps_float(graph, conv) {
        return Err(format!("`{name}` is pinned to a device of floats"));
    }
    int8_capability(graph, conv).map_err(|why| format!("`{name}` stays float: {why}"))?;
    let Some(Op::Conv(op_conv)) = graph.op(conv) else {
        return Err(format!("`{name}` is no convolution"));
    };
    let on_grid = |mean: &f32| (0.0..=255.0).contains(&mean.round());
    if !op_conv.window.is_unpadded() && !op.mean.iter().all(on_grid) {
        return Err(format!("the padding of `{name}` stands for the mean, which is no pixel"));
    }
    let bytes = border_bytes(graph, conv, op_conv);
    if bytes > ctx.options.fold_limit {
        return Err(format!(
            "the border of `{name}` would be {bytes} bytes, above {}",
            ctx.options.fold_limit
        ));
    }
    Ok(Target { node: conv, conv: op_conv.clone() })
}

/// Size of the constants that the padding of a convolution would become.
fn border_bytes(graph: &Graph, node: NodeId, conv: &Conv) -> usize {
    let shape = graph.shape(graph.operand(node, 0));
    let channel = conv.layout.channel_axis(shape.rank());
    let mut extents = shape.to_vec();
    for (i, axis) in (1..shape.rank()).filter(|&d| d != channel).enumerate() {
        let pads = conv.window.pads_begin[i].saturating_add(conv.window.pads_end[i]);
        extents[axis] = extents[axis].saturating_add(pads);
    }
    let bordered = extents.iter().fold(4usize, |n, &d| n.saturating_mul(d));
    bordered.saturating_sub(4 * shape.elements())
}

/// Rewrites image and convolution, or says why not; the graph is then to be thrown away.
fn fold(
    graph: &mut Graph,
    node: NodeId,
    op: &Normalize,
    target: &Target,
) -> Result<Result<String, String>, PassError> {
    let name = graph.node(target.node).name.clone();
    let channels = op.mean.len();
    let centre = (op.mean.iter().sum::<f32>() / channels as f32).round().clamp(0.0, 255.0);
    let error = border_error(graph, target, op);
    let pixels = graph.operand(node, 0);
    let centred = Normalize { axis: op.axis, mean: vec![centre; channels], std: vec![1.0; channels] };
    graph.rewrite(node, centred, &[pixels])?;
    let border: Vec<f32> = op.mean.iter().map(|m| m - centre).collect();
    let image = with_border(graph, target, &border)?;
    let mut operands = graph.operands(target.node);
    operands[0] = image;
    let window = Window {
        pads_begin: vec![0; target.conv.window.rank()],
        pads_end: vec![0; target.conv.window.rank()],
        ..target.conv.window.clone()
    };
    graph.rewrite(target.node, Conv { window, ..target.conv.clone() }, &operands)?;
    let each = op.mean.iter().zip(&op.std).map(|(&m, &s)| (f64::from(m), f64::from(s)));
    let affine = Affine {
        axis: Some(target.conv.layout.channel_axis(graph.shape(image).rank())),
        factor: each.clone().map(|(_, std)| 1.0 / std).collect(),
        shift: each.map(|(mean, std)| (f64::from(centre) - mean) / std).collect(),
    };
    let folded = fold_into_consumer(graph, image, &affine)?;
    Ok(folded.map(|_| match error {
        None => format!("folded into `{name}`"),
        Some(0.0) => format!("folded into `{name}`, whose border holds the means"),
        Some(e) => format!(
            "folded into `{name}`, whose border holds the means rounded to whole pixels: that moves a result there by at \
             most {e:.2e}"
        ),
    }))
}

/// How far a result can be from exact where all its window but nothing of the image is in the border, whose pixels are
/// means rounded: max over output channels of Σ |w|/std·|round(mean) − mean|. `None` without a border.
fn border_error(graph: &Graph, target: &Target, op: &Normalize) -> Option<f64> {
    if target.conv.window.is_unpadded() {
        return None;
    }
    let weights = graph.operand(target.node, 1);
    let shape = graph.shape(weights);
    let taps: usize = shape[2..].iter().product();
    let filter = shape[1] * taps;
    let per_group = shape[0] / target.conv.groups;
    let error = |o: usize, w: &[f32]| -> f64 {
        let first = o / per_group * shape[1];
        let off =
            |c: usize| f64::from((op.mean[first + c].round() - op.mean[first + c]).abs() / op.std[first + c]);
        w.iter().enumerate().map(|(i, w)| f64::from(w.abs()) * off(i / taps)).sum()
    };
    let filters = f32_constant(graph, weights)?.chunks_exact(filter).enumerate();
    Some(filters.map(|(o, w)| error(o, w)).fold(0.0, f64::max))
}

/// The convolution's input with the border that its window has, of one value a channel.
fn with_border(graph: &mut Graph, target: &Target, border: &[f32]) -> Result<ValueId, PassError> {
    let mut image = graph.operand(target.node, 0);
    let name = graph.node(target.node).name.clone();
    let window = &target.conv.window;
    let rank = graph.shape(image).rank();
    let channel = target.conv.layout.channel_axis(rank);
    let spatial = (1..rank).filter(|&d| d != channel);
    // The last axis first: its pieces are the smallest, and what follows moves whole rows.
    for (i, axis) in spatial.enumerate().collect::<Vec<_>>().into_iter().rev() {
        let piece = |graph: &mut Graph, length: usize| -> Result<Option<ValueId>, PassError> {
            if length == 0 {
                return Ok(None);
            }
            let mut dims = graph.shape(image).to_vec();
            dims[axis] = length;
            let stride: usize = dims[channel + 1..].iter().product();
            let elements = (0..dims.iter().product()).map(|i: usize| border[i / stride % border.len()]);
            Ok(Some(add_f32(graph, &format!("{name}_border"), &dims, elements.collect())?))
        };
        let before = piece(graph, window.pads_begin[i])?;
        let after = piece(graph, window.pads_end[i])?;
        let parts: Vec<ValueId> = before.into_iter().chain([image]).chain(after).collect();
        if parts.len() > 1 {
            image = graph.add(&format!("{name}_bordered"), Concat { axis }, &parts)?.out();
        }
    }
    Ok(image)
}
