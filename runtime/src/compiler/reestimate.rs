//! Statistics of batch norms, from samples.

use super::{Compiler, Event, graph_inputs};
use crate::{
    Error,
    observe::{Observed, observe},
};
use qcc_ir::{Graph, NodeId, Output};
use qcc_passes::{BatchNormStatistics, ChannelMoments, Options, Precision, next_batch_norms, set_statistics};
use std::sync::Arc;

impl Compiler {
    /// Whether models get statistics of the calibration samples in the place of those that their batch norms come with; see
    /// [`estimate_batch_norms`](Self::estimate_batch_norms). It is done once, before all else, for whatever precision.
    pub fn reestimate_batch_norms(mut self, reestimates: bool) -> Compiler {
        self.reestimates = reestimates;
        self
    }

    /// The statistics that batch norms are to have, by the names of their nodes, instead of those of the model.
    pub fn batch_norm_statistics(mut self, statistics: BatchNormStatistics) -> Compiler {
        self.options.statistics = Some(Arc::new(statistics));
        self
    }

    /// The mean and variance of what each batch norm of an imported model gets on the calibration samples, where those before it
    /// have theirs already: what batch norms in training mode compute if all samples are one batch.
    ///
    /// Batch norms that depend on no unknown one are estimated together, in one run over the samples of the network up to them. So
    /// a chain of n takes n runs, of half the network on average; memory is that of one batch. The result is the same for any
    /// number of threads.
    ///
    /// # Errors
    /// Where there are no samples, they do not fit the model, or are too few to have a variance.
    pub fn estimate_batch_norms(&self, graph: &Graph) -> Result<BatchNormStatistics, Error> {
        let mut known = BatchNormStatistics::default();
        let mut next = next_batch_norms(graph, &known);
        if next.is_empty() {
            return Ok(known);
        }
        let samples = self.samples.as_ref().filter(|s| !s.is_noise()).ok_or_else(|| {
            Error::Calibration(
                "statistics of batch norms are recomputed (--reestimate-bn) from samples: give some (--calibrate)"
                    .into(),
            )
        })?;
        let feed = samples.bind(&graph_inputs(graph), &self.preprocess)?;
        known.samples = feed.samples() as u64;
        let rounds = rounds(graph);
        let (mut done, total) = (0, rounds * feed.batches());
        while !next.is_empty() {
            let (part, places) = self.up_to(graph, &known, &next)?;
            let none = || places.iter().map(|p| ChannelMoments::none(p.channels)).collect::<Vec<_>>();
            let mut sums = none();
            let shown: Vec<_> = part.outputs().iter().map(|o| o.value).collect();
            observe(
                &[Observed::new(self, &part, &shown)?],
                &feed,
                &self.threads_of_calibration()?,
                || (),
                |(), batch| {
                    let of =
                        |(i, p): (usize, &Place)| ChannelMoments::of(batch.floats(0, i), p.channels, p.inner);
                    Ok(places.iter().enumerate().map(of).collect::<Vec<_>>())
                },
                |of_batch| {
                    sums.iter_mut().zip(of_batch).for_each(|(sum, m)| sum.merge(&m));
                    done += 1;
                    self.tell(Event::Reestimating { done, total });
                    Ok(())
                },
            )?;
            for (&node, moments) in next.iter().zip(&sums) {
                let name = graph.node(node).name.clone();
                if moments.count() < 2 {
                    return Err(Error::Calibration(format!(
                        "`{name}`: one element a channel has no variance; give more samples to re-estimate batch norms"
                    )));
                }
                known.batch_norms.insert(name, moments.into());
            }
            next = next_batch_norms(graph, &known);
        }
        Ok(known)
    }

    /// What computes the inputs of some batch norms of a model, those before them with statistics that are known; and their channels.
    fn up_to(
        &self,
        graph: &Graph,
        known: &BatchNormStatistics,
        batch_norms: &[NodeId],
    ) -> Result<(Graph, Vec<Place>), Error> {
        let mut part = graph.clone();
        let (mut outputs, mut places) = (Vec::new(), Vec::new());
        for &node in batch_norms {
            let value = graph.operand(node, 0);
            let shape = graph.shape(value);
            let axis = match graph.op(node) {
                Some(qcc_ir::Op::BatchNorm(bn)) => bn.axis,
                _ => 1,
            };
            places.push(Place { channels: shape[axis], inner: shape[axis + 1..].iter().product() });
            outputs.push(Output { name: graph.node(node).name.clone(), value });
        }
        part.set_outputs(outputs);
        part.remove_dead();
        set_statistics(&mut part, known)?;
        let options = Options {
            precision: Precision::Float,
            capability: qcc_codegen::capability,
            ..Options::default()
        };
        qcc_passes::prepare(&mut part, &options, &mut |_, _| {})?;
        Ok((part, places))
    }

    /// Whether statistics of batch norms are to be recomputed and are not known yet.
    pub(crate) fn reestimates(&self) -> bool {
        self.reestimates && self.options.statistics.is_none()
    }

    /// This compiler, with statistics for a model where these are to be recomputed and are not known yet.
    pub(crate) fn estimated(&self, graph: &Graph) -> Result<Compiler, Error> {
        if !self.reestimates() {
            return Ok(self.clone());
        }
        let statistics = self.estimate_batch_norms(graph)?;
        if statistics.batch_norms.is_empty() {
            self.tell(Event::Warning(
                "--reestimate-bn has no effect: the model has no batch norms with statistics of their own",
            ));
        }
        Ok(self.clone().batch_norm_statistics(statistics))
    }
}

/// Where the channels of an input of a batch norm are.
struct Place {
    channels: usize,
    /// Elements of a channel that follow each other.
    inner: usize,
}

/// In how many rounds all batch norms become known.
fn rounds(graph: &Graph) -> usize {
    let mut known = BatchNormStatistics::default();
    let mut rounds = 0;
    loop {
        let next = next_batch_norms(graph, &known);
        if next.is_empty() {
            return rounds;
        }
        rounds += 1;
        let nothing = ChannelMoments::none(0);
        known.batch_norms.extend(next.iter().map(|&n| (graph.node(n).name.clone(), (&nothing).into())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, DynamicModel, Model, Samples, Threads, bundled, evaluate};
    use qcc_ir::{
        Shape, Tensor, TensorType, interpreter,
        ops::{BatchNorm, Clamp, Conv, Layout, Unary, UnaryKind, Window},
    };
    use qcc_passes::{Rule, RunningStatistics};

    fn compiler(samples: usize) -> Compiler {
        let samples = bundled::calibration().unwrap().limit(samples);
        Compiler::new().precision(Precision::Float).calibration(samples).preprocess(bundled::preprocess())
    }

    fn bundled_graph() -> Graph {
        Compiler::new().import_onnx(bundled::FASHION_RESNET8).unwrap()
    }

    /// A model with statistics as they are before any training.
    fn reset(mut graph: Graph) -> Graph {
        let mut fresh = BatchNormStatistics::default();
        for (_, node) in graph.nodes().filter(|(_, n)| matches!(n.op(), Some(qcc_ir::Op::BatchNorm(_)))) {
            let channels = node.outputs()[0].shape[1];
            let of = RunningStatistics { mean: vec![0.0; channels], variance: vec![1.0; channels] };
            fresh.batch_norms.insert(node.name.clone(), of);
        }
        assert_eq!(fresh.batch_norms.len(), 9);
        set_statistics(&mut graph, &fresh).unwrap();
        graph
    }

    fn accuracy(model: Model) -> f64 {
        let images = bundled::test_images().unwrap().limit(250);
        let feed = images.bind(model.inputs(), &bundled::preprocess()).unwrap();
        evaluate(&[model], &feed, &Threads::new(0).unwrap(), &|_, _| {}).unwrap().scores[0].top1.unwrap()
    }

    #[test]
    fn a_model_that_was_reset_gets_its_accuracy_back_in_float_and_int8() {
        let compiler = compiler(96);
        let broken = reset(bundled_graph());
        let prepared = compiler.prepare(broken.clone()).unwrap();
        assert!(prepared.findings().iter().any(|f| f.rule == Rule::BatchNormNeverUpdated));
        let own = accuracy(compiler.compile_graph(bundled_graph()).unwrap());
        let lost = accuracy(compiler.compile_graph(broken.clone()).unwrap());
        let again = compiler.reestimate_batch_norms(true);
        let program = again.program_of_graph(broken.clone()).unwrap();
        assert_eq!((program.info().reestimated, program.info().findings.len()), (9, 0));
        let float = accuracy(again.jit(&program).unwrap());
        let int8 = accuracy(again.precision(Precision::Int8).compile_graph(broken).unwrap());
        assert!(own > 0.9 && lost < 0.3, "{own} {lost}");
        assert!(float > own - 0.02 && int8 > own - 0.02, "{own}: {float} {int8}");
    }

    #[test]
    fn statistics_do_not_depend_on_threads_and_hardly_on_batches() {
        let of = |threads: usize, batch: usize| {
            let compiler = compiler(14).shape("image", [batch, 1, 28, 28]);
            let compiler = compiler.calibration_threads(Threads::new(threads).unwrap());
            let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
            compiler.estimate_batch_norms(&graph).unwrap()
        };
        let one = of(1, 1);
        assert_eq!((one.samples, one.batch_norms.len()), (14, 9));
        for threads in [2, 3, 8] {
            assert_eq!(of(threads, 1), one, "{threads} threads");
        }
        // Copies that fill the last batch up do not count.
        let batched = of(2, 4);
        for (name, of) in &one.batch_norms {
            let other = &batched.batch_norms[name];
            for (a, b) in of.mean.iter().chain(&of.variance).zip(other.mean.iter().chain(&other.variance)) {
                assert!((a - b).abs() <= 1e-4 * (1.0 + a.abs()), "{name}: {a} {b}");
            }
        }
    }

    #[test]
    fn all_batch_norms_together_are_in_training_mode_over_all_samples() {
        // Two chains of two, joined, with one behind the sum.
        let mut graph = Graph::new("test");
        let x = graph.input("x", TensorType::f32(&[1, 2, 6, 6]).unwrap()).unwrap();
        let mut seed = 1u32;
        let mut numbers = |count: usize| -> Vec<f32> {
            let mut next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
            };
            (0..count).map(|_| next()).collect()
        };
        let mut names = Vec::new();
        let mut layer = |graph: &mut Graph, x, numbers: &mut dyn FnMut(usize) -> Vec<f32>| {
            let i = names.len();
            let channels = graph.shape(x)[1];
            let constant = |graph: &mut Graph, dims: &[usize], values: Vec<f32>| {
                graph.constant("c", Tensor::from_vec(Shape::new(dims).unwrap(), values).unwrap())
            };
            let weights = constant(graph, &[3, channels, 3, 3], numbers(3 * channels * 9));
            let conv = Conv {
                window: Window::new([3, 3]).pads([1, 1], [1, 1]),
                groups: 1,
                bias: false,
                residual: false,
                clamp: Clamp::NONE,
                layout: Layout::ChannelsFirst,
            };
            let y = graph.add(&format!("conv{i}"), conv, &[x, weights]).unwrap().out();
            let [gamma, beta] = [1.0, 0.0].map(|at| {
                let values = numbers(3).into_iter().map(|x| at + x).collect();
                constant(graph, &[3], values)
            });
            let [mean, variance] = [5.0, 9.0].map(|v| constant(graph, &[3], vec![v; 3]));
            names.push(format!("bn{i}"));
            let bn = BatchNorm { epsilon: 1e-3, axis: 1 };
            let y = graph.add(&names[i], bn, &[y, gamma, beta, mean, variance]).unwrap().out();
            graph.add(&format!("relu{i}"), Unary { kind: UnaryKind::Relu }, &[y]).unwrap().out()
        };
        let [a, b] = [0, 1].map(|_| {
            let first = layer(&mut graph, x, &mut numbers);
            layer(&mut graph, first, &mut numbers)
        });
        let sum = qcc_ir::ops::Binary { kind: qcc_ir::ops::BinaryKind::Add };
        let sum = graph.add("sum", sum, &[a, b]).unwrap().out();
        let y = layer(&mut graph, sum, &mut numbers);
        graph.output("y", y);
        let samples = Tensor::from_vec(Shape::new([5, 2, 6, 6]).unwrap(), numbers(5 * 72)).unwrap();
        let arrays = Samples::from_arrays(vec![("x".into(), samples.clone())]).unwrap();
        let known = Compiler::new().calibration(arrays).estimate_batch_norms(&graph).unwrap();
        assert_eq!(rounds(&graph), 3);
        set_statistics(&mut graph, &known).unwrap();
        // By the reference, each batch norm gets what it takes off.
        let mut seen: std::collections::BTreeMap<String, ChannelMoments> = Default::default();
        for i in 0..5 {
            let one = samples.as_slice::<f32>().unwrap()[i * 72..(i + 1) * 72].to_vec();
            let one = Tensor::from_vec(Shape::new([1, 2, 6, 6]).unwrap(), one).unwrap();
            let mut observe = |value: qcc_ir::ValueId, t: &Tensor| {
                let name = graph.node(value.node).name.clone();
                if name.starts_with("conv") {
                    let none = || ChannelMoments::none(3);
                    seen.entry(name).or_insert_with(none).merge(&ChannelMoments::of(
                        t.as_slice().unwrap(),
                        3,
                        36,
                    ));
                }
            };
            interpreter::run_observed(&graph, &[one], &mut observe).unwrap();
        }
        for (name, of) in &known.batch_norms {
            let seen = RunningStatistics::from(&seen[&name.replace("bn", "conv")]);
            for (a, b) in of.mean.iter().chain(&of.variance).zip(seen.mean.iter().chain(&seen.variance)) {
                assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{name}: {a} instead of {b}");
            }
        }
        assert_eq!(known.batch_norms.keys().collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
    }

    #[test]
    fn open_shapes_have_the_statistics_of_the_samples() {
        let compiler = compiler(24).reestimate_batch_norms(true);
        let graph = reset(bundled_graph());
        let expected = compiler.compile_graph(graph).unwrap();
        let images = bundled::test_images().unwrap().limit(3);
        let feed = images.bind(expected.inputs(), &bundled::preprocess()).unwrap();
        let batch = feed.batch(1).unwrap();
        let expected = crate::Session::new(&expected).run(&[(&batch[0]).into()]).unwrap();
        let model = qcc_ir::onnx::Model::parse(bundled::FASHION_RESNET8.to_vec()).unwrap();
        let model = DynamicModel::new(model, "fashion", Backend::jit(compiler));
        let run = model.run(&batch).unwrap();
        assert_eq!(run.outputs, expected);
        assert!(!run.calibration_time.is_zero() && run.models[0].info().reestimated == 9);
        assert!(model.run(&batch).unwrap().calibration_time.is_zero(), "it is done once");
    }

    #[test]
    fn without_samples_there_are_no_statistics() {
        let compiler = Compiler::new().reestimate_batch_norms(true);
        let refused = compiler.prepare(bundled_graph()).err().unwrap().to_string();
        assert!(refused.contains("--calibrate"), "{refused}");
        let noise = compiler.calibration(Samples::noise());
        assert!(noise.prepare(bundled_graph()).is_err());
    }
}
