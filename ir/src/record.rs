use crate::{Device, Error, Graph, Kind, NodeId, Op, QuantParams, Stage, Tensor, TensorType, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A graph as plain data for a file, with constants as indices into a list of tensors kept beside it.
///
/// Nodes stand in an order in which operands come first; values name nodes by their place in it. Made by
/// [`Graph::to_record`]; [`Graph::from_record`] checks and infers everything anew, so a file need not be trusted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GraphRecord {
    /// The model's name.
    pub name: String,
    /// The stage.
    pub stage: Stage,
    /// The nodes.
    pub nodes: Vec<NodeRecord>,
    /// The results.
    pub outputs: Vec<OutputRecord>,
}

/// A node of a [`GraphRecord`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The name.
    pub name: String,
    /// Where it runs.
    pub device: Option<Device>,
    /// What it is.
    pub kind: KindRecord,
}

/// What a [`NodeRecord`] is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum KindRecord {
    /// A value the caller supplies.
    Input(TensorType),
    /// A value known at compile time.
    Constant {
        /// Index into the list of tensors.
        blob: u32,
        /// Its grid, if it is quantized.
        quant: Option<QuantParams>,
    },
    /// A computation.
    Op {
        /// The op.
        op: Op,
        /// Its operands.
        operands: Vec<ValueRecord>,
    },
}

/// A value of a [`GraphRecord`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ValueRecord {
    /// Place of the producer among the nodes.
    pub node: u32,
    /// Which of its outputs.
    pub port: u16,
}

/// A named result of a [`GraphRecord`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OutputRecord {
    /// The name.
    pub name: String,
    /// The value.
    pub value: ValueRecord,
}

/// What a file says of one node.
pub(crate) enum Entry<V> {
    Input(TensorType),
    Constant(Tensor, Option<QuantParams>),
    Op(Op, Vec<V>),
}

/// Builds a graph from a file in which nodes are named by `K`: positions in a record, numbers in the text form.
pub(crate) struct Builder<K> {
    pub(crate) graph: Graph,
    nodes: BTreeMap<K, NodeId>,
}

impl<K: Ord + Copy> Builder<K> {
    pub(crate) fn new(name: String, stage: Stage) -> Builder<K> {
        let mut graph = Graph::new(name);
        graph.stage = stage;
        Builder { graph, nodes: BTreeMap::new() }
    }

    /// The value on output `port` of node `key`, if there is one.
    pub(crate) fn value(&self, key: K, port: u16) -> Option<ValueId> {
        let node = *self.nodes.get(&key)?;
        (usize::from(port) < self.graph.node(node).outputs().len()).then(|| node.port(port))
    }

    pub(crate) fn contains(&self, key: K) -> bool {
        self.nodes.contains_key(&key)
    }

    /// Adds a node under its own name, which must be free.
    pub(crate) fn add(
        &mut self,
        key: K,
        name: &str,
        device: Option<Device>,
        entry: Entry<ValueId>,
    ) -> Result<NodeId, Error> {
        if self.graph.find(name).is_some() {
            let reason = "another node has this name".into();
            return Err(Error::Record { node: name.into(), reason });
        }
        let id = match entry {
            Entry::Input(ty) => self.graph.input(name, ty)?.node,
            Entry::Constant(tensor, None) => self.graph.constant(name, tensor).node,
            Entry::Constant(tensor, quant) => {
                let ty = TensorType { quant, ..tensor.ty() };
                self.graph.quantized_constant(name, tensor, ty)?.node
            }
            Entry::Op(op, operands) => self.graph.add(name, op, &operands)?,
        };
        self.graph.set_device(id, device);
        self.nodes.insert(key, id);
        Ok(id)
    }
}

impl Graph {
    /// The graph as plain data, and the tensors of its constants.
    pub fn to_record(&self) -> (GraphRecord, Vec<Tensor>) {
        let order = self.order();
        let place: BTreeMap<NodeId, u32> = order.iter().copied().zip(0..).collect();
        let value = |v: ValueId| ValueRecord { node: place[&v.node], port: v.port };
        let mut blobs = vec![];
        let nodes = order
            .iter()
            .map(|&id| {
                let node = self.node(id);
                let kind = match node.kind() {
                    Kind::Input => KindRecord::Input(self.ty(id.out()).clone()),
                    Kind::Constant(tensor) => {
                        blobs.push(tensor.clone());
                        let quant = self.ty(id.out()).quant.clone();
                        KindRecord::Constant { blob: (blobs.len() - 1) as u32, quant }
                    }
                    Kind::Op(op) => {
                        let operands = self.operands(id).into_iter().map(value).collect();
                        KindRecord::Op { op: op.clone(), operands }
                    }
                };
                NodeRecord { name: node.name.clone(), device: node.device, kind }
            })
            .collect();
        let outputs = self.outputs().iter();
        let outputs = outputs.map(|o| OutputRecord { name: o.name.clone(), value: value(o.value) }).collect();
        (GraphRecord { name: self.name.clone(), stage: self.stage, nodes, outputs }, blobs)
    }

    /// The graph of a record, with everything checked and inferred anew. `blobs` are the tensors of its constants.
    ///
    /// Fails where a value, a name or a blob is not what it must be, and where an op refuses its operands.
    pub fn from_record(record: GraphRecord, blobs: &[Tensor]) -> Result<Graph, Error> {
        let mut builder = Builder::new(record.name, record.stage);
        let malformed = |node: &str, reason: String| Error::Record { node: node.into(), reason };
        for (place, NodeRecord { name, device, kind }) in (0u32..).zip(record.nodes) {
            let entry = match kind {
                KindRecord::Input(ty) => Entry::Input(ty),
                KindRecord::Constant { blob, quant } => {
                    let tensor = blobs.get(blob as usize).ok_or_else(|| {
                        malformed(&name, format!("constant {blob} of {} is missing", blobs.len()))
                    })?;
                    Entry::Constant(tensor.clone(), quant)
                }
                KindRecord::Op { op, operands } => {
                    let operands = operands.iter().map(|v| {
                        builder.value(v.node, v.port).ok_or_else(|| {
                            malformed(&name, format!("operand {}.{} is not an earlier value", v.node, v.port))
                        })
                    });
                    let operands = operands.collect::<Result<_, _>>()?;
                    Entry::Op(op, operands)
                }
            };
            builder.add(place, &name, device, entry)?;
        }
        for o in record.outputs {
            let value = builder.value(o.value.node, o.value.port).ok_or_else(|| {
                malformed(&o.name, format!("result {}.{} is not a value", o.value.node, o.value.port))
            })?;
            builder.graph.output(o.name, value);
        }
        Ok(builder.graph)
    }
}
