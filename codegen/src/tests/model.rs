//! The framework: aliases, outputs, errors, determinism, memory.

use super::{
    Random, Threads, compiled, convolutions, placed, plain, random_tensor, run, run_serially, tiers,
};
use crate::{
    CodegenError, CompiledModel, Execution, ListingKind, Options, Release, Serial, SharedWeights, compile,
};
use qcc_ir::{
    DType, Device, Graph, OutputGrid, QuantParams, Shape, Stage, Tensor,
    ops::{
        Binary, BinaryKind, Clamp, Dequantize, MatMul, QUnary, Quantize, Reshape, Slice, SliceSpec, Softmax,
        Transfer, Transpose, Unary, UnaryKind,
    },
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

#[test]
fn an_input_that_is_an_output_is_copied() {
    for len in [0, 1, 15, 16, 17, 10_000] {
        let mut g = Graph::new("copy");
        let x = g.input("x", plain(DType::U8, &[len])).unwrap();
        let y = g.add("y", Reshape { shape: Shape::new([1, len]).unwrap() }, &[x]).unwrap();
        let z = g.add("z", Transfer { to: Device::Int8Jit }, &[y.out()]).unwrap();
        g.output("a", z.out());
        g.output("b", x);
        let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
        for tier in tiers() {
            let outputs = run_serially(&compiled(&g, tier), &[&bytes]);
            assert_eq!(outputs, [bytes.clone(), bytes.clone()], "{len} on {tier}");
        }
    }
}

/// Float in, tables in the middle, softmax at the end, a constant among the outputs.
fn mixed() -> Graph {
    let mut g = Graph::new("mixed");
    let x = g.input("x", plain(DType::F32, &[1, 3, 20, 20])).unwrap();
    let params = QuantParams::per_tensor(0.03, 128).unwrap();
    let q = g.add("q", Quantize { dtype: DType::U8, params }, &[x]).unwrap();
    let t = g.add("t", Transpose { perm: vec![0, 2, 3, 1] }, &[q.out()]).unwrap();
    let output = OutputGrid::full(DType::U8, 1.0 / 256.0, 0).unwrap();
    let s = g.add("s", QUnary { kind: UnaryKind::Sigmoid, output }, &[t.out()]).unwrap();
    let f = g.add("f", Dequantize {}, &[s.out()]).unwrap();
    let e = g.add("e", Softmax { axis: 3, log: false }, &[f.out()]).unwrap();
    let c = g.constant("c", Tensor::from_vec(Shape::new([3]).unwrap(), vec![1f32, 2.0, 3.0]).unwrap());
    let y = g.add("y", Binary { kind: BinaryKind::Mul }, &[e.out(), c]).unwrap();
    g.output("y", y.out());
    g.output("c", c);
    g.output("y_again", y.out());
    g.output("codes", s.out());
    g
}

#[test]
fn a_mixed_graph_equals_the_interpreter_wherever_its_ops_run() {
    let g = mixed();
    super::check(&g, 1);
    let mut interpreted = placed(&g);
    let ops: Vec<_> = interpreted.nodes().filter(|(_, n)| n.op().is_some()).map(|(id, _)| id).collect();
    let x: Vec<u8> = (0..1200).flat_map(|i| (i as f32 * 0.01 - 5.0).to_le_bytes()).collect();
    let expected = run_serially(&compiled(&placed(&g), tiers()[0]), &[&x]);
    for id in ops {
        interpreted.set_device(id, Some(Device::Interpreter));
        let model = compiled(&interpreted, tiers()[0]);
        assert!(model.steps().iter().any(|s| s.kernel == "interpreter"));
        assert_eq!(run_serially(&model, &[&x]), expected);
    }
}

#[test]
fn code_and_weights_do_not_depend_on_the_threads_that_make_them() {
    for graph in [mixed(), convolutions()] {
        for tier in tiers() {
            let with_threads = |n: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
                pool.install(|| compiled(&graph, tier))
            };
            let (one, four) = (with_threads(1), with_threads(4));
            assert_eq!(one.weights.to_vec(), four.weights.to_vec());
            let code = |m: &CompiledModel| -> Vec<(String, Vec<u8>)> {
                m.code.texts().iter().map(|t| (t.name.clone(), t.code.clone())).collect()
            };
            assert_eq!(code(&one), code(&four));
        }
    }
}

#[test]
fn weights_are_released_once_they_are_packed() {
    let graph = placed(&convolutions());
    let released = Arc::new(Mutex::new(Vec::new()));
    let told = released.clone();
    let release = Release::new(move |bytes| told.lock().unwrap().push(bytes.len()));
    for tier in tiers() {
        compile(&graph, &Options { release: Some(release.clone()), ..Options::new(tier) }).unwrap();
        assert_eq!(released.lock().unwrap().split_off(0), [64 * 64 * 9 * 4; 2]);
    }
}

#[test]
fn compiling_twice_gives_the_same_code_and_weights() {
    for tier in tiers() {
        let (a, b) = (compiled(&mixed(), tier), compiled(&mixed(), tier));
        assert_eq!(a.weights.to_vec(), b.weights.to_vec());
        assert!(
            a.code.texts().iter().map(|t| (&t.name, &t.code)).eq(b
                .code
                .texts()
                .iter()
                .map(|t| (&t.name, &t.code)))
        );
        assert!(a.code_bytes() > 0 && !a.code.texts().is_empty());
    }
}

#[test]
fn listings_show_every_function() {
    let model = compiled(&mixed(), tiers()[0]);
    let clif = model.listing(ListingKind::Clif);
    let asm = model.listing(ListingKind::Asm);
    for step in model.steps() {
        assert!(
            clif.contains(&format!("; {}__", step.kernel)) && asm.contains(&format!("; {}__", step.kernel))
        );
    }
    assert!(clif.contains("block0") && asm.contains("ret"));
    assert_eq!(compile(&placed(&mixed()), &Options::new(tiers()[0])).unwrap().listing(ListingKind::Asm), "");
}

/// Executable memory of this process that belongs to no file.
#[cfg(target_os = "linux")]
fn is_executable(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let parse = |s| usize::from_str_radix(s, 16).unwrap();
        (parse(from)..parse(to)).contains(&address) && rest.starts_with("r-x")
    })
}

#[cfg(target_os = "linux")]
#[test]
fn code_is_executable_but_not_writable_and_freed_with_the_model() {
    let model = compiled(&mixed(), tiers()[0]);
    let entry = model.steps().iter().find_map(super::super::model::Step::entry_address).unwrap();
    assert!(is_executable(entry));
    let other = model.clone();
    drop(model);
    assert!(is_executable(entry), "freed under an owner");
    drop(other);
    assert!(!is_executable(entry), "not freed");
}

#[test]
fn executions_of_one_model_are_independent() {
    let model = compiled(&mixed(), tiers()[0]);
    let input = |k: f32| -> Vec<u8> { (0..1200).flat_map(|i| (i as f32 * k).to_le_bytes()).collect() };
    let inputs = [input(0.001), input(-0.002), input(0.0)];
    let expected: Vec<_> = inputs.iter().map(|x| run_serially(&model, &[x])).collect();
    std::thread::scope(|scope| {
        for (x, expected) in inputs.iter().zip(&expected) {
            let model = &model;
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(run(model, &[x], &Threads(2)), *expected);
                }
            });
        }
    });
}

#[test]
fn profiles_add_up_over_the_steps() {
    let model = compiled(&mixed(), tiers()[0]);
    let mut times = vec![Duration::ZERO; model.steps().len()];
    let x = vec![0u8; 4800];
    let mut outputs: Vec<Vec<u8>> = model.outputs().iter().map(|(_, t)| vec![0; t.bytes()]).collect();
    let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    Execution::new(model).run(&[&x], &mut slices, &Serial, Some(&mut times)).unwrap();
    assert!(times.iter().all(|t| !t.is_zero()));
}

#[test]
fn buffers_of_another_size_are_refused() {
    let model = compiled(&mixed(), tiers()[0]);
    let mut run = Execution::new(model);
    let refused = run.run(&[&[0; 7]], &mut [], &Serial, None).unwrap_err();
    assert_eq!(refused, CodegenError::Buffers { what: "outputs".into(), expected: 4, got: 0 });
    let refused = run.run(&[], &mut [], &Serial, None).unwrap_err();
    assert_eq!(refused, CodegenError::Buffers { what: "inputs".into(), expected: 1, got: 0 });
    let mut outputs: Vec<Vec<u8>> = vec![vec![0; 4800], vec![0; 12], vec![0; 4800], vec![0; 1200]];
    let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    let refused = run.run(&[&[0; 7]], &mut slices, &Serial, None).unwrap_err();
    assert_eq!(refused, CodegenError::Buffers { what: "bytes of input `x`".into(), expected: 4800, got: 7 });
}

#[test]
fn what_cannot_be_compiled_is_named() {
    let mut g = Graph::new("refused");
    let x = g.input("x", plain(DType::F32, &[3])).unwrap();
    let y = g.add("wave", Unary { kind: UnaryKind::Sin }, &[x]).unwrap();
    g.output("y", y.out());
    let options = Options::new(tiers()[0]);
    assert_eq!(compile(&g, &options).err(), Some(CodegenError::NotPlaced { node: "wave".into() }));
    g.stage = Stage::Placed;
    assert_eq!(compile(&g, &options).err(), Some(CodegenError::NotPlaced { node: "wave".into() }));
    g.set_device(y, Some(Device::FloatJit));
    let refused = compile(&g, &options).err();
    assert!(matches!(refused, Some(CodegenError::Unsupported { node, .. }) if node == "wave"));
}

#[test]
fn an_arena_above_the_limit_is_refused_before_anything_is_allocated() {
    let mut g = Graph::new("large");
    // Five values of 4 GiB that all live until the first two are compared.
    let len = 1usize << 32;
    let x = g.input("x", plain(DType::U8, &[len])).unwrap();
    let flip = Slice { axes: vec![SliceSpec { start: len - 1, len, step: -1 }] };
    let values: Vec<_> = (0..5).map(|i| g.add(&format!("n{i}"), flip.clone(), &[x]).unwrap().out()).collect();
    for pair in values.windows(2) {
        let y = g.add("equal", Binary { kind: BinaryKind::Equal }, pair).unwrap();
        g.output("y", y.out());
    }
    let refused = compile(&placed(&g), &Options::new(tiers()[0])).err();
    assert!(matches!(refused, Some(CodegenError::TooLarge { .. })), "{refused:?}");
}

#[test]
fn an_execution_can_be_sent_to_another_thread() {
    fn is_send<T: Send>(_: &T) {}
    let run = Execution::new(compiled(&mixed(), tiers()[0]));
    is_send(&run);
    is_send(&Arc::clone(run.model()));
}

/// A product of so many rows by a matrix of 200 x 300, which takes more than the least that is shared.
fn product(rows: usize, seed: u64) -> Graph {
    let mut g = Graph::new("product");
    let x = g.input("x", plain(DType::F32, &[rows, 200])).unwrap();
    let w = g.constant("w", random_tensor(&plain(DType::F32, &[200, 300]), &mut Random::new(seed)));
    let op = MatMul { bias: false, residual: false, clamp: Clamp::NONE };
    let y = g.add("y", op, &[x, w]).unwrap();
    g.output("y", y.out());
    placed(&g)
}

#[test]
fn models_share_what_they_pack_alike_and_compute_the_same() {
    for tier in tiers() {
        let shared = Arc::new(SharedWeights::new());
        let with = |g: &Graph, shared: Option<&Arc<SharedWeights>>| {
            Arc::new(compile(g, &Options { shared: shared.cloned(), ..Options::new(tier) }).unwrap())
        };
        let models: Vec<_> = [64, 128].map(|rows| with(&product(rows, 1), Some(&shared))).into();
        let other = with(&product(64, 2), Some(&shared));
        let [first, second] = &models[..] else { unreachable!() };
        assert_eq!((first.shared.len(), second.shared.len(), other.shared.len()), (1, 1, 1), "{tier}");
        assert!(Arc::ptr_eq(&first.shared[0], &second.shared[0]), "{tier}: other rows, the same weights");
        assert!(!Arc::ptr_eq(&first.shared[0], &other.shared[0]), "{tier}: other weights");
        for (rows, model) in [(64, first), (128, second)] {
            let x = random_tensor(&plain(DType::F32, &[rows, 200]), &mut Random::new(5));
            let alone = with(&product(rows, 1), None);
            assert!(alone.shared.is_empty());
            assert_eq!(run_serially(model, &[x.bytes()]), run_serially(&alone, &[x.bytes()]), "{tier}");
        }
        // They live as long as one of the models does.
        let weak = Arc::downgrade(&first.shared[0]);
        drop(models);
        assert!(weak.upgrade().is_none());
    }
}
