//! File tests: graphs in the text form under `filetests/`, each with commands and expectations in `;` lines.
//!
//! ```text
//! ; test run                 the graph on the interpreter and, compiled, on every tier with one and two threads
//! ; test pass NAME           the graph after one pass of `prepare`; same results as before it
//! ; test quantize MODE       the whole int8 pipeline, calibrated on the test's inputs; same bits on every tier
//! ; test quantize MODE 7     the same with weights of 7 bits
//! ; test image mean=M std=S bgr   the int8 pipeline for a model that takes pixels; as far from the float model on
//!                            normalised images as `quantize` allows, same bits on every tier
//! ; test error               the graph is refused, with the text of a `check:` in the message
//! ; tolerance 1e-5           floats may differ by this share of the largest magnitude (default 1e-5; `exact` for none)
//! ; steps 80                 `quantize`: int8 may differ from float by this many output steps (default 4)
//! ; interpreted NAME         this node runs in the interpreter; any other that does is a failure
//! ; check: TEXT              this text is in the printed graph, behind the previous check's
//! ; not: TEXT                this text is not in it
//! ; note: TEXT               this text is in a note that a pass made
//! ```
//!
//! Every graph must also print and parse back to itself.

use libtest_mimic::{Arguments, Failed, Trial};
use qcc_ir::{DType, Graph, Stage, Tensor, TensorType, interpreter, numerics::RequantMode, text, verify};
use qcc_passes::{Calibrator, Collector, ImageInput, Options, Precision, Report, WeightBits};
use std::path::{Path, PathBuf};

fn main() {
    let arguments = Arguments::from_args();
    let root = qcc_tests::repository().join("tests/filetests");
    let mut files = vec![];
    collect(&root, &mut files);
    files.sort();
    assert!(!files.is_empty(), "no file tests under {}", root.display());
    let trials = files.into_iter().map(|file| {
        let name = file.strip_prefix(&root).unwrap_or(&file).with_extension("");
        Trial::test(name.to_string_lossy().into_owned(), move || run_file(&file))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "qir") {
            files.push(path);
        }
    }
}

/// The commands and expectations of one file.
struct Test<'a> {
    lines: Vec<&'a str>,
}

impl<'a> Test<'a> {
    fn new(source: &'a str) -> Test<'a> {
        Test { lines: source.lines().filter_map(|l| l.strip_prefix(';')).map(str::trim).collect() }
    }

    /// What follows each line that begins with `key`.
    fn all(&self, key: &str) -> impl Iterator<Item = &'a str> {
        let key = key.to_string();
        self.lines.iter().filter_map(move |l| l.strip_prefix(&key)).map(str::trim)
    }

    fn tolerance(&self) -> Result<f32, Failed> {
        match self.all("tolerance ").next() {
            None => Ok(1e-5),
            Some("exact") => Ok(0.0),
            Some(t) => Ok(t.parse()?),
        }
    }

    /// Holds the `check:` and `not:` lines against a text.
    fn check(&self, text: &str) -> Result<(), Failed> {
        let mut rest = text;
        for expected in self.all("check:") {
            let Some(at) = rest.find(expected) else {
                return Err(format!("not found (in this order): {expected}\n{text}").into());
            };
            rest = &rest[at + expected.len()..];
        }
        match self.all("not:").find(|t| text.contains(t)) {
            Some(unwanted) => Err(format!("found: {unwanted}\n{text}").into()),
            None => Ok(()),
        }
    }

    fn check_notes(&self, report: &Report) -> Result<(), Failed> {
        let notes: Vec<String> = report
            .records
            .iter()
            .flat_map(|r| r.notes.iter().map(|n| format!("{}: {}: {}", r.pass, n.node, n.text)))
            .collect();
        match self.all("note:").find(|t| !notes.iter().any(|n| n.contains(t))) {
            Some(missing) => Err(format!("no note says: {missing}\n{}", notes.join("\n")).into()),
            None => Ok(()),
        }
    }
}

fn run_file(file: &Path) -> Result<(), Failed> {
    let source = std::fs::read_to_string(file)?;
    let test = Test::new(&source);
    let commands: Vec<&str> = test.all("test ").collect();
    if commands.is_empty() {
        return Err("the file has no `; test` line".into());
    }
    let parsed = text::parse(&source).map_err(|e| e.to_string());
    if commands == ["error"] {
        let refusal = match parsed {
            Err(e) => e,
            Ok(graph) => match verify(&graph) {
                Err(e) => e.to_string(),
                Ok(()) => return Err("the graph was accepted".into()),
            },
        };
        return test.check(&refusal);
    }
    let graph = parsed?;
    verify(&graph)?;
    let (printed, blobs) = text::print_with_blobs(&graph);
    let again = text::parse_with_blobs(&printed, &blobs)?;
    if text::print_with_blobs(&again) != (printed.clone(), blobs) {
        return Err(format!("does not print back to itself:\n{printed}").into());
    }
    for command in commands {
        match command.split_once(' ').unwrap_or((command, "")) {
            ("run", "") => run(&test, &graph)?,
            ("pass", name) => pass(&test, &graph, name)?,
            ("quantize", given) => {
                let (mode, bits) = given.split_once(' ').unwrap_or((given, "8"));
                let mode = RequantMode::from_name(mode).ok_or_else(|| format!("no mode `{mode}`"))?;
                let weight_bits = WeightBits::ALL.into_iter().find(|b| b.count().to_string() == bits);
                let weight_bits = weight_bits.ok_or_else(|| format!("no weights of {bits} bits"))?;
                quantize(&test, &graph, &Options { weight_bits, ..options(Precision::Int8, mode) })?;
            }
            ("image", given) => {
                let image_input = Some(image_input(given)?);
                let options = Options { image_input, ..options(Precision::Int8, RequantMode::Q15) };
                quantize(&test, &graph, &options)?;
            }
            _ => return Err(format!("no command `{command}`").into()),
        }
    }
    Ok(())
}

fn options(precision: Precision, requant: RequantMode) -> Options {
    Options { precision, requant, capability: qcc_codegen::capability, ..Options::default() }
}

fn run(test: &Test, graph: &Graph) -> Result<(), Failed> {
    let inputs = qcc_tests::inputs(graph, 1.0);
    let expected = interpreter::run(graph, &inputs)?;
    let mut placed = graph.clone();
    if placed.stage != Stage::Placed {
        qcc_passes::lower(&mut placed, &options(Precision::Float, RequantMode::Q15), &mut |_, _| {})?;
    }
    on_every_tier(test, &placed, &inputs, &expected, test.tolerance()?)
}

/// Integers bit for bit, floats within the tolerance, two threads bit for bit as one.
fn on_every_tier(
    test: &Test,
    placed: &Graph,
    inputs: &[Tensor],
    expected: &[Tensor],
    tolerance: f32,
) -> Result<(), Failed> {
    for tier in qcc_tests::tiers() {
        let model = qcc_tests::compile(placed, tier)?;
        for step in model.steps().iter().filter(|s| s.kernel == "interpreter") {
            if !test.all("interpreted ").any(|name| name == step.name) {
                return Err(format!("{tier}: `{}` ({}) runs in the interpreter", step.name, step.op).into());
            }
        }
        let got = qcc_tests::run(&model, inputs, 1)?;
        same(expected, &got, tolerance).map_err(|e| format!("{tier}: {e}"))?;
        if qcc_tests::run(&model, inputs, 2)? != got {
            return Err(format!("{tier}: two threads give other bits than one").into());
        }
    }
    Ok(())
}

fn same(expected: &[Tensor], got: &[Tensor], tolerance: f32) -> Result<(), String> {
    for (i, (e, g)) in expected.iter().zip(got).enumerate() {
        if e.ty() != g.ty() {
            return Err(format!("output {i} is {:?}, not {:?}", g.ty(), e.ty()));
        }
        if tolerance > 0.0 && e.dtype() == DType::F32 {
            let floats = |t: &Tensor| t.to_f32().unwrap_or_default();
            let error = qcc_tests::relative_error(&floats(g), &floats(e));
            if error.is_nan() || error > tolerance {
                return Err(format!("output {i} differs by {error} of its magnitude"));
            }
        } else if e != g {
            let differing = e.bytes().iter().zip(g.bytes()).filter(|(a, b)| a != b).count();
            return Err(format!("output {i} differs in {differing} of {} bytes", e.bytes().len()));
        }
    }
    Ok(())
}

fn pass(test: &Test, graph: &Graph, name: &str) -> Result<(), Failed> {
    let mut graph = graph.clone();
    let inputs = qcc_tests::inputs(&graph, 1.0);
    let expected = interpreter::run(&graph, &inputs)?;
    let mut after = None;
    let report =
        qcc_passes::prepare(&mut graph, &options(Precision::Float, RequantMode::Q15), &mut |pass, graph| {
            if pass.name == name {
                after = Some(graph.clone());
            }
        })?;
    let after = after.ok_or_else(|| format!("`prepare` has no pass `{name}`"))?;
    test.check(&text::print(&after))?;
    test.check_notes(&report)?;
    Ok(same(&expected, &interpreter::run(&after, &inputs)?, test.tolerance()?)?)
}

/// `mean=1,2,3 std=4 bgr`.
fn image_input(text: &str) -> Result<ImageInput, Failed> {
    let mut image = ImageInput::default();
    let numbers = |list: &str| list.split(',').map(str::parse).collect::<Result<Vec<f32>, _>>();
    for word in text.split_whitespace() {
        match word.split_once('=') {
            Some(("mean", list)) => image.mean = numbers(list)?,
            Some(("std", list)) => image.std = numbers(list)?,
            None if word == "bgr" => image.bgr = true,
            _ => return Err(format!("`{word}` says nothing of an image").into()),
        }
    }
    Ok(image)
}

/// What a model that takes normalised images is given for pixels `[1, H, W, C]`.
fn normalised(pixels: &Tensor, image: &ImageInput, wanted: &TensorType) -> Result<Tensor, Failed> {
    let bytes = pixels.as_slice::<u8>()?;
    let channels = pixels.shape()[3];
    let of =
        |list: &[f32], c: usize, none: f32| list.get(c.min(list.len().max(1) - 1)).copied().unwrap_or(none);
    let value = |pixel: usize, c: usize| {
        let source = if image.bgr { channels - 1 - c } else { c };
        let x = bytes[pixel * channels + source];
        (f32::from(x) - of(&image.mean, c, 0.0)) / of(&image.std, c, 1.0)
    };
    let area = bytes.len() / channels;
    let elements = match wanted.shape[3] == channels {
        true => (0..bytes.len()).map(|i| value(i / channels, i % channels)).collect(),
        false => (0..bytes.len()).map(|i| value(i % area, i / area)).collect(),
    };
    Ok(Tensor::from_vec(wanted.shape.clone(), elements)?)
}

fn quantize(test: &Test, original: &Graph, options: &Options) -> Result<(), Failed> {
    let mut graph = original.clone();
    let mut report = qcc_passes::prepare(&mut graph, options, &mut |_, _| {})?;
    let inputs = qcc_tests::inputs(&graph, 1.0);
    if let (Some(image), [pixels]) = (&options.image_input, &inputs[..]) {
        // Before anything is quantized, a model that takes pixels is the model after preprocessing.
        let ty = original.ty(original.inputs()[0].out());
        let expected = interpreter::run(original, &[normalised(pixels, image, ty)?])?;
        same(&expected, &interpreter::run(&graph, &inputs)?, test.tolerance()?)?;
    }
    let mut collector = Collector::new(&graph, Calibrator::MinMax);
    let float = interpreter::run_observed(&graph, &inputs, &mut |value, tensor| {
        if let Ok(elements) = tensor.as_slice::<f32>() {
            collector.record(value, 0, elements);
        }
    })?;
    report = report.then(qcc_passes::quantize(&mut graph, &collector.finish(), options, &mut |_, _| {})?);
    let report = report.then(qcc_passes::lower(&mut graph, options, &mut |_, _| {})?);
    test.check(&text::print(&graph))?;
    test.check_notes(&report)?;
    let int8 = interpreter::run(&graph, &inputs)?;
    let steps: f32 = test.all("steps ").next().unwrap_or("4").parse()?;
    for (i, (f, q)) in float.iter().zip(&int8).enumerate() {
        let (f, q) = (f.to_f32().unwrap_or_default(), q.to_f32().unwrap_or_default());
        let span = f.iter().fold(0f32, |m, &x| m.max(x)) - f.iter().fold(0f32, |m, &x| m.min(x));
        let largest = f.iter().zip(&q).fold(0f32, |m, (f, q)| m.max((f - q).abs()));
        if largest > span / 255.0 * steps {
            return Err(format!("output {i}: int8 is {} steps from float", largest / (span / 255.0)).into());
        }
    }
    on_every_tier(test, &graph, &inputs, &int8, 0.0)
}
