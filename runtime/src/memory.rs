//! Memory: of the machine, and the peak of this process, as Linux tells it.

use qcc_ir::limits::MAX_MEMORY_BYTES;
use std::{fs, sync::LazyLock};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// What a model may take where nobody says otherwise: what the machine had available when this was first asked, within the
/// limit of its control group; at most [`MAX_MEMORY_BYTES`].
pub fn machine_memory() -> u64 {
    static AVAILABLE: LazyLock<u64> = LazyLock::new(|| {
        let ram = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
        let Ok(system) = System::new_with_specifics(ram) else { return MAX_MEMORY_BYTES };
        // Pages of files that the group has read count as used, but would make room.
        let group = system.cgroup_limits().map_or(u64::MAX, |g| g.total_memory.saturating_sub(g.rss));
        match system.available_memory().min(group) {
            // The system does not tell.
            0 => MAX_MEMORY_BYTES,
            available => available.min(MAX_MEMORY_BYTES),
        }
    });
    *AVAILABLE
}

/// Forgets the peak so far. Returns the memory now in use, in bytes; `None` where the system does not tell.
pub(crate) fn begin_peak() -> Option<u64> {
    // 5 resets the high-water mark of the resident set: proc(5), /proc/pid/clear_refs.
    fs::write("/proc/self/clear_refs", "5").ok()?;
    field("VmRSS:")
}

/// The largest resident set since [`begin_peak`], in bytes.
pub(crate) fn peak() -> Option<u64> {
    field("VmHWM:")
}

fn field(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
