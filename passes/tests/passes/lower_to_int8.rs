use crate::common::*;
use qcc_ir::{
    DType, Graph, Op, QuantParams,
    numerics::RequantMode,
    ops::{BinaryKind, Clamp, Dequantize, MatMul, PadMode, Quantize, UnaryKind, Window},
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
    let y = net.conv1x1("next", y, 4);
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
        clamp: Clamp { lo: -0.25, hi: 0.25 },
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
    let also = net.unary("log", UnaryKind::Log, a);
    net.graph.output("also", also);
    let y = net.binary("mul", BinaryKind::Mul, b, c);
    let float = net.finish(y);
    let (_, placed, report) = compiled(&float, &Options::default());
    // In: x, and the island's result for both its users. Out: mul; the sums of a become floats.
    assert_eq!((count(&placed, "Quantize"), count(&placed, "Dequantize")), (2, 1), "{report}");
    assert_eq!(count(&placed, "QConvToFloat"), 1, "{report}");
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
    assert!(declined(&report, "insert_fake_quant", "conv").contains("no grid for its result"));
    let pooled = placed.ty(find(&placed, "pool").out());
    assert_eq!(pooled.per_tensor(), Some((1.0 / 64.0, 128)));
    let x = inputs(&float, 9);
    assert!(distance(&run(&float, &x), &run(&placed, &x)) < 0.05);
    assert!(distance(&run(&fake, &x), &run(&placed, &x)) < 0.02);
}

/// A fake-quant graph that no pass of ours made, with the scale of the bias given.
fn foreign(bias_scale: f32) -> Graph {
    let text = format!(
        r#"qir 1
graph "foreign" stage fake-quant
%0 = input "x" : f32[1x4x4x2]
%1 = "x_fq" FakeQuant(dtype:u8,lo:0,hi:255,params:(scales:[0.0078125],zero_points:[128],axis:None))(%0)
%2 = const "w" : f32[3x2x1x1] = seed(7)
%3 = "w_fq" FakeQuant(dtype:s8,lo:-127,hi:127,params:(scales:[0.0078125],zero_points:[0],axis:None))(%2)
%4 = const "b" : f32[3] = [0.5, -0.25, 0.125]
%5 = "b_fq" FakeQuant(dtype:s32,lo:-8388608,hi:8388608,params:(scales:[{bias_scale}],zero_points:[0],axis:None))(%4)
%6 = "conv" Conv(window:(kernel:[1,1],strides:[1,1],dilations:[1,1],pads_begin:[0,0],pads_end:[0,0]),groups:1,layout:ChannelsLast,bias:true,residual:false,clamp:(lo:-inf,hi:inf))(%1, %3, %5)
%7 = "y_fq" FakeQuant(dtype:u8,lo:10,hi:250,params:(scales:[0.015625],zero_points:[120],axis:None))(%6)
%8 = "narrow" FakeQuant(dtype:u8,lo:0,hi:255,params:(scales:[0.0078125],zero_points:[128],axis:None))(%7)
output "y" = %8
"#
    );
    qcc_ir::text::parse(&text).unwrap()
}

#[test]
fn a_fake_quant_graph_from_elsewhere_is_lowered_by_its_pattern() {
    let fake = foreign(0.0078125 * 0.0078125);
    let mut placed = fake.clone();
    let report = qcc_passes::lower(&mut placed, &Options::default(), &mut |_, _| {}).unwrap();
    let Some(Op::QConv(c)) = placed.op(find(&placed, "conv")) else { panic!("{report}") };
    assert_eq!((c.output.lo, c.output.hi), (10, 250));
    assert_eq!(placed.op(find(&placed, "narrow")).map(Op::mnemonic), Some("QUnary"), "codes change grid");
    let x = inputs(&fake, 4);
    let steps = run(&fake, &x)
        .iter()
        .zip(&run(&placed, &x))
        .map(|(a, b)| (a - b).abs() / 0.015625)
        .fold(0.0, f32::max);
    assert!(steps <= 1.01, "{steps}");
}

#[test]
fn a_bias_in_other_units_is_not_taken_for_one_in_the_right_units() {
    let fake = foreign(0.001);
    let mut placed = fake.clone();
    let report = qcc_passes::lower(&mut placed, &Options::default(), &mut |_, _| {}).unwrap();
    let why = declined(&report, "lower_to_int8", "conv");
    assert!(why.contains("its bias is in steps of"), "{why}");
    assert_eq!(count(&placed, "Conv"), 1);
    let x = inputs(&fake, 5);
    assert!(distance(&run(&fake, &x), &run(&placed, &x)) < 0.02);
}

#[test]
fn products_of_two_activations_take_a_bias_a_residual_and_a_clamp() {
    for mode in RequantMode::ALL {
        let mut net = Net::new(6);
        let x = net.input("x", &[2, 24, 32]);
        let [a, b, r] = ["a", "b", "r"].map(|name| net.matmul(name, x, 32));
        let b = net.transpose("transpose", b, &[0, 2, 1]);
        let bias = net.random_constant("bias", &[24], 0.5);
        let op = MatMul { bias: true, residual: false, clamp: Clamp::NONE };
        let y = net.op("product", op, &[a, b, bias]);
        let r = net.matmul("rest", r, 24);
        let r = net.unary("tanh", UnaryKind::Tanh, r);
        let y = net.binary("sum", BinaryKind::Add, y, r);
        let y = net.unary("clip", UnaryKind::Clip { lo: -1.0, hi: 2.0 }, y);
        let float = net.finish(y);
        let options = Options { requant: mode, ..Options::default() };
        let (fake, placed, report) = compiled(&float, &options);
        let Some(Op::QMatMul(product)) = placed.op(find(&placed, "product")) else { panic!("{report}") };
        assert!(product.residual && product.output.lo >= 0, "{report}");
        let x = inputs(&float, 300);
        let (q, i) = (run(&fake, &x), run(&placed, &x));
        let most = q.iter().zip(&i).map(|(a, b)| (a - b).abs() / product.output.scale).fold(0.0, f32::max);
        // The residual's own code may be a step off, which is less than two of the clamped result's.
        assert!(most <= 3.01, "{most} steps in {mode}\n{report}");
    }
}
