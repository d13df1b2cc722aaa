//! Convolutions and matrix products of codes that become floats against their definitions, on every tier of this CPU.

use super::dense::{
    Builder, Case, ConvCase, MatMulCase, Random, WeightBits, conv_case, depthwise_case, exists, f32_tensor,
    matmul_case, random_clamp, s8_tensor, shape, u8_tensor, weight_bits,
};
use proptest::prelude::*;
use qcc_ir::{
    QuantParams, Shape, Tensor,
    ops::{Layout, QConvToFloat, QMatMulToFloat, ToFloat},
};

/// Puts the operands of a product into a graph: its codes on a grid that is known, or that comes as two inputs.
fn operands(
    b: &mut Builder,
    r: &mut Random,
    [x, w, y]: &[Shape; 3],
    (bits, axis): (WeightBits, usize),
    (bias, residual, grids): (bool, bool, bool),
) -> ToFloat {
    let zero = r.code(0, 255);
    let scale = 0.001 + r.unit();
    let known = (!grids).then(|| QuantParams::per_tensor(scale, zero).unwrap());
    b.input(u8_tensor(r, x), known);
    let scales: Vec<f32> = (0..w[axis]).map(|_| 0.001 + 0.01 * r.unit()).collect();
    let params = QuantParams::per_axis(axis, scales, vec![0; w[axis]]).unwrap();
    b.constant(s8_tensor(r, w, bits), Some(params));
    if grids {
        b.input(Tensor::scalar(scale), None);
        b.input(Tensor::scalar(zero), None);
    }
    if bias {
        b.constant(f32_tensor(r, &shape(&[w[axis]])), None);
    }
    if residual {
        b.input(f32_tensor(r, y), None);
    }
    ToFloat { grids, bias, residual, clamp: random_clamp(r) }
}

fn convolution(case: &ConvCase, bits: WeightBits, grids: bool) -> Option<Case> {
    let mut r = Random::new(case.seed);
    let mut b = Builder::new();
    let with = (case.bias, case.residual, grids);
    let to = operands(&mut b, &mut r, &case.shapes()?, (bits, QConvToFloat::CHANNEL_AXIS), with);
    let (window, layout) = (case.window(), Layout::ChannelsLast);
    b.finish(QConvToFloat { window, groups: case.groups, layout, to })
}

fn product(case: &MatMulCase, bits: WeightBits, grids: bool) -> Option<Case> {
    let mut r = Random::new(case.seed);
    let mut b = Builder::new();
    let with = (case.bias, case.residual, grids);
    let to = operands(&mut b, &mut r, &case.shapes(), (bits, QMatMulToFloat::CHANNEL_AXIS), with);
    b.finish(QMatMulToFloat { to })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn convolutions_equal_their_definition(case in conv_case(), bits in weight_bits(), grids: bool) {
        exists(convolution(&case, bits, grids))?.equals_bits()?;
    }

    #[test]
    fn depthwise_convolutions_equal_their_definition(case in depthwise_case(), bits in weight_bits(), grids: bool) {
        exists(convolution(&case, bits, grids))?.equals_bits()?;
    }

    #[test]
    fn matrix_products_equal_their_definition(case in matmul_case(), bits in weight_bits(), grids: bool) {
        exists(product(&case, bits, grids))?.equals_bits()?;
    }
}
