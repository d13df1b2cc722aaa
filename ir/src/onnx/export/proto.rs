//! Messages of the schema from tensors, types and attributes.

use crate::{Tensor, TensorType, onnx::tensor::dtype_code};
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

/// Elements of so few bits that several share a byte, the first in its lowest bits.
fn pack(elements: &[u8], bits: usize) -> Vec<u8> {
    let mask = (1u8 << bits) - 1;
    let byte = |part: &[u8]| part.iter().enumerate().fold(0, |b, (i, e)| b | (e & mask) << (i * bits));
    elements.chunks(8 / bits).map(byte).collect()
}

pub(in crate::onnx) fn tensor(name: &str, value: &Tensor) -> TensorProto {
    let raw_data = match value.dtype() {
        dtype if dtype.bits() < 8 => pack(value.bytes(), dtype.bits()),
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
