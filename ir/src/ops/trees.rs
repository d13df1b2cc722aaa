//! Decision trees.

use super::{Operator, arity};
use crate::{DType, Element, OpError, Shape, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// How the leaves that the trees lead to become one number a target.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Aggregate {
    Sum,
    /// 0 for a target that no leaf has a weight of.
    Min,
    /// 0 for a target that no leaf has a weight of.
    Max,
}

/// Decision trees over rows of features. A node compares one feature with a number and leads on; a leaf has weights of
/// targets, which are added up (or the least or largest taken), tree after tree.
///
/// Operands: rows `[N, features]`; then of each node the feature (s32), how it compares (u8: 0 `≤`, 1 `<`, 2 `≥`, 3 `>`, 4 `=`,
/// 5 `≠`; with 8 more where NaN compares as true), its number, and where it leads if true and if not (s32: a node, or −1 − a
/// leaf); of each tree its root (s32, likewise); of each leaf where its weights begin, and an end behind the last (s32);
/// and of each weight its target (s32) and the weight. Rows and numbers are f32 or f64, in which all is computed. Result
/// `[N, targets]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TreeEnsemble {
    /// Number of targets.
    pub targets: usize,
    /// What is made of the leaves.
    pub aggregate: Aggregate,
}

/// The operands behind the rows.
struct Forest<'a, T> {
    features: &'a [i32],
    modes: &'a [u8],
    splits: &'a [T],
    branches: [&'a [i32]; 2],
    roots: &'a [i32],
    starts: &'a [i32],
    targets: &'a [i32],
    weights: &'a [T],
}

fn broken(what: &str) -> OpError {
    OpError::attribute(format!("a tree {what}"))
}

impl<'a, T: Element> Forest<'a, T> {
    fn of(operands: &[&'a Tensor]) -> Result<Forest<'a, T>, OpError> {
        Ok(Forest {
            features: operands[1].as_slice()?,
            modes: operands[2].as_slice()?,
            splits: operands[3].as_slice()?,
            branches: [operands[4].as_slice()?, operands[5].as_slice()?],
            roots: operands[6].as_slice()?,
            starts: operands[7].as_slice()?,
            targets: operands[8].as_slice()?,
            weights: operands[9].as_slice()?,
        })
    }

    /// The leaf that a row comes to.
    fn leaf(&self, row: &[T], root: i32) -> Result<usize, OpError> {
        let mut at = root;
        // A path cannot be longer than there are nodes.
        for _ in 0..=self.features.len() {
            let Ok(node) = usize::try_from(at) else { return Ok(!at as usize) };
            let feature = self.features.get(node).and_then(|&f| row.get(usize::try_from(f).ok()?));
            let &x =
                feature.ok_or_else(|| broken("leads to a node or asks for a feature that is not there"))?;
            let is_true = holds(self.modes[node], x, self.splits[node]);
            at = self.branches[usize::from(!is_true)][node];
        }
        Err(broken("leads back to itself"))
    }

    /// The places of a leaf's weights.
    fn weights_of(&self, leaf: usize) -> Result<std::ops::Range<usize>, OpError> {
        let bound = |i: usize| self.starts.get(i).and_then(|&s| usize::try_from(s).ok());
        let range = bound(leaf).zip(bound(leaf + 1)).filter(|(a, b)| a <= b && *b <= self.weights.len());
        range.map(|(a, b)| a..b).ok_or_else(|| broken("leads to a leaf that is not there"))
    }
}

fn holds<T: Element>(mode: u8, x: T, split: T) -> bool {
    let is_nan = x.partial_cmp(&x).is_none();
    if is_nan && mode & 8 != 0 {
        return true;
    }
    match mode & 7 {
        0 => x <= split,
        1 => x < split,
        2 => x >= split,
        3 => x > split,
        4 => x == split,
        _ => x != split,
    }
}

impl TreeEnsemble {
    fn run<T: Element + std::ops::Add<Output = T>>(
        &self,
        operands: &[&Tensor],
        y: &Shape,
        zero: T,
    ) -> Result<Tensor, OpError> {
        let forest = Forest::<T>::of(operands)?;
        let (x, features) = (operands[0].as_slice::<T>()?, operands[0].shape()[1]);
        let mut totals = vec![zero; y.elements()];
        let mut seen = vec![false; self.targets];
        for i in 0..y[0] {
            let row = &x[i * features..][..features];
            let totals = &mut totals[i * self.targets..][..self.targets];
            seen.fill(false);
            for &root in forest.roots {
                for w in forest.weights_of(forest.leaf(row, root)?)? {
                    let target = usize::try_from(forest.targets[w]).ok().filter(|&t| t < self.targets);
                    let target =
                        target.ok_or_else(|| broken("has a weight of a target that is not there"))?;
                    let (total, weight) = (&mut totals[target], forest.weights[w]);
                    let is_first = !std::mem::replace(&mut seen[target], true);
                    match self.aggregate {
                        Aggregate::Sum => *total = *total + weight,
                        Aggregate::Min if is_first || weight < *total => *total = weight,
                        Aggregate::Max if is_first || weight > *total => *total = weight,
                        Aggregate::Min | Aggregate::Max => {}
                    }
                }
            }
        }
        Ok(Tensor::from_vec(y.clone(), totals)?)
    }
}

impl Operator for TreeEnsemble {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let all: [TensorType; 10] = arity(operands)?;
        let [x, features, modes, splits, yes, no, roots, starts, targets, weights] = &all;
        let is = |t: &TensorType, dtype: DType, n: usize| t.dtype == dtype && t.shape.dims() == [n];
        let (nodes, count) = (features.shape.elements(), weights.shape.elements());
        let fits = matches!(x.dtype, DType::F32 | DType::F64)
            && x.shape.rank() == 2
            && [features, yes, no].iter().all(|t| is(t, DType::S32, nodes))
            && is(modes, DType::U8, nodes)
            && is(splits, x.dtype, nodes)
            && is(targets, DType::S32, count)
            && is(weights, x.dtype, count)
            && [roots, starts].iter().all(|t| t.dtype == DType::S32 && t.shape.rank() == 1);
        if !fits {
            let types: Vec<String> = all.iter().map(TensorType::to_string).collect();
            return Err(OpError::shape(format!("rows and trees do not fit: {}", types.join(", "))));
        }
        Ok(vec![TensorType::new(x.dtype, Shape::new([x.shape[0], self.targets])?)])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        _types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let y = &results[0].shape;
        Ok(vec![match results[0].dtype {
            DType::F64 => self.run::<f64>(operands, y, 0.0)?,
            _ => self.run::<f32>(operands, y, 0.0)?,
        }])
    }

    /// About: a path is as long as the logarithm of a tree.
    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let elements = |i: usize| operands.get(i).map_or(0, |t| t.shape.elements() as u64);
        let rows = operands.first().and_then(|x| x.shape.first()).map_or(0, |&n| n as u64);
        let (nodes, trees) = (elements(1), elements(6).max(1));
        let depth = u64::from((nodes / trees).max(1).ilog2() + 1);
        rows.saturating_mul(trees).saturating_mul(depth)
    }
}
