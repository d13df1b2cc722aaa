//! Convolutions of integers that no kernel multiplies, on the same integers in floats.

use super::{Builder, RoundedConstant, Target, bias_fits};
use crate::PassError;
use qcc_ir::{
    DType, NodeId, Op, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::RequantMode,
    ops::{AssumeGrid, Binary, BinaryKind, Clamp, Conv, Dequantize, Layout, Quantize, Unary, UnaryKind},
};

/// f32 holds every integer up to this one: sums below it are exact in any order.
const EXACT: f64 = (1 << 24) as f64;

/// Operands of a convolution as integers in floats.
struct Integers {
    weights: Tensor,
    bias: Option<Tensor>,
    /// What makes steps of the result of sums, for each channel.
    factors: Vec<f32>,
}

impl Integers {
    /// `None` where a sum may leave what floats hold, or the bias is in other steps.
    fn of(
        x: &TensorType,
        (weights, weights_ty): (Tensor, TensorType),
        bias: Option<(Tensor, TensorType)>,
        s_y: f32,
    ) -> Result<Option<Integers>, OpError> {
        let (Some((s_x, z_x)), Some(grid)) = (x.per_tensor(), &weights_ty.quant) else { return Ok(None) };
        if bias.as_ref().is_some_and(|(_, b)| bias_fits(&[x, &weights_ty, b]).is_err()) {
            return Ok(None);
        }
        let channels = weights.shape()[0];
        let each = weights.shape().elements() / channels.max(1);
        let codes = weights.to_i64().unwrap_or_default();
        let steps = |(i, q): (usize, &i64)| (q - i64::from(grid.at(i / each).1)) as f32;
        let steps: Vec<f32> = codes.iter().enumerate().map(steps).collect();
        let offsets: Option<&[i32]> = bias.as_ref().map(|(b, _)| b.as_slice::<i32>()).transpose()?;
        let most = f64::from(z_x.max(255 - z_x));
        let fits = |(c, w): (usize, &[f32])| {
            let products: f64 = w.iter().map(|w| f64::from(w.abs()) * most).sum();
            products + offsets.map_or(0.0, |b| f64::from(b[c]).abs()) < EXACT
        };
        if each == 0 || grid.axis().is_some_and(|a| a != 0) || !steps.chunks(each).enumerate().all(fits) {
            return Ok(None);
        }
        let factors = (0..channels).map(|c| s_x * grid.at(c).0 / s_y).collect();
        let float = |shape: &Shape, v: Vec<f32>| Tensor::from_vec(shape.clone(), v).map_err(OpError::from);
        let bias = bias.as_ref().zip(offsets);
        let bias =
            bias.map(|((b, _), offsets)| float(b.shape(), offsets.iter().map(|&b| b as f32).collect()));
        Ok(Some(Integers { weights: float(weights.shape(), steps)?, bias: bias.transpose()?, factors }))
    }
}

impl Builder<'_> {
    /// The codes that a convolution with float requantization would give, by a float convolution of its integers; `None`
    /// where that is not exact, or another requantization was asked for.
    pub(super) fn exact_in_floats(
        &mut self,
        node: NodeId,
        target: &Target,
    ) -> Result<Option<ValueId>, PassError> {
        let Some(Op::Conv(conv)) = self.old.op(node) else { return Ok(None) };
        let conv = conv.clone();
        if self.ctx.options.requant != RequantMode::Float || conv.residual {
            return Ok(None);
        }
        let name = self.old.node(node).name.clone();
        let fail = |e| PassError::op(&name, "Conv", e);
        let operands = self.old.operands(node);
        let x = self.as_codes(operands[0])?;
        let ty = self.new.ty(x).clone();
        let constant = |slot: usize| self.rounded_constant(operands[slot]);
        let Some(weights) = constant(1).filter(|w| w.dtype().size() == 1) else { return Ok(None) };
        let weights = weights.codes().map_err(fail)?;
        let bias = match conv.bias {
            false => None,
            true => match constant(2).filter(|b| b.dtype() == DType::S32) {
                Some(bias) => Some(RoundedConstant::codes(&bias).map_err(fail)?),
                None => return Ok(None),
            },
        };
        match Integers::of(&ty, weights, bias, target.grid.scale).map_err(fail)? {
            Some(integers) => self.emit_exact(&name, &conv, x, integers, target).map(Some),
            None => Ok(None),
        }
    }

    fn emit_exact(
        &mut self,
        name: &str,
        conv: &Conv,
        x: ValueId,
        integers: Integers,
        target: &Target,
    ) -> Result<ValueId, PassError> {
        let fail = |e: OpError| PassError::op(name, "Conv", e);
        let z_x = self.new.ty(x).per_tensor().map_or(0, |(_, z)| z);
        let unit = |zero: i32| QuantParams::per_tensor(1.0, zero).map_err(fail);
        let add = |builder: &mut Self, part: &str, op: Op, operands: &[ValueId]| {
            let added = builder.new.add(&format!("{name}_{part}"), op, operands)?;
            Ok::<ValueId, PassError>(added.out())
        };
        let x = add(self, "x_codes", AssumeGrid { params: Some(unit(z_x)?) }.into(), &[x])?;
        let x = add(self, "x_integers", Dequantize {}.into(), &[x])?;
        let mut operands = vec![x, self.new.constant(&format!("{name}_integers"), integers.weights)];
        operands.extend(integers.bias.map(|b| self.new.constant(&format!("{name}_bias_integers"), b)));
        let conv = Conv { clamp: Clamp::NONE, ..conv.clone() };
        let rank = self.new.shape(x).rank();
        let sums = self.new.add(name, conv.clone(), &operands)?.out();
        let mut dims = vec![integers.factors.len()];
        if conv.layout == Layout::ChannelsFirst {
            dims.resize(rank - 1, 1);
        }
        let shape = Shape::new(dims).map_err(|e| fail(e.into()))?;
        let factors = Tensor::from_vec(shape, integers.factors).map_err(|e| fail(e.into()))?;
        let factors = self.new.constant(&format!("{name}_factors"), factors);
        let mut y = add(self, "steps", Binary { kind: BinaryKind::Mul }.into(), &[sums, factors])?;
        let grid = target.grid;
        if (grid.lo, grid.hi) != (0, 255) {
            let [lo, hi] = [grid.lo, grid.hi].map(|bound| (bound - grid.zero_point) as f32);
            y = add(self, "bounded", Unary { kind: UnaryKind::Clip { lo, hi } }.into(), &[y])?;
        }
        let quantize = Quantize { dtype: grid.dtype, params: unit(grid.zero_point)? };
        let codes = add(self, "codes", quantize.into(), &[y])?;
        add(self, "y_codes", AssumeGrid { params: Some(grid.params().map_err(fail)?) }.into(), &[codes])
    }
}
