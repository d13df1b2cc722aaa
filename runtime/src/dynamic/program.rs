//! Models that keep their shapes open in a `.qcc` file.

use super::{DynamicModel, Engine, Recipe};
use crate::{
    Calibrated, Compiler, Error, Preprocess, Program, WeightBits,
    container::{self, ContainerError},
    program::{ProgramError, Record, record},
};
use qcc_ir::{Device, numerics::RequantMode, onnx};
use qcc_passes::{BatchNormStatistics, Precision, WeightGrid};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Instant};

/// A model of any shapes, the ranges of its values, and how specialisations are compiled of it: what a `.qcc` file holds
/// whose shapes are open.
#[derive(Clone)]
pub struct DynamicProgram {
    packed: onnx::Packed,
    model: Arc<onnx::Model>,
    info: DynamicInfo,
}

/// How a [`DynamicProgram`] is compiled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DynamicInfo {
    /// Version of the qcc that made it.
    pub qcc: String,
    /// What it computes with.
    pub precision: Precision,
    /// The requantization that was asked for; where none was, what is usual for the model.
    pub requant: Option<RequantMode>,
    /// How many scales a tensor of weights has.
    pub weights: WeightGrid,
    /// Bits of weights.
    pub weight_bits: WeightBits,
    /// Devices of nodes, by name.
    pub pins: BTreeMap<String, Device>,
    /// How images become inputs.
    pub preprocess: Preprocess,
    /// Statistics of batch norms that were recomputed from samples.
    pub statistics: Option<BatchNormStatistics>,
    /// Ranges of activations; `None` for float.
    pub calibrated: Option<Calibrated>,
}

/// A `.qcc` file.
pub enum ProgramFile {
    /// Of bound shapes.
    Placed(Box<Program>),
    /// Of any shapes.
    Dynamic(Box<DynamicProgram>),
}

impl ProgramFile {
    /// Maps a `.qcc` file, as [`Program::load`] does.
    ///
    /// # Errors
    /// Where the file is not a `.qcc` file of this version, is damaged, or its model may not have this many bytes of memory.
    pub fn load(path: &Path, max_memory: u64) -> Result<ProgramFile, Error> {
        let failed = |source| ProgramError { path: path.display().to_string(), source };
        let start = Instant::now();
        let contents = container::open(path).map_err(failed)?;
        let Record::Dynamic(info) = record(&contents).map_err(failed)? else {
            return Ok(ProgramFile::Placed(Box::new(Program::read(contents, start).map_err(failed)?)));
        };
        let mut blobs = contents.blobs.into_iter();
        let missing = || failed(ContainerError::Malformed("it has no model".into()));
        let packed = onnx::Packed { message: blobs.next().ok_or_else(missing)?, tensors: blobs.collect() };
        let invalid = |e| Error::Import { path: path.display().to_string(), source: Box::new(e) };
        let model = Arc::new(packed.model(max_memory).map_err(invalid)?);
        Ok(ProgramFile::Dynamic(Box::new(DynamicProgram { packed, model, info: *info })))
    }
}

impl DynamicProgram {
    /// The model as its file had it.
    pub fn model(&self) -> &onnx::Model {
        &self.model
    }

    /// How it is compiled.
    pub fn info(&self) -> &DynamicInfo {
        &self.info
    }

    /// Writes a `.qcc` file, in one step: an existing file is replaced as a whole or stays as it is.
    ///
    /// # Errors
    /// Where the folder or the disk does not take it.
    pub fn save(&self, path: &Path) -> Result<(), ProgramError> {
        let record = Record::Dynamic(Box::new(self.info.clone()));
        let blobs =
            std::iter::once(&self.packed.message).chain(&self.packed.tensors).cloned().collect::<Vec<_>>();
        let written = record.encode().and_then(|record| container::write(path, &record, &blobs));
        written.map_err(|source| ProgramError { path: path.display().to_string(), source })
    }

    /// The model, to be run in any shapes; tier, threads, memory and observer are those of a compiler.
    pub fn model_with(&self, compiler: &Compiler, origin: impl Into<String>) -> DynamicModel {
        let origin = origin.into();
        let compiler = self.compiler(compiler).share_weights();
        let calibrated = self.info.calibrated.clone();
        let recipe = Recipe::new(compiler, self.model.clone(), origin.clone(), calibrated);
        DynamicModel::with(self.model.clone(), origin, Engine::Jit(Arc::new(recipe)), false)
    }

    /// The program for the shapes that a compiler has bound.
    ///
    /// # Errors
    /// Where they do not fit the model, or the model's shapes depend on more than them.
    pub fn program(&self, compiler: &Compiler, origin: &str) -> Result<Program, Error> {
        let compiler = self.compiler(compiler);
        let failed = |e| Error::Import { path: origin.into(), source: Box::new(e) };
        let graph = self.model.graph(compiler.bindings()).map_err(failed)?;
        let prepared = compiler.prepare(graph)?;
        compiler.lower(&prepared, self.info.calibrated.as_ref())
    }

    /// The compiler with what is the model's own business as it was when this was made.
    fn compiler(&self, compiler: &Compiler) -> Compiler {
        let DynamicInfo { precision, requant, weights, weight_bits, pins, preprocess, statistics, .. } =
            self.info.clone();
        let mut compiler = compiler.clone().precision(precision).weights(weights).weight_bits(weight_bits);
        compiler = compiler.reestimate_batch_norms(false);
        compiler = statistics.into_iter().fold(compiler, Compiler::batch_norm_statistics);
        compiler = requant.into_iter().fold(compiler, Compiler::requant);
        compiler = pins.into_iter().fold(compiler, |c, (node, device)| c.pin(node, device));
        compiler.preprocess(preprocess)
    }
}

impl Compiler {
    /// Reads an ONNX file as a program whose shapes stay open, and finds the ranges of its values on samples, in the shapes
    /// that these have. Shapes that are bound are those of noise, where there are no samples.
    ///
    /// # Errors
    /// Where the file is not a model, or samples do not fit it.
    pub fn dynamic_program(&self, path: &Path) -> Result<DynamicProgram, Error> {
        let origin = path.display().to_string();
        let failed = |e| Error::Import { path: origin.clone(), source: Box::new(e) };
        let packed = onnx::Packed::of_file(path, self.memory_limit()).map_err(failed)?;
        let model = Arc::new(packed.model(self.memory_limit()).map_err(failed)?);
        let recipe = Recipe::new(self.clone(), model.clone(), origin.clone(), None);
        let statistics = recipe.compiler()?.0.options.statistics.as_deref().cloned();
        let calibrated = match self.options.precision.is_calibrated() {
            false => None,
            true => Some((*recipe.calibrated()?.0).clone()),
        };
        let info = DynamicInfo {
            qcc: env!("CARGO_PKG_VERSION").into(),
            precision: self.options.precision,
            requant: self.requant,
            weights: self.options.weights,
            weight_bits: self.options.weight_bits,
            pins: self.options.pins.clone(),
            preprocess: self.preprocess.clone(),
            statistics,
            calibrated,
        };
        Ok(DynamicProgram { packed, model, info })
    }
}
