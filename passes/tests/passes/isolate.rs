use crate::common::*;
use qcc_ir::{
    Graph, Op, Output, Stage, Tensor, ValueId, interpreter,
    ops::{BinaryKind, UnaryKind},
};
use qcc_passes::{Options, isolated, quantize, quantized_layers, weight_channels, without_grids};

/// A float graph, and it on grids.
fn both(graph: &Graph) -> (Graph, Graph) {
    let options = Options::default();
    let (float, _) = prepared_with(graph, &options);
    let ranges = calibrated(&float);
    let mut fake = float.clone();
    quantize(&mut fake, &ranges, &options, &mut |_, _| {}).unwrap();
    (float, fake)
}

/// Two convolutions with a pool between, a sum that a ReLU ends, and a function.
fn network() -> Graph {
    let mut net = Net::new(7);
    let x = net.input("x", &[2, 3, 6, 6]);
    let a = net.conv1x1("a", x, 4);
    let p = net.max_pool("pool", a, 2);
    let b = net.conv1x1("b", p, 4);
    let s = net.binary("sum", BinaryKind::Add, b, p);
    let r = net.unary("relu", UnaryKind::Relu, s);
    let m = net.binary("product", BinaryKind::Mul, r, b);
    let y = net.conv1x1("c", m, 2);
    net.finish(y)
}

/// Values of a graph on an input.
fn values(graph: &Graph, values: &[ValueId], input: &Tensor) -> Vec<Vec<f32>> {
    let mut graph = graph.clone();
    let outputs = values.iter().enumerate().map(|(i, &value)| Output { name: i.to_string(), value });
    graph.set_outputs(outputs.collect());
    let results = interpreter::run(&graph, std::slice::from_ref(input)).unwrap();
    results.iter().map(|t| t.as_slice::<f32>().unwrap().to_vec()).collect()
}

/// Σ (a − b)² of each of two samples.
fn noise(a: &[f32], b: &[f32]) -> Vec<f32> {
    let half = a.len() / 2;
    let of = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    vec![of(&a[..half], &b[..half]), of(&a[half..], &b[half..])]
}

fn close(got: &[f32], expected: &[f32]) -> bool {
    got.len() == expected.len()
        && got.iter().zip(expected).all(|(g, e)| (g - e).abs() <= 1e-4 * e.abs() + 1e-9)
}

#[test]
fn a_layer_alone_has_float_inputs_on_their_grids() {
    let (float, fake) = both(&network());
    let input = Net::new(3).tensor(&[2, 3, 6, 6]);
    let tried = isolated(&float, &fake, 2).unwrap();
    assert_eq!(tried.graph.stage, Stage::FakeQuant);
    let names: Vec<&str> = tried.layers.keys().map(String::as_str).collect();
    assert!(
        ["a", "b", "c", "product"].iter().all(|n| names.contains(n)) && !names.contains(&"pool"),
        "{names:?}"
    );

    let own = &tried.layers["b"];
    let shown = [own.signal, own.all, own.inputs.unwrap(), own.parameters.unwrap(), own.result.unwrap()];
    let got = values(&tried.graph, &shown, &input);

    // By hand: what `b` takes is the float result of the pool, on the grid of `a`, which pools keep.
    let value = |graph: &Graph, name: &str| find(graph, name).out();
    let (pool, result) = (value(&float, "pool"), value(&float, "b"));
    let [taken, expected] = &values(&float, &[pool, result], &input)[..] else { panic!() };
    let rounding = |name: &str| match fake.op(find(&fake, name)) {
        Some(Op::FakeQuant(f)) => {
            let f = f.clone();
            move |x: &[f32]| -> Vec<f32> {
                let (s, z) = f.params.as_per_tensor().unwrap();
                x.iter().map(|&x| qcc_ir::numerics::fake_quant(x, s, z, f.lo, f.hi)).collect()
            }
        }
        other => panic!("{name}: {other:?}"),
    };
    let conv = |graph: &Graph, x: &[f32]| -> Vec<f32> {
        let node = find(graph, "b");
        let operands = graph.operands(node);
        let tensors: Vec<Vec<f32>> = values(graph, &operands[1..], &input);
        let shape = |v: ValueId| graph.shape(v).clone();
        let mut own = vec![Tensor::from_vec(shape(operands[0]), x.to_vec()).unwrap()];
        let parameters = operands[1..].iter().zip(tensors);
        own.extend(parameters.map(|(&v, t)| Tensor::from_vec(shape(v), t).unwrap()));
        let operands: Vec<&Tensor> = own.iter().collect();
        interpreter::eval_node(graph, node, &operands).unwrap()[0].as_slice::<f32>().unwrap().to_vec()
    };
    let (on_grid, to_grid) = (rounding("a_fq")(taken), rounding("b_fq"));
    assert!(close(&got[0], &noise(expected, &vec![0.0; expected.len()])), "signal");
    assert!(close(&got[1], &noise(&to_grid(&conv(&fake, &on_grid)), expected)), "all");
    assert!(close(&got[2], &noise(&conv(&float, &on_grid), expected)), "inputs");
    assert!(close(&got[3], &noise(&conv(&fake, taken), expected)), "parameters");
    assert!(close(&got[4], &noise(&to_grid(expected), expected)), "result");
    assert!(got.iter().flatten().all(|x| *x > 0.0), "{got:?}");
}

#[test]
fn a_sum_that_a_clamp_ends_is_part_of_the_clamp() {
    let (_, fake) = both(&network());
    let layers = quantized_layers(&fake);
    let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
    assert!(names.starts_with(&["x", "a", "pool"]) && !names.contains(&"sum"), "{names:?}");
    let grid = |name: &str| &layers.iter().find(|l| l.name == name).unwrap().grid;
    assert!(grid("x").is_some() && grid("a").is_some() && grid("pool").is_none());
    let relu = layers.iter().find(|l| l.name == "relu").or(layers.iter().find(|l| l.name == "b")).unwrap();
    assert!(matches!(fake.op(relu.value.node), Some(Op::FakeQuant(_))));
}

#[test]
fn without_its_grids_a_graph_rounds_its_weights_alone() {
    let (float, fake) = both(&network());
    let plain = without_grids(&fake).unwrap();
    let rounded = plain.nodes().filter(|(_, n)| matches!(n.op(), Some(Op::FakeQuant(_))));
    for (node, _) in rounded {
        assert!(plain.constant_value(plain.operand(node, 0)).is_some());
    }
    let input = Net::new(3).tensor(&[2, 3, 6, 6]);
    let result = |g: &Graph| values(g, &[g.outputs()[0].value], &input).remove(0);
    let error = |g: &Graph| noise(&result(g), &result(&float)).iter().sum::<f32>();
    assert!(error(&plain) > 0.0 && error(&plain) < error(&fake), "{} {}", error(&plain), error(&fake));
}

#[test]
fn weights_are_told_by_channel_with_their_scales() {
    let (float, fake) = both(&network());
    let node = find(&float, "b");
    let float_weights = weight_channels(&float, node).unwrap();
    let fake_weights = weight_channels(&fake, find(&fake, "b")).unwrap();
    assert_eq!((float_weights.len(), fake_weights.len()), (4, 4));
    let weights = float.constant_value(float.operand(node, 1)).unwrap().as_slice::<f32>().unwrap();
    for (c, (own, rounded)) in float_weights.iter().zip(&fake_weights).enumerate() {
        let row = &weights[c * weights.len() / 4..(c + 1) * weights.len() / 4];
        let ends = row.iter().fold((f32::MAX, f32::MIN), |(a, b), &w| (a.min(w), b.max(w)));
        assert_eq!(((own.min, own.max), own.scale), (ends, None));
        let most = rounded.max.max(-rounded.min);
        assert!((rounded.scale.unwrap() * 127.0 - most).abs() < 1e-3 * most, "{rounded:?}");
    }
    assert!(weight_channels(&float, find(&float, "pool")).is_none());
}
