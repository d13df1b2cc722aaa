//! Compiles ONNX models to machine code and runs them.
//!
//! A [`Compiler`] makes a [`Model`] of a file; a [`Session`] runs it. Models are immutable and shared by threads, each
//! of which has a session of its own.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use ndarray::{Array2, Array4};
//! use qcc_runtime::{Compiler, Precision, Session, bundled};
//!
//! // `compile_file` takes a path; this network is part of the library.
//! let model = Compiler::new().precision(Precision::Float).compile_onnx(bundled::FASHION_RESNET8)?;
//! println!("{} takes {}", model.inputs()[0].name, model.inputs()[0].ty);
//!
//! let image = Array4::<f32>::zeros((1, 1, 28, 28));
//! let mut session = Session::new(&model);
//! let outputs = session.run(&[(&image).into()])?;
//! let logits = outputs[0].view::<f32>()?;
//! assert_eq!(logits.shape(), [1, 10]);
//!
//! // Into memory of the caller, without any allocation:
//! let mut logits = Array2::<f32>::zeros((1, 10));
//! session.run_into(&[(&image).into()], &mut [(&mut logits).try_into()?])?;
//!
//! // Where the time goes:
//! session.start_profile();
//! session.run(&[(&image).into()])?;
//! for layer in session.profile() {
//!     println!("{:20} {:?}", layer.name, layer.time);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A quantized model can be kept in a `.qcc` file, which loads in milliseconds and runs on every CPU:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use qcc_runtime::{Compiler, bundled};
//! let compiler = Compiler::new()
//!     .calibration(bundled::calibration()?.limit(64))
//!     .preprocess(bundled::preprocess());
//! let program = compiler.program_of_graph(compiler.import_onnx(bundled::FASHION_RESNET8)?)?;
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("fashion.qcc");
//! program.save(&path)?;
//! let model = Compiler::new().compile_file(&path)?;
//! # assert_eq!(model.outputs().len(), 1);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

mod bench;
pub mod bundled;
mod compiler;
pub mod conformance;
mod container;
mod data;
mod dynamic;
mod error;
mod eval;
pub mod experiment;
mod layers;
mod load;
mod memory;
mod mixed;
mod model;
pub mod observe;
mod program;
mod quantile;
mod roofline;
mod sqnr;
mod threads;
mod tier;
mod tune;
mod view;
pub mod workbench;
pub mod zoo;

pub use bench::{BenchReport, Latency, Run, bench, bench_dynamic};
pub use compiler::{Calibrated, Compiler, Event, IMPORT, Prepared, graph_inputs};
pub use container::{ContainerError, is_program};
pub use data::{
    DataError, Feed, Preprocess, Samples, parse_npz, read_arrays, read_npy, read_npz, read_safetensors,
    write_npy,
};
pub use dynamic::{Backend, DynamicInfo, DynamicModel, DynamicProgram, DynamicRun, ProgramFile, ValueRun};
pub use error::Error;
pub use eval::{Evaluation, Score, evaluate, top};
pub use layers::{Layer, Loss, Losses, Traffic};
pub use load::LoadPhase;
pub use memory::machine_memory;
pub use mixed::{
    Attempt, Goal, LayerPrecision, LayerSensitivity, Measure, MixedPrecision, Policy, PolicyError,
    Sensitivity, Target, Timing,
};
pub use model::{BindError, JitOptions, LayerTime, Memory, Model, Session, TensorInfo};
pub use program::{
    Calibration, Difference, FileTimes, Measured, Measurement, Pixels, Program, ProgramError, ProgramInfo,
};
pub use qcc_codegen::{CodegenError, CompileTimes, ListingKind, SharedWeights, TIERS, Tier, Tiling, Work};
pub use qcc_ir as ir;
pub use qcc_passes as passes;
pub use qcc_passes::{
    Calibrator, Calibrators, Choice, Finding, Level, Precision, RepairChoice, Repairs, Rule, Subject,
    UnknownRule, WeightBits,
};
pub use roofline::{Bound, Host, MemoryLevel, Peaks};
pub use sqnr::SquaredError;
pub use threads::{Threads, ThreadsError};
pub use tier::{TIER_VARIABLE, TierError, choose_tier};
pub use tune::{Change, TuneReport, Tuning, tune};
pub use view::{LayoutError, TensorView, TensorViewMut};
