//! Matrix products.

use super::{
    Clamp, Operator, arity,
    conv::{
        all_f32, check_extras, check_weights, operand, per_tensor, requantized, requantizer, unravel,
        weight_bounds,
    },
    numbers::Numbers,
};
use crate::{
    DType, Element, OpError, OutputGrid, Shape, Tensor, TensorType,
    numerics::{ChannelBounds, RequantMode, Requantizer, WeightSums},
};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// y = clamp(a·b + bias + residual), in f32: `[…, M, K]·[…, K, N]` with leading dimensions broadcast.
///
/// Operands: a and b of rank 2 or more; bias `[N]` if [`bias`](Self::bias); a tensor of the result's shape if
/// [`residual`](Self::residual). Gemm's scaling and transposes, and vectors, are expressed by other ops at import.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MatMul {
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// Bounds on the result.
    pub clamp: Clamp,
}

/// [`MatMul`] on quantized operands: accumulates in s32 and requantizes once.
///
/// The first operand is `[…, M, K]` u8 with one grid. The second is either a matrix of weights, `[K, N]` s8, symmetric,
/// one scale a column or one for all; or another activation, `[…, K, N]` u8 with one grid, and then leading dimensions
/// are broadcast. Bias s32 `[N]` in units of s_a·s_b; residual u8 with one grid. With z_b = 0 for weights,
///
/// ```text
/// acc[m, n] = q_bias[n] + Σ_k (q_a[m, k] − z_a)·(q_b[k, n] − z_b)
/// y[m, n]   = requantize(acc[m, n], q_residual[m, n])               with S = s_a·s_b/s_y
/// ```
///
/// where requantize is [`Requantizer::apply`]. Kernels multiply u8 by s8. To them a second activation is
/// q_b − 128, which is s8, beside d = z_b − 128, and
///
/// ```text
/// acc[m, n] = q_bias[n] − z_a·Σ_k (q_b[k, n] − 128 − d) + Σ_k q_a[m, k]·(q_b[k, n] − 128) − d·Σ_k q_a[m, k]
/// ```
///
/// whose last term vanishes on a symmetric grid, z_b = 128.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QMatMul {
    /// Whether there is a bias operand.
    pub bias: bool,
    /// Whether there is a residual operand (the last).
    pub residual: bool,
    /// The formula of the requantization.
    pub requant: RequantMode,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// y = a·b of numbers that have no kernels: `[…, M, K]·[…, K, N]` with leading dimensions broadcast, of f64, or of
/// integers of 32 or 64 bits, which wrap. Nothing is fused into it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlainMatMul {}

impl Operator for PlainMatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [a, b] = arity(operands)?;
        let of_numbers = matches!(a.dtype, DType::F64 | DType::S32 | DType::U32 | DType::S64 | DType::U64);
        if !of_numbers || a.dtype != b.dtype || a.quant.is_some() || b.quant.is_some() {
            return Err(OpError::dtype(format!(
                "takes f64 or plain integers of 32 or 64 bits, got {a} and {b}"
            )));
        }
        Ok(vec![TensorType::new(a.dtype, product_shape(&a.shape, &b.shape)?)])
    }

    /// Each sum with k ascending.
    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let y = &results[0].shape;
        Ok(vec![match results[0].dtype {
            DType::F64 => plain_product(operands, y, |sum, a: f64, b| sum + a * b)?,
            DType::S32 => plain_product(operands, y, |sum, a: i32, b| sum.wrapping_add(a.wrapping_mul(b)))?,
            DType::U32 => plain_product(operands, y, |sum, a: u32, b| sum.wrapping_add(a.wrapping_mul(b)))?,
            DType::S64 => plain_product(operands, y, |sum, a: i64, b| sum.wrapping_add(a.wrapping_mul(b)))?,
            _ => plain_product(operands, y, |sum, a: u64, b| sum.wrapping_add(a.wrapping_mul(b)))?,
        }])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

fn plain_product<T: Element + Default>(
    operands: &[&Tensor],
    y: &Shape,
    add: impl Fn(T, T, T) -> T,
) -> Result<Tensor, OpError> {
    let (a, b) = (operands[0].as_slice::<T>()?, operands[1].as_slice::<T>()?);
    let mut sums = start::<T>(y, None);
    for_each_row(operands[0].shape(), operands[1].shape(), y, |row, a_at, b_at| {
        let sums = &mut sums[row];
        for (&a, b) in a[a_at].iter().zip(b[b_at].chunks(sums.len())) {
            sums.iter_mut().zip(b).for_each(|(s, &b)| *s = add(*s, a, b));
        }
    });
    Ok(Tensor::from_vec(y.clone(), sums)?)
}

/// The determinant of each matrix `[…, N, N]` of floats: by elimination with the largest pivot of a column, in f64, and
/// rounded once. 1 of the matrix without elements.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Determinant {}

impl Operator for Determinant {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        match x.shape.dims() {
            [lead @ .., m, n] if m == n && x.dtype.is_float() => Ok(vec![x.with_shape(Shape::new(lead)?)]),
            _ => Err(OpError::shape(format!("takes square matrices of floats, got {x}"))),
        }
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let n = operands[0].shape()[results[0].shape.rank()];
        let mut elements = match Numbers::decode(operands[0])? {
            Numbers::F32(x) => x.into_iter().map(f64::from).collect(),
            Numbers::F64(x) => x,
            Numbers::Int(_) => return Err(OpError::dtype("a determinant of integers")),
        };
        let determinants = match n {
            0 => vec![1.0; results[0].shape.elements()],
            _ => elements.chunks_mut(n * n).map(|matrix| determinant(matrix, n)).collect(),
        };
        Ok(vec![Numbers::F64(determinants).encode(results[0].dtype, results[0].shape.clone())?])
    }

    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let shape = &operands[0].shape;
        (shape.elements() as u64).saturating_mul(shape.last().map_or(0, |&n| n as u64)) / 3
    }
}

/// The inverse of each matrix `[…, N, N]` of floats: by elimination with the largest pivot of a column, in f64, and rounded
/// once. A matrix that has none is an error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Inverse {}

impl Operator for Inverse {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        match x.shape.dims() {
            [.., m, n] if m == n && x.dtype.is_float() => Ok(vec![TensorType::new(x.dtype, x.shape.clone())]),
            _ => Err(OpError::shape(format!("takes square matrices of floats, got {x}"))),
        }
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let n = results[0].shape.last().copied().unwrap_or(0);
        let mut elements = match Numbers::decode(operands[0])? {
            Numbers::F32(x) => x.into_iter().map(f64::from).collect(),
            Numbers::F64(x) => x,
            Numbers::Int(_) => return Err(OpError::dtype("an inverse of integers")),
        };
        for matrix in elements.chunks_mut((n * n).max(1)) {
            invert(matrix, n)?;
        }
        Ok(vec![Numbers::F64(elements).encode(results[0].dtype, results[0].shape.clone())?])
    }

    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let shape = &operands[0].shape;
        (shape.elements() as u64).saturating_mul(shape.last().map_or(0, |&n| n as u64))
    }
}

/// The row whose element in column `i` is the largest, of those from row `i` on.
fn pivot_row(a: &[f64], n: usize, i: usize) -> usize {
    let size = |row: usize| a[row * n + i].abs();
    (i + 1..n).fold(i, |best, row| if size(row) > size(best) { row } else { best })
}

/// Gauss–Jordan elimination in place; the exchanges of rows are undone as exchanges of columns at the end.
fn invert(a: &mut [f64], n: usize) -> Result<(), OpError> {
    let mut exchanged = Vec::new();
    for i in 0..n {
        let pivot = pivot_row(a, n, i);
        if pivot != i {
            (0..n).for_each(|column| a.swap(pivot * n + column, i * n + column));
            exchanged.push((i, pivot));
        }
        let p = a[i * n + i];
        if p == 0.0 || !p.is_finite() {
            return Err(OpError::unsupported("the inverse of a singular matrix"));
        }
        a[i * n + i] = 1.0;
        a[i * n..(i + 1) * n].iter_mut().for_each(|x| *x /= p);
        for row in (0..n).filter(|&row| row != i) {
            let factor = std::mem::replace(&mut a[row * n + i], 0.0);
            for column in 0..n {
                a[row * n + column] -= factor * a[i * n + column];
            }
        }
    }
    for (i, pivot) in exchanged.into_iter().rev() {
        (0..n).for_each(|row| a.swap(row * n + i, row * n + pivot));
    }
    Ok(())
}

/// Of the `n`×`n` matrix, which becomes triangular.
fn determinant(a: &mut [f64], n: usize) -> f64 {
    let mut product = 1.0;
    for i in 0..n {
        let pivot = pivot_row(a, n, i);
        if pivot != i {
            (i..n).for_each(|column| a.swap(pivot * n + column, i * n + column));
            product = -product;
        }
        let p = a[i * n + i];
        product *= p;
        if p == 0.0 {
            return 0.0;
        }
        let (above, below) = a.split_at_mut((i + 1) * n);
        let pivot_row = &above[i * n..];
        for row in below.chunks_mut(n) {
            let factor = row[i] / p;
            (i..n).for_each(|column| row[column] -= factor * pivot_row[column]);
        }
    }
    product
}

pub(super) fn product_shape(a: &Shape, b: &Shape) -> Result<Shape, OpError> {
    let (ra, rb) = (a.rank(), b.rank());
    if ra < 2 || rb < 2 {
        return Err(OpError::shape(format!("takes matrices, got {a:?} and {b:?}")));
    }
    if a[ra - 1] != b[rb - 2] {
        return Err(OpError::shape(format!(
            "inner dimensions differ: {a:?} has {}, {b:?} has {}",
            a[ra - 1],
            b[rb - 2]
        )));
    }
    let lead = Shape::new(&a[..ra - 2])?.broadcast(&Shape::new(&b[..rb - 2])?);
    let mut dims: Vec<usize> =
        lead.ok_or_else(|| OpError::shape(format!("{a:?} and {b:?} do not broadcast")))?.into();
    dims.extend([a[ra - 2], b[rb - 1]]);
    Ok(Shape::new(dims)?)
}

impl MatMul {
    /// The number of the matrix of an operand of this shape that takes part in matrix `i` of a result of shape `y`, by
    /// the rules of broadcasting.
    pub fn matrix_of_operand(operand: &Shape, y: &Shape, i: usize) -> usize {
        let (own, lead) = (&operand[..operand.rank() - 2], &y[..y.rank() - 2]);
        let index = unravel(i, lead);
        let index = &index[lead.len() - own.len()..];
        own.iter().zip(index).fold(0, |at, (&d, &i)| at * d + if d == 1 { 0 } else { i })
    }

    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }
}

impl QMatMul {
    /// Operand slot of the residual, if there is one.
    pub fn residual_slot(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }

    /// The axis of the weights that the output channels are along.
    pub const CHANNEL_AXIS: usize = 1;

    /// Whether the second operand is an activation, by the types of the operands: then it has no weights.
    pub fn is_of_activations(types: &[&TensorType]) -> bool {
        types.get(1).is_some_and(|b| b.dtype == DType::U8)
    }

    /// The requantization of this op for weights of these sums (along [`CHANNEL_AXIS`](Self::CHANNEL_AXIS)) and this
    /// bias, as interpreter and kernels use it.
    pub fn requantizer(
        &self,
        types: &[&TensorType],
        weights: &[WeightSums],
        bias: Option<&Tensor>,
    ) -> Result<Requantizer, OpError> {
        let bounds = weight_bounds(types[0], weights, bias)?;
        let residual = self.residual_slot().map(|s| types[s]);
        requantizer(types[0], types[1], residual, &bounds, self.requant, self.output)
    }

    /// The requantization of this op where the second operand [is an activation](Self::is_of_activations), as
    /// interpreter and kernels use it.
    ///
    /// # Errors
    /// Where a sum could leave 32 bits, or the mode cannot express the factor.
    pub fn requantizer_of_activations(
        &self,
        types: &[&TensorType],
        bias: Option<&Tensor>,
    ) -> Result<Requantizer, OpError> {
        let bounds = Self::bounds_of_activations(types, bias)?;
        let residual = self.residual_slot().map(|s| types[s]);
        requantizer(types[0], types[1], residual, &bounds, self.requant, self.output)
    }

    /// The bounds of each column's accumulators in a product of two activations, whatever their codes.
    pub fn bounds_of_activations(
        types: &[&TensorType],
        bias: Option<&Tensor>,
    ) -> Result<Vec<ChannelBounds>, OpError> {
        let (a, b) = (operand(types, 0)?, operand(types, 1)?);
        let ((_, z_a), (_, z_b)) = (per_tensor(a, "input")?, per_tensor(b, "second operand")?);
        let &[.., inner, columns] = &b.shape[..] else {
            return Err(OpError::shape(format!("takes matrices, got {b}")));
        };
        let bias = bias.map(|b| b.as_slice::<i32>()).transpose()?;
        let of_column = |n: usize| ChannelBounds::of_activations(inner, z_a, z_b, bias.map_or(0, |b| b[n]));
        Ok((0..columns).map(of_column).collect())
    }
}

impl Operator for MatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        all_f32(operands)?;
        self.clamp.check()?;
        let y = product_shape(&a.shape, &b.shape)?;
        check_extras(
            operands,
            2,
            self.bias.then_some((DType::F32, y[y.rank() - 1])),
            self.residual.then_some((DType::F32, &y)),
        )?;
        Ok(vec![TensorType::new(DType::F32, y)])
    }

    /// Each sum in f32, k ascending, bias first, residual last.
    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let y = &results[0].shape;
        let (a, b) = (operands[0].as_slice::<f32>()?, operands[1].as_slice::<f32>()?);
        let mut sums = start(y, self.bias.then(|| operands[2].as_slice::<f32>()).transpose()?);
        for_each_row(operands[0].shape(), operands[1].shape(), y, |row, a_at, b_at| {
            let sums = &mut sums[row];
            for (a, b) in a[a_at].iter().zip(b[b_at].chunks(sums.len())) {
                sums.iter_mut().zip(b).for_each(|(s, b)| *s += a * b);
            }
        });
        if let Some(slot) = self.residual_slot() {
            for (s, r) in sums.iter_mut().zip(operands[slot].as_slice::<f32>()?) {
                *s += r;
            }
        }
        sums.iter_mut().for_each(|s| *s = self.clamp.apply(*s));
        Ok(vec![Tensor::from_vec(y.clone(), sums)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

/// Results before the products are added: the bias in each row, or zeros.
pub(super) fn start<T: Copy + Default>(y: &Shape, bias: Option<&[T]>) -> Vec<T> {
    match bias {
        Some(bias) if !bias.is_empty() => bias.iter().copied().cycle().take(y.elements()).collect(),
        _ => vec![T::default(); y.elements()],
    }
}

/// Visits each row of a product: `f(elements of the result, of the row of a, of the matrix b)`. Rows that hold nothing
/// are left out.
pub(super) fn for_each_row(
    a: &Shape,
    b: &Shape,
    y: &Shape,
    mut f: impl FnMut(Range<usize>, Range<usize>, Range<usize>),
) {
    let (k, n) = (a[a.rank() - 1], y[y.rank() - 1]);
    if y.elements() == 0 || k == 0 {
        return;
    }
    let rows = y[y.rank() - 2];
    for m in 0..y.elements() / (rows * n) {
        let matrix = |operand: &Shape| MatMul::matrix_of_operand(operand, y, m);
        let (a_at, b_at) = (matrix(a) * rows * k, matrix(b) * k * n);
        for r in 0..rows {
            let y_at = (m * rows + r) * n;
            f(y_at..y_at + n, a_at + r * k..a_at + (r + 1) * k, b_at..b_at + k * n);
        }
    }
}

impl Operator for QMatMul {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (a, b) = (operand(operands, 0)?, operand(operands, 1)?);
        per_tensor(a, "input")?;
        if Self::is_of_activations(operands) {
            per_tensor(b, "second operand")?;
        } else {
            check_weights(b, Self::CHANNEL_AXIS)?;
            if b.shape.rank() != 2 {
                return Err(OpError::shape(format!("weights must be a matrix, got {b}")));
            }
        }
        self.output.check()?;
        if self.output.dtype != DType::U8 {
            return Err(OpError::quant(format!("writes u8, not {}", self.output.dtype)));
        }
        let y = product_shape(&a.shape, &b.shape)?;
        check_extras(
            operands,
            2,
            self.bias.then_some((DType::S32, y[y.rank() - 1])),
            self.residual.then_some((DType::U8, &y)),
        )?;
        if let Some(slot) = self.residual_slot() {
            per_tensor(operands[slot], "residual")?;
        }
        Ok(vec![TensorType::quantized(DType::U8, y, self.output.params()?)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let y = &results[0].shape;
        let bias = self.bias.then(|| operands[2]);
        let mut sums = start(y, bias.map(|b| b.as_slice::<i32>()).transpose()?);
        let requantizer = if Self::is_of_activations(types) {
            let (_, z_b) = per_tensor(types[1], "second operand")?;
            add_products(operands, types[0], operands[1].as_slice::<u8>()?, z_b, y, &mut sums)?;
            self.requantizer_of_activations(types, bias)?
        } else {
            add_products(operands, types[0], operands[1].as_slice::<i8>()?, 0, y, &mut sums)?;
            let weights = WeightSums::by_channel(operands[1], Self::CHANNEL_AXIS)?;
            self.requantizer(types, &weights, bias)?
        };
        let residual = self.residual_slot().map(|s| operands[s].as_slice::<u8>()).transpose()?;
        Ok(vec![requantized(&requantizer, y, y.rank() - 1, &sums, residual)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        product_macs(operands, results)
    }
}

/// Adds Σ_k (q_a − z_a)·(q_b − z_b) to each sum. As in a convolution: partial sums may wrap, the whole may not.
fn add_products<B: Copy + Into<i32>>(
    operands: &[&Tensor],
    a_type: &TensorType,
    b: &[B],
    z_b: i32,
    y: &Shape,
    sums: &mut [i32],
) -> Result<(), OpError> {
    let a = operands[0].as_slice::<u8>()?;
    let (_, z_a) = per_tensor(a_type, "input")?;
    for_each_row(operands[0].shape(), operands[1].shape(), y, |row, a_at, b_at| {
        let sums = &mut sums[row];
        for (&a, b) in a[a_at].iter().zip(b[b_at].chunks(sums.len())) {
            let a = i32::from(a) - z_a;
            sums.iter_mut().zip(b).for_each(|(s, &b)| *s = s.wrapping_add(a * (b.into() - z_b)));
        }
    });
    Ok(())
}

pub(super) fn product_macs(operands: &[&TensorType], results: &[TensorType]) -> u64 {
    let a = &operands[0].shape;
    (results[0].shape.elements() as u64).saturating_mul(a[a.rank() - 1] as u64)
}
