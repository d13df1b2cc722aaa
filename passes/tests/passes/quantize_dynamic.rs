use crate::common::{Net, applied, count, declined, distance, find, inputs, run};
use qcc_ir::{
    DType, Device, Graph, Op, Shape, Tensor, interpreter,
    ops::{
        Activation, Binary, BinaryKind, Cast, Cell, Clamp, DynamicQuantize, IntConv, PlainMatMul, Recurrent,
        Reshape, UnaryKind, Window,
    },
};
use qcc_passes::{Options, Precision, Report, WeightBits, lower, prepare, quantize};

fn dynamic(graph: &Graph, options: Options) -> (Graph, Report) {
    let options = Options { precision: Precision::Int8Dynamic, ..options };
    let mut graph = graph.clone();
    let report = prepare(&mut graph, &options, &mut |_, _| {}).unwrap();
    let report = report.then(quantize(&mut graph, &Default::default(), &options, &mut |_, _| {}).unwrap());
    let report = report.then(lower(&mut graph, &options, &mut |_, _| {}).unwrap());
    (graph, report)
}

/// Queries, keys and values of 32 numbers for each of 6 tokens, and what attention makes of them.
fn attention() -> Graph {
    let mut net = Net::new(3);
    let x = net.input("x", &[6, 32]);
    let [q, k, v] = ["q", "k", "v"].map(|name| net.matmul(name, x, 32));
    let kt = net.transpose("kt", k, &[1, 0]);
    let scores = net.product("scores", q, kt);
    let shares = net.softmax("shares", scores);
    let mixed = net.product("mixed", shares, v);
    let out = net.matmul("out", mixed, 32);
    let bias = net.random_constant("bias", &[32], 0.5);
    let biased = net.binary("biased", BinaryKind::Add, out, bias);
    let y = net.binary("y", BinaryKind::Add, biased, x);
    let y = net.unary("relu", UnaryKind::Relu, y);
    net.finish(y)
}

#[test]
fn products_of_one_activation_share_its_codes() {
    let float = attention();
    let (placed, report) = dynamic(&float, Options::default());
    assert_eq!((count(&placed, "DynamicQuantize"), count(&placed, "QMatMulToFloat")), (2, 4), "{report}");
    assert_eq!(count(&placed, "MatMul"), 2, "{report}");
    assert!(declined(&report, "quantize_dynamic", "scores").contains("two activations"), "{report}");
    let Some(Op::QMatMulToFloat(out)) = placed.op(find(&placed, "out")) else { panic!("{report}") };
    assert!(out.to.bias && out.to.residual && out.to.clamp == Clamp::RELU, "{report}");
    assert_eq!(placed.node(find(&placed, "out")).device, Some(Device::Int8Jit));
    for seed in 0..4 {
        let x = inputs(&float, seed);
        let d = distance(&run(&float, &x), &run(&placed, &x));
        assert!(d > 0.0 && d < 0.03, "{d}");
    }
}

#[test]
fn weights_have_the_bits_that_were_asked_for() {
    for bits in WeightBits::ALL {
        let (placed, _) = dynamic(&attention(), Options { weight_bits: bits, ..Options::default() });
        let weights = placed.constant_value(placed.operand(find(&placed, "q"), 1)).unwrap();
        let most = weights.as_slice::<i8>().unwrap().iter().map(|w| i32::from(*w).abs()).max();
        assert_eq!(most, Some(bits.largest()));
    }
}

#[test]
fn what_does_not_pay_or_cannot_be_stays_float() {
    let mut net = Net::new(4);
    let x = net.input("x", &[6, 32]);
    let narrow = net.matmul("narrow", x, 8);
    let infinite = net.constant("w", &[8, 64], vec![f32::INFINITY; 512]);
    let short = net.product("short", narrow, infinite);
    let weights = net.constant("w2", &[64, 64], vec![f32::NAN; 64 * 64]);
    let y = net.product("nan", short, weights);
    let (placed, report) = dynamic(&net.finish(y), Options::default());
    assert_eq!((count(&placed, "QMatMulToFloat"), applied(&report, "quantize_dynamic")), (0, 0), "{report}");
    for (node, why) in [("narrow", "too few"), ("short", "too few"), ("nan", "not finite")] {
        assert!(declined(&report, "quantize_dynamic", node).contains(why), "{report}");
    }
}

#[test]
fn weights_of_zeros_and_a_token_of_zeros_are_exact() {
    let mut net = Net::new(5);
    let x = net.input("x", &[2, 16]);
    let w = net.constant("w", &[16, 16], vec![0.0; 256]);
    let y = net.product("y", x, w);
    let (placed, report) = dynamic(&net.finish(y), Options::default());
    assert_eq!(count(&placed, "QMatMulToFloat"), 1, "{report}");
    let x =
        Tensor::from_vec(Shape::new([2, 16]).unwrap(), (0..32).map(|i| (i / 16) as f32).collect()).unwrap();
    assert_eq!(run(&placed, &[x]), [0.0; 32]);
}

#[test]
fn recurrent_layers_multiply_codes_of_states() {
    let mut net = Net::new(7);
    let x = net.input("x", &[5, 2, 24]);
    let gates = net.matmul("gates", x, 4 * 20);
    let weights = net.random_constant("R", &[20, 4 * 20], 0.3);
    let start = net.constant("start", &[2, 20], vec![0.0; 40]);
    let lstm = Recurrent {
        cell: Cell::Lstm { peepholes: false, coupled: false },
        activations: [UnaryKind::Sigmoid, UnaryKind::Tanh, UnaryKind::Tanh].map(Activation::Unary).to_vec(),
        clip: None,
        reverse: false,
        lengths: false,
    };
    let y = net.op("lstm", lstm, &[gates, weights, start, start]);
    let float = net.finish(y);
    let (placed, report) = dynamic(&float, Options::default());
    let lstm = find(&placed, "lstm");
    assert_eq!(placed.ty(placed.operand(lstm, 1)).dtype, DType::S8, "{report}");
    assert_eq!(placed.node(lstm).device, Some(Device::Int8Jit), "{report}");
    assert_eq!(count(&placed, "QMatMulToFloat"), 1, "{report}");
    let x = inputs(&float, 2);
    let d = distance(&run(&float, &x), &run(&placed, &x));
    assert!(d > 0.0 && d < 0.03, "{d}");
}

/// A product as files hold it that were quantized at run time by somebody else, with weights that have a zero point.
fn integer_product(zero_point: u8) -> Graph {
    let mut net = Net::new(6);
    let x = net.input("x", &[2, 5, 20]);
    let cast = |to| Cast { to };
    let binary = |kind| Binary { kind };
    let q = net.graph.add("q", DynamicQuantize { axis: 0 }, &[x]).unwrap();
    let scalar = Reshape { shape: Shape::scalar() };
    let [scale, zero] = [1, 2].map(|port| net.op("scalar", scalar.clone(), &[q.port(port)]));
    let zero = net.op("z8", cast(DType::U8), &[zero]);
    let zero = net.op("z32", cast(DType::S32), &[zero]);
    let a = net.op("a32", cast(DType::S32), &[q.port(0)]);
    let a = net.op("a", binary(BinaryKind::Sub), &[a, zero]);
    let codes: Vec<u8> = (0..20 * 12).map(|i| (i * 37 % 251) as u8).collect();
    let w = net.graph.constant("w", Tensor::from_vec(Shape::new([20, 12]).unwrap(), codes).unwrap());
    let w = net.op("w32", cast(DType::S32), &[w]);
    let wz = net.graph.constant("wz", Tensor::scalar(i32::from(zero_point)));
    let w = net.op("b", binary(BinaryKind::Sub), &[w, wz]);
    let sums = net.op("sums", PlainMatMul {}, &[a, w]);
    let sums = net.op("numbers", cast(DType::F32), &[sums]);
    let scales = net.constant("s", &[12], (0..12).map(|i| 0.01 + i as f32 * 1e-3).collect());
    let factor = net.op("factor", binary(BinaryKind::Mul), &[scale, scales]);
    let y = net.op("scaled", binary(BinaryKind::Mul), &[sums, factor]);
    let bias = net.random_constant("bias", &[12], 1.0);
    let y = net.op("biased", binary(BinaryKind::Add), &[bias, y]);
    let y = net.unary("relu", UnaryKind::Relu, y);
    net.finish(y)
}

#[test]
fn products_of_integers_with_scales_are_one_op_with_the_same_bits() {
    // Zero points within which weights have 8 bits, and with which they are two parts of some or of all columns.
    for zero_point in [128, 100, 0] {
        for precision in [Precision::Float, Precision::Int8, Precision::Int8Dynamic] {
            let before = integer_product(zero_point);
            let mut after = before.clone();
            let report =
                prepare(&mut after, &Options { precision, ..Options::default() }, &mut |_, _| {}).unwrap();
            assert_eq!(count(&after, "QMatMulToFloat"), 1, "{report}");
            assert_eq!(
                count(&after, "Binary") + count(&after, "PlainMatMul") + count(&after, "Cast"),
                0,
                "{report}"
            );
            for seed in 0..3 {
                let x = inputs(&before, seed);
                assert_eq!(interpreter::run(&before, &x).unwrap(), interpreter::run(&after, &x).unwrap());
            }
        }
    }
}

/// A ConvInteger of 4 channels with its scales, a bias and a Relu, as files have them; of one or two dimensions.
fn integer_convolution(zero_point: i32, groups: usize, is_flat: bool) -> Graph {
    let mut net = Net::new(9);
    let cast = |to| Cast { to };
    let binary = |kind| Binary { kind };
    let (x, kernel): (&[usize], &[usize]) =
        if is_flat { (&[2, 4, 9], &[3]) } else { (&[2, 4, 5, 6], &[3, 2]) };
    let x = net.input("x", x);
    let q = net.graph.add("q", DynamicQuantize { axis: 0 }, &[x]).unwrap();
    let scalar = Reshape { shape: Shape::scalar() };
    let [scale, zero] = [1, 2].map(|port| net.op("scalar", scalar.clone(), &[q.port(port)]));
    let zero = net.op("z8", cast(DType::U8), &[zero]);
    let zero = net.op("z32", cast(DType::S32), &[zero]);
    let x = net.op("x32", cast(DType::S32), &[q.port(0)]);
    let x = net.op("x", binary(BinaryKind::Sub), &[x, zero]);
    let mut dims = vec![8, 4 / groups];
    dims.extend(kernel);
    let shape = Shape::new(dims).unwrap();
    let codes: Vec<u8> = (0..shape.elements()).map(|i| (i * 37 % 251) as u8).collect();
    let w = net.graph.constant("w", Tensor::from_vec(shape, codes).unwrap());
    let w = net.op("w32", cast(DType::S32), &[w]);
    let wz = net.graph.constant("wz", Tensor::scalar(zero_point));
    let w = net.op("wc", binary(BinaryKind::Sub), &[w, wz]);
    let pads = vec![1; kernel.len()];
    let window = Window::new(kernel).pads(pads.clone(), vec![0; kernel.len()]);
    let sums = net.op("sums", IntConv { window, groups }, &[x, w]);
    let sums = net.op("numbers", cast(DType::F32), &[sums]);
    let w_scale = net.graph.constant("s", Tensor::scalar(0.01f32));
    let factor = net.op("factor", binary(BinaryKind::Mul), &[scale, w_scale]);
    let y = net.op("scaled", binary(BinaryKind::Mul), &[sums, factor]);
    let mut channels = vec![1, 8];
    channels.resize(2 + kernel.len(), 1);
    let bias = net.random_constant("bias", &channels, 1.0);
    let y = net.op("biased", binary(BinaryKind::Add), &[y, bias]);
    let y = net.unary("relu", UnaryKind::Relu, y);
    net.finish(y)
}

#[test]
fn convolutions_of_integers_with_scales_are_one_op_with_the_same_bits() {
    for (zero_point, groups, is_flat) in [(128, 1, false), (90, 1, false), (128, 2, false), (128, 4, true)] {
        let before = integer_convolution(zero_point, groups, is_flat);
        let (after, report) = dynamic(&before, Options::default());
        assert_eq!(count(&after, "QConvToFloat"), 1, "{report}");
        assert_eq!(count(&after, "Binary") + count(&after, "IntConv") + count(&after, "Cast"), 0, "{report}");
        for seed in 0..3 {
            let x = inputs(&before, seed);
            assert_eq!(interpreter::run(&before, &x).unwrap(), interpreter::run(&after, &x).unwrap());
        }
    }
    // 9 bits in groups: floats compute on the integers.
    let (after, report) = dynamic(&integer_convolution(0, 2, false), Options::default());
    assert_eq!(count(&after, "Conv"), 1, "{report}");
    assert!(declined(&report, "take_dynamic_products", "scaled").contains("groups"), "{report}");
}
