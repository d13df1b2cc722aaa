//! Products whose weights alone are quantized: the weights become real numbers here.

use super::{contrib_attention::required_count, matmul::matmul_of};
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
        code(bytes, self.bits, i)
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

/// Code `i` of packed bytes, the low bits of a byte first.
pub(super) fn code(bytes: &[u8], bits: usize, i: usize) -> u8 {
    let per_byte = 8 / bits;
    let code = bytes[i / per_byte] >> (i % per_byte * bits);
    (u16::from(code) & ((1 << bits) - 1)) as u8
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
    times(node, a, weights, bias)
}

/// A·weights + bias, computed in f32 and rounded to the type of A.
fn times(
    node: &mut Node<'_, '_>,
    a: ValueId,
    weights: Tensor,
    bias: Option<ValueId>,
) -> Result<ValueId, NodeError> {
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

/// The numbers of NF4: the middles of 16 equally likely parts of a normal distribution, within −1 and 1.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The magnitudes of FP4 within 1, by the low three bits of a code; the high one is the sign.
const FP4: [f32; 8] = [0.0, 5.208_333_3e-3, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25];

/// A·B of weights whose codes of 4 bits name one of 16 numbers, to be multiplied by the largest magnitude of their block. B is
/// `[N, K]` in the file, or its transpose where `transB` is 0; its blocks go over the ends of rows, and the high bits of a
/// byte come first.
pub(super) fn matmul_bnb4(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    node.ignore(&["training_mode"]);
    let a = node.operand(0, "A")?;
    let (inner, columns) = (required_count(node, "K")?, required_count(node, "N")?);
    let block = required_count(node, "block_size")?;
    let swaps = node.flag("transB", true)?;
    let number: fn(u8) -> f32 = match node.int("quant_type", -1)? {
        0 => |code| if code < 8 { FP4[usize::from(code)] } else { -FP4[usize::from(code & 7)] },
        1 => |code| NF4[usize::from(code)],
        other => {
            return Err(NodeError::attribute("quant_type", format!("is {other}; 0 is FP4, 1 is NF4")));
        }
    };
    let (codes, largest) = (node.required(1, "B")?, node.required(2, "absmax")?);
    let elements = inner.checked_mul(columns).filter(|n| n.saturating_mul(4) <= MAX_TENSOR_BYTES);
    let elements = elements.ok_or_else(|| OpError::too_large(format!("K {inner} by N {columns}")))?;
    let bytes = codes.as_slice::<u8>().map_err(OpError::from)?;
    let factors = largest.to_f32().ok_or_else(|| OpError::dtype("absmax must be of floats"))?;
    if bytes.len() != elements.div_ceil(2) || factors.len() != elements.div_ceil(block) {
        let why =
            format!("B {} and absmax {} of {elements} codes in blocks of {block}", codes.ty(), largest.ty());
        return Err(OpError::shape(why).into());
    }
    let at = |i: usize| {
        let code = if i.is_multiple_of(2) { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 };
        number(code) * factors[i / block]
    };
    let (dims, numbers): (_, Vec<f32>) = match swaps {
        true => {
            let places = (0..inner).flat_map(|k| (0..columns).map(move |n| n * inner + k));
            ([inner, columns], places.map(at).collect())
        }
        false => ([columns, inner], (0..elements).map(at).collect()),
    };
    let weights = Tensor::from_vec(Shape::new(dims)?, numbers).map_err(OpError::from)?;
    times(node, a, weights, None)
}
