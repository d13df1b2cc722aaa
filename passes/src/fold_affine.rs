//! Additions, subtractions and multiplications of constants become part of the weights and bias next to them.

use crate::{
    Context, Pass, PassError, Record,
    affine::{Affine, fold_into_consumer, fold_into_producer},
    edit::{f32_constant, replace},
};
use qcc_ir::{Graph, NodeId, Op, ValueId, ops::BinaryKind};

/// See the module.
pub(crate) const FOLD_AFFINE: Pass = Pass { name: "fold_affine", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        // An earlier fold may have removed it.
        if !graph.contains(node) || ctx.options.pin(graph, node).is_some() {
            continue;
        }
        let Some((x, affine)) = affine_of(graph, node) else {
            continue;
        };
        let name = graph.node(node).name.clone();
        let folded = match fold_into_producer(graph, x, &affine)? {
            Ok(into) => Ok(into),
            Err(before) => fold_into_consumer(graph, node.out(), &affine)?
                .map_err(|after| format!("before: {before}; after: {after}")),
        };
        match folded {
            Ok(into) => {
                replace(graph, node, x)?;
                record.applied(&name, format!("folded into `{into}`"));
            }
            Err(why) => record.declined(&name, why),
        }
    }
    Ok(())
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
