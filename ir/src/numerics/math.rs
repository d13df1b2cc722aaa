//! Elementary functions of f32 as explicit sequences of single IEEE operations.
//!
//! Every step is one correctly rounded f32 addition, subtraction, multiplication or division, a comparison with a
//! select, a rounding to integer, a conversion of a small integer, or an operation on bits. Nothing is fused and
//! nothing branches, so a code generator can emit the same sequence on vectors of any width and get the same bits on
//! every ISA tier. Where a lane's intermediate results mean nothing (NaN, or out of the domain), the last selects
//! discard them; conversions see only clamped values in all other lanes. The payload of a NaN result is not defined.
//!
//! | function | error, as tested over the whole range |
//! |---|---|
//! | [`exp`], [`ln`] | 1 ulp, denormal results included |
//! | [`tanh`] | 1.5 ulp |
//! | [`sigmoid`] | 2 ulp, denormal results included |
//! | [`softplus`] | 3 ulp |
//! | [`erf`] | 2e-7 absolute |
//!
//! The polynomials of `exp`, `ln` and `tanh` are those of Moshier's Cephes library (expf, logf, tanhf), those of `erf`
//! a minimax fit by N. Juffa.

/// Below it `exp` is 0, above [`EXP_MAX`] infinite; clamping to them keeps the exponent arithmetic in range.
pub const EXP_MIN: f32 = -104.0;
/// See [`EXP_MIN`].
pub const EXP_MAX: f32 = 89.0;
/// log₂(e).
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// The leading 10 bits of ln 2: products with exponents are exact.
pub const LN_2_HI: f32 = 0.693_359_4;
/// ln 2 − [`LN_2_HI`].
pub const LN_2_LO: f32 = -2.121_944_4e-4;
/// (eʳ − 1 − r)/r² for |r| ≤ ½·ln 2, highest power first.
pub const EXP_POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1];

/// Bits of √½: mantissas are brought to [√½, √2).
pub const SQRT_HALF_BITS: i32 = 0x3f35_04f3;
/// 2^23, which makes a denormal number normal.
pub const DENORMAL_SCALE: f32 = 8_388_608.0;
/// (ln(1 + f) − f + f²/2)/f³ for 1 + f in [√½, √2), highest power first.
pub const LN_POLYNOMIAL: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_84e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_7e-1,
    2.000_071_4e-1,
    -2.499_999_4e-1,
    3.333_333e-1,
];

/// Below it in magnitude `tanh` is a polynomial, above it a function of `exp`.
pub const TANH_SMALL: f32 = 0.625;
/// (tanh x − x)/x³ as a polynomial in x² for |x| < [`TANH_SMALL`], highest power first.
pub const TANH_POLYNOMIAL: [f32; 5] =
    [-5.704_988_7e-3, 2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1];

/// Below it in magnitude `erf` is a polynomial, above it a function of `exp`.
pub const ERF_SMALL: f32 = 0.927_734_4;
/// The fit ends where f32 does: from here on erf is 1.
pub const ERF_MAX: f32 = 4.0;
/// (erf x − x)/x as a polynomial in x² for |x| < [`ERF_SMALL`], highest power first.
pub const ERF_POLYNOMIAL: [f32; 6] =
    [-5.967_617e-4, 4.991_194_3e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1];
/// (ln(1 − erf x) + x)/x as a polynomial in x for x ≥ [`ERF_SMALL`], highest power first.
pub const ERF_TAIL: [f32; 7] = [
    -1.728_534_7e-5,
    3.831_971_3e-4,
    -3.883_964_4e-3,
    2.425_462_2e-2,
    -1.067_778_8e-1,
    -6.348_467e-1,
    -1.287_175_1e-1,
];

fn select<T>(condition: bool, yes: T, no: T) -> T {
    if condition { yes } else { no }
}

/// c₀·xⁿ + … + cₙ: multiply, add, multiply, add.
fn horner<const N: usize>(x: f32, coefficients: &[f32; N]) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |sum, c| sum * x + c)
}

/// 2ⁿ for −126 ≤ n ≤ 127.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// eˣ.
pub fn exp(x: f32) -> f32 {
    let above = select(x < EXP_MIN, EXP_MIN, x);
    let clamped = select(above > EXP_MAX, EXP_MAX, above);
    let n = (clamped * LOG2_E).round_ties_even();
    // r = high − low, of which high is exact: low joins the tail, where its rounding weighs least.
    let high = clamped - n * LN_2_HI;
    let low = n * LN_2_LO;
    let r = high - low;
    let p = (horner(r, &EXP_POLYNOMIAL) * (r * r) - low) + high + 1.0;
    // In two steps: 2ⁿ itself may be above or below the range of normal numbers.
    let n = n as i32;
    let half = n >> 1;
    let y = p * power_of_two(half) * power_of_two(n - half);
    select(x.is_nan(), x, y)
}

/// Natural logarithm: −∞ of 0, NaN below.
pub fn ln(x: f32) -> f32 {
    let denormal = x < f32::MIN_POSITIVE;
    let normal = select(denormal, x * DENORMAL_SCALE, x);
    let shifted = (normal.to_bits() as i32).wrapping_sub(SQRT_HALF_BITS);
    let n = ((shifted >> 23) - select(denormal, 23, 0)) as f32;
    let f = f32::from_bits(((shifted & 0x007f_ffff) + SQRT_HALF_BITS) as u32) - 1.0;
    let square = f * f;
    let tail = horner(f, &LN_POLYNOMIAL) * f * square;
    let tail = tail + n * LN_2_LO;
    let tail = tail - 0.5 * square;
    let y = (f + tail) + n * LN_2_HI;
    let y = select(x == 0.0, f32::NEG_INFINITY, y);
    let y = select(x < 0.0, f32::NAN, y);
    // +∞ and NaN are their own logarithms.
    select(x < f32::INFINITY, y, x)
}

/// Hyperbolic tangent.
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let small = horner(square, &TANH_POLYNOMIAL) * square * x + x;
    let magnitude = x.abs();
    let large = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    let large = select(x < 0.0, -large, large);
    select(magnitude < TANH_SMALL, small, large)
}

/// 1/(1 + e^−x), accurate also where it is tiny.
pub fn sigmoid(x: f32) -> f32 {
    let t = exp(-x.abs());
    let sum = 1.0 + t;
    // What the sum lost in rounding is known exactly; to first order the quotient is so much too large.
    let lost = t - (sum - 1.0);
    let y = select(x < 0.0, t, 1.0) / sum;
    y - y * lost
}

/// Gauss error function.
pub fn erf(x: f32) -> f32 {
    let small = horner(x * x, &ERF_POLYNOMIAL) * x + x;
    let magnitude = x.abs();
    let magnitude = select(magnitude > ERF_MAX, ERF_MAX, magnitude);
    let large = 1.0 - exp(horner(magnitude, &ERF_TAIL) * magnitude - magnitude);
    let large = select(x < 0.0, -large, large);
    select(magnitude < ERF_SMALL, small, large)
}

/// ln(1 + eˣ) = max(x, 0) + ln(1 + t) with t = e^−|x|.
pub fn softplus(x: f32) -> f32 {
    let t = exp(-x.abs());
    // Kahan: the rounding error of u = 1 + t cancels in the quotient t/(u − 1).
    let u = 1.0 + t;
    let rounded = u - 1.0;
    let log = select(rounded == 0.0, t, ln(u) * (t / rounded));
    select(x > 0.0, x, 0.0) + log
}

/// The arithmetic that the float ops are written in: f32 by the sequences above, f64 by the standard library.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
{
    /// The number nearest to a constant.
    fn of(x: f64) -> Self;
    /// Truncated, and the nearest index where it is none; 0 for NaN.
    fn to_index(self) -> usize;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
    fn sigmoid(self) -> Self;
    fn erf(self) -> Self;
    fn softplus(self) -> Self;
    fn pow(self, exponent: Self) -> Self;
    fn sin(self) -> Self;
    fn cos(self) -> Self;
    fn tan(self) -> Self;
    fn asin(self) -> Self;
    fn acos(self) -> Self;
    fn atan(self) -> Self;
    fn sinh(self) -> Self;
    fn cosh(self) -> Self;
    fn asinh(self) -> Self;
    fn acosh(self) -> Self;
    fn atanh(self) -> Self;
    /// What a division truncated to an integer leaves, exactly.
    fn rem(self, divisor: Self) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    fn floor(self) -> Self;
    fn ceil(self) -> Self;
    fn round_ties_even(self) -> Self;

    /// The larger; NaN if either is.
    fn larger(self, other: Self) -> Self {
        if self > other || self.is_nan() { self } else { other }
    }
    /// The smaller; NaN if either is.
    fn smaller(self, other: Self) -> Self {
        if self < other || self.is_nan() { self } else { other }
    }
    fn is_nan(self) -> bool {
        self.partial_cmp(&self).is_none()
    }
    /// First the lower bound, then the upper; NaN stays.
    fn within(self, lo: Self, hi: Self) -> Self {
        let above = if self < lo { lo } else { self };
        if above > hi { hi } else { above }
    }
}

macro_rules! std_methods {
    ($($method:ident),*) => {
        $(fn $method(self) -> Self { self.$method() })*
    };
}

/// Through f64 and rounded once: the same f32 from all but the worst mathematical libraries.
macro_rules! through_f64 {
    ($($method:ident),*) => {
        $(fn $method(self) -> f32 { f64::from(self).$method() as f32 })*
    };
}

impl Real for f32 {
    fn of(x: f64) -> f32 {
        x as f32
    }
    fn to_index(self) -> usize {
        self as usize
    }
    fn exp(self) -> f32 {
        exp(self)
    }
    fn ln(self) -> f32 {
        ln(self)
    }
    fn tanh(self) -> f32 {
        tanh(self)
    }
    fn sigmoid(self) -> f32 {
        sigmoid(self)
    }
    fn erf(self) -> f32 {
        erf(self)
    }
    fn softplus(self) -> f32 {
        softplus(self)
    }
    fn pow(self, exponent: f32) -> f32 {
        // As what `through_f64` makes.
        f64::from(self).powf(exponent.into()) as f32
    }
    through_f64!(sin, cos, tan, asin, acos, atan, sinh, cosh, asinh, acosh, atanh);
    fn rem(self, divisor: f32) -> f32 {
        self % divisor
    }
    std_methods!(sqrt, abs, floor, ceil, round_ties_even);
}

impl Real for f64 {
    fn of(x: f64) -> f64 {
        x
    }
    fn to_index(self) -> usize {
        self as usize
    }
    fn sigmoid(self) -> f64 {
        let t = (-self.abs()).exp();
        select(self < 0.0, t, 1.0) / (1.0 + t)
    }
    fn erf(self) -> f64 {
        erf_f64(self)
    }
    fn softplus(self) -> f64 {
        self.larger(0.0) + (-self.abs()).exp().ln_1p()
    }
    fn pow(self, exponent: f64) -> f64 {
        self.powf(exponent)
    }
    fn rem(self, divisor: f64) -> f64 {
        self % divisor
    }
    std_methods!(
        exp,
        ln,
        tanh,
        sin,
        cos,
        tan,
        asin,
        acos,
        atan,
        sinh,
        cosh,
        asinh,
        acosh,
        atanh,
        sqrt,
        abs,
        floor,
        ceil,
        round_ties_even
    );
}

/// erf in f64 by 2/√π·e^(−x²)·Σ 2ⁿ·x^(2n+1)/(2n+1)!!, whose terms are all of one sign: nothing cancels.
fn erf_f64(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the correctly rounded result.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if got == nearest || (got.is_nan() && nearest.is_nan()) {
            return 0.0;
        }
        if !got.is_finite() || !nearest.is_finite() {
            return f64::INFINITY;
        }
        let magnitude = nearest.abs().max(f32::MIN_POSITIVE);
        let ulp = f64::from(f32::from_bits(magnitude.to_bits() & 0x7f80_0000)) * 2f64.powi(-23);
        (f64::from(got) - exact).abs() / ulp
    }

    /// Every 97th bit pattern, so all exponents, denormals, infinities and NaNs, and a dense range around 0.
    fn sweep() -> impl Iterator<Item = f32> {
        let patterns = (0..=u32::MAX / 97).map(|i| f32::from_bits(i * 97));
        let dense = (-2_000_000..=2_000_000).map(|i| i as f32 * 5.3e-5);
        patterns.step_by(7).chain(dense)
    }

    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> (f64, f32) {
        sweep().fold((0.0, 0.0), |worst, x| {
            let e = ulps(f(x), exact(x.into()));
            if e > worst.0 { (e, x) } else { worst }
        })
    }

    #[test]
    fn errors_stay_within_their_bounds() {
        type Case = (&'static str, fn(f32) -> f32, fn(f64) -> f64, f64);
        let cases: [Case; 5] = [
            ("exp", exp, f64::exp, 1.0),
            ("ln", ln, f64::ln, 1.0),
            ("tanh", tanh, f64::tanh, 1.5),
            ("sigmoid", sigmoid, <f64 as Real>::sigmoid, 2.0),
            ("softplus", softplus, <f64 as Real>::softplus, 3.0),
        ];
        for (name, f, exact, limit) in cases {
            let (error, x) = worst(f, exact);
            assert!(error <= limit, "{name}({x:e}) is {error:.3} ulp off");
        }
    }

    #[test]
    fn erf_is_within_its_bound() {
        for x in sweep() {
            let (got, exact) = (erf(x), erf_f64(x.into()));
            assert!(x.is_nan() && got.is_nan() || (f64::from(got) - exact).abs() <= 2e-7, "{x:e}: {got}");
        }
        assert!((erf_f64(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15);
        assert!((erf_f64(-2.0) + 0.995_322_265_018_952_7).abs() < 1e-15);
        assert_eq!((erf(f32::INFINITY), erf(-9.0)), (1.0, -1.0));
    }

    #[test]
    fn ends_of_the_ranges() {
        assert_eq!([exp(0.0), exp(-200.0), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert_eq!([exp(88.8), exp(f32::INFINITY)], [f32::INFINITY; 2]);
        assert!(exp(88.72) < f32::MAX);
        assert_eq!([ln(0.0), ln(-0.0)], [f32::NEG_INFINITY; 2]);
        assert_eq!([ln(1.0), ln(f32::INFINITY)], [0.0, f32::INFINITY]);
        assert!(ln(-1.0).is_nan() && ln(f32::NAN).is_nan() && exp(f32::NAN).is_nan());
        assert!(ulps(ln(1e-45), f64::from(1e-45f32).ln()) <= 2.0);
        assert_eq!([tanh(20.0), tanh(f32::NEG_INFINITY)], [1.0, -1.0]);
        assert!(sigmoid(-100.0) > 0.0 && sigmoid(-110.0) == 0.0);
        assert_eq!(softplus(100.0), 100.0);
        assert!(tanh(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan() && softplus(f32::NAN).is_nan());
    }
}
