//! Peak memory of this process, as Linux tells it.

use std::fs;

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
