//! Means of what layers of the quantized network see, layer by layer, each behind those that were corrected before it.

use super::{Calibrated, Compiler, Event, Prepared, graph_inputs};
use crate::{
    Error, Feed, Samples,
    observe::{Batch, Observed, observe},
};
use qcc_ir::{Graph, Shape, ValueId};
use qcc_passes::{BiasShifts, CorrigibleProduct, Ranges, channel_runs, corrigible_products};

/// Runs of a sample through the network, on average half of it, over all layers; and samples a layer.
const MOST_RUNS: usize = 3000;
const SAMPLES: [usize; 2] = [8, 64];
/// Channels of a layer that have histograms, of some 9 KB each and thread.
const MOST_CHANNELS: usize = 4096;

/// A product of the quantized network, and the value of the float network that has its mean.
struct Layer {
    product: CorrigibleProduct,
    float: ValueId,
    shape: Shape,
}

impl Layer {
    fn channels(&self) -> usize {
        self.shape[self.product.axis]
    }

    /// Does something with the elements of each channel.
    fn each<'a>(&self, batch: &'a Batch<'_>, at: usize, mut with: impl FnMut(usize, &'a [f32])) {
        channel_runs(batch.floats(0, at), &self.shape, self.product.axis).for_each(|(c, run)| with(c, run));
    }
}

impl Compiler {
    /// The ranges, with what biases are to be shifted by where that is wanted.
    ///
    /// # Errors
    /// Where a sample cannot be read, or a graph cannot be compiled.
    pub(super) fn with_means(
        &self,
        prepared: &Prepared,
        mut ranges: Ranges,
        samples: &Samples,
    ) -> Result<Ranges, Error> {
        if ranges.repairs.means && !prepared.graph().inputs().is_empty() {
            ranges.shifts = self.bias_shifts(prepared, &ranges, samples)?;
        }
        Ok(ranges)
    }

    /// A calibration with the means of the network that this compiler makes of it, some of whose layers may be float where those of the
    /// one that has calibrated were not.
    ///
    /// # Errors
    /// Where a sample cannot be read, or a graph cannot be compiled.
    pub(crate) fn corrected(
        &self,
        prepared: &Prepared,
        calibrated: &Calibrated,
    ) -> Result<Calibrated, Error> {
        let Calibrated { ranges, summary } = calibrated.clone();
        let without = Ranges { shifts: BiasShifts::new(), ..ranges };
        match self.samples.as_ref().filter(|s| !s.is_noise()) {
            Some(samples) => Ok(Calibrated { ranges: self.with_means(prepared, without, samples)?, summary }),
            None => Ok(calibrated.clone()),
        }
    }

    fn bias_shifts(
        &self,
        prepared: &Prepared,
        ranges: &Ranges,
        samples: &Samples,
    ) -> Result<BiasShifts, Error> {
        let scaled = prepared.scaled(&ranges.scales)?;
        let float = scaled.graph();
        let mut quantized = self.fake_quantized(prepared, ranges)?;
        let layer = |product: CorrigibleProduct| {
            let value = float.find(&product.result)?.out();
            let shape = quantized.shape(product.node.out()).clone();
            (*float.shape(value) == shape && shape.elements() > 0).then_some(Layer {
                product,
                float: value,
                shape,
            })
        };
        let is_small = |l: &Layer| l.channels() <= MOST_CHANNELS || l.product.histogram().is_none();
        let products = corrigible_products(&quantized).into_iter();
        let layers: Vec<Layer> = products.filter_map(layer).filter(is_small).collect();
        let count = (MOST_RUNS / layers.len().max(1)).clamp(SAMPLES[0], SAMPLES[1]);
        let feed = samples.spread(count).bind(&graph_inputs(float), &self.preprocess)?.kept()?;
        let of_float: Vec<(&Layer, ValueId)> = layers.iter().map(|l| (l, l.float)).collect();
        let means = self.means(float, &of_float, &feed)?;
        let mut shifts = BiasShifts::new();
        for (done, (layer, means)) in layers.iter().zip(means).enumerate() {
            let of_layer = self.shifts(&quantized, layer, &means, &feed)?;
            layer.product.shift(&mut quantized, &of_layer)?;
            shifts.insert(layer.product.name.clone(), of_layer);
            self.tell(Event::Calibrating { done: done + 1, total: layers.len() });
        }
        Ok(shifts)
    }

    /// The mean of each channel of each layer, in the value that has it in a graph.
    fn means(
        &self,
        graph: &Graph,
        layers: &[(&Layer, ValueId)],
        feed: &Feed,
    ) -> Result<Vec<Vec<f64>>, Error> {
        let shown: Vec<ValueId> = layers.iter().map(|(_, value)| *value).collect();
        let zero = || -> Vec<Vec<Mean>> {
            layers.iter().map(|(l, _)| vec![Mean::default(); l.channels()]).collect()
        };
        let mut all = zero();
        observe(
            &[Observed::new(self, graph, &shown)?],
            feed,
            &self.threads_of_calibration()?,
            || (),
            |(), batch| {
                let mut means = zero();
                for (i, ((layer, _), means)) in layers.iter().zip(&mut means).enumerate() {
                    layer.each(batch, i, |channel, run| means[channel].take(run.iter().copied()));
                }
                Ok(means)
            },
            |of_batch| {
                all.iter_mut().flatten().zip(of_batch.iter().flatten()).for_each(|(all, own)| all.add(own));
                Ok(())
            },
        )?;
        Ok(all.iter().map(|layer| layer.iter().map(Mean::value).collect()).collect())
    }

    /// By how much the biases of a layer of a quantized graph are to be shifted.
    fn shifts(
        &self,
        quantized: &Graph,
        layer: &Layer,
        means: &[f64],
        feed: &Feed,
    ) -> Result<Vec<f32>, Error> {
        let Some(empty) = layer.product.histogram() else {
            // What is not rounded moves with its bias, unless it is clamped.
            let result = quantized.find(&layer.product.result).unwrap_or(layer.product.node).out();
            let seen = self.means(quantized, &[(layer, result)], feed)?;
            let shift = |(mean, seen): (&f64, &f64)| {
                let shift = (mean - seen) as f32;
                if shift.is_finite() { shift } else { 0.0 }
            };
            return Ok(means.iter().zip(&seen[0]).map(shift).collect());
        };
        let bare = layer.product.unclamped(quantized)?;
        let observed = [Observed::new(self, &bare, &[layer.product.node.out()])?];
        let empty = vec![empty; layer.channels()];
        let of_threads = observe(
            &observed,
            feed,
            &self.threads_of_calibration()?,
            || empty.clone(),
            |histograms, batch| {
                layer.each(batch, 0, |channel, run| histograms[channel].take(run));
                Ok(())
            },
            |()| Ok(()),
        )?;
        let mut all = empty;
        for own in &of_threads {
            all.iter_mut().zip(own).for_each(|(all, own)| all.merge(own));
        }
        Ok(all.iter().zip(means).map(|(histogram, mean)| histogram.shift(*mean)).collect())
    }
}

/// A mean, as it comes about.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn take(&mut self, elements: impl ExactSizeIterator<Item = f32>) {
        self.count += elements.len() as u64;
        self.sum += elements.map(f64::from).sum::<f64>();
    }

    fn add(&mut self, other: &Mean) {
        self.count += other.count;
        self.sum += other.sum;
    }

    fn value(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Threads, bundled};
    use qcc_passes::Repairs;

    fn compiler(repairs: Repairs, threads: usize) -> Compiler {
        Compiler::new()
            .calibration(bundled::calibration().unwrap().limit(48))
            .preprocess(bundled::preprocess())
            .calibration_threads(Threads::new(threads).unwrap())
            .repairs(repairs)
    }

    #[test]
    fn the_means_of_all_layers_come_near_to_those_of_float() {
        let distance = |repairs: Repairs| {
            let compiler = compiler(repairs, 1);
            let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
            let calibrated = compiler.calibrate(&prepared).unwrap();
            let scaled = prepared.scaled(&calibrated.ranges.scales).unwrap();
            let quantized = compiler.fake_quantized(&prepared, &calibrated.ranges).unwrap();
            let samples = bundled::calibration().unwrap().limit(48);
            let feed = samples.bind(&graph_inputs(scaled.graph()), &bundled::preprocess()).unwrap();
            // What others see, which is rounded.
            let means = |graph: &Graph, value: &dyn Fn(&CorrigibleProduct) -> ValueId| {
                let layers: Vec<Layer> = corrigible_products(&quantized)
                    .into_iter()
                    .map(|p| Layer { float: value(&p), shape: graph.shape(value(&p)).clone(), product: p })
                    .collect();
                compiler
                    .means(graph, &layers.iter().map(|l| (l, l.float)).collect::<Vec<_>>(), &feed)
                    .unwrap()
            };
            let float = means(scaled.graph(), &|p| scaled.graph().find(&p.result).unwrap().out());
            let rounded = means(&quantized, &|p| {
                let result = quantized.find(&p.result).unwrap().out();
                quantized.uses(result).first().map_or(result, |u| u.node.out())
            });
            let names = corrigible_products(&quantized).into_iter().map(|p| p.name);
            let of = |(a, b): (&Vec<f64>, &Vec<f64>)| -> f64 {
                a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
            };
            (names.collect::<Vec<_>>(), float.iter().zip(&rounded).map(of).collect::<Vec<f64>>())
        };
        let (names, plain) = distance(Repairs::NONE);
        let (_, corrected) = distance(Repairs { means: true, ..Repairs::NONE });
        assert!(plain.len() >= 8);
        let ratios = plain.iter().zip(&corrected).map(|(plain, corrected)| corrected / plain);
        let ratios: Vec<(&String, f64)> = names.iter().zip(ratios).collect();
        // But for the first, which makes one number of all of the black background.
        assert!(ratios[1..].iter().all(|(_, ratio)| *ratio < 0.2), "{ratios:?}");
    }

    #[test]
    fn shifts_are_the_same_for_any_number_of_threads() {
        let shifts = |threads: usize| {
            let compiler = compiler(Repairs::OF_PRODUCTS, threads);
            let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
            compiler.calibrate(&prepared).unwrap().ranges.shifts
        };
        let one = shifts(1);
        assert!(one.len() >= 8 && one.values().flatten().any(|s| *s != 0.0));
        assert_eq!((&shifts(2), &shifts(3)), (&one, &one));
    }
}
