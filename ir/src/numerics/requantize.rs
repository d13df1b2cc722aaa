use super::fixed_point::{Multiplier, exponent, power};
use crate::{DType, OutputGrid, Tensor, TensorError};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How an accumulator becomes a code: five formulas for the same real factor S = s_x·s_w/s_y.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequantMode {
    /// Integers, one rounding in 64 bits: Jacob et al.'s multiplier and shift, exact.
    Shift,
    /// Integers, two roundings: gemmlowp and the TFLite reference kernels, bit for bit.
    Tflite,
    /// Integers in 16-bit lanes with guard bits: a third of the price of a float one, one step off now and then.
    Q15,
    /// S is a power of two (weights were rescaled to make it so): one rounding shift.
    Pow2,
    /// Convert to f32, one multiplication, round half to even: what ONNX Runtime, oneDNN and XNNPACK do.
    Float,
}

impl RequantMode {
    /// All modes, in the order of benchmark tables.
    pub const ALL: [RequantMode; 5] =
        [RequantMode::Shift, RequantMode::Tflite, RequantMode::Q15, RequantMode::Pow2, RequantMode::Float];

    /// The spelling of the command line and the text form.
    pub const fn name(self) -> &'static str {
        match self {
            RequantMode::Shift => "shift",
            RequantMode::Tflite => "tflite",
            RequantMode::Q15 => "q15",
            RequantMode::Pow2 => "pow2",
            RequantMode::Float => "float",
        }
    }

    /// The mode with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<RequantMode> {
        RequantMode::ALL.into_iter().find(|m| m.name() == name)
    }
}

impl fmt::Display for RequantMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a mode cannot express an op; another mode must be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{mode} requantization: {reason}")]
pub struct Refusal {
    /// The mode that was asked for.
    pub mode: RequantMode,
    /// What does not fit.
    pub reason: String,
}

/// The interval in which the accumulators of one output channel lie, bias and zero-point correction included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelBounds {
    /// Smallest value.
    pub min: i64,
    /// Largest value.
    pub max: i64,
}

impl ChannelBounds {
    /// Bounds of Σ (q_a − z_a)·(q_b − z_b) + bias over all u8 operands, summed over `inner` products.
    pub fn of_activations(inner: usize, z_a: i32, z_b: i32, bias: i32) -> ChannelBounds {
        let (below, above) = ([z_a, z_b].map(i64::from), [255 - z_a, 255 - z_b].map(i64::from));
        let most = (below[0] * below[1]).max(above[0] * above[1]);
        let least = (below[0] * above[1]).max(above[0] * below[1]);
        let times = |product: i64| (inner as i64).saturating_mul(product);
        ChannelBounds {
            min: i64::from(bias).saturating_sub(times(least)),
            max: i64::from(bias).saturating_add(times(most)),
        }
    }

    /// The largest magnitude within the bounds.
    pub fn reach(self) -> i64 {
        self.max.max(-self.min)
    }
}

/// What bounds and zero-point corrections need to know of the weights of one output channel.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct WeightSums {
    /// Σ q_w.
    pub total: i64,
    /// Σ |q_w|.
    pub magnitude: i64,
}

impl WeightSums {
    /// As many weights as whose sums fit 16 bits, whatever they are: −128 · 256 = −2^15. A multiple of any vector.
    const AT_ONCE: usize = 256;

    /// The sums of each index of `channel_axis`, of s8 weights.
    ///
    /// # Errors
    /// Where the weights are not s8.
    pub fn by_channel(weights: &Tensor, channel_axis: usize) -> Result<Vec<WeightSums>, TensorError> {
        let (shape, elements) = (weights.shape(), weights.as_slice::<i8>()?);
        let mut sums = vec![WeightSums::default(); shape[channel_axis]];
        let inner: usize = shape[channel_axis + 1..].iter().product();
        if elements.is_empty() {
            return Ok(sums);
        }
        if inner == 1 {
            return Ok(WeightSums::by_column(elements, sums.len()));
        }
        for block in elements.chunks_exact(sums.len() * inner) {
            for (sum, own) in sums.iter_mut().zip(block.chunks_exact(inner)) {
                let own = WeightSums::of(own);
                sum.total += own.total;
                sum.magnitude += own.magnitude;
            }
        }
        Ok(sums)
    }

    /// The sums of each column of a row-major matrix.
    fn by_column(elements: &[i8], columns: usize) -> Vec<WeightSums> {
        let mut sums = vec![WeightSums::default(); columns];
        let (mut totals, mut magnitudes) = (vec![0i16; columns], vec![0u16; columns]);
        // As in `of`: rows whose sums fit 16 bits.
        for rows in elements.chunks(WeightSums::AT_ONCE * columns) {
            totals.fill(0);
            magnitudes.fill(0);
            for row in rows.chunks_exact(columns) {
                for ((total, magnitude), &w) in totals.iter_mut().zip(&mut magnitudes).zip(row) {
                    *total += i16::from(w);
                    *magnitude += u16::from(w.unsigned_abs());
                }
            }
            for ((sum, &total), &magnitude) in sums.iter_mut().zip(&totals).zip(&magnitudes) {
                sum.total += i64::from(total);
                sum.magnitude += i64::from(magnitude);
            }
        }
        sums
    }

    /// The sums of these weights.
    pub fn of(weights: &[i8]) -> WeightSums {
        let mut sums = WeightSums::default();
        // In pieces whose sums fit 16 bits, so that the compiler makes vectors of many lanes of them.
        for piece in weights.chunks(WeightSums::AT_ONCE) {
            let (mut total, mut magnitude) = (0i16, 0u16);
            for &w in piece {
                total += i16::from(w);
                magnitude += u16::from(w.unsigned_abs());
            }
            sums.total += i64::from(total);
            sums.magnitude += i64::from(magnitude);
        }
        sums
    }

    /// Bounds of Σ (q_x − z_x)·q_w + q_b over all u8 inputs.
    pub fn bounds(self, bias: i32, zero_point: i32) -> ChannelBounds {
        let (below, above) = (i64::from(zero_point), 255 - i64::from(zero_point));
        let positive = (self.magnitude + self.total) / 2;
        let negative = (self.magnitude - self.total) / 2;
        ChannelBounds {
            min: i64::from(bias) - positive * below - negative * above,
            max: i64::from(bias) + positive * above + negative * below,
        }
    }
}

/// A quantized tensor added to the accumulator before the one rounding: a fused residual.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ResidualInput {
    /// s_r/s_y, in f64.
    pub factor: f64,
    /// Zero point of the residual.
    pub zero_point: i32,
}

/// The per-channel integers (or floats) of one op's requantization. Equations are at [`Requantizer::apply`].
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs, reason = "the equations of `Requantizer::apply` name the fields")]
pub enum Rescale {
    Shift {
        m: Vec<i32>,
        n: Vec<u32>,
        /// Factor of the residual, below 2^22; 0 without one.
        m_r: i32,
        /// Left shift that brings the residual to the channel's scale, at most 30.
        k: Vec<u32>,
    },
    Tflite {
        m: Vec<i32>,
        left: Vec<u32>,
        right: Vec<u32>,
        /// Guard bits that the final shift removes; 0 without a residual.
        guard: u32,
        /// Multiplier and shifts of the residual; (0, 0, 0) without one.
        residual: (i32, u32, u32),
    },
    Q15 {
        s1: Vec<u32>,
        m: Vec<i16>,
        /// (z_y − 128 + ½ − centring)/S, to be folded into the bias.
        offset: Vec<i32>,
        /// Guard bits.
        r: u32,
        /// Factor of the residual; 0 without one.
        m_r: i16,
    },
    Pow2 {
        n: Vec<u32>,
        /// Factor of the residual for each channel; zeros without one.
        m_r: Vec<i32>,
    },
    Float {
        scale: Vec<f32>,
        /// Scale of the residual; 0 without one.
        scale_r: f32,
    },
}

/// Bits that a residual is shifted left by before the TFLite multiplier, as TFLite's ADD does.
pub const TFLITE_RESIDUAL_SHIFT: u32 = 20;
/// Guard bits in which a TFLite-style fused sum is kept before its last rounding.
const TFLITE_GUARD: u32 = 7;
/// The fewest guard bits: with 5 at most 1 % of outputs are a step off exact rounding, and each bit less doubles that.
const Q15_GUARD_MIN: i32 = 5;
/// Bits that a residual is shifted left by before `pmulhrsw`: ±255 then fills 16 bits.
pub const Q15_RESIDUAL_SHIFT: u32 = 7;

/// Turns accumulators of one op into codes: the one definition that interpreter and kernels share.
#[derive(Clone, PartialEq, Debug)]
pub struct Requantizer {
    /// The grid of the result.
    pub grid: OutputGrid,
    /// Zero point of the fused residual; 0 without one.
    pub residual_zero_point: i32,
    /// Whether a residual is added.
    pub has_residual: bool,
    /// The constants.
    pub rescale: Rescale,
}

impl Requantizer {
    /// Constants for output channels with these factors S (one a channel: s_x·s_w/s_y, in f64, but in f32 and in this order
    /// for [`Float`](RequantMode::Float)).
    ///
    /// `bounds` are the channels' accumulator bounds. Refuses what a kernel could not compute exactly as defined:
    /// accumulators beyond 32 bits in every mode, and whatever leaves the mode's own range. How far the codes may be
    /// from clamp(S·acc + S_r·u + z_y), where it does not refuse:
    ///
    /// | mode | steps, without a residual | with one |
    /// |---|---|---|
    /// | shift | ½ + 2⁻²⁰ | ½ + 2⁻¹⁰ |
    /// | tflite | ¾ + 2⁻²⁰ | ½ + 2⁻⁶ |
    /// | q15, r guard bits | ½ + 3·2⁻ʳ⁻¹ + 2⁻⁷ | ½ + 3·2⁻ʳ + 2⁻⁶ |
    /// | pow2 | ½ + 2⁻¹¹ | 1 + 2⁻¹¹ |
    /// | float | ½ + 2⁻¹³ | ½ + 2⁻¹⁰ |
    ///
    /// (for residual factors up to 8). With r = 7, where every S is below 2⁻⁸, q15 differs from exact rounding in
    /// fewer than 0.5 % of unsaturated outputs, and then by one step.
    ///
    /// # Panics
    /// Where there are not as many bounds as factors.
    pub fn new(
        mode: RequantMode,
        factors: &[f64],
        grid: OutputGrid,
        residual: Option<ResidualInput>,
        bounds: &[ChannelBounds],
    ) -> Result<Requantizer, Refusal> {
        let refuse = |reason: String| Refusal { mode, reason };
        assert_eq!(factors.len(), bounds.len(), "one bound a channel");
        grid.check().map_err(|e| refuse(e.to_string()))?;
        for (c, b) in bounds.iter().enumerate() {
            if b.max > i32::MAX.into() || b.min < i32::MIN.into() {
                return Err(refuse(format!(
                    "the accumulator of channel {c} can reach {} to {}, beyond 32 bits",
                    b.min, b.max
                )));
            }
        }
        let usable = |s: f64| s > 0.0 && s < power(64);
        if let Some(s) = factors.iter().find(|s| !usable(**s)) {
            return Err(refuse(format!("factor {s} is not between 0 and 2^64")));
        }
        if let Some(r) = residual.filter(|r| !usable(r.factor)) {
            return Err(refuse(format!("residual factor {} is not between 0 and 2^64", r.factor)));
        }
        if mode != RequantMode::Float {
            // So that a rescaled value plus the zero point never leaves 32 bits: kernels need no clamp before it.
            let most = residual.map_or(0.0, |r| 256.0 * r.factor);
            for (c, (s, b)) in factors.iter().zip(bounds).enumerate() {
                let reach = b.reach() as f64 * s + most;
                if reach >= power(30) {
                    return Err(refuse(format!("channel {c} can reach {reach:.3e} steps, beyond 2^30")));
                }
            }
        }
        let rescale = match mode {
            RequantMode::Shift => shift(factors, residual),
            RequantMode::Tflite => tflite(factors, residual, bounds),
            RequantMode::Q15 => q15(factors, grid, residual, bounds),
            RequantMode::Pow2 => pow2(factors, residual, bounds),
            RequantMode::Float => Ok(Rescale::Float {
                scale: factors.iter().map(|&s| s as f32).collect(),
                scale_r: residual.map_or(0.0, |r| r.factor as f32),
            }),
        }
        .map_err(refuse)?;
        Ok(Requantizer {
            grid,
            residual_zero_point: residual.map_or(0, |r| r.zero_point),
            has_residual: residual.is_some(),
            rescale,
        })
    }

    /// The mode of the constants.
    pub fn mode(&self) -> RequantMode {
        match self.rescale {
            Rescale::Shift { .. } => RequantMode::Shift,
            Rescale::Tflite { .. } => RequantMode::Tflite,
            Rescale::Q15 { .. } => RequantMode::Q15,
            Rescale::Pow2 { .. } => RequantMode::Pow2,
            Rescale::Float { .. } => RequantMode::Float,
        }
    }

    /// The code of accumulator `acc` of `channel`; `residual` is the residual's code, ignored where none is fused.
    ///
    /// With u = residual − z_r (0 without a residual), y = clamp(z_y + v, lo, hi), where v is
    ///
    /// ```text
    /// shift   (acc·m + u·m_r·2^k + 2^(n−1)) >> n                                        in 64 bits
    /// tflite  MBQM(acc)                                                                 without a residual
    ///         RDBPOT(MBQM(acc) + MBQM_r(u·2^20), guard)                                 with one
    ///         MBQM(x) = RDBPOT(SRDHM(x·2^left, m), right)
    /// q15     sat8((adds16(mulhrs(sat16((acc + offset) >> s1), m), mulhrs(u·2^7, m_r))) >> r) + 128 − z_y
    ///         mulhrs(a, b) = (a·b + 2^14) >> 15
    /// pow2    (acc + u·m_r + 2^(n−1)) >> n                                              the last term only for n > 0
    /// float   round_half_even(clamp(f32(acc)·scale + f32(u)·scale_r, lo − z_y, hi − z_y))   each step rounded to f32
    /// ```
    ///
    /// SRDHM and RDBPOT are gemmlowp's SaturatingRoundingDoublingHighMul and RoundingDivideByPOT.
    pub fn apply(&self, acc: i32, channel: usize, residual: i32) -> i32 {
        let OutputGrid { zero_point, lo, hi, .. } = self.grid;
        let u = if self.has_residual { residual - self.residual_zero_point } else { 0 };
        let c = channel;
        let v: i64 = match &self.rescale {
            Rescale::Shift { m, n, m_r, k } => {
                let sum = i64::from(acc) * i64::from(m[c]) + (i64::from(u * m_r) << k[c]);
                (sum + (1i64 << (n[c] - 1))) >> n[c]
            }
            Rescale::Tflite { m, left, right, guard, residual } => {
                let own = multiply_by_quantized_multiplier(acc, m[c], left[c], right[c]);
                if self.has_residual {
                    let (m_r, left_r, right_r) = *residual;
                    let other =
                        multiply_by_quantized_multiplier(u << TFLITE_RESIDUAL_SHIFT, m_r, left_r, right_r);
                    rounding_shift_right_away(own + other, *guard).into()
                } else {
                    own.into()
                }
            }
            Rescale::Q15 { s1, m, offset, r, m_r } => {
                let mulhrs = |a: i32, b: i16| (a * i32::from(b) + (1 << 14)) >> 15;
                let sat16 = |x: i32| x.clamp(-32768, 32767);
                let t = mulhrs(sat16((acc + offset[c]) >> s1[c]), m[c]);
                let t = sat16(t + mulhrs(u << Q15_RESIDUAL_SHIFT, *m_r));
                i64::from((t >> r).clamp(-128, 127) + 128 - zero_point)
            }
            Rescale::Pow2 { n, m_r } => {
                let half = if n[c] > 0 { 1 << (n[c] - 1) } else { 0 };
                i64::from((acc + u * m_r[c] + half) >> n[c])
            }
            Rescale::Float { scale, scale_r } => {
                let mut x = acc as f32 * scale[c];
                if self.has_residual {
                    x += u as f32 * scale_r;
                }
                x.clamp((lo - zero_point) as f32, (hi - zero_point) as f32).round_ties_even() as i64
            }
        };
        (v + i64::from(zero_point)).clamp(lo.into(), hi.into()) as i32
    }
}

/// gemmlowp's SaturatingRoundingDoublingHighMul for a multiplier m ≥ 0: (2·a·m) / 2^32, rounded, ties towards +∞.
///
/// gemmlowp states it with a nudge whose sign follows the product and a truncating division; for every product this
/// is (a·m + 2^30) >> 31. Its one saturating case, both operands −2^31, cannot occur.
pub fn saturating_rounding_doubling_high_mul(a: i32, m: i32) -> i32 {
    ((i64::from(a) * i64::from(m) + (1 << 30)) >> 31) as i32
}

/// gemmlowp's RoundingDivideByPOT: x / 2^e, rounded, ties away from zero.
pub fn rounding_shift_right_away(x: i32, e: u32) -> i32 {
    let mask = (1i64 << e) - 1;
    let threshold = (mask >> 1) + i64::from(x < 0);
    (x >> e) + i32::from((i64::from(x) & mask) > threshold)
}

/// TFLite's MultiplyByQuantizedMultiplier (the two-rounding form).
fn multiply_by_quantized_multiplier(x: i32, m: i32, left: u32, right: u32) -> i32 {
    rounding_shift_right_away(saturating_rounding_doubling_high_mul(x << left, m), right)
}

fn shift(factors: &[f64], residual: Option<ResidualInput>) -> Result<Rescale, String> {
    let mut own = Vec::with_capacity(factors.len());
    for &s in factors {
        own.push(Multiplier::new(s).ok_or(format!("factor {s} is 2^29 or more"))?);
    }
    let (mut m_r, mut k) = (0, vec![0; own.len()]);
    if let Some(r) = residual {
        let least = own.iter().map(|m| m.n).min().unwrap_or(1) as i32;
        // Not negative: 256·factor is below 2^30.
        let n_r = (21 - exponent(r.factor)).min(least);
        m_r = ((r.factor * power(n_r)).round() as i32).min((1 << 22) - 1);
        for ((own, k), &s) in own.iter_mut().zip(&mut k).zip(factors) {
            let most = n_r as u32 + 30;
            if own.n > most {
                *own = Multiplier::with_shift(s, most);
            }
            *k = own.n - n_r as u32;
        }
    }
    Ok(Rescale::Shift { m: own.iter().map(|m| m.m).collect(), n: own.iter().map(|m| m.n).collect(), m_r, k })
}

/// TFLite's QuantizeMultiplier: factor = m·2^−31·2^shift with m in [2^30, 2^31); 0 below 2^−32.
fn quantize_multiplier(factor: f64) -> (i32, u32, u32) {
    let mut shift = exponent(factor) + 1;
    let mut m = (factor * power(31 - shift)).round() as i64;
    if m == 1 << 31 {
        m /= 2;
        shift += 1;
    }
    if shift < -31 {
        return (0, 0, 0);
    }
    (m as i32, shift.max(0) as u32, (-shift).max(0) as u32)
}

fn tflite(
    factors: &[f64],
    residual: Option<ResidualInput>,
    bounds: &[ChannelBounds],
) -> Result<Rescale, String> {
    let guard = if residual.is_some() { TFLITE_GUARD } else { 0 };
    let (mut m, mut left, mut right) = (vec![], vec![], vec![]);
    for (c, (s, b)) in factors.iter().zip(bounds).enumerate() {
        let (m_c, left_c, right_c) = quantize_multiplier(s * power(guard as i32));
        let reach = b.reach() as f64;
        if reach * power(left_c as i32) >= power(31) || reach * s * power(guard as i32) >= power(30) {
            return Err(format!("the accumulator of channel {c} overflows its left shift"));
        }
        m.push(m_c);
        left.push(left_c);
        right.push(right_c);
    }
    let residual = match residual {
        None => (0, 0, 0),
        Some(r) => {
            let scaled = r.factor * power(guard as i32 - TFLITE_RESIDUAL_SHIFT as i32);
            let (m_r, left_r, right_r) = quantize_multiplier(scaled);
            if left_r > 2 {
                return Err(format!("residual factor {} overflows its left shift", r.factor));
            }
            (m_r, left_r, right_r)
        }
    };
    Ok(Rescale::Tflite { m, left, right, guard, residual })
}

fn q15(
    factors: &[f64],
    grid: OutputGrid,
    residual: Option<ResidualInput>,
    bounds: &[ChannelBounds],
) -> Result<Rescale, String> {
    let largest = factors.iter().copied().fold(0.0, f64::max);
    if grid.dtype != DType::U8 {
        return Err(format!("writes u8, not {}", grid.dtype));
    }
    // s1 ≥ 0 asks for S < 2^−r. A residual asks for headroom: the accumulator's own share may be as large as the
    // grid and the residual together, and must not saturate 16 bits before they are summed.
    let mut r = (-1 - exponent(largest)).min(7);
    if let Some(res) = residual {
        r = r.min(13 - exponent(128.0 + 255.0 * res.factor));
    }
    if r < Q15_GUARD_MIN {
        let beside =
            residual.map_or(String::new(), |r| format!(" beside a residual's factor {:.4}", r.factor));
        return Err(format!(
            "factor {largest:.4}{beside} leaves {} guard bits, fewer than {Q15_GUARD_MIN}",
            r.max(0)
        ));
    }
    let m_r = residual.map_or(0.0, |res| (res.factor * power(r + 15 - Q15_RESIDUAL_SHIFT as i32)).round());
    if m_r > 32767.0 {
        return Err(format!("the residual's factor {m_r} does not fit 15 bits"));
    }
    let (mut s1, mut m, mut offset) = (vec![], vec![], vec![]);
    for (c, (s, b)) in factors.iter().zip(bounds).enumerate() {
        let s1_c = (-1 - r - exponent(*s)).min(31);
        let m_c = (s * power(15 + r + s1_c)).round().min(32767.0);
        // The first shift truncates (half a unit too low on average) and the last one floors an already rounded
        // value (half a unit too high): centre the sum of both.
        let truncated = if s1_c > 0 { 0.5 * m_c / 32768.0 } else { 0.0 };
        let centring = (0.5 - truncated) / power(r);
        let offset_c = ((f64::from(grid.zero_point - 128) + 0.5 - centring) / s).round();
        let (low, high) = (b.min as f64 + offset_c, b.max as f64 + offset_c);
        if low < i32::MIN.into() || high > i32::MAX.into() {
            return Err(format!("the accumulator of channel {c} plus its offset leaves 32 bits"));
        }
        s1.push(s1_c as u32);
        m.push(m_c as i16);
        offset.push(offset_c as i32);
    }
    Ok(Rescale::Q15 { s1, m, offset, r: r as u32, m_r: m_r as i16 })
}

fn pow2(
    factors: &[f64],
    residual: Option<ResidualInput>,
    bounds: &[ChannelBounds],
) -> Result<Rescale, String> {
    let (mut n, mut m_r) = (vec![], vec![]);
    for (c, (s, b)) in factors.iter().zip(bounds).enumerate() {
        // The exponent of s·√2 is that of s rounded to nearest.
        let n_c = -exponent(s * std::f64::consts::SQRT_2);
        if (s * power(n_c) - 1.0).abs() > power(-20) {
            return Err(format!("factor {s} of channel {c} is not a power of two"));
        }
        if !(0..=30).contains(&n_c) {
            return Err(format!("factor 2^{} of channel {c} is not between 2^-30 and 1", -n_c));
        }
        let m_c = residual.map_or(0.0, |r| (r.factor * power(n_c)).round());
        let lost = residual.map_or(0.0, |r| 255.0 * (m_c * power(-n_c) - r.factor).abs());
        if lost > 0.5 {
            return Err(format!(
                "the residual's factor rounded to a multiple of 2^-{n_c} in channel {c} moves it by {lost:.2} steps"
            ));
        }
        let half = if n_c > 0 { power(n_c - 1) } else { 0.0 };
        let reach = b.reach() as f64 + 255.0 * m_c + half;
        if reach >= power(31) {
            return Err(format!("the accumulator of channel {c} and its rounding term leave 32 bits"));
        }
        n.push(n_c as u32);
        m_r.push(m_c as i32);
    }
    Ok(Rescale::Pow2 { n, m_r })
}
