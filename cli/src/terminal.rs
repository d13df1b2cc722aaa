//! What the user sees while a command works: progress and warnings, on standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qcc_runtime::{Event, ir::text};
use std::{
    collections::BTreeSet,
    io::{IsTerminal, Write, stderr, stdout},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Progress and warnings of one command; shared by all that report them.
pub(crate) struct Terminal {
    show_progress: bool,
    show_warnings: bool,
    print_after: Vec<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bar: Option<(String, ProgressBar)>,
    warned: BTreeSet<String>,
}

impl Terminal {
    /// `quiet`: 0 shows progress (on a terminal) and warnings, 1 warnings, 2 neither.
    pub(crate) fn new(quiet: u8, print_after: &[String]) -> Terminal {
        Terminal {
            show_progress: quiet == 0 && stderr().is_terminal(),
            show_warnings: quiet < 2,
            print_after: print_after.to_vec(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what a compiler tells.
    pub(crate) fn event(&self, event: Event<'_>) {
        match event {
            Event::Warning(text) => self.warn(text),
            Event::Calibrating { done, total } => self.progress("calibrating", done, total),
            Event::Reestimating { done, total } => self.progress("re-estimating batch norms", done, total),
            Event::Measuring { done, total } => self.progress("comparing calibrators", done, total),
            Event::Generating => self.spin("generating code"),
            Event::Pass { name, graph } => {
                if self.print_after.iter().any(|p| p == name || p == "all") {
                    self.clear();
                    // A reader that has gone away will be noticed by the next write that matters.
                    let _ = writeln!(stdout().lock(), "// after {name}\n{}", text::print(graph));
                }
            }
        }
    }

    /// Prints a warning, once.
    pub(crate) fn warn(&self, text: &str) {
        if self.show_warnings && self.state().warned.insert(text.into()) {
            self.clear();
            // Nobody is left to be told if standard error is gone.
            let _ = writeln!(stderr().lock(), "warning: {text}");
        }
    }

    /// Shows that `done` of `total` are done.
    pub(crate) fn progress(&self, what: &str, done: usize, total: usize) {
        if let Some(bar) = self.bar(what, Some(total)) {
            bar.set_position(done as u64);
        }
        if done >= total {
            self.clear();
        }
    }

    /// Shows that something of unknown length is being done.
    pub(crate) fn spin(&self, what: &str) {
        if let Some(bar) = self.bar(what, None) {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
    }

    /// Takes the progress off the screen.
    pub(crate) fn clear(&self) {
        if let Some((_, bar)) = self.state().bar.take() {
            bar.finish_and_clear();
        }
    }

    fn bar(&self, what: &str, total: Option<usize>) -> Option<ProgressBar> {
        if !self.show_progress {
            return None;
        }
        let mut state = self.state();
        if let Some((name, bar)) = &state.bar {
            if name == what {
                return Some(bar.clone());
            }
            bar.finish_and_clear();
        }
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {pos}/{len} {eta}",
            None => "{spinner} {msg} {elapsed}",
        };
        let bar = ProgressBar::with_draw_target(total.map(|t| t as u64), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        state.bar = Some((what.into(), bar.clone()));
        Some(bar)
    }
}
