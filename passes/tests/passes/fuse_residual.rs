use crate::common::*;
use qcc_ir::{
    Op,
    ops::{BinaryKind, UnaryKind},
};

#[test]
fn the_later_product_takes_the_residual() {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 4, 5, 5]);
    let a = net.conv3x3("first", x, 4, 1);
    let b = net.conv1x1("second", x, 4);
    let y = net.binary("add", BinaryKind::Add, a, b);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let (after, report) = prepared(&net.finish(y));
    let Some(Op::Conv(c)) = after.op(find(&after, "second")) else { panic!("{report}") };
    assert!(c.residual && c.clamp.lo == 0.0);
    assert_eq!(after.nodes().filter(|(_, n)| n.op().is_some()).count(), 2);
}

#[test]
fn a_residual_that_depends_on_the_product_is_taken_by_the_other() {
    // x ─ conv ─ relu ─ other ─┐
    //        └───── add ───────┘: conv has two uses, other has one.
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 4, 5, 5]);
    let c = net.conv3x3("conv", x, 4, 1);
    let r = net.unary("tanh", UnaryKind::Tanh, c);
    let y = net.binary("add", BinaryKind::Add, c, r);
    let (after, report) = prepared(&net.finish(y));
    let why = declined(&report, "fuse_residual", "add");
    assert!(why.contains("`tanh` is no product") && why.contains("`conv` has other uses"), "{why}");
    assert_eq!(count(&after, "Binary"), 1);

    let mut net = Net::new(3);
    let x = net.input("x", &[1, 4, 5, 5]);
    let c = net.conv3x3("conv", x, 4, 1);
    let r = net.conv3x3("other", c, 4, 1);
    let y = net.binary("add", BinaryKind::Add, c, r);
    let (after, _) = prepared(&net.finish(y));
    assert_eq!(count(&after, "Binary"), 0, "`other` takes it");
}

#[test]
fn broadcasts_and_clamped_products_stay() {
    let mut net = Net::new(4);
    let x = net.input("x", &[1, 4, 5, 5]);
    let g = net.input("g", &[1, 4, 1, 1]);
    let c = net.conv3x3("conv", x, 4, 1);
    let y = net.binary("broadcast", BinaryKind::Add, c, g);
    let m = net.conv1x1("gate", g, 4);
    let y = net.binary("broadcast2", BinaryKind::Add, y, m);
    let (after, report) = prepared(&net.finish(y));
    for name in ["broadcast", "broadcast2"] {
        assert!(declined(&report, "fuse_residual", name).contains("another shape"), "{report}");
    }
    assert_eq!(count(&after, "Binary"), 2);
}

#[test]
fn matrix_products_take_residuals_too() {
    let mut net = Net::new(5);
    let x = net.input("x", &[3, 8]);
    let y = net.matmul("fc", x, 8);
    let y = net.binary("add", BinaryKind::Add, x, y);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(count(&after, "Binary"), 0, "{report}");
}
