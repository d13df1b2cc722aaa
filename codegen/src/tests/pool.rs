//! Pools.

use super::{check, graph_of, plain, quantized};
use proptest::prelude::*;
use qcc_ir::{
    DType, OutputGrid,
    numerics::Rescaling,
    ops::{Layout, Pool, PoolKind, QAveragePool, Window},
};

/// Kernel, stride, dilation, pads and what the input has more than one window needs.
type Dimension = (usize, usize, usize, usize, usize, usize);

/// Windows that fit an input of at least 1 in each of one or two dimensions, with the input's extents.
fn windows() -> impl Strategy<Value = (Window, Vec<usize>)> {
    let axis = (1usize..4, 1usize..4, 1usize..3, 0usize..3, 0usize..3, 0usize..8);
    prop::collection::vec(axis, 1..3).prop_map(|axes| {
        let of = |f: &dyn Fn(&Dimension) -> usize| axes.iter().map(f).collect();
        let kernel: Vec<usize> = of(&|a| a.0);
        let window = Window::new(kernel)
            .strides(of(&|a| a.1))
            .dilations(of(&|a| a.2))
            .pads(of(&|a| a.3), of(&|a| a.4));
        // Room for at least one window.
        let input = of(&|a| ((a.0 - 1) * a.2 + 1).saturating_sub(a.3 + a.4).max(1) + a.5);
        (window, input)
    })
}

fn channels() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..20, 30usize..35, 60usize..70, Just(128usize), Just(300usize), Just(0usize)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn pools_equal_their_definition(
        (window, input) in windows(), c in channels(), kind in 0..4, ceil_mode: bool, include: bool, seed: u64,
    ) {
        let mut dims = vec![2];
        dims.extend(input);
        dims.push(c);
        let layout = Layout::ChannelsLast;
        let max = Pool { kind: PoolKind::Max, window: window.clone(), ceil_mode, layout };
        let average = PoolKind::Average { count_include_pad: include };
        let g = match kind {
            0 => graph_of(max, &[plain(DType::F32, &dims)]),
            1 => graph_of(max, &[quantized(DType::U8, &dims, 0.1, 3)]),
            2 => graph_of(max, &[plain(DType::S8, &dims)]),
            _ => graph_of(Pool { kind: average, window, ceil_mode, layout }, &[plain(DType::F32, &dims)]),
        };
        check(&g, seed);
    }

    #[test]
    fn integer_averages_are_exact(
        (window, input) in windows(), c in channels(), ceil_mode: bool, count_include_pad: bool, s in -4f32..4.0,
        z in (0..256, 0..256), narrow: bool, float: bool, seed: u64,
    ) {
        let mut dims = vec![1];
        dims.extend(input);
        dims.push(c);
        let mut output = OutputGrid::full(DType::U8, 0.07, z.1).unwrap();
        if narrow {
            (output.lo, output.hi) = (20, 200);
        }
        let layout = Layout::ChannelsLast;
        let rescaling = if float { Rescaling::Float } else { Rescaling::FixedPoint };
        let op = QAveragePool { window, ceil_mode, count_include_pad, layout, rescaling, output };
        check(&graph_of(op, &[quantized(DType::U8, &dims, 0.07 * s.exp2(), z.0)]), seed);
    }
}

#[test]
fn global_averages() {
    for (h, w, c) in [(7, 7, 100), (17, 16, 33), (40, 40, 5)] {
        let output = OutputGrid::full(DType::U8, 0.02, 7).unwrap();
        let (window, layout) = (Window::new([h, w]), Layout::ChannelsLast);
        for rescaling in [Rescaling::FixedPoint, Rescaling::Float] {
            let window = window.clone();
            let op = QAveragePool {
                window,
                ceil_mode: false,
                count_include_pad: false,
                layout,
                rescaling,
                output,
            };
            check(&graph_of(op, &[quantized(DType::U8, &[2, h, w, c], 0.1, 9)]), 5);
        }
    }
}
