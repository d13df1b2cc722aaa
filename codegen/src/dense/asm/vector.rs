//! An assembler that is generic over the width of its vectors.

use iced_x86::{IcedError, code_asm::*};

/// The result of emitting an instruction.
pub(crate) type Emit = Result<(), IcedError>;

/// Width and encoding of vector instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Width {
    /// 256 bits, VEX: 16 registers, no masks.
    Ymm,
    /// 512 bits, EVEX: 32 registers, masks.
    Zmm,
}

impl Width {
    /// Bytes of a vector.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Width::Ymm => 32,
            Width::Zmm => 64,
        }
    }

    /// Vector registers.
    pub(crate) fn registers(self) -> usize {
        match self {
            Width::Ymm => 16,
            Width::Zmm => 32,
        }
    }

    /// Registers of masks that can select: none where comparisons give vectors.
    pub(crate) fn masks(self) -> usize {
        match self {
            Width::Ymm => 0,
            Width::Zmm => SELECTORS.len(),
        }
    }
}

/// A register of masks that can select: k1 and on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mask(pub(crate) usize);

const SELECTORS: [AsmRegisterK; 7] = [k1, k2, k3, k4, k5, k6, k7];

impl Mask {
    pub(crate) fn k(self) -> AsmRegisterK {
        SELECTORS[self.0]
    }

    /// The register, of which an instruction writes the elements in this mask.
    fn of(self, reg: AsmRegisterZmm) -> AsmRegisterZmm {
        match self.0 {
            0 => reg.k1(),
            1 => reg.k2(),
            2 => reg.k3(),
            3 => reg.k4(),
            4 => reg.k5(),
            5 => reg.k6(),
            _ => reg.k7(),
        }
    }
}

/// A vector register, whatever its width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reg(pub(crate) usize);

const XMM: [AsmRegisterXmm; 32] = [
    xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15,
    xmm16, xmm17, xmm18, xmm19, xmm20, xmm21, xmm22, xmm23, xmm24, xmm25, xmm26, xmm27, xmm28, xmm29, xmm30,
    xmm31,
];
const YMM: [AsmRegisterYmm; 32] = [
    ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15,
    ymm16, ymm17, ymm18, ymm19, ymm20, ymm21, ymm22, ymm23, ymm24, ymm25, ymm26, ymm27, ymm28, ymm29, ymm30,
    ymm31,
];
const ZMM: [AsmRegisterZmm; 32] = [
    zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15,
    zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30,
    zmm31,
];

impl Reg {
    pub(crate) fn xmm(self) -> AsmRegisterXmm {
        XMM[self.0]
    }

    pub(crate) fn ymm(self) -> AsmRegisterYmm {
        YMM[self.0]
    }

    pub(crate) fn zmm(self) -> AsmRegisterZmm {
        ZMM[self.0]
    }
}

/// To which integer a float is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    /// Half to even.
    Nearest = 0,
    Down = 1,
    Up = 2,
}

/// What two numbers become when all elements of a vector are joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Join {
    /// The smaller, or the second where one is NaN.
    Min,
    /// The larger, likewise.
    Max,
    /// Their sum.
    Sum,
}

/// A register or a vector in memory.
#[derive(Clone, Copy)]
pub(crate) enum Operand {
    Reg(Reg),
    Mem(AsmMemoryOperand),
}

impl From<Reg> for Operand {
    fn from(reg: Reg) -> Operand {
        Operand::Reg(reg)
    }
}

impl From<AsmMemoryOperand> for Operand {
    fn from(memory: AsmMemoryOperand) -> Operand {
        Operand::Mem(memory)
    }
}

/// The odd 32-bit elements of a vector.
const ODD: AsmRegisterK = k1;
/// The elements of a vector that [`Assembler::negate_where_negative`] negates.
const NEGATIVE: AsmRegisterK = k2;
/// The elements of a vector that a masked store writes.
const STORED: AsmRegisterK = k3;
/// The even 32-bit elements of a vector.
const EVEN: AsmRegisterK = k4;

/// Sets of elements of kernels that need several; they use none of the masks above.
const SETS: [AsmRegisterK; 4] = [k1, k2, k3, k4];

/// Emits vector instructions of one width. Methods are named after the instruction, operands in Intel's order.
pub(crate) struct Assembler {
    pub(crate) asm: CodeAssembler,
    pub(crate) width: Width,
}

/// `d = op(a)`.
macro_rules! one_source {
    ($($name:ident)*) => { $(
        pub(crate) fn $name(&mut self, d: Reg, a: impl Into<Operand>) -> Emit {
            match (self.width, a.into()) {
                (Width::Ymm, Operand::Reg(a)) => self.asm.$name(d.ymm(), a.ymm()),
                (Width::Ymm, Operand::Mem(a)) => self.asm.$name(d.ymm(), ymmword_ptr(a)),
                (Width::Zmm, Operand::Reg(a)) => self.asm.$name(d.zmm(), a.zmm()),
                (Width::Zmm, Operand::Mem(a)) => self.asm.$name(d.zmm(), zmmword_ptr(a)),
            }
        }
    )* };
}

/// `d = op(a, b)`, or `d = op(d, a, b)`.
macro_rules! two_sources {
    ($($name:ident)*) => { $(
        pub(crate) fn $name(&mut self, d: Reg, a: Reg, b: impl Into<Operand>) -> Emit {
            match (self.width, b.into()) {
                (Width::Ymm, Operand::Reg(b)) => self.asm.$name(d.ymm(), a.ymm(), b.ymm()),
                (Width::Ymm, Operand::Mem(b)) => self.asm.$name(d.ymm(), a.ymm(), ymmword_ptr(b)),
                (Width::Zmm, Operand::Reg(b)) => self.asm.$name(d.zmm(), a.zmm(), b.zmm()),
                (Width::Zmm, Operand::Mem(b)) => self.asm.$name(d.zmm(), a.zmm(), zmmword_ptr(b)),
            }
        }
    )* };
}

/// `d = op(a, b)` on all bits: EVEX has names of its own for it.
macro_rules! bitwise {
    ($($name:ident: $vex:ident $evex:ident;)*) => { $(
        pub(crate) fn $name(&mut self, d: Reg, a: Reg, b: impl Into<Operand>) -> Emit {
            match (self.width, b.into()) {
                (Width::Ymm, Operand::Reg(b)) => self.asm.$vex(d.ymm(), a.ymm(), b.ymm()),
                (Width::Ymm, Operand::Mem(b)) => self.asm.$vex(d.ymm(), a.ymm(), ymmword_ptr(b)),
                (Width::Zmm, Operand::Reg(b)) => self.asm.$evex(d.zmm(), a.zmm(), b.zmm()),
                (Width::Zmm, Operand::Mem(b)) => self.asm.$evex(d.zmm(), a.zmm(), zmmword_ptr(b)),
            }
        }
    )* };
}

/// `d = op(a, immediate)`.
macro_rules! immediate_shift {
    ($($name:ident)*) => { $(
        pub(crate) fn $name(&mut self, d: Reg, a: Reg, count: u32) -> Emit {
            match self.width {
                Width::Ymm => self.asm.$name(d.ymm(), a.ymm(), count),
                Width::Zmm => self.asm.$name(d.zmm(), a.zmm(), count),
            }
        }
    )* };
}

/// `d = every element is the 32 bits at m`.
macro_rules! broadcast {
    ($($name:ident)*) => { $(
        pub(crate) fn $name(&mut self, d: Reg, m: AsmMemoryOperand) -> Emit {
            match self.width {
                Width::Ymm => self.asm.$name(d.ymm(), dword_ptr(m)),
                Width::Zmm => self.asm.$name(d.zmm(), dword_ptr(m)),
            }
        }
    )* };
}

impl Assembler {
    pub(crate) fn new(width: Width) -> Result<Assembler, IcedError> {
        let mut asm = CodeAssembler::new(64)?;
        // An EVEX vpdpbusd of 256 bits would fault on CPUs with AVX-VNNI alone, a VEX one on those without it.
        asm.set_prefer_vex(width == Width::Ymm);
        Ok(Assembler { asm, width })
    }

    /// Ends the function and assembles it. The code can be placed anywhere.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>, IcedError> {
        self.asm.vzeroupper()?;
        self.asm.ret()?;
        self.asm.assemble(0)
    }

    one_source! { vmovaps vmovups vcvtdq2ps vcvtps2dq vcvttps2dq vsqrtps vpabsd }

    two_sources! {
        vpdpbusd vpmaddwd vpmaddubsw vfmadd231ps vfmadd132ps vfnmadd231ps
        vpaddd vpaddq vpaddsw vpsubd vpsubw vpmulld vpmuldq vpmulhrsw
        vpsllvd vpsllvq vpsravd vpsrlvd vpsrlvq
        vmulps vaddps vsubps vdivps vmaxps vminps vpermps
        vpaddw vpmaxsw vpminsw vpunpcklbw vpunpckhbw vpunpcklwd vpunpckhwd
        vpackssdw vpacksswb vpackuswb vpmaxub vpmaxsb vpminub vpmaxsd vpminsd vpaddusb vpshufb vpermd
    }

    immediate_shift! { vpslld vpsllq vpsrlq vpsllw vpsraw vpsrad }

    broadcast! { vpbroadcastd vbroadcastss }

    bitwise! {
        bitand: vpand vpandd;
        bitor: vpor vpord;
        bitxor: vpxor vpxord;
    }

    /// A whole vector to `m`.
    pub(crate) fn store_vector(&mut self, m: AsmMemoryOperand, a: Reg) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vmovups(ymmword_ptr(m), a.ymm()),
            Width::Zmm => self.asm.vmovups(zmmword_ptr(m), a.zmm()),
        }
    }

    /// Half a vector of bytes at `m`, sign-extended to 16 bits.
    pub(crate) fn load_bytes_as_words(&mut self, d: Reg, m: AsmMemoryOperand) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vpmovsxbw(d.ymm(), xmmword_ptr(m)),
            Width::Zmm => self.asm.vpmovsxbw(d.zmm(), ymmword_ptr(m)),
        }
    }

    /// 128-bit lane l of `d` = 16 bytes at `m + l·stride`, on 256 bits.
    pub(crate) fn load_lanes(&mut self, d: Reg, m: AsmMemoryOperand, stride: i32) -> Emit {
        self.asm.vmovdqu(d.xmm(), xmmword_ptr(m))?;
        self.asm.vinserti128(d.ymm(), d.ymm(), xmmword_ptr(m + stride), 1)
    }

    /// Half a vector of bytes at `m`, zero-extended to 16 bits.
    pub(crate) fn load_codes_as_words(&mut self, d: Reg, m: AsmMemoryOperand) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vpmovzxbw(d.ymm(), xmmword_ptr(m)),
            Width::Zmm => self.asm.vpmovzxbw(d.zmm(), ymmword_ptr(m)),
        }
    }

    /// Stores half a vector of bytes: 16-bit elements of `a` that are within the range of bytes, signed or not.
    /// Overwrites `a`.
    pub(crate) fn store_words_as_bytes(&mut self, m: AsmMemoryOperand, a: Reg, signed: bool) -> Emit {
        match self.width {
            Width::Ymm => {
                if signed {
                    self.vpacksswb(a, a, a)?
                } else {
                    self.vpackuswb(a, a, a)?
                }
                self.asm.vpermq(a.ymm(), a.ymm(), 0xd8)?;
                self.asm.vmovdqu(xmmword_ptr(m), a.xmm())
            }
            Width::Zmm => self.asm.vpmovwb(ymmword_ptr(m), a.zmm()),
        }
    }

    /// A quarter of a vector of bytes at `m` as 32-bit elements.
    pub(crate) fn load_bytes_as_dwords(&mut self, d: Reg, m: AsmMemoryOperand, signed: bool) -> Emit {
        match (self.width, signed) {
            (Width::Ymm, true) => self.asm.vpmovsxbd(d.ymm(), qword_ptr(m)),
            (Width::Ymm, false) => self.asm.vpmovzxbd(d.ymm(), qword_ptr(m)),
            (Width::Zmm, true) => self.asm.vpmovsxbd(d.zmm(), xmmword_ptr(m)),
            (Width::Zmm, false) => self.asm.vpmovzxbd(d.zmm(), xmmword_ptr(m)),
        }
    }

    /// Half a vector of 16-bit elements at `m` as 32-bit ones.
    pub(crate) fn load_words_as_dwords(&mut self, d: Reg, m: AsmMemoryOperand, signed: bool) -> Emit {
        match (self.width, signed) {
            (Width::Ymm, true) => self.asm.vpmovsxwd(d.ymm(), xmmword_ptr(m)),
            (Width::Ymm, false) => self.asm.vpmovzxwd(d.ymm(), xmmword_ptr(m)),
            (Width::Zmm, true) => self.asm.vpmovsxwd(d.zmm(), ymmword_ptr(m)),
            (Width::Zmm, false) => self.asm.vpmovzxwd(d.zmm(), ymmword_ptr(m)),
        }
    }

    /// Stores half a vector of 16-bit elements: the 32-bit ones of `a`, saturated. Overwrites `a` and `t`.
    pub(crate) fn store_dwords_as_words(
        &mut self,
        m: AsmMemoryOperand,
        a: Reg,
        signed: bool,
        t: Reg,
    ) -> Emit {
        match (self.width, signed) {
            (Width::Ymm, _) => {
                self.asm.vextracti128(t.xmm(), a.ymm(), 1)?;
                match signed {
                    true => self.asm.vpackssdw(a.xmm(), a.xmm(), t.xmm())?,
                    false => self.asm.vpackusdw(a.xmm(), a.xmm(), t.xmm())?,
                }
                self.asm.vmovdqu(xmmword_ptr(m), a.xmm())
            }
            (Width::Zmm, true) => self.asm.vpmovsdw(ymmword_ptr(m), a.zmm()),
            (Width::Zmm, false) => {
                self.not_negative(a, t)?;
                self.asm.vpmovusdw(ymmword_ptr(m), a.zmm())
            }
        }
    }

    /// Stores a quarter of a vector of bytes: the 32-bit elements of `a`, saturated. Overwrites `a` and `t`.
    pub(crate) fn store_dwords_as_bytes(
        &mut self,
        m: AsmMemoryOperand,
        a: Reg,
        signed: bool,
        t: Reg,
    ) -> Emit {
        match (self.width, signed) {
            (Width::Ymm, _) => {
                self.asm.vextracti128(t.xmm(), a.ymm(), 1)?;
                self.asm.vpackssdw(a.xmm(), a.xmm(), t.xmm())?;
                match signed {
                    true => self.asm.vpacksswb(a.xmm(), a.xmm(), a.xmm())?,
                    false => self.asm.vpackuswb(a.xmm(), a.xmm(), a.xmm())?,
                }
                self.asm.vmovq(qword_ptr(m), a.xmm())
            }
            (Width::Zmm, true) => self.asm.vpmovsdb(xmmword_ptr(m), a.zmm()),
            (Width::Zmm, false) => {
                self.not_negative(a, t)?;
                self.asm.vpmovusdb(xmmword_ptr(m), a.zmm())
            }
        }
    }

    /// a = max(a, 0), on 512 bits. Overwrites `t`.
    fn not_negative(&mut self, a: Reg, t: Reg) -> Emit {
        self.asm.vpxord(t.zmm(), t.zmm(), t.zmm())?;
        self.asm.vpmaxsd(a.zmm(), a.zmm(), t.zmm())
    }

    /// Every 64-bit element of `d` = that at `m`.
    pub(crate) fn broadcast_wide(&mut self, d: Reg, m: AsmMemoryOperand) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vpbroadcastq(d.ymm(), qword_ptr(m)),
            Width::Zmm => self.asm.vpbroadcastq(d.zmm(), qword_ptr(m)),
        }
    }

    /// 64-bit elements of `d` = `a` >> the first element of `count`, without the sign.
    pub(crate) fn shift_right_wide_by(&mut self, d: Reg, a: Reg, count: Reg) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vpsrlq(d.ymm(), a.ymm(), count.xmm()),
            Width::Zmm => self.asm.vpsrlq(d.zmm(), a.zmm(), count.xmm()),
        }
    }

    /// Every 32-bit element of `d` = `bits`. Overwrites eax.
    pub(crate) fn splat(&mut self, d: Reg, bits: u32) -> Emit {
        self.asm.mov(eax, bits)?;
        self.asm.vmovd(d.xmm(), eax)?;
        match self.width {
            Width::Ymm => self.asm.vpbroadcastd(d.ymm(), d.xmm()),
            Width::Zmm => self.asm.vpbroadcastd(d.zmm(), d.xmm()),
        }
    }

    /// Every 32-bit element of `d` = the first one of `a`.
    pub(crate) fn splat_first(&mut self, d: Reg, a: Reg) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vbroadcastss(d.ymm(), a.xmm()),
            Width::Zmm => self.asm.vbroadcastss(d.zmm(), a.xmm()),
        }
    }

    /// All floats of `x` joined, half of them with the other half and so on, in its first elements. Overwrites `t`.
    pub(crate) fn join_elements(&mut self, x: Reg, t: Reg, join: Join) -> Emit {
        if self.width == Width::Zmm {
            self.asm.vextractf64x4(t.ymm(), x.zmm(), 1)?;
            match join {
                Join::Min => self.asm.vminps(x.ymm(), x.ymm(), t.ymm())?,
                Join::Max => self.asm.vmaxps(x.ymm(), x.ymm(), t.ymm())?,
                Join::Sum => self.asm.vaddps(x.ymm(), x.ymm(), t.ymm())?,
            }
        }
        let with_t = |asm: &mut CodeAssembler| match join {
            Join::Min => asm.vminps(x.xmm(), x.xmm(), t.xmm()),
            Join::Max => asm.vmaxps(x.xmm(), x.xmm(), t.xmm()),
            Join::Sum => asm.vaddps(x.xmm(), x.xmm(), t.xmm()),
        };
        self.asm.vextractf128(t.xmm(), x.ymm(), 1)?;
        with_t(&mut self.asm)?;
        for order in [0b0100_1110, 0b1011_0001] {
            self.asm.vpermilps(t.xmm(), x.xmm(), order)?;
            with_t(&mut self.asm)?;
        }
        Ok(())
    }

    /// Floats rounded to integers.
    pub(crate) fn round(&mut self, d: Reg, a: impl Into<Operand>, how: Rounding) -> Emit {
        // Without an exception for what is lost.
        let how = 8 | how as u32;
        match (self.width, a.into()) {
            (Width::Ymm, Operand::Reg(a)) => self.asm.vroundps(d.ymm(), a.ymm(), how),
            (Width::Ymm, Operand::Mem(a)) => self.asm.vroundps(d.ymm(), ymmword_ptr(a), how),
            (Width::Zmm, Operand::Reg(a)) => self.asm.vrndscaleps(d.zmm(), a.zmm(), how),
            (Width::Zmm, Operand::Mem(a)) => self.asm.vrndscaleps(d.zmm(), zmmword_ptr(a), how),
        }
    }

    /// A mask of the floats of which the comparison with this number is true: a register of masks on 512 bits.
    pub(crate) fn compare_f32(&mut self, d: Mask, a: Reg, b: impl Into<Operand>, predicate: u32) -> Emit {
        match b.into() {
            Operand::Reg(b) => self.asm.vcmpps(d.k(), a.zmm(), b.zmm(), predicate),
            Operand::Mem(b) => self.asm.vcmpps(d.k(), a.zmm(), zmmword_ptr(b), predicate),
        }
    }

    /// The same on 256 bits: all bits of an element, or none.
    pub(crate) fn compare_f32_to_vector(
        &mut self,
        d: Reg,
        a: Reg,
        b: impl Into<Operand>,
        predicate: u32,
    ) -> Emit {
        match b.into() {
            Operand::Reg(b) => self.asm.vcmpps(d.ymm(), a.ymm(), b.ymm(), predicate),
            Operand::Mem(b) => self.asm.vcmpps(d.ymm(), a.ymm(), ymmword_ptr(b), predicate),
        }
    }

    /// A mask of the integers that are greater than this number, or else equal it.
    pub(crate) fn compare_i32(&mut self, d: Mask, a: Reg, b: impl Into<Operand>, greater: bool) -> Emit {
        let predicate = if greater { 6 } else { 0 };
        match b.into() {
            Operand::Reg(b) => self.asm.vpcmpd(d.k(), a.zmm(), b.zmm(), predicate),
            Operand::Mem(b) => self.asm.vpcmpd(d.k(), a.zmm(), zmmword_ptr(b), predicate),
        }
    }

    /// The same on 256 bits.
    pub(crate) fn compare_i32_to_vector(
        &mut self,
        d: Reg,
        a: Reg,
        b: impl Into<Operand>,
        greater: bool,
    ) -> Emit {
        match (b.into(), greater) {
            (Operand::Reg(b), true) => self.asm.vpcmpgtd(d.ymm(), a.ymm(), b.ymm()),
            (Operand::Mem(b), true) => self.asm.vpcmpgtd(d.ymm(), a.ymm(), ymmword_ptr(b)),
            (Operand::Reg(b), false) => self.asm.vpcmpeqd(d.ymm(), a.ymm(), b.ymm()),
            (Operand::Mem(b), false) => self.asm.vpcmpeqd(d.ymm(), a.ymm(), ymmword_ptr(b)),
        }
    }

    /// Elements of `yes` in the mask, of `no` elsewhere, on 512 bits.
    pub(crate) fn select(&mut self, d: Reg, mask: Mask, yes: impl Into<Operand>, no: Reg) -> Emit {
        match yes.into() {
            Operand::Reg(yes) => self.asm.vblendmps(mask.of(d.zmm()), no.zmm(), yes.zmm()),
            Operand::Mem(yes) => self.asm.vblendmps(mask.of(d.zmm()), no.zmm(), zmmword_ptr(yes)),
        }
    }

    /// The same on 256 bits, by the sign of the elements of `mask`.
    pub(crate) fn select_by_vector(&mut self, d: Reg, mask: Reg, yes: impl Into<Operand>, no: Reg) -> Emit {
        match yes.into() {
            Operand::Reg(yes) => self.asm.vblendvps(d.ymm(), no.ymm(), yes.ymm(), mask.ymm()),
            Operand::Mem(yes) => self.asm.vblendvps(d.ymm(), no.ymm(), ymmword_ptr(yes), mask.ymm()),
        }
    }

    /// Empties set `i` of elements, of [`SETS`]: a mask register on 512 bits, `own` on 256.
    pub(crate) fn clear_mask(&mut self, i: usize, own: Reg) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vxorps(own.ymm(), own.ymm(), own.ymm()),
            Width::Zmm => self.asm.kxorw(SETS[i], SETS[i], SETS[i]),
        }
    }

    /// Adds to set `i` the 32-bit elements where `a` or `b` is NaN. Overwrites `a`, on 256 bits.
    pub(crate) fn mask_unordered(&mut self, i: usize, own: Reg, a: Reg, b: Reg) -> Emit {
        match self.width {
            Width::Ymm => {
                self.asm.vcmpunordps(a.ymm(), a.ymm(), b.ymm())?;
                self.asm.vorps(own.ymm(), own.ymm(), a.ymm())
            }
            Width::Zmm => {
                self.asm.vcmpunordps(k7, a.zmm(), b.zmm())?;
                self.asm.korw(SETS[i], SETS[i], k7)
            }
        }
    }

    /// Elements of `d` in set `i` = those of `ones`, which has all bits set.
    pub(crate) fn set_masked(&mut self, d: Reg, i: usize, own: Reg, ones: Reg) -> Emit {
        match (self.width, i) {
            (Width::Ymm, _) => self.asm.vorps(d.ymm(), d.ymm(), own.ymm()),
            (Width::Zmm, 0) => self.asm.vmovdqa32(d.zmm().k1(), ones.zmm()),
            (Width::Zmm, 1) => self.asm.vmovdqa32(d.zmm().k2(), ones.zmm()),
            (Width::Zmm, 2) => self.asm.vmovdqa32(d.zmm().k3(), ones.zmm()),
            (Width::Zmm, _) => self.asm.vmovdqa32(d.zmm().k4(), ones.zmm()),
        }
    }

    /// Sets up the masks of [`merge_odd`](Self::merge_odd) and of stores of `stored` elements.
    pub(crate) fn set_masks(&mut self, stored: usize) -> Emit {
        if self.width == Width::Zmm {
            self.asm.mov(eax, 0xaaaa_u32)?;
            self.asm.kmovw(ODD, eax)?;
            self.asm.knotw(EVEN, ODD)?;
            self.asm.mov(rax, u64::MAX >> (64 - stored.clamp(1, 64)))?;
            self.asm.kmovq(STORED, rax)?;
        }
        Ok(())
    }

    /// Odd 32-bit elements of `d` = those of `a`.
    pub(crate) fn merge_odd(&mut self, d: Reg, a: Reg) -> Emit {
        match self.width {
            Width::Ymm => self.asm.vpblendd(d.ymm(), d.ymm(), a.ymm(), 0xaa),
            Width::Zmm => self.asm.vmovdqa32(d.zmm().k1(), a.zmm()),
        }
    }

    /// Odd 32-bit elements of `d` = the even ones before them of `a`. Overwrites `a`.
    pub(crate) fn merge_even_as_odd(&mut self, d: Reg, a: Reg) -> Emit {
        match self.width {
            Width::Ymm => {
                self.vpsllq(a, a, 32)?;
                self.merge_odd(d, a)
            }
            Width::Zmm => self.asm.vmovsldup(d.zmm().k1(), a.zmm()),
        }
    }

    /// High halves of the 64-bit elements of `even` and `odd` in turn, in one of the two, which is the result. Overwrites
    /// both.
    pub(super) fn merge_high_halves(&mut self, even: Reg, odd: Reg) -> Result<Reg, IcedError> {
        match self.width {
            Width::Ymm => {
                self.asm.vmovshdup(even.ymm(), even.ymm())?;
                self.merge_odd(even, odd)?;
                Ok(even)
            }
            Width::Zmm => {
                self.asm.vmovshdup(odd.zmm().k4(), even.zmm())?;
                Ok(odd)
            }
        }
    }

    /// 64-bit elements of `d` = `a` >> counts. On 256 bits the shift is logical: AVX2 has no other.
    pub(crate) fn shift_right_wide(&mut self, d: Reg, a: Reg, counts: AsmMemoryOperand) -> Emit {
        match self.width {
            Width::Ymm => self.vpsrlvq(d, a, counts),
            Width::Zmm => self.asm.vpsravq(d.zmm(), a.zmm(), zmmword_ptr(counts)),
        }
    }

    /// RDBPOT: x = sign(x)·((|x| + half) >> right). Overwrites `t`.
    ///
    /// |x| + half stays below 2^32, so unsigned arithmetic cannot overflow, and right = 0 needs no special case.
    pub(crate) fn round_shift_away(
        &mut self,
        x: Reg,
        t: Reg,
        half: AsmMemoryOperand,
        right: AsmMemoryOperand,
    ) -> Emit {
        self.vpabsd(t, x)?;
        self.vpaddd(t, t, half)?;
        self.vpsrlvd(t, t, right)?;
        match self.width {
            Width::Ymm => self.asm.vpsignd(x.ymm(), t.ymm(), x.ymm()),
            Width::Zmm => {
                self.asm.vpmovd2m(NEGATIVE, x.zmm())?;
                self.asm.vpxord(x.zmm(), x.zmm(), x.zmm())?;
                self.asm.vpsubd(t.zmm().k2(), x.zmm(), t.zmm())?;
                self.vmovaps(x, t)
            }
        }
    }

    /// Stores `bytes` bytes of `a`, beginning with byte `from`, to `m`. `from` is a multiple of `bytes` rounded up to
    /// a power of two. A length of 512-bit vectors that no plain store has takes the mask of
    /// [`set_masks`](Self::set_masks), in elements of `element` bytes. Overwrites `t` when `from` is not 0.
    pub(crate) fn store(
        &mut self,
        m: AsmMemoryOperand,
        a: Reg,
        from: usize,
        bytes: usize,
        element: usize,
        t: Reg,
    ) -> Emit {
        match self.width {
            Width::Ymm => self.store_pieces(m, a, from, bytes, t),
            Width::Zmm => self.store_masked(m, a, from, bytes, element, t),
        }
    }

    fn store_masked(
        &mut self,
        m: AsmMemoryOperand,
        a: Reg,
        from: usize,
        bytes: usize,
        element: usize,
        t: Reg,
    ) -> Emit {
        let asm = &mut self.asm;
        match (from, bytes) {
            (0, 64) => return asm.vmovups(zmmword_ptr(m), a.zmm()),
            (0, 32) => return asm.vmovups(ymmword_ptr(m), a.ymm()),
            (0, 16) => return asm.vmovups(xmmword_ptr(m), a.xmm()),
            (32, 32) => return asm.vextracti64x4(ymmword_ptr(m), a.zmm(), 1),
            (from, 16) => return asm.vextracti32x4(xmmword_ptr(m), a.zmm(), (from / 16) as u32),
            _ => {}
        }
        let source = match from {
            0 => a,
            32 => {
                asm.vextracti64x4(t.ymm(), a.zmm(), 1)?;
                t
            }
            _ => {
                asm.vextracti32x4(t.xmm(), a.zmm(), (from / 16) as u32)?;
                t
            }
        };
        // The narrowest store that holds the bytes: it crosses cache lines least often.
        match (element, bytes) {
            (4, ..=16) => asm.vmovups(xmmword_ptr(m).k3(), source.xmm()),
            (4, ..=32) => asm.vmovups(ymmword_ptr(m).k3(), source.ymm()),
            (4, _) => asm.vmovups(zmmword_ptr(m).k3(), source.zmm()),
            (_, ..=16) => asm.vmovdqu8(xmmword_ptr(m).k3(), source.xmm()),
            (_, ..=32) => asm.vmovdqu8(ymmword_ptr(m).k3(), source.ymm()),
            _ => asm.vmovdqu8(zmmword_ptr(m).k3(), source.zmm()),
        }
    }

    /// AVX2 has no masked byte stores: whole vectors, then halves, and so on down to single bytes.
    fn store_pieces(&mut self, m: AsmMemoryOperand, a: Reg, from: usize, bytes: usize, t: Reg) -> Emit {
        let asm = &mut self.asm;
        if (from, bytes) == (0, 32) {
            return asm.vmovups(ymmword_ptr(m), a.ymm());
        }
        let (mut done, mut in_t) = (0, false);
        while done < bytes {
            let at = from + done;
            let piece = [16, 8, 4, 2, 1]
                .into_iter()
                .find(|p| *p <= bytes - done && at.is_multiple_of(*p))
                .unwrap_or(1);
            let to = m + done as i32;
            done += piece;
            if at >= 16 && piece == 16 {
                asm.vextracti128(xmmword_ptr(to), a.ymm(), 1)?;
                continue;
            }
            if at >= 16 && !in_t {
                asm.vextracti128(t.xmm(), a.ymm(), 1)?;
                in_t = true;
            }
            let source = if at >= 16 { t.xmm() } else { a.xmm() };
            let index = (at % 16 / piece) as u32;
            match (piece, index) {
                (16, _) => asm.vmovups(xmmword_ptr(to), source)?,
                (8, 0) => asm.vmovq(qword_ptr(to), source)?,
                (8, _) => asm.vpextrq(qword_ptr(to), source, index)?,
                (4, 0) => asm.vmovd(dword_ptr(to), source)?,
                (4, _) => asm.vpextrd(dword_ptr(to), source, index)?,
                (2, _) => asm.vpextrw(word_ptr(to), source, index)?,
                _ => asm.vpextrb(byte_ptr(to), source, index)?,
            }
        }
        Ok(())
    }
}
