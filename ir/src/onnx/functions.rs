//! Functions that a model brings: a node that calls one becomes the nodes of its body.

use super::{
    ImportError,
    attribute::{self, Attribute},
    body::{self, Body, Decoder, NodeDef},
    external::ExternalFiles,
    model::{canonical, opset_imports},
    splice::splice,
    value::TextTable,
};
use crate::limits::{MAX_CALL_DEPTH, MAX_EXPANDED_NODES};
use onnx_protobuf::FunctionProto;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The functions of a model, by domain and name. Overloads of one name are told apart by nothing that inference needs, so
/// that a model has one each.
#[derive(Default)]
pub(super) struct Functions(BTreeMap<(String, String), Function>);

struct Function {
    body: Body,
    /// Names of the attributes that a call may give, and their values where it does not.
    attributes: BTreeMap<String, Option<Attribute>>,
}

fn structure<T>(why: String) -> Result<T, ImportError> {
    Err(ImportError::Structure(why))
}

impl Functions {
    /// Decodes the functions of a model.
    pub(super) fn decode(
        protos: Vec<FunctionProto>,
        files: &mut ExternalFiles,
        texts: &mut TextTable,
    ) -> Result<Functions, ImportError> {
        let mut functions = BTreeMap::new();
        for proto in protos {
            let key = (canonical(&proto.domain).to_owned(), proto.name.clone());
            let name = format!("function `{}` of domain {:?}", proto.name, proto.domain);
            let function = Function::decode(proto, &name, files, texts)?;
            if functions.insert(key, function).is_some() {
                return structure(format!("{name} is defined twice"));
            }
        }
        Ok(Functions(functions))
    }

    /// The body with the nodes of functions in the place of those that call them.
    pub(super) fn expand(&self, body: Body) -> Result<Body, ImportError> {
        if self.0.is_empty() {
            return Ok(body);
        }
        let mut made = Made::default();
        let nodes = self.expand_all(&body.nodes, &mut made, 0)?;
        Ok(Body { nodes, ..body })
    }

    fn expand_all(
        &self,
        nodes: &[Arc<NodeDef>],
        made: &mut Made,
        depth: usize,
    ) -> Result<Vec<Arc<NodeDef>>, ImportError> {
        let mut expanded = Vec::with_capacity(nodes.len());
        for node in nodes {
            let node = self.expand_bodies(node, made, depth)?;
            match self.0.get(&(node.domain.clone(), node.op.clone())) {
                None => expanded.push(node),
                Some(function) => {
                    if depth >= MAX_CALL_DEPTH {
                        return structure(format!(
                            "node `{}` ({}): functions call each other more than {MAX_CALL_DEPTH} deep",
                            node.name, node.op
                        ));
                    }
                    let nodes: Vec<Arc<NodeDef>> =
                        function.called_by(&node, made)?.into_iter().map(Arc::new).collect();
                    expanded.extend(self.expand_all(&nodes, made, depth + 1)?);
                }
            }
        }
        Ok(expanded)
    }

    /// The node with the graphs among its attributes expanded.
    fn expand_bodies(
        &self,
        node: &Arc<NodeDef>,
        made: &mut Made,
        depth: usize,
    ) -> Result<Arc<NodeDef>, ImportError> {
        if node.bodies().next().is_none() {
            return Ok(node.clone());
        }
        let mut own = NodeDef::clone(node);
        for a in own.attributes.values_mut() {
            if let Attribute::Graph(body) = a {
                let nodes = self.expand_all(&body.nodes, made, depth)?;
                *a = Attribute::Graph(Arc::new(Body { nodes, ..Body::clone(body) }));
            }
        }
        Ok(Arc::new(own))
    }
}

/// What expansion has made so far.
#[derive(Default)]
struct Made {
    calls: usize,
    nodes: usize,
}

impl Function {
    fn decode(
        proto: FunctionProto,
        name: &str,
        files: &mut ExternalFiles,
        texts: &mut TextTable,
    ) -> Result<Function, ImportError> {
        let opsets = opset_imports(&proto.opset_import)?;
        let mut decoder = Decoder { files, texts, opsets: &opsets, in_function: true };
        let mut attributes: BTreeMap<String, Option<Attribute>> =
            proto.attribute.into_iter().map(|name| (name, None)).collect();
        let defaults = attribute::decode_all(name, &proto.name, proto.attribute_proto, &mut decoder)?;
        attributes.extend(defaults.into_iter().map(|(name, value)| (name, Some(value))));
        let mut seen = BTreeSet::new();
        if let Some(twice) = proto.input.iter().find(|input| !seen.insert(*input)) {
            return structure(format!("{name} has two inputs `{twice}`"));
        }
        let nodes = proto
            .node
            .into_iter()
            .enumerate()
            .map(|(i, n)| body::node(i, n, &mut decoder).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let body = Body {
            inputs: proto.input,
            outputs: proto.output.into_iter().map(|o| (o, None)).collect(),
            initializers: BTreeMap::new(),
            nodes,
            captures: Vec::new(),
        };
        let body = body.in_order()?;
        body.check_closed()?;
        Ok(Function { body, attributes })
    }

    /// The nodes that stand for a call.
    fn called_by(&self, node: &NodeDef, made: &mut Made) -> Result<Vec<NodeDef>, ImportError> {
        let refuse = |why: String| structure(format!("node `{}` ({}): {why}", node.name, node.op));
        let (given, takes) = (node.inputs.len(), self.body.inputs.len());
        if given > takes || node.outputs.len() > self.body.outputs.len() {
            return refuse(format!(
                "has {given} operands and {} results, the function has {takes} and {}",
                node.outputs.len(),
                self.body.outputs.len()
            ));
        }
        if let Some(name) = node.attributes.keys().find(|name| !self.attributes.contains_key(*name)) {
            return refuse(format!("attribute `{name}` is not one of the function's"));
        }
        let attributes: BTreeMap<&str, &Attribute> = self
            .attributes
            .iter()
            .filter_map(|(name, default)| Some((&**name, node.attributes.get(name).or(default.as_ref())?)))
            .collect();
        made.calls += 1;
        made.nodes += count(&self.body);
        if made.nodes > MAX_EXPANDED_NODES {
            return refuse(format!("the functions called have more than {MAX_EXPANDED_NODES} nodes"));
        }
        let mut inputs: Vec<&str> = node.inputs.iter().map(String::as_str).collect();
        inputs.resize(takes, "");
        let outputs: Vec<&str> = node.outputs.iter().map(String::as_str).collect();
        let nodes = splice(&self.body, &format!("{}.{}/", node.name, made.calls), &inputs, &outputs);
        Ok(nodes.into_iter().map(|n| resolved(&n, &attributes)).collect())
    }
}

/// Nodes of a body and of those in it.
fn count(body: &Body) -> usize {
    body.nodes.iter().map(|n| 1 + n.bodies().map(count).sum::<usize>()).sum()
}

/// A node with a call's attributes where it refers to them. One that the call leaves out is left out.
fn resolved(node: &NodeDef, given: &BTreeMap<&str, &Attribute>) -> NodeDef {
    let attributes = node.attributes.iter().filter_map(|(name, a)| {
        let value = match a {
            Attribute::Reference(to) => (*given.get(to.as_str())?).clone(),
            Attribute::Graph(body) => {
                let nodes = body.nodes.iter().map(|n| Arc::new(resolved(n, given))).collect();
                Attribute::Graph(Arc::new(Body { nodes, ..Body::clone(body) }))
            }
            other => other.clone(),
        };
        Some((name.clone(), value))
    });
    NodeDef { attributes: attributes.collect(), ..node.clone() }
}
