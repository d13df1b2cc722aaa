use crate::common::*;
use qcc_ir::ops::UnaryKind;
use qcc_passes::{Calibrator, Collector, Range, Ranges, observed_values};

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
    samples.iter().for_each(|s| collector.record(x, s));
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
        let reversed: Vec<_> = data.iter().rev().cloned().collect();
        assert_eq!(one, ranges(calibrator, &reversed));
        let mut halves = [(); 2].map(|()| Collector::new(&graph, calibrator));
        for (i, s) in data.iter().enumerate() {
            halves[i % 2].record(x, s);
        }
        let [mut first, second] = halves;
        first.merge(second);
        assert_eq!(one, first.finish());
        assert_eq!((one.samples, one.warnings.len()), (40, 0), "{:?}", one.warnings);
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
    let warned = |data: &[Vec<f32>], what: &str| {
        let r = ranges(Calibrator::MinMax, data);
        assert!(r.warnings.iter().any(|w| w.contains(what)), "{what}: {:?}", r.warnings);
    };
    warned(&samples(3), "only 3 calibration samples");
    warned(&vec![samples(1)[0].clone(); 10], "input `x`: 9 of 10 samples are copies of others");
    let mut constant = samples(10);
    constant[2] = vec![0.25; 64];
    warned(&constant, "1 of 10 samples are constant");
    let pixels: Vec<Vec<f32>> =
        samples(10).iter().map(|s| s.iter().map(|x| (x.abs() * 255.0).floor()).collect()).collect();
    warned(&pixels, "like pixels that were not normalised");
    let mut broken = samples(10);
    broken[0][0] = f32::NAN;
    broken[1][0] = f32::INFINITY;
    warned(&broken, "`x`: 2 of 640 elements are not finite");
    let range = ranges(Calibrator::MinMax, &broken).values["x"];
    assert!(range.min.is_finite() && range.max.is_finite());
}
