//! What all pages have: head, style, scripts, packed data.

use crate::ReportError;
use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compression, write::GzEncoder};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotly::Plot;
use std::{collections::BTreeMap, io::Write};

/// plotly.js, compressed, in base 64.
const PLOTLY: &str = include_str!(concat!(env!("OUT_DIR"), "/plotly.js.gz.txt"));
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("page.js");

/// What the page may do: run and style itself. It may ask nobody for anything.
const POLICY: &str =
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:";

/// Charts by the id of the element that they are drawn into.
pub(crate) type Charts = BTreeMap<String, Plot>;

/// A whole page. `charts` are drawn when their elements are there to be seen.
pub(crate) fn frame(title: &str, body: &Markup, charts: &Charts) -> Result<String, ReportError> {
    let data = packed(&serde_json::to_vec(charts)?)?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                (body)
                // Base 64 needs no escaping.
                script #plotly type="application/gzip" { (PreEscaped(PLOTLY)) }
                script #charts type="application/gzip" { (PreEscaped(data)) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    Ok(page.into_string())
}

fn packed(bytes: &[u8]) -> Result<String, ReportError> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(bytes)?;
    Ok(BASE64_STANDARD.encode(packed.finish()?))
}

/// The place of a chart.
pub(crate) fn chart(id: &str, height: usize) -> Markup {
    html! { div.chart data-chart=(id) style=(format!("height:{height}px")) {} }
}

/// A command line as a shell takes it.
pub(crate) fn command(words: &[String]) -> String {
    let quoted = shlex::try_join(words.iter().map(String::as_str));
    // Only a word with a null byte cannot be quoted, which no command line has.
    format!("qcc {}", quoted.unwrap_or_else(|_| words.join(" ")))
}

/// A sentence in which what stands between backticks is a name.
pub(crate) fn marked(text: &str) -> Markup {
    html! {
        @for (i, part) in text.split('`').enumerate() {
            @if i % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}
