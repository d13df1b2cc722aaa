//! Ops that pick or replace elements by index. Negative indices count from the back; one that is out of range is an error
//! when the op is evaluated.

use super::{
    BinaryKind, Operator, arity,
    numbers::Numbers,
    shape::{one_grid, whole_grid},
};
use crate::{DType, Element, OpError, Shape, Tensor, TensorType, numerics::math::Real, tensor::with_element};
use serde::{Deserialize, Serialize};

/// Elements picked along an axis, each by an index of its own: with j the index of an element of `indices`, whose entry
/// along the axis is replaced by `indices[j]`, y[j] = x[j].
///
/// Operands: data, and indices of s32 or s64 of the same rank, which beside the axis reach no further than data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GatherElements {
    /// The axis.
    pub axis: usize,
}

/// Parts picked by tuples of indices: y[b…, j…, …] = x[b…, indices[b…, j…, 0], indices[b…, j…, 1]…, …].
///
/// Operands: data, and indices of s32 or s64 whose last dimension is that of the tuples.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GatherNd {
    /// How many leading dimensions data and indices have in common.
    pub batch_dims: usize,
}

/// What becomes of an element and an update of it. Of booleans a sum is `or`, a product `and`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Update {
    Replace,
    Add,
    Mul,
    /// NaN if either is.
    Max,
    /// NaN if either is.
    Min,
}

/// Data with some elements updated, those that [`GatherElements`] would pick; updates of one element follow each other in
/// row-major order. f16 and bf16 are computed in f32 and rounded once.
///
/// Operands: data, indices, and updates of the type of data and the shape of indices.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScatterElements {
    /// The axis.
    pub axis: usize,
    /// What becomes of an element.
    pub update: Update,
}

/// Data with some parts updated, those that [`GatherNd`] without batch dimensions would pick; order and rounding are as
/// in [`ScatterElements`].
///
/// Operands: data, indices, and updates of the type of data and the shape that [`GatherNd`] gives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScatterNd {
    /// What becomes of an element.
    pub update: Update,
}

/// The place that an index means in an axis: those below 0 count from the back.
///
/// # Errors
/// Where it is out of range.
pub fn position(index: i64, extent: usize, axis: usize) -> Result<usize, OpError> {
    let from_front = if index < 0 { index.saturating_add(extent as i64) } else { index };
    usize::try_from(from_front).ok().filter(|&i| i < extent).ok_or_else(|| {
        OpError::shape(format!("index {index} is out of range for axis {axis} of length {extent}"))
    })
}

/// The elements of an operand of indices.
pub(super) fn indices(operand: &Tensor) -> Result<Vec<i64>, OpError> {
    operand.to_i64().ok_or_else(|| OpError::dtype("indices that are not integers"))
}

pub(super) fn check_indices(indices: &TensorType) -> Result<(), OpError> {
    match indices.dtype {
        DType::S32 | DType::S64 if indices.quant.is_none() => Ok(()),
        _ => Err(OpError::dtype(format!("indices must be s32 or s64, not {indices}"))),
    }
}

/// Where the elements of an index space lie in a buffer, Σ index·stride, in row-major order.
struct Places<'a> {
    dims: &'a [usize],
    strides: Vec<usize>,
    index: Vec<usize>,
    at: usize,
    left: usize,
}

impl<'a> Places<'a> {
    fn new(dims: &'a Shape, strides: Vec<usize>) -> Places<'a> {
        Places { dims, strides, index: vec![0; dims.rank()], at: 0, left: dims.elements() }
    }
}

impl Iterator for Places<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let at = self.at;
        for d in (0..self.dims.len()).rev() {
            self.index[d] += 1;
            self.at += self.strides[d];
            if self.index[d] < self.dims[d] {
                break;
            }
            self.at -= self.index[d] * self.strides[d];
            self.index[d] = 0;
        }
        Some(at)
    }
}

/// Checks the indices of [`GatherElements`] and [`ScatterElements`].
fn check_elements(x: &TensorType, indices: &TensorType, axis: usize) -> Result<(), OpError> {
    check_indices(indices)?;
    let fits = x.shape.rank() == indices.shape.rank()
        && axis < x.shape.rank()
        && (0..x.shape.rank()).all(|d| d == axis || indices.shape[d] <= x.shape[d]);
    match fits {
        true => Ok(()),
        false => Err(OpError::shape(format!("axis {axis} of {x} by {indices}"))),
    }
}

/// The places in data of the elements that [`GatherElements`] picks.
fn element_places(x: &Shape, by: &Tensor, axis: usize) -> Result<Vec<usize>, OpError> {
    let mut strides = x.strides();
    let along = std::mem::take(&mut strides[axis]);
    let places = Places::new(by.shape(), strides).zip(indices(by)?);
    places.map(|(at, i)| Ok(at + position(i, x[axis], axis)? * along)).collect()
}

/// The dimensions of data behind `batch_dims` that tuples of indices leave, if the tuples fit.
fn check_tuples<'a>(
    x: &'a TensorType,
    indices: &TensorType,
    batch_dims: usize,
) -> Result<&'a [usize], OpError> {
    check_indices(indices)?;
    let rank = indices.shape.rank();
    let refuse = || OpError::shape(format!("{x} by tuples of {indices} behind {batch_dims} dimensions"));
    if batch_dims >= rank || x.shape.get(..batch_dims) != Some(&indices.shape[..batch_dims]) {
        return Err(refuse());
    }
    let tuple = indices.shape[rank - 1];
    if tuple == 0 {
        return Err(refuse());
    }
    x.shape[batch_dims..].get(tuple..).ok_or_else(refuse)
}

/// The first element of each part that tuples of indices name, and the length of the parts.
fn part_places(x: &Shape, by: &Tensor, batch_dims: usize) -> Result<(Vec<usize>, usize), OpError> {
    let (strides, shape) = (x.strides(), by.shape());
    let tuple = shape[shape.rank() - 1];
    let part = x[batch_dims + tuple..].iter().product();
    let batches: usize = shape[..batch_dims].iter().product();
    let batch: usize = x[batch_dims..].iter().product();
    let indices = indices(by)?;
    let each = (indices.len() / tuple / batches.max(1)).max(1);
    let places = indices.chunks(tuple).enumerate().map(|(n, indices)| {
        let mut at = n / each * batch;
        for (d, &i) in (batch_dims..).zip(indices) {
            at += position(i, x[d], d)? * strides[d];
        }
        Ok(at)
    });
    Ok((places.collect::<Result<_, OpError>>()?, part))
}

/// The parts of `x` that begin at these places.
fn picked(x: &Tensor, result: &TensorType, places: &[usize], part: usize) -> Result<Tensor, OpError> {
    with_element!(x.dtype(), T => {
        let elements = x.as_slice::<T>()?;
        let mut picked = Vec::with_capacity(places.len() * part);
        match part {
            1 => picked.extend(places.iter().map(|&at| elements[at])),
            _ => places.iter().for_each(|&at| picked.extend_from_slice(&elements[at..at + part])),
        }
        Ok(Tensor::from_vec_as(result.dtype, result.shape.clone(), picked)?)
    })
}

/// `x` with the parts that begin at these places updated.
fn updated(
    x: &Tensor,
    updates: &Tensor,
    places: &[usize],
    part: usize,
    update: Update,
) -> Result<Tensor, OpError> {
    let kind = match update {
        Update::Replace => {
            return with_element!(x.dtype(), T => {
                let mut elements = x.as_slice::<T>()?.to_vec();
                replace(&mut elements, updates.as_slice::<T>()?, places, part);
                Ok(Tensor::from_vec_as(x.dtype(), x.shape().clone(), elements)?)
            });
        }
        Update::Add => BinaryKind::Add,
        Update::Mul => BinaryKind::Mul,
        Update::Max => BinaryKind::Max,
        Update::Min => BinaryKind::Min,
    };
    let values = match (Numbers::decode(x)?, Numbers::decode(updates)?) {
        (Numbers::F32(x), Numbers::F32(u)) => Numbers::F32(combined_reals(x, &u, places, part, kind)?),
        (Numbers::F64(x), Numbers::F64(u)) => Numbers::F64(combined_reals(x, &u, places, part, kind)?),
        (Numbers::Int(x), Numbers::Int(u)) => {
            // Sums and products stay modulo 2^128, which wrapping to the type makes right.
            Numbers::Int(combined(x, &u, places, part, |a, b| match kind {
                BinaryKind::Add => Ok(a.wrapping_add(b)),
                _ => kind.apply_integer(a, b),
            })?)
        }
        _ => return Err(OpError::dtype("updates of another type than data")),
    };
    values.encode(x.dtype(), x.shape().clone())
}

fn replace<T: Element>(elements: &mut [T], updates: &[T], places: &[usize], part: usize) {
    if part > 0 {
        for (&at, update) in places.iter().zip(updates.chunks(part)) {
            elements[at..at + part].copy_from_slice(update);
        }
    }
}

fn combined_reals<T: Real>(
    elements: Vec<T>,
    updates: &[T],
    places: &[usize],
    part: usize,
    kind: BinaryKind,
) -> Result<Vec<T>, OpError> {
    // One that cannot fail is one for all of a part.
    match kind {
        BinaryKind::Add => combined(elements, updates, places, part, |a, b| Ok(a + b)),
        _ => combined(elements, updates, places, part, |a, b| kind.apply_real(a, b)),
    }
}

fn combined<T: Copy>(
    mut elements: Vec<T>,
    updates: &[T],
    places: &[usize],
    part: usize,
    f: impl Fn(T, T) -> Result<T, OpError>,
) -> Result<Vec<T>, OpError> {
    if part > 0 {
        for (&at, update) in places.iter().zip(updates.chunks(part)) {
            for (x, &u) in elements[at..at + part].iter_mut().zip(update) {
                *x = f(*x, u)?;
            }
        }
    }
    Ok(elements)
}

impl Operator for GatherElements {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices] = arity(operands)?;
        whole_grid(&x)?;
        check_elements(&x, &indices, self.axis)?;
        Ok(vec![x.with_shape(indices.shape)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let places = element_places(operands[0].shape(), operands[1], self.axis)?;
        Ok(vec![picked(operands[0], &results[0], &places, 1)?])
    }
}

impl Operator for GatherNd {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices] = arity(operands)?;
        whole_grid(&x)?;
        let part = check_tuples(&x, &indices, self.batch_dims)?;
        let mut dims = indices.shape[..indices.shape.rank() - 1].to_vec();
        dims.extend(part);
        Ok(vec![x.with_shape(Shape::new(dims)?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (places, part) = part_places(operands[0].shape(), operands[1], self.batch_dims)?;
        Ok(vec![picked(operands[0], &results[0], &places, part)?])
    }
}

/// Checks data and updates, and gives the type of the result.
fn updated_type(
    x: TensorType,
    updates: &TensorType,
    shape: &[usize],
    update: Update,
) -> Result<TensorType, OpError> {
    one_grid(&x, updates)?;
    if x.quant.is_some() && update != Update::Replace {
        return Err(OpError::quant(format!("{update:?} of quantized {x}")));
    }
    if x.dtype == DType::Str && update != Update::Replace {
        return Err(OpError::dtype(format!("{update:?} of {x}")));
    }
    if *updates.shape != *shape {
        return Err(OpError::shape(format!("updates {updates} where {shape:?} are picked of {x}")));
    }
    Ok(x)
}

impl Operator for ScatterElements {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices, updates] = arity(operands)?;
        check_elements(&x, &indices, self.axis)?;
        Ok(vec![updated_type(x, &updates, &indices.shape, self.update)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let places = element_places(operands[0].shape(), operands[1], self.axis)?;
        Ok(vec![updated(operands[0], operands[2], &places, 1, self.update)?])
    }
}

impl Operator for ScatterNd {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices, updates] = arity(operands)?;
        let mut dims = indices.shape.to_vec();
        dims.pop();
        dims.extend(check_tuples(&x, &indices, 0)?);
        Ok(vec![updated_type(x, &updates, &dims, self.update)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (places, part) = part_places(operands[0].shape(), operands[1], 0)?;
        Ok(vec![updated(operands[0], operands[2], &places, part, self.update)?])
    }
}
