//! Arrays from files of safetensors, the form in which Hugging Face keeps tensors by name.

use super::DataError;
use bytes::Bytes;
use qcc_ir::{DType, Shape, Tensor, limits::MAX_TENSOR_BYTES};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// Reads the arrays of a `.safetensors` file of any element type that a [`Tensor`] has, in the order of the file. They
/// share the memory that the file is read to.
///
/// # Errors
/// Where the file cannot be read, its header promises what is not there, or an element type or size cannot be used.
pub fn read_safetensors(path: &Path) -> Result<Vec<(String, Tensor)>, DataError> {
    let bytes = std::fs::read(path).map_err(|e| DataError::read(path, e))?;
    parse_safetensors(bytes.into(), &path.display().to_string())
}

fn parse_safetensors(bytes: Bytes, name: &str) -> Result<Vec<(String, Tensor)>, DataError> {
    let broken = |reason: String| DataError::Format { file: name.into(), reason };
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| broken(format!("not a file of safetensors, or damaged: {e}")))?;
    let mut views = file.tensors();
    // The library has them in no order. Those of no bytes are at the same place as the next one.
    views.sort_by(|(a, x), (b, y)| (x.data().as_ptr(), a).cmp(&(y.data().as_ptr(), b)));
    let tensor = |(key, view): &(String, safetensors::tensor::TensorView<'_>)| {
        let wrong = |reason: String| broken(format!("array `{key}`: {reason}"));
        let dtype = dtype_of(view.dtype())
            .ok_or_else(|| wrong(format!("element type {:?} cannot be used", view.dtype())))?;
        let shape = Shape::new(view.shape()).map_err(|e| wrong(e.to_string()))?;
        let data = view.data();
        if data.len() > MAX_TENSOR_BYTES {
            return Err(wrong(format!("{} bytes are above the limit of {MAX_TENSOR_BYTES}", data.len())));
        }
        let tensor = Tensor::from_bytes(dtype, shape, bytes.slice_ref(data));
        Ok((key.clone(), tensor.map_err(|e| wrong(e.to_string()))?))
    };
    views.iter().map(tensor).collect()
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::BOOL => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::S8,
        Dtype::U16 => DType::U16,
        Dtype::I16 => DType::S16,
        Dtype::U32 => DType::U32,
        Dtype::I32 => DType::S32,
        Dtype::U64 => DType::U64,
        Dtype::I64 => DType::S64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8_E4M3 => DType::F8E4M3Fn,
        Dtype::F8_E5M2 => DType::F8E5M2,
        Dtype::F8_E8M0 => DType::F8E8M0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize};

    fn file(arrays: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Bytes {
        let view = |(name, dtype, shape, data): &'_ (&str, Dtype, Vec<usize>, Vec<u8>)| {
            (name.to_string(), *dtype, shape.clone(), data.clone())
        };
        let owned: Vec<_> = arrays.iter().map(view).collect();
        let views: Vec<_> = owned
            .iter()
            .map(|(n, t, s, d)| (n.clone(), TensorView::new(*t, s.clone(), d).unwrap()))
            .collect();
        serialize(views, None).unwrap().into()
    }

    /// A file of this header and so many bytes of data.
    fn with_header(header: &str, data: usize) -> Bytes {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat().into()
    }

    #[test]
    fn arrays_come_with_their_types() {
        let floats: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let bytes = file(&[
            ("x", Dtype::F32, vec![1, 2], floats),
            ("labels", Dtype::I64, vec![1], 7i64.to_le_bytes().to_vec()),
            ("mask", Dtype::BOOL, vec![3], vec![1, 0, 1]),
        ]);
        let arrays = parse_safetensors(bytes, "f").unwrap();
        let find = |name: &str| &arrays.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(find("x").as_slice::<f32>().unwrap(), [1.5, -2.0]);
        assert_eq!((find("labels").to_i64().unwrap(), find("mask").dtype()), (vec![7], DType::Bool));
        assert_eq!(find("x").shape().dims(), [1, 2]);
    }

    #[test]
    fn headers_that_lie_are_errors() {
        let good = r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert_eq!(parse_safetensors(with_header(good, 8), "f").unwrap().len(), 1);
        let refused = |bytes: Bytes| match parse_safetensors(bytes, "f") {
            Err(DataError::Format { file, reason }) => assert!(file == "f" && !reason.is_empty()),
            other => panic!("{other:?}"),
        };
        for header in [
            r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}"#,
            r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}"#,
            r#"{"x":1}"#,
            "nonsense",
            "",
        ] {
            refused(with_header(header, 8));
        }
        for length in [u64::MAX, 1 << 40, 1000, 0] {
            refused([&length.to_le_bytes()[..], good.as_bytes(), &[0; 8]].concat().into());
        }
        let whole = with_header(good, 8);
        (0..whole.len()).for_each(|n| refused(whole.slice(..n)));
        // Bits of the header that flip are errors, or give other arrays.
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1 << bit;
                _ = parse_safetensors(bytes.into(), "f");
            }
        }
    }
}
