//! The threads that one run may use.
//!
//! A step of a model takes microseconds, so handing a part of it to another thread must take less. The workers of a pool
//! therefore wait for the next step without sleeping, for a little longer than the gaps between the steps of a run, and
//! only then give their cores back.
//!
//! Part `i` of a job is for thread `i`, which has in its cache what it wrote in part `i` of the last step; another core
//! would read that at a quarter of the speed. Only who has no part left takes those of threads that come late.

use qcc_codegen::Parallel;
use std::{
    any::Any,
    fmt, hint,
    panic::{self, AssertUnwindSafe},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A pool of threads, shared by clones. With one thread there is no pool: everything runs on the caller's thread.
///
/// What a model computes does not depend on the number of threads, not in one bit. The pool works for one caller at a
/// time; who finds it taken does all the work alone instead of waiting, so several sessions may share it.
#[derive(Clone, Default)]
pub struct Threads(Option<Arc<Pool>>);

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

/// How long a worker looks for the next job before it sleeps: longer than the steps between two that are shared, short
/// enough that an idle pool costs nothing.
const ALERT: Duration = Duration::from_micros(100);

/// Looks between two looks at the clock.
const LOOKS: u32 = 64;

impl Threads {
    /// `count` threads, the caller's among them; 0 for as many as the machine has cores.
    ///
    /// # Errors
    /// Where the system does not give them.
    pub fn new(count: usize) -> Result<Threads, ThreadsError> {
        let count = match count {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        match count {
            1 => Ok(Threads(None)),
            2..=MOST_THREADS => Ok(Threads(Some(Arc::new(Pool::new(count)?)))),
            _ => Err(ThreadsError { count, reason: format!("at most {MOST_THREADS} make sense") }),
        }
    }

    /// The calling thread alone.
    pub fn one() -> Threads {
        Threads(None)
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(1, |pool| pool.workers.len() + 1)
    }
}

impl Parallel for Threads {
    fn threads(&self) -> usize {
        self.count()
    }

    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.0 {
            Some(pool) => pool.run(parts, f),
            None => (0..parts).for_each(f),
        }
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Threads({})", self.count())
    }
}

/// The workers. The caller of a job works too.
struct Pool {
    desk: Arc<Desk>,
    workers: Vec<JoinHandle<()>>,
}

/// Where a caller leaves its job and workers find it. One job at a time lies here.
#[derive(Default)]
struct Desk {
    /// Whether a caller has the desk.
    is_taken: AtomicBool,
    /// The job: a `&(dyn Fn(usize) + Sync)` on its caller's stack. Only to be read by who holds a part of it.
    job: AtomicPtr<()>,
    /// Number of the job, and in the lower half a bit for each slot of parts that is left to be taken.
    left: AtomicU64,
    /// Parts of the job: those of slot `i` are `i`, `i + SLOTS` and so on.
    parts: AtomicUsize,
    /// Parts of the job that have been computed.
    done: AtomicUsize,
    /// What a part of the job panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// By worker: whether it sleeps, or is about to.
    sleeps: Vec<AtomicBool>,
    is_closed: AtomicBool,
}

/// Slots of parts: most jobs have fewer parts. Slot `i` is thread `i`'s, the caller's is 0.
const SLOTS: usize = 32;
/// The lower half of [`Desk::left`].
const LEFT: u64 = u32::MAX as u64;

impl Pool {
    fn new(count: usize) -> Result<Pool, ThreadsError> {
        let sleeps = (1..count).map(|_| AtomicBool::new(false)).collect();
        let mut pool = Pool { desk: Arc::new(Desk { sleeps, ..Desk::default() }), workers: Vec::new() };
        for own in 0..count - 1 {
            let desk = pool.desk.clone();
            let named = thread::Builder::new().name(format!("qcc-{}", own + 1));
            // On failure, dropping the pool ends the workers that have started.
            let worker = named
                .spawn(move || desk.work(own))
                .map_err(|e| ThreadsError { count, reason: e.to_string() })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        let desk = &*self.desk;
        if parts < 2 || desk.is_taken.swap(true, Ordering::Acquire) {
            // Another caller's job, or one of the parts of which this is one.
            return (0..parts).for_each(f);
        }
        desk.done.store(0, Ordering::Relaxed);
        desk.job.store(ptr::from_ref(&f).cast_mut().cast(), Ordering::Relaxed);
        desk.parts.store(parts, Ordering::Relaxed);
        let number = (desk.left.load(Ordering::Relaxed) & !LEFT).wrapping_add(LEFT + 1);
        desk.left.store(number | (LEFT >> (SLOTS - parts.min(SLOTS))), Ordering::SeqCst);
        // Sleepers say so before they look for the last time, and this looks for them after leaving the job.
        let needed = desk.sleeps.iter().zip(&self.workers).take(parts - 1);
        needed.filter(|(s, _)| s.load(Ordering::SeqCst)).for_each(|(_, worker)| worker.thread().unpark());
        desk.take_own(0);
        while desk.take_any(number) {}
        let mut looks = 0u32;
        while desk.done.load(Ordering::Acquire) < parts {
            looks = looks.wrapping_add(1);
            match looks % LOOKS {
                // Perhaps a worker waits for this core.
                0 => thread::yield_now(),
                _ => hint::spin_loop(),
            }
        }
        let panicked = desk.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        desk.is_taken.store(false, Ordering::Release);
        if let Some(payload) = panicked {
            panic::resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.desk.is_closed.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker does not panic: it catches the panics of parts.
            let _ = worker.join();
        }
    }
}

impl Desk {
    /// Computes the parts that are thread `own`'s, and gives the number of their job; `None` if there are none, or
    /// another thread has taken them.
    fn take_own(&self, own: usize) -> Option<u64> {
        loop {
            let left = self.left.load(Ordering::Acquire);
            let slot = if own < SLOTS { 1 << own } else { 0 };
            if left & LEFT & slot == 0 {
                return None;
            }
            if self.take(left, own) {
                return Some(left & !LEFT);
            }
        }
    }

    /// Computes the parts of one slot of the job of this number, the last one that is left; `false` if none is.
    fn take_any(&self, number: u64) -> bool {
        let left = self.left.load(Ordering::Acquire);
        if left & LEFT == 0 || left & !LEFT != number {
            return false;
        }
        self.take(left, (left & LEFT).ilog2() as usize);
        true
    }

    /// Takes a slot of a job, if it is still as it was seen, and computes its parts; otherwise `false`.
    fn take(&self, seen: u64, slot: usize) -> bool {
        let taken = seen & !(1 << slot);
        if self.left.compare_exchange(seen, taken, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return false;
        }
        let job = self.job.load(Ordering::Relaxed).cast::<&(dyn Fn(usize) + Sync)>();
        // SAFETY: `Pool::run` stores a pointer to a reference of this type before it offers parts, and neither returns
        // nor stores another one before all parts are done. These were taken from that offer, as the exchange compares
        // the job's number as well, and are not done yet.
        #[allow(
            unsafe_code,
            reason = "workers outlive the closures of their jobs: no lifetime can say when they use them"
        )]
        let f = unsafe { *job };
        let parts = self.parts.load(Ordering::Relaxed);
        for part in (slot..parts).step_by(SLOTS) {
            if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| f(part))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
        true
    }

    /// What worker `own`, thread `own + 1`, does until the pool is dropped.
    fn work(&self, own: usize) {
        let mut last = Instant::now();
        while !self.is_closed.load(Ordering::SeqCst) {
            if let Some(number) = self.take_own(own + 1) {
                while self.take_any(number) {}
                last = Instant::now();
                continue;
            }
            (0..LOOKS)
                .take_while(|_| self.left.load(Ordering::Relaxed) & LEFT == 0)
                .for_each(|_| hint::spin_loop());
            if last.elapsed() > ALERT {
                self.sleeps[own].store(true, Ordering::SeqCst);
                while self.left.load(Ordering::SeqCst) & LEFT == 0 && !self.is_closed.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.sleeps[own].store(false, Ordering::SeqCst);
                last = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn counts(threads: &Threads, parts: usize) -> Vec<u32> {
        let ran: Vec<AtomicU32> = (0..parts).map(|_| AtomicU32::new(0)).collect();
        threads.run(parts, &|i| _ = ran[i].fetch_add(1, Ordering::Relaxed));
        ran.into_iter().map(AtomicU32::into_inner).collect()
    }

    #[test]
    fn every_part_runs_once() {
        for count in [1, 2, 3, 8] {
            let threads = Threads::new(count).unwrap();
            assert_eq!(threads.threads(), count);
            for parts in [0, 1, 2, 3, 100] {
                assert!(counts(&threads, parts).iter().all(|&n| n == 1), "{count} threads, {parts} parts");
            }
        }
        assert!(Threads::new(1 << 30).is_err());
    }

    #[test]
    fn sleeping_workers_wake() {
        let threads = Threads::new(3).unwrap();
        for _ in 0..5 {
            thread::sleep(20 * ALERT);
            // Each part waits for the other: two threads must be at it.
            let both = std::sync::Barrier::new(2);
            threads.run(2, &|_| _ = both.wait());
        }
    }

    #[test]
    fn callers_share_a_pool_without_waiting_for_each_other() {
        let threads = Threads::new(2).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000 {
                        let parts = 1 + round % 5;
                        assert!(counts(&threads, parts).iter().all(|&n| n == 1));
                    }
                });
            }
        });
        // A caller inside of another one's part finds the pool taken.
        let inner = AtomicU32::new(0);
        threads.run(2, &|_| threads.run(3, &|_| _ = inner.fetch_add(1, Ordering::Relaxed)));
        assert_eq!(inner.into_inner(), 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_once_all_parts_have_ended() {
        let threads = Threads::new(2).unwrap();
        for bad in 0..4 {
            let ran = AtomicU32::new(0);
            let caught = panic::catch_unwind(AssertUnwindSafe(|| {
                threads.run(4, &|part| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    assert_ne!(part, bad, "a bad part");
                });
            }));
            assert!(caught.is_err());
            assert_eq!(ran.into_inner(), 4);
            assert_eq!(counts(&threads, 4), [1; 4], "the pool works on");
        }
    }
}
