use super::*;
use crate::{Kind, Op, Stage};

fn ops(g: &Graph) -> Vec<&'static str> {
    g.order().into_iter().filter_map(|id| g.op(id)).map(Op::mnemonic).collect()
}

#[test]
fn clip_bounds_are_attributes_then_operands() {
    let x = iota(&[5]);
    let old =
        Draft::new(6 + 1, [node("Clip", &["x"], &["y"]).with(float("min", 1.0)).with(float("max", 3.0))]);
    assert_eq!(old.input("x", &[5]).floats(std::slice::from_ref(&x)), [1.0, 1.0, 2.0, 3.0, 3.0]);
    let new = Draft::new(11, [node("Clip", &["x", "", "hi"], &["y"])]).constant("hi", Tensor::scalar(2f32));
    assert_eq!(new.input("x", &[5]).floats(std::slice::from_ref(&x)), [0.0, 1.0, 2.0, 2.0, 2.0]);
    // Bounds that are computed, and integers.
    let run_time = Draft::new(13, [node("Clip", &["x", "lo"], &["y"])]).input("x", &[5]).input("lo", &[]);
    assert_eq!(run_time.floats(&[x, Tensor::scalar(3f32)]), [3.0, 3.0, 3.0, 3.0, 4.0]);
    let big = (1i64 << 53) + 1;
    let ints = Draft::new(13, [node("Clip", &["x", "lo"], &["y"])])
        .input_of("x", DType::S64, &[1])
        .constant("lo", Tensor::scalar(big));
    assert_eq!(ints.run(&[i64s(&[5])])[0], i64s(&[big]));
    Draft::new(11, [node("Clip", &["x"], &["y"]).with(float("min", 1.0))]).input("x", &[5]).refused("`min`");
}

#[test]
fn functions_of_two_broadcast_from_an_axis_before_opset_7() {
    let add = |dims: &[usize], values: &[f32], attributes: &[AttributeProto]| {
        let n = attributes.iter().cloned().fold(node("Add", &["x", "b"], &["y"]), NodeProto::with);
        Draft::new(6, [n]).input("x", &[2, 2, 2]).constant("b", of(dims, values))
    };
    let zeros = || [of(&[2, 2, 2], &[0f32; 8])];
    let (broadcasts, axis) = (int("broadcast", 1), |a| int("axis", a));
    let with = |a: i64| [broadcasts.clone(), axis(a)];
    let one = std::slice::from_ref(&broadcasts);
    assert_eq!(add(&[2], &[1., 2.], one).floats(&zeros()), [1., 2., 1., 2., 1., 2., 1., 2.]);
    assert_eq!(add(&[2], &[1., 2.], &with(0)).floats(&zeros()), [1., 1., 1., 1., 2., 2., 2., 2.]);
    assert_eq!(add(&[2], &[1., 2.], &with(-2)).floats(&zeros()), [1., 1., 2., 2., 1., 1., 2., 2.]);
    assert_eq!(add(&[1], &[3.], &with(0)).floats(&zeros()), [3.; 8]);
    add(&[2], &[1., 2.], &[]).refused("`broadcast`");
    add(&[2, 2], &[0.; 4], &with(2)).refused("broadcast");
    add(&[3], &[0.; 3], one).refused("broadcast");
    Draft { opset: 7, ..add(&[2], &[1., 2.], one) }.refused("`broadcast`");

    let prelu = |opset| {
        Draft::new(opset, [node("PRelu", &["x", "s"], &["y"])])
            .input("x", &[1, 3, 2])
            .constant("s", of(&[3], &[1f32, 2., 3.]))
    };
    assert_eq!(prelu(6).floats(&[of(&[1, 3, 2], &[-1f32; 6])]), [-1., -1., -2., -2., -3., -3.]);
    prelu(7).refused("slope");
}

#[test]
fn what_attributes_of_the_first_opsets_said() {
    let floats = |n: NodeProto, opset| {
        let x = of(&[1, 1, 1, 2], &[1f32, 2.]);
        Draft::new(opset, [n]).input("x", &[1, 1, 1, 2]).floats(&[x])
    };
    let reshape = node("Reshape", &["x"], &["y"]).with(ints("shape", [2, 0]));
    assert_eq!(floats(reshape.with(ints("consumed_inputs", [0])), 1), [1., 2.]);
    let pad = node("Pad", &["x"], &["y"]).with(ints("paddings", [0, 0, 0, 1, 0, 0, 0, 0]));
    assert_eq!(floats(pad, 1), [0., 1., 2.]);
    let upsample = node("Upsample", &["x"], &["y"]).with(float("height_scale", 1.0));
    assert_eq!(floats(upsample.with(float("width_scale", 2.0)), 1), [1., 1., 2., 2.]);
    let to = |name: &str| node("Cast", &["x"], &["y"]).with(string("to", name));
    assert_eq!(floats(to("FLOAT"), 1), [1., 2.]);
    Draft::new(1, [to("COMPLEX64")]).input("x", &[1]).refused("COMPLEX64");
    let relu = node("Relu", &["x"], &["y"]).with(ints("consumed_inputs", [0]));
    assert_eq!(floats(relu.clone(), 5), [1., 2.]);
    Draft::new(6, [relu]).input("x", &[1]).refused("consumed_inputs");
}

#[test]
fn softmax_counts_as_a_matrix_before_opset_13() {
    let x = iota(&[2, 2, 2]);
    let at = |opset| {
        Draft::new(opset, [node("Softmax", &["x"], &["y"])])
            .input("x", &[2, 2, 2])
            .floats(std::slice::from_ref(&x))
    };
    let sums = |y: &[f32], n: usize| y.chunks(n).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    assert!(sums(&at(12), 4), "axis 1 to the end");
    assert!(sums(&at(13), 2), "axis -1 only");
    assert!(!sums(&at(12), 2));
}

#[test]
fn layer_normalisations_are_their_steps() {
    let layer = |axis: i64, inputs: &[&str], outputs: &[&str]| {
        let n = node("LayerNormalization", inputs, outputs).with(float("epsilon", 0.25));
        let n = n.with(int("axis", axis)).with(int("stash_type", 1));
        Draft::new(17, [n]).input("x", &[1, 2, 2]).constant("s", of(&[2], &[1f32, 2.0]))
    };
    let x = of(&[1, 2, 2], &[1f32, 3.0, 5.0, 5.0]);
    // Means 2 and 5, variances 1 and 0.
    let d = 1.25f32.sqrt();
    let plain = layer(-1, &["x", "s"], &["y"]);
    assert_eq!(plain.floats(std::slice::from_ref(&x)), [-1.0 / d, 2.0 / d, 0.0, 0.0]);
    let shifted = layer(2, &["x", "s", "b"], &["y"]).constant("b", of(&[2], &[10f32, 20.0]));
    assert_eq!(shifted.floats(std::slice::from_ref(&x)), [10.0 - 1.0 / d, 20.0 + 2.0 / d, 10.0, 20.0]);
    // Over two axes: mean 3.5, variance 2.75.
    let d = 3f32.sqrt();
    let both = layer(1, &["x", "s"], &["y"]);
    assert_eq!(both.floats(std::slice::from_ref(&x)), [-2.5 / d, -0.5 / d * 2.0, 1.5 / d, 1.5 / d * 2.0]);
    layer(3, &["x", "s"], &["y"]).refused("`axis`");
    let statistics = layer(-1, &["x", "s"], &["y", "m", "d"]).outputs(&["y", "m", "d"]).run(&[x]);
    assert_eq!(statistics[1], of(&[1, 2, 1], &[2f32, 5.0]));
    assert_eq!(statistics[2], of(&[1, 2, 1], &[1.0 / 1.25f32.sqrt(), 2.0]));
}

#[test]
fn axes_of_squeeze_and_unsqueeze_move_to_operands_at_13() {
    for (op, dims, axes, expected) in [
        ("Squeeze", &[1usize, 3, 1][..], [0i64, -1], &[3usize][..]),
        ("Unsqueeze", &[3], [0, -1], &[1, 3, 1]),
    ] {
        let old = Draft::new(11, [node(op, &["x"], &["y"]).with(list("axes", &axes))]).input("x", dims);
        let new = Draft::new(13, [node(op, &["x", "a"], &["y"])]).input("x", dims).constant("a", i64s(&axes));
        for d in [&old, &new] {
            assert_eq!(d.run(&[iota(dims)])[0].shape().dims(), expected, "{op}");
        }
        Draft { opset: 13, ..old }.refused("`axes`");
        Draft { opset: 11, ..new }.refused(if op == "Squeeze" { "operand 1" } else { "`axes` is missing" });
    }
    let all = Draft::new(13, [node("Squeeze", &["x"], &["y"])]).input("x", &[1, 3, 1]);
    assert_eq!(all.run(&[iota(&[1, 3, 1])])[0].shape().dims(), [3]);
    Draft::new(11, [node("Squeeze", &["x"], &["y"]).with(list("axes", &[1]))])
        .input("x", &[1, 3])
        .refused("not of length 1");
}

#[test]
fn axes_of_reductions() {
    let x = iota(&[2, 3]);
    let draft = |opset, op: &str, extra: Vec<AttributeProto>| {
        let mut n = node(op, &["x"], &["y"]).with(int("keepdims", 0));
        n.attribute.extend(extra);
        Draft::new(opset, [n]).input("x", &[2, 3])
    };
    let run = |d: Draft| d.floats(std::slice::from_ref(&x));
    assert_eq!(run(draft(11, "ReduceSum", vec![list("axes", &[1])])), [3.0, 12.0]);
    assert_eq!(run(draft(17, "ReduceMean", vec![list("axes", &[-2])])), [1.5, 2.5, 3.5]);
    assert_eq!(run(draft(13, "ReduceSum", vec![])), [15.0]);
    let noop = vec![int("noop_with_empty_axes", 1)];
    assert_eq!(run(draft(18, "ReduceSumSquare", noop)), [0.0, 1.0, 4.0, 9.0, 16.0, 25.0]);
    let operand = Draft::new(18, [node("ReduceMax", &["x", "a"], &["y"])]).constant("a", i64s(&[0]));
    assert_eq!(operand.input("x", &[2, 3]).floats(std::slice::from_ref(&x)), [3.0, 4.0, 5.0]);
    draft(18, "ReduceMax", vec![list("axes", &[0])]).refused("`axes`");
    draft(17, "ReduceMax", vec![list("axes", &[2])]).refused("has 2");
    draft(17, "ReduceMax", vec![list("axes", &[0, -2])]).refused("twice");
}

#[test]
fn split_sizes() {
    let x = iota(&[5]);
    let base = |opset, n: NodeProto| Draft::new(opset, [n]).input("x", &[5]).outputs(&["a", "b"]);
    let attribute = base(11, node("Split", &["x"], &["a", "b"]).with(list("split", &[1, 4])));
    let operand = base(13, node("Split", &["x", "s"], &["a", "b"])).constant("s", i64s(&[1, 4]));
    let uneven = base(18, node("Split", &["x"], &["a", "b"]).with(int("num_outputs", 2)));
    for (draft, first) in [(attribute, 1), (operand.clone(), 1), (uneven, 3)] {
        let parts = draft.run(std::slice::from_ref(&x));
        assert_eq!(parts[0].shape().dims(), [first]);
        assert_eq!(parts[1].as_slice::<f32>().unwrap()[0], first as f32);
    }
    base(13, node("Split", &["x"], &["a", "b"])).refused("equal parts");
    base(18, node("Split", &["x"], &["a", "b"]).with(int("num_outputs", 3))).refused("num_outputs");
    let mut wrong = operand;
    wrong.constants[0].1 = i64s(&[1, 3]);
    wrong.refused("sizes [1, 3]");
}

#[test]
fn slices_of_exporters() {
    let x = iota(&[6]);
    let old =
        Draft::new(9, [node("Slice", &["x"], &["y"]).with(list("starts", &[1])).with(list("ends", &[-1]))]);
    assert_eq!(old.input("x", &[6]).floats(std::slice::from_ref(&x)), [1.0, 2.0, 3.0, 4.0]);
    let slice = |start, end, step| {
        Draft::new(13, [node("Slice", &["x", "s", "e", "a", "t"], &["y"])])
            .input("x", &[6])
            .constant("s", i64s(&[start]))
            .constant("e", i64s(&[end]))
            .constant("a", i64s(&[-1]))
            .constant("t", i64s(&[step]))
    };
    for (start, end, step, expected) in [
        (4, i64::MAX, 1, &[4.0, 5.0][..]),
        (-1, i64::MIN, -1, &[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]),
        (i64::MAX, i64::MIN, -2, &[5.0, 3.0, 1.0]),
        (i64::MIN, i64::MAX, 4, &[0.0, 4.0]),
        (-3, -5, -1, &[3.0, 2.0]),
        (3, 3, 1, &[]),
        (1, 5, i64::MAX, &[1.0]),
        (4, 1, i64::MIN, &[4.0]),
        (-100, i64::MIN, -1, &[0.0]),
    ] {
        assert_eq!(
            slice(start, end, step).floats(std::slice::from_ref(&x)),
            expected,
            "{start} {end} {step}"
        );
    }
    slice(0, 1, 0).refused("step is 0");
}

#[test]
fn pads_of_all_versions() {
    let x = iota(&[2, 3]);
    let with = |opset, inputs: &[&str]| Draft::new(opset, [node("Pad", inputs, &["y"])]).input("x", &[2, 3]);
    let old = Draft::new(
        10,
        [node("Pad", &["x"], &["y"]).with(list("pads", &[0, 1, 0, 0])).with(float("value", 9.0))],
    );
    let expected = [9.0, 0.0, 1.0, 2.0, 9.0, 3.0, 4.0, 5.0];
    assert_eq!(old.input("x", &[2, 3]).floats(std::slice::from_ref(&x)), expected);
    let new =
        with(11, &["x", "p", "v"]).constant("p", i64s(&[0, 1, 0, 0])).constant("v", Tensor::scalar(9f32));
    assert_eq!(new.floats(std::slice::from_ref(&x)), expected);
    let axes = with(18, &["x", "p", "", "a"]).constant("p", i64s(&[-1, 1])).constant("a", i64s(&[-1]));
    assert_eq!(axes.floats(std::slice::from_ref(&x)), [1.0, 2.0, 0.0, 4.0, 5.0, 0.0]);
    let mut wrap = with(19, &["x", "p"]).constant("p", i64s(&[0, 1, 0, 0]));
    wrap.nodes[0].attribute.push(string("mode", "wrap"));
    assert_eq!(wrap.floats(std::slice::from_ref(&x)), [2.0, 0.0, 1.0, 2.0, 5.0, 3.0, 4.0, 5.0]);
    Draft { opset: 18, ..wrap }.refused("wrap");
    with(18, &["x", "p"]).constant("p", i64s(&[0, -4, 0, 0])).refused("cut more");
    with(18, &["x", "p"]).constant("p", i64s(&[0, 1])).refused("2 entries for 2 axes");
    let f64_fill = with(18, &["x", "p", "v"]).constant("p", i64s(&[0, 1, 0, 0]));
    f64_fill.constant("v", Tensor::scalar(9f64)).refused("f64");
}

#[test]
fn dropout_is_the_identity() {
    for opset in [7, 10, 12, 22] {
        let d = Draft::new(opset, [node("Dropout", &["x"], &["y", "mask"])]).input("x", &[3]);
        assert_eq!(d.run(&[iota(&[3])])[0], iota(&[3]), "opset {opset}");
        let mask = &d.outputs(&["y", "mask"]).run(&[iota(&[3])])[1];
        assert_eq!(mask.dtype() == DType::Bool, opset >= 10);
        assert!(mask.to_i64().is_none_or(|m| m == [1, 1, 1]));
    }
    let training = Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![1]).unwrap();
    // In training mode half of the elements are 0, and the others twice as large.
    let d = Draft::new(12, [node("Dropout", &["x", "", "t"], &["y"]).with(int("seed", 1))]);
    let y = d.input("x", &[64]).constant("t", training).floats(&[of(&[64], &[1f32; 64])]);
    assert!(y.iter().all(|&y| y == 0.0 || y == 2.0));
    assert!((16..48).contains(&y.iter().filter(|&&y| y == 0.0).count()), "{y:?}");
}

#[test]
fn batch_normalization_in_training_uses_the_statistics_of_the_batch() {
    let draft = |opset, attribute: Option<AttributeProto>| {
        let mut n = node("BatchNormalization", &["x", "s", "b", "m", "v"], &["y"]);
        n.attribute.extend(attribute);
        let mut d = Draft::new(opset, [n]).input("x", &[1, 2, 1, 1]);
        for name in ["s", "b", "m", "v"] {
            d = d.constant(name, of(&[2], &[1f32, 2.0]));
        }
        d
    };
    assert!(draft(7, None).import().is_ok());
    assert!(draft(8, Some(int("spatial", 1))).import().is_ok());
    draft(8, Some(int("spatial", 0))).refused("`spatial`");
    draft(9, Some(int("spatial", 1))).refused("`spatial`");
    let mut trained = draft(14, Some(int("training_mode", 1))).outputs(&["y", "mean"]);
    trained.nodes[0].output.push("mean".into());
    let results = trained.run(&[of(&[1, 2, 1, 1], &[5f32, 7.0])]);
    // Alone in its channel, an element is its mean: the bias is left. The mean moves by a tenth of the way.
    assert_eq!(results[0], of(&[1, 2, 1, 1], &[1f32, 2.0]));
    let mean = results[1].to_f32().unwrap();
    assert!((mean[0] - 1.4).abs() < 1e-6 && (mean[1] - 2.5).abs() < 1e-6, "{mean:?}");
    let mut statistics = draft(9, None).outputs(&["y", "mean"]);
    statistics.nodes[0].output.push("mean".into());
    statistics.refused("training");
}

#[test]
fn reshape_copies_and_infers() {
    let draft = |opset, target: &[i64]| {
        Draft::new(opset, [node("Reshape", &["x", "s"], &["y"])])
            .input("x", &[2, 3, 4])
            .constant("s", i64s(target))
    };
    let dims = |d: Draft| d.run(&[iota(&[2, 3, 4])])[0].shape().to_vec();
    assert_eq!(dims(draft(13, &[0, -1])), [2, 12]);
    assert_eq!(dims(draft(13, &[4, 0, -1])), [4, 3, 2]);
    draft(13, &[-1, -1]).refused("more than one -1");
    draft(13, &[5, -1]).refused("no whole number");
    draft(13, &[2, 3, 4, 0]).refused("not there");
    draft(13, &[-2, 3]).refused("negative");
    let mut zero = draft(14, &[0, 3]);
    zero.nodes[0].attribute.push(int("allowzero", 1));
    zero.refused("elements");
    zero.inputs[0].1 = TensorType::f32(&[0, 3]).unwrap();
    assert_eq!(zero.run(&[iota(&[0, 3])])[0].shape().dims(), [0, 3]);
}

#[test]
fn flatten_axes() {
    let draft = |opset, axis| {
        Draft::new(opset, [node("Flatten", &["x"], &["y"]).with(int("axis", axis))]).input("x", &[2, 3, 4])
    };
    let dims = |d: Draft| d.run(&[iota(&[2, 3, 4])])[0].shape().to_vec();
    assert_eq!(dims(draft(9, 0)), [1, 24]);
    assert_eq!(dims(draft(9, 3)), [24, 1]);
    assert_eq!(dims(draft(11, -1)), [6, 4]);
    draft(9, -1).refused("axis");
    draft(11, 4).refused("axis");
}

/// The definition, for comparison.
fn gemm(a: &[f32], b: &[f32], c: f32, alpha: f32, beta: f32) -> Vec<f32> {
    let at = |i: usize, j: usize| (0..2).map(|k| a[i * 2 + k] * b[k * 3 + j]).sum::<f32>() * alpha + beta * c;
    (0..2).flat_map(|i| (0..3).map(move |j| (i, j))).map(|(i, j)| at(i, j)).collect()
}

#[test]
fn gemm_factors_transposes_and_biases() {
    let (a, b) = ([1f32, 2.0, 3.0, 4.0], [1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let (a_t, b_t) = ([1f32, 3.0, 2.0, 4.0], [1f32, 4.0, 2.0, 5.0, 3.0, 6.0]);
    for trans_b in [false, true] {
        for constant_b in [false, true] {
            for dims in [&[][..], &[1], &[3], &[1, 3], &[2, 1], &[2, 3]] {
                let n = node("Gemm", &["a", "b", "c"], &["y"])
                    .with(float("alpha", 0.5))
                    .with(float("beta", 2.0))
                    .with(int("transA", 1))
                    .with(int("transB", trans_b.into()));
                let b = if trans_b { of(&[3, 2], &b_t) } else { of(&[2, 3], &b) };
                let c = of(dims, &vec![7f32; dims.iter().product()]);
                let mut d = Draft::new(13, [n]).input("a", &[2, 2]).constant("c", c);
                let mut inputs = vec![of(&[2, 2], &a_t)];
                if constant_b {
                    d = d.constant("b", b);
                } else {
                    d = d.input("b", b.shape());
                    inputs.push(b);
                }
                let what = format!("trans {trans_b} constant {constant_b} bias {dims:?}");
                assert_eq!(
                    d.floats(&inputs),
                    gemm(&a, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 7.0, 0.5, 2.0),
                    "{what}"
                );
                if constant_b && dims != [2, 1] && dims != [2, 3] {
                    assert_eq!(ops(&d.import().unwrap()), ["Transpose", "MatMul"], "{what}");
                }
            }
        }
    }
    Draft::new(13, [node("Gemm", &["a", "b", "c"], &["y"])])
        .input("a", &[2, 2])
        .constant("b", of(&[2, 3], &b))
        .constant("c", iota(&[5, 3]))
        .refused("broadcast");
}

#[test]
fn matmul_of_vectors() {
    for (a, b, expected) in [
        (&[3][..], &[3][..], &[][..]),
        (&[2, 3], &[3], &[2]),
        (&[3], &[3, 4], &[4]),
        (&[3], &[5, 3, 4], &[5, 4]),
        (&[5, 2, 3], &[3], &[5, 2]),
        (&[5, 1, 2, 3], &[4, 3, 2], &[5, 4, 2, 2]),
    ] {
        let d = Draft::new(13, [node("MatMul", &["a", "b"], &["y"])]).input("a", a).input("b", b);
        assert_eq!(d.run(&[iota(a), iota(b)])[0].shape().dims(), expected, "{a:?} {b:?}");
    }
    Draft::new(13, [node("MatMul", &["a", "b"], &["y"])]).input("a", &[2, 3]).input("b", &[4]).refused("3");
}

#[test]
fn same_padding_puts_the_odd_element_at_either_end() {
    let draft = |pad: &str| {
        let n = node("Conv", &["x", "w"], &["y"]).with(string("auto_pad", pad)).with(list("strides", &[2]));
        Draft::new(11, [n]).input("x", &[1, 1, 4]).constant("w", of(&[1, 1, 3], &[1f32, 10.0, 100.0]))
    };
    let x = of(&[1, 1, 4], &[1f32, 2.0, 3.0, 4.0]);
    assert_eq!(draft("SAME_UPPER").floats(std::slice::from_ref(&x)), [321.0, 43.0]);
    assert_eq!(draft("SAME_LOWER").floats(std::slice::from_ref(&x)), [210.0, 432.0]);
    assert_eq!(draft("VALID").floats(std::slice::from_ref(&x)), [321.0]);
    draft("SOMEHOW").refused("SOMEHOW");
    let mut both = draft("SAME_UPPER");
    both.nodes[0].attribute.push(list("pads", &[1, 0]));
    both.refused("auto_pad");
}

#[test]
fn pools() {
    let x = iota(&[1, 1, 4]);
    let pool = |opset, op: &str, more: Vec<AttributeProto>| {
        let mut n = node(op, &["x"], &["y"]).with(list("kernel_shape", &[2]));
        n.attribute.extend(more);
        Draft::new(opset, [n]).input("x", &[1, 1, 4])
    };
    let run = |d: Draft| d.floats(std::slice::from_ref(&x));
    assert_eq!(run(pool(12, "MaxPool", vec![list("dilations", &[2])])), [2.0, 3.0]);
    let padded = vec![list("pads", &[1, 0]), list("strides", &[2])];
    assert_eq!(run(pool(11, "AveragePool", padded.clone())), [0.0, 1.5]);
    let counted = [padded, vec![int("count_include_pad", 1), int("ceil_mode", 1)]].concat();
    assert_eq!(run(pool(11, "AveragePool", counted.clone())), [0.0, 1.5, 3.0]);
    pool(9, "AveragePool", counted).refused("`ceil_mode`");
    pool(18, "AveragePool", vec![list("dilations", &[2])]).refused("`dilations`");
    pool(11, "MaxPool", vec![list("strides", &[0])]).refused("stride 0");
    let mut indices = pool(12, "MaxPool", vec![]).outputs(&["y", "i"]);
    indices.nodes[0].output.push("i".into());
    assert_eq!(indices.run(std::slice::from_ref(&x))[1], of(&[1, 1, 3], &[1i64, 2, 3]));
    for op in ["GlobalMaxPool", "GlobalAveragePool"] {
        let d = Draft::new(8, [node(op, &["x"], &["y"])]).input("x", &[1, 1, 4]);
        assert_eq!(d.floats(std::slice::from_ref(&x)), [if op == "GlobalMaxPool" { 3.0 } else { 1.5 }]);
    }
}

#[test]
fn shape_arithmetic_folds() {
    // What exporters write for `x.view(x.shape[0], -1)`.
    let d = Draft::new(
        13,
        [
            node("Shape", &["x"], &["shape"]),
            node("Gather", &["shape", "zero"], &["n"]),
            node("Unsqueeze", &["n", "axes"], &["n1"]),
            node("Concat", &["n1", "rest"], &["target"]).with(int("axis", 0)),
            node("Reshape", &["x", "target"], &["y"]),
        ],
    )
    .input("x", &[2, 3, 4])
    .constant("zero", Tensor::scalar(0i64))
    .constant("axes", i64s(&[0]))
    .constant("rest", i64s(&[-1]));
    let g = d.import().unwrap();
    assert_eq!(ops(&g), ["Reshape"]);
    assert_eq!(g.len(), 2, "nothing dead is left");
    assert_eq!((g.stage, g.shape(g.outputs()[0].value).dims()), (Stage::Float, &[2, 12][..]));

    let part = |start, end| {
        let n = node("Shape", &["x"], &["y"]).with(int("start", start)).with(int("end", end));
        Draft::new(15, [n]).input("x", &[2, 3, 4]).run(&[iota(&[2, 3, 4])])[0].to_i64().unwrap()
    };
    assert_eq!(part(1, 3), [3, 4]);
    assert_eq!(part(-1, i64::MAX), [4]);
    assert_eq!(part(2, 1), [] as [i64; 0]);
    let filled = node("ConstantOfShape", &["s"], &["y"]).with(tensor_attribute("value", &of(&[1], &[7i64])));
    assert_eq!(Draft::new(9, [filled]).constant("s", i64s(&[2])).run(&[])[0], i64s(&[7, 7]));
}

fn tensor_attribute(name: &str, value: &Tensor) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        type_: onnx_protobuf::attribute_proto::AttributeType::TENSOR.into(),
        t: Some(tensor("", value)).into(),
        ..Default::default()
    }
}

#[test]
fn a_shape_from_an_input_is_refused_unless_it_is_bound() {
    let d = Draft::new(13, [node("Reshape", &["x", "s"], &["y"])]).input("x", &[4]).input_of(
        "s",
        DType::S64,
        &[2],
    );
    d.refused("must be known at compile time");
    let bindings = Bindings { values: [("s".to_owned(), i64s(&[2, -1]))].into(), ..Bindings::default() };
    let model = Model::parse(d.proto().write_to_bytes().unwrap()).unwrap();
    let g = model.graph(&bindings).unwrap();
    assert_eq!(g.inputs().len(), 1);
    assert_eq!(g.shape(g.outputs()[0].value).dims(), [2, 2]);
}

#[test]
fn large_constants_are_not_folded() {
    let d = Draft::new(13, [node("Expand", &["c", "s"], &["y"])])
        .constant("c", Tensor::scalar(1f32))
        .constant("s", i64s(&[1 << 14, 1 << 14]));
    assert_eq!(ops(&d.import().unwrap()), ["Expand"]);
    let small = Draft { constants: vec![d.constants[0].clone(), ("s".into(), i64s(&[2]))], ..d };
    assert_eq!(ops(&small.import().unwrap()), [] as [&str; 0]);
}

#[test]
fn many_folded_constants_run_out_of_budget() {
    // Each is below the limit of one; together they would take 2 GiB.
    let n = 128;
    let nodes = (0..n).map(|i| node("Expand", &["c", "s"], &[&format!("e{i}")]));
    let names: Vec<String> = (0..n).map(|i| format!("e{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let d = Draft::new(13, nodes)
        .constant("c", Tensor::scalar(1f32))
        .constant("s", i64s(&[1 << 22]))
        .outputs(&names);
    let g = d.import().unwrap();
    let folded = g
        .nodes()
        .filter(|(_, n)| matches!(n.kind(), Kind::Constant(_)))
        .map(|(id, _)| g.ty(id.out()).bytes());
    assert!(folded.sum::<usize>() <= crate::limits::MAX_FOLDED_BYTES + 1024);
    assert!(ops(&g).len() > n / 2);
}

#[test]
fn tile_and_gather() {
    let d =
        Draft::new(13, [node("Tile", &["x", "r"], &["y"])]).input("x", &[1, 2]).constant("r", i64s(&[2, 2]));
    assert_eq!(d.floats(&[iota(&[1, 2])]), [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    let mut bomb = d;
    bomb.constants[0].1 = i64s(&[1 << 40, 1 << 40]);
    bomb.refused("y_node");
    let gather = |i: i64| {
        Draft::new(11, [node("Gather", &["x", "i"], &["y"])])
            .input("x", &[3])
            .constant("i", Tensor::scalar(i))
    };
    assert_eq!(gather(-1).floats(&[iota(&[3])]), [2.0]);
    gather(3).refused("index 3");
}

#[test]
fn powers_of_mixed_types() {
    let d = Draft::new(12, [node("Pow", &["x", "e"], &["y"])]);
    let float = d.clone().input("x", &[3]).constant("e", Tensor::scalar(2i64));
    assert_eq!(float.floats(&[iota(&[3])]), [0.0, 1.0, 4.0]);
    let int = d.input_of("x", DType::S64, &[2]).constant("e", Tensor::scalar(0.5f32));
    assert_eq!(int.run(&[i64s(&[9, 17])])[0], i64s(&[3, 4]));
}

#[test]
fn n_ary_ops() {
    for (op, expected) in [("Sum", 6.0), ("Max", 3.0), ("Min", 1.0), ("Mean", 2.0)] {
        let d = Draft::new(13, [node(op, &["x", "a", "b"], &["y"])])
            .input("x", &[1])
            .constant("a", of(&[1], &[2f32]))
            .constant("b", of(&[1], &[3f32]));
        assert_eq!(d.floats(&[of(&[1], &[1f32])]), [expected], "{op}");
        let one = Draft::new(13, [node(op, &["x"], &["y"])]).input("x", &[1]);
        assert_eq!(one.floats(&[of(&[1], &[5f32])]), [5.0], "{op}");
    }
}

#[test]
fn an_initializer_that_is_an_input_is_a_constant() {
    let mut d = Draft::new(9, [node("Add", &["x", "w"], &["y"])]).input("x", &[1]).input("w", &[1]);
    assert_eq!(d.import().unwrap().inputs().len(), 2);
    d = d.constant("w", of(&[1], &[3f32]));
    assert_eq!(d.floats(&[of(&[1], &[1f32])]), [4.0]);
    d.inputs[1].1 = TensorType::f32(&[2]).unwrap();
    d.refused("input `w`");
}

// ---- quantization

fn dequantize(codes: Tensor, scale: Tensor, zero: Option<Tensor>) -> Draft {
    let inputs: &[&str] = if zero.is_some() { &["q", "s", "z"] } else { &["q", "s"] };
    let mut d =
        Draft::new(21, [node("DequantizeLinear", inputs, &["y"]).with(int("axis", 0))]).constant("q", codes);
    d = d.constant("s", scale);
    match zero {
        Some(z) => d.constant("z", z),
        None => d,
    }
}

#[test]
fn quantized_weights_keep_their_integers() {
    let d = dequantize(of(&[2, 2], &[1i8, -2, 3, -4]), of(&[2], &[0.5f32, 2.0]), Some(of(&[2], &[0i8, 1])));
    let g = d.import().unwrap();
    assert_eq!(ops(&g), ["Dequantize"]);
    let codes = g.find("q").unwrap();
    let grid = g.ty(codes.out()).quant.clone().unwrap();
    assert_eq!((grid.axis(), grid.scales(), grid.zero_points()), (Some(0), &[0.5, 2.0][..], &[0, 1][..]));
    assert_eq!(g.constant_value(codes.out()), Some(&of(&[2, 2], &[1i8, -2, 3, -4])));
    assert_eq!(d.floats(&[]), [0.5, -1.0, 4.0, -10.0]);
}

#[test]
fn grids_of_weights_are_checked() {
    let w = || of(&[2, 2], &[1i8, 2, 3, 4]);
    let scalar = |s: f32| Tensor::scalar(s);
    for bad in [0.0, -0.5, f32::NAN, f32::INFINITY] {
        dequantize(w(), scalar(bad), None).refused("finite number above 0");
    }
    dequantize(w(), scalar(1.0), Some(Tensor::scalar(1u8))).refused("zero point is u8");
    dequantize(w(), of(&[3], &[1f32; 3]), None).refused("3 scales for axis 0");
    dequantize(w(), of(&[2], &[1f32; 2]), Some(of(&[3], &[0i8; 3]))).refused("zero points");
    dequantize(w(), of(&[2, 1], &[1f32; 2]), None).refused("blocks");
    let mut axis = dequantize(w(), of(&[2], &[1f32; 2]), None);
    axis.nodes[0].attribute[0] = int("axis", 2);
    axis.refused("`axis`");
    axis.nodes[0].attribute[0] = int("block_size", -1);
    axis.refused("block_size");
    dequantize(of(&[1], &[1f32]), scalar(1.0), None).refused("f32 cannot hold");
}

#[test]
fn four_bit_weights_are_unpacked() {
    let codes = Tensor::from_vec_as::<i8>(DType::S4, Shape::new([3]).unwrap(), vec![7, -8, -1]).unwrap();
    assert_eq!(dequantize(codes, Tensor::scalar(0.5f32), None).floats(&[]), [3.5, -4.0, -0.5]);
}

#[test]
fn pairs_of_quantize_and_dequantize_share_a_grid() {
    let pair = |zero: u8| {
        Draft::new(
            13,
            [
                node("QuantizeLinear", &["x", "s", "z"], &["q"]),
                node("Relu", &["x"], &["unused"]),
                node("DequantizeLinear", &["q", "s", "z2"], &["y"]),
            ],
        )
        .input("x", &[3])
        .constant("s", Tensor::scalar(0.5f32))
        .constant("z", Tensor::scalar(10u8))
        .constant("z2", Tensor::scalar(zero))
    };
    assert_eq!(ops(&pair(10).import().unwrap()), ["Quantize", "Dequantize"]);
    assert_eq!(ops(&pair(9).import().unwrap()), ["Quantize", "AssumeGrid", "Dequantize"]);
    let x = of(&[3], &[-100f32, 0.3, 1.0]);
    assert_eq!(pair(10).floats(std::slice::from_ref(&x)), [-5.0, 0.5, 1.0]);
    assert_eq!(pair(9).floats(&[x]), [-4.5, 1.0, 1.5]);
}

#[test]
fn integers_of_a_grid_are_plain_to_other_ops() {
    let d = Draft::new(
        13,
        [
            node("QuantizeLinear", &["x", "s"], &["q"]),
            node("Transpose", &["q"], &["t"]),
            node("Add", &["t", "t"], &["y"]),
        ],
    )
    .input("x", &[1, 2])
    .constant("s", Tensor::scalar(0.5f32));
    let y = d.run(&[of(&[1, 2], &[1f32, 2.0])]);
    assert_eq!(y[0], of(&[2, 1], &[4u8, 8]));
    assert_eq!(ops(&d.import().unwrap()), ["Quantize", "Transpose", "AssumeGrid", "AssumeGrid", "Binary"]);
}

#[test]
fn a_grid_pad_is_given_as_a_code() {
    let d = Draft::new(
        13,
        [
            node("QuantizeLinear", &["x", "s", "z"], &["q"]),
            node("Pad", &["q", "p", "z"], &["r"]),
            node("DequantizeLinear", &["r", "s", "z"], &["y"]),
        ],
    )
    .input("x", &[1])
    .constant("s", Tensor::scalar(0.5f32))
    .constant("z", Tensor::scalar(7u8))
    .constant("p", i64s(&[1, 0]));
    assert_eq!(d.floats(&[of(&[1], &[3f32])]), [0.0, 3.0]);
    assert_eq!(ops(&d.import().unwrap()), ["Quantize", "Pad", "Dequantize"]);
}

#[test]
fn resizes() {
    let x = iota(&[1, 1, 4]);
    let run = |d: Draft| d.floats(std::slice::from_ref(&x));
    let up = |opset, op: &str, inputs: &[&str], more: Vec<AttributeProto>| {
        let mut n = node(op, inputs, &["y"]);
        n.attribute.extend(more);
        Draft::new(opset, [n])
            .input("x", &[1, 1, 4])
            .constant("scales", of(&[3], &[1f32, 1.0, 2.0]))
            .constant("half", of(&[1], &[0.5f32]))
            .constant("sizes", i64s(&[1, 1, 2]))
            .constant("roi", of::<f32>(&[0], &[]))
    };
    let twice = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0];
    assert_eq!(run(up(9, "Upsample", &["x", "scales"], vec![])), twice);
    assert_eq!(run(up(10, "Resize", &["x", "scales"], vec![])), twice);
    assert_eq!(run(up(13, "Resize", &["x", "roi", "scales"], vec![])), twice);
    let linear = string("mode", "linear");
    assert_eq!(run(up(13, "Resize", &["x", "", "", "sizes"], vec![linear.clone()])), [0.5, 2.5]);
    let axes = list("axes", &[-1]);
    assert_eq!(run(up(18, "Resize", &["x", "", "half"], vec![linear.clone(), axes.clone()])), [0.5, 2.5]);
    let corners = string("coordinate_transformation_mode", "align_corners");
    assert_eq!(run(up(13, "Resize", &["x", "", "", "sizes"], vec![linear, corners])), [0.0, 3.0]);
    // Nothing changes: the operand itself.
    let same = up(13, "Resize", &["x", "", "", "same"], vec![]).constant("same", i64s(&[1, 1, 4]));
    assert_eq!(run(same), [0.0, 1.0, 2.0, 3.0]);

    up(13, "Resize", &["x"], vec![]).refused("scales or sizes");
    up(13, "Resize", &["x", "", "half"], vec![axes]).refused("opset 18");
    up(13, "Resize", &["x", "", "half"], vec![]).refused("1 scales for 3 axes");
    up(13, "Resize", &["x", "", "scales", "sizes"], vec![]).refused("both scales and sizes");
    up(13, "Resize", &["x", "", "scales"], vec![string("mode", "lanczos")]).refused("`lanczos`");
    up(19, "Resize", &["x", "", "", "sizes"], vec![string("keep_aspect_ratio_policy", "no")]).refused("`no`");
    let huge = up(13, "Resize", &["x", "", "huge"], vec![]).constant("huge", of(&[3], &[1f32, 1.0, 1e30]));
    huge.refused("resampled");
    let negative = up(13, "Resize", &["x", "", "neg"], vec![]).constant("neg", of(&[3], &[1f32, 1.0, -2.0]));
    negative.refused("scale -2");
}
