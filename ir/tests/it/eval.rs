//! What ops compute: cases from the ONNX operator specification, and cases worked out by hand.

use crate::samples::{f32s, grid, quantized, shape};
use qcc_ir::{
    DType, Element, Error, Graph, Op, OutputGrid, QuantParams, Tensor, TensorType, interpreter,
    numerics::{self, RequantMode, Rescaling},
    ops::*,
    text::seeded,
};

/// The result of one op.
fn eval_typed(op: impl Into<Op>, operands: &[(Tensor, TensorType)]) -> Result<Tensor, Error> {
    let mut g = Graph::new("test");
    let mut values = vec![];
    for (_, ty) in operands {
        values.push(g.input("operand", ty.clone())?);
    }
    let result = g.add("op", op, &values)?;
    g.output("result", result.out());
    let inputs: Vec<Tensor> = operands.iter().map(|(t, _)| t.clone()).collect();
    Ok(interpreter::run(&g, &inputs)?.remove(0))
}

fn eval(op: impl Into<Op>, operands: &[&Tensor]) -> Result<Tensor, Error> {
    let typed: Vec<(Tensor, TensorType)> = operands.iter().map(|&t| (t.clone(), t.ty())).collect();
    eval_typed(op, &typed)
}

fn of<T: Element>(dims: &[usize], values: &[T]) -> Tensor {
    Tensor::from_vec(shape(dims), values.to_vec()).unwrap()
}

fn list<T: Element>(values: &[T]) -> Tensor {
    of(&[values.len()], values)
}

fn bools(values: &[u8]) -> Tensor {
    Tensor::from_vec_as(DType::Bool, shape(&[values.len()]), values.to_vec()).unwrap()
}

fn coded(tensor: Tensor, scale: f32, zero: i32) -> (Tensor, TensorType) {
    let ty = quantized(tensor.dtype(), tensor.shape(), scale, zero);
    (tensor, ty)
}

#[track_caller]
fn close(got: &Tensor, dims: &[usize], expected: &[f32]) {
    assert_eq!(got.shape().dims(), dims);
    for (i, (a, b)) in got.to_f32().unwrap().iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "element {i}: {a} instead of {b}");
    }
    assert_eq!(got.shape().elements(), expected.len());
}

fn counting(dims: &[usize], from: i32) -> Tensor {
    let n: usize = dims.iter().product();
    f32s(dims, &(0..n).map(|i| (from + i as i32) as f32).collect::<Vec<_>>())
}

fn refusal(result: Result<Tensor, Error>) -> String {
    result.unwrap_err().to_string()
}

// ---- element by element

fn unary(kind: UnaryKind, x: &Tensor) -> Tensor {
    eval(Unary { kind }, &[x]).unwrap()
}

#[test]
fn unary_functions_of_floats() {
    let x = list(&[-1f32, 0.0, 1.0]);
    use UnaryKind::*;
    let cases: [(UnaryKind, [f32; 3]); 28] = [
        (Identity, [-1.0, 0.0, 1.0]),
        (Relu, [0.0, 0.0, 1.0]),
        (LeakyRelu { alpha: 0.1 }, [-0.1, 0.0, 1.0]),
        (Clip { lo: -0.5, hi: 0.25 }, [-0.5, 0.0, 0.25]),
        (Sigmoid, [0.268_941_43, 0.5, 0.731_058_6]),
        (Tanh, [-0.761_594_2, 0.0, 0.761_594_2]),
        (HardSigmoid { alpha: 0.5, beta: 0.6 }, [0.1, 0.6, 1.0]),
        (HardSwish, [-1.0 / 3.0, 0.0, 2.0 / 3.0]),
        (Silu, [-0.268_941_43, 0.0, 0.731_058_6]),
        (Gelu, [-0.158_655_26, 0.0, 0.841_344_8]),
        (GeluTanh, [-0.158_808, 0.0, 0.841_192]),
        (Elu { alpha: 2.0 }, [-1.264_241_1, 0.0, 1.0]),
        (Selu { alpha: 2.0, gamma: 3.0 }, [-3.792_723_4, 0.0, 3.0]),
        (Mish, [-0.303_401_47, 0.0, 0.865_098_4]),
        (Softplus, [0.313_261_7, std::f32::consts::LN_2, 1.313_261_7]),
        (Softsign, [-0.5, 0.0, 0.5]),
        (Exp, [0.367_879_44, 1.0, 2.718_281_7]),
        (Sqrt, [f32::NAN, 0.0, 1.0]),
        (Reciprocal, [-1.0, f32::INFINITY, 1.0]),
        (Erf, [-0.842_700_8, 0.0, 0.842_700_8]),
        (Neg, [1.0, 0.0, -1.0]),
        (Abs, [1.0, 0.0, 1.0]),
        (Sign, [-1.0, 0.0, 1.0]),
        (Floor, [-1.0, 0.0, 1.0]),
        (Ceil, [-1.0, 0.0, 1.0]),
        (Round, [-1.0, 0.0, 1.0]),
        (Sin, [-0.841_471, 0.0, 0.841_471]),
        (Cos, [0.540_302_3, 1.0, 0.540_302_3]),
    ];
    for (kind, expected) in cases {
        let wide = unary(kind, &list(&[-1f64, 0.0, 1.0])).to_f32().unwrap();
        let got = unary(kind, &x).to_f32().unwrap();
        for i in 0..3 {
            let near = |x: f32| {
                x == expected[i] || (x.is_nan() && expected[i].is_nan()) || (x - expected[i]).abs() <= 2e-6
            };
            assert!(
                near(got[i]) && near(wide[i]),
                "{kind:?}: {} and {} for {}",
                got[i],
                wide[i],
                expected[i]
            );
        }
    }
    assert_eq!(unary(Log, &list(&[1f32, 0.0])), list(&[0.0, f32::NEG_INFINITY]));
    assert_eq!(unary(Round, &list(&[0.5f32, 1.5, 2.5, -2.5])), list(&[0f32, 2.0, 2.0, -2.0]));
    for kind in [Relu, Clip { lo: 0.0, hi: 6.0 }, Sigmoid, HardSwish, Abs, Sign, Elu { alpha: 1.0 }, Erf] {
        assert!(kind.apply(f32::NAN).is_nan(), "{kind:?}");
    }
}

#[test]
fn unary_functions_of_other_types() {
    use UnaryKind::*;
    let half = half::f16::from_f32;
    assert_eq!(unary(Exp, &list(&[half(1.0)])), list(&[half(2.718_281_7)]), "in f32, rounded once");
    let x = list(&[-128i8, -3, 0, 5]);
    assert_eq!(unary(Neg, &x), list(&[-128i8, 3, 0, -5]));
    assert_eq!(unary(Abs, &x), list(&[-128i8, 3, 0, 5]));
    assert_eq!(unary(Sign, &x), list(&[-1i8, -1, 0, 1]));
    assert_eq!(unary(Relu, &x), list(&[0i8, 0, 0, 5]));
    assert_eq!(unary(Clip { lo: -2.5, hi: f32::INFINITY }, &x), list(&[-2i8, -2, 0, 5]));
    assert_eq!(unary(Neg, &list(&[1u64])), list(&[u64::MAX]));
    assert_eq!(unary(Not, &bools(&[0, 1])), bools(&[1, 0]));
    let s4 = |v: &[i8]| Tensor::from_vec_as(DType::S4, shape(&[v.len()]), v.to_vec()).unwrap();
    assert_eq!(unary(Neg, &s4(&[-8, 7])), s4(&[-8, -7]), "four bits wrap");
    assert!(refusal(eval(Unary { kind: Exp }, &[&x])).contains("Exp of s8[4]"));
}

fn binary(kind: BinaryKind, a: &Tensor, b: &Tensor) -> Result<Tensor, Error> {
    eval(Binary { kind }, &[a, b])
}

#[test]
fn binary_functions_broadcast() {
    let a = f32s(&[2, 1, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let b = f32s(&[2, 1], &[10.0, 20.0]);
    let sum = binary(BinaryKind::Add, &a, &b).unwrap();
    let expected = [11.0, 12.0, 13.0, 21.0, 22.0, 23.0, 14.0, 15.0, 16.0, 24.0, 25.0, 26.0];
    assert_eq!(sum, f32s(&[2, 2, 3], &expected));
    let difference = binary(BinaryKind::Sub, &Tensor::scalar(1f32), &b).unwrap();
    assert_eq!(difference, f32s(&[2, 1], &[-9.0, -19.0]));
    assert!(refusal(binary(BinaryKind::Mul, &f32s(&[0, 2], &[]), &b)).contains("broadcast"));
    assert_eq!(
        binary(BinaryKind::Mul, &f32s(&[0, 1], &[]), &f32s(&[1, 2], &[1.0; 2])).unwrap(),
        f32s(&[0, 2], &[])
    );
}

#[test]
fn binary_functions_of_floats() {
    let (a, b) = (list(&[7f32, -1.0, f32::NAN, 2.0]), list(&[2f32, 0.0, 1.0, f32::NAN]));
    let bits = |kind| {
        binary(kind, &a, &b).unwrap().to_f32().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    let expected = |x: [f32; 2]| x.map(f32::to_bits);
    for (kind, first) in [
        (BinaryKind::Max, [7.0, 0.0]),
        (BinaryKind::Min, [2.0, -1.0]),
        (BinaryKind::Div, [3.5, f32::NEG_INFINITY]),
        (BinaryKind::Pow, [49.0, 1.0]),
        (BinaryKind::Sub, [5.0, -1.0]),
    ] {
        let got = bits(kind);
        assert_eq!(got[..2], expected(first), "{kind:?}");
        assert!(got[2..].iter().all(|&x| f32::from_bits(x).is_nan()), "{kind:?}: NaN stays");
    }
    for (kind, expected) in [
        (BinaryKind::Equal, [0, 0, 0, 0]),
        (BinaryKind::Less, [0, 1, 0, 0]),
        (BinaryKind::LessOrEqual, [0, 1, 0, 0]),
        (BinaryKind::Greater, [1, 0, 0, 0]),
        (BinaryKind::GreaterOrEqual, [1, 0, 0, 0]),
    ] {
        assert_eq!(binary(kind, &a, &b).unwrap(), bools(&expected), "{kind:?}");
    }
    let half = |x: f32| list(&[half::f16::from_f32(x)]);
    assert_eq!(binary(BinaryKind::Add, &half(2048.0), &half(1.0)).unwrap(), half(2048.0), "a tie to even");
    let brain = |x: f32| list(&[half::bf16::from_f32(x)]);
    assert_eq!(binary(BinaryKind::Mul, &brain(1.5), &brain(1.0078125)).unwrap(), brain(1.515625));
    assert_eq!(binary(BinaryKind::Pow, &list(&[2f64]), &list(&[0.5])).unwrap(), list(&[2f64.sqrt()]));
}

#[test]
fn binary_functions_of_integers() {
    let run = |kind, a: i64, b: i64| binary(kind, &Tensor::scalar(a), &Tensor::scalar(b));
    let value = |kind, a, b| run(kind, a, b).unwrap().as_slice::<i64>().unwrap()[0];
    use BinaryKind::*;
    assert_eq!(value(Add, i64::MAX, 1), i64::MIN);
    assert_eq!(value(Mul, i64::MIN, i64::MIN), 0);
    assert_eq!(value(Div, -7, 2), -3);
    assert_eq!(value(Div, i64::MIN, -1), i64::MIN);
    assert!(refusal(run(Div, 1, 0)).contains("node `op` (Binary): 1 divided by zero"));
    assert_eq!([value(Pow, 3, 4), value(Pow, 2, 64)], [81, 0]);
    // The order of 7 modulo 2^64 divides 2^62: this is its inverse.
    assert_eq!(value(Pow, 7, i64::MAX).wrapping_mul(7), 1);
    assert_eq!([value(Pow, 2, -1), value(Pow, -1, -3), value(Pow, 1, -9)], [0, -1, 1]);
    assert!(refusal(run(Pow, 0, -1)).contains("0 to the power of -1"));
    let u64s = |x: u64| Tensor::scalar(x);
    assert_eq!(binary(Max, &u64s(u64::MAX), &u64s(1)).unwrap(), u64s(u64::MAX));
    assert_eq!(binary(Div, &u64s(u64::MAX), &u64s(2)).unwrap(), u64s(i64::MAX as u64));
    assert_eq!(binary(Mul, &u64s(u64::MAX), &u64s(u64::MAX)).unwrap(), u64s(1));
    assert_eq!(binary(Add, &list(&[200u8]), &list(&[100u8])).unwrap(), list(&[44u8]));
    let (p, q) = (bools(&[0, 0, 1, 1]), bools(&[0, 1, 0, 1]));
    assert_eq!(binary(And, &p, &q).unwrap(), bools(&[0, 0, 0, 1]));
    assert_eq!(binary(Or, &p, &q).unwrap(), bools(&[0, 1, 1, 1]));
    assert_eq!(binary(Xor, &p, &q).unwrap(), bools(&[0, 1, 1, 0]));
    assert_eq!(binary(Equal, &p, &q).unwrap(), bools(&[1, 0, 0, 1]));
    assert!(binary(Add, &p, &q).is_err() && binary(And, &list(&[1f32]), &list(&[1f32])).is_err());
}

#[test]
fn casts() {
    let cast = |x: &Tensor, to| eval(Cast { to }, &[x]).unwrap();
    let floats = list(&[f32::NAN, 300.0, -1.9, 1.9, f32::NEG_INFINITY]);
    assert_eq!(cast(&floats, DType::U8), list(&[0u8, 255, 0, 1, 0]));
    assert_eq!(cast(&floats, DType::S8), list(&[0i8, 127, -1, 1, -128]));
    assert_eq!(cast(&floats, DType::S64), list(&[0i64, 300, -1, 1, i64::MIN]));
    assert_eq!(cast(&floats, DType::Bool), bools(&[1; 5]));
    assert_eq!(cast(&list(&[300i32, -1]), DType::U8), list(&[44u8, 255]));
    assert_eq!(cast(&list(&[u64::MAX]), DType::S16), list(&[-1i16]));
    assert_eq!(cast(&list(&[0i16, -3]), DType::Bool), bools(&[0, 1]));
    let s4 = cast(&list(&[9i32, -9]), DType::S4);
    assert_eq!(s4.as_slice::<i8>().unwrap(), [-7, 7]);
    assert_eq!(cast(&bools(&[0, 1]), DType::F32), list(&[0f32, 1.0]));
    // One rounding: by way of f32 or f64 each of these would come out one step lower or higher.
    let above_a_tie = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
    assert_eq!(cast(&list(&[above_a_tie]), DType::F16), list(&[half::f16::from_f32(1.000_976_6)]));
    let wide = (1i64 << 60) + (1 << 36) + 1;
    assert_eq!(cast(&list(&[wide]), DType::F32), list(&[2f32.powi(60) + 2f32.powi(37)]));
    let wide = (1i64 << 62) + (1 << 54) + 1;
    let above = half::bf16::from_f32(2f32.powi(62) + 2f32.powi(55));
    assert_eq!(cast(&list(&[wide, -wide]), DType::BF16), list(&[above, -above]));
    let halves = cast(&list(&[1e300f64, -1e-300, 65519.99, f64::INFINITY]), DType::F16);
    let infinite = half::f16::INFINITY;
    assert_eq!(halves, list(&[infinite, half::f16::NEG_ZERO, half::f16::MAX, infinite]));
}

// ---- quantized elements

#[test]
fn tables_are_the_function_on_the_grid() {
    let output = OutputGrid { lo: 5, hi: 250, ..grid(0.01, 20) };
    let op = QUnary { kind: UnaryKind::Tanh, output };
    for (dtype, zero) in [(DType::U8, 128), (DType::S8, -5)] {
        let ty = quantized(dtype, &[256], 0.02, zero);
        let bytes: Vec<u8> = (0..=255).collect();
        let codes = Tensor::from_bytes(dtype, shape(&[256]), bytes.into()).unwrap();
        let got = eval_typed(op.clone(), &[(codes, ty.clone())]).unwrap();
        assert_eq!(got.as_slice::<u8>().unwrap(), op.table(&ty).unwrap());
        for byte in [0u8, 1, 127, 128, 200, 255] {
            let q = if dtype == DType::S8 { i32::from(byte as i8) } else { i32::from(byte) };
            let real = numerics::math::tanh((q - zero) as f32 * 0.02);
            let expected = ((real / 0.01).round_ties_even() as i32 + 20).clamp(5, 250);
            assert_eq!(
                i32::from(got.as_slice::<u8>().unwrap()[usize::from(byte)]),
                expected,
                "{dtype} {byte}"
            );
        }
    }
    // Identity moves values between grids; the logarithm of a negative number is NaN, the least code.
    let moved = QUnary { kind: UnaryKind::Identity, output: OutputGrid::full(DType::S8, 0.04, 1).unwrap() };
    let got = eval_typed(moved, &[coded(list(&[128u8, 130, 131, 0]), 0.02, 128)]).unwrap();
    assert_eq!(got, list(&[1i8, 2, 3, -63]), "1.5 steps are 2");
    let log = QUnary { kind: UnaryKind::Log, output };
    assert_eq!(eval_typed(log, &[coded(list(&[0u8]), 0.02, 128)]).unwrap(), list(&[5u8]));
}

#[test]
fn quantized_sums_and_products() {
    let a = coded(of(&[2, 2], &[10u8, 20, 128, 255]), 0.1, 10);
    let b = coded(list(&[0u8, 7]), 0.2, 5);
    let run = |kind, output| {
        eval_typed(QBinary { kind, rescaling: Rescaling::FixedPoint, output }, &[a.clone(), b.clone()])
    };
    // Reals: a = 0, 1, 11.8, 24.5; b = −1, 0.4.
    let got = run(QBinaryKind::Add, grid(0.1, 50)).unwrap();
    assert_eq!(got, of(&[2, 2], &[40u8, 64, 158, 255]));
    let got = run(QBinaryKind::Sub, grid(0.4, 100)).unwrap();
    assert_eq!(got, of(&[2, 2], &[103u8, 102, 132, 160]), "2.5 and 1.5 steps go up");
    let got = run(QBinaryKind::Mul, OutputGrid { lo: 90, hi: 104, ..grid(0.5, 100) }).unwrap();
    assert_eq!(got, of(&[2, 2], &[100u8, 101, 90, 104]), "0.4 is 0.8 steps; the others leave the bounds");
    assert!(refusal(run(QBinaryKind::Add, grid(1e-6, 0))).contains("does not fit 16 bits"));
    assert!(refusal(run(QBinaryKind::Mul, grid(1e-6, 0))).contains("coarser output scale"));
    let float = QBinary { kind: QBinaryKind::Sub, rescaling: Rescaling::Float, output: grid(0.4, 100) };
    let got = eval_typed(float, &[a, b]).unwrap();
    assert_eq!(got, of(&[2, 2], &[102u8, 102, 132, 160]), "2.5 steps go to 2, and 1.5, too");
}

#[test]
fn quantize_and_back() {
    let x = f32s(&[2, 3], &[0.25, 0.75, -9.0, 0.3, 100.0, f32::NAN]);
    let params = QuantParams::per_tensor(0.5, 3).unwrap();
    let codes = eval(Quantize { dtype: DType::U8, params }, &[&x]).unwrap();
    assert_eq!(codes, of(&[2, 3], &[3u8, 5, 0, 4, 203, 0]));
    let axis1 = QuantParams::per_axis(1, vec![0.5, 0.25, 1.0], vec![0, 1, -7]).unwrap();
    for (dtype, expected) in [
        (DType::S8, [0, 4, -16, 1, 127, -128]),
        (DType::S16, [0, 4, -16, 1, 401, -32768]),
        (DType::S4, [0, 4, -8, 1, 7, -8]),
    ] {
        let codes = eval(Quantize { dtype, params: axis1.clone() }, &[&x]).unwrap();
        assert_eq!(codes.to_i64().unwrap(), expected, "{dtype}");
        let ty = TensorType::quantized(dtype, shape(&[2, 3]), axis1.clone()).unwrap();
        let real = eval_typed(Dequantize {}, &[(codes, ty)]).unwrap();
        let (lo, hi) = dtype.integer_range().unwrap();
        let fake = FakeQuant { dtype, lo: lo as i32, hi: hi as i32, params: axis1.clone() };
        assert_eq!(eval(fake, &[&x]).unwrap(), real, "{dtype}: fake-quant is both in one");
    }
    let extremes = coded(list(&[i32::MIN, i32::MAX, 0]), 0.5, i32::MAX);
    let real = eval_typed(Dequantize {}, &[extremes]).unwrap();
    assert_eq!(real, list(&[-2147483648f32, 0.0, -1073741824.0]), "no overflow");
    let bias = QuantParams::per_tensor(0.5, 0).unwrap();
    let bias = FakeQuant { dtype: DType::S32, lo: -(1 << 24), hi: (1 << 24) + 1, params: bias };
    assert!(refusal(eval(bias, &[&x])).contains("±2^24"));
}

#[test]
fn quantized_averages() {
    let x = coded(of(&[1, 1, 2, 3], &[10u8, 20, 30, 41, 50, 60]), 0.5, 10);
    let pool = |window, count_include_pad, output| QAveragePool {
        window,
        ceil_mode: false,
        count_include_pad,
        layout: Layout::ChannelsFirst,
        rescaling: Rescaling::FixedPoint,
        output,
    };
    // Sums less zero points: 81 of 4 at half the step, 120 of 4.
    let whole = pool(Window::new([2, 2]), false, grid(1.0, 0));
    assert_eq!(eval_typed(whole, std::slice::from_ref(&x)).unwrap(), of(&[1, 1, 1, 2], &[10u8, 15]));
    // Corner windows: 10 and 31 (less 10: 0 and 31) alone, or with three of padding.
    let window = || Window::new([2, 2]).pads([1, 1], [0, 0]).strides([2, 3]);
    let alone = pool(window(), false, grid(0.5, 100));
    assert_eq!(eval_typed(alone, std::slice::from_ref(&x)).unwrap(), of(&[1, 1, 1, 1], &[100u8]));
    let corner = coded(of(&[1, 1, 1, 1], &[41u8]), 0.5, 10);
    let corners = Window::new([2, 2]).pads([1, 1], [0, 0]);
    let op = pool(corners.clone(), true, grid(0.5, 100));
    assert_eq!(eval_typed(op, std::slice::from_ref(&corner)).unwrap(), of(&[1, 1, 1, 1], &[108u8]), "31/4");
    let op = pool(corners, false, grid(0.5, 100));
    assert_eq!(eval_typed(op, std::slice::from_ref(&corner)).unwrap(), of(&[1, 1, 1, 1], &[131u8]));
    let padding_alone = pool(Window::new([1, 1]).pads([1, 0], [0, 0]), false, grid(0.5, 100));
    assert_eq!(
        eval_typed(padding_alone, std::slice::from_ref(&corner)).unwrap(),
        of(&[1, 1, 2, 1], &[100u8, 131])
    );
    let too_fine = pool(Window::new([1, 1]), false, grid(1e-10, 0));
    assert!(refusal(eval_typed(too_fine, &[corner])).contains("too far"));
}

// ---- windows

#[test]
fn convolutions_of_the_specification() {
    let x = counting(&[1, 1, 5, 5], 0);
    let w = f32s(&[1, 1, 3, 3], &[1.0; 9]);
    let conv = |window| Conv {
        window,
        groups: 1,
        layout: Layout::ChannelsFirst,
        bias: false,
        residual: false,
        clamp: Clamp::NONE,
    };
    let padded = eval(conv(Window::new([3, 3]).pads([1, 1], [1, 1])), &[&x, &w]).unwrap();
    #[rustfmt::skip]
    let expected = [
        12., 21., 27., 33., 24.,
        33., 54., 63., 72., 51.,
        63., 99., 108., 117., 81.,
        93., 144., 153., 162., 111.,
        72., 111., 117., 123., 84.,
    ];
    assert_eq!(padded, f32s(&[1, 1, 5, 5], &expected));
    let plain = eval(conv(Window::new([3, 3])), &[&x, &w]).unwrap();
    assert_eq!(plain, f32s(&[1, 1, 3, 3], &[54., 63., 72., 99., 108., 117., 144., 153., 162.]));
    let x = counting(&[1, 1, 7, 5], 0);
    let strided = Window::new([3, 3]).strides([2, 2]).pads([1, 0], [1, 0]);
    let strided = eval(conv(strided), &[&x, &w]).unwrap();
    assert_eq!(strided, f32s(&[1, 1, 4, 2], &[21., 33., 99., 117., 189., 207., 171., 183.]));
}

#[test]
fn pools_of_the_specification() {
    let pool =
        |kind, window: Window, ceil_mode| Pool { kind, window, ceil_mode, layout: Layout::ChannelsFirst };
    let average = PoolKind::Average { count_include_pad: false };
    let x4 = counting(&[1, 1, 4, 4], 1);
    let ceil = Window::new([3, 3]).strides([2, 2]);
    let got = eval(pool(PoolKind::Max, ceil.clone(), true), &[&x4]).unwrap();
    assert_eq!(got, f32s(&[1, 1, 2, 2], &[11., 12., 15., 16.]));
    let got = eval(pool(average, ceil.clone(), true), &[&x4]).unwrap();
    assert_eq!(got, f32s(&[1, 1, 2, 2], &[6.0, 7.5, 12.0, 13.5]));
    // What ceil mode adds beyond the padding never counts.
    let got = eval(pool(PoolKind::Average { count_include_pad: true }, ceil, true), &[&x4]).unwrap();
    assert_eq!(got, f32s(&[1, 1, 2, 2], &[6.0, 7.5, 12.0, 13.5]));
    let dilated = Window::new([2, 2]).dilations([2, 2]);
    let got = eval(pool(PoolKind::Max, dilated, false), &[&x4]).unwrap();
    assert_eq!(got, f32s(&[1, 1, 2, 2], &[11., 12., 15., 16.]));
    let x5 = counting(&[1, 1, 5, 5], 1);
    let same = Window::new([5, 5]).pads([2, 2], [2, 2]);
    let got = eval(pool(average, same.clone(), false), &[&x5]).unwrap();
    #[rustfmt::skip]
    let expected = [
        7., 7.5, 8., 8.5, 9.,
        9.5, 10., 10.5, 11., 11.5,
        12., 12.5, 13., 13.5, 14.,
        14.5, 15., 15.5, 16., 16.5,
        17., 17.5, 18., 18.5, 19.,
    ];
    assert_eq!(got, f32s(&[1, 1, 5, 5], &expected));
    let got = eval(pool(PoolKind::Average { count_include_pad: true }, same, false), &[&x5]).unwrap();
    #[rustfmt::skip]
    let expected = [
        2.52, 3.6, 4.8, 4.08, 3.24,
        4.56, 6.4, 8.4, 7.04, 5.52,
        7.2, 10., 13., 10.8, 8.4,
        6.96, 9.6, 12.4, 10.24, 7.92,
        6.12, 8.4, 10.8, 8.88, 6.84,
    ];
    close(&got, &[1, 1, 5, 5], &expected);
}

#[test]
fn maximum_of_any_type() {
    let pool = |window: Window| Pool {
        kind: PoolKind::Max,
        window,
        ceil_mode: false,
        layout: Layout::ChannelsFirst,
    };
    let pairs = || pool(Window::new([2]).strides([2]));
    let nan = f32s(&[1, 1, 4], &[f32::NAN, 1.0, -2.0, -3.0]);
    let got = eval(pairs(), &[&nan]).unwrap().to_f32().unwrap();
    assert!(got[0].is_nan() && got[1] == -2.0);
    let got = eval(pairs(), &[&of(&[1, 1, 2], &[i64::MIN, i64::MIN + 1])]).unwrap();
    assert_eq!(got, of(&[1, 1, 1], &[i64::MIN + 1]));
    let halves = [half::f16::from_f32(-1.5), half::f16::from_f32(-2.0)];
    assert_eq!(eval(pairs(), &[&of(&[1, 1, 2], &halves)]).unwrap(), of(&[1, 1, 1], &halves[..1]));
    // Padding does not take part, whatever the grid's zero point.
    let padded = pool(Window::new([2]).strides([2]).pads([1], [1]));
    let codes = coded(of(&[1, 1, 2], &[3u8, 4]), 0.1, 200);
    assert_eq!(eval_typed(padded, &[codes]).unwrap(), of(&[1, 1, 2], &[3u8, 4]));
    let beside = pool(Window::new([1]).pads([1], [0]));
    let got = eval(beside, &[&f32s(&[1, 1, 1], &[5.0])]).unwrap();
    assert_eq!(got, f32s(&[1, 1, 2], &[f32::NEG_INFINITY, 5.0]));
}

/// [N, C, H, W] to [N, H, W, C].
fn channels_last(x: &Tensor) -> Tensor {
    eval(Transpose { perm: vec![0, 2, 3, 1] }, &[x]).unwrap()
}

#[test]
fn layouts_agree() {
    let x = seeded(DType::F32, &shape(&[2, 4, 5, 6]), 1);
    let w = seeded(DType::F32, &shape(&[6, 2, 3, 2]), 2);
    let b = seeded(DType::F32, &shape(&[6]), 3);
    let r = seeded(DType::F32, &shape(&[2, 6, 3, 7]), 4);
    let window = Window::new([3, 2]).strides([2, 1]).pads([1, 1], [1, 1]);
    let conv = |layout| Conv {
        window: window.clone(),
        groups: 2,
        layout,
        bias: true,
        residual: true,
        clamp: Clamp::RELU,
    };
    let first = eval(conv(Layout::ChannelsFirst), &[&x, &w, &b, &r]).unwrap();
    let last = eval(conv(Layout::ChannelsLast), &[&channels_last(&x), &w, &b, &channels_last(&r)]).unwrap();
    assert_eq!(last, channels_last(&first));
    let kinds = [PoolKind::Max, PoolKind::Average { count_include_pad: false }];
    for kind in kinds {
        let pool = |layout| Pool { kind, window: window.clone(), ceil_mode: true, layout };
        let first = eval(pool(Layout::ChannelsFirst), &[&x]).unwrap();
        assert_eq!(eval(pool(Layout::ChannelsLast), &[&channels_last(&x)]).unwrap(), channels_last(&first));
    }
    let lrn = |layout| Lrn { size: 3, alpha: 0.1, beta: 0.75, bias: 2.0, layout };
    let first = eval(lrn(Layout::ChannelsFirst), &[&x]).unwrap();
    assert_eq!(eval(lrn(Layout::ChannelsLast), &[&channels_last(&x)]).unwrap(), channels_last(&first));
}

#[test]
fn integer_convolution_is_the_real_one_rounded() {
    let x = coded(seeded(DType::U8, &shape(&[1, 4, 5, 5]), 1), 0.05, 120);
    let w = seeded(DType::S8, &shape(&[6, 4, 3, 3]), 2);
    let scales: Vec<f32> = (1..=6).map(|i| 0.002 * i as f32).collect();
    let grids = QuantParams::per_axis(0, scales.clone(), vec![0; 6]).unwrap();
    let w_type = TensorType::quantized(DType::S8, w.shape().clone(), grids).unwrap();
    let b = seeded(DType::S32, &shape(&[6]), 3);
    let r = coded(seeded(DType::U8, &shape(&[1, 6, 5, 5]), 4), 0.3, 30);
    let window = Window::new([3, 3]).pads([1, 1], [1, 1]);
    let real = |t: &(Tensor, TensorType)| eval_typed(Dequantize {}, std::slice::from_ref(t)).unwrap();
    let b_real: Vec<f32> =
        b.as_slice::<i32>().unwrap().iter().zip(&scales).map(|(&b, s)| b as f32 * s * 0.05).collect();
    let float = Conv {
        window: window.clone(),
        groups: 1,
        layout: Layout::ChannelsFirst,
        bias: true,
        residual: true,
        clamp: Clamp::NONE,
    };
    let exact =
        eval(float, &[&real(&x), &real(&(w.clone(), w_type.clone())), &list(&b_real), &real(&r)]).unwrap();
    for requant in [RequantMode::Shift, RequantMode::Tflite, RequantMode::Q15, RequantMode::Float] {
        let op = QConv {
            window: window.clone(),
            groups: 1,
            layout: Layout::ChannelsFirst,
            bias: true,
            residual: true,
            requant,
            output: OutputGrid { lo: 20, ..grid(0.5, 100) },
        };
        let got = eval_typed(op, &[x.clone(), (w.clone(), w_type.clone()), (b.clone(), b.ty()), r.clone()])
            .unwrap();
        for (q, y) in got.as_slice::<u8>().unwrap().iter().zip(exact.to_f32().unwrap()) {
            let code = (y / 0.5 + 100.0).clamp(20.0, 255.0);
            assert!((f32::from(*q) - code).abs() <= 0.6, "{requant}: {q} for {code}");
        }
    }
}

// ---- matrices

#[test]
fn matrix_products() {
    let product = |clamp| MatMul { bias: false, residual: false, clamp };
    let a = f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let b = f32s(&[3, 2], &[1., 0., 0., 1., 2., -9.]);
    assert_eq!(eval(product(Clamp::RELU), &[&a, &b]).unwrap(), f32s(&[2, 2], &[7., 0., 16., 0.]));
    // Matrices broadcast: a[2, 1] by b[3].
    let a = counting(&[2, 1, 1, 2], 1);
    let b = counting(&[3, 2, 1], 1);
    let got = eval(product(Clamp::NONE), &[&a, &b]).unwrap();
    assert_eq!(got, f32s(&[2, 3, 1, 1], &[5., 11., 17., 11., 25., 39.]));
    let full = MatMul { bias: true, residual: true, clamp: Clamp::NONE };
    let a = f32s(&[1, 2], &[1., 2.]);
    let b = f32s(&[2, 2], &[1., 2., 3., 4.]);
    let got = eval(full, &[&a, &b, &list(&[100f32, 200.0]), &f32s(&[1, 2], &[0.5, 0.25])]).unwrap();
    assert_eq!(got, f32s(&[1, 2], &[107.5, 210.25]));
    let empty = eval(product(Clamp::NONE), &[&f32s(&[2, 0], &[]), &f32s(&[0, 2], &[])]).unwrap();
    assert_eq!(empty, f32s(&[2, 2], &[0.0; 4]));
    // k ascending: 2^24 + 1 − 2^24 loses the 1, the bias first does not lose it.
    let big = 16_777_216f32;
    let cancel = eval(product(Clamp::NONE), &[&f32s(&[1, 3], &[big, 1.0, -big]), &f32s(&[3, 1], &[1.0; 3])]);
    assert_eq!(cancel.unwrap(), f32s(&[1, 1], &[0.0]));
}

#[test]
fn integer_products_are_pointwise_convolutions() {
    let x = seeded(DType::U8, &shape(&[2, 5, 7]), 1);
    let w = seeded(DType::S8, &shape(&[7, 3]), 2);
    let b = seeded(DType::S32, &shape(&[3]), 3);
    let r = coded(seeded(DType::U8, &shape(&[2, 5, 3]), 4), 0.1, 9);
    let scales = vec![0.01, 0.02, 0.03];
    let by_axis = |t: &Tensor, axis| {
        let params = QuantParams::per_axis(axis, scales.clone(), vec![0; 3]).unwrap();
        TensorType::quantized(DType::S8, t.shape().clone(), params).unwrap()
    };
    let transposed =
        eval(Transpose { perm: vec![1, 0] }, &[&w]).unwrap().reshaped(shape(&[3, 7, 1])).unwrap();
    for requant in [RequantMode::Shift, RequantMode::Tflite, RequantMode::Q15, RequantMode::Float] {
        let output = grid(0.4, 77);
        let product = QMatMul { bias: true, residual: true, requant, output };
        let conv = QConv {
            window: Window::new([1]),
            groups: 1,
            layout: Layout::ChannelsLast,
            bias: true,
            residual: true,
            requant,
            output,
        };
        let operands =
            |w: (Tensor, TensorType)| [coded(x.clone(), 0.05, 128), w, (b.clone(), b.ty()), r.clone()];
        let w_conv = by_axis(&transposed, 0);
        let got = eval_typed(product, &operands((w.clone(), by_axis(&w, 1)))).unwrap();
        assert_eq!(got, eval_typed(conv, &operands((transposed.clone(), w_conv))).unwrap(), "{requant}");
        assert!(got.as_slice::<u8>().unwrap().iter().any(|&q| q > 0 && q < 255));
    }
}

#[test]
fn products_of_activations_are_those_of_shifted_weights() {
    let a = seeded(DType::U8, &shape(&[2, 1, 4, 7]), 1);
    let b = seeded(DType::U8, &shape(&[3, 7, 5]), 2);
    let bias = seeded(DType::S32, &shape(&[5]), 3);
    let product = |requant| QMatMul { bias: true, residual: false, requant, output: grid(300.0, 77) };
    let bias = (bias.clone(), bias.ty());
    for requant in [RequantMode::Shift, RequantMode::Float] {
        let operands = [coded(a.clone(), 0.5, 101), coded(b.clone(), 0.25, 128), bias.clone()];
        let got = eval_typed(product(requant), &operands).unwrap();
        assert_eq!(got.shape(), &shape(&[2, 3, 4, 5]));
        // On a symmetric grid, a matrix of codes is weights that are 128 less.
        let (a, b) = (a.as_slice::<u8>().unwrap(), b.as_slice::<u8>().unwrap());
        for i in 0..6 {
            let rows = Tensor::from_vec(shape(&[4, 7]), a[i / 3 * 28..][..28].to_vec()).unwrap();
            let weights = b[i % 3 * 35..][..35].iter().map(|&q| (q ^ 0x80) as i8).collect();
            let weights = Tensor::from_vec::<i8>(shape(&[7, 5]), weights).unwrap();
            let params = QuantParams::per_tensor(0.25, 0).unwrap();
            let ty = TensorType::quantized(DType::S8, shape(&[7, 5]), params).unwrap();
            let own = [coded(rows, 0.5, 101), (weights, ty), bias.clone()];
            let expected = eval_typed(product(requant), &own).unwrap();
            let of_matrix = &got.as_slice::<u8>().unwrap()[i * 20..][..20];
            assert_eq!(of_matrix, expected.as_slice::<u8>().unwrap(), "matrix {i} in {requant}");
        }
    }
    // The zero point of a second operand.
    let one = |q: u8| Tensor::from_vec(shape(&[1, 1]), vec![q]).unwrap();
    let unit = QMatMul { bias: false, residual: false, requant: RequantMode::Shift, output: grid(1.0, 0) };
    let operands = [coded(one(12), 1.0, 10), coded(one(250), 1.0, 200)];
    assert_eq!(eval_typed(unit, &operands).unwrap(), one(100));
}

// ---- normalisations and reductions

#[test]
fn softmax_of_the_specification() {
    let softmax = |axis, log, x: &Tensor| eval(Softmax { axis, log }, &[x]).unwrap();
    let x = f32s(&[1, 3], &[-1.0, 0.0, 1.0]);
    close(&softmax(1, false, &x), &[1, 3], &[0.090_030_58, 0.244_728_48, 0.665_240_94]);
    close(&softmax(1, true, &x), &[1, 3], &[-2.407_606, -1.407_606, -0.407_606]);
    let large = f32s(&[2, 4], &[0., 1., 2., 3., 10000., 10001., 10002., 10003.]);
    let row = [0.032_058_604, 0.087_144_32, 0.236_882_84, 0.643_914_3];
    close(&softmax(1, false, &large), &[2, 4], &[row, row].concat());
    close(&softmax(0, false, &f32s(&[2, 1], &[3.0, 3.0])), &[2, 1], &[0.5, 0.5]);
    let bad = softmax(0, false, &list(&[1.0, f32::NAN]));
    assert!(bad.to_f32().unwrap().iter().all(|x| x.is_nan()));
}

#[test]
fn normalisations() {
    let norm = BatchNorm { epsilon: 1.0, axis: 1 };
    let x = f32s(&[1, 2, 2], &[1., 2., 3., 4.]);
    let params = [[2f32, 1.0], [10.0, 20.0], [1.0, 2.0], [3.0, 0.0]].map(|p| list(&p));
    let [scale, bias, mean, variance] = &params;
    let got = eval(norm, &[&x, scale, bias, mean, variance]).unwrap();
    assert_eq!(got, f32s(&[1, 2, 2], &[10., 11., 21., 22.]));
    let x = f32s(&[1, 3, 1], &[1., 2., 3.]);
    let pixels = Tensor::from_vec(shape(&[1, 2, 2]), vec![0u8, 10, 128, 255]).unwrap();
    let centre = Normalize { axis: 2, mean: vec![128.0, 10.0], std: vec![64.0, 0.5] };
    assert_eq!(eval(centre.clone(), &[&pixels]).unwrap(), f32s(&[1, 2, 2], &[-2., 0., 0., 490.]));
    for bad in [
        Normalize { axis: 3, ..centre.clone() },
        Normalize { axis: 0, ..centre.clone() },
        Normalize { std: vec![64.0, 0.0], ..centre.clone() },
        Normalize { mean: vec![f32::NAN, 0.0], ..centre.clone() },
    ] {
        assert!(eval(bad, &[&pixels]).is_err());
    }
    assert!(eval(centre, &[&x]).is_err(), "floats are no pixels");
    let lrn = |size, alpha| Lrn { size, alpha, beta: 0.5, bias: 1.0, layout: Layout::ChannelsFirst };
    let root = |x: [f32; 3], b: [f32; 3]| [0, 1, 2].map(|i| x[i] / b[i].sqrt());
    let got = eval(lrn(3, 3.0), &[&x]).unwrap();
    close(&got, &[1, 3, 1], &root([1., 2., 3.], [6., 15., 14.]));
    // An even size reaches further up than down.
    close(&eval(lrn(2, 2.0), &[&x]).unwrap(), &[1, 3, 1], &root([1., 2., 3.], [6., 14., 10.]));
    close(&eval(lrn(usize::MAX, 0.0), &[&x]).unwrap(), &[1, 3, 1], &[1., 2., 3.]);
}

#[test]
fn reductions_of_the_specification() {
    let reduce = |kind, axes: &[usize], keep_dims, x: &Tensor| {
        eval(Reduce { kind, axes: axes.to_vec(), keep_dims }, &[x]).unwrap()
    };
    use ReduceKind::*;
    let x = f32s(&[3, 2, 2], &[5., 1., 20., 2., 30., 1., 40., 2., 55., 1., 60., 2.]);
    assert_eq!(reduce(Mean, &[1], false, &x), f32s(&[3, 2], &[12.5, 1.5, 35., 1.5, 57.5, 1.5]));
    assert_eq!(reduce(Max, &[1], true, &x), f32s(&[3, 1, 2], &[20., 2., 40., 2., 60., 2.]));
    assert_eq!(reduce(Min, &[0, 2], false, &x), list(&[1f32, 2.0]));
    let x = counting(&[3, 2, 2], 1);
    assert_eq!(reduce(Sum, &[1], false, &x), f32s(&[3, 2], &[4., 6., 12., 14., 20., 22.]));
    assert_eq!(reduce(Product, &[1], false, &x), f32s(&[3, 2], &[3., 8., 35., 48., 99., 120.]));
    assert_eq!(reduce(SumSquare, &[0, 1, 2], false, &x), of(&[], &[650f32]));
    close(
        &reduce(L2, &[2], false, &x),
        &[3, 2],
        &[2.236_068, 5.0, 7.810_25, 10.630_146, 13.453_624, 16.278_82],
    );
    assert_eq!(reduce(L1, &[2], false, &f32s(&[1, 1, 2], &[-3., 4.])), f32s(&[1, 1], &[7.]));
    close(&reduce(LogSum, &[0], false, &list(&[1f32, 2.0])), &[], &[1.098_612_3]);
    close(&reduce(LogSumExp, &[0], false, &list(&[1000f32, 1000.0])), &[], &[1_000.693_1]);
    let minus = f32::NEG_INFINITY;
    assert_eq!(reduce(LogSumExp, &[0], false, &list(&[minus, minus])), of(&[], &[minus]));
    assert_eq!(reduce(Sum, &[], false, &x), x, "no axes, nothing reduced");
    assert!(reduce(Max, &[0], false, &list(&[1.0, f32::NAN, 2.0])).to_f32().unwrap()[0].is_nan());
}

#[test]
fn reductions_of_other_types() {
    let reduce = |kind, x: &Tensor| eval(Reduce { kind, axes: vec![0], keep_dims: false }, &[x]);
    use ReduceKind::*;
    assert_eq!(reduce(Sum, &list(&[200u8, 100])).unwrap(), of(&[], &[44u8]));
    assert_eq!(reduce(Mean, &list(&[200u8, 101])).unwrap(), of(&[], &[150u8]), "of the exact sum");
    assert_eq!(reduce(Mean, &list(&[-3i32, -4])).unwrap(), of(&[], &[-3i32]));
    assert_eq!(reduce(L2, &list(&[3i64, 4])).unwrap(), of(&[], &[5i64]));
    assert_eq!(reduce(Max, &list(&[u64::MAX, 1])).unwrap(), of(&[], &[u64::MAX]));
    assert_eq!(reduce(Product, &list(&[i64::MAX, 2])).unwrap(), of(&[], &[-2i64]));
    assert_eq!(reduce(LogSumExp, &list(&[0i32; 8])).unwrap(), of(&[], &[2i32]), "ln 8 = 2.08");
    // 2049 steps of 1 would stop at 2048 in f16; the sum is kept in f32.
    let ones = vec![half::f16::ONE; 4098];
    assert_eq!(reduce(Sum, &list(&ones)).unwrap(), of(&[], &[half::f16::from_f32(4098.0)]));
    assert_eq!(reduce(Sum, &list::<f32>(&[])).unwrap(), of(&[], &[0f32]));
    assert_eq!(reduce(Max, &list::<f64>(&[])).unwrap(), of(&[], &[f64::NEG_INFINITY]));
    assert!(reduce(Max, &list::<i8>(&[])).is_err());
}

// ---- moves

#[test]
fn moves_take_every_type() {
    for dtype in DType::ALL {
        let x = seeded(dtype, &shape(&[2, 3]), 5);
        let size = dtype.size();
        let element = |t: &Tensor, i: usize| t.bytes()[i * size..(i + 1) * size].to_vec();
        let moved = |op: Op, dims: &[usize], from: &[usize]| {
            let got = eval(op, &[&x]).unwrap();
            assert_eq!((got.dtype(), got.shape().dims()), (dtype, dims));
            for (i, &j) in from.iter().enumerate() {
                assert_eq!(element(&got, i), element(&x, j), "{dtype}: {i}");
            }
        };
        moved(Transpose { perm: vec![1, 0] }.into(), &[3, 2], &[0, 3, 1, 4, 2, 5]);
        moved(Reshape { shape: shape(&[6]) }.into(), &[6], &[0, 1, 2, 3, 4, 5]);
        moved(Expand { shape: shape(&[2, 2, 3]) }.into(), &[2, 2, 3], &[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]);
        let back = SliceSpec { start: 2, len: 2, step: -2 };
        moved(Slice { axes: vec![SliceSpec::all(2), back] }.into(), &[2, 2], &[2, 0, 5, 3]);
        let edge = Pad { before: vec![0, 1], after: vec![1, 0], mode: PadMode::Edge };
        moved(edge.into(), &[3, 4], &[0, 0, 1, 2, 3, 3, 4, 5, 3, 3, 4, 5]);
        let indices = of(&[2, 1], &[-1i32, 0]);
        let got = eval(Gather { axis: 1 }, &[&x, &indices]).unwrap();
        assert_eq!(got.shape().dims(), [2, 2, 1]);
        assert_eq!([0, 1, 2, 3].map(|i| element(&got, i)), [2, 0, 5, 3].map(|i| element(&x, i)));
        let got = eval(Concat { axis: 1 }, &[&x, &x]).unwrap();
        assert_eq!([0, 3, 6, 11].map(|i| element(&got, i)), [0, 0, 3, 5].map(|i| element(&x, i)));
    }
}

#[test]
fn moves_of_nothing() {
    let none = f32s(&[0, 3], &[]);
    assert_eq!(eval(Transpose { perm: vec![1, 0] }, &[&none]).unwrap().shape().dims(), [3, 0]);
    assert_eq!(eval(Concat { axis: 0 }, &[&none, &counting(&[1, 3], 0)]).unwrap(), counting(&[1, 3], 0));
    let pad = Pad { before: vec![1, 0], after: vec![0, 0], mode: PadMode::Constant { value: 2.0 } };
    assert_eq!(eval(pad, &[&none]).unwrap(), f32s(&[1, 3], &[2.0; 3]));
    let wide = Slice { axes: vec![SliceSpec { start: 0, len: 0, step: 1 }, SliceSpec::all(3)] };
    assert_eq!(eval(wide, &[&counting(&[2, 3], 0)]).unwrap(), none);
    let pad = Pad { before: vec![1, 0], after: vec![0, 0], mode: PadMode::Edge };
    assert!(refusal(eval(pad, &[&none])).contains("without elements"));
}

#[test]
fn pads_of_the_specification() {
    let x = f32s(&[3, 2], &[1.0, 1.2, 2.3, 3.4, 4.5, 5.7]);
    let pad = |mode| eval(Pad { before: vec![0, 2], after: vec![0, 0], mode }, &[&x]).unwrap();
    let rows = |rows: [[f32; 4]; 3]| f32s(&[3, 4], &rows.concat());
    assert_eq!(
        pad(PadMode::Constant { value: 0.0 }),
        rows([[0., 0., 1.0, 1.2], [0., 0., 2.3, 3.4], [0., 0., 4.5, 5.7]])
    );
    assert_eq!(
        pad(PadMode::Reflect),
        rows([[1.0, 1.2, 1.0, 1.2], [2.3, 3.4, 2.3, 3.4], [4.5, 5.7, 4.5, 5.7]])
    );
    assert_eq!(pad(PadMode::Edge), rows([[1.0, 1.0, 1.0, 1.2], [2.3, 2.3, 2.3, 3.4], [4.5, 4.5, 4.5, 5.7]]));
    let wrapped = Pad { before: vec![2, 1], after: vec![1, 1], mode: PadMode::Wrap };
    let x = counting(&[3, 4], 0);
    let got = eval(wrapped, &[&x]).unwrap();
    assert_eq!(got.shape().dims(), [6, 6]);
    assert_eq!(got.to_f32().unwrap()[..6], [7., 4., 5., 6., 7., 4.]);
    assert_eq!(got.to_f32().unwrap()[30..], [3., 0., 1., 2., 3., 0.]);
    let far = Pad { before: vec![4], after: vec![5], mode: PadMode::Reflect };
    let got = eval(far, &[&list(&[1f32, 2.0, 3.0])]).unwrap();
    assert_eq!(got, list(&[1f32, 2., 3., 2., 1., 2., 3., 2., 1., 2., 3., 2.]));
}

#[test]
fn padding_must_be_a_value_of_the_type() {
    let pad = |value| Pad { before: vec![1], after: vec![0], mode: PadMode::Constant { value } };
    let codes = || coded(list(&[9u8]), 0.25, 7);
    assert_eq!(eval_typed(pad(0.0), &[codes()]).unwrap(), list(&[7u8, 9]));
    assert_eq!(eval_typed(pad(-1.75), &[codes()]).unwrap(), list(&[0u8, 9]));
    for value in [0.1, -2.0, 1e9, f64::NEG_INFINITY, f64::NAN] {
        assert!(refusal(eval_typed(pad(value), &[codes()])).contains("is not a value that"), "{value}");
    }
    assert_eq!(eval(pad(-3.0), &[&list(&[1i64])]).unwrap(), list(&[-3i64, 1]));
    assert!(eval(pad(0.5), &[&list(&[1i64])]).is_err());
    assert!(eval(pad(256.0), &[&list(&[1u8])]).is_err());
    let got = eval(pad(f64::NEG_INFINITY), &[&list(&[1f32])]).unwrap();
    assert_eq!(got, list(&[f32::NEG_INFINITY, 1.0]));
}

#[test]
fn gather_checks_its_indices() {
    let x = counting(&[3, 2], 0);
    let run = |i: i64| eval(Gather { axis: 0 }, &[&x, &Tensor::scalar(i)]);
    assert_eq!(run(-3).unwrap(), list(&[0f32, 1.0]));
    assert_eq!(run(2).unwrap(), list(&[4f32, 5.0]));
    for i in [3, -4, i64::MIN, i64::MAX] {
        assert!(refusal(run(i)).contains(&format!("index {i} is out of range for axis 0 of length 3")));
    }
}

#[test]
fn windows_too_large_are_refused() {
    let pool = |kernel: usize| Pool {
        kind: PoolKind::Max,
        window: Window::new([kernel, kernel]).pads([kernel, kernel], [0, 0]),
        ceil_mode: false,
        layout: Layout::ChannelsFirst,
    };
    let x = f32s(&[1, 1, 1, 1], &[1.0]);
    assert!(refusal(eval(pool(1 << 20), &[&x])).contains("taps"));
}

// ---- choices, bits and remainders

#[test]
fn choices_broadcast_three_operands() {
    let condition = Tensor::from_vec_as(DType::Bool, shape(&[2, 1]), vec![1u8, 0]).unwrap();
    let y = eval(Where {}, &[&condition, &of(&[3], &[1i64, 2, 3]), &Tensor::scalar(9i64)]).unwrap();
    assert_eq!(y, of(&[2, 3], &[1i64, 2, 3, 9, 9, 9]));
    let nan = eval(Where {}, &[&bools(&[0, 2]), &list(&[1f32]), &list(&[f32::NAN, 5.0])]).unwrap();
    assert!(nan.to_f32().unwrap()[0].is_nan() && nan.to_f32().unwrap()[1] == 1.0);
    assert!(refusal(eval(Where {}, &[&list(&[1u8]), &list(&[1u8]), &list(&[1u8])])).contains("bool"));
    assert!(refusal(eval(Where {}, &[&bools(&[1]), &list(&[1u8]), &list(&[1f32])])).contains("one type"));
    let (x, y) = (coded(list(&[7u8]), 0.5, 3), coded(list(&[8u8]), 0.25, 3));
    let condition = bools(&[1]);
    let typed = [(condition.clone(), condition.ty()), x.clone(), y];
    assert!(refusal(eval_typed(Where {}, &typed)).contains("grid"));
    assert_eq!(
        eval_typed(Where {}, &[(condition.clone(), condition.ty()), x.clone(), x]).unwrap(),
        list(&[7u8])
    );
}

#[test]
fn remainders_have_the_sign_of_one_operand() {
    let (a, b) = (list(&[-4i32, 7, 5, 4, -7, 8]), list(&[2i32, -3, 8, -2, 3, 5]));
    let run = |kind| eval(Binary { kind }, &[&a, &b]).unwrap();
    assert_eq!(run(BinaryKind::Modulo), list(&[0i32, -2, 5, 0, 2, 3]));
    assert_eq!(run(BinaryKind::Remainder), list(&[0i32, 1, 5, 0, -1, 3]));
    let (a, b) = (list(&[-4.3f32, 7.2, 5.0, 4.3, -7.2]), list(&[2.1f32, -3.4, 8.0, -2.1, 3.4]));
    close(
        &eval(Binary { kind: BinaryKind::Remainder }, &[&a, &b]).unwrap(),
        &[5],
        &[-0.1, 0.4, 5.0, 0.1, -0.4],
    );
    close(&eval(Binary { kind: BinaryKind::Modulo }, &[&a, &b]).unwrap(), &[5], &[2.0, -3.0, 5.0, -2.0, 3.0]);
    let least = eval(Binary { kind: BinaryKind::Remainder }, &[&list(&[i64::MIN]), &list(&[-1i64])]).unwrap();
    assert_eq!(least, list(&[0i64]));
    let kind = BinaryKind::Modulo;
    assert!(refusal(eval(Binary { kind }, &[&list(&[1u8]), &list(&[0u8])])).contains("divided by zero"));
}

#[test]
fn bits_of_integers() {
    let run = |kind, a: &Tensor, b: &Tensor| eval(Binary { kind }, &[a, b]);
    let (a, b) = (list(&[-2i16, 12]), list(&[7i16, 10]));
    assert_eq!(run(BinaryKind::And, &a, &b).unwrap(), list(&[6i16, 8]));
    assert_eq!(run(BinaryKind::Or, &a, &b).unwrap(), list(&[-1i16, 14]));
    assert_eq!(run(BinaryKind::Xor, &a, &b).unwrap(), list(&[-7i16, 6]));
    let (a, b) = (list(&[16u8, 255, 255, 1]), list(&[1u8, 7, 8, 255]));
    assert_eq!(run(BinaryKind::ShiftLeft, &a, &b).unwrap(), list(&[32u8, 128, 0, 0]));
    assert_eq!(run(BinaryKind::ShiftRight, &a, &b).unwrap(), list(&[8u8, 1, 0, 0]));
    let most = list(&[u64::MAX]);
    assert_eq!(run(BinaryKind::ShiftRight, &most, &list(&[63u64])).unwrap(), list(&[1u64]));
    assert_eq!(run(BinaryKind::ShiftLeft, &most, &most).unwrap(), list(&[0u64]));
    assert!(refusal(run(BinaryKind::ShiftLeft, &list(&[1i8]), &list(&[1i8]))).contains("ShiftLeft"));
    assert!(refusal(run(BinaryKind::And, &list(&[1f32]), &list(&[1f32]))).contains("And"));
    assert!(refusal(run(BinaryKind::Add, &bools(&[1]), &bools(&[1]))).contains("Add"));
}

#[test]
fn slopes_of_negative_numbers() {
    let x = list(&[-2f32, 3.0, f32::NAN]);
    let y = eval(Binary { kind: BinaryKind::PRelu }, &[&x, &list(&[0.5f32])]).unwrap().to_f32().unwrap();
    assert!(y[..2] == [-1.0, 3.0] && y[2].is_nan());
    let y = eval(Binary { kind: BinaryKind::PRelu }, &[&list(&[-2i32, 3]), &list(&[5i32])]).unwrap();
    assert_eq!(y, list(&[-10i32, 3]));
}

#[test]
fn bits_read_as_another_type() {
    let ones = eval(BitCast { to: DType::F32 }, &[&list(&[0x3f80_0000u32])]).unwrap();
    assert_eq!(ones, list(&[1f32]));
    assert_eq!(eval(BitCast { to: DType::Bool }, &[&list(&[0u8, 7])]).unwrap(), bools(&[0, 1]));
    let s4 = Tensor::from_vec_as(DType::S4, shape(&[1]), vec![-1i8]).unwrap();
    assert_eq!(eval(BitCast { to: DType::U4 }, &[&s4]).unwrap().to_i64(), Some(vec![15]));
    assert!(refusal(eval(BitCast { to: DType::F64 }, &[&list(&[1f32])])).contains("the bits of"));
    assert!(refusal(eval(BitCast { to: DType::S4 }, &[&list(&[1i8])])).contains("the bits of"));
}

#[test]
fn floats_wrap_to_four_bits() {
    let x = list(&[-9f32, -8.9, 7.5, 8.0, 300.0, f32::NAN, f32::INFINITY]);
    assert_eq!(eval(Cast { to: DType::S4 }, &[&x]).unwrap().to_i64().unwrap(), [7, -8, 7, -8, -4, 0, -1]);
    assert_eq!(eval(Cast { to: DType::U4 }, &[&x]).unwrap().to_i64().unwrap()[..5], [7, 8, 7, 8, 12]);
}

#[test]
fn functions_with_a_threshold() {
    use UnaryKind::*;
    let x = list(&[-2f32, -0.5, 0.0, 0.5, 2.0]);
    close(&unary(ThresholdedRelu { alpha: 0.5 }, &x), &[5], &[0.0, 0.0, 0.0, 0.0, 2.0]);
    close(&unary(Shrink { lambda: 1.0, bias: 0.25 }, &x), &[5], &[-1.75, 0.0, 0.0, 0.0, 1.75]);
    close(&unary(Celu { alpha: 2.0 }, &x), &[5], &[-1.264_241_1, -0.442_398_43, 0.0, 0.5, 2.0]);
    close(
        &unary(Swish { alpha: 2.0 }, &x),
        &[5],
        &[-0.035_972_42, -0.134_470_71, 0.0, 0.365_529_3, 1.964_027_6],
    );
    for kind in [ThresholdedRelu { alpha: 0.5 }, Shrink { lambda: 1.0, bias: 0.25 }, Celu { alpha: 2.0 }] {
        assert!(unary(kind, &list(&[f32::NAN])).to_f32().unwrap()[0].is_nan(), "{kind:?}");
    }
}

// ---- by index

#[test]
fn elements_are_picked_along_an_axis() {
    let x = of(&[2, 2], &[1i32, 2, 3, 4]);
    let indices = of(&[2, 2], &[0i64, 0, 1, -2]);
    assert_eq!(eval(GatherElements { axis: 1 }, &[&x, &indices]).unwrap(), of(&[2, 2], &[1, 1, 4, 3]));
    // Fewer than the operand has, beside the axis; more along it.
    let indices = of(&[1, 3], &[0i32, 1, 1]);
    assert_eq!(eval(GatherElements { axis: 1 }, &[&x, &indices]).unwrap(), of(&[1, 3], &[1, 2, 2]));
    assert!(refusal(eval(GatherElements { axis: 0 }, &[&x, &indices])).contains("axis 0"));
    let beyond = of(&[1, 1], &[2i64]);
    assert!(refusal(eval(GatherElements { axis: 1 }, &[&x, &beyond])).contains("index 2 is out of range"));
    assert!(refusal(eval(GatherElements { axis: 1 }, &[&x, &of(&[1, 1], &[0u8])])).contains("s32 or s64"));
    let none = eval(GatherElements { axis: 1 }, &[&x, &of::<i64>(&[2, 0], &[])]).unwrap();
    assert_eq!(none, of::<i32>(&[2, 0], &[]));
}

#[test]
fn parts_are_picked_by_tuples() {
    let x = of(&[2, 2, 2], &[0i8, 1, 2, 3, 4, 5, 6, 7]);
    let whole = eval(GatherNd { batch_dims: 0 }, &[&x, &of(&[2, 2], &[0i64, 1, -1, 0])]).unwrap();
    assert_eq!(whole, of(&[2, 2], &[2i8, 3, 4, 5]));
    let batches = eval(GatherNd { batch_dims: 1 }, &[&x, &of(&[2, 1], &[1i64, 0])]).unwrap();
    assert_eq!(batches, of(&[2, 2], &[2i8, 3, 4, 5]));
    let one = eval(GatherNd { batch_dims: 0 }, &[&x, &list(&[1i64, 1, 1])]).unwrap();
    assert_eq!(one, Tensor::scalar(7i8));
    assert!(refusal(eval(GatherNd { batch_dims: 0 }, &[&x, &list(&[0i64; 4])])).contains("tuples"));
    assert!(refusal(eval(GatherNd { batch_dims: 2 }, &[&x, &of(&[2, 1], &[0i64; 2])])).contains("tuples"));
    assert!(refusal(eval(GatherNd { batch_dims: 0 }, &[&x, &list(&[5i64])])).contains("out of range"));
}

#[test]
fn elements_are_updated_in_order() {
    let x = of(&[1, 5], &[1f32, 2.0, 3.0, 4.0, 5.0]);
    let (at, by) = (of(&[1, 3], &[1i64, -2, 1]), of(&[1, 3], &[1.5f32, 2.5, 7.0]));
    let run = |update| eval(ScatterElements { axis: 1, update }, &[&x, &at, &by]).unwrap().to_f32().unwrap();
    assert_eq!(run(Update::Replace), [1.0, 7.0, 3.0, 2.5, 5.0]);
    assert_eq!(run(Update::Add), [1.0, 10.5, 3.0, 6.5, 5.0]);
    assert_eq!(run(Update::Mul), [1.0, 21.0, 3.0, 10.0, 5.0]);
    assert_eq!(run(Update::Max), [1.0, 7.0, 3.0, 4.0, 5.0]);
    assert_eq!(run(Update::Min), [1.0, 1.5, 3.0, 2.5, 5.0]);
    let wraps = ScatterElements { axis: 0, update: Update::Add };
    let sum = eval(wraps, &[&list(&[250u8]), &list(&[0i64, 0]), &list(&[9u8, 9])]).unwrap();
    assert_eq!(sum, list(&[12u8]));
    let or = ScatterElements { axis: 0, update: Update::Add };
    assert_eq!(eval(or, &[&bools(&[0]), &list(&[0i32, 0]), &bools(&[1, 1])]).unwrap(), bools(&[1]));
    let half = |x: f32| list(&[half::f16::from_f32(x)]);
    let add = ScatterElements { axis: 0, update: Update::Add };
    assert_eq!(eval(add.clone(), &[&half(2048.0), &list(&[0i64]), &half(1.0)]).unwrap(), half(2048.0));
    assert!(refusal(eval(add.clone(), &[&list(&[1f32]), &list(&[1i64]), &list(&[1f32])])).contains("range"));
    assert!(refusal(eval(add, &[&list(&[1f32]), &list(&[0i64]), &list(&[1f32, 2.0])])).contains("updates"));
}

#[test]
fn parts_are_updated_by_tuples() {
    let x = of(&[3, 2], &[0i64, 1, 2, 3, 4, 5]);
    let (at, by) = (of(&[2, 1], &[2i64, 0]), of(&[2, 2], &[10i64, 20, 30, 40]));
    let run = |update| eval(ScatterNd { update }, &[&x, &at, &by]).unwrap();
    assert_eq!(run(Update::Replace), of(&[3, 2], &[30i64, 40, 2, 3, 10, 20]));
    assert_eq!(run(Update::Mul), of(&[3, 2], &[0i64, 40, 2, 3, 40, 100]));
    let single = [&x, &of(&[1, 2], &[1i64, 1]), &list(&[9i64])];
    assert_eq!(eval(ScatterNd { update: Update::Min }, &single).unwrap(), x);
    assert!(refusal(eval(ScatterNd { update: Update::Add }, &[&x, &at, &list(&[1i64])])).contains("updates"));
}

// ---- lines

#[test]
fn places_of_extremes() {
    let x = of(&[2, 3], &[2f32, 1.0, 2.0, 0.0, f32::NAN, f32::NAN]);
    let run =
        |largest, axis, keep_dims, last| eval(ArgExtreme { largest, axis, keep_dims, last }, &[&x]).unwrap();
    assert_eq!(run(true, 1, true, false), of(&[2, 1], &[0i64, 1]));
    assert_eq!(run(true, 1, false, true), list(&[2i64, 2]));
    assert_eq!(run(false, 1, false, false), list(&[1i64, 1]));
    assert_eq!(run(false, 0, false, false), list(&[1i64, 1, 1]));
    let bytes =
        eval(ArgExtreme { largest: false, axis: 0, keep_dims: false, last: true }, &[&list(&[3u8, 1, 1])]);
    assert_eq!(bytes.unwrap(), Tensor::scalar(2i64));
    let empty = f32s(&[2, 0], &[]);
    let of_none = ArgExtreme { largest: true, axis: 1, keep_dims: false, last: false };
    assert!(refusal(eval(of_none, &[&empty])).contains("no elements"));
}

#[test]
fn top_few_in_order() {
    let x = of(&[2, 4], &[1f32, 3.0, 3.0, 2.0, f32::NAN, -1.0, 0.0, -0.0]);
    let run = |k, axis, largest| eval(TopK { k, axis, largest }, &[&x]).unwrap();
    assert_eq!(run(3, 1, true), of(&[2, 3], &[1i64, 2, 3, 0, 2, 3]));
    assert_eq!(run(2, 1, false), of(&[2, 2], &[0i64, 3, 1, 2]));
    assert_eq!(run(4, 1, false), of(&[2, 4], &[0i64, 3, 1, 2, 1, 2, 3, 0]));
    assert_eq!(run(1, 0, true), of(&[1, 4], &[1i64, 0, 0, 0]));
    assert_eq!(run(0, 1, true), of::<i64>(&[2, 0], &[]));
    assert!(refusal(eval(TopK { k: 3, axis: 0, largest: true }, &[&x])).contains("the top 3"));
    // Against a sort of everything.
    let many = seeded(DType::S8, &shape(&[1, 500]), 3);
    let values = many.as_slice::<i8>().unwrap();
    let mut sorted: Vec<i64> = (0..500).collect();
    sorted.sort_by_key(|&i| (-i16::from(values[i as usize]), i));
    for k in [1, 7, 499, 500] {
        let got = eval(TopK { k, axis: 1, largest: true }, &[&many]).unwrap();
        assert_eq!(got.as_slice::<i64>().unwrap(), &sorted[..k]);
    }
}

#[test]
fn running_totals() {
    let x = of(&[2, 3], &[1i32, 2, 3, 4, 5, 6]);
    let run = |kind, axis, exclusive, reverse| {
        eval(Cumulate { kind, axis, exclusive, reverse }, &[&x]).unwrap().as_slice::<i32>().unwrap().to_vec()
    };
    use CumulateKind::{Product, Sum};
    assert_eq!(run(Sum, 1, false, false), [1, 3, 6, 4, 9, 15]);
    assert_eq!(run(Sum, 1, true, false), [0, 1, 3, 0, 4, 9]);
    assert_eq!(run(Sum, 1, false, true), [6, 5, 3, 15, 11, 6]);
    assert_eq!(run(Sum, 0, true, true), [4, 5, 6, 0, 0, 0]);
    assert_eq!(run(Product, 1, true, true), [6, 3, 1, 30, 6, 1]);
    let wraps = Cumulate { kind: Product, axis: 0, exclusive: false, reverse: false };
    assert_eq!(eval(wraps.clone(), &[&list(&[16u8, 16, 7])]).unwrap(), list(&[16u8, 0, 0]));
    assert!(refusal(eval(wraps, &[&bools(&[1])])).contains("plain numbers"));
}

#[test]
fn determinants_of_batches() {
    let x = f32s(
        &[2, 3, 3],
        &[0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 3.0, 1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 1.0, 1.0, 1.0],
    );
    assert_eq!(eval(Determinant {}, &[&x]).unwrap(), list(&[-8f32, 0.0]));
    assert_eq!(eval(Determinant {}, &[&f32s(&[2, 0, 0], &[])]).unwrap(), list(&[1f32, 1.0]));
    assert!(refusal(eval(Determinant {}, &[&f32s(&[2, 3], &[0.0; 6])])).contains("square"));
    assert!(refusal(eval(Inverse {}, &[&f32s(&[2, 2], &[1.0, 2.0, 2.0, 4.0])])).contains("singular"));
    // A tree that leads back to itself, and one that leads nowhere, end.
    let s32s = |values: &[i32]| Tensor::from_vec(shape(&[values.len()]), values.to_vec()).unwrap();
    let tree = |yes: i32, feature: i32| {
        let (x, mode) = (f32s(&[1, 1], &[0.5]), Tensor::from_vec(shape(&[1]), vec![0u8]).unwrap());
        let (split, next, root) = (f32s(&[1], &[1.0]), s32s(&[yes]), s32s(&[0]));
        let (starts, targets, weights) = (s32s(&[0, 1]), s32s(&[0]), f32s(&[1], &[7.0]));
        let all = [&x, &s32s(&[feature]), &mode, &split, &next, &next, &root, &starts, &targets, &weights]
            .map(Tensor::clone);
        eval(TreeEnsemble { targets: 1, aggregate: Aggregate::Max }, &all.iter().collect::<Vec<_>>())
    };
    assert_eq!(tree(-1, 0).unwrap(), f32s(&[1, 1], &[7.0]));
    assert!(refusal(tree(0, 0)).contains("leads back"));
    assert!(refusal(tree(5, 0)).contains("not there"));
    assert!(refusal(tree(-1, 3)).contains("not there"));
    assert!(refusal(tree(-9, 0)).contains("a leaf that is not there"));
}

#[test]
fn recurrences_by_hand() {
    let f = |dims: &[usize], values: &[f32]| f32s(dims, values);
    let run = |op: Recurrent, operands: &[&Tensor]| -> Vec<Tensor> {
        let types: Vec<TensorType> = operands.iter().map(|t| t.ty()).collect();
        let types: Vec<&TensorType> = types.iter().collect();
        let op = Op::from(op);
        let results = op.infer(&types).unwrap();
        op.eval(operands, &types, &results).unwrap()
    };
    let linear = Activation::Affine { alpha: 1.0, beta: 0.0 };
    let rnn = |reverse, clip| Recurrent {
        cell: Cell::Rnn,
        activations: vec![linear],
        clip,
        reverse,
        lengths: true,
    };
    // h = a + 2·h, of two sequences of 3 and 2 steps.
    let a = f(&[3, 2, 1], &[1.0, 10.0, 2.0, 20.0, 3.0, 30.0]);
    let (r, h) = (f(&[1, 1], &[2.0]), f(&[2, 1], &[1.0, 0.0]));
    let lengths = of(&[2], &[3i32, 2]);
    let y = run(rnn(false, None), &[&a, &r, &h, &lengths]);
    assert_eq!(y[0], f(&[3, 2, 1], &[3.0, 10.0, 8.0, 40.0, 19.0, 0.0]));
    assert_eq!(y[1], f(&[2, 1], &[19.0, 40.0]));
    let y = run(rnn(true, None), &[&a, &r, &h, &lengths]);
    assert_eq!(y[0], f(&[3, 2, 1], &[25.0, 50.0, 12.0, 20.0, 5.0, 0.0]));
    let y = run(rnn(false, Some(4.0)), &[&a, &r, &h, &lengths]);
    assert_eq!(y[1], f(&[2, 1], &[4.0, 4.0]));

    // Gates z, r, h of one step with H = 4: z = 0.5, r = 3, with R_h = 2 and r_b = 1.
    let gru = |linear_before_reset| Recurrent {
        cell: Cell::Gru { linear_before_reset },
        activations: vec![linear; 2],
        clip: None,
        reverse: false,
        lengths: false,
    };
    let (a, r, h) = (f(&[1, 1, 3], &[0.5, 3.0, 7.0]), f(&[1, 3], &[0.0, 0.0, 2.0]), f(&[1, 1], &[4.0]));
    // (1 − z)·(7 + (3·4)·2) + z·4, and with 3·(1 + 4·2).
    assert_eq!(run(gru(false), &[&a, &r, &h])[1], f(&[1, 1], &[17.5]));
    assert_eq!(run(gru(true), &[&a, &r, &h, &f(&[1], &[1.0])])[1], f(&[1, 1], &[19.0]));

    let lstm = |coupled, peepholes| Recurrent {
        cell: Cell::Lstm { peepholes, coupled },
        activations: vec![linear; 3],
        clip: None,
        reverse: false,
        lengths: false,
    };
    // i = 2, o = 3, f = 5, c = 7 with C = 11, and peepholes 1, 10, 100 of i, o, f.
    let (a, r) = (f(&[1, 1, 4], &[2.0, 3.0, 5.0, 7.0]), f(&[1, 4], &[0.0; 4]));
    let (h, c, p) = (f(&[1, 1], &[1.0]), f(&[1, 1], &[11.0]), f(&[3], &[1.0, 10.0, 100.0]));
    let y = run(lstm(false, false), &[&a, &r, &h, &c]);
    assert_eq!([&y[1], &y[2]], [&f(&[1, 1], &[3.0 * 69.0]), &f(&[1, 1], &[69.0])]);
    let y = run(lstm(true, false), &[&a, &r, &h, &c]);
    assert_eq!(y[2], f(&[1, 1], &[-11.0 + 14.0]));
    let y = run(lstm(false, true), &[&a, &r, &h, &c, &p]);
    let cell = (5.0 + 1100.0) * 11.0 + (2.0 + 11.0) * 7.0;
    assert_eq!([&y[1], &y[2]], [&f(&[1, 1], &[(3.0 + 10.0 * cell) * cell]), &f(&[1, 1], &[cell])]);
    let short = lstm(false, true);
    assert!(Op::from(short).infer(&[&a.ty(), &r.ty(), &h.ty(), &c.ty()]).is_err());
}

#[test]
fn lengths_beyond_the_steps_are_refused() {
    let rnn = Recurrent {
        cell: Cell::Rnn,
        activations: vec![Activation::Unary(UnaryKind::Tanh)],
        clip: None,
        reverse: false,
        lengths: true,
    };
    let (a, r, h) = (f32s(&[1, 1, 1], &[0.0]), f32s(&[1, 1], &[0.0]), f32s(&[1, 1], &[0.0]));
    for length in [2, -1] {
        let result =
            eval_typed(rnn.clone(), &[&a, &r, &h, &of(&[1], &[length])].map(|t| (t.clone(), t.ty())));
        assert!(refusal(result).contains("has a length of"), "{length}");
    }
}

#[test]
fn samples_at_any_places() {
    let x = f32s(&[1, 1, 1, 4], &[1.0, 2.0, 4.0, 8.0]);
    let sample = |mode, padding, align_corners, at: f32| {
        let grid = f32s(&[1, 1, 1, 2], &[at, 0.0]);
        eval(GridSample { mode, padding, align_corners }, &[&x, &grid]).unwrap().as_slice::<f32>().unwrap()[0]
    };
    use {SampleMode::*, SamplePadding::*};
    // x = ((g + 1)·4 − 1)/2: 0.25 is 2, 0.5 is 2.5, 1.25 is 4; with corners aligned (g + 1)·3/2.
    assert_eq!(sample(Linear, Zeros, false, 0.25), 4.0);
    assert_eq!(sample(Linear, Zeros, false, 0.5), 6.0);
    assert_eq!(sample(Linear, Zeros, false, 1.0), 4.0);
    assert_eq!(sample(Linear, Border, false, 1.25), 8.0);
    assert_eq!(sample(Linear, Reflection, false, 1.5), 6.0);
    assert_eq!(sample(Linear, Zeros, true, 1.0), 8.0);
    assert_eq!(sample(Nearest, Zeros, false, 0.5), 4.0);
    assert_eq!(sample(Nearest, Zeros, false, 2.0), 0.0);
    // Keys' weights half way between: −0.09375, 0.59375, 0.59375, −0.09375.
    assert_eq!(sample(Cubic, Border, false, 0.0), 0.59375 * 6.0 - 0.09375 * 9.0);
    assert_eq!(sample(Nearest, Border, false, f32::NAN), 1.0);
    let deep = GridSample { mode: Nearest, padding: Zeros, align_corners: false };
    let (x, grid) = (counting(&[1, 1, 1, 1, 1, 2], 0), counting(&[1, 1, 1, 1, 1, 4], 0));
    assert!(refusal(eval(deep, &[&x, &grid])).contains("4 dimensions"));
}

/// Regions have one element at least, what is outside the image has no elements, and a region without an image is an error.
#[test]
fn the_largest_of_a_region_is_0_where_it_is_outside() {
    let x = f32s(&[1, 1, 2, 2], &[-1.0, -2.0, -3.0, -4.0]);
    let pool = |region: [f32; 5]| {
        let op = MaxRoiPool { height: 1, width: 2, scale: 0.5 };
        eval(op, &[&x, &f32s(&[1, 5], &region)])
    };
    let values = |region| pool(region).unwrap().as_slice::<f32>().unwrap().to_vec();
    assert_eq!(values([0.0, 0.0, 0.0, 2.0, 2.0]), [-1.0, -2.0]);
    // A half goes up, and a last place before the first one is the first one.
    assert_eq!(values([0.0, 1.0, 1.0, 0.0, 0.0]), [-4.0, -4.0]);
    assert_eq!(values([0.0, 2.0, 0.0, 8.0, 0.0]), [-2.0, 0.0]);
    assert_eq!(values([0.0, f32::NAN, -1e30, 1e30, f32::INFINITY]).len(), 2);
    for image in [-1.0, 1.0, f32::NAN] {
        assert!(refusal(pool([image, 0.0, 0.0, 2.0, 2.0])).contains("none of 1 images"));
    }
}

/// Of a region far larger than the image few samples are in it; the others are 0, as all are of one far away.
#[test]
fn regions_may_be_far_larger_than_images() {
    let x = f32s(&[1, 1, 2, 2], &[1.0; 4]);
    let pool = |largest, region: [f32; 4]| {
        let op = RoiAlign { height: 1, width: 1, samples: 0, scale: 1.0, half_pixel: false, largest };
        let (rois, image) = (f32s(&[1, 4], &region), of(&[1], &[0i64]));
        eval(op, &[&x, &rois, &image])
    };
    let value = |largest, region| pool(largest, region).unwrap().as_slice::<f32>().unwrap()[0];
    // Samples at −½, ½ and 1½ along each axis, and 4,093 more that are outside.
    assert_eq!(value(false, [-1.0, -1.0, 4095.0, 4095.0]), 9.0 / (4096.0 * 4096.0));
    assert_eq!(value(true, [-1.0, -1.0, 4095.0, 4095.0]), 1.0);
    assert_eq!(value(true, [50.0, 50.0, 4000.0, 4000.0]), 0.0);
    assert_eq!(value(false, [-4e6, 0.0, 4e6, 2.0]), 2.0 * 3.0 / (2.0 * 8e6));
    assert!(refusal(pool(false, [-4e9, -4e9, 4e9, 4e9])).contains("samples of a bin"));
}
