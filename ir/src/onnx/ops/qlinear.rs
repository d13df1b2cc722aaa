//! Ops on codes: what they mean, between a DequantizeLinear of each operand and a QuantizeLinear of the result. The
//! compiler makes integer ops of that, as it does where a model has these around float ops.

use super::{
    conv, matmul, norm, pool,
    quantize::{Grid, dequantized, quantized},
    reduce, shape,
};
use crate::{
    DType, OpError, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        Binary, BinaryKind, Concat, PoolKind, Reduce, ReduceKind, Reshape, Transpose, Unary, UnaryKind, Where,
    },
};

/// The codes in this slot, whose scale and zero point follow, as real numbers. `axis` is that of several scales.
fn real(
    node: &mut Node<'_, '_>,
    slot: usize,
    role: &'static str,
    axis: Option<i64>,
) -> Result<ValueId, NodeError> {
    let codes = node.operand(slot, role)?;
    let grid = Grid::at(node, slot + 1, slot + 2, axis)?;
    dequantized(node, &format!("{role}_dequantized"), codes, &grid, DType::F32)
}

/// Real numbers as codes of the grid whose scale is in this slot, and whose zero point follows; of type `dtype` where
/// there is no zero point.
fn codes(node: &mut Node<'_, '_>, y: ValueId, slot: usize, dtype: DType) -> Result<ValueId, NodeError> {
    let grid = Grid::at(node, slot, slot + 1, None)?;
    let dtype = grid.zero_point.map_or(dtype, |z| node.ty(z).dtype);
    quantized(node, "quantized", y, &grid, dtype, Some(DType::F32))
}

/// The type of the codes in this slot.
fn dtype(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<DType, NodeError> {
    let codes = node.operand(slot, role)?;
    Ok(node.ty(codes).dtype)
}

/// An s32 bias in steps of the product of these scales, as real numbers.
fn real_bias(
    node: &mut Node<'_, '_>,
    bias: ValueId,
    [a_scale, b_scale]: [ValueId; 2],
) -> Result<ValueId, NodeError> {
    if node.ty(bias).dtype != DType::S32 {
        return Err(OpError::dtype(format!("the bias must be s32, got {}", node.ty(bias))).into());
    }
    let one = |node: &mut Node<'_, '_>, part: &str, v: ValueId| match node.ty(v).shape.elements() {
        1 => node.emit_part(part, Reshape { shape: crate::Shape::scalar() }, &[v]),
        _ => Ok(v),
    };
    let a = one(node, "x_step", a_scale)?;
    let b = one(node, "w_step", b_scale)?;
    let scale = node.emit_part("bias_scale", Binary { kind: BinaryKind::Mul }, &[a, b])?;
    let grid = Grid { scale, zero_point: None, axis: Some(-1), block: 0 };
    dequantized(node, "bias", bias, &grid, DType::F32)
}

pub(super) fn conv(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    conv_of(node, false)
}

/// ONNX Runtime's own, whose input and result may be channels last.
pub(super) fn microsoft_conv(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let is_last = node.flag("channels_last", false)?;
    conv_of(node, is_last)
}

fn conv_of(node: &mut Node<'_, '_>, is_last: bool) -> Result<ValueId, NodeError> {
    let dtype = dtype(node, 0, "x")?;
    let (x, w) = (real(node, 0, "x", None)?, real(node, 3, "w", Some(0))?);
    let scales = [node.operand(1, "x_scale")?, node.operand(4, "w_scale")?];
    let bias = node.optional(8).map(|b| real_bias(node, b, scales)).transpose()?;
    let x = if is_last { channels_first(node, x)? } else { x };
    let y = conv::convolution(node, x, w, bias)?;
    let y = if is_last { channels_last(node, y)? } else { y };
    codes(node, y, 6, dtype)
}

/// From `[N, spatial…, C]` to `[N, C, spatial…]`.
fn channels_first(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId, NodeError> {
    let rank = spatial_rank(node, x)?;
    let perm = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    node.emit_part("channels_first", Transpose { perm }, &[x])
}

/// The opposite of [`channels_first`].
fn channels_last(node: &mut Node<'_, '_>, y: ValueId) -> Result<ValueId, NodeError> {
    let rank = spatial_rank(node, y)?;
    let perm = [0].into_iter().chain(2..rank).chain([1]).collect();
    node.emit_part("channels_last", Transpose { perm }, &[y])
}

fn spatial_rank(node: &Node<'_, '_>, x: ValueId) -> Result<usize, NodeError> {
    match node.ty(x).shape.rank() {
        rank if rank >= 3 => Ok(rank),
        _ => Err(OpError::shape(format!("takes batch, channels and space, got {}", node.ty(x))).into()),
    }
}

/// Scales of rows of a and of columns of b.
pub(super) fn matmul(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let dtype = dtype(node, 0, "a")?;
    let (a, b) = (real(node, 0, "a", Some(-2))?, real(node, 3, "b", Some(-1))?);
    let y = matmul::matmul_of(node, "", a, b)?;
    codes(node, y, 6, dtype)
}

/// alpha·A'·B' + C, of codes; C is s32 in steps of alpha·a_scale·b_scale. f32 where the result has no scale.
pub(super) fn gemm(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let dtype = dtype(node, 0, "A")?;
    let alpha = node.float("alpha", 1.0)?;
    let transposes_b = node.flag("transB", false)?;
    let a = real(node, 0, "A", None)?;
    let b = node.operand(3, "B")?;
    let mut b_grid = Grid::at(node, 4, 5, Some(if transposes_b { 0 } else { 1 }))?;
    if alpha != 1.0 {
        let alpha = node.constant_part("alpha", Tensor::scalar(alpha));
        b_grid.scale = node.emit_part("b_scale", Binary { kind: BinaryKind::Mul }, &[b_grid.scale, alpha])?;
    }
    let a_scale = node.operand(1, "a_scale")?;
    let b = dequantized(node, "B_dequantized", b, &b_grid, DType::F32)?;
    let c = node.optional(6).map(|c| real_bias(node, c, [a_scale, b_grid.scale])).transpose()?;
    let y = matmul::general_product(node, [a, b], c, 1.0, 1.0)?;
    match node.optional(7) {
        Some(_) => codes(node, y, 7, dtype),
        None => {
            node.optional(8);
            Ok(y)
        }
    }
}

fn binary(node: &mut Node<'_, '_>, kind: BinaryKind) -> Result<ValueId, NodeError> {
    let dtype = dtype(node, 0, "A")?;
    let (a, b) = (real(node, 0, "A", None)?, real(node, 3, "B", None)?);
    let y = node.emit(Binary { kind }, &[a, b])?;
    codes(node, y, 6, dtype)
}

pub(super) fn add(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    binary(node, BinaryKind::Add)
}

pub(super) fn mul(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    binary(node, BinaryKind::Mul)
}

/// Where the condition holds X, elsewhere Y.
pub(super) fn select(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let condition = node.operand(0, "condition")?;
    let dtype = dtype(node, 1, "X")?;
    let (x, y) = (real(node, 1, "X", None)?, real(node, 4, "Y", None)?);
    let z = node.emit(Where {}, &[condition, x, y])?;
    codes(node, z, 7, dtype)
}

fn unary(node: &mut Node<'_, '_>, kind: UnaryKind) -> Result<ValueId, NodeError> {
    let dtype = dtype(node, 0, "X")?;
    let x = real(node, 0, "X", None)?;
    let y = node.emit(Unary { kind }, &[x])?;
    codes(node, y, 3, dtype)
}

pub(super) fn sigmoid(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    unary(node, UnaryKind::Sigmoid)
}

pub(super) fn leaky_relu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 0.01)?;
    unary(node, UnaryKind::LeakyRelu { alpha })
}

/// As Softmax of the opset that the attribute names.
pub(super) fn softmax(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let opset = node.optional_int("opset")?.ok_or_else(|| NodeError::attribute("opset", "is missing"))?;
    let dtype = dtype(node, 0, "X")?;
    let x = real(node, 0, "X", None)?;
    let y = norm::softmax_of(node, x, false, opset < 13)?;
    codes(node, y, 3, dtype)
}

pub(super) fn average_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    pooled(node, pool::average_of)
}

pub(super) fn global_average_pool(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    pooled(node, |node, x| pool::global(node, x, PoolKind::Average { count_include_pad: false }))
}

fn pooled(
    node: &mut Node<'_, '_>,
    pool: impl Fn(&mut Node<'_, '_>, ValueId) -> Result<ValueId, NodeError>,
) -> Result<ValueId, NodeError> {
    let is_last = node.flag("channels_last", false)?;
    let dtype = dtype(node, 0, "X")?;
    let x = real(node, 0, "X", None)?;
    let x = if is_last { channels_first(node, x)? } else { x };
    let y = pool(node, x)?;
    let y = if is_last { channels_last(node, y)? } else { y };
    codes(node, y, 3, dtype)
}

pub(super) fn reduce_mean(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let keep_dims = node.flag("keepdims", true)?;
    let given = node.ints("axes")?;
    let dtype = dtype(node, 0, "data")?;
    let x = real(node, 0, "data", None)?;
    let shape = node.shape(x);
    let axes = match given {
        Some(given) => reduce::axes("axes", &shape, &given)?,
        None => (0..shape.rank()).collect(),
    };
    let y = node.emit(Reduce { kind: ReduceKind::Mean, axes, keep_dims }, &[x])?;
    codes(node, y, 3, dtype)
}

/// Scale and zero point of the result, then those of each part behind its codes.
pub(super) fn concat(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let slots = node.operand_slots();
    if slots < 5 || !(slots - 2).is_multiple_of(3) {
        let why = format!("{slots} operands; takes scale and zero point of the result and three a part");
        return Err(OpError::attribute(why).into());
    }
    let dtype = dtype(node, 2, "X")?;
    let mut parts = Vec::new();
    for slot in (2..slots).step_by(3) {
        parts.push(real(node, slot, "X", None)?);
    }
    let shape = node.shape(parts[0]);
    let axis = shape::axis(node, &shape, None)?;
    let y = match parts[..] {
        [only] => only,
        _ => node.emit(Concat { axis }, &parts)?,
    };
    codes(node, y, 0, dtype)
}
