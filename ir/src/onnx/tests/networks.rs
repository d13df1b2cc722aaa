//! Ops of networks that are put together from others: attention, normalisations, pools, transposed convolutions.

use super::*;

fn bools(dims: &[usize], elements: &[u8]) -> Tensor {
    Tensor::from_vec_as(DType::Bool, Shape::new(dims).unwrap(), elements.to_vec()).unwrap()
}

/// Numbers that neither repeat nor have a pattern that symmetric mistakes would hide in.
fn wavy(dims: &[usize]) -> Tensor {
    let n = dims.iter().product::<usize>();
    of(dims, &(0..n).map(|i| ((i * i + 3 * i) as f32 * 0.37).sin()).collect::<Vec<_>>())
}

#[track_caller]
fn close(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "element {i}: {a} instead of {b}");
    }
}

/// softmax(q·kᵀ·scale + bias)·v of one head, rows of nothing giving 0.
fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    size: usize,
    scale: f32,
    bias: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let keys = k.len() / size;
    let v_size = v.len() / keys;
    let mut y = vec![];
    for (i, q) in q.chunks(size).enumerate() {
        let score =
            |j: usize| q.iter().zip(&k[j * size..]).map(|(a, b)| a * b).sum::<f32>() * scale + bias(i, j);
        let scores: Vec<f32> = (0..keys).map(score).collect();
        let max = scores.iter().fold(f32::NEG_INFINITY, |m, &s| m.max(s));
        let weights: Vec<f32> =
            scores.iter().map(|s| if max == f32::NEG_INFINITY { 0.0 } else { (s - max).exp() }).collect();
        let sum = weights.iter().sum::<f32>().max(f32::MIN_POSITIVE);
        y.extend((0..v_size).map(|c| (0..keys).map(|j| weights[j] / sum * v[j * v_size + c]).sum::<f32>()));
    }
    y
}

fn slice(t: &Tensor) -> &[f32] {
    t.as_slice().unwrap()
}

#[test]
fn attention_is_its_formula() {
    let (q, k, v) = (wavy(&[1, 1, 2, 4]), wavy(&[1, 1, 3, 4]), wavy(&[1, 1, 3, 5]));
    let draft = |n: NodeProto| {
        Draft::new(23, [n]).input("q", &[1, 1, 2, 4]).input("k", &[1, 1, 3, 4]).input("v", &[1, 1, 3, 5])
    };
    let operands = [q.clone(), k.clone(), v.clone()];
    let plain = draft(node("Attention", &["q", "k", "v"], &["y"])).floats(&operands);
    close(&plain, &attention(slice(&q), slice(&k), slice(&v), 4, 0.5, |_, _| 0.0));
    let causal =
        node("Attention", &["q", "k", "v"], &["y"]).with(int("is_causal", 1)).with(float("scale", 2.0));
    let before = |i: usize, j: usize| if j <= i { 0.0 } else { f32::NEG_INFINITY };
    close(&draft(causal).floats(&operands), &attention(slice(&q), slice(&k), slice(&v), 4, 2.0, before));
}

#[test]
fn rows_without_a_key_give_nothing() {
    let (q, k, v) = (wavy(&[1, 1, 2, 4]), wavy(&[1, 1, 3, 4]), wavy(&[1, 1, 3, 5]));
    let n =
        node("Attention", &["q", "k", "v", "m"], &["y", "", "", "p"]).with(int("qk_matmul_output_mode", 3));
    let draft =
        Draft::new(23, [n]).input("q", &[1, 1, 2, 4]).input("k", &[1, 1, 3, 4]).input("v", &[1, 1, 3, 5]);
    let mask = [0u8, 0, 0, 1, 0, 1];
    let expected = attention(slice(&q), slice(&k), slice(&v), 4, 0.5, |i, j| {
        if mask[3 * i + j] == 1 { 0.0 } else { f32::NEG_INFINITY }
    });
    let mask = bools(&[2, 3], &mask);
    let draft = draft.outputs(&["y", "p"]);
    let known = draft.clone().constant("m", mask.clone()).run(&[q.clone(), k.clone(), v.clone()]);
    let run_time = draft.input_of("m", DType::Bool, &[2, 3]).run(&[q, k, v, mask]);
    assert_eq!(known, run_time);
    close(slice(&known[0]), &expected);
    assert_eq!(slice(&known[1])[..3], [0.0; 3]);
    assert!((slice(&known[1])[3..].iter().sum::<f32>() - 1.0).abs() < 1e-6);
}

#[test]
fn heads_side_by_side_are_heads_and_keys_serve_several_queries() {
    let (q, k, v) = (wavy(&[1, 2, 8]), wavy(&[1, 3, 2]), wavy(&[1, 3, 2]));
    let n =
        node("Attention", &["q", "k", "v"], &["y"]).with(int("q_num_heads", 4)).with(int("kv_num_heads", 1));
    let draft = Draft::new(24, [n]).input("q", &[1, 2, 8]).input("k", &[1, 3, 2]).input("v", &[1, 3, 2]);
    let y = draft.floats(&[q.clone(), k.clone(), v.clone()]);
    for head in 0..4 {
        let own: Vec<f32> = (0..2).flat_map(|i| slice(&q)[i * 8 + head * 2..][..2].to_vec()).collect();
        let expected = attention(&own, slice(&k), slice(&v), 2, 0.5f32.sqrt(), |_, _| 0.0);
        let got: Vec<f32> = (0..2).flat_map(|i| y[i * 8 + head * 2..][..2].to_vec()).collect();
        close(&got, &expected);
    }
    let mut uneven = draft;
    uneven.nodes[0].attribute[0] = int("q_num_heads", 3);
    uneven.refused("3 heads");
    uneven.nodes[0].attribute.remove(0);
    uneven.refused("`q_num_heads` is missing");
}

#[test]
fn the_past_precedes_and_padding_is_not_seen() {
    let (q, k, v) = (wavy(&[1, 1, 2, 4]), wavy(&[1, 1, 2, 4]), wavy(&[1, 1, 2, 3]));
    let (past_k, past_v) = (iota(&[1, 1, 1, 4]), iota(&[1, 1, 1, 3]));
    let n = node("Attention", &["q", "k", "v", "", "pk", "pv"], &["y", "nk", "nv"]).with(int("is_causal", 1));
    let draft = Draft::new(23, [n])
        .input("q", &[1, 1, 2, 4])
        .input("k", &[1, 1, 2, 4])
        .input("v", &[1, 1, 2, 3])
        .constant("pk", past_k.clone())
        .constant("pv", past_v.clone())
        .outputs(&["y", "nk", "nv"]);
    let results = draft.run(&[q.clone(), k.clone(), v.clone()]);
    let joined = |a: &Tensor, b: &Tensor| [slice(a), slice(b)].concat();
    let (all_k, all_v) = (joined(&past_k, &k), joined(&past_v, &v));
    assert_eq!((slice(&results[1]), slice(&results[2])), (&all_k[..], &all_v[..]));
    let visible = |i: usize, j: usize| if j <= i + 1 { 0.0 } else { f32::NEG_INFINITY };
    close(slice(&results[0]), &attention(slice(&q), &all_k, &all_v, 4, 0.5, visible));
    // Two keys of which one is padding: the second query is at its place.
    let n = node("Attention", &["q", "k", "v", "", "", "", "n"], &["y"]).with(int("is_causal", 1));
    let padded =
        Draft::new(24, [n]).input("q", &[1, 1, 2, 4]).input("k", &[1, 1, 2, 4]).input("v", &[1, 1, 2, 3]);
    let padded = padded.input_of("n", DType::S64, &[1]).floats(&[q, k, v.clone(), i64s(&[1])]);
    assert_eq!(padded[..3], [0.0; 3], "no key is at or before place -1");
    close(&padded[3..], &slice(&v)[..3]);
}

#[test]
fn pairs_are_turned_by_their_angles() {
    let x = of(&[1, 1, 1, 6], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let (cos, sin) = (of(&[2, 2], &[9f32, 9.0, 0.0, 0.5]), of(&[2, 2], &[9f32, 9.0, 1.0, 2.0]));
    let draft = |interleaved| {
        let n = node("RotaryEmbedding", &["x", "c", "s", "p"], &["y"]).with(int("rotary_embedding_dim", 4));
        Draft::new(23, [n.with(int("interleaved", interleaved))])
            .input("x", &[1, 1, 1, 6])
            .constant("c", cos.clone())
            .constant("s", sin.clone())
            .constant("p", of(&[1, 1], &[1i64]))
    };
    let run = |d: Draft| d.floats(std::slice::from_ref(&x));
    assert_eq!(run(draft(0)), [-3.0, 0.5 * 2.0 - 2.0 * 4.0, 1.0, 2.0 * 2.0 + 0.5 * 4.0, 5.0, 6.0]);
    assert_eq!(run(draft(1)), [-2.0, 1.0, 0.5 * 3.0 - 2.0 * 4.0, 2.0 * 3.0 + 0.5 * 4.0, 5.0, 6.0]);
    let mut odd = draft(0);
    odd.nodes[0].attribute[0] = int("rotary_embedding_dim", 3);
    odd.refused("in pairs");
}

/// One dimension of a transposed convolution.
#[derive(Clone, Copy, Debug)]
struct Spread {
    input: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pads: (usize, usize),
    output_padding: usize,
}

impl Spread {
    fn output(&self) -> usize {
        let span = (self.kernel - 1) * self.dilation + 1;
        self.stride * (self.input - 1) + self.output_padding + span - self.pads.0 - self.pads.1
    }
}

/// Each element of the operand times the kernel, added where it belongs: how ONNX defines it.
fn scattered(
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    groups: usize,
    channels: usize,
    [a, b]: [Spread; 2],
) -> Vec<f32> {
    let per_group = w.len() / (channels * a.kernel * b.kernel);
    let (rows, columns) = (a.output(), b.output());
    let outputs = groups * per_group;
    let mut y: Vec<f32> = (0..outputs * rows * columns).map(|i| bias[i / (rows * columns)]).collect();
    for c in 0..channels {
        for (i, j) in (0..a.input).flat_map(|i| (0..b.input).map(move |j| (i, j))) {
            for (o, k, l) in (0..per_group)
                .flat_map(|o| (0..a.kernel).flat_map(move |k| (0..b.kernel).map(move |l| (o, k, l))))
            {
                let row = (i * a.stride + k * a.dilation).checked_sub(a.pads.0).filter(|&r| r < rows);
                let column = (j * b.stride + l * b.dilation).checked_sub(b.pads.0).filter(|&c| c < columns);
                let (Some(row), Some(column)) = (row, column) else { continue };
                let channel = c / (channels / groups) * per_group + o;
                y[(channel * rows + row) * columns + column] += x[(c * a.input + i) * b.input + j]
                    * w[((c * per_group + o) * a.kernel + k) * b.kernel + l];
            }
        }
    }
    y
}

#[test]
fn transposed_convolutions_scatter_their_kernel() {
    let spread = |input, kernel, stride, dilation, pads, output_padding| Spread {
        input,
        kernel,
        stride,
        dilation,
        pads,
        output_padding,
    };
    let cases = [
        (1, [spread(3, 2, 2, 1, (0, 0), 0), spread(4, 2, 2, 1, (0, 0), 0)]),
        (1, [spread(3, 4, 2, 1, (1, 1), 0), spread(2, 3, 2, 1, (1, 0), 1)]),
        (2, [spread(3, 3, 1, 2, (1, 2), 0), spread(1, 1, 3, 1, (0, 0), 2)]),
        (2, [spread(2, 3, 3, 2, (4, 2), 1), spread(5, 2, 2, 3, (0, 1), 1)]),
        (1, [spread(6, 2, 1, 1, (3, 3), 0), spread(4, 5, 4, 1, (7, 0), 3)]),
    ];
    for (groups, axes) in cases {
        let [a, b] = axes;
        let x = wavy(&[1, 4, a.input, b.input]);
        let w = wavy(&[4, 3, a.kernel, b.kernel]);
        let bias = iota(&[3 * groups]);
        let of = |f: fn(&Spread) -> usize| [f(&a) as i64, f(&b) as i64];
        let pads = [a.pads.0 as i64, b.pads.0 as i64, a.pads.1 as i64, b.pads.1 as i64];
        let n = node("ConvTranspose", &["x", "w", "b"], &["y"])
            .with(int("group", groups as i64))
            .with(list("strides", &of(|s| s.stride)))
            .with(list("dilations", &of(|s| s.dilation)))
            .with(list("pads", &pads))
            .with(list("output_padding", &of(|s| s.output_padding)));
        let expected = scattered(slice(&x), slice(&w), slice(&bias), groups, 4, axes);
        let draft = Draft::new(11, [n]).input("x", x.shape()).constant("b", bias);
        let known = draft.clone().constant("w", w.clone()).run(std::slice::from_ref(&x));
        assert_eq!(known[0].shape().dims(), [1, 3 * groups, a.output(), b.output()], "{axes:?}");
        close(slice(&known[0]), &expected);
        close(&draft.input("w", w.shape()).floats(&[x, w]), &expected);
    }
}

#[test]
fn extents_of_transposed_convolutions() {
    let draft = |more: Vec<AttributeProto>| {
        let mut n = node("ConvTranspose", &["x", "w"], &["y"]).with(list("strides", &[2]));
        n.attribute.extend(more);
        Draft::new(11, [n]).input("x", &[1, 1, 3]).constant("w", of(&[1, 1, 3], &[1f32, 10.0, 100.0]))
    };
    let x = of(&[1, 1, 3], &[1f32, 2.0, 3.0]);
    let run = |more| draft(more).floats(std::slice::from_ref(&x));
    let whole = [1.0, 10.0, 102.0, 20.0, 203.0, 30.0, 300.0];
    assert_eq!(run(vec![]), whole);
    assert_eq!(run(vec![string("auto_pad", "VALID")]), whole);
    assert_eq!(run(vec![string("auto_pad", "SAME_UPPER")]), whole[..6]);
    assert_eq!(run(vec![string("auto_pad", "SAME_LOWER")]), whole[1..]);
    assert_eq!(run(vec![list("output_shape", &[5])]), whole[1..6]);
    assert_eq!(run(vec![list("output_shape", &[8])]), [&whole[..], &[0.0]].concat());
    draft(vec![list("output_shape", &[0])]).refused("leaves nothing");
    draft(vec![list("pads", &[4, 4])]).refused("leaves nothing");
    draft(vec![list("kernel_shape", &[2])]).refused("`kernel_shape`");
    draft(vec![list("strides", &[1 << 40])]).refused("strides");
    draft(vec![list("output_padding", &[1 << 40])]).refused("out of range");
    draft(vec![int("group", 3)]).refused("3 groups");
}

#[test]
fn places_of_the_largest_elements() {
    let x = of(&[1, 2, 2, 3], &[1f32, 5.0, 5.0, 2.0, 0.0, 9.0, 7.0, f32::NAN, 1.0, 8.0, 0.0, f32::NAN]);
    let places = |order| {
        let n = node("MaxPool", &["x"], &["y", "i"]).with(list("kernel_shape", &[2, 2]));
        let d = Draft::new(12, [n.with(int("storage_order", order))]).input("x", &[1, 2, 2, 3]);
        d.outputs(&["i"]).run(std::slice::from_ref(&x)).remove(0)
    };
    assert_eq!(places(0), of(&[1, 2, 1, 2], &[1i64, 5, 7, 7]));
    assert_eq!(places(1), of(&[1, 2, 1, 2], &[2i64, 5, 8, 8]));
}

#[test]
fn lp_pools_are_norms_of_their_windows() {
    let x = of(&[1, 1, 3], &[3f32, -4.0, 12.0]);
    let pool = |opset, op: &str, more: Vec<AttributeProto>| {
        let mut n = node(op, &["x"], &["y"]);
        n.attribute.extend(more);
        Draft::new(opset, [n]).input("x", &[1, 1, 3])
    };
    let run = |d: Draft| d.floats(std::slice::from_ref(&x));
    let two = || list("kernel_shape", &[2]);
    close(&run(pool(11, "LpPool", vec![two()])), &[5.0, 160f32.sqrt()]);
    close(&run(pool(11, "LpPool", vec![two(), int("p", 1), list("pads", &[1, 0])])), &[3.0, 7.0, 16.0]);
    let ceil = vec![two(), int("p", 3), int("ceil_mode", 1), list("strides", &[2])];
    close(&run(pool(18, "LpPool", ceil.clone())), &[91f32.cbrt(), 12.0]);
    close(&run(pool(7, "GlobalLpPool", vec![])), &[13.0]);
    close(&run(pool(7, "GlobalLpPool", vec![int("p", 1)])), &[19.0]);
    pool(11, "LpPool", ceil).refused("`ceil_mode`");
    pool(11, "LpPool", vec![two(), int("p", 0)]).refused("`p` is 0");
}

#[test]
fn normalisations_of_groups_and_channels() {
    let x = of(&[1, 4, 1], &[1f32, 3.0, -2.0, 2.0]);
    // Groups of channels: means 2 and 0, variances 1 and 4.
    let group = |opset, scale: &[f32], bias: &[f32]| {
        let n = node("GroupNormalization", &["x", "s", "b"], &["y"]).with(float("epsilon", 0.0));
        Draft::new(opset, [n.with(int("num_groups", 2))])
            .input("x", &[1, 4, 1])
            .constant("s", of(&[scale.len()], scale))
            .constant("b", of(&[bias.len()], bias))
    };
    let by_group = group(18, &[2.0, 3.0], &[10.0, 20.0]);
    assert_eq!(by_group.floats(std::slice::from_ref(&x)), [8.0, 12.0, 17.0, 23.0]);
    let by_channel = group(21, &[1.0, 2.0, 3.0, 4.0], &[0.0, 0.0, 0.0, 1.0]);
    assert_eq!(by_channel.floats(std::slice::from_ref(&x)), [-1.0, 2.0, -3.0, 5.0]);
    group(21, &[1.0, 2.0], &[0.0, 0.0]).refused("one number a channel");
    let x = of(&[1, 2, 2], slice(&x));
    let n = node("InstanceNormalization", &["x", "s", "b"], &["y"]).with(float("epsilon", 0.0));
    let instance = Draft::new(7, [n]).input("x", &[1, 2, 2]).constant("s", of(&[2], &[2f32, 3.0]));
    let instance = instance.constant("b", of(&[2], &[10f32, 20.0]));
    assert_eq!(instance.floats(std::slice::from_ref(&x)), [8.0, 12.0, 17.0, 23.0]);
    let n = node("MeanVarianceNormalization", &["x"], &["y"]).with(list("axes", &[0, -1]));
    let y = Draft::new(13, [n]).input("x", &[1, 2, 2]).floats(std::slice::from_ref(&x));
    close(&y, &[-1.0, 1.0, -1.0, 1.0]);
    let rms = Draft::new(23, [node("RMSNormalization", &["x", "s"], &["y"]).with(float("epsilon", 0.0))]);
    let rms = rms.input("x", &[1, 2, 2]).constant("s", of(&[2], &[1f32, 10.0]));
    close(&rms.floats(&[x]), &[1.0 / 5f32.sqrt(), 30.0 / 5f32.sqrt(), -1.0, 10.0]);
}

#[test]
fn norms_of_nothing_are_no_division() {
    let n = |p| node("LpNormalization", &["x"], &["y"]).with(int("p", p));
    let run = |p| Draft::new(7, [n(p)]).input("x", &[2, 2]).floats(&[of(&[2, 2], &[3f32, -4.0, 0.0, 0.0])]);
    assert_eq!(run(2), [0.6, -0.8, 0.0, 0.0]);
    assert_eq!(run(1), [3.0 / 7.0, -4.0 / 7.0, 0.0, 0.0]);
    Draft::new(7, [n(3)]).input("x", &[2, 2]).refused("neither 1 nor 2");
}

#[test]
fn narrow_floats_are_summed_in_f32_and_rounded_once() {
    let half = |x: f32| half::f16::from_f32(x);
    // 2048 + 1 + 1 + 1 in f16 stays 2048 when each sum is rounded.
    let d = Draft::new(13, [node("MatMul", &["x", "w"], &["y"])])
        .input_of("x", DType::F16, &[1, 4])
        .constant("w", of(&[4, 1], &[half(1.0); 4]));
    let x = of(&[1, 4], &[half(2048.0), half(1.0), half(1.0), half(1.0)]);
    assert_eq!(d.run(&[x])[0], of(&[1, 1], &[half(2052.0)]));
}

#[test]
fn losses_count_what_is_not_ignored() {
    let x = of(&[3, 2], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let loss = |more: Vec<AttributeProto>, inputs: &[&str]| {
        let mut n = node("NegativeLogLikelihoodLoss", inputs, &["y"]);
        n.attribute.extend(more);
        Draft::new(13, [n])
            .input("x", &[3, 2])
            .constant("t", i64s(&[1, -1, 0]))
            .constant("w", of(&[2], &[10f32, 100.0]))
            .floats(std::slice::from_ref(&x))
    };
    let ignore = || int("ignore_index", -1);
    assert_eq!(loss(vec![ignore(), string("reduction", "none")], &["x", "t"]), [-2.0, 0.0, -5.0]);
    assert_eq!(loss(vec![ignore(), string("reduction", "sum")], &["x", "t", "w"]), [-250.0]);
    assert_eq!(loss(vec![ignore()], &["x", "t"]), [-3.5]);
    assert_eq!(loss(vec![ignore()], &["x", "t", "w"]), [-250.0 / 110.0]);
    let n = node("SoftmaxCrossEntropyLoss", &["x", "t"], &["y", "p"]);
    let both = Draft::new(13, [n]).input("x", &[3, 2]).constant("t", i64s(&[1, 1, 0])).outputs(&["y", "p"]);
    let results = both.run(std::slice::from_ref(&x));
    let near = (1.0 + (-1f32).exp()).ln();
    close(slice(&results[0]), &[(near + near + near + 1.0) / 3.0]);
    close(slice(&results[1]), &[-near - 1.0, -near, -near - 1.0, -near, -near - 1.0, -near]);
}

#[test]
fn fourier_transforms_and_back() {
    let x = wavy(&[2, 5, 1]);
    let forward = Draft::new(17, [node("DFT", &["x"], &["y"])]).input("x", &[2, 5, 1]);
    let spectrum = forward.run(std::slice::from_ref(&x)).remove(0);
    assert_eq!(spectrum.shape().dims(), [2, 5, 2]);
    let sum: f32 = slice(&x)[..5].iter().sum();
    close(&slice(&spectrum)[..2], &[sum, 0.0]);
    let back = Draft::new(17, [node("DFT", &["x"], &["y"]).with(int("inverse", 1))]).input("x", &[2, 5, 2]);
    let back = back.floats(std::slice::from_ref(&spectrum));
    close(&back.iter().step_by(2).copied().collect::<Vec<_>>(), slice(&x));
    // Frames of a short-time transform are transforms of the frames, times the window.
    let n = node("STFT", &["x", "s", "w"], &["y"]);
    let stft = Draft::new(17, [n])
        .input("x", &[2, 5, 1])
        .constant("s", Tensor::scalar(2i64))
        .constant("w", of(&[3], &[1f32, 2.0, 3.0]));
    let frames = stft.run(std::slice::from_ref(&x)).remove(0);
    assert_eq!(frames.shape().dims(), [2, 2, 2, 2]);
    let expected: f32 = (0..3).map(|i| slice(&x)[2 + i] * (1 + i) as f32).sum();
    close(&slice(&frames)[4..6], &[expected, 0.0]);
    forward.clone().constant("a", i64s(&[7])).run(std::slice::from_ref(&x));
    let mut wrong = forward;
    wrong.nodes[0].attribute.push(int("axis", 2));
    wrong.refused("`axis`");
    let huge = Draft::new(17, [node("DFT", &["x", "n"], &["y"])]).input("x", &[1, 5, 1]);
    huge.constant("n", Tensor::scalar(1i64 << 40)).refused("takes a matrix above");
}

#[test]
fn boxes_that_overlap_a_better_one_go() {
    let boxes = of(&[1, 3, 4], &[0f32, 0.0, 2.0, 2.0, 2.0, 2.2, 0.0, 0.2, 5.0, 5.0, 6.0, 6.0]);
    let draft = |most: i64, least: f32| {
        Draft::new(11, [node("NonMaxSuppression", &["b", "s", "n", "i", "l"], &["y"])])
            .constant("b", boxes.clone())
            .constant("s", of(&[1, 1, 3], &[0.5f32, 0.9, 0.3]))
            .constant("n", i64s(&[most]))
            .constant("i", of(&[1], &[0.5f32]))
            .constant("l", of(&[1], &[least]))
            .run(&[])
            .remove(0)
    };
    assert_eq!(draft(5, 0.0), of(&[2, 3], &[0i64, 0, 1, 0, 0, 2]));
    assert_eq!(draft(1, 0.0), of(&[1, 3], &[0i64, 0, 1]));
    assert_eq!(draft(5, 0.3), of(&[1, 3], &[0i64, 0, 1]));
    assert_eq!(draft(0, 0.0), of::<i64>(&[0, 3], &[]));
    let run_time = Draft::new(11, [node("NonMaxSuppression", &["b", "s"], &["y"])]).input("b", &[1, 3, 4]);
    run_time.input("s", &[1, 1, 3]).refused("must be known");
}

#[test]
fn layers_of_every_direction_and_layout() {
    let x = wavy(&[3, 2, 2]);
    let (w, r, b) = (wavy(&[2, 12, 2]), wavy(&[2, 12, 3]), wavy(&[2, 24]));
    let draft = |op: &str, gates: usize, outputs: &[&str], layout: bool| {
        let n = node(op, &["x", "w", "r", "b"], outputs).with(int("hidden_size", 3));
        let n = n.with(string("direction", "bidirectional")).with(int("layout", layout.into()));
        let part =
            |t: &Tensor, columns: usize| of(&[2, gates * 3, columns], &slice(t)[..2 * gates * 3 * columns]);
        Draft::new(14, [n])
            .input("x", if layout { &[2, 3, 2] } else { &[3, 2, 2] })
            .constant("w", part(&w, 2))
            .constant("r", part(&r, 3))
            .constant("b", of(&[2, 2 * gates * 3], &slice(&b)[..4 * gates * 3]))
            .outputs(outputs)
    };
    let turned: Vec<f32> = (0..2)
        .flat_map(|b| (0..3).map(move |t| (t, b)))
        .flat_map(|(t, b)| slice(&x)[(t * 2 + b) * 2..][..2].to_vec())
        .collect();
    for (op, gates) in [("RNN", 1), ("GRU", 3), ("LSTM", 4)] {
        let outputs: &[&str] = if op == "LSTM" { &["y", "h", "c"] } else { &["y", "h"] };
        let steps_first = draft(op, gates, outputs, false).run(std::slice::from_ref(&x));
        let sequences_first = draft(op, gates, outputs, true).run(&[of(&[2, 3, 2], &turned)]);
        assert_eq!(steps_first[0].shape().dims(), [3, 2, 2, 3], "{op}");
        assert_eq!(sequences_first[0].shape().dims(), [2, 3, 2, 3], "{op}");
        let (y, h) = (slice(&steps_first[0]), slice(&steps_first[1]));
        for (d, s, j) in (0..2).flat_map(|d| (0..2).flat_map(move |s| (0..3).map(move |j| (d, s, j)))) {
            // The last step of a direction is its last state.
            let last = if d == 0 { 2 } else { 0 };
            assert_eq!(y[((last * 2 + d) * 2 + s) * 3 + j], h[(d * 2 + s) * 3 + j], "{op}");
            assert_eq!(h[(d * 2 + s) * 3 + j], slice(&sequences_first[1])[(s * 2 + d) * 3 + j], "{op}");
        }
    }
    let mut wrong = draft("LSTM", 4, &["y"], false);
    wrong.nodes[0]
        .attribute
        .push(AttributeProto { strings: vec![b"Sin".to_vec(); 6], ..strings("activations") });
    wrong.refused("does not exist");
    let mut size = draft("GRU", 3, &["y"], false);
    size.nodes[0].attribute[0] = int("hidden_size", 4);
    size.refused("`hidden_size` is 4");
}

/// An attribute of strings, without any.
fn strings(name: &str) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        type_: onnx_protobuf::attribute_proto::AttributeType::STRINGS.into(),
        ..Default::default()
    }
}

#[test]
fn values_are_found_by_the_names_of_the_file() {
    let nodes = [
        node("Relu", &["x"], &["a"]),
        node("Shape", &["a"], &["s"]),
        node("Reshape", &["a", "s"], &["b"]),
        node("Neg", &["x"], &["unused"]),
        node("Identity", &["b"], &["y"]),
    ];
    let draft = Draft::new(17, nodes).input("x", &[2, 3]);
    let model = Model::parse(draft.proto().write_to_bytes().unwrap()).unwrap();
    let (graph, named) = model.named_graph(&Bindings::default()).unwrap();
    let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
    // The shape is a constant, and nothing needs the negative.
    assert_eq!((names[0], names[1], names.len()), ("x", "a", 4), "{names:?}");
    assert!(named.iter().all(|(_, value)| graph.contains(value.node)));
    let by = |name: &str| named.iter().find(|(n, _)| n == name).unwrap().1;
    assert_eq!(by("y"), graph.outputs()[0].value);
    assert_eq!(by("b"), by("y"));
}
