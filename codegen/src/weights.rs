//! The one block of read-only data of a model: packed weights, tables, parameters.

use crate::{CodegenError, dense::spec::SLACK, memory::Memory};
use std::collections::HashMap;
use xxhash_rust::xxh3::xxh3_64;

/// A block under construction.
pub(crate) struct WeightBlock {
    memory: Memory,
    len: usize,
    /// Small parts by hash; only ever looked up, so that hash order shows nowhere.
    parts: HashMap<u64, Vec<(u32, usize)>>,
}

/// Largest block: offsets have 32 bits.
const MAX_WEIGHT_BYTES: u64 = u32::MAX as u64;
/// Parts up to this size are stored once: tables and constants repeat, packed weights do not.
const SMALL: usize = 64 << 10;

impl WeightBlock {
    /// An empty block. One that gets larger than `expected` bytes is moved, which costs time but is no error.
    pub(crate) fn new(expected: usize) -> Result<WeightBlock, CodegenError> {
        Ok(WeightBlock { memory: Memory::zeroed(expected + SLACK)?, len: 0, parts: HashMap::new() })
    }

    /// Offset of a part with these bytes, aligned to `align` (a power of two, at most 64). Small equal parts are one.
    pub(crate) fn add(&mut self, bytes: &[u8], align: usize) -> Result<u32, CodegenError> {
        if bytes.len() > SMALL {
            let (offset, part) = self.reserve(bytes.len(), align)?;
            part.copy_from_slice(bytes);
            return Ok(offset);
        }
        let hash = xxh3_64(bytes);
        for &(offset, len) in self.parts.get(&hash).into_iter().flatten() {
            let at = offset as usize;
            if at.is_multiple_of(align) && self.memory.bytes()[at..at + len] == *bytes {
                return Ok(offset);
            }
        }
        let (offset, part) = self.reserve(bytes.len(), align)?;
        part.copy_from_slice(bytes);
        self.parts.entry(hash).or_default().push((offset, bytes.len()));
        Ok(offset)
    }

    /// Offset of a new part of zeros, aligned likewise, and the part, to be written in place.
    pub(crate) fn reserve(&mut self, bytes: usize, align: usize) -> Result<(u32, &mut [u8]), CodegenError> {
        let at = self.len.next_multiple_of(align);
        let end = (at as u64).saturating_add(bytes as u64).saturating_add(SLACK as u64);
        if end > MAX_WEIGHT_BYTES {
            return Err(CodegenError::TooLarge {
                what: "the weights".into(),
                bytes: end,
                limit: MAX_WEIGHT_BYTES,
            });
        }
        if end as usize > self.memory.bytes().len() {
            let mut larger = Memory::zeroed((2 * end as usize).min(MAX_WEIGHT_BYTES as usize))?;
            larger.bytes_mut()[..self.len].copy_from_slice(&self.memory.bytes()[..self.len]);
            self.memory = larger;
        }
        self.len = at + bytes;
        Ok((at as u32, &mut self.memory.bytes_mut()[at..at + bytes]))
    }

    /// The finished block, with readable slack behind the last part.
    pub(crate) fn finish(self) -> Weights {
        Weights { memory: self.memory, len: self.len }
    }
}

/// The finished block.
pub(crate) struct Weights {
    memory: Memory,
    len: usize,
}

impl Weights {
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
    fn a_block_that_outgrows_its_memory_keeps_what_it_holds() {
        let mut block = WeightBlock::new(10).unwrap();
        let parts: Vec<Vec<u8>> = (0..40u8).map(|i| vec![i; 500 * usize::from(i)]).collect();
        let at: Vec<u32> = parts.iter().map(|p| block.add(p, 64).unwrap()).collect();
        let again: Vec<u32> = parts.iter().map(|p| block.add(p, 64).unwrap()).collect();
        assert_eq!(at, again, "equal small parts are one");
        let bytes = block.finish().to_vec();
        for (part, at) in parts.iter().zip(at) {
            assert!(at.is_multiple_of(64));
            assert_eq!(bytes[at as usize..][..part.len()], part[..]);
        }
    }

    #[test]
    fn a_block_beyond_32_bits_is_refused() {
        let mut block = WeightBlock::new(0).unwrap();
        assert!(matches!(block.reserve(5 << 30, 64), Err(CodegenError::TooLarge { .. })));
    }
}
