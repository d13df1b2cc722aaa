//! Weighted sums of rows along one dimension of `[outer, n, inner]`, vectorised over `inner`.
//!
//! A unit is one row of the result: `inner` neighbours at one index of the dimension. Its sources, weights and start
//! stand in a table. Rows of a vector or more end with one that overlaps the one before.

use super::{
    line::Line,
    map::counted_loop,
    vector::{cast, codes, load_lanes, load_splat, shuffle, store_lanes},
};
use crate::{
    CodegenError,
    dense::clif_tile::multiply_add_pairs,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, Type, Value,
    types::{F32X4, I8X16, I16X8, I32X4, I64},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{
    OutputGrid,
    ops::{FixedTaps, Taps},
};

/// Taps that are unrolled; longer sums are left to the interpreter.
pub(crate) const MAX_TAPS: usize = 16;

/// What a row of the result is.
pub(crate) enum Sums<'a> {
    /// The bytes of a row of the operand.
    Pick(&'a Taps),
    /// Sums of f32.
    Float(&'a Taps),
    /// Sums of u8 codes, to codes.
    Fixed(&'a FixedTaps, OutputGrid),
}

impl Sums<'_> {
    fn ty(&self) -> Type {
        match self {
            Sums::Float(_) => F32X4,
            Sums::Pick(_) | Sums::Fixed(..) => I8X16,
        }
    }

    fn sources(&self) -> (&[u32], usize) {
        match self {
            Sums::Pick(t) | Sums::Float(t) => (&t.sources, t.count),
            Sums::Fixed(t, _) => (&t.sources, t.count),
        }
    }

    /// Words of an entry behind its sources: weights, then the start.
    fn words(&self, i: usize) -> Vec<u32> {
        match self {
            Sums::Pick(_) => vec![],
            Sums::Float(t) => {
                let own = &t.weights[i * t.count..(i + 1) * t.count];
                own.iter().chain([&t.offsets[i]]).map(|w| w.to_bits()).collect()
            }
            Sums::Fixed(t, _) => {
                let pairs = t.weights[i * t.count..(i + 1) * t.count].chunks(2);
                let word = |w: &[i16]| {
                    let (low, high) = (w[0] as u16, w.get(1).map_or(0, |&w| w as u16));
                    u32::from(low) | u32::from(high) << 16
                };
                pairs.map(word).chain([t.starts[i] as u32]).collect()
            }
        }
    }
}

/// Adds the step that makes each row of the result along a line of the operand; `inner` of that counts bytes for
/// [`Sums::Pick`].
pub(crate) fn resample(
    cx: &mut Lowering,
    line: Line,
    sums: &Sums<'_>,
    (from, to): (Location, Location),
    work: Work,
) -> Result<(), CodegenError> {
    let (sources, count) = sums.sources();
    let length = sources.len() / count;
    let mut table = Vec::new();
    for (i, own) in sources.chunks(count).enumerate() {
        table.extend(own.iter().copied().chain(sums.words(i)).flat_map(u32::to_le_bytes));
    }
    let entry_bytes = table.len() / length.max(1);
    let table = Location::Weights(cx.weights(&table, 4)?);
    let ty = sums.ty();
    let size = i64::from(ty.lane_bits() / 8);
    let (lanes, inner) = (i64::from(ty.lane_count()), line.inner);
    let row_bytes = inner * size;
    let units = line.outer as u64 * length as u64 * u64::from(inner > 0);
    cx.step("resample", units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let table = e.address(ctx, table);
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let outer = b.ins().udiv_imm_u(unit, length as i64);
            let before = b.ins().imul_imm_s(outer, length as i64);
            let i = b.ins().isub(unit, before);
            let at = b.ins().imul_imm_s(i, entry_bytes as i64);
            let entry = b.ins().iadd(table, at);
            let image = b.ins().imul_imm_s(outer, line.len * row_bytes);
            let image = b.ins().iadd(source, image);
            let row = Row::load(b, sums, image, row_bytes, entry);
            let offset = b.ins().imul_imm_s(unit, row_bytes);
            let to = b.ins().iadd(target, offset);
            let width = inner.min(lanes);
            let blocks = (inner / lanes).max(1);
            let zero = b.ins().iconst(I64, 0);
            match blocks {
                1 => row.block(b, sums, zero, to, width),
                _ => {
                    let blocks = b.ins().iconst(I64, blocks);
                    counted_loop(b, zero, blocks, |b, block| {
                        let at = b.ins().imul_imm_s(block, lanes * size);
                        row.block(b, sums, at, to, width);
                    });
                }
            }
            if inner > lanes && inner % lanes != 0 {
                let last = b.ins().iconst(I64, row_bytes - lanes * size);
                row.block(b, sums, last, to, width);
            }
        });
        Ok(())
    })
}

/// What the blocks of a row have in common.
struct Row {
    /// Address of each tap's row of the operand.
    pointers: Vec<Value>,
    /// Weights in all lanes: one a tap, or one a pair of taps.
    weights: Vec<Value>,
    /// What sums start from, in all lanes; without one elements are picked.
    start: Option<Value>,
}

impl Row {
    fn load(b: &mut FunctionBuilder, sums: &Sums<'_>, image: Value, row_bytes: i64, entry: Value) -> Row {
        let count = sums.sources().1;
        let pointers = (0..count)
            .map(|t| {
                let index = b.ins().uload32(MEM, entry, 4 * t as i32);
                let offset = b.ins().imul_imm_s(index, row_bytes);
                b.ins().iadd(image, offset)
            })
            .collect();
        let word = |b: &mut FunctionBuilder, ty: Type, i: usize| {
            let p = b.ins().iadd_imm_s(entry, 4 * (count + i) as i64);
            load_splat(b, ty, p)
        };
        let (ty, weights) = match sums {
            Sums::Pick(_) => return Row { pointers, weights: vec![], start: None },
            Sums::Float(_) => (F32X4, count),
            Sums::Fixed(..) => (I32X4, count.div_ceil(2)),
        };
        let start = word(b, ty, weights);
        Row { pointers, weights: (0..weights).map(|i| word(b, ty, i)).collect(), start: Some(start) }
    }

    /// The block at byte `at` of the row: `width` lanes.
    fn block(&self, b: &mut FunctionBuilder, sums: &Sums<'_>, at: Value, to: Value, width: i64) {
        let taps: Vec<Value> = self
            .pointers
            .iter()
            .map(|&p| {
                let p = b.ins().iadd(p, at);
                load_lanes(b, sums.ty(), p, 0, width)
            })
            .collect();
        let y = match (sums, self.start) {
            (Sums::Float(_), Some(start)) => taps.iter().zip(&self.weights).fold(start, |sum, (&x, &w)| {
                let product = b.ins().fmul(w, x);
                b.ins().fadd(sum, product)
            }),
            (Sums::Fixed(fixed, output), Some(start)) => self.fixed(b, &taps, start, fixed.shift, *output),
            _ => taps[0],
        };
        let to = b.ins().iadd(to, at);
        store_lanes(b, y, to, 0, width);
    }

    fn fixed(
        &self,
        b: &mut FunctionBuilder,
        taps: &[Value],
        start: Value,
        shift: u32,
        output: OutputGrid,
    ) -> Value {
        let mut sums = [start; 4];
        for (pair, &weights) in taps.chunks(2).zip(&self.weights) {
            let weights = cast(b, I16X8, weights);
            let (x, y) = (pair[0], pair.get(1).copied().unwrap_or(pair[0]));
            for half in 0..2u8 {
                let both = std::array::from_fn(|i| 8 * half + i as u8 / 2 + 16 * (i as u8 % 2));
                let both = shuffle(b, x, y, both);
                let words = [b.ins().uwiden_low(both), b.ins().uwiden_high(both)];
                for (i, words) in words.into_iter().enumerate() {
                    let products = multiply_add_pairs(b, words, weights);
                    let sum = &mut sums[2 * usize::from(half) + i];
                    *sum = b.ins().iadd(*sum, products);
                }
            }
        }
        let shifted = sums.map(|s| b.ins().sshr_imm_u(s, i64::from(shift)));
        // The zero point is part of the start.
        codes(b, &shifted, OutputGrid { zero_point: 0, ..output })
    }
}
