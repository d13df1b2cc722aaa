//! Means and variances of channels, summed up over batches.

/// How the elements of each channel of a value are distributed on samples: their number, mean and variance.
///
/// Batches are added up by the formulas of Chan, Golub and LeVeque (1979), which lose no digits where means are large. The bits
/// of the result depend on how samples were batched and in which order, so add batches in their own.
#[derive(Clone, PartialEq, Debug)]
pub struct ChannelMoments {
    count: u64,
    mean: Vec<f64>,
    /// Sums of squared distances from the mean.
    squares: Vec<f64>,
}

impl ChannelMoments {
    /// Of so many channels, and no elements yet.
    pub fn none(channels: usize) -> ChannelMoments {
        ChannelMoments { count: 0, mean: vec![0.0; channels], squares: vec![0.0; channels] }
    }

    /// Of the elements of a tensor whose axis of so many channels has `inner` elements behind it for each.
    pub fn of(elements: &[f32], channels: usize, inner: usize) -> ChannelMoments {
        let mut moments = ChannelMoments::none(channels);
        let block = channels.saturating_mul(inner);
        if block == 0 || elements.len() < block {
            return moments;
        }
        let runs =
            |c: usize| elements.chunks_exact(block).map(move |block| &block[c * inner..(c + 1) * inner]);
        moments.count = (elements.len() / block * inner) as u64;
        for c in 0..channels {
            let sum: f64 = runs(c).map(|run| run.iter().map(|x| f64::from(*x)).sum::<f64>()).sum();
            let mean = sum / moments.count as f64;
            let square = |x: &f32| (f64::from(*x) - mean) * (f64::from(*x) - mean);
            moments.mean[c] = mean;
            moments.squares[c] = runs(c).map(|run| run.iter().map(square).sum::<f64>()).sum();
        }
        moments
    }

    /// Takes in the elements behind other moments of the same channels.
    pub fn merge(&mut self, other: &ChannelMoments) {
        if other.count == 0 {
            return;
        }
        let (a, b) = (self.count as f64, other.count as f64);
        self.count += other.count;
        let n = a + b;
        let ours = self.mean.iter_mut().zip(&mut self.squares);
        for ((mean, squares), (other_mean, other_squares)) in ours.zip(other.mean.iter().zip(&other.squares))
        {
            let delta = other_mean - *mean;
            *mean += delta * (b / n);
            *squares += other_squares + delta * delta * (a * b / n);
        }
    }

    /// Elements of each channel.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean of each channel.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The variance of each channel, of all elements (divided by their number): what a batch norm in training mode divides by.
    pub fn variance(&self) -> Vec<f64> {
        self.squares.iter().map(|s| s / (self.count.max(1)) as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_batches_are_those_of_all_elements() {
        // Three samples of two channels of four elements, far from zero.
        let elements: Vec<f32> = (0..24).map(|i| 1000.0 + (i * i % 13) as f32).collect();
        let all = ChannelMoments::of(&elements, 2, 4);
        let mut sum = ChannelMoments::none(2);
        sum.merge(&ChannelMoments::of(&elements[..8], 2, 4));
        sum.merge(&ChannelMoments::of(&elements[8..], 2, 4));
        assert_eq!((sum.count(), all.count()), (12, 12));
        for c in 0..2 {
            let of_channel: Vec<f64> = (0..3)
                .flat_map(|n| elements[n * 8 + c * 4..n * 8 + c * 4 + 4].iter().map(|x| f64::from(*x)))
                .collect();
            let mean = of_channel.iter().sum::<f64>() / 12.0;
            let variance = of_channel.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 12.0;
            for moments in [&all, &sum] {
                assert!((moments.mean()[c] - mean).abs() < 1e-9, "{moments:?}");
                assert!((moments.variance()[c] - variance).abs() < 1e-9, "{moments:?}");
            }
        }
        assert_eq!(ChannelMoments::of(&[], 2, 4), ChannelMoments::none(2));
    }
}
