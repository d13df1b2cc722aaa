//! What looks wrong with samples, by what a collector has seen of them.

use super::{Finding, MOST_NAMED, Rule, Sample, Subject};
use crate::calibrate::{MOST_FINGERPRINTS, Seen};
use std::collections::{BTreeMap, BTreeSet};

/// Fewer samples than this leave ranges to chance.
const FEW_SAMPLES: u64 = 8;
/// What whole numbers must reach to be pixels and not classes or counts.
const LEAST_PIXEL: f32 = 15.0;
/// Numbers beyond this are larger than networks are usually trained on.
const LARGE: f32 = 1e4;
/// The width of the band that all pixels are in once they were normalised twice: that of numbers from −1 to 1, which 127 was taken off
/// and which were divided by 128, is 2/128. Normalised once it is at least 1.
const NARROW: f32 = 0.05;

/// The numbers of the first samples of a kind, and how many there are. It does not depend on the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Numbers {
    pub(crate) count: u64,
    first: BTreeSet<u64>,
}

impl Numbers {
    pub(crate) fn add(&mut self, number: u64) {
        self.count += 1;
        self.keep(number);
    }

    pub(crate) fn merge(&mut self, other: Numbers) {
        self.count += other.count;
        other.first.into_iter().for_each(|number| self.keep(number));
    }

    fn keep(&mut self, number: u64) {
        self.first.insert(number);
        if self.first.len() > MOST_NAMED {
            self.first.pop_last();
        }
    }

    fn samples(&self) -> Vec<Sample> {
        self.first.iter().map(|&number| Sample { number, file: None, copy_of: None }).collect()
    }
}

/// Which samples are copies of others, by fingerprints of their elements, of the smallest 4,096 of which each has the number of the
/// first sample that has it. It does not depend on the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Distinct {
    first: BTreeMap<u64, u64>,
    /// The first copies, each with its fingerprint.
    copies: BTreeSet<(u64, u64)>,
}

impl Distinct {
    pub(crate) fn add(&mut self, fingerprint: u64, number: u64) {
        let first = self.first.entry(fingerprint).or_insert(number);
        if *first != number {
            let copy = number.max(*first);
            *first = number.min(*first);
            self.keep((copy, fingerprint));
        }
        // Keeps the smallest fingerprints, so that what is kept does not depend on the order.
        if self.first.len() > MOST_FINGERPRINTS {
            self.first.pop_last();
        }
    }

    pub(crate) fn merge(&mut self, other: Distinct) {
        for copy in other.copies {
            self.keep(copy);
        }
        for (fingerprint, number) in other.first {
            self.add(fingerprint, number);
        }
    }

    fn keep(&mut self, copy: (u64, u64)) {
        self.copies.insert(copy);
        if self.copies.len() > MOST_NAMED {
            self.copies.pop_last();
        }
    }

    /// How many differ; `None` where too many do to be told apart.
    fn count(&self) -> Option<u64> {
        (self.first.len() < MOST_FINGERPRINTS).then_some(self.first.len() as u64)
    }

    fn samples(&self) -> Vec<Sample> {
        let copy = |&(number, fingerprint): &(u64, u64)| Sample {
            number,
            file: None,
            copy_of: self.first.get(&fingerprint).copied(),
        };
        self.copies.iter().map(copy).collect()
    }
}

/// Findings about the samples, from what was seen of all values.
pub(crate) fn lint(seen: &[&Seen], samples: u64) -> Vec<Finding> {
    let mut findings = Vec::new();
    if samples > 0 && samples < FEW_SAMPLES {
        findings.push(Finding::new(
            Rule::SamplesTooFew,
            Subject::Samples,
            format!("only {samples} calibration samples: ranges depend on chance below about {FEW_SAMPLES}"),
            "give more of them: a few hundred are better",
        ));
    }
    for s in seen {
        if s.not_finite > 0 {
            findings.push(Finding::new(
                Rule::SamplesNotFinite,
                Subject::Some { of: s.name.clone(), samples: s.with_odd.samples() },
                format!(
                    "{} of {} elements are not finite and were left out, in {} of {} samples",
                    s.not_finite, s.elements, s.with_odd.count, s.samples
                ),
                match s.is_input {
                    true => "leave these samples out, or mend them",
                    false => {
                        "look for what overflows there in float, such as a division by zero or a logarithm"
                    }
                },
            ));
        }
    }
    for s in seen.iter().filter(|s| s.is_input && s.samples > 0) {
        lint_input(s, &mut findings);
    }
    findings
}

fn lint_input(s: &Seen, findings: &mut Vec<Finding>) {
    let some = |samples| Subject::Some { of: s.name.clone(), samples };
    if let Some(distinct) = s.distinct.count().filter(|&n| n < s.samples) {
        findings.push(Finding::new(
            Rule::SamplesIdentical,
            some(s.distinct.samples()),
            format!("{} of {} samples are copies of others", s.samples - distinct, s.samples),
            "give different ones: copies tell nothing new, and a batch of one sample over and over is a fault of what made the batch",
        ));
    }
    if s.constant.count > 0 {
        findings.push(Finding::new(
            Rule::SamplesConstant,
            some(s.constant.samples()),
            format!("{} of {} samples are constant (all elements equal)", s.constant.count, s.samples),
            "leave them out: they are blank pictures, silence, or what stands for a sample that could not be read",
        ));
    }
    let input = || Subject::Input(s.name.clone());
    if s.integral && s.min >= 0.0 && s.max > LEAST_PIXEL && s.max <= 255.0 {
        findings.push(Finding::new(
            Rule::InputNotNormalised,
            input(),
            format!("whole numbers from {} to {}, like pixels that were not normalised", s.min, s.max),
            "give the preprocessing (--mean, --std), if the model was trained on normalised images",
        ));
    } else if s.min.abs().max(s.max.abs()) > LARGE {
        findings.push(Finding::new(
            Rule::InputLarge,
            input(),
            format!("values from {} to {}, larger than networks are usually trained on", s.min, s.max),
            "give the preprocessing (--mean, --std) that the model was trained with",
        ));
    } else if s.is_picture && s.min < s.max && s.max - s.min < NARROW {
        findings.push(Finding::new(
            Rule::InputNormalisedTwice,
            input(),
            format!("pictures whose values are all from {} to {}, as those that were normalised twice", s.min, s.max),
            "normalise once: leave --mean and --std away for arrays that are normalised already, or for a model that does it itself",
        ));
    }
}
