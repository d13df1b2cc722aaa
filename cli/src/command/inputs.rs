//! The inputs of a run, from the files of a command line.

use crate::failure::Failure;
use qcc_runtime::{
    Compiler, DynamicModel, Error, Preprocess, Samples, TensorInfo,
    ir::{Tensor, memory::MemoryError, onnx::InputInfo},
    read_arrays, read_npy,
};
use std::path::{Path, PathBuf};

/// Where inputs come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Zeros, in all of them.
    Zeros,
    /// Noise, in all of them.
    Noise,
    /// `INPUT=FILE`, or one file for all.
    Files(&'a [String]),
}

/// The inputs of a model, of the shapes of the arrays that are given, or what the command line and the model say.
pub(super) fn of_model(
    source: Source<'_>,
    model: &DynamicModel,
    compiler: &Compiler,
    preprocess: &Preprocess,
) -> Result<Vec<Tensor>, Failure> {
    let declared = model.model().inputs();
    let mut given = match source {
        Source::Files(files) => arrays(files, declared)?,
        Source::Zeros | Source::Noise => vec![None; declared.len()],
    };
    let mut bindings = compiler.bindings().clone();
    for (info, tensor) in declared.iter().zip(&mut given) {
        let bound = bindings.shapes.get(&info.name);
        if tensor.as_ref().is_some_and(|t| bound.is_some_and(|dims| dims[..] != t.shape()[..])) {
            // A file of many samples for a shape that was asked for.
            *tensor = None;
        }
        if let Some(t) = tensor {
            bindings.shapes.insert(info.name.clone(), t.shape().to_vec());
        }
    }
    let types = model.input_types(&bindings)?;
    let infos: Vec<TensorInfo> =
        declared.iter().zip(types).map(|(i, ty)| TensorInfo { name: i.name.clone(), ty }).collect();
    let bytes = infos.iter().map(|i| i.ty.bytes() as u64).fold(0, u64::saturating_add);
    MemoryError::check("the inputs", bytes, compiler.memory_limit()).map_err(Error::from)?;
    read(source, &infos, given, preprocess)
}

/// Arrays that are given as they are to be: of an element type and shape that the model declares.
fn arrays(files: &[String], declared: &[InputInfo]) -> Result<Vec<Option<Tensor>>, Failure> {
    let mut arrays = vec![None; declared.len()];
    let names: Vec<&str> = declared.iter().map(|i| i.name.as_str()).collect();
    for text in files {
        let (at, file) = match split(text, &names) {
            Some(found) => found,
            None if files.len() == 1 => (0, text.into()),
            None => continue,
        };
        let extension = file.extension().map(|e| e.to_ascii_lowercase());
        match extension.as_ref().and_then(|e| e.to_str()) {
            Some("npy") => {
                let tensor = read_npy(&file)?;
                let takes = declared.get(at).is_some_and(|i| i.takes(tensor.dtype(), tensor.shape()));
                if takes {
                    arrays[at] = Some(tensor);
                }
            }
            Some("npz" | "safetensors") if files.len() == 1 => {
                for (name, tensor) in read_arrays(&file)? {
                    let takes = |i: &InputInfo| i.name == name && i.takes(tensor.dtype(), tensor.shape());
                    if let Some(at) = declared.iter().position(takes) {
                        arrays[at] = Some(tensor);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(arrays)
}

/// The inputs: those that are there, and the first sample of the files that are named for the others.
pub(super) fn read(
    source: Source<'_>,
    inputs: &[TensorInfo],
    mut given: Vec<Option<Tensor>>,
    preprocess: &Preprocess,
) -> Result<Vec<Tensor>, Failure> {
    given.resize(inputs.len(), None);
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    let wanted = || {
        let inputs = inputs.iter().map(|i| format!("{}: {}[{}]", i.name, i.ty.dtype, i.ty.shape));
        inputs.collect::<Vec<_>>().join(", ")
    };
    let files = match source {
        Source::Zeros => {
            return Ok(inputs.iter().map(|i| Tensor::zeros(i.ty.dtype, i.ty.shape.clone())).collect());
        }
        Source::Noise if inputs.is_empty() => return Ok(Vec::new()),
        Source::Noise => return Ok(Samples::noise().bind(inputs, preprocess)?.batch(0)?),
        Source::Files(files) => files,
    };
    if let [file] = files
        && split(file, &names).is_none()
        && !inputs.is_empty()
        && given.iter().any(Option::is_none)
    {
        // One file for all: an npz or safetensors has arrays by name, and one input needs none.
        return sample(inputs, Path::new(file), preprocess);
    }
    let mut named = vec![false; inputs.len()];
    for text in files {
        let Some((at, file)) = split(text, &names) else {
            if given.iter().all(Option::is_some) {
                continue;
            }
            return Err(unnamed(text, &wanted()));
        };
        if std::mem::replace(&mut named[at], true) {
            return Err(Failure::Usage(format!("input `{}` is given twice", inputs[at].name)));
        }
        if given[at].is_none() {
            given[at] = Some(sample(&inputs[at..=at], &file, preprocess)?.swap_remove(0));
        }
    }
    let missing: Vec<&str> =
        inputs.iter().zip(&given).filter(|(_, g)| g.is_none()).map(|(i, _)| i.name.as_str()).collect();
    if !missing.is_empty() {
        let why = format!(
            "no file for {}: give --input INPUT=FILE or --zeros; the model takes {}",
            missing.join(", "),
            wanted()
        );
        return Err(Failure::Usage(why));
    }
    Ok(given.into_iter().flatten().collect())
}

/// A file that is for no input of a model which takes these.
pub(super) fn unnamed(text: &str, wanted: &str) -> Failure {
    Failure::Usage(format!("`{text}` does not begin with an input and `=`; the model takes {wanted}"))
}

/// Which input `INPUT=FILE` names. Names of inputs may hold `=` as well as files.
pub(super) fn split(text: &str, inputs: &[&str]) -> Option<(usize, PathBuf)> {
    inputs.iter().enumerate().find_map(|(i, input)| {
        let file = text.strip_prefix(input)?.strip_prefix('=')?;
        Some((i, file.into()))
    })
}

/// The first sample of a file for some inputs.
fn sample(inputs: &[TensorInfo], file: &Path, preprocess: &Preprocess) -> Result<Vec<Tensor>, Failure> {
    if let [input] = inputs
        && file.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"))
    {
        // An array of just the input's type needs no interpretation.
        let tensor = read_npy(file)?;
        if tensor.dtype() == input.ty.dtype && *tensor.shape() == input.ty.shape {
            return Ok(vec![tensor]);
        }
    }
    Ok(Samples::open(file)?.bind(inputs, preprocess)?.batch(0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_told_from_files_by_the_names_of_the_model() {
        let inputs = ["x", "a=b"];
        assert_eq!(split("a=b=c=d.npy", &inputs), Some((1, "c=d.npy".into())));
        assert_eq!(split("y=f.npy", &inputs), None);
    }
}
