//! Calibration by measured error: which ranges leave the least noise in the results of the quantized model.

use super::{Compiler, Event, Prepared, graph_inputs};
use crate::{
    Error, Feed, Measured, Measurement, Samples,
    observe::{Observed, observe},
    sqnr::{SquaredError, decibels},
};
use qcc_ir::{Graph, ValueId};
use qcc_passes::{Calibrator, Calibrators, Choice, Options, Precision, Ranges, Statistics, trial};
use std::collections::BTreeMap;

/// Samples on which errors are measured, spread over all of them.
const MOST_SAMPLES: usize = 64;
/// Bytes of results of the float model that are kept to compare with; larger results take fewer samples.
const MOST_REFERENCE: usize = 256 << 20;
/// Shares of the values that may have calibrators of their own for which it is measured whether they should: those that gain
/// most, first.
const SHARES: [usize; 4] = [8, 4, 2, 1];

/// One attempt at ranges.
struct Attempt {
    calibrators: Calibrators,
    ranges: Ranges,
    /// Noise over signal in the results.
    noise: f64,
}

impl Compiler {
    /// The ranges of least error, as far as a bounded number of runs finds them.
    ///
    /// 1. The network is quantized on the ranges of each of the [candidates](Calibrator::CANDIDATES), and its results are
    ///    compared with those of float. The best is for all values.
    /// 2. For each value alone, what each candidate's range costs in the results of the ops that read it is measured in one
    ///    run a candidate. Values for which another one than that of all is best are sorted by what they gain.
    /// 3. The eighth, the quarter, the half of them that gain most, and all of them get it, and the network is compared with
    ///    float again. The best of all attempts is taken.
    ///
    /// That is 5 + 5 + 4 quantized networks and runs over at most 64 samples, whatever the size of the model. Values with
    /// a calibrator that the caller chose keep it.
    ///
    /// # Errors
    /// Where a sample cannot be read, or a graph cannot be compiled.
    pub(super) fn measured_ranges(
        &self,
        prepared: &Prepared,
        statistics: &Statistics,
        samples: &Samples,
    ) -> Result<(Ranges, Measurement), Error> {
        let graph = prepared.graph();
        let feed = self.spread(prepared, samples)?;
        let mut runs = Runs { done: 0, total: 2 * Calibrator::CANDIDATES.len() + SHARES.len() + 1 };
        let reference = Reference::new(self, graph, &feed, &mut runs)?;
        let given = &statistics.calibrators().values;
        let mut attempts = Vec::new();
        for candidate in Calibrator::CANDIDATES {
            let calibrators = Calibrators { all: Choice::One(candidate), values: given.clone() };
            attempts.push(self.attempt(prepared, statistics, calibrators, &reference, &mut runs)?);
        }
        let base = best(&attempts);
        let (base_of_all, base_noise) = (attempts[base].calibrators.all, attempts[base].noise);

        let mut costs = Vec::new();
        for attempt in &attempts {
            costs.push(self.costs(graph, &attempt.ranges, &reference.feed, &mut runs)?);
        }
        let mut gains = gains(&costs, base, given);
        gains.sort_by(|a, b| b.gain.total_cmp(&a.gain).then_with(|| a.value.cmp(&b.value)));
        let mut tried = 0;
        for share in SHARES {
            let count = gains.len().div_ceil(share);
            if count == tried {
                // Nothing that was not tried already.
                continue;
            }
            tried = count;
            let own = gains[..count].iter().map(|g| (g.value.clone(), Calibrator::CANDIDATES[g.candidate]));
            let values = own.chain(given.clone()).collect();
            let calibrators = Calibrators { all: base_of_all, values };
            attempts.push(self.attempt(prepared, statistics, calibrators, &reference, &mut runs)?);
        }
        let chosen = best(&attempts);
        runs.finish(self);
        let measured =
            |a: &Attempt| Measured { calibrators: a.calibrators.to_string(), sqnr_db: decibels(a.noise) };
        let measurement = Measurement {
            samples: reference.feed.samples(),
            attempts: attempts.iter().map(measured).collect(),
            chosen: attempts[chosen].calibrators.clone(),
        };
        let mut ranges = attempts.swap_remove(chosen).ranges;
        ranges.notes = notes(&measurement, base_noise);
        Ok((ranges, measurement))
    }

    /// Samples from all over those for calibration, as many as are needed to compare.
    fn spread(&self, prepared: &Prepared, samples: &Samples) -> Result<Feed, Error> {
        let results = prepared.graph().outputs().iter();
        let bytes: usize = results.map(|o| prepared.graph().ty(o.value).bytes()).sum();
        let most = MOST_SAMPLES.min(MOST_REFERENCE / bytes.max(1)).max(1);
        self.spread_over(samples, prepared.graph(), most)
    }

    /// So many samples at most, from all over the given ones.
    pub(super) fn spread_over(&self, samples: &Samples, graph: &Graph, most: usize) -> Result<Feed, Error> {
        let inputs = graph_inputs(graph);
        let count = samples.bind(&inputs, &self.preprocess)?.samples();
        let every = count.div_ceil(most);
        Ok(samples.clone().every(every).limit(count.div_ceil(every)).bind(&inputs, &self.preprocess)?)
    }

    /// Quantizes the network and compares its results with those of float.
    fn attempt(
        &self,
        prepared: &Prepared,
        statistics: &Statistics,
        calibrators: Calibrators,
        reference: &Reference,
        runs: &mut Runs,
    ) -> Result<Attempt, Error> {
        let ranges = statistics.ranges_by(&|name| calibrators.of(name).unwrap_or(Calibrator::Mse));
        let mut graph = prepared.graph().clone();
        let options = Options {
            requant: self.requant_of(prepared),
            precision: Precision::FakeQuant,
            ..self.pass_options()
        };
        qcc_passes::quantize(&mut graph, &ranges, &options, &mut |_, _| {})?;
        let results: Vec<ValueId> = graph.outputs().iter().map(|o| o.value).collect();
        let observed = [Observed::new(self, &graph, &results)?];
        let mut sums = vec![SquaredError::default(); results.len()];
        observe(
            &observed,
            &reference.feed,
            &self.threads_of_calibration()?,
            || (),
            |(), batch| {
                let of_result =
                    |(i, expected): (usize, &Vec<f32>)| SquaredError::of(batch.floats(0, i), expected);
                Ok(reference.results[batch.index].iter().enumerate().map(of_result).collect::<Vec<_>>())
            },
            |of_batch| {
                sums.iter_mut().zip(of_batch).for_each(|(sum, s)| *sum += s);
                Ok(())
            },
        )?;
        runs.step(self);
        Ok(Attempt { calibrators, ranges, noise: SquaredError::mean_ratio(&sums) })
    }

    /// For each value, the noise over the signal in what its readers make of it when it alone is on the grid of its range.
    fn costs(
        &self,
        graph: &Graph,
        ranges: &Ranges,
        feed: &Feed,
        runs: &mut Runs,
    ) -> Result<BTreeMap<String, f64>, Error> {
        let tried = trial(graph, ranges)?;
        let shown: Vec<ValueId> = tried.values.values().flatten().flatten().copied().collect();
        let observed = [Observed::new(self, &tried.graph, &shown)?];
        let mut sums = vec![0.0; shown.len()];
        observe(
            &observed,
            feed,
            &self.threads_of_calibration()?,
            || (),
            |(), batch| {
                let sum = |i| batch.floats(0, i).iter().map(|x| f64::from(*x)).sum::<f64>();
                Ok((0..shown.len()).map(sum).collect::<Vec<_>>())
            },
            |of_batch| {
                sums.iter_mut().zip(of_batch).for_each(|(s, x)| *s += x);
                Ok(())
            },
        )?;
        runs.step(self);
        let mut sums = sums.chunks_exact(2);
        let cost = |(name, pairs): (&String, &Vec<[ValueId; 2]>)| {
            let of_reader = |s: &[f64]| SquaredError { noise: s[0], signal: s[1] };
            let readers: Vec<SquaredError> = sums.by_ref().take(pairs.len()).map(of_reader).collect();
            (name.clone(), SquaredError::mean_ratio(&readers))
        };
        Ok(tried.values.iter().map(cost).collect())
    }
}

/// Progress over a known number of runs.
struct Runs {
    done: usize,
    total: usize,
}

impl Runs {
    fn step(&mut self, compiler: &Compiler) {
        self.done = (self.done + 1).min(self.total - 1);
        compiler.tell(Event::Measuring { done: self.done, total: self.total });
    }

    fn finish(&mut self, compiler: &Compiler) {
        compiler.tell(Event::Measuring { done: self.total, total: self.total });
    }
}

/// What float computes.
struct Reference {
    feed: Feed,
    /// Of each batch, for each result the elements of samples that count.
    results: Vec<Vec<Vec<f32>>>,
}

impl Reference {
    fn new(compiler: &Compiler, graph: &Graph, feed: &Feed, runs: &mut Runs) -> Result<Reference, Error> {
        let values: Vec<ValueId> = graph.outputs().iter().map(|o| o.value).collect();
        let observed = [Observed::new(compiler, graph, &values)?];
        let mut results = Vec::with_capacity(feed.batches());
        observe(
            &observed,
            feed,
            &compiler.threads_of_calibration()?,
            || (),
            |(), batch| Ok((0..values.len()).map(|i| batch.floats(0, i).to_vec()).collect::<Vec<_>>()),
            |of_batch| {
                results.push(of_batch);
                Ok(())
            },
        )?;
        runs.step(compiler);
        Ok(Reference { feed: feed.clone(), results })
    }
}

/// A value that does better with another candidate than with the one for all.
struct Gain {
    value: String,
    candidate: usize,
    gain: f64,
}

/// What values gain, by their costs with each candidate.
fn gains(costs: &[BTreeMap<String, f64>], base: usize, given: &BTreeMap<String, Calibrator>) -> Vec<Gain> {
    let gain = |(value, &cost): (&String, &f64)| {
        let of = |candidate: usize| costs[candidate].get(value).copied().unwrap_or(f64::INFINITY);
        let candidate = (0..costs.len()).min_by(|&a, &b| of(a).total_cmp(&of(b)))?;
        let gain = cost - of(candidate);
        (gain > 0.0).then(|| Gain { value: value.clone(), candidate, gain })
    };
    costs[base].iter().filter(|(value, _)| !given.contains_key(*value)).filter_map(gain).collect()
}

/// The attempt of least noise, the first of equals.
fn best(attempts: &[Attempt]) -> usize {
    (0..attempts.len()).min_by(|&a, &b| attempts[a].noise.total_cmp(&attempts[b].noise)).unwrap_or(0)
}

/// What was measured, for the report.
fn notes(measurement: &Measurement, base_noise: f64) -> Vec<String> {
    let attempts = measurement.attempts.iter().map(|a| format!("{} {:.2} dB", a.calibrators, a.sqnr_db));
    let mut notes = vec![format!(
        "ranges by {}: signal to noise of the results on {} samples: {}",
        measurement.chosen,
        measurement.samples,
        attempts.collect::<Vec<_>>().join(", ")
    )];
    if !measurement.chosen.values.is_empty() {
        let own = measurement.chosen.values.iter().map(|(value, c)| format!("`{value}` {c}"));
        notes.push(format!(
            "values with calibrators of their own, instead of {:.2} dB without them: {}",
            decibels(base_noise),
            own.collect::<Vec<_>>().join(", ")
        ));
    }
    notes
}
