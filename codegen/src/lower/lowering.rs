//! What goes through the nodes of a graph, and what their lowerers emit steps with.

use super::{
    has_kernel, lowerer,
    packing::{SharedPart, expected_weights, finished},
    product::{self, IntegerProducts},
    shape,
};
use crate::{
    CodegenError, Options,
    dense::{
        Problem, asm,
        choose::{self, Cut, Share, Tiling},
        clif_tile::TILE_PARAMETERS,
        driver::PendingWalk,
        margins,
        spec::TileSpec,
        strip::StripSpec,
    },
    kernels::map::View,
    memory::Memory,
    model::{Step, Work},
    module::{CodeBuilder, Emitter, FunctionKind, Functions, Location},
    plan::{Margins, Plan, check_arena, is_constant, total_bytes},
    recurrence::Recurrence,
    routine::{Routine, Source},
    sharing::{self, Cost},
    tier::Isa,
    times::{CompileTimes, ThreadTime},
    weights::{MAX_WEIGHT_BYTES, WeightBlock, Weights},
};
use cranelift_codegen::ir::{InstBuilder, Value};
use cranelift_module::FuncId;
use qcc_ir::{
    Device, Graph, NodeId, Op, OpError, TensorType, ValueId,
    memory::{MemoryError, signature_bytes},
};
use rayon::Scope;
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    sync::Arc,
    time::{Duration, Instant},
};

/// Nanoseconds that are worth another thread in a step that two share. Tests have small tensors and share all steps.
const THREAD_GRAIN: f64 = if cfg!(test) { 1.0 } else { 2_000.0 };

/// The same in a step that is repeated: each time, threads wait for each other, and read what the others have written.
const REPEATED_GRAIN: f64 = 4_000.0;

/// Constants of fewer bytes are compared, and equal ones are stored once: tables repeat, large weights do not.
const SMALL: usize = (64 << 10) + 1;

/// The state of lowering one model, for the time `'s` in which its workers run.
pub(crate) struct Lowering<'w, 's> {
    pub(crate) graph: &'s Graph,
    pub(crate) options: &'s Options,
    pub(crate) plan: Plan,
    /// Bytes of memory besides the arena.
    besides: u64,
    pub(super) workers: &'w Scope<'s>,
    code: CodeBuilder<'w, 's>,
    pub(super) weights: WeightBlock<'s>,
    /// Packed weights that models share, in the order in which walks name them.
    pub(super) shared: Vec<SharedPart>,
    /// The constants of integer products.
    pub(crate) products: &'s IntegerProducts,
    /// What writing weights takes.
    pub(super) packing: &'s ThreadTime,
    constants: BTreeMap<ValueId, u32>,
    /// Writes to the weights that no worker has got yet, and how many bytes they write.
    pub(super) writes: Vec<Box<dyn FnOnce() + Send + 's>>,
    pub(super) write_bytes: usize,
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
