//! A run takes no memory: what it needs, the session has. In a binary of its own, as it counts for the whole process.

use ndarray::{Array2, Array4};
use qcc_codegen::Parallel;
use qcc_runtime::{Compiler, Precision, Session, Threads, bundled};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it came.
#[allow(unsafe_code, reason = "an allocator is unsafe by nature")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn runs_allocate_nothing() {
    // A batch, so that there is work for two threads in a step.
    let images = Array4::<f32>::from_elem((64, 1, 28, 28), 0.5);
    let calibration = bundled::calibration().unwrap().limit(64);
    let compiler = Compiler::new()
        .calibration(calibration)
        .preprocess(bundled::preprocess())
        .shape("image", images.shape().to_vec());
    for precision in [Precision::Int8, Precision::Float] {
        let model = compiler.clone().precision(precision).compile_onnx(bundled::FASHION_RESNET8).unwrap();
        for threads in [1, 2] {
            let pool = Threads::new(threads).unwrap();
            // A thread allocates when it begins: all have begun once they have met.
            let meeting = Barrier::new(threads);
            pool.run(threads, &|_| _ = meeting.wait());
            let mut session = Session::with_threads(&model, pool);
            let mut logits = Array2::<f32>::zeros((64, 10));
            let mut run = || {
                let before = ALLOCATIONS.load(Ordering::SeqCst);
                session.run_into(&[(&images).into()], &mut [(&mut logits).try_into().unwrap()]).unwrap();
                ALLOCATIONS.load(Ordering::SeqCst) - before
            };
            run();
            let counts: Vec<usize> = (0..10).map(|_| run()).collect();
            assert_eq!(counts, [0; 10], "{precision:?}, {threads} threads");
        }
    }
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert!(ALLOCATIONS.load(Ordering::SeqCst) > before, "nothing is counted");
}
