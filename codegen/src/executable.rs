//! Machine code of single functions outside of a model: for measuring a CPU and for testing emitters.

use memmap2::{Mmap, MmapMut};
use std::io;

/// Code in a mapping of its own: written first, then executable and no longer writable. Freed on drop.
#[derive(Debug)]
pub struct Executable {
    mapping: Mmap,
}

impl Executable {
    /// Maps position-independent code. Errors are the operating system's, for example where a policy forbids code
    /// that was written at run time.
    pub fn new(code: &[u8]) -> io::Result<Executable> {
        let mut mapping = MmapMut::map_anon(code.len().max(1))?;
        mapping[..code.len()].copy_from_slice(code);
        Ok(Executable { mapping: mapping.make_exec()? })
    }

    /// The first byte of the code, aligned to a page.
    pub fn entry(&self) -> *const u8 {
        self.mapping.as_ptr()
    }
}
