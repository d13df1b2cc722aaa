//! Values that are no tensors of numbers on the command line: texts, sequences, maps, and what is left out.

use super::inputs::{self, Source, split};
use crate::failure::Failure;
use qcc_runtime::{
    Compiler, DynamicModel, Error, Preprocess,
    ir::{
        DType, Shape, Tensor, TensorType,
        memory::MemoryError,
        onnx::{Bindings, Dim, InputInfo, MapKey, Strings, Value, ValueKind, read_value},
    },
    read_npy, write_npy,
};
use std::{fs, io::Write, path::Path, path::PathBuf, sync::Arc};

/// The inputs of a model of any kinds: tensors as [`inputs::of_model`] reads them where there is nothing else.
pub(super) fn of_model(
    source: Source<'_>,
    model: &DynamicModel,
    compiler: &Compiler,
    preprocess: &Preprocess,
) -> Result<Vec<Value>, Failure> {
    let declared = model.model().inputs();
    let files = match source {
        Source::Files(files) => files,
        Source::Zeros | Source::Noise => &[],
    };
    let is_message = |file: &String| file.to_ascii_lowercase().ends_with(".pb");
    let is_number = |i: &InputInfo| i.kind == ValueKind::TENSOR && i.dtype != DType::Str;
    if declared.iter().all(is_number) && !files.iter().any(is_message) {
        let tensors = inputs::of_model(source, model, compiler, preprocess)?;
        return Ok(tensors.into_iter().map(Value::Tensor).collect());
    }
    let names: Vec<&str> = declared.iter().map(|i| i.name.as_str()).collect();
    let mut given: Vec<Vec<PathBuf>> = vec![Vec::new(); declared.len()];
    for text in files {
        match split(text, &names) {
            Some((at, file)) => given[at].push(file),
            None if declared.len() == 1 => given[0].push(text.into()),
            None => {
                let wanted: Vec<String> = declared.iter().map(ToString::to_string).collect();
                return Err(inputs::unnamed(text, &wanted.join(", ")));
            }
        }
    }
    let is_blank = !matches!(source, Source::Files(_));
    let value = |(info, files): (&InputInfo, Vec<PathBuf>)| match is_blank {
        true => blank(info, compiler.bindings(), compiler.memory_limit()),
        false => input(info, &files),
    };
    declared.iter().zip(given).map(value).collect()
}

/// Zeros, empty texts, an empty sequence, or nothing where that may be.
fn blank(info: &InputInfo, bindings: &Bindings, limit: u64) -> Result<Value, Failure> {
    if info.kind.is_optional {
        return Ok(Value::Absent);
    }
    if info.kind.is_sequence {
        return Ok(Value::Sequence(Vec::new()));
    }
    let length = |(axis, dim): (usize, &Dim)| match dim {
        Dim::Known(n) => Some(*n),
        Dim::Symbol(name) if bindings.symbols.contains_key(name) => bindings.symbols.get(name).copied(),
        // The batch, as elsewhere.
        _ => (axis == 0).then_some(1),
    };
    let declared = info.dims.as_ref().and_then(|dims| dims.iter().enumerate().map(length).collect());
    let dims: Option<Vec<usize>> = bindings.shapes.get(&info.name).cloned().or(declared);
    let shape = dims.and_then(|dims| Shape::new(dims).ok());
    let shape = shape.ok_or_else(|| odd(info, "has no shape of its own: say it with --shape"))?;
    let ty = TensorType::new(info.dtype, shape);
    MemoryError::check("the inputs", ty.bytes() as u64, limit).map_err(Error::from)?;
    if ty.dtype != DType::Str {
        return Ok(Value::Tensor(Tensor::zeros(ty.dtype, ty.shape)));
    }
    let texts = vec![Arc::from(""); ty.shape.elements()];
    Strings::new(ty.shape, texts).map(Value::Strings).ok_or_else(|| odd(info, "is too large"))
}

fn odd(info: &InputInfo, why: &str) -> Failure {
    Failure::Usage(format!("input `{}` ({info}) {why}", info.name))
}

/// An input from its files: one, or one for each element of a sequence.
fn input(info: &InputInfo, files: &[PathBuf]) -> Result<Value, Failure> {
    match files {
        [] if info.kind.is_optional => Ok(Value::Absent),
        [file] if is_a(file, "pb") => message(file, info.kind),
        _ if info.kind.is_sequence => {
            let elements = files.iter().map(|file| element(info, file)).collect::<Result<_, _>>()?;
            Ok(Value::Sequence(elements))
        }
        [file] => element(info, file),
        [] => Err(odd(info, "has no file: give --input INPUT=FILE or --zeros")),
        _ => Err(odd(info, "is given more than once, and is no sequence")),
    }
}

fn is_a(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// A value as ONNX's own tests store it.
fn message(file: &Path, kind: ValueKind) -> Result<Value, Failure> {
    let failed = |e| Error::Import { path: file.display().to_string(), source: Box::new(e) };
    Ok(read_value(file, kind).map_err(failed)?)
}

/// A tensor from an array or from a message of ONNX, or texts from the lines of a file.
fn element(info: &InputInfo, file: &Path) -> Result<Value, Failure> {
    if is_a(file, "pb") {
        return message(file, ValueKind::TENSOR);
    }
    match info.dtype {
        DType::Str if is_a(file, "txt") => {
            let text = fs::read_to_string(file);
            let text = text.map_err(|source| Failure::Read { path: file.display().to_string(), source })?;
            let lines: Vec<Arc<str>> = text.lines().map(Arc::from).collect();
            let shape = text_shape(info, lines.len())
                .ok_or_else(|| odd(info, &format!("does not take the {} lines of the file", lines.len())))?;
            Strings::new(shape, lines).map(Value::Strings).ok_or_else(|| odd(info, "takes other lines"))
        }
        DType::Str => Err(odd(info, "takes texts: give a .txt file with one a line, or a .pb file")),
        _ if is_a(file, "npy") => Ok(Value::Tensor(read_npy(file)?)),
        _ => Err(odd(info, "takes a .npy or .pb file beside inputs that are no tensors of numbers")),
    }
}

/// The shape of so many texts: the one declared, with all that is open along one axis.
fn text_shape(info: &InputInfo, count: usize) -> Option<Shape> {
    let Some(dims) = &info.dims else { return Shape::new([count]).ok() };
    let known: usize =
        dims.iter().filter_map(|d| if let Dim::Known(n) = d { Some(*n) } else { None }).product();
    let mut left = Some(count.checked_div(known).unwrap_or(0));
    let lengths: Vec<usize> =
        dims.iter().map(|d| if let Dim::Known(n) = d { *n } else { left.take().unwrap_or(1) }).collect();
    Shape::new(lengths).ok().filter(|shape| shape.elements() == count)
}

/// Values that are no tensors as one line.
pub(super) fn describe(value: &Value) -> String {
    const SHOWN: usize = 8;
    let some = |all: Vec<String>, n: usize| {
        let more = if n > SHOWN { format!(", and {} more", n - SHOWN) } else { String::new() };
        format!("{}{more}", all.join(", "))
    };
    match value {
        Value::Tensor(t) => format!("{}[{}]", t.dtype(), t.shape()),
        Value::Strings(s) => {
            let shown = s.elements().iter().take(SHOWN).map(|t| format!("{t:?}")).collect();
            format!("text[{}], {}", s.shape(), some(shown, s.elements().len()))
        }
        Value::Sequence(all) => {
            let shown = all.iter().take(SHOWN).map(describe).collect();
            format!("a sequence of {}: {}", all.len(), some(shown, all.len()))
        }
        Value::Map(entries) => {
            let key = |k: &MapKey| serde_json::to_string(&map_key(k)).unwrap_or_default();
            let shown = entries.iter().take(SHOWN).map(|(k, v)| format!("{} {v}", key(k))).collect();
            format!("a map: {}", some(shown, entries.len()))
        }
        Value::Absent => "left out".into(),
    }
}

/// A key as it is called in JSON.
fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Int(n) => n.to_string(),
        MapKey::Text(text) => text.to_string(),
    }
}

/// Writes a value under a file name without an extension: arrays as .npy, texts as lines, sequences element by element with
/// their numbers, maps as JSON.
pub(super) fn write(value: &Value, folder: &Path, name: &str) -> Result<(), Failure> {
    let failed = |source| Failure::Write { path: folder.display().to_string(), source };
    match value {
        Value::Tensor(t) => Ok(write_npy(&folder.join(format!("{name}.npy")), t)?),
        Value::Strings(s) => {
            let mut file = fs::File::create(folder.join(format!("{name}.txt"))).map_err(failed)?;
            s.elements().iter().try_for_each(|text| writeln!(file, "{text}")).map_err(failed)
        }
        Value::Sequence(all) => {
            let mut elements = all.iter().enumerate();
            elements.try_for_each(|(i, element)| write(element, folder, &format!("{name}_{i}")))
        }
        Value::Map(entries) => {
            let map: serde_json::Map<String, serde_json::Value> =
                entries.iter().map(|(k, v)| (map_key(k), (*v).into())).collect();
            let text = serde_json::Value::from(map).to_string();
            fs::write(folder.join(format!("{name}.json")), text).map_err(failed)
        }
        Value::Absent => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fill_what_is_open() {
        let info = |dims: &[Dim]| InputInfo {
            name: "t".into(),
            dtype: DType::Str,
            dims: Some(dims.to_vec()),
            kind: ValueKind::TENSOR,
        };
        let shape = |dims: &[Dim], n| text_shape(&info(dims), n).map(|s| s.to_vec());
        let open = || Dim::Symbol("N".into());
        assert_eq!(shape(&[open()], 3), Some(vec![3]));
        assert_eq!(shape(&[open(), Dim::Known(2)], 6), Some(vec![3, 2]));
        assert_eq!(shape(&[open(), Dim::Unknown], 4), Some(vec![4, 1]));
        assert_eq!(shape(&[Dim::Known(1)], 1), Some(vec![1]));
        assert_eq!(shape(&[], 1), Some(vec![]));
        assert_eq!(shape(&[open(), Dim::Known(2)], 5), None);
        assert_eq!(shape(&[Dim::Known(0)], 2), None);
    }
}
