use crate::samples::grid;
use proptest::prelude::*;
use qcc_ir::{
    DType, OutputGrid,
    numerics::{
        ChannelBounds, RequantMode, Requantizer, Rescale, ResidualInput, WeightSums,
        rounding_shift_right_away, saturating_rounding_doubling_high_mul,
    },
};

fn within(bound: i64) -> ChannelBounds {
    ChannelBounds { min: -bound, max: bound }
}

fn requantizer(mode: RequantMode, factor: f64, residual: Option<f64>) -> Requantizer {
    let residual = residual.map(|factor| ResidualInput { factor, zero_point: 100 });
    Requantizer::new(mode, &[factor], grid(1.0, 128), residual, &[within(1 << 17)]).unwrap()
}

/// Results less the zero point, for residuals (less theirs) and accumulators.
fn golden(r: &Requantizer, cases: &[(i32, i32, i32)]) {
    for &(acc, u, expected) in cases {
        assert_eq!(r.apply(acc, 0, u + 100) - 128, expected, "{:?} of {acc} and {u}", r.mode());
    }
}

#[test]
fn shift_rounds_ties_up() {
    let half = requantizer(RequantMode::Shift, 0.5, None);
    golden(&half, &[(0, 0, 0), (1, 0, 1), (3, 0, 2), (-1, 0, 0), (-3, 0, -1), (2, 0, 1), (400, 0, 127)]);
    // 0.3·10 = 3, 0.3·5 = 1.5: the nearest multiplier, 0.3·2^32, is above 0.3 and so both are.
    golden(&requantizer(RequantMode::Shift, 0.3, None), &[(10, 0, 3), (5, 0, 2), (-10, 0, -3), (4, 0, 1)]);
    golden(&requantizer(RequantMode::Shift, 3.0, None), &[(5, 0, 15), (-42, 0, -126), (-43, 0, -128)]);
    // ½·acc + ¼·u
    let sum = requantizer(RequantMode::Shift, 0.5, Some(0.25));
    golden(
        &sum,
        &[(1, 1, 1), (0, 1, 0), (0, 2, 1), (0, -2, 0), (0, -3, -1), (-200, 155, -61), (100, -100, 25)],
    );
}

#[test]
fn tflite_rounds_twice_and_ties_away() {
    // m = 2^30, no shift: (acc + 1) >> 1.
    golden(&requantizer(RequantMode::Tflite, 0.5, None), &[(1, 0, 1), (-1, 0, 0), (3, 0, 2), (-3, 0, -1)]);
    // m = 2^30, right shift 1: ¼ becomes ½ becomes 1, and −1½ becomes −2.
    golden(
        &requantizer(RequantMode::Tflite, 0.25, None),
        &[(1, 0, 1), (-1, 0, 0), (2, 0, 1), (-2, 0, -1), (5, 0, 2), (-5, 0, -1), (6, 0, 2), (-6, 0, -2)],
    );
    // 3 = 0.75·2²: a left shift.
    golden(&requantizer(RequantMode::Tflite, 3.0, None), &[(5, 0, 15), (-42, 0, -126)]);
    // With a residual, both are kept with 7 guard bits: ±½ goes away from 0.
    let sum = requantizer(RequantMode::Tflite, 0.5, Some(0.25));
    golden(&sum, &[(1, 0, 1), (-1, 0, -1), (1, 1, 1), (0, 1, 0), (0, 2, 1), (0, -2, -1), (-200, 155, -61)]);
}

#[test]
fn q15_by_hand() {
    // S = 2^-9: r = 7, s1 = 1, m = 2^14, offset = (−128 + ½ − ¼/128)·512 = −65281.
    let r =
        Requantizer::new(RequantMode::Q15, &[1.0 / 512.0], grid(1.0, 0), None, &[within(1 << 20)]).unwrap();
    let rescale = Rescale::Q15 { s1: vec![1], m: vec![1 << 14], offset: vec![-65281], r: 7, m_r: 0 };
    assert_eq!(r.rescale, rescale);
    for (acc, code) in [
        (0, 0),
        (254, 0),
        // −65026 >> 1 = −32513, times ½ rounded −16256, >> 7 = −127: 0.498 is a step too high.
        (255, 1),
        (256, 1),
        (512, 1),
        (130_560, 255),
        (1 << 20, 255),
        (-(1 << 20), 0),
    ] {
        assert_eq!(r.apply(acc, 0, 0), code, "{acc}");
    }
    // ¼ of a residual: m_r = ¼·2^15.
    let r = requantizer(RequantMode::Q15, 1.0 / 512.0, Some(0.25));
    assert!(matches!(r.rescale, Rescale::Q15 { r: 6, m_r: 4096, .. }), "{:?}", r.rescale);
    golden(&r, &[(512, 4, 2), (0, 40, 10), (5120, -40, 0), (-51_200, 100, -75)]);
}

#[test]
fn pow2_is_one_shift() {
    let eighth = requantizer(RequantMode::Pow2, 0.125, None);
    golden(&eighth, &[(4, 0, 1), (3, 0, 0), (-4, 0, 0), (-5, 0, -1), (-12, 0, -1), (-13, 0, -2)]);
    golden(&requantizer(RequantMode::Pow2, 1.0, None), &[(5, 0, 5), (-5, 0, -5)]);
    let sum = requantizer(RequantMode::Pow2, 0.125, Some(0.25));
    golden(&sum, &[(2, 1, 1), (1, 1, 0), (0, 2, 1), (0, -2, 0), (0, -3, -1)]);
}

#[test]
fn float_rounds_ties_to_even() {
    let half = requantizer(RequantMode::Float, 0.5, None);
    golden(&half, &[(1, 0, 0), (3, 0, 2), (5, 0, 2), (-1, 0, 0), (-3, 0, -2), (1000, 0, 127)]);
    let sum = requantizer(RequantMode::Float, 0.5, Some(0.25));
    golden(&sum, &[(1, 1, 1), (0, 2, 0), (0, 6, 2), (-200, 155, -61)]);
}

#[test]
fn gemmlowp_vectors() {
    for (x, e, expected) in [
        (0, 0, 0),
        (7, 0, 7),
        (-7, 0, -7),
        (1, 1, 1),
        (-1, 1, -1),
        (3, 1, 2),
        (-3, 1, -2),
        (5, 2, 1),
        (6, 2, 2),
        (-6, 2, -2),
        (-5, 2, -1),
        (i32::MAX, 31, 1),
        (i32::MIN, 31, -1),
        (i32::MIN, 0, i32::MIN),
        (1 << 30, 31, 1),
        ((1 << 30) - 1, 31, 0),
    ] {
        assert_eq!(rounding_shift_right_away(x, e), expected, "{x} >> {e}");
    }
    for (a, m, expected) in [
        (i32::MAX, i32::MAX, i32::MAX - 1),
        (i32::MIN, i32::MAX, -i32::MAX),
        (1 << 30, 1 << 30, 1 << 29),
        (1, 1 << 30, 1),
        (-1, 1 << 30, 0),
        (-3, 1 << 30, -1),
        (0, i32::MAX, 0),
    ] {
        assert_eq!(saturating_rounding_doubling_high_mul(a, m), expected, "{a} by {m}");
    }
}

#[test]
fn bounds_of_products_of_activations_are_reached() {
    for (z_a, z_b) in [(0, 0), (0, 255), (255, 255), (128, 128), (3, 200)] {
        let corners = [(0, 0), (0, 255), (255, 0), (255, 255)];
        let products = corners.map(|(a, b)| i64::from((a - z_a) * (b - z_b)));
        let bounds = ChannelBounds::of_activations(5, z_a, z_b, -9);
        assert_eq!(bounds.max, 5 * products.into_iter().max().unwrap() - 9, "{z_a} {z_b}");
        assert_eq!(bounds.min, 5 * products.into_iter().min().unwrap() - 9, "{z_a} {z_b}");
    }
    // The longest sum of full range whatever the zero points are, and one that is too long.
    let reach = |inner| ChannelBounds::of_activations(inner, 0, 0, 0).reach();
    assert!(reach(33_025) <= i32::MAX.into() && reach(33_026) > i32::MAX.into());
}

#[test]
fn bounds_are_reached() {
    let weights = [3i8, -2, 127, -128];
    let b = WeightSums::of(&weights).bounds(7, 100);
    let extreme = |most: bool| -> i64 {
        7 + weights
            .map(|w| if (w > 0) == most { i64::from(w) * 155 } else { i64::from(w) * -100 })
            .iter()
            .sum::<i64>()
    };
    assert_eq!((b.min, b.max), (extreme(false), extreme(true)));
}

#[test]
fn what_cannot_be_exact_is_refused() {
    let s8 = OutputGrid::full(DType::S8, 1.0, 0).unwrap();
    let u8s = grid(1.0, 128);
    let inverted = OutputGrid { lo: 9, hi: 8, ..u8s };
    let none = |f: f64, g: OutputGrid, bound: i64| (vec![f], g, None, bound);
    let residual = |f: f64, r: f64| (vec![f], u8s, Some(ResidualInput { factor: r, zero_point: 0 }), 1000i64);
    use RequantMode::*;
    let cases = [
        (&RequantMode::ALL[..], none(0.01, u8s, 1 << 31), "beyond 32 bits"),
        (&RequantMode::ALL, none(0.0, u8s, 10), "is not between 0"),
        (&RequantMode::ALL, none(-1.0, u8s, 10), "is not between 0"),
        (&RequantMode::ALL, none(f64::NAN, u8s, 10), "is not between 0"),
        (&RequantMode::ALL, none(f64::INFINITY, u8s, 10), "is not between 0"),
        (&RequantMode::ALL, none(0.01, inverted, 10), "are not a range"),
        (&RequantMode::ALL, residual(0.01, f64::NAN), "residual factor"),
        (&[Shift, Tflite, Q15, Pow2], none(1.0, u8s, 1 << 30), "beyond 2^30"),
        (&[Shift], none(2f64.powi(29), u8s, 1), "2^29 or more"),
        (&[Shift], residual(0.01, 2f64.powi(22)), "beyond 2^30"),
        (&[Tflite], residual(0.01, 2f64.powi(17)), "overflows its left shift"),
        (&[Q15], none(0.0625, u8s, 10), "3 guard bits"),
        (&[Q15], none(0.04, u8s, 10), "4 guard bits"),
        (&[Q15], none(0.01, s8, 10), "writes u8"),
        (&[Q15], residual(0.001, 16.0), "guard bits"),
        (&[Q15], none(1e-6, u8s, i64::from(i32::MAX)), "leaves 32 bits"),
        (&[Pow2], none(0.3, u8s, 10), "not a power of two"),
        (&[Pow2], none(2.0, u8s, 10), "not between 2^-30 and 1"),
        (&[Pow2], residual(0.5, 0.3), "moves it by"),
        (&[Pow2], none(0.5, u8s, i64::from(i32::MAX)), "leave 32 bits"),
    ];
    for (modes, (factors, grid, residual, bound), expected) in cases {
        for &mode in modes {
            let refusal = Requantizer::new(mode, &factors, grid, residual, &[within(bound)]).unwrap_err();
            assert_eq!(refusal.mode, mode);
            assert!(refusal.to_string().contains(expected), "{refusal} / {expected}");
        }
    }
}

/// The documented distance from the real value, in steps.
fn tolerance(r: &Requantizer) -> f64 {
    let own = match (&r.rescale, r.has_residual) {
        (Rescale::Shift { .. }, false) => 2f64.powi(-20),
        (Rescale::Shift { .. }, true) => 2f64.powi(-10),
        (Rescale::Tflite { .. }, false) => 0.25 + 2f64.powi(-20),
        (Rescale::Tflite { .. }, true) => 2f64.powi(-6),
        (Rescale::Q15 { r, .. }, false) => 3.0 * 2f64.powi(-1 - *r as i32) + 2f64.powi(-7),
        (Rescale::Q15 { r, .. }, true) => 3.0 * 2f64.powi(-(*r as i32)) + 2f64.powi(-6),
        (Rescale::Pow2 { .. }, false) => 2f64.powi(-11),
        (Rescale::Pow2 { .. }, true) => 0.5 + 2f64.powi(-11),
        (Rescale::Float { .. }, false) => 2f64.powi(-13),
        (Rescale::Float { .. }, true) => 2f64.powi(-10),
    };
    0.5 + own
}

fn mode() -> impl Strategy<Value = RequantMode> {
    prop::sample::select(RequantMode::ALL.to_vec())
}

/// A factor of any size that occurs, a power of two where the mode asks for it.
fn factor(mode: RequantMode, log2: f64) -> f64 {
    2f64.powf(if mode == RequantMode::Pow2 { log2.min(0.0).round() } else { log2 })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn every_mode_keeps_its_word(
        mode in mode(),
        log2 in -24f64..3.0,
        log2_r in prop::option::of(-6f64..3.0),
        (zero, z_r) in (0i32..256, 0i32..256),
        (lo, width) in (0i32..256, 0i32..256),
        bound in 1i64..(1 << 31),
        // Three parts in four near the unsaturated range, the others anywhere.
        (steps, spread) in (-600f64..600.0, 0u8..4),
        any_acc in any::<i32>(),
        code in 0i32..256,
    ) {
        let s = factor(mode, log2);
        let residual = log2_r.map(|l| ResidualInput { factor: 2f64.powf(l), zero_point: z_r });
        let grid = OutputGrid { lo, hi: (lo + width).min(255), ..grid(1.0, zero) };
        // Not every range is one the mode can take: narrow it until it is.
        let mut bound = bound;
        let r = loop {
            let b = ChannelBounds { min: -bound, max: bound };
            match Requantizer::new(mode, &[s], grid, residual, &[b]) {
                Ok(r) => break r,
                Err(_) if bound > 1 => bound /= 2,
                Err(_) => return Ok(()),
            }
        };
        let acc = if spread > 0 { steps / s } else { any_acc.into() };
        let acc = acc.clamp(-bound as f64, bound as f64) as i32;
        let u = residual.map_or(0.0, |r| r.factor * f64::from(code - z_r));
        let exact = (f64::from(acc) * s + u + f64::from(zero)).clamp(grid.lo.into(), grid.hi.into());
        let got = r.apply(acc, 0, code);
        prop_assert!((f64::from(got) - exact).abs() <= tolerance(&r), "{got} for {exact}: {r:?}");
        // Monotone, and in range at the ends.
        let next = acc.saturating_add(1).min(bound as i32);
        prop_assert!(got <= r.apply(next, 0, code));
        let (least, most) = (r.apply(-bound as i32, 0, code), r.apply(bound as i32, 0, code));
        prop_assert!(grid.lo <= least && least <= got && got <= most && most <= grid.hi);
        for (acc, code) in [(-bound, 0), (-bound, 255), (bound, 0), (bound, 255)] {
            r.apply(acc as i32, 0, code);
        }
    }

    /// gemmlowp's own words: a nudge whose sign follows the product, and a division that truncates.
    #[test]
    fn tflite_is_gemmlowp(acc in -(1i32 << 20)..(1 << 20), log2 in -18f64..1.0) {
        let s = 2f64.powf(log2);
        let r = Requantizer::new(RequantMode::Tflite, &[s], OutputGrid { lo: 0, hi: 255, ..grid(1.0, 128) }, None, &[within(1 << 20)]);
        let r = r.unwrap();
        let mut exponent = s.log2().floor() as i32 + 1;
        let mut m = (s / 2f64.powi(exponent) * 2147483648.0).round() as i64;
        if m == 1 << 31 {
            m /= 2;
            exponent += 1;
        }
        let product = (i64::from(acc) << exponent.max(0)) * m;
        let nudge = if product >= 0 { 1 << 30 } else { 1 - (1 << 30) };
        let high = (product + nudge) / (1 << 31);
        let e = (-exponent).max(0);
        let (quotient, rest) = (high >> e, high & ((1 << e) - 1));
        let threshold = (((1i64 << e) - 1) >> 1) + i64::from(high < 0);
        let expected = quotient + i64::from(rest > threshold);
        prop_assert_eq!(i64::from(r.apply(acc, 0, 0)), (expected + 128).clamp(0, 255));
    }
}

/// How often q15 differs from exact rounding, of unsaturated outputs.
fn q15_differences(log2: std::ops::Range<f64>, residual: Option<f64>) -> f64 {
    let (mut differ, mut total, mut state) = (0u32, 0u32, 1u64);
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / 2f64.powi(53)
    };
    for _ in 0..400 {
        let s = 2f64.powf(log2.start + random() * (log2.end - log2.start));
        let input = residual.map(|factor| ResidualInput { factor, zero_point: 128 });
        let zero = (random() * 256.0) as i32;
        let bound = (600.0 / s) as i64;
        let r = Requantizer::new(RequantMode::Q15, &[s], grid(1.0, zero), input, &[within(bound)]).unwrap();
        for _ in 0..500 {
            let acc = ((random() - 0.5) * 2.0 * bound as f64) as i32;
            let code = (random() * 256.0) as i32;
            let u = residual.map_or(0.0, |f| f * f64::from(code - 128));
            let exact = f64::from(acc) * s + u + f64::from(zero);
            if !(0.0..=255.0).contains(&exact) {
                continue;
            }
            let off = f64::from(r.apply(acc, 0, code)) - exact.round();
            assert!(off.abs() <= 1.0, "{off} at {acc}: {r:?}");
            total += 1;
            differ += u32::from(off != 0.0);
        }
    }
    assert!(total > 20_000, "{total}");
    f64::from(differ) / f64::from(total)
}

#[test]
fn q15_seldom_differs_from_exact_rounding() {
    let seven_bits = q15_differences(-20.0..-8.0, None);
    assert!(seven_bits < 0.003, "{seven_bits}");
    // Every guard bit fewer doubles it.
    let five_bits = q15_differences(-6.0..-5.0, None);
    assert!(five_bits < 0.01, "{five_bits}");
    // A residual as large as the result costs two guard bits and a second rounding.
    let residual = q15_differences(-20.0..-8.0, Some(0.9));
    assert!(residual < 0.015, "{residual}");
}
