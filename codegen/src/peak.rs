//! What the arithmetic units of this CPU can do at best: the yardstick of "fraction of peak".

use crate::{
    dense::{
        asm::{Reg, configure},
        spec::Product,
    },
    executable::Executable,
    tier::{Isa, Tier},
};
use iced_x86::{IcedError, code_asm::*};
use std::{
    io,
    time::{Duration, Instant},
};

/// Why the peak of a tier could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum PeakError {
    /// The tier's instructions would fault.
    #[error("this CPU has no {0}")]
    Unavailable(&'static str),
    /// The operating system gave no executable memory.
    #[error("no memory for machine code: {0}")]
    Memory(#[from] io::Error),
    /// The assembler refused an instruction: a defect of this module.
    #[error("the assembler refused an instruction: {0}")]
    Assembler(String),
}

impl From<IcedError> for PeakError {
    fn from(error: IcedError) -> PeakError {
        PeakError::Assembler(error.to_string())
    }
}

/// How long one run takes, about.
const RUN: Duration = Duration::from_millis(3);
/// Runs, of which the fastest counts: other processes and the clock's way up only ever cost time.
const RUNS: usize = 7;
/// Trips of the run that sets the length of the others.
const TRIAL: u64 = 20_000;

/// Four activations and four weights.
const CODES: [u32; 2] = [0xf0a5_3c77, 0x7f81_a55a];

type Loop = extern "sysv64" fn(trips: u64);

/// Multiply-accumulates per second, in 10^9, of one core: independent accumulators in a loop without memory access,
/// with the instructions that the tier's tiles use. Takes about 25 ms.
pub fn measure(tier: &Tier, product: Product) -> Result<f64, PeakError> {
    if !tier.is_available() {
        return Err(PeakError::Unavailable(tier.name));
    }
    // A tier without a form of its own for narrow weights multiplies them as any others.
    let product = if product == Product::U8S7 { tier.product_of_codes(true) } else { product };
    let isa = tier.isas(product).next().unwrap_or(tier.isa);
    let (code, macs) = match isa {
        Isa::AmxInt8 => emit_matrix()?,
        _ => emit(isa, product)?,
    };
    let code = Executable::new(&code)?;
    #[allow(unsafe_code, reason = "calls code that was assembled here")]
    // SAFETY: `emit` made a function of this signature from instructions that the tier, and so this CPU, has. It
    // touches caller-saved registers only and no memory but its own stack, and `code` outlives the calls.
    let run = unsafe { std::mem::transmute::<*const u8, Loop>(code.entry()) };
    let time = |trips: u64| {
        let start = Instant::now();
        run(trips);
        start.elapsed().as_secs_f64().max(1e-9)
    };
    let trips = (TRIAL as f64 * RUN.as_secs_f64() / time(TRIAL)).max(1.0) as u64;
    let best = (0..RUNS).map(|_| time(trips)).fold(f64::INFINITY, f64::min);
    Ok(macs as f64 * trips as f64 / best / 1e9)
}

/// A loop over independent accumulators, and the multiply-accumulates of one trip.
fn emit(isa: Isa, product: Product) -> Result<(Vec<u8>, usize), IcedError> {
    // Latency times throughput is 10 at most (5 cycles, two a cycle).
    let (accumulators, vector_bytes) = match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => (24, 64),
        Isa::AvxVnni | Isa::Avx2 => (12, 32),
        Isa::XmmVnni | Isa::Xmm => (12, 16),
    };
    let mut asm = CodeAssembler::new(64)?;
    asm.set_prefer_vex(vector_bytes != 64);
    let [a, b, t, ones] = [0, 1, 2, 3].map(|i| Reg(accumulators + i));
    // Not zeros: they take less power, so the clock would be higher than real data let it be.
    let (x, y) = match product {
        Product::U8S8 | Product::U8S7 => (CODES[0], CODES[1]),
        Product::F32 => (1.25f32.to_bits(), (-0.7f32).to_bits()),
    };
    let operands = [(a, x), (b, y), (t, 0), (ones, 0x0001_0001)];
    for (register, bits) in (0..accumulators).map(|i| (Reg(i), 0)).chain(operands) {
        fill(&mut asm, isa, register, bits)?;
    }
    let mut top = asm.create_label();
    asm.set_label(&mut top)?;
    for accumulator in (0..accumulators).map(Reg) {
        match product {
            Product::U8S8 => multiply_codes(&mut asm, isa, accumulator, a, b, t)?,
            Product::U8S7 => multiply_narrow_codes(&mut asm, isa, accumulator, [a, b, t, ones])?,
            Product::F32 => multiply_floats(&mut asm, isa, accumulator, a, b, t)?,
        }
    }
    asm.dec(rdi)?;
    asm.jne(top)?;
    if isa != Isa::Xmm {
        asm.vzeroupper()?;
    }
    asm.ret()?;
    let per_vector = match (product, isa) {
        (Product::U8S8, Isa::Avx2 | Isa::Xmm) => vector_bytes / 2,
        (Product::U8S8 | Product::U8S7, _) => vector_bytes,
        (Product::F32, _) => vector_bytes / 4,
    };
    Ok((asm.assemble(0)?, accumulators * per_vector))
}

/// The same for matrix registers of full size: the products of 16 pixels by 16 channels by 64 elements of K.
fn emit_matrix() -> Result<(Vec<u8>, usize), IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    let accumulators = [tmm0, tmm1, tmm2, tmm3];
    // Below the stack pointer, as no function is called.
    let scratch = rsp - 64;
    configure(&mut asm, scratch, 16)?;
    accumulators.iter().try_for_each(|t| asm.tilezero(*t))?;
    // A load without a stride fills all rows; not with zeros, as above.
    for (operand, bits) in [(tmm4, CODES[0]), (tmm5, CODES[1])] {
        fill(&mut asm, Isa::AmxInt8, Reg(0), bits)?;
        asm.vmovups(zmmword_ptr(scratch), zmm0)?;
        asm.tileloadd(operand, ptr(scratch))?;
    }
    let mut top = asm.create_label();
    asm.set_label(&mut top)?;
    accumulators.iter().try_for_each(|t| asm.tdpbusd(*t, tmm4, tmm5))?;
    asm.dec(rdi)?;
    asm.jne(top)?;
    asm.tilerelease()?;
    asm.vzeroupper()?;
    asm.ret()?;
    Ok((asm.assemble(0)?, accumulators.len() * 16 * 16 * 64))
}

fn fill(asm: &mut CodeAssembler, isa: Isa, x: Reg, bits: u32) -> Result<(), IcedError> {
    asm.mov(eax, bits)?;
    match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => asm.vpbroadcastd(x.zmm(), eax),
        Isa::AvxVnni | Isa::Avx2 => {
            asm.vmovd(x.xmm(), eax)?;
            asm.vpbroadcastd(x.ymm(), x.xmm())
        }
        Isa::XmmVnni => {
            asm.vmovd(x.xmm(), eax)?;
            asm.vpbroadcastd(x.xmm(), x.xmm())
        }
        Isa::Xmm => {
            asm.movd(x.xmm(), eax)?;
            asm.pshufd(x.xmm(), x.xmm(), 0)
        }
    }
}

fn multiply_codes(
    asm: &mut CodeAssembler,
    isa: Isa,
    x: Reg,
    a: Reg,
    b: Reg,
    t: Reg,
) -> Result<(), IcedError> {
    match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => asm.vpdpbusd(x.zmm(), a.zmm(), b.zmm()),
        Isa::AvxVnni => asm.vpdpbusd(x.ymm(), a.ymm(), b.ymm()),
        Isa::XmmVnni => asm.vpdpbusd(x.xmm(), a.xmm(), b.xmm()),
        Isa::Avx2 => {
            asm.vpmaddwd(t.ymm(), a.ymm(), b.ymm())?;
            asm.vpaddd(x.ymm(), x.ymm(), t.ymm())
        }
        Isa::Xmm => {
            asm.movdqa(t.xmm(), a.xmm())?;
            asm.pmaddwd(t.xmm(), b.xmm())?;
            asm.paddd(x.xmm(), t.xmm())
        }
    }
}

/// By weights that need no widening. Only of instruction sets without a dot product.
fn multiply_narrow_codes(
    asm: &mut CodeAssembler,
    isa: Isa,
    x: Reg,
    [a, b, t, ones]: [Reg; 4],
) -> Result<(), IcedError> {
    if isa == Isa::Xmm {
        asm.movdqa(t.xmm(), a.xmm())?;
        asm.pmaddubsw(t.xmm(), b.xmm())?;
        asm.pmaddwd(t.xmm(), ones.xmm())?;
        return asm.paddd(x.xmm(), t.xmm());
    }
    asm.vpmaddubsw(t.ymm(), a.ymm(), b.ymm())?;
    asm.vpmaddwd(t.ymm(), t.ymm(), ones.ymm())?;
    asm.vpaddd(x.ymm(), x.ymm(), t.ymm())
}

fn multiply_floats(
    asm: &mut CodeAssembler,
    isa: Isa,
    x: Reg,
    a: Reg,
    b: Reg,
    t: Reg,
) -> Result<(), IcedError> {
    match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => asm.vfmadd231ps(x.zmm(), a.zmm(), b.zmm()),
        Isa::AvxVnni | Isa::Avx2 => asm.vfmadd231ps(x.ymm(), a.ymm(), b.ymm()),
        Isa::XmmVnni => asm.vfmadd231ps(x.xmm(), a.xmm(), b.xmm()),
        Isa::Xmm => {
            asm.movaps(t.xmm(), a.xmm())?;
            asm.mulps(t.xmm(), b.xmm())?;
            asm.addps(x.xmm(), t.xmm())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::TIERS;

    #[test]
    fn every_tier_of_this_cpu_has_a_plausible_peak() {
        for tier in &TIERS {
            for product in [Product::U8S8, Product::U8S7, Product::F32] {
                match measure(tier, product) {
                    // From a quarter of a vector a cycle at 1 GHz to far more than any CPU does.
                    Ok(peak) => assert!((0.5..20000.0).contains(&peak), "{tier} {product:?}: {peak}"),
                    Err(PeakError::Unavailable(_)) => assert!(!tier.is_available()),
                    Err(error) => panic!("{tier}: {error}"),
                }
            }
        }
    }
}
