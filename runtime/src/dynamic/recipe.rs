//! How all specialisations of a model are compiled: on the same ranges, found once.

use super::{DynamicModel, Engine, lock};
use crate::{Calibrated, Compiler, Error, Event, Model, Samples, TensorInfo, compiler::Observation};
use qcc_ir::{Graph, Tensor, onnx};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

/// A model and its compiler.
pub(super) struct Recipe {
    compiler: Compiler,
    model: Arc<onnx::Model>,
    /// The file, for messages.
    origin: String,
    /// Shapes of the first inputs that came, for noise where there are no samples.
    shapes: OnceLock<BTreeMap<String, Vec<usize>>>,
    calibrated: Mutex<Option<Arc<Calibrated>>>,
}

impl Recipe {
    /// Of ranges that are known, or will be when they are needed.
    pub(super) fn new(
        compiler: Compiler,
        model: Arc<onnx::Model>,
        origin: String,
        calibrated: Option<Calibrated>,
    ) -> Recipe {
        let calibrated = Mutex::new(calibrated.map(Arc::new));
        Recipe { compiler, model, origin, shapes: OnceLock::new(), calibrated }
    }

    /// The same for another form of the model.
    pub(super) fn of(&self, model: Arc<onnx::Model>) -> Recipe {
        Recipe::new(self.compiler.clone(), model, self.origin.clone(), None)
    }

    /// Remembers the first of them.
    pub(super) fn first_inputs(&self, inputs: &[Tensor]) {
        self.shapes.get_or_init(|| {
            let shape = |(i, t): (&onnx::InputInfo, &Tensor)| (i.name.clone(), t.shape().to_vec());
            self.model.inputs().iter().zip(inputs).map(shape).collect()
        });
    }

    /// Machine code for the graph of a part, and the time that was spent on samples for it.
    pub(super) fn compile(&self, graph: Graph) -> Result<(Model, Duration), Error> {
        let prepared = self.compiler.prepare(graph)?;
        let compiler = self.compiler.without_noise_for(&prepared);
        let needs_ranges = compiler.options.precision.is_calibrated() && !prepared.brings_grids();
        let (calibrated, took) = match needs_ranges {
            true => self.calibrated().map(|(ranges, took)| (Some(ranges), took))?,
            false => (None, Duration::ZERO),
        };
        let program = compiler.lower(&prepared, calibrated.as_deref())?;
        Ok((self.compiler.jit(&program)?, took))
    }

    /// The ranges, from samples where they are not there yet, and the time that this took.
    pub(super) fn calibrated(&self) -> Result<(Arc<Calibrated>, Duration), Error> {
        // Held meanwhile: a second caller needs the same.
        let mut calibrated = lock(&self.calibrated);
        if let Some(found) = &*calibrated {
            return Ok((found.clone(), Duration::ZERO));
        }
        let start = Instant::now();
        let found = Arc::new(self.calibrate()?);
        *calibrated = Some(found.clone());
        Ok((found, start.elapsed()))
    }

    /// Runs the samples through the float model, in the shapes that they have.
    fn calibrate(&self) -> Result<Calibrated, Error> {
        let samples = self.compiler.samples.clone().unwrap_or_else(Samples::noise);
        let observation = Arc::new(Observation::new(&self.compiler));
        let engine = Engine::Observed(observation.clone());
        let model = DynamicModel::with(self.model.clone(), self.origin.clone(), engine, false);
        let groups = samples.groups();
        for i in 0..groups {
            let group = samples.group(i)?;
            let feed = group.bind(&self.input_types(&group)?, &self.compiler.preprocess)?;
            for batch in 0..feed.batches() {
                model.run_within(&feed.batch(batch)?, &self.model.texts(), None)?;
                let (done, total) = match groups {
                    1 => (batch + 1, feed.batches()),
                    total => (i + 1, total),
                };
                self.compiler.tell(Event::Calibrating { done, total });
                if observation.is_idle() {
                    break;
                }
            }
        }
        if observation.met_grids() {
            return Ok(Calibrated::unneeded(&self.compiler.calibrators));
        }
        if self.compiler.samples.is_none() {
            self.compiler.warn_of_noise();
        }
        let ranges =
            qcc_passes::Ranges { repairs: self.compiler.repairs_of_weights(), ..observation.ranges() };
        Ok(Calibrated::new(ranges, &samples, &self.compiler.calibrators))
    }

    /// Types of the inputs for samples: as the compiler has them bound, as the samples are, as the first inputs were.
    fn input_types(&self, samples: &Samples) -> Result<Vec<TensorInfo>, Error> {
        let mut bindings = self.compiler.bindings().clone();
        samples.bind_shapes(self.model.inputs(), &mut bindings);
        for (name, shape) in self.shapes.get().into_iter().flatten() {
            if !bindings.shapes.contains_key(name) {
                bindings.shapes.insert(name.clone(), shape.clone());
            }
        }
        let failed = |e| Error::Import { path: self.origin.clone(), source: Box::new(e) };
        let types = self.model.input_types(&bindings).map_err(failed)?;
        let info = |(i, ty): (&onnx::InputInfo, _)| TensorInfo { name: i.name.clone(), ty };
        Ok(self.model.inputs().iter().zip(types).map(info).collect())
    }
}
