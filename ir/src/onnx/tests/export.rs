use super::{hostile::shared, *};
use crate::{
    NodeId, Op, QuantParams, Stage,
    onnx::{ExportError, ExportOptions, export, export_with},
    ops::*,
};

fn reimported(g: &Graph) -> Graph {
    let bytes = export(g).unwrap();
    Model::parse(bytes).unwrap().graph(&Bindings::default()).unwrap()
}

/// Values in [-2, 2) from a hash of their place.
fn pseudo_random(shape: &Shape) -> Tensor {
    let value = |i: u32| {
        let mut h = (i + 1).wrapping_mul(2654435761);
        h ^= h >> 16;
        h = h.wrapping_mul(2246822519);
        h ^= h >> 13;
        (h >> 8) as f32 / (1 << 22) as f32 - 2.0
    };
    Tensor::from_vec(shape.clone(), (0..shape.elements() as u32).map(value).collect()).unwrap()
}

fn inputs(g: &Graph) -> Vec<Tensor> {
    g.inputs().iter().map(|id| pseudo_random(g.shape(id.out()))).collect()
}

#[track_caller]
fn same_results(g: &Graph) {
    let back = reimported(g);
    let x = inputs(g);
    assert_eq!(interpreter::run(g, &x).unwrap(), interpreter::run(&back, &x).unwrap());
    let names = |g: &Graph| g.outputs().iter().map(|o| o.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(g), names(&back));
}

/// For what is composed of ops that round where the IR's op does not.
#[track_caller]
fn close_results(g: &Graph) {
    let x = inputs(g);
    let (a, b) = (interpreter::run(g, &x).unwrap(), interpreter::run(&reimported(g), &x).unwrap());
    assert_eq!(a[0].ty(), b[0].ty());
    for (a, b) in a[0].as_slice::<f32>().unwrap().iter().zip(b[0].as_slice::<f32>().unwrap()) {
        assert!((a - b).abs() <= 1e-6 * a.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn shared_models_survive_a_round_trip() {
    let Some(folder) = shared("models") else { return };
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "onnx"));
    paths.sort();
    assert!(!paths.is_empty());
    for path in paths {
        let g = Model::load(&path).unwrap().graph(&Bindings::default()).unwrap();
        crate::verify(&g).unwrap();
        let back = reimported(&g);
        let names = |g: &Graph| g.order().into_iter().map(|id| g.node(id).name.clone()).collect::<Vec<_>>();
        let is_constant =
            |g: &Graph, name: &String| g.find(name).is_some_and(|id| g.constant_value(id.out()).is_some());
        let ops = |g: &Graph| {
            names(g).into_iter().filter(|n| !is_constant(g, n)).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(ops(&g), ops(&back), "{}", path.display());
        // Large networks take seconds to interpret; their small relatives have the same ops.
        if g.nodes().map(|(id, _)| g.macs(id)).sum::<u64>() < 20_000_000 {
            same_results(&g);
        }
    }
}

/// A graph of one input of these dimensions, with what `build` makes of it as its result.
fn graph_of(dims: &[usize], build: impl FnOnce(&mut Graph, crate::ValueId) -> NodeId) -> Graph {
    let mut g = Graph::new("test");
    let x = g.input("x", TensorType::f32(dims).unwrap()).unwrap();
    let y = build(&mut g, x);
    g.output("y", y.out());
    g
}

fn of_op(dims: &[usize], op: impl Into<Op>) -> Graph {
    graph_of(dims, |g, x| g.add("op", op, &[x]).unwrap())
}

#[test]
fn fused_convolutions() {
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        for clamp in
            [Clamp::NONE, Clamp::RELU, Clamp { lo: -1.0, hi: 6.0 }, Clamp { lo: -2.0, hi: f32::INFINITY }]
        {
            let dims = if layout == Layout::ChannelsFirst { [1, 4, 5, 6] } else { [1, 5, 6, 4] };
            same_results(&graph_of(&dims, |g, x| {
                let w = g.constant("w", pseudo_random(&Shape::new([4, 2, 3, 3]).unwrap()));
                let b = g.constant("b", pseudo_random(&Shape::new([4]).unwrap()));
                let window = Window::new([3, 3]).pads([2, 0], [0, 2]);
                let op = Conv { window, groups: 2, layout, bias: true, residual: true, clamp };
                g.add("conv", op, &[x, w, b, x]).unwrap()
            }));
        }
    }
}

#[test]
fn fused_products() {
    for (dims, bias, residual) in
        [(&[3, 4][..], true, true), (&[2, 3, 4], true, false), (&[3, 4], false, true)]
    {
        // Only Gemm adds the bias where the IR does: before the products.
        close_results(&graph_of(dims, |g, x| {
            let w = g.constant("w", pseudo_random(&Shape::new([4, 4]).unwrap()));
            let b = g.constant("b", pseudo_random(&Shape::new([4]).unwrap()));
            let operands: Vec<_> =
                [x, w].into_iter().chain(bias.then_some(b)).chain(residual.then_some(x)).collect();
            g.add("product", MatMul { bias, residual, clamp: Clamp::RELU }, &operands).unwrap()
        }));
    }
}

#[test]
fn functions_of_elements() {
    use UnaryKind::*;
    for kind in [
        Identity,
        Relu,
        LeakyRelu { alpha: 0.1 },
        Clip { lo: -1.0, hi: 1.5 },
        Sigmoid,
        Tanh,
        HardSigmoid { alpha: 0.3, beta: 0.4 },
        HardSwish,
        Gelu,
        GeluTanh,
        Elu { alpha: 0.5 },
        Selu { alpha: 1.5, gamma: 1.1 },
        Mish,
        Softplus,
        Softsign,
        Exp,
        Log,
        Sqrt,
        Reciprocal,
        Erf,
        Neg,
        Abs,
        Sign,
        Floor,
        Ceil,
        Round,
        Sin,
        Cos,
    ] {
        let g = of_op(&[2, 3], Unary { kind });
        same_results(&g);
        let back = reimported(&g);
        // An identity is no node after import.
        let expected = (kind != Identity).then_some(Op::Unary(Unary { kind }));
        assert_eq!(back.op(back.outputs()[0].value.node), expected.as_ref());
    }
    // x·sigmoid(x) rounds once more than the fused function may.
    close_results(&of_op(&[2, 3], Unary { kind: Silu }));
}

#[test]
fn ops_that_move_elements() {
    let s = |start, len, step| SliceSpec { start, len, step };
    same_results(&of_op(&[2, 6], Reshape { shape: Shape::new([2, 2, 3]).unwrap() }));
    same_results(&of_op(&[2, 6], Reshape { shape: Shape::new([3, 4]).unwrap() }));
    same_results(&of_op(&[0, 6], Reshape { shape: Shape::new([3, 0]).unwrap() }));
    same_results(&of_op(&[2, 3, 4], Transpose { perm: vec![2, 0, 1] }));
    same_results(&of_op(&[4, 6], Slice { axes: vec![s(3, 4, -1), s(1, 3, 2)] }));
    same_results(&of_op(&[4, 6], Slice { axes: vec![s(0, 0, 1), s(0, 6, 1)] }));
    same_results(&graph_of(&[2, 3], |g, x| g.add("cat", Concat { axis: 1 }, &[x, x]).unwrap()));
    for mode in [PadMode::Constant { value: 1.5 }, PadMode::Reflect, PadMode::Edge, PadMode::Wrap] {
        same_results(&of_op(&[3, 4], Pad { before: vec![1, 0], after: vec![2, 3], mode }));
    }
    same_results(&of_op(&[1, 4], Expand { shape: Shape::new([3, 4]).unwrap() }));
    same_results(&graph_of(&[3, 4], |g, x| {
        let i = g.constant("i", i64s(&[2, -1]));
        g.add("gather", Gather { axis: 1 }, &[x, i]).unwrap()
    }));
}

#[test]
fn interpolations() {
    let crop = Coordinates::TfCropAndResize { start: 0.1, end: 1.2, outside: 7.0 };
    let nearest = Interpolation::Nearest(Nearest::PreferCeil);
    let linear = Interpolation::Linear { antialias: true };
    let cubic = Interpolation::Cubic { a: -0.5, antialias: false };
    let (half, corners) = (Coordinates::HalfPixel, Coordinates::AlignCorners);
    for (length, scale, interpolation, coordinates) in [
        (5, 1.25, nearest, Coordinates::Asymmetric),
        (3, 3.0 / 4.0, linear, half),
        (6, 1.5, cubic, Coordinates::HalfPixelSymmetric),
        (7, 7.0 / 4.0, cubic, corners),
        (9, 9.0 / 4.0, linear, crop),
        // No f32: written as a length.
        (3, 3.0 / 4.0 + 1e-12, linear, half),
    ] {
        for exclude_outside in [false, true] {
            let op = Resample { axis: 1, length, scale, interpolation, coordinates, exclude_outside };
            close_results(&of_op(&[2, 4, 3], op));
        }
    }
}

#[test]
fn pools_norms_and_reductions() {
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        for kind in [PoolKind::Max, PoolKind::Average { count_include_pad: true }] {
            let window = Window::new([2, 3]).strides([2, 1]).pads([0, 1], [0, 1]);
            same_results(&of_op(&[1, 5, 5, 5], Pool { kind, window, ceil_mode: true, layout }));
            let window = Window::new([5, 5]);
            same_results(&of_op(&[1, 5, 5, 5], Pool { kind, window, ceil_mode: false, layout }));
        }
        same_results(&of_op(&[1, 5, 5, 5], Lrn { size: 3, alpha: 0.1, beta: 0.7, bias: 1.0, layout }));
        same_results(&graph_of(&[2, 3, 4, 3], |g, x| {
            let p: Vec<_> =
                ["s", "b", "m", "v"].iter().map(|n| g.constant(n, of(&[3], &[1f32, 0.5, 2.0]))).collect();
            let axis = layout.channel_axis(4);
            g.add("bn", BatchNorm { epsilon: 1e-3, axis }, &[x, p[0], p[1], p[2], p[3]]).unwrap()
        }));
    }
    for log in [false, true] {
        same_results(&of_op(&[2, 3, 4], Softmax { axis: 1, log }));
    }
    use ReduceKind::*;
    for kind in [Sum, Mean, Max, Min, Product, SumSquare, L1, L2, LogSumExp] {
        for axes in [vec![], vec![1], vec![0, 1]] {
            same_results(&of_op(&[3, 4], Reduce { kind, axes, keep_dims: false }));
        }
    }
}

fn fake_quant(dtype: DType, lo: i32, hi: i32, params: QuantParams) -> FakeQuant {
    FakeQuant { dtype, lo, hi, params }
}

#[test]
fn fake_quant_becomes_integers() {
    let act = fake_quant(DType::U8, 0, 255, QuantParams::per_tensor(0.02, 100).unwrap());
    let weights = fake_quant(
        DType::S8,
        -127,
        127,
        QuantParams::per_axis(0, vec![0.01, 0.02, 0.015], vec![0; 3]).unwrap(),
    );
    let mut g = graph_of(&[1, 2, 4, 4], |g, x| {
        let w = g.constant("w", pseudo_random(&Shape::new([3, 2, 3, 3]).unwrap()));
        let b = g.constant("b", pseudo_random(&Shape::new([3]).unwrap()));
        let bias = QuantParams::per_axis(0, vec![2e-4, 4e-4, 3e-4], vec![0; 3]).unwrap();
        let x = g.add("xq", act.clone(), &[x]).unwrap().out();
        let w = g.add("wq", weights.clone(), &[w]).unwrap().out();
        let b = g.add("bq", fake_quant(DType::S32, -(1 << 24), 1 << 24, bias), &[b]).unwrap().out();
        let window = Window::new([3, 3]);
        let layout = Layout::ChannelsFirst;
        let op = Conv { window, groups: 1, layout, bias: true, residual: false, clamp: Clamp::RELU };
        let y = g.add("conv", op, &[x, w, b]).unwrap().out();
        g.add("yq", act.clone(), &[y]).unwrap()
    });
    g.stage = Stage::FakeQuant;
    same_results(&g);
    let back = reimported(&g);
    let dtype = |name: &str| back.find(name).map(|id| back.ty(id.out()).dtype);
    assert_eq!(dtype("w_quantized"), Some(DType::S8));
    assert_eq!(dtype("b_quantized"), Some(DType::S32));
    assert_eq!(dtype("w"), None, "the float weights are not in the file");
    assert!(back.nodes().all(|(_, n)| !matches!(n.op(), Some(Op::AssumeGrid(_)))));
}

#[test]
fn products_of_two_rounded_activations() {
    let g = graph_of(&[2, 3, 8], |g, x| {
        let grid = |scale, zero| QuantParams::per_tensor(scale, zero).unwrap();
        let rounded = |scale, zero| fake_quant(DType::U8, 0, 255, grid(scale, zero));
        let a = g.add("a", rounded(0.02, 100), &[x]).unwrap().out();
        let keys = g.add("keys", Transpose { perm: vec![0, 2, 1] }, &[a]).unwrap().out();
        let b = g.add("b", rounded(0.03, 128), &[keys]).unwrap().out();
        let bias = g.constant("bias", Tensor::from_vec(Shape::new([3]).unwrap(), vec![0.06f32; 3]).unwrap());
        let op = fake_quant(DType::S32, -(1 << 23), 1 << 23, grid(0.0006, 0));
        let bias = g.add("bias_fq", op, &[bias]).unwrap().out();
        let product = MatMul { bias: true, residual: false, clamp: Clamp::RELU };
        let y = g.add("product", product, &[a, b, bias]).unwrap().out();
        g.stage = Stage::FakeQuant;
        g.add("y_fq", rounded(0.1, 0), &[y]).unwrap()
    });
    close_results(&g);
    let ops: Vec<&str> = {
        let back = reimported(&g);
        back.order().into_iter().map(|id| back.mnemonic(id)).filter(|m| *m == "MatMul").collect()
    };
    assert_eq!(ops.len(), 1);
}

#[test]
fn fake_quant_with_fewer_codes_or_more_bits() {
    let per_axis = |zero: i32| QuantParams::per_axis(1, vec![0.5, 0.25], vec![zero; 2]).unwrap();
    for op in [
        fake_quant(DType::U8, 2, 7, QuantParams::per_tensor(0.25, 5).unwrap()),
        fake_quant(DType::S8, -3, 3, per_axis(0)),
        fake_quant(DType::S16, -32768, 32767, QuantParams::per_tensor(1e-3, 0).unwrap()),
        fake_quant(DType::S32, -5, 1 << 20, per_axis(0)),
    ] {
        let mut g = of_op(&[3, 2], op);
        g.stage = Stage::FakeQuant;
        same_results(&g);
    }
}

#[test]
fn quantized_graphs_of_other_exporters() {
    let g = graph_of(&[1, 3], |g, x| {
        let params = QuantParams::per_tensor(0.5, 10).unwrap();
        let q = g.add("q", Quantize { dtype: DType::U8, params }, &[x]).unwrap().out();
        let pad = Pad { before: vec![0, 1], after: vec![0, 0], mode: PadMode::Constant { value: 2.5 } };
        let padded = g.add("pad", pad, &[q]).unwrap().out();
        let params = Some(QuantParams::per_tensor(0.25, 3).unwrap());
        let other = g.add("grid", AssumeGrid { params }, &[padded]).unwrap().out();
        g.add("dq", Dequantize {}, &[other]).unwrap()
    });
    same_results(&g);
}

#[test]
fn results_may_be_inputs_constants_or_stand_twice() {
    let mut g = of_op(&[2], Unary { kind: UnaryKind::Relu });
    let (x, y) = (g.inputs()[0].out(), g.outputs()[0].value);
    let c = g.constant("c", iota(&[2]));
    for (name, v) in [("again", y), ("through", x), ("fixed", c)] {
        g.output(name, v);
    }
    same_results(&g);
}

#[test]
fn names_that_clash_are_told_apart() {
    let mut g = Graph::new("test");
    let x = g.input("x", TensorType::f32(&[2]).unwrap()).unwrap();
    let a = g.add("y", Unary { kind: UnaryKind::Relu }, &[x]).unwrap().out();
    let b = g.add("y_Sigmoid", Unary { kind: UnaryKind::Silu }, &[a]).unwrap().out();
    g.output("y", b);
    assert_eq!(export(&g), export(&g));
    reimported(&g);
}

#[test]
fn integer_graphs_are_refused() {
    let mut g = of_op(&[2], Unary { kind: UnaryKind::Relu });
    g.stage = Stage::Int8;
    assert_eq!(export(&g), Err(ExportError::Stage(Stage::Int8)));
    assert!(export(&g).unwrap_err().to_string().contains("fake-quant"));
}

#[test]
fn a_batch_may_have_a_name() {
    let g = of_op(&[1, 2, 3], Reshape { shape: Shape::new([1, 6]).unwrap() });
    let bytes = export_with(&g, &ExportOptions { batch: Some("N".into()) }).unwrap();
    let model = Model::parse(bytes).unwrap();
    let bindings = Bindings { symbols: [("N".to_owned(), 4)].into(), ..Bindings::default() };
    let g = model.graph(&bindings).unwrap();
    assert_eq!(g.shape(g.outputs()[0].value).dims(), [4, 6]);
}
