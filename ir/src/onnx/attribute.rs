//! Attributes of nodes, decoded and checked.

use super::{
    ImportError, NodeError,
    body::{self, Body, Decoder},
    tensor,
};
use crate::Tensor;
use onnx_protobuf::{AttributeProto, attribute_proto::AttributeType};
use std::{collections::BTreeMap, sync::Arc};

/// The value of an attribute.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Attribute {
    Float(f32),
    Int(i64),
    String(Vec<u8>),
    Tensor(Tensor),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Vec<u8>>),
    Graph(Arc<Body>),
    /// In a function: what its caller gives under this name.
    Reference(String),
    /// Types, lists of graphs or tensors: no op that is supported has one.
    Other(&'static str),
}

impl Attribute {
    /// Elements of a list or tensor; 1 of everything else.
    pub(super) fn elements(&self) -> usize {
        match self {
            Attribute::Tensor(t) => t.shape().elements(),
            Attribute::Floats(all) => all.len(),
            Attribute::Ints(all) => all.len(),
            Attribute::Strings(all) => all.len(),
            _ => 1,
        }
    }

    /// What ONNX calls this type.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Attribute::Float(_) => "a float",
            Attribute::Int(_) => "an int",
            Attribute::String(_) => "a string",
            Attribute::Tensor(_) => "a tensor",
            Attribute::Floats(_) => "a list of floats",
            Attribute::Ints(_) => "a list of ints",
            Attribute::Strings(_) => "a list of strings",
            Attribute::Graph(_) => "a graph",
            Attribute::Reference(_) => "a reference to an attribute",
            Attribute::Other(kind) => kind,
        }
    }
}

/// The attributes of a node; each name must stand once.
pub(super) fn decode_all(
    node: &str,
    op: &str,
    protos: Vec<AttributeProto>,
    decoder: &mut Decoder<'_>,
) -> Result<BTreeMap<String, Attribute>, ImportError> {
    let mut attributes = BTreeMap::new();
    for a in protos {
        let name = a.name.clone();
        let refuse = |reason: &str| ImportError::Node {
            node: node.into(),
            op: op.into(),
            source: NodeError::attribute(&name, reason),
        };
        if name.is_empty() {
            return Err(refuse("has no name"));
        }
        let value = match (a.ref_attr_name.as_str(), decoder.in_function) {
            ("", _) => decode(a, node, decoder)?,
            (_, true) => Ok(Attribute::Reference(a.ref_attr_name)),
            (_, false) => {
                Err("refers to an attribute of a function, but the node is not in a function".into())
            }
        };
        let value = match value {
            Ok(value) => value,
            Err(reason) => return Err(refuse(&reason)),
        };
        if attributes.insert(name.clone(), value).is_some() {
            return Err(refuse("is given twice"));
        }
    }
    Ok(attributes)
}

/// Gives texts of attributes, which ops may make results of, their numbers.
fn note<'a>(texts: impl IntoIterator<Item = &'a Vec<u8>>, decoder: &mut Decoder<'_>) {
    for text in texts.into_iter().filter_map(|t| std::str::from_utf8(t).ok()) {
        decoder.texts.number(text);
    }
}

/// The outer error is that of a tensor, which names itself.
fn decode(
    a: AttributeProto,
    node: &str,
    decoder: &mut Decoder<'_>,
) -> Result<Result<Attribute, String>, ImportError> {
    use AttributeType as T;
    let Ok(kind) = a.type_.enum_value() else {
        return Ok(Err("is of a type that does not exist".into()));
    };
    let lists = [(T::FLOATS, a.floats.len(), "floats"), (T::INTS, a.ints.len(), "ints")];
    if let Some((_, _, other)) = lists.iter().find(|(own, len, _)| *own != kind && *len > 0) {
        return Ok(Err(format!("is declared as {kind:?}, but holds {other}")));
    }
    if a.t.is_some() && kind != T::TENSOR {
        return Ok(Err(format!("is declared as {kind:?}, but holds a tensor")));
    }
    let what = format!("attribute {} of node {node}", a.name);
    Ok(Ok(match kind {
        T::FLOAT => Attribute::Float(a.f),
        T::INT => Attribute::Int(a.i),
        T::STRING => {
            note([&a.s], decoder);
            Attribute::String(a.s)
        }
        T::FLOATS => Attribute::Floats(a.floats),
        T::INTS => Attribute::Ints(a.ints),
        T::TENSOR => match a.t.into_option() {
            Some(t) => Attribute::Tensor(tensor::decode(t, &what, decoder.files, decoder.texts)?),
            None => return Ok(Err("is declared as a tensor, but holds none".into())),
        },
        T::SPARSE_TENSOR => match a.sparse_tensor.into_option() {
            Some(t) => Attribute::Tensor(tensor::decode_sparse(t, &what, decoder.files, decoder.texts)?),
            None => return Ok(Err("is declared as a sparse tensor, but holds none".into())),
        },
        T::UNDEFINED => return Ok(Err("has no type".into())),
        T::STRINGS => {
            note(&a.strings, decoder);
            Attribute::Strings(a.strings)
        }
        T::GRAPH => match a.g.into_option() {
            Some(g) => Attribute::Graph(Arc::new(body::decode_attribute(g, decoder)?)),
            None => return Ok(Err("is declared as a graph, but holds none".into())),
        },
        T::GRAPHS => Attribute::Other("a list of graphs"),
        T::TENSORS => Attribute::Other("a list of tensors"),
        T::SPARSE_TENSORS => Attribute::Other("a list of sparse tensors"),
        T::TYPE_PROTO => Attribute::Other("a type"),
        T::TYPE_PROTOS => Attribute::Other("a list of types"),
    }))
}
