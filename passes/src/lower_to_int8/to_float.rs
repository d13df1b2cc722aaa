//! Products of codes by weights whose results have no grid: their sums become floats, and nothing is rounded.

use super::Builder;
use crate::{
    PassError, Record,
    edit::{Product, has_weights},
};
use qcc_ir::{
    DType, NodeId, Op, TensorType, ValueId,
    numerics::WeightSums,
    ops::{QConvToFloat, QMatMulToFloat, ToFloat},
};

impl Builder<'_> {
    /// Whether the node became a product of codes with float results. Bias and residual stay real numbers.
    pub(super) fn unrounded(&mut self, node: NodeId, record: &mut Record) -> Result<bool, PassError> {
        let Some(product) = Product::of(self.old, node).filter(|_| self.multiplies_codes(node)) else {
            return Ok(false);
        };
        let old = self.old.operands(node);
        let mut operands = vec![self.as_codes(old[0])?, self.as_codes(old[1])?];
        let name = self.old.node(node).name.clone();
        if let Err(why) = self.split_weights(node, &product, &mut operands)? {
            record.declined(&name, format!("stays float: {why}"));
            return Ok(false);
        }
        for &v in &old[2..] {
            operands.push(self.as_real(v)?);
        }
        let (op, to, axis) = to_float(product);
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.new.ty(v)).collect();
        let bias = to.bias_slot().map(|slot| operands[slot]);
        if bias.is_some_and(|v| self.new.constant_value(v).is_none()) {
            return Ok(false);
        }
        let weights = self.new.constant_value(operands[1]);
        let sums = weights.map(|w| WeightSums::by_channel(w, axis)).transpose();
        let sums = sums.map_err(|e| PassError::op(&name, "constant", e.into()))?.unwrap_or_default();
        let checked = op.infer(&types).and_then(|_| to.dequantizer(types[1], &sums, None));
        if let Err(why) = checked {
            record.declined(&name, format!("stays float: {why}"));
            return Ok(false);
        }
        let value = self.new.add(&name, op, &operands)?.out();
        self.real.insert(node.out(), value);
        record.applied(&name, "multiplies codes, and its result is not rounded");
        Ok(true)
    }

    /// Whether the node multiplies codes by rounded weights, and nothing rounds its result.
    fn multiplies_codes(&self, node: NodeId) -> bool {
        let is_plane = match self.old.op(node) {
            Some(Op::Conv(c)) => c.window.rank() == 2,
            op => matches!(op, Some(Op::MatMul(_))),
        };
        if !is_plane || !has_weights(self.old, node) || self.ctx.options.keeps_float(self.old, node) {
            return false;
        }
        let operands = self.old.operands(node);
        let is_code = |v: &ValueId| {
            let ty = self.new.ty(*v);
            ty.dtype == DType::U8 && ty.per_tensor().is_some()
        };
        let has_codes = self.codes.get(&operands[0]).is_some_and(is_code);
        let has_rounded_weights = self.rounded_constant(operands[1]).is_some_and(|w| w.dtype().size() == 1);
        has_codes && has_rounded_weights && self.target(node).is_none()
    }
}

/// The op for a product, what becomes of its sums, and the axis of the weights' output channels.
fn to_float(product: Product) -> (Op, ToFloat, usize) {
    match product {
        Product::Conv(c) => {
            let to = ToFloat { grids: false, bias: c.bias, residual: c.residual, clamp: c.clamp };
            let op = QConvToFloat { window: c.window, groups: c.groups, layout: c.layout, to };
            (op.into(), to, QConvToFloat::CHANNEL_AXIS)
        }
        Product::MatMul(m) => {
            let to = ToFloat { grids: false, bias: m.bias, residual: m.residual, clamp: m.clamp };
            (QMatMulToFloat { to }.into(), to, QMatMulToFloat::CHANNEL_AXIS)
        }
    }
}
