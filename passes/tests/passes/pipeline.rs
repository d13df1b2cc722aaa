//! The whole way, from a float graph to a placed one.

use crate::common::*;
use qcc_ir::{
    Device, Graph, Stage,
    numerics::RequantMode,
    ops::{Activation, BinaryKind, Cell, Recurrent, UnaryKind, Window},
};
use qcc_passes::{Options, PassError, Precision, WeightBits, WeightGrid, plan};

/// A residual network with what makes them hard: strides, a downsampling branch, depthwise convolutions, hard-swish,
/// ReLU6, a concatenation, squeeze and excite, a classifier.
fn residual_net(seed: u64) -> Graph {
    let mut net = Net::new(seed);
    let x = net.input("image", &[1, 3, 12, 12]);
    let x = net.conv3x3("stem", x, 8, 1);
    let x = net.batch_norm("stem.bn", x, 1);
    let x = net.unary("stem.relu", UnaryKind::Relu, x);
    // An identity block.
    let y = net.conv3x3("a.conv1", x, 8, 1);
    let y = net.batch_norm("a.bn1", y, 1);
    let y = net.unary("a.relu1", UnaryKind::Relu, y);
    let y = net.conv3x3("a.conv2", y, 8, 1);
    let y = net.batch_norm("a.bn2", y, 1);
    let y = net.binary("a.add", BinaryKind::Add, y, x);
    let x = net.unary("a.relu2", UnaryKind::Relu, y);
    // A downsampling block with a depthwise convolution.
    let y = net.conv1x1("b.expand", x, 16);
    let y = net.unary("b.swish", UnaryKind::HardSwish, y);
    let window = Window::new([3, 3]).strides([2, 2]).pads([1, 1], [1, 1]);
    let y = net.conv("b.depthwise", y, 16, window, 16, false);
    let y = net.batch_norm("b.bn", y, 1);
    let y = net.unary("b.relu6", UnaryKind::Clip { lo: 0.0, hi: 6.0 }, y);
    let y = net.conv1x1("b.project", y, 12);
    let s = net.conv("b.shortcut", x, 12, Window::new([1, 1]).strides([2, 2]), 1, true);
    let x = net.binary("b.add", BinaryKind::Add, y, s);
    // Two branches of unequal range, joined.
    let l = net.conv3x3("c.left", x, 4, 1);
    let r = net.max_pool("c.pool", x, 2);
    let l = net.max_pool("c.pool_left", l, 2);
    let x = net.concat("c.concat", &[l, r], 1);
    // Squeeze and excite.
    let g = net.spatial_mean("d.mean", x);
    let g = net.reshape("d.shape", g, &[1, 16, 1, 1]);
    let g = net.conv1x1("d.gate", g, 16);
    let g = net.unary("d.sigmoid", UnaryKind::Sigmoid, g);
    let x = net.binary("d.scale", BinaryKind::Mul, x, g);
    let x = net.spatial_mean("mean", x);
    let x = net.matmul("fc", x, 10);
    let bias = net.random_constant("fc.bias", &[10], 0.3);
    let x = net.binary("fc.add", BinaryKind::Add, x, bias);
    let x = net.softmax("softmax", x);
    net.finish(x)
}

#[test]
fn int8_agrees_with_fake_quant_within_steps_and_with_float_closely() {
    for seed in [1, 2, 3] {
        let float = residual_net(seed);
        let (fake, placed, report) = compiled(&float, &Options::default());
        assert_eq!((fake.stage, placed.stage), (Stage::FakeQuant, Stage::Placed));
        let ops: Vec<&str> = placed.nodes().map(|(id, _)| placed.mnemonic(id)).collect();
        for float_op in ["Conv", "MatMul", "Binary", "Unary", "BatchNorm", "FakeQuant"] {
            assert!(!ops.contains(&float_op), "{float_op} is left:\n{report}{placed:?}");
        }
        // One at the image; the sums of `fc` become what the softmax needs; nothing in between is converted.
        assert_eq!((count(&placed, "Quantize"), count(&placed, "Dequantize")), (1, 0), "{report}");
        assert_eq!(count(&placed, "QMatMulToFloat"), 1, "{report}");
        assert_eq!(count(&placed, "Transpose"), 1, "{report}");
        for sample in 50..54 {
            let x = inputs(&float, sample);
            let (f, q, i) = (run(&float, &x), run(&fake, &x), run(&placed, &x));
            // Probabilities: a step of the logits is about a hundredth.
            assert!(distance(&q, &i) < 0.05, "seed {seed}: fake-quant {q:?}\nint8 {i:?}");
            assert!(distance(&f, &i) < 0.15, "seed {seed}: float {f:?}\nint8 {i:?}");
        }
    }
}

#[test]
fn every_requantization_mode_and_grid_of_weights_works() {
    let float = residual_net(4);
    let x = inputs(&float, 60);
    let grids = [
        (WeightGrid::PerAxis, WeightBits::Eight),
        (WeightGrid::PerTensor, WeightBits::Eight),
        (WeightGrid::PerAxis, WeightBits::Seven),
    ];
    for (weights, weight_bits) in grids {
        for requant in RequantMode::ALL {
            let options = Options { requant, weights, weight_bits, ..Options::default() };
            let (fake, placed, report) = compiled(&float, &options);
            let d = distance(&run(&fake, &x), &run(&placed, &x));
            assert!(d < 0.05, "{requant} {weights:?} {weight_bits:?}: {d}\n{report}");
            let used = placed.nodes().filter(|(_, n)| match n.op() {
                Some(qcc_ir::Op::QConv(c)) => c.requant == requant,
                _ => false,
            });
            assert!(used.count() > 3, "{requant} {weights:?} is hardly used\n{report}");
        }
    }
}

#[test]
fn float_and_fake_quant_stay_float() {
    let float = residual_net(5);
    let x = inputs(&float, 70);
    let options = Options { precision: Precision::Float, ..Options::default() };
    let (_, placed, _) = compiled(&float, &options);
    assert!(distance(&run(&float, &x), &run(&placed, &x)) < 1e-5);

    let options = Options { precision: Precision::FakeQuant, ..Options::default() };
    let (fake, placed, _) = compiled(&float, &options);
    assert!(distance(&run(&fake, &x), &run(&placed, &x)) < 1e-5);
    let rounds_a_constant = |(id, n): (_, &qcc_ir::Node)| {
        n.op().is_some_and(|op| op.mnemonic() == "FakeQuant")
            && placed.constant_value(placed.operand(id, 0)).is_some()
    };
    assert!(!placed.nodes().any(rounds_a_constant), "weights are rounded at run time");
    assert!(
        placed.nodes().filter(|(_, n)| n.op().is_some()).all(|(_, n)| n.device == Some(Device::FloatJit))
    );
}

#[test]
fn compiling_twice_gives_the_same() {
    let texts = [(); 2].map(|()| {
        let (fake, placed, report) = compiled(&residual_net(6), &Options::default());
        format!("{fake:?}{placed:?}{report}{}", plan(&placed, &report))
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn pins_are_honoured_or_refused_with_a_reason() {
    let float = residual_net(7);
    let mut options = Options::default();
    options.pins.insert("a.conv2".into(), Device::FloatJit);
    options.pins.insert("c.left".into(), Device::Interpreter);
    let (_, placed, report) = compiled(&float, &options);
    assert_eq!(placed.node(find(&placed, "a.conv2")).device, Some(Device::FloatJit));
    assert_eq!(placed.node(find(&placed, "c.left")).device, Some(Device::Interpreter));
    assert_eq!(count(&placed, "Conv"), 2, "only the pinned ones are float");
    assert!(count(&placed, "Transfer") >= 4, "{}", plan(&placed, &report));
    let x = inputs(&float, 80);
    assert!(distance(&run(&float, &x), &run(&placed, &x)) < 0.15);

    let refused = |name: &str, device| {
        let options = Options { pins: [(name.to_string(), device)].into(), ..Options::default() };
        let mut graph = float.clone();
        qcc_passes::prepare(&mut graph, &options, &mut |_, _| {})?;
        let ranges = calibrated(&graph);
        qcc_passes::quantize(&mut graph, &ranges, &options, &mut |_, _| {})?;
        qcc_passes::lower(&mut graph, &options, &mut |_, _| {})?;
        Ok::<(), PassError>(())
    };
    let message = refused("a.cnov2", Device::FloatJit).unwrap_err().to_string();
    assert!(message.starts_with("no node `a.cnov2` to pin; did you mean `a.conv2`"), "{message}");
    let message = refused("softmax", Device::Int8Jit).unwrap_err().to_string();
    assert!(message.contains("Softmax has no integer form"), "{message}");
}

#[test]
fn what_the_code_generator_refuses_runs_in_the_interpreter() {
    let options = Options {
        capability: |g, n| match g.mnemonic(n) {
            "QUnary" => Err("tables are not done yet".into()),
            _ => Ok(()),
        },
        ..Options::default()
    };
    let (_, placed, report) = compiled(&residual_net(8), &options);
    let swish = find(&placed, "b.swish");
    assert_eq!(placed.node(swish).device, Some(Device::Interpreter));
    assert!(declined(&report, "assign_devices", "b.swish").contains("tables are not done yet"));
    for (id, node) in placed.nodes().filter(|(_, n)| n.op().is_some()) {
        for v in placed.operands(id) {
            let from = placed.node(v.node).device;
            let transfer = placed.mnemonic(id) == "Transfer";
            assert!(
                from.is_none() || transfer || from == node.device,
                "{} has an operand elsewhere",
                node.name
            );
        }
    }
    let table = plan(&placed, &report);
    let line = table.lines().find(|l| l.starts_with("b.swish ")).unwrap();
    assert!(
        line.contains("QUnary") && line.contains("interpreter") && line.contains("not done yet"),
        "{line}"
    );
}

#[test]
fn an_op_without_ranges_stays_float_and_says_so() {
    let float = residual_net(9);
    let options = Options::default();
    let mut graph = float.clone();
    qcc_passes::prepare(&mut graph, &options, &mut |_, _| {}).unwrap();
    let mut ranges = calibrated(&graph);
    ranges.values.remove("b.expand");
    let report = qcc_passes::quantize(&mut graph, &ranges, &options, &mut |_, _| {}).unwrap();
    let why = declined(&report, "insert_fake_quant", "b.expand");
    assert!(why.contains("has none of `b.expand`"), "{why}");
    assert!(report.warnings().any(|w| w.text.contains("no range of what they take")));
    qcc_passes::lower(&mut graph, &options, &mut |_, _| {}).unwrap();
    assert!(count(&graph, "QConv") > 0, "the rest is quantized");
    let x = inputs(&float, 3);
    assert!(distance(&run(&float, &x), &run(&graph, &x)) < 0.2);
}

#[test]
fn a_graph_without_anything_to_gain_stays_float() {
    let mut net = Net::new(10);
    let x = net.input("x", &[2, 3, 4, 4]);
    let y = net.unary("tanh", UnaryKind::Tanh, x);
    let y = net.max_pool("pool", y, 2);
    let float = net.finish(y);
    let (_, placed, _) = compiled(&float, &Options::default());
    assert_eq!((count(&placed, "Quantize"), placed.stage), (0, Stage::Placed));
    assert_same(&float, &placed);
}

#[test]
fn empty_tensors_and_inputs_that_are_results_pass_through() {
    let mut net = Net::new(11);
    let x = net.input("x", &[0, 3, 4, 4]);
    let y = net.conv3x3("conv", x, 4, 1);
    let y = net.unary("relu", UnaryKind::Relu, y);
    net.graph.output("x", x);
    let float = net.finish(y);
    let (_, placed, report) = compiled(&float, &Options::default());
    assert_eq!(placed.outputs().len(), 2);
    assert_eq!(count(&placed, "QConv"), 1, "{report}");
    assert_eq!(run(&placed, &inputs(&float, 1)), Vec::<f32>::new());
}

#[test]
fn every_pass_is_observed_in_order_with_a_valid_graph() {
    let mut graph = residual_net(12);
    let options = Options::default();
    let mut seen = Vec::new();
    let mut observe = |pass: &qcc_passes::Pass, graph: &Graph| {
        qcc_ir::verify(graph).unwrap();
        seen.push(pass.name);
    };
    qcc_passes::prepare(&mut graph, &options, &mut observe).unwrap();
    let ranges = calibrated(&graph);
    qcc_passes::quantize(&mut graph, &ranges, &options, &mut observe).unwrap();
    qcc_passes::lower(&mut graph, &options, &mut observe).unwrap();
    let mut names = qcc_passes::pass_names();
    names.retain(|name| *name != "quantize_dynamic");
    assert_eq!(seen, names, "int8 runs each pass once, but for the one of int8-dynamic");
}

#[test]
fn every_result_of_an_op_of_several_goes_through() {
    let mut net = Net::new(3);
    let gates = net.input("gates", &[4, 2, 5]);
    let gates = net.unary("shifted", UnaryKind::Tanh, gates);
    let state = net.input("state", &[2, 5]);
    let weights = net.random_constant("weights", &[5, 5], 0.3);
    let rnn = Recurrent {
        cell: Cell::Rnn,
        activations: vec![Activation::Affine { alpha: 0.5, beta: 0.1 }],
        clip: None,
        reverse: false,
        lengths: false,
    };
    let rnn = net.graph.add("rnn", rnn, &[gates, weights, state]).unwrap();
    let y = net.binary("y", BinaryKind::Add, rnn.out(), rnn.port(1));
    let float = net.finish(y);
    for precision in [Precision::Float, Precision::FakeQuant, Precision::Int8] {
        let (_, placed, report) = compiled(&float, &Options { precision, ..Options::default() });
        let x = inputs(&float, 9);
        let d = distance(&run(&float, &x), &run(&placed, &x));
        assert!(d <= if precision == Precision::Float { 1e-5 } else { 0.05 }, "{precision:?}: {d}\n{report}");
    }
}
