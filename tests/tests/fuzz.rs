//! Mutants of the bundled model and of generated ones: a few at every change, and as many as `QCC_FUZZ` says where it is set
//! (`.ci/run` does). The program `fuzz` of this package runs any number of mutants of any models.

use qcc_tests::{
    attempt::{Bounds, Outcome, attempt},
    mutate::{Mutator, encode},
    seeds,
};
use std::process::Command;

/// Each generated model as it is: mutants of models that are refused would test little.
#[test]
fn seeds_run() {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let file = folder.path().join("seed.onnx");
    for (i, model) in seeds::generated().iter().chain(&seeds::bundled()).enumerate() {
        std::fs::write(&file, encode(model)).expect("a file in it");
        // Some go through a file, which is damaged, or get inputs that ask for too much.
        let ends: Vec<Outcome> = (0..6).map(|seed| attempt(&file, seed, Bounds::default()).outcome).collect();
        let ran = ends.iter().filter(|&end| *end == Outcome::Ran).count();
        assert!(ran >= 4, "seed model {i}: {ends:?}");
    }
}

#[test]
fn mutants_depend_on_their_seed_alone() {
    let mutator = || Mutator::new(seeds::generated());
    let (a, b) = (mutator(), mutator());
    assert!((0..50).all(|seed| a.mutant(seed) == b.mutant(seed)));
    assert_ne!(a.mutant(1), a.mutant(2));
}

/// In child processes, so that one that aborts, hangs or takes too much memory is a finding, and not the end of the tests.
#[test]
fn mutants_do_no_harm() {
    let count = std::env::var("QCC_FUZZ").ok().and_then(|n| n.parse::<u64>().ok()).unwrap_or(500);
    let output = Command::new(env!("CARGO_BIN_EXE_fuzz")).args(["--count", &count.to_string()]).output();
    let output = output.expect("the program runs");
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}");
    assert!(
        report.contains(&format!("{count} mutants came to an end")) && report.contains(" ran"),
        "{report}"
    );
}
