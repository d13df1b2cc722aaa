//! From a model file to machine code.

use crate::{
    Backend, Difference, DynamicModel, Error, JitOptions, Model, Pixels, Policy, Preprocess, Program,
    ProgramFile, ProgramInfo, Samples, TensorInfo, Threads, choose_tier, is_program, machine_memory,
};
use qcc_codegen::SharedWeights;
use qcc_ir::{
    Device, Graph, Op, Stage, Tensor,
    memory::{MemoryError, MemoryPlan, signature_bytes},
    numerics::RequantMode,
    onnx::{self, Bindings},
};
use qcc_passes::{
    Calibrators, Finding, Layers, Level, Options, Precision, Ranges, RepairChoice, Repairs, Report, Rule,
    WeightBits, WeightGrid,
};
use std::{borrow::Cow, fmt, path::Path, sync::Arc};

mod calibrate;
mod lint;
mod means;
mod measure;
mod reestimate;
mod reference;
mod repair;

pub use calibrate::Calibrated;
pub(crate) use calibrate::{Observation, ObservedPart};
pub(crate) use reference::{Reference, Runs};
pub(crate) use repair::widen;

/// What a compiler tells while it works.
pub enum Event<'a> {
    /// A pass has run; this is the graph that it left. The first one is called `import`.
    Pass {
        /// Name of the pass.
        name: &'a str,
        /// The graph.
        graph: &'a Graph,
    },
    /// Calibration has seen this many batches.
    Calibrating {
        /// Batches seen.
        done: usize,
        /// Batches in all.
        total: usize,
    },
    /// Statistics of batch norms have been recomputed from this many batches.
    Reestimating {
        /// Batches seen.
        done: usize,
        /// Batches in all: of all samples, for each depth at which there are batch norms.
        total: usize,
    },
    /// This many quantized networks have been compared with float, to choose among calibrators and repairs or to find the layers
    /// that should stay float.
    Measuring {
        /// Networks compared.
        done: usize,
        /// Networks in all, at most.
        total: usize,
    },
    /// Machine code is being generated.
    Generating,
    /// Something looks wrong with the model or the data.
    Warning(&'a str),
}

type Observer = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// Compiles models. What is not chosen has a default: int8 on the best tier of this CPU, on one thread, calibrated on
/// what batch norms tell, and where there are none on synthetic noise (with a warning: that is good for timing only).
///
/// ```
/// # fn main() -> Result<(), qcc_runtime::Error> {
/// use qcc_runtime::{Compiler, Precision, Session, bundled};
///
/// let compiler = Compiler::new()
///     .calibration(bundled::calibration()?.limit(32))
///     .preprocess(bundled::preprocess());
/// let int8 = compiler.compile_onnx(bundled::FASHION_RESNET8)?;
/// let float = compiler.precision(Precision::Float).compile_onnx(bundled::FASHION_RESNET8)?;
///
/// let image = ndarray::Array4::<f32>::zeros((1, 1, 28, 28));
/// let logits = Session::new(&int8).run(&[(&image).into()])?;
/// assert_eq!(logits[0].shape().dims(), [1, 10]);
/// assert_eq!(float.outputs(), int8.outputs());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Compiler {
    pub(crate) options: Options,
    /// The mode that was asked for.
    pub(crate) requant: Option<RequantMode>,
    pub(crate) calibrators: Calibrators,
    pub(crate) repairs: RepairChoice,
    pub(crate) policy: Policy,
    calibration_threads: Option<Threads>,
    pub(crate) samples: Option<Samples>,
    pub(crate) preprocess: Preprocess,
    takes_pixels: bool,
    reestimates: bool,
    bindings: Bindings,
    tier: Option<String>,
    threads: Threads,
    listing: bool,
    max_memory: Option<u64>,
    shared: Option<Arc<SharedWeights>>,
    observer: Option<Observer>,
}

impl Default for Compiler {
    fn default() -> Compiler {
        Compiler::new()
    }
}

/// A graph that is folded and fused, ready to be calibrated and lowered in any precision.
#[derive(Clone)]
pub struct Prepared {
    graph: Graph,
    report: Report,
}

impl Prepared {
    /// The graph, at `Stage::Float`; at `Stage::FakeQuant` where the model [brings its own grids](Self::brings_grids).
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// What looks wrong with the model.
    pub fn findings(&self) -> &[Finding] {
        &self.report.findings
    }

    /// Whether the model is quantized already. Then nothing is calibrated, and int8 computes on its grids.
    pub fn brings_grids(&self) -> bool {
        self.graph.stage == Stage::FakeQuant
    }
}

impl Compiler {
    /// A compiler with the defaults.
    pub fn new() -> Compiler {
        Compiler {
            options: Options { capability: qcc_codegen::capability, ..Options::default() },
            requant: None,
            calibrators: Calibrators::default(),
            repairs: Repairs::NONE.into(),
            policy: Policy::default(),
            calibration_threads: None,
            samples: None,
            preprocess: Preprocess::default(),
            takes_pixels: false,
            reestimates: false,
            bindings: Bindings::default(),
            tier: None,
            threads: Threads::one(),
            listing: false,
            max_memory: None,
            shared: None,
            observer: None,
        }
    }

    /// What to compute with.
    pub fn precision(mut self, precision: Precision) -> Compiler {
        self.options.precision = precision;
        self
    }

    /// How accumulators of integer ops become codes. Where nothing is said: [`RequantMode::Q15`]; and for a model that
    /// [brings its own grids](Prepared::brings_grids) [`RequantMode::Float`], with which it is what its author ran.
    pub fn requant(mut self, mode: RequantMode) -> Compiler {
        self.requant = Some(mode);
        self
    }

    /// How many scales a tensor of weights has.
    pub fn weights(mut self, grid: WeightGrid) -> Compiler {
        self.options.weights = grid;
        self
    }

    /// What is repaired with the help of samples, or ([`RepairChoice::Auto`]) that it is to be chosen by the error that is
    /// measured. Default: nothing. Without samples, and of models whose shapes are open, only
    /// [scales](Repairs::scales) of weights are.
    pub fn repairs(mut self, repairs: impl Into<RepairChoice>) -> Compiler {
        self.repairs = repairs.into();
        self
    }

    /// Leaves out what a rule finds. May be called for several rules.
    pub fn allow(mut self, rule: Rule) -> Compiler {
        self.options.allowed.insert(rule);
        self
    }

    /// Codes of weights. Those of 7 bits are less accurate, and faster on tiers without VNNI.
    pub fn weight_bits(mut self, bits: WeightBits) -> Compiler {
        self.options.weight_bits = bits;
        self
    }

    /// The name of the best tier to use; see [`choose_tier`].
    pub fn tier(mut self, name: impl Into<String>) -> Compiler {
        self.tier = Some(name.into());
        self
    }

    /// Binds the shape of an input. Symbolic first dimensions are 1 where nothing else is said.
    pub fn shape(mut self, input: impl Into<String>, dims: impl Into<Vec<usize>>) -> Compiler {
        self.bindings.shapes.insert(input.into(), dims.into());
        self
    }

    /// Binds a symbolic dimension by its name.
    pub fn dimension(mut self, symbol: impl Into<String>, length: usize) -> Compiler {
        self.bindings.symbols.insert(symbol.into(), length);
        self
    }

    /// Samples to find the ranges of activations with.
    pub fn calibration(mut self, samples: Samples) -> Compiler {
        self.samples = Some(samples);
        self
    }

    /// How ranges are chosen: by one [`Calibrator`](crate::Calibrator) for all values, by several, or
    /// ([`Choice::Auto`](crate::Choice::Auto)) by the error that is measured. A model whose shapes are open is not measured;
    /// ranges of the least expected error are taken then.
    pub fn calibrator(mut self, calibrators: impl Into<Calibrators>) -> Compiler {
        self.calibrators = calibrators.into();
        self
    }

    /// Threads that samples for calibration are run on, each with a session of its own; where nothing is said, one on each
    /// core. Ranges do not depend on their number.
    pub fn calibration_threads(mut self, threads: Threads) -> Compiler {
        self.calibration_threads = Some(threads);
        self
    }

    /// How images become inputs.
    pub fn preprocess(mut self, preprocess: Preprocess) -> Compiler {
        self.preprocess = preprocess;
        self
    }

    /// Makes models that take pixels as images hold them, `[N, H, W, C]` of u8 with red first, and apply mean, deviation
    /// and order of channels of the [`preprocess`](Self::preprocess)ing themselves: an int8 model then reads the picture
    /// as it is. Cropping and resizing stay outside.
    ///
    /// Where the quantization of normalised pixels gives the pixels back, results are the same bits as those of a model
    /// that takes normalised images. Elsewhere means and deviations go into the first convolution, and
    /// [`ProgramInfo::pixels`] says what difference that made.
    ///
    /// ```
    /// # fn main() -> Result<(), qcc_runtime::Error> {
    /// use qcc_runtime::{Compiler, Session, bundled, ir::DType};
    ///
    /// let model = Compiler::new()
    ///     .calibration(bundled::calibration()?.limit(32))
    ///     .preprocess(bundled::preprocess())
    ///     .image_input(true)
    ///     .compile_onnx(bundled::FASHION_RESNET8)?;
    /// assert_eq!(model.inputs()[0].ty.dtype, DType::U8);
    /// assert_eq!(model.inputs()[0].ty.shape.dims(), [1, 28, 28, 1]);
    ///
    /// let picture = ndarray::Array4::<u8>::zeros((1, 28, 28, 1));
    /// let logits = Session::new(&model).run(&[(&picture).into()])?;
    /// assert_eq!(logits[0].shape().dims(), [1, 10]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn image_input(mut self, takes_pixels: bool) -> Compiler {
        self.takes_pixels = takes_pixels;
        self
    }

    /// Quantizes for other runtimes, to be exported as ONNX: with sums as ops of their own, and with every op between
    /// grids, as they want it to compute with integers.
    pub fn interchange(mut self, is_for_others: bool) -> Compiler {
        self.options.interchange = is_for_others;
        self
    }

    /// Places the node of this name on a device.
    pub fn pin(mut self, node: impl Into<String>, device: Device) -> Compiler {
        self.options.pins.insert(node.into(), device);
        self
    }

    /// Which layers stay float though the model is int8.
    pub fn policy(mut self, policy: Policy) -> Compiler {
        self.options.layers = policy.pass_option();
        self.policy = policy;
        self
    }

    /// # Errors
    /// Where the policy names a layer that the graph does not have.
    pub(crate) fn check_policy(&self, prepared: &Prepared) -> Result<(), Error> {
        Ok(self.policy.check(prepared.graph())?)
    }

    /// Which layers become int8.
    pub(crate) fn layers(mut self, layers: Layers) -> Compiler {
        self.options.layers = layers;
        self
    }

    /// The compiler for what nobody is told of.
    pub(crate) fn silent(&self) -> Compiler {
        Compiler { observer: None, ..self.clone() }
    }

    /// Threads of the model's sessions.
    pub fn threads(mut self, threads: Threads) -> Compiler {
        self.threads = threads;
        self
    }

    /// Keeps the text of generated code; see [`Model::listing`].
    pub fn listing(mut self, keep: bool) -> Compiler {
        self.listing = keep;
        self
    }

    /// Bytes of memory that a model may take: its file and weights, and what a run computes. More is an error before it is
    /// taken. Default: [`machine_memory`].
    pub fn max_memory(mut self, bytes: u64) -> Compiler {
        self.max_memory = Some(bytes);
        self
    }

    /// The memory that a model may take.
    pub fn memory_limit(&self) -> u64 {
        self.max_memory.unwrap_or_else(machine_memory)
    }

    /// Shares packed weights among the models that it compiles: those of one network for several shapes read the same
    /// ones.
    pub fn share_weights(mut self) -> Compiler {
        self.shared.get_or_insert_default();
        self
    }

    /// Is told what happens. Called on the thread that compiles.
    pub fn observer(mut self, observer: impl Fn(Event<'_>) + Send + Sync + 'static) -> Compiler {
        self.observer = Some(Arc::new(observer));
        self
    }

    // ---- all at once

    /// Compiles an ONNX file, or generates code for a `.qcc` file (to which only tier and threads apply).
    ///
    /// # Errors
    /// Where the file is not usable, an option does not fit it, or this CPU cannot run it.
    pub fn compile_file(&self, path: &Path) -> Result<Model, Error> {
        self.jit(&self.program_of_file(path)?)
    }

    /// Compiles an ONNX model that is in memory.
    ///
    /// # Errors
    /// As [`compile_file`](Self::compile_file).
    pub fn compile_onnx(&self, bytes: &[u8]) -> Result<Model, Error> {
        self.compile_graph(self.import_onnx(bytes)?)
    }

    /// Compiles a float graph.
    ///
    /// # Errors
    /// As [`compile_file`](Self::compile_file).
    pub fn compile_graph(&self, graph: Graph) -> Result<Model, Error> {
        self.jit(&self.program_of_graph(graph)?)
    }

    /// Reads an ONNX file as a model that is compiled for the shapes that its inputs have when it runs. Shapes that were bound
    /// are those of inputs that have none of their own.
    ///
    /// # Errors
    /// Where the file is not a model.
    pub fn dynamic_file(&self, path: &Path) -> Result<DynamicModel, Error> {
        DynamicModel::load(path, Backend::jit(self.clone()), self.memory_limit())
    }

    /// The shapes and dimensions that were bound.
    pub fn bindings(&self) -> &Bindings {
        &self.bindings
    }

    /// Takes an ONNX file through the passes, or loads a `.qcc` file.
    ///
    /// # Errors
    /// As [`compile_file`](Self::compile_file).
    pub fn program_of_file(&self, path: &Path) -> Result<Program, Error> {
        if !is_program(path) {
            return self.program_of_graph(self.import_file(path)?);
        }
        match ProgramFile::load(path, self.memory_limit())? {
            ProgramFile::Placed(program) => Ok(*program),
            ProgramFile::Dynamic(program) => program.program(self, &path.display().to_string()),
        }
    }

    /// Takes a float graph through the passes.
    ///
    /// # Errors
    /// As [`compile_file`](Self::compile_file).
    pub fn program_of_graph(&self, graph: Graph) -> Result<Program, Error> {
        let prepared = self.prepare(graph)?;
        self.check_policy(&prepared)?;
        let own = self.without_noise_for(&prepared);
        if own.options.precision != self.options.precision {
            self.tell(Event::Warning(
                "the model is quantized when it runs, and there is no calibration data: what it has in floats is \
                 quantized like that, too (int8-dynamic). For int8 give samples of real inputs",
            ));
        }
        let is_calibrated = own.options.precision.is_calibrated();
        let calibrated = is_calibrated.then(|| own.calibrate(&prepared)).transpose()?;
        own.program_of_prepared(&prepared, calibrated.as_ref())
    }

    /// Takes a prepared graph through the rest of the passes.
    ///
    /// # Errors
    /// As [`lower`](Self::lower).
    pub fn program_of_prepared(
        &self,
        prepared: &Prepared,
        calibrated: Option<&Calibrated>,
    ) -> Result<Program, Error> {
        let mut program = self.lower(prepared, calibrated)?;
        if let Some(Pixels::Folded { .. }) = program.info().pixels {
            let difference = self.difference_of_folding(prepared, calibrated, &program)?;
            program = program.with_pixels(Pixels::Folded { difference: Some(difference) });
        }
        Ok(program)
    }

    /// The compiler for a model that quantizes its activations itself when it runs: ranges of noise would be worse than what
    /// its author has, so that without samples int8 is [`Precision::Int8Dynamic`]. Of other models this one.
    pub(crate) fn without_noise_for(&self, prepared: &Prepared) -> Cow<'_, Compiler> {
        let is_dynamic =
            || prepared.graph.nodes().any(|(_, n)| matches!(n.op(), Some(Op::DynamicQuantize(_))));
        let needs_samples = self.options.precision == Precision::Int8 && self.samples.is_none();
        match needs_samples && !prepared.brings_grids() && is_dynamic() {
            true => Cow::Owned(self.clone().precision(Precision::Int8Dynamic)),
            false => Cow::Borrowed(self),
        }
    }

    // ---- step by step, to share the first steps between several models

    /// Reads an ONNX file and binds its shapes.
    ///
    /// # Errors
    /// Where the file is not a model, its ops are not supported, or shapes do not fit.
    pub fn import_file(&self, path: &Path) -> Result<Graph, Error> {
        let failed = |e| Error::Import { path: path.display().to_string(), source: Box::new(e) };
        let model = onnx::Model::load_within(path, self.memory_limit()).map_err(failed)?;
        self.imported(model.graph(&self.bindings).map_err(failed)?)
    }

    /// Reads an ONNX model that is in memory.
    ///
    /// # Errors
    /// As [`import_file`](Self::import_file).
    pub fn import_onnx(&self, bytes: &[u8]) -> Result<Graph, Error> {
        let failed = |e| Error::Import { path: "the model".into(), source: Box::new(e) };
        let model = onnx::Model::parse(bytes.to_vec()).map_err(failed)?;
        self.imported(model.graph(&self.bindings).map_err(failed)?)
    }

    /// The graph of a model for these inputs; `None` where shapes or branches depend on what is computed.
    ///
    /// # Errors
    /// Where its ops are not supported, or the inputs are not the model's.
    pub fn import_for(&self, model: &DynamicModel, inputs: &[Tensor]) -> Result<Option<Graph>, Error> {
        model.whole_graph(inputs)?.map(|graph| self.imported(graph)).transpose()
    }

    fn imported(&self, graph: Graph) -> Result<Graph, Error> {
        self.tell(Event::Pass { name: IMPORT, graph: &graph });
        Ok(graph)
    }

    /// Folds and fuses a float graph.
    ///
    /// # Errors
    /// Where a pin names no node, or batch norms are to be re-estimated and cannot be.
    pub fn prepare(&self, graph: Graph) -> Result<Prepared, Error> {
        let prepared = self.prepare_silently(graph)?;
        self.warn_of(&prepared.report);
        Ok(prepared)
    }

    /// [`prepare`](Self::prepare), of which nothing is told.
    fn prepare_silently(&self, mut graph: Graph) -> Result<Prepared, Error> {
        // What is certain without a plan: no pass makes constants, inputs or results much smaller.
        let MemoryPlan { constants, .. } = MemoryPlan::of(&graph);
        let least = constants.saturating_add(signature_bytes(&graph));
        MemoryError::check("the model", least, self.memory_limit())?;
        let options = self.estimated(&graph)?.pass_options();
        let report = qcc_passes::prepare(&mut graph, &options, &mut self.watch())?;
        Ok(Prepared { graph, report })
    }

    fn pass_options(&self) -> Options {
        let image_input = self.takes_pixels.then(|| self.preprocess.image_input());
        Options { image_input, ..self.options.clone() }
    }

    /// What folding the normalisation into a convolution changed, on the calibration samples: against the same network
    /// with the normalisation as an op of its own, which quantizes what that makes.
    fn difference_of_folding(
        &self,
        prepared: &Prepared,
        calibrated: Option<&Calibrated>,
        folded: &Program,
    ) -> Result<Difference, Error> {
        let mut exact = self.silent();
        exact.options.keep_normalize = true;
        let exact = exact.lower(prepared, calibrated)?;
        let jit = JitOptions {
            max_memory: self.memory_limit(),
            ..JitOptions::new(choose_tier(self.tier.as_deref())?)
        };
        let samples = self.samples.clone().unwrap_or_else(Samples::noise).limit(DIFFERENCE_SAMPLES);
        let feed = samples.bind(&graph_inputs(folded.graph()), &self.preprocess)?;
        Difference::between(&exact.jit(&jit)?, &folded.jit(&jit)?, &feed)
    }

    /// Quantizes (unless in float), lays out and places a prepared graph.
    ///
    /// # Errors
    /// Where a pin cannot be honoured, or ranges are needed and not given.
    pub fn lower(&self, prepared: &Prepared, calibrated: Option<&Calibrated>) -> Result<Program, Error> {
        Ok(self.lower_with_report(prepared, calibrated)?.0)
    }

    /// [`lower`](Self::lower), and what the passes did and declined.
    pub(crate) fn lower_with_report(
        &self,
        prepared: &Prepared,
        calibrated: Option<&Calibrated>,
    ) -> Result<(Program, Report), Error> {
        let options = self.lowering_options(prepared);
        let (mut graph, quantized) = self.quantized(prepared, calibrated)?;
        let lowered = qcc_passes::lower(&mut graph, &options, &mut self.watch())?;
        let report = quantized.then(lowered);
        self.warn_of(&report);
        let report = prepared.report.clone().then(report);
        let info = self.info(&graph, options.requant, calibrated, &report);
        Ok((Program::new(graph, info), report))
    }

    /// The prepared graph on its grids, at `Stage::FakeQuant`; as it is where the precision has none.
    pub(crate) fn quantized(
        &self,
        prepared: &Prepared,
        calibrated: Option<&Calibrated>,
    ) -> Result<(Graph, Report), Error> {
        let mut graph = prepared.graph.clone();
        let none = Ranges::default();
        let ranges = calibrated.map_or(&none, |c| &c.ranges);
        let options = self.lowering_options(prepared);
        let report = qcc_passes::quantize(&mut graph, ranges, &options, &mut self.watch())?;
        Ok((graph, report))
    }

    /// The options of the passes for a model, with the requantization that it gets.
    pub(crate) fn lowering_options(&self, prepared: &Prepared) -> Options {
        Options { requant: self.requant_of(prepared), ..self.pass_options() }
    }

    /// The mode that was asked for, or the default for this model.
    pub(crate) fn requant_of(&self, prepared: &Prepared) -> RequantMode {
        self.requant.unwrap_or(match prepared.brings_grids() {
            true => RequantMode::Float,
            false => RequantMode::Q15,
        })
    }

    pub(crate) fn info(
        &self,
        graph: &Graph,
        requant: RequantMode,
        calibrated: Option<&Calibrated>,
        report: &Report,
    ) -> ProgramInfo {
        let quantized = self.options.precision != Precision::Float;
        ProgramInfo {
            qcc: env!("CARGO_PKG_VERSION").into(),
            precision: self.options.precision,
            requant,
            weight_bits: self.options.weight_bits,
            calibration: calibrated.filter(|_| quantized).map(|c| c.summary.clone()),
            preprocess: self.preprocess.clone(),
            pixels: self.takes_pixels.then(|| pixels_of(graph, report)),
            reestimated: report.record("reestimate_batch_norms").map_or(0, |r| r.applied),
            findings: report.findings.clone(),
            report: report.to_string(),
            plan: qcc_passes::plan(graph, report),
        }
    }

    /// Generates machine code for a program, on this compiler's tier and threads.
    ///
    /// # Errors
    /// Where this CPU lacks the tier, or the model needs more memory than the limits allow.
    pub fn jit(&self, program: &Program) -> Result<Model, Error> {
        self.tell(Event::Generating);
        Ok(program.jit(&self.jit_options()?)?)
    }

    /// The tier and threads chosen.
    ///
    /// # Errors
    /// Where this CPU lacks the tier.
    pub fn jit_options(&self) -> Result<JitOptions, Error> {
        let tier = choose_tier(self.tier.as_deref())?;
        let options = JitOptions::new(tier).threads(self.threads.clone());
        let (listing, max_memory) = (self.listing, self.memory_limit());
        Ok(JitOptions { listing, max_memory, shared: self.shared.clone(), ..options })
    }

    pub(crate) fn tell(&self, event: Event<'_>) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }

    fn warn_of(&self, report: &Report) {
        for note in report.warnings() {
            self.tell(Event::Warning(&format!("`{}`: {}", note.node, note.text)));
        }
        for finding in report.findings.iter().filter(|f| f.level == Level::Warning) {
            self.tell(Event::Warning(&finding.to_string()));
        }
    }

    fn watch(&self) -> impl FnMut(&qcc_passes::Pass, &Graph) + '_ {
        |pass, graph| self.tell(Event::Pass { name: pass.name, graph })
    }
}

/// Samples on which two programs are compared.
const DIFFERENCE_SAMPLES: usize = 64;

/// How a placed graph that takes pixels normalises them.
fn pixels_of(graph: &Graph, report: &Report) -> Pixels {
    let is_folded = report.record("fold_normalize").is_some_and(|r| r.applied > 0);
    let has_op = graph.nodes().any(|(_, n)| matches!(n.op(), Some(Op::Normalize(_))));
    match (is_folded, has_op) {
        (true, _) => Pixels::Folded { difference: None },
        (false, true) => Pixels::Normalized,
        (false, false) => Pixels::Codes,
    }
}

/// What the import is called among the passes.
pub const IMPORT: &str = "import";

/// Names and types of a graph's inputs.
pub fn graph_inputs(graph: &Graph) -> Vec<TensorInfo> {
    let info = |id| {
        let node = graph.node(id);
        TensorInfo { name: node.name.clone(), ty: node.outputs()[0].clone() }
    };
    graph.inputs().iter().map(|&id| info(id)).collect()
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("Compiler");
        s.field("options", &self.options)
            .field("calibrators", &self.calibrators)
            .field("bindings", &self.bindings);
        s.field("tier", &self.tier).field("threads", &self.threads).finish_non_exhaustive()
    }
}
