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
    /// The compiler with statistics of batch norms, where they are recomputed.
    estimated: Mutex<Option<Arc<Compiler>>>,
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
        let (shapes, estimated) = (OnceLock::new(), Mutex::default());
        Recipe { compiler, model, origin, shapes, estimated, calibrated }
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

    /// The compiler; with statistics of batch norms where they are to be recomputed, from the samples in the shape that they have.
    /// Also the time that this took.
    pub(super) fn compiler(&self) -> Result<(Arc<Compiler>, Duration), Error> {
        // Held meanwhile: a second caller needs the same.
        let mut estimated = lock(&self.estimated);
        if let Some(found) = &*estimated {
            return Ok((found.clone(), Duration::ZERO));
        }
        let start = Instant::now();
        let compiler = match self.compiler.reestimates() {
            false => self.compiler.clone(),
            true => {
                let failed = |e| Error::Import { path: self.origin.clone(), source: Box::new(e) };
                let samples = self.compiler.samples.clone().unwrap_or_else(Samples::noise).group(0)?;
                let mut bindings = self.compiler.bindings().clone();
                for info in self.input_types(&samples)? {
                    bindings.shapes.insert(info.name, info.ty.shape.to_vec());
                }
                self.compiler.estimated(&self.model.graph(&bindings).map_err(failed)?)?
            }
        };
        let compiler = Arc::new(compiler);
        *estimated = Some(compiler.clone());
        let took = if self.compiler.reestimates() { start.elapsed() } else { Duration::ZERO };
        Ok((compiler, took))
    }

    /// Machine code for the graph of a part, and the time that was spent on samples for it.
    pub(super) fn compile(&self, graph: Graph) -> Result<(Model, Duration), Error> {
        let (own, estimation) = self.compiler()?;
        let prepared = own.prepare(graph)?;
        let compiler = own.without_noise_for(&prepared);
        let needs_ranges = compiler.options.precision.is_calibrated() && !prepared.brings_grids();
        let (calibrated, took) = match needs_ranges {
            true => self.calibrated().map(|(ranges, took)| (Some(ranges), took))?,
            false => (None, Duration::ZERO),
        };
        let program = compiler.lower(&prepared, calibrated.as_deref())?;
        Ok((own.jit(&program)?, took + estimation))
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
        let observation = Arc::new(Observation::new(&self.compiler()?.0));
        let engine = Engine::Observed(observation.clone());
        let model = DynamicModel::with(self.model.clone(), self.origin.clone(), engine, false);
        let groups = samples.groups();
        let mut number = 0;
        for i in 0..groups {
            let group = samples.group(i)?;
            let feed = group.bind(&self.input_types(&group)?, &self.compiler.preprocess)?;
            for batch in 0..feed.batches() {
                observation.at(number);
                number += 1;
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
