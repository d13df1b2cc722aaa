use crate::common::*;
use qcc_ir::{
    DType, Op, Shape, Tensor, TensorType,
    ops::{
        BinaryKind, Cast, Expand, GatherElements, Layout, PadMode, PlainMatMul, Pool, PoolKind, Reduce,
        ReduceKind, ScatterElements, Slice, SliceSpec, UnaryKind, Update, Window,
    },
};
use qcc_passes::{Options, prepare};

#[test]
fn what_does_nothing_goes() {
    let mut net = Net::new(1);
    let x = net.input("x", &[2, 3, 4, 4]);
    let y = net.unary("identity", UnaryKind::Identity, x);
    let y = net.reshape("reshape", y, &[2, 3, 4, 4]);
    let y = net.transpose("transpose", y, &[0, 1, 2, 3]);
    let y = net.pad("pad", y, 0, PadMode::Reflect);
    let all = [2, 3, 4, 4].map(SliceSpec::all).to_vec();
    let y = net.op("slice", Slice { axes: all }, &[y]);
    let y = net.op("expand", Expand { shape: Shape::new([2, 3, 4, 4]).unwrap() }, &[y]);
    let y = net.concat("concat", &[y], 1);
    let y = net.max_pool("pool", y, 1);
    let y = net.unary("clip", UnaryKind::Clip { lo: f32::NEG_INFINITY, hi: f32::INFINITY }, y);
    let y = net.unary("exp", UnaryKind::Exp, y);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(after.len(), 2, "{report}");
    assert_eq!(applied(&report, "canonicalise"), 9);
}

#[test]
fn chains_of_moves_merge() {
    let mut net = Net::new(2);
    let x = net.input("x", &[2, 3, 4, 5]);
    let y = net.transpose("t1", x, &[0, 2, 3, 1]);
    let y = net.transpose("t2", y, &[0, 3, 2, 1]);
    let y = net.reshape("r1", y, &[6, 20]);
    let y = net.reshape("r2", y, &[3, 40]);
    let y = net.unary("exp", UnaryKind::Exp, y);
    // Inverses cancel.
    let y = net.transpose("t3", y, &[1, 0]);
    let y = net.transpose("t4", y, &[1, 0]);
    // Only axes of length 1 move: no element does.
    let y = net.reshape("r3", y, &[3, 40, 1]);
    let y = net.transpose("t5", y, &[2, 0, 1]);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!((count(&after, "Transpose"), count(&after, "Reshape")), (1, 2), "{report}");
    assert!(after.find("t2").is_some() && after.find("t5").is_some());
}

#[test]
fn a_transpose_between_others_is_kept_for_its_other_users() {
    let mut net = Net::new(3);
    let x = net.input("x", &[2, 3]);
    let t = net.transpose("t1", x, &[1, 0]);
    let back = net.transpose("t2", t, &[1, 0]);
    let e = net.unary("exp", UnaryKind::Exp, back);
    net.graph.output("transposed", t);
    let (after, _) = prepared(&net.finish(e));
    assert_eq!(count(&after, "Transpose"), 1);
}

#[test]
fn spatial_means_are_average_pools() {
    for (dims, axes, keep_dims, layout) in [
        (vec![2, 3, 4, 5], vec![2, 3], true, Layout::ChannelsFirst),
        (vec![2, 3, 4, 5], vec![2, 3], false, Layout::ChannelsFirst),
        (vec![2, 4, 5, 3], vec![1, 2], false, Layout::ChannelsLast),
        (vec![2, 3, 5], vec![2], false, Layout::ChannelsFirst),
        (vec![2, 5, 3], vec![1], true, Layout::ChannelsLast),
    ] {
        let mut net = Net::new(4);
        let x = net.input("x", &dims);
        let y = net.op("mean", Reduce { kind: ReduceKind::Mean, axes, keep_dims }, &[x]);
        let (after, report) = prepared(&net.finish(y));
        let pool = after.op(find(&after, "mean"));
        let Some(Op::Pool(p)) = pool else { panic!("{pool:?}\n{report}") };
        assert_eq!((p.layout, p.window.rank()), (layout, 2));
    }
    for (axes, dims) in
        [(vec![1], vec![2, 3, 4, 5]), (vec![1, 2, 3], vec![2, 3, 4, 5]), (vec![0], vec![3, 4])]
    {
        let mut net = Net::new(5);
        let x = net.input("x", &dims);
        let y = net.op("mean", Reduce { kind: ReduceKind::Mean, axes, keep_dims: true }, &[x]);
        let (after, _) = prepared(&net.finish(y));
        assert_eq!(after.op(find(&after, "mean")).map(Op::mnemonic), Some("Reduce"));
    }
}

#[test]
fn one_dimensional_windows_become_two_dimensional() {
    let mut net = Net::new(6);
    let x = net.input("x", &[2, 6, 20]);
    let window = Window::new([5]).strides([2]).pads([2], [1]).dilations([2]);
    let y = net.conv("conv", x, 4, window, 2, true);
    let pool = Pool {
        kind: PoolKind::Average { count_include_pad: false },
        window: Window::new([3]).pads([1], [1]),
        ceil_mode: false,
        layout: Layout::ChannelsFirst,
    };
    let y = net.op("pool", pool, &[y]);
    let (after, report) = prepared(&net.finish(y));
    for name in ["conv", "pool"] {
        let shape = after.shape(find(&after, name).out());
        assert_eq!((shape.rank(), shape[2]), (4, 1), "{report}");
    }
    assert_eq!(count(&after, "Reshape"), 2, "in, and out; none between\n{report}");
}

#[test]
fn compositions_get_their_name() {
    let kind = |build: &dyn Fn(&mut Net, qcc_ir::ValueId) -> qcc_ir::ValueId| {
        let mut net = Net::new(7);
        let x = net.input("x", &[2, 9]);
        let y = build(&mut net, x);
        let (after, report) = prepared(&net.finish(y));
        let ops: Vec<String> =
            after.nodes().filter_map(|(_, n)| n.op().map(|op| format!("{op:?}"))).collect();
        assert_eq!(ops.len(), 1, "{report}");
        ops[0].clone()
    };
    let scalar = |net: &mut Net, x: f32| net.graph.constant("c", Tensor::scalar(x));
    assert!(
        kind(&|net, x| {
            let s = net.unary("sigmoid", UnaryKind::Sigmoid, x);
            net.binary("mul", BinaryKind::Mul, s, x)
        })
        .contains("Silu")
    );
    assert!(
        kind(&|net, x| {
            let s = net.unary("hard", UnaryKind::HardSigmoid { alpha: 1.0 / 6.0, beta: 0.5 }, x);
            net.binary("mul", BinaryKind::Mul, x, s)
        })
        .contains("HardSwish")
    );
    assert!(
        kind(&|net, x| {
            let c = scalar(net, 0.0);
            net.binary("max", BinaryKind::Max, c, x)
        })
        .contains("Relu")
    );
    assert!(
        kind(&|net, x| {
            let c = scalar(net, 0.5);
            net.binary("min", BinaryKind::Min, x, c)
        })
        .contains("Clip { lo: -inf, hi: 0.5 }")
    );
    assert!(
        kind(&|net, x| {
            let c = scalar(net, 255.0);
            net.binary("div", BinaryKind::Div, x, c)
        })
        .contains("Mul")
    );
    // Not x times its own sigmoid, and a division by what has no finite reciprocal.
    assert!(
        kind(&|net, x| {
            let c = scalar(net, 1e-42);
            net.binary("div", BinaryKind::Div, x, c)
        })
        .contains("Div")
    );
}

#[test]
fn a_square_is_a_product() {
    let mut net = Net::new(20);
    let x = net.input("x", &[2, 5]);
    let two = net.constant("two", &[], vec![2.0]);
    let y = net.binary("square", BinaryKind::Pow, x, two);
    let (after, report) = prepared(&net.finish(y));
    let Some(Op::Binary(b)) = after.op(find(&after, "square")) else { panic!("{report}") };
    assert_eq!(b.kind, BinaryKind::Mul);
}

#[test]
fn small_powers_are_products_and_halves_are_roots_of_what_is_not_negative() {
    let power = |exponent: f32, squared: bool| {
        let mut net = Net::new(20);
        let x = net.input("x", &[2, 5]);
        let base = if squared { net.binary("own_square", BinaryKind::Mul, x, x) } else { x };
        let c = net.constant("c", &[], vec![exponent]);
        let y = net.binary("power", BinaryKind::Pow, base, c);
        let before = net.finish(y);
        let (after, report) = prepared(&before);
        for (a, b) in run(&before, &inputs(&before, 1)).iter().zip(run(&after, &inputs(&before, 1))) {
            assert!((a - b).abs() <= 1e-6 * a.abs(), "{exponent}: {a} is not {b}\n{report}");
        }
        format!("{:?}", after.op(find(&after, "power")).unwrap())
    };
    assert!(power(3.0, false).contains("Mul"));
    assert!(power(4.0, false).contains("Mul"));
    assert!(power(0.5, true).contains("Sqrt"));
    assert!(power(1.5, true).contains("Pow"));
}

#[test]
fn elements_by_one_index_a_row_are_rows() {
    // A graph of 5 nodes with 3 numbers, and 4 edges; then one whose rows are not whole.
    for (width, name) in [(3, "rows"), (2, "elements")] {
        let mut net = Net::new(23);
        let nodes = net.input("nodes", &[5, 3]);
        let edges = net.input("edges", &[4, width]);
        let ends = TensorType::new(DType::S64, Shape::new([4, 1]).unwrap());
        let ends = net.graph.input("ends", ends).unwrap();
        let all = net.op("all", Expand { shape: Shape::new([4, width]).unwrap() }, &[ends]);
        let sums = net.op("sums", ScatterElements { axis: 0, update: Update::Add }, &[nodes, all, edges]);
        let y = net.op("picked", GatherElements { axis: 0 }, &[sums, all]);
        let before = net.finish(y);
        // Not `prepared`, which runs the graph on numbers.
        let mut after = before.clone();
        let report = prepare(&mut after, &Options::default(), &mut |_, _| {}).unwrap();
        let are_rows = usize::from(name == "rows");
        assert_eq!([count(&after, "ScatterNd"), count(&after, "Gather")], [are_rows; 2], "{report}");
        let mut x = inputs(&before, 1);
        x[2] = Tensor::from_vec(Shape::new([4, 1]).unwrap(), vec![1i64, -1, 1, 0]).unwrap();
        assert_eq!(run(&before, &x), run(&after, &x), "{report}");
    }
}

#[test]
fn gelu_is_one_function_in_any_order_of_its_factors() {
    for order in 0..3 {
        let mut net = Net::new(21);
        let x = net.input("x", &[2, 5]);
        let scalar = |net: &mut Net, name: &str, c: f32| net.constant(name, &[], vec![c]);
        let [root, one, half] =
            [("root", 2f32.sqrt()), ("one", 1.0), ("half", 0.5)].map(|(name, c)| scalar(&mut net, name, c));
        let scaled = net.binary("scaled", BinaryKind::Div, x, root);
        let erf = net.unary("erf", UnaryKind::Erf, scaled);
        let bell = net.binary("bell", BinaryKind::Add, erf, one);
        let [a, b, c] = [[x, bell, half], [half, x, bell], [bell, half, x]][order];
        let inner = net.binary("inner", BinaryKind::Mul, a, b);
        let y = net.binary("gelu", BinaryKind::Mul, c, inner);
        let (after, report) = prepared(&net.finish(y));
        let kind = match after.op(find(&after, "gelu")) {
            Some(Op::Unary(u)) => u.kind,
            _ => panic!("{report}"),
        };
        assert_eq!((kind, count(&after, "Binary")), (UnaryKind::Gelu, 0), "{report}");
    }
}

#[test]
fn what_is_not_quite_gelu_stays() {
    for (root, one, half) in [(1.5, 1.0, 0.5), (2f32.sqrt(), 1.1, 0.5), (2f32.sqrt(), 1.0, 0.25)] {
        let mut net = Net::new(22);
        let x = net.input("x", &[2, 5]);
        let [root, one, half] =
            [("root", root), ("one", one), ("half", half)].map(|(name, c)| net.constant(name, &[], vec![c]));
        let scaled = net.binary("scaled", BinaryKind::Div, x, root);
        let erf = net.unary("erf", UnaryKind::Erf, scaled);
        let bell = net.binary("bell", BinaryKind::Add, erf, one);
        let inner = net.binary("inner", BinaryKind::Mul, x, bell);
        let y = net.binary("gelu", BinaryKind::Mul, inner, half);
        let (after, _) = prepared(&net.finish(y));
        assert!(matches!(after.op(find(&after, "gelu")), Some(Op::Binary(_))));
    }
}

#[test]
fn the_mean_of_a_token_is_no_pool() {
    let mut net = Net::new(23);
    let x = net.input("x", &[2, 7, 5]);
    let mean = |keep_dims| Reduce { kind: ReduceKind::Mean, axes: vec![2], keep_dims };
    let tokens = net.op("tokens", mean(true), &[x]);
    let channels = net.op("channels", mean(false), &[x]);
    net.graph.output("tokens", tokens);
    let (after, _) = prepared(&net.finish(channels));
    assert_eq!((count(&after, "Reduce"), count(&after, "Pool")), (1, 1));
}

/// As models have it whose activations are quantized when they run.
#[test]
fn products_of_integers_that_become_floats_need_no_integers() {
    let mut net = Net::new(20);
    let x = net.input("x", &[3, 5]);
    let scaled = net.constant("steps", &[], vec![0.01]);
    let y = net.binary("quotient", BinaryKind::Div, x, scaled);
    let y = net.unary("round", UnaryKind::Round, y);
    let zero = net.constant("zero", &[], vec![127.4]);
    let zero = net.binary("moved", BinaryKind::Add, zero, x);
    let zero = net.unary("bounded", UnaryKind::Clip { lo: 0.0, hi: 255.0 }, zero);
    let zero = net.unary("whole", UnaryKind::Round, zero);
    let zero = net.op("zero_u8", Cast { to: DType::U8 }, &[zero]);
    let back = net.op("zero_f32", Cast { to: DType::F32 }, &[zero]);
    let y = net.binary("sum", BinaryKind::Add, y, back);
    let y = net.unary("clip", UnaryKind::Clip { lo: 0.0, hi: 255.0 }, y);
    let y = net.op("codes", Cast { to: DType::U8 }, &[y]);
    let [y, zero] = [y, zero].map(|v| net.op("wide", Cast { to: DType::S32 }, &[v]));
    let y = net.binary("centred", BinaryKind::Sub, y, zero);
    let w = Tensor::from_vec(Shape::new([5, 2]).unwrap(), (-5..5).collect::<Vec<i32>>()).unwrap();
    let w = net.graph.constant("w", w);
    let y = net.op("product", PlainMatMul {}, &[y, w]);
    let y = net.op("numbers", Cast { to: DType::F32 }, &[y]);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!((count(&after, "PlainMatMul"), count(&after, "MatMul")), (0, 1), "{report}");
    // The zero point alone, which the sum takes from the integer.
    assert_eq!(count(&after, "Cast"), 2, "{report}");
}

#[test]
fn a_bias_of_integers_does_not_keep_a_product_from_floats() {
    // The second kind is wide integers, beside which a bias stays where it is.
    for (is_narrow, products) in [(true, (0, 1)), (false, (1, 0))] {
        let mut net = Net::new(23);
        let mut x = net.input("x", &[3, 5]);
        if is_narrow {
            x = net.unary("bounded", UnaryKind::Clip { lo: 0.0, hi: 255.0 }, x);
            x = net.op("codes", Cast { to: DType::U8 }, &[x]);
        }
        let x = net.op("integers", Cast { to: DType::S32 }, &[x]);
        let mut constant = |name: &str, dims: &[usize], codes: Vec<i32>| {
            net.graph.constant(name, Tensor::from_vec(Shape::new(dims).unwrap(), codes).unwrap())
        };
        let w = constant("w", &[5, 2], (-5..5).collect());
        let bias = constant("bias", &[2], vec![-40_000, 7]);
        let y = net.op("product", PlainMatMul {}, &[x, w]);
        let y = net.binary("sum", BinaryKind::Add, y, bias);
        let y = net.op("numbers", Cast { to: DType::F32 }, &[y]);
        let (after, report) = prepared(&net.finish(y));
        assert_eq!((count(&after, "PlainMatMul"), count(&after, "MatMul")), products, "{report}");
    }
}

#[test]
fn products_of_wide_integers_stay_integers() {
    let mut net = Net::new(21);
    let x = net.input("x", &[3, 5]);
    let wide = net.constant("wide", &[], vec![1e8]);
    let x = net.binary("scaled", BinaryKind::Mul, x, wide);
    let x = net.op("integers", Cast { to: DType::S32 }, &[x]);
    let w = Tensor::from_vec(Shape::new([5, 2]).unwrap(), (-5..5).collect::<Vec<i32>>()).unwrap();
    let w = net.graph.constant("w", w);
    let y = net.op("product", PlainMatMul {}, &[x, w]);
    let y = net.op("numbers", Cast { to: DType::F32 }, &[y]);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!((count(&after, "PlainMatMul"), count(&after, "MatMul")), (1, 0), "{report}");
}

#[test]
fn what_is_broadcast_is_converted_before() {
    let mut net = Net::new(22);
    let x = net.input("x", &[3, 1]);
    let x = net.op("integers", Cast { to: DType::S64 }, &[x]);
    let x = net.op("wide", Expand { shape: Shape::new([3, 70]).unwrap() }, &[x]);
    let y = net.op("numbers", Cast { to: DType::F32 }, &[x]);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!(after.mnemonic(find(&after, "numbers")), "Expand", "{report}");
    assert_eq!(after.shape(after.operand(find(&after, "numbers"), 0)).dims(), [3, 1]);
}
