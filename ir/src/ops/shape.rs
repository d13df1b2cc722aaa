//! Ops that move elements and compute none. On quantized values they keep the grid.

use super::{Operator, arity};
use crate::{DType, Device, OpError, QuantParams, Shape, TensorType};
use serde::{Deserialize, Serialize};

/// The same elements, row-major, under another shape. Flatten, Squeeze and Unsqueeze become this.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reshape {
    /// The result's shape.
    pub shape: Shape,
}

/// Dimension `i` of the result is dimension `perm[i]` of the operand.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Transpose {
    /// A permutation of the axes.
    pub perm: Vec<usize>,
}

/// The part of one axis that a [`Slice`] takes: elements `start`, `start + step`, … (`len` of them).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SliceSpec {
    /// First index taken.
    pub start: usize,
    /// Number of indices taken.
    pub len: usize,
    /// Distance between them; negative runs backwards, 0 only where `len` ≤ 1.
    pub step: isize,
}

/// A strided part: one [`SliceSpec`] an axis. Split becomes several of these.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Slice {
    /// What is taken of each axis.
    pub axes: Vec<SliceSpec>,
}

/// Tensors of one type one after the other along an axis. Quantized ones must have the same grid.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Concat {
    /// The axis that grows.
    pub axis: usize,
}

/// What a [`Pad`] fills its border with.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum PadMode {
    /// A number; on quantized values it is real and must be on the grid (0 always is).
    Constant {
        /// The number.
        value: f64,
    },
    /// Mirrored without repeating the edge.
    Reflect,
    /// The edge repeated.
    Edge,
    /// The other end, as on a torus.
    Wrap,
}

/// A border around the elements.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Pad {
    /// Elements added before each axis.
    pub before: Vec<usize>,
    /// Elements added after each axis.
    pub after: Vec<usize>,
    /// What they are.
    pub mode: PadMode,
}

/// The operand broadcast to a shape by NumPy's rules.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Expand {
    /// The result's shape.
    pub shape: Shape,
}

/// Elements picked along an axis: y[…, i…, …] = x[…, indices[i…], …]. Negative indices count from the back.
///
/// Operands: data, and indices of s32 or s64. An index out of range is an error when the op is evaluated.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gather {
    /// The axis.
    pub axis: usize,
}

/// A value handed to another device: the elements unchanged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Transfer {
    /// The device that receives it.
    pub to: Device,
}

/// Fails where a per-axis grid would have to follow elements that move between axes.
fn whole_grid(x: &TensorType) -> Result<(), OpError> {
    match x.quant.as_ref().and_then(QuantParams::axis) {
        Some(_) => {
            Err(OpError::quant(format!("{x} has one scale an index; only whole-tensor grids can move here")))
        }
        None => Ok(()),
    }
}

impl Operator for Reshape {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.shape != self.shape {
            whole_grid(&x)?;
        }
        if x.shape.elements() != self.shape.elements() {
            return Err(OpError::shape(format!(
                "{x} has {} elements, shape {:?} {}",
                x.shape.elements(),
                self.shape,
                self.shape.elements()
            )));
        }
        Ok(vec![x.with_shape(self.shape.clone())])
    }
}

impl Operator for Transpose {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let mut seen = self.perm.clone();
        seen.sort_unstable();
        if !seen.iter().copied().eq(0..x.shape.rank()) {
            return Err(OpError::attribute(format!(
                "{:?} is not a permutation of the axes of {x}",
                self.perm
            )));
        }
        let dims: Vec<usize> = self.perm.iter().map(|&p| x.shape[p]).collect();
        let quant = x.quant.map(|q| {
            let axis = q.axis().and_then(|a| self.perm.iter().position(|&p| p == a));
            q.with_axis(axis)
        });
        Ok(vec![TensorType { dtype: x.dtype, shape: Shape::new(dims)?, quant }])
    }
}

impl SliceSpec {
    /// All `len` elements of an axis.
    pub fn all(len: usize) -> SliceSpec {
        SliceSpec { start: 0, len, step: 1 }
    }

    fn fits(self, extent: usize) -> bool {
        let steps = self.len.saturating_sub(1) as i128;
        let last = self.start as i128 + steps * self.step as i128;
        self.len == 0 || (self.start < extent && (0..extent as i128).contains(&last))
    }
}

impl Operator for Slice {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        whole_grid(&x)?;
        let fits = self.axes.len() == x.shape.rank()
            && self.axes.iter().zip(x.shape.iter()).all(|(s, &d)| s.fits(d));
        if !fits {
            return Err(OpError::shape(format!("{:?} is not a part of {x}", self.axes)));
        }
        let dims: Vec<usize> = self.axes.iter().map(|s| s.len).collect();
        Ok(vec![x.with_shape(Shape::new(dims)?)])
    }
}

impl Operator for Concat {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let Some((first, rest)) = operands.split_first() else {
            return Err(OpError::Arity { expected: "at least 1".into(), got: 0 });
        };
        whole_grid(first)?;
        let axis = self.axis;
        if axis >= first.shape.rank() {
            return Err(OpError::attribute(format!("axis {axis} of {first}")));
        }
        let mut dims = first.shape.to_vec();
        for x in rest {
            if x.dtype != first.dtype || x.quant != first.quant {
                return Err(OpError::dtype(format!("{first} and {x} are not of one type and grid")));
            }
            let agree = x.shape.rank() == dims.len()
                && (0..dims.len()).all(|d| d == axis || x.shape[d] == first.shape[d]);
            if !agree {
                return Err(OpError::shape(format!("{first} and {x} differ beside axis {axis}")));
            }
            dims[axis] =
                dims[axis].checked_add(x.shape[axis]).ok_or_else(|| OpError::too_large("axis length"))?;
        }
        Ok(vec![first.with_shape(Shape::new(dims)?)])
    }
}

impl Operator for Pad {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        whole_grid(&x)?;
        let rank = x.shape.rank();
        if self.before.len() != rank || self.after.len() != rank {
            return Err(OpError::attribute(format!("pads {:?} and {:?} of {x}", self.before, self.after)));
        }
        let mut dims = Vec::with_capacity(rank);
        for d in 0..rank {
            let (before, after, extent) = (self.before[d], self.after[d], x.shape[d]);
            let most = match self.mode {
                PadMode::Constant { .. } => usize::MAX,
                PadMode::Reflect => extent.saturating_sub(1),
                PadMode::Edge if extent > 0 => usize::MAX,
                PadMode::Edge => 0,
                PadMode::Wrap => extent,
            };
            if before > most || after > most {
                return Err(OpError::shape(format!(
                    "{:?} pad of {before} and {after} on an axis of {extent}",
                    self.mode
                )));
            }
            let sum = extent.checked_add(before).and_then(|n| n.checked_add(after));
            dims.push(sum.ok_or_else(|| OpError::too_large("padded axis length"))?);
        }
        Ok(vec![x.with_shape(Shape::new(dims)?)])
    }
}

impl Operator for Expand {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        whole_grid(&x)?;
        if x.shape.broadcast(&self.shape).as_ref() != Some(&self.shape) {
            return Err(OpError::shape(format!("{x} does not broadcast to {:?}", self.shape)));
        }
        Ok(vec![x.with_shape(self.shape.clone())])
    }
}

impl Operator for Gather {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices] = arity(operands)?;
        whole_grid(&x)?;
        if !matches!(indices.dtype, DType::S32 | DType::S64) || self.axis >= x.shape.rank() {
            return Err(OpError::shape(format!("axis {} of {x} by {indices}", self.axis)));
        }
        if x.shape[self.axis] == 0 && indices.shape.elements() > 0 {
            return Err(OpError::shape(format!("picks from empty axis {} of {x}", self.axis)));
        }
        let mut dims = x.shape[..self.axis].to_vec();
        dims.extend(indices.shape.iter());
        dims.extend(&x.shape[self.axis + 1..]);
        Ok(vec![x.with_shape(Shape::new(dims)?)])
    }
}

impl Operator for Transfer {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        Ok(vec![x])
    }
}
