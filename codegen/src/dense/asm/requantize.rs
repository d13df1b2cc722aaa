//! Accumulators to codes: the vector form of [`Requantizer::apply`].
//!
//! Each mode has a part on 32-bit accumulators ([`rescale`]), one on the words that pairs of them are packed to
//! ([`words`]) and one on bytes ([`bytes`]). Saturating packs make clamps to 16 and 8 bits free and exact: a
//! rescaled value within ±2^30 saturates to 16 bits, the zero point is added with saturation, and whatever
//! saturated lies beyond 0..=255 either way.

use super::{
    Tile,
    vector::{Assembler, Emit, Reg},
};
use crate::dense::{
    pack::{EpilogueLayout, RequantizeLayout, RescaleLayout},
    spec::{EpilogueForm, RequantizeForm, RescaleForm},
};
use iced_x86::code_asm::r8;
use qcc_ir::numerics::{Q15_RESIDUAL_SHIFT, TFLITE_RESIDUAL_SHIFT};

/// Temporary registers that the epilogue of codes needs.
pub(super) const TEMPORARIES: usize = 4;

/// The parts of a requantizing epilogue that its functions share.
#[derive(Clone, Copy)]
struct Requantize<'a> {
    tile: &'a Tile<'a>,
    form: RequantizeForm,
    layout: &'a RequantizeLayout,
}

impl<'a> Requantize<'a> {
    /// `None` where accumulators are only packed.
    fn of(tile: &'a Tile<'a>) -> Option<Requantize<'a>> {
        match (&tile.spec.epilogue, &tile.layout.epilogue) {
            (EpilogueForm::Requantize(form), EpilogueLayout::Requantize(layout)) => {
                Some(Requantize { tile, form: *form, layout })
            }
            _ => None,
        }
    }

    /// Loads a pixel's residual codes so that each 128-bit lane holds those of its channels.
    fn load_residual(&self, asm: &mut Assembler, d: Reg, pixel: usize) -> Emit {
        let format = self.tile.format;
        let from = r8 + self.tile.spec.r_offsets[pixel];
        let lane_bytes = 4 * format.vectors();
        match (format.vector_bytes(), lane_bytes) {
            (32, _) => asm.load_lanes(d, from, lane_bytes as i32),
            (_, 16) => asm.vmovups(d, from),
            _ => {
                asm.vmovups(d, self.tile.param(self.layout.residual_permutation, 0))?;
                asm.vpermd(d, d, from)
            }
        }
    }

    /// Zero-extends the codes of a loaded residual by shuffle `i`.
    fn spread_residual(&self, asm: &mut Assembler, d: Reg, loaded: Reg, i: usize) -> Emit {
        asm.vpshufb(d, loaded, self.tile.param(self.layout.residual_shuffle, i))
    }
}

/// Brings a pixel's accumulators to output steps, without the zero point. In q15: to 16 bits.
pub(super) fn rescale(asm: &mut Assembler, tile: &Tile, pixel: usize) -> Emit {
    let Some(r) = Requantize::of(tile) else { return Ok(()) };
    let spread = r.form.has_residual && !matches!(r.layout.rescale, RescaleLayout::Q15 { .. });
    let [loaded, u, t, s] = [0, 1, 2, 3].map(|i| tile.temporary(i));
    if spread {
        r.load_residual(asm, loaded, pixel)?;
    }
    for v in 0..tile.format.vectors() {
        let x = tile.accumulator(pixel, v);
        if spread {
            r.spread_residual(asm, u, loaded, v)?;
        }
        let residual = spread.then_some(u);
        match r.layout.rescale {
            RescaleLayout::Shift { m, add, n, sign, m_r, k } => {
                let wide = Wide { m, add, n, sign, m_r, k };
                rescale_shift(asm, tile, &wide, v, x, residual, [t, s])?;
            }
            RescaleLayout::ShiftHigh { m, half, n } => {
                multiply_wide(asm, x, t, tile.param(m, v), tile.param(m + 4, v))?;
                let high = asm.merge_high_halves(x, t)?;
                asm.vpaddd(x, high, tile.param(half, v))?;
                asm.vpsravd(x, x, tile.param(n, v))?;
            }
            RescaleLayout::Tflite { .. } => rescale_tflite(asm, &r, v, x, residual, t)?,
            RescaleLayout::Q15 { s1, .. } => asm.vpsravd(x, x, tile.param(s1, v))?,
            RescaleLayout::Pow2 { n, m_r } => {
                if let Some(u) = residual {
                    asm.vpmulld(u, u, tile.param(m_r, v))?;
                    asm.vpaddd(x, x, u)?;
                }
                asm.vpsravd(x, x, tile.param(n, v))?;
            }
            RescaleLayout::Float { scale, most, z_r, scale_r } => {
                asm.vcvtdq2ps(x, x)?;
                asm.vmulps(x, x, tile.param(scale, v))?;
                if let Some(u) = residual {
                    asm.vpsubd(u, u, tile.param(z_r, 0))?;
                    asm.vcvtdq2ps(u, u)?;
                    asm.vmulps(u, u, tile.param(scale_r, 0))?;
                    asm.vaddps(x, x, u)?;
                }
                if r.form.rescale == (RescaleForm::Float { can_exceed_i32: true }) {
                    asm.vminps(x, x, tile.param(most, 0))?;
                }
                asm.vcvtps2dq(x, x)?;
            }
        }
    }
    Ok(())
}

/// Offsets of [`RescaleLayout::Shift`].
struct Wide {
    m: usize,
    add: usize,
    n: usize,
    sign: usize,
    m_r: usize,
    k: usize,
}

/// 64-bit products of the even columns in `x`, of the odd ones in the first temporary.
fn rescale_shift(
    asm: &mut Assembler,
    tile: &Tile,
    at: &Wide,
    v: usize,
    x: Reg,
    residual: Option<Reg>,
    [t, s]: [Reg; 2],
) -> Emit {
    let (even, odd) = (2 * v, 2 * v + 1);
    multiply_wide(asm, x, t, tile.param(at.m, v), tile.param(at.m + 4, v))?;
    if let Some(u) = residual {
        asm.vpmuldq(s, u, tile.param(at.m_r, 0))?;
        asm.vpsllvq(s, s, tile.param(at.k, even))?;
        asm.vpaddq(x, x, s)?;
        asm.vpsrlq(u, u, 32)?;
        asm.vpmuldq(u, u, tile.param(at.m_r, 0))?;
        asm.vpsllvq(u, u, tile.param(at.k, odd))?;
        asm.vpaddq(t, t, u)?;
    }
    asm.vpaddq(x, x, tile.param(at.add, even))?;
    asm.vpaddq(t, t, tile.param(at.add, odd))?;
    asm.shift_right_wide(x, x, tile.param(at.n, even))?;
    asm.shift_right_wide(t, t, tile.param(at.n, odd))?;
    asm.merge_even_as_odd(x, t)?;
    if tile.format.vector_bytes() == 32 {
        // What the shift made of the 2^63 in `add`; the low 32 bits are all that counts.
        asm.vpsubd(x, x, tile.param(at.sign, v))?;
    }
    Ok(())
}

/// `x` = its even columns by `even`, `t` = its odd ones by `odd`, in 64 bits.
fn multiply_wide(
    asm: &mut Assembler,
    x: Reg,
    t: Reg,
    even: iced_x86::code_asm::AsmMemoryOperand,
    odd: iced_x86::code_asm::AsmMemoryOperand,
) -> Emit {
    asm.vpsrlq(t, x, 32)?;
    asm.vpmuldq(t, t, odd)?;
    asm.vpmuldq(x, x, even)
}

fn rescale_tflite(
    asm: &mut Assembler,
    r: &Requantize,
    v: usize,
    x: Reg,
    residual: Option<Reg>,
    t: Reg,
) -> Emit {
    let RescaleLayout::Tflite {
        left,
        m,
        nudge,
        half,
        right,
        z_r,
        left_r,
        m_r,
        half_r,
        right_r,
        guard_half,
        guard,
    } = r.layout.rescale
    else {
        return Ok(());
    };
    let RescaleForm::Tflite { left: shifts_left, residual_left } = r.form.rescale else {
        return Ok(());
    };
    let param = |at, i| r.tile.param(at, i);
    if shifts_left {
        asm.vpsllvd(x, x, param(left, v))?;
    }
    doubling_high_mul(asm, x, t, [param(m, v), param(m + 4, v), param(nudge, 0)])?;
    asm.round_shift_away(x, t, param(half, v), param(right, v))?;
    if let Some(u) = residual {
        asm.vpsubd(u, u, param(z_r, 0))?;
        asm.vpslld(u, u, TFLITE_RESIDUAL_SHIFT)?;
        if residual_left {
            asm.vpsllvd(u, u, param(left_r, 0))?;
        }
        doubling_high_mul(asm, u, t, [param(m_r, 0), param(m_r, 0), param(nudge, 0)])?;
        asm.round_shift_away(u, t, param(half_r, 0), param(right_r, 0))?;
        asm.vpaddd(x, x, u)?;
        asm.round_shift_away(x, t, param(guard_half, 0), param(guard, 0))?;
    }
    Ok(())
}

/// SRDHM: x = (x·m + 2^30) >> 31. Bits 31 to 62 of each product are the result, so logical shifts do.
fn doubling_high_mul(
    asm: &mut Assembler,
    x: Reg,
    t: Reg,
    [even, odd, nudge]: [iced_x86::code_asm::AsmMemoryOperand; 3],
) -> Emit {
    multiply_wide(asm, x, t, even, odd)?;
    asm.vpaddq(x, x, nudge)?;
    asm.vpaddq(t, t, nudge)?;
    asm.vpsrlq(x, x, 31)?;
    asm.vpsllq(t, t, 1)?;
    asm.merge_odd(x, t)
}

/// Works on words `d`, packed from the accumulators (pixel, vector) `low` and `high`.
pub(super) fn words(
    asm: &mut Assembler,
    tile: &Tile,
    d: Reg,
    low: (usize, usize),
    high: (usize, usize),
) -> Emit {
    let Some(r) = Requantize::of(tile) else { return Ok(()) };
    let (RescaleLayout::Q15 { m, z_r, m_r, .. }, RescaleForm::Q15 { guard }) =
        (&r.layout.rescale, r.form.rescale)
    else {
        return asm.vpaddsw(d, d, tile.param(r.layout.zero_point, 0));
    };
    let pair = low.1 / 2;
    asm.vpmulhrsw(d, d, tile.param(*m, pair))?;
    if r.form.has_residual {
        let [loaded, u, t] = [0, 1, 2].map(|i| tile.temporary(i));
        r.load_residual(asm, loaded, low.0)?;
        r.spread_residual(asm, u, loaded, pair)?;
        if tile.format.vectors() == 1 {
            r.load_residual(asm, loaded, high.0)?;
            r.spread_residual(asm, t, loaded, 1)?;
            asm.bitor(u, u, t)?;
        }
        asm.vpsubw(u, u, tile.param(*z_r, 0))?;
        asm.vpsllw(u, u, Q15_RESIDUAL_SHIFT)?;
        asm.vpmulhrsw(u, u, tile.param(*m_r, 0))?;
        asm.vpaddsw(d, d, u)?;
    }
    asm.vpsraw(d, d, guard)
}

/// Packs words to codes and clamps them.
pub(super) fn bytes(asm: &mut Assembler, tile: &Tile, d: Reg, low: Reg, high: Reg) -> Emit {
    let Some(r) = Requantize::of(tile) else { return asm.vpackuswb(d, low, high) };
    if let RescaleLayout::Q15 { flip, .. } = r.layout.rescale {
        asm.vpacksswb(d, low, high)?;
        asm.bitxor(d, d, tile.param(flip, 0))?;
    } else {
        asm.vpackuswb(d, low, high)?;
    }
    if r.form.lo {
        asm.vpmaxub(d, d, tile.param(r.layout.lo, 0))?;
    }
    if r.form.hi {
        asm.vpminub(d, d, tile.param(r.layout.hi, 0))?;
    }
    Ok(())
}
