//! Rows of quantized tables, as embeddings have them: codes are picked as they are stored, and only those become numbers.

use super::compose::Result;
use crate::{
    DType, OpError, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{BinaryKind, SliceSpec},
};

/// How a table is stored, `[…]` with scales for blocks along one axis.
struct Table {
    /// The axis of blocks.
    axis: usize,
    /// Codes along it.
    extent: usize,
    /// Codes of a block.
    block: usize,
    /// Bits of a code, where several share a byte.
    packed: Option<usize>,
}

impl Table {
    fn blocks(&self) -> usize {
        self.extent.div_ceil(self.block)
    }

    /// Bytes along the last axis as the codes that they hold, the low bits first.
    fn unpacked(&self, node: &mut Node<'_, '_>, part: &str, bytes: ValueId) -> Result<ValueId> {
        let Some(bits) = self.packed else { return Ok(bytes) };
        let mut dims = node.shape(bytes).to_vec();
        let last = dims.len().saturating_sub(1);
        let each = 8 / bits;
        let shifts = Tensor::from_vec(Shape::new([each])?, (0..8u8).step_by(bits).collect());
        let shifts = node.constant_part(&format!("{part}_shifts"), shifts.map_err(OpError::from)?);
        let mask = node.constant_part(&format!("{part}_mask"), Tensor::scalar((1u8 << bits) - 1));
        dims.push(1);
        let apart = node.shaped(&format!("{part}_bytes"), dims.clone(), bytes)?;
        let shifted = node.binary(&format!("{part}_shifted"), BinaryKind::ShiftRight, apart, shifts)?;
        let codes = node.binary(&format!("{part}_apart"), BinaryKind::And, shifted, mask)?;
        dims.pop();
        dims[last] *= each;
        node.shaped(&format!("{part}_codes"), dims, codes)
    }

    /// A number for each block as one for each code, along an axis.
    fn spread(&self, node: &mut Node<'_, '_>, part: &str, x: ValueId, axis: usize) -> Result<ValueId> {
        let shape = Shape::new([self.extent])?;
        let ty = TensorType::new(DType::S64, shape.clone());
        let of = node.computed(&format!("{part}_block"), &ty, || {
            Ok(Tensor::from_vec(shape, (0..self.extent).map(|i| (i / self.block) as i64).collect())?)
        })?;
        node.gathered(&format!("{part}_spread"), axis, x, of)
    }
}

/// Parts of a table at indices along an axis, (codes − zero points)·scales. An index that is out of range is an error, where
/// ONNX Runtime gives zeros.
pub(super) fn gather_block_quantized(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (data, indices) = (node.operand(0, "data")?, node.operand(1, "indices")?);
    let (scales, zeros) = (node.operand(2, "scales")?, node.optional(3));
    let (gather, axis) = (node.axis_of("gather_axis", 0, data)?, node.axis_of("quantize_axis", 1, data)?);
    let (bits, block) = (node.int("bits", 4)?, node.int("block_size", 128)?);
    let (ty, dims) = (node.ty(data).clone(), node.shape(data).to_vec());
    let is_float = ty.dtype.is_small_float();
    let packed = match (ty.dtype, bits) {
        (DType::U8, 2 | 4) => Some(bits as usize),
        (DType::U8, 8) | (DType::S4 | DType::U4, 4) => None,
        _ if is_float => None,
        _ => return Err(NodeError::attribute("bits", format!("is {bits}, of {ty}"))),
    };
    if packed.is_some() && (axis + 1 != dims.len() || gather == axis) {
        return Err(NodeError::attribute(
            "quantize_axis",
            format!(
                "is {axis}: codes that share bytes must be quantized along the last axis and picked along another"
            ),
        ));
    }
    let extent = dims[axis].saturating_mul(packed.map_or(1, |bits| 8 / bits));
    let block = match usize::try_from(block) {
        Ok(0) if is_float => extent.max(1),
        Ok(n) if n > 0 => n,
        _ => return Err(NodeError::attribute("block_size", format!("is {block}"))),
    };
    let table = Table { axis, extent, block, packed };
    check(node, &table, &dims, scales, is_float)?;
    if let Some(zeros) = zeros {
        check_zeros(node, &table, ty.dtype, scales, zeros)?;
    }
    let codes = node.gathered("picked", gather, data, indices)?;
    let codes = table.unpacked(node, "data", codes)?;
    let mut steps = node.cast_to("steps", DType::F32, codes)?;
    let zero = match zeros {
        Some(zeros) => Some(picked(node, "zeros", &table, zeros, gather, indices)?),
        // Of codes that stand in bytes the zero point is in the middle.
        None if ty.dtype == DType::U8 => {
            Some(node.number("middle", f64::from(1 << (bits - 1)), DType::F32)?)
        }
        None => None,
    };
    if let Some(zero) = zero {
        let zero = node.cast_to("zeros", DType::F32, zero)?;
        steps = node.sub("centred", steps, zero)?;
    }
    let own = node.ty(scales).dtype;
    let scale = picked(node, "scales", &table, scales, gather, indices)?;
    let scale = node.cast_to("wide_scales", DType::F32, scale)?;
    let y = node.mul(if own == DType::F32 { "" } else { "numbers" }, steps, scale)?;
    node.cast_to("", own, y)
}

/// Fails unless there is a scale for each block; of floats, one may also serve for a whole axis.
fn check(node: &Node<'_, '_>, table: &Table, dims: &[usize], scales: ValueId, is_float: bool) -> Result<()> {
    let given = node.shape(scales);
    let fits = |d: usize| {
        given[d] == if d == table.axis { table.blocks() } else { dims[d] }
            || is_float && d != table.axis && given[d] == 1
    };
    if given.rank() == dims.len() && (0..dims.len()).all(fits) {
        return Ok(());
    }
    let why = format!("scales {} for blocks of {} of codes {dims:?}", node.ty(scales), table.block);
    Err(OpError::quant(why).into())
}

/// Fails unless there is a zero point of the type of codes for each scale, packed as codes are.
fn check_zeros(
    node: &Node<'_, '_>,
    table: &Table,
    dtype: DType,
    scales: ValueId,
    zeros: ValueId,
) -> Result<()> {
    let mut dims = node.shape(scales).to_vec();
    if let Some(bits) = table.packed {
        dims[table.axis] = dims[table.axis].div_ceil(8 / bits);
    }
    if !dtype.is_small_float() && node.ty(zeros).dtype == dtype && *node.shape(zeros) == *dims {
        return Ok(());
    }
    let why = format!("zero points {} of codes of {dtype} with scales {}", node.ty(zeros), node.ty(scales));
    Err(OpError::quant(why).into())
}

/// The scales or zero points of what is picked, one for each code.
fn picked(
    node: &mut Node<'_, '_>,
    part: &str,
    table: &Table,
    of_blocks: ValueId,
    gather: usize,
    indices: ValueId,
) -> Result<ValueId> {
    if gather == table.axis {
        let all = table.spread(node, part, of_blocks, gather)?;
        return node.gathered(&format!("{part}_picked"), gather, all, indices);
    }
    let dims = node.shape(of_blocks);
    let picks = node.shape(indices).rank();
    // One for the whole axis is one for all that is picked.
    let rows = match dims[gather] {
        1 => {
            let dims = [&dims[..gather], &vec![1; picks], &dims[gather + 1..]].concat();
            node.shaped(&format!("{part}_of_all"), dims, of_blocks)?
        }
        _ => node.gathered(&format!("{part}_picked"), gather, of_blocks, indices)?,
    };
    let is_packed = node.ty(rows).dtype == DType::U8;
    let mut rows = if is_packed { table.unpacked(node, part, rows)? } else { rows };
    let axis = if table.axis < gather { table.axis } else { table.axis + picks - 1 };
    if is_packed {
        let used = SliceSpec { start: 0, len: table.blocks(), step: 1 };
        rows = node.sliced(&format!("{part}_used"), axis, used, rows)?;
    }
    // One block for the whole axis is broadcast.
    if table.blocks() == 1 { Ok(rows) } else { table.spread(node, part, rows, axis) }
}
