//! Compiled models and sessions.

use crate::{
    Error, FileTimes, Program, ProgramInfo, TensorView, TensorViewMut, Threads, machine_memory, view::holds,
};
use qcc_codegen::{
    CodegenError, CompileTimes, CompiledModel, Execution, ListingKind, SharedWeights, Step, Tier, Tiling,
    Work,
};
use qcc_ir::{Device, NodeId, Tensor, TensorType};
use smallvec::SmallVec;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Name and type of an input or output.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorInfo {
    /// The model's name for it.
    pub name: String,
    /// Element type and shape.
    pub ty: TensorType,
}

/// A compiled model: machine code, packed weights, buffer plan. Immutable; clones share everything, and threads may
/// too: it is `Send` and `Sync`. To run it, make a [`Session`] for each caller.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    compiled: Arc<CompiledModel>,
    inputs: Vec<TensorInfo>,
    outputs: Vec<TensorInfo>,
    info: ProgramInfo,
    file_times: Option<FileTimes>,
    threads: Threads,
}

/// How a program becomes machine code.
#[derive(Clone, Debug)]
pub struct JitOptions {
    /// Instructions that may be used.
    pub tier: &'static Tier,
    /// Threads of the model's sessions.
    pub threads: Threads,
    /// Replace requantization by narrowing: wrong results, right timing.
    pub measure_pack_only: bool,
    /// Keep the text of every function for [`Model::listing`].
    pub listing: bool,
    /// Where packed weights are shared with models that are made with the same one; `None`: nowhere.
    pub shared: Option<Arc<SharedWeights>>,
    /// Bytes of memory that the model may take.
    pub max_memory: u64,
}

impl JitOptions {
    /// Code for use on one thread.
    pub fn new(tier: &'static Tier) -> JitOptions {
        let (threads, max_memory) = (Threads::one(), machine_memory());
        JitOptions { tier, threads, measure_pack_only: false, listing: false, shared: None, max_memory }
    }

    /// Threads of the model's sessions.
    pub fn threads(self, threads: Threads) -> JitOptions {
        JitOptions { threads, ..self }
    }
}

impl Program {
    /// The tilings that were found on a host of this tier.
    fn tilings(&self, tier: &Tier) -> BTreeMap<NodeId, Tiling> {
        let own = self.tunings().iter().find(|t| t.tier == tier.name);
        own.map(|t| t.of(self.graph())).unwrap_or_default()
    }

    /// Generates machine code. The program may be dropped afterwards: the model holds all that it needs.
    ///
    /// # Errors
    /// Where the CPU lacks the tier or the model needs more memory than the limits allow.
    pub fn jit(&self, options: &JitOptions) -> Result<Model, CodegenError> {
        let codegen = qcc_codegen::Options {
            measure_pack_only: options.measure_pack_only,
            listing: options.listing,
            release: self.release(),
            shared: options.shared.clone(),
            tilings: self.tilings(options.tier),
            max_memory: options.max_memory,
            ..qcc_codegen::Options::new(options.tier)
        };
        let compiled = Arc::new(qcc_codegen::compile(self.graph(), &codegen)?);
        let infos = |of: &[(String, TensorType)]| {
            of.iter().map(|(name, ty)| TensorInfo { name: name.clone(), ty: ty.clone() }).collect()
        };
        Ok(Model(Arc::new(Inner {
            inputs: infos(compiled.inputs()),
            outputs: infos(compiled.outputs()),
            info: self.info().clone(),
            file_times: self.file_times(),
            threads: options.threads.clone(),
            compiled,
        })))
    }
}

impl Model {
    /// The inputs, in the order in which [`Session::run`] takes them.
    pub fn inputs(&self) -> &[TensorInfo] {
        &self.0.inputs
    }

    /// The outputs, in the order in which [`Session::run`] gives them.
    pub fn outputs(&self) -> &[TensorInfo] {
        &self.0.outputs
    }

    /// How the model was made.
    pub fn info(&self) -> &ProgramInfo {
        &self.0.info
    }

    /// The steps that a run takes, in order.
    pub fn steps(&self) -> &[Step] {
        self.0.compiled.steps()
    }

    /// Multiply-accumulates of one run.
    pub fn macs(&self) -> u64 {
        self.steps().iter().map(|s| s.work.macs).sum()
    }

    /// Instructions in use.
    pub fn tier(&self) -> &'static Tier {
        self.0.compiled.tier()
    }

    /// What reading its `.qcc` file took; `None` where it is not from one.
    pub fn file_times(&self) -> Option<FileTimes> {
        self.0.file_times
    }

    /// What generating its code took.
    pub fn compile_times(&self) -> CompileTimes {
        self.0.compiled.times()
    }

    /// Threads that a session of the model uses.
    pub fn threads(&self) -> &Threads {
        &self.0.threads
    }

    /// Bytes of packed weights and tables, of intermediate values in each session, and of machine code.
    pub fn memory(&self) -> Memory {
        let compiled = &self.0.compiled;
        Memory {
            weights: compiled.weight_bytes() as u64,
            arena: compiled.arena_bytes(),
            code: compiled.code_bytes() as u64,
        }
    }

    /// The text of every function; empty unless [`JitOptions::listing`] was set.
    pub fn listing(&self, kind: ListingKind) -> String {
        self.0.compiled.listing(kind)
    }
}

/// Bytes that a model takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Packed weights and tables, once a model.
    pub weights: u64,
    /// Intermediate values, once a session.
    pub arena: u64,
    /// Machine code, once a model.
    pub code: u64,
}

/// Inputs or outputs that are not the model's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// Too few or too many.
    #[error("the model has {expected} {what}s ({}), but {got} were given", .names.join(", "))]
    Count {
        /// `input` or `output`.
        what: &'static str,
        /// How many the model has.
        expected: usize,
        /// How many were given.
        got: usize,
        /// Their names.
        names: Vec<String>,
    },
    /// Wrong element type or shape.
    #[error("{what} `{name}`: expected {expected}, got {got}")]
    Type {
        /// `input` or `output`.
        what: &'static str,
        /// Its name.
        name: String,
        /// The model's type.
        expected: String,
        /// The given type.
        got: String,
    },
}

/// Writable views of buffers that are as large as a model's outputs.
pub(crate) fn output_views<'b>(
    outputs: &[TensorInfo],
    buffers: impl Iterator<Item = &'b mut [u8]>,
) -> SmallVec<[TensorViewMut<'b>; 4]> {
    let view = |(info, bytes): (&TensorInfo, &'b mut [u8])| TensorViewMut {
        dtype: info.ty.dtype,
        dims: info.ty.shape.dims().into(),
        bytes,
    };
    outputs.iter().zip(buffers).map(view).collect()
}

fn bind(
    what: &'static str,
    infos: &[TensorInfo],
    given: impl ExactSizeIterator<Item = (qcc_ir::DType, impl AsRef<[usize]>)>,
) -> Result<(), BindError> {
    if given.len() != infos.len() {
        let names = infos.iter().map(|i| i.name.clone()).collect();
        return Err(BindError::Count { what, expected: infos.len(), got: given.len(), names });
    }
    for (info, (dtype, dims)) in infos.iter().zip(given) {
        let dims = dims.as_ref();
        if !holds(dtype, info.ty.dtype) || dims != info.ty.shape.dims() {
            let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
            return Err(BindError::Type {
                what,
                name: info.name.clone(),
                expected: format!("{}[{}]", info.ty.dtype, info.ty.shape),
                got: format!("{dtype}[{}]", dims.join("x")),
            });
        }
    }
    Ok(())
}

/// One caller's state: the memory of intermediate values, and a profile. Runs one request at a time; make one for each
/// thread that serves requests, of one model and with one pool of threads as you like: callers do not wait for each
/// other. Dropping it gives the memory back.
pub struct Session {
    model: Model,
    execution: Execution,
    threads: Threads,
    profile: Option<Profile>,
}

struct Profile {
    runs: u32,
    times: Vec<Duration>,
}

/// The time of one layer.
#[derive(Clone, PartialEq, Debug)]
pub struct LayerTime {
    /// Name of the node.
    pub name: String,
    /// Its op.
    pub op: &'static str,
    /// Where it runs.
    pub device: Device,
    /// Name of the kernel.
    pub kernel: String,
    /// What it takes: multiply-accumulates and bytes.
    pub work: Work,
    /// Mean time of a run.
    pub time: Duration,
}

impl Session {
    /// A session with the threads of the model.
    pub fn new(model: &Model) -> Session {
        Session::with_threads(model, model.threads().clone())
    }

    /// A session with threads of its own.
    pub fn with_threads(model: &Model, threads: Threads) -> Session {
        let execution = Execution::new(model.0.compiled.clone());
        Session { model: model.clone(), execution, threads, profile: None }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Runs the model: all inputs to all outputs, in the order of the model's signature.
    ///
    /// # Errors
    /// Where number, element types or shapes of the inputs are not the model's.
    pub fn run(&mut self, inputs: &[TensorView<'_>]) -> Result<Vec<Tensor>, Error> {
        let model = self.model.clone();
        let mut buffers: Vec<Vec<u8>> = model.outputs().iter().map(|o| vec![0; o.ty.bytes()]).collect();
        let mut views = output_views(model.outputs(), buffers.iter_mut().map(|b| &mut b[..]));
        self.run_into(inputs, &mut views)?;
        drop(views);
        let finish = |(info, bytes): (&TensorInfo, Vec<u8>)| {
            let tensor = Tensor::from_bytes(info.ty.dtype, info.ty.shape.clone(), bytes.into());
            tensor
                .map_err(|e| qcc_ir::Error::Input { input: info.name.clone(), reason: e.to_string() }.into())
        };
        model.outputs().iter().zip(buffers).map(finish).collect()
    }

    /// Like [`run`](Self::run), into arrays of the caller. Allocates nothing, unless a layer runs in the interpreter or
    /// there are more than eight inputs or outputs.
    ///
    /// # Errors
    /// Where number, element types or shapes of the inputs or outputs are not the model's.
    pub fn run_into(
        &mut self,
        inputs: &[TensorView<'_>],
        outputs: &mut [TensorViewMut<'_>],
    ) -> Result<(), Error> {
        bind("input", self.model.inputs(), inputs.iter().map(|v| (v.dtype, &v.dims)))?;
        bind("output", self.model.outputs(), outputs.iter().map(|v| (v.dtype, &v.dims)))?;
        let inputs: SmallVec<[&[u8]; 8]> = inputs.iter().map(|v| &v.bytes[..]).collect();
        let mut outputs: SmallVec<[&mut [u8]; 8]> = outputs.iter_mut().map(|v| &mut v.bytes[..]).collect();
        let Session { execution, threads, profile, .. } = self;
        let times = profile.as_mut().map(|p| {
            p.runs += 1;
            &mut p.times[..]
        });
        Ok(execution.run(&inputs, &mut outputs, threads, times)?)
    }

    /// Begins to measure the time of every layer (anew, if it was being measured).
    pub fn start_profile(&mut self) {
        let times = vec![Duration::ZERO; self.model.steps().len()];
        self.profile = Some(Profile { runs: 0, times });
    }

    /// Ends measuring the time of layers, and forgets it.
    pub fn stop_profile(&mut self) {
        self.profile = None;
    }

    /// The mean time of every layer over the runs since [`start_profile`](Self::start_profile), in the order in which
    /// they run; empty before the first such run.
    pub fn profile(&self) -> Vec<LayerTime> {
        let Some(profile) = self.profile.as_ref().filter(|p| p.runs > 0) else { return Vec::new() };
        let layer = |(step, time): (&Step, &Duration)| LayerTime {
            name: step.name.clone(),
            op: step.op,
            device: step.device,
            kernel: step.kernel.clone(),
            work: step.work,
            time: *time / profile.runs,
        };
        self.model.steps().iter().zip(&profile.times).map(layer).collect()
    }
}
