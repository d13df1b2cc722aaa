//! Reference data of models: the form of ONNX's own backend tests.
//!
//! A case is a folder with `model.onnx` and folders `test_data_set_0`, `test_data_set_1` and so on, each with
//! `input_0.pb`, `output_0.pb` and so on. The rules are those of ONNX's runner: number, element type and shape of the outputs
//! are equal; floats are within `atol + rtol * |expected|`; integers and truth values are equal.

use crate::{Backend, DynamicModel};
use qcc_ir::{
    DType, Tensor,
    onnx::{self, Value, ValueKind},
};
use std::{
    error::Error,
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

/// How far floats may be from what is expected.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tolerance {
    /// Share of the expected value; for bf16 at least 2^-6.
    pub relative: f64,
    /// Distance.
    pub absolute: f64,
}

impl Default for Tolerance {
    /// What ONNX's runner uses.
    fn default() -> Tolerance {
        Tolerance { relative: 1e-3, absolute: 1e-7 }
    }
}

/// A model with reference data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    /// Name of its folder.
    pub name: String,
    /// The folder.
    pub folder: PathBuf,
}

impl Case {
    /// All cases at or below a folder, by name.
    ///
    /// # Errors
    /// Where a folder cannot be read.
    pub fn find(folder: &Path) -> std::io::Result<Vec<Case>> {
        if folder.join("model.onnx").is_file() {
            let full = folder.canonicalize()?;
            let name = full.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            return Ok(vec![Case { name, folder: folder.into() }]);
        }
        let mut cases = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            // Links may lead back.
            if entry.file_type()?.is_dir() {
                cases.extend(Case::find(&entry.path())?);
            }
        }
        cases.sort_by(|a, b| (&a.name, &a.folder).cmp(&(&b.name, &b.folder)));
        Ok(cases)
    }

    /// Runs all data sets of the case, one after the other. The model may take this many bytes of memory.
    ///
    /// # Errors
    /// The reason why it fails, in one sentence.
    pub fn run(&self, backend: &Backend, tolerance: Tolerance, max_memory: u64) -> Result<(), String> {
        let run = || self.run_all(backend, tolerance, max_memory).map_err(|e| chain(&*e));
        // A defect of qcc is one failed case, not the end of all.
        match panic::catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => result,
            Err(payload) => {
                let message = payload.downcast_ref::<String>().map(String::as_str);
                let message = message.or(payload.downcast_ref::<&str>().copied());
                Err(format!("panic: {}", message.unwrap_or("no message")))
            }
        }
    }

    fn run_all(
        &self,
        backend: &Backend,
        tolerance: Tolerance,
        max_memory: u64,
    ) -> Result<(), Box<dyn Error>> {
        let path = self.folder.join("model.onnx");
        let model = DynamicModel::load(&path, backend.clone(), max_memory)?;
        let mut sets = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("test_data_set_") {
                sets.push(entry.path());
            }
        }
        sets.sort();
        if sets.is_empty() {
            return Err("there is no test_data_set_0".into());
        }
        for set in sets {
            let kinds: Vec<ValueKind> = model.model().inputs().iter().map(|i| i.kind).collect();
            let inputs = values(&set, "input", &kinds)?;
            let expected = values(&set, "output", model.model().output_kinds())?;
            let outputs = model.run_values(&inputs)?.outputs;
            if outputs.len() != expected.len() {
                return Err(format!("{} outputs instead of {}", outputs.len(), expected.len()).into());
            }
            let names = model.model().outputs();
            for ((name, got), expected) in names.zip(&outputs).zip(&expected) {
                compare_values(got, expected, tolerance).map_err(|why| format!("output `{name}`: {why}"))?;
            }
        }
        Ok(())
    }
}

/// An error and its sources, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = e.source();
    }
    text
}

/// `what_0.pb`, `what_1.pb` and so on, as many as there are.
fn values(folder: &Path, what: &str, kinds: &[ValueKind]) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut values = Vec::new();
    loop {
        let path = folder.join(format!("{what}_{}.pb", values.len()));
        if !path.exists() {
            return Ok(values);
        }
        let kind = kinds.get(values.len()).copied().unwrap_or(ValueKind::TENSOR);
        values.push(onnx::read_value(&path, kind)?);
    }
}

/// Why a value is not the one that was expected.
///
/// # Errors
/// The reason, in one phrase.
pub fn compare_values(got: &Value, expected: &Value, tolerance: Tolerance) -> Result<(), String> {
    match (got, expected) {
        (Value::Tensor(got), Value::Tensor(expected)) => compare(got, expected, tolerance),
        (Value::Sequence(got), Value::Sequence(expected)) if got.len() == expected.len() => {
            let mut pairs = got.iter().zip(expected).enumerate();
            let differ =
                |(i, (a, b))| compare_values(a, b, tolerance).map_err(|why| format!("element {i}: {why}"));
            pairs.try_for_each(differ)
        }
        (got, expected) if got == expected => Ok(()),
        _ => Err(format!("{} instead of {}", described(got), described(expected))),
    }
}

/// A value in a few words.
fn described(value: &Value) -> String {
    match value {
        Value::Tensor(t) => t.ty().to_string(),
        Value::Strings(s) => {
            format!("texts {:?} {:?}", s.shape(), s.elements().iter().take(4).collect::<Vec<_>>())
        }
        Value::Sequence(all) => format!("a sequence of {}", all.len()),
        Value::Map(entries) => format!("a map of {}", entries.len()),
        Value::Absent => "nothing".into(),
    }
}

/// Why a tensor is not the one that was expected.
///
/// # Errors
/// The reason, in one phrase.
pub fn compare(got: &Tensor, expected: &Tensor, tolerance: Tolerance) -> Result<(), String> {
    if got.dtype() != expected.dtype() || got.shape() != expected.shape() {
        return Err(format!("{} instead of {}", got.ty(), expected.ty()));
    }
    let dtype = got.dtype();
    let numbers = (got.to_f64(), expected.to_f64());
    let is_close = |i: usize| {
        if !dtype.is_float() {
            // As they are: 64 bits are more than `f64` tells apart.
            let element = i * dtype.size()..(i + 1) * dtype.size();
            return got.bytes()[element.clone()] == expected.bytes()[element];
        }
        let (a, b) = (numbers.0[i], numbers.1[i]);
        let least = if dtype == DType::BF16 { 1.0 / 64.0 } else { 0.0 };
        let most = tolerance.absolute + tolerance.relative.max(least) * b.abs();
        a == b || a.is_nan() && b.is_nan() || b.is_finite() && (a - b).abs() <= most
    };
    let wrong: Vec<usize> = (0..got.shape().elements()).filter(|&i| !is_close(i)).collect();
    let (got, expected) = &numbers;
    match wrong.first() {
        None => Ok(()),
        Some(&i) => Err(format!(
            "{} of {} elements differ, the first at {i}: {} instead of {}",
            wrong.len(),
            got.len(),
            got[i],
            expected[i]
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::Shape;

    fn f32s(values: &[f32]) -> Tensor {
        Tensor::from_vec(Shape::new([values.len()]).unwrap(), values.to_vec()).unwrap()
    }

    #[test]
    fn floats_are_compared_as_numpy_does_and_integers_exactly() {
        let rules = Tolerance::default();
        let same = |a: &[f32], b: &[f32]| compare(&f32s(a), &f32s(b), rules).is_ok();
        assert!(same(&[1.0, f32::NAN, f32::INFINITY], &[1.0009, f32::NAN, f32::INFINITY]));
        assert!(!same(&[1.0], &[1.002]) && !same(&[f32::INFINITY], &[f32::NEG_INFINITY]));
        assert!(!same(&[f32::NAN], &[0.0]) && !same(&[1.0], &[f32::INFINITY]));
        let ints = |x: i64| Tensor::scalar(x);
        assert!(compare(&ints(1 << 60), &ints((1 << 60) + 1), rules).is_err());
        assert!(compare(&ints(7), &ints(7), rules).is_ok());
        let why = compare(&f32s(&[1.0]), &f32s(&[1.0, 2.0]), rules).unwrap_err();
        assert_eq!(why, "f32[1] instead of f32[2]");
    }
}
