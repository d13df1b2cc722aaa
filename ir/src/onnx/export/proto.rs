//! Messages of the schema from tensors, types and attributes.

use crate::{DType, Tensor, TensorType, onnx::tensor::dtype_code};
use onnx_protobuf::{
    AttributeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

pub(in crate::onnx) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), type_: AttributeType::INT.into(), i: value, ..Default::default() }
}

pub(in crate::onnx) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { name: name.into(), type_: AttributeType::FLOAT.into(), f: value, ..Default::default() }
}

pub(in crate::onnx) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        type_: AttributeType::STRING.into(),
        s: value.into(),
        ..Default::default()
    }
}

pub(in crate::onnx) fn ints(name: &str, values: impl IntoIterator<Item = usize>) -> AttributeProto {
    let ints = values.into_iter().map(|v| v as i64).collect();
    AttributeProto { name: name.into(), type_: AttributeType::INTS.into(), ints, ..Default::default() }
}

/// Two 4-bit elements a byte, the first in the low half.
fn pack(elements: &[u8]) -> Vec<u8> {
    elements.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).unwrap_or(&0) << 4)).collect()
}

pub(in crate::onnx) fn tensor(name: &str, value: &Tensor) -> TensorProto {
    let raw_data = match value.dtype() {
        DType::S4 | DType::U4 => pack(value.bytes()),
        _ => value.bytes().to_vec(),
    };
    TensorProto {
        name: name.into(),
        dims: value.shape().iter().map(|&d| d as i64).collect(),
        data_type: dtype_code(value.dtype()),
        raw_data,
        ..Default::default()
    }
}

/// `batch` names the first dimension, which then has no number.
pub(in crate::onnx) fn value_info(name: &str, ty: &TensorType, batch: Option<&str>) -> ValueInfoProto {
    let dim = |(axis, &d): (usize, &usize)| {
        let value = match batch {
            Some(symbol) if axis == 0 => dimension::Value::DimParam(symbol.into()),
            _ => dimension::Value::DimValue(d as i64),
        };
        Dimension { value: Some(value), ..Default::default() }
    };
    let shape =
        TensorShapeProto { dim: ty.shape.iter().enumerate().map(dim).collect(), ..Default::default() };
    let tensor = type_proto::Tensor {
        elem_type: dtype_code(ty.dtype),
        shape: Some(shape).into(),
        ..Default::default()
    };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.into(), type_: Some(ty).into(), ..Default::default() }
}
