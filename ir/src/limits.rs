//! Bounds on what a model may ask for. Models are untrusted: a few bytes can name a tensor of any size.

/// The largest rank of a tensor. ONNX models stay below 9; a bound keeps index arithmetic small.
pub const MAX_RANK: usize = 16;

/// The largest number of elements of a tensor; byte counts of every type then fit easily into 64 bits.
pub const MAX_ELEMENTS: usize = 1 << 40;

/// The largest tensor, in bytes.
pub const MAX_TENSOR_BYTES: usize = 4 << 30;

/// The most taps of a convolution's or pool's window: a global pool over 8192x8192.
pub const MAX_WINDOW_TAPS: usize = 1 << 26;
