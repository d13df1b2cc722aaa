//! A node's attributes. Each that is asked for is remembered.

use super::node::Node;
use crate::Tensor;
use crate::onnx::{NodeError, attribute::Attribute, body::Body};

impl<'m> Node<'_, 'm> {
    fn attribute(&mut self, name: &'static str) -> Option<&'m Attribute> {
        self.attributes.insert(name);
        self.def.attributes.get(name)
    }

    fn mistyped<T>(name: &str, expected: &str, got: &Attribute) -> Result<T, NodeError> {
        Err(NodeError::attribute(name, format!("must be {expected}, not {}", got.kind())))
    }

    /// Lets an attribute be there that has no say in inference.
    pub(in crate::onnx) fn ignore(&mut self, names: &[&'static str]) {
        self.attributes.extend(names);
    }

    /// An integer, if it is there.
    pub(in crate::onnx) fn optional_int(&mut self, name: &'static str) -> Result<Option<i64>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Int(i)) => Ok(Some(*i)),
            Some(other) => Self::mistyped(name, "an int", other),
        }
    }

    /// An integer with a default.
    pub(in crate::onnx) fn int(&mut self, name: &'static str, default: i64) -> Result<i64, NodeError> {
        Ok(self.optional_int(name)?.unwrap_or(default))
    }

    /// An integer that stands for true or false.
    pub(in crate::onnx) fn flag(&mut self, name: &'static str, default: bool) -> Result<bool, NodeError> {
        match self.int(name, default.into())? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(NodeError::attribute(name, format!("must be 0 or 1, not {other}"))),
        }
    }

    /// A float, if it is there.
    pub(in crate::onnx) fn optional_float(&mut self, name: &'static str) -> Result<Option<f32>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Float(f)) => Ok(Some(*f)),
            Some(other) => Self::mistyped(name, "a float", other),
        }
    }

    /// A float with a default; must be finite.
    pub(in crate::onnx) fn float(&mut self, name: &'static str, default: f32) -> Result<f32, NodeError> {
        let value = self.optional_float(name)?.unwrap_or(default);
        if value.is_finite() { Ok(value) } else { Err(NodeError::attribute(name, format!("is {value}"))) }
    }

    /// A string with a default.
    pub(in crate::onnx) fn string(
        &mut self,
        name: &'static str,
        default: &'static str,
    ) -> Result<&'m str, NodeError> {
        match self.attribute(name) {
            None => Ok(default),
            Some(Attribute::String(s)) => {
                std::str::from_utf8(s).map_err(|_| NodeError::attribute(name, "is not UTF-8"))
            }
            Some(other) => Self::mistyped(name, "a string", other),
        }
    }

    /// A list of integers, if it is there.
    pub(in crate::onnx) fn ints(&mut self, name: &'static str) -> Result<Option<Vec<i64>>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Ints(v)) => Ok(Some(v.clone())),
            Some(other) => Self::mistyped(name, "a list of ints", other),
        }
    }

    /// A list of floats, if it is there.
    pub(in crate::onnx) fn floats(&mut self, name: &'static str) -> Result<Option<Vec<f32>>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Floats(v)) => Ok(Some(v.clone())),
            Some(other) => Self::mistyped(name, "a list of floats", other),
        }
    }

    /// A graph.
    pub(in crate::onnx) fn graph_attribute(&mut self, name: &'static str) -> Result<&'m Body, NodeError> {
        match self.attribute(name) {
            None => Err(NodeError::attribute(name, "is missing")),
            Some(Attribute::Graph(body)) => Ok(body),
            Some(other) => Self::mistyped(name, "a graph", other),
        }
    }

    /// A graph, if it is there.
    pub(in crate::onnx) fn optional_graph(
        &mut self,
        name: &'static str,
    ) -> Result<Option<&'m Body>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(_) => self.graph_attribute(name).map(Some),
        }
    }

    /// A list of strings, if it is there.
    pub(in crate::onnx) fn strings(&mut self, name: &'static str) -> Result<Option<Vec<String>>, NodeError> {
        let given = match self.attribute(name) {
            None => return Ok(None),
            Some(Attribute::Strings(given)) => given,
            Some(other) => return Self::mistyped(name, "a list of strings", other),
        };
        let text = |s: &Vec<u8>| String::from_utf8(s.clone());
        let strings = given.iter().map(text).collect::<Result<_, _>>();
        strings.map(Some).map_err(|_| NodeError::attribute(name, "is not UTF-8"))
    }

    /// A tensor, if it is there.
    pub(in crate::onnx) fn tensor(&mut self, name: &'static str) -> Result<Option<Tensor>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Tensor(t)) => Ok(Some(t.clone())),
            Some(other) => Self::mistyped(name, "a tensor", other),
        }
    }
}
