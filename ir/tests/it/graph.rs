use crate::samples::{every_op, f32s};
use proptest::prelude::*;
use qcc_ir::{
    Graph, Kind, NodeId, TensorType, Use, ValueId, interpreter,
    ops::{Binary, BinaryKind, Reshape, Transpose, Unary, UnaryKind},
    text::print,
    verify,
};

fn relu() -> Unary {
    Unary { kind: UnaryKind::Relu }
}

fn sum() -> Binary {
    Binary { kind: BinaryKind::Add }
}

/// x → a → b → c, and d = a + c.
fn chain() -> (Graph, [ValueId; 5]) {
    let mut g = Graph::new("chain");
    let x = g.input("x", TensorType::f32(&[2, 3]).unwrap()).unwrap();
    let a = g.add("a", relu(), &[x]).unwrap().out();
    let b = g.add("b", relu(), &[a]).unwrap().out();
    let c = g.add("c", relu(), &[b]).unwrap().out();
    let d = g.add("d", sum(), &[a, c]).unwrap().out();
    g.output("y", d);
    (g, [x, a, b, c, d])
}

#[test]
fn names_are_unique_and_free_ones_are_found() {
    let mut g = Graph::new("names");
    for _ in 0..100 {
        g.constant("c", f32s(&[1], &[1.0]));
    }
    let names: std::collections::BTreeSet<&str> = g.nodes().map(|(_, n)| n.name.as_str()).collect();
    assert_eq!(names.len(), 100);
    assert!(names.contains("c") && names.contains("c_99"));
    let c = g.find("c_7").unwrap();
    g.rename(c, "c");
    assert!(g.node(c).name.starts_with("c_") && g.find(&g.node(c).name) == Some(c));
    g.rename(c, "fresh");
    assert_eq!((g.find("fresh"), g.find("c_100")), (Some(c), None));
}

#[test]
fn operands_keep_their_slots() {
    let (mut g, [x, a, b, c, d]) = chain();
    assert_eq!(g.operands(d.node), [a, c]);
    g.set_operand(d.node, 0, c).unwrap();
    assert_eq!(g.operands(d.node), [c, c]);
    assert_eq!(g.uses(c), [Use { node: d.node, slot: 0 }, Use { node: d.node, slot: 1 }]);
    g.set_operand(d.node, 1, x).unwrap();
    assert_eq!(g.operands(d.node), [c, x]);
    assert_eq!(g.sole_use(b), Some(Use { node: c.node, slot: 0 }));
    assert_eq!((g.sole_use(d), g.is_output(d)), (None, true));
    verify(&g).unwrap();
}

#[test]
fn cycles_are_refused_and_change_nothing() {
    let (mut g, [_, a, b, c, d]) = chain();
    let before = print(&g);
    for value in [b, c, d] {
        let e = g.set_operand(b.node, 0, value).unwrap_err();
        assert!(
            e.to_string().contains("node `b` (Unary)") && e.to_string().contains("depend on the node itself")
        );
        assert!(g.rewrite(b.node, sum(), &[a, value]).is_err());
    }
    assert!(g.set_operand(b.node, 1, a).unwrap_err().to_string().contains("no operand 1"));
    assert!(g.set_op(g.find("x").unwrap(), relu()).is_err());
    assert_eq!(print(&g), before);
    // Not cycles: what the node depends on already, and what stands beside it.
    g.set_operand(d.node, 1, b).unwrap();
    g.set_operand(d.node, 1, a).unwrap();
    verify(&g).unwrap();
}

#[test]
fn types_follow_edits_downstream() {
    let (mut g, [x, a, _, c, d]) = chain();
    g.rewrite(a.node, Transpose { perm: vec![1, 0] }, &[x]).unwrap();
    assert_eq!(g.ty(d), &TensorType::f32(&[3, 2]).unwrap());
    assert_eq!(g.ty(c), g.ty(d));
    verify(&g).unwrap();
    // A shape that the sum refuses, because its other operand keeps the old one.
    let e = g.set_op(g.find("c").unwrap(), Reshape { shape: qcc_ir::Shape::new([6]).unwrap() });
    assert!(e.is_err_and(|e| e.to_string().contains("do not broadcast") && e.to_string().contains("`d`")));
}

#[test]
fn an_op_is_put_behind_a_value_or_taken_away() {
    let (mut g, [x, a, b, c, d]) = chain();
    let f = g.add("f", Unary { kind: UnaryKind::Neg }, &[a]).unwrap().out();
    g.replace_all_uses(a, f).unwrap();
    assert_eq!((g.operands(f.node), g.operands(b.node), g.operands(d.node)), (vec![a], vec![f], vec![f, c]));
    g.replace_all_uses(f, x).unwrap();
    assert_eq!((g.operands(b.node), g.operands(d.node)), (vec![x], vec![x, c]));
    assert_eq!(g.remove_dead(), 2, "a and f");
    assert!(!g.contains(a.node) && g.find("f").is_none());
    g.replace_all_uses(d, c).unwrap();
    assert_eq!(g.outputs()[0].value, c);
    verify(&g).unwrap();
}

#[test]
fn a_value_that_depends_on_a_user_keeps_that_use() {
    let (mut g, [_, a, b, c, d]) = chain();
    // c depends on b, which uses a: b keeps a, d takes c for it.
    g.replace_all_uses(a, c).unwrap();
    assert_eq!((g.operands(b.node), g.operands(d.node)), (vec![a], vec![c, c]));
    verify(&g).unwrap();
}

#[test]
fn replacing_by_another_type_infers_every_user() {
    let (mut g, [x, a, _, _, d]) = chain();
    let t = g.add("t", Transpose { perm: vec![1, 0] }, &[x]).unwrap().out();
    g.replace_all_uses(a, t).unwrap();
    assert_eq!(g.ty(d), &TensorType::f32(&[3, 2]).unwrap());
    verify(&g).unwrap();
}

#[test]
fn inputs_survive_and_dead_nodes_do_not() {
    let (mut g, [x, ..]) = chain();
    let k = g.constant("k", f32s(&[1], &[1.0]));
    g.add("unused", sum(), &[x, k]).unwrap();
    assert_eq!(g.remove_dead(), 2);
    g.set_outputs(vec![]);
    assert_eq!((g.remove_dead(), g.len(), g.inputs().len()), (4, 1, 1));
}

#[test]
fn too_many_operands_are_refused() {
    let mut g = Graph::new("wide");
    let k = g.constant("k", f32s(&[1], &[1.0]));
    let concat = qcc_ir::ops::Concat { axis: 0 };
    let most = g.add("most", concat.clone(), &vec![k; 1 << 16]).unwrap();
    assert_eq!(g.shape(most.out()).dims(), [1 << 16]);
    assert_eq!(g.operands(most).len(), 1 << 16);
    assert!(g.add("more", concat, &vec![k; (1 << 16) + 1]).is_err());
}

#[test]
fn edits_of_large_graphs_take_linear_time() {
    // One value used by very many, and a long chain edited from end to end: minutes if any step were quadratic.
    let mut g = Graph::new("large");
    let x = g.input("x", TensorType::f32(&[1]).unwrap()).unwrap();
    let y = g.add("y", relu(), &[x]).unwrap().out();
    let users: Vec<NodeId> = (0..50_000).map(|_| g.add("user", relu(), &[y]).unwrap()).collect();
    let z = g.add("z", relu(), &[y]).unwrap().out();
    g.replace_all_uses(y, z).unwrap();
    g.replace_all_uses(z, x).unwrap();
    assert_eq!(g.uses(x).len(), 50_001, "the users and y");
    let mut at = x;
    let chain: Vec<ValueId> = (0..50_000)
        .map(|_| {
            at = g.add("link", relu(), &[at]).unwrap().out();
            at
        })
        .collect();
    g.output("end", at);
    for &v in &chain {
        let n = g.add("n", Unary { kind: UnaryKind::Neg }, &[v]).unwrap().out();
        g.replace_all_uses(v, n).unwrap();
    }
    for &v in &chain {
        let n = g.operand(v.node, 0);
        if let Kind::Op(_) = g.node(n.node).kind() {
            let before = g.operand(n.node, 0);
            g.set_operand(v.node, 0, before).unwrap();
        }
    }
    assert_eq!(g.remove_dead(), users.len() + 2 + chain.len() - 1);
    verify(&g).unwrap();
    // Removing what each edit left behind does not look at the rest.
    for &v in &chain[1..] {
        let k = g.add("sum", sum(), &[x, x]).unwrap().out();
        g.replace_all_uses(v, k).unwrap();
        g.replace_all_uses(k, v).unwrap();
        assert_eq!(g.remove_dead(), 1);
    }
    verify(&g).unwrap();
}

#[test]
fn the_order_depends_on_ids_alone() {
    let (mut g, [x, a, b, c, d]) = chain();
    // Relinking changes petgraph's lists, not the order.
    g.set_operand(d.node, 0, c).unwrap();
    g.set_operand(d.node, 0, a).unwrap();
    g.set_operand(b.node, 0, x).unwrap();
    assert_eq!(g.order(), [x.node, a.node, b.node, c.node, d.node]);
    assert_eq!(print(&every_op()), print(&every_op()));
}

proptest! {
    /// Random edits keep the invariants, or are refused for a cycle.
    #[test]
    fn random_edits_keep_the_graph_whole(edits in prop::collection::vec((0u8..4, any::<u16>(), any::<u16>()), 1..60)) {
        let mut g = Graph::new("random");
        let x = g.input("x", TensorType::f32(&[2]).unwrap()).unwrap();
        let mut values = vec![x];
        for _ in 0..4 {
            let v = g.add("n", sum(), &[values[values.len() / 2], *values.last().unwrap()]).unwrap().out();
            values.push(v);
        }
        for (kind, i, j) in edits {
            let (a, b) = (values[usize::from(i) % values.len()], values[usize::from(j) % values.len()]);
            match kind {
                0 => values.push(g.add("n", sum(), &[a, b]).unwrap().out()),
                1 if g.op(a.node).is_some() => {
                    let closes = g.reaches(a.node, b.node);
                    prop_assert_eq!(g.set_operand(a.node, usize::from(i) % 2, b).is_err(), closes);
                }
                2 => {
                    let kept: Vec<Use> = g.uses(a).into_iter().filter(|u| g.reaches(u.node, b.node)).collect();
                    g.replace_all_uses(a, b).unwrap();
                    if a != b {
                        prop_assert_eq!(g.uses(a), kept);
                    }
                }
                _ => {
                    g.set_outputs(vec![]);
                    g.output("y", a);
                    g.remove_dead();
                    let is_live = |n: NodeId| n == x.node || g.reaches(n, a.node);
                    prop_assert!(g.nodes().all(|(n, _)| is_live(n)));
                    prop_assert!(g.contains(a.node) && g.contains(x.node));
                    values.retain(|v| g.contains(v.node));
                }
            }
            verify(&g).unwrap();
        }
        g.set_outputs(vec![]);
        g.output("y", *values.last().unwrap());
        prop_assert!(interpreter::run(&g, &[f32s(&[2], &[1.0, 2.0])]).is_ok());
    }
}
