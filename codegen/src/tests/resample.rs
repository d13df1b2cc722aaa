//! Interpolation.

use super::{check, graph_of, plain, quantized};
use proptest::prelude::*;
use qcc_ir::{
    DType, OutputGrid,
    ops::{Coordinates, Interpolation, Nearest, QResample, Resample},
};

fn interpolations() -> impl Strategy<Value = Interpolation> {
    prop_oneof![
        Just(Interpolation::Linear { antialias: false }),
        Just(Interpolation::Linear { antialias: true }),
        Just(Interpolation::Cubic { a: -0.75, antialias: false }),
        Just(Interpolation::Cubic { a: -0.5, antialias: true }),
        Just(Interpolation::Nearest(Nearest::PreferFloor)),
    ]
}

fn coordinates() -> impl Strategy<Value = Coordinates> {
    prop_oneof![
        Just(Coordinates::HalfPixel),
        Just(Coordinates::AlignCorners),
        Just(Coordinates::Asymmetric),
        Just(Coordinates::TfCropAndResize { start: -0.2, end: 1.1, outside: 0.7 }),
    ]
}

/// From 4 elements to between 1 and 12, with 1 to 40 behind and 1 or 2 before.
fn dims() -> impl Strategy<Value = (Vec<usize>, usize)> {
    let behind = prop_oneof![1usize..6, 15usize..18, 30usize..40];
    (1usize..3, 4usize..9, behind, 2usize..13).prop_map(|(o, n, i, m)| (vec![o, n, i], m))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn resampling_equals_its_definition(
        interpolation in interpolations(), coordinates in coordinates(), (dims, length) in dims(),
        exclude_outside: bool, kind in 0..3, seed: u64,
    ) {
        let scale = length as f64 / dims[1] as f64;
        let op = Resample { axis: 1, length, scale, interpolation, coordinates, exclude_outside };
        let output = OutputGrid { lo: 3, hi: 250, ..OutputGrid::full(DType::U8, 0.06, 77).unwrap() };
        let codes = quantized(DType::U8, &dims, 0.05, 120);
        let g = match kind {
            0 => graph_of(op, &[plain(DType::F32, &dims)]),
            1 if op.is_pick() => graph_of(op, &[plain(DType::S64, &dims)]),
            _ => graph_of(QResample { resample: op, output }, &[codes]),
        };
        check(&g, seed);
    }
}

#[test]
fn picks_keep_codes() {
    let nearest = Interpolation::Nearest(Nearest::Floor);
    for (axis, length) in [(1, 10), (2, 6), (3, 5)] {
        let coordinates = Coordinates::Asymmetric;
        let op = Resample {
            axis,
            length,
            scale: 2.0,
            interpolation: nearest,
            coordinates,
            exclude_outside: false,
        };
        check(&graph_of(op, &[quantized(DType::U8, &[2, 5, 3, 35], 0.05, 120)]), 1);
    }
}
