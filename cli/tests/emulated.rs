//! Other CPUs: qcc under QEMU's emulation of them chooses the tier that they have, and computes the same bytes as here.
//!
//! The emulator refuses what the emulated CPU lacks, so these tests also show that nothing in the binary, whoever made
//! it, is beyond the CPU.

use std::{
    path::Path,
    process::{Command, Output},
};

const QCC: &str = env!("CARGO_BIN_EXE_qcc");
const QEMU: &str = "qemu-x86_64";

/// CPUs, and the tier that each is to choose. TCG, the emulator, has no AVX-512 and no AVX-VNNI.
const CPUS: [(&str, &str); 2] = [("Nehalem", "x86-64-v2"), ("Haswell", "avx2")];

/// Runs qcc, on an emulated CPU where one is given.
fn qcc(cpu: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = match cpu {
        Some(cpu) => {
            let mut qemu = Command::new(QEMU);
            // No warnings about features that the emulator lacks.
            qemu.args(["-cpu", &format!("{cpu},check=off"), QCC]);
            qemu
        }
        None => Command::new(QCC),
    };
    let output = command.args(arguments).env_remove("QCC_ISA").output().expect("qcc starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?} on {cpu:?}: {}: {errors}", output.status);
    output
}

/// Whether there is an emulator; says so where there is none.
#[allow(clippy::print_stderr, reason = "a silent skip would look like a pass")]
fn has_emulator() -> bool {
    let found = Command::new(QEMU).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("SKIPPED: no {QEMU} (Debian: qemu-user): other CPUs are not tested");
    }
    found
}

fn bundled(path: &str) -> String {
    format!("{}/../models/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// Compiles the bundled model, here, for 16 images.
fn compile(requant: &str, program: &str) {
    let (model, calibration) = (bundled("fashion_resnet8.onnx"), bundled("fashion_mnist_calibration.npz"));
    let from =
        ["compile", &model, "--shape", "image=16x1x28x28", "--calibrate", &calibration, "--samples", "32"];
    let how = ["--mean", "72.93", "--std", "90.015", "--requant", requant, "-o", program, "-qq"];
    qcc(None, &[&from[..], &how].concat());
}

#[test]
fn the_best_tier_of_an_emulated_cpu_is_chosen() {
    if !has_emulator() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("model.qcc").display().to_string();
    compile("q15", &program);
    for (cpu, tier) in CPUS {
        let json = folder.path().join(format!("{cpu}.json")).display().to_string();
        qcc(Some(cpu), &["bench", &program, "--reps", "1", "--json", &json, "-qq"]);
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        assert_eq!(report["isa"], tier, "on {cpu}");
    }
}

#[test]
fn int8_gives_the_same_bytes_on_every_cpu() {
    if !has_emulator() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("model.qcc").display().to_string();
    for requant in ["shift", "tflite", "q15", "pow2", "float"] {
        compile(requant, &program);
        let run = |cpu: Option<&str>| {
            let out = folder.path().join(format!("{requant}-{}", cpu.unwrap_or("here")));
            outputs(cpu, &program, &out)
        };
        let here = run(None);
        for (cpu, _) in CPUS {
            assert!(run(Some(cpu)) == here, "{requant} on {cpu} gives other bytes than here");
        }
    }
}

/// The bytes of the output file for the first 16 test images.
fn outputs(cpu: Option<&str>, program: &str, folder: &Path) -> Vec<u8> {
    let (images, to) = (bundled("fashion_mnist_test.npz"), folder.display().to_string());
    qcc(cpu, &["run", program, "--input", &images, "--output-dir", &to, "-qq"]);
    std::fs::read(folder.join("logits.npy")).expect("an output")
}
