//! What it costs to compute single layers with integers.

use crate::{
    Calibrated, Compiler, Error, Precision, Prepared, Samples,
    compiler::{Reference, Runs},
    sqnr::decibels,
};
use qcc_ir::{Graph, NodeId};
use qcc_passes::{Layers, Ranges, int8_layers};
use serde::Serialize;
use std::collections::BTreeSet;

/// What rounding costs, layer by layer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Sensitivity {
    /// Number of samples on which errors were measured.
    pub samples: usize,
    /// Number of samples of which ranges were made for that; others than these, unless there are too few.
    pub fitted: usize,
    /// Signal-to-noise ratio of the results (their mean, of several) in dB where all layers are int8 that can be.
    pub int8_db: f64,
    /// The layers, the most sensitive one first.
    pub layers: Vec<LayerSensitivity>,
}

/// What rounding one layer costs.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LayerSensitivity {
    /// Name of the node in the prepared graph.
    pub layer: String,
    /// Its op.
    pub op: &'static str,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Signal-to-noise ratio of the results in dB where it alone is int8: its operands are rounded, its weights and what it
    /// makes. Infinite where that changes nothing, and then `null` in JSON.
    pub alone_db: f64,
    /// The same where it alone is float.
    pub without_db: f64,
}

/// How errors are measured: int8 programs of a model, some of whose layers are float, against float.
pub(super) struct Trials<'a> {
    compiler: Compiler,
    prepared: &'a Prepared,
    fitted: Calibrated,
    reference: Reference,
}

impl<'a> Trials<'a> {
    /// Ranges are found as `calibrated` found them, of samples other than those on which errors are measured.
    pub(super) fn new(
        compiler: &Compiler,
        prepared: &'a Prepared,
        calibrated: &Calibrated,
    ) -> Result<Trials<'a>, Error> {
        let samples = compiler.samples.clone().filter(|s: &Samples| !s.is_noise());
        let samples = samples.ok_or_else(|| {
            Error::Calibration(
                "which layers are to be float is measured on samples: give real inputs (--calibrate)".into(),
            )
        })?;
        if prepared.brings_grids() {
            let why =
                "the model is quantized already: which of its layers are float was decided by its author";
            return Err(Error::Calibration(why.into()));
        }
        let compiler = compiler.silent().precision(Precision::Int8);
        let [held, fitted] = compiler.divided(prepared, &samples)?;
        let fitted = compiler.calibrated_like(prepared, calibrated, &fitted)?;
        let feed = held.bind(&crate::graph_inputs(prepared.graph()), &compiler.preprocess)?;
        let reference = Reference::new(&compiler, prepared.graph(), feed)?;
        Ok(Trials { compiler, prepared, fitted, reference })
    }

    pub(super) fn samples(&self) -> (usize, usize) {
        (self.reference.feed().samples(), self.fitted.ranges().samples as usize)
    }

    /// The graph whose layers are meant: channels are scaled.
    fn graph(&self) -> &Graph {
        self.prepared.graph()
    }

    fn ranges(&self) -> &Ranges {
        self.fitted.ranges()
    }

    /// The layers that become int8 where nothing is said.
    pub(super) fn layers(&self) -> Vec<NodeId> {
        let options = self.compiler.lowering_options(self.prepared);
        int8_layers(self.graph(), self.ranges(), &options)
    }

    /// Noise over signal with this choice of layers.
    pub(super) fn noise(&self, layers: Layers) -> Result<f64, Error> {
        let compiler = self.compiler.clone().layers(layers);
        let program = compiler.lower(self.prepared, Some(&self.fitted))?;
        self.reference.noise_of(&compiler, &compiler.jit(&program)?)
    }

    pub(super) fn without(&self, float: &BTreeSet<String>) -> Result<f64, Error> {
        self.noise(Layers::AllBut(float.clone()))
    }

    /// Measures all layers.
    pub(super) fn sensitivity(&self, runs: &mut Runs<'_>) -> Result<Sensitivity, Error> {
        let graph = self.graph();
        let int8_db = decibels(self.without(&BTreeSet::new())?);
        let mut layers = Vec::new();
        for node in self.layers() {
            let name = &graph.node(node).name;
            let only = || BTreeSet::from([name.clone()]);
            layers.push(LayerSensitivity {
                layer: name.clone(),
                op: graph.mnemonic(node),
                macs: graph.macs(node),
                alone_db: decibels(self.noise(Layers::Only(only()))?),
                without_db: decibels(self.without(&only())?),
            });
            runs.step();
        }
        // Those of equal cost in the order of execution.
        layers.sort_by(|a, b| a.alone_db.total_cmp(&b.alone_db));
        let (samples, fitted) = self.samples();
        Ok(Sensitivity { samples, fitted, int8_db, layers })
    }
}

impl Compiler {
    /// For each layer that can be int8, the error of the results when it alone is, and when it alone is not: two programs a
    /// layer, each run on at most 64 samples that ranges do not know.
    ///
    /// # Errors
    /// Where there are no samples, or the model brings its own grids.
    pub fn sensitivity(&self, prepared: &Prepared, calibrated: &Calibrated) -> Result<Sensitivity, Error> {
        let trials = Trials::new(self, prepared, calibrated)?;
        let mut runs = Runs::new(self, trials.layers().len());
        let found = trials.sensitivity(&mut runs)?;
        runs.finish();
        Ok(found)
    }
}
