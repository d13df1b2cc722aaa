use crate::common::*;
use qcc_ir::ops::UnaryKind;
use qcc_passes::{Calibrator, Collector, Range, Ranges, Rule, Subject, observed_values};

fn net() -> (qcc_ir::Graph, qcc_ir::ValueId) {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 64]);
    let y = net.matmul("fc", x, 4);
    let y = net.unary("log", UnaryKind::Log, y);
    let y = net.softmax("softmax", y);
    (net.finish(y), x)
}

fn ranges(calibrator: Calibrator, samples: &[Vec<f32>]) -> Ranges {
    let (graph, x) = net();
    let mut collector = Collector::new(&graph, calibrator);
    (0..).zip(samples).for_each(|(i, s)| collector.record(x, i, s));
    collector.finish()
}

fn samples(n: usize) -> Vec<Vec<f32>> {
    let mut source = Net::new(9);
    (0..n).map(|_| (0..64).map(|_| source.random()).collect()).collect()
}

#[test]
fn what_is_observed_is_what_integer_ops_touch() {
    let (graph, x) = net();
    let names: Vec<&str> = observed_values(&graph).iter().map(|v| graph.node(v.node).name.as_str()).collect();
    assert_eq!(names, ["x", "fc"]);
    assert_eq!(Collector::new(&graph, Calibrator::MinMax).values().next(), Some(x));
}

#[test]
fn ranges_do_not_depend_on_order_or_split() {
    let (graph, x) = net();
    let data = samples(40);
    for calibrator in [Calibrator::MinMax, Calibrator::Percentile(99.0)] {
        let one = ranges(calibrator, &data);
        let mut reversed = Collector::new(&graph, calibrator);
        (0..40).rev().for_each(|i| reversed.record(x, i as u64, &data[i]));
        assert_eq!(one, reversed.finish());
        let mut halves = [(); 2].map(|()| Collector::new(&graph, calibrator));
        for (i, s) in data.iter().enumerate() {
            halves[i % 2].record(x, i as u64, s);
        }
        let [mut first, second] = halves;
        first.merge(second);
        assert_eq!(one, first.finish());
        assert_eq!((one.samples, one.findings.len()), (40, 0), "{:?}", one.findings);
    }
}

#[test]
fn a_percentile_leaves_outliers_out() {
    let mut data = samples(40);
    data[3][5] = 1000.0;
    let Range { min, max } = ranges(Calibrator::MinMax, &data).values["x"];
    assert!(min > -1.01 && max == 1000.0);
    let Range { min, max } = ranges(Calibrator::Percentile(99.9), &data).values["x"];
    assert!(min >= -1.01 && max < 3.0, "{min} {max}");
}

#[test]
fn suspicious_samples_are_named() {
    let found = |data: &[Vec<f32>], rule: Rule| -> String {
        let found = ranges(Calibrator::MinMax, data).findings;
        let of_rule: Vec<_> = found.iter().filter(|f| f.rule == rule).collect();
        assert_eq!(of_rule.len(), 1, "{rule}: {found:?}");
        of_rule[0].to_string()
    };
    assert!(found(&samples(3), Rule::SamplesTooFew).contains("only 3 calibration samples"));
    let mut copies = samples(10);
    copies[7] = copies[3].clone();
    copies[9] = copies[3].clone();
    let text = found(&copies, Rule::SamplesIdentical);
    assert!(
        text.contains(
            "`x`: 2 of 10 samples are copies of others, among them 7 (a copy of 3), 9 (a copy of 3);"
        ),
        "{text}"
    );
    let text = found(&vec![samples(1)[0].clone(); 10], Rule::SamplesIdentical);
    assert!(text.contains("9 of 10 samples"), "{text}");
    let mut constant = samples(10);
    constant[2] = vec![0.25; 64];
    let text = found(&constant, Rule::SamplesConstant);
    assert!(text.contains("1 of 10 samples are constant (all elements equal), among them 2;"), "{text}");
    let pixels: Vec<Vec<f32>> =
        samples(10).iter().map(|s| s.iter().map(|x| (x.abs() * 255.0).floor()).collect()).collect();
    assert!(found(&pixels, Rule::InputNotNormalised).contains("like pixels that were not normalised"));
    let large: Vec<Vec<f32>> = samples(10).iter().map(|s| s.iter().map(|x| x * 1e6).collect()).collect();
    assert!(found(&large, Rule::InputLarge).contains("larger than networks are usually trained on"));
    let mut broken = samples(10);
    broken[0][0] = f32::NAN;
    broken[4][0] = f32::INFINITY;
    let text = found(&broken, Rule::SamplesNotFinite);
    assert!(text.contains("`x`: 2 of 640 elements are not finite"), "{text}");
    assert!(text.contains("in 2 of 10 samples, among them 0, 4;"), "{text}");
    let range = ranges(Calibrator::MinMax, &broken).values["x"];
    assert!(range.min.is_finite() && range.max.is_finite());
    assert_eq!(ranges(Calibrator::MinMax, &samples(10)).findings, []);
}

#[test]
fn which_samples_are_named_does_not_depend_on_who_saw_them() {
    let (graph, x) = net();
    let mut data = samples(24);
    for (copy, of) in
        [(3, 20), (8, 20), (21, 20), (5, 4), (13, 12), (14, 12), (15, 12), (16, 12), (17, 12), (18, 12)]
    {
        data[copy] = data[of].clone();
    }
    let by = |parts: usize| {
        let mut collectors: Vec<Collector> =
            (0..parts).map(|_| Collector::new(&graph, Calibrator::MinMax)).collect();
        for (i, s) in data.iter().enumerate() {
            collectors[i * 7 % parts].record(x, i as u64, s);
        }
        let mut all = Collector::new(&graph, Calibrator::MinMax);
        collectors.into_iter().rev().for_each(|c| all.merge(c));
        all.finish().findings
    };
    let one = by(1);
    let Subject::Some { samples: named, .. } = &one[0].subject else { panic!("{one:?}") };
    let numbers: Vec<_> = named.iter().map(|s| (s.number, s.copy_of)).collect();
    let expected = [(5, 4), (8, 3), (13, 12), (14, 12), (15, 12), (16, 12), (17, 12), (18, 12)];
    assert_eq!(numbers, expected.map(|(n, of)| (n, Some(of))));
    for parts in [2, 3, 5] {
        assert_eq!(by(parts), one, "{parts} collectors");
    }
}

#[test]
fn pictures_that_were_normalised_twice_are_named() {
    let found = |twice: bool| -> Vec<Rule> {
        let mut net = Net::new(1);
        let x = net.input("x", &[1, 3, 8, 8]);
        let y = net.conv3x3("conv", x, 4, 1);
        let graph = net.finish(y);
        let mut collector = Collector::new(&graph, Calibrator::MinMax);
        let mut source = Net::new(9);
        for i in 0..10 {
            let once: Vec<f32> = (0..192).map(|_| source.random()).collect();
            let again: Vec<f32> = once.iter().map(|x| (x - 127.0) / 128.0).collect();
            collector.record(x, i, if twice { &again } else { &once });
        }
        collector.finish().findings.iter().map(|f| f.rule).collect()
    };
    assert_eq!((found(true), found(false)), (vec![Rule::InputNormalisedTwice], vec![]));
}
