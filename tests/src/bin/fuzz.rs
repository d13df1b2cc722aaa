//! Mutates models and sees to it that none does harm: no panic, no signal, no attempt longer than five seconds (ten, with checks
//! of overflow), none that takes more than 500 MB.
//!
//! Attempts run in child processes, which are watched. What one finds is printed with the mutant's seed and, with `--keep`,
//! written to a folder.

use clap::Parser;
use qcc_tests::{
    attempt::{Bounds, attempt},
    mutate::Mutator,
    seeds,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader, Write},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

/// Seeded mutation of ONNX models.
#[derive(Parser, Clone)]
struct Arguments {
    /// Files, or folders of files, to mutate beside the bundled model, generated ones and those of goldens/ops.zip.
    #[arg(long, value_name = "PATH")]
    models: Vec<PathBuf>,
    /// Take every K-th of the files found.
    #[arg(long, value_name = "K", default_value_t = 1)]
    every: usize,
    /// Mutants to try.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    count: u64,
    /// Number of the first one; the others follow.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Processes at once.
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: u64,
    /// Write mutants that are findings into this folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Write the mutant of --seed to a file, and do nothing else.
    #[arg(long, value_name = "FILE", conflicts_with = "keep")]
    write: Option<PathBuf>,
    /// Be the child that tries these mutants.
    #[arg(long, hide = true)]
    child: bool,
    /// Of each so many the child tries one.
    #[arg(long, hide = true, default_value_t = 1)]
    stride: u64,
}

/// The longest that an attempt may take.
const MAX_TIME: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 5 });
/// The most memory that a process may have, in bytes.
const MAX_RESIDENT: u64 = 500 << 20;
/// Address space of a child: a runaway ends there, and not the machine.
const MAX_ADDRESSES_KIB: u64 = 8 << 20;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mutator = match mutator(&arguments) {
        Ok(mutator) => mutator,
        Err(e) => return complain(&format!("cannot read tests/goldens/ops.zip: {e}")),
    };
    if let Some(path) = &arguments.write {
        return match fs::write(path, mutator.mutant(arguments.seed)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => complain(&format!("cannot write {}: {e}", path.display())),
        };
    }
    if arguments.child {
        return match try_all(&arguments, &mutator) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => complain(&e.to_string()),
        };
    }
    let report = Mutex::new(Report::default());
    thread::scope(|scope| {
        for job in 0..arguments.jobs {
            let (arguments, report) = (&arguments, &report);
            scope.spawn(move || watch(arguments, job, report));
        }
    });
    let report = report.into_inner().unwrap_or_default();
    if let Some(folder) = &arguments.keep {
        for seed in report.findings.keys() {
            let write = fs::create_dir_all(folder)
                .and_then(|()| fs::write(folder.join(format!("{seed}.onnx")), mutator.mutant(*seed)));
            if let Err(e) = write {
                complain(&format!("cannot keep {seed}: {e}"));
            }
        }
    }
    report.print();
    if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[allow(clippy::print_stderr, reason = "a program that reports")]
fn complain(what: &str) -> ExitCode {
    eprintln!("{what}");
    ExitCode::FAILURE
}

fn mutator(arguments: &Arguments) -> std::io::Result<Mutator> {
    let mut models = seeds::generated();
    models.extend(seeds::bundled());
    models.extend(seeds::op_cases()?);
    let found = arguments.models.iter().flat_map(|path| seeds::find(path));
    models.extend(found.step_by(arguments.every.max(1)).filter_map(|path| seeds::read(&path)));
    Ok(Mutator::new(models))
}

// ---- the child

/// Says on standard output what begins and how it ends: `begin SEED`, then `end SEED KIB OUTCOME<tab>OPS` or
/// `panic SEED WHERE`.
fn try_all(arguments: &Arguments, mutator: &Mutator) -> std::io::Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("weights.bin"), [0x3f; 4096])?;
    let file = folder.path().join("mutant.onnx");
    panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        let text = info.payload_as_str().unwrap_or_default().replace('\n', " ");
        say(&format!("panicked {at}: {text}"));
    }));
    let end = arguments.seed + arguments.count;
    for seed in (arguments.seed..end).step_by(arguments.stride as usize) {
        fs::write(&file, mutator.mutant(seed))?;
        // 5 resets the high-water mark of the resident set: proc(5), /proc/pid/clear_refs. Where that is not possible, the
        // peak is that of all attempts.
        _ = fs::write("/proc/self/clear_refs", "5");
        say(&format!("begin {seed}"));
        match panic::catch_unwind(AssertUnwindSafe(|| attempt(&file, seed, Bounds::default()))) {
            Ok(a) => {
                let ops: Vec<String> = a.ops.into_iter().collect();
                say(&format!("end {seed} {} {}\t{}", peak_kib(), a.outcome, ops.join(",")));
            }
            Err(_) => say(&format!("panic {seed}")),
        }
    }
    Ok(())
}

/// A line that the parent reads.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Where the parent is gone, nobody needs the child.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}

// ---- the parent

#[derive(Default)]
struct Report {
    outcomes: BTreeMap<String, u64>,
    ops: BTreeMap<String, u64>,
    findings: BTreeMap<u64, String>,
    peak_kib: u64,
}

impl Report {
    #[allow(clippy::print_stdout, reason = "a program that reports")]
    fn print(&self) {
        let total: u64 = self.outcomes.values().sum();
        println!("{total} mutants came to an end:");
        for (outcome, n) in &self.outcomes {
            println!("{n:>8}  {outcome}");
        }
        let ops: Vec<String> = self.ops.iter().map(|(op, n)| format!("{op} {n}")).collect();
        println!("{} ops in models that were imported: {}", ops.len(), ops.join(", "));
        println!("peak of memory: {} MB", self.peak_kib >> 10);
        let kinds: BTreeSet<&String> = self.findings.values().collect();
        println!("{} findings of {} kinds", self.findings.len(), kinds.len());
        for (seed, what) in &self.findings {
            println!("{seed}: {what}");
        }
    }
}

/// What the child said, or that it is gone.
enum Said {
    Line(String),
    Gone,
}

/// Runs children one after the other until all mutants of a job are tried.
fn watch(arguments: &Arguments, job: u64, report: &Mutex<Report>) {
    let end = arguments.seed + arguments.count;
    let mut next = arguments.seed + job;
    while next < end {
        let Some(mut child) = child(arguments, next, end - next) else { return };
        let mut current: Option<u64> = None;
        let mut panicked = String::new();
        let lines = lines(&mut child);
        let finding = loop {
            let said = lines.recv_timeout(MAX_TIME + Duration::from_secs(u64::from(current.is_none()) * 60));
            let line = match said {
                Err(_) => break Some(format!("longer than {} s", MAX_TIME.as_secs())),
                Ok(Said::Gone) => break current.map(|_| String::new()),
                Ok(Said::Line(line)) => line,
            };
            let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match word {
                "begin" => current = rest.parse().ok(),
                "panicked" => panicked = rest.to_owned(),
                "panic" => {
                    record(report, |r| {
                        _ = r.findings.insert(current.unwrap_or(0), format!("panic at {panicked}"))
                    });
                    (next, current) = (current.map_or(next, |s| s + arguments.jobs), None);
                }
                _ => {
                    let mut parts = rest.splitn(3, ' ').skip(1);
                    let kib: u64 = parts.next().and_then(|k| k.parse().ok()).unwrap_or(0);
                    let (outcome, ops) = parts.next().and_then(|r| r.split_once('\t')).unwrap_or(("", ""));
                    record(report, |r| {
                        *r.outcomes.entry(outcome.to_owned()).or_insert(0) += 1;
                        for op in ops.split(',').filter(|op| !op.is_empty()) {
                            *r.ops.entry(op.to_owned()).or_insert(0) += 1;
                        }
                        r.peak_kib = r.peak_kib.max(kib);
                        if kib * 1024 > MAX_RESIDENT {
                            r.findings.insert(current.unwrap_or(0), format!("{} MB of memory", kib >> 10));
                        }
                    });
                    (next, current) = (current.map_or(next, |s| s + arguments.jobs), None);
                }
            }
        };
        _ = child.kill();
        let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
        match (finding, current) {
            (Some(what), Some(seed)) => {
                let what = if what.is_empty() { format!("the process ended: {status}") } else { what };
                record(report, |r| _ = r.findings.insert(seed, what));
                next = seed + arguments.jobs;
            }
            // The last one is done, or the child did not come up.
            _ if next < end => {
                complain(&format!("a child ended before its time: {status}"));
                return;
            }
            _ => {}
        }
    }
}

fn record(report: &Mutex<Report>, change: impl FnOnce(&mut Report)) {
    change(&mut report.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}

fn child(arguments: &Arguments, seed: u64, count: u64) -> Option<Child> {
    let program = std::env::current_exe().ok()?;
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {MAX_ADDRESSES_KIB}; ulimit -c 0; exec \"$0\" \"$@\"")]);
    command.arg(program).arg("--child");
    let numbers = [
        ("--seed", seed),
        ("--count", count),
        ("--stride", arguments.jobs),
        ("--every", arguments.every as u64),
    ];
    for (name, n) in numbers {
        command.arg(name).arg(n.to_string());
    }
    for path in &arguments.models {
        command.arg("--models").arg(path as &Path);
    }
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    spawned.map_err(|e| complain(&format!("cannot start a child: {e}"))).ok()
}

/// The lines that a child writes, as they come.
fn lines(child: &mut Child) -> mpsc::Receiver<Said> {
    let (send, receive) = mpsc::channel();
    if let Some(out) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(Said::Line(line)).is_err() {
                    return;
                }
            }
            _ = send.send(Said::Gone);
        });
    }
    receive
}
