//! Where the time of a quantized model goes, by layer, and what keeps it from being faster.

use super::facts::{
    BoundLayer, Computed, Conversion, FloatLayer, LayerFacts, LayerTimes, SlowerLayer, TimeFacts, TimeOf,
    TimePart,
};
use crate::{Layer, Run};
use qcc_ir::Device;
use std::collections::{BTreeMap, BTreeSet};

/// A layer is slower than in float where it takes this much more of a run's time: less is noise.
const LEAST_DIFFERENCE: f64 = 0.02;
/// And this much more of its own.
const LEAST_FACTOR: f64 = 1.05;
/// What takes less of a run's time is not worth a sentence.
const LEAST_SHARE: f64 = 0.03;

/// Where the rest of a run sets a higher limit than this, products are all that counts.
const WORTH_A_LIMIT: f64 = 20.0;

/// Ops that bring values from floats to codes and back, or to another device.
const CONVERSIONS: [&str; 5] = ["Quantize", "Dequantize", "DynamicQuantize", "Transfer", "FakeQuant"];

/// The layer that a step belongs to: that of its name, or the one whose result it brings to another form. Steps of that kind are
/// called after it, with something behind an underscore: `conv1_dequantize`.
pub(super) fn layer_of<'a>(step: &'a str, layers: &BTreeSet<&str>) -> Option<&'a str> {
    let ends = step.char_indices().rev().filter(|(_, c)| *c == '_').map(|(at, _)| at);
    std::iter::once(step.len()).chain(ends).map(|end| &step[..end]).find(|name| layers.contains(name))
}

/// Whether a step is none of a layer of its own.
fn is_conversion(step: &Layer, layers: &BTreeSet<&str>) -> bool {
    CONVERSIONS.contains(&step.op) || !layers.contains(step.name.as_str())
}

/// The times of layers, by name. Float times are of `float`, all else of `quantized`.
pub(super) fn layer_times(
    float: &Run,
    quantized: &Run,
    layers: &BTreeSet<&str>,
) -> BTreeMap<String, LayerTimes> {
    let mut times: BTreeMap<String, LayerTimes> = BTreeMap::new();
    for step in &float.layers {
        if layers.contains(step.name.as_str()) {
            *times.entry(step.name.clone()).or_default().float_ms.get_or_insert(0.0) += step.ms;
        }
    }
    for step in &quantized.layers {
        let Some(layer) = layer_of(&step.name, layers) else { continue };
        let own = times.entry(layer.into()).or_default();
        if !layers.contains(step.name.as_str()) {
            own.conversion_ms += step.ms;
            continue;
        }
        *own.quantized_ms.get_or_insert(0.0) += step.ms;
        if let Some(ms) = step.requant_ms {
            *own.requant_ms.get_or_insert(0.0) += ms;
        }
        // Of several steps, such as a border and the convolution itself, the one with the larger bound tells which it is.
        if own.kernel.is_none() || step.bound_ms() > own.bound_ms {
            own.is_memory_bound = step.is_memory_bound();
            own.kernel = Some(step.kernel.clone());
        }
        own.bound_ms += step.bound_ms();
        own.bytes += step.bytes.total();
    }
    times
}

/// Where the time of `quantized` goes. `facts` are those of its layers.
pub(super) fn time_facts(float: &Run, quantized: &Run, facts: &[LayerFacts]) -> TimeFacts {
    let names: BTreeSet<&str> = facts.iter().map(|l| l.name.as_str()).collect();
    let run_ms = quantized.latency_ms.median;
    let parts = parts(quantized, &names);
    let mut conversions: Vec<Conversion> = quantized
        .layers
        .iter()
        .filter(|step| is_conversion(step, &names))
        .map(|step| Conversion {
            name: step.name.clone(),
            op: step.op.into(),
            layer: layer_of(&step.name, &names).map(Into::into),
            bytes: step.bytes.total(),
            ms: step.ms,
        })
        .collect();
    conversions.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let mut float_layers: Vec<FloatLayer> = facts
        .iter()
        .filter(|l| matches!(l.computed, Computed::Float | Computed::Interpreter))
        .map(|l| FloatLayer {
            name: l.name.clone(),
            op: l.op.clone(),
            computed: l.computed,
            reason: l.reason.clone(),
            ms: l.time.quantized_ms.unwrap_or(0.0),
        })
        .collect();
    float_layers.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let mut memory_bound: Vec<BoundLayer> = facts
        .iter()
        .filter(|l| l.time.is_memory_bound)
        .filter_map(|l| {
            let LayerTimes { bytes, bound_ms, quantized_ms, .. } = l.time;
            Some(BoundLayer { name: l.name.clone(), bytes, ms: quantized_ms?, bound_ms })
        })
        .collect();
    memory_bound.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let slower = slower(float, quantized, facts);
    let mut time = TimeFacts {
        run_ms,
        float_ms: float.latency_ms.median,
        bound_ms: quantized.lost.bound_ms,
        parts,
        sentences: Vec::new(),
        float_layers,
        conversions,
        memory_bound,
        slower,
    };
    time.sentences = sentences(&time, std::ptr::eq(float, quantized));
    time
}

fn kind_of(step: &Layer, layers: &BTreeSet<&str>) -> TimeOf {
    if step.device == Device::Interpreter.name() {
        TimeOf::Interpreter
    } else if is_conversion(step, layers) {
        TimeOf::Conversions
    } else {
        match (step.device == Device::Int8Jit.name(), step.macs > 0) {
            (true, true) => TimeOf::Int8Products,
            (true, false) => TimeOf::Int8Others,
            (false, true) => TimeOf::FloatProducts,
            (false, false) => TimeOf::FloatOthers,
        }
    }
}

fn parts(run: &Run, layers: &BTreeSet<&str>) -> Vec<TimePart> {
    let mut times: BTreeMap<TimeOf, (usize, f64)> = BTreeMap::new();
    let mut add = |what: TimeOf, ms: f64| {
        let (steps, sum) = times.entry(what).or_default();
        *steps += 1;
        *sum += ms;
    };
    for step in &run.layers {
        let requant = step.requant_ms.unwrap_or(0.0).min(step.ms);
        add(kind_of(step, layers), step.ms - requant);
        if requant > 0.0 {
            add(TimeOf::Requantization, requant);
        }
    }
    if run.lost.between_layers_ms > 0.0 {
        times.insert(TimeOf::BetweenLayers, (run.layers.len(), run.lost.between_layers_ms));
    }
    let total: f64 = times.values().map(|t| t.1).sum();
    let part =
        |(what, (steps, ms))| TimePart { what, steps, ms, share: if total > 0.0 { ms / total } else { 0.0 } };
    let mut parts: Vec<TimePart> = times.into_iter().map(part).collect();
    parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    parts
}

fn slower(float: &Run, quantized: &Run, facts: &[LayerFacts]) -> Vec<SlowerLayer> {
    if std::ptr::eq(float, quantized) {
        return Vec::new();
    }
    let slower = |l: &LayerFacts| {
        let (float_ms, ms) = (l.time.float_ms?, l.time.total_ms()?);
        let difference = ms - float_ms;
        let counts =
            difference > LEAST_DIFFERENCE * quantized.latency_ms.median && ms > LEAST_FACTOR * float_ms;
        counts.then(|| SlowerLayer { name: l.name.clone(), float_ms, ms })
    };
    let mut slower: Vec<SlowerLayer> = facts.iter().filter_map(slower).collect();
    slower.sort_by(|a, b| (b.ms - b.float_ms).total_cmp(&(a.ms - a.float_ms)));
    slower
}

/// A time in microseconds or milliseconds, with three digits at least.
pub(super) fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms < 0.0995 => format!("{:.1} µs", 1e3 * ms),
        ms if ms < 0.9995 => format!("{:.0} µs", 1e3 * ms),
        ms if ms < 9.995 => format!("{ms:.2} ms"),
        ms => format!("{ms:.1} ms"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// How much less time something takes, in words.
pub(super) fn compared(ms: f64, with: f64) -> String {
    if ms <= with {
        format!("{:.2} times as fast as", with / ms)
    } else {
        format!("{:.2} times slower than", ms / with)
    }
}

/// Amdahl's law, in words.
fn sentences(time: &TimeFacts, is_float: bool) -> Vec<String> {
    let mut sentences = Vec::new();
    let share = |what: TimeOf| time.parts.iter().find(|p| p.what == what).map_or(0.0, |p| p.share);
    if time.run_ms <= 0.0 {
        return sentences;
    }
    if !is_float {
        sentences.push(format!(
            "A run takes {}, {} float ({}).",
            milliseconds(time.run_ms),
            compared(time.run_ms, time.float_ms),
            milliseconds(time.float_ms)
        ));
        let products = share(TimeOf::Int8Products);
        if products > 0.0 {
            let rest = (1.0 - products) * time.run_ms;
            let most = time.float_ms / rest;
            sentences.push(if most < WORTH_A_LIMIT {
                format!(
                    "Products of codes take {} of it. If they took no time at all, the rest would still take {}: no faster \
                     products can make the model more than {most:.1} times as fast as float.",
                    percent(products),
                    milliseconds(rest)
                )
            } else {
                format!("Products of codes take {} of it, so there is little else to gain time by.", percent(products))
            });
        }
    }
    let others = time.parts.iter().filter(|p| {
        p.share >= LEAST_SHARE && !matches!(p.what, TimeOf::Int8Products | TimeOf::FloatProducts)
    });
    let gains: Vec<String> = others
        .map(|p| {
            format!(
                "{} {} (without: {:.2} times as fast)",
                p.what.name(),
                percent(p.share),
                1.0 / (1.0 - p.share)
            )
        })
        .collect();
    if !gains.is_empty() {
        sentences.push(format!("What the rest goes into: {}.", gains.join(", ")));
    }
    sentences.push(format!(
        "If every layer ran at the bound that arithmetic and memory of this CPU set for it, a run would take {}: {} of what it \
         takes.",
        milliseconds(time.bound_ms),
        percent(time.bound_ms / time.run_ms)
    ));
    if let Some(worst) = time.slower.first() {
        let plural = if time.slower.len() == 1 { "layer is" } else { "layers are" };
        sentences.push(format!(
            "{} {plural} slower than in float, most of all `{}` ({} instead of {}).",
            time.slower.len(),
            worst.name,
            milliseconds(worst.ms),
            milliseconds(worst.float_ms)
        ));
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_belong_to_the_layer_that_they_are_called_after() {
        let layers: BTreeSet<&str> = ["conv", "conv_1", "a_b"].into();
        let of = |step| layer_of(step, &layers);
        assert_eq!(of("conv"), Some("conv"));
        assert_eq!(of("conv_1"), Some("conv_1"));
        assert_eq!(of("conv_1_quantize_to_float-jit"), Some("conv_1"));
        assert_eq!(of("conv_dequantize"), Some("conv"));
        assert_eq!((of("a"), of("a_bc"), of("")), (None, None, None));
    }
}
