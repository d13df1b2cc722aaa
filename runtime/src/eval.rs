//! Accuracy: how often models are right, how often they agree, and how far their outputs are apart.

use crate::{Difference, Error, Feed, Model, Session, TensorView, Threads, sqnr::SquaredError};
use qcc_codegen::Parallel;
use qcc_ir::Tensor;
use serde::Serialize;
use std::sync::{
    OnceLock,
    atomic::{AtomicUsize, Ordering},
};

/// What [`evaluate`] found.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Evaluation {
    /// Number of samples.
    pub samples: usize,
    /// One for each model, in their order.
    pub scores: Vec<Score>,
}

/// What was found of one model.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Score {
    /// Share of samples whose label scores highest; `None` without labels.
    pub top1: Option<f64>,
    /// Share of samples whose label is among the five highest.
    pub top5: Option<f64>,
    /// Share of samples for which the highest score is that of the first model.
    pub agreement: f64,
    /// Signal-to-noise ratio of the scores against the first model's, in dB; infinite where they are equal, and
    /// then `null` in JSON.
    pub sqnr_db: f64,
}

/// Sums over some samples.
#[derive(Clone, Copy, Default)]
struct Counts {
    top1: usize,
    top5: usize,
    agreement: usize,
    error: SquaredError,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.top1 += other.top1;
        self.top5 += other.top5;
        self.agreement += other.agreement;
        self.error += other.error;
    }
}

/// Runs models on the same samples and compares their scores (one row a sample: the first output that has rows of floats) with the labels
/// and with those of the first model. `progress` is told how many batches are done.
///
/// Samples are shared out to the threads; what is found does not depend on their number.
///
/// # Errors
/// Where the models do not take the same inputs or give the same outputs, samples cannot be read, or a label is beyond
/// the model's classes.
pub fn evaluate(
    models: &[Model],
    feed: &Feed,
    threads: &Threads,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Evaluation, Error> {
    check(models)?;
    let batches = feed.batches();
    // Sessions hold memory: few chunks, but enough for threads that start late to find work.
    let chunk = batches.div_ceil(threads.count() * 4).max(1);
    let done = AtomicUsize::new(0);
    let run_chunk = |first: usize| -> Result<Vec<Vec<Counts>>, Error> {
        let mut sessions: Vec<Session> =
            models.iter().map(|m| Session::with_threads(m, Threads::one())).collect();
        let batch = |i| {
            let counts = run_batch(&mut sessions, feed, i)?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, batches);
            Ok(counts)
        };
        (first..batches.min(first + chunk)).map(batch).collect()
    };
    let firsts: Vec<usize> = (0..batches).step_by(chunk).collect();
    let slots: Vec<OnceLock<Result<Vec<Vec<Counts>>, Error>>> =
        firsts.iter().map(|_| OnceLock::new()).collect();
    threads.run(firsts.len(), &|i| _ = slots[i].get_or_init(|| run_chunk(firsts[i])));
    // `run` has filled every slot.
    let chunks = slots.into_iter().filter_map(OnceLock::into_inner).collect::<Result<Vec<_>, Error>>()?;
    // Summed in the order of the samples: floats do not add up the same in any other.
    let mut totals = vec![Counts::default(); models.len()];
    for counts in chunks.iter().flatten() {
        totals.iter_mut().zip(counts).for_each(|(t, c)| t.add(c));
    }
    let samples = feed.samples();
    let share = |n: usize| n as f64 / samples as f64;
    let labelled = feed.labels().is_some();
    let score = |c: &Counts| Score {
        top1: labelled.then(|| share(c.top1)),
        top5: labelled.then(|| share(c.top5)),
        agreement: share(c.agreement),
        sqnr_db: c.error.sqnr_db(),
    };
    Ok(Evaluation { samples, scores: totals.iter().map(score).collect() })
}

impl Difference {
    /// Runs two models of the same inputs on the same samples. The last batch counts with what fills it up.
    pub(crate) fn between(expected: &Model, got: &Model, feed: &Feed) -> Result<Difference, Error> {
        let mut sessions = [expected, got].map(|m| Session::with_threads(m, Threads::one()));
        let (mut agreeing, mut rows, mut largest, mut magnitude) = (0, 0, 0f64, 0f64);
        for i in 0..feed.batches() {
            let batch = feed.batch(i)?;
            let views: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
            let [expected, got] = &mut sessions;
            for (n, (e, g)) in expected.run(&views)?.iter().zip(&got.run(&views)?).enumerate() {
                let (Some(e), Some(g)) = (scores(e), scores(g)) else { continue };
                for (&e, &g) in e.iter().zip(&g) {
                    largest = largest.max((f64::from(e) - f64::from(g)).abs());
                    magnitude = magnitude.max(f64::from(e).abs());
                }
                if n == 0 && !e.is_empty() {
                    let width = e.len() / feed.batch_size().min(e.len());
                    let pairs = || e.chunks_exact(width).zip(g.chunks_exact(width));
                    rows += pairs().count();
                    agreeing += pairs().filter(|(e, g)| best(e) == best(g)).count();
                }
            }
        }
        let agreement = if rows == 0 { 1.0 } else { agreeing as f64 / rows as f64 };
        Ok(Difference { samples: feed.samples(), agreement, largest, magnitude })
    }
}

fn check(models: &[Model]) -> Result<(), Error> {
    let Some((first, others)) = models.split_first() else { return Ok(()) };
    let refuse = |why: String| Err(Error::Evaluation(why));
    let at = scored(first);
    let Some(output) = first.outputs().get(at) else { return refuse("the model has no outputs".into()) };
    for other in others {
        if !same_inputs(first, other) || other.outputs().get(at).map(|o| &o.ty) != Some(&output.ty) {
            return refuse("models can only be compared where their inputs and scores are the same".into());
        }
    }
    let is_rows = output.ty.shape.rank() >= 2 && output.ty.shape.elements() > 0;
    match is_rows && (output.ty.dtype.is_float() || output.ty.dtype.is_integer()) {
        true => Ok(()),
        false => refuse(format!("output `{}` is {}, not a row of scores a sample", output.name, output.ty)),
    }
}

/// The output that holds the scores: the first one with rows of floats, of those that have any; a model may hand integers on, too,
/// or give the best class itself.
fn scored(model: &Model) -> usize {
    let is_rows = |o: &crate::TensorInfo| o.ty.dtype.is_float() && o.ty.shape.rank() >= 2;
    model.outputs().iter().position(is_rows).unwrap_or(0)
}

/// Whether two models take the same; on what grid a model reads its input is its own business.
fn same_inputs(a: &Model, b: &Model) -> bool {
    let of = |m: &Model| -> Vec<_> {
        m.inputs().iter().map(|i| (i.name.clone(), i.ty.dtype, i.ty.shape.clone())).collect()
    };
    of(a) == of(b)
}

/// Counts of each model on one batch.
fn run_batch(sessions: &mut [Session], feed: &Feed, index: usize) -> Result<Vec<Counts>, Error> {
    let batch = feed.batch(index)?;
    let views: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
    let first = index * feed.batch_size();
    // The last batch is filled up with copies, which do not count.
    let count = feed.batch_size().min(feed.samples() - first);
    let mut outputs = Vec::with_capacity(sessions.len());
    for session in sessions.iter_mut() {
        let at = scored(session.model());
        let output = session.run(&views)?.swap_remove(at);
        outputs.push(scores(&output).ok_or_else(|| Error::Evaluation("scores are not numbers".into()))?);
    }
    let mut counts = vec![Counts::default(); sessions.len()];
    let Some(reference) = outputs.first() else { return Ok(counts) };
    let width = reference.len() / feed.batch_size();
    for i in 0..count {
        let row = i * width..(i + 1) * width;
        let expected = &reference[row.clone()];
        for (c, output) in counts.iter_mut().zip(&outputs) {
            let got = &output[row.clone()];
            c.agreement += usize::from(best(got) == best(expected));
            c.error += SquaredError::of(got, expected);
            if let Some(&label) = feed.labels().and_then(|l| l.get(first + i)) {
                let rank = rank(got, label as usize).ok_or_else(|| {
                    Error::Evaluation(format!(
                        "sample {}: label {label}, but the model has {width} classes",
                        first + i
                    ))
                })?;
                c.top1 += usize::from(rank == 0);
                c.top5 += usize::from(rank < 5);
            }
        }
    }
    Ok(counts)
}

fn scores(output: &Tensor) -> Option<Vec<f32>> {
    output.to_f32().or_else(|| Some(output.to_i64()?.into_iter().map(|x| x as f32).collect()))
}

/// Index of the highest score, the first of equals; NaN is below everything.
fn best(scores: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in scores.iter().enumerate() {
        if *x > scores[best] || scores[best].is_nan() && !x.is_nan() {
            best = i;
        }
    }
    best
}

/// How many classes come before `label`: higher scores, and equal ones of lower index.
fn rank(scores: &[f32], label: usize) -> Option<usize> {
    let own = *scores.get(label)?;
    if own.is_nan() {
        return Some(scores.len());
    }
    Some(scores.iter().enumerate().filter(|&(i, x)| *x > own || (*x == own && i < label)).count())
}

/// The `k` highest scores with their indices, the highest first, equal ones by index.
pub fn top(scores: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut ranked: Vec<(usize, f32)> = scores.iter().copied().enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.truncate(k);
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_rank_by_index_and_nan_comes_last() {
        let s = [1.0, 3.0, 3.0, f32::NAN, 2.0];
        assert_eq!(best(&s), 1);
        assert_eq!(best(&[f32::NAN, -1.0]), 1);
        assert_eq!([0, 1, 2, 3, 4].map(|l| rank(&s, l)), [Some(3), Some(0), Some(1), Some(5), Some(2)]);
        assert_eq!(rank(&s, 5), None);
        assert_eq!(top(&[1.0, 3.0, 3.0], 2), [(1, 3.0), (2, 3.0)]);
    }
}
