//! Functions of elements.

use super::{Operator, arity, conv::per_tensor};
use crate::{DType, OpError, OutputGrid, TensorType};
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
    /// Within bounds; see [`Clamp`](super::Clamp).
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
    /// x·max(0, min(1, x/6 + ½)).
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
    /// −1, 0 or 1.
    Sign,
    Floor,
    Ceil,
    /// Half to even.
    Round,
    Sin,
    Cos,
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
    Max,
    Min,
    Pow,
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    And,
    Or,
    Xor,
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
/// of quantized elements, broadcast by NumPy's rules.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QBinary {
    /// The function.
    pub kind: QBinaryKind,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// Conversion between element types. Float to integer truncates and saturates; NaN becomes 0.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cast {
    /// The result's type.
    pub to: DType,
}

impl BinaryKind {
    /// Whether the result is a truth value of a comparison.
    pub fn is_comparison(self) -> bool {
        use BinaryKind::*;
        matches!(self, Equal | Less | LessOrEqual | Greater | GreaterOrEqual)
    }
    /// Whether operands are truth values.
    pub fn is_logical(self) -> bool {
        use BinaryKind::*;
        matches!(self, And | Or | Xor)
    }
}

impl Operator for Unary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        use UnaryKind::*;
        let [x] = arity(operands)?;
        let allowed = match self.kind {
            Not => x.dtype == DType::Bool,
            Identity => true,
            Neg | Abs | Sign | Relu | Clip { .. } => x.dtype != DType::Bool,
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
        let bool_operands = a.dtype == DType::Bool;
        if bool_operands != self.kind.is_logical() && !(bool_operands && self.kind == BinaryKind::Equal) {
            return Err(OpError::dtype(format!("{:?} of {a} and {b}", self.kind)));
        }
        let shape = a
            .shape
            .broadcast(&b.shape)
            .ok_or_else(|| OpError::shape(format!("{a} and {b} do not broadcast")))?;
        let dtype = if self.kind.is_comparison() { DType::Bool } else { a.dtype };
        Ok(vec![TensorType::new(dtype, shape)])
    }
}

impl Operator for QUnary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.dtype.size() != 1 || x.per_tensor().is_none() || self.kind == UnaryKind::Not {
            return Err(OpError::quant(format!("{:?} of {x}: takes 8-bit codes of one grid", self.kind)));
        }
        self.output.check()?;
        Ok(vec![TensorType::quantized(self.output.dtype, x.shape, self.output.params()?)?])
    }
}

impl Operator for QBinary {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [a, b] = arity(operands)?;
        per_tensor(&a, "first operand")?;
        per_tensor(&b, "second operand")?;
        self.output.check()?;
        let shape = a
            .shape
            .broadcast(&b.shape)
            .ok_or_else(|| OpError::shape(format!("{a} and {b} do not broadcast")))?;
        Ok(vec![TensorType::quantized(self.output.dtype, shape, self.output.params()?)?])
    }
}

impl Operator for Cast {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_some() {
            return Err(OpError::quant(format!("cast of quantized {x}; dequantize it")));
        }
        Ok(vec![TensorType::new(self.to, x.shape)])
    }
}
