//! Convolutions of integers that stay integers: what ONNX's ConvInteger computes before anything says what
//! the sums stand for. Zero points are taken off before, by other ops, so that they may be computed at run time.

use super::{Operator, Window, conv};
use crate::{DType, OpError, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// y = conv(x, w) of s32, channels first, wrapping; padding holds 0.
///
/// Operands: x `[N, C, spatial…]`; w `[out, in/groups, kernel…]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IntConv {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Number of groups that the channels are split into.
    pub groups: usize,
}

fn both_s32<'a>(operands: &[&'a TensorType]) -> Result<[&'a TensorType; 2], OpError> {
    match *operands {
        [a, b]
            if a.dtype == DType::S32 && b.dtype == DType::S32 && a.quant.is_none() && b.quant.is_none() =>
        {
            Ok([a, b])
        }
        [a, b] => Err(OpError::dtype(format!("takes plain s32, got {a} and {b}"))),
        _ => Err(OpError::Arity { expected: "2".into(), got: operands.len() }),
    }
}

impl Operator for IntConv {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x, w] = both_s32(operands)?;
        let y = conv::conv_shape(&x.shape, &w.shape, &self.window, self.groups, conv::Layout::ChannelsFirst)?;
        Ok(vec![TensorType::new(DType::S32, y)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let (x, w) = (operands[0].as_slice::<i32>()?, operands[1].as_slice::<i32>()?);
        let y = &results[0].shape;
        let mut sums = vec![0i32; y.elements()];
        conv::for_each_product(
            operands[0].shape(),
            operands[1].shape(),
            y,
            &self.window,
            self.groups,
            conv::Layout::ChannelsFirst,
            |y, xi, wi| {
                if let Some(xi) = xi {
                    sums[y] = sums[y].wrapping_add(x[xi].wrapping_mul(w[wi]));
                }
            },
        )?;
        Ok(vec![Tensor::from_vec(y.clone(), sums)?])
    }

    fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        conv::conv_macs(operands, results)
    }
}
