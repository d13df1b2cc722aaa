//! What goes into a model and comes out: tensors, texts, sequences, and what is left out.
//!
//! Within a graph a text is a number, an element of [`DType::Str`]: equal texts have equal numbers, so that ops that move and
//! compare elements need nothing else. [`Texts`] has the texts of a model, and those that a run brings.

use super::{ImportError, external::ExternalFiles, tensor};
use crate::{DType, Shape, Tensor, limits::MAX_MEMORY_BYTES};
use onnx_protobuf::{Message, TensorProto, TypeProto, type_proto};
use protobuf::CodedInputStream;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A tensor of texts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Strings {
    shape: Shape,
    elements: Vec<Arc<str>>,
}

impl Strings {
    /// Texts in row-major order; none where there are not as many as the shape has elements.
    pub fn new(shape: Shape, elements: Vec<Arc<str>>) -> Option<Strings> {
        (shape.elements() == elements.len()).then_some(Strings { shape, elements })
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The texts in row-major order.
    pub fn elements(&self) -> &[Arc<str>] {
        &self.elements
    }
}

/// The key of an entry of a map.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum MapKey {
    Int(i64),
    Text(Arc<str>),
}

/// A value of a model.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// Numbers or truth values.
    Tensor(Tensor),
    /// Texts.
    Strings(Strings),
    /// Values of one type after each other.
    Sequence(Vec<Value>),
    /// Numbers by the label of a class each.
    Map(Vec<(MapKey, f32)>),
    /// An optional value that is not there.
    Absent,
}

/// What an input or output of a model is declared to be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ValueKind {
    /// Whether it may be left out.
    pub is_optional: bool,
    /// Whether it is a sequence of tensors, rather than a tensor.
    pub is_sequence: bool,
}

impl ValueKind {
    /// A tensor that must be there.
    pub const TENSOR: ValueKind = ValueKind { is_optional: false, is_sequence: false };
}

/// How many tensors a value of a graph is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Form {
    /// One.
    Tensor,
    /// One for each element of a sequence.
    Sequence(usize),
    /// One, whose rows are maps from these labels of classes to its columns.
    Maps(Vec<MapKey>),
    /// None: it is not there.
    Absent,
}

impl Form {
    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        match self {
            Form::Tensor | Form::Maps(_) => 1,
            Form::Sequence(n) => *n,
            Form::Absent => 0,
        }
    }
}

/// Texts by number, from 0 on; 0 is the empty one.
pub(super) struct TextTable {
    numbers: BTreeMap<Arc<str>, i64>,
    texts: Vec<Arc<str>>,
}

impl Default for TextTable {
    fn default() -> TextTable {
        let mut table = TextTable { numbers: BTreeMap::new(), texts: Vec::new() };
        table.number("");
        table
    }
}

impl TextTable {
    /// The number of a text, which it has from now on.
    pub(super) fn number(&mut self, text: &str) -> i64 {
        if let Some(&number) = self.numbers.get(text) {
            return number;
        }
        let (text, number): (Arc<str>, i64) = (text.into(), self.texts.len() as i64);
        self.texts.push(text.clone());
        self.numbers.insert(text, number);
        number
    }

    fn find(&self, text: &str) -> Option<i64> {
        self.numbers.get(text).copied()
    }

    fn text(&self, number: i64) -> Option<&Arc<str>> {
        self.texts.get(usize::try_from(number).ok()?)
    }
}

/// The texts of a model and of one run of it, which has those that its inputs and ops make.
#[derive(Clone)]
pub struct Texts {
    model: Arc<TextTable>,
    /// Those that the model does not have, by −1 − their numbers.
    run: Arc<Mutex<TextTable>>,
}

impl Texts {
    pub(super) fn new(model: Arc<TextTable>) -> Texts {
        Texts { model, run: Arc::default() }
    }

    fn run(&self) -> MutexGuard<'_, TextTable> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a text.
    pub(super) fn number(&self, text: &str) -> i64 {
        self.model.find(text).unwrap_or_else(|| -1 - self.run().number(text))
    }

    /// The text of a number, if it is one of this run.
    pub(super) fn text(&self, number: i64) -> Option<Arc<str>> {
        match number {
            0.. => self.model.text(number).cloned(),
            _ => self.run().text(-1 - number).cloned(),
        }
    }

    /// Texts as they are in graphs.
    pub fn tensor(&self, strings: &Strings) -> Tensor {
        let numbers: Vec<i64> = strings.elements.iter().map(|text| self.number(text)).collect();
        let tensor = Tensor::from_vec_as(DType::Str, strings.shape.clone(), numbers);
        // There are as many as the shape has elements.
        tensor.unwrap_or_else(|_| Tensor::zeros(DType::Str, strings.shape.clone()))
    }

    /// The texts of a tensor of [`DType::Str`]; none of another one, or one of another run.
    pub fn strings(&self, tensor: &Tensor) -> Option<Strings> {
        let numbers = tensor.as_slice::<i64>().ok().filter(|_| tensor.dtype() == DType::Str)?;
        let elements = numbers.iter().map(|&n| self.text(n)).collect::<Option<_>>()?;
        Strings::new(tensor.shape().clone(), elements)
    }

    /// What a tensor of a graph is outside.
    fn value(&self, tensor: Tensor) -> Option<Value> {
        match tensor.dtype() {
            DType::Str => self.strings(&tensor).map(Value::Strings),
            _ => Some(Value::Tensor(tensor)),
        }
    }

    /// Values as tensors of a graph, and how many tensors each is; none of maps, and of sequences of other things than
    /// tensors.
    pub fn flatten(&self, values: &[Value]) -> Option<(Vec<Form>, Vec<Tensor>)> {
        let mut tensors = Vec::new();
        let mut one = |value: &Value| {
            tensors.push(match value {
                Value::Tensor(t) => t.clone(),
                Value::Strings(s) => self.tensor(s),
                _ => return None,
            });
            Some(())
        };
        let form = |value: &Value| match value {
            Value::Sequence(all) => {
                all.iter().try_for_each(&mut one)?;
                Some(Form::Sequence(all.len()))
            }
            Value::Absent => Some(Form::Absent),
            value => one(value).map(|()| Form::Tensor),
        };
        let forms = values.iter().map(form).collect::<Option<Vec<Form>>>()?;
        Some((forms, tensors))
    }

    /// The values that tensors of a graph are, in these forms; none where the tensors are others.
    pub fn group(&self, forms: &[Form], tensors: Vec<Tensor>) -> Option<Vec<Value>> {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().and_then(|t| self.value(t));
        let group = |form: &Form| match form {
            Form::Tensor => next(),
            Form::Sequence(n) => (0..*n).map(|_| next()).collect::<Option<_>>().map(Value::Sequence),
            Form::Absent => Some(Value::Absent),
            Form::Maps(keys) => match next()? {
                Value::Tensor(t) => Some(maps(keys, &t)),
                _ => None,
            },
        };
        forms.iter().map(group).collect()
    }
}

/// A map for each row.
fn maps(keys: &[MapKey], scores: &Tensor) -> Value {
    let numbers = scores.to_f32().unwrap_or_default();
    let map = |row: &[f32]| Value::Map(keys.iter().cloned().zip(row.iter().copied()).collect());
    Value::Sequence(numbers.chunks(keys.len().max(1)).map(map).collect())
}

/// What a type is declared as, and that of the tensors in it; none of other things than tensors, sequences of them, and
/// those that may be left out.
pub(super) fn kind(ty: &TypeProto) -> Option<(ValueKind, &type_proto::Tensor)> {
    use type_proto::Value as V;
    match ty.value.as_ref()? {
        V::TensorType(t) => Some((ValueKind::TENSOR, t)),
        V::SequenceType(s) => {
            let (of, t) = kind(s.elem_type.as_ref()?)?;
            (of == ValueKind::TENSOR).then_some((ValueKind { is_sequence: true, ..of }, t))
        }
        V::OptionalType(o) => {
            let (of, t) = kind(o.elem_type.as_ref()?)?;
            (!of.is_optional).then_some((ValueKind { is_optional: true, ..of }, t))
        }
        _ => None,
    }
}

/// Reads a file that holds a value of this kind, as ONNX's tests store inputs and outputs.
///
/// # Errors
/// Where the file cannot be read or is no such value, and for element types that are not supported.
pub fn read_value(path: &Path, kind: ValueKind) -> Result<Value, ImportError> {
    let bytes = tensor::read_bytes(path)?;
    let mut reader = ValueReader {
        what: path.display().to_string(),
        files: ExternalFiles::beside(path, MAX_MEMORY_BYTES),
    };
    match kind {
        ValueKind { is_optional: true, .. } => reader.optional(&bytes),
        ValueKind { is_sequence: true, .. } => reader.sequence(&bytes),
        _ => reader.tensor(&bytes),
    }
}

struct ValueReader {
    what: String,
    files: ExternalFiles,
}

impl ValueReader {
    fn tensor(&mut self, bytes: &[u8]) -> Result<Value, ImportError> {
        let proto = TensorProto::parse_from_bytes(bytes).map_err(|e| ImportError::Parse(e.to_string()))?;
        let mut texts = TextTable::default();
        let tensor = tensor::decode(proto, &self.what, &mut self.files, &mut texts)?;
        let value = Texts::new(Arc::new(texts)).value(tensor);
        value.ok_or_else(|| ImportError::Structure(format!("{}: a text has no number", self.what)))
    }

    /// `SequenceProto`: tensors are field 3.
    fn sequence(&mut self, bytes: &[u8]) -> Result<Value, ImportError> {
        let mut elements = Vec::new();
        for (field, content) in fields(bytes)? {
            match field {
                3 => elements.push(self.tensor(&content)?),
                1 | 2 => {}
                _ => return Err(self.refused("a sequence of other things than tensors")),
            }
        }
        Ok(Value::Sequence(elements))
    }

    /// `OptionalProto`: a tensor is field 3, a sequence field 5. There may be none.
    fn optional(&mut self, bytes: &[u8]) -> Result<Value, ImportError> {
        let mut value = Value::Absent;
        for (field, content) in fields(bytes)? {
            match field {
                3 => value = self.tensor(&content)?,
                5 => value = self.sequence(&content)?,
                1 | 2 => {}
                _ => return Err(self.refused("an optional value that is neither tensor nor sequence")),
            }
        }
        Ok(value)
    }

    fn refused(&self, why: &str) -> ImportError {
        ImportError::Structure(format!("{}: {why} is not supported", self.what))
    }
}

/// The fields of a message: their numbers and, where they have some, their bytes.
fn fields(bytes: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, ImportError> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut read = || -> protobuf::Result<Vec<(u32, Vec<u8>)>> {
        let mut fields = Vec::new();
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag & 7 {
                2 => fields.push((tag >> 3, input.read_bytes()?)),
                0 => {
                    input.read_raw_varint64()?;
                    fields.push((tag >> 3, Vec::new()));
                }
                1 => _ = input.read_fixed64()?,
                5 => _ = input.read_fixed32()?,
                _ => break,
            }
        }
        Ok(fields)
    };
    read().map_err(|e| ImportError::Parse(e.to_string()))
}
