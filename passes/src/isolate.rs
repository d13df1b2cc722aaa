//! What rounding costs each layer of a quantized graph, the others left alone.
//!
//! The float graph is taken as it is, and beside each of its layers stand copies of it that are quantized as in the quantized
//! graph while all that comes before them is float: one that is rounded in all respects, and one each in which only its inputs,
//! its parameters or its result are. So the noise of a layer is told from what it inherits, and has a cause.
//! (`trial` does the like for single values, before there is a quantized graph.)

use crate::{
    PassError,
    calibrate::value_name,
    edit::{activations, is_move},
    insert_fake_quant::clamp_behind,
};
use qcc_ir::{
    DType, Graph, Kind, NodeId, Op, Stage, ValueId, numerics,
    ops::{Binary, BinaryKind, FakeQuant, Reduce, ReduceKind, Unary, UnaryKind},
};
use std::collections::BTreeMap;

/// A layer of a graph at [`Stage::FakeQuant`], and its first result as the layers behind it see it.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedLayer {
    /// The name of its node, which is the same in the float graph.
    pub name: String,
    /// Its node.
    pub node: NodeId,
    /// Its result: rounded, where it has a grid.
    pub value: ValueId,
    /// The grid that the result is rounded to; `None` where it is not, or moves what was rounded before.
    pub grid: Option<FakeQuant>,
}

/// The layers whose results are numbers, inputs first, in the order of execution: those that can be made outputs of the graph
/// without any change to what it becomes. What a clamp behind it ends, such as a sum that a ReLU follows, is part of the
/// clamp, and not among them.
pub fn quantized_layers(graph: &Graph) -> Vec<QuantizedLayer> {
    let computed = graph.computed();
    let layer = |node: NodeId| {
        let is_layer = !matches!(graph.op(node), Some(Op::FakeQuant(_)))
            && graph.ty(node.out()).dtype == DType::F32
            && graph.ty(node.out()).quant.is_none()
            && rounding_behind(graph, node).is_none_or(|f| graph.ty(f.out()).dtype == DType::F32);
        let is_inner = clamp_behind(graph, node)
            .is_some_and(|clamp| graph.sole_use(clamp.out()).is_some_and(|u| is_rounding(graph, u.node)));
        if !is_layer || is_inner {
            return None;
        }
        let grid = grid_behind(graph, node);
        let value = rounding_behind(graph, node).unwrap_or(node).out();
        Some(QuantizedLayer { name: graph.node(node).name.clone(), node, value, grid })
    };
    let inputs = graph.inputs().iter().copied();
    let ops = graph.order().into_iter().filter(|n| graph.op(*n).is_some() && computed.contains(n));
    inputs.chain(ops).filter_map(layer).collect()
}

/// A quantized graph whose activations are not rounded but only kept within the bounds of their grids: for a model that brings its
/// grids, what comes closest to the float model that it was, as tools leave its clamps to them. Constants stay as they are.
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn without_grids(graph: &Graph) -> Result<Graph, PassError> {
    let mut plain = graph.clone();
    let computed = graph.computed();
    for node in graph.order() {
        let Some(Op::FakeQuant(f)) = graph.op(node).filter(|_| computed.contains(&node)) else { continue };
        match f.params.as_per_tensor() {
            Some((scale, zero_point)) => {
                let bound = |code: i32| numerics::dequantize(code, scale, zero_point);
                let kind = UnaryKind::Clip { lo: bound(f.lo), hi: bound(f.hi) };
                plain.set_op(node, Unary { kind })?;
            }
            None => plain.replace_all_uses(node.out(), plain.operand(node, 0))?,
        }
    }
    plain.remove_dead();
    Ok(plain)
}

/// Where the noise of one layer is seen: sums of squares, one a sample or one for all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerNoise {
    /// Of the float result.
    pub signal: ValueId,
    /// Of the difference that rounding inputs, parameters and result makes.
    pub all: ValueId,
    /// That of rounding the inputs alone; `None` where they are not rounded.
    pub inputs: Option<ValueId>,
    /// That of rounding weights and bias.
    pub parameters: Option<ValueId>,
    /// That of rounding the result.
    pub result: Option<ValueId>,
}

/// A float graph with quantized copies of its layers beside them.
pub struct Isolated {
    /// At [`Stage::FakeQuant`].
    pub graph: Graph,
    /// By the name of the layer; of layers in which anything is rounded.
    pub layers: BTreeMap<String, LayerNoise>,
}

/// Puts the layers of a quantized graph beside those of the float graph of which it was made. `batch` is the number of samples
/// that a run takes: sums of results whose first axis is as long are kept apart by sample.
///
/// Layers that are not the same in both graphs, such as a first convolution that has taken in a normalisation, are left out.
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn isolated(float: &Graph, quantized: &Graph, batch: usize) -> Result<Isolated, PassError> {
    let mut isolation = Isolation {
        float,
        quantized,
        tried: float.clone(),
        constants: BTreeMap::new(),
        rounded: BTreeMap::new(),
        signals: BTreeMap::new(),
        batch,
    };
    let mut layers = BTreeMap::new();
    for node in quantized.order() {
        isolation.visit(node)?;
        if let Some(noise) = isolation.noise(node)? {
            layers.insert(quantized.node(node).name.clone(), noise);
        }
    }
    let mut graph = isolation.tried;
    graph.stage = Stage::FakeQuant;
    Ok(Isolated { graph, layers })
}

struct Isolation<'a> {
    float: &'a Graph,
    quantized: &'a Graph,
    /// The float graph, and what is put beside it.
    tried: Graph,
    /// Constants of the quantized graph, and what is computed of them alone, in the new graph.
    constants: BTreeMap<ValueId, ValueId>,
    /// Computed values of the quantized graph as they would be if all but their own rounding were float.
    rounded: BTreeMap<ValueId, ValueId>,
    signals: BTreeMap<ValueId, ValueId>,
    batch: usize,
}

impl Isolation<'_> {
    /// The value in the float graph that a value of the quantized one was made of.
    fn as_float(&self, value: ValueId) -> Option<ValueId> {
        let node = self.float.find(&self.quantized.node(value.node).name)?;
        let has_port = usize::from(value.port) < self.float.node(node).outputs().len();
        let own = node.port(value.port);
        (has_port && self.float.ty(own) == self.quantized.ty(value)).then_some(own)
    }

    /// The value with its own rounding, or as it is.
    fn operand(&self, value: ValueId) -> Option<ValueId> {
        self.constants.get(&value).or_else(|| self.rounded.get(&value)).copied()
    }

    /// Finds out what the results of a node of the quantized graph are.
    fn visit(&mut self, node: NodeId) -> Result<(), PassError> {
        let quantized = self.quantized;
        let name = &quantized.node(node).name;
        let operands = quantized.operands(node);
        match quantized.node(node).kind() {
            Kind::Constant(tensor) => {
                let ty = quantized.ty(node.out()).clone();
                let own = self.tried.constant_of(name, tensor.clone(), ty)?;
                self.constants.insert(node.out(), own);
                return Ok(());
            }
            Kind::Op(op) if operands.iter().all(|v| self.constants.contains_key(v)) => {
                let operands: Vec<ValueId> = operands.iter().map(|v| self.constants[v]).collect();
                let own = self.tried.add(name, op.clone(), &operands)?;
                self.constants.extend(ports(quantized, node).map(|p| (node.port(p), own.port(p))));
                return Ok(());
            }
            Kind::Op(op @ Op::FakeQuant(_)) => {
                if let Some(source) = self.operand(operands[0]) {
                    let own = self.tried.add(&format!("{name}_alone"), op.clone(), &[source])?;
                    self.rounded.insert(node.out(), own.out());
                }
                return Ok(());
            }
            Kind::Op(op) if is_move(op) => {
                let own: Option<Vec<ValueId>> = operands.iter().map(|&v| self.operand(v)).collect();
                let is_rounded = activations(quantized, node)
                    .iter()
                    .any(|(_, v)| self.rounded.get(v).copied() != self.as_float(*v));
                if let Some(own) = own.filter(|_| is_rounded) {
                    let moved = self.tried.add(&format!("{name}_alone"), op.clone(), &own)?;
                    self.rounded.insert(node.out(), moved.out());
                    return Ok(());
                }
            }
            Kind::Op(_) | Kind::Input => {}
        }
        for port in ports(quantized, node) {
            if let Some(own) = self.as_float(node.port(port)) {
                self.rounded.insert(node.port(port), own);
            }
        }
        Ok(())
    }

    /// The sums of squares of a layer; `None` of what is none, or rounds nothing.
    fn noise(&mut self, node: NodeId) -> Result<Option<LayerNoise>, PassError> {
        let quantized = self.quantized;
        let Some(op) = quantized.op(node).filter(|op| !matches!(op, Op::FakeQuant(_))) else {
            return Ok(None);
        };
        if self.constants.contains_key(&node.out()) || quantized.ty(node.out()).dtype != DType::F32 {
            return Ok(None);
        }
        let rounded = rounding_behind(quantized, node);
        let rounding = rounded.and_then(|f| quantized.op(f));
        if is_move(op) && rounding.is_none() {
            return Ok(None);
        }
        let Some(unbounded) = self.as_float(node.out()) else { return Ok(None) };
        // In place of a grid that the model brought, the float graph has its bounds.
        let bounds = rounded.and_then(|f| self.as_float(f.out()));
        let expected = bounds.unwrap_or(unbounded);
        let bounds = bounds.and_then(|b| self.float.op(b.node));
        let Some(own_op) = self.float.op(unbounded.node).filter(|own| *own == op) else {
            return Ok(None);
        };
        let own = self.float.operands(unbounded.node);
        let operands = quantized.operands(node);
        // A convolution that has taken in a normalisation takes something else.
        let takes_the_same = |(v, float): (&ValueId, &ValueId)| {
            let sources = [*v, unrounded(quantized, *v)].map(|v| self.as_float(v));
            self.constants.contains_key(v) || sources.contains(&Some(*float))
        };
        if own.len() != operands.len() || !operands.iter().zip(&own).all(takes_the_same) {
            return Ok(None);
        }
        let is_constant = |v: &ValueId| self.constants.contains_key(v);
        let Some(all) = operands.iter().map(|&v| self.operand(v)).collect::<Option<Vec<ValueId>>>() else {
            return Ok(None);
        };
        let choose = |constants: bool| -> Vec<ValueId> {
            let pairs = operands.iter().zip(&own).zip(&all);
            pairs
                .map(|((v, float), rounded)| if is_constant(v) == constants { *rounded } else { *float })
                .collect()
        };
        let (inputs, parameters) = (choose(false), choose(true));
        let rounds_parameters = operands.iter().any(|v| {
            is_constant(v) && matches!(quantized.op(v.node), Some(Op::FakeQuant(_) | Op::Dequantize(_)))
        });
        let rounds_inputs = inputs != own;
        if !rounds_inputs && !rounds_parameters && rounding.is_none() {
            return Ok(None);
        }
        let name = format!("{}_alone", quantized.node(node).name);
        let copy = |tried: &mut Graph, op: &Op, operands: &[ValueId], bounds: Option<&Op>| {
            // An op that is not the same in both graphs may refuse the operands of the other.
            let mut made = tried.add(&name, op.clone(), operands).ok()?.out();
            if let Some(bounds) = bounds {
                made = tried.add(&name, bounds.clone(), &[made]).ok()?.out();
            }
            (tried.ty(made) == tried.ty(expected)).then_some(made)
        };
        let Some(made) = copy(&mut self.tried, op, &all, None) else { return Ok(None) };
        let made = match rounding {
            Some(f) => self.tried.add(&name, f.clone(), &[made])?.out(),
            None => made,
        };
        let with_inputs = if rounds_inputs { copy(&mut self.tried, own_op, &inputs, bounds) } else { None };
        let with_parameters =
            if rounds_parameters { copy(&mut self.tried, op, &parameters, bounds) } else { None };
        let with_result = match rounding {
            Some(f) => Some(self.tried.add(&name, f.clone(), &[expected])?.out()),
            None => None,
        };
        let mut difference = |made: Option<ValueId>| -> Result<Option<ValueId>, PassError> {
            let Some(made) = made else { return Ok(None) };
            let sub = Binary { kind: BinaryKind::Sub };
            let difference = self.tried.add("difference", sub, &[made, expected])?.out();
            sum_of_squares(&mut self.tried, difference, self.batch).map(Some)
        };
        let (inputs, parameters) = (difference(with_inputs)?, difference(with_parameters)?);
        let (result, all) = (difference(with_result)?, difference(Some(made))?);
        let Some(all) = all else { return Ok(None) };
        let signal = match self.signals.get(&expected) {
            Some(&signal) => signal,
            None => sum_of_squares(&mut self.tried, expected, self.batch)?,
        };
        self.signals.insert(expected, signal);
        Ok(Some(LayerNoise { signal, all, inputs, parameters, result }))
    }
}

/// Σ x² of each sample, or of everything where there is no axis of samples.
fn sum_of_squares(graph: &mut Graph, value: ValueId, batch: usize) -> Result<ValueId, PassError> {
    let shape = graph.shape(value);
    let has_samples = shape.rank() > 1 && shape[0] == batch;
    let axes = (usize::from(has_samples)..shape.rank()).collect();
    let op = Reduce { kind: ReduceKind::SumSquare, axes, keep_dims: false };
    let name = format!("{}_squares", value_name(graph, value));
    Ok(graph.add(&name, op, &[value])?.out())
}

fn ports(graph: &Graph, node: NodeId) -> impl Iterator<Item = u16> + use<> {
    0..graph.node(node).outputs().len() as u16
}

/// A value before it was rounded.
fn unrounded(graph: &Graph, mut value: ValueId) -> ValueId {
    while is_rounding(graph, value.node) {
        value = graph.operand(value.node, 0);
    }
    value
}

fn is_rounding(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.op(node), Some(Op::FakeQuant(_)))
}

/// The grid of the first result of a node, where it is rounded.
pub(crate) fn grid_behind(graph: &Graph, node: NodeId) -> Option<FakeQuant> {
    match graph.op(rounding_behind(graph, node)?) {
        Some(Op::FakeQuant(grid)) => Some(grid.clone()),
        _ => None,
    }
}

/// The rounding of the first result of a node, the first of several.
fn rounding_behind(graph: &Graph, node: NodeId) -> Option<NodeId> {
    graph.uses(node.out()).into_iter().map(|u| u.node).find(|&n| is_rounding(graph, n))
}
