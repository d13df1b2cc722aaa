//! Rows of f32 to codes of grids that are chosen for them: [`qcc_ir::numerics::DynamicGrid`], on 128 bits.

use super::{
    lanes::{FloatComparison, Lanes},
    line::{across_lanes, each},
    map::counted_loop,
    vector::{f32x4, load_lanes},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    types::{F32X4, I8X16, I32X4},
};
use cranelift_frontend::FunctionBuilder;

/// Rows whose elements follow each other, and what is made of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    /// Elements of a row.
    pub(crate) len: usize,
    /// f32.
    pub(crate) x: Location,
    /// u8, dense as well.
    pub(crate) codes: Location,
    /// f32, one a row.
    pub(crate) scales: Location,
    /// s32, one a row.
    pub(crate) zeros: Location,
    /// Bytes from one scale to the next, and from one zero point.
    pub(crate) stride: i64,
}

const LANES: usize = 4;
/// Bytes of an f32.
const SIZE: i64 = 4;
/// The largest code.
const MOST: f32 = 255.0;

/// Adds the step.
pub(crate) fn quantize_rows(cx: &mut Lowering, rows: &Rows, work: Work) -> Result<(), CodegenError> {
    let len = rows.len as i64;
    cx.step("dynamic_quantize", rows.rows as u64, work, |e, ctx, begin, end| {
        let places =
            [(rows.x, len * SIZE), (rows.codes, len), (rows.scales, rows.stride), (rows.zeros, rows.stride)];
        let bases = places.map(|(location, stride)| (e.address(ctx, location), stride));
        counted_loop(&mut e.b, begin, end, |b, row| {
            let [x, codes, scale, zero] = bases.map(|(base, stride)| {
                let bytes = b.ins().imul_imm_s(row, stride);
                b.ins().iadd(base, bytes)
            });
            let grid = grid_of(b, x, len);
            for (value, place) in [(grid.scale, scale), (grid.zero, zero)] {
                let first = b.ins().extractlane(value, 0);
                b.ins().store(MEM, first, place, 0);
            }
            let vectors = len / LANES as i64;
            each(b, x, vectors, LANES as i64 * SIZE, |b, p, i| {
                let at = b.ins().imul_imm_s(i, LANES as i64);
                let to = b.ins().iadd(codes, at);
                grid.store_codes(b, p, to, LANES);
            });
            let rest = rows.len % LANES;
            if rest > 0 {
                let p = b.ins().iadd_imm_s(x, vectors * LANES as i64 * SIZE);
                let to = b.ins().iadd_imm_s(codes, vectors * LANES as i64);
                grid.store_codes(b, p, to, rest);
            }
        });
        Ok(())
    })
}

/// A grid, in all lanes.
struct Grid {
    scale: Value,
    /// s32.
    zero: Value,
    /// The numbers of steps of the least and of the largest code.
    least: Value,
    most: Value,
}

/// The grid of `len` elements from `x` on.
fn grid_of(b: &mut FunctionBuilder<'_>, x: Value, len: i64) -> Grid {
    let nothing = f32x4(b, 0.0);
    let [lo, hi, not_finite] = [(); 3].map(|()| {
        let variable = b.declare_var(F32X4);
        b.def_var(variable, nothing);
        variable
    });
    let take = |b: &mut FunctionBuilder<'_>, x: Value| {
        for (variable, is_low) in [(lo, true), (hi, false)] {
            let before = b.use_var(variable);
            let after = if is_low { b.smaller(x, before) } else { b.larger(x, before) };
            b.def_var(variable, after);
        }
        // 0 of finite numbers, NaN of others.
        let none = b.ins().fmul(x, nothing);
        let before = b.use_var(not_finite);
        let after = b.ins().fadd(before, none);
        b.def_var(not_finite, after);
    };
    let vectors = len / LANES as i64;
    each(b, x, vectors, LANES as i64 * SIZE, |b, p, _| {
        let x = super::vector::load(b, F32X4, p, 0);
        take(b, x);
    });
    let rest = len % LANES as i64;
    if rest > 0 {
        let p = b.ins().iadd_imm_s(x, vectors * LANES as i64 * SIZE);
        // Zeros besides: they change no range.
        let x = load_lanes(b, F32X4, p, 0, rest);
        take(b, x);
    }
    let [lo, hi, not_finite] = [lo, hi, not_finite].map(|variable| b.use_var(variable));
    let lo = across_lanes(b, lo, |b, x, y| b.smaller(x, y));
    let hi = across_lanes(b, hi, |b, x, y| b.larger(x, y));
    let not_finite = across_lanes(b, not_finite, |b, x, y| b.fadd(x, y));
    let (most, one) = (f32x4(b, MOST), f32x4(b, 1.0));
    let range = b.fsub(hi, lo);
    let step = b.fdiv(range, most);
    let step = b.fadd(step, not_finite);
    let vanishes = b.compare_f32(FloatComparison::Equal, step, nothing);
    let scale = b.select(vanishes, one, step);
    let above = b.fsub(nothing, lo);
    let place = b.fdiv(above, scale);
    let place = b.larger(place, nothing);
    let place = b.smaller(place, most);
    let place = b.nearest(place);
    let zero = b.truncate(place);
    Grid { scale, zero, least: b.fsub(nothing, place), most: b.fsub(most, place) }
}

impl Grid {
    /// Quantizes `count` elements.
    fn store_codes(&self, b: &mut FunctionBuilder<'_>, from: Value, to: Value, count: usize) {
        let x = load_lanes(b, F32X4, from, 0, count as i64);
        let steps = b.fdiv(x, self.scale);
        let steps = b.larger(steps, self.least);
        let steps = b.smaller(steps, self.most);
        let steps = b.nearest(steps);
        let steps = b.truncate(steps);
        let codes = b.iadd(steps, self.zero);
        let words = b.ins().snarrow(codes, codes);
        let bytes = b.ins().unarrow(words, words);
        let (ty, lanes) = if count == LANES { (I32X4, 1) } else { (I8X16, count) };
        let lanes_of = super::vector::cast(b, ty, bytes);
        for lane in 0..lanes {
            let part = b.ins().extractlane(lanes_of, lane as u8);
            b.ins().store(MEM, part, to, lane as i32);
        }
    }
}
