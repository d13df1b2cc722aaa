//! From a model and the shapes of its inputs to a concrete graph.

use super::{
    Dim, ImportError, InputInfo, Model, NodeError, UnsupportedOp,
    attribute::Attribute,
    model::NodeDef,
    ops::{self, Import},
};
use crate::{
    DType, Graph, Op, OpError, Shape, Tensor, TensorType, ValueId,
    limits::{MAX_FOLDED_BYTES, MAX_FOLDED_MACS, MAX_FOLDED_TENSOR_BYTES},
    ops::{AssumeGrid, Cast, PoolKind},
};
use std::collections::{BTreeMap, BTreeSet};

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
}

impl Model {
    /// The concrete graph, at [`Stage::Float`](crate::Stage::Float), for these input shapes.
    ///
    /// Everything that depends on shapes and weights only, such as the target of a Reshape, is computed on the way. An
    /// op that needs such a number and gets one from the model's inputs is an error.
    pub fn graph(&self, bindings: &Bindings) -> Result<Graph, ImportError> {
        self.check_ops()?;
        let shapes = bind(&self.inputs, bindings)?;
        let mut importer = Importer {
            model: self,
            graph: Graph::new(&self.name),
            values: BTreeMap::new(),
            used: self.used(),
            budget: MAX_FOLDED_BYTES.saturating_add(self.weight_bytes().saturating_mul(2)),
        };
        for (info, shape) in self.inputs.iter().zip(shapes) {
            importer.input(info, shape, bindings.values.get(&info.name))?;
        }
        for def in &self.nodes {
            importer.node(def)?;
        }
        importer.finish()
    }

    /// Fails with all ops that are not supported.
    fn check_ops(&self) -> Result<(), ImportError> {
        let is_known = |n: &&NodeDef| self.import_of(n).is_some();
        let unknown: Vec<UnsupportedOp> = self
            .nodes
            .iter()
            .filter(|n| !is_known(n))
            .map(|n| UnsupportedOp {
                node: n.name.clone(),
                op: n.op.clone(),
                domain: if n.domain.is_empty() { "ai.onnx".into() } else { n.domain.clone() },
                version: self.opsets.get(&n.domain).copied(),
            })
            .collect();
        if unknown.is_empty() { Ok(()) } else { Err(ImportError::UnsupportedOps(unknown)) }
    }

    /// How a node is imported, if its op is supported.
    fn import_of(&self, def: &NodeDef) -> Option<Import> {
        self.opsets.get(&def.domain).and_then(|&version| ops::find(&def.domain, &def.op, version))
    }

    /// Names of values that a node or a result of the graph uses.
    fn used(&self) -> BTreeSet<&str> {
        let by_nodes = self.nodes.iter().flat_map(|n| &n.inputs).map(String::as_str);
        by_nodes.chain(self.outputs()).collect()
    }
}

/// The concrete shapes of the inputs.
fn bind(inputs: &[InputInfo], bindings: &Bindings) -> Result<Vec<Shape>, ImportError> {
    let names = || inputs.iter().map(|i| format!("`{}`", i.name)).collect::<Vec<_>>().join(", ");
    let mut bound = bindings.shapes.keys().chain(bindings.values.keys());
    if let Some(unknown) = bound.find(|&name| inputs.iter().all(|i| i.name != *name)) {
        return Err(ImportError::Input {
            input: unknown.clone(),
            reason: format!("the model has no input of this name; its inputs are {}", names()),
        });
    }
    let mut symbols = bindings.symbols.clone();
    let value_shapes = bindings.values.iter().map(|(name, t)| (name, t.shape().to_vec()));
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

struct Importer<'m> {
    model: &'m Model,
    graph: Graph,
    /// What the names of the file stand for; initializers are added when they are first used.
    values: BTreeMap<&'m str, ValueId>,
    used: BTreeSet<&'m str>,
    /// Bytes that folding may still make.
    budget: usize,
}

impl<'m> Importer<'m> {
    fn input(
        &mut self,
        info: &'m InputInfo,
        shape: Shape,
        known: Option<&Tensor>,
    ) -> Result<(), ImportError> {
        let refuse = |reason: String| ImportError::Input { input: info.name.clone(), reason };
        let ty = TensorType::new(info.dtype, shape);
        let value = match known {
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
        self.values.insert(&info.name, value);
        Ok(())
    }

    fn node(&mut self, def: &'m NodeDef) -> Result<(), ImportError> {
        let fail = |source| ImportError::Node { node: def.name.clone(), op: def.op.clone(), source };
        let opset = self.model.opset();
        let Some(entry) = self.model.import_of(def) else {
            // `check_ops` has looked at every node.
            return Err(fail(OpError::unsupported("not supported").into()));
        };
        let mut node =
            Node { def, opset, importer: self, attributes: BTreeSet::new(), operands: BTreeSet::new() };
        let results = match entry {
            Import::One(import) => import(&mut node).map(|v| vec![v]),
            Import::Many(import) => import(&mut node),
        };
        let results = results.and_then(|r| node.check_all_read(&r).map(|()| r)).map_err(fail)?;
        for (name, value) in def.outputs.iter().zip(results) {
            if !name.is_empty() {
                self.values.insert(name, value);
            }
        }
        Ok(())
    }

    /// The value of this name, which validation has found to be defined.
    fn value(&mut self, name: &'m str) -> Option<ValueId> {
        if let Some(v) = self.values.get(name) {
            return Some(*v);
        }
        let initializer = self.model.initializers.get(name)?.clone();
        let value = self.graph.constant(name, initializer);
        self.values.insert(name, value);
        Some(value)
    }

    /// Adds an op, or what it computes where its operands are constants.
    fn emit(&mut self, name: &str, op: Op, operands: &[ValueId]) -> Result<ValueId, NodeError> {
        let operands = self.without_grids(name, &op, operands)?;
        if let Some(&first) = operands.first()
            && computes_in_f32(&op)
            && operands.iter().any(|&v| matches!(self.graph.ty(v).dtype, DType::F16 | DType::BF16))
        {
            return self.emit_in_f32(name, op, &operands, self.graph.ty(first).dtype);
        }
        match self.fold(name, &op, &operands)? {
            Some(constant) => Ok(constant),
            None => Ok(self.graph.add(name, op, &operands)?.out()),
        }
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
                self.emit(&format!("{name}_wide{slot}"), Cast { to: DType::F32 }.into(), &[v])
            }
            _ => Ok(v),
        };
        let wide: Vec<ValueId> = operands.iter().enumerate().map(widen).collect::<Result<_, _>>()?;
        let y = self.emit(&format!("{name}_wide"), op, &wide)?;
        self.emit(name, Cast { to: dtype }.into(), &[y])
    }

    /// ONNX computes with quantized integers as with any others. Only ops that move elements keep a grid; for the rest,
    /// operands become plain integers.
    fn without_grids(
        &mut self,
        name: &str,
        op: &Op,
        operands: &[ValueId],
    ) -> Result<Vec<ValueId>, NodeError> {
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.graph.ty(v)).collect();
        let keeps = types.iter().all(|t| t.quant.is_none()) || moves_grids(op) && op.infer(&types).is_ok();
        if keeps {
            return Ok(operands.to_vec());
        }
        let forget = |&v: &ValueId| match self.graph.ty(v).quant {
            None => Ok(v),
            Some(_) => self.emit(&format!("{name}_plain"), AssumeGrid { params: None }.into(), &[v]),
        };
        operands.iter().map(forget).collect()
    }

    fn fold(&mut self, name: &str, op: &Op, operands: &[ValueId]) -> Result<Option<ValueId>, NodeError> {
        // A weight is to stay the integers that the file has.
        if matches!(op, Op::Dequantize(_)) {
            return Ok(None);
        }
        let Some(tensors) =
            operands.iter().map(|&v| self.graph.constant_value(v)).collect::<Option<Vec<_>>>()
        else {
            return Ok(None);
        };
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.graph.ty(v)).collect();
        let results = op.infer(&types)?;
        let [result] = &results[..] else { return Ok(None) };
        let given: usize = types.iter().map(|t| t.bytes()).sum();
        let made = result.bytes();
        let costs_little =
            !matches!(op, Op::Pool(_) | Op::Lrn(_)) && op.macs(&types, &results) <= MAX_FOLDED_MACS;
        if made > MAX_FOLDED_TENSOR_BYTES.max(given) || made > self.budget || !costs_little {
            return Ok(None);
        }
        let mut values = match op.eval(&tensors, &types, &results) {
            Ok(values) => values,
            Err(OpError::Unsupported(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let Some(value) = values.pop() else { return Ok(None) };
        self.budget -= made;
        let ty = result.clone();
        Ok(Some(match ty.quant {
            None => self.graph.constant(name, value),
            Some(_) => self.graph.quantized_constant(name, value, ty)?,
        }))
    }

    fn finish(mut self) -> Result<Graph, ImportError> {
        for (name, declared) in &self.model.outputs {
            let Some(value) = self.value(name) else {
                return Err(ImportError::Structure(format!("output `{name}` of the graph is not computed")));
            };
            let dtype = self.graph.ty(value).dtype;
            if let Some(declared) = declared.filter(|&d| d != dtype) {
                return Err(ImportError::Structure(format!(
                    "output `{name}` of the graph is declared as {declared}, but is {dtype}"
                )));
            }
            self.graph.output(name, value);
        }
        self.graph.remove_dead();
        Ok(self.graph)
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

/// Ops that let integers keep their grid, where it fits.
fn moves_grids(op: &Op) -> bool {
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
            | Pool(_)
            | Dequantize(_)
            | AssumeGrid(_)
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
    fn check_all_read(&self, results: &[ValueId]) -> Result<(), NodeError> {
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
        let extra = self.def.outputs.iter().enumerate().skip(results.len());
        match extra.into_iter().find(|(_, o)| self.is_used(o)) {
            Some((port, value)) => Err(NodeError::Result { port, value: value.clone() }),
            None => Ok(()),
        }
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
        self.optional(slot).ok_or(NodeError::MissingOperand { slot, role })
    }

    /// All operands of an op that takes any number.
    pub(super) fn operands(&mut self, role: &'static str) -> Result<Vec<ValueId>, NodeError> {
        (0..self.def.inputs.len().max(1)).map(|slot| self.operand(slot, role)).collect()
    }

    /// The tensor of an operand that decides over shapes, so must be known; `None` where it is left out.
    pub(super) fn known(&mut self, slot: usize, role: &'static str) -> Result<Option<Tensor>, NodeError> {
        let Some(name) = self.operand_name(slot) else { return Ok(None) };
        let tensor = self.importer.value(name).and_then(|v| self.importer.graph.constant_value(v));
        match tensor {
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
        self.importer.emit(self.name(), op.into(), operands)
    }

    /// Adds an op that helps to express the node.
    pub(super) fn emit_part(
        &mut self,
        part: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit(&format!("{}_{part}", self.name()), op.into(), operands)
    }

    /// Adds an op under a name of its own.
    pub(super) fn emit_named(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit(name, op.into(), operands)
    }

    /// Adds a constant under the node's own name.
    pub(super) fn constant(&mut self, value: Tensor) -> ValueId {
        self.importer.graph.constant(self.name(), value)
    }

    /// Adds a constant that helps to express the node.
    pub(super) fn constant_part(&mut self, part: &str, value: Tensor) -> ValueId {
        self.importer.graph.constant(&format!("{}_{part}", self.name()), value)
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
