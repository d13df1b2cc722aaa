//! Models whose shapes are those of the inputs that come.
//!
//! A [`DynamicModel`] compiles a *specialisation* for each combination of input shapes (and of the few small values, such
//! as target sizes, on which shapes depend) when it first comes, and keeps the last of them. All share the model's weights.
//!
//! Quantization finds ranges once, on samples in the shapes that they have, and all specialisations compute on them
//! (`recipe.rs`).
//!
//! Where shapes, or what is computed at all, depend on data, a specialisation goes as far as they are known. Values that
//! decide are computed, and what is left of the model is a dynamic model of its own, whose inputs are the values so far.

mod program;
mod recipe;

pub use program::{DynamicInfo, DynamicProgram, ProgramFile};

use crate::{
    BindError, Compiler, Error, LayerTime, Model, Session, TensorView,
    compiler::{Observation, ObservedPart},
};
use lru::LruCache;
use qcc_ir::{
    DType, Graph, Tensor, TensorType, interpreter,
    memory::{MemoryError, MemoryPlan},
    onnx::{self, Bindings, Eager, Form, Imported, Part, Rest, Texts, Value, ValueKind},
};
use recipe::Recipe;
use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What computes the graphs of specialisations.
#[derive(Clone, Debug)]
pub enum Backend {
    /// The reference interpreter.
    Interpreter,
    /// Machine code, as this compiler makes it.
    Jit(Box<Compiler>),
}

/// A [`Backend`] for one model; parts behind values that it has computed have the same.
#[derive(Clone)]
enum Engine {
    Interpreter,
    Jit(Arc<Recipe>),
    /// Float code that shows what is in it.
    Observed(Arc<Observation>),
}

/// Specialisations that a model keeps.
const KEPT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// A model that takes inputs of any shapes that it declares. Clones share everything, and threads may use it at once.
#[derive(Clone)]
pub struct DynamicModel(Arc<Inner>);

struct Inner {
    model: Arc<onnx::Model>,
    /// The file, for messages.
    origin: String,
    engine: Engine,
    /// Whether the inputs are what another part of the model has computed.
    is_rest: bool,
    state: Mutex<State>,
    /// The model for other forms of its inputs than tensors, which were last seen first.
    formed: Mutex<LruCache<Vec<Form>, DynamicModel>>,
}

struct State {
    /// Inputs to whose values graphs are specialised.
    wanted: BTreeSet<String>,
    specialisations: LruCache<Key, Arc<Specialisation>>,
}

/// What a specialisation is for: types of all inputs, and bytes of those whose values matter.
type Key = Vec<(DType, Vec<usize>, Option<Vec<u8>>)>;

/// The graph, or its first part, for one key.
struct Specialisation {
    code: Code,
    /// Names of what the code computes.
    outputs: Vec<String>,
    /// What the outputs of the model are of these, behind which nothing comes.
    forms: Vec<Form>,
    next: Option<Next>,
    times: Times,
}

/// A graph, what the model's outputs are of its, and what comes behind it.
type Imports = (Graph, Vec<Form>, Option<Next>);

/// What a specialisation took to make.
#[derive(Clone, Copy, Default)]
struct Times {
    compile: Duration,
    calibrate: Duration,
}

enum Code {
    Interpreted(Graph),
    Compiled { model: Model, sessions: Mutex<Vec<Session>> },
    Observed(ObservedPart),
}

/// What comes behind the first part of a model.
struct Next {
    eager: Vec<Eager>,
    rest: Rest,
    /// The rest as a model, for the types that were last seen, in the order of its inputs.
    model: Mutex<Option<(Vec<DType>, DynamicModel)>>,
}

/// The results of a run on [`Value`]s.
#[derive(Clone)]
pub struct ValueRun {
    /// The outputs, in the order of the model's signature.
    pub outputs: Vec<Value>,
    /// The run of the machine code, whose outputs are the tensors that these are made of.
    pub run: DynamicRun,
}

/// The results of a run, and what it took to get ready for it.
#[derive(Clone)]
pub struct DynamicRun {
    /// The outputs, in the order of the model's signature.
    pub outputs: Vec<Tensor>,
    /// Time spent on importing and compiling specialisations that were not there; zero where all were.
    pub compile_time: Duration,
    /// Time spent on running samples to find ranges: in the first run of a quantized model, if at all.
    pub calibration_time: Duration,
    /// Specialisations that were compiled.
    pub compiled: usize,
    /// The machine code that ran, part by part; none where the interpreter runs them.
    pub models: Vec<Model>,
}

/// What a mutex holds, also where a thread has panicked: nothing that is kept here is ever half written.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DynamicModel {
    /// Reads an ONNX file of a model that may take this many bytes of memory.
    ///
    /// # Errors
    /// Where the file is not a model, its ops are not supported, or it is too large.
    pub fn load(path: &Path, backend: Backend, max_memory: u64) -> Result<DynamicModel, Error> {
        let origin = path.display().to_string();
        let failed = |e| Error::Import { path: origin.clone(), source: Box::new(e) };
        let model = onnx::Model::load_within(path, max_memory).map_err(failed)?;
        Ok(DynamicModel::new(model, origin, backend))
    }

    /// A model that was read before; `origin` is what messages call it.
    pub fn new(model: onnx::Model, origin: impl Into<String>, backend: Backend) -> DynamicModel {
        let (model, origin) = (Arc::new(model), origin.into());
        let engine = match backend {
            Backend::Interpreter => Engine::Interpreter,
            Backend::Jit(compiler) => {
                Engine::Jit(Arc::new(Recipe::new(*compiler, model.clone(), origin.clone(), None)))
            }
        };
        DynamicModel::with(model, origin, engine, false)
    }

    fn with(model: Arc<onnx::Model>, origin: String, engine: Engine, is_rest: bool) -> DynamicModel {
        let state = State { wanted: BTreeSet::new(), specialisations: LruCache::new(KEPT) };
        let (state, formed) = (Mutex::new(state), Mutex::new(LruCache::new(KEPT)));
        DynamicModel(Arc::new(Inner { model, origin, engine, is_rest, state, formed }))
    }

    /// The model as its file has it.
    pub fn model(&self) -> &onnx::Model {
        &self.0.model
    }

    /// The types of the inputs, where some are bound.
    ///
    /// # Errors
    /// Where a dimension that has no default is not bound, or one is that the model declares otherwise.
    pub fn input_types(&self, bindings: &Bindings) -> Result<Vec<TensorType>, Error> {
        let failed = |e| Error::Import { path: self.0.origin.clone(), source: Box::new(e) };
        self.0.model.input_types(bindings).map_err(failed)
    }

    /// Runs the model: all inputs to all outputs, in the order of the model's signature.
    ///
    /// # Errors
    /// Where number, element types or shapes of the inputs are not the model's, or an op does not take its operands.
    pub fn run(&self, inputs: &[Tensor]) -> Result<DynamicRun, Error> {
        let (run, forms) = self.run_within(inputs, &self.0.model.texts(), None)?;
        let names = self.0.model.outputs();
        let mut outputs = names.zip(&run.outputs).zip(&forms);
        match outputs.find(|((_, t), form)| **form != Form::Tensor || t.dtype() == DType::Str) {
            None => Ok(run),
            Some(((name, _), _)) => Err(BindError::Type {
                what: "output",
                name: name.into(),
                expected: "a tensor of numbers".into(),
                got: "another value, which `run_values` gives".into(),
            }
            .into()),
        }
    }

    /// [`run`](Self::run), and the time of every layer of all parts, in the order in which they ran. The interpreter tells none.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn profile(&self, inputs: &[Tensor]) -> Result<(DynamicRun, Vec<LayerTime>), Error> {
        let mut layers = Vec::new();
        let (run, _) = self.run_within(inputs, &self.0.model.texts(), Some(&mut layers))?;
        Ok((run, layers))
    }

    /// The inputs to whose values graphs were specialised so far, because shapes or branches depend on them.
    pub fn wanted_values(&self) -> Vec<String> {
        lock(&self.0.state).wanted.iter().cloned().collect()
    }

    /// Runs the model on values of any kind: texts, sequences, and what is left out.
    ///
    /// # Errors
    /// As [`run`](Self::run), and where an input is not of the kind that the model declares.
    pub fn run_values(&self, inputs: &[Value]) -> Result<ValueRun, Error> {
        let failed = |e| Error::Import { path: self.0.origin.clone(), source: Box::new(e) };
        let texts = self.0.model.texts();
        let refused = |why: &str| failed(onnx::ImportError::Structure(why.into()));
        let flat = texts.flatten(inputs);
        let (forms, tensors) = flat.ok_or_else(|| refused("inputs are maps, or sequences in sequences"))?;
        let declared = self.0.model.inputs();
        self.check_count(forms.len())?;
        let is_plain = declared.iter().all(|i| i.kind == ValueKind::TENSOR);
        let model = match is_plain && forms.iter().all(|f| *f == Form::Tensor) {
            true => self.clone(),
            false => self.formed(&forms).map_err(failed)?,
        };
        let (run, forms) = model.run_within(&tensors, &texts, None)?;
        let outputs = texts.group(&forms, run.outputs.clone());
        let outputs = outputs.ok_or_else(|| refused("an output has an element that is no text"))?;
        Ok(ValueRun { outputs, run })
    }

    /// The model for inputs of these forms.
    fn formed(&self, forms: &[Form]) -> Result<DynamicModel, onnx::ImportError> {
        let mut formed = lock(&self.0.formed);
        if let Some(model) = formed.get(forms) {
            return Ok(model.clone());
        }
        let model = Arc::new(self.0.model.in_forms(forms)?);
        let engine = match &self.0.engine {
            Engine::Jit(recipe) => Engine::Jit(Arc::new(recipe.of(model.clone()))),
            other => other.clone(),
        };
        let made = DynamicModel::with(model, self.0.origin.clone(), engine, false);
        formed.put(forms.to_vec(), made.clone());
        Ok(made)
    }

    /// The tensors that the outputs are, and what these are of them.
    fn run_within(
        &self,
        inputs: &[Tensor],
        texts: &Texts,
        mut profile: Option<&mut Vec<LayerTime>>,
    ) -> Result<(DynamicRun, Vec<Form>), Error> {
        self.check(inputs)?;
        if let Engine::Jit(recipe) = &self.0.engine {
            recipe.first_inputs(inputs);
        }
        let mut run = DynamicRun {
            outputs: Vec::new(),
            compile_time: Duration::ZERO,
            calibration_time: Duration::ZERO,
            compiled: 0,
            models: Vec::new(),
        };
        let (mut model, mut values) = (self.clone(), inputs.to_vec());
        loop {
            let (specialisation, is_new) = model.specialised(&values)?;
            if is_new {
                run.compiled += 1;
                run.compile_time += specialisation.times.compile;
                run.calibration_time += specialisation.times.calibrate;
            }
            if let Code::Compiled { model, .. } = &specialisation.code {
                run.models.push(model.clone());
            }
            let outputs = specialisation.run(&values, profile.as_deref_mut())?;
            let Some(next) = &specialisation.next else {
                run.outputs = outputs;
                return Ok((run, specialisation.forms.clone()));
            };
            let named = specialisation.outputs.iter().cloned().zip(outputs).collect();
            (model, values) = next.prepare(named, &model.0, texts)?;
        }
    }

    fn check_count(&self, got: usize) -> Result<(), Error> {
        let infos = self.0.model.inputs();
        if infos.len() == got {
            return Ok(());
        }
        let names = infos.iter().map(|i| i.name.clone()).collect();
        Err(BindError::Count { what: "input", expected: infos.len(), got, names }.into())
    }

    fn check(&self, inputs: &[Tensor]) -> Result<(), Error> {
        let infos = self.0.model.inputs();
        self.check_count(inputs.len())?;
        for (info, given) in infos.iter().zip(inputs) {
            if info.dtype != given.dtype() {
                return Err(BindError::Type {
                    what: "input",
                    name: info.name.clone(),
                    expected: info.dtype.to_string(),
                    got: given.dtype().to_string(),
                }
                .into());
            }
        }
        Ok(())
    }

    /// The specialisation for these inputs, and whether it is new.
    fn specialised(&self, inputs: &[Tensor]) -> Result<(Arc<Specialisation>, bool), Error> {
        let infos = self.0.model.inputs();
        loop {
            let wanted = {
                let mut state = lock(&self.0.state);
                let key = key(infos, inputs, &state.wanted);
                if let Some(found) = state.specialisations.get(&key) {
                    return Ok((found.clone(), false));
                }
                state.wanted.clone()
            };
            let start = Instant::now();
            let Some((graph, forms, next)) = self.imported(inputs, &wanted)? else { continue };
            let outputs = graph.outputs().iter().map(|o| o.name.clone()).collect();
            let (code, calibrate) = self.0.compile(graph)?;
            let times = Times { compile: start.elapsed().saturating_sub(calibrate), calibrate };
            let made = Arc::new(Specialisation { code, outputs, forms, next, times });
            let key = key(infos, inputs, &wanted);
            lock(&self.0.state).specialisations.put(key, made.clone());
            return Ok((made, true));
        }
    }

    /// The graph for inputs of these types, and of these values where they are wanted, with what comes behind it; `None`
    /// where more values turn out to be wanted.
    fn imported(&self, inputs: &[Tensor], wanted: &BTreeSet<String>) -> Result<Option<Imports>, Error> {
        let mut bindings = Bindings::default();
        for (info, tensor) in self.0.model.inputs().iter().zip(inputs) {
            match wanted.contains(&info.name) {
                true => _ = bindings.known.insert(info.name.clone(), tensor.clone()),
                false => _ = bindings.shapes.insert(info.name.clone(), tensor.shape().to_vec()),
            }
        }
        let failed = |e| Error::Import { path: self.0.origin.clone(), source: Box::new(e) };
        Ok(match self.0.model.import(&bindings).map_err(failed)? {
            Imported::Wants(names) => {
                lock(&self.0.state).wanted.extend(names);
                None
            }
            Imported::Whole(graph, forms) => Some((graph, forms, None)),
            Imported::Part(part) => {
                let Part { graph, eager, rest, .. } = *part;
                Some((graph, Vec::new(), Some(Next { eager, rest, model: Mutex::new(None) })))
            }
        })
    }

    /// The graph of the whole model for these inputs; `None` where it depends on what is computed.
    pub(crate) fn whole_graph(&self, inputs: &[Tensor]) -> Result<Option<Graph>, Error> {
        self.check(inputs)?;
        loop {
            let wanted = lock(&self.0.state).wanted.clone();
            if let Some((graph, _, next)) = self.imported(inputs, &wanted)? {
                return Ok(next.is_none().then_some(graph));
            }
        }
    }
}

fn key(infos: &[onnx::InputInfo], inputs: &[Tensor], wanted: &BTreeSet<String>) -> Key {
    let of = |(info, t): (&onnx::InputInfo, &Tensor)| {
        let value = wanted.contains(&info.name).then(|| t.bytes().to_vec());
        (t.dtype(), t.shape().to_vec(), value)
    };
    infos.iter().zip(inputs).map(of).collect()
}

impl Backend {
    /// Machine code by this compiler, whose models share their packed weights.
    pub fn jit(compiler: Compiler) -> Backend {
        Backend::Jit(Box::new(compiler.share_weights()))
    }
}

impl Inner {
    /// Code for a graph, and the time that was spent on samples for it.
    fn compile(&self, graph: Graph) -> Result<(Code, Duration), Error> {
        Ok(match &self.engine {
            Engine::Interpreter => {
                MemoryError::check("the model", MemoryPlan::of(&graph).total(), self.model.max_memory())?;
                (Code::Interpreted(graph), Duration::ZERO)
            }
            // Nothing to compute: inputs and constants are the outputs.
            Engine::Jit(_) if graph.nodes().all(|(_, node)| node.op().is_none()) => {
                (Code::Interpreted(graph), Duration::ZERO)
            }
            Engine::Jit(recipe) => {
                let (model, calibrate) = recipe.compile(graph)?;
                (Code::Compiled { model, sessions: Mutex::new(Vec::new()) }, calibrate)
            }
            Engine::Observed(observation) => {
                (Code::Observed(observation.part(graph, self.is_rest)?), Duration::ZERO)
            }
        })
    }
}

impl Specialisation {
    fn run(&self, inputs: &[Tensor], profile: Option<&mut Vec<LayerTime>>) -> Result<Vec<Tensor>, Error> {
        match &self.code {
            Code::Interpreted(graph) => Ok(interpreter::run(graph, inputs)?),
            Code::Observed(part) => part.run(inputs),
            Code::Compiled { model, sessions } => {
                // Callers at the same time have a session each, which the next ones use again.
                let free = lock(sessions).pop();
                let mut session = free.unwrap_or_else(|| Session::new(model));
                let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
                let outputs = match profile {
                    None => session.run(&views),
                    Some(layers) => {
                        session.start_profile();
                        let outputs = session.run(&views);
                        layers.extend(session.profile());
                        session.stop_profile();
                        outputs
                    }
                };
                lock(sessions).push(session);
                outputs
            }
        }
    }
}

impl Next {
    /// The rest of a model, and its inputs.
    fn prepare(
        &self,
        mut values: BTreeMap<String, Tensor>,
        of: &Inner,
        texts: &Texts,
    ) -> Result<(DynamicModel, Vec<Tensor>), Error> {
        let failed = |e| Error::Import { path: of.origin.clone(), source: Box::new(e) };
        for eager in &self.eager {
            let reads =
                eager.reads().iter().filter_map(|name| Some((name.clone(), values.get(name)?.clone())));
            let results = eager.run(reads.collect(), texts).map_err(failed)?;
            values.extend(results);
        }
        let mut model = lock(&self.model);
        let types = |values: &BTreeMap<String, Tensor>, m: &DynamicModel| -> Vec<DType> {
            m.model().inputs().iter().filter_map(|i| values.get(&i.name)).map(Tensor::dtype).collect()
        };
        let known = model.as_ref().filter(|(seen, m)| *seen == types(&values, m)).map(|(_, m)| m.clone());
        let rest = known.unwrap_or_else(|| {
            let rest = self.rest.model(|name| values.get(name).map(Tensor::dtype));
            DynamicModel::with(Arc::new(rest), of.origin.clone(), of.engine.clone(), true)
        });
        *model = Some((types(&values, &rest), rest.clone()));
        let inputs = rest.model().inputs().iter().filter_map(|i| values.get(&i.name).cloned()).collect();
        Ok((rest, inputs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, Precision, Program, bundled};
    use qcc_ir::Shape;

    fn model(backend: Backend) -> DynamicModel {
        let model = onnx::Model::parse(bundled::FASHION_RESNET8.to_vec()).unwrap();
        DynamicModel::new(model, "fashion", backend)
    }

    fn images(count: usize) -> Tensor {
        let elements = (0..count * 28 * 28).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect::<Vec<f32>>();
        Tensor::from_vec(Shape::new([count, 1, 28, 28]).unwrap(), elements).unwrap()
    }

    #[test]
    fn each_batch_size_is_compiled_once() {
        let compiled = model(Backend::jit(Compiler::new().precision(Precision::Float)));
        let interpreted = model(Backend::Interpreter);
        for (count, is_new) in [(1, true), (3, true), (1, false), (2, true), (3, false)] {
            let x = images(count);
            let run = compiled.run(std::slice::from_ref(&x)).unwrap();
            assert_eq!(run.compiled == 1, is_new, "batch of {count}");
            assert_eq!(run.compile_time.is_zero(), !is_new);
            let expected = interpreted.run(&[x]).unwrap();
            let (got, expected) = (run.outputs[0].to_f64(), expected.outputs[0].to_f64());
            assert_eq!(run.outputs[0].shape()[0], count);
            for (a, b) in got.iter().zip(&expected) {
                assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "batch of {count}: {a} instead of {b}");
            }
        }
    }

    #[test]
    fn a_profile_has_every_step_of_what_ran() {
        let compiled = model(Backend::jit(Compiler::new().precision(Precision::Float)));
        let (run, layers) = compiled.profile(&[images(2)]).unwrap();
        let steps: Vec<&str> = run.models.iter().flat_map(Model::steps).map(|s| &s.name[..]).collect();
        assert_eq!(layers.iter().map(|l| &l.name[..]).collect::<Vec<_>>(), steps);
        assert!(layers.iter().any(|l| !l.time.is_zero()));
        assert!(compiled.wanted_values().is_empty());
        let whole = compiled.whole_graph(&[images(3)]).unwrap().expect("nothing depends on data");
        assert_eq!(whole.shape(whole.inputs()[0].out())[0], 3);
    }

    #[test]
    fn callers_at_the_same_time_get_their_own_results() {
        let compiled = model(Backend::jit(Compiler::new().precision(Precision::Float)));
        let expected: Vec<Tensor> =
            (1..4).map(|n| compiled.run(&[images(n)]).unwrap().outputs.swap_remove(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in (1..4).cycle().take(12) {
                        let outputs = compiled.run(&[images(n)]).unwrap().outputs;
                        assert_eq!(outputs[0], expected[n - 1]);
                    }
                });
            }
        });
    }

    #[test]
    fn inputs_that_are_not_the_models_are_refused() {
        let model = model(Backend::Interpreter);
        let refused = |inputs: &[Tensor]| model.run(inputs).err().unwrap().to_string();
        assert!(refused(&[]).contains("1 inputs"));
        assert!(refused(&[Tensor::scalar(1i32)]).contains("expected f32"));
        let wrong = Tensor::zeros(DType::F32, Shape::new([1, 3, 28, 28]).unwrap());
        assert!(refused(&[wrong]).contains("has 3 where the model declares 1"));
    }

    fn int8() -> Compiler {
        let samples = bundled::calibration().unwrap().limit(16);
        Compiler::new().calibration(samples).preprocess(bundled::preprocess())
    }

    #[test]
    fn all_shapes_compute_on_the_ranges_of_the_samples() {
        let calibrated = Arc::new(Mutex::new(0));
        let seen = calibrated.clone();
        let compiler = int8().observer(move |event| {
            if let Event::Calibrating { .. } = event {
                *lock(&seen) += 1;
            }
        });
        let dynamic = model(Backend::jit(compiler));
        // A batch of its own for each image, in integers: the same bits as alone.
        let one = dynamic.run(&[images(1)]).unwrap();
        assert!(!one.calibration_time.is_zero());
        let three = dynamic.run(&[images(3)]).unwrap();
        assert!(three.calibration_time.is_zero());
        assert_eq!(*lock(&calibrated), 16, "samples ran once");
        assert_eq!(three.models[0].info().calibration.as_ref().unwrap().samples, 16);
        assert_eq!(one.outputs[0].bytes()[..], three.outputs[0].bytes()[..one.outputs[0].bytes().len()]);
    }

    #[test]
    fn a_file_of_open_shapes_runs_as_the_model_that_it_was_made_of() {
        let dir = tempfile::tempdir().unwrap();
        let (onnx, qcc) = (dir.path().join("a.onnx"), dir.path().join("a.qcc"));
        std::fs::write(&onnx, bundled::FASHION_RESNET8).unwrap();
        let direct = int8().dynamic_file(&onnx).unwrap();
        int8().dynamic_program(&onnx).unwrap().save(&qcc).unwrap();
        std::fs::remove_file(onnx).unwrap();
        let ProgramFile::Dynamic(program) = ProgramFile::load(&qcc, u64::MAX).unwrap() else {
            panic!("bound")
        };
        // Nothing of what the file says is asked again, such as the precision.
        let plain = Compiler::new().precision(Precision::Float);
        let loaded = program.model_with(&plain, "a.qcc");
        for count in [1, 3] {
            let run = loaded.run(&[images(count)]).unwrap();
            assert_eq!(run.outputs, direct.run(&[images(count)]).unwrap().outputs);
            assert!(run.calibration_time.is_zero());
        }
        let bound = plain.shape("image", [2, 1, 28, 28]).program_of_file(&qcc).unwrap();
        assert_eq!(bound.info().precision, Precision::Int8);
        assert_eq!(bound.info().calibration.as_ref().unwrap().samples, 16);
        assert!(matches!(Program::load(&qcc), Err(e) if e.to_string().contains("shapes are open")));
    }

    #[test]
    fn a_file_of_open_shapes_that_lies_behind_right_checksums_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (onnx, qcc) = (dir.path().join("a.onnx"), dir.path().join("a.qcc"));
        std::fs::write(&onnx, bundled::FASHION_RESNET8).unwrap();
        int8().dynamic_program(&onnx).unwrap().save(&qcc).unwrap();
        let contents = crate::container::open(&qcc).unwrap();
        let written = |record: &[u8], blobs: &[bytes::Bytes]| {
            crate::container::write(&qcc, record, blobs).unwrap();
            ProgramFile::load(&qcc, u64::MAX)
        };
        let mut refused = 0;
        for i in 0..200 {
            let mut record = contents.record.to_vec();
            let at = i * 7919 % record.len();
            record[at] ^= 1 << (i % 8);
            let mut message = contents.blobs[0].to_vec();
            let at = i * 104_729 % message.len();
            message[at] ^= 1 << (i % 8);
            let blobs: Vec<_> =
                std::iter::once(message.into()).chain(contents.blobs[1..].iter().cloned()).collect();
            for loaded in [written(&record, &contents.blobs), written(&contents.record, &blobs)] {
                match loaded {
                    Ok(ProgramFile::Dynamic(p)) => _ = p.model_with(&Compiler::new(), "a").run(&[images(1)]),
                    Ok(ProgramFile::Placed(_)) | Err(_) => refused += 1,
                }
            }
        }
        assert!(refused > 0, "no change was noticed");
        for blobs in [&[][..], &contents.blobs[1..], &contents.blobs[..1]] {
            assert!(written(&contents.record, blobs).is_err());
        }
    }
}
