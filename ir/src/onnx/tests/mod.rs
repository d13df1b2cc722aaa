//! Models built in code: what import makes of them, and what it refuses.

mod contrib;
mod control;
mod errors;
mod export;
mod external;
mod hostile;
mod index;
mod networks;
mod ops;
mod quantized;

use super::{Bindings, Model, export::proto::*};
use crate::{DType, Element, Graph, Shape, Tensor, TensorType, interpreter};
use onnx_protobuf::{AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto};

/// The least message of a node.
fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: format!("{}_node", outputs[0]),
        input: inputs.iter().map(|&s| s.into()).collect(),
        output: outputs.iter().map(|&s| s.into()).collect(),
        ..Default::default()
    }
}

trait WithAttribute {
    fn with(self, attribute: AttributeProto) -> Self;
}

impl WithAttribute for NodeProto {
    fn with(mut self, attribute: AttributeProto) -> NodeProto {
        self.attribute.push(attribute);
        self
    }
}

/// A list attribute that may hold negative numbers.
fn list(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { ints: values.to_vec(), ..ints(name, []) }
}

fn of<T: Element>(dims: &[usize], elements: &[T]) -> Tensor {
    Tensor::from_vec(Shape::new(dims).unwrap(), elements.to_vec()).unwrap()
}

/// 0, 1, 2… in f32.
fn iota(dims: &[usize]) -> Tensor {
    let n = dims.iter().product::<usize>();
    of(dims, &(0..n).map(|i| i as f32).collect::<Vec<_>>())
}

fn i64s(values: &[i64]) -> Tensor {
    of(&[values.len()], values)
}

/// A model in parts.
#[derive(Clone)]
struct Draft {
    opset: i64,
    /// Whether it says that it uses ONNX Runtime's domain.
    uses_microsoft: bool,
    nodes: Vec<NodeProto>,
    inputs: Vec<(String, TensorType)>,
    constants: Vec<(String, Tensor)>,
    outputs: Vec<String>,
}

impl Draft {
    /// A model of these nodes whose one result is `y`.
    fn new(opset: i64, nodes: impl IntoIterator<Item = NodeProto>) -> Draft {
        let nodes = nodes.into_iter().collect();
        Draft {
            opset,
            uses_microsoft: false,
            nodes,
            inputs: vec![],
            constants: vec![],
            outputs: vec!["y".into()],
        }
    }

    fn input(self, name: &str, dims: &[usize]) -> Draft {
        self.input_of(name, DType::F32, dims)
    }

    fn input_of(mut self, name: &str, dtype: DType, dims: &[usize]) -> Draft {
        self.inputs.push((name.into(), TensorType::new(dtype, Shape::new(dims).unwrap())));
        self
    }

    fn constant(mut self, name: &str, value: Tensor) -> Draft {
        self.constants.push((name.into(), value));
        self
    }

    fn outputs(mut self, names: &[&str]) -> Draft {
        self.outputs = names.iter().map(|&s| s.into()).collect();
        self
    }

    fn graph(&self) -> GraphProto {
        GraphProto {
            name: "test".into(),
            node: self.nodes.clone(),
            initializer: self.constants.iter().map(|(n, t)| tensor(n, t)).collect(),
            input: self.inputs.iter().map(|(n, ty)| value_info(n, ty, None)).collect(),
            output: self
                .outputs
                .iter()
                .map(|name| onnx_protobuf::ValueInfoProto { name: name.clone(), ..Default::default() })
                .collect(),
            ..Default::default()
        }
    }

    /// The same with the import of ONNX Runtime's domain.
    fn with_microsoft(self) -> Draft {
        Draft { uses_microsoft: true, ..self }
    }

    fn domains(&self) -> Vec<OperatorSetIdProto> {
        let own = OperatorSetIdProto { version: self.opset, ..Default::default() };
        let microsoft =
            OperatorSetIdProto { domain: "com.microsoft".into(), version: 1, ..Default::default() };
        [own].into_iter().chain(self.uses_microsoft.then_some(microsoft)).collect()
    }

    fn proto(&self) -> ModelProto {
        ModelProto {
            ir_version: 8,
            opset_import: self.domains(),
            graph: Some(self.graph()).into(),
            ..Default::default()
        }
    }

    fn import(&self) -> Result<Graph, String> {
        import(&self.proto())
    }

    /// The results for these inputs.
    fn run(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        interpreter::run(&self.import().unwrap(), inputs).unwrap()
    }

    /// The one result, in f32, for f32 inputs.
    fn floats(&self, inputs: &[Tensor]) -> Vec<f32> {
        self.run(inputs)[0].as_slice::<f32>().unwrap().to_vec()
    }

    /// The error, which must name `node` and contain `word`.
    #[track_caller]
    fn refused(&self, word: &str) {
        refused(&self.proto(), word);
    }
}

fn import(proto: &ModelProto) -> Result<Graph, String> {
    let bytes = proto.write_to_bytes().unwrap();
    Model::parse(bytes).and_then(|m| m.graph(&Bindings::default())).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(proto: &ModelProto, word: &str) {
    match import(proto) {
        Ok(g) => panic!("accepted: {g:?}"),
        Err(e) => assert!(e.contains(word), "{e:?} does not say {word:?}"),
    }
}
