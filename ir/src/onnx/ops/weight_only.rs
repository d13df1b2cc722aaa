//! Products whose weights alone are quantized: the weights become real numbers here.

use super::matmul::matmul_of;
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    limits::MAX_TENSOR_BYTES,
    onnx::{NodeError, import::Node},
    ops::{Binary, BinaryKind, Cast},
};

/// How B of a MatMulNBits is packed: `[N, blocks of K, bytes of a block]`, the low bits of a byte first.
struct Packed {
    inner: usize,
    columns: usize,
    bits: usize,
    block: usize,
}

impl Packed {
    fn of(node: &mut Node<'_, '_>) -> Result<Packed, NodeError> {
        let mut length = |name: &'static str, default: Option<i64>| {
            let value = node.optional_int(name)?.or(default);
            let value = value.ok_or_else(|| NodeError::attribute(name, "is missing"))?;
            usize::try_from(value)
                .ok()
                .filter(|&n| n > 0)
                .ok_or_else(|| NodeError::attribute(name, format!("is {value}")))
        };
        let packed = Packed {
            inner: length("K", None)?,
            columns: length("N", None)?,
            bits: length("bits", Some(4))?,
            block: length("block_size", None)?,
        };
        if ![2, 4, 8].contains(&packed.bits) {
            return Err(NodeError::attribute(
                "bits",
                format!("is {}; 2, 4 and 8 are supported", packed.bits),
            ));
        }
        let elements = packed.inner.checked_mul(packed.columns).and_then(|n| n.checked_mul(4));
        if elements.is_none_or(|bytes| bytes > MAX_TENSOR_BYTES) || packed.block > 1 << 20 {
            let why = format!("K {} by N {} in blocks of {}", packed.inner, packed.columns, packed.block);
            return Err(OpError::too_large(why).into());
        }
        Ok(packed)
    }

    fn blocks(&self) -> usize {
        self.inner.div_ceil(self.block)
    }

    /// Bytes that so many codes take.
    fn bytes(&self, codes: usize) -> usize {
        (codes * self.bits).div_ceil(8)
    }

    /// Code `i` of a row of packed bytes.
    fn code(&self, bytes: &[u8], i: usize) -> u8 {
        let per_byte = 8 / self.bits;
        let code = bytes[i / per_byte] >> (i % per_byte * self.bits);
        (u16::from(code) & ((1 << self.bits) - 1)) as u8
    }

    fn check(&self, role: &'static str, got: &Tensor, elements: usize) -> Result<(), NodeError> {
        match got.shape().elements() == elements {
            true => Ok(()),
            false => {
                Err(OpError::shape(format!("{role} must have {elements} elements, got {}", got.ty())).into())
            }
        }
    }
}

/// A·B' with B' = (codes − zero point)·scale in blocks along K; the zero point is half the range where there is none.
/// How accurately a kernel should compute (`accuracy_level`) is not a matter of the result.
pub(super) fn matmul_n_bits(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    node.ignore(&["accuracy_level"]);
    if node.flag("weight_prepacked", false)? {
        return Err(NodeError::attribute("weight_prepacked", "is 1: the layout is that of one kernel"));
    }
    let a = node.operand(0, "A")?;
    let packed = Packed::of(node)?;
    let (codes, scales) = (node.required(1, "B")?, node.required(2, "scales")?);
    let zeros = node.known(3, "zero_points")?;
    let order = node.known(4, "g_idx")?;
    let bias = node.optional(5);
    let weights = real_weights(&packed, &codes, &scales, zeros.as_ref(), order.as_ref())?;
    let weights = node.constant_part("weights", weights);
    let dtype = node.ty(a).dtype;
    let a = match dtype {
        DType::F32 => a,
        _ => node.emit_part("a", Cast { to: DType::F32 }, &[a])?,
    };
    let mut y = matmul_of(node, "", a, weights)?;
    if let Some(bias) = bias {
        let bias = match node.ty(bias).dtype {
            DType::F32 => bias,
            _ => node.emit_part("bias", Cast { to: DType::F32 }, &[bias])?,
        };
        y = node.emit_part("sum", Binary { kind: BinaryKind::Add }, &[y, bias])?;
    }
    match dtype {
        DType::F32 => Ok(y),
        to => node.emit_part("result", Cast { to }, &[y]),
    }
}

/// The weights as f32 `[K, N]`.
fn real_weights(
    packed: &Packed,
    codes: &Tensor,
    scales: &Tensor,
    zeros: Option<&Tensor>,
    order: Option<&Tensor>,
) -> Result<Tensor, NodeError> {
    let (blocks, columns) = (packed.blocks(), packed.columns);
    let row = blocks * packed.bytes(packed.block);
    packed.check("B", codes, columns * row)?;
    packed.check("scales", scales, columns * blocks)?;
    let bytes = codes.as_slice::<u8>().map_err(OpError::from)?;
    let scales = scales.to_f32().ok_or_else(|| OpError::dtype("scales must be floats"))?;
    let zero_row = packed.bytes(blocks);
    let zero: Box<dyn Fn(usize, usize) -> f32> = match zeros {
        None => Box::new(|_, _| f32::from(1u8 << (packed.bits - 1))),
        Some(z) if z.dtype() == DType::U8 => {
            packed.check("zero_points", z, columns * zero_row)?;
            let z = z.as_slice::<u8>().map_err(OpError::from)?;
            Box::new(move |n, block| f32::from(packed.code(&z[n * zero_row..], block)))
        }
        Some(z) => {
            packed.check("zero_points", z, columns * blocks)?;
            let z = z.to_f32().ok_or_else(|| OpError::dtype("zero points must be u8 or floats"))?;
            Box::new(move |n, block| z[n * blocks + block])
        }
    };
    let order = order.map(|g| group_of_rows(packed, g)).transpose()?;
    let mut weights = vec![0f32; packed.inner * columns];
    for n in 0..columns {
        let bytes = &bytes[n * row..];
        for k in 0..packed.inner {
            let own = k / packed.block;
            let code = packed.code(&bytes[own * packed.bytes(packed.block)..], k % packed.block);
            let block = order.as_ref().map_or(own, |g| g[k]);
            weights[k * columns + n] = (f32::from(code) - zero(n, block)) * scales[n * blocks + block];
        }
    }
    let shape = Shape::new([packed.inner, columns])?;
    Ok(Tensor::from_vec(shape, weights).map_err(OpError::from)?)
}

/// The block whose scale each row of the weights has.
fn group_of_rows(packed: &Packed, order: &Tensor) -> Result<Vec<usize>, NodeError> {
    let groups = order.to_i64().unwrap_or_default();
    let blocks = packed.blocks();
    let group = |&g: &i64| usize::try_from(g).ok().filter(|&g| g < blocks);
    match groups.iter().map(group).collect::<Option<Vec<usize>>>() {
        Some(groups) if groups.len() >= packed.inner => Ok(groups),
        _ => Err(OpError::shape(format!(
            "g_idx {} must name one of {blocks} blocks for each of {} rows",
            order.ty(),
            packed.inner
        ))
        .into()),
    }
}
