//! Code generation: a placed graph becomes machine code, packed weights and a buffer plan.

pub mod executable;
pub mod peak;
pub mod tier;

/// The dense family: convolutions and matrix products as tiles of one microkernel.
pub mod dense {
    pub mod asm;
    pub mod pack;
    pub mod spec;
}
