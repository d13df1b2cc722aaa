//! Floats of 8 and 4 bits, which numbers are stored in: nothing is computed in them.
//!
//! | type | sign, exponent, fraction | bias | largest | infinite | NaN |
//! |---|---|---|---|---|---|
//! | f8e4m3fn | 1, 4, 3 | 7 | 448 | none | all ones |
//! | f8e4m3fnuz | 1, 4, 3 | 8 | 240 | none | what −0 would be |
//! | f8e5m2 | 1, 5, 2 | 15 | 57344 | yes | fractions beyond it |
//! | f8e5m2fnuz | 1, 5, 2 | 16 | 57344 | none | what −0 would be |
//! | f8e8m0 | 0, 8, 0 | 127 | 2^127 | none | all ones |
//! | f4e2m1 | 1, 2, 1 | 1 | 6 | none | none |
//!
//! After OCP's *8-bit Floating Point Specification* and *Microscaling Formats*, and Noune et al., *8-bit Numerical Formats
//! for Deep Neural Networks*, for the types without −0.

use crate::DType;
use serde::{Deserialize, Serialize};

/// How a number becomes one of f8e8m0, which has powers of two only. The other types round to nearest, half to even.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum PowerRounding {
    /// The next power that is not smaller.
    #[default]
    Up,
    /// The next power that is not larger.
    Down,
    /// The nearest power; half way the one whose exponent is even.
    Nearest,
}

/// The layout of a type with a sign.
struct Layout {
    fraction_bits: i32,
    bias: i32,
    /// Codes without their sign.
    largest: u8,
    infinity: Option<u8>,
    nan: Nan,
}

#[derive(PartialEq)]
enum Nan {
    None,
    /// This code and those above it.
    From(u8),
    NegativeZero,
}

impl Layout {
    /// `None` of types that are no such floats.
    fn of(dtype: DType) -> Option<Layout> {
        let (fraction_bits, bias, largest, infinity, nan) = match dtype {
            DType::F8E4M3Fn => (3, 7, 0x7e, None, Nan::From(0x7f)),
            DType::F8E4M3Fnuz => (3, 8, 0x7f, None, Nan::NegativeZero),
            DType::F8E5M2 => (2, 15, 0x7b, Some(0x7c), Nan::From(0x7d)),
            DType::F8E5M2Fnuz => (2, 16, 0x7f, None, Nan::NegativeZero),
            DType::F4E2M1 => (1, 1, 0x7, None, Nan::None),
            _ => return None,
        };
        Some(Layout { fraction_bits, bias, largest, infinity, nan })
    }

    fn sign(&self) -> u8 {
        if self.largest < 8 { 8 } else { 0x80 }
    }

    /// The number of a code without its sign.
    fn magnitude(&self, code: u8) -> f32 {
        let (exponent, fraction) =
            (i32::from(code >> self.fraction_bits), i32::from(code & ((1 << self.fraction_bits) - 1)));
        let implied = if exponent == 0 { 0 } else { 1 << self.fraction_bits };
        (fraction + implied) as f32 * power_of_two(exponent.max(1) - self.bias - self.fraction_bits) as f32
    }
}

/// 2ⁿ for −1022 ≤ n ≤ 1023.
fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1023) as u64) << 52)
}

/// The number behind a code, which is exact; the code as it is of types that are no small floats.
pub fn small_float(dtype: DType, code: u8) -> f32 {
    let Some(layout) = Layout::of(dtype) else {
        return match dtype {
            DType::F8E8M0 if code == u8::MAX => f32::NAN,
            DType::F8E8M0 => power_of_two(i32::from(code) - 127) as f32,
            _ => code.into(),
        };
    };
    let magnitude = code & (layout.sign() - 1);
    let is_nan = match layout.nan {
        Nan::None => false,
        Nan::From(first) => magnitude >= first,
        Nan::NegativeZero => code == layout.sign(),
    };
    let x = match layout.infinity {
        _ if is_nan => f32::NAN,
        Some(infinity) if magnitude == infinity => f32::INFINITY,
        _ => layout.magnitude(magnitude),
    };
    if code & layout.sign() != 0 { -x } else { x }
}

/// The code of a number. One that is too large becomes the largest if it is to saturate, otherwise infinite or NaN, if
/// the type has one. NaN becomes −0 of f4e2m1, which has none. Of f8e8m0 the sign is lost, and infinity is NaN.
pub fn small_float_code(dtype: DType, x: f32, saturate: bool, rounding: PowerRounding) -> u8 {
    let Some(layout) = Layout::of(dtype) else { return power_code(x, saturate, rounding) };
    let sign = if x.is_sign_negative() { layout.sign() } else { 0 };
    let nan = match layout.nan {
        // As the conversions that ONNX's cases were made with have it.
        Nan::None => layout.sign(),
        // The quiet one, where there are several.
        Nan::From(_) if layout.infinity.is_some() => sign | 0x7e,
        Nan::From(first) => sign | first,
        Nan::NegativeZero => layout.sign(),
    };
    if x.is_nan() {
        return nan;
    }
    let x = f64::from(x.abs());
    // Normal in f64, whatever f32 it was.
    let exponent = ((x.to_bits() >> 52) as i32 - 1023).clamp(1 - layout.bias, 128);
    // Of numbers below the normal ones the first term is 0; a fraction that is rounded up to the next power carries.
    let steps = (x / power_of_two(exponent - layout.fraction_bits)).round_ties_even();
    let code = (f64::from((exponent + layout.bias - 1) << layout.fraction_bits) + steps) as i64;
    let fits = code <= i64::from(layout.largest);
    let magnitude = match layout.infinity {
        _ if fits => code as u8,
        _ if saturate || layout.nan == Nan::None => layout.largest,
        Some(infinity) => infinity,
        None => return nan,
    };
    // Without −0 there is no sign of zero.
    if magnitude == 0 && layout.nan == Nan::NegativeZero { 0 } else { sign | magnitude }
}

fn power_code(x: f32, saturate: bool, rounding: PowerRounding) -> u8 {
    if !x.is_finite() {
        return u8::MAX;
    }
    let bits = f64::from(x.abs()).to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    let fraction = bits & ((1 << 52) - 1);
    let half = 1 << 51;
    let up = match rounding {
        PowerRounding::Up => fraction > 0,
        PowerRounding::Down => false,
        PowerRounding::Nearest => fraction > half || fraction == half && exponent & 1 != 0,
    };
    match exponent + i32::from(up) + 127 {
        255.. if saturate => 254,
        code => code.clamp(0, 255) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNED: [DType; 5] =
        [DType::F8E4M3Fn, DType::F8E4M3Fnuz, DType::F8E5M2, DType::F8E5M2Fnuz, DType::F4E2M1];

    fn codes(dtype: DType) -> std::ops::RangeInclusive<u8> {
        if dtype == DType::F4E2M1 { 0..=15 } else { 0..=255 }
    }

    #[test]
    fn every_code_comes_back_from_its_number() {
        for dtype in SIGNED.into_iter().chain([DType::F8E8M0]) {
            for code in codes(dtype) {
                let x = small_float(dtype, code);
                for saturate in [false, true] {
                    let back = small_float_code(dtype, x, saturate, PowerRounding::Nearest);
                    let again = small_float(dtype, back);
                    let saturates = saturate && x.is_infinite();
                    assert!(
                        back == code || x.is_nan() && again.is_nan() || saturates,
                        "{dtype} {code:#x} {x}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_become_the_nearest_ones_half_to_even() {
        for dtype in SIGNED {
            let finite: Vec<u8> = (0..(codes(dtype).count() / 2) as u8)
                .filter(|&c| small_float(dtype, c).is_finite())
                .collect();
            for pair in finite.windows(2) {
                let [a, b] = [pair[0], pair[1]].map(|c| small_float(dtype, c));
                let middle = a + (b - a) / 2.0;
                let (below, above) =
                    (f32::from_bits(middle.to_bits() - 1), f32::from_bits(middle.to_bits() + 1));
                let code = |x| small_float_code(dtype, x, true, PowerRounding::Up);
                let even = pair[0] + (pair[0] & 1);
                assert_eq!(
                    (code(below), code(middle), code(above)),
                    (pair[0], even, pair[1]),
                    "{dtype} {a} {b}"
                );
            }
        }
    }

    #[test]
    fn ends_of_the_ranges() {
        let largest = SIGNED.map(|d| small_float(d, small_float_code(d, f32::MAX, true, PowerRounding::Up)));
        assert_eq!(largest, [448.0, 240.0, 57344.0, 57344.0, 6.0]);
        let over = SIGNED.map(|d| small_float_code(d, f32::NEG_INFINITY, false, PowerRounding::Up));
        assert_eq!(over, [0xff, 0x80, 0xfc, 0x80, 0xf]);
        let none = SIGNED.map(|d| small_float_code(d, f32::NAN, true, PowerRounding::Up));
        assert_eq!(none, [0x7f, 0x80, 0x7e, 0x80, 0x8]);
        assert_eq!(
            SIGNED.map(|d| small_float_code(d, -1e-9, true, PowerRounding::Up)),
            [0x80, 0, 0x80, 0, 8]
        );
    }

    #[test]
    fn powers_are_rounded_as_asked() {
        use PowerRounding::{Down, Nearest, Up};
        let code = |x, rounding| small_float_code(DType::F8E8M0, x, true, rounding);
        assert_eq!([code(1.1, Up), code(1.1, Down), code(1.1, Nearest)], [128, 127, 127]);
        assert_eq!([code(1.5, Nearest), code(3.0, Nearest), code(-3.1, Nearest)], [127, 129, 129]);
        assert_eq!([code(0.0, Up), code(f32::MAX, Up), code(f32::INFINITY, Up)], [0, 254, 255]);
        assert_eq!(small_float_code(DType::F8E8M0, f32::MAX, false, Up), 255);
        assert_eq!(small_float(DType::F8E8M0, 0), 2f32.powi(-127));
    }
}
