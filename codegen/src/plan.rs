//! Where every value lives: liveness over the order of the steps, aliases, layouts, and offsets into one arena.
//!
//! A value is dense in a buffer of its own, or it has a [`Layout`]: it lies in the buffer of a concatenation that it is
//! part of, or in one of its own with margins around its images, so that whoever makes it writes where it is needed; scales
//! and zero points that are made at run time lie in pairs. A value gets a layout only if all steps that touch it take strides; the lowerings say which do.
//!
//! The plan is made before any code is emitted, so that addresses are constants. Scratch memory of a node lies behind
//! all values, at the same place for every node: steps never overlap, and memory that is reused stays in cache.

use crate::{
    CodegenError,
    dense::spec::{RowGrid, SLACK},
    lower,
    module::Location,
};
use qcc_ir::{Graph, Kind, NodeId, Op, TensorType, ValueId, ops::UnaryKind};
use std::collections::{BTreeMap, BTreeSet};

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

/// Pixels around channels-last images.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Margins {
    pub(crate) above: usize,
    pub(crate) below: usize,
    pub(crate) left: usize,
    pub(crate) right: usize,
}

impl Margins {
    pub(crate) const NONE: Margins = Margins { above: 0, below: 0, left: 0, right: 0 };

    /// What holds both.
    fn union(self, other: Margins) -> Margins {
        Margins {
            above: self.above.max(other.above),
            below: self.below.max(other.below),
            left: self.left.max(other.left),
            right: self.right.max(other.right),
        }
    }
}

/// How a value lies that is not dense in a buffer of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    /// The value whose buffer it lies in.
    pub(crate) host: ValueId,
    /// Bytes from the start of that buffer to the first element.
    pub(crate) offset: u64,
    /// Bytes between neighbours along each dimension.
    pub(crate) strides: Vec<u64>,
    /// What lies around its images and belongs to them.
    pub(crate) margins: Margins,
}

/// A step that reads a value, in this slot of this node (which may be fused into the step).
#[derive(Clone, Copy, Debug)]
struct Reader {
    node: NodeId,
    slot: usize,
    value: ValueId,
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
    /// Values that are not dense in buffers of their own.
    pub(crate) layouts: BTreeMap<ValueId, Layout>,
    /// Values in the arena.
    pub(crate) buffers: BTreeMap<ValueId, Buffer>,
    /// Bytes of the arena without scratch.
    pub(crate) arena_bytes: u64,
}

/// Whether a node's result is its operand's bytes under another type.
pub(crate) fn is_alias(graph: &Graph, node: NodeId) -> bool {
    match graph.op(node) {
        Some(Op::Reshape(_) | Op::Transfer(_) | Op::AssumeGrid(_)) => true,
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
            layouts: BTreeMap::new(),
            buffers: BTreeMap::new(),
            arena_bytes: 0,
        };
        plan.place_inputs(graph);
        plan.lay_out(graph);
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
        let offset = self.layouts.get(&root).map_or(0, |l| l.offset);
        let arena = || self.buffers.get(&self.host(root)).map(|b| Location::Arena(b.offset + offset));
        self.external.get(&root).copied().or_else(arena)
    }

    /// How a value lies, where it is not dense in a buffer of its own.
    pub(crate) fn layout(&self, value: ValueId) -> Option<&Layout> {
        self.layouts.get(&self.root(value))
    }

    /// The value whose buffer a root lies in.
    fn host(&self, root: ValueId) -> ValueId {
        self.layouts.get(&root).map_or(root, |l| l.host)
    }

    /// Gives layouts to the values that can have one: first the parts of concatenations, the last of these first, so that
    /// parts of parts find where those lie; then what convolutions want margins around.
    fn lay_out(&mut self, graph: &Graph) {
        let readers = self.readers(graph);
        let results: BTreeSet<ValueId> = graph.outputs().iter().map(|o| self.root(o.value)).collect();
        let order = self.order.clone();
        let computed: BTreeSet<NodeId> = order.iter().copied().collect();
        for &node in order.iter().rev() {
            if let Some(Op::Concat(concat)) = graph.op(node) {
                self.lay_out_parts(graph, node, concat.axis, &readers, &results, &computed);
            }
        }
        for &node in &order {
            self.pair_grids(graph, node, &readers, &results);
        }
        let hosts: BTreeSet<ValueId> = self.layouts.values().map(|l| l.host).collect();
        for &node in &order {
            let value = node.out();
            let free = graph.node(node).outputs().len() == 1
                && !self.layouts.contains_key(&value)
                && !results.contains(&value)
                && !hosts.contains(&value);
            let wanted = readers.get(&value).filter(|_| free).and_then(|r| margins_for(graph, node, r));
            if let Some(margins) = wanted {
                self.layouts.insert(value, surrounded(graph.ty(value), value, margins));
            }
        }
    }

    /// Lays the scales and zero points that a step makes of rows out in pairs, as products read them, where only those do.
    fn pair_grids(
        &mut self,
        graph: &Graph,
        node: NodeId,
        readers: &BTreeMap<ValueId, Vec<Reader>>,
        results: &BTreeSet<ValueId>,
    ) {
        if !matches!(graph.op(node), Some(Op::DynamicQuantize(_))) || !lower::is_generated(graph, node) {
            return;
        }
        let [scale, zero] = [1, 2].map(|port| node.port(port));
        let mut all = [scale, zero].into_iter().flat_map(|v| readers.get(&v).into_iter().flatten());
        let are_products = all
            .all(|r| lower::reads_grids(graph, r.node, r.slot) && graph.shape(r.value) == graph.shape(scale));
        if !are_products
            || results.contains(&scale)
            || results.contains(&zero)
            || graph.shape(scale).rank() == 0
        {
            return;
        }
        let pair = RowGrid::BYTES as u64 / graph.ty(scale).dtype.size() as u64;
        let strides: Vec<u64> = dense_strides(graph.ty(scale)).into_iter().map(|s| s * pair).collect();
        for (value, offset) in [(scale, 0), (zero, RowGrid::ZERO_POINT as u64)] {
            let strides = strides.clone();
            self.layouts.insert(value, Layout { host: scale, offset, strides, margins: Margins::NONE });
        }
    }

    /// Where scales and zero points lie in pairs, if they do.
    pub(crate) fn pairs(&self, scale: ValueId, zero: ValueId) -> Option<Location> {
        let (scale, zero) = (self.root(scale), self.root(zero));
        let are_paired = self.layouts.get(&zero)?.host == scale && self.layouts.get(&scale)?.host == scale;
        self.place(scale).filter(|_| are_paired)
    }

    /// The parts of a concatenation that are written straight into it.
    fn lay_out_parts(
        &mut self,
        graph: &Graph,
        concat: NodeId,
        axis: usize,
        readers: &BTreeMap<ValueId, Vec<Reader>>,
        results: &BTreeSet<ValueId>,
        computed: &BTreeSet<NodeId>,
    ) {
        let whole = concat.out();
        if results.contains(&whole) {
            return;
        }
        let dense = || Layout {
            host: whole,
            offset: 0,
            strides: dense_strides(graph.ty(whole)),
            margins: Margins::NONE,
        };
        let outer = self.layouts.get(&whole).cloned().unwrap_or_else(dense);
        let mut first = 0;
        for part in graph.operands(concat) {
            let root = self.root(part);
            let begin = first;
            first += graph.shape(part)[axis] as u64;
            let is_own = !self.external.contains_key(&root)
                && !is_constant(graph, root)
                && !results.contains(&root)
                && !self.layouts.contains_key(&root)
                && computed.contains(&root.node)
                && graph.node(root.node).outputs().len() == 1;
            let all_take_strides =
                readers.get(&root).into_iter().flatten().all(|r| takes_strides(graph, r, root));
            let fits = graph.shape(part) == graph.shape(root) && lower::writes_strided(graph, root.node);
            if is_own && all_take_strides && fits {
                let offset = outer.offset + begin * outer.strides[axis];
                let layout = Layout { offset, ..outer.clone() };
                // Margins around the whole are none of the part's.
                self.layouts.insert(root, Layout { margins: Margins::NONE, ..layout });
            }
        }
    }

    /// Who reads each root.
    fn readers(&self, graph: &Graph) -> BTreeMap<ValueId, Vec<Reader>> {
        let mut readers: BTreeMap<ValueId, Vec<Reader>> = BTreeMap::new();
        for (node, _) in graph.nodes().filter(|(_, n)| n.op().is_some()) {
            if is_alias(graph, node) && !self.fused_into.contains_key(&node) {
                continue;
            }
            for (slot, value) in graph.operands(node).into_iter().enumerate() {
                if !self.fused_into.contains_key(&value.node) {
                    readers.entry(self.root(value)).or_default().push(Reader { node, slot, value });
                }
            }
        }
        readers
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

    /// First write and last read of every buffer that steps fill.
    fn liveness(&self, graph: &Graph) -> BTreeMap<ValueId, (usize, usize)> {
        let mut intervals = BTreeMap::new();
        for (position, &node) in self.order.iter().enumerate() {
            for v in self.reads(graph, node) {
                if let Some((_, last)) = intervals.get_mut(&self.host(self.root(v))) {
                    *last = position;
                }
            }
            for port in 0..graph.node(node).outputs().len() {
                let host = self.host(node.port(port as u16));
                intervals.entry(host).or_insert((position, position)).1 = position;
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

    /// Bytes of the buffer of a host, without slack.
    fn buffer_bytes(&self, graph: &Graph, host: ValueId) -> u64 {
        let ty = graph.ty(host);
        match self.layouts.get(&host) {
            // Images with their margins, or pairs: whatever lies between two indices of the first dimension.
            Some(layout) => ty.shape[0] as u64 * layout.strides[0],
            None => ty.bytes() as u64,
        }
    }

    /// Greedy by size, the largest buffers first: around few centers, or, if that takes much more memory, wherever there
    /// is room.
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
            let bytes = (self.buffer_bytes(graph, value) + SLACK as u64).next_multiple_of(LINE);
            pending.push((value, Buffer { bytes, first, last, offset: 0 }));
        }
        pending.sort_by_key(|(value, b)| (std::cmp::Reverse(b.bytes), b.first, *value));
        let mut placed: Vec<Buffer> = pending.iter().map(|(_, b)| b.clone()).collect();
        let is_close = |bytes: u64, least: u64| bytes <= least + least / MOST_OVERHEAD;
        self.arena_bytes = centre(&mut placed);
        // Packing takes its time, and cannot do with less than is alive at once.
        if !is_close(self.arena_bytes, most_alive(&placed)) {
            let mut packed = placed.clone();
            let least = pack(&mut packed);
            if !is_close(self.arena_bytes, least) {
                (self.arena_bytes, placed) = (least, packed);
            }
        }
        self.buffers.extend(pending.into_iter().map(|(value, _)| value).zip(placed));
        check_arena(self.arena_bytes)
    }
}

/// Buffers begin at lines of cache.
const LINE: u64 = 64;
/// The part of the least memory that centred buffers may take more.
const MOST_OVERHEAD: u64 = 4;

/// Places buffers, the largest of which come first, in turn around the same few centers: in a part of the arena of
/// which one is alive at a time. Returns the bytes of the arena.
///
/// Threads that share steps have the same part of each. So if the middles of buffers are the same address, the lines
/// before it are always written and read by the same core, whatever the sizes; where a buffer lies over parts of others,
/// many of its lines would be in another core's cache, from where they have to come even to be overwritten.
fn centre(buffers: &mut [Buffer]) -> u64 {
    struct Place {
        offset: u64,
        bytes: u64,
        /// When it is taken: the last position by the first.
        taken: BTreeMap<usize, usize>,
    }
    let mut places: Vec<Place> = Vec::new();
    let mut end = 0;
    for buffer in buffers {
        let Buffer { bytes, first, last, .. } = *buffer;
        // Of those that begin by then, the one that begins last ends last.
        let is_free = |place: &Place| place.taken.range(..=last).next_back().is_none_or(|(_, &l)| l < first);
        // The smallest one: they descend.
        let at = places.iter().rposition(is_free).unwrap_or_else(|| {
            places.push(Place { offset: end, bytes, taken: BTreeMap::new() });
            end += bytes;
            places.len() - 1
        });
        let place = &mut places[at];
        place.taken.insert(first, last);
        buffer.offset = place.offset + (place.bytes - bytes) / 2 / LINE * LINE;
    }
    end
}

/// The most bytes that are alive at once.
fn most_alive(buffers: &[Buffer]) -> u64 {
    // At a position, those that begin there come before those that end there go.
    let begins = buffers.iter().map(|b| (b.first, false, b.bytes));
    let mut changes: Vec<_> = begins.chain(buffers.iter().map(|b| (b.last, true, b.bytes))).collect();
    changes.sort_unstable();
    let mut alive = 0;
    let after = changes.into_iter().map(|(_, ends, bytes)| {
        alive = if ends { alive - bytes } else { alive + bytes };
        alive
    });
    after.max().unwrap_or(0)
}

/// Places buffers, the largest of which come first, each into the smallest gap left by those alive at the same time.
/// Returns the bytes of the arena.
fn pack(buffers: &mut [Buffer]) -> u64 {
    let mut placed: Vec<Buffer> = Vec::with_capacity(buffers.len());
    let mut end = 0;
    for buffer in buffers {
        buffer.offset = best_gap(&placed, buffer);
        end = end.max(buffer.offset + buffer.bytes);
        let at = placed.partition_point(|p| p.offset < buffer.offset);
        placed.insert(at, buffer.clone());
    }
    end
}

/// Bytes between neighbours of a dense row-major tensor.
fn dense_strides(ty: &TensorType) -> Vec<u64> {
    let mut stride = ty.dtype.size() as u64;
    let mut strides: Vec<u64> = ty
        .shape
        .iter()
        .rev()
        .map(|&n| {
            let own = stride;
            stride *= n as u64;
            own
        })
        .collect();
    strides.reverse();
    strides
}

/// Whether a reader of a root takes strides. An alias of another shape has none.
fn takes_strides(graph: &Graph, reader: &Reader, root: ValueId) -> bool {
    graph.shape(reader.value) == graph.shape(root) && lower::reads_strided(graph, reader.node, reader.slot)
}

/// The margins that the readers of a node's result want, if one wants any and all can live with them.
fn margins_for(graph: &Graph, node: NodeId, readers: &[Reader]) -> Option<Margins> {
    let value = node.out();
    if !lower::writes_strided(graph, node) || graph.shape(value).rank() != 4 {
        return None;
    }
    let mut wanted = None;
    for reader in readers {
        let same_shape = graph.shape(reader.value) == graph.shape(value);
        match lower::reads_with_margins(graph, reader.node, reader.slot).filter(|_| same_shape) {
            Some(margins) => wanted = Some(wanted.unwrap_or(Margins::NONE).union(margins)),
            None if takes_strides(graph, reader, value) => {}
            None => return None,
        }
    }
    wanted
}

/// The layout of channels-last images in a buffer of their own with margins around each.
fn surrounded(ty: &TensorType, host: ValueId, margins: Margins) -> Layout {
    let pixel = (ty.shape[3] * ty.dtype.size()) as u64;
    let row = (ty.shape[2] + margins.left + margins.right) as u64 * pixel;
    let image = (ty.shape[1] + margins.above + margins.below) as u64 * row;
    let offset = margins.above as u64 * row + margins.left as u64 * pixel;
    Layout { host, offset, strides: vec![image, row, pixel, ty.dtype.size() as u64], margins }
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
