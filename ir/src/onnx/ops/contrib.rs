//! Ops that ONNX Runtime adds beside those of transformers.

use super::{
    compose::Result,
    conv_transpose, lengths, shape,
    signal::{self, Transform},
    values,
};
use crate::{
    DType, OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, body::NodeDef, import::Node},
    ops::{
        BinaryKind, GatherNd, GridSample, Inverse, ReduceKind, SampleMode, SamplePadding, SliceSpec,
        UnaryKind,
    },
};

pub(super) fn inverse(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.emit(Inverse {}, &[x])
}

/// A dimension of length 1 put in.
pub(super) fn expand_dims(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let mut dims = node.shape(x).to_vec();
    let ones = Shape::new(vec![1; dims.len().saturating_add(1)])?;
    let axis = shape::known_axis(node, 1, &ones)?;
    dims.insert(axis, 1);
    node.shaped("", dims, x)
}

/// Windows of `size` elements along an axis, `step` apart; the elements of a window are a new last dimension.
pub(super) fn unfold_tensor(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    let axis = node.axis_of("dim", -1, x)?;
    let step = node.count("step")?.unwrap_or(1);
    let size = super::contrib_attention::required_count(node, "size")?;
    let shape = node.shape(x);
    let Some(last) = shape[axis].checked_sub(size) else {
        return Err(NodeError::attribute("size", format!("is {size}, for axis {axis} of {}", node.ty(x))));
    };
    let count = last / step + 1;
    let indices = Shape::new([count, size])?;
    let ty = TensorType::new(DType::S64, indices.clone());
    let indices = node.computed("indices", &ty, || {
        let at = |w: usize| (0..size).map(move |i| (w * step + i) as i64);
        Ok(Tensor::from_vec(indices, (0..count).flat_map(at).collect())?)
    })?;
    let windows = node.gathered("windows", axis, x, indices)?;
    let rank = node.shape(windows).rank();
    let perm: Vec<usize> = (0..rank).filter(|&d| d != axis + 1).chain([axis + 1]).collect();
    node.permuted("", perm, windows)
}

/// Fails unless the transform is of one dimension, and one-sided.
fn check_transform(node: &mut Node<'_, '_>) -> Result<()> {
    let dimensions = node.int("signal_ndim", 1)?;
    if dimensions != 1 || !node.flag("onesided", true)? || node.flag("normalized", false)? {
        return Err(OpError::unsupported("transforms one dimension, one-sided, not normalised").into());
    }
    Ok(())
}

/// The spectrum of a real signal along the last axis: real and imaginary parts in a new last dimension.
pub(super) fn rfft(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    check_transform(node)?;
    let shape = node.shape(x);
    let (length, lead) = match shape.split_last() {
        Some((&length, lead)) if length > 0 => (length, lead.to_vec()),
        _ => return Err(OpError::shape(format!("a transform of nothing: {}", node.ty(x))).into()),
    };
    let transform = Transform { length, inverse: false, half: true };
    signal::transformed(node, x, &transform, (length, 1), [&lead[..], &[length / 2 + 1, 2]].concat())
}

/// The real signal that has this spectrum.
pub(super) fn irfft(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    check_transform(node)?;
    let shape = node.shape(x);
    let &[ref lead @ .., bins, 2] = shape.dims() else {
        return Err(OpError::shape(format!("takes real and imaginary parts, got {}", node.ty(x))).into());
    };
    let length = bins.saturating_sub(1).saturating_mul(2);
    if length == 0 {
        return Err(OpError::shape(format!("a transform of nothing: {}", node.ty(x))).into());
    }
    let transform = Transform { length, inverse: true, half: true };
    signal::transformed(node, x, &transform, (bins, 2), [lead, &[length]].concat())
}

/// The distances of each row of A from each row of B, Euclidean or their squares.
pub(super) fn cdist(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let rooted = match node.string("metric", "sqeuclidean")? {
        "sqeuclidean" => false,
        "euclidean" => true,
        other => return Err(NodeError::attribute("metric", format!("is {other:?}"))),
    };
    let (&[m, n], &[k, of_b]) = (node.shape(a).dims(), node.shape(b).dims()) else {
        return Err(OpError::shape(format!("takes matrices, got {} and {}", node.ty(a), node.ty(b))).into());
    };
    if n != of_b {
        let why = format!("{} and {} have rows of different lengths", node.ty(a), node.ty(b));
        return Err(OpError::shape(why).into());
    }
    let (a, b) = (node.shaped("A_rows", [m, 1, n], a)?, node.shaped("B_rows", [1, k, n], b)?);
    let difference = node.sub("difference", a, b)?;
    let squares = node.mul("squares", difference, difference)?;
    let sum = node.reduced("sum", ReduceKind::Sum, vec![2], squares)?;
    let sum = node.shaped(if rooted { "distances_squared" } else { "" }, [m, k], sum)?;
    if rooted { node.unary("", UnaryKind::Sqrt, sum) } else { Ok(sum) }
}

/// A transposed convolution whose pads are an operand.
pub(super) fn conv_transpose_with_dynamic_pads(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let pads = node.known_ints(2, "Pads")?.map(|pads| lengths("Pads", &pads)).transpose()?;
    let bias = node.optional(3);
    conv_transpose::conv_transpose_of(node, x, w, bias, pads)
}

/// The different elements in the order in which they come, which one each element is, and how often each comes.
pub(super) fn unique(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let found = values::unique_of(node, false, true)?;
    let [values, _, inverse, counts] = found[..] else { return Ok(found) };
    Ok(vec![values, inverse, counts])
}

/// A number for each pair of query and key by their distance, which falls into buckets: each distance its own up to half of
/// them, the others by its logarithm up to `max_distance`. The table has a row for each head.
pub(super) fn relative_position_bias(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let table = node.operand(0, "bias_table")?;
    let queries = node.required(1, "query_length")?;
    let keys = node.required(2, "key_length")?;
    let farthest = super::contrib_attention::required_count(node, "max_distance")?;
    let both_ways = node.flag("is_bidirectional", false)?;
    let length = |t: &Tensor, name: &str| match t.to_i64().as_deref() {
        Some(&[n]) => Ok(lengths(name, &[n])?[0]),
        _ => Err(NodeError::from(OpError::shape(format!("{name} must be one number, got {}", t.ty())))),
    };
    let (rows, columns) = (length(&queries, "query_length")?, length(&keys, "key_length")?);
    let &[buckets, heads] = node.shape(table).dims() else {
        return Err(OpError::shape(format!("takes buckets and heads, got {}", node.ty(table))).into());
    };
    let buckets = Buckets { all: buckets, farthest, both_ways };
    let indices = Shape::new([rows, columns])?;
    let ty = TensorType::new(DType::S64, indices.clone());
    let indices = node.computed("buckets", &ty, || {
        let of = |q: usize| (0..columns).map(move |k| buckets.of(k as i64 - q as i64));
        Ok(Tensor::from_vec(indices, (0..rows).flat_map(of).collect())?)
    })?;
    let table = node.shaped("heads", [heads, buckets.all], table)?;
    let bias = node.gathered("bias", 1, table, indices)?;
    node.shaped("", [1, heads, rows, columns], bias)
}

/// How distances fall into buckets.
#[derive(Clone, Copy)]
struct Buckets {
    all: usize,
    farthest: usize,
    both_ways: bool,
}

impl Buckets {
    fn of(&self, distance: i64) -> i64 {
        let mut count = self.all as i64;
        let (mut first, back) = (0, if self.both_ways { distance.abs() } else { -distance.min(0) });
        if self.both_ways {
            count /= 2;
            first = if distance > 0 { count } else { 0 };
        }
        let exact = count / 2;
        if back < exact || exact == 0 {
            return (first + back).clamp(0, (self.all as i64 - 1).max(0));
        }
        let (far, near) = (self.farthest as f32, exact as f32);
        let by_size = (back as f32 / near).ln() / (far / near).ln() * (count - exact) as f32;
        first + (exact + by_size as i64).clamp(0, count - 1)
    }
}

/// Parts of images in another size. A region is y and x of its first, y and x of its last row and column, from 0 to 1.
pub(super) fn crop_and_resize(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, rois) = (node.operand(0, "X")?, node.operand(1, "rois")?);
    let images = node.operand(2, "batch_indices")?;
    let size =
        node.known_ints(3, "crop_size")?.ok_or(NodeError::MissingOperand { slot: 3, role: "crop_size" })?;
    let outside = node.float("extrapolation_value", 0.0)?;
    let interpolates = match node.string("mode", "bilinear")? {
        "bilinear" => true,
        "nearest" => false,
        other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
    };
    let size = lengths("crop_size", &size)?;
    let (&[_, _, _, _], &[count, 4], &[of], &[height, width]) =
        (node.shape(x).dims(), node.shape(rois).dims(), node.shape(images).dims(), &size[..])
    else {
        let why =
            format!("takes images, regions and a size, got {}, {} and {size:?}", node.ty(x), node.ty(rois));
        return Err(OpError::shape(why).into());
    };
    if of != count {
        let why = format!("{count} regions, and images of {of}");
        return Err(OpError::shape(why).into());
    }
    let dtype = node.ty(x).dtype;
    let images = node.gathered("images", 0, x, images)?;
    let rows = along(node, "rows", rois, [0, 2], [count, height, 1], dtype)?;
    let columns = along(node, "columns", rois, [1, 3], [count, 1, width], dtype)?;
    let axes = [(rows, "rows"), (columns, "columns")];
    let sampled = match interpolates {
        true => {
            let [y, x] = axes.map(|(x, part)| {
                let x = node.expanded(&format!("{part}_all"), [count, height, width], x)?;
                node.shaped(&format!("{part}_apart"), [count, height, width, 1], x)
            });
            let grid = node.joined("grid", 3, &[x?, y?])?;
            let op =
                GridSample { mode: SampleMode::Linear, padding: SamplePadding::Border, align_corners: true };
            node.emit_part("samples", op, &[images, grid])?
        }
        false => nearest(node, images, axes, [count, height, width])?,
    };
    let is_inside = |node: &mut Node<'_, '_>, part: &str, x| -> Result<ValueId> {
        let one = node.number(&format!("{part}_one"), 1.0, dtype)?;
        let size = node.unary(&format!("{part}_size"), UnaryKind::Abs, x)?;
        node.binary(&format!("{part}_inside"), BinaryKind::LessOrEqual, size, one)
    };
    let (rows, columns) = (is_inside(node, "rows", rows)?, is_inside(node, "columns", columns)?);
    let inside = node.binary("inside", BinaryKind::And, rows, columns)?;
    let inside = node.shaped("inside_of_channels", [count, 1, height, width], inside)?;
    let outside = node.number("outside", outside.into(), dtype)?;
    node.chosen("", inside, sampled, outside)
}

/// The elements of images at the whole numbers next to places; halves go up.
fn nearest(
    node: &mut Node<'_, '_>,
    images: ValueId,
    axes: [(ValueId, &str); 2],
    dims: [usize; 3],
) -> Result<ValueId> {
    let (shape, dtype) = (node.shape(images), node.ty(images).dtype);
    let (channels, area) = (shape[1], shape[2] * shape[3]);
    let mut flat = None;
    for ((x, part), extent) in axes.into_iter().zip(&shape[2..]) {
        let half = node.number(&format!("{part}_half"), (*extent as f64 - 1.0) / 2.0, dtype)?;
        let from_middle = node.mul(&format!("{part}_from_middle"), x, half)?;
        let middle = node.number(&format!("{part}_middle"), *extent as f64 / 2.0, dtype)?;
        let above = node.add(&format!("{part}_above"), from_middle, middle)?;
        let place = node.unary(&format!("{part}_place"), UnaryKind::Floor, above)?;
        let clip = UnaryKind::Clip { lo: 0.0, hi: (extent.saturating_sub(1)) as f32 };
        let place = node.unary(&format!("{part}_within"), clip, place)?;
        let place = node.cast_to(&format!("{part}_index"), DType::S64, place)?;
        flat = Some(match flat {
            None => place,
            Some(rows) => {
                let width = node.constant_part("width", Tensor::scalar(*extent as i64));
                let rows = node.mul("row_starts", rows, width)?;
                node.add("places", rows, place)?
            }
        });
    }
    let Some(places) = flat else { return Ok(images) };
    let places = node.shaped("tuples", [dims[0], dims[1] * dims[2], 1], places)?;
    let pixels = node.shaped("channels", [dims[0], channels, area], images)?;
    let pixels = node.permuted("pixels", [0, 2, 1], pixels)?;
    let picked = node.emit_part("picked", GatherNd { batch_dims: 1 }, &[pixels, places])?;
    let picked = node.permuted("channels_first", [0, 2, 1], picked)?;
    node.shaped("samples", [dims[0], channels, dims[1], dims[2]], picked)
}

/// Places from the first to the last of each region, −1 to 1 over the image; their middle where there is only one.
fn along(
    node: &mut Node<'_, '_>,
    part: &str,
    rois: ValueId,
    bounds: [usize; 2],
    dims: [usize; 3],
    dtype: DType,
) -> Result<ValueId> {
    let mut ends = Vec::new();
    for (i, at) in bounds.into_iter().enumerate() {
        let spec = SliceSpec { start: at, len: 1, step: 1 };
        let bound = node.sliced(&format!("{part}_bound{i}"), 1, spec, rois)?;
        let bound = node.shaped(&format!("{part}_end{i}"), [dims[0], 1, 1], bound)?;
        ends.push(node.cast_to(&format!("{part}_end{i}_float"), dtype, bound)?);
    }
    let count = dims[1].max(dims[2]);
    // The share of the last bound.
    let share = |i: usize| if count > 1 { i as f64 / (count - 1) as f64 } else { 0.5 };
    let shares = Shape::new([1, dims[1], dims[2]])?;
    let shares = node.numbers(&format!("{part}_shares"), dtype, shares, share)?;
    let span = node.sub(&format!("{part}_span"), ends[1], ends[0])?;
    let offset = node.mul(&format!("{part}_offset"), span, shares)?;
    let at = node.add(&format!("{part}_at"), ends[0], offset)?;
    let two = node.number(&format!("{part}_two"), 2.0, dtype)?;
    let one = node.number(&format!("{part}_less"), 1.0, dtype)?;
    let twice = node.mul(&format!("{part}_twice"), at, two)?;
    node.sub(part, twice, one)
}

/// The cheapest way through a matrix of costs, from its first to its last element by steps down, right or both: rows and
/// columns of its elements. The costs must be known.
pub(super) fn dynamic_time_warping(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let costs = node.required(0, "input")?;
    let (rows, columns) = match *costs.shape().dims() {
        [rows, columns] | [1, rows, columns] if rows > 0 && columns > 0 => (rows, columns),
        _ => return Err(OpError::shape(format!("takes a matrix of costs, got {}", costs.ty())).into()),
    };
    let costs = costs.as_slice::<f32>().map_err(OpError::from)?;
    let scratch = TensorType::new(DType::F64, Shape::new([rows + 1, columns + 1])?);
    scratch.check_size()?;
    let path = cheapest_path(costs, rows, columns);
    let shape = Shape::new([2, path.len()])?;
    let ty = TensorType::new(DType::S32, shape.clone());
    node.computed("path", &ty, || {
        let (ys, xs) = (path.iter().map(|p| p.0 as i32), path.iter().map(|p| p.1 as i32));
        Ok(Tensor::from_vec(shape, ys.chain(xs).collect())?)
    })
}

/// Elements of the cheapest path, the first one first; of equal ways the one by both steps, then the one down.
fn cheapest_path(costs: &[f32], rows: usize, columns: usize) -> Vec<(usize, usize)> {
    let width = columns + 1;
    let mut sums = vec![f32::INFINITY; (rows + 1) * width];
    // Which way an element was reached: 0 by both steps, 1 down, 2 right.
    let mut ways = vec![0u8; (rows + 1) * width];
    sums[0] = 0.0;
    for (i, j) in (1..=rows).flat_map(|i| (1..=columns).map(move |j| (i, j))) {
        let [both, down, right] =
            [sums[(i - 1) * width + j - 1], sums[(i - 1) * width + j], sums[i * width + j - 1]];
        let (least, way) = match (both, down, right) {
            _ if both < down && both < right => (both, 0),
            _ if down < both && down < right => (down, 1),
            _ => (right, 2),
        };
        sums[i * width + j] = costs[(i - 1) * columns + j - 1] + least;
        ways[i * width + j] = way;
    }
    let mut path = Vec::new();
    let (mut i, mut j) = (rows, columns);
    while i > 0 || j > 0 {
        path.push((i.saturating_sub(1), j.saturating_sub(1)));
        match if i == 0 {
            2
        } else if j == 0 {
            1
        } else {
            ways[i * width + j]
        } {
            0 => (i, j) = (i - 1, j - 1),
            1 => i -= 1,
            _ => j -= 1,
        }
    }
    path.reverse();
    path
}

/// Ops that run a model of their own until it ends.
pub(super) fn generation(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "generates text by running the decoder in its attributes: export the decoder by itself, and let the caller choose tokens";
    Err(OpError::unsupported(why).into())
}

/// Sequences without padding.
pub(super) fn packed(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "takes sequences packed without padding, as GPUs do: export the model without the option to pack them";
    Err(OpError::unsupported(why).into())
}

/// The same number again: what shows how an op is registered.
pub(super) fn sample(node: &mut Node<'_, '_>) -> Result<ValueId> {
    node.operand(0, "X")
}

/// Weights in the order in which one kernel reads them.
pub(super) fn one_kernels_layout(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "has weights packed as one kernel of ONNX Runtime reads them: quantize the model to MatMulNBits instead";
    Err(OpError::unsupported(why).into())
}

/// Attention over blocks that a table names.
pub(super) fn sparse_attention(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why =
        "writes its caches in place and skips blocks of keys: export the model with GroupQueryAttention";
    Err(OpError::unsupported(why).into())
}

/// A recurrence with attention in each step.
pub(super) fn attention_lstm(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "is a recurrence with attention in each step, for which there is no kernel: write it out as a Scan of its parts";
    Err(OpError::unsupported(why).into())
}

/// A matrix that is not dense.
pub(super) fn sparse_product(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "takes a sparse tensor, which is no value of a graph here: make it dense, and use MatMul";
    Err(OpError::unsupported(why).into())
}
