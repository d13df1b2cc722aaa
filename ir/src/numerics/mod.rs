//! The numerics contract: every rounding, saturation and zero point of qcc, as scalar code with its equation.
//!
//! real = scale · (q − zero_point). Activations are u8 with one grid a tensor, weights s8, symmetric, with one
//! scale an output channel. Accumulators are s32:
//!
//! ```text
//! acc = Σ q_x·q_w + (q_b − z_x·Σ q_w)              padding holds z_x, so borders are no special case
//! y   = clamp(requantize(acc) + z_y, lo, hi)       a ReLU, ReLU6 or Clip is lo and hi
//! ```
//!
//! Where a row of activations gets its grid when it is computed ([`DynamicGrid`]), sums become floats ([`Dequantizer`]):
//!
//! ```text
//! y   = clamp(f32(Σ q_x·q_w − z_x·Σ q_w)·(s_x·s_w) + bias + residual)
//! ```
//!
//! Integer sums do not depend on their order and wrapping cannot change a sum whose end value fits: so results are
//! the same on every ISA tier, tile shape and thread count, as long as [`Requantizer`] is one formula. Kernels may
//! compute it in any way; they are tested to agree with it bit for bit.

mod dynamic;
mod fixed_point;
mod float_rescale;
mod grid;
mod line;
pub mod math;
mod requantize;
mod small_float;

pub use dynamic::{Dequantizer, DynamicGrid};
pub use fixed_point::{AddRescale, MulRescale, Multiplier};
pub use float_rescale::{FloatAddRescale, FloatMulRescale, Rescaling, float_average};
pub use grid::{dequantize, fake_quant, normalize, quantize, table};
pub use line::{PARTIAL_TOTALS, total};
pub use requantize::{
    ChannelBounds, Q15_RESIDUAL_SHIFT, Refusal, RequantMode, Requantizer, Rescale, ResidualInput,
    TFLITE_RESIDUAL_SHIFT, WeightSums, rounding_shift_right_away, saturating_rounding_doubling_high_mul,
};
pub use small_float::{PowerRounding, small_float, small_float_code};
