//! Pictures that are made up, for when there are none.

use super::{DataError, Preprocess, Samples, preprocess::ImageLayout};
use crate::TensorInfo;
use qcc_ir::{DType, Shape, Tensor};

/// Pictures that stand in for data.
const PICTURES: usize = 16;
/// Leaves of a picture: enough to cover all of it, several times.
const LEAVES: usize = 400;
/// The smallest leaf, in shares of the shorter side, and the largest one.
const SIZES: [f64; 2] = [0.02, 0.6];
/// Mean and deviation that pixels are brought to where nothing is known of the preprocessing.
const MIDDLE: f32 = 127.5;
const SPREAD: f32 = 63.75;

/// Dead leaves for the one input of a model that takes pictures; `None` for any other model.
///
/// Rectangles of one colour each fall on each other, their sizes s distributed with a density of s^−3: then pictures have
/// the same statistics at all scales, edges and even regions among them, as photographs do and noise does not (Lee,
/// Mumford and Huang, "Occlusion models for natural images", 2001; Baradad et al., "Learning to see by looking at noise",
/// 2021). They are pixels, to be preprocessed like any, where the preprocessing is known; else they have about the mean 0 and the
/// deviation 1.
pub(crate) fn dead_leaves(
    inputs: &[TensorInfo],
    preprocess: &Preprocess,
) -> Result<Option<Samples>, DataError> {
    let [input] = inputs else { return Ok(None) };
    let layout = ImageLayout::of(&input.ty.shape).filter(|l| l.elements() > 0);
    let Some(layout) = layout.filter(|_| matches!(input.ty.dtype, DType::F32 | DType::U8)) else {
        return Ok(None);
    };
    let (h, w, c) = (layout.height, layout.width, layout.channels);
    let count = PICTURES.max(input.ty.shape[0]);
    let pixels: Vec<u8> = (0..count).flat_map(|i| picture(i as u64, h, w, c)).collect();
    let is_known = !preprocess.mean.is_empty() || !preprocess.std.is_empty() || input.ty.dtype == DType::U8;
    let wrong = |e: String| DataError::Mismatch { input: input.name.clone(), reason: e };
    let array = if is_known {
        let shape = Shape::new([count, h, w, c]).map_err(|e| wrong(e.to_string()))?;
        Tensor::from_vec(shape, pixels)
    } else {
        let mut dims = input.ty.shape.dims().to_vec();
        dims[0] = count;
        let shape = Shape::new(dims).map_err(|e| wrong(e.to_string()))?;
        Tensor::from_vec(shape, pixels.into_iter().map(|p| (f32::from(p) - MIDDLE) / SPREAD).collect())
    };
    let array = array.map_err(|e| wrong(e.to_string()))?;
    Ok(Some(Samples::made_up("pictures of dead leaves", vec![("x".into(), array)])))
}

/// One picture, `h x w x c`, the same on every host.
fn picture(seed: u64, h: usize, w: usize, c: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1EAF;
    let mut next = || super::noise::next(&mut state);
    let mut pixels = vec![0; h * w * c];
    let shorter = h.min(w) as f64;
    for leaf in 0..LEAVES {
        let uniform = |n: u64| (n >> 11) as f64 / (1u64 << 53) as f64;
        // By inversion of the distribution; the first leaf is the ground.
        let [least, most] = SIZES.map(|s| 1.0 / (s * s));
        let mut side =
            || ((1.0 / (least - uniform(next()) * (least - most)).sqrt()) * shorter).ceil() as usize;
        let (height, width) = if leaf == 0 { (2 * h, 2 * w) } else { (side(), side()) };
        let (y, x) = (next() as usize % h, next() as usize % w);
        let colour = next().to_le_bytes();
        for row in y.saturating_sub(height / 2)..(y + height.div_ceil(2)).min(h) {
            for column in x.saturating_sub(width / 2)..(x + width.div_ceil(2)).min(w) {
                let at = (row * w + column) * c;
                pixels[at..at + c].copy_from_slice(&colour[..c]);
            }
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::TensorType;

    fn input(dtype: DType, dims: &[usize]) -> TensorInfo {
        TensorInfo { name: "x".into(), ty: TensorType::new(dtype, Shape::new(dims).unwrap()) }
    }

    #[test]
    fn pictures_are_pixels_where_it_is_known_what_becomes_of_them() {
        let known = Preprocess { mean: vec![127.0], std: vec![128.0], ..Preprocess::default() };
        for (preprocess, least, most) in [(known, -0.9922, 1.0), (Preprocess::default(), -2.0, 2.0)] {
            for dims in [[2, 3, 20, 30], [1, 20, 30, 3], [1, 1, 32, 32]] {
                let inputs = [input(DType::F32, &dims)];
                let samples = dead_leaves(&inputs, &preprocess).unwrap().unwrap();
                assert!(samples.is_noise());
                let feed = samples.bind(&inputs, &preprocess).unwrap();
                assert_eq!(feed.samples(), PICTURES);
                let x = feed.batch(0).unwrap()[0].to_f32().unwrap();
                let (lo, hi) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
                assert!(lo >= least && hi <= most && hi - lo > 0.7 * (most - least), "{lo} {hi}");
                assert_ne!(feed.batch(0).unwrap(), feed.batch(1).unwrap());
            }
        }
        let none = dead_leaves(&[input(DType::F32, &[1, 40])], &Preprocess::default()).unwrap();
        assert!(none.is_none());
    }
}
