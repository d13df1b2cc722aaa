//! What the tests of the whole compiler share: where data lies, deterministic inputs, compiled runs on every tier.

pub mod attempt;
pub mod mutate;
pub mod random;
pub mod sealed;
pub mod seeds;

use qcc_codegen::{CodegenError, CompiledModel, Execution, Options, Parallel, Serial, TIERS, Tier};
use qcc_ir::{DType, Graph, Shape, Tensor, TensorType};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Once},
};

/// The root of the repository.
pub fn repository() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The folder with models and data beyond the bundled ones: `QCC_SHARED`, or `shared` beside the repository.
///
/// Says so on standard error where there is none; the test that asked then has nothing to run on.
pub fn shared() -> Option<PathBuf> {
    let dir = match std::env::var_os("QCC_SHARED") {
        Some(dir) => PathBuf::from(dir),
        None => repository().parent()?.join("shared"),
    };
    if dir.join("models").is_dir() {
        return Some(dir);
    }
    skip("no folder of shared models (set QCC_SHARED): only the bundled model is tested");
    None
}

/// Whether the long sweeps are asked for (`QCC_LONG_TESTS=1`).
pub fn long_tests() -> bool {
    std::env::var_os("QCC_LONG_TESTS").is_some_and(|v| v != "0" && !v.is_empty())
}

/// Says that something was not tested.
#[allow(clippy::print_stderr, reason = "a skip must be seen")]
pub fn skip(what: &str) {
    eprintln!("SKIPPED: {what}");
}

/// The tiers that this host can run; names the others, once.
pub fn tiers() -> Vec<&'static Tier> {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        for tier in TIERS.iter().filter(|t| !t.is_available()) {
            skip(&format!("tier {tier}: this CPU lacks it"));
        }
    });
    Tier::available()
}

/// A hash of each element's row-major index, as f32 in [-2, 2): the inputs of the float goldens.
///
/// `tests/goldens/make_float_goldens.py` has the same definition; no step rounds.
pub fn pseudo_random(elements: usize, input: usize) -> Vec<f32> {
    const INPUT_STRIDE: u32 = 1_000_003;
    let first = (input as u32).wrapping_mul(INPUT_STRIDE);
    (0..elements as u32)
        .map(|i| {
            let mut h = first.wrapping_add(i).wrapping_add(1).wrapping_mul(2_654_435_761);
            h ^= h >> 16;
            h = h.wrapping_mul(2_246_822_519);
            h ^= h >> 13;
            (h >> 8) as f32 / (1 << 24) as f32 * 4.0 - 2.0
        })
        .collect()
}

/// A tensor of this type filled from [`pseudo_random`]: floats times `scale`, integers over their whole range.
pub fn pseudo_random_tensor(ty: &TensorType, input: usize, scale: f32) -> Tensor {
    let x = pseudo_random(ty.shape.elements(), input);
    let shape = ty.shape.clone();
    // [-2, 2) to 0..=255, evenly.
    let code = |x: &f32| ((x + 2.0) * 64.0) as u8;
    let tensor = match ty.dtype {
        DType::F32 => Tensor::from_vec(shape, x.iter().map(|x| x * scale).collect()),
        DType::U8 => Tensor::from_vec(shape, x.iter().map(code).collect()),
        DType::S8 => Tensor::from_vec(shape, x.iter().map(|x| code(x) as i8).collect()),
        other => panic!("no test input of {other}"),
    };
    tensor.expect("as many elements as the shape has")
}

/// Test inputs for a graph.
pub fn inputs(graph: &Graph, scale: f32) -> Vec<Tensor> {
    let types = graph.inputs().iter().map(|i| graph.ty(i.out()));
    types.enumerate().map(|(k, ty)| pseudo_random_tensor(ty, k, scale)).collect()
}

/// A pool of this many threads, started anew for each step: slow, and as adversarial in its timing as it gets.
pub struct Threads(pub usize);

impl Parallel for Threads {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| {
            for part in 0..parts {
                s.spawn(move || f(part));
            }
        });
    }
}

/// Compiles a placed graph for a tier.
pub fn compile(graph: &Graph, tier: &'static Tier) -> Result<Arc<CompiledModel>, CodegenError> {
    qcc_codegen::compile(graph, &Options::new(tier)).map(Arc::new)
}

/// Runs a compiled model on these inputs.
pub fn run(
    model: &Arc<CompiledModel>,
    inputs: &[Tensor],
    threads: usize,
) -> Result<Vec<Tensor>, CodegenError> {
    let mut buffers: Vec<Vec<u8>> = model.outputs().iter().map(|(_, ty)| vec![0xa5; ty.bytes()]).collect();
    let given: Vec<&[u8]> = inputs.iter().map(|t| &t.bytes()[..]).collect();
    let mut taken: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    let pool: &dyn Parallel = if threads > 1 { &Threads(threads) } else { &Serial };
    Execution::new(model.clone()).run(&given, &mut taken, pool, None)?;
    let tensor = |((_, ty), bytes): (&(String, TensorType), Vec<u8>)| {
        Tensor::from_bytes(ty.dtype, ty.shape.clone(), bytes.into()).expect("a buffer of the type's size")
    };
    Ok(model.outputs().iter().zip(buffers).map(tensor).collect())
}

/// The largest difference of two float tensors, as a share of the largest magnitude in `expected`.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let magnitude = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let difference = |(g, e): (&f32, &f32)| if g.to_bits() == e.to_bits() { 0.0 } else { (g - e).abs() };
    // A NaN stays: it is not less than anything.
    let worse = |m: f32, d: f32| if m.is_nan() || d <= m { m } else { d };
    let largest = got.iter().zip(expected).map(difference).fold(0f32, worse);
    if largest == 0.0 { 0.0 } else { largest / magnitude }
}

/// A shape, for tests.
pub fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).expect("a small shape")
}
