//! Reductions.

use crate::{
    DType, Shape, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Cast, Reduce, ReduceKind},
};

/// Axes counted from the back where negative, ascending; none may stand twice.
pub(super) fn axes(name: &str, shape: &Shape, axes: &[i64]) -> Result<Vec<usize>, NodeError> {
    let mut resolved = Vec::with_capacity(axes.len());
    for &a in axes {
        let axis = shape.axis(a);
        let axis = axis.ok_or_else(|| {
            NodeError::attribute(name, format!("has {a}, for a tensor of rank {}", shape.rank()))
        })?;
        resolved.push(axis);
    }
    resolved.sort_unstable();
    if resolved.windows(2).any(|w| w[0] == w[1]) {
        return Err(NodeError::attribute(name, format!("has an axis twice: {axes:?}")));
    }
    Ok(resolved)
}

/// `since`: the opset from which axes are an operand.
fn reduce(node: &mut Node<'_, '_>, kind: ReduceKind, since: i64) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "data")?;
    let shape = node.shape(x);
    let keep_dims = node.flag("keepdims", true)?;
    let given = node.ints_by_opset("axes", since, 1)?.unwrap_or_default();
    let empty_is_none = node.opset() >= since && node.flag("noop_with_empty_axes", false)?;
    let axes = match given.is_empty() && !empty_is_none {
        true => (0..shape.rank()).collect(),
        false => axes("axes", &shape, &given)?,
    };
    let reduce = Reduce { kind, axes, keep_dims };
    if node.ty(x).dtype != DType::Bool || !matches!(kind, ReduceKind::Max | ReduceKind::Min) {
        return node.emit(reduce, &[x]);
    }
    // Any and all, which opset 20 added, on 0 and 1.
    let numbers = node.emit_part("numbers", Cast { to: DType::U8 }, &[x])?;
    let y = node.emit_part("reduced", reduce, &[numbers])?;
    node.emit(Cast { to: DType::Bool }, &[y])
}

macro_rules! reductions {
    ($($name:ident: $kind:ident since $since:literal),* $(,)?) => {$(
        pub(super) fn $name(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            reduce(node, ReduceKind::$kind, $since)
        }
    )*};
}

reductions! {
    l1: L1 since 18,
    l2: L2 since 18,
    log_sum: LogSum since 18,
    log_sum_exp: LogSumExp since 18,
    max: Max since 18,
    mean: Mean since 18,
    min: Min since 18,
    product: Product since 18,
    sum: Sum since 13,
    sum_square: SumSquare since 18,
}
