//! What float computes on some samples, and how far quantized networks are from it.

use super::{Compiler, Event, Prepared};
use crate::{
    Error, Feed, Model,
    observe::{Batch, Observed, observe},
    sqnr::SquaredError,
};
use qcc_ir::{Graph, ValueId};
use qcc_passes::{Options, Precision, Ranges};
use std::ops::AddAssign;

/// What float computes.
pub(crate) struct Reference {
    feed: Feed,
    /// Of each batch, for each result the elements of samples that count.
    results: Vec<Vec<Vec<f32>>>,
}

impl Reference {
    /// Runs a prepared float graph. All its results are kept.
    pub(crate) fn new(compiler: &Compiler, graph: &Graph, feed: Feed) -> Result<Reference, Error> {
        let feed = feed.kept()?;
        let values = results(graph);
        let observed = [Observed::new(compiler, graph, &values)?];
        let mut results = Vec::with_capacity(feed.batches());
        observe(
            &observed,
            &feed,
            &compiler.threads_of_calibration()?,
            || (),
            |(), batch| Ok((0..values.len()).map(|i| batch.floats(0, i).to_vec()).collect::<Vec<_>>()),
            |of_batch| {
                results.push(of_batch);
                Ok(())
            },
        )?;
        Ok(Reference { feed, results })
    }

    /// The samples.
    pub(crate) fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Noise over signal in what a fake-quantized graph computes of a typical sample: the geometric mean over samples, and the mean
    /// over results. A few samples with values that no range knows have most of the noise of all, and are no measure of the
    /// others.
    pub(crate) fn typical_noise(&self, compiler: &Compiler, quantized: &Graph) -> Result<f64, Error> {
        let observed = Observed::new(compiler, quantized, &results(quantized))?;
        let count = self.results.first().map_or(0, Vec::len);
        let mut sums = vec![Logarithms::default(); count];
        self.compare(
            compiler,
            observed,
            |batch, i, expected| {
                let length = expected.len() / batch.samples_of(0, i).count().max(1);
                let pairs = batch.samples_of(0, i).zip(expected.chunks_exact(length.max(1)));
                pairs.map(|(got, expected)| Logarithms::of(SquaredError::of(got, expected))).collect()
            },
            |i, of_sample: Logarithms| sums[i] += of_sample,
        )?;
        let means: Vec<f64> = sums.iter().filter_map(|l| l.geometric_mean()).collect();
        Ok(means.iter().sum::<f64>() / means.len().max(1) as f64)
    }

    /// Noise over signal in what a compiled model computes of all samples: the mean over its results.
    pub(crate) fn noise_of(&self, compiler: &Compiler, model: &Model) -> Result<f64, Error> {
        let mut sums = vec![SquaredError::default(); self.results.first().map_or(0, Vec::len)];
        self.compare(
            compiler,
            Observed::results_of(model),
            |batch, i, expected| vec![SquaredError::of(batch.floats(0, i), expected)],
            |i, of_batch| sums[i] += of_batch,
        )?;
        Ok(SquaredError::mean_ratio(&sums))
    }

    /// Runs what is observed, and folds what `with` finds in each result of each batch, beside what float has for it, in their order.
    fn compare<T: Send>(
        &self,
        compiler: &Compiler,
        observed: Observed,
        with: impl Fn(&Batch<'_>, usize, &[f32]) -> Vec<T> + Sync,
        mut fold: impl FnMut(usize, T),
    ) -> Result<(), Error> {
        observe(
            &[observed],
            &self.feed,
            &compiler.threads_of_calibration()?,
            || (),
            |(), batch| {
                let expected = self.results[batch.index].iter().enumerate();
                Ok(expected.map(|(i, expected)| with(batch, i, expected)).collect::<Vec<_>>())
            },
            |of_batch| {
                for (i, found) in of_batch.into_iter().enumerate() {
                    found.into_iter().for_each(|f| fold(i, f));
                }
                Ok(())
            },
        )
        .map(drop)
    }
}

/// The least noise over signal that is told from none, which has no logarithm.
const LEAST: f64 = 1e-30;

/// Sums of logarithms of noise over signal.
#[derive(Clone, Copy, Default)]
struct Logarithms {
    sum: f64,
    count: u64,
}

impl Logarithms {
    /// Of one sample; nothing where it has no signal.
    fn of(error: SquaredError) -> Logarithms {
        match error.signal > 0.0 {
            true => Logarithms { sum: error.ratio().max(LEAST).ln(), count: 1 },
            false => Logarithms::default(),
        }
    }

    fn geometric_mean(self) -> Option<f64> {
        (self.count > 0).then(|| (self.sum / self.count as f64).exp())
    }
}

impl AddAssign for Logarithms {
    fn add_assign(&mut self, other: Logarithms) {
        self.sum += other.sum;
        self.count += other.count;
    }
}

fn results(graph: &Graph) -> Vec<ValueId> {
    graph.outputs().iter().map(|o| o.value).collect()
}

impl Compiler {
    /// The prepared graph with grids, as fake-quant and int8 get them.
    pub(crate) fn fake_quantized(&self, prepared: &Prepared, ranges: &Ranges) -> Result<Graph, Error> {
        let mut graph = prepared.graph().clone();
        let options = Options {
            requant: self.requant_of(prepared),
            precision: Precision::FakeQuant,
            ..self.pass_options()
        };
        qcc_passes::quantize(&mut graph, ranges, &options, &mut |_, _| {})?;
        Ok(graph)
    }
}

/// Progress over a known number of runs.
pub(crate) struct Runs<'a> {
    compiler: &'a Compiler,
    done: usize,
    total: usize,
}

impl Runs<'_> {
    pub(crate) fn new(compiler: &Compiler, total: usize) -> Runs<'_> {
        Runs { compiler, done: 0, total: total.max(1) }
    }

    pub(crate) fn step(&mut self) {
        self.done = (self.done + 1).min(self.total - 1);
        self.compiler.tell(Event::Measuring { done: self.done, total: self.total });
    }

    pub(crate) fn finish(&mut self) {
        self.compiler.tell(Event::Measuring { done: self.total, total: self.total });
    }
}
