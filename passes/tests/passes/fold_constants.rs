use crate::common::*;
use qcc_ir::{
    Shape, Tensor,
    ops::{BinaryKind, Expand, UnaryKind},
};
use qcc_passes::Options;

#[test]
fn ops_of_constants_become_constants_under_their_name() {
    let mut net = Net::new(1);
    let x = net.input("x", &[3]);
    let a = net.constant("a", &[3], vec![1.0, 2.0, 3.0]);
    let b = net.unary("neg", UnaryKind::Neg, a);
    let c = net.binary("sum", BinaryKind::Add, a, b);
    let c = net.binary("more", BinaryKind::Add, c, a);
    let y = net.binary("y", BinaryKind::Pow, x, c);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(applied(&report, "fold_constants"), 3);
    assert_eq!(after.len(), 3, "x, the constant, y");
    let folded = after.constant_value(find(&after, "more").out()).unwrap();
    assert_eq!(folded.as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0]);
}

#[test]
fn what_would_grow_beyond_the_limit_is_declined() {
    let mut net = Net::new(2);
    let x = net.input("x", &[100]);
    let c = net.graph.constant("c", Tensor::scalar(2f32));
    let c = net.op("expand", Expand { shape: Shape::new([100]).unwrap() }, &[c]);
    let y = net.binary("y", BinaryKind::Max, x, c);
    let graph = net.finish(y);
    let small = Options { fold_limit: 399, ..Options::default() };
    let (after, report) = prepared_with(&graph, &small);
    assert!(declined(&report, "fold_constants", "expand").contains("400 bytes is above the limit of 399"));
    assert_eq!(count(&after, "Expand"), 1);
    let (after, _) = prepared_with(&graph, &Options { fold_limit: 400, ..small });
    assert_eq!(count(&after, "Expand"), 0);
}

#[test]
fn an_op_that_fails_on_constants_stays_to_fail_when_run() {
    let mut net = Net::new(3);
    let a = net.graph.constant("a", Tensor::scalar(1i32));
    let zero = net.graph.constant("zero", Tensor::scalar(0i32));
    let y = net.binary("quotient", BinaryKind::Div, a, zero);
    let mut graph = net.finish(y);
    let report = qcc_passes::prepare(&mut graph, &Options::default(), &mut |_, _| {}).unwrap();
    assert!(declined(&report, "fold_constants", "quotient").contains("zero"));
}
