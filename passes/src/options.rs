//! What a caller chooses.

use crate::{BatchNormStatistics, lint::Rule};
use qcc_ir::{Device, Graph, NodeId, numerics::RequantMode};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// What the compiled model computes with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// f32 throughout.
    Float,
    /// f32 rounded to the grids of [`Int8`](Precision::Int8).
    FakeQuant,
    /// 8-bit integers wherever an op has an integer form.
    #[default]
    Int8,
    /// 8-bit integers in matrix products with weights, of activations that are quantized row by row when the model runs;
    /// f32 elsewhere. Needs no calibration. A model that brings grids has them as with [`Int8`](Precision::Int8).
    Int8Dynamic,
}

impl Precision {
    /// All of them, in the order of benchmark tables.
    pub const ALL: [Precision; 4] =
        [Precision::Float, Precision::FakeQuant, Precision::Int8, Precision::Int8Dynamic];

    /// The spelling of the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::Float => "float",
            Precision::FakeQuant => "fake-quant",
            Precision::Int8 => "int8",
            Precision::Int8Dynamic => "int8-dynamic",
        }
    }

    /// Whether grids of activations come from ranges that were seen on samples, where the model brings none.
    pub const fn is_calibrated(self) -> bool {
        match self {
            Precision::Float | Precision::Int8Dynamic => false,
            Precision::FakeQuant | Precision::Int8 => true,
        }
    }
}

/// How many scales a tensor of weights has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightGrid {
    /// One an output channel.
    #[default]
    PerAxis,
    /// One.
    PerTensor,
}

/// Bits of quantized weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightBits {
    /// From −64 to 64: the products of two of them with u8 activations have a sum within 16 bits, 255·128 = 32,640, as the
    /// instructions want it that multiply bytes on CPUs without VNNI. What ONNX Runtime calls `reduce_range`.
    Seven,
    /// From −127 to 127.
    #[default]
    Eight,
}

impl WeightBits {
    /// All of them.
    pub const ALL: [WeightBits; 2] = [WeightBits::Seven, WeightBits::Eight];

    /// How many.
    pub const fn count(self) -> u8 {
        match self {
            WeightBits::Seven => 7,
            WeightBits::Eight => 8,
        }
    }

    /// The largest magnitude of a code.
    pub const fn largest(self) -> i32 {
        match self {
            WeightBits::Seven => 64,
            WeightBits::Eight => 127,
        }
    }
}

/// What is done to a network so that its codes are closer to its numbers. All of it needs samples, and none of it any time when
/// the model runs.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Repairs {
    /// How far channels that share a grid are brought to the same range, from 0 (not) to 1.
    pub equalize: f64,
    /// Whether scales of weights are those of the least squared error, and not those that clip nothing.
    pub scales: bool,
    /// Whether biases take the mean error of rounded weights.
    pub bias: bool,
    /// Whether weights are rounded so that their errors cancel, and not each to nearest.
    pub rounding: bool,
    /// Whether biases take the mean error that is seen in the results of the quantized network, layer by layer.
    pub means: bool,
}

impl Repairs {
    /// None.
    pub const NONE: Repairs =
        Repairs { equalize: 0.0, scales: false, bias: false, rounding: false, means: false };

    /// All. Half of the way, channels keep as much room for what samples did not show as they have gained codes.
    pub const ALL: Repairs = Repairs { equalize: 0.5, scales: true, bias: true, rounding: true, means: true };

    /// What is done to weights and biases alone.
    pub const OF_PRODUCTS: Repairs = Repairs { rounding: true, bias: true, means: true, ..Repairs::NONE };

    /// These, but for those of [`OF_PRODUCTS`](Self::OF_PRODUCTS).
    pub const fn without_products(self) -> Repairs {
        Repairs { rounding: false, bias: false, means: false, ..self }
    }

    /// What [`RepairChoice::Auto`] tries, one after the other: of those that equalize, the next one only where the last one was
    /// better than all before.
    pub const CANDIDATES: [Repairs; 5] = [
        Repairs::NONE,
        Repairs { rounding: true, ..Repairs::NONE },
        Repairs::OF_PRODUCTS,
        Repairs { equalize: 0.5, ..Repairs::OF_PRODUCTS },
        Repairs { equalize: 0.75, ..Repairs::OF_PRODUCTS },
    ];
}

impl fmt::Display for Repairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            ("scales", self.scales),
            ("rounding", self.rounding),
            ("bias", self.bias),
            ("means", self.means),
        ];
        let mut words: Vec<String> =
            named.into_iter().filter(|(_, is_on)| *is_on).map(|(name, _)| name.into()).collect();
        if self.equalize != 0.0 {
            words.push(format!("equalize:{}", self.equalize));
        }
        f.write_str(if words.is_empty() { "none".into() } else { words.join(",") }.as_str())
    }
}

/// [`Repairs`], or that they are to be chosen by the error that is measured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RepairChoice {
    /// These.
    These(Repairs),
    /// The best of [`Repairs::CANDIDATES`].
    Auto,
}

impl From<Repairs> for RepairChoice {
    fn from(repairs: Repairs) -> RepairChoice {
        RepairChoice::These(repairs)
    }
}

/// How the pixels of an image become what a model was trained on: y = (x − mean)/std, all in units of a pixel.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ImageInput {
    /// Mean of each channel, in the order in which the model was trained to take them; one for all; empty for 0.
    pub mean: Vec<f32>,
    /// Standard deviation, likewise; empty for 1.
    pub std: Vec<f32>,
    /// Whether the model takes blue first. Pixels come with red first.
    pub bgr: bool,
}

/// Whether the code generator can lower a node, or why not.
pub type Capability = fn(&Graph, NodeId) -> Result<(), String>;

/// Nodes of a prepared graph, by name, that may become integer ops.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layers {
    /// All but these, as far as that pays: see `regions`.
    AllBut(BTreeSet<String>),
    /// These alone, whether it pays or not: to see what rounding them costs.
    Only(BTreeSet<String>),
}

impl Default for Layers {
    fn default() -> Layers {
        Layers::AllBut(BTreeSet::new())
    }
}

/// What a caller chooses; [`Options::default`] is int8 with per-channel weights of 8 bits and Q15 requantization.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to compute with.
    pub precision: Precision,
    /// The wanted requantization; an op that it cannot express takes `Shift`, and if need be `Float`, and says so.
    pub requant: RequantMode,
    /// Scales of weights.
    pub weights: WeightGrid,
    /// Codes of weights.
    pub weight_bits: WeightBits,
    /// Lets the model take pixels, u8 and channels last, and normalise them itself.
    pub image_input: Option<ImageInput>,
    /// Leaves means and deviations in an op of their own where they could go into a convolution: slower, but the codes
    /// are those of images that were normalised outside.
    pub keep_normalize: bool,
    /// Makes a quantized graph for other runtimes, which make integer ops of what has a pair of quantize and dequantize
    /// around it: sums stay ops of their own, and numbers are rounded behind moves, too.
    pub interchange: bool,
    /// Lets results have their axes in the order in which they are made, if the first one stays first: for who takes them as
    /// sets of numbers.
    pub any_order: bool,
    /// Devices for nodes of the model, by name.
    pub pins: BTreeMap<String, Device>,
    /// Which nodes of the prepared graph become integer ops where they can.
    pub layers: Layers,
    /// What the code generator can lower; the rest runs in the interpreter.
    pub capability: Capability,
    /// Statistics that batch norms get instead of their own.
    pub statistics: Option<Arc<BatchNormStatistics>>,
    /// What nobody wants to hear of.
    pub allowed: BTreeSet<Rule>,
    /// The largest constant, in bytes, that folding may create where it takes more room than its operands.
    pub fold_limit: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            precision: Precision::default(),
            requant: RequantMode::Q15,
            weights: WeightGrid::default(),
            weight_bits: WeightBits::default(),
            image_input: None,
            keep_normalize: false,
            interchange: false,
            any_order: false,
            pins: BTreeMap::new(),
            layers: Layers::default(),
            capability: |_, _| Ok(()),
            statistics: None,
            allowed: BTreeSet::new(),
            fold_limit: 1 << 20,
        }
    }
}

impl Options {
    /// Whether the caller wants a node to be no integer op.
    pub(crate) fn keeps_float(&self, graph: &Graph, node: NodeId) -> bool {
        let name = &graph.node(node).name;
        let is_left_out = match &self.layers {
            Layers::AllBut(float) => float.contains(name),
            Layers::Only(int8) => !int8.contains(name),
        };
        is_left_out || self.pin(graph, node).is_some_and(|device| device != Device::Int8Jit)
    }

    /// The device a node is pinned to.
    pub(crate) fn pin(&self, graph: &Graph, node: NodeId) -> Option<Device> {
        self.pins.get(&graph.node(node).name).copied()
    }
}
