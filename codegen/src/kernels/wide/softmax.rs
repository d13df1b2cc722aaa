//! Softmax along rows whose elements follow each other.
//!
//! Three passes over a few rows at a time, which stay in the first cache: exponentials, which are kept in the result; their
//! sums, in the order of [`qcc_ir::numerics::total`], of several rows at once, since each sum waits for itself; quotients.
//!
//! The last vector of a row ends with it and overlaps the one before.

use super::{
    define,
    elementwise::Function,
    rows::{Body, CONSTANTS},
    width,
};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Join, Reg, Width},
    kernels::{
        lanes::{Elementwise, Lanes},
        line::Line,
        map::counted_loop,
        math,
    },
    lower::Lowering,
    model::Work,
    module::Location,
};
use cranelift_codegen::ir::{InstBuilder, condcodes::IntCC, types::I64};
use iced_x86::{
    IcedError,
    code_asm::{AsmMemoryOperand, dword_ptr, r8, r9d, rcx, rdi, rsi, rsp, ymmword_ptr},
};
use qcc_ir::{DType, numerics::PARTIAL_TOTALS};
use std::sync::Arc;

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
    let operands = vec![(DType::F32, true), (DType::F32, false)];
    let exponential = Function::new(&Exponential, operands, DType::F32, width, len as u64);
    let Some(exponential) = exponential.filter(|f| f.lanes() <= len) else { return Ok(false) };
    let rows = Arc::new(Rows { width, bytes: row, exponential });
    let table = Location::Weights(cx.weights(&rows.constants(), 64)?);
    let own = rows.clone();
    let whole = define(cx, "softmax_rows", 3, move || own.function(ROWS));
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

/// e^(x − max).
struct Exponential;

impl Elementwise for Exponential {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let x = l.fsub(operands[0], operands[1]);
        math::exp(l, x)
    }
}

/// The largest element of a row.
const MAX: Reg = Reg(0);
const T: Reg = Reg(1);

/// Where the largest element is kept: below the stack, which no call or signal takes.
fn max_place() -> AsmMemoryOperand {
    rsp - 8
}

/// Registers of quotients; sums are in the first ones.
const SUM: Reg = Reg(ROWS);
const QUOTIENT: Reg = Reg(ROWS + 1);
const LAST: Reg = Reg(ROWS + 2);
const MASK: Reg = Reg(ROWS + 3);
const PART: Reg = Reg(ROWS + 4);

/// Rows that are computed together: `fn(elements, results, constants)`.
struct Rows {
    width: Width,
    /// Bytes of a row: at least a vector.
    bytes: usize,
    exponential: Function,
}

impl Rows {
    fn function(&self, rows: usize) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        asm.asm.mov(r8, rsi)?;
        asm.asm.mov(r9d, rows as u32)?;
        let mut row = asm.asm.create_label();
        asm.asm.set_label(&mut row)?;
        self.max(&mut asm)?;
        asm.asm.vmovss(dword_ptr(max_place()), MAX.xmm())?;
        let block = self.exponential.lanes() * SIZE;
        self.each(&mut asm, block, |asm, x, y| self.exponential.vector(asm, &[x, max_place(), y]))?;
        asm.asm.add(rdi, self.bytes as i32)?;
        asm.asm.add(r8, self.bytes as i32)?;
        asm.asm.dec(r9d)?;
        asm.asm.jnz(row)?;
        self.sums(&mut asm, rows)?;
        asm.asm.mov(r8, rsi)?;
        for row in 0..rows {
            self.quotients(&mut asm, row)?;
            asm.asm.add(r8, self.bytes as i32)?;
        }
        asm.finish()
    }

    /// Where the last block of so many bytes begins if it overlaps the one before.
    fn last(&self, block: usize) -> Option<i32> {
        (!self.bytes.is_multiple_of(block)).then_some((self.bytes - block) as i32)
    }

    /// Calls `body` with the places of each block of the row at rdi and r8, in a loop that counts in rcx.
    fn each(
        &self,
        asm: &mut Assembler,
        block: usize,
        body: impl Fn(&mut Assembler, AsmMemoryOperand, AsmMemoryOperand) -> Emit,
    ) -> Emit {
        self.whole_blocks(asm, block, |asm| body(asm, rdi + rcx, r8 + rcx))?;
        self.last(block).map_or(Ok(()), |at| body(asm, rdi + at, r8 + at))
    }

    fn whole_blocks(&self, asm: &mut Assembler, block: usize, body: impl Fn(&mut Assembler) -> Emit) -> Emit {
        asm.asm.xor(rcx, rcx)?;
        let mut next = asm.asm.create_label();
        asm.asm.set_label(&mut next)?;
        body(asm)?;
        asm.asm.add(rcx, block as i32)?;
        asm.asm.cmp(rcx, (self.bytes / block * block) as i32)?;
        asm.asm.jb(next)
    }

    /// The largest element of the row at rdi in all elements of [`MAX`]. What a NaN makes of it does not matter: the
    /// sum is NaN then.
    fn max(&self, asm: &mut Assembler) -> Emit {
        asm.vmovups(MAX, rdi + 0)?;
        self.each(asm, self.width.bytes(), |asm, x, _| asm.vmaxps(MAX, MAX, x))?;
        asm.join_elements(MAX, T, Join::Max)?;
        asm.splat_first(MAX, MAX)
    }

    /// The sum of each row from rsi on in the first element of registers 0 to `rows`: partial sums, of which halves are
    /// added.
    fn sums(&self, asm: &mut Assembler, rows: usize) -> Emit {
        let group = PARTIAL_TOTALS * SIZE;
        let (groups, rest) = (self.bytes / group * group, self.bytes % group);
        let place = |row: usize, at: usize| rsi + rcx + (row * self.bytes + at) as i32;
        for row in 0..rows {
            let sum = Reg(row).ymm();
            asm.asm.vxorps(sum, sum, sum)?;
        }
        asm.asm.xor(rcx, rcx)?;
        let mut next = asm.asm.create_label();
        asm.asm.set_label(&mut next)?;
        for row in 0..rows {
            let sum = Reg(row).ymm();
            asm.asm.vaddps(sum, sum, ymmword_ptr(place(row, 0)))?;
        }
        asm.asm.add(rcx, group as i32)?;
        asm.asm.cmp(rcx, groups as i32)?;
        asm.asm.jb(next)?;
        if rest > 0 {
            asm.asm
                .vmovups(MASK.ymm(), ymmword_ptr(CONSTANTS + self.exponential.constants().len() as i32))?;
            for row in 0..rows {
                let (sum, x) = (Reg(row).ymm(), PART.ymm());
                asm.asm.vmaskmovps(x, MASK.ymm(), ymmword_ptr(place(row, 0)))?;
                asm.asm.vaddps(sum, sum, x)?;
            }
        }
        for row in 0..rows {
            let (sum, t) = (Reg(row), PART);
            asm.asm.vextractf128(t.xmm(), sum.ymm(), 1)?;
            asm.asm.vaddps(sum.xmm(), sum.xmm(), t.xmm())?;
            for order in [0b0100_1110, 0b1011_0001] {
                asm.asm.vpermilps(t.xmm(), sum.xmm(), order)?;
                asm.asm.vaddps(sum.xmm(), sum.xmm(), t.xmm())?;
            }
        }
        Ok(())
    }

    /// The constants of exponentials, and which partial sums the end of a row has an element for.
    fn constants(&self) -> Vec<u8> {
        let rest = self.bytes / SIZE % PARTIAL_TOTALS;
        let mask = (0..PARTIAL_TOTALS).flat_map(|i| if i < rest { [0xff; SIZE] } else { [0; SIZE] });
        self.exponential.constants().into_iter().chain(mask).collect()
    }

    /// Divides the row at r8 by its sum. The last vector is read before the ones that it overlaps are written.
    fn quotients(&self, asm: &mut Assembler, row: usize) -> Emit {
        let vector = self.width.bytes();
        asm.splat_first(SUM, Reg(row))?;
        if let Some(at) = self.last(vector) {
            asm.vmovups(LAST, r8 + at)?;
            asm.vdivps(LAST, LAST, SUM)?;
        }
        self.whole_blocks(asm, vector, |asm| {
            asm.vmovups(QUOTIENT, r8 + rcx)?;
            asm.vdivps(QUOTIENT, QUOTIENT, SUM)?;
            asm.store_vector(r8 + rcx, QUOTIENT)
        })?;
        self.last(vector).map_or(Ok(()), |at| asm.store_vector(r8 + at, LAST))
    }
}
