//! Reductions.

use super::{Operator, arity};
use crate::{DType, OpError, Shape, TensorType};
use serde::{Deserialize, Serialize};

/// What a reduction makes of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ReduceKind {
    Sum,
    Mean,
    Max,
    Min,
    Product,
    /// Σ x².
    SumSquare,
    /// Σ |x|.
    L1,
    /// √Σ x².
    L2,
    /// ln Σ x.
    LogSum,
    /// ln Σ eˣ.
    LogSumExp,
}

/// A reduction along axes, elements in row-major order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reduce {
    /// What is made of the elements.
    pub kind: ReduceKind,
    /// The axes that are reduced: ascending, without duplicates; none reduces nothing.
    pub axes: Vec<usize>,
    /// Whether reduced axes stay, with length 1.
    pub keep_dims: bool,
}

impl Operator for Reduce {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        if x.quant.is_some() || x.dtype == DType::Bool {
            return Err(OpError::dtype(format!("takes plain numbers, got {x}")));
        }
        if !self.axes.is_sorted_by(|a, b| a < b) || self.axes.iter().any(|&a| a >= x.shape.rank()) {
            return Err(OpError::attribute(format!("axes {:?} of {x}", self.axes)));
        }
        let dims: Vec<usize> = (0..x.shape.rank())
            .filter_map(|d| match self.axes.contains(&d) {
                false => Some(x.shape[d]),
                true => self.keep_dims.then_some(1),
            })
            .collect();
        let y = Shape::new(dims)?;
        let needs_element = matches!(self.kind, ReduceKind::Max | ReduceKind::Min | ReduceKind::Mean);
        if needs_element && x.dtype.is_integer() && x.shape.elements() == 0 && y.elements() > 0 {
            return Err(OpError::shape(format!("{:?} over no elements of {x}", self.kind)));
        }
        Ok(vec![x.with_shape(y)])
    }
}
