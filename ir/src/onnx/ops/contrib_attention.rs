//! Attention as ONNX Runtime writes it: with projections, its own forms of masks, and caches of keys and values.

use super::{
    attention::{
        Attended, Heads, Rotation, Scoring, angles, attend, beside_heads, join_heads, rotate, split_heads,
    },
    compose::Result,
    integer::scaled_product,
};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{BinaryKind, Clamp, GatherNd, MatMul, SliceSpec},
};

/// An attribute that must be there and count something.
pub(super) fn required_count(node: &mut Node<'_, '_>, name: &'static str) -> Result<usize> {
    node.count(name)?.ok_or_else(|| NodeError::attribute(name, "is missing"))
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(OpError::unsupported(why.into()).into())
}

fn misfit<T>(why: String) -> Result<T> {
    Err(OpError::shape(why).into())
}

/// The elements from `start` on of the last axis.
fn part_of(node: &mut Node<'_, '_>, part: &str, x: ValueId, start: usize, len: usize) -> Result<ValueId> {
    let Some(axis) = node.shape(x).rank().checked_sub(1) else {
        return misfit(format!("a scalar has no {part}: the model's operand has no axes"));
    };
    node.sliced(part, axis, SliceSpec { start, len, step: 1 }, x)
}

/// x in a type that is computed in: a head of `[batch, length, heads, size]` as `[batch, heads, length, size]`.
fn by_head(node: &mut Node<'_, '_>, part: &str, x: ValueId) -> Result<ValueId> {
    node.permuted(part, [0, 2, 1, 3], x)
}

/// Which keys queries see, and how hidden ones are marked.
struct Sight {
    batch: usize,
    /// Number of queries.
    rows: usize,
    /// Number of keys.
    columns: usize,
    /// Whether a query sees no key behind its own place; the last query is at the place of the last key.
    unidirectional: bool,
    /// What is added to the scores of keys that a mask hides.
    filter: f32,
}

impl Sight {
    /// What the node's attributes say, for these queries and keys in heads.
    fn of(node: &mut Node<'_, '_>, query: ValueId, key: ValueId) -> Result<Sight> {
        let (q, k) = (node.shape(query), node.shape(key));
        if q.rank() != 4 || k.rank() != 4 {
            return misfit(format!("queries {} and keys {} in heads", node.ty(query), node.ty(key)));
        }
        Ok(Sight {
            batch: q[0],
            rows: q[2],
            columns: k[2],
            unidirectional: node.flag("unidirectional", false)?,
            filter: node.float("mask_filter_value", -10000.0)?,
        })
    }

    /// The numbers to be added to scores for the attributes `unidirectional` and `mask_filter_value` and a mask; those of
    /// keys behind a query are the lowest f32, and do not add to it.
    fn bias(&self, node: &mut Node<'_, '_>, mask: Option<ValueId>, dtype: DType) -> Result<Option<ValueId>> {
        let mut bias = None;
        if let Some(mask) = mask {
            let visible = self.visible(node, mask)?;
            let zero = node.number("visible", 0.0, dtype)?;
            let filter = node.number("filter", self.filter.into(), dtype)?;
            bias = Some(node.chosen("mask_bias", visible, zero, filter)?);
        }
        if !self.unidirectional {
            return Ok(bias);
        }
        let columns = node.counting("columns", [self.columns], 0)?;
        let rows = node.counting("rows", [self.rows, 1], self.columns.saturating_sub(self.rows))?;
        let sees = node.binary("is_causal", BinaryKind::LessOrEqual, columns, rows)?;
        let lowest = node.number("lowest", f32::MIN.into(), dtype)?;
        let seen = match bias {
            Some(bias) => bias,
            None => node.number("zero", 0.0, dtype)?,
        };
        node.chosen("causal_bias", sees, seen, lowest).map(Some)
    }

    /// Whether a mask shows a key, as it broadcasts to `[batch, heads, queries, keys]`. A mask has a number for each key, or
    /// for each pair of query and key, which is above 0 where it is seen; or it is the end of the keys of each image,
    /// behind which there may be their starts.
    fn visible(&self, node: &mut Node<'_, '_>, mask: ValueId) -> Result<ValueId> {
        let &Sight { batch, rows, columns, .. } = self;
        let dims = node.shape(mask).to_vec();
        let shape = match *dims {
            [n] if n == batch || n == 2 * batch => return self.between(node, mask, n > batch),
            [n] if n == 3 * batch + 2 => {
                return refuse(
                    "a mask of offsets of packed sequences is not supported; pad them, with a mask of keys",
                );
            }
            [b, t] if b == batch && t == columns => [b, 1, 1, t],
            [b, s, t] if b == batch && s == rows && t == columns => [b, 1, s, t],
            _ => {
                let mask = node.ty(mask);
                return misfit(format!("mask {mask} of {batch} times {rows} queries and {columns} keys"));
            }
        };
        let mask = node.shaped("mask", shape, mask)?;
        if node.ty(mask).dtype == DType::Bool {
            return Ok(mask);
        }
        let mask = node.cast_to("mask_numbers", DType::F32, mask)?;
        let zero = node.number("hidden", 0.0, DType::F32)?;
        node.binary("is_visible", BinaryKind::Greater, mask, zero)
    }

    fn between(&self, node: &mut Node<'_, '_>, bounds: ValueId, has_starts: bool) -> Result<ValueId> {
        let bounds = node.cast_to("bounds", DType::F32, bounds)?;
        let columns = node.counting("places", [self.columns], 0)?;
        let bound = |node: &mut Node<'_, '_>, part: &str, start: usize| {
            let flat = part_of(node, &format!("{part}_flat"), bounds, start, self.batch)?;
            node.shaped(part, [self.batch, 1, 1, 1], flat)
        };
        let ends = bound(node, "ends", 0)?;
        let before = node.binary("before_end", BinaryKind::Less, columns, ends)?;
        if !has_starts {
            return Ok(before);
        }
        let starts = bound(node, "starts", self.batch)?;
        let behind = node.binary("behind_start", BinaryKind::GreaterOrEqual, columns, starts)?;
        node.binary("is_between", BinaryKind::And, before, behind)
    }
}

/// Attention over heads that are computed in f32 or f64, and its result with heads side by side in the type of the node.
struct Call {
    own: DType,
    /// `[batch, heads, length, size]`, all three.
    query: ValueId,
    key: ValueId,
    value: ValueId,
    softcap: f32,
    sink: Option<ValueId>,
}

impl Call {
    fn new(node: &Node<'_, '_>, query: ValueId, key: ValueId, value: ValueId) -> Call {
        Call { own: node.ty(query).dtype, query, key, value, softcap: 0.0, sink: None }
    }

    /// softmax(scale·Q·Kᵀ + bias + more)·V.
    fn attend(
        &self,
        node: &mut Node<'_, '_>,
        bias: Option<ValueId>,
        more: Option<ValueId>,
    ) -> Result<(ValueId, Attended)> {
        let size = node.shape(self.query).last().copied().unwrap_or(1).max(1);
        let scale = match node.optional_float("scale")? {
            Some(scale) if scale != 0.0 => scale.into(),
            _ => 1.0 / (size as f64).sqrt(),
        };
        let key_transposed = node.permuted("key_transposed", [0, 1, 3, 2], self.key)?;
        let heads = Heads {
            query: node.widened("query_wide", self.query)?,
            key_transposed: node.widened("key_wide", key_transposed)?,
            value: node.widened("value_wide", self.value)?,
        };
        let wide = node.ty(heads.query).dtype;
        let more = more.map(|more| node.cast_to("attention_bias", wide, more)).transpose()?;
        let bias = match (bias, more) {
            (Some(a), Some(b)) => Some(node.add("all_biases", a, b)?),
            (a, b) => a.or(b),
        };
        // Hidden keys are marked by numbers; with −∞ of the caller's own, a query sees at least its own place.
        let may_blind = more.is_some();
        let scoring =
            Scoring { scale, softcap: self.softcap, bias, precision: None, may_blind, sink: self.sink };
        let attended = attend(node, heads, &scoring)?;
        let y = join_heads(node, if wide == self.own { "" } else { "wide" }, attended.y)?;
        Ok((node.cast_to("", self.own, y)?, attended))
    }
}

/// The type that scores are computed in.
fn computed_in(node: &Node<'_, '_>, query: ValueId) -> DType {
    if node.ty(query).dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Attention of a value to itself: its projections to query, key and value are those of one matrix.
pub(super) fn attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, weights) = (node.operand(0, "input")?, node.operand(1, "weights")?);
    let bias = node.optional(2);
    let (mask, past, more) = (node.optional(3), node.optional(4), node.optional(5));
    node.check_float("input", x)?;
    let heads = required_count(node, "num_heads")?;
    check_in_place(node, 6)?;
    let columns = node.shape(weights).last().copied().unwrap_or(0);
    let sizes = match node.ints("qkv_hidden_sizes")? {
        Some(sizes) => super::lengths("qkv_hidden_sizes", &sizes)?,
        None => vec![columns / 3; 3],
    };
    if sizes.len() != 3 || sizes.iter().sum::<usize>() != columns || sizes[0] != sizes[1] {
        let why = format!("hidden sizes {sizes:?} of weights {}", node.ty(weights));
        return misfit(why);
    }
    let own = node.ty(x).dtype;
    let wide = node.widened("wide", x)?;
    let mut projections = [x; 3];
    for (i, name) in PROJECTIONS.into_iter().enumerate() {
        let start = sizes[..i].iter().sum();
        let projected = projected(node, name, wide, weights, bias, (start, sizes[i]))?;
        projections[i] = node.cast_to(&format!("{name}_narrow"), own, projected)?;
    }
    attend_to_itself(node, projections, heads, mask, past, more)
}

/// The same by weights and of a value that are codes: MatMulIntegerToFloat makes all three projections at once.
pub(super) fn quantized_attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, weights) = (node.operand(0, "input")?, node.operand(1, "weight")?);
    let bias = node.operand(2, "bias")?;
    let scales = [node.operand(3, "input_scale")?, node.operand(4, "weight_scale")?];
    let mask = node.optional(5);
    let (zeros, past) = ([node.optional(6), node.optional(7)], node.optional(8));
    let heads = required_count(node, "num_heads")?;
    check_in_place(node, 9)?;
    let all = scaled_product(node, "projections", [x, weights], scales, zeros, Some(bias))?;
    let columns = node.shape(all).last().copied().unwrap_or(0);
    if !columns.is_multiple_of(3) {
        return misfit(format!("weight {} does not hold three projections", node.ty(weights)));
    }
    let size = columns / 3;
    let mut projections = [all; 3];
    for (i, name) in PROJECTIONS.into_iter().enumerate() {
        projections[i] = part_of(node, name, all, i * size, size)?;
    }
    attend_to_itself(node, projections, heads, mask, past, None)
}

const PROJECTIONS: [&str; 3] = ["query", "key", "value"];

/// Attention over a query, key and value with heads side by side, behind keys and values of a past; with the present, where
/// it is wanted.
fn attend_to_itself(
    node: &mut Node<'_, '_>,
    projections: [ValueId; 3],
    heads: usize,
    mask: Option<ValueId>,
    past: Option<ValueId>,
    more: Option<ValueId>,
) -> Result<Vec<ValueId>> {
    let mut operands = projections;
    for (operand, name) in operands.iter_mut().zip(PROJECTIONS) {
        let split = split_heads(node, &format!("{name}_split"), *operand, heads)?;
        *operand = by_head(node, &format!("{name}_heads"), split)?;
    }
    let [query, mut key, mut value] = operands;
    if let Some(past) = past {
        (key, value) = (with_past(node, "key", past, 0, key)?, with_past(node, "value", past, 1, value)?);
    }
    let present = match node.wants(1) {
        true => Some(stacked(node, key, value)?),
        false => None,
    };
    let bias = Sight::of(node, query, key)?.bias(node, mask, computed_in(node, query))?;
    let call = Call::new(node, query, key, value);
    let (y, _) = call.attend(node, bias, more)?;
    Ok([y].into_iter().chain(present).collect())
}

/// Caches that results are written to in place, and angles that are not operands.
fn check_in_place(node: &mut Node<'_, '_>, length_slot: usize) -> Result<()> {
    if node.flag("past_present_share_buffer", false)? || !node.is_left_out(length_slot) {
        return refuse("writes past and present to one buffer; export it without past_present_share_buffer");
    }
    if node.flag("do_rotary", false)? {
        return refuse("do_rotary is not supported; use the op RotaryEmbedding");
    }
    node.ignore(&["rotary_embedding_dim"]);
    Ok(())
}

/// x times some columns of the weights, and their bias.
fn projected(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    weights: ValueId,
    bias: Option<ValueId>,
    (start, len): (usize, usize),
) -> Result<ValueId> {
    let weights = part_of(node, &format!("{part}_weights"), weights, start, len)?;
    let weights = node.widened(&format!("{part}_wide_weights"), weights)?;
    let mut operands = vec![x, weights];
    if let Some(bias) = bias {
        let bias = part_of(node, &format!("{part}_bias"), bias, start, len)?;
        operands.push(node.widened(&format!("{part}_wide_bias"), bias)?);
    }
    if node.ty(x).dtype == DType::F64 {
        return refuse("f64 is not supported");
    }
    node.emit_part(part, MatMul { bias: bias.is_some(), residual: false, clamp: Clamp::NONE }, &operands)
}

/// What is at an index of the first axis of the past, and x behind it.
fn with_past(
    node: &mut Node<'_, '_>,
    part: &str,
    past: ValueId,
    index: usize,
    x: ValueId,
) -> Result<ValueId> {
    let shape = node.shape(past);
    let &[2, batch, heads, length, size] = shape.dims() else {
        return misfit(format!("past must be 2 times batch, heads, length and size, got {}", node.ty(past)));
    };
    let one =
        node.sliced(&format!("past_{part}_row"), 0, SliceSpec { start: index, len: 1, step: 1 }, past)?;
    let one = node.shaped(&format!("past_{part}"), [batch, heads, length, size], one)?;
    node.joined(&format!("{part}_with_past"), 2, &[one, x])
}

/// Key and value along a new first axis.
fn stacked(node: &mut Node<'_, '_>, key: ValueId, value: ValueId) -> Result<ValueId> {
    let rows = [(key, "key_row"), (value, "value_row")].map(|(x, part)| {
        let shape = [&[1], node.shape(x).dims()].concat();
        node.shaped(part, shape, x)
    });
    let [key, value] = rows;
    node.joined("present", 0, &[key?, value?])
}

/// Where the keys and values of a call come from.
enum Source {
    /// Operands with heads side by side, to which a bias is added.
    Projections,
    /// Operands in heads: the keys and values of an encoder.
    Heads,
}

/// Where the operands of attention over projections stand, behind query, key and value.
struct Slots {
    bias: usize,
    mask: usize,
    more: usize,
    past: [usize; 2],
    /// Operands of caches that are written in place.
    in_place: &'static [usize],
}

/// Attention over projections that were made before.
pub(super) fn multi_head_attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    attention_over(node, &Slots { bias: 3, mask: 4, more: 5, past: [6, 7], in_place: &[8, 9] })
}

/// The same for one query.
pub(super) fn decoder_attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    check_in_place(node, 7)?;
    node.ignore(&["output_qk"]);
    attention_over(node, &Slots { bias: 10, mask: 3, more: 4, past: [5, 6], in_place: &[7, 8, 9] })
}

fn attention_over(node: &mut Node<'_, '_>, slots: &Slots) -> Result<Vec<ValueId>> {
    let query = node.operand(0, "query")?;
    let (key, value, bias) = (node.optional(1), node.optional(2), node.optional(slots.bias));
    let (mask, more) = (node.optional(slots.mask), node.optional(slots.more));
    let past = slots.past.map(|slot| node.optional(slot));
    node.check_float("query", query)?;
    if slots.in_place.iter().any(|&slot| !node.is_left_out(slot)) {
        return refuse("writes past and present to one buffer, or picks beams; export it without");
    }
    if node.wants(3) {
        return refuse("gives out its scores");
    }
    let heads = required_count(node, "num_heads")?;
    let (q, k, v, source) = unpacked(node, heads, query, key, value)?;
    let hidden = node.shape(q).last().copied().unwrap_or(0);
    let query = split_with_bias(node, "query", q, bias, 0, heads)?;
    let (mut key, mut value) = match source {
        Source::Heads => (k, v),
        Source::Projections => (
            split_with_bias(node, "key", k, bias, hidden, heads)?,
            split_with_bias(node, "value", v, bias, hidden.saturating_mul(2), heads)?,
        ),
    };
    match past {
        [Some(past_key), Some(past_value)] => {
            key = node.joined("key_with_past", 2, &[past_key, key])?;
            value = node.joined("value_with_past", 2, &[past_value, value])?;
        }
        [None, None] => {}
        _ => return misfit("has a past key or a past value, not both".into()),
    }
    let bias = Sight::of(node, query, key)?.bias(node, mask, computed_in(node, query))?;
    let call = Call::new(node, query, key, value);
    let (y, _) = call.attend(node, bias, more)?;
    Ok(vec![y, key, value])
}

/// Query, key and value as operands have them, or packed in one of 5 dimensions: `[batch, length, heads, 3 or 2, size]`.
fn unpacked(
    node: &mut Node<'_, '_>,
    heads: usize,
    query: ValueId,
    key: Option<ValueId>,
    value: Option<ValueId>,
) -> Result<(ValueId, ValueId, ValueId, Source)> {
    let take = |node: &mut Node<'_, '_>, packed: ValueId, count: usize, index: usize| {
        let &[batch, length, n, c, size] = node.shape(packed).dims() else {
            return misfit(format!("{} is not {count} operands packed", node.ty(packed)));
        };
        if n != heads || c != count {
            return misfit(format!("{} is not {count} operands of {heads} heads", node.ty(packed)));
        }
        let spec = SliceSpec { start: index, len: 1, step: 1 };
        let one = node.sliced(&format!("packed{index}"), 3, spec, packed)?;
        node.shaped(&format!("unpacked{index}"), [batch, length, n * size], one)
    };
    match (key, value) {
        (Some(key), Some(value)) => {
            let source = if node.shape(key).rank() == 4 { Source::Heads } else { Source::Projections };
            Ok((query, key, value, source))
        }
        (Some(key), None) => {
            let (k, v) = (take(node, key, 2, 0)?, take(node, key, 2, 1)?);
            Ok((query, k, v, Source::Projections))
        }
        (None, None) => {
            let q = take(node, query, 3, 0)?;
            let (k, v) = (take(node, query, 3, 1)?, take(node, query, 3, 2)?);
            Ok((q, k, v, Source::Projections))
        }
        (None, Some(_)) => misfit("has a value without a key".into()),
    }
}

/// x and the part of a bias from `start` on, in heads.
fn split_with_bias(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    bias: Option<ValueId>,
    start: usize,
    heads: usize,
) -> Result<ValueId> {
    let mut x = x;
    if let Some(bias) = bias {
        let size = node.shape(x).last().copied().unwrap_or(0);
        if node.shape(bias).rank() != 1 || node.shape(bias)[0] < start.saturating_add(size) {
            return misfit(format!("bias {} of {}", node.ty(bias), node.ty(x)));
        }
        let bias = part_of(node, &format!("{part}_bias"), bias, start, size)?;
        x = node.add(&format!("{part}_biased"), x, bias)?;
    }
    let split = split_heads(node, &format!("{part}_split"), x, heads)?;
    by_head(node, &format!("{part}_heads"), split)
}

/// The places of the queries of a call of [`group_query_attention`].
struct Places {
    batch: usize,
    /// Number of queries.
    rows: usize,
    /// Number of keys, of the longest image.
    total: usize,
    /// Number of keys before the first query of each image, `[batch, 1, 1, 1]` of f32; none where it is `total - rows` for
    /// all.
    before: Option<ValueId>,
}

impl Places {
    /// The place of each query, `[batch or 1, 1, rows, 1]`.
    fn of_queries(&self, node: &mut Node<'_, '_>, part: &str) -> Result<ValueId> {
        match self.before {
            None => node.counting(part, [1, 1, self.rows, 1], self.total - self.rows),
            Some(before) => {
                let steps = node.counting(&format!("{part}_steps"), [1, 1, self.rows, 1], 0)?;
                node.add(part, steps, before)
            }
        }
    }

    /// −∞ for the keys that a query does not see: those behind its own place and, with a window, those before the `window`
    /// keys that precede it.
    fn bias(&self, node: &mut Node<'_, '_>, window: Option<usize>, dtype: DType) -> Result<ValueId> {
        let keys = node.counting("keys", [self.total], 0)?;
        let own = self.of_queries(node, "places")?;
        let mut sees = node.binary("is_causal", BinaryKind::LessOrEqual, keys, own)?;
        if let Some(window) = window {
            let window = node.number("window", window as f64, DType::F32)?;
            let first = node.sub("first_in_window", own, window)?;
            let within = node.binary("is_in_window", BinaryKind::Greater, keys, first)?;
            sees = node.binary("is_seen", BinaryKind::And, sees, within)?;
        }
        let (zero, hidden) =
            (node.number("seen", 0.0, dtype)?, node.number("hidden", f64::NEG_INFINITY, dtype)?);
        node.chosen("sight", sees, zero, hidden)
    }

    /// The cache with new elements behind those before, `[batch, heads, length, size]`: behind them are zeros up to the
    /// length of the cache.
    fn cached(
        &self,
        node: &mut Node<'_, '_>,
        part: &str,
        past: Option<ValueId>,
        x: ValueId,
    ) -> Result<ValueId> {
        let Some(past) = past else { return Ok(x) };
        let capacity = node.shape(past).get(2).copied().unwrap_or(0);
        let first = self.total - self.rows;
        if self.before.is_none() {
            let old =
                node.sliced(&format!("{part}_past"), 2, SliceSpec { start: 0, len: first, step: 1 }, past)?;
            let parts = if first > 0 { vec![old, x] } else { vec![x] };
            let all = node.joined(&format!("{part}_so_far"), 2, &parts)?;
            return node.padded(&format!("{part}_present"), 2, capacity.saturating_sub(self.total), 0.0, all);
        }
        self.picked(node, part, past, x, capacity.max(self.total))
    }

    /// The same where images have different numbers of keys: positions are picked by index.
    fn picked(
        &self,
        node: &mut Node<'_, '_>,
        part: &str,
        past: ValueId,
        x: ValueId,
        length: usize,
    ) -> Result<ValueId> {
        let Some(before) = self.before else { return Ok(x) };
        let capacity = node.shape(past).get(2).copied().unwrap_or(0);
        let both = node.joined(&format!("{part}_both"), 2, &[past, x])?;
        let both = node.padded(&format!("{part}_and_zero"), 2, 1, 0.0, both)?;
        let both = node.permuted(&format!("{part}_by_place"), [0, 2, 1, 3], both)?;
        let places = node.counting(&format!("{part}_slots"), [1, length], 0)?;
        let before = node.shaped(&format!("{part}_before"), [self.batch, 1], before)?;
        // Old ones stay where they are; new ones follow the cache in `both`.
        let offset = node.number(&format!("{part}_capacity"), capacity as f64, DType::F32)?;
        let step = node.sub(&format!("{part}_step"), places, before)?;
        let new = node.add(&format!("{part}_new"), step, offset)?;
        let rows = node.number(&format!("{part}_rows"), self.rows as f64, DType::F32)?;
        let zero = node.number(&format!("{part}_zero"), 0.0, DType::F32)?;
        let from_first =
            node.binary(&format!("{part}_from_first"), BinaryKind::GreaterOrEqual, step, zero)?;
        let to_last = node.binary(&format!("{part}_to_last"), BinaryKind::Less, step, rows)?;
        let is_new = node.binary(&format!("{part}_is_new"), BinaryKind::And, from_first, to_last)?;
        // Behind the new ones stands a zero.
        let zeros = node.number(&format!("{part}_zeros"), (capacity + self.rows) as f64, DType::F32)?;
        let is_old = node.binary(&format!("{part}_is_old"), BinaryKind::Less, step, zero)?;
        let old = node.chosen(&format!("{part}_old"), is_old, places, zeros)?;
        let index = node.chosen(&format!("{part}_index_float"), is_new, new, old)?;
        let index = node.cast_to(&format!("{part}_index"), DType::S64, index)?;
        let index = node.shaped(&format!("{part}_tuples"), [self.batch, length, 1], index)?;
        let picked = node.emit_part(&format!("{part}_picked"), GatherNd { batch_dims: 1 }, &[both, index])?;
        node.permuted(&format!("{part}_present"), [0, 2, 1, 3], picked)
    }
}

/// Attention whose keys and values are fewer heads than the queries, with a cache, turned by their places.
pub(super) fn group_query_attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let query = node.operand(0, "query")?;
    let (key, value) = (node.optional(1), node.optional(2));
    let past = [node.optional(3), node.optional(4)];
    let lengths = node.operand(5, "seqlens_k")?;
    let total = node.required(6, "total_sequence_length")?;
    let caches = [node.optional(7), node.optional(8)];
    let (positions, more) = (node.optional(9), node.optional(10));
    let sink = node.optional(11);
    let norms = [node.optional(14), node.optional(15)];
    check_plain_cache(node)?;
    node.check_float("query", query)?;
    let (heads, kv_heads) = (required_count(node, "num_heads")?, required_count(node, "kv_num_heads")?);
    let (q, k, v) = grouped(node, (heads, kv_heads), query, key, value)?;
    let &[batch, rows, _, _] = node.shape(q).dims() else { return misfit("queries of 4 dimensions".into()) };
    let total = match total.to_i64().as_deref() {
        Some(&[n]) => usize::try_from(n).ok().filter(|&n| n >= rows),
        _ => None,
    };
    let total =
        total.ok_or_else(|| OpError::shape(format!("total_sequence_length is below {rows} queries")))?;
    if node.shape(lengths).elements() != batch {
        return misfit(format!("seqlens_k {} for {batch} images", node.ty(lengths)));
    }
    let before = match batch == 1 || rows == total {
        true => None,
        false => {
            let lengths = node.cast_to("lengths", DType::F32, lengths)?;
            let rest = node.number("rows_less_one", rows as f64 - 1.0, DType::F32)?;
            let before = node.sub("before_flat", lengths, rest)?;
            Some(node.shaped("before", [batch, 1, 1, 1], before)?)
        }
    };
    let places = Places { batch, rows, total, before };
    let (q, k) = normalised_heads(node, norms, q, k)?;
    let (q, k) = turned(node, &places, caches, positions, q, k)?;
    let query = by_head(node, "query_heads", q)?;
    let (key, value) = (by_head(node, "key_heads", k)?, by_head(node, "value_heads", v)?);
    let key = places.cached(node, "key", past[0], key)?;
    let value = places.cached(node, "value", past[1], value)?;
    let used = SliceSpec { start: 0, len: total, step: 1 };
    let (used_key, used_value) =
        (node.sliced("key_used", 2, used, key)?, node.sliced("value_used", 2, used, value)?);

    let mut call = Call::new(node, query, used_key, used_value);
    call.softcap = node.float("softcap", 0.0)?;
    let dtype = computed_in(node, query);
    call.sink = sink_of(node, sink, heads, dtype)?;
    let window = match node.int("local_window_size", -1)? {
        n @ ..0 => {
            if n == -1 {
                None
            } else {
                return Err(NodeError::attribute("local_window_size", format!("is {n}")));
            }
        }
        n => Some(usize::try_from(n).unwrap_or(usize::MAX)),
    };
    let bias = match node.flag("causal", true)? {
        true => Some(places.bias(node, window, dtype)?),
        false => None,
    };
    let (y, attended) = call.attend(node, bias, more)?;
    let scores = match node.int("qk_output", 0)? {
        0 if node.wants(3) => return misfit("gives out its scores, where qk_output is 0".into()),
        0 => return Ok(vec![y, key, value]),
        1 => attended.biased,
        2 => attended.probabilities,
        other => return Err(NodeError::attribute("qk_output", format!("is {other}"))),
    };
    let scores = node.cast_to("qk", call.own, scores)?;
    Ok(vec![y, key, value, scores])
}

fn check_plain_cache(node: &mut Node<'_, '_>) -> Result<()> {
    let quantized = ["k_quant_type", "v_quant_type"]
        .into_iter()
        .map(|name| node.string(name, "NONE").map(|kind| kind != "NONE"))
        .collect::<Result<Vec<_>>>()?;
    let scaled = !node.is_left_out(12) || !node.is_left_out(13);
    node.ignore(&["kv_cache_bit_width"]);
    if scaled || quantized.contains(&true) {
        return refuse("keeps keys and values as quantized numbers");
    }
    if node.flag("sliding_window_cache", false)? || !node.is_left_out(16) {
        return refuse("keeps a window of keys, or images of different numbers of queries");
    }
    Ok(())
}

/// Queries, keys and values, `[batch, length, heads, size]`; from three operands or one.
fn grouped(
    node: &mut Node<'_, '_>,
    (heads, kv_heads): (usize, usize),
    query: ValueId,
    key: Option<ValueId>,
    value: Option<ValueId>,
) -> Result<(ValueId, ValueId, ValueId)> {
    let (q, k, v) = match (key, value) {
        (Some(key), Some(value)) => (query, key, value),
        (None, None) => {
            let width = node.shape(query).last().copied().unwrap_or(0);
            let all = heads.saturating_add(kv_heads.saturating_mul(2));
            if !width.is_multiple_of(all) {
                return misfit(format!("{} does not hold {all} heads", node.ty(query)));
            }
            let size = width / all;
            let (own, shared) = (heads * size, kv_heads * size);
            (
                part_of(node, "query_packed", query, 0, own)?,
                part_of(node, "key_packed", query, own, shared)?,
                part_of(node, "value_packed", query, own + shared, shared)?,
            )
        }
        _ => return misfit("has a key or a value, not both".into()),
    };
    Ok((
        split_heads(node, "query_split", q, heads)?,
        split_heads(node, "key_split", k, kv_heads)?,
        split_heads(node, "value_split", v, kv_heads)?,
    ))
}

/// Queries and keys by the root of the mean of their squares, head by head, where there are weights.
fn normalised_heads(
    node: &mut Node<'_, '_>,
    weights: [Option<ValueId>; 2],
    q: ValueId,
    k: ValueId,
) -> Result<(ValueId, ValueId)> {
    let both = node.float("qk_norm_epsilon", 1e-6)?;
    let [q_epsilon, k_epsilon] = [node.float("q_norm_epsilon", both)?, node.float("k_norm_epsilon", both)?];
    match weights {
        [None, None] => Ok((q, k)),
        [Some(q_weight), Some(k_weight)] => Ok((
            super::norm::rms_part(node, "query_norm", q, q_weight, q_epsilon)?,
            super::norm::rms_part(node, "key_norm", k, k_weight, k_epsilon)?,
        )),
        _ => misfit("has weights for the norm of queries or of keys, not both".into()),
    }
}

/// Queries and keys turned by the angles of their places, where the attribute `do_rotary` asks for it.
fn turned(
    node: &mut Node<'_, '_>,
    places: &Places,
    caches: [Option<ValueId>; 2],
    positions: Option<ValueId>,
    q: ValueId,
    k: ValueId,
) -> Result<(ValueId, ValueId)> {
    let interleaved = node.flag("rotary_interleaved", false)?;
    if !node.flag("do_rotary", false)? {
        return Ok((q, k));
    }
    let [Some(cos), Some(sin)] = caches else {
        return Err(NodeError::MissingOperand { slot: 7, role: "cos_cache" });
    };
    let positions = match positions {
        Some(positions) => positions,
        None => {
            let own = places.of_queries(node, "rotary_places")?;
            let batch = node.shape(own)[0];
            let own = node.shaped("rotary_rows", [batch, places.rows], own)?;
            node.cast_to("positions", DType::S64, own)?
        }
    };
    let extent = node.shape(cos).last().copied().unwrap_or(0).saturating_mul(2);
    let cos = angles(node, "cos", cos, Some(positions))?;
    let sin = angles(node, "sin", sin, Some(positions))?;
    let turn = Rotation {
        cos: beside_heads(node, "cos_of_heads", cos, 1)?,
        sin: beside_heads(node, "sin_of_heads", sin, 1)?,
        extent,
        interleaved,
    };
    Ok((rotate(node, "query_turned", q, &turn)?, rotate(node, "key_turned", k, &turn)?))
}

/// The score of a sink, which is 0 for `smooth_softmax`.
fn sink_of(
    node: &mut Node<'_, '_>,
    sink: Option<ValueId>,
    heads: usize,
    dtype: DType,
) -> Result<Option<ValueId>> {
    let smooth = node.int("smooth_softmax", -1)? > 0;
    match sink {
        Some(sink) => node.shaped("sink", [1, heads, 1, 1], sink).map(Some),
        None if smooth => {
            let zero = node.number("smooth", 0.0, dtype)?;
            node.expanded("smooth_heads", [1, heads, 1, 1], zero).map(Some)
        }
        None => Ok(None),
    }
}

/// Heads turned by the angles of their positions, which stand as numbers or begin at one.
pub(super) fn rotary_embedding(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, positions) = (node.operand(0, "input")?, node.operand(1, "position_ids")?);
    let (cos, sin) = (node.operand(2, "cos_cache")?, node.operand(3, "sin_cache")?);
    let interleaved = node.flag("interleaved", false)?;
    let heads = node.int("num_heads", 0)?;
    let given = node.int("rotary_embedding_dim", 0)?;
    node.ignore(&["scale"]);
    if node.flag("is_packed_batching", false)? {
        return refuse("sequences without padding, packed, are not supported");
    }
    let (shape, pairs) = (node.shape(x), node.shape(cos).last().copied().unwrap_or(0));
    let extent = pairs.saturating_mul(2);
    let (split, axis) = match *shape.dims() {
        [_, _, _, _] => (x, 2),
        [_, _, hidden] => {
            let size = if given > 0 && heads > 0 { hidden / heads as usize } else { extent };
            let count = if size > 0 && hidden.is_multiple_of(size) { hidden / size } else { 0 };
            (split_heads(node, "heads", x, count)?, 1)
        }
        _ => return misfit(format!("takes 3 or 4 dimensions, got {}", node.ty(x))),
    };
    let rows = node.shape(split)[axis];
    let positions = match node.shape(positions).rank() {
        2 => positions,
        _ => {
            let start = node.cast_to("start", DType::F32, positions)?;
            let start = node.shaped("first", [1, 1], start)?;
            let steps = node.counting("steps", [1, rows], 0)?;
            let places = node.add("places", steps, start)?;
            node.cast_to("positions", DType::S64, places)?
        }
    };
    let (cos, sin) = (angles(node, "cos", cos, Some(positions))?, angles(node, "sin", sin, Some(positions))?);
    let turn = Rotation {
        cos: beside_heads(node, "cos_of_heads", cos, axis)?,
        sin: beside_heads(node, "sin_of_heads", sin, axis)?,
        extent,
        interleaved,
    };
    if axis == 2 {
        return rotate(node, "", split, &turn);
    }
    let y = rotate(node, "turned", split, &turn)?;
    node.shaped("", shape, y)
}

/// Heads turned by the angles of three positions each, of time, height and width: each pair of elements by those of one.
pub(super) fn multimodal_rotary_embedding(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, positions) = (node.operand(0, "input")?, node.operand(1, "position_ids")?);
    let (cos, sin) = (node.operand(2, "cos_cache")?, node.operand(3, "sin_cache")?);
    let interleaved = node.flag("interleaved", false)?;
    let heads = usize::try_from(node.int("num_heads", 0)?).unwrap_or(0);
    // How many elements of a head are turned, the angles say.
    node.ignore(&["rotary_embedding_dim", "scale"]);
    if node.flag("is_packed_batching", false)? {
        return refuse("sequences without padding, packed, are not supported");
    }
    let pairs = node.shape(cos).last().copied().unwrap_or(0);
    let sections = node.ints("mrope_section")?.unwrap_or_default();
    let sections = super::lengths("mrope_section", &sections)?;
    let total = sections.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
    let (&[_, height, width], true) = (&sections[..], total == pairs) else {
        return Err(NodeError::attribute("mrope_section", format!("is {sections:?} of {pairs} pairs")));
    };
    let time = sections[0];
    // The position that turns a pair.
    let place: Box<dyn Fn(usize) -> usize> = match node.int("mrope_layout", 0)? {
        0 => Box::new(move |pair| usize::from(pair >= time) + usize::from(pair >= time + height)),
        1 => Box::new(move |pair| match (pair % 3, pair / 3) {
            (1, round) if round < height => 1,
            (2, round) if round < width => 2,
            _ => 0,
        }),
        other => return Err(NodeError::attribute("mrope_layout", format!("is {other}"))),
    };
    let (shape, extent) = (node.shape(x), pairs.saturating_mul(2));
    let (split, axis) = match *shape.dims() {
        [_, _, _, _] => (x, 2),
        [_, _, hidden] => {
            let count = if heads == 0 { hidden / extent.max(1) } else { heads };
            (split_heads(node, "heads", x, count)?, 1)
        }
        _ => return misfit(format!("takes 3 or 4 dimensions, got {}", node.ty(x))),
    };
    let &[3, batch, length] = node.shape(positions).dims() else {
        return misfit(format!("positions must be 3 times batch and length, got {}", node.ty(positions)));
    };
    let mut turned = Vec::new();
    for (cache, part) in [(cos, "cos"), (sin, "sin")] {
        let all = angles(node, part, cache, Some(positions))?;
        let mut chosen = None;
        for (i, of) in ["time", "height", "width"].into_iter().enumerate() {
            let row = SliceSpec { start: i, len: 1, step: 1 };
            let row = node.sliced(&format!("{part}_{of}_row"), 0, row, all)?;
            let row = node.shaped(&format!("{part}_{of}"), [batch, length, pairs], row)?;
            chosen = Some(match chosen {
                None => row,
                Some(before) => {
                    let is_own = (0..pairs).map(|pair| u8::from(place(pair) == i)).collect();
                    let is_own = Tensor::from_vec_as::<u8>(DType::Bool, Shape::new([pairs])?, is_own);
                    let is_own =
                        node.constant_part(&format!("{part}_is_{of}"), is_own.map_err(OpError::from)?);
                    node.chosen(&format!("{part}_by_{of}"), is_own, row, before)?
                }
            });
        }
        if let Some(chosen) = chosen {
            turned.push(beside_heads(node, &format!("{part}_of_heads"), chosen, axis)?);
        }
    }
    let &[cos, sin] = &turned[..] else { return misfit("angles of two functions".into()) };
    let turn = Rotation { cos, sin, extent, interleaved };
    if axis == 2 {
        return rotate(node, "", split, &turn);
    }
    let y = rotate(node, "turned", split, &turn)?;
    node.shaped("", shape, y)
}
