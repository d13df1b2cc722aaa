//! The buffer plan.

use super::{check, compiled, placed, plain, tiers};
use crate::plan::Plan;
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, ValueId,
    ops::{Binary, BinaryKind, Slice, SliceSpec, Softmax, Unary, UnaryKind},
};

/// A graph of random sums and functions of earlier values, some of which are chained.
fn random_graph(choices: &[(u8, u8, u8)]) -> Graph {
    let mut g = Graph::new("random");
    let mut values: Vec<ValueId> = vec![g.input("x", plain(DType::F32, &[9, 1])).unwrap()];
    values.push(g.input("y", plain(DType::F32, &[1, 50])).unwrap());
    for (i, &(op, a, b)) in choices.iter().enumerate() {
        let (a, b) = (values[usize::from(a) % values.len()], values[usize::from(b) % values.len()]);
        let name = format!("n{i}");
        let y = match op % 4 {
            0 => g.add(&name, Binary { kind: BinaryKind::Add }, &[a, b]),
            1 => g.add(&name, Unary { kind: UnaryKind::Abs }, &[a]),
            2 => g.add(&name, Unary { kind: UnaryKind::Identity }, &[a]),
            _ => g.add(&name, Softmax { axis: 1, log: false }, &[a]),
        };
        values.push(y.unwrap().out());
    }
    for (i, v) in values.iter().rev().step_by(3).enumerate() {
        g.output(format!("o{i}"), *v);
    }
    g
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn live_values_never_overlap(choices in prop::collection::vec(any::<(u8, u8, u8)>(), 1..60)) {
        let plan = Plan::new(&placed(&random_graph(&choices))).unwrap();
        let buffers: Vec<_> = plan.buffers.values().collect();
        for (i, a) in buffers.iter().enumerate() {
            for b in &buffers[..i] {
                let together = a.first <= b.last && b.first <= a.last;
                let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                prop_assert!(!together || apart, "{a:?} {b:?}");
            }
        }
        // Never more than all at once, never less than the fullest moment.
        let all: u64 = buffers.iter().map(|b| b.bytes).sum();
        let at = |p: usize| buffers.iter().filter(|b| (b.first..=b.last).contains(&p)).map(|b| b.bytes).sum::<u64>();
        let fullest = (0..plan.order.len()).map(at).max().unwrap_or(0);
        prop_assert!((fullest..=all).contains(&plan.arena_bytes));
    }

    #[test]
    fn planned_graphs_compute_what_they_should(choices in prop::collection::vec(any::<(u8, u8, u8)>(), 1..20), seed: u64) {
        check(&random_graph(&choices), seed);
    }
}

#[test]
fn buffers_that_follow_each_other_have_one_middle() {
    // Sums over ever shorter rows: every value is smaller than the one before.
    let mut g = Graph::new("shrinking");
    let mut v = g.input("x", plain(DType::F32, &[512, 64])).unwrap();
    for i in 0..6 {
        let length = 512 >> (i + 1);
        let axes = [length, 64].map(|len| SliceSpec { start: 0, len, step: 1 }).to_vec();
        let part = Slice { axes };
        v = g.add(&format!("part{i}"), part, &[v]).unwrap().out();
        v = g.add(&format!("abs{i}"), Unary { kind: UnaryKind::Abs }, &[v]).unwrap().out();
    }
    g.output("y", v);
    let plan = Plan::new(&placed(&g)).unwrap();
    let middles: std::collections::BTreeSet<u64> =
        plan.buffers.values().map(|b| (b.offset + b.bytes / 2) / 128).collect();
    assert!(plan.buffers.len() > 6, "{:?}", plan.buffers);
    assert_eq!(middles.len(), 2, "{:?}", plan.buffers);
}

#[test]
fn a_chain_takes_two_buffers() {
    let mut g = Graph::new("chain");
    let mut v = g.input("x", plain(DType::F32, &[1000])).unwrap();
    for i in 0..20 {
        v = g.add(&format!("n{i}"), Softmax { axis: 0, log: false }, &[v]).unwrap().out();
    }
    g.output("y", v);
    let model = compiled(&placed(&g), tiers()[0]);
    assert_eq!(model.arena_bytes(), 2 * (4000u64 + 64).next_multiple_of(64));
}
