//! Floats of 16 bits are computed with as f32: what is between ops is not rounded to 16 bits, which only inputs, outputs and
//! what a model keeps as such are.
//!
//! No CPU that qcc makes code for computes elements in 16 bits, so each op would widen its operands and round its result.
//! ONNX Runtime's CPU kernels leave that rounding out likewise (its `InsertCastTransformer`).

use crate::{
    Context, Pass, PassError, Record,
    edit::{is_move, live_op, replace},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, Tensor, TensorType, ValueId,
    ops::{Cast, PoolKind},
};

/// See the module.
pub(crate) const WIDEN_HALF: Pass = Pass { name: "widen_half", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        if live_op(graph, node).is_none() || ctx.options.pin(graph, node).is_some() {
            continue;
        }
        let name = graph.node(node).name.clone();
        if let Some(x) = unrounded(graph, node) {
            replace(graph, node, x)?;
            record.applied(&name, "reads what was not rounded to 16 bits");
        } else if widen(graph, node)? {
            record.applied(&name, "computes in f32");
        }
        graph.remove_dead();
    }
    Ok(())
}

fn is_half(ty: &TensorType) -> bool {
    matches!(ty.dtype, DType::F16 | DType::BF16)
}

/// The f32 that a value of 16 bits was rounded from.
fn source(graph: &Graph, value: ValueId) -> Option<ValueId> {
    let Some(Op::Cast(_)) = graph.op(value.node).filter(|_| is_half(graph.ty(value))) else { return None };
    let x = graph.operand(value.node, 0);
    (graph.ty(x).dtype == DType::F32).then_some(x)
}

/// The operand before it was rounded, of a conversion back to f32.
fn unrounded(graph: &Graph, node: NodeId) -> Option<ValueId> {
    match graph.op(node)? {
        Op::Cast(Cast { to: DType::F32 }) => source(graph, graph.operand(node, 0)),
        _ => None,
    }
}

/// Makes an op one of f32, whose result is rounded for who reads it in 16 bits. A move becomes one where all that it moves
/// was f32: tables and other values that are kept in 16 bits are moved as they are.
fn widen(graph: &mut Graph, node: NodeId) -> Result<bool, PassError> {
    let operands = graph.operands(node);
    let op = match graph.op(node) {
        Some(Op::Cast(_) | Op::AssumeGrid(_)) | None => return Ok(false),
        Some(op) => op.clone(),
    };
    let halves = operands.iter().filter(|&&v| is_half(graph.ty(v)));
    let has_sources = halves.clone().all(|&v| source(graph, v).is_some());
    let moves = is_move(&op) && !matches!(&op, Op::Pool(p) if p.kind == PoolKind::Max);
    let [ty] = graph.node(node).outputs() else { return Ok(false) };
    let ty = ty.clone();
    if halves.count() == 0 || moves && !has_sources {
        return Ok(false);
    }
    // What has no form in f32 stays as it is.
    let wide: Vec<TensorType> = operands.iter().map(|&v| widened(graph.ty(v))).collect();
    let Ok(results) = op.infer(&wide.iter().collect::<Vec<_>>()) else { return Ok(false) };
    if results != [widened(&ty)] {
        return Ok(false);
    }
    let name = graph.node(node).name.clone();
    let mut floats = Vec::with_capacity(operands.len());
    for (slot, v) in operands.into_iter().enumerate() {
        floats.push(as_f32(graph, &format!("{name}_wide{slot}"), v)?);
    }
    if !is_half(&ty) {
        graph.rewrite(node, op, &floats)?;
        return Ok(true);
    }
    let y = graph.add(&format!("{name}_wide"), op, &floats)?;
    graph.rewrite(node, Cast { to: ty.dtype }, &[y.out()])?;
    Ok(true)
}

fn widened(ty: &TensorType) -> TensorType {
    if is_half(ty) { TensorType::new(DType::F32, ty.shape.clone()) } else { ty.clone() }
}

/// A value in f32, where it has 16 bits.
fn as_f32(graph: &mut Graph, name: &str, value: ValueId) -> Result<ValueId, PassError> {
    if !is_half(graph.ty(value)) {
        return Ok(value);
    }
    if let Some(x) = source(graph, value) {
        return Ok(x);
    }
    if let Some(numbers) = graph.constant_value(value).and_then(Tensor::to_f32) {
        let shape = graph.shape(value).clone();
        if let Ok(tensor) = Tensor::from_vec(shape, numbers) {
            return Ok(graph.constant(name, tensor));
        }
    }
    Ok(graph.add(name, Cast { to: DType::F32 }, &[value])?.out())
}
