//! Damaged models: mutations of ONNX files at the level of the schema and at that of bytes.
//!
//! Everything depends on a seed alone, so that a mutant can be made again from its number.

use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto,
    SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::DataLocation,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

/// A generator of numbers that are the same for each seed: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// An element; `None` of none.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { Some(&of[self.below(of.len())]) }
    }

    fn index<T>(&mut self, of: &[T]) -> Option<usize> {
        if of.is_empty() { None } else { Some(self.below(of.len())) }
    }

    /// An integer at which something may wrap, overflow or be of the wrong sign.
    fn odd_int(&mut self) -> i64 {
        const ODD: [i64; 30] = [
            0,
            1,
            -1,
            2,
            -2,
            3,
            4,
            5,
            7,
            8,
            9,
            16,
            17,
            31,
            32,
            33,
            63,
            64,
            65,
            127,
            128,
            255,
            256,
            65_535,
            65_536,
            i32::MAX as i64,
            i32::MIN as i64,
            1 << 40,
            i64::MAX,
            i64::MIN,
        ];
        match self.below(8) {
            0 => self.bits() as i64,
            1 => 1 << self.below(63),
            2 => (1i64 << self.below(63)).wrapping_sub(1),
            // Mostly small, so that the mutant gets far.
            3..=5 => ODD[self.below(10)],
            _ => ODD[self.below(ODD.len())],
        }
    }

    fn odd_float(&mut self) -> f32 {
        const ODD: [f32; 14] = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            2.0,
            1e-45,
            1e-38,
            1e10,
            1e30,
            f32::MAX,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        match self.below(4) {
            0 => f32::from_bits(self.bits() as u32),
            _ => ODD[self.below(ODD.len())],
        }
    }
}

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
        for _ in 0..rounds {
            self.mutate(&mut model, &mut random);
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

    fn any_function(&self, random: &mut Random) -> Option<FunctionProto> {
        let with: Vec<&ModelProto> = self.seeds.iter().filter(|m| !m.functions.is_empty()).collect();
        let model = random.pick(&with)?;
        random.pick(&model.functions).cloned()
    }

    /// Some of the graph's nodes as a function, which may call itself.
    fn make_function(&self, model: &mut ModelProto, random: &mut Random) {
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

    fn mutate_function(&self, function: &mut FunctionProto, random: &mut Random) {
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

    fn any_tensor(&self, random: &mut Random) -> Option<TensorProto> {
        let graph = self.any_graph(random)?;
        random.pick(&graph.initializer).filter(|t| t.raw_data.len() < SMALL).cloned()
    }

    fn any_node(&self, random: &mut Random) -> Option<NodeProto> {
        let graph = self.any_graph(random)?;
        random.pick(&graph.node).cloned()
    }

    fn mutate_nodes(&self, graph: &mut GraphProto, names: &[String], random: &mut Random) {
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
    fn wrap(&self, graph: &mut GraphProto, at: usize, random: &mut Random) {
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

    fn mutate_attributes(&self, node: &mut NodeProto, random: &mut Random) {
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

    fn mutate_value(&self, a: &mut AttributeProto, random: &mut Random) {
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

    // ---- tensors

    fn mutate_initializers(&self, graph: &mut GraphProto, random: &mut Random) {
        let Some(at) = random.index(&graph.initializer) else { return };
        match random.below(8) {
            0 => _ = graph.initializer.remove(at),
            1 => {
                let mut copy = graph.initializer[at].clone();
                if random.one_in(2) {
                    copy.name.push_str("_copy");
                }
                graph.initializer.push(copy);
            }
            2 => {
                if let Some(other) = self.any_tensor(random) {
                    let name = graph.initializer[at].name.clone();
                    graph.initializer[at] = TensorProto { name, ..other };
                }
            }
            3 => {
                let values = graph.initializer.remove(at);
                let indices = TensorProto {
                    dims: vec![values.dims.iter().product::<i64>().clamp(0, 64)],
                    data_type: 7,
                    int64_data: (0..8).map(|_| random.odd_int()).collect(),
                    ..Default::default()
                };
                graph.sparse_initializer.push(SparseTensorProto {
                    dims: values.dims.iter().map(|_| random.odd_int()).collect(),
                    values: Some(values).into(),
                    indices: Some(indices).into(),
                    ..Default::default()
                });
            }
            _ => mutate_tensor(&mut graph.initializer[at], random),
        }
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

fn change_names(list: &mut Vec<String>, names: &[&str], random: &mut Random) {
    let name = random.pick(names).map_or_else(String::new, |&s| s.to_owned());
    match (random.below(4), random.index(list)) {
        (0, Some(at)) => _ = list.remove(at),
        (1, _) | (_, None) => list.push(name),
        (_, Some(at)) => list[at] = name,
    }
}

fn change_list<T: Clone>(list: &mut Vec<T>, random: &mut Random, odd: impl Fn(&mut Random) -> T) {
    match (random.below(6), random.index(list)) {
        (0, Some(at)) => _ = list.remove(at),
        (1, _) | (_, None) => {
            let value = odd(random);
            list.push(value);
        }
        (2, Some(at)) => {
            let value = list[at].clone();
            list.extend(std::iter::repeat_n(value, random.below(40)));
        }
        (_, Some(at)) => list[at] = odd(random),
    }
}

fn change_dims(dims: &mut Vec<i64>, random: &mut Random) {
    match random.below(4) {
        0 => {
            let at = random.below(dims.len() + 1);
            dims.insert(at, 1);
        }
        1 => {
            let n = dims.len();
            if n > 1 {
                let (a, b) = (random.below(n), random.below(n));
                dims.swap(a, b);
            }
        }
        _ => change_list(dims, random, Random::odd_int),
    }
}

fn odd_dtype(random: &mut Random) -> i32 {
    if random.one_in(8) { random.odd_int() as i32 } else { random.below(24) as i32 }
}

fn mutate_tensor(t: &mut TensorProto, random: &mut Random) {
    match random.below(10) {
        0..=1 => change_dims(&mut t.dims, random),
        2 => t.data_type = odd_dtype(random),
        3 => {
            let length = random.below(t.raw_data.len() + 1);
            t.raw_data.truncate(length);
        }
        4 => t.raw_data.extend(std::iter::repeat_n(0x7f, 1 + random.below(16))),
        5 => change_list(&mut t.float_data, random, Random::odd_float),
        6 => change_list(&mut t.int64_data, random, Random::odd_int),
        7 => {
            let entry = |key: &str, value: String| StringStringEntryProto {
                key: key.into(),
                value,
                ..Default::default()
            };
            let location =
                *random.pick(&["weights.bin", "../weights.bin", "/etc/hostname", ""]).unwrap_or(&"");
            t.external_data = vec![entry("location", location.into())];
            for key in ["offset", "length"] {
                if random.one_in(2) {
                    t.external_data.push(entry(key, random.odd_int().to_string()));
                }
            }
            t.data_location = DataLocation::EXTERNAL.into();
            t.raw_data.clear();
        }
        _ => extreme_elements(t, random),
    }
}

/// Other values in the stored elements, of which a few are at the ends of their type.
fn extreme_elements(t: &mut TensorProto, random: &mut Random) {
    let width = match t.data_type {
        1 | 6 | 12 => 4,
        7 | 11 | 13 => 8,
        4 | 5 | 10 | 16 => 2,
        _ => 1,
    };
    for _ in 0..1 + random.below(4) {
        let elements = t.raw_data.len() / width;
        if elements == 0 {
            change_list(&mut t.int32_data, random, |r| r.odd_int() as i32);
            return;
        }
        let at = random.below(elements) * width;
        let bytes = match t.data_type {
            1 => random.odd_float().to_le_bytes().to_vec(),
            11 => f64::from(random.odd_float()).to_le_bytes().to_vec(),
            _ => random.odd_int().to_le_bytes().to_vec(),
        };
        t.raw_data[at..at + width].copy_from_slice(&bytes[..width]);
    }
}

fn mutate_infos(infos: &mut Vec<ValueInfoProto>, random: &mut Random) {
    let Some(at) = random.index(infos) else { return };
    match random.below(8) {
        0 => _ = infos.remove(at),
        1 => {
            let copy = infos[at].clone();
            infos.push(copy);
        }
        2 => infos[at].type_.clear(),
        3 => infos[at].name = random.pick(&["", "ghost", "x"]).map_or_else(String::new, |&s| s.into()),
        _ => {
            let Some(type_proto::Value::TensorType(ty)) =
                infos[at].type_.as_mut().and_then(|t| t.value.as_mut())
            else {
                return;
            };
            match random.below(4) {
                0 => ty.elem_type = odd_dtype(random),
                1 => ty.shape.clear(),
                _ => mutate_shape(ty.shape.mut_or_insert_default(), random),
            }
        }
    }
}

fn mutate_shape(shape: &mut TensorShapeProto, random: &mut Random) {
    let value = match random.below(4) {
        0 => Some(dimension::Value::DimParam("N".into())),
        1 => None,
        _ => Some(dimension::Value::DimValue(random.odd_int())),
    };
    let dim = Dimension { value, ..Default::default() };
    match (random.below(5), random.index(&shape.dim)) {
        (0, Some(at)) => _ = shape.dim.remove(at),
        (1, _) | (_, None) => shape.dim.push(dim),
        (_, Some(at)) => shape.dim[at] = dim,
    }
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

/// Adds a function and a node that calls it.
fn call(model: &mut ModelProto, function: &FunctionProto, random: &mut Random) {
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
fn nest(model: &mut ModelProto) {
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
