//! Mixtures of experts: each token goes through the few experts that a router finds best for it.
//!
//! Which those are is known at run time alone, so all experts compute all tokens, and the results of those that are not chosen
//! are multiplied by 0: as many times the work of the op as there are experts for each that is chosen. Each layer of each
//! expert is a product with weights like any other.

use super::{compose::Result, weight_only::code};
use crate::{
    DType, OpError, Shape, Tensor, TensorType, ValueId,
    limits::MAX_EXPERTS,
    onnx::{NodeError, import::Node},
    ops::{Clamp, GatherElements, MatMul, ReduceKind, ScatterElements, SliceSpec, TopK, UnaryKind, Update},
};

/// A layer of all experts: weights `[experts, results, features]` and biases `[experts, results]`.
#[derive(Clone, Copy)]
struct Layer<'c> {
    weights: Weights<'c>,
    bias: Option<ValueId>,
}

#[derive(Clone, Copy)]
enum Weights<'c> {
    Numbers(ValueId),
    Codes(&'c Codes),
}

/// Weights of codes, (code − zero point)·scale, with a scale for each row or for each block of it.
struct Codes {
    dims: [usize; 3],
    bits: usize,
    block: usize,
    codes: Tensor,
    scales: Vec<f32>,
    zeros: Option<Tensor>,
    /// Whether the zero points of an expert's rows are packed together, rather than those of the blocks of a row.
    zeros_by_row: bool,
}

impl Layer<'_> {
    fn dims(self, node: &Node<'_, '_>) -> Vec<usize> {
        match self.weights {
            Weights::Numbers(weights) => node.shape(weights).to_vec(),
            Weights::Codes(codes) => codes.dims.to_vec(),
        }
    }

    /// Rows of the weights of one expert as columns, `[features, results]`.
    fn matrix(self, node: &mut Node<'_, '_>, part: &str, expert: usize, rows: SliceSpec) -> Result<ValueId> {
        let &[_, all, features] = &self.dims(node)[..] else {
            return Err(OpError::shape("weights of 3 dimensions are needed").into());
        };
        let row = |r: usize| expert * all + rows.start + r * rows.step.unsigned_abs();
        let transposed = |row_of: &dyn Fn(usize) -> Vec<f32>| -> Result<Tensor> {
            let mut numbers = vec![0f32; features * rows.len];
            for r in 0..rows.len {
                for (i, number) in row_of(row(r)).into_iter().enumerate() {
                    numbers[i * rows.len + r] = number;
                }
            }
            Ok(Tensor::from_vec(Shape::new([features, rows.len])?, numbers).map_err(OpError::from)?)
        };
        // Made at once of constants: step by step they would take the room of each step.
        let matrix = match self.weights {
            Weights::Codes(codes) => transposed(&codes.rows()?)?,
            Weights::Numbers(weights) => match node.constant_value(weights).map(Tensor::as_slice::<f32>) {
                Some(Ok(all)) => transposed(&|row| all[row * features..][..features].to_vec())?,
                _ => {
                    let one = SliceSpec { start: expert, len: 1, step: 1 };
                    let w = node.sliced(&format!("{part}_weights_of"), 0, one, weights)?;
                    let w = node.sliced(&format!("{part}_weights_rows"), 1, rows, w)?;
                    let w = node.shaped(&format!("{part}_weights_matrix"), [rows.len, features], w)?;
                    return node.permuted(&format!("{part}_weights"), [1, 0], w);
                }
            },
        };
        Ok(node.constant_part(&format!("{part}_weights"), matrix))
    }

    /// Some results of one expert for all tokens: x·Wᵀ + b.
    fn product(
        self,
        node: &mut Node<'_, '_>,
        part: &str,
        x: ValueId,
        expert: usize,
        results: SliceSpec,
    ) -> Result<ValueId> {
        let mut operands = vec![x, self.matrix(node, part, expert, results)?];
        if let Some(bias) = self.bias {
            let one = SliceSpec { start: expert, len: 1, step: 1 };
            let bias = node.sliced(&format!("{part}_bias_of"), 0, one, bias)?;
            let bias = node.sliced(&format!("{part}_bias_rows"), 1, results, bias)?;
            operands.push(node.shaped(&format!("{part}_bias"), [results.len], bias)?);
        }
        let product = MatMul { bias: self.bias.is_some(), residual: false, clamp: Clamp::NONE };
        node.emit_part(part, product, &operands)
    }
}

impl Codes {
    /// Codes and scales at two slots, and the zero points of them; `None` where there are none.
    fn of(
        node: &mut Node<'_, '_>,
        [slot, zero_slot]: [usize; 2],
        bits: i64,
        block: usize,
    ) -> Result<Option<Codes>> {
        let zeros = node.known(zero_slot, "zero points")?;
        let Some(codes) = node.known(slot, "weights")? else { return Ok(None) };
        let scales = node.required(slot + 1, "scales")?;
        if ![2, 4, 8].contains(&bits) {
            let why = format!("is {bits}; 2, 4 and 8 are supported");
            return Err(NodeError::attribute("expert_weight_bits", why));
        }
        let bits = bits as usize;
        let (&[experts, rows, bytes], true) = (codes.shape().dims(), codes.shape().elements() > 0) else {
            return Err(OpError::shape(format!("takes weights of all experts, got {}", codes.ty())).into());
        };
        let features = bytes * (8 / bits);
        let block = if block == 0 { features } else { block };
        let (blocks, all_rows) = (features.div_ceil(block), experts * rows);
        let zeros_by_row = scales.shape().rank() == 2;
        let packed = |count: usize| (count * bits).div_ceil(8);
        let zero_bytes = if zeros_by_row { experts * packed(rows) } else { all_rows * packed(blocks) };
        let fits = scales.shape().elements() == all_rows * blocks
            && (!zeros_by_row || blocks == 1)
            && zeros.as_ref().is_none_or(|z| z.shape().elements() == zero_bytes);
        if !fits {
            let (scales, codes) = (scales.ty(), codes.ty());
            let why = format!("scales {scales} or zero points of weights {codes} in blocks of {block}");
            return Err(OpError::shape(why).into());
        }
        let scales = scales.to_f32().ok_or_else(|| OpError::dtype("scales must be floats"))?;
        let dims = [experts, rows, features];
        TensorType::new(DType::F32, Shape::new(dims)?).check_size()?;
        Ok(Some(Codes { dims, bits, block, codes, scales, zeros, zeros_by_row }))
    }

    /// The numbers of a row, of all rows of all experts.
    fn rows(&self) -> Result<impl Fn(usize) -> Vec<f32>> {
        let &Codes { dims: [_, rows, features], bits, block, zeros_by_row, .. } = self;
        let codes = self.codes.as_slice::<u8>().map_err(OpError::from)?;
        let zeros = match &self.zeros {
            Some(zeros) => Some(zeros.as_slice::<u8>().map_err(OpError::from)?),
            None => None,
        };
        let (bytes, blocks) = (features * bits / 8, features.div_ceil(block));
        let packed = move |count: usize| (count * bits).div_ceil(8);
        let zero = move |row: usize, at: usize| match zeros {
            None => f32::from(1u8 << (bits - 1)),
            Some(z) if zeros_by_row => f32::from(code(&z[row / rows * packed(rows)..], bits, row % rows)),
            Some(z) => f32::from(code(&z[row * packed(blocks)..], bits, at)),
        };
        Ok(move |row: usize| {
            let number = |i: usize| {
                let at = i / block;
                let scale = self.scales[row * blocks + at];
                (f32::from(code(&codes[row * bytes..], bits, i)) - zero(row, at)) * scale
            };
            (0..features).map(number).collect()
        })
    }
}

/// What stands between the layers of an expert.
enum Activation {
    None,
    Plain(UnaryKind),
    /// G·sigmoid(alpha·G)·(L + beta), with G and L within the limit: results of the first layer, or of the first and third.
    Gated {
        alpha: f32,
        beta: f32,
        limit: f32,
        layout: Gates,
    },
}

/// Where the gates stand among the results of the first layer.
#[derive(Clone, Copy)]
enum Gates {
    /// They are all of them; the third layer has the others.
    Apart,
    /// Each before the one that belongs to it.
    Interleaved,
    /// Before all others.
    First,
}

impl Activation {
    fn of(node: &mut Node<'_, '_>) -> Result<Activation> {
        let (alpha, beta) = (node.float("activation_alpha", 1.0)?, node.float("activation_beta", 0.0)?);
        let limit = node.optional_float("swiglu_limit")?.unwrap_or(f32::INFINITY);
        let layout = match node.int("swiglu_fusion", 0)? {
            0 => Gates::Apart,
            1 => Gates::Interleaved,
            2 => Gates::First,
            other => return Err(NodeError::attribute("swiglu_fusion", format!("is {other}"))),
        };
        if node.flag("swiglu_limit_after_activation", false)? {
            return Err(NodeError::attribute("swiglu_limit_after_activation", "is 1, as CUDA alone has it"));
        }
        Ok(match node.string("activation_type", "relu")? {
            "relu" => Activation::Plain(UnaryKind::Relu),
            "gelu" => Activation::Plain(UnaryKind::GeluTanh),
            "silu" => Activation::Plain(UnaryKind::Silu),
            "identity" => Activation::None,
            "swiglu" => Activation::Gated { alpha, beta, limit, layout },
            other => return Err(NodeError::attribute("activation_type", format!("is {other:?}"))),
        })
    }

    /// Results of the first layer for each that the second takes.
    fn width(&self) -> usize {
        match self {
            Activation::Gated { layout: Gates::Interleaved | Gates::First, .. } => 2,
            _ => 1,
        }
    }
}

/// The layers of all experts.
struct Experts<'c> {
    count: usize,
    /// Features between the layers.
    inner: usize,
    first: Layer<'c>,
    second: Layer<'c>,
    third: Option<Layer<'c>>,
    activation: Activation,
}

impl<'c> Experts<'c> {
    /// Of layers for tokens of so many features.
    fn new(
        node: &Node<'_, '_>,
        [first, second]: [Layer<'c>; 2],
        third: Option<Layer<'c>>,
        activation: Activation,
        features: usize,
    ) -> Result<Experts<'c>> {
        let (w1, w2) = (first.dims(node), second.dims(node));
        let &[count, results, inner] = &w2[..] else {
            return Err(OpError::shape(format!("weights {w2:?} of experts")).into());
        };
        let takes = |layer: Layer<'_>, dims: [usize; 3]| {
            layer.dims(node) == dims && layer.bias.is_none_or(|b| *node.shape(b) == dims[..2])
        };
        let fits = results == features
            && takes(first, [count, inner.saturating_mul(activation.width()), features])
            && takes(second, [count, results, inner])
            && third.is_none_or(|third| takes(third, [count, inner, features]));
        if !fits {
            let why = format!("weights {w1:?} and {w2:?}, or their biases, for {features} features");
            return Err(OpError::shape(why).into());
        }
        if count > MAX_EXPERTS {
            let why =
                format!("{count} experts, all of which would compute all tokens: at most {MAX_EXPERTS}");
            return Err(OpError::too_large(why).into());
        }
        match (&activation, third) {
            (Activation::Gated { layout: Gates::Apart, .. }, None) => {
                Err(OpError::shape("swiglu without fusion needs the weights of fc3").into())
            }
            (Activation::Gated { layout: Gates::Apart, .. }, Some(_)) | (_, None) => {
                Ok(Experts { count, inner, first, second, third, activation })
            }
            _ => {
                let why = "has weights of fc3, which only swiglu without fusion has a definition of";
                Err(OpError::unsupported(why).into())
            }
        }
    }

    /// The results of one expert for all tokens `[tokens, features]`.
    fn results(&self, node: &mut Node<'_, '_>, x: ValueId, expert: usize) -> Result<ValueId> {
        let name = |part: &str| format!("expert{expert}_{part}");
        let all = |start: usize, step: isize| SliceSpec { start, len: self.inner, step };
        let inner = match self.activation {
            Activation::None => self.first.product(node, &name("first"), x, expert, all(0, 1))?,
            Activation::Plain(kind) => {
                let inner = self.first.product(node, &name("first"), x, expert, all(0, 1))?;
                node.unary(&name("activation"), kind, inner)?
            }
            Activation::Gated { alpha, beta, limit, layout } => {
                let (gates, others, beside) = match layout {
                    Gates::Apart => (all(0, 1), all(0, 1), self.third.unwrap_or(self.first)),
                    Gates::Interleaved => (all(0, 2), all(1, 2), self.first),
                    Gates::First => (all(0, 1), all(self.inner, 1), self.first),
                };
                let mut gate = self.first.product(node, &name("gate"), x, expert, gates)?;
                let mut other = beside.product(node, &name("up"), x, expert, others)?;
                if limit < f32::INFINITY {
                    let below = UnaryKind::Clip { lo: f32::NEG_INFINITY, hi: limit };
                    gate = node.unary(&name("gate_below"), below, gate)?;
                    let within = UnaryKind::Clip { lo: -limit, hi: limit };
                    other = node.unary(&name("up_within"), within, other)?;
                }
                let swish = if alpha == 1.0 { UnaryKind::Silu } else { UnaryKind::Swish { alpha } };
                let gate = node.unary(&name("swish"), swish, gate)?;
                if beta != 0.0 {
                    let beta = node.number(&name("beta"), beta.into(), DType::F32)?;
                    other = node.add(&name("up_shifted"), other, beta)?;
                }
                node.mul(&name("inner"), gate, other)?
            }
        };
        let features = SliceSpec { start: 0, len: node.shape(x)[1], step: 1 };
        self.second.product(node, &name("second"), inner, expert, features)
    }

    /// The results of all experts for all tokens, each times its weight in `[tokens, experts]`.
    fn mixed(&self, node: &mut Node<'_, '_>, x: ValueId, weights: ValueId) -> Result<ValueId> {
        let mut sum = None;
        for expert in 0..self.count {
            let y = self.results(node, x, expert)?;
            let column = SliceSpec { start: expert, len: 1, step: 1 };
            let weight = node.sliced(&format!("expert{expert}_weight"), 1, column, weights)?;
            let y = node.mul(&format!("expert{expert}_share"), y, weight)?;
            sum = Some(match sum {
                None => y,
                Some(sum) => node.add(&format!("expert{expert}_sum"), sum, y)?,
            });
        }
        sum.ok_or_else(|| OpError::shape("no experts").into())
    }
}

/// What the result of each expert counts for each token, `[tokens, experts]`: the probability that the router gives it, or
/// another number, where it is one of the best, and 0 elsewhere.
fn routed(
    node: &mut Node<'_, '_>,
    router: ValueId,
    numbers: Option<ValueId>,
    [tokens, experts]: [usize; 2],
) -> Result<ValueId> {
    let k = node.count("k")?.unwrap_or(1);
    // ONNX Runtime's QMoE takes softmax of the chosen scores alone, whatever the attribute says, unless there are other numbers.
    let normalises =
        node.flag("normalize_routing_weights", false)? || numbers.is_none() && node.def_is("QMoE");
    if node.flag("use_sparse_mixer", false)? {
        return Err(NodeError::attribute("use_sparse_mixer", "is 1, which is not supported"));
    }
    let dims = [tokens, experts];
    for v in [router].into_iter().chain(numbers) {
        if *node.shape(v) != dims || k > experts {
            let why = format!("{k} of {experts} experts for {tokens} tokens by {}", node.ty(v));
            return Err(OpError::shape(why).into());
        }
    }
    let router = node.widened("router", router)?;
    let shares = node.softmax_along("probabilities", 1, router)?;
    let best = node.emit_part("best", TopK { k, axis: 1, largest: true }, &[shares])?;
    let numbers = match numbers {
        Some(numbers) => node.widened("router_weights", numbers)?,
        None => shares,
    };
    let mut chosen = node.emit_part("chosen", GatherElements { axis: 1 }, &[numbers, best])?;
    if normalises {
        let total = node.reduced("total", ReduceKind::Sum, vec![1], chosen)?;
        chosen = node.div("normalised", chosen, total)?;
    }
    let zero = node.number("zero", 0.0, DType::F32)?;
    let zeros = node.expanded("zeros", dims, zero)?;
    let scatter = ScatterElements { axis: 1, update: Update::Replace };
    node.emit_part("weights", scatter, &[zeros, best, chosen])
}

/// Tokens as rows of f32, and their number and features.
fn tokens(node: &mut Node<'_, '_>) -> Result<(ValueId, [usize; 2])> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let (tokens, features) = match *node.shape(x).dims() {
        [tokens, features] => (tokens, features),
        [batch, length, features] => (batch.saturating_mul(length), features),
        _ => return Err(OpError::shape(format!("takes rows of tokens, got {}", node.ty(x))).into()),
    };
    let rows = node.shaped("tokens", [tokens, features], x)?;
    Ok((node.widened("wide", rows)?, [tokens, features]))
}

fn mixture(
    node: &mut Node<'_, '_>,
    x: ValueId,
    experts: &Experts<'_>,
    router: ValueId,
    numbers: Option<ValueId>,
) -> Result<ValueId> {
    let input = node.operand(0, "input")?;
    let tokens = node.shape(x)[0];
    let weights = routed(node, router, numbers, [tokens, experts.count])?;
    let y = experts.mixed(node, x, weights)?;
    let own = node.ty(input).dtype;
    let y = node.cast_to("narrow", own, y)?;
    node.shaped("", node.shape(input), y)
}

/// Experts of floats.
pub(super) fn mixture_of_experts(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, [_, features]) = tokens(node)?;
    let router = node.operand(1, "router_probs")?;
    let mut layer = |slot: usize, name: &str| -> Result<Option<Layer<'static>>> {
        let (weights, bias) = (node.optional(slot), node.optional(slot + 1));
        let Some(weights) = weights else { return Ok(None) };
        let weights = node.widened(&format!("{name}_wide"), weights)?;
        let bias = bias.map(|bias| node.widened(&format!("{name}_wide_bias"), bias)).transpose()?;
        Ok(Some(Layer { weights: Weights::Numbers(weights), bias }))
    };
    let missing = |slot| NodeError::MissingOperand { slot, role: "weights" };
    let first = layer(2, "fc1")?.ok_or_else(|| missing(2))?;
    let second = layer(4, "fc2")?.ok_or_else(|| missing(4))?;
    let third = layer(6, "fc3")?;
    let activation = Activation::of(node)?;
    let experts = Experts::new(node, [first, second], third, activation, features)?;
    mixture(node, x, &experts, router, None)
}

/// Experts of codes, whose weights become real numbers here.
pub(super) fn quantized_mixture_of_experts(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, [_, features]) = tokens(node)?;
    let router = node.operand(1, "router_probs")?;
    node.ignore(&["accuracy_level"]);
    if !matches!(node.string("quant_type", "int")?, "int") {
        return Err(NodeError::attribute("quant_type", "is not `int`, which alone CPUs have"));
    }
    if node.int("weights_prepacked", -1)? > 0 {
        return Err(NodeError::attribute("weights_prepacked", "is 1: the layout is that of one kernel"));
    }
    let block = node.int("block_size", 0)?;
    let block =
        usize::try_from(block).map_err(|_| NodeError::attribute("block_size", format!("is {block}")))?;
    let all = node.int("expert_weight_bits", 4)?;
    let widths = ["fc1_expert_weight_bits", "fc2_expert_weight_bits", "fc3_expert_weight_bits"];
    let [one, two, three] = widths.map(|name| node.int(name, all));
    let missing = |slot| NodeError::MissingOperand { slot, role: "weights" };
    let first = Codes::of(node, [2, 11], one?, block)?.ok_or_else(|| missing(2))?;
    let second = Codes::of(node, [5, 12], two?, block)?.ok_or_else(|| missing(5))?;
    let third = Codes::of(node, [8, 13], three?, block)?;
    let mut bias = |slot: usize, name: &str| -> Result<Option<ValueId>> {
        node.optional(slot).map(|bias| node.widened(name, bias)).transpose()
    };
    let [one, two, three] = [bias(4, "fc1_bias"), bias(7, "fc2_bias"), bias(10, "fc3_bias")];
    let layer = |codes, bias| Layer { weights: Weights::Codes(codes), bias };
    let layers = [layer(&first, one?), layer(&second, two?)];
    let third = third.as_ref().zip(Some(three?)).map(|(codes, bias)| layer(codes, bias));
    let numbers = node.optional(14);
    let activation = Activation::of(node)?;
    let experts = Experts::new(node, layers, third, activation, features)?;
    mixture(node, x, &experts, router, numbers)
}
