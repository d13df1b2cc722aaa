//! Mixed precision: what it costs to round each layer, which layers are to stay float, and the file that says so.

mod latency;
mod policy;
mod search;
mod sensitivity;

pub use latency::Timing;
pub use policy::{LayerPrecision, Policy, PolicyError};
pub use search::{Attempt, Goal, Measure, MixedPrecision, Target};
pub use sensitivity::{LayerSensitivity, Sensitivity};
