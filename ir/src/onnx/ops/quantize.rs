//! Between real numbers and integers.

use crate::{
    DType, OpError, QuantParams, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node, tensor},
    ops::{AssumeGrid, Dequantize, Quantize},
};

pub(super) fn quantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let zero_points = node.known(2, "y_zero_point")?;
    // Only the 8-bit floats, which are not supported, heed it.
    if node.opset() >= 19 {
        node.ignore(&["saturate"]);
    }
    let declared = match node.opset() >= 21 {
        true => node.optional_int("output_dtype")?.filter(|&code| code != 0),
        false => None,
    };
    if node.opset() >= 23 {
        precision(node, "precision")?;
    }
    let declared = declared
        .map(|code| tensor::dtype(i32::try_from(code).unwrap_or(-1)).map_err(OpError::unsupported))
        .transpose()?;
    let dtype = match (declared, &zero_points) {
        (Some(d), Some(z)) if d != z.dtype() => {
            let why = format!("is {d}, but y_zero_point is {}", z.ty());
            return Err(NodeError::attribute("output_dtype", why));
        }
        (Some(d), _) => d,
        (None, Some(z)) => z.dtype(),
        (None, None) => DType::U8,
    };
    let ty = TensorType::new(dtype, node.shape(x));
    let params = grid(node, &ty, zero_points)?;
    node.emit(Quantize { dtype, params }, &[x])
}

/// Weights become a constant with a grid; values that have the very grid stay; others get it.
pub(super) fn dequantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let zero_points = node.known(2, "x_zero_point")?;
    if node.opset() >= 23 {
        precision(node, "output_dtype")?;
    }
    let ty = TensorType::new(node.ty(x).dtype, node.shape(x));
    let params = grid(node, &ty, zero_points)?;
    if node.ty(x).quant.as_ref() == Some(&params) {
        return node.emit(Dequantize {}, &[x]);
    }
    let typed = TensorType::quantized(ty.dtype, ty.shape, params.clone())?;
    let codes = match node.quantized_constant(x, typed)? {
        Some(constant) => constant,
        None => node.emit_part("grid", AssumeGrid { params: Some(params) }, &[x])?,
    };
    node.emit(Dequantize {}, &[codes])
}

/// The type of the division or of the result; f32 is the only one there is.
fn precision(node: &mut Node<'_, '_>, name: &'static str) -> Result<(), NodeError> {
    match node.int(name, 0)? {
        0 | 1 => Ok(()),
        code => Err(OpError::unsupported(format!("{name} {code}: only f32 is supported")).into()),
    }
}

/// The grid of a tensor of type `ty` from operand 1 (scales) and these zero points.
fn grid(
    node: &mut Node<'_, '_>,
    ty: &TensorType,
    zero_points: Option<Tensor>,
) -> Result<QuantParams, NodeError> {
    let scale = node.required(1, "scale")?;
    let axis = if node.opset() >= 13 { node.int("axis", 1)? } else { 1 };
    let block = if node.opset() >= 21 { node.int("block_size", 0)? } else { 0 };
    if block < 0 {
        return Err(NodeError::attribute("block_size", format!("is {block}")));
    }
    let Ok(scales) = scale.as_slice::<f32>() else {
        return Err(OpError::unsupported(format!("scales must be f32, not {}", scale.ty())).into());
    };
    let zeros = match &zero_points {
        None => vec![0; scales.len()],
        Some(z) => {
            if z.dtype() != ty.dtype {
                let why = format!("the zero point is {}, but the integers are {}", z.ty(), ty.dtype);
                return Err(OpError::quant(why).into());
            }
            if z.shape().elements() != scales.len() || (z.shape() != scale.shape() && scales.len() != 1) {
                let why = format!("zero points {} beside scales {}", z.ty(), scale.ty());
                return Err(OpError::quant(why).into());
            }
            z.to_i64().unwrap_or_default().into_iter().map(|z| i32::try_from(z).unwrap_or(i32::MAX)).collect()
        }
    };
    let checked_axis = || {
        let rank = ty.shape.rank();
        ty.shape
            .axis(axis)
            .ok_or_else(|| NodeError::attribute("axis", format!("is {axis}, for a tensor of rank {rank}")))
    };
    if block > 0 || scale.shape().rank() > 1 {
        checked_axis()?;
        let why =
            format!("scales {} of blocks; only one scale a tensor or an index of an axis is", scale.ty());
        return Err(OpError::unsupported(format!("{why} supported")).into());
    }
    let params = match *scales {
        [scale] => QuantParams::per_tensor(scale, zeros.first().copied().unwrap_or(0))?,
        _ if node.opset() < 13 => {
            return Err(OpError::quant(format!(
                "{} scales; opset 13 introduced more than one",
                scales.len()
            ))
            .into());
        }
        _ => QuantParams::per_axis(checked_axis()?, scales.to_vec(), zeros)?,
    };
    params.check(ty.dtype, &ty.shape)?;
    Ok(params)
}
