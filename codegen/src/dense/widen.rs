//! Copies of int8 activations as 16-bit numbers, for tiles that multiply those.
//!
//! AVX2 has no exact product of bytes. Widening each activation once, instead of in every tile that reads it, leaves the
//! tile nothing but broadcasts: of the 64 vector instructions of a 6x16 tile, 12 were spent on it.

use crate::{CodegenError, lower::Lowering, model::Work, module::Location, routine::Routine};
use std::ops::Range;

/// Codes that one unit widens.
const CHUNK: usize = 4096;

/// Codes, u8, and where their copies lie, u16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widen {
    pub(crate) from: Location,
    pub(crate) to: Location,
    codes: usize,
}

/// A step that widens `codes` u8 from `from` to u16 in scratch memory; the copy.
pub(crate) fn lower(cx: &mut Lowering, from: Location, codes: usize) -> Result<Location, CodegenError> {
    let to = cx.scratch(2 * codes as u64)?;
    let work = Work { bytes_read: codes as u64, bytes_written: 2 * codes as u64, ..Work::default() };
    let widen = Widen { from, to, codes };
    cx.routine_step("widen", Routine::Widen(widen), codes.div_ceil(CHUNK) as u64, work);
    Ok(to)
}

impl Widen {
    /// Widens the codes of a range of units.
    ///
    /// # Safety
    /// The pointers must be those of [`from`](Self::from) and [`to`](Self::to), alive, and nobody else may use the copies
    /// meanwhile.
    #[allow(unsafe_code, reason = "the arena is read and written by address, as machine code does")]
    pub(crate) unsafe fn run(&self, from: *const u8, to: *mut u8, units: Range<u64>) {
        let [first, end] = [units.start, units.end].map(|unit| self.codes.min(unit as usize * CHUNK));
        // SAFETY: the plan keeps all codes alive and gives room for all copies, which are no part of what is read.
        // Scratch memory is aligned to cache lines.
        let (from, to) = unsafe {
            (
                std::slice::from_raw_parts(from.add(first), end - first),
                std::slice::from_raw_parts_mut(to.cast::<u16>().add(first), end - first),
            )
        };
        for (to, &code) in to.iter_mut().zip(from) {
            *to = u16::from(code);
        }
    }
}
