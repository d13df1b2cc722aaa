//! Functions of elements.

use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node, tensor},
    ops::{Binary, BinaryKind, Cast, Expand, Unary, UnaryKind},
};

fn unary(node: &mut Node<'_, '_>, kind: UnaryKind) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    node.emit(Unary { kind }, &[x])
}

/// Ops without attributes.
macro_rules! unaries {
    ($($name:ident: $kind:ident),* $(,)?) => {$(
        pub(super) fn $name(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            unary(node, UnaryKind::$kind)
        }
    )*};
}

unaries! {
    abs: Abs, ceil: Ceil, cos: Cos, erf: Erf, exp: Exp, floor: Floor, hard_swish: HardSwish, log: Log, mish: Mish,
    neg: Neg, not: Not, reciprocal: Reciprocal, relu: Relu, round: Round, sigmoid: Sigmoid, sign: Sign, sin: Sin,
    softplus: Softplus, softsign: Softsign, sqrt: Sqrt, tanh: Tanh,
}

pub(super) fn leaky_relu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 0.01)?;
    unary(node, UnaryKind::LeakyRelu { alpha })
}

pub(super) fn elu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 1.0)?;
    unary(node, UnaryKind::Elu { alpha })
}

pub(super) fn selu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    // The defaults of the specification, as f32 has them.
    let alpha = node.float("alpha", 1.673_263_2)?;
    let gamma = node.float("gamma", 1.050_701)?;
    unary(node, UnaryKind::Selu { alpha, gamma })
}

pub(super) fn hard_sigmoid(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 0.2)?;
    let beta = node.float("beta", 0.5)?;
    unary(node, UnaryKind::HardSigmoid { alpha, beta })
}

pub(super) fn gelu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let kind = match node.string("approximate", "none")? {
        "none" => UnaryKind::Gelu,
        "tanh" => UnaryKind::GeluTanh,
        other => return Err(NodeError::attribute("approximate", format!("is {other:?}"))),
    };
    unary(node, kind)
}

/// Bounds are attributes before opset 11 and operands from then on. Known ones are part of the op; others, and those
/// of types that f32 does not hold, are compared with.
pub(super) fn clip(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    if node.opset() < 11 {
        let lo = node.optional_float("min")?.unwrap_or(f32::NEG_INFINITY);
        let hi = node.optional_float("max")?.unwrap_or(f32::INFINITY);
        return node.emit(Unary { kind: UnaryKind::Clip { lo, hi } }, &[x]);
    }
    let (min, max) = (node.optional(1), node.optional(2));
    for bound in [min, max].into_iter().flatten() {
        let (bound, x) = (node.ty(bound), node.ty(x));
        if bound.dtype != x.dtype || bound.shape.elements() != 1 || bound.shape.rank() > 1 {
            return Err(OpError::dtype(format!(
                "a bound of {x} must be one number of its type, not {bound}"
            ))
            .into());
        }
    }
    let number = |bound: Option<ValueId>, none: f32| match bound {
        None => Some(none),
        Some(v) => node.constant_value(v).and_then(Tensor::to_f32).and_then(|v| v.first().copied()),
    };
    let fits = matches!(node.ty(x).dtype, DType::F32 | DType::F16 | DType::BF16);
    if let (true, Some(lo), Some(hi)) = (fits, number(min, f32::NEG_INFINITY), number(max, f32::INFINITY)) {
        return node.emit(Unary { kind: UnaryKind::Clip { lo, hi } }, &[x]);
    }
    match (min, max) {
        (None, None) => Ok(x),
        (Some(min), None) => node.emit(Binary { kind: BinaryKind::Max }, &[x, min]),
        (None, Some(max)) => node.emit(Binary { kind: BinaryKind::Min }, &[x, max]),
        (Some(min), Some(max)) => {
            let above = node.emit_part("min", Binary { kind: BinaryKind::Max }, &[x, min])?;
            node.emit(Binary { kind: BinaryKind::Min }, &[above, max])
        }
    }
}

fn binary(node: &mut Node<'_, '_>, kind: BinaryKind) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    node.emit(Binary { kind }, &[a, b])
}

macro_rules! binaries {
    ($($name:ident: $kind:ident),* $(,)?) => {$(
        pub(super) fn $name(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            binary(node, BinaryKind::$kind)
        }
    )*};
}

binaries! {
    add: Add, and: And, div: Div, equal: Equal, greater: Greater, greater_or_equal: GreaterOrEqual, less: Less,
    less_or_equal: LessOrEqual, mul: Mul, or: Or, sub: Sub, xor: Xor,
}

/// From opset 12 the exponent may be of another type; the result is of the base's.
pub(super) fn pow(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (base, exponent) = (node.operand(0, "X")?, node.operand(1, "Y")?);
    let (to, from) = (node.ty(base).dtype, node.ty(exponent).dtype);
    let pow = Binary { kind: BinaryKind::Pow };
    if from == to || node.opset() < 12 || to == DType::Bool || from == DType::Bool {
        return node.emit(pow, &[base, exponent]);
    }
    if to.is_float() || from.is_integer() {
        let exponent = node.emit_part("exponent", Cast { to }, &[exponent])?;
        return node.emit(pow, &[base, exponent]);
    }
    // An integer to a fractional power is computed in the widest float.
    let wide = Cast { to: DType::F64 };
    let base = node.emit_part("base", wide.clone(), &[base])?;
    let exponent = node.emit_part("exponent", wide, &[exponent])?;
    let power = node.emit_part("power", pow, &[base, exponent])?;
    node.emit(Cast { to }, &[power])
}

/// One op after the other, from the left.
fn chain(node: &mut Node<'_, '_>, kind: BinaryKind) -> Result<ValueId, NodeError> {
    let operands = node.operands("data_0")?;
    let mut so_far = operands[0];
    for (i, &next) in operands.iter().enumerate().skip(1) {
        let op = Binary { kind };
        so_far = match i + 1 == operands.len() {
            true => node.emit(op, &[so_far, next])?,
            false => node.emit_part(&format!("{i}"), op, &[so_far, next])?,
        };
    }
    Ok(so_far)
}

pub(super) fn sum(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    chain(node, BinaryKind::Add)
}

pub(super) fn max(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    chain(node, BinaryKind::Max)
}

pub(super) fn min(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    chain(node, BinaryKind::Min)
}

pub(super) fn mean(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let count = node.operands("data_0")?.len();
    let sum = chain(node, BinaryKind::Add)?;
    let count = node.constant_part("count", Tensor::scalar(count as f32));
    node.emit(Binary { kind: BinaryKind::Div }, &[sum, count])
}

pub(super) fn cast(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    // Only the 8-bit floats, which are not supported, heed these.
    node.ignore(&["saturate", "round_mode"]);
    let x = node.operand(0, "input")?;
    let code = node.optional_int("to")?.ok_or_else(|| NodeError::attribute("to", "is missing"))?;
    let code = i32::try_from(code).map_err(|_| NodeError::attribute("to", format!("is {code}")))?;
    let to = tensor::dtype(code).map_err(OpError::unsupported)?;
    node.emit(Cast { to }, &[x])
}

pub(super) fn cast_like(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    node.ignore(&["saturate", "round_mode"]);
    let (x, like) = (node.operand(0, "input")?, node.operand(1, "target_type")?);
    let to = node.ty(like).dtype;
    node.emit(Cast { to }, &[x])
}

pub(super) fn identity(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    node.operand(0, "input")
}

/// As in inference: the data unchanged, and a mask that keeps everything.
pub(super) fn dropout(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    node.ignore(&["seed"]);
    let x = node.operand(0, "data")?;
    if node.opset() < 12 {
        node.ignore(&["ratio"]);
    } else {
        node.optional(1);
        let trains = node.known(2, "training_mode")?;
        if trains.and_then(|t| t.to_i64()).is_some_and(|t| t.iter().any(|&t| t != 0)) {
            return Err(
                OpError::unsupported("is in training mode; export the model in inference mode").into()
            );
        }
    }
    if !node.wants(1) {
        return Ok(vec![x]);
    }
    let shape = node.shape(x);
    let kept = match node.opset() < 10 {
        true => Tensor::scalar(1f32),
        false => Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![1]).map_err(OpError::from)?,
    };
    let kept = node.constant_part("kept", kept);
    let mask = node.emit_part("mask", Expand { shape }, &[kept])?;
    Ok(vec![x, mask])
}
