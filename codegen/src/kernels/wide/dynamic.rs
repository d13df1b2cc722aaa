//! Rows of f32 to codes of grids that are chosen for them: two passes over each row, which stays in the first cache.
//!
//! The last vector of a row ends with it and overlaps the one before.

use super::{define, width};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Join, Reg, Width},
    kernels::dynamic::Rows,
    lower::Lowering,
    model::Work,
    module::Location,
};
use cranelift_codegen::ir::InstBuilder;
use iced_x86::{
    IcedError,
    code_asm::{AsmMemoryOperand, dword_ptr, eax, r8, r9, r10, rcx, rdi, rdx, rsi},
};

/// Adds the step; `false` where it is one for the general kernel.
pub(crate) fn quantize_rows(cx: &mut Lowering, rows: &Rows, work: Work) -> Result<bool, CodegenError> {
    let Some(width) = width(cx.options.tier.isa) else { return Ok(false) };
    let lanes = width.bytes() / 4;
    let (Ok(len), Ok(stride)) = (i32::try_from(rows.len), i32::try_from(rows.stride)) else {
        return Ok(false);
    };
    if rows.len < lanes || len > i32::MAX / 4 {
        return Ok(false);
    }
    let constants: Vec<u8> = [1f32, 255.0].into_iter().flat_map(f32::to_le_bytes).collect();
    let constants = Location::Weights(cx.weights(&constants, 16)?);
    let kernel = Kernel { width, len, stride };
    let function = define(cx, "dynamic_quantize_rows", 6, move || kernel.function());
    cx.step("dynamic_quantize", rows.rows as u64, work, |e, ctx, begin, end| {
        let constants = e.address(ctx, constants);
        let strides = [i64::from(len) * 4, i64::from(len), rows.stride, rows.stride];
        let places = [rows.x, rows.codes, rows.scales, rows.zeros].map(|place| e.address(ctx, place));
        let function = e.import(function);
        let mut arguments = Vec::with_capacity(6);
        for (place, stride) in places.into_iter().zip(strides) {
            let before = e.b.ins().imul_imm_s(begin, stride);
            arguments.push(e.b.ins().iadd(place, before));
        }
        arguments.push(e.b.ins().isub(end, begin));
        arguments.push(constants);
        e.b.ins().call(function, &arguments);
        Ok(())
    })?;
    Ok(true)
}

/// Where the constants have the largest code; first of all they have 1.
const LARGEST_CODE: i32 = 4;

const LO: Reg = Reg(0);
const HI: Reg = Reg(1);
/// 0 of finite numbers, NaN of others.
const NOT_FINITE: Reg = Reg(2);
const X: Reg = Reg(3);
const T: Reg = Reg(4);
const ZERO: Reg = Reg(5);
const SCALE: Reg = Reg(6);
const PLACE: Reg = Reg(7);
/// Steps of the least and of the largest code.
const LEAST: Reg = Reg(8);
const MOST: Reg = Reg(9);
const ZERO_POINT: Reg = Reg(10);

/// `fn(elements, codes, scales, zero points, rows, constants)` of rows that follow each other.
struct Kernel {
    width: Width,
    /// Elements of a row: at least a vector.
    len: i32,
    /// Bytes from one scale to the next.
    stride: i32,
}

impl Kernel {
    fn function(&self) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        asm.bitxor(ZERO, ZERO, ZERO)?;
        let mut row = asm.asm.create_label();
        asm.asm.set_label(&mut row)?;
        self.grid(&mut asm)?;
        self.blocks(&mut asm, |asm, x, codes| {
            asm.vmovups(X, x)?;
            asm.vdivps(X, X, SCALE)?;
            // NaN becomes the bound.
            asm.vmaxps(X, X, LEAST)?;
            asm.vminps(X, X, MOST)?;
            // Bounds are integers: rounding keeps what is within within.
            asm.vcvtps2dq(X, X)?;
            asm.vpaddd(X, X, ZERO_POINT)?;
            asm.store_dwords_as_bytes(codes, X, false, T)
        })?;
        asm.asm.add(rdi, 4 * self.len)?;
        asm.asm.add(rsi, self.len)?;
        asm.asm.add(rdx, self.stride)?;
        asm.asm.add(rcx, self.stride)?;
        asm.asm.dec(r8)?;
        asm.asm.jnz(row)?;
        asm.finish()
    }

    /// Elements of a vector.
    fn lanes(&self) -> i32 {
        (self.width.bytes() / 4) as i32
    }

    /// Calls `body` with the places of each vector of the row at rdi and of its codes, in a loop that counts in r10.
    fn blocks(
        &self,
        asm: &mut Assembler,
        body: impl Fn(&mut Assembler, AsmMemoryOperand, AsmMemoryOperand) -> Emit,
    ) -> Emit {
        let lanes = self.lanes();
        asm.asm.xor(r10, r10)?;
        let mut next = asm.asm.create_label();
        asm.asm.set_label(&mut next)?;
        body(asm, rdi + r10 * 4, rsi + r10)?;
        asm.asm.add(r10, lanes)?;
        asm.asm.cmp(r10, self.len / lanes * lanes)?;
        asm.asm.jb(next)?;
        if self.len % lanes != 0 {
            let last = self.len - lanes;
            body(asm, rdi + 4 * last, rsi + last)?;
        }
        Ok(())
    }

    /// The grid of the row, to memory and to all elements of registers.
    fn grid(&self, asm: &mut Assembler) -> Emit {
        for r in [LO, HI, NOT_FINITE] {
            asm.vmovaps(r, ZERO)?;
        }
        self.blocks(asm, |asm, x, _| {
            asm.vmovups(X, x)?;
            asm.vminps(LO, X, LO)?;
            asm.vmaxps(HI, X, HI)?;
            asm.vfmadd231ps(NOT_FINITE, X, ZERO)
        })?;
        for (r, join) in [(LO, Join::Min), (HI, Join::Max), (NOT_FINITE, Join::Sum)] {
            asm.join_elements(r, T, join)?;
        }
        let a = &mut asm.asm;
        let [scale, place, zero, t] = [SCALE, PLACE, ZERO, T].map(Reg::xmm);
        a.vsubss(scale, HI.xmm(), LO.xmm())?;
        a.vdivss(scale, scale, dword_ptr(r9 + LARGEST_CODE))?;
        a.vaddss(scale, scale, NOT_FINITE.xmm())?;
        let mut is_usable = a.create_label();
        a.vucomiss(scale, zero)?;
        a.jne(is_usable)?;
        // NaN is equal to nothing, but as the flags have it.
        a.jp(is_usable)?;
        a.vmovss(scale, dword_ptr(r9))?;
        a.set_label(&mut is_usable)?;
        a.vmovss(dword_ptr(rdx), scale)?;
        a.vsubss(place, zero, LO.xmm())?;
        a.vdivss(place, place, scale)?;
        a.vmaxss(place, place, zero)?;
        a.vminss(place, place, dword_ptr(r9 + LARGEST_CODE))?;
        a.vcvtss2si(eax, place)?;
        a.mov(dword_ptr(rcx), eax)?;
        a.vcvtsi2ss(place, zero, eax)?;
        a.vsubss(t, zero, place)?;
        a.vmovd(ZERO_POINT.xmm(), eax)?;
        asm.splat_first(LEAST, T)?;
        asm.asm.vmovss(t, dword_ptr(r9 + LARGEST_CODE))?;
        asm.asm.vsubss(t, t, place)?;
        asm.splat_first(MOST, T)?;
        asm.splat_first(SCALE, SCALE)?;
        asm.splat_first(ZERO_POINT, ZERO_POINT)
    }
}
