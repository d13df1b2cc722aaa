//! Reductions and softmax of f32 along one dimension of `[outer, len, inner]`.
//!
//! Sums are taken one element after the other, in the order of the dimension, whatever the tier and the threads: where
//! `inner` is 1 the elements are lanes of vectors, but their sum is not. So results equal the interpreter's bit for bit.

use super::{
    map::counted_loop,
    math,
    vector::{cast, f32x4, larger, less, load, load_lanes, shuffle, store_lanes},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    condcodes::FloatCC,
    types::{F32, F32X4, I32X4, I64},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::ops::ReduceKind;

/// The dimension that is reduced, with all before and behind it merged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) outer: i64,
    pub(crate) len: i64,
    pub(crate) inner: i64,
}

const LANES: i64 = 4;
/// Bytes of a vector of four f32.
const VECTOR: i64 = 16;
const SIZE: i64 = 4;

impl Line {
    /// `axes` of a shape, if they stand next to each other. No axes at all are a dimension of length 1.
    pub(crate) fn new(dims: &[usize], axes: &[usize]) -> Option<Line> {
        let first = axes.first().copied().unwrap_or(dims.len());
        let end = axes.last().map_or(dims.len(), |l| l + 1);
        let product = |d: &[usize]| d.iter().product::<usize>() as i64;
        let line = Line {
            outer: product(&dims[..first]),
            len: product(&dims[first..end]),
            inner: product(&dims[end..]),
        };
        (end - first == axes.len()).then_some(line)
    }

    /// Blocks of up to four neighbours in `inner`.
    fn blocks(&self) -> i64 {
        (self.inner as u64).div_ceil(LANES as u64) as i64
    }

    fn width(&self) -> i64 {
        self.inner.min(LANES)
    }

    /// Element offset of a unit's block: outer index and first inner index. The last block ends with `inner`.
    fn block(&self, b: &mut FunctionBuilder, unit: Value) -> (Value, Value) {
        let outer = b.ins().udiv_imm_u(unit, self.blocks());
        let before = b.ins().imul_imm_s(outer, self.blocks());
        let block = b.ins().isub(unit, before);
        let first = b.ins().imul_imm_s(block, LANES);
        let latest = b.ins().iconst(I64, (self.inner - LANES).max(0));
        (outer, b.ins().umin(first, latest))
    }
}

/// base + elements·4.
fn at(b: &mut FunctionBuilder, base: Value, elements: Value) -> Value {
    let bytes = b.ins().imul_imm_s(elements, SIZE);
    b.ins().iadd(base, bytes)
}

/// Calls `body` with `count` pointers from `p`, `stride` bytes apart.
fn each(
    b: &mut FunctionBuilder,
    p: Value,
    count: i64,
    stride: i64,
    body: impl FnOnce(&mut FunctionBuilder, Value),
) {
    if count > 0 {
        let (zero, count) = (b.ins().iconst(I64, 0), b.ins().iconst(I64, count));
        counted_loop(b, zero, count, |b, i| {
            let bytes = b.ins().imul_imm_s(i, stride);
            let p = b.ins().iadd(p, bytes);
            body(b, p);
        });
    }
}

/// Like [`each`], carrying a value from one call to the next.
fn fold(
    b: &mut FunctionBuilder,
    p: Value,
    (count, stride): (i64, i64),
    initial: Value,
    body: impl FnOnce(&mut FunctionBuilder, Value, Value) -> Value,
) -> Value {
    let carried = b.declare_var(b.func.dfg.value_type(initial));
    b.def_var(carried, initial);
    each(b, p, count, stride, |b, p| {
        let before = b.use_var(carried);
        let after = body(b, before, p);
        b.def_var(carried, after);
    });
    b.use_var(carried)
}

/// The kinds that [`reduce`] has.
pub(crate) fn has_reduce(kind: ReduceKind) -> bool {
    !matches!(kind, ReduceKind::LogSumExp)
}

/// Adds the step of a reduction.
pub(crate) fn reduce(
    cx: &mut Lowering,
    line: Line,
    kind: ReduceKind,
    (from, to): (Location, Location),
    work: Work,
) -> Result<(), CodegenError> {
    if line.inner == 1 && line.outer >= ROWS && i32::try_from(ROWS * line.len * SIZE).is_ok() {
        return reduce_rows(cx, line, kind, (from, to), work);
    }
    let units = line.outer * line.blocks();
    cx.step("reduce", units as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let width = line.width();
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let (outer, first) = line.block(b, unit);
            let row = b.ins().imul_imm_s(outer, line.len * line.inner);
            let element = b.ins().iadd(row, first);
            let p = at(b, source, element);
            let initial = f32x4(b, initial(kind));
            let total = fold(b, p, (line.len, line.inner * SIZE), initial, |b, total, p| {
                let x = load_lanes(b, F32X4, p, 0, width);
                combine(b, kind, total, x)
            });
            let y = finish(b, kind, total, line.len);
            let row = b.ins().imul_imm_s(outer, line.inner);
            let element = b.ins().iadd(row, first);
            let q = at(b, target, element);
            store_lanes(b, y, q, 0, width);
        });
        Ok(())
    })
}

/// Rows that are reduced together: their elements are lanes of two vectors, neither of which waits for the other.
const ROWS: i64 = 2 * LANES;

/// Rows of neighbours, a few at once. The last ones end with the rows, and may overlap those before.
fn reduce_rows(
    cx: &mut Lowering,
    line: Line,
    kind: ReduceKind,
    (from, to): (Location, Location),
    work: Work,
) -> Result<(), CodegenError> {
    let units = (line.outer as u64).div_ceil(ROWS as u64);
    cx.step("reduce", units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let first = b.ins().imul_imm_s(unit, ROWS);
            let latest = b.ins().iconst(I64, line.outer - ROWS);
            let first = b.ins().umin(first, latest);
            let element = b.ins().imul_imm_s(first, line.len);
            let p = at(b, source, element);
            let totals = [(); 2].map(|()| b.declare_var(F32X4));
            for total in totals {
                let initial = f32x4(b, initial(kind));
                b.def_var(total, initial);
            }
            each(b, p, line.len, SIZE, |b, p| {
                for (v, total) in totals.into_iter().enumerate() {
                    let x = load_rows(b, p, v as i64 * LANES, line.len * SIZE);
                    let before = b.use_var(total);
                    let after = combine(b, kind, before, x);
                    b.def_var(total, after);
                }
            });
            let q = at(b, target, first);
            for (v, total) in totals.into_iter().enumerate() {
                let total = b.use_var(total);
                let y = finish(b, kind, total, line.len);
                store_lanes(b, y, q, (v as i64 * VECTOR) as i32, LANES);
            }
        });
        Ok(())
    })
}

/// The elements at `p` of four rows from row `first` on.
fn load_rows(b: &mut FunctionBuilder, p: Value, first: i64, stride: i64) -> Value {
    let mut rows = f32x4(b, 0.0);
    for lane in 0..LANES {
        let x = b.ins().load(F32, MEM, p, ((first + lane) * stride) as i32);
        rows = b.ins().insertlane(rows, x, lane as u8);
    }
    rows
}

fn initial(kind: ReduceKind) -> f32 {
    match kind {
        ReduceKind::Max => f32::NEG_INFINITY,
        ReduceKind::Min => f32::INFINITY,
        ReduceKind::Product => 1.0,
        _ => 0.0,
    }
}

fn combine(b: &mut FunctionBuilder, kind: ReduceKind, total: Value, x: Value) -> Value {
    // A NaN stays: it is kept whatever it is compared with.
    let keep = |b: &mut FunctionBuilder, better: Value| {
        let nan = b.ins().fcmp(FloatCC::Unordered, total, total);
        let keep = b.ins().bor(better, nan);
        let (t, x) = (cast(b, I32X4, total), cast(b, I32X4, x));
        let picked = b.ins().bitselect(keep, t, x);
        cast(b, F32X4, picked)
    };
    match kind {
        ReduceKind::Max => {
            let better = less(b, x, total);
            keep(b, better)
        }
        ReduceKind::Min => {
            let better = less(b, total, x);
            keep(b, better)
        }
        ReduceKind::Product => b.ins().fmul(total, x),
        ReduceKind::SumSquare | ReduceKind::L2 => {
            let square = b.ins().fmul(x, x);
            b.ins().fadd(total, square)
        }
        ReduceKind::L1 => {
            let magnitude = b.ins().fabs(x);
            b.ins().fadd(total, magnitude)
        }
        ReduceKind::Sum | ReduceKind::Mean | ReduceKind::LogSum | ReduceKind::LogSumExp => {
            b.ins().fadd(total, x)
        }
    }
}

fn finish(b: &mut FunctionBuilder, kind: ReduceKind, total: Value, len: i64) -> Value {
    match kind {
        ReduceKind::Mean => {
            let n = f32x4(b, len as f32);
            b.ins().fdiv(total, n)
        }
        ReduceKind::L2 => b.ins().sqrt(total),
        ReduceKind::LogSum => math::ln(b, total),
        _ => total,
    }
}

/// Adds the step of a softmax, or of its logarithm.
pub(crate) fn softmax(
    cx: &mut Lowering,
    line: Line,
    log: bool,
    (from, to): (Location, Location),
    work: Work,
) -> Result<(), CodegenError> {
    if line.len == 0 {
        return Ok(());
    }
    let units = line.outer * line.blocks();
    cx.step("softmax", units as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        counted_loop(&mut e.b, begin, end, |b, unit| {
            if line.inner == 1 {
                let element = b.ins().imul_imm_s(unit, line.len);
                let (p, q) = (at(b, source, element), at(b, target, element));
                softmax_along(b, line.len, log, p, q);
            } else {
                let (outer, first) = line.block(b, unit);
                let row = b.ins().imul_imm_s(outer, line.len * line.inner);
                let element = b.ins().iadd(row, first);
                let (p, q) = (at(b, source, element), at(b, target, element));
                softmax_across(b, line, log, p, q);
            }
        });
        Ok(())
    })
}

/// exp(x − max).
fn shifted_exp(b: &mut FunctionBuilder, x: Value, max: Value) -> Value {
    let x = b.ins().fsub(x, max);
    math::exp(b, x)
}

/// Four neighbours at once, each with its own sum. Neighbouring blocks may overlap, so nothing is kept in the result.
fn softmax_across(b: &mut FunctionBuilder, line: Line, log: bool, p: Value, q: Value) {
    let (width, stride) = (line.width(), line.inner * SIZE);
    let lowest = f32x4(b, f32::NEG_INFINITY);
    let max = fold(b, p, (line.len, stride), lowest, |b, max, p| {
        let x = load_lanes(b, F32X4, p, 0, width);
        larger(b, x, max)
    });
    let zero = f32x4(b, 0.0);
    let sum = fold(b, p, (line.len, stride), zero, |b, sum, p| {
        let x = load_lanes(b, F32X4, p, 0, width);
        let e = shifted_exp(b, x, max);
        b.ins().fadd(sum, e)
    });
    let log_sum = if log { math::ln(b, sum) } else { sum };
    let distance = b.ins().isub(q, p);
    each(b, p, line.len, stride, |b, p| {
        let x = load_lanes(b, F32X4, p, 0, width);
        let y = match log {
            true => {
                let x = b.ins().fsub(x, max);
                b.ins().fsub(x, log_sum)
            }
            false => {
                let e = shifted_exp(b, x, max);
                b.ins().fdiv(e, sum)
            }
        };
        let q = b.ins().iadd(p, distance);
        store_lanes(b, y, q, 0, width);
    });
}

/// One row of neighbours: exponentials four at a time, kept in the result, and their sum one after the other.
fn softmax_along(b: &mut FunctionBuilder, len: i64, log: bool, p: Value, q: Value) {
    let (vectors, rest) = (len / LANES, len % LANES);
    let last = b.ins().iadd_imm_s(p, vectors * VECTOR);
    let distance = b.ins().isub(q, p);
    let max = row_max(b, p, len);

    let zero = b.ins().f32const(0.0);
    let add_lanes = |b: &mut FunctionBuilder, sum: Value, e: Value, count: i64| {
        (0..count as u8).fold(sum, |sum, i| {
            let lane = b.ins().extractlane(e, i);
            b.ins().fadd(sum, lane)
        })
    };
    let exponentials = |b: &mut FunctionBuilder, sum: Value, p: Value, count: i64| {
        let x = load_lanes(b, F32X4, p, 0, count);
        let e = shifted_exp(b, x, max);
        if !log {
            let q = b.ins().iadd(p, distance);
            store_lanes(b, e, q, 0, count);
        }
        add_lanes(b, sum, e, count)
    };
    let sum = fold(b, p, (vectors, VECTOR), zero, |b, sum, p| exponentials(b, sum, p, LANES));
    let sum = if rest > 0 { exponentials(b, sum, last, rest) } else { sum };
    let sum = b.ins().splat(F32X4, sum);
    let log_sum = if log { math::ln(b, sum) } else { sum };

    let finish = |b: &mut FunctionBuilder, p: Value, count: i64| {
        let q = b.ins().iadd(p, distance);
        let y = match log {
            true => {
                let x = load_lanes(b, F32X4, p, 0, count);
                let x = b.ins().fsub(x, max);
                b.ins().fsub(x, log_sum)
            }
            false => {
                let e = load_lanes(b, F32X4, q, 0, count);
                b.ins().fdiv(e, sum)
            }
        };
        store_lanes(b, y, q, 0, count);
    };
    each(b, p, vectors, VECTOR, |b, p| finish(b, p, LANES));
    if rest > 0 {
        finish(b, last, rest);
    }
}

/// The largest element of a row in all lanes. What a NaN makes of it does not matter: the sum is NaN then.
fn row_max(b: &mut FunctionBuilder, p: Value, len: i64) -> Value {
    let lowest = f32x4(b, f32::NEG_INFINITY);
    let mut max = fold(b, p, (len / LANES, VECTOR), lowest, |b, max, p| {
        let x = load(b, F32X4, p, 0);
        larger(b, x, max)
    });
    for i in len - len % LANES..len {
        let x = b.ins().load(F32, MEM, p, (i * SIZE) as i32);
        let x = b.ins().splat(F32X4, x);
        max = larger(b, x, max);
    }
    for distance in [8, 4] {
        let turned = shuffle(b, max, max, std::array::from_fn(|i| (i as u8 + distance) % 16));
        let turned = cast(b, F32X4, turned);
        max = larger(b, max, turned);
    }
    max
}
