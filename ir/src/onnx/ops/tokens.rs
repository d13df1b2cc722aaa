//! Ops around tokens: their hashes, embeddings by their characters, and what may not be said again.

use super::{compose::Result, contrib_attention::required_count, strings};
use crate::{
    DType, OpError, Tensor, ValueId,
    limits::MAX_GRAM_TOKENS,
    onnx::{NodeError, import::Node},
    ops::{
        BinaryKind, BitCast, Clamp, Conv, Layout, ReduceKind, ScatterElements, SliceSpec, UnaryKind, Update,
        Window,
    },
};

/// Scores, −∞ for each token that would end an n-gram which is there already: one of which all but the last token are the last
/// tokens so far.
pub(super) fn n_gram_repeat_block(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (ids, scores) = (node.operand(0, "input_ids")?, node.operand(1, "scores")?);
    let n = required_count(node, "ngram_size")?;
    let (&[batch, length], &[of_scores, _]) = (node.shape(ids).dims(), node.shape(scores).dims()) else {
        let why = format!("takes rows of tokens and of scores, got {} and {}", node.ty(ids), node.ty(scores));
        return Err(OpError::shape(why).into());
    };
    if n > MAX_GRAM_TOKENS {
        return Err(NodeError::attribute(
            "ngram_size",
            format!("is {n}; at most {MAX_GRAM_TOKENS} are supported"),
        ));
    }
    if batch != of_scores {
        return Err(OpError::shape(format!("scores {} for {}", node.ty(scores), node.ty(ids))).into());
    }
    if length < n {
        return Ok(scores);
    }
    let starts = length - n + 1;
    let mut is_said = None;
    for i in 0..n - 1 {
        let own = SliceSpec { start: i, len: starts, step: 1 };
        let own = node.sliced(&format!("token{i}"), 1, own, ids)?;
        let last = SliceSpec { start: starts + i, len: 1, step: 1 };
        let last = node.sliced(&format!("last{i}"), 1, last, ids)?;
        let same = node.binary(&format!("same{i}"), BinaryKind::Equal, own, last)?;
        is_said = Some(match is_said {
            None => same,
            Some(all) => node.binary(&format!("same_up_to{i}"), BinaryKind::And, all, same)?,
        });
    }
    let ends = SliceSpec { start: n - 1, len: starts, step: 1 };
    let ends = node.sliced("ends", 1, ends, ids)?;
    let lowest = node.number("lowest", f64::NEG_INFINITY, DType::F32)?;
    let bounds = match is_said {
        Some(is_said) => {
            let highest = node.number("highest", f64::INFINITY, DType::F32)?;
            node.chosen("bounds", is_said, lowest, highest)?
        }
        None => node.expanded("bounds", [batch, starts], lowest)?,
    };
    node.emit(ScatterElements { axis: 1, update: Update::Min }, &[scores, ends, bounds])
}

/// Embeddings of words by their characters: a convolution along each, tanh, and the largest of all places. A word ends where its
/// characters are 0, and has as many places as it has characters, but one at least; one without characters gives 0.
pub(super) fn word_conv_embedding(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (words, w) = (node.operand(0, "Sequence")?, node.operand(1, "W")?);
    let (bias, table) = (node.operand(2, "B")?, node.operand(3, "C")?);
    let (&[count, length], &[filters, 1, kernel, size], &[_, of_table]) =
        (node.shape(words).dims(), node.shape(w).dims(), node.shape(table).dims())
    else {
        let why = format!(
            "takes words, filters and a table, got {}, {} and {}",
            node.ty(words),
            node.ty(w),
            node.ty(table)
        );
        return Err(OpError::shape(why).into());
    };
    for (name, actual) in
        [("embedding_size", filters), ("conv_window_size", kernel), ("char_embedding_size", size)]
    {
        let given = node.int(name, -1)?;
        if given != -1 && usize::try_from(given) != Ok(actual) {
            return Err(NodeError::attribute(name, format!("is {given}, of weights with {actual}")));
        }
    }
    if size != of_table || kernel == 0 || length < kernel {
        let why = format!("filters {} over {length} characters of {}", node.ty(w), node.ty(table));
        return Err(OpError::shape(why).into());
    }
    let places = length - kernel + 1;
    let characters = node.gathered("characters", 0, table, words)?;
    let image = node.shaped("image", [count, 1, length, size], characters)?;
    let window = Window::new(vec![kernel, size]);
    let conv = Conv {
        window,
        groups: 1,
        bias: true,
        residual: false,
        clamp: Clamp::NONE,
        layout: Layout::ChannelsFirst,
    };
    let y = node.emit_part("filtered", conv, &[image, w, bias])?;
    let y = node.shaped("places", [count, filters, places], y)?;
    let y = node.unary("tanh", UnaryKind::Tanh, y)?;
    // A word whose first character is 0 has none.
    let zero = node.constant_part("no_character", Tensor::scalar(0i32));
    let words = node.cast_to("words", DType::S32, words)?;
    let is_character = node.binary("is_character", BinaryKind::Greater, words, zero)?;
    let ones = node.cast_to("ones", DType::F32, is_character)?;
    let lengths = node.reduced("lengths", ReduceKind::Sum, vec![1], ones)?;
    let one_place = node.number("one_place", kernel as f64, DType::F32)?;
    let longest = node.binary("at_least_one", BinaryKind::Max, lengths, one_place)?;
    let before = node.counting("place", [1, places], kernel)?;
    let is_place = node.binary("is_place", BinaryKind::LessOrEqual, before, longest)?;
    let is_place = node.shaped("is_place_of_filters", [count, 1, places], is_place)?;
    let lowest = node.number("lowest", -1e12, DType::F32)?;
    let y = node.chosen("within", is_place, y, lowest)?;
    let y = node.reduced("largest", ReduceKind::Max, vec![2], y)?;
    let y = node.shaped("features", [count, filters], y)?;
    let first = node.sliced("first", 1, SliceSpec { start: 0, len: 1, step: 1 }, is_character)?;
    let none = node.number("none", 0.0, DType::F32)?;
    node.chosen("", first, y, none)
}

/// The 32-bit form of MurmurHash3 of each element: of its 4 or 8 bytes, or of those of a text.
pub(super) fn murmur_hash(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let to = if node.flag("positive", true)? { DType::U32 } else { DType::S32 };
    let seed = node.int("seed", 0)? as u32;
    let hash = match node.ty(x).dtype {
        DType::Str => return strings::hashed(node, to, |bytes| murmur(bytes, seed)),
        DType::S32 | DType::F32 => {
            let bits = node.emit_part("bits", BitCast { to: DType::U32 }, &[x])?;
            hashed(node, &[bits], seed)?
        }
        DType::U32 => hashed(node, &[x], seed)?,
        DType::S64 | DType::F64 | DType::U64 => {
            let bits = match node.ty(x).dtype {
                DType::U64 => x,
                _ => node.emit_part("bits", BitCast { to: DType::U64 }, &[x])?,
            };
            let mask = node.constant_part("mask", Tensor::scalar(u64::from(u32::MAX)));
            let half = node.constant_part("half", Tensor::scalar(32u64));
            let low = node.binary("low_bits", BinaryKind::And, bits, mask)?;
            let high = node.binary("high_bits", BinaryKind::ShiftRight, bits, half)?;
            let halves = [node.cast_to("low", DType::U32, low)?, node.cast_to("high", DType::U32, high)?];
            hashed(node, &halves, seed)?
        }
        other => {
            return Err(
                OpError::dtype(format!("takes numbers of 32 and 64 bits and texts, got {other}")).into()
            );
        }
    };
    match to {
        DType::U32 => Ok(hash),
        to => node.emit(BitCast { to }, &[hash]),
    }
}

const BLOCK: [u32; 2] = [0xcc9e_2d51, 0x1b87_3593];
const MIX: [u32; 2] = [0x85eb_ca6b, 0xc2b2_ae35];
const ADDED: u32 = 0xe654_6b64;

/// The same on values of u32.
fn hashed(node: &mut Node<'_, '_>, blocks: &[ValueId], seed: u32) -> Result<ValueId> {
    let constant =
        |node: &mut Node<'_, '_>, name: &str, value: u32| node.constant_part(name, Tensor::scalar(value));
    let rotated = |node: &mut Node<'_, '_>, part: &str, x: ValueId, by: u32| -> Result<ValueId> {
        let (left, right) =
            (constant(node, &format!("{part}_left"), by), constant(node, &format!("{part}_right"), 32 - by));
        let high = node.binary(&format!("{part}_high"), BinaryKind::ShiftLeft, x, left)?;
        let low = node.binary(&format!("{part}_low"), BinaryKind::ShiftRight, x, right)?;
        node.binary(part, BinaryKind::Or, high, low)
    };
    let mut hash = constant(node, "seed", seed);
    for (i, &block) in blocks.iter().enumerate() {
        let [first, second] = BLOCK.map(|c| constant(node, &format!("factor{i}"), c));
        let k = node.mul(&format!("first{i}"), block, first)?;
        let k = rotated(node, &format!("block{i}_turned"), k, 15)?;
        let k = node.mul(&format!("second{i}"), k, second)?;
        hash = node.binary(&format!("mixed{i}"), BinaryKind::Xor, hash, k)?;
        hash = rotated(node, &format!("hash{i}_turned"), hash, 13)?;
        let (five, added) =
            (constant(node, &format!("five{i}"), 5), constant(node, &format!("added{i}"), ADDED));
        hash = node.mul(&format!("times_five{i}"), hash, five)?;
        hash = node.add(&format!("hash{i}"), hash, added)?;
    }
    let length = constant(node, "length", 4 * blocks.len() as u32);
    hash = node.binary("with_length", BinaryKind::Xor, hash, length)?;
    for (i, (by, factor)) in [(16, Some(MIX[0])), (13, Some(MIX[1])), (16, None)].into_iter().enumerate() {
        let by = constant(node, &format!("shift{i}"), by);
        let shifted = node.binary(&format!("shifted{i}"), BinaryKind::ShiftRight, hash, by)?;
        hash = node.binary(&format!("folded{i}"), BinaryKind::Xor, hash, shifted)?;
        if let Some(factor) = factor {
            let factor = constant(node, &format!("mix{i}"), factor);
            hash = node.mul(&format!("mixed_again{i}"), hash, factor)?;
        }
    }
    Ok(hash)
}

/// The same of bytes.
fn murmur(bytes: &[u8], seed: u32) -> u32 {
    let block = |k: u32| k.wrapping_mul(BLOCK[0]).rotate_left(15).wrapping_mul(BLOCK[1]);
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |sum, &b| sum << 8 | u32::from(b));
    let mut blocks = bytes.chunks_exact(4);
    let mut hash = seed;
    for k in blocks.by_ref() {
        hash = (hash ^ block(number(k))).rotate_left(13).wrapping_mul(5).wrapping_add(ADDED);
    }
    hash ^= block(number(blocks.remainder()));
    hash ^= bytes.len() as u32;
    hash = (hash ^ hash >> 16).wrapping_mul(MIX[0]);
    hash = (hash ^ hash >> 13).wrapping_mul(MIX[1]);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::murmur;

    #[test]
    fn texts_hash_to_what_the_algorithms_author_gives() {
        // Of SMHasher's own vectors.
        assert_eq!(murmur(b"", 0), 0);
        assert_eq!(murmur(b"", 1), 0x514e_28b7);
        assert_eq!(murmur(b"test", 0), 0xba6b_d213);
        assert_eq!(murmur(b"Hello, world!", 0), 0xc036_3e43);
    }
}
