//! What a host can do at best, and with it the least time that a layer could take: the roofline model of Williams,
//! Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures" (2009).

use crate::{Error, Tier, quantile::median};
use qcc_codegen::{Work, bandwidth, dense::spec::Product, peak};
use qcc_ir::Device;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What a host can do at best on one thread, in multiply-accumulates a second.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Peaks {
    /// u8 by s8 into s32.
    pub int8: f64,
    /// u8 by s8 of 7 bits: more only where a tier has no instruction for the whole product.
    pub int8_narrow: f64,
    /// f32.
    pub float: f64,
}

/// Memory of one kind, as one thread reads it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemoryLevel {
    /// `L1`, `L2`, `L3`, or `memory`.
    pub name: String,
    /// What it holds, as the CPU says; `None` of main memory. Outer caches may be shared with other cores, and under a
    /// hypervisor with other machines.
    pub capacity_bytes: Option<u64>,
    /// Size of the buffer that was read.
    pub buffer_bytes: u64,
    /// Bytes a second, in 10⁹.
    pub gb_per_s: f64,
}

/// Limits of one core of this host with the instructions of a tier, all of them measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Host {
    /// What the CPU calls itself.
    pub cpu: String,
    /// Name of the tier.
    pub isa: String,
    /// Arithmetic.
    pub peaks: Peaks,
    /// Reading memory, the nearest level first. Levels that no model under test needs are left out.
    pub memory: Vec<MemoryLevel>,
    /// What reading the clock costs, in nanoseconds. It is taken off every layer's time.
    pub clock_ns: f64,
}

/// The buffer for main memory is twice the last cache, which is mostly more than that cache can hide. But not more
/// than this: filling it takes time, and the machine may be small.
const LARGEST_BUFFER: u64 = 1 << 30;
/// Larger caches are measured on this much: it is beyond every L2, and others may be using the rest.
const LARGEST_CACHE_BUFFER: u64 = 16 << 20;

impl Host {
    /// Measures arithmetic and memory. Takes a tenth of a second, and up to a second more with main memory, which is
    /// measured only where `footprint`, the bytes that a run touches, does not fit in the caches.
    ///
    /// # Errors
    /// Where the CPU lacks the tier, or no memory can be had for code or buffers.
    pub fn measure(tier: &Tier, footprint: u64) -> Result<Host, Error> {
        let arithmetic = |product| Ok::<f64, Error>(1e9 * peak::measure(tier, product)?);
        let int8 = arithmetic(Product::U8S8)?;
        let int8_narrow = if tier.has_faster_narrow_products() { arithmetic(Product::U8S7)? } else { int8 };
        let peaks = Peaks { int8, int8_narrow, float: arithmetic(Product::F32)? };
        let mut memory = Vec::new();
        let mut held = 0;
        for (name, capacity_bytes, buffer_bytes) in buffers(&bandwidth::caches()) {
            if memory.is_empty() || held < footprint {
                let gb_per_s = bandwidth::measure(tier, buffer_bytes as usize)?;
                memory.push(MemoryLevel { name, capacity_bytes, buffer_bytes, gb_per_s });
                held = capacity_bytes.unwrap_or(u64::MAX);
            }
        }
        Ok(Host {
            cpu: bandwidth::cpu_name().unwrap_or_else(|| "unknown CPU".into()),
            isa: tier.name.into(),
            peaks,
            memory,
            clock_ns: clock_ns(),
        })
    }

    /// The least time of some work on so many threads. `footprint` is what a whole run touches: before a weight is read
    /// again, all of it has gone through the caches. Operands and results of the layer itself, in contrast, were
    /// written just before or will be read soon, so they count as a working set of their own.
    ///
    /// Every byte is charged once, and writes as reads, which is less than what they cost. Threads are supposed to
    /// share nothing, which outer caches and memory do not grant. So it is a bound that may not be reached, but no
    /// layer can be faster, unless the caches replace more cleverly than by the share that fits.
    pub fn bound(&self, work: &Work, device: Device, footprint: u64, threads: usize) -> Bound {
        let peak = match device {
            Device::Int8Jit if work.by_narrow_weights => self.peaks.int8_narrow,
            Device::Int8Jit => self.peaks.int8,
            Device::FloatJit | Device::Interpreter => self.peaks.float,
        };
        let threads = threads as f64;
        let values = work.bytes_read.saturating_sub(work.weight_bytes) + work.bytes_written;
        let seconds = work.weight_bytes as f64 * self.seconds_per_byte(footprint)
            + values as f64 * self.seconds_per_byte(values);
        Bound { compute_ms: 1e3 * work.macs as f64 / (peak * threads), memory_ms: 1e3 * seconds / threads }
    }

    /// Mean time to read a byte of a working set that is read over and over: each cache holds what the nearer ones do
    /// not, as far as it goes.
    fn seconds_per_byte(&self, working_set: u64) -> f64 {
        let (mut held, mut seconds) = (0, 0.0);
        for (i, level) in self.memory.iter().enumerate() {
            let is_last = i + 1 == self.memory.len();
            let holds = level.capacity_bytes.filter(|_| !is_last).unwrap_or(u64::MAX).min(working_set);
            seconds += holds.saturating_sub(held) as f64 / (1e9 * level.gb_per_s);
            held = holds.max(held);
        }
        seconds / working_set.max(1) as f64
    }
}

/// Name, capacity and size of the buffer to measure with, of every level of memory.
fn buffers(caches: &[bandwidth::Cache]) -> Vec<(String, Option<u64>, u64)> {
    let of_cache = |c: &bandwidth::Cache| {
        // Half of it: code, stack and other tenants live there too.
        (format!("L{}", c.level), Some(c.bytes), (c.bytes / 2).min(LARGEST_CACHE_BUFFER))
    };
    let mut buffers: Vec<_> = caches.iter().map(of_cache).collect();
    let last = caches.last().map_or(0, |c| c.bytes);
    if last < LARGEST_BUFFER {
        buffers.push(("memory".into(), None, (2 * last).min(LARGEST_BUFFER)));
    }
    buffers
}

/// The cost of reading the clock twice, as the profile does around each step, of which one lies inside of the interval:
/// the median of many.
fn clock_ns() -> f64 {
    median((0..1001).map(|_| Instant::now().elapsed().as_nanos() as f64)).unwrap_or(0.0)
}

/// The least time of a layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bound {
    /// Of its arithmetic at the peak.
    pub compute_ms: f64,
    /// Of moving its bytes.
    pub memory_ms: f64,
}

impl Bound {
    /// Both at once.
    pub fn ms(&self) -> f64 {
        self.compute_ms.max(self.memory_ms)
    }

    /// Whether moving bytes takes longer than arithmetic.
    pub fn is_memory(&self) -> bool {
        self.memory_ms > self.compute_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 GMAC/s in integers, 10 in floats; 1 KiB at 100 GB/s, 1 MiB at 10 GB/s, the rest at 1 GB/s.
    fn host() -> Host {
        let level = |name: &str, capacity_bytes, gb_per_s| MemoryLevel {
            name: name.into(),
            capacity_bytes,
            buffer_bytes: 0,
            gb_per_s,
        };
        Host {
            cpu: String::new(),
            isa: String::new(),
            peaks: Peaks { int8: 100e9, int8_narrow: 125e9, float: 10e9 },
            memory: vec![
                level("L1", Some(1 << 10), 100.0),
                level("L2", Some(1 << 20), 10.0),
                level("memory", None, 1.0),
            ],
            clock_ns: 0.0,
        }
    }

    #[test]
    fn the_nearest_level_holds_what_fits_in_it() {
        let host = host();
        let ns = |working_set| 1e9 * host.seconds_per_byte(working_set);
        assert!((ns(512) - 0.01).abs() < 1e-9);
        assert!((ns(2048) - (0.5 * 0.01 + 0.5 * 0.1)).abs() < 1e-9);
        assert!((ns(1 << 30) - 1.0).abs() < 2e-3);
        assert_eq!(ns(0), 0.0);
    }

    #[test]
    fn a_bound_is_the_longer_of_arithmetic_and_memory() {
        let host = host();
        let work = Work {
            macs: 1_000_000,
            bytes_read: 1 << 10,
            weight_bytes: 512,
            bytes_written: 512,
            ..Work::default()
        };
        let bound = host.bound(&work, Device::Int8Jit, 1 << 30, 1);
        assert!((bound.compute_ms - 0.01).abs() < 1e-9 && !bound.is_memory());
        // 512 bytes of weights, all but a thousandth from main memory, and 1,024 of values from L1.
        assert!((bound.memory_ms - 1e-6 * (512.0 + 10.24)).abs() < 1e-6, "{bound:?}");
        assert_eq!(bound.ms(), bound.compute_ms);
        let narrow = Work { by_narrow_weights: true, ..work };
        assert!((host.bound(&narrow, Device::Int8Jit, 1 << 30, 1).compute_ms - 0.008).abs() < 1e-9);
        let float = host.bound(&work, Device::FloatJit, 1 << 30, 2);
        assert!((float.compute_ms - 0.05).abs() < 1e-9);
        let copy = Work { macs: 0, ..work };
        assert!(host.bound(&copy, Device::Int8Jit, 1 << 30, 1).is_memory());
    }

    #[test]
    fn main_memory_is_read_beyond_the_last_cache_where_that_is_possible() {
        let cache = |level, bytes| bandwidth::Cache { level, bytes };
        let sizes = |caches: &[bandwidth::Cache]| {
            buffers(caches).into_iter().map(|(name, _, bytes)| (name, bytes)).collect::<Vec<_>>()
        };
        assert_eq!(
            sizes(&[cache(1, 32 << 10), cache(2, 1 << 20)]),
            [("L1".into(), 16 << 10), ("L2".into(), 512 << 10), ("memory".into(), 2 << 20)]
        );
        assert_eq!(sizes(&[cache(1, 32 << 10), cache(3, 2 << 30)]).len(), 2);
    }

    #[test]
    fn a_host_is_measured_as_far_as_it_is_needed() {
        let tier = Tier::available()[0];
        let host = Host::measure(tier, 1).unwrap();
        assert_eq!(host.memory.len(), 1);
        assert!(host.peaks.int8 > 0.0 && host.memory[0].gb_per_s > 0.0 && host.clock_ns >= 0.0);
    }
}
