use crate::common::*;
use qcc_ir::{
    DType, Graph, Op, Tensor, TensorType, interpreter,
    ops::{Binary, BinaryKind, Cast, Concat, Gather, Transpose, Unary, UnaryKind},
};
use qcc_passes::{Options, Report, prepare};

/// How many conversions to and from 16 bits a graph has.
fn casts(graph: &Graph) -> usize {
    graph.nodes().filter(|(_, n)| matches!(n.op(), Some(Op::Cast(_)))).count()
}

fn half(x: &Tensor, dtype: DType) -> Tensor {
    let mut g = Graph::new("half");
    let v = g.input("x", x.ty()).unwrap();
    let y = g.add("y", Cast { to: dtype }, &[v]).unwrap();
    g.output("y", y.out());
    interpreter::run(&g, std::slice::from_ref(x)).unwrap().remove(0)
}

#[test]
fn what_is_between_ops_is_not_rounded_to_16_bits() {
    for dtype in [DType::F16, DType::BF16] {
        let mut net = Net::new(7);
        let shape = Net::new(1).tensor(&[2, 3, 8, 8]).shape().clone();
        let x = net.graph.input("x", TensorType::new(dtype, shape)).unwrap();
        let factor = net.tensor(&[1, 3, 1, 1]);
        let factor = net.graph.constant("factor", half(&factor, dtype));
        let scaled = net.op("scaled", Binary { kind: BinaryKind::Mul }, &[x, factor]);
        let moved = net.op("moved", Transpose { perm: vec![0, 2, 3, 1] }, &[scaled]);
        let back = net.op("back", Transpose { perm: vec![0, 3, 1, 2] }, &[moved]);
        let both = net.op("both", Concat { axis: 1 }, &[scaled, back]);
        let y = net.max_pool("pool", both, 2);
        let y = net.op("activated", Unary { kind: UnaryKind::Tanh }, &[y]);
        let float = net.finish(y);
        let (after, report) = prepared_alone(&float);
        assert!(applied(&report, "widen_half") >= 4, "{report}");
        assert_eq!(casts(&after), 2, "{}", qcc_ir::text::print(&after));
        let input = half(&net_input(), dtype);
        let run = |g: &Graph| interpreter::run(g, std::slice::from_ref(&input)).unwrap()[0].clone();
        let (before, after) = (run(&float), run(&after));
        assert_eq!(after.dtype(), dtype);
        // Two roundings of 8 or 11 bits.
        let ulp = if dtype == DType::F16 { 1.0 / 1024.0 } else { 1.0 / 128.0 };
        for (a, b) in before.to_f32().unwrap().iter().zip(after.to_f32().unwrap()) {
            assert!((a - b).abs() <= ulp * (1.0 + a.abs()), "{a} became {b}");
        }
    }
}

/// Prepared, without a comparison: inputs are no f32.
fn prepared_alone(graph: &Graph) -> (Graph, Report) {
    let mut after = graph.clone();
    let report = prepare(&mut after, &Options::default(), &mut |_, _| {}).unwrap();
    (after, report)
}

fn net_input() -> Tensor {
    Net::new(9).tensor(&[2, 3, 8, 8])
}

#[test]
fn tables_in_16_bits_stay_as_they_are() {
    let mut net = Net::new(3);
    let table = net.tensor(&[50, 16]);
    let table = net.graph.constant("table", half(&table, DType::F16));
    let shape = net.tensor(&[4]).shape().clone();
    let rows = net.graph.input("rows", TensorType::new(DType::S64, shape)).unwrap();
    let picked = net.op("picked", Gather { axis: 0 }, &[table, rows]);
    let y = net.op("y", Unary { kind: UnaryKind::Exp }, &[picked]);
    let (after, report) = prepared_alone(&net.finish(y));
    let gather = find(&after, "picked");
    assert_eq!(after.ty(gather.out()).dtype, DType::F16, "{report}");
    assert_eq!(casts(&after), 2, "{report}");
}
