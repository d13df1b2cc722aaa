//! From accumulators to results in Cranelift's 128-bit vectors: every requantization mode, residual, clamp, store.
//!
//! SSE4.2 has no shift by a different amount in each lane. A shift by s is a product with 2^(31−s) in 64 bits and a
//! uniform shift by 31 instead: see [`shift_right_each`]. Small sums are shifted as floats, by a product with 2^−s.

use super::spec::{Epilogue, RowGrid, RunTimeGrids};
use crate::module::MEM;
use cranelift_codegen::ir::{
    ConstantData, Endianness, InstBuilder, MemFlagsData, Type, Value,
    condcodes::FloatCC,
    types::{F32, F32X4, I8X16, I16X8, I32X4, I64X2},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{
    numerics::{Dequantizer, Q15_RESIDUAL_SHIFT, Requantizer, Rescale, TFLITE_RESIDUAL_SHIFT},
    ops::Clamp,
};
use std::ops::Range;

/// Lanes of 32 bits in a vector: channels that one accumulator holds.
pub(crate) const LANES: usize = 4;

/// A per-channel constant. Each is an array over the channels of a panel; the arrays follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Field {
    /// Start value of the accumulator, with everything folded into it that can be.
    Bias,
    /// Multiplier: s32, or f32 in float mode.
    Factor,
    /// The final shift s as 2^(31−s), or as 2^−s in f32.
    Shift,
    /// Rounding term in 64 bits.
    Half,
    /// Power of two, in 64 bits, that brings a sum to a shift of at least 32.
    Left,
    /// Power of two for the accumulator before the multiplication.
    Raise,
    /// Factor of the residual.
    Residual,
    /// Sum of the weights.
    Sum,
    /// f32 that is added.
    Addend,
}

impl Field {
    fn bytes(self) -> usize {
        match self {
            Field::Half | Field::Left => 8,
            _ => 4,
        }
    }
}

/// The per-channel constants of an epilogue and where they lie in the parameter block of a panel.
#[derive(Clone, Debug)]
pub(crate) struct Params<'a> {
    epilogue: Epilogue<'a>,
    width: usize,
    fields: Vec<Field>,
    /// Whether sums are shifted as floats: exact where they are within ±2^24, at a third of the price.
    shifts_floats: bool,
}

/// Integers up to this magnitude are exact in f32.
const EXACT_IN_F32: i64 = 1 << 24;

/// The largest magnitude of what is added to an accumulator of any channel before it is shifted; `None` where it is
/// not a shift of 32 bits that follows.
fn added(q: &Requantizer) -> Option<i64> {
    let largest = |v: &[i32]| v.iter().map(|x| i64::from(*x).abs()).max().unwrap_or(0);
    match &q.rescale {
        Rescale::Q15 { offset, .. } => Some(largest(offset)),
        Rescale::Pow2 { n, m_r } => {
            let half = n.iter().map(|&n| (1i64 << n) / 2).max().unwrap_or(0);
            Some(half + 255 * largest(m_r))
        }
        Rescale::Shift { .. } | Rescale::Tflite { .. } | Rescale::Float { .. } => None,
    }
}

impl<'a> Params<'a> {
    /// The constants of `epilogue` for panels of `width` channels, whose accumulators are within ±`reach`.
    pub(crate) fn new(epilogue: Epilogue<'a>, width: usize, reach: i64) -> Params<'a> {
        let mut fields = vec![Field::Bias];
        if let Epilogue::Requantize(q) = epilogue {
            match &q.rescale {
                Rescale::Shift { n, .. } => {
                    fields.extend([Field::Factor, Field::Shift, Field::Half]);
                    fields.extend(n.iter().any(|&n| n < 32).then_some(Field::Left));
                    fields.extend(q.has_residual.then_some(Field::Residual));
                }
                Rescale::Tflite { left, .. } => {
                    fields.extend([Field::Factor, Field::Shift]);
                    fields.extend(left.iter().any(|&l| l > 0).then_some(Field::Raise));
                }
                Rescale::Q15 { .. } => fields.extend([Field::Factor, Field::Shift]),
                Rescale::Pow2 { .. } => {
                    fields.push(Field::Shift);
                    fields.extend(q.has_residual.then_some(Field::Residual));
                }
                Rescale::Float { .. } => fields.push(Field::Factor),
            }
        }
        if let Epilogue::Dequantize { dequantizer, grids, .. } = epilogue {
            fields.extend(grids.has_zero_points().then_some(Field::Sum));
            fields.push(Field::Factor);
            fields.extend(dequantizer.bias.is_some().then_some(Field::Addend));
        }
        let shifts_floats = match epilogue {
            Epilogue::Requantize(q) => added(q).is_some_and(|a| reach.saturating_add(a) <= EXACT_IN_F32),
            Epilogue::PackOnly | Epilogue::Dequantize { .. } | Epilogue::Float { .. } => false,
        };
        Params { epilogue, width, fields, shifts_floats }
    }

    /// Bytes of one panel's constants.
    pub(crate) fn bytes(&self) -> usize {
        self.fields.iter().map(|f| f.bytes() * self.width).sum()
    }

    /// Byte offset of a field's first channel.
    fn offset(&self, field: Field) -> Option<i32> {
        let before = self.fields.iter().position(|&f| f == field)?;
        Some(self.fields[..before].iter().map(|f| f.bytes() * self.width).sum::<usize>() as i32)
    }

    /// The constants of these channels of an int8 product; `bias` is what their accumulators start at, by channel.
    pub(crate) fn pack(&self, channels: Range<usize>, bias: &[i32]) -> Vec<u8> {
        self.pack_with(channels, |c| self.folded_bias(c, bias[c]).to_le_bytes())
    }

    /// The constants of these channels of a float product.
    pub(crate) fn pack_float(&self, channels: Range<usize>, bias: &[f32]) -> Vec<u8> {
        self.pack_with(channels, |c| bias[c].to_le_bytes())
    }

    fn pack_with(&self, channels: Range<usize>, bias: impl Fn(usize) -> [u8; 4]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes());
        for &field in &self.fields {
            for c in channels.clone() {
                match (field, self.epilogue) {
                    (Field::Bias, _) => bytes.extend(bias(c)),
                    (_, Epilogue::Requantize(q)) if field.bytes() == 8 => {
                        bytes.extend(wide(q, field, c).to_le_bytes());
                    }
                    (Field::Shift, Epilogue::Requantize(q)) if self.shifts_floats => {
                        bytes.extend(0.5f32.powi(final_shift(q, c) as i32).to_le_bytes());
                    }
                    (Field::Shift, Epilogue::Requantize(q)) => {
                        bytes.extend((1u32 << (31 - final_shift(q, c))).to_le_bytes());
                    }
                    (_, Epilogue::Requantize(q)) => bytes.extend(narrow(q, field, c)),
                    (_, Epilogue::Dequantize { dequantizer, .. }) => {
                        bytes.extend(dequantizing(dequantizer, field, c));
                    }
                    _ => {}
                }
            }
            let missing = self.width - channels.len();
            bytes.resize(bytes.len() + missing * field.bytes(), 0);
        }
        bytes
    }

    /// The start value with the terms added to it that the formulas add to the accumulator. Wrapping: the requantizer
    /// has checked that whole sums fit, partial ones need not.
    fn folded_bias(&self, c: usize, bias: i32) -> i32 {
        let Epilogue::Requantize(q) = self.epilogue else { return bias };
        bias.wrapping_add(match &q.rescale {
            Rescale::Q15 { offset, .. } => offset[c],
            Rescale::Pow2 { n, .. } if n[c] > 0 => 1 << (n[c] - 1),
            _ => 0,
        })
    }
}

/// The right shift by which a sum of channel c ends, in 0..=31.
fn final_shift(q: &Requantizer, c: usize) -> u32 {
    match &q.rescale {
        // The upper half of the 64-bit sum was taken already.
        Rescale::Shift { n, .. } => n[c].max(32) - 32,
        Rescale::Tflite { right, .. } => right[c],
        Rescale::Q15 { s1, .. } => s1[c],
        Rescale::Pow2 { n, .. } => n[c],
        Rescale::Float { .. } => 0,
    }
}

/// A 64-bit constant: shifts below 32 are raised to 32, so that the result is the upper half of the sum.
fn wide(q: &Requantizer, field: Field, c: usize) -> i64 {
    match &q.rescale {
        Rescale::Shift { n, .. } if field == Field::Left => 1 << 32u32.saturating_sub(n[c]),
        Rescale::Shift { n, .. } => 1 << (n[c].max(32) - 1),
        _ => 0,
    }
}

fn narrow(q: &Requantizer, field: Field, c: usize) -> [u8; 4] {
    match (&q.rescale, field) {
        (Rescale::Shift { m, .. }, Field::Factor) => m[c].to_le_bytes(),
        (Rescale::Shift { k, .. }, Field::Residual) => (1i32 << k[c]).to_le_bytes(),
        (Rescale::Tflite { m, .. }, Field::Factor) => m[c].to_le_bytes(),
        (Rescale::Tflite { left, .. }, Field::Raise) => (1i32 << left[c]).to_le_bytes(),
        (Rescale::Q15 { m, .. }, Field::Factor) => i32::from(m[c]).to_le_bytes(),
        (Rescale::Pow2 { m_r, .. }, Field::Residual) => m_r[c].to_le_bytes(),
        (Rescale::Float { scale, .. }, Field::Factor) => scale[c].to_le_bytes(),
        _ => [0; 4],
    }
}

fn dequantizing(d: &Dequantizer, field: Field, c: usize) -> [u8; 4] {
    match (field, &d.bias) {
        (Field::Sum, _) => d.sums[c].to_le_bytes(),
        (Field::Factor, _) => d.scales[c].to_le_bytes(),
        (Field::Addend, Some(bias)) => bias[c].to_le_bytes(),
        _ => [0; 4],
    }
}

/// One accumulator on its way out: four channels of one pixel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accumulator {
    /// s32x4 or f32x4.
    pub(crate) value: Value,
    /// Its first channel, in the panel.
    pub(crate) channel: usize,
    /// Byte displacement of the pixel's result, residual and grid.
    pub(crate) y_offset: i32,
    pub(crate) r_offset: i32,
    pub(crate) g_offset: i32,
}

/// Emits the way from accumulators to stored results for one function.
pub(crate) struct Finisher<'f, 'p, 'a> {
    pub(crate) b: &'f mut FunctionBuilder<'a>,
    pub(crate) params: &'p Params<'p>,
    /// Channels that are stored; the rest of the panel is padding.
    pub(crate) columns: usize,
    /// Addresses of the panel's constants, and of the first pixel's result, residual and grid.
    pub(crate) p: Value,
    pub(crate) y: Value,
    pub(crate) r: Value,
    pub(crate) g: Value,
}

impl Finisher<'_, '_, '_> {
    /// The start values of the channels from `channel`.
    pub(crate) fn start(&mut self, ty: Type, channel: usize) -> Value {
        self.b.ins().load(ty, MEM, self.p, channel as i32 * 4)
    }

    /// Finishes and stores the accumulators.
    pub(crate) fn finish(&mut self, accumulators: &[Accumulator]) {
        let useful: Vec<Accumulator> =
            accumulators.iter().copied().filter(|a| a.channel < self.columns).collect();
        match self.params.epilogue {
            Epilogue::Float { clamp, residual } => {
                for a in useful {
                    self.finish_float(a, clamp, residual);
                }
            }
            Epilogue::Dequantize { dequantizer, grids, residual } => {
                for a in useful {
                    let value = self.dequantize(a, dequantizer, grids);
                    self.finish_float(Accumulator { value, ..a }, dequantizer.clamp, residual);
                }
            }
            // Sixteen results fill a vector of bytes, whichever pixels they belong to.
            _ => useful.chunks(4).for_each(|four| self.finish_codes(four)),
        }
    }

    fn finish_float(&mut self, a: Accumulator, clamp: Clamp, residual: bool) {
        let mut x = a.value;
        if residual {
            let r = self.b.ins().load(F32X4, MEM, self.r, a.r_offset + a.channel as i32 * 4);
            x = self.b.ins().fadd(x, r);
        }
        // The operand order keeps NaN, as `Clamp::apply` does.
        if clamp.lo != f32::NEG_INFINITY {
            let lo = splat_f32(self.b, clamp.lo);
            x = maximum(self.b, lo, x);
        }
        if clamp.hi != f32::INFINITY {
            let hi = splat_f32(self.b, clamp.hi);
            x = minimum(self.b, hi, x);
        }
        let at = a.y_offset + a.channel as i32 * 4;
        match self.columns - a.channel {
            LANES.. => {
                self.b.ins().store(MEM, x, self.y, at);
            }
            left => {
                for lane in 0..left {
                    let e = self.b.ins().extractlane(x, lane as u8);
                    self.b.ins().store(MEM, e, self.y, at + lane as i32 * 4);
                }
            }
        }
    }

    /// f32(acc − zero·sum)·(scale_row·scale) + bias, no step fused with another.
    fn dequantize(&mut self, a: Accumulator, d: &Dequantizer, grids: RunTimeGrids) -> Value {
        let mut of_row = |at: usize| {
            let scalar = self.b.ins().load(F32, MEM, self.g, a.g_offset + at as i32);
            self.b.ins().splat(F32X4, scalar)
        };
        let scale_row = grids.has_scales().then(|| of_row(0));
        let zero = grids.has_zero_points().then(|| of_row(RowGrid::ZERO_POINT));
        let mut sum = a.value;
        if let Some(zero) = zero {
            let zero = cast(self.b, I32X4, zero);
            let sums = self.constant(Field::Sum, I32X4, a.channel, 0);
            let correction = self.b.ins().imul(zero, sums);
            sum = self.b.ins().isub(sum, correction);
        }
        let mut scale = self.constant(Field::Factor, F32X4, a.channel, 0);
        if let Some(scale_row) = scale_row {
            scale = self.b.ins().fmul(scale_row, scale);
        }
        let sum = self.b.ins().fcvt_from_sint(F32X4, sum);
        let mut x = self.b.ins().fmul(sum, scale);
        if d.bias.is_some() {
            let bias = self.constant(Field::Addend, F32X4, a.channel, 0);
            x = self.b.ins().fadd(x, bias);
        }
        x
    }

    fn finish_codes(&mut self, four: &[Accumulator]) {
        let padded = [0, 1, 2, 3].map(|i| four[i.min(four.len() - 1)]);
        let codes = match self.params.epilogue {
            Epilogue::Requantize(q) => match &q.rescale {
                Rescale::Q15 { r, m_r, .. } => self.q15(q, padded, *r, *m_r),
                _ => {
                    let v = padded.map(|a| self.rescale(q, a));
                    self.narrow_to_grid(q, v)
                }
            },
            _ => {
                let v = padded.map(|a| a.value);
                let (low, high) = self.halves(v);
                self.b.ins().unarrow(low, high)
            }
        };
        self.store_codes(four, codes);
    }

    /// v = the rescaled accumulator without the zero point, s32, for all modes but q15.
    fn rescale(&mut self, q: &Requantizer, a: Accumulator) -> Value {
        let u = q.has_residual.then(|| self.residual(q, a));
        match &q.rescale {
            Rescale::Shift { m_r, .. } => self.shift(a, u, *m_r),
            Rescale::Tflite { guard, residual, .. } => self.tflite(a, u, *guard, *residual),
            Rescale::Pow2 { .. } => {
                let mut x = a.value;
                if let Some(u) = u {
                    let m_r = self.constant(Field::Residual, I32X4, a.channel, 0);
                    let other = self.b.ins().imul(u, m_r);
                    x = self.b.ins().iadd(x, other);
                }
                self.shift_right(x, a.channel)
            }
            Rescale::Float { scale_r, .. } => self.float(q, a, u, *scale_r),
            // `finish_codes` takes q15 another way: its lanes have 16 bits.
            Rescale::Q15 { .. } => a.value,
        }
    }

    /// (acc·m + u·m_r·2^k + 2^(n−1)) >> n in 64 bits.
    fn shift(&mut self, a: Accumulator, u: Option<Value>, m_r: i32) -> Value {
        let m = self.constant(Field::Factor, I32X4, a.channel, 0);
        let mut sum = multiply_wide(self.b, a.value, m);
        if let Some(u) = u {
            let m_r = splat_i32(self.b, m_r);
            let scaled = self.b.ins().imul(u, m_r);
            let raise = self.constant(Field::Residual, I32X4, a.channel, 0);
            let other = multiply_wide(self.b, scaled, raise);
            sum = [0, 1].map(|i| self.b.ins().iadd(sum[i], other[i]));
        }
        if self.params.offset(Field::Left).is_some() {
            let left = [0, 1].map(|i| self.constant(Field::Left, I64X2, a.channel, i));
            sum = [0, 1].map(|i| self.b.ins().imul(sum[i], left[i]));
        }
        let half = [0, 1].map(|i| self.constant(Field::Half, I64X2, a.channel, i));
        let sum = [0, 1].map(|i| self.b.ins().iadd(sum[i], half[i]));
        let upper = upper_halves(self.b, sum);
        self.shift_right(upper, a.channel)
    }

    /// RDBPOT(SRDHM(acc·2^left, m), right), plus the residual's under guard bits.
    fn tflite(&mut self, a: Accumulator, u: Option<Value>, guard: u32, residual: (i32, u32, u32)) -> Value {
        let mut x = a.value;
        if self.params.offset(Field::Raise).is_some() {
            let raise = self.constant(Field::Raise, I32X4, a.channel, 0);
            x = self.b.ins().imul(x, raise);
        }
        let m = self.constant(Field::Factor, I32X4, a.channel, 0);
        let high = doubling_high_multiply(self.b, x, m);
        let right = self.constant(Field::Shift, I32X4, a.channel, 0);
        let own = divide_away(self.b, high, right);
        let Some(u) = u else { return own };
        let (m_r, left_r, right_r) = residual;
        let raised = self.b.ins().ishl_imm_u(u, i64::from(TFLITE_RESIDUAL_SHIFT + left_r));
        let m_r = splat_i32(self.b, m_r);
        let high = doubling_high_multiply(self.b, raised, m_r);
        let other = divide_away_uniform(self.b, high, right_r);
        let sum = self.b.ins().iadd(own, other);
        divide_away_uniform(self.b, sum, guard)
    }

    /// round_half_even(clamp(f32(acc)·scale + f32(u)·scale_r)), no step fused with another.
    fn float(&mut self, q: &Requantizer, a: Accumulator, u: Option<Value>, scale_r: f32) -> Value {
        let scale = self.constant(Field::Factor, F32X4, a.channel, 0);
        let acc = self.b.ins().fcvt_from_sint(F32X4, a.value);
        let mut x = self.b.ins().fmul(acc, scale);
        if let Some(u) = u {
            let scale_r = splat_f32(self.b, scale_r);
            let u = self.b.ins().fcvt_from_sint(F32X4, u);
            let other = self.b.ins().fmul(u, scale_r);
            x = self.b.ins().fadd(x, other);
        }
        let lo = splat_f32(self.b, (q.grid.lo - q.grid.zero_point) as f32);
        let hi = splat_f32(self.b, (q.grid.hi - q.grid.zero_point) as f32);
        let x = maximum(self.b, lo, x);
        let x = minimum(self.b, hi, x);
        let rounded = self.b.ins().nearest(x);
        self.b.ins().x86_cvtt2dq(I32X4, rounded)
    }

    /// See `Requantizer::apply`; the accumulators start at bias + offset already.
    fn q15(&mut self, q: &Requantizer, four: [Accumulator; 4], r: u32, m_r: i16) -> Value {
        let v = four.map(|a| self.shift_right(a.value, a.channel));
        let (low, high) = self.halves(v);
        let m = four.map(|a| self.constant(Field::Factor, I32X4, a.channel, 0));
        let (m_low, m_high) = self.halves(m);
        let mut t = [self.b.ins().x86_pmulhrsw(low, m_low), self.b.ins().x86_pmulhrsw(high, m_high)];
        if q.has_residual {
            let u = four.map(|a| self.residual(q, a));
            let (low, high) = self.halves(u);
            let m_r = splat_i16(self.b, m_r);
            for (t, u) in t.iter_mut().zip([low, high]) {
                let raised = self.b.ins().ishl_imm_u(u, i64::from(Q15_RESIDUAL_SHIFT));
                let other = self.b.ins().x86_pmulhrsw(raised, m_r);
                *t = self.b.ins().sadd_sat(*t, other);
            }
        }
        let t = t.map(|t| self.b.ins().sshr_imm_u(t, i64::from(r)));
        let signed = self.b.ins().snarrow(t[0], t[1]);
        let flip = splat_u8(self.b, 0x80);
        let codes = self.b.ins().bxor(signed, flip);
        self.clamp_codes(q, codes)
    }

    /// clamp(v + z_y, lo, hi): the saturating narrowings and the sum in between change nothing that the clamp keeps.
    fn narrow_to_grid(&mut self, q: &Requantizer, v: [Value; 4]) -> Value {
        let (low, high) = self.halves(v);
        let zero = splat_i16(self.b, q.grid.zero_point as i16);
        let low = self.b.ins().sadd_sat(low, zero);
        let high = self.b.ins().sadd_sat(high, zero);
        let codes = self.b.ins().unarrow(low, high);
        self.clamp_codes(q, codes)
    }

    fn clamp_codes(&mut self, q: &Requantizer, mut codes: Value) -> Value {
        if q.grid.lo > 0 {
            let lo = splat_u8(self.b, q.grid.lo as u8);
            codes = self.b.ins().umax(codes, lo);
        }
        if q.grid.hi < 255 {
            let hi = splat_u8(self.b, q.grid.hi as u8);
            codes = self.b.ins().umin(codes, hi);
        }
        codes
    }

    /// Four vectors of s32 as two of s16, saturated.
    fn halves(&mut self, v: [Value; 4]) -> (Value, Value) {
        (self.b.ins().snarrow(v[0], v[1]), self.b.ins().snarrow(v[2], v[3]))
    }

    /// u = r − z_r, as s32.
    fn residual(&mut self, q: &Requantizer, a: Accumulator) -> Value {
        let at = a.r_offset + a.channel as i32;
        let bytes = load_4_bytes(self.b, self.r, at);
        let words = self.b.ins().uwiden_low(bytes);
        let wide = self.b.ins().uwiden_low(words);
        match q.residual_zero_point {
            0 => wide,
            z => {
                let z = splat_i32(self.b, z);
                self.b.ins().isub(wide, z)
            }
        }
    }

    /// A vector of constants: the `part`-th of the two that a field of 64 bits takes for four channels.
    fn constant(&mut self, field: Field, ty: Type, channel: usize, part: i32) -> Value {
        // A field that the layout lacks is never asked for: both follow from the same epilogue.
        let offset = self.params.offset(field).unwrap_or(0);
        let at = offset + (channel * field.bytes()) as i32 + part * 16;
        self.b.ins().load(ty, MEM, self.p, at)
    }

    /// x >> s of each channel.
    fn shift_right(&mut self, x: Value, channel: usize) -> Value {
        if self.params.shifts_floats {
            // Exact: neither the conversion nor the product with a power of two rounds.
            let power = self.constant(Field::Shift, F32X4, channel, 0);
            let float = self.b.ins().fcvt_from_sint(F32X4, x);
            let scaled = self.b.ins().fmul(float, power);
            let floor = self.b.ins().floor(scaled);
            return self.b.ins().x86_cvtt2dq(I32X4, floor);
        }
        let factor = self.constant(Field::Shift, I32X4, channel, 0);
        shift_right_each(self.b, x, factor)
    }

    /// Stores 4 bytes an accumulator, 8 where two of the same pixel follow each other, single ones at the end.
    fn store_codes(&mut self, four: &[Accumulator], codes: Value) {
        let columns = self.columns;
        let neighbours = |a: &Accumulator, b: &Accumulator| {
            a.y_offset == b.y_offset && a.channel + LANES == b.channel && b.channel + LANES <= columns
        };
        if four.len() == 4 && four.windows(2).all(|w| neighbours(&w[0], &w[1])) {
            self.b.ins().store(MEM, codes, self.y, four[0].y_offset + four[0].channel as i32);
            return;
        }
        let mut i = 0;
        while i < four.len() {
            let a = four[i];
            let at = a.y_offset + a.channel as i32;
            if i % 2 == 0 && four.get(i + 1).is_some_and(|b| neighbours(&a, b)) {
                self.store_lane(codes, I64X2, i / 2, at);
                i += 2;
                continue;
            }
            match columns - a.channel {
                LANES.. => self.store_lane(codes, I32X4, i, at),
                left => (0..left).for_each(|k| self.store_lane(codes, I8X16, i * 4 + k, at + k as i32)),
            }
            i += 1;
        }
    }

    fn store_lane(&mut self, codes: Value, ty: Type, lane: usize, at: i32) {
        let lanes = cast(self.b, ty, codes);
        let element = self.b.ins().extractlane(lanes, lane as u8);
        self.b.ins().store(MEM, element, self.y, at);
    }
}

/// The same bits as another vector type.
pub(crate) fn cast(b: &mut FunctionBuilder<'_>, ty: Type, v: Value) -> Value {
    if b.func.dfg.value_type(v) == ty {
        return v;
    }
    b.ins().bitcast(ty, MemFlagsData::new().with_endianness(Endianness::Little), v)
}

fn splat_bytes(b: &mut FunctionBuilder<'_>, ty: Type, bytes: &[u8]) -> Value {
    let all: Vec<u8> = bytes.iter().copied().cycle().take(16).collect();
    let constant = b.func.dfg.constants.insert(ConstantData::from(all));
    b.ins().vconst(ty, constant)
}

pub(crate) fn splat_u8(b: &mut FunctionBuilder<'_>, x: u8) -> Value {
    splat_bytes(b, I8X16, &[x])
}

pub(crate) fn splat_i16(b: &mut FunctionBuilder<'_>, x: i16) -> Value {
    splat_bytes(b, I16X8, &x.to_le_bytes())
}

pub(crate) fn splat_i32(b: &mut FunctionBuilder<'_>, x: i32) -> Value {
    splat_bytes(b, I32X4, &x.to_le_bytes())
}

pub(crate) fn splat_f32(b: &mut FunctionBuilder<'_>, x: f32) -> Value {
    splat_bytes(b, F32X4, &x.to_le_bytes())
}

/// Four bytes in the lowest lanes of a vector, zeros above.
fn load_4_bytes(b: &mut FunctionBuilder<'_>, base: Value, offset: i32) -> Value {
    let scalar = b.ins().load(F32, MEM, base, offset);
    let vector = b.ins().scalar_to_vector(F32X4, scalar);
    cast(b, I8X16, vector)
}

/// `x < y ? x : y`: `minps`, the second operand where one is NaN.
fn minimum(b: &mut FunctionBuilder<'_>, x: Value, y: Value) -> Value {
    select_less(b, x, y, x, y)
}

/// `y < x ? x : y`: `maxps`, the second operand where one is NaN.
fn maximum(b: &mut FunctionBuilder<'_>, x: Value, y: Value) -> Value {
    select_less(b, y, x, x, y)
}

fn select_less(b: &mut FunctionBuilder<'_>, l: Value, r: Value, then: Value, otherwise: Value) -> Value {
    let mask = b.ins().fcmp(FloatCC::LessThan, l, r);
    let mask = cast(b, F32X4, mask);
    b.ins().bitselect(mask, then, otherwise)
}

/// The four signed products as 64-bit lanes: two vectors.
fn multiply_wide(b: &mut FunctionBuilder<'_>, x: Value, y: Value) -> [Value; 2] {
    let (x0, y0) = (b.ins().swiden_low(x), b.ins().swiden_low(y));
    let (x1, y1) = (b.ins().swiden_high(x), b.ins().swiden_high(y));
    [b.ins().imul(x0, y0), b.ins().imul(x1, y1)]
}

/// The four unsigned products as 64-bit lanes.
fn multiply_wide_unsigned(b: &mut FunctionBuilder<'_>, x: Value, y: Value) -> [Value; 2] {
    let (x0, y0) = (b.ins().uwiden_low(x), b.ins().uwiden_low(y));
    let (x1, y1) = (b.ins().uwiden_high(x), b.ins().uwiden_high(y));
    [b.ins().imul(x0, y0), b.ins().imul(x1, y1)]
}

/// One 32-bit half of each 64-bit lane, as one vector.
fn pick_halves(b: &mut FunctionBuilder<'_>, x: [Value; 2], first: u8) -> Value {
    let mask: Vec<u8> = [0, 8, 16, 24].iter().flat_map(|at| (0..4).map(move |i| at + first + i)).collect();
    let mask = b.func.dfg.immediates.push(ConstantData::from(mask));
    let [low, high] = x.map(|v| cast(b, I8X16, v));
    let picked = b.ins().shuffle(low, high, mask);
    cast(b, I32X4, picked)
}

fn lower_halves(b: &mut FunctionBuilder<'_>, x: [Value; 2]) -> Value {
    pick_halves(b, x, 0)
}

fn upper_halves(b: &mut FunctionBuilder<'_>, x: [Value; 2]) -> Value {
    pick_halves(b, x, 4)
}

/// x >> s, arithmetic, with its own s in 0..=31 for each lane, given as `factor` = 2^(31−s).
///
/// x + 2^31 is unsigned and its product with 2^(31−s), shifted right by 31, is (x + 2^31) >> s = (x >> s) + 2^(31−s),
/// because 2^31 is a multiple of 2^s.
pub(crate) fn shift_right_each(b: &mut FunctionBuilder<'_>, x: Value, factor: Value) -> Value {
    let sign = splat_i32(b, i32::MIN);
    let unsigned = b.ins().bxor(x, sign);
    let products = multiply_wide_unsigned(b, unsigned, factor);
    let shifted = products.map(|p| b.ins().ushr_imm_u(p, 31));
    let low = lower_halves(b, shifted);
    b.ins().isub(low, factor)
}

/// gemmlowp's SRDHM for m ≥ 0: (x·m + 2^30) >> 31.
fn doubling_high_multiply(b: &mut FunctionBuilder<'_>, x: Value, m: Value) -> Value {
    let half = splat_i64(b, 1 << 30);
    let products = multiply_wide(b, x, m);
    let shifted = products.map(|p| {
        let p = b.ins().iadd(p, half);
        b.ins().ushr_imm_u(p, 31)
    });
    lower_halves(b, shifted)
}

fn splat_i64(b: &mut FunctionBuilder<'_>, x: i64) -> Value {
    splat_bytes(b, I64X2, &x.to_le_bytes())
}

/// gemmlowp's RDBPOT with its own e in 0..=31 for each lane, given as `factor` = 2^(31−e).
///
/// Ties away from zero means |x| rounded half up: (|x|·2^(31−e) + 2^30) >> 31, where the 2^30 is half a unit for e > 0
/// and vanishes for e = 0.
fn divide_away(b: &mut FunctionBuilder<'_>, x: Value, factor: Value) -> Value {
    let half = splat_i64(b, 1 << 30);
    let magnitude = b.ins().iabs(x);
    let products = multiply_wide_unsigned(b, magnitude, factor);
    let shifted = products.map(|p| {
        let p = b.ins().iadd(p, half);
        b.ins().ushr_imm_u(p, 31)
    });
    let quotient = lower_halves(b, shifted);
    with_sign_of(b, quotient, x)
}

/// RDBPOT with one e for all lanes.
fn divide_away_uniform(b: &mut FunctionBuilder<'_>, x: Value, e: u32) -> Value {
    if e == 0 {
        return x;
    }
    // |x| + 2^(e−1) does not reach 2^32, so unsigned arithmetic is exact.
    let half = splat_i32(b, 1 << (e - 1));
    let magnitude = b.ins().iabs(x);
    let sum = b.ins().iadd(magnitude, half);
    let quotient = b.ins().ushr_imm_u(sum, i64::from(e));
    with_sign_of(b, quotient, x)
}

fn with_sign_of(b: &mut FunctionBuilder<'_>, magnitude: Value, x: Value) -> Value {
    let sign = b.ins().sshr_imm_u(x, 31);
    let flipped = b.ins().bxor(magnitude, sign);
    b.ins().isub(flipped, sign)
}
