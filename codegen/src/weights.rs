//! The one block of read-only data of a model: packed weights, tables, parameters.

use crate::{CodegenError, dense::spec::SLACK, memory::Memory};
use std::{collections::HashMap, sync::Arc};
use xxhash_rust::xxh3::xxh3_64;

/// A block under construction. Its parts belong to who reserved them, so that threads can write them.
pub(crate) struct WeightBlock<'m> {
    /// What is not reserved, from offset `len` on.
    free: &'m mut [u8],
    len: usize,
    /// Whether a part did not fit.
    outgrown: bool,
    /// Parts that were added, by hash; only ever looked up, so that hash order shows nowhere.
    parts: HashMap<u64, Vec<Part>>,
}

/// Offset and bytes of a part.
type Part = (u32, Arc<[u8]>);

/// A part that is still zeros, and what belongs there.
///
/// To write it takes memory for all around it, in huge pages: that is left to who packs the weights next to it, so that
/// the block takes memory only as constants give theirs back.
pub(crate) struct Unwritten<'m> {
    part: &'m mut [u8],
    bytes: Arc<[u8]>,
}

impl Unwritten<'_> {
    /// Writes it.
    pub(crate) fn write(self) {
        self.part.copy_from_slice(&self.bytes);
    }
}

/// Largest block: offsets have 32 bits.
pub(crate) const MAX_WEIGHT_BYTES: usize = u32::MAX as usize;
impl<'m> WeightBlock<'m> {
    /// A block in this memory, which is all zeros and begins on a cache line.
    pub(crate) fn new(memory: &'m mut [u8]) -> WeightBlock<'m> {
        WeightBlock { free: memory, len: 0, outgrown: false, parts: HashMap::new() }
    }

    /// Offset of a part with these bytes, aligned to `align` (a power of two, at most 64). Equal parts are one: only the
    /// first time there is something to be written.
    pub(crate) fn add(
        &mut self,
        bytes: &[u8],
        align: usize,
    ) -> Result<(u32, Option<Unwritten<'m>>), CodegenError> {
        let hash = xxh3_64(bytes);
        for (offset, part) in self.parts.get(&hash).into_iter().flatten() {
            if (*offset as usize).is_multiple_of(align) && **part == *bytes {
                return Ok((*offset, None));
            }
        }
        let (offset, part) = self.reserve(bytes.len(), align)?;
        let bytes: Arc<[u8]> = bytes.into();
        self.parts.entry(hash).or_default().push((offset, bytes.clone()));
        Ok((offset, Some(Unwritten { part, bytes })))
    }

    /// Offset of a new part of zeros, aligned likewise, and the part, to be written by the caller.
    ///
    /// # Errors
    /// Where the memory is used up: see [`is_outgrown`](Self::is_outgrown).
    pub(crate) fn reserve(
        &mut self,
        bytes: usize,
        align: usize,
    ) -> Result<(u32, &'m mut [u8]), CodegenError> {
        let before = self.len.next_multiple_of(align) - self.len;
        let behind = before.saturating_add(bytes);
        if behind.saturating_add(SLACK) > self.free.len() {
            self.outgrown = true;
            return Err(CodegenError::TooLarge {
                what: "the weights".into(),
                bytes: (self.len.saturating_add(behind)) as u64,
                limit: MAX_WEIGHT_BYTES as u64,
            });
        }
        let (own, free) = std::mem::take(&mut self.free).split_at_mut(behind);
        self.free = free;
        let offset = self.len + before;
        self.len = offset + bytes;
        Ok((offset as u32, &mut own[before..]))
    }

    /// Whether a part was refused: more memory may help.
    pub(crate) fn is_outgrown(&self) -> bool {
        self.outgrown
    }

    /// Bytes in use, with readable slack behind the last part.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// The finished block.
pub(crate) struct Weights {
    memory: Memory,
    len: usize,
}

impl Weights {
    /// What a [`WeightBlock`] of this length left in its memory.
    pub(crate) fn new(memory: Memory, len: usize) -> Weights {
        Weights { memory, len }
    }
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.memory.bytes().as_ptr()
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    #[cfg(test)]
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.memory.bytes()[..self.len].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_where_their_offsets_say_and_equal_ones_are_one() {
        let mut memory = vec![0; 1 << 20];
        let mut block = WeightBlock::new(&mut memory);
        let parts: Vec<Vec<u8>> = (0..40u8).map(|i| vec![i; 500 * usize::from(i)]).collect();
        let (at, unwritten): (Vec<u32>, Vec<_>) = parts.iter().map(|p| block.add(p, 64).unwrap()).unzip();
        for (part, at) in parts.iter().zip(&at) {
            assert!(matches!(block.add(part, 64), Ok((same, None)) if same == *at), "equal parts are one");
        }
        let len = block.len();
        unwritten.into_iter().flatten().for_each(Unwritten::write);
        for (part, at) in parts.iter().zip(at) {
            assert!(at.is_multiple_of(64));
            assert_eq!(memory[at as usize..][..part.len()], part[..]);
        }
        assert!(memory[len..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_part_that_does_not_fit_is_refused() {
        let mut memory = vec![0; 200];
        let mut block = WeightBlock::new(&mut memory);
        assert!(block.reserve(100, 64).is_ok() && !block.is_outgrown());
        for too_many in [100, 5 << 30, usize::MAX] {
            assert!(matches!(block.reserve(too_many, 64), Err(CodegenError::TooLarge { .. })));
        }
        assert!(block.is_outgrown());
    }
}
