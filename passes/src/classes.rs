//! Disjoint sets of nodes or values.

use std::collections::BTreeMap;

/// Disjoint sets; the representative is the smallest member, so that nothing depends on the order of joins.
pub(crate) struct Classes<T> {
    parent: BTreeMap<T, T>,
}

impl<T: Ord + Copy> Classes<T> {
    pub(crate) fn new() -> Classes<T> {
        Classes { parent: BTreeMap::new() }
    }

    pub(crate) fn find(&self, mut x: T) -> T {
        while let Some(&p) = self.parent.get(&x).filter(|&&p| p != x) {
            x = p;
        }
        x
    }

    pub(crate) fn join(&mut self, a: T, b: T) {
        self.parent.entry(a).or_insert(a);
        self.parent.entry(b).or_insert(b);
        let (a, b) = (self.find(a), self.find(b));
        self.parent.insert(a.max(b), a.min(b));
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = T> {
        self.parent.keys().copied()
    }
}
