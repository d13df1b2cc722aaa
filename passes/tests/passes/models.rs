//! The pipeline on real models: the one that ships with the project, and all in the folder that `QCC_MODELS` names.

#![allow(clippy::print_stderr, reason = "a skipped or long test says so")]

use crate::common::*;
use qcc_ir::{
    Graph, Op,
    onnx::{Bindings, Model},
};
use qcc_passes::{NoteKind, Options, plan};
use std::path::{Path, PathBuf};

fn load(path: &Path) -> Graph {
    Model::load(path).unwrap().graph(&Bindings::default()).unwrap()
}

#[test]
fn fashion_resnet8_is_all_integers() {
    let float = load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fashion_resnet8.onnx"));
    let (fake, placed, report) = compiled(&float, &Options::default());
    assert_eq!(count(&placed, "Transpose"), 0, "{report}");
    assert_eq!((count(&placed, "Quantize"), count(&placed, "Dequantize")), (1, 1), "{report}");
    assert_eq!(count(&placed, "QConv"), count(&float, "Conv"));
    for other in ["Conv", "MatMul", "Binary", "BatchNorm", "QBinary", "QUnary"] {
        assert_eq!(count(&placed, other), 0, "{report}");
    }
    let x = inputs(&float, 200);
    let (f, q, i) = (run(&float, &x), run(&fake, &x), run(&placed, &x));
    assert!(distance(&q, &i) < 0.05, "fake-quant {q:?}\nint8 {i:?}");
    assert!(distance(&f, &i) < 0.1, "float {f:?}\nint8 {i:?}");
}

#[test]
fn models_of_a_folder() {
    let Some(folder) = std::env::var_os("QCC_MODELS") else {
        eprintln!("SKIPPED: set QCC_MODELS to a folder of ONNX files");
        return;
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "onnx"));
    files.sort();
    for file in files {
        let float = load(&file);
        let (fake, placed, report) = compiled(&float, &Options::default());
        let x = inputs(&float, 200);
        let (f, q, i) = (run(&float, &x), run(&fake, &x), run(&placed, &x));
        eprintln!(
            "== {}: {} nodes to {}; fake-quant to int8 {:.4}, float to int8 {:.4} of the largest result",
            file.display(),
            float.len(),
            placed.len(),
            distance(&q, &i),
            distance(&f, &i)
        );
        for record in &report.records {
            for note in record.notes.iter().filter(|n| n.kind != NoteKind::Applied) {
                eprintln!("   {}: `{}`: {}", record.pass, note.node, note.text);
            }
        }
        eprintln!("{}", plan(&placed, &report));
        let products = placed.nodes().filter(|(_, n)| matches!(n.op(), Some(Op::Conv(_) | Op::MatMul(_))));
        assert_eq!(products.count(), 0, "products stay float in {}", file.display());
        assert!(distance(&q, &i) < 0.1);
    }
}
