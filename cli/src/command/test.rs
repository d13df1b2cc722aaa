//! `qcc test`.

use crate::{
    args::{Test, TestBackend},
    failure::Failure,
    table::{percent, table},
    terminal::Terminal,
};
use qcc_runtime::{
    Backend, Compiler, Precision,
    conformance::{Case, Tolerance},
    machine_memory,
};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

/// What one case came to.
struct Outcome {
    name: String,
    group: String,
    /// By backend; the error is the reason.
    results: Vec<Result<(), String>>,
}

pub(crate) fn run(args: &Test, quiet: u8, out: &mut impl Write) -> Result<(), Failure> {
    let terminal = Terminal::new(quiet, &[]);
    let mut cases = Vec::new();
    for folder in &args.folders {
        let read = |source| Failure::Read { path: folder.display().to_string(), source };
        cases.extend(Case::find(folder).map_err(read)?);
    }
    let mut missing = Vec::new();
    let mut groups = BTreeMap::new();
    if let Some(path) = &args.filter {
        groups = read_filter(path)?;
        let found: BTreeSet<&str> = cases.iter().map(|c| c.name.as_str()).collect();
        missing = groups.keys().filter(|name| !found.contains(name.as_str())).cloned().collect();
        cases.retain(|c| groups.contains_key(&c.name));
    }
    if cases.is_empty() && missing.is_empty() {
        return Err(Failure::Usage("there is no case: no folder with a model.onnx".into()));
    }
    let backends = args.backend.iter().map(|b| backend(*b, args)).collect::<Vec<_>>();
    let tolerance = Tolerance { relative: args.rtol, absolute: args.atol };
    let done = AtomicUsize::new(0);
    let group_of = |name: &str| groups.get(name).cloned().unwrap_or_default();
    let run = |case: &Case| {
        let results = backends.iter().map(|b| case.run(b, tolerance, memory(args))).collect();
        terminal.progress("testing", done.fetch_add(1, Ordering::Relaxed) + 1, cases.len());
        Outcome { name: case.name.clone(), group: group_of(&case.name), results }
    };
    let mut outcomes: Vec<Outcome> = silenced(|| cases.par_iter().map(run).collect());
    terminal.clear();
    let lost = |name: String| {
        let why = Err("there is no such case in the folders given".to_string());
        Outcome { group: group_of(&name), name, results: vec![why; backends.len()] }
    };
    outcomes.extend(missing.into_iter().map(lost));
    outcomes.sort_by(|a, b| (&a.group, &a.name).cmp(&(&b.group, &b.name)));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&as_json(args, &outcomes))?;
        super::write(path, text + "\n")?;
    }
    print(args, &outcomes, out)?;
    out.flush()?;
    let failed = outcomes.iter().filter(|o| o.results.iter().any(Result::is_err)).count();
    match failed {
        0 => Ok(()),
        n => Err(Failure::Tests { failed: n, of: outcomes.len() }),
    }
}

/// Runs `f` while panics print nothing: they are reasons why cases fail.
fn silenced<T>(f: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = f();
    std::panic::set_hook(hook);
    result
}

/// The memory that a model may take.
fn memory(args: &Test) -> u64 {
    args.memory.max_memory.unwrap_or_else(machine_memory)
}

fn backend(kind: TestBackend, args: &Test) -> Backend {
    match kind {
        TestBackend::Interpreter => Backend::Interpreter,
        TestBackend::Jit => {
            let compiler = Compiler::new().precision(Precision::Float).max_memory(memory(args));
            Backend::jit(match &args.tier.isa {
                Some(isa) => compiler.tier(isa),
                None => compiler,
            })
        }
    }
}

/// Names of cases and the group of each: a name a line, or a table with tabs between columns, of which `name` is one, and
/// `tier` and `group` make the groups.
fn read_filter(path: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let read = |source| Failure::Read { path: path.display().to_string(), source };
    let text = std::fs::read_to_string(path).map_err(read)?;
    let mut lines = text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')).peekable();
    let header: Vec<&str> = lines.peek().map(|l| l.split('\t').collect()).unwrap_or_default();
    let Some(name) = header.iter().position(|&h| h == "name") else {
        return Ok(lines.map(|l| (l.trim().to_string(), String::new())).collect());
    };
    let labels: Vec<usize> =
        ["tier", "group"].iter().filter_map(|l| header.iter().position(|h| h == l)).collect();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('\t').collect();
        let cell = |i: usize| cells.get(i).copied().unwrap_or_default().to_string();
        (cell(name), labels.iter().map(|&i| cell(i)).collect::<Vec<_>>().join(" "))
    };
    Ok(lines.skip(1).map(row).collect())
}

fn print(args: &Test, outcomes: &[Outcome], out: &mut impl Write) -> Result<(), Failure> {
    for (i, kind) in args.backend.iter().enumerate() {
        let failed = || outcomes.iter().filter_map(|o| Some((o, o.results[i].as_ref().err()?)));
        for (outcome, why) in failed() {
            writeln!(out, "{kind}: {} failed: {}", outcome.name, why.lines().collect::<Vec<_>>().join(" "))?;
        }
    }
    let mut header = vec!["group".to_string(), "cases".to_string()];
    for kind in &args.backend {
        header.extend([format!("{kind} passed"), "share".to_string()]);
    }
    let mut rows = table(header.iter().map(String::as_str).collect(), 1);
    let mut groups: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for o in outcomes {
        groups.entry(&o.group).or_default().push(o);
    }
    let mut add = |name: &str, of: &[&Outcome]| {
        let mut row = vec![name.to_string(), of.len().to_string()];
        for i in 0..args.backend.len() {
            let passed = of.iter().filter(|o| o.results[i].is_ok()).count();
            row.extend([passed.to_string(), percent(Some(passed as f64 / of.len().max(1) as f64), 1)]);
        }
        rows.add_row(row);
    };
    if groups.len() > 1 {
        groups.iter().for_each(|(name, of)| add(name, of));
    }
    add("all", &outcomes.iter().collect::<Vec<_>>());
    writeln!(out, "{rows}")?;
    Ok(())
}

fn as_json(args: &Test, outcomes: &[Outcome]) -> Value {
    let case = |o: &Outcome| {
        let results = args.backend.iter().zip(&o.results).map(|(kind, r)| {
            let result = match r {
                Ok(()) => json!({ "passed": true }),
                Err(why) => json!({ "passed": false, "reason": why }),
            };
            (kind.to_string(), result)
        });
        let results: serde_json::Map<String, Value> = results.collect();
        json!({ "name": o.name, "group": o.group, "results": results })
    };
    json!({
        "tolerance": { "relative": args.rtol, "absolute": args.atol },
        "cases": outcomes.iter().map(case).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_names_or_tables() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("filter");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_filter(&path).unwrap().into_iter().collect::<Vec<_>>()
        };
        let s = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(read("# some\ntest_b\n\ntest_a \n"), [s("test_a", ""), s("test_b", "")]);
        assert_eq!(
            read("tier\tname\tgroup\n1\ttest_a\tNorm\n2\ttest_b\tPool\n"),
            [s("test_a", "1 Norm"), s("test_b", "2 Pool")]
        );
    }
}
