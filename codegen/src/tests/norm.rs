//! Softmax, local response normalisation, reductions.

use super::{check, check_where_lowered, elementwise::dims, graph_of, plain, quantized};
use proptest::prelude::*;
use qcc_ir::{
    DType,
    ops::{Dequantize, Layout, Lrn, Normalize, Reduce, ReduceKind, Softmax},
};

const REDUCTIONS: [ReduceKind; 10] = [
    ReduceKind::Sum,
    ReduceKind::Mean,
    ReduceKind::Max,
    ReduceKind::Min,
    ReduceKind::Product,
    ReduceKind::SumSquare,
    ReduceKind::L1,
    ReduceKind::L2,
    ReduceKind::LogSum,
    ReduceKind::LogSumExp,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn softmaxes(d in dims(), axis in 0usize..4, log: bool, seed: u64) {
        prop_assume!(!d.is_empty());
        check(&graph_of(Softmax { axis: axis % d.len(), log }, &[plain(DType::F32, &d)]), seed);
    }

    /// Random bits are NaN somewhere in any long row, and then everywhere: these numbers are finite.
    #[test]
    fn softmaxes_of_finite_rows(rows in 1usize..30, len in 1usize..150, scale in -10f32..0.0, log: bool, seed: u64) {
        // From all of about one size to some that vanish.
        let codes = quantized(DType::U8, &[rows, len], scale.exp2(), 77);
        let mut g = graph_of(Dequantize {}, &[codes]);
        let x = g.outputs()[0].value;
        let y = g.add("softmax", Softmax { axis: 1, log }, &[x]).unwrap();
        g.output("softmax", y.out());
        check(&g, seed);
    }

    #[test]
    fn reductions_of_rows(rows in 1usize..30, len in 1usize..40, kind in 0usize..9, seed: u64) {
        let op = Reduce { kind: REDUCTIONS[kind], axes: vec![1], keep_dims: true };
        check(&graph_of(op, &[plain(DType::F32, &[rows, len])]), seed);
    }

    #[test]
    fn pixels(d in prop::collection::vec(1usize..40, 1..5), axis in 0usize..4, mean in -300f32..300.0, seed: u64) {
        let axis = axis % d.len();
        let each = |first: f32, step: f32| (0..d[axis]).map(|c| first + step * c as f32).collect();
        let op = Normalize { axis, mean: each(mean, 0.37), std: each(0.25, 0.61) };
        check(&graph_of(op, &[plain(DType::U8, &d)]), seed);
    }

    #[test]
    fn local_response_normalisations(
        d in prop::collection::vec(1usize..9, 3..5), c in 1usize..40, size in 1usize..8, last: bool, seed: u64,
    ) {
        let layout = if last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        let mut d = d;
        let axis = layout.channel_axis(d.len());
        d[axis] = c;
        let op = Lrn { size, alpha: 1e-2, beta: 0.75, bias: 1.0, layout };
        check(&graph_of(op, &[plain(DType::F32, &d)]), seed);
    }

    #[test]
    fn reductions(d in dims(), axes in any::<[bool; 4]>(), kind in 0usize..10, keep_dims: bool, seed: u64) {
        let axes = (0..d.len()).filter(|&a| axes[a]).collect();
        let op = Reduce { kind: REDUCTIONS[kind], axes, keep_dims };
        check_where_lowered(&graph_of(op, &[plain(DType::F32, &d)]), seed);
    }
}

#[test]
fn reductions_of_neighbouring_axes_are_lowered() {
    for kind in REDUCTIONS.into_iter().filter(|k| *k != ReduceKind::LogSumExp) {
        for axes in [vec![], vec![0], vec![1, 2], vec![3], vec![0, 1, 2, 3]] {
            let op = Reduce { kind, axes, keep_dims: false };
            check(&graph_of(op, &[plain(DType::F32, &[2, 5, 3, 7])]), 11);
        }
    }
}
