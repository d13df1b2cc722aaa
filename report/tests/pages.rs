//! Pages and JSON, without a browser.

mod common;

use common::{HOSTILE, hostile, of_bundled_model, with_layers};
use qcc_report::{ReportError, comparison_page, from_json, page, to_json};
use qcc_runtime::workbench::{Facts, compare};
use std::sync::LazyLock;

static FACTS: LazyLock<Facts> = LazyLock::new(of_bundled_model);

/// What a page says without its packed parts.
fn visible(page: &str) -> String {
    let mut text = page.to_string();
    for id in ["plotly", "charts"] {
        let start = text.find(&format!("<script id=\"{id}\"")).unwrap();
        let end = start + text[start..].find("</script>").unwrap();
        text.replace_range(start..end, "");
    }
    text
}

#[test]
fn facts_come_back_from_json() {
    let text = to_json(&FACTS).unwrap();
    assert_eq!(from_json(&text).unwrap(), *FACTS);
    assert!(text.len() < 400_000, "{} bytes", text.len());
    let newer = text.replacen("\"format\":1", "\"format\":99", 1);
    assert!(matches!(from_json(&newer), Err(ReportError::Format { found: 99 })));
    for wrong in ["", "{}", "[1]", &text[..text.len() / 2], "{\"format\":1}"] {
        assert!(matches!(from_json(wrong), Err(ReportError::Json(_))));
    }
    let mut astray = FACTS.clone();
    astray.edges[0].to = 10_000;
    assert!(from_json(&to_json(&astray).unwrap()).unwrap_err().to_string().contains("no facts"));
}

#[test]
fn pages_refer_to_nothing_outside() {
    let comparison = compare(FACTS.clone(), FACTS.clone());
    for page in [page(&FACTS).unwrap(), comparison_page(&comparison).unwrap()] {
        let text = page.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "//cdn", "@import", "url(h", "src="] {
            assert!(!text.contains(outside), "{outside}");
        }
        assert!(text.contains("Content-Security-Policy") && text.contains("default-src 'none'"));
        assert!(page.len() < 3_000_000, "{} bytes", page.len());
    }
}

#[test]
fn a_page_tells_what_it_is_for() {
    let text = visible(&page(&FACTS).unwrap());
    let order = [
        "What to try next",
        "What looks wrong",
        "What each layer loses",
        "Table of layers",
        "Why not faster",
        "How it was measured",
    ];
    let at: Vec<usize> = order.iter().map(|h| text.find(h).unwrap_or_else(|| panic!("no `{h}`"))).collect();
    assert!(at.is_sorted(), "{at:?}");
    for layer in &FACTS.layers {
        assert!(text.matches(&layer.name).count() >= 2, "{}", layer.name);
    }
    for (i, _) in FACTS.layers.iter().enumerate() {
        assert!(text.contains(&format!("<template id=\"layer-{i}\">")));
    }
    assert!(
        text.contains("qcc report &#39;my model.onnx&#39;") || text.contains("qcc report 'my model.onnx'")
    );
    assert_eq!(text.matches("<svg").count(), 1);
    assert_eq!(text.matches("class=\"node ").count(), FACTS.layers.len());
}

#[test]
fn names_are_text_whatever_they_are() {
    let facts = hostile(FACTS.clone());
    let page = page(&facts).unwrap();
    assert!(!visible(&page).contains("<script>document.title") && !page.contains("<img"));
    assert!(page.contains("&lt;script&gt;document.title"));
    // A shell takes it as one word.
    let quoted = format!("qcc {}", shlex::try_join(["report", HOSTILE]).unwrap());
    let escaped =
        quoted.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    assert!(page.contains(&escaped), "{escaped}");
    let comparison = comparison_page(&compare(FACTS.clone(), facts)).unwrap();
    assert!(!visible(&comparison).contains("<script>document.title") && !comparison.contains("<img"));
}

#[test]
fn large_models_have_pages_of_bounded_size() {
    let large = with_layers(FACTS.clone(), 500);
    let text = page(&large).unwrap();
    assert!(text.contains("class=\"node ") && text.len() < 8_000_000, "{} bytes", text.len());
    // Too large to be drawn, but not to be told.
    let larger = page(&with_layers(FACTS.clone(), 1000)).unwrap();
    assert!(larger.contains("too many layers to be drawn") && larger.contains("Table of layers"));
}
