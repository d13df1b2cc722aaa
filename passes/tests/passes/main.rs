//! Tests of the passes: one module a pass, and the whole way.

mod common;
mod pipeline;
