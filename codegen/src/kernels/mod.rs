//! Kernels of everything that is no product. Cranelift compiles most whole: 128-bit vectors, the same arithmetic on every
//! tier. [`wide`] has those that pay for more.

pub(crate) mod dynamic;
pub(crate) mod gather;
pub(crate) mod lanes;
pub(crate) mod line;
pub(crate) mod map;
pub(crate) mod math;
pub(crate) mod pool;
pub(crate) mod resample;
pub(crate) mod vector;
pub(crate) mod wide;
