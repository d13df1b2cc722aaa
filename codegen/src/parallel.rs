/// Threads that share the units of a step. The runtime brings its pool; [`Serial`] is one thread.
pub trait Parallel: Sync {
    /// How many parts may run at the same time.
    fn threads(&self) -> usize;

    /// Calls `f` once for each part in `0..parts`, on any threads, and returns when all calls have returned.
    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync));
}

/// The calling thread alone.
#[derive(Clone, Copy, Default, Debug)]
pub struct Serial;

impl Parallel for Serial {
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..parts).for_each(f);
    }
}
