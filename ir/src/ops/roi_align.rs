//! Regions of images, brought to one size.

use super::{Layout, Operator, arity, index::position, numbers::Numbers};
use crate::{OpError, Shape, Tensor, TensorType, limits::MAX_WINDOW_TAPS, numerics::math::Real};
use serde::{Deserialize, Serialize};

/// Each region of an image in bins of equal size, each of which gives the mean (or the largest) of the samples in it, which
/// are interpolated between the four elements around them.
///
/// Operands: images `[N, C, H, W]`; regions `[R, 4]` of x and y of their first, x and y of their last corner; and the image
/// that each is part of, `[R]` of s64. Result `[R, C, height, width]`. f32 or f64, in which it is computed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RoiAlign {
    /// Bins along y.
    pub height: usize,
    /// Bins along x.
    pub width: usize,
    /// Samples along each axis of a bin; 0 for as many as there are elements along it, rounded up.
    pub samples: usize,
    /// What the coordinates of regions are multiplied by.
    pub scale: f32,
    /// Whether the centre of the first element is at ½, and not at 0. If not, regions are at least 1 long.
    pub half_pixel: bool,
    /// Whether a bin is the largest of the four weighted elements of all samples, as ONNX defines it, and not the mean.
    pub largest: bool,
}

/// An axis of a region.
struct Axis<T> {
    start: T,
    bin: T,
    samples: usize,
}

/// What a sample reads along one axis: two elements and the weight of the second one.
type Pair<T> = (usize, usize, T);

impl RoiAlign {
    fn axis<T: Real>(&self, from: T, to: T, bins: usize) -> Result<Axis<T>, OpError> {
        let (scale, offset) = (T::of(self.scale.into()), T::of(if self.half_pixel { 0.5 } else { 0.0 }));
        let start = from * scale - offset;
        let mut length = to * scale - offset - start;
        if !self.half_pixel && length < T::of(1.0) {
            length = T::of(1.0);
        }
        let bin = length / T::of(bins as f64);
        let samples = match self.samples {
            0 => {
                let whole = bin.floor();
                let n = if whole == bin { whole } else { whole + T::of(1.0) };
                n.within(T::of(0.0), T::of(MAX_WINDOW_TAPS as f64)).to_index()
            }
            given => given,
        };
        Ok(Axis { start, bin, samples })
    }

    /// The bins of one region of an image, channel by channel.
    fn region<T: Real>(
        &self,
        image: &[T],
        [h, w]: [usize; 2],
        roi: &[T],
        y: &mut [T],
    ) -> Result<(), OpError> {
        let rows = self.axis(roi[1], roi[3], self.height)?;
        let columns = self.axis(roi[0], roi[2], self.width)?;
        if rows.samples.saturating_mul(columns.samples) > MAX_WINDOW_TAPS {
            return Err(OpError::too_large(format!("{}×{} samples of a bin", rows.samples, columns.samples)));
        }
        let count = T::of(rows.samples.saturating_mul(columns.samples).max(1) as f64);
        let (area, bins) = (h * w, self.height * self.width);
        for (py, px) in (0..self.height).flat_map(|py| (0..self.width).map(move |px| (py, px))) {
            let (ys, xs) = (rows.near(py, h), columns.near(px, w));
            // A sample outside is 0.
            let all_near = ys.len() == rows.samples && xs.len() == columns.samples;
            let outside = (!all_near).then_some(T::of(0.0));
            for (channel, y) in image.chunks_exact(area).zip(y.chunks_exact_mut(bins)) {
                let samples = ys.iter().flat_map(|&y| xs.iter().map(move |&x| (y, x)));
                let four = samples.map(|sample| weighted(channel, w, sample));
                y[py * self.width + px] = if self.largest {
                    let all = outside.into_iter().chain(four.flatten());
                    all.reduce(|a, b| if b > a { b } else { a }).unwrap_or(T::of(0.0))
                } else {
                    let sum = four.fold(T::of(0.0), |sum, [a, b, c, d]| sum + (a + b + c + d));
                    sum / count
                };
            }
        }
        Ok(())
    }

    fn all<T: Real>(
        &self,
        x: &[T],
        shape: &Shape,
        rois: &[T],
        images: &[i64],
        y: &Shape,
    ) -> Result<Vec<T>, OpError> {
        let mut bins = vec![T::of(0.0); y.elements()];
        let (size, each) = (shape[1..].iter().product::<usize>(), y[1..].iter().product::<usize>());
        if size == 0 || each == 0 {
            return Ok(bins);
        }
        for ((roi, &image), y) in rois.chunks_exact(4).zip(images).zip(bins.chunks_exact_mut(each)) {
            let at = position(image, shape[0], 0)?;
            self.region(&x[at * size..][..size], [shape[2], shape[3]], roi, y)?;
        }
        Ok(bins)
    }
}

impl<T: Real> Axis<T> {
    /// What the samples of a bin read, but for those that are more than an element outside.
    ///
    /// The others are next to each other, since each step to where a sample is keeps the order. Regions may be far larger
    /// than images, so that few of their samples are in one.
    fn near(&self, bin: usize, extent: usize) -> Vec<Pair<T>> {
        let at = |i: usize| {
            let step = (T::of(i as f64) + T::of(0.5)) * self.bin / T::of(self.samples as f64);
            self.start + T::of(bin as f64) * self.bin + step
        };
        let (first, last) = (T::of(-1.0), T::of(extent as f64));
        let (from, to) = match self.bin < T::of(0.0) {
            false => {
                (first_index(self.samples, |i| at(i) >= first), first_index(self.samples, |i| at(i) > last))
            }
            true => {
                (first_index(self.samples, |i| at(i) <= last), first_index(self.samples, |i| at(i) < first))
            }
        };
        (from..to).map(at).filter(|&at| at >= first && at <= last).map(|at| pair(at, extent)).collect()
    }
}

/// The first index below `n` from which on something holds; `n` where it never does.
fn first_index(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (0, n);
    while from < to {
        let middle = from.midpoint(to);
        if holds(middle) {
            to = middle;
        } else {
            from = middle + 1;
        }
    }
    from
}

/// The elements around a place.
fn pair<T: Real>(at: T, extent: usize) -> Pair<T> {
    let at = at.within(T::of(0.0), T::of(extent as f64));
    let low = at.floor().to_index();
    match low + 1 < extent {
        true => (low, low + 1, at - at.floor()),
        false => (extent - 1, extent - 1, T::of(0.0)),
    }
}

/// The four elements around a sample, times their weights.
fn weighted<T: Real>(channel: &[T], width: usize, (y, x): (Pair<T>, Pair<T>)) -> [T; 4] {
    let one = T::of(1.0);
    let (ly, lx) = (y.2, x.2);
    [
        (one - ly) * (one - lx) * channel[y.0 * width + x.0],
        (one - ly) * lx * channel[y.0 * width + x.1],
        ly * (one - lx) * channel[y.1 * width + x.0],
        ly * lx * channel[y.1 * width + x.1],
    ]
}

impl Operator for RoiAlign {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, rois, images] = arity(operands)?;
        let (_, channels, spatial) = Layout::ChannelsFirst.split(&x.shape)?;
        let count = images.shape.elements();
        let fits = spatial.len() == 2
            && rois.shape.dims() == [count, 4]
            && images.shape.rank() == 1
            && images.dtype == crate::DType::S64
            && rois.dtype == x.dtype
            && x.dtype.is_float();
        if !fits {
            return Err(OpError::shape(format!(
                "takes images, regions and the image of each, got {x}, {rois} and {images}"
            )));
        }
        let samples = self.samples.saturating_mul(self.samples);
        if samples > MAX_WINDOW_TAPS || self.height == 0 || self.width == 0 || !self.scale.is_finite() {
            return Err(OpError::attribute(format!(
                "{}×{} bins of {samples} samples, scaled by {}",
                self.height, self.width, self.scale
            )));
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
        let images = operands[2].as_slice::<i64>()?;
        let bins = match (Numbers::decode(operands[0])?, Numbers::decode(operands[1])?) {
            (Numbers::F32(x), Numbers::F32(rois)) => Numbers::F32(self.all(&x, shape, &rois, images, y)?),
            (Numbers::F64(x), Numbers::F64(rois)) => Numbers::F64(self.all(&x, shape, &rois, images, y)?),
            _ => return Err(OpError::dtype(format!("takes floats, got {}", operands[0].dtype()))),
        };
        Ok(vec![bins.encode(results[0].dtype, y.clone())?])
    }

    fn macs(&self, _operands: &[&TensorType], results: &[TensorType]) -> u64 {
        let samples = (self.samples.saturating_mul(self.samples) as u64).max(1);
        (results[0].shape.elements() as u64).saturating_mul(samples).saturating_mul(4)
    }
}
