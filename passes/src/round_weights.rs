//! Weights are rounded so that their errors cancel in the results, not each to what is nearest to it.
//!
//! With x the input of a product and e = w − ŵ the rounding errors of the weights of one output channel, the error of the result
//! is eᵀx, on average over samples eᵀHe with H = E[x xᵀ]. Rounding to nearest makes each e_i² small and takes no notice of
//! H. With H = L Lᵀ it is ‖Lᵀe‖², and Lᵀ is upper triangular: weights are rounded from the last to the first, each to the
//! code that makes up best for the errors of those behind it,
//!
//! ```text
//! ŵ_i = round(w_i + Σ_{k>i} L_ki·e_k / L_ii)
//! ```
//!
//! (Frantar et al. 2023, "OPTQ"; that it is Babai's nearest plane is due to Chen et al. 2025). Inputs with the most energy
//! come last, so that all others can make up for theirs. It does what AdaRound (Nagel et al. 2020) learns by gradient
//! descent, without any.
//!
//! Where the product has a bias, it takes the mean error E[eᵀx] = eᵀE[x], whatever it is (Nagel et al. 2019, "bias correction"),
//! and what the weights have to keep small is the rest: H is then the covariance of x.

use crate::{
    Context, Pass, PassError, Record, Repairs,
    edit::{Bias, Product, add_f32, f32_constant, has_weights},
};
use faer::{Mat, Side};
use qcc_ir::{DType, Graph, NodeId, Op, numerics::quantize, ops::FakeQuant};
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// See the module.
pub(crate) const ROUND_WEIGHTS: Pass = Pass { name: "round_weights", run };

/// Part of the mean energy of an input that is added to all: directions that samples did not have are not free.
const DAMPING: f64 = 0.01;

/// Averages over samples of what one group of input channels feeds one output channel with: x, a window or a row, as long as
/// the channel has weights and in their order.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Moments {
    /// How many x there were.
    pub rows: u64,
    /// Σ x.
    pub sum: Vec<f64>,
    /// Σ x xᵀ, by rows; empty where it is only biases that take the mean error.
    pub products: Vec<f32>,
}

/// [`Moments`] of the inputs of products with weights, by the product's name: one for each group.
pub type InputMoments = BTreeMap<String, Arc<Vec<Moments>>>;

/// Weights that were rounded, by the name of their product. Rounding takes long, and the same ranges are taken for many networks
/// where it is measured which of their layers should stay float.
#[derive(Default)]
pub struct RoundedWeights(Mutex<BTreeMap<String, Memo>>);

/// What weights were rounded by, and what became of them.
struct Memo {
    moments: Arc<Vec<Moments>>,
    grid: FakeQuant,
    repairs: Repairs,
    rounded: Arc<Rounded>,
}

impl RoundedWeights {
    /// What was kept, or what `round` makes, which is kept then.
    fn of(
        &self,
        name: &str,
        moments: &Arc<Vec<Moments>>,
        grid: &FakeQuant,
        repairs: Repairs,
        round: impl FnOnce() -> Option<Rounded>,
    ) -> Option<Arc<Rounded>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |m: &&Memo| Arc::ptr_eq(&m.moments, moments) && m.grid == *grid && m.repairs == repairs;
        if let Some(memo) = kept.get(name).filter(is_it) {
            return Some(memo.rounded.clone());
        }
        let rounded = Arc::new(round()?);
        let (moments, grid) = (moments.clone(), grid.clone());
        kept.insert(name.into(), Memo { moments, grid, repairs, rounded: rounded.clone() });
        Some(rounded)
    }
}

/// What was kept makes no difference to results.
impl PartialEq for RoundedWeights {
    fn eq(&self, _: &RoundedWeights) -> bool {
        true
    }
}

impl fmt::Debug for RoundedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RoundedWeights")
    }
}

/// The products that are rounded by the moments of their inputs.
pub fn weighted_products(graph: &Graph) -> Vec<NodeId> {
    let is_product = |&node: &NodeId| {
        let weights = graph.operands(node).get(1).and_then(|w| f32_constant(graph, *w));
        Product::of(graph, node).is_some() && has_weights(graph, node) && weights.is_some()
    };
    graph.order().into_iter().filter(is_product).collect()
}

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let name = graph.node(node).name.clone();
        let Some(moments) = ctx.ranges.moments.get(&name) else { continue };
        let Some(weights) = Weights::of(graph, node) else { continue };
        if reads_pixels(graph, node) {
            // Their normalisation has become part of the weights since.
            record.declined(&name, "its input is pixels, and calibration saw normalised ones");
            continue;
        }
        if moments.len() != weights.groups
            || moments.iter().any(|m| m.sum.len() != weights.inputs || m.rows == 0)
            || ctx.ranges.repairs.rounding && moments.iter().any(|m| m.products.len() != m.sum.len().pow(2))
        {
            record.declined(&name, "its input is another one than calibration saw");
            continue;
        }
        let corrects = ctx.ranges.repairs.bias && weights.bias.is_some();
        let rows = moments.iter().map(|m| m.rows).min().unwrap_or(0);
        let can_cancel = rows >= weights.inputs as u64;
        if ctx.ranges.repairs.rounding && !can_cancel {
            let inputs = weights.inputs;
            record.declined(
                &name,
                format!("rounded to nearest: samples have {rows} rows, which do not tell how its {inputs} inputs go together"),
            );
            if !corrects {
                continue;
            }
        }
        let cancels = ctx.ranges.repairs.rounding && can_cancel;
        let by = Repairs { rounding: cancels, bias: corrects, ..Repairs::NONE };
        let rounded = ctx.ranges.rounded.of(&name, moments, &weights.grid, by, || match cancels {
            true => weights.rounded(moments, corrects),
            false => weights.nearest(moments),
        });
        let Some(rounded) = rounded else {
            record.declined(&name, "the moments of its input have no Cholesky factor");
            continue;
        };
        let shift = corrects.then(|| rounded.shift.clone());
        let what = format!(
            "rounding errors of its results have {:.0} % of the energy that they have with weights rounded to nearest{}",
            100.0 * rounded.error / rounded.nearest.max(f64::MIN_POSITIVE),
            if corrects { ", and a mean of 0" } else { "" }
        );
        weights.store(graph, node, rounded.weights.clone(), shift)?;
        record.applied(&name, what);
    }
    Ok(())
}

/// Whether nothing but ops of one operand stand between a product and an input of u8, and none of them normalises it.
fn reads_pixels(graph: &Graph, node: NodeId) -> bool {
    let mut value = graph.operand(node, 0);
    while let [x] = graph.operands(value.node)[..] {
        if matches!(graph.op(value.node), Some(Op::Normalize(_))) {
            return false;
        }
        value = x;
    }
    graph.inputs().contains(&value.node) && graph.ty(value).dtype == DType::U8
}

/// Weights on their grid, by output channel.
struct Weights {
    numbers: Vec<f32>,
    dims: Vec<usize>,
    /// The fake-quantization behind them.
    rounding: NodeId,
    grid: FakeQuant,
    /// Output channels, and weights of each.
    outputs: usize,
    inputs: usize,
    groups: usize,
    /// Weight i of an output channel is `stride·i` behind its first, which are `step` apart.
    stride: usize,
    step: usize,
    bias: Option<Bias>,
}

struct Rounded {
    weights: Vec<f32>,
    /// What the bias of each output channel has to make up for.
    shift: Vec<f64>,
    /// Mean squared error of the results, and what it is with weights rounded to nearest.
    error: f64,
    nearest: f64,
}

/// One output channel.
struct Row {
    codes: Vec<i32>,
    shift: f64,
    error: f64,
    nearest: f64,
}

impl Weights {
    fn of(graph: &Graph, node: NodeId) -> Option<Weights> {
        let product = Product::of(graph, node)?;
        let operands = graph.operands(node);
        let rounding = operands.get(1)?.node;
        let Some(Op::FakeQuant(grid)) = graph.op(rounding) else { return None };
        let source = graph.operand(rounding, 0);
        let numbers = f32_constant(graph, source)?.to_vec();
        let shape = graph.shape(source);
        let (outputs, inputs, groups, stride, step) = match &product {
            Product::Conv(c) => {
                let inputs: usize = shape[1..].iter().product();
                (shape[0], inputs, c.groups, 1, inputs)
            }
            Product::MatMul(_) => (shape[1], shape[0], 1, shape[1], 1),
        };
        let bias = Bias::of(graph, node);
        Some(Weights {
            numbers,
            dims: shape.to_vec(),
            rounding,
            grid: grid.clone(),
            outputs,
            inputs,
            groups,
            stride,
            step,
            bias,
        })
    }

    fn at(&self, output: usize, i: usize) -> usize {
        output * self.step + i * self.stride
    }

    fn scale(&self, output: usize) -> f32 {
        let scales = self.grid.params.scales();
        scales[if scales.len() == 1 { 0 } else { output }]
    }

    /// The outputs of a group.
    fn outputs_of(&self, group: usize) -> std::ops::Range<usize> {
        let each = self.outputs / self.groups;
        group * each..(group + 1) * each
    }

    /// Rounded to nearest, with what that does to the mean of results.
    fn nearest(&self, moments: &[Moments]) -> Option<Rounded> {
        let rows = (0..self.groups).into_par_iter().flat_map_iter(|g| {
            let mean = moments[g].mean();
            self.outputs_of(g).map(move |o| {
                let codes: Vec<i32> =
                    (0..self.inputs).map(|i| self.code(o, self.numbers[self.at(o, i)].into())).collect();
                let shift = self.shift(o, &codes, &mean);
                Row { codes, shift, error: 1.0, nearest: 1.0 }
            })
        });
        Some(self.assembled(rows.collect()))
    }

    fn rounded(&self, moments: &[Moments], is_centred: bool) -> Option<Rounded> {
        let of_group = |g: usize| -> Option<Vec<Row>> {
            let mean = moments[g].mean();
            let factor = Factor::of(&moments[g], is_centred)?;
            let row = |o: usize| {
                let weights: Vec<f64> =
                    (0..self.inputs).map(|i| self.numbers[self.at(o, i)].into()).collect();
                let (codes, error) = factor.round(&weights, self.scale(o).into(), |w| self.code(o, w));
                let nearest = factor.error(&weights, self.scale(o).into(), |w| self.code(o, w));
                let shift = self.shift(o, &codes, &mean);
                Row { codes, shift, error, nearest }
            };
            Some(self.outputs_of(g).into_par_iter().map(row).collect())
        };
        let groups: Option<Vec<Vec<Row>>> = (0..self.groups).into_par_iter().map(of_group).collect();
        Some(self.assembled(groups?.into_iter().flatten().collect()))
    }

    fn code(&self, output: usize, w: f64) -> i32 {
        quantize(w as f32, self.scale(output), 0, self.grid.lo, self.grid.hi)
    }

    /// E[eᵀx].
    fn shift(&self, output: usize, codes: &[i32], mean: &[f64]) -> f64 {
        let scale = f64::from(self.scale(output));
        let error =
            |(i, q): (usize, &i32)| f64::from(self.numbers[self.at(output, i)]) - f64::from(*q) * scale;
        codes.iter().enumerate().map(error).zip(mean).map(|(e, m)| e * m).sum()
    }

    fn assembled(&self, rows: Vec<Row>) -> Rounded {
        let mut weights = vec![0f32; self.numbers.len()];
        for (o, row) in rows.iter().enumerate() {
            for (i, q) in row.codes.iter().enumerate() {
                weights[self.at(o, i)] = *q as f32 * self.scale(o);
            }
        }
        Rounded {
            weights,
            shift: rows.iter().map(|r| r.shift).collect(),
            error: rows.iter().map(|r| r.error).sum(),
            nearest: rows.iter().map(|r| r.nearest).sum(),
        }
    }

    fn store(
        self,
        graph: &mut Graph,
        node: NodeId,
        weights: Vec<f32>,
        shift: Option<Vec<f64>>,
    ) -> Result<(), PassError> {
        let name = graph.node(node).name.clone();
        let weights = add_f32(graph, &format!("{name}_rounded"), &self.dims, weights)?;
        graph.set_operand(self.rounding, 0, weights)?;
        match (self.bias, shift) {
            (Some(bias), Some(shift)) => bias.shift(graph, node, shift),
            _ => Ok(()),
        }
    }
}

impl Moments {
    /// E[x].
    fn mean(&self) -> Vec<f64> {
        self.sum.iter().map(|s| s / self.rows as f64).collect()
    }
}

/// H = L·Lᵀ, its indices in the order of their energy.
struct Factor {
    /// The inputs, those with the least energy first.
    order: Vec<usize>,
    lower: Mat<f64>,
}

impl Factor {
    fn of(moments: &Moments, is_centred: bool) -> Option<Factor> {
        let (n, rows, mean) = (moments.sum.len(), moments.rows as f64, moments.mean());
        let at = |i: usize, j: usize| {
            let product = f64::from(moments.products[i * n + j]) / rows;
            if is_centred { product - mean[i] * mean[j] } else { product }
        };
        let energy: Vec<f64> = (0..n).map(|i| at(i, i).max(0.0)).collect();
        let damping = DAMPING * energy.iter().sum::<f64>() / n as f64;
        let damping = if damping > 0.0 { damping } else { 1.0 };
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| energy[a].total_cmp(&energy[b]).then(a.cmp(&b)));
        let h = Mat::from_fn(n, n, |i, j| at(order[i], order[j]) + if i == j { damping } else { 0.0 });
        let lower = h.llt(Side::Lower).ok()?.L().to_owned();
        Some(Factor { order, lower })
    }

    /// Codes of weights, and ‖Lᵀe‖².
    fn round(&self, weights: &[f64], scale: f64, code: impl Fn(f64) -> i32) -> (Vec<i32>, f64) {
        let n = weights.len();
        let (mut codes, mut errors, mut total) = (vec![0; n], vec![0f64; n], 0.0);
        for i in (0..n).rev() {
            let (behind, own) = (self.behind(i, &errors), self.lower[(i, i)]);
            let w = weights[self.order[i]];
            let q = code(w + behind / own);
            errors[i] = w - f64::from(q) * scale;
            codes[self.order[i]] = q;
            total += (own * errors[i] + behind).powi(2);
        }
        (codes, total)
    }

    /// ‖Lᵀe‖² of weights that are rounded to nearest.
    fn error(&self, weights: &[f64], scale: f64, code: impl Fn(f64) -> i32) -> f64 {
        let errors: Vec<f64> =
            self.order.iter().map(|&i| weights[i] - f64::from(code(weights[i])) * scale).collect();
        (0..errors.len()).map(|i| (self.lower[(i, i)] * errors[i] + self.behind(i, &errors)).powi(2)).sum()
    }

    /// Σ_{k>i} L_ki·e_k.
    fn behind(&self, i: usize, errors: &[f64]) -> f64 {
        let column = self.lower.col_as_slice(i);
        column[i + 1..].iter().zip(&errors[i + 1..]).map(|(l, e)| l * e).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(rows: &[Vec<f64>]) -> Moments {
        let n = rows[0].len();
        let mut m = Moments { rows: rows.len() as u64, sum: vec![0.0; n], products: vec![0.0; n * n] };
        for x in rows {
            for i in 0..n {
                m.sum[i] += x[i];
                for j in 0..n {
                    m.products[i * n + j] += (x[i] * x[j]) as f32;
                }
            }
        }
        m
    }

    fn random(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
    }

    #[test]
    fn errors_of_inputs_that_go_together_cancel() {
        let mut state = 7;
        let rows: Vec<Vec<f64>> = (0..500)
            .map(|_| {
                let common = random(&mut state);
                (0..24).map(|_| common + 0.2 * random(&mut state)).collect()
            })
            .collect();
        let m = moments(&rows);
        let code = |w: f64| (w / 0.1).round().clamp(-127.0, 127.0) as i32;
        for is_centred in [true, false] {
            let factor = Factor::of(&m, is_centred).unwrap();
            // Of one output channel, errors may happen to cancel as they are.
            let (mut expected, mut expected_nearest, mut seen, mut seen_nearest) = (0.0, 0.0, 0.0, 0.0);
            for _ in 0..20 {
                let weights: Vec<f64> = (0..24).map(|_| random(&mut state)).collect();
                let (codes, error) = factor.round(&weights, 0.1, code);
                expected += error;
                expected_nearest += factor.error(&weights, 0.1, code);
                let of = |q: &[i32]| -> f64 {
                    let result = |x: &Vec<f64>| -> f64 {
                        (0..24).map(|i| (weights[i] - f64::from(q[i]) * 0.1) * x[i]).sum()
                    };
                    let results: Vec<f64> = rows.iter().map(result).collect();
                    let mean = if is_centred { results.iter().sum::<f64>() / 500.0 } else { 0.0 };
                    results.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / 500.0
                };
                let plain: Vec<i32> = weights.iter().map(|&w| code(w)).collect();
                seen += of(&codes);
                seen_nearest += of(&plain);
                assert!(codes.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= 8), "{codes:?} {plain:?}");
            }
            assert!(expected < 0.3 * expected_nearest, "{expected} {expected_nearest}");
            // What it expects is what samples say, but for the damping.
            assert!(seen < 0.3 * seen_nearest && seen < 1.01 * expected, "{seen} {seen_nearest} {expected}");
        }
    }

    #[test]
    fn independent_inputs_are_rounded_to_nearest() {
        let rows: Vec<Vec<f64>> = (0..6)
            .flat_map(|i| [1.0, -1.0].map(|s| (0..6).map(|j| if i == j { s } else { 0.0 }).collect()))
            .collect();
        let factor = Factor::of(&moments(&rows), true).unwrap();
        let weights = [0.31, -0.27, 0.04, 0.55, -0.91, 0.0];
        let code = |w: f64| (w / 0.1).round() as i32;
        let (codes, error) = factor.round(&weights, 0.1, code);
        assert_eq!(codes, [3, -3, 0, 6, -9, 0]);
        assert!((error - factor.error(&weights, 0.1, code)).abs() < 1e-12);
    }

    #[test]
    fn inputs_that_never_speak_are_no_obstacle() {
        let m = moments(&vec![vec![0.0; 4]; 3]);
        let factor = Factor::of(&m, true).unwrap();
        assert_eq!(factor.round(&[0.1; 4], 0.1, |w| (w / 0.1).round() as i32).0, [1; 4]);
    }
}
