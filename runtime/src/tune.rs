//! Tuning: the tilings of dense layers chosen by measurement, where the code generator chooses by a model of the CPU.
//!
//! Results do not depend on tilings, only times do: whatever is found, and whatever a file claims was found, is safe.

use crate::{Error, JitOptions, Model, Program, Session, TensorView, bench::noise, quantile::median};
use qcc_codegen::{ParseTilingError, Step, Tiling};
use qcc_ir::{Graph, NodeId, Op};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Tilings that were found to be faster than the code generator's own on some host of a tier.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tuning {
    /// The tier that they are for; others take no notice of them.
    pub tier: String,
    /// The tiling of each layer, as text, by the name of its node.
    pub tilings: BTreeMap<String, String>,
}

impl Tuning {
    /// Fails unless every tiling is one. Whether a layer can be cut like that is for the code generator to see: where it
    /// cannot, its own choice stays.
    pub(crate) fn check(&self) -> Result<(), ParseTilingError> {
        self.tilings.values().try_for_each(|text| text.parse::<Tiling>().map(drop))
    }

    /// The tilings by node; names that the graph does not have are left out.
    pub(crate) fn of(&self, graph: &Graph) -> BTreeMap<NodeId, Tiling> {
        let found =
            self.tilings.iter().filter_map(|(name, text)| Some((graph.find(name)?, text.parse().ok()?)));
        found.collect()
    }
}

/// What [`tune`] found.
#[derive(Clone, PartialEq, Debug)]
pub struct TuneReport {
    /// Layers with a choice.
    pub layers: usize,
    /// Different problems among them; each was measured once, in all of its layers together.
    pub problems: usize,
    /// Tilings that were timed, of all problems together, and how many there are.
    pub timed: (usize, usize),
    /// The problems that are cut in another way now.
    pub changes: Vec<Change>,
    /// Median time of a run in milliseconds, before and after, with the two taking turns; zeros where nothing changed.
    pub median_ms: (f64, f64),
}

/// One problem that is cut in another way.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    /// Its layers.
    pub layers: Vec<String>,
    /// The code generator's choice.
    pub from: Tiling,
    /// The faster one.
    pub to: Tiling,
    /// Time of the layers with the new choice, as a share of that with the old one.
    pub ratio: f64,
}

/// A choice must take at most this share of the time of the code generator's own: what is closer may be noise.
const BEYOND_NOISE: f64 = 0.98;
/// Fewest and most pairs of runs that a comparison takes.
const PAIRS: (usize, usize) = (7, 400);
/// Share of the time that is kept for confirming the choices together.
const CONFIRMATION: f64 = 0.25;
/// How often what won may have to win again.
const CONFIRMATIONS: u32 = 3;

/// Layers that are the same problem.
struct Problem {
    nodes: Vec<NodeId>,
    /// Candidates, the code generator's choice first.
    tilings: Vec<Tiling>,
    /// The best so far, and the share of the time that it takes.
    best: (usize, f64),
}

/// Times the tilings that each dense layer of a program could have on the tier and threads of `jit`, for about
/// `budget`, and gives the program those that are faster beyond noise. `progress` is told how many milliseconds of the
/// budget are spent, of how many.
///
/// Times are taken of whole runs, so that caches are as they will be: a candidate of every problem at once, in turns
/// with the code generator's choice, by the median ratio. What won is then confirmed in the same way, all together.
///
/// # Errors
/// Where the program cannot be compiled or run.
pub fn tune(
    program: &Program,
    jit: &JitOptions,
    budget: Duration,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Program, TuneReport), Error> {
    let start = Instant::now();
    let total = budget.as_millis() as usize;
    let mut tell = || progress((start.elapsed().as_millis() as usize).min(total), total);
    let untuned = program.clone().with_tuning(Tuning::none(jit));
    let base = untuned.jit(jit)?;
    let mut problems = problems(&base, program.graph());
    let rounds = problems.iter().map(|p| p.tilings.len()).max().unwrap_or(1);
    let candidates: usize = problems.iter().map(|p| p.tilings.len() - 1).sum();
    let search = budget.mul_f64(1.0 - CONFIRMATION);
    let mut timed = 0;
    for k in 1..rounds {
        // What is left, in equal parts for the candidates that are left.
        let slice = search.saturating_sub(start.elapsed()) / (rounds - k) as u32;
        if slice.is_zero() && k > 1 {
            break;
        }
        let wanted = problems.iter().filter(|p| k < p.tilings.len()).map(|p| (p, p.tilings[k]));
        let variant = untuned.clone().with_tuning(Tuning::new(jit, program.graph(), wanted)).jit(jit)?;
        let found = compare(&base, &variant, slice, &mut tell)?;
        for problem in problems.iter_mut().filter(|p| k < p.tilings.len()) {
            timed += 1;
            let ratio = found.ratio(&problem.nodes);
            if ratio < problem.best.1.min(BEYOND_NOISE) {
                problem.best = (k, ratio);
            }
        }
    }
    let layers = problems.iter().map(|p| p.nodes.len()).sum();
    let mut report = TuneReport {
        layers,
        problems: problems.len(),
        timed: (timed, candidates),
        changes: Vec::new(),
        median_ms: (0.0, 0.0),
    };
    let rest = budget.saturating_sub(start.elapsed());
    report.median_ms = confirm(&untuned, &base, &mut problems, jit, rest, &mut tell)?;
    let changed = problems.iter().filter(|p| p.best.0 > 0);
    report.changes = changed
        .map(|p| Change {
            layers: p.nodes.iter().map(|&n| program.graph().node(n).name.clone()).collect(),
            from: p.tilings[0],
            to: p.tilings[p.best.0],
            ratio: p.best.1,
        })
        .collect();
    Ok((untuned.with_tuning(Tuning::chosen(jit, program.graph(), &problems)), report))
}

/// Times what won, all together, in turns with what there was, and takes back what does not win again, until all of it
/// does; everything, if that takes too long or the runs as a whole are not faster. Median times of a run before and after.
fn confirm(
    untuned: &Program,
    base: &Model,
    problems: &mut [Problem],
    jit: &JitOptions,
    budget: Duration,
    tell: &mut dyn FnMut(),
) -> Result<(f64, f64), Error> {
    for _ in 0..CONFIRMATIONS {
        let tuning = Tuning::chosen(jit, untuned.graph(), problems);
        if tuning.tilings.is_empty() {
            break;
        }
        let tuned = untuned.clone().with_tuning(tuning).jit(jit)?;
        let found = compare(base, &tuned, budget / CONFIRMATIONS, tell)?;
        let mut taken_back = false;
        for problem in problems.iter_mut().filter(|p| p.best.0 > 0) {
            problem.best.1 = found.ratio(&problem.nodes);
            if problem.best.1 >= BEYOND_NOISE {
                problem.best = (0, 1.0);
                taken_back = true;
            }
        }
        let (before, after) = found.medians();
        if !taken_back && after < before {
            return Ok((before, after));
        }
        if !taken_back {
            break;
        }
    }
    problems.iter_mut().for_each(|p| p.best = (0, 1.0));
    Ok((0.0, 0.0))
}

impl Tuning {
    fn none(jit: &JitOptions) -> Tuning {
        Tuning { tier: jit.tier.name.into(), tilings: BTreeMap::new() }
    }

    /// The best tilings of all problems, where they are not the code generator's.
    fn chosen(jit: &JitOptions, graph: &Graph, problems: &[Problem]) -> Tuning {
        let changed = problems.iter().filter(|p| p.best.0 > 0);
        Tuning::new(jit, graph, changed.map(|p| (p, p.tilings[p.best.0])))
    }

    fn new<'p>(
        jit: &JitOptions,
        graph: &Graph,
        chosen: impl Iterator<Item = (&'p Problem, Tiling)>,
    ) -> Tuning {
        let mut tuning = Tuning::none(jit);
        for (problem, tiling) in chosen {
            let names = problem.nodes.iter().map(|&n| graph.node(n).name.clone());
            tuning.tilings.extend(names.map(|name| (name, tiling.to_string())));
        }
        tuning
    }
}

/// The layers with a choice, the same problems together, in the order of their first layers.
fn problems(base: &Model, graph: &Graph) -> Vec<Problem> {
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut problems: Vec<Problem> = Vec::new();
    for step in base.steps().iter().filter(|s| s.tilings.len() > 1) {
        let at = *places.entry(signature(graph, step)).or_insert(problems.len());
        if at == problems.len() {
            problems.push(Problem { nodes: Vec::new(), tilings: step.tilings.clone(), best: (0, 1.0) });
        }
        problems[at].nodes.push(step.node);
    }
    problems
}

/// What the time of a dense layer depends on: its op but for the grid of its result, and the shapes of its operands.
fn signature(graph: &Graph, step: &Step) -> String {
    let window = match graph.op(step.node) {
        Some(Op::Conv(c)) => format!("{:?} {} {}", c.window, c.groups, c.residual),
        Some(Op::QConv(c)) => format!("{:?} {} {} {}", c.window, c.groups, c.residual, c.requant),
        Some(Op::MatMul(m)) => format!("{}", m.residual),
        Some(Op::QMatMul(m)) => format!("{} {}", m.residual, m.requant),
        _ => step.name.clone(),
    };
    let shapes: Vec<String> =
        graph.operands(step.node).iter().map(|&v| graph.ty(v).shape.to_string()).collect();
    let tilings: Vec<String> = step.tilings.iter().map(Tiling::to_string).collect();
    format!("{} {window} {} {}", step.op, shapes.join(" "), tilings.join(" "))
}

/// Times of two models that took turns.
struct Comparison {
    /// For each node with a choice, its times in the pairs of runs.
    layers: BTreeMap<NodeId, [Vec<f64>; 2]>,
    /// Times of the whole runs.
    runs: [Vec<f64>; 2],
}

impl Comparison {
    /// Time of some nodes together in the second model as a share of that in the first, by medians.
    fn ratio(&self, nodes: &[NodeId]) -> f64 {
        let time = |of: usize| -> f64 {
            nodes
                .iter()
                .filter_map(|n| self.layers.get(n))
                .filter_map(|times| median(times[of].iter().copied()))
                .sum()
        };
        let (before, after) = (time(0), time(1));
        if before > 0.0 { after / before } else { 1.0 }
    }

    /// Median times of a run, in milliseconds.
    fn medians(&self) -> (f64, f64) {
        let ms = |of: usize| 1e3 * median(self.runs[of].iter().copied()).unwrap_or(0.0);
        (ms(0), ms(1))
    }
}

/// Runs two models in turns for about `budget`, on noise.
fn compare(a: &Model, b: &Model, budget: Duration, tell: &mut dyn FnMut()) -> Result<Comparison, Error> {
    let batch = noise(a)?;
    let inputs: Vec<TensorView<'_>> = batch.iter().map(TensorView::from).collect();
    let mut sessions = [Session::new(a), Session::new(b)];
    let mut found = Comparison { layers: BTreeMap::new(), runs: [Vec::new(), Vec::new()] };
    let start = Instant::now();
    for pair in 0..=PAIRS.1 {
        if pair > PAIRS.0 && start.elapsed() >= budget {
            break;
        }
        // Which one is first alternates: the second finds the input in the cache.
        for i in [pair % 2, 1 - pair % 2] {
            let session = &mut sessions[i];
            session.start_profile();
            session.run(&inputs)?;
            // The first pair warms up.
            if pair > 0 {
                found.take(i, session);
            }
        }
        tell();
    }
    Ok(found)
}

impl Comparison {
    /// Takes in the times of a session's one run.
    fn take(&mut self, of: usize, session: &Session) {
        let model = session.model().clone();
        let times: Vec<f64> = session.profile().iter().map(|l| l.time.as_secs_f64()).collect();
        self.runs[of].push(times.iter().sum());
        for (step, time) in model.steps().iter().zip(&times).filter(|(s, _)| s.tilings.len() > 1) {
            self.layers.entry(step.node).or_default()[of].push(*time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compiler, bundled};

    fn program() -> (Program, JitOptions) {
        let compiler = Compiler::new()
            .calibration(bundled::calibration().unwrap().limit(8))
            .preprocess(bundled::preprocess());
        let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
        (compiler.program_of_graph(graph).unwrap(), compiler.jit_options().unwrap())
    }

    fn logits(program: &Program, jit: &JitOptions) -> Vec<qcc_ir::Tensor> {
        let model = program.jit(jit).unwrap();
        let batch = noise(&model).unwrap();
        Session::new(&model).run(&[(&batch[0]).into()]).unwrap()
    }

    #[test]
    fn tuning_measures_every_problem_and_changes_no_result() {
        let (program, jit) = program();
        let mut spent = Vec::new();
        let (tuned, report) =
            tune(&program, &jit, Duration::from_millis(400), &mut |done, total| spent.push((done, total)))
                .unwrap();
        assert!(report.layers >= report.problems && report.problems > 3, "{report:?}");
        assert!(report.timed.0 > 0 && report.timed.0 <= report.timed.1, "{report:?}");
        assert!(report.changes.iter().all(|c| c.from != c.to && c.ratio < BEYOND_NOISE), "{report:?}");
        assert!(spent.is_sorted() && spent.iter().all(|(done, total)| done <= total && *total == 400));
        let named: usize = tuned.tunings().iter().map(|t| t.tilings.len()).sum();
        assert_eq!(named, report.changes.iter().map(|c| c.layers.len()).sum::<usize>());
        assert_eq!(logits(&tuned, &jit), logits(&program, &jit));
        // Tuning again starts from the code generator's own choice.
        let (again, _) = tune(&tuned, &jit, Duration::ZERO, &mut |_, _| {}).unwrap();
        assert!(again.tunings().len() <= 1);
    }

    #[test]
    fn same_problems_are_one() {
        let (program, jit) = program();
        let model = program.jit(&jit).unwrap();
        let found = problems(&model, program.graph());
        let mut nodes: Vec<NodeId> = found.iter().flat_map(|p| p.nodes.clone()).collect();
        let with_choice = model.steps().iter().filter(|s| s.tilings.len() > 1).count();
        nodes.sort_unstable();
        nodes.dedup();
        assert_eq!(nodes.len(), with_choice);
        for p in &found {
            let shape = |n: &NodeId| program.graph().shape(n.out()).clone();
            assert!(p.nodes.iter().all(|n| shape(n) == shape(&p.nodes[0])));
        }
    }

    #[test]
    fn ratios_are_of_medians_of_layers_together() {
        let nodes: Vec<NodeId> = program().0.graph().order().into_iter().take(2).collect();
        let layers = BTreeMap::from([
            (nodes[0], [vec![3.0, 1.0, 100.0], vec![1.0, 1.0, 1.0]]),
            (nodes[1], [vec![1.0; 3], vec![2.0; 3]]),
        ]);
        let found = Comparison { layers, runs: [vec![0.001, 0.003], vec![0.002, 0.004]] };
        assert_eq!(found.ratio(&nodes), 0.75);
        assert_eq!(found.ratio(&nodes[1..]), 2.0);
        assert_eq!(found.ratio(&[]), 1.0);
        assert_eq!(found.medians(), (1.0, 2.0));
    }
}
