//! Rows whose elements follow each other, in all operands and in the result: the frame of the wide elementwise kernels.
//!
//! A function walks over rows that are equally far apart; Cranelift's step calls it for as many as it can. The last
//! vector of a row ends with it and overlaps the one before.

use super::{define, width};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Width},
    kernels::map::{self, Nest, View},
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{InstBuilder, StackSlotData, StackSlotKind, Value, condcodes::IntCC, types::I64};
use cranelift_frontend::FunctionBuilder;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi,
};

/// Pointers to the operands' rows and the result's; those from [`SAVED`] on are the caller's.
const POINTERS: [AsmRegister64; 10] = [r8, r9, r10, r11, rbx, rbp, r12, r13, r14, r15];
const SAVED: usize = 4;

/// Vectors of constants.
pub(super) const CONSTANTS: AsmRegister64 = rdx;

/// What is done with a vector of elements.
pub(super) trait Body: Send + 'static {
    /// Elements at a time.
    fn lanes(&self) -> usize;

    /// The vectors that [`CONSTANTS`] points at.
    fn constants(&self) -> Vec<u8>;

    /// Emits what is done once. Overwrites eax and edi at will.
    fn begin(&self, asm: &mut Assembler) -> Emit;

    /// Emits it for elements at these places, the result's last. Overwrites edi at will.
    fn vector(&self, asm: &mut Assembler, at: &[AsmMemoryOperand]) -> Emit;
}

/// Adds the step of rows, operands and result last; `false` where they are none for wide vectors.
///
/// `body` gets the vectors' width, the elements of a row, and which views move along it; others have one element for all
/// of it.
pub(super) fn rows<B: Body>(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    views: &[View],
    work: Work,
    body: impl FnOnce(Width, u64, &[bool]) -> Option<B>,
) -> Result<bool, CodegenError> {
    let Some(width) = width(cx.options.tier.isa).filter(|_| views.len() <= POINTERS.len()) else {
        return Ok(false);
    };
    let Some(nest) = Nest::new(dims, &views.iter().collect::<Vec<_>>()) else { return Ok(true) };
    let Some(moves) = moves(&nest, views) else { return Ok(false) };
    let Some(strides) = row_distances(&nest) else { return Ok(false) };
    let Some(body) = body(width, nest.len, &moves).filter(|b| nest.len >= b.lanes() as u64) else {
        return Ok(false);
    };
    let constants = Location::Weights(cx.weights(&body.constants(), 64)?);
    let sizes: Vec<usize> =
        views.iter().zip(moves).map(|(v, moves)| if moves { v.dtype.size() } else { 0 }).collect();
    let function =
        define(cx, &format!("{kernel}_rows"), 4, move || row_function(width, &sizes, &strides, &body));
    cx.step(kernel, nest.units(), work, |e, ctx, begin, end| {
        let bases: Vec<Value> = views
            .iter()
            .map(|v| {
                let base = e.address(ctx, v.location);
                map::offset(&mut e.b, base, v.offset)
            })
            .collect();
        let constants = e.address(ctx, constants);
        let function = e.import(function);
        let b = &mut e.b;
        let slot = StackSlotData::new(StackSlotKind::ExplicitSlot, 8 * views.len() as u32, 3);
        let slot = b.create_sized_stack_slot(slot);
        let pointers = b.ins().stack_addr(I64, slot, 0);
        map::stepped_loop(b, begin, end, |b, unit| {
            let run = Run::from(b, &nest, unit, end);
            for (i, p) in run.pointers(b, &nest, &bases).into_iter().enumerate() {
                b.ins().store(MEM, p, pointers, 8 * i as i32);
            }
            b.ins().call(function, &[pointers, run.elements, constants, run.rows]);
            run.units
        });
        Ok(())
    })?;
    Ok(true)
}

/// Which views move along the row, element by element; `None` if one does so in another way, or the result does not.
fn moves(nest: &Nest, views: &[View]) -> Option<Vec<bool>> {
    let moves: Option<Vec<bool>> = nest
        .row_strides
        .iter()
        .zip(views)
        .map(|(&stride, v)| (stride == 0 || stride == v.size()).then_some(stride != 0))
        .collect();
    moves.filter(|m| m.last() == Some(&true))
}

/// Bytes from row to row of each view, along the dimension next to the row.
fn row_distances(nest: &Nest) -> Option<Vec<i32>> {
    let distance = |strides: &Vec<i64>| i32::try_from(strides.last().copied().unwrap_or(0)).ok();
    nest.outer_strides.iter().map(distance).collect()
}

/// Units that one call takes: chunks of one row, or rows next to each other.
struct Run {
    row: Value,
    /// Of a row that is cut into chunks, the first one.
    chunk: Option<Value>,
    units: Value,
    elements: Value,
    rows: Value,
}

impl Run {
    fn from(b: &mut FunctionBuilder, nest: &Nest, unit: Value, end: Value) -> Run {
        let left = b.ins().isub(end, unit);
        let len = b.ins().iconst(I64, nest.len as i64);
        if nest.chunks == 1 {
            let units = match nest.outer.last() {
                Some(&extent) => {
                    let index = b.ins().urem_imm_u(unit, extent as i64);
                    let extent = b.ins().iconst(I64, extent as i64);
                    let to_end = b.ins().isub(extent, index);
                    b.ins().umin(to_end, left)
                }
                None => b.ins().iconst(I64, 1),
            };
            return Run { row: unit, chunk: None, units, elements: len, rows: units };
        }
        let chunks = b.ins().iconst(I64, nest.chunks as i64);
        let row = b.ins().udiv_imm_u(unit, nest.chunks as i64);
        let first = b.ins().imul(row, chunks);
        let chunk = b.ins().isub(unit, first);
        let to_end = b.ins().isub(chunks, chunk);
        let units = b.ins().umin(to_end, left);
        // The last chunk of a row takes what is left.
        let is_last = b.ins().icmp(IntCC::Equal, units, to_end);
        let before = b.ins().imul_imm_s(chunk, map::CHUNK as i64);
        let rest = b.ins().isub(len, before);
        let whole = b.ins().imul_imm_s(units, map::CHUNK as i64);
        let elements = b.ins().select(is_last, rest, whole);
        let rows = b.ins().iconst(I64, 1);
        Run { row, chunk: Some(chunk), units, elements, rows }
    }

    /// Where its first elements are.
    fn pointers(&self, b: &mut FunctionBuilder, nest: &Nest, bases: &[Value]) -> Vec<Value> {
        let mut pointers = map::located(b, self.row, &nest.outer, &nest.outer_strides, bases);
        if let Some(chunk) = self.chunk {
            for (p, &stride) in pointers.iter_mut().zip(&nest.row_strides) {
                *p = map::advanced(b, *p, chunk, stride * map::CHUNK as i64);
            }
        }
        pointers
    }
}

/// `fn(pointers to the first rows, elements of a row, constants, rows)`; `sizes` are the bytes by which each view moves
/// with an element.
fn row_function(
    width: Width,
    sizes: &[usize],
    strides: &[i32],
    body: &impl Body,
) -> Result<Vec<u8>, iced_x86::IcedError> {
    let mut asm = Assembler::new(width)?;
    let pointers = &POINTERS[..sizes.len()];
    let saved = pointers.get(SAVED..).unwrap_or_default();
    for &register in saved {
        asm.asm.push(register)?;
    }
    for (i, &pointer) in pointers.iter().enumerate() {
        asm.asm.mov(pointer, iced_x86::code_asm::qword_ptr(rdi + 8 * i as i32))?;
    }
    body.begin(&mut asm)?;
    let at: Vec<AsmMemoryOperand> = pointers
        .iter()
        .zip(sizes)
        .map(|(&pointer, &size)| if size == 0 { pointer + 0 } else { pointer + rax * size as i32 })
        .collect();
    let lanes = body.lanes() as i32;
    let [mut row, mut next, mut done] = [(); 3].map(|()| asm.asm.create_label());
    asm.asm.set_label(&mut row)?;
    asm.asm.xor(rax, rax)?;
    asm.asm.set_label(&mut next)?;
    body.vector(&mut asm, &at)?;
    asm.asm.add(rax, lanes)?;
    asm.asm.sub(rsi, lanes)?;
    asm.asm.cmp(rsi, lanes)?;
    asm.asm.jge(next)?;
    // What is left is less than a vector, or nothing.
    asm.asm.test(rsi, rsi)?;
    asm.asm.jle(done)?;
    asm.asm.add(rax, rsi)?;
    asm.asm.sub(rax, lanes)?;
    asm.asm.mov(rsi, i64::from(lanes))?;
    asm.asm.jmp(next)?;
    asm.asm.set_label(&mut done)?;
    for (&pointer, &stride) in pointers.iter().zip(strides).filter(|(_, s)| **s != 0) {
        asm.asm.add(pointer, stride)?;
    }
    asm.asm.mov(rsi, rax)?;
    asm.asm.dec(rcx)?;
    asm.asm.jnz(row)?;
    for &register in saved.iter().rev() {
        asm.asm.pop(register)?;
    }
    asm.finish()
}
