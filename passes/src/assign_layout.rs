//! Windowed ops take channels last, as the kernels do; transposes at the borders are pushed down the graph, where
//! they meet their inverses and vanish.
//!
//! The graph is built anew, in order. Each old value is held as a new value in some order of axes, its [`Form`].
//! A windowed op asks for its operand with channels last, ops without a preference work in the form they find, and
//! only what needs the original order (a reshape, a result of the model) has a transpose materialised.

use crate::{Context, Pass, PassError, Record, edit::keeps_order};
use qcc_ir::{
    Graph, Kind, NodeId, Op, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    ops::{
        BatchNorm, Concat, Conv, FakeQuant, Gather, Layout, Lrn, Normalize, Pad, Pool, QConvToFloat,
        Quantize, Reduce, Resample, Reshape, Slice, Softmax, Transpose,
    },
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const ASSIGN_LAYOUT: Pass = Pass { name: "assign_layout", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let mut new = Graph::new(graph.name.clone());
    new.stage = graph.stage;
    let mut builder =
        Builder { old: graph, new, forms: BTreeMap::new(), made: BTreeMap::new(), columns: BTreeMap::new() };
    for &input in graph.inputs() {
        let value = builder.new.input(&graph.node(input).name, graph.ty(input.out()).clone())?;
        builder.put(input, value, None);
    }
    for node in graph.order() {
        builder.visit(node, record)?;
    }
    for output in graph.outputs() {
        let held = builder.form(output.value);
        let value = match ctx.options.any_order && held.perm.first() == Some(&0) {
            true => held.value,
            false => builder.native(output.value)?,
        };
        builder.new.output(output.name.clone(), value);
    }
    let mut new = builder.new;
    new.remove_dead();
    for (id, node) in new.nodes() {
        if let Some(Op::Transpose(t)) = node.op() {
            let from = &new.ty(new.operand(id, 0)).shape;
            record.declined(&node.name, format!("a transpose of {from} by {:?} remains", t.perm));
        }
    }
    *graph = new;
    Ok(())
}

/// How an old value is held: axis i of the old value is axis `perm[i]` of the new one.
#[derive(Clone)]
struct Form {
    value: ValueId,
    perm: Vec<usize>,
}

struct Builder<'a> {
    old: &'a Graph,
    new: Graph,
    forms: BTreeMap<ValueId, Form>,
    /// Old values in other orders of axes, as they were asked for.
    made: BTreeMap<(ValueId, Vec<usize>), ValueId>,
    /// Matrix products whose input is flattened from another order of axes: the shape that the rows of their weights
    /// have in the old order, and the order they are to have.
    columns: BTreeMap<NodeId, (Vec<usize>, Vec<usize>)>,
}

/// The name of what was fake-quantized, which is what people know.
fn unrounded(name: &str) -> &str {
    name.strip_suffix("_fq").unwrap_or(name)
}

fn identity(rank: usize) -> Vec<usize> {
    (0..rank).collect()
}

fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; perm.len()];
    for (i, &p) in perm.iter().enumerate() {
        inverse[p] = i;
    }
    inverse
}

/// The axes of `[N, C, spatial…]` in the order `[N, spatial…, C]`.
fn channels_last(rank: usize) -> Vec<usize> {
    let mut axes = identity(rank);
    let channels = axes.remove(1);
    axes.push(channels);
    axes
}

impl Builder<'_> {
    fn name(&self, node: NodeId) -> String {
        self.old.node(node).name.clone()
    }

    /// Notes how the result of a node is held; in its own order without `perm`.
    fn put(&mut self, node: NodeId, value: ValueId, perm: Option<Vec<usize>>) {
        let perm = perm.unwrap_or_else(|| identity(self.new.shape(value).rank()));
        self.forms.insert(node.out(), Form { value, perm });
    }

    fn form(&self, value: ValueId) -> &Form {
        &self.forms[&value]
    }

    /// The old value in its own order of axes.
    fn native(&mut self, value: ValueId) -> Result<ValueId, PassError> {
        self.in_order(value, &identity(self.old.shape(value).rank()))
    }

    /// The old value with axes in this order: axis j of the result is axis `order[j]` of the old value, which is
    /// taken to have leading axes of length 1 up to the rank of `order`.
    fn in_order(&mut self, value: ValueId, order: &[usize]) -> Result<ValueId, PassError> {
        if let Some(&made) = self.made.get(&(value, order.to_vec())) {
            return Ok(made);
        }
        let made = self.make_in_order(value, order)?;
        self.made.insert((value, order.to_vec()), made);
        Ok(made)
    }

    fn make_in_order(&mut self, value: ValueId, order: &[usize]) -> Result<ValueId, PassError> {
        let Form { value: held, perm } = self.form(value).clone();
        let shape = self.old.shape(value).clone();
        let lead = order.len() - shape.rank();
        if lead > 0 && shape.elements() == 1 {
            return Ok(held);
        }
        // Of a rounded constant, the constant is put in order, so that it stays a rounded constant.
        if let (Some(Op::FakeQuant(f)), false) = (self.old.op(value.node), order.is_sorted() && lead == 0) {
            let x = self.old.operand(value.node, 0);
            if self.old.constant_value(x).is_some() && f.params.axis().is_none() {
                let f = f.clone();
                let x = self.in_order(x, order)?;
                return Ok(self.new.add(&self.name(value.node), f, &[x])?.out());
            }
        }
        let name = self.name(value.node);
        let (held, perm) = match lead {
            0 => (held, perm),
            _ => {
                let native = self.native(value)?;
                let mut dims = vec![1; lead];
                dims.extend(shape.iter());
                (self.reshaped(&name, native, dims)?, identity(order.len()))
            }
        };
        let moved: Vec<usize> = order.iter().map(|&j| perm[j]).collect();
        self.transposed(&name, held, moved)
    }

    /// A new value with its axes permuted: as a constant, a reshape or a transpose.
    fn transposed(&mut self, name: &str, value: ValueId, perm: Vec<usize>) -> Result<ValueId, PassError> {
        if perm.is_sorted() {
            return Ok(value);
        }
        let shape = self.new.shape(value).clone();
        if keeps_order(&shape, &perm) {
            let dims = perm.iter().map(|&p| shape[p]).collect();
            return self.reshaped(name, value, dims);
        }
        let name = format!("{}_transposed", unrounded(name));
        self.moved(&name, Transpose { perm }.into(), value)
    }

    /// A new value under another shape, reshapes before it merged.
    fn reshaped(&mut self, name: &str, value: ValueId, dims: Vec<usize>) -> Result<ValueId, PassError> {
        let fail = |e: OpError| PassError::op(name, "Reshape", e);
        let shape = Shape::new(dims).map_err(|e| fail(e.into()))?;
        let source = match self.new.op(value.node) {
            Some(Op::Reshape(_)) => self.new.operand(value.node, 0),
            _ => value,
        };
        if *self.new.shape(source) == shape {
            return Ok(source);
        }
        let name = format!("{}_reshaped", unrounded(name));
        self.moved(&name, Reshape { shape }.into(), source)
    }

    /// A move of a new value; of a constant, done at once.
    fn moved(&mut self, name: &str, op: Op, value: ValueId) -> Result<ValueId, PassError> {
        let Some(tensor) = self.new.constant_value(value) else {
            return Ok(self.new.add(name, op, &[value])?.out());
        };
        let ty = self.new.ty(value);
        let fail = |e| PassError::op(name, op.mnemonic(), e);
        let results = op.infer(&[ty]).map_err(fail)?;
        let moved = op.eval(&[tensor], &[ty], &results).map_err(fail)?;
        let mut both = moved.into_iter().zip(results);
        match both.next() {
            Some((tensor, ty)) => self.constant(name, &tensor, &ty),
            None => Ok(value),
        }
    }

    fn constant(&mut self, name: &str, tensor: &Tensor, ty: &TensorType) -> Result<ValueId, PassError> {
        Ok(self.new.constant_of(name, tensor.clone(), ty.clone())?)
    }

    fn visit(&mut self, node: NodeId, record: &mut Record) -> Result<(), PassError> {
        let op = match self.old.node(node).kind() {
            Kind::Input => return Ok(()),
            Kind::Constant(tensor) => {
                let value = self.constant(&self.name(node), tensor, self.old.ty(node.out()))?;
                self.put(node, value, None);
                return Ok(());
            }
            Kind::Op(op) => op,
        };
        let rank = self.old.shape(node.out()).rank();
        if let Some(windowed) = with_channels_last(op, rank) {
            record.applied(&self.name(node), "takes channels last");
            return self.windowed(node, windowed, rank);
        }
        match op {
            Op::Transpose(t) => {
                let Form { value, perm } = self.form(self.old.operand(node, 0)).clone();
                let perm = t.perm.iter().map(|&p| perm[p]).collect();
                self.put(node, value, Some(perm));
                Ok(())
            }
            Op::Reshape(r) => self.reshape(node, &r.shape),
            Op::MatMul(_) if self.columns.contains_key(&node) => self.product_of_flattened(node, op),
            _ => self.follow(node, op),
        }
    }

    /// An op with a window: activations with channels last, weights and bias as they are.
    fn windowed(&mut self, node: NodeId, op: Op, rank: usize) -> Result<(), PassError> {
        let order = channels_last(rank);
        let residual = match &op {
            Op::Conv(c) => c.residual_slot(),
            Op::QConvToFloat(c) => c.to.residual_slot(),
            _ => None,
        };
        let mut operands = Vec::new();
        for (slot, v) in self.old.operands(node).into_iter().enumerate() {
            let activation = slot == 0 || Some(slot) == residual;
            operands.push(if activation { self.in_order(v, &order)? } else { self.native(v)? });
        }
        let value = self.new.add(&self.name(node), op, &operands)?.out();
        self.put(node, value, Some(inverse(&order)));
        Ok(())
    }

    /// A reshape needs the old order, unless it flattens for a matrix product: then the rows of its weights move.
    fn reshape(&mut self, node: NodeId, shape: &Shape) -> Result<(), PassError> {
        let x = self.old.operand(node, 0);
        let name = self.name(node);
        if let Some(product) = self.flattens_for(node) {
            let Form { value, perm } = self.form(x).clone();
            let rows = self.old.shape(x)[1..].to_vec();
            let order = inverse(&perm)[1..].iter().map(|&a| a - 1).collect();
            self.columns.insert(product, (rows, order));
            let value = self.reshaped(&name, value, shape.to_vec())?;
            self.put(node, value, None);
            return Ok(());
        }
        let x = self.native(x)?;
        let value = self.reshaped(&name, x, shape.to_vec())?;
        self.put(node, value, None);
        Ok(())
    }

    /// The matrix product that is the only user of this flattening of a value held in another order, and whose weights
    /// are constant, so that their rows can be put in that order.
    fn flattens_for(&self, node: NodeId) -> Option<NodeId> {
        let x = self.old.operand(node, 0);
        let (from, to) = (self.old.shape(x), self.old.shape(node.out()));
        let order = inverse(&self.form(x).perm);
        let flattens = from.rank() > 2 && to.rank() == 2 && from[0] == to[0] && order[0] == 0;
        if !flattens || keeps_order(from, &order) {
            return None;
        }
        let u = self.old.sole_use(node.out()).filter(|u| u.slot == 0)?;
        let weights = match self.old.op(u.node)? {
            Op::MatMul(_) => self.old.operand(u.node, 1),
            _ => return None,
        };
        let source = match self.old.op(weights.node) {
            Some(Op::FakeQuant(f)) if f.params.axis() != Some(0) => self.old.operand(weights.node, 0),
            _ => weights,
        };
        let constant = self.old.constant_value(source).is_some() && self.old.shape(weights).rank() == 2;
        constant.then_some(u.node)
    }

    fn product_of_flattened(&mut self, node: NodeId, op: &Op) -> Result<(), PassError> {
        let Some((rows, mut order)) = self.columns.remove(&node) else {
            return self.follow(node, op);
        };
        let old = self.old.operands(node);
        let rounded = match self.old.op(old[1].node) {
            Some(Op::FakeQuant(f)) => Some(f.clone()),
            _ => None,
        };
        let source = if rounded.is_some() { self.old.operand(old[1].node, 0) } else { old[1] };
        let name = self.name(source.node);
        let flat = self.old.shape(source).to_vec();
        let mut dims = rows;
        order.push(dims.len());
        dims.push(flat[1]);
        let weights = self.native(source)?;
        let apart = self.reshaped(&name, weights, dims)?;
        let moved = self.transposed(&name, apart, order)?;
        let mut weights = self.reshaped(&name, moved, flat)?;
        if let Some(f) = rounded {
            weights = self.new.add(&self.name(old[1].node), f, &[weights])?.out();
        }
        let mut operands = vec![self.native(old[0])?, weights];
        for &v in &old[2..] {
            operands.push(self.native(v)?);
        }
        let value = self.new.add(&self.name(node), op.clone(), &operands)?.out();
        self.put(node, value, None);
        Ok(())
    }

    /// An op without a preference works in the order that its first reordered operand is held in.
    fn follow(&mut self, node: NodeId, op: &Op) -> Result<(), PassError> {
        let old = self.old.operands(node);
        let rank = self.old.shape(node.out()).rank();
        let per_element = matches!(op, Op::Binary(_) | Op::Where(_) | Op::Concat(_));
        let candidates = if per_element { &old[..] } else { &old[..old.len().min(1)] };
        let leader = candidates
            .iter()
            .map(|&v| self.form(v).perm.clone())
            .find(|perm| !perm.is_sorted() && (!per_element || perm.len() == rank));
        // Of indices in a vector: others change the rank.
        let keeps_rank = !matches!(op, Op::Gather(_)) || self.old.shape(old[1]).rank() == 1;
        let leader = leader.filter(|_| keeps_rank);
        let followed = leader.and_then(|perm| Some((reordered(op, &perm)?, perm)));
        let Some(((op, result), perm)) = followed else {
            let operands = old.iter().map(|&v| self.native(v)).collect::<Result<Vec<_>, _>>()?;
            let own = self.new.add(&self.name(node), op.clone(), &operands)?;
            self.put(node, own.out(), None);
            self.put_further(node, own);
            return Ok(());
        };
        let order = inverse(&perm);
        let mut operands = Vec::new();
        for (slot, &v) in old.iter().enumerate() {
            let activation = per_element || slot == 0;
            operands.push(if activation { self.in_order(v, &order)? } else { self.native(v)? });
        }
        let own = self.new.add(&self.name(node), op, &operands)?;
        self.put(node, own.out(), Some(result));
        self.put_further(node, own);
        Ok(())
    }

    /// Notes the results of a node behind its first one, which are in their own order.
    fn put_further(&mut self, node: NodeId, own: NodeId) {
        for port in 1..self.old.node(node).outputs().len() as u16 {
            let value = own.port(port);
            let perm = identity(self.new.shape(value).rank());
            self.forms.insert(node.port(port), Form { value, perm });
        }
    }
}

/// The op with channels last, if it has a window over two dimensions and channels first.
fn with_channels_last(op: &Op, rank: usize) -> Option<Op> {
    let layout = Layout::ChannelsLast;
    let first = |l: Layout| l == Layout::ChannelsFirst && rank == 4;
    Some(match op {
        Op::Conv(c) if first(c.layout) => Conv { layout, ..c.clone() }.into(),
        Op::QConvToFloat(c) if first(c.layout) => QConvToFloat { layout, ..c.clone() }.into(),
        Op::Pool(p) if first(p.layout) => Pool { layout, ..p.clone() }.into(),
        Op::Lrn(l) if first(l.layout) => Lrn { layout, ..l.clone() }.into(),
        _ => return None,
    })
}

/// The op on operands whose axis i is at `perm[i]`, and where the axes of its result are then; `None` for ops that
/// need the order they were written for.
fn reordered(op: &Op, perm: &[usize]) -> Option<(Op, Vec<usize>)> {
    let spread = |v: &[usize]| {
        let mut moved = vec![0; v.len()];
        v.iter().zip(perm).for_each(|(&x, &p)| moved[p] = x);
        moved
    };
    let grid = |q: &QuantParams| q.axis().map_or_else(|| q.clone(), |a| q.on_axis(perm[a]));
    let same = perm.to_vec();
    let op = match op {
        Op::Unary(_) | Op::Binary(_) | Op::Where(_) | Op::Cast(_) => op.clone(),
        Op::FakeQuant(f) => FakeQuant { params: grid(&f.params), ..f.clone() }.into(),
        Op::Quantize(q) => Quantize { params: grid(&q.params), ..q.clone() }.into(),
        // One grid of all, so that its further results are the same in any order.
        Op::DynamicQuantize(d) if d.axis == 0 => d.clone().into(),
        Op::Dequantize(d) => d.clone().into(),
        Op::Normalize(n) => Normalize { axis: perm[n.axis], ..n.clone() }.into(),
        Op::Softmax(s) => Softmax { axis: perm[s.axis], ..s.clone() }.into(),
        Op::BatchNorm(b) => BatchNorm { axis: perm[b.axis], ..b.clone() }.into(),
        Op::Concat(c) => Concat { axis: perm[c.axis] }.into(),
        Op::Gather(g) => Gather { axis: perm[g.axis] }.into(),
        Op::Resample(r) => Resample { axis: perm[r.axis], ..r.clone() }.into(),
        Op::Pad(p) => Pad { before: spread(&p.before), after: spread(&p.after), mode: p.mode }.into(),
        Op::Slice(s) => {
            let axes = inverse(perm).into_iter().map(|i| s.axes[i]).collect();
            Slice { axes }.into()
        }
        Op::Reduce(r) => {
            let mut axes: Vec<usize> = r.axes.iter().map(|&a| perm[a]).collect();
            axes.sort_unstable();
            let result = if r.keep_dims {
                same
            } else {
                // Positions of the axes that stay, among those that stay.
                let kept: Vec<usize> =
                    (0..perm.len()).filter(|a| !r.axes.contains(a)).map(|a| perm[a]).collect();
                kept.iter().map(|k| kept.iter().filter(|o| *o < k).count()).collect()
            };
            return Some((Reduce { axes, ..r.clone() }.into(), result));
        }
        _ => return None,
    };
    Some((op, same))
}
