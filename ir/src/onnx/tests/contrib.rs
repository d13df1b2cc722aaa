//! Ops that no CPU kernel of ONNX Runtime checks, and those of values that are no tensors.

use super::*;
use crate::onnx::{
    Form, Value,
    export::proto::{float, int, string},
};

pub(super) fn microsoft(name: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { domain: "com.microsoft".into(), ..node(name, inputs, outputs) }
}

/// The results for operands that are constants.
fn fold(n: NodeProto, constants: &[(&str, Tensor)]) -> Vec<Tensor> {
    let outputs = n.output.clone();
    let mut d = Draft { outputs, ..Draft::new(20, [n]) }.with_microsoft();
    for (name, t) in constants {
        d = d.constant(name, t.clone());
    }
    interpreter::run(&d.import().unwrap(), &[]).unwrap()
}

#[track_caller]
fn close(got: &Tensor, expected: &[f32]) {
    let got = got.to_f32().unwrap();
    assert_eq!(got.len(), expected.len());
    for (g, e) in got.iter().zip(expected) {
        assert!((g - e).abs() < 1e-5, "{got:?} instead of {expected:?}");
    }
}

#[test]
fn inverses_times_their_matrices_are_one() {
    let x = of(&[2, 2, 2], &[0f32, 2.0, 4.0, 1.0, 2.0, 1.0, 1.0, 1.0]);
    let y = fold(microsoft("Inverse", &["x"], &["y"]), &[("x", x)]);
    close(&y[0], &[-0.125, 0.25, 0.5, 0.0, 1.0, -1.0, -1.0, 2.0]);
}

#[test]
fn distances_fall_into_buckets_as_in_t5() {
    let n = microsoft("RelativePositionBias", &["t", "q", "k"], &["y"])
        .with(int("max_distance", 16))
        .with(int("is_bidirectional", 1));
    // One head; the number of a bucket is its own.
    let table = of(&[8, 1], &[0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let y = fold(n, &[("t", table), ("q", Tensor::scalar(2i64)), ("k", Tensor::scalar(7i64))]);
    assert_eq!(y[0].shape().dims(), [1, 1, 2, 7]);
    // Half of 8 for each direction, half of these exact.
    close(&y[0], &[0.0, 5.0, 6.0, 6.0, 6.0, 6.0, 7.0, 1.0, 0.0, 5.0, 6.0, 6.0, 6.0, 6.0]);
}

#[test]
fn group_norms_of_channels_last_have_a_mean_and_a_deviation_a_group() {
    let n = microsoft("GroupNorm", &["x", "g", "b"], &["y"])
        .with(int("groups", 2))
        .with(int("activation", 0))
        .with(float("epsilon", 0.0));
    let x = of(&[1, 1, 1, 4], &[1f32, 3.0, 10.0, 30.0]);
    let (g, b) = (of(&[4], &[1f32, 1.0, 2.0, 2.0]), of(&[4], &[0f32, 0.5, 0.0, 0.0]));
    close(&fold(n, &[("x", x), ("g", g), ("b", b)])[0], &[-1.0, 1.5, -2.0, 2.0]);
}

#[test]
fn spectra_and_signals_are_each_others_transforms() {
    let x = of(&[1, 4], &[1f32, 2.0, -1.0, 3.0]);
    let y = fold(microsoft("Rfft", &["x"], &["y"]).with(int("signal_ndim", 1)), &[("x", x)]);
    close(&y[0], &[5.0, 0.0, 2.0, 1.0, -5.0, 0.0]);
    let x = fold(microsoft("Irfft", &["y"], &["x"]).with(int("signal_ndim", 1)), &[("y", y[0].clone())]);
    close(&x[0], &[1.0, 2.0, -1.0, 3.0]);
}

#[test]
fn what_generates_text_is_refused_with_a_reason() {
    let n = microsoft("GreedySearch", &["x"], &["y"]);
    Draft::new(20, [n]).with_microsoft().input_of("x", DType::S32, &[1, 3]).refused("choose tokens");
}

#[test]
fn what_has_no_form_here_says_what_to_do_instead() {
    let refusals = [
        ("AttnLSTM", "write it out"),
        ("BifurcationDetector", "choose tokens"),
        ("GatherPacked", "MatMulNBits"),
        ("MatMulFpQ4", "MatMulNBits"),
        ("SparseAttention", "GroupQueryAttention"),
        ("SparseToDenseMatMul", "MatMul"),
    ];
    for (op, advice) in refusals {
        let n = microsoft(op, &["x"], &["y"]);
        Draft::new(20, [n]).with_microsoft().input_of("x", DType::F32, &[1, 3]).refused(advice);
    }
}

/// ONNX Runtime's kernel reads beyond the weights; this is what the op is defined as.
#[test]
fn weights_of_4_bits_may_stand_as_they_are_in_the_file() {
    let n = microsoft("MatMulBnb4", &["a", "b", "m"], &["y"])
        .with(int("K", 3))
        .with(int("N", 2))
        .with(int("block_size", 4))
        .with(int("quant_type", 0))
        .with(int("transB", 0));
    // 1, ½, −1, −½ in the first block and ⅔, ⅙ in the second, whose factor is 6: [[1, ½, −1], [−½, 4, 1]].
    let a = of(&[1, 2], &[2f32, 1.0]);
    let codes = of(&[3], &[0x35u8, 0xbd, 0x26]);
    let y = fold(n, &[("a", a), ("b", codes), ("m", of(&[2], &[1f32, 6.0]))]);
    close(&y[0], &[1.5, 5.0, -1.0]);
}

#[test]
fn integers_of_16_bits_without_a_sign_have_products_without_one() {
    let n = microsoft("MatMulInteger16", &["a", "b"], &["y"]);
    let y = fold(n, &[("a", of(&[1, 1], &[60_000u16])), ("b", of(&[1, 1], &[60_000u16]))]);
    assert_eq!(y[0].as_slice::<u32>().unwrap(), [3_600_000_000]);
}

/// Of three layouts of the same gates ONNX Runtime's CPU kernel has one, against which `goldens/ops.zip` checks it.
#[test]
fn gates_of_experts_may_stand_apart_between_or_before_the_others() {
    let (gates, others) = ([[1f32, 2.0], [3.0, -1.0]], [[0.5f32, 1.0], [-2.0, 1.5]]);
    let fused = |order: [[f32; 2]; 4]| of(&[1, 4, 2], &order.concat());
    let mixture = |fusion, first: Tensor, third: Option<Tensor>| {
        let names = ["x", "r", "w1", "", "w2", "", "w3"];
        let n = microsoft("MoE", &names[..if third.is_some() { 7 } else { 5 }], &["y"])
            .with(string("activation_type", "swiglu"))
            .with(int("swiglu_fusion", fusion));
        let mut constants = vec![
            ("x", of(&[2, 2], &[1f32, -1.0, 0.5, 2.0])),
            ("r", of(&[2, 1], &[0f32, 1.0])),
            ("w1", first),
            ("w2", of(&[1, 2, 2], &[1f32, 0.0, 0.0, 1.0])),
        ];
        constants.extend(third.map(|t| ("w3", t)));
        fold(n, &constants).swap_remove(0).to_f32().unwrap()
    };
    let [g, l] = [gates, others];
    let interleaved = mixture(1, fused([g[0], l[0], g[1], l[1]]), None);
    assert_eq!(mixture(2, fused([g[0], g[1], l[0], l[1]]), None), interleaved);
    let apart = |rows: [[f32; 2]; 2]| of(&[1, 2, 2], &rows.concat());
    assert_eq!(mixture(0, apart(g), Some(apart(l))), interleaved);
    let swish = |x: f32| x / (1.0 + (-x).exp());
    close(
        &of(&[4], &interleaved),
        &[swish(-1.0) * -0.5, swish(4.0) * -3.5, swish(4.5) * 2.25, swish(-0.5) * 2.0],
    );
}

#[test]
fn what_does_not_fit_experts_and_tables_of_codes_is_refused() {
    let mixture = |scales: &[usize], bits| {
        let n = microsoft("QMoE", &["x", "r", "w", "s", "", "w", "s"], &["y"])
            .with(int("expert_weight_bits", bits));
        let codes = Tensor::zeros(DType::U8, Shape::new([2, 4, 2]).unwrap());
        let scales = Tensor::zeros(DType::F32, Shape::new(scales).unwrap());
        Draft::new(20, [n])
            .with_microsoft()
            .input_of("x", DType::F32, &[3, 4])
            .input_of("r", DType::F32, &[3, 2])
            .constant("w", codes)
            .constant("s", scales)
    };
    mixture(&[2, 4], 4).import().unwrap();
    mixture(&[2, 5], 4).refused("scales");
    mixture(&[2, 4], 3).refused("2, 4 and 8");
    let rows = |axis| {
        let n = microsoft("GatherBlockQuantized", &["d", "i", "s"], &["y"]).with(int("quantize_axis", axis));
        Draft::new(20, [n])
            .with_microsoft()
            .input_of("i", DType::S64, &[3])
            .constant("d", Tensor::zeros(DType::U8, Shape::new([5, 4]).unwrap()))
            .constant("s", Tensor::zeros(DType::F32, Shape::new([5, 1]).unwrap()))
    };
    rows(1).import().unwrap();
    rows(0).refused("share bytes");
}

#[test]
fn random_numbers_are_those_of_numpy() {
    // numpy.random.RandomState(7).uniform(size=3), randn(3)
    let n = |op: &str| node(op, &[], &["y"]).with(list("shape", &[3])).with(float("seed", 7.0));
    let run = |op: &str| Draft::new(20, [n(op)]).floats(&[]);
    let [uniform, normal] = ["RandomUniform", "RandomNormal"].map(run);
    let near = |a: &[f32], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near(&uniform, [0.076_308_29, 0.779_918_8, 0.438_409_23]), "{uniform:?}");
    assert!(near(&normal, [1.690_525_7, -0.465_937_37, 0.032_820_16]), "{normal:?}");
}

#[test]
fn sequences_are_tensors_of_the_graph() {
    let nodes = [
        node("SequenceConstruct", &["a", "b"], &["s"]),
        node("SequenceErase", &["s", "first"], &["rest"]),
        node("SequenceInsert", &["rest", "a"], &["both"]),
        node("SequenceLength", &["both"], &["n"]),
        node("ConcatFromSequence", &["both"], &["y"]).with(int("axis", 0)),
    ];
    let d = Draft::new(13, nodes).input("a", &[1]).input("b", &[2]).constant("first", Tensor::scalar(0i64));
    let d = d.outputs(&["y", "n"]);
    let results = d.run(&[of(&[1], &[1f32]), of(&[2], &[2f32, 3.0])]);
    assert_eq!(results, [of(&[3], &[2f32, 3.0, 1.0]), Tensor::scalar(2i64)]);
    d.clone().outputs(&["both"]).refused("`both` is no tensor");
    let beyond = node("SequenceAt", &["s", "at"], &["y"]);
    let d = Draft::new(13, [node("SequenceConstruct", &["a"], &["s"]), beyond]).input("a", &[1]);
    d.constant("at", Tensor::scalar(1i64)).refused("position 1 of 1");
}

#[test]
fn texts_have_equal_numbers_where_they_are_equal() {
    let n = node("Identity", &["x"], &["y"]).with(string("note", "red"));
    let bytes = Draft::new(13, [n]).input("x", &[1]).proto().write_to_bytes().unwrap();
    let model = Model::parse(bytes).unwrap();
    let (texts, other) = (model.texts(), model.texts());
    let strings = |all: &[&str]| {
        let shape = Shape::new([all.len()]).unwrap();
        crate::onnx::Strings::new(shape, all.iter().map(|&s| s.into()).collect()).unwrap()
    };
    let all = strings(&["red", "new", "", "new"]);
    let tensor = texts.tensor(&all);
    let numbers = tensor.as_slice::<i64>().unwrap();
    assert!(numbers[0] > 0 && numbers[1] < 0 && numbers[1] == numbers[3] && numbers[2] == 0);
    assert_eq!(texts.strings(&tensor), Some(all.clone()));
    assert_eq!(other.strings(&tensor), None, "another run has other texts");
    let values = [Value::Strings(all), Value::Absent, Value::Sequence(vec![])];
    let (forms, tensors) = texts.flatten(&values).unwrap();
    assert_eq!(forms, [Form::Tensor, Form::Absent, Form::Sequence(0)]);
    assert_eq!(texts.group(&forms, tensors).unwrap(), values);
}
