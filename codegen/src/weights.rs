//! The one block of read-only data of a model: packed weights, tables, parameters.

use crate::{CodegenError, dense::spec::SLACK};
use std::{collections::HashMap, hash::BuildHasher};

/// One cache line; vectors of it are how memory gets its alignment.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// Zeroed bytes on a 64-byte boundary, a multiple of 64 of them.
pub(crate) fn aligned(bytes: usize) -> Vec<Line> {
    vec![Line([0; 64]); bytes.div_ceil(64)]
}

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
        let mut lines = aligned(len + SLACK);
        for (line, chunk) in lines.iter_mut().zip(self.bytes.chunks(64)) {
            line.0[..chunk.len()].copy_from_slice(chunk);
        }
        Weights { lines, len }
    }
}

/// The finished block.
pub(crate) struct Weights {
    lines: Vec<Line>,
    len: usize,
}

impl Weights {
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    #[cfg(test)]
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|l| l.0).take(self.len).collect()
    }
}
