//! The command line.

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use qcc_runtime::{
    Calibrator, Choice, Precision, RepairChoice, Repairs, Rule, WeightBits,
    ir::{Device, numerics::RequantMode},
    workbench, zoo,
};
use std::path::PathBuf;

/// Compiles neural networks from ONNX to machine code for x86 CPUs: quantized to 8-bit integers, or in float.
#[derive(Parser, Debug)]
#[command(name = "qcc", version, propagate_version = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// No progress bars; twice: no warnings either.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) quiet: u8,
}

const EXAMPLES: &str = "\
Examples:
  qcc bench
      float against fake-quant against int8, on networks that come with qcc
  qcc compile net.onnx --calibrate images/ --mean 123.7,116.3,103.5 --std 58.4,57.1,57.4
      quantizes to net.qcc, with ranges from the images in a folder
  qcc run net.qcc --input cat.jpg --top 5
      the five best classes of an image
  qcc eval net.onnx --calibrate images/ --every 5 --images images/
      accuracy of float and int8, where file names are class indices: 281.jpg, 281_b.jpg
  qcc lint net.onnx --calibrate images/ --mean 127 --std 128
      what looks wrong with the model or the images
  qcc report net.onnx --calibrate images/ --mean 127 --std 128 -o report.html
      a page that tells which layer loses accuracy, where the time goes, and what to try
  qcc inspect net.onnx
      inputs, outputs, ops, sizes, and where each op will run

Exit codes: 0 done, 1 bad model or data, 2 bad usage.
The environment variable QCC_ISA caps the instructions that code is generated for, as --isa does.";

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Compile a model to a .qcc file, or show what it becomes on the way.
    Compile(Compile),
    /// Run a model on arrays or images.
    Run(Run),
    /// Measure accuracy on labelled images, and how well int8 agrees with float.
    Eval(Eval),
    /// Time float, fake-quant and int8 next to each other. Without a model: the founding experiment, on bundled networks.
    Bench(Bench),
    /// A page about what quantization does to a model and its layers, what it gains, and what to try next.
    Report(Box<Report>),
    /// Show inputs, outputs, ops, sizes and placement of a model.
    Inspect(Inspect),
    /// Look for what is wrong with a model or its samples, without compiling it.
    Lint(Lint),
    /// Tell at which tensor two models, two precisions of one, or a model and stored tensors part.
    Diff(Diff),
    /// List what rounding costs, layer by layer: the error of the results if one layer alone is int8, and if it alone is float.
    Sensitivity(Sensitivity),
    /// Check models against reference data: ONNX's backend tests, or a model with inputs and outputs of your own.
    Test(Test),
    /// Write a well-known network with random weights as ONNX, to measure without a download.
    Zoo(Zoo),
}

/// What applies wherever an ONNX model is compiled. A .qcc file has most of this built in.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Compilation (of .onnx)")]
pub(crate) struct CompileOptions {
    /// Shape of an input, such as image=1x3x224x224. Symbolic batch sizes are 1 where nothing else is said.
    #[arg(long, value_name = "INPUT=DIMS", value_parser = parse_shape)]
    pub(crate) shape: Vec<(String, Vec<usize>)>,

    /// Length of a symbolic dimension, by its name in the model.
    #[arg(long, value_name = "SYMBOL=LENGTH", value_parser = parse_dimension)]
    pub(crate) dim: Vec<(String, usize)>,

    /// Scales for each output channel of weights, or one for the tensor.
    #[arg(long, value_name = "GRID", default_value = "per-channel", value_parser = ["per-channel", "per-tensor"])]
    pub(crate) weights: String,

    /// Bits of quantized weights. 7, which ONNX Runtime calls `reduce_range`, is for CPUs without VNNI: less accurate, and
    /// faster there, as two products of such weights have a sum of 16 bits.
    #[arg(long, value_name = "BITS", default_value = "8", value_parser = weight_bits)]
    pub(crate) weight_bits: WeightBits,

    /// Run a node on a device: int8-jit, float-jit or interpreter.
    #[arg(long, value_name = "NODE=DEVICE", value_parser = parse_pin)]
    pub(crate) pin: Vec<(String, Device)>,

    /// A file that says which layers stay float, as --min-sqnr, --max-drop and --objective latency write it, or by hand:
    /// TOML with a table `layers` of NAME = "float" or "int8"; names are those of the plan.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,

    /// Print the graph after a pass: `import`, the name of a pass, or `all`.
    #[arg(long, value_name = "PASS")]
    pub(crate) print_after: Vec<String>,

    /// Print what each pass did, and what it declined and why.
    #[arg(long)]
    pub(crate) explain: bool,

    /// Do not tell what this rule finds; docs/lint.md has the rules. May be repeated.
    #[arg(long, value_name = "RULE", value_parser = rule())]
    pub(crate) allow: Vec<Rule>,

    #[command(flatten)]
    pub(crate) calibration: CalibrationOptions,

    #[command(flatten)]
    pub(crate) memory: MemoryOption,
}

/// Where ranges of activations come from.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Calibration (of fake-quant and int8)")]
pub(crate) struct CalibrationOptions {
    /// Samples to find the ranges of activations with: FILE.npy, FILE.npz or FILE.safetensors (f32 [N, ...] as the model takes
    /// it, or u8 images, preprocessed as below), a folder of .jpg, .png or .bmp images, or a folder of such files with one
    /// sample each. A few hundred typical inputs are good.
    #[arg(long, value_name = "PATH")]
    pub(crate) calibrate: Option<PathBuf>,

    /// How ranges are chosen: `min-max`; `moving-average[:C]` of the extremes of samples, of which a new one weighs C (0.01);
    /// `percentile[:P]` (99.99), which leaves out 100 - P percent on either side; `entropy` (least information lost) or `mse`
    /// (least squared error) of rounding and clipping; or `auto`, which quantizes with several, measures the error against
    /// float, and may mix them. TENSOR=HOW is for one value, by its name in the plan, and may be repeated. Default: min-max.
    #[arg(long, value_name = "[TENSOR=]HOW", value_parser = calibrator)]
    pub(crate) calibrator: Vec<CalibratorFor>,

    /// Threads that calibration samples are run on; 0 for one on each core. Ranges do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) calibration_threads: usize,

    /// What to repair of the quantized network with the help of the samples, one or more of: `equalize`, which brings channels
    /// that share a grid to similar ranges (`equalize:S`: with a strength from 0 to 1); `scales`, by which weights have the
    /// least squared error; `bias`, which lets biases take the mean error of weights; `rounding`, which rounds weights so
    /// that their errors cancel; `means`, which lets biases take the mean error that is seen in each layer of the quantized network;
    /// `all`; `none`; or `auto`, which tries some on samples held out of the ranges and takes the best.
    #[arg(long, value_name = "WHAT", default_value = "none", value_parser = repairs)]
    pub(crate) repair: RepairChoice,

    /// Recompute the statistics of batch norms from the samples, in the order of the network: for models whose running
    /// statistics were never updated, or are of other data. Also for float.
    #[arg(long)]
    pub(crate) reestimate_bn: bool,

    /// Take the calibration samples 0, K, 2K... only.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = at_least_one)]
    pub(crate) every: usize,

    /// Take at most N calibration samples.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) samples: Option<usize>,
}

/// How images become inputs.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Images")]
pub(crate) struct ImageOptions {
    /// Mean of the channels, in pixel units (0 to 255) and in the order in which the model takes them: a pixel x goes in
    /// as (x - mean) / std. One number for all channels, or one for each. Default 0.
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', allow_hyphen_values = true)]
    pub(crate) mean: Vec<f32>,

    /// Standard deviation of the channels, likewise. Default 1.
    #[arg(long, value_name = "R,G,B", value_delimiter = ',')]
    pub(crate) std: Vec<f32>,

    /// Height and width of images, which must be the model's. Images are cropped about their centre if their shorter
    /// side is between this and 1/0.875 of this; larger ones are first reduced to 1/0.875 of it, smaller ones enlarged
    /// to it. Default: the model's input.
    #[arg(long, value_name = "HxW", value_parser = parse_size)]
    pub(crate) size: Option<(usize, usize)>,

    /// The model takes blue first.
    #[arg(long)]
    pub(crate) bgr: bool,

    /// Let the compiled model take pixels, u8 [N, H, W, C] with red first, and normalise them itself: an int8 model then
    /// reads the picture as it is. A .qcc file remembers it.
    #[arg(long)]
    pub(crate) image_input: bool,
}

/// What code is generated for.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Execution")]
pub(crate) struct TierOption {
    /// Best instructions to use: amx, avx512vnni, avxvnni, avx2, xmm-vnni or x86-64-v2. Default: the best of this CPU.
    #[arg(long, value_name = "TIER")]
    pub(crate) isa: Option<String>,
}

/// Memory of a model.
#[derive(Args, Debug, Clone, Copy)]
#[command(next_help_heading = "Execution")]
pub(crate) struct MemoryOption {
    /// The most memory that a model may take, such as 500M or 8G: its file, its weights, and what a run computes. What would
    /// take more is refused before it does. Default: what the machine has available.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) max_memory: Option<u64>,
}

/// Threads of a run.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Execution")]
pub(crate) struct ThreadsOption {
    /// Threads; 0 for one on each core. Results do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) threads: usize,
}

/// One requantization mode.
#[derive(Args, Debug, Clone)]
pub(crate) struct RequantOption {
    /// How int8 scales its accumulators back to 8 bits: integer multipliers and shifts (`shift`, `tflite`, `q15`), shifts
    /// alone (`pow2`), or float multipliers (`float`). Default: q15; float where the model is quantized already, as it then
    /// computes what its author saw.
    #[arg(long, value_name = "MODE", value_parser = requant())]
    pub(crate) requant: Option<RequantMode>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  qcc compile net.onnx --calibrate samples.npy
  qcc compile net.onnx --shape input=8x3x224x224 --calibrate images/ --mean 127 --std 128 -o net-batch8.qcc
  qcc compile net.onnx --calibrate samples.npy --emit onnx -o net.qdq.onnx
      the quantized network as ONNX with QuantizeLinear and DequantizeLinear
  qcc compile net.onnx --precision float --emit onnx -o net.folded.onnx
      the float network, its batch norms folded and its activations fused
  qcc compile net.onnx --calibrate images/ --image-input --mean 127 --std 128
      a model that takes u8 pixels and normalises them itself
  qcc compile net.onnx --calibrate images/ --min-sqnr 30
      the fewest float layers that reach 30 dB; which they are is written to net.policy.toml
  qcc compile net.onnx --calibrate images/ --policy net.policy.toml
      those layers float, without a search
  qcc compile net.qcc --tune -o net.tuned.qcc
      the fastest tilings for this CPU, by measurement
  qcc compile net.onnx --explain --print-after fold_batch_norm")]
pub(crate) struct Compile {
    /// The model: .onnx, or .qcc to look into one.
    pub(crate) model: PathBuf,

    /// The file to write; `-` for standard output. Default: the model's name with another suffix for .qcc and .onnx,
    /// standard output for text.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// What to compute with. int8-dynamic quantizes activations when the model runs, row by row, in matrix products with
    /// weights: it needs no calibration.
    #[arg(long, value_name = "PRECISION", default_value = "int8", value_parser = precision())]
    pub(crate) precision: Precision,

    #[command(flatten)]
    pub(crate) requant: RequantOption,

    /// What to write.
    #[arg(long, value_name = "FORM", default_value = "qcc")]
    pub(crate) emit: Emit,

    /// Keep the shapes open: the .qcc file runs in whatever shapes come, and compiles for each when it first comes. Ranges are
    /// found here, on samples in the shapes that they have.
    #[arg(long)]
    pub(crate) dynamic: bool,

    /// Time the ways to cut each dense layer into tiles on this CPU, and keep those that are faster than the built-in
    /// choice. They hold for this tier; results do not change.
    #[arg(long)]
    pub(crate) tune: bool,

    /// Seconds to spend on --tune.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, requires = "tune", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) tune_seconds: u64,

    /// With --emit onnx or qir: the graph after this pass, or `import` for the model as it was read.
    #[arg(long, value_name = "PASS")]
    pub(crate) stop_after: Option<String>,

    #[command(flatten)]
    pub(crate) mixed: MixedOptions,
    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) images: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
}

/// What layers stay float for.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Mixed precision (of int8)")]
pub(crate) struct MixedOptions {
    /// Keep the fewest layers float for which the results' signal-to-noise ratio against float is at least so many dB, on
    /// calibration samples that are held out of the ranges. Which layers these are goes into a policy file.
    #[arg(long, value_name = "DB", conflicts_with_all = ["max_drop", "policy"])]
    pub(crate) min_sqnr: Option<f64>,

    /// Keep the fewest layers float for which top-1 is at most so many points below float's, on the labelled samples of
    /// --validate.
    #[arg(
        long,
        value_name = "POINTS",
        allow_hyphen_values = true,
        requires = "validate",
        conflicts_with = "policy"
    )]
    pub(crate) max_drop: Option<f64>,

    /// Labelled samples for --max-drop: a folder of images whose names begin with the class index, or an .npz with `labels`.
    /// Take others than those for calibration.
    #[arg(long, value_name = "DIR|FILE", requires = "max_drop")]
    pub(crate) validate: Option<PathBuf>,

    /// `latency`: keep layers float that are slower in int8 on this CPU, by measurement.
    #[arg(long, value_name = "WHAT", value_parser = ["latency"], conflicts_with = "policy")]
    pub(crate) objective: Option<String>,

    /// Where to write the policy. Default: the name of the output with the suffix .policy.toml.
    #[arg(long, value_name = "FILE", conflicts_with = "policy")]
    pub(crate) save_policy: Option<PathBuf>,
}

/// What `compile` writes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Emit {
    /// The quantized model, ready to load.
    Qcc,
    /// ONNX: float models as folded and fused, quantized ones with QuantizeLinear and DequantizeLinear.
    Onnx,
    /// The graph in text form.
    Qir,
    /// The code before register allocation, of the functions that Cranelift compiles.
    Clif,
    /// The machine code, disassembled.
    Asm,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  qcc sensitivity net.onnx --calibrate images/ --mean 127 --std 128 --top 20")]
pub(crate) struct Sensitivity {
    /// The model: .onnx.
    pub(crate) model: PathBuf,

    /// Show the N most sensitive layers only.
    #[arg(long, value_name = "N")]
    pub(crate) top: Option<usize>,

    /// Write all of it as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) requant: RequantOption,
    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) images: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  qcc run net.onnx --input x=x.npy --output-dir out/
  qcc run net.qcc --input cat.jpg --top 5
  qcc run net.onnx --zeros --precision int8 --calibrate samples.npy")]
pub(crate) struct Run {
    /// The model: .onnx or .qcc.
    pub(crate) model: PathBuf,

    /// An input: INPUT=FILE, or FILE alone for a model of one input. Files are .npy, .npz, .safetensors, images, .pb as ONNX's
    /// tests have them, or .txt with a text a line. A sequence takes a file for each element; what may be left out needs none.
    #[arg(long, value_name = "[INPUT=]FILE", conflicts_with = "zeros")]
    pub(crate) input: Vec<String>,

    /// Feed zeros to all inputs.
    #[arg(long)]
    pub(crate) zeros: bool,

    /// Write every output to DIR/OUTPUT.npy.
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,

    /// Print the K highest values of each row of the first output, with their indices.
    #[arg(long, value_name = "K")]
    pub(crate) top: Option<usize>,

    /// Print where the time from the file to the first output goes.
    #[arg(long)]
    pub(crate) timings: bool,

    /// What an .onnx computes with.
    #[arg(long, value_name = "PRECISION", default_value = "float", value_parser = precision())]
    pub(crate) precision: Precision,

    #[command(flatten)]
    pub(crate) requant: RequantOption,
    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) images: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
    #[command(flatten)]
    pub(crate) threads: ThreadsOption,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  qcc eval net.onnx --images val/ --mean 127 --std 128 --calibrate val/ --every 5
      images val/0.jpg, val/1.jpg...: names begin with the class index
  qcc eval net.onnx --images test.npz --calibrate train.npz --requant all
      test.npz holds `images` and `labels`; int8 in every requantization mode
  qcc eval net.qcc --images val/ --labels labels.txt --reference net.onnx")]
pub(crate) struct Eval {
    /// The model: .onnx (evaluated in float too, for comparison), or .qcc.
    pub(crate) model: PathBuf,

    /// A folder of images, or an .npz or .safetensors with `images` and `labels`, or an .npy.
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) images: PathBuf,

    /// Class indices: text with one a line, .npy, or .npz with `labels`; in the order of the samples (images: of their
    /// names). Default: `labels` of the .npz, or the numbers that the names of the images begin with.
    #[arg(long, value_name = "FILE")]
    pub(crate) labels: Option<PathBuf>,

    /// Evaluate the first N samples only.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,

    /// The float .onnx model that a .qcc is compared with.
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,

    /// What to compute with; float is always there for comparison.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "int8", value_parser = precision())]
    pub(crate) precision: Vec<Precision>,

    /// Requantization modes of int8: a list, or `all`. Default: q15; float where the model is quantized already.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = requant_or_all())]
    pub(crate) requant: Vec<Modes>,

    /// Write the scores as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) preprocess: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,

    /// Threads, which share the samples; 0 for one on each core. Results do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The page is one file that needs no network; --json writes the same facts. docs/report.md tells what each figure means.

Examples:
  qcc report net.onnx --calibrate train/ --images val/ --mean 127 --std 128 -o report.html --json report.json
      accuracy on labelled images, layers observed on some of them
  qcc report net.onnx --calibrate samples.npz -o report.html
      without labels: how far layers and results are from float
  qcc report net.onnx --precision int8-dynamic --calibrate tokens.npz -o report.html
      a transformer that is quantized when it runs; the samples are only to observe it
  qcc report --compare before.json after.json -o compare.html
      two runs side by side")]
pub(crate) struct Report {
    /// The model: .onnx. A .qcc file holds no float model to compare with.
    #[arg(required_unless_present = "compare")]
    pub(crate) model: Option<PathBuf>,

    /// The page to write. Default: the model's name with `.report.html`.
    #[arg(short, long, value_name = "FILE.html")]
    pub(crate) output: Option<PathBuf>,

    /// Write all facts as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Set two runs side by side, by the JSON of each.
    #[arg(long, value_names = ["BEFORE.json", "AFTER.json"], num_args = 2, conflicts_with = "model", requires = "output")]
    pub(crate) compare: Vec<PathBuf>,

    /// What accuracy is measured on, and layers are observed on: a folder of images, or an .npz or .safetensors with `images` and
    /// `labels`, or an .npy. Without it, layers are observed on the calibration samples.
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) images: Option<PathBuf>,

    /// Class indices: text with one a line, .npy, or .npz with `labels`. Default: `labels` of the .npz, or the numbers that the
    /// names of the images begin with.
    #[arg(long, value_name = "FILE", requires = "images")]
    pub(crate) labels: Option<PathBuf>,

    /// Evaluate the first N samples only.
    #[arg(long, value_name = "N", requires = "images", value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,

    /// Samples that layers are observed on, spread over all there are.
    #[arg(long, value_name = "N", default_value_t = workbench::SAMPLES, value_parser = at_least_one)]
    pub(crate) report_samples: usize,

    /// Timed runs of each precision.
    #[arg(long, value_name = "N", default_value_t = workbench::REPS, value_parser = at_least_one)]
    pub(crate) reps: usize,

    /// What the report is about; float is always there for comparison.
    #[arg(long, value_name = "PRECISION", default_value = "int8", value_parser = precision())]
    pub(crate) precision: Precision,

    #[command(flatten)]
    pub(crate) requant: RequantOption,
    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) preprocess: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
    #[command(flatten)]
    pub(crate) threads: ThreadsOption,
}

/// What runs the cases of `qcc test`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum TestBackend {
    /// Generated code, the default path.
    Jit,
    /// The reference interpreter.
    Interpreter,
}

impl std::fmt::Display for TestBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TestBackend::Jit => "jit",
            TestBackend::Interpreter => "interpreter",
        })
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
A case is a folder with model.onnx and folders test_data_set_0, test_data_set_1 and so on, which hold input_0.pb,
output_0.pb and so on. Inputs are given at run time. Number, element type and shape of outputs must be as expected; floats
must be within atol + rtol * |expected| (bf16: rtol of 2^-6 at least), all else must be equal.

Examples:
  qcc test onnx/backend/test/data/node
  qcc test my_model/ --backend jit,interpreter --json result.json")]
pub(crate) struct Test {
    /// Folders of cases, or with cases somewhere below.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) folders: Vec<PathBuf>,

    /// Only these cases: names, one a line, or a table with tabs between columns, of which `name` is one; columns `tier` and
    /// `group` are the groups of the scores.
    #[arg(long, value_name = "FILE")]
    pub(crate) filter: Option<PathBuf>,

    /// What runs them.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "jit")]
    pub(crate) backend: Vec<TestBackend>,

    /// Relative tolerance of floats.
    #[arg(long, value_name = "SHARE", default_value_t = 1e-3)]
    pub(crate) rtol: f64,

    /// Absolute tolerance of floats.
    #[arg(long, value_name = "DISTANCE", default_value_t = 1e-7)]
    pub(crate) atol: f64,

    /// Write every case with its reason as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) memory: MemoryOption,
    #[command(flatten)]
    pub(crate) tier: TierOption,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Columns: latency of one run (median and fastest); how many times faster than float; 10^9 multiply-accumulates a second
and their share of what this CPU reaches at best in the same arithmetic; the share of the time that requantization takes
(for fake-quant: rounding to grids); time from a .qcc file to the first run; memory at its peak beyond the process itself.

Columns of --layers: time (microseconds, and share of all); GMAC/s and their share of the peak; bytes of operands,
weights and results; multiply-accumulates for each of them; the least possible time, and whether arithmetic (MAC) or
memory sets it; the time lost above that; requantization, as a share of the layer. Times are medians of up to 25 runs of
their own, with the cost of reading the clock taken off. docs/benchmark.md tells how everything is measured.

Examples:
  qcc bench                                       the founding experiment
  qcc bench --isa avx2 --json experiment.json
  qcc bench net.onnx --shape input=1x3x224x224 --layers
  qcc bench net.qcc --threads 4 --reps 100 --layers=graph
  qcc bench net.onnx --input sentence.npz         on these inputs, of their shapes
  qcc bench --peaks                               arithmetic and bandwidth of this CPU, by tier")]
pub(crate) struct Bench {
    /// The model: .onnx or .qcc. Without one, the founding experiment runs.
    pub(crate) model: Option<PathBuf>,

    /// What to compute with.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "float,fake-quant,int8", value_parser = precision())]
    pub(crate) precision: Vec<Precision>,

    /// Requantization modes of int8: a list, or `all`. Default: q15; float where the model is quantized already. The
    /// founding experiment has all of them.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = requant_or_all())]
    pub(crate) requant: Vec<Modes>,

    /// An input, and with it its shape: INPUT=FILE, or FILE alone for a model of one input or an .npz of all. Default:
    /// noise.
    #[arg(long, value_name = "[INPUT=]FILE", requires = "model")]
    pub(crate) input: Vec<String>,

    /// Timed runs of each.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    pub(crate) reps: usize,

    /// Print every layer: its time, and what it loses against the least time that arithmetic and memory would allow.
    /// Sorted by what is lost, or in the order of the graph.
    #[arg(long, value_name = "ORDER", num_args = 0..=1, require_equals = true, default_missing_value = "lost")]
    pub(crate) layers: Option<LayerOrder>,

    /// Print what one core of this CPU reaches at best on each tier: arithmetic and reading memory.
    #[arg(long, conflicts_with_all = ["model", "layers", "isa"])]
    pub(crate) peaks: bool,

    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) images: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
    #[command(flatten)]
    pub(crate) threads: ThreadsOption,
}

/// How layers are sorted.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LayerOrder {
    /// Those that lose the most time first.
    Lost,
    /// As they run.
    Graph,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The model: .onnx or .qcc.
    pub(crate) model: PathBuf,

    /// The precision that the plan of an .onnx is made for.
    #[arg(long, value_name = "PRECISION", default_value = "int8", value_parser = precision())]
    pub(crate) precision: Precision,

    #[command(flatten)]
    pub(crate) requant: RequantOption,
    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) images: ImageOptions,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Exit code: 0, whatever is found; 1 where something of --deny is found, or where the model or data cannot be read.

Examples:
  qcc lint net.onnx
      the model alone: batch norms, weights
  qcc lint net.onnx --calibrate images/ --mean 127 --std 128
      and the samples: copies, normalisation, order of channels, whether batch norms get what they know
  qcc lint net.onnx --calibrate train/ --images val/ --mean 127 --std 128 --deny all
      and whether values keep to the ranges of the calibration samples on other ones
  qcc lint net.qcc
      what was found when it was compiled")]
pub(crate) struct Lint {
    /// The model: .onnx or .qcc.
    pub(crate) model: PathBuf,

    /// Other samples than those for calibration, on which values should keep to the ranges that calibration finds; of the forms
    /// that --calibrate takes.
    #[arg(long, value_name = "PATH")]
    pub(crate) images: Option<PathBuf>,

    /// Exit with 1 where this rule finds something; `all` for all of them, hints too. May be repeated.
    #[arg(long, value_name = "RULE", value_parser = rule_or_all())]
    pub(crate) deny: Vec<Denied>,

    /// Write what was found as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) preprocess: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Columns: the tensor, by its name in the model; its shape; the largest difference, and the largest magnitude for comparison; the
signal-to-noise ratio of the second side to the first; what it would be if the tensors that this one is computed of were equal
on both sides (what comes in here); and the cosine of the two.

Examples:
  qcc diff a.onnx b.onnx --input x=x.npy
      two models, in float: tensors of the same name
  qcc diff net.onnx --calibrate images/ --images images/ --mean 127 --std 128
      float and int8 of one model; --precision float,fake-quant or --precision int8,int8 --requant q15,shift
  qcc diff net.onnx stored.npz --input x=x.npy
      a model, and what another runtime made of the same input: docs/diff.md shows how to store it")]
pub(crate) struct Diff {
    /// A model (.onnx), in two precisions; or two models; or a model and tensors that another runtime has stored (.npz,
    /// .safetensors, or a .npy of the model's first output), by their names in the model.
    #[arg(required = true, num_args = 1..=2, value_name = "MODEL|FILE")]
    pub(crate) sides: Vec<PathBuf>,

    /// An input, and with it its shape: INPUT=FILE, or FILE alone for a model of one input or an .npz of all.
    #[arg(long, value_name = "[INPUT=]FILE", conflicts_with = "images")]
    pub(crate) input: Vec<String>,

    /// Samples to run, of the forms that --calibrate takes. Default, where there is no --input either: noise.
    #[arg(long, value_name = "PATH")]
    pub(crate) images: Option<PathBuf>,

    /// Run the first N samples only.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub(crate) limit: usize,

    /// What to compute with: one for both sides, or one for each. Default: float,int8 of one model, float otherwise.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = precision())]
    pub(crate) precision: Vec<Precision>,

    /// How int8 scales its accumulators back to 8 bits, likewise.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = requant())]
    pub(crate) requant: Vec<RequantMode>,

    /// The signal-to-noise ratio in dB below which tensors differ. Default: 60 between floats, 20 between two quantized sides, 15
    /// between a quantized one and float.
    #[arg(long, value_name = "DB", allow_hyphen_values = true)]
    pub(crate) threshold: Option<f64>,

    /// Exit with 1 where the sides part.
    #[arg(long)]
    pub(crate) check: bool,

    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) options: CompileOptions,
    #[command(flatten)]
    pub(crate) preprocess: ImageOptions,
    #[command(flatten)]
    pub(crate) tier: TierOption,
}

/// What `lint` fails for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Denied {
    All,
    One(Rule),
}

#[derive(Args, Debug)]
pub(crate) struct Zoo {
    /// The network.
    #[arg(value_parser = PossibleValuesParser::new(zoo::NAMES))]
    pub(crate) name: String,

    /// The file to write.
    #[arg(short, long, value_name = "FILE.onnx")]
    pub(crate) output: PathBuf,
}

/// One requantization mode or all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Modes {
    All,
    One(RequantMode),
}

impl Modes {
    /// The modes of a list, each once.
    pub(crate) fn of(list: &[Modes]) -> Vec<RequantMode> {
        let wants = |mode: &RequantMode| list.contains(&Modes::All) || list.contains(&Modes::One(*mode));
        RequantMode::ALL.into_iter().filter(wants).collect()
    }
}

fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(Precision::ALL.map(Precision::name))
        .map(|name| Precision::ALL.into_iter().find(|p| p.name() == name).unwrap_or_default())
}

fn requant() -> impl TypedValueParser<Value = RequantMode> {
    PossibleValuesParser::new(RequantMode::ALL.map(RequantMode::name))
        .map(|name| RequantMode::from_name(&name).unwrap_or(RequantMode::Q15))
}

fn requant_or_all() -> impl TypedValueParser<Value = Modes> {
    let names = RequantMode::ALL.map(RequantMode::name).into_iter().chain(["all"]);
    PossibleValuesParser::new(names.collect::<Vec<_>>())
        .map(|name| RequantMode::from_name(&name).map_or(Modes::All, Modes::One))
}

fn rule() -> impl TypedValueParser<Value = Rule> {
    PossibleValuesParser::new(Rule::ALL.map(Rule::name)).try_map(|name| name.parse())
}

fn rule_or_all() -> impl TypedValueParser<Value = Denied> {
    PossibleValuesParser::new(Rule::ALL.map(Rule::name).into_iter().chain(["all"]))
        .map(|name| name.parse().map_or(Denied::All, Denied::One))
}

/// A calibrator, and what for.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum CalibratorFor {
    All(Choice),
    Value(String, Calibrator),
}

fn calibrator(text: &str) -> Result<CalibratorFor, String> {
    // The last one: names of values may hold it, calibrators do not.
    match text.rsplit_once('=') {
        Some((value, how)) => {
            how.parse().map(|c| CalibratorFor::Value(value.into(), c)).map_err(|e| e.to_string())
        }
        None => text.parse().map(CalibratorFor::All).map_err(|e| format!("{e}; or auto")),
    }
}

fn weight_bits(text: &str) -> Result<WeightBits, String> {
    let bits = WeightBits::ALL.into_iter().find(|bits| bits.count().to_string() == text);
    bits.ok_or_else(|| "there are 7 and 8".into())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n >= 1).ok_or_else(|| "must be a whole number from 1".into())
}

fn parse_dims(text: &str) -> Result<Vec<usize>, String> {
    let dims = text.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>();
    dims.map_err(|_| format!("`{text}` is not a shape like 1x3x224x224"))
}

fn parse_shape(text: &str) -> Result<(String, Vec<usize>), String> {
    // The last one: names of values may hold it, shapes cannot.
    let (name, dims) = text.rsplit_once('=').ok_or("is not like image=1x3x224x224")?;
    Ok((name.into(), parse_dims(dims)?))
}

fn parse_dimension(text: &str) -> Result<(String, usize), String> {
    let (name, length) = text.rsplit_once('=').ok_or("is not like batch=8")?;
    Ok((name.into(), length.parse().map_err(|_| format!("`{length}` is not a length"))?))
}

fn parse_pin(text: &str) -> Result<(String, Device), String> {
    let (node, device) = text.rsplit_once('=').ok_or("is not like conv1=float-jit")?;
    let device = Device::from_name(device).ok_or_else(|| {
        format!("there is no device `{device}`; there are {}", Device::ALL.map(Device::name).join(", "))
    })?;
    Ok((node.into(), device))
}

/// A number of bytes; K, M, G and T are powers of 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let refuse = || format!("`{text}` is not a size like 500M or 8G");
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, letter)) if letter.is_ascii_alphabetic() => (&text[..at], letter.to_ascii_uppercase()),
        _ => (text, ' '),
    };
    let shift = match unit {
        ' ' | 'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return Err(refuse()),
    };
    let number: u64 = number.parse().map_err(|_| refuse())?;
    number.checked_mul(1 << shift).ok_or_else(refuse)
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    match parse_dims(text)?[..] {
        [h, w] if h > 0 && w > 0 => Ok((h, w)),
        _ => Err(format!("`{text}` is not a size like 224x224")),
    }
}

fn repairs(text: &str) -> Result<RepairChoice, String> {
    if text.trim() == "auto" {
        return Ok(RepairChoice::Auto);
    }
    let mut repairs = Repairs::NONE;
    for word in text.split(',').map(str::trim) {
        match word.split_once(':') {
            None if word == "all" => repairs = Repairs::ALL,
            None if word == "none" => {}
            None if word == "equalize" => repairs.equalize = Repairs::ALL.equalize,
            None if word == "scales" => repairs.scales = true,
            None if word == "bias" => repairs.bias = true,
            None if word == "rounding" => repairs.rounding = true,
            None if word == "means" => repairs.means = true,
            Some(("equalize", strength)) => {
                let strength = strength.parse().ok().filter(|s| (0.0..=1.0).contains(s));
                repairs.equalize = strength.ok_or("the strength of `equalize` is a number from 0 to 1")?;
            }
            _ => {
                return Err(format!(
                    "`{word}` is none of equalize, scales, bias, rounding, means, all, none, auto"
                ));
            }
        }
    }
    Ok(repairs.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_holds_together() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn values_are_parsed_from_the_right() {
        assert_eq!(parse_shape("a=b:0=1x3"), Ok(("a=b:0".into(), vec![1, 3])));
        assert_eq!(parse_pin("conv=float-jit"), Ok(("conv".into(), Device::FloatJit)));
        assert!(
            parse_shape("1x3").is_err() && parse_shape("a=1x").is_err() && parse_shape("a=1x-3").is_err()
        );
        assert!(parse_pin("conv=gpu").unwrap_err().contains("int8-jit"));
        let one = |c| Ok(CalibratorFor::All(Choice::One(c)));
        assert_eq!(calibrator("percentile:99.9"), one(Calibrator::Percentile(99.9)));
        assert_eq!(calibrator("auto"), Ok(CalibratorFor::All(Choice::Auto)));
        assert_eq!(calibrator("a=b=mse"), Ok(CalibratorFor::Value("a=b".into(), Calibrator::Mse)));
        assert!(
            ["percentile:4", "percentile:NaN", "kl", "a=auto", "a="].iter().all(|c| calibrator(c).is_err())
        );
        assert_eq!(
            (parse_bytes("77"), parse_bytes("3k"), parse_bytes("8G")),
            (Ok(77), Ok(3072), Ok(8 << 30))
        );
        assert!(["", "G", "1.5G", "-1M", "99999999T", "5é"].iter().all(|s| parse_bytes(s).is_err()));
        assert!(parse_size("224").is_err() && parse_size("0x4").is_err());
    }

    #[test]
    fn modes_keep_their_order_and_come_once() {
        let one = Modes::One(RequantMode::Q15);
        assert_eq!(Modes::of(&[one, one]), [RequantMode::Q15]);
        assert_eq!(Modes::of(&[one, Modes::All]), RequantMode::ALL);
    }
}
