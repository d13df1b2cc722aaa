//! Model files taken apart for a file of another kind: tensors beside the message, where they can be mapped.

use super::{
    ImportError, Model,
    external::ExternalFiles,
    model::{parse, read_file},
    tensor,
};
use bytes::Bytes;
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, SparseTensorProto, StringStringEntryProto,
    TensorProto, tensor_proto::DataLocation,
};
use std::path::Path;

/// A model file, and the files beside it, as one message and tensors that it refers to as external data, by number.
#[derive(Clone)]
pub struct Packed {
    /// The model without its large tensors, in the wire format.
    pub message: Bytes,
    /// Elements of these tensors, as ONNX stores them.
    pub tensors: Vec<Bytes>,
}

/// Smaller tensors stay in the message.
const LARGE_BYTES: usize = 1024;

impl Packed {
    /// Reads a model file that may take this many bytes of memory. External data is read from the model's folder, and from
    /// nowhere else.
    ///
    /// # Errors
    /// Where the file or what is beside it cannot be read, or is no message of ONNX. Whether it is a model shows
    /// [`model`](Self::model).
    pub fn of_file(path: &Path, max_memory: u64) -> Result<Packed, ImportError> {
        let mut proto = parse(&read_file(path, max_memory)?)?;
        let mut out = Packing { files: ExternalFiles::beside(path, max_memory), tensors: Vec::new() };
        out.model(&mut proto)?;
        let message = proto.write_to_bytes().map_err(|e| ImportError::Parse(e.to_string()))?;
        Ok(Packed { message: message.into(), tensors: out.tensors })
    }

    /// The model.
    ///
    /// # Errors
    /// As [`Model::load`]; the parts need not be trusted.
    pub fn model(&self, max_memory: u64) -> Result<Model, ImportError> {
        Model::read(&self.message, &mut ExternalFiles::of(&self.tensors), max_memory)
    }
}

struct Packing {
    files: ExternalFiles,
    tensors: Vec<Bytes>,
}

impl Packing {
    fn model(&mut self, proto: &mut ModelProto) -> Result<(), ImportError> {
        if let Some(graph) = proto.graph.as_mut() {
            self.graph(graph)?;
        }
        for function in &mut proto.functions {
            self.nodes(&mut function.node)?;
            self.attributes(&mut function.attribute_proto)?;
        }
        Ok(())
    }

    fn graph(&mut self, graph: &mut GraphProto) -> Result<(), ImportError> {
        graph.initializer.iter_mut().try_for_each(|t| self.tensor(t))?;
        graph.sparse_initializer.iter_mut().try_for_each(|t| self.sparse(t))?;
        self.nodes(&mut graph.node)
    }

    fn nodes(&mut self, nodes: &mut [NodeProto]) -> Result<(), ImportError> {
        nodes.iter_mut().try_for_each(|n| self.attributes(&mut n.attribute))
    }

    fn attributes(&mut self, attributes: &mut [AttributeProto]) -> Result<(), ImportError> {
        // How deep messages nest was checked before they were parsed.
        for a in attributes {
            a.t.as_mut().into_iter().chain(&mut a.tensors).try_for_each(|t| self.tensor(t))?;
            a.sparse_tensor
                .as_mut()
                .into_iter()
                .chain(&mut a.sparse_tensors)
                .try_for_each(|t| self.sparse(t))?;
            a.g.as_mut().into_iter().chain(&mut a.graphs).try_for_each(|g| self.graph(g))?;
        }
        Ok(())
    }

    fn sparse(&mut self, sparse: &mut SparseTensorProto) -> Result<(), ImportError> {
        sparse.values.as_mut().into_iter().chain(sparse.indices.as_mut()).try_for_each(|t| self.tensor(t))
    }

    fn tensor(&mut self, t: &mut TensorProto) -> Result<(), ImportError> {
        let is_external = t.data_location.enum_value() == Ok(DataLocation::EXTERNAL);
        let bytes = match (is_external, t.raw_data.len()) {
            (true, 0) => {
                let failed = |reason: String| ImportError::ExternalData { tensor: t.name.clone(), reason };
                let length = tensor::stored_length(t).map_err(failed)?;
                self.files.read(&t.external_data, length).map_err(failed)?
            }
            // Both is an error of the model, which import names.
            (true, _) => return Ok(()),
            (false, 0..LARGE_BYTES) => return Ok(()),
            (false, _) => std::mem::take(&mut t.raw_data).into(),
        };
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: key.into(),
            value,
            ..StringStringEntryProto::default()
        };
        t.external_data =
            vec![entry("location", self.tensors.len().to_string()), entry("length", bytes.len().to_string())];
        t.data_location = DataLocation::EXTERNAL.into();
        self.tensors.push(bytes);
        Ok(())
    }
}
