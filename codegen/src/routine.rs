//! Steps that need no machine code of their own: a description, and one routine that follows it for every layer.
//!
//! They move or fill memory around the kernels. Code for each would take longer to make than it ever saves.

use crate::{
    dense::{margins::Fill, widen::Widen},
    kernels::gather::Gather,
    module::Location,
};
use qcc_ir::{OpError, Tensor};
use std::ops::Range;

/// What a step does.
#[derive(Clone, Debug)]
pub(crate) enum Routine {
    Fill(Fill),
    Widen(Widen),
    Gather(Box<Gather>),
}

/// Where a routine reads.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// In the model's memory or the caller's.
    At(Location),
    /// A constant where it lies, perhaps in a mapped file: large ones are read in places only.
    Constant(Tensor),
}

impl Source {
    /// The first byte.
    pub(crate) fn address(&self, resolve: &impl Fn(Location) -> *mut u8) -> *const u8 {
        match self {
            Source::At(location) => resolve(*location).cast_const(),
            Source::Constant(tensor) => tensor.bytes().as_ptr(),
        }
    }
}

impl Routine {
    /// Computes a range of the step's units. `resolve` gives addresses.
    ///
    /// # Errors
    /// Where values are not ones that the op takes.
    ///
    /// # Safety
    /// The addresses must be those of buffers that the plan has made, and nobody else may use what the units write.
    #[allow(unsafe_code, reason = "routines read and write the arena by address, as machine code does")]
    pub(crate) unsafe fn run(
        &self,
        resolve: impl Fn(Location) -> *mut u8,
        units: Range<u64>,
    ) -> Result<(), OpError> {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Routine::Fill(fill) => fill.run(resolve(fill.location), units),
                Routine::Widen(widen) => {
                    widen.run(resolve(widen.from).cast_const(), resolve(widen.to), units);
                }
                Routine::Gather(gather) => {
                    let (x, indices) = (gather.x.address(&resolve), gather.indices.address(&resolve));
                    return gather.run(x, indices, resolve(gather.y), units);
                }
            }
        }
        Ok(())
    }
}
