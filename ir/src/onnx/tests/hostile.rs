#![allow(clippy::print_stderr, reason = "a test that skips says so")]

use super::*;
use crate::onnx::wire;
use onnx_protobuf::attribute_proto::AttributeType;
use std::path::PathBuf;

/// A model with some of everything: packed and unpacked numbers, attributes, tensors, symbolic shapes.
fn sample() -> Vec<u8> {
    let conv = node("Conv", &["x", "w", "b"], &["c"])
        .with(list("pads", &[1, 1, 1, 1]))
        .with(string("auto_pad", "NOTSET"));
    let pool =
        node("MaxPool", &["r"], &["p"]).with(list("kernel_shape", &[2, 2])).with(list("strides", &[2, 2]));
    Draft::new(
        13,
        [
            conv,
            node("LeakyRelu", &["c"], &["r"]).with(float("alpha", 0.1)),
            pool,
            node("Reshape", &["p", "shape"], &["f"]),
            node("Gemm", &["f", "g"], &["l"]).with(int("transB", 1)),
            node("QuantizeLinear", &["l", "s", "z"], &["q"]),
            node("DequantizeLinear", &["q", "s", "z"], &["y"]),
        ],
    )
    .input("x", &[1, 2, 4, 4])
    .constant("w", iota(&[3, 2, 3, 3]))
    .constant("b", iota(&[3]))
    .constant("shape", i64s(&[1, -1]))
    .constant("g", iota(&[5, 12]))
    .constant("s", Tensor::scalar(0.5f32))
    .constant("z", Tensor::scalar(3u8))
    .proto()
    .write_to_bytes()
    .unwrap()
}

/// Imports whatever it is; only a panic (or an abort) fails.
fn survive(bytes: Vec<u8>) -> bool {
    Model::parse(bytes).and_then(|m| m.graph(&Bindings::default())).is_ok()
}

#[test]
fn truncated_models_are_errors() {
    let whole = sample();
    assert!(survive(whole.clone()));
    for n in 0..whole.len() {
        let accepted = survive(whole[..n].to_vec());
        // The last fields of a model are optional, so a cut between fields may leave a model.
        assert!(!accepted || n > whole.len() / 2, "cut at {n}");
    }
}

/// A small generator; the numbers are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn damaged_models_do_not_panic() {
    let whole = sample();
    let mut random = Random(0x5EED);
    let mut accepted = 0;
    for _ in 0..6000 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.below(256) as u8,
                2 => {
                    bytes.remove(at);
                }
                _ => bytes.insert(at, random.below(256) as u8),
            }
        }
        accepted += usize::from(survive(bytes));
    }
    // Damage to weights does not show; were nothing accepted, the samples would not get past the parser.
    assert!(accepted > 100, "{accepted} accepted");
}

#[test]
fn wire_formats_that_are_none() {
    let varint = |mut v: u64| {
        let mut out = vec![];
        while v >= 0x80 {
            out.push(v as u8 | 0x80);
            v >>= 7;
        }
        out.push(v as u8);
        out
    };
    let message = |body: &[u8], tag: u8| [vec![tag], varint(body.len() as u64), body.to_vec()].concat();
    let mut nested = vec![];
    for _ in 0..200 {
        // TypeProto.sequence_type, Sequence.elem_type.
        nested = message(&message(&nested, 0x0a), 0x22);
    }
    // A type in a value_info in the graph.
    let nested = message(&message(&message(&nested, 0x12), 0x6a), 0x3a);
    // Empty attributes in one node: two bytes each, hundreds in memory.
    let many = message(&message(&[0x2a, 0].repeat(1 << 20), 0x0a), 0x3a);
    for (bytes, word) in [
        (vec![0x0b], "wire type 3"),
        (vec![0x0c], "wire type 4"),
        (vec![0x0e], "wire type 6"),
        (vec![0x02, 0], "field number 0"),
        (vec![0x08, 0x80], "over the end"),
        ([vec![0x08], vec![0xff; 10]].concat(), "64 bits"),
        ([vec![0x08], vec![0x80; 9], vec![0x02]].concat(), "64 bits"),
        ([vec![0x3a], varint(u64::MAX)].concat(), "18446744073709551615 bytes long"),
        (vec![0x3a, 3, 0x0a, 4, 0], "4 bytes long, where 1"),
        (vec![0x38, 0], "is a message"),
        (vec![0x0d, 0, 0], "4 bytes long"),
        (nested, "deep"),
        (many, "bytes of memory"),
    ] {
        let e = wire::scan(&bytes).unwrap_err().to_string();
        assert!(e.contains(word) && e.contains("byte "), "{word}: {e}");
    }
    assert!(wire::scan(&sample()).is_ok());
    let at = wire::scan(&[0x08, 0x08, 0x12, 0x01, b'q', 0x0b]).unwrap_err().to_string();
    assert!(at.contains("byte 5"), "{at}");
}

#[test]
fn other_files_are_named() {
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"import onnx\n", "text that starts with \"import onnx"),
        (b"PK\x03\x04....", "ZIP"),
        (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
    ] {
        let e = Model::parse(bytes.to_vec()).err().expect("is refused").to_string();
        assert!(e.starts_with("this is not an ONNX model") && e.contains(word), "{e}");
    }
}

/// The folder of shared test data, beside the repository or where the environment says.
pub(super) fn shared(part: &str) -> Option<PathBuf> {
    let beside = |root: PathBuf| root.ancestors().map(|a| a.join("shared")).find(|p| p.is_dir());
    let root = match std::env::var_os("QCC_SHARED") {
        Some(path) => Some(PathBuf::from(path)),
        None => beside(PathBuf::from(env!("CARGO_MANIFEST_DIR"))),
    };
    let found = root.map(|r| r.join(part)).filter(|p| p.is_dir());
    if found.is_none() {
        eprintln!(
            "SKIPPED: no folder shared/{part} beside the repository; set QCC_SHARED to the shared folder"
        );
    }
    found
}

#[test]
fn shared_samples_are_answered_as_expected() {
    let Some(folder) = shared("hostile") else { return };
    let table = std::fs::read_to_string(folder.join("expect.tsv")).unwrap();
    let mut wrong = vec![];
    for row in table.lines().skip(1) {
        let cells: Vec<&str> = row.split('\t').collect();
        let (file, expect, mention) = (cells[0], cells[3], cells[4]);
        let answer =
            Model::load(&folder.join("files").join(file)).and_then(|m| m.graph(&Bindings::default()));
        let ok = match (&answer, expect) {
            (Ok(_), _) => expect != "reject",
            (Err(_), "accept") => false,
            (Err(e), _) => mention.is_empty() || mention.split('|').any(|word| e.to_string().contains(word)),
        };
        if !ok {
            wrong.push(format!("{file}: {expect}, got {:?}", answer.map(|_| "accepted")));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A graph as an attribute.
fn body(name: &str, inputs: &[(&str, DType)], nodes: Vec<NodeProto>, outputs: &[&str]) -> AttributeProto {
    let mut draft = Draft::new(13, nodes).outputs(outputs);
    for (name, dtype) in inputs {
        draft = draft.input_of(name, *dtype, &[]);
    }
    AttributeProto {
        name: name.into(),
        type_: AttributeType::GRAPH.into(),
        g: Some(draft.graph()).into(),
        ..Default::default()
    }
}

fn truth(value: bool) -> Tensor {
    Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![value.into()]).unwrap()
}

/// y = a loop over x, of which `rounds` are asked for; its body has these nodes and passes the condition `go` on.
fn looped(rounds: Option<i64>, nodes: Vec<NodeProto>, go: &str) -> Draft {
    let inputs = [("i", DType::S64), ("given", DType::Bool), ("s", DType::F32)];
    let operand = if rounds.is_some() { "rounds" } else { "" };
    let node = node("Loop", &[operand, "t", "x"], &["y"]).with(body("body", &inputs, nodes, &[go, "next"]));
    Draft::new(13, [node])
        .constant("x", Tensor::scalar(1f32))
        .constant("t", truth(true))
        .constant("rounds", Tensor::scalar(rounds.unwrap_or(0)))
}

#[test]
fn loops_without_end_are_refused() {
    let add = || vec![node("Add", &["s", "s"], &["next"])];
    // The number of rounds alone tells; a condition that is always true; one that is never false; no number at all.
    looped(Some(i64::MAX), add(), "given").refused("rounds");
    let never = || {
        let less = node("Less", &["s", "next"], &["more"]);
        vec![node("Abs", &["s"], &["next"]), less, node("Not", &["more"], &["go"])]
    };
    looped(Some(i64::MAX), never(), "go").refused("fewer rounds");
    looped(None, never(), "go").refused("fewer rounds");
    looped(None, add(), "given").refused("fewer rounds");
    // None, and a number below none.
    for rounds in [0, -1, i64::MIN] {
        assert_eq!(looped(Some(rounds), add(), "given").floats(&[]), [1.0]);
    }
    assert_eq!(looped(Some(3), add(), "given").floats(&[]), [8.0]);
}

#[test]
fn loops_in_loops_share_one_account() {
    let mut nodes = vec![node("Abs", &["s"], &["next"])];
    for depth in 0..4 {
        let inputs = [("i", DType::S64), ("given", DType::Bool), ("s", DType::F32)];
        let inner = node("Loop", &["rounds", "t", "s"], &["next"]).with(body(
            "body",
            &inputs,
            nodes,
            &["go", "next"],
        ));
        let go = node("Equal", &["i", "i"], &["go"]);
        let abs = node("Abs", &["s"], &["unused"]);
        nodes = if depth == 0 { vec![inner, abs] } else { vec![inner, go, abs] };
        if depth == 0 {
            nodes.push(node("Equal", &["i", "i"], &["go"]));
        }
        let AttributeProto { g, .. } = &mut nodes[0].attribute[0];
        let graph = g.mut_or_insert_default();
        if graph.node.iter().all(|n| n.output[0] != "go") {
            graph.node.push(node("Equal", &["i", "i"], &["go"]));
        }
    }
    let started = std::time::Instant::now();
    looped(Some(300), nodes, "go").refused("rounds");
    // Four hundred million rounds would take hours.
    assert!(started.elapsed().as_secs() < 60);
}

#[test]
fn bodies_of_other_arity_are_refused() {
    let abs = || vec![node("Abs", &["s"], &["next"])];
    let inputs = [("i", DType::S64), ("given", DType::Bool), ("s", DType::F32)];
    for (inputs, outputs) in
        [(&inputs[..2], &["given", "given"][..]), (&inputs[..], &["given"]), (&inputs[..1], &["i", "i"])]
    {
        let nodes = if inputs.len() == 3 { abs() } else { vec![node("Abs", &["x"], &["next"])] };
        let outputs: Vec<&str> =
            outputs.iter().copied().collect::<std::collections::BTreeSet<_>>().into_iter().collect();
        let node = node("Loop", &["rounds", "t", "x"], &["y"]).with(body("body", inputs, nodes, &outputs));
        Draft::new(13, [node])
            .constant("x", Tensor::scalar(1f32))
            .constant("t", truth(true))
            .constant("rounds", Tensor::scalar(2i64))
            .refused("y_node");
    }
    // Branches that take inputs, or give fewer results than the node has.
    let branch = |name, outputs: &[&str]| {
        body(name, &[], vec![node("Abs", &["x"], &["a"]), node("Neg", &["x"], &["b"])], outputs)
    };
    let choice = node("If", &["t"], &["y", "z"])
        .with(branch("then_branch", &["a"]))
        .with(branch("else_branch", &["a", "b"]));
    Draft::new(13, [choice]).constant("x", Tensor::scalar(1f32)).constant("t", truth(true)).refused("y_node");
    // A condition that is none.
    let choice =
        node("If", &["x"], &["y"]).with(branch("then_branch", &["a"])).with(branch("else_branch", &["b"]));
    Draft::new(13, [choice]).constant("x", Tensor::scalar(1f32)).refused("one bool");
    let missing = node("If", &["t"], &["y"]).with(branch("then_branch", &["a"]));
    Draft::new(13, [missing])
        .constant("x", Tensor::scalar(1f32))
        .constant("t", truth(true))
        .refused("else_branch");
}

#[test]
fn scans_over_nothing_end() {
    let inputs = [("s", DType::F32), ("row", DType::F32)];
    let nodes = || vec![node("Add", &["s", "row"], &["next"])];
    // Opset 8 has a batch: of 2^39 samples, each of which is empty.
    let scan = node("Scan", &["", "zero", "x"], &["y"]).with(int("num_scan_inputs", 1)).with(body(
        "body",
        &inputs,
        nodes(),
        &["next"],
    ));
    Draft::new(8, [scan]).input("zero", &[1 << 39, 0]).input("x", &[1 << 39, 0, 1]).refused("above");
    let scan = node("Scan", &["zero", "x"], &["y"]).with(int("num_scan_inputs", 1)).with(body(
        "body",
        &inputs,
        nodes(),
        &["next"],
    ));
    Draft::new(11, [scan]).input("zero", &[0]).input("x", &[1 << 39, 0]).refused("above");
}

fn function(name: &str, nodes: Vec<NodeProto>) -> onnx_protobuf::FunctionProto {
    onnx_protobuf::FunctionProto {
        name: name.into(),
        domain: "local".into(),
        input: vec!["a".into()],
        output: vec!["b".into()],
        opset_import: [("", 13), ("local", 1)]
            .map(|(domain, version)| OperatorSetIdProto {
                domain: domain.into(),
                version,
                ..Default::default()
            })
            .into(),
        node: nodes,
        ..Default::default()
    }
}

fn local(op: &str, input: &str, output: &str) -> NodeProto {
    NodeProto { domain: "local".into(), ..node(op, &[input], &[output]) }
}

#[test]
fn functions_that_call_each_other_without_end_are_refused() {
    let with = |functions: Vec<onnx_protobuf::FunctionProto>| {
        let mut p = Draft::new(13, [local("F", "x", "y")]).input("x", &[2]).proto();
        p.opset_import.push(OperatorSetIdProto { domain: "local".into(), version: 1, ..Default::default() });
        p.functions = functions;
        p
    };
    assert!(import(&with(vec![function("F", vec![node("Relu", &["a"], &["b"])])])).is_ok());
    refused(&with(vec![function("F", vec![local("F", "a", "b")])]), "32 deep");
    let pair = vec![function("F", vec![local("G", "a", "b")]), function("G", vec![local("F", "a", "b")])];
    refused(&with(pair), "32 deep");
    // Each calls the next one eight times: 8^20 nodes.
    let functions = (0..20).map(|depth| {
        let name = if depth == 0 { "F".to_string() } else { format!("F{depth}") };
        let next = format!("F{}", depth + 1);
        let op = |i: usize| {
            let (from, to) = (if i == 0 { "a".into() } else { format!("v{i}") }, format!("v{}", i + 1));
            let to = if i == 7 { "b".to_string() } else { to };
            if depth == 19 { node("Relu", &[&from], &[&to]) } else { local(&next, &from, &to) }
        };
        function(&name, (0..8).map(op).collect())
    });
    refused(&with(functions.collect()), "nodes");
    let relu = || function("F", vec![node("Relu", &["a"], &["b"])]);
    refused(&with(vec![relu(), relu()]), "twice");
}

#[test]
fn import_computes_no_more_than_it_may() {
    // 2^40 elements of a constant, and 8 GiB made of a few.
    let shape = |dims: &[i64]| i64s(dims);
    let filled = node("ConstantOfShape", &["s"], &["y"]);
    Draft::new(13, [filled.clone()]).constant("s", shape(&[1 << 20, 1 << 20])).refused("y_node");
    Draft::new(13, [filled]).constant("s", shape(&[i64::MAX, 2])).refused("y_node");
    let tiled = node("Tile", &["x", "r"], &["y"]);
    Draft::new(13, [tiled]).constant("x", iota(&[2])).constant("r", shape(&[1 << 31])).refused("y_node");
}

#[test]
fn a_model_is_refused_that_may_not_take_its_own_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, sample()).unwrap();
    assert!(Model::load_within(&path, 1 << 20).is_ok());
    let e = Model::load_within(&path, 100).err().expect("is refused").to_string();
    assert!(e.contains("--max-memory") && e.contains("100 bytes"), "{e}");
}

/// A sequence where a number must be known: what is behind such a part would be the same part again, for ever.
#[test]
fn a_sequence_is_no_number_that_may_become_known() {
    let given = node("SequenceConstruct", &["a", "a"], &["s"]);
    let d = Draft::new(17, [given.clone(), node("Range", &["a", "limit", "s"], &["y"])]).input("a", &[]);
    d.constant("a", Tensor::scalar(0f32))
        .constant("limit", Tensor::scalar(4f32))
        .refused("operand 2 (delta) is no tensor");
    let d = Draft::new(17, [given, node("SequenceInsert", &["s", "a", "s"], &["t"])]).input("a", &[]);
    d.outputs(&["t"]).refused("operand 2 (position) is no tensor");
}

/// A size that an attribute or a constant gives is bounded before anything of that size is made.
#[test]
fn constants_of_any_size_are_not_made() {
    let crop = Draft::new(13, [contrib::microsoft("CropAndResize", &["x", "rois", "of", "size"], &["y"])])
        .input("x", &[1, 1, 8, 8])
        .input("rois", &[3, 4])
        .constant("of", of(&[3], &[0i32, 0, 0]))
        .constant("size", of(&[2], &[670_716_626i32, 1]));
    crop.with_microsoft().refused("of what import may make");
}

/// Where a cache of attention has fewer axes than it is cut along.
#[test]
fn axes_that_are_not_there_are_not_cut() {
    let operands = ["q", "k", "v", "total", "", "lens", "total"];
    let attention = contrib::microsoft("GroupQueryAttention", &operands, &["y", "pk", "pv"])
        .with(int("num_heads", 2))
        .with(int("kv_num_heads", 2));
    let d = Draft::new(17, [attention]);
    let d = d.input("q", &[1, 1, 32]).input("k", &[1, 1, 32]).input("v", &[1, 1, 32]);
    let d = d.constant("lens", of(&[1], &[3i32])).constant("total", Tensor::scalar(4i32));
    d.outputs(&["y", "pk", "pv"]).with_microsoft().refused("has no axis 2");
}

/// Queries, keys and values in one operand, which has no axes.
#[test]
fn a_scalar_has_no_parts() {
    let attention =
        contrib::microsoft("GroupQueryAttention", &["q", "", "", "", "", "lens", "total"], &["y"])
            .with(int("num_heads", 2))
            .with(int("kv_num_heads", 2));
    let d = Draft::new(17, [attention]).input("q", &[]);
    let d = d.constant("lens", of(&[1], &[3i32])).constant("total", Tensor::scalar(4i32));
    d.with_microsoft().refused("a scalar has no query_packed");
}

/// Strides of any size are numbers, and are not counted with.
#[test]
fn strides_of_any_size_are_no_overflow() {
    let conv = node("DeformConv", &["x", "w", "offset"], &["y"])
        .with(list("strides", &[i64::MAX / 2, 1]))
        .with(list("dilations", &[i64::MAX / 2, 1]));
    let d = Draft::new(22, [conv]).input("x", &[1, 1, 5, 5]).input("offset", &[1, 8, 3, 4]);
    let d = d.constant("w", of(&[1, 1, 2, 2], &[1f32; 4]));
    let y = d.floats(&[of(&[1, 1, 5, 5], &[1f32; 25]), of(&[1, 8, 3, 4], &[0f32; 96])]);
    // Only the first row of results has a tap within the image.
    assert_eq!((y[0], y[4]), (2.0, 0.0));
}
