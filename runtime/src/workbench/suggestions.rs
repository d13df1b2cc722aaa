//! What to try next: rules that follow from the facts. `docs/report.md` lists them.

use super::{
    facts::{Computed, Facts, LayerFacts, OUTLYING_DB, Suggestion, TimeOf, UNUSED_BITS},
    time::milliseconds,
};
use crate::{Calibrator, Choice, Precision, WeightBits};
use qcc_ir::numerics::RequantMode;
use qcc_passes::{Repairs, WeightGrid};

/// Calibration samples below which more are worth having.
const FEW_SAMPLES: u64 = 64;
/// How many times further than 99.99 % of its values a grid reaches that outliers have stretched.
const STRETCHED: f64 = 2.0;
/// Share of values beyond the grid that is too much.
const SATURATED: f64 = 0.001;
/// Share of the noise of a layer that its weights make, and share of the layers of which that is true, from which on rounding
/// weights better pays.
const BY_WEIGHTS: f64 = 0.25;
const OF_LAYERS: f64 = 0.25;
/// Signal-to-noise ratio of the results that needs no more care, in dB.
const GOOD_DB: f64 = 30.0;
/// Share of a run that requantization or conversions may take.
const MUCH_TIME: f64 = 0.15;
/// Share of a run that compute-bound layers may lose.
const MUCH_LOST: f64 = 0.25;
/// Where the facts of what is suggested are written.
const NEXT_JSON: &str = "next.json";
/// Layers that are pinned at once.
const MOST_PINS: usize = 4;

/// What to try, by these facts, the most promising first. Only what applies, and has not been done yet.
pub fn suggestions(facts: &Facts) -> Vec<Suggestion> {
    const RULES: [fn(&Facts) -> Option<Suggestion>; 15] = [
        real_samples,
        per_channel,
        dynamic,
        equalize,
        other_range,
        wider_range,
        round_and_correct,
        measure_calibrators,
        keep_float,
        search,
        more_samples,
        pin_slow,
        cheaper_requantization,
        narrow_weights,
        tune,
    ];
    let mut suggestions: Vec<Suggestion> = RULES.iter().filter_map(|rule| rule(facts)).collect();
    suggestions.extend(all_at_once(&suggestions));
    suggestions
        .into_iter()
        .map(|mut suggestion| {
            // Tilings and searches are for a file that is compiled.
            let own = facts
                .conditions
                .command
                .as_ref()
                .filter(|_| !suggestion.options.iter().any(|o| o == "--tune" || o == "--min-sqnr"));
            suggestion.command = own.map(|c| with_options(c, &suggestion.options));
            suggestion
        })
        .collect()
}

/// All repairs and the first calibrator that are suggested.
fn all_at_once(suggestions: &[Suggestion]) -> Option<Suggestion> {
    let of = |flag: &'static str| {
        let with = suggestions.iter().filter(move |s| s.options.first().is_some_and(|o| o == flag));
        with.filter_map(|s| s.options.get(1)).map(String::as_str).collect::<Vec<&str>>()
    };
    let (mut repairs, calibrators) = (Vec::new(), of("--calibrator"));
    for word in of("--repair").into_iter().flat_map(|list| list.split(',')) {
        if !repairs.contains(&word) {
            repairs.push(word);
        }
    }
    // What is measured has the others among what it tries.
    let repairs = if repairs.contains(&"auto") { "auto".into() } else { repairs.join(",") };
    let mut options = if repairs.is_empty() { Vec::new() } else { vec!["--repair", repairs.as_str()] };
    options.extend(calibrators.first().into_iter().flat_map(|c| ["--calibrator", *c]));
    let is_more =
        suggestions.iter().all(|s| s.options.iter().map(String::as_str).ne(options.iter().copied()));
    if options.is_empty() || !is_more {
        return None;
    }
    suggest(
        "Ranges and repairs together",
        "They are about different errors, and mostly add up.".into(),
        None,
        &options,
    )
}

/// What there is to say about one layer, a sentence each: of what the rules look at.
pub fn remarks(facts: &Facts, layer: &LayerFacts) -> Vec<String> {
    let mut remarks = Vec::new();
    let local = layer.error.local.filter(|d| facts.median_local().is_some_and(|m| m.0 - d.0 >= OUTLYING_DB));
    if let Some(local) = local {
        let cause = facts.cause(layer).map_or(String::new(), |cause| format!(", mostly by {cause}"));
        remarks.push(format!("It loses far more than other layers: {local} alone{cause}."));
    }
    if let Some(c) = layer.channels.as_ref().filter(|c| c.unused_bits >= UNUSED_BITS && layer.grid.is_some())
    {
        remarks.push(format!(
            "Channel {} sets the grid for all {}: the median channel has {:.1} of 8 bits left for its values.",
            c.largest,
            c.channels,
            (8.0 - c.unused_bits).max(0.0)
        ));
    }
    if let Some(stretch) = stretch(layer).filter(|s| *s >= STRETCHED) {
        remarks.push(format!(
            "A few outliers stretch its grid to {stretch:.1} times what 99.99 % of its values need."
        ));
    }
    if let Some(s) = layer.error.saturation.filter(|s| s.below + s.above > SATURATED) {
        remarks
            .push(format!("{} of its values are beyond its grid, and clipped.", percent(s.below + s.above)));
    }
    if let Some(w) = layer.weights.as_ref().filter(|w| w.zero_channels > 0) {
        remarks.push(format!(
            "{} of its {} output channels have no weights but zeros.",
            w.zero_channels, w.channels
        ));
    }
    if let Some(slow) = facts.time.slower.iter().find(|s| s.name == layer.name) {
        remarks.push(format!(
            "It is slower than in float: {} instead of {}.",
            milliseconds(slow.ms),
            milliseconds(slow.float_ms)
        ));
    }
    remarks
}

/// A command line with other options: those that may be given once are replaced. What it writes goes to other files, to be
/// compared.
fn with_options(command: &[String], options: &[String]) -> Vec<String> {
    let mut made: Vec<String> = command.to_vec();
    let given = options.iter().map(String::as_str).filter(|o| o.starts_with("--") && *o != "--pin");
    for flag in given.chain(["-o", "--output", "--json"]) {
        let with_value = format!("{flag}=");
        while let Some(at) = made.iter().position(|word| word == flag || word.starts_with(&with_value)) {
            let has_value = made[at] == flag && made.get(at + 1).is_some_and(|next| !next.starts_with("--"));
            made.drain(at..=at + usize::from(has_value));
        }
    }
    made.extend(options.iter().cloned());
    made.extend(["-o", "next.html", "--json", NEXT_JSON].map(String::from));
    made
}

/// The command line that compares these facts with those of a suggestion that was followed; where they were written as JSON.
pub fn comparison(facts: &Facts) -> Option<Vec<String>> {
    let command = facts.conditions.command.as_ref()?;
    let at = command.iter().position(|word| word == "--json" || word.starts_with("--json="))?;
    let own = match command[at].strip_prefix("--json=") {
        Some(file) => file,
        None => command.get(at + 1)?,
    };
    Some(["report", "--compare", own, NEXT_JSON, "-o", "compare.html"].map(String::from).to_vec())
}

fn suggest(title: &str, reason: String, effect: Option<&str>, options: &[&str]) -> Option<Suggestion> {
    Some(Suggestion {
        title: title.into(),
        reason,
        effect: effect.map(Into::into),
        options: options.iter().map(|o| (*o).into()).collect(),
        command: None,
    })
}

/// Whether grids are chosen by qcc, on real samples.
fn is_calibrated_on_data(facts: &Facts) -> bool {
    !facts.conditions.brings_grids && facts.conditions.calibration.as_ref().is_some_and(|c| !c.is_made_up)
}

fn results_db(facts: &Facts) -> Option<f64> {
    let subject = facts.subject()?;
    let of_images = subject.accuracy.and_then(|a| a.sqnr);
    of_images.or(subject.sqnr).map(|d| d.0)
}

/// Ranges come from nothing real.
fn real_samples(facts: &Facts) -> Option<Suggestion> {
    let calibration = facts.conditions.calibration.as_ref().filter(|c| c.is_made_up)?;
    let what = match calibration.batch_norms {
        0 => "from noise, so that accuracy means nothing".to_string(),
        n => format!("from what {n} batch norms tell of the training data"),
    };
    suggest(
        "Calibrate on real inputs",
        format!("The ranges of activations come {what}."),
        Some("A few hundred typical inputs are enough."),
        &["--calibrate", "SAMPLES"],
    )
}

fn per_channel(facts: &Facts) -> Option<Suggestion> {
    let is_ours = facts.conditions.weights == WeightGrid::PerTensor && is_quantized(facts);
    let spreads = facts.layers.iter().filter_map(|l| Some((l.name.as_str(), l.weights.as_ref()?.spread)));
    let (layer, spread) = spreads.max_by(|a, b| a.1.total_cmp(&b.1))?;
    (is_ours && spread > 2.0).then_some(())?;
    suggest(
        "A scale for each output channel of weights",
        format!(
            "All channels share one scale, and in `{layer}` the largest weights are {spread:.1} times those of the median channel."
        ),
        Some("It takes no time."),
        &["--weights", "per-channel"],
    )
}

fn is_quantized(facts: &Facts) -> bool {
    matches!(facts.conditions.precision, Precision::Int8 | Precision::FakeQuant)
        && !facts.conditions.brings_grids
}

fn equalize(facts: &Facts) -> Option<Suggestion> {
    let repairs = facts.conditions.repairs.unwrap_or(Repairs::NONE);
    let is_measured = facts.conditions.calibration.as_ref().is_some_and(|c| c.is_measured);
    if !is_calibrated_on_data(facts) || repairs.equalize > 0.0 || is_measured {
        return None;
    }
    let unused = |l: &'_ LayerFacts| {
        l.channels.as_ref().filter(|_| l.computed != Computed::Float).map(|c| c.unused_bits)
    };
    let wide: Vec<&LayerFacts> =
        facts.layers.iter().filter(|l| unused(l).is_some_and(|b| b >= UNUSED_BITS)).collect();
    let worst = wide.iter().max_by(|a, b| unused(a).unwrap_or(0.0).total_cmp(&unused(b).unwrap_or(0.0)))?;
    let (channel, bits) = (worst.channels.as_ref()?.largest, unused(worst)?);
    suggest(
        "Measure whether equal channels pay",
        format!(
            "Channels that share a grid have very different ranges, in {}: most of all in `{}`, where channel {channel} is {:.0} times as \
             large as the median one, which has {bits:.1} of 8 bits less.",
            count(wide.len(), "layer"),
            worst.name,
            bits.exp2(),
        ),
        Some(
            "Equalizing them brought SqueezeNet 1.1 from 31.6 to 32.6 dB, and does not pay where weights or bounds are what limits \
             (docs/repairs.md): this measures it.",
        ),
        &["--repair", "auto"],
    )
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn calibrator(facts: &Facts) -> Option<&str> {
    facts.conditions.calibration.as_ref().map(|c| c.calibrator.as_str())
}

/// By how much a grid reaches further than all but the outermost values.
fn stretch(layer: &LayerFacts) -> Option<f64> {
    let (grid, values) = (layer.grid?, layer.values.as_ref()?);
    let (low, high) = (values.percentile(0.01)?, values.percentile(99.99)?);
    let inner = f64::from(high.max(0.0)) - f64::from(low.min(0.0));
    let reach = f64::from(grid.max) - f64::from(grid.min);
    (inner > 0.0).then(|| reach / inner)
}

/// Outliers stretch grids.
fn other_range(facts: &Facts) -> Option<Suggestion> {
    let is_wide = calibrator(facts).is_some_and(|c| c == Calibrator::MinMax.to_string());
    if !is_calibrated_on_data(facts) || !is_wide {
        return None;
    }
    let stretched: Vec<(&LayerFacts, f64)> =
        facts.layers.iter().filter_map(|l| Some((l, stretch(l)?))).filter(|(_, s)| *s >= STRETCHED).collect();
    let (worst, by) = stretched.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    suggest(
        "Leave outliers out of the ranges",
        format!(
            "A few outliers stretch the grids of {}: that of `{}` reaches {by:.1} times as far as 99.99 % of its values.",
            count(stretched.len(), "layer"),
            worst.name
        ),
        Some("It brought SqueezeNet 1.1 from 30.6 to 31.3 dB (docs/calibration.md). It takes no time."),
        &["--calibrator", "mse"],
    )
}

/// Values are clipped.
fn wider_range(facts: &Facts) -> Option<Suggestion> {
    let is_narrow = calibrator(facts).is_some_and(|c| c != Calibrator::MinMax.to_string());
    if !is_calibrated_on_data(facts) {
        return None;
    }
    let clipped = |l: &LayerFacts| l.error.saturation.map_or(0.0, |s| s.below + s.above);
    let layers: Vec<&LayerFacts> = facts.layers.iter().filter(|l| clipped(l) > SATURATED).collect();
    let worst = layers.iter().max_by(|a, b| clipped(a).total_cmp(&clipped(b)))?;
    let reason = format!(
        "{} of the values of `{}` are beyond its grid ({} in all clip more than {} of theirs).",
        percent(clipped(worst)),
        worst.name,
        count(layers.len(), "layer"),
        percent(SATURATED)
    );
    match is_narrow {
        true => suggest("Let grids hold all values", reason, None, &["--calibrator", "min-max"]),
        false => suggest(
            "Calibrate on samples that are like those observed",
            format!("{reason} They were not among the calibration samples."),
            None,
            &["--calibrate", "SAMPLES"],
        ),
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn round_and_correct(facts: &Facts) -> Option<Suggestion> {
    let repairs = facts.conditions.repairs.unwrap_or(Repairs::NONE);
    let Repairs { equalize, scales, .. } = repairs;
    let what = Repairs { equalize, scales, ..Repairs::OF_PRODUCTS };
    if !is_calibrated_on_data(facts) || repairs == what {
        return None;
    }
    let weighted = facts.layers.iter().filter(|l| l.weights.is_some()).filter_map(|l| l.error.causes);
    let (by_weights, all) =
        weighted.fold((0, 0), |(n, all), c| (n + i32::from(c.parameters >= BY_WEIGHTS), all + 1));
    if by_weights == 0 || f64::from(by_weights) < OF_LAYERS * f64::from(all) {
        return None;
    }
    suggest(
        "Round weights so that their errors cancel",
        format!(
            "In {by_weights} of {all} layers with weights, a quarter of the noise or more comes from rounding these; and what \
             rounding shifts the mean of a channel by adds up from layer to layer."
        ),
        Some(
            "It brought EfficientNet-Lite0 from 97.5 to 99.25 % of agreement, from 19.4 to 25.7 dB (docs/repairs.md). It takes no time.",
        ),
        &["--repair", &what.to_string()],
    )
}

fn measure_calibrators(facts: &Facts) -> Option<Suggestion> {
    let is_auto = calibrator(facts).is_some_and(|c| c.starts_with(&Choice::Auto.to_string()));
    let db = results_db(facts).filter(|db| *db < GOOD_DB)?;
    if !is_calibrated_on_data(facts) || is_auto {
        return None;
    }
    suggest(
        "Measure which calibrator errs least",
        format!(
            "Results have a signal-to-noise ratio of {db:.1} dB; below {GOOD_DB:.0} dB another choice of ranges may show."
        ),
        Some("Mostly some tenths of a dB, up to two (docs/calibration.md)."),
        &["--calibrator", "auto"],
    )
}

/// One layer is much worse than the others.
fn keep_float(facts: &Facts) -> Option<Suggestion> {
    if !is_quantized(facts) {
        return None;
    }
    let median = facts.median_local()?;
    let is_worse = |(l, db): &(&LayerFacts, crate::Decibels)| {
        median.0 - db.0 >= OUTLYING_DB && l.computed == Computed::Int8
    };
    let bad: Vec<_> = facts.by_local_error().into_iter().filter(is_worse).take(MOST_PINS).collect();
    let (worst, db) = bad.first()?;
    let extra: f64 = bad.iter().filter_map(|(l, _)| Some(l.time.float_ms? - l.time.total_ms()?)).sum();
    let share = 100.0 * extra.max(0.0) / facts.time.run_ms;
    let options: Vec<String> =
        bad.iter().flat_map(|(l, _)| ["--pin".to_string(), format!("{}=float-jit", l.name)]).collect();
    let cause = facts.cause(worst).unwrap_or_else(|| "rounding".into());
    suggest(
        "Keep what suffers most in float",
        format!(
            "`{}` alone has {db}, the median layer {median}; most of its noise is by {cause}.{}",
            worst.name,
            if bad.len() > 1 {
                format!(" {} it does little better.", alike(bad.len() - 1))
            } else {
                String::new()
            }
        ),
        Some(&format!("Their noise goes, for about {share:.0} % more time and some conversions.")),
        &options.iter().map(String::as_str).collect::<Vec<_>>(),
    )
}

/// dB that a search asks for beyond what there is.
const MORE_DB: f64 = 4.0;

/// No repair is enough.
fn search(facts: &Facts) -> Option<Suggestion> {
    let db = results_db(facts).filter(|db| *db < GOOD_DB)?;
    if !is_calibrated_on_data(facts) || facts.conditions.precision != Precision::Int8 {
        return None;
    }
    let wanted = (db + MORE_DB).round();
    suggest(
        "Find the fewest layers that must be float",
        format!(
            "Results have {db:.1} dB. Which layers in float would bring them to {wanted:.0} dB can be measured."
        ),
        Some(
            "It brought MiniLM-L3 from 21.6 to 29.5 dB with 3 of 51 layers in float (docs/mixed.md). For `qcc compile`, which writes \
             the layers to a file for --policy.",
        ),
        &["--min-sqnr", &format!("{wanted:.0}")],
    )
}

fn alike(others: usize) -> String {
    if others == 1 { "1 layer beside".into() } else { format!("{others} layers beside") }
}

/// Transformers.
fn dynamic(facts: &Facts) -> Option<Suggestion> {
    let macs = |f: fn(&LayerFacts) -> bool| facts.layers.iter().filter(|l| f(l)).map(|l| l.macs).sum::<u64>();
    let (all, matrix) = (macs(|_| true), macs(|l| l.op == "MatMul" && l.weights.is_some()));
    // Of two activations.
    let has_attention = facts.layers.iter().any(|l| l.op == "MatMul" && l.weights.is_none() && l.macs > 0);
    let is_static = is_quantized(facts) && facts.conditions.precision == Precision::Int8;
    (is_static && has_attention && 2 * matrix > all).then_some(())?;
    results_db(facts).is_none_or(|db| db < GOOD_DB).then_some(())?;
    suggest(
        "Quantize activations when the model runs",
        "Most of the arithmetic is matrix products with weights beside products of activations, as in transformers, whose \
         activations have outliers that one grid for all tokens cannot hold."
            .into(),
        Some("MiniLM has a cosine of 0.9997 to float then, at a third of its time (docs/dynamic.md)."),
        &["--precision", "int8-dynamic"],
    )
}

fn more_samples(facts: &Facts) -> Option<Suggestion> {
    let calibration = facts.conditions.calibration.as_ref()?;
    if !is_calibrated_on_data(facts) || calibration.samples >= FEW_SAMPLES {
        return None;
    }
    suggest(
        "Calibrate on more samples",
        format!("Ranges come from {} samples.", calibration.samples),
        Some("Memory does not grow with their number."),
        &["--calibrate", "SAMPLES"],
    )
}

/// Layers that quantization makes slower.
fn pin_slow(facts: &Facts) -> Option<Suggestion> {
    if !is_quantized(facts) {
        return None;
    }
    let is_int8 = |name: &str| facts.layers.iter().any(|l| l.name == name && l.computed == Computed::Int8);
    let slow: Vec<_> = facts.time.slower.iter().filter(|s| is_int8(&s.name)).take(MOST_PINS).collect();
    let worst = slow.first()?;
    let options: Vec<String> =
        slow.iter().flat_map(|s| ["--pin".to_string(), format!("{}=float-jit", s.name)]).collect();
    suggest(
        "Keep in float what is slower in int8",
        format!(
            "{} slower than in float, most of all `{}`: {} instead of {}.",
            if slow.len() == 1 { "1 layer is".into() } else { format!("{} layers are", slow.len()) },
            worst.name,
            milliseconds(worst.ms),
            milliseconds(worst.float_ms)
        ),
        Some("Conversions around it may cost more than is won: compare the reports."),
        &options.iter().map(String::as_str).collect::<Vec<_>>(),
    )
}

fn share_of(facts: &Facts, what: TimeOf) -> f64 {
    facts.time.parts.iter().find(|p| p.what == what).map_or(0.0, |p| p.share)
}

fn cheaper_requantization(facts: &Facts) -> Option<Suggestion> {
    let mode = facts.conditions.requant.filter(|m| matches!(m, RequantMode::Shift | RequantMode::Tflite))?;
    let share = share_of(facts, TimeOf::Requantization);
    (share >= MUCH_TIME).then_some(())?;
    suggest(
        "Requantize with 16-bit multipliers",
        format!("Requantization with `{mode}` takes {:.0} % of the time.", 100.0 * share),
        Some("As cheap as float multipliers, and at most a step off (docs/requantization.md)."),
        &["--requant", RequantMode::Q15.name()],
    )
}

fn narrow_weights(facts: &Facts) -> Option<Suggestion> {
    let conditions = &facts.conditions;
    (conditions.gains_by_narrow_weights && conditions.weight_bits == WeightBits::Eight).then_some(())?;
    let peaks = conditions.host.as_ref()?.peaks;
    suggest(
        "Weights of 7 bits",
        format!(
            "{} has no dot product of bytes: one core reaches {:.0} GMAC/s with weights of 7 bits, and {:.0} with 8.",
            conditions.isa,
            peaks.int8_narrow / 1e9,
            peaks.int8 / 1e9
        ),
        Some("Less accurate: EfficientNet-Lite0 agrees on 94.8 instead of 97.8 % of images (README)."),
        &["--weight-bits", "7"],
    )
}

fn tune(facts: &Facts) -> Option<Suggestion> {
    if facts.conditions.is_tuned {
        return None;
    }
    let lost: f64 = facts
        .layers
        .iter()
        .filter(|l| l.macs > 0 && !l.time.is_memory_bound)
        .filter_map(|l| {
            Some((l.time.quantized_ms? - l.time.requant_ms.unwrap_or(0.0) - l.time.bound_ms).max(0.0))
        })
        .sum();
    let share = lost / facts.time.run_ms;
    (share >= MUCH_LOST).then_some(())?;
    suggest(
        "Measure tilings on this CPU",
        format!(
            "Convolutions and matrix products lose {:.0} % of the run against what arithmetic would allow.",
            100.0 * share
        ),
        Some("Results stay the same. For `qcc compile`, whose .qcc file remembers them."),
        &["--tune"],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_may_stand_once_are_replaced() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        let base = words("report a.onnx --calibrator min-max --repair=bias --pin a=float-jit -o x.html");
        let made = with_options(&base, &words("--calibrator mse --repair rounding,bias --pin b=float-jit"));
        assert_eq!(
            made.join(" "),
            "report a.onnx --pin a=float-jit --calibrator mse --repair rounding,bias --pin b=float-jit -o next.html --json next.json"
        );
        assert_eq!(
            with_options(&words("report a.onnx --json=x.json"), &[]),
            words("report a.onnx -o next.html --json next.json")
        );
    }
}
