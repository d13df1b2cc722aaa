//! Between real numbers and integers.
//!
//! A grid that is known at import, with one scale for a tensor or for each index of an axis, becomes part of a type:
//! [`Quantize`] and [`Dequantize`]. Grids of blocks and those that are computed at run time are written out in
//! elementary ops.

use crate::{
    DType, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::PowerRounding,
    onnx::{NodeError, import::Node, tensor},
    ops::{
        AssumeGrid, Binary, BinaryKind, Cast, CastSmall, Dequantize, DynamicQuantize, Expand, Quantize,
        Reshape, Slice, SliceSpec, Unary, UnaryKind,
    },
};

pub(super) fn quantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let grid = Grid::by_opset(node)?;
    quantize_by(node, &grid)
}

/// ONNX Runtime's own, from before ONNX had zero points of 16 bits; several scales at any opset.
pub(super) fn microsoft_quantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let grid = Grid::by_attributes(node)?;
    quantize_by(node, &grid)
}

fn quantize_by(node: &mut Node<'_, '_>, grid: &Grid) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let saturate = node.opset() < 19 || node.flag("saturate", true)?;
    let declared = match node.opset() >= 21 {
        true => type_attribute(node, "output_dtype")?,
        false => None,
    };
    let precision = if node.opset() >= 23 { type_attribute(node, "precision")? } else { None };
    let dtype = match (declared, grid.zero_point.map(|z| node.ty(z).dtype)) {
        (Some(d), Some(z)) if d != z => {
            return Err(NodeError::attribute("output_dtype", format!("is {d}, but y_zero_point is {z}")));
        }
        (Some(d), _) | (None, Some(d)) => d,
        (None, None) => DType::U8,
    };
    match dtype.is_small_float() {
        true => quantized_to_float(
            node,
            x,
            grid,
            precision,
            CastSmall { to: dtype, saturate, rounding: PowerRounding::Up },
        ),
        false => quantized(node, "", x, grid, dtype, precision),
    }
}

pub(super) fn dequantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let grid = Grid::by_opset(node)?;
    dequantize_by(node, &grid)
}

/// See [`microsoft_quantize_linear`].
pub(super) fn microsoft_dequantize_linear(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let grid = Grid::by_attributes(node)?;
    dequantize_by(node, &grid)
}

fn dequantize_by(node: &mut Node<'_, '_>, grid: &Grid) -> Result<ValueId, NodeError> {
    let x = node.operand(0, "x")?;
    let declared = if node.opset() >= 23 { type_attribute(node, "output_dtype")? } else { None };
    let to = declared.unwrap_or(node.ty(grid.scale).dtype);
    dequantized(node, "", x, grid, to)
}

/// ONNX defines it as a function: one grid over the range of all elements and zero, then QuantizeLinear.
pub(super) fn dynamic_quantize_linear(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError> {
    let x = node.operand(0, "x")?;
    let [codes, scale, zero_point] = dynamically_quantized(node, x)?;
    Ok(vec![codes, scale, zero_point])
}

/// Codes, scale and zero point of f32 elements on the u8 grid over their range: [min(x, 0), max(x, 0)] in 255 steps.
pub(super) fn dynamically_quantized(node: &mut Node<'_, '_>, x: ValueId) -> Result<[ValueId; 3], NodeError> {
    let [codes, scale, zero] = node.emit_parts("codes", DynamicQuantize { axis: 0 }, &[x])?;
    let scale = node.emit_part("scale", Reshape { shape: Shape::scalar() }, &[scale])?;
    let zero = node.emit_part("zero", Reshape { shape: Shape::scalar() }, &[zero])?;
    let zero_point = node.emit_part("zero_point", Cast { to: DType::U8 }, &[zero])?;
    Ok([codes, scale, zero_point])
}

/// The type that an attribute names; `None` where it is 0 or absent.
fn type_attribute(node: &mut Node<'_, '_>, name: &'static str) -> Result<Option<DType>, NodeError> {
    let code = node.int(name, 0)?;
    let known = |code: i64| {
        tensor::dtype(i32::try_from(code).unwrap_or(-1))
            .map_err(|why| OpError::unsupported(format!("{name}: {why}")).into())
    };
    (code != 0).then(|| known(code)).transpose()
}

/// A grid as the operands of a node give it.
pub(super) struct Grid {
    /// One scale, one for each index of `axis`, one for each block along it, or of the rank of the tensor and broadcast.
    pub(super) scale: ValueId,
    /// Zero points of the shape of the scales.
    pub(super) zero_point: Option<ValueId>,
    /// The axis of several scales, from the back where negative; `None` where there may be one alone.
    pub(super) axis: Option<i64>,
    /// Elements of a block; 0 where there are none.
    pub(super) block: usize,
}

impl Grid {
    /// Of QuantizeLinear and DequantizeLinear: opset 13 brought several scales, 21 those of blocks.
    fn by_opset(node: &mut Node<'_, '_>) -> Result<Grid, NodeError> {
        match node.opset() {
            ..13 => Grid::at(node, 1, 2, None),
            13..21 => {
                let axis = node.int("axis", 1)?;
                Grid::at(node, 1, 2, Some(axis))
            }
            21.. => Grid::by_attributes(node),
        }
    }

    /// Of operands 1 and 2, `axis` and `block_size`.
    fn by_attributes(node: &mut Node<'_, '_>) -> Result<Grid, NodeError> {
        let (axis, block) = (node.int("axis", 1)?, node.int("block_size", 0)?);
        let block =
            usize::try_from(block).map_err(|_| NodeError::attribute("block_size", format!("is {block}")))?;
        let grid = Grid { block, ..Grid::at(node, 1, 2, Some(axis))? };
        let scale = node.ty(grid.scale);
        if block == 0 && scale.shape.rank() > 1 && scale.shape.elements() != 1 {
            return Err(OpError::quant(format!("scales {scale} are of blocks, but block_size is 0")).into());
        }
        Ok(grid)
    }

    /// From the operands in these slots.
    pub(super) fn at(
        node: &mut Node<'_, '_>,
        scale: usize,
        zero_point: usize,
        axis: Option<i64>,
    ) -> Result<Grid, NodeError> {
        let scale = node.operand(scale, "scale")?;
        Ok(Grid { scale, zero_point: node.optional(zero_point), axis, block: 0 })
    }

    /// Fails unless scales and zero points fit each other and a tensor of this type.
    fn check(&self, node: &Node<'_, '_>, codes: &TensorType) -> Result<(), NodeError> {
        let scale = node.ty(self.scale);
        if !scale.dtype.is_float() {
            return Err(OpError::quant(format!("scales must be floats, not {scale}")).into());
        }
        // Scales that are computed of data may be 0, where a tensor is all zeros: they are taken as they are.
        let known = node.constant_value(self.scale).filter(|_| !node.is_eager());
        let known = known.and_then(Tensor::to_f32).unwrap_or_default();
        // Those of blocks only multiply: tools that spend the one more negative code on the largest weight make some negative.
        let usable = |s: f32| s.is_finite() && (s > 0.0 || self.block > 0);
        if let Some(odd) = known.iter().find(|&&s| !usable(s)) {
            let name = node.name_of(self.scale);
            return Err(OpError::quant(format!(
                "scale {odd} in `{name}` is not a finite number above 0: quantize the model anew"
            ))
            .into());
        }
        if codes.dtype.size() > 4 || !(codes.dtype.is_integer() || codes.dtype.is_small_float()) {
            return Err(OpError::quant(format!("{} cannot hold quantized values", codes.dtype)).into());
        }
        let Some(zero) = self.zero_point.map(|z| node.ty(z)) else { return Ok(()) };
        if zero.dtype != codes.dtype {
            let why = format!("the zero point is {zero}, but the integers are {}", codes.dtype);
            return Err(OpError::quant(why).into());
        }
        if zero.shape != scale.shape && (zero.shape.elements(), scale.shape.elements()) != (1, 1) {
            return Err(OpError::quant(format!("zero points {zero} beside scales {scale}")).into());
        }
        Ok(())
    }

    /// The axis of several scales.
    fn checked_axis(&self, node: &Node<'_, '_>, shape: &Shape) -> Result<usize, NodeError> {
        let Some(axis) = self.axis else {
            let why = format!("scales {}: before opset 13 a tensor has one scale", node.ty(self.scale));
            return Err(OpError::quant(why).into());
        };
        shape.axis(axis).ok_or_else(|| {
            NodeError::attribute("axis", format!("is {axis}, for a tensor of rank {}", shape.rank()))
        })
    }

    /// How scales lie along a tensor of this shape.
    fn spread(&self, node: &Node<'_, '_>, shape: &Shape) -> Result<Spread, NodeError> {
        let scale = node.ty(self.scale);
        if scale.shape.elements() == 1 && self.block == 0 {
            return Ok(Spread::One);
        }
        if self.block == 0 && scale.shape.rank() <= 1 {
            let axis = self.checked_axis(node, shape)?;
            return match scale.shape.elements() == shape[axis] {
                true => Ok(Spread::Axis(axis)),
                false => Err(OpError::quant(format!(
                    "{} scales for axis {axis} of length {}",
                    scale.shape.elements(),
                    shape[axis]
                ))
                .into()),
            };
        }
        if self.block == 0 {
            return match shape.broadcast(&scale.shape).as_ref() == Some(shape) {
                true => Ok(Spread::Broadcast),
                false => Err(OpError::quant(format!("scales {scale} do not broadcast to {shape:?}")).into()),
            };
        }
        let axis = self.checked_axis(node, shape)?;
        let block = self.block.min(shape[axis].max(1));
        let mut expected = shape.to_vec();
        expected[axis] = shape[axis].div_ceil(block);
        match scale.shape[..] == expected[..] {
            true => Ok(Spread::Blocks { axis, block }),
            false => Err(OpError::quant(format!(
                "scales {scale} for blocks of {block} along axis {axis} of {shape:?}, which need {expected:?}"
            ))
            .into()),
        }
    }

    /// The grid as a part of types, where it is known, f32 can hold its scales, and it has no blocks.
    fn params(
        &self,
        node: &Node<'_, '_>,
        codes: &TensorType,
        spread: &Spread,
    ) -> Result<Option<QuantParams>, NodeError> {
        let scales = node.constant_value(self.scale).filter(|_| codes.dtype.is_integer());
        let Some(scales) = scales.and_then(Tensor::to_f32) else { return Ok(None) };
        if scales.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return Ok(None);
        }
        let zeros = match self.zero_point.map(|z| node.constant_value(z)) {
            None => vec![0; scales.len()],
            Some(None) => return Ok(None),
            Some(Some(z)) => {
                let zeros = z.to_i64().unwrap_or_default();
                zeros.into_iter().map(|z| i32::try_from(z).unwrap_or(i32::MAX)).collect()
            }
        };
        let params = match *spread {
            Spread::One => QuantParams::per_tensor(
                scales.first().copied().unwrap_or(1.0),
                zeros.first().copied().unwrap_or(0),
            )?,
            Spread::Axis(axis) => QuantParams::per_axis(axis, scales, zeros)?,
            Spread::Broadcast | Spread::Blocks { .. } => return Ok(None),
        };
        params.check(codes.dtype, &codes.shape)?;
        Ok(Some(params))
    }
}

/// How scales lie along a tensor.
enum Spread {
    /// One for all.
    One,
    /// One for each index of the axis.
    Axis(usize),
    /// By the rules of broadcasting.
    Broadcast,
    /// One for each block of so many elements along the axis.
    Blocks { axis: usize, block: usize },
}

impl Spread {
    /// Scales or zero points in a shape that broadcasts to that of the tensor.
    fn spread(
        &self,
        node: &mut Node<'_, '_>,
        part: &str,
        value: ValueId,
        shape: &Shape,
    ) -> Result<ValueId, NodeError> {
        match *self {
            Spread::One => node.emit_part(part, Reshape { shape: Shape::scalar() }, &[value]),
            Spread::Broadcast => Ok(value),
            Spread::Axis(axis) => {
                let dims: Vec<usize> =
                    (0..shape.rank()).map(|d| if d == axis { shape[d] } else { 1 }).collect();
                node.emit_part(part, Reshape { shape: Shape::new(dims)? }, &[value])
            }
            Spread::Blocks { axis, block } => {
                let blocks = node.shape(value);
                let [before, after] = [&blocks[..=axis], &blocks[axis + 1..]];
                let apart = Shape::new([before, &[1], after].concat())?;
                let repeated = Shape::new([before, &[block], after].concat())?;
                let mut whole = blocks.to_vec();
                whole[axis] = blocks[axis].saturating_mul(block);
                let apart = node.emit_part(&format!("{part}_apart"), Reshape { shape: apart }, &[value])?;
                let repeated =
                    node.emit_part(&format!("{part}_repeated"), Expand { shape: repeated }, &[apart])?;
                let whole = node.emit_part(
                    &format!("{part}_blocks"),
                    Reshape { shape: Shape::new(whole)? },
                    &[repeated],
                )?;
                let mut axes: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
                axes[axis] = SliceSpec::all(shape[axis]);
                node.emit_part(part, Slice { axes }, &[whole])
            }
        }
    }

    /// The index of the scale of element `i` of a tensor of this shape; `None` where that is a matter of broadcasting.
    fn index(&self, shape: &Shape) -> Option<impl Fn(usize) -> usize + use<>> {
        let (axis, block) = match *self {
            Spread::One => (None, 1),
            Spread::Axis(axis) => (Some(axis), 1),
            Spread::Blocks { axis, block } => (Some(axis), block),
            Spread::Broadcast => return None,
        };
        let in_blocks = matches!(self, Spread::Blocks { .. });
        let (stride, extent) = axis.map_or((1, 1), |a| (shape.strides()[a], shape[a]));
        let blocks = extent.div_ceil(block);
        Some(move |i: usize| {
            let (k, outer, inner) = (i / stride % extent, i / stride / extent, i % stride);
            if in_blocks { (outer * blocks + k / block) * stride + inner } else { k }
        })
    }
}

/// The name of a part of a part.
fn within(part: &str, what: &str) -> String {
    if part.is_empty() { what.into() } else { format!("{part}_{what}") }
}

/// Adds an op under the name of a part of the node, or of the node where `part` is empty.
fn emit(
    node: &mut Node<'_, '_>,
    part: &str,
    op: impl Into<crate::Op>,
    operands: &[ValueId],
) -> Result<ValueId, NodeError> {
    match part.is_empty() {
        true => node.emit(op, operands),
        false => node.emit_part(part, op, operands),
    }
}

/// clamp(round_half_even(x/scale) + zero point) in `dtype`. The division is in `precision`, which is the scale's type
/// where nothing else is said.
pub(super) fn quantized(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    grid: &Grid,
    dtype: DType,
    precision: Option<DType>,
) -> Result<ValueId, NodeError> {
    let ty = TensorType::new(dtype, node.shape(x));
    grid.check(node, &ty)?;
    let Some((lo, hi)) = dtype.integer_range().filter(|_| dtype.size() <= 2) else {
        return Err(OpError::quant(format!("quantizes to at most 16 bits, not to {dtype}")).into());
    };
    let spread = grid.spread(node, &ty.shape)?;
    let precision = precision.unwrap_or(node.ty(grid.scale).dtype);
    if !precision.is_float() {
        return Err(NodeError::attribute("precision", format!("is {precision}, which is no float")));
    }
    let cast = |node: &mut Node<'_, '_>, what: &str, v: ValueId, to: DType| match node.ty(v).dtype == to {
        true => Ok(v),
        false => node.emit_part(&within(part, what), Cast { to }, &[v]),
    };
    if precision == DType::F32
        && let Some(params) = grid.params(node, &ty, &spread)?
    {
        let x = cast(node, "real", x, DType::F32)?;
        return emit(node, part, Quantize { dtype, params }, &[x]);
    }
    let x = cast(node, "real", x, precision)?;
    let scale = cast(node, "step", grid.scale, precision)?;
    let scale = spread.spread(node, &within(part, "steps"), scale, &ty.shape)?;
    let steps = node.emit_part(&within(part, "quotient"), Binary { kind: BinaryKind::Div }, &[x, scale])?;
    let steps = node.emit_part(&within(part, "whole"), Unary { kind: UnaryKind::Round }, &[steps])?;
    let mut codes = cast(node, "wide", steps, DType::F32)?;
    if let Some(zero) = grid.zero_point {
        let zero = cast(node, "zero", zero, DType::F32)?;
        let zero = spread.spread(node, &within(part, "zeros"), zero, &ty.shape)?;
        codes = node.emit_part(&within(part, "sum"), Binary { kind: BinaryKind::Add }, &[codes, zero])?;
    }
    let clip = UnaryKind::Clip { lo: lo as f32, hi: hi as f32 };
    let codes = node.emit_part(&within(part, "clipped"), Unary { kind: clip }, &[codes])?;
    emit(node, part, Cast { to: dtype }, &[codes])
}

/// (x/scale + zero point) as a float of 8 bits or fewer.
fn quantized_to_float(
    node: &mut Node<'_, '_>,
    x: ValueId,
    grid: &Grid,
    precision: Option<DType>,
    to: CastSmall,
) -> Result<ValueId, NodeError> {
    let ty = TensorType::new(to.to, node.shape(x));
    grid.check(node, &ty)?;
    let spread = grid.spread(node, &ty.shape)?;
    let precision = precision.unwrap_or(node.ty(grid.scale).dtype);
    if !precision.is_float() {
        return Err(NodeError::attribute("precision", format!("is {precision}, which is no float")));
    }
    let x = node.emit_part("real", Cast { to: precision }, &[x])?;
    let scale = node.emit_part("step", Cast { to: precision }, &[grid.scale])?;
    let scale = spread.spread(node, "steps", scale, &ty.shape)?;
    let steps = node.emit_part("quotient", Binary { kind: BinaryKind::Div }, &[x, scale])?;
    let mut steps = node.emit_part("wide", Cast { to: DType::F32 }, &[steps])?;
    if let Some(zero) = grid.zero_point {
        let zero = node.emit_part("zero", Cast { to: DType::F32 }, &[zero])?;
        let zero = spread.spread(node, "zeros", zero, &ty.shape)?;
        steps = node.emit_part("sum", Binary { kind: BinaryKind::Add }, &[steps, zero])?;
    }
    node.emit(to, &[steps])
}

/// (x − zero point)·scale, in f32 and then of type `to`. Weights become a constant with a grid; values that have the
/// very grid stay; others get it.
pub(super) fn dequantized(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    grid: &Grid,
    to: DType,
) -> Result<ValueId, NodeError> {
    let ty = TensorType::new(node.ty(x).dtype, node.shape(x));
    grid.check(node, &ty)?;
    let spread = grid.spread(node, &ty.shape)?;
    if !to.is_float() {
        return Err(NodeError::attribute("output_dtype", format!("is {to}, which is no float")));
    }
    let wide = if to == DType::F32 { part.to_owned() } else { within(part, "wide") };
    let y = match grid.params(node, &ty, &spread)? {
        Some(params) => {
            let codes = with_grid(node, part, x, params)?;
            emit(node, &wide, Dequantize {}, &[codes])?
        }
        None => match dequantized_constant(node, x, grid, &spread)? {
            Some(numbers) if wide.is_empty() => node.constant(numbers),
            Some(numbers) => node.constant_part(&wide, numbers),
            None => dequantized_at_run_time(node, part, &wide, x, grid, &spread)?,
        },
    };
    if to == DType::F32 { Ok(y) } else { emit(node, part, Cast { to }, &[y]) }
}

/// The integers as codes of the grid.
fn with_grid(
    node: &mut Node<'_, '_>,
    part: &str,
    x: ValueId,
    params: QuantParams,
) -> Result<ValueId, NodeError> {
    if node.ty(x).quant.as_ref() == Some(&params) {
        return Ok(x);
    }
    let typed = TensorType::quantized(node.ty(x).dtype, node.shape(x), params.clone())?;
    match node.quantized_constant(x, typed)? {
        Some(constant) => Ok(constant),
        None => node.emit_part(&within(part, "grid"), AssumeGrid { params: Some(params) }, &[x]),
    }
}

/// Constants on a grid of blocks, dequantized at once: what they would become step by step takes many times the room.
fn dequantized_constant(
    node: &Node<'_, '_>,
    x: ValueId,
    grid: &Grid,
    spread: &Spread,
) -> Result<Option<Tensor>, NodeError> {
    let constant = |v: ValueId| node.constant_value(v);
    let (Some(codes), Some(scales)) = (constant(x), constant(grid.scale)) else { return Ok(None) };
    if codes.dtype().is_small_float() {
        return Ok(None);
    }
    let zeros = match grid.zero_point.map(constant) {
        None => None,
        Some(None) => return Ok(None),
        Some(Some(zeros)) => zeros.to_i64(),
    };
    let (Some(index), Some(codes_i64), Some(scales)) =
        (spread.index(codes.shape()), codes.to_i64(), scales.to_f32())
    else {
        return Ok(None);
    };
    let number = |(i, &q): (usize, &i64)| {
        let at = index(i);
        (q - zeros.as_ref().map_or(0, |z| z[at])) as f32 * scales[at]
    };
    let numbers = codes_i64.iter().enumerate().map(number).collect();
    Ok(Some(Tensor::from_vec::<f32>(codes.shape().clone(), numbers).map_err(OpError::from)?))
}

fn dequantized_at_run_time(
    node: &mut Node<'_, '_>,
    part: &str,
    wide: &str,
    x: ValueId,
    grid: &Grid,
    spread: &Spread,
) -> Result<ValueId, NodeError> {
    let shape = node.shape(x);
    let cast = |node: &mut Node<'_, '_>, what: &str, v: ValueId, to: DType| match node.ty(v).dtype == to {
        true => Ok(v),
        false => node.emit_part(&within(part, what), Cast { to }, &[v]),
    };
    // Codes may also be floats of 8 bits.
    let wider = if node.ty(x).dtype.is_small_float() { DType::F32 } else { DType::S32 };
    let mut steps = cast(node, "codes", x, wider)?;
    if let Some(zero) = grid.zero_point {
        let zero = cast(node, "zero", zero, wider)?;
        let zero = spread.spread(node, &within(part, "zeros"), zero, &shape)?;
        steps = node.emit_part(&within(part, "centred"), Binary { kind: BinaryKind::Sub }, &[steps, zero])?;
    }
    let steps = node.emit_part(&within(part, "steps"), Cast { to: DType::F32 }, &[steps])?;
    let scale = cast(node, "step", grid.scale, DType::F32)?;
    let scale = spread.spread(node, &within(part, "scales"), scale, &shape)?;
    emit(node, wide, Binary { kind: BinaryKind::Mul }, &[steps, scale])
}
