//! Models whose shapes are those of the inputs that come.
//!
//! A [`DynamicModel`] compiles a *specialisation* for each combination of input shapes (and of the few small values, such
//! as target sizes, on which shapes depend) when it first comes, and keeps the last of them. All share the model's weights.
//!
//! Quantization finds ranges on samples of the model's inputs. What comes behind data-dependent shapes has none, and is
//! computed in float.
//!
//! Where shapes, or what is computed at all, depend on data, a specialisation goes as far as they are known. Values that
//! decide are computed, and what is left of the model is a dynamic model of its own, whose inputs are the values so far.

use crate::{BindError, Compiler, Error, Model, Session, TensorView};
use lru::LruCache;
use qcc_ir::{
    DType, Graph, Tensor, interpreter,
    memory::{MemoryError, MemoryPlan},
    onnx::{self, Bindings, Eager, Form, Imported, Part, Rest, Texts, Value, ValueKind},
};
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

/// Specialisations that a model keeps, unless told otherwise.
const KEPT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// A model that takes inputs of any shapes that it declares. Clones share everything, and threads may use it at once.
#[derive(Clone)]
pub struct DynamicModel(Arc<Inner>);

struct Inner {
    model: onnx::Model,
    /// The file, for messages.
    origin: String,
    backend: Backend,
    kept: NonZeroUsize,
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
    compile_time: Duration,
}

enum Code {
    Interpreted(Graph),
    Compiled { model: Model, sessions: Mutex<Vec<Session>> },
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
    /// Specialisations that were compiled.
    pub compiled: usize,
    /// The machine code that ran, part by part; none where the interpreter runs them.
    pub models: Vec<Model>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
        DynamicModel::with(model, origin.into(), backend, KEPT)
    }

    fn with(model: onnx::Model, origin: String, backend: Backend, kept: NonZeroUsize) -> DynamicModel {
        let state = State { wanted: BTreeSet::new(), specialisations: LruCache::new(kept) };
        let formed = Mutex::new(LruCache::new(kept));
        DynamicModel(Arc::new(Inner { model, origin, backend, kept, state: Mutex::new(state), formed }))
    }

    /// The model as its file has it.
    pub fn model(&self) -> &onnx::Model {
        &self.0.model
    }

    /// Runs the model: all inputs to all outputs, in the order of the model's signature.
    ///
    /// # Errors
    /// Where number, element types or shapes of the inputs are not the model's, or an op does not take its operands.
    pub fn run(&self, inputs: &[Tensor]) -> Result<DynamicRun, Error> {
        let (run, forms) = self.run_within(inputs, &self.0.model.texts())?;
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
        let (run, forms) = model.run_within(&tensors, &texts)?;
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
        let model = self.0.model.in_forms(forms)?;
        let made = DynamicModel::with(model, self.0.origin.clone(), self.0.backend.clone(), self.0.kept);
        formed.put(forms.to_vec(), made.clone());
        Ok(made)
    }

    /// The tensors that the outputs are, and what these are of them.
    fn run_within(&self, inputs: &[Tensor], texts: &Texts) -> Result<(DynamicRun, Vec<Form>), Error> {
        self.check(inputs)?;
        let mut run =
            DynamicRun { outputs: Vec::new(), compile_time: Duration::ZERO, compiled: 0, models: Vec::new() };
        let (mut model, mut values) = (self.clone(), inputs.to_vec());
        loop {
            let (specialisation, is_new) = model.specialised(&values)?;
            if is_new {
                run.compiled += 1;
                run.compile_time += specialisation.compile_time;
            }
            if let Code::Compiled { model, .. } = &specialisation.code {
                run.models.push(model.clone());
            }
            let outputs = specialisation.run(&values)?;
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
            let mut bindings = Bindings::default();
            for (info, tensor) in infos.iter().zip(inputs) {
                match wanted.contains(&info.name) {
                    true => _ = bindings.known.insert(info.name.clone(), tensor.clone()),
                    false => _ = bindings.shapes.insert(info.name.clone(), tensor.shape().to_vec()),
                }
            }
            let failed = |e| Error::Import { path: self.0.origin.clone(), source: Box::new(e) };
            let (graph, forms, next) = match self.0.model.import(&bindings).map_err(failed)? {
                Imported::Wants(names) => {
                    lock(&self.0.state).wanted.extend(names);
                    continue;
                }
                Imported::Whole(graph, forms) => (graph, forms, None),
                Imported::Part(part) => {
                    let Part { graph, eager, rest, .. } = *part;
                    (graph, Vec::new(), Some(Next { eager, rest, model: Mutex::new(None) }))
                }
            };
            let outputs = graph.outputs().iter().map(|o| o.name.clone()).collect();
            let code = self.0.backend.compile(graph, self.0.model.max_memory())?;
            let made = Arc::new(Specialisation { code, outputs, forms, next, compile_time: start.elapsed() });
            let key = key(infos, inputs, &wanted);
            lock(&self.0.state).specialisations.put(key, made.clone());
            return Ok((made, true));
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

    fn compile(&self, graph: Graph, max_memory: u64) -> Result<Code, Error> {
        Ok(match self {
            Backend::Interpreter => {
                MemoryError::check("the model", MemoryPlan::of(&graph).total(), max_memory)?;
                Code::Interpreted(graph)
            }
            // Nothing to compute: inputs and constants are the outputs.
            Backend::Jit(_) if graph.nodes().all(|(_, node)| node.op().is_none()) => Code::Interpreted(graph),
            Backend::Jit(compiler) => {
                let model = compiler.compile_graph(graph)?;
                Code::Compiled { model, sessions: Mutex::new(Vec::new()) }
            }
        })
    }
}

impl Specialisation {
    fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        match &self.code {
            Code::Interpreted(graph) => Ok(interpreter::run(graph, inputs)?),
            Code::Compiled { model, sessions } => {
                // Callers at the same time have a session each, which the next ones use again.
                let free = lock(sessions).pop();
                let mut session = free.unwrap_or_else(|| Session::new(model));
                let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
                let outputs = session.run(&views);
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
            let backend = match &of.backend {
                Backend::Interpreter => Backend::Interpreter,
                Backend::Jit(compiler) => Backend::Jit(Box::new(compiler.without_calibration())),
            };
            DynamicModel::with(rest, of.origin.clone(), backend, of.kept)
        });
        *model = Some((types(&values, &rest), rest.clone()));
        let inputs = rest.model().inputs().iter().filter_map(|i| values.get(&i.name).cloned()).collect();
        Ok((rest, inputs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Precision, bundled};
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
}
