//! Where every value lives: liveness over the order of the steps, aliases, and offsets into one arena.
//!
//! The plan is made before any code is emitted, so that addresses are constants. Scratch memory of a node lies behind
//! all values, at the same place for every node: steps never overlap, and memory that is reused stays in cache.

use crate::{CodegenError, dense::spec::SLACK, lower, module::Location};
use qcc_ir::{Graph, Kind, NodeId, Op, TensorType, ValueId, ops::UnaryKind};
use std::collections::BTreeMap;

/// The largest arena, scratch included.
pub(crate) const MAX_ARENA_BYTES: u64 = 16 << 30;

/// A value in the arena: alive from the step that defines it to the last that reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Buffer {
    pub(crate) bytes: u64,
    /// Positions in the order, both inclusive.
    pub(crate) first: usize,
    pub(crate) last: usize,
    pub(crate) offset: u64,
}

/// Places of the values of a graph.
pub(crate) struct Plan {
    /// Nodes that are computed, in order: without inputs, constants, aliases and what is fused into others.
    pub(crate) order: Vec<NodeId>,
    /// For a node computed inside another one, that other one.
    pub(crate) fused_into: BTreeMap<NodeId, NodeId>,
    /// Graph outputs that must be copied from where their value lives, and the copies' positions behind the order.
    pub(crate) output_copies: Vec<usize>,
    roots: BTreeMap<ValueId, ValueId>,
    /// Values in the caller's memory.
    external: BTreeMap<ValueId, Location>,
    /// Values in the arena.
    pub(crate) buffers: BTreeMap<ValueId, Buffer>,
    /// Bytes of the arena without scratch.
    pub(crate) arena_bytes: u64,
}

/// Whether a node's result is its operand's bytes under another type.
pub(crate) fn is_alias(graph: &Graph, node: NodeId) -> bool {
    match graph.op(node) {
        Some(Op::Reshape(_) | Op::Transfer(_)) => true,
        Some(Op::Unary(u)) => u.kind == UnaryKind::Identity,
        Some(Op::Transpose(t)) => {
            let x = graph.shape(graph.operand(node, 0));
            t.perm.iter().filter(|&&p| x[p] != 1).is_sorted()
        }
        _ => false,
    }
}

impl Plan {
    pub(crate) fn new(graph: &Graph) -> Result<Plan, CodegenError> {
        let fused_into = lower::fuse(graph);
        let all = graph.order();
        let mut roots: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        let mut order = Vec::new();
        for &node in &all {
            if graph.op(node).is_none() || fused_into.contains_key(&node) {
                continue;
            }
            if is_alias(graph, node) {
                let operand = graph.operand(node, 0);
                let root = roots.get(&operand).copied().unwrap_or(operand);
                roots.insert(node.out(), root);
            } else {
                order.push(node);
            }
        }
        let mut plan = Plan {
            order,
            fused_into,
            output_copies: Vec::new(),
            roots,
            external: BTreeMap::new(),
            buffers: BTreeMap::new(),
            arena_bytes: 0,
        };
        plan.place_inputs(graph);
        let intervals = plan.liveness(graph);
        plan.place_outputs(graph, &intervals);
        plan.place_buffers(graph, intervals)?;
        Ok(plan)
    }

    /// The value whose bytes this value is.
    pub(crate) fn root(&self, value: ValueId) -> ValueId {
        self.roots.get(&value).copied().unwrap_or(value)
    }

    /// Where a value lives; `None` for constants, which are placed when a lowering asks for them, and for values that
    /// exist only inside a fused step.
    pub(crate) fn place(&self, value: ValueId) -> Option<Location> {
        let root = self.root(value);
        let arena = || self.buffers.get(&root).map(|b| Location::Arena(b.offset));
        self.external.get(&root).copied().or_else(arena)
    }

    /// The operands that a step reads: those of the node and of what is fused into it.
    pub(crate) fn reads(&self, graph: &Graph, node: NodeId) -> Vec<ValueId> {
        let mut reads = Vec::new();
        for v in graph.operands(node) {
            match self.fused_into.get(&v.node) {
                Some(_) => reads.extend(self.reads(graph, v.node)),
                None => reads.push(v),
            }
        }
        reads
    }

    fn place_inputs(&mut self, graph: &Graph) {
        for (i, &node) in graph.inputs().iter().enumerate() {
            self.external.insert(node.out(), Location::Input(i));
        }
    }

    /// Definition and last read of every root that a step computes.
    fn liveness(&self, graph: &Graph) -> BTreeMap<ValueId, (usize, usize)> {
        let mut intervals = BTreeMap::new();
        for (position, &node) in self.order.iter().enumerate() {
            for v in self.reads(graph, node) {
                if let Some((_, last)) = intervals.get_mut(&self.root(v)) {
                    *last = position;
                }
            }
            for port in 0..graph.node(node).outputs().len() {
                intervals.insert(node.port(port as u16), (position, position));
            }
        }
        intervals
    }

    /// Values that are results of the graph and nothing else are written straight to the caller's memory.
    fn place_outputs(&mut self, graph: &Graph, intervals: &BTreeMap<ValueId, (usize, usize)>) {
        for (i, output) in graph.outputs().iter().enumerate() {
            let root = self.root(output.value);
            match intervals.get(&root) {
                Some((first, last)) if first == last && !self.external.contains_key(&root) => {
                    self.external.insert(root, Location::Output(i));
                }
                _ => self.output_copies.push(i),
            }
        }
    }

    /// Greedy by size: the largest buffers first, each into the smallest gap left by those alive at the same time.
    fn place_buffers(
        &mut self,
        graph: &Graph,
        intervals: BTreeMap<ValueId, (usize, usize)>,
    ) -> Result<(), CodegenError> {
        let end = self.order.len();
        let mut pending: Vec<(ValueId, Buffer)> = Vec::new();
        for (value, (first, last)) in intervals {
            if self.external.contains_key(&value) {
                continue;
            }
            let is_output = self.output_copies.iter().any(|&i| self.root(graph.outputs()[i].value) == value);
            let last = if is_output { end } else { last };
            let bytes = (graph.ty(value).bytes() as u64 + SLACK as u64).next_multiple_of(64);
            pending.push((value, Buffer { bytes, first, last, offset: 0 }));
        }
        pending.sort_by_key(|(value, b)| (std::cmp::Reverse(b.bytes), b.first, *value));
        let mut placed: Vec<Buffer> = Vec::with_capacity(pending.len());
        for (value, mut buffer) in pending {
            buffer.offset = best_gap(&placed, &buffer);
            self.arena_bytes = self.arena_bytes.max(buffer.offset + buffer.bytes);
            let at = placed.partition_point(|p| p.offset < buffer.offset);
            placed.insert(at, buffer.clone());
            self.buffers.insert(value, buffer);
        }
        check_arena(self.arena_bytes)
    }
}

/// Fails where an arena would be larger than [`MAX_ARENA_BYTES`].
pub(crate) fn check_arena(bytes: u64) -> Result<(), CodegenError> {
    match bytes {
        0..=MAX_ARENA_BYTES => Ok(()),
        _ => Err(CodegenError::TooLarge { what: "the arena".into(), bytes, limit: MAX_ARENA_BYTES }),
    }
}

/// Offset of the smallest gap between the `placed` buffers (sorted by offset) that are alive together with `buffer`,
/// or the end of the last of them.
fn best_gap(placed: &[Buffer], buffer: &Buffer) -> u64 {
    let mut best: Option<(u64, u64)> = None;
    let mut end = 0;
    for p in placed.iter().filter(|p| p.first <= buffer.last && buffer.first <= p.last) {
        if p.offset > end {
            let gap = p.offset - end;
            if gap >= buffer.bytes && best.is_none_or(|(size, _)| gap < size) {
                best = Some((gap, end));
            }
        }
        end = end.max(p.offset + p.bytes);
    }
    best.map_or(end, |(_, at)| at)
}

/// Whether a value is a constant of the graph.
pub(crate) fn is_constant(graph: &Graph, value: ValueId) -> bool {
    matches!(graph.node(value.node).kind(), Kind::Constant(_))
}

/// Bytes of these types together.
pub(crate) fn total_bytes<'a>(types: impl IntoIterator<Item = &'a TensorType>) -> u64 {
    types.into_iter().map(|t| t.bytes() as u64).sum()
}
