//! The page of two runs.

use crate::{
    ReportError, charts,
    figures::{bytes, decibels, elided, micros, time},
    frame::{Charts, chart, frame, marked},
};
use maud::{Markup, html};
use qcc_runtime::{
    Decibels,
    workbench::{Change, Comparison, Contender},
};

/// Characters of a name in the table of layers.
const NAME_WIDTH: usize = 48;

/// The page that sets two runs side by side.
///
/// # Errors
/// Where the charts cannot be packed.
pub fn comparison_page(comparison: &Comparison) -> Result<String, ReportError> {
    let mut plots = Charts::new();
    let mut add = |id: &str, plot| plots.insert(id.into(), plot);
    let local = charts::compared_errors(comparison, true);
    let cumulative = charts::compared_errors(comparison, false);
    let (has_local, has_cumulative) = (local.is_some(), cumulative.is_some());
    local.map(|plot| add("local", plot));
    cumulative.map(|plot| add("cumulative", plot));
    add("times", charts::compared_times(comparison));
    let body = html! {
        header { h1 { (title(comparison)) " " span.sub { "two runs side by side" } } }
        main {
            section.verdict.float { @for s in &comparison.verdict { p { (marked(s)) } } }
            (headline(comparison))
            (options(comparison))
            section {
                @if has_local { h2 { "What each layer loses alone" } (chart("local", 400)) }
                @if has_cumulative { h2 { "What arrives in the network" } (chart("cumulative", 400)) }
                h2 { "What each layer takes" }
                (chart("times", 360))
            }
            (table(comparison))
        }
    };
    frame(&format!("{}: two runs", title(comparison)), &body, &plots)
}

fn title(c: &Comparison) -> String {
    match c.before.model == c.after.model {
        true => c.after.model.clone(),
        false => format!("{} → {}", c.before.model, c.after.model),
    }
}

fn headline(c: &Comparison) -> Markup {
    let rows: Vec<(&str, &Contender)> = [("before", &c.before), ("after", &c.after)]
        .into_iter()
        .flat_map(|(when, facts)| facts.contenders.iter().map(move |c| (when, c)))
        .collect();
    let share = |x: Option<f64>| x.map_or("–".to_string(), |x| format!("{:.2} %", 100.0 * x));
    html! {
        section {
            table.headline {
                thead { tr {
                    th { "run" } th { "" } th { "top-1" } th { "agrees with float" } th { "SQNR, dB" } th { "latency" }
                    th { "weights" } th { "file" }
                } }
                tbody { @for (when, c) in rows {
                    tr {
                        td.text { (when) }
                        th { (c.name) }
                        td { (share(c.accuracy.and_then(|a| a.top1))) }
                        td { (share(c.accuracy.map(|a| a.agreement))) }
                        td { (c.accuracy.and_then(|a| a.sqnr).or(c.sqnr).map_or("–".into(), decibels)) }
                        td { (time(c.latency_ms.median)) }
                        td { (bytes(c.weight_bytes)) }
                        td { (bytes(c.file_bytes)) }
                    }
                } }
            }
        }
    }
}

fn options(c: &Comparison) -> Markup {
    html! {
        section {
            h2 { "What was done differently" }
            @if c.options.is_empty() { p { "Nothing that qcc knows of." } } @else {
                table.small {
                    thead { tr { th { "" } th { "before" } th { "after" } } }
                    tbody { @for (what, before, after) in &c.options {
                        tr { th { (what) } td.text { (before) } td.text { (after) } }
                    } }
                }
            }
        }
    }
}

fn table(c: &Comparison) -> Markup {
    let db = |d: Option<Decibels>| d.map_or("–".to_string(), decibels);
    let difference = |change: Change<Decibels>| {
        let both = change.before.zip(change.after).map(|(a, b)| b.0 - a.0).filter(|d| d.is_finite());
        let class = both.map_or("", |d| {
            if d < -1.0 {
                "bad"
            } else if d > 1.0 {
                "good"
            } else {
                ""
            }
        });
        html! {
            td data-value=(both.map_or(String::new(), |d| d.to_string())) class=(class) {
                (both.map_or("–".into(), |d| format!("{d:+.1}")))
            }
        }
    };
    html! {
        section #table {
            h2 { "Layers, what changed most first" }
            div.scroll {
                table.layers {
                    thead { tr {
                        th { "#" } th.text { "layer" } th.text { "op" }
                        th { "alone, before" } th { "after" } th { "dB" }
                        th { "in network, before" } th { "after" } th { "dB" }
                        th { "µs, before" } th { "after" }
                    } }
                    tbody { @for l in &c.layers {
                        tr {
                            td data-value=(l.after) { (l.after) }
                            th title=(l.name) { (elided(&l.name, NAME_WIDTH)) }
                            td.text { (l.op) }
                            td { (db(l.local.before)) } td { (db(l.local.after)) } (difference(l.local))
                            td { (db(l.cumulative.before)) } td { (db(l.cumulative.after)) } (difference(l.cumulative))
                            td { (l.ms.before.map_or("–".into(), micros)) } td { (l.ms.after.map_or("–".into(), micros)) }
                        }
                    } }
                }
            }
            @for (names, when) in [(&c.only_before, "before"), (&c.only_after, "after")] {
                @if !names.is_empty() { p.sub { "Only " (when) ": " @for n in names { code { (n) } " " } } }
            }
        }
    }
}
