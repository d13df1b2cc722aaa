//! From a float or fake-quant graph to an ONNX model.

mod ops;
pub(super) mod proto;

use crate::{Graph, Kind, NodeId, OpError, Stage, Tensor, TensorError, ValueId};
use onnx_protobuf::{AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto};
use std::collections::{BTreeMap, BTreeSet};

/// The operator set that exported models use: the first with quantization to 4 and 16 bits.
const OPSET: i64 = 21;

/// The file format that came with it.
const IR_VERSION: i64 = 10;

/// Why a graph cannot be exported.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// Integer ops and placements have no ONNX form.
    #[error("a graph at stage {0} has no ONNX form; export it at the fake-quant stage")]
    Stage(Stage),
    /// An op without an ONNX form.
    #[error("node `{node}` ({op}): {source}")]
    Node {
        /// The node's name.
        node: String,
        /// The op's mnemonic.
        op: String,
        /// The reason.
        source: OpError,
    },
    /// The model is larger than its format allows.
    #[error("the model cannot be written: {0}")]
    Encode(String),
}

/// How a model is written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExportOptions {
    /// Declares the first dimension of inputs and outputs under this name instead of by number. Right for graphs that
    /// treat each index of it alike.
    pub batch: Option<String>,
}

/// The ONNX model of a graph at [`Stage::Float`] or [`Stage::FakeQuant`], as the bytes of a file.
///
/// Fake-quant of a constant becomes its integers and a DequantizeLinear, fake-quant of other values a QuantizeLinear
/// and a DequantizeLinear: the form that ONNX Runtime and OpenVINO run on integers.
pub fn export(graph: &Graph) -> Result<Vec<u8>, ExportError> {
    export_with(graph, &ExportOptions::default())
}

/// Like [`export`], with options.
pub fn export_with(graph: &Graph, options: &ExportOptions) -> Result<Vec<u8>, ExportError> {
    if graph.stage > Stage::FakeQuant {
        return Err(ExportError::Stage(graph.stage));
    }
    let mut exporter = Exporter::new(graph, options.batch.as_deref());
    for id in graph.order() {
        exporter.node(id)?;
    }
    exporter.outputs();
    let model = ModelProto {
        ir_version: IR_VERSION,
        producer_name: "qcc".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        opset_import: vec![OperatorSetIdProto { version: OPSET, ..Default::default() }],
        graph: Some(exporter.proto).into(),
        ..Default::default()
    };
    model.write_to_bytes().map_err(|e| ExportError::Encode(e.to_string()))
}

struct Exporter<'g> {
    graph: &'g Graph,
    batch: Option<&'g str>,
    proto: GraphProto,
    /// The names of values in the file.
    names: BTreeMap<ValueId, String>,
    taken: BTreeSet<String>,
    /// Constants that have been written.
    stored: BTreeSet<NodeId>,
}

/// A name that is not taken: this one, or with the first free number behind it.
fn fresh(taken: &mut BTreeSet<String>, name: &str) -> String {
    let mut candidate = name.to_owned();
    let mut i = 1;
    while !taken.insert(candidate.clone()) {
        candidate = format!("{name}_{i}");
        i += 1;
    }
    candidate
}

impl<'g> Exporter<'g> {
    /// Inputs and outputs keep their names; other values get those of their nodes.
    fn new(graph: &'g Graph, batch: Option<&'g str>) -> Exporter<'g> {
        let mut taken = BTreeSet::new();
        let mut names = BTreeMap::new();
        for &id in graph.inputs() {
            names.insert(id.out(), fresh(&mut taken, &graph.node(id).name));
        }
        for output in graph.outputs() {
            let is_new = taken.insert(output.name.clone());
            if is_new && graph.op(output.value.node).is_some() {
                names.entry(output.value).or_insert_with(|| output.name.clone());
            }
        }
        let proto = GraphProto { name: graph.name.clone(), ..Default::default() };
        Exporter { graph, batch, proto, names, taken, stored: BTreeSet::new() }
    }

    fn node(&mut self, id: NodeId) -> Result<(), ExportError> {
        let node = self.graph.node(id);
        match node.kind() {
            Kind::Input => {
                let info = proto::value_info(&self.name(id.out()), &node.outputs()[0], self.batch);
                self.proto.input.push(info);
                Ok(())
            }
            // Written where it is used: fake-quantized weights are stored as integers only.
            Kind::Constant(_) => Ok(()),
            Kind::Op(op) => {
                let fail =
                    |source| ExportError::Node { node: node.name.clone(), op: op.mnemonic().into(), source };
                let result = ops::write(self, id, op).map_err(fail)?;
                self.settle(id, result);
                Ok(())
            }
        }
    }

    /// Lets the last node that was written have the name and the result of IR node `id`. Where none was written, the
    /// result has the name of the operand.
    fn settle(&mut self, id: NodeId, result: String) {
        let is_new = self.proto.node.last().is_some_and(|n| n.output.first() == Some(&result));
        if !is_new && !self.graph.is_output(id.out()) {
            self.names.insert(id.out(), result);
            return;
        }
        let name = self.name(id.out());
        let last = self.proto.node.last_mut().filter(|n| n.output.first() == Some(&result));
        match last {
            Some(last) => {
                last.output = vec![name];
                last.name = self.graph.node(id).name.clone();
            }
            None => self.identity(result, name),
        }
    }

    fn identity(&mut self, from: String, to: String) {
        self.proto.node.push(NodeProto {
            name: to.clone(),
            op_type: "Identity".into(),
            input: vec![from],
            output: vec![to],
            ..Default::default()
        });
    }

    /// Declares the results; those that are inputs, constants or stand twice are copied to their names.
    fn outputs(&mut self) {
        for output in self.graph.outputs() {
            let value = self.value(output.value);
            if value != output.name {
                self.identity(value, output.name.clone());
            }
            let ty = self.graph.ty(output.value);
            self.proto.output.push(proto::value_info(&output.name, ty, self.batch));
        }
    }

    /// The name of a value that is not a constant.
    fn name(&mut self, value: ValueId) -> String {
        let (graph, taken) = (self.graph, &mut self.taken);
        self.names.entry(value).or_insert_with(|| fresh(taken, &graph.node(value.node).name)).clone()
    }

    /// The name of a value as an operand; a constant is written when it is first used.
    fn value(&mut self, value: ValueId) -> String {
        let name = self.name(value);
        if let Some(tensor) = self.graph.constant_value(value)
            && self.stored.insert(value.node)
        {
            self.proto.initializer.push(proto::tensor(&name, tensor));
        }
        name
    }

    /// Writes a constant that is not in the graph.
    fn constant(&mut self, hint: &str, tensor: &Tensor) -> String {
        let name = fresh(&mut self.taken, hint);
        self.proto.initializer.push(proto::tensor(&name, tensor));
        name
    }

    /// Writes a vector of 64-bit integers.
    fn ints(&mut self, hint: &str, values: Vec<i64>) -> Result<String, TensorError> {
        let shape = crate::Shape::new([values.len()]).unwrap_or_default();
        Ok(self.constant(hint, &Tensor::from_vec(shape, values)?))
    }

    /// Writes a node and answers the name of its result.
    fn op(&mut self, hint: &str, op: &str, input: Vec<String>, attribute: Vec<AttributeProto>) -> String {
        let name = fresh(&mut self.taken, &format!("{hint}_{op}"));
        self.push(op, input, vec![name.clone()], attribute);
        name
    }

    /// Writes a node of two results and answers the name of the second one.
    fn op_of_two(
        &mut self,
        hint: &str,
        op: &str,
        input: Vec<String>,
        attribute: Vec<AttributeProto>,
    ) -> String {
        let [first, second] = [0, 1].map(|i| fresh(&mut self.taken, &format!("{hint}_{op}_{i}")));
        self.push(op, input, vec![first, second.clone()], attribute);
        second
    }

    fn push(&mut self, op: &str, input: Vec<String>, output: Vec<String>, attribute: Vec<AttributeProto>) {
        self.proto.node.push(NodeProto {
            name: output[0].clone(),
            op_type: op.into(),
            input,
            output,
            attribute,
            ..Default::default()
        });
    }
}
