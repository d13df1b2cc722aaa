//! Inputs that are made up.

use crate::TensorInfo;
use qcc_ir::{DType, Shape, Tensor};

/// Noise for one input: standard normal for floats, uniform for bytes, which are pixels, and zeros for other integers (any
/// index is then valid).
pub(crate) fn noise(input: &TensorInfo, sample: u64, number: u64) -> Tensor {
    let shape: &Shape = &input.ty.shape;
    let mut state = sample.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.wrapping_mul(0xD1B5_4A32_D192_ED03);
    let elements = 0..shape.elements();
    let noise = match input.ty.dtype {
        DType::F32 => Tensor::from_vec(shape.clone(), elements.map(|_| normal(&mut state)).collect()),
        DType::U8 => Tensor::from_vec(shape.clone(), elements.map(|_| next(&mut state) as u8).collect()),
        other => Ok(Tensor::zeros(other, shape.clone())),
    };
    noise.unwrap_or_else(|_| Tensor::zeros(input.ty.dtype, shape.clone()))
}

/// SplitMix64 (Steele et al., OOPSLA 2014).
pub(super) fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number of mean 0 and variance 1: the sum of twelve uniform ones (Irwin–Hall), which needs no function that
/// differs between hosts. The uniform ones are 16-bit pieces of [`next`].
fn normal(state: &mut u64) -> f32 {
    let mut sum = 0u64;
    for _ in 0..3 {
        let z = next(state);
        sum += (0..4).map(|i| (z >> (16 * i)) & 0xFFFF).sum::<u64>();
    }
    sum as f32 / 65536.0 - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::TensorType;

    #[test]
    fn noise_has_mean_zero_and_variance_one_and_differs_between_samples() {
        let i = TensorInfo {
            name: "a".into(),
            ty: TensorType::new(DType::F32, Shape::new([1, 10_000]).unwrap()),
        };
        let x = noise(&i, 3, 0).to_f32().unwrap();
        let mean = x.iter().sum::<f32>() / 1e4;
        let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        assert_ne!(noise(&i, 3, 0), noise(&i, 4, 0));
        assert_eq!(noise(&i, 3, 0), noise(&i, 3, 0));
    }
}
