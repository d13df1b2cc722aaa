//! Damaged models: mutations of ONNX files at the level of the schema and at that of bytes.
//!
//! Everything depends on a seed alone, so that a mutant can be made again from its number.

mod gentle;
mod nodes;
mod tensors;

use crate::random::Random;
use nodes::{call, nest};
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};
use tensors::mutate_infos;

/// What models consist of, to put into others.
pub struct Mutator {
    seeds: Vec<ModelProto>,
    /// Seeds in the order of their size in bytes, and how often each is taken: large ones take long.
    weights: Vec<usize>,
}

/// Models up to this size are taken equally often.
const SMALL: usize = 64 << 10;

impl Mutator {
    /// Mutates these models, of which there must be one at least.
    pub fn new(seeds: Vec<ModelProto>) -> Mutator {
        let weight = |m: &ModelProto| {
            // The size of what takes time: weights are copied, mutants of large models are compiled.
            let size = (m.compute_size() as usize).max(SMALL);
            (SMALL * 64 / size).max(1)
        };
        let weights = seeds.iter().map(weight).collect();
        Mutator { seeds, weights }
    }

    /// The mutant of a number: bytes of a file, or of what is not quite one any more.
    pub fn mutant(&self, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        let mut model = self.seed(&mut random).clone();
        let is_bytes = random.one_in(8);
        let rounds = if is_bytes { random.below(2) } else { 1 + random.below(4) };
        let is_gentle = random.one_in(2);
        for _ in 0..rounds {
            match is_gentle {
                true => self.change(&mut model, &mut random),
                false => self.mutate(&mut model, &mut random),
            }
        }
        let mut bytes = encode(&model);
        if is_bytes {
            for _ in 0..1 + random.below(4) {
                self.damage(&mut bytes, &mut random);
            }
        }
        bytes
    }

    fn seed(&self, random: &mut Random) -> &ModelProto {
        let mut at = random.below(self.weights.iter().sum());
        for (model, weight) in self.seeds.iter().zip(&self.weights) {
            match at.checked_sub(*weight) {
                Some(left) => at = left,
                None => return model,
            }
        }
        &self.seeds[0]
    }

    fn mutate(&self, model: &mut ModelProto, random: &mut Random) {
        if random.one_in(12) {
            return self.mutate_model(model, random);
        }
        let functions = model.functions.len();
        if functions > 0 && random.one_in(3) {
            let at = random.below(functions);
            return self.mutate_function(&mut model.functions[at], random);
        }
        let Some(graph) = model.graph.as_mut() else { return };
        let mut at = random.below(count_graphs(graph));
        if let Some(graph) = nth_graph(graph, &mut at) {
            self.mutate_graph(graph, random);
        }
    }

    // ---- the model

    fn mutate_model(&self, model: &mut ModelProto, random: &mut Random) {
        match random.below(7) {
            0 => model.ir_version = random.odd_int(),
            1 => {
                if let Some(at) = random.index(&model.opset_import) {
                    model.opset_import[at].version =
                        if random.one_in(4) { random.odd_int() } else { 1 + random.below(26) as i64 };
                }
            }
            2 => {
                let domain =
                    *random.pick(&["", "ai.onnx", "com.microsoft", "ai.onnx.ml", "local"]).unwrap_or(&"");
                let version = 1 + random.below(26) as i64;
                model.opset_import.push(OperatorSetIdProto {
                    domain: domain.into(),
                    version,
                    ..Default::default()
                });
            }
            3 => {
                if let Some(at) = random.index(&model.opset_import) {
                    model.opset_import.remove(at);
                }
            }
            4 => {
                if let Some(f) = self.any_function(random) {
                    call(model, &f, random);
                }
            }
            5 => self.make_function(model, random),
            _ => {
                // Nest the whole graph in branches.
                let depth = 1 + random.below(24);
                for _ in 0..depth {
                    nest(model);
                }
            }
        }
    }

    // ---- a graph

    fn mutate_graph(&self, graph: &mut GraphProto, random: &mut Random) {
        match random.below(16) {
            0..=8 => {
                let names = names(graph);
                self.mutate_nodes(graph, &names, random);
            }
            9..=11 => self.mutate_initializers(graph, random),
            12..=13 => mutate_infos(&mut graph.input, random),
            14 => mutate_infos(&mut graph.output, random),
            _ => match random.below(3) {
                0 => {
                    // An initializer that comes when the model runs.
                    if let Some(at) = random.index(&graph.initializer) {
                        let t = graph.initializer.remove(at);
                        graph.input.push(info(&t.name, t.data_type, &t.dims));
                    }
                }
                1 => {
                    // An input that is known.
                    if let Some(at) = random.index(&graph.input) {
                        let v = graph.input.remove(at);
                        let t = self.any_tensor(random);
                        graph.initializer.push(TensorProto { name: v.name, ..t.unwrap_or_default() });
                    }
                }
                _ => {
                    let own = names(graph);
                    let name = random.pick(&own).cloned().unwrap_or_default();
                    graph.output.push(ValueInfoProto { name, ..Default::default() });
                }
            },
        }
    }

    fn any_graph<'a>(&'a self, random: &mut Random) -> Option<&'a GraphProto> {
        // A few tries for one with nodes.
        (0..4).find_map(|_| {
            let model = &self.seeds[random.below(self.seeds.len())];
            model.graph.as_ref().filter(|g| !g.node.is_empty())
        })
    }

    // ---- bytes

    fn damage(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(bytes.len());
        match random.below(8) {
            0..=1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.bits() as u8,
            3 => bytes.truncate(at),
            4 => {
                let end = (at + 1 + random.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let other = encode(self.seed(random));
                let from = random.below(other.len().max(1)).min(other.len());
                let end = (from + random.below(256)).min(other.len());
                bytes.splice(at..at, other[from..end].iter().copied());
            }
            6 => {
                let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
                let count = 1 + random.below(huge.len());
                bytes.splice(at..at, huge[huge.len() - count..].iter().copied());
            }
            _ => {
                let end = (at + random.below(128)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

/// The bytes of a model's file.
pub fn encode(model: &ModelProto) -> Vec<u8> {
    // Fails for messages without required fields only, and the schema has none that are required.
    model.write_to_bytes().unwrap_or_default()
}

/// Number of graphs: this one, and those in it.
fn count_graphs(graph: &GraphProto) -> usize {
    let inner = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.g.as_ref());
    1 + inner.map(count_graphs).sum::<usize>()
}

/// One of them, counted in the same order.
fn nth_graph<'g>(graph: &'g mut GraphProto, at: &mut usize) -> Option<&'g mut GraphProto> {
    if *at == 0 {
        return Some(graph);
    }
    *at -= 1;
    let inner = graph.node.iter_mut().flat_map(|n| &mut n.attribute).filter_map(|a| a.g.as_mut());
    for g in inner {
        let count = count_graphs(g);
        if *at < count {
            return nth_graph(g, at);
        }
        *at -= count;
    }
    None
}

/// Names of the values of a graph.
fn names(graph: &GraphProto) -> Vec<String> {
    let inputs = graph.input.iter().map(|v| &v.name);
    let constants = graph.initializer.iter().map(|t| &t.name);
    let results = graph.node.iter().flat_map(|n| &n.output);
    inputs.chain(constants).chain(results).filter(|n| !n.is_empty()).cloned().collect()
}

/// A value of this element type (by its ONNX number) and shape.
pub fn info(name: &str, elem_type: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = |&n: &i64| Dimension { value: Some(dimension::Value::DimValue(n)), ..Default::default() };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect(), ..Default::default() };
    let tensor = type_proto::Tensor { elem_type, shape: Some(shape).into(), ..Default::default() };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.into(), type_: Some(ty).into(), ..Default::default() }
}

/// A scalar of this element type.
fn scalar(name: &str, data_type: i32, raw_data: Vec<u8>) -> TensorProto {
    TensorProto { name: name.into(), data_type, raw_data, ..Default::default() }
}

/// A graph as an attribute.
pub fn graph_attribute(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        type_: AttributeType::GRAPH.into(),
        g: Some(graph).into(),
        ..Default::default()
    }
}
