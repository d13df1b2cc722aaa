//! Pages in a browser: they open without errors, ask for nothing, draw their charts, and answer clicks.
//!
//! Chromium opens the page with a script at its end that does what a user would do and leaves what it saw in the document,
//! which Chromium then prints. Where there is no Chromium on the path, the tests say so on standard error.

mod common;

use base64::{Engine, prelude::BASE64_STANDARD};
use common::{HOSTILE, hostile, of_bundled_model, with_layers};
use qcc_report::{comparison_page, page};
use qcc_runtime::workbench::{Facts, compare};
use serde_json::{Value, json};
use std::{
    env, fs,
    io::{Write, stderr},
    path::PathBuf,
    process::{Command, Stdio},
    sync::LazyLock,
};

static FACTS: LazyLock<Facts> = LazyLock::new(of_bundled_model);

/// Before anything else: whatever goes wrong is written down.
const LISTEN: &str = r#"<script>
    window.complaints = [];
    addEventListener("error", (e) => complaints.push("error: " + e.message));
    addEventListener("unhandledrejection", (e) => complaints.push("rejected: " + e.reason));
    addEventListener("securitypolicyviolation", (e) => complaints.push("not allowed: " + e.violatedDirective + " " + e.blockedURI));
    for (const kind of ["error", "warn"]) console[kind] = (...words) => complaints.push(kind + ": " + words.join(" "));
</script>"#;

/// Behind all else: waits for the charts, acts, and leaves a record.
const ACT: &str = r#"<script>(async () => {
    const until = async (what) => { while (!what()) await new Promise((done) => setTimeout(done, 10)); };
    const drawn = (root) => [...document.querySelectorAll(root + " [data-chart]")].every((c) => c.dataset.drawn === "yes");
    const marks = (id) => document.querySelectorAll(`[data-chart="${id}"] svg.main-svg :is(.point, .js-line, .js-fill)`).length;
    const text = (selector) => document.querySelector(selector)?.textContent;
    const click = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
    const heading = (name) => [...document.querySelectorAll(".layers th")].find((h) => h.textContent === name);
    let seen = {};
    try {
        await until(() => document.body.dataset.ready === "yes" && drawn("main"));
        seen.charts = Object.fromEntries([...document.querySelectorAll("main [data-chart]")].map((c) => [c.dataset.chart, marks(c.dataset.chart)]));
        await (async () => { /*act*/ })();
    } catch (error) { complaints.push("failed: " + error); }
    const record = { seen, complaints, requests: performance.getEntriesByType("resource").length };
    const out = document.createElement("pre");
    out.id = "record";
    const bytes = new TextEncoder().encode(JSON.stringify(record));
    out.textContent = btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(""));
    document.body.append(out);
})();</script>"#;

fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH")?).collect();
    let found = names.iter().flat_map(|n| folders.iter().map(move |f| f.join(n))).find(|p| p.is_file());
    if found.is_none() {
        // Written directly, so that it is seen although the test passes.
        let _ = writeln!(
            stderr(),
            "SKIPPED: there is no Chromium to open pages with (Debian: apt-get install chromium)"
        );
    }
    found
}

/// What is seen of a page when somebody acts on it, and of its charts; `None` without a browser. Fails where anybody complains,
/// anything is asked for, or a chart has nothing in it.
fn visit(page: &str, act: &str) -> Option<Value> {
    let path = chromium()?;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("page.html");
    let page = page.replacen("<head>", &format!("<head>{LISTEN}"), 1);
    let (body, end) = page.split_at(page.rfind("</body>").unwrap());
    fs::write(&file, format!("{body}{}{end}", ACT.replace("/*act*/", act))).unwrap();
    let profile = format!("--user-data-dir={}", folder.path().join("profile").display());
    let output = Command::new(path)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync", &profile])
        .args(["--window-size=1400,1000", "--virtual-time-budget=120000", "--timeout=180000", "--dump-dom"])
        .arg(format!("file://{}", file.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let document = String::from_utf8_lossy(&output.stdout);
    let record = document.rsplit_once("<pre id=\"record\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let Some((record, _)) = record else {
        panic!("the page did not come to an end: {}", String::from_utf8_lossy(&output.stderr))
    };
    let mut record: Value = serde_json::from_slice(&BASE64_STANDARD.decode(record).unwrap()).unwrap();
    assert_eq!((&record["complaints"], &record["requests"]), (&json!([]), &json!(0)));
    let seen = record["seen"].take();
    for (chart, marks) in seen["charts"].as_object().unwrap() {
        assert!(marks.as_u64() > Some(0), "chart `{chart}` is empty");
    }
    Some(seen)
}

#[test]
fn a_report_draws_its_charts_and_answers_clicks() {
    let is_whole = |l: &qcc_runtime::workbench::LayerFacts| {
        l.weights.is_some() && l.channels.is_some() && l.grid.is_some()
    };
    let i = FACTS.layers.iter().position(is_whole).unwrap();
    let act = r##"
        seen.hidden = document.getElementById("panel").hidden;
        // By its row.
        click(document.querySelector('tr[data-layer="LAYER"]'));
        await until(() => drawn("#panel"));
        seen.by_row = text("#panel h2");
        seen.details = ["values", "channels", "weights", "lsb"].map((kind) => marks(kind + "-LAYER"));
        // Its neighbour, by the link; and then the panel closes.
        click(document.querySelector("#panel .neighbours a"));
        seen.neighbour = text("#panel h2");
        click(document.getElementById("close"));
        seen.closed = document.getElementById("panel").hidden;
        // By the graph, and by the chart.
        click(document.querySelector('svg.graph g[data-layer="LAYER"] rect'));
        seen.by_graph = text("#panel h2");
        document.querySelector('[data-chart="errors"]').emit("plotly_click", { points: [{ x: 1 }] });
        seen.by_chart = text("#panel h2");
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        seen.escaped = document.getElementById("panel").hidden;
        // Sorted by what layers lose alone, the worst is the first row.
        click(heading("alone, dB"));
        seen.worst = text(".layers tbody tr th");
        click(heading("layer"));
        seen.names = [...document.querySelectorAll(".layers tbody tr th")].map((h) => h.textContent);
    "##;
    let Some(seen) = visit(&page(&FACTS).unwrap(), &act.replace("LAYER", &i.to_string())) else { return };
    let charts: Vec<&String> = seen["charts"].as_object().unwrap().keys().collect();
    assert_eq!(charts, ["errors", "parts", "times"]);
    let own = json!(FACTS.layers[i].name);
    assert_eq!([&seen["hidden"], &seen["closed"], &seen["escaped"]], [&json!(true); 3]);
    assert_eq!([&seen["by_row"], &seen["by_graph"]], [&own, &own]);
    assert!(seen["details"].as_array().unwrap().iter().all(|m| m.as_u64() > Some(0)), "{}", seen["details"]);
    assert!(seen["neighbour"] != own && FACTS.layers.iter().any(|l| json!(l.name) == seen["neighbour"]));
    assert_eq!(seen["by_chart"], json!(FACTS.layers[1].name));
    assert_eq!(seen["worst"], json!(FACTS.by_local_error()[0].0.name));
    let names: Vec<&str> = seen["names"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(names.len() == FACTS.layers.len() && names.is_sorted_by_key(|n| n.to_lowercase()), "{names:?}");
}

#[test]
fn hostile_names_stay_text() {
    let act = r##"
        click(document.querySelector('tr[data-layer="3"]'));
        await until(() => drawn("#panel"));
        seen.name = text("#panel h2");
        seen.title = document.title;
        seen.images = document.querySelectorAll("img").length;
    "##;
    let Some(seen) = visit(&page(&hostile(FACTS.clone())).unwrap(), act) else { return };
    assert_eq!((&seen["name"], &seen["images"]), (&json!(HOSTILE), &json!(0)));
    assert_eq!(seen["title"], json!(format!("{HOSTILE}: quantization report")));
}

#[test]
fn two_runs_are_shown_side_by_side() {
    let mut after = FACTS.clone();
    for layer in after.layers.iter_mut().filter(|l| l.macs > 0) {
        layer.error.local = layer.error.local.map(|d| qcc_runtime::Decibels(d.0 + 7.0));
    }
    let comparison = compare(FACTS.clone(), after);
    let act = "seen.difference = text('#table td.good');";
    let Some(seen) = visit(&comparison_page(&comparison).unwrap(), act) else { return };
    assert_eq!(seen["difference"], json!("+7.0"));
    let charts: Vec<&String> = seen["charts"].as_object().unwrap().keys().collect();
    assert_eq!(charts, ["cumulative", "local", "times"]);
}

#[test]
fn five_hundred_layers_are_drawn() {
    let facts = with_layers(FACTS.clone(), 500);
    let act = "seen.nodes = document.querySelectorAll('svg.graph .node').length;";
    let Some(seen) = visit(&page(&facts).unwrap(), act) else { return };
    assert_eq!(seen["nodes"], json!(facts.layers.len()));
}

#[test]
fn a_link_leads_to_a_layer() {
    // As if the address ended in it.
    let page = page(&FACTS).unwrap().replacen(
        "\"use strict\";",
        "\"use strict\"; history.replaceState(null, '', '#layer-2');",
        1,
    );
    let Some(seen) = visit(&page, "await until(() => drawn('#panel')); seen.name = text('#panel h2');")
    else {
        return;
    };
    assert_eq!(seen["name"], json!(FACTS.layers[2].name));
}
