use crate::common::*;
use qcc_ir::{
    Op,
    ops::{BinaryKind, Clamp, PadMode, UnaryKind},
};

fn clamp_of(graph: &qcc_ir::Graph, name: &str) -> Clamp {
    match graph.op(find(graph, name)) {
        Some(Op::Conv(c)) => c.clamp,
        other => panic!("{other:?}"),
    }
}

#[test]
fn clamps_join_products_one_after_the_other() {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 3, 6, 6]);
    let y = net.conv3x3("conv", x, 4, 1);
    let y = net.unary("clip", UnaryKind::Clip { lo: -0.5, hi: 0.25 }, y);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fuse_clamp"), 2);
    assert_eq!(clamp_of(&after, "conv"), Clamp { lo: 0.0, hi: 0.25 });
    assert_eq!(count(&after, "Unary"), 0);
}

#[test]
fn clamps_pass_moves_that_they_commute_with() {
    let mut net = Net::new(2);
    let x = net.input("x", &[1, 3, 8, 8]);
    let y = net.conv3x3("conv", x, 4, 1);
    let y = net.max_pool("pool", y, 2);
    let y = net.transpose("transpose", y, &[0, 2, 3, 1]);
    let y = net.unary("relu", UnaryKind::Relu, y);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(count(&after, "Unary"), 0, "{report}");
    assert_eq!(clamp_of(&after, "conv"), Clamp::RELU);
}

#[test]
fn clamps_stop_where_they_would_change_more_or_less() {
    let mut net = Net::new(3);
    let x = net.input("x", &[1, 3, 6, 6]);
    let a = net.conv3x3("a", x, 4, 1);
    let p = net.pad("pad", a, 1, PadMode::Constant { value: 0.0 });
    let p = net.unary("above", UnaryKind::Clip { lo: 0.5, hi: 1.0 }, p);
    let b = net.conv3x3("b", x, 4, 1);
    let relu = net.unary("relu", UnaryKind::Relu, b);
    let s = net.binary("sum", BinaryKind::Mul, b, relu);
    let s = net.unary("outer", UnaryKind::Relu, s);
    net.graph.output("p", p);
    let (after, report) = prepared(&net.finish(s));
    for (name, reason) in [
        ("above", "`pad` is no product and does not let a clamp through"),
        ("relu", "the result of `b` has other uses"),
        ("outer", "`sum` is no product"),
    ] {
        let why = declined(&report, "fuse_clamp", name);
        assert!(why.contains(reason), "{why}");
    }
    assert_eq!(count(&after, "Unary"), 3);
}
