//! Interpolation along an axis: what ONNX's Resize and Upsample are made of, one op for each axis that changes.

use super::{Operator, arity, conv::per_tensor};
use crate::{DType, OpError, OutputGrid, Shape, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// How a position between two elements becomes the index of one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Nearest {
    /// Halves go down.
    PreferFloor,
    /// Halves go up.
    PreferCeil,
    /// Down.
    Floor,
    /// Up.
    Ceil,
}

/// What is made of the elements around a position.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Interpolation {
    /// One of them.
    Nearest(Nearest),
    /// The two neighbours, by distance.
    Linear {
        /// Where the axis shrinks, the triangle is stretched over all elements that it stands for.
        antialias: bool,
    },
    /// Four neighbours, by the cubic convolution of Keys (1981).
    Cubic {
        /// Slope parameter, −0.75 or −0.5 as a rule.
        a: f32,
        /// As in [`Linear`](Self::Linear).
        antialias: bool,
    },
}

/// Where element `i` of the result lies among the elements of the operand. `n` are the operand's elements, `s` is the
/// [`scale`](Resample::scale), `m` is s·n: the result's elements, but for rounding. (The standard's text has the
/// rounded number in its place; its reference implementation, which this follows, has not.)
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Coordinates {
    /// (i + ½)/s − ½.
    HalfPixel,
    /// [`HalfPixel`](Self::HalfPixel), moved so that the centre stays the centre where the number of elements was rounded.
    HalfPixelSymmetric,
    /// [`HalfPixel`](Self::HalfPixel), but 0 where there is one element only.
    PytorchHalfPixel,
    /// i·(n − 1)/(m − 1), 0 for m = 1.
    AlignCorners,
    /// i/s.
    Asymmetric,
    /// (i + ½)/s.
    TfHalfPixelForNn,
    /// A region: from start·(n − 1) to end·(n − 1), its middle for m = 1.
    TfCropAndResize {
        /// First position, in units of n − 1.
        start: f32,
        /// Last position, likewise.
        end: f32,
        /// Value of positions outside the operand.
        outside: f32,
    },
}

/// y[…, i, …] = Σ_t w[i][t]·x[…, j[i][t], …] along one axis, in f32: t ascending, every product rounded, every sum
/// rounded. Positions beyond the ends take the elements at the ends.
///
/// With [`Interpolation::Nearest`] elements are only picked: then any type will do, and a quantized one keeps its grid.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Resample {
    /// The axis.
    pub axis: usize,
    /// Elements of the result along it.
    pub length: usize,
    /// Elements of the result for each of the operand, as the coordinates see it: need not be the quotient of the
    /// lengths.
    pub scale: f64,
    /// What is made of neighbours.
    pub interpolation: Interpolation,
    /// Where the elements of the result lie.
    pub coordinates: Coordinates,
    /// Whether neighbours that do not exist have no weight, so that the others share theirs, instead of repeating the
    /// element at the end.
    pub exclude_outside: bool,
}

/// A [`Resample`] of u8 codes with one grid, to another grid: see [`FixedTaps`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QResample {
    /// What is computed of the real numbers.
    pub resample: Resample,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

/// The weighted sums that a [`Resample`] is: as many taps for each element of the result.
#[derive(Clone, PartialEq, Debug)]
pub struct Taps {
    /// Taps of one element.
    pub count: usize,
    /// For each element of the result, the elements of the operand.
    pub sources: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
    /// What each sum starts from.
    pub offsets: Vec<f32>,
}

/// The sums in integers, grids included: y = clamp((Σ_t w·q + c) >> n, lo, hi) in 32 bits, where w = round(w_t·s_x/s_y·2^n)
/// and c = z_y·2^n + 2^(n−1) − z_x·Σ w + round(offset/s_y·2^n).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FixedTaps {
    /// Taps of one element.
    pub count: usize,
    /// For each element of the result, the codes of the operand.
    pub sources: Vec<u32>,
    /// w: 16 bits, so that pairs of taps are one `pmaddwd`.
    pub weights: Vec<i16>,
    /// c.
    pub starts: Vec<i32>,
    /// n, in 1..=14.
    pub shift: u32,
}

/// Largest extent of a resampled axis: positions are computed in f64 and indices kept in 32 bits.
const MAX_LENGTH: usize = 1 << 24;
/// Most taps of an element: an antialiased reduction to a 256th of the length.
const MAX_TAPS: usize = 1024;

/// The cubic convolution kernel at distance `x`.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    match x {
        ..=1.0 => (a + 2.0) * x * x * x - (a + 3.0) * x * x + 1.0,
        ..2.0 => a * x * x * x - 5.0 * a * x * x + 8.0 * a * x - 4.0 * a,
        _ => 0.0,
    }
}

impl Resample {
    /// Whether elements are only picked.
    pub fn is_pick(&self) -> bool {
        let cropped = matches!(self.coordinates, Coordinates::TfCropAndResize { .. });
        matches!(self.interpolation, Interpolation::Nearest(_)) && !cropped
    }

    /// How many elements of the operand an element of the result is made of.
    pub fn taps_of_each(&self) -> usize {
        self.footprint().1
    }

    /// The position of element `i` of the result, in elements of the operand, of which there are `n`.
    fn position(&self, i: usize, n: usize) -> f64 {
        let (i, n, s, length) = (i as f64, n as f64, self.scale, self.length as f64);
        let m = s * n;
        let half_pixel = (i + 0.5) / s - 0.5;
        match self.coordinates {
            Coordinates::HalfPixel => half_pixel,
            Coordinates::HalfPixelSymmetric => n / 2.0 * (1.0 - length / m) + half_pixel,
            Coordinates::PytorchHalfPixel if length <= 1.0 => 0.0,
            Coordinates::PytorchHalfPixel => half_pixel,
            Coordinates::AlignCorners if m <= 1.0 => 0.0,
            Coordinates::AlignCorners => i * (n - 1.0) / (m - 1.0),
            Coordinates::Asymmetric => i / s,
            Coordinates::TfHalfPixelForNn => (i + 0.5) / s,
            Coordinates::TfCropAndResize { start, end, .. } => {
                let (start, end) = (f64::from(start), f64::from(end));
                match m {
                    ..=1.0 => (start + end) / 2.0 * (n - 1.0),
                    _ => start * (n - 1.0) + i * (end - start) * (n - 1.0) / (m - 1.0),
                }
            }
        }
    }

    /// The scale that stretches the interpolation's kernel: below 1 where an axis shrinks and is antialiased.
    fn stretch(&self) -> f64 {
        match self.interpolation {
            Interpolation::Linear { antialias: true } | Interpolation::Cubic { antialias: true, .. } => {
                self.scale.min(1.0)
            }
            _ => 1.0,
        }
    }

    /// Half the support of the interpolation's kernel, in elements of the operand.
    fn reach(&self) -> f64 {
        match self.interpolation {
            Interpolation::Nearest(_) => 0.0,
            Interpolation::Linear { .. } => 1.0 / self.stretch(),
            Interpolation::Cubic { .. } => 2.0 / self.stretch(),
        }
    }

    /// First neighbour, counted from the element at or before the position, and number of neighbours.
    fn footprint(&self) -> (i64, usize) {
        match self.interpolation {
            Interpolation::Nearest(_) => (0, 1),
            _ => {
                let first = (-self.reach()).floor() as i64 + 1;
                (first, (2 - 2 * first) as usize)
            }
        }
    }

    /// Neighbours (perhaps beyond the ends) and weights of a position.
    fn neighbours(&self, position: f64) -> Vec<(i64, f64)> {
        let below = position.floor();
        let (first, count) = self.footprint();
        let kernel = |distance: f64| match self.interpolation {
            Interpolation::Nearest(_) => 1.0,
            Interpolation::Linear { .. } => (1.0 - (distance * self.stretch()).abs()).clamp(0.0, 1.0),
            Interpolation::Cubic { a, .. } => cubic(distance * self.stretch(), a.into()),
        };
        let base = match self.interpolation {
            Interpolation::Nearest(Nearest::PreferFloor) => (position - 0.5).ceil(),
            Interpolation::Nearest(Nearest::PreferCeil) => (position + 0.5).floor(),
            Interpolation::Nearest(Nearest::Ceil) => position.ceil(),
            _ => below,
        };
        (0..count as i64)
            .map(|t| {
                let at = base as i64 + first + t;
                (at, kernel(at as f64 - position))
            })
            .collect()
    }

    /// The sums over an axis of `n` elements.
    pub fn taps(&self, n: usize) -> Taps {
        let (_, count) = self.footprint();
        let mut taps = Taps {
            count,
            sources: Vec::with_capacity(self.length * count),
            weights: Vec::with_capacity(self.length * count),
            offsets: Vec::with_capacity(self.length),
        };
        let last = n as i64 - 1;
        for i in 0..self.length {
            let position = self.position(i, n);
            if let Coordinates::TfCropAndResize { outside, .. } = self.coordinates
                && !(0.0..=last as f64).contains(&position)
            {
                taps.sources.extend(vec![0; count]);
                taps.weights.extend(vec![0.0; count]);
                taps.offsets.push(outside);
                continue;
            }
            let mut neighbours = self.neighbours(position);
            // A pick has but one.
            if self.exclude_outside && count > 1 {
                for (at, weight) in &mut neighbours {
                    *weight = if (0..=last).contains(at) { *weight } else { 0.0 };
                }
            }
            let total: f64 = neighbours.iter().map(|(_, w)| w).sum();
            for (at, weight) in neighbours {
                taps.sources.push(at.clamp(0, last) as u32);
                taps.weights.push((weight / total) as f32);
            }
            taps.offsets.push(0.0);
        }
        taps
    }

    /// Fails for attributes that mean nothing; the result's shape.
    fn shape(&self, x: &Shape) -> Result<Shape, OpError> {
        let Some(&n) = x.get(self.axis) else {
            return Err(OpError::attribute(format!("axis {} of rank {}", self.axis, x.rank())));
        };
        if n > MAX_LENGTH || self.length > MAX_LENGTH {
            return Err(OpError::too_large(format!(
                "an axis resampled from {n} to {} elements",
                self.length
            )));
        }
        if n == 0 && self.length > 0 {
            return Err(OpError::shape(format!("no elements along axis {} to interpolate", self.axis)));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(OpError::attribute(format!("scale {} is not a finite number above 0", self.scale)));
        }
        let parameters = match self.coordinates {
            Coordinates::TfCropAndResize { start, end, outside } => vec![start, end, outside],
            _ => vec![],
        };
        let slope = if let Interpolation::Cubic { a, .. } = self.interpolation { Some(a) } else { None };
        // Bounds of positions and weights, generous beyond any use: what is computed from them stays finite.
        if let Some(p) = parameters.into_iter().chain(slope).find(|p| p.is_nan() || p.abs() > 1e6) {
            return Err(OpError::attribute(format!("{p} is no usable coordinate or weight")));
        }
        if 2.0 * self.reach() > MAX_TAPS as f64 {
            return Err(OpError::too_large(format!(
                "the sum over {:.0} elements that antialiasing by scale {} takes",
                2.0 * self.reach(),
                self.scale
            )));
        }
        // Positions stay in i64 and weights are a number.
        if n as f64 / self.scale > 1e15 {
            return Err(OpError::attribute(format!("scale {} is too small", self.scale)));
        }
        let mut dims = x.to_vec();
        dims[self.axis] = self.length;
        let shape = Shape::new(dims)?;
        let taps = self.taps(n);
        if taps.weights.iter().any(|w| !w.is_finite()) {
            return Err(OpError::attribute("the weights of an element sum to 0".to_string()));
        }
        Ok(shape)
    }
}

impl QResample {
    /// The integer sums for an operand of this type.
    ///
    /// # Errors
    /// Where weights or sums leave their bits.
    pub fn fixed_taps(&self, operand: &TensorType) -> Result<FixedTaps, OpError> {
        let (s_x, z_x) = per_tensor(operand, "input")?;
        let taps = self.resample.taps(operand.shape[self.resample.axis]);
        let ratio = f64::from(s_x) / f64::from(self.output.scale);
        let largest = taps.weights.iter().fold(0f64, |m, &w| m.max(f64::from(w).abs())) * ratio;
        let fits = |n: u32| (largest * f64::from(1u32 << n)).round() <= f64::from(i16::MAX);
        let shift = (1..=14).rev().find(|&n| fits(n)).ok_or_else(|| {
            OpError::quant(format!(
                "the step of {operand} is {ratio} times the output's {}",
                self.output.scale
            ))
        })?;
        let one = f64::from(1u32 << shift);
        let weights: Vec<i16> =
            taps.weights.iter().map(|&w| (f64::from(w) * ratio * one).round() as i16).collect();
        let mut starts = Vec::with_capacity(taps.offsets.len());
        for (own, &offset) in weights.chunks(taps.count).zip(&taps.offsets) {
            let sum: i64 = own.iter().map(|&w| i64::from(w)).sum();
            let magnitude: i64 = own.iter().map(|&w| i64::from(w).abs()).sum();
            let moved = (f64::from(offset) / f64::from(self.output.scale) * one).round() as i64;
            let zero = i64::from(self.output.zero_point) << shift;
            let start = zero
                .saturating_add(1 << (shift - 1))
                .saturating_add(moved)
                .saturating_sub(i64::from(z_x) * sum);
            let bound = start.saturating_abs().saturating_add(255 * magnitude);
            if bound > i64::from(i32::MAX) {
                return Err(OpError::quant(format!(
                    "a sum of {} weighted codes overflows 32 bits",
                    taps.count
                )));
            }
            starts.push(start as i32);
        }
        Ok(FixedTaps { count: taps.count, sources: taps.sources, weights, starts, shift })
    }
}

/// Extents before the axis, along it, and behind it.
fn extents(shape: &Shape, axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}

/// For each element of the result what `add(sum, weight, place of the operand's element)` makes of its start and taps, in
/// their order.
fn sums<T: Copy, W: Copy>(
    (outer, n, inner): (usize, usize, usize),
    (count, sources, weights): (usize, &[u32], &[W]),
    starts: impl Iterator<Item = T> + Clone,
    add: impl Fn(T, W, usize) -> T,
) -> Vec<T> {
    let mut sums = Vec::new();
    for o in 0..outer {
        for (i, start) in starts.clone().enumerate() {
            let own = i * count..(i + 1) * count;
            for e in 0..inner {
                let terms = sources[own.clone()].iter().zip(&weights[own.clone()]);
                let at = |source: u32| (o * n + source as usize) * inner + e;
                sums.push(terms.fold(start, |sum, (&source, &w)| add(sum, w, at(source))));
            }
        }
    }
    sums
}

impl Operator for Resample {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let allowed = match self.is_pick() {
            true => x.quant.is_none() || x.per_tensor().is_some(),
            false => x.dtype == DType::F32,
        };
        if !allowed {
            return Err(OpError::dtype(format!("{:?} interpolation of {x}", self.interpolation)));
        }
        let y = self.shape(&x.shape)?;
        Ok(vec![x.with_shape(y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0], &results[0].shape);
        let extents = extents(x.shape(), self.axis);
        let (outer, n, inner) = extents;
        let taps = self.taps(n);
        if self.is_pick() {
            let run = inner * x.dtype().size();
            let mut bytes = Vec::with_capacity(results[0].bytes());
            for o in 0..outer {
                for &source in &taps.sources {
                    bytes.extend(&x.bytes()[(o * n + source as usize) * run..][..run]);
                }
            }
            return Ok(vec![Tensor::from_bytes(x.dtype(), y.clone(), bytes.into())?]);
        }
        let elements = x.as_slice::<f32>()?;
        let starts = taps.offsets.iter().copied();
        let sums = sums(extents, (taps.count, &taps.sources, &taps.weights), starts, |sum, w, at| {
            sum + w * elements[at]
        });
        Ok(vec![Tensor::from_vec(y.clone(), sums)?])
    }
}

impl Operator for QResample {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        per_tensor(&x, "input")?;
        self.output.check()?;
        if self.output.dtype != DType::U8 {
            return Err(OpError::quant(format!("writes u8, not {}", self.output.dtype)));
        }
        let y = self.resample.shape(&x.shape)?;
        self.fixed_taps(&x)?;
        Ok(vec![TensorType::quantized(DType::U8, y, self.output.params()?)?])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, y) = (operands[0], &results[0].shape);
        let extents = extents(x.shape(), self.resample.axis);
        let taps = self.fixed_taps(types[0])?;
        let codes = x.as_slice::<u8>()?;
        let starts = taps.starts.iter().copied();
        let sums = sums(extents, (taps.count, &taps.sources, &taps.weights), starts, |sum, w, at| {
            sum + i32::from(w) * i32::from(codes[at])
        });
        let OutputGrid { lo, hi, .. } = self.output;
        let result: Vec<u8> = sums.into_iter().map(|sum| (sum >> taps.shift).clamp(lo, hi) as u8).collect();
        Ok(vec![Tensor::from_bytes(DType::U8, y.clone(), result.into())?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QuantParams;

    fn resample(
        length: usize,
        scale: f64,
        interpolation: Interpolation,
        coordinates: Coordinates,
    ) -> Resample {
        Resample { axis: 0, length, scale, interpolation, coordinates, exclude_outside: false }
    }

    fn run(op: &Resample, x: &[f32]) -> Vec<f32> {
        let x = Tensor::from_vec(Shape::new([x.len()]).unwrap(), x.to_vec()).unwrap();
        let ty = x.ty();
        let results = op.infer(&[&ty]).unwrap();
        let y = op.eval(&[&x], &[&ty], &results).unwrap();
        y[0].as_slice::<f32>().unwrap().to_vec()
    }

    #[test]
    fn positions_are_those_of_the_standard() {
        let linear = Interpolation::Linear { antialias: false };
        let up = |c| run(&resample(4, 2.0, linear, c), &[1.0, 2.0]);
        assert_eq!(up(Coordinates::HalfPixel), [1.0, 1.25, 1.75, 2.0]);
        assert_eq!(up(Coordinates::Asymmetric), [1.0, 1.5, 2.0, 2.0]);
        assert_eq!(up(Coordinates::AlignCorners), [1.0, 1.0 + 1.0 / 3.0, 1.0 + 2.0 / 3.0, 2.0]);
        let one = run(&resample(1, 0.5, linear, Coordinates::PytorchHalfPixel), &[1.0, 2.0]);
        assert_eq!(one, [1.0]);
        let crop = Coordinates::TfCropAndResize { start: 0.0, end: 2.0, outside: 9.0 };
        assert_eq!(run(&resample(3, 1.5, linear, crop), &[1.0, 3.0]), [1.0, 3.0, 9.0]);
    }

    #[test]
    fn halves_go_where_the_mode_says() {
        let pick = |nearest| {
            let op = resample(4, 2.0, Interpolation::Nearest(nearest), Coordinates::Asymmetric);
            run(&op, &[1.0, 2.0])
        };
        assert_eq!(pick(Nearest::PreferFloor), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(pick(Nearest::PreferCeil), [1.0, 2.0, 2.0, 2.0]);
        assert_eq!(pick(Nearest::Floor), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(pick(Nearest::Ceil), [1.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_constant_stays_what_it_is() {
        for interpolation in [
            Interpolation::Linear { antialias: true },
            Interpolation::Cubic { a: -0.75, antialias: true },
            Interpolation::Cubic { a: -0.5, antialias: false },
        ] {
            for (n, m) in [(7, 3), (3, 7), (10, 1)] {
                let op = resample(m, m as f64 / n as f64, interpolation, Coordinates::HalfPixel);
                for y in run(&op, &vec![3.0; n]) {
                    assert!((y - 3.0).abs() < 1e-5, "{interpolation:?} {n} to {m}: {y}");
                }
            }
        }
    }

    #[test]
    fn codes_follow_the_real_numbers() {
        let interpolation = Interpolation::Cubic { a: -0.75, antialias: false };
        let resample = resample(9, 9.0 / 4.0, interpolation, Coordinates::HalfPixel);
        let grid = |s, z| QuantParams::per_tensor(s, z).unwrap();
        let shape = Shape::new([4]).unwrap();
        let ty = TensorType::quantized(DType::U8, shape.clone(), grid(0.1, 100)).unwrap();
        let codes = vec![0u8, 255, 100, 37];
        let output = OutputGrid::full(DType::U8, 0.13, 90).unwrap();
        let op = QResample { resample: resample.clone(), output };
        let results = op.infer(&[&ty]).unwrap();
        let x = Tensor::from_bytes(DType::U8, shape, codes.clone().into()).unwrap();
        let y = op.eval(&[&x], &[&ty], &results).unwrap();
        let real: Vec<f32> = codes.iter().map(|&q| 0.1 * (f32::from(q) - 100.0)).collect();
        for (&q, real) in y[0].as_slice::<u8>().unwrap().iter().zip(run(&resample, &real)) {
            let expected = (real / 0.13 + 90.0).clamp(0.0, 255.0);
            assert!((f32::from(q) - expected).abs() < 0.52, "{q} for {expected}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let linear = Interpolation::Linear { antialias: true };
        let ty = TensorType::new(DType::F32, Shape::new([4]).unwrap());
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
            let op = resample(2, scale, linear, Coordinates::HalfPixel);
            assert!(op.infer(&[&ty]).is_err(), "scale {scale}");
        }
        let huge = resample(usize::MAX, 2.0, linear, Coordinates::HalfPixel);
        assert!(huge.infer(&[&ty]).is_err());
        let u8s = TensorType::new(DType::U8, Shape::new([4]).unwrap());
        assert!(resample(2, 0.5, linear, Coordinates::HalfPixel).infer(&[&u8s]).is_err());
        let nearest = Interpolation::Nearest(Nearest::Floor);
        assert!(resample(2, 0.5, nearest, Coordinates::HalfPixel).infer(&[&u8s]).is_ok());
    }
}
