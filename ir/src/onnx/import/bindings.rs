//! What the dimensions of a model's inputs are to be.

use crate::onnx::{Dim, ImportError, InputInfo};
use crate::{Shape, Tensor};
use std::collections::BTreeMap;

/// What a graph's symbolic dimensions are to be.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Bindings {
    /// Shapes of inputs, by name. They must agree with what the model declares.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Lengths of named dimensions. Those that a shape does not tell and that are not here: 1 for the first dimension
    /// of an input, which is the batch; an error for others.
    pub symbols: BTreeMap<String, usize>,
    /// Inputs that are to be constants of the graph, by name: values that do not change from run to run, such as axes
    /// and target shapes that a model takes as inputs.
    pub values: BTreeMap<String, Tensor>,
    /// Values that inputs have, by name. They stay inputs; but shapes, and what is computed at all, may depend on these
    /// values, so that the graph holds for no others.
    pub known: BTreeMap<String, Tensor>,
}

/// The concrete shapes of the inputs.
pub(super) fn bind(inputs: &[InputInfo], bindings: &Bindings) -> Result<Vec<Shape>, ImportError> {
    let names = || inputs.iter().map(|i| format!("`{}`", i.name)).collect::<Vec<_>>().join(", ");
    let mut bound = bindings.shapes.keys().chain(bindings.values.keys()).chain(bindings.known.keys());
    if let Some(unknown) = bound.find(|&name| inputs.iter().all(|i| i.name != *name)) {
        return Err(ImportError::Input {
            input: unknown.clone(),
            reason: format!("the model has no input of this name; its inputs are {}", names()),
        });
    }
    let mut symbols = bindings.symbols.clone();
    let value_shapes =
        bindings.values.iter().chain(&bindings.known).map(|(name, t)| (name, t.shape().to_vec()));
    let shapes: BTreeMap<&String, Vec<usize>> =
        bindings.shapes.iter().map(|(name, dims)| (name, dims.clone())).chain(value_shapes).collect();
    for info in inputs {
        if let Some(given) = shapes.get(&info.name) {
            check_given(info, given, &mut symbols)?;
        }
    }
    for info in inputs {
        if let Some(Dim::Symbol(batch)) = info.dims.as_ref().and_then(|dims| dims.first()) {
            symbols.entry(batch.clone()).or_insert(1);
        }
    }
    inputs.iter().map(|info| concrete(info, shapes.get(&info.name), &symbols)).collect()
}

/// Checks a shape that the caller gives against the declared one, and learns what its symbols are.
fn check_given(
    info: &InputInfo,
    given: &[usize],
    symbols: &mut BTreeMap<String, usize>,
) -> Result<(), ImportError> {
    let Some(dims) = &info.dims else { return Ok(()) };
    let refuse = |reason: String| Err(ImportError::Input { input: info.name.clone(), reason });
    if dims.len() != given.len() {
        return refuse(format!(
            "shape {given:?} has {} dimensions, the model declares {}",
            given.len(),
            dims.len()
        ));
    }
    for (d, &n) in dims.iter().zip(given) {
        match d {
            Dim::Known(k) if *k != n => {
                return refuse(format!("shape {given:?} has {n} where the model declares {k}"));
            }
            Dim::Symbol(name) => match symbols.insert(name.clone(), n) {
                Some(other) if other != n => {
                    return refuse(format!("dimension {name} is {n} here, but {other} elsewhere"));
                }
                _ => {}
            },
            _ => {}
        }
    }
    Ok(())
}

fn concrete(
    info: &InputInfo,
    given: Option<&Vec<usize>>,
    symbols: &BTreeMap<String, usize>,
) -> Result<Shape, ImportError> {
    let refuse = |reason: String| ImportError::Input { input: info.name.clone(), reason };
    let advice = || format!("say what it is with --shape {}=...", info.name);
    let dims = match (given, &info.dims) {
        (Some(given), _) => given.clone(),
        (None, None) => return Err(refuse(format!("the model declares no shape; {}", advice()))),
        (None, Some(dims)) => dims
            .iter()
            .enumerate()
            .map(|(i, d)| match d {
                Dim::Known(n) => Ok(*n),
                Dim::Symbol(name) => symbols.get(name).copied().ok_or_else(|| name.clone()),
                Dim::Unknown if i == 0 => Ok(1),
                Dim::Unknown => Err("?".to_owned()),
            })
            .collect::<Result<Vec<usize>, String>>()
            .map_err(|open| {
                let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
                refuse(format!("dimension {open} of [{}] is not known; {}", dims.join(", "), advice()))
            })?,
    };
    Shape::new(dims).map_err(|e| refuse(e.to_string()))
}
