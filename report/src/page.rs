//! The page of one run.

use crate::{
    ReportError, charts,
    details::details,
    figures::{bytes, count, decibels, elided, micros, percent, time},
    frame::{Charts, chart, command, frame, marked},
    graph::{class, picture},
};
use maud::{Markup, html};
use qcc_runtime::{
    Precision,
    workbench::{Computed, Conditions, Contender, Facts, Grade, LayerFacts, SampleFacts, comparison},
};

/// Rows of tables of what costs time; all are in the facts.
const MOST_ROWS: usize = 12;

/// Characters of a name in the table of layers.
const NAME_WIDTH: usize = 36;

/// The page of a report.
///
/// It holds a row and a panel with its charts for each layer; charts have at most 64 bins or groups of channels (fewer with more
/// than 500 layers), and the graph is drawn up to 600 layers. Beside that it takes 1.3 MB of compressed script, three quarters
/// more in base 64.
///
/// # Errors
/// Where the charts cannot be packed.
pub fn page(facts: &Facts) -> Result<String, ReportError> {
    let mut plots = Charts::new();
    let body = html! {
        header {
            h1 { (facts.model) " " span.sub { "quantization report" } }
            (nav())
        }
        main {
            (verdict(facts))
            (headline(facts))
            (next(facts))
            (findings(facts))
            (layers(facts, &mut plots))
            (table(facts))
            (obstacles(facts, &mut plots))
            (graph(facts))
            (conditions(facts))
        }
        aside #panel hidden { button #close type="button" title="close (Esc)" { "×" } div #panel-body {} }
        @for (i, layer) in facts.layers.iter().enumerate() { (details(facts, i, layer, &mut plots)) }
    };
    frame(&format!("{}: quantization report", facts.model), &body, &plots)
}

fn nav() -> Markup {
    let links = [
        ("#next", "what to try"),
        ("#layers", "layers"),
        ("#table", "table"),
        ("#time", "why not faster"),
        ("#graph", "graph"),
        ("#how", "how it was measured"),
    ];
    html! { nav { @for (target, text) in links { a href=(target) { (text) } } } }
}

fn verdict(facts: &Facts) -> Markup {
    let (grade, text) = match facts.grade {
        Grade::Float => ("float", "float"),
        Grade::Close => ("close", "close to float"),
        Grade::Fair => ("fair", "some loss against float"),
        Grade::Far => ("far", "far from float"),
        Grade::Unknown => ("unknown", "accuracy not measured"),
    };
    let worst =
        facts.by_local_error().first().and_then(|(l, _)| facts.layers.iter().position(|o| o.name == l.name));
    html! {
        section.verdict.(grade) {
            span.grade { (text) }
            @for sentence in &facts.verdict { p { (marked(sentence)) } }
            @if let Some(i) = worst.filter(|_| facts.outlier().is_some()) {
                p { a.layer.button href="#" data-layer=(i) { "Look at this layer" } }
            }
        }
    }
}

fn headline(facts: &Facts) -> Markup {
    let has = |f: fn(&Contender) -> bool| facts.contenders.iter().any(f);
    let has_accuracy = has(|c| c.accuracy.is_some());
    let has_top1 = has(|c| c.accuracy.is_some_and(|a| a.top1.is_some()));
    let float = facts.contenders.first();
    let faster = |c: &Contender| float.map_or(1.0, |f| f.latency_ms.median / c.latency_ms.median);
    let sqnr = |c: &Contender| match c.precision {
        Precision::Float => "–".into(),
        _ => c.accuracy.and_then(|a| a.sqnr).or(c.sqnr).map_or("–".into(), decibels),
    };
    html! {
        section {
            table.headline {
                thead { tr {
                    th { "" }
                    @if has_top1 { th { "top-1" } th { "top-5" } }
                    @if has_accuracy { th title="Share of the images with the same best class as float" { "agrees with float" } }
                    th title="Signal-to-noise ratio of the results against float" { "SQNR, dB" }
                    th title="Median time of one run" { "latency" }
                    th { "× float" }
                    th title="Packed weights and tables in memory" { "weights" }
                    th title="Its .qcc file" { "file" }
                    th title="Intermediate values of a run" { "values" }
                    th title="Peak of loading and the first run" { "peak memory" }
                } }
                tbody { @for c in &facts.contenders {
                    tr {
                        th { (c.name) }
                        @if has_top1 {
                            td { (c.accuracy.and_then(|a| a.top1).map_or("–".into(), |x| format!("{:.2} %", 100.0 * x))) }
                            td { (c.accuracy.and_then(|a| a.top5).map_or("–".into(), |x| format!("{:.2} %", 100.0 * x))) }
                        }
                        @if has_accuracy {
                            td {
                                @if c.precision == Precision::Float { "–" }
                                @else if let Some(a) = c.accuracy { (format!("{:.2} %", 100.0 * a.agreement)) }
                            }
                        }
                        td { (sqnr(c)) }
                        td { (time(c.latency_ms.median)) }
                        td.strong { (format!("{:.2}", faster(c))) }
                        td { (bytes(c.weight_bytes)) }
                        td { (bytes(c.file_bytes)) }
                        td { (bytes(c.arena_bytes)) }
                        td { (c.memory_mib.map_or("–".into(), |m| format!("{m:.1} MiB"))) }
                    }
                } }
            }
            @if let Some(why) = &facts.conditions.no_accuracy { p.sub { "Accuracy was not measured: " (why) } }
        }
    }
}

fn next(facts: &Facts) -> Markup {
    html! {
        section #next {
            h2 { "What to try next" }
            @if facts.next.is_empty() {
                p { "Nothing stands out that qcc has an option for." }
            }
            @if let Some(words) = comparison(facts).filter(|_| !facts.next.is_empty()) {
                p.sub { "What it has changed, " code { (command(&words)) } " shows." }
            }
            ol.next { @for s in &facts.next {
                li {
                    h3 { (s.title) }
                    p { (marked(&s.reason)) @if let Some(effect) = &s.effect { " " span.sub { (marked(effect)) } } }
                    code.command { (s.command.as_deref().map_or_else(|| command(&s.options).replacen("qcc ", "", 1), command)) }
                }
            } }
        }
    }
}

fn findings(facts: &Facts) -> Markup {
    html! {
        section #findings {
            h2 { "What looks wrong" }
            @if facts.findings.is_empty() { p { "The checks of qcc found nothing." } }
            ul.findings { @for f in &facts.findings { li { code { (f.subject) } " " (f.text) } } }
        }
    }
}

fn layers(facts: &Facts, plots: &mut Charts) -> Markup {
    let errors = charts::errors(facts);
    let has_errors = errors.is_some();
    if let Some(plot) = errors {
        plots.insert("errors".into(), plot);
    }
    plots.insert("times".into(), charts::times(facts));
    html! {
        section #layers {
            h2 { "Layers" }
            @if has_errors {
                h3 { "What each layer loses" }
                p.sub {
                    "Signal-to-noise ratio of each layer's result against float: the higher, the closer. A point is the layer alone, "
                    "everything before it being float; a line is what arrives in the quantized network. A point far below the others "
                    "is the layer to look at; where the line falls, the network loses. Click on a point for details."
                }
                (chart("errors", 430))
            } @else {
                p.sub { "Nothing is quantized, so nothing is lost." }
            }
            h3 { "What each layer takes" }
            (chart("times", 360))
        }
    }
}

/// A cell with the number that it is sorted by.
fn cell(value: Option<f64>, text: String) -> Markup {
    let sort = value.filter(|v| v.is_finite()).map(|v| format!("{v}"));
    html! { td data-value=(sort.unwrap_or_default()) { (text) } }
}

fn decibel_cell(d: Option<qcc_runtime::Decibels>, is_bad: bool) -> Markup {
    let sort = d.map(|d| if d.0.is_finite() { d.0 } else { 1e9 });
    let value = sort.map_or_else(String::new, |v| v.to_string());
    html! { td.bad[is_bad] data-value=(value) { (d.map_or("–".into(), decibels)) } }
}

fn table(facts: &Facts) -> Markup {
    let outlying = facts.median_local().map(|m| m.0 - qcc_runtime::workbench::OUTLYING_DB);
    let subject = facts.subject().map_or("", |s| s.name.as_str());
    let is_float = facts.contenders.len() < 2;
    let row = |(i, l): (usize, &LayerFacts)| {
        let e = &l.error;
        let clipped = e.saturation.map(|s| s.below + s.above);
        let is_bad = e.local.zip(outlying).is_some_and(|(local, limit)| local.0 <= limit);
        let total = l.time.total_ms();
        let ratio = l.time.float_ms.zip(total).filter(|(_, t)| *t > 0.0).map(|(f, t)| f / t);
        html! {
            tr data-layer=(i) {
                td data-value=(i) { (i) }
                th title=(l.name) { (elided(&l.name, NAME_WIDTH)) }
                td.text { (l.op) }
                td.text { span.badge.(class(l.computed)) title=(l.reason.as_deref().unwrap_or_default()) { (charts::word(l.computed)) } }
                @if !is_float {
                    (decibel_cell(e.local, is_bad))
                    td.text { (e.causes.map_or("", |c| c.main().word())) }
                    (decibel_cell(e.cumulative_int8.or(e.cumulative), false))
                    (cell(clipped, clipped.map_or("–".into(), percent)))
                    (cell(e.codes.map(|c| c.bits), e.codes.map_or("–".into(), |c| format!("{:.1}", c.bits))))
                    (cell(e.lsb.as_ref().map(|l| l.equal), e.lsb.as_ref().map_or("–".into(), |l| percent(l.equal))))
                }
                (cell(l.time.float_ms, l.time.float_ms.map_or("–".into(), micros)))
                @if !is_float {
                    (cell(total, total.map_or("–".into(), micros)))
                    td.bad[ratio.is_some_and(|r| r < 0.95)] data-value=(ratio.map_or(String::new(), |r| r.to_string())) {
                        (ratio.map_or("–".into(), |r| format!("{r:.2}")))
                    }
                    (cell(l.time.requant_ms, l.time.requant_ms.map_or("–".into(), micros)))
                }
                (cell(Some(l.macs as f64), if l.macs > 0 { count(l.macs) } else { "–".into() }))
            }
        }
    };
    html! {
        section #table {
            h2 { "Table of layers" }
            p.sub { "Click on a heading to sort, on a row for details: histogram and grid, channels, weights, steps off." }
            div.scroll {
                table.layers {
                    thead { tr {
                        th { "#" }
                        th.text { "layer" }
                        th.text { "op" }
                        th.text { "computed in" }
                        @if !is_float {
                            th title="SQNR of the layer alone, its inputs being float rounded to their grids" { "alone, dB" }
                            th.text title="What makes most of the noise of the layer alone" { "mostly by" }
                            th title="SQNR in the quantized network, all losses before it included" { "in network, dB" }
                            th title="Share of the float values beyond its grid" { "clipped" }
                            th title="log₂ of the codes that occur" { "bits used" }
                            th title="Codes of int8 that equal those of fake-quant in the network: a step of difference in one layer goes on in those behind it" { "int8 = fake" }
                        }
                        th { "float, µs" }
                        @if !is_float {
                            th title="With conversions of its result" { (subject) ", µs" }
                            th title="Times as fast as in float" { "× float" }
                            th title="Part of its time that requantization takes" { "requant, µs" }
                        }
                        th title="Multiply-accumulates" { "MACs" }
                    } }
                    tbody { @for pair in facts.layers.iter().enumerate() { (row(pair)) } }
                }
            }
        }
    }
}

fn obstacles(facts: &Facts, plots: &mut Charts) -> Markup {
    plots.insert("parts".into(), charts::parts(facts));
    let t = &facts.time;
    let rest =
        |n: usize| html! { @if n > MOST_ROWS { p.sub { "and " (n - MOST_ROWS) " more, in the JSON" } } };
    html! {
        section #time {
            h2 { "Why not faster" }
            (chart("parts", 230))
            ul { @for s in &t.sentences { li { (marked(s)) } } }
            @if !t.slower.is_empty() {
                h3 { "Slower than in float" }
                table.small {
                    thead { tr { th { "layer" } th { "float, µs" } th { "here, µs" } } }
                    tbody { @for l in t.slower.iter().take(MOST_ROWS) {
                        tr { th { (l.name) } td { (micros(l.float_ms)) } td { (micros(l.ms)) } }
                    } }
                }
                (rest(t.slower.len()))
            }
            @if facts.contenders.len() > 1 {
                h3 { "Not computed with codes" }
                @if t.float_layers.is_empty() { p { "Everything is." } } @else {
                    table.small {
                        thead { tr { th { "layer" } th { "op" } th { "computed in" } th { "µs" } th { "why" } } }
                        tbody { @for l in t.float_layers.iter().take(MOST_ROWS) {
                            tr {
                                th { (l.name) } td.text { (l.op) }
                                td.text { span.badge.(class(l.computed)) { (charts::word(l.computed)) } }
                                td { (micros(l.ms)) }
                                td.text { (l.reason.as_deref().unwrap_or("it computes no real numbers, or the model asks for it")) }
                            }
                        } }
                    }
                    (rest(t.float_layers.len()))
                }
                h3 { "Conversions and copies between layers" }
                @if t.conversions.is_empty() { p { "None." } } @else {
                    table.small {
                        thead { tr { th { "step" } th { "op" } th { "bytes" } th { "µs" } } }
                        tbody { @for c in t.conversions.iter().take(MOST_ROWS) {
                            tr { th { (c.name) } td.text { (c.op) } td { (bytes(c.bytes)) } td { (micros(c.ms)) } }
                        } }
                    }
                    (rest(t.conversions.len()))
                }
            }
            h3 { "Bound by memory, not by arithmetic" }
            @if t.memory_bound.is_empty() { p { "No layer is." } } @else {
                table.small {
                    thead { tr { th { "layer" } th { "bytes" } th { "µs" } th title="At the bandwidth of where they lie" { "at best, µs" } } }
                    tbody { @for l in t.memory_bound.iter().take(MOST_ROWS) {
                        tr { th { (l.name) } td { (bytes(l.bytes)) } td { (micros(l.ms)) } td { (micros(l.bound_ms)) } }
                    } }
                }
                (rest(t.memory_bound.len()))
            }
        }
    }
}

fn graph(facts: &Facts) -> Markup {
    let worst = facts.outlier().map(|(l, _)| l.name.as_str());
    let kinds = [Computed::Int8, Computed::Float, Computed::Interpreter, Computed::Fused, Computed::Input];
    html! {
        section #graph {
            h2 { "Graph" }
            p.legend {
                @for kind in kinds { span.badge.(class(kind)) { (charts::word(kind)) } " " }
                "dashed: converted on the way. Click on a layer for details."
            }
            @match picture(facts, worst) {
                Some(svg) => { div.graph { (svg) } }
                None => { p { "The graph has too many layers to be drawn." } }
            }
        }
    }
}

fn samples(s: &SampleFacts) -> String {
    let what = if s.is_made_up { " (made up)" } else { "" };
    format!("{} samples of {}{what}", s.count, s.origin)
}

fn conditions(facts: &Facts) -> Markup {
    let c: &Conditions = &facts.conditions;
    let calibration = c.calibration.as_ref().map_or_else(
        || if c.brings_grids { "the model brings its own grids".into() } else { "none".into() },
        |c| format!("{} samples of {}, ranges by {}", c.samples, c.origin, c.calibrator),
    );
    let repairs = c.repairs.map_or("none".into(), |r| r.to_string());
    html! {
        section #how {
            h2 { "How it was measured" }
            dl.conditions {
                dt { "qcc" } dd { (c.qcc) }
                @if let Some(words) = &c.command { dt { "command" } dd { code { (command(words)) } } }
                @if let Some(host) = &c.host {
                    dt { "CPU" } dd {
                        (host.cpu) "; one core reaches " (format!("{:.0}", host.peaks.int8 / 1e9)) " GMAC/s in int8, "
                        (format!("{:.0}", host.peaks.float / 1e9)) " in float"
                    }
                }
                dt { "tier" } dd { (c.isa) ", " (c.threads) @if c.threads == 1 { " thread" } @else { " threads" } }
                dt { "times" } dd { "medians of " (c.reps) " runs, all precisions in turn; layers of up to 25 runs of their own" }
                dt { "layers observed on" } dd { (samples(&c.samples)) }
                dt { "accuracy on" } dd { (c.images.as_ref().map_or("nothing: give --images".into(), samples)) }
                dt { "calibration" } dd { (calibration) }
                dt { "repairs" } dd { (repairs) }
                dt { "weights" } dd { (format!("{} bits, ", c.weight_bits.count())) (weights(c)) }
                @if !c.float_layers.is_empty() {
                    dt { "float by policy" } dd { @for name in &c.float_layers { code { (name) } " " } }
                }
                @if !c.pins.is_empty() {
                    dt { "pinned" } dd { @for (node, device) in &c.pins { code { (node) "=" (device) } " " } }
                }
            }
            details {
                summary { "What each pass did and declined" }
                pre { (facts.explanation) }
            }
            p.sub {
                "docs/report.md tells what each figure means. This page needs no network, and is not allowed any. Charts: plotly.js, "
                "© Plotly, Inc., MIT license."
            }
        }
    }
}

fn weights(c: &Conditions) -> &'static str {
    match c.weights {
        qcc_runtime::passes::WeightGrid::PerAxis => "a scale for each output channel",
        qcc_runtime::passes::WeightGrid::PerTensor => "one scale a tensor",
    }
}
