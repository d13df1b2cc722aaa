//! Ranges of activations, collected in one stream over samples in bounded memory.
//!
//! A [`Collector`] takes in the values of samples and becomes [`Statistics`], of which each [`Calibrator`] makes ranges, all
//! of them from one pass over the samples. `docs/calibration.md` has the formulas and their sources.
//!
//! For each observed value a collector holds about 100 bytes, and where its calibrator asks for more than extremes a
//! histogram of 64 KiB; for each input the fingerprints of up to 4,096 samples, some 100 KB; and 64 KiB of counters in all. Nothing
//! grows with the number of samples or the size of tensors.

mod batch_norms;
mod calibrators;
mod distribution;
mod entropy;
mod histogram;
mod mse;
mod search;
mod trial;

pub use batch_norms::{ChannelStatistics, behind_batch_norms, renormalised};
pub use calibrators::{Calibrator, Calibrators, Choice, UnknownCalibrator};
pub use distribution::{Distribution, PERCENTILES};
pub use trial::{Trial, trial};

use crate::{
    Context, Options,
    capability::int8_capability,
    edit::{activations, is_move},
    insert_fake_quant::{clamp_behind, range_of},
    lint::{
        Finding,
        samples::{self, Distinct, Numbers},
    },
};
use histogram::{Counters, Histogram};
use qcc_ir::{DType, Graph, Stage, ValueId};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

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

/// The ranges that the grids of values have which samples can leave, as [`quantize`](crate::quantize) makes them of these: of what
/// is observed, but for inputs that are pixels, results that a clamp follows (which has the grid), and what is only moved.
pub fn grid_ranges(graph: &Graph, ranges: &Ranges) -> Vec<(ValueId, Range)> {
    let options = Options::default();
    let ctx = Context::new(&options, ranges);
    let range = |value: ValueId| {
        let is_moved = graph.op(value.node).is_some_and(is_move);
        let has_own =
            !is_moved && clamp_behind(graph, value.node).is_none() && ranges.get(graph, value).is_some();
        has_own.then(|| range_of(graph, &ctx, value).ok()).flatten().map(|range| (value, range))
    };
    observed_values(graph).into_iter().filter_map(range).collect()
}

/// The key of a value in [`Ranges`]: its node's name, with `:port` after the first output.
pub fn value_name(graph: &Graph, value: ValueId) -> String {
    let name = &graph.node(value.node).name;
    match value.port {
        0 => name.clone(),
        p => format!("{name}:{p}"),
    }
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
    pub fn union(self, other: Range) -> Range {
        Range { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

/// Ranges by value name, and what looks wrong with the data.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Ranges {
    /// Range of each value, by the name of its node (`name:1` for a second output).
    pub values: BTreeMap<String, Range>,
    /// Number of samples seen.
    pub samples: u64,
    /// What looks wrong with the samples.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// How ranges were found where that was by trying; one sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What is to be repaired by what follows.
    #[serde(default)]
    pub repairs: crate::Repairs,
    /// By how much channels are scaled in the graph that has these ranges.
    #[serde(default)]
    pub scales: crate::ChannelScales,
    /// Moments of the inputs of products, where their weights are to be rounded by them. They are large, and no part of a file.
    #[serde(skip)]
    pub moments: crate::InputMoments,
    /// What was rounded by them so far.
    #[serde(skip)]
    pub rounded: Arc<crate::RoundedWeights>,
    /// What is added to biases so that means of results are those of float.
    #[serde(default)]
    pub shifts: crate::BiasShifts,
}

impl Ranges {
    pub(crate) fn get(&self, graph: &Graph, value: ValueId) -> Option<Range> {
        self.values.get(&value_name(graph, value)).copied()
    }
}

/// Collects what calibration needs of the [`observed_values`] of a graph.
///
/// What it [counts](Self::count) depends on the multiset of samples alone, not on their order or on how they were split
/// among collectors that were [merged](Self::merge): counts are integers and histogram bins only ever double in width.
/// [Moving averages](Calibrator::MovingAverage) depend on the order of samples, so one collector must
/// [follow](Self::follow) all of them in that order.
pub struct Collector {
    calibrators: Calibrators,
    /// Names of this graph's values.
    names: BTreeMap<ValueId, String>,
    seen: BTreeMap<String, Seen>,
    counters: Option<Counters>,
}

/// What was seen of one value.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) is_input: bool,
    pub(crate) samples: u64,
    pub(crate) elements: u64,
    pub(crate) not_finite: u64,
    pub(crate) min: f32,
    pub(crate) max: f32,
    /// Samples all of whose elements were equal.
    pub(crate) constant: Numbers,
    /// Samples with elements that are not finite.
    pub(crate) with_odd: Numbers,
    /// Whether every element was an integer.
    pub(crate) integral: bool,
    /// Whether it is an input that takes pictures.
    pub(crate) is_picture: bool,
    /// Which samples are copies; of inputs only.
    pub(crate) distinct: Distinct,
    histogram: Option<Histogram>,
    average: Option<Average>,
}

/// A moving average of extremes.
#[derive(Clone, Copy)]
struct Average {
    /// Of a new sample.
    weight: f64,
    /// Smallest and largest value.
    ends: Option<[f64; 2]>,
}

/// The smallest and the largest finite element of a sample.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Extremes {
    /// Infinity where there is none.
    pub min: f32,
    /// −infinity where there is none.
    pub max: f32,
    /// Number of elements that are not finite.
    pub not_finite: u64,
}

impl Extremes {
    /// Of these elements.
    pub fn of(elements: &[f32]) -> Extremes {
        // Lanes that do not depend on each other, of the same few operations each: compilers make vectors of them.
        const LANES: usize = 16;
        let (mut least, mut most, mut bad) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0; LANES]);
        let mut not_finite = 0;
        for block in elements.chunks(1 << 20) {
            let mut rows = block.chunks_exact(LANES);
            let mut take = |i: usize, x: f32| {
                let is_finite = x.abs() <= f32::MAX;
                let (lo, hi) = if is_finite { (x, x) } else { (f32::INFINITY, f32::NEG_INFINITY) };
                least[i] = if lo < least[i] { lo } else { least[i] };
                most[i] = if hi > most[i] { hi } else { most[i] };
                bad[i] += u32::from(!is_finite);
            };
            for row in &mut rows {
                (0..LANES).for_each(|i| take(i, row[i]));
            }
            rows.remainder().iter().for_each(|&x| take(0, x));
            not_finite += bad.iter_mut().map(|n| u64::from(std::mem::take(n))).sum::<u64>();
        }
        Extremes {
            min: least.into_iter().fold(f32::INFINITY, f32::min),
            max: most.into_iter().fold(f32::NEG_INFINITY, f32::max),
            not_finite,
        }
    }
}

impl Collector {
    /// A collector for the observed values of a prepared graph.
    pub fn new(graph: &Graph, calibrators: impl Into<Calibrators>) -> Collector {
        Collector::of_values(graph, observed_values(graph), calibrators)
    }

    /// A collector for any values of a graph.
    pub fn of_values(
        graph: &Graph,
        values: impl IntoIterator<Item = ValueId>,
        calibrators: impl Into<Calibrators>,
    ) -> Collector {
        let calibrators = calibrators.into();
        let inputs: BTreeSet<ValueId> = graph.inputs().iter().map(|n| n.out()).collect();
        let names: BTreeMap<ValueId, String> =
            values.into_iter().map(|v| (v, value_name(graph, v))).collect();
        let seen = |(v, name): (&ValueId, &String)| {
            let seen = Seen::new(name, inputs.contains(v), calibrators.of(name));
            let is_picture = seen.is_input && takes_pictures(graph, *v);
            (name.clone(), Seen { is_picture, ..seen })
        };
        let seen = names.iter().map(seen).collect();
        Collector { names, seen, calibrators, counters: None }
    }

    /// A collector of no graph, for what others have seen.
    pub fn empty(calibrators: impl Into<Calibrators>) -> Collector {
        let calibrators = calibrators.into();
        Collector { calibrators, names: BTreeMap::new(), seen: BTreeMap::new(), counters: None }
    }

    /// [`new`](Self::new) for the rest of a model behind values that it has computed: they are no data, which would be linted.
    pub fn of_rest(graph: &Graph, calibrators: impl Into<Calibrators>) -> Collector {
        let mut collector = Collector::new(graph, calibrators);
        collector.seen.values_mut().for_each(|s| s.is_input = false);
        collector
    }

    /// The values to [`record`](Self::record), by id.
    pub fn values(&self) -> impl Iterator<Item = ValueId> {
        self.names.keys().copied()
    }

    /// Names for which a calibrator was chosen though no such value is observed.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.calibrators.values.keys().map(String::as_str).filter(|name| !self.seen.contains_key(*name))
    }

    /// Takes in the elements of one value on one sample, which has this number among all; of a value that is not observed,
    /// nothing. Samples must come in their order.
    pub fn record(&mut self, value: ValueId, number: u64, elements: &[f32]) {
        if let Some(extremes) = self.count(value, number, elements) {
            self.follow(value, extremes);
        }
    }

    /// [`record`](Self::record) but for what depends on the order of samples, which is left to who can
    /// [follow](Self::follow) it. `None` for a value that is not observed.
    pub fn count(&mut self, value: ValueId, number: u64, elements: &[f32]) -> Option<Extremes> {
        let seen = self.names.get(&value).and_then(|name| self.seen.get_mut(name))?;
        Some(seen.count(number, elements, &mut self.counters))
    }

    /// Whether [`follow`](Self::follow) has anything to do.
    pub fn follows(&self) -> bool {
        self.seen.values().any(|s| s.average.is_some())
    }

    /// Takes in the extremes of the next sample into moving averages.
    pub fn follow(&mut self, value: ValueId, sample: Extremes) {
        if let Some(seen) = self.names.get(&value).and_then(|name| self.seen.get_mut(name)) {
            seen.follow(sample);
        }
    }

    /// Takes in what another collector of the same model and calibrators has counted, be it at other shapes.
    pub fn merge(&mut self, other: Collector) {
        for (name, theirs) in other.seen {
            match self.seen.entry(name) {
                Entry::Occupied(mut ours) => ours.get_mut().merge(theirs),
                Entry::Vacant(place) => _ = place.insert(theirs),
            }
        }
    }

    /// What was seen.
    pub fn into_statistics(self) -> Statistics {
        Statistics { calibrators: self.calibrators, seen: self.seen }
    }

    /// The ranges, and what looks wrong with the data. Values that were never recorded have no range.
    pub fn finish(self) -> Ranges {
        self.into_statistics().ranges()
    }
}

/// What was seen of the values of a model, of which ranges can be made in any way.
#[derive(Clone)]
pub struct Statistics {
    calibrators: Calibrators,
    seen: BTreeMap<String, Seen>,
}

impl Statistics {
    /// The ranges by the calibrators that were asked for, and what looks wrong with the data. Where they were to be measured
    /// ([`Choice::Auto`]) and nobody has, the expected error decides: [`Calibrator::Mse`].
    pub fn ranges(&self) -> Ranges {
        self.ranges_by(&|name| self.calibrators.of(name).unwrap_or(Calibrator::Mse))
    }

    /// The ranges by other calibrators. Values of which too little was kept for theirs have all that was seen as their range.
    pub fn ranges_by(&self, calibrator: &dyn Fn(&str) -> Calibrator) -> Ranges {
        let seen: Vec<&Seen> = self.seen.values().collect();
        let count = self.samples();
        let findings = samples::lint(&seen, count);
        let range = |s: &&Seen| (s.name.clone(), s.range(calibrator(&s.name)));
        let values = seen.iter().filter(|s| s.min <= s.max).map(range).collect();
        Ranges { values, samples: count, findings, ..Ranges::default() }
    }

    /// The calibrators that were asked for.
    pub fn calibrators(&self) -> &Calibrators {
        &self.calibrators
    }

    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.seen.values().map(|s| s.samples).max().unwrap_or(0)
    }
}

impl Seen {
    fn new(name: &str, is_input: bool, calibrator: Option<Calibrator>) -> Seen {
        Seen {
            name: name.into(),
            is_input,
            samples: 0,
            elements: 0,
            not_finite: 0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            constant: Numbers::default(),
            with_odd: Numbers::default(),
            integral: true,
            is_picture: false,
            distinct: Distinct::default(),
            histogram: calibrator.is_none_or(Calibrator::needs_histogram).then(Histogram::new),
            average: match calibrator {
                Some(Calibrator::MovingAverage(weight)) => Some(Average { weight, ends: None }),
                _ => None,
            },
        }
    }

    fn count(&mut self, number: u64, elements: &[f32], counters: &mut Option<Counters>) -> Extremes {
        let extremes = Extremes::of(elements);
        let Extremes { min, max, not_finite } = extremes;
        self.samples += 1;
        self.elements += elements.len() as u64;
        self.not_finite += not_finite;
        if elements.len() > 1 && min == max {
            self.constant.add(number);
        }
        if not_finite > 0 {
            self.with_odd.add(number);
        }
        self.min = self.min.min(min);
        self.max = self.max.max(max);
        if let Some(h) = &mut self.histogram {
            h.add(elements, &extremes, counters.get_or_insert_with(Counters::new));
        }
        if self.is_input {
            self.integral = self.integral && elements.iter().all(|x| x.fract() == 0.0);
            self.distinct.add(fingerprint(elements), number);
        }
        extremes
    }

    fn follow(&mut self, sample: Extremes) {
        if let Some(Average { weight, ends }) = self.average.as_mut().filter(|_| sample.min <= sample.max) {
            let new = [sample.min, sample.max].map(f64::from);
            let moved = |old: [f64; 2]| [0, 1].map(|i| old[i] + *weight * (new[i] - old[i]));
            *ends = Some(ends.map_or(new, moved));
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
        if let (Some(ours), Some(theirs)) = (&mut self.average, other.average) {
            ours.merge(theirs, [self.samples, other.samples]);
        }
        self.samples += other.samples;
        self.elements += other.elements;
        self.not_finite += other.not_finite;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.constant.merge(other.constant);
        self.with_odd.merge(other.with_odd);
        self.integral &= other.integral;
        self.distinct.merge(other.distinct);
        if let (Some(ours), Some(theirs)) = (&mut self.histogram, other.histogram) {
            ours.merge(theirs);
        }
    }

    fn range(&self, calibrator: Calibrator) -> Range {
        let seen = Range { min: self.min, max: self.max };
        match (calibrator, &self.histogram, self.average) {
            (Calibrator::MovingAverage(_), _, Some(Average { ends: Some([min, max]), .. })) => {
                Range { min: min as f32, max: max as f32 }
            }
            (Calibrator::Percentile(p), Some(h), _) => {
                let (lo, hi) = h.tails(((100.0 - p) / 100.0).max(0.0));
                Range { min: lo.max(self.min), max: hi.min(self.max) }
            }
            (Calibrator::Entropy, Some(h), _) => entropy::range(h, seen),
            (Calibrator::Mse, Some(h), _) => mse::range(h, seen),
            _ => seen,
        }
    }
}

impl Average {
    /// Averages of two streams of which neither is behind the other, such as those of a model at several shapes: the mean,
    /// by their numbers of samples.
    fn merge(&mut self, other: Average, samples: [u64; 2]) {
        let [ours, theirs] = samples.map(|n| n as f64);
        self.ends = match (self.ends, other.ends) {
            (Some(a), Some(b)) if ours + theirs > 0.0 => {
                Some([0, 1].map(|i| (a[i] * ours + b[i] * theirs) / (ours + theirs)))
            }
            (a, b) => a.or(b),
        };
    }
}

/// Whether an input has the shape of pictures, `[N, C, H, W]` or `[N, H, W, C]` of one channel or three.
fn takes_pictures(graph: &Graph, input: ValueId) -> bool {
    const LEAST_SIDE: usize = 8;
    match *graph.shape(input).dims() {
        [_, 1 | 3, h, w] | [_, h, w, 1 | 3] => h.min(w) >= LEAST_SIDE,
        _ => false,
    }
}

/// How many distinct samples of an input are told apart.
pub(crate) const MOST_FINGERPRINTS: usize = 4096;

/// FNV-1a over the bits of the elements, one at a time.
fn fingerprint(elements: &[f32]) -> u64 {
    let mixed = elements.iter().fold(0xcbf2_9ce4_8422_2325, |h: u64, x| {
        // The upper half comes down, so that all bits of an element reach all of the result.
        let h = (h ^ u64::from(x.to_bits())).wrapping_mul(0x0000_0100_0000_01b3);
        h ^ (h >> 32)
    });
    mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::insert_fake_quant::grid_of;

    /// SplitMix64.
    pub(crate) struct Random(pub(crate) u64);

    impl Random {
        pub(crate) fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        /// From 0 to 1.
        pub(crate) fn uniform(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1u64 << 24) as f32
        }

        /// Of mean 0 and variance 1, by Box and Muller.
        pub(crate) fn normal(&mut self) -> f32 {
            let r = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            r * (std::f32::consts::TAU * self.uniform()).cos()
        }
    }

    /// A value on the grid over a range.
    pub(crate) fn quantized(x: f32, range: Range) -> f32 {
        let grid = grid_of(range).unwrap();
        qcc_ir::numerics::fake_quant(x, grid.scale, grid.zero_point, grid.lo, grid.hi)
    }

    fn seen(calibrator: Calibrator, samples: &[Vec<f32>]) -> Seen {
        let mut seen = Seen::new("x", false, Some(calibrator));
        let mut counters = None;
        for (number, sample) in (0..).zip(samples) {
            let extremes = seen.count(number, sample, &mut counters);
            seen.follow(extremes);
        }
        seen
    }

    #[test]
    fn extremes_leave_out_what_is_not_finite() {
        let mut values: Vec<f32> = (0..1000).map(|i| ((i * 37) % 1000) as f32 - 300.0).collect();
        values[17] = f32::NAN;
        values[999] = f32::INFINITY;
        values[3] = f32::NEG_INFINITY;
        let of_rest = values.iter().filter(|x| x.is_finite());
        let (min, max) = of_rest.fold((f32::MAX, f32::MIN), |(a, b), x| (x.min(a), x.max(b)));
        assert_eq!(Extremes::of(&values), Extremes { min, max, not_finite: 3 });
        assert!(Extremes::of(&[f32::NAN]).min > Extremes::of(&[]).max);
        for n in 0..40 {
            let few = &values[100..100 + n];
            let least = few.iter().copied().fold(f32::INFINITY, f32::min);
            assert_eq!(Extremes::of(few).min, least);
        }
    }

    #[test]
    fn a_moving_average_follows_the_order_of_samples() {
        let samples = [vec![-1.0, 1.0], vec![-3.0, 5.0], vec![f32::NAN, f32::NAN], vec![0.0, 2.0]];
        let calibrator = Calibrator::MovingAverage(0.25);
        let range = seen(calibrator, &samples).range(calibrator);
        assert_eq!(range, Range { min: -1.5 * 0.75, max: 2.0 });
        let two = [samples[1].clone(), samples[0].clone()];
        assert_ne!(seen(calibrator, &two).range(calibrator), range);
    }

    #[test]
    fn a_percentile_of_few_values_is_exact_to_a_bin() {
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        for (p, last) in [(100.0, 999.0), (99.9, 998.0), (99.0, 989.0), (90.0, 899.0)] {
            let calibrator = Calibrator::Percentile(p);
            let range = seen(calibrator, std::slice::from_ref(&values)).range(calibrator);
            // Bins of 1,024/4,096: the edge behind the last value that stays.
            assert!(range.max >= last && range.max <= last + 0.25, "{p}: {range:?}");
            let first = 999.0 - last;
            assert!(range.min <= first && range.min > first - 0.25, "{p}: {range:?}");
        }
    }

    #[test]
    fn all_calibrators_of_one_pass_keep_within_what_was_seen() {
        let mut random = Random(1);
        let samples: Vec<Vec<f32>> = (0..20).map(|_| (0..500).map(|_| random.normal()).collect()).collect();
        let mut seen = seen(Calibrator::Mse, &samples);
        let all = seen.range(Calibrator::MinMax);
        for calibrator in Calibrator::CANDIDATES {
            let range = seen.range(calibrator);
            assert!(
                range.min >= all.min && range.max <= all.max && range.min < -1.0,
                "{calibrator}: {range:?}"
            );
        }
        seen.histogram = None;
        assert_eq!(seen.range(Calibrator::Mse), all);
    }
}
