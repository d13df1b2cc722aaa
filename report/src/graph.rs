//! The graph of a model as a picture, laid out by layout-rs.

use crate::figures::elided;
use layout::{
    core::{
        base::Orientation,
        color::Color,
        format::{ClipHandle, RenderBackend},
        geometry::Point,
        style::StyleAttr,
    },
    std_shapes::shapes::{Arrow, Element, ShapeKind},
    topo::layout::VisualGraph,
};
use maud::{Markup, PreEscaped, Render, html};
use qcc_runtime::workbench::{Computed, Facts};
use std::fmt::Write;

/// A larger picture shows nobody anything, and layouts take time that grows with the square of this.
const MOST_NODES: usize = 600;
/// Characters of a name in a box.
const WIDTH: usize = 22;
/// A wide picture is made smaller to fit, but not so small that nobody can read it.
const LEAST_SCALE: f64 = 0.6;
/// Size of a box.
const BOX: (f64, f64) = (190.0, 38.0);

/// The picture; `None` where the graph is too large for one.
pub(crate) fn picture(facts: &Facts, worst: Option<&str>) -> Option<Markup> {
    if facts.layers.len() > MOST_NODES || facts.layers.is_empty() {
        return None;
    }
    let mut graph = VisualGraph::new(Orientation::TopToBottom);
    // Layers are in the order of execution, so there are no cycles to look for, which takes exponential time here.
    graph.dag.set_validate(false);
    let style = StyleAttr::new(Color::fast("black"), 1, None, 4, 12);
    let mut handles = Vec::new();
    for i in 0..facts.layers.len() {
        // The backend finds the layer by this.
        let shape = ShapeKind::new_box(&i.to_string());
        let size = Point::new(BOX.0, BOX.1);
        handles.push(graph.add_node(Element::create(shape, style.clone(), Orientation::TopToBottom, size)));
    }
    let mut edges = facts.edges.clone();
    // By their ends: when an edge is added, nothing leads on from where it ends, and the search for a cycle ends at once.
    edges.sort_by_key(|e| (e.to, e.from));
    for edge in edges.iter().filter(|e| e.from < e.to && e.to < handles.len()) {
        let properties = if edge.converts { "converts" } else { "" };
        let arrow = Arrow { properties: Some(properties.into()), ..Arrow::default() };
        graph.add_edge(arrow, handles[edge.from], handles[edge.to]);
    }
    let mut drawing = Drawing {
        facts,
        worst,
        boxes: String::new(),
        arrows: String::new(),
        least: f64::INFINITY,
        extent: (0.0, 0.0),
    };
    graph.do_it(false, false, false, &mut drawing);
    Some(drawing.finish())
}

/// Draws as SVG.
struct Drawing<'a> {
    facts: &'a Facts,
    worst: Option<&'a str>,
    boxes: String,
    arrows: String,
    /// The leftmost place that something is drawn at.
    least: f64,
    extent: (f64, f64),
}

impl Drawing<'_> {
    fn reach(&mut self, x: f64, y: f64) {
        self.least = self.least.min(x - 10.0);
        self.extent = (self.extent.0.max(x + 10.0), self.extent.1.max(y + 10.0));
    }

    fn finish(self) -> Markup {
        let (left, w, h) = (self.least, self.extent.0 - self.least, self.extent.1);
        html! {
            svg.graph viewBox=(format!("{left:.0} 0 {w:.0} {h:.0}")) style=(format!("max-width:{w:.0}px;min-width:{:.0}px", LEAST_SCALE * w))
                xmlns="http://www.w3.org/2000/svg" {
                defs {
                    marker #arrow viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto" {
                        path d="M0 0L8 4L0 8z" fill="context-stroke" {}
                    }
                }
                (PreEscaped(self.arrows))
                (PreEscaped(self.boxes))
            }
        }
    }
}

/// The class of a layer's colour.
pub(crate) fn class(computed: Computed) -> &'static str {
    match computed {
        Computed::Input => "input",
        Computed::Int8 => "int8",
        Computed::Float => "float",
        Computed::Interpreter => "interpreter",
        Computed::Fused => "fused",
    }
}

impl RenderBackend for Drawing<'_> {
    fn draw_rect(&mut self, _: Point, _: Point, _: &StyleAttr, _: Option<String>, _: Option<ClipHandle>) {}

    fn draw_line(&mut self, _: Point, _: Point, _: &StyleAttr, _: Option<String>) {}

    fn draw_circle(&mut self, _: Point, _: Point, _: &StyleAttr, _: Option<String>) {}

    /// The text of a box is the number of its layer, and its place is the middle of the box.
    fn draw_text(&mut self, at: Point, text: &str, _: &StyleAttr) {
        let Some((i, layer)) = text.parse().ok().and_then(|i: usize| Some((i, self.facts.layers.get(i)?)))
        else {
            return;
        };
        let (x, y) = (at.x - BOX.0 / 2.0, at.y - BOX.1 / 2.0);
        let bad = if self.worst == Some(layer.name.as_str()) { " bad" } else { "" };
        let local = layer.error.local.map_or(String::new(), |d| format!(" · {d}"));
        let markup = html! {
            g data-layer=(i) class=(format!("node {}{bad}", class(layer.computed))) {
                title { (layer.name) ": " (layer.op) }
                rect x=(format!("{x:.1}")) y=(format!("{y:.1}")) width=(BOX.0) height=(BOX.1) rx="5" {}
                text x=(format!("{:.1}", at.x)) y=(format!("{:.1}", at.y - 4.0)) { (elided(&layer.name, WIDTH)) }
                text.op x=(format!("{:.1}", at.x)) y=(format!("{:.1}", at.y + 11.0)) { (layer.op) (local) }
            }
        };
        markup.render_to(&mut self.boxes);
        self.reach(x, y);
        self.reach(x + BOX.0, y + BOX.1);
    }

    fn draw_arrow(
        &mut self,
        path: &[(Point, Point)],
        _: bool,
        _: (bool, bool),
        _: &StyleAttr,
        properties: Option<String>,
        _: &str,
    ) {
        let [first, rest @ ..] = path else { return };
        let [second, rest @ ..] = rest else { return };
        let point = |p: &Point| format!("{:.1} {:.1}", p.x, p.y);
        // The first segment begins at its first point with its second one as control, the next ends with both.
        let mut d =
            format!("M{}C{},{},{}", point(&first.0), point(&first.1), point(&second.0), point(&second.1));
        for (control, end) in rest {
            // Writing to a string cannot fail.
            let _ = write!(d, "S{},{}", point(control), point(end));
        }
        path.iter().for_each(|(a, b)| {
            self.reach(a.x, a.y);
            self.reach(b.x, b.y);
        });
        let class = properties.unwrap_or_default();
        html! { path class=(format!("edge {class}")) d=(d) marker-end="url(#arrow)" {} }
            .render_to(&mut self.arrows);
    }

    fn create_clip(&mut self, _: Point, _: Point, _: usize) -> ClipHandle {
        0
    }
}
