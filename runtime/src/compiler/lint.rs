//! What looks wrong with samples, by what the values of a network are on them.

mod feeding;

use super::{Calibrated, Compiler, Prepared, graph_inputs};
use crate::{
    Error, Feed, Samples,
    observe::{Observed, observe},
};
use feeding::{Fed, Way};
use qcc_ir::{DType, Graph, NodeId, ValueId};
use qcc_passes::{
    ChannelMoments, ChannelStatistics, Finding, Rule, Subject, behind_batch_norms, grid_ranges,
    lint::{
        ActiveChannels, Clipping, FEWEST_SAMPLES, InputFit, divergence, fitted_normalisation, mismatches,
    },
    product_channels, value_name,
};
use std::collections::{BTreeMap, BTreeSet};

/// Samples that are looked at, spread over all of them: statistics of batch norms are near to their own with 16, and nearer with
/// more.
const MOST_SAMPLES: usize = 32;

/// Samples on which values are compared with their ranges.
const MOST_CLIPPED: usize = 128;

/// What is known of the samples of a network beside their ranges.
pub(super) struct Looked {
    pub(super) findings: Vec<Finding>,
    /// Inputs of which batch norms tell whether they are normalised as they should be, so that ranges need not be asked.
    pub(super) judged: BTreeSet<String>,
}

impl Compiler {
    /// Findings about a model and, where there are samples for calibration, about these. `others` are samples beside them, on which
    /// values should keep to the ranges that calibration finds; alone, they are taken for calibration.
    ///
    /// # Errors
    /// Where samples cannot be read or do not fit the model.
    pub fn lint(&self, graph: Graph, others: Option<&Samples>) -> Result<Vec<Finding>, Error> {
        // They are what is asked for, and no warnings beside it.
        let prepared = self.prepare_silently(graph)?;
        let mut findings = prepared.findings().to_vec();
        let own = match (&self.samples, others) {
            (None, Some(others)) => self.clone().calibration(others.clone()),
            _ => self.clone(),
        };
        if own.samples.is_none() || prepared.brings_grids() {
            return Ok(findings);
        }
        let calibrated = own.calibrate(&prepared)?;
        findings.extend(calibrated.findings().iter().cloned());
        if let (Some(_), Some(others)) = (&self.samples, others) {
            findings.extend(self.saturation(&prepared, &calibrated, others)?);
        }
        Ok(findings)
    }

    /// Values that are beyond their ranges on other samples than those for calibration, by more than rounding costs. At most 128 of either are
    /// looked at, spread over all of them.
    ///
    /// # Errors
    /// Where samples cannot be read or do not fit the model.
    pub fn saturation(
        &self,
        prepared: &Prepared,
        calibrated: &Calibrated,
        others: &Samples,
    ) -> Result<Vec<Finding>, Error> {
        if self.options.allowed.contains(&Rule::ActivationSaturates) {
            return Ok(Vec::new());
        }
        let scaled = prepared.scaled(&calibrated.ranges.scales)?;
        let graph = scaled.graph();
        let ranges = grid_ranges(graph, &calibrated.ranges);
        if ranges.is_empty() || graph.inputs().is_empty() {
            return Ok(Vec::new());
        }
        let values: Vec<ValueId> = ranges.iter().map(|(value, _)| *value).collect();
        let clipped = |samples: &Samples| -> Result<(usize, Vec<Clipping>), Error> {
            let feed = samples.spread(MOST_CLIPPED).bind(&graph_inputs(graph), &self.preprocess)?;
            let mut sums = vec![Clipping::default(); values.len()];
            observe(
                &[Observed::of_sets(self, graph, &values)?],
                &feed,
                &self.threads_of_calibration()?,
                || (),
                |(), batch| {
                    let of =
                        |(i, (_, range)): (usize, &(ValueId, _))| Clipping::of(batch.floats(0, i), *range);
                    Ok(ranges.iter().enumerate().map(of).collect::<Vec<_>>())
                },
                |of_batch| {
                    sums.iter_mut().zip(of_batch).for_each(|(sum, c)| *sum += c);
                    Ok(())
                },
            )?;
            Ok((feed.samples(), sums))
        };
        let own = match &self.samples {
            Some(samples) if !samples.is_noise() => clipped(samples)?.1,
            _ => vec![Clipping::default(); values.len()],
        };
        let (count, other) = clipped(others)?;
        let found = ranges.iter().zip(&other).zip(&own);
        let finding = |(((value, range), other), own): ((&(ValueId, _), &Clipping), &Clipping)| {
            other.finding(&value_name(graph, *value), *range, count, own)
        };
        Ok(found.filter_map(finding).collect())
    }

    /// Looks at some of the samples: whether batch norms get what they know, and which channels never change.
    pub(super) fn look_at_samples(&self, prepared: &Prepared, samples: &Samples) -> Result<Looked, Error> {
        let mut looked = Looked { findings: Vec::new(), judged: BTreeSet::new() };
        let graph = prepared.graph();
        if graph.inputs().is_empty() {
            return Ok(looked);
        }
        let feed = samples.spread(MOST_SAMPLES).bind(&graph_inputs(graph), &self.preprocess)?;
        if feed.samples() < FEWEST_SAMPLES {
            // Then there are too few, which is another finding.
            return Ok(looked);
        }
        let (bare, places) = behind_batch_norms(graph, &prepared.report.batch_norms)?;
        let layers = layers(graph, &places);
        let seen = self.see(&bare, &prepared.report.batch_norms, &places, &layers, &feed)?;
        let batch_norms = dependences(&bare, &places, &seen.moments, &prepared.report.batch_norms);
        let mut explained = false;
        for input in first_inputs(&bare, &batch_norms, &places) {
            let first = FirstBatchNorms::of(&bare, input, &batch_norms, &places, prepared);
            if let Some((finding, is_judged)) = self.judge(&bare, &first, &seen.moments, &feed)? {
                if is_judged {
                    looked.judged.insert(graph.node(input).name.clone());
                }
                explained |= finding.is_some();
                looked.findings.extend(finding);
            }
        }
        // What is fed wrongly explains all that follows.
        if !explained {
            for (&(node, _, _), channels) in layers.iter().zip(&seen.channels) {
                looked.findings.extend(channels.finding(&graph.node(node).name, feed.samples()));
            }
            let named = |b: &Depending| (b.name.clone(), b.divergence, b.behind.clone());
            looked.findings.extend(mismatches(&batch_norms.iter().map(named).collect::<Vec<_>>()));
        }
        looked.findings.retain(|f| !self.options.allowed.contains(&f.rule));
        Ok(looked)
    }

    /// Runs a graph on samples, and sees the moments behind its batch norms and the ends of the channels of its layers.
    fn see(
        &self,
        graph: &Graph,
        statistics: &BTreeMap<String, ChannelStatistics>,
        places: &BTreeMap<String, [ValueId; 2]>,
        layers: &[(NodeId, ValueId, usize)],
        feed: &Feed,
    ) -> Result<Seen, Error> {
        let of_batch_norms = places.iter().map(|(name, [bare, _])| (*bare, statistics[name].axis));
        let places_of: Vec<Place> = of_batch_norms
            .chain(layers.iter().map(|&(_, value, axis)| (value, axis)))
            .map(|(value, axis)| Place::of(graph, value, axis))
            .collect();
        let (moments, channels) = places_of.split_at(places.len());
        let none = || channels.iter().map(|p| ActiveChannels::none(p.channels)).collect::<Vec<_>>();
        let mut sums: Vec<ChannelMoments> =
            moments.iter().map(|p| ChannelMoments::none(p.channels)).collect();
        let shown: Vec<ValueId> = places_of.iter().map(|p| p.value).collect();
        let threads = observe(
            &[Observed::new(self, graph, &shown)?],
            feed,
            &self.threads_of_calibration()?,
            none,
            |own, batch| {
                for (i, (place, own)) in channels.iter().zip(own).enumerate() {
                    own.add(batch.floats(0, moments.len() + i), place.inner);
                }
                Ok((0..moments.len()).map(|i| moments[i].moments(batch.floats(0, i))).collect::<Vec<_>>())
            },
            |of_batch| {
                sums.iter_mut().zip(of_batch).for_each(|(sum, m)| sum.merge(&m));
                Ok(())
            },
        )?;
        let mut ends = none();
        for of_thread in threads {
            ends.iter_mut().zip(&of_thread).for_each(|(all, own)| all.merge(own));
        }
        let moments = places.keys().cloned().zip(sums).collect();
        Ok(Seen { moments, channels: ends })
    }

    /// What the first batch norms say of the normalisation of an input: a finding, if there is one, and whether they say that it is
    /// right. `None` where they say nothing.
    fn judge(
        &self,
        graph: &Graph,
        first: &FirstBatchNorms<'_>,
        seen: &BTreeMap<String, ChannelMoments>,
        feed: &Feed,
    ) -> Result<Option<(Option<Finding>, bool)>, Error> {
        let given: Vec<&ChannelMoments> =
            first.places.iter().filter_map(|(name, ..)| seen.get(*name)).collect();
        let Some(distance) = first.divergence(&given) else { return Ok(None) };
        let Some(fed) = Fed::of(self, graph, first.input, feed) else { return Ok(None) };
        let is_near = InputFit::is_near(distance);
        let ways: Vec<Way> = match is_near {
            true => fed.exchanged(self).into_iter().collect(),
            false => fed.ways(self),
        };
        let mut fits = Vec::new();
        let mut graphs: Vec<Graph> = Vec::new();
        for way in &ways {
            graphs.push(fed.feed(graph, way)?);
        }
        if !is_near {
            for constant in [0.0, 1.0] {
                graphs.push(fed.feed(graph, &fed.constant(constant))?);
            }
        }
        let mut moments = self.moments(&graphs, first, feed)?;
        if !is_near {
            let (ones, zeros) = (moments.pop().unwrap_or_default(), moments.pop().unwrap_or_default());
            let exchanged = ways.iter().position(|w| w.is_order);
            let mut fitted = Vec::new();
            for base in std::iter::once(None).chain(exchanged.map(Some)) {
                let of: Vec<&ChannelMoments> = base.map_or(given.clone(), |i| moments[i].iter().collect());
                let known = first.places.iter().zip(of).zip(zeros.iter().zip(&ones));
                let known: Vec<_> = known
                    .map(|(((_, statistics, _), seen), (zeros, ones))| {
                        (*statistics, seen, [zeros.mean().to_vec(), ones.mean().to_vec()])
                    })
                    .collect();
                if let Some(fit) = fitted_normalisation(&known) {
                    fitted.push(fed.fitted(self, base.map(|i| &ways[i]), fit));
                }
            }
            let graphs = fitted.iter().map(|way| fed.feed(graph, way)).collect::<Result<Vec<_>, _>>()?;
            for (way, of) in fitted.into_iter().zip(self.moments(&graphs, first, feed)?) {
                fits.extend(first.fit(way, &of, false));
            }
        }
        for (way, of) in ways.into_iter().zip(&moments) {
            fits.extend(first.fit(way, of, true));
        }
        let finding = InputFit::finding(&graph.node(first.input).name, distance, &fits);
        let is_judged = is_near || finding.as_ref().is_some_and(|f| f.rule == Rule::InputNormalisation);
        Ok(Some((finding, is_judged)))
    }

    /// The moments behind the first batch norms in each of some graphs.
    fn moments(
        &self,
        graphs: &[Graph],
        first: &FirstBatchNorms<'_>,
        feed: &Feed,
    ) -> Result<Vec<Vec<ChannelMoments>>, Error> {
        let places: Vec<&Place> = first.places.iter().map(|(_, _, place)| place).collect();
        let shown: Vec<ValueId> = places.iter().map(|p| p.value).collect();
        let observed =
            graphs.iter().map(|g| Observed::new(self, g, &shown)).collect::<Result<Vec<_>, _>>()?;
        let none = || places.iter().map(|p| ChannelMoments::none(p.channels)).collect::<Vec<_>>();
        let mut sums: Vec<Vec<ChannelMoments>> = graphs.iter().map(|_| none()).collect();
        if graphs.is_empty() {
            return Ok(sums);
        }
        observe(
            &observed,
            feed,
            &self.threads_of_calibration()?,
            || (),
            |(), batch| {
                let of_graph = |g: usize| {
                    let of = |(i, place): (usize, &&Place)| place.moments(batch.floats(g, i));
                    places.iter().enumerate().map(of).collect::<Vec<_>>()
                };
                Ok((0..graphs.len()).map(of_graph).collect::<Vec<_>>())
            },
            |of_batch| {
                for (sum, of) in sums.iter_mut().flatten().zip(of_batch.into_iter().flatten()) {
                    sum.merge(&of);
                }
                Ok(())
            },
        )?;
        Ok(sums)
    }
}

/// What was seen of some samples.
struct Seen {
    /// Behind batch norms, by the names that their statistics have.
    moments: BTreeMap<String, ChannelMoments>,
    channels: Vec<ActiveChannels>,
}

/// A value with channels.
struct Place {
    value: ValueId,
    channels: usize,
    /// Elements of a channel that follow each other.
    inner: usize,
}

impl Place {
    fn of(graph: &Graph, value: ValueId, axis: usize) -> Place {
        let shape = graph.shape(value);
        Place { value, channels: shape[axis], inner: shape[axis + 1..].iter().product() }
    }

    fn moments(&self, elements: &[f32]) -> ChannelMoments {
        ChannelMoments::of(elements, self.channels, self.inner)
    }
}

/// Products with weights, what stands for their results, and the axis of channels.
fn layers(graph: &Graph, places: &BTreeMap<String, [ValueId; 2]>) -> Vec<(NodeId, ValueId, usize)> {
    let of = |node: NodeId| {
        let axis = product_channels(graph, node)?;
        let is_float = graph.ty(node.out()).dtype == DType::F32 && graph.shape(node.out()).elements() > 0;
        let value = places.get(&graph.node(node).name).map_or(node.out(), |[_, result]| *result);
        is_float.then_some((node, value, axis))
    };
    graph.order().into_iter().filter_map(of).collect()
}

/// A batch norm among others.
struct Depending {
    /// The node by which its statistics are known.
    name: String,
    divergence: f64,
    /// Those that it depends on.
    behind: Vec<usize>,
}

/// Batch norms of which something can be told, in the order in which they run.
fn dependences(
    graph: &Graph,
    places: &BTreeMap<String, [ValueId; 2]>,
    seen: &BTreeMap<String, ChannelMoments>,
    statistics: &BTreeMap<String, ChannelStatistics>,
) -> Vec<Depending> {
    let mut found: Vec<Depending> = Vec::new();
    // For each node, which of the batch norms are at it or before it.
    let mut before: BTreeMap<NodeId, BTreeSet<usize>> = BTreeMap::new();
    for node in graph.order() {
        let operands = graph.operands(node);
        let mut of: BTreeSet<usize> =
            operands.iter().flat_map(|v| before.get(&v.node).into_iter().flatten().copied()).collect();
        let name = &graph.node(node).name;
        let distance = places
            .get(name)
            .filter(|[bare, _]| bare.node == node)
            .and_then(|_| divergence(&statistics[name], &seen[name]));
        if let Some(divergence) = distance {
            found.push(Depending { name: name.clone(), divergence, behind: of.iter().copied().collect() });
            of.insert(found.len() - 1);
        }
        if !of.is_empty() {
            before.insert(node, of);
        }
    }
    found
}

/// The inputs that batch norms with none before them depend on, where it is one.
fn first_inputs(
    graph: &Graph,
    batch_norms: &[Depending],
    places: &BTreeMap<String, [ValueId; 2]>,
) -> BTreeSet<NodeId> {
    let firsts = batch_norms.iter().filter(|b| b.behind.is_empty());
    firsts.filter_map(|b| sole_input(graph, places[&b.name][0].node)).collect()
}

/// The input that a node depends on, where it is one.
fn sole_input(graph: &Graph, node: NodeId) -> Option<NodeId> {
    let mut inputs = graph.inputs().iter().copied().filter(|&input| graph.reaches(input, node));
    let first = inputs.next();
    first.filter(|_| inputs.next().is_none())
}

/// The batch norms that get what a network makes of an input without any other before them.
struct FirstBatchNorms<'a> {
    input: NodeId,
    /// By what name they are known, what they know, and where their results are.
    places: Vec<(&'a str, &'a ChannelStatistics, Place)>,
}

impl<'a> FirstBatchNorms<'a> {
    fn of(
        graph: &Graph,
        input: NodeId,
        batch_norms: &'a [Depending],
        places: &BTreeMap<String, [ValueId; 2]>,
        prepared: &'a Prepared,
    ) -> FirstBatchNorms<'a> {
        let of = |b: &'a Depending| {
            let [value, _] = places[&b.name];
            let statistics = &prepared.report.batch_norms[&b.name];
            let is_first = b.behind.is_empty() && sole_input(graph, value.node) == Some(input);
            is_first.then(|| (b.name.as_str(), statistics, Place::of(graph, value, statistics.axis)))
        };
        FirstBatchNorms { input, places: batch_norms.iter().filter_map(of).collect() }
    }

    /// How well what was seen of them with an input that is fed in some way fits what they know.
    fn fit(&self, way: Way, seen: &[ChannelMoments], is_known: bool) -> Option<InputFit> {
        let divergence = self.divergence(&seen.iter().collect::<Vec<_>>())?;
        Some(InputFit { is_order: way.is_order, is_known, advice: way.advice, divergence })
    }

    /// The mean of their divergences.
    fn divergence(&self, seen: &[&ChannelMoments]) -> Option<f64> {
        let each =
            self.places.iter().zip(seen).map(|((_, statistics, _), seen)| divergence(statistics, seen));
        let each: Vec<f64> = each.collect::<Option<_>>()?;
        (!each.is_empty()).then(|| each.iter().sum::<f64>() / each.len() as f64)
    }
}

/// Gives findings about samples the numbers that these have in the data, and files.
pub(super) fn locate(findings: &mut [Finding], feed: &Feed) {
    for finding in findings {
        finding.locate(&|sample| feed.place(usize::try_from(sample).unwrap_or(usize::MAX)));
    }
}

/// Leaves out what ranges say of inputs of which batch norms know better.
pub(super) fn without_judged(findings: &mut Vec<Finding>, judged: &BTreeSet<String>) {
    let weak = [Rule::InputNotNormalised, Rule::InputNormalisedTwice, Rule::InputLarge];
    findings.retain(|f| {
        !(weak.contains(&f.rule) && matches!(&f.subject, Subject::Input(name) if judged.contains(name)))
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Preprocess, Threads, bundled};
    use qcc_ir::{
        Shape, Tensor, TensorType,
        ops::{BatchNorm, Clamp, Conv, Layout, Reduce, ReduceKind, Unary, UnaryKind, Window},
    };
    use qcc_passes::{BatchNormStatistics, Level, RunningStatistics, set_statistics};

    fn rules(findings: &[Finding]) -> Vec<Rule> {
        findings.iter().map(|f| f.rule).collect()
    }

    fn bundled_compiler(preprocess: Preprocess) -> Compiler {
        Compiler::new().calibration(bundled::calibration().unwrap().limit(64)).preprocess(preprocess)
    }

    fn lint(compiler: &Compiler) -> Vec<Finding> {
        compiler.lint(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap(), None).unwrap()
    }

    #[test]
    fn sound_samples_of_a_sound_model_have_no_findings_whatever_the_number_of_threads() {
        assert_eq!(lint(&bundled_compiler(bundled::preprocess())), []);
        let images = bundled::test_images().unwrap();
        let compiler = bundled_compiler(bundled::preprocess());
        let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        assert_eq!(compiler.lint(graph.clone(), Some(&images)).unwrap(), []);
        // And samples that are looked at alone.
        let alone = Compiler::new().preprocess(bundled::preprocess());
        assert_eq!(alone.lint(graph.clone(), Some(&images)).unwrap(), []);
        let wrong = |threads: usize| {
            let compiler = bundled_compiler(Preprocess::default());
            lint(&compiler.calibration_threads(Threads::new(threads).unwrap()))
        };
        assert_eq!((wrong(1), wrong(3)), (wrong(2), wrong(2)));
    }

    #[test]
    fn another_normalisation_is_told_from_batch_norms_and_the_right_one_found() {
        let given =
            |mean: f32, std: f32| Preprocess { mean: vec![mean], std: vec![std], ..Preprocess::default() };
        for preprocess in [Preprocess::default(), given(0.0, 255.0), given(127.5, 127.5)] {
            let compiler = bundled_compiler(preprocess);
            let found = lint(&compiler);
            assert_eq!(rules(&found), [Rule::InputNormalisation]);
            assert_eq!(found[0].subject, Subject::Input("image".into()));
            // It was trained with 72.9 and 90.0.
            let words: Vec<&str> = found[0].advice.split(' ').collect();
            let number = |option: &str| -> f64 {
                let at = words.iter().position(|w| *w == option).unwrap();
                words[at + 1].parse().unwrap()
            };
            let (mean, std) = (number("--mean"), number("--std"));
            assert!((mean - 72.9).abs() < 6.0 && (std - 90.0).abs() < 6.0, "{}", found[0]);
            // A model that takes pixels is judged by the same.
            let pixels = lint(&compiler.image_input(true));
            assert_eq!((rules(&pixels), &pixels[0].advice), (rules(&found), &found[0].advice));
        }
        // Arrays have no options, only numbers.
        let right = bundled::preprocess();
        let feed = |scale: f32, preprocess: &Preprocess| {
            let graph = Compiler::new().import_onnx(bundled::FASHION_RESNET8).unwrap();
            let samples = bundled::calibration().unwrap().limit(32);
            let feed = samples.bind(&graph_inputs(&graph), preprocess).unwrap();
            let mut elements = Vec::new();
            for i in 0..32 {
                elements.extend(feed.batch(i).unwrap()[0].to_f32().unwrap().iter().map(|x| x * scale));
            }
            let tensor = Tensor::from_vec(Shape::new([32, 1, 28, 28]).unwrap(), elements).unwrap();
            lint(&Compiler::new().calibration(Samples::from_arrays(vec![("image".into(), tensor)]).unwrap()))
        };
        assert_eq!(feed(1.0, &right), []);
        let smaller = feed(0.05, &right);
        assert_eq!(rules(&smaller), [Rule::InputNormalisation]);
        assert!(smaller[0].advice.starts_with("multiply them by about 2"), "{}", smaller[0]);
    }

    /// A network of 3 channels whose batch norms know coloured pictures, and these: red is bright, blue is dark and even.
    fn coloured() -> (Graph, Samples) {
        let mut seed = 5u32;
        let mut next = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 24) as f32
        };
        let mut graph = Graph::new("coloured");
        let x = graph.input("x", TensorType::f32(&[1, 3, 16, 16]).unwrap()).unwrap();
        let constant = |graph: &mut Graph, dims: &[usize], values: Vec<f32>| {
            graph.constant("c", Tensor::from_vec(Shape::new(dims).unwrap(), values).unwrap())
        };
        let weights = (0..8 * 27).map(|_| next() - 0.5).collect();
        let weights = constant(&mut graph, &[8, 3, 3, 3], weights);
        let conv = Conv {
            window: Window::new([3, 3]).pads([1, 1], [1, 1]),
            groups: 1,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
            layout: Layout::ChannelsFirst,
        };
        let y = graph.add("conv", conv, &[x, weights]).unwrap().out();
        let [one, zero] = [1.0, 0.0].map(|v| constant(&mut graph, &[8], vec![v; 8]));
        let bn = BatchNorm { epsilon: 1e-3, axis: 1 };
        let y = graph.add("bn", bn, &[y, one, zero, zero, one]).unwrap().out();
        let y = graph.add("relu", Unary { kind: UnaryKind::Relu }, &[y]).unwrap().out();
        let mean = Reduce { kind: ReduceKind::Mean, axes: vec![2, 3], keep_dims: false };
        let y = graph.add("mean", mean, &[y]).unwrap().out();
        graph.output("y", y);
        let mut pixels = Vec::new();
        for _ in 0..32 {
            let level = next() * 40.0;
            for _ in 0..256 {
                pixels.extend([
                    150.0 + level + 60.0 * next(),
                    60.0 + level + 100.0 * next(),
                    20.0 + 50.0 * next(),
                ]);
            }
        }
        let pixels = pixels.into_iter().map(|x: f32| x as u8).collect::<Vec<_>>();
        let pixels = Tensor::from_vec(Shape::new([32, 16, 16, 3]).unwrap(), pixels).unwrap();
        let samples = Samples::from_arrays(vec![("x".into(), pixels)]).unwrap();
        let trained = Compiler::new().calibration(samples.clone()).preprocess(normalised(false));
        let known = trained.estimate_batch_norms(&graph).unwrap();
        set_statistics(&mut graph, &known).unwrap();
        (graph, samples)
    }

    fn normalised(bgr: bool) -> Preprocess {
        Preprocess { mean: vec![127.0], std: vec![128.0], bgr, ..Preprocess::default() }
    }

    #[test]
    fn exchanged_channels_are_told_by_what_batch_norms_know() {
        let (graph, samples) = coloured();
        let found = |preprocess: Preprocess, pixels: bool| {
            let compiler = Compiler::new().calibration(samples.clone()).preprocess(preprocess);
            compiler.image_input(pixels).lint(graph.clone(), None).unwrap()
        };
        for pixels in [false, true] {
            assert_eq!(found(normalised(false), pixels), []);
            let exchanged = found(normalised(true), pixels);
            assert_eq!(rules(&exchanged), [Rule::InputChannelOrder]);
            assert_eq!(exchanged[0].advice, "leave --bgr away: the model takes red first");
            // Both at once: the normalisation, and the order with it.
            let both = found(Preprocess { bgr: true, ..Preprocess::default() }, pixels);
            assert_eq!(rules(&both), [Rule::InputNormalisation]);
            assert!(both[0].advice.contains("not --bgr"), "{}", both[0]);
        }
        // What nobody wants to hear of.
        let compiler = Compiler::new().calibration(samples).preprocess(normalised(true));
        assert_eq!(compiler.allow(Rule::InputChannelOrder).lint(graph, None).unwrap(), []);
    }

    #[test]
    fn the_batch_norm_whose_statistics_are_of_something_else_is_named() {
        let compiler = bundled_compiler(bundled::preprocess());
        let mut graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        let own = compiler.estimate_batch_norms(&graph).unwrap();
        let statistics = compiler.prepare(graph.clone()).unwrap().report.batch_norms;
        let (layer, of) = statistics.iter().find(|(layer, _)| layer.contains("l2/c1")).unwrap();
        let name = of.batch_norm.clone();
        let mut other = own.batch_norms[&name].clone();
        other.variance.iter_mut().for_each(|v| *v *= 30.0);
        let changed = BatchNormStatistics { batch_norms: [(name, other)].into_iter().collect(), samples: 1 };
        set_statistics(&mut graph, &changed).unwrap();
        let found = compiler.lint(graph.clone(), None).unwrap();
        assert_eq!(rules(&found), [Rule::BatchNormMismatch], "{found:?}");
        assert!(matches!(&found[0].subject, Subject::Node(n) if n == layer), "{}", found[0]);
        // Recomputed, nothing is left to say.
        assert_eq!(compiler.reestimate_batch_norms(true).lint(graph, None).unwrap(), []);
    }

    #[test]
    fn dead_channels_are_hints() {
        let compiler = bundled_compiler(bundled::preprocess());
        let mut graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        let known = compiler.estimate_batch_norms(&graph).unwrap();
        // Means far above what there is: nothing comes through the ReLU behind.
        let name = known.batch_norms.keys().find(|name| name.contains("stem")).unwrap().clone();
        let RunningStatistics { mut mean, variance } = known.batch_norms[&name].clone();
        let half = mean.len() / 2;
        mean[..half].iter_mut().for_each(|m| *m += 1e4);
        let dead = RunningStatistics { mean, variance };
        let changed = BatchNormStatistics { batch_norms: [(name, dead)].into_iter().collect(), samples: 1 };
        set_statistics(&mut graph, &changed).unwrap();
        let found = compiler.lint(graph, None).unwrap();
        let dead = found.iter().find(|f| f.rule == Rule::ActivationDeadChannels).unwrap();
        assert_eq!(dead.level, Level::Hint);
        assert!(matches!(&dead.subject, Subject::Node(n) if n.contains("stem")), "{dead}");
    }

    #[test]
    fn values_that_leave_their_ranges_on_other_samples_are_named() {
        // Calibrated on pictures of a fifth of the contrast.
        let dark = Preprocess { std: vec![5.0 * 90.0], ..bundled::preprocess() };
        let compiler = bundled_compiler(dark).allow(Rule::InputNormalisation).allow(Rule::BatchNormMismatch);
        let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let images = bundled::test_images().unwrap();
        let usual = compiler.clone().preprocess(bundled::preprocess());
        let found =
            usual.clone().calibration(Samples::noise()).saturation(&prepared, &calibrated, &images).unwrap();
        assert!(
            rules(&found).iter().all(|r| *r == Rule::ActivationSaturates) && found.len() > 3,
            "{found:?}"
        );
        let input = found.iter().find(|f| f.subject == Subject::Value("image".into())).unwrap();
        assert!(input.what.contains("on 128 other samples"), "{input}");
        let own = usual.calibrate(&prepared).unwrap();
        assert_eq!(usual.saturation(&prepared, &own, &images).unwrap(), []);
    }

    #[test]
    fn copies_are_named_by_their_files() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..20u8 {
            // 12 is 3 once more.
            let i_seen = if i == 12 { 3 } else { i };
            let pixel = |x: u32, y: u32| image::Luma([(x * 7 + y * 3 * u32::from(i_seen)) as u8]);
            image::GrayImage::from_fn(28, 28, pixel).save(dir.path().join(format!("{i:02}.png"))).unwrap();
        }
        let samples = Samples::open(dir.path()).unwrap().every(3);
        let compiler = Compiler::new().preprocess(bundled::preprocess());
        let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        // The samples 0, 3, 6, 9, 12, 15 and 18.
        let found = compiler.calibration(samples).lint(graph, None).unwrap();
        assert_eq!(rules(&found), [Rule::SamplesTooFew, Rule::SamplesIdentical]);
        let Subject::Some { samples, .. } = &found[1].subject else { panic!("{found:?}") };
        assert_eq!((samples.len(), samples[0].number, samples[0].copy_of), (1, 12, Some(3)));
        assert!(found[1].to_string().contains("12.png (a copy of 3)"), "{}", found[1]);
    }
}
