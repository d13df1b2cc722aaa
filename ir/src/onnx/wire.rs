//! A scan of a model file before the protobuf parser sees it.
//!
//! The parser (protobuf 3.4.0) recurses without bound when it skips groups it does not know (RUSTSEC-2024-0437), and
//! makes hundreds of bytes of an empty message of two. ONNX has no groups; so this walks the wire format along the
//! schema, iteratively and without allocating by what the file claims, and refuses groups, field number 0, lengths
//! beyond the enclosing message, overlong varints, deep nesting, and more messages than the limits allow.

use super::ImportError;
use crate::limits::{MAX_NESTING, MAX_PARSED_BYTES, MAX_PARSED_PER_BYTE};
use onnx_protobuf as pb;

/// The messages of the schema that contain others or are contained.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    ValueInfo,
    Type,
    TensorType,
    ElementType,
    Map,
    Shape,
    Dimension,
    Entry,
    Opset,
    Training,
    Function,
    Annotation,
    Segment,
}

/// What the schema says of a field.
enum Field {
    Message(Message),
    /// Numbers, strings and bytes: the parser bounds them by the bytes that are there.
    Plain,
    Unknown,
}

/// Memory of a field that the schema does not know: the parser keeps it in a hash table of its own.
const UNKNOWN_FIELD_BYTES: usize = 128;

impl Message {
    /// Memory that the parser takes for one, without what it contains.
    const fn size(self) -> usize {
        use Message::*;
        match self {
            Model => size_of::<pb::ModelProto>(),
            Graph => size_of::<pb::GraphProto>(),
            Node => size_of::<pb::NodeProto>(),
            Attribute => size_of::<pb::AttributeProto>(),
            Tensor => size_of::<pb::TensorProto>(),
            SparseTensor => size_of::<pb::SparseTensorProto>(),
            ValueInfo => size_of::<pb::ValueInfoProto>(),
            Type => size_of::<pb::TypeProto>(),
            TensorType => size_of::<pb::type_proto::Tensor>(),
            ElementType => size_of::<pb::type_proto::Sequence>(),
            Map => size_of::<pb::type_proto::Map>(),
            Shape => size_of::<pb::TensorShapeProto>(),
            Dimension => size_of::<pb::tensor_shape_proto::Dimension>(),
            Entry => size_of::<pb::StringStringEntryProto>(),
            Opset => size_of::<pb::OperatorSetIdProto>(),
            Training => size_of::<pb::TrainingInfoProto>(),
            Function => size_of::<pb::FunctionProto>(),
            Annotation => size_of::<pb::TensorAnnotation>(),
            Segment => size_of::<pb::tensor_proto::Segment>(),
        }
    }

    /// Field `number` of this message in onnx.proto.
    const fn field(self, number: u64) -> Field {
        use Field::{Message as M, Plain, Unknown};
        use Message::*;
        match (self, number) {
            (Model, 7) => M(Graph),
            (Model, 8) => M(Opset),
            (Model, 14) => M(Entry),
            (Model, 20) => M(Training),
            (Model, 25) => M(Function),
            (Model, 1..=6) => Plain,
            (Graph, 1) => M(Node),
            (Graph, 5) => M(Tensor),
            (Graph, 11..=13) => M(ValueInfo),
            (Graph, 14) => M(Annotation),
            (Graph, 15) => M(SparseTensor),
            (Graph, 16) => M(Entry),
            (Graph, 2 | 10) => Plain,
            (Node, 5) => M(Attribute),
            (Node, 9) => M(Entry),
            (Node, 1..=4 | 6..=8) => Plain,
            (Attribute, 5 | 10) => M(Tensor),
            (Attribute, 6 | 11) => M(Graph),
            (Attribute, 14 | 15) => M(Type),
            (Attribute, 22 | 23) => M(SparseTensor),
            (Attribute, 1..=4 | 7..=9 | 13 | 20 | 21) => Plain,
            (Tensor, 3) => M(Segment),
            (Tensor, 13 | 16) => M(Entry),
            (Tensor, 1 | 2 | 4..=12 | 14) => Plain,
            (SparseTensor, 1 | 2) => M(Tensor),
            (SparseTensor, 3) => Plain,
            (ValueInfo, 2) => M(Type),
            (ValueInfo, 4) => M(Entry),
            (ValueInfo, 1 | 3) => Plain,
            (Type, 1 | 8) => M(TensorType),
            (Type, 4 | 9) => M(ElementType),
            (Type, 5) => M(Map),
            (Type, 6) => Plain,
            (TensorType, 2) => M(Shape),
            (ElementType, 1) | (Map, 2) => M(Type),
            (TensorType | Map, 1) => Plain,
            (Shape, 1) => M(Dimension),
            (Dimension, 1..=3) => Plain,
            (Entry | Opset | Segment, 1 | 2) => Plain,
            (Training, 1 | 2) => M(Graph),
            (Training, 3 | 4) | (Annotation, 2) => M(Entry),
            (Annotation, 1) => Plain,
            (Function, 7) => M(Node),
            (Function, 9) => M(Opset),
            (Function, 11) => M(Attribute),
            (Function, 12) => M(ValueInfo),
            (Function, 14) => M(Entry),
            (Function, 1 | 4..=6 | 8 | 10 | 13) => Plain,
            _ => Unknown,
        }
    }
}

/// Reads the fields of a message that ends at `end`.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn refuse<T>(offset: usize, reason: impl Into<String>) -> Result<T, ImportError> {
    Err(ImportError::Wire { offset, reason: reason.into() })
}

impl Cursor<'_> {
    /// A varint of at most ten bytes and 64 bits that ends before `end`.
    fn varint(&mut self, end: usize) -> Result<u64, ImportError> {
        let start = self.at;
        let mut value = 0u64;
        for i in 0..10 {
            let Some(&byte) = self.bytes[..end].get(self.at) else {
                return refuse(start, "a number runs over the end of its message");
            };
            self.at += 1;
            if i == 9 && byte > 1 {
                return refuse(start, "a number has more than 64 bits");
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        refuse(start, "a number has more than ten bytes")
    }

    /// Skips `n` bytes of the field that starts at `field`.
    fn skip(&mut self, n: u64, field: usize, end: usize) -> Result<(), ImportError> {
        let left = end - self.at;
        match usize::try_from(n) {
            Ok(n) if n <= left => {
                self.at += n;
                Ok(())
            }
            _ => refuse(field, format!("a field says that it is {n} bytes long, where {left} are left")),
        }
    }
}

/// Checks the wire format of a model; see the module's documentation for what is refused.
pub(super) fn scan(bytes: &[u8]) -> Result<(), ImportError> {
    let budget = MAX_PARSED_BYTES.saturating_add(bytes.len().saturating_mul(MAX_PARSED_PER_BYTE));
    let mut taken = 0usize;
    let mut cursor = Cursor { bytes, at: 0 };
    let mut open: Vec<(Message, usize)> = vec![(Message::Model, bytes.len())];
    while let Some(&(message, end)) = open.last() {
        if cursor.at == end {
            open.pop();
            continue;
        }
        let start = cursor.at;
        let tag = cursor.varint(end)?;
        let (number, wire_type) = (tag >> 3, tag & 7);
        if number == 0 || number >= 1 << 29 {
            return refuse(start, format!("field number {number} is not between 1 and 2^29"));
        }
        let field = message.field(number);
        if matches!(field, Field::Message(_)) && wire_type != 2 {
            return refuse(
                start,
                format!("field {number} of {message:?} is a message, but has wire type {wire_type}"),
            );
        }
        match wire_type {
            0 => {
                cursor.varint(end)?;
            }
            1 => cursor.skip(8, start, end)?,
            5 => cursor.skip(4, start, end)?,
            2 => {
                let length = cursor.varint(end)?;
                let body = cursor.at;
                cursor.skip(length, start, end)?;
                if let Field::Message(inner) = field {
                    if open.len() >= MAX_NESTING {
                        return refuse(start, format!("messages are nested more than {MAX_NESTING} deep"));
                    }
                    open.push((inner, cursor.at));
                    cursor.at = body;
                }
            }
            3 | 4 => {
                return refuse(start, format!("wire type {wire_type} (group), which ONNX does not have"));
            }
            _ => return refuse(start, format!("wire type {wire_type} does not exist")),
        }
        taken = taken.saturating_add(match field {
            Field::Message(inner) => inner.size(),
            Field::Plain => 0,
            Field::Unknown => UNKNOWN_FIELD_BYTES,
        });
        if taken > budget {
            return refuse(
                start,
                format!("so many messages that they take more than {budget} bytes of memory"),
            );
        }
    }
    Ok(())
}

/// What a file that is not a model is, as far as its first bytes tell.
pub(super) fn what_else(bytes: &[u8]) -> Option<String> {
    const MAGIC: [(&[u8], &str); 7] = [
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"PK\x03\x04", "a ZIP archive (a PyTorch checkpoint? export it to ONNX)"),
        (b"\x1f\x8b", "a gzip archive (unpack it first)"),
        (b"\x89HDF", "an HDF5 file (a Keras model? export it to ONNX)"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"version https://git-lfs", "a Git LFS pointer (fetch the file with `git lfs pull`)"),
    ];
    if bytes.is_empty() {
        return Some("the file is empty".into());
    }
    if bytes.get(4..8) == Some(b"TFL3") {
        return Some("it is a TensorFlow Lite model".into());
    }
    if let Some((_, what)) = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(format!("it is {what}"));
    }
    let head = &bytes[..bytes.len().min(512)];
    let is_text = head.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~'));
    is_text.then(|| {
        let start: String = head.iter().take(24).map(|&b| b as char).collect();
        format!("it is text that starts with {start:?}")
    })
}
