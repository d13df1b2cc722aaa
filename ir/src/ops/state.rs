//! Attention by a state that is written and read token by token.

use super::Operator;
use crate::{DType, OpError, Shape, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// The recurrence of linear attention. Of each head, with a state S of `[key size, value size]` and, for token t, a query q,
/// a key k, a value v, a decay g and a rate β:
///
/// ```text
/// S ← exp(g)·S                    if it decays
/// v ← β·(v − Sᵀ·k)                if it corrects
/// S ← S + k·vᵀ
/// o = Sᵀ·q
/// ```
///
/// Operands of f32: queries `[batch, tokens, heads·group, size]`, keys `[batch, tokens, heads, size]`, values
/// `[batch, tokens, heads, value size]`, the state `[batch, heads, size, value size]`; then decays `[batch, tokens, heads,
/// size or 1]` and rates `[batch, tokens, heads or 1]`, if there are any. Results: outputs `[batch, tokens, heads·group, value
/// size]` and the state after the last token. Sums go along the key, in order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LinearAttention {
    /// Whether the state decays.
    pub decays: bool,
    /// Whether only what the state does not already give for a key is written.
    pub corrects: bool,
}

/// Extents of all operands.
#[derive(Clone, Copy)]
struct Extents {
    batch: usize,
    tokens: usize,
    heads: usize,
    group: usize,
    size: usize,
    value: usize,
}

impl LinearAttention {
    fn extents(&self, operands: &[&TensorType]) -> Result<Extents, OpError> {
        let expected = 4 + usize::from(self.decays) + usize::from(self.corrects);
        if operands.len() != expected {
            return Err(OpError::Arity { expected: expected.to_string(), got: operands.len() });
        }
        let misfit = || {
            let types: Vec<String> = operands.iter().map(|t| t.to_string()).collect();
            OpError::shape(format!(
                "queries, keys, values and a state of f32 do not fit: {}",
                types.join(", ")
            ))
        };
        let dims: Vec<&[usize]> = operands.iter().map(|t| t.shape.dims()).collect();
        let (&[batch, tokens, all, size], &[_, _, heads, _], &[_, _, _, value]) = (dims[0], dims[1], dims[2])
        else {
            return Err(misfit());
        };
        let fits = operands.iter().all(|t| t.dtype == DType::F32 && t.quant.is_none())
            && heads > 0
            && all.is_multiple_of(heads)
            && dims[1] == [batch, tokens, heads, size]
            && dims[2] == [batch, tokens, heads, value]
            && dims[3] == [batch, heads, size, value]
            && (!self.decays || [size, 1].iter().any(|&n| dims[4] == [batch, tokens, heads, n]))
            && (!self.corrects || [heads, 1].iter().any(|&n| dims[expected - 1] == [batch, tokens, n]));
        if !fits {
            return Err(misfit());
        }
        Ok(Extents { batch, tokens, heads, group: all / heads, size, value })
    }
}

impl Operator for LinearAttention {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let Extents { batch, tokens, heads, group, value, .. } = self.extents(operands)?;
        let outputs = Shape::new([batch, tokens, heads * group, value])?;
        Ok(vec![TensorType::new(DType::F32, outputs), operands[3].clone()])
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let e = self.extents(types)?;
        let slices = operands.iter().map(|t| t.as_slice::<f32>()).collect::<Result<Vec<_>, _>>()?;
        let (queries, keys, values) = (slices[0], slices[1], slices[2]);
        let decays = self.decays.then(|| slices[4]);
        let rates = self.corrects.then(|| slices[slices.len() - 1]);
        let mut states = slices[3].to_vec();
        let mut outputs = vec![0f32; results[0].shape.elements()];
        let mut written = vec![0f32; e.value];
        for (b, t, h) in places(&e) {
            let token = b * e.tokens + t;
            let row = token * e.heads + h;
            let state = &mut states[(b * e.heads + h) * e.size * e.value..][..e.size * e.value];
            let key = &keys[row * e.size..][..e.size];
            written.copy_from_slice(&values[row * e.value..][..e.value]);
            if let Some(decays) = decays {
                let each = decays.len() / (e.batch * e.tokens * e.heads);
                decay(state, &decays[row * each..][..each], &e);
            }
            if let Some(rates) = rates {
                let each = rates.len() / (e.batch * e.tokens);
                let rate = rates[token * each + if each == 1 { 0 } else { h }];
                let mut known = vec![0f32; e.value];
                read(state, key, &mut known);
                written.iter_mut().zip(&known).for_each(|(v, known)| *v = rate * (*v - known));
            }
            for (line, &k) in state.chunks_exact_mut(e.value.max(1)).zip(key) {
                line.iter_mut().zip(&written).for_each(|(s, &v)| *s += k * v);
            }
            for q in 0..e.group {
                let at = token * e.heads * e.group + h * e.group + q;
                read(state, &queries[at * e.size..][..e.size], &mut outputs[at * e.value..][..e.value]);
            }
        }
        Ok(vec![
            Tensor::from_vec(results[0].shape.clone(), outputs)?,
            Tensor::from_vec(results[1].shape.clone(), states)?,
        ])
    }

    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let Ok(e) = self.extents(operands) else { return 0 };
        let state = (e.size as u64).saturating_mul(e.value as u64);
        let rounds = (e.batch as u64).saturating_mul(e.tokens as u64).saturating_mul(e.heads as u64);
        rounds.saturating_mul(state).saturating_mul(e.group as u64 + 2)
    }
}

/// Batch, token and head, tokens of a head in order.
fn places(e: &Extents) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let Extents { batch, tokens, heads, size, value, .. } = *e;
    let tokens = if size * value == 0 { 0 } else { tokens };
    (0..batch).flat_map(move |b| (0..tokens).flat_map(move |t| (0..heads).map(move |h| (b, t, h))))
}

fn decay(state: &mut [f32], decays: &[f32], e: &Extents) {
    let factor = |i: usize| crate::numerics::math::exp(decays[if decays.len() == 1 { 0 } else { i }]);
    for (i, line) in state.chunks_exact_mut(e.value.max(1)).enumerate() {
        let factor = factor(i);
        line.iter_mut().for_each(|s| *s *= factor);
    }
}

/// Sᵀ·k.
fn read(state: &[f32], key: &[f32], y: &mut [f32]) {
    y.fill(0.0);
    for (line, &k) in state.chunks_exact(y.len().max(1)).zip(key) {
        y.iter_mut().zip(line).for_each(|(y, &s)| *y += k * s);
    }
}
