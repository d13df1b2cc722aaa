//! Memory of models: the weights, and the arenas of executions.

use crate::CodegenError;
use memmap2::{MmapMut, MmapOptions};
use std::{
    alloc::{Layout, handle_alloc_error},
    io,
};

/// Zeroed bytes that begin on a page and take memory only where they are written; many of them in huge pages, where the
/// system grants them.
///
/// Every run walks through all weights once, so with small pages the translation of addresses misses as often as the
/// caches do, and what is prefetched ahead ends at each page. Of a ResNet-50 in float, whose weights take 100 MB, huge
/// pages were measured to save 6 %.
#[derive(Debug)]
pub(crate) struct Memory(MmapMut);

/// From here on memory is asked for in huge pages, of 2 MiB.
const HUGE_FROM: usize = 8 << 20;

fn map(bytes: usize) -> io::Result<MmapMut> {
    let mapping = MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon()?;
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_FROM {
        // Advice: a system without huge pages gives small ones.
        let _ = mapping.advise(memmap2::Advice::HugePage);
    }
    Ok(mapping)
}

impl Memory {
    /// `bytes` bytes.
    ///
    /// # Errors
    /// Where the system has no address space for them.
    pub(crate) fn zeroed(bytes: usize) -> Result<Memory, CodegenError> {
        let failed = |e: io::Error| CodegenError::Memory { bytes: bytes as u64, reason: e.to_string() };
        map(bytes).map(Memory).map_err(failed)
    }

    /// `bytes` bytes for an arena, whose size was checked when the model was compiled. Where there is no memory, ends the
    /// process as any other allocation does.
    pub(crate) fn of_arena(bytes: usize) -> Memory {
        match map(bytes) {
            Ok(mapping) => Memory(mapping),
            Err(_) => handle_alloc_error(Layout::from_size_align(bytes, 1).unwrap_or(Layout::new::<u8>())),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
