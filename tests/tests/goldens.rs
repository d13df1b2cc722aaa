//! Golden outputs of real models: the bundled one always, those of the shared folder where it is there.
//!
//! * *float*: outputs made once by ONNX Runtime (`goldens/make_float_goldens.py`), for the interpreter and for the float
//!   code of every tier, within 1e-4 of the largest magnitude.
//! * *int8*: ranges and outputs made once by the reference interpreter, for the int8 code of every tier, every
//!   requantization mode, one and two threads, bit for bit. `QCC_BLESS=1` makes them anew: do so only where the
//!   numerics were meant to change, and say why in the commit.

use libtest_mimic::{Arguments, Failed, Trial};
use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::{NpzReader, NpzWriter};
use qcc_ir::{
    Graph, Tensor, interpreter,
    numerics::RequantMode,
    onnx::{Bindings, Model},
};
use qcc_passes::{Calibrator, Collector, Options, Precision, Ranges};
use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// Models above this many multiply-accumulates are interpreted only where long tests are asked for.
const INTERPRETED_MACS: u64 = 20_000_000;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = vec![];
    for model in models() {
        let name = model.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let path = model.clone();
        trials.push(Trial::test(format!("float::{name}"), move || float(&path)));
        trials.push(Trial::test(format!("int8::{name}"), move || int8(&model)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// The bundled model, and those of the shared folder that have goldens.
fn models() -> Vec<PathBuf> {
    let bundled = qcc_tests::repository().join("models/fashion_resnet8.onnx");
    let mut models = vec![bundled.clone()];
    if let Some(shared) = qcc_tests::shared() {
        let entries = std::fs::read_dir(shared.join("models")).into_iter().flatten().flatten();
        let others = entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "onnx"));
        models.extend(
            others.filter(|p| p.file_name() != bundled.file_name() && golden(p, "float.npz").is_file()),
        );
        models.sort();
    }
    models
}

/// The golden file of a model with this ending.
fn golden(model: &Path, ending: &str) -> PathBuf {
    let stem = model.file_stem().unwrap_or_default().to_string_lossy();
    qcc_tests::repository().join("tests/goldens").join(format!("{stem}.{ending}"))
}

type Npz = NpzReader<File>;

fn array(npz: &mut Npz, name: &str) -> Result<Vec<f32>, Failed> {
    let a: ArrayD<f32> = npz.by_name::<OwnedRepr<f32>, IxDyn>(name)?;
    Ok(a.into_raw_vec_and_offset().0)
}

/// The graph of a model for the input shapes of its float goldens or, with a batch, for that batch.
fn import(path: &Path, npz: &mut Npz, batch: Option<usize>) -> Result<Graph, Failed> {
    let model = Model::load(path)?;
    let mut bindings = Bindings::default();
    for input in model.inputs() {
        let dims: ArrayD<i64> = npz.by_name(&format!("__shape__{}", input.name))?;
        let mut dims: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
        if let (Some(first), Some(batch)) = (dims.first_mut(), batch) {
            *first = batch;
        }
        bindings.shapes.insert(input.name.clone(), dims);
    }
    Ok(model.graph(&bindings)?)
}

fn macs(graph: &Graph) -> u64 {
    graph.nodes().map(|(id, _)| graph.macs(id)).sum()
}

/// Whether a graph is small enough for the interpreter in a test run.
fn is_interpreted(graph: &Graph) -> bool {
    macs(graph) <= INTERPRETED_MACS || qcc_tests::long_tests()
}

fn float(path: &Path) -> Result<(), Failed> {
    let mut npz = NpzReader::new(File::open(golden(path, "float.npz"))?)?;
    let scale = array(&mut npz, "__scale__")?[0];
    let graph = import(path, &mut npz, None)?;
    let inputs = qcc_tests::inputs(&graph, scale);
    let mut expected = vec![];
    for output in graph.outputs() {
        expected.push(array(&mut npz, &output.name)?);
    }
    let check = |who: &str, outputs: &[Tensor]| -> Result<(), Failed> {
        for ((output, got), expected) in graph.outputs().iter().zip(outputs).zip(&expected) {
            let error = qcc_tests::relative_error(got.as_slice::<f32>()?, expected);
            if error.is_nan() || error > 1e-4 {
                return Err(
                    format!("{who}: output {} differs by {error} of its magnitude", output.name).into()
                );
            }
        }
        Ok(())
    };
    if is_interpreted(&graph) {
        check("interpreter", &interpreter::run(&graph, &inputs)?)?;
    }
    let options = Options { precision: Precision::Float, ..options(RequantMode::Q15) };
    let mut placed = graph.clone();
    qcc_passes::prepare(&mut placed, &options, &mut |_, _| {})?;
    qcc_passes::lower(&mut placed, &options, &mut |_, _| {})?;
    for tier in qcc_tests::tiers() {
        let model = qcc_tests::compile(&placed, tier)?;
        let one = qcc_tests::run(&model, &inputs, 1)?;
        check(tier.name, &one)?;
        if qcc_tests::run(&model, &inputs, 2)? != one {
            return Err(format!("{tier}: two threads give other bits than one").into());
        }
    }
    Ok(())
}

fn options(requant: RequantMode) -> Options {
    Options { requant, capability: qcc_codegen::capability, ..Options::default() }
}

/// The float graph for one sample, ready for calibration.
fn prepared(path: &Path) -> Result<(Graph, Vec<Tensor>), Failed> {
    let mut npz = NpzReader::new(File::open(golden(path, "float.npz"))?)?;
    let scale = array(&mut npz, "__scale__")?[0];
    let mut graph = import(path, &mut npz, Some(1))?;
    let inputs = qcc_tests::inputs(&graph, scale);
    qcc_passes::prepare(&mut graph, &options(RequantMode::Q15), &mut |_, _| {})?;
    Ok((graph, inputs))
}

fn quantized(prepared: &Graph, ranges: &Ranges, mode: RequantMode) -> Result<Graph, Failed> {
    let mut graph = prepared.clone();
    qcc_passes::quantize(&mut graph, ranges, &options(mode), &mut |_, _| {})?;
    qcc_passes::lower(&mut graph, &options(mode), &mut |_, _| {})?;
    Ok(graph)
}

fn int8(path: &Path) -> Result<(), Failed> {
    if std::env::var_os("QCC_BLESS").is_some() {
        bless(path)?;
    }
    let (prepared, inputs) = prepared(path)?;
    let ranges: Ranges = serde_json::from_reader(File::open(golden(path, "ranges.json"))?)?;
    let mut npz = NpzReader::new(File::open(golden(path, "int8.npz"))?)?;
    for mode in RequantMode::ALL {
        let graph = quantized(&prepared, &ranges, mode)?;
        let mut expected = vec![];
        for output in graph.outputs() {
            let values = array(&mut npz, &format!("{mode}.{}", output.name))?;
            expected.push(Tensor::from_vec(graph.shape(output.value).clone(), values)?);
        }
        let check = |who: &str, got: Vec<Tensor>| -> Result<(), Failed> {
            match got == expected {
                true => Ok(()),
                false => Err(format!("{mode}: {who} gives other bits than the golden").into()),
            }
        };
        // Every mode on the interpreter where that is quick, the default one where it is not.
        let quick = macs(&graph) <= INTERPRETED_MACS;
        if quick || (qcc_tests::long_tests() && mode == Options::default().requant) {
            check("the interpreter", interpreter::run(&graph, &inputs)?)?;
        }
        for tier in qcc_tests::tiers() {
            let model = qcc_tests::compile(&graph, tier)?;
            check(tier.name, qcc_tests::run(&model, &inputs, 1)?)?;
            check(&format!("{tier} with two threads"), qcc_tests::run(&model, &inputs, 2)?)?;
        }
    }
    Ok(())
}

/// Makes ranges and outputs with the interpreter alone, so that they depend on no tier.
fn bless(path: &Path) -> Result<(), Failed> {
    let (prepared, inputs) = prepared(path)?;
    let mut collector = Collector::new(&prepared, Calibrator::MinMax);
    interpreter::run_observed(&prepared, &inputs, &mut |value, tensor| {
        if let Ok(elements) = tensor.as_slice::<f32>() {
            collector.record(value, 0, elements);
        }
    })?;
    let ranges = collector.finish();
    serde_json::to_writer_pretty(File::create(golden(path, "ranges.json"))?, &ranges)?;
    let mut npz = NpzWriter::new_compressed(File::create(golden(path, "int8.npz"))?);
    for mode in RequantMode::ALL {
        let graph = quantized(&prepared, &ranges, mode)?;
        for (output, tensor) in graph.outputs().iter().zip(interpreter::run(&graph, &inputs)?) {
            npz.add_array(format!("{mode}.{}", output.name), &tensor.view::<f32>()?)?;
        }
    }
    npz.finish()?;
    Ok(())
}
