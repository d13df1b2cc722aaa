use crate::common::*;
use qcc_ir::{
    Graph, Op, Stage, ValueId,
    numerics::RequantMode,
    ops::{BinaryKind, FakeQuant, UnaryKind},
};
use qcc_passes::{NoteKind, Options, Report, WeightBits, WeightGrid, int8_capability, quantize};

fn quantized_with(graph: &Graph, options: &Options) -> (Graph, Report) {
    let (mut graph, _) = prepared_with(graph, options);
    let ranges = calibrated(&graph);
    let report = quantize(&mut graph, &ranges, options, &mut |_, _| {}).unwrap();
    assert_eq!(graph.stage, Stage::FakeQuant);
    (graph, report)
}

fn quantized(graph: &Graph) -> (Graph, Report) {
    quantized_with(graph, &Options::default())
}

fn fake_quant<'a>(graph: &'a Graph, name: &str) -> &'a FakeQuant {
    match graph.op(find(graph, name)) {
        Some(Op::FakeQuant(f)) => f,
        other => panic!("{name}: {other:?}"),
    }
}

/// x ─ conv ─ ..., with `behind` what comes after.
fn behind_conv(behind: impl Fn(&mut Net, ValueId) -> ValueId) -> Graph {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 3, 6, 6]);
    let y = net.conv1x1("conv", x, 4);
    let y = behind(&mut net, y);
    net.finish(y)
}

#[test]
fn the_branches_of_a_concatenation_share_one_grid() {
    let graph = behind_conv(|net, y| {
        let a = net.conv1x1("a", y, 2);
        let b = net.conv1x1("b", y, 2);
        let b = net.max_pool("pool", b, 2);
        let a = net.max_pool("pool_a", a, 2);
        let c = net.random_constant("c", &[1, 1, 3, 3], 9.0);
        let y = net.concat("concat", &[a, b, c], 1);
        net.conv1x1("next", y, 2)
    });
    let (after, report) = quantized(&graph);
    let grids = ["a_fq", "b_fq", "c_fq"].map(|n| fake_quant(&after, n).params.clone());
    assert!(grids.iter().all(|g| *g == grids[0]), "{grids:?}");
    assert!(
        after.find("concat_fq").is_none() && after.find("pool_fq").is_none(),
        "moves are on the grid\n{report}"
    );
}

#[test]
fn weights_are_symmetric_per_channel_and_the_bias_in_their_units() {
    let graph = behind_conv(|_, y| y);
    let (after, _) = quantized(&graph);
    let (x, w, b) = (
        fake_quant(&after, "x_fq"),
        fake_quant(&after, "conv_weight_fq"),
        fake_quant(&after, "conv_bias_fq"),
    );
    assert_eq!((w.lo, w.hi, w.params.axis(), w.params.scales().len()), (-127, 127, Some(0), 4));
    let (s_x, _) = x.params.as_per_tensor().unwrap();
    for c in 0..4 {
        assert_eq!(w.params.at(c).1, 0);
        assert!((b.params.at(c).0 / (s_x * w.params.at(c).0) - 1.0).abs() < 1e-6);
    }
    let (after, _) =
        quantized_with(&graph, &Options { weights: WeightGrid::PerTensor, ..Options::default() });
    assert!(fake_quant(&after, "conv_weight_fq").params.as_per_tensor().is_some());
}

#[test]
fn weights_of_7_bits_have_their_largest_at_64() {
    let graph = behind_conv(|_, y| y);
    for grid in [WeightGrid::PerAxis, WeightGrid::PerTensor] {
        let options = |weight_bits| Options {
            weights: grid,
            weight_bits,
            requant: RequantMode::Shift,
            ..Options::default()
        };
        let [(wide, _), (narrow, report)] =
            [WeightBits::Eight, WeightBits::Seven].map(|bits| quantized_with(&graph, &options(bits)));
        let [wide, of_narrow] = [&wide, &narrow].map(|g| fake_quant(g, "conv_weight_fq"));
        assert_eq!((of_narrow.lo, of_narrow.hi), (-64, 64));
        for (w, n) in wide.params.scales().iter().zip(of_narrow.params.scales()) {
            assert!((n / w * 64.0 / 127.0 - 1.0).abs() < 1e-6, "{w} {n}");
        }
        let note = report.record("insert_fake_quant").unwrap().notes.iter().find(|n| n.node == "conv");
        assert!(note.is_some_and(|n| n.text.contains("weights of 7 bits")), "{report}");
        let mut placed = narrow.clone();
        qcc_passes::lower(&mut placed, &options(WeightBits::Seven), &mut |_, _| {}).unwrap();
        let conv = find(&placed, "conv");
        let codes = placed.constant_value(placed.operand(conv, 1)).unwrap().as_slice::<i8>().unwrap();
        assert_eq!(codes.iter().map(|c| c.unsigned_abs()).max(), Some(64));
    }
}

#[test]
fn a_clamp_and_its_op_have_one_grid() {
    let graph = behind_conv(|net, y| {
        let s = net.unary("tanh", UnaryKind::Tanh, y);
        let y = net.binary("mul", BinaryKind::Mul, y, s);
        net.unary("relu6", UnaryKind::Clip { lo: 0.0, hi: 0.1 }, y)
    });
    let (after, _) = quantized(&graph);
    assert!(after.find("mul_fq").is_none());
    let (scale, zero) = fake_quant(&after, "relu6_fq").params.as_per_tensor().unwrap();
    assert!(zero == 0 && scale * 255.0 <= 0.1 + 1e-6, "{scale} {zero}");
}

#[test]
fn only_regions_that_gain_are_quantized() {
    let graph = behind_conv(|net, y| {
        let y = net.unary("log", UnaryKind::Log, y);
        // Between float ops and connected to no product.
        let y = net.unary("tanh", UnaryKind::Tanh, y);
        let y = net.reshape("reshape", y, &[1, 144]);
        net.softmax("softmax", y)
    });
    let (after, report) = quantized(&graph);
    for (name, reason) in [
        ("log", "singular at 0"),
        ("tanh", "no integer convolution or matrix product is connected"),
        ("reshape", "no integer convolution or matrix product is connected"),
        ("softmax", "Softmax has no integer form"),
    ] {
        let why = declined(&report, "insert_fake_quant", name);
        assert!(why.contains(reason), "{name}: {why}");
    }
    assert_eq!(applied(&report, "insert_fake_quant"), 1);
    // What floats alone read is not rounded.
    assert!(after.find("conv_weight_fq").is_some());
    assert!(after.find("conv_fq").is_none() && after.find("tanh_fq").is_none());
}

#[test]
fn other_runtimes_get_a_grid_for_a_product_with_a_bias_before_softmax() {
    let mut net = Net::new(3);
    let x = net.input("x", &[2, 16]);
    let y = net.matmul("matmul", x, 10);
    let bias = net.random_constant("bias", &[10], 1.0);
    let y = net.binary("add", BinaryKind::Add, y, bias);
    let y = net.softmax("softmax", y);
    let graph = net.finish(y);
    let has_grid = |interchange| {
        let (after, _) = quantized_with(&graph, &Options { interchange, ..Options::default() });
        let product = after.nodes().find(|(_, n)| matches!(n.op(), Some(Op::MatMul(m)) if m.bias)).unwrap().0;
        after.uses(product.out()).iter().all(|u| matches!(after.op(u.node), Some(Op::FakeQuant(_))))
    };
    assert!(has_grid(true) && !has_grid(false));
}

#[test]
fn a_cheap_op_among_float_ops_stays_float_and_one_among_integers_does_not() {
    // Subtracting a mean that is computed in float, for use in float: the convolution's result is converted anyway.
    let graph = behind_conv(|net, y| {
        let m = net.unary("reciprocal", UnaryKind::Reciprocal, y);
        let d = net.binary("sub", BinaryKind::Sub, y, m);
        net.unary("log", UnaryKind::Log, d)
    });
    let (_, report) = quantized(&graph);
    assert!(declined(&report, "insert_fake_quant", "sub").contains("its neighbours are float"), "{report}");

    let graph = behind_conv(|net, y| {
        let y = net.transpose("transpose", y, &[0, 1, 3, 2]);
        let y = net.unary("tanh", UnaryKind::Tanh, y);
        net.conv1x1("next", y, 3)
    });
    let (_, report) = quantized(&graph);
    assert_eq!(applied(&report, "insert_fake_quant"), 4, "{report}");
}

#[test]
fn values_made_in_float_are_rounded_for_integer_ops_alone() {
    let graph = behind_conv(|net, y| {
        let e = net.unary("reciprocal", UnaryKind::Reciprocal, y);
        let next = net.conv1x1("next", e, 4);
        let l = net.unary("log", UnaryKind::Log, e);
        net.graph.output("next", next);
        l
    });
    let (after, _) = quantized(&graph);
    let e = find(&after, "reciprocal").out();
    let users: Vec<&str> = after.uses(e).iter().map(|u| after.node(u.node).name.as_str()).collect();
    assert_eq!(users, ["log", "reciprocal_fq"]);
}

#[test]
fn dead_channels_get_a_usable_scale() {
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 2, 4, 4]);
    let w = net.constant("w", &[3, 2, 1, 1], vec![0.0, 0.0, 1e-30, -1e-31, 0.5, 0.25]);
    let b = net.constant("b", &[3], vec![0.0, 7.0, -0.5]);
    let op = qcc_ir::ops::Conv {
        window: qcc_ir::ops::Window::new([1, 1]),
        groups: 1,
        layout: qcc_ir::ops::Layout::ChannelsFirst,
        bias: true,
        residual: false,
        clamp: qcc_ir::ops::Clamp::NONE,
    };
    let y = net.op("conv", op, &[x, w, b]);
    let float = net.finish(y);
    let (fake, placed, report) = compiled(&float, &Options::default());
    let x = inputs(&float, 3);
    let (f, q, i) = (run(&float, &x), run(&fake, &x), run(&placed, &x));
    let step = 7.5 / 255.0;
    for ((f, q), i) in f.iter().zip(&q).zip(&i) {
        assert!((f - i).abs() <= 1.01 * step && (q - i).abs() <= 1.01 * step, "{f} {q} {i}\n{report}");
    }
    let Some(Op::QConv(c)) = placed.op(find(&placed, "conv")) else { panic!("{report}") };
    assert_eq!(c.requant, RequantMode::Q15, "{report}");
}

#[test]
fn reasons_name_what_is_missing() {
    let mut net = Net::new(3);
    let x = net.input("x", &[2, 32_501]);
    let w = net.input("w", &[32_501, 3]);
    let op = qcc_ir::ops::MatMul { bias: false, residual: false, clamp: qcc_ir::ops::Clamp::NONE };
    let y = net.op("product", op, &[x, w]);
    let nan = net.constant("nan", &[3], vec![0.0, f32::NAN, 1.0]);
    let y = net.binary("add", BinaryKind::Add, y, nan);
    let graph = net.finish(y);
    let why = |name: &str| int8_capability(&graph, find(&graph, name)).unwrap_err();
    assert!(why("product").contains("32501 products of two activations can leave 32 bits"));
    assert_eq!(why("add"), "a constant operand is not finite");
}

/// A product of two activations between others, with ranges that are made by `second`.
fn second_operand_of(second: impl FnOnce(&mut Net, ValueId) -> ValueId) -> (Graph, Report) {
    let mut net = Net::new(4);
    let x = net.input("x", &[2, 40, 32]);
    let a = net.matmul("a", x, 64);
    let y = net.input("y", &[2, 64, 32]);
    let b = net.matmul("b", y, 48);
    let b = second(&mut net, b);
    let y = net.product("product", a, b);
    let graph = net.finish(y);
    let (_, placed, report) = compiled(&graph, &Options::default());
    (placed, report)
}

#[test]
fn second_operands_are_symmetric_unless_that_costs_codes() {
    let zero_point = |(placed, report): (Graph, Report)| {
        let product = find(&placed, "product");
        assert_eq!(placed.mnemonic(product), "QMatMul", "{report}");
        placed.ty(placed.operand(product, 1)).per_tensor().unwrap().1
    };
    assert_eq!(zero_point(second_operand_of(|_, b| b)), 128);
    assert_eq!(zero_point(second_operand_of(|net, b| net.unary("relu", UnaryKind::Relu, b))), 0);
    // Through moves, whose class has one grid.
    let moved = second_operand_of(|net, b| {
        let b = net.reshape("rows", b, &[2, 64 * 48]);
        net.reshape("again", b, &[2, 64, 48])
    });
    assert_eq!(zero_point(moved), 128);
}

#[test]
fn a_product_of_few_multiplications_among_float_ops_stays_float() {
    let mut net = Net::new(5);
    let x = net.input("x", &[2, 8, 4]);
    let y = net.input("y", &[2, 4, 8]);
    let [a, b] = [("a", x), ("b", y)].map(|(name, v)| net.unary(name, UnaryKind::Reciprocal, v));
    let y = net.product("product", a, b);
    let y = net.unary("log", UnaryKind::Log, y);
    let (_, report) = quantized(&net.finish(y));
    assert!(declined(&report, "insert_fake_quant", "product").contains("neighbours are float"), "{report}");
}

#[test]
fn a_sum_in_which_scores_would_vanish_beside_a_mask_stays_float() {
    for (hidden, is_float) in [(-10_000.0, true), (-2.0, false)] {
        let mut net = Net::new(6);
        let x = net.input("x", &[2, 16, 32]);
        let (q, k) = (net.matmul("q", x, 32), net.matmul("k", x, 32));
        let k = net.transpose("kt", k, &[0, 2, 1]);
        let scores = net.product("scores", q, k);
        let mask = net.input("mask", &[2, 1, 16]);
        let hidden = net.constant("hidden", &[], vec![hidden]);
        let mask = net.binary("bias", BinaryKind::Mul, mask, hidden);
        let y = net.binary("masked", BinaryKind::Add, scores, mask);
        let v = net.matmul("v", x, 16);
        let y = net.product("mixed", y, v);
        let (_, report) = quantized(&net.finish(y));
        let record = report.record("insert_fake_quant").unwrap();
        let why = record.of(NoteKind::Declined).find(|n| n.node == "masked").map(|n| n.text.as_str());
        assert_eq!(
            why.is_some_and(|why| why.contains("as much as `scores` ranges over")),
            is_float,
            "{report}"
        );
    }
}
