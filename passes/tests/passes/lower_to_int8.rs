use crate::common::*;
use qcc_ir::{
    DType, Graph, Op, QuantParams,
    numerics::RequantMode,
    ops::{BinaryKind, Dequantize, PadMode, Quantize, UnaryKind, Window},
};
use qcc_passes::{Options, Report};

/// Asserts that the integer graph is within `steps` steps of its result of the fake-quant graph.
fn within(float: &Graph, steps: f32) -> (Graph, Report) {
    let (fake, placed, report) = compiled(float, &Options::default());
    let last = placed.outputs()[0].value;
    let codes = placed.operand(last.node, 0);
    let scale = placed.ty(codes).per_tensor().unwrap().0;
    for seed in 300..303 {
        let x = inputs(float, seed);
        let (q, i) = (run(&fake, &x), run(&placed, &x));
        let most = q.iter().zip(&i).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f32::max);
        assert!(most <= steps + 0.01, "{most} steps of {scale}\n{report}");
    }
    (placed, report)
}

#[test]
fn products_with_everything_fused() {
    let mut net = Net::new(1);
    let x = net.input("x", &[2, 6, 7, 7]);
    let y = net.conv("grouped", x, 6, Window::new([3, 3]).pads([1, 1], [1, 1]).dilations([1, 1]), 3, true);
    let y = net.binary("add", BinaryKind::Add, y, x);
    let y = net.unary("clip", UnaryKind::Clip { lo: -0.5, hi: 1.0 }, y);
    let (placed, report) = within(&net.finish(y), 1.0);
    let Some(Op::QConv(c)) = placed.op(find(&placed, "grouped")) else { panic!("{report}") };
    assert!(c.bias && c.residual && c.output.lo >= 0 && c.output.hi <= 255);
}

#[test]
fn sums_products_and_differences_absorb_their_clamp() {
    for kind in [BinaryKind::Add, BinaryKind::Sub, BinaryKind::Mul] {
        let mut net = Net::new(2);
        let x = net.input("x", &[1, 3, 5, 5]);
        let a = net.conv1x1("a", x, 4);
        let a = net.unary("tanh", UnaryKind::Tanh, a);
        let b = net.max_pool("b", x, 5);
        let b = net.conv1x1("gate", b, 4);
        let y = net.binary("binary", kind, a, b);
        let y = net.unary("relu", UnaryKind::Relu, y);
        let (placed, report) = within(&net.finish(y), 1.0);
        let Some(Op::QBinary(b)) = placed.op(find(&placed, "binary")) else { panic!("{report}") };
        assert_eq!((b.output.zero_point, b.output.lo), (0, 0));
        assert_eq!(count(&placed, "QUnary"), 1, "the tanh");
    }
}

#[test]
fn constants_beside_activations_are_codes() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 3, 5, 5]);
    let y = net.conv1x1("conv", x, 4);
    let y = net.unary("tanh", UnaryKind::Tanh, y);
    let c = net.random_constant("c", &[4, 1, 1], 2.0);
    let y = net.binary("mul", BinaryKind::Mul, c, y);
    let d = net.random_constant("d", &[1, 4, 5, 5], 3.0);
    let y = net.concat("concat", &[y, d], 1);
    let (placed, report) = within(&net.finish(y), 1.0);
    assert_eq!((count(&placed, "QBinary"), count(&placed, "Concat")), (1, 1), "{report}");
    assert_eq!(count(&placed, "Quantize"), 1, "constants are not quantized at run time");
}

#[test]
fn moves_are_done_on_codes() {
    let mut net = Net::new(4);
    let x = net.input("x", &[1, 3, 6, 6]);
    let y = net.conv1x1("conv", x, 4);
    let y = net.pad("zeros", y, 1, PadMode::Constant { value: 0.0 });
    let y = net.unary("tanh", UnaryKind::Tanh, y);
    let y = net.pad("edge", y, 1, PadMode::Edge);
    let y = net.max_pool("pool", y, 2);
    let y = net.transpose("transpose", y, &[0, 3, 1, 2]);
    let y = net.reshape("reshape", y, &[5, 20]);
    let y = net.matmul("fc", y, 3);
    let (placed, report) = within(&net.finish(y), 1.0);
    assert_eq!(count(&placed, "Dequantize"), 1, "{report}");
}

#[test]
fn a_mode_that_does_not_fit_falls_back_and_says_why() {
    // The result is a tenth of a large accumulator: S far above what q15 takes.
    let mut net = Net::new(5);
    let x = net.input("x", &[1, 2, 4, 4]);
    let w = net.constant("w", &[2, 2, 1, 1], vec![30.0, -30.0, -30.0, 30.0]);
    let op = qcc_ir::ops::Conv {
        window: Window::new([1, 1]),
        groups: 1,
        layout: qcc_ir::ops::Layout::ChannelsFirst,
        bias: false,
        residual: false,
        clamp: qcc_ir::ops::Clamp { lo: -0.25, hi: 0.25 },
    };
    let y = net.op("conv", op, &[x, w]);
    let (placed, report) = within(&net.finish(y), 1.0);
    let Some(Op::QConv(c)) = placed.op(find(&placed, "conv")) else { panic!("{report}") };
    assert_eq!(c.requant, RequantMode::Shift);
    let why = declined(&report, "lower_to_int8", "conv");
    assert!(why.starts_with("requantizes in mode shift: q15 requantization: factor"), "{why}");
}

#[test]
fn sums_that_leave_32_bits_stay_float() {
    let mut net = Net::new(6);
    let x = net.input("x", &[1, 66_000]);
    let y = net.matmul("fc", x, 1);
    let float = net.finish(y);
    let (_, placed, report) = compiled(&float, &Options::default());
    assert!(declined(&report, "insert_fake_quant", "fc").contains("66000 products can leave 32 bits"));
    assert_eq!(count(&placed, "MatMul"), 1);
}

#[test]
fn float_islands_are_converted_at_their_borders_once() {
    let mut net = Net::new(7);
    let x = net.input("x", &[1, 3, 5, 5]);
    let a = net.conv1x1("a", x, 4);
    let s = net.softmax("softmax", a);
    let l = net.unary("reciprocal", UnaryKind::Reciprocal, s);
    let b = net.conv1x1("b", l, 4);
    let c = net.conv1x1("c", l, 4);
    net.graph.output("also", a);
    let y = net.binary("mul", BinaryKind::Mul, b, c);
    let (placed, report) = {
        let float = net.finish(y);
        let (_, placed, report) = compiled(&float, &Options::default());
        (placed, report)
    };
    // In: x, and the island's result. Out: a (for island and output), mul.
    assert_eq!((count(&placed, "Quantize"), count(&placed, "Dequantize")), (2, 2), "{report}");
}

#[test]
fn what_the_model_quantizes_itself_stays_as_it_is() {
    let mut net = Net::new(8);
    let x = net.input("x", &[1, 3, 5, 5]);
    let params = QuantParams::per_tensor(1.0 / 64.0, 128).unwrap();
    let q = net.op("q", Quantize { dtype: DType::U8, params }, &[x]);
    let p = net.max_pool("pool", q, 2);
    let d = net.op("d", Dequantize {}, &[p]);
    let y = net.conv1x1("conv", d, 4);
    let float = net.finish(y);
    let (fake, placed, report) = compiled(&float, &Options::default());
    for name in ["q", "pool", "d"] {
        assert!(
            declined(&report, "insert_fake_quant", name).contains("quantized by the model itself"),
            "{report}"
        );
    }
    let x = inputs(&float, 9);
    assert!(distance(&run(&float, &x), &run(&placed, &x)) < 0.05);
    assert!(distance(&run(&fake, &x), &run(&placed, &x)) < 0.02);
}
