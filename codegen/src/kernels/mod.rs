//! Kernels that Cranelift compiles whole: 128-bit vectors, the same arithmetic on every tier.

pub(crate) mod line;
pub(crate) mod map;
pub(crate) mod math;
pub(crate) mod pool;
pub(crate) mod resample;
pub(crate) mod vector;
