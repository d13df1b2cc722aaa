use crate::common::*;
use qcc_ir::{
    Graph,
    ops::{BatchNorm, UnaryKind},
};
use qcc_passes::{Finding, Options, Precision, Rule, Subject, WeightGrid, prepare};

fn found_with(graph: &Graph, options: &Options) -> Vec<Finding> {
    prepare(&mut graph.clone(), options, &mut |_, _| {}).unwrap().findings
}

fn found(graph: &Graph) -> Vec<Finding> {
    found_with(graph, &Options::default())
}

fn rules(findings: &[Finding]) -> Vec<Rule> {
    findings.iter().map(|f| f.rule).collect()
}

/// Two products with batch norms behind them, of these variances.
fn with_variances(variances: [Vec<f32>; 2]) -> Graph {
    let mut net = Net::new(6);
    let mut y = net.input("x", &[1, 3, 4, 4]);
    for (i, variance) in variances.into_iter().enumerate() {
        let c = variance.len();
        y = net.conv1x1(&format!("conv{}", i + 1), y, c);
        let one = net.constant("one", &[c], vec![1.0; c]);
        let zero = net.constant("zero", &[c], vec![0.0; c]);
        let variance = net.constant("variance", &[c], variance);
        let operands = [y, one, zero, zero, variance];
        y = net.op(&format!("bn{}", i + 1), BatchNorm { epsilon: 1e-7, axis: 1 }, &operands);
    }
    net.finish(y)
}

#[test]
fn a_sound_network_has_no_findings() {
    let mut net = Net::new(1);
    let x = net.input("x", &[2, 6, 7, 7]);
    let y = net.conv3x3("conv1", x, 8, 1);
    let y = net.batch_norm("bn1", y, 1);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.conv3x3("conv2", y, 16, 1);
    let y = net.batch_norm("bn2", y, 1);
    let y = net.reshape("flat", y, &[2, 16 * 49]);
    let y = net.matmul("fc", y, 5);
    let graph = net.finish(y);
    assert_eq!(found(&graph), []);
    let per_tensor = Options { weights: WeightGrid::PerTensor, ..Options::default() };
    assert_eq!(found_with(&graph, &per_tensor), []);
}

#[test]
fn statistics_of_initialisation_are_named() {
    let fresh = || vec![1.0; 4];
    let all = found(&with_variances([fresh(), fresh()]));
    assert_eq!(rules(&all), [Rule::BatchNormNeverUpdated]);
    assert_eq!(all[0].subject, Subject::Model);
    assert!(all[0].to_string().contains("(bn1, bn2): the statistics were never updated"), "{}", all[0]);
    assert!(all[0].advice.contains("--reestimate-bn"));
    let one = found(&with_variances([fresh(), vec![1.0, 2.0, 0.7, 1.1]]));
    assert_eq!(
        (rules(&one), &one[0].subject),
        (vec![Rule::BatchNormNeverUpdated], &Subject::Node("bn1".into()))
    );
    // One step of training with a small momentum.
    let nearly = (0..16).map(|i| 0.995 + i as f32 / 4000.0).collect();
    assert_eq!(rules(&found(&with_variances([nearly, vec![3.0; 16]]))), [Rule::BatchNormNeverUpdated]);
    assert_eq!(found(&with_variances([vec![0.995, 1.004], vec![3.0, 4.0]])), []);
}

#[test]
fn variances_that_cannot_be_are_named() {
    let found = found(&with_variances([vec![1.5; 2], vec![-1.0, 2.0]]));
    assert_eq!(rules(&found), [Rule::BatchNormNotFinite; 2]);
    let text = found[0].to_string();
    assert!(text.starts_with("`bn2`: 1 of 2 channels has a variance that is not positive"), "{text}");
    assert!(found[1].what.contains("not finite"), "{}", found[1]);
}

#[test]
fn channels_that_explode_are_named_and_dead_ones_are_not() {
    let mut variances = vec![2.0, 1.5, 0.5, 3.0];
    assert_eq!(found(&with_variances([vec![1.5; 4], variances.clone()])), []);
    variances[2] = 1e-12;
    let exploding = found(&with_variances([vec![1.5; 4], variances.clone()]));
    assert_eq!(rules(&exploding), [Rule::BatchNormExploding]);
    let text = exploding[0].to_string();
    assert!(text.starts_with("`bn2`: 1 of 4 channels has a gain") && text.contains("channel 2"), "{text}");
    // A filter of nothing has a variance of nothing, and does no harm.
    let graph = with_variances([vec![1.5; 4], variances]);
    let weights = graph.constant_value(graph.operand(find(&graph, "conv2"), 1)).unwrap();
    let mut dead = weights.as_slice::<f32>().unwrap().to_vec();
    dead[2 * 4..3 * 4].fill(1e-9);
    let mut changed = graph.clone();
    let shape = weights.shape().clone();
    let tensor = qcc_ir::Tensor::from_vec(shape, dead).unwrap();
    let dead = changed.constant("dead", tensor);
    changed.set_operand(find(&graph, "conv2"), 1, dead).unwrap();
    assert_eq!(found(&changed), []);
}

/// One product of 8 channels of 64 weights, which are changed.
fn with_weights(change: impl Fn(&mut [f32])) -> Graph {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 64]);
    let tensor = net.tensor(&[64, 8]);
    let mut weights = tensor.as_slice::<f32>().unwrap().to_vec();
    change(&mut weights);
    let w = net.constant("w", &[64, 8], weights);
    let op = qcc_ir::ops::MatMul { bias: false, residual: false, clamp: qcc_ir::ops::Clamp::NONE };
    let y = net.op("fc", op, &[x, w]);
    net.finish(y)
}

#[test]
fn weights_that_are_no_numbers_are_counted() {
    let broken = found(&with_weights(|w| (w[3], w[100]) = (f32::NAN, f32::INFINITY)));
    assert_eq!(rules(&broken), [Rule::WeightsNotFinite]);
    assert!(broken[0].to_string().starts_with("`fc`: 2 of its weights are not finite"), "{}", broken[0]);
}

#[test]
fn outliers_are_named_where_they_cost_codes() {
    let scaled = |channel: usize, by: f32| {
        move |w: &mut [f32]| w.iter_mut().skip(channel).step_by(8).for_each(|x| *x *= by)
    };
    let per_tensor = Options { weights: WeightGrid::PerTensor, ..Options::default() };
    let graph = with_weights(scaled(5, 40.0));
    // A grid for each channel: nothing is lost.
    assert_eq!(found(&graph), []);
    let one = found_with(&graph, &per_tensor);
    assert_eq!(rules(&one), [Rule::WeightsOutlierChannels]);
    assert!(one[0].what.contains("channel 5") && one[0].what.contains("of 8 bits"), "{}", one[0]);
    assert_eq!(found_with(&with_weights(scaled(5, 8.0)), &per_tensor), []);
    // 64 weights whose largest is above 127/4 times their root mean square cannot be: with 64·8 in one channel they can.
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 4096]);
    let mut weights = net.tensor(&[4096, 2]).as_slice::<f32>().unwrap().to_vec();
    let smooth = net.constant("smooth", &[4096, 2], weights.clone());
    weights[2 * 77 + 1] = 200.0;
    let peaked = net.constant("peaked", &[4096, 2], weights);
    let op = qcc_ir::ops::MatMul { bias: false, residual: false, clamp: qcc_ir::ops::Clamp::NONE };
    let a = net.op("smooth_fc", op.clone(), &[x, smooth]);
    let b = net.op("peaked_fc", op, &[x, peaked]);
    net.graph.output("a", a);
    let graph = net.finish(b);
    let peaks = found(&graph);
    assert_eq!(
        (rules(&peaks), &peaks[0].subject),
        (vec![Rule::WeightsOutliers], &Subject::Node("peaked_fc".into()))
    );
    assert!(
        peaks[0].what.contains("1 of 2 channels has outliers") && peaks[0].what.contains("channel 1"),
        "{}",
        peaks[0]
    );
    // What does not become int8 loses nothing.
    assert_eq!(found_with(&graph, &Options { precision: Precision::Float, ..Options::default() }), []);
}

#[test]
fn dead_and_equal_channels_are_named_where_there_are_many() {
    let fill = |channels: std::ops::Range<usize>, of: Option<usize>| {
        move |w: &mut [f32]| {
            for row in w.chunks_exact_mut(8) {
                for c in channels.clone() {
                    row[c] = of.map_or(0.0, |of| row[of]);
                }
            }
        }
    };
    assert_eq!(found(&with_weights(fill(0..3, None))), []);
    let dead = found(&with_weights(fill(0..4, None)));
    assert_eq!(rules(&dead), [Rule::WeightsDeadChannels]);
    assert!(dead[0].what.starts_with("4 of 8 channels have no weights but zero"), "{}", dead[0]);
    assert_eq!(found(&with_weights(fill(0..1, Some(7)))), []);
    let copies = found(&with_weights(fill(0..3, Some(7))));
    assert_eq!(rules(&copies), [Rule::WeightsDuplicateChannels]);
    assert!(copies[0].what.starts_with("3 of 8 channels have the weights of another one"), "{}", copies[0]);
}

#[test]
fn what_is_allowed_is_not_told() {
    let graph = with_variances([vec![1.0; 4], vec![1.0; 4]]);
    let options =
        Options { allowed: [Rule::BatchNormNeverUpdated].into_iter().collect(), ..Options::default() };
    let report = prepare(&mut graph.clone(), &options, &mut |_, _| {}).unwrap();
    assert_eq!(report.findings, []);
    assert!(report.to_string().contains("batch-norm-never-updated is allowed"), "{report}");
}
