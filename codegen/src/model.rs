//! Compiled models and their execution.
//!
//! A step is `extern "sysv64" fn(ctx: *const Ctx, begin: u64, end: u64)` over an index space of *units*, which are
//! independent of each other: threads split the range. Two steps never overlap.

use crate::{
    CodegenError, CompileTimes, Tier,
    dense::{
        choose::Tiling,
        driver::{Operands, PackedAt},
        spec::SLACK,
        walk::{AroundFunction, Bases, TileFunction, Walk},
    },
    lower::{self, Lowered, PendingCode, PendingStep},
    memory::Memory,
    module::{Code, Ctx, FunctionText, Location, disassemble},
    parallel::Parallel,
    recurrence::Recurrence,
    routine::{Routine, Source},
    shared::SharedWeights,
    weights::Weights,
};
use bytes::Bytes;
use cranelift_module::FuncId;
use qcc_ir::{Device, Graph, NodeId, Op, Stage, Tensor, TensorType, limits::MAX_MEMORY_BYTES};
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

/// What code is generated.
#[derive(Clone, Debug)]
pub struct Options {
    /// Instructions that may be used; the CPU must have them.
    pub tier: &'static Tier,
    /// Replace requantization by narrowing: wrong results, right timing. The difference is what requantization costs.
    pub measure_pack_only: bool,
    /// Keep the text of every function for [`CompiledModel::listing`].
    pub listing: bool,
    /// Told of constants that have been packed.
    pub release: Option<Release>,
    /// Where packed weights are shared with other models; `None`: nowhere.
    pub shared: Option<Arc<SharedWeights>>,
    /// How to cut these convolutions and matrix products, instead of as the model of the CPU says. A tiling that is not
    /// among the [`Step::tilings`] of the node's step is ignored: it may come from another tier or version.
    pub tilings: BTreeMap<NodeId, Tiling>,
    /// Bytes of memory that the model may take: constants, packed weights, and the arena, inputs and outputs of one run.
    pub max_memory: u64,
}

impl Options {
    /// Code for this tier, for use.
    pub fn new(tier: &'static Tier) -> Options {
        Options {
            tier,
            measure_pack_only: false,
            listing: false,
            release: None,
            shared: None,
            tilings: BTreeMap::new(),
            max_memory: MAX_MEMORY_BYTES,
        }
    }
}

/// What is told, on any thread, that the bytes of a constant have been packed and are not read again by this
/// compilation: where they are mapped from a file, their memory can be given back.
#[derive(Clone)]
pub struct Release(Arc<Listener>);

type Listener = dyn Fn(&[u8]) + Send + Sync;

impl Release {
    /// Calls `f`.
    pub fn new(f: impl Fn(&[u8]) + Send + Sync + 'static) -> Release {
        Release(Arc::new(f))
    }

    pub(crate) fn call(&self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}

impl fmt::Debug for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Release")
    }
}

/// What [`CompiledModel::listing`] prints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ListingKind {
    /// Cranelift's IR.
    Clif,
    /// Machine code, disassembled.
    Asm,
}

/// An estimate of what a step does.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Work {
    /// Multiply-accumulates.
    pub macs: u64,
    /// Whether they are those of [`U8S7`](crate::dense::spec::Product::U8S7).
    pub by_narrow_weights: bool,
    /// Bytes of operands, constants included.
    pub bytes_read: u64,
    /// The constants' part of `bytes_read`.
    pub weight_bytes: u64,
    /// Bytes of results.
    pub bytes_written: u64,
}

impl Work {
    /// Roughly how long it takes on one thread, at so many multiply-accumulates a nanosecond. What is read and written
    /// comes from a near cache, at 100 bytes a nanosecond.
    pub(crate) fn nanoseconds(&self, macs_per_nanosecond: u64) -> f64 {
        self.macs as f64 / macs_per_nanosecond as f64 + (self.bytes_read + self.bytes_written) as f64 / 100.0
    }
}

type Entry = extern "sysv64" fn(*const Ctx, u64, u64);

enum Action {
    /// Not yet executable; only while a model is being compiled.
    Pending,
    Call(Entry),
    Walk(Box<Walk<TileFunction, AroundFunction>>),
    Routine(Routine),
    Interpret(Box<Interpretation>),
    /// Steps that are repeated.
    Repeat(Box<Recurrence>, Vec<Step>),
}

/// A node that is computed by its definition, on copies of its operands.
struct Interpretation {
    op: Op,
    operands: Vec<(Source, TensorType)>,
    results: Vec<(Location, TensorType)>,
}

/// One step of a model.
pub struct Step {
    /// Name of the node.
    pub name: String,
    /// Mnemonic of its op.
    pub op: &'static str,
    /// The node in the graph that was compiled.
    pub node: NodeId,
    /// Where it runs.
    pub device: Device,
    /// Size of the index space that threads split.
    pub units: u64,
    /// What the step does.
    pub work: Work,
    /// Name of the kernel; `interpreter` where it is interpreted.
    pub kernel: String,
    /// Parts of the units that are worth threads of their own.
    pub(crate) most_parts: u64,
    /// Roughly how long it takes on one thread.
    pub(crate) nanoseconds: f64,
    /// Ways to cut the step into tiles, the one that the model of the CPU finds best first; empty where there is nothing
    /// to choose. [`Options::tilings`] asks for one.
    pub tilings: Vec<Tiling>,
    action: Action,
}

impl Step {
    /// A step of generated code that takes about so long. Threads do not share it, unless somebody finds that worth it.
    pub(crate) fn new(
        graph: &Graph,
        node: NodeId,
        kernel: &str,
        units: u64,
        work: Work,
        nanoseconds: f64,
    ) -> Step {
        let n = graph.node(node);
        Step {
            name: n.name.clone(),
            op: graph.mnemonic(node),
            node,
            device: n.device.unwrap_or(Device::Interpreter),
            units,
            work,
            kernel: kernel.into(),
            most_parts: 1,
            nanoseconds,
            tilings: Vec::new(),
            action: Action::Pending,
        }
    }

    pub(crate) fn interpreted(
        graph: &Graph,
        node: NodeId,
        operands: Vec<Source>,
        results: Vec<Location>,
        work: Work,
    ) -> Step {
        let mut step = Step::new(graph, node, "interpreter", 1, work, work.nanoseconds(1));
        if let Some(op) = graph.op(node) {
            let types = graph.operands(node).into_iter().map(|v| graph.ty(v).clone());
            step.action = Action::Interpret(Box::new(Interpretation {
                op: op.clone(),
                operands: operands.into_iter().zip(types).collect(),
                results: results.into_iter().zip(graph.node(node).outputs().iter().cloned()).collect(),
            }));
        }
        step
    }

    /// The units of a part.
    fn part(&self, part: usize, parts: usize) -> Range<u64> {
        let bound = |p: usize| (p as u128 * u128::from(self.units) / parts as u128) as u64;
        bound(part)..bound(part + 1)
    }

    /// Where the step's code lies; `None` where it is interpreted.
    #[cfg(test)]
    pub(crate) fn entry_address(&self) -> Option<usize> {
        match self.action {
            Action::Call(entry) => Some(entry as usize),
            Action::Pending
            | Action::Walk(_)
            | Action::Routine(_)
            | Action::Interpret(_)
            | Action::Repeat(..) => None,
        }
    }
}

/// Machine code, weights and buffer plan of a model. Immutable and shared; its code is freed with it.
pub struct CompiledModel {
    steps: Vec<Step>,
    inputs: Vec<(String, TensorType)>,
    outputs: Vec<(String, TensorType)>,
    arena_bytes: u64,
    pub(crate) weights: Weights,
    /// Packed weights that it shares with other models.
    pub(crate) shared: Vec<Arc<Memory>>,
    tier: &'static Tier,
    pub(crate) code: Code,
    times: CompileTimes,
}

/// Compiles a graph at `Stage::Placed`.
///
/// # Errors
/// Where a node has no device or cannot run on its device, where the model needs more memory than the limits allow, and
/// where this CPU lacks the tier.
pub fn compile(graph: &Graph, options: &Options) -> Result<CompiledModel, CodegenError> {
    check_stage(graph)?;
    if !options.tier.is_available() {
        return Err(CodegenError::TierUnavailable { tier: options.tier.name });
    }
    let Lowered { shared, code, weights, steps, arena_bytes, times } = lower::lower(graph, options)?;
    let start = Instant::now();
    let (code, entry_of) = code.seal()?;
    let steps = steps.into_iter().map(|p| executable(p, &entry_of));
    let named = |name: &str, ty: &TensorType| (name.to_string(), ty.clone());
    Ok(CompiledModel {
        steps: steps.collect(),
        inputs: graph
            .inputs()
            .iter()
            .map(|&id| named(&graph.node(id).name, &graph.node(id).outputs()[0]))
            .collect(),
        outputs: graph.outputs().iter().map(|o| named(&o.name, graph.ty(o.value))).collect(),
        arena_bytes,
        weights,
        shared,
        tier: options.tier,
        code,
        times: CompileTimes { sealing: start.elapsed(), ..times },
    })
}

/// A step with its functions at their addresses.
fn executable(pending: PendingStep, entry_of: &impl Fn(FuncId) -> *const u8) -> Step {
    let PendingStep { step, code } = pending;
    let action = match code {
        PendingCode::Interpreter => return step,
        PendingCode::Routine(routine) => Action::Routine(routine),
        PendingCode::Function(id) => Action::Call(entry(entry_of(id))),
        PendingCode::Walk(walk) => {
            Action::Walk(Box::new(walk.map(|id| tile(entry_of(id)), |id| around(entry_of(id)))))
        }
        PendingCode::Recurrence(recurrence, body) => {
            Action::Repeat(recurrence, body.into_iter().map(|p| executable(p, entry_of)).collect())
        }
    };
    Step { action, ..step }
}

/// Machine code of every function of a graph at `Stage::Placed`, by name, with its constants behind it and addresses of
/// other functions left 0: to look at. This CPU need not have the tier.
///
/// # Errors
/// Where a node has no device or cannot run on its device, and where the model needs more memory than the limits allow.
pub fn assemble(graph: &Graph, options: &Options) -> Result<Vec<(String, Vec<u8>)>, CodegenError> {
    check_stage(graph)?;
    let lowered = lower::lower(graph, &Options { listing: true, ..options.clone() })?;
    let (code, _) = lowered.code.seal()?;
    Ok(code.texts().iter().map(|f| (f.name.clone(), f.code.clone())).collect())
}

fn check_stage(graph: &Graph) -> Result<(), CodegenError> {
    if graph.stage == Stage::Placed {
        return Ok(());
    }
    let node = graph.nodes().find(|(_, n)| n.op().is_some()).map(|(_, n)| n.name.clone());
    Err(CodegenError::NotPlaced { node: node.unwrap_or_else(|| graph.name.clone()) })
}

fn entry(code: *const u8) -> Entry {
    // SAFETY: the function was declared with the parameters of `Entry` by `Lowering::step`, the module is finalized,
    // and the model that gets the pointer owns the code. The same holds for the two below, which `dense::driver`
    // declares.
    #[allow(unsafe_code, reason = "machine code becomes a function")]
    unsafe {
        std::mem::transmute::<*const u8, Entry>(code)
    }
}

fn tile(code: *const u8) -> TileFunction {
    // SAFETY: see `entry`.
    #[allow(unsafe_code, reason = "machine code becomes a function")]
    unsafe {
        std::mem::transmute::<*const u8, TileFunction>(code)
    }
}

fn around(code: *const u8) -> AroundFunction {
    // SAFETY: see `entry`.
    #[allow(unsafe_code, reason = "machine code becomes a function")]
    unsafe {
        std::mem::transmute::<*const u8, AroundFunction>(code)
    }
}

impl CompiledModel {
    /// The steps, in the order in which they run.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Names and types of the inputs, in the order of the model's signature.
    pub fn inputs(&self) -> &[(String, TensorType)] {
        &self.inputs
    }

    /// Names and types of the outputs, in the order of the model's signature.
    pub fn outputs(&self) -> &[(String, TensorType)] {
        &self.outputs
    }

    /// Bytes of intermediate values that each [`Execution`] holds.
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }

    /// Bytes of weights and tables, shared by all executions; those that other models share are counted as well.
    pub fn weight_bytes(&self) -> usize {
        self.weights.len() + self.shared.iter().map(|memory| memory.bytes().len()).sum::<usize>()
    }

    /// Bytes of machine code.
    pub fn code_bytes(&self) -> usize {
        self.code.bytes()
    }

    /// Where the time of the compilation went.
    pub fn times(&self) -> CompileTimes {
        self.times
    }

    /// The tier that the code is for.
    pub fn tier(&self) -> &'static Tier {
        self.tier
    }

    /// The text of every function; empty unless [`Options::listing`] was set.
    pub fn listing(&self, kind: ListingKind) -> String {
        let mut text = String::new();
        for FunctionText { name, clif, code } in self.code.texts() {
            let body = match kind {
                ListingKind::Clif if clif.is_empty() => continue,
                ListingKind::Clif => clif.clone(),
                ListingKind::Asm => disassemble(code),
            };
            text.push_str(&format!("; {name}\n{body}\n"));
        }
        text
    }
}

/// Addresses of the caller's buffers, set for the time of one run.
struct External(Vec<*mut u8>);

// SAFETY: the pointers are only dereferenced during `Execution::run`, which sets them to buffers that it has borrowed.
#[allow(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for External {}
// SAFETY: as above; a shared reference to an `Execution` gives no access to them.
#[allow(unsafe_code, reason = "raw pointers are not Sync by themselves")]
unsafe impl Sync for External {}

/// One caller's state: the arena of intermediate values. Runs one request at a time.
pub struct Execution {
    model: Arc<CompiledModel>,
    arena: Memory,
    external: External,
}

/// Lets threads share the context of a step.
struct Shared<'a>(&'a Ctx);

// SAFETY: a step's units write disjoint bytes by the contract of steps, and steps do not overlap.
#[allow(unsafe_code, reason = "raw pointers are not Sync by themselves")]
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// Through a method, so that closures capture the whole and not the pointers.
    fn ctx(&self) -> &Ctx {
        self.0
    }
}

impl Execution {
    /// An execution with its own arena, all zeros.
    pub fn new(model: Arc<CompiledModel>) -> Execution {
        let arena = Memory::of_arena(model.arena_bytes as usize + SLACK);
        let external = External(vec![std::ptr::null_mut(); model.inputs.len() + model.outputs.len()]);
        Execution { model, arena, external }
    }

    /// The model.
    pub fn model(&self) -> &Arc<CompiledModel> {
        &self.model
    }

    /// Runs the model: bytes of all inputs to bytes of all outputs, of any alignment.
    ///
    /// `profile` has one entry a step, to which the step's time is added. Allocates nothing unless a step is interpreted.
    ///
    /// # Errors
    /// Where the number or sizes of the buffers are not the model's, or an interpreted op fails on these values.
    pub fn run(
        &mut self,
        inputs: &[&[u8]],
        outputs: &mut [&mut [u8]],
        pool: &dyn Parallel,
        mut profile: Option<&mut [Duration]>,
    ) -> Result<(), CodegenError> {
        self.check(inputs, outputs, profile.as_deref())?;
        let pointers =
            inputs.iter().map(|b| b.as_ptr().cast_mut()).chain(outputs.iter_mut().map(|b| b.as_mut_ptr()));
        for (slot, pointer) in self.external.0.iter_mut().zip(pointers) {
            *slot = pointer;
        }
        let ctx = Ctx {
            arena: self.arena.bytes_mut().as_mut_ptr(),
            weights: self.model.weights.as_ptr(),
            external: self.external.0.as_ptr(),
        };
        for (i, step) in self.model.steps.iter().enumerate() {
            let start = profile.is_some().then(Instant::now);
            run_step(step, &ctx, inputs.len(), &self.model.shared, pool)?;
            if let (Some(times), Some(start)) = (profile.as_deref_mut(), start) {
                times[i] += start.elapsed();
            }
        }
        Ok(())
    }

    fn check(
        &self,
        inputs: &[&[u8]],
        outputs: &[&mut [u8]],
        profile: Option<&[Duration]>,
    ) -> Result<(), CodegenError> {
        let expect = |what: &dyn Fn() -> String, expected: usize, got: usize| match expected == got {
            true => Ok(()),
            false => Err(CodegenError::Buffers { what: what(), expected, got }),
        };
        expect(&|| "inputs".into(), self.model.inputs.len(), inputs.len())?;
        expect(&|| "outputs".into(), self.model.outputs.len(), outputs.len())?;
        for ((name, ty), buffer) in self.model.inputs.iter().zip(inputs) {
            expect(&|| format!("bytes of input `{name}`"), ty.bytes(), buffer.len())?;
        }
        for ((name, ty), buffer) in self.model.outputs.iter().zip(outputs) {
            expect(&|| format!("bytes of output `{name}`"), ty.bytes(), buffer.len())?;
        }
        match profile {
            Some(times) => expect(&|| "profile entries".into(), self.model.steps.len(), times.len()),
            None => Ok(()),
        }
    }
}

fn run_step(
    step: &Step,
    ctx: &Ctx,
    inputs: usize,
    shared: &[Arc<Memory>],
    pool: &dyn Parallel,
) -> Result<(), CodegenError> {
    match &step.action {
        Action::Pending => {}
        Action::Call(entry) => share(ctx, step, pool, &|ctx, part, parts| {
            let units = step.part(part, parts);
            entry(ctx, units.start, units.end);
        }),
        Action::Routine(routine) => run_routine(routine, step, ctx, inputs, pool)?,
        Action::Walk(walk) => share(ctx, step, pool, &|ctx, part, parts| {
            walk.run(&bases(ctx, &walk.operands, inputs, shared), part, parts);
        }),
        Action::Interpret(op) => op.run(step, ctx, inputs)?,
        Action::Repeat(recurrence, body) => {
            let resolve = |location| resolve(ctx, location, inputs);
            let refuse = |source| CodegenError::Node { node: step.name.clone(), op: step.op, source };
            let run = || body.iter().try_for_each(|step| run_step(step, ctx, inputs, shared, pool));
            // SAFETY: the plan keeps the buffers of operands, results and scratch apart and alive, and steps do not overlap.
            #[allow(unsafe_code, reason = "rows move within the arena by address")]
            unsafe {
                recurrence.run(resolve, refuse, run)?;
            }
        }
    }
    Ok(())
}

/// Follows a routine, and tells what it did not take.
fn run_routine(
    routine: &Routine,
    step: &Step,
    ctx: &Ctx,
    inputs: usize,
    pool: &dyn Parallel,
) -> Result<(), CodegenError> {
    let refused = OnceLock::new();
    share(ctx, step, pool, &|ctx, part, parts| {
        let resolve = |location| resolve(ctx, location, inputs);
        // SAFETY: the plan keeps the buffers alive, units are disjoint, and steps do not overlap.
        #[allow(unsafe_code, reason = "the arena is written by address, as machine code does")]
        let done = unsafe { routine.run(resolve, step.part(part, parts)) };
        if let Err(source) = done {
            // Any one of several will do.
            let _ = refused.set(source);
        }
    });
    match refused.into_inner() {
        None => Ok(()),
        Some(source) => Err(CodegenError::Node { node: step.name.clone(), op: step.op, source }),
    }
}

/// Calls `f(ctx, part, parts)` for the parts of a step, on as many threads as are worth their waking.
fn share(ctx: &Ctx, step: &Step, pool: &dyn Parallel, f: &(dyn Fn(&Ctx, usize, usize) + Sync)) {
    let parts = step.most_parts.min(pool.threads() as u64) as usize;
    if parts < 2 {
        return f(ctx, 0, 1);
    }
    let shared = Shared(ctx);
    pool.run(parts, &|part| f(shared.ctx(), part, parts));
}

/// Addresses of the operands of a walk.
fn bases(ctx: &Ctx, operands: &Operands, inputs: usize, shared: &[Arc<Memory>]) -> Bases {
    let at = |location| resolve(ctx, location, inputs);
    let y = at(operands.y);
    let r = operands.r.map_or(y, at);
    let w = match operands.w {
        PackedAt::Model => ctx.weights,
        PackedAt::Value(location) => at(location).cast_const(),
        PackedAt::Shared(index) => shared[index].bytes().as_ptr(),
    };
    let g = operands.g.map_or(y, at);
    Bases { a: at(operands.a).cast_const(), y, r: r.cast_const(), g: g.cast_const(), weights: ctx.weights, w }
}

impl Interpretation {
    fn run(&self, step: &Step, ctx: &Ctx, inputs: usize) -> Result<(), CodegenError> {
        let refuse = |source| CodegenError::Node { node: step.name.clone(), op: step.op, source };
        let mut operands = Vec::with_capacity(self.operands.len());
        for (source, ty) in &self.operands {
            let location = match source {
                Source::Constant(tensor) => {
                    operands.push(tensor.clone());
                    continue;
                }
                Source::At(location) => *location,
            };
            let pointer = resolve(ctx, location, inputs);
            // SAFETY: the plan keeps `ty.bytes()` bytes alive at the location, every earlier step has finished, and no
            // one writes while this step runs.
            #[allow(unsafe_code, reason = "a value in the arena becomes a slice")]
            let bytes = unsafe { std::slice::from_raw_parts(pointer.cast_const(), ty.bytes()) };
            let tensor = Tensor::from_bytes(ty.dtype, ty.shape.clone(), Bytes::copy_from_slice(bytes));
            operands.push(tensor.map_err(|e| refuse(e.into()))?);
        }
        let types: Vec<&TensorType> = self.operands.iter().map(|(_, ty)| ty).collect();
        let expected: Vec<TensorType> = self.results.iter().map(|(_, ty)| ty.clone()).collect();
        let results =
            self.op.eval(&operands.iter().collect::<Vec<_>>(), &types, &expected).map_err(refuse)?;
        for ((location, ty), tensor) in self.results.iter().zip(&results) {
            let pointer = resolve(ctx, *location, inputs);
            // SAFETY: as above; the operands were copied, so nothing else refers to these bytes.
            #[allow(unsafe_code, reason = "a value in the arena becomes a slice")]
            let bytes = unsafe { std::slice::from_raw_parts_mut(pointer, ty.bytes()) };
            let got = tensor.bytes();
            if got.len() != bytes.len() {
                let what = format!("bytes of `{}`", step.name);
                return Err(CodegenError::Buffers { what, expected: bytes.len(), got: got.len() });
            }
            bytes.copy_from_slice(got);
        }
        Ok(())
    }
}

/// The first byte of a value.
fn resolve(ctx: &Ctx, location: Location, inputs: usize) -> *mut u8 {
    match location {
        Location::Arena(offset) => ctx.arena.wrapping_add(offset as usize),
        Location::Weights(offset) => ctx.weights.wrapping_add(offset as usize).cast_mut(),
        Location::Input(i) => external(ctx, i),
        Location::Output(i) => external(ctx, inputs + i),
    }
}

fn external(ctx: &Ctx, index: usize) -> *mut u8 {
    // SAFETY: the table has one entry for each input and output, and the plan only names those.
    #[allow(unsafe_code, reason = "the table is passed to machine code as a pointer")]
    unsafe {
        *ctx.external.add(index)
    }
}
