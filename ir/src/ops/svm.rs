//! Probabilities of many classes from those of pairs.

use super::{Operator, arity};
use crate::{DType, OpError, Shape, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// Probabilities of classes from those of the first class of each pair, as LIBSVM couples them (Wu, Lin and Weng: Probability
/// Estimates for Multi-class Classification by Pairwise Coupling, 2004, algorithm 2).
///
/// Operand `[rows, classes·(classes − 1)/2]` of f32, pairs (0, 1), (0, 2) … (1, 2) …; result `[rows, classes]`. Within 0.005 a
/// class, after at most 100 rounds or as many as there are classes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CoupleProbabilities {
    /// Number of classes.
    pub classes: usize,
}

impl Operator for CoupleProbabilities {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let [x] = arity(operands)?;
        let pairs = self.classes.checked_mul(self.classes.saturating_sub(1)).map(|n| n / 2);
        let rows = match *x.shape.dims() {
            [rows, n] if Some(n) == pairs && self.classes > 1 && x.dtype == DType::F32 => rows,
            _ => return Err(OpError::shape(format!("takes the pairs of {} classes, got {x}", self.classes))),
        };
        Ok(vec![TensorType::new(DType::F32, Shape::new([rows, self.classes])?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let x = operands[0].as_slice::<f32>()?;
        let pairs = operands[0].shape()[1];
        let rows = x.chunks_exact(pairs).flat_map(|row| coupled(row, self.classes));
        Ok(vec![Tensor::from_vec(results[0].shape.clone(), rows.collect())?])
    }

    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let rows = operands.first().and_then(|x| x.shape.first()).map_or(0, |&n| n as u64);
        let square = (self.classes as u64).saturating_mul(self.classes as u64);
        rows.saturating_mul(square).saturating_mul(100)
    }
}

fn coupled(pairs: &[f32], k: usize) -> Vec<f32> {
    let mut r = vec![0f32; k * k];
    let all = (0..k).flat_map(|i| (i + 1..k).map(move |j| (i, j)));
    for ((i, j), &p) in all.zip(pairs) {
        (r[i * k + j], r[j * k + i]) = (p, 1.0 - p);
    }
    let mut q = vec![0f32; k * k];
    for t in 0..k {
        for j in 0..k {
            q[t * k + j] = match j == t {
                true => (0..k).filter(|&j| j != t).map(|j| r[j * k + t] * r[j * k + t]).sum(),
                false => -r[j * k + t] * r[t * k + j],
            };
        }
    }
    let mut p = vec![1.0 / k as f32; k];
    let enough = 0.005 / k as f32;
    for _ in 0..k.max(100) {
        let mut qp: Vec<f32> =
            q.chunks_exact(k).map(|row| row.iter().zip(&p).map(|(q, p)| q * p).sum()).collect();
        let mut pqp: f32 = p.iter().zip(&qp).map(|(p, qp)| p * qp).sum();
        if qp.iter().all(|qp| (qp - pqp).abs() < enough) {
            break;
        }
        for t in 0..k {
            let diff = (pqp - qp[t]) / q[t * k + t];
            p[t] += diff;
            pqp = (pqp + diff * (diff * q[t * k + t] + 2.0 * qp[t])) / (1.0 + diff) / (1.0 + diff);
            for j in 0..k {
                qp[j] = (qp[j] + diff * q[t * k + j]) / (1.0 + diff);
                p[j] /= 1.0 + diff;
            }
        }
    }
    p
}
