//! Convolutions and matrix products against their definitions, on every tier of this CPU.

use super::{Threads, check, compiled, placed, plain, quantized, run, tiers};
use crate::{CompiledModel, ListingKind, Options, Parallel, Serial, Tier, Tiling, capability, compile};
use proptest::{prelude::*, test_runner::TestCaseResult};
use qcc_ir::{
    DType, Graph, NodeId, Op, OutputGrid, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::RequantMode,
    ops::{Clamp, Conv, Layout, MatMul, QConv, QMatMul, Transpose, Window},
};
use std::{collections::BTreeMap, sync::Arc};

/// A small generator, so that a case is a few numbers that proptest can shrink.
pub(super) struct Random {
    state: u64,
    /// Whether codes are the smallest and largest only.
    extreme: bool,
}

impl Random {
    /// One case in eight has extreme codes.
    pub(super) fn new(seed: u64) -> Random {
        Random { state: seed, extreme: seed.is_multiple_of(8) }
    }
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.state >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// Codes, every eighth an extreme one.
    pub(super) fn code(&mut self, lo: i32, hi: i32) -> i32 {
        match self.below(if self.extreme { 2 } else { 16 }) {
            0 => lo,
            1 => hi,
            _ => lo + self.below((hi - lo + 1) as usize) as i32,
        }
    }
    pub(super) fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32
    }
    fn signed(&mut self) -> f32 {
        self.unit() * 2.0 - 1.0
    }
}

pub(super) fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

pub(super) fn u8_tensor(r: &mut Random, s: &Shape) -> Tensor {
    Tensor::from_vec(s.clone(), (0..s.elements()).map(|_| r.code(0, 255) as u8).collect()).unwrap()
}

/// Weights: of the whole range, or of 7 bits, which some tiers multiply by other instructions.
pub(super) fn s8_tensor(r: &mut Random, s: &Shape, bits: WeightBits) -> Tensor {
    let (lo, hi) = match bits {
        WeightBits::Eight => (-128, 127),
        WeightBits::Seven => (-64, 64),
    };
    Tensor::from_vec(s.clone(), (0..s.elements()).map(|_| r.code(lo, hi) as i8).collect()).unwrap()
}

#[derive(Clone, Copy, Debug)]
pub(super) enum WeightBits {
    Seven,
    Eight,
}

pub(super) fn weight_bits() -> impl Strategy<Value = WeightBits> {
    prop::sample::select(vec![WeightBits::Seven, WeightBits::Eight])
}

pub(super) fn f32_tensor(r: &mut Random, s: &Shape) -> Tensor {
    Tensor::from_vec(s.clone(), (0..s.elements()).map(|_| r.signed()).collect()).unwrap()
}

/// One op under test: its operands as graph inputs and constants, and what they hold.
pub(super) struct Case {
    graph: Graph,
    node: NodeId,
    /// All operands, constants included.
    operands: Vec<Tensor>,
    /// Bytes of the inputs.
    inputs: Vec<Vec<u8>>,
}

/// Puts operands into a graph: inputs, behind a copy or not, and constants.
pub(super) struct Builder {
    graph: Graph,
    values: Vec<ValueId>,
    operands: Vec<Tensor>,
    inputs: Vec<Vec<u8>>,
}

impl Builder {
    pub(super) fn new() -> Builder {
        Builder { graph: Graph::new("case"), values: vec![], operands: vec![], inputs: vec![] }
    }
    pub(super) fn input(&mut self, tensor: Tensor, quant: Option<QuantParams>) {
        let ty = TensorType { quant, ..tensor.ty() };
        self.values.push(self.graph.input("x", ty).unwrap());
        self.inputs.push(tensor.bytes().to_vec());
        self.operands.push(tensor);
    }
    pub(super) fn constant(&mut self, tensor: Tensor, quant: Option<QuantParams>) {
        let ty = TensorType { quant, ..tensor.ty() };
        self.values.push(match ty.quant {
            Some(_) => self.graph.quantized_constant("w", tensor.clone(), ty).unwrap(),
            None => self.graph.constant("w", tensor.clone()),
        });
        self.operands.push(tensor);
    }
    pub(super) fn finish(mut self, op: impl Into<Op>) -> Option<Case> {
        let node = self.graph.add("op", op, &self.values).ok()?;
        self.graph.output("y", node.out());
        Some(Case { graph: placed(&self.graph), node, operands: self.operands, inputs: self.inputs })
    }
}

impl Case {
    fn expected(&self) -> Tensor {
        let types: Vec<&TensorType> =
            self.graph.operands(self.node).into_iter().map(|v| self.graph.ty(v)).collect();
        let operands: Vec<&Tensor> = self.operands.iter().collect();
        let results = self.graph.node(self.node).outputs();
        let op = self.graph.op(self.node).unwrap();
        op.eval(&operands, &types, results).unwrap().remove(0)
    }

    /// Compiles and runs on every tier and with one and several threads; `check(tier, bytes)` judges.
    fn on_every_tier(&self, check: impl Fn(&Tier, &[u8]) -> TestCaseResult) -> TestCaseResult {
        prop_assert_eq!(capability(&self.graph, self.node), Ok(()));
        for tier in tiers() {
            let model: Arc<CompiledModel> = compiled(&self.graph, tier);
            let inputs: Vec<&[u8]> = self.inputs.iter().map(Vec::as_slice).collect();
            // An odd number of threads, so that ranges begin and end anywhere.
            let pools: [&dyn Parallel; 2] = [&Serial, &Threads(7)];
            for pool in pools {
                check(tier, &run(&model, &inputs, pool)[0])?;
            }
        }
        Ok(())
    }

    pub(super) fn equals_bits(&self) -> TestCaseResult {
        let expected = self.expected();
        self.on_every_tier(|tier, got| {
            let wrong = got.iter().zip(expected.bytes()).filter(|(a, b)| a != b).count();
            let first = got.iter().zip(expected.bytes()).position(|(a, b)| a != b);
            prop_assert_eq!(wrong, 0, "of {} on {}, first at {:?}", got.len(), tier, first);
            Ok(())
        })
    }

    /// Sums in another order differ by at most the terms' magnitudes times their number times an ulp.
    fn is_close(&self, terms: usize) -> TestCaseResult {
        let expected = self.expected();
        let expected = expected.as_slice::<f32>().unwrap();
        // Weights and activations are within ±1.
        let bound = (terms + 2) as f32 * (terms + 2) as f32 * f32::EPSILON;
        self.on_every_tier(|tier, got| {
            for (i, (e, g)) in expected.iter().zip(got.chunks_exact(4)).enumerate() {
                let g = f32::from_le_bytes(g.try_into().unwrap());
                prop_assert!((e - g).abs() <= bound, "{g} instead of {e} at {i} on {tier}");
            }
            Ok(())
        })
    }
}

/// A convolution, in numbers.
#[derive(Clone, Debug)]
pub(super) struct ConvCase {
    pub(super) seed: u64,
    batch: usize,
    spatial: [usize; 2],
    kernel: [usize; 2],
    strides: [usize; 2],
    dilations: [usize; 2],
    pads: [usize; 4],
    pub(super) groups: usize,
    inputs: usize,
    outputs: usize,
    pub(super) bias: bool,
    pub(super) residual: bool,
}

pub(super) fn conv_case() -> impl Strategy<Value = ConvCase> {
    let window = ([1usize..4, 1..4], [1usize..4, 1..4], [1usize..3, 1..3], [0usize..3, 0..3, 0..3, 0..3]);
    let channels = (prop_oneof![3 => Just(1usize), 1 => 2usize..4], 1usize..10, 1usize..40);
    let rest = (any::<u64>(), 1usize..3, [1usize..12, 1..12], any::<bool>(), any::<bool>());
    (window, channels, rest).prop_map(|(window, (groups, inputs, outputs), rest)| {
        let (kernel, strides, dilations, pads) = window;
        let (seed, batch, spatial, bias, residual) = rest;
        let outputs = if groups > 1 { outputs.div_ceil(2) } else { outputs };
        ConvCase {
            seed,
            batch,
            spatial,
            kernel,
            strides,
            dilations,
            pads,
            groups,
            inputs,
            outputs,
            bias,
            residual,
        }
    })
}

/// A depthwise convolution: small images of many shapes of windows, and wide ones that are cut into several strips.
pub(super) fn depthwise_case() -> impl Strategy<Value = ConvCase> {
    let window = ([1usize..8, 1..8], [1usize..4, 1..4], [1usize..3, 1..3], [0usize..5, 0..5, 0..5, 0..5]);
    let spatial = prop_oneof![4 => [1usize..20, 1..20], 1 => [1usize..5, 60..150]];
    // Two channels at least: one would be a dense convolution.
    let rest = (any::<u64>(), 1usize..3, 2usize..=130, any::<bool>(), any::<bool>());
    (window, spatial, rest).prop_map(|(window, spatial, rest)| {
        let (kernel, strides, dilations, pads) = window;
        let (seed, batch, groups, bias, residual) = rest;
        let (inputs, outputs) = (1, 1);
        ConvCase {
            seed,
            batch,
            spatial,
            kernel,
            strides,
            dilations,
            pads,
            groups,
            inputs,
            outputs,
            bias,
            residual,
        }
    })
}

impl ConvCase {
    pub(super) fn window(&self) -> Window {
        Window::new(self.kernel)
            .strides(self.strides)
            .dilations(self.dilations)
            .pads([self.pads[0], self.pads[1]], [self.pads[2], self.pads[3]])
    }

    /// Shapes of input, weights and result; `None` where the window does not fit.
    pub(super) fn shapes(&self) -> Option<[Shape; 3]> {
        let [h, w] = self.spatial;
        let [kh, kw] = self.kernel;
        let out = self.window().output(&[h, w], false).ok()?;
        let (inputs, outputs) = (self.groups * self.inputs, self.groups * self.outputs);
        Some([
            shape(&[self.batch, h, w, inputs]),
            shape(&[outputs, self.inputs, kh, kw]),
            shape(&[self.batch, out[0], out[1], outputs]),
        ])
    }

    fn terms(&self) -> usize {
        self.inputs * self.kernel[0] * self.kernel[1]
    }

    fn quantized(&self, mode: RequantMode) -> Option<Case> {
        self.quantized_to(WeightBits::Eight, mode)
    }

    fn quantized_to(&self, bits: WeightBits, mode: RequantMode) -> Option<Case> {
        let [x, w, y] = self.shapes()?;
        let mut r = Random::new(self.seed);
        let mut b = Builder::new();
        let grids = Grids::random(&mut r, mode, self.terms(), w[0]);
        b.input(u8_tensor(&mut r, &x), Some(grids.x.clone()));
        b.constant(s8_tensor(&mut r, &w, bits), Some(grids.weights(0)));
        if self.bias {
            b.constant(grids.bias(&mut r), None);
        }
        if self.residual {
            b.input(u8_tensor(&mut r, &y), Some(grids.residual.clone()));
        }
        b.finish(QConv {
            window: self.window(),
            groups: self.groups,
            layout: Layout::ChannelsLast,
            bias: self.bias,
            residual: self.residual,
            requant: mode,
            output: grids.output,
        })
    }

    fn float(&self) -> Option<Case> {
        let [x, w, y] = self.shapes()?;
        let mut r = Random::new(self.seed);
        let mut b = Builder::new();
        b.input(f32_tensor(&mut r, &x), None);
        b.constant(f32_tensor(&mut r, &w), None);
        if self.bias {
            b.constant(f32_tensor(&mut r, &shape(&[w[0]])), None);
        }
        if self.residual {
            b.input(f32_tensor(&mut r, &y), None);
        }
        b.finish(Conv {
            window: self.window(),
            groups: self.groups,
            layout: Layout::ChannelsLast,
            bias: self.bias,
            residual: self.residual,
            clamp: random_clamp(&mut r),
        })
    }
}

pub(super) fn random_clamp(r: &mut Random) -> Clamp {
    match r.below(4) {
        0 => Clamp::RELU,
        1 => Clamp { lo: -0.25, hi: 0.5 },
        2 => Clamp { lo: f32::NEG_INFINITY, hi: 0.25 },
        _ => Clamp::NONE,
    }
}

/// The grids of an int8 product, such that its mode can express it.
#[derive(Clone)]
struct Grids {
    x: QuantParams,
    scales: Vec<f32>,
    residual: QuantParams,
    output: OutputGrid,
}

impl Grids {
    fn random(r: &mut Random, mode: RequantMode, terms: usize, channels: usize) -> Grids {
        let power = |n: i32| 2f32.powi(n);
        // So that typical accumulators fill the output's range, and some overflow it.
        let typical = 1.0 / (90.0 * (terms as f32).sqrt());
        let factor = |r: &mut Random| match mode {
            RequantMode::Pow2 => power((typical.log2().round() as i32 + r.below(4) as i32 - 2).min(0)),
            // q15 needs factors below 2^-4, less with a residual.
            RequantMode::Q15 => (typical * power(r.below(5) as i32 - 3)).min(1.0 / 40.0),
            _ if r.below(8) == 0 => 0.5 + r.unit() * 3.0,
            _ => typical * (0.2 + r.unit()) * power(r.below(3) as i32 - 1),
        };
        let scales = (0..channels).map(|_| factor(r)).collect();
        let residual_scale = match mode {
            RequantMode::Pow2 => power(r.below(3) as i32 - 1),
            RequantMode::Q15 => 0.1 + r.unit(),
            _ => 0.1 + 2.0 * r.unit(),
        };
        let (lo, hi) =
            if r.below(2) == 0 { (0, 255) } else { (r.below(100) as i32, 120 + r.below(135) as i32) };
        Grids {
            x: QuantParams::per_tensor(1.0, r.code(0, 255)).unwrap(),
            scales,
            residual: QuantParams::per_tensor(residual_scale, r.code(0, 255)).unwrap(),
            output: OutputGrid { dtype: DType::U8, scale: 1.0, zero_point: r.code(0, 255), lo, hi },
        }
    }

    fn weights(&self, axis: usize) -> QuantParams {
        QuantParams::per_axis(axis, self.scales.clone(), vec![0; self.scales.len()]).unwrap()
    }

    fn bias(&self, r: &mut Random) -> Tensor {
        let bias = self.scales.iter().map(|&s| (r.signed() * 100.0 / s) as i32).collect();
        Tensor::from_vec(shape(&[self.scales.len()]), bias).unwrap()
    }
}

/// A matrix product, in numbers.
#[derive(Clone, Debug)]
pub(super) struct MatMulCase {
    pub(super) seed: u64,
    lead: usize,
    rows: usize,
    inner: usize,
    columns: usize,
    pub(super) bias: bool,
    pub(super) residual: bool,
}

pub(super) fn matmul_case() -> impl Strategy<Value = MatMulCase> {
    (any::<u64>(), 1usize..3, 1usize..40, 1usize..70, 1usize..150, any::<bool>(), any::<bool>()).prop_map(
        |(seed, lead, rows, inner, columns, bias, residual)| MatMulCase {
            seed,
            lead,
            rows,
            inner,
            columns,
            bias,
            residual,
        },
    )
}

impl MatMulCase {
    pub(super) fn shapes(&self) -> [Shape; 3] {
        [
            shape(&[self.lead, self.rows, self.inner]),
            shape(&[self.inner, self.columns]),
            shape(&[self.lead, self.rows, self.columns]),
        ]
    }

    fn quantized_to(&self, bits: WeightBits, mode: RequantMode) -> Option<Case> {
        let [x, w, y] = self.shapes();
        let mut r = Random::new(self.seed);
        let mut b = Builder::new();
        let grids = Grids::random(&mut r, mode, self.inner, self.columns);
        b.input(u8_tensor(&mut r, &x), Some(grids.x.clone()));
        b.constant(s8_tensor(&mut r, &w, bits), Some(grids.weights(1)));
        if self.bias {
            b.constant(grids.bias(&mut r), None);
        }
        if self.residual {
            b.input(u8_tensor(&mut r, &y), Some(grids.residual.clone()));
        }
        b.finish(QMatMul { bias: self.bias, residual: self.residual, requant: mode, output: grids.output })
    }

    fn float(&self) -> Option<Case> {
        let [x, w, y] = self.shapes();
        let mut r = Random::new(self.seed);
        let mut b = Builder::new();
        b.input(f32_tensor(&mut r, &x), None);
        b.constant(f32_tensor(&mut r, &w), None);
        if self.bias {
            b.constant(f32_tensor(&mut r, &shape(&[w[1]])), None);
        }
        if self.residual {
            b.input(f32_tensor(&mut r, &y), None);
        }
        b.finish(MatMul { bias: self.bias, residual: self.residual, clamp: random_clamp(&mut r) })
    }
}

/// Leading dimensions of two operands that broadcast, rows, inner, columns.
type Pairs = (Vec<usize>, Vec<usize>, usize, usize, usize);

fn pairs() -> impl Strategy<Value = Pairs> {
    let lead = prop::sample::select(vec![
        (vec![], vec![]),
        (vec![3], vec![]),
        (vec![3], vec![3]),
        (vec![2, 3], vec![2, 3]),
        (vec![2, 1], vec![3]),
        (vec![1, 3], vec![2, 1]),
        (vec![], vec![2]),
        (vec![2], vec![1, 1]),
    ]);
    (lead, 1usize..20, 1usize..40, prop_oneof![1usize..20, 30usize..70, 120usize..150])
        .prop_map(|((a, b), rows, inner, columns)| (a, b, rows, inner, columns))
}

/// The shapes of both operands and of the result; `None` where they do not broadcast.
fn shapes_of((a, b, rows, inner, columns): &Pairs) -> Option<[Shape; 3]> {
    let of = |lead: &[usize], m: usize, n: usize| shape(&[lead, &[m, n]].concat());
    let lead = shape(a).broadcast(&shape(b))?;
    Some([of(a, *rows, *inner), of(b, *inner, *columns), of(&lead, *rows, *columns)])
}

/// A product of two values, neither of them a constant unless `constant` says so of the second.
fn product_of_values(
    pairs: &Pairs,
    (constant, bias, residual): (bool, bool, bool),
    seed: u64,
) -> Option<Case> {
    let mut r = Random::new(seed);
    let mut builder = Builder::new();
    let [a, b, y] = shapes_of(pairs)?;
    builder.input(f32_tensor(&mut r, &a), None);
    match constant {
        true => builder.constant(f32_tensor(&mut r, &b), None),
        false => builder.input(f32_tensor(&mut r, &b), None),
    }
    if bias {
        builder.constant(f32_tensor(&mut r, &shape(&[y[y.rank() - 1]])), None);
    }
    if residual {
        builder.input(f32_tensor(&mut r, &y), None);
    }
    builder.finish(MatMul { bias, residual, clamp: random_clamp(&mut r) })
}

/// The same on codes, with any zero points.
fn product_of_codes(
    pairs: &Pairs,
    (constant, bias, residual): (bool, bool, bool),
    zero_points: [i32; 2],
    mode: RequantMode,
    seed: u64,
) -> Option<Case> {
    let mut r = Random::new(seed);
    let mut builder = Builder::new();
    let [a, b, y] = shapes_of(pairs)?;
    let grids = Grids::random(&mut r, mode, a[a.rank() - 1], 1);
    let grid = |scale: f32, zero: i32| Some(QuantParams::per_tensor(scale, zero).unwrap());
    builder.input(u8_tensor(&mut r, &a), grid(1.0, zero_points[0]));
    let (second, own) = (u8_tensor(&mut r, &b), grid(grids.scales[0], zero_points[1]));
    match constant {
        true => builder.constant(second, own),
        false => builder.input(second, own),
    }
    if bias {
        let grids = Grids { scales: vec![grids.scales[0]; y[y.rank() - 1]], ..grids.clone() };
        builder.constant(grids.bias(&mut r), None);
    }
    if residual {
        builder.input(u8_tensor(&mut r, &y), Some(grids.residual.clone()));
    }
    builder.finish(QMatMul { bias, residual, requant: mode, output: grids.output })
}

/// Zero points, those at which packing differs most of all.
fn zero_point() -> impl Strategy<Value = i32> {
    prop_oneof![Just(128), Just(0), Just(255), Just(1), Just(127), Just(129), 0..=255]
}

/// A case that exists: windows that do not fit and factors that a mode refuses are drawn again.
pub(super) fn exists(case: Option<Case>) -> Result<Case, TestCaseError> {
    case.filter(|c| capability(&c.graph, c.node).is_ok()).ok_or_else(|| TestCaseError::reject("no such case"))
}

fn any_mode() -> impl Strategy<Value = RequantMode> {
    prop::sample::select(RequantMode::ALL.to_vec())
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, max_global_rejects: 20 * cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn quantized_convolutions_equal_their_definition(
        case in conv_case(),
        bits in weight_bits(),
        mode in any_mode(),
    ) {
        exists(case.quantized_to(bits, mode))?.equals_bits()?;
    }

    #[test]
    fn quantized_depthwise_convolutions_equal_their_definition(
        case in depthwise_case(),
        bits in weight_bits(),
        mode in any_mode(),
    ) {
        exists(case.quantized_to(bits, mode))?.equals_bits()?;
    }

    #[test]
    fn quantized_matrix_products_equal_their_definition(
        case in matmul_case(),
        bits in weight_bits(),
        mode in any_mode(),
    ) {
        exists(case.quantized_to(bits, mode))?.equals_bits()?;
    }

    #[test]
    fn products_of_two_values_of_codes_equal_their_definition(
        pairs in pairs(),
        with: (bool, bool, bool),
        zero_points in [zero_point(), zero_point()],
        mode in any_mode(),
        seed: u64,
    ) {
        exists(product_of_codes(&pairs, with, zero_points, mode, seed))?.equals_bits()?;
    }
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn float_convolutions_are_close(case in conv_case()) {
        exists(case.float())?.is_close(case.terms())?;
    }

    #[test]
    fn float_depthwise_convolutions_are_close(case in depthwise_case()) {
        exists(case.float())?.is_close(case.terms())?;
    }

    #[test]
    fn float_matrix_products_are_close(case in matmul_case()) {
        exists(case.float())?.is_close(case.inner)?;
    }

    #[test]
    fn products_of_transposed_values_are_close(dims in [1usize..4, 1..20, 1..5, 1..40], columns in 1usize..70, seed: u64) {
        let [batch, rows, heads, inner] = dims;
        let mut r = Random::new(seed);
        let mut builder = Builder::new();
        builder.input(f32_tensor(&mut r, &shape(&[batch, rows, heads, inner])), None);
        builder.input(f32_tensor(&mut r, &shape(&[batch, columns, heads, inner])), None);
        let transposed: Vec<(Tensor, ValueId)> = [[0, 2, 1, 3], [0, 2, 3, 1]]
            .into_iter()
            .enumerate()
            .map(|(i, perm)| {
                let (op, x) = (Op::from(Transpose { perm: perm.to_vec() }), builder.operands[i].clone());
                let results = op.infer(&[&x.ty()]).unwrap();
                let moved = op.eval(&[&x], &[&x.ty()], &results).unwrap().remove(0);
                (moved, builder.graph.add("transposed", op, &[builder.values[i]]).unwrap().out())
            })
            .collect();
        (builder.operands, builder.values) = transposed.into_iter().unzip();
        let product = MatMul { bias: false, residual: false, clamp: random_clamp(&mut r) };
        exists(builder.finish(product))?.is_close(inner)?;
    }

    #[test]
    fn products_of_two_values_are_close(pairs in pairs(), with: (bool, bool, bool), seed: u64) {
        exists(product_of_values(&pairs, with, seed))?.is_close(pairs.3)?;
    }
}

/// Convolutions that are large enough to be split between threads, and what random ones rarely are.
fn large_cases() -> Vec<ConvCase> {
    let plain = ConvCase {
        seed: 1,
        batch: 1,
        spatial: [15, 15],
        kernel: [3, 3],
        strides: [1, 1],
        dilations: [1, 1],
        pads: [1, 1, 1, 1],
        groups: 1,
        inputs: 32,
        outputs: 100,
        bias: true,
        residual: true,
    };
    let depthwise = ConvCase { spatial: [40, 71], groups: 100, inputs: 1, outputs: 1, ..plain.clone() };
    vec![
        // Edges right and below, three widths of panels, rows of several images.
        ConvCase { batch: 2, ..plain.clone() },
        // One pixel a time is left at the end of a long flattened row.
        ConvCase { kernel: [1, 1], pads: [0; 4], spatial: [29, 29], outputs: 129, ..plain.clone() },
        // A stem: runs of 21 bytes, no multiple of 4.
        ConvCase {
            spatial: [60, 60],
            kernel: [7, 7],
            strides: [2, 2],
            pads: [3; 4],
            inputs: 3,
            ..plain.clone()
        },
        // Groups with a panel each.
        ConvCase {
            groups: 8,
            inputs: 9,
            outputs: 20,
            dilations: [2, 3],
            pads: [2, 3, 2, 3],
            ..plain.clone()
        },
        // Several tiles in a row of a depthwise convolution, and a last panel of 4.
        depthwise.clone(),
        // A border that is wider than the kernel, and of which some windows see nothing else.
        ConvCase { kernel: [5, 3], pads: [9, 8, 7, 6], dilations: [1, 2], ..depthwise.clone() },
        // Rows of a batch, each one pixel high.
        ConvCase { batch: 3, spatial: [1, 300], kernel: [1, 9], pads: [0, 4, 0, 4], ..depthwise.clone() },
        // More rows of taps than one multiplication takes, and strides.
        ConvCase { kernel: [7, 5], pads: [3, 2, 3, 2], strides: [2, 2], groups: 37, ..depthwise.clone() },
        // Too many taps to unroll.
        ConvCase { spatial: [24, 24], kernel: [12, 12], pads: [5; 4], groups: 12, ..depthwise },
    ]
}

#[test]
fn large_convolutions_are_right_on_any_number_of_threads() {
    for case in large_cases() {
        for (mode, bits) in [
            (RequantMode::Shift, WeightBits::Eight),
            (RequantMode::Q15, WeightBits::Seven),
            (RequantMode::Q15, WeightBits::Eight),
        ] {
            let built = case.quantized_to(bits, mode).expect("the window fits");
            built.equals_bits().unwrap_or_else(|e| panic!("{case:?} in {mode}: {e}"));
        }
        let built = case.float().expect("the window fits");
        built.is_close(case.terms()).unwrap_or_else(|e| panic!("{case:?}: {e}"));
    }
}

/// Large enough for several tiles, panels and threads, and with tails of all kinds.
fn large_pairs() -> Vec<Pairs> {
    vec![
        (vec![2, 3], vec![2, 3], 70, 64, 131),
        (vec![3], vec![3], 33, 131, 96),
        (vec![2, 1], vec![1, 3], 49, 197, 20),
        (vec![], vec![], 1, 1, 1),
        (vec![5], vec![5], 1, 300, 65),
    ]
}

#[test]
fn large_products_of_codes_are_right_in_every_tiling() {
    for pairs in large_pairs() {
        // Seed 8: all codes are extremes.
        for (seed, zero_points) in [(1, [0, 128]), (2, [131, 117]), (8, [255, 0]), (8, [0, 255])] {
            let case = product_of_codes(&pairs, (false, true, true), zero_points, RequantMode::Shift, seed);
            let case = case.expect("the operands have a product");
            case.equals_bits().unwrap_or_else(|e| panic!("{pairs:?}: {e}"));
            every_tiling_agrees(&case);
        }
    }
}

/// Heads of attention: `[batch, tokens, heads, length]` operands, transposed by these and multiplied.
fn of_heads(ty: impl Fn(&[usize]) -> TensorType, perms: [[usize; 4]; 2], op: impl Into<Op>) -> Graph {
    let mut g = Graph::new("heads");
    let operands: Vec<ValueId> = [("q", 9), ("k", 21)]
        .into_iter()
        .zip(perms)
        .map(|((name, tokens), perm)| {
            let x = g.input(name, ty(&[2, tokens, 3, 35])).unwrap();
            g.add("transposed", Transpose { perm: perm.to_vec() }, &[x]).unwrap().out()
        })
        .collect();
    let y = g.add("product", op, &operands).unwrap().out();
    g.output("y", y);
    g
}

#[test]
fn transposes_before_products_of_values_are_the_order_of_packing() {
    let scores = [[0, 2, 1, 3], [0, 2, 3, 1]];
    let codes = |dims: &[usize]| quantized(DType::U8, dims, 0.02, 117);
    let output = OutputGrid { dtype: DType::U8, scale: 0.3, zero_point: 100, lo: 0, hi: 255 };
    let product = QMatMul { bias: false, residual: false, requant: RequantMode::Shift, output };
    let float = MatMul { bias: false, residual: false, clamp: Clamp::NONE };
    let heads = of_heads(codes, scores, product);
    check(&heads, 5);
    let floats = of_heads(|dims| plain(DType::F32, dims), scores, float);
    for graph in [heads, floats] {
        for tier in tiers() {
            let model = compiled(&graph, tier);
            let kernels: Vec<&str> = model.steps().iter().map(|s| s.kernel.as_str()).collect();
            assert!(!kernels.contains(&"transpose"), "{kernels:?} on {tier}");
        }
    }
}

#[test]
fn every_tiling_gives_the_same_bits() {
    for case in large_cases() {
        let quantized = case.quantized(RequantMode::Q15).expect("the window fits");
        for built in [quantized, case.float().expect("the window fits")] {
            every_tiling_agrees(&built);
        }
    }
}

/// Compiles a case with each tiling that it could have and holds the results against those of the first.
fn every_tiling_agrees(built: &Case) {
    for tier in tiers() {
        let inputs: Vec<&[u8]> = built.inputs.iter().map(Vec::as_slice).collect();
        let model = compiled(&built.graph, tier);
        let expected = run(&model, &inputs, &Serial);
        let step = model.steps().iter().find(|s| !s.tilings.is_empty());
        for &tiling in step.iter().flat_map(|s| &s.tilings) {
            let tilings = BTreeMap::from([(built.node, tiling)]);
            let options = Options { tilings, ..Options::new(tier) };
            let other = Arc::new(compile(&built.graph, &options).expect("the graph compiles"));
            assert!(run(&other, &inputs, &Threads(3)) == expected, "{tiling} on {tier}");
        }
    }
}

#[test]
fn a_tiling_that_is_asked_for_is_used_and_an_unknown_one_ignored() {
    let case = large_cases().remove(0).quantized(RequantMode::Q15).expect("the window fits");
    let kernel_with = |tilings: BTreeMap<NodeId, Tiling>| {
        let options = Options { tilings, ..Options::new(tiers()[0]) };
        let model = compile(&case.graph, &options).expect("the graph compiles");
        let step = model.steps().iter().find(|s| s.node == case.node && !s.tilings.is_empty());
        step.map(|s| (s.kernel.clone(), s.tilings.clone())).expect("the convolution has a step")
    };
    let (best, tilings) = kernel_with(BTreeMap::new());
    let pixels = |t: &Tiling| t.rows * t.cols;
    let other = *tilings.iter().find(|t| pixels(t) != pixels(&tilings[0])).expect("more than one shape");
    let (asked, _) = kernel_with(BTreeMap::from([(case.node, other)]));
    assert!(asked.contains(&format!("_{}x{}", pixels(&other), other.panel)), "{asked}");
    let (ignored, _) = kernel_with(BTreeMap::from([(case.node, Tiling { rows: 999, ..other })]));
    assert_eq!(ignored, best);
}

#[test]
fn extreme_windows_are_computed_or_refused() {
    let case = ConvCase {
        seed: 3,
        batch: 1,
        spatial: [3, 3],
        kernel: [1, 2],
        strides: [1 << 30, 1 << 30],
        dilations: [1 << 30, 1],
        pads: [0; 4],
        groups: 1,
        inputs: 5,
        outputs: 70,
        bias: true,
        residual: false,
    };
    let far = case.quantized(RequantMode::Float).expect("one window fits");
    far.equals_bits().unwrap_or_else(|e| panic!("{e}"));
    let padded = ConvCase { pads: [(1 << 31) - 1; 4], ..case };
    let padded = padded.quantized(RequantMode::Float).expect("a few windows fit");
    let refused = capability(&padded.graph, padded.node).expect_err("the padded image is too large");
    assert!(refused.contains("padded image"), "{refused}");
}

/// Listing of the one tile that a tier compiles for a 1x1 convolution of 64 to 8 channels on so many pixels.
fn tile_listing(tier: &'static Tier, pixels: usize, bits: WeightBits) -> String {
    let case = ConvCase {
        seed: 7,
        batch: 1,
        spatial: [1, pixels],
        kernel: [1, 1],
        strides: [1, 1],
        dilations: [1, 1],
        pads: [0; 4],
        groups: 1,
        inputs: 64,
        outputs: 8,
        bias: false,
        residual: false,
    };
    let case = case.quantized_to(bits, RequantMode::Shift).expect("the window fits");
    let text = compiled(&case.graph, tier).listing(ListingKind::Asm);
    text.split("; ").filter(|f| f.contains("_tile_")).collect()
}

/// Listing of the strips that a tier assembles for a depthwise 3x3 convolution of 64 channels on 8x8 pixels.
fn strip_listing(tier: &'static Tier, bits: WeightBits) -> String {
    let mut case = large_cases().remove(0);
    case = ConvCase { spatial: [8, 8], groups: 64, inputs: 1, outputs: 1, residual: false, ..case };
    let case = case.quantized_to(bits, RequantMode::Q15).expect("the window fits");
    let text = compiled(&case.graph, tier).listing(ListingKind::Asm);
    text.split("; ").filter(|f| f.contains("_strip_")).collect()
}

/// Two output rows share the interleaved rows, which four rows are: each of 3 columns of taps is one product a row.
#[test]
fn depthwise_strips_use_the_instructions_of_their_tier() {
    let count = |name: &str, what: &str| {
        let tier = Tier::from_name(name).filter(|t| tiers().contains(t));
        tier.map(|t| strip_listing(t, WeightBits::Eight).matches(what).count())
    };
    // 8 columns are two blocks of 3, which are a loop, and one of 2; four vectors.
    assert!([None, Some((3 + 2) * 2 * 3 * 4)].contains(&count("avx512vnni", "vpdpbusd zmm")));
    // No copy of the input, and no 128-bit tile.
    for tier in ["avx512vnni", "avxvnni", "avx2"] {
        assert!([None, Some(0)].contains(&count(tier, "pad__")), "{tier}");
        assert!([None, Some(0)].contains(&count(tier, "_tile_")), "{tier}");
    }
    // One pixel a block; 64 channels are two panels of four vectors, which share their code.
    assert!([None, Some(2 * 3 * 4)].contains(&count("avxvnni", "vpdpbusd ymm")));
    // Two groups of two rows.
    assert!([None, Some(2 * 2 * 3 * 4)].contains(&count("avx2", "vpmaddwd ymm")));
    // Of weights of 7 bits one group of four rows.
    let tier = Tier::from_name("avx2").filter(|t| tiers().contains(t));
    let narrow = tier.map(|t| strip_listing(t, WeightBits::Seven).matches("vpmaddubsw ymm").count());
    assert!([None, Some(2 * 3 * 4)].contains(&narrow));
}

/// Cranelift selects the dot product by its pattern; a tree that is disturbed would still be right, and slow.
#[test]
fn the_dot_product_is_one_instruction() {
    let tier = Tier::from_name("xmm-vnni").expect("the tier exists");
    if !tiers().contains(&tier) {
        return;
    }
    let text = tile_listing(tier, 6, WeightBits::Eight);
    // Two vectors, 4 groups unrolled.
    assert_eq!(text.matches("vpdpbusd xmm").count(), 6 * 2 * 4, "{text}");
    assert!(!text.contains("pmaddwd"), "{text}");
}

#[test]
fn the_tier_for_every_cpu_multiplies_pairs_and_uses_no_later_instructions() {
    let tier = Tier::from_name("x86-64-v2").expect("the tier exists");
    let all = WeightBits::Eight;
    let [text, narrow] = [all, WeightBits::Seven].map(|bits| tile_listing(tier, 4, bits));
    // First and second pairs of a group, two vectors, 4 groups unrolled; a broadcast for each pair of each pixel.
    assert_eq!(text.matches("pmaddwd").count(), 4 * 2 * 2 * 4, "{text}");
    let broadcasts = text.lines().filter(|l| l.contains("shufps") && l.ends_with(",0"));
    assert_eq!(broadcasts.count(), 4 * 2 * 4, "{text}");
    assert_eq!(narrow.matches("pmaddubsw").count(), 4 * 2 * 4, "{narrow}");
    assert_eq!(narrow.matches("pmaddwd").count(), 4 * 2 * 4, "{narrow}");
    // VEX and EVEX instructions begin with a v. Constants stand behind the return.
    let code = text.split_once("ret").map_or("", |(code, _)| code);
    let later = code.lines().filter_map(|l| l.split(": ").nth(1)).find(|i| i.starts_with('v'));
    assert_eq!(later, None, "{text}");
}

/// A convolution of a batch of 3x3 images of which every channel has these weights in turn, over the pixels that make its
/// sums largest and smallest.
fn of_weights(weights: &[i8], depthwise: bool) -> Case {
    const SIDE: usize = 3;
    let channels = 16;
    let (inputs, groups, kernel) = if depthwise { (1, channels, [3, 3]) } else { (channels, 1, [1, 1]) };
    let taps = inputs * kernel[0] * kernel[1];
    // Weights of 1x1 kernels lie along the channels of a pixel, those of depthwise ones down its columns.
    let in_turn = |i: usize| weights[i % weights.len()];
    let tap = |i: usize| if depthwise { i % SIDE * SIDE + i / SIDE } else { i };
    let of_channel: Vec<i8> = (0..taps).map(|i| in_turn(tap(i))).collect();
    let w = shape(&[channels, inputs, kernel[0], kernel[1]]);
    let at = |y: usize, x: usize, c: usize| of_channel[if depthwise { SIDE * y + x } else { c }];
    let x = shape(&[2, SIDE, SIDE, channels]);
    let codes = (0..x.elements()).map(|i| {
        let (image, y, column, c) =
            (i / (SIDE * SIDE * channels), i / (SIDE * channels) % SIDE, i / channels % SIDE, i % channels);
        if (at(y, column, c) > 0) == (image == 0) { 255u8 } else { 0 }
    });
    let mut b = Builder::new();
    b.input(
        Tensor::from_vec(x.clone(), codes.collect()).unwrap(),
        Some(QuantParams::per_tensor(1.0, 0).unwrap()),
    );
    let all = (0..channels).flat_map(|_| of_channel.iter().copied()).collect();
    b.constant(
        Tensor::from_vec(w, all).unwrap(),
        Some(QuantParams::per_axis(0, vec![1.0; channels], vec![0; channels]).unwrap()),
    );
    let largest = 255 * of_channel.iter().map(|w| i32::from(*w).abs()).sum::<i32>();
    let output = OutputGrid::full(DType::U8, 2.0 * largest as f32 / 255.0, 128).unwrap();
    let window = Window::new(kernel);
    let (bias, residual, requant) = (false, false, RequantMode::Shift);
    let layout = Layout::ChannelsLast;
    b.finish(QConv { window, groups, layout, bias, residual, requant, output }).expect("the op takes them")
}

/// The names of the kernels of a case on a tier.
fn kernels(case: &Case, tier: &'static Tier) -> Vec<String> {
    compiled(&case.graph, tier).steps().iter().map(|s| s.kernel.clone()).collect()
}

/// `pmaddubsw` sums two products in 16 bits, and saturates: with weights of which pairs may leave them, another form
/// must be taken.
#[test]
fn only_weights_of_which_pairs_fit_16_bits_are_multiplied_as_bytes() {
    let fit: [&[i8]; 6] = [&[64, 64], &[-64, -64], &[127, 1], &[-128, 0], &[-128, 127], &[-127, -1, 5, 90]];
    let do_not: [&[i8]; 6] = [&[65, 64], &[-65, -64], &[127, 2], &[-128, -1], &[1, 2, 100, 29], &[127, 127]];
    for (weights, fits) in fit.map(|w| (w, true)).into_iter().chain(do_not.map(|w| (w, false))) {
        let dense = of_weights(weights, false);
        dense.equals_bits().unwrap_or_else(|e| panic!("{weights:?}: {e}"));
        // Any two taps of a channel may meet: all are alike, or these few are alone with zeros.
        let column = [weights, &[0; 9]].concat();
        let depthwise = of_weights(if weights[0] == weights[1] { weights } else { &column }, true);
        depthwise.equals_bits().unwrap_or_else(|e| panic!("depthwise {weights:?}: {e}"));
        for tier in tiers() {
            let form = if fits && tier.has_faster_narrow_products() { "qu8qs7_" } else { "qu8qs8_" };
            for case in [&dense, &depthwise] {
                let names = kernels(case, tier);
                let products: Vec<_> = names.iter().filter(|n| n.starts_with("qu8")).collect();
                assert!(
                    products.len() == 1 && products[0].starts_with(form),
                    "{tier} has {names:?} for {weights:?}"
                );
            }
        }
    }
}
