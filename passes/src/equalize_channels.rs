//! Channels of activations are scaled until each uses more of the grid that all channels of a tensor share.
//!
//! ReLU, pools, sums and concatenations commute with positive factors: f(s·x) = s·f(x). So the weights that make a channel can
//! be multiplied by s and those that read it divided by s, and the network computes the same (Nagel et al. 2019, "Data-Free
//! Quantization Through Weight Equalization and Bias Correction", which balances ranges of weights; Xiao et al. 2023,
//! "SmoothQuant", which balances those of activations behind a layer normalisation). Here weights have a scale for each
//! output channel, so what shares a grid are the channels of activations, and what pays for them are the weights
//! that read them.
//!
//! With R the range of a tensor's grid and m_c that of its channel c, of all tensors that the channel runs through,
//!
//! ```text
//! s_c = min over tensors (R / m_c)^strength
//! ```
//!
//! which is 1 for the channels that span the grid and never lets a channel leave it. An upper bound of a clamp
//! (ReLU6) stays what it is: channel c is then bounded by hi/s_c, which is at least m_c·s_c, as far above what was seen as
//! the channel was below the bound.

use crate::{
    Context, Pass, PassError, Record, WeightGrid,
    affine::Parameters,
    calibrate::{Range, value_name},
    classes::Classes,
    edit::{Product, add_f32, clamp_of, f32_constant, has_weights, is_move},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, ValueId,
    ops::{BinaryKind, Clamp, PadMode, ReduceKind, UnaryKind},
};
use std::collections::{BTreeMap, BTreeSet};

/// See the module. Applies the scales that calibration has found.
pub(crate) const EQUALIZE_CHANNELS: Pass = Pass { name: "equalize_channels", run };

/// No channel is scaled by more: one that hardly ever speaks may speak up on other data.
const MOST: f64 = 16.0;

/// The factor of each channel of a value, by the value's name; values without one have factors of 1.
pub type ChannelScales = BTreeMap<String, Vec<f32>>;

/// The range of each channel of a value, by the value's name.
pub type ChannelRanges = BTreeMap<String, Vec<Range>>;

/// The values whose channels may be scaled, each with its axis of channels: those whose ranges [`channel_scales`] wants to
/// know.
pub fn equalizable_values(graph: &Graph) -> Vec<(ValueId, usize)> {
    Channels::of(graph).axes.into_iter().map(|(v, (axis, _))| (v, axis)).collect()
}

/// The factors that bring the channels of a prepared float graph closer to the ranges of their tensors; `strength` from 0
/// (not at all) to 1 (all the way). Weights pay for it: what divides a channel coarsens the others. And what is brought all
/// the way has no room for samples that go beyond those that were seen.
pub fn channel_scales(
    graph: &Graph,
    ranges: &ChannelRanges,
    weights: WeightGrid,
    strength: f64,
) -> ChannelScales {
    let channels = Channels::of(graph);
    let room = channels.room(graph, ranges, weights);
    let mut scales = ChannelScales::new();
    for &value in channels.axes.keys() {
        let factors = channels.factors(graph, value, &room, strength);
        if factors.iter().any(|&s| s != 1.0) {
            scales.insert(value_name(graph, value), factors);
        }
    }
    scales
}

/// How often the range of a channel goes into that of its tensor, zero staying where it is. 1 for a channel of zeros: there is
/// nothing to be won.
fn headroom(channel: Range, whole: Range) -> f64 {
    let of = |own: f32, all: f32| if own > 0.0 { f64::from(all) / f64::from(own) } else { f64::INFINITY };
    let least = of(channel.max, whole.max).min(of(-channel.min, -whole.min));
    if least.is_finite() { least } else { 1.0 }
}

/// Of weights with one scale, by how much the row of each output channel is below the largest one.
fn room_of_rows(graph: &Graph, node: NodeId) -> Vec<f64> {
    let Ok(p) = Parameters::of(graph, node) else { return vec![] };
    let mut rows = vec![0f32; p.bias().len()];
    for (i, w) in p.weights().iter().enumerate() {
        let row = &mut rows[p.channels(i).0];
        *row = row.max(w.abs());
    }
    let most = rows.iter().fold(0f32, |m, r| m.max(*r));
    rows.into_iter().map(|r| if r > 0.0 { f64::from(most) / f64::from(r) } else { 1.0 }).collect()
}

/// The range of the grid that each value will be on: values that moves join share one.
fn grid_extents(graph: &Graph, ranges: &ChannelRanges) -> BTreeMap<ValueId, Range> {
    let mut grids = Classes::new();
    for (id, node) in graph.nodes() {
        if node.op().is_some_and(is_move) {
            for v in graph.operands(id).into_iter().filter(|v| graph.constant_value(*v).is_none()) {
                grids.join(id.out(), v);
            }
        }
    }
    let whole = |value: ValueId| {
        let of_channels = ranges.get(&value_name(graph, value))?;
        of_channels.iter().copied().reduce(Range::union)
    };
    let values: Vec<ValueId> =
        graph.nodes().filter(|(_, n)| n.op().is_some()).map(|(id, _)| id.out()).collect();
    let mut by_class: BTreeMap<ValueId, Range> = BTreeMap::new();
    for &v in &values {
        if let Some(range) = whole(v) {
            by_class.entry(grids.find(v)).and_modify(|r| *r = r.union(range)).or_insert(range);
        }
    }
    values.into_iter().filter_map(|v| Some((v, *by_class.get(&grids.find(v))?))).collect()
}

/// Which channels of a graph must have one factor, and which cannot have any but 1.
struct Channels {
    /// By value: the axis of channels, and the number of the first of them.
    axes: BTreeMap<ValueId, (usize, usize)>,
    /// Upper bounds that values were clamped to.
    bounds: BTreeMap<ValueId, f32>,
    /// Those that have one factor.
    classes: Classes<usize>,
    /// Members of classes that have none but 1.
    pinned: BTreeSet<usize>,
    count: usize,
}

impl Channels {
    fn of(graph: &Graph) -> Channels {
        let mut channels = Channels {
            axes: BTreeMap::new(),
            bounds: BTreeMap::new(),
            classes: Classes::new(),
            pinned: BTreeSet::new(),
            count: 0,
        };
        for node in graph.order() {
            if graph.op(node).is_some() && channels.visit(graph, node).is_none() {
                channels.pin_around(graph, node);
            }
        }
        for output in graph.outputs() {
            channels.pin(graph, output.value);
        }
        channels
    }

    /// What every class of channels could be multiplied by, by the member that has the least room.
    fn room(&self, graph: &Graph, ranges: &ChannelRanges, weights: WeightGrid) -> BTreeMap<usize, f64> {
        let extents = grid_extents(graph, ranges);
        let mut room: BTreeMap<usize, f64> = BTreeMap::new();
        let mut allow = |root: usize, factor: f64| {
            let least = room.entry(root).or_insert(factor);
            *least = least.min(factor);
        };
        for (&value, &(_, base)) in &self.axes {
            let (Some(own), Some(&whole)) = (ranges.get(&value_name(graph, value)), extents.get(&value))
            else {
                continue;
            };
            let bound = self.bounds.get(&value).copied().unwrap_or(f32::MAX);
            let whole = Range { min: whole.min, max: whole.max.min(bound) };
            for (c, range) in own.iter().enumerate() {
                allow(self.classes.find(base + c), headroom(*range, whole));
            }
        }
        if weights == WeightGrid::PerTensor {
            for (node, base) in self.products(graph) {
                for (c, factor) in room_of_rows(graph, node).into_iter().enumerate() {
                    allow(self.classes.find(base + c), factor);
                }
            }
        }
        for &c in &self.pinned {
            allow(self.classes.find(c), 1.0);
        }
        room
    }

    /// The factors of a value's channels.
    fn factors(&self, graph: &Graph, value: ValueId, room: &BTreeMap<usize, f64>, strength: f64) -> Vec<f32> {
        let Some(&(axis, base)) = self.axes.get(&value) else { return vec![] };
        let factor = |c: usize| match room.get(&self.classes.find(base + c)) {
            Some(room) => room.max(1.0).powf(strength).min(MOST) as f32,
            None => 1.0,
        };
        (0..graph.shape(value)[axis]).map(factor).collect()
    }

    /// The products with weights, each with the number of its first output channel.
    fn products<'a>(&'a self, graph: &'a Graph) -> impl Iterator<Item = (NodeId, usize)> + 'a {
        let of = |(&v, &(_, base)): (&ValueId, &(usize, usize))| {
            Product::of(graph, v.node).map(|_| (v.node, base))
        };
        self.axes.iter().filter_map(of)
    }

    /// Gives the result of a node channels of its own, along an axis.
    fn open(&mut self, graph: &Graph, value: ValueId, axis: usize) -> usize {
        let base = self.count;
        self.count += graph.shape(value)[axis];
        self.axes.insert(value, (axis, base));
        base
    }

    fn pin(&mut self, graph: &Graph, value: ValueId) {
        let Some(&(axis, base)) = self.axes.get(&value) else { return };
        self.pinned.extend(base..base + graph.shape(value)[axis]);
    }

    /// Of an op that does not commute with factors.
    fn pin_around(&mut self, graph: &Graph, node: NodeId) {
        for v in graph.operands(node) {
            self.pin(graph, v);
        }
        self.pin(graph, node.out());
    }

    /// The result has the channels of an operand, channel c that of `channel(c)`.
    fn like(
        &mut self,
        graph: &Graph,
        node: NodeId,
        operand: ValueId,
        axis: usize,
        channel: impl Fn(usize) -> usize,
    ) -> Option<()> {
        let (from, source) = *self.axes.get(&operand)?;
        let (own, others) = (graph.shape(node.out())[axis], graph.shape(operand)[from]);
        let base = self.open(graph, node.out(), axis);
        for c in 0..own {
            let of = channel(c);
            if of >= others {
                return None;
            }
            self.classes.join(base + c, source + of);
        }
        Some(())
    }

    /// Bounds of a result that factors of at least 1 commute with, as far as was seen.
    fn take_clamp(&mut self, value: ValueId, clamp: Clamp) -> Option<()> {
        if clamp.lo != 0.0 && clamp.lo != f32::NEG_INFINITY || clamp.hi <= 0.0 {
            return None;
        }
        if clamp.hi.is_finite() {
            self.bounds.insert(value, clamp.hi);
        }
        Some(())
    }

    /// What a node says of the channels of its operands and result; `None` where it commutes with no factor.
    fn visit(&mut self, graph: &Graph, node: NodeId) -> Option<()> {
        let (op, operands, y) = (graph.op(node)?, graph.operands(node), node.out());
        if graph.ty(y).dtype != DType::F32 {
            return None;
        }
        let axis_of = |channels: &Channels, v: ValueId| channels.axes.get(&v).map(|a| a.0);
        let rank = graph.shape(y).rank();
        match op {
            Op::Conv(_) | Op::MatMul(_) if has_weights(graph, node) => self.product(graph, node),
            Op::Unary(u) => {
                let x = operands[0];
                let axis = axis_of(self, x)?;
                match u.kind {
                    UnaryKind::Relu
                    | UnaryKind::Abs
                    | UnaryKind::Neg
                    | UnaryKind::Identity
                    | UnaryKind::LeakyRelu { .. } => {}
                    UnaryKind::Clip { .. } => self.take_clamp(y, clamp_of(graph, node)?)?,
                    _ => return None,
                }
                self.like(graph, node, x, axis, |c| c)
            }
            Op::Pool(p) => {
                let axis = axis_of(self, operands[0])?;
                let is_own = p.layout.channel_axis(rank) == axis;
                is_own.then(|| self.like(graph, node, operands[0], axis, |c| c))?
            }
            Op::Resample(r) => {
                let axis = axis_of(self, operands[0])?;
                (r.axis != axis).then(|| self.like(graph, node, operands[0], axis, |c| c))?
            }
            Op::Pad(p) => {
                let axis = axis_of(self, operands[0])?;
                let keeps = p.before[axis] == 0
                    && p.after[axis] == 0
                    && !matches!(p.mode, PadMode::Constant { value } if value != 0.0);
                keeps.then(|| self.like(graph, node, operands[0], axis, |c| c))?
            }
            Op::Transpose(t) => {
                let from = axis_of(self, operands[0])?;
                let axis = t.perm.iter().position(|&p| p == from)?;
                self.like(graph, node, operands[0], axis, |c| c)
            }
            Op::Reshape(_) => self.reshape(graph, node, operands[0]),
            Op::Slice(s) => {
                let axis = axis_of(self, operands[0])?;
                let spec = s.axes[axis];
                let at = |c: usize| (spec.start as isize + c as isize * spec.step) as usize;
                self.like(graph, node, operands[0], axis, at)
            }
            Op::Reduce(r)
                if matches!(
                    r.kind,
                    ReduceKind::Mean | ReduceKind::Sum | ReduceKind::Max | ReduceKind::Min
                ) =>
            {
                let from = axis_of(self, operands[0])?;
                if r.axes.contains(&from) {
                    return None;
                }
                let gone = if r.keep_dims { 0 } else { r.axes.iter().filter(|&&a| a < from).count() };
                self.like(graph, node, operands[0], from - gone, |c| c)
            }
            Op::Concat(c) => self.concat(graph, node, &operands, c.axis),
            Op::Binary(b) => self.binary(graph, node, b.kind, [operands[0], operands[1]]),
            _ => None,
        }
    }

    /// Weights take what their input and their output are scaled by; a residual is scaled as the output is.
    fn product(&mut self, graph: &Graph, node: NodeId) -> Option<()> {
        let p = Parameters::of(graph, node).ok()?;
        let mut product = Product::of(graph, node)?;
        let (x, y) = (graph.operand(node, 0), node.out());
        let axis = product.channel_axis(graph.shape(y).rank());
        let own = product.channel_axis(graph.shape(x).rank());
        if self.axes.get(&x).is_some_and(|&(given, _)| given != own) || graph.shape(y)[axis] != p.bias().len()
        {
            return None;
        }
        let clamp = *product.clamp();
        let residual = product.residual().then(|| graph.operands(node).last().copied()).flatten();
        let base = self.open(graph, y, axis);
        self.take_clamp(y, clamp)?;
        if let Some(residual) = residual {
            let &(of, source) = self.axes.get(&residual)?;
            if of != axis || graph.shape(residual) != graph.shape(y) {
                return None;
            }
            for c in 0..graph.shape(y)[axis] {
                self.classes.join(base + c, source + c);
            }
        }
        Some(())
    }

    /// Channels stay an axis, or each becomes as many neighbours as it had elements behind it.
    fn reshape(&mut self, graph: &Graph, node: NodeId, x: ValueId) -> Option<()> {
        let &(from, _) = self.axes.get(&x)?;
        let (old, new) = (graph.shape(x), graph.shape(node.out()));
        let before: usize = old[..from].iter().product();
        let behind: usize = old[from + 1..].iter().product();
        let mut so_far = 1;
        for (axis, &d) in new.iter().enumerate() {
            if so_far == before && d == old[from] {
                return self.like(graph, node, x, axis, |c| c);
            }
            if so_far == before && d == old[from] * behind && behind > 0 {
                return self.like(graph, node, x, axis, |c| c / behind);
            }
            so_far *= d;
        }
        None
    }

    fn concat(&mut self, graph: &Graph, node: NodeId, operands: &[ValueId], along: usize) -> Option<()> {
        let axis = self.axes.get(operands.first()?)?.0;
        let base = self.open(graph, node.out(), axis);
        let mut start = base;
        for v in operands {
            let &(own, source) = self.axes.get(v)?;
            if own != axis {
                return None;
            }
            let count = graph.shape(*v)[axis];
            for c in 0..count {
                self.classes.join(start + c, source + c);
            }
            if axis == along {
                start += count;
            }
        }
        Some(())
    }

    fn binary(&mut self, graph: &Graph, node: NodeId, kind: BinaryKind, [a, b]: [ValueId; 2]) -> Option<()> {
        let y = node.out();
        if let Some((x, axis, c)) = Constant::of(graph, node, |v| self.axes.get(&v).map(|a| a.0)) {
            return match kind {
                // It takes the difference of the factors.
                BinaryKind::Mul if !c.is_one => {
                    self.open(graph, y, axis);
                    Some(())
                }
                BinaryKind::Mul | BinaryKind::Add | BinaryKind::Sub => self.like(graph, node, x, axis, |c| c),
                _ => None,
            };
        }
        let [of_a, of_b] = [a, b].map(|v| self.axes.get(&v).copied());
        let is_same = graph.shape(a) == graph.shape(b) && of_a.map(|x| x.0) == of_b.map(|x| x.0);
        match kind {
            BinaryKind::Add | BinaryKind::Sub | BinaryKind::Max | BinaryKind::Min if is_same => {
                let (axis, source) = of_a?;
                self.like(graph, node, b, axis, |c| c)?;
                let (_, base) = *self.axes.get(&y)?;
                for c in 0..graph.shape(y)[axis] {
                    self.classes.join(base + c, source + c);
                }
                Some(())
            }
            // A gate: what it multiplies keeps its factors.
            BinaryKind::Mul => {
                let (x, gate) = if graph.shape(a) == graph.shape(y) { (a, b) } else { (b, a) };
                let (axis, _) = *self.axes.get(&x)?;
                self.pin(graph, gate);
                self.like(graph, node, x, axis, |c| c)
            }
            _ => None,
        }
    }
}

/// The constant operand of a function of two, with a number for each channel of the other one.
struct Constant {
    slot: usize,
    numbers: Vec<f32>,
    /// Whether there was one number for all.
    is_one: bool,
}

impl Constant {
    /// With the other operand, whose channels are along `axis`.
    fn of(
        graph: &Graph,
        node: NodeId,
        axis_of: impl Fn(ValueId) -> Option<usize>,
    ) -> Option<(ValueId, usize, Constant)> {
        let operands = graph.operands(node);
        let slot = operands.iter().position(|v| f32_constant(graph, *v).is_some())?;
        let x = *operands.get(1 - slot)?;
        let (shape, own) = (graph.shape(x), graph.shape(operands[slot]));
        // Behind ops that have no channels, such as the roots of a layer normalisation, the constant tells them.
        let told = || {
            let mut long = own.iter().enumerate().filter(|(_, d)| **d > 1).map(|(i, _)| i);
            let axis = long.next().filter(|_| long.next().is_none())?;
            (axis + shape.rank()).checked_sub(own.rank())
        };
        let axis = axis_of(x).or_else(told)?;
        let numbers = f32_constant(graph, operands[slot])?;
        if shape != graph.shape(node.out()) || own.rank() > shape.rank() {
            return None;
        }
        let first = shape.rank() - own.rank();
        let is_along = own.iter().enumerate().all(|(i, &d)| d == 1 || first + i == axis);
        match numbers {
            [one] => Some((x, axis, Constant { slot, numbers: vec![*one; shape[axis]], is_one: true })),
            _ if is_along => Some((x, axis, Constant { slot, numbers: numbers.to_vec(), is_one: false })),
            _ => None,
        }
    }
}

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    scale_channels(graph, &ctx.ranges.scales, record)
}

/// Scales channels of a prepared float graph: it computes the same, within what upper bounds of clamps let through.
///
/// # Errors
/// Where the scales are of another graph.
pub fn equalize(graph: &mut Graph, scales: &ChannelScales) -> Result<(), PassError> {
    scale_channels(graph, scales, &mut Record::new(EQUALIZE_CHANNELS.name))
}

fn scale_channels(graph: &mut Graph, scales: &ChannelScales, record: &mut Record) -> Result<(), PassError> {
    if scales.is_empty() {
        return Ok(());
    }
    let of = |graph: &Graph, v: ValueId| scales.get(&value_name(graph, v));
    let axes: BTreeMap<ValueId, usize> = equalizable_values(graph).into_iter().collect();
    for node in graph.order() {
        let Some(&x) = graph.operands(node).first() else { continue };
        let name = graph.node(node).name.clone();
        if has_weights(graph, node) && Product::of(graph, node).is_some() {
            let (own, result) = (of(graph, x), of(graph, node.out()));
            if own.is_none() && result.is_none() {
                continue;
            }
            match scaled_product(graph, node, own, result)? {
                Ok(()) => {
                    let (read, made) = (largest(own), largest(result));
                    record.applied(
                        &name,
                        format!(
                            "reads channels divided by up to {read:.1}, makes them up to {made:.1} as large"
                        ),
                    );
                }
                Err(why) => return Err(PassError::op(&name, "equalize", qcc_ir::OpError::unsupported(why))),
            }
        } else if let Some(Op::Binary(b)) = graph.op(node) {
            let kind = b.kind;
            let Some((x, axis, mut c)) = Constant::of(graph, node, |v| axes.get(&v).copied()) else {
                continue;
            };
            let (own, result) = (of(graph, x), of(graph, node.out()));
            if own.is_none() && result.is_none() || kind == BinaryKind::Mul && c.is_one {
                continue;
            }
            for (i, number) in c.numbers.iter_mut().enumerate() {
                let divisor = if kind == BinaryKind::Mul { own.map_or(1.0, |s| s[i]) } else { 1.0 };
                *number *= result.map_or(1.0, |s| s[i]) / divisor;
            }
            let mut dims = vec![1; graph.shape(x).rank()];
            dims[axis] = c.numbers.len();
            let constant = add_f32(graph, &format!("{name}_scaled"), &dims, c.numbers)?;
            graph.set_operand(node, c.slot, constant)?;
        }
    }
    graph.remove_dead();
    Ok(())
}

fn largest(scales: Option<&Vec<f32>>) -> f32 {
    scales.map_or(1.0, |s| s.iter().fold(1.0, |m: f32, x| m.max(*x)))
}

/// Multiplies weights and bias by what the result is scaled by, and divides weights by what the input is.
fn scaled_product(
    graph: &mut Graph,
    node: NodeId,
    own: Option<&Vec<f32>>,
    result: Option<&Vec<f32>>,
) -> Result<Result<(), String>, PassError> {
    let p = match Parameters::of(graph, node) {
        Ok(p) => p,
        Err(why) => return Ok(Err(why)),
    };
    let at = |scales: Option<&Vec<f32>>, c: usize| scales.map_or(1.0, |s| f64::from(s[c]));
    let scaled = |(i, &w): (usize, &f32)| {
        let (out, input) = p.channels(i);
        f64::from(w) * at(result, out) / at(own, input)
    };
    let weights = p.weights().iter().enumerate().map(scaled).collect();
    let has_bias = Product::of(graph, node).is_some_and(|mut p| *p.bias());
    let moved = |(c, &b): (usize, &f32)| f64::from(b) * at(result, c);
    let bias = has_bias.then(|| p.bias().iter().enumerate().map(moved).collect());
    Ok(p.store(graph, node, Some(weights), bias)?.map(|_| ()))
}
