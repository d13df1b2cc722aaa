//! Tests of the public interface.

mod eval;
mod graph;
mod record;
mod requantize;
mod samples;
mod text;
mod verify;
