//! Ops on codes: their results on small numbers, computed by hand from their definitions.

use super::*;
use crate::onnx::export::proto::{float, int, ints};

/// A node of ONNX Runtime's domain.
fn microsoft(op: &str, inputs: &[&str]) -> NodeProto {
    NodeProto { domain: "com.microsoft".into(), ..node(op, inputs, &["y"]) }
}

/// A model of this node with scalar constants for every grid: `s2` is the scale 2 and so on, `z1` the u8 zero point 1.
fn with_grids(node: NodeProto) -> Draft {
    Draft::new(13, [node])
        .with_microsoft()
        .constant("s1", Tensor::scalar(1f32))
        .constant("s2", Tensor::scalar(2f32))
        .constant("s0.5", Tensor::scalar(0.5f32))
        .constant("z0", Tensor::scalar(0u8))
        .constant("z1", Tensor::scalar(1u8))
        .constant("z10", Tensor::scalar(10u8))
        .constant("w0", Tensor::scalar(0i8))
}

/// The u8 results for u8 inputs.
fn codes(d: &Draft, inputs: &[Tensor]) -> Vec<u8> {
    d.run(inputs)[0].as_slice::<u8>().unwrap().to_vec()
}

#[test]
fn a_convolution_of_codes_pads_with_the_zero_point() {
    let inputs = ["x", "s0.5", "z10", "w", "s2", "w0", "s1", "z1", "b"];
    let d = with_grids(node("QLinearConv", &inputs, &["y"]).with(ints("pads", [1, 1])))
        .input_of("x", DType::U8, &[1, 1, 3])
        .constant("w", of(&[1, 1, 3], &[1i8, -2, 3]))
        .constant("b", of(&[1], &[4i32]));
    // The bias is in steps of 0.5·2; x − 10 is 2, 0, −4, so sums are −4 + 4, −10 + 4 and 8 + 4 of them.
    assert_eq!(codes(&d, &[of(&[1, 1, 3], &[12u8, 10, 6])]), [1, 0, 13]);
    let last = NodeProto { domain: "com.microsoft".into(), ..d.nodes[0].clone() };
    let mut d = Draft { nodes: vec![last.with(int("channels_last", 1))], ..d };
    d.inputs[0].1.shape = Shape::new([1, 3, 1]).unwrap();
    assert_eq!(codes(&d, &[of(&[1, 3, 1], &[12u8, 10, 6])]), [1, 0, 13]);
}

#[test]
fn products_of_codes() {
    let d = with_grids(node("QLinearMatMul", &["a", "s2", "z1", "b", "s0.5", "w0", "s2", "z10"], &["y"]))
        .input_of("a", DType::U8, &[1, 2])
        .constant("b", of(&[2, 2], &[1i8, 2, -3, 4]));
    // [2, 4]·b is [−10, 20], in steps of 2: −5 and 10.
    assert_eq!(codes(&d, &[of(&[1, 2], &[3u8, 5])]), [5, 20]);

    let gemm = |inputs: &[&str]| {
        with_grids(microsoft("QGemm", inputs).with(int("transB", 1)).with(float("alpha", 2.0)))
            .input_of("a", DType::U8, &[1, 2])
            .constant("b", of(&[2, 2], &[1i8, -3, 2, 4]))
            .constant("c", of(&[2], &[3i32, -1]))
    };
    // [2, 4]·b' is [−10, 20], and with what C adds [−7, 19], all in steps of 2·2·0.5.
    let real = gemm(&["a", "s2", "z1", "b", "s0.5", "w0", "c"]);
    assert_eq!(real.floats(&[of(&[1, 2], &[2u8, 3])]), [2.0 * -2.0, 2.0 * 9.0]);
    let coded = gemm(&["a", "s2", "z1", "b", "s0.5", "w0", "c", "s2", "z10"]);
    assert_eq!(codes(&coded, &[of(&[1, 2], &[2u8, 3])]), [8, 19]);
}

#[test]
fn products_of_integers_take_zero_points_of_rows_and_columns() {
    let d = with_grids(node("MatMulInteger", &["a", "b", "az", "bz"], &["y"]))
        .input_of("a", DType::U8, &[2, 2])
        .constant("b", of(&[2, 2], &[1i8, 2, 3, 4]))
        .constant("az", of(&[2], &[1u8, 2]))
        .constant("bz", of(&[2], &[1i8, 0]));
    let y = d.run(&[of(&[2, 2], &[2u8, 3, 4, 5])]);
    assert_eq!(y[0], of(&[2, 2], &[4i32, 10, 6, 16]));

    let d = with_grids(microsoft("MatMulIntegerToFloat", &["a", "b", "s0.5", "s2", "z1", "", "bias"]))
        .input_of("a", DType::U8, &[2, 2])
        .constant("b", of(&[2, 1], &[1i8, -1]))
        .constant("bias", of(&[1], &[0.25f32]));
    assert_eq!(d.floats(&[of(&[2, 2], &[2u8, 3, 4, 1])]), [-0.75, 3.25]);
}

#[test]
fn zero_points_may_be_computed_at_run_time() {
    let d = with_grids(node("ConvInteger", &["x", "w", "z"], &["y"]))
        .input_of("x", DType::U8, &[1, 1, 2])
        .input_of("z", DType::U8, &[])
        .constant("w", of(&[1, 1, 2], &[1i8, -2]));
    assert_eq!(d.run(&[of(&[1, 1, 2], &[3u8, 4]), Tensor::scalar(2u8)])[0], of(&[1, 1, 1], &[-3i32]));

    let d = Draft::new(19, [node("DequantizeLinear", &["x", "s", "z"], &["y"])])
        .input_of("x", DType::U8, &[2])
        .input_of("s", DType::F32, &[])
        .input_of("z", DType::U8, &[]);
    let inputs = [of(&[2], &[3u8, 7]), Tensor::scalar(0.5f32), Tensor::scalar(4u8)];
    assert_eq!(d.floats(&inputs), [-0.5, 1.5]);
    let d = Draft { nodes: vec![node("QuantizeLinear", &["x", "s", "z"], &["y"])], ..d };
    let mut d = Draft { inputs: d.inputs[1..].to_vec(), ..d }.input("x", &[3]);
    d.inputs.rotate_right(1);
    let inputs = [of(&[3], &[0.25f32, 0.75, -9.0]), Tensor::scalar(0.5f32), Tensor::scalar(4u8)];
    assert_eq!(codes(&d, &inputs), [4, 6, 0]);
}

#[test]
fn a_dynamic_grid_covers_zero() {
    let d = Draft::new(13, [node("DynamicQuantizeLinear", &["x"], &["y", "s", "z"])])
        .input("x", &[3])
        .outputs(&["y", "s", "z"]);
    let y = d.run(&[of(&[3], &[1f32, 2.0, 25.5])]);
    assert_eq!(y, [of(&[3], &[10u8, 20, 255]), Tensor::scalar(0.1f32), Tensor::scalar(0u8)]);
    let y = d.run(&[of(&[3], &[-12.8f32, 0.0, 12.7])]);
    assert_eq!(y, [of(&[3], &[0u8, 128, 255]), Tensor::scalar(0.1f32), Tensor::scalar(128u8)]);
    let y = d.run(&[of(&[3], &[0f32; 3])]);
    assert_eq!((&y[0], &y[1]), (&of(&[3], &[0u8; 3]), &Tensor::scalar(1f32)));

    let d = with_grids(microsoft("DynamicQuantizeMatMul", &["x", "b", "s2", "w0", "bias"]))
        .input("x", &[1, 2])
        .constant("b", of(&[2, 1], &[1i8, -1]))
        .constant("bias", of(&[1], &[1f32]));
    assert_eq!(d.floats(&[of(&[1, 2], &[0f32, 255.0])]), [1.0 - 510.0]);
}

/// A layer of one hidden number whose weights are codes: those of the input have this zero point.
fn layer_of_codes(zero: i8) -> Draft {
    let operands = ["x", "w", "r", "", "", "", "", "", "s", "z", "t", "u"];
    Draft::new(13, [microsoft("DynamicQuantizeLSTM", &operands).with(int("hidden_size", 1))])
        .with_microsoft()
        .input("x", &[2, 1, 2])
        .constant("w", of(&[1, 2, 4], &[1i8, -2, 3, 4, 5, -6, 7, 8]))
        .constant("s", of(&[1], &[0.125f32]))
        .constant("z", of(&[1], &[zero]))
        .constant("r", of(&[1, 1, 4], &[3i8, -5, 7, 1]))
        .constant("t", of(&[1, 4], &[0.5f32, 0.25, 0.125, 1.0]))
        .constant("u", of(&[1, 4], &[0i8; 4]))
}

/// The same layer of these weights of the input.
fn layer_of_numbers(w: &[f32]) -> Draft {
    Draft::new(13, [node("LSTM", &["x", "w", "r"], &["y"]).with(int("hidden_size", 1))])
        .input("x", &[2, 1, 2])
        .constant("w", of(&[1, 4, 2], w))
        .constant("r", of(&[1, 4, 1], &[1.5f32, -1.25, 0.875, 1.0]))
}

#[test]
fn a_layer_of_codes_is_that_of_the_numbers_they_mean() {
    let x = of(&[2, 1, 2], &[0.5f32, -1.0, 0.25, 2.0]);
    let real = layer_of_numbers(&[0.0, 0.5, -0.375, -0.875, 0.25, 0.75, 0.375, 0.875]);
    assert_eq!(layer_of_codes(1).floats(std::slice::from_ref(&x)), real.floats(&[x]));
}

/// Inputs and states on which the grids of run time are exact: codes of ONNX Runtime's kernel, by hand.
#[test]
fn a_layer_of_codes_around_0_quantizes_its_input_and_its_states() {
    let x = of(&[2, 1, 2], &[0.0f32, -1.0, 0.5, 1.55]);
    // −1 to 1.55 is 255 steps of 0.01, and a state of one number is an end of its grid: the same as in float.
    let real = layer_of_numbers(&[1.0f32, 5.0, -2.0, -6.0, 3.0, 7.0, 4.0, 8.0].map(|w| w * 0.125));
    for (a, b) in layer_of_codes(0).floats(std::slice::from_ref(&x)).iter().zip(real.floats(&[x])) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

#[test]
fn a_layer_of_codes_without_gates_is_refused() {
    let mut none = layer_of_codes(0);
    none.constants.retain(|(name, _)| !["w", "s", "z"].contains(&name.as_str()));
    let none = none
        .constant("w", of::<i8>(&[1, 2, 0], &[]))
        .constant("s", of::<f32>(&[0], &[]))
        .constant("z", of::<i8>(&[0], &[]));
    none.refused("DynamicQuantizeLSTM");
}

#[test]
fn functions_of_codes() {
    let binary = |op: &str| {
        with_grids(microsoft(op, &["a", "s2", "z1", "b", "s0.5", "", "s1", "z10"]))
            .input_of("a", DType::U8, &[2])
            .input_of("b", DType::U8, &[1])
    };
    let inputs = [of(&[2], &[0u8, 4]), of(&[1], &[6u8])];
    assert_eq!(codes(&binary("QLinearAdd"), &inputs), [11, 19]);
    assert_eq!(codes(&binary("QLinearMul"), &inputs), [4, 28]);

    let select =
        with_grids(microsoft("QLinearWhere", &["c", "a", "s2", "z1", "a", "s0.5", "z0", "s1", "z10"]))
            .input_of("c", DType::Bool, &[2])
            .input_of("a", DType::U8, &[2]);
    let condition = Tensor::from_vec_as::<u8>(DType::Bool, Shape::new([2]).unwrap(), vec![1, 0]).unwrap();
    assert_eq!(codes(&select, &[condition, of(&[2], &[4u8, 4])]), [16, 12]);

    let unary = |op: &str| {
        with_grids(microsoft(op, &["x", "s2", "z1", "s0.5", "z10"])).input_of("x", DType::U8, &[2])
    };
    let x = of(&[2], &[0u8, 2]);
    assert_eq!(codes(&unary("QLinearSigmoid"), std::slice::from_ref(&x)), [10, 12]);
    let mut leaky = unary("QLinearLeakyRelu");
    leaky.nodes[0].attribute.push(float("alpha", 0.5));
    assert_eq!(codes(&leaky, std::slice::from_ref(&x)), [8, 14]);
    let mut softmax = unary("QLinearSoftmax");
    softmax.clone().refused("`opset`");
    softmax.nodes[0].attribute.push(int("opset", 13));
    assert_eq!(codes(&softmax, &[x]), [10, 12]);
}

#[test]
fn pools_and_parts_of_codes() {
    let pool = |op: &str| microsoft(op, &["x", "s2", "z1", "s1", "z10"]);
    let d = |n: NodeProto, dims: &[usize]| with_grids(n).input_of("x", DType::U8, dims);
    let x = [3u8, 5, 2, 2];
    let average = d(pool("QLinearAveragePool").with(ints("kernel_shape", [2])), &[1, 2, 2]);
    assert_eq!(codes(&average, &[of(&[1, 2, 2], &x)]), [16, 12]);
    let last = pool("QLinearGlobalAveragePool").with(int("channels_last", 1));
    assert_eq!(codes(&d(last, &[1, 2, 2]), &[of(&[1, 2, 2], &x)]), [13, 15]);
    let mean = pool("QLinearReduceMean").with(ints("axes", [1])).with(int("keepdims", 0));
    assert_eq!(codes(&d(mean, &[2, 2]), &[of(&[2, 2], &x)]), [16, 12]);

    let parts = ["s1", "z10", "x", "s2", "z1", "x", "s0.5", "z10"];
    let concat = d(microsoft("QLinearConcat", &parts).with(int("axis", 0)), &[1]);
    assert_eq!(codes(&concat, &[of(&[1], &[4u8])]), [16, 7]);
    d(microsoft("QLinearConcat", &parts[..4]).with(int("axis", 0)), &[1]).refused("three a part");
}

#[test]
fn blocks_of_weights_have_scales_of_their_own() {
    let d = Draft::new(
        21,
        [node("DequantizeLinear", &["q", "s", "z"], &["y"]).with(int("block_size", 2)).with(int("axis", 1))],
    )
    .constant(
        "q",
        Tensor::from_vec_as::<i8>(DType::S4, Shape::new([2, 3]).unwrap(), vec![1, 2, 3, 4, 5, 6]).unwrap(),
    )
    .constant("s", of(&[2, 2], &[1f32, 10.0, -0.5, 2.0]))
    .constant(
        "z",
        Tensor::from_vec_as::<i8>(DType::S4, Shape::new([2, 2]).unwrap(), vec![0, 1, 2, 0]).unwrap(),
    );
    assert_eq!(d.floats(&[]), [1.0, 2.0, 20.0, -1.0, -1.5, 12.0]);

    // Two columns of three rows in blocks of two: 16 codes would be bytes 0x21, 0x03.
    let bits = |zero: &[&str]| {
        let mut inputs = vec!["a", "b", "s"];
        inputs.extend(zero);
        let attributes = [("K", 3), ("N", 2), ("bits", 4), ("block_size", 2)];
        let node =
            attributes.into_iter().fold(microsoft("MatMulNBits", &inputs), |n, (k, v)| n.with(int(k, v)));
        Draft::new(21, [node])
            .with_microsoft()
            .input("a", &[1, 3])
            .constant("b", of(&[2, 2, 1], &[0x98u8, 0x0a, 0x77, 0x06]))
            .constant("s", of(&[4], &[1f32, 2.0, 0.5, 1.0]))
            .constant("z", of(&[2], &[0x98u8, 0x66]))
    };
    let a = of(&[1, 3], &[1f32, 10.0, 100.0]);
    // Less 8, columns are 0, 1, 2·2 and −0.5, −0.5, −2.
    assert_eq!(bits(&[]).floats(std::slice::from_ref(&a)), [410.0, -205.5]);
    // Less 8 and 9, and less 6.
    assert_eq!(bits(&["z"]).floats(&[a]), [210.0, 5.5]);
    let mut wrong = bits(&[]);
    wrong.constants[1].1 = of(&[3], &[1f32; 3]);
    wrong.refused("scales must have 4 elements");
}
