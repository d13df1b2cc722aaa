//! The one block of read-only data of a model: packed weights, tables, parameters.

use crate::{CodegenError, dense::spec::SLACK, memory::Memory};
use std::{collections::HashMap, hash::BuildHasher};

/// A block under construction. Equal parts are stored once.
#[derive(Default)]
pub(crate) struct WeightBlock {
    bytes: Vec<u8>,
    /// Parts by hash; only ever looked up, so that hash order shows nowhere.
    parts: HashMap<u64, Vec<(u32, usize)>>,
}

/// Largest block: offsets have 32 bits.
const MAX_WEIGHT_BYTES: u64 = u32::MAX as u64;

impl WeightBlock {
    /// Offset of a part with these bytes, aligned to `align` (a power of two, at most 64).
    pub(crate) fn add(&mut self, bytes: &[u8], align: usize) -> Result<u32, CodegenError> {
        let hash = self.parts.hasher().hash_one(bytes);
        for &(offset, len) in self.parts.get(&hash).into_iter().flatten() {
            let at = offset as usize;
            if at.is_multiple_of(align) && self.bytes[at..at + len] == *bytes {
                return Ok(offset);
            }
        }
        let at = self.bytes.len().next_multiple_of(align);
        let end = at as u64 + bytes.len() as u64 + SLACK as u64;
        if end > MAX_WEIGHT_BYTES {
            return Err(CodegenError::TooLarge {
                what: "the weights".into(),
                bytes: end,
                limit: MAX_WEIGHT_BYTES,
            });
        }
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(bytes);
        self.parts.entry(hash).or_default().push((at as u32, bytes.len()));
        Ok(at as u32)
    }

    /// The finished block, with readable slack behind the last part.
    pub(crate) fn finish(self) -> Weights {
        let len = self.bytes.len();
        let mut memory = Memory::zeroed(len + SLACK);
        memory.bytes_mut()[..len].copy_from_slice(&self.bytes);
        Weights { memory, len }
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
