//! Weights that leave 8 bits once their zero points are taken off.

use crate::PassError;
use qcc_ir::{
    Graph, OpError, QuantParams, Shape, Tensor, ValueId,
    ops::{Concat, Gather},
};

/// Weights of 9 bits in parts of 8.
pub(crate) struct WeightParts {
    /// s8, with the second parts behind the first along the axis of input channels.
    pub(crate) weights: Tensor,
    /// The input channels that have second parts.
    pub(crate) twice: Vec<i64>,
}

impl WeightParts {
    /// `None` where two parts are too few. `inner` is the axis of input channels.
    pub(crate) fn of(
        codes: &Tensor,
        params: &QuantParams,
        inner: usize,
    ) -> Result<Option<WeightParts>, OpError> {
        let shape = codes.shape().clone();
        let strides = shape.strides();
        let grid_at = |i: usize| params.axis().map_or(0, |a| i / strides[a] % shape[a]);
        let all = codes.to_i64().ok_or_else(|| OpError::dtype("weights that are not integers"))?;
        let split = |(i, &q): (usize, &i64)| {
            let steps = q - i64::from(params.at(grid_at(i)).1);
            let first = steps.clamp(-128, 127);
            (first as i8, steps - first)
        };
        let parts: Vec<(i8, i64)> = all.iter().enumerate().map(split).collect();
        if parts.iter().any(|(_, second)| !(-128..=127).contains(second)) {
            return Ok(None);
        }
        let (run, channels) = (strides[inner], shape[inner]);
        let mut has_second = vec![false; channels];
        for (i, (_, second)) in parts.iter().enumerate() {
            has_second[i / run % channels] |= *second != 0;
        }
        let twice: Vec<usize> = (0..channels).filter(|&c| has_second[c]).collect();
        let mut weights = Vec::with_capacity(parts.len() * 2);
        for block in parts.chunks((run * channels).max(1)) {
            weights.extend(block.iter().map(|(first, _)| *first));
            for &c in &twice {
                weights.extend(block[c * run..(c + 1) * run].iter().map(|(_, second)| *second as i8));
            }
        }
        let mut dims = shape.to_vec();
        dims[inner] += twice.len();
        let weights = Tensor::from_vec::<i8>(Shape::new(dims)?, weights)?;
        Ok(Some(WeightParts { weights, twice: twice.into_iter().map(|c| c as i64).collect() }))
    }
}

/// Codes with some of their channels once more behind them.
pub(crate) fn with_channels_again(
    graph: &mut Graph,
    name: &str,
    codes: ValueId,
    axis: usize,
    twice: Vec<i64>,
) -> Result<ValueId, PassError> {
    if twice.is_empty() {
        return Ok(codes);
    }
    let again = match twice.len() == graph.shape(codes)[axis] {
        true => codes,
        false => {
            let indices = Shape::new([twice.len()]).map_err(OpError::from);
            let indices = indices.and_then(|shape| Ok(Tensor::from_vec::<i64>(shape, twice)?));
            let indices = indices.map_err(|e| PassError::op(name, "constant", e))?;
            let indices = graph.constant(&format!("{name}_channels"), indices);
            graph.add(&format!("{name}_again"), Gather { axis }, &[codes, indices])?.out()
        }
    };
    Ok(graph.add(&format!("{name}_twice"), Concat { axis }, &[codes, again])?.out())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_no_channels_have_no_parts() {
        let weights = Tensor::from_vec::<u8>(Shape::new([4, 0]).unwrap(), vec![]).unwrap();
        let plain = QuantParams::per_tensor(1.0, 0).unwrap();
        let parts = WeightParts::of(&weights, &plain, 0).unwrap().unwrap();
        assert_eq!((parts.weights.shape().dims(), parts.twice.len()), (&[4, 0][..], 0));
    }
}
