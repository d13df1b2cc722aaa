//! What float computes on some samples, and how far quantized networks are from it.

use super::{Compiler, Event, Prepared};
use crate::{
    Error, Feed, Model,
    observe::{Observed, observe},
    sqnr::SquaredError,
};
use qcc_ir::{Graph, ValueId};
use qcc_passes::{Options, Precision, Ranges};

/// What float computes.
pub(crate) struct Reference {
    feed: Feed,
    /// Of each batch, for each result the elements of samples that count.
    results: Vec<Vec<Vec<f32>>>,
}

impl Reference {
    /// Runs a prepared float graph. All its results are kept.
    pub(crate) fn new(compiler: &Compiler, graph: &Graph, feed: Feed) -> Result<Reference, Error> {
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

    /// Noise over signal in what a fake-quantized graph computes: the mean over its results.
    pub(crate) fn noise(&self, compiler: &Compiler, quantized: &Graph) -> Result<f64, Error> {
        self.noise_in(compiler, Observed::new(compiler, quantized, &results(quantized))?)
    }

    /// The same of a compiled model.
    pub(crate) fn noise_of(&self, compiler: &Compiler, model: &Model) -> Result<f64, Error> {
        self.noise_in(compiler, Observed::results_of(model))
    }

    fn noise_in(&self, compiler: &Compiler, observed: Observed) -> Result<f64, Error> {
        let count = self.results.first().map_or(0, Vec::len);
        let mut sums = vec![SquaredError::default(); count];
        observe(
            &[observed],
            &self.feed,
            &compiler.threads_of_calibration()?,
            || (),
            |(), batch| {
                let of_result =
                    |(i, expected): (usize, &Vec<f32>)| SquaredError::of(batch.floats(0, i), expected);
                Ok(self.results[batch.index].iter().enumerate().map(of_result).collect::<Vec<_>>())
            },
            |of_batch| {
                sums.iter_mut().zip(of_batch).for_each(|(sum, s)| *sum += s);
                Ok(())
            },
        )?;
        Ok(SquaredError::mean_ratio(&sums))
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
