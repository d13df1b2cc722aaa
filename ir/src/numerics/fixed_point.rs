//! Fixed-point factors of the integer ops that are not products of matrices.

/// floor(log2(x)) of a positive finite number.
pub(super) fn exponent(x: f64) -> i32 {
    // Exact for normal numbers; scales are products and quotients of f32 and so never subnormal in f64.
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// 2^n as f64.
pub(super) fn power(n: i32) -> f64 {
    2f64.powi(n)
}

/// A positive real factor as m·2^−n with a 31-bit m: [`apply`](Self::apply) is exact multiplication and one rounding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Multiplier {
    /// Mantissa, in [2^30, 2^31) unless the factor is below 2^−32.
    pub m: i32,
    /// Shift, in 1..=62.
    pub n: u32,
}

impl Multiplier {
    /// The nearest representable factor; `None` unless 0 ≤ `factor` < 2^29.
    pub fn new(factor: f64) -> Option<Multiplier> {
        if factor == 0.0 {
            return Some(Multiplier { m: 0, n: 1 });
        }
        if !(factor > 0.0 && factor < power(29)) {
            return None;
        }
        let n = (30 - exponent(factor)).min(62);
        Some(Multiplier::with_shift(factor, n as u32))
    }

    /// The nearest factor for this or, where m would reach 2^31, the next smaller shift.
    pub(super) fn with_shift(factor: f64, n: u32) -> Multiplier {
        let m = (factor * power(n as i32)).round();
        if m < power(31) { Multiplier { m: m as i32, n } } else { Multiplier { m: 1 << 30, n: n - 1 } }
    }

    /// round(x·m·2^−n), ties towards +∞: (x·m + 2^(n−1)) >> n in 64 bits (TOSA RESCALE, single round).
    pub fn apply(self, x: i32) -> i64 {
        (i64::from(x) * i64::from(self.m) + (1i64 << (self.n - 1))) >> self.n
    }
}

/// Factors of a quantized sum or difference: (m₁·u₁ + m₂·u₂ + 2^(s−1)) >> s with u = q − zero_point.
///
/// The factors have 15 bits and a sign: with the operands as 16-bit lanes this is one `pmaddwd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddRescale {
    /// Factor of the first operand.
    pub m1: i16,
    /// Factor of the second operand; negative for a difference.
    pub m2: i16,
    /// Shift, in 1..=30.
    pub s: u32,
}

impl AddRescale {
    /// Factors for s₁/s_y and ±s₂/s_y. `None` where one is 2^13 or more.
    pub fn new(f1: f64, f2: f64) -> Option<AddRescale> {
        let largest = f1.abs().max(f2.abs());
        if !(largest > 0.0 && largest < power(13)) {
            return None;
        }
        let mut s = (14 - exponent(largest)).min(30);
        if (largest * power(s)).round() > 32767.0 {
            s -= 1;
        }
        Some(AddRescale {
            m1: (f1 * power(s)).round() as i16,
            m2: (f2 * power(s)).round() as i16,
            s: s as u32,
        })
    }

    /// The rescaled sum, without the output's zero point. `u1` and `u2` are within ±255.
    pub fn apply(self, u1: i32, u2: i32) -> i32 {
        (i32::from(self.m1) * u1 + i32::from(self.m2) * u2 + (1 << (self.s - 1))) >> self.s
    }
}

/// Factor of a quantized product: (m·u₁·u₂ + 2^(s−1)) >> s with u = q − zero_point, all in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MulRescale {
    /// Factor, below 2^14.
    pub m: i16,
    /// Shift, in 1..=30.
    pub s: u32,
}

impl MulRescale {
    /// The factor for s₁·s₂/s_y. `None` where it is 2^12 or more.
    pub fn new(factor: f64) -> Option<MulRescale> {
        if !(factor > 0.0 && factor < power(12)) {
            return None;
        }
        let mut s = (13 - exponent(factor)).min(30);
        if (factor * power(s)).round() > 16383.0 {
            s -= 1;
        }
        Some(MulRescale { m: (factor * power(s)).round() as i16, s: s as u32 })
    }

    /// The rescaled product, without the output's zero point. `u1` and `u2` are within ±255.
    pub fn apply(self, u1: i32, u2: i32) -> i32 {
        // |u1·u2| ≤ 65,025 < 2^16 and m < 2^14: the sum with the rounding term stays below 2^31.
        (u1 * u2 * i32::from(self.m) + (1 << (self.s - 1))) >> self.s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vectors() {
        assert_eq!(Multiplier::new(0.5), Some(Multiplier { m: 1 << 30, n: 31 }));
        assert_eq!(
            Multiplier::new(1.0 - 1e-12),
            Some(Multiplier { m: 1 << 30, n: 30 }),
            "a mantissa that rounds up to 2^31 moves into the shift"
        );
        let half = Multiplier::new(0.5).unwrap();
        assert_eq!([3, 1, -1, -3, 5].map(|x| half.apply(x)), [2, 1, 0, -1, 3]);
        assert_eq!(Multiplier::new(1e-30).map(|m| m.apply(i32::MAX)), Some(0));
        assert_eq!(Multiplier::new(f64::NAN), None);
        assert_eq!(Multiplier::new(power(29)), None);

        let sum = AddRescale::new(1.0, 0.5).unwrap();
        assert_eq!(sum, AddRescale { m1: 1 << 14, m2: 1 << 13, s: 14 });
        assert_eq!(sum.apply(10, 3), 12); // 11.5 goes up
        assert_eq!(sum.apply(-10, -3), -11);
        let difference = AddRescale::new(1.0, -1.0).unwrap();
        assert_eq!(difference.apply(255, -255), 510);

        let product = MulRescale::new(0.01).unwrap();
        assert_eq!(product.apply(-255, 255), -650);
        assert_eq!(product.apply(255, 255), 650);
    }

    #[test]
    fn extremes_do_not_overflow() {
        for f in [power(12) * 0.999, 1.0, 1e-12] {
            let m = MulRescale::new(f).unwrap();
            assert!(m.m < 1 << 14);
            m.apply(255, 255);
            m.apply(-255, 255);
        }
        for f in [power(13) * 0.999, 0.99999, 1e-12] {
            let a = AddRescale::new(f, -f).unwrap();
            a.apply(255, -255);
            a.apply(-255, 255);
        }
    }
}
