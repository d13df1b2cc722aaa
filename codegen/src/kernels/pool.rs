//! Windows over channels-last tensors: maxima and sums, vectorised over channels.
//!
//! A unit is one group of up to four vectors of channels of one result pixel. The taps that lie in the input are a
//! rectangle whose corners are computed for each pixel; the padding is never read. A last group of channels that is not
//! full overlaps the one before.

use super::{
    map::counted_loop,
    vector::{load_lanes, store_lanes},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{InstBuilder, Type, Value, condcodes::IntCC, types::I64};
use cranelift_frontend::{FunctionBuilder, Variable};

/// One spatial dimension of a pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Axis {
    pub(crate) input: i64,
    pub(crate) output: i64,
    pub(crate) kernel: i64,
    pub(crate) stride: i64,
    pub(crate) dilation: i64,
    pub(crate) pad: i64,
}

impl Axis {
    /// A dimension that is not there.
    pub(crate) const NONE: Axis = Axis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad: 0 };

    fn is_always_inside(&self) -> bool {
        let last = (self.output - 1) * self.stride + (self.kernel - 1) * self.dilation;
        self.pad == 0 && last < self.input
    }
}

/// Bytes between neighbours of channels-last images, whose channels follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pitch {
    pub(crate) image: i64,
    pub(crate) row: i64,
    pub(crate) pixel: i64,
}

/// Sizes of a pool, of a batch of channels-last images.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) batch: i64,
    pub(crate) y: Axis,
    pub(crate) x: Axis,
    pub(crate) channels: i64,
    /// How the operand lies.
    pub(crate) from: Pitch,
    /// How the result lies.
    pub(crate) to: Pitch,
}

/// What is made of a window, vector by vector of channels.
pub(crate) trait Reducer {
    /// Vector type of the operand and the result.
    fn ty(&self) -> Type;
    /// Vectors of channels that are reduced together; fewer where each has many accumulators.
    fn vectors(&self) -> i64 {
        4
    }
    /// Accumulators of one vector of channels before the first tap.
    fn init(&self, b: &mut FunctionBuilder) -> Vec<Value>;
    /// The accumulators with one more tap.
    fn add(&self, b: &mut FunctionBuilder, accumulators: &[Value], x: Value) -> Vec<Value>;
    /// The result; `constants` points at this pixel's entry of [`Constants`].
    fn finish(&self, b: &mut FunctionBuilder, accumulators: &[Value], constants: Value) -> Value;
}

/// Constants that depend on where a window lies over the border: an entry of bytes for each pair of classes of rows and
/// columns. Nearly all pools have one class or three.
pub(crate) struct Constants {
    /// Class of each row of the result.
    pub(crate) rows: Vec<u16>,
    /// Class of each column of the result.
    pub(crate) columns: Vec<u16>,
    /// Number of classes of columns.
    pub(crate) column_classes: usize,
    /// Entries of equal size, by row class and column class.
    pub(crate) entries: Vec<Vec<u8>>,
}

/// Adds the step of a pool.
pub(crate) fn pool(
    cx: &mut Lowering,
    kernel: &str,
    geometry: &Geometry,
    (from, to): (Location, Location),
    reducer: &dyn Reducer,
    constants: &Constants,
    work: Work,
) -> Result<(), CodegenError> {
    let Geometry { batch, y, x, channels, from: source_pitch, to: target_pitch } = *geometry;
    let ty = reducer.ty();
    let (size, lanes) = (i64::from(ty.lane_bits() / 8), i64::from(ty.lane_count()));
    let vectors = (channels / lanes).clamp(1, reducer.vectors());
    let groups = (channels as u64).div_ceil((vectors * lanes) as u64) as i64;
    let bytes = channels * size;
    let units = batch * y.output * x.output * groups;
    let tables = Tables::new(cx, constants)?;

    cx.step(kernel, units as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let table = tables.map(|t| t.addresses(e, ctx));
        let b = &mut e.b;
        counted_loop(b, begin, end, |b, unit| {
            let (at, group) = split(b, unit, groups);
            let (row, ox) = split(b, at, x.output);
            let (image, oy) = split(b, row, y.output);
            let (y_start, y_taps) = taps(b, &y, oy);
            let (x_start, x_taps) = taps(b, &x, ox);
            // Channels of this group: the last one ends with the pixel.
            let first = b.ins().imul_imm_s(group, vectors * lanes * size);
            let latest = b.ins().iconst(I64, (bytes - vectors * lanes * size).max(0));
            let channel = b.ins().umin(first, latest);

            let p = affine(b, source, image, source_pitch.image);
            let p = affine(b, p, y_start, source_pitch.row);
            let p = affine(b, p, x_start, source_pitch.pixel);
            let p = b.ins().iadd(p, channel);
            let count = channels.min(lanes);
            let accumulators = walk(
                b,
                reducer,
                vectors,
                p,
                (y_taps, y.dilation * source_pitch.row),
                |b, v, p| load_lanes(b, ty, p, (v * 16) as i32, count),
                (x_taps, x.dilation * source_pitch.pixel),
            );

            let entry = match &table {
                None => source,
                Some(t) => t.entry(b, oy, ox),
            };
            let q = affine(b, target, image, target_pitch.image);
            let q = affine(b, q, oy, target_pitch.row);
            let q = affine(b, q, ox, target_pitch.pixel);
            let q = b.ins().iadd(q, channel);
            for (v, own) in accumulators.iter().enumerate() {
                let y = reducer.finish(b, own, entry);
                store_lanes(b, y, q, (v * 16) as i32, count);
            }
        });
        Ok(())
    })
}

/// unit / n and unit % n.
pub(crate) fn split(b: &mut FunctionBuilder, unit: Value, n: i64) -> (Value, Value) {
    if n == 1 {
        let zero = b.ins().iconst(I64, 0);
        return (unit, zero);
    }
    let quotient = b.ins().udiv_imm_u(unit, n);
    let whole = b.ins().imul_imm_s(quotient, n);
    (quotient, b.ins().isub(unit, whole))
}

/// base + index·stride.
pub(crate) fn affine(b: &mut FunctionBuilder, base: Value, index: Value, stride: i64) -> Value {
    let bytes = b.ins().imul_imm_s(index, stride);
    b.ins().iadd(base, bytes)
}

/// The index of the first tap in the input, and how many there are (0 or less for none).
pub(crate) fn taps(b: &mut FunctionBuilder, axis: &Axis, position: Value) -> (Value, Value) {
    let start = b.ins().imul_imm_s(position, axis.stride);
    if axis.is_always_inside() {
        return (start, b.ins().iconst(I64, axis.kernel));
    }
    let start = b.ins().iadd_imm_s(start, -axis.pad);
    let zero = b.ins().iconst(I64, 0);
    let skip = |b: &mut FunctionBuilder, distance: Value| {
        let distance = b.ins().smax(distance, zero);
        match axis.dilation {
            1 => distance,
            d => {
                let up = b.ins().iadd_imm_s(distance, d - 1);
                b.ins().udiv_imm_u(up, d)
            }
        }
    };
    let before = b.ins().ineg(start);
    let first = skip(b, before);
    let input = b.ins().iconst(I64, axis.input);
    let room = b.ins().isub(input, start);
    let end = skip(b, room);
    let kernel = b.ins().iconst(I64, axis.kernel);
    let end = b.ins().smin(end, kernel);
    let count = b.ins().isub(end, first);
    (affine(b, start, first, axis.dilation), count)
}

/// Accumulates the taps of a rectangle; the accumulators of each vector.
fn walk(
    b: &mut FunctionBuilder,
    reducer: &dyn Reducer,
    vectors: i64,
    start: Value,
    (rows, row_stride): (Value, i64),
    load: impl Fn(&mut FunctionBuilder, i64, Value) -> Value,
    (columns, column_stride): (Value, i64),
) -> Vec<Vec<Value>> {
    let initial: Vec<Vec<Value>> = (0..vectors).map(|_| reducer.init(b)).collect();
    let variables: Vec<Vec<Variable>> = initial
        .iter()
        .map(|own| {
            own.iter()
                .map(|&v| {
                    let variable = b.declare_var(b.func.dfg.value_type(v));
                    b.def_var(variable, v);
                    variable
                })
                .collect()
        })
        .collect();
    strided_loop(b, start, rows, row_stride, |b, row| {
        strided_loop(b, row, columns, column_stride, |b, p| {
            for (v, own) in variables.iter().enumerate() {
                let x = load(b, v as i64, p);
                let before: Vec<Value> = own.iter().map(|&a| b.use_var(a)).collect();
                let after = reducer.add(b, &before, x);
                own.iter().zip(after).for_each(|(&a, value)| b.def_var(a, value));
            }
        });
    });
    variables.iter().map(|own| own.iter().map(|&a| b.use_var(a)).collect()).collect()
}

/// Calls `body` with `count` pointers, `stride` bytes apart; not at all where `count` is 0 or less.
fn strided_loop(
    b: &mut FunctionBuilder,
    start: Value,
    count: Value,
    stride: i64,
    body: impl FnOnce(&mut FunctionBuilder, Value),
) {
    let (head, inside, done) = (b.create_block(), b.create_block(), b.create_block());
    let (p, left) = (b.append_block_param(head, I64), b.append_block_param(head, I64));
    b.ins().jump(head, &[start.into(), count.into()]);
    b.switch_to_block(head);
    let more = b.ins().icmp_imm_s(IntCC::SignedGreaterThan, left, 0);
    b.ins().brif(more, inside, &[], done, &[]);
    b.switch_to_block(inside);
    body(b, p);
    let next = b.ins().iadd_imm_s(p, stride);
    let left = b.ins().iadd_imm_s(left, -1);
    b.ins().jump(head, &[next.into(), left.into()]);
    b.switch_to_block(done);
}

/// [`Constants`] in the weights.
#[derive(Clone, Copy)]
pub(crate) struct Tables<T> {
    rows: Option<T>,
    columns: Option<T>,
    entries: T,
    entry_bytes: i64,
    column_classes: i64,
}

impl Tables<Location> {
    /// `None` where there are no entries.
    pub(crate) fn new(
        cx: &mut Lowering,
        constants: &Constants,
    ) -> Result<Option<Tables<Location>>, CodegenError> {
        let Some(entry) = constants.entries.first() else { return Ok(None) };
        let mut classes = |of: &[u16]| -> Result<Option<Location>, CodegenError> {
            if of.iter().all(|&c| c == 0) {
                return Ok(None);
            }
            let bytes: Vec<u8> = of.iter().flat_map(|c| c.to_le_bytes()).collect();
            Ok(Some(Location::Weights(cx.weights(&bytes, 2)?)))
        };
        let (rows, columns) = (classes(&constants.rows)?, classes(&constants.columns)?);
        Ok(Some(Tables {
            rows,
            columns,
            entries: Location::Weights(cx.weights(&constants.entries.concat(), 16)?),
            entry_bytes: entry.len() as i64,
            column_classes: constants.column_classes as i64,
        }))
    }

    pub(crate) fn addresses(&self, e: &mut crate::module::Emitter, ctx: Value) -> Tables<Value> {
        Tables {
            rows: self.rows.map(|at| e.address(ctx, at)),
            columns: self.columns.map(|at| e.address(ctx, at)),
            entries: e.address(ctx, self.entries),
            entry_bytes: self.entry_bytes,
            column_classes: self.column_classes,
        }
    }
}

impl Tables<Value> {
    /// The address of the entry of a pixel.
    pub(crate) fn entry(&self, b: &mut FunctionBuilder, row: Value, column: Value) -> Value {
        let class = |b: &mut FunctionBuilder, table: Value, index: Value| {
            let at = affine(b, table, index, 2);
            b.ins().uload16(I64, MEM, at, 0)
        };
        let mut p = self.entries;
        if let Some(rows) = self.rows {
            let class = class(b, rows, row);
            p = affine(b, p, class, self.entry_bytes * self.column_classes);
        }
        if let Some(columns) = self.columns {
            let class = class(b, columns, column);
            p = affine(b, p, class, self.entry_bytes);
        }
        p
    }
}
