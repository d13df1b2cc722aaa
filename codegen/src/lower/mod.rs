//! Lowering: each op of the graph becomes steps of machine code.
//!
//! Files mirror those of `qcc_ir::ops`. A family has a [`Lowerer`] for each op: what it supports and how it is
//! emitted stand next to each other. An op without one runs in the reference interpreter.

mod conv;
mod dynamic;
mod elementwise;
mod matmul;
mod norm;
mod pool;
mod product;
mod quantize;
mod recurrent;
mod reduce;
mod resample;
mod shape;

use crate::{
    CodegenError, Options, Release,
    dense::{
        Problem, asm,
        choose::{self, Cut, Share, Tiling},
        clif_tile::TILE_PARAMETERS,
        driver::{PackedAt, PendingWalk},
        margins, pack,
        spec::TileSpec,
        strip::StripSpec,
    },
    kernels::map::View,
    memory::Memory,
    model::{Step, Work},
    module::{CodeBuilder, Emitter, FunctionKind, Functions, Location},
    plan::{Margins, Plan, check_arena, is_alias, is_constant, total_bytes},
    recurrence::Recurrence,
    routine::{Routine, Source},
    shared::{self, PackKey, SHARED_FROM, SharedWeights},
    sharing::{self, Cost},
    tier::Isa,
    times::{CompileTimes, ThreadTime},
    weights::{MAX_WEIGHT_BYTES, WeightBlock, Weights},
};
use cranelift_codegen::ir::{InstBuilder, Value};
use cranelift_module::FuncId;
use product::IntegerProducts;
use qcc_ir::{
    Device, Graph, NodeId, Op, OpError, Tensor, TensorType, ValueId,
    memory::{MemoryError, signature_bytes},
};
use rayon::{Scope, prelude::*};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

/// Nanoseconds that are worth another thread in a step that two share. Tests have small tensors and share all steps.
const THREAD_GRAIN: f64 = if cfg!(test) { 1.0 } else { 2_000.0 };

/// The same in a step that is repeated: each time, threads wait for each other, and read what the others have written.
const REPEATED_GRAIN: f64 = 4_000.0;

/// Bytes that are worth another thread's waking to be packed.
const WORTH_THREADS: usize = 16 << 10;

/// Constants of fewer bytes are compared, and equal ones are stored once: tables repeat, large weights do not.
const SMALL: usize = (64 << 10) + 1;

/// How one op is lowered.
pub(crate) struct Lowerer {
    /// Whether this node can be emitted, or why not. Must be the whole truth, but for requantizations that cannot be
    /// expressed: `lower` may rely on it.
    pub(crate) supported: fn(&Graph, NodeId) -> Result<(), String>,
    /// Emits the steps of a supported node.
    pub(crate) lower: fn(&mut Lowering, NodeId) -> Result<(), CodegenError>,
}

/// The one table of lowerings. `None`: only the interpreter computes it.
fn lowerer(op: &Op) -> Option<&'static Lowerer> {
    Some(match op {
        Op::Unary(_) => &elementwise::UNARY,
        Op::Binary(_) => &elementwise::BINARY,
        Op::QUnary(_) => &elementwise::Q_UNARY,
        Op::QBinary(_) => &elementwise::Q_BINARY,
        Op::Where(_) => &elementwise::WHERE,
        Op::Cast(_) => &elementwise::CAST,
        Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_) => &conv::CONV,
        Op::MatMul(_) | Op::QMatMul(_) | Op::QMatMulToFloat(_) => &matmul::MATMUL,
        Op::DynamicQuantize(_) => &dynamic::DYNAMIC_QUANTIZE,
        Op::Resample(_) => &resample::RESAMPLE,
        Op::QResample(_) => &resample::Q_RESAMPLE,
        Op::Reshape(_) | Op::Transfer(_) | Op::AssumeGrid(_) => &shape::ALIAS,
        Op::Transpose(_) => &shape::TRANSPOSE,
        Op::Slice(_) => &shape::SLICE,
        Op::Concat(_) => &shape::CONCAT,
        Op::Pad(_) => &shape::PAD,
        Op::Expand(_) => &shape::EXPAND,
        Op::Gather(_) => &shape::GATHER,
        Op::Pool(_) => &pool::POOL,
        Op::QAveragePool(_) => &pool::Q_AVERAGE_POOL,
        Op::Normalize(_) => &norm::NORMALIZE,
        Op::Softmax(_) => &norm::SOFTMAX,
        Op::Lrn(_) => &norm::LRN,
        Op::Reduce(_) => &reduce::REDUCE,
        Op::Recurrent(_) => &recurrent::RECURRENT,
        Op::Quantize(_) => &quantize::QUANTIZE,
        Op::Dequantize(_) => &quantize::DEQUANTIZE,
        Op::FakeQuant(_) => &quantize::FAKE_QUANT,
        // Rare, and as fast as memory lets them be in the interpreter.
        Op::BitCast(_)
        | Op::CastSmall(_)
        | Op::ArgExtreme(_)
        | Op::TopK(_)
        | Op::Cumulate(_)
        | Op::Determinant(_)
        | Op::Inverse(_)
        | Op::ArgMaxPool(_)
        | Op::GridSample(_)
        | Op::RoiAlign(_)
        | Op::LinearAttention(_)
        | Op::TreeEnsemble(_)
        | Op::CoupleProbabilities(_)
        | Op::GatherElements(_)
        | Op::GatherNd(_)
        | Op::ScatterElements(_)
        | Op::ScatterNd(_) => return None,
        // Folded by the passes, or products of integers that nothing says the meaning of.
        Op::BatchNorm(_) | Op::IntConv(_) | Op::PlainMatMul(_) => return None,
    })
}

/// Whether generated code can compute a node, or why not.
pub fn capability(graph: &Graph, node: NodeId) -> Result<(), String> {
    has_kernel(graph, node)?;
    product::check_requantization(graph, node)
}

/// Like [`capability`], but for what only the values of weights can tell, which the lowering finds out by itself.
fn has_kernel(graph: &Graph, node: NodeId) -> Result<(), String> {
    match graph.op(node) {
        None => Ok(()),
        Some(op) => match lowerer(op) {
            Some(l) => (l.supported)(graph, node),
            None => Err(format!("{} has no lowering", op.mnemonic())),
        },
    }
}

/// Whether a node has a device that runs generated code, and a lowering.
pub(crate) fn is_generated(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.node(node).device, Some(Device::Int8Jit | Device::FloatJit))
        && has_kernel(graph, node).is_ok()
}

/// Whether the steps of a node read this operand by its strides, whatever they are.
pub(crate) fn reads_strided(graph: &Graph, node: NodeId, slot: usize) -> bool {
    let takes = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) => conv::reads_strided(graph, node, slot),
        Some(Op::Gather(g)) => slot == 0 && shape::is_progression(graph, node, g.axis),
        Some(Op::Slice(_) | Op::Concat(_) | Op::Pad(_) | Op::Expand(_)) => true,
        Some(op) => writes_views(op),
        None => false,
    };
    takes && is_generated(graph, node)
}

/// Whether the steps of a node write its result by its strides, whatever they are, as long as channels (the last
/// dimension) follow each other.
pub(crate) fn writes_strided(graph: &Graph, node: NodeId) -> bool {
    let takes = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) => conv::writes_strided(graph, node),
        Some(Op::Slice(_) | Op::Concat(_) | Op::Pad(_) | Op::Expand(_)) => true,
        Some(op) => writes_views(op),
        None => false,
    };
    takes && is_generated(graph, node)
}

/// Ops that read all operands and write their result through a [`View`].
fn writes_views(op: &Op) -> bool {
    quantize::maps_elements(op)
        || matches!(
            op,
            Op::Binary(_)
                | Op::Where(_)
                | Op::QBinary(_)
                | Op::Transpose(_)
                | Op::Pool(_)
                | Op::QAveragePool(_)
        )
}

/// Whether the step of a node reads this operand as the scales or zero points of rows.
pub(crate) fn reads_grids(graph: &Graph, node: NodeId, slot: usize) -> bool {
    product::grids_at_run_time(graph, node).is_some()
        && product::GRID_SLOTS.contains(&slot)
        && is_generated(graph, node)
}

/// The margins that a node needs around this operand, if it is one that is read with them in place.
pub(crate) fn reads_with_margins(graph: &Graph, node: NodeId, slot: usize) -> Option<Margins> {
    let margins = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) if slot == 0 => conv::margins(graph, node),
        _ => None,
    };
    margins.filter(|_| is_generated(graph, node))
}

/// Nodes that are computed within the step of another one, and that other one: a transpose before or behind an
/// elementwise op of one operand is only the order in which that op reads or writes. Every int8 model begins with such
/// a pair (f32 channels first to u8 channels last). Before a product of two values, as the heads of attention are, it is
/// the order in which operands are packed and read. Functions of elements are chained: [`elementwise::chains`].
pub(crate) fn fuse(graph: &Graph) -> BTreeMap<NodeId, NodeId> {
    let mut fused: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    let mut into = BTreeSet::new();
    for (node, _) in graph.nodes().filter(|(_, n)| n.op().is_some()) {
        let Some(&operand) = graph.operands(node).first() else { continue };
        let (Some(outer), Some(inner)) = (graph.op(node), graph.op(operand.node)) else { continue };
        let is_pair = match (outer, inner) {
            (Op::Transpose(_), inner) => quantize::maps_elements(inner) && !is_alias(graph, node),
            (outer, Op::Transpose(_)) => quantize::maps_elements(outer) && !is_alias(graph, operand.node),
            _ => false,
        };
        let is_free = |operand: ValueId, into: &BTreeSet<NodeId>| {
            graph.sole_use(operand).is_some()
                && !into.contains(&operand.node)
                && !is_alias(graph, operand.node)
                && !is_alias(graph, node)
                && is_generated(graph, operand.node)
        };
        if is_pair && !fused.contains_key(&node) && is_free(operand, &into) && is_generated(graph, node) {
            fused.insert(operand.node, node);
            into.insert(node);
        }
        for (slot, operand) in graph.operands(node).into_iter().enumerate() {
            if let Some(Op::Transpose(t)) = graph.op(operand.node)
                && matmul::reads_permuted(graph, node, slot, &t.perm)
                && !fused.contains_key(&operand.node)
                && is_free(operand, &into)
                && is_generated(graph, node)
            {
                fused.insert(operand.node, node);
                into.insert(node);
            }
        }
    }
    let chains = elementwise::chains(graph, |node| fused.contains_key(&node) || into.contains(&node));
    fused.extend(chains);
    fused
}

/// The state of lowering one model, for the time `'s` in which its workers run.
pub(crate) struct Lowering<'w, 's> {
    pub(crate) graph: &'s Graph,
    pub(crate) options: &'s Options,
    pub(crate) plan: Plan,
    /// Bytes of memory besides the arena.
    besides: u64,
    workers: &'w Scope<'s>,
    code: CodeBuilder<'w, 's>,
    weights: WeightBlock<'s>,
    /// Packed weights that models share, in the order in which walks name them.
    shared: Vec<SharedPart>,
    /// The constants of integer products.
    pub(crate) products: &'s IntegerProducts,
    /// What writing weights takes.
    packing: &'s ThreadTime,
    constants: BTreeMap<ValueId, u32>,
    /// Writes to the weights that no worker has got yet, and how many bytes they write.
    writes: Vec<Box<dyn FnOnce() + Send + 's>>,
    write_bytes: usize,
    steps: Vec<PendingStep>,
    /// How threads divide the values that walks compute. Others are divided by rows of pixels, as a rule.
    shares: BTreeMap<ValueId, Share>,
    /// The node whose steps are being emitted.
    node: Option<NodeId>,
    scratch_used: u64,
    scratch_bytes: u64,
    constant_bytes: usize,
    /// How dense problems can be cut, by problem and what is read between two uses of its weights. The blocks of a network
    /// repeat.
    candidates: HashMap<(Problem, usize), Arc<[Cut]>>,
    /// Assembled tiles, by what they depend on.
    tiles: HashMap<(Isa, TileSpec), FuncId>,
    /// The same of strips.
    strips: HashMap<StripSpec, FuncId>,
}

/// A step whose code is not yet executable.
pub(crate) struct PendingStep {
    pub(crate) step: Step,
    pub(crate) code: PendingCode,
}

/// Packed weights that models share.
enum SharedPart {
    /// Another model has packed them.
    Found(Arc<Memory>),
    /// They are being packed.
    Made(PackKey, Arc<OnceLock<Arc<Memory>>>),
}

/// A constant that is still being packed.
struct Unpacked<'s> {
    release: &'s Option<Release>,
    constant: &'s Tensor,
}

impl Drop for Unpacked<'_> {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            release.call(self.constant.bytes());
        }
    }
}

/// What a step runs.
pub(crate) enum PendingCode {
    /// Nothing generated: the step holds its definition.
    Interpreter,
    /// One function.
    Function(FuncId),
    /// The tiles of a dense problem.
    Walk(Box<PendingWalk>),
    /// What needs no code of its own.
    Routine(Routine),
    /// Steps that are repeated.
    Recurrence(Box<Recurrence>, Vec<PendingStep>),
}

/// What goes through the nodes makes, complete once the workers are done.
struct AllLowered {
    code: Functions,
    weight_bytes: usize,
    shared: Vec<SharedPart>,
    steps: Vec<PendingStep>,
    arena_bytes: u64,
}

/// What lowering made of a graph.
pub(crate) struct Lowered {
    /// Packed weights that it shares with other models.
    pub(crate) shared: Vec<Arc<Memory>>,
    pub(crate) code: Functions,
    pub(crate) weights: Weights,
    pub(crate) steps: Vec<PendingStep>,
    pub(crate) arena_bytes: u64,
    pub(crate) times: CompileTimes,
}

/// Lowers every node of a placed graph.
///
/// The calling thread goes through the nodes. What takes long is left to the threads of rayon's pool, which begin at once:
/// summing weights, packing them, assembling and compiling functions. Nothing that comes out depends on them.
pub(crate) fn lower(graph: &Graph, options: &Options) -> Result<Lowered, CodegenError> {
    let constant_bytes = constant_bytes(graph);
    lower_within(graph, options, constant_bytes, expected_weights(constant_bytes))
}

/// The same, with room for so many bytes of weights. If they turn out to take more, it begins anew with twice as much.
fn lower_within(
    graph: &Graph,
    options: &Options,
    constant_bytes: usize,
    mut room: usize,
) -> Result<Lowered, CodegenError> {
    let start = Instant::now();
    let products = product::integer_products(graph);
    let constants = start.elapsed();
    let (packing, generating) = (ThreadTime::default(), ThreadTime::default());
    loop {
        let mut memory = Memory::zeroed(room)?;
        let block = WeightBlock::new(memory.bytes_mut());
        let begin = Instant::now();
        let mut lowering = Duration::ZERO;
        let lowered = rayon::in_place_scope(|workers| {
            let code = CodeBuilder::new(options.tier, options.listing, workers, &generating);
            let cx = code.and_then(|code| {
                Lowering::new(graph, options, constant_bytes, &products, (block, &packing), (code, workers))
            });
            let lowered = cx.map_err(|e| (e, false))?.lower_all();
            lowering = begin.elapsed();
            lowered
        });
        let waiting = begin.elapsed() - lowering;
        match lowered {
            Ok(AllLowered { code, weight_bytes, shared, steps, arena_bytes }) => {
                let weights = Weights::new(memory, weight_bytes);
                let shared = finished(shared, options)?;
                let (packing, generating) = (packing.sum(), generating.sum());
                let sealing = Duration::ZERO;
                let times = CompileTimes { constants, lowering, waiting, sealing, packing, generating };
                return Ok(Lowered { shared, code, weights, steps, arena_bytes, times });
            }
            Err((_, true)) if room < MAX_WEIGHT_BYTES => room = room.saturating_mul(2).min(MAX_WEIGHT_BYTES),
            Err((error, _)) => return Err(error),
        }
    }
}

/// The packed weights, which later models may find from now on.
fn finished(parts: Vec<SharedPart>, options: &Options) -> Result<Vec<Arc<Memory>>, CodegenError> {
    let finish = |part| match part {
        SharedPart::Found(memory) => Ok(memory),
        SharedPart::Made(key, made) => {
            let memory = made.get().cloned().ok_or_else(|| CodegenError::Backend {
                function: "weights".into(),
                reason: "they were not packed".into(),
            })?;
            if let Some(shared) = &options.shared {
                shared.insert(key, &memory);
            }
            Ok(memory)
        }
    };
    parts.into_iter().map(finish).collect()
}

/// About what the packed weights will take: the constants, and padding to whole panels.
fn expected_weights(constant_bytes: usize) -> usize {
    constant_bytes.saturating_add(constant_bytes / 2).saturating_add(1 << 20).min(MAX_WEIGHT_BYTES)
}

fn constant_bytes(graph: &Graph) -> usize {
    let bytes = graph.nodes().filter_map(|(id, _)| graph.constant_value(id.out())).map(|t| t.bytes().len());
    bytes.fold(0, usize::saturating_add)
}

/// The most that a step takes which the interpreter runs: copies of its operands and its results.
fn interpreted_bytes(graph: &Graph) -> u64 {
    let of = |(id, n): (NodeId, &qcc_ir::Node)| {
        let operands = graph.operands(id).into_iter().filter(|v| graph.constant_value(*v).is_none());
        let operands: u64 = operands.map(|v| graph.ty(v).bytes() as u64).fold(0, u64::saturating_add);
        n.outputs().iter().map(|ty| ty.bytes() as u64).fold(operands, u64::saturating_add)
    };
    graph.nodes().filter(|(_, n)| n.device == Some(Device::Interpreter)).map(of).max().unwrap_or(0)
}

impl<'w, 's> Lowering<'w, 's> {
    fn new(
        graph: &'s Graph,
        options: &'s Options,
        constant_bytes: usize,
        products: &'s IntegerProducts,
        (weights, packing): (WeightBlock<'s>, &'s ThreadTime),
        (code, workers): (CodeBuilder<'w, 's>, &'w Scope<'s>),
    ) -> Result<Lowering<'w, 's>, CodegenError> {
        let plan = Plan::new(graph)?;
        // Packed weights take about what the constants do, which stay. What steps take that the interpreter runs is
        // theirs while they run.
        let besides = (constant_bytes as u64)
            .saturating_mul(2)
            .saturating_add(signature_bytes(graph))
            .saturating_add(interpreted_bytes(graph));
        MemoryError::check("the model", besides.saturating_add(plan.arena_bytes), options.max_memory)?;
        Ok(Lowering {
            graph,
            options,
            plan,
            besides,
            workers,
            code,
            weights,
            shared: Vec::new(),
            products,
            packing,
            constants: BTreeMap::new(),
            writes: Vec::new(),
            write_bytes: 0,
            steps: Vec::new(),
            shares: BTreeMap::new(),
            node: None,
            scratch_used: 0,
            scratch_bytes: 0,
            constant_bytes,
            candidates: HashMap::new(),
            tiles: HashMap::new(),
            strips: HashMap::new(),
        })
    }

    /// All that lowering makes; or an error, and whether it is that the weights
    /// have outgrown their memory.
    fn lower_all(mut self) -> Result<AllLowered, (CodegenError, bool)> {
        let order = self.plan.order.clone();
        let mut lowered = order.into_iter().try_for_each(|node| self.lower_node(node));
        let copies = self.plan.output_copies.clone();
        lowered = lowered.and_then(|()| copies.into_iter().try_for_each(|output| self.copy_output(output)));
        self.flush();
        let arena_bytes = self.plan.arena_bytes + self.scratch_bytes;
        match lowered.and_then(|()| check_arena(arena_bytes)) {
            Ok(()) => {
                self.share_steps();
                Ok(AllLowered {
                    code: self.code.into_functions(),
                    weight_bytes: self.weights.len(),
                    shared: self.shared,
                    steps: self.steps,
                    arena_bytes,
                })
            }
            Err(error) => Err((error, self.weights.is_outgrown())),
        }
    }

    fn lower_node(&mut self, node: NodeId) -> Result<(), CodegenError> {
        self.node = Some(node);
        self.scratch_used = 0;
        let n = self.graph.node(node);
        let Some(op) = n.op() else { return Ok(()) };
        match n.device {
            None => Err(CodegenError::NotPlaced { node: n.name.clone() }),
            Some(Device::Interpreter) => self.interpret(node),
            Some(Device::Int8Jit | Device::FloatJit) => {
                let supported = has_kernel(self.graph, node);
                match (lowerer(op), supported) {
                    (Some(lowerer), Ok(())) => {
                        (lowerer.lower)(self, node)?;
                        self.surround(node)
                    }
                    (_, refused) => Err(CodegenError::Unsupported {
                        node: n.name.clone(),
                        op: op.mnemonic(),
                        reason: refused.err().unwrap_or_default(),
                    }),
                }
            }
        }
    }

    /// Fills the margins around a node's result, which other values may have used since the last run.
    fn surround(&mut self, node: NodeId) -> Result<(), CodegenError> {
        let value = node.out();
        let Some(margins) = self.plan.layout(value).map(|l| l.margins).filter(|&m| m != Margins::NONE) else {
            return Ok(());
        };
        let images = self.view(value)?;
        let ty = self.graph.ty(value);
        let zero = ty.per_tensor().map_or(0, |(_, z)| z);
        margins::surround(self, &images, &ty.shape, margins, zero as u8);
        Ok(())
    }

    fn interpret(&mut self, node: NodeId) -> Result<(), CodegenError> {
        let reads = self.graph.operands(node);
        let operands = reads.iter().map(|&v| self.source(v)).collect::<Result<Vec<_>, _>>()?;
        let outputs = 0..self.graph.node(node).outputs().len();
        let results = outputs.map(|p| self.location(node.port(p as u16))).collect::<Result<Vec<_>, _>>()?;
        let step = Step::interpreted(self.graph, node, operands, results, self.work(node));
        self.steps.push(PendingStep { step, code: PendingCode::Interpreter });
        Ok(())
    }

    fn copy_output(&mut self, index: usize) -> Result<(), CodegenError> {
        let value = self.graph.outputs()[index].value;
        self.node = Some(value.node);
        let from = self.location(value)?;
        let bytes = self.graph.ty(value).bytes() as u64;
        shape::copy(self, &format!("output{index}_copy"), from, Location::Output(index), bytes)
    }

    /// Where a routine or the interpreter reads a dense value: constants where they are.
    pub(crate) fn source(&mut self, value: ValueId) -> Result<Source, CodegenError> {
        match self.graph.constant_value(value) {
            Some(tensor) => Ok(Source::Constant(tensor.clone())),
            None => self.location(value).map(Source::At),
        }
    }

    /// Where a dense value lives. A constant that is asked for is put into the weights, as it is.
    pub(crate) fn location(&mut self, value: ValueId) -> Result<Location, CodegenError> {
        match self.plan.layout(value) {
            None => self.place(value),
            Some(_) => Err(CodegenError::Backend {
                function: self.graph.node(value.node).name.clone(),
                reason: "its value has strides that a reader or writer does not take".into(),
            }),
        }
    }

    /// Where the first element of a value lives.
    fn place(&mut self, value: ValueId) -> Result<Location, CodegenError> {
        if let Some(place) = self.plan.place(value) {
            return Ok(place);
        }
        let root = self.plan.root(value);
        if let Some(&offset) = self.constants.get(&root) {
            return Ok(Location::Weights(offset));
        }
        match self.graph.constant_value(root) {
            Some(tensor) if is_constant(self.graph, root) => {
                let offset = match tensor.bytes().len() {
                    0..SMALL => self.weights(tensor.bytes(), 64)?,
                    size => self.own(tensor, &[size], |_, part| part.copy_from_slice(tensor.bytes()))?[0],
                };
                self.constants.insert(root, offset);
                Ok(Location::Weights(offset))
            }
            _ => Err(CodegenError::Backend {
                function: self.graph.node(value.node).name.clone(),
                reason: "its value has no place".into(),
            }),
        }
    }

    /// Arena memory for the steps of the node being lowered only: 64-byte aligned, with `SLACK` readable bytes behind.
    /// What it holds at first is undefined.
    pub(crate) fn scratch(&mut self, bytes: u64) -> Result<Location, CodegenError> {
        let offset = self.plan.arena_bytes + self.scratch_used;
        let slack = crate::dense::spec::SLACK as u64;
        self.scratch_used += bytes.saturating_add(slack).next_multiple_of(64);
        self.scratch_bytes = self.scratch_bytes.max(self.scratch_used);
        let arena = self.plan.arena_bytes.saturating_add(self.scratch_bytes);
        check_arena(arena)?;
        MemoryError::check("the model", self.besides.saturating_add(arena), self.options.max_memory)?;
        Ok(Location::Arena(offset))
    }

    /// Puts read-only bytes into the weights, aligned to `align` (a power of two, at most 64); equal parts are shared.
    pub(crate) fn weights(&mut self, bytes: &[u8], align: usize) -> Result<u32, CodegenError> {
        let (offset, unwritten) = self.weights.add(bytes, align)?;
        if let Some(unwritten) = unwritten {
            self.write(bytes.len(), move || unwritten.write());
        }
        Ok(offset)
    }

    /// Has so many bytes of the weights written, on any thread.
    fn write(&mut self, bytes: usize, write: impl FnOnce() + Send + 's) {
        self.writes.push(Box::new(write));
        self.write_bytes += bytes;
        if self.write_bytes >= WORTH_THREADS {
            self.flush();
        }
    }

    /// Hands what is to be written to the workers.
    fn flush(&mut self) {
        let writes = std::mem::take(&mut self.writes);
        self.write_bytes = 0;
        let packing = self.packing;
        self.workers.spawn(move |_| packing.of(|| writes.into_iter().for_each(|write| write())));
    }

    /// Has parts of these sizes, each aligned to [`ALIGN`](pack::ALIGN), written from this constant: `write(i, part)`, on
    /// any thread. The parts are zeros before. Where they lie, and their offsets there.
    pub(crate) fn packed(
        &mut self,
        constant: &'s Tensor,
        key: impl FnOnce() -> PackKey,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<(PackedAt, Vec<u32>), CodegenError> {
        let all = sizes.iter().copied().fold(0, usize::saturating_add);
        match self.options.shared.as_ref().filter(|_| all >= SHARED_FROM) {
            Some(shared) => self.packed_shared(shared, constant, key(), sizes, write),
            None => Ok((PackedAt::Model, self.own(constant, sizes, write)?)),
        }
    }

    /// The same among the model's own weights; their offsets.
    fn own(
        &mut self,
        constant: &'s Tensor,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<Vec<u32>, CodegenError> {
        let lengths = sizes.iter().map(|n| n.next_multiple_of(pack::ALIGN));
        let (first, mut rest) = self.weights.reserve(lengths.clone().sum(), pack::ALIGN)?;
        let (mut offsets, mut at) = (Vec::with_capacity(sizes.len()), first);
        // Released when the last part is written.
        let write = Arc::new((write, Unpacked { release: &self.options.release, constant }));
        for (i, (length, &size)) in lengths.zip(sizes).enumerate() {
            let (part, behind) = rest.split_at_mut(length);
            rest = behind;
            offsets.push(at);
            at += length as u32;
            let write = write.clone();
            self.write(size, move || (write.0)(i, &mut part[..size]));
        }
        Ok(offsets)
    }

    /// The same among the weights that models share; what another one has packed is not packed again.
    fn packed_shared(
        &mut self,
        shared: &SharedWeights,
        constant: &'s Tensor,
        key: PackKey,
        sizes: &[usize],
        write: impl Fn(usize, &mut [u8]) + Send + Sync + 's,
    ) -> Result<(PackedAt, Vec<u32>), CodegenError> {
        let (mut memory, offsets) = shared::memory_for(sizes, pack::ALIGN)?;
        let at = PackedAt::Shared(self.shared.len());
        let places = offsets.iter().map(|&o| u32::try_from(o)).collect::<Result<Vec<_>, _>>();
        let places = places.map_err(|_| CodegenError::TooLarge {
            what: "the weights of a layer".into(),
            bytes: memory.bytes().len() as u64,
            limit: MAX_WEIGHT_BYTES as u64,
        })?;
        if let Some(found) = shared.get(&key) {
            self.shared.push(SharedPart::Found(found));
            return Ok((at, places));
        }
        let made = Arc::new(OnceLock::new());
        self.shared.push(SharedPart::Made(key, made.clone()));
        let sizes = sizes.to_vec();
        let release = &self.options.release;
        self.write(memory.bytes().len(), move || {
            let _released = Unpacked { release, constant };
            let mut rest = memory.bytes_mut();
            let mut parts = Vec::with_capacity(sizes.len());
            for &size in &sizes {
                let (part, behind) = rest.split_at_mut(size.next_multiple_of(pack::ALIGN));
                parts.push(&mut part[..size]);
                rest = behind;
            }
            parts.into_par_iter().enumerate().for_each(|(i, part)| write(i, part));
            // Nobody else sets it.
            let _ = made.set(Arc::new(memory));
        });
        Ok((at, places))
    }

    /// A name for a function of the current node: `kernel`, `__` and the node's number.
    pub(crate) fn step_name(&self, kernel: &str) -> String {
        format!("{kernel}__{}", self.node.map_or(0, NodeId::index))
    }

    /// An assembled tile.
    pub(crate) fn tile(&mut self, name: &str, isa: Isa, spec: TileSpec) -> FuncId {
        let code = &mut self.code;
        *self.tiles.entry((isa, spec)).or_insert_with_key(|(isa, spec)| {
            let (isa, spec) = (*isa, spec.clone());
            code.define_assembled(name, TILE_PARAMETERS, move || asm::emit_tile(isa, &spec))
        })
    }

    /// An assembled strip.
    pub(crate) fn strip(&mut self, name: &str, spec: StripSpec) -> FuncId {
        let code = &mut self.code;
        *self
            .strips
            .entry(spec)
            .or_insert_with(|| code.define_assembled(name, TILE_PARAMETERS, move || asm::emit_strip(&spec)))
    }

    /// Compiles a function of `parameters` pointers or 64-bit integers. `emit` starts in the entry block and ends
    /// with a return.
    pub(crate) fn define_function(
        &mut self,
        name: &str,
        kind: FunctionKind,
        parameters: usize,
        emit: impl FnOnce(&mut Emitter) -> Result<(), CodegenError>,
    ) -> Result<FuncId, CodegenError> {
        let inputs = self.graph.inputs().len();
        self.code.define_function(name, kind, parameters, inputs, emit)
    }

    /// Has machine code of `parameters` pointers or 64-bit integers (`extern "sysv64"`) assembled, on any thread.
    pub(crate) fn define_assembled<E: Display>(
        &mut self,
        name: &str,
        parameters: usize,
        assemble: impl FnOnce() -> Result<Vec<u8>, E> + Send + 's,
    ) -> FuncId {
        self.code.define_assembled(name, parameters, assemble)
    }

    /// Compiles the entry of a step and adds the step. `emit` gets the context and the range `begin..end` of units,
    /// which is never empty; the return is added.
    pub(crate) fn step(
        &mut self,
        kernel: &str,
        units: u64,
        work: Work,
        emit: impl FnOnce(&mut Emitter, Value, Value, Value) -> Result<(), CodegenError>,
    ) -> Result<(), CodegenError> {
        let name = self.step_name(kernel);
        let entry = self.define_function(&name, FunctionKind::Driver, 3, |e| {
            let (ctx, begin, end) = (e.params[0], e.params[1], e.params[2]);
            emit(e, ctx, begin, end)?;
            e.b.ins().return_(&[]);
            Ok(())
        })?;
        let nanoseconds = self.nanoseconds(&work);
        self.push_step(kernel, PendingCode::Function(entry), units, work, nanoseconds);
        Ok(())
    }

    /// Adds a step that needs no code of its own.
    pub(crate) fn routine_step(&mut self, kernel: &str, routine: Routine, units: u64, work: Work) {
        let nanoseconds = self.nanoseconds(&work);
        self.push_step(kernel, PendingCode::Routine(routine), units, work, nanoseconds);
    }

    /// Adds a step that walks over tiles and takes about so long on one thread.
    pub(crate) fn walk_step(&mut self, kernel: &str, walk: PendingWalk, work: Work, nanoseconds: f64) {
        let units = walk.units();
        if let Some(node) = self.node {
            self.shares.insert(self.plan.root(node.out()), walk.share());
        }
        self.push_step(kernel, PendingCode::Walk(Box::new(walk)), units, work, nanoseconds);
    }

    /// How many steps there are.
    pub(crate) fn steps_so_far(&self) -> usize {
        self.steps.len()
    }

    /// Makes one step of those from `first` on, which are repeated. Threads share each of them where it is long enough.
    pub(crate) fn repeat_steps(&mut self, kernel: &str, first: usize, recurrence: Recurrence, work: Work) {
        let mut body = self.steps.split_off(first);
        for PendingStep { step, .. } in &mut body {
            let parts = (step.nanoseconds / REPEATED_GRAIN) as u64;
            step.most_parts = if cfg!(test) { step.units } else { parts.min(step.units).max(1) };
        }
        if let Some(node) = self.node {
            self.shares.remove(&self.plan.root(node.out()));
        }
        let once: f64 = body.iter().map(|pending| pending.step.nanoseconds).sum();
        let nanoseconds = once * recurrence.steps as f64;
        self.push_step(kernel, PendingCode::Recurrence(Box::new(recurrence), body), 1, work, nanoseconds);
    }

    /// How threads have divided the operand in a slot of the node whose steps are being emitted.
    pub(crate) fn share_of_operand(&self, slot: usize) -> Share {
        self.share_of(self.node.and_then(|node| self.graph.operands(node).get(slot).copied()))
    }

    /// The same of its residual, which is the last operand.
    pub(crate) fn share_of_residual(&self) -> Share {
        self.share_of(self.node.and_then(|node| self.graph.operands(node).last().copied()))
    }

    fn share_of(&self, value: Option<ValueId>) -> Share {
        let known = value.and_then(|v| self.shares.get(&self.plan.root(v)));
        known.copied().unwrap_or(Share::Pixels)
    }

    /// About how long a step takes on one thread, by what it reads, writes and multiplies. Of integers, too, what is no
    /// matrix product multiplies about as fast as floats are multiplied.
    pub(crate) fn nanoseconds(&self, work: &Work) -> f64 {
        work.nanoseconds(self.options.tier.macs_per_nanosecond())
    }

    fn push_step(&mut self, kernel: &str, code: PendingCode, units: u64, work: Work, nanoseconds: f64) {
        if let (Some(node), true) = (self.node, units > 0) {
            let step = Step::new(self.graph, node, kernel, units, work, nanoseconds);
            self.steps.push(PendingStep { step, code });
        }
    }

    /// Bytes of a node's operands that are inputs of the model.
    fn input_bytes(&self, node: NodeId) -> u64 {
        let operands = self.graph.operands(node).into_iter();
        let inputs = operands.filter(|v| matches!(self.plan.place(*v), Some(Location::Input(_))));
        inputs.map(|v| self.graph.ty(v).bytes() as u64).sum()
    }

    /// Decides which steps threads share, and how many of them.
    fn share_steps(&mut self) {
        let mut before = None;
        let mut cost = |PendingStep { step, .. }: &PendingStep| {
            let read = step.work.bytes_read - step.work.weight_bytes;
            // Of several steps of a node, the first that reads anything reads the node's operands.
            let inputs = if before == Some(step.node) { 0 } else { self.input_bytes(step.node).min(read) };
            if read > 0 {
                before = Some(step.node);
            }
            let (operands, is_divisible) = (read - inputs, step.units > 1);
            Cost { nanoseconds: step.nanoseconds, operands, inputs, is_divisible }
        };
        let costs: Vec<Cost> = self.steps.iter().map(&mut cost).collect();
        for (pending, is_shared) in self.steps.iter_mut().zip(sharing::shared(&costs)) {
            let step = &mut pending.step;
            if is_shared || cfg!(test) {
                step.most_parts = ((step.nanoseconds / THREAD_GRAIN) as u64).max(2).min(step.units);
            }
        }
    }

    /// Bytes of all constants of the graph, about what the weights of the model take.
    pub(crate) fn constant_bytes(&self) -> usize {
        self.constant_bytes
    }

    /// The ways to cut a dense problem; see [`choose::candidates`].
    pub(crate) fn candidates(&mut self, problem: &Problem, weights: usize) -> Arc<[Cut]> {
        let tier = self.options.tier;
        let choose = || choose::candidates(problem, tier, weights).into();
        self.candidates.entry((problem.clone(), weights)).or_insert_with(choose).clone()
    }

    /// The tiling that the caller asks for, for the node whose steps are being emitted.
    pub(crate) fn wanted_tiling(&self) -> Option<Tiling> {
        self.node.and_then(|node| self.options.tilings.get(&node)).copied()
    }

    /// Notes what the step that was just added could have been compiled with.
    pub(crate) fn offer_tilings(&mut self, tilings: Vec<Tiling>) {
        if let Some(pending) = self.steps.last_mut() {
            pending.step.tilings = tilings;
        }
    }

    /// What computing a node takes as a whole.
    pub(crate) fn work(&self, node: NodeId) -> Work {
        let reads = self.plan.reads(self.graph, node);
        let constants = reads.iter().filter(|&&v| is_constant(self.graph, v));
        Work {
            macs: self.graph.macs(node),
            by_narrow_weights: false,
            bytes_read: total_bytes(reads.iter().map(|&v| self.graph.ty(v))),
            weight_bytes: total_bytes(constants.map(|&v| self.graph.ty(v))),
            bytes_written: total_bytes(self.graph.node(node).outputs()),
        }
    }

    /// The work of the node whose steps are being emitted, with all that is fused into it.
    pub(crate) fn current_work(&self) -> Work {
        self.node.map_or(Work::default(), |node| self.work(node))
    }

    /// A value, wherever it lies.
    pub(crate) fn view(&mut self, value: ValueId) -> Result<View, CodegenError> {
        let ty = self.graph.ty(value);
        let view = View::dense(self.place(value)?, ty.dtype, &ty.shape);
        Ok(match self.plan.layout(value) {
            None => view,
            Some(layout) => View { strides: layout.strides.iter().map(|&s| s as i64).collect(), ..view },
        })
    }

    /// Operand `slot` of a node as the elementwise kernel reads it, in the order of the node's operand shape.
    pub(crate) fn operand_view(&mut self, node: NodeId, slot: usize) -> Result<View, CodegenError> {
        let value = self.graph.operand(node, slot);
        if self.plan.fused_into.get(&value.node) == Some(&node)
            && let Some(Op::Transpose(t)) = self.graph.op(value.node)
        {
            return Ok(self.operand_view(value.node, 0)?.permuted(&t.perm));
        }
        self.view(value)
    }

    /// Operand `slot` of a node, broadcast to `dims`.
    pub(crate) fn broadcast_view(
        &mut self,
        node: NodeId,
        slot: usize,
        dims: &[usize],
    ) -> Result<View, CodegenError> {
        let shape = self.graph.shape(self.graph.operand(node, slot));
        Ok(self.operand_view(node, slot)?.broadcast_to(shape, dims))
    }

    /// The result of a node as the elementwise kernel writes it, in the order of the node's own shape.
    pub(crate) fn result_view(&mut self, node: NodeId) -> Result<View, CodegenError> {
        let outer = self.plan.fused_into.get(&node).copied();
        let view = self.view(outer.unwrap_or(node).out())?;
        match outer.and_then(|id| self.graph.op(id)) {
            Some(Op::Transpose(t)) => {
                // Dimension perm[i] of the inner result is dimension i of the outer one.
                let mut inverse = vec![0; t.perm.len()];
                t.perm.iter().enumerate().for_each(|(i, &p)| inverse[p] = i);
                Ok(view.permuted(&inverse))
            }
            _ => Ok(view),
        }
    }

    /// Types of a node's operands, in slot order.
    pub(crate) fn operand_types(&self, node: NodeId) -> Vec<&'s TensorType> {
        self.graph.operands(node).into_iter().map(|v| self.graph.ty(v)).collect()
    }

    /// An error about the operands or attributes of a node.
    pub(crate) fn refuse(&self, node: NodeId, source: OpError) -> CodegenError {
        CodegenError::Node { node: self.graph.node(node).name.clone(), op: self.graph.mnemonic(node), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{convolutions, placed, tiers};

    #[test]
    fn weights_that_outgrow_their_memory_are_packed_anew_in_more() {
        let graph = placed(&convolutions());
        for tier in tiers() {
            let options = Options::new(tier);
            let constant_bytes = constant_bytes(&graph);
            let packed =
                |room| lower_within(&graph, &options, constant_bytes, room).unwrap().weights.to_vec();
            assert_eq!(packed(1000), packed(expected_weights(constant_bytes)));
        }
    }
}
