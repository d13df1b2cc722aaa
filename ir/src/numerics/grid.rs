use crate::{DType, OutputGrid, ops::UnaryKind};

/// Real number to code: clamp(round_half_even(x / scale) + zero_point, lo, hi).
///
/// The division is a division, as ONNX QuantizeLinear defines it, not a product with a reciprocal. The clamp comes
/// before the conversion to integer, so infinities saturate; NaN becomes `lo` (what `maxps` makes of it).
pub fn quantize(x: f32, scale: f32, zero_point: i32, lo: i32, hi: i32) -> i32 {
    let rounded = round_half_even(x / scale);
    // Exact in f32: at most ±2^24, which is what `FakeQuant` takes for a bias.
    let (least, most) = ((lo - zero_point) as f32, (hi - zero_point) as f32);
    let above = if rounded > least { rounded } else { least };
    let within = if above < most { above } else { most };
    within as i32 + zero_point
}

/// round_half_even(x), but for the sign of a zero, which no code has. Where it makes no function call of it, which takes
/// longer than all the rest: below 2^22, adding 1.5·2^23 leaves no bit for a fraction, and the addition rounds to even.
fn round_half_even(x: f32) -> f32 {
    const SPLIT: f32 = 12_582_912.0;
    if x.abs() < 4_194_304.0 { x + SPLIT - SPLIT } else { x.round_ties_even() }
}

/// Code to real number: f32(q − zero_point) · scale. The conversion is exact up to 24 bits, so there is one rounding;
/// of wider ones (s32, u32) there are two. Codes are of at most 32 bits.
pub fn dequantize(q: impl Into<i64>, scale: f32, zero_point: i32) -> f32 {
    (q.into() - i64::from(zero_point)) as f32 * scale
}

/// A pixel as a network was trained on it: (x − mean)/std, each operation in f32; mean and std in units of a pixel.
pub fn normalize(pixel: u8, mean: f32, std: f32) -> f32 {
    (f32::from(pixel) - mean) / std
}

/// A function of quantized values as a table: quantize(f(dequantize(q))) for each code q of 8 bits, indexed by the byte
/// that holds q.
///
/// `dtype` is the operand's 8-bit type, `scale` and `zero_point` its grid.
pub fn table(
    function: UnaryKind,
    dtype: DType,
    scale: f32,
    zero_point: i32,
    output: OutputGrid,
) -> [u8; 256] {
    let signed = matches!(dtype, DType::S8 | DType::S4);
    std::array::from_fn(|byte| {
        let q = if signed { i32::from(byte as u8 as i8) } else { byte as i32 };
        let y = function.apply(dequantize(q, scale, zero_point));
        quantize(y, output.scale, output.zero_point, output.lo, output.hi) as u8
    })
}

/// A real number rounded to the grid: what it is after [`quantize`] and [`dequantize`].
pub fn fake_quant(x: f32, scale: f32, zero_point: i32, lo: i32, hi: i32) -> f32 {
    dequantize(quantize(x, scale, zero_point, lo, hi), scale, zero_point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_standard_at_every_half() {
        let near = |x: f32| [x, x.next_up(), x.next_down(), -x, -x.next_up(), -x.next_down()];
        let halves =
            (0..40).chain((1..24).flat_map(|b| (1 << b) - 3..(1 << b) + 3)).map(|n: i32| n as f32 / 2.0);
        for x in halves.chain([f32::MAX, f32::INFINITY, 0.1, 1e-30]).flat_map(near) {
            assert_eq!(round_half_even(x), x.round_ties_even(), "{x}");
        }
        assert!(round_half_even(f32::NAN).is_nan());
    }

    #[test]
    fn golden_vectors() {
        for (x, code) in [
            (0.0, 10),
            (0.25, 10), // 0.5 steps: ties to even
            (0.75, 12),
            (1.25, 12),
            (-0.75, 8),
            (1e9, 255),
            (-1e9, 0),
            (f32::INFINITY, 255),
            (f32::NEG_INFINITY, 0),
            (f32::NAN, 0),
        ] {
            assert_eq!(quantize(x, 0.5, 10, 0, 255), code, "{x}");
        }
        assert_eq!(dequantize(12, 0.5, 10), 1.0);
        assert_eq!(fake_quant(0.8, 0.5, 10, 0, 255), 1.0);
    }
}
