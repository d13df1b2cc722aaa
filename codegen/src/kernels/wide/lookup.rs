//! Bytes looked up in a table of 256.

use super::rows::{self, Body, CONSTANTS};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Reg, Width},
    kernels::map::View,
    lower::Lowering,
    model::Work,
};
use iced_x86::code_asm::{AsmMemoryOperand, k1, zmmword_ptr};

/// Adds a step that looks each byte of the first view up; `false` where the general kernel must.
pub(crate) fn lookup(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    views: &[View; 2],
    work: Work,
    table: &[u8; 256],
) -> Result<bool, CodegenError> {
    let permutes = cx.options.tier.permutes_bytes;
    rows::rows(cx, kernel, dims, views, work, |width, _, moves| {
        let table = Box::new(*table);
        // One byte for the whole row is nothing to be fast at.
        moves[0].then_some(Lookup { width, permutes, table })
    })
}

struct Lookup {
    width: Width,
    /// Whether bytes can be picked out of two registers of 64 (AVX-512 VBMI).
    permutes: bool,
    table: Box<[u8; 256]>,
}

const INDEX: Reg = Reg(0);
const OTHER: Reg = Reg(1);
const PICKED: Reg = Reg(2);
const RESULT: Reg = Reg(3);
/// What brings the low digit in reach of one row, where bytes are not permuted.
const REACH: Reg = Reg(4);
/// The first register of the table, where bytes are permuted.
const TABLE: usize = 8;

/// Rows of the table that `vpshufb` picks from.
const ROW: usize = 16;

impl Body for Lookup {
    fn lanes(&self) -> usize {
        self.width.bytes()
    }

    /// The table, in rows of 16 bytes for each 128-bit lane where bytes are not permuted; then what brings its high
    /// digit to zero.
    fn constants(&self) -> Vec<u8> {
        if self.permutes {
            return self.table.to_vec();
        }
        let lanes = self.width.bytes() / ROW;
        let rows = self.table.chunks(ROW).flat_map(|row| row.repeat(lanes));
        let digits = (0..ROW as u8).flat_map(|high| vec![high << 4; self.width.bytes()]);
        let reach = vec![0x70; self.width.bytes()];
        rows.chain(digits).chain(reach).collect()
    }

    fn begin(&self, asm: &mut Assembler) -> Emit {
        let registers = if self.permutes { self.table.len() / self.width.bytes() } else { 0 };
        for i in 0..registers {
            asm.vmovups(Reg(TABLE + i), self.constant(i))?;
        }
        if !self.permutes {
            asm.vmovups(REACH, self.constant(2 * ROW))?;
        }
        Ok(())
    }

    fn vector(&self, asm: &mut Assembler, at: &[AsmMemoryOperand]) -> Emit {
        let &[from, to] = at else { return Ok(()) };
        asm.vmovups(INDEX, from)?;
        if self.permutes {
            // The low 7 bits pick from two registers each, the highest one between both.
            let (index, other) = (INDEX.zmm(), OTHER.zmm());
            let table = |i: usize| Reg(TABLE + i).zmm();
            asm.asm.vpmovb2m(k1, index)?;
            asm.asm.vmovdqa64(other, index)?;
            asm.asm.vpermi2b(index, table(0), table(1))?;
            asm.asm.vpermi2b(other, table(2), table(3))?;
            asm.asm.vmovdqu8(index.k1(), other)?;
            return asm.asm.vmovups(zmmword_ptr(to), index);
        }
        for high in 0..ROW {
            let picked = if high == 0 { RESULT } else { PICKED };
            let own = if high == 0 { INDEX } else { OTHER };
            if high > 0 {
                asm.bitxor(OTHER, INDEX, self.constant(ROW + high))?;
            }
            // 0x70 + 0..16 keeps the top bit clear; with any other high digit the sum reaches 0x80, which picks 0.
            asm.vpaddusb(OTHER, own, REACH)?;
            asm.vmovups(picked, self.constant(high))?;
            asm.vpshufb(picked, picked, OTHER)?;
            if high > 0 {
                asm.bitor(RESULT, RESULT, PICKED)?;
            }
        }
        asm.store_vector(to, RESULT)
    }
}

impl Lookup {
    fn constant(&self, i: usize) -> AsmMemoryOperand {
        CONSTANTS + (i * self.width.bytes()) as i32
    }
}
