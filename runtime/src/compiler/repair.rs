//! What repairs of quantization need to know of a network on samples: ranges of channels, and moments of the inputs of
//! products.

use super::{Compiler, Event, Prepared, graph_inputs};
use crate::{
    Error, Samples,
    observe::{Batch, Observed, observe},
};
use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};
use qcc_ir::{
    Graph, NodeId, Op, ValueId,
    ops::{Layout, Window},
};
use qcc_passes::{
    ChannelRanges, ChannelScales, ChannelStatistics, InputMoments, Moments, Range, Repairs, channel_scales,
    equalizable_values, equalize, value_name, weighted_products,
};
use std::{collections::BTreeMap, sync::Arc};

/// Rows (windows of convolutions, rows of matrix products) from which moments of n inputs are taken: `ROWS_PER_INPUT`·n, but
/// not fewer than the least and not more than the most.
const ROWS_PER_INPUT: usize = 16;
const LEAST_ROWS: usize = 4096;
const MOST_ROWS: usize = 16384;

/// Samples of which rows are taken, at most: images have many rows each.
const MOST_SAMPLES: usize = 256;

/// Rows that are gathered before they are multiplied.
const ROWS_AT_ONCE: usize = 256;

/// Memory of all moments. Products for which none is left are rounded to nearest.
const MOST_BYTES: usize = 1 << 30;

impl Prepared {
    /// With these channels scaled.
    pub(super) fn scaled(&self, scales: &ChannelScales) -> Result<Prepared, Error> {
        let mut scaled = self.clone();
        equalize(&mut scaled.graph, scales)?;
        Ok(scaled)
    }
}

impl Compiler {
    /// The factors of channels by the ranges that they have on the samples, at this strength.
    pub(super) fn channel_scales(
        &self,
        prepared: &Prepared,
        samples: &Samples,
        strength: f64,
    ) -> Result<ChannelScales, Error> {
        let graph = prepared.graph();
        let values = equalizable_values(graph);
        if strength == 0.0 || values.is_empty() || graph.inputs().is_empty() {
            return Ok(ChannelScales::new());
        }
        let feed = samples.bind(&graph_inputs(graph), &self.preprocess)?;
        let shown: Vec<ValueId> = values.iter().map(|v| v.0).collect();
        let observed = Observed::new(self, graph, &shown)?;
        let nothing = Range { min: 0.0, max: 0.0 };
        let none = || -> Vec<Vec<Range>> {
            values.iter().map(|&(v, axis)| vec![nothing; graph.shape(v)[axis]]).collect()
        };
        let mut done = 0;
        let seen = observe(
            &[observed],
            &feed,
            &self.threads_of_calibration()?,
            none,
            |own, batch| {
                for (i, (&(value, axis), ranges)) in values.iter().zip(own).enumerate() {
                    widen(ranges, batch.floats(0, i), &graph.shape(value)[axis + 1..]);
                }
                Ok(())
            },
            |()| {
                done += 1;
                self.tell(Event::Calibrating { done, total: feed.batches() });
                Ok(())
            },
        )?;
        let mut all = none();
        for of_thread in seen {
            for (ours, theirs) in all.iter_mut().flatten().zip(of_thread.into_iter().flatten()) {
                *ours = ours.union(theirs);
            }
        }
        for (&(value, _), own) in values.iter().zip(&mut all) {
            if let Some(known) = prepared.report.batch_norms.get(&graph.node(value.node).name) {
                widen_to_training(own, known);
            }
        }
        let ranges: ChannelRanges = shown.iter().map(|&v| value_name(graph, v)).zip(all).collect();
        Ok(channel_scales(graph, &ranges, self.options.weights, strength))
    }

    /// Moments of the inputs of all products with weights, as far as memory allows; none where nothing needs them.
    pub(super) fn input_moments(
        &self,
        graph: &Graph,
        samples: &Samples,
        repairs: Repairs,
    ) -> Result<InputMoments, Error> {
        if !(repairs.rounding || repairs.bias) || graph.inputs().is_empty() {
            return Ok(InputMoments::new());
        }
        let feed = samples.spread(MOST_SAMPLES).bind(&graph_inputs(graph), &self.preprocess)?;
        let mut left = MOST_BYTES;
        let mut inputs: Vec<Input> = Vec::new();
        for node in weighted_products(graph) {
            let Some(input) = Input::of(graph, node, feed.batches(), repairs.rounding) else { continue };
            match left.checked_sub(input.bytes()) {
                Some(rest) => left = rest,
                None => {
                    self.tell(Event::Warning(&format!(
                        "`{}`: its weights are rounded to nearest, as the moments of its input would take {} MiB of memory",
                        graph.node(node).name,
                        input.bytes() >> 20
                    )));
                    continue;
                }
            }
            inputs.push(input);
        }
        let shown: Vec<ValueId> = inputs.iter().map(|i| i.value).collect();
        let observed = Observed::new(self, graph, &shown)?;
        let mut sums: Vec<Sums> = inputs.iter().map(Sums::new).collect();
        let mut done = 0;
        observe(
            &[observed],
            &feed,
            &self.threads_of_calibration()?,
            || (),
            |(), batch| {
                Ok(inputs.iter().enumerate().map(|(i, input)| input.rows(batch, i)).collect::<Vec<_>>())
            },
            |rows| {
                sums.iter_mut().zip(rows).for_each(|(sums, rows)| sums.take(&rows));
                done += 1;
                self.tell(Event::Calibrating { done, total: feed.batches() });
                Ok(())
            },
        )?;
        let names = inputs.iter().map(|i| graph.node(i.node).name.clone());
        Ok(names.zip(sums.into_iter().map(|s| Arc::new(s.finish()))).collect::<BTreeMap<_, _>>())
    }
}

/// Deviations from the mean that a channel is given room for where a batch norm tells both of the training data.
const TRAINED: f64 = 6.0;

/// Takes into the ranges of channels what a batch norm knows of them, as far as it is within what any channel of the tensor has:
/// one that a few samples hardly show may speak up on others.
fn widen_to_training(ranges: &mut [Range], known: &ChannelStatistics) {
    let nothing = Range { min: 0.0, max: 0.0 };
    let whole = ranges.iter().fold(nothing, |whole, range| whole.union(*range));
    for (range, (mean, deviation)) in ranges.iter_mut().zip(known.mean.iter().zip(&known.deviation)) {
        let (lo, hi) = (mean - TRAINED * deviation, mean + TRAINED * deviation);
        range.min = range.min.min(lo as f32).max(whole.min);
        range.max = range.max.max(hi as f32).min(whole.max);
    }
}

/// Takes elements into the ranges of their channels; `inner` are the dimensions behind the axis of channels.
pub(crate) fn widen(ranges: &mut [Range], elements: &[f32], inner: &[usize]) {
    let run = inner.iter().product::<usize>().max(1);
    for block in elements.chunks_exact(run * ranges.len().max(1)) {
        for (range, elements) in ranges.iter_mut().zip(block.chunks_exact(run)) {
            let (min, max) =
                elements.iter().fold((range.min, range.max), |(lo, hi), &x| (lo.min(x), hi.max(x)));
            *range = Range { min, max };
        }
    }
}

/// The input of a product, and which of its rows are looked at.
struct Input {
    node: NodeId,
    value: ValueId,
    /// Weights of an output channel.
    inputs: usize,
    groups: usize,
    /// Whether second moments are wanted, and not means alone.
    wants_products: bool,
    /// Rows of each batch.
    taken: usize,
    rows: Rows,
}

/// What a row is.
enum Rows {
    /// A window of a convolution over `[N, C, spatial...]`.
    Windows { window: Window, channels: usize, extents: Vec<usize>, results: Vec<usize> },
    /// The last axis.
    Vectors,
}

impl Input {
    fn of(graph: &Graph, node: NodeId, batches: usize, wants_products: bool) -> Option<Input> {
        let operands = graph.operands(node);
        let (value, shape) = (operands[0], graph.shape(operands[0]));
        let weights = graph.shape(operands[1]);
        let (inputs, groups, rows) = match graph.op(node)? {
            Op::Conv(c) if c.layout == Layout::ChannelsFirst => {
                let extents = shape[2..].to_vec();
                let results = c.window.output(&extents, false).ok()?;
                let rows = Rows::Windows { window: c.window.clone(), channels: shape[1], extents, results };
                (weights[1..].iter().product(), c.groups, rows)
            }
            Op::MatMul(_) => (weights[0], 1, Rows::Vectors),
            _ => return None,
        };
        if inputs == 0 || shape.elements() == 0 || graph.ty(value).dtype != qcc_ir::DType::F32 {
            return None;
        }
        let wanted = (ROWS_PER_INPUT * inputs).clamp(LEAST_ROWS, MOST_ROWS);
        Some(Input {
            node,
            value,
            inputs,
            groups,
            wants_products,
            taken: wanted.div_ceil(batches.max(1)),
            rows,
        })
    }

    fn bytes(&self) -> usize {
        let each = if self.wants_products { self.inputs } else { 0 };
        self.groups * self.inputs * each * size_of::<f32>()
    }

    /// Some rows of a batch, spread over its samples, one behind the other: for each group its inputs.
    fn rows(&self, batch: &Batch<'_>, at: usize) -> Vec<f32> {
        let elements = batch.floats(0, at);
        let count = match &self.rows {
            Rows::Vectors => elements.len() / self.inputs,
            Rows::Windows { channels, extents, results, .. } => {
                let sample = channels * extents.iter().product::<usize>();
                elements.len() / sample.max(1) * results.iter().product::<usize>()
            }
        };
        let taken = self.taken.min(count);
        let mut rows = Vec::with_capacity(taken * self.groups * self.inputs);
        for i in 0..taken {
            // Evenly spread, from another start in each batch.
            let row = (i * count / taken + batch.index.wrapping_mul(7919)) % count;
            match &self.rows {
                Rows::Vectors => {
                    rows.extend_from_slice(&elements[row * self.inputs..(row + 1) * self.inputs])
                }
                Rows::Windows { window, channels, extents, results } => {
                    push_window(&mut rows, elements, window, *channels, extents, results, row);
                }
            }
        }
        rows
    }
}

/// The elements under one window, channel by channel, zeros in the padding.
fn push_window(
    rows: &mut Vec<f32>,
    elements: &[f32],
    window: &Window,
    channels: usize,
    extents: &[usize],
    results: &[usize],
    row: usize,
) {
    let plane: usize = extents.iter().product();
    let places: usize = results.iter().product();
    let (sample, mut place) = (row / places, row % places);
    let mut first = vec![0isize; extents.len()];
    for d in (0..extents.len()).rev() {
        first[d] = (place % results[d] * window.strides[d]) as isize - window.pads_begin[d] as isize;
        place /= results[d];
    }
    // Where each tap lies in a plane; None in the padding.
    let mut taps = Vec::with_capacity(window.taps());
    for tap in 0..window.taps() {
        let (mut rest, mut offset, mut stride) = (tap, Some(0), 1);
        for d in (0..extents.len()).rev() {
            let at = first[d] + (rest % window.kernel[d] * window.dilations[d]) as isize;
            rest /= window.kernel[d];
            let inside = usize::try_from(at).ok().filter(|&a| a < extents[d]);
            offset = offset.zip(inside).map(|(o, a)| o + a * stride);
            stride *= extents[d];
        }
        taps.push(offset);
    }
    for c in 0..channels {
        let plane = &elements[(sample * channels + c) * plane..][..plane];
        rows.extend(taps.iter().map(|tap| tap.map_or(0.0, |i| plane[i])));
    }
}

/// Sums over rows.
struct Sums {
    inputs: usize,
    groups: usize,
    rows: u64,
    sum: Vec<f64>,
    products: Vec<f32>,
    /// Rows that were not multiplied yet.
    waiting: Vec<f32>,
}

impl Sums {
    fn new(input: &Input) -> Sums {
        let (inputs, groups) = (input.inputs, input.groups);
        Sums {
            inputs,
            groups,
            rows: 0,
            sum: vec![0.0; groups * inputs],
            products: vec![0.0; input.bytes() / size_of::<f32>()],
            waiting: Vec::new(),
        }
    }

    fn take(&mut self, rows: &[f32]) {
        self.waiting.extend_from_slice(rows);
        if self.waiting.len() >= ROWS_AT_ONCE * self.groups * self.inputs {
            self.multiply();
        }
    }

    fn multiply(&mut self) {
        let (n, width) = (self.inputs, self.inputs * self.groups);
        let count = self.waiting.len() / width;
        self.rows += count as u64;
        for row in self.waiting.chunks_exact(width) {
            self.sum.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
        }
        if self.products.is_empty() {
            // Means are all that is wanted.
        } else if self.groups == 1 {
            if let (Ok(x), Ok(mut h)) = (
                ArrayView2::from_shape((count, n), &self.waiting),
                ArrayViewMut2::from_shape((n, n), &mut self.products),
            ) {
                general_mat_mul(1.0, &x.t(), &x, 1.0, &mut h);
            }
        } else {
            for row in self.waiting.chunks_exact(width) {
                for (x, h) in row.chunks_exact(n).zip(self.products.chunks_exact_mut(n * n)) {
                    for (xi, h) in x.iter().zip(h.chunks_exact_mut(n)) {
                        h.iter_mut().zip(x).for_each(|(h, xj)| *h += xi * xj);
                    }
                }
            }
        }
        self.waiting.clear();
    }

    fn finish(mut self) -> Vec<Moments> {
        self.multiply();
        let n = self.inputs;
        let each = self.products.len() / self.groups;
        let of_group = |(g, s): (usize, &[f64])| Moments {
            rows: self.rows,
            sum: s.to_vec(),
            products: self.products[g * each..(g + 1) * each].to_vec(),
        };
        self.sum.chunks_exact(n).enumerate().map(of_group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Precision, Session, Threads, bundled};
    use qcc_passes::Repairs;

    #[test]
    fn a_window_times_weights_is_what_the_convolution_computes() {
        // Two samples of two channels of 5×6, a window of 3×2 with strides, dilations and uneven padding.
        let (channels, extents) = (2, [5usize, 6]);
        let window = Window::new([3, 2]).strides([2, 1]).dilations([1, 2]).pads([1, 0], [0, 1]);
        let results = window.output(&extents, false).unwrap();
        let elements: Vec<f32> = (0..2 * channels * 30).map(|i| (i * 37 % 23) as f32 - 11.0).collect();
        let weights: Vec<f32> = (0..channels * 6).map(|i| (i * 5 % 7) as f32 - 3.0).collect();
        for row in 0..2 * results[0] * results[1] {
            let mut rows = Vec::new();
            push_window(&mut rows, &elements, &window, channels, &extents, &results, row);
            let got: f32 = rows.iter().zip(&weights).map(|(x, w)| x * w).sum();
            let (sample, place) = (row / (results[0] * results[1]), row % (results[0] * results[1]));
            let (oy, ox) = ((place / results[1]) as isize, (place % results[1]) as isize);
            let mut expected = 0.0;
            for c in 0..channels {
                for (ky, kx) in (0..3isize).flat_map(|y| (0..2isize).map(move |x| (y, x))) {
                    let (y, x) = (2 * oy - 1 + ky, ox + 2 * kx);
                    if (0..5).contains(&y) && (0..6).contains(&x) {
                        let at = (sample * channels + c) * 30 + (y * 6 + x) as usize;
                        expected += elements[at] * weights[c * 6 + (ky * 2 + kx) as usize];
                    }
                }
            }
            assert_eq!(got, expected, "row {row}");
        }
    }

    #[test]
    fn repaired_networks_are_closer_to_float_and_the_same_for_any_number_of_threads() {
        let logits = |precision: Precision, repairs: Repairs, threads: usize| {
            let compiler = Compiler::new()
                .precision(precision)
                .calibration(bundled::calibration().unwrap().limit(48))
                .preprocess(bundled::preprocess())
                .calibration_threads(Threads::new(threads).unwrap())
                .repairs(repairs);
            let model = compiler.compile_onnx(bundled::FASHION_RESNET8).unwrap();
            let feed = bundled::test_images()
                .unwrap()
                .limit(64)
                .bind(model.inputs(), &bundled::preprocess())
                .unwrap();
            let mut session = Session::new(&model);
            let run = |i| session.run(&[(&feed.batch(i).unwrap()[0]).into()]).unwrap()[0].to_f32().unwrap();
            (0..feed.batches()).flat_map(run).collect::<Vec<f32>>()
        };
        let float = logits(Precision::Float, Repairs::NONE, 1);
        let noise = |repairs, threads| -> (f64, Vec<f32>) {
            let got = logits(Precision::Int8, repairs, threads);
            (float.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum(), got)
        };
        let (plain, _) = noise(Repairs::NONE, 1);
        let rounding = Repairs { rounding: true, bias: true, ..Repairs::NONE };
        let (rounded, one) = noise(rounding, 1);
        assert!(rounded < plain, "{rounded} {plain}");
        for threads in [2, 3] {
            assert_eq!(noise(rounding, threads).1, one, "{threads} threads");
        }
        assert_eq!(noise(Repairs::ALL, 1).1, noise(Repairs::ALL, 2).1);
    }
}
