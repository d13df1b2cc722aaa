//! Ops of constants are computed at compile time.

use crate::{
    Context, Pass, PassError, Record,
    edit::{live_op, replace},
};
use qcc_ir::{Graph, NodeId, Op, Stage, Tensor, TensorType};

/// See the module. Weights on a grid stay as they are: integer ops take the codes.
pub(crate) const FOLD_CONSTANTS: Pass = Pass {
    name: "fold_constants",
    run: |graph, ctx, record| {
        let is_rounded = |op: &Op| matches!(op, Op::FakeQuant(_) | Op::Dequantize(_));
        let is_kept = graph.stage == Stage::FakeQuant;
        fold(graph, ctx, record, |op| is_kept && is_rounded(op))
    },
};

/// See the module. Weights on a grid, too.
pub(crate) const FOLD_ROUNDED: Pass =
    Pass { name: "fold_constants", run: |graph, ctx, record| fold(graph, ctx, record, |_| false) };

fn fold(
    graph: &mut Graph,
    ctx: &Context<'_>,
    record: &mut Record,
    is_kept: impl Fn(&Op) -> bool,
) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(op) = live_op(graph, node).filter(|op| !is_kept(op)) else { continue };
        let operands = graph.operands(node);
        let values: Option<Vec<&Tensor>> = operands.iter().map(|&v| graph.constant_value(v)).collect();
        // No op has several results; one that had would be left as it is.
        let (Some(values), [result]) = (values, graph.node(node).outputs()) else {
            continue;
        };
        let name = graph.node(node).name.clone();
        let types: Vec<&TensorType> = operands.iter().map(|&v| graph.ty(v)).collect();
        let before: usize = types.iter().map(|t| t.bytes()).sum();
        // Numbers take more room than their codes, but a run would make the same ones each time.
        let is_conversion = matches!(op, Op::Dequantize(_));
        if result.bytes() > ctx.options.fold_limit.max(before) && !is_conversion {
            record.declined(
                &name,
                format!(
                    "its result of {} bytes is above the limit of {} and larger than its operands",
                    result.bytes(),
                    ctx.options.fold_limit
                ),
            );
            continue;
        }
        let result = result.clone();
        match op.eval(&values, &types, std::slice::from_ref(&result)) {
            Ok(mut tensors) => {
                let Some(tensor) = tensors.pop() else { continue };
                put(graph, node, &name, tensor, result)?;
                record.applied(&name, "computed at compile time");
            }
            // An op that fails on constants fails on every run: the run says so better, as nothing may depend on it.
            Err(why) => record.declined(&name, why.to_string()),
        }
    }
    Ok(())
}

/// Puts a constant in the place of a node, under its name.
fn put(graph: &mut Graph, node: NodeId, name: &str, tensor: Tensor, ty: TensorType) -> Result<(), PassError> {
    graph.rename(node, &format!("{name}_unfolded"));
    let constant = match ty.quant {
        Some(_) => graph.quantized_constant(name, tensor, ty)?,
        None => graph.constant(name, tensor),
    };
    replace(graph, node, constant)
}
