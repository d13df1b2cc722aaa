//! Images sampled at any places.

use super::{Layout, Operator, arity, numbers::Numbers};
use crate::{DType, OpError, Shape, Tensor, TensorType, numerics::math::Real};
use serde::{Deserialize, Serialize};

/// Elements of `[N, C, extents…]` at the places of a grid `[N, results…, D]`: for each place D coordinates, the last spatial
/// dimension first, from −1 to 1. Result `[N, C, results…]` of the operand's type.
///
/// A coordinate g is x = ((g + 1)·n − 1)/2 along n elements, or (g + 1)·(n − 1)/2 where corners are aligned. Computed in
/// f32, or in f64 if the operand is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GridSample {
    /// What is made of the elements around a place.
    pub mode: SampleMode,
    /// What lies beyond the elements.
    pub padding: SamplePadding,
    /// Whether −1 and 1 are the centres of the outermost elements, rather than their edges.
    pub align_corners: bool,
}

/// How a [`GridSample`] interpolates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum SampleMode {
    /// The nearest element; of two the even one.
    Nearest,
    /// Between two elements in each dimension.
    Linear,
    /// Between four elements in each dimension, by Keys' cubic with a = −¾.
    Cubic,
}

/// What a [`GridSample`] finds beyond the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum SamplePadding {
    /// 0.
    Zeros,
    /// The outermost element.
    Border,
    /// The elements in reverse, and again.
    Reflection,
}

/// Taps along one dimension: elements (`None` where there is a 0) and their weights.
type Taps<T> = Vec<(Option<usize>, T)>;

impl GridSample {
    /// Where the elements begin.
    fn low(&self) -> f64 {
        if self.align_corners { 0.0 } else { -0.5 }
    }

    /// The coordinate reflected at the edges (or at the centres of the outermost elements) until it is between them.
    fn reflected<T: Real>(&self, x: T, n: usize) -> T {
        let (low, span) = (T::of(self.low()), T::of(n as f64 - 1.0 - 2.0 * self.low()));
        if span <= T::of(0.0) {
            return T::of(0.0);
        }
        let from_low = (x - low).abs();
        let turns = (from_low / span).floor();
        let rest = from_low - turns * span;
        let is_even = (turns * T::of(0.5)).floor() * T::of(2.0) == turns;
        if is_even { low + rest } else { low + span - rest }
    }

    /// The element that a whole coordinate stands for.
    fn element<T: Real>(&self, x: T, n: usize) -> Option<usize> {
        let last = T::of(n as f64 - 1.0);
        let x = match self.padding {
            SamplePadding::Zeros if x >= T::of(0.0) && x <= last => x,
            SamplePadding::Zeros => return None,
            SamplePadding::Border => x,
            SamplePadding::Reflection => self.reflected(x, n),
        };
        // NaN, too, is no place: it takes the first element.
        Some(x.within(T::of(0.0), last).to_index())
    }

    fn taps<T: Real>(&self, g: T, n: usize) -> Taps<T> {
        let (one, half) = (T::of(1.0), T::of(0.5));
        let extent = T::of(n as f64);
        let x = match self.align_corners {
            true => (g + one) * half * (extent - one),
            false => ((g + one) * extent - one) * half,
        };
        let x = if self.mode == SampleMode::Nearest { x.round_ties_even() } else { x };
        let x = match self.padding {
            // Between the edge of an element and its centre, the taps beyond it are what is clamped.
            SamplePadding::Border if x < T::of(self.low()) || x > extent - one - T::of(self.low()) => {
                x.within(T::of(0.0), extent - one)
            }
            SamplePadding::Border => x,
            SamplePadding::Reflection => self.reflected(x, n),
            SamplePadding::Zeros => x,
        };
        let first = x.floor();
        let t = x - first;
        let tap = |offset: f64, weight: T| (self.element(first + T::of(offset), n), weight);
        match self.mode {
            SampleMode::Nearest => vec![(self.element(x, n), one)],
            SampleMode::Linear => vec![tap(0.0, one - t), tap(1.0, t)],
            SampleMode::Cubic => {
                vec![
                    tap(-1.0, far(one + t)),
                    tap(0.0, near(t)),
                    tap(1.0, near(one - t)),
                    tap(2.0, far(one + one - t)),
                ]
            }
        }
    }

    fn sample<T: Real>(&self, x: &[T], x_shape: &Shape, grid: &[T], y: &Shape) -> Vec<T> {
        let (batch, channels, extents) = (x_shape[0], x_shape[1], &x_shape[2..]);
        let area: usize = extents.iter().product();
        let places: usize = y[2..].iter().product();
        let mut samples = vec![T::of(0.0); y.elements()];
        if area == 0 {
            return samples;
        }
        let strides = x_shape.strides();
        for (n, p) in (0..batch).flat_map(|n| (0..places).map(move |p| (n, p))) {
            let g = &grid[(n * places + p) * extents.len()..][..extents.len()];
            let axes: Vec<Taps<T>> =
                extents.iter().zip(g.iter().rev()).map(|(&extent, &g)| self.taps(g, extent)).collect();
            // The product of the taps of all dimensions.
            let mut taps: Taps<T> = vec![(Some(0), T::of(1.0))];
            for (axis, &stride) in axes.iter().zip(&strides[2..]) {
                let step = |&(at, w): &(Option<usize>, T)| {
                    axis.iter().map(move |&(i, v)| (at.zip(i).map(|(at, i)| at + i * stride), w * v))
                };
                taps = taps.iter().flat_map(step).collect();
            }
            for c in 0..channels {
                let image = &x[(n * channels + c) * area..][..area];
                let terms = taps.iter().filter_map(|&(at, w)| at.map(|at| image[at] * w));
                samples[(n * channels + c) * places + p] = terms.fold(T::of(0.0), |sum, t| sum + t);
            }
        }
        samples
    }
}

/// ((a + 2)·x − (a + 3))·x² + 1, within 1 of an element, with a = −¾.
fn near<T: Real>(x: T) -> T {
    (T::of(1.25) * x - T::of(2.25)) * x * x + T::of(1.0)
}

/// ((a·x − 5a)·x + 8a)·x − 4a, from 1 to 2 elements away.
fn far<T: Real>(x: T) -> T {
    let a = T::of(-0.75);
    ((a * x - T::of(5.0) * a) * x + T::of(8.0) * a) * x - T::of(4.0) * a
}

impl Operator for GridSample {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, grid] = arity(operands)?;
        let (batch, channels, extents) = Layout::ChannelsFirst.split(&x.shape)?;
        let is_grid = grid.shape.rank() == x.shape.rank()
            && grid.shape[0] == batch
            && grid.shape[grid.shape.rank() - 1] == extents.len();
        if !is_grid || !x.dtype.is_float() || x.dtype != grid.dtype {
            return Err(OpError::shape(format!(
                "takes floats and a grid of places in them, got {x} and {grid}"
            )));
        }
        // Each dimension multiplies the taps.
        if extents.len() > 3 {
            return Err(OpError::unsupported(format!("samples of {} dimensions", extents.len())));
        }
        let mut dims = vec![batch, channels];
        dims.extend(&grid.shape[1..grid.shape.rank() - 1]);
        Ok(vec![TensorType::new(x.dtype, Shape::new(dims)?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (shape, y) = (operands[0].shape(), &results[0].shape);
        let samples = match (Numbers::decode(operands[0])?, Numbers::decode(operands[1])?) {
            (Numbers::F32(x), Numbers::F32(grid)) => Numbers::F32(self.sample(&x, shape, &grid, y)),
            (Numbers::F64(x), Numbers::F64(grid)) => Numbers::F64(self.sample(&x, shape, &grid, y)),
            _ => {
                return Err(OpError::dtype(format!(
                    "takes floats, got {}",
                    DType::name(operands[0].dtype())
                )));
            }
        };
        Ok(vec![samples.encode(results[0].dtype, y.clone())?])
    }
}
