//! Ops that pick, order and make elements: their attributes and operands at each opset.

use super::*;
use crate::onnx::export::proto::string;

fn bools(dims: &[usize], values: &[u8]) -> Tensor {
    Tensor::from_vec_as(DType::Bool, Shape::new(dims).unwrap(), values.to_vec()).unwrap()
}

/// The results of a node whose operands are all constants.
fn fold(opset: i64, n: NodeProto, constants: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let outputs: Vec<String> = n.output.clone();
    let mut d = Draft { outputs, ..Draft::new(opset, [n]) };
    for (i, t) in constants.iter().enumerate() {
        d = d.constant(&format!("x{i}"), t.clone());
    }
    Ok(interpreter::run(&d.import()?, &[]).unwrap())
}

/// A node of `n` operands and one result.
fn op(name: &str, n: usize) -> NodeProto {
    let inputs: Vec<String> = (0..n).map(|i| format!("x{i}")).collect();
    node(name, &inputs.iter().map(String::as_str).collect::<Vec<_>>(), &["y"])
}

#[track_caller]
fn gives(opset: i64, n: NodeProto, constants: &[Tensor], expected: Tensor) {
    assert_eq!(fold(opset, n, constants), Ok(vec![expected]));
}

#[track_caller]
fn fails(opset: i64, n: NodeProto, constants: &[Tensor], word: &str) {
    let e = fold(opset, n, constants).unwrap_err();
    assert!(e.contains(word), "{e:?} does not say {word:?}");
}

#[test]
fn top_k_has_had_three_forms() {
    let x = of(&[1, 4], &[1f32, 4.0, 3.0, 4.0]);
    let n = |inputs: &[&str]| node("TopK", inputs, &["v", "i"]);
    let attribute = n(&["x0"]).with(int("k", 2));
    let expected = |v: [f32; 2], i: [i64; 2]| Ok(vec![of(&[1, 2], &v), of(&[1, 2], &i)]);
    assert_eq!(fold(9, attribute.clone(), std::slice::from_ref(&x)), expected([4.0, 4.0], [1, 3]));
    fails(10, attribute, std::slice::from_ref(&x), "`k`");
    let operand = n(&["x0", "x1"]).with(int("axis", 1));
    assert_eq!(fold(10, operand.clone(), &[x.clone(), i64s(&[2])]), expected([4.0, 4.0], [1, 3]));
    fails(10, operand.clone().with(int("largest", 0)), &[x.clone(), i64s(&[2])], "`largest`");
    let least = operand.with(int("largest", 0)).with(int("sorted", 0));
    assert_eq!(fold(11, least.clone(), &[x.clone(), i64s(&[2])]), expected([1.0, 3.0], [0, 2]));
    fails(11, least.clone(), &[x.clone(), i64s(&[5])], "the top 5");
    fails(11, least, &[x, i64s(&[-1])], "negative");
}

#[test]
fn extremes_may_be_the_last_from_opset_12() {
    let x = of(&[3], &[2f32, 1.0, 2.0]);
    gives(7, op("ArgMax", 1), std::slice::from_ref(&x), i64s(&[0]));
    let last = op("ArgMax", 1).with(int("select_last_index", 1)).with(int("keepdims", 0));
    gives(12, last.clone(), std::slice::from_ref(&x), Tensor::scalar(2i64));
    fails(11, last, std::slice::from_ref(&x), "`select_last_index`");
    gives(13, op("ArgMin", 1).with(int("axis", -1)), &[x], i64s(&[1]));
}

#[test]
fn scatters_learned_to_reduce() {
    let operands = [of(&[3], &[1i32, 2, 3]), i64s(&[1, 1]), of(&[2], &[5i32, 4])];
    let with = |name: &str, reduction: &str| op(name, 3).with(string("reduction", reduction));
    gives(9, op("Scatter", 3).with(int("axis", 0)), &operands, of(&[3], &[1i32, 4, 3]));
    gives(11, op("ScatterElements", 3), &operands, of(&[3], &[1i32, 4, 3]));
    gives(16, with("ScatterElements", "add"), &operands, of(&[3], &[1i32, 11, 3]));
    gives(18, with("ScatterElements", "max"), &operands, of(&[3], &[1i32, 5, 3]));
    fails(16, with("ScatterElements", "max"), &operands, "\"max\" at opset 16");
    fails(13, with("ScatterElements", "add"), &operands, "`reduction`");
    let tuples = [operands[0].clone(), of(&[2, 1], &[1i64, 1]), operands[2].clone()];
    gives(18, with("ScatterND", "mul"), &tuples, of(&[3], &[1i32, 40, 3]));
    let gathered = op("GatherND", 2).with(int("batch_dims", 1));
    let pair = [of(&[2, 2], &[1i32, 2, 3, 4]), of(&[2, 1], &[1i64, 0])];
    gives(12, gathered.clone(), &pair, of(&[2], &[2i32, 3]));
    fails(11, gathered, &pair, "`batch_dims`");
}

#[test]
fn caches_are_written_from_an_index_on() {
    let cache = of(&[2, 3, 1], &[0i32; 6]);
    let update = of(&[2, 2, 1], &[1i32, 2, 3, 4]);
    let n = op("TensorScatter", 3).with(int("axis", 1));
    let linear = of(&[2, 3, 1], &[0i32, 1, 2, 3, 4, 0]);
    gives(24, n.clone(), &[cache.clone(), update.clone(), i64s(&[1, 0])], linear);
    let around = n.clone().with(string("mode", "circular"));
    let circular = of(&[2, 3, 1], &[2i32, 0, 1, 3, 4, 0]);
    gives(24, around, &[cache.clone(), update.clone(), i64s(&[2, 0])], circular);
    gives(
        24,
        op("TensorScatter", 2),
        &[cache.clone(), update.clone()],
        of(&[2, 3, 1], &[1i32, 2, 0, 3, 4, 0]),
    );
    fails(24, n, &[cache.clone(), update.clone(), i64s(&[2, 0])], "out of range");
    fails(24, op("TensorScatter", 2).with(int("axis", 0)), &[cache, update], "axis 0");
}

#[test]
fn sequences_are_reversed_up_to_their_length() {
    let x = of(&[3, 2], &[1i32, 2, 3, 4, 5, 6]);
    gives(10, op("ReverseSequence", 2), &[x.clone(), i64s(&[3, 2])], of(&[3, 2], &[5i32, 4, 3, 2, 1, 6]));
    let rows = op("ReverseSequence", 2).with(int("batch_axis", 0)).with(int("time_axis", 1));
    gives(10, rows, &[x.clone(), i64s(&[2, 1, 0])], of(&[3, 2], &[2i32, 1, 3, 4, 5, 6]));
    fails(10, op("ReverseSequence", 2).with(int("batch_axis", 0)), &[x, i64s(&[3, 2])], "`time_axis` 0");
}

#[test]
fn one_hot_counts_from_the_back() {
    let values = of(&[2], &[5i16, 9]);
    let depth = Tensor::scalar(3f32);
    let n = op("OneHot", 3);
    let rows = of(&[3, 3], &[9i16, 5, 5, 5, 5, 9, 5, 5, 5]);
    gives(11, n.clone(), &[i64s(&[0, -1, 3]), depth.clone(), values.clone()], rows);
    let columns = of(&[3, 2], &[5i16, 5, 5, 9, 9, 5]);
    gives(9, n.clone().with(int("axis", 0)), &[of(&[2], &[2f32, 1.0]), i64s(&[3]), values.clone()], columns);
    fails(11, n.clone(), &[i64s(&[0]), i64s(&[-3]), values.clone()], "negative");
    fails(11, n.clone(), &[i64s(&[0]), i64s(&[1 << 39]), values.clone()], "import may make");
    fails(11, n.with(int("axis", 2)), &[i64s(&[0]), i64s(&[3]), values], "`axis`");
}

#[test]
fn totals_run_along_a_known_axis() {
    let x = of(&[3], &[1f64, 2.0, 3.0]);
    let n = op("CumSum", 2).with(int("exclusive", 1)).with(int("reverse", 1));
    gives(14, n.clone(), &[x.clone(), Tensor::scalar(0i32)], of(&[3], &[5f64, 3.0, 0.0]));
    gives(26, op("CumProd", 2), &[x.clone(), i64s(&[-1])], of(&[3], &[1f64, 2.0, 6.0]));
    fails(14, n.clone(), &[x.clone(), i64s(&[1])], "axis [1]");
    fails(14, n, &[x, i64s(&[0, 0])], "axis [0, 0]");
}

#[test]
fn ranges_end_before_their_limit() {
    let range = |parts: [Tensor; 3]| fold(11, op("Range", 3), &parts).map(|mut r| r.remove(0));
    let of_ints = |a: i64, b: i64, c: i64| range([a, b, c].map(Tensor::scalar));
    assert_eq!(of_ints(1, 6, 2), Ok(i64s(&[1, 3, 5])));
    assert_eq!(of_ints(10, 4, -3), Ok(i64s(&[10, 7])));
    assert_eq!(of_ints(1, 1, 1), Ok(i64s(&[])));
    assert_eq!(of_ints(i64::MAX - 1, i64::MAX, 7), Ok(i64s(&[i64::MAX - 1])));
    assert_eq!(of_ints(i64::MIN, i64::MAX, i64::MAX), Ok(i64s(&[i64::MIN, -1, i64::MAX - 1])));
    assert!(of_ints(0, 1, 0).unwrap_err().contains("delta is 0"));
    assert!(of_ints(0, i64::MAX, 1).unwrap_err().contains("2^40"));
    assert!(of_ints(0, 1 << 30, 1).unwrap_err().contains("import may make"));
    let floats = |a: f32, b: f32, c: f32| range([a, b, c].map(Tensor::scalar));
    assert_eq!(floats(0.0, 1.0, 0.4), Ok(of(&[3], &[0f32, 0.4, 0.8])));
    assert_eq!(floats(1.0, -1.0, 3.0), Ok(of::<f32>(&[0], &[])));
    assert!(floats(0.0, f32::INFINITY, 1.0).unwrap_err().contains("steps"));
    assert!(floats(0.0, 1.0, 0.0).unwrap_err().contains("steps"));
    let mixed = [Tensor::scalar(0i64), Tensor::scalar(1i32), Tensor::scalar(1i64)];
    assert!(range(mixed).unwrap_err().contains("one type"));
    let unknown = Draft::new(11, [op("Range", 3)]);
    let unknown = ["x0", "x1", "x2"].iter().fold(unknown, |d, x| d.input_of(x, DType::S64, &[]));
    unknown.refused("x0");
}

#[test]
fn what_is_not_zero() {
    let x = of(&[2, 2], &[1f32, 0.0, f32::NAN, -0.0]);
    gives(13, op("NonZero", 1), &[x], of(&[2, 2], &[0i64, 1, 0, 0]));
    gives(13, op("NonZero", 1), &[Tensor::scalar(3u8)], of::<i64>(&[0, 1], &[]));
    gives(13, op("NonZero", 1), &[of::<i32>(&[0, 3], &[])], of::<i64>(&[2, 0], &[]));
}

#[test]
fn compress_flattens_without_an_axis() {
    let x = of(&[2, 3], &[1i8, 2, 3, 4, 5, 6]);
    let kept = bools(&[3], &[1, 0, 1]);
    gives(11, op("Compress", 2), &[x.clone(), kept.clone()], of(&[2], &[1i8, 3]));
    let columns = op("Compress", 2).with(int("axis", -1));
    gives(11, columns, &[x.clone(), kept.clone()], of(&[2, 2], &[1i8, 3, 4, 6]));
    fails(11, op("Compress", 2).with(int("axis", 0)), &[x.clone(), kept], "condition");
    fails(11, op("Compress", 2), &[x, i64s(&[1])], "condition");
}

#[test]
fn unique_slices_in_both_orders() {
    let n = |outputs: &[&str]| node("Unique", &["x0"], outputs);
    let x = of(&[6], &[2f32, 1.0, 1.0, 3.0, 4.0, 3.0]);
    let all = ["y", "first", "inverse", "counts"];
    let sorted = fold(11, n(&all), std::slice::from_ref(&x)).unwrap();
    assert_eq!(sorted[0], of(&[4], &[1f32, 2.0, 3.0, 4.0]));
    assert_eq!(sorted[1..], [i64s(&[1, 0, 3, 4]), i64s(&[1, 0, 0, 2, 3, 2]), i64s(&[2, 1, 2, 1])]);
    let found = fold(11, n(&all).with(int("sorted", 0)), &[x]).unwrap();
    assert_eq!(found[0], of(&[4], &[2f32, 1.0, 3.0, 4.0]));
    assert_eq!(found[1..], [i64s(&[0, 1, 3, 4]), i64s(&[0, 1, 1, 2, 3, 2]), i64s(&[1, 2, 2, 1])]);
    let rows = of(&[3, 2], &[1u8, 0, 1, 0, 0, 9]);
    let one = fold(11, n(&["y"]).with(int("axis", 0)), std::slice::from_ref(&rows)).unwrap();
    assert_eq!(one, [of(&[2, 2], &[0u8, 9, 1, 0])]);
    let columns = fold(11, n(&["y", "", "i"][..1]).with(int("axis", 1)), &[rows]).unwrap();
    assert_eq!(columns, [of(&[3, 2], &[0u8, 1, 0, 1, 9, 0])]);
}

#[test]
fn triangles_and_diagonals() {
    let x = of(&[2, 3], &[1i64, 2, 3, 4, 5, 6]);
    gives(14, op("Trilu", 1), std::slice::from_ref(&x), of(&[2, 3], &[1i64, 2, 3, 0, 5, 6]));
    let lower = op("Trilu", 2).with(int("upper", 0));
    let shifted = [x.clone(), Tensor::scalar(-1i64)];
    gives(14, lower.clone(), &shifted, of(&[2, 3], &[0i64, 0, 0, 4, 0, 0]));
    gives(14, lower, &[x.clone(), Tensor::scalar(i64::MAX)], x.clone());
    let eye = op("EyeLike", 1).with(int("k", 1)).with(int("dtype", 1));
    gives(9, eye, std::slice::from_ref(&x), of(&[2, 3], &[0f32, 1.0, 0.0, 0.0, 0.0, 1.0]));
    gives(9, op("EyeLike", 1).with(int("k", i64::MIN)), &[x], of(&[2, 3], &[0i64; 6]));
}

#[test]
fn blocks_of_pixels_and_depth() {
    let x = of(&[1, 4, 1, 2], &[0i32, 1, 2, 3, 4, 5, 6, 7]);
    let n = |name: &str| op(name, 1).with(int("blocksize", 2));
    let wide = of(&[1, 1, 2, 4], &[0i32, 2, 1, 3, 4, 6, 5, 7]);
    gives(7, n("DepthToSpace"), std::slice::from_ref(&x), wide.clone());
    gives(13, n("SpaceToDepth"), &[wide], x.clone());
    let deep = of(&[1, 8, 1, 1], &[0i32, 1, 2, 3, 4, 5, 6, 7]);
    let crd = n("DepthToSpace").with(string("mode", "CRD"));
    gives(11, crd, std::slice::from_ref(&deep), of(&[1, 2, 2, 2], &[0i32, 1, 2, 3, 4, 5, 6, 7]));
    gives(11, n("DepthToSpace"), &[deep], of(&[1, 2, 2, 2], &[0i32, 2, 4, 6, 1, 3, 5, 7]));
    fails(13, n("SpaceToDepth"), std::slice::from_ref(&x), "whole blocks");
    fails(13, op("SpaceToDepth", 1).with(int("blocksize", i64::MAX)), &[x], "`blocksize`");
}

#[test]
fn hardmax_counts_as_a_matrix_before_opset_13() {
    let x = of(&[1, 2, 2], &[1f32, 4.0, 4.0, 2.0]);
    gives(12, op("Hardmax", 1), std::slice::from_ref(&x), of(&[1, 2, 2], &[0f32, 1.0, 0.0, 0.0]));
    gives(13, op("Hardmax", 1), &[x], of(&[1, 2, 2], &[0f32, 1.0, 1.0, 0.0]));
}

#[test]
fn the_middle_of_what_is_too_long() {
    let x = of(&[1, 5], &[1i32, 2, 3, 4, 5]);
    let n = op("CenterCropPad", 2);
    let both = of(&[4, 2], &[0i32, 0, 2, 3, 0, 0, 0, 0]);
    gives(18, n.clone(), &[x.clone(), i64s(&[4, 2])], both);
    let one = n.clone().with(list("axes", &[-1]));
    gives(18, one, &[x.clone(), i64s(&[6])], of(&[1, 6], &[1i32, 2, 3, 4, 5, 0]));
    fails(18, n.clone(), &[x.clone(), i64s(&[4])], "axes");
    fails(18, n, &[x, i64s(&[-4, 2])], "negative");
}

#[test]
fn masks_and_slopes() {
    let x = of(&[2], &[f32::NEG_INFINITY, 1.0]);
    gives(10, op("IsInf", 1), std::slice::from_ref(&x), bools(&[2], &[1, 0]));
    gives(10, op("IsInf", 1).with(int("detect_negative", 0)), std::slice::from_ref(&x), bools(&[2], &[0, 0]));
    gives(10, op("IsInf", 1).with(int("detect_positive", 0)), std::slice::from_ref(&x), bools(&[2], &[1, 0]));
    let neither = op("IsInf", 1).with(int("detect_positive", 0)).with(int("detect_negative", 0));
    gives(10, neither, std::slice::from_ref(&x), bools(&[2], &[0, 0]));
    gives(13, op("IsNaN", 1), &[of(&[2], &[f64::NAN, 0.0])], bools(&[2], &[1, 0]));
    fails(13, op("IsNaN", 1), &[i64s(&[1])], "floats");
    gives(16, op("PRelu", 2), &[of(&[2], &[-4f32, 4.0]), of(&[1], &[0.5f32])], of(&[2], &[-2f32, 4.0]));
    fails(16, op("PRelu", 2), &[of(&[1], &[-4f32]), of(&[2], &[0.5f32, 1.0])], "slope");
    fails(13, op("Mod", 2), &[x.clone(), x.clone()], "`fmod`");
    fails(13, op("And", 2), &[i64s(&[1]), i64s(&[1])], "bool");
    fails(18, op("BitwiseAnd", 2), &[bools(&[1], &[1]), bools(&[1], &[1])], "integers");
    gives(18, op("BitwiseNot", 1), &[of(&[2], &[0u16, 5])], of(&[2], &[u16::MAX, u16::MAX - 5]));
    gives(18, op("BitwiseNot", 1), &[of(&[2], &[0i32, 5])], of(&[2], &[-1i32, -6]));
    fails(11, op("BitShift", 2), &[of(&[1], &[1u8]), of(&[1], &[1u8])], "`direction`");
    let shrink = op("Shrink", 1).with(float("lambd", 1.5)).with(float("bias", 1.0));
    gives(9, shrink, &[of(&[4], &[-3i8, -1, 1, 3])], of(&[4], &[-2i8, 0, 0, 2]));
}

#[test]
fn sums_of_products() {
    let run = |equation: &str, operands: &[Tensor]| {
        fold(12, op("Einsum", operands.len()).with(string("equation", equation)), operands)
            .map(|mut r| r.remove(0))
    };
    let (a, b) = (iota(&[2, 3]), iota(&[3, 2]));
    let product = of(&[2, 2], &[10f32, 13.0, 28.0, 40.0]);
    assert_eq!(run("ij,jk->ik", &[a.clone(), b.clone()]), Ok(product.clone()));
    assert_eq!(run(" i j , j k ", &[a.clone(), b.clone()]), Ok(product.clone()));
    assert_eq!(run("...ij,...jk->...ik", &[a.clone(), b.clone()]), Ok(product));
    assert_eq!(run("ij->ji", std::slice::from_ref(&a)), Ok(of(&[3, 2], &[0f32, 3.0, 1.0, 4.0, 2.0, 5.0])));
    assert_eq!(run("ij->", std::slice::from_ref(&a)), Ok(Tensor::scalar(15f32)));
    let square = iota(&[2, 3, 3]);
    assert_eq!(
        run("...ii->...i", std::slice::from_ref(&square)),
        Ok(of(&[2, 3], &[0f32, 4.0, 8.0, 9.0, 13.0, 17.0]))
    );
    assert_eq!(run("bii", std::slice::from_ref(&square)), Ok(of(&[2], &[12f32, 39.0])));
    // One factor after another, an outer product, an axis of length 1 that broadcasts, and integers.
    assert_eq!(run("ij,jk,k->i", &[a.clone(), b, of(&[2], &[1f32, 2.0])]), Ok(of(&[2], &[36f32, 108.0])));
    let (u, v) = (i64s(&[1, 2]), i64s(&[3, 4]));
    assert_eq!(run("i,j->ji", &[u.clone(), v.clone()]), Ok(of(&[2, 2], &[3i64, 6, 4, 8])));
    assert_eq!(run("i,i", &[u, v]), Ok(Tensor::scalar(11i64)));
    let ones = of(&[1, 3], &[1f32, 2.0, 3.0]);
    assert_eq!(
        run("ij,ij->ij", &[a.clone(), ones.clone()]),
        Ok(of(&[2, 3], &[0f32, 2.0, 6.0, 3.0, 8.0, 15.0]))
    );
    assert_eq!(run("ij,ij->j", &[ones, a.clone()]), Ok(of(&[3], &[3f32, 10.0, 21.0])));
    let half = |x: f32| half::f16::from_f32(x);
    let (p, q) = (of(&[2], &[half(1.0), half(3.0)]), of(&[2], &[half(2.0), half(0.5)]));
    assert_eq!(run("i,i->", &[p, q]), Ok(Tensor::scalar(half(3.5))));
    for (equation, word) in [
        ("ij,jk->ik", "2 terms for 1 operands"),
        ("i->i", "does not fit"),
        ("ij->iji", "twice"),
        ("ij->k", "in the result only"),
        ("i%->i", "letters"),
        ("ii->i", "for one label"),
    ] {
        let e = run(equation, std::slice::from_ref(&a)).unwrap_err();
        assert!(e.contains(word), "{equation}: {e}");
    }
}

#[test]
fn products_of_other_types() {
    let (a, b) = (of(&[2], &[3i64, -4]), of(&[2, 1], &[5i64, 1 << 62]));
    gives(13, op("MatMul", 2), &[a, b], i64s(&[15]));
    let (a, b) = (of(&[1, 2], &[3u32, 1 << 31]), of(&[2, 1], &[5u32, 3]));
    gives(9, op("MatMul", 2), &[a, b], of(&[1, 1], &[15u32 + (1 << 31)]));
    let brain = |v: [f32; 2]| of(&[1, 2], &v.map(half::bf16::from_f32));
    let gemm = op("Gemm", 3).with(int("transB", 1)).with(float("alpha", 2.0)).with(float("beta", 0.5));
    let y = of(&[1, 1], &[half::bf16::from_f32(22.5)]);
    gives(13, gemm, &[brain([1.0, 2.0]), brain([3.0, 4.0]), of(&[1], &[half::bf16::from_f32(1.0)])], y);
    let doubles = of(&[1, 1], &[1e200f64]);
    gives(13, op("Gemm", 2), &[doubles.clone(), of(&[1, 1], &[2f64])], of(&[1, 1], &[2e200f64]));
    let ints = of(&[1, 1], &[3i32]);
    let scaled = op("Gemm", 2).with(float("alpha", 0.5));
    fails(13, scaled, &[ints.clone(), ints], "scales s32 by 0.5");
    fails(13, op("MatMul", 2), &[doubles, of(&[1, 1], &[1f32])], "got");
    fails(13, op("MatMul", 2), &[of(&[1, 1], &[1i8]), of(&[1, 1], &[1i8])], "integers of 32");
}

fn codes(dtype: DType, values: &[u8]) -> Tensor {
    Tensor::from_vec_as(dtype, Shape::new([values.len()]).unwrap(), values.to_vec()).unwrap()
}

#[test]
fn floats_of_eight_bits_are_stored_and_converted() {
    let x = of(&[3], &[1f32, -1000.0, f32::NAN]);
    let to = |code: i64| op("Cast", 1).with(int("to", code));
    gives(19, to(17), std::slice::from_ref(&x), codes(DType::F8E4M3Fn, &[0x38, 0xfe, 0x7f]));
    let loose = to(17).with(int("saturate", 0));
    gives(19, loose.clone(), std::slice::from_ref(&x), codes(DType::F8E4M3Fn, &[0x38, 0xff, 0x7f]));
    gives(19, loose, &[i64s(&[1, -1000])], codes(DType::F8E4M3Fn, &[0x38, 0xff]));
    let down = to(24).with(string("round_mode", "down"));
    gives(25, down, &[of(&[2], &[1.9f32, 4.0])], codes(DType::F8E8M0, &[127, 129]));
    fails(25, to(24).with(string("round_mode", "sideways")), std::slice::from_ref(&x), "`round_mode`");
    gives(19, to(1), &[codes(DType::F8E5M2, &[0x3c, 0x7c])], of(&[2], &[1f32, f32::INFINITY]));
    // Moved, but not computed with.
    let small = codes(DType::F4E2M1, &[7, 1]);
    gives(24, op("Transpose", 1), std::slice::from_ref(&small), small.clone());
    let condition = bools(&[2], &[0, 1]);
    gives(
        16,
        op("Where", 3),
        &[condition, small.clone(), codes(DType::F4E2M1, &[5])],
        codes(DType::F4E2M1, &[5, 1]),
    );
    for name in ["Abs", "ArgMax", "ReduceMax", "NonZero"] {
        assert!(fold(13, op(name, 1), std::slice::from_ref(&small)).is_err(), "{name}");
    }
    assert!(fold(13, op("Add", 2), &[small.clone(), small]).is_err());
}

#[test]
fn floats_of_eight_bits_have_scales() {
    let (scale, zero) = (Tensor::scalar(2f32), codes(DType::F8E4M3Fn, &[0]));
    let zero = Tensor::from_vec_as(DType::F8E4M3Fn, Shape::scalar(), zero.bytes().to_vec()).unwrap();
    let x = of(&[2], &[2f32, -10000.0]);
    let small = codes(DType::F8E4M3Fn, &[0x38, 0xfe]);
    gives(19, op("QuantizeLinear", 3), &[x.clone(), scale.clone(), zero.clone()], small.clone());
    let loose = op("QuantizeLinear", 3).with(int("saturate", 0));
    gives(19, loose, &[x, scale.clone(), zero.clone()], codes(DType::F8E4M3Fn, &[0x38, 0xff]));
    gives(19, op("DequantizeLinear", 3), &[small, scale, zero], of(&[2], &[2f32, -896.0]));
}

#[test]
fn softmax_of_doubles() {
    let x = of(&[1, 2], &[0f64, 3f64.ln()]);
    let run = |name: &str| fold(13, op(name, 1), std::slice::from_ref(&x)).unwrap()[0].to_f64();
    let close =
        |got: Vec<f64>, expected: [f64; 2]| got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15);
    assert!(close(run("Softmax"), [0.25, 0.75]), "{:?}", run("Softmax"));
    assert!(close(run("LogSoftmax"), [0.25f64.ln(), 0.75f64.ln()]), "{:?}", run("LogSoftmax"));
}
