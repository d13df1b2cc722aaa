//! Resize and Upsample: interpolation of one axis after the other.

use super::reduce::axes;
use crate::{
    DType, OpError, Shape, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Cast, Coordinates, GridSample, Interpolation, Nearest, Resample, SampleMode, SamplePadding},
};

/// How one axis changes.
#[derive(Clone, Copy)]
struct Change {
    axis: usize,
    length: usize,
    scale: f64,
}

/// Upsample, before opset 10: scales are an attribute before opset 9 and an operand from then on.
pub(super) fn upsample(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    let scales = match node.opset() {
        0..7 => vec![1.0, 1.0, node.float("height_scale", 1.0)?, node.float("width_scale", 1.0)?],
        7..9 => node.floats("scales")?.ok_or_else(|| NodeError::attribute("scales", "is missing"))?,
        _ => floats(node, 1, "scales")?.ok_or(NodeError::MissingOperand { slot: 1, role: "scales" })?,
    };
    let interpolation = before_opset_11(node)?;
    let changes = by_scales(&node.shape(x), &all_axes(&node.shape(x)), &scales)?;
    chain(node, x, &changes, interpolation, false, |_| Coordinates::Asymmetric)
}

/// Resize: operands X and scales in opset 10; X, roi, scales, sizes from 11 on.
pub(super) fn resize(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    let shape = node.shape(x);
    if node.opset() < 11 {
        let scales = floats(node, 1, "scales")?;
        let scales = scales.ok_or(NodeError::MissingOperand { slot: 1, role: "scales" })?;
        let interpolation = before_opset_11(node)?;
        let changes = by_scales(&shape, &all_axes(&shape), &scales)?;
        return chain(node, x, &changes, interpolation, false, |_| Coordinates::Asymmetric);
    }
    let chosen = match node.ints("axes")? {
        Some(given) if node.opset() >= 18 => {
            axes("axes", &shape, &given)?;
            // In the order given, which is that of sizes and scales.
            given.iter().filter_map(|&a| shape.axis(a)).collect()
        }
        Some(_) => return Err(NodeError::attribute("axes", "exists from opset 18 on")),
        None => all_axes(&shape),
    };
    // An empty tensor stands for an operand that is left out.
    let scales = floats(node, 2, "scales")?.filter(|s| !s.is_empty());
    let sizes = node.known_ints(3, "sizes")?.filter(|s| !s.is_empty());
    let policy = match node.opset() {
        18.. => node.string("keep_aspect_ratio_policy", "stretch")?,
        _ => "stretch",
    };
    let changes = match (scales, sizes) {
        (Some(scales), None) => by_scales(&shape, &chosen, &scales)?,
        (None, Some(sizes)) => by_sizes(&shape, &chosen, &sizes, policy)?,
        (None, None) => return Err(NodeError::MissingOperand { slot: 2, role: "scales or sizes" }),
        (Some(_), Some(_)) => {
            return Err(OpError::attribute("both scales and sizes are given").into());
        }
    };
    let interpolation = interpolation(node)?;
    let exclude_outside = node.flag("exclude_outside", false)?;
    let coordinates = coordinates(node, &chosen)?;
    chain(node, x, &changes, |_| interpolation, exclude_outside, coordinates)
}

fn all_axes(shape: &Shape) -> Vec<usize> {
    (0..shape.rank()).collect()
}

/// A known operand of floats, if it is there.
fn floats(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<Option<Vec<f32>>, NodeError> {
    let Some(t) = node.known(slot, role)? else { return Ok(None) };
    let values = match t.dtype() {
        DType::F32 => t.as_slice::<f32>().map(<[f32]>::to_vec),
        DType::F64 => t.as_slice::<f64>().map(|s| s.iter().map(|&x| x as f32).collect()),
        DType::F16 => t.as_slice::<half::f16>().map(|s| s.iter().map(|x| x.to_f32()).collect()),
        _ => return Err(OpError::dtype(format!("{role} must be floats, got {}", t.ty())).into()),
    };
    Ok(Some(values.map_err(OpError::from)?))
}

fn count_fits(role: &str, given: usize, axes: usize) -> Result<(), NodeError> {
    match given == axes {
        true => Ok(()),
        false => Err(OpError::shape(format!("{given} {role} for {axes} axes")).into()),
    }
}

/// Lengths are rounded down.
fn by_scales(shape: &Shape, axes: &[usize], scales: &[f32]) -> Result<Vec<Change>, NodeError> {
    count_fits("scales", scales.len(), axes.len())?;
    let change = |(&axis, &scale): (&usize, &f32)| {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(OpError::attribute(format!("scale {scale} is not a finite number above 0")).into());
        }
        // Saturates; the op refuses what is too long.
        let length = (shape[axis] as f64 * f64::from(scale)).floor() as usize;
        Ok(Change { axis, length, scale: scale.into() })
    };
    axes.iter().zip(scales).map(change).collect()
}

fn by_sizes(shape: &Shape, axes: &[usize], sizes: &[i64], policy: &str) -> Result<Vec<Change>, NodeError> {
    count_fits("sizes", sizes.len(), axes.len())?;
    let lengths = super::lengths("sizes", sizes)?;
    let ratio = |axis: usize, length: usize| length as f64 / (shape[axis] as f64).max(1.0);
    let ratios = axes.iter().zip(&lengths).map(|(&a, &l)| ratio(a, l));
    let common = match policy {
        "stretch" => None,
        "not_larger" => Some(ratios.fold(f64::INFINITY, f64::min)),
        "not_smaller" => Some(ratios.fold(0.0, f64::max)),
        other => return Err(NodeError::attribute("keep_aspect_ratio_policy", format!("is `{other}`"))),
    };
    let change = |(&axis, &length): (&usize, &usize)| match common {
        None => Change { axis, length, scale: ratio(axis, length) },
        Some(scale) => {
            // Halves up.
            let length = (shape[axis] as f64 * scale + 0.5).floor() as usize;
            Change { axis, length, scale }
        }
    };
    Ok(axes.iter().zip(&lengths).map(change).collect())
}

/// Nearest, or linear, by the scale of an axis. Nearest is rounded down, and up along axes that shrink.
fn before_opset_11(node: &mut Node<'_, '_>) -> Result<impl Fn(f64) -> Interpolation + use<>, NodeError> {
    let is_nearest = match node.string("mode", "nearest")? {
        "nearest" => true,
        "linear" | "bilinear" | "trilinear" => false,
        other => return Err(NodeError::attribute("mode", format!("is `{other}`, not nearest or linear"))),
    };
    Ok(move |scale: f64| match is_nearest {
        true => Interpolation::Nearest(if scale < 1.0 { Nearest::Ceil } else { Nearest::Floor }),
        false => Interpolation::Linear { antialias: false },
    })
}

fn interpolation(node: &mut Node<'_, '_>) -> Result<Interpolation, NodeError> {
    let antialias = node.opset() >= 18 && node.flag("antialias", false)?;
    let a = node.float("cubic_coeff_a", -0.75)?;
    let nearest = match node.string("nearest_mode", "round_prefer_floor")? {
        "round_prefer_floor" => Nearest::PreferFloor,
        "round_prefer_ceil" => Nearest::PreferCeil,
        "floor" => Nearest::Floor,
        "ceil" => Nearest::Ceil,
        other => return Err(NodeError::attribute("nearest_mode", format!("is `{other}`"))),
    };
    match node.string("mode", "nearest")? {
        "nearest" => Ok(Interpolation::Nearest(nearest)),
        "linear" => Ok(Interpolation::Linear { antialias }),
        "cubic" => Ok(Interpolation::Cubic { a, antialias }),
        other => Err(NodeError::attribute("mode", format!("is `{other}`, not nearest, linear or cubic"))),
    }
}

/// The coordinates of each axis; with a region of interest they differ.
fn coordinates(
    node: &mut Node<'_, '_>,
    axes: &[usize],
) -> Result<impl Fn(usize) -> Coordinates + use<>, NodeError> {
    let outside = node.float("extrapolation_value", 0.0)?;
    let same = match node.string("coordinate_transformation_mode", "half_pixel")? {
        "half_pixel" => Some(Coordinates::HalfPixel),
        "half_pixel_symmetric" => Some(Coordinates::HalfPixelSymmetric),
        "pytorch_half_pixel" => Some(Coordinates::PytorchHalfPixel),
        "align_corners" => Some(Coordinates::AlignCorners),
        "asymmetric" => Some(Coordinates::Asymmetric),
        "tf_half_pixel_for_nn" => Some(Coordinates::TfHalfPixelForNn),
        "tf_crop_and_resize" => None,
        other => return Err(NodeError::attribute("coordinate_transformation_mode", format!("is `{other}`"))),
    };
    // Only one mode reads the region; elsewhere the operand may be there, and be anything.
    node.optional(1);
    let mut regions = Vec::new();
    if same.is_none() {
        let roi = floats(node, 1, "roi")?.ok_or(NodeError::MissingOperand { slot: 1, role: "roi" })?;
        count_fits("bounds in roi", roi.len(), 2 * axes.len())?;
        let (starts, ends) = roi.split_at(axes.len());
        regions = axes.iter().zip(starts.iter().zip(ends)).map(|(&a, (&s, &e))| (a, s, e)).collect();
    }
    Ok(move |axis: usize| match (same, regions.iter().find(|r| r.0 == axis)) {
        (Some(same), _) => same,
        (None, Some(&(_, start, end))) => Coordinates::TfCropAndResize { start, end, outside },
        (None, None) => Coordinates::HalfPixel,
    })
}

/// One op for each axis that changes: those that shrink most come first, as the others then have less to do.
fn chain(
    node: &mut Node<'_, '_>,
    x: ValueId,
    changes: &[Change],
    interpolation: impl Fn(f64) -> Interpolation,
    exclude_outside: bool,
    coordinates: impl Fn(usize) -> Coordinates,
) -> Result<ValueId, NodeError> {
    let shape = node.shape(x);
    let mut ops: Vec<Resample> = changes
        .iter()
        .map(|&Change { axis, length, scale }| {
            let interpolation = interpolation(scale);
            let coordinates = coordinates(axis);
            Resample { axis, length, scale, interpolation, coordinates, exclude_outside }
        })
        .filter(|op| {
            let cropped = matches!(op.coordinates, Coordinates::TfCropAndResize { start, end, .. }
                if (start, end) != (0.0, 1.0));
            op.length != shape[op.axis] || op.scale != 1.0 || cropped
        })
        .collect();
    ops.sort_by(|a, b| a.scale.total_cmp(&b.scale));
    let Some(last) = ops.pop() else { return Ok(x) };
    let dtype = node.ty(x).dtype;
    let converts = !last.is_pick() && dtype != DType::F32;
    let mut value = match converts {
        true => node.emit_part("as_f32", Cast { to: DType::F32 }, &[x])?,
        false => x,
    };
    for op in ops {
        value = node.emit_part(&format!("axis{}", op.axis), op, &[value])?;
    }
    match converts {
        true => {
            let part = format!("axis{}", last.axis);
            let y = node.emit_part(&part, last, &[value])?;
            node.emit(Cast { to: dtype }, &[y])
        }
        false => node.emit(last, &[value]),
    }
}

/// Opset 20 renamed the modes and allows any number of dimensions.
pub(super) fn grid_sample(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, grid) = (node.operand(0, "X")?, node.operand(1, "grid")?);
    let default = if node.opset() >= 20 { "linear" } else { "bilinear" };
    let mode = match node.string("mode", default)? {
        "nearest" => SampleMode::Nearest,
        "linear" | "bilinear" => SampleMode::Linear,
        "cubic" | "bicubic" => SampleMode::Cubic,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    let padding = match node.string("padding_mode", "zeros")? {
        "zeros" => SamplePadding::Zeros,
        "border" => SamplePadding::Border,
        "reflection" => SamplePadding::Reflection,
        other => return Err(NodeError::attribute("padding_mode", format!("is {other:?}"))),
    };
    let align_corners = node.flag("align_corners", false)?;
    // Places may be given in other floats than the elements are.
    let own = node.ty(x).dtype;
    let places = node.ty(grid).dtype;
    let op = GridSample { mode, padding, align_corners };
    if own == places {
        return node.emit(op, &[x, grid]);
    }
    let wide = if [own, places].contains(&DType::F64) { DType::F64 } else { DType::F32 };
    let x = node.cast_to("wide", wide, x)?;
    let grid = node.cast_to("wide_grid", wide, grid)?;
    let y = node.step(if own == wide { "" } else { "samples" }, op, &[x, grid])?;
    node.cast_to("", own, y)
}
