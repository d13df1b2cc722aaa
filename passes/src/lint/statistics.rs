//! Whether samples are such as the model was trained on, by what its batch norms know of the training data.

use super::{Finding, Rule, Subject, channels};
use crate::{ChannelMoments, ChannelStatistics};

/// Fewer samples say nothing here: with 8 of them the statistics of sound samples are up to 0.13 from those of batch norms, with 16
/// up to 0.1, with 50 up to 0.06.
pub const FEWEST_SAMPLES: usize = 16;
/// How far what the first batch norms get may be from their statistics. With 16 sound samples of ImageNet, CIFAR-10 and
/// Fashion-MNIST it is 0.001 to 0.065; with wrong normalisations 0.15 (−1 to 1 for a mean and deviation of the data set), 0.3 (0 to 1
/// for −1 to 1) and more.
const MOST_AT_INPUT: f64 = 0.1;
/// By what factor another normalisation must be nearer to be advised.
const GAIN_OF_NORMALISATION: f64 = 4.0;
/// The same for exchanged channels. Red and blue of photographs are alike, and so are the distances: but of the samples above, in 27
/// sets of 8 to 100, the right order was always nearer, by 1.05 to 7 times, and from 16 on by 1.3 and more.
const GAIN_OF_ORDER: f64 = 1.25;
/// How far any other batch norm may be. Sound ones are up to 0.13.
const MOST_INSIDE: f64 = 0.25;
/// The most that one channel counts: one that hardly ever fires may be very far without any harm.
const MOST_OF_CHANNEL: f64 = 2.0;
/// A channel with a smaller share of its variance beside epsilon is dead, and says nothing.
const LEAST_LIVE: f64 = 1e-3;
/// A normalisation that is in use somewhere is advised rather than one that was fitted, up to this distance from it.
const AS_GOOD: f64 = 1.5;
const AS_GOOD_OFFSET: f64 = 0.01;
/// Channels of an activation that are constant are told of from this share on: ReLUs leave single ones behind in every network.
const DEAD_SHARE: f64 = 0.5;

/// How far the distribution that a batch norm got on samples is from the one that its statistics say: the Kullback-Leibler
/// divergence of two normal distributions, ½(v/σ² + (m − μ)²/σ² − 1 − ln(v/σ²)) in nats, with epsilon added to both variances, as the
/// mean over the channels (none counting more than 2). `None` where the statistics were never updated, or all channels are dead.
///
/// Both are of values behind the batch norm, where distances are the same in units of its deviation.
pub fn divergence(expected: &ChannelStatistics, seen: &ChannelMoments) -> Option<f64> {
    if !expected.is_trained || seen.count() == 0 || seen.mean().len() != expected.mean.len() {
        return None;
    }
    let (mut sum, mut count) = (0.0, 0);
    for (c, (mean, variance)) in seen.mean().iter().zip(seen.variance()).enumerate() {
        let square = expected.deviation[c].powi(2);
        let stabiliser = expected.stabiliser[c];
        if !(square > 0.0 && square - stabiliser >= LEAST_LIVE * square) {
            continue;
        }
        let ratio = (variance + stabiliser) / square;
        let shift = (mean - expected.mean[c]).powi(2) / square;
        let of_channel = 0.5 * (ratio + shift - 1.0 - ratio.max(f64::MIN_POSITIVE).ln());
        // What is not a number is as far as anything can be.
        sum += if of_channel < MOST_OF_CHANNEL { of_channel } else { MOST_OF_CHANNEL };
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}

/// y = factor·x + shift, for all elements of an input.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Normalisation {
    /// What elements are multiplied by.
    pub factor: f64,
    /// What is added then.
    pub shift: f64,
}

/// What to do to the elements of an input so that some batch norms get what they know, for a network that is linear up to them:
/// the factor by which deviations become those of the batch norms (the median over channels), and the shift by which means do, by least
/// squares. Of each batch norm: its statistics, what is behind it on the samples, and the means behind it of inputs of zeros and of
/// ones. `None` where nothing can be told.
pub fn fitted_normalisation(
    batch_norms: &[(&ChannelStatistics, &ChannelMoments, [Vec<f64>; 2])],
) -> Option<Normalisation> {
    let mut ratios = Vec::new();
    for (expected, seen, _) in batch_norms {
        for (c, variance) in seen.variance().into_iter().enumerate() {
            let wanted = expected.deviation[c].powi(2) - expected.stabiliser[c];
            if wanted > LEAST_LIVE * expected.deviation[c].powi(2) && variance > 0.0 {
                ratios.push((wanted / variance).sqrt());
            }
        }
    }
    ratios.sort_by(f64::total_cmp);
    let factor = *ratios.get(ratios.len() / 2)?;
    let (mut of_shift, mut squares) = (0.0, 0.0);
    for (expected, seen, [zeros, ones]) in batch_norms {
        for (c, mean) in seen.mean().iter().enumerate() {
            let square = expected.deviation[c].powi(2);
            if !(square > 0.0 && square - expected.stabiliser[c] >= LEAST_LIVE * square) {
                continue;
            }
            let slope = ones[c] - zeros[c];
            let missing = expected.mean[c] - zeros[c] - factor * (mean - zeros[c]);
            of_shift += slope * missing / square;
            squares += slope * slope / square;
        }
    }
    let shift = if squares > 0.0 { of_shift / squares } else { 0.0 };
    (factor.is_finite() && shift.is_finite() && factor > 0.0).then_some(Normalisation { factor, shift })
}

/// Another way to feed the samples, and how far the first batch norms are from their statistics then.
#[derive(Clone, PartialEq, Debug)]
pub struct InputFit {
    /// Whether it differs in the order of channels alone.
    pub is_order: bool,
    /// Whether it is in use elsewhere, and not fitted to this model.
    pub is_known: bool,
    /// What to do: a clause.
    pub advice: String,
    /// See [`divergence`].
    pub divergence: f64,
}

impl InputFit {
    /// What to say of an input whose samples are so far from the statistics of the first batch norms, and so far when they are fed
    /// in other ways.
    pub fn finding(input: &str, given: f64, others: &[InputFit]) -> Option<Finding> {
        let nearest = others.iter().min_by(|a, b| a.divergence.total_cmp(&b.divergence))?;
        let limit = AS_GOOD * nearest.divergence + AS_GOOD_OFFSET;
        let known = others.iter().filter(|o| o.is_known && o.divergence <= limit);
        let best = known.min_by(|a, b| a.divergence.total_cmp(&b.divergence)).unwrap_or(nearest);
        let is_far = given > MOST_AT_INPUT;
        let subject = || Subject::Input(input.into());
        let distances = |of: &InputFit| {
            format!(
                "what they give the first batch norms is {given:.3} nats a channel from the statistics of the training data, and {:.3} \
                 the other way",
                of.divergence
            )
        };
        if is_far && best.divergence * GAIN_OF_NORMALISATION <= given && !best.is_order {
            let what = format!("samples are not normalised as the training data were: {}", distances(best));
            return Some(Finding::new(Rule::InputNormalisation, subject(), what, &best.advice));
        }
        let order = others.iter().find(|o| o.is_order)?;
        (order.divergence * GAIN_OF_ORDER <= given).then(|| {
            let what = format!("red and blue are exchanged: {}", distances(order));
            Finding::new(Rule::InputChannelOrder, subject(), what, &order.advice)
        })
    }

    /// Whether samples are such as the model was trained on as far as the first batch norms can tell.
    pub fn is_near(given: f64) -> bool {
        given <= MOST_AT_INPUT
    }
}

/// Batch norms that do not fit the samples, though all those before them do. Of each batch norm: the node by whose name its
/// statistics are known, the [`divergence`], and which of the others it depends on.
pub fn mismatches(batch_norms: &[(String, f64, Vec<usize>)]) -> Vec<Finding> {
    let is_far = |i: usize| batch_norms[i].1 > MOST_INSIDE;
    let far: Vec<usize> = (0..batch_norms.len()).filter(|&i| is_far(i)).collect();
    let first = far.iter().copied().filter(|&i| !batch_norms[i].2.iter().any(|&j| is_far(j)));
    let finding = |i: usize| {
        let (name, divergence, _) = &batch_norms[i];
        let behind = far.iter().filter(|&&j| batch_norms[j].2.contains(&i)).count();
        let more = match behind {
            0 => String::new(),
            1 => "; one behind it, which may follow from it".into(),
            n => format!("; {n} behind it, which may follow from it"),
        };
        let what = format!(
            "the statistics of its batch norm are {divergence:.3} nats a channel from what it gets on the samples (up to {MOST_INSIDE} \
             is usual){more}"
        );
        let advice = "give samples such as the model was trained on, preprocessed alike; if they are, recompute the statistics \
                      (--reestimate-bn)";
        Finding::new(Rule::BatchNormMismatch, Subject::Node(name.clone()), what, advice)
    };
    first.map(finding).collect()
}

/// The least and the largest element of each channel of a value over samples.
#[derive(Clone, PartialEq, Debug)]
pub struct ActiveChannels {
    least: Vec<f32>,
    most: Vec<f32>,
}

impl ActiveChannels {
    /// Of so many channels, of which nothing was seen yet.
    pub fn none(channels: usize) -> ActiveChannels {
        ActiveChannels { least: vec![f32::INFINITY; channels], most: vec![f32::NEG_INFINITY; channels] }
    }

    /// Takes in the elements of a tensor whose axis of channels has `inner` elements behind it for each.
    pub fn add(&mut self, elements: &[f32], inner: usize) {
        let block = inner.saturating_mul(self.least.len()).max(1);
        for block in elements.chunks_exact(block) {
            let ends = self.least.iter_mut().zip(&mut self.most);
            for ((least, most), run) in ends.zip(block.chunks_exact(inner.max(1))) {
                for x in run {
                    (*least, *most) = (least.min(*x), most.max(*x));
                }
            }
        }
    }

    /// Takes in what was seen elsewhere of the same channels.
    pub fn merge(&mut self, other: &ActiveChannels) {
        self.least.iter_mut().zip(&other.least).for_each(|(a, b)| *a = a.min(*b));
        self.most.iter_mut().zip(&other.most).for_each(|(a, b)| *a = a.max(*b));
    }

    /// What to say of a node with such a result on so many samples.
    pub fn finding(&self, node: &str, samples: usize) -> Option<Finding> {
        let count = self.least.len();
        let is_constant = |(least, most): &(&f32, &f32)| least == most;
        let constant = self.least.iter().zip(&self.most).filter(is_constant).count();
        let seen = self.least.iter().zip(&self.most).all(|(least, most)| least <= most);
        if !seen || count == 0 {
            return None;
        }
        if constant == count {
            let what = format!("every channel has the same result on all {samples} samples");
            let advice = "look at the layers before it: nothing of the input comes through";
            return Some(Finding::new(Rule::ActivationConstant, Subject::Node(node.into()), what, advice));
        }
        (constant as f64 >= DEAD_SHARE * count as f64).then(|| {
            let what =
                format!("{} the same result, mostly 0, on all {samples} samples", channels(constant, count));
            let advice = "give more varied samples; if it stays, these channels are dead, and may be removed to save time";
            Finding::new(Rule::ActivationDeadChannels, Subject::Node(node.into()), what, advice)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::tests::Random;

    /// Four channels behind a batch norm.
    fn statistics() -> ChannelStatistics {
        ChannelStatistics {
            axis: 1,
            mean: vec![0.0, 1.0, -2.0, 0.5],
            deviation: vec![1.0, 0.5, 3.0, 1.0],
            stabiliser: vec![0.0, 0.001, 0.0, 0.99999],
            batch_norm: "bn".into(),
            is_trained: true,
        }
    }

    /// Elements with these statistics, multiplied and shifted.
    fn seen(factor: f32, shift: f32) -> ChannelMoments {
        let (of, mut random) = (statistics(), Random(7));
        let mut elements = Vec::new();
        for _ in 0..400 {
            for c in 0..4 {
                elements
                    .push(factor * (of.mean[c] as f32 + of.deviation[c] as f32 * random.normal()) + shift);
            }
        }
        ChannelMoments::of(&elements, 4, 1)
    }

    #[test]
    fn a_divergence_is_small_for_the_right_distribution_alone() {
        let right = divergence(&statistics(), &seen(1.0, 0.0)).unwrap();
        assert!(right < 0.02, "{right}");
        for (factor, shift) in [(0.3, 0.0), (3.0, 0.0), (1.0, 2.0), (255.0, 0.0), (0.0, 0.0), (f32::NAN, 0.0)]
        {
            let wrong = divergence(&statistics(), &seen(factor, shift)).unwrap();
            assert!(wrong > 0.3 && wrong <= MOST_OF_CHANNEL, "{factor} {shift}: {wrong}");
        }
        let untrained = ChannelStatistics { is_trained: false, ..statistics() };
        assert_eq!(divergence(&untrained, &seen(1.0, 0.0)), None);
    }

    #[test]
    fn a_normalisation_is_found_by_what_batch_norms_know() {
        // The network computes x, 2·x, −x and x of one input channel; its batch norms know x/64 − 1.
        let slopes = [1.0, 2.0, -1.0, 1.0];
        let mut random = Random(3);
        let pixels: Vec<f32> = (0..500).map(|_| 255.0 * random.uniform()).collect();
        let of = |scale: f32, shift: f32| -> ChannelMoments {
            let elements: Vec<f32> =
                pixels.iter().flat_map(|x| slopes.map(|s| s * (x * scale + shift) + 0.25)).collect();
            ChannelMoments::of(&elements, 4, 1)
        };
        let trained = of(1.0 / 64.0, -1.0);
        let expected = ChannelStatistics {
            mean: trained.mean().to_vec(),
            deviation: trained.variance().iter().map(|v| v.sqrt()).collect(),
            stabiliser: vec![0.0; 4],
            ..statistics()
        };
        let zeros = vec![0.25; 4];
        let ones = slopes.map(|s| f64::from(s) + 0.25).to_vec();
        let fit = fitted_normalisation(&[(&expected, &of(1.0, 0.0), [zeros, ones])]).unwrap();
        assert!((fit.factor * 64.0 - 1.0).abs() < 1e-4 && (fit.shift + 1.0).abs() < 1e-4, "{fit:?}");
        assert_eq!(fitted_normalisation(&[]), None);
    }

    #[test]
    fn an_input_is_judged_by_what_is_nearer() {
        let other = |is_order, is_known, divergence| InputFit {
            is_order,
            is_known,
            advice: format!("order {is_order}, known {is_known}"),
            divergence,
        };
        let judge = |given, others: &[InputFit]| InputFit::finding("x", given, others);
        // As it is with sound samples: near, and the other order is farther away.
        assert_eq!(judge(0.06, &[other(true, true, 0.08), other(false, true, 0.5)]), None);
        assert_eq!(judge(0.01, &[other(true, true, 0.009), other(false, false, 0.001)]), None);
        assert_eq!(judge(0.5, &[]), None);
        // Nothing that helps: it is not the input.
        assert_eq!(judge(0.9, &[other(true, true, 0.8), other(false, false, 0.4)]), None);
        let order = judge(0.03, &[other(true, true, 0.02), other(false, true, 0.4)]).unwrap();
        assert_eq!((order.rule, &order.advice[..5]), (Rule::InputChannelOrder, "order"));
        let scale =
            judge(0.5, &[other(true, true, 0.4), other(false, true, 0.02), other(false, false, 0.015)]);
        let scale = scale.unwrap();
        assert_eq!(
            (scale.rule, scale.advice.as_str()),
            (Rule::InputNormalisation, "order false, known true")
        );
        let fitted = judge(0.5, &[other(false, true, 0.2), other(false, false, 0.015)]).unwrap();
        assert_eq!(fitted.advice, "order false, known false");
    }

    #[test]
    fn the_first_batch_norm_that_does_not_fit_is_named() {
        let of = |distances: [f64; 3]| {
            let [a, b, c] = distances;
            mismatches(&[("a".into(), a, vec![]), ("b".into(), b, vec![0]), ("c".into(), c, vec![0, 1])])
        };
        assert_eq!(of([0.05, 0.13, 0.2]), []);
        let found = of([0.05, 1.5, 0.7]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].subject, Subject::Node("b".into()));
        assert!(found[0].what.contains("one behind it"), "{}", found[0]);
    }

    #[test]
    fn constant_channels_are_counted() {
        let mut channels = ActiveChannels::none(3);
        assert_eq!(channels.finding("conv", 0), None);
        channels.add(&[0.0, 0.0, 1.0, 2.0, 5.0, 5.0], 2);
        let found = channels.finding("conv", 1).unwrap();
        assert_eq!((found.rule, found.level), (Rule::ActivationDeadChannels, super::super::Level::Hint));
        assert!(found.what.starts_with("2 of 3 channels have the same result"), "{found}");
        let mut more = ActiveChannels::none(3);
        more.add(&[0.0, 0.0, 1.0, 2.0, 5.0, 6.0], 2);
        channels.merge(&more);
        assert_eq!(channels.finding("conv", 2), None);
        let mut dead = ActiveChannels::none(2);
        dead.add(&[0.0, 1.0, 0.0, 1.0], 1);
        assert_eq!(dead.finding("conv", 2).unwrap().rule, Rule::ActivationConstant);
    }
}
