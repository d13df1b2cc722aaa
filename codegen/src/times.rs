//! Where the time of a compilation goes.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Times of a compilation. The first four follow each other; the last two are summed over all threads and go on
/// meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CompileTimes {
    /// Summing weights and finding constants of requantization, on all threads.
    pub constants: Duration,
    /// Planning memory, choosing tiles and building functions, on the calling thread.
    pub lowering: Duration,
    /// Waiting for packing and code generation thereafter.
    pub waiting: Duration,
    /// Placing code and making it executable.
    pub sealing: Duration,
    /// Packing weights: thread time.
    pub packing: Duration,
    /// Assembling and compiling functions: thread time.
    pub generating: Duration,
}

/// Time that threads add to, in nanoseconds.
#[derive(Debug, Default)]
pub(crate) struct ThreadTime(AtomicU64);

impl ThreadTime {
    /// Adds the time that `f` takes.
    pub(crate) fn of<T>(&self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = f();
        self.0.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// The sum so far.
    pub(crate) fn sum(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}
