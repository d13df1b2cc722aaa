//! A node as import functions see it: its operands, and the results that they make.

use super::{Held, Importer, budget::take_bytes};
use crate::onnx::{
    ImportError, NodeError,
    body::{Body, NodeDef},
    value::Texts,
};
use crate::{DType, Graph, Op, OpError, Shape, Tensor, TensorType, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// A node on its way into the graph. Remembers what was read of it: what an import function did not ask for is an
/// error, never ignored.
pub(in crate::onnx) struct Node<'a, 'm> {
    pub(super) def: &'m NodeDef,
    pub(super) opset: i64,
    pub(super) importer: &'a mut Importer<'m>,
    pub(super) attributes: BTreeSet<&'static str>,
    pub(super) operands: BTreeSet<usize>,
}

impl<'m> Node<'_, 'm> {
    pub(super) fn check_all_read(&self, results: usize) -> Result<(), NodeError> {
        self.check_names_read()?;
        let extra = self.def.outputs.iter().enumerate().skip(results);
        match extra.into_iter().find(|(_, o)| self.is_used(o)) {
            Some((port, value)) => Err(NodeError::Result { port, value: value.clone() }),
            None => Ok(()),
        }
    }

    pub(super) fn check_names_read(&self) -> Result<(), NodeError> {
        // Before opset 6 it told runtimes which operands they may write to.
        let says_nothing = |name: &str| name == "consumed_inputs" && self.opset < 6;
        let is_unread = |name: &&String| !self.attributes.contains(name.as_str()) && !says_nothing(name);
        if let Some(name) = self.def.attributes.keys().find(is_unread) {
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
    pub(in crate::onnx) fn opset(&self) -> i64 {
        self.opset
    }

    /// The node's name.
    pub(in crate::onnx) fn name(&self) -> &'m str {
        &self.def.name
    }

    /// Whether the node is of this op.
    pub(in crate::onnx) fn def_is(&self, op: &str) -> bool {
        self.def.op == op
    }

    /// Whether a result is wanted by anyone.
    pub(in crate::onnx) fn wants(&self, port: usize) -> bool {
        self.def.outputs.get(port).is_some_and(|o| self.is_used(o))
    }

    /// Number of results that the node names.
    pub(in crate::onnx) fn results(&self) -> usize {
        self.def.outputs.len()
    }

    // ---- operands

    fn operand_name(&mut self, slot: usize) -> Option<&'m str> {
        self.operands.insert(slot);
        self.def.inputs.get(slot).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// An operand that may be left out.
    pub(in crate::onnx) fn optional(&mut self, slot: usize) -> Option<ValueId> {
        let name = self.operand_name(slot)?;
        self.importer.value(name)
    }

    /// An operand that must be there.
    pub(in crate::onnx) fn operand(&mut self, slot: usize, role: &'static str) -> Result<ValueId, NodeError> {
        match self.held(slot) {
            Some(Held::Value(value)) => Ok(value),
            Some(_) => Err(OpError::dtype(format!("operand {slot} ({role}) is no tensor")).into()),
            None => Err(NodeError::MissingOperand { slot, role }),
        }
    }

    /// An operand of any kind that may be left out.
    pub(in crate::onnx) fn held(&mut self, slot: usize) -> Option<Held> {
        let name = self.operand_name(slot)?;
        match self.importer.structures.get(name) {
            Some(held) => Some(held.clone()),
            None => self.importer.value(name).map(Held::Value),
        }
    }

    /// The tensor of an operand, for ops that compute with values themselves each time the model runs.
    pub(in crate::onnx) fn by_value(&mut self, slot: usize, role: &'static str) -> Result<Tensor, NodeError> {
        let value = self.operand(slot, role)?;
        let name = self.operand_name(slot).unwrap_or_default();
        let known = self.importer.tensor_of(value).filter(|_| self.importer.is_eager);
        known.cloned().ok_or_else(|| NodeError::ByValue { slot, role, value: name.into() })
    }

    /// What numbers of texts stand for.
    pub(in crate::onnx) fn texts(&self) -> &Texts {
        &self.importer.texts
    }

    /// Number of operands that the node names.
    pub(in crate::onnx) fn operand_slots(&self) -> usize {
        self.def.inputs.len()
    }

    /// All operands of an op that takes any number.
    pub(in crate::onnx) fn operands(&mut self, role: &'static str) -> Result<Vec<ValueId>, NodeError> {
        (0..self.def.inputs.len().max(1)).map(|slot| self.operand(slot, role)).collect()
    }

    /// The tensor of an operand that decides over shapes, so must be known; `None` where it is left out.
    pub(in crate::onnx) fn known(
        &mut self,
        slot: usize,
        role: &'static str,
    ) -> Result<Option<Tensor>, NodeError> {
        let Some(name) = self.operand_name(slot) else { return Ok(None) };
        let value = self.operand(slot, role)?;
        match self.importer.tensor_of(value) {
            Some(t) => Ok(Some(t.clone())),
            None => Err(NodeError::NotConstant { slot, role, value: name.into() }),
        }
    }

    /// Like [`known`](Self::known), where the operand must be there.
    pub(in crate::onnx) fn required(&mut self, slot: usize, role: &'static str) -> Result<Tensor, NodeError> {
        self.known(slot, role)?.ok_or(NodeError::MissingOperand { slot, role })
    }

    /// A known operand of integers in a vector (or scalar): axes, shapes, pads.
    pub(in crate::onnx) fn known_ints(
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
    pub(in crate::onnx) fn ints_by_opset(
        &mut self,
        name: &'static str,
        since: i64,
        slot: usize,
    ) -> Result<Option<Vec<i64>>, NodeError> {
        if self.opset >= since { self.known_ints(slot, name) } else { self.ints(name) }
    }

    /// The tensor of an operand, where it is known.
    pub(in crate::onnx) fn if_known(&mut self, slot: usize) -> Result<Option<Tensor>, NodeError> {
        match self.known(slot, "") {
            Err(NodeError::NotConstant { .. }) => Ok(None),
            other => other,
        }
    }

    /// Names of the operands; an empty one is left out.
    pub(in crate::onnx) fn operand_names(&mut self) -> Vec<&'m str> {
        self.operands.extend(0..self.def.inputs.len());
        self.def.inputs.iter().map(String::as_str).collect()
    }

    /// Whether there is no operand in a slot.
    pub(in crate::onnx) fn is_left_out(&mut self, slot: usize) -> bool {
        self.operand_name(slot).is_none()
    }

    /// Names of the results; an empty one is not wanted.
    pub(in crate::onnx) fn result_names(&self) -> Vec<&'m str> {
        self.def.outputs.iter().map(String::as_str).collect()
    }

    /// The values of all that the node and its graphs read.
    pub(in crate::onnx) fn all_known(&mut self) -> Result<BTreeMap<String, Tensor>, NodeError> {
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
    pub(in crate::onnx) fn is_eager(&self) -> bool {
        self.importer.is_eager
    }

    /// Nodes of a loop that may become part of the graph.
    pub(in crate::onnx) fn max_unrolled(&self) -> usize {
        self.importer.max_unrolled
    }

    /// Takes bytes of results that stay from what may be made.
    pub(in crate::onnx) fn take_bytes(&mut self, bytes: usize) -> Result<(), NodeError> {
        take_bytes(&mut self.importer.budget, bytes)
    }

    /// The results of a graph for these values of its inputs and of what it takes from around it, by definition.
    pub(in crate::onnx) fn evaluate(
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
    pub(in crate::onnx) fn count_round(&self) -> Result<(), NodeError> {
        self.importer.work.take(1, 0)
    }

    /// A beginning of names that occurs nowhere else.
    pub(in crate::onnx) fn splice_prefix(&mut self) -> String {
        self.importer.splices += 1;
        format!("{}.{}/", self.def.name, self.importer.splices)
    }

    /// The shape of a value, by its name.
    pub(in crate::onnx) fn shape_of(&self, name: &str) -> Result<Shape, NodeError> {
        let stored = || self.importer.model.body.initializers.get(name).map(|t| t.shape().clone());
        let shape = self.importer.values.get(name).map(|&v| self.shape(v)).or_else(stored);
        shape.ok_or_else(|| OpError::shape(format!("`{name}` is not there")).into())
    }

    // ---- types

    /// The type of a value.
    pub(in crate::onnx) fn ty(&self, value: ValueId) -> &TensorType {
        self.importer.graph.ty(value)
    }

    /// The shape of a value.
    pub(in crate::onnx) fn shape(&self, value: ValueId) -> Shape {
        self.ty(value).shape.clone()
    }

    /// The tensor of a value that is a constant.
    pub(in crate::onnx) fn constant_value(&self, value: ValueId) -> Option<&Tensor> {
        self.importer.graph.constant_value(value)
    }

    /// The graph so far.
    pub(in crate::onnx) fn graph(&self) -> &Graph {
        &self.importer.graph
    }

    /// The name of the node behind a value.
    pub(in crate::onnx) fn name_of(&self, value: ValueId) -> String {
        self.importer.graph.node(value.node).name.clone()
    }

    // ---- results

    /// Adds an op under the node's own name.
    pub(in crate::onnx) fn emit(
        &mut self,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit_one(self.name(), op.into(), operands)
    }

    /// Adds an op of several results under the node's own name.
    pub(in crate::onnx) fn emit_all(
        &mut self,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<Vec<ValueId>, NodeError> {
        self.importer.emit(self.name(), op.into(), operands)
    }

    /// Adds an op of `N` results that helps to express the node.
    pub(in crate::onnx) fn emit_parts<const N: usize>(
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
    pub(in crate::onnx) fn emit_part(
        &mut self,
        part: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit_one(&format!("{}_{part}", self.name()), op.into(), operands)
    }

    /// Adds an op under a name of its own.
    pub(in crate::onnx) fn emit_named(
        &mut self,
        name: &str,
        op: impl Into<Op>,
        operands: &[ValueId],
    ) -> Result<ValueId, NodeError> {
        self.importer.emit_one(name, op.into(), operands)
    }

    /// Adds a constant under the node's own name.
    pub(in crate::onnx) fn constant(&mut self, value: Tensor) -> ValueId {
        self.importer.graph.constant(self.name(), value)
    }

    /// Adds a constant that helps to express the node.
    pub(in crate::onnx) fn constant_part(&mut self, part: &str, value: Tensor) -> ValueId {
        self.importer.graph.constant(&format!("{}_{part}", self.name()), value)
    }

    /// Adds a constant that an import function computed from others, or a vector that helps to express the node. Takes
    /// its bytes from what folding may make.
    pub(in crate::onnx) fn computed(
        &mut self,
        part: &str,
        ty: &TensorType,
        make: impl FnOnce() -> Result<Tensor, OpError>,
    ) -> Result<ValueId, NodeError> {
        take_bytes(&mut self.importer.budget, ty.bytes())?;
        Ok(self.constant_part(part, make()?))
    }

    /// The constant behind `value` as integers of a grid, under the name that the plain one has.
    pub(in crate::onnx) fn quantized_constant(
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
