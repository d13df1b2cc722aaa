//! Pools.

use super::{Layout, Operator, Window, arity, conv::per_tensor};
use crate::{DType, OpError, OutputGrid, Shape, TensorType};
use serde::{Deserialize, Serialize};

/// What a pool makes of its window.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum PoolKind {
    /// The largest element; padding does not take part.
    Max,
    /// The sum divided by the number of elements.
    Average {
        /// Whether padding counts as elements of value 0 (what `ceil_mode` adds beyond it never counts).
        count_include_pad: bool,
    },
}

/// Maximum or average over windows. The maximum also of quantized values, whose grid it keeps.
///
/// A global pool is one whose kernel is the whole input.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// What is made of a window.
    pub kind: PoolKind,
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Whether a last, partial window counts.
    pub ceil_mode: bool,
    /// Layout of operand and result.
    pub layout: Layout,
}

/// An average [`Pool`] of quantized values: the integer sum of q − z_x, times s_x/(s_y·count) as a
/// [`Multiplier`](crate::numerics::Multiplier), one rounding. Windows of no element at all give real 0.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QAveragePool {
    /// Kernel extents, strides, dilations, pads.
    pub window: Window,
    /// Whether a last, partial window counts.
    pub ceil_mode: bool,
    /// Whether padding counts as elements of value 0.
    pub count_include_pad: bool,
    /// Layout of operand and result.
    pub layout: Layout,
    /// Grid and bounds of the result.
    pub output: OutputGrid,
}

fn pool_shape(x: &Shape, window: &Window, ceil: bool, layout: Layout) -> Result<Shape, OpError> {
    let (batch, channels, spatial) = layout.split(x)?;
    layout.join(batch, channels, &window.output(&spatial, ceil)?)
}

impl Operator for Pool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let allowed = match self.kind {
            PoolKind::Max => x.quant.is_none() || x.per_tensor().is_some(),
            PoolKind::Average { .. } => x.dtype == DType::F32,
        };
        if !allowed || x.dtype == DType::Bool {
            return Err(OpError::dtype(format!("{:?} pool of {x}", self.kind)));
        }
        let y = pool_shape(&x.shape, &self.window, self.ceil_mode, self.layout)?;
        Ok(vec![x.with_shape(y)])
    }
}

impl Operator for QAveragePool {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        per_tensor(&x, "input")?;
        self.output.check()?;
        let y = pool_shape(&x.shape, &self.window, self.ceil_mode, self.layout)?;
        let taps = self.window.taps() as u64 * 255;
        if taps > i32::MAX as u64 {
            return Err(OpError::too_large(format!(
                "a window of {} elements overflows a 32-bit sum",
                self.window.taps()
            )));
        }
        Ok(vec![TensorType::quantized(self.output.dtype, y, self.output.params()?)?])
    }
}
