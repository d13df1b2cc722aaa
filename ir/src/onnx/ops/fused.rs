//! Ops that ONNX Runtime's optimiser writes in place of several of ONNX's: put together again from what they stand for.

use super::{compose::Result, contrib_attention::required_count, conv, elementwise, matmul, norm};
use crate::{
    DType, OpError, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{ReduceKind, SliceSpec, UnaryKind},
};

/// A convolution, what is added to it, and an activation.
pub(super) fn conv(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let (bias, added) = (node.optional(2), node.optional(3));
    fused_conv(node, x, w, bias, added)
}

fn fused_conv(
    node: &mut Node<'_, '_>,
    x: ValueId,
    w: ValueId,
    bias: Option<ValueId>,
    added: Option<ValueId>,
) -> Result<ValueId> {
    let mut y = conv::convolution(node, x, w, bias)?;
    if let Some(added) = added {
        y = node.add("sum", y, added)?;
    }
    let parameters = node.floats("activation_params")?.unwrap_or_default();
    activation(node, y, &parameters)
}

/// The same of channels last.
pub(super) fn nhwc_conv(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let (bias, added) = (node.optional(2), node.optional(3));
    let x = channels_first(node, "X_first", x)?;
    let added = added.map(|z| channels_first(node, "Z_first", z)).transpose()?;
    let y = fused_conv(node, x, w, bias, added)?;
    channels_last(node, "channels_last", y)
}

/// `[batch, …, channels]` as `[batch, channels, …]`.
pub(super) fn channels_first(node: &mut Node<'_, '_>, part: &str, x: ValueId) -> Result<ValueId> {
    let rank = node.shape(x).rank();
    if rank < 3 {
        return Err(OpError::shape(format!("takes batch, extents and channels, got {}", node.ty(x))).into());
    }
    let perm: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    node.permuted(part, perm, x)
}

/// The other way round.
pub(super) fn channels_last(node: &mut Node<'_, '_>, part: &str, x: ValueId) -> Result<ValueId> {
    let rank = node.shape(x).rank();
    let perm: Vec<usize> = [0].into_iter().chain(2..rank).chain([1]).collect();
    node.permuted(part, perm, x)
}

/// The attribute `activation`, which has these parameters.
fn activation(node: &mut Node<'_, '_>, y: ValueId, parameters: &[f32]) -> Result<ValueId> {
    let name = node.string("activation", "")?;
    let parameter = |i: usize, default: f32| parameters.get(i).copied().unwrap_or(default);
    let kind = match name {
        "" => return Ok(y),
        "Relu" => UnaryKind::Relu,
        "Tanh" => UnaryKind::Tanh,
        "Sigmoid" => UnaryKind::Sigmoid,
        "LeakyRelu" => UnaryKind::LeakyRelu { alpha: parameter(0, 0.01) },
        "Clip" => UnaryKind::Clip { lo: parameter(0, f32::NEG_INFINITY), hi: parameter(1, f32::INFINITY) },
        "HardSigmoid" => UnaryKind::HardSigmoid { alpha: parameter(0, 0.2), beta: parameter(1, 0.5) },
        other => return Err(NodeError::attribute("activation", format!("is {other:?}"))),
    };
    node.unary("activation", kind, y)
}

/// The parameters of an activation, each in an attribute of its own.
fn named_parameters(node: &mut Node<'_, '_>) -> Result<Vec<f32>> {
    node.ignore(&["activation_axis"]);
    let mut parameters = Vec::new();
    for name in ["activation_alpha", "activation_beta", "activation_gamma"] {
        match node.optional_float(name)? {
            Some(value) => parameters.push(value),
            None => break,
        }
    }
    Ok(parameters)
}

/// Gemm and an activation.
pub(super) fn gemm(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let y = matmul::gemm(node)?;
    let parameters = named_parameters(node)?;
    activation(node, y, &parameters)
}

/// GELU of a product and its bias, by tanh.
pub(super) fn gemm_fast_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let bias = node.optional(2);
    let mut y = node.product("product", x, w)?;
    if let Some(bias) = bias {
        y = node.add("biased", y, bias)?;
    }
    node.unary("", UnaryKind::GeluTanh, y)
}

/// alpha·A'·B', and an activation.
pub(super) fn matmul_activation(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let y = matmul(node)?;
    let parameters = named_parameters(node)?;
    activation(node, y, &parameters)
}

/// alpha·A'·B': of A and B the last two dimensions are exchanged where the attributes say so, and before that the first
/// dimension is brought to the last but one.
pub(super) fn matmul(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let [a_swapped, b_swapped] = [node.flag("transA", false)?, node.flag("transB", false)?];
    let [a_batched, b_batched] = [node.flag("transBatchA", false)?, node.flag("transBatchB", false)?];
    let alpha = node.float("alpha", 1.0)?;
    let a = arranged(node, "A_transposed", a, a_swapped, a_batched)?;
    let b = arranged(node, "B_transposed", b, b_swapped, b_batched)?;
    if alpha == 1.0 {
        return matmul::matmul_of(node, "", a, b);
    }
    let y = matmul::matmul_of(node, "product", a, b)?;
    let alpha = node.number("alpha", alpha.into(), node.ty(y).dtype)?;
    node.mul("", y, alpha)
}

fn arranged(node: &mut Node<'_, '_>, part: &str, x: ValueId, swaps: bool, batches: bool) -> Result<ValueId> {
    let rank = node.shape(x).rank();
    if !(swaps || batches) || rank < 2 {
        return Ok(x);
    }
    let mut perm: Vec<usize> = (0..rank).collect();
    if batches {
        perm[..rank - 1].rotate_left(1);
    }
    if swaps {
        perm.swap(rank - 1, rank - 2);
    }
    node.permuted(part, perm, x)
}

/// The function of x and a bias, where there is one.
fn biased(node: &mut Node<'_, '_>, kind: UnaryKind) -> Result<ValueId> {
    let x = node.operand(0, "A")?;
    let x = match node.optional(1) {
        None => x,
        Some(bias) => node.add("biased", x, bias)?,
    };
    node.unary("", kind, x)
}

pub(super) fn gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.unary("", UnaryKind::Gelu, x)
}

pub(super) fn bias_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    biased(node, UnaryKind::Gelu)
}

pub(super) fn fast_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    biased(node, UnaryKind::GeluTanh)
}

/// x·sigmoid(alpha·x).
pub(super) fn quick_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    node.check_float("X", x)?;
    let alpha = node.float("alpha", 1.702)?;
    let alpha = node.number("alpha", alpha.into(), node.ty(x).dtype)?;
    let scaled = node.mul("scaled", x, alpha)?;
    let gate = node.unary("gate", UnaryKind::Sigmoid, scaled)?;
    node.mul("", x, gate)
}

/// A layer normalisation of a sum, which is the fourth result.
pub(super) fn skip_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, skip) = (node.operand(0, "input")?, node.operand(1, "skip")?);
    let (gamma, beta, bias) = (node.operand(2, "gamma")?, node.optional(3), node.optional(4));
    let sum = skipped(node, x, skip, bias)?;
    let epsilon = node.float("epsilon", 1e-12)?;
    let normalised = norm::layer_of(node, sum, gamma, beta, epsilon)?;
    Ok(with_sum(normalised, sum))
}

/// The same without the mean and a shift.
pub(super) fn skip_simplified_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, skip) = (node.operand(0, "input")?, node.operand(1, "skip")?);
    let (gamma, bias) = (node.operand(2, "gamma")?, node.optional(3));
    let sum = skipped(node, x, skip, bias)?;
    let epsilon = node.float("epsilon", 1e-12)?;
    let y = norm::rms_of(node, sum, gamma, epsilon)?;
    Ok(with_sum(vec![y], sum))
}

fn skipped(node: &mut Node<'_, '_>, x: ValueId, skip: ValueId, bias: Option<ValueId>) -> Result<ValueId> {
    if (1..3).any(|port| node.wants(port)) {
        return Err(OpError::unsupported("gives out mean or deviation, as for training").into());
    }
    let sum = node.add("sum", x, skip)?;
    match bias {
        None => Ok(sum),
        Some(bias) => node.add("biased_sum", sum, bias),
    }
}

/// Results 0 and 3; those between them are not asked for.
fn with_sum(normalised: Vec<ValueId>, sum: ValueId) -> Vec<ValueId> {
    let y = normalised.first().copied().unwrap_or(sum);
    vec![y, y, y, sum]
}

/// (x + bias) in two halves: the first times GELU of the second.
pub(super) fn bias_split_gelu(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, bias) = (node.operand(0, "X")?, node.operand(1, "bias")?);
    let x = node.add("biased", x, bias)?;
    let shape = node.shape(x);
    let Some(axis) = shape.rank().checked_sub(1).filter(|&a| shape[a].is_multiple_of(2)) else {
        return Err(OpError::shape(format!("{} has no two halves", node.ty(x))).into());
    };
    let len = shape[axis] / 2;
    let left = node.sliced("left", axis, SliceSpec { start: 0, len, step: 1 }, x)?;
    let right = node.sliced("right", axis, SliceSpec { start: len, len, step: 1 }, x)?;
    let gate = node.unary("gate", UnaryKind::Gelu, right)?;
    node.mul("", left, gate)
}

/// x + bias + skip.
pub(super) fn bias_add(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, bias, skip) = (node.operand(0, "X")?, node.operand(1, "bias")?, node.operand(2, "skip")?);
    let x = node.add("biased", x, bias)?;
    node.add("", x, skip)
}

/// x + bias + residual, and a mask that keeps everything: as in inference.
pub(super) fn bias_dropout(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, bias) = (node.operand(0, "data")?, node.operand(1, "bias")?);
    let residual = node.optional(2);
    let mut y = node.add(if residual.is_some() { "biased" } else { "" }, x, bias)?;
    if let Some(residual) = residual {
        y = node.add("", y, residual)?;
    }
    elementwise::kept(node, y, 3)
}

/// Softmax of x + bias, over all dimensions from `axis` on.
pub(super) fn bias_softmax(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, bias) = (node.operand(0, "data")?, node.operand(1, "bias")?);
    node.ignore(&["is_inner_broadcast"]);
    let axis = node.axis_of("axis", 1, x)?;
    let (x_shape, bias_shape) = (node.shape(x), node.shape(bias));
    if x_shape.broadcast(&bias_shape).as_ref() != Some(&x_shape) {
        return Err(OpError::shape(format!("bias {} of {}", node.ty(bias), node.ty(x))).into());
    }
    let sum = node.add("sum", x, bias)?;
    let rows = [x_shape[..axis].iter().product(), x_shape[axis..].iter().product::<usize>()];
    let rows = node.shaped("rows", rows, sum)?;
    let y = node.softmax_along("softmax", 1, rows)?;
    node.shaped("", x_shape, y)
}

/// Group normalisation of channels last, or first, and SiLU where the attribute asks for it.
pub(super) fn group_norm(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, gamma, beta) = (node.operand(0, "X")?, node.operand(1, "gamma")?, node.operand(2, "beta")?);
    grouped(node, x, gamma, beta)
}

/// The same of a sum, which is the second result.
pub(super) fn skip_group_norm(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, gamma, beta) = (node.operand(0, "X")?, node.operand(1, "gamma")?, node.operand(2, "beta")?);
    let mut skip = node.operand(3, "skip")?;
    let bias = node.optional(4);
    let shape = node.shape(skip);
    if let [batch, channels] = *shape.dims() {
        skip = node.shaped("skip_of_images", [batch, 1, 1, channels], skip)?;
    }
    let mut sum = node.add("sum", x, skip)?;
    if let Some(bias) = bias {
        sum = node.add("biased_sum", sum, bias)?;
    }
    Ok(vec![grouped(node, sum, gamma, beta)?, sum])
}

fn grouped(node: &mut Node<'_, '_>, x: ValueId, gamma: ValueId, beta: ValueId) -> Result<ValueId> {
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let is_last = node.flag("channels_last", true)?;
    let activates = node.flag("activation", false)?;
    let groups = required_count(node, "groups")?;
    let epsilon = node.float("epsilon", 1e-5)?;
    let wide = node.widened("wide", x)?;
    let first = if is_last { channels_first(node, "X_first", wide)? } else { wide };
    let (gamma, beta) = (node.widened("wide_gamma", gamma)?, node.widened("wide_beta", beta)?);
    let mut y = norm::group_of(node, first, gamma, beta, groups, epsilon)?;
    if activates {
        y = node.unary("activation", UnaryKind::Silu, y)?;
    }
    let y = if is_last { channels_last(node, "channels_last", y)? } else { y };
    node.cast_to("", own, y)
}

/// A table of numbers, or of codes with their scale and zero point.
#[derive(Clone, Copy)]
struct Table {
    values: ValueId,
    grid: Option<[ValueId; 2]>,
}

impl Table {
    /// Some of its elements as numbers.
    fn numbers(self, node: &mut Node<'_, '_>, part: &str, values: ValueId) -> Result<ValueId> {
        let Some([scale, zero]) = self.grid else { return Ok(values) };
        if node.ty(zero).dtype != node.ty(values).dtype {
            let why = format!("zero point {} of {}", node.ty(zero), node.ty(values));
            return Err(OpError::quant(why).into());
        }
        let zero = node.shaped(&format!("{part}_zero"), [], zero)?;
        let zero = node.cast_to(&format!("{part}_zero_float"), DType::F32, zero)?;
        let scale = node.shaped(&format!("{part}_scale"), [], scale)?;
        let steps = node.cast_to(&format!("{part}_steps"), DType::F32, values)?;
        let centred = node.sub(&format!("{part}_centred"), steps, zero)?;
        node.mul(&format!("{part}_numbers"), centred, scale)
    }

    /// Its rows at these indices.
    fn rows(self, node: &mut Node<'_, '_>, part: &str, indices: ValueId) -> Result<ValueId> {
        let rows = node.gathered(part, 0, self.values, indices)?;
        self.numbers(node, part, rows)
    }
}

/// What an embedding is made of.
struct Embedding {
    words: Table,
    places: Table,
    segments: Option<Table>,
    gamma: Table,
    beta: Table,
    positions: Option<ValueId>,
}

/// Layer normalisation of the sum of embeddings of words, of positions and of segments; the number of tokens that a mask
/// keeps of each image; and the sum.
pub(super) fn embed_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let plain = |values| Table { values, grid: None };
    let embedding = Embedding {
        words: plain(node.operand(2, "word_embedding")?),
        places: plain(node.operand(3, "position_embedding")?),
        segments: node.optional(4).map(plain),
        gamma: plain(node.operand(5, "gamma")?),
        beta: plain(node.operand(6, "beta")?),
        positions: node.optional(8),
    };
    node.ignore(&["mask_index_type"]);
    embedded(node, embedding)
}

/// The same of tables of codes, without the sum.
pub(super) fn quantized_embed_layer_normalization(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let coded = |node: &mut Node<'_, '_>, slot: usize, grid: usize| -> Result<Table> {
        let (values, scale) = (node.operand(slot, "table")?, node.operand(8 + grid, "scale")?);
        Ok(Table { values, grid: Some([scale, node.operand(13 + grid, "zero point")?]) })
    };
    let has_segments = !node.is_left_out(4);
    let embedding = Embedding {
        words: coded(node, 2, 0)?,
        places: coded(node, 3, 1)?,
        segments: if has_segments { Some(coded(node, 4, 2)?) } else { None },
        gamma: coded(node, 5, 3)?,
        beta: coded(node, 6, 4)?,
        positions: None,
    };
    let mut results = embedded(node, embedding)?;
    results.truncate(2);
    Ok(results)
}

fn embedded(node: &mut Node<'_, '_>, embedding: Embedding) -> Result<Vec<ValueId>> {
    let (ids, segments) = (node.operand(0, "input_ids")?, node.optional(1));
    let mask = node.optional(7);
    let &[batch, length] = node.shape(ids).dims() else {
        return Err(OpError::shape(format!("takes batch and length, got {}", node.ty(ids))).into());
    };
    let mut sum = embedding.words.rows(node, "words", ids)?;
    let places = embedding.places;
    let at = match embedding.positions {
        Some(positions) => places.rows(node, "places", positions)?,
        None => {
            let first = SliceSpec { start: 0, len: length, step: 1 };
            if node.shape(places.values).first().is_none_or(|&n| n < length) {
                return Err(OpError::shape(format!("{length} places in {}", node.ty(places.values))).into());
            }
            let rows = node.sliced("places", 0, first, places.values)?;
            places.numbers(node, "places", rows)?
        }
    };
    sum = node.add("words_at_places", sum, at)?;
    match (segments, embedding.segments) {
        (Some(segments), Some(kinds)) => {
            let of_segments = kinds.rows(node, "segments", segments)?;
            sum = node.add("sum", sum, of_segments)?;
        }
        (None, None) => {}
        _ => return Err(OpError::shape("has segments or their embeddings, not both").into()),
    }
    let epsilon = node.float("epsilon", 1e-12)?;
    let gamma = embedding.gamma.numbers(node, "gamma", embedding.gamma.values)?;
    let beta = embedding.beta.numbers(node, "beta", embedding.beta.values)?;
    let y = norm::layer_of(node, sum, gamma, Some(beta), epsilon)?;
    let count = match mask {
        Some(mask) => {
            let mask = node.cast_to("mask", DType::S32, mask)?;
            let count = node.reduced("count", ReduceKind::Sum, vec![1], mask)?;
            node.shaped("counts", [batch], count)?
        }
        None => {
            let none = node.constant_part("none", Tensor::scalar(0i32));
            node.expanded("counts", [batch], none)?
        }
    };
    let y = y.first().copied().unwrap_or(sum);
    Ok(vec![y, count, sum])
}
