//! Steps that need no machine code of their own: a description, and one routine that follows it for every layer.
//!
//! They move or fill little memory around the kernels. Code for each would take longer to make than it ever saves.

use crate::{
    dense::{margins::Fill, widen::Widen},
    module::Location,
};
use std::ops::Range;

/// What a step does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Routine {
    Fill(Fill),
    Widen(Widen),
}

impl Routine {
    /// Computes a range of the step's units. `resolve` gives addresses.
    ///
    /// # Safety
    /// The addresses must be those of buffers that the plan has made, and nobody else may use what the units write.
    #[allow(unsafe_code, reason = "routines read and write the arena by address, as machine code does")]
    pub(crate) unsafe fn run(&self, resolve: impl Fn(Location) -> *mut u8, units: Range<u64>) {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Routine::Fill(fill) => fill.run(resolve(fill.location), units),
                Routine::Widen(widen) => {
                    widen.run(resolve(widen.from).cast_const(), resolve(widen.to), units);
                }
            }
        }
    }
}
