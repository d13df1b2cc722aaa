//! Typed views of the caller's memory.

use ndarray::{Array, ArrayView, ArrayViewMut, Dimension};
use qcc_ir::{DType, Element, Tensor};
use smallvec::SmallVec;
use std::borrow::Cow;

/// Dimensions; on the stack for every usual rank.
type Dims = SmallVec<[usize; 8]>;

/// An input: a view of an array of any element type and rank. Made from ndarray's arrays and views, and from
/// [`Tensor`]s.
///
/// Memory in row-major order is used where it lies. Any other layout is copied once, when the view is made.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    pub(crate) dtype: DType,
    pub(crate) dims: Dims,
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl<'a, T: Element, D: Dimension> From<ArrayView<'a, T, D>> for TensorView<'a> {
    fn from(view: ArrayView<'a, T, D>) -> TensorView<'a> {
        let dims = view.shape().into();
        let bytes = match view.to_slice() {
            Some(slice) => Cow::Borrowed(bytemuck::cast_slice(slice)),
            None => Cow::Owned(view.iter().flat_map(|x| bytemuck::bytes_of(x).to_vec()).collect()),
        };
        TensorView { dtype: T::DTYPE, dims, bytes }
    }
}

impl<'a, T: Element, D: Dimension> From<&'a Array<T, D>> for TensorView<'a> {
    fn from(array: &'a Array<T, D>) -> TensorView<'a> {
        array.view().into()
    }
}

impl<'a> From<&'a Tensor> for TensorView<'a> {
    fn from(tensor: &'a Tensor) -> TensorView<'a> {
        TensorView {
            dtype: tensor.dtype(),
            dims: tensor.shape().dims().into(),
            bytes: Cow::Borrowed(tensor.bytes()),
        }
    }
}

/// An output: memory of the caller that a run writes.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    pub(crate) dtype: DType,
    pub(crate) dims: Dims,
    pub(crate) bytes: &'a mut [u8],
}

/// An output array that is not in row-major order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an output array must be contiguous and in row-major order")]
pub struct LayoutError;

impl<'a, T: Element, D: Dimension> TryFrom<ArrayViewMut<'a, T, D>> for TensorViewMut<'a> {
    type Error = LayoutError;
    fn try_from(view: ArrayViewMut<'a, T, D>) -> Result<TensorViewMut<'a>, LayoutError> {
        let dims = view.shape().into();
        let slice = view.into_slice().ok_or(LayoutError)?;
        Ok(TensorViewMut { dtype: T::DTYPE, dims, bytes: bytemuck::cast_slice_mut(slice) })
    }
}

impl<'a, T: Element, D: Dimension> TryFrom<&'a mut Array<T, D>> for TensorViewMut<'a> {
    type Error = LayoutError;
    fn try_from(array: &'a mut Array<T, D>) -> Result<TensorViewMut<'a>, LayoutError> {
        array.view_mut().try_into()
    }
}

/// Whether memory typed `given` can hold elements of `wanted`: types that share a Rust type pass for each other.
pub(crate) fn holds(given: DType, wanted: DType) -> bool {
    let rust = |d| match d {
        DType::S2 | DType::S4 => DType::S8,
        d if d.size() == 1 && d != DType::S8 => DType::U8,
        d => d,
    };
    given == wanted || rust(given) == rust(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn row_major_memory_is_borrowed_and_any_other_layout_is_put_in_order() {
        let a = array![[1u8, 2, 3], [4, 5, 6]];
        assert!(matches!(TensorView::from(&a).bytes, Cow::Borrowed(b) if b == [1, 2, 3, 4, 5, 6]));
        let t = TensorView::from(a.t());
        assert_eq!((&t.bytes[..], &t.dims[..]), (&[1, 4, 2, 5, 3, 6][..], &[3, 2][..]));
    }

    #[test]
    fn outputs_must_be_in_row_major_order() {
        let mut a = array![[1i64, 2], [3, 4]];
        assert!(TensorViewMut::try_from(&mut a).is_ok());
        assert_eq!(TensorViewMut::try_from(a.view_mut().reversed_axes()).unwrap_err(), LayoutError);
    }
}
