//! How fast one core reads memory, by how much of it there is: beside [`peak`](crate::peak), the other yardstick of what
//! a layer can reach.

use crate::{
    dense::{
        asm::Reg,
        pack::PanelFormat,
        spec::{Product, SLACK},
    },
    executable::Executable,
    peak::PeakError,
    tier::{Isa, Tier},
};
use iced_x86::{IcedError, code_asm::*};
use raw_cpuid::{CacheType, CpuId};
use std::{
    io,
    time::{Duration, Instant},
};

/// A data cache of the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    /// 1 for the one next to the core.
    pub level: u8,
    /// Its size. The larger levels may be shared with other cores.
    pub bytes: u64,
}

/// The data caches of this CPU, the nearest first, as it describes itself. Hypervisors may say anything; where nothing
/// is said, sizes that are common.
pub fn caches() -> Vec<Cache> {
    let described = CpuId::new().get_cache_parameters();
    let mut caches: Vec<Cache> = described
        .into_iter()
        .flatten()
        .filter(|c| matches!(c.cache_type(), CacheType::Data | CacheType::Unified))
        .map(|c| Cache {
            level: c.level(),
            bytes: (c.associativity() * c.physical_line_partitions() * c.coherency_line_size()) as u64
                * c.sets() as u64,
        })
        .collect();
    caches.sort_by_key(|c| c.level);
    // A level that is no larger than the one below would be of no use to what follows, so it is none.
    caches.dedup_by(|outer, inner| outer.level == inner.level || outer.bytes <= inner.bytes);
    match caches.first() {
        Some(first) if first.level == 1 && first.bytes > 0 => caches,
        _ => COMMON.to_vec(),
    }
}

const COMMON: [Cache; 3] = [
    Cache { level: 1, bytes: 32 << 10 },
    Cache { level: 2, bytes: 1 << 20 },
    Cache { level: 3, bytes: 32 << 20 },
];

/// The name of this CPU, as it gives it.
pub fn cpu_name() -> Option<String> {
    let name = CpuId::new().get_processor_brand_string()?;
    Some(name.as_str().split_whitespace().collect::<Vec<_>>().join(" ")).filter(|n| !n.is_empty())
}

/// Bytes that one trip of the loop reads.
const TRIP: usize = 1024;
/// How long one run takes at least, about.
const RUN: Duration = Duration::from_millis(2);
/// Runs, of which the fastest counts.
const RUNS: usize = 7;
/// No more runs are begun after this long.
const LIMIT: Duration = Duration::from_millis(400);

type Loop = extern "sysv64" fn(start: *const u8, trips: u64, passes: u64);

/// Bytes per second, in 10^9, at which one core reads a buffer of about this size from front to back, again and again,
/// with vectors of the tier.
///
/// # Errors
/// Where this CPU lacks the tier or memory is short.
pub fn measure(tier: &Tier, buffer_bytes: usize) -> Result<f64, PeakError> {
    if !tier.is_available() {
        return Err(PeakError::Unavailable(tier.name));
    }
    let code = Executable::new(&emit(tier.isa)?)?;
    #[allow(unsafe_code, reason = "calls code that was assembled here")]
    // SAFETY: `emit` made a function of this signature from instructions that the tier, and so this CPU, has. It
    // writes caller-saved registers only, reads `trips` times `TRIP` bytes, and `code` outlives the calls.
    let run = unsafe { std::mem::transmute::<*const u8, Loop>(code.entry()) };
    let trips = (buffer_bytes / TRIP).max(1);
    let buffer = written_buffer(trips * TRIP)?;
    let start = buffer[buffer.as_ptr().align_offset(SLACK)..].as_ptr();
    let time = |passes: u64| {
        let begin = Instant::now();
        run(start, trips as u64, passes);
        begin.elapsed().as_secs_f64().max(1e-9)
    };
    let begin = Instant::now();
    let passes = (RUN.as_secs_f64() / time(1)).max(1.0) as u64;
    let mut best = time(passes);
    for _ in 1..RUNS {
        if begin.elapsed() < LIMIT {
            best = best.min(time(passes));
        }
    }
    Ok((trips * TRIP) as f64 * passes as f64 / best / 1e9)
}

/// A buffer with room to align its start. Every page is written: pages that never were are all one page of zeros.
fn written_buffer(bytes: usize) -> Result<Vec<u8>, PeakError> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes + SLACK).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    buffer.resize(bytes + SLACK, 1);
    Ok(buffer)
}

/// Loads into registers in turn, and nothing else.
fn emit(isa: Isa) -> Result<Vec<u8>, IcedError> {
    let vector = PanelFormat::new(Product::U8S8, isa, 1).vector_bytes();
    let mut asm = CodeAssembler::new(64)?;
    let (mut pass, mut trip) = (asm.create_label(), asm.create_label());
    asm.set_label(&mut pass)?;
    asm.mov(rax, rdi)?;
    asm.mov(rcx, rsi)?;
    asm.set_label(&mut trip)?;
    for i in 0..TRIP / vector {
        let (x, source) = (Reg(i % 16), rax + (i * vector) as i32);
        match vector {
            64 => asm.vmovups(x.zmm(), zmmword_ptr(source)),
            32 => asm.vmovups(x.ymm(), ymmword_ptr(source)),
            _ => asm.movups(x.xmm(), xmmword_ptr(source)),
        }?;
    }
    asm.add(rax, TRIP as i32)?;
    asm.dec(rcx)?;
    asm.jne(trip)?;
    asm.dec(rdx)?;
    asm.jne(pass)?;
    if vector > 16 {
        asm.vzeroupper()?;
    }
    asm.ret()?;
    asm.assemble(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::TIERS;

    #[test]
    fn caches_grow_with_their_level() {
        let caches = caches();
        assert!(caches.is_sorted_by(|a, b| a.level < b.level && a.bytes < b.bytes), "{caches:?}");
        assert!(caches.iter().all(|c| (4 << 10..16 << 30).contains(&c.bytes)), "{caches:?}");
    }

    #[test]
    fn every_tier_of_this_cpu_reads() {
        for tier in &TIERS {
            match measure(tier, 5000) {
                Ok(speed) => assert!(speed.is_finite() && speed > 0.0, "{tier}: {speed}"),
                Err(PeakError::Unavailable(_)) => assert!(!tier.is_available()),
                Err(error) => panic!("{tier}: {error}"),
            }
        }
    }
}
