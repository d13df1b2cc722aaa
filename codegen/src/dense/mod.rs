//! The dense family: convolutions and matrix products as tiles of one microkernel.

mod clif_epilogue;
mod clif_tile;
pub mod spec;
