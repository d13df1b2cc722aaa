//! What a run, a step and a second thread cost beside the arithmetic.
//!
//! `cargo bench -p qcc-runtime --bench overheads`. `run/N` is a whole run of a model of N steps on one number each: what
//! it grows with N is the price of a step, and the rest that of a run. `threads/handed over` gives an empty part to each
//! of two threads while both are awake, `threads/woken` after a pause in which the second has gone to sleep. `lines/own`
//! and `lines/other` read 32 KiB that the same core, and the other one, has just written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::arr1;
use qcc_codegen::Parallel;
use qcc_ir::{
    DType, Graph, Shape, TensorType,
    ops::{Binary, BinaryKind, Unary, UnaryKind},
};
use qcc_runtime::{Compiler, JitOptions, Model, Precision, Session, TensorViewMut, Threads, choose_tier};
use std::{
    error::Error,
    hint::{self, black_box},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

type Failure = Box<dyn Error>;

/// Functions of one number, one after the other. Each reads the two before it, so that no two become one step, but for
/// the last two.
fn chain(steps: usize) -> Result<Model, Failure> {
    let mut graph = Graph::new("chain");
    let mut value = graph.input("x", TensorType::new(DType::F32, Shape::new([1])?))?;
    let mut before = value;
    value = graph.add("step0", Unary { kind: UnaryKind::Abs }, &[value])?.out();
    for i in 1..=steps.saturating_sub(1) + usize::from(steps > 1) {
        let next = graph.add(&format!("step{i}"), Binary { kind: BinaryKind::Max }, &[value, before])?.out();
        (before, value) = (value, next);
    }
    graph.output("y", value);
    let compiler = Compiler::new().precision(Precision::Float);
    let model = compiler.program_of_graph(graph)?.jit(&JitOptions::new(choose_tier(None)?))?;
    assert_eq!(model.steps().len(), steps, "the steps that are to be counted");
    Ok(model)
}

fn runs(c: &mut Criterion) -> Result<(), Failure> {
    let mut group = c.benchmark_group("run");
    for steps in [1, 101] {
        let mut session = Session::new(&chain(steps)?);
        let (x, mut y) = (arr1(&[0.5f32]), arr1(&[0f32]));
        let mut outputs: [TensorViewMut<'_>; 1] = [(&mut y).try_into()?];
        group.bench_function(steps.to_string(), |b| {
            b.iter(|| session.run_into(&[(&x).into()], &mut outputs));
        });
    }
    group.finish();
    Ok(())
}

/// A pause in which the workers of a pool go to sleep.
const PAUSE: Duration = Duration::from_millis(1);

fn threads(c: &mut Criterion) -> Result<(), Failure> {
    let mut group = c.benchmark_group("threads");
    let threads = Threads::new(2)?;
    group.bench_function("handed over", |b| {
        b.iter(|| threads.run(2, &|part| _ = black_box(part)));
    });
    // Until the other thread has begun: the caller would take all parts itself before it is awake.
    group.bench_function("woken", |b| {
        b.iter_custom(|rounds| {
            let once = || {
                thread::sleep(PAUSE);
                let meeting = AtomicU32::new(0);
                let start = Instant::now();
                threads.run(2, &|_| {
                    meeting.fetch_add(1, Ordering::SeqCst);
                    while meeting.load(Ordering::SeqCst) < 2 {
                        hint::spin_loop();
                    }
                });
                start.elapsed()
            };
            (0..rounds).map(|_| once()).sum()
        });
    });
    group.finish();
    Ok(())
}

/// Bytes that one core writes and reads: of the first level.
const BLOCK: usize = 32 << 10;

/// Two blocks are written by two threads at the same time, and then read; `swapped`: each the other one's.
fn lines(c: &mut Criterion) -> Result<(), Failure> {
    let mut group = c.benchmark_group("lines");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    let threads = Threads::new(2)?;
    let blocks: [Vec<AtomicU64>; 2] = [0, 1].map(|_| (0..BLOCK as u64 / 8).map(AtomicU64::new).collect());
    // Parts are taken by any thread; who waits for the other one takes only one.
    let both = |work: &(dyn Fn(usize) + Sync)| {
        let meeting = AtomicU32::new(0);
        threads.run(2, &|part| {
            meeting.fetch_add(1, Ordering::SeqCst);
            while meeting.load(Ordering::SeqCst) < 2 {
                hint::spin_loop();
            }
            work(part);
        });
    };
    let caller = thread::current().id();
    let own = || usize::from(thread::current().id() != caller);
    for (name, other) in [("own", 0), ("other", 1)] {
        group.bench_function(name, |b| {
            b.iter_custom(|rounds| {
                let mut taken = Duration::ZERO;
                for round in 0..rounds {
                    both(&|_| blocks[own()].iter().for_each(|x| x.store(round, Ordering::Relaxed)));
                    let start = Instant::now();
                    both(&|_| {
                        let read = blocks[own() ^ other].iter().map(|x| x.load(Ordering::Relaxed));
                        black_box(read.fold(0, |sum, x| sum ^ x));
                    });
                    taken += start.elapsed();
                }
                taken
            });
        });
    }
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    for part in [runs, threads, lines] {
        if let Err(e) = part(c) {
            panic!("{e}");
        }
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
