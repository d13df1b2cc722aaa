use crate::common::*;
use qcc_ir::ops::{BinaryKind, UnaryKind, Window};

#[test]
fn scalings_and_biases_join_the_product_before_them() {
    let mut net = Net::new(1);
    let x = net.input("x", &[2, 3, 5, 5]);
    let y = net.conv3x3("conv", x, 4, 1);
    let scale = net.random_constant("scale", &[1, 4, 1, 1], 2.0);
    let y = net.binary("mul", BinaryKind::Mul, scale, y);
    let bias = net.random_constant("bias", &[4, 1, 1], 1.0);
    let y = net.binary("sub", BinaryKind::Sub, y, bias);
    let two = net.random_constant("two", &[], 1.0);
    let y = net.binary("from", BinaryKind::Sub, two, y);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let y = net.reshape("flat", y, &[2, 100]);
    let y = net.matmul("fc", y, 6);
    let bias = net.random_constant("fc.bias", &[6], 1.0);
    let y = net.binary("fc.add", BinaryKind::Add, y, bias);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fold_affine"), 4, "{report}");
    assert_eq!(count(&after, "Binary"), 0);
}

#[test]
fn a_normalised_input_joins_an_unpadded_product_after_it() {
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 3, 8, 8]);
    let mean = net.random_constant("mean", &[3, 1, 1], 1.0);
    let y = net.binary("centre", BinaryKind::Sub, x, mean);
    let spread = net.constant("spread", &[1, 3, 1, 1], vec![0.2, 0.3, 2.0]);
    let y = net.binary("spread", BinaryKind::Div, y, spread);
    let y = net.conv("conv", y, 4, Window::new([4, 4]).strides([4, 4]), 1, true);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(count(&after, "Binary"), 0, "{report}");
}

#[test]
fn what_is_not_per_channel_stays() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 3, 5, 5]);
    let y = net.conv3x3("conv", x, 4, 1);
    let rows = net.random_constant("rows", &[5, 1], 1.0);
    let y = net.binary("rows.add", BinaryKind::Add, y, rows);
    let wider = net.random_constant("wider", &[2, 1, 1, 1], 1.0);
    let y = net.binary("wider.add", BinaryKind::Add, y, wider);
    let (after, report) = prepared(&net.finish(y));
    let why = declined(&report, "fold_affine", "rows.add");
    assert!(why.contains("not per channel of `conv`"), "{why}");
    assert_eq!(count(&after, "Binary"), 2);
}

#[test]
fn the_factor_of_scores_goes_to_the_queries() {
    let mut net = Net::new(30);
    let x = net.input("x", &[1, 6, 8]);
    let [q, k] = ["q", "k"].map(|name| net.matmul(name, x, 8));
    let heads = |net: &mut Net, name: &str, v, perm: &[usize]| {
        let v = net.reshape(&format!("{name}_heads"), v, &[1, 6, 2, 4]);
        net.transpose(&format!("{name}_t"), v, perm)
    };
    let (q, k) = (heads(&mut net, "q", q, &[0, 2, 1, 3]), heads(&mut net, "k", k, &[0, 2, 3, 1]));
    let y = net.product("scores", q, k);
    let c = net.constant("root", &[], vec![3.0]);
    let y = net.binary("scaled", BinaryKind::Div, y, c);
    let y = net.softmax("softmax", y);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!((count(&after, "Binary"), count(&after, "MatMul")), (0, 3), "{report}");
}
