//! Products of integers whose results are integers.

use super::{conv::window_and_groups, matmul::matmul_of, quantize::dynamically_quantized};
use crate::{
    DType, OpError, Shape, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Binary, BinaryKind, Cast, IntConv, PlainMatMul, Reshape},
};

/// (x − x_zero_point) convolved with (w − w_zero_point), in s32. Padding holds the zero point.
pub(super) fn conv_integer(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, w) = (node.operand(0, "x")?, node.operand(1, "w")?);
    let (x_zero, w_zero) = (node.optional(2), node.optional(3));
    let (window, groups) = window_and_groups(node, x, w)?;
    let x = centred(node, "x", x, x_zero, None)?;
    let w = centred(node, "w", w, w_zero, Some(0))?;
    node.emit(IntConv { window, groups }, &[x, w])
}

/// (A − a_zero_point)·(B − b_zero_point), in s32: zero points of all, of rows of A, of columns of B.
pub(super) fn matmul_integer(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let (a_zero, b_zero) = (node.optional(2), node.optional(3));
    product(node, "", a, b, a_zero, b_zero)
}

/// A·B of integers of 16 bits, in s32, or in u32 where neither has a sign.
pub(super) fn matmul_integer_16(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let wide = match [a, b].map(|v| node.ty(v).dtype) {
        [DType::U16, DType::U16] => DType::U32,
        [DType::S16 | DType::U16, DType::S16 | DType::U16] => DType::S32,
        _ => {
            let why = format!("takes integers of 16 bits, got {} and {}", node.ty(a), node.ty(b));
            return Err(OpError::dtype(why).into());
        }
    };
    let (a, b) = (node.cast_to("A_integers", wide, a)?, node.cast_to("B_integers", wide, b)?);
    matmul_of(node, "", a, b)
}

/// A product of integers, its scales and what is added, as floats: (A − a_zero_point)·(B − b_zero_point)·(a_scale·b_scale)
/// + bias.
pub(super) fn matmul_integer_to_float(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let (a_scale, b_scale) = (node.operand(2, "a_scale")?, node.operand(3, "b_scale")?);
    let (a_zero, b_zero, bias) = (node.optional(4), node.optional(5), node.optional(6));
    scaled_product(node, "", [a, b], [a_scale, b_scale], [a_zero, b_zero], bias)
}

/// MatMulIntegerToFloat of an A that is quantized by DynamicQuantizeLinear.
pub(super) fn dynamic_quantize_matmul(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let b_scale = node.operand(2, "b_scale")?;
    let (b_zero, bias) = (node.optional(3), node.optional(4));
    let [a, a_scale, a_zero] = dynamically_quantized(node, a)?;
    scaled_product(node, "", [a, b], [a_scale, b_scale], [Some(a_zero), b_zero], bias)
}

/// (A − a_zero)·(B − b_zero)·(a_scale·b_scale) + bias in floats, as a part of the node; the part `""` is its result.
pub(super) fn scaled_product(
    node: &mut Node<'_, '_>,
    part: &str,
    [a, b]: [ValueId; 2],
    [a_scale, b_scale]: [ValueId; 2],
    [a_zero, b_zero]: [Option<ValueId>; 2],
    bias: Option<ValueId>,
) -> Result<ValueId, NodeError> {
    let binary = |kind| Binary { kind };
    let sums = product(node, "sums", a, b, a_zero, b_zero)?;
    let a_scale = as_factor(node, "a", a_scale, a, None)?;
    let b_scale = as_factor(node, "b", b_scale, b, Some(-1))?;
    let steps = node.emit_part("steps", binary(BinaryKind::Mul), &[a_scale, b_scale])?;
    let sums = node.emit_part("numbers", Cast { to: DType::F32 }, &[sums])?;
    let emit = |node: &mut Node<'_, '_>, kind, operands: &[ValueId]| match part {
        "" => node.emit(binary(kind), operands),
        part => node.emit_part(part, binary(kind), operands),
    };
    let Some(bias) = bias else { return emit(node, BinaryKind::Mul, &[sums, steps]) };
    let y = node.emit_part("product", binary(BinaryKind::Mul), &[sums, steps])?;
    emit(node, BinaryKind::Add, &[y, bias])
}

/// A scale in the shape of a factor of the product: of all, or along its last axis (`axis` −1).
fn as_factor(
    node: &mut Node<'_, '_>,
    part: &str,
    scale: ValueId,
    of: ValueId,
    axis: Option<i64>,
) -> Result<ValueId, NodeError> {
    let at = axis.and_then(|a| node.ty(of).shape.axis(a));
    match (node.ty(scale).shape.elements(), at) {
        (1, _) => node.emit_part(&format!("{part}_factor"), Reshape { shape: Shape::scalar() }, &[scale]),
        (n, Some(at)) if n == node.ty(of).shape[at] => Ok(scale),
        _ => {
            let (scale, of) = (node.ty(scale), node.ty(of));
            Err(OpError::quant(format!("scales {scale} of {of}: one, or one a column of B")).into())
        }
    }
}

fn product(
    node: &mut Node<'_, '_>,
    part: &str,
    a: ValueId,
    b: ValueId,
    a_zero: Option<ValueId>,
    b_zero: Option<ValueId>,
) -> Result<ValueId, NodeError> {
    let [a_rank, b_rank] = [a, b].map(|v| node.ty(v).shape.rank());
    let a = centred(node, "a", a, a_zero, Some(if a_rank > 1 { -2 } else { -1 }))?;
    let b = centred(node, "b", b, b_zero, Some(-1))?;
    // As in MatMul, a vector is a row on the left and a column on the right.
    let a_shape = node.shape(a);
    let a = match a_rank {
        1 => node.emit_part("row", Reshape { shape: Shape::new([1, a_shape[0]])? }, &[a])?,
        _ => a,
    };
    let b_shape = node.shape(b);
    let b = match b_rank {
        1 => node.emit_part("column", Reshape { shape: Shape::new([b_shape[0], 1])? }, &[b])?,
        _ => b,
    };
    let name = if part.is_empty() { String::new() } else { format!("_{part}") };
    let name = format!("{}{name}", node.name());
    if a_rank != 1 && b_rank != 1 {
        return node.emit_named(&name, PlainMatMul {}, &[a, b]);
    }
    let y = node.emit_part("matrix", PlainMatMul {}, &[a, b])?;
    let mut dims = node.shape(y).to_vec();
    if b_rank == 1 {
        dims.pop();
    }
    if a_rank == 1 {
        dims.remove(dims.len() - if b_rank == 1 { 1 } else { 2 });
    }
    node.emit_named(&name, Reshape { shape: Shape::new(dims)? }, &[y])
}

/// Integers of 8 bits as s32, less their zero point: one for all, one for each index of `axis`, or of their rank and
/// broadcast.
fn centred(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    zero: Option<ValueId>,
    axis: Option<i64>,
) -> Result<ValueId, NodeError> {
    let ty = node.ty(x).clone();
    if !matches!(ty.dtype, DType::S8 | DType::U8) {
        return Err(OpError::dtype(format!("{part} must be s8 or u8, not {ty}")).into());
    }
    let wide = node.emit_part(&format!("{part}_integers"), Cast { to: DType::S32 }, &[x])?;
    let Some(zero) = zero else { return Ok(wide) };
    let zero_ty = node.ty(zero).clone();
    if zero_ty.dtype != ty.dtype {
        return Err(OpError::dtype(format!("the zero point of {part} {ty} is {zero_ty}")).into());
    }
    let mut dims = vec![1; ty.shape.rank()];
    let at = axis.and_then(|a| ty.shape.axis(a));
    let shape = match (zero_ty.shape.elements(), at) {
        (1, _) => Shape::scalar(),
        (n, Some(at)) if zero_ty.shape.rank() == 1 && n == ty.shape[at] => {
            dims[at] = n;
            Shape::new(dims)?
        }
        _ if ty.shape.broadcast(&zero_ty.shape).as_ref() == Some(&ty.shape) => zero_ty.shape,
        _ => return Err(OpError::shape(format!("zero points {zero_ty} of {part} {ty}")).into()),
    };
    let zero = node.emit_part(&format!("{part}_zeros"), Cast { to: DType::S32 }, &[zero])?;
    let zero = node.emit_part(&format!("{part}_zero"), Reshape { shape }, &[zero])?;
    node.emit_part(&format!("{part}_centred"), Binary { kind: BinaryKind::Sub }, &[wide, zero])
}
