//! Functions of elements of up to 32 bits, in lanes of 32 bits.

use super::{
    program::{Binary, Comparison, Instruction, Place, Program, Shift, Source, Unary},
    rows::{self, Body, CONSTANTS},
};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Mask, Operand, Reg, Rounding, Width},
    kernels::{
        lanes::{Elementwise, FloatComparison, IntegerComparison, Lanes},
        map::View,
    },
    lower::Lowering,
    model::Work,
};
use iced_x86::code_asm::{AsmMemoryOperand, byte_ptr, edi, word_ptr};
use qcc_ir::DType;

/// Adds a step that computes a function of the operands' elements (all views but the last, which is the result's);
/// `false` where the general kernel must.
pub(crate) fn elementwise(
    cx: &mut Lowering,
    kernel: &str,
    dims: &[usize],
    views: &[View],
    work: Work,
    function: &impl Elementwise,
) -> Result<bool, CodegenError> {
    let Some((result, operands)) = views.split_last() else { return Ok(false) };
    rows::rows(cx, kernel, dims, views, work, |width, len, moves| {
        let operands = operands.iter().zip(moves).map(|(v, &moves)| (v.dtype, moves)).collect();
        Function::new(function, operands, result.dtype, width, len)
    })
}

/// A function some of whose operands are bytes, of which any but 0 is true.
struct OfTruths<'a, F> {
    function: &'a F,
    truths: Vec<bool>,
}

impl<F: Elementwise> Elementwise for OfTruths<'_, F> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let one = l.i32(1);
        let operands: Vec<L::Value> = operands
            .iter()
            .zip(&self.truths)
            .map(|(&x, &is_truth)| if is_truth { l.imin(x, one) } else { x })
            .collect();
        self.function.apply(l, &operands)
    }
}

/// The most vectors at a time.
const MAX_VECTORS: usize = 4;

/// How many vectors are computed in turn, so that none waits for its own operations: as many as have registers, and as
/// rows of `len` elements have without computing a great part of them twice.
fn vectors(program: &Program, width: Width, len: u64) -> usize {
    let lanes = width.bytes() / size_of::<u32>();
    let fits = |n: usize| {
        let elements = (n * lanes) as u64;
        n * program.registers.max(SCRATCH) <= width.registers()
            && n * program.masks <= width.masks()
            && (len.is_multiple_of(elements) || len >= MAX_VECTORS as u64 * elements)
    };
    (2..=MAX_VECTORS).rev().find(|&n| fits(n)).unwrap_or(1)
}

/// Registers that storing a vector takes.
const SCRATCH: usize = 2;

/// A function of elements for rows: the constants that its vectors need are behind [`CONSTANTS`].
pub(super) struct Function {
    width: Width,
    /// Vectors that are computed in turn.
    vectors: usize,
    /// Types, and whether they move along the row.
    operands: Vec<(DType, bool)>,
    result: DType,
    program: Program,
}

impl Function {
    /// A function of these operands (types, and whether they move along the row) for rows of `len` elements; `None` if
    /// it takes more registers than there are.
    pub(super) fn new(
        function: &impl Elementwise,
        operands: Vec<(DType, bool)>,
        result: DType,
        width: Width,
        len: u64,
    ) -> Option<Function> {
        let truths = operands.iter().map(|(dtype, _)| *dtype == DType::Bool).collect();
        let program = Program::new(&OfTruths { function, truths }, operands.len(), width)?;
        let vectors = vectors(&program, width, len);
        Some(Function { width, vectors, operands, result, program })
    }
}

impl Body for Function {
    fn lanes(&self) -> usize {
        self.vectors * self.vector_lanes()
    }

    fn constants(&self) -> Vec<u8> {
        self.program.constants.iter().flat_map(|c| c.to_le_bytes().repeat(self.vector_lanes())).collect()
    }

    fn begin(&self, _: &mut Assembler) -> Emit {
        Ok(())
    }

    fn vector(&self, asm: &mut Assembler, at: &[AsmMemoryOperand]) -> Emit {
        for &(instruction, to) in &self.program.instructions {
            for vector in 0..self.vectors {
                self.instruction(asm, at, instruction, to, vector)?;
            }
        }
        let Some(&result) = at.last() else { return Ok(()) };
        (0..self.vectors).try_for_each(|vector| self.store(asm, result, vector))
    }
}

/// Of `vcmpps`, without exceptions for quiet NaNs.
fn predicate(how: FloatComparison) -> u32 {
    match how {
        FloatComparison::Equal => 0x00,
        FloatComparison::Unordered => 0x03,
        FloatComparison::Less => 0x11,
        FloatComparison::LessOrEqual => 0x12,
    }
}

impl Function {
    fn constant(&self, constant: usize) -> AsmMemoryOperand {
        CONSTANTS + (constant * self.width.bytes()) as i32
    }

    fn vector_lanes(&self) -> usize {
        self.width.bytes() / size_of::<u32>()
    }

    /// The registers of a vector follow those of the one before.
    fn register(&self, reg: Reg, vector: usize) -> Reg {
        Reg(reg.0 + vector * self.program.registers.max(SCRATCH))
    }

    fn mask(&self, mask: Mask, vector: usize) -> Mask {
        Mask(mask.0 + vector * self.program.masks)
    }

    /// Where the elements of a vector are.
    fn elements(&self, at: AsmMemoryOperand, dtype: DType, vector: usize) -> AsmMemoryOperand {
        at + (vector * self.vector_lanes() * dtype.size()) as i32
    }

    fn instruction(
        &self,
        asm: &mut Assembler,
        at: &[AsmMemoryOperand],
        instruction: Instruction,
        to: Place,
        vector: usize,
    ) -> Emit {
        let own = |reg: Reg| self.register(reg, vector);
        let place = |source: Source| -> Operand {
            match source {
                Source::Register(reg) => own(reg).into(),
                Source::Constant(constant) => self.constant(constant).into(),
            }
        };
        let to = match to {
            Place::Vector(to) => own(to),
            Place::Mask(to) => {
                let Instruction::Compare { how, x, y } = instruction else { return Ok(()) };
                let to = self.mask(to, vector);
                return match how {
                    Comparison::F32(how) => asm.compare_f32(to, own(x), place(y), predicate(how)),
                    Comparison::I32(how) => {
                        asm.compare_i32(to, own(x), place(y), how == IntegerComparison::Greater)
                    }
                };
            }
        };
        match instruction {
            Instruction::Load { operand } => {
                let (dtype, moves) = self.operands[operand];
                let vector = if moves { vector } else { 0 };
                load(asm, to, self.elements(at[operand], dtype, vector), dtype, moves)
            }
            Instruction::LoadConstant { constant } => asm.vmovups(to, self.constant(constant)),
            Instruction::Unary { kind, x } => unary(asm, kind, to, place(x)),
            Instruction::Binary { kind, x, y } => binary(asm, kind, to, own(x), place(y)),
            Instruction::MultiplyAdd { x, y, z } => multiply_add(asm, to, own(x), place(y), own(z)),
            Instruction::Shift { kind: Shift::Left, x, count } => asm.vpslld(to, own(x), count),
            Instruction::Shift { kind: Shift::Right, x, count } => asm.vpsrad(to, own(x), count),
            Instruction::Compare { how: Comparison::F32(how), x, y } => {
                asm.compare_f32_to_vector(to, own(x), place(y), predicate(how))
            }
            Instruction::Compare { how: Comparison::I32(how), x, y } => {
                asm.compare_i32_to_vector(to, own(x), place(y), how == IntegerComparison::Greater)
            }
            Instruction::Select { mask: Place::Mask(mask), yes, no } => {
                asm.select(to, self.mask(mask, vector), place(yes), own(no))
            }
            Instruction::Select { mask: Place::Vector(mask), yes, no } => {
                asm.select_by_vector(to, own(mask), place(yes), own(no))
            }
        }
    }

    /// Lanes as elements; those of 8 and 16 bits saturate.
    fn store(&self, asm: &mut Assembler, at: AsmMemoryOperand, vector: usize) -> Emit {
        let at = self.elements(at, self.result, vector);
        let result = self.program.result;
        // All other values of this vector are dead.
        let t = Reg(usize::from(result == Reg(0)));
        let (x, t) = (self.register(result, vector), self.register(t, vector));
        let signed = self.result.is_signed();
        match (self.result.size(), self.width) {
            (4, _) => asm.store_vector(at, x),
            (2, _) => asm.store_dwords_as_words(at, x, signed, t),
            _ => asm.store_dwords_as_bytes(at, x, signed, t),
        }
    }
}

/// Elements as lanes of 32 bits.
fn load(asm: &mut Assembler, to: Reg, at: AsmMemoryOperand, dtype: DType, moves: bool) -> Emit {
    let signed = dtype.is_signed();
    match (dtype.size(), moves) {
        (4, true) => asm.vmovups(to, at),
        (4, false) => asm.vpbroadcastd(to, at),
        (2, true) => asm.load_words_as_dwords(to, at, signed),
        (_, true) => asm.load_bytes_as_dwords(to, at, signed),
        (size, false) => {
            match (size, signed) {
                (2, true) => asm.asm.movsx(edi, word_ptr(at))?,
                (2, false) => asm.asm.movzx(edi, word_ptr(at))?,
                (_, true) => asm.asm.movsx(edi, byte_ptr(at))?,
                (_, false) => asm.asm.movzx(edi, byte_ptr(at))?,
            }
            asm.asm.vmovd(to.xmm(), edi)?;
            asm.splat_first(to, to)
        }
    }
}

fn unary(asm: &mut Assembler, kind: Unary, to: Reg, x: Operand) -> Emit {
    match kind {
        Unary::Sqrt => asm.vsqrtps(to, x),
        Unary::Floor => asm.round(to, x, Rounding::Down),
        Unary::Ceil => asm.round(to, x, Rounding::Up),
        Unary::Nearest => asm.round(to, x, Rounding::Nearest),
        Unary::Truncate => asm.vcvttps2dq(to, x),
        Unary::Round => asm.vcvtps2dq(to, x),
        Unary::ToF32 => asm.vcvtdq2ps(to, x),
    }
}

/// x·y + z, wherever the result is to be: the instruction has it in the place of one of the three.
fn multiply_add(asm: &mut Assembler, to: Reg, x: Reg, y: Operand, z: Reg) -> Emit {
    match y {
        _ if to == z => asm.vfmadd231ps(to, x, y),
        Operand::Reg(y) if to == y => asm.vfmadd132ps(to, z, x),
        _ => {
            if to != x {
                asm.vmovaps(to, x)?;
            }
            asm.vfmadd132ps(to, z, y)
        }
    }
}

fn binary(asm: &mut Assembler, kind: Binary, to: Reg, x: Reg, y: Operand) -> Emit {
    match kind {
        Binary::FAdd => asm.vaddps(to, x, y),
        Binary::FSub => asm.vsubps(to, x, y),
        Binary::FMul => asm.vmulps(to, x, y),
        Binary::FDiv => asm.vdivps(to, x, y),
        Binary::Larger => asm.vmaxps(to, x, y),
        Binary::Smaller => asm.vminps(to, x, y),
        Binary::IAdd => asm.vpaddd(to, x, y),
        Binary::ISub => asm.vpsubd(to, x, y),
        Binary::IMul => asm.vpmulld(to, x, y),
        Binary::IMax => asm.vpmaxsd(to, x, y),
        Binary::IMin => asm.vpminsd(to, x, y),
        Binary::And => asm.bitand(to, x, y),
        Binary::Or => asm.bitor(to, x, y),
        Binary::Xor => asm.bitxor(to, x, y),
        Binary::PairProduct => asm.vpmaddwd(to, x, y),
    }
}
