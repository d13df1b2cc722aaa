//! Functions of elements.

use super::{legacy, random, strings};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    numerics::PowerRounding,
    onnx::{NodeError, import::Node, tensor},
    ops::{Binary, BinaryKind, BitCast, Cast, CastSmall, Expand, Unary, UnaryKind, Where},
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
    acos: Acos, acosh: Acosh, asin: Asin, asinh: Asinh, atan: Atan, atanh: Atanh, cosh: Cosh, sinh: Sinh, tan: Tan,
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

pub(super) fn celu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 1.0)?;
    unary(node, UnaryKind::Celu { alpha })
}

pub(super) fn swish(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 1.0)?;
    unary(node, if alpha == 1.0 { UnaryKind::Silu } else { UnaryKind::Swish { alpha } })
}

pub(super) fn thresholded_relu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let alpha = node.float("alpha", 1.0)?;
    unary(node, UnaryKind::ThresholdedRelu { alpha })
}

/// Integers go through f64.
pub(super) fn shrink(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (lambda, bias) = (node.float("lambd", 0.5)?, node.float("bias", 0.0)?);
    let kind = UnaryKind::Shrink { lambda, bias };
    let x = node.operand(0, "input")?;
    let to = node.ty(x).dtype;
    if !to.is_integer() {
        return node.emit(Unary { kind }, &[x]);
    }
    let real = cast_part(node, "real", x, DType::F64)?;
    let shrunk = node.emit_part("shrunk", Unary { kind }, &[real])?;
    node.emit(Cast { to }, &[shrunk])
}

/// What no number equals, itself included.
pub(super) fn is_nan(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    check_float(node, x)?;
    let number = binary_part(node, "number", BinaryKind::Equal, x, x)?;
    node.emit(Unary { kind: UnaryKind::Not }, &[number])
}

fn check_float(node: &Node<'_, '_>, x: ValueId) -> Result<(), NodeError> {
    match node.ty(x).dtype.is_float() {
        true => Ok(()),
        false => Err(OpError::dtype(format!("takes floats, got {}", node.ty(x))).into()),
    }
}

pub(super) fn is_inf(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    check_float(node, x)?;
    let (below, above) = (node.flag("detect_negative", true)?, node.flag("detect_positive", true)?);
    let (shape, dtype) = (node.shape(x), node.ty(x).dtype);
    let (x, end) = match (below, above) {
        (true, true) => (node.emit_part("magnitude", Unary { kind: UnaryKind::Abs }, &[x])?, f32::INFINITY),
        (false, true) => (x, f32::INFINITY),
        (true, false) => (x, f32::NEG_INFINITY),
        (false, false) => {
            let none = node.constant_part("none", Tensor::zeros(DType::Bool, Shape::scalar()));
            return node.emit(Expand { shape }, &[none]);
        }
    };
    let end = node.constant_part("end", Tensor::scalar(end));
    let end = cast_part(node, "end_of_type", end, dtype)?;
    node.emit(Binary { kind: BinaryKind::Equal }, &[x, end])
}

pub(super) fn select(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let operands = [node.operand(0, "condition")?, node.operand(1, "X")?, node.operand(2, "Y")?];
    node.emit(Where {}, &operands)
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
    let b = legacy::aligned(node, a, b)?;
    node.emit(Binary { kind }, &[a, b])
}

/// A [`Binary`] that helps to express the node.
pub(super) fn binary_part(
    node: &mut Node<'_, '_>,
    part: &str,
    kind: BinaryKind,
    a: ValueId,
    b: ValueId,
) -> Result<ValueId, NodeError> {
    node.emit_part(part, Binary { kind }, &[a, b])
}

/// The value in another type, as a part of the node.
pub(super) fn cast_part(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    to: DType,
) -> Result<ValueId, NodeError> {
    match node.ty(x).dtype == to {
        true => Ok(x),
        false => node.emit_part(part, Cast { to }, &[x]),
    }
}

macro_rules! binaries {
    ($($name:ident: $kind:ident),* $(,)?) => {$(
        pub(super) fn $name(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            binary(node, BinaryKind::$kind)
        }
    )*};
}

binaries! {
    add: Add, div: Div, equal: Equal, greater: Greater, greater_or_equal: GreaterOrEqual, less: Less,
    less_or_equal: LessOrEqual, mul: Mul, sub: Sub,
}

/// Of floats the sign must be the dividend's; of integers it may be either's.
pub(super) fn modulo(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    let as_in_c = node.flag("fmod", false)?;
    if !as_in_c && node.ty(a).dtype.is_float() {
        return Err(NodeError::attribute("fmod", "must be 1 for floats"));
    }
    node.emit(Binary { kind: if as_in_c { BinaryKind::Remainder } else { BinaryKind::Modulo } }, &[a, b])
}

/// The slope broadcasts to the operand, never the other way. One that is known to be one number is an attribute.
pub(super) fn prelu(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, slope) = (node.operand(0, "X")?, node.operand(1, "slope")?);
    let slope = legacy::slope_of_channels(node, x, slope)?;
    let shape = node.shape(x);
    if shape.broadcast(&node.shape(slope)).as_ref() != Some(&shape) {
        let why = format!("slope {} does not broadcast to {}", node.ty(slope), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let alpha = node.constant_value(slope).and_then(Tensor::to_f32);
    match (alpha.as_deref(), node.ty(x).dtype) {
        (Some(&[alpha]), DType::F32 | DType::F16 | DType::BF16)
            if node.ty(slope).dtype == node.ty(x).dtype =>
        {
            node.emit(Unary { kind: UnaryKind::LeakyRelu { alpha } }, &[x])
        }
        _ => node.emit(Binary { kind: BinaryKind::PRelu }, &[x, slope]),
    }
}

/// Ops on bits of integers, which share kinds with those on truth values.
fn bitwise(node: &mut Node<'_, '_>, kind: BinaryKind) -> Result<ValueId, NodeError> {
    let (a, b) = (node.operand(0, "A")?, node.operand(1, "B")?);
    check_integer(node, a)?;
    node.emit(Binary { kind }, &[a, b])
}

fn check_integer(node: &Node<'_, '_>, x: ValueId) -> Result<(), NodeError> {
    match node.ty(x).dtype.is_integer() {
        true => Ok(()),
        false => Err(OpError::dtype(format!("takes integers, got {}", node.ty(x))).into()),
    }
}

fn logical(node: &mut Node<'_, '_>, kind: BinaryKind) -> Result<ValueId, NodeError> {
    let a = node.operand(0, "A")?;
    if node.ty(a).dtype != DType::Bool {
        return Err(OpError::dtype(format!("takes bool, got {}", node.ty(a))).into());
    }
    binary(node, kind)
}

macro_rules! logic {
    ($($name:ident, $bits:ident: $kind:ident),* $(,)?) => {$(
        pub(super) fn $name(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            logical(node, BinaryKind::$kind)
        }
        pub(super) fn $bits(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
            bitwise(node, BinaryKind::$kind)
        }
    )*};
}

logic! { and, bitwise_and: And, or, bitwise_or: Or, xor, bitwise_xor: Xor }

/// All bits the other way: of each type what −1 does.
pub(super) fn bitwise_not(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "X")?;
    check_integer(node, x)?;
    let dtype = node.ty(x).dtype;
    let ones = node.constant_part("minus_one", Tensor::scalar(-1i64));
    let ones = cast_part(node, "ones", ones, dtype)?;
    node.emit(Binary { kind: BinaryKind::Xor }, &[x, ones])
}

pub(super) fn bit_shift(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let kind = match node.string("direction", "")? {
        "LEFT" => BinaryKind::ShiftLeft,
        "RIGHT" => BinaryKind::ShiftRight,
        other => return Err(NodeError::attribute("direction", format!("is {other:?} or missing"))),
    };
    binary(node, kind)
}

pub(super) fn bit_cast(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "input")?;
    let to = target(node)?;
    node.emit(BitCast { to }, &[x])
}

/// From opset 12 the exponent may be of another type; the result is of the base's.
pub(super) fn pow(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (base, exponent) = (node.operand(0, "X")?, node.operand(1, "Y")?);
    let exponent = legacy::aligned(node, base, exponent)?;
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
    let x = node.operand(0, "input")?;
    let to = target(node)?;
    converted(node, x, to)
}

/// Only conversions to floats of 8 bits and fewer heed attributes: `saturate`, and how powers of two are chosen.
fn converted(node: &mut Node<'_, '_>, x: ValueId, to: DType) -> Result<ValueId, NodeError> {
    if node.ty(x).dtype == DType::Str || to == DType::Str {
        return strings::cast(node, to);
    }
    let saturate = node.flag("saturate", true)?;
    let rounding = match node.string("round_mode", "up")? {
        "up" => PowerRounding::Up,
        "down" => PowerRounding::Down,
        "nearest" => PowerRounding::Nearest,
        other => return Err(NodeError::attribute("round_mode", format!("is {other:?}"))),
    };
    match to.is_small_float() {
        true => to_small_float(node, x, to, saturate, rounding),
        false => node.emit(Cast { to }, &[x]),
    }
}

/// The value as a float of 8 bits or fewer.
pub(super) fn to_small_float(
    node: &mut Node<'_, '_>,
    x: ValueId,
    to: DType,
    saturate: bool,
    rounding: PowerRounding,
) -> Result<ValueId, NodeError> {
    if saturate && (to != DType::F8E8M0 || rounding == PowerRounding::Up) {
        return node.emit(Cast { to }, &[x]);
    }
    let x = match node.ty(x).dtype {
        DType::F32 | DType::F16 | DType::BF16 => x,
        _ => cast_part(node, "f32", x, DType::F32)?,
    };
    node.emit(CastSmall { to, saturate, rounding }, &[x])
}

fn target(node: &mut Node<'_, '_>) -> Result<DType, NodeError> {
    if node.opset() < 6 {
        let name = node.string("to", "")?;
        return tensor::dtype_of_name(name).ok_or_else(|| NodeError::attribute("to", format!("is {name:?}")));
    }
    let code = node.optional_int("to")?.ok_or_else(|| NodeError::attribute("to", "is missing"))?;
    dtype("to", code)
}

/// The type of this number.
pub(super) fn dtype(attribute: &str, code: i64) -> Result<DType, NodeError> {
    let code = i32::try_from(code).map_err(|_| NodeError::attribute(attribute, format!("is {code}")))?;
    Ok(tensor::dtype(code).map_err(OpError::unsupported)?)
}

pub(super) fn cast_like(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let (x, like) = (node.operand(0, "input")?, node.operand(1, "target_type")?);
    let to = node.ty(like).dtype;
    converted(node, x, to)
}

/// The data unchanged, and a mask that keeps everything; in training mode random elements are made 0.
pub(super) fn dropout(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "data")?;
    kept(node, x, 1)
}

/// Dropout of x, whose operands `ratio` and `training_mode` are in these slots and the next ones.
pub(super) fn kept(
    node: &mut Node<'_, '_>,
    x: ValueId,
    ratio_slot: usize,
) -> Result<Vec<ValueId>, NodeError> {
    let seed = node.optional_int("seed")?;
    if node.opset() < 12 {
        node.ignore(&["ratio", "is_test"]);
    } else {
        let trains = node.known(ratio_slot + 1, "training_mode")?;
        if trains.and_then(|t| t.to_i64()).is_some_and(|t| t.iter().any(|&t| t != 0)) {
            let ratio = node.known(ratio_slot, "ratio")?.map_or(Some(0.5), |t| t.to_f64().first().copied());
            let ratio = ratio.ok_or_else(|| OpError::shape("ratio must be one number"))?;
            let seed = seed.map_or_else(|| random::hash(node.name()), |seed| seed as u32);
            return random::dropped(node, x, ratio, seed);
        }
        node.optional(ratio_slot);
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
