//! The largest elements of the parts of regions.

use super::{Layout, Operator, arity, numbers::Numbers};
use crate::{OpError, Shape, Tensor, TensorType, numerics::math::Real};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Each region of an image in bins, each of which gives the largest of its elements; 0 where it has none. Regions reach from
/// their first to their last element, and have one at least; bins are as long as each other but for rounding, and overlap where
/// that leaves parts of elements.
///
/// Operands: images `[N, C, H, W]`; regions `[R, 5]` of the image that each is part of, x and y of its first, x and y of its
/// last element. Result `[R, C, height, width]`. f32 or f64, in which places are computed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MaxRoiPool {
    /// Bins along y.
    pub height: usize,
    /// Bins along x.
    pub width: usize,
    /// What the coordinates of regions are multiplied by.
    pub scale: f32,
}

/// The nearest whole number, the larger magnitude of two that are as near.
fn rounded<T: Real>(x: T) -> T {
    let whole = x.abs().floor();
    let size = if x.abs() - whole < T::of(0.5) { whole } else { whole + T::of(1.0) };
    if x < T::of(0.0) { -size } else { size }
}

impl MaxRoiPool {
    /// The elements of each bin along an axis.
    fn bins<T: Real>(&self, from: T, to: T, count: usize, extent: usize) -> Vec<Range<usize>> {
        let scale = T::of(self.scale.into());
        let (first, last) = (rounded(from * scale), rounded(to * scale));
        let length = last - first + T::of(1.0);
        let length = if length < T::of(1.0) { T::of(1.0) } else { length };
        let bin = length / T::of(count as f64);
        let inside = |at: T| (at + first).within(T::of(0.0), T::of(extent as f64)).to_index();
        let of =
            |i: usize| inside((T::of(i as f64) * bin).floor())..inside((T::of(i as f64 + 1.0) * bin).ceil());
        (0..count).map(of).collect()
    }

    fn all<T: Real>(&self, x: &[T], shape: &Shape, rois: &[T], y: &Shape) -> Result<Vec<T>, OpError> {
        let mut largest = vec![T::of(0.0); y.elements()];
        if x.is_empty() || largest.is_empty() {
            return Ok(largest);
        }
        let (area, count) = (shape[2] * shape[3], self.height * self.width);
        let (size, each) = (shape[1] * area, shape[1] * count);
        for (roi, y) in rois.chunks_exact(5).zip(largest.chunks_exact_mut(each)) {
            if !(roi[0] > T::of(-1.0) && roi[0] < T::of(shape[0] as f64)) {
                return Err(OpError::shape(format!("a region is of none of {} images", shape[0])));
            }
            let image = &x[roi[0].to_index() * size..][..size];
            let rows = self.bins(roi[2], roi[4], self.height, shape[2]);
            let columns = self.bins(roi[1], roi[3], self.width, shape[3]);
            for (channel, y) in image.chunks_exact(area).zip(y.chunks_exact_mut(count)) {
                let bins = rows.iter().flat_map(|rows| columns.iter().map(move |columns| (rows, columns)));
                for ((rows, columns), y) in bins.zip(y) {
                    let row = |r: usize| channel[r * shape[3]..][..shape[3]].get(columns.clone());
                    let elements = rows.clone().filter_map(row).flatten().copied();
                    *y = elements.reduce(|a, b| if b > a { b } else { a }).unwrap_or(T::of(0.0));
                }
            }
        }
        Ok(largest)
    }
}

impl Operator for MaxRoiPool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, rois] = arity(operands)?;
        let (_, channels, spatial) = Layout::ChannelsFirst.split(&x.shape)?;
        let &[count, 5] = rois.shape.dims() else {
            return Err(OpError::shape(format!("regions are their image and four places, got {rois}")));
        };
        if spatial.len() != 2 || rois.dtype != x.dtype || !x.dtype.is_float() {
            return Err(OpError::shape(format!("takes images and regions of floats, got {x} and {rois}")));
        }
        if self.height == 0 || self.width == 0 || !self.scale.is_finite() {
            let why = format!("{}×{} bins, scaled by {}", self.height, self.width, self.scale);
            return Err(OpError::attribute(why));
        }
        Ok(vec![TensorType::new(x.dtype, Shape::new([count, channels, self.height, self.width])?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (shape, y) = (operands[0].shape(), &results[0].shape);
        let bins = match (Numbers::decode(operands[0])?, Numbers::decode(operands[1])?) {
            (Numbers::F32(x), Numbers::F32(rois)) => Numbers::F32(self.all(&x, shape, &rois, y)?),
            (Numbers::F64(x), Numbers::F64(rois)) => Numbers::F64(self.all(&x, shape, &rois, y)?),
            _ => return Err(OpError::dtype(format!("takes floats, got {}", operands[0].dtype()))),
        };
        Ok(vec![bins.encode(results[0].dtype, y.clone())?])
    }

    /// As many as if each region were a whole image, with the elements that bins share.
    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        let area = operands[0].shape[2..].iter().product::<usize>() as u64;
        let bins = (self.height as u64).saturating_mul(self.width as u64);
        let channels = (results[0].shape[0] as u64).saturating_mul(results[0].shape[1] as u64);
        channels.saturating_mul(area.saturating_add(bins)).saturating_mul(4)
    }
}
