//! Packed weights that models share: specialisations of one network to several shapes read the same ones.

use crate::{
    CodegenError,
    dense::{WeightOrder, pack::PanelFormat, spec::SLACK},
    memory::Memory,
};
use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use xxhash_rust::xxh3::xxh3_128;

/// Packed weights, kept as long as a compiled model uses them. Models that are compiled with the same one in their
/// [`Options`](crate::Options) share what they pack alike.
#[derive(Default)]
pub struct SharedWeights(Mutex<HashMap<PackKey, Weak<Memory>>>);

/// Smaller ones are packed with each model.
pub(crate) const SHARED_FROM: usize = 64 << 10;

/// All that packed bytes depend on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct PackKey {
    /// Hash and number of the bytes of the tensor.
    tensor: (u128, usize),
    order: WeightOrder,
    /// Format and channels of each panel.
    panels: Vec<(PanelFormat, Range<usize>)>,
    runs: usize,
    run: usize,
}

impl PackKey {
    pub(crate) fn new(
        tensor: &[u8],
        order: WeightOrder,
        panels: Vec<(PanelFormat, Range<usize>)>,
        runs: usize,
        run: usize,
    ) -> PackKey {
        PackKey { tensor: (xxh3_128(tensor), tensor.len()), order, panels, runs, run }
    }
}

impl SharedWeights {
    /// Nothing yet.
    pub fn new() -> SharedWeights {
        SharedWeights::default()
    }

    /// What was packed for this key, if some model still uses it.
    pub(crate) fn get(&self, key: &PackKey) -> Option<Arc<Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key)?.upgrade()
    }

    /// Offers what was packed to later models.
    pub(crate) fn insert(&self, key: PackKey, memory: &Arc<Memory>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, memory| memory.strong_count() > 0);
        all.insert(key, Arc::downgrade(memory));
    }
}

impl fmt::Debug for SharedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWeights")
    }
}

/// Memory for packed weights of these sizes, each of which begins at a multiple of `align`; and their offsets.
pub(crate) fn memory_for(sizes: &[usize], align: usize) -> Result<(Memory, Vec<usize>), CodegenError> {
    let mut end = 0usize;
    let offsets = sizes
        .iter()
        .map(|&size| {
            let at = end;
            end = end.saturating_add(size).next_multiple_of(align);
            at
        })
        .collect();
    Ok((Memory::zeroed(end.saturating_add(SLACK))?, offsets))
}
