use crate::common::*;
use qcc_ir::ops::{BatchNorm, PadMode, UnaryKind, Window};

#[test]
fn folds_into_the_product_before_it() {
    let mut net = Net::new(1);
    let x = net.input("x", &[2, 6, 7, 7]);
    let y = net.conv3x3("plain", x, 8, 1);
    let y = net.batch_norm("bn1", y, 1);
    let window = Window::new([3, 3]).pads([1, 1], [1, 1]);
    let y = net.conv("grouped", y, 12, window, 4, true);
    let y = net.batch_norm("bn2", y, 1);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.reshape("flat", y, &[2, 588]);
    let y = net.matmul("fc", y, 5);
    let y = net.batch_norm("bn3", y, 1);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fold_batch_norm"), 3, "{report}");
    assert_eq!((count(&after, "BatchNorm"), count(&after, "Binary")), (0, 0));
}

#[test]
fn folds_into_the_product_after_it_where_padding_allows() {
    let mut net = Net::new(2);
    let x = net.input("x", &[2, 6, 7, 7]);
    let y = net.batch_norm("bn1", x, 1);
    let y = net.conv("grouped", y, 4, Window::new([3, 3]), 2, false);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.reshape("flat", y, &[2, 100]);
    let y = net.batch_norm("bn2", y, 1);
    let y = net.matmul("fc", y, 5);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fold_batch_norm"), 2, "{report}");
    assert_eq!((count(&after, "BatchNorm"), count(&after, "Binary")), (0, 0));
}

#[test]
fn zeros_of_a_padding_are_not_shifted() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 3, 6, 6]);
    let y = net.batch_norm("bn", x, 1);
    let y = net.conv3x3("conv", y, 4, 1);
    let (after, report) = prepared(&net.finish(y));
    let why = declined(&report, "fold_batch_norm", "bn");
    assert!(why.contains("`conv` sees zeros in its padding, not the shift"), "{why}");
    assert_eq!((count(&after, "BatchNorm"), count(&after, "Binary")), (0, 2));
}

#[test]
fn a_norm_that_only_scales_folds_through_padding() {
    let mut net = Net::new(4);
    let x = net.input("x", &[1, 2, 6, 6]);
    let [zero, variance] = [vec![0.0; 2], vec![0.25, 4.0]].map(|v| net.constant("c", &[2], v));
    let scale = net.constant("scale", &[2], vec![3.0, -0.5]);
    let y = net.op("bn", BatchNorm { epsilon: 1e-3, axis: 1 }, &[x, scale, zero, zero, variance]);
    let y = net.pad("pad", y, 2, PadMode::Constant { value: 0.0 });
    let y = net.conv3x3("conv", y, 4, 1);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fold_batch_norm"), 1, "{report}");
    assert_eq!(after.nodes().filter(|(_, n)| n.op().is_some()).count(), 1, "{report}");
}

#[test]
fn a_product_with_other_users_keeps_its_weights() {
    let mut net = Net::new(5);
    let x = net.input("x", &[1, 3, 6, 6]);
    let c = net.conv3x3("conv", x, 4, 1);
    let y = net.batch_norm("bn", c, 1);
    net.graph.output("raw", c);
    let (after, report) = prepared(&net.finish(y));
    assert!(declined(&report, "fold_batch_norm", "bn").contains("the result of `conv` has other uses"));
    assert_eq!(count(&after, "Binary"), 2);
}

#[test]
fn parameters_that_the_model_computes_are_used_as_they_come() {
    let mut net = Net::new(7);
    let x = net.input("x", &[2, 3, 4, 4]);
    let p = net.input("p", &[3]);
    let p = net.unary("positive", UnaryKind::Exp, p);
    let y = net.op("bn", BatchNorm { epsilon: 1e-5, axis: 1 }, &[x, p, p, p, p]);
    let (after, report) = prepared(&net.finish(y));
    assert!(declined(&report, "fold_batch_norm", "bn").contains("not constant"));
    assert_eq!(count(&after, "BatchNorm"), 0);
}
