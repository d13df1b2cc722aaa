//! Arrays from and to NumPy's files.

use super::DataError;
use ndarray::{ArrayD, ArrayViewD, IxDyn, ShapeBuilder};
use ndarray_npy::{WriteNpyExt, npy::header::Header};
use qcc_ir::{DType, Element, Shape, Tensor, limits::MAX_TENSOR_BYTES};
use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Seek, Write},
    path::Path,
};

/// Reads one `.npy` file of any element type that a [`Tensor`] has; Fortran order is brought to row-major order.
pub fn read_npy(path: &Path) -> Result<Tensor, DataError> {
    let file = File::open(path).map_err(|e| DataError::read(path, e))?;
    parse_npy(BufReader::new(file), &path.display().to_string())
}

/// Reads the arrays of an `.npz` file, in the order of the file, without the suffix `.npy` of their names.
pub fn read_npz(path: &Path) -> Result<Vec<(String, Tensor)>, DataError> {
    let file = File::open(path).map_err(|e| DataError::read(path, e))?;
    parse_npz(BufReader::new(file), &path.display().to_string())
}

/// Like [`read_npz`], from anything that can be read and sought. `name` is for messages.
pub fn parse_npz(reader: impl Read + Seek, name: &str) -> Result<Vec<(String, Tensor)>, DataError> {
    let broken = |reason: String| DataError::Format { file: name.into(), reason };
    let mut zip = zip::ZipArchive::new(reader).map_err(|e| broken(format!("not an npz file: {e}")))?;
    let mut arrays = Vec::new();
    for i in 0..zip.len() {
        let entry = zip.by_index(i).map_err(|e| broken(e.to_string()))?;
        let entry_name = entry.name().to_owned();
        let key = entry_name.strip_suffix(".npy").unwrap_or(&entry_name).to_owned();
        arrays.push((key, parse_npy(entry, &format!("{name}/{entry_name}"))?));
    }
    Ok(arrays)
}

fn parse_npy(mut reader: impl Read, name: &str) -> Result<Tensor, DataError> {
    let broken = |reason: String| DataError::Format { file: name.into(), reason };
    let header = Header::from_reader(&mut reader).map_err(|e| broken(format!("not an npy file: {e}")))?;
    let descriptor = header.type_descriptor.as_string().map(String::as_str).unwrap_or("a record");
    let dtype = dtype_of(descriptor).ok_or_else(|| {
        broken(format!(
            "element type {descriptor} cannot be used; store little-endian floats, integers or bools"
        ))
    })?;
    let shape = Shape::new(header.shape).map_err(|e| broken(e.to_string()))?;
    let bytes = shape.elements() * dtype.size();
    if bytes > MAX_TENSOR_BYTES {
        return Err(broken(format!("{bytes} bytes are above the limit of {MAX_TENSOR_BYTES}")));
    }
    // Grows with what is really there: a header may promise more than the file holds.
    let mut data = Vec::new();
    reader.take(bytes as u64).read_to_end(&mut data).map_err(|e| broken(e.to_string()))?;
    if data.len() < bytes {
        return Err(broken(format!("cut off: {} of {bytes} bytes", data.len())));
    }
    let tensor = Tensor::from_bytes(dtype, shape, data.into()).map_err(|e| broken(e.to_string()))?;
    if header.layout.is_fortran() {
        row_major(&tensor).map_err(|e| broken(e.to_string()))
    } else {
        Ok(tensor)
    }
}

/// NumPy's spelling of the element types.
fn dtype_of(descriptor: &str) -> Option<DType> {
    Some(match descriptor {
        "<f4" => DType::F32,
        "<f2" => DType::F16,
        "<f8" => DType::F64,
        "|i1" => DType::S8,
        "|u1" => DType::U8,
        "<i2" => DType::S16,
        "<u2" => DType::U16,
        "<i4" => DType::S32,
        "<u4" => DType::U32,
        "<i8" => DType::S64,
        "<u8" => DType::U64,
        "|b1" => DType::Bool,
        _ => return None,
    })
}

/// Calls a generic function with the Rust type that holds a [`DType`].
macro_rules! with_element {
    ($dtype:expr, $f:ident $args:tt) => {
        match $dtype {
            DType::F32 => $f::<f32> $args,
            DType::F16 => $f::<half::f16> $args,
            DType::BF16 => $f::<half::bf16> $args,
            DType::F64 => $f::<f64> $args,
            DType::S8 | DType::S4 | DType::S2 => $f::<i8> $args,
            DType::S16 => $f::<i16> $args,
            DType::U16 => $f::<u16> $args,
            DType::S32 => $f::<i32> $args,
            DType::U32 => $f::<u32> $args,
            DType::S64 => $f::<i64> $args,
            DType::U64 => $f::<u64> $args,
            // All others are bytes.
            _ => $f::<u8> $args,
        }
    };
}

/// A tensor whose data is in column-major order, in row-major order.
fn row_major(tensor: &Tensor) -> Result<Tensor, qcc_ir::TensorError> {
    fn convert<T: Element>(t: &Tensor) -> Result<Tensor, qcc_ir::TensorError> {
        let slice = t.as_slice::<T>()?;
        let shape = IxDyn(t.shape());
        // The length was checked when the tensor was made, so the view cannot fail; if it did, data stays as it is.
        let elements = match ArrayViewD::from_shape(shape.f(), slice) {
            Ok(view) => view.iter().copied().collect(),
            Err(_) => slice.to_vec(),
        };
        Tensor::from_vec_as(t.dtype(), t.shape().clone(), elements)
    }
    with_element!(tensor.dtype(), convert(tensor))
}

/// Writes a tensor as `.npy`. The library's writer has no floats of 16 bits and fewer, so they are widened to
/// `f32`, which loses nothing.
pub fn write_npy(path: &Path, tensor: &Tensor) -> Result<(), DataError> {
    let fail = |reason: String| DataError::Write { file: path.display().to_string(), reason };
    let file = File::create(path).map_err(|e| fail(e.to_string()))?;
    let mut writer = BufWriter::new(file);
    let view = |e: qcc_ir::TensorError| fail(e.to_string());
    let wrote = match tensor.dtype() {
        DType::F32 => tensor.view::<f32>().map_err(view)?.write_npy(&mut writer),
        DType::F64 => tensor.view::<f64>().map_err(view)?.write_npy(&mut writer),
        small if small.is_small_float() || matches!(small, DType::F16 | DType::BF16) => {
            let wide = tensor.to_f32().unwrap_or_default();
            let array =
                ArrayD::from_shape_vec(IxDyn(tensor.shape()), wide).map_err(|e| fail(e.to_string()))?;
            array.write_npy(&mut writer)
        }
        DType::Bool => tensor.view::<u8>().map_err(view)?.mapv(|b| b != 0).write_npy(&mut writer),
        DType::S8 | DType::S4 | DType::S2 => tensor.view::<i8>().map_err(view)?.write_npy(&mut writer),
        DType::S16 => tensor.view::<i16>().map_err(view)?.write_npy(&mut writer),
        DType::U16 => tensor.view::<u16>().map_err(view)?.write_npy(&mut writer),
        DType::S32 => tensor.view::<i32>().map_err(view)?.write_npy(&mut writer),
        DType::U32 => tensor.view::<u32>().map_err(view)?.write_npy(&mut writer),
        DType::S64 => tensor.view::<i64>().map_err(view)?.write_npy(&mut writer),
        DType::U64 => tensor.view::<u64>().map_err(view)?.write_npy(&mut writer),
        // All others are bytes.
        _ => tensor.view::<u8>().map_err(view)?.write_npy(&mut writer),
    };
    wrote.map_err(|e| fail(e.to_string()))?;
    writer.flush().map_err(|e| fail(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    fn npy(array: &Array2<f32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        array.write_npy(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn fortran_order_becomes_row_major() {
        let a = array![[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let mut fortran = Array2::zeros((2, 3).f());
        fortran.assign(&a);
        let bytes = npy(&fortran);
        assert!(bytes.windows(4).any(|w| w == b"True"), "the file is in Fortran order");
        let t = parse_npy(&bytes[..], "a").unwrap();
        assert_eq!(t.as_slice::<f32>().unwrap(), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn a_header_that_promises_too_much_is_an_error_and_allocates_nothing() {
        let mut bytes = npy(&array![[1.0f32, 2.0]]);
        let at = bytes.windows(6).position(|w| w == b"(1, 2)").unwrap();
        bytes[at..at + 6].copy_from_slice(b"(1,99)");
        let cut = parse_npy(&bytes[..], "a").unwrap_err().to_string();
        assert!(cut.contains("cut off"), "{cut}");
        assert!(parse_npy(&b"nonsense"[..], "a").unwrap_err().to_string().contains("not an npy file"));
    }

    #[test]
    fn every_type_survives_a_file() {
        let dir = tempfile::tempdir().unwrap();
        for dtype in [DType::F32, DType::F64, DType::S8, DType::U8, DType::S64, DType::Bool, DType::U16] {
            let path = dir.path().join(format!("{dtype}.npy"));
            let t = Tensor::zeros(dtype, Shape::new([2, 3]).unwrap());
            write_npy(&path, &t).unwrap();
            assert_eq!(read_npy(&path).unwrap(), t, "{dtype}");
        }
    }
}
