//! Which ops become integer ops.
//!
//! Candidates are the ops with an integer form. Convolutions and matrix products always gain, but for products of two
//! activations that multiply little. The others are cheap
//! either way, so that conversions at the borders decide: one of them turns float where that saves conversions, until
//! none does. What is then connected to no product stays float as a whole.

use crate::{
    Context, Layers, Options, Ranges, Record,
    calibrate::value_name,
    capability::{gains, int8_capability},
    classes::Classes,
    edit::{activations, has_weights},
    insert_fake_quant::{range_of, without_range},
};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryKind},
};
use std::collections::{BTreeMap, BTreeSet};

/// Why an op stays float that integers could compute.
const NO_RANGE: &str = "its codes need the ranges of samples";

/// The ops that become integer ops; every other op of floats is declined with its reason.
pub(crate) fn choose(graph: &Graph, ctx: &Context<'_>, record: &mut Record) -> BTreeSet<NodeId> {
    let mut refused: BTreeMap<NodeId, String> = BTreeMap::new();
    let mut chosen = BTreeSet::new();
    for (id, node) in graph.nodes().filter(|(_, n)| n.op().is_some()) {
        match int8_capability(graph, id) {
            _ if ctx.options.keeps_float(graph, id) => {
                let why = ctx
                    .options
                    .pin(graph, id)
                    .map_or("that is the policy".into(), |d| format!("pinned to {d}"));
                refused.insert(id, why);
            }
            // Pixels become codes, or another pass has said why not.
            Err(_) if matches!(node.op(), Some(Op::Normalize(_))) => {}
            // Ops of integers, such as shapes, were never candidates.
            Err(why) if node.outputs().iter().any(|t| t.dtype.is_float()) => {
                refused.insert(id, why);
            }
            Err(_) => {}
            Ok(()) => match without_range(graph, ctx, id) {
                Some(value) => {
                    refused.insert(id, format!("{NO_RANGE}, and has none of `{}`", value_name(graph, value)));
                }
                None => {
                    chosen.insert(id);
                }
            },
        }
    }
    let unseen = refused.values().filter(|why| why.starts_with(NO_RANGE)).count();
    if unseen > 0 {
        let why =
            format!("{unseen} ops stay float because samples have given no range of what they take or make");
        record.warning(&graph.name, why);
    }
    if matches!(ctx.options.layers, Layers::Only(_)) {
        return chosen;
    }
    let mut costly = drop_costly(graph, &mut chosen);
    let drowned: Vec<(NodeId, String)> =
        chosen.iter().filter_map(|&id| Some((id, drowned(graph, ctx, id)?))).collect();
    for (id, why) in drowned {
        chosen.remove(&id);
        refused.insert(id, why);
    }
    costly.extend(drop_costly(graph, &mut chosen));
    for id in costly {
        refused
            .insert(id, "its neighbours are float: converting for it would cost more than it gains".into());
    }
    for id in drop_idle(graph, &mut chosen) {
        let why =
            "no integer convolution or matrix product is connected to it: quantizing would gain nothing";
        refused.insert(id, why.into());
    }
    for (id, why) in refused {
        record.declined(&graph.node(id).name, format!("stays float: {why}"));
    }
    chosen
}

/// The nodes of a prepared graph that become integer ops on these ranges, in the order of execution.
pub fn int8_layers(graph: &Graph, ranges: &Ranges, options: &Options) -> Vec<NodeId> {
    let chosen = choose(graph, &Context::new(options, ranges), &mut Record::new("int8_layers"));
    graph.order().into_iter().filter(|node| chosen.contains(node)).collect()
}

/// Why a sum cannot be one of codes: a step of its grid holds all that one of its operands has to tell. So it is where
/// attention adds a mask, of 0 and a number that stands for −∞, to scores.
fn drowned(graph: &Graph, ctx: &Context<'_>, node: NodeId) -> Option<String> {
    let Op::Binary(Binary { kind: BinaryKind::Add | BinaryKind::Sub }) = graph.op(node)? else { return None };
    let extent = |v: ValueId| {
        let range = range_of(graph, ctx, v).ok()?;
        Some(f64::from(range.max) - f64::from(range.min))
    };
    let step = extent(node.out())? / 255.0;
    let is_lost = |v: &ValueId| extent(*v).is_some_and(|own| own > 0.0 && own < 2.0 * step);
    let lost = graph.operands(node).into_iter().find(is_lost)?;
    let name = &graph.node(lost.node).name;
    Some(format!("its steps would be about {step:.1e}, which is as much as `{name}` ranges over"))
}

/// Takes out cheap ops that cause more conversions (in elements) than they save; again while one goes, as the
/// neighbours of one that went have one float neighbour more. Those that went, by id.
fn drop_costly(graph: &Graph, chosen: &mut BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let mut dropped = BTreeSet::new();
    loop {
        let before = dropped.len();
        let cheap: Vec<NodeId> = chosen.iter().copied().filter(|&n| !gains(graph, n)).collect();
        for node in cheap {
            let mut values: BTreeSet<ValueId> =
                activations(graph, node).into_iter().map(|(_, v)| v).collect();
            values.insert(node.out());
            let cost = |chosen: &BTreeSet<NodeId>| -> usize {
                values.iter().map(|&v| conversions(graph, v, chosen)).sum()
            };
            let kept = cost(chosen);
            chosen.remove(&node);
            let dropped_cost = cost(chosen);
            if dropped_cost < kept || dropped_cost == kept && scales_or_shifts(graph, node) {
                dropped.insert(node);
            } else {
                chosen.insert(node);
            }
        }
        if dropped.len() == before {
            return dropped;
        }
    }
}

/// Whether a node multiplies by constants or adds them. Beside float ops that is part of what they do, and the numbers are
/// rounded once; in integers it would be rounded again.
fn scales_or_shifts(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.op(node), Some(Op::Binary(_)))
        && graph.operands(node).iter().any(|v| graph.constant_value(*v).is_some())
}

/// Elements converted between float and integer for the users of a value. A graph output is a float user.
fn conversions(graph: &Graph, value: ValueId, chosen: &BTreeSet<NodeId>) -> usize {
    if graph.constant_value(value).is_some() {
        return 0;
    }
    let made_as_integer = chosen.contains(&value.node);
    let users: Vec<bool> = graph.uses(value).iter().map(|u| chosen.contains(&u.node)).collect();
    // Sums of a product become floats or codes at the same price.
    let is_sum = matches!(graph.op(value.node), Some(Op::MatMul(_))) && has_weights(graph, value.node);
    let is_read_by_floats = !graph.is_output(value) && !users.contains(&true);
    if made_as_integer && is_sum && is_read_by_floats {
        return 0;
    }
    let output = graph.is_output(value).then_some(false);
    let differs = users.into_iter().chain(output).any(|integer| integer != made_as_integer);
    if differs { graph.shape(value).elements() } else { 0 }
}

/// Takes out connected regions without a product. Those that went, by id.
fn drop_idle(graph: &Graph, chosen: &mut BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let mut regions = Classes::new();
    for &id in chosen.iter() {
        regions.join(id, id);
        for (_, v) in activations(graph, id) {
            if chosen.contains(&v.node) {
                regions.join(id, v.node);
            }
        }
    }
    let paying: BTreeSet<NodeId> =
        chosen.iter().filter(|&&id| gains(graph, id)).map(|&id| regions.find(id)).collect();
    let (kept, idle) = chosen.iter().partition(|&&id| paying.contains(&regions.find(id)));
    *chosen = kept;
    idle
}
