//! The charts.

use crate::figures::{decibels, elided, micros, percent, real, rounded, time};
use plotly::{
    Bar, Layout, Plot, Scatter,
    common::{Anchor, DashType, Fill, Font, HoverInfo, Line, Marker, MarkerSymbol, Mode, Orientation, Title},
    layout::{
        Annotation, Axis, AxisType, BarMode, HoverMode, Legend, Margin, Shape, ShapeLayer, ShapeLine,
        ShapeType,
    },
};
use qcc_runtime::{
    Decibels, Precision,
    passes::{ChannelWeights, Distribution},
    workbench::{
        ChannelFacts, Comparison, Computed, Facts, GridFacts, LayerFacts, LsbDifference, TimeOf, WeightFacts,
    },
};

const BLUE: &str = "#2563eb";
const TEAL: &str = "#0f766e";
const GREY: &str = "#94a3b8";
const RED: &str = "#dc2626";
const ORANGE: &str = "#ea8a0c";
const INK: &str = "#334155";
const FAINT: &str = "rgba(37, 99, 235, 0.15)";

/// Layers of which names fit under a chart.
const MOST_NAMES: usize = 80;
const NAME_WIDTH: usize = 18;

/// Text of a model as a chart takes it, which knows some elements of HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn font(size: usize) -> Font {
    Font::new().family("system-ui, sans-serif").size(size).color(INK)
}

fn layout(margin: [usize; 4]) -> Layout {
    let [top, right, bottom, left] = margin;
    Layout::new()
        .font(font(12))
        .margin(Margin::new().top(top).right(right).bottom(bottom).left(left))
        .paper_background_color("rgba(0,0,0,0)")
        .plot_background_color("rgba(0,0,0,0)")
        .hover_mode(HoverMode::Closest)
}

fn titled(title: &str) -> Axis {
    Axis::new().title(Title::with_text(title)).grid_color("#e2e8f0").zero_line_color("#cbd5e1")
}

fn above() -> Legend {
    Legend::new().orientation(Orientation::Horizontal).x(0.0).y(1.02).y_anchor(Anchor::Bottom)
}

/// The axis of layers: their names where they fit, else their numbers.
fn layer_axis(names: &[&str]) -> Axis {
    let axis = Axis::new().range(vec![-0.7, names.len() as f64 - 0.3]).show_grid(false).zero_line(false);
    if names.len() > MOST_NAMES {
        return axis.title(Title::with_text("number of the layer, in the order of execution"));
    }
    axis.tick_values((0..names.len()).map(|i| i as f64).collect())
        .tick_text(names.iter().map(|n| escaped(&elided(n, NAME_WIDTH))).collect())
        .tick_angle(-60.0)
        .tick_font(font(if names.len() > 40 { 9 } else { 11 }))
}

fn names(facts: &Facts) -> Vec<&str> {
    facts.layers.iter().map(|l| l.name.as_str()).collect()
}

/// Space under a chart of layers.
fn bottom(layers: usize) -> usize {
    if layers > MOST_NAMES { 48 } else { 110 }
}

/// A horizontal or vertical line over the whole chart.
fn rule(is_vertical: bool, at: f64, color: &'static str, dash: DashType) -> Shape {
    let line = ShapeLine::new().color(color).width(1.5).dash(dash);
    let shape = Shape::new().shape_type(ShapeType::Line).layer(ShapeLayer::Above).line(line);
    match is_vertical {
        true => shape.x_ref("x").y_ref("paper").x0(at).x1(at).y0(0).y1(1),
        false => shape.x_ref("paper").y_ref("y").x0(0).x1(1).y0(at).y1(at),
    }
}

fn finite(d: Option<Decibels>) -> Option<f64> {
    d.map(|d| d.0).filter(|d| d.is_finite()).map(rounded)
}

fn trace(name: &str, values: &[Option<f64>], texts: Vec<String>) -> Box<Scatter<usize, Option<f64>>> {
    Scatter::new((0..values.len()).collect(), values.to_vec())
        .name(name)
        .hover_text_array(texts)
        .hover_info(HoverInfo::Text)
        .connect_gaps(true)
}

/// Signal-to-noise ratio of each layer: alone, and in the network. `None` where nothing was compared.
pub(crate) fn errors(facts: &Facts) -> Option<Plot> {
    let layers = &facts.layers;
    let local: Vec<Option<f64>> = layers.iter().map(|l| finite(l.error.local)).collect();
    let fake: Vec<Option<f64>> = layers.iter().map(|l| finite(l.error.cumulative)).collect();
    let int8: Vec<Option<f64>> = layers.iter().map(|l| finite(l.error.cumulative_int8)).collect();
    let is_seen = |values: &[Option<f64>]| values.iter().any(Option::is_some);
    if !is_seen(&local) && !is_seen(&fake) {
        return None;
    }
    let text = |l: &LayerFacts| {
        let of = |d: Option<Decibels>| d.map_or("–".into(), |d| d.to_string());
        let cause = l.error.causes.map_or(String::new(), |c| format!(", mostly by {}", c.main().phrase()));
        format!(
            "<b>{}</b> ({})<br>alone: {}{cause}<br>in the network: {}",
            escaped(&l.name),
            l.op,
            of(l.error.local),
            of(l.error.cumulative_int8.or(l.error.cumulative))
        )
    };
    let texts: Vec<String> = layers.iter().map(text).collect();
    let mut plot = Plot::new();
    let line =
        |color: &'static str, width: f64, dash: DashType| Line::new().color(color).width(width).dash(dash);
    let is_dynamic = facts.conditions.precision == Precision::Int8Dynamic;
    let in_network = if is_dynamic { "in the network" } else { "in the network, fake-quant" };
    if is_seen(&int8) {
        let int8 = trace("in the network, int8", &int8, texts.clone()).mode(Mode::Lines);
        plot.add_trace(int8.line(line(TEAL, 3.0, DashType::Solid)));
    }
    // Mostly the two are one: the thin one lies on the wide one.
    let dash = if is_dynamic { DashType::Solid } else { DashType::Dot };
    let fake = trace(in_network, &fake, texts.clone()).mode(Mode::Lines);
    plot.add_trace(fake.line(line(INK, 1.3, dash)));
    let outlying =
        facts.median_local().map_or(f64::NEG_INFINITY, |m| m.0 - qcc_runtime::workbench::OUTLYING_DB);
    let split = |bad: bool| -> Vec<Option<f64>> {
        local.iter().map(|v| v.filter(|db| (*db <= outlying) == bad)).collect()
    };
    if is_seen(&local) {
        let marker = Marker::new().color(BLUE).size(7);
        plot.add_trace(
            trace("the layer alone", &split(false), texts.clone()).mode(Mode::Markers).marker(marker),
        );
        let bad = split(true);
        if is_seen(&bad) {
            let marker = Marker::new().color(RED).size(13).symbol(MarkerSymbol::Diamond);
            let name = "the layer alone, 10 dB below the median layer or more";
            plot.add_trace(trace(name, &bad, texts).mode(Mode::Markers).marker(marker));
        }
    }
    let mut base = layout([46, 20, bottom(layers.len()), 60])
        .legend(above())
        .x_axis(layer_axis(&names(facts)))
        .y_axis(titled("SQNR, dB (lower is worse)"));
    if let Some(median) = facts.median_local() {
        base = base.shapes(vec![rule(false, rounded(median.0), GREY, DashType::Dot)]);
    }
    let worst = facts.by_local_error().into_iter().next();
    if let Some((worst, db)) = worst
        && let Some(at) = layers.iter().position(|l| l.name == worst.name)
    {
        let is_bad = facts.outlier().is_some();
        // Beside a point near an end the text would be cut off.
        let towards = if at * 2 > layers.len() { -60.0 } else { 60.0 };
        let note = Annotation::new()
            .x(at as f64)
            .y(rounded(db.0))
            .text(format!("<b>{}</b>: {db}", escaped(&elided(&worst.name, 40))))
            .font(font(13).color(if is_bad { RED } else { INK }))
            .background_color("rgba(255,255,255,0.85)")
            .show_arrow(true)
            .arrow_head(2)
            .arrow_color(if is_bad { RED } else { INK })
            .ax(towards)
            .ay(-28.0);
        base = base.annotations(vec![note]);
    }
    plot.set_layout(base);
    Some(plot)
}

fn bar(
    name: &str,
    color: &'static str,
    values: Vec<Option<f64>>,
    texts: Vec<String>,
) -> Box<Bar<usize, Option<f64>>> {
    Bar::new((0..values.len()).collect(), values)
        .name(name)
        .marker(Marker::new().color(color))
        .hover_text_array(texts)
        .hover_info(HoverInfo::Text)
}

/// Time of each layer, float beside quantized.
pub(crate) fn times(facts: &Facts) -> Plot {
    let text = |l: &LayerFacts| {
        let of = |ms: Option<f64>| ms.map_or("no step of its own".into(), time);
        let conversions = match l.time.conversion_ms {
            ms if ms > 0.0 => format!("<br>of it conversions: {}", time(ms)),
            _ => String::new(),
        };
        let requant =
            l.time.requant_ms.map_or(String::new(), |ms| format!("<br>of it requantization: {}", time(ms)));
        let subject = facts.subject().map_or("", |s| s.name.as_str());
        format!(
            "<b>{}</b> ({})<br>float: {}<br>{subject}: {}{requant}{conversions}",
            escaped(&l.name),
            l.op,
            of(l.time.float_ms),
            of(l.time.total_ms())
        )
    };
    let texts: Vec<String> = facts.layers.iter().map(text).collect();
    let micros = |f: fn(&LayerFacts) -> Option<f64>| {
        facts.layers.iter().map(|l| f(l).map(|ms| rounded(1e3 * ms))).collect::<Vec<_>>()
    };
    let mut plot = Plot::new();
    plot.add_trace(bar("float", GREY, micros(|l| l.time.float_ms), texts.clone()));
    if let Some(subject) = facts.subject().filter(|s| s.precision != Precision::Float) {
        plot.add_trace(bar(&subject.name, BLUE, micros(|l| l.time.total_ms()), texts));
    }
    plot.set_layout(
        layout([40, 20, bottom(facts.layers.len()), 60])
            .legend(above())
            .bar_mode(BarMode::Group)
            .bar_gap(0.25)
            .x_axis(layer_axis(&names(facts)))
            .y_axis(titled("time, µs")),
    );
    plot
}

fn color_of(what: TimeOf) -> &'static str {
    match what {
        TimeOf::Int8Products => BLUE,
        TimeOf::Requantization => "#93b4f5",
        TimeOf::Int8Others => TEAL,
        TimeOf::FloatProducts => ORANGE,
        TimeOf::FloatOthers => "#f5c272",
        TimeOf::Conversions => "#a855f7",
        TimeOf::Interpreter => RED,
        TimeOf::BetweenLayers => "#cbd5e1",
    }
}

/// What the time of a run is spent on.
pub(crate) fn parts(facts: &Facts) -> Plot {
    let mut plot = Plot::new();
    let subject = facts.subject().map_or(String::new(), |s| s.name.clone());
    for part in &facts.time.parts {
        let text = format!(
            "{}: {}, {} of the run, {} steps",
            part.what.name(),
            time(part.ms),
            percent(part.share),
            part.steps
        );
        let label = if part.share > 0.07 { percent(part.share) } else { String::new() };
        plot.add_trace(
            Bar::new(vec![rounded(1e3 * part.ms)], vec![subject.clone()])
                .orientation(Orientation::Horizontal)
                .name(part.what.name())
                .marker(Marker::new().color(color_of(part.what)))
                .text(label)
                .hover_text(text)
                .hover_info(HoverInfo::Text),
        );
    }
    if facts.time.float_ms > 0.0 && facts.contenders.len() > 1 {
        plot.add_trace(
            Bar::new(vec![rounded(1e3 * facts.time.float_ms)], vec!["float"])
                .orientation(Orientation::Horizontal)
                .name("float, all of it")
                .marker(Marker::new().color(GREY))
                .hover_text(format!("float: {}", time(facts.time.float_ms)))
                .hover_info(HoverInfo::Text),
        );
    }
    plot.set_layout(
        layout([60, 20, 44, 110])
            .legend(above())
            .bar_mode(BarMode::Stack)
            .x_axis(titled("time of a run, µs")),
    );
    plot
}

/// How the values of a layer are distributed, and the grid over them.
pub(crate) fn histogram(values: &Distribution, grid: Option<&GridFacts>) -> Plot {
    let centre = |i: usize| values.first + (i as f64 + 0.5) * values.width;
    let is_outside = |x: f64| grid.is_some_and(|g| x < f64::from(g.min) || x > f64::from(g.max));
    let mut plot = Plot::new();
    for (outside, name, color) in [(false, "float values", BLUE), (true, "beyond the grid", RED)] {
        let bins =
            values.counts.iter().enumerate().filter(|(i, n)| **n > 0 && is_outside(centre(*i)) == outside);
        let (x, y): (Vec<f64>, Vec<u64>) = bins.map(|(i, n)| (rounded(centre(i)), *n)).unzip();
        if !x.is_empty() {
            plot.add_trace(
                Bar::new(x, y)
                    .name(name)
                    .width(rounded(values.width))
                    .marker(Marker::new().color(color))
                    .show_legend(false),
            );
        }
    }
    let mut base = layout([28, 16, 40, 56])
        .title(Title::with_text("values in float (log scale); shaded: the grid").font(font(13)))
        .bar_mode(BarMode::Overlay)
        .x_axis(Axis::new().show_grid(false))
        .y_axis(titled("count").type_(AxisType::Log));
    if let Some(grid) = grid {
        let (min, max) = (rounded(grid.min.into()), rounded(grid.max.into()));
        let area = Shape::new()
            .shape_type(ShapeType::Rect)
            .x_ref("x")
            .y_ref("paper")
            .x0(min)
            .x1(max)
            .y0(0)
            .y1(1)
            .fill_color("rgba(15, 118, 110, 0.12)")
            .layer(ShapeLayer::Below)
            .line(ShapeLine::new().width(0.0));
        let ends = [min, max].map(|x| rule(true, x, TEAL, DashType::Solid));
        base = base.shapes([vec![area], ends.to_vec()].concat());
    }
    plot.set_layout(base);
    plot
}

/// Extremes by channel, or by groups of them.
fn extremes(
    title: &str,
    grouped_by: usize,
    channels: usize,
    ends: &[(f32, f32)],
    steps: Option<Vec<f64>>,
) -> Plot {
    let x: Vec<usize> = (0..ends.len()).map(|i| i * grouped_by).collect();
    let texts: Vec<String> = ends
        .iter()
        .enumerate()
        .map(|(i, (min, max))| {
            let (first, last) = (i * grouped_by, ((i + 1) * grouped_by).min(channels) - 1);
            let what = if first == last {
                format!("channel {first}")
            } else {
                format!("channels {first} to {last}")
            };
            format!("{what}: {} to {}", real(*min), real(*max))
        })
        .collect();
    let side = |f: fn(&(f32, f32)) -> f32, fill: bool| {
        let y: Vec<f64> = ends.iter().map(|e| rounded(f(e).into())).collect();
        let trace = Scatter::new(x.clone(), y)
            .mode(Mode::Lines)
            .line(Line::new().color(BLUE).width(1.0).shape(plotly::common::LineShape::Hvh))
            .hover_text_array(texts.clone())
            .hover_info(HoverInfo::Text)
            .show_legend(false);
        if fill { trace.fill(Fill::ToNextY).fill_color(FAINT) } else { trace }
    };
    let mut plot = Plot::new();
    plot.add_trace(side(|e| e.0, false));
    plot.add_trace(side(|e| e.1, true));
    for (sign, steps) in [1.0, -1.0].into_iter().zip(std::iter::repeat(steps)) {
        let Some(steps) = steps else { continue };
        let y: Vec<f64> = steps.iter().map(|s| rounded(sign * s)).collect();
        plot.add_trace(
            Scatter::new(x.clone(), y)
                .mode(Mode::Lines)
                .name("end of the grid")
                .line(
                    Line::new()
                        .color(TEAL)
                        .width(1.0)
                        .dash(DashType::Dot)
                        .shape(plotly::common::LineShape::Hvh),
                )
                .hover_info(HoverInfo::Skip)
                .show_legend(false),
        );
    }
    let per = if grouped_by > 1 {
        format!("output channel ({grouped_by} together)")
    } else {
        "output channel".into()
    };
    plot.set_layout(
        layout([28, 16, 40, 56])
            .title(Title::with_text(title).font(font(13)))
            .x_axis(Axis::new().title(Title::with_text(&per)).show_grid(false))
            .y_axis(Axis::new().grid_color("#e2e8f0").zero_line_color("#cbd5e1")),
    );
    plot
}

/// Weights by output channel, within their grids.
pub(crate) fn weights(weights: &WeightFacts, largest_code: f64) -> Plot {
    let ends: Vec<(f32, f32)> = weights.groups.iter().map(|g| (g.min, g.max)).collect();
    let end = |g: &ChannelWeights| Some(f64::from(g.scale?) * largest_code);
    let steps: Option<Vec<f64>> = weights.groups.iter().map(end).collect();
    extremes(
        "weights of each channel; dotted: ends of its grid",
        weights.grouped_by,
        weights.channels,
        &ends,
        steps,
    )
}

/// Ranges of the channels of a result.
pub(crate) fn channels(channels: &ChannelFacts) -> Plot {
    let ends: Vec<(f32, f32)> = channels.groups.iter().map(|g| (g.min, g.max)).collect();
    extremes("range of each channel of the result", channels.grouped_by, channels.channels, &ends, None)
}

/// How many steps int8 is off fake-quant.
pub(crate) fn lsb(lsb: &LsbDifference) -> Plot {
    let half = lsb.counts.len() as i64 / 2;
    let labels: Vec<String> = (-half..=half)
        .map(|d| match d {
            d if d == -half => format!("≤ {d}"),
            d if d == half => format!("≥ {d}"),
            d => d.to_string(),
        })
        .collect();
    let total = lsb.counts.iter().sum::<u64>().max(1) as f64;
    let shares: Vec<f64> = lsb.counts.iter().map(|n| rounded(100.0 * *n as f64 / total)).collect();
    let mut plot = Plot::new();
    plot.add_trace(Bar::new(labels, shares).marker(Marker::new().color(TEAL)).show_legend(false));
    plot.set_layout(
        layout([28, 16, 40, 56])
            .title(Title::with_text("int8 less fake-quant, in steps of the grid").font(font(13)))
            .x_axis(Axis::new().type_(AxisType::Category).show_grid(false))
            .y_axis(titled("% of codes")),
    );
    plot
}

/// Signal-to-noise ratios of two runs, of the layers of the second one in their order.
pub(crate) fn compared_errors(comparison: &Comparison, is_local: bool) -> Option<Plot> {
    let mut layers: Vec<_> = comparison.layers.iter().collect();
    layers.sort_by_key(|l| l.after);
    let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
    let of = |l: &qcc_runtime::workbench::LayerChange| if is_local { l.local } else { l.cumulative };
    let values = |f: fn(qcc_runtime::workbench::Change<Decibels>) -> Option<Decibels>| -> Vec<Option<f64>> {
        layers.iter().map(|l| finite(f(of(l)))).collect()
    };
    let (before, after) = (values(|c| c.before), values(|c| c.after));
    if before.iter().chain(&after).all(Option::is_none) {
        return None;
    }
    let text = |l: &&qcc_runtime::workbench::LayerChange| {
        let word = |d: Option<Decibels>| d.map_or("–".into(), decibels);
        format!("<b>{}</b> ({})<br>{} → {} dB", escaped(&l.name), l.op, word(of(l).before), word(of(l).after))
    };
    let texts: Vec<String> = layers.iter().map(text).collect();
    let mode = if is_local { Mode::Markers } else { Mode::LinesMarkers };
    let mut plot = Plot::new();
    for (name, values, color) in [("before", before, GREY), ("after", after, BLUE)] {
        let marker = Marker::new().color(color).size(if is_local { 7 } else { 4 });
        let line = Line::new().color(color).width(1.5);
        plot.add_trace(trace(name, &values, texts.clone()).mode(mode.clone()).marker(marker).line(line));
    }
    plot.set_layout(
        layout([40, 20, bottom(names.len()), 60])
            .legend(above())
            .x_axis(layer_axis(&names))
            .y_axis(titled("SQNR, dB (lower is worse)")),
    );
    Some(plot)
}

/// Times of two runs, of the layers of the second one in their order.
pub(crate) fn compared_times(comparison: &Comparison) -> Plot {
    let mut layers: Vec<_> = comparison.layers.iter().collect();
    layers.sort_by_key(|l| l.after);
    let names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
    let text = |l: &&qcc_runtime::workbench::LayerChange| {
        let word = |ms: Option<f64>| ms.map_or("–".into(), micros);
        format!("<b>{}</b> ({})<br>{} → {} µs", escaped(&l.name), l.op, word(l.ms.before), word(l.ms.after))
    };
    let texts: Vec<String> = layers.iter().map(text).collect();
    let mut plot = Plot::new();
    let side = |f: fn(&qcc_runtime::workbench::LayerChange) -> Option<f64>| {
        layers.iter().map(|l| f(l).map(|ms| rounded(1e3 * ms))).collect::<Vec<_>>()
    };
    plot.add_trace(bar("before", GREY, side(|l| l.ms.before), texts.clone()));
    plot.add_trace(bar("after", BLUE, side(|l| l.ms.after), texts));
    plot.set_layout(
        layout([40, 20, bottom(names.len()), 60])
            .legend(above())
            .bar_mode(BarMode::Group)
            .bar_gap(0.25)
            .x_axis(layer_axis(&names))
            .y_axis(titled("time, µs")),
    );
    plot
}

/// How a layer is computed, in a word.
pub(crate) fn word(computed: Computed) -> &'static str {
    match computed {
        Computed::Input => "input",
        Computed::Int8 => "int8",
        Computed::Float => "float",
        Computed::Interpreter => "interpreter",
        Computed::Fused => "in a neighbour",
    }
}
