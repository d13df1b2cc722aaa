//! The elementwise kernel: result[i] = f(operand₀[i], operand₁[i], …) over an index space, with any stride for each
//! operand and the result.
//!
//! Broadcasts, transposes, slices, concatenations and pads are all strides and offsets of this one loop nest. Dimensions
//! that no operand tells apart are merged; the one that is cheapest to walk becomes the inner loop, in blocks of
//! 16 elements. A block of `k`-byte elements is `k` vectors. Rows of 16 elements or more end with a block that overlaps
//! the one before; shorter rows pass through a buffer on the stack, so that the function is emitted only once.

use super::{
    lanes::Elementwise,
    vector::{self, constant, from_i32, i8x16, load, load_splat, to_i32, vector_type},
    wide,
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Emitter, Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, StackSlotData, StackSlotKind, Type, Value, condcodes::IntCC, types::I64,
};
use cranelift_frontend::{FunctionBuilder, Variable};
use qcc_ir::DType;

/// Elements of a block.
const BLOCK: u64 = 16;

/// Elements of one unit of work where rows are long.
pub(crate) const CHUNK: u64 = 1024;

/// How an operand or the result lies under the index space.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) location: Location,
    /// Bytes from the location to the element at index 0.
    pub(crate) offset: i64,
    pub(crate) dtype: DType,
    /// Bytes between neighbours along each dimension: 0 broadcasts, negative runs backwards.
    pub(crate) strides: Vec<i64>,
}

impl View {
    /// A dense row-major tensor of these dimensions.
    pub(crate) fn dense(location: Location, dtype: DType, dims: &[usize]) -> View {
        let mut stride = dtype.size() as i64;
        let mut strides = vec![0; dims.len()];
        for (s, &d) in strides.iter_mut().zip(dims).rev() {
            *s = stride;
            stride *= d as i64;
        }
        View { location, offset: 0, dtype, strides }
    }

    /// This view of a tensor of shape `from`, broadcast to `dims` by NumPy's rules.
    pub(crate) fn broadcast_to(mut self, from: &[usize], dims: &[usize]) -> View {
        let missing = dims.len() - from.len();
        for (d, (s, &n)) in self.strides.iter_mut().zip(from).enumerate() {
            if n == 1 && dims[missing + d] != 1 {
                *s = 0;
            }
        }
        self.strides.splice(..0, std::iter::repeat_n(0, missing));
        self
    }

    /// One element for each index along `axis`; for none, one element for all.
    pub(crate) fn along(location: Location, dtype: DType, axis: Option<usize>, rank: usize) -> View {
        let mut strides = vec![0; rank];
        if let Some(axis) = axis {
            strides[axis] = dtype.size() as i64;
        }
        View { location, offset: 0, dtype, strides }
    }

    /// The view whose dimension `i` is dimension `perm[i]` of this one.
    pub(crate) fn permuted(&self, perm: &[usize]) -> View {
        View { strides: perm.iter().map(|&p| self.strides[p]).collect(), ..self.clone() }
    }

    /// Whether both views are of the same bytes in the same order.
    pub(crate) fn is_same_place(&self, other: &View) -> bool {
        let start = |v: &View| match v.location {
            Location::Arena(at) => (Location::Arena(0), at as i64 + v.offset),
            location => (location, v.offset),
        };
        start(self) == start(other) && self.dtype == other.dtype && self.strides == other.strides
    }

    /// Bytes of an element.
    pub(crate) fn size(&self) -> i64 {
        self.dtype.size() as i64
    }
}

/// The loop nest: outer dimensions, and a row of `len` elements that is cut into `chunks`.
pub(crate) struct Nest {
    pub(crate) outer: Vec<u64>,
    /// Extents of the row.
    pub(crate) len: u64,
    pub(crate) chunks: u64,
    /// Byte strides of each view (operands, then the result): of the outer dimensions and of the row.
    pub(crate) outer_strides: Vec<Vec<i64>>,
    pub(crate) row_strides: Vec<i64>,
}

impl Nest {
    /// `None` for an empty index space.
    pub(crate) fn new(dims: &[usize], views: &[&View]) -> Option<Nest> {
        let mut merged = merged(dims, views)?;
        if merged.is_empty() {
            merged.push((1, views.iter().map(|v| v.size()).collect()));
        }
        let costs = merged.iter().map(|(n, strides)| row_cost(*n, strides, views));
        let row = costs.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i);
        let (len, row_strides) = merged.remove(row);
        Some(Nest {
            outer: merged.iter().map(|(n, _)| *n).collect(),
            len,
            chunks: (len / CHUNK).max(1),
            outer_strides: (0..views.len()).map(|v| merged.iter().map(|(_, s)| s[v]).collect()).collect(),
            row_strides,
        })
    }

    pub(crate) fn units(&self) -> u64 {
        self.outer.iter().product::<u64>() * self.chunks
    }
}

/// The dimensions of an index space with those merged that no view tells apart, row-major in the last view: extents and
/// each view's byte strides. `None` for an empty space.
pub(crate) fn merged(dims: &[usize], views: &[&View]) -> Option<Vec<(u64, Vec<i64>)>> {
    if dims.contains(&0) {
        return None;
    }
    let strides_of = |d: usize| views.iter().map(|v| v.strides[d]).collect::<Vec<i64>>();
    let mut order: Vec<usize> = (0..dims.len()).filter(|&d| dims[d] != 1).collect();
    // Row-major in the result, so that neighbouring dimensions can merge.
    let result = views[views.len() - 1];
    order.sort_by_key(|&d| std::cmp::Reverse(result.strides[d].abs()));
    let mut merged: Vec<(u64, Vec<i64>)> = Vec::new();
    for d in order {
        let (extent, strides) = (dims[d] as u64, strides_of(d));
        match merged.last_mut() {
            Some((n, s)) if s.iter().zip(&strides).all(|(&s, &t)| s == t * extent as i64) => {
                *n *= extent;
                *s = strides;
            }
            _ => merged.push((extent, strides)),
        }
    }
    Some(merged)
}

/// Rough cycles an element when rows of `n` elements with these strides are walked.
fn row_cost(n: u64, strides: &[i64], views: &[&View]) -> f64 {
    let access: f64 = strides
        .iter()
        .zip(views)
        .map(|(&s, v)| match s {
            0 => 1.0,
            _ if s == v.size() => v.size() as f64,
            _ => 2.0 * BLOCK as f64,
        })
        .sum();
    let blocks = n.div_ceil(BLOCK) as f64;
    let short = if n < BLOCK { 4.0 * n as f64 * views.len() as f64 } else { 0.0 };
    (20.0 + short + blocks * (access + 8.0)) / n as f64
}

/// Merges elements into wider ones where whole rows move, as long as a row keeps a block: the blocks become larger.
fn widen(nest: &mut Nest, views: &mut [View]) {
    let mut size = views[0].size();
    let contiguous = nest.row_strides.iter().all(|&s| s == size);
    while contiguous && size < 8 && nest.len.is_multiple_of(2) && nest.len / 2 >= BLOCK {
        size *= 2;
        nest.len /= 2;
    }
    if contiguous {
        nest.row_strides.fill(size);
        views.iter_mut().for_each(|v| v.dtype = raw(size));
        nest.chunks = (nest.len / CHUNK).max(1);
    }
}

/// A type of this many bytes.
fn raw(size: i64) -> DType {
    match size {
        1 => DType::U8,
        2 => DType::U16,
        4 => DType::S32,
        _ => DType::S64,
    }
}

/// Adds a step that copies a view to another one.
pub(crate) fn copy(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    from: View,
    to: View,
) -> Result<(), CodegenError> {
    let bytes = dims.iter().product::<usize>() as u64 * to.size() as u64;
    let work = Work { bytes_read: bytes, bytes_written: bytes, ..Work::default() };
    let mut views = vec![from, to];
    let Some(mut nest) = Nest::new(dims, &views.iter().collect::<Vec<_>>()) else { return Ok(()) };
    widen(&mut nest, &mut views);
    add_step(cx, kernel, &nest, &views, work, |_, operands| operands[0].clone())
}

/// Adds a step that computes a function of the operands' elements, of at most 32 bits each.
pub(crate) fn elementwise(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    operands: &[View],
    result: &View,
    work: Work,
    function: impl Elementwise,
) -> Result<(), CodegenError> {
    let views: Vec<View> = operands.iter().chain([result]).cloned().collect();
    if wide::elementwise(cx, kernel, dims, &views, work, &function)? {
        return Ok(());
    }
    let Some(nest) = Nest::new(dims, &views.iter().collect::<Vec<_>>()) else { return Ok(()) };
    add_step(cx, kernel, &nest, &views, work, |b, loaded| {
        let lanes: Vec<Vec<Value>> =
            loaded.iter().zip(&views).map(|(block, view)| to_lanes(b, block, view.dtype)).collect();
        let results: Vec<Value> = (0..BLOCK as usize / LANES)
            .map(|v| {
                let operands: Vec<Value> = lanes.iter().map(|x| x[v]).collect();
                function.apply(b, &operands)
            })
            .collect();
        from_lanes(b, &results, result.dtype)
    })
}

/// Adds a step that looks each byte up in a table.
pub(crate) fn lookup(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    operand: View,
    result: &View,
    work: Work,
    table: &[u8; 256],
) -> Result<(), CodegenError> {
    let views = [operand, result.clone()];
    if wide::lookup(cx, kernel, dims, &views, work, table)? {
        return Ok(());
    }
    let Some(nest) = Nest::new(dims, &views.iter().collect::<Vec<_>>()) else { return Ok(()) };
    add_step(cx, kernel, &nest, &views, work, |b, loaded| vec![vector::lookup(b, loaded[0][0], table)])
}

/// Lanes of 32 bits of Cranelift's vectors.
const LANES: usize = 4;

/// A block of elements in lanes of 32 bits.
fn to_lanes(b: &mut FunctionBuilder, block: &[Value], dtype: DType) -> Vec<Value> {
    match dtype {
        DType::F32 | DType::S32 => block.to_vec(),
        DType::Bool => {
            // Any byte but 0 is true.
            let one = i8x16(b, 1);
            let truth = b.ins().umin(block[0], one);
            to_i32(b, &[truth], DType::U8)
        }
        _ => to_i32(b, block, dtype),
    }
}

/// A block of elements from lanes; those of 8 and 16 bits saturate.
fn from_lanes(b: &mut FunctionBuilder, lanes: &[Value], dtype: DType) -> Vec<Value> {
    match dtype {
        DType::F32 | DType::S32 => lanes.to_vec(),
        _ => from_i32(b, lanes, dtype),
    }
}

fn add_step(
    cx: &mut Lowering,
    kernel: &str,
    nest: &Nest,
    views: &[View],
    work: Work,
    function: impl FnOnce(&mut FunctionBuilder, &[Vec<Value>]) -> Vec<Value>,
) -> Result<(), CodegenError> {
    cx.step(kernel, nest.units(), work, |e, ctx, begin, end| {
        let bases: Vec<Value> = views
            .iter()
            .map(|v| {
                let base = e.address(ctx, v.location);
                offset(&mut e.b, base, v.offset)
            })
            .collect();
        let row = Row::new(e, nest, views);
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let blocks = row.start(b, nest, &bases, unit);
            row.walk(b, blocks, function);
        });
        Ok(())
    })
}

pub(crate) fn offset(b: &mut FunctionBuilder, base: Value, bytes: i64) -> Value {
    if bytes == 0 { base } else { b.ins().iadd_imm_s(base, bytes) }
}

/// `for i in begin..end`, which must not be empty.
pub(crate) fn counted_loop(
    b: &mut FunctionBuilder,
    begin: Value,
    end: Value,
    body: impl FnOnce(&mut FunctionBuilder, Value),
) {
    stepped_loop(b, begin, end, |b, i| {
        body(b, i);
        b.ins().iconst(I64, 1)
    });
}

/// The same where the body says by how many to go on.
pub(crate) fn stepped_loop(
    b: &mut FunctionBuilder,
    begin: Value,
    end: Value,
    body: impl FnOnce(&mut FunctionBuilder, Value) -> Value,
) {
    let (head, done) = (b.create_block(), b.create_block());
    let i = b.append_block_param(head, I64);
    b.ins().jump(head, &[begin.into()]);
    b.switch_to_block(head);
    let step = body(b, i);
    let next = b.ins().iadd(i, step);
    let more = b.ins().icmp(IntCC::UnsignedLessThan, next, end);
    b.ins().brif(more, head, &[next.into()], done, &[]);
    b.switch_to_block(done);
}

/// Each base moved to the `index`-th point of a row-major index space of these extents, given each one's strides.
pub(crate) fn located(
    b: &mut FunctionBuilder,
    index: Value,
    extents: &[u64],
    strides: &[Vec<i64>],
    bases: &[Value],
) -> Vec<Value> {
    let (mut rest, mut pointers) = (index, bases.to_vec());
    for (d, &extent) in extents.iter().enumerate().rev() {
        let index = if d == 0 {
            rest
        } else {
            let above = b.ins().udiv_imm_u(rest, extent as i64);
            let first = b.ins().imul_imm_s(above, extent as i64);
            let index = b.ins().isub(rest, first);
            rest = above;
            index
        };
        for (p, own) in pointers.iter_mut().zip(strides) {
            *p = advanced(b, *p, index, own[d]);
        }
    }
    pointers
}

/// The walk along a row.
struct Row<'a> {
    views: &'a [View],
    len: u64,
    strides: &'a [i64],
    /// The address of each view's next block.
    pointers: Vec<Variable>,
    /// For rows shorter than a block, where each view that is not broadcast keeps its elements.
    slots: Vec<Option<Value>>,
}

/// How many blocks a row has: `count` from the start, and a last one that begins `back` elements before its place.
enum Blocks {
    /// Fewer elements than a block.
    Short,
    /// A number known when emitting, without a remainder.
    Whole(u64),
    /// Elements, at least a block.
    Elements(Value),
}

impl<'a> Row<'a> {
    fn new(e: &mut Emitter, nest: &'a Nest, views: &'a [View]) -> Row<'a> {
        let b = &mut e.b;
        let pointers = views.iter().map(|_| b.declare_var(I64)).collect();
        let slots = views.iter().zip(&nest.row_strides).map(|(v, &stride)| {
            (nest.len < BLOCK && stride != 0).then(|| {
                let bytes = BLOCK as u32 * v.size() as u32;
                let slot = StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 4);
                let slot = b.create_sized_stack_slot(slot);
                b.ins().stack_addr(I64, slot, 0)
            })
        });
        Row { views, len: nest.len, strides: &nest.row_strides, slots: slots.collect(), pointers }
    }

    /// Points at the first elements of a unit; the row's blocks.
    fn start(&self, b: &mut FunctionBuilder, nest: &Nest, bases: &[Value], unit: Value) -> Blocks {
        let (mut row, mut chunk) = (unit, None);
        if nest.chunks > 1 {
            row = b.ins().udiv_imm_u(unit, nest.chunks as i64);
            let first = b.ins().imul_imm_s(row, nest.chunks as i64);
            chunk = Some(b.ins().isub(unit, first));
        }
        let mut pointers = located(b, row, &nest.outer, &nest.outer_strides, bases);
        if let Some(chunk) = chunk {
            for (v, p) in pointers.iter_mut().enumerate() {
                *p = advanced(b, *p, chunk, nest.row_strides[v] * CHUNK as i64);
            }
        }
        for (variable, p) in self.pointers.iter().zip(pointers) {
            b.def_var(*variable, p);
        }
        match chunk {
            _ if nest.len < BLOCK => Blocks::Short,
            None if nest.len.is_multiple_of(BLOCK) => Blocks::Whole(nest.len / BLOCK),
            None => Blocks::Elements(b.ins().iconst(I64, nest.len as i64)),
            Some(_) if nest.len.is_multiple_of(CHUNK) => Blocks::Whole(CHUNK / BLOCK),
            Some(chunk) => {
                // The last chunk of a row takes what is left: at least a chunk, less than two.
                let last = b.ins().icmp_imm_s(IntCC::Equal, chunk, nest.chunks as i64 - 1);
                let rest = b.ins().iconst(I64, (nest.len - (nest.chunks - 1) * CHUNK) as i64);
                let whole = b.ins().iconst(I64, CHUNK as i64);
                Blocks::Elements(b.ins().select(last, rest, whole))
            }
        }
    }

    fn walk(
        &self,
        b: &mut FunctionBuilder,
        blocks: Blocks,
        function: impl FnOnce(&mut FunctionBuilder, &[Vec<Value>]) -> Vec<Value>,
    ) {
        match blocks {
            Blocks::Short => self.short(b, function),
            Blocks::Whole(n) => {
                let zero = b.ins().iconst(I64, 0);
                let n = b.ins().iconst(I64, n as i64);
                counted_loop(b, zero, n, |b, _| {
                    self.block(b, function);
                    self.advance(b, None);
                });
            }
            Blocks::Elements(len) => self.overlapping(b, len, function),
        }
    }

    /// Blocks while 16 elements are left, then one that ends with the row.
    fn overlapping(
        &self,
        b: &mut FunctionBuilder,
        len: Value,
        function: impl FnOnce(&mut FunctionBuilder, &[Vec<Value>]) -> Vec<Value>,
    ) {
        let (head, step, last, done) =
            (b.create_block(), b.create_block(), b.create_block(), b.create_block());
        // `left` is negative once the last block was moved back by as much.
        let left = b.append_block_param(head, I64);
        b.ins().jump(head, &[len.into()]);
        b.switch_to_block(head);
        self.block(b, function);
        let after = b.ins().iadd_imm_s(left, -(BLOCK as i64));
        let more = b.ins().icmp_imm_s(IntCC::SignedGreaterThan, after, 0);
        b.ins().brif(more, step, &[], done, &[]);
        b.switch_to_block(step);
        let whole = b.ins().icmp_imm_s(IntCC::SignedGreaterThanOrEqual, after, BLOCK as i64);
        self.advance(b, None);
        b.ins().brif(whole, head, &[after.into()], last, &[]);
        b.switch_to_block(last);
        let back = b.ins().iadd_imm_s(after, -(BLOCK as i64));
        self.advance(b, Some(back));
        let block = b.ins().iconst(I64, BLOCK as i64);
        b.ins().jump(head, &[block.into()]);
        b.switch_to_block(done);
    }

    /// Moves all views on by a block, or by as many elements.
    fn advance(&self, b: &mut FunctionBuilder, elements: Option<Value>) {
        for (&variable, &stride) in self.pointers.iter().zip(self.strides) {
            if stride == 0 {
                continue;
            }
            let p = b.use_var(variable);
            let p = match elements {
                None => b.ins().iadd_imm_s(p, stride * BLOCK as i64),
                Some(n) => advanced(b, p, n, stride),
            };
            b.def_var(variable, p);
        }
    }

    /// Loads, computes and stores the block at the pointers.
    fn block(
        &self,
        b: &mut FunctionBuilder,
        function: impl FnOnce(&mut FunctionBuilder, &[Vec<Value>]) -> Vec<Value>,
    ) {
        let (result, operands) = (self.views.len() - 1, &self.views[..self.views.len() - 1]);
        let mut loaded = Vec::with_capacity(operands.len());
        for (i, view) in operands.iter().enumerate() {
            let pointer = b.use_var(self.pointers[i]);
            loaded.push(load_block(b, vector_type(view.dtype), pointer, self.stride(i)));
        }
        let values = function(b, &loaded);
        let pointer = b.use_var(self.pointers[result]);
        store_block(b, &values, pointer, self.stride(result));
    }

    /// The stride that a block sees: on the stack elements are dense.
    fn stride(&self, view: usize) -> i64 {
        match self.slots[view] {
            Some(_) => self.views[view].size(),
            None => self.strides[view],
        }
    }

    /// A row shorter than a block: its elements move to the stack, one block is computed there, its result moves back.
    fn short(
        &self,
        b: &mut FunctionBuilder,
        function: impl FnOnce(&mut FunctionBuilder, &[Vec<Value>]) -> Vec<Value>,
    ) {
        let result = self.views.len() - 1;
        let target = b.use_var(self.pointers[result]);
        for v in 0..result {
            if let Some(slot) = self.slots[v] {
                let source = b.use_var(self.pointers[v]);
                self.move_row(b, v, (source, self.strides[v]), (slot, self.views[v].size()));
                b.def_var(self.pointers[v], slot);
            }
        }
        // Rows are not empty and the result is never broadcast, so it has a slot.
        let slot = self.slots[result].unwrap_or(target);
        b.def_var(self.pointers[result], slot);
        self.block(b, function);
        self.move_row(b, result, (slot, self.views[result].size()), (target, self.strides[result]));
    }

    fn move_row(&self, b: &mut FunctionBuilder, view: usize, from: (Value, i64), to: (Value, i64)) {
        let lane = vector_type(self.views[view].dtype).lane_type();
        for i in 0..self.len as i64 {
            let (p, at) = place(b, from.0, i * from.1);
            let x = b.ins().load(lane, MEM, p, at);
            let (p, at) = place(b, to.0, i * to.1);
            b.ins().store(MEM, x, p, at);
        }
    }
}

/// p + index·stride.
pub(crate) fn advanced(b: &mut FunctionBuilder, p: Value, index: Value, stride: i64) -> Value {
    match stride {
        0 => p,
        1 => b.ins().iadd(p, index),
        _ => {
            let bytes = b.ins().imul_imm_s(index, stride);
            b.ins().iadd(p, bytes)
        }
    }
}

/// A pointer and the displacement from it that reach `bytes` behind `pointer`: an address holds 32 bits of them.
fn place(b: &mut FunctionBuilder, pointer: Value, bytes: i64) -> (Value, i32) {
    match i32::try_from(bytes) {
        Ok(displacement) => (pointer, displacement),
        Err(_) => (b.ins().iadd_imm_s(pointer, bytes), 0),
    }
}

/// 16 elements as vectors of type `ty`.
fn load_block(b: &mut FunctionBuilder, ty: Type, pointer: Value, stride: i64) -> Vec<Value> {
    let (size, vectors) = (i64::from(ty.lane_bits() / 8), ty.lane_bits() / 8);
    if stride == 0 {
        return vec![load_splat(b, ty, pointer); vectors as usize];
    }
    let lanes = i64::from(ty.lane_count());
    (0..i64::from(vectors))
        .map(|v| {
            if stride == size {
                return load(b, ty, pointer, (v * 16) as i32);
            }
            let mut vector = constant(b, ty, &[0; 16]);
            for i in 0..lanes {
                let (p, at) = place(b, pointer, (v * lanes + i) * stride);
                let x = b.ins().load(ty.lane_type(), MEM, p, at);
                vector = b.ins().insertlane(vector, x, i as u8);
            }
            vector
        })
        .collect()
}

/// Stores the vectors of 16 elements.
fn store_block(b: &mut FunctionBuilder, values: &[Value], pointer: Value, stride: i64) {
    for (v, &vector) in values.iter().enumerate() {
        let ty = b.func.dfg.value_type(vector);
        let (size, lanes) = (i64::from(ty.lane_bits() / 8), i64::from(ty.lane_count()));
        if stride == size {
            b.ins().store(MEM, vector, pointer, (v * 16) as i32);
            continue;
        }
        for i in 0..lanes {
            let x = b.ins().extractlane(vector, i as u8);
            let (p, at) = place(b, pointer, (v as i64 * lanes + i) * stride);
            b.ins().store(MEM, x, p, at);
        }
    }
}
