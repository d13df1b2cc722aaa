//! Programs: what a `.qcc` file holds.

use crate::{
    DynamicInfo, Preprocess, Tuning,
    container::{self, ContainerError, Contents, Source},
};
use bytes::Bytes;
use qcc_codegen::Release;
use qcc_ir::{DType, Graph, GraphRecord, Shape, Stage, Tensor, numerics::RequantMode};
use qcc_passes::{Calibrators, Finding, Precision, Repairs, WeightBits};
use serde::{Deserialize, Serialize};
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// A model after the passes: quantized, laid out and placed, but not yet machine code. It runs on every tier.
#[derive(Clone)]
pub struct Program {
    graph: Graph,
    info: ProgramInfo,
    /// By tier.
    tunings: Vec<Tuning>,
    /// The file that the constants are mapped from.
    source: Option<Source>,
    times: Option<FileTimes>,
}

/// Times of reading a `.qcc` file, which follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileTimes {
    /// Mapping it and comparing its checksums, on all threads.
    pub check: Duration,
    /// Making the graph of its record, with all types inferred anew.
    pub graph: Duration,
    /// Verifying the graph.
    pub verify: Duration,
}

/// How a program was made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Version of the qcc that made it.
    pub qcc: String,
    /// What it computes with.
    pub precision: Precision,
    /// The requantization that was asked for; means nothing without integers.
    pub requant: RequantMode,
    /// Bits of weights that were quantized; means nothing without integers, nor of weights that the model brought as codes.
    pub weight_bits: WeightBits,
    /// Where the ranges of activations come from; `None` for float.
    pub calibration: Option<Calibration>,
    /// How images become inputs, so that who runs it need not say it again.
    pub preprocess: Preprocess,
    /// For a program that takes pixels and does the preprocessing's arithmetic itself, how it does it.
    pub pixels: Option<Pixels>,
    /// Number of batch norms whose statistics were recomputed from samples.
    pub reestimated: usize,
    /// What looks wrong with the model or with its samples.
    pub findings: Vec<Finding>,
    /// What the passes did and declined, as text.
    pub report: String,
    /// Every op with its device and the reason for it, as text.
    pub plan: String,
}

/// Where the ranges of activations come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Calibration {
    /// File, folder, or what else it was.
    pub origin: String,
    /// Number of samples.
    pub samples: u64,
    /// How ranges were to be chosen.
    pub calibrator: Calibrators,
    /// Whether the samples were noise: good for timing, worth nothing for accuracy, unless `batch_norms` stood in for data.
    pub synthetic: bool,
    /// Number of batch norms whose statistics stood in for data; 0 where there was data, or nothing to stand in.
    pub batch_norms: usize,
    /// What was repaired with the help of the samples.
    pub repairs: Repairs,
    /// What was measured to choose among calibrators and repairs; `None` where nothing was left to choose.
    pub measured: Option<Measurement>,
}

/// What was measured to choose among calibrators and repairs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// Number of samples on which errors were measured.
    pub samples: usize,
    /// Number of samples of which ranges were made to measure them; others than these, unless there are too few.
    pub fitted: usize,
    /// In the order in which they were tried.
    pub attempts: Vec<Measured>,
    /// The calibrators of the attempt of the least error.
    pub calibrators: Calibrators,
    /// Its repairs.
    pub repairs: Repairs,
}

/// The error of a network that was quantized in one way.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The calibrators, such as `mse but for 3 values`.
    pub calibrators: String,
    /// The repairs.
    pub repairs: Repairs,
    /// Signal-to-noise ratio of its results (their mean, of several) against float, in dB: the mean over samples, so that it is that
    /// of a typical one; 300 where they are equal.
    pub sqnr_db: f64,
}

/// How a program that takes pixels (u8, channels last) normalises them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Pixels {
    /// By an op of its own, to the same bits as [`Preprocess`].
    Normalized,
    /// Not at all: on the grid of the input they are the codes to which images quantize that were normalised before.
    Codes,
    /// In the weights and bias of the first convolution, which is not exact.
    Folded {
        /// How far results are from those of images that were normalised before, where that was measured.
        difference: Option<Difference>,
    },
}

/// How far two programs' outputs are apart.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Difference {
    /// Number of samples compared.
    pub samples: usize,
    /// Share of rows of the first output whose highest element is in the same place.
    pub agreement: f64,
    /// Largest difference of two elements of a float output.
    pub largest: f64,
    /// Largest magnitude of an element, for comparison.
    pub magnitude: f64,
}

/// Why a `.qcc` file cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[error("`{path}`: {source}")]
pub struct ProgramError {
    /// The file.
    pub path: String,
    /// What is wrong.
    pub source: ContainerError,
}

/// What stands in the record of a file.
#[derive(Serialize, Deserialize)]
pub(crate) enum Record {
    Placed(Box<Placed>),
    /// The blobs are the message of an ONNX model, and its tensors.
    Dynamic(Box<DynamicInfo>),
}

/// A [`Program`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Placed {
    info: ProgramInfo,
    graph: GraphRecord,
    tunings: Vec<Tuning>,
    /// Types of the blobs, which hold the graph's constants.
    blobs: Vec<(DType, Shape)>,
}

impl Record {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, ContainerError> {
        postcard::to_allocvec(self).map_err(|e| ContainerError::Malformed(e.to_string()))
    }
}

/// The record of a file.
pub(crate) fn record(contents: &Contents) -> Result<Record, ContainerError> {
    let malformed = |e: postcard::Error| ContainerError::Malformed(e.to_string());
    let (record, rest) = postcard::take_from_bytes(&contents.record).map_err(malformed)?;
    match rest.len() {
        0 => Ok(record),
        n => Err(ContainerError::Malformed(format!("{n} bytes after the record"))),
    }
}

impl Program {
    pub(crate) fn new(graph: Graph, info: ProgramInfo) -> Program {
        Program { graph, info, tunings: Vec::new(), source: None, times: None }
    }

    /// The program with these tilings for their tier, and no others for it.
    pub(crate) fn with_tuning(mut self, tuning: Tuning) -> Program {
        self.tunings.retain(|t| t.tier != tuning.tier);
        if !tuning.tilings.is_empty() {
            self.tunings.push(tuning);
            self.tunings.sort_by(|a, b| a.tier.cmp(&b.tier));
        }
        self
    }

    /// What [`tune`](crate::tune) found, by the name of the tier.
    pub fn tunings(&self) -> &[Tuning] {
        &self.tunings
    }

    /// What reading it from a file took; `None` where it is not from one.
    pub fn file_times(&self) -> Option<FileTimes> {
        self.times
    }

    /// Whom to tell of constants that have been packed; `None` where their memory cannot be given back.
    pub(crate) fn release(&self) -> Option<Release> {
        let source = self.source.clone()?;
        Some(Release::new(move |bytes| source.give_back(bytes)))
    }

    /// The graph, at `Stage::Placed`.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// How it was made.
    pub fn info(&self) -> &ProgramInfo {
        &self.info
    }

    /// The program with another account of its input.
    pub(crate) fn with_pixels(mut self, pixels: Pixels) -> Program {
        self.info.pixels = Some(pixels);
        self
    }

    /// Writes a `.qcc` file, in one step: an existing file is replaced as a whole or stays as it is.
    ///
    /// # Errors
    /// Where the folder or the disk does not take it.
    pub fn save(&self, path: &Path) -> Result<(), ProgramError> {
        let written = self.encode().and_then(|(record, blobs)| container::write(path, &record, &blobs));
        written.map_err(|source| ProgramError { path: path.display().to_string(), source })
    }

    fn encode(&self) -> Result<(Vec<u8>, Vec<Bytes>), ContainerError> {
        let (graph, tensors) = self.graph.to_record();
        let types = tensors.iter().map(|t| (t.dtype(), t.shape().clone())).collect();
        let placed = Placed { info: self.info.clone(), graph, tunings: self.tunings.clone(), blobs: types };
        Ok((Record::Placed(Box::new(placed)).encode()?, tensors.iter().map(|t| t.bytes().clone()).collect()))
    }

    /// Maps a `.qcc` file. Weights are used where they are mapped. The file must not be shortened or written to in
    /// place while the program is in use; replacing it (as [`save`](Self::save) does) is safe.
    ///
    /// # Errors
    /// Where the file is not a `.qcc` file of this version, or is damaged in any way.
    pub fn load(path: &Path) -> Result<Program, ProgramError> {
        let failed = |source| ProgramError { path: path.display().to_string(), source };
        let start = Instant::now();
        let contents = container::open(path).map_err(failed)?;
        Program::read(contents, start).map_err(failed)
    }

    /// The program of a file that was opened at `start`.
    pub(crate) fn read(contents: Contents, start: Instant) -> Result<Program, ContainerError> {
        let check = start.elapsed();
        let (program, verify) = Program::of(contents)?;
        let graph = start.elapsed() - check - verify;
        Ok(Program { times: Some(FileTimes { check, graph, verify }), ..program })
    }

    /// The program, and what verifying its graph took.
    fn of(contents: Contents) -> Result<(Program, Duration), ContainerError> {
        let malformed = |e: &dyn std::fmt::Display| ContainerError::Malformed(e.to_string());
        let Record::Placed(mut record) = record(&contents)? else {
            return Err(ContainerError::Dynamic);
        };
        if record.blobs.len() != contents.blobs.len() {
            let why = format!("{} types for {} blobs", record.blobs.len(), contents.blobs.len());
            return Err(malformed(&why));
        }
        let typed = std::mem::take(&mut record.blobs).into_iter().zip(contents.blobs);
        let tensors = typed.map(|((dtype, shape), bytes)| Tensor::from_bytes(dtype, shape, bytes));
        let tensors = tensors.collect::<Result<Vec<_>, _>>().map_err(|e| malformed(&e))?;
        let graph = Graph::from_record(record.graph, &tensors).map_err(|e| malformed(&e))?;
        if graph.stage != Stage::Placed {
            return Err(malformed(&format!("a graph at stage {}", graph.stage)));
        }
        let start = Instant::now();
        qcc_ir::verify(&graph).map_err(|e| malformed(&e))?;
        let verify = start.elapsed();
        record.tunings.iter().try_for_each(Tuning::check).map_err(|e| malformed(&e))?;
        let Placed { info, tunings, .. } = *record;
        Ok((Program { graph, info, tunings, source: contents.source, times: None }, verify))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compiler, Session, Tier, bundled, choose_tier};

    fn program() -> Program {
        let compiler = Compiler::new()
            .calibration(bundled::calibration().unwrap().limit(8))
            .preprocess(bundled::preprocess());
        compiler.program_of_graph(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap()
    }

    fn logits(program: &Program) -> Vec<f32> {
        let model = program.jit(&crate::JitOptions::new(choose_tier(None).unwrap())).unwrap();
        let feed = bundled::test_images().unwrap().bind(model.inputs(), &bundled::preprocess()).unwrap();
        let batch = feed.batch(0).unwrap();
        Session::new(&model).run(&[(&batch[0]).into()]).unwrap()[0].to_f32().unwrap()
    }

    #[test]
    fn a_program_is_the_same_after_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcc");
        let program = program();
        program.save(&path).unwrap();
        let loaded = Program::load(&path).unwrap();
        assert_eq!(loaded.info(), program.info());
        assert_eq!(qcc_ir::text::print(loaded.graph()), qcc_ir::text::print(program.graph()));
        assert_eq!(logits(&loaded), logits(&program));
        let again = dir.path().join("b.qcc");
        loaded.save(&again).unwrap();
        assert!(std::fs::read(path).unwrap() == std::fs::read(again).unwrap(), "files differ");
    }

    #[test]
    fn a_record_that_lies_behind_right_checksums_is_an_error_or_a_sound_program() {
        let (record, blobs) = program().encode().unwrap();
        let mut refused = 0;
        for i in 0..400 {
            let mut record = record.clone();
            // A step that shares no factor with the record's parts, so that all of them are hit.
            let at = i * 7919 % record.len();
            record[at] ^= 1 << (i % 8);
            let contents = Contents { record: record.into(), blobs: blobs.clone(), source: None };
            match Program::of(contents) {
                Ok((program, _)) => drop(program.jit(&crate::JitOptions::new(choose_tier(None).unwrap()))),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 0, "no change of the record was noticed");
        for wrong in [vec![], blobs[1..].to_vec(), vec![Bytes::new(); blobs.len()]] {
            let contents = Contents { record: record.clone().into(), blobs: wrong, source: None };
            assert!(matches!(Program::of(contents), Err(ContainerError::Malformed(_))));
        }
        let longer = [&record[..], &[0]].concat();
        let contents = Contents { record: longer.into(), blobs, source: None };
        assert!(Program::of(contents).is_err());
    }

    #[test]
    fn a_tuned_program_gives_the_same_bits_on_every_tier_and_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tuned.qcc");
        let program = program();
        for tier in Tier::available() {
            let jit = crate::JitOptions::new(tier);
            let run = |program: &Program| {
                let model = program.jit(&jit).unwrap();
                let feed =
                    bundled::test_images().unwrap().bind(model.inputs(), &bundled::preprocess()).unwrap();
                Session::new(&model).run(&[(&feed.batch(0).unwrap()[0]).into()]).unwrap()
            };
            let expected = run(&program);
            let model = program.jit(&jit).unwrap();
            // The last candidate of every layer: what a measurement might find.
            let last =
                model.steps().iter().filter_map(|s| Some((s.name.clone(), s.tilings.last()?.to_string())));
            let tuning = Tuning { tier: tier.name.into(), tilings: last.collect() };
            assert!(!tuning.tilings.is_empty());
            let tuned = program.clone().with_tuning(tuning);
            let differs =
                tuned.jit(&jit).unwrap().steps().iter().zip(model.steps()).any(|(a, b)| a.kernel != b.kernel);
            assert!(differs, "{tier}: no layer was cut in another way");
            assert_eq!(run(&tuned), expected, "{tier}");
            tuned.save(&path).unwrap();
            let loaded = Program::load(&path).unwrap();
            assert_eq!(loaded.tunings(), tuned.tunings());
            assert_eq!(run(&loaded), expected, "{tier}, loaded");
        }
    }

    #[test]
    fn tilings_of_a_file_are_not_trusted() {
        let program = program();
        let expected = logits(&program);
        let name = &program.jit(&crate::JitOptions::new(choose_tier(None).unwrap())).unwrap().steps()[1]
            .name
            .clone();
        for (layer, tiling) in [
            (name.as_str(), "1000000x1000000x1000000/panels"),
            (name.as_str(), "0x0x0/pixels"),
            ("no such layer", "1x1x16/panels"),
        ] {
            let tilings = [(layer.to_string(), tiling.to_string())].into();
            let tuned =
                program.clone().with_tuning(Tuning { tier: choose_tier(None).unwrap().name.into(), tilings });
            let (record, blobs) = tuned.encode().unwrap();
            let (read, _) = Program::of(Contents { record: record.into(), blobs, source: None }).unwrap();
            assert_eq!(logits(&read), expected, "{layer} {tiling}");
        }
        let tilings = [(name.clone(), "two by two".to_string())].into();
        let broken = program.with_tuning(Tuning { tier: "avx2".into(), tilings });
        let (record, blobs) = broken.encode().unwrap();
        let refused = Program::of(Contents { record: record.into(), blobs, source: None }).err().unwrap();
        assert!(refused.to_string().contains("`two by two` is no tiling"), "{refused}");
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broken.qcc");
        assert!(Program::load(&path).err().unwrap().to_string().contains("broken.qcc"));
        program().save(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let text = Program::load(&path).err().unwrap().to_string();
        assert!(text.contains("broken.qcc") && text.contains("cut off"), "{text}");
    }
}
