//! Ranges of activations, collected in one stream over samples in bounded memory.

use crate::{capability::int8_capability, edit::activations, lint_data};
use qcc_ir::{DType, Graph, Stage, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

/// The values whose ranges [`quantize`](crate::quantize) may ask for, by id: f32 activations that an op with an
/// integer form takes or makes, and the graph's inputs (which are linted). None of a graph that brings its own grids.
pub fn observed_values(graph: &Graph) -> Vec<ValueId> {
    if graph.stage == Stage::FakeQuant {
        return vec![];
    }
    let mut values = BTreeSet::new();
    for (id, node) in graph.nodes() {
        if node.op().is_some() && int8_capability(graph, id).is_ok() {
            values.insert(id.out());
            values.extend(activations(graph, id).into_iter().map(|(_, v)| v));
        }
    }
    values.extend(graph.inputs().iter().map(|n| n.out()));
    values.retain(|&v| graph.constant_value(v).is_none() && graph.ty(v).dtype == DType::F32);
    values.into_iter().collect()
}

/// The key of a value in [`Ranges`]: its node's name, with `:port` after the first output.
pub(crate) fn value_name(graph: &Graph, value: ValueId) -> String {
    let name = &graph.node(value.node).name;
    match value.port {
        0 => name.clone(),
        p => format!("{name}:{p}"),
    }
}

/// How a range is chosen from what was seen.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Calibrator {
    /// The smallest and the largest value.
    MinMax,
    /// On either side, the value beyond which 100 − p percent of the values lie (to the resolution of a histogram of
    /// 1,024 bins from 0 to the next power of two above the largest magnitude).
    Percentile(f64),
}

/// An inclusive range of real numbers.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Range {
    /// Lower end.
    pub min: f32,
    /// Upper end.
    pub max: f32,
}

impl Range {
    /// The smallest range that contains both.
    pub(crate) fn union(self, other: Range) -> Range {
        Range { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

/// Ranges by value name, and what looked wrong with the data.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Ranges {
    /// Range of each value, by the name of its node (`name:1` for a second output).
    pub values: BTreeMap<String, Range>,
    /// Number of samples seen.
    pub samples: u64,
    /// What looks wrong with the samples; one sentence each.
    pub warnings: Vec<String>,
}

impl Ranges {
    pub(crate) fn get(&self, graph: &Graph, value: ValueId) -> Option<Range> {
        self.values.get(&value_name(graph, value)).copied()
    }
}

/// Collects what calibration needs of the [`observed_values`] of a graph.
///
/// The state depends on the multiset of samples alone, not on their order or on how they were split among collectors
/// that were [merged](Collector::merge): counts are integers and histogram bins only ever double in width.
pub struct Collector {
    calibrator: Calibrator,
    /// Names of this graph's values.
    names: BTreeMap<ValueId, String>,
    seen: BTreeMap<String, Seen>,
}

/// What was seen of one value.
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) is_input: bool,
    pub(crate) samples: u64,
    pub(crate) elements: u64,
    pub(crate) not_finite: u64,
    pub(crate) min: f32,
    pub(crate) max: f32,
    /// Samples all of whose elements were equal.
    pub(crate) constant: u64,
    /// Whether every element was an integer.
    pub(crate) integral: bool,
    /// Fingerprints of the first distinct samples; of inputs only.
    pub(crate) distinct: BTreeSet<u64>,
    histogram: Option<Histogram>,
}

impl Collector {
    /// A collector for the observed values of a prepared graph.
    pub fn new(graph: &Graph, calibrator: Calibrator) -> Collector {
        let inputs: BTreeSet<ValueId> = graph.inputs().iter().map(|n| n.out()).collect();
        let seen = |(&v, name): (&ValueId, &String)| Seen {
            name: name.clone(),
            is_input: inputs.contains(&v),
            samples: 0,
            elements: 0,
            not_finite: 0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            constant: 0,
            integral: true,
            distinct: BTreeSet::new(),
            histogram: matches!(calibrator, Calibrator::Percentile(_)).then(Histogram::new),
        };
        let names: BTreeMap<ValueId, String> =
            observed_values(graph).into_iter().map(|v| (v, value_name(graph, v))).collect();
        let seen = names.iter().map(|entry| (entry.1.clone(), seen(entry))).collect();
        Collector { calibrator, names, seen }
    }

    /// A collector of no graph, for what others have seen.
    pub fn empty(calibrator: Calibrator) -> Collector {
        Collector { calibrator, names: BTreeMap::new(), seen: BTreeMap::new() }
    }

    /// [`new`](Self::new) for the rest of a model behind values that it has computed: they are no data, which would be linted.
    pub fn of_rest(graph: &Graph, calibrator: Calibrator) -> Collector {
        let mut collector = Collector::new(graph, calibrator);
        collector.seen.values_mut().for_each(|s| s.is_input = false);
        collector
    }

    /// The values to [`record`](Self::record), by id.
    pub fn values(&self) -> impl Iterator<Item = ValueId> {
        self.names.keys().copied()
    }

    /// Takes in the elements of one value on one sample; of a value that is not observed, nothing.
    pub fn record(&mut self, value: ValueId, elements: &[f32]) {
        if let Some(seen) = self.names.get(&value).and_then(|name| self.seen.get_mut(name)) {
            seen.record(elements);
        }
    }

    /// Takes in what another collector of the same model and calibrator has seen, be it at other shapes.
    pub fn merge(&mut self, other: Collector) {
        for (name, theirs) in other.seen {
            match self.seen.entry(name) {
                Entry::Occupied(mut ours) => ours.get_mut().merge(theirs),
                Entry::Vacant(place) => _ = place.insert(theirs),
            }
        }
    }

    /// The ranges, and warnings about the data. Values that were never recorded have no range.
    pub fn finish(self) -> Ranges {
        let seen: Vec<&Seen> = self.seen.values().collect();
        let samples = seen.iter().map(|s| s.samples).max().unwrap_or(0);
        let warnings = lint_data::lint(&seen, samples);
        let values = seen
            .iter()
            .filter(|s| s.min <= s.max)
            .map(|s| (s.name.clone(), s.range(self.calibrator)))
            .collect();
        Ranges { values, samples, warnings }
    }
}

impl Seen {
    fn record(&mut self, elements: &[f32]) {
        self.samples += 1;
        let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
        for &x in elements {
            if !x.is_finite() {
                self.not_finite += 1;
                continue;
            }
            min = min.min(x);
            max = max.max(x);
            if let Some(h) = &mut self.histogram {
                h.add(x);
            }
        }
        self.elements += elements.len() as u64;
        self.constant += u64::from(elements.len() > 1 && min == max);
        self.min = self.min.min(min);
        self.max = self.max.max(max);
        if self.is_input {
            self.integral &= elements.iter().all(|x| x.fract() == 0.0);
            self.remember(fingerprint(elements));
        }
    }

    /// Keeps the smallest fingerprints, so that what is kept does not depend on the order.
    fn remember(&mut self, fingerprint: u64) {
        self.distinct.insert(fingerprint);
        if self.distinct.len() > MOST_FINGERPRINTS {
            self.distinct.pop_last();
        }
    }

    fn merge(&mut self, other: Seen) {
        if self.is_input != other.is_input {
            // The rest of a model was handed an input: the same data once more.
            if other.is_input {
                *self = other;
            }
            return;
        }
        self.samples += other.samples;
        self.elements += other.elements;
        self.not_finite += other.not_finite;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.constant += other.constant;
        self.integral &= other.integral;
        for f in other.distinct {
            self.remember(f);
        }
        if let (Some(ours), Some(theirs)) = (&mut self.histogram, other.histogram) {
            ours.merge(theirs);
        }
    }

    fn range(&self, calibrator: Calibrator) -> Range {
        match (calibrator, &self.histogram) {
            (Calibrator::Percentile(p), Some(h)) => {
                let (lo, hi) = h.tails((1.0 - p / 100.0).max(0.0));
                Range { min: lo.max(self.min), max: hi.min(self.max) }
            }
            _ => Range { min: self.min, max: self.max },
        }
    }
}

/// How many distinct samples of an input are told apart.
pub(crate) const MOST_FINGERPRINTS: usize = 4096;

/// FNV-1a over the bits of the elements.
fn fingerprint(elements: &[f32]) -> u64 {
    elements
        .iter()
        .flat_map(|x| x.to_bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Bins on either side of 0.
const BINS: i64 = 1024;
/// The narrowest bins, 2^−120: below what any activation means, and far from subnormal arithmetic.
const NARROWEST: i32 = -120;

/// Counts of values in bins of width 2^exponent: bin i holds ⌊x·2^−exponent⌋ = i − BINS.
///
/// When a magnitude does not fit, bins are merged by powers of two. ⌊⌊x/w⌋/2⌋ = ⌊x/(2w)⌋: a value ends up in the
/// bin it would have been put in at once, whenever it came.
struct Histogram {
    exponent: i32,
    /// 2^−exponent, exact.
    per_width: f64,
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    fn new() -> Histogram {
        let mut h =
            Histogram { exponent: NARROWEST, per_width: 0.0, counts: vec![0; 2 * BINS as usize], total: 0 };
        h.set_exponent(NARROWEST);
        h
    }

    fn set_exponent(&mut self, exponent: i32) {
        self.exponent = exponent;
        self.per_width = 2f64.powi(-exponent);
    }

    fn add(&mut self, x: f32) {
        // |x| < 2^(e + 1) for e its exponent: bins of 2^(e + 1)/BINS hold it.
        let e = ((x.abs().to_bits() >> 23) as i32) - 127;
        self.widen_to(e + 1 - BINS.ilog2() as i32);
        let bin = (f64::from(x) * self.per_width).floor() as i64;
        self.counts[(bin + BINS) as usize] += 1;
        self.total += 1;
    }

    fn widen_to(&mut self, exponent: i32) {
        if exponent <= self.exponent {
            return;
        }
        let shift = (exponent - self.exponent).min(63);
        let mut counts = vec![0; self.counts.len()];
        for (i, &n) in self.counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            counts[(((i as i64 - BINS) >> shift) + BINS) as usize] += n;
        }
        self.counts = counts;
        self.set_exponent(exponent);
    }

    fn merge(&mut self, mut other: Histogram) {
        let exponent = self.exponent.max(other.exponent);
        self.widen_to(exponent);
        other.widen_to(exponent);
        for (ours, theirs) in self.counts.iter_mut().zip(other.counts) {
            *ours += theirs;
        }
        self.total += other.total;
    }

    /// Edges of bins with at most `share` of all values below the first and above the second.
    fn tails(&self, share: f64) -> (f32, f32) {
        let most = (share * self.total as f64) as u64;
        let width = 2f64.powi(self.exponent);
        let mut edges = [0, 0];
        let mut below = 0;
        for (i, n) in self.counts.iter().enumerate() {
            below += n;
            if below > most {
                edges[0] = i as i64 - BINS;
                break;
            }
        }
        let mut above = 0;
        for (i, n) in self.counts.iter().enumerate().rev() {
            above += n;
            if above > most {
                edges[1] = i as i64 - BINS + 1;
                break;
            }
        }
        let [lo, hi] = edges.map(|e| (e as f64 * width) as f32);
        (lo, hi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_does_not_depend_on_order_or_split() {
        let values: Vec<f32> =
            (0..2000).map(|i| ((i * 7919) % 2003) as f32 * 1.7e-3 - 1.1).chain([93.0, -1e-9, 0.0]).collect();
        let fill = |values: &[f32]| {
            let mut h = Histogram::new();
            values.iter().for_each(|&x| h.add(x));
            h
        };
        let forward = fill(&values);
        let mut reversed = values.clone();
        reversed.reverse();
        let backward = fill(&reversed);
        let mut merged = fill(&values[..700]);
        merged.merge(fill(&values[700..]));
        for other in [&backward, &merged] {
            assert_eq!((forward.exponent, &forward.counts), (other.exponent, &other.counts));
        }
    }

    #[test]
    fn tails_cut_outliers_and_keep_the_rest() {
        let mut h = Histogram::new();
        (0..9999).for_each(|i| h.add(i as f32 / 9999.0));
        h.add(100.0);
        let (lo, hi) = h.tails(0.001);
        assert!(lo.abs() < 0.2 && (0.9..1.2).contains(&hi), "{lo} {hi}");
        assert!(h.tails(0.0).1 >= 100.0);
    }

    #[test]
    fn extreme_values_find_a_bin() {
        let mut h = Histogram::new();
        for x in [f32::MAX, f32::MIN, f32::MIN_POSITIVE, -1e-45, 0.0, -0.0, 1.0] {
            h.add(x);
        }
        assert_eq!(h.counts.iter().sum::<u64>(), 7);
        let (lo, hi) = h.tails(0.0);
        assert!(lo <= f32::MIN && hi >= f32::MAX, "{lo} {hi}");
    }
}
