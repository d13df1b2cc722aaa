//! Picks and updates of elements by the same index for all elements of a row are those of rows: what graph networks
//! are exported as.

use super::Did;
use crate::PassError;
use qcc_ir::{
    Graph, NodeId, Op, Shape, ValueId,
    ops::{Expand, Gather, Reshape, ScatterNd},
};

/// `ScatterElements` and `GatherElements` along the first axis by indices that were expanded over whole rows.
pub(super) fn rows(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let Some(op @ (Op::ScatterElements(_) | Op::GatherElements(_))) = graph.op(node).cloned() else {
        return Ok(None);
    };
    let operands = graph.operands(node);
    let Some(rows) = indices_of_rows(graph, operands[0], operands[1]) else { return Ok(None) };
    let count = graph.shape(rows).elements();
    let name = format!("{}_rows", graph.node(node).name);
    let mut shaped = |dims: &[usize]| -> Result<ValueId, PassError> {
        let shape = Shape::new(dims).map_err(|e| PassError::op(&name, "Reshape", e.into()))?;
        Ok(graph.add(&name, Reshape { shape }, &[rows])?.out())
    };
    match op {
        Op::ScatterElements(scatter) if scatter.axis == 0 => {
            let tuples = shaped(&[count, 1])?;
            graph.rewrite(node, ScatterNd { update: scatter.update }, &[operands[0], tuples, operands[2]])?;
            Ok(Some("elements that are updated by one index a row are rows"))
        }
        Op::GatherElements(gather) if gather.axis == 0 => {
            let indices = shaped(&[count])?;
            graph.rewrite(node, Gather { axis: 0 }, &[operands[0], indices])?;
            Ok(Some("elements that are picked by one index a row are rows"))
        }
        _ => Ok(None),
    }
}

/// The indices before they were expanded, one a row of data, if they were expanded over whole rows and nothing else.
fn indices_of_rows(graph: &Graph, data: ValueId, indices: ValueId) -> Option<ValueId> {
    let Some(Op::Expand(Expand { shape })) = graph.op(indices.node) else { return None };
    let from = graph.operand(indices.node, 0);
    let (all, own) = (graph.shape(data), graph.shape(from));
    let is_of_rows = shape.rank() > 1
        && shape.rank() == all.rank()
        && own.rank() == shape.rank()
        && own[0] == shape[0]
        && own[1..].iter().all(|&n| n == 1)
        && all[1..] == shape[1..];
    is_of_rows.then_some(from)
}
