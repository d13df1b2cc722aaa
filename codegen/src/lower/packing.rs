//! Weights on their way into memory: those of a model alone, and those that models share.

use super::Lowering;
use crate::{
    CodegenError, Options, Release,
    dense::{driver::PackedAt, pack},
    memory::Memory,
    shared::{self, PackKey, SHARED_FROM, SharedWeights},
    weights::MAX_WEIGHT_BYTES,
};
use qcc_ir::Tensor;
use rayon::prelude::*;
use std::sync::{Arc, OnceLock};

/// Bytes that are worth another thread's waking to be packed.
const WORTH_THREADS: usize = 16 << 10;

/// Packed weights that models share.
pub(super) enum SharedPart {
    /// Another model has packed them.
    Found(Arc<Memory>),
    /// They are being packed.
    Made(PackKey, Arc<OnceLock<Arc<Memory>>>),
}

/// A constant that is still being packed.
struct Unpacked<'s> {
    release: &'s Option<Release>,
    constant: &'s Tensor,
}

impl Drop for Unpacked<'_> {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            release.call(self.constant.bytes());
        }
    }
}

/// The packed weights, which later models may find from now on.
pub(super) fn finished(parts: Vec<SharedPart>, options: &Options) -> Result<Vec<Arc<Memory>>, CodegenError> {
    let finish = |part| match part {
        SharedPart::Found(memory) => Ok(memory),
        SharedPart::Made(key, made) => {
            let memory = made.get().cloned().ok_or_else(|| CodegenError::Backend {
                function: "weights".into(),
                reason: "they were not packed".into(),
            })?;
            if let Some(shared) = &options.shared {
                shared.insert(key, &memory);
            }
            Ok(memory)
        }
    };
    parts.into_iter().map(finish).collect()
}

/// About what the packed weights will take: the constants, and padding to whole panels.
pub(super) fn expected_weights(constant_bytes: usize) -> usize {
    constant_bytes.saturating_add(constant_bytes / 2).saturating_add(1 << 20).min(MAX_WEIGHT_BYTES)
}

impl<'s> Lowering<'_, 's> {
    /// Puts read-only bytes into the weights, aligned to `align` (a power of two, at most 64); equal parts are shared.
    pub(crate) fn weights(&mut self, bytes: &[u8], align: usize) -> Result<u32, CodegenError> {
        let (offset, unwritten) = self.weights.add(bytes, align)?;
        if let Some(unwritten) = unwritten {
            self.write(bytes.len(), move || unwritten.write());
        }
        Ok(offset)
    }

    /// Has so many bytes of the weights written, on any thread.
    fn write(&mut self, bytes: usize, write: impl FnOnce() + Send + 's) {
        self.writes.push(Box::new(write));
        self.write_bytes += bytes;
        if self.write_bytes >= WORTH_THREADS {
            self.flush();
        }
    }

    /// Hands what is to be written to the workers.
    pub(super) fn flush(&mut self) {
        let writes = std::mem::take(&mut self.writes);
        self.write_bytes = 0;
        let packing = self.packing;
        self.workers.spawn(move |_| packing.of(|| writes.into_iter().for_each(|write| write())));
    }

    /// Has parts of these sizes, each aligned to [`ALIGN`](pack::ALIGN), written from this constant: `write(i, part)`, on
    /// any thread. The parts are zeros before. Where they lie, and their offsets there.
    pub(crate) fn packed(
        &mut self,
        constant: &'s Tensor,
        key: impl FnOnce() -> PackKey,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<(PackedAt, Vec<u32>), CodegenError> {
        let all = sizes.iter().copied().fold(0, usize::saturating_add);
        match self.options.shared.as_ref().filter(|_| all >= SHARED_FROM) {
            Some(shared) => self.packed_shared(shared, constant, key(), sizes, write),
            None => Ok((PackedAt::Model, self.own(constant, sizes, write)?)),
        }
    }

    /// The same among the model's own weights; their offsets.
    pub(super) fn own(
        &mut self,
        constant: &'s Tensor,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<Vec<u32>, CodegenError> {
        let lengths = sizes.iter().map(|n| n.next_multiple_of(pack::ALIGN));
        let (first, mut rest) = self.weights.reserve(lengths.clone().sum(), pack::ALIGN)?;
        let (mut offsets, mut at) = (Vec::with_capacity(sizes.len()), first);
        // Released when the last part is written.
        let write = Arc::new((write, Unpacked { release: &self.options.release, constant }));
        for (i, (length, &size)) in lengths.zip(sizes).enumerate() {
            let (part, behind) = rest.split_at_mut(length);
            rest = behind;
            offsets.push(at);
            at += length as u32;
            let write = write.clone();
            self.write(size, move || (write.0)(i, &mut part[..size]));
        }
        Ok(offsets)
    }

    /// The same among the weights that models share; what another one has packed is not packed again.
    fn packed_shared(
        &mut self,
        shared: &SharedWeights,
        constant: &'s Tensor,
        key: PackKey,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<(PackedAt, Vec<u32>), CodegenError> {
        let (mut memory, offsets) = shared::memory_for(sizes, pack::ALIGN)?;
        let at = PackedAt::Shared(self.shared.len());
        let places = offsets.iter().map(|&o| u32::try_from(o)).collect::<Result<Vec<_>, _>>();
        let places = places.map_err(|_| CodegenError::TooLarge {
            what: "the weights of a layer".into(),
            bytes: memory.bytes().len() as u64,
            limit: MAX_WEIGHT_BYTES as u64,
        })?;
        if let Some(found) = shared.get(&key) {
            self.shared.push(SharedPart::Found(found));
            return Ok((at, places));
        }
        let made = Arc::new(OnceLock::new());
        self.shared.push(SharedPart::Made(key, made.clone()));
        let sizes = sizes.to_vec();
        let release = &self.options.release;
        self.write(memory.bytes().len(), move || {
            let _released = Unpacked { release, constant };
            let mut rest = memory.bytes_mut();
            let mut parts = Vec::with_capacity(sizes.len());
            for &size in &sizes {
                let (part, behind) = rest.split_at_mut(size.next_multiple_of(pack::ALIGN));
                parts.push(&mut part[..size]);
                rest = behind;
            }
            parts.into_par_iter().enumerate().for_each(|(i, part)| write(i, part));
            // Nobody else sets it.
            let _ = made.set(Arc::new(memory));
        });
        Ok((at, places))
    }
}
