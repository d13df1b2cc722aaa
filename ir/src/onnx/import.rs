//! From a model and the shapes of its inputs to a concrete graph.

use super::{
    Dim, Eager, ImportError, InputInfo, Model, NodeError, Rest, UnsupportedOp,
    attribute::Attribute,
    body::{Body, NodeDef},
    ops::{self, Import},
    value::{Form, MapKey, Texts, ValueKind},
};
use crate::{
    DType, Graph, Op, OpError, Shape, Tensor, TensorType, ValueId,
    limits::{
        MAX_FOLDED_BYTES, MAX_FOLDED_MACS, MAX_FOLDED_TENSOR_BYTES, MAX_KNOWN_ELEMENTS, MAX_LOOP_NODES,
        MAX_LOOP_OPERATIONS, MAX_SPLICED_NODES, MAX_UNROLLED_NODES, MAX_UNROLLED_OPS,
    },
    memory::Bytes,
    ops::{AssumeGrid, Cast, PoolKind},
};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};
use typed_arena::Arena;

/// What a graph's symbolic dimensions are to be.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Bindings {
    /// Shapes of inputs, by name. They must agree with what the model declares.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Lengths of named dimensions. Those that a shape does not tell and that are not here: 1 for the first dimension
    /// of an input, which is the batch; an error for others.
    pub symbols: BTreeMap<String, usize>,
    /// Inputs that are to be constants of the graph, by name: values that do not change from run to run, such as axes
    /// and target shapes that a model takes as inputs.
    pub values: BTreeMap<String, Tensor>,
    /// Values that inputs have, by name. They stay inputs; but shapes, and what is computed at all, may depend on these
    /// values, so that the graph holds for no others.
    pub known: BTreeMap<String, Tensor>,
}

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

    pub(super) fn importer<'m>(
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

/// The concrete shapes of the inputs.
fn bind(inputs: &[InputInfo], bindings: &Bindings) -> Result<Vec<Shape>, ImportError> {
    let names = || inputs.iter().map(|i| format!("`{}`", i.name)).collect::<Vec<_>>().join(", ");
    let mut bound = bindings.shapes.keys().chain(bindings.values.keys()).chain(bindings.known.keys());
    if let Some(unknown) = bound.find(|&name| inputs.iter().all(|i| i.name != *name)) {
        return Err(ImportError::Input {
            input: unknown.clone(),
            reason: format!("the model has no input of this name; its inputs are {}", names()),
        });
    }
    let mut symbols = bindings.symbols.clone();
    let value_shapes =
        bindings.values.iter().chain(&bindings.known).map(|(name, t)| (name, t.shape().to_vec()));
    let shapes: BTreeMap<&String, Vec<usize>> =
        bindings.shapes.iter().map(|(name, dims)| (name, dims.clone())).chain(value_shapes).collect();
    for info in inputs {
        if let Some(given) = shapes.get(&info.name) {
            check_given(info, given, &mut symbols)?;
        }
    }
    for info in inputs {
        if let Some(Dim::Symbol(batch)) = info.dims.as_ref().and_then(|dims| dims.first()) {
            symbols.entry(batch.clone()).or_insert(1);
        }
    }
    inputs.iter().map(|info| concrete(info, shapes.get(&info.name), &symbols)).collect()
}

/// Checks a shape that the caller gives against the declared one, and learns what its symbols are.
fn check_given(
    info: &InputInfo,
    given: &[usize],
    symbols: &mut BTreeMap<String, usize>,
) -> Result<(), ImportError> {
    let Some(dims) = &info.dims else { return Ok(()) };
    let refuse = |reason: String| Err(ImportError::Input { input: info.name.clone(), reason });
    if dims.len() != given.len() {
        return refuse(format!(
            "shape {given:?} has {} dimensions, the model declares {}",
            given.len(),
            dims.len()
        ));
    }
    for (d, &n) in dims.iter().zip(given) {
        match d {
            Dim::Known(k) if *k != n => {
                return refuse(format!("shape {given:?} has {n} where the model declares {k}"));
            }
            Dim::Symbol(name) => match symbols.insert(name.clone(), n) {
                Some(other) if other != n => {
                    return refuse(format!("dimension {name} is {n} here, but {other} elsewhere"));
                }
                _ => {}
            },
            _ => {}
        }
    }
    Ok(())
}

fn concrete(
    info: &InputInfo,
    given: Option<&Vec<usize>>,
    symbols: &BTreeMap<String, usize>,
) -> Result<Shape, ImportError> {
    let refuse = |reason: String| ImportError::Input { input: info.name.clone(), reason };
    let advice = || format!("say what it is with --shape {}=...", info.name);
    let dims = match (given, &info.dims) {
        (Some(given), _) => given.clone(),
        (None, None) => return Err(refuse(format!("the model declares no shape; {}", advice()))),
        (None, Some(dims)) => dims
            .iter()
            .enumerate()
            .map(|(i, d)| match d {
                Dim::Known(n) => Ok(*n),
                Dim::Symbol(name) => symbols.get(name).copied().ok_or_else(|| name.clone()),
                Dim::Unknown if i == 0 => Ok(1),
                Dim::Unknown => Err("?".to_owned()),
            })
            .collect::<Result<Vec<usize>, String>>()
            .map_err(|open| {
                let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
                refuse(format!("dimension {open} of [{}] is not known; {}", dims.join(", "), advice()))
            })?,
    };
    Shape::new(dims).map_err(|e| refuse(e.to_string()))
}

/// What loops may take that run by their definition, all together.
pub(super) struct Work {
    nodes: Cell<u64>,
    operations: Cell<u64>,
}

impl Default for Work {
    fn default() -> Work {
        Work { nodes: Cell::new(MAX_LOOP_NODES), operations: Cell::new(MAX_LOOP_OPERATIONS) }
    }
}

impl Work {
    /// Takes from what is left.
    fn take(&self, nodes: u64, operations: u64) -> Result<(), NodeError> {
        match (self.nodes.get().checked_sub(nodes), self.operations.get().checked_sub(operations)) {
            (Some(nodes), Some(operations)) => {
                self.nodes.set(nodes);
                self.operations.set(operations);
                Ok(())
            }
            _ => Err(OpError::too_large(format!(
                "the rounds of loops that run by their definition compute more than {MAX_LOOP_NODES} nodes or \
                 {MAX_LOOP_OPERATIONS} operations: give them fewer rounds"
            ))
            .into()),
        }
    }
}

/// Takes bytes of results from what import may make.
fn take_bytes(budget: &mut usize, bytes: usize) -> Result<(), NodeError> {
    *budget = budget.checked_sub(bytes).ok_or_else(|| {
        OpError::too_large(format!(
            "its results take {}, where {} are left of what import may make: allow more with --max-memory \
             (`max_memory` of the library)",
            Bytes(bytes as u64),
            Bytes(*budget as u64)
        ))
    })?;
    Ok(())
}

/// About how many operations an op takes: a few thousand to be called, multiply-accumulates, and what takes the definition as
/// long: taps of windows, whose places are computed one by one, and elements read and made.
fn operations(op: &Op, operands: &[&TensorType], results: &[TensorType]) -> u64 {
    let elements = |ty: &TensorType| ty.shape.elements() as u64;
    let made = results.iter().map(elements).fold(0, u64::saturating_add);
    let read = operands.iter().map(|ty| elements(ty)).fold(0, u64::saturating_add);
    const CALL: u64 = 4096;
    const TAP: u64 = 16;
    let each = match op {
        Op::Pool(pool) => TAP.saturating_mul(pool.window.taps() as u64),
        Op::ArgMaxPool(pool) => TAP.saturating_mul(pool.window.taps() as u64),
        Op::Lrn(lrn) => TAP.saturating_mul(lrn.size as u64),
        Op::Resample(resample) => TAP.saturating_mul(resample.taps_of_each() as u64),
        Op::GridSample(_) => 4 * TAP,
        _ => 1,
    };
    let elements = made.saturating_mul(each).saturating_add(read).saturating_add(CALL);
    op.macs(operands, results).saturating_add(elements)
}

/// About how many operations it takes to read a node with its attributes.
fn reading(def: &NodeDef) -> u64 {
    const NODE: u64 = 1024;
    const ELEMENT: u64 = 64;
    let elements = def.attributes.values().map(|a| a.elements() as u64);
    NODE + ELEMENT * elements.sum::<u64>()
}

pub(super) struct Importer<'m> {
    pub(super) model: &'m Model,
    /// Nodes that stand for others.
    arena: &'m Arena<NodeDef>,
    pub(super) graph: Graph,
    /// What the names of the file stand for; initializers are added when they are first used.
    pub(super) values: BTreeMap<&'m str, ValueId>,
    /// The same of names that are no tensors.
    pub(super) structures: BTreeMap<&'m str, Held>,
    /// What numbers of texts stand for.
    pub(super) texts: Texts,
    /// What values are known to be that the graph computes nevertheless; small ones only.
    pub(super) known: BTreeMap<ValueId, Tensor>,
    used: BTreeSet<&'m str>,
    /// Bytes that folding may still make.
    pub(super) budget: usize,
    /// Whether this is a round of a loop that runs by its definition.
    pub(super) in_loop: bool,
    /// Whether everything is to be folded, whatever it takes: all inputs are constants.
    pub(super) is_eager: bool,
    /// What eager computations may still take, together with those around this one.
    pub(super) work: Rc<Work>,
    /// Nodes that were put in the place of others, and how often that was.
    pub(super) spliced: usize,
    /// Nodes of a loop that may become part of the graph.
    pub(super) max_unrolled: usize,
    /// Whether import has stopped, because loops in the graph have become too many ops.
    is_overgrown: bool,
    splices: usize,
    /// Nodes that need values which are not known, and what import says of them.
    pub(super) blocked: Vec<(&'m NodeDef, ImportError)>,
    /// Those, and all that depend on their results, in order.
    pub(super) deferred: Vec<&'m NodeDef>,
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
    pub(super) fn all_nodes(&mut self) -> Result<(), ImportError> {
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
    pub(super) fn value(&mut self, name: &'m str) -> Option<ValueId> {
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

    pub(super) fn finish(mut self) -> Result<(Graph, Vec<Form>), ImportError> {
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
pub(super) enum Held {
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
pub(super) fn is_structure(def: &NodeDef) -> bool {
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

/// A node on its way into the graph. Remembers what was read of it: what an import function did not ask for is an
/// error, never ignored.
pub(super) struct Node<'a, 'm> {
    def: &'m NodeDef,
    opset: i64,
    importer: &'a mut Importer<'m>,
    attributes: BTreeSet<&'static str>,
    operands: BTreeSet<usize>,
}

impl<'m> Node<'_, 'm> {
    fn check_all_read(&self, results: usize) -> Result<(), NodeError> {
        self.check_names_read()?;
        let extra = self.def.outputs.iter().enumerate().skip(results);
        match extra.into_iter().find(|(_, o)| self.is_used(o)) {
            Some((port, value)) => Err(NodeError::Result { port, value: value.clone() }),
            None => Ok(()),
        }
    }

    fn check_names_read(&self) -> Result<(), NodeError> {
        if let Some(name) = self.def.attributes.keys().find(|name| !self.attributes.contains(name.as_str())) {
            return Err(NodeError::attribute(
                name,
                format!("is not one that {} has at opset {}", self.def.op, self.opset),
            ));
        }
        let unread = |(slot, value): &(usize, &String)| !value.is_empty() && !self.operands.contains(slot);
        if let Some((slot, value)) = self.def.inputs.iter().enumerate().find(unread) {
            return Err(NodeError::ExtraOperand { slot, value: value.clone(), opset: self.opset });
        }
        Ok(())
    }

    fn is_used(&self, result: &str) -> bool {
        !result.is_empty() && self.importer.used.contains(result)
    }

    /// The version of the operator set.
    pub(super) fn opset(&self) -> i64 {
        self.opset
    }

    /// The node's name.
    pub(super) fn name(&self) -> &'m str {
        &self.def.name
    }

    /// Whether the node is of this op.
    pub(super) fn def_is(&self, op: &str) -> bool {
        self.def.op == op
    }

    /// Whether a result is wanted by anyone.
    pub(super) fn wants(&self, port: usize) -> bool {
        self.def.outputs.get(port).is_some_and(|o| self.is_used(o))
    }

    /// Number of results that the node names.
    pub(super) fn results(&self) -> usize {
        self.def.outputs.len()
    }

    // ---- operands

    fn operand_name(&mut self, slot: usize) -> Option<&'m str> {
        self.operands.insert(slot);
        self.def.inputs.get(slot).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// An operand that may be left out.
    pub(super) fn optional(&mut self, slot: usize) -> Option<ValueId> {
        let name = self.operand_name(slot)?;
        self.importer.value(name)
    }

    /// An operand that must be there.
    pub(super) fn operand(&mut self, slot: usize, role: &'static str) -> Result<ValueId, NodeError> {
        match self.held(slot) {
            Some(Held::Value(value)) => Ok(value),
            Some(_) => Err(OpError::dtype(format!("operand {slot} ({role}) is no tensor")).into()),
            None => Err(NodeError::MissingOperand { slot, role }),
        }
    }

    /// An operand of any kind that may be left out.
    pub(super) fn held(&mut self, slot: usize) -> Option<Held> {
        let name = self.operand_name(slot)?;
        match self.importer.structures.get(name) {
            Some(held) => Some(held.clone()),
            None => self.importer.value(name).map(Held::Value),
        }
    }

    /// The tensor of an operand, for ops that compute with values themselves each time the model runs.
    pub(super) fn by_value(&mut self, slot: usize, role: &'static str) -> Result<Tensor, NodeError> {
        let value = self.operand(slot, role)?;
        let name = self.operand_name(slot).unwrap_or_default();
        let known = self.importer.tensor_of(value).filter(|_| self.importer.is_eager);
        known.cloned().ok_or_else(|| NodeError::ByValue { slot, role, value: name.into() })
    }

    /// What numbers of texts stand for.
    pub(super) fn texts(&self) -> &Texts {
        &self.importer.texts
    }

    /// Number of operands that the node names.
    pub(super) fn operand_slots(&self) -> usize {
        self.def.inputs.len()
    }

    /// All operands of an op that takes any number.
    pub(super) fn operands(&mut self, role: &'static str) -> Result<Vec<ValueId>, NodeError> {
        (0..self.def.inputs.len().max(1)).map(|slot| self.operand(slot, role)).collect()
    }

    /// The tensor of an operand that decides over shapes, so must be known; `None` where it is left out.
    pub(super) fn known(&mut self, slot: usize, role: &'static str) -> Result<Option<Tensor>, NodeError> {
        let Some(name) = self.operand_name(slot) else { return Ok(None) };
        let value = self.operand(slot, role)?;
        match self.importer.tensor_of(value) {
            Some(t) => Ok(Some(t.clone())),
            None => Err(NodeError::NotConstant { slot, role, value: name.into() }),
        }
    }

    /// Like [`known`](Self::known), where the operand must be there.
    pub(super) fn required(&mut self, slot: usize, role: &'static str) -> Result<Tensor, NodeError> {
        self.known(slot, role)?.ok_or(NodeError::MissingOperand { slot, role })
    }

    /// A known operand of integers in a vector (or scalar): axes, shapes, pads.
    pub(super) fn known_ints(
        &mut self,
        slot: usize,
        role: &'static str,
    ) -> Result<Option<Vec<i64>>, NodeError> {
        let Some(t) = self.known(slot, role)? else { return Ok(None) };
        let ints =
            t.to_i64().filter(|_| matches!(t.dtype(), DType::S64 | DType::S32) && t.shape().rank() <= 1);
        match ints {
            Some(ints) => Ok(Some(ints)),
            None => Err(OpError::dtype(format!("{role} must be a vector of s64, got {}", t.ty())).into()),
        }
    }

    /// Integers that were an attribute before opset `since`, and are an operand from then on.
    pub(super) fn ints_by_opset(
        &mut self,
        name: &'static str,
        since: i64,
        slot: usize,
    ) -> Result<Option<Vec<i64>>, NodeError> {
        if self.opset >= since { self.known_ints(slot, name) } else { self.ints(name) }
    }

    /// The tensor of an operand, where it is known.
    pub(super) fn if_known(&mut self, slot: usize) -> Result<Option<Tensor>, NodeError> {
        match self.known(slot, "") {
            Err(NodeError::NotConstant { .. }) => Ok(None),
            other => other,
        }
    }

    /// Names of the operands; an empty one is left out.
    pub(super) fn operand_names(&mut self) -> Vec<&'m str> {
        self.operands.extend(0..self.def.inputs.len());
        self.def.inputs.iter().map(String::as_str).collect()
    }

    /// Whether there is no operand in a slot.
    pub(super) fn is_left_out(&mut self, slot: usize) -> bool {
        self.operand_name(slot).is_none()
    }

    /// Names of the results; an empty one is not wanted.
    pub(super) fn result_names(&self) -> Vec<&'m str> {
        self.def.outputs.iter().map(String::as_str).collect()
    }

    /// The values of all that the node and its graphs read.
    pub(super) fn all_known(&mut self) -> Result<BTreeMap<String, Tensor>, NodeError> {
        let def = self.def;
        let (mut known, mut largest) = (BTreeMap::new(), None);
        for name in def.reads() {
            let Some(value) = self.importer.value(name) else { continue };
            match self.importer.tensor_of(value) {
                Some(t) => _ = known.insert(name.to_owned(), t.clone()),
                None => {
                    let elements = self.ty(value).shape.elements();
                    largest = largest.max(Some((elements, name)));
                }
            }
        }
        match largest {
            None => Ok(known),
            Some((_, value)) => {
                let slot = def.inputs.iter().position(|i| i == value).unwrap_or(def.inputs.len());
                Err(NodeError::NotConstant { slot, role: "value", value: value.into() })
            }
        }
    }

    /// Whether all values are known, and computed at once.
    pub(super) fn is_eager(&self) -> bool {
        self.importer.is_eager
    }

    /// Nodes of a loop that may become part of the graph.
    pub(super) fn max_unrolled(&self) -> usize {
        self.importer.max_unrolled
    }

    /// Takes bytes of results that stay from what may be made.
    pub(super) fn take_bytes(&mut self, bytes: usize) -> Result<(), NodeError> {
        take_bytes(&mut self.importer.budget, bytes)
    }

    /// The results of a graph for these values of its inputs and of what it takes from around it, by definition.
    pub(super) fn evaluate(
        &self,
        body: &Body,
        mut values: BTreeMap<String, Tensor>,
    ) -> Result<Vec<Tensor>, NodeError> {
        // Ops that emit nothing cost something, too.
        values.extend(body.initializers.iter().map(|(name, t)| (name.clone(), t.clone())));
        let closed = Body {
            inputs: Vec::new(),
            outputs: body.outputs.clone(),
            initializers: values,
            nodes: body.nodes.clone(),
            captures: Vec::new(),
        };
        let part = self.importer.model.with(Vec::new(), closed);
        part.round(&self.importer.work, self.importer.budget, &self.importer.texts).map_err(|e| match e {
            ImportError::Node { source, .. } => source,
            other => OpError::unsupported(other.to_string()).into(),
        })
    }

    /// Counts a round of a loop among what eager computations may take: its body may have no node.
    pub(super) fn count_round(&self) -> Result<(), NodeError> {
        self.importer.work.take(1, 0)
    }

    /// A beginning of names that occurs nowhere else.
    pub(super) fn splice_prefix(&mut self) -> String {
        self.importer.splices += 1;
        format!("{}.{}/", self.def.name, self.importer.splices)
    }

    /// The shape of a value, by its name.
    pub(super) fn shape_of(&self, name: &str) -> Result<Shape, NodeError> {
        let stored = || self.importer.model.body.initializers.get(name).map(|t| t.shape().clone());
        let shape = self.importer.values.get(name).map(|&v| self.shape(v)).or_else(stored);
        shape.ok_or_else(|| OpError::shape(format!("`{name}` is not there")).into())
    }

    // ---- attributes

    fn attribute(&mut self, name: &'static str) -> Option<&'m Attribute> {
        self.attributes.insert(name);
        self.def.attributes.get(name)
    }

    fn mistyped<T>(name: &str, expected: &str, got: &Attribute) -> Result<T, NodeError> {
        Err(NodeError::attribute(name, format!("must be {expected}, not {}", got.kind())))
    }

    /// Lets an attribute be there that has no say in inference.
    pub(super) fn ignore(&mut self, names: &[&'static str]) {
        self.attributes.extend(names);
    }

    /// An integer, if it is there.
    pub(super) fn optional_int(&mut self, name: &'static str) -> Result<Option<i64>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Int(i)) => Ok(Some(*i)),
            Some(other) => Self::mistyped(name, "an int", other),
        }
    }

    /// An integer with a default.
    pub(super) fn int(&mut self, name: &'static str, default: i64) -> Result<i64, NodeError> {
        Ok(self.optional_int(name)?.unwrap_or(default))
    }

    /// An integer that stands for true or false.
    pub(super) fn flag(&mut self, name: &'static str, default: bool) -> Result<bool, NodeError> {
        match self.int(name, default.into())? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(NodeError::attribute(name, format!("must be 0 or 1, not {other}"))),
        }
    }

    /// A float, if it is there.
    pub(super) fn optional_float(&mut self, name: &'static str) -> Result<Option<f32>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Float(f)) => Ok(Some(*f)),
            Some(other) => Self::mistyped(name, "a float", other),
        }
    }

    /// A float with a default; must be finite.
    pub(super) fn float(&mut self, name: &'static str, default: f32) -> Result<f32, NodeError> {
        let value = self.optional_float(name)?.unwrap_or(default);
        if value.is_finite() { Ok(value) } else { Err(NodeError::attribute(name, format!("is {value}"))) }
    }

    /// A string with a default.
    pub(super) fn string(&mut self, name: &'static str, default: &'static str) -> Result<&'m str, NodeError> {
        match self.attribute(name) {
            None => Ok(default),
            Some(Attribute::String(s)) => {
                std::str::from_utf8(s).map_err(|_| NodeError::attribute(name, "is not UTF-8"))
            }
            Some(other) => Self::mistyped(name, "a string", other),
        }
    }

    /// A list of integers, if it is there.
    pub(super) fn ints(&mut self, name: &'static str) -> Result<Option<Vec<i64>>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Ints(v)) => Ok(Some(v.clone())),
            Some(other) => Self::mistyped(name, "a list of ints", other),
        }
    }

    /// A list of floats, if it is there.
    pub(super) fn floats(&mut self, name: &'static str) -> Result<Option<Vec<f32>>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Floats(v)) => Ok(Some(v.clone())),
            Some(other) => Self::mistyped(name, "a list of floats", other),
        }
    }

    /// A graph.
    pub(super) fn graph_attribute(&mut self, name: &'static str) -> Result<&'m Body, NodeError> {
        match self.attribute(name) {
            None => Err(NodeError::attribute(name, "is missing")),
            Some(Attribute::Graph(body)) => Ok(body),
            Some(other) => Self::mistyped(name, "a graph", other),
        }
    }

    /// A graph, if it is there.
    pub(super) fn optional_graph(&mut self, name: &'static str) -> Result<Option<&'m Body>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(_) => self.graph_attribute(name).map(Some),
        }
    }

    /// A list of strings, if it is there.
    pub(super) fn strings(&mut self, name: &'static str) -> Result<Option<Vec<String>>, NodeError> {
        let given = match self.attribute(name) {
            None => return Ok(None),
            Some(Attribute::Strings(given)) => given,
            Some(other) => return Self::mistyped(name, "a list of strings", other),
        };
        let text = |s: &Vec<u8>| String::from_utf8(s.clone());
        let strings = given.iter().map(text).collect::<Result<_, _>>();
        strings.map(Some).map_err(|_| NodeError::attribute(name, "is not UTF-8"))
    }

    /// A tensor, if it is there.
    pub(super) fn tensor(&mut self, name: &'static str) -> Result<Option<Tensor>, NodeError> {
        match self.attribute(name) {
            None => Ok(None),
            Some(Attribute::Tensor(t)) => Ok(Some(t.clone())),
            Some(other) => Self::mistyped(name, "a tensor", other),
        }
    }

    // ---- types

    /// The type of a value.
    pub(super) fn ty(&self, value: ValueId) -> &TensorType {
        self.importer.graph.ty(value)
    }

    /// The shape of a value.
    pub(super) fn shape(&self, value: ValueId) -> Shape {
        self.ty(value).shape.clone()
    }

    /// The tensor of a value that is a constant.
    pub(super) fn constant_value(&self, value: ValueId) -> Option<&Tensor> {
        self.importer.graph.constant_value(value)
    }

    /// The graph so far.
    pub(super) fn graph(&self) -> &Graph {
        &self.importer.graph
    }

    /// The name of the node behind a value.
    pub(super) fn name_of(&self, value: ValueId) -> String {
        self.importer.graph.node(value.node).name.clone()
    }

    // ---- results

    /// Adds an op under the node's own name.
    pub(super) fn emit(&mut self, op: impl Into<Op>, operands: &[ValueId]) -> Result<ValueId, NodeError> {
        self.importer.emit_one(self.name(), op.into(), operands)
    }

    /// Adds an op of several results under the node's own name.
    pub(super) fn emit_all(
        &mut self,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<Vec<ValueId>, NodeError> {
        self.importer.emit(self.name(), op.into(), operands)
    }

    /// Adds an op of `N` results that helps to express the node.
    pub(super) fn emit_parts<const N: usize>(
        &mut self,
        part: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<[ValueId; N], NodeError> {
        let op = op.into();
        let mnemonic = op.mnemonic();
        let results = self.importer.emit(&format!("{}_{part}", self.name()), op, operands)?;
        let count = |all: Vec<ValueId>| OpError::unsupported(format!("{mnemonic} has {} results", all.len()));
        results.try_into().map_err(|all| count(all).into())
    }

    /// Adds an op that helps to express the node.
    pub(super) fn emit_part(
        &mut self,
        part: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit_one(&format!("{}_{part}", self.name()), op.into(), operands)
    }

    /// Adds an op under a name of its own.
    pub(super) fn emit_named(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit_one(name, op.into(), operands)
    }

    /// Adds a constant under the node's own name.
    pub(super) fn constant(&mut self, value: Tensor) -> ValueId {
        self.importer.graph.constant(self.name(), value)
    }

    /// Adds a constant that helps to express the node.
    pub(super) fn constant_part(&mut self, part: &str, value: Tensor) -> ValueId {
        self.importer.graph.constant(&format!("{}_{part}", self.name()), value)
    }

    /// Adds a constant that an import function computed from others, or a vector that helps to express the node. Takes
    /// its bytes from what folding may make.
    pub(super) fn computed(
        &mut self,
        part: &str,
        ty: &TensorType,
        make: impl FnOnce() -> Result<Tensor, OpError>,
    ) -> Result<ValueId, NodeError> {
        take_bytes(&mut self.importer.budget, ty.bytes())?;
        Ok(self.constant_part(part, make()?))
    }

    /// The constant behind `value` as integers of a grid, under the name that the plain one has.
    pub(super) fn quantized_constant(
        &mut self,
        value: ValueId,
        ty: TensorType,
    ) -> Result<Option<ValueId>, NodeError> {
        let graph = &mut self.importer.graph;
        let Some(tensor) = graph.constant_value(value).cloned() else { return Ok(None) };
        let name = graph.node(value.node).name.clone();
        let quantized = graph.quantized_constant(&name, tensor, ty)?;
        if name != graph.node(quantized.node).name {
            // The plain constant is mostly not used by anything else, and then goes.
            graph.rename(value.node, &format!("{name}_plain"));
            graph.rename(quantized.node, &name);
        }
        Ok(Some(quantized))
    }
}
