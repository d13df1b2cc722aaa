//! What looks wrong with calibration data.

use crate::calibrate::{MOST_FINGERPRINTS, Seen};

/// Fewer samples than this leave ranges to chance.
const FEW_SAMPLES: u64 = 8;

/// Warnings about the samples, one sentence each; from what was seen of all values.
pub(crate) fn lint(seen: &[&Seen], samples: u64) -> Vec<String> {
    let mut warnings = Vec::new();
    if samples > 0 && samples < FEW_SAMPLES {
        warnings.push(format!(
            "only {samples} calibration samples: ranges depend on chance below about {FEW_SAMPLES}, \
             and a few hundred are better"
        ));
    }
    for s in seen {
        if s.not_finite > 0 {
            warnings.push(format!(
                "`{}`: {} of {} elements are not finite and were left out",
                s.name, s.not_finite, s.elements
            ));
        }
    }
    for s in seen.iter().filter(|s| s.is_input && s.samples > 0) {
        lint_input(s, &mut warnings);
    }
    warnings
}

fn lint_input(s: &Seen, warnings: &mut Vec<String>) {
    let distinct = s.distinct.len() as u64;
    if s.distinct.len() < MOST_FINGERPRINTS && distinct < s.samples {
        warnings.push(format!(
            "input `{}`: {} of {} samples are copies of others",
            s.name,
            s.samples - distinct,
            s.samples
        ));
    }
    if s.constant > 0 {
        warnings.push(format!(
            "input `{}`: {} of {} samples are constant (all elements equal)",
            s.name, s.constant, s.samples
        ));
    }
    if s.integral && s.min >= 0.0 && s.max > 15.0 && s.max <= 255.0 {
        warnings.push(format!(
            "input `{}`: whole numbers from {} to {}, like pixels that were not normalised; if the model was trained \
             on normalised images, give the preprocessing",
            s.name, s.min, s.max
        ));
    } else if s.min.abs().max(s.max.abs()) > 1e4 {
        warnings.push(format!(
            "input `{}`: values from {} to {}, larger than networks are usually trained on",
            s.name, s.min, s.max
        ));
    }
}
