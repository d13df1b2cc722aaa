//! Calibration by measured error: which ranges and repairs leave the least noise in the results of the quantized model.

use super::{
    Compiler, Prepared,
    calibrate::Collected,
    graph_inputs,
    reference::{Reference, Runs},
};
use crate::{
    Error, Feed, Measured, Measurement, Samples,
    observe::{Observed, observe},
    sqnr::{SquaredError, decibels},
};
use qcc_ir::{Graph, ValueId};
use qcc_passes::{Calibrator, Calibrators, Choice, Ranges, RepairChoice, Repairs, trial};
use std::collections::{BTreeMap, BTreeSet};

/// One sample of so many is held out of the ranges, to measure errors on.
const HELD_OUT: usize = 4;
/// Of fewer samples than this, none is held out.
const FEWEST: usize = 16;
/// Samples on which errors are measured, and of which ranges are made for that, at most.
const MOST: [usize; 2] = [64, 256];
/// Bytes of results of the float model that are kept to compare with; larger results take fewer samples.
const MOST_REFERENCE: usize = 256 << 20;
/// Shares of the values that may have calibrators of their own for which it is measured whether they should: those that gain
/// most, first.
const SHARES: [usize; 4] = [8, 4, 2, 1];
/// Differences in dB that are chance.
const CHANCE: f64 = 0.1;

/// One attempt.
struct Attempt {
    calibrators: Calibrators,
    repairs: Repairs,
    /// Noise over signal in the results of a typical sample.
    noise: f64,
}

impl Compiler {
    /// The calibrators and repairs of the least error, of those that the caller leaves to be chosen, as far as a bounded number of
    /// runs finds them. Ranges are made of three quarters of the samples (at most 256), errors measured on the others (at
    /// most 64): what saturates on samples that ranges do not know is an error, too.
    ///
    /// 1. The network is quantized on the ranges of each of the [candidates](Calibrator::CANDIDATES), and its results are
    ///    compared with those of float. The best is for all values.
    /// 2. For each value alone, what each candidate's range costs in the results of the ops that read it is measured in one
    ///    run a candidate. Values for which another one than that of all is best are sorted by what they gain.
    /// 3. The eighth, the quarter, the half of them that gain most, and all of them get it, and the network is compared with
    ///    float again. The best of all attempts is taken.
    /// 4. With it, the network is repaired in each of the ways of [`Repairs::CANDIDATES`] and compared again.
    ///
    /// Values with a calibrator that the caller chose keep it.
    ///
    /// # Errors
    /// Where a sample cannot be read, or a graph cannot be compiled.
    pub(super) fn measured(&self, prepared: &Prepared, samples: &Samples) -> Result<Measurement, Error> {
        let [held, fitted] = self.divided(prepared, samples)?;
        let candidates: &[Repairs] = match &self.repairs {
            RepairChoice::Auto => &Repairs::CANDIDATES,
            RepairChoice::These(given) => std::slice::from_ref(given),
        };
        let ranges = if self.calibrators.all == Choice::Auto {
            Calibrator::CANDIDATES.len() + SHARES.len()
        } else {
            0
        };
        let mut runs = Runs::new(self, ranges + candidates.len());
        let feed = held.bind(&graph_inputs(prepared.graph()), &self.preprocess)?;
        let reference = Reference::new(self, prepared.graph(), feed)?;
        let unscaled = match self.repairs {
            RepairChoice::Auto => Repairs { equalize: 0.0, ..Repairs::ALL },
            RepairChoice::These(given) => given.without_products(),
        };
        let plain = self.collected(prepared, &fitted, &self.calibrators, unscaled)?;
        let mut attempts: Vec<Attempt> = Vec::new();
        let calibrators = match self.calibrators.all {
            Choice::Auto => {
                self.try_calibrators(prepared, &plain, &fitted, &reference, &mut attempts, &mut runs)?;
                attempts[best(&attempts)].calibrators.clone()
            }
            Choice::One(_) => self.calibrators.clone(),
        };
        for &repairs in candidates.iter().filter(|_| self.repairs == RepairChoice::Auto) {
            let is_further = attempts.last().is_some_and(|a| a.repairs.equalize > 0.0);
            if is_further && best(&attempts) + 1 != attempts.len() {
                break;
            }
            if attempts.iter().all(|a| a.calibrators != calibrators || a.repairs != repairs) {
                let own;
                let collected = match repairs.equalize {
                    0.0 => &plain,
                    _ => {
                        own = self.collected(prepared, &fitted, &calibrators, repairs)?;
                        &own
                    }
                };
                let ranges = self.with_means(prepared, collected.ranges(&calibrators, repairs), &fitted)?;
                attempts.push(self.attempt(prepared, &ranges, calibrators.clone(), &reference)?);
            }
            runs.step();
        }
        runs.finish();
        let chosen = &attempts[best(&attempts)];
        let measured = |a: &Attempt| Measured {
            calibrators: a.calibrators.to_string(),
            repairs: a.repairs,
            sqnr_db: decibels(a.noise),
        };
        Ok(Measurement {
            samples: reference.feed().samples(),
            fitted: plain.statistics.samples() as usize,
            attempts: attempts.iter().map(measured).collect(),
            calibrators: chosen.calibrators.clone(),
            repairs: match self.repairs {
                RepairChoice::Auto => chosen.repairs,
                RepairChoice::These(given) => given,
            },
        })
    }

    /// Samples to measure errors on, and samples to make ranges of.
    pub(crate) fn divided(&self, prepared: &Prepared, samples: &Samples) -> Result<[Samples; 2], Error> {
        let count = samples.bind(&graph_inputs(prepared.graph()), &self.preprocess)?.samples();
        let results = prepared.graph().outputs().iter();
        let bytes: usize = results.map(|o| prepared.graph().ty(o.value).bytes()).sum();
        let most = [MOST[0].min(MOST_REFERENCE / bytes.max(1)).max(1), MOST[1]];
        Ok(match count < FEWEST {
            true => [samples.clone().limit(most[0]), samples.clone()],
            false => samples.held_out(HELD_OUT, most),
        })
    }

    /// The steps that are about calibrators. Repairs that go by moments are left out: they take long, and suit all ranges.
    fn try_calibrators(
        &self,
        prepared: &Prepared,
        collected: &Collected,
        fitted: &Samples,
        reference: &Reference,
        attempts: &mut Vec<Attempt>,
        runs: &mut Runs<'_>,
    ) -> Result<(), Error> {
        let repairs = match self.repairs {
            RepairChoice::Auto => Repairs::NONE,
            RepairChoice::These(given) => given.without_products(),
        };
        let scaled = prepared.scaled(&collected.scales)?;
        let given = &self.calibrators.values;
        // Not of the samples on which the outcome is judged.
        let feed = fitted.spread(MOST[0]).bind(&graph_inputs(prepared.graph()), &self.preprocess)?.kept()?;
        let mut costs = Vec::new();
        for candidate in Calibrator::CANDIDATES {
            let calibrators = Calibrators { all: Choice::One(candidate), values: given.clone() };
            let ranges = collected.ranges(&calibrators, repairs);
            costs.push(self.costs(scaled.graph(), &ranges, &feed)?);
            attempts.push(self.attempt(prepared, &ranges, calibrators, reference)?);
            runs.step();
        }
        let base = best(attempts);
        let base_of_all = attempts[base].calibrators.all;
        let mut gains = gains(&costs, base, given);
        gains.sort_by(|a, b| b.gain.total_cmp(&a.gain).then_with(|| a.value.cmp(&b.value)));
        // One count may come of several shares.
        let counts: BTreeSet<usize> = SHARES.iter().map(|share| gains.len().div_ceil(*share)).collect();
        for count in counts.into_iter().filter(|count| *count > 0) {
            let own = gains[..count].iter().map(|g| (g.value.clone(), Calibrator::CANDIDATES[g.candidate]));
            let calibrators = Calibrators { all: base_of_all, values: own.chain(given.clone()).collect() };
            let ranges = collected.ranges(&calibrators, repairs);
            attempts.push(self.attempt(prepared, &ranges, calibrators, reference)?);
            runs.step();
        }
        Ok(())
    }

    /// Quantizes the network and compares its results with those of float.
    fn attempt(
        &self,
        prepared: &Prepared,
        ranges: &Ranges,
        calibrators: Calibrators,
        reference: &Reference,
    ) -> Result<Attempt, Error> {
        let noise = reference.typical_noise(self, &self.fake_quantized(prepared, ranges)?)?;
        Ok(Attempt { calibrators, repairs: ranges.repairs, noise })
    }

    /// For each value, the noise over the signal in what its readers make of it when it alone is on the grid of its range.
    fn costs(&self, graph: &Graph, ranges: &Ranges, feed: &Feed) -> Result<BTreeMap<String, f64>, Error> {
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
        let mut sums = sums.chunks_exact(2);
        let cost = |(name, pairs): (&String, &Vec<[ValueId; 2]>)| {
            let of_reader = |s: &[f64]| SquaredError { noise: s[0], signal: s[1] };
            let readers: Vec<SquaredError> = sums.by_ref().take(pairs.len()).map(of_reader).collect();
            (name.clone(), SquaredError::mean_ratio(&readers))
        };
        Ok(tried.values.iter().map(cost).collect())
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

/// The first attempt that is as good as the best one, but for chance: those that change least come first.
fn best(attempts: &[Attempt]) -> usize {
    let least = attempts.iter().map(|a| a.noise).fold(f64::INFINITY, f64::min);
    let is_as_good = |a: &Attempt| a.noise <= least * 10f64.powf(CHANCE / 10.0);
    attempts.iter().position(is_as_good).unwrap_or(0)
}

/// What was measured, for the report.
pub(super) fn notes(measurement: &Measurement) -> Vec<String> {
    let name = |calibrators: &str, repairs: Repairs| match repairs {
        Repairs::NONE => calibrators.to_string(),
        repairs => format!("{calibrators} with {repairs}"),
    };
    let attempts = measurement
        .attempts
        .iter()
        .map(|a| format!("{} {:.2} dB", name(&a.calibrators, a.repairs), a.sqnr_db));
    let mut notes = vec![format!(
        "ranges by {}: signal to noise of a typical one of {} samples, with ranges of {}: {}",
        name(&measurement.calibrators.to_string(), measurement.repairs),
        measurement.samples,
        measurement.fitted,
        attempts.collect::<Vec<_>>().join(", ")
    )];
    if !measurement.calibrators.values.is_empty() {
        let own = measurement.calibrators.values.iter().map(|(value, c)| format!("`{value}` {c}"));
        notes.push(format!("values with calibrators of their own: {}", own.collect::<Vec<_>>().join(", ")));
    }
    notes
}
