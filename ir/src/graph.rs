use crate::{Error, Op, OpError, Shape, Stage, Tensor, TensorType, limits::MAX_OPERANDS};
use petgraph::{
    Direction,
    stable_graph::{NodeIndex, StableDiGraph},
    visit::EdgeRef,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
};

/// Identity of a node in its graph; stable while other nodes come and go. Prints as `%7`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(u32);

impl NodeId {
    /// The number behind the `%`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
    fn ix(self) -> NodeIndex {
        NodeIndex::new(self.0 as usize)
    }
    fn of(ix: NodeIndex) -> NodeId {
        NodeId(ix.index() as u32)
    }
    /// The value on the node's first (mostly its only) output.
    pub fn out(self) -> ValueId {
        ValueId { node: self, port: 0 }
    }
    /// The value on output `port`.
    pub fn port(self, port: u16) -> ValueId {
        ValueId { node: self, port }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One output of a node. Prints as `%7`, or `%7.1` for the second output.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ValueId {
    /// The node that produces the value.
    pub node: NodeId,
    /// Which of its outputs it is.
    pub port: u16,
}

impl From<NodeId> for ValueId {
    fn from(node: NodeId) -> ValueId {
        node.out()
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            0 => write!(f, "{}", self.node),
            p => write!(f, "{}.{p}", self.node),
        }
    }
}

impl fmt::Debug for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a node runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// Generated code on integers.
    Int8Jit,
    /// Generated code on floats.
    FloatJit,
    /// The reference interpreter.
    Interpreter,
}

impl Device {
    /// All devices, the most wanted first.
    pub const ALL: [Device; 3] = [Device::Int8Jit, Device::FloatJit, Device::Interpreter];

    /// The spelling of the command line and the text form.
    pub const fn name(self) -> &'static str {
        match self {
            Device::Int8Jit => "int8-jit",
            Device::FloatJit => "float-jit",
            Device::Interpreter => "interpreter",
        }
    }

    /// The device with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Device> {
        Device::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a node is.
#[derive(Clone, PartialEq, Debug)]
pub enum Kind {
    /// A value the caller supplies.
    Input,
    /// A value known at compile time.
    Constant(Tensor),
    /// A computation.
    Op(Op),
}

/// A node: its name (unique in the graph, from the model file where there is one), what it is, and its result types.
#[derive(Clone, Debug)]
pub struct Node {
    /// The name that messages use.
    pub name: String,
    /// Where the node runs; assigned last.
    pub device: Option<Device>,
    kind: Kind,
    outputs: Vec<TensorType>,
}

impl Node {
    /// What the node is.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }
    /// The op, unless this is an input or a constant.
    pub fn op(&self) -> Option<&Op> {
        match &self.kind {
            Kind::Op(op) => Some(op),
            _ => None,
        }
    }
    /// Types of the results.
    pub fn outputs(&self) -> &[TensorType] {
        &self.outputs
    }
}

/// An edge joins output `port` of its source to operand `slot` of its target. petgraph's own edge order is not used.
#[derive(Clone, Copy, Debug)]
struct Edge {
    port: u16,
    slot: u16,
}

/// A named result of the graph.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// Name, from the model file.
    pub name: String,
    /// The value.
    pub value: ValueId,
}

/// One use of a value: operand `slot` of `node`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Use {
    /// The consumer.
    pub node: NodeId,
    /// Which of its operands.
    pub slot: u16,
}

/// A directed acyclic graph of typed nodes.
///
/// Invariants, kept by every method: operand slots of a node are contiguous from 0; result types are what the op
/// infers from its operands' types; there is no cycle; node names are unique. All orders that can be seen
/// from outside are by id, never by hash or by petgraph's adjacency lists.
#[derive(Clone, Default)]
pub struct Graph {
    /// The model's name.
    pub name: String,
    /// What may stand in the graph; checked by [`verify`](crate::verify).
    pub stage: Stage,
    dag: StableDiGraph<Node, Edge>,
    inputs: Vec<NodeId>,
    outputs: Vec<Output>,
    names: BTreeMap<String, NodeId>,
    /// Nodes that were added, or lost a use, since dead ones were removed: whatever is dead now is among them or was used
    /// by one of them.
    suspects: Vec<NodeId>,
}

impl Graph {
    /// An empty graph at [`Stage::Float`].
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    // ---- building

    /// Adds a value that the caller of the compiled model supplies.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<ValueId, Error> {
        let checked = match &ty.quant {
            Some(q) => q.check(ty.dtype, &ty.shape),
            None => Ok(()),
        };
        checked
            .and_then(|()| ty.check_size())
            .map_err(|e| Error::Input { input: name.into(), reason: e.to_string() })?;
        let id = self.push(name, Kind::Input, vec![ty]);
        self.inputs.push(id);
        Ok(id.out())
    }

    /// Adds a constant of plain numbers.
    pub fn constant(&mut self, name: &str, value: Tensor) -> ValueId {
        let ty = value.ty();
        self.push(name, Kind::Constant(value), vec![ty]).out()
    }

    /// Adds a constant of quantized integers; `ty` must be the tensor's own type with a grid that fits it.
    pub fn quantized_constant(
        &mut self,
        name: &str,
        value: Tensor,
        ty: TensorType,
    ) -> Result<ValueId, Error> {
        let checked = match &ty.quant {
            Some(q) => q.check(value.dtype(), value.shape()),
            None => Ok(()),
        };
        checked.map_err(|e| self.refusal(name, "constant", e))?;
        if (ty.dtype, &ty.shape) != (value.dtype(), value.shape()) {
            let why = format!("typed {ty}, but holds {}", value.ty());
            return Err(self.refusal(name, "constant", OpError::Shape(why)));
        }
        Ok(self.push(name, Kind::Constant(value), vec![ty]).out())
    }

    /// Adds a constant of this type: of plain numbers, or of quantized integers where it has a grid.
    pub fn constant_of(&mut self, name: &str, value: Tensor, ty: TensorType) -> Result<ValueId, Error> {
        match ty.quant {
            Some(_) => self.quantized_constant(name, value, ty),
            None => Ok(self.constant(name, value)),
        }
    }

    /// Adds an op. Its result types are inferred; an op that refuses its operands is not added.
    ///
    /// `name` is made unique by a suffix where it is taken.
    pub fn add(&mut self, name: &str, op: impl Into<Op>, operands: &[ValueId]) -> Result<NodeId, Error> {
        let op = op.into();
        let outputs = self.infer(name, &op, operands)?;
        let id = self.push(name, Kind::Op(op), outputs);
        for (slot, v) in operands.iter().enumerate() {
            self.link(*v, id, slot as u16);
        }
        Ok(id)
    }

    fn infer(&self, name: &str, op: &Op, operands: &[ValueId]) -> Result<Vec<TensorType>, Error> {
        if operands.len() > MAX_OPERANDS {
            let why = format!("{} operands, above the limit of {MAX_OPERANDS}", operands.len());
            return Err(self.refusal(name, op.mnemonic(), OpError::TooLarge(why)));
        }
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.ty(v)).collect();
        let inferred = op.infer(&types).and_then(|outputs| {
            outputs.iter().try_for_each(TensorType::check_size)?;
            Ok(outputs)
        });
        inferred.map_err(|e| self.refusal(name, op.mnemonic(), e))
    }

    fn refusal(&self, node: &str, op: &str, source: OpError) -> Error {
        Error::Node { node: node.into(), op: op.into(), source }
    }

    fn push(&mut self, name: &str, kind: Kind, outputs: Vec<TensorType>) -> NodeId {
        let name = self.fresh_name(name);
        let id = NodeId::of(self.dag.add_node(Node { name: name.clone(), device: None, kind, outputs }));
        self.names.insert(name, id);
        self.suspects.push(id);
        id
    }

    /// `name`, or with a free suffix `name_1`, `name_2`… (the first one, unless names in between were freed) where a
    /// node has it already.
    pub fn fresh_name(&self, name: &str) -> String {
        if !self.names.contains_key(name) {
            return name.into();
        }
        // Doubling first keeps a graph with many equal names from turning quadratic.
        let taken = |i: usize| self.names.contains_key(&format!("{name}_{i}"));
        let mut high = 1;
        while taken(high) {
            high *= 2;
        }
        let (mut lo, mut hi) = (high / 2, high);
        while hi - lo > 1 {
            let mid = (lo + hi) / 2;
            if taken(mid) { lo = mid } else { hi = mid }
        }
        format!("{name}_{hi}")
    }

    fn link(&mut self, value: ValueId, node: NodeId, slot: u16) {
        let edge = Edge { port: value.port, slot };
        self.dag.add_edge(value.node.ix(), node.ix(), edge);
    }

    /// Declares a result of the graph.
    pub fn output(&mut self, name: impl Into<String>, value: ValueId) {
        self.outputs.push(Output { name: name.into(), value });
    }

    // ---- reading

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.dag.node_count()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The node.
    ///
    /// # Panics
    /// Where the id is of a node that was removed or of another graph.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.dag[id.ix()]
    }

    /// The node's op; `None` for inputs and constants.
    pub fn op(&self, id: NodeId) -> Option<&Op> {
        self.node(id).op()
    }

    /// Whether the id is of a node that is still there.
    pub fn contains(&self, id: NodeId) -> bool {
        self.dag.contains_node(id.ix())
    }

    /// The node with this name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> &TensorType {
        &self.node(value.node).outputs[value.port as usize]
    }

    /// The tensor behind a value that is a constant.
    pub fn constant_value(&self, value: ValueId) -> Option<&Tensor> {
        match &self.node(value.node).kind {
            Kind::Constant(t) => Some(t),
            _ => None,
        }
    }

    /// The inputs, in the order of the model's signature.
    pub fn inputs(&self) -> &[NodeId] {
        &self.inputs
    }

    /// The results, in the order of the model's signature.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// The slots that operands of a node stand in, ascending: 0, 1, 2… unless the graph is broken.
    pub(crate) fn slots(&self, node: NodeId) -> Vec<u16> {
        let edges = self.dag.edges_directed(node.ix(), Direction::Incoming);
        let mut slots: Vec<u16> = edges.map(|e| e.weight().slot).collect();
        slots.sort_unstable();
        slots
    }

    /// Operands of a node, in slot order.
    pub fn operands(&self, node: NodeId) -> Vec<ValueId> {
        let mut edges: Vec<(u16, ValueId)> = self
            .dag
            .edges_directed(node.ix(), Direction::Incoming)
            .map(|e| {
                let Edge { port, slot } = *e.weight();
                (slot, NodeId::of(e.source()).port(port))
            })
            .collect();
        edges.sort_unstable();
        edges.into_iter().map(|(_, v)| v).collect()
    }

    /// Operand `slot` of a node.
    ///
    /// # Panics
    /// Where the node has fewer operands.
    pub fn operand(&self, node: NodeId, slot: usize) -> ValueId {
        self.operands(node)[slot]
    }

    /// Uses of a value by nodes (being a graph output is not one), by consumer and slot.
    pub fn uses(&self, value: ValueId) -> Vec<Use> {
        let mut uses: Vec<Use> = self
            .dag
            .edges_directed(value.node.ix(), Direction::Outgoing)
            .filter(|e| e.weight().port == value.port)
            .map(|e| Use { node: NodeId::of(e.target()), slot: e.weight().slot })
            .collect();
        uses.sort_unstable();
        uses
    }

    /// Whether the value is a result of the graph.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs.iter().any(|o| o.value == value)
    }

    /// The one use of a value, if there is just one and it is not a result of the graph.
    pub fn sole_use(&self, value: ValueId) -> Option<Use> {
        match self.uses(value)[..] {
            [u] if !self.is_output(value) => Some(u),
            _ => None,
        }
    }

    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.dag.node_indices().map(|ix| (NodeId::of(ix), &self.dag[ix]))
    }

    /// Nodes with every producer before its consumers; among those that are ready, the lowest id first.
    pub fn order(&self) -> Vec<NodeId> {
        let bound = self.dag.node_indices().last().map_or(0, |ix| ix.index() + 1);
        let mut waiting = vec![0u32; bound];
        let mut ready = std::collections::BinaryHeap::new();
        for ix in self.dag.node_indices() {
            let n = self.dag.edges_directed(ix, Direction::Incoming).count() as u32;
            waiting[ix.index()] = n;
            if n == 0 {
                ready.push(std::cmp::Reverse(ix.index()));
            }
        }
        let mut order = Vec::with_capacity(self.len());
        while let Some(std::cmp::Reverse(i)) = ready.pop() {
            let ix = NodeIndex::new(i);
            order.push(NodeId::of(ix));
            for e in self.dag.edges_directed(ix, Direction::Outgoing) {
                let left = &mut waiting[e.target().index()];
                *left -= 1;
                if *left == 0 {
                    ready.push(std::cmp::Reverse(e.target().index()));
                }
            }
        }
        order
    }

    /// The inputs, and the nodes that depend on one: what is not constant.
    pub fn computed(&self) -> BTreeSet<NodeId> {
        let mut computed: BTreeSet<NodeId> = self.inputs().iter().copied().collect();
        for node in self.order() {
            if self.operands(node).iter().any(|v| computed.contains(&v.node)) {
                computed.insert(node);
            }
        }
        computed
    }

    /// Whether `to` is `from` or depends on it.
    pub fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        let mut stack = vec![from];
        let mut seen = BTreeSet::new();
        while let Some(n) = stack.pop() {
            if n == to {
                return true;
            }
            if seen.insert(n) {
                stack.extend(self.dag.neighbors(n.ix()).map(NodeId::of));
            }
        }
        false
    }

    /// Which of `candidates` the node `of` is or depends on, where every candidate depends on each of `behind`.
    ///
    /// Edits are mostly local: an op is put behind a value, or a value is replaced by one it is computed from. Two
    /// searches towards the inputs take turns, so that either case ends after a few steps: one from `of`, which need
    /// not go past `behind`; and one from `behind`, which settles the question by finding `of`.
    fn dependencies(&self, of: NodeId, candidates: &BTreeSet<NodeId>, behind: &[NodeId]) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::new();
        let mut from_of = Search::new([of], behind);
        let mut from_behind = Search::new(behind.iter().copied(), &[]);
        while let Some(node) = from_of.step(self) {
            if candidates.contains(&node) {
                found.insert(node);
            }
            if from_behind.step(self) == Some(of) {
                return BTreeSet::new();
            }
        }
        found
    }

    // ---- changing

    /// Replaces the op of a node and re-infers it and all that depends on it.
    ///
    /// Fails where the node is not an op, or where the op, or one downstream, refuses its operands; after the latter
    /// the graph is to be thrown away.
    pub fn set_op(&mut self, node: NodeId, op: impl Into<Op>) -> Result<(), Error> {
        self.require_op(node)?;
        self.dag[node.ix()].kind = Kind::Op(op.into());
        self.reinfer(BTreeSet::from([node]))
    }

    /// Lets operand `slot` of `node` be `value`, and re-infers downstream.
    ///
    /// Fails where the node has no such operand or the edge would close a cycle (the graph is unchanged), or where the
    /// op, or one downstream, refuses its new operands (the graph is then to be thrown away).
    pub fn set_operand(&mut self, node: NodeId, slot: usize, value: ValueId) -> Result<(), Error> {
        let old = self.operands(node);
        if slot >= old.len() {
            let why = format!("there is no operand {slot}, only {}", old.len());
            return Err(self.refusal(&self.node(node).name, self.mnemonic(node), OpError::Shape(why)));
        }
        self.refuse_cycle(node, &old, &[value])?;
        self.unlink(node, slot as u16);
        self.link(value, node, slot as u16);
        self.reinfer(BTreeSet::from([node]))
    }

    /// Replaces op and operands of a node in one step, keeping its name and its uses.
    ///
    /// Fails like [`set_operand`](Self::set_operand).
    pub fn rewrite(&mut self, node: NodeId, op: impl Into<Op>, operands: &[ValueId]) -> Result<(), Error> {
        let op = op.into();
        self.require_op(node)?;
        self.refuse_cycle(node, &self.operands(node), operands)?;
        // Before slots are counted in 16 bits.
        self.infer(&self.node(node).name, &op, operands)?;
        let edges = self.dag.edges_directed(node.ix(), Direction::Incoming);
        let edges: Vec<_> = edges.map(|e| (e.id(), NodeId::of(e.source()))).collect();
        for (edge, operand) in edges {
            self.dag.remove_edge(edge);
            self.suspects.push(operand);
        }
        for (slot, v) in operands.iter().enumerate() {
            self.link(*v, node, slot as u16);
        }
        self.set_op(node, op)
    }

    /// Fails where the node is an input or a constant.
    fn require_op(&self, node: NodeId) -> Result<(), Error> {
        match self.op(node) {
            Some(_) => Ok(()),
            None => {
                let why = OpError::attribute("only an op can be replaced by another");
                Err(self.refusal(&self.node(node).name, self.mnemonic(node), why))
            }
        }
    }

    /// Fails where one of `new` depends on `node`, whose operands are `old`.
    fn refuse_cycle(&self, node: NodeId, old: &[ValueId], new: &[ValueId]) -> Result<(), Error> {
        let behind: Vec<NodeId> = old.iter().map(|v| v.node).collect();
        for v in new.iter().filter(|v| !old.contains(v)) {
            if !self.dependencies(v.node, &BTreeSet::from([node]), &behind).is_empty() {
                let why = format!("operand {v} would depend on the node itself");
                return Err(self.refusal(&self.node(node).name, self.mnemonic(node), OpError::Shape(why)));
            }
        }
        Ok(())
    }

    fn unlink(&mut self, node: NodeId, slot: u16) {
        let edge = self
            .dag
            .edges_directed(node.ix(), Direction::Incoming)
            .find(|e| e.weight().slot == slot)
            .map(|e| (e.id(), NodeId::of(e.source())));
        if let Some((edge, operand)) = edge {
            self.dag.remove_edge(edge);
            self.suspects.push(operand);
        }
    }

    /// Infers these nodes, and what depends on those whose types change.
    fn reinfer(&mut self, mut dirty: BTreeSet<NodeId>) -> Result<(), Error> {
        // Most edits are of one node and change no type; only for others is the order of the graph needed. Then each
        // node is inferred once, after all its operands: in between, operands of one node may not fit each other.
        if dirty.len() == 1
            && let Some(from) = dirty.pop_first()
        {
            if !self.infer_again(from)? {
                return Ok(());
            }
            dirty = self.dag.neighbors(from.ix()).map(NodeId::of).collect();
        }
        for id in self.order() {
            if dirty.contains(&id) && self.infer_again(id)? {
                dirty.extend(self.dag.neighbors(id.ix()).map(NodeId::of));
            }
        }
        Ok(())
    }

    /// Infers one node; whether its types changed.
    fn infer_again(&mut self, id: NodeId) -> Result<bool, Error> {
        let Kind::Op(op) = &self.node(id).kind else {
            return Ok(false);
        };
        let outputs = self.infer(&self.node(id).name, op, &self.operands(id))?;
        let changed = outputs != self.node(id).outputs;
        self.dag[id.ix()].outputs = outputs;
        Ok(changed)
    }

    /// Lets every user of `old`, graph outputs included, use `new`, and re-infers downstream.
    ///
    /// A node that `new` itself depends on keeps using `old`: so an op can be put behind a value.
    pub fn replace_all_uses(&mut self, old: ValueId, new: ValueId) -> Result<(), Error> {
        if old == new {
            return Ok(());
        }
        let users: BTreeSet<NodeId> = self.uses(old).into_iter().map(|u| u.node).collect();
        let keep = self.dependencies(new.node, &users, &[old.node]);
        // In petgraph's own order: it finds the edges to remove at the head of its lists.
        let moved: Vec<_> = self
            .dag
            .edges_directed(old.node.ix(), Direction::Outgoing)
            .filter(|e| e.weight().port == old.port && !keep.contains(&NodeId::of(e.target())))
            .map(|e| (e.id(), NodeId::of(e.target()), e.weight().slot))
            .collect();
        for &(edge, node, slot) in &moved {
            self.dag.remove_edge(edge);
            self.link(new, node, slot);
        }
        for o in &mut self.outputs {
            if o.value == old {
                o.value = new;
            }
        }
        self.suspects.push(old.node);
        if self.ty(old) == self.ty(new) || moved.is_empty() {
            return Ok(());
        }
        self.reinfer(moved.into_iter().map(|(_, node, _)| node).collect())
    }

    /// Points graph output `index` at another value.
    pub fn set_output(&mut self, index: usize, value: ValueId) {
        let old = std::mem::replace(&mut self.outputs[index].value, value);
        self.suspects.push(old.node);
    }

    /// Keeps only these results of the graph; to look at values in its middle, give it others.
    pub fn set_outputs(&mut self, outputs: Vec<Output>) {
        let old = std::mem::replace(&mut self.outputs, outputs);
        self.suspects.extend(old.iter().map(|o| o.value.node));
    }

    /// Renames a node (to a fresh name close to this one).
    pub fn rename(&mut self, node: NodeId, name: &str) {
        let old = std::mem::take(&mut self.dag[node.ix()].name);
        self.names.remove(&old);
        let name = self.fresh_name(name);
        self.names.insert(name.clone(), node);
        self.dag[node.ix()].name = name;
    }

    /// Says where a node runs.
    pub fn set_device(&mut self, node: NodeId, device: Option<Device>) {
        self.dag[node.ix()].device = device;
    }

    /// Removes nodes that no result depends on. Inputs stay: they are the model's signature. Returns how many went.
    ///
    /// Takes time for what changed since the last time only, so a pass may call it after every edit.
    pub fn remove_dead(&mut self) -> usize {
        let kept: BTreeSet<NodeId> =
            self.outputs.iter().map(|o| o.value.node).chain(self.inputs.iter().copied()).collect();
        let mut dead = BTreeSet::new();
        // Uses by nodes that are not dead, counted when a node is first met.
        let mut uses: BTreeMap<NodeId, usize> = BTreeMap::new();
        let count = |graph: &Graph, n: NodeId| graph.dag.edges(n.ix()).count();
        let mut suspects = std::mem::take(&mut self.suspects);
        while let Some(n) = suspects.pop() {
            let is_dead = self.contains(n)
                && !kept.contains(&n)
                && *uses.entry(n).or_insert_with(|| count(self, n)) == 0
                && dead.insert(n);
            if is_dead {
                for operand in self.dag.neighbors_directed(n.ix(), Direction::Incoming).map(NodeId::of) {
                    *uses.entry(operand).or_insert_with(|| count(self, operand)) -= 1;
                    suspects.push(operand);
                }
            }
        }
        // Backwards, because petgraph finds the youngest edges of a node first.
        for id in dead.iter().rev() {
            if let Some(node) = self.dag.remove_node(id.ix()) {
                self.names.remove(&node.name);
            }
        }
        dead.len()
    }

    /// The op's mnemonic; `input` or `constant` for the others.
    pub fn mnemonic(&self, node: NodeId) -> &'static str {
        match &self.node(node).kind {
            Kind::Input => "input",
            Kind::Constant(_) => "constant",
            Kind::Op(op) => op.mnemonic(),
        }
    }

    /// Multiply-accumulate operations of one node, as convolutions and matrix products count them; 0 for other ops.
    pub fn macs(&self, node: NodeId) -> u64 {
        let Some(op) = self.op(node) else { return 0 };
        let operands = self.operands(node);
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.ty(v)).collect();
        op.macs(&types, &self.node(node).outputs)
    }

    /// The shape of a value, for short.
    pub fn shape(&self, value: ValueId) -> &Shape {
        &self.ty(value).shape
    }
}

/// A breadth-first search from nodes towards what they depend on.
struct Search {
    queue: VecDeque<NodeId>,
    seen: BTreeSet<NodeId>,
}

impl Search {
    /// From `start`, never going into `barrier`.
    fn new(start: impl IntoIterator<Item = NodeId>, barrier: &[NodeId]) -> Search {
        let mut search = Search { queue: VecDeque::new(), seen: barrier.iter().copied().collect() };
        start.into_iter().for_each(|n| search.push(n));
        search
    }

    fn push(&mut self, node: NodeId) {
        if self.seen.insert(node) {
            self.queue.push_back(node);
        }
    }

    /// The next node found; `None` at the end.
    fn step(&mut self, graph: &Graph) -> Option<NodeId> {
        let node = self.queue.pop_front()?;
        graph.dag.neighbors_directed(node.ix(), Direction::Incoming).for_each(|n| self.push(NodeId::of(n)));
        Some(node)
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::text::print(self))
    }
}
