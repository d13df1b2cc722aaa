//! The threads that one run may use.

use qcc_codegen::Parallel;
use rayon::prelude::*;
use std::{fmt, sync::Arc};

/// A pool of threads, shared by clones. With one thread there is no pool: everything runs on the caller's thread.
///
/// What a model computes does not depend on the number of threads, not in one bit.
#[derive(Clone, Default)]
pub struct Threads(Option<Arc<rayon::ThreadPool>>);

/// The system gave no threads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot start {count} threads: {reason}")]
pub struct ThreadsError {
    /// How many were asked for.
    pub count: usize,
    /// What the system said.
    pub reason: String,
}

/// More than any machine has cores; a guard against a slip of the keyboard.
const MOST_THREADS: usize = 4096;

impl Threads {
    /// `count` threads; 0 for as many as the machine has cores.
    ///
    /// # Errors
    /// Where the system does not give them.
    pub fn new(count: usize) -> Result<Threads, ThreadsError> {
        let count = match count {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let failed = |reason: String| ThreadsError { count, reason };
        match count {
            1 => Ok(Threads(None)),
            2..=MOST_THREADS => {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(count);
                let pool = builder.thread_name(|i| format!("qcc-{i}")).build();
                Ok(Threads(Some(Arc::new(pool.map_err(|e| failed(e.to_string()))?))))
            }
            _ => Err(failed(format!("at most {MOST_THREADS} make sense"))),
        }
    }

    /// The calling thread alone.
    pub fn one() -> Threads {
        Threads(None)
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(1, |p| p.current_num_threads())
    }

    /// Runs `f` on the pool, so that its parallel parts are handed over without waking a thread for each.
    pub(crate) fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }
}

impl Parallel for Threads {
    fn threads(&self) -> usize {
        self.count()
    }

    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.0 {
            Some(pool) => pool.install(|| (0..parts).into_par_iter().with_max_len(1).for_each(f)),
            None => (0..parts).for_each(f),
        }
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Threads({})", self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn every_part_runs_once() {
        for count in [1, 2, 3] {
            let threads = Threads::new(count).unwrap();
            let ran: Vec<AtomicU32> = (0..100).map(|_| AtomicU32::new(0)).collect();
            threads.enter(|| threads.run(100, &|i| _ = ran[i].fetch_add(1, Ordering::Relaxed)));
            assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            assert_eq!(threads.threads(), count);
        }
        assert!(Threads::new(1 << 30).is_err());
    }
}
