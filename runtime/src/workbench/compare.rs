//! Two runs side by side.

use super::facts::{Facts, LayerFacts};
use crate::Decibels;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What differs between two runs of one model, or of two that are alike.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The first run.
    pub before: Facts,
    /// The second run.
    pub after: Facts,
    /// In words, a sentence each.
    pub verdict: Vec<String>,
    /// How the options differ: what, before, after.
    pub options: Vec<(String, String, String)>,
    /// Layers of either run that are in both, by name: those that changed most first.
    pub layers: Vec<LayerChange>,
    /// Layers of the first run alone.
    pub only_before: Vec<String>,
    /// Layers of the second run alone.
    pub only_after: Vec<String>,
}

/// A figure in both runs.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Change<T> {
    /// In the first run.
    pub before: Option<T>,
    /// In the second run.
    pub after: Option<T>,
}

/// What changed in a layer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LayerChange {
    /// Its name.
    pub name: String,
    /// Its op, in the second run.
    pub op: String,
    /// Number in the first run.
    pub before: usize,
    /// Number in the second run.
    pub after: usize,
    /// Signal-to-noise ratio of the layer alone.
    pub local: Change<Decibels>,
    /// In the quantized network.
    pub cumulative: Change<Decibels>,
    /// Milliseconds, with conversions.
    pub ms: Change<f64>,
    /// How much changed: dB of the layer alone (in the network, where no layer has that), and a dB for each percent of a run's
    /// time.
    pub score: f64,
}

/// Beyond this many dB nothing is noise any more, and differences mean nothing.
const MOST_DB: f64 = 80.0;

/// Sets two runs side by side.
pub fn compare(before: Facts, after: Facts) -> Comparison {
    let numbers: BTreeMap<&str, usize> =
        before.layers.iter().enumerate().map(|(i, l)| (l.name.as_str(), i)).collect();
    let run_ms = before.time.run_ms.max(after.time.run_ms).max(f64::MIN_POSITIVE);
    // What changes in the network goes on in all that follows.
    let is_local = before.layers.iter().chain(&after.layers).any(|l| l.error.local.is_some());
    let mut layers: Vec<LayerChange> = Vec::new();
    let mut only_after = Vec::new();
    for (i, layer) in after.layers.iter().enumerate() {
        match numbers.get(layer.name.as_str()) {
            Some(&n) => layers.push(change([n, i], [&before.layers[n], layer], run_ms, is_local)),
            None => only_after.push(layer.name.clone()),
        }
    }
    layers.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.after.cmp(&b.after)));
    let is_known = |name: &str| after.layers.iter().any(|l| l.name == name);
    let only_before = before.layers.iter().map(|l| &l.name).filter(|n| !is_known(n)).cloned().collect();
    Comparison {
        verdict: verdict(&before, &after, &layers),
        options: options(&before, &after),
        layers,
        only_before,
        only_after,
        before,
        after,
    }
}

fn change(
    numbers: [usize; 2],
    [before, after]: [&LayerFacts; 2],
    run_ms: f64,
    is_local: bool,
) -> LayerChange {
    let both = |f: fn(&LayerFacts) -> Option<Decibels>| Change { before: f(before), after: f(after) };
    let local = both(|l| l.error.local);
    let cumulative = both(|l| l.error.cumulative_int8.or(l.error.cumulative));
    let ms = Change { before: before.time.total_ms(), after: after.time.total_ms() };
    // What is not rounded is exact.
    let db = |d: Option<Decibels>| d.map_or(MOST_DB, |d| d.0.clamp(-MOST_DB, MOST_DB));
    let of = |c: Change<Decibels>| (db(c.after) - db(c.before)).abs();
    let time = (ms.after.unwrap_or(0.0) - ms.before.unwrap_or(0.0)).abs() / run_ms;
    LayerChange {
        name: after.name.clone(),
        op: after.op.clone(),
        before: numbers[0],
        after: numbers[1],
        score: of(if is_local { local } else { cumulative }) + 100.0 * time,
        local,
        cumulative,
        ms,
    }
}

fn verdict(before: &Facts, after: &Facts, layers: &[LayerChange]) -> Vec<String> {
    let mut sentences = Vec::new();
    if before.model != after.model {
        sentences.push(format!("The runs are of two models, `{}` and `{}`.", before.model, after.model));
    }
    let (Some(a), Some(b)) = (before.subject(), after.subject()) else { return sentences };
    let [old, new] = [a, b].map(|c| c.latency_ms.median);
    let ratio = old / new;
    sentences.push(if (0.98..1.02).contains(&ratio) {
        format!("Both take the same time ({}).", super::time::milliseconds(new))
    } else {
        format!(
            "The second is {} the first ({} instead of {}).",
            super::time::compared(new, old),
            super::time::milliseconds(new),
            super::time::milliseconds(old)
        )
    });
    if let (Some(x), Some(y)) = (a.accuracy, b.accuracy) {
        let points = |x: f64, y: f64| format!("{:+.2} points", 100.0 * (y - x));
        let top1 = x.top1.zip(y.top1).map_or(String::new(), |(x, y)| format!(", top-1 by {}", points(x, y)));
        sentences
            .push(format!("Agreement with float changes by {}{top1}.", points(x.agreement, y.agreement)));
    }
    let of = |c: &super::Contender| c.accuracy.and_then(|a| a.sqnr).or(c.sqnr);
    if let (Some(x), Some(y)) = (of(a), of(b)) {
        sentences.push(format!("Results have {y} where they had {x}."));
    }
    if let Some(most) = layers.first().filter(|l| l.score > 0.0) {
        let of = |c: &Change<Decibels>| {
            let word = |d: Option<Decibels>| d.map_or("no rounding".to_string(), |d| d.to_string());
            format!("{} → {}", word(c.before), word(c.after))
        };
        sentences.push(format!(
            "What changed most is `{}`: alone {}, in the network {}.",
            most.name,
            of(&most.local),
            of(&most.cumulative)
        ));
    }
    sentences
}

/// Options and circumstances in which the runs differ.
fn options(before: &Facts, after: &Facts) -> Vec<(String, String, String)> {
    let of = |f: &Facts| {
        let c = &f.conditions;
        let none = || "none".to_string();
        let repairs = c.repairs.map_or_else(none, |r| r.to_string());
        let calibration =
            c.calibration.as_ref().map_or_else(none, |c| format!("{} samples of {}", c.samples, c.origin));
        let pins = c.pins.iter().map(|(n, d)| format!("{n}={d}")).collect::<Vec<_>>().join(", ");
        let images = c.images.as_ref().map_or_else(none, |i| format!("{} of {}", i.count, i.origin));
        [
            ("model", f.model.clone()),
            ("precision", f.subject().map_or_else(none, |s| s.name.clone())),
            ("calibration", calibration),
            ("calibrator", c.calibration.as_ref().map_or_else(none, |c| c.calibrator.clone())),
            ("repairs", repairs),
            ("weights", format!("{:?}, {} bits", c.weights, c.weight_bits.count())),
            ("pins", pins),
            ("float by policy", c.float_layers.join(", ")),
            ("evaluated on", images),
            ("observed on", format!("{} of {}", c.samples.count, c.samples.origin)),
            ("CPU", c.host.as_ref().map_or_else(none, |h| h.cpu.clone())),
            ("tier", c.isa.clone()),
            ("threads", c.threads.to_string()),
            ("qcc", c.qcc.clone()),
        ]
    };
    let pairs = of(before).into_iter().zip(of(after));
    pairs.filter(|(a, b)| a.1 != b.1).map(|((what, a), (_, b))| (what.into(), a, b)).collect()
}
