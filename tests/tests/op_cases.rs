//! Ops against ONNX Runtime: the cases of `goldens/ops.zip`, a model with its data each, which
//! `goldens/make_op_goldens.py` made.

use qcc_runtime::{
    Backend, Compiler, Precision,
    conformance::{Case, Tolerance},
};
use std::{fs::File, path::PathBuf};

/// The folder with all cases, which is there as long as the value is.
fn cases() -> (tempfile::TempDir, Vec<Case>) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens/ops.zip");
    let folder = tempfile::tempdir().unwrap();
    zip::ZipArchive::new(File::open(path).unwrap()).unwrap().extract(folder.path()).unwrap();
    let cases = Case::find(folder.path()).unwrap();
    assert!(cases.len() > 100);
    (folder, cases)
}

fn all_pass(backend: &Backend) {
    let (_folder, cases) = cases();
    // Sums of ONNX Runtime go in another order, which shows where they nearly cancel.
    let tolerance = Tolerance { relative: 1e-3, absolute: 1e-5 };
    let failed: Vec<String> = cases
        .iter()
        .filter_map(|c| Some(format!("{}: {}", c.name, c.run(backend, tolerance, 1 << 30).err()?)))
        .collect();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

#[test]
fn interpreted_ops_agree_with_onnx_runtime() {
    all_pass(&Backend::Interpreter);
}

#[test]
fn compiled_ops_agree_with_onnx_runtime() {
    all_pass(&Backend::jit(Compiler::new().precision(Precision::Float)));
}
