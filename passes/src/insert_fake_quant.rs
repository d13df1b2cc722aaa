//! Puts a fake-quantization behind every value that an integer op will take or make.
//!
//! Which ops those are is decided first, in [`regions`]. Values joined by moves share one grid.

use crate::{
    Context, Pass, PassError, Range, Record, WeightBits, WeightGrid,
    adopt_grids::round_before_moves,
    calibrate::value_name,
    capability::int8_capability,
    classes::Classes,
    edit::{Product, activations, channel_runs, clamp_of, f32_constant, has_weights, is_move},
    fold_normalize::pixel_range,
    regions,
    weight_scales::least_error,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OutputGrid, QuantParams, Stage, Tensor, TensorType, Use, ValueId,
    numerics::RequantMode,
    ops::{Binary, BinaryKind, Conv, Dequantize, FakeQuant, MatMul, PoolKind, UnaryKind},
};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
pub(crate) const INSERT_FAKE_QUANT: Pass = Pass { name: "insert_fake_quant", run };

/// Codes of a bias stay within ±2^23, where f32 holds them exactly, and half of that is kept for rounding.
const BIAS_CODES: i32 = 1 << 23;
const MOST_BIAS: f64 = (BIAS_CODES / 2) as f64;
/// 2^−22: a sum of 4,096 products, each wrong by half a code of the weight, is then wrong by an eighth of a step.
const LEAST_FACTOR: f64 = 1.0 / (1 << 22) as f64;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    if graph.stage == Stage::FakeQuant {
        return complete(graph, ctx, record);
    }
    for finding in &ctx.ranges.findings {
        ctx.find(finding.clone(), record);
    }
    for note in &ctx.ranges.notes {
        record.told(&graph.name, note);
    }
    let chosen = regions::choose(graph, ctx, record);
    let unrounded = unrounded_products(graph, ctx, &chosen);
    let chosen = Chosen { nodes: &chosen, unrounded: &unrounded };
    let grids = activation_grids(graph, ctx, chosen)?;
    let nodes: Vec<NodeId> = graph.order().into_iter().filter(|n| chosen.nodes.contains(n)).collect();
    let mut scaled = BTreeMap::new();
    for &node in &nodes {
        if has_weights(graph, node) {
            if let Some(left) = quantize_parameters(graph, ctx, node, chosen, &grids)? {
                scaled.insert(node, left);
            }
        } else if let Some(Op::MatMul(m)) = graph.op(node)
            && m.bias
        {
            quantize_bias(graph, node, &grids)?;
        }
    }
    for (&value, grid) in &grids {
        quantize_activation(graph, value, grid, chosen)?;
    }
    if ctx.options.interchange {
        round_behind_moves(graph)?;
    }
    for node in nodes {
        let narrow = ctx.options.weight_bits == WeightBits::Seven && has_weights(graph, node);
        let with = if narrow { ", by weights of 7 bits" } else { "" };
        let what = if unrounded.contains(&node) {
            "multiplies codes, and its result is not rounded"
        } else {
            "computes on its grid"
        };
        let scales = match scaled.get(&node) {
            Some(left) => format!(
                ", by scales of weights that leave {:.0} % of the squared error of those that clip nothing",
                100.0 * left
            ),
            None => String::new(),
        };
        record.applied(&graph.node(node).name, format!("{what}{with}{scales}"));
    }
    graph.stage = Stage::FakeQuant;
    Ok(())
}

/// The nodes that compute with integers.
#[derive(Clone, Copy)]
struct Chosen<'a> {
    nodes: &'a BTreeSet<NodeId>,
    /// Those of them whose results are real numbers, and whose residuals are.
    unrounded: &'a BTreeSet<NodeId>,
}

impl Chosen<'_> {
    fn contains(self, node: NodeId) -> bool {
        self.nodes.contains(&node)
    }

    /// Whether the node makes codes.
    fn makes_codes(self, node: NodeId) -> bool {
        self.contains(node) && !self.unrounded.contains(&node)
    }

    /// The operands that a chosen node takes as codes, but for weights and bias.
    fn codes(self, graph: &Graph, node: NodeId) -> Vec<(usize, ValueId)> {
        let mut codes = activations(graph, node);
        if self.unrounded.contains(&node) {
            codes.truncate(1);
        }
        codes
    }
}

/// Products by weights that only float ops read: a rounding of their results would be one more, and no code saved by it.
/// Results of the model stay on the grids that calibration gives them, where it gives any.
fn unrounded_products(graph: &Graph, ctx: &Context<'_>, chosen: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let is_unrounded = |&node: &NodeId| {
        let uses = graph.uses(node.out());
        let is_read = !uses.is_empty() && !graph.is_output(node.out());
        can_be_unrounded(graph, ctx, node)
            && (is_read || range_of(graph, ctx, node.out()).is_err())
            && !uses.into_iter().any(|u| chosen.contains(&u.node))
    };
    chosen.iter().copied().filter(is_unrounded).collect()
}

/// Whether an op has a form that multiplies codes and gives real numbers. Other runtimes have no such convolutions, and of a
/// product and a bias alone they make a float Gemm before they look at grids.
fn can_be_unrounded(graph: &Graph, ctx: &Context<'_>, node: NodeId) -> bool {
    match graph.op(node) {
        Some(Op::Conv(_)) => !ctx.options.interchange,
        Some(Op::MatMul(m)) => {
            let is_gemm = m.bias && !m.residual;
            has_weights(graph, node) && !(ctx.options.interchange && is_gemm)
        }
        _ => false,
    }
}

/// Of a graph that brings its own grids: rounds the biases that the model has as floats, and says what stays float.
fn complete(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    // Canonicalisation may have put moves behind what computes.
    round_before_moves(graph)?;
    for node in graph.order() {
        let Some(op) = graph.op(node) else { continue };
        let name = graph.node(node).name.clone();
        let is_biased =
            matches!(op, Op::Conv(Conv { bias: true, .. }) | Op::MatMul(MatMul { bias: true, .. }));
        // Otherwise floats are added to a sum that has become one.
        if is_biased && has_own_result(graph, node).is_ok() {
            round_own_bias(graph, node)?;
        }
        if ctx.options.requant == RequantMode::Float {
            count_whole_steps(graph, node)?;
        }
        if graph.node(node).outputs().iter().any(|t| t.dtype == DType::F32)
            && let Err(why) = has_own_grids(graph, node)
        {
            record.declined(&name, format!("stays float: {why}"));
        }
    }
    Ok(())
}

/// Rounds a constant bias to s_x·s_w, where the model has grids for both.
fn round_own_bias(graph: &mut Graph, node: NodeId) -> Result<(), PassError> {
    let operands = graph.operands(node);
    let (Some(x), Some(w)) = (grid_behind(graph, operands[0]), grid_behind(graph, operands[1])) else {
        return Ok(());
    };
    let (Some((s_x, _)), Some(bias)) = (x.params.as_per_tensor(), f32_constant(graph, operands[2])) else {
        return Ok(());
    };
    let name = &graph.node(node).name;
    let fail = |e| PassError::op(name, "FakeQuant", e);
    let scales: Vec<f32> = w.params.scales().iter().map(|s| s * s_x).collect();
    let scale = |c: usize| scales[if w.params.axis().is_some() { c } else { 0 }];
    let is_one_each = scales.len() == 1 || scales.len() == bias.len();
    if !is_one_each || !scales.iter().all(|s| s.is_normal()) {
        return Ok(());
    }
    let steps: Vec<f32> = bias.iter().enumerate().map(|(c, b)| (b / scale(c)).round_ties_even()).collect();
    let most = steps.iter().fold(0f32, |most, b| most.max(b.abs()));
    let codes: Vec<i32> = steps.iter().map(|&b| b as i32).collect();
    let params = match w.params.axis() {
        Some(_) => {
            let zeros = vec![0; scales.len()];
            QuantParams::per_axis(0, scales, zeros)
        }
        None => QuantParams::per_tensor(scales[0], 0),
    };
    let params = params.map_err(fail)?;
    let rounded_name = format!("{name}_bias_fq");
    let rounded = if f64::from(most) <= MOST_BIAS {
        let op = FakeQuant { dtype: DType::S32, lo: -BIAS_CODES, hi: BIAS_CODES, params };
        graph.add(&rounded_name, op, &[operands[2]])?
    } else if most < i32::MAX as f32 {
        // Of channels of next to no weight; lowering makes room for them.
        let shape = graph.shape(operands[2]).clone();
        let tensor = Tensor::from_vec(shape.clone(), codes).map_err(|e| fail(e.into()))?;
        let ty = TensorType::quantized(DType::S32, shape, params).map_err(fail)?;
        let constant = graph.quantized_constant(&format!("{name}_bias"), tensor, ty)?;
        graph.add(&rounded_name, Dequantize {}, &[constant])?
    } else {
        return Ok(());
    };
    graph.set_operand(node, 2, rounded.out())?;
    Ok(())
}

/// ONNX Runtime's softmax of codes takes ⌊1/s⌋ steps of the result's grid for 1: 254 where s is a bit above 1/255. So do
/// these then.
fn count_whole_steps(graph: &mut Graph, node: NodeId) -> Result<(), PassError> {
    let Some(Op::Softmax(s)) = graph.op(node) else { return Ok(()) };
    let Some(Op::FakeQuant(f)) = graph.sole_use(node.out()).and_then(|u| graph.op(u.node)) else {
        return Ok(());
    };
    let from = grid_behind(graph, graph.operand(node, 0)).filter(|f| f.dtype == DType::U8);
    let Some((scale, _)) = f.params.as_per_tensor().filter(|_| f.dtype == DType::U8 && !s.log) else {
        return Ok(());
    };
    let factor = (1.0 / scale).floor() * scale;
    if from.is_none() || factor == 1.0 || factor == 0.0 {
        return Ok(());
    }
    let name = format!("{}_steps", graph.node(node).name);
    let uses = graph.uses(node.out());
    let constant = graph.constant(&format!("{name}_factor"), Tensor::scalar(factor));
    let scaled = graph.add(&name, Binary { kind: BinaryKind::Mul }, &[node.out(), constant])?.out();
    for u in uses {
        graph.set_operand(u.node, u.slot.into(), scaled)?;
    }
    Ok(())
}

/// The grid that a value is on, through the moves that keep it.
fn grid_behind(graph: &Graph, mut value: ValueId) -> Option<FakeQuant> {
    loop {
        match graph.op(value.node)? {
            Op::FakeQuant(f) => return Some(f.clone()),
            op if is_move(op) => value = graph.operand(value.node, 0),
            _ => return None,
        }
    }
}

/// Whether an op is between grids of the model, so that integers can compute it; otherwise why not.
fn has_own_grids(graph: &Graph, node: NodeId) -> Result<(), String> {
    if matches!(graph.op(node), Some(Op::FakeQuant(_) | Op::Dequantize(_) | Op::Quantize(_))) {
        return Ok(());
    }
    if graph.op(node).is_some_and(is_move) {
        return Ok(());
    }
    let without_constants = |why: String| match why.as_str() {
        "its weights are not constant" => None,
        _ => Some(why),
    };
    if let Err(why) = int8_capability(graph, node)
        && let Some(why) = without_constants(why)
    {
        return Err(why);
    }
    for (_, v) in activations(graph, node) {
        let name = || value_name(graph, v);
        match grid_behind(graph, v) {
            None => return Err(format!("the model has no grid for `{}`, which it takes", name())),
            Some(f) if f.dtype != DType::U8 || f.params.as_per_tensor().is_none() => {
                return Err(format!("the grid of `{}` is {} {:?}", name(), f.dtype, f.params));
            }
            Some(_) => {}
        }
    }
    let weights = graph.operands(node).get(1).copied().filter(|_| has_weights(graph, node));
    match weights.is_some_and(|w| matches!(graph.op(w.node), Some(Op::FakeQuant(_) | Op::Dequantize(_)))) {
        // Its sums become floats.
        true => Ok(()),
        false => has_own_result(graph, node),
    }
}

/// Whether the model has a grid for what a node makes, and nobody takes that but on the grid.
fn has_own_result(graph: &Graph, node: NodeId) -> Result<(), String> {
    let end = clamp_behind(graph, node).unwrap_or(node).out();
    match graph.sole_use(end).map(|u| graph.op(u.node)) {
        Some(Some(Op::FakeQuant(f))) if f.dtype == DType::U8 => Ok(()),
        _ => Err("the model has no grid for its result alone".into()),
    }
}

/// Rounds what moves make of rounded numbers once more, which changes nothing.
fn round_behind_moves(graph: &mut Graph) -> Result<(), PassError> {
    for node in graph.order() {
        if !graph.op(node).is_some_and(is_move) {
            continue;
        }
        let grid = |v: ValueId| match graph.op(v.node) {
            Some(Op::FakeQuant(f)) => Some(f.clone()),
            _ => None,
        };
        let grids: Vec<Option<FakeQuant>> = activations(graph, node).iter().map(|(_, v)| grid(*v)).collect();
        let [Some(first), rest @ ..] = &grids[..] else { continue };
        let is_one = rest.iter().all(|f| f.as_ref() == Some(first)) && first.params.axis().is_none();
        let is_rounded =
            graph.uses(node.out()).iter().any(|u| matches!(graph.op(u.node), Some(Op::FakeQuant(_))));
        if is_one && !is_rounded {
            let name = format!("{}_fq", graph.node(node).name);
            let rounded = graph.add(&name, first.clone(), &[node.out()])?.out();
            graph.replace_all_uses(node.out(), rounded)?;
        }
    }
    Ok(())
}

/// The clamp that ends `node`, as its one consumer, where node and clamp become one integer op: then only the result
/// of the clamp has a grid.
pub(crate) fn clamp_behind(graph: &Graph, node: NodeId) -> Option<NodeId> {
    let absorbs = match graph.op(node)? {
        Op::Binary(b) => matches!(b.kind, BinaryKind::Add | BinaryKind::Sub | BinaryKind::Mul),
        Op::Unary(_) => clamp_of(graph, node).is_none(),
        Op::Pool(p) => matches!(p.kind, PoolKind::Average { .. }),
        Op::Resample(r) => !r.is_pick(),
        Op::Conv(_) | Op::MatMul(_) => true,
        _ => false,
    };
    let u = graph.sole_use(node.out()).filter(|_| absorbs)?;
    clamp_of(graph, u.node).map(|_| u.node)
}

/// The grid of each activation that gets a fake-quantization of its own: those that chosen ops take or make, but the
/// results of moves, which are on the grid of what was moved.
fn activation_grids(
    graph: &Graph,
    ctx: &Context<'_>,
    chosen: Chosen<'_>,
) -> Result<BTreeMap<ValueId, OutputGrid>, PassError> {
    let mut classes = Classes::new();
    for &node in chosen.nodes {
        let inner = clamp_behind(graph, node).is_some_and(|c| chosen.contains(c));
        if !inner && chosen.makes_codes(node) {
            classes.join(node.out(), node.out());
        }
        let from_inside = |v: &ValueId| chosen.contains(v.node) && clamp_behind(graph, v.node) == Some(node);
        for (_, v) in chosen.codes(graph, node) {
            if from_inside(&v) {
                continue;
            }
            classes.join(v, v);
            if graph.op(node).is_some_and(is_move) {
                classes.join(node.out(), v);
            }
        }
    }
    let mut ranges: BTreeMap<ValueId, Range> = BTreeMap::new();
    let members: Vec<ValueId> = classes.members().collect();
    for &v in &members {
        let range = range_of(graph, ctx, v)?;
        let root = classes.find(v);
        ranges.entry(root).and_modify(|r| *r = r.union(range)).or_insert(range);
    }
    let packed = second_operands(graph, chosen.nodes).map(|v| classes.find(v)).collect::<BTreeSet<_>>();
    let mut grids = BTreeMap::new();
    for v in members {
        let moved = chosen.contains(v.node) && graph.op(v.node).is_some_and(is_move);
        if !moved {
            let class = classes.find(v);
            let symmetric = symmetric_grid_of(ranges[&class]).filter(|_| packed.contains(&class));
            let grid = symmetric
                .map_or_else(|| grid_of(ranges[&class]), Ok)
                .map_err(|e| PassError::op(&graph.node(v.node).name, graph.mnemonic(v.node), e))?;
            grids.insert(v, grid);
        }
    }
    Ok(grids)
}

/// The second operands of chosen products of two activations.
fn second_operands<'a>(graph: &'a Graph, chosen: &'a BTreeSet<NodeId>) -> impl Iterator<Item = ValueId> + 'a {
    let of_activations =
        |n: &&NodeId| matches!(graph.op(**n), Some(Op::MatMul(_))) && !has_weights(graph, **n);
    chosen.iter().filter(of_activations).map(|&n| graph.operand(n, 1))
}

/// What calibration has not seen of what an op takes and makes, where it needs a range of it.
pub(crate) fn without_range(graph: &Graph, ctx: &Context<'_>, node: NodeId) -> Option<ValueId> {
    let is_unseen = |v: &ValueId| range_of(graph, ctx, *v).is_err();
    // The result of a clamp behind it may be all that gets a grid.
    let end = clamp_behind(graph, node).map(NodeId::out);
    let result = Some(node.out()).filter(is_unseen).filter(|_| end.is_none_or(|e| is_unseen(&e)));
    // It needs none that is not rounded, as nothing that takes codes reads it.
    let takes_codes = |u: &Use| int8_capability(graph, u.node).is_ok();
    let result = result
        .filter(|_| !can_be_unrounded(graph, ctx, node) || graph.uses(node.out()).iter().any(takes_codes));
    activations(graph, node).into_iter().map(|(_, v)| v).find(is_unseen).or(result)
}

/// What was observed of a value, within what its op can produce at all.
pub(crate) fn range_of(graph: &Graph, ctx: &Context<'_>, value: ValueId) -> Result<Range, PassError> {
    if let Some(c) = f32_constant(graph, value) {
        let range = |f: fn(f32, f32) -> f32| c.iter().copied().fold(0.0, f);
        return Ok(Range { min: range(f32::min), max: range(f32::max) });
    }
    if let Some(range) = range_of_pixels(graph, value) {
        return Ok(range);
    }
    if graph.shape(value).elements() == 0 {
        return Ok(Range { min: 0.0, max: 0.0 });
    }
    let seen = ctx.ranges.get(graph, value);
    let Some(seen) = seen.filter(|r| r.min.is_finite() && r.max.is_finite() && r.min <= r.max) else {
        return range_of_moved(graph, ctx, value);
    };
    let (lo, hi) = bounds_of(graph, value.node);
    Ok(Range { min: seen.min.clamp(lo, hi), max: seen.max.clamp(lo, hi) })
}

/// All that pixels can be, whether samples had them or not: then they are their own codes. Through moves of them alone.
fn range_of_pixels(graph: &Graph, mut value: ValueId) -> Option<Range> {
    loop {
        match graph.op(value.node)? {
            Op::Normalize(n) => return pixel_range(n),
            Op::Transpose(_) | Op::Reshape(_) | Op::Slice(_) => value = graph.operand(value.node, 0),
            _ => return None,
        }
    }
}

/// The range of what a move makes that was not there to be observed: that of its operands.
fn range_of_moved(graph: &Graph, ctx: &Context<'_>, value: ValueId) -> Result<Range, PassError> {
    let missing = || PassError::MissingRange { value: value_name(graph, value) };
    graph.op(value.node).filter(|op| is_move(op)).ok_or_else(missing)?;
    let mut ranges = Vec::new();
    for (_, operand) in activations(graph, value.node) {
        ranges.push(range_of(graph, ctx, operand)?);
    }
    ranges.into_iter().reduce(Range::union).ok_or_else(missing)
}

/// What the op of a node can produce at most.
fn bounds_of(graph: &Graph, node: NodeId) -> (f32, f32) {
    let clamp = Product::of(graph, node).map(|mut p| *p.clamp()).or_else(|| clamp_of(graph, node));
    if let Some(c) = clamp.filter(|c| c.lo <= c.hi) {
        return (c.lo, c.hi);
    }
    match graph.op(node) {
        Some(Op::Unary(u)) => match u.kind {
            UnaryKind::Sigmoid | UnaryKind::HardSigmoid { .. } => (0.0, 1.0),
            UnaryKind::Tanh | UnaryKind::Erf | UnaryKind::Softsign => (-1.0, 1.0),
            _ => (f32::NEG_INFINITY, f32::INFINITY),
        },
        Some(Op::Softmax(s)) if !s.log => (0.0, 1.0),
        _ => (f32::NEG_INFINITY, f32::INFINITY),
    }
}

/// The u8 grid over a range and zero. Zero is a code: the range is shifted by less than half a step for that.
pub(crate) fn grid_of(range: Range) -> Result<OutputGrid, qcc_ir::OpError> {
    let (min, max) = (f64::from(range.min.min(0.0)), f64::from(range.max.max(0.0)));
    let scale = ((max - min) / 255.0) as f32;
    if !scale.is_normal() {
        // Nothing but (next to) zeros was seen: any grid holds them.
        return OutputGrid::full(DType::U8, 1.0, 0);
    }
    let zero_point = (-min / f64::from(scale)).round().clamp(0.0, 255.0) as i32;
    OutputGrid::full(DType::U8, scale, zero_point)
}

/// How much coarser the steps of a symmetric grid may be than those of one over the range alone.
const MOST_COARSENING: f64 = 1.25;

/// The u8 grid over a range with its zero at 128, on which the second operand of a product costs no run for its zero
/// point. `None` for
/// ranges that lie too much on one side: attention's keys and values hardly do, and codes are worth more than time.
fn symmetric_grid_of(range: Range) -> Option<OutputGrid> {
    let (min, max) = (f64::from(range.min.min(0.0)), f64::from(range.max.max(0.0)));
    // Codes are −128 to 127 steps from zero.
    let scale = (-min / 128.0).max(max / 127.0);
    let is_fine = scale <= MOST_COARSENING * (max - min) / 255.0 && (scale as f32).is_normal();
    OutputGrid::full(DType::U8, scale as f32, 128).ok().filter(|_| is_fine)
}

pub(crate) fn fake_quant(grid: &OutputGrid) -> Result<FakeQuant, qcc_ir::OpError> {
    Ok(FakeQuant { dtype: grid.dtype, lo: grid.lo, hi: grid.hi, params: grid.params()? })
}

/// Rounds a value to its grid: for all its users if an integer op makes it, otherwise for the integer ops alone.
fn quantize_activation(
    graph: &mut Graph,
    value: ValueId,
    grid: &OutputGrid,
    chosen: Chosen<'_>,
) -> Result<(), PassError> {
    let name = graph.node(value.node).name.clone();
    let op = fake_quant(grid).map_err(|e| PassError::op(&name, "FakeQuant", e))?;
    let uses = graph.uses(value);
    let rounded = graph.add(&format!("{name}_fq"), op, &[value])?.out();
    if chosen.makes_codes(value.node) {
        graph.replace_all_uses(value, rounded)?;
        return Ok(());
    }
    for u in uses.into_iter().filter(|u| chosen.contains(u.node)) {
        if chosen.codes(graph, u.node).iter().any(|(slot, _)| *slot == usize::from(u.slot)) {
            graph.set_operand(u.node, u.slot.into(), rounded)?;
        }
    }
    Ok(())
}

/// Rounds weights and bias of a convolution or matrix product to their grids. What part of the squared error of weights is left
/// where their scales were to have the least.
fn quantize_parameters(
    graph: &mut Graph,
    ctx: &Context<'_>,
    node: NodeId,
    chosen: Chosen<'_>,
    grids: &BTreeMap<ValueId, OutputGrid>,
) -> Result<Option<f64>, PassError> {
    let name = graph.node(node).name.clone();
    let fail = |e| PassError::op(&name, "FakeQuant", e);
    let (Some(mut product), operands) = (Product::of(graph, node), graph.operands(node)) else {
        return Ok(None);
    };
    // That of results that are not rounded is added to them as it is.
    let makes_codes = chosen.makes_codes(node);
    let has_bias = *product.bias() && makes_codes;
    let axis = match product {
        Product::Conv(_) => 0,
        Product::MatMul(_) => 1,
    };
    let result = clamp_behind(graph, node).filter(|c| chosen.contains(*c)).unwrap_or(node).out();
    let scale = |v: ValueId| {
        scale_of(graph, grids, v).ok_or_else(|| PassError::MissingRange { value: value_name(graph, v) })
    };
    let (s_x, s_y) = (scale(operands[0])?, if makes_codes { Some(scale(result)?) } else { None });
    let Some(weights) = f32_constant(graph, operands[1]) else {
        return Ok(None);
    };
    let codes = ctx.options.weight_bits.largest();
    let Finest { scales: finest, left } = finest_scales(ctx, weights, graph.shape(operands[1]), axis);
    let bias: Vec<f32> = match has_bias {
        true => f32_constant(graph, operands[2]).unwrap_or_default().to_vec(),
        false => vec![0.0; finest.len()],
    };
    let mut scales: Vec<f64> = finest
        .iter()
        .zip(&bias)
        .map(|(&w, &b)| s_y.map_or(if w == 0.0 { 1.0 } else { w }, |s_y| weight_scale(w, b.into(), s_x, s_y)))
        .collect();
    if ctx.options.weights == WeightGrid::PerTensor {
        scales = vec![scales.iter().copied().fold(0.0, f64::max)];
    }
    if let (RequantMode::Pow2, Some(s_y)) = (ctx.options.requant, s_y) {
        scales.iter_mut().for_each(|s| *s = power_of_two_scale(*s, s_x, s_y));
    }
    let narrow = |x: f64| (x as f32).clamp(f32::MIN_POSITIVE, f32::MAX);
    let params = |axis: usize, scales: Vec<f32>| match ctx.options.weights {
        WeightGrid::PerTensor => QuantParams::per_tensor(scales[0], 0),
        WeightGrid::PerAxis => {
            let zeros = vec![0; scales.len()];
            QuantParams::per_axis(axis, scales, zeros)
        }
    };
    let weight_scales: Vec<f32> = scales.iter().map(|&s| narrow(s)).collect();
    let bias_scales = weight_scales.iter().map(|&s| narrow(s_x * f64::from(s))).collect();
    let weight_params = params(axis, weight_scales).map_err(fail)?;
    let op = FakeQuant { dtype: DType::S8, lo: -codes, hi: codes, params: weight_params };
    let rounded = graph.add(&format!("{name}_weight_fq"), op, &[operands[1]])?;
    graph.set_operand(node, 1, rounded.out())?;
    if has_bias {
        let op = FakeQuant {
            dtype: DType::S32,
            lo: -BIAS_CODES,
            hi: BIAS_CODES,
            params: params(0, bias_scales).map_err(fail)?,
        };
        let rounded = graph.add(&format!("{name}_bias_fq"), op, &[operands[2]])?;
        graph.set_operand(node, 2, rounded.out())?;
    }
    Ok(left)
}

/// Rounds the bias of a product of two activations to s_a·s_b. One that would need more than 24 bits stays as it is, and
/// the product float.
fn quantize_bias(
    graph: &mut Graph,
    node: NodeId,
    grids: &BTreeMap<ValueId, OutputGrid>,
) -> Result<(), PassError> {
    let name = graph.node(node).name.clone();
    let operands = graph.operands(node);
    let [s_a, s_b] = [0, 1].map(|slot| scale_of(graph, grids, operands[slot]));
    let (Some(s_a), Some(s_b), Some(bias)) = (s_a, s_b, f32_constant(graph, operands[2])) else {
        return Ok(());
    };
    let scale = (s_a * s_b) as f32;
    let largest = bias.iter().fold(0f32, |m, b| m.max(b.abs()));
    if !scale.is_normal() || f64::from(largest) > f64::from(scale) * MOST_BIAS {
        return Ok(());
    }
    let params = QuantParams::per_tensor(scale, 0).map_err(|e| PassError::op(&name, "FakeQuant", e))?;
    let op = FakeQuant { dtype: DType::S32, lo: -BIAS_CODES, hi: BIAS_CODES, params };
    let rounded = graph.add(&format!("{name}_bias_fq"), op, &[operands[2]])?;
    graph.set_operand(node, 2, rounded.out())?;
    Ok(())
}

/// The scale of a value's grid, through the moves that keep it.
fn scale_of(graph: &Graph, grids: &BTreeMap<ValueId, OutputGrid>, mut value: ValueId) -> Option<f64> {
    loop {
        if let Some(grid) = grids.get(&value) {
            return Some(grid.scale.into());
        }
        graph.op(value.node).filter(|op| is_move(op))?;
        value = graph.operand(value.node, 0);
    }
}

/// Scales of weights before anything else has a say.
struct Finest {
    /// Of each channel; all the same where the tensor has one.
    scales: Vec<f64>,
    /// What part of the squared error of scales that clip nothing is left, where it was to be little.
    left: Option<f64>,
}

fn finest_scales(ctx: &Context<'_>, weights: &[f32], shape: &[usize], axis: usize) -> Finest {
    let codes = ctx.options.weight_bits.largest();
    let mut channels = vec![Vec::new(); shape[axis]];
    for (c, run) in channel_runs(weights, shape, axis) {
        channels[c].extend_from_slice(run);
    }
    if !ctx.ranges.repairs.scales {
        let largest = |channel: &Vec<f32>| channel.iter().fold(0f32, |most, w| most.max(w.abs()));
        let scale = |channel| f64::from(largest(channel)) / f64::from(codes);
        return Finest { scales: channels.iter().map(scale).collect(), left: None };
    }
    if ctx.options.weights == WeightGrid::PerTensor {
        let (scale, left) = least_error(weights, codes);
        return Finest { scales: vec![scale; channels.len()], left: Some(left) };
    }
    let found: Vec<(f64, f64)> = channels.par_iter().map(|c| least_error(c, codes)).collect();
    let left = found.iter().map(|f| f.1).sum::<f64>() / found.len().max(1) as f64;
    Finest { scales: found.iter().map(|f| f.0).collect(), left: Some(left) }
}

/// The scale of a channel's symmetric weights: `finest`, but not so
/// fine that the bias, in units of s_x·s_w, needs more than 24 bits, nor that S = s_x·s_w/s_y is below 2^−22. Finer
/// weights would change no result, and the zero point, in units of S, would leave 32 bits; a channel of zeros gets that
/// scale, too.
fn weight_scale(finest: f64, bias: f64, s_x: f64, s_y: f64) -> f64 {
    finest.max(bias.abs() / (s_x * MOST_BIAS)).max(LEAST_FACTOR * s_y / s_x)
}

/// The next scale up for which S = s_x·s_w/s_y is a power of two; S above 1 is left alone, as no shift expresses it.
fn power_of_two_scale(scale: f64, s_x: f64, s_y: f64) -> f64 {
    let exponent = (s_x * scale / s_y).log2().ceil();
    if exponent > 0.0 { scale } else { 2f64.powf(exponent) * s_y / s_x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_a_code_of_every_grid() {
        for (min, max) in [(-1.0, 3.0), (2.0, 5.0), (-7.0, -3.0), (0.0, 0.0), (-1e-42, 1e-42), (-3e38, 3e38)]
        {
            let grid = grid_of(Range { min, max }).unwrap();
            let zero = qcc_ir::numerics::fake_quant(0.0, grid.scale, grid.zero_point, grid.lo, grid.hi);
            assert_eq!(zero, 0.0, "{min} {max}");
            let (lo, hi) =
                (-grid.zero_point as f32 * grid.scale, (255 - grid.zero_point) as f32 * grid.scale);
            assert!(lo <= min + 0.51 * grid.scale && hi >= max - 0.51 * grid.scale, "{lo} {hi}");
        }
    }

    #[test]
    fn weight_scales_leave_room_for_the_bias_and_never_vanish() {
        assert_eq!(weight_scale(1.0, 0.0, 1.0, 1.0), 1.0);
        let s = weight_scale(1e-30, 5.0, 0.1, 0.02);
        assert!(5.0 / (0.1 * s) <= MOST_BIAS);
        for dead in [0.0, 1e-30] {
            assert_eq!(weight_scale(dead, 0.0, 0.25, 0.5) * 0.25 / 0.5, LEAST_FACTOR);
        }
    }

    #[test]
    fn powers_of_two_round_up_so_that_nothing_clips() {
        for s in [0.0011, 0.3, 0.25, 1e-5] {
            let scale = power_of_two_scale(s, 0.02, 0.05);
            let factor: f64 = 0.02 * scale / 0.05;
            assert!(scale >= s * (1.0 - 1e-12));
            assert!((factor.log2() - factor.log2().round()).abs() < 1e-9);
        }
    }
}
