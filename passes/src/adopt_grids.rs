//! Grids that a model brings become fake-quantizations, as if [`insert_fake_quant`](crate::insert_fake_quant) had chosen
//! them: quantizing and dequantizing again is rounding to a grid. So one lowering makes integers of a model that
//! somebody else has quantized and of one that we did.
//!
//! All grids of activations become u8 and those of weights s8 with zero point 0 where that holds the same numbers.
//! Moves of codes become moves of numbers. Then fake-quantizations are put where the lowering looks for them: behind
//! what computes, not behind the moves and clamps that follow it. A biased product keeps its bias as the integers that
//! the file has.
//!
//! A model that brings grids for its weights alone stays a float model; its weights are folded later.

use crate::{
    Context, Pass, PassError, Record,
    edit::{Product, activations, clamp_of, f32_constant, is_move, live_op, replace},
};
use qcc_ir::{
    DType, Graph, Kind, NodeId, Op, OpError, QuantParams, Stage, Tensor, TensorType, ValueId, numerics,
    ops::{Binary, BinaryKind, Clamp, Dequantize, FakeQuant, PadMode, Quantize, Reshape},
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const ADOPT_GRIDS: Pass = Pass { name: "adopt_grids", run };

fn run(graph: &mut Graph, _ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    if !brings_grids(graph) {
        return Ok(());
    }
    let mut adoption = Adoption {
        old: graph,
        new: Graph::new(graph.name.clone()),
        plain: BTreeMap::new(),
        numbers: BTreeMap::new(),
    };
    for &input in graph.inputs() {
        let value = adoption.new.input(&graph.node(input).name, graph.ty(input.out()).clone())?;
        adoption.plain.insert(input.out(), value);
    }
    for node in graph.order() {
        adoption.visit(node, record)?;
    }
    for output in graph.outputs() {
        let value = adoption.plain[&output.value];
        adoption.new.output(output.name.clone(), value);
    }
    let mut new = adoption.new;
    new.stage = Stage::FakeQuant;
    new.remove_dead();
    *graph = new;
    round_before_moves(graph)?;
    narrow_by_clamps(graph, record)?;
    take_biases(graph, record)?;
    graph.remove_dead();
    Ok(())
}

/// Whether activations have grids that are known before the model runs.
fn brings_grids(graph: &Graph) -> bool {
    graph.nodes().any(|(id, node)| match node.op() {
        Some(Op::Quantize(_)) => graph.constant_value(graph.operand(id, 0)).is_none(),
        Some(Op::AssumeGrid(grid)) => grid.params.is_some(),
        _ => false,
    })
}

/// The graph on its way to one without codes, built anew in order.
struct Adoption<'a> {
    old: &'a Graph,
    new: Graph,
    /// Old values as they are.
    plain: BTreeMap<ValueId, ValueId>,
    /// Old values that are codes, as the numbers that they stand for.
    numbers: BTreeMap<ValueId, ValueId>,
}

impl Adoption<'_> {
    fn visit(&mut self, node: NodeId, record: &mut Record) -> Result<(), PassError> {
        let name = self.old.node(node).name.clone();
        let op = match self.old.node(node).kind() {
            Kind::Input => return Ok(()),
            Kind::Constant(tensor) => {
                let ty = self.old.ty(node.out()).clone();
                let value = self.new.constant_of(&name, tensor.clone(), ty)?;
                self.plain.insert(node.out(), value);
                return Ok(());
            }
            Kind::Op(op) => op,
        };
        match op {
            Op::Quantize(q) => return self.quantize(node, q, record),
            Op::Dequantize(_) => return self.dequantize(node),
            op if is_move(op) => {
                if let Some(moved) = self.move_of_constant(node, op)? {
                    self.plain.insert(node.out(), moved);
                    return Ok(());
                }
                if let Some(numbers) = self.move_of_codes(node, op)? {
                    self.numbers.insert(node.out(), numbers);
                }
            }
            _ => {}
        }
        let operands: Vec<ValueId> = self.old.operands(node).iter().map(|v| self.plain[v]).collect();
        let own = self.new.add(&name, op.clone(), &operands)?;
        let ports = 0..self.old.node(node).outputs().len() as u16;
        self.plain.extend(ports.map(|port| (node.port(port), own.port(port))));
        Ok(())
    }

    /// Who wants the codes gets them of the rounded numbers, which are the same.
    fn quantize(&mut self, node: NodeId, q: &Quantize, record: &mut Record) -> Result<(), PassError> {
        let name = &self.old.node(node).name;
        let source = self.old.operand(node, 0);
        let x = self.plain[&source];
        let fail = |e| PassError::op(name, "Quantize", e);
        let grid = unsigned(q.dtype, &q.params).map_err(fail)?;
        // Some tools give each user a pair of its own.
        let same = Op::from(grid.clone());
        let twin = self.new.uses(x).into_iter().find(|u| self.new.op(u.node) == Some(&same));
        let rounded = match (self.new.op(x.node), twin) {
            (Some(Op::FakeQuant(f)), _) if contains(&grid, f) => x,
            (_, Some(twin)) => twin.node.out(),
            _ => self.new.add(&format!("{}_fq", self.old.node(source.node).name), grid, &[x])?.out(),
        };
        record.applied(name, "its grid is that of the model");
        self.numbers.insert(node.out(), rounded);
        let codes = self.new.add(name, q.clone(), &[rounded])?.out();
        self.plain.insert(node.out(), codes);
        Ok(())
    }

    fn dequantize(&mut self, node: NodeId) -> Result<(), PassError> {
        let codes = self.old.operand(node, 0);
        let name = self.old.node(node).name.clone();
        if let Some(&numbers) = self.numbers.get(&codes) {
            self.plain.insert(node.out(), numbers);
            return Ok(());
        }
        let ty = self.old.ty(codes).clone();
        let fail = |e| PassError::op(&name, "Dequantize", e);
        let Some(params) = ty.quant.clone() else {
            return Err(fail(OpError::quant(format!("{ty} has no grid"))));
        };
        let value = match self.old.constant_value(codes) {
            Some(tensor) if ty.dtype.size() < 4 => {
                let grid = match self.is_of_weights(node.out()) {
                    true => signed(tensor, ty.dtype, &params),
                    false => unsigned(ty.dtype, &params),
                };
                let grid = grid.map_err(fail)?;
                let result = TensorType::new(DType::F32, ty.shape.clone());
                let numbers = Op::from(Dequantize {}).eval(&[tensor], &[&ty], &[result]).map_err(fail)?;
                let numbers = numbers.into_iter().next().unwrap_or_else(|| tensor.clone());
                let constant =
                    self.new.constant(&format!("{}_numbers", self.old.node(codes.node).name), numbers);
                self.new.add(&name, grid, &[constant])?.out()
            }
            // The integers of a bias have up to 32 bits, which f32 does not hold.
            Some(_) => self.new.add(&name, Dequantize {}, &[self.plain[&codes]])?.out(),
            None => {
                let numbers = self.new.add(&name, Dequantize {}, &[self.plain[&codes]])?.out();
                match ty.dtype.size() {
                    ..4 => {
                        let grid = unsigned(ty.dtype, &params).map_err(fail)?;
                        self.new.add(&format!("{name}_fq"), grid, &[numbers])?.out()
                    }
                    _ => numbers,
                }
            }
        };
        self.plain.insert(node.out(), value);
        Ok(())
    }

    /// Whether a product uses this old value as its weights, possibly in another order.
    fn is_of_weights(&self, value: ValueId) -> bool {
        self.old.uses(value).into_iter().any(|u| match self.old.op(u.node) {
            Some(Op::Conv(_) | Op::MatMul(_)) => u.slot == 1,
            Some(Op::Transpose(_) | Op::Reshape(_)) => self.is_of_weights(u.node.out()),
            _ => false,
        })
    }

    /// A move of a rounded constant, as a rounded constant.
    fn move_of_constant(&mut self, node: NodeId, op: &Op) -> Result<Option<ValueId>, PassError> {
        if !matches!(op, Op::Transpose(_) | Op::Reshape(_)) {
            return Ok(None);
        }
        let x = self.plain[&self.old.operand(node, 0)];
        let Some(Op::FakeQuant(f)) = self.new.op(x.node) else { return Ok(None) };
        let source = self.new.operand(x.node, 0);
        let Some(tensor) = self.new.constant_value(source) else { return Ok(None) };
        let name = &self.old.node(node).name;
        let fail = |e| PassError::op(name, op.mnemonic(), e);
        let codes = TensorType::quantized(f.dtype, tensor.shape().clone(), f.params.clone()).map_err(fail)?;
        let Ok(moved_codes) = op.infer(&[&codes]) else { return Ok(None) };
        let ty = self.new.ty(source).clone();
        let results = op.infer(&[&ty]).map_err(fail)?;
        let moved = op.eval(&[tensor], &[&ty], &results).map_err(fail)?;
        let (Some(tensor), Some(params)) =
            (moved.into_iter().next(), moved_codes.into_iter().next().and_then(|t| t.quant))
        else {
            return Ok(None);
        };
        let grid = FakeQuant { params, ..f.clone() };
        let constant = self.new.constant(&format!("{name}_numbers"), tensor);
        Ok(Some(self.new.add(name, grid, &[constant])?.out()))
    }

    /// A move of codes, as one of what they stand for.
    fn move_of_codes(&mut self, node: NodeId, op: &Op) -> Result<Option<ValueId>, PassError> {
        let moved: Vec<usize> = activations(self.old, node).into_iter().map(|(slot, _)| slot).collect();
        let old = self.old.operands(node);
        let in_numbers = |(slot, v): (usize, &ValueId)| match moved.contains(&slot) {
            true => self.numbers.get(v).copied(),
            false => Some(self.plain[v]),
        };
        let Some(operands) = old.iter().enumerate().map(in_numbers).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let name = &self.old.node(node).name;
        Ok(Some(self.new.add(name, op.clone(), &operands)?.out()))
    }
}

/// The grid as a rounding to u8, where its codes have 8 bits and lie below 0: the same numbers.
fn unsigned(dtype: DType, params: &QuantParams) -> Result<FakeQuant, OpError> {
    let (lo, hi) = dtype.integer_range().unwrap_or((0, 0));
    let (lo, hi) = (lo as i32, hi as i32);
    match params.as_per_tensor().filter(|_| dtype == DType::S8) {
        Some((scale, zero)) => Ok(FakeQuant {
            dtype: DType::U8,
            lo: 0,
            hi: 255,
            params: QuantParams::per_tensor(scale, zero + 128)?,
        }),
        None => Ok(FakeQuant { dtype, lo, hi, params: params.clone() }),
    }
}

/// The grid of weights as a rounding to s8 with zero points 0, where that holds all of these codes; as it is otherwise.
fn signed(codes: &Tensor, dtype: DType, params: &QuantParams) -> Result<FakeQuant, OpError> {
    let (stride, extent) = params.axis().map_or((1, 1), |a| (codes.shape().strides()[a], codes.shape()[a]));
    let integers = codes.to_i64().unwrap_or_default();
    let steps = |(i, q): (usize, &i64)| q - i64::from(params.at(i / stride % extent).1);
    let fits = integers.iter().enumerate().map(steps).all(|q| (-128..=127).contains(&q));
    if !fits || dtype.size() != 1 {
        return unsigned(dtype, params);
    }
    let scales = params.scales().to_vec();
    let params = match params.axis() {
        Some(axis) => {
            let zeros = vec![0; scales.len()];
            QuantParams::per_axis(axis, scales, zeros)?
        }
        None => QuantParams::per_tensor(scales[0], 0)?,
    };
    Ok(FakeQuant { dtype: DType::S8, lo: -128, hi: 127, params })
}

/// Whether every number that `inner` makes is one that `outer` leaves as it is.
fn contains(outer: &FakeQuant, inner: &FakeQuant) -> bool {
    outer.dtype == inner.dtype && outer.params == inner.params && outer.lo <= inner.lo && inner.hi <= outer.hi
}

/// The rounding of a node, if it is one of activations.
fn rounding(graph: &Graph, node: NodeId) -> Option<FakeQuant> {
    match live_op(graph, node)? {
        Op::FakeQuant(f) if graph.constant_value(graph.operand(node, 0)).is_none() => Some(f.clone()),
        _ => None,
    }
}

/// Roundings go before the moves that they follow: always before a concatenation, whose parts then come on one grid; and
/// before other moves of what is not rounded yet, so that what computes it finds its grid behind it.
pub(crate) fn round_before_moves(graph: &mut Graph) -> Result<(), PassError> {
    let mut work: Vec<NodeId> = graph.order();
    while let Some(node) = work.pop() {
        let Some(f) = rounding(graph, node) else { continue };
        let x = graph.operand(node, 0);
        if let Some(Op::FakeQuant(inner)) = graph.op(x.node)
            && contains(&f, inner)
        {
            replace(graph, node, x)?;
            continue;
        }
        if f.params.axis().is_some() || !rounds_before(graph, x, &f) {
            continue;
        }
        let name = graph.node(node).name.clone();
        for (slot, v) in activations(graph, x.node) {
            let rounded = graph.add(&name, f.clone(), &[v])?;
            graph.set_operand(x.node, slot, rounded.out())?;
            work.push(rounded);
        }
        replace(graph, node, x)?;
    }
    Ok(())
}

/// Whether rounding what this move takes is the same as rounding what it makes, and worth it.
fn rounds_before(graph: &Graph, moved: ValueId, f: &FakeQuant) -> bool {
    let Some(op) = graph.op(moved.node).filter(|op| is_move(op)) else { return false };
    if graph.sole_use(moved).is_none() {
        return false;
    }
    if let Op::Pad(p) = op
        && let PadMode::Constant { value } = p.mode
        && f64::from(rounded(f, value as f32)) != value
    {
        return false;
    }
    let sources = activations(graph, moved.node);
    if matches!(op, Op::Concat(_)) {
        return sources.iter().any(|(_, v)| graph.constant_value(*v).is_none());
    }
    sources.iter().all(|(_, v)| {
        graph.sole_use(*v).is_some()
            && graph.constant_value(*v).is_none()
            && !matches!(graph.op(v.node), Some(Op::FakeQuant(_)) | None)
    })
}

fn rounded(f: &FakeQuant, x: f32) -> f32 {
    let (scale, zero) = f.params.at(0);
    numerics::fake_quant(x, scale, zero, f.lo, f.hi)
}

/// A clamp of rounded numbers is a narrower grid where its bounds are on the grid, and nothing where they are beyond it.
fn narrow_by_clamps(graph: &mut Graph, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        if live_op(graph, node).is_none() {
            continue;
        }
        if let Some(clamp) = clamp_of(graph, node) {
            narrow_by_clamp(graph, node, clamp, record)?;
        } else if let Some(f) = rounding(graph, node) {
            let x = graph.operand(node, 0);
            if let Some(Op::FakeQuant(inner)) = graph.op(x.node)
                && contains(&f, inner)
            {
                replace(graph, node, x)?;
            }
        }
    }
    Ok(())
}

fn narrow_by_clamp(
    graph: &mut Graph,
    node: NodeId,
    clamp: Clamp,
    record: &mut Record,
) -> Result<(), PassError> {
    let x = graph.operand(node, 0);
    let Some(f) = rounding(graph, x.node).filter(|f| f.params.axis().is_none()) else { return Ok(()) };
    let (scale, zero) = f.params.at(0);
    let code = |bound: f32| numerics::quantize(bound, scale, zero, f.lo, f.hi);
    let real = |code: i32| numerics::dequantize(code, scale, zero);
    let (lo, hi) = (code(clamp.lo), code(clamp.hi));
    let on_grid = (real(lo) == clamp.lo || clamp.lo <= real(f.lo))
        && (real(hi) == clamp.hi || clamp.hi >= real(f.hi))
        && clamp.lo <= clamp.hi;
    if !on_grid {
        return Ok(());
    }
    let name = graph.node(node).name.clone();
    if (lo, hi) == (f.lo, f.hi) {
        record.applied(&name, "does nothing to numbers of its operand's grid");
        return replace(graph, node, x);
    }
    record.applied(&name, "became the bounds of its operand's grid");
    let narrow = FakeQuant { lo, hi, ..f };
    if graph.sole_use(x).is_some() {
        graph.set_op(x.node, narrow)?;
        return replace(graph, node, x);
    }
    graph.set_op(node, narrow)?;
    Ok(())
}

/// A constant that is added to a product of rounded weights, one number a channel, becomes its bias.
fn take_biases(graph: &mut Graph, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        if !matches!(live_op(graph, node), Some(Op::Binary(Binary { kind: BinaryKind::Add }))) {
            continue;
        }
        let operands = graph.operands(node);
        for (sum, added) in [(operands[0], operands[1]), (operands[1], operands[0])] {
            if takes_bias(graph, sum, added) {
                let name = graph.node(node).name.clone();
                take_bias(graph, node, sum, added)?;
                record.applied(&name, format!("became the bias of `{}`", graph.node(sum.node).name));
                break;
            }
        }
    }
    Ok(())
}

fn takes_bias(graph: &Graph, sum: ValueId, added: ValueId) -> bool {
    let Some(mut product) = Product::of(graph, sum.node) else { return false };
    if *product.bias() || *product.residual() || !product.clamp().is_none() || graph.sole_use(sum).is_none() {
        return false;
    }
    let is_rounded = matches!(graph.op(graph.operand(sum.node, 1).node), Some(Op::FakeQuant(_)));
    let (shape, own) = (graph.shape(sum), graph.shape(added));
    let axis = product.channel_axis(shape.rank());
    let Some(lead) = shape.rank().checked_sub(own.rank()) else { return false };
    let along_channels = (0..own.rank()).all(|d| own[d] == if d + lead == axis { shape[axis] } else { 1 });
    is_rounded && along_channels && axis >= lead && f32_constant(graph, added).is_some()
}

fn take_bias(graph: &mut Graph, node: NodeId, sum: ValueId, added: ValueId) -> Result<(), PassError> {
    let Some(mut product) = Product::of(graph, sum.node) else { return Ok(()) };
    *product.bias() = true;
    let name = graph.node(added.node).name.clone();
    let fail = |e: OpError| PassError::op(&name, "Reshape", e);
    let elements = graph.shape(added).elements();
    let shape = qcc_ir::Shape::new([elements]).map_err(|e| fail(e.into()))?;
    let vector = match graph.constant_value(added) {
        Some(tensor) => {
            let vector = tensor.reshaped(shape).map_err(|e| fail(e.into()))?;
            graph.constant(&name, vector)
        }
        None => graph.add(&name, Reshape { shape }, &[added])?.out(),
    };
    let mut operands = graph.operands(sum.node);
    operands.insert(2, vector);
    graph.rewrite(sum.node, product.op(), &operands)?;
    replace(graph, node, sum)
}
