//! The command as a user meets it: exit codes, messages, files.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

fn qcc(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcc"));
    command.args(arguments).env_remove("QCC_ISA").stdin(Stdio::null());
    command
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn model() -> String {
    models().join("fashion_resnet8.onnx").display().to_string()
}

fn calibration() -> String {
    models().join("fashion_mnist_calibration.npz").display().to_string()
}

fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The one line of an error, after checking the exit code.
fn error(arguments: &[&str], code: i32) -> String {
    let output = qcc(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output");
    let errors: Vec<&str> = text.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {text}");
    errors[0].to_string()
}

/// `compile` with calibration, into a folder.
fn compiled(folder: &Path) -> String {
    let path = folder.join("fashion.qcc").display().to_string();
    let images = calibration();
    let preprocess = ["--samples", "32", "--mean", "72.93", "--std", "90.015"];
    let output =
        qcc(&[&["compile", &model(), "-o", &path, "--calibrate", &images][..], &preprocess].concat());
    assert!(stdout(&output).contains("int8, q15, ranges of 32 samples"), "{}", stdout(&output));
    assert_eq!(stderr(&output), "");
    path
}

/// A model that joins texts, of which the second may be one for all.
fn of_texts() -> Vec<u8> {
    use onnx_protobuf::{
        GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TypeProto, ValueInfoProto, type_proto,
    };
    let value = |name: &str| {
        let tensor = type_proto::Tensor { elem_type: 8, ..Default::default() };
        let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
        ValueInfoProto { name: name.into(), type_: Some(ty).into(), ..Default::default() }
    };
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(|&i| i.into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    };
    let graph = GraphProto {
        name: "texts".into(),
        node: vec![node("StringConcat", &["a", "b"], "y"), node("SequenceConstruct", &["a", "y"], "both")],
        input: vec![value("a"), value("b")],
        output: ["y", "both"].map(|name| ValueInfoProto { name: name.into(), ..Default::default() }).into(),
        ..Default::default()
    };
    let opset = OperatorSetIdProto { version: 20, ..Default::default() };
    let model = ModelProto {
        ir_version: 9,
        opset_import: vec![opset],
        graph: Some(graph).into(),
        ..Default::default()
    };
    model.write_to_bytes().unwrap()
}

#[test]
fn texts_and_sequences_go_in_and_out() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let model = file("texts.onnx", &of_texts());
    let a = format!("a={}", file("a.txt", "red\nnew\n".as_bytes()));
    let b = format!("b={}", file("b.txt", "dish\n".as_bytes()));
    let out = dir.path().join("out").display().to_string();
    let ran = stdout(&qcc(&["run", &model, "--input", &a, "--input", &b, "--output-dir", &out]));
    assert!(ran.contains(r#"y: text[2], "reddish", "newdish""#), "{ran}");
    assert!(ran.contains("both: a sequence of 2"), "{ran}");
    let written = |name: &str| std::fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    assert_eq!((written("y.txt"), written("both_0.txt")), ("reddish\nnewdish\n".into(), "red\nnew\n".into()));
    assert!(error(&["run", &model, "--input", &a], 2).contains("input `b` (b: str of any rank) has no file"));
    assert!(error(&["run", &model, "--input", &a, "--input", &a], 2).contains("given more than once"));
    assert!(error(&["run", &model, "--zeros"], 2).contains("say it with --shape"));
    let shapes = ["--shape", "a=3", "--shape", "b=1"];
    assert!(stdout(&qcc(&[&["run", &model, "--zeros"][..], &shapes].concat())).contains("text[3]"));
    let shown = stdout(&qcc(&[&["inspect", &model][..], &shapes].concat()));
    assert!(shown.contains("input  a: str of any rank") && shown.contains("output both"), "{shown}");
    assert!(shown.contains("StringConcat") && shown.contains("compiled in parts"), "{shown}");
}

#[test]
fn a_file_of_open_shapes_runs_in_any() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any.qcc").display().to_string();
    let options = ["--dynamic", "--samples", "16", "--mean", "72.93", "--std", "90.015"];
    let images = calibration();
    let output = qcc(&[&["compile", &model(), "-o", &path, "--calibrate", &images][..], &options].concat());
    assert!(stdout(&output).contains("ranges of 16 samples"), "{}", stdout(&output));
    assert!(stdout(&output).contains("any shapes of image: f32[Nx1x28x28]"), "{}", stdout(&output));
    for count in [1, 3] {
        let input = dir.path().join("x.npy");
        let shape = qcc_runtime::ir::Shape::new([count, 1, 28, 28]).unwrap();
        let zeros = qcc_runtime::ir::Tensor::zeros(qcc_runtime::ir::DType::F32, shape);
        qcc_runtime::write_npy(&input, &zeros).unwrap();
        let ran = stdout(&qcc(&["run", &path, "--input", &input.display().to_string()]));
        assert!(ran.contains(&format!("f32[{count}x10]")), "{ran}");
    }
    let shown = stdout(&qcc(&["inspect", &path, "--shape", "image=2x1x28x28"]));
    assert!(shown.contains("takes any shapes") && shown.contains("f32[2x1x28x28]"), "{shown}");
    error(&["compile", &path, "--dynamic", "-o", &format!("{path}2")], 2);
    error(&["compile", &model(), "--dynamic", "--tune"], 2);
}

#[test]
fn help_teaches_and_usage_errors_are_2() {
    assert!(stdout(&qcc(&["--help"])).contains("Exit codes: 0 done, 1 bad model or data, 2 bad usage"));
    for command in ["compile", "run", "eval", "bench", "report", "inspect", "zoo"] {
        let help = stdout(&qcc(&[command, "--help"]));
        assert!(help.contains("Usage: qcc") && help.contains("--quiet"), "{help}");
    }
    error(&["compile"], 2);
    error(&["run", "m.onnx", "--no-such-option"], 2);
    error(&["run", "m.onnx", "--precision", "int9"], 2);
    error(&["compile", "m.onnx", "--shape", "x"], 2);
}

#[test]
fn bad_models_and_data_are_1_and_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.onnx");
    std::fs::write(&garbage, [0x0a, 0xff, 0xff, 0x03, 1, 2, 3]).unwrap();
    let garbage = garbage.to_str().unwrap();
    assert!(error(&["run", "--zeros", garbage], 1).contains("garbage.onnx"));
    assert!(error(&["inspect", "/no/such/model.onnx"], 1).contains("/no/such/model.onnx"));
    let no_data = error(&["compile", &model(), "--calibrate", "/no/such/folder"], 1);
    assert!(no_data.contains("/no/such/folder"), "{no_data}");
    let shape = error(&["run", "--zeros", &model(), "--shape", "image=1x1x28"], 1);
    assert!(shape.contains("input `image`"), "{shape}");
}

#[test]
fn what_the_command_line_asks_for_in_vain_is_2_and_lists_what_there_is() {
    let m = model();
    assert!(error(&["run", "--zeros", &m, "--isa", "mmx"], 2).contains("this CPU has"));
    assert!(error(&["compile", &m, "--print-after", "nothing"], 2).contains("fold_batch_norm"));
    assert!(error(&["compile", &m, "--pin", "nowhere=float-jit", "-qq"], 2).contains("nowhere"));
    assert!(error(&["run", &m], 2).contains("image: f32[1x1x28x28]"));
    assert!(error(&["run", &m, "--input", "a=b.npy", "--input", "c=d.npy"], 2).contains("image: f32"));
    assert!(error(&["compile", &m, "--stop-after", "import"], 2).contains("--emit onnx"));
    let mut capped = command(&["run", "--zeros", &m]);
    let output = capped.env("QCC_ISA", "mmx").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("QCC_ISA"), "{}", stderr(&output));
}

#[test]
fn a_compiled_file_runs_like_the_model_and_any_damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = compiled(folder.path());
    let run = stdout(&qcc(&["run", &path, "--zeros", "--top", "2"]));
    assert!(run.starts_with("logits: f32[1x10], from ") && run.lines().count() == 3, "{run}");
    let timings = stdout(&qcc(&["run", &path, "--zeros", "--timings"]));
    for phase in ["map the file", "lowering", "packing weights", "the first run", "together"] {
        assert!(timings.lines().any(|line| line.contains(phase)), "{phase}: {timings}");
    }
    let of_onnx = stdout(&qcc(&["run", &model(), "--zeros", "--timings"]));
    assert!(of_onnx.contains("lowering") && !of_onnx.contains("map the file"), "{of_onnx}");
    let direct = qcc(&[
        "run",
        &model(),
        "--zeros",
        "--top",
        "2",
        "--precision",
        "int8",
        "--calibrate",
        &calibration(),
        "--samples",
        "32",
        "--mean",
        "72.93",
        "--std",
        "90.015",
    ]);
    assert_eq!(stdout(&direct), run);
    let inspected = stdout(&qcc(&["inspect", &path]));
    assert!(inspected.contains("calibrated on 32 samples") && inspected.contains("int8-jit"), "{inspected}");

    let good = std::fs::read(&path).unwrap();
    for (what, at) in
        [("magic", 0), ("version", 8), ("header", 20), ("record", 100), ("weights", good.len() - 9)]
    {
        let mut bad = good.clone();
        bad[at] ^= 4;
        std::fs::write(&path, bad).unwrap();
        let text = error(&["run", &path, "--zeros"], 1);
        assert!(text.contains("fashion.qcc"), "{what}: {text}");
    }
    for length in [0, 7, 63, 64, 1000, good.len() - 1] {
        std::fs::write(&path, &good[..length]).unwrap();
        error(&["run", &path, "--zeros"], 1);
    }
}

#[test]
fn inputs_come_from_arrays_and_outputs_go_to_arrays() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let x = ndarray::Array4::<f32>::from_elem((1, 1, 28, 28), 0.5);
    ndarray_npy::write_npy(file("x.npy"), &x).unwrap();
    let m = model();
    let named = format!("image={}", file("x.npy"));
    stdout(&qcc(&["run", &m, "--input", &named, "--output-dir", &file("out")]));
    let logits: ndarray::Array2<f32> = ndarray_npy::read_npy(file("out/logits.npy")).unwrap();
    assert_eq!(logits.shape(), [1, 10]);
    stdout(&qcc(&["run", &m, "--input", &file("x.npy"), "--threads", "2", "--output-dir", &file("again")]));
    let again: ndarray::Array2<f32> = ndarray_npy::read_npy(file("again/logits.npy")).unwrap();
    assert_eq!(again, logits);

    let wrong = ndarray::Array2::<f32>::zeros((3, 3));
    ndarray_npy::write_npy(file("wrong.npy"), &wrong).unwrap();
    assert!(error(&["run", &m, "--input", &file("wrong.npy")], 1).contains("input `image`"));
}

#[test]
fn ranges_are_chosen_as_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fashion.qcc").display().to_string();
    let (m, images) = (model(), calibration());
    let compile = |options: &[&str]| {
        let preprocess = ["--samples", "24", "--mean", "72.93", "--std", "90.015"];
        let first = ["compile", &m, "-o", &path, "--calibrate", &images];
        qcc(&[&first[..], &preprocess, options].concat())
    };
    let program = |options: &[&str]| {
        let text = stdout(&compile(options));
        (text, std::fs::read(&path).unwrap())
    };
    let (text, min_max) = program(&[]);
    assert!(text.contains("ranges of 24 samples"), "{text}");
    assert_eq!(program(&["--calibrator", "min-max"]).1, min_max);
    for what in ["equalise", "equalize:2", "rounding,everything"] {
        let refused = error(&["compile", &model(), "--repair", what], 2);
        assert!(refused.contains("equalize"), "{refused}");
    }
    let (text, _) = program(&["--repair", "equalize:0.4,rounding,bias", "--explain"]);
    assert!(text.contains("rounding errors of its results"), "{text}");
    for how in ["moving-average:0.1", "percentile:99.9", "entropy", "mse"] {
        let (text, own) = program(&["--calibrator", how]);
        assert!(text.contains(&format!("ranges by {how} of 24 samples")), "{text}");
        assert_ne!(own, min_max, "{how}");
        // Whatever the number of threads.
        for threads in ["1", "3"] {
            assert_eq!(program(&["--calibrator", how, "--calibration-threads", threads]).1, own, "{how}");
        }
    }
    let plan = stdout(&qcc(&["inspect", &path]));
    let value =
        plan.lines().find(|l| l.contains("/l1/c1/Conv")).and_then(|l| l.split_whitespace().next()).unwrap();
    let (text, _) = program(&["--calibrator", &format!("{value}=percentile:99")]);
    assert!(text.contains("ranges by min-max but for 1 value"), "{text}");
    let (text, _) = program(&["--calibrator", "auto", "--explain"]);
    assert!(
        text.contains("(measured)")
            && text.contains("signal to noise of a typical one of 6 samples, with ranges of 18"),
        "{text}"
    );
    assert!(text.contains("min-max ") && text.contains("entropy ") && text.contains(" dB"), "{text}");

    let usage = |options: &[&str]| {
        let output = compile(options);
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        stderr(&output)
    };
    assert!(usage(&["--calibrator", "kl"]).contains("moving-average"));
    assert!(
        usage(&["--calibrator", "mse", "--calibrator", "entropy"]).contains("given twice for all values")
    );
    assert!(usage(&["--calibrator", "a=mse", "--calibrator", "a=entropy"]).contains("given twice for a"));
    let unknown = compile(&["--calibrator", "no such value=mse"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(stderr(&unknown).contains("`no such value`"), "{}", stderr(&unknown));
}

#[test]
fn a_policy_is_searched_for_written_and_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (model, images) = (model(), calibration());
    let samples = ["--calibrate", &images, "--samples", "24", "--mean", "72.93", "--std", "90.015"];
    // Means are those of the network that comes of the policy.
    let data = [&samples[..], &["--repair", "means"]].concat();
    let compile = |more: &[&'static str], files: &[(&'static str, &str)]| -> Vec<String> {
        let named = files.iter().flat_map(|(option, name)| [option.to_string(), at(name)]);
        let given = ["compile", &model].into_iter().chain(data.iter().copied()).chain(more.iter().copied());
        given.map(String::from).chain(named).collect()
    };
    let run = |arguments: &[String]| qcc(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let fails =
        |arguments: &[String], code| error(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), code);

    let listed =
        stdout(&qcc(&[&["sensitivity", &model, "--top", "2", "--json", &at("s.json")][..], &data].concat()));
    assert!(listed.contains("12 layers; all of them int8: "), "{listed}");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(at("s.json")).unwrap()).unwrap();
    let (layers, all) = (json["layers"].as_array().unwrap(), json["int8_db"].as_f64().unwrap());
    assert_eq!((layers.len(), json["samples"].as_u64()), (12, Some(6)));

    // A little more than int8 gives: some layers must be float, not all.
    let wanted = format!("{:.1}", all + 3.0);
    let mut search = compile(&["--min-sqnr"], &[]);
    search.extend([wanted.clone(), "-o".into(), at("mixed.qcc")]);
    let found = stdout(&run(&search));
    let policy = std::fs::read_to_string(at("mixed.policy.toml")).unwrap();
    let float = policy.lines().filter(|l| l.contains("= \"float\"")).count();
    assert!((1..12).contains(&float), "{policy}");
    assert!(found.contains(&format!("{float} of 12 layers stay float for at least {wanted} dB")), "{found}");
    assert!(found.contains("mixed.policy.toml"), "{found}");

    // Given back, it makes the same file.
    let files = [("--policy", "mixed.policy.toml"), ("-o", "again.qcc")];
    let taken = stdout(&run(&compile(&["--explain"], &files)));
    assert_eq!(taken.matches("that is the policy").count(), float, "{taken}");
    assert!(
        std::fs::read(at("mixed.qcc")).unwrap() == std::fs::read(at("again.qcc")).unwrap(),
        "files differ"
    );

    let in_vain = fails(&compile(&["--max-drop", "1"], &[("--validate", "nothing")]), 1);
    assert!(in_vain.contains("nothing"), "{in_vain}");
    std::fs::write(at("odd.toml"), policy.replace("\"float\"", "\"int4\"")).unwrap();
    let odd = fails(&compile(&[], &[("--policy", "odd.toml")]), 1);
    assert!(odd.contains("odd.toml") && odd.contains("int4"), "{odd}");
    let usage = fails(&compile(&["--min-sqnr", "30", "--precision", "float"], &[]), 2);
    assert!(usage.contains("--min-sqnr"), "{usage}");
}

#[test]
fn arrays_of_safetensors_are_inputs_and_samples() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let x = ndarray::Array4::<f32>::from_shape_fn((1, 1, 28, 28), |(_, _, i, j)| (i * j) as f32 / 784.0);
    ndarray_npy::write_npy(file("x.npy"), &x).unwrap();
    let header = r#"{"image":{"dtype":"F32","shape":[1,1,28,28],"data_offsets":[0,3136]}}  "#;
    let data: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(file("x.safetensors"), &bytes).unwrap();
    let m = model();
    let top = |input: &str| stdout(&qcc(&["run", &m, "--input", &file(input), "--top", "3"]));
    assert_eq!(top("x.safetensors"), top("x.npy"));
    let named = format!("image={}", file("x.safetensors"));
    assert_eq!(stdout(&qcc(&["run", &m, "--input", &named, "--top", "3"])), top("x.npy"));
    let samples = qcc(&["compile", &m, "-o", &file("a.qcc"), "--calibrate", &file("x.safetensors")]);
    assert!(stdout(&samples).contains("ranges of 1 samples"));

    for length in [0, 4, 9, 60, bytes.len() - 1] {
        std::fs::write(file("x.safetensors"), &bytes[..length]).unwrap();
        let text = error(&["run", &m, "--input", &file("x.safetensors")], 1);
        assert!(text.contains("x.safetensors") && text.contains("damaged"), "{text}");
    }
}

#[test]
fn evaluation_compares_every_mode_with_float() {
    let images = models().join("fashion_mnist_test.npz").display().to_string();
    let output = qcc(&[
        "eval",
        &model(),
        "--images",
        &images,
        "--limit",
        "100",
        "--calibrate",
        &calibration(),
        "--every",
        "8",
        "--mean",
        "72.93",
        "--std",
        "90.015",
        "--requant",
        "all",
    ]);
    let text = stdout(&output);
    for row in ["float ", "int8 shift", "int8 tflite", "int8 q15", "int8 pow2", "int8 float"] {
        let line = text.lines().find(|l| l.starts_with(row)).unwrap_or_else(|| panic!("no {row}: {text}"));
        let top1: f64 = line.split_whitespace().find_map(|w| w.parse().ok().filter(|x| *x > 20.0)).unwrap();
        assert!(top1 > 85.0, "{line}");
    }
    assert!(text.contains("100 samples of"), "{text}");
}

#[test]
fn bench_writes_the_figures_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("out.json").display().to_string();
    let output = qcc(&[
        "bench",
        &model(),
        "--shape",
        "image=1x1x28x28",
        "--precision",
        "int8,float",
        "--requant",
        "shift,q15",
        "--threads",
        "1",
        "--reps",
        "3",
        "--layers",
        "--json",
        &json,
        "-qq",
    ]);
    let text = stdout(&output);
    assert!(text.contains("GMAC/s") && text.contains("/fc/Gemm"), "{text}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(report["isa"].is_string() && report["threads"] == 1);
    let runs = report["runs"].as_array().unwrap();
    let kinds: Vec<(&str, Option<&str>)> =
        runs.iter().map(|r| (r["precision"].as_str().unwrap(), r["requant"].as_str())).collect();
    assert_eq!(kinds, [("float", None), ("int8", Some("shift")), ("int8", Some("q15"))]);
    for run in runs {
        let latency = &run["latency_ms"];
        let [min, median, p90] = ["min", "median", "p90"].map(|k| latency[k].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= p90, "{latency}");
        for figure in ["gmacs", "peak_fraction", "load_ms", "first_run_ms"] {
            assert!(run[figure].as_f64().unwrap() > 0.0, "{figure} of {run}");
        }
        let phases = run["load"].as_array().unwrap();
        assert!(phases.iter().any(|p| p["name"] == "lowering" && p["meanwhile"] == false), "{phases:?}");
        assert_eq!(run["requant_share"].is_null(), run["precision"] == "float");
        let layer = &run["layers"][0];
        assert!(
            layer["name"].is_string()
                && layer["op"].is_string()
                && layer["ms"].is_f64()
                && layer["device"].is_string()
        );
    }
}

#[test]
fn bench_takes_inputs_and_their_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    ndarray_npy::write_npy(file("x.npy"), &ndarray::Array4::<f32>::zeros((3, 1, 28, 28))).unwrap();
    let (m, input, json) = (model(), format!("image={}", file("x.npy")), file("out.json"));
    let words = ["--precision", "float", "--reps", "2", "--json", &json, "-qq"];
    stdout(&qcc(&[&["bench", &m, "--input", &input][..], &words].concat()));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let macs = |report: &serde_json::Value| -> u64 {
        let layers = report["runs"][0]["layers"].as_array().unwrap();
        layers.iter().map(|l| l["macs"].as_u64().unwrap()).sum()
    };
    stdout(&qcc(&[&["bench", &m, "--shape", "image=1x1x28x28"][..], &words].concat()));
    let one: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(macs(&report), 3 * macs(&one));
    assert!(error(&["bench", &m, "--input", "nothing.npy"], 1).contains("nothing.npy"));
}

#[test]
fn graphs_can_be_written_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let m = model();
    let folded = file("folded.onnx");
    stdout(&qcc(&["compile", &m, "--precision", "float", "--emit", "onnx", "-o", &folded]));
    let inspected = stdout(&qcc(&["inspect", &folded]));
    assert!(!inspected.contains("BatchNorm") && inspected.contains("9,345,920"), "{inspected}");
    let qdq = file("qdq.onnx");
    stdout(&qcc(&["compile", &m, "--emit", "onnx", "-o", &qdq, "-qq"]));
    assert!(stdout(&qcc(&["run", &qdq, "--zeros"])).starts_with("logits: f32[1x10]"));
    let imported = stdout(&qcc(&["compile", &m, "--emit", "qir", "--stop-after", "import"]));
    assert!(imported.contains("BatchNorm"), "{imported}");
    let placed = stdout(&qcc(&["compile", &m, "--emit", "qir", "-qq"]));
    assert!(placed.contains("QConv") && placed.contains("int8-jit"), "{placed}");
    let asm = stdout(&qcc(&["compile", &m, "--emit", "asm", "--isa", "x86-64-v2", "-qq"]));
    assert!(asm.contains("pmaddwd"), "no dot product in the listing");
    assert!(stdout(&qcc(&["compile", &m, "--emit", "clif", "-qq"])).contains("function"));
    let explained = stdout(&qcc(&[
        "compile",
        &m,
        "-o",
        &file("a.qcc"),
        "--explain",
        "--print-after",
        "fuse_clamp",
        "-qq",
    ]));
    assert!(explained.contains("folded into") && explained.contains("// after fuse_clamp"), "{explained}");
}

#[test]
fn weights_of_7_bits_are_kept_in_the_file_and_multiplied_as_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("narrow.qcc").display().to_string();
    let m = model();
    let narrow = ["compile", &m, "--weight-bits", "7", "-qq"];
    assert!(stdout(&qcc(&[&narrow[..], &["-o", &file]].concat())).contains("weights of 7 bits"));
    assert!(stdout(&qcc(&["inspect", &file])).contains("weights of 7 bits"));
    assert!(
        stdout(&qcc(&[&narrow[..], &["-o", &file, "--explain"]].concat())).contains("by weights of 7 bits")
    );
    let asm = |bits: &str| {
        let words = ["compile", &m, "--weight-bits", bits, "--emit", "asm", "--isa", "x86-64-v2", "-qq"];
        stdout(&qcc(&words))
    };
    assert!(asm("7").contains("pmaddubsw") && !asm("8").contains("pmaddubsw"));
    assert!(error(&["compile", &m, "--weight-bits", "6"], 2).contains("there are 7 and 8"));
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [a, b] = folders.each_ref().map(|f| std::fs::read(compiled(f.path())).unwrap());
    assert!(a == b, "the files differ");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = command(&["compile", &model(), "--emit", "qir", "-qq"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

#[test]
fn warnings_are_loud_unless_silenced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcc").display().to_string();
    let loud = qcc(&["compile", &model(), "-o", &path]);
    assert!(stderr(&loud).contains("warning: no calibration data"), "{}", stderr(&loud));
    assert!(stdout(&loud).contains("of the statistics of 9 batch norms (without data)"));
    assert!(stderr(&qcc(&["compile", &model(), "-o", &path, "-q"])).contains("warning: "));
    assert_eq!(stderr(&qcc(&["compile", &model(), "-o", &path, "-qq"])), "");
}

#[test]
fn the_zoo_writes_models_of_any_batch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx").display().to_string();
    assert!(error(&["zoo", "lenet", "-o", &path], 2).contains("lenet"));
    stdout(&qcc(&["zoo", "mobilenetv2", "-o", &path]));
    let run = stdout(&qcc(&["run", &path, "--zeros", "--shape", "input=2x3x224x224"]));
    assert!(run.contains("[2x1000]"), "{run}");
}

#[test]
fn a_model_that_takes_pixels_is_fed_with_pixels_and_can_be_tuned() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (pixels, floats, tuned) = (place("pixels.qcc"), place("floats.qcc"), place("tuned.qcc"));
    let (m, images) = (model(), calibration());
    let preprocess = ["--mean", "72.93", "--std", "90.015"];
    let compile = [&["compile", &m, "--calibrate", &images, "--samples", "64"][..], &preprocess].concat();
    let said = stdout(&qcc(&[&compile[..], &["--image-input", "-o", &pixels]].concat()));
    assert!(said.contains("takes pixels as they are (the same bits"), "{said}");
    stdout(&qcc(&[&compile[..], &["-o", &floats]].concat()));

    let test = models().join("fashion_mnist_test.npz").display().to_string();
    let evaluated = |path: &str| {
        let text = stdout(&qcc(&["eval", path, "--images", &test, "--limit", "200", "--reference", &m]));
        text.lines().filter(|l| l.contains('%')).map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(evaluated(&pixels), evaluated(&floats));
    let inspected = stdout(&qcc(&["inspect", &pixels]));
    assert!(inspected.contains("takes pixels") && inspected.contains("image: u8[1x28x28x1]"), "{inspected}");
    let doubled = error(&["run", &pixels, "--input", &test, "--mean", "3"], 2);
    assert!(doubled.contains("normalises them itself"), "{doubled}");
    let one_of = |path: &str| stdout(&qcc(&["run", path, "--input", &test, "--top", "3"]));
    assert_eq!(one_of(&pixels), one_of(&floats));

    let said = stdout(&qcc(&["compile", &pixels, "--tune", "--tune-seconds", "1", "-o", &tuned]));
    assert!(said.starts_with("tuned ") && said.contains("different): timed "), "{said}");
    assert_eq!(one_of(&tuned), one_of(&pixels));
    assert!(error(&["compile", &m, "--tune", "--emit", "qir"], 2).contains("--emit qcc"));
    error(&["compile", &m, "--tune-seconds", "3"], 2);
    let refused = error(&["compile", &m, "--image-input", "--mean", "1,2,3", "-qq"], 2);
    assert!(refused.contains("3 means and 0 deviations for 1 channels"), "{refused}");
}

#[test]
fn lint_tells_what_is_wrong_and_fails_where_that_is_denied() {
    let (m, images) = (model(), calibration());
    let right = ["--calibrate", &images, "--samples", "64", "--mean", "72.93", "--std", "90.015"];
    let sound = stdout(&qcc(&[&["lint", &m][..], &right].concat()));
    assert_eq!(sound, format!("{m}: 0 warnings, 0 hints\n"));
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("found.json").display().to_string();
    let wrong = ["lint", &m, "--calibrate", &images, "--samples", "64", "--json", &json];
    let output = qcc(&wrong);
    let text = stdout(&output);
    assert!(text.starts_with("warning: input `image`: samples are not normalised"), "{text}");
    assert!(text.contains("give --mean ") && text.ends_with(": 1 warning, 0 hints\n"), "{text}");
    assert_eq!(stderr(&output), "", "findings are the result, not told beside it");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(found["findings"][0]["rule"], "input-normalisation");
    assert_eq!(found["findings"][0]["subject"]["input"], "image");
    for (denied, code) in [("all", 1), ("input-normalisation", 1), ("samples-too-few", 0)] {
        let output = qcc(&[&wrong[..], &["--deny", denied]].concat());
        assert_eq!(output.status.code(), Some(code), "{denied}");
        assert_eq!(stderr(&output).contains("error: 1 of the findings"), code == 1);
    }
    let allowed = stdout(&qcc(&[&wrong[..], &["--allow", "input-normalisation"]].concat()));
    assert!(allowed.ends_with(": 0 warnings, 0 hints\n"), "{allowed}");
    assert!(error(&["lint", &m, "--deny", "nothing"], 2).contains("'nothing'"));

    // A compilation warns of it, and the file remembers.
    let path = folder.path().join("a.qcc").display().to_string();
    let compiled = qcc(&["compile", &m, "--calibrate", &images, "--samples", "64", "-o", &path]);
    assert!(stderr(&compiled).contains("warning: input `image`: samples are not normalised"));
    assert!(stdout(&qcc(&["lint", &path])).contains("input-normalisation"));
}

#[test]
fn batch_norms_are_recomputed_in_any_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcc").display().to_string();
    let (m, images) = (model(), calibration());
    let samples = ["--reestimate-bn", "--calibrate", &images, "--samples", "32", "--repair", "none"];
    let samples = [&samples[..], &["--mean", "72.93", "--std", "90.015"]].concat();
    let float = ["--precision", "float"];
    let compiled = stdout(&qcc(&[&["compile", &m, "-o", &path][..], &samples[..], &float].concat()));
    assert!(compiled.contains("float, statistics of 9 batch norms recomputed"), "{compiled}");
    let explained = stdout(&qcc(&[&["compile", &m, "-o", &path, "--explain"][..], &samples[..]].concat()));
    assert!(explained.contains("reestimate_batch_norms: 9\n"), "{explained}");
    assert!(explained.contains("mean and variance of 32 samples"), "{explained}");
    let test = models().join("fashion_mnist_test.npz").display().to_string();
    let run = |path: &str, more: &[&str]| {
        stdout(&qcc(&[&["run", path, "--input", &test, "--top", "3"], more].concat()))
    };
    assert_eq!(run(&m, &[&samples[..], &["--precision", "int8"]].concat()), run(&path, &[]));
    let evaluated =
        stdout(&qcc(&[&["eval", &m, "--images", &test, "--limit", "100"][..], &samples[..]].concat()));
    assert!(evaluated.contains("int8 q15"), "{evaluated}");
    let without = error(&["compile", &m, "--reestimate-bn", "-o", &path], 1);
    assert!(without.contains("--calibrate"), "{without}");
}

#[test]
fn a_report_is_a_page_and_facts_and_two_make_a_comparison() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let images = models().join("fashion_mnist_test.npz").display().to_string();
    let report = |page: &str, json: &str, more: &[&str]| {
        let (model, calibration) = (model(), calibration());
        let data = ["report", &model, "--calibrate", &calibration, "--images", &images, "--samples", "32"];
        let quick =
            ["--limit", "50", "--report-samples", "4", "--reps", "2", "--mean", "72.93", "--std", "90.015"];
        let output = qcc(&[&data[..], &quick, &["-o", page, "--json", json], more].concat());
        assert_eq!(stderr(&output), "");
        stdout(&output)
    };
    let (before, after) = (path("before.json"), path("after.json"));
    let text = report(&path("before.html"), &before, &[]);
    assert!(
        text.contains("int8 q15 is ") && text.contains("of 50 images") && text.contains("before.html"),
        "{text}"
    );
    let page = std::fs::read_to_string(path("before.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("fashion_resnet8"));
    report(&path("after.html"), &after, &["--weight-bits", "7", "--requant", "shift"]);
    let compare = path("compare.html");
    let text = stdout(&qcc(&["report", "--compare", &before, &after, "-o", &compare]));
    assert!(text.contains("What changed most is `"), "{text}");
    let page = std::fs::read_to_string(&compare).unwrap();
    assert!(page.contains("int8 q15") && page.contains("int8 shift") && page.contains("7 bits"));

    // What cannot be, and what is left where it was.
    std::fs::write(path("other.json"), "{\"format\": 1}").unwrap();
    let wrong = error(&["report", "--compare", &before, &path("other.json"), "-o", &compare], 1);
    assert!(wrong.contains("other.json") && wrong.contains("no facts of `qcc report --json`"), "{wrong}");
    assert_eq!(std::fs::read_to_string(&compare).unwrap(), page);
    error(&["report", "--compare", &before, &after], 2);
    error(&["report"], 2);
    let program = compiled(folder.path());
    assert!(error(&["report", &program], 2).contains("give the .onnx"));
    let nowhere = error(
        &[
            "report",
            &model(),
            "--reps",
            "1",
            "--report-samples",
            "1",
            "-q",
            "-q",
            "-o",
            "/no/such/folder/x.html",
        ],
        1,
    );
    assert!(nowhere.contains("/no/such/folder/x.html"), "{nowhere}");
}

#[test]
fn diff_tells_where_two_sides_part() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (m, images) = (model(), calibration());
    let test = models().join("fashion_mnist_test.npz").display().to_string();
    let preprocess = ["--mean", "72.93", "--std", "90.015"];
    let calibrated = ["--images", &test, "--limit", "4", "--calibrate", &images, "--samples", "16"];
    let both = [&["diff", &m][..], &calibrated, &preprocess].concat();
    let json = place("d.json");
    let text = stdout(&qcc(&[&both[..], &["--json", &json, "--check"]].concat()));
    assert!(text.contains("(int8) against ") && text.contains("they do not part"), "{text}");
    assert!(text.contains("/stem/stem.2/Relu_output_0") && text.contains("most noise comes in at"), "{text}");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!((found["samples"].as_u64(), found["tensors"][0]["name"].as_str()), (Some(4), Some("image")));
    let modes = [&both[..], &["--precision", "int8", "--requant", "q15,shift"]].concat();
    assert!(stdout(&qcc(&modes)).contains("(int8 shift) against "));
    // What is asked for cannot be met: they part, and a script hears of it.
    let parted = qcc(&[&both[..], &["--threshold", "200", "--check"]].concat());
    assert_eq!(parted.status.code(), Some(1));
    assert!(stderr(&parted).contains("error: they part at `image`"), "{}", stderr(&parted));

    // Results of a run, as another runtime would have stored them.
    let out = place("out");
    stdout(&qcc(&[&["run", &m, "--input", &test, "--output-dir", &out][..], &preprocess].concat()));
    let stored = folder.path().join("out/logits.npy").display().to_string();
    let same = [&["diff", &m, &stored, "--input", &test][..], &preprocess].concat();
    assert!(stdout(&qcc(&same)).contains("they do not part"), "{}", stdout(&qcc(&same)));
    let noise = qcc(&["diff", &m, &m]);
    assert!(stdout(&noise).contains("they do not part") && stderr(&noise).contains("compared on noise"));
    assert!(error(&["diff", &stored], 2).contains("one side at least must be a model"));
    let path = compiled(folder.path());
    assert!(error(&["diff", &m, &path], 2).contains("give the .onnx"));
    assert!(error(&["diff", &m, "--image-input"], 2).contains("--image-input"));
}
