//! Ranges of activations: the float graph runs on samples, on all threads, and shows what is in it.

use super::{Compiler, Event, Prepared, graph_inputs};
use crate::{
    Calibration, Error, JitOptions, Model, Precision, Program, ProgramInfo, Samples, Session, TensorView,
    Threads, dynamic::lock,
};
use qcc_ir::{Graph, Output, Tensor, ValueId};
use qcc_passes::{Calibrator, Collector, Options, Ranges, Report};
use serde::{Deserialize, Serialize};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

/// Ranges of a model's values, at whatever shapes, and where they come from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calibrated {
    pub(crate) ranges: Ranges,
    pub(super) summary: Calibration,
}

impl Calibrated {
    /// Where they come from.
    pub fn summary(&self) -> &Calibration {
        &self.summary
    }

    pub(crate) fn new(ranges: Ranges, samples: &Samples, calibrator: Calibrator) -> Calibrated {
        let summary = Calibration {
            origin: samples.origin().into(),
            samples: ranges.samples,
            calibrator,
            synthetic: samples.is_noise(),
        };
        let mut ranges = ranges;
        if samples.is_noise() {
            // That noise is no data was said already.
            ranges.warnings.clear();
        }
        Calibrated { ranges, summary }
    }

    /// Of a model that brings its own grids, and needs no ranges.
    pub(crate) fn unneeded(calibrator: Calibrator) -> Calibrated {
        let origin = "the model's own grids".into();
        let summary = Calibration { origin, samples: 0, calibrator, synthetic: false };
        Calibrated { ranges: Ranges::default(), summary }
    }
}

/// A prepared float graph that shows the values of which calibration needs ranges.
pub(crate) struct Probe {
    /// None where nothing but inputs is to be seen.
    model: Option<Model>,
    /// Observed inputs, by their place.
    inputs: Vec<(usize, ValueId)>,
    /// Observed results, which come first among the model's.
    computed: Vec<ValueId>,
}

impl Probe {
    /// Of the values that a collector wants; and of the graph's own results, where they are needed.
    ///
    /// # Errors
    /// Where the graph cannot be compiled.
    pub(crate) fn new(
        compiler: &Compiler,
        graph: &Graph,
        collector: &Collector,
        with_results: bool,
    ) -> Result<Probe, Error> {
        let place = |v: ValueId| Some((graph.inputs().iter().position(|n| *n == v.node)?, v));
        let inputs = collector.values().filter_map(place).collect();
        // Inputs need no run to be seen, and are not made outputs.
        let computed: Vec<ValueId> = collector.values().filter(|&v| place(v).is_none()).collect();
        let mut outputs: Vec<Output> =
            computed.iter().map(|&value| Output { name: format!("probe {value}"), value }).collect();
        if with_results {
            outputs.extend(graph.outputs().iter().cloned());
        }
        let model = match outputs.is_empty() {
            true => None,
            false => Some(compiler.probe(graph, outputs)?),
        };
        Ok(Probe { model, inputs, computed })
    }

    /// A session for [`run`](Self::run).
    pub(crate) fn session(&self) -> Option<Session> {
        self.model.as_ref().map(Session::new)
    }

    /// Runs one batch, shows it to the collector, and returns the graph's own results.
    pub(crate) fn run(
        &self,
        session: Option<&mut Session>,
        batch: &[Tensor],
        collector: &mut Collector,
    ) -> Result<Vec<Tensor>, Error> {
        for &(at, value) in &self.inputs {
            let elements = batch.get(at).and_then(|t| t.as_slice::<f32>().ok());
            collector.record(value, elements.unwrap_or_default());
        }
        let Some(session) = session else { return Ok(Vec::new()) };
        let views: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
        let mut results = session.run(&views)?;
        let own = results.split_off(self.computed.len());
        for (value, tensor) in self.computed.iter().zip(&results) {
            collector.record(*value, tensor.as_slice().unwrap_or_default());
        }
        Ok(own)
    }
}

/// What is seen of a model that is compiled part by part and shape by shape.
pub(crate) struct Observation {
    compiler: Compiler,
    met_grids: AtomicBool,
    collectors: Mutex<Vec<Arc<Mutex<Collector>>>>,
}

/// A [`Probe`] of one graph of many.
pub(crate) struct ObservedPart {
    probe: Probe,
    session: Mutex<Option<Session>>,
    collector: Arc<Mutex<Collector>>,
}

impl Observation {
    pub(crate) fn new(compiler: &Compiler) -> Observation {
        // What passes have to say comes when they run for good; and weights that are packed for this are for this alone.
        let compiler = Compiler { observer: None, shared: None, ..compiler.clone() };
        Observation {
            compiler: compiler.share_weights(),
            met_grids: AtomicBool::new(false),
            collectors: Mutex::default(),
        }
    }

    /// Makes a graph ready to be observed. A rest has the values of another graph as its inputs.
    pub(crate) fn part(&self, graph: Graph, is_rest: bool) -> Result<ObservedPart, Error> {
        let prepared = self.compiler.prepare(graph)?;
        self.met_grids.fetch_or(prepared.brings_grids(), Ordering::Relaxed);
        let calibrator = self.compiler.calibrator;
        let collector = match is_rest {
            true => Collector::of_rest(prepared.graph(), calibrator),
            false => Collector::new(prepared.graph(), calibrator),
        };
        let probe = Probe::new(&self.compiler, prepared.graph(), &collector, true)?;
        let collector = Arc::new(Mutex::new(collector));
        lock(&self.collectors).push(collector.clone());
        Ok(ObservedPart { session: Mutex::new(probe.session()), probe, collector })
    }

    /// Whether any part is quantized already.
    pub(crate) fn met_grids(&self) -> bool {
        self.met_grids.load(Ordering::Relaxed)
    }

    /// Whether nothing of what was compiled so far needs a range.
    pub(crate) fn is_idle(&self) -> bool {
        lock(&self.collectors).iter().all(|c| lock(c).values().next().is_none())
    }

    /// The ranges of all that was seen. It is forgotten then.
    pub(crate) fn ranges(&self) -> Ranges {
        let mut all = Collector::empty(self.compiler.calibrator);
        for collector in lock(&self.collectors).drain(..) {
            all.merge(std::mem::replace(&mut *lock(&collector), Collector::empty(self.compiler.calibrator)));
        }
        all.finish()
    }
}

impl ObservedPart {
    pub(crate) fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        self.probe.run(lock(&self.session).as_mut(), inputs, &mut lock(&self.collector))
    }
}

impl Compiler {
    /// Runs the prepared graph in float on the samples and collects ranges. One that brings its own grids needs none.
    ///
    /// # Errors
    /// Where samples cannot be read or do not fit the model.
    pub fn calibrate(&self, prepared: &Prepared) -> Result<Calibrated, Error> {
        if prepared.brings_grids() {
            return Ok(Calibrated::unneeded(self.calibrator));
        }
        let samples = self.samples.clone().unwrap_or_else(|| {
            self.warn_of_noise();
            Samples::noise()
        });
        let mut collector = Collector::new(prepared.graph(), self.calibrator);
        if collector.values().next().is_some() && !prepared.graph().inputs().is_empty() {
            let probe = Probe::new(self, prepared.graph(), &collector, false)?;
            let mut session = probe.session();
            let feed = samples.bind(&graph_inputs(prepared.graph()), &self.preprocess)?;
            for i in 0..feed.batches() {
                probe.run(session.as_mut(), &feed.batch(i)?, &mut collector)?;
                self.tell(Event::Calibrating { done: i + 1, total: feed.batches() });
            }
        }
        Ok(Calibrated::new(collector.finish(), &samples, self.calibrator))
    }

    pub(crate) fn warn_of_noise(&self) {
        self.tell(Event::Warning(
            "no calibration data: ranges come from synthetic noise. The result is good for timing; \
             its accuracy means nothing. Give samples of real inputs (--calibrate), or quantize when the model runs, \
             which needs none (--precision int8-dynamic: matrix products, as of transformers)",
        ));
    }

    /// The float model of a prepared graph with these outputs, on all threads.
    fn probe(&self, graph: &Graph, outputs: Vec<Output>) -> Result<Model, Error> {
        let mut graph = graph.clone();
        graph.set_outputs(outputs);
        graph.remove_dead();
        // Without pins: they are meant for the model that comes out, and may name integer devices.
        let options = Options {
            capability: qcc_codegen::capability,
            precision: Precision::Float,
            ..Options::default()
        };
        qcc_passes::lower(&mut graph, &options, &mut |_, _| {})?;
        let info = ProgramInfo {
            precision: Precision::Float,
            ..self.info(&graph, options.requant, None, &Report::default())
        };
        let jit = JitOptions { listing: false, ..self.jit_options()? }.threads(Threads::new(0)?);
        Ok(Program::new(graph, info).jit(&jit)?)
    }
}
