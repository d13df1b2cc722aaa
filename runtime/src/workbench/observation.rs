//! What the layers of a float model and of its quantized one are on samples, side by side.

use super::facts::{Causes, ChannelFacts, CodesUsed, GridFacts, LayerError, LsbDifference, Saturation};
use crate::{
    Calibrated, Calibrator, Compiler, Decibels, Error, Feed, Precision, Prepared, SquaredError,
    compiler::widen,
    observe::{Batch, Observed, observe},
};
use qcc_ir::{Graph, Op, Stage, ValueId, ops::FakeQuant};
use qcc_passes::{
    Collector, Distribution, Isolated, LayerNoise, QuantizedLayer, Range, Statistics, equalizable_values,
    equalize, isolated, quantized_layers, value_name, without_grids,
};
use std::collections::BTreeMap;

/// Differences of codes that are told apart: −`MOST_STEPS` to `MOST_STEPS`, those beyond being counted with the ends.
const MOST_STEPS: i64 = 5;
const DIFFERENCES: usize = 2 * MOST_STEPS as usize + 1;
/// Codes of 8 bits.
const CODES: usize = 256;

/// What was seen.
pub(super) struct Observation {
    statistics: Statistics,
    /// The names of their values in the statistics, by the name of the layer; so is all below.
    values: BTreeMap<String, String>,
    errors: BTreeMap<String, LayerError>,
    grids: BTreeMap<String, GridFacts>,
    channels: BTreeMap<String, Vec<Range>>,
    /// Of the results of fake-quant (or of the model, with int8-dynamic) and of int8 against float.
    pub(super) results: Option<Decibels>,
    pub(super) results_int8: Option<Decibels>,
    /// The float graph that was taken for the truth.
    pub(super) float: Graph,
    /// The graph on its grids; `None` where there are none that are known before it runs.
    pub(super) quantized: Option<Graph>,
}

impl Observation {
    pub(super) fn error(&self, layer: &str) -> LayerError {
        self.errors.get(layer).cloned().unwrap_or_default()
    }

    pub(super) fn grid(&self, layer: &str) -> Option<GridFacts> {
        self.grids.get(layer).copied()
    }

    pub(super) fn distribution(&self, layer: &str, bins: usize) -> Option<Distribution> {
        self.statistics.distribution(self.values.get(layer)?, bins)
    }

    pub(super) fn channels(&self, layer: &str, groups: usize) -> Option<ChannelFacts> {
        let ranges = self.channels.get(layer)?;
        let magnitude = |r: &Range| f64::from(r.max.max(-r.min));
        let largest =
            (0..ranges.len()).max_by(|&a, &b| magnitude(&ranges[a]).total_cmp(&magnitude(&ranges[b])))?;
        let mut magnitudes: Vec<f64> = ranges.iter().map(magnitude).collect();
        magnitudes.sort_by(f64::total_cmp);
        let (median, most) = (magnitudes[magnitudes.len() / 2], magnitudes[magnitudes.len() - 1]);
        if median.is_nan() || median <= 0.0 || !most.is_finite() {
            return None;
        }
        let grouped_by = ranges.len().div_ceil(groups);
        let joined = |group: &[Range]| {
            let join = |a: Range, b: &Range| Range { min: a.min.min(b.min), max: a.max.max(b.max) };
            group.iter().fold(Range { min: 0.0, max: 0.0 }, join)
        };
        Some(ChannelFacts {
            channels: ranges.len(),
            grouped_by,
            groups: ranges.chunks(grouped_by).map(joined).collect(),
            unused_bits: (most / median).log2(),
            largest,
        })
    }
}

/// One layer of the float graph.
struct ShownLayer {
    name: String,
    value: ValueId,
    /// Its number among those that may be equalized.
    channels: Option<usize>,
}

/// One layer of the quantized graph.
struct Layer {
    name: String,
    /// Its number among the values that float shows.
    float: usize,
    grid: Option<FakeQuant>,
    is_result: bool,
}

/// Everything that is counted, in any order.
struct Counts {
    collector: Collector,
    layers: Vec<LayerCounts>,
    channels: Vec<Vec<Range>>,
}

#[derive(Clone)]
struct LayerCounts {
    elements: u64,
    below: u64,
    above: u64,
    codes: Vec<u64>,
    differences: [u64; DIFFERENCES],
    largest: u32,
}

impl LayerCounts {
    fn new() -> LayerCounts {
        LayerCounts {
            elements: 0,
            below: 0,
            above: 0,
            codes: vec![0; CODES],
            differences: [0; DIFFERENCES],
            largest: 0,
        }
    }

    fn merge(&mut self, other: &LayerCounts) {
        self.elements += other.elements;
        self.below += other.below;
        self.above += other.above;
        self.codes.iter_mut().zip(&other.codes).for_each(|(a, b)| *a += b);
        self.differences.iter_mut().zip(&other.differences).for_each(|(a, b)| *a += b);
        self.largest = self.largest.max(other.largest);
    }

    /// Counts the float values and their rounded ones, and int8's where there is one.
    fn count(&mut self, grid: &GridFacts, float: &[f32], rounded: &[f32], int8: Option<&[f32]>) {
        // A value that rounds to the outermost code is on the grid.
        let half = grid.scale / 2.0;
        let (least, most) = (grid.min - half, grid.max + half);
        self.elements += float.len() as u64;
        self.below += float.iter().filter(|x| **x < least).count() as u64;
        self.above += float.iter().filter(|x| **x > most).count() as u64;
        let per_step = 1.0 / grid.scale;
        for x in rounded {
            // Codes from the lowest of the type on, which is 0 or −128.
            let code = (x * per_step).round() as i64 + i64::from(grid.zero_point);
            let at = if grid.lo < 0 { code + 128 } else { code };
            if let Some(count) = usize::try_from(at).ok().and_then(|at| self.codes.get_mut(at)) {
                *count += 1;
            }
        }
        for (i, f) in int8.into_iter().flatten().zip(rounded) {
            let steps = ((i - f) * per_step).round() as i64;
            self.largest = self.largest.max(steps.unsigned_abs().min(u32::MAX.into()) as u32);
            self.differences[(steps.clamp(-MOST_STEPS, MOST_STEPS) + MOST_STEPS) as usize] += 1;
        }
    }

    fn saturation(&self) -> Saturation {
        let share = |n: u64| n as f64 / self.elements.max(1) as f64;
        Saturation { below: share(self.below), above: share(self.above) }
    }

    fn codes(&self, grid: &GridFacts) -> CodesUsed {
        let used = self.codes.iter().filter(|n| **n > 0).count() as u32;
        CodesUsed { used, of: (grid.hi - grid.lo + 1).max(1) as u32, bits: f64::from(used.max(1)).log2() }
    }

    fn lsb(&self) -> Option<LsbDifference> {
        let total: u64 = self.differences.iter().sum();
        let middle = MOST_STEPS as usize;
        let near: u64 = self.differences[middle - 1..=middle + 1].iter().sum();
        (total > 0).then(|| LsbDifference {
            counts: self.differences.to_vec(),
            largest: self.largest,
            equal: self.differences[middle] as f64 / total as f64,
            beyond_one: (total - near) as f64 / total as f64,
        })
    }
}

/// The grid of a value of 8 bits.
fn grid_facts(f: &FakeQuant) -> Option<GridFacts> {
    let (scale, zero_point) = f.params.as_per_tensor().filter(|_| f.dtype.size() == 1)?;
    let real = |code: i32| qcc_ir::numerics::dequantize(code, scale, zero_point);
    Some(GridFacts { scale, zero_point, lo: f.lo, hi: f.hi, min: real(f.lo), max: real(f.hi) })
}

/// Sums of one batch, which are folded in the order of the batches.
struct Sums {
    quantized: Vec<SquaredError>,
    int8: Vec<SquaredError>,
}

/// Runs the float model and its quantized forms on the samples of a feed. `compiler` has the precision that is looked at.
/// `progress` is told how many of so many batches are done.
pub(super) fn observe_layers(
    compiler: &Compiler,
    prepared: &Prepared,
    calibrated: Option<&Calibrated>,
    feed: &Feed,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Observation, Error> {
    let precision = compiler.options.precision;
    // What passes have to say was said when the model was compiled.
    let compiler = &compiler.silent();
    let (graph, _) = compiler.quantized(prepared, calibrated)?;
    let quantized = Some(graph).filter(|g| precision != Precision::Float && g.stage == Stage::FakeQuant);
    let mut float = match (&quantized, prepared.brings_grids()) {
        (Some(quantized), true) => without_grids(quantized)?,
        _ => prepared.graph().clone(),
    };
    if let Some(calibrated) = calibrated {
        equalize(&mut float, &calibrated.ranges().scales)?;
    }
    let axes: Vec<(ValueId, usize)> = equalizable_values(&float);
    // What is compared with float, and its graphs: fake-quant and int8; or the model itself, where grids are those of run time.
    let compared: Vec<QuantizedLayer> = match (&quantized, precision) {
        (Some(graph), _) => quantized_layers(graph),
        (None, Precision::Int8Dynamic) => quantized_layers(&float),
        (None, _) => Vec::new(),
    };
    // A float graph has the bounds of a grid that the model brought where the quantized one has the grid.
    let ends: BTreeMap<&str, &str> = match &quantized {
        Some(graph) => {
            compared.iter().map(|l| (l.name.as_str(), graph.node(l.value.node).name.as_str())).collect()
        }
        None => BTreeMap::new(),
    };
    let floats: Vec<ShownLayer> = quantized_layers(&float)
        .into_iter()
        .map(|QuantizedLayer { name, node, .. }| {
            let channels = axes.iter().position(|(v, _)| *v == node.out());
            let end = ends.get(name.as_str()).and_then(|end| float.find(end)).unwrap_or(node);
            ShownLayer { name, value: end.out(), channels }
        })
        .collect();
    let numbers: BTreeMap<&str, usize> =
        floats.iter().enumerate().map(|(i, l)| (l.name.as_str(), i)).collect();
    let compared: Vec<(QuantizedLayer, usize)> = compared
        .iter()
        .filter_map(|layer| {
            let number = *numbers.get(layer.name.as_str())?;
            // Where pixels are normalised in the first convolution, what is before it are pixels.
            let own = quantized.as_ref().and_then(|q| q.op(layer.node));
            let normalizes = |op: Option<&Op>| op.filter(|op| matches!(op, Op::Normalize(_))).cloned();
            let is_one =
                quantized.is_none() || normalizes(own) == normalizes(float.op(float.find(&layer.name)?));
            is_one.then(|| (layer.clone(), number))
        })
        .collect();
    let has_int8 = quantized.is_some() && matches!(precision, Precision::Int8 | Precision::Int8Dynamic);
    let shown: Vec<ValueId> = floats.iter().map(|l| l.value).collect();
    let values: Vec<ValueId> = compared.iter().map(|(l, _)| l.value).collect();
    let mut graphs = vec![Observed::new(compiler, &float, &shown)?];
    match &quantized {
        Some(graph) => {
            graphs.push(Observed::new(compiler, graph, &values)?);
            if has_int8 {
                graphs.push(Observed::lowered(
                    compiler,
                    graph,
                    &values,
                    compiler.lowering_options(prepared),
                )?);
            }
        }
        None if precision == Precision::Int8Dynamic => {
            graphs.push(Observed::lowered(
                compiler,
                prepared.graph(),
                &values,
                compiler.lowering_options(prepared),
            )?);
        }
        None => {}
    }
    let is_result = |l: &QuantizedLayer| {
        let graph = quantized.as_ref().unwrap_or(&float);
        graph.is_output(l.value)
    };
    let layers: Vec<Layer> = compared
        .iter()
        .map(|(l, float)| Layer {
            name: l.name.clone(),
            float: *float,
            grid: l.grid.clone(),
            is_result: is_result(l),
        })
        .collect();
    let grids: Vec<Option<GridFacts>> = layers.iter().map(|l| l.grid.as_ref().and_then(grid_facts)).collect();

    let has_noise = quantized.is_some();
    let total = feed.batches() * if has_noise { 2 } else { 1 };
    let mut done = 0;
    let counts = || Counts {
        collector: Collector::of_values(&float, shown.iter().copied(), Calibrator::Percentile(99.99)),
        layers: vec![LayerCounts::new(); layers.len()],
        channels: axes
            .iter()
            .map(|&(v, axis)| vec![Range { min: 0.0, max: 0.0 }; float.shape(v)[axis]])
            .collect(),
    };
    let mut sums = [vec![SquaredError::default(); layers.len()], vec![SquaredError::default(); layers.len()]];
    let states = observe(
        &graphs,
        feed,
        &compiler.threads_of_calibration()?,
        counts,
        |own, batch| {
            for (i, layer) in floats.iter().enumerate() {
                let numbers = (batch.index * batch.size) as u64..;
                for (number, sample) in numbers.zip(batch.samples_of(0, i)) {
                    own.collector.count(layer.value, number, sample);
                }
                if let Some(n) = layer.channels {
                    let (value, axis) = axes[n];
                    widen(&mut own.channels[n], batch.floats(0, i), &float.shape(value)[axis + 1..]);
                }
            }
            Ok(compare(batch, &layers, &grids, &mut own.layers))
        },
        |of_batch: Sums| {
            let [quantized, int8] = &mut sums;
            quantized.iter_mut().zip(of_batch.quantized).for_each(|(sum, s)| *sum += s);
            int8.iter_mut().zip(of_batch.int8).for_each(|(sum, s)| *sum += s);
            done += 1;
            progress(done, total);
            Ok(())
        },
    )?;
    drop(graphs);
    let mut all = counts();
    for state in states {
        all.collector.merge(state.collector);
        all.layers.iter_mut().zip(&state.layers).for_each(|(a, b)| a.merge(b));
        for (ours, theirs) in all.channels.iter_mut().flatten().zip(state.channels.into_iter().flatten()) {
            *ours = Range { min: ours.min.min(theirs.min), max: ours.max.max(theirs.max) };
        }
    }

    let mut errors: BTreeMap<String, LayerError> = BTreeMap::new();
    for (i, layer) in layers.iter().enumerate() {
        let own = &all.layers[i];
        let grid = grids[i].as_ref();
        let error = LayerError {
            cumulative: sums[0][i].decibels(),
            cumulative_int8: sums[1][i].decibels().filter(|_| has_int8),
            saturation: grid.map(|_| own.saturation()),
            codes: grid.map(|g| own.codes(g)),
            lsb: own.lsb(),
            ..LayerError::default()
        };
        errors.insert(layer.name.clone(), error);
    }
    if let Some(quantized) = &quantized {
        let mut step = || {
            done += 1;
            progress(done, total);
        };
        let noise = noise_of_layers(compiler, &float, quantized, feed, &mut step)?;
        for (name, noise) in noise {
            let error = errors.entry(name).or_default();
            (error.local, error.causes) = (noise.all.decibels(), noise.causes());
        }
        // An input is rounded, and nothing else.
        for node in quantized.inputs() {
            if let Some(error) = errors.get_mut(&quantized.node(*node).name)
                && error.saturation.is_some()
            {
                error.local = error.cumulative;
                error.causes = Some(Causes { inputs: 0.0, parameters: 0.0, result: 1.0 });
            }
        }
    }
    let of_results = |sums: &[SquaredError]| {
        let results: Vec<SquaredError> =
            layers.iter().zip(sums).filter(|(l, _)| l.is_result).map(|(_, s)| *s).collect();
        let mut sum = SquaredError::default();
        results.iter().for_each(|s| sum += *s);
        sum.decibels().filter(|_| !results.is_empty())
    };
    let grids = layers.iter().zip(grids).filter_map(|(l, g)| Some((l.name.clone(), g?))).collect();
    let channels = axes.iter().map(|(v, _)| value_name(&float, *v)).zip(all.channels).collect();
    let values = floats.iter().map(|l| (l.name.clone(), value_name(&float, l.value))).collect();
    Ok(Observation {
        values,
        results: of_results(&sums[0]),
        results_int8: of_results(&sums[1]).filter(|_| has_int8),
        statistics: all.collector.into_statistics(),
        errors,
        grids,
        channels,
        float,
        quantized,
    })
}

/// Compares what the graphs show of a batch.
fn compare(
    batch: &Batch<'_>,
    layers: &[Layer],
    grids: &[Option<GridFacts>],
    counts: &mut [LayerCounts],
) -> Sums {
    let mut sums = Sums { quantized: Vec::new(), int8: Vec::new() };
    if batch.values.len() < 2 {
        return sums;
    }
    let has_int8 = batch.values.len() > 2;
    for (i, layer) in layers.iter().enumerate() {
        let (float, rounded) = (batch.floats(0, layer.float), batch.floats(1, i));
        sums.quantized.push(SquaredError::of(rounded, float));
        let int8 = has_int8.then(|| batch.floats(2, i));
        if let Some(int8) = int8 {
            sums.int8.push(SquaredError::of(int8, float));
        }
        if let Some(grid) = &grids[i] {
            counts[i].count(grid, float, rounded, int8);
        }
    }
    sums
}

/// The noise of a layer alone.
#[derive(Clone, Copy)]
struct Noise {
    all: SquaredError,
    inputs: f64,
    parameters: f64,
    result: f64,
}

impl Noise {
    fn causes(&self) -> Option<Causes> {
        let sum = self.inputs + self.parameters + self.result;
        let share = |x: f64| x / sum;
        (sum > 0.0 && sum.is_finite()).then(|| Causes {
            inputs: share(self.inputs),
            parameters: share(self.parameters),
            result: share(self.result),
        })
    }
}

/// What rounding costs each layer alone.
fn noise_of_layers(
    compiler: &Compiler,
    float: &Graph,
    quantized: &Graph,
    feed: &Feed,
    step: &mut dyn FnMut(),
) -> Result<BTreeMap<String, Noise>, Error> {
    let Isolated { graph, layers } = isolated(float, quantized, feed.batch_size())?;
    let mut shown: Vec<ValueId> = Vec::new();
    let of = |n: &LayerNoise| [Some(n.signal), Some(n.all), n.inputs, n.parameters, n.result];
    for noise in layers.values() {
        shown.extend(of(noise).into_iter().flatten());
    }
    let mut sums = vec![0.0; shown.len()];
    if !shown.is_empty() {
        let observed = [Observed::new(compiler, &graph, &shown)?];
        observe(
            &observed,
            feed,
            &compiler.threads_of_calibration()?,
            || (),
            |(), batch| {
                let sum = |i| batch.floats(0, i).iter().map(|x| f64::from(*x)).sum::<f64>();
                Ok((0..shown.len()).map(sum).collect::<Vec<f64>>())
            },
            |of_batch| {
                sums.iter_mut().zip(of_batch).for_each(|(s, x)| *s += x);
                step();
                Ok(())
            },
        )?;
    }
    let mut sums = sums.into_iter();
    let mut next = |value: Option<ValueId>| value.and_then(|_| sums.next()).unwrap_or(0.0);
    let noise = |(name, noise): (String, LayerNoise)| {
        let [signal, all, inputs, parameters, result] = of(&noise).map(&mut next);
        (name, Noise { all: SquaredError { noise: all, signal }, inputs, parameters, result })
    };
    Ok(layers.into_iter().map(noise).collect())
}
