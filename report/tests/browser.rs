//! Pages in a browser: they open without errors, ask for nothing, draw their charts, and answer clicks.
//!
//! Needs Chromium (or Chrome) on the path. Where there is none, the tests say so on standard error.

mod common;

use common::{HOSTILE, hostile, of_bundled_model, with_layers};
use headless_chrome::{
    Browser, LaunchOptions, Tab,
    protocol::cdp::{Runtime::ConsoleAPICalledEventTypeOption, types::Event},
};
use qcc_report::{comparison_page, page};
use qcc_runtime::workbench::{Facts, compare};
use std::{
    env,
    ffi::OsStr,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
    thread,
    time::{Duration, Instant},
};

static FACTS: LazyLock<Facts> = LazyLock::new(of_bundled_model);
const PATIENCE: Duration = Duration::from_secs(60);

fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH")?).collect();
    let found = names.iter().flat_map(|n| folders.iter().map(move |f| f.join(n))).find(|p| p.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: there is no Chromium to open pages with (Debian: apt-get install chromium)");
    }
    found
}

/// A page that is open, and what the browser has complained about.
struct Open {
    tab: Arc<Tab>,
    complaints: Arc<Mutex<Vec<String>>>,
    _browser: Browser,
    _folder: tempfile::TempDir,
}

impl Open {
    /// Opens a page and waits until its charts are drawn; `None` without a browser.
    fn new(page: &str) -> Option<Open> {
        let path = chromium()?;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("page.html");
        std::fs::write(&file, page).unwrap();
        let options = LaunchOptions {
            path: Some(path),
            headless: true,
            sandbox: false,
            window_size: Some((1400, 1000)),
            user_data_dir: Some(folder.path().join("profile")),
            idle_browser_timeout: PATIENCE,
            args: ["--disable-gpu", "--disable-component-update"].map(OsStr::new).to_vec(),
            ..LaunchOptions::default()
        };
        let browser = Browser::new(options).unwrap();
        let tab = browser.new_tab().unwrap();
        tab.set_default_timeout(PATIENCE);
        let complaints: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = complaints.clone();
        let listen = move |event: &Event| {
            let complaint = match event {
                Event::RuntimeExceptionThrown(e) => format!("{:?}", e.params.exception_details),
                Event::LogEntryAdded(e) => format!("{:?}", e.params.entry),
                Event::RuntimeConsoleAPICalled(e)
                    if matches!(
                        e.params.Type,
                        ConsoleAPICalledEventTypeOption::Error | ConsoleAPICalledEventTypeOption::Warning
                    ) =>
                {
                    format!("{:?}", e.params.args)
                }
                _ => return,
            };
            heard.lock().unwrap().push(complaint);
        };
        tab.enable_log().unwrap().enable_runtime().unwrap();
        tab.add_event_listener(Arc::new(listen)).unwrap();
        tab.navigate_to(&format!("file://{}", file.display())).unwrap();
        let open = Open { tab, complaints, _browser: browser, _folder: folder };
        open.wait("document.body?.dataset.ready === 'yes'");
        open.wait(
            "[...document.querySelectorAll('main [data-chart]')].every(c => c.dataset.drawn === 'yes')",
        );
        Some(open)
    }

    fn value(&self, script: &str) -> serde_json::Value {
        self.tab.evaluate(script, false).unwrap().value.unwrap_or_default()
    }

    fn number(&self, script: &str) -> u64 {
        self.value(script).as_u64().unwrap_or_else(|| panic!("{script} is {:?}", self.value(script)))
    }

    fn text(&self, script: &str) -> String {
        self.value(script).as_str().unwrap_or_else(|| panic!("{script} is {:?}", self.value(script))).into()
    }

    fn wait(&self, condition: &str) {
        let end = Instant::now() + PATIENCE;
        while self.value(condition) != serde_json::Value::Bool(true) {
            let complaints = self.complaints.lock().unwrap().clone();
            assert!(Instant::now() < end, "waiting for {condition}: {complaints:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Every chart has marks in it, nothing was asked for, and nobody complained.
    fn check(&self, charts: &[&str]) {
        for id in charts {
            let marks = format!(
                "document.querySelectorAll('[data-chart={id}] svg.main-svg :is(.point path, .point, path.js-line, path.js-fill)').length"
            );
            assert!(self.number(&marks) > 0, "chart `{id}` is empty");
        }
        assert_eq!(self.number("performance.getEntriesByType('resource').length"), 0);
        let complaints = self.complaints.lock().unwrap();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}

#[test]
fn a_report_draws_its_charts_and_answers_clicks() {
    let Some(open) = Open::new(&page(&FACTS).unwrap()) else { return };
    open.check(&["errors", "times", "parts"]);
    assert_eq!(open.number("document.querySelectorAll('main [data-chart]').length"), 3);

    // A layer, by its row.
    let i = FACTS
        .layers
        .iter()
        .position(|l| l.weights.is_some() && l.channels.is_some() && l.grid.is_some())
        .unwrap();
    assert_eq!(open.value("document.getElementById('panel').hidden"), serde_json::Value::Bool(true));
    open.value(&format!("document.querySelector('tr[data-layer=\"{i}\"]').click()"));
    open.wait("[...document.querySelectorAll('#panel [data-chart]')].every(c => c.dataset.drawn === 'yes')");
    assert_eq!(open.text("document.querySelector('#panel h2').textContent"), FACTS.layers[i].name);
    let charts = ["values", "channels", "weights", "lsb"].map(|kind| format!("{kind}-{i}"));
    open.check(&charts.each_ref().map(String::as_str));
    // Its neighbour, by the link; and then the panel closes.
    open.value("document.querySelector('#panel .neighbours a').click()");
    assert_ne!(open.text("document.querySelector('#panel h2').textContent"), FACTS.layers[i].name);
    open.value("document.getElementById('close').click()");
    assert_eq!(open.value("document.getElementById('panel').hidden"), serde_json::Value::Bool(true));
    // By the graph.
    open.value(&format!("document.querySelector('svg.graph g[data-layer=\"{i}\"] rect').dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"));
    assert_eq!(open.text("document.querySelector('#panel h2').textContent"), FACTS.layers[i].name);

    // Sorted by what layers lose alone, the worst is the first row.
    open.value(
        "[...document.querySelectorAll('.layers th')].find(h => h.textContent === 'alone, dB').click()",
    );
    let first = open.text("document.querySelector('.layers tbody tr th').textContent");
    assert_eq!(first, FACTS.by_local_error()[0].0.name);
    open.value("[...document.querySelectorAll('.layers th')].find(h => h.textContent === 'layer').click()");
    let names = open
        .text("[...document.querySelectorAll('.layers tbody tr th')].map(h => h.textContent).join('\\n')");
    assert_eq!(names.lines().count(), FACTS.layers.len());
    open.check(&[]);
}

#[test]
fn hostile_names_stay_text() {
    let facts = hostile(FACTS.clone());
    let Some(open) = Open::new(&page(&facts).unwrap()) else { return };
    open.value("document.querySelector('tr[data-layer=\"3\"]').click()");
    open.wait("[...document.querySelectorAll('#panel [data-chart]')].every(c => c.dataset.drawn === 'yes')");
    assert_eq!(open.text("document.querySelector('#panel h2').textContent"), HOSTILE);
    assert_eq!(open.text("document.title"), format!("{HOSTILE}: quantization report"));
    assert_eq!(open.number("document.querySelectorAll('img').length"), 0);
    open.check(&["errors", "times"]);
}

#[test]
fn two_runs_are_shown_side_by_side() {
    let mut after = FACTS.clone();
    for layer in after.layers.iter_mut().filter(|l| l.macs > 0) {
        layer.error.local = layer.error.local.map(|d| qcc_runtime::Decibels(d.0 + 7.0));
    }
    let comparison = compare(FACTS.clone(), after);
    let Some(open) = Open::new(&comparison_page(&comparison).unwrap()) else { return };
    open.check(&["local", "cumulative", "times"]);
    assert_eq!(open.text("document.querySelector('#table td.good').textContent"), "+7.0");
}

#[test]
fn five_hundred_layers_are_drawn() {
    let facts = with_layers(FACTS.clone(), 500);
    let Some(open) = Open::new(&page(&facts).unwrap()) else { return };
    open.check(&["errors", "times"]);
    assert_eq!(open.number("document.querySelectorAll('svg.graph .node').length"), facts.layers.len() as u64);
}
