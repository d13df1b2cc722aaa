//! Softmax along rows whose elements follow each other.
//!
//! Three passes over a few rows at a time, which stay in the first cache: exponentials, which are kept in the result; their
//! sums, one element after the other as they are defined, but of several rows at once, since each sum waits for itself;
//! quotients. The last vector of a row ends with it and overlaps the one before.

use super::{define, width};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Reg, Rounding, Width},
    kernels::{line::Line, map::counted_loop},
    lower::Lowering,
    model::Work,
    module::Location,
};
use cranelift_codegen::ir::{InstBuilder, condcodes::IntCC, types::I64};
use iced_x86::{
    IcedError,
    code_asm::{AsmMemoryOperand, dword_ptr, eax, r8, rax, rcx, rdi, rdx, rsi},
};
use qcc_ir::numerics::math;

/// Rows whose sums are taken together: each addition takes a few cycles, and there are two every cycle.
const ROWS: usize = 8;
const SIZE: usize = 4;

/// Adds the step of a softmax; `false` where it is one for the general kernel.
pub(crate) fn softmax(
    cx: &mut Lowering,
    line: Line,
    (from, to): (Location, Location),
    work: Work,
) -> Result<bool, CodegenError> {
    let Some(width) = width(cx.options.tier.isa) else { return Ok(false) };
    let len = line.len as usize;
    let row = len * SIZE;
    let spans = i32::try_from(ROWS * row).is_ok();
    if line.inner != 1 || len < width.bytes() / SIZE || !spans {
        return Ok(false);
    }
    let rows = Rows { width, bytes: row };
    let table = constants(width);
    let table = Location::Weights(cx.weights(&table, 64)?);
    let whole = define(cx, "softmax_rows", 3, move || rows.function(ROWS));
    let rest = match line.outer as usize % ROWS {
        0 => None,
        rest => Some(define(cx, "softmax_rest", 3, move || rows.function(rest))),
    };
    let units = (line.outer as u64).div_ceil(ROWS as u64);
    let blocks = line.outer as u64 / ROWS as u64;
    cx.step("softmax", units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let table = e.address(ctx, table);
        let (whole, rest) = (e.import(whole), rest.map(|f| e.import(f)));
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let at = b.ins().imul_imm_s(unit, (ROWS * row) as i64);
            let arguments = [b.ins().iadd(source, at), b.ins().iadd(target, at), table];
            let Some(rest) = rest else {
                b.ins().call(whole, &arguments);
                return;
            };
            let [inside, behind, next] = [(); 3].map(|()| b.create_block());
            let blocks = b.ins().iconst(I64, blocks as i64);
            let is_whole = b.ins().icmp(IntCC::UnsignedLessThan, unit, blocks);
            b.ins().brif(is_whole, inside, &[], behind, &[]);
            for (block, function) in [(inside, whole), (behind, rest)] {
                b.switch_to_block(block);
                b.ins().call(function, &arguments);
                b.ins().jump(next, &[]);
            }
            b.switch_to_block(next);
        });
        Ok(())
    })?;
    Ok(true)
}

/// The constants of the exponential function, in the order of the table that the kernel reads: a vector each.
#[derive(Clone, Copy)]
enum Constant {
    Log2E,
    Ln2High,
    Ln2Low,
    One,
    /// The bias of exponents, an integer.
    Bias,
    /// The first of the polynomial's coefficients; the others follow.
    Polynomial,
}

fn constants(width: Width) -> Vec<u8> {
    let first = [math::LOG2_E, math::LN_2_HI, math::LN_2_LO, 1.0].map(f32::to_bits);
    let polynomial = math::EXP_POLYNOMIAL.map(f32::to_bits);
    let all = first.into_iter().chain([127]).chain(polynomial);
    all.flat_map(|bits| bits.to_le_bytes().repeat(width.bytes() / SIZE)).collect()
}

/// Registers of exponentials.
const MAX: Reg = Reg(0);
const LEAST: Reg = Reg(1);
const MOST: Reg = Reg(2);
const X: Reg = Reg(3);
const N: Reg = Reg(4);
const LOW: Reg = Reg(5);
const R: Reg = Reg(6);
const P: Reg = Reg(7);
const T: Reg = Reg(8);

/// Registers of quotients; sums are in the first ones.
const SUM: Reg = Reg(ROWS);
const QUOTIENT: Reg = Reg(ROWS + 1);
const LAST: Reg = Reg(ROWS + 2);

/// Rows that are computed together: `fn(elements, results, constants)`.
#[derive(Clone, Copy)]
struct Rows {
    width: Width,
    /// Bytes of a row: at least a vector.
    bytes: usize,
}

impl Rows {
    fn function(&self, rows: usize) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        asm.splat(LEAST, math::EXP_MIN.to_bits())?;
        asm.splat(MOST, math::EXP_MAX.to_bits())?;
        asm.asm.mov(r8, rsi)?;
        asm.asm.mov(eax, rows as u32)?;
        let mut row = asm.asm.create_label();
        asm.asm.set_label(&mut row)?;
        self.max(&mut asm)?;
        self.each(&mut asm, |asm, x, y| self.exponential(asm, x, y))?;
        asm.asm.add(rdi, self.bytes as i32)?;
        asm.asm.add(r8, self.bytes as i32)?;
        asm.asm.dec(rax)?;
        asm.asm.jnz(row)?;
        self.sums(&mut asm, rows)?;
        asm.asm.mov(r8, rsi)?;
        for row in 0..rows {
            self.quotients(&mut asm, row)?;
            asm.asm.add(r8, self.bytes as i32)?;
        }
        asm.finish()
    }

    /// Where the last vector begins if it overlaps the one before.
    fn last(&self) -> Option<i32> {
        let vector = self.width.bytes();
        (!self.bytes.is_multiple_of(vector)).then_some((self.bytes - vector) as i32)
    }

    /// Calls `body` with the places of each vector of the row at rdi and r8, in a loop that counts in rcx.
    fn each(
        &self,
        asm: &mut Assembler,
        body: impl Fn(&mut Assembler, AsmMemoryOperand, AsmMemoryOperand) -> Emit,
    ) -> Emit {
        self.whole_vectors(asm, |asm| body(asm, rdi + rcx, r8 + rcx))?;
        self.last().map_or(Ok(()), |at| body(asm, rdi + at, r8 + at))
    }

    fn whole_vectors(&self, asm: &mut Assembler, body: impl Fn(&mut Assembler) -> Emit) -> Emit {
        let vector = self.width.bytes();
        asm.asm.xor(rcx, rcx)?;
        let mut next = asm.asm.create_label();
        asm.asm.set_label(&mut next)?;
        body(asm)?;
        asm.asm.add(rcx, vector as i32)?;
        asm.asm.cmp(rcx, (self.bytes / vector * vector) as i32)?;
        asm.asm.jb(next)
    }

    /// The largest element of the row at rdi in all elements of [`MAX`]. What a NaN makes of it does not matter: the
    /// sum is NaN then.
    fn max(&self, asm: &mut Assembler) -> Emit {
        asm.vmovups(MAX, rdi + 0)?;
        self.each(asm, |asm, x, _| asm.vmaxps(MAX, MAX, x))?;
        let (x, t) = (MAX, T);
        if self.width == Width::Zmm {
            asm.asm.vextractf64x4(t.ymm(), x.zmm(), 1)?;
            asm.asm.vmaxps(x.ymm(), x.ymm(), t.ymm())?;
        }
        asm.asm.vextractf128(t.xmm(), x.ymm(), 1)?;
        asm.asm.vmaxps(x.xmm(), x.xmm(), t.xmm())?;
        for order in [0b0100_1110, 0b1011_0001] {
            asm.asm.vpermilps(t.xmm(), x.xmm(), order)?;
            asm.asm.vmaxps(x.xmm(), x.xmm(), t.xmm())?;
        }
        asm.splat_first(x, x)
    }

    fn constant(&self, constant: Constant, i: usize) -> AsmMemoryOperand {
        rdx + ((constant as usize + i) * self.width.bytes()) as i32
    }

    /// `math::exp(x − max)`, but for the payload of a NaN: the operations of its definition in their order.
    fn exponential(&self, asm: &mut Assembler, x: AsmMemoryOperand, y: AsmMemoryOperand) -> Emit {
        let c = |constant| self.constant(constant, 0);
        asm.vmovups(X, x)?;
        asm.vsubps(X, X, MAX)?;
        // The second source where one is NaN.
        asm.vmaxps(X, LEAST, X)?;
        asm.vminps(X, MOST, X)?;
        asm.vmulps(N, X, c(Constant::Log2E))?;
        asm.round(N, N, Rounding::Nearest)?;
        asm.vmulps(T, N, c(Constant::Ln2High))?;
        asm.vsubps(X, X, T)?;
        asm.vmulps(LOW, N, c(Constant::Ln2Low))?;
        asm.vsubps(R, X, LOW)?;
        asm.vmovups(P, c(Constant::Polynomial))?;
        for i in 1..math::EXP_POLYNOMIAL.len() {
            asm.vmulps(P, P, R)?;
            asm.vaddps(P, P, self.constant(Constant::Polynomial, i))?;
        }
        asm.vmulps(T, R, R)?;
        asm.vmulps(P, P, T)?;
        asm.vsubps(P, P, LOW)?;
        asm.vaddps(P, P, X)?;
        asm.vaddps(P, P, c(Constant::One))?;
        // 2ⁿ in two factors.
        asm.vcvttps2dq(N, N)?;
        asm.vpsrad(T, N, 1)?;
        asm.vpsubd(N, N, T)?;
        for exponent in [T, N] {
            asm.vpaddd(exponent, exponent, c(Constant::Bias))?;
            asm.vpslld(exponent, exponent, 23)?;
            asm.vmulps(P, P, exponent)?;
        }
        asm.store(y, P, 0, self.width.bytes(), SIZE, T)
    }

    /// The sum of each row from rsi on, one element after the other, in registers 0 to `rows`.
    fn sums(&self, asm: &mut Assembler, rows: usize) -> Emit {
        for row in 0..rows {
            let sum = Reg(row).xmm();
            asm.asm.vxorps(sum, sum, sum)?;
        }
        asm.asm.xor(rcx, rcx)?;
        let mut next = asm.asm.create_label();
        asm.asm.set_label(&mut next)?;
        for row in 0..rows {
            let sum = Reg(row).xmm();
            asm.asm.vaddss(sum, sum, dword_ptr(rsi + rcx + (row * self.bytes) as i32))?;
        }
        asm.asm.add(rcx, SIZE as i32)?;
        asm.asm.cmp(rcx, self.bytes as i32)?;
        asm.asm.jb(next)
    }

    /// Divides the row at r8 by its sum. The last vector is read before the ones that it overlaps are written.
    fn quotients(&self, asm: &mut Assembler, row: usize) -> Emit {
        asm.splat_first(SUM, Reg(row))?;
        if let Some(at) = self.last() {
            asm.vmovups(LAST, r8 + at)?;
            asm.vdivps(LAST, LAST, SUM)?;
        }
        let vector = self.width.bytes();
        self.whole_vectors(asm, |asm| {
            asm.vmovups(QUOTIENT, r8 + rcx)?;
            asm.vdivps(QUOTIENT, QUOTIENT, SUM)?;
            asm.store(r8 + rcx, QUOTIENT, 0, vector, SIZE, T)
        })?;
        self.last().map_or(Ok(()), |at| asm.store(r8 + at, LAST, 0, vector, SIZE, T))
    }
}
