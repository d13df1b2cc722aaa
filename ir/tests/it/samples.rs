//! Graphs and tensors that several tests use.

use qcc_ir::{
    DType, Device, Graph, OutputGrid, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::{PowerRounding, RequantMode, Rescaling},
    ops::*,
    text::seeded,
};

pub(crate) fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

pub(crate) fn f32s(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape(dims), values.to_vec()).unwrap()
}

pub(crate) fn grid(scale: f32, zero_point: i32) -> OutputGrid {
    OutputGrid::full(DType::U8, scale, zero_point).unwrap()
}

pub(crate) fn quantized(dtype: DType, dims: &[usize], scale: f32, zero_point: i32) -> TensorType {
    let params = QuantParams::per_tensor(scale, zero_point).unwrap();
    TensorType::quantized(dtype, shape(dims), params).unwrap()
}

/// Adds an op under its mnemonic.
fn add(op: Op, operands: &[ValueId], g: &mut Graph) -> ValueId {
    let name = format!("node/{}", op.mnemonic());
    g.add(&name, op, operands).unwrap().out()
}

/// Ops of whole tensors, which run in the interpreter.
fn whole_tensors(g: &mut Graph) {
    let matrix = g.constant("matrix", f32s(&[2, 2], &[2.0, 0.0, 1.0, 4.0]));
    let inverse = add(Inverse {}.into(), &[matrix], g);
    g.output("inverse", inverse);
    let image = weights(g, TensorType::new(DType::F32, shape(&[1, 2, 4, 4])));
    let rois = g.constant("rois", f32s(&[1, 4], &[0.0, 0.5, 3.0, 2.0]));
    let of_image = g.constant("of_image", Tensor::from_vec(shape(&[1]), vec![0i64]).unwrap());
    let align = RoiAlign { height: 2, width: 1, samples: 2, scale: 0.9, half_pixel: true, largest: false };
    let bins = add(align.into(), &[image, rois, of_image], g);
    g.output("bins", bins);
    let regions = g.constant("regions", f32s(&[2, 5], &[0.0, 0.0, 1.0, 2.0, 3.0, 0.0, -3.0, 2.0, 0.0, 9.0]));
    let pool = MaxRoiPool { height: 2, width: 2, scale: 0.9 };
    let largest = add(pool.into(), &[image, regions], g);
    g.output("largest", largest);
    let [q, k, v] = [4, 2, 2].map(|heads| weights(g, TensorType::new(DType::F32, shape(&[1, 3, heads, 2]))));
    let state = weights(g, TensorType::new(DType::F32, shape(&[1, 2, 2, 2])));
    let rate = weights(g, TensorType::new(DType::F32, shape(&[1, 3, 1])));
    let linear = LinearAttention { decays: false, corrects: true };
    let linear = add(linear.into(), &[q, k, v, state, rate], g);
    g.output("linear", linear);
    let pairs = g.constant("pairs", f32s(&[1, 3], &[0.7, 0.6, 0.2]));
    let coupled = add(CoupleProbabilities { classes: 3 }.into(), &[pairs], g);
    g.output("coupled", coupled);
    // x ≤ 1 leads to the first leaf, another one to the second.
    let s32s = |values: &[i32]| Tensor::from_vec(shape(&[values.len()]), values.to_vec()).unwrap();
    let tree = [
        f32s(&[2, 1], &[0.5, 1.5]),
        s32s(&[0]),
        Tensor::from_vec(shape(&[1]), vec![0u8]).unwrap(),
        f32s(&[1], &[1.0]),
        s32s(&[-1]),
        s32s(&[-2]),
        s32s(&[0]),
        s32s(&[0, 1, 2]),
        s32s(&[0, 0]),
        f32s(&[2], &[10.0, 20.0]),
    ];
    let tree: Vec<ValueId> =
        tree.into_iter().enumerate().map(|(i, t)| g.constant(&format!("tree{i}"), t)).collect();
    let trees = TreeEnsemble { targets: 1, aggregate: Aggregate::Sum };
    let trees = add(trees.into(), &tree, g);
    g.output("trees", trees);
}

/// A constant of seeded contents.
pub(crate) fn weights(g: &mut Graph, ty: TensorType) -> ValueId {
    let seed = g.len() as u64;
    let tensor = seeded(ty.dtype, &ty.shape, seed);
    g.quantized_constant(&format!("weights{seed}"), tensor, ty).unwrap()
}

/// A graph in which every op stands, with every attribute away from its default and grids of both kinds.
pub(crate) fn every_op() -> Graph {
    let mut g = Graph::new("every \"op\"\n\u{1f980}");
    let image = g.input("image", TensorType::f32(&[1, 4, 6, 6]).unwrap()).unwrap();
    let clamp = Clamp { lo: -0.1, hi: f32::INFINITY };
    let window = Window::new([3, 3]).strides([2, 1]).pads([1, 1], [1, 0]).dilations([1, 2]);

    // Floats.
    let w = weights(&mut g, TensorType::f32(&[4, 2, 3, 3]).unwrap());
    let b = weights(&mut g, TensorType::f32(&[4]).unwrap());
    let conv = Conv {
        window: window.clone(),
        groups: 2,
        layout: Layout::ChannelsFirst,
        bias: true,
        residual: false,
        clamp,
    };
    let conv = add(conv.into(), &[image, w, b], &mut g);
    let norm = add(BatchNorm { epsilon: 1e-5, axis: 1 }.into(), &[conv, b, b, b, b], &mut g);
    let lrn = Lrn { size: 3, alpha: 1e-4, beta: 0.75, bias: 1.0, layout: Layout::ChannelsFirst };
    let lrn = add(lrn.into(), &[norm], &mut g);
    let pool = Pool {
        kind: PoolKind::Average { count_include_pad: true },
        window: Window::new([2, 2]).pads([1, 0], [0, 1]),
        ceil_mode: true,
        layout: Layout::ChannelsFirst,
    };
    let pool = add(pool.into(), &[lrn], &mut g);
    let unary =
        add(Unary { kind: UnaryKind::Selu { alpha: 1.6732632, gamma: 1.050701 } }.into(), &[pool], &mut g);
    let binary = add(Binary { kind: BinaryKind::Pow }.into(), &[unary, unary], &mut g);
    let reduce = Reduce { kind: ReduceKind::LogSumExp, axes: vec![0, 3], keep_dims: false };
    let reduce = add(reduce.into(), &[binary], &mut g);
    let m = weights(&mut g, TensorType::f32(&[4, 5]).unwrap());
    let transpose = add(Transpose { perm: vec![1, 0] }.into(), &[reduce], &mut g);
    let matmul = MatMul { bias: false, residual: false, clamp: Clamp::RELU };
    let matmul = add(matmul.into(), &[transpose, m], &mut g);
    let softmax = add(Softmax { axis: 1, log: true }.into(), &[matmul], &mut g);
    let half = add(Cast { to: DType::BF16 }.into(), &[softmax], &mut g);
    g.output("half", half);

    let small = CastSmall { to: DType::F8E5M2, saturate: false, rounding: PowerRounding::Nearest };
    let small = add(small.into(), &[softmax], &mut g);
    g.output("small", small);

    // Moves.
    let reshape = add(Reshape { shape: shape(&[2, 2, 36]) }.into(), &[image], &mut g);
    let slice = Slice {
        axes: vec![
            SliceSpec { start: 1, len: 2, step: -1 },
            SliceSpec::all(2),
            SliceSpec { start: 0, len: 12, step: 3 },
        ],
    };
    let slice = add(slice.into(), &[reshape], &mut g);
    let concat = add(Concat { axis: 1 }.into(), &[slice, slice, slice], &mut g);
    let pad = Pad { before: vec![0, 1, 0], after: vec![0, 0, 2], mode: PadMode::Constant { value: -1e-300 } };
    let pad = add(pad.into(), &[concat], &mut g);
    let expand = add(Expand { shape: shape(&[3, 2, 7, 14]) }.into(), &[pad], &mut g);
    let indices = g.constant("indices", Tensor::from_vec(shape(&[2]), vec![-1i64, 0]).unwrap());
    let gather = add(Gather { axis: 0 }.into(), &[expand, indices], &mut g);
    g.output("gather", gather);

    let places = ArgMaxPool {
        window: Window::new([2, 3]).strides([2, 1]).pads([0, 1], [1, 1]),
        ceil_mode: true,
        column_major: true,
    };
    let places = add(places.into(), &[image], &mut g);
    g.output("places", places);
    let places = weights(&mut g, TensorType::f32(&[1, 2, 3, 2]).unwrap());
    let sample =
        GridSample { mode: SampleMode::Cubic, padding: SamplePadding::Reflection, align_corners: true };
    let sample = add(sample.into(), &[image, places], &mut g);
    g.output("sample", sample);
    let gates = g.input("gates", TensorType::f32(&[3, 2, 8]).unwrap()).unwrap();
    let state_weights = weights(&mut g, TensorType::f32(&[2, 8]).unwrap());
    let state = weights(&mut g, TensorType::f32(&[2, 2]).unwrap());
    let peepholes = weights(&mut g, TensorType::f32(&[6]).unwrap());
    let lengths = g.constant("lengths", Tensor::from_vec(shape(&[2]), vec![3i32, 1]).unwrap());
    let recurrent = Recurrent {
        cell: Cell::Lstm { peepholes: true, coupled: true },
        activations: vec![
            Activation::Unary(UnaryKind::HardSigmoid { alpha: 0.3, beta: 0.5 }),
            Activation::ScaledTanh { alpha: 0.9, beta: 1.1 },
            Activation::Affine { alpha: 0.5, beta: -0.25 },
        ],
        clip: Some(1.5),
        reverse: true,
        lengths: true,
    };
    let recurrent = add(recurrent.into(), &[gates, state_weights, state, state, peepholes, lengths], &mut g);
    g.output("states", recurrent);
    g.output("cell", recurrent.node.port(2));
    // Picks.
    let largest = add(TopK { k: 2, axis: 2, largest: false }.into(), &[slice], &mut g);
    let top = add(GatherElements { axis: 2 }.into(), &[slice, largest], &mut g);
    let scatter = ScatterElements { axis: 2, update: Update::Max };
    let scatter = add(scatter.into(), &[slice, largest, top], &mut g);
    let at = g.constant("at", Tensor::from_vec(shape(&[2, 1]), vec![1i64, -2]).unwrap());
    let parts = add(GatherNd { batch_dims: 1 }.into(), &[scatter, at], &mut g);
    let rows = add(Reshape { shape: shape(&[2, 1, 12]) }.into(), &[parts], &mut g);
    let rows = add(Expand { shape: shape(&[2, 2, 12]) }.into(), &[rows], &mut g);
    let scattered = add(ScatterNd { update: Update::Mul }.into(), &[slice, at, rows], &mut g);
    let total = Cumulate { kind: CumulateKind::Product, axis: 1, exclusive: true, reverse: true };
    let total = add(total.into(), &[scattered], &mut g);
    let less = add(Binary { kind: BinaryKind::Less }.into(), &[total, scattered], &mut g);
    let chosen = add(Where {}.into(), &[less, total, scattered], &mut g);
    let square =
        Slice { axes: vec![SliceSpec::all(2), SliceSpec::all(2), SliceSpec { start: 0, len: 2, step: 5 }] };
    let square = g.add("square", square, &[chosen]).unwrap().out();
    let volume = add(Determinant {}.into(), &[square], &mut g);
    g.output("volume", volume);
    let least = ArgExtreme { largest: false, axis: 2, keep_dims: true, last: true };
    let least = add(least.into(), &[chosen], &mut g);
    let bits = add(BitCast { to: DType::F64 }.into(), &[least], &mut g);
    g.output("bits", bits);

    whole_tensors(&mut g);

    // Grids.
    let scales = vec![0.01, 1e-30, 0.1 + f32::EPSILON, 3e30];
    let per_axis = QuantParams::per_axis(1, scales, vec![0, -3, 0, 127]).unwrap();
    let fake = FakeQuant { dtype: DType::S8, lo: -127, hi: 127, params: per_axis.clone() };
    let fake = add(fake.into(), &[image], &mut g);
    let codes = add(Quantize { dtype: DType::S8, params: per_axis }.into(), &[fake], &mut g);
    let real = add(Dequantize {}.into(), &[codes], &mut g);
    g.output("real", real);

    // Integers.
    let pixels = g.input("pixels", TensorType::new(DType::U8, shape(&[1, 2, 2, 3]))).unwrap();
    let normalize = Normalize { axis: 3, mean: vec![123.7, 0.1, -3e9], std: vec![58.4, 1e-30, 0.1] };
    let normalize = add(normalize.into(), &[pixels], &mut g);
    g.output("normalized", normalize);
    let activation = QuantParams::per_tensor(0.02, 128).unwrap();
    let x = add(Quantize { dtype: DType::U8, params: activation }.into(), &[image], &mut g);
    let w_params = QuantParams::per_axis(0, vec![0.01, 0.02, 0.03, 0.04], vec![0; 4]).unwrap();
    let w_type = TensorType::quantized(DType::S8, shape(&[4, 2, 3, 3]), w_params).unwrap();
    let qw = weights(&mut g, w_type);
    let plain = add(AssumeGrid { params: None }.into(), &[x], &mut g);
    g.output("plain", plain);
    let wide = add(Cast { to: DType::S32 }.into(), &[plain], &mut g);
    let wide_weights = weights(&mut g, TensorType::new(DType::S32, shape(&[4, 2, 3, 3])));
    let int_conv = IntConv { window: window.clone(), groups: 2 };
    let int_conv = add(int_conv.into(), &[wide, wide_weights], &mut g);
    let transposed = add(Transpose { perm: vec![0, 1, 3, 2] }.into(), &[int_conv], &mut g);
    let int_product = add(PlainMatMul {}.into(), &[int_conv, transposed], &mut g);
    g.output("int_product", int_product);
    let qb = weights(&mut g, TensorType::new(DType::S32, shape(&[4])));
    let r = g.input("residual", quantized(DType::U8, &[1, 4, 3, 3], 0.05, 3)).unwrap();
    let qconv = QConv {
        window,
        groups: 2,
        layout: Layout::ChannelsFirst,
        bias: true,
        residual: true,
        requant: RequantMode::Q15,
        output: OutputGrid { lo: 10, hi: 250, ..grid(0.05, 10) },
    };
    let qconv = add(qconv.into(), &[x, qw, qb, r], &mut g);
    let qpool = QAveragePool {
        window: Window::new([2, 2]),
        ceil_mode: false,
        count_include_pad: false,
        layout: Layout::ChannelsFirst,
        rescaling: Rescaling::Float,
        output: grid(0.04, 7),
    };
    let qpool = add(qpool.into(), &[qconv], &mut g);
    let qunary =
        QUnary { kind: UnaryKind::HardSigmoid { alpha: 1.0 / 6.0, beta: 0.5 }, output: grid(1.0 / 255.0, 0) };
    let qunary = add(qunary.into(), &[qpool], &mut g);
    let qbinary = QBinary { kind: QBinaryKind::Mul, rescaling: Rescaling::FixedPoint, output: grid(0.01, 0) };
    let qbinary = add(qbinary.into(), &[qpool, qunary], &mut g);
    let rows = add(Reshape { shape: shape(&[4, 4]) }.into(), &[qbinary], &mut g);
    let qm = weights(&mut g, quantized(DType::S8, &[4, 3], 0.02, 0));
    let qmatmul =
        QMatMul { bias: false, residual: false, requant: RequantMode::Shift, output: grid(0.03, 100) };
    let qmatmul = add(qmatmul.into(), &[rows, qm], &mut g);
    let grids = DynamicQuantize { axis: 1 };
    let real_rows = g.input("real_rows", TensorType::f32(&[4, 4]).unwrap()).unwrap();
    let dynamic = g.add("dynamic", grids, &[real_rows]).unwrap();
    let to = ToFloat { clamp: Clamp { lo: -0.5, hi: f32::INFINITY }, ..ToFloat::plain(true) };
    let product =
        add(QMatMulToFloat { to }.into(), &[dynamic.port(0), qm, dynamic.port(1), dynamic.port(2)], &mut g);
    g.output("dynamic", product);
    let conv = QConvToFloat {
        window: Window { pads_begin: vec![1, 0], ..Window::new([2, 1]) },
        groups: 1,
        layout: Layout::ChannelsFirst,
        to: ToFloat { residual: true, ..ToFloat::plain(false) },
    };
    let cw = weights(&mut g, quantized(DType::S8, &[2, 2, 2, 1], 0.01, 0));
    let codes = g.input("conv_codes", quantized(DType::U8, &[1, 2, 3, 3], 0.02, 9)).unwrap();
    let beside = g.input("conv_beside", TensorType::f32(&[1, 2, 3, 3]).unwrap()).unwrap();
    let conv = add(conv.into(), &[codes, cw, beside], &mut g);
    g.output("conv", conv);
    let resample = |interpolation, coordinates| Resample {
        axis: 1,
        length: 4,
        scale: 4.0 / 3.0,
        interpolation,
        coordinates,
        exclude_outside: true,
    };
    let cubic = Interpolation::Cubic { a: -0.75, antialias: true };
    let cubic = resample(cubic, Coordinates::TfCropAndResize { start: 0.0, end: 0.9, outside: 0.5 });
    let resampled = add(QResample { resample: cubic, output: grid(0.03, 9) }.into(), &[qmatmul], &mut g);
    let nearest = resample(Interpolation::Nearest(Nearest::PreferCeil), Coordinates::AlignCorners);
    let picked = add(nearest.into(), &[resampled], &mut g);
    g.output("picked", picked);
    let transfer = add(Transfer { to: Device::FloatJit }.into(), &[qmatmul], &mut g);
    g.set_device(qmatmul.node, Some(Device::Int8Jit));
    g.set_device(transfer.node, Some(Device::FloatJit));
    g.output("codes", transfer);
    g
}
