//! Additions, subtractions and multiplications of constants become part of the weights and bias next to them.

use crate::{
    Context, Pass, PassError, Record,
    affine::{Affine, Declined, Folded, fold_into_consumer, fold_into_producer},
    edit::{f32_constant, live_op, replace},
};
use qcc_ir::{Graph, NodeId, Op, ValueId, ops::BinaryKind};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const FOLD_AFFINE: Pass = Pass { name: "fold_affine", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let order = graph.order();
    let mut declined: BTreeMap<NodeId, String> = BTreeMap::new();
    // Forwards into what comes before, then backwards into what comes after: so that chains fold as a whole.
    for &node in &order {
        if let Some((x, affine)) = candidate(graph, ctx, node) {
            let folded = fold_into_producer(graph, x, &affine)?;
            if let Ok(into) = &folded
                && let Some(statistics) = ctx.batch_norms.borrow_mut().get_mut(into)
            {
                statistics.then(&affine);
            }
            if let Err(why) = settle(graph, node, x, folded, record)? {
                declined.insert(node, why);
            }
        }
    }
    for &node in order.iter().rev() {
        if let Some((x, affine)) = candidate(graph, ctx, node) {
            let folded = fold_into_consumer(graph, node.out(), &affine)?;
            if let Err(after) = settle(graph, node, x, folded, record)? {
                let before = declined.entry(node).or_default();
                *before = format!("before: {before}; after: {after}");
            }
        }
    }
    for (node, why) in declined.into_iter().filter(|(n, _)| graph.contains(*n)).collect::<Vec<_>>() {
        record.declined(&graph.node(node).name, why);
    }
    Ok(())
}

/// The node as an affine, if it is one that may go.
fn candidate(graph: &Graph, ctx: &Context<'_>, node: NodeId) -> Option<(ValueId, Affine)> {
    live_op(graph, node)?;
    if ctx.options.pin(graph, node).is_some() {
        return None;
    }
    affine_of(graph, node)
}

/// Removes a node that was folded.
fn settle(
    graph: &mut Graph,
    node: NodeId,
    x: ValueId,
    folded: Folded,
    record: &mut Record,
) -> Result<Result<(), Declined>, PassError> {
    Ok(match folded {
        Ok(into) => {
            let name = graph.node(node).name.clone();
            replace(graph, node, x)?;
            record.applied(&name, format!("folded into `{into}`"));
            Ok(())
        }
        Err(why) => Err(why),
    })
}

/// The node as an affine function of its one operand that is not constant, if it is one, per channel or as a whole.
fn affine_of(graph: &Graph, node: NodeId) -> Option<(ValueId, Affine)> {
    let Op::Binary(binary) = graph.op(node)? else {
        return None;
    };
    let operands = graph.operands(node);
    let (x, constant, reversed) = match (f32_constant(graph, operands[0]), f32_constant(graph, operands[1])) {
        (None, Some(_)) => (operands[0], operands[1], false),
        (Some(_), None) => (operands[1], operands[0], true),
        _ => return None,
    };
    let shape = graph.shape(x);
    if graph.shape(node.out()) != shape {
        return None;
    }
    let dims = graph.shape(constant);
    let lead = shape.rank() - dims.rank();
    let wide: Vec<usize> = (0..dims.rank()).filter(|&d| dims[d] != 1).collect();
    let axis = match wide[..] {
        [] => None,
        [d] => Some(lead + d),
        _ => return None,
    };
    let c: Vec<f64> = f32_constant(graph, constant)?.iter().map(|&x| x.into()).collect();
    let (ones, zeros) = (vec![1.0; c.len()], vec![0.0; c.len()]);
    let negated = || c.iter().map(|x| -x).collect();
    let (factor, shift) = match (binary.kind, reversed) {
        (BinaryKind::Add, _) => (ones, c),
        (BinaryKind::Mul, _) => (c, zeros),
        (BinaryKind::Sub, false) => (ones, negated()),
        (BinaryKind::Sub, true) => (vec![-1.0; c.len()], c),
        _ => return None,
    };
    Some((x, Affine { axis, factor, shift }))
}
