#![allow(clippy::print_stderr, reason = "a test that skips says so")]

use super::*;
use crate::onnx::wire;
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
