//! What a page tells of one layer when somebody asks.

use crate::{
    charts,
    figures::{bytes, count, percent, real, time},
    frame::{Charts, chart, marked},
    graph::class,
};
use maud::{Markup, html};
use qcc_runtime::workbench::{Facts, LayerFacts, remarks};

/// The template of the panel for layer number `i`; its charts are added to `charts`.
pub(crate) fn details(facts: &Facts, i: usize, layer: &LayerFacts, charts: &mut Charts) -> Markup {
    let mut own = Vec::new();
    let mut add = |kind: &str, plot| {
        let id = format!("{kind}-{i}");
        own.push(chart(&id, 240));
        charts.insert(id, plot);
    };
    if let Some(values) = &layer.values {
        add("values", charts::histogram(values, layer.grid.as_ref()));
    }
    if let Some(channels) = &layer.channels {
        add("channels", charts::channels(channels));
    }
    if let Some(weights) = &layer.weights {
        let largest = f64::from(facts.conditions.weight_bits.largest());
        add("weights", charts::weights(weights, largest));
    }
    if let Some(lsb) = &layer.error.lsb {
        add("lsb", charts::lsb(lsb));
    }
    let shape: Vec<String> = layer.shape.iter().map(usize::to_string).collect();
    html! {
        template #(format!("layer-{i}")) {
            h2 { (layer.name) }
            p.sub {
                "layer " (i) " · " (layer.op) " → " (layer.dtype) "[" (shape.join("×")) "] · "
                span.badge.(class(layer.computed)) { (charts::word(layer.computed)) }
                @if let Some(lowered) = &layer.lowered { " as " (lowered) }
            }
            @if let Some(reason) = &layer.reason { p.reason { (reason) } }
            (neighbours(facts, i))
            @let remarks = remarks(facts, layer);
            @if !remarks.is_empty() { ul.remarks { @for remark in &remarks { li { (marked(remark)) } } } }
            dl { (error(layer)) (times(layer)) (values(layer)) }
            @for chart in own { (chart) }
        }
    }
}

fn neighbours(facts: &Facts, i: usize) -> Markup {
    let link = |n: usize| html! { a.layer href="#" data-layer=(n) { (facts.layers[n].name) } " " };
    let sources: Vec<usize> = facts.edges.iter().filter(|e| e.to == i).map(|e| e.from).collect();
    let readers: Vec<usize> = facts.edges.iter().filter(|e| e.from == i).map(|e| e.to).collect();
    html! {
        p.neighbours {
            @if !sources.is_empty() { "takes " @for n in &sources { (link(*n)) } }
            @if !readers.is_empty() { "· read by " @for n in &readers { (link(*n)) } }
        }
    }
}

fn pair(term: &str, what: &str, text: impl Into<String>) -> Markup {
    html! { dt title=(what) { (term) } dd { (text.into()) } }
}

fn error(layer: &LayerFacts) -> Markup {
    let e = &layer.error;
    html! {
        @if let Some(local) = e.local {
            (pair("alone", "Signal-to-noise ratio if only this layer were quantized", local.to_string()))
        }
        @if let Some(c) = e.causes {
            (pair(
                "its noise comes from",
                "What rounding each of these alone would cost",
                format!(
                    "input grids {}, weights {}, own grid {}",
                    percent(c.inputs), percent(c.parameters), percent(c.result)
                ),
            ))
        }
        @if let Some(d) = e.cumulative {
            (pair("in the network", "With all that the layers before it have lost", d.to_string()))
        }
        @if let Some(d) = e.cumulative_int8 { (pair("in int8", "The same, with its requantization", d.to_string())) }
        @if let Some(s) = e.saturation {
            (pair(
                "beyond the grid",
                "Share of the float values that are clipped",
                format!("{} below, {} above", percent(s.below), percent(s.above)),
            ))
        }
        @if let Some(c) = e.codes {
            (pair("codes used", "Different codes on the samples", format!("{} of {}: {:.1} bits", c.used, c.of, c.bits)))
        }
        @if let Some(l) = &e.lsb {
            (pair(
                "int8 = fake-quant",
                "Codes of int8 against rounding in real numbers",
                format!("{} equal, {} more than a step off, {} at most", percent(l.equal), percent(l.beyond_one), l.largest),
            ))
        }
    }
}

fn times(layer: &LayerFacts) -> Markup {
    let t = &layer.time;
    html! {
        @if let Some(ms) = t.float_ms { (pair("time in float", "Median", time(ms))) }
        @if let Some(ms) = t.quantized_ms {
            (pair(
                "time here",
                "Median; bound: what arithmetic or memory allow at best",
                format!("{} (bound by {}: {})", time(ms), if t.is_memory_bound { "memory" } else { "arithmetic" }, time(t.bound_ms)),
            ))
        }
        @if let Some(ms) = t.requant_ms { (pair("requantization", "Part of its time", time(ms))) }
        @if t.conversion_ms > 0.0 { (pair("conversions", "Of its result, beside its own time", time(t.conversion_ms))) }
        @if layer.macs > 0 { (pair("arithmetic", "Multiply-accumulates", format!("{} MACs", count(layer.macs)))) }
        @if t.bytes > 0 { (pair("memory", "Operands, weights and results", bytes(t.bytes))) }
        @if let Some(kernel) = t.kernel.as_ref().filter(|k| !k.is_empty()) { (pair("kernel", "", kernel.as_str())) }
    }
}

fn values(layer: &LayerFacts) -> Markup {
    html! {
        @if let Some(v) = &layer.values {
            (pair("float values", "On the observed samples", format!("{} to {}", real(v.min), real(v.max))))
            @if let Some((low, high)) = v.percentile(0.01).zip(v.percentile(99.99)) {
                (pair("99.98 % of them", "Between two percentiles", format!("{} to {}", real(low), real(high))))
            }
            @if v.not_finite > 0 { (pair("not finite", "Infinite or no numbers", v.not_finite.to_string())) }
        }
        @if let Some(g) = layer.grid {
            (pair(
                "grid",
                "What its codes stand for",
                format!(
                    "{} to {} in steps of {} (codes {} to {}, zero at {})",
                    real(g.min), real(g.max), real(g.scale), g.lo, g.hi, g.zero_point
                ),
            ))
        }
        @if let Some(c) = &layer.channels {
            (pair(
                "channels",
                "How much less of the grid the median channel uses than the largest one",
                format!("{}; the median one leaves {:.1} bits to channel {}", c.channels, c.unused_bits, c.largest),
            ))
        }
        @if let Some(w) = &layer.weights {
            (pair(
                "weights",
                "",
                format!(
                    "{} channels, the largest {:.1} times the median one{}",
                    w.channels,
                    w.spread,
                    if w.zero_channels > 0 { format!(", {} of zeros", w.zero_channels) } else { String::new() }
                ),
            ))
        }
    }
}
