//! Code generation: a placed graph becomes machine code, packed weights and a buffer plan.
//!
//! ```text
//! Graph (Stage::Placed) ─ plan ─► offsets ─ lower ─► steps of machine code + weights ─► CompiledModel ─► Execution
//! ```
//!
//! Each op is lowered by the file of its family in `lower/`; what is not lowered runs in the interpreter, as its own
//! step. Generated code holds no absolute address: everything is reached through the context that a step is given.

#![warn(missing_docs)]

pub mod bandwidth;
pub mod dense;
pub mod executable;
pub mod peak;
pub mod tier;

mod amx;
mod error;
mod kernels;
mod lower;
mod memory;
mod model;
mod module;
mod parallel;
mod plan;
mod recurrence;
mod routine;
mod shared;
mod sharing;
mod times;
mod weights;

pub use dense::choose::{Order, ParseTilingError, Tiling};
pub use error::CodegenError;
pub use lower::capability;
pub use model::{CompiledModel, Execution, ListingKind, Options, Release, Step, Work, assemble, compile};
pub use parallel::{Parallel, Serial};
pub use shared::SharedWeights;
pub use tier::{TIERS, Tier};
pub use times::CompileTimes;

#[cfg(test)]
mod tests;
