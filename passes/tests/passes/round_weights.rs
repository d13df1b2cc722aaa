use crate::common::*;
use qcc_ir::{
    Graph, NodeId, Tensor, interpreter,
    ops::{UnaryKind, Window},
};
use qcc_passes::{
    BiasShifts, InputMoments, Moments, NoteKind, Options, Ranges, Repairs, Report, quantize,
    weighted_products,
};
use std::sync::Arc;

/// A convolution over 1×1 pixels, a depthwise one, and a matrix product, whose inputs are correlated and have a mean.
fn network() -> Graph {
    let mut net = Net::new(11);
    let x = net.input("x", &[1, 2, 6, 6]);
    let a = net.conv1x1("a", x, 16);
    let a = net.unary("a_relu", UnaryKind::Relu, a);
    let window = Window::new([3, 3]).pads([1, 1], [1, 1]);
    let b = net.conv("b", a, 16, window, 16, true);
    let b = net.unary("b_relu", UnaryKind::Relu, b);
    let c = net.conv1x1("c", b, 16);
    let c = net.spatial_mean("mean", c);
    let c = net.reshape("flat", c, &[1, 16]);
    let y = net.matmul("y", c, 10);
    net.finish(y)
}

const SEEDS: std::ops::Range<u64> = 0..40;

fn add_row(moments: &mut Moments, row: &[f32]) {
    let n = row.len();
    moments.rows += 1;
    moments.sum.resize(n, 0.0);
    moments.products.resize(n * n, 0.0);
    for i in 0..n {
        moments.sum[i] += f64::from(row[i]);
        for j in 0..n {
            moments.products[i * n + j] += row[i] * row[j];
        }
    }
}

/// Moments of inputs: channels of pixels, or windows of 3×3 of each channel.
fn moments(graph: &Graph) -> InputMoments {
    let mut all = InputMoments::new();
    for node in weighted_products(graph) {
        let (input, weights) = (graph.operand(node, 0), graph.shape(graph.operand(node, 1)).to_vec());
        let is_depthwise = weights.len() == 4 && weights[2] == 3;
        let mut own = vec![Moments::default(); if is_depthwise { 16 } else { 1 }];
        for seed in SEEDS {
            let given = inputs(graph, seed);
            let mut seen: Option<Tensor> =
                graph.inputs().iter().any(|n| n.out() == input).then(|| given[0].clone());
            interpreter::run_observed(graph, &given, &mut |v, t| {
                if v == input {
                    seen = Some(t.clone());
                }
            })
            .unwrap();
            let seen = seen.unwrap();
            let (dims, x) = (seen.shape().to_vec(), seen.as_slice::<f32>().unwrap());
            match (&dims[..], is_depthwise) {
                (&[_, c, h, w], false) => {
                    for p in 0..h * w {
                        let row: Vec<f32> = (0..c).map(|c| x[c * h * w + p]).collect();
                        add_row(&mut own[0], &row);
                    }
                }
                (&[_, _, h, w], true) => {
                    for (c, own) in own.iter_mut().enumerate() {
                        for p in 0..h * w {
                            let at = |i: usize| {
                                let (y, x_) = (p / w + i / 3, p % w + i % 3);
                                let inside = (1..=h).contains(&y) && (1..=w).contains(&x_);
                                if inside { x[c * h * w + (y - 1) * w + x_ - 1] } else { 0.0 }
                            };
                            add_row(own, &(0..9).map(at).collect::<Vec<_>>());
                        }
                    }
                }
                _ => add_row(&mut own[0], x),
            }
        }
        all.insert(graph.node(node).name.clone(), Arc::new(own));
    }
    all
}

fn fake_quantized(repairs: Repairs) -> (Graph, Graph, Report) {
    let (float, _) = prepared(&network());
    let mut ranges = calibrated(&float);
    ranges.moments = moments(&float);
    let mut graph = float.clone();
    ranges.repairs = repairs;
    let report = quantize(&mut graph, &ranges, &Options::default(), &mut |_, _| {}).unwrap();
    (float, graph, report)
}

/// Mean squared error and squared mean error of a node's result, over the samples. Only weights and bias are on grids.
fn errors(float: &Graph, fake: &Graph, name: &str) -> (f64, f64) {
    let weights = |graph: &Graph, node: NodeId, slot: usize| {
        let value = graph.operand(node, slot);
        let source = graph.constant_value(value).cloned();
        source.unwrap_or_else(|| {
            interpreter::run_observed(graph, &inputs(graph, 0), &mut |_, _| {}).unwrap();
            let op = graph.op(value.node).unwrap();
            let x = graph.operand(value.node, 0);
            let results = op.infer(&[graph.ty(x)]).unwrap();
            op.eval(&[graph.constant_value(x).unwrap()], &[graph.ty(x)], &results).unwrap().remove(0)
        })
    };
    // The float graph with the fake-quantized weights in one place.
    let mut changed = float.clone();
    let node = find(&changed, name);
    let from = find(fake, name);
    for slot in [1, 2] {
        let constant = changed.constant(&format!("{name}_{slot}"), weights(fake, from, slot));
        changed.set_operand(node, slot, constant).unwrap();
    }
    let (mut square, mut count) = (0.0, 0.0);
    let mut means: Vec<f64> = Vec::new();
    for seed in SEEDS {
        let result = |graph: &Graph| {
            let mut y = None;
            let wanted = find(graph, name).out();
            interpreter::run_observed(graph, &inputs(graph, seed), &mut |v, t| {
                if v == wanted {
                    y = Some(t.as_slice::<f32>().unwrap().to_vec());
                }
            })
            .unwrap();
            y.unwrap()
        };
        let (a, b) = (result(float), result(&changed));
        means.resize(16, 0.0);
        let each = a.len() / 16;
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            square += f64::from(a - b).powi(2);
            means[i / each] += f64::from(a - b) / each as f64 / 40.0;
            count += 1.0;
        }
    }
    (square / count, means.iter().map(|m| m * m).sum::<f64>() / 16.0)
}

#[test]
fn errors_cancel_and_means_vanish() {
    let (float, nearest, _) = fake_quantized(Repairs::NONE);
    let (_, corrected, _) = fake_quantized(Repairs { bias: true, ..Repairs::NONE });
    let (_, rounded, report) = fake_quantized(Repairs { rounding: true, bias: true, ..Repairs::NONE });
    assert_eq!(report.record("round_weights").unwrap().applied, 4, "{report}");
    // Of the product without a clamp: one would hide part of an error, whose mean is not that of the sums.
    let ((plain, plain_mean), (_, mean)) = (errors(&float, &nearest, "c"), errors(&float, &corrected, "c"));
    assert!(mean < 0.02 * plain_mean, "{mean} {plain_mean}");
    let (best, best_mean) = errors(&float, &rounded, "c");
    assert!(best < 0.5 * plain && best_mean < 0.02 * plain_mean, "{best} {plain}");
}

#[test]
fn moments_of_another_input_are_not_taken() {
    let (float, _) = prepared(&network());
    let mut ranges = calibrated(&float);
    let mut few = Moments::default();
    add_row(&mut few, &[1.0, 2.0, 3.0]);
    ranges.moments.insert("c".into(), Arc::new(vec![few]));
    let mut graph = float.clone();
    ranges.repairs = Repairs::ALL;
    let report = quantize(&mut graph, &ranges, &Options::default(), &mut |_, _| {}).unwrap();
    let notes: Vec<_> = report.record("round_weights").unwrap().of(NoteKind::Declined).collect();
    assert_eq!(notes.len(), 1, "{report}");
    assert!(notes[0].text.contains("another one than calibration saw"));
}

#[test]
fn biases_take_the_shifts_that_were_found_for_them() {
    let (float, _) = prepared(&network());
    let mut ranges = calibrated(&float);
    let shifts: Vec<f32> = (0..16).map(|i| i as f32 * 0.25 - 2.0).collect();
    ranges.shifts = [("a".into(), shifts.clone()), ("c".into(), vec![1.0; 3])].into();
    let plain = {
        let mut graph = float.clone();
        let ranges = Ranges { shifts: BiasShifts::new(), ..ranges.clone() };
        quantize(&mut graph, &ranges, &Options::default(), &mut |_, _| {}).unwrap();
        graph
    };
    let mut graph = float.clone();
    let report = quantize(&mut graph, &ranges, &Options::default(), &mut |_, _| {}).unwrap();
    let record = report.record("correct_means").unwrap();
    assert_eq!(record.applied, 1, "{report}");
    let declined: Vec<_> = record.of(NoteKind::Declined).collect();
    assert!(declined.len() == 1 && declined[0].node == "c", "{report}");
    let bias = |graph: &Graph, name: &str| {
        let bias = graph.operand(find(graph, name), 2);
        let constant = graph.constant_value(bias).is_some();
        let constant = if constant { bias } else { graph.operand(bias.node, 0) };
        graph.constant_value(constant).unwrap().as_slice::<f32>().unwrap().to_vec()
    };
    let expected: Vec<f32> = bias(&plain, "a").iter().zip(&shifts).map(|(b, s)| b + s).collect();
    assert_eq!((bias(&graph, "a"), bias(&graph, "c")), (expected, bias(&plain, "c")));
}
