//! Numbers for people.

use qcc_runtime::Decibels;

/// A time in the unit that suits it, with three digits.
pub(crate) fn time(ms: f64) -> String {
    match ms {
        ms if ms >= 999.5 => format!("{:.2} s", ms / 1e3),
        ms if ms >= 99.95 => format!("{ms:.0} ms"),
        ms if ms >= 9.995 => format!("{ms:.1} ms"),
        ms if ms >= 0.9995 => format!("{ms:.2} ms"),
        ms if ms >= 0.0995 => format!("{:.0} µs", 1e3 * ms),
        ms if ms >= 0.00995 => format!("{:.1} µs", 1e3 * ms),
        ms => format!("{:.2} µs", 1e3 * ms),
    }
}

/// Microseconds without their unit.
pub(crate) fn micros(ms: f64) -> String {
    let us = 1e3 * ms;
    let decimals = if us < 9.995 { 2 } else { usize::from(us < 99.95) };
    format!("{us:.decimals$}")
}

/// A share in percent, with more digits where there is little.
pub(crate) fn percent(share: f64) -> String {
    let p = 100.0 * share;
    match p.abs() {
        0.0 => "0 %".into(),
        a if a < 0.01 => "< 0.01 %".into(),
        a if a < 9.95 => format!("{p:.2} %"),
        _ => format!("{p:.1} %"),
    }
}

/// dB without the unit.
pub(crate) fn decibels(d: Decibels) -> String {
    if d.0.is_finite() { format!("{:.1}", d.0) } else { "exact".into() }
}

/// A number of bytes.
pub(crate) fn bytes(count: u64) -> String {
    let n = count as f64;
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{:.0} kB", n / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", n / 1e6),
        _ => format!("{:.1} GB", n / 1e9),
    }
}

/// A count: 12.5 M.
pub(crate) fn count(n: u64) -> String {
    let x = n as f64;
    match n {
        0..10_000 => n.to_string(),
        10_000..10_000_000 => format!("{:.0} k", x / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} M", x / 1e6),
        _ => format!("{:.1} G", x / 1e9),
    }
}

/// A real number with four digits.
pub(crate) fn real(x: f32) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if (1e-3..1e5).contains(&a) => {
            let decimals = (3 - a.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{x:.decimals$}")
        }
        _ => format!("{x:.3e}"),
    }
}

/// The number to four digits: more would make charts large, and nobody sees them.
pub(crate) fn rounded(x: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(3 - x.abs().log10().floor() as i32);
    if scale.is_finite() && scale > 0.0 { (x * scale).round() / scale } else { x }
}

/// A name cut in its middle, as both ends tell layers apart.
pub(crate) fn elided(name: &str, width: usize) -> String {
    let count = name.chars().count();
    if count <= width {
        return name.into();
    }
    let head = width / 3;
    let tail = width - head - 1;
    name.chars().take(head).chain(['…']).chain(name.chars().skip(count - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_digits_that_matter() {
        assert_eq!([2.5, 0.25, 0.025, 0.0025].map(time), ["2.50 ms", "250 µs", "25.0 µs", "2.50 µs"]);
        assert_eq!([0.0, 0.00005, 0.012, 0.5].map(percent), ["0 %", "< 0.01 %", "1.20 %", "50.0 %"]);
        assert_eq!([1234.5f32, 0.01234, 1e-9, -0.0].map(real), ["1234", "0.01234", "1.000e-9", "0"]);
        assert_eq!(
            [123_456.0, 0.000_123_456, 0.0, f64::NAN].map(rounded),
            [123_500.0, 0.000_123_5, 0.0, 0.0]
        );
        assert_eq!(elided("/features/features.3/conv/Conv", 15), "/feat…conv/Conv");
        assert_eq!(elided("äöü", 3), "äöü");
        assert_eq!((bytes(1_250_000), count(389_000_000)), ("1250 kB".into(), "389.0 M".into()));
    }
}
