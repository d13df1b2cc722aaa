//! Biases take the mean error of what the layers behind a product see.
//!
//! Rounding is no noise of mean zero where values are few and near zero: behind a ReLU, what is below half a step is lost, and what
//! noise lifts above zero stays. Such errors have the same sign on all samples, so layers add them up. With y what a product of the
//! quantized network makes before its clamp, all layers before it being quantized and corrected, and q rounding to the grid of
//! the result, the bias of each output channel takes the d with
//!
//! ```text
//! E[q(clamp(y + d))] = E[result in float]
//! ```
//!
//! (Nagel et al. 2019, "Data-free quantization", appendix D, "empirical bias correction", which compares what comes before the clamp;
//! behind it, it is the error that others see.) `runtime` runs the samples; here is what is to be observed, and what is made of it.

use crate::{
    Context, Pass, PassError, Record,
    edit::{Bias, Product, clamp_of, has_weights},
    insert_fake_quant::clamp_behind,
    isolate::grid_behind,
};
use qcc_ir::{
    Graph, NodeId, Op, numerics,
    ops::{Clamp, FakeQuant},
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const CORRECT_MEANS: Pass = Pass { name: "correct_means", run };

/// What is added to the biases of products, by their names: a number for each output channel.
pub type BiasShifts = BTreeMap<String, Vec<f32>>;

/// The largest shift that is taken, in steps of the grid: a larger error would be none of rounding.
const MOST: i32 = 8;
/// Parts of a step that are told apart.
const PARTS: i32 = 8;
/// By how many times the shift a mean may grow, so that it is taken to grow evenly: over a whole step it is once at most.
const MOST_SMOOTH: f64 = 2.0;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for (name, shifts) in &ctx.ranges.shifts {
        let Some(node) = graph.find(name) else { continue };
        match Bias::of(graph, node).filter(|b| is_corrigible(graph, node) && b.numbers.len() == shifts.len())
        {
            Some(bias) => {
                bias.shift(graph, node, shifts.iter().map(|s| f64::from(*s)))?;
                record.applied(name, "the mean of its result is that of float");
            }
            None => record.declined(name, "it is another product than the one that was observed"),
        }
    }
    Ok(())
}

/// A product on grids whose bias can be shifted.
fn is_corrigible(graph: &Graph, node: NodeId) -> bool {
    let weights = graph.operands(node).get(1).and_then(|w| graph.op(w.node));
    has_weights(graph, node) && matches!(weights, Some(Op::FakeQuant(_))) && Bias::of(graph, node).is_some()
}

/// A product of a graph at [`Stage::FakeQuant`](qcc_ir::Stage::FakeQuant) whose bias can make up for an error of the mean.
#[derive(Clone, PartialEq, Debug)]
pub struct CorrigibleProduct {
    /// Its name, which is the same in the float graph.
    pub name: String,
    /// Its node.
    pub node: NodeId,
    /// The name of the node of the float graph whose first result is to have the same mean: its own, or that of the clamp behind it.
    pub result: String,
    /// The axis of output channels of its result.
    pub axis: usize,
    clamp: Clamp,
    /// The grid of the result; `None` where it is not rounded.
    grid: Option<FakeQuant>,
}

/// The products whose biases can be shifted, in the order of execution.
pub fn corrigible_products(graph: &Graph) -> Vec<CorrigibleProduct> {
    let product = |node: NodeId| {
        let mut product = Product::of(graph, node).filter(|_| is_corrigible(graph, node))?;
        let behind = clamp_behind(graph, node);
        let result = behind.unwrap_or(node);
        let clamp = match behind.and_then(|b| clamp_of(graph, b)) {
            Some(outer) if *product.clamp() == Clamp::NONE => outer,
            Some(_) => return None,
            None => *product.clamp(),
        };
        let grid = grid_behind(graph, result);
        let axis = product.channel_axis(graph.shape(node.out()).rank());
        let name = |node: NodeId| graph.node(node).name.clone();
        Some(CorrigibleProduct { name: name(node), node, result: name(result), axis, clamp, grid })
    };
    graph.order().into_iter().filter_map(product).collect()
}

impl CorrigibleProduct {
    /// The graph in which this product does not clamp its result, so that it can be observed as it is.
    ///
    /// # Errors
    /// Where the op refuses it.
    pub fn unclamped(&self, graph: &Graph) -> Result<Graph, PassError> {
        let mut graph = graph.clone();
        if let Some(mut product) = Product::of(&graph, self.node) {
            *product.clamp() = Clamp::NONE;
            graph.set_op(self.node, product.op())?;
        }
        Ok(graph)
    }

    /// Adds shifts to its bias, one for each output channel.
    ///
    /// # Errors
    /// Where the graph refuses the new constant.
    pub fn shift(&self, graph: &mut Graph, shifts: &[f32]) -> Result<(), PassError> {
        match Bias::of(graph, self.node) {
            Some(bias) => bias.shift(graph, self.node, shifts.iter().map(|s| f64::from(*s))),
            None => Ok(()),
        }
    }

    /// An empty histogram for a channel of its unclamped result; `None` where the result is not rounded, so that a shift moves its mean
    /// as far, but for a clamp.
    pub fn histogram(&self) -> Option<StepHistogram> {
        let grid = self.grid.as_ref()?;
        let (scale, zero_point) = grid.params.as_per_tensor()?;
        let code = |x: f32| numerics::quantize(x, scale, zero_point, grid.lo, grid.hi) - zero_point;
        let codes = [code(self.clamp.lo), code(self.clamp.hi)];
        let first = PARTS * (codes[0] - MOST - 1);
        let bins = (PARTS * (codes[1] + MOST + 1) - first) as usize;
        Some(StepHistogram { scale, codes, first, counts: vec![0; bins] })
    }
}

/// How often results before their clamp are in each eighth of a step of their grid: then q(clamp(y + d)) is known for every d of
/// so many eighths, as codes change in the middle of a step. Counts add up in any order.
#[derive(Clone, PartialEq, Debug)]
pub struct StepHistogram {
    scale: f32,
    /// The codes of the bounds of the clamp, less the zero point.
    codes: [i32; 2],
    /// The first eighth. What is below it, or above the last one, is beyond the codes whatever the shift is.
    first: i32,
    counts: Vec<u32>,
}

impl StepHistogram {
    /// Takes elements in.
    pub fn take(&mut self, elements: &[f32]) {
        let part = self.scale / PARTS as f32;
        let last = (self.counts.len() - 1) as f32;
        for y in elements {
            // What is not finite is in the first or the last; NaN in the first, as its code is the lowest.
            let at = ((y / part).floor() - self.first as f32).max(0.0).min(last);
            let count = &mut self.counts[at as usize];
            *count = count.saturating_add(1);
        }
    }

    /// Adds another histogram of the same channel.
    pub fn merge(&mut self, other: &StepHistogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a = a.saturating_add(*b));
    }

    /// The shift with which the mean of results is `mean`; where none up to eight steps is, the least that comes as near as any.
    pub fn shift(&self, mean: f64) -> f32 {
        if self.counts.iter().all(|c| *c == 0) || !mean.is_finite() {
            return 0.0;
        }
        let wanted = mean / f64::from(self.scale);
        let ends = MOST * PARTS;
        // Means do not fall: the first shift with which they are what is wanted, or more.
        let (mut below, mut above) = (-ends - 1, ends + 1);
        while above - below > 1 {
            let middle = (below + above).div_euclid(2);
            match self.mean(middle) >= wanted {
                true => above = middle,
                false => below = middle,
            }
        }
        let parts = if above > ends {
            // No shift is enough: the first that is as good as the last.
            let most = self.mean(ends);
            f64::from((-ends..=ends).find(|d| self.mean(*d) >= most).unwrap_or(0).max(0))
        } else if above == -ends {
            let least = self.mean(-ends);
            f64::from((-ends..=ends).rev().find(|d| self.mean(*d) <= least).unwrap_or(0).min(0))
        } else {
            let (lo, hi) = (self.mean(below), self.mean(above));
            match (wanted - lo) / (hi - lo) {
                // Many elements are the same, and change their code together somewhere between.
                part if hi - lo > MOST_SMOOTH / f64::from(PARTS) => f64::from(below) + part.round(),
                part => f64::from(below) + part,
            }
        };
        (parts / f64::from(PARTS) * f64::from(self.scale)) as f32
    }

    /// The mean of q(clamp(y + d)) in steps, d being so many eighths of one.
    fn mean(&self, d: i32) -> f64 {
        let [lo, hi] = self.codes;
        let (mut sum, mut count) = (0i64, 0i64);
        for (i, &n) in self.counts.iter().enumerate() {
            // Half a step and more above a code is the next one's.
            let code = (self.first + i as i32 + d + PARTS / 2).div_euclid(PARTS);
            sum += i64::from(n) * i64::from(code.clamp(lo, hi));
            count += i64::from(n);
        }
        sum as f64 / count.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::{DType, QuantParams};

    /// A product on a grid of `scale`, codes 0 to 255 around `zero_point`.
    fn product(scale: f32, zero_point: i32, clamp: Clamp) -> CorrigibleProduct {
        let params = QuantParams::per_tensor(scale, zero_point).unwrap();
        let grid = FakeQuant { params, dtype: DType::U8, lo: 0, hi: 255 };
        let mut graph = Graph::new("one");
        let x = graph.input("x", qcc_ir::TensorType::f32(&[1]).unwrap()).unwrap();
        CorrigibleProduct {
            name: "x".into(),
            node: x.node,
            result: "x".into(),
            axis: 0,
            clamp,
            grid: Some(grid),
        }
    }

    fn seen(p: &CorrigibleProduct, y: f32) -> f32 {
        let grid = p.grid.as_ref().unwrap();
        let (scale, zero_point) = grid.params.as_per_tensor().unwrap();
        numerics::fake_quant(p.clamp.apply(y), scale, zero_point, grid.lo, grid.hi)
    }

    fn mean(p: &CorrigibleProduct, values: &[f32], shift: f32) -> f64 {
        values.iter().map(|y| f64::from(seen(p, y + shift))).sum::<f64>() / values.len() as f64
    }

    #[test]
    fn the_mean_behind_the_shift_is_that_of_float() {
        // Mostly below zero, and few of more than a step: what rounding loses is no noise.
        let values: Vec<f32> =
            (0..4000).map(|i| ((i * 37 % 4000) as f32 / 4000.0).powi(3) * 6.0 - 1.0).collect();
        for (scale, zero_point, clamp) in [
            (0.25, 0, Clamp::RELU),
            (1.7, 0, Clamp::RELU),
            (0.02, 0, Clamp { lo: 0.0, hi: 3.3 }),
            (0.05, 20, Clamp::NONE),
        ] {
            let p = product(scale, zero_point, clamp);
            let mut histogram = p.histogram().unwrap();
            histogram.take(&values[..1000]);
            let mut other = p.histogram().unwrap();
            other.take(&values[1000..]);
            histogram.merge(&other);
            for error in [-0.6, -0.03, 0.0, 0.07, 0.5] {
                let plain = mean(&p, &values, 0.0);
                let target = plain + error * plain.abs().min(f64::from(scale));
                let shift = histogram.shift(target);
                let off = mean(&p, &values, shift) - target;
                // Between eighths of a step means are interpolated.
                assert!(off.abs() < 0.05 * f64::from(scale), "{scale} {clamp:?} {error}: {shift}, {off}");
            }
        }
    }

    #[test]
    fn elements_that_are_the_same_go_to_the_nearer_code() {
        // 90 of 100 are 0.52 steps, and are a step too high.
        let values: Vec<f32> = (0..100).map(|i| if i < 90 { 0.52 } else { i as f32 * 0.1 }).collect();
        let p = product(1.0, 0, Clamp::RELU);
        let mut histogram = p.histogram().unwrap();
        histogram.take(&values);
        for (target, code) in [(0.52 * 0.9 + 0.945, 1.0), (0.3 * 0.9 + 0.945, 0.0)] {
            assert_eq!(seen(&p, 0.52 + histogram.shift(target)), code, "{target}");
        }
    }

    #[test]
    fn counts_tell_what_every_shift_of_eighths_makes() {
        let values: Vec<f32> = (0..999).map(|i| (i * 71 % 999) as f32 * 0.013 - 5.0).collect();
        let p = product(0.037, 100, Clamp { lo: -1.0, hi: 2.0 });
        let mut histogram = p.histogram().unwrap();
        histogram.take(&values);
        for d in [-64, -9, -1, 0, 2, 3, 64] {
            let expected = mean(&p, &values, d as f32 * 0.037 / 8.0) / 0.037;
            assert!((histogram.mean(d) - expected).abs() < 2e-3, "{d}: {} {expected}", histogram.mean(d));
        }
    }

    #[test]
    fn what_no_shift_can_reach_takes_none_that_does_nothing() {
        let p = product(0.1, 0, Clamp::RELU);
        let of = |values: &[f32]| {
            let mut histogram = p.histogram().unwrap();
            histogram.take(values);
            histogram
        };
        // A dead channel; one that is saturated; nothing at all; what is not finite.
        assert_eq!(of(&[-50.0; 8]).shift(0.0), 0.0);
        assert_eq!(of(&[-50.0; 8]).shift(0.05), 0.0);
        assert_eq!(of(&[90.0; 8]).shift(26.0), 0.0);
        assert_eq!(of(&[]).shift(1.0), 0.0);
        assert_eq!(of(&[1.0]).shift(f64::NAN), 0.0);
        of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN]).shift(3.0);
        // Eight steps are the most; what is within half a step of them comes as near.
        assert!((0.7..=0.8).contains(&of(&[1.0; 8]).shift(9.0)));
        assert!((-0.8..=-0.7).contains(&of(&[1.0; 8]).shift(0.0)));
    }
}
