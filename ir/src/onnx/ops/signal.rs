//! Fourier transforms, as products with matrices of cosines and sines, and windows.

use super::{
    compose::{Result, float_tensor},
    lengths, matmul,
};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    limits::MAX_FOLDED_BYTES,
    onnx::{NodeError, import::Node, tensor},
    ops::{Clamp, Conv, Layout, Window},
};
use std::f64::consts::TAU;

/// One of an operand's numbers, which must be known.
fn integer(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<Option<i64>> {
    let Some(t) = node.known(slot, role)? else { return Ok(None) };
    match t.to_i64().as_deref() {
        Some(&[one]) => Ok(Some(one)),
        _ => Err(OpError::dtype(format!("{role} must be one integer, got {}", t.ty())).into()),
    }
}

fn length(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<Option<usize>> {
    let Some(n) = integer(node, slot, role)? else { return Ok(None) };
    match usize::try_from(n) {
        Ok(n) if n > 0 => Ok(Some(n)),
        _ => Err(OpError::attribute(format!("{role} is {n}")).into()),
    }
}

/// A transform of `length` complex numbers.
pub(super) struct Transform {
    pub(super) length: usize,
    pub(super) inverse: bool,
    /// Whether the spectrum of a real signal is only the half that the other one follows from.
    pub(super) half: bool,
}

impl Transform {
    /// Numbers of the spectrum.
    fn bins(&self) -> usize {
        if self.half { self.length / 2 + 1 } else { self.length }
    }

    /// Elements of the result, and whether they are real.
    fn result(&self) -> (usize, bool) {
        if self.inverse { (self.length, self.half) } else { (self.bins(), false) }
    }

    /// What element `i` of the operand adds to element `k` of the result, for its real and its imaginary part: real and
    /// imaginary.
    fn factors(&self, i: usize, k: usize) -> [[f64; 2]; 2] {
        let used = if self.inverse { self.bins() } else { self.length };
        if i >= used {
            return [[0.0; 2]; 2];
        }
        // The angle within one turn: exact, however large the product.
        let turn = (i as u128 * k as u128 % self.length as u128) as f64 / self.length as f64;
        let (sin, cos) = (turn * TAU).sin_cos();
        if !self.inverse {
            return [[cos, -sin], [sin, cos]];
        }
        let twice = self.half && i > 0 && 2 * i != self.length;
        let scale = if twice { 2.0 } else { 1.0 } / self.length as f64;
        [[cos * scale, sin * scale], [-sin * scale, cos * scale]]
    }

    /// The matrix of the transform, `[elements·parts, results·parts]`, or with the results first.
    fn matrix(&self, elements: usize, parts: usize, dtype: DType, results_first: bool) -> Result<Tensor> {
        let (results, is_real) = self.result();
        let result_parts = if is_real { 1 } else { 2 };
        let (rows, columns) = (elements * parts, results.saturating_mul(result_parts));
        if rows.saturating_mul(columns).saturating_mul(dtype.size()) > MAX_FOLDED_BYTES {
            let why = format!(
                "a transform of {} numbers takes a matrix above {MAX_FOLDED_BYTES} bytes",
                self.length
            );
            return Err(OpError::too_large(why).into());
        }
        let mut values = vec![0.0; rows * columns];
        for (i, k) in (0..elements).flat_map(|i| (0..results).map(move |k| (i, k))) {
            let factors = self.factors(i, k);
            for (a, b) in (0..parts).flat_map(|a| (0..result_parts).map(move |b| (a, b))) {
                let (row, column) = (i * parts + a, k * result_parts + b);
                let at =
                    if results_first { column * rows + a * elements + i } else { row * columns + column };
                values[at] = factors[a][b];
            }
        }
        let shape = if results_first { [columns, rows] } else { [rows, columns] };
        float_tensor(dtype, Shape::new(shape)?, &values)
    }
}

/// The last dimension of a signal: real numbers, or real and imaginary parts.
fn parts(node: &Node<'_, '_>, x: ValueId) -> Result<usize> {
    match node.shape(x).last() {
        Some(&parts @ (1 | 2)) => Ok(parts),
        _ => Err(OpError::shape(format!("the last dimension must be 1 or 2, got {}", node.ty(x))).into()),
    }
}

/// A discrete Fourier transform along an axis: the axis is brought to the end, and the operand multiplied by a matrix. Of
/// a signal longer than the transform, the rest is left out; a shorter one ends in zeros.
pub(super) fn dft(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let (inverse, half) = (node.flag("inverse", false)?, node.flag("onesided", false)?);
    let given = length(node, 1, "dft_length")?;
    let axis =
        if node.opset() >= 20 { integer(node, 2, "axis")?.unwrap_or(-2) } else { node.int("axis", 1)? };
    let (shape, parts) = (node.shape(x), parts(node, x)?);
    let rank = shape.rank();
    let axis = shape.axis(axis).filter(|&a| a + 1 < rank);
    let axis = axis
        .ok_or_else(|| NodeError::attribute("axis", format!("is none of the signal's in {}", node.ty(x))))?;
    let extent = shape[axis];
    let default = if inverse && half { extent.saturating_sub(1).saturating_mul(2) } else { extent };
    let transform = Transform { length: given.unwrap_or(default), inverse, half };
    if transform.length == 0 || extent == 0 {
        return Err(OpError::shape(format!("a transform of nothing: {}", node.ty(x))).into());
    }
    let (own, wide) = (node.ty(x).dtype, node.widened("wide", x)?);
    let mut perm: Vec<usize> = (0..rank).filter(|&d| d != axis && d != rank - 1).collect();
    let outer: Vec<usize> = perm.iter().map(|&d| shape[d]).collect();
    perm.extend([axis, rank - 1]);
    let x = node.permuted("signals", perm.clone(), wide)?;
    let rows = outer.iter().product::<usize>();
    let x = node.shaped("rows", [rows, extent * parts], x)?;
    let matrix = transform.matrix(extent, parts, node.ty(x).dtype, false)?;
    let matrix = node.constant_part("matrix", matrix);
    let y = node.product("spectra", x, matrix)?;
    let (results, is_real) = transform.result();
    let y = node.shaped("parts", [&outer[..], &[results, if is_real { 1 } else { 2 }]].concat(), y)?;
    let back: Vec<usize> = (0..rank).map(|d| perm.iter().position(|&p| p == d).unwrap_or(d)).collect();
    let part = if node.ty(y).dtype == own { "" } else { "spectrum" };
    let y = node.permuted(part, back, y)?;
    node.cast_to("", own, y)
}

/// A transform along the last axis, or the last but one where the last has `parts`: of `extent` elements, with the result
/// in this shape.
pub(super) fn transformed(
    node: &mut Node<'_, '_>,
    x: ValueId,
    transform: &Transform,
    (extent, parts): (usize, usize),
    dims: Vec<usize>,
) -> Result<ValueId> {
    let (own, wide) = (node.ty(x).dtype, node.widened("wide", x)?);
    let rows = node.shape(x).elements() / (extent * parts).max(1);
    let rows = node.shaped("rows", [rows, extent * parts], wide)?;
    let matrix = transform.matrix(extent, parts, node.ty(rows).dtype, false)?;
    let matrix = node.constant_part("matrix", matrix);
    let y = matmul::matmul_of(node, "spectra", rows, matrix)?;
    let y = node.shaped(if node.ty(y).dtype == own { "" } else { "spectrum" }, dims, y)?;
    node.cast_to("", own, y)
}

/// Transforms of frames of a signal: a convolution by the rows of the matrix, each times the window.
pub(super) fn stft(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "signal")?;
    node.check_float("signal", x)?;
    let step =
        length(node, 1, "frame_step")?.ok_or(NodeError::MissingOperand { slot: 1, role: "frame_step" })?;
    let window = node.optional(2);
    let frame = length(node, 3, "frame_length")?;
    let half = node.flag("onesided", true)?;
    let x = match node.shape(x).dims() {
        // ONNX Runtime lets a real signal leave out the dimension of its one part.
        &[batch, extent] => node.shaped("signal", [batch, extent, 1], x)?,
        _ => x,
    };
    let &[batch, extent, _] = node.shape(x).dims() else {
        return Err(OpError::shape(format!("takes batch, length and parts, got {}", node.ty(x))).into());
    };
    let parts = parts(node, x)?;
    let from_window = window.map(|w| node.shape(w).elements());
    let frame = frame.or(from_window).unwrap_or(extent);
    if from_window.is_some_and(|n| n != frame) || frame == 0 || half && parts == 2 {
        let why =
            format!("a frame of {frame} numbers, a window of {from_window:?}, one side of {}", node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let (own, wide) = (node.ty(x).dtype, node.widened("wide", x)?);
    let dtype = node.ty(wide).dtype;
    let x = match parts {
        1 => node.shaped("channels", [batch, 1, extent], wide)?,
        _ => node.permuted("channels", [0, 2, 1], wide)?,
    };
    let transform = Transform { length: frame, inverse: false, half };
    let bins = transform.bins();
    let matrix = transform.matrix(frame, parts, dtype, true)?;
    let mut kernel = node.constant_part("matrix", matrix);
    kernel = node.shaped("kernel", [2 * bins, parts, frame], kernel)?;
    if let Some(window) = window {
        let window = node.cast_to("window", dtype, window)?;
        kernel = node.mul("windowed", kernel, window)?;
    }
    let conv = Conv {
        window: Window::new([frame]).strides([step]),
        groups: 1,
        layout: Layout::ChannelsFirst,
        bias: false,
        residual: false,
        clamp: Clamp::NONE,
    };
    let y = node.emit_part("frames", conv, &[x, kernel])?;
    let frames = node.shape(y)[2];
    let y = node.shaped("parts", [batch, bins, 2, frames], y)?;
    let y = node.permuted(if dtype == own { "" } else { "spectrum" }, [0, 3, 1, 2], y)?;
    node.cast_to("", own, y)
}

/// Σ a_j·cos(2π·j·n/N) for n = 0, 1, …: N is the size, or one less of a window that is symmetric.
fn cosine_window(node: &mut Node<'_, '_>, coefficients: &[f64]) -> Result<ValueId> {
    let size = integer(node, 0, "size")?.ok_or(NodeError::MissingOperand { slot: 0, role: "size" })?;
    let size = lengths("size", &[size])?[0];
    let code = node.int("output_datatype", 1)?;
    let dtype = i32::try_from(code).ok().and_then(|c| tensor::dtype(c).ok());
    let dtype = dtype.ok_or_else(|| NodeError::attribute("output_datatype", format!("is {code}")))?;
    let periodic = node.flag("periodic", true)?;
    let period = if periodic { size } else { size.saturating_sub(1).max(1) } as f64;
    let at = |n: usize| -> f64 {
        coefficients.iter().enumerate().map(|(j, a)| a * (TAU * (j * n) as f64 / period).cos()).sum()
    };
    let window = node.numbers("exact", DType::F64, Shape::new([size])?, at)?;
    node.cast_to("", dtype, window)
}

pub(super) fn hann_window(node: &mut Node<'_, '_>) -> Result<ValueId> {
    cosine_window(node, &[0.5, -0.5])
}

pub(super) fn hamming_window(node: &mut Node<'_, '_>) -> Result<ValueId> {
    cosine_window(node, &[25.0 / 46.0, -21.0 / 46.0])
}

pub(super) fn blackman_window(node: &mut Node<'_, '_>) -> Result<ValueId> {
    cosine_window(node, &[0.42, -0.5, 0.08])
}

/// Triangles over the bins of a spectrum, whose corners are equally far apart on the mel scale: `[bins, triangles]`.
pub(super) fn mel_weight_matrix(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let bins = length(node, 0, "num_mel_bins")?;
    let transform = length(node, 1, "dft_length")?;
    let rate = length(node, 2, "sample_rate")?;
    let (lower, upper) = (number(node, 3, "lower_edge_hertz")?, number(node, 4, "upper_edge_hertz")?);
    let (Some(bins), Some(transform), Some(rate)) = (bins, transform, rate) else {
        return Err(NodeError::MissingOperand { slot: 0, role: "num_mel_bins" });
    };
    let code = node.int("output_datatype", 1)?;
    let dtype = super::elementwise::dtype("output_datatype", code)?;
    let rows = transform / 2 + 1;
    if rows.saturating_mul(bins).saturating_mul(8) > MAX_FOLDED_BYTES {
        return Err(OpError::too_large(format!("{bins} triangles over {rows} bins")).into());
    }
    let mel = |hertz: f64| 2595.0 * (hertz / 700.0).ln_1p() / std::f64::consts::LN_10;
    let (low, high) = (mel(lower), mel(upper));
    let step = (high - low) / (bins + 2) as f64;
    let place = |i: usize| {
        let hertz = 700.0 * ((low + i as f64 * step) / 2595.0 * std::f64::consts::LN_10).exp_m1();
        let bin = ((transform + 1) as f64 * hertz / rate as f64).floor();
        // A number that is none, too, is refused here.
        if (0.0..rows as f64).contains(&bin) { Ok(bin as usize) } else { Err(bin) }
    };
    let places = (0..bins + 2).map(place).collect::<Result<Vec<usize>, f64>>();
    let places = places
        .map_err(|bin| OpError::attribute(format!("a triangle has its corner at bin {bin} of {rows}")))?;
    let mut matrix = vec![0.0; rows * bins];
    for (i, corner) in places.windows(3).enumerate() {
        let &[left, centre, right] = corner else { continue };
        let mut set = |row: usize, value: f64| matrix[row * bins + i] = value;
        if left == centre {
            set(centre, 1.0);
        } else {
            (left..=centre).for_each(|j| set(j, (j - left) as f64 / (centre - left) as f64));
        }
        (centre..right).for_each(|j| set(j, (right - j) as f64 / (right - centre) as f64));
    }
    let matrix = node.constant_part("exact", float_tensor(DType::F64, Shape::new([rows, bins])?, &matrix)?);
    node.cast_to("", dtype, matrix)
}

/// An operand of one float, which must be known.
fn number(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<f64> {
    let t = node.required(slot, role)?;
    match t.to_f64()[..] {
        [one] => Ok(one),
        _ => Err(OpError::shape(format!("{role} must be one number, got {}", t.ty())).into()),
    }
}
