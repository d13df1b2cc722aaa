//! Stored tensors: initializers and tensor attributes.

use super::{ImportError, external::ExternalFiles, value::TextTable};
use crate::{
    DType, Element, Shape, Tensor,
    limits::{MAX_DENSE_BYTES, MAX_MODEL_BYTES},
};
use bytes::Bytes;
use half::{bf16, f16};
use onnx_protobuf::{SparseTensorProto, TensorProto, tensor_proto::DataLocation};
use std::{fs, path::Path};

/// The element type behind an ONNX `data_type`.
pub(super) fn dtype(code: i32) -> Result<DType, String> {
    Ok(match code {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::S8,
        4 => DType::U16,
        5 => DType::S16,
        6 => DType::S32,
        7 => DType::S64,
        8 => DType::Str,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        21 => DType::U4,
        17 => DType::F8E4M3Fn,
        18 => DType::F8E4M3Fnuz,
        19 => DType::F8E5M2,
        20 => DType::F8E5M2Fnuz,
        22 => DType::S4,
        23 => DType::F4E2M1,
        24 => DType::F8E8M0,
        25 => DType::U2,
        26 => DType::S2,
        0 => return Err("its element type is undefined".into()),
        _ => {
            let name = match code {
                14 => "complex64",
                15 => "complex128",
                _ => return Err(format!("element type {code} does not exist")),
            };
            return Err(format!("element type {name} is not supported"));
        }
    })
}

/// The element type of this name, as Cast spelled it before opset 6.
pub(super) fn dtype_of_name(name: &str) -> Option<DType> {
    Some(match name {
        "FLOAT" => DType::F32,
        "UINT8" => DType::U8,
        "INT8" => DType::S8,
        "UINT16" => DType::U16,
        "INT16" => DType::S16,
        "INT32" => DType::S32,
        "INT64" => DType::S64,
        "STRING" => DType::Str,
        "BOOL" => DType::Bool,
        "FLOAT16" => DType::F16,
        "DOUBLE" => DType::F64,
        "UINT32" => DType::U32,
        "UINT64" => DType::U64,
        _ => return None,
    })
}

/// The ONNX `data_type` of an element type.
pub(super) const fn dtype_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::S8 => 3,
        DType::U16 => 4,
        DType::S16 => 5,
        DType::S32 => 6,
        DType::S64 => 7,
        DType::Str => 8,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::F64 => 11,
        DType::U32 => 12,
        DType::U64 => 13,
        DType::BF16 => 16,
        DType::U4 => 21,
        DType::F8E4M3Fn => 17,
        DType::F8E4M3Fnuz => 18,
        DType::F8E5M2 => 19,
        DType::F8E5M2Fnuz => 20,
        DType::S4 => 22,
        DType::F4E2M1 => 23,
        DType::F8E8M0 => 24,
        DType::U2 => 25,
        DType::S2 => 26,
    }
}

/// A shape from the dimensions of a file.
pub(super) fn shape(dims: &[i64]) -> Result<Shape, String> {
    let dims = dims
        .iter()
        .map(|&d| usize::try_from(d).map_err(|_| format!("dimension {d} is negative")))
        .collect::<Result<Vec<_>, _>>()?;
    Shape::new(dims).map_err(|e| e.to_string())
}

/// How many elements share a byte of a file; 1 where they take whole bytes.
fn per_byte(dtype: DType) -> usize {
    (8 / dtype.bits()).max(1)
}

/// Bytes that a tensor takes in a file.
fn stored_bytes(dtype: DType, shape: &Shape) -> usize {
    (shape.elements() * dtype.size()).div_ceil(per_byte(dtype))
}

/// Bytes that the elements of `t` take in a file.
pub(super) fn stored_length(t: &TensorProto) -> Result<usize, String> {
    let (dtype, shape) = (dtype(t.data_type)?, shape(&t.dims)?);
    crate::TensorType::new(dtype, shape.clone()).check_size().map_err(|e| e.to_string())?;
    Ok(stored_bytes(dtype, &shape))
}

/// Unpacks elements that share bytes, the first in the lowest bits.
fn unpack(dtype: DType, packed: impl Iterator<Item = u8>, elements: usize) -> Vec<u8> {
    let bits = dtype.bits();
    let element = |byte: u8, i: usize| {
        let top = byte << (8 - bits * (i + 1));
        if dtype.is_signed() { ((top as i8) >> (8 - bits)) as u8 } else { top >> (8 - bits) }
    };
    packed.flat_map(|byte| (0..8 / bits).map(move |i| element(byte, i))).take(elements).collect()
}

/// A tensor over the bytes that a file holds for it.
fn from_stored(dtype: DType, shape: Shape, stored: Bytes) -> Result<Tensor, String> {
    let expected = stored_bytes(dtype, &shape);
    if stored.len() != expected {
        return Err(format!("{dtype}[{shape}] takes {expected} bytes, but {} are stored", stored.len()));
    }
    let memory = match dtype {
        _ if per_byte(dtype) > 1 => unpack(dtype, stored.iter().copied(), shape.elements()).into(),
        DType::Bool => stored.iter().map(|&b| u8::from(b != 0)).collect(),
        _ => stored,
    };
    Tensor::from_bytes(dtype, shape, memory).map_err(|e| e.to_string())
}

/// Narrows the 32- or 64-bit numbers that a typed field holds; all must be in the type's range.
fn narrowed<S, T>(shape: Shape, dtype: DType, stored: &[S]) -> Result<Tensor, String>
where
    S: Copy + std::fmt::Display,
    T: Element + TryFrom<S>,
{
    let elements = stored
        .iter()
        .map(|&v| T::try_from(v).map_err(|_| format!("{v} is not a value of {dtype}")))
        .collect::<Result<Vec<T>, _>>()?;
    Tensor::from_vec_as(dtype, shape, elements).map_err(|e| e.to_string())
}

/// A tensor whose elements are in one of the fields for numbers. The vectors are as long as the file made them.
fn from_typed(t: &mut TensorProto, dtype: DType, shape: Shape) -> Result<Tensor, String> {
    let fields = [
        ("float_data", t.float_data.len()),
        ("int32_data", t.int32_data.len()),
        ("int64_data", t.int64_data.len()),
        ("double_data", t.double_data.len()),
        ("uint64_data", t.uint64_data.len()),
        ("string_data", t.string_data.len()),
    ];
    let own = match dtype {
        DType::F32 => "float_data",
        DType::S64 => "int64_data",
        DType::F64 => "double_data",
        DType::U32 | DType::U64 => "uint64_data",
        _ => "int32_data",
    };
    if let Some((other, _)) = fields.iter().find(|(name, len)| *name != own && *len > 0) {
        return Err(format!("is of {dtype}, but has {other}"));
    }
    let expected = shape.elements().div_ceil(per_byte(dtype));
    let got = fields.iter().map(|(_, len)| len).sum::<usize>();
    if got != expected {
        return Err(format!("{dtype}[{shape}] takes {expected} numbers in {own}, but {got} are stored"));
    }
    let bits =
        |v: &i32| u16::try_from(*v).map_err(|_| format!("{v} is not the bit pattern of a 16-bit float"));
    let made = match dtype {
        DType::F32 => Tensor::from_vec(shape, std::mem::take(&mut t.float_data)),
        DType::F64 => Tensor::from_vec(shape, std::mem::take(&mut t.double_data)),
        DType::S32 => Tensor::from_vec(shape, std::mem::take(&mut t.int32_data)),
        DType::S64 => Tensor::from_vec(shape, std::mem::take(&mut t.int64_data)),
        DType::U64 => Tensor::from_vec(shape, std::mem::take(&mut t.uint64_data)),
        DType::U32 => return narrowed::<u64, u32>(shape, dtype, &t.uint64_data),
        DType::S8 => return narrowed::<i32, i8>(shape, dtype, &t.int32_data),
        DType::U8 => return narrowed::<i32, u8>(shape, dtype, &t.int32_data),
        DType::S16 => return narrowed::<i32, i16>(shape, dtype, &t.int32_data),
        DType::U16 => return narrowed::<i32, u16>(shape, dtype, &t.int32_data),
        DType::F16 => {
            let v: Result<Vec<f16>, _> = t.int32_data.iter().map(|v| bits(v).map(f16::from_bits)).collect();
            Tensor::from_vec(shape, v?)
        }
        DType::BF16 => {
            let v: Result<Vec<bf16>, _> = t.int32_data.iter().map(|v| bits(v).map(bf16::from_bits)).collect();
            Tensor::from_vec(shape, v?)
        }
        DType::Bool => {
            let v = t.int32_data.iter().map(|&v| u8::from(v != 0)).collect();
            Tensor::from_vec_as::<u8>(dtype, shape, v)
        }
        DType::F8E4M3Fn | DType::F8E4M3Fnuz | DType::F8E5M2 | DType::F8E5M2Fnuz | DType::F8E8M0 => {
            return narrowed::<i32, u8>(shape, dtype, &t.int32_data);
        }
        DType::Str => return Err("is of texts, but holds numbers".into()),
        DType::S4 | DType::U4 | DType::F4E2M1 | DType::S2 | DType::U2 => {
            let v = t.int32_data.iter().map(|v| {
                // Writers store a byte of several elements either as it is or sign-extended.
                u8::try_from(*v).or_else(|_| i8::try_from(*v).map(|b| b as u8))
            });
            let packed: Vec<u8> = v.collect::<Result<_, _>>().map_err(|_| {
                format!("int32_data holds more than a byte for {} of {dtype}", per_byte(dtype))
            })?;
            let n = shape.elements();
            Tensor::from_bytes(dtype, shape, unpack(dtype, packed.into_iter(), n).into())
        }
    };
    made.map_err(|e| e.to_string())
}

fn decode_here(t: &mut TensorProto, dtype: DType, shape: Shape) -> Result<Tensor, String> {
    if t.raw_data.is_empty() {
        return from_typed(t, dtype, shape);
    }
    let typed = [
        t.float_data.len(),
        t.int32_data.len(),
        t.int64_data.len(),
        t.double_data.len(),
        t.uint64_data.len(),
    ];
    if typed.iter().any(|&n| n > 0) || !t.string_data.is_empty() {
        return Err("has its elements twice: in raw_data and in a field for numbers".into());
    }
    from_stored(dtype, shape, std::mem::take(&mut t.raw_data).into())
}

/// The bytes of a file that holds a value.
pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>, ImportError> {
    let read = |source| ImportError::Read { path: path.into(), source };
    if fs::metadata(path).map_err(read)?.len() > MAX_MODEL_BYTES as u64 {
        return Err(ImportError::NotAModel(format!("it has more than {MAX_MODEL_BYTES} bytes")));
    }
    fs::read(path).map_err(read)
}

/// The numbers of texts.
fn numbered(t: &mut TensorProto, shape: Shape, texts: &mut TextTable) -> Result<Tensor, String> {
    let (expected, got) = (shape.elements(), t.string_data.len());
    if expected != got {
        return Err(format!("str[{shape}] takes {expected} texts, but {got} are stored"));
    }
    let number = |bytes: &Vec<u8>| match std::str::from_utf8(bytes) {
        Ok(text) => Ok(texts.number(text)),
        Err(_) => Err("has a text that is not UTF-8".to_owned()),
    };
    let numbers = t.string_data.iter().map(number).collect::<Result<Vec<i64>, String>>()?;
    Tensor::from_vec_as(DType::Str, shape, numbers).map_err(|e| e.to_string())
}

/// The tensor that `t` stores; its data is moved out, not copied. `what` names it in errors.
pub(super) fn decode(
    mut t: TensorProto,
    what: &str,
    files: &mut ExternalFiles,
    texts: &mut TextTable,
) -> Result<Tensor, ImportError> {
    let refuse = |reason: String| ImportError::Tensor { tensor: what.into(), reason };
    let dtype = dtype(t.data_type).map_err(refuse)?;
    let shape = shape(&t.dims).map_err(refuse)?;
    crate::TensorType::new(dtype, shape.clone()).check_size().map_err(|e| refuse(e.to_string()))?;
    if t.segment.is_some() {
        return Err(refuse("is stored in segments, which is not supported".into()));
    }
    if dtype == DType::Str {
        return numbered(&mut t, shape, texts).map_err(refuse);
    }
    match t.data_location.enum_value() {
        Ok(DataLocation::DEFAULT) => decode_here(&mut t, dtype, shape).map_err(refuse),
        Ok(DataLocation::EXTERNAL) => {
            let expected = stored_bytes(dtype, &shape);
            let external = |reason: String| ImportError::ExternalData { tensor: what.into(), reason };
            if !t.raw_data.is_empty() {
                return Err(external("has raw_data in the model file as well".into()));
            }
            let stored = files.read(&t.external_data, expected).map_err(external)?;
            from_stored(dtype, shape, stored).map_err(refuse)
        }
        Err(code) => Err(refuse(format!("data_location {code} does not exist"))),
    }
}

/// The dense form of a sparse tensor: zeros but for the values that it names.
pub(super) fn decode_sparse(
    mut sparse: SparseTensorProto,
    what: &str,
    files: &mut ExternalFiles,
    texts: &mut TextTable,
) -> Result<Tensor, ImportError> {
    let refuse = |reason: String| ImportError::Tensor { tensor: what.into(), reason };
    let dense = shape(&sparse.dims).map_err(refuse)?;
    let values = decode(sparse.values.take().unwrap_or_default(), what, files, texts)?;
    let indices = sparse.indices.take().unwrap_or_default();
    let indices = decode(indices, &format!("indices of {what}"), files, texts)?;
    densify(&dense, &values, &indices).map_err(refuse)
}

fn densify(dense: &Shape, values: &Tensor, indices: &Tensor) -> Result<Tensor, String> {
    let (count, size) = (values.shape().elements(), values.dtype().size());
    if values.shape().rank() != 1 {
        return Err(format!("sparse values must be a vector, got {}", values.ty()));
    }
    if dense.elements().saturating_mul(size) > MAX_DENSE_BYTES {
        return Err(format!("is sparse, and dense would take more than {MAX_DENSE_BYTES} bytes"));
    }
    let rank = dense.rank();
    let coordinates = match *indices.shape().dims() {
        [n] if n == count => 1,
        [n, r] if n == count && r == rank => rank,
        _ => {
            return Err(format!(
                "{count} sparse values of shape {dense:?} cannot have indices {}",
                indices.ty()
            ));
        }
    };
    let index =
        indices.as_slice::<i64>().map_err(|_| format!("sparse indices must be s64, got {}", indices.ty()))?;
    let strides = if coordinates == 1 { vec![1] } else { dense.strides() };
    let extents = if coordinates == 1 { vec![dense.elements()] } else { dense.to_vec() };
    let mut bytes = vec![0u8; dense.elements() * size];
    let mut next = 0;
    for (i, at) in index.chunks_exact(coordinates.max(1)).enumerate() {
        let mut flat = 0;
        for ((&c, &extent), stride) in at.iter().zip(&extents).zip(&strides) {
            let c = usize::try_from(c).ok().filter(|&c| c < extent);
            flat += stride * c.ok_or_else(|| format!("sparse index {at:?} is outside of shape {dense:?}"))?;
        }
        if flat < next {
            return Err("sparse indices are not in ascending order, or one stands twice".into());
        }
        next = flat + 1;
        bytes[flat * size..][..size].copy_from_slice(&values.bytes()[i * size..][..size]);
    }
    Tensor::from_bytes(values.dtype(), dense.clone(), bytes.into()).map_err(|e| e.to_string())
}
