//! Whether AMX can be used: the CPU must have it, and the operating system must have granted this process its registers.

use std::sync::OnceLock;

/// Whether the CPU multiplies tiles of 8-bit integers and this process may use them. Asks the operating system the
/// first time; its answer holds for all threads.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| is_implemented() && request_permission())
}

/// Bits of CPUID leaf 7 (EDX).
fn is_implemented() -> bool {
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    let has_leaf = std::arch::x86_64::__cpuid(0).eax >= 7;
    has_leaf && std::arch::x86_64::__cpuid_count(7, 0).edx & (AMX_TILE | AMX_INT8) == AMX_TILE | AMX_INT8
}

/// The 8 KB of tile data are not saved for a process that has not asked for them: the first tile instruction would
/// fault. Linux grants them to the whole process, present and future threads alike, and refuses where it does not save
/// them at all (then XCR0 lacks their bits). Where signal stacks are too small for the larger frame it refuses too.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    /// `<asm/prctl.h>` and `<asm/fpu/types.h>`.
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    #[allow(unsafe_code, reason = "a system call without a safe wrapper")]
    // SAFETY: this request takes the number of a feature and touches no memory of the process.
    let status = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    status == 0
}

/// How other systems grant them is not known here.
#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}
