//! Matrix products.

use super::elementwise::{binary_part, cast_part};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        Binary, BinaryKind, Clamp, Dequantize, Determinant, Expand, MatMul, Op, PlainMatMul, Reshape,
        Transpose,
    },
};

/// alpha·A'·B' + beta·C. The factors go into constants where B and C are; a vector C becomes the bias.
pub(super) fn gemm(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let c = node.optional(2);
    let (alpha, beta) = (node.float("alpha", 1.0)?, node.float("beta", 1.0)?);
    general_product(node, [a, b], c, alpha, beta)
}

/// alpha·A'·B' + beta·C of these values; what is transposed is an attribute of the node.
pub(super) fn general_product(
    node: &mut Node<'_, '_>,
    [a, b]: [ValueId; 2],
    c: Option<ValueId>,
    alpha: f32,
    beta: f32,
) -> Result<ValueId, NodeError> {
    let (trans_a, trans_b) = (node.flag("transA", false)?, node.flag("transB", false)?);
    // C broadcasts as it has since, and where it does, the attribute says so, too.
    if node.opset() < 7 {
        node.ignore(&["broadcast"]);
    }
    let dtype = node.ty(a).dtype;
    if dtype != DType::F32 {
        let [a, b] = [wide(node, "A", a)?, wide(node, "B", b)?];
        let c = c.map(|c| wide(node, "C", c)).transpose()?;
        let a = if trans_a { transpose(node, a)? } else { a };
        let b = if trans_b { transpose(node, b)? } else { b };
        let y = product_of(node, "product", a, b)?;
        let mut y = scaled_by(node, "scaled", y, alpha)?;
        if let Some(c) = c {
            let c = scaled_by(node, "C_scaled", c, beta)?;
            y = binary_part(node, "sum", BinaryKind::Add, y, c)?;
        }
        return cast_part(node, "narrow", y, dtype);
    }
    for m in [a, b] {
        if node.ty(m).shape.rank() != 2 {
            return Err(OpError::shape(format!("takes matrices, got {}", node.ty(m))).into());
        }
    }
    let a = if trans_a { transpose(node, a)? } else { a };
    let mut b = if trans_b { transpose(node, b)? } else { b };
    let scales_weights = alpha != 1.0 && node.constant_value(b).is_some();
    if scales_weights {
        let name = node.name_of(b);
        b = scale(node, &format!("{name}_scaled"), b, alpha)?;
    }
    let c = match c {
        Some(c) if beta != 1.0 => Some(scale(node, &format!("{}_scaled", node.name_of(c)), c, beta)?),
        c => c,
    };
    let scales_result = alpha != 1.0 && !scales_weights;
    let columns = node.ty(b).shape[1];
    let bias = match c {
        Some(c) if !scales_result => as_bias(node, c, columns)?,
        _ => None,
    };
    let product = MatMul { bias: bias.is_some(), residual: false, clamp: Clamp::NONE };
    let operands: Vec<ValueId> = [a, b].into_iter().chain(bias).collect();
    let added = c.filter(|_| bias.is_none());
    if !scales_result && added.is_none() {
        return node.emit(product, &operands);
    }
    let mut y = node.emit_part("product", product, &operands)?;
    if scales_result {
        let name = format!("{}_alpha", node.name());
        y = scale(node, &name, y, alpha)?;
    }
    let Some(c) = added else { return Ok(y) };
    let shape = node.shape(y);
    if shape.broadcast(&node.ty(c).shape).as_ref() != Some(&shape) {
        let why = format!("C {} does not broadcast to the product {}", node.ty(c), node.ty(y));
        return Err(OpError::shape(why).into());
    }
    node.emit(Binary { kind: BinaryKind::Add }, &[y, c])
}

/// f16 and bf16 as f32, in which they are computed; other types as they are.
fn wide(node: &mut Node<'_, '_>, part: &str, x: ValueId) -> Result<ValueId, NodeError> {
    match node.ty(x).dtype {
        DType::F16 | DType::BF16 => cast_part(node, &format!("{part}_wide"), x, DType::F32),
        _ => Ok(x),
    }
}

/// What multiplies matrices of this type.
fn product_op(dtype: DType) -> Op {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => {
            MatMul { bias: false, residual: false, clamp: Clamp::NONE }.into()
        }
        _ => PlainMatMul {}.into(),
    }
}

/// The product of matrices of any type.
pub(super) fn product_of(
    node: &mut Node<'_, '_>,
    part: &str,
    a: ValueId,
    b: ValueId,
) -> Result<ValueId, NodeError> {
    node.emit_part(part, product_op(node.ty(a).dtype), &[a, b])
}

/// The value times a factor of its own type.
fn scaled_by(node: &mut Node<'_, '_>, part: &str, x: ValueId, factor: f32) -> Result<ValueId, NodeError> {
    if factor == 1.0 {
        return Ok(x);
    }
    let dtype = node.ty(x).dtype;
    if dtype.is_integer() && factor.fract() != 0.0 {
        return Err(OpError::unsupported(format!("scales {dtype} by {factor}")).into());
    }
    let factor = node.constant_part(&format!("{part}_factor"), Tensor::scalar(factor));
    let factor = cast_part(node, &format!("{part}_factor_cast"), factor, dtype)?;
    binary_part(node, part, BinaryKind::Mul, x, factor)
}

/// C as a vector of one element a column, where it is one row for all or one number.
fn as_bias(node: &mut Node<'_, '_>, c: ValueId, columns: usize) -> Result<Option<ValueId>, NodeError> {
    let shape = node.shape(c);
    let vector = Shape::new([columns])?;
    match *shape.dims() {
        [n] if n == columns => Ok(Some(c)),
        [1, n] if n == columns => {
            let name = format!("{}_row", node.name_of(c));
            node.emit_named(&name, Reshape { shape: vector }, &[c]).map(Some)
        }
        _ if shape.elements() == 1 && shape.rank() <= 2 => {
            let one = node.emit_part("bias_element", Reshape { shape: Shape::new([1])? }, &[c])?;
            node.emit_part("bias", Expand { shape: vector }, &[one]).map(Some)
        }
        _ => Ok(None),
    }
}

fn scale(node: &mut Node<'_, '_>, name: &str, x: ValueId, factor: f32) -> Result<ValueId, NodeError> {
    let factor = node.constant_part("factor", Tensor::scalar(factor));
    node.emit_named(name, Binary { kind: BinaryKind::Mul }, &[x, factor])
}

/// A matrix transposed. Of dequantized weights the integers are, so that weights stay a constant.
fn transpose(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId, NodeError> {
    let swap = || Transpose { perm: vec![1, 0] };
    let name = format!("{}_transposed", node.name_of(x));
    if let Some(Op::Dequantize(_)) = node.graph().op(x.node) {
        let codes = node.graph().operand(x.node, 0);
        if node.constant_value(codes).is_some() {
            let codes_name = format!("{}_transposed", node.name_of(codes));
            let codes = node.emit_named(&codes_name, swap(), &[codes])?;
            return node.emit_named(&name, Dequantize {}, &[codes]);
        }
    }
    node.emit_named(&name, swap(), &[x])
}

pub(super) fn matmul(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    matmul_of(node, "", a, b)
}

/// The product of these values, as NumPy has it: a vector is a row on the left and a column on the right, and its
/// dimension goes again.
pub(super) fn matmul_of(
    node: &mut Node<'_, '_>,
    part: &str,
    mut a: ValueId,
    mut b: ValueId,
) -> Result<ValueId, NodeError> {
    let (a_shape, b_shape) = (node.shape(a), node.shape(b));
    let (row, column) = (a_shape.rank() == 1, b_shape.rank() == 1);
    if !row && !column {
        return node.step(part, product_op(node.ty(a).dtype), &[a, b]);
    }
    if row {
        a = node.emit_part("row", Reshape { shape: Shape::new([1, a_shape[0]])? }, &[a])?;
    }
    if column {
        b = node.emit_part("column", Reshape { shape: Shape::new([b_shape[0], 1])? }, &[b])?;
    }
    let y = product_of(node, "product_matrix", a, b)?;
    let mut dims = node.shape(y).to_vec();
    if column {
        dims.pop();
    }
    if row {
        // The row stands before the column, which is gone or not.
        dims.remove(dims.len() - if column { 1 } else { 2 });
    }
    node.step(part, Reshape { shape: Shape::new(dims)? }, &[y])
}

pub(super) fn det(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    node.emit(Determinant {}, &[x])
}
