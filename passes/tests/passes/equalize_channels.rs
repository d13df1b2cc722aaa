use crate::common::*;
use qcc_ir::{
    Graph, Op, ValueId, interpreter,
    ops::{BinaryKind, Clamp, MatMul, UnaryKind, Window},
};
use qcc_passes::{
    ChannelRanges, ChannelScales, Range, WeightGrid, channel_scales, equalizable_values, equalize, value_name,
};

/// Ranges of channels on some random inputs.
fn channel_ranges(graph: &Graph) -> ChannelRanges {
    let mut ranges = ChannelRanges::new();
    let values = equalizable_values(graph);
    for seed in 0..4 {
        interpreter::run_observed(graph, &inputs(graph, seed), &mut |v, tensor| {
            let Some(&(_, axis)) = values.iter().find(|(own, _)| *own == v) else { return };
            let (dims, elements) = (tensor.shape(), tensor.as_slice::<f32>().unwrap());
            let inner: usize = dims[axis + 1..].iter().product();
            let own = ranges
                .entry(value_name(graph, v))
                .or_insert_with(|| vec![Range { min: 0.0, max: 0.0 }; dims[axis]]);
            for (i, &x) in elements.iter().enumerate() {
                let range = &mut own[i / inner % dims[axis]];
                *range = Range { min: range.min.min(x), max: range.max.max(x) };
            }
        })
        .unwrap();
    }
    ranges
}

/// The scales that bring channels all the way to the ranges of their tensors.
fn scales_of(graph: &Graph) -> ChannelScales {
    channel_scales(graph, &channel_ranges(graph), WeightGrid::PerAxis, 1.0)
}

/// The prepared graph, and the scales and the graph that equalizing all the way gives. They compute the same.
fn equalized(graph: &Graph) -> (Graph, ChannelScales, Graph) {
    let (before, _) = prepared(graph);
    let scales = scales_of(&before);
    let mut after = before.clone();
    equalize(&mut after, &scales).unwrap();
    for seed in 0..4 {
        let x = inputs(&before, seed);
        let d = distance(&run(&before, &x), &run(&after, &x));
        assert!(d < 1e-5, "results differ by {d}\n{after:?}");
    }
    (before, scales, after)
}

/// How far the channels of a value are from the range of all, on average.
fn spread(graph: &Graph, ranges: &ChannelRanges, name: &str) -> f32 {
    let own = &ranges[name];
    assert!(graph.find(name).is_some());
    let extent = |r: &Range| r.max.max(-r.min);
    let speaking: Vec<f32> = own.iter().map(extent).filter(|&e| e > 0.0).collect();
    let most = speaking.iter().copied().fold(0.0, f32::max);
    speaking.iter().map(|e| e / most).sum::<f32>() / speaking.len() as f32
}

fn relu(net: &mut Net, name: &str, x: ValueId) -> ValueId {
    net.unary(name, UnaryKind::Relu, x)
}

#[test]
fn channels_between_convolutions_come_to_one_range() {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 3, 8, 8]);
    let a = net.conv3x3("a", x, 8, 1);
    let a = relu(&mut net, "a_relu", a);
    let a = net.max_pool("pool", a, 2);
    let window = Window::new([3, 3]).pads([1, 1], [1, 1]);
    let b = net.conv("b", a, 8, window, 8, true);
    let b = relu(&mut net, "b_relu", b);
    let c = net.conv1x1("c", b, 5);
    let graph = net.finish(c);
    let (before, scales, after) = equalized(&graph);
    let (old, new) = (channel_ranges(&before), channel_ranges(&after));
    for name in ["a", "b"] {
        assert!(scales[name].iter().all(|&s| s >= 1.0) && scales[name].contains(&1.0), "{:?}", scales[name]);
        let (was, is) = (spread(&before, &old, name), spread(&after, &new, name));
        assert!(was < 0.9 && is > 0.99, "{name}: {was} {is}");
    }
    // What the model gives out is what it was.
    assert!(!scales.contains_key("c"));
}

#[test]
fn factors_pass_sums_concatenations_parts_and_flattening() {
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 4, 6, 6]);
    let a = net.conv1x1("a", x, 6);
    let a = relu(&mut net, "a_relu", a);
    let b = net.conv1x1("b", a, 6);
    // A residual: one factor for both.
    let sum = net.binary("sum", BinaryKind::Add, b, a);
    let sum = relu(&mut net, "sum_relu", sum);
    let c = net.conv3x3("c", sum, 3, 2);
    let d = net.conv3x3("d", sum, 5, 2);
    let both = net.concat("both", &[c, d], 1);
    let both = relu(&mut net, "both_relu", both);
    let flat = net.reshape("flat", both, &[1, 72]);
    let y = net.matmul("y", flat, 4);
    let graph = net.finish(y);
    let (_, scales, _) = equalized(&graph);
    assert_eq!(scales["a"].len(), 6);
    assert_eq!(scales["both"], [&scales["c"][..], &scales["d"]].concat());
    assert_eq!(scales["flat"].len(), 72);
    assert!(scales["flat"].chunks(9).zip(&scales["both"]).all(|(run, s)| run.iter().all(|x| x == s)));
}

#[test]
fn what_is_no_multiple_keeps_its_channels() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 4, 6, 6]);
    let a = net.conv1x1("a", x, 6);
    let a = net.unary("sigmoid", UnaryKind::Sigmoid, a);
    let b = net.conv1x1("b", a, 6);
    let bounded = net.unary("bounded", UnaryKind::Clip { lo: -1.0, hi: 1.0 }, b);
    let c = net.conv1x1("c", bounded, 6);
    let graph = net.finish(c);
    let (_, scales, _) = equalized(&graph);
    assert!(scales.is_empty(), "{scales:?}");
}

#[test]
fn an_upper_bound_stays_and_holds_what_was_seen() {
    let mut net = Net::new(4);
    let x = net.input("x", &[1, 4, 6, 6]);
    let a = net.conv1x1("a", x, 6);
    let a = net.unary("relu6", UnaryKind::Clip { lo: 0.0, hi: 1.5 }, a);
    let b = net.conv1x1("b", a, 3);
    let graph = net.finish(b);
    let (_, scales, after) = equalized(&graph);
    assert!(scales["a"].iter().any(|&s| s > 1.0));
    let Some(Op::Conv(conv)) = after.op(find(&after, "a")) else { panic!() };
    assert_eq!(conv.clamp, Clamp { lo: 0.0, hi: 1.5 });
}

#[test]
fn a_normalisation_takes_what_its_products_are_divided_by() {
    // SmoothQuant: scale and shift of a layer normalisation, then several products.
    let mut net = Net::new(5);
    let x = net.input("x", &[2, 8]);
    let x = net.matmul("first", x, 8);
    let x = net.unary("tanh", UnaryKind::Tanh, x);
    let gamma = net.random_constant("gamma", &[8], 2.0);
    let beta = net.random_constant("beta", &[8], 2.0);
    let scaled = net.binary("scaled", BinaryKind::Mul, x, gamma);
    let y = net.binary("shifted", BinaryKind::Add, scaled, beta);
    let a = net.matmul("a", y, 4);
    let b = net.matmul("b", y, 4);
    let sum = net.binary("sum", BinaryKind::Mul, a, b);
    let graph = net.finish(sum);
    let (before, _) = prepared(&graph);
    let scales = scales_of(&before);
    assert!(scales.keys().any(|k| k == "shifted" || k == "scaled"), "{scales:?}\n{before:?}");
    let mut after = before.clone();
    equalize(&mut after, &scales).unwrap();
    assert_same(&before, &after);
}

#[test]
fn products_of_two_activations_keep_theirs() {
    let mut net = Net::new(6);
    let x = net.input("x", &[4, 8]);
    let a = net.matmul("a", x, 8);
    let b = net.matmul("b", x, 8);
    let b = net.transpose("b_t", b, &[1, 0]);
    let y = net.op("y", MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[a, b]);
    let graph = net.finish(y);
    let (_, scales, _) = equalized(&graph);
    assert!(scales.is_empty(), "{scales:?}");
}
