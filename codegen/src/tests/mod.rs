//! Tests of whole compiled graphs against the interpreter, on every tier of the CPU.

mod dense;
mod dynamic;
pub(crate) mod elementwise;
mod layout;
mod model;
mod norm;
mod plan;
mod pool;
mod recurrent;
mod resample;
mod shape;
mod to_float;

use crate::{CompiledModel, Execution, Options, Parallel, Serial, Tier, capability, compile};
use qcc_ir::{
    DType, Device, Graph, Shape, Stage, Tensor, TensorType, interpreter,
    ops::{Clamp, Conv, Layout, Window},
};
use std::sync::Arc;

/// The tiers of this CPU; names those that cannot be tested on it.
pub(crate) fn tiers() -> Vec<&'static Tier> {
    static NAMED: std::sync::Once = std::sync::Once::new();
    NAMED.call_once(|| {
        for t in crate::TIERS.iter().filter(|t| !t.is_available()) {
            #[allow(clippy::print_stderr, reason = "a silent skip would look like a pass")]
            {
                eprintln!("skipped: this CPU has no {t}");
            }
        }
    });
    Tier::available()
}

/// The graph with every op that generated code has on generated code.
pub(crate) fn placed(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    let ops: Vec<_> = graph.nodes().filter(|(_, n)| n.op().is_some()).map(|(id, _)| id).collect();
    for id in ops {
        let device = match capability(&graph, id) {
            Ok(()) => Device::Int8Jit,
            Err(_) => Device::Interpreter,
        };
        graph.set_device(id, Some(device));
    }
    graph.stage = Stage::Placed;
    graph
}

/// The compiled graph, placed first unless it is.
pub(crate) fn compiled(graph: &Graph, tier: &'static Tier) -> Arc<CompiledModel> {
    if graph.stage != Stage::Placed {
        return compiled(&placed(graph), tier);
    }
    let options = Options { listing: true, ..Options::new(tier) };
    Arc::new(compile(graph, &options).expect("the graph compiles"))
}

/// Threads that start anew for each step.
pub(crate) struct Threads(pub(crate) usize);

impl Parallel for Threads {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for part in 0..parts {
                scope.spawn(move || f(part));
            }
        });
    }
}

/// Runs a model on these inputs, all buffers at odd addresses; checks that nothing is written around the outputs.
pub(crate) fn run(model: &Arc<CompiledModel>, inputs: &[&[u8]], pool: &dyn Parallel) -> Vec<Vec<u8>> {
    const MARGIN: usize = 67;
    let shifted: Vec<Vec<u8>> = inputs.iter().map(|b| [&[0x5a; 3][..], b].concat()).collect();
    let inputs: Vec<&[u8]> = shifted.iter().map(|b| &b[3..]).collect();
    let mut buffers: Vec<Vec<u8>> =
        model.outputs().iter().map(|(_, ty)| vec![0xa5; ty.bytes() + 2 * MARGIN]).collect();
    let mut outputs: Vec<&mut [u8]> = buffers
        .iter_mut()
        .map(|b| {
            let end = b.len() - MARGIN;
            &mut b[MARGIN..end]
        })
        .collect();
    Execution::new(model.clone()).run(&inputs, &mut outputs, pool, None).expect("the model runs");
    for b in &mut buffers {
        let end = b.len() - MARGIN;
        assert!(
            b[..MARGIN].iter().chain(&b[end..]).all(|&x| x == 0xa5),
            "bytes around an output were written"
        );
        *b = b[MARGIN..end].to_vec();
    }
    buffers
}

pub(crate) fn run_serially(model: &Arc<CompiledModel>, inputs: &[&[u8]]) -> Vec<Vec<u8>> {
    run(model, inputs, &Serial)
}

/// Pseudo-random numbers: the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Floats that are hard: all classes of numbers, ties, magnitudes from denormal to huge.
fn hard_f32(r: &mut Random) -> f32 {
    const SPECIAL: [f32; 16] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.5,
        1e-45,
        -1e-40,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::MIN,
        1e10,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    match r.next() % 8 {
        0 => SPECIAL[(r.next() % 16) as usize],
        1 => f32::from_bits(r.next() as u32),
        2 => (r.next() % 64) as f32 * 0.25 - 8.0,
        _ => (r.next() >> 40) as f32 / (1 << 21) as f32 - 4.0,
    }
}

/// A tensor of hard numbers of this type.
pub(crate) fn random_tensor(ty: &TensorType, r: &mut Random) -> Tensor {
    let n = ty.shape.elements();
    match ty.dtype {
        DType::F32 => {
            Tensor::from_vec(ty.shape.clone(), (0..n).map(|_| hard_f32(r)).collect::<Vec<f32>>()).unwrap()
        }
        dtype => {
            let mut byte = || match dtype {
                DType::Bool => (r.next() >> 60) as u8 % 2,
                DType::U4 => (r.next() >> 56) as u8 & 15,
                DType::S4 => ((r.next() >> 56) as i8 >> 4) as u8,
                _ => (r.next() >> 56) as u8,
            };
            let bytes: Vec<u8> = (0..ty.bytes()).map(|_| byte()).collect();
            Tensor::from_bytes(dtype, ty.shape.clone(), bytes.into()).unwrap()
        }
    }
}

/// The bytes with all NaNs made one: their payloads are not defined.
fn canonical(ty: &TensorType, bytes: &[u8]) -> Vec<u8> {
    match ty.dtype {
        DType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&c| f32::from_le_bytes(c))
            .flat_map(|x| if x.is_nan() { f32::NAN.to_le_bytes() } else { x.to_le_bytes() })
            .collect(),
        _ => bytes.to_vec(),
    }
}

/// Compiles a graph for every tier and checks that its outputs equal the interpreter's bit for bit, on one thread and
/// on three. Every op must have a lowering.
pub(crate) fn check(graph: &Graph, seed: u64) {
    for (id, n) in graph.nodes().filter(|(_, n)| n.op().is_some()) {
        assert_eq!(capability(graph, id), Ok(()), "{}", n.name);
    }
    check_where_lowered(graph, seed);
}

/// Like [`check`], with ops that have no lowering in the interpreter.
pub(crate) fn check_where_lowered(graph: &Graph, seed: u64) {
    let mut r = Random::new(seed);
    let inputs: Vec<Tensor> =
        graph.inputs().iter().map(|&id| random_tensor(graph.ty(id.out()), &mut r)).collect();
    let expected = interpreter::run(graph, &inputs).expect("the interpreter runs");
    let bytes: Vec<&[u8]> = inputs.iter().map(|t| &t.bytes()[..]).collect();
    let graph = placed(graph);
    for tier in tiers() {
        let model = compiled(&graph, tier);
        for pool in [&Serial as &dyn Parallel, &Threads(3)] {
            let outputs = run(&model, &bytes, pool);
            for ((got, expected), (name, ty)) in outputs.iter().zip(&expected).zip(model.outputs()) {
                let (got, expected) = (canonical(ty, got), canonical(ty, expected.bytes()));
                let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
                if let Some(at) = wrong {
                    let size = ty.dtype.size();
                    let at = at / size * size;
                    panic!(
                        "{name} on {tier} with {} threads: element {} of {ty} is {:?}, not {:?}",
                        pool.threads(),
                        at / size,
                        &got[at..at + size],
                        &expected[at..at + size]
                    );
                }
            }
        }
    }
}

/// A plain type.
pub(crate) fn plain(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, Shape::new(dims).unwrap())
}

/// A quantized type.
pub(crate) fn quantized(dtype: DType, dims: &[usize], scale: f32, zero: i32) -> TensorType {
    let params = qcc_ir::QuantParams::per_tensor(scale, zero).unwrap();
    TensorType::quantized(dtype, Shape::new(dims).unwrap(), params).unwrap()
}

/// A graph of one op on inputs of these types.
pub(crate) fn graph_of(op: impl Into<qcc_ir::Op>, types: &[TensorType]) -> Graph {
    let mut g = Graph::new("one op");
    let operands: Vec<_> =
        types.iter().enumerate().map(|(i, t)| g.input(&format!("x{i}"), t.clone()).unwrap()).collect();
    let y = g.add("y", op, &operands).expect("the op takes its operands");
    g.output("y", y.out());
    g
}

/// Two convolutions of one shape, so that tiles are shared, and weights that are packed apart.
pub(crate) fn convolutions() -> Graph {
    let mut g = Graph::new("convolutions");
    let mut x = g.input("x", plain(DType::F32, &[1, 6, 6, 64])).unwrap();
    for name in ["a", "b"] {
        let weights: Vec<f32> = (0..64 * 64 * 9).map(|i| (i % 23) as f32 * 0.01).collect();
        let w = Tensor::from_vec(Shape::new([64, 64, 3, 3]).unwrap(), weights).unwrap();
        let w = g.constant(&format!("w_{name}"), w);
        let window = Window {
            kernel: vec![3, 3],
            strides: vec![1, 1],
            dilations: vec![1, 1],
            pads_begin: vec![1, 1],
            pads_end: vec![1, 1],
        };
        let conv = Conv {
            window,
            groups: 1,
            layout: Layout::ChannelsLast,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
        };
        x = g.add(name, conv, &[x, w]).unwrap().out();
    }
    g.output("y", x);
    g
}
