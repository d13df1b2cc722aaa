//! What the values of graphs are while they run on samples: the one facility by which calibration and all that repairs,
//! measures or explains a quantized model sees inside of it.
//!
//! [`Observed`] is a graph that is compiled to show some of its values. [`observe`] runs one or more of them side by side
//! on the batches of a [`Feed`], on as many threads as are given, and hands what is seen to two functions:
//!
//! * `look` is called once a batch on the thread that ran it, with that thread's own state, and reduces the values to a
//!   small result;
//! * `fold` is called on the caller's thread with these results, in the order of the batches.
//!
//! So whatever is folded is the same for any number of threads, floating-point sums included. The states of the threads
//! are given back at the end; which batches went into which of them depends on the number of threads, so they are for
//! what can be merged in any order (counts, extremes).
//!
//! Memory does not depend on the number of samples: each thread holds one session of each graph, the shown values of one
//! batch, and at most [`RESULTS_IN_FLIGHT`] results that were not yet folded.
//!
//! ```
//! # fn main() -> Result<(), qcc_runtime::Error> {
//! use qcc_runtime::{Compiler, Threads, bundled, graph_inputs, observe::{Observed, observe}};
//!
//! let compiler = Compiler::new();
//! let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8)?)?;
//! let graph = prepared.graph();
//! let logits = graph.outputs()[0].value;
//! let shown = [Observed::new(&compiler, graph, &[logits])?];
//! let feed = bundled::calibration()?.limit(16).bind(&graph_inputs(graph), &bundled::preprocess())?;
//!
//! let mut sum = 0.0;
//! observe(
//!     &shown,
//!     &feed,
//!     &Threads::new(0)?,
//!     || (),
//!     |(), batch| Ok(batch.floats(0, 0).iter().map(|x| f64::from(*x)).sum::<f64>()),
//!     |of_batch| {
//!         sum += of_batch;
//!         Ok(())
//!     },
//! )?;
//! # assert!(sum.is_finite());
//! # Ok(())
//! # }
//! ```

use crate::{
    Compiler, Error, Feed, JitOptions, Model, Precision, Program, ProgramInfo, Session, TensorView, Threads,
    ThreadsError, model::output_views,
};
use bytes::{Bytes, BytesMut};
use qcc_ir::{Graph, Output, Stage, Tensor, ValueId};
use qcc_passes::{Options, Report};
use std::{
    panic,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, ScopedJoinHandle},
};

/// Results of a thread that may wait to be folded. One is enough for a thread to go on while others are waited for.
pub const RESULTS_IN_FLIGHT: usize = 2;

/// A graph that shows some of its values. Immutable; threads share it, and each has a [session](Self::session) of its own.
pub struct Observed {
    /// None where nothing but inputs is to be seen.
    model: Option<Model>,
    /// Where each value that was asked for comes from, in the order of asking.
    places: Arc<[Place]>,
}

/// Where a value is seen.
#[derive(Clone, Copy)]
enum Place {
    /// Input of this number: it needs no run.
    Input(usize),
    /// Output of this number.
    Output(usize),
}

impl Observed {
    /// Compiles a graph at [`Stage::Float`], or at [`Stage::FakeQuant`] (which is then computed in float on its grids), to
    /// show these values, by the order of which they are told apart afterwards. The graph itself stays as it is.
    /// What does not contribute to them is not computed.
    ///
    /// # Errors
    /// Where the graph cannot be lowered or compiled.
    pub fn new(compiler: &Compiler, graph: &Graph, values: &[ValueId]) -> Result<Observed, Error> {
        Observed::lowered(compiler, graph, values, options_of(graph))
    }

    /// [`new`](Self::new) for who takes values as sets of numbers: the axes behind the first one come in the order in which code
    /// makes them, which saves bringing them to that of the graph.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_sets(compiler: &Compiler, graph: &Graph, values: &[ValueId]) -> Result<Observed, Error> {
        Observed::lowered(compiler, graph, values, Options { any_order: true, ..options_of(graph) })
    }

    /// Compiles a graph to show these values as the model that comes of it has them, with these options: codes of
    /// [`Precision::Int8`] are shown as the numbers that they stand for.
    /// Of a graph at [`Stage::FakeQuant`], only
    /// values that [`quantized_layers`](qcc_passes::quantized_layers) names leave the rest as it is without them.
    ///
    /// # Errors
    /// Where the graph cannot be lowered or compiled.
    pub(crate) fn lowered(
        compiler: &Compiler,
        graph: &Graph,
        values: &[ValueId],
        options: Options,
    ) -> Result<Observed, Error> {
        let mut outputs: Vec<Output> = Vec::new();
        let mut places = Vec::with_capacity(values.len());
        for &value in values {
            let input = graph.inputs().iter().position(|n| n.out() == value);
            places.push(input.map_or_else(
                || {
                    let known = outputs.iter().position(|o| o.value == value);
                    Place::Output(known.unwrap_or_else(|| {
                        outputs.push(Output { name: format!("observed {value}"), value });
                        outputs.len() - 1
                    }))
                },
                Place::Input,
            ));
        }
        let model = match outputs.is_empty() {
            true => None,
            false => Some(compile(compiler, graph, outputs, options)?),
        };
        Ok(Observed { model, places: places.into() })
    }

    /// A compiled model that shows its results.
    pub fn results_of(model: &Model) -> Observed {
        let places = (0..model.outputs().len()).map(Place::Output).collect();
        Observed { model: Some(model.clone()), places }
    }

    /// One caller's state to run the graph with.
    pub fn session(&self, threads: Threads) -> ObservedSession {
        let session = self.model.as_ref().map(|m| Session::with_threads(m, threads));
        ObservedSession { session, places: self.places.clone(), outputs: Vec::new() }
    }
}

/// How a graph is lowered to be seen. Without pins: they are meant for the model that comes out, and may name integer devices.
fn options_of(graph: &Graph) -> Options {
    let precision = match graph.stage {
        Stage::FakeQuant => Precision::FakeQuant,
        _ => Precision::Float,
    };
    Options { capability: qcc_codegen::capability, precision, ..Options::default() }
}

/// The model of a graph with other outputs.
fn compile(
    compiler: &Compiler,
    graph: &Graph,
    outputs: Vec<Output>,
    options: Options,
) -> Result<Model, Error> {
    let mut graph = graph.clone();
    graph.set_outputs(outputs);
    graph.remove_dead();
    qcc_passes::lower(&mut graph, &options, &mut |_, _| {})?;
    let precision = options.precision;
    let info = ProgramInfo { precision, ..compiler.info(&graph, options.requant, None, &Report::default()) };
    let jit = JitOptions { listing: false, ..compiler.jit_options()? }.threads(Threads::one());
    Ok(Program::new(graph, info).jit(&jit)?)
}

/// One caller's state of an [`Observed`] graph: the memory of its intermediate values, and of what it shows.
pub struct ObservedSession {
    session: Option<Session>,
    places: Arc<[Place]>,
    /// The bytes of the outputs of the last run.
    outputs: Vec<Bytes>,
}

impl ObservedSession {
    /// Runs one batch of inputs and gives the values that were asked for, in that order. Memory of values that were
    /// dropped meanwhile is used again.
    ///
    /// # Errors
    /// Where the inputs are not the graph's.
    pub fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let computed = match &mut self.session {
            Some(session) => run_into(session, &mut self.outputs, inputs)?,
            None => Vec::new(),
        };
        let value = |place: &Place| match *place {
            Place::Input(i) => inputs.get(i).cloned().ok_or_else(|| missing(i)),
            Place::Output(i) => Ok(computed[i].clone()),
        };
        self.places.iter().map(value).collect()
    }
}

fn missing(input: usize) -> Error {
    let reason = "no value was given for it".into();
    Error::Graph(qcc_ir::Error::Input { input: format!("number {input}"), reason })
}

/// Runs a session into the memory of its last outputs, where nobody has kept them. Fresh memory would have to be zeroed
/// and mapped page by page, which takes as long as some networks do.
fn run_into(
    session: &mut Session,
    outputs: &mut Vec<Bytes>,
    inputs: &[Tensor],
) -> Result<Vec<Tensor>, Error> {
    let model = session.model().clone();
    let mut old = std::mem::take(outputs).into_iter();
    let mut buffers: Vec<BytesMut> = model
        .outputs()
        .iter()
        .map(|o| {
            let free = old.next().and_then(|bytes| bytes.try_into_mut().ok());
            free.filter(|b| b.len() == o.ty.bytes()).unwrap_or_else(|| BytesMut::zeroed(o.ty.bytes()))
        })
        .collect();
    let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
    let mut places = output_views(model.outputs(), buffers.iter_mut().map(|b| &mut b[..]));
    session.run_into(&views, &mut places)?;
    drop(places);
    outputs.extend(buffers.into_iter().map(BytesMut::freeze));
    let tensor = |(info, bytes): (&crate::TensorInfo, &Bytes)| {
        let tensor = Tensor::from_bytes(info.ty.dtype, info.ty.shape.clone(), bytes.clone());
        tensor.map_err(|e| qcc_ir::Error::Input { input: info.name.clone(), reason: e.to_string() }.into())
    };
    model.outputs().iter().zip(outputs.iter()).map(tensor).collect()
}

/// What is seen of one batch.
pub struct Batch<'a> {
    /// Its number, from 0.
    pub index: usize,
    /// Its samples that count: all of them, but in the last batch, which is filled up with copies.
    pub samples: usize,
    /// Its samples, with copies: the model's first dimension.
    pub size: usize,
    /// For each graph the values that it was made to show, in the order of asking.
    pub values: &'a [Vec<Tensor>],
}

impl Batch<'_> {
    /// The elements of a value that are of samples which count; none of a value that is not of `f32`.
    pub fn floats(&self, graph: usize, value: usize) -> &[f32] {
        let Some(tensor) = self.values.get(graph).and_then(|v| v.get(value)) else { return &[] };
        let elements = tensor.as_slice::<f32>().unwrap_or_default();
        match self.divides(tensor) {
            true => &elements[..elements.len() / self.size * self.samples],
            false => elements,
        }
    }

    /// The elements of a value sample by sample, of those that count. A value without an axis of samples, such as one
    /// that is computed of constants alone or in which another axis comes first, comes as a whole.
    pub fn samples_of(&self, graph: usize, value: usize) -> impl Iterator<Item = &[f32]> {
        let elements = self.floats(graph, value);
        let tensor = self.values.get(graph).and_then(|v| v.get(value));
        let parts = if tensor.is_some_and(|t| self.divides(t)) { self.samples } else { 1 };
        let length = elements.len() / parts.max(1);
        (0..parts).map(move |i| &elements[i * length..(i + 1) * length])
    }

    /// Whether the first axis of a value is that of the samples.
    fn divides(&self, tensor: &Tensor) -> bool {
        self.size > 0 && tensor.shape().first() == Some(&self.size)
    }
}

/// Runs graphs side by side on all batches of a feed. `state` makes the state of each thread, `look` reduces what it sees
/// of a batch to a result, and `fold` takes the results in the order of the batches. The states come back in the order of
/// threads: thread `w` of `n` had batches w, w + n, w + 2n…
///
/// # Errors
/// The first error in the order of batches: of reading it, of running it, of `look` or `fold`; or where the system gives
/// no threads.
pub fn observe<S: Send, R: Send>(
    graphs: &[Observed],
    feed: &Feed,
    threads: &Threads,
    state: impl Fn() -> S + Sync,
    look: impl Fn(&mut S, &Batch<'_>) -> Result<R, Error> + Sync,
    mut fold: impl FnMut(R) -> Result<(), Error>,
) -> Result<Vec<S>, Error> {
    let batches = feed.batches();
    let workers = threads.count().min(batches).max(1);
    let work = |worker: usize, mut done: Box<dyn FnMut(Result<R, Error>) -> bool + '_>| {
        let mut own = state();
        let mut sessions: Vec<_> = graphs.iter().map(|g| g.session(Threads::one())).collect();
        for index in (worker..batches).step_by(workers) {
            let result = see(&mut sessions, feed, index, &mut own, &look);
            let failed = result.is_err();
            if !done(result) || failed {
                break;
            }
        }
        own
    };
    if workers == 1 {
        let mut folded = Ok(());
        let own = work(
            0,
            Box::new(|result| {
                folded = result.and_then(&mut fold);
                folded.is_ok()
            }),
        );
        return folded.map(|()| vec![own]);
    }
    thread::scope(|scope| {
        let mut channels: Vec<Receiver<Result<R, Error>>> = Vec::with_capacity(workers);
        let mut handles: Vec<ScopedJoinHandle<'_, S>> = Vec::with_capacity(workers);
        for worker in 0..workers {
            let (sender, receiver): (SyncSender<_>, _) = sync_channel(RESULTS_IN_FLIGHT);
            let work = &work;
            // Who folds has stopped listening after an error: then this thread stops, too.
            let run = move || work(worker, Box::new(move |result| sender.send(result).is_ok()));
            let named = thread::Builder::new().name(format!("qcc-observe-{worker}"));
            let started = named.spawn_scoped(scope, run);
            handles.push(started.map_err(|e| ThreadsError { count: workers, reason: e.to_string() })?);
            channels.push(receiver);
        }
        let mut folded = Ok(());
        for index in 0..batches {
            // A channel that ends early is that of a thread that panicked, which joining it will tell.
            let Ok(result) = channels[index % workers].recv() else { break };
            folded = result.and_then(&mut fold);
            if folded.is_err() {
                break;
            }
        }
        drop(channels);
        let mut states = Vec::with_capacity(workers);
        for handle in handles {
            states.push(handle.join().unwrap_or_else(|payload| panic::resume_unwind(payload)));
        }
        folded.map(|()| states)
    })
}

/// Runs one batch through all graphs and looks at it.
fn see<S, R>(
    sessions: &mut [ObservedSession],
    feed: &Feed,
    index: usize,
    own: &mut S,
    look: &impl Fn(&mut S, &Batch<'_>) -> Result<R, Error>,
) -> Result<R, Error> {
    let inputs = feed.batch(index)?;
    let mut values = Vec::with_capacity(sessions.len());
    for session in sessions {
        values.push(session.run(&inputs)?);
    }
    let (samples, size) = (feed.samples_in(index), feed.batch_size());
    look(own, &Batch { index, samples, size, values: &values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Samples, bundled, graph_inputs};
    use qcc_ir::{DType, Shape};

    fn prepared(batch: usize) -> (Compiler, Graph) {
        let compiler = Compiler::new().shape("image", [batch, 1, 28, 28]);
        let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        let graph = compiler.prepare(graph).unwrap().graph().clone();
        (compiler, graph)
    }

    fn feed(graph: &Graph, samples: usize) -> Feed {
        let samples = bundled::calibration().unwrap().limit(samples);
        samples.bind(&graph_inputs(graph), &bundled::preprocess()).unwrap()
    }

    /// The input, every product, and the result.
    fn values(graph: &Graph) -> Vec<ValueId> {
        let inputs = graph.inputs().iter().map(|n| n.out());
        let computed = graph.nodes().filter(|(_, n)| n.op().is_some()).map(|(id, _)| id.out());
        inputs.chain(computed).chain(graph.outputs().iter().map(|o| o.value)).collect()
    }

    #[test]
    fn what_is_folded_is_the_same_for_any_number_of_threads() {
        let (compiler, graph) = prepared(3);
        let values = values(&graph);
        let shown = [Observed::new(&compiler, &graph, &values).unwrap()];
        let feed = feed(&graph, 23);
        let run = |threads: usize| {
            let (mut order, mut sums) = (Vec::new(), vec![0f64; values.len()]);
            let states = observe(
                &shown,
                &feed,
                &Threads::new(threads).unwrap(),
                || 0,
                |seen: &mut usize, batch| {
                    *seen += batch.samples;
                    let sum = |v| batch.floats(0, v).iter().map(|x| f64::from(*x)).sum::<f64>();
                    Ok((batch.index, (0..values.len()).map(sum).collect::<Vec<f64>>()))
                },
                |(index, of_batch)| {
                    order.push(index);
                    sums.iter_mut().zip(of_batch).for_each(|(s, x)| *s += x);
                    Ok(())
                },
            );
            assert_eq!(order, (0..8).collect::<Vec<_>>());
            let states = states.unwrap();
            assert_eq!((states.len(), states.iter().sum::<usize>()), (threads.min(8), 23));
            sums
        };
        let one = run(1);
        assert!(one.iter().all(|s| s.is_finite() && *s != 0.0));
        for threads in [2, 3, 8, 11] {
            assert_eq!(run(threads), one, "{threads} threads");
        }
    }

    #[test]
    fn copies_that_fill_the_last_batch_are_told_apart() {
        let (compiler, graph) = prepared(4);
        let values = values(&graph);
        let shown = [Observed::new(&compiler, &graph, &values).unwrap()];
        let feed = feed(&graph, 6);
        let mut counts = Vec::new();
        let count = |(): &mut (), batch: &Batch<'_>| {
            let length = batch.floats(0, 0).len();
            assert!(batch.samples_of(0, 0).all(|s| s.len() == 28 * 28));
            Ok((batch.samples, length, batch.samples_of(0, 0).count()))
        };
        let fold = |c| {
            counts.push(c);
            Ok(())
        };
        observe(&shown, &feed, &Threads::one(), || (), count, fold).unwrap();
        assert_eq!(counts, [(4, 4 * 784, 4), (2, 2 * 784, 2)]);
    }

    #[test]
    fn graphs_run_side_by_side_and_at_either_stage() {
        let (compiler, graph) = prepared(1);
        let ranges = compiler
            .clone()
            .calibration(bundled::calibration().unwrap().limit(8))
            .preprocess(bundled::preprocess())
            .calibrate(&compiler.prepare(graph.clone()).unwrap())
            .unwrap();
        let mut fake = graph.clone();
        let options = Options { capability: qcc_codegen::capability, ..Options::default() };
        qcc_passes::quantize(&mut fake, &ranges.ranges, &options, &mut |_, _| {}).unwrap();
        let result = |g: &Graph| Observed::new(&compiler, g, &[g.outputs()[0].value]).unwrap();
        let shown = [result(&graph), result(&fake)];
        let (mut signal, mut noise) = (0.0, 0.0);
        let look = |(): &mut (), batch: &Batch<'_>| {
            let pairs = batch.floats(0, 0).iter().zip(batch.floats(1, 0));
            let squares = |(s, n): (f64, f64), (x, y): (&f32, &f32)| {
                (s + f64::from(*x).powi(2), n + f64::from(x - y).powi(2))
            };
            Ok(pairs.fold((0.0, 0.0), squares))
        };
        let fold = |(s, n): (f64, f64)| {
            signal += s;
            noise += n;
            Ok(())
        };
        observe(&shown, &feed(&graph, 8), &Threads::new(2).unwrap(), || (), look, fold).unwrap();
        assert!(noise > 0.0 && signal > 100.0 * noise, "{signal} {noise}");
    }

    #[test]
    fn the_first_error_in_the_order_of_batches_comes_back() {
        let (compiler, graph) = prepared(1);
        let shown = [Observed::new(&compiler, &graph, &values(&graph)[..1]).unwrap()];
        let feed = feed(&graph, 20);
        for threads in [1, 2, 3] {
            let threads = Threads::new(threads).unwrap();
            let look = |(): &mut (), batch: &Batch<'_>| match batch.index {
                i if i >= 7 => Err(Error::Evaluation(format!("batch {i}"))),
                i => Ok(i),
            };
            let mut folded = 0;
            let found = observe(
                &shown,
                &feed,
                &threads,
                || (),
                look,
                |_| {
                    folded += 1;
                    Ok(())
                },
            );
            assert_eq!((found.err().unwrap().to_string().as_str(), folded), ("batch 7", 7));
            let found = observe(
                &shown,
                &feed,
                &threads,
                || (),
                |(), _| Ok(()),
                |()| Err(Error::Evaluation("no".into())),
            );
            assert_eq!(found.err().unwrap().to_string(), "no");
        }
    }

    #[test]
    fn values_that_were_kept_are_not_written_over() {
        let (compiler, graph) = prepared(1);
        let shown = Observed::new(&compiler, &graph, &values(&graph)).unwrap();
        let mut session = shown.session(Threads::one());
        let noise = Samples::noise().bind(&graph_inputs(&graph), &bundled::preprocess()).unwrap();
        let first = session.run(&noise.batch(0).unwrap()).unwrap();
        let copies: Vec<Vec<u8>> = first.iter().map(|t| t.bytes().to_vec()).collect();
        let second = session.run(&noise.batch(1).unwrap()).unwrap();
        assert!(first.iter().zip(&copies).all(|(t, bytes)| t.bytes() == bytes));
        assert_ne!(first.last(), second.last());
        let wrong = Tensor::zeros(DType::F32, Shape::new([1]).unwrap());
        assert!(session.run(&[wrong]).is_err() && session.run(&[]).is_err());
    }
}
