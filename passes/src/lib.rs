//! The passes of qcc: what turns an imported float graph into one that code can be generated for.
//!
//! A compilation runs [`prepare`], then calibrates (someone runs the prepared graph on samples and feeds a
//! [`Collector`] with the [`observed_values`]), then [`quantize`]s, then [`lower`]s:
//!
//! ```text
//! Float ── prepare ──► Float ── quantize ──► FakeQuant ── lower ──► Int8 ──► Placed
//! ```
//!
//! With [`Precision::Float`] nothing is quantized, with [`Precision::FakeQuant`] the rounding stays simulated in
//! float, with [`Precision::Int8Dynamic`] activations get their grids when the model runs. Every pass leaves a [`Record`]: what it did, what it declined and why.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod adopt_grids;
mod affine;
mod assign_devices;
mod assign_layout;
mod calibrate;
mod canonicalise;
mod capability;
mod channel_moments;
mod check_pins;
mod classes;
mod correct_means;
mod edit;
mod equalize_channels;
mod fold_affine;
mod fold_batch_norm;
mod fold_constants;
mod fold_normalize;
mod fuse_clamp;
mod fuse_pad;
mod fuse_residual;
mod insert_fake_quant;
mod isolate;
mod join_columns;
pub mod lint;
mod lower_to_int8;
mod options;
mod plan;
mod quantize_dynamic;
mod record;
mod reestimate_batch_norms;
mod regions;
mod round_weights;
mod take_dynamic_products;
mod take_pixels;
mod weight_channels;
mod weight_parts;
mod weight_scales;
mod widen_half;

pub use calibrate::{
    Calibrator, Calibrators, ChannelStatistics, Choice, Collector, Distribution, Extremes, PERCENTILES,
    Range, Ranges, Statistics, Trial, UnknownCalibrator, behind_batch_norms, grid_ranges, observed_values,
    renormalised, trial, value_name,
};
pub use capability::int8_capability;
pub use channel_moments::ChannelMoments;
pub use check_pins::near_names;
pub use correct_means::{BiasShifts, CorrigibleProduct, StepHistogram, corrigible_products};
pub use edit::{channel_runs, product_channels};
pub use equalize_channels::{ChannelRanges, ChannelScales, channel_scales, equalizable_values, equalize};
pub use isolate::{Isolated, LayerNoise, QuantizedLayer, isolated, quantized_layers, without_grids};
pub use lint::{Finding, Level, Rule, Subject, UnknownRule};
pub use options::{
    Capability, ImageInput, Layers, Options, Precision, RepairChoice, Repairs, WeightBits, WeightGrid,
};
pub use plan::plan;
pub use record::{Note, NoteKind, PassError, Record, Report};
pub use reestimate_batch_norms::{BatchNormStatistics, RunningStatistics, next_batch_norms, set_statistics};
pub use regions::int8_layers;
pub use round_weights::{InputMoments, Moments, RoundedWeights, weighted_products};
pub use weight_channels::{ChannelWeights, weight_channels};

use qcc_ir::{Graph, Stage, verify};
use std::{cell::RefCell, collections::BTreeMap};

/// One transformation of a graph.
pub struct Pass {
    /// The name that `--print-after` and the records use.
    pub name: &'static str,
    run: fn(&mut Graph, &Context<'_>, &mut Record) -> Result<(), PassError>,
}

/// What a pass may ask for.
struct Context<'a> {
    options: &'a Options,
    /// Observed ranges; empty before calibration.
    ranges: &'a Ranges,
    /// What batch norms that were folded tell of the values behind them, by the names of the nodes that compute these.
    batch_norms: RefCell<BTreeMap<String, ChannelStatistics>>,
    /// What looks wrong so far.
    findings: RefCell<Vec<Finding>>,
}

impl<'a> Context<'a> {
    fn new(options: &'a Options, ranges: &'a Ranges) -> Context<'a> {
        Context { options, ranges, batch_norms: RefCell::default(), findings: RefCell::default() }
    }

    /// Takes in what looks wrong, unless nobody wants to hear of it.
    fn find(&self, finding: Finding, record: &mut Record) {
        match self.options.allowed.contains(&finding.rule) {
            true => record.declined(&finding.subject.to_string(), format!("{} is allowed", finding.rule)),
            false => self.findings.borrow_mut().push(finding),
        }
    }
}

/// The three callable parts of the pipeline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Prepare,
    Quantize,
    Lower,
}

/// One line of the pipeline.
struct Line {
    part: Part,
    /// The precisions for which the pass runs, if not for all.
    only: Option<&'static [Precision]>,
    pass: Pass,
}

const fn line(part: Part, pass: Pass) -> Line {
    Line { part, only: None, pass }
}

const fn line_for(part: Part, precisions: &'static [Precision], pass: Pass) -> Line {
    Line { part, only: Some(precisions), pass }
}

/// The pipeline, in order; each line with the reason for its place.
const PIPELINE: &[Line] = &[
    // Pins name nodes of the model: they are checked while all of these are still there.
    line(Part::Prepare, check_pins::CHECK_PINS),
    // By the names of the model, too, and before anything looks at what batch norms have.
    line(Part::Prepare, reestimate_batch_norms::REESTIMATE_BATCH_NORMS),
    // Before anything looks at the input.
    line(Part::Prepare, take_pixels::TAKE_PIXELS),
    // Before constants are folded: weights are to stay the integers that the model has.
    line(Part::Prepare, adopt_grids::ADOPT_GRIDS),
    // Before products of integers become products of floats, which they are where nothing better is known of them.
    line(Part::Prepare, take_dynamic_products::TAKE_DYNAMIC_PRODUCTS),
    // Everything below knows floats of 32 bits only.
    line(Part::Prepare, widen_half::WIDEN_HALF),
    // Everything below sees one spelling of each computation.
    line(Part::Prepare, canonicalise::CANONICALISE),
    // Folds look for constant operands, and what canonicalisation reshaped may be constant.
    line(Part::Prepare, fold_constants::FOLD_CONSTANTS),
    // Weights are constants now, and batch norms still ops.
    line(Part::Prepare, lint::batch_norms::LINT_BATCH_NORMS),
    // Before the other folds: what a batch norm cannot be folded into becomes an affine, which they may still place.
    line(Part::Prepare, fold_batch_norm::FOLD_BATCH_NORM),
    // Biases and scalings belong inside an op before a residual is added or a clamp applied behind them.
    line(Part::Prepare, fold_affine::FOLD_AFFINE),
    // After the folds into consumers, which are only valid for unpadded ops.
    line(Part::Prepare, fuse_pad::FUSE_PAD),
    // A residual is added after the bias and before the clamp.
    line(Part::Prepare, fuse_residual::FUSE_RESIDUAL),
    // Last of the fusions: a clamp ends an op.
    line(Part::Prepare, fuse_clamp::FUSE_CLAMP),
    // Nothing changes weights any more until they are quantized.
    line(Part::Prepare, lint::weights::LINT_WEIGHTS),
    // Ranges are those of scaled channels; and pixels, which the next line moves into weights, are never scaled.
    line(Part::Quantize, equalize_channels::EQUALIZE_CHANNELS),
    // Float keeps its exact normalisation, so this is for grids alone; weights have none yet.
    line(Part::Quantize, fold_normalize::FOLD_NORMALIZE),
    // The fused graph is the one that was calibrated: its values are what gets a grid.
    line(Part::Quantize, insert_fake_quant::INSERT_FAKE_QUANT),
    // Weights have grids now, and are still numbers.
    line(Part::Quantize, round_weights::ROUND_WEIGHTS),
    // What rounded weights make of means is part of what biases take.
    line(Part::Quantize, correct_means::CORRECT_MEANS),
    // Weights stay float here, rounded to their grids once and for all; in float, those that the model rounded itself.
    line_for(Part::Lower, &[Precision::FakeQuant, Precision::Float], fold_constants::FOLD_ROUNDED),
    // While moves and elementwise ops are still uniform: afterwards integer and float ops would need it twice.
    line(Part::Lower, assign_layout::ASSIGN_LAYOUT),
    line_for(Part::Lower, &[Precision::Int8, Precision::Int8Dynamic], lower_to_int8::LOWER_TO_INT8),
    // With channels last, where neighbouring columns of few channels look like more channels; of convolutions that stay float.
    line(Part::Lower, join_columns::JOIN_COLUMNS),
    // What has grids is on them by now: this is for products that are still of floats.
    line_for(Part::Lower, &[Precision::Int8Dynamic], quantize_dynamic::QUANTIZE_DYNAMIC),
    // Which device an op can run on depends on what it has become.
    line(Part::Lower, assign_devices::ASSIGN_DEVICES),
];

/// Names of all passes, in the order of their first appearance.
pub fn pass_names() -> Vec<&'static str> {
    let mut names = Vec::new();
    for line in PIPELINE {
        if !names.contains(&line.pass.name) {
            names.push(line.pass.name);
        }
    }
    names
}

/// Called with the graph after each pass.
pub type Observer<'a> = dyn FnMut(&Pass, &Graph) + 'a;

/// Canonicalises, folds and fuses a float graph. The result computes the same in fewer ops (up to rounding).
///
/// # Errors
/// Where a pin names no node, or an op refuses what a pass made of it.
pub fn prepare(
    graph: &mut Graph,
    options: &Options,
    observe: &mut Observer<'_>,
) -> Result<Report, PassError> {
    run(Part::Prepare, graph, options, &Ranges::default(), observe)
}

/// Rounds weights and activations to grids, in float: to [`Stage::FakeQuant`](qcc_ir::Stage::FakeQuant). With
/// [`Precision::Float`], and [`Precision::Int8Dynamic`] where the model brings no grids, it does nothing.
///
/// # Errors
/// Where a value that needs a grid has no range.
pub fn quantize(
    graph: &mut Graph,
    ranges: &Ranges,
    options: &Options,
    observe: &mut Observer<'_>,
) -> Result<Report, PassError> {
    let brings_grids = graph.stage == Stage::FakeQuant && options.precision == Precision::Int8Dynamic;
    if !options.precision.is_calibrated() && !brings_grids {
        return Ok(Report::default());
    }
    run(Part::Quantize, graph, options, ranges, observe)
}

/// Chooses layouts, makes integer ops of fake-quantized ones ([`Precision::Int8`]) and places every op on a device:
/// to [`Stage::Placed`](qcc_ir::Stage::Placed).
///
/// # Errors
/// Where a pin cannot be honoured.
pub fn lower(graph: &mut Graph, options: &Options, observe: &mut Observer<'_>) -> Result<Report, PassError> {
    run(Part::Lower, graph, options, &Ranges::default(), observe)
}

fn run(
    part: Part,
    graph: &mut Graph,
    options: &Options,
    ranges: &Ranges,
    observe: &mut Observer<'_>,
) -> Result<Report, PassError> {
    let context = Context::new(options, ranges);
    let mut report = Report::default();
    for Line { pass, .. } in
        PIPELINE.iter().filter(|l| l.part == part && l.only.is_none_or(|p| p.contains(&options.precision)))
    {
        let mut record = Record::new(pass.name);
        (pass.run)(graph, &context, &mut record)?;
        report.records.push(record);
        if cfg!(debug_assertions) {
            checked(pass.name, graph)?;
        }
        observe(pass, graph);
    }
    checked("the last pass", graph)?;
    report.batch_norms = context.batch_norms.into_inner();
    report.findings = context.findings.into_inner();
    Ok(report)
}

fn checked(pass: &'static str, graph: &Graph) -> Result<(), PassError> {
    verify(graph).map_err(|source| PassError::Invalid { pass, source })
}
