//! Damage to nodes, their attributes, and functions.

use super::{
    Mutator, graph_attribute, info, names, scalar,
    tensors::{change_list, mutate_tensor},
};
use crate::random::Random;
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto,
    attribute_proto::AttributeType,
};

impl Mutator {
    pub(super) fn any_function(&self, random: &mut Random) -> Option<FunctionProto> {
        let with: Vec<&ModelProto> = self.seeds.iter().filter(|m| !m.functions.is_empty()).collect();
        let model = random.pick(&with)?;
        random.pick(&model.functions).cloned()
    }

    /// Some of the graph's nodes as a function, which may call itself.
    pub(super) fn make_function(&self, model: &mut ModelProto, random: &mut Random) {
        let Some(graph) = model.graph.as_mut() else { return };
        let Some(at) = random.index(&graph.node) else { return };
        let node = graph.node[at].clone();
        let mut function = FunctionProto {
            name: "F".into(),
            domain: "local".into(),
            input: node.input.iter().filter(|i| !i.is_empty()).cloned().collect(),
            output: node.output.iter().filter(|o| !o.is_empty()).cloned().collect(),
            opset_import: model.opset_import.clone(),
            node: vec![node.clone()],
            ..Default::default()
        };
        let call = NodeProto {
            op_type: "F".into(),
            domain: "local".into(),
            input: function.input.clone(),
            output: function.output.clone(),
            ..Default::default()
        };
        if random.one_in(3) {
            let inner = NodeProto {
                output: function.output.iter().map(|o| format!("{o}_inner")).collect(),
                ..call.clone()
            };
            function.node.push(inner);
        }
        graph.node[at] = call;
        model.functions.push(function);
        model.opset_import.push(OperatorSetIdProto {
            domain: "local".into(),
            version: 1,
            ..Default::default()
        });
    }

    pub(super) fn mutate_function(&self, function: &mut FunctionProto, random: &mut Random) {
        match random.below(6) {
            0 => change_names(&mut function.input, &["", "ghost"], random),
            1 => change_names(&mut function.output, &["", "ghost"], random),
            2 => change_names(&mut function.attribute, &["alpha", "axis", "ghost"], random),
            3 => {
                if let Some(at) = random.index(&function.opset_import) {
                    function.opset_import[at].version = random.odd_int();
                }
            }
            _ => {
                let names: Vec<String> = function.input.clone();
                let mut graph = GraphProto { node: std::mem::take(&mut function.node), ..Default::default() };
                self.mutate_nodes(&mut graph, &names, random);
                function.node = graph.node;
            }
        }
    }

    pub(super) fn any_node(&self, random: &mut Random) -> Option<NodeProto> {
        let graph = self.any_graph(random)?;
        random.pick(&graph.node).cloned()
    }

    pub(super) fn mutate_nodes(&self, graph: &mut GraphProto, names: &[String], random: &mut Random) {
        let Some(at) = random.index(&graph.node) else { return };
        match random.below(14) {
            0 => _ = graph.node.remove(at),
            1 => {
                let mut copy = graph.node[at].clone();
                if !random.one_in(4) {
                    copy.output.iter_mut().for_each(|o| o.push_str("_copy"));
                }
                graph.node.insert(random.below(graph.node.len() + 1), copy);
            }
            2 => {
                let other = random.below(graph.node.len());
                graph.node.swap(at, other);
            }
            3 => {
                // Another op on the same operands, with its attributes or with those that are there.
                if let Some(other) = self.any_node(random) {
                    let node = &mut graph.node[at];
                    (node.op_type, node.domain) = (other.op_type, other.domain);
                    if random.one_in(2) {
                        node.attribute = other.attribute;
                    }
                }
            }
            4 => {
                // An op from elsewhere before this one.
                if let Some(mut other) = self.any_node(random) {
                    let result = format!("spliced {}", random.below(1000));
                    other.input.iter_mut().for_each(|i| {
                        if let Some(name) = random.pick(names).filter(|_| !i.is_empty()) {
                            i.clone_from(name);
                        }
                    });
                    for (i, o) in other.output.iter_mut().enumerate() {
                        *o = format!("{result} {i}");
                    }
                    if let Some(slot) = random.index(&graph.node[at].input) {
                        graph.node[at].input[slot] = format!("{result} 0");
                    }
                    graph.node.insert(at, other);
                }
            }
            5..=6 => {
                let names: Vec<&str> = names.iter().map(String::as_str).chain(["", "ghost"]).collect();
                change_names(&mut graph.node[at].input, &names, random);
            }
            7 => {
                let names: Vec<&str> = names.iter().map(String::as_str).chain(["", "new"]).collect();
                change_names(&mut graph.node[at].output, &names, random);
            }
            8 => self.wrap(graph, at, random),
            _ => self.mutate_attributes(&mut graph.node[at], random),
        }
    }

    /// Puts a node into a branch or a loop.
    pub(super) fn wrap(&self, graph: &mut GraphProto, at: usize, random: &mut Random) {
        let node = graph.node[at].clone();
        let outputs = node.output.clone();
        let renamed: Vec<String> = outputs.iter().map(|o| format!("{o} within")).collect();
        let inner = NodeProto { output: renamed.clone(), ..node };
        let body_outputs =
            renamed.iter().map(|name| ValueInfoProto { name: name.clone(), ..Default::default() });
        let mut body = GraphProto {
            name: "body".into(),
            node: vec![inner],
            output: body_outputs.collect(),
            ..Default::default()
        };
        if random.one_in(2) {
            graph.initializer.push(scalar("wrap cond", 9, vec![random.below(2) as u8]));
            let attributes =
                vec![graph_attribute("then_branch", body.clone()), graph_attribute("else_branch", body)];
            graph.node[at] = NodeProto {
                op_type: "If".into(),
                input: vec!["wrap cond".into()],
                output: outputs,
                attribute: attributes,
                ..Default::default()
            };
            return;
        }
        body.input = vec![info("i", 7, &[]), info("go", 9, &[])];
        body.output.insert(0, ValueInfoProto { name: "go".into(), ..Default::default() });
        graph.initializer.push(scalar("wrap trips", 7, random.odd_int().to_le_bytes().to_vec()));
        graph.node[at] = NodeProto {
            op_type: "Loop".into(),
            input: vec![if random.one_in(3) { String::new() } else { "wrap trips".into() }, String::new()],
            output: outputs,
            attribute: vec![graph_attribute("body", body)],
            ..Default::default()
        };
    }

    pub(super) fn mutate_attributes(&self, node: &mut NodeProto, random: &mut Random) {
        let at = random.index(&node.attribute);
        match (random.below(8), at) {
            (0, Some(at)) => _ = node.attribute.remove(at),
            (1, Some(at)) => {
                let copy = node.attribute[at].clone();
                node.attribute.push(copy);
            }
            (2, _) | (_, None) => {
                let other = self.any_node(random).and_then(|n| random.pick(&n.attribute).cloned());
                let any = AttributeProto { name: "axis".into(), ..Default::default() };
                node.attribute.push(other.unwrap_or(any));
            }
            (3, Some(at)) => {
                const TYPES: [AttributeType; 8] = [
                    AttributeType::FLOAT,
                    AttributeType::INT,
                    AttributeType::STRING,
                    AttributeType::TENSOR,
                    AttributeType::GRAPH,
                    AttributeType::FLOATS,
                    AttributeType::INTS,
                    AttributeType::UNDEFINED,
                ];
                node.attribute[at].type_ = TYPES[random.below(TYPES.len())].into();
            }
            (4, Some(at)) => {
                let name = *random.pick(&["", "axis", "axes", "alpha", "to", "ghost"]).unwrap_or(&"");
                match random.one_in(2) {
                    true => node.attribute[at].name = name.into(),
                    false => node.attribute[at].ref_attr_name = name.into(),
                }
            }
            (_, Some(at)) => self.mutate_value(&mut node.attribute[at], random),
        }
    }

    pub(super) fn mutate_value(&self, a: &mut AttributeProto, random: &mut Random) {
        match a.type_.enum_value_or_default() {
            AttributeType::FLOAT => a.f = random.odd_float(),
            AttributeType::INTS => change_list(&mut a.ints, random, Random::odd_int),
            AttributeType::FLOATS => change_list(&mut a.floats, random, Random::odd_float),
            AttributeType::STRING => {
                const WORDS: [&[u8]; 12] = [
                    b"",
                    b"SAME_UPPER",
                    b"SAME_LOWER",
                    b"VALID",
                    b"NOTSET",
                    b"linear",
                    b"cubic",
                    b"reflect",
                    b"edge",
                    b"wrap",
                    b"\xff\xfe",
                    b"ij,jk->ik",
                ];
                a.s = WORDS[random.below(WORDS.len())].to_vec();
            }
            AttributeType::STRINGS => a.strings.push(b"Tanh".to_vec()),
            AttributeType::TENSOR => {
                if let Some(t) = a.t.as_mut() {
                    mutate_tensor(t, random);
                }
            }
            AttributeType::GRAPH => {
                if let Some(other) = self.any_graph(random)
                    && random.one_in(3)
                {
                    a.g = Some(other.clone()).into();
                } else if let Some(g) = a.g.as_mut() {
                    self.mutate_graph(g, random);
                }
            }
            _ => a.i = random.odd_int(),
        }
    }
}

fn change_names(list: &mut Vec<String>, names: &[&str], random: &mut Random) {
    let name = random.pick(names).map_or_else(String::new, |&s| s.to_owned());
    match (random.below(4), random.index(list)) {
        (0, Some(at)) => _ = list.remove(at),
        (1, _) | (_, None) => list.push(name),
        (_, Some(at)) => list[at] = name,
    }
}

/// Adds a function and a node that calls it.
pub(super) fn call(model: &mut ModelProto, function: &FunctionProto, random: &mut Random) {
    let Some(graph) = model.graph.as_mut() else { return };
    let names = names(graph);
    let input = function.input.iter().map(|_| random.pick(&names).cloned().unwrap_or_default()).collect();
    let output: Vec<String> = function.output.iter().map(|o| format!("called {o}")).collect();
    for name in &output {
        graph.output.push(ValueInfoProto { name: name.clone(), ..Default::default() });
    }
    graph.node.push(NodeProto {
        op_type: function.name.clone(),
        domain: function.domain.clone(),
        input,
        output,
        ..Default::default()
    });
    let domain = function.domain.clone();
    model.opset_import.push(OperatorSetIdProto { domain, version: 1, ..Default::default() });
    model.functions.push(function.clone());
}

/// Puts the nodes of the graph into both branches of an `If`.
pub(super) fn nest(model: &mut ModelProto) {
    let Some(graph) = model.graph.as_mut() else { return };
    let results: Vec<String> = graph.output.iter().map(|o| o.name.clone()).collect();
    let inner = |name: &String| ValueInfoProto { name: name.clone(), ..Default::default() };
    let body = GraphProto {
        name: "nested".into(),
        node: std::mem::take(&mut graph.node),
        output: results.iter().map(inner).collect(),
        ..Default::default()
    };
    graph.initializer.retain(|t| t.name != "nest cond");
    graph.initializer.push(scalar("nest cond", 9, vec![1]));
    let other = GraphProto {
        name: "other".into(),
        node: results
            .iter()
            .map(|name| NodeProto {
                op_type: "Identity".into(),
                input: vec!["nest cond".into()],
                output: vec![name.clone()],
                ..Default::default()
            })
            .collect(),
        output: results.iter().map(inner).collect(),
        ..Default::default()
    };
    graph.node = vec![NodeProto {
        op_type: "If".into(),
        input: vec!["nest cond".into()],
        output: results,
        attribute: vec![graph_attribute("then_branch", body), graph_attribute("else_branch", other)],
        ..Default::default()
    }];
}
