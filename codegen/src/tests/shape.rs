//! Ops that move elements.

use super::{
    Random, Serial, check, check_where_lowered, compiled, elementwise::dims, graph_of, placed, plain,
    random_tensor, tiers,
};
use crate::Execution;
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, Shape, Tensor,
    ops::{Binary, BinaryKind, Cast, Concat, Expand, Gather, Pad, PadMode, Slice, SliceSpec, Transpose},
};

fn element() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::U8, DType::F16, DType::F32, DType::S64, DType::F64])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn transposes(d in dims(), order in any::<[u32; 4]>(), dtype in element(), seed in any::<u64>()) {
        let mut perm: Vec<usize> = (0..d.len()).collect();
        perm.sort_by_key(|&i| order[i]);
        check(&graph_of(Transpose { perm }, &[plain(dtype, &d)]), seed);
    }

    #[test]
    fn planes_become_pixels(n in 1usize..3, c in 1usize..6, h in 1usize..40, w in 1usize..140, seed in any::<u64>()) {
        check(&graph_of(Transpose { perm: vec![0, 2, 3, 1] }, &[plain(DType::F32, &[n, c, h, w])]), seed);
    }

    #[test]
    fn slices(d in dims(), cuts in any::<[(u8, u8, bool); 4]>(), dtype in element(), seed in any::<u64>()) {
        let axes = d.iter().zip(cuts).map(|(&n, (a, b, back))| {
            if n == 0 {
                return SliceSpec::all(0);
            }
            let (start, step) = (usize::from(a) % n, usize::from(b) % 3 + 1);
            let len = if back { start / step + 1 } else { (n - 1 - start) / step + 1 };
            SliceSpec { start, len, step: if back { -(step as isize) } else { step as isize } }
        });
        check(&graph_of(Slice { axes: axes.collect() }, &[plain(dtype, &d)]), seed);
    }

    #[test]
    fn concats(d in dims(), axis in 0usize..4, lengths in prop::collection::vec(0usize..20, 1..4), dtype in element(), seed in any::<u64>()) {
        prop_assume!(!d.is_empty());
        let axis = axis % d.len();
        let types: Vec<_> = lengths.iter().map(|&n| {
            let mut own = d.clone();
            own[axis] = n;
            plain(dtype, &own)
        }).collect();
        check(&graph_of(Concat { axis }, &types), seed);
    }

    #[test]
    fn pads(
        d in prop::collection::vec(3usize..20, 1..4), before in any::<[u8; 3]>(), after in any::<[u8; 3]>(), mode in 0..4,
        dtype in element(), seed in any::<u64>(),
    ) {
        let mode = [PadMode::Constant { value: 3.0 }, PadMode::Edge, PadMode::Reflect, PadMode::Wrap][mode as usize];
        let amount = |b: &[u8]| -> Vec<usize> { d.iter().zip(b).map(|(_, &b)| usize::from(b) % 3).collect() };
        check(&graph_of(Pad { before: amount(&before), after: amount(&after), mode }, &[plain(dtype, &d)]), seed);
    }

    #[test]
    fn pads_repeat_elements_more_than_once(
        d in prop::collection::vec(1usize..4, 1..3), count in 0usize..12, front in any::<bool>(), mode in 0..3, seed in any::<u64>(),
    ) {
        let mode = [PadMode::Edge, PadMode::Reflect, PadMode::Wrap][mode as usize];
        let (many, none) = (vec![count; d.len()], vec![0; d.len()]);
        let (before, after) = if front { (many, none) } else { (none, many) };
        let mut g = Graph::new("pad");
        let x = g.input("x", plain(DType::F32, &d)).unwrap();
        let y = g.add("y", Pad { before, after, mode }, &[x]).unwrap();
        g.output("y", y.out());
        check_where_lowered(&g, seed);
    }

    #[test]
    fn expands(d in dims(), ones in any::<u32>(), lead in 0usize..3, dtype in element(), seed in any::<u64>()) {
        let from: Vec<usize> =
            d.iter().enumerate().map(|(i, &n)| if ones >> i & 1 == 1 { 1 } else { n }).collect();
        let mut shape = vec![2; lead];
        shape.extend(&d);
        check(&graph_of(Expand { shape: Shape::new(shape).unwrap() }, &[plain(dtype, &from)]), seed);
    }

    #[test]
    fn gathers_by_evenly_spaced_constants(
        d in prop::collection::vec(1usize..20, 1..4), axis in 0usize..3, first in 0i64..20, step in -3i64..4, dtype in element(), seed in any::<u64>(),
    ) {
        let axis = axis % d.len();
        let n = d[axis] as i64;
        let first = first % n;
        let indices: Vec<i64> = (0..4).map(|i| first + i * step).take_while(|i| (0..n).contains(i)).collect();
        let mut g = Graph::new("gather");
        let x = g.input("x", plain(dtype, &d)).unwrap();
        let count = indices.len();
        let i = g.constant("i", Tensor::from_vec(Shape::new([1, count]).unwrap(), indices).unwrap());
        let y = g.add("y", Gather { axis }, &[x, i]).unwrap();
        g.output("y", y.out());
        check(&g, seed);
    }
}

/// Rows by indices from an input of u8, less 128: all that an axis of 128 has, from both ends.
fn gather_of(index: DType, data: &[usize], axis: usize, is_constant: bool) -> Graph {
    let mut g = Graph::new("gather");
    let ty = plain(DType::F32, data);
    let x = match is_constant {
        true => g.constant("x", random_tensor(&ty, &mut Random::new(7))),
        false => g.input("x", ty).unwrap(),
    };
    let i = g.input("i", plain(DType::U8, &[3, 5])).unwrap();
    let wide = g.add("wide", Cast { to: DType::S32 }, &[i]).unwrap().out();
    let offset = g.constant("offset", Tensor::scalar(128i32));
    let signed = g.add("signed", Binary { kind: BinaryKind::Sub }, &[wide, offset]).unwrap().out();
    let indices = g.add("indices", Cast { to: index }, &[signed]).unwrap().out();
    let y = g.add("y", Gather { axis }, &[x, indices]).unwrap();
    g.output("y", y.out());
    g
}

#[test]
fn gathers_by_indices_of_run_time() {
    for (seed, index) in [DType::S32, DType::S64].into_iter().enumerate() {
        for (data, axis) in [(&[128, 7][..], 0), (&[2, 128, 3], 1), (&[3, 128], 1)] {
            for is_constant in [false, true] {
                check_where_lowered(&gather_of(index, data, axis, is_constant), seed as u64);
            }
        }
    }
}

#[test]
fn an_index_of_run_time_that_is_out_of_range_is_an_error() {
    let graph = placed(&gather_of(DType::S64, &[4, 2], 0, true));
    for tier in tiers() {
        let model = compiled(&graph, tier);
        let mut execution = Execution::new(model);
        let mut y = [0; 15 * 2 * 4];
        let mut go = |index: u8| {
            let e = execution.run(&[&[index; 15]], &mut [&mut y[..]], &Serial, None);
            e.map_err(|e| e.to_string())
        };
        assert_eq!(go(128 + 3), Ok(()));
        assert_eq!(go(128 - 4), Ok(()));
        let why = go(128 + 4).unwrap_err();
        assert!(why.contains("`y`") && why.contains("index 4 is out of range"), "{why}");
    }
}

#[test]
fn long_rows_are_cut_into_units() {
    for n in [1023, 1024, 1025, 2047, 2048, 5000] {
        check(&graph_of(Concat { axis: 0 }, &[plain(DType::U8, &[n]), plain(DType::U8, &[n + 1])]), n as u64);
        check(&graph_of(Transpose { perm: vec![1, 0] }, &[plain(DType::F32, &[3, n])]), n as u64);
    }
}
