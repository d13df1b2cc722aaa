//! Nodes of a graph within a graph, made nodes of the graph around it.

use super::{
    attribute::Attribute,
    body::{Body, NodeDef},
    tensor,
};
use crate::{DType, Tensor};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The opset of nodes that are made here.
const VERSION: i64 = 13;

/// A node of ONNX's own.
pub(super) fn node(op: &str, name: &str, inputs: &[&str], output: &str) -> NodeDef {
    NodeDef {
        name: name.into(),
        op: op.into(),
        domain: String::new(),
        version: Some(VERSION),
        inputs: inputs.iter().map(|&i| i.into()).collect(),
        outputs: vec![output.into()],
        attributes: BTreeMap::new(),
    }
}

/// A constant.
pub(super) fn constant(name: &str, value: Tensor) -> NodeDef {
    with(node("Constant", name, &[], name), "value", Attribute::Tensor(value))
}

/// A sequence of values with these names.
pub(super) fn sequence(name: &str, elements: &[String], dtype: Option<DType>) -> NodeDef {
    let inputs: Vec<&str> = elements.iter().map(String::as_str).collect();
    match inputs.is_empty() {
        false => node("SequenceConstruct", name, &inputs, name),
        true => {
            let code = dtype.map_or(1, tensor::dtype_code);
            with(node("SequenceEmpty", name, &[], name), "dtype", Attribute::Int(code.into()))
        }
    }
}

/// A value that is not there.
pub(super) fn absent(name: &str) -> NodeDef {
    NodeDef { version: Some(15), ..node("Optional", name, &[], name) }
}

/// A node with one attribute more.
pub(super) fn with(mut node: NodeDef, name: &str, attribute: Attribute) -> NodeDef {
    node.attributes.insert(name.into(), attribute);
    node
}

/// The nodes of a body, whose inputs are values with these names, and whose results get those (an empty one is not
/// wanted). What is local to it gets `prefix`, which must occur nowhere else.
pub(super) fn splice(body: &Body, prefix: &str, inputs: &[&str], outputs: &[&str]) -> Vec<NodeDef> {
    let given: BTreeMap<&str, &str> =
        body.inputs.iter().map(String::as_str).zip(inputs.iter().copied()).collect();
    let captured: BTreeSet<&str> = body.captures.iter().map(String::as_str).collect();
    let renamed = |name: &str| match given.get(name) {
        _ if name.is_empty() || captured.contains(name) => name.to_owned(),
        Some(&outer) => outer.to_owned(),
        None => format!("{prefix}{name}"),
    };
    let constants = body.initializers.iter().map(|(name, value)| constant(&renamed(name), value.clone()));
    let nodes = body
        .nodes
        .iter()
        .map(|def| NodeDef { name: format!("{prefix}{}", def.name), ..rename(def, &renamed) });
    let wanted = body.outputs.iter().zip(outputs).filter(|(_, outer)| !outer.is_empty());
    let results = wanted.map(|((local, _), outer)| {
        let from = renamed(local);
        node("Identity", &format!("{prefix}{local} to {outer}"), &[&from], outer)
    });
    constants.chain(nodes).chain(results).collect()
}

/// A node with other names of values.
fn rename(def: &NodeDef, renamed: &dyn Fn(&str) -> String) -> NodeDef {
    let all = |names: &[String]| names.iter().map(|name| renamed(name)).collect();
    let attributes = def.attributes.iter().map(|(name, a)| match a {
        Attribute::Graph(body) => (name.clone(), Attribute::Graph(Arc::new(rename_captures(body, renamed)))),
        other => (name.clone(), other.clone()),
    });
    NodeDef {
        inputs: all(&def.inputs),
        outputs: all(&def.outputs),
        attributes: attributes.collect(),
        ..def.clone()
    }
}

/// A body with other names of what it takes from around it.
fn rename_captures(body: &Body, renamed: &dyn Fn(&str) -> String) -> Body {
    let captured: BTreeSet<&str> = body.captures.iter().map(String::as_str).collect();
    let within = |name: &str| match captured.contains(name) {
        true => renamed(name),
        false => name.to_owned(),
    };
    Body {
        inputs: body.inputs.clone(),
        outputs: body.outputs.iter().map(|(name, dtype)| (within(name), *dtype)).collect(),
        initializers: body.initializers.clone(),
        nodes: body.nodes.iter().map(|n| Arc::new(rename(n, &within))).collect(),
        captures: body.captures.iter().map(|name| renamed(name)).collect(),
    }
}
