//! Ops that move elements and compute none. On quantized values they keep the grid.

use super::{
    Operator, arity,
    index::{check_indices, indices, position},
    numbers::Numbers,
};
use crate::{Device, OpError, QuantParams, Shape, Tensor, TensorType, numerics};
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
    /// Mirrored without repeating the edge, to and fro where the border is longer than the axis.
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
pub(super) fn whole_grid(x: &TensorType) -> Result<(), OpError> {
    match x.quant.as_ref().and_then(QuantParams::axis) {
        Some(_) => {
            Err(OpError::quant(format!("{x} has one scale an index; only whole-tensor grids can move here")))
        }
        None => Ok(()),
    }
}

/// Fails where elements of one operand could not stand beside those of the other.
pub(super) fn one_grid(x: &TensorType, y: &TensorType) -> Result<(), OpError> {
    whole_grid(x)?;
    match x.dtype == y.dtype && x.quant == y.quant {
        true => Ok(()),
        false => Err(OpError::dtype(format!("{x} and {y} are not of one type and grid"))),
    }
}

/// One axis of a result whose elements are picked from a tensor.
struct Axis<'a> {
    /// Length of the axis.
    len: usize,
    /// What index `i` adds to the element's place in the source; `None` where the fill stands.
    place: Box<dyn Fn(usize) -> Option<usize> + 'a>,
}

impl<'a> Axis<'a> {
    fn new(len: usize, place: impl Fn(usize) -> Option<usize> + 'a) -> Axis<'a> {
        Axis { len, place: Box::new(place) }
    }

    /// All of an axis of this stride.
    fn whole(len: usize, stride: usize) -> Axis<'a> {
        Axis::new(len, move |i| Some(i * stride))
    }
}

/// A tensor each of whose elements is one of `x`, or `fill`: a move looks at bytes only and so takes any type.
fn pick(x: &Tensor, result: &TensorType, axes: &[Axis<'_>], fill: &[u8]) -> Result<Tensor, OpError> {
    fn append(
        out: &mut Vec<u8>,
        source: &[u8],
        size: usize,
        at: Option<usize>,
        axes: &[Axis<'_>],
        fill: &[u8],
    ) {
        match axes.split_first() {
            None => out.extend(at.map_or(fill, |i| &source[i * size..(i + 1) * size])),
            Some((axis, rest)) => {
                for i in 0..axis.len {
                    let at = at.zip((axis.place)(i)).map(|(at, step)| at + step);
                    append(out, source, size, at, rest, fill);
                }
            }
        }
    }
    let mut bytes = Vec::with_capacity(result.bytes());
    if result.bytes() > 0 {
        append(&mut bytes, x.bytes(), x.dtype().size(), Some(0), axes, fill);
    }
    Ok(Tensor::from_bytes(result.dtype, result.shape.clone(), bytes.into())?)
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        Ok(vec![operands[0].reshaped(self.shape.clone())?])
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
            let moved = q.axis().and_then(|a| self.perm.iter().position(|&p| p == a));
            moved.map_or(q.clone(), |axis| q.on_axis(axis))
        });
        Ok(vec![TensorType { dtype: x.dtype, shape: Shape::new(dims)?, quant }])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, strides) = (operands[0], operands[0].shape().strides());
        let axes: Vec<Axis<'_>> = self.perm.iter().map(|&p| Axis::whole(x.shape()[p], strides[p])).collect();
        Ok(vec![pick(x, &results[0], &axes, &[])?])
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, strides) = (operands[0], operands[0].shape().strides());
        let part = |(s, stride): (&SliceSpec, usize)| {
            let SliceSpec { start, len, step } = *s;
            Axis::new(len, move |i| start.checked_add_signed(i as isize * step).map(|i| i * stride))
        };
        let axes: Vec<Axis<'_>> = self.axes.iter().zip(strides).map(part).collect();
        Ok(vec![pick(x, &results[0], &axes, &[])?])
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
            one_grid(first, x)?;
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        // Everything from the axis on is contiguous: one run of each operand for each index before the axis.
        let run = |t: &Tensor| t.shape()[self.axis..].iter().product::<usize>() * t.dtype().size();
        let mut bytes = Vec::with_capacity(results[0].bytes());
        if results[0].bytes() > 0 {
            for i in 0..results[0].shape[..self.axis].iter().product() {
                for t in operands {
                    bytes.extend(&t.bytes()[i * run(t)..(i + 1) * run(t)]);
                }
            }
        }
        Ok(vec![Tensor::from_bytes(results[0].dtype, results[0].shape.clone(), bytes.into())?])
    }
}

impl PadMode {
    /// The index in an axis of length `extent` whose element stands at `i`, counted from the first element and so
    /// negative in the leading border; `None` for the constant.
    fn source(self, i: isize, extent: usize) -> Option<usize> {
        let last = extent as isize - 1;
        let inside = match self {
            PadMode::Constant { .. } => i,
            PadMode::Edge => i.clamp(0, last),
            PadMode::Wrap => i.rem_euclid(extent as isize),
            PadMode::Reflect if last == 0 => 0,
            PadMode::Reflect => {
                let there_and_back = i.rem_euclid(2 * last);
                there_and_back.min(2 * last - there_and_back)
            }
        };
        usize::try_from(inside).ok().filter(|&i| i < extent)
    }
}

impl Pad {
    /// The bytes of the constant as an element of type `x`; none for the modes that repeat elements.
    ///
    /// # Errors
    /// Where the constant is not a number of the type or on its grid.
    pub fn fill(&self, x: &TensorType) -> Result<Vec<u8>, OpError> {
        let PadMode::Constant { value } = self.mode else { return Ok(vec![]) };
        let number = match x.per_tensor() {
            Some((scale, zero)) => (value / f64::from(scale)).round_ties_even() + f64::from(zero),
            None => value,
        };
        let element = Numbers::F64(vec![number]).encode(x.dtype, Shape::scalar())?;
        // Encoding truncates and saturates: what the type does not hold comes back as another number.
        let held = match Numbers::decode(&element)? {
            Numbers::Int(n) => n.iter().all(|&n| n as f64 == number),
            Numbers::F32(_) | Numbers::F64(_) => true,
        };
        let on_grid = |(scale, zero)| numerics::dequantize(number as i64, scale, zero) == value as f32;
        if !held || !x.per_tensor().is_none_or(on_grid) {
            return Err(OpError::quant(format!("the padding {value} is not a value that {x} can hold")));
        }
        Ok(element.bytes().to_vec())
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
            let copies = !matches!(self.mode, PadMode::Constant { .. });
            if copies && extent == 0 && (before > 0 || after > 0) {
                return Err(OpError::shape(format!("{:?} pad of an axis without elements", self.mode)));
            }
            let sum = extent.checked_add(before).and_then(|n| n.checked_add(after));
            dims.push(sum.ok_or_else(|| OpError::too_large("padded axis length"))?);
        }
        self.fill(&x)?;
        Ok(vec![x.with_shape(Shape::new(dims)?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, strides) = (operands[0], operands[0].shape().strides());
        let axes: Vec<Axis<'_>> = (0..x.shape().rank())
            .map(|d| {
                let (before, extent, stride) = (self.before[d], x.shape()[d], strides[d]);
                Axis::new(results[0].shape[d], move |i| {
                    self.mode.source(i as isize - before as isize, extent).map(|i| i * stride)
                })
            })
            .collect();
        Ok(vec![pick(x, &results[0], &axes, &self.fill(types[0])?)?])
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, strides) = (operands[0], operands[0].shape().strides());
        let added = self.shape.rank() - x.shape().rank();
        let axes: Vec<Axis<'_>> = (0..self.shape.rank())
            .map(|d| match d.checked_sub(added) {
                Some(own) if x.shape()[own] == self.shape[d] => Axis::whole(self.shape[d], strides[own]),
                _ => Axis::whole(self.shape[d], 0),
            })
            .collect();
        Ok(vec![pick(x, &results[0], &axes, &[])?])
    }
}

impl Operator for Gather {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, indices] = arity(operands)?;
        whole_grid(&x)?;
        check_indices(&indices)?;
        if self.axis >= x.shape.rank() {
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

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, strides) = (operands[0], operands[0].shape().strides());
        let extent = x.shape()[self.axis];
        let places = indices(operands[1])?.into_iter().map(|i| position(i, extent, self.axis));
        let places = places.collect::<Result<Vec<usize>, _>>()?;
        let axes: Vec<Axis<'_>> = (0..x.shape().rank())
            .map(|d| match d == self.axis {
                true => Axis::new(places.len(), |i| Some(places[i] * strides[self.axis])),
                false => Axis::whole(x.shape()[d], strides[d]),
            })
            .collect();
        Ok(vec![pick(x, &results[0], &axes, &[])?])
    }
}

impl Operator for Transfer {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        Ok(vec![x])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        _results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        Ok(vec![operands[0].clone()])
    }
}
