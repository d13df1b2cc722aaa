//! What is known of a quantized model and its layers: all that a report shows.

use crate::{Decibels, Host, Latency, Precision, WeightBits};
use qcc_ir::numerics::RequantMode;
use qcc_passes::{ChannelWeights, Distribution, Range, WeightGrid};
use serde::{Deserialize, Serialize};

/// The version of [`Facts`] as JSON.
pub const FORMAT: u32 = 1;

/// All that is known of a model in float and quantized.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// [`FORMAT`] of the qcc that found them.
    pub format: u32,
    /// What the model is called.
    pub model: String,
    /// The outcome in words, a sentence each.
    pub verdict: Vec<String>,
    /// How close the quantized model is to float.
    pub grade: Grade,
    /// The model in each precision, float first; what the report is about is the last one.
    pub contenders: Vec<Contender>,
    /// Inputs and nodes of the prepared graph, in the order of execution.
    pub layers: Vec<LayerFacts>,
    /// Which layer's result which layer takes.
    pub edges: Vec<Edge>,
    /// Where the time of the last contender goes.
    pub time: TimeFacts,
    /// What looks wrong with the model or the data.
    pub findings: Vec<Finding>,
    /// What to try, the most promising first.
    pub next: Vec<Suggestion>,
    /// What each pass did and declined, as text.
    pub explanation: String,
    /// How all this was found.
    pub conditions: Conditions,
}

/// How close a quantized model is to float.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// It is float.
    Float,
    /// The highest score is float's for at least 98 % of the images; without images, results are at 30 dB or more.
    Close,
    /// For at least 95 %, or 20 dB.
    Fair,
    /// For less.
    Far,
    /// Results were not compared, or the samples are made up.
    Unknown,
}

/// The model in one precision.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Contender {
    /// `float`, `fake-quant`, `int8 q15`, …
    pub name: String,
    /// What it computes with.
    pub precision: Precision,
    /// How it requantizes.
    pub requant: Option<RequantMode>,
    /// What the images showed, where there were any.
    pub accuracy: Option<Accuracy>,
    /// Signal-to-noise ratio of its results against float on the observed samples: of all of them together.
    pub sqnr: Option<Decibels>,
    /// Time of one run, in milliseconds.
    pub latency_ms: Latency,
    /// From a `.qcc` file to a session that is ready.
    pub load_ms: f64,
    /// Bytes of its `.qcc` file.
    pub file_bytes: u64,
    /// Bytes of packed weights and tables.
    pub weight_bytes: u64,
    /// Bytes of intermediate values of a session.
    pub arena_bytes: u64,
    /// Bytes of machine code.
    pub code_bytes: u64,
    /// Memory that loading and the first run took at their peak, in MiB; `None` where the system does not tell.
    pub memory_mib: Option<f64>,
    /// Share of its time that requantization takes.
    pub requant_share: Option<f64>,
    /// Multiply-accumulates of a run.
    pub macs: u64,
}

/// Accuracy on images.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Accuracy {
    /// Number of images.
    pub samples: usize,
    /// Share of images whose label scores highest; `None` without labels.
    pub top1: Option<f64>,
    /// Share of images whose label is among the five highest.
    pub top5: Option<f64>,
    /// Share of images for which the highest score is float's.
    pub agreement: f64,
    /// Signal-to-noise ratio of the first output against float's.
    pub sqnr: Option<Decibels>,
}

/// How a layer is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Computed {
    /// It is an input.
    Input,
    /// By generated code on codes of 8 bits.
    Int8,
    /// By generated code on floats (or on integers of the model, such as shapes).
    Float,
    /// By the reference interpreter.
    Interpreter,
    /// As part of a layer next to it, or not at all.
    Fused,
}

/// What is known of one layer: an input or a node of the prepared graph. Where it has several results, of the first one.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LayerFacts {
    /// Its name.
    pub name: String,
    /// Its op in the prepared graph, or `input`.
    pub op: String,
    /// What became of the op.
    pub lowered: Option<String>,
    /// Element type of its result.
    pub dtype: String,
    /// Shape of its result.
    pub shape: Vec<usize>,
    /// Multiply-accumulates.
    pub macs: u64,
    /// How it is computed in the last contender.
    pub computed: Computed,
    /// Why it is not computed with codes, or not as it was asked for.
    pub reason: Option<String>,
    /// Time in float and in the last contender.
    pub time: LayerTimes,
    /// Error of its result, quantized against float.
    pub error: LayerError,
    /// How its float result is distributed over the observed samples.
    pub values: Option<Distribution>,
    /// The grid of its result; `None` where it has none of its own.
    pub grid: Option<GridFacts>,
    /// Its weights; `None` where it has none.
    pub weights: Option<WeightFacts>,
    /// Ranges of the channels of its result, where they could be [equalized](qcc_passes::equalize).
    pub channels: Option<ChannelFacts>,
}

/// Times of one layer in milliseconds, medians.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LayerTimes {
    /// In the float model; `None` where it is no step there.
    pub float_ms: Option<f64>,
    /// In the last contender.
    pub quantized_ms: Option<f64>,
    /// What it takes there to bring its result to other forms: conversions, and copies in another order of axes.
    pub conversion_ms: f64,
    /// What requantization takes of `quantized_ms`.
    pub requant_ms: Option<f64>,
    /// The least time that arithmetic and memory would allow.
    pub bound_ms: f64,
    /// Whether memory sets that bound.
    pub is_memory_bound: bool,
    /// Bytes of its operands, weights and results.
    pub bytes: u64,
    /// The kernel.
    pub kernel: Option<String>,
}

impl LayerTimes {
    /// With its conversions.
    pub fn total_ms(&self) -> Option<f64> {
        match self.quantized_ms {
            Some(ms) => Some(ms + self.conversion_ms),
            None => Some(self.conversion_ms).filter(|ms| *ms > 0.0),
        }
    }
}

/// How far the result of a layer is from float on the observed samples.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LayerError {
    /// Signal-to-noise ratio of the layer alone, its inputs being those of float, rounded to their grids. `None` where nothing
    /// is rounded.
    pub local: Option<Decibels>,
    /// Where the noise of the layer alone comes from.
    pub causes: Option<Causes>,
    /// Signal-to-noise ratio in the quantized network, with all that the layers before it have lost: in fake-quant, or with
    /// int8-dynamic in the model itself.
    pub cumulative: Option<Decibels>,
    /// The same in int8, with its requantization.
    pub cumulative_int8: Option<Decibels>,
    /// Float values that the grid does not reach.
    pub saturation: Option<Saturation>,
    /// How much of the grid is used.
    pub codes: Option<CodesUsed>,
    /// Codes of int8 against those of fake-quant.
    pub lsb: Option<LsbDifference>,
}

/// Parts of the noise of a layer: what each causes alone, over the sum of these.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Causes {
    /// Rounding of the inputs.
    pub inputs: f64,
    /// Rounding of weights and bias.
    pub parameters: f64,
    /// Rounding of the result.
    pub result: f64,
}

/// What causes noise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Rounding of the inputs.
    Inputs,
    /// Rounding of weights and bias.
    Parameters,
    /// Rounding of the result.
    Result,
}

impl Cause {
    /// In words, behind "by".
    pub const fn phrase(self) -> &'static str {
        match self {
            Cause::Inputs => "the grid of its input",
            Cause::Parameters => "the rounding of its weights",
            Cause::Result => "the grid of its result",
        }
    }

    /// In a word or two.
    pub const fn word(self) -> &'static str {
        match self {
            Cause::Inputs => "input grid",
            Cause::Parameters => "weights",
            Cause::Result => "own grid",
        }
    }
}

impl Causes {
    /// The largest part.
    pub fn main(&self) -> Cause {
        if self.inputs >= self.parameters && self.inputs >= self.result {
            Cause::Inputs
        } else if self.parameters >= self.result {
            Cause::Parameters
        } else {
            Cause::Result
        }
    }
}

/// Share of the float values beyond the grid.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Saturation {
    /// Below its lowest number.
    pub below: f64,
    /// Above its highest number.
    pub above: f64,
}

/// How many codes of a grid occur.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct CodesUsed {
    /// Different codes on the observed samples.
    pub used: u32,
    /// Codes of the grid.
    pub of: u32,
    /// log₂ of the codes used.
    pub bits: f64,
}

/// By how many steps of the grid codes of int8 are off those of fake-quant, which are by the definition in real numbers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LsbDifference {
    /// Number of codes with a difference of −5 (or below), −4, …, 4, 5 (or above).
    pub counts: Vec<u64>,
    /// The largest difference.
    pub largest: u32,
    /// Share of codes without difference.
    pub equal: f64,
    /// Share of codes that are more than one step off.
    pub beyond_one: f64,
}

/// A grid of codes.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct GridFacts {
    /// Step.
    pub scale: f32,
    /// Code of zero.
    pub zero_point: i32,
    /// Lowest code.
    pub lo: i32,
    /// Highest code.
    pub hi: i32,
    /// The lowest number.
    pub min: f32,
    /// The highest number.
    pub max: f32,
}

/// The weights of a layer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WeightFacts {
    /// Number of output channels.
    pub channels: usize,
    /// Neighbouring channels that stand together in `groups`: 1 where there are few.
    pub grouped_by: usize,
    /// Extremes and the largest scale of each group.
    pub groups: Vec<ChannelWeights>,
    /// Number of channels whose weights are all zero.
    pub zero_channels: usize,
    /// How much larger the largest magnitude is than that of the median channel.
    pub spread: f64,
}

/// Channels of a result that share a grid.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ChannelFacts {
    /// Number of channels.
    pub channels: usize,
    /// Neighbouring channels that stand together in `groups`.
    pub grouped_by: usize,
    /// Extremes of each group.
    pub groups: Vec<Range>,
    /// Bits of the grid that the median channel leaves unused: log₂ of the largest magnitude of all over its own.
    pub unused_bits: f64,
    /// The channel of the largest magnitude.
    pub largest: usize,
}

/// A use of the result of one layer by another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Edge {
    /// Number of the layer that makes it.
    pub from: usize,
    /// Number of the layer that takes it.
    pub to: usize,
    /// Whether it is converted between floats and codes, or handed to another device, on the way.
    pub converts: bool,
}

/// Where the time of the last contender goes, and why it is not less.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TimeFacts {
    /// Time of a run: the median.
    pub run_ms: f64,
    /// Time of a run in float.
    pub float_ms: f64,
    /// The sum of the least times of all layers.
    pub bound_ms: f64,
    /// Parts of the time, the largest first.
    pub parts: Vec<TimePart>,
    /// What follows, a sentence each.
    pub sentences: Vec<String>,
    /// Layers that are not computed with codes, the slowest first.
    pub float_layers: Vec<FloatLayer>,
    /// Conversions between floats and codes, transfers and copies, the slowest first.
    pub conversions: Vec<Conversion>,
    /// Layers whose bound is memory, those that take the most time first.
    pub memory_bound: Vec<BoundLayer>,
    /// Layers that take more time than in float, by the difference.
    pub slower: Vec<SlowerLayer>,
}

/// One part of the time of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TimePart {
    /// Of what.
    pub what: TimeOf,
    /// Steps of that kind.
    pub steps: usize,
    /// Their time.
    pub ms: f64,
    /// Share of the sum of all parts.
    pub share: f64,
}

/// What time is spent on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeOf {
    /// Convolutions and matrix products of codes, without requantization.
    Int8Products,
    /// Bringing sums of these products back to codes.
    Requantization,
    /// Other ops on codes: sums, pools, functions, moves.
    Int8Others,
    /// Convolutions and matrix products of floats.
    FloatProducts,
    /// Other ops on floats.
    FloatOthers,
    /// Between floats and codes, and between devices.
    Conversions,
    /// Ops in the reference interpreter.
    Interpreter,
    /// Checks, the walk over the steps, handing work to threads.
    BetweenLayers,
}

impl TimeOf {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            TimeOf::Int8Products => "int8 products",
            TimeOf::Requantization => "requantization",
            TimeOf::Int8Others => "other int8 ops",
            TimeOf::FloatProducts => "float products",
            TimeOf::FloatOthers => "other float ops",
            TimeOf::Conversions => "conversions",
            TimeOf::Interpreter => "interpreter",
            TimeOf::BetweenLayers => "between layers",
        }
    }
}

/// A layer that is not computed with codes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FloatLayer {
    /// Its name.
    pub name: String,
    /// Its op.
    pub op: String,
    /// How it is computed.
    pub computed: Computed,
    /// Why.
    pub reason: Option<String>,
    /// Its time.
    pub ms: f64,
}

/// A step between forms of a value.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Conversion {
    /// Name of the step.
    pub name: String,
    /// Its op.
    pub op: String,
    /// The layer whose result it converts, where it is known.
    pub layer: Option<String>,
    /// Bytes that it reads and writes.
    pub bytes: u64,
    /// Its time.
    pub ms: f64,
}

/// A layer against its bound.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BoundLayer {
    /// Name of the layer.
    pub name: String,
    /// Bytes that it moves.
    pub bytes: u64,
    /// Its time.
    pub ms: f64,
    /// The least time of moving these.
    pub bound_ms: f64,
}

/// A layer that quantization makes slower.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SlowerLayer {
    /// Name of the layer.
    pub name: String,
    /// Its time in float.
    pub float_ms: f64,
    /// Its time, with conversions of its result.
    pub ms: f64,
}

/// Something that looks wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// The layer, or the model.
    pub subject: String,
    /// What is wrong.
    pub text: String,
}

/// Something to try.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Suggestion {
    /// What it is, in a few words.
    pub title: String,
    /// Why it may help, by these facts.
    pub reason: String,
    /// What it is expected to do, where that is known.
    pub effect: Option<String>,
    /// Options to add, such as `--repair rounding,bias`.
    pub options: Vec<String>,
    /// The whole command line, where that of this report is known; without the program.
    pub command: Option<Vec<String>>,
}

/// How facts were found.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Conditions {
    /// Version of qcc.
    pub qcc: String,
    /// The command line, without the program; where it is known.
    pub command: Option<Vec<String>>,
    /// The CPU, and what it can do.
    pub host: Option<Host>,
    /// Name of the tier.
    pub isa: String,
    /// Threads of a run.
    pub threads: usize,
    /// Timed runs of each contender.
    pub reps: usize,
    /// What layers were observed on.
    pub samples: SampleFacts,
    /// What the accuracy was measured on; `None` where it was not.
    pub images: Option<SampleFacts>,
    /// Why accuracy was not measured, though there were images.
    pub no_accuracy: Option<String>,
    /// What ranges come from; `None` where there are none.
    pub calibration: Option<CalibrationFacts>,
    /// Whether the model brings its own grids.
    pub brings_grids: bool,
    /// Precision of the last contender.
    pub precision: Precision,
    /// Its requantization.
    pub requant: Option<RequantMode>,
    /// Scales of weights.
    pub weights: WeightGrid,
    /// Bits of weights.
    pub weight_bits: WeightBits,
    /// What is repaired; `None` for nothing.
    pub repairs: Option<qcc_passes::Repairs>,
    /// Layers that stay float by a policy.
    #[serde(default)]
    pub float_layers: Vec<String>,
    /// Nodes that the user has placed, with their devices.
    pub pins: Vec<(String, String)>,
    /// Whether this CPU would multiply weights of 7 bits faster.
    pub gains_by_narrow_weights: bool,
    /// Whether some layers have tilings that were measured.
    pub is_tuned: bool,
}

/// Some samples.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SampleFacts {
    /// File, folder, or what else it was.
    pub origin: String,
    /// How many.
    pub count: usize,
    /// Whether they are made up.
    pub is_made_up: bool,
}

/// What ranges come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CalibrationFacts {
    /// File, folder, or what else it was.
    pub origin: String,
    /// Number of samples.
    pub samples: u64,
    /// How ranges were chosen.
    pub calibrator: String,
    /// Whether the samples were made up.
    pub is_made_up: bool,
    /// Number of batch norms whose statistics stood in for data.
    pub batch_norms: usize,
    /// Whether calibrators or repairs were chosen by measurement.
    #[serde(default)]
    pub is_measured: bool,
}

impl Facts {
    /// What the report is about.
    pub fn subject(&self) -> Option<&Contender> {
        self.contenders.last()
    }

    /// Layers that lose anything of their own, those that lose most first.
    pub fn by_local_error(&self) -> Vec<(&LayerFacts, Decibels)> {
        let lossy = |l: &'_ LayerFacts| l.error.local.filter(|d| d.0.is_finite());
        let mut layers: Vec<_> = self.layers.iter().filter_map(|l| Some((l, lossy(l)?))).collect();
        layers.sort_by(|a, b| a.1.0.total_cmp(&b.1.0));
        layers
    }

    /// The layer whose result is to blame where the noise of another comes from its inputs: of those that it takes, the one
    /// whose channels are of the most different ranges.
    pub fn blamed_input(&self, layer: &LayerFacts) -> Option<&LayerFacts> {
        let to = self.layers.iter().position(|l| l.name == layer.name)?;
        let sources = self.edges.iter().filter(|e| e.to == to).filter_map(|e| self.layers.get(e.from));
        let unused = |l: &LayerFacts| l.channels.as_ref().map_or(0.0, |c| c.unused_bits);
        sources.reduce(|most, l| if unused(l) > unused(most) { l } else { most })
    }

    /// What makes most of the noise of a layer, in words, behind "by".
    pub fn cause(&self, layer: &LayerFacts) -> Option<String> {
        let cause = layer.error.causes?.main();
        let mut text = cause.phrase().to_string();
        if cause == Cause::Inputs
            && let Some(source) = self.blamed_input(layer)
        {
            text.push_str(&format!(", the result of `{}`", source.name));
            if let Some(c) = source.channels.as_ref().filter(|c| c.unused_bits >= UNUSED_BITS) {
                let times = c.unused_bits.exp2();
                text.push_str(&format!(
                    ", whose channel {} is {times:.0} times as large as the median one",
                    c.largest
                ));
            }
        }
        Some(text)
    }

    /// The local signal-to-noise ratio of the median layer.
    pub fn median_local(&self) -> Option<Decibels> {
        let layers = self.by_local_error();
        layers.get(layers.len() / 2).map(|(_, d)| *d)
    }

    /// The layer that loses most, if it stands out.
    pub fn outlier(&self) -> Option<(&LayerFacts, Decibels)> {
        let (layer, worst) = self.by_local_error().into_iter().next()?;
        let median = self.median_local()?;
        (median.0 - worst.0 >= OUTLYING_DB).then_some((layer, worst))
    }
}

/// Bits that the median channel leaves unused from which on ranges of channels are very different.
pub const UNUSED_BITS: f64 = 2.0;

/// A layer stands out whose noise is ten times the share of its signal that it is in the median layer.
pub const OUTLYING_DB: f64 = 10.0;
