//! The model takes pixels as images hold them, u8 and channels last, instead of normalised floats: normalising becomes
//! its first op, with the order of channels and axes behind it.
//!
//! What remains of that op is for later passes: on a grid that fits, the pixels are the codes (`lower_to_int8`), and
//! otherwise means and deviations go into the first convolution (`fold_normalize`).

use crate::{
    Context, Pass, PassError, Record,
    edit::{conv_behind, f32_constant},
};
use qcc_ir::{
    DType, Graph, Kind, NodeId, Op, OpError, Shape, Tensor, TensorType, ValueId,
    ops::{Normalize, Reshape, Slice, SliceSpec, Transpose},
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const TAKE_PIXELS: Pass = Pass { name: "take_pixels", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let Some(image) = &ctx.options.image_input else { return Ok(()) };
    let input = match graph.inputs() {
        &[input] => input,
        inputs => {
            let names: Vec<&str> = inputs.iter().map(|&i| graph.node(i).name.as_str()).collect();
            return Err(PassError::ImageInput {
                input: names.join("`, `"),
                reason: format!("a model that takes pixels has one input, this one has {}", names.len()),
            });
        }
    };
    let name = graph.node(input).name.clone();
    let refuse = |reason: String| PassError::ImageInput { input: name.clone(), reason };
    let place = Place::of(graph.ty(input.out())).map_err(refuse)?;
    let (mean, std) = (place.each(&image.mean, 0.0), place.each(&image.std, 1.0));
    let (Some(mut mean), Some(mut std)) = (mean, std) else {
        let counts = format!("{} means and {} deviations", image.mean.len(), image.std.len());
        return Err(refuse(format!(
            "{counts} for {} channels; give one for all, or one each",
            place.channels
        )));
    };
    let is_reversed = image.bgr && place.channels > 1;
    if is_reversed {
        // They are given in the model's order; pixels come in the image's.
        mean.reverse();
        std.reverse();
    }
    let in_weights = match is_reversed {
        true => reverse_weights(graph, input, place.axis)?,
        false => false,
    };
    let mut new = Graph::new(graph.name.clone());
    let shape = Shape::new(place.pixels.clone()).map_err(|e| refuse(e.to_string()))?;
    let pixels = new.input(&name, TensorType::new(DType::U8, shape))?;
    let normalize = Normalize { axis: place.pixels.len() - 1, mean, std };
    let mut value = new.add(&format!("{name}_normalized"), normalize, &[pixels])?.out();
    if is_reversed && !in_weights {
        let mut axes: Vec<SliceSpec> = place.pixels.iter().map(|&d| SliceSpec::all(d)).collect();
        let last = axes.len() - 1;
        axes[last] = SliceSpec { start: place.channels - 1, len: place.channels, step: -1 };
        value = new.add(&format!("{name}_reversed"), Slice { axes }, &[value])?.out();
    }
    value = place.restore(&mut new, &name, value)?;
    append(graph, &mut new, (input.out(), value))?;
    *graph = new;
    let order = match (is_reversed, in_weights) {
        (false, _) => "",
        (true, true) => ", channels reversed in the weights",
        (true, false) => ", channels reversed",
    };
    record.applied(&name, format!("takes pixels, {}{order}", graph.ty(pixels)));
    Ok(())
}

/// Where the channels of an image input are, and the shape of its pixels.
struct Place {
    channels: usize,
    /// The model's channel axis; `None` where grey images have none.
    axis: Option<usize>,
    /// `[N, H, W, C]`.
    pixels: Vec<usize>,
    /// The shape that the model takes.
    shape: Shape,
}

impl Place {
    fn of(ty: &TensorType) -> Result<Place, String> {
        let (axis, pixels) = match *ty.shape.dims() {
            [n, c @ (1 | 3), h, w] => (Some(1), [n, h, w, c]),
            [n, h, w, c @ (1 | 3)] => (Some(3), [n, h, w, c]),
            [n, h, w] => (None, [n, h, w, 1]),
            _ => (None, [0; 4]),
        };
        if ty.dtype != DType::F32 || pixels.contains(&0) {
            return Err(format!(
                "{ty} is no image: that is f32[NxCxHxW], [NxHxWxC] or [NxHxW] with 1 or 3 channels"
            ));
        }
        Ok(Place { channels: pixels[3], axis, pixels: pixels.to_vec(), shape: ty.shape.clone() })
    }

    /// One number for each channel, from one for all, one each, or none.
    fn each(&self, given: &[f32], default: f32) -> Option<Vec<f32>> {
        match given {
            [] => Some(vec![default; self.channels]),
            [one] => Some(vec![*one; self.channels]),
            many => (many.len() == self.channels).then(|| many.to_vec()),
        }
    }

    /// The value in the shape and order that the model takes.
    fn restore(&self, graph: &mut Graph, name: &str, value: ValueId) -> Result<ValueId, PassError> {
        let op: Op = match self.axis {
            Some(3) => return Ok(value),
            Some(_) => Transpose { perm: vec![0, 3, 1, 2] }.into(),
            None => Reshape { shape: self.shape.clone() }.into(),
        };
        Ok(graph.add(&format!("{name}_as_trained"), op, &[value])?.out())
    }
}

/// Reverses the input channels of the one convolution that takes the input, if there is one with constant weights.
fn reverse_weights(graph: &mut Graph, input: NodeId, axis: Option<usize>) -> Result<bool, PassError> {
    let Some(Ok(conv)) = axis.map(|axis| conv_behind(graph, input.out(), axis)) else { return Ok(false) };
    let weights = graph.operand(conv, 1);
    let shape = graph.shape(weights).clone();
    let has_all_channels = matches!(graph.op(conv), Some(Op::Conv(c)) if c.groups == 1);
    let (Some(old), true) = (f32_constant(graph, weights), has_all_channels) else { return Ok(false) };
    let taps: usize = shape[2..].iter().product();
    let filter = shape[1] * taps;
    let reversed: Vec<f32> = (0..old.len())
        .map(|i| {
            let (c, tap) = (i % filter / taps, i % taps);
            old[i / filter * filter + (shape[1] - 1 - c) * taps + tap]
        })
        .collect();
    let name = graph.node(weights.node).name.clone();
    let fail = |e: OpError| PassError::op(&name, "constant", e);
    let tensor = Tensor::from_vec(shape, reversed).map_err(|e| fail(e.into()))?;
    let reversed = graph.constant(&format!("{name}_reversed"), tensor);
    graph.set_operand(conv, 1, reversed)?;
    Ok(true)
}

/// Adds all of a graph but its input to another one, where `input` has a value already.
fn append(graph: &Graph, new: &mut Graph, input: (ValueId, ValueId)) -> Result<(), PassError> {
    let mut values = BTreeMap::from([input]);
    for node in graph.order() {
        let n = graph.node(node);
        let added = match n.kind() {
            Kind::Input => continue,
            Kind::Constant(tensor) => {
                new.quantized_constant(&n.name, tensor.clone(), graph.ty(node.out()).clone())?.node
            }
            Kind::Op(op) => {
                let operands: Vec<ValueId> = graph.operands(node).iter().map(|v| values[v]).collect();
                new.add(&n.name, op.clone(), &operands)?
            }
        };
        for port in 0..n.outputs().len() as u16 {
            values.insert(node.port(port), added.port(port));
        }
    }
    for output in graph.outputs() {
        new.output(output.name.clone(), values[&output.value]);
    }
    Ok(())
}
