//! From a model and the shapes of its inputs to a concrete graph.

mod attributes;
mod bindings;
mod budget;
mod node;

pub use bindings::Bindings;
pub(super) use budget::Work;
pub(super) use node::Node;

use super::{
    Eager, ImportError, InputInfo, Model, NodeError, Rest, UnsupportedOp,
    body::{Body, NodeDef},
    ops::{self, Import},
    value::{Form, MapKey, Texts, ValueKind},
};
use crate::{
    DType, Graph, Op, OpError, Shape, Tensor, TensorType, ValueId,
    limits::{
        MAX_FOLDED_BYTES, MAX_FOLDED_MACS, MAX_FOLDED_TENSOR_BYTES, MAX_KNOWN_ELEMENTS, MAX_SPLICED_NODES,
        MAX_UNROLLED_NODES, MAX_UNROLLED_OPS,
    },
    ops::{AssumeGrid, Cast, PoolKind},
};
use bindings::bind;
use budget::{operations, reading, take_bytes};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};
use typed_arena::Arena;

/// What an import comes to.
pub enum Imported {
    /// The graph of the whole model, and how many of its outputs each output of the model is.
    Whole(Graph, Vec<Form>),
    /// Values of these inputs decide over shapes or over what is computed, and are small: bind them and import again.
    Wants(Vec<String>),
    /// The part of the model that can be known so far.
    Part(Box<Part>),
}

/// The part of a model before values that decide over shapes, or over what is computed.
pub struct Part {
    /// Computes, of the model's inputs, the values that `rest` and `eager` need.
    pub graph: Graph,
    /// Computations on values that are too large to be bound, before `rest`.
    pub eager: Vec<Eager>,
    /// What is left.
    pub rest: Rest,
    /// Why the import could not go on: the first of its reasons.
    pub reason: ImportError,
}

impl Model {
    /// The concrete graph, at [`Stage::Float`](crate::Stage::Float), for these input shapes.
    ///
    /// Everything that depends on shapes and weights only, such as the target of a Reshape, is computed on the way. An
    /// op that needs such a number and gets one from the model's inputs is an error.
    pub fn graph(&self, bindings: &Bindings) -> Result<Graph, ImportError> {
        self.check_ops()?;
        let arena = Arena::new();
        let mut importer = self.imported(bindings, &arena)?;
        match std::mem::take(&mut importer.blocked).into_iter().next() {
            Some((_, reason)) => Err(reason),
            None => {
                let (graph, forms) = importer.finish()?;
                match forms.iter().position(|form| *form != Form::Tensor) {
                    None => Ok(graph),
                    Some(at) => Err(ImportError::Structure(format!(
                        "output `{}` is no tensor: run the model as a `DynamicModel` (`qcc run`)",
                        self.outputs().nth(at).unwrap_or_default()
                    ))),
                }
            }
        }
    }

    /// [`graph`](Self::graph), and its values by the names that the file has for them, in the order of execution; those that are
    /// constants, or that nothing needs, are left out.
    ///
    /// # Errors
    /// As [`graph`](Self::graph).
    pub fn named_graph(&self, bindings: &Bindings) -> Result<(Graph, Vec<(String, ValueId)>), ImportError> {
        self.check_ops()?;
        let arena = Arena::new();
        let mut importer = self.imported(bindings, &arena)?;
        if let Some((_, reason)) = std::mem::take(&mut importer.blocked).into_iter().next() {
            return Err(reason);
        }
        let values: Vec<(String, ValueId)> =
            importer.values.iter().map(|(name, value)| (name.to_string(), *value)).collect();
        let (graph, _) = importer.finish()?;
        let order: BTreeMap<_, usize> = graph.order().into_iter().zip(0..).collect();
        let is_computed =
            |value: &ValueId| graph.contains(value.node) && graph.constant_value(*value).is_none();
        let mut named: Vec<_> = values.into_iter().filter(|(_, value)| is_computed(value)).collect();
        named.sort_by_key(|(name, value)| (order.get(&value.node).copied(), value.port, name.clone()));
        Ok((graph, named))
    }

    /// Types of the inputs under these bindings.
    ///
    /// # Errors
    /// Where a shape is not known, or does not fit what the model declares.
    pub fn input_types(&self, bindings: &Bindings) -> Result<Vec<TensorType>, ImportError> {
        let shapes = bind(&self.inputs, bindings)?;
        Ok(self.inputs.iter().zip(shapes).map(|(info, shape)| TensorType::new(info.dtype, shape)).collect())
    }

    /// The graph of as much of the model as can be known from these bindings.
    pub fn import(&self, bindings: &Bindings) -> Result<Imported, ImportError> {
        self.check_ops()?;
        let arena = Arena::new();
        let importer = self.imported(bindings, &arena)?;
        if importer.blocked.is_empty() {
            return importer.finish().map(|(graph, forms)| Imported::Whole(graph, forms));
        }
        let wanted = importer.wanted_inputs();
        if !wanted.is_empty() {
            return Ok(Imported::Wants(wanted));
        }
        importer.part().map(|part| Imported::Part(Box::new(part)))
    }

    /// What could be imported. Loops whose rounds become too many ops run by their definition.
    fn imported<'m>(
        &'m self,
        bindings: &Bindings,
        arena: &'m Arena<NodeDef>,
    ) -> Result<Importer<'m>, ImportError> {
        let mut importer = self.importer(bindings, arena)?;
        importer.all_nodes()?;
        if importer.is_overgrown {
            importer = Importer { max_unrolled: 0, ..self.importer(bindings, arena)? };
            importer.all_nodes()?;
        }
        Ok(importer)
    }

    pub(in crate::onnx) fn importer<'m>(
        &'m self,
        bindings: &Bindings,
        arena: &'m Arena<NodeDef>,
    ) -> Result<Importer<'m>, ImportError> {
        if let Some(info) = self.inputs.iter().find(|i| i.kind != ValueKind::TENSOR) {
            let reason = "it is no tensor: run the model as a `DynamicModel` (`qcc run`)".into();
            return Err(ImportError::Input { input: info.name.clone(), reason });
        }
        let shapes = bind(&self.inputs, bindings)?;
        let mut importer = Importer {
            model: self,
            arena,
            graph: Graph::new(&self.name),
            values: BTreeMap::new(),
            structures: BTreeMap::new(),
            texts: self.texts(),
            known: BTreeMap::new(),
            used: self.used(),
            budget: self.folded_bytes(),
            in_loop: false,
            is_eager: false,
            work: Rc::default(),
            spliced: 0,
            max_unrolled: MAX_UNROLLED_NODES,
            is_overgrown: false,
            splices: 0,
            blocked: Vec::new(),
            deferred: Vec::new(),
        };
        for (info, shape) in self.inputs.iter().zip(shapes) {
            importer.input(info, shape, bindings)?;
        }
        Ok(importer)
    }

    /// Bytes of constants that import may compute of others.
    fn folded_bytes(&self) -> usize {
        let allowed = usize::try_from(self.max_memory).unwrap_or(usize::MAX);
        MAX_FOLDED_BYTES.saturating_add(self.weight_bytes().saturating_mul(2)).min(allowed)
    }

    /// Fails with all ops that are not supported.
    fn check_ops(&self) -> Result<(), ImportError> {
        let mut unknown = Vec::new();
        collect_unknown(&self.body, &mut unknown);
        if unknown.is_empty() { Ok(()) } else { Err(ImportError::UnsupportedOps(unknown)) }
    }

    /// Names of values that a node or a result of the graph uses.
    fn used(&self) -> BTreeSet<&str> {
        self.body.nodes.iter().flat_map(|n| n.reads()).chain(self.outputs()).collect()
    }
}

/// How a node is imported, if its op is supported.
fn import_of(def: &NodeDef) -> Option<Import> {
    def.version.and_then(|version| ops::find(&def.domain, &def.op, version))
}

/// Nodes of a graph, and of those in it, whose ops are not supported.
fn collect_unknown(body: &Body, unknown: &mut Vec<UnsupportedOp>) {
    for n in &body.nodes {
        if import_of(n).is_none() {
            unknown.push(UnsupportedOp {
                node: n.name.clone(),
                op: n.op.clone(),
                domain: if n.domain.is_empty() { "ai.onnx".into() } else { n.domain.clone() },
                version: n.version,
            });
        }
        n.bodies().for_each(|body| collect_unknown(body, unknown));
    }
}

pub(in crate::onnx) struct Importer<'m> {
    pub(in crate::onnx) model: &'m Model,
    /// Nodes that stand for others.
    arena: &'m Arena<NodeDef>,
    pub(in crate::onnx) graph: Graph,
    /// What the names of the file stand for; initializers are added when they are first used.
    pub(in crate::onnx) values: BTreeMap<&'m str, ValueId>,
    /// The same of names that are no tensors.
    pub(in crate::onnx) structures: BTreeMap<&'m str, Held>,
    /// What numbers of texts stand for.
    pub(in crate::onnx) texts: Texts,
    /// What values are known to be that the graph computes nevertheless; small ones only.
    pub(in crate::onnx) known: BTreeMap<ValueId, Tensor>,
    used: BTreeSet<&'m str>,
    /// Bytes that folding may still make.
    pub(in crate::onnx) budget: usize,
    /// Whether this is a round of a loop that runs by its definition.
    pub(in crate::onnx) in_loop: bool,
    /// Whether everything is to be folded, whatever it takes: all inputs are constants.
    pub(in crate::onnx) is_eager: bool,
    /// What eager computations may still take, together with those around this one.
    pub(in crate::onnx) work: Rc<Work>,
    /// Nodes that were put in the place of others, and how often that was.
    pub(in crate::onnx) spliced: usize,
    /// Nodes of a loop that may become part of the graph.
    pub(in crate::onnx) max_unrolled: usize,
    /// Whether import has stopped, because loops in the graph have become too many ops.
    is_overgrown: bool,
    splices: usize,
    /// Nodes that need values which are not known, and what import says of them.
    pub(in crate::onnx) blocked: Vec<(&'m NodeDef, ImportError)>,
    /// Those, and all that depend on their results, in order.
    pub(in crate::onnx) deferred: Vec<&'m NodeDef>,
}

impl<'m> Importer<'m> {
    fn input(&mut self, info: &'m InputInfo, shape: Shape, bindings: &Bindings) -> Result<(), ImportError> {
        let refuse = |reason: String| ImportError::Input { input: info.name.clone(), reason };
        let ty = TensorType::new(info.dtype, shape);
        let value = match bindings.values.get(&info.name) {
            Some(t) if t.dtype() == info.dtype => self.graph.constant(&info.name, t.clone()),
            Some(t) => {
                return Err(refuse(format!("bound to {}, but the model declares {}", t.ty(), info.dtype)));
            }
            None => self
                .graph
                .input(&info.name, ty)
                .map_err(NodeError::from)
                .map_err(|e| refuse(e.to_string()))?,
        };
        if let Some(known) = bindings.known.get(&info.name).filter(|t| t.ty() == *self.graph.ty(value)) {
            self.known.insert(value, known.clone());
        }
        self.values.insert(&info.name, value);
        Ok(())
    }

    /// Imports the model's nodes, but for those that need values which are not known and all that depends on them.
    pub(in crate::onnx) fn all_nodes(&mut self) -> Result<(), ImportError> {
        let mut queue: VecDeque<&'m NodeDef> = self.model.body.nodes.iter().map(|n| &**n).collect();
        // Results of nodes that are deferred.
        let mut unknown: BTreeSet<&'m str> = BTreeSet::new();
        // Of the rounds of a loop that are being imported: nodes behind them, and ops before them.
        let mut rounds: Option<(usize, usize)> = None;
        while let Some(def) = queue.pop_front() {
            rounds = rounds.filter(|(behind, _)| queue.len() >= *behind);
            if rounds.is_some_and(|(_, before)| self.graph.len() > before + MAX_UNROLLED_OPS)
                && !self.is_eager
            {
                self.is_overgrown = true;
                return Ok(());
            }
            if self.in_loop {
                self.work.take(1, reading(def)).map_err(|e| node_error(def, e))?;
            }
            let outcome = match def.reads().any(|name| unknown.contains(name)) {
                true => Ok(Outcome::Deferred),
                false => self.node(def),
            };
            match outcome {
                Ok(Outcome::Values) => {}
                Ok(Outcome::Nodes(nodes)) => {
                    self.spliced += nodes.len();
                    if self.spliced > MAX_SPLICED_NODES {
                        let why =
                            format!("the branches and rounds taken have more than {MAX_SPLICED_NODES} nodes");
                        return Err(node_error(def, OpError::too_large(why).into()));
                    }
                    if def.op == "Loop" {
                        rounds = rounds.or(Some((queue.len(), self.graph.len())));
                    }
                    let nodes: &'m [NodeDef] = self.arena.alloc_extend(nodes);
                    for n in nodes.iter().rev() {
                        self.used.extend(n.reads());
                        queue.push_front(n);
                    }
                }
                Ok(Outcome::Deferred) => {
                    unknown.extend(def.outputs.iter().map(String::as_str));
                    self.deferred.push(def);
                }
                Err(
                    e @ ImportError::Node {
                        source: NodeError::NotConstant { .. } | NodeError::ByValue { .. },
                        ..
                    },
                ) => {
                    unknown.extend(def.outputs.iter().map(String::as_str));
                    self.deferred.push(def);
                    self.blocked.push((def, e));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn node(&mut self, def: &'m NodeDef) -> Result<Outcome, ImportError> {
        let Some(entry) = import_of(def) else {
            // `check_ops` has looked at every node.
            return Err(node_error(def, OpError::unsupported("not supported").into()));
        };
        let opset = def.version.filter(|_| def.domain.is_empty()).unwrap_or(self.model.opset());
        let mut node =
            Node { def, opset, importer: self, attributes: BTreeSet::new(), operands: BTreeSet::new() };
        let results = match entry {
            Import::One(import) => import(&mut node).map(|v| vec![Held::Value(v)]),
            Import::Many(import) => import(&mut node).map(|all| all.into_iter().map(Held::Value).collect()),
            Import::Structure(import) => import(&mut node),
            Import::Nodes(import) => {
                let nodes = import(&mut node).and_then(|nodes| node.check_names_read().map(|()| nodes));
                return nodes.map(Outcome::Nodes).map_err(|e| node_error(def, e));
            }
        };
        let results = results.and_then(|r| node.check_all_read(r.len()).map(|()| r));
        let results = results.map_err(|e| node_error(def, e))?;
        for (name, held) in def.outputs.iter().zip(results).filter(|(name, _)| !name.is_empty()) {
            match held {
                Held::Value(value) => _ = self.values.insert(name, value),
                other => _ = self.structures.insert(name, other),
            }
        }
        Ok(Outcome::Values)
    }

    /// The value of this name, which validation has found to be defined.
    pub(in crate::onnx) fn value(&mut self, name: &'m str) -> Option<ValueId> {
        if let Some(v) = self.values.get(name) {
            return Some(*v);
        }
        let initializer = self.model.body.initializers.get(name)?.clone();
        let value = self.graph.constant(name, initializer);
        self.values.insert(name, value);
        Some(value)
    }

    /// Adds an op, or what it computes where its operands are constants; its results.
    fn emit(&mut self, name: &str, op: Op, operands: &[ValueId]) -> Result<Vec<ValueId>, NodeError> {
        let operands = self.without_grids(name, &op, operands)?;
        if let Some(&first) = operands.first()
            && computes_in_f32(&op)
            && operands.iter().any(|&v| matches!(self.graph.ty(v).dtype, DType::F16 | DType::BF16))
        {
            let dtype = self.graph.ty(first).dtype;
            return self.emit_in_f32(name, op, &operands, dtype).map(|y| vec![y]);
        }
        if let Some(constants) = self.fold(name, &op, &operands)? {
            return Ok(constants);
        }
        let known = self.known_results(&op, &operands);
        let node = self.graph.add(name, op, &operands)?;
        let results: Vec<ValueId> =
            (0..self.graph.node(node).outputs().len()).map(|p| node.port(p as u16)).collect();
        for (&value, known) in results.iter().zip(known.into_iter().flatten()) {
            if known.ty() == *self.graph.ty(value) {
                self.known.insert(value, known);
            }
        }
        Ok(results)
    }

    /// The same for an op of one result.
    fn emit_one(&mut self, name: &str, op: Op, operands: &[ValueId]) -> Result<ValueId, NodeError> {
        let mnemonic = op.mnemonic();
        let first = self.emit(name, op, operands)?.into_iter().next();
        first.ok_or_else(|| OpError::unsupported(format!("{mnemonic} has no result")).into())
    }

    /// What a value is, where that is known.
    fn tensor_of(&self, value: ValueId) -> Option<&Tensor> {
        self.graph.constant_value(value).or_else(|| self.known.get(&value))
    }

    /// What an op computes, where that is known and small.
    fn known_results(&self, op: &Op, operands: &[ValueId]) -> Option<Vec<Tensor>> {
        if operands.iter().all(|v| !self.known.contains_key(v)) {
            return None;
        }
        let tensors = operands.iter().map(|&v| self.tensor_of(v)).collect::<Option<Vec<_>>>()?;
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.graph.ty(v)).collect();
        let results = op.infer(&types).ok()?;
        let is_small = |t: &TensorType| t.shape.elements() <= MAX_KNOWN_ELEMENTS && t.quant.is_none();
        if !results.iter().all(is_small) || op.macs(&types, &results) > MAX_KNOWN_ELEMENTS as u64 {
            return None;
        }
        op.eval(&tensors, &types, &results).ok()
    }

    /// Adds an op that computes in f32 for operands of narrower floats; the result is rounded once to `dtype`.
    fn emit_in_f32(
        &mut self,
        name: &str,
        op: Op,
        operands: &[ValueId],
        dtype: DType,
    ) -> Result<ValueId, NodeError> {
        let widen = |(slot, &v): (usize, &ValueId)| match self.graph.ty(v).dtype {
            DType::F16 | DType::BF16 => {
                self.emit_one(&format!("{name}_wide{slot}"), Cast { to: DType::F32 }.into(), &[v])
            }
            _ => Ok(v),
        };
        let wide: Vec<ValueId> = operands.iter().enumerate().map(widen).collect::<Result<_, _>>()?;
        let y = self.emit_one(&format!("{name}_wide"), op, &wide)?;
        self.emit_one(name, Cast { to: dtype }.into(), &[y])
    }

    /// ONNX computes with quantized integers as with any others. Only ops that move elements, or take weights of codes, keep a
    /// grid; for the rest, operands become plain integers.
    fn without_grids(
        &mut self,
        name: &str,
        op: &Op,
        operands: &[ValueId],
    ) -> Result<Vec<ValueId>, NodeError> {
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.graph.ty(v)).collect();
        let keeps = types.iter().all(|t| t.quant.is_none()) || keeps_grids(op) && op.infer(&types).is_ok();
        if keeps {
            return Ok(operands.to_vec());
        }
        let forget = |&v: &ValueId| match self.graph.ty(v).quant {
            None => Ok(v),
            Some(_) => self.emit_one(&format!("{name}_plain"), AssumeGrid { params: None }.into(), &[v]),
        };
        operands.iter().map(forget).collect()
    }

    fn fold(&mut self, name: &str, op: &Op, operands: &[ValueId]) -> Result<Option<Vec<ValueId>>, NodeError> {
        // A weight is to stay the integers that the file has.
        if matches!(op, Op::Dequantize(_)) && !self.is_eager {
            return Ok(None);
        }
        let Some(tensors) =
            operands.iter().map(|&v| self.graph.constant_value(v)).collect::<Option<Vec<_>>>()
        else {
            return Ok(None);
        };
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.graph.ty(v)).collect();
        let results = op.infer(&types)?;
        results.iter().try_for_each(TensorType::check_size)?;
        let bytes =
            |types: &mut dyn Iterator<Item = &TensorType>| types.map(TensorType::bytes).sum::<usize>();
        let (given, made) = (bytes(&mut types.iter().copied()), bytes(&mut results.iter()));
        let costs_little =
            !matches!(op, Op::Pool(_) | Op::Lrn(_)) && op.macs(&types, &results) <= MAX_FOLDED_MACS;
        // Weights in half the bits become f32, which most is computed in.
        let grows = if matches!(op, Op::Cast(_)) { 2 * given } else { given };
        let is_little = made <= MAX_FOLDED_TENSOR_BYTES.max(grows) && made <= self.budget && costs_little;
        if !is_little && !self.is_eager {
            return Ok(None);
        }
        if self.in_loop {
            self.work.take(1, operations(op, &types, &results))?;
        }
        if self.is_eager {
            take_bytes(&mut self.budget, made)?;
        }
        let values = match op.eval(&tensors, &types, &results) {
            Ok(values) => values,
            Err(OpError::Unsupported(_)) if !self.is_eager => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if !self.is_eager {
            self.budget = self.budget.saturating_sub(made);
        }
        let constants = values.into_iter().zip(results);
        let constants = constants.map(|(value, ty)| self.graph.constant_of(name, value, ty));
        Ok(Some(constants.collect::<Result<Vec<_>, _>>()?))
    }

    pub(in crate::onnx) fn finish(mut self) -> Result<(Graph, Vec<Form>), ImportError> {
        let mut forms = Vec::new();
        for (name, declared) in &self.model.body.outputs {
            let (form, values) = match self.structures.get(name.as_str()).cloned() {
                Some(held) => held.parts(),
                None => (Form::Tensor, self.value(name).into_iter().collect()),
            };
            if values.len() != form.tensors() {
                return Err(ImportError::Structure(format!("output `{name}` of the graph is not computed")));
            }
            for (i, &value) in values.iter().enumerate() {
                let dtype = self.graph.ty(value).dtype;
                if let Some(declared) = declared.filter(|&d| d != dtype && !matches!(form, Form::Maps(_))) {
                    return Err(ImportError::Structure(format!(
                        "output `{name}` of the graph is declared as {declared}, but is {dtype}"
                    )));
                }
                match form {
                    Form::Sequence(_) => self.graph.output(format!("{name}[{i}]"), value),
                    _ => self.graph.output(name, value),
                };
            }
            forms.push(form);
        }
        self.graph.remove_dead();
        Ok((self.graph, forms))
    }
}

/// Ops that sum many products, which narrower floats than f32 would each be rounded in.
fn computes_in_f32(op: &Op) -> bool {
    use Op::*;
    match op {
        Pool(pool) => pool.kind != PoolKind::Max,
        _ => matches!(op, Conv(_) | MatMul(_) | BatchNorm(_) | Lrn(_) | Softmax(_)),
    }
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub(in crate::onnx) enum Held {
    /// A tensor.
    Value(ValueId),
    /// Tensors, and their type where there are none.
    Sequence(Vec<ValueId>, Option<DType>),
    /// A map from these labels to its columns for each row of a tensor.
    Maps(ValueId, Vec<MapKey>),
    /// An optional value that is not there.
    Absent,
}

impl Held {
    /// Its tensors, and what they are.
    fn parts(self) -> (Form, Vec<ValueId>) {
        match self {
            Held::Value(value) => (Form::Tensor, vec![value]),
            Held::Sequence(all, _) => (Form::Sequence(all.len()), all),
            Held::Maps(value, keys) => (Form::Maps(keys), vec![value]),
            Held::Absent => (Form::Absent, Vec::new()),
        }
    }
}

/// What became of a node.
enum Outcome {
    /// Its results have values.
    Values,
    /// Others stand for it.
    Nodes(Vec<NodeDef>),
    /// It depends on a node that needs a value which is not known.
    Deferred,
}

/// Whether a node makes a sequence or the like, of which a graph knows nothing.
pub(in crate::onnx) fn is_structure(def: &NodeDef) -> bool {
    matches!(import_of(def), Some(Import::Structure(_)))
}

fn node_error(def: &NodeDef, source: NodeError) -> ImportError {
    ImportError::Node { node: def.name.clone(), op: def.op.clone(), source }
}

/// Ops that let integers keep their grid, where it fits, and those whose weights have one.
fn keeps_grids(op: &Op) -> bool {
    use Op::*;
    matches!(
        op,
        Reshape(_)
            | Transpose(_)
            | Slice(_)
            | Concat(_)
            | Pad(_)
            | Expand(_)
            | Gather(_)
            | GatherElements(_)
            | GatherNd(_)
            | ScatterElements(_)
            | ScatterNd(_)
            | Where(_)
            | Pool(_)
            | Dequantize(_)
            | AssumeGrid(_)
            | QMatMulToFloat(_)
            | Recurrent(_)
    )
}
