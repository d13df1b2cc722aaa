//! Attention, by matrix products, Softmax and functions of elements: what kernels exist for.

use super::compose::Result;
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node, tensor},
    ops::{BinaryKind, ReduceKind, SliceSpec, UnaryKind},
};

/// Query, key and value in heads, in a type that is computed in: `[batch, heads, length, size]`, but for the key, which is
/// `[batch, heads, size, length]`, as the product takes it. Each head of key and value may serve several of the query.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) query: ValueId,
    pub(super) key_transposed: ValueId,
    pub(super) value: ValueId,
}

/// What stands between the two products.
pub(super) struct Scoring {
    /// The factor of the products.
    pub(super) scale: f64,
    /// The scores are brought within ±softcap by tanh, where it is not 0.
    pub(super) softcap: f32,
    /// What is added to them: numbers that broadcast to `[batch, heads, query length, key length]`.
    pub(super) bias: Option<ValueId>,
    /// The type that Softmax is computed in, if another one than that of the operands.
    pub(super) precision: Option<DType>,
    /// Whether the bias may hide all keys from a query by −∞.
    pub(super) may_blind: bool,
    /// A score beside those of the keys, whose share of the probability goes nowhere: `[1, heads, 1, 1]`.
    pub(super) sink: Option<ValueId>,
}

/// Attention and the stages on the way to it.
pub(super) struct Attended {
    /// `[batch, heads, query length, value size]`.
    pub(super) y: ValueId,
    /// Scaled products of query and key, `[batch, heads, query length, key length]`.
    pub(super) products: ValueId,
    /// The same within the softcap.
    pub(super) capped: ValueId,
    /// The same with the bias.
    pub(super) biased: ValueId,
    /// Softmax of these.
    pub(super) probabilities: ValueId,
}

/// Rows of queries that see no key at all.
struct Rows {
    /// The bias, but with 0 in the rows that have nothing but −∞.
    bias: ValueId,
    /// Whether a row is one of these.
    blind: ValueId,
}

/// softmax(softcap(scale·Q·Kᵀ) + bias)·V. A row whose bias is all −∞ gives 0.
///
/// Where a head of the key serves several heads of the query, their rows stand below each other as those of one matrix,
/// so that nothing is repeated.
pub(super) fn attend(node: &mut Node<'_, '_>, heads: Heads, scoring: &Scoring) -> Result<Attended> {
    let Heads { query, key_transposed, value } = heads;
    let (q, k, v) = (node.shape(query), node.shape(key_transposed), node.shape(value));
    let fits = q.rank() == 4
        && k.rank() == 4
        && v.rank() == 4
        && q[0] == k[0]
        && q[0] == v[0]
        && k[1] == v[1]
        && q[3] == k[2]
        && k[3] == v[2]
        && k[1] > 0
        && q[1].is_multiple_of(k[1]);
    if !fits {
        let why = format!(
            "query {}, transposed key {} and value {} do not fit each other",
            node.ty(query),
            node.ty(key_transposed),
            node.ty(value)
        );
        return Err(OpError::shape(why).into());
    }
    let (batch, kv_heads, length) = (q[0], k[1], k[3]);
    let dtype = node.ty(query).dtype;
    let scale = node.number("scale", scoring.scale, dtype)?;
    let query = node.mul("scaled", query, scale)?;
    let rows = q[1] / kv_heads * q[2];
    let query = node.shaped("query_rows", [batch, kv_heads, rows, q[3]], query)?;
    let products = node.product("products", query, key_transposed)?;
    let products = node.shaped("scores", [batch, q[1], q[2], length], products)?;
    let capped = softcap(node, products, scoring.softcap)?;
    let (mut biased, mut safe, mut blind) = (capped, capped, None);
    if let Some(bias) = scoring.bias {
        biased = node.add("biased", capped, bias)?;
        check_scores(node, biased, capped)?;
        safe = biased;
        if scoring.may_blind
            && let Some(rows) = rows_without_keys(node, bias)?
        {
            safe = node.add("biased_where_seeing", capped, rows.bias)?;
            blind = Some(rows.blind);
        }
    }
    let exact = match scoring.precision {
        Some(precision) => node.cast_to("precise", precision, safe)?,
        None => safe,
    };
    let probabilities = match scoring.sink {
        None => node.softmax_along("softmax", 3, exact)?,
        Some(sink) => softmax_beside(node, exact, sink)?,
    };
    let probabilities = node.cast_to("probabilities", dtype, probabilities)?;
    let weights = node.shaped("weights", [batch, kv_heads, rows, length], probabilities)?;
    let y = node.product("weighted", weights, value)?;
    let mut y = node.shaped("heads", [batch, q[1], q[2], v[3]], y)?;
    let mut shown = probabilities;
    if let Some(blind) = blind {
        let zero = node.number("nothing_seen", 0.0, dtype)?;
        y = node.chosen("seen", blind, zero, y)?;
        shown = node.chosen("probabilities_seen", blind, zero, probabilities)?;
    }
    Ok(Attended { y, products, capped, biased, probabilities: shown })
}

/// Softmax of scores and of a sink, without the share of the sink.
fn softmax_beside(node: &mut Node<'_, '_>, scores: ValueId, sink: ValueId) -> Result<ValueId> {
    let shape = node.shape(scores);
    let sink = node.cast_to("sink_as_scores", node.ty(scores).dtype, sink)?;
    let sink = node.expanded("sinks", [shape[0], shape[1], shape[2], 1], sink)?;
    let all = node.joined("scores_and_sinks", 3, &[scores, sink])?;
    let shares = node.softmax_along("softmax", 3, all)?;
    node.sliced("shares_of_keys", 3, SliceSpec { start: 0, len: shape[3], step: 1 }, shares)
}

fn check_scores(node: &Node<'_, '_>, biased: ValueId, scores: ValueId) -> Result<()> {
    if node.shape(biased) == node.shape(scores) {
        return Ok(());
    }
    let why = format!("the mask makes {} of scores {}", node.ty(biased), node.ty(scores));
    Err(OpError::shape(why).into())
}

fn softcap(node: &mut Node<'_, '_>, scores: ValueId, cap: f32) -> Result<ValueId> {
    if cap == 0.0 {
        return Ok(scores);
    }
    let cap = node.number("softcap", cap.into(), node.ty(scores).dtype)?;
    let x = node.div("by_softcap", scores, cap)?;
    let x = node.unary("within_one", UnaryKind::Tanh, x)?;
    node.mul("capped", x, cap)
}

/// Softmax of nothing but −∞ is not a number. `None` where it is known that there is no such row.
fn rows_without_keys(node: &mut Node<'_, '_>, bias: ValueId) -> Result<Option<Rows>> {
    let Some(last) = node.shape(bias).rank().checked_sub(1) else { return Ok(None) };
    let length = node.shape(bias)[last];
    if let Some(known) = node.constant_value(bias).and_then(Tensor::to_f32) {
        let is_empty = |row: &[f32]| row.iter().all(|&x| x == f32::NEG_INFINITY);
        if !known.chunks(length.max(1)).any(is_empty) {
            return Ok(None);
        }
    }
    let dtype = node.ty(bias).dtype;
    let none = node.number("nothing", f64::NEG_INFINITY, dtype)?;
    let largest = node.reduced("largest_bias", ReduceKind::Max, vec![last], bias)?;
    let blind = node.binary("is_blind", BinaryKind::Equal, largest, none)?;
    let zero = node.number("zero", 0.0, dtype)?;
    let bias = node.chosen("bias_where_seeing", blind, zero, bias)?;
    Ok(Some(Rows { bias, blind }))
}

/// 0 where a boolean is true and −∞ where it is false.
fn bias_of_truth(node: &mut Node<'_, '_>, part: &str, truth: ValueId, dtype: DType) -> Result<ValueId> {
    let zero = node.number("visible", 0.0, dtype)?;
    let hidden = node.number("hidden", f64::NEG_INFINITY, dtype)?;
    node.chosen(part, truth, zero, hidden)
}

/// `[batch, length, heads·size]` as `[batch, length, heads, size]`.
pub(super) fn split_heads(node: &mut Node<'_, '_>, part: &str, x: ValueId, heads: usize) -> Result<ValueId> {
    let &[batch, length, hidden] = node.shape(x).dims() else {
        return Err(OpError::shape(format!("takes batch, length and hidden size, got {}", node.ty(x))).into());
    };
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(OpError::shape(format!("{} has no {heads} heads of equal size", node.ty(x))).into());
    }
    node.shaped(part, [batch, length, heads, hidden / heads], x)
}

/// `[batch, heads, length, size]` as `[batch, length, heads·size]`.
pub(super) fn join_heads(node: &mut Node<'_, '_>, part: &str, y: ValueId) -> Result<ValueId> {
    let y = node.permuted("by_position", [0, 2, 1, 3], y)?;
    let shape = node.shape(y);
    let hidden = shape[2].checked_mul(shape[3]).ok_or_else(|| OpError::too_large("the hidden size"))?;
    node.shaped(part, [shape[0], shape[1], hidden], y)
}

/// A key or value: as it is, by heads, and what the call leaves for the next one.
struct Cached {
    heads: ValueId,
    /// Split into heads, but with positions before heads; where there is no past and the operand has 3 dimensions.
    by_position: Option<ValueId>,
}

/// The operand in heads, behind what is there of the past.
fn cached(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    heads: Option<usize>,
    past: Option<ValueId>,
) -> Result<Cached> {
    let (split, now) = match heads {
        None => (None, x),
        Some(heads) => {
            let split = split_heads(node, &format!("{part}_split"), x, heads)?;
            (Some(split), node.permuted(&format!("{part}_heads"), [0, 2, 1, 3], split)?)
        }
    };
    Ok(match past {
        None => Cached { heads: now, by_position: split },
        Some(past) => {
            Cached { heads: node.joined(&format!("{part}_present"), 2, &[past, now])?, by_position: None }
        }
    })
}

/// What the result `qk_matmul_output` is.
fn shown_stage(node: &mut Node<'_, '_>) -> Result<fn(&Attended) -> ValueId> {
    Ok(match node.int("qk_matmul_output_mode", 0)? {
        0 => |a| a.products,
        1 => |a| a.capped,
        2 => |a| a.biased,
        3 => |a| a.probabilities,
        other => return Err(NodeError::attribute("qk_matmul_output_mode", format!("is {other}"))),
    })
}

fn precision(node: &mut Node<'_, '_>, own: DType) -> Result<Option<DType>> {
    let Some(code) = node.optional_int("softmax_precision")? else { return Ok(None) };
    let dtype = i32::try_from(code).ok().and_then(|c| tensor::dtype(c).ok()).filter(|d| d.is_float());
    let dtype = dtype.ok_or_else(|| NodeError::attribute("softmax_precision", format!("is {code}")))?;
    // The type of the operands is that of the first ones; it is computed in at least as many digits as asked for.
    Ok(Some(dtype).filter(|&d| d != own))
}

/// Scaled dot product attention. Operands of 3 dimensions hold their heads side by side.
pub(super) fn attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let roles = ["Q", "K", "V"];
    let mut operands = Vec::with_capacity(roles.len());
    for (slot, role) in roles.into_iter().enumerate() {
        let x = node.operand(slot, role)?;
        node.check_float(role, x)?;
        operands.push(x);
    }
    let [q, k, v] = operands[..] else { return Err(NodeError::MissingOperand { slot: 2, role: "V" }) };
    let (mask, past_key, past_value) = (node.optional(3), node.optional(4), node.optional(5));
    let lengths = if node.opset() >= 24 { node.optional(6) } else { None };
    if past_key.is_some() != past_value.is_some() {
        return Err(OpError::shape("has a past key or a past value, not both").into());
    }
    if past_key.is_some() && lengths.is_some() {
        return Err(OpError::shape("has both a past and lengths without padding").into());
    }
    let own = node.ty(q).dtype;
    let is_causal = node.flag("is_causal", false)?;
    let softcap = node.float("softcap", 0.0)?;
    let scale = node.optional_float("scale")?;
    let precision = precision(node, own)?;
    let stage = shown_stage(node)?;
    let (q_heads, kv_heads) = head_counts(node, &[q, k, v])?;

    let query = match q_heads {
        None => q,
        Some(heads) => {
            let split = split_heads(node, "query_split", q, heads)?;
            node.permuted("query_heads", [0, 2, 1, 3], split)?
        }
    };
    let key = cached(node, "key", k, kv_heads, past_key)?;
    let value = cached(node, "value", v, kv_heads, past_value)?;
    let key_transposed = match key.by_position {
        Some(split) => node.permuted("key_transposed", [0, 2, 3, 1], split)?,
        None => node.permuted("key_transposed", [0, 1, 3, 2], key.heads)?,
    };
    let heads = Heads {
        query: node.widened("query_wide", query)?,
        key_transposed: node.widened("key_wide", key_transposed)?,
        value: node.widened("value_wide", value.heads)?,
    };
    let computed = node.ty(heads.query).dtype;
    let heads = Heads {
        key_transposed: node.cast_to("key_as_query", computed, heads.key_transposed)?,
        value: node.cast_to("value_as_query", computed, heads.value)?,
        ..heads
    };
    let (shape, keys) = (node.shape(heads.query), node.shape(heads.key_transposed));
    let (rows, columns, size) = (shape[2], keys[3], shape[3]);
    let before = past_key.map_or(0, |p| node.shape(p).get(2).copied().unwrap_or(0));
    let visible = Visible { rows, columns, before, is_causal, lengths };
    let bias = bias(node, mask, &visible, computed)?;
    let scale = scale.map_or_else(|| 1.0 / (size as f64).sqrt(), f64::from);
    let attended =
        attend(node, heads, &Scoring { scale, softcap, bias, precision, may_blind: true, sink: None })?;

    let narrows = computed != own;
    let y = match q_heads {
        None => attended.y,
        Some(_) => join_heads(node, if narrows { "wide" } else { "" }, attended.y)?,
    };
    let y = node.cast_to("", own, y)?;
    let shown = node.cast_to("qk", own, stage(&attended))?;
    Ok(vec![y, key.heads, value.heads, shown])
}

/// How many heads operands of 3 dimensions hold; none where there are 4.
fn head_counts(node: &mut Node<'_, '_>, operands: &[ValueId]) -> Result<(Option<usize>, Option<usize>)> {
    let (q, kv) = (node.count("q_num_heads")?, node.count("kv_num_heads")?);
    let ranks: Vec<usize> = operands.iter().map(|&x| node.shape(x).rank()).collect();
    match ranks[..] {
        [3, 3, 3] => {
            let q = q.ok_or_else(|| NodeError::attribute("q_num_heads", "is missing"))?;
            let kv = kv.ok_or_else(|| NodeError::attribute("kv_num_heads", "is missing"))?;
            Ok((Some(q), Some(kv)))
        }
        [4, 4, 4] => Ok((None, None)),
        _ => {
            Err(OpError::shape(format!("Q, K and V must all have 3 or all have 4 dimensions, got {ranks:?}"))
                .into())
        }
    }
}

/// What decides, beside a mask, which keys a query sees.
struct Visible {
    /// Number of queries.
    rows: usize,
    /// Number of keys.
    columns: usize,
    /// Keys that precede the first query.
    before: usize,
    is_causal: bool,
    /// For each image of the batch the number of keys that are not padding.
    lengths: Option<ValueId>,
}

/// All that is added to scores, if there is anything.
fn bias(
    node: &mut Node<'_, '_>,
    mask: Option<ValueId>,
    visible: &Visible,
    dtype: DType,
) -> Result<Option<ValueId>> {
    let mut sum = mask.map(|mask| mask_bias(node, mask, visible.columns, dtype)).transpose()?;
    let lengths = match visible.lengths {
        None => None,
        Some(lengths) => {
            let batch = node.shape(lengths).elements();
            let lengths = node.cast_to("lengths_float", DType::F32, lengths)?;
            Some(node.shaped("lengths", [batch, 1, 1, 1], lengths)?)
        }
    };
    let mut terms = vec![];
    if visible.is_causal {
        let truth = causal(node, visible, lengths)?;
        terms.push(bias_of_truth(node, "causal_bias", truth, dtype)?);
    }
    if let Some(lengths) = lengths {
        let columns = node.counting("columns", [visible.columns], 0)?;
        let truth = node.binary("is_no_padding", BinaryKind::Less, columns, lengths)?;
        terms.push(bias_of_truth(node, "padding_bias", truth, dtype)?);
    }
    for (i, term) in terms.into_iter().enumerate() {
        sum = Some(match sum {
            None => term,
            Some(sum) => node.add(&format!("bias{i}"), sum, term)?,
        });
    }
    Ok(sum)
}

/// Whether a query sees a key: those up to its own place, which is behind the keys that precede the queries.
fn causal(node: &mut Node<'_, '_>, visible: &Visible, lengths: Option<ValueId>) -> Result<ValueId> {
    let columns = node.counting("columns", [visible.columns], 0)?;
    let mut places = node.counting("rows", [visible.rows, 1], visible.before)?;
    if let Some(lengths) = lengths {
        let rows = node.number("row_count", visible.rows as f64, DType::F32)?;
        let before = node.sub("before", lengths, rows)?;
        places = node.add("places", places, before)?;
    }
    node.binary("is_causal", BinaryKind::LessOrEqual, columns, places)
}

/// A mask as numbers that are added. One that ends before the keys do hides the rest.
fn mask_bias(node: &mut Node<'_, '_>, mask: ValueId, columns: usize, dtype: DType) -> Result<ValueId> {
    let bias = match node.ty(mask).dtype {
        DType::Bool => bias_of_truth(node, "mask_bias", mask, dtype)?,
        _ => node.cast_to("mask_bias", dtype, mask)?,
    };
    let shape = node.shape(bias);
    let Some((&last, _)) = shape.split_last() else { return Ok(bias) };
    let missing = columns.saturating_sub(last);
    node.padded("mask", shape.rank() - 1, missing, f64::NEG_INFINITY, bias)
}

/// Pairs of elements of each head turned by an angle, whose cosine and sine are given.
pub(super) struct Rotation {
    /// Cosines, broadcast to `[…, pairs]` of the operand of [`rotate`].
    pub(super) cos: ValueId,
    pub(super) sin: ValueId,
    /// Number of elements that take part; those behind stay.
    pub(super) extent: usize,
    /// Whether pairs are neighbours, rather than the halves of the elements.
    pub(super) interleaved: bool,
}

/// Turns pairs along the last axis of x. The last step has the name `part`.
pub(super) fn rotate(node: &mut Node<'_, '_>, part: &str, x: ValueId, turn: &Rotation) -> Result<ValueId> {
    let shape = node.shape(x);
    let axis = shape.rank().saturating_sub(1);
    let size = shape.get(axis).copied().unwrap_or(0);
    if turn.extent > size || !turn.extent.is_multiple_of(2) {
        return Err(OpError::shape(format!(
            "{} of {} elements cannot be turned in pairs",
            turn.extent, size
        ))
        .into());
    }
    let half = turn.extent / 2;
    let prefix = if part.is_empty() { "rotation" } else { part };
    let pick = |first: bool| match turn.interleaved {
        true => SliceSpec { start: usize::from(!first), len: half, step: if half > 1 { 2 } else { 1 } },
        false => SliceSpec { start: if first { 0 } else { half }, len: half, step: 1 },
    };
    let first = node.sliced(&format!("{prefix}_first"), axis, pick(true), x)?;
    let second = node.sliced(&format!("{prefix}_second"), axis, pick(false), x)?;
    let mut term = |name: &str, factor, x| node.mul(&format!("{prefix}_{name}"), factor, x);
    let (cos_first, sin_second) =
        (term("cos_first", turn.cos, first)?, term("sin_second", turn.sin, second)?);
    let (sin_first, cos_second) =
        (term("sin_first", turn.sin, first)?, term("cos_second", turn.cos, second)?);
    let mut real = node.sub(&format!("{prefix}_real"), cos_first, sin_second)?;
    let mut imaginary = node.add(&format!("{prefix}_imaginary"), sin_first, cos_second)?;
    if node.shape(real)[..axis] != shape[..axis] {
        return Err(OpError::shape(format!("angles make {} of {}", node.ty(real), node.ty(x))).into());
    }
    let mut turned = shape.to_vec();
    turned[axis] = turn.extent;
    let mut parts = vec![];
    if turn.interleaved {
        let mut pairs = shape.to_vec();
        pairs[axis] = half;
        pairs.push(1);
        real = node.shaped(&format!("{prefix}_real_column"), pairs.clone(), real)?;
        imaginary = node.shaped(&format!("{prefix}_imaginary_column"), pairs, imaginary)?;
        let both = node.joined(&format!("{prefix}_pairs"), axis + 1, &[real, imaginary])?;
        if turn.extent == size {
            return node.shaped(part, turned, both);
        }
        parts.push(node.shaped(&format!("{prefix}_turned"), turned, both)?);
    } else {
        parts.extend([real, imaginary]);
    }
    if turn.extent < size {
        let rest = SliceSpec { start: turn.extent, len: size - turn.extent, step: 1 };
        parts.push(node.sliced(&format!("{prefix}_rest"), axis, rest, x)?);
    }
    node.joined(part, axis, &parts)
}

/// Angles of each position of each image, `[batch, length, pairs]`.
pub(super) fn angles(
    node: &mut Node<'_, '_>,
    part: &str,
    cache: ValueId,
    positions: Option<ValueId>,
) -> Result<ValueId> {
    match positions {
        None => Ok(cache),
        Some(positions) => node.gathered(part, 0, cache, positions),
    }
}

pub(super) fn rotary_embedding(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let (cos, sin) = (node.operand(1, "cos_cache")?, node.operand(2, "sin_cache")?);
    let positions = node.optional(3);
    node.check_float("X", x)?;
    let interleaved = node.flag("interleaved", false)?;
    let extent = node.int("rotary_embedding_dim", 0)?;
    let heads = node.int("num_heads", 0)?;
    let shape = node.shape(x);
    // Positions are the second dimension where heads are split off the last one, and the third where they are given.
    let (split, position_axis) = match shape.rank() {
        4 => (x, 2),
        3 => {
            let heads = usize::try_from(heads).unwrap_or(0);
            if heads == 0 {
                return Err(NodeError::attribute("num_heads", "is missing, for an operand of 3 dimensions"));
            }
            (split_heads(node, "heads", x, heads)?, 1)
        }
        _ => return Err(OpError::shape(format!("takes 3 or 4 dimensions, got {}", node.ty(x))).into()),
    };
    let extent = match usize::try_from(extent) {
        Ok(0) => node.shape(split)[3],
        Ok(n) => n,
        Err(_) => return Err(NodeError::attribute("rotary_embedding_dim", format!("is {extent}"))),
    };
    let cos = angles(node, "cos", cos, positions)?;
    let sin = angles(node, "sin", sin, positions)?;
    let turn = Rotation {
        cos: beside_heads(node, "cos_of_heads", cos, position_axis)?,
        sin: beside_heads(node, "sin_of_heads", sin, position_axis)?,
        extent,
        interleaved,
    };
    match shape.rank() {
        4 => rotate(node, "", split, &turn),
        _ => {
            let y = rotate(node, "turned", split, &turn)?;
            node.shaped("", shape, y)
        }
    }
}

/// `[batch, length, pairs]` with a dimension for heads, so that positions are at `position_axis` of 4.
pub(super) fn beside_heads(
    node: &mut Node<'_, '_>,
    part: &str,
    angles: ValueId,
    position_axis: usize,
) -> Result<ValueId> {
    let &[batch, length, pairs] = node.shape(angles).dims() else {
        return Err(OpError::shape(format!(
            "angles must be of batch, length and pairs, got {}",
            node.ty(angles)
        ))
        .into());
    };
    let mut dims = vec![batch, length, pairs];
    dims.insert(3 - position_axis, 1);
    node.shaped(part, Shape::new(dims)?, angles)
}
