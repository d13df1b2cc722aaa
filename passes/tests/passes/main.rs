//! Tests of the passes: one module a pass, and the whole way.

mod adopt_grids;
mod assign_layout;
mod calibrate;
mod canonicalise;
mod common;
mod equalize_channels;
mod fold_affine;
mod fold_batch_norm;
mod fold_constants;
mod fuse_clamp;
mod fuse_pad;
mod fuse_residual;
mod insert_fake_quant;
mod isolate;
mod join_columns;
mod lint;
mod lower_to_int8;
mod models;
mod pipeline;
mod quantize_dynamic;
mod round_weights;
mod widen_half;
