//! The accuracy workbench: what tells where a network loses what it knew.

mod diff;

pub use diff::{Contender, Diff, DiffSetup, TensorDiff, diff};
