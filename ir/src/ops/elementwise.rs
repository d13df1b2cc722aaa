//! Functions of elements.

use super::{Operator, arity, conv::per_tensor, numbers::Numbers, shape::one_grid};
use crate::{
    DType, OpError, OutputGrid, Shape, Tensor, TensorType,
    numerics::{
        self, AddRescale, FloatAddRescale, FloatMulRescale, MulRescale, PowerRounding, Rescaling, math::Real,
    },
    tensor::with_element,
};
use ndarray::{ArrayViewD, IxDyn};
use serde::{Deserialize, Serialize};

/// A function of one number.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names and formulas say it")]
pub enum UnaryKind {
    /// x, unchanged; as a [`QUnary`] it moves values to another grid.
    Identity,
    /// max(x, 0).
    Relu,
    /// x for x ≥ 0, alpha·x below.
    LeakyRelu {
        alpha: f32,
    },
    /// Within bounds; see [`Clamp`](super::Clamp). Of integers: within the integers between the bounds.
    Clip {
        lo: f32,
        hi: f32,
    },
    /// 1/(1 + e^−x).
    Sigmoid,
    Tanh,
    /// max(0, min(1, alpha·x + beta)).
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    /// x·max(0, min(1, x·⅙ + ½)).
    HardSwish,
    /// x·sigmoid(x).
    Silu,
    /// x·½·(1 + erf(x/√2)).
    Gelu,
    /// x·½·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
    GeluTanh,
    /// x for x ≥ 0, alpha·(eˣ − 1) below.
    Elu {
        alpha: f32,
    },
    /// gamma·x for x > 0, gamma·alpha·(eˣ − 1) otherwise.
    Selu {
        alpha: f32,
        gamma: f32,
    },
    /// x for x ≥ 0, alpha·(e^(x/alpha) − 1) below.
    Celu {
        alpha: f32,
    },
    /// x·sigmoid(alpha·x).
    Swish {
        alpha: f32,
    },
    /// x for x > alpha, 0 otherwise.
    ThresholdedRelu {
        alpha: f32,
    },
    /// x + bias for x < −lambda, x − bias for x > lambda, 0 between.
    Shrink {
        lambda: f32,
        bias: f32,
    },
    /// x·tanh(softplus(x)).
    Mish,
    /// ln(1 + eˣ).
    Softplus,
    /// x/(1 + |x|).
    Softsign,
    Exp,
    Log,
    Sqrt,
    Reciprocal,
    Erf,
    Neg,
    Abs,
    /// −1 or 1, or x where it is 0 or NaN.
    Sign,
    Floor,
    Ceil,
    /// Half to even.
    Round,
    Sin,
    Cos,
    Tan,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Asinh,
    Acosh,
    Atanh,
    /// Of booleans.
    Not,
}

/// A function of two numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum BinaryKind {
    Add,
    Sub,
    Mul,
    /// Of integers: truncated; division by zero is an error, never a trap.
    Div,
    /// NaN if either is.
    Max,
    /// NaN if either is.
    Min,
    /// Of integers: wrapping; to a negative exponent the truncated real power, of 0 an error.
    Pow,
    /// What a division leaves, with the sign of the divisor; division by the integer 0 is an error.
    Modulo,
    /// What a division leaves, with the sign of the dividend; division by the integer 0 is an error.
    Remainder,
    /// The first operand where it is not negative, the product of both elsewhere.
    PRelu,
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// Of booleans, and of the bits of integers.
    And,
    /// Of booleans, and of the bits of integers.
    Or,
    /// Of booleans, and of the bits of integers.
    Xor,
    /// Of unsigned integers: the bits of the first operand towards higher ones, by the second; 0 once all are gone.
    ShiftLeft,
    /// Of unsigned integers: the bits of the first operand towards lower ones, by the second; 0 once all are gone.
    ShiftRight,
}

/// A [`UnaryKind`] of each element. Of floats, but for `Not` (bool) and `Neg`, `Abs`, `Sign`, `Relu` (integers too).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Unary {
    /// The function.
    pub kind: UnaryKind,
}

/// A [`BinaryKind`] of pairs of elements of one type, broadcast by NumPy's rules.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Binary {
    /// The function.
    pub kind: BinaryKind,
}

/// A [`UnaryKind`] of quantized elements: quantize(f(dequantize(q))), as a table of 256 entries.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QUnary {
    /// The function.
    pub kind: UnaryKind,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// What [`QBinary`] computes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum QBinaryKind {
    Add,
    Sub,
    Mul,
}

/// Sum, difference ([`AddRescale`](crate::numerics::AddRescale)) or product ([`MulRescale`](crate::numerics::MulRescale))
/// of quantized elements, broadcast by NumPy's rules; or those of
/// [`FloatAddRescale`](crate::numerics::FloatAddRescale) and [`FloatMulRescale`](crate::numerics::FloatMulRescale).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QBinary {
    /// The function.
    pub kind: QBinaryKind,
    /// The formula of the rescaling.
    pub rescaling: Rescaling,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// Elements of the second operand where the first one is true, of the third elsewhere, all broadcast by NumPy's rules.
///
/// Operands: bool, and two of one type, whose grid, if they have one, is that of the result.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Where {}

/// The bits of elements read as another type of the same size. Of booleans whatever is not 0 is true.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BitCast {
    /// The result's type.
    pub to: DType,
}

/// Conversion between element types. Float to integer truncates and saturates, but to four bits and fewer it wraps; NaN
/// becomes 0. To floats of 8 bits and fewer it saturates, and to f8e8m0 rounds up: [`CastSmall`] has other ways.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cast {
    /// The result's type.
    pub to: DType,
}

impl UnaryKind {
    /// The function, in f32: the one definition of [`Unary`] and [`QUnary`]. Each operation of the formulas at
    /// the kinds is rounded, in the order of the code; elementary functions are those of
    /// [`numerics::math`](crate::numerics::math). NaN gives NaN.
    pub fn apply(self, x: f32) -> f32 {
        self.apply_real(x)
    }

    pub(crate) fn apply_real<T: Real>(self, x: T) -> T {
        use UnaryKind::*;
        let (zero, half, one) = (T::of(0.0), T::of(0.5), T::of(1.0));
        let of = |x: f32| T::of(x.into());
        match self {
            Identity => x,
            Relu => {
                if x < zero {
                    zero
                } else {
                    x
                }
            }
            LeakyRelu { alpha } => {
                if x < zero {
                    of(alpha) * x
                } else {
                    x
                }
            }
            Clip { lo, hi } => x.within(of(lo), of(hi)),
            Sigmoid => x.sigmoid(),
            Tanh => x.tanh(),
            HardSigmoid { alpha, beta } => (of(alpha) * x + of(beta)).within(zero, one),
            HardSwish => x * (x * T::of(1.0 / 6.0) + half).within(zero, one),
            Silu => x * x.sigmoid(),
            Gelu => half * x * (one + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf()),
            GeluTanh => {
                let inner = x + T::of(0.044715) * (x * x * x);
                half * x * (one + (T::of(SQRT_2_BY_PI) * inner).tanh())
            }
            Elu { alpha } => {
                if x < zero {
                    of(alpha) * (x.exp() - one)
                } else {
                    x
                }
            }
            Selu { alpha, gamma } => of(gamma) * if x > zero { x } else { of(alpha) * (x.exp() - one) },
            Celu { alpha } => {
                if x < zero {
                    of(alpha) * ((x / of(alpha)).exp() - one)
                } else {
                    x
                }
            }
            Swish { alpha } => x * (of(alpha) * x).sigmoid(),
            ThresholdedRelu { alpha } => {
                if x > of(alpha) || x.is_nan() {
                    x
                } else {
                    zero
                }
            }
            Shrink { lambda, bias } => {
                if x < of(-lambda) {
                    x + of(bias)
                } else if x > of(lambda) {
                    x - of(bias)
                } else if x.is_nan() {
                    x
                } else {
                    zero
                }
            }
            Mish => x * x.softplus().tanh(),
            Softplus => x.softplus(),
            Softsign => x / (one + x.abs()),
            Exp => x.exp(),
            Log => x.ln(),
            Sqrt => x.sqrt(),
            Reciprocal => one / x,
            Erf => x.erf(),
            Neg => -x,
            Abs => x.abs(),
            Sign => {
                if x > zero {
                    one
                } else if x < zero {
                    -one
                } else {
                    x
                }
            }
            Floor => x.floor(),
            Ceil => x.ceil(),
            Round => x.round_ties_even(),
            Sin => x.sin(),
            Cos => x.cos(),
            Tan => x.tan(),
            Asin => x.asin(),
            Acos => x.acos(),
            Atan => x.atan(),
            Sinh => x.sinh(),
            Cosh => x.cosh(),
            Asinh => x.asinh(),
            Acosh => x.acosh(),
            Atanh => x.atanh(),
            Not => {
                if x == zero {
                    one
                } else {
                    zero
                }
            }
        }
    }

    /// The function of an integer, for the kinds that [`Unary`] takes of integers.
    fn apply_integer(self, x: i128) -> Result<i128, OpError> {
        use UnaryKind::*;
        Ok(match self {
            Identity => x,
            Relu => x.max(0),
            // `as` saturates: infinite bounds bound nothing.
            Clip { lo, hi } => x.max(lo.ceil() as i128).min(hi.floor() as i128),
            Neg => -x,
            Abs => x.abs(),
            Sign => x.signum(),
            Not => i128::from(x == 0),
            _ => return Err(OpError::dtype(format!("{self:?} of integers"))),
        })
    }
}

/// √(2/π).
const SQRT_2_BY_PI: f64 = 0.797_884_560_802_865_4;

impl BinaryKind {
    /// Whether the result is a truth value of a comparison.
    pub fn is_comparison(self) -> bool {
        use BinaryKind::*;
        matches!(self, Equal | Less | LessOrEqual | Greater | GreaterOrEqual)
    }
    /// Whether operands may be truth values; else they are the bits of integers.
    pub fn is_logical(self) -> bool {
        use BinaryKind::*;
        matches!(self, And | Or | Xor)
    }

    /// The truth value of a comparison; false of other kinds. NaN compares false.
    fn compare<T: PartialOrd>(self, a: T, b: T) -> bool {
        match self {
            BinaryKind::Equal => a == b,
            BinaryKind::Less => a < b,
            BinaryKind::LessOrEqual => a <= b,
            BinaryKind::Greater => a > b,
            BinaryKind::GreaterOrEqual => a >= b,
            _ => false,
        }
    }

    /// Whether operands may be of a type.
    fn takes(self, dtype: DType) -> bool {
        use BinaryKind::*;
        match self {
            And | Or | Xor => dtype.is_integer() || dtype == DType::Bool,
            ShiftLeft | ShiftRight => dtype.is_integer() && !dtype.is_signed(),
            Equal => !dtype.is_small_float(),
            _ => dtype.is_float() || dtype.is_integer(),
        }
    }

    pub(super) fn apply_real<T: Real>(self, a: T, b: T) -> Result<T, OpError> {
        let zero = T::of(0.0);
        Ok(match self {
            BinaryKind::Add => a + b,
            BinaryKind::Sub => a - b,
            BinaryKind::Mul => a * b,
            BinaryKind::Div => a / b,
            BinaryKind::Max => a.larger(b),
            BinaryKind::Min => a.smaller(b),
            BinaryKind::Pow => a.pow(b),
            BinaryKind::Remainder => a.rem(b),
            BinaryKind::Modulo => {
                let rest = a.rem(b);
                if rest < zero && b > zero || rest > zero && b < zero { rest + b } else { rest }
            }
            BinaryKind::PRelu => {
                if a < zero {
                    a * b
                } else {
                    a
                }
            }
            _ => return Err(OpError::dtype(format!("{self:?} of floats"))),
        })
    }

    /// Exact, or modulo 2^128: right after wrapping to the operands' type.
    pub(super) fn apply_integer(self, a: i128, b: i128) -> Result<i128, OpError> {
        use BinaryKind::{Div, Modulo, Remainder};
        // Of 64 bits at most, so all others are shifted out.
        let count = b.clamp(0, 64) as u32;
        Ok(match self {
            Div | Modulo | Remainder if b == 0 => {
                return Err(OpError::attribute(format!("{a} divided by zero")));
            }
            BinaryKind::Add => a + b,
            BinaryKind::Sub => a - b,
            BinaryKind::Mul => a.wrapping_mul(b),
            Div => a / b,
            Remainder => a % b,
            Modulo => (a % b + b) % b,
            BinaryKind::PRelu => {
                if a < 0 {
                    a.wrapping_mul(b)
                } else {
                    a
                }
            }
            BinaryKind::ShiftLeft => a << count,
            BinaryKind::ShiftRight => a >> count,
            BinaryKind::Max => a.max(b),
            BinaryKind::Min => a.min(b),
            BinaryKind::Pow => integer_power(a, b)?,
            BinaryKind::And => a & b,
            BinaryKind::Or => a | b,
            BinaryKind::Xor => a ^ b,
            _ => return Err(OpError::dtype(format!("{self:?} does not give a number"))),
        })
    }
}

fn integer_power(base: i128, exponent: i128) -> Result<i128, OpError> {
    if exponent < 0 {
        return match base {
            0 => Err(OpError::attribute(format!("0 to the power of {exponent}"))),
            1 => Ok(1),
            -1 => Ok(if exponent % 2 == 0 { 1 } else { -1 }),
            _ => Ok(0),
        };
    }
    let (mut square, mut rest, mut power) = (base, exponent, 1i128);
    while rest > 0 {
        if rest & 1 == 1 {
            power = power.wrapping_mul(square);
        }
        square = square.wrapping_mul(square);
        rest >>= 1;
    }
    Ok(power)
}

/// f of each pair of elements of `a` and `b`, both broadcast to `shape`, in row-major order.
fn zip<T, U>(
    (a, a_shape): (&[T], &Shape),
    (b, b_shape): (&[T], &Shape),
    shape: &Shape,
    f: impl Fn(T, T) -> Result<U, OpError>,
) -> Result<Vec<U>, OpError>
where
    T: Copy,
{
    if a_shape == shape && b_shape == shape {
        return a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect();
    }
    let (a, b) = (broadcast(a, a_shape)?, broadcast(b, b_shape)?);
    let refusal = || OpError::shape(format!("operands do not broadcast to {shape:?}"));
    let a = a.broadcast(IxDyn(shape)).ok_or_else(refusal)?;
    let b = b.broadcast(IxDyn(shape)).ok_or_else(refusal)?;
    a.iter().zip(&b).map(|(&a, &b)| f(a, b)).collect()
}

fn broadcast<'a, T>(elements: &'a [T], shape: &Shape) -> Result<ArrayViewD<'a, T>, OpError> {
    ArrayViewD::from_shape(IxDyn(shape), elements).map_err(|e| OpError::shape(e.to_string()))
}

impl Operator for Unary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        use UnaryKind::*;
        let [x] = arity(operands)?;
        let allowed = match self.kind {
            Not => x.dtype == DType::Bool,
            Identity => true,
            Neg | Abs | Sign | Relu | Clip { .. } => x.dtype.is_float() || x.dtype.is_integer(),
            _ => x.dtype.is_float(),
        };
        if !allowed || (x.quant.is_some() && self.kind != Identity) {
            return Err(OpError::dtype(format!("{:?} of {x}", self.kind)));
        }
        if let Clip { lo, hi } = self.kind {
            super::Clamp { lo, hi }.check()?;
        }
        Ok(vec![x])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        if self.kind == UnaryKind::Identity {
            return Ok(vec![operands[0].clone()]);
        }
        let values = match Numbers::decode(operands[0])? {
            Numbers::F32(x) => Numbers::F32(x.into_iter().map(|x| self.kind.apply(x)).collect()),
            Numbers::F64(x) => Numbers::F64(x.into_iter().map(|x| self.kind.apply_real(x)).collect()),
            Numbers::Int(x) => {
                Numbers::Int(x.into_iter().map(|x| self.kind.apply_integer(x)).collect::<Result<_, _>>()?)
            }
        };
        Ok(vec![values.encode(results[0].dtype, results[0].shape.clone())?])
    }
}

impl Operator for Binary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [a, b] = arity(operands)?;
        if a.dtype != b.dtype || a.quant.is_some() || b.quant.is_some() {
            return Err(OpError::dtype(format!(
                "{:?} of {a} and {b}: the types must be equal and not quantized",
                self.kind
            )));
        }
        if !self.kind.takes(a.dtype) {
            return Err(OpError::dtype(format!("{:?} of {a} and {b}", self.kind)));
        }
        let shape = a
            .shape
            .broadcast(&b.shape)
            .ok_or_else(|| OpError::shape(format!("{a} and {b} do not broadcast")))?;
        let dtype = if self.kind.is_comparison() { DType::Bool } else { a.dtype };
        Ok(vec![TensorType::new(dtype, shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (kind, shape) = (self.kind, &results[0].shape);
        let (a_shape, b_shape) = (operands[0].shape(), operands[1].shape());
        let values = match (Numbers::decode(operands[0])?, Numbers::decode(operands[1])?) {
            (Numbers::F32(a), Numbers::F32(b)) if !kind.is_comparison() => {
                Numbers::F32(zip((&a, a_shape), (&b, b_shape), shape, |a, b| kind.apply_real(a, b))?)
            }
            (Numbers::F64(a), Numbers::F64(b)) if !kind.is_comparison() => {
                Numbers::F64(zip((&a, a_shape), (&b, b_shape), shape, |a, b| kind.apply_real(a, b))?)
            }
            (Numbers::Int(a), Numbers::Int(b)) if !kind.is_comparison() => {
                Numbers::Int(zip((&a, a_shape), (&b, b_shape), shape, |a, b| kind.apply_integer(a, b))?)
            }
            (Numbers::F32(a), Numbers::F32(b)) => truth(kind, (&a, a_shape), (&b, b_shape), shape)?,
            (Numbers::F64(a), Numbers::F64(b)) => truth(kind, (&a, a_shape), (&b, b_shape), shape)?,
            (Numbers::Int(a), Numbers::Int(b)) => truth(kind, (&a, a_shape), (&b, b_shape), shape)?,
            _ => return Err(OpError::dtype(format!("{kind:?} of two types"))),
        };
        Ok(vec![values.encode(results[0].dtype, shape.clone())?])
    }
}

impl Operator for Where {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [condition, x, y] = arity(operands)?;
        if condition.dtype != DType::Bool {
            return Err(OpError::dtype(format!("a condition must be bool, not {condition}")));
        }
        one_grid(&x, &y)?;
        let both = x.shape.broadcast(&y.shape);
        let shape = both.and_then(|both| both.broadcast(&condition.shape));
        let shape =
            shape.ok_or_else(|| OpError::shape(format!("{condition}, {x} and {y} do not broadcast")))?;
        Ok(vec![x.with_shape(shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (dtype, shape) = (results[0].dtype, &results[0].shape);
        let refusal = || OpError::shape(format!("operands do not broadcast to {shape:?}"));
        let condition = operands[0].view::<u8>()?;
        let condition = condition.broadcast(IxDyn(shape)).ok_or_else(refusal)?;
        with_element!(dtype, T => {
            let (x, y) = (operands[1].view::<T>()?, operands[2].view::<T>()?);
            let x = x.broadcast(IxDyn(shape)).ok_or_else(refusal)?;
            let y = y.broadcast(IxDyn(shape)).ok_or_else(refusal)?;
            let pick = |((&c, &x), &y): ((&u8, &T), &T)| if c != 0 { x } else { y };
            let elements = condition.iter().zip(&x).zip(&y).map(pick).collect();
            Ok(vec![Tensor::from_vec_as(dtype, shape.clone(), elements)?])
        })
    }
}

impl Operator for BitCast {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let is_text = x.dtype == DType::Str || self.to == DType::Str;
        if x.dtype.bits() != self.to.bits() || x.quant.is_some() || is_text {
            return Err(OpError::dtype(format!("the bits of {x} as {}", self.to)));
        }
        Ok(vec![TensorType::new(self.to, x.shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, shape) = (operands[0], results[0].shape.clone());
        let code = |byte: &u8| match self.to {
            DType::Bool => u8::from(*byte != 0),
            // A byte each in memory, extended from fewer bits.
            DType::S2 | DType::S4 => (((*byte << (8 - self.to.bits())) as i8) >> (8 - self.to.bits())) as u8,
            DType::U2 | DType::U4 | DType::F4E2M1 => *byte & ((1 << self.to.bits()) - 1),
            _ => *byte,
        };
        let bytes = match self.to.size() {
            1 => x.bytes().iter().map(code).collect::<Vec<u8>>().into(),
            _ => x.bytes().clone(),
        };
        Ok(vec![Tensor::from_bytes(self.to, shape, bytes)?])
    }
}

fn truth<T: Copy + PartialOrd>(
    kind: BinaryKind,
    a: (&[T], &Shape),
    b: (&[T], &Shape),
    shape: &Shape,
) -> Result<Numbers, OpError> {
    Ok(Numbers::Int(zip(a, b, shape, |a, b| Ok(kind.compare(a, b).into()))?))
}

impl QUnary {
    /// The codes of the result, indexed by the byte that holds the operand's code.
    pub fn table(&self, operand: &TensorType) -> Result<[u8; 256], OpError> {
        let (scale, zero_point) =
            operand.per_tensor().ok_or_else(|| OpError::quant(format!("{operand} has no single grid")))?;
        Ok(numerics::table(self.kind, operand.dtype, scale, zero_point, self.output))
    }
}

impl Operator for QUnary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype.size() != 1 || x.per_tensor().is_none() || self.kind == UnaryKind::Not {
            return Err(OpError::quant(format!("{:?} of {x}: takes 8-bit codes of one grid", self.kind)));
        }
        self.output.check()?;
        if let UnaryKind::Clip { lo, hi } = self.kind {
            super::Clamp { lo, hi }.check()?;
        }
        Ok(vec![TensorType::quantized(self.output.dtype, x.shape, self.output.params()?)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let table = self.table(types[0])?;
        let codes: Vec<u8> = operands[0].bytes().iter().map(|&q| table[usize::from(q)]).collect();
        Ok(vec![Tensor::from_bytes(results[0].dtype, results[0].shape.clone(), codes.into())?])
    }
}

/// Constants of a [`QBinary`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum QBinaryRescale {
    /// Of a sum or difference.
    Add(AddRescale),
    /// Of a product.
    Mul(MulRescale),
    /// Of a sum or difference, in f32.
    FloatAdd(FloatAddRescale),
    /// Of a product, in f32.
    FloatMul(FloatMulRescale),
}

impl QBinaryRescale {
    /// The code of two operands' codes, for these zero points of operands and result, before it is bounded.
    pub fn apply(self, [q1, q2]: [i32; 2], [z1, z2]: [i32; 2], z_y: i32) -> i32 {
        match self {
            QBinaryRescale::Add(r) => r.apply(q1 - z1, q2 - z2) + z_y,
            QBinaryRescale::Mul(r) => r.apply(q1 - z1, q2 - z2) + z_y,
            QBinaryRescale::FloatAdd(r) => r.apply(q1, q2),
            QBinaryRescale::FloatMul(r) => r.apply(q1 - z1, q2 - z2),
        }
    }
}

impl QBinary {
    /// The constants for operands of these types: s₁/s_y and ±s₂/s_y, or s₁·s₂/s_y.
    pub fn rescale(&self, types: &[&TensorType]) -> Result<QBinaryRescale, OpError> {
        let [a, b] = arity(types)?;
        let (s1, z1) = per_tensor(&a, "first operand")?;
        let (s2, z2) = per_tensor(&b, "second operand")?;
        let rescale = match self.rescaling {
            Rescaling::FixedPoint => self.fixed_point([s1, s2]),
            Rescaling::Float => self.float([s1, s2], [z1, z2]),
        };
        rescale.ok_or_else(|| {
            OpError::quant(format!(
                "{:?} of scales {s1} and {s2} to {}: the factor does not fit {}; choose a coarser output scale",
                self.kind,
                self.output.scale,
                match self.rescaling {
                    Rescaling::FixedPoint => "16 bits",
                    Rescaling::Float => "the range of exact sums",
                }
            ))
        })
    }

    fn fixed_point(&self, scales: [f32; 2]) -> Option<QBinaryRescale> {
        let ([s1, s2], s_y) = (scales.map(f64::from), f64::from(self.output.scale));
        match self.kind {
            QBinaryKind::Add => AddRescale::new(s1 / s_y, s2 / s_y).map(QBinaryRescale::Add),
            QBinaryKind::Sub => AddRescale::new(s1 / s_y, -s2 / s_y).map(QBinaryRescale::Add),
            QBinaryKind::Mul => MulRescale::new(s1 * s2 / s_y).map(QBinaryRescale::Mul),
        }
    }

    fn float(&self, [s1, s2]: [f32; 2], zero_points: [i32; 2]) -> Option<QBinaryRescale> {
        let sum = |s2: f32| FloatAddRescale::new([s1, s2], zero_points, self.output);
        match self.kind {
            QBinaryKind::Add => sum(s2).map(QBinaryRescale::FloatAdd),
            QBinaryKind::Sub => sum(-s2).map(QBinaryRescale::FloatAdd),
            QBinaryKind::Mul => FloatMulRescale::new([s1, s2], self.output).map(QBinaryRescale::FloatMul),
        }
    }
}

impl Operator for QBinary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [a, b] = arity(operands)?;
        per_tensor(&a, "first operand")?;
        per_tensor(&b, "second operand")?;
        self.output.check()?;
        self.rescale(operands)?;
        let shape = a
            .shape
            .broadcast(&b.shape)
            .ok_or_else(|| OpError::shape(format!("{a} and {b} do not broadcast")))?;
        Ok(vec![TensorType::quantized(self.output.dtype, shape, self.output.params()?)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let rescale = self.rescale(types)?;
        let (_, z1) = per_tensor(types[0], "first operand")?;
        let (_, z2) = per_tensor(types[1], "second operand")?;
        let OutputGrid { zero_point, lo, hi, .. } = self.output;
        let shape = &results[0].shape;
        let codes = zip(
            (operands[0].as_slice::<u8>()?, operands[0].shape()),
            (operands[1].as_slice::<u8>()?, operands[1].shape()),
            shape,
            |a, b| {
                let code = rescale.apply([a, b].map(i32::from), [z1, z2], zero_point);
                Ok(code.clamp(lo, hi) as u8)
            },
        )?;
        Ok(vec![Tensor::from_bytes(results[0].dtype, shape.clone(), codes.into())?])
    }
}

/// Conversion to floats of 8 bits and fewer, by [`small_float_code`](crate::numerics::small_float_code).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CastSmall {
    /// The result's type.
    pub to: DType,
    /// Whether what is too large becomes the largest number.
    pub saturate: bool,
    /// How powers of two are chosen.
    pub rounding: PowerRounding,
}

impl Operator for CastSmall {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_some()
            || !self.to.is_small_float()
            || !matches!(x.dtype, DType::F32 | DType::F16 | DType::BF16)
        {
            return Err(OpError::dtype(format!("{x} as {}: takes f32, f16 and bf16", self.to)));
        }
        Ok(vec![TensorType::new(self.to, x.shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0].to_f32().unwrap_or_default();
        let code = |x: f32| numerics::small_float_code(self.to, x, self.saturate, self.rounding);
        let codes = x.into_iter().map(code).collect();
        Ok(vec![Tensor::from_vec_as::<u8>(self.to, results[0].shape.clone(), codes)?])
    }
}

impl Operator for Cast {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_some() {
            return Err(OpError::quant(format!("cast of quantized {x}; dequantize it")));
        }
        if x.dtype != self.to && (x.dtype == DType::Str || self.to == DType::Str) {
            return Err(OpError::dtype(format!("{x} as {}", self.to)));
        }
        Ok(vec![TensorType::new(self.to, x.shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0];
        if x.dtype() == self.to {
            return Ok(vec![x.clone()]);
        }
        Ok(vec![Numbers::decode(x)?.encode(self.to, x.shape().clone())?])
    }
}
