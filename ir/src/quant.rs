use crate::{DType, OpError, Shape};
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// How integers of a tensor stand for real numbers: real = scale · (q − zero_point).
///
/// One pair for the whole tensor, or one for each index of `axis`.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedParams")]
pub struct QuantParams {
    scales: Arc<[f32]>,
    zero_points: Arc<[i32]>,
    axis: Option<usize>,
}

/// What is read from a file, before it is checked.
#[derive(Deserialize)]
#[serde(rename = "QuantParams")]
struct UncheckedParams {
    scales: Vec<f32>,
    zero_points: Vec<i32>,
    axis: Option<usize>,
}

impl TryFrom<UncheckedParams> for QuantParams {
    type Error = OpError;
    fn try_from(p: UncheckedParams) -> Result<QuantParams, OpError> {
        QuantParams::checked(p.scales, p.zero_points, p.axis)
    }
}

impl QuantParams {
    /// One scale and zero point for the whole tensor. The scale must be finite and positive.
    pub fn per_tensor(scale: f32, zero_point: i32) -> Result<QuantParams, OpError> {
        QuantParams::checked(vec![scale], vec![zero_point], None)
    }

    /// A scale and zero point for each index of `axis`.
    pub fn per_axis(axis: usize, scales: Vec<f32>, zero_points: Vec<i32>) -> Result<QuantParams, OpError> {
        QuantParams::checked(scales, zero_points, Some(axis))
    }

    fn checked(scales: Vec<f32>, zero_points: Vec<i32>, axis: Option<usize>) -> Result<QuantParams, OpError> {
        if let Some(s) = scales.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(OpError::quant(format!("scale {s} is not a finite number above 0")));
        }
        if scales.len() != zero_points.len() {
            return Err(OpError::quant(format!(
                "{} scales but {} zero points",
                scales.len(),
                zero_points.len()
            )));
        }
        if axis.is_none() && scales.len() != 1 {
            return Err(OpError::quant(format!("{} scales but no axis", scales.len())));
        }
        Ok(QuantParams { scales: scales.into(), zero_points: zero_points.into(), axis })
    }

    /// The scales: one, or one for each index of the axis.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The zero points, as many as scales.
    pub fn zero_points(&self) -> &[i32] {
        &self.zero_points
    }

    /// The axis of a per-axis grid.
    pub fn axis(&self) -> Option<usize> {
        self.axis
    }

    /// Scale and zero point, where there is one pair for the whole tensor.
    pub fn as_per_tensor(&self) -> Option<(f32, i32)> {
        match (self.axis, &*self.scales, &*self.zero_points) {
            (None, [s], [z]) => Some((*s, *z)),
            _ => None,
        }
    }

    /// Scale and zero point of the element at index `i` of the axis (any `i` for a per-tensor grid).
    pub fn at(&self, i: usize) -> (f32, i32) {
        match self.axis {
            None => (self.scales[0], self.zero_points[0]),
            Some(_) => (self.scales[i], self.zero_points[i]),
        }
    }

    /// The same grid with its axis, if it has one, moved to `axis`: for a tensor that was transposed.
    pub fn on_axis(&self, axis: usize) -> QuantParams {
        QuantParams { axis: self.axis.map(|_| axis), ..self.clone() }
    }

    /// Checks the grid against the type it is to describe: zero points in range, as many scales as the axis is long.
    pub fn check(&self, dtype: DType, shape: &Shape) -> Result<(), OpError> {
        let Some((lo, hi)) = dtype.integer_range() else {
            return Err(OpError::quant(format!("{dtype} cannot hold quantized values")));
        };
        if let Some(z) = self.zero_points.iter().find(|&&z| !(lo..=hi).contains(&i64::from(z))) {
            return Err(OpError::quant(format!("zero point {z} is outside the range of {dtype}")));
        }
        match self.axis {
            None => Ok(()),
            Some(a) if a >= shape.rank() => {
                Err(OpError::quant(format!("axis {a} of a tensor of rank {}", shape.rank())))
            }
            Some(a) if shape[a] != self.scales.len() => Err(OpError::quant(format!(
                "{} scales for axis {a} of length {}",
                self.scales.len(),
                shape[a]
            ))),
            Some(_) => Ok(()),
        }
    }
}

/// `scale 0.02 zero 128`, or `axis 0 scales [..] zeros [..]`.
impl fmt::Debug for QuantParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_per_tensor() {
            Some((s, z)) => write!(f, "scale {s} zero {z}"),
            None => write!(
                f,
                "axis {} scales {:?} zeros {:?}",
                self.axis.unwrap_or(0),
                self.scales,
                self.zero_points
            ),
        }
    }
}

/// The grid an integer op writes its result to, and the codes it may use.
///
/// `lo` and `hi` are inclusive bounds on the codes; a fused ReLU, ReLU6 or Clip narrows them and costs nothing.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct OutputGrid {
    /// `U8` (or `S8` in models that bring it).
    pub dtype: DType,
    /// Step of the grid.
    pub scale: f32,
    /// Code of real zero.
    pub zero_point: i32,
    /// Smallest code written.
    pub lo: i32,
    /// Largest code written.
    pub hi: i32,
}

impl OutputGrid {
    /// A grid that uses every code of `dtype`.
    pub fn full(dtype: DType, scale: f32, zero_point: i32) -> Result<OutputGrid, OpError> {
        let Some((lo, hi)) = dtype.integer_range().filter(|_| dtype.size() == 1) else {
            return Err(OpError::quant(format!("{dtype} is not an 8-bit integer type")));
        };
        let grid = OutputGrid { dtype, scale, zero_point, lo: lo as i32, hi: hi as i32 };
        grid.check()?;
        Ok(grid)
    }

    /// Fails unless scale, zero point and bounds are usable.
    pub fn check(&self) -> Result<(), OpError> {
        QuantParams::per_tensor(self.scale, self.zero_point)?.check(self.dtype, &Shape::scalar())?;
        let (lo, hi) = self.dtype.integer_range().unwrap_or((0, 0));
        if i64::from(self.lo) < lo || i64::from(self.hi) > hi || self.lo > self.hi {
            return Err(OpError::quant(format!(
                "codes {}..={} are not a range of {}",
                self.lo, self.hi, self.dtype
            )));
        }
        Ok(())
    }

    /// Scale and zero point as the parameters of a tensor type.
    pub fn params(&self) -> Result<QuantParams, OpError> {
        QuantParams::per_tensor(self.scale, self.zero_point)
    }
}
