//! An addition of two activations becomes the residual of the convolution or matrix product that computes one of them.

use crate::{
    Context, Pass, PassError, Record,
    edit::{Sum, live_op, replace},
};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryKind},
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const FUSE_RESIDUAL: Pass = Pass { name: "fuse_residual", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    if ctx.options.interchange {
        return Ok(());
    }
    let order = graph.order();
    let position: BTreeMap<NodeId, usize> = order.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    for node in order {
        if !matches!(live_op(graph, node), Some(Op::Binary(Binary { kind: BinaryKind::Add }))) {
            continue;
        }
        let operands = graph.operands(node);
        let activation = |v: &ValueId| graph.constant_value(*v).is_none();
        if !operands.iter().all(activation) {
            continue;
        }
        let name = graph.node(node).name.clone();
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        let mut sides = vec![(operands[0], operands[1]), (operands[1], operands[0])];
        // The later producer: by then the other addend exists anyway.
        sides.sort_by_key(|(sum, _)| std::cmp::Reverse(position[&sum.node]));
        let mut reasons = Vec::new();
        let mut done = false;
        for (sum, residual) in sides {
            match takes(graph, node, sum, residual) {
                Ok(mut product) => {
                    *product.residual() = true;
                    let mut extended = graph.operands(sum.node);
                    extended.push(residual);
                    graph.rewrite(sum.node, product.op(), &extended)?;
                    replace(graph, node, sum)?;
                    record.applied(&name, format!("became the residual of `{}`", graph.node(sum.node).name));
                    done = true;
                    break;
                }
                Err(why) => reasons.push(why),
            }
        }
        if !done {
            record.declined(&name, reasons.join("; "));
        }
    }
    Ok(())
}

/// The product that computes `sum`, if it can add `residual` itself.
fn takes(graph: &Graph, add: NodeId, sum: ValueId, residual: ValueId) -> Result<Sum, String> {
    let name = &graph.node(sum.node).name;
    let mut product = Sum::of(graph, sum.node).ok_or(format!("`{name}` is no product"))?;
    if graph.ty(sum) != graph.ty(residual) {
        return Err(format!("`{name}` has another shape than what is added"));
    }
    if *product.residual() || !product.clamp().is_none() {
        return Err(format!("`{name}` has a residual or clamp already"));
    }
    if graph.sole_use(sum).is_none_or(|u| u.node != add) {
        return Err(format!("the result of `{name}` has other uses"));
    }
    if graph.reaches(sum.node, residual.node) {
        return Err(format!("what is added depends on `{name}`"));
    }
    Ok(product)
}
