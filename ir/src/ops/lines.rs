//! Ops on the lines along one axis: what is largest, and running totals.

use super::{Operator, arity, numbers::Numbers};
use crate::{DType, Element, OpError, Shape, Tensor, TensorType, tensor::with_element};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// The place of the largest or smallest element along an axis, as s64. NaN is both, as in [`Reduce`](super::Reduce).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ArgExtreme {
    /// Whether the largest is meant, and not the smallest.
    pub largest: bool,
    /// The axis.
    pub axis: usize,
    /// Whether the axis stays, with length 1.
    pub keep_dims: bool,
    /// Whether the last one of equal elements is meant, and not the first.
    pub last: bool,
}

/// The places of the `k` largest or smallest elements along an axis, in that order, as s64; of equal elements those with
/// lower indices come first. NaN is above all numbers. [`GatherElements`](super::GatherElements) gives the elements.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TopK {
    /// How many.
    pub k: usize,
    /// The axis.
    pub axis: usize,
    /// Whether the largest are meant, and not the smallest.
    pub largest: bool,
}

/// What [`Cumulate`] makes of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum CumulateKind {
    Sum,
    Product,
}

/// Running totals along an axis, one element after the other. Integers wrap; f16 and bf16 are added in f32 and each
/// total is rounded once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cumulate {
    /// What is made of the elements.
    pub kind: CumulateKind,
    /// The axis.
    pub axis: usize,
    /// Whether an element's own place has the total of those before it only.
    pub exclusive: bool,
    /// Whether it goes from the end.
    pub reverse: bool,
}

/// Fails for texts, whose numbers have no order that means something.
fn check_ordered(x: &TensorType) -> Result<(), OpError> {
    match x.dtype {
        DType::Str => Err(OpError::dtype(format!("{x} has no order"))),
        _ => Ok(()),
    }
}

/// The lines along an axis: element i of one stands `i·stride` behind its start.
#[derive(Clone, Copy)]
struct Lines {
    outer: usize,
    len: usize,
    stride: usize,
}

impl Lines {
    fn new(shape: &Shape, axis: usize) -> Lines {
        let outer = shape[..axis].iter().product();
        Lines { outer, len: shape[axis], stride: shape[axis + 1..].iter().product() }
    }

    /// The start of each line of a tensor with `len` elements along the axis, row-major in the other axes.
    fn starts(self, len: usize) -> impl Iterator<Item = usize> {
        (0..self.outer).flat_map(move |o| (0..self.stride).map(move |i| o * len * self.stride + i))
    }
}

fn check_axis(x: &TensorType, axis: usize) -> Result<(), OpError> {
    if x.dtype.is_small_float() {
        return Err(OpError::dtype(format!("{x} is only stored and moved; cast it")));
    }
    match axis < x.shape.rank() {
        true => Ok(()),
        false => Err(OpError::attribute(format!("axis {axis} of {x}"))),
    }
}

fn is_nan<T: PartialOrd>(x: &T) -> bool {
    x.partial_cmp(x).is_none()
}

/// By size, NaN above all numbers.
pub(crate) fn by_size<T: PartialOrd>(a: &T, b: &T) -> Ordering {
    a.partial_cmp(b).unwrap_or_else(|| is_nan(a).cmp(&is_nan(b)))
}

impl ArgExtreme {
    fn of<T: Element>(&self, x: &[T], lines: Lines) -> Vec<i64> {
        // Whether `new`, which comes later, takes the place of `best`.
        let wins = |best: &T, new: &T| match new.partial_cmp(best) {
            Some(Ordering::Equal) => self.last,
            Some(order) => (order == Ordering::Greater) == self.largest,
            None => is_nan(new) && (self.last || !is_nan(best)),
        };
        let place = |start: usize| {
            let element = |i: usize| &x[start + i * lines.stride];
            (1..lines.len).fold(0, |best, i| if wins(element(best), element(i)) { i } else { best }) as i64
        };
        lines.starts(lines.len).map(place).collect()
    }
}

impl Operator for ArgExtreme {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        check_axis(&x, self.axis)?;
        check_ordered(&x)?;
        let mut dims = x.shape.to_vec();
        dims[self.axis] = 1;
        if !self.keep_dims {
            dims.remove(self.axis);
        }
        let shape = Shape::new(dims)?;
        if x.shape[self.axis] == 0 && shape.elements() > 0 {
            return Err(OpError::shape(format!("axis {} of {x} has no elements", self.axis)));
        }
        Ok(vec![TensorType::new(DType::S64, shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0];
        let lines = Lines::new(x.shape(), self.axis);
        let places = with_element!(x.dtype(), T => self.of(x.as_slice::<T>()?, lines));
        Ok(vec![Tensor::from_vec(results[0].shape.clone(), places)?])
    }
}

impl TopK {
    fn of<T: Element>(&self, x: &[T], lines: Lines) -> Vec<i64> {
        let mut places = vec![0i64; lines.outer * self.k * lines.stride];
        let mut line: Vec<usize> = Vec::with_capacity(lines.len);
        for (start, to) in lines.starts(lines.len).zip(lines.starts(self.k)) {
            let element = |i: usize| &x[start + i * lines.stride];
            let order = |&a: &usize, &b: &usize| {
                let by_size = by_size(element(a), element(b));
                if self.largest { by_size.reverse() } else { by_size }.then(a.cmp(&b))
            };
            line.clear();
            line.extend(0..lines.len);
            if self.k < lines.len {
                line.select_nth_unstable_by(self.k, order);
                line.truncate(self.k);
            }
            line.sort_unstable_by(order);
            for (i, &place) in line.iter().enumerate() {
                places[to + i * lines.stride] = place as i64;
            }
        }
        places
    }
}

impl Operator for TopK {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        check_axis(&x, self.axis)?;
        check_ordered(&x)?;
        if self.k > x.shape[self.axis] {
            return Err(OpError::shape(format!("the top {} along axis {} of {x}", self.k, self.axis)));
        }
        let mut dims = x.shape.to_vec();
        dims[self.axis] = self.k;
        Ok(vec![TensorType::new(DType::S64, Shape::new(dims)?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0];
        let lines = Lines::new(x.shape(), self.axis);
        let places = with_element!(x.dtype(), T => self.of(x.as_slice::<T>()?, lines));
        Ok(vec![Tensor::from_vec(results[0].shape.clone(), places)?])
    }
}

impl Cumulate {
    /// Replaces the elements by their totals.
    fn of<T: Copy>(&self, x: &mut [T], lines: Lines, neutral: T, f: impl Fn(T, T) -> T) {
        for start in lines.starts(lines.len) {
            let mut total = neutral;
            for i in 0..lines.len {
                let i = if self.reverse { lines.len - 1 - i } else { i };
                let element = &mut x[start + i * lines.stride];
                let before = total;
                total = f(total, *element);
                *element = if self.exclusive { before } else { total };
            }
        }
    }
}

impl Operator for Cumulate {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        check_axis(&x, self.axis)?;
        if x.quant.is_some() || matches!(x.dtype, DType::Bool | DType::Str) {
            return Err(OpError::dtype(format!("takes plain numbers, got {x}")));
        }
        Ok(vec![x])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let lines = Lines::new(operands[0].shape(), self.axis);
        let mut values = Numbers::decode(operands[0])?;
        match (&mut values, self.kind) {
            (Numbers::F32(x), CumulateKind::Sum) => self.of(x, lines, 0.0, |a, b| a + b),
            (Numbers::F32(x), CumulateKind::Product) => self.of(x, lines, 1.0, |a, b| a * b),
            (Numbers::F64(x), CumulateKind::Sum) => self.of(x, lines, 0.0, |a, b| a + b),
            (Numbers::F64(x), CumulateKind::Product) => self.of(x, lines, 1.0, |a, b| a * b),
            (Numbers::Int(x), CumulateKind::Sum) => self.of(x, lines, 0, i128::wrapping_add),
            (Numbers::Int(x), CumulateKind::Product) => self.of(x, lines, 1, i128::wrapping_mul),
        }
        Ok(vec![values.encode(results[0].dtype, results[0].shape.clone())?])
    }
}
