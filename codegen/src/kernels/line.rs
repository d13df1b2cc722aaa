//! Reductions and softmax of f32 along one dimension of `[outer, len, inner]`.
//!
//! Totals are made in the order of [`qcc_ir::numerics::total`], whatever the tier and the threads: eight partial totals, which
//! are the lanes of two vectors where `inner` is 1, and else of eight. So results equal the interpreter's bit for bit.

use super::{
    map::counted_loop,
    math,
    vector::{cast, f32x4, larger, less, load, load_filled, load_lanes, shuffle, store_lanes},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, StackSlotData, StackSlotKind, Value,
    condcodes::FloatCC,
    types::{F32, F32X4, I32X4, I64},
};
use cranelift_frontend::{FunctionBuilder, Variable};
use qcc_ir::{numerics::PARTIAL_TOTALS, ops::ReduceKind};

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

/// Calls `body` with `count` pointers from `p`, `stride` bytes apart, and with how many came before each.
pub(super) fn each(
    b: &mut FunctionBuilder,
    p: Value,
    count: i64,
    stride: i64,
    body: impl FnOnce(&mut FunctionBuilder, Value, Value),
) {
    if count > 0 {
        let (zero, count) = (b.ins().iconst(I64, 0), b.ins().iconst(I64, count));
        counted_loop(b, zero, count, |b, i| {
            let bytes = b.ins().imul_imm_s(i, stride);
            let p = b.ins().iadd(p, bytes);
            body(b, p, i);
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
    each(b, p, count, stride, |b, p, _| {
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
    if line.inner == 1 {
        return reduce_rows(cx, line, kind, (from, to), work);
    }
    let units = line.outer * line.blocks();
    cx.step("reduce", units as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let width = line.width();
        let totals = Totals::new(&mut e.b, PARTIAL_TOTALS);
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let (outer, first) = line.block(b, unit);
            let row = b.ins().imul_imm_s(outer, line.len * line.inner);
            let element = b.ins().iadd(row, first);
            let p = at(b, source, element);
            totals.start(b, kind);
            each(b, p, line.len, line.inner * SIZE, |b, p, i| {
                let x = load_lanes(b, F32X4, p, 0, width);
                totals.take(b, kind, i, x);
            });
            let total = totals.total(b, kind);
            let y = finish(b, kind, total, line.len);
            let row = b.ins().imul_imm_s(outer, line.inner);
            let element = b.ins().iadd(row, first);
            let q = at(b, target, element);
            store_lanes(b, y, q, 0, width);
        });
        Ok(())
    })
}

/// Partial totals in memory, a few vectors: lines take turns at them, so none waits for its own.
struct Totals {
    address: Value,
    vectors: usize,
}

impl Totals {
    fn new(b: &mut FunctionBuilder, vectors: usize) -> Totals {
        let bytes = (vectors as i64 * VECTOR) as u32;
        let slot = b.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 4));
        Totals { address: b.ins().stack_addr(I64, slot, 0), vectors }
    }

    fn start(&self, b: &mut FunctionBuilder, kind: ReduceKind) {
        let initial = f32x4(b, initial(kind));
        for v in 0..self.vectors {
            b.ins().store(MEM, initial, self.address, (v as i64 * VECTOR) as i32);
        }
    }

    /// Takes in the `i`-th vector of a line.
    fn take(&self, b: &mut FunctionBuilder, kind: ReduceKind, i: Value, x: Value) {
        let turn = b.ins().band_imm_s(i, self.vectors as i64 - 1);
        let bytes = b.ins().imul_imm_s(turn, VECTOR);
        let place = b.ins().iadd(self.address, bytes);
        let before = load(b, F32X4, place, 0);
        let after = take(b, kind, before, x);
        b.ins().store(MEM, after, place, 0);
    }

    /// What they come to, lane by lane.
    fn total(&self, b: &mut FunctionBuilder, kind: ReduceKind) -> Value {
        let t = (0..self.vectors).map(|v| load(b, F32X4, self.address, (v as i64 * VECTOR) as i32));
        let t: Vec<Value> = t.collect();
        combined(b, kind, t)
    }
}

/// The total of partial ones, lane by lane: halves are combined.
fn combined(b: &mut FunctionBuilder, kind: ReduceKind, mut t: Vec<Value>) -> Value {
    while t.len() > 1 {
        let half = t.split_off(t.len() / 2);
        t = t.into_iter().zip(half).map(|(x, y)| join(b, kind, x, y)).collect();
    }
    t[0]
}

/// What four lanes come to, in all lanes.
pub(super) fn across_lanes(
    b: &mut FunctionBuilder,
    t: Value,
    join: impl Fn(&mut FunctionBuilder, Value, Value) -> Value,
) -> Value {
    [8, 4].into_iter().fold(t, |t, distance| {
        let other = shuffle(b, t, t, std::array::from_fn(|i| (i as u8 + distance) % 16));
        let other = cast(b, F32X4, other);
        join(b, t, other)
    })
}

/// Rows that are reduced together, so that none waits for its own additions.
const ROWS: i64 = 4;

/// Rows of neighbours, a few at once. The last ones end with the rows, and may overlap those before.
fn reduce_rows(
    cx: &mut Lowering,
    line: Line,
    kind: ReduceKind,
    (from, to): (Location, Location),
    work: Work,
) -> Result<(), CodegenError> {
    let row = line.len * SIZE;
    let rows = if line.outer >= ROWS && i32::try_from(ROWS * row).is_ok() { ROWS } else { 1 };
    let units = (line.outer as u64).div_ceil(rows as u64);
    let group = VECTORS as i64 * LANES;
    let (groups, rest) = (line.len / group, line.len % group);
    cx.step("reduce", units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let first = b.ins().imul_imm_s(unit, rows);
            let latest = b.ins().iconst(I64, line.outer - rows);
            let first = b.ins().umin(first, latest);
            let element = b.ins().imul_imm_s(first, line.len);
            let p = at(b, source, element);
            let initial = f32x4(b, initial(kind));
            let totals: Vec<[Variable; VECTORS]> =
                (0..rows).map(|_| [(); VECTORS].map(|()| b.declare_var(F32X4))).collect();
            totals.as_flattened().iter().for_each(|&t| b.def_var(t, initial));
            let add = |b: &mut FunctionBuilder, p: Value, count: i64| {
                for (r, totals) in totals.iter().enumerate() {
                    for (v, &total) in totals.iter().enumerate() {
                        let lanes = (count - v as i64 * LANES).clamp(0, LANES);
                        if lanes > 0 {
                            let place = (r as i64 * row + v as i64 * VECTOR) as i32;
                            let x = load_filled(b, initial, p, place, lanes);
                            let before = b.use_var(total);
                            let after = take(b, kind, before, x);
                            b.def_var(total, after);
                        }
                    }
                }
            };
            each(b, p, groups, group * SIZE, |b, p, _| add(b, p, group));
            let p = b.ins().iadd_imm_s(p, groups * group * SIZE);
            add(b, p, rest);
            let q = at(b, target, first);
            for (r, totals) in totals.iter().enumerate() {
                let t = totals.iter().map(|&t| b.use_var(t)).collect();
                let t = combined(b, kind, t);
                let t = across_lanes(b, t, |b, x, y| join(b, kind, x, y));
                let y = finish(b, kind, t, line.len);
                store_lanes(b, y, q, (r as i64 * SIZE) as i32, 1);
            }
        });
        Ok(())
    })
}

/// Vectors of the partial totals of neighbours.
const VECTORS: usize = PARTIAL_TOTALS / LANES as usize;

/// What partial totals start from. To take it in again changes none.
fn initial(kind: ReduceKind) -> f32 {
    match kind {
        ReduceKind::Max => f32::NEG_INFINITY,
        ReduceKind::Min => f32::INFINITY,
        ReduceKind::Product => 1.0,
        _ => 0.0,
    }
}

/// A partial total that takes in elements.
fn take(b: &mut FunctionBuilder, kind: ReduceKind, total: Value, x: Value) -> Value {
    let x = match kind {
        ReduceKind::SumSquare | ReduceKind::L2 => b.ins().fmul(x, x),
        ReduceKind::L1 => b.ins().fabs(x),
        _ => x,
    };
    join(b, kind, total, x)
}

/// One total of two.
fn join(b: &mut FunctionBuilder, kind: ReduceKind, total: Value, x: Value) -> Value {
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
        _ => b.ins().fadd(total, x),
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
        let totals = Totals::new(&mut e.b, if line.inner == 1 { VECTORS } else { PARTIAL_TOTALS });
        counted_loop(&mut e.b, begin, end, |b, unit| {
            if line.inner == 1 {
                let element = b.ins().imul_imm_s(unit, line.len);
                let (p, q) = (at(b, source, element), at(b, target, element));
                softmax_along(b, &totals, line.len, log, (p, q));
            } else {
                let (outer, first) = line.block(b, unit);
                let row = b.ins().imul_imm_s(outer, line.len * line.inner);
                let element = b.ins().iadd(row, first);
                let (p, q) = (at(b, source, element), at(b, target, element));
                softmax_across(b, &totals, line, log, (p, q));
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
fn softmax_across(b: &mut FunctionBuilder, totals: &Totals, line: Line, log: bool, (p, q): (Value, Value)) {
    let (width, stride) = (line.width(), line.inner * SIZE);
    let lowest = f32x4(b, f32::NEG_INFINITY);
    let max = fold(b, p, (line.len, stride), lowest, |b, max, p| {
        let x = load_lanes(b, F32X4, p, 0, width);
        larger(b, x, max)
    });
    totals.start(b, ReduceKind::Sum);
    each(b, p, line.len, stride, |b, p, i| {
        let x = load_lanes(b, F32X4, p, 0, width);
        let e = shifted_exp(b, x, max);
        totals.take(b, ReduceKind::Sum, i, e);
    });
    let sum = totals.total(b, ReduceKind::Sum);
    let log_sum = if log { math::ln(b, sum) } else { sum };
    let distance = b.ins().isub(q, p);
    each(b, p, line.len, stride, |b, p, _| {
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

/// One row of neighbours: exponentials four at a time, kept in the result.
fn softmax_along(b: &mut FunctionBuilder, totals: &Totals, len: i64, log: bool, (p, q): (Value, Value)) {
    let (vectors, rest) = (len / LANES, len % LANES);
    let last = b.ins().iadd_imm_s(p, vectors * VECTOR);
    let distance = b.ins().isub(q, p);
    let max = row_max(b, p, len);

    // Lanes that a row has not stay 0: e^−∞.
    let lowest = f32x4(b, f32::NEG_INFINITY);
    let exponentials = |b: &mut FunctionBuilder, p: Value, i: Value, count: i64| {
        let x = load_filled(b, lowest, p, 0, count);
        let e = shifted_exp(b, x, max);
        if !log {
            let q = b.ins().iadd(p, distance);
            store_lanes(b, e, q, 0, count);
        }
        totals.take(b, ReduceKind::Sum, i, e);
    };
    totals.start(b, ReduceKind::Sum);
    each(b, p, vectors, VECTOR, |b, p, i| exponentials(b, p, i, LANES));
    if rest > 0 {
        let i = b.ins().iconst(I64, vectors);
        exponentials(b, last, i, rest);
    }
    let sum = totals.total(b, ReduceKind::Sum);
    let sum = across_lanes(b, sum, |b, x, y| b.ins().fadd(x, y));
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
    each(b, p, vectors, VECTOR, |b, p, _| finish(b, p, LANES));
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
    across_lanes(b, max, larger)
}
