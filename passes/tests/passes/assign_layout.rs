use crate::common::*;
use qcc_ir::{
    Graph, Op,
    ops::{BinaryKind, Layout, PadMode, Reduce, ReduceKind, Slice, SliceSpec, Softmax, UnaryKind},
};
use qcc_passes::{Options, Precision, Report};

/// The float graph in its layout, which must compute what it did.
fn laid_out(graph: &Graph) -> (Graph, Report) {
    let options = Options { precision: Precision::Float, ..Options::default() };
    let (_, placed, report) = compiled(graph, &options);
    assert_same(graph, &placed);
    (placed, report)
}

#[test]
fn everything_between_convolutions_follows_them() {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 3, 8, 8]);
    let y = net.conv3x3("conv", x, 6, 1);
    let y = net.unary("tanh", UnaryKind::Tanh, y);
    let per_channel = net.random_constant("c", &[6, 1, 1], 1.0);
    let y = net.binary("max", BinaryKind::Max, per_channel, y);
    let rows = net.random_constant("rows", &[8, 1], 1.0);
    let y = net.binary("rows.min", BinaryKind::Min, y, rows);
    let y = net.pad("pad", y, 1, PadMode::Reflect);
    let mut axes = [1, 6, 10, 10].map(SliceSpec::all);
    axes[1] = SliceSpec { start: 1, len: 3, step: 2 };
    axes[2] = SliceSpec { start: 9, len: 5, step: -2 };
    let s = net.op("slice", Slice { axes: axes.to_vec() }, &[y]);
    let s = net.concat("concat", &[s, s], 1);
    let s = net.op("softmax", Softmax { axis: 1, log: false }, &[s]);
    let m = net.op("max_row", Reduce { kind: ReduceKind::Max, axes: vec![2], keep_dims: true }, &[s]);
    let s = net.binary("sub", BinaryKind::Sub, s, m);
    let y = net.conv3x3("last", s, 2, 1);
    let (after, report) = laid_out(&net.finish(y));
    assert_eq!(count(&after, "Transpose"), 2, "at input and output\n{report}");
    for (_, node) in after.nodes() {
        if let Some(Op::Conv(c)) = node.op() {
            assert_eq!(c.layout, Layout::ChannelsLast);
        }
    }
}

#[test]
fn transposes_of_the_model_cancel() {
    let mut net = Net::new(2);
    let x = net.input("nhwc", &[1, 6, 6, 3]);
    let y = net.transpose("in", x, &[0, 3, 1, 2]);
    let y = net.conv3x3("conv", y, 4, 1);
    let y = net.unary("tanh", UnaryKind::Tanh, y);
    let y = net.transpose("out", y, &[0, 2, 3, 1]);
    let (after, report) = laid_out(&net.finish(y));
    assert_eq!(count(&after, "Transpose"), 0, "{report}");
}

#[test]
fn pooled_features_are_reshaped_not_transposed() {
    let mut net = Net::new(3);
    let x = net.input("x", &[2, 1, 6, 6]);
    let y = net.conv3x3("conv", x, 16, 1);
    let y = net.spatial_mean("mean", y);
    let y = net.matmul("fc", y, 3);
    let (after, report) = laid_out(&net.finish(y));
    assert_eq!(count(&after, "Transpose"), 0, "{report}");
    assert_eq!(count(&after, "Reshape"), 2, "{report}");
}

#[test]
fn a_flattening_moves_the_rows_of_the_weights_instead() {
    let mut net = Net::new(4);
    let x = net.input("x", &[2, 1, 6, 6]);
    let y = net.conv3x3("conv", x, 4, 2);
    let y = net.reshape("flat", y, &[2, 36]);
    let y = net.matmul("fc", y, 5);
    let graph = net.finish(y);
    let (after, report) = laid_out(&graph);
    assert_eq!(count(&after, "Transpose"), 0, "{report}");
    // The same through fake-quantized weights.
    let (fake, placed, report) = compiled(&graph, &Options::default());
    assert_eq!(count(&placed, "Transpose"), 0, "{report}");
    let x = inputs(&graph, 5);
    assert!(distance(&run(&fake, &x), &run(&placed, &x)) < 0.02);
}

#[test]
fn what_needs_the_old_order_gets_a_transpose_and_the_record_says_so() {
    let mut net = Net::new(5);
    let x = net.input("x", &[2, 1, 6, 6]);
    let y = net.conv3x3("conv", x, 4, 1);
    let y = net.reshape("rows", y, &[8, 36]);
    let m = net.op("sum", Reduce { kind: ReduceKind::Sum, axes: vec![1], keep_dims: false }, &[y]);
    let (after, report) = laid_out(&net.finish(m));
    assert_eq!(count(&after, "Transpose"), 1);
    assert!(declined(&report, "assign_layout", "conv_transposed").contains("2x6x6x4 by [0, 3, 1, 2]"));
}

#[test]
fn reductions_that_drop_axes_keep_track_of_the_others() {
    for axes in [vec![0], vec![1], vec![3], vec![1, 3], vec![0, 2], vec![2]] {
        let mut net = Net::new(6);
        let x = net.input("x", &[2, 3, 5, 7]);
        let y = net.conv1x1("conv", x, 4);
        let y = net.op("sum", Reduce { kind: ReduceKind::Sum, axes, keep_dims: false }, &[y]);
        let y = net.unary("tanh", UnaryKind::Tanh, y);
        laid_out(&net.finish(y));
    }
}

#[test]
fn residuals_of_another_layout_are_converted() {
    let mut net = Net::new(7);
    let x = net.input("x", &[1, 4, 6, 6]);
    let y = net.conv3x3("conv", x, 4, 1);
    let r = net.input("r", &[1, 4, 6, 6]);
    let y = net.binary("add", BinaryKind::Add, r, y);
    let scalar = net.random_constant("scalar", &[1], 1.0);
    let y = net.binary("pow", BinaryKind::Max, y, scalar);
    let (after, report) = laid_out(&net.finish(y));
    assert_eq!(count(&after, "Transpose"), 3, "{report}");
}
