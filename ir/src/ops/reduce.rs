//! Reductions.

use super::{Operator, arity, numbers::Numbers};
use crate::{
    OpError, Shape, Tensor, TensorType,
    numerics::{math::Real, total},
};
use ndarray::{ArrayViewD, IxDyn};
use serde::{Deserialize, Serialize};

/// What a reduction makes of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ReduceKind {
    Sum,
    Mean,
    Max,
    Min,
    Product,
    /// Σ x².
    SumSquare,
    /// Σ |x|.
    L1,
    /// √Σ x².
    L2,
    /// ln Σ x.
    LogSum,
    /// m + ln Σ e^(x − m) with m the maximum (0 where that is infinite).
    LogSumExp,
}

/// A reduction along axes, elements in row-major order.
///
/// Floats: totals are made in the order of [`total`]; sums and products start at 0 and 1; f16 and bf16 are summed in f32
/// and rounded once; NaN is the maximum and the minimum of whatever it is in. Integers: sums and products wrap; a mean is the exact one, truncated; L2, LogSum
/// and LogSumExp are computed in f64 and truncated.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reduce {
    /// What is made of the elements.
    pub kind: ReduceKind,
    /// The axes that are reduced: ascending, without duplicates; none reduces nothing.
    pub axes: Vec<usize>,
    /// Whether reduced axes stay, with length 1.
    pub keep_dims: bool,
}

impl Operator for Reduce {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_some() || !(x.dtype.is_float() || x.dtype.is_integer()) {
            return Err(OpError::dtype(format!("takes plain numbers, got {x}")));
        }
        if !self.axes.is_sorted_by(|a, b| a < b) || self.axes.iter().any(|&a| a >= x.shape.rank()) {
            return Err(OpError::attribute(format!("axes {:?} of {x}", self.axes)));
        }
        let dims: Vec<usize> = (0..x.shape.rank())
            .filter_map(|d| match self.axes.contains(&d) {
                false => Some(x.shape[d]),
                true => self.keep_dims.then_some(1),
            })
            .collect();
        let y = Shape::new(dims)?;
        let needs_element = matches!(self.kind, ReduceKind::Max | ReduceKind::Min | ReduceKind::Mean);
        if needs_element && x.dtype.is_integer() && x.shape.elements() == 0 && y.elements() > 0 {
            return Err(OpError::shape(format!("{:?} over no elements of {x}", self.kind)));
        }
        Ok(vec![x.with_shape(y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0].shape(), &results[0].shape);
        let kind = self.kind;
        let in_f64 = matches!(kind, ReduceKind::L2 | ReduceKind::LogSum | ReduceKind::LogSumExp);
        let values = match Numbers::decode(operands[0])? {
            Numbers::F32(v) => Numbers::F32(self.groups(&v, x, y, |g| kind.of_reals(g))?),
            Numbers::F64(v) => Numbers::F64(self.groups(&v, x, y, |g| kind.of_reals(g))?),
            Numbers::Int(v) if in_f64 => {
                let v: Vec<f64> = v.into_iter().map(|x| x as f64).collect();
                Numbers::F64(self.groups(&v, x, y, |g| kind.of_reals(g))?)
            }
            Numbers::Int(v) => Numbers::Int(self.groups(&v, x, y, |g| kind.of_integers(g))?),
        };
        Ok(vec![values.encode(results[0].dtype, y.clone())?])
    }
}

impl Reduce {
    /// f of the elements that each result is made of.
    fn groups<T: Copy, U>(
        &self,
        elements: &[T],
        x: &Shape,
        y: &Shape,
        f: impl Fn(&[T]) -> U,
    ) -> Result<Vec<U>, OpError> {
        if elements.is_empty() {
            return Ok((0..y.elements()).map(|_| f(&[])).collect());
        }
        let view = ArrayViewD::from_shape(IxDyn(x), elements).map_err(|e| OpError::shape(e.to_string()))?;
        let kept = (0..x.rank()).filter(|d| !self.axes.contains(d));
        let order: Vec<usize> = kept.chain(self.axes.iter().copied()).collect();
        let grouped: Vec<T> = view.permuted_axes(IxDyn(&order)).iter().copied().collect();
        Ok(grouped.chunks(elements.len() / y.elements()).map(f).collect())
    }
}

impl ReduceKind {
    fn of_reals<T: Real>(self, x: &[T]) -> T {
        let (zero, one) = (T::of(0.0), T::of(1.0));
        let sum = |f: &dyn Fn(T) -> T| total(x, zero, |sum, &x| sum + f(x), |a, b| a + b);
        let max = || total(x, T::of(f64::NEG_INFINITY), |max, &x| max.larger(x), T::larger);
        match self {
            ReduceKind::Sum => sum(&|x| x),
            ReduceKind::Mean => sum(&|x| x) / T::of(x.len() as f64),
            ReduceKind::Max => max(),
            ReduceKind::Min => total(x, T::of(f64::INFINITY), |min, &x| min.smaller(x), T::smaller),
            ReduceKind::Product => total(x, one, |product, &x| product * x, |a, b| a * b),
            ReduceKind::SumSquare => sum(&|x| x * x),
            ReduceKind::L1 => sum(&T::abs),
            ReduceKind::L2 => sum(&|x| x * x).sqrt(),
            ReduceKind::LogSum => sum(&|x| x).ln(),
            ReduceKind::LogSumExp => {
                let m = max();
                let m = if m.abs() < T::of(f64::INFINITY) { m } else { zero };
                m + sum(&|x| (x - m).exp()).ln()
            }
        }
    }

    /// Modulo 2^128, which wrapping to the result's type makes right. The kinds that are not here are computed in f64.
    fn of_integers(self, x: &[i128]) -> i128 {
        let sum = |f: fn(i128) -> i128| x.iter().fold(0i128, |sum, &x| sum.wrapping_add(f(x)));
        match self {
            ReduceKind::Sum | ReduceKind::LogSum | ReduceKind::LogSumExp => sum(|x| x),
            ReduceKind::Mean => sum(|x| x) / (x.len() as i128).max(1),
            ReduceKind::Max => x.iter().copied().max().unwrap_or(0),
            ReduceKind::Min => x.iter().copied().min().unwrap_or(0),
            ReduceKind::Product => x.iter().fold(1, |product, &x| product.wrapping_mul(x)),
            ReduceKind::SumSquare | ReduceKind::L2 => sum(|x| x.wrapping_mul(x)),
            ReduceKind::L1 => sum(i128::abs),
        }
    }
}
