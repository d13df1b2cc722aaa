//! Weights that look wrong, or of which 8 bits keep too little. It runs last of all that prepares a graph: what is quantized are
//! the weights with batch norms folded into them.

use super::{Finding, Rule, Subject, channels};
use crate::{
    Context, Pass, PassError, Precision, Record, WeightGrid,
    affine::Parameters,
    edit::{Product, f32_constant, has_weights},
};
use qcc_ir::{Graph, Kind, NodeId, Stage};
use std::collections::BTreeSet;

/// See the module.
pub(crate) const LINT_WEIGHTS: Pass = Pass { name: "lint_weights", run };

/// The largest weight of a channel over their root mean square, above which the weights of the channel have a root mean square
/// of less than four steps of 127. Their signal-to-noise ratio is 10·log₁₀(12·4²) = 23 dB then, below what activations of 8 bits
/// have (30 to 40 dB), so that it is the weights which set the error. Bell-shaped weights have ratios of 3 to 5, and channels
/// of sound networks up to 22.
const MOST_PEAK: f64 = 127.0 / 4.0;
/// The ratio that 8 bits are meant for, by which bits that are left are counted.
const USUAL_PEAK: f64 = 4.0;
/// With one grid for all channels, how much larger the largest weight may be than that of the median channel: more leaves that
/// one fewer than 8 codes on either side of zero, half of the 8 bits.
const MOST_ABOVE_MEDIAN: f64 = 16.0;
/// A channel whose weights are all below this share of the largest of the layer computes its bias.
const NOTHING: f64 = 1e-6;
/// The share of the channels of a layer from which it is told that they are dead, or copies: single ones are usual.
const LEAST_SHARE: f64 = 0.5;
const LEAST_DUPLICATES: f64 = 0.25;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        if Product::of(graph, node).is_none() || !has_weights(graph, node) {
            continue;
        }
        if !is_finite(graph, node, ctx, record) {
            continue;
        }
        let Ok(parameters) = Parameters::of(graph, node) else { continue };
        let Some(rows) = Rows::of(&parameters) else { continue };
        rows.lint(&graph.node(node).name, ctx, record, graph.stage == Stage::Float);
    }
    Ok(())
}

/// Whether all constants of a product are numbers.
fn is_finite(graph: &Graph, node: NodeId, ctx: &Context<'_>, record: &mut Record) -> bool {
    let mut bad = 0;
    for operand in graph.operands(node).into_iter().skip(1) {
        if let Kind::Constant(_) = graph.node(operand.node).kind() {
            let elements = f32_constant(graph, operand).unwrap_or_default();
            bad += elements.iter().filter(|x| !x.is_finite()).count();
        }
    }
    if bad > 0 {
        let finding = Finding::new(
            Rule::WeightsNotFinite,
            Subject::Node(graph.node(node).name.clone()),
            format!("{bad} of its weights are not finite"),
            "export the model anew from a checkpoint of before its training diverged",
        );
        ctx.find(finding, record);
    }
    bad == 0
}

/// What is to be known of the weights of each output channel.
struct Rows {
    /// The largest magnitude.
    largest: Vec<f64>,
    squares: Vec<f64>,
    /// Of weights and bias, by which copies are told.
    fingerprints: Vec<u64>,
    /// Weights of a channel.
    length: usize,
}

impl Rows {
    /// `None` of a product that has none.
    fn of(parameters: &Parameters) -> Option<Rows> {
        let bias = parameters.bias();
        if bias.is_empty() || parameters.weights().is_empty() {
            return None;
        }
        let mut rows = Rows {
            largest: vec![0.0; bias.len()],
            squares: vec![0.0; bias.len()],
            fingerprints: bias.iter().map(|&b| mixed(0, b)).collect(),
            length: parameters.weights().len() / bias.len(),
        };
        for (i, &w) in parameters.weights().iter().enumerate() {
            let (out, _) = parameters.channels(i);
            rows.largest[out] = rows.largest[out].max(f64::from(w).abs());
            rows.squares[out] += f64::from(w) * f64::from(w);
            rows.fingerprints[out] = mixed(rows.fingerprints[out], w);
        }
        Some(rows)
    }

    fn lint(&self, name: &str, ctx: &Context<'_>, record: &mut Record, is_float: bool) {
        let subject = || Subject::Node(name.into());
        let count = self.largest.len();
        let most = self.largest.iter().copied().fold(0.0, f64::max);
        let is_live = |c: usize| self.largest[c] > NOTHING * most;
        let live: Vec<usize> = (0..count).filter(|&c| is_live(c)).collect();
        let dead = count - live.len();
        if dead as f64 >= LEAST_SHARE * count as f64 {
            let what = format!(
                "{} no weights but zero (or next to it), and the same result whatever the input",
                channels(dead, count)
            );
            let advice = "remove them to save time, or train with less decay of weights";
            ctx.find(Finding::new(Rule::WeightsDeadChannels, subject(), what, advice), record);
        }
        let copies = self.copies(&live);
        if copies as f64 >= LEAST_DUPLICATES * count as f64 && copies > 1 {
            let what = format!("{} the weights of another one", channels(copies, count));
            let advice = "look at how it was initialised: channels that begin alike stay alike";
            ctx.find(Finding::new(Rule::WeightsDuplicateChannels, subject(), what, advice), record);
        }
        // What follows is of grids that are yet to be chosen.
        if !is_float || matches!(ctx.options.precision, Precision::Float) || live.is_empty() {
            return;
        }
        if ctx.options.weights == WeightGrid::PerTensor {
            let mut sorted: Vec<f64> = live.iter().map(|&c| self.largest[c]).collect();
            sorted.sort_by(f64::total_cmp);
            let median = sorted[sorted.len() / 2];
            let above: Vec<usize> =
                live.iter().copied().filter(|&c| self.largest[c] > MOST_ABOVE_MEDIAN * median).collect();
            if let Some(&worst) = above.iter().max_by(|&&a, &&b| self.largest[a].total_cmp(&self.largest[b]))
            {
                let ratio = self.largest[worst] / median;
                let what = format!(
                    "{} far larger weights than the others: the largest, of channel {worst}, is {ratio:.0} times that of the median \
                     channel, which is left with {:.1} of 8 bits",
                    channels(above.len(), count),
                    (8.0 - ratio.log2()).max(0.0)
                );
                let advice = "give each channel a grid of its own (--weights per-channel), or bring channels to one range \
                              (--repair equalize)";
                ctx.find(Finding::new(Rule::WeightsOutlierChannels, subject(), what, advice), record);
            }
        }
        let above: Vec<usize> = live.iter().copied().filter(|&c| self.peak(c) > MOST_PEAK).collect();
        if let Some(&worst) = above.iter().max_by(|&&a, &&b| self.peak(a).total_cmp(&self.peak(b))) {
            let ratio = self.peak(worst);
            let what = format!(
                "{} outliers among the weights: the largest of channel {worst} is {ratio:.0} times their root mean square, which \
                 leaves the others {:.1} of 8 bits",
                channels(above.len(), count),
                (8.0 - (ratio / USUAL_PEAK).log2()).max(0.0)
            );
            let advice = "clip the weights or train with decay of weights, let rounding make up for it (--repair rounding), or keep \
                          the layer in float (--pin LAYER=float-jit)";
            ctx.find(Finding::new(Rule::WeightsOutliers, subject(), what, advice), record);
        }
    }

    /// The largest weight of a channel over their root mean square.
    fn peak(&self, channel: usize) -> f64 {
        self.largest[channel] / (self.squares[channel] / self.length as f64).sqrt()
    }

    /// How many of these channels have the weights and the bias of one before them.
    fn copies(&self, of: &[usize]) -> usize {
        let different: BTreeSet<u64> = of.iter().map(|&c| self.fingerprints[c]).collect();
        of.len() - different.len()
    }
}

/// A fingerprint with one more number.
fn mixed(fingerprint: u64, x: f32) -> u64 {
    (fingerprint.rotate_left(23) ^ u64::from(x.to_bits())).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
