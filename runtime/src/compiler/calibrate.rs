//! Ranges of activations: the float graph runs on samples, on all threads, and shows what is in it.

use super::{Compiler, Event, Prepared, graph_inputs, lint, measure::notes};
use crate::{
    Calibration, Error, Feed, Samples, Threads,
    data::dead_leaves,
    dynamic::lock,
    observe::{Observed, ObservedSession, observe},
};
use qcc_ir::{Graph, Tensor, ValueId};
use qcc_passes::{
    Calibrator, Calibrators, ChannelScales, Choice, Collector, Finding, InputMoments, Ranges, RepairChoice,
    Repairs, Statistics, renormalised,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Ranges of a model's values, at whatever shapes, and where they come from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calibrated {
    pub(crate) ranges: Ranges,
    pub(super) summary: Calibration,
}

impl Calibrated {
    /// Where they come from.
    pub fn summary(&self) -> &Calibration {
        &self.summary
    }

    /// The ranges.
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// What looks wrong with the samples.
    pub fn findings(&self) -> &[Finding] {
        &self.ranges.findings
    }

    pub(crate) fn new(ranges: Ranges, samples: &Samples, calibrator: &Calibrators) -> Calibrated {
        let summary = Calibration {
            origin: samples.origin().into(),
            samples: ranges.samples,
            calibrator: calibrator.clone(),
            synthetic: samples.is_noise(),
            batch_norms: 0,
            repairs: ranges.repairs,
            measured: None,
        };
        let mut ranges = ranges;
        if samples.is_noise() {
            // That noise is no data was said already.
            ranges.findings.clear();
        }
        Calibrated { ranges, summary }
    }

    /// Of a model that brings its own grids, and needs no ranges.
    pub(crate) fn unneeded(calibrator: &Calibrators) -> Calibrated {
        let origin = "the model's own grids".into();
        let summary = Calibration {
            origin,
            samples: 0,
            calibrator: calibrator.clone(),
            synthetic: false,
            batch_norms: 0,
            repairs: Repairs::NONE,
            measured: None,
        };
        Calibrated { ranges: Ranges::default(), summary }
    }
}

/// What was seen of a model on samples.
pub(super) struct Collected {
    pub(super) scales: ChannelScales,
    pub(super) statistics: Statistics,
    pub(super) moments: InputMoments,
}

impl Collected {
    /// Ranges by some calibrators, for some repairs.
    pub(super) fn ranges(&self, calibrators: &Calibrators, repairs: Repairs) -> Ranges {
        let has_moments = repairs.rounding || repairs.bias;
        Ranges {
            repairs,
            scales: self.scales.clone(),
            moments: if has_moments { self.moments.clone() } else { InputMoments::new() },
            ..self.statistics.ranges_by(&|name| calibrators.of(name).unwrap_or(Calibrator::Mse))
        }
    }
}

/// What is seen of a model that is compiled part by part and shape by shape.
pub(crate) struct Observation {
    compiler: Compiler,
    met_grids: AtomicBool,
    /// The number of the sample that runs.
    sample: Arc<AtomicU64>,
    collectors: Mutex<Vec<Arc<Mutex<Collector>>>>,
}

/// One graph of many that shows what a collector wants, and its own results.
pub(crate) struct ObservedPart {
    /// The values of the collector, which come first among those that are shown.
    values: Vec<ValueId>,
    session: Mutex<ObservedSession>,
    sample: Arc<AtomicU64>,
    collector: Arc<Mutex<Collector>>,
}

impl Observation {
    pub(crate) fn new(compiler: &Compiler) -> Observation {
        // What passes have to say comes when they run for good; and weights that are packed for this are for this alone.
        let compiler = Compiler { observer: None, shared: None, ..compiler.clone() };
        Observation {
            compiler: compiler.share_weights(),
            met_grids: AtomicBool::new(false),
            sample: Arc::default(),
            collectors: Mutex::default(),
        }
    }

    /// Makes a graph ready to be observed. A rest has the values of another graph as its inputs.
    pub(crate) fn part(&self, graph: Graph, is_rest: bool) -> Result<ObservedPart, Error> {
        let prepared = self.compiler.prepare(graph)?;
        self.met_grids.fetch_or(prepared.brings_grids(), Ordering::Relaxed);
        let calibrators = self.compiler.calibrators.clone();
        let collector = match is_rest {
            true => Collector::of_rest(prepared.graph(), calibrators),
            false => Collector::new(prepared.graph(), calibrators),
        };
        let values: Vec<ValueId> = collector.values().collect();
        let results = prepared.graph().outputs().iter().map(|o| o.value);
        let shown: Vec<ValueId> = values.iter().copied().chain(results).collect();
        let observed = Observed::new(&self.compiler, prepared.graph(), &shown)?;
        // Samples of any shapes come one at a time, as parts follow each other: threads share each run.
        let session = Mutex::new(observed.session(self.compiler.threads_of_calibration()?));
        let collector = Arc::new(Mutex::new(collector));
        lock(&self.collectors).push(collector.clone());
        Ok(ObservedPart { values, session, sample: self.sample.clone(), collector })
    }

    /// Samples that run from now on have this number.
    pub(crate) fn at(&self, sample: u64) {
        self.sample.store(sample, Ordering::Relaxed);
    }

    /// Whether any part is quantized already.
    pub(crate) fn met_grids(&self) -> bool {
        self.met_grids.load(Ordering::Relaxed)
    }

    /// Whether nothing of what was compiled so far needs a range.
    pub(crate) fn is_idle(&self) -> bool {
        lock(&self.collectors).iter().all(|c| lock(c).values().next().is_none())
    }

    /// The ranges of all that was seen. It is forgotten then.
    pub(crate) fn ranges(&self) -> Ranges {
        let empty = || Collector::empty(self.compiler.calibrators.clone());
        let mut all = empty();
        for collector in lock(&self.collectors).drain(..) {
            all.merge(std::mem::replace(&mut *lock(&collector), empty()));
        }
        all.finish()
    }
}

impl ObservedPart {
    /// Runs one batch, shows it to the collector, and returns the graph's own results.
    pub(crate) fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let mut shown = lock(&self.session).run(inputs)?;
        let results = shown.split_off(self.values.len());
        let mut collector = lock(&self.collector);
        for (value, tensor) in self.values.iter().zip(&shown) {
            collector.record(
                *value,
                self.sample.load(Ordering::Relaxed),
                tensor.as_slice().unwrap_or_default(),
            );
        }
        Ok(results)
    }
}

impl Compiler {
    /// Runs the prepared graph in float on the samples, on all threads, and makes ranges of what it sees, the same for any
    /// number of threads; and whatever repairs need to know. A graph that brings its own grids needs none.
    ///
    /// # Errors
    /// Where samples cannot be read or do not fit the model, or a calibrator is for a value that is not observed.
    pub fn calibrate(&self, prepared: &Prepared) -> Result<Calibrated, Error> {
        if prepared.brings_grids() {
            return Ok(Calibrated::unneeded(&self.calibrators));
        }
        match &self.samples {
            Some(samples) if !samples.is_noise() => self.calibrate_on(prepared, samples),
            given => self.calibrate_without_data(prepared, given.as_ref()),
        }
    }

    fn calibrate_on(&self, prepared: &Prepared, samples: &Samples) -> Result<Calibrated, Error> {
        let is_open = self.calibrators.all == Choice::Auto || self.repairs == RepairChoice::Auto;
        let can_tell = is_open && !prepared.graph().inputs().is_empty();
        let measured = can_tell.then(|| self.measured(prepared, samples)).transpose()?;
        let (calibrators, repairs) = match (&measured, self.repairs) {
            (Some(m), _) => (&m.calibrators, m.repairs),
            (None, RepairChoice::These(repairs)) => (&self.calibrators, repairs),
            (None, RepairChoice::Auto) => (&self.calibrators, Repairs::NONE),
        };
        let mut ranges = self.ranges(prepared, samples, calibrators, repairs)?;
        let looked = self.look_at_samples(prepared, samples)?;
        lint::without_judged(&mut ranges.findings, &looked.judged);
        ranges.findings.extend(looked.findings);
        ranges.findings.retain(|f| !self.options.allowed.contains(&f.rule));
        if !prepared.graph().inputs().is_empty() {
            let feed = samples.bind(&graph_inputs(prepared.graph()), &self.preprocess)?;
            lint::locate(&mut ranges.findings, &feed);
        }
        ranges.notes = measured.as_ref().map(notes).unwrap_or_default();
        let mut calibrated = Calibrated::new(ranges, samples, &self.calibrators);
        calibrated.summary.measured = measured;
        Ok(calibrated)
    }

    /// What a calibration would be on other samples, with the calibrators and repairs that it has found.
    pub(crate) fn calibrated_like(
        &self,
        prepared: &Prepared,
        found: &Calibrated,
        samples: &Samples,
    ) -> Result<Calibrated, Error> {
        let summary = found.summary();
        let calibrators = summary.measured.as_ref().map_or(&summary.calibrator, |m| &m.calibrators);
        let ranges = self.ranges(prepared, samples, calibrators, summary.repairs)?;
        Ok(Calibrated::new(ranges, samples, calibrators))
    }

    /// Ranges of samples by these calibrators, with all that these repairs need.
    fn ranges(
        &self,
        prepared: &Prepared,
        samples: &Samples,
        calibrators: &Calibrators,
        repairs: Repairs,
    ) -> Result<Ranges, Error> {
        let collected = self.collected(prepared, samples, calibrators, repairs)?;
        self.with_means(prepared, collected.ranges(calibrators, repairs), samples)
    }

    /// Ranges of noise, brought to what batch norms tell.
    fn calibrate_without_data(
        &self,
        prepared: &Prepared,
        noise: Option<&Samples>,
    ) -> Result<Calibrated, Error> {
        let none = BTreeMap::new();
        let batch_norms = if noise.is_none() { &prepared.report.batch_norms } else { &none };
        let (normal, mut places) = renormalised(prepared.graph(), batch_norms)?;
        if self.options.interchange {
            // Other runtimes make no integer op of a product whose result has no grid: then a poor range is better than none.
            places.retain(|_, place| place.is_some());
        }
        let samples = match noise {
            Some(samples) => samples.clone(),
            None if places.is_empty() => Samples::noise(),
            None => {
                let pictures = dead_leaves(&graph_inputs(prepared.graph()), &self.preprocess)?;
                pictures.unwrap_or_else(Samples::noise)
            }
        };
        let count = places.values().flatten().count();
        match (noise.is_none(), count) {
            (true, 0) => self.warn_of_noise(),
            (true, n) => self.warn_of_batch_norms(n),
            (false, _) => {}
        }
        let statistics = self.statistics(prepared.graph(), &normal, &places, &samples, &self.calibrators)?;
        let repairs = self.repairs_of_weights();
        let ranges = Ranges { repairs, ..statistics.ranges() };
        let mut calibrated = Calibrated::new(ranges, &samples, &self.calibrators);
        if count > 0 {
            calibrated.summary.batch_norms = count;
            calibrated.summary.origin =
                format!("{} with the statistics of {count} batch norms", samples.origin());
        }
        Ok(calibrated)
    }

    /// Of the repairs that were asked for, those that need no samples.
    pub(crate) fn repairs_of_weights(&self) -> Repairs {
        match self.repairs {
            RepairChoice::These(Repairs { scales, .. }) => Repairs { scales, ..Repairs::NONE },
            RepairChoice::Auto => Repairs::NONE,
        }
    }

    /// What calibrators and repairs need to know of the samples. Statistics and moments are those of the graph that is to be
    /// quantized, in which channels are scaled.
    pub(super) fn collected(
        &self,
        prepared: &Prepared,
        samples: &Samples,
        calibrators: &Calibrators,
        repairs: Repairs,
    ) -> Result<Collected, Error> {
        let scales = self.channel_scales(prepared, samples, repairs.equalize)?;
        let scaled = prepared.scaled(&scales)?;
        let graph = scaled.graph();
        let statistics = self.statistics(graph, graph, &BTreeMap::new(), samples, calibrators)?;
        let moments = self.input_moments(graph, samples, repairs)?;
        Ok(Collected { scales, statistics, moments })
    }

    /// What is seen of the values of a prepared graph on samples when another one runs for it, where some of them have
    /// other places.
    fn statistics(
        &self,
        graph: &Graph,
        runs: &Graph,
        places: &BTreeMap<ValueId, Option<ValueId>>,
        samples: &Samples,
        calibrators: &Calibrators,
    ) -> Result<Statistics, Error> {
        let collector = || Collector::new(graph, calibrators.clone());
        let mut all = collector();
        if let Some(name) = all.unknown().next() {
            return Err(Error::Calibration(format!(
                "`{name}` has a calibrator of its own and no range to be chosen: ranges are of the values that integer ops \
                 take and make, by the names that the plan has for them (qcc inspect)"
            )));
        }
        let values: Vec<ValueId> = all.values().collect();
        if values.is_empty() || graph.inputs().is_empty() {
            return Ok(all.into_statistics());
        }
        let feed = samples.bind(&graph_inputs(graph), &self.preprocess)?;
        // Each value by itself, or what stands for it.
        let place = |v: &ValueId| Some((*v, places.get(v).copied().unwrap_or(Some(*v))?));
        let (values, shown): (Vec<ValueId>, Vec<ValueId>) = values.iter().filter_map(place).unzip();
        let observed = Observed::of_sets(self, runs, &shown)?;
        let counted = self.count(&[observed], &feed, &values, &mut all, &collector)?;
        counted.into_iter().for_each(|c| all.merge(c));
        Ok(all.into_statistics())
    }

    /// Counts the values that the first of some graphs shows, in a collector for each thread; `all` follows what depends on
    /// the order of samples.
    fn count(
        &self,
        observed: &[Observed],
        feed: &Feed,
        values: &[ValueId],
        all: &mut Collector,
        collector: &(dyn Fn() -> Collector + Sync),
    ) -> Result<Vec<Collector>, Error> {
        let follows = all.follows();
        let mut done = 0;
        observe(
            observed,
            feed,
            &self.threads_of_calibration()?,
            collector,
            |own, batch| {
                let mut extremes = Vec::new();
                for (i, &value) in values.iter().enumerate() {
                    let numbers = (batch.index * batch.size) as u64..;
                    let samples = numbers.zip(batch.samples_of(0, i));
                    let of_samples = samples.filter_map(|(number, sample)| own.count(value, number, sample));
                    match follows {
                        true => extremes.extend(of_samples.map(|e| (value, e))),
                        false => of_samples.for_each(drop),
                    }
                }
                Ok(extremes)
            },
            |extremes| {
                extremes.into_iter().for_each(|(value, e)| all.follow(value, e));
                done += 1;
                self.tell(Event::Calibrating { done, total: feed.batches() });
                Ok(())
            },
        )
    }

    pub(crate) fn warn_of_noise(&self) {
        self.tell(Event::Warning(
            "no calibration data: ranges come from synthetic noise. The result is good for timing; \
             its accuracy means nothing. Give samples of real inputs (--calibrate), or quantize when the model runs, \
             which needs none (--precision int8-dynamic: matrix products, as of transformers)",
        ));
    }

    fn warn_of_batch_norms(&self, count: usize) {
        self.tell(Event::Warning(&format!(
            "no calibration data: ranges come from made-up inputs, brought to the mean and deviation behind each of {count} \
             batch norms; the results of the last product, of which these say nothing, are not rounded. Ranges are near to those of real inputs, \
             but nothing was measured: samples (--calibrate) are better"
        )));
    }

    /// The threads that samples are run on.
    pub(crate) fn threads_of_calibration(&self) -> Result<Threads, Error> {
        Ok(match &self.calibration_threads {
            Some(threads) => threads.clone(),
            None => Threads::new(0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Calibrator, bundled};

    fn compiler(batch: usize) -> Compiler {
        Compiler::new().shape("image", [batch, 1, 28, 28]).preprocess(bundled::preprocess())
    }

    fn prepared(compiler: &Compiler) -> Prepared {
        compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap()
    }

    #[test]
    fn ranges_do_not_depend_on_threads_nor_on_how_samples_are_batched() {
        let samples = bundled::calibration().unwrap().limit(20);
        for calibrator in Calibrator::CANDIDATES.into_iter().chain([Calibrator::MovingAverage(0.1)]) {
            let ranges = |threads: usize, batch: usize| {
                let compiler = compiler(batch)
                    .calibration(samples.clone())
                    .calibrator(calibrator)
                    // Which rows moments are of depends on batches.
                    .repairs(Repairs::NONE)
                    .calibration_threads(Threads::new(threads).unwrap());
                compiler.calibrate(&prepared(&compiler)).unwrap().ranges().clone()
            };
            let one = ranges(1, 3);
            assert_eq!((one.samples, one.findings.len()), (20, 0), "{:?}", one.findings);
            for threads in [2, 3, 8] {
                assert_eq!(ranges(threads, 3), one, "{calibrator}, {threads} threads");
            }
            // The last batch of three is filled up with copies, which must not count; sums of floats are the same here, as
            // each sample is computed by itself.
            assert_eq!(ranges(2, 1), one, "{calibrator}, one by one");
        }
    }

    #[test]
    fn single_values_have_calibrators_of_their_own() {
        let samples = bundled::calibration().unwrap().limit(12);
        let min_max = compiler(1).calibration(samples);
        let graph = prepared(&min_max);
        let all = min_max.calibrate(&graph).unwrap();
        let name = all.ranges().values.keys().nth(2).unwrap().clone();
        let mut calibrators = Calibrators::default();
        calibrators.values.insert(name.clone(), Calibrator::Percentile(90.0));
        let own = min_max.clone().calibrator(calibrators.clone()).calibrate(&graph).unwrap();
        let differs = |(n, r): &(&String, &qcc_passes::Range)| own.ranges().values[*n] != **r;
        let differing: Vec<_> = all.ranges().values.iter().filter(differs).map(|(n, _)| n.clone()).collect();
        assert_eq!(differing, [name]);
        calibrators.values.insert("nothing".into(), Calibrator::Mse);
        let unknown = min_max.calibrator(calibrators).calibrate(&graph).unwrap_err().to_string();
        assert!(unknown.contains("`nothing`"), "{unknown}");
    }

    #[test]
    fn the_best_of_all_calibrators_is_no_worse_than_any_on_what_was_measured() {
        let samples = bundled::calibration().unwrap().limit(24);
        let run = |threads: usize| {
            let auto = compiler(1).calibration(samples.clone()).calibrator(Choice::Auto);
            let auto = auto.calibration_threads(Threads::new(threads).unwrap());
            auto.calibrate(&prepared(&auto)).unwrap()
        };
        let found = run(1);
        let measured = found.summary().measured.clone().unwrap();
        assert!(measured.attempts.len() >= Calibrator::CANDIDATES.len());
        assert_eq!((measured.samples, measured.fitted), (6, 18));
        let best = measured.attempts.iter().map(|a| a.sqnr_db).fold(0.0, f64::max);
        let chosen = measured.calibrators.to_string();
        let of_chosen = measured.attempts.iter().find(|a| a.calibrators == chosen).unwrap();
        assert!(of_chosen.sqnr_db > best - 0.11, "{measured:?}");
        let notes = &found.ranges().notes;
        assert!(best > 20.0 && notes[0].contains(&chosen), "{notes:?}");
        let three = run(3);
        assert_eq!((three.ranges(), three.summary()), (found.ranges(), found.summary()));
    }

    #[test]
    fn batch_norms_stand_in_for_data() {
        let free = compiler(1);
        let graph = prepared(&free);
        let found = free.calibrate(&graph).unwrap();
        assert!(found.summary().batch_norms > 5 && found.summary().synthetic, "{:?}", found.summary());
        assert!(found.summary().origin.contains("batch norms"));
        let data = free.clone().calibration(bundled::calibration().unwrap());
        let data = data.calibrate(&graph).unwrap();
        let noise = free.calibration(Samples::noise()).calibrate(&graph).unwrap();
        assert_eq!((noise.summary().batch_norms, data.summary().batch_norms), (0, 0));
        // Ranges are nearer to those of data, by the mean of |log₂| of their ratio.
        let distance = |of: &Calibrated| {
            let mut ratios = Vec::new();
            for (name, range) in &of.ranges().values {
                let real = data.ranges().values[name];
                ratios.push(f64::from((range.max - range.min) / (real.max - real.min)).log2().abs());
            }
            ratios.iter().sum::<f64>() / ratios.len() as f64
        };
        let (free, noise) = (distance(&found), distance(&noise));
        assert!(free < noise && free < 0.75, "{free} {noise}");
    }
}
