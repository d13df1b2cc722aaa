//! Elementwise ops and quantization.

use super::{check, graph_of, plain, quantized};
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, OutputGrid, QuantParams, TensorType,
    numerics::Rescaling,
    ops::{
        Binary, BinaryKind, Cast, Dequantize, FakeQuant, QBinary, QBinaryKind, QUnary, Quantize, Transpose,
        Unary, UnaryKind, Where,
    },
};

pub(crate) const UNARY: [UnaryKind; 34] = [
    UnaryKind::Relu,
    UnaryKind::LeakyRelu { alpha: 0.1 },
    UnaryKind::Clip { lo: -1.5, hi: 6.0 },
    UnaryKind::Clip { lo: f32::NEG_INFINITY, hi: 0.25 },
    UnaryKind::Sigmoid,
    UnaryKind::Tanh,
    UnaryKind::HardSigmoid { alpha: 0.2, beta: 0.5 },
    UnaryKind::HardSwish,
    UnaryKind::Silu,
    UnaryKind::Gelu,
    UnaryKind::GeluTanh,
    UnaryKind::Elu { alpha: 1.5 },
    UnaryKind::Selu { alpha: 1.6733, gamma: 1.0507 },
    UnaryKind::Mish,
    UnaryKind::Softplus,
    UnaryKind::Softsign,
    UnaryKind::Exp,
    UnaryKind::Log,
    UnaryKind::Sqrt,
    UnaryKind::Reciprocal,
    UnaryKind::Erf,
    UnaryKind::Neg,
    UnaryKind::Abs,
    UnaryKind::Sign,
    UnaryKind::Floor,
    UnaryKind::Ceil,
    UnaryKind::Round,
    UnaryKind::Identity,
    UnaryKind::HardSigmoid { alpha: -0.2, beta: 0.5 },
    UnaryKind::Celu { alpha: 0.7 },
    UnaryKind::Swish { alpha: 1.702 },
    UnaryKind::ThresholdedRelu { alpha: 0.5 },
    UnaryKind::Shrink { lambda: 0.5, bias: 0.25 },
    UnaryKind::Shrink { lambda: -0.5, bias: 1.5 },
];

const BINARY: [BinaryKind; 12] = [
    BinaryKind::Add,
    BinaryKind::Sub,
    BinaryKind::Mul,
    BinaryKind::Div,
    BinaryKind::Max,
    BinaryKind::Min,
    BinaryKind::PRelu,
    BinaryKind::Equal,
    BinaryKind::Less,
    BinaryKind::LessOrEqual,
    BinaryKind::Greater,
    BinaryKind::GreaterOrEqual,
];

/// Dimensions with tails, ones and, rarely, a zero.
pub(super) fn dims() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(
        prop_oneof![1 => Just(0usize), 6 => 1usize..6, 3 => 14usize..35, 1 => Just(64usize)],
        0..4,
    )
}

#[test]
fn every_unary_function_equals_its_definition_on_a_sweep() {
    for kind in UNARY {
        check(&graph_of(Unary { kind }, &[plain(DType::F32, &[4003])]), 7);
    }
    check(&graph_of(Unary { kind: UnaryKind::Not }, &[plain(DType::Bool, &[37])]), 7);
}

/// Operand shapes that broadcast to `dims`: bit `i` of `ones` makes dimension `i` a one, and leading ones may be left out.
fn broadcast_from(dims: &[usize], ones: u32, drop: bool) -> Vec<usize> {
    let mut from: Vec<usize> =
        dims.iter().enumerate().map(|(i, &d)| if ones >> i & 1 == 1 { 1 } else { d }).collect();
    while drop && from.first() == Some(&1) {
        from.remove(0);
    }
    from
}

fn grid(dtype: DType, scale: f32, zero_point: i32, narrow: bool) -> OutputGrid {
    let full = OutputGrid::full(dtype, scale, zero_point).unwrap();
    if narrow { OutputGrid { lo: full.lo + 3, hi: full.hi - 40, ..full } } else { full }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn binary_functions_broadcast(
        d in dims(), ones in any::<(u32, u32)>(), kind in 0..BINARY.len(), seed in any::<u64>(), integer: bool,
    ) {
        let (kind, dtype) = (BINARY[kind], if integer { DType::S32 } else { DType::F32 });
        prop_assume!(!(integer && kind == BinaryKind::Div));
        let a = plain(dtype, &broadcast_from(&d, ones.0 & !ones.1, false));
        let b = plain(dtype, &broadcast_from(&d, ones.1, true));
        check(&graph_of(Binary { kind }, &[a, b]), seed);
    }

    #[test]
    fn choices_broadcast(
        d in dims(), ones in any::<(u32, u32)>(), seed in any::<u64>(),
        dtype in prop::sample::select(vec![
            DType::F32, DType::S32, DType::U8, DType::S8, DType::U16, DType::S16, DType::Bool, DType::U4, DType::S4,
        ]),
    ) {
        let condition = plain(DType::Bool, &broadcast_from(&d, ones.0, true));
        let x = plain(dtype, &broadcast_from(&d, ones.1 & !ones.0, false));
        let y = plain(dtype, &broadcast_from(&d, ones.1 & ones.0, true));
        check(&graph_of(Where {}, &[condition, x, y]), seed);
    }

    #[test]
    fn bits_of_integers(d in dims(), ones in any::<u32>(), kind in 0..3, seed in any::<u64>()) {
        let kind = [BinaryKind::And, BinaryKind::Or, BinaryKind::Xor][kind as usize];
        let b = plain(DType::S32, &broadcast_from(&d, ones, true));
        check(&graph_of(Binary { kind }, &[plain(DType::S32, &d), b]), seed);
    }

    #[test]
    fn logical_functions(d in dims(), ones in any::<u32>(), kind in 0..3, seed in any::<u64>()) {
        let kind = [BinaryKind::And, BinaryKind::Or, BinaryKind::Xor][kind as usize];
        let b = plain(DType::Bool, &broadcast_from(&d, ones, true));
        check(&graph_of(Binary { kind }, &[plain(DType::Bool, &d), b]), seed);
    }

    #[test]
    fn quantized_sums_and_products(
        d in dims(), ones in any::<u32>(), kind in 0..3, s in (-6f32..2.0, -6f32..2.0, -5f32..1.0),
        z in (0..256, 0..256, 0..256), signed: bool, narrow: bool, float: bool, seed in any::<u64>(),
    ) {
        let kind = [QBinaryKind::Add, QBinaryKind::Sub, QBinaryKind::Mul][kind as usize];
        let a = quantized(DType::U8, &d, s.0.exp2(), z.0);
        let b = quantized(DType::U8, &broadcast_from(&d, ones, true), s.1.exp2(), z.1);
        let (dtype, zero) = if signed { (DType::S8, z.2 - 128) } else { (DType::U8, z.2) };
        let output = grid(dtype, s.2.exp2(), zero, narrow);
        let rescaling = if float { Rescaling::Float } else { Rescaling::FixedPoint };
        check(&graph_of(QBinary { kind, rescaling, output }, &[a, b]), seed);
    }

    #[test]
    fn tables(d in dims(), kind in 0..UNARY.len(), signed: bool, narrow: bool, seed in any::<u64>()) {
        let (dtype, zero) = if signed { (DType::S8, -3) } else { (DType::U8, 100) };
        let output = grid(DType::U8, 0.03, 17, narrow);
        check(&graph_of(QUnary { kind: UNARY[kind], output }, &[quantized(dtype, &d, 0.05, zero)]), seed);
    }

    #[test]
    fn quantize_and_back(
        d in dims(), dtype in prop::sample::select(vec![DType::U8, DType::S8, DType::U4, DType::S4, DType::U16, DType::S16]),
        axis in prop::option::of(0usize..3), seed in any::<u64>(),
    ) {
        let (lo, hi) = dtype.integer_range().unwrap();
        let zero = |i: usize| lo as i32 + (i as i64 * 37 % (hi - lo + 1)) as i32;
        let params = match axis.filter(|&a| a < d.len()) {
            None => QuantParams::per_tensor(0.25, zero(5)).unwrap(),
            Some(a) => QuantParams::per_axis(
                a,
                (0..d[a]).map(|i| 0.25 + i as f32 * 0.1).collect(),
                (0..d[a]).map(zero).collect(),
            ).unwrap(),
        };
        let x = plain(DType::F32, &d);
        let g = graph_of(Quantize { dtype, params: params.clone() }, std::slice::from_ref(&x));
        check(&g, seed);
        let q = TensorType::quantized(dtype, x.shape.clone(), params.clone()).unwrap();
        check(&graph_of(Dequantize {}, &[q]), seed);
        check(&graph_of(FakeQuant { dtype, lo: lo as i32 + 1, hi: hi as i32, params }, &[x]), seed);
    }

    #[test]
    fn casts(
        d in dims(), seed in any::<u64>(),
        from in prop::sample::select(vec![DType::U8, DType::S8, DType::U16, DType::S16, DType::S32, DType::Bool, DType::F32]),
        to in prop::sample::select(vec![DType::F32, DType::S32]),
    ) {
        check(&graph_of(Cast { to }, &[plain(from, &d)]), seed);
    }

    #[test]
    fn a_transpose_beside_an_elementwise_op_is_part_of_its_step(
        n in 1usize..3, c in 1usize..20, h in 1usize..9, w in 1usize..40, front: bool, seed in any::<u64>(),
    ) {
        let params = QuantParams::per_tensor(0.02, 120).unwrap();
        let quantize = Quantize { dtype: DType::U8, params };
        let to_last = Transpose { perm: vec![0, 2, 3, 1] };
        let mut g = Graph::new("input");
        let x = g.input("x", plain(DType::F32, &[n, c, h, w])).unwrap();
        let y = if front {
            let t = g.add("t", to_last, &[x]).unwrap();
            g.add("q", quantize, &[t.out()]).unwrap()
        } else {
            let q = g.add("q", quantize, &[x]).unwrap();
            g.add("t", to_last, &[q.out()]).unwrap()
        };
        g.output("y", y.out());
        check(&g, seed);
        let model = super::compiled(&super::placed(&g), super::tiers()[0]);
        prop_assert!(model.steps().len() <= 1 && model.arena_bytes() == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn planes_become_pixels_of_codes(
        n in 1usize..3, c in 1usize..6, h in 1usize..40, w in 1usize..140, signed: bool, zero in 0i32..256,
        scale in prop_oneof![0.001f32..4.0, Just(1e-40), Just(1e36), Just(0.5), Just(0.1)], seed in any::<u64>(),
    ) {
        let dtype = if signed { DType::S8 } else { DType::U8 };
        let params = QuantParams::per_tensor(scale, if signed { zero - 128 } else { zero }).unwrap();
        let mut g = Graph::new("input");
        let x = g.input("x", plain(DType::F32, &[n, c, h, w])).unwrap();
        let t = g.add("t", Transpose { perm: vec![0, 2, 3, 1] }, &[x]).unwrap();
        let y = g.add("q", Quantize { dtype, params }, &[t.out()]).unwrap();
        g.output("y", y.out());
        check(&g, seed);
    }
}

/// Rows of several units, which threads split, and the last of which is longer than the others.
#[test]
fn planes_of_many_pixels() {
    for (c, h, w) in [(3, 224, 224), (1, 71, 97), (4, 64, 65), (2, 100, 101)] {
        let params = QuantParams::per_tensor(0.018_658_448, 114).unwrap();
        let mut g = Graph::new("input");
        let x = g.input("x", plain(DType::F32, &[1, c, h, w])).unwrap();
        let t = g.add("t", Transpose { perm: vec![0, 2, 3, 1] }, &[x]).unwrap();
        let y = g.add("q", Quantize { dtype: DType::U8, params }, &[t.out()]).unwrap();
        g.output("y", y.out());
        check(&g, 11);
    }
}

#[test]
fn s32_of_zero_point_zero_is_dequantized() {
    let params = QuantParams::per_axis(1, vec![0.5, 0.25, 3.0], vec![0, 0, 0]).unwrap();
    let x = TensorType::quantized(DType::S32, qcc_ir::Shape::new([7, 3]).unwrap(), params).unwrap();
    check(&graph_of(Dequantize {}, &[x]), 3);
}

/// What a random graph of functions of elements is grown by: the next node's kind, and which values it takes.
#[derive(Clone, Copy, Debug)]
struct Growth {
    kind: usize,
    first: usize,
    second: usize,
}

/// Kinds of growth behind the functions of one number and those of two that give floats.
const OTHER: usize = UNARY.len() + 7;
const SELECT: usize = OTHER + 1;
const FAKE: usize = OTHER + 2;
const QUANTIZE: usize = OTHER + 3;
const DEQUANTIZE: usize = OTHER + 4;

/// A graph of functions of elements: floats, codes on a grid and truth values, of which some are used twice, some are
/// broadcast, and the last one is the output.
fn grown(dims: &[usize], per_channel: bool, growth: &[Growth]) -> Graph {
    let mut g = Graph::new("grown");
    let x = g.input("x", plain(DType::F32, dims)).unwrap();
    let channels: Vec<usize> =
        dims.iter().enumerate().map(|(i, &d)| if i + 1 == dims.len() { d } else { 1 }).collect();
    let y = g.input("y", plain(DType::F32, &channels)).unwrap();
    let c = g.input("c", quantized(DType::U8, dims, 0.05, 100)).unwrap();
    let (mut floats, mut codes) = (vec![x, y], vec![c]);
    let axis = dims.len() - 1;
    let n = dims[axis];
    let params = if per_channel && n > 0 {
        let scales = (0..n).map(|i| 0.01 + 0.003 * (i % 7) as f32).collect();
        QuantParams::per_axis(axis, scales, (0..n).map(|i| (90 + i % 60) as i32).collect()).unwrap()
    } else {
        QuantParams::per_tensor(0.04, 120).unwrap()
    };
    let mut last = x;
    for (i, step) in growth.iter().enumerate() {
        let name = format!("n{i}");
        let (f, h) = (floats[step.first % floats.len()], floats[step.second % floats.len()]);
        let code = codes[step.first % codes.len()];
        last = match step.kind {
            kind if kind < UNARY.len() => g.add(&name, Unary { kind: UNARY[kind] }, &[f]).unwrap().out(),
            kind if kind < OTHER => {
                g.add(&name, Binary { kind: BINARY[kind - UNARY.len()] }, &[f, h]).unwrap().out()
            }
            OTHER => {
                let truth = g.add(&name, Binary { kind: BinaryKind::Less }, &[f, h]).unwrap();
                g.add(&format!("{name}_cast"), Cast { to: DType::F32 }, &[truth.out()]).unwrap().out()
            }
            SELECT => {
                let truth = g.add(&name, Binary { kind: BinaryKind::Less }, &[f, h]).unwrap();
                let operands = [truth.out(), x, floats[(step.first + 1) % floats.len()]];
                g.add(&format!("{name}_where"), Where {}, &operands).unwrap().out()
            }
            FAKE => {
                let params = QuantParams::per_tensor(0.1, 7).unwrap();
                let op = FakeQuant { dtype: DType::U8, params, lo: 0, hi: 255 };
                g.add(&name, op, &[f]).unwrap().out()
            }
            QUANTIZE if **g.shape(f) == *dims => {
                let op = Quantize { dtype: DType::U8, params: params.clone() };
                let q = g.add(&name, op, &[f]).unwrap().out();
                if !per_channel {
                    codes.push(q);
                }
                q
            }
            DEQUANTIZE => g.add(&name, Dequantize {}, &[code]).unwrap().out(),
            _ => {
                let other = codes[step.second % codes.len()];
                let op = QBinary {
                    kind: QBinaryKind::Add,
                    rescaling: Rescaling::FixedPoint,
                    output: grid(DType::U8, 0.07, 80, false),
                };
                let sum = g.add(&name, op, &[code, other]).unwrap().out();
                codes.push(sum);
                sum
            }
        };
        if g.ty(last).dtype == DType::F32 {
            floats.push(last);
        }
    }
    g.output("last", last);
    g
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chains_equal_their_definition(
        d in dims(), per_channel: bool, seed in any::<u64>(),
        growth in prop::collection::vec((0..DEQUANTIZE + 2, 0usize..8, 0usize..8), 1..16),
    ) {
        let dims = [&d[..], &[1 + seed as usize % 70]].concat();
        // Mostly the last value is used, as in chains.
        let growth: Vec<Growth> = growth
            .iter()
            .enumerate()
            .map(|(i, &(kind, a, b))| Growth {
                kind,
                first: if a < 6 { i + 1 } else { a },
                second: if b < 2 { i + 1 } else { b },
            })
            .collect();
        check(&grown(&dims, per_channel, &growth), seed);
    }
}

/// The mask of attention, which broadcasts, and the comparison that makes it: one step that reads scores once.
#[test]
fn a_comparison_and_a_choice_are_one_step() {
    let mut g = Graph::new("mask");
    let scores = g.input("scores", plain(DType::F32, &[2, 3, 17, 33])).unwrap();
    let mask = g.input("mask", plain(DType::F32, &[2, 1, 17, 33])).unwrap();
    let zero = g.constant("zero", qcc_ir::Tensor::scalar(0f32));
    let lowest = g.constant("lowest", qcc_ir::Tensor::scalar(f32::NEG_INFINITY));
    let full = g.add("full", qcc_ir::ops::Expand { shape: g.shape(scores).clone() }, &[mask]).unwrap();
    let kept = g.add("kept", Binary { kind: BinaryKind::Greater }, &[full.out(), zero]).unwrap();
    let masked = g.add("masked", Where {}, &[kept.out(), scores, lowest]).unwrap();
    g.output("masked", masked.out());
    check(&g, 3);
    let model = super::compiled(&super::placed(&g), super::tiers()[0]);
    let names: Vec<&str> = model.steps().iter().map(|s| s.kernel.as_str()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn a_chain_is_one_step_and_comes_to_no_memory() {
    let mut g = Graph::new("chain");
    let x = g.input("x", plain(DType::F32, &[40, 70])).unwrap();
    let b = g.input("b", plain(DType::F32, &[70])).unwrap();
    let sum = g.add("sum", Binary { kind: BinaryKind::Add }, &[x, b]).unwrap();
    let gelu = g.add("gelu", Unary { kind: UnaryKind::Gelu }, &[sum.out()]).unwrap();
    let product = g.add("product", Binary { kind: BinaryKind::Mul }, &[gelu.out(), x]).unwrap();
    let params = QuantParams::per_tensor(0.02, 120).unwrap();
    let codes = g.add("codes", Quantize { dtype: DType::U8, params }, &[product.out()]).unwrap();
    g.output("codes", codes.out());
    check(&g, 5);
    let model = super::compiled(&super::placed(&g), super::tiers()[0]);
    assert_eq!((model.steps().len(), model.arena_bytes()), (1, 0));
}
