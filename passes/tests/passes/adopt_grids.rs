//! Models that are quantized already, with grids where other tools place them.

use crate::common::*;
use qcc_ir::{
    DType, Graph, Op, QuantParams, Shape, Stage, Tensor, TensorType, ValueId, interpreter,
    numerics::{RequantMode, Rescaling},
    onnx::{Bindings, Model, export},
    ops::{
        AssumeGrid, BinaryKind, Clamp, Conv, Dequantize, Layout, MatMul, PadMode, Quantize, Transpose,
        UnaryKind, Window,
    },
};
use qcc_passes::{Options, Ranges, Report, lower, observed_values, prepare, quantize};
use std::path::Path;

/// What models with grids are compiled with: as ONNX Runtime requantizes.
fn options() -> Options {
    Options { requant: RequantMode::Float, ..Options::default() }
}

fn per_tensor(scale: f32, zero_point: i32) -> QuantParams {
    QuantParams::per_tensor(scale, zero_point).unwrap()
}

impl Net {
    /// Rounded to a grid and back.
    fn rounded(&mut self, name: &str, x: ValueId, dtype: DType, scale: f32, zero_point: i32) -> ValueId {
        let params = per_tensor(scale, zero_point);
        let codes = self.op(&format!("{name}_q"), Quantize { dtype, params }, &[x]);
        self.op(&format!("{name}_dq"), Dequantize {}, &[codes])
    }

    /// Dequantized codes that lie within these bounds, and are spread over all of them.
    fn codes(
        &mut self,
        name: &str,
        dims: &[usize],
        dtype: DType,
        params: QuantParams,
        within: (i32, i32),
    ) -> ValueId {
        let shape = Shape::new(dims).unwrap();
        let (lo, hi) = within;
        let codes: Vec<i32> = (0..shape.elements())
            .map(|i| match i {
                0 => lo,
                1 => hi,
                _ => lo + ((self.random() * 0.5 + 0.5) * (hi - lo) as f32) as i32,
            })
            .collect();
        let tensor = match dtype {
            DType::U8 => Tensor::from_vec(shape.clone(), codes.iter().map(|&q| q as u8).collect()),
            DType::S8 => Tensor::from_vec(shape.clone(), codes.iter().map(|&q| q as i8).collect()),
            _ => Tensor::from_vec(shape.clone(), codes),
        };
        let ty = TensorType::quantized(dtype, shape, params).unwrap();
        let constant = self.graph.quantized_constant(&format!("{name}_codes"), tensor.unwrap(), ty).unwrap();
        self.op(name, Dequantize {}, &[constant])
    }

    /// A convolution of 1x1 by given weights, with a bias of codes in steps of `bias_scale`.
    fn conv_by(&mut self, name: &str, x: ValueId, w: ValueId, bias: Option<ValueId>) -> ValueId {
        let kernel = self.graph.shape(w)[2..].to_vec();
        let op = Conv {
            window: Window::new(kernel),
            groups: 1,
            layout: Layout::ChannelsFirst,
            bias: bias.is_some(),
            residual: false,
            clamp: Clamp::NONE,
        };
        let operands: Vec<ValueId> = [x, w].into_iter().chain(bias).collect();
        self.op(name, op, &operands)
    }
}

/// The placed graph of a model that brings grids; asserts that it needed no ranges, and that its results are those of
/// the model itself but for single steps of `scale` in one of a hundred.
fn adopted(graph: &Graph, scale: f32) -> (Graph, Report) {
    let (mut after, report) = prepared_with(graph, &options());
    assert_eq!(after.stage, Stage::FakeQuant);
    assert_eq!(observed_values(&after), []);
    let report = report.then(quantize(&mut after, &Ranges::default(), &options(), &mut |_, _| {}).unwrap());
    let report = report.then(lower(&mut after, &options(), &mut |_, _| {}).unwrap());
    let (mut differ, mut all) = (0, 0);
    for seed in 300..310 {
        let x = inputs(graph, seed);
        for (a, b) in run(graph, &x).iter().zip(run(&after, &x)) {
            let steps = (a - b).abs() / scale;
            assert!(steps < 1.01, "{steps} steps\n{report}");
            differ += usize::from(steps > 0.5);
            all += 1;
        }
    }
    assert!(differ * 100 <= all, "{differ} of {all} differ\n{report}");
    (after, report)
}

/// How many ops compute with floats.
fn float_ops(graph: &Graph) -> usize {
    ["Conv", "MatMul", "Unary", "Binary", "Pool", "FakeQuant"].iter().map(|op| count(graph, op)).sum()
}

#[test]
fn signed_codes_with_a_clamp_and_a_pool_between_their_grids() {
    for (dtype, offset) in [(DType::U8, 0), (DType::S8, -128)] {
        let mut net = Net::new(1);
        let x = net.input("x", &[2, 6, 8, 8]);
        let x = net.rounded("x", x, dtype, 0.01, 120 + offset);
        let w = net.codes("w", &[8, 6, 1, 1], DType::S8, per_tensor(0.02, 0), (-128, 127));
        let b = net.codes("b", &[8], DType::S32, per_tensor(0.01 * 0.02, 0), (-3000, 3000));
        let y = net.conv_by("conv", x, w, Some(b));
        let y = net.unary("relu", UnaryKind::Relu, y);
        let y = net.rounded("relu", y, dtype, 0.015, offset);
        // The grid of the result again, behind a move.
        let y = net.max_pool("pool", y, 2);
        let y = net.rounded("pool", y, dtype, 0.015, offset);
        let (placed, report) = adopted(&net.finish(y), 0.015);
        assert_eq!(float_ops(&placed), 1, "only the pool, of codes\n{report}");
        assert_eq!(
            (count(&placed, "QConv"), count(&placed, "Quantize"), count(&placed, "Dequantize")),
            (1, 1, 1)
        );
    }
}

#[test]
fn a_grid_behind_a_move_is_that_of_what_is_moved() {
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 4, 6, 6]);
    let x = net.rounded("x", x, DType::U8, 0.01, 128);
    let w = net.codes("w", &[4, 4, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
    let y = net.conv_by("conv", x, w, None);
    let y = net.max_pool("pool", y, 2);
    let y = net.pad("pad", y, 1, PadMode::Constant { value: 0.0 });
    let y = net.transpose("transpose", y, &[0, 2, 3, 1]);
    let y = net.rounded("y", y, DType::U8, 0.01, 100);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    assert_eq!(
        (count(&placed, "QConv"), count(&placed, "Quantize"), count(&placed, "Dequantize")),
        (1, 1, 1),
        "{report}"
    );
}

#[test]
fn parts_on_different_grids_come_on_that_of_the_whole() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 4, 6, 6]);
    let x = net.rounded("x", x, DType::U8, 0.01, 128);
    let part = |net: &mut Net, name: &str, grid: Option<f32>| {
        let w = net.codes(&format!("{name}_w"), &[4, 4, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
        let y = net.conv_by(name, x, w, None);
        grid.map_or(y, |scale| net.rounded(name, y, DType::U8, scale, 128))
    };
    let parts = [
        part(&mut net, "fine", Some(0.005)),
        part(&mut net, "same", Some(0.01)),
        part(&mut net, "none", None),
    ];
    let y = net.concat("concat", &parts, 1);
    let y = net.rounded("y", y, DType::U8, 0.01, 128);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    assert_eq!(
        (count(&placed, "QConv"), count(&placed, "QUnary"), float_ops(&placed)),
        (3, 1, 0),
        "{report}"
    );
}

#[test]
fn clamps_of_numbers_on_a_grid_are_bounds_or_nothing() {
    let mut net = Net::new(4);
    let x = net.input("x", &[1, 4, 6, 6]);
    let x = net.rounded("x", x, DType::U8, 0.01, 128);
    let w = net.codes("w", &[4, 4, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
    let y = net.conv_by("conv", x, w, None);
    let y = net.rounded("conv", y, DType::U8, 0.0625, 100);
    let y = net.unary("bounds", UnaryKind::Clip { lo: 0.0, hi: 1.0 }, y);
    let y = net.unary("nothing", UnaryKind::Clip { lo: -20.0, hi: 20.0 }, y);
    let (placed, report) = adopted(&net.finish(y), 0.0625);
    let Some(Op::QConv(c)) = placed.op(find(&placed, "conv")) else { panic!("{report}") };
    assert_eq!((c.output.lo, c.output.hi, count(&placed, "QUnary")), (100, 116, 0));
}

#[test]
fn weights_with_zero_points_are_symmetric_where_their_codes_allow_it() {
    let model = |within: (i32, i32)| {
        let mut net = Net::new(5);
        let x = net.input("x", &[1, 4, 6, 6]);
        let x = net.rounded("x", x, DType::U8, 0.01, 128);
        let grid = QuantParams::per_axis(0, vec![0.01, 0.02, 0.03], vec![100, 128, 110]).unwrap();
        let w = net.codes("w", &[3, 4, 1, 1], DType::U8, grid, within);
        let y = net.conv_by("conv", x, w, None);
        let y = net.rounded("y", y, DType::U8, 0.05, 128);
        net.finish(y)
    };
    let (placed, report) = adopted(&model((0, 227)), 0.05);
    assert_eq!((count(&placed, "QConv"), float_ops(&placed)), (1, 0), "{report}");
    let weights = placed.operand(find(&placed, "conv"), 1);
    let codes = placed.constant_value(weights).unwrap().as_slice::<i8>().unwrap();
    assert_eq!((codes[0], codes[1]), (-100, 127));

    // 228 − 100 is no s8: one channel is there twice, and then all of them.
    for (within, channels) in [((0, 228), 5), ((0, 255), 8)] {
        let (placed, report) = adopted(&model(within), 0.05);
        assert_eq!((count(&placed, "QConv"), float_ops(&placed)), (1, 0), "{report}");
        let x = placed.operand(find(&placed, "conv"), 0);
        assert!(placed.shape(x)[3] <= channels && placed.shape(x)[3] > 4, "{report}");
    }
}

#[test]
fn weights_of_nine_bits_multiply_exactly_or_stay_float() {
    let model = |zero: i32, groups: usize| {
        let mut net = Net::new(12);
        let x = net.input("x", &[2, 3, 8]);
        let x = net.rounded("x", x, DType::U8, 0.01, 100);
        if groups == 1 {
            let w = net.codes("w", &[8, 4], DType::U8, per_tensor(0.01, zero), (0, 255));
            let y = net.op("y", MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[x, w]);
            let y = net.rounded("y", y, DType::U8, 0.05, 128);
            return net.finish(y);
        }
        let w = net.codes("w", &[3, 1, 3], DType::U8, per_tensor(0.01, zero), (0, 255));
        let op = Conv {
            window: Window::new([3]),
            groups,
            layout: Layout::ChannelsFirst,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
        };
        let y = net.op("y", op, &[x, w]);
        let y = net.rounded("y", y, DType::U8, 0.05, 128);
        net.finish(y)
    };
    for zero in [1, 120, 255] {
        let (placed, report) = adopted(&model(zero, 1), 0.05);
        assert_eq!((count(&placed, "QMatMul"), float_ops(&placed)), (1, 0), "{report}");
    }
    // 255 is more than 127 twice.
    let (_, report) = adopted(&model(0, 1), 0.05);
    assert!(declined(&report, "lower_to_int8", "y").contains("two times the range"), "{report}");
    let (placed, report) = adopted(&model(120, 3), 0.05);
    let why = declined(&report, "lower_to_int8", "y");
    assert!(why.contains("integers in floats") && why.contains("groups"), "{report}");
    assert_eq!(count(&placed, "Conv"), 1, "{report}");
}

#[test]
fn convolutions_over_one_dimension_compute_with_codes() {
    let mut net = Net::new(14);
    let x = net.input("x", &[2, 4, 12]);
    let x = net.rounded("x", x, DType::S8, 0.01, 5);
    let grid = QuantParams::per_axis(0, vec![0.01, 0.02, 0.005], vec![0; 3]).unwrap();
    let w = net.codes("w", &[3, 4, 3], DType::S8, grid, (-127, 127));
    let b = net.random_constant("b", &[3], 0.2);
    let y = net.conv_by("conv", x, w, Some(b));
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.rounded("y", y, DType::S8, 0.05, -128);
    let (placed, report) = adopted(&net.finish(y), 0.05);
    assert_eq!((count(&placed, "QConv"), float_ops(&placed)), (1, 0), "{report}");
}

#[test]
fn pairs_of_each_user_are_one() {
    let mut net = Net::new(13);
    let x = net.input("x", &[1, 4, 6, 6]);
    let x = net.rounded("x", x, DType::U8, 0.01, 128);
    let w = net.codes("w", &[4, 4, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
    let y = net.conv_by("conv", x, w, None);
    let [a, b] = ["a", "b"].map(|name| net.rounded(name, y, DType::U8, 0.02, 128));
    let b = net.unary("tanh", UnaryKind::Tanh, b);
    let b = net.rounded("tanh", b, DType::U8, 0.01, 128);
    let y = net.binary("sum", BinaryKind::Add, a, b);
    let y = net.rounded("sum", y, DType::U8, 0.05, 128);
    let (placed, report) = adopted(&net.finish(y), 0.05);
    assert_eq!(
        (count(&placed, "QConv"), count(&placed, "QBinary"), float_ops(&placed)),
        (1, 1, 0),
        "{report}"
    );
}

#[test]
fn a_bias_of_any_size_keeps_its_integers() {
    let mut net = Net::new(6);
    let x = net.input("x", &[1, 2, 4, 4]);
    let x = net.rounded("x", x, DType::U8, 0.01, 0);
    let w = net.codes("w", &[2, 2, 1, 1], DType::S8, per_tensor(1e-7, 0), (-127, 127));
    let b = net.codes("b", &[2], DType::S32, per_tensor(1e-9, 0), (33_554_433, 500_000_001));
    let y = net.conv_by("conv", x, w, Some(b));
    let y = net.rounded("y", y, DType::U8, 0.01, 0);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    assert!(matches!(placed.op(find(&placed, "conv")), Some(Op::QConv(_))), "{report}");
    let bias = placed.operand(find(&placed, "conv"), 2);
    assert_eq!(placed.constant_value(bias).unwrap().as_slice::<i32>().unwrap(), [33_554_433, 500_000_001]);
}

#[test]
fn a_float_bias_of_any_size_is_rounded_to_integers() {
    let mut net = Net::new(16);
    let x = net.input("x", &[1, 2, 4, 4]);
    let x = net.rounded("x", x, DType::U8, 0.01, 0);
    let w = net.codes("w", &[2, 2, 1, 1], DType::S8, per_tensor(1e-7, 0), (-127, 127));
    let b = net.constant("b", &[2], vec![0.1, 1.0]);
    let y = net.conv_by("conv", x, w, Some(b));
    let y = net.rounded("y", y, DType::U8, 0.01, 0);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    assert!(matches!(placed.op(find(&placed, "conv")), Some(Op::QConv(_))), "{report}");
    let bias = placed.operand(find(&placed, "conv"), 2);
    assert_eq!(placed.constant_value(bias).unwrap().as_slice::<i32>().unwrap(), [100_000_008, 1_000_000_000]);
}

#[test]
fn a_bias_that_fills_a_sum_gets_room_for_the_products() {
    let mut net = Net::new(11);
    let x = net.input("x", &[1, 8, 4, 4]);
    let x = net.rounded("x", x, DType::U8, 0.01, 0);
    let grid =
        |axis: usize, scales: [f32; 2]| QuantParams::per_axis(axis, scales.to_vec(), vec![0; 2]).unwrap();
    let w = net.codes("w", &[2, 8, 1, 1], DType::S8, grid(0, [2e-7, 1e-7]), (-127, 127));
    let scales = [0.01 * 2e-7, 0.01 * 1e-7];
    let b = net.codes("b", &[2], DType::S32, grid(0, scales), (1_000_000_000, 2_147_483_647));
    let y = net.conv_by("conv", x, w, Some(b));
    let y = net.rounded("y", y, DType::U8, 0.01, 0);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    assert!(matches!(placed.op(find(&placed, "conv")), Some(Op::QConv(_))), "{report}");
    let bias = placed.operand(find(&placed, "conv"), 2);
    assert_eq!(
        placed.constant_value(bias).unwrap().as_slice::<i32>().unwrap(),
        [1_000_000_000, 1_073_741_824]
    );
}

/// As tools place grids that quantize only what products take: floats in bias and sums, weights rounded when the model
/// runs and transposed behind that.
#[test]
fn grids_on_the_inputs_of_products_alone() {
    let mut net = Net::new(7);
    let x = net.input("x", &[4, 8]);
    let x = net.rounded("x", x, DType::S8, 0.01, 0);
    let w = net.random_constant("w", &[8, 8], 0.5);
    let params = QuantParams::per_axis(0, vec![0.004; 8], vec![0; 8]).unwrap();
    let w = {
        let codes = net.graph.constant_value(w).unwrap().as_slice::<f32>().unwrap();
        let codes = codes.iter().map(|x| (x / 0.004).round() as i8).collect::<Vec<_>>();
        let tensor = Tensor::from_vec(Shape::new([8, 8]).unwrap(), codes).unwrap();
        let ty = TensorType::quantized(DType::S8, Shape::new([8, 8]).unwrap(), params).unwrap();
        net.graph.quantized_constant("w_codes", tensor, ty).unwrap()
    };
    let w = net.op("w_dq", Dequantize {}, &[w]);
    let w = net.op("w_t", Transpose { perm: vec![1, 0] }, &[w]);
    let y = net.op("product", MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[x, w]);
    let b = net.random_constant("b", &[8], 0.3);
    let y = net.binary("bias", BinaryKind::Add, y, b);
    let y = net.binary("sum", BinaryKind::Add, y, x);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.rounded("y", y, DType::S8, 0.02, -10);
    let (placed, report) = adopted(&net.finish(y), 0.02);
    let Some(Op::QMatMul(m)) = placed.op(find(&placed, "product")) else { panic!("{report}") };
    assert!(m.bias && m.residual && m.output.lo == m.output.zero_point, "{report}");
    assert_eq!(float_ops(&placed), 0, "{report}");
}

#[test]
fn sums_products_and_averages_rescale_in_floats_where_their_factors_allow_it() {
    for (scale, rescaling) in [(0.05, Rescaling::Float), (1e-4, Rescaling::FixedPoint)] {
        let mut net = Net::new(14);
        let [a, b] = ["a", "b"].map(|name| {
            let x = net.input(name, &[1, 2, 4, 4]);
            net.rounded(name, x, DType::U8, 0.03, 100)
        });
        let y = net.binary("sum", BinaryKind::Add, a, b);
        let y = net.rounded("sum", y, DType::U8, scale, 128);
        let (placed, report) = adopted(&net.finish(y), scale);
        let Some(Op::QBinary(sum)) = placed.op(find(&placed, "sum")) else { panic!("{report}") };
        assert_eq!(sum.rescaling, rescaling, "{report}");
        let told = report.to_string().contains("rescales in integers");
        assert_eq!(told, rescaling == Rescaling::FixedPoint, "{report}");
    }
}

/// ONNX Runtime's softmax of codes: a probability of 1 is ⌊1/s⌋ steps.
#[test]
fn a_softmax_between_grids_counts_in_whole_steps() {
    for (scale, most) in [(0.003_921_57, 254.0), (1.0 / 256.0, 255.0)] {
        let mut net = Net::new(15);
        let x = net.input("x", &[1, 8]);
        let x = net.rounded("x", x, DType::U8, 1.0, 0);
        let y = net.softmax("softmax", x);
        let graph = {
            let y = net.rounded("y", y, DType::U8, scale, 0);
            net.finish(y)
        };
        let mut placed = graph.clone();
        prepare(&mut placed, &options(), &mut |_, _| {}).unwrap();
        quantize(&mut placed, &Ranges::default(), &options(), &mut |_, _| {}).unwrap();
        lower(&mut placed, &options(), &mut |_, _| {}).unwrap();
        let x =
            Tensor::from_vec(Shape::new([1, 8]).unwrap(), vec![200f32, 0., 0., 0., 0., 0., 0., 0.]).unwrap();
        let y = run(&placed, &[x]);
        assert_eq!((y[0] / scale).round(), most);
    }
}

#[test]
fn an_exported_model_gives_its_bits_again() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fashion_resnet8.onnx");
    let float = Model::load(&path).unwrap().graph(&Bindings::default()).unwrap();
    for requant in [RequantMode::Q15, RequantMode::Float] {
        let options = Options { requant, interchange: true, ..Options::default() };
        let (fake, placed, _) = compiled(&float, &options);
        let exported = Model::parse(export(&fake).unwrap()).unwrap();
        let (mut again, _) = prepared_with(&exported.graph(&Bindings::default()).unwrap(), &options);
        assert_eq!(again.stage, Stage::FakeQuant);
        quantize(&mut again, &Ranges::default(), &options, &mut |_, _| {}).unwrap();
        let report = lower(&mut again, &options, &mut |_, _| {}).unwrap();
        for op in ["QConv", "QMatMul", "QBinary", "QAveragePool"] {
            assert_eq!(count(&placed, op), count(&again, op), "{op}\n{report}");
        }
        let x = inputs(&float, 200);
        assert_eq!(run(&placed, &x), run(&again, &x), "{requant}");
    }
}

#[test]
fn codes_come_in_and_go_out_as_they_are() {
    let mut net = Net::new(8);
    let shape = Shape::new([1, 2, 3, 3]).unwrap();
    let x = net.graph.input("x", TensorType::new(DType::S8, shape.clone())).unwrap();
    let x = net.op("grid", AssumeGrid { params: Some(per_tensor(0.1, 3)) }, &[x]);
    let x = net.op("real", Dequantize {}, &[x]);
    let w = net.codes("w", &[2, 2, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
    let y = net.conv_by("conv", x, w, None);
    let y = net.op("y", Quantize { dtype: DType::S8, params: per_tensor(0.1, -5) }, &[y]);
    let graph = net.finish(y);
    let mut placed = graph.clone();
    let report = prepare(&mut placed, &options(), &mut |_, _| {}).unwrap();
    quantize(&mut placed, &Ranges::default(), &options(), &mut |_, _| {}).unwrap();
    lower(&mut placed, &options(), &mut |_, _| {}).unwrap();
    assert_eq!(
        (count(&placed, "QConv"), count(&placed, "QUnary"), count(&placed, "Dequantize")),
        (1, 2, 0),
        "{report}"
    );
    let x = Tensor::from_vec(shape, (0..18).map(|i| (i * 14 - 128) as i8).collect()).unwrap();
    let [expected, got] = [&graph, &placed].map(|g| interpreter::run(g, std::slice::from_ref(&x)).unwrap());
    let [expected, got] = [&expected, &got].map(|t| t[0].as_slice::<i8>().unwrap());
    assert!(expected.iter().zip(got).all(|(a, b)| a.abs_diff(*b) <= 1), "{expected:?} {got:?}");
}

#[test]
fn what_has_no_grid_stays_float_and_is_told() {
    let mut net = Net::new(9);
    let x = net.input("x", &[1, 2, 4, 4]);
    let x = net.rounded("x", x, DType::U8, 0.01, 128);
    let w = net.codes("w", &[2, 2, 1, 1], DType::S8, per_tensor(0.01, 0), (-127, 127));
    let y = net.conv_by("conv", x, w, None);
    let y = net.unary("tanh", UnaryKind::Tanh, y);
    let (placed, report) = adopted(&net.finish(y), 0.01);
    // The sums of the convolution become floats for it.
    assert_eq!((count(&placed, "QConvToFloat"), count(&placed, "Unary")), (1, 1));
    assert!(declined(&report, "insert_fake_quant", "tanh").contains("no grid for `conv`"), "{report}");
}

#[test]
fn a_model_whose_weights_alone_have_grids_is_a_float_model() {
    let mut net = Net::new(10);
    let x = net.input("x", &[2, 8]);
    let w = net.codes("w", &[8, 4], DType::U8, per_tensor(0.01, 7), (0, 255));
    let y = net.op("product", MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[x, w]);
    let graph = net.finish(y);
    let (after, _) = prepared(&graph);
    assert_eq!((after.stage, count(&after, "Dequantize")), (Stage::Float, 0));
    let (_, placed, report) = compiled(&graph, &Options::default());
    assert_eq!(count(&placed, "QMatMul"), 1, "{report}");
}
