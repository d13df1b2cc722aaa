//! The smallest set of layers that must stay float for a network to be good enough.

use super::{
    Policy,
    latency::{self, Timing},
    policy::LayerPrecision,
    sensitivity::{LayerSensitivity, Sensitivity, Trials},
};
use crate::{
    Calibrated, Compiler, Error, Precision, Prepared, Program, Samples, compiler::Runs, evaluate,
    sqnr::decibels,
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// What a quantized network is to reach.
#[derive(Clone, Debug)]
pub enum Target {
    /// Signal-to-noise ratio of the results against float, in dB (the mean of noise over signal, of several results), on
    /// calibration samples that ranges do not know.
    MinSqnr(f64),
    /// At most so many of 100 labelled samples are classified worse than by float.
    MaxDrop {
        /// Points of top-1.
        points: f64,
        /// Samples with labels.
        samples: Samples,
    },
}

/// What the accuracy of a set of float layers is told in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Signal-to-noise ratio of the results, in dB.
    SqnrDb,
    /// Points of top-1 below float.
    PointsLost,
}

impl Measure {
    /// A measured value in words.
    pub fn describe(self, value: f64) -> String {
        match self {
            Measure::SqnrDb => format!("{value:.2} dB"),
            Measure::PointsLost => format!("{value:.2} points lost"),
        }
    }
}

impl Target {
    /// What it is measured in.
    pub fn measure(&self) -> Measure {
        match self {
            Target::MinSqnr(_) => Measure::SqnrDb,
            Target::MaxDrop { .. } => Measure::PointsLost,
        }
    }
}

/// What mixed precision is for.
#[derive(Clone, Debug, Default)]
pub struct Goal {
    /// The accuracy to reach, where that matters.
    pub target: Option<Target>,
    /// Whether layers are to stay float that are faster so on this CPU.
    pub is_latency: bool,
}

/// One set of float layers that was measured.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Attempt {
    /// Number of float layers.
    pub float_layers: usize,
    /// What it reached, in the [`Measure`] of the search.
    pub reached: f64,
    /// Whether that is good enough.
    pub is_enough: bool,
}

/// What a search found.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MixedPrecision {
    /// The layers, all of those that could be int8.
    pub policy: Policy,
    /// What rounding each of them costs; where accuracy was a goal, and all of them in int8 were not enough.
    pub sensitivity: Option<Sensitivity>,
    /// What was measured, in order. The first one has all layers in int8 but for those that are faster in float.
    pub attempts: Vec<Attempt>,
    /// What was timed; where latency was a goal.
    pub timing: Option<Timing>,
    /// In words, such as `at least 35 dB on 25 samples`.
    pub goal: String,
    /// What `reached` and the attempts are told in; where accuracy was a goal.
    pub measure: Option<Measure>,
    /// What the chosen layers reach.
    pub reached: Option<f64>,
}

/// How a set of float layers is judged.
struct Judge<'a> {
    compiler: &'a Compiler,
    prepared: &'a Prepared,
    calibrated: &'a Calibrated,
    trials: &'a Trials<'a>,
    target: &'a Target,
    attempts: Vec<Attempt>,
    /// Attempts that were made already, by their layers.
    known: BTreeMap<BTreeSet<String>, bool>,
}

impl Judge<'_> {
    /// Whether these layers in float are enough.
    fn is_enough(&mut self, float: &BTreeSet<String>) -> Result<bool, Error> {
        if let Some(&known) = self.known.get(float) {
            return Ok(known);
        }
        let (reached, is_enough) = match self.target {
            Target::MinSqnr(least) => {
                let reached = decibels(self.trials.without(float)?);
                (reached, reached >= *least)
            }
            Target::MaxDrop { points, samples } => {
                let lost = self.points_lost(float, samples)?;
                (lost, lost <= *points)
            }
        };
        self.attempts.push(Attempt { float_layers: float.len(), reached, is_enough });
        self.known.insert(float.clone(), is_enough);
        Ok(is_enough)
    }

    fn points_lost(&self, float: &BTreeSet<String>, samples: &Samples) -> Result<f64, Error> {
        let silent = self.compiler.silent();
        let program = |compiler: &Compiler, calibrated: Option<&Calibrated>| {
            compiler.jit(&compiler.lower(self.prepared, calibrated)?)
        };
        let mixed = silent.clone().precision(Precision::Int8).policy(Policy::of_float(float.iter().cloned()));
        let models = [
            program(&silent.clone().precision(Precision::Float), None)?,
            program(&mixed, Some(self.calibrated))?,
        ];
        let feed = samples.bind(models[0].inputs(), &silent.preprocess)?;
        let found = evaluate(&models, &feed, &silent.threads_of_calibration()?, &|_, _| {})?;
        match (found.scores[0].top1, found.scores[1].top1) {
            (Some(expected), Some(got)) => Ok(100.0 * (expected - got)),
            _ => Err(Error::Evaluation(format!(
                "samples of {} have no labels, and how many are classified worse cannot be told: give some that have, or a \
                 signal-to-noise ratio to reach instead (--min-sqnr)",
                samples.origin()
            ))),
        }
    }
}

impl Compiler {
    /// The layers that are to stay float so that the rest may be int8, and a [`Policy`] that says so.
    ///
    /// 1. With `is_latency`, layers that are slower in int8 than in float on this CPU stay float, if the whole network then
    ///    is faster.
    /// 2. If that misses the target, the [sensitivity](Self::sensitivity) of all layers is measured, and by bisection the least
    ///    number of the most sensitive ones is found that must be float to reach it.
    /// 3. Each of these is tried in int8 again, the least sensitive one first, and stays so where the target is still met.
    ///
    /// So none of the layers that it leaves in float could be int8 if all others stay what they are. That no smaller set of
    /// quite other layers would do is not shown: there are 2ⁿ of them.
    ///
    /// # Errors
    /// Where there are no samples, the target cannot be measured on them, or is out of reach with all layers in float.
    pub fn mixed_precision(
        &self,
        prepared: &Prepared,
        calibrated: &Calibrated,
        goal: &Goal,
    ) -> Result<MixedPrecision, Error> {
        let trials = Trials::new(self, prepared, calibrated)?;
        let graph = prepared.graph();
        let layers: Vec<String> = trials.layers().into_iter().map(|n| graph.node(n).name.clone()).collect();
        let mut float = BTreeSet::new();
        let timing = match goal.is_latency {
            true => {
                let timing = latency::slower_in_int8(self, prepared, calibrated, &layers)?;
                float.extend(timing.float.iter().cloned());
                Some(timing)
            }
            false => None,
        };
        let mut found = MixedPrecision {
            policy: Policy::default(),
            sensitivity: None,
            attempts: Vec::new(),
            timing,
            goal: describe(goal, &trials),
            measure: goal.target.as_ref().map(Target::measure),
            reached: None,
        };
        if let Some(target) = &goal.target {
            let (attempts, known) = (Vec::new(), BTreeMap::new());
            let mut judge =
                Judge { compiler: self, prepared, calibrated, trials: &trials, target, attempts, known };
            let mut runs = Runs::new(self, layers.len() + 2 * steps(layers.len()));
            if !judge.is_enough(&float)? {
                let sensitivity = trials.sensitivity(&mut runs)?;
                float = smallest(&mut judge, &float, &sensitivity.layers, &mut runs)?;
                found.sensitivity = Some(sensitivity);
            }
            runs.finish();
            let last = judge.attempts.iter().rev().find(|a| a.float_layers == float.len() && a.is_enough);
            found.reached = last.map(|a| a.reached);
            found.attempts = judge.attempts;
        }
        found.policy.layers = layers
            .into_iter()
            .map(|name| {
                let is_float = float.contains(&name);
                (name, if is_float { LayerPrecision::Float } else { LayerPrecision::Int8 })
            })
            .collect();
        Ok(found)
    }
}

/// Halvings of so many layers.
fn steps(layers: usize) -> usize {
    usize::BITS as usize - layers.leading_zeros() as usize
}

/// The float layers that reach the target, of which none can be left out; those of `given` stay.
fn smallest(
    judge: &mut Judge<'_>,
    given: &BTreeSet<String>,
    ranked: &[LayerSensitivity],
    runs: &mut Runs<'_>,
) -> Result<BTreeSet<String>, Error> {
    let ranked: Vec<&str> = ranked.iter().map(|l| l.layer.as_str()).filter(|n| !given.contains(*n)).collect();
    let first = |count: usize| -> BTreeSet<String> {
        given.iter().cloned().chain(ranked[..count].iter().map(|n| n.to_string())).collect()
    };
    // `enough` layers are, `short` are not.
    let (mut short, mut enough) = (0, ranked.len());
    if !judge.is_enough(&first(enough))? {
        let reached = judge.attempts.last().map_or(f64::NAN, |a| a.reached);
        let wanted = match judge.target {
            Target::MinSqnr(least) => format!("{least} dB"),
            Target::MaxDrop { points, .. } => format!("a loss of at most {points} points"),
        };
        let reached = judge.target.measure().describe(reached);
        return Err(Error::Calibration(format!(
            "{wanted} is out of reach: with all layers in float it is {reached}"
        )));
    }
    while enough - short > 1 {
        let middle = short + (enough - short) / 2;
        match judge.is_enough(&first(middle))? {
            true => enough = middle,
            false => short = middle,
        }
        runs.step();
    }
    let mut float = first(enough);
    for name in ranked[..enough].iter().rev() {
        float.remove(*name);
        if !judge.is_enough(&float)? {
            float.insert(name.to_string());
        }
        runs.step();
    }
    Ok(float)
}

fn describe(goal: &Goal, trials: &Trials<'_>) -> String {
    let (samples, _) = trials.samples();
    let target = goal.target.as_ref().map(|target| match target {
        Target::MinSqnr(least) => format!("at least {least} dB on {samples} samples"),
        Target::MaxDrop { points, samples } => {
            format!("at most {points} points of top-1 lost on samples of {}", samples.origin())
        }
    });
    let latency = goal.is_latency.then(|| "no layer in int8 that is faster in float".to_string());
    [target, latency].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

impl Compiler {
    /// The int8 program of a policy, on the ranges that a calibration of this compiler has found. Where biases take means
    /// ([`Repairs::means`](qcc_passes::Repairs::means)), these are of the network that comes of the policy, as if the compiler had had
    /// it from the beginning.
    ///
    /// # Errors
    /// Where a sample cannot be read, or the policy is none for this model.
    pub fn program_of_policy(
        &self,
        prepared: &Prepared,
        calibrated: &Calibrated,
        policy: Policy,
    ) -> Result<Program, Error> {
        let compiler = self.clone().policy(policy);
        let calibrated = compiler.corrected(prepared, calibrated)?;
        compiler.program_of_prepared(prepared, Some(&calibrated))
    }
}

impl MixedPrecision {
    /// The text of a policy file, in which each layer has what was measured of it beside it, the most sensitive one first.
    pub fn policy_text(&self, model: &str) -> String {
        let float = self.policy.float().count();
        let say = |value: Option<f64>| Some(self.measure?.describe(value?));
        let first = say(self.attempts.first().map(|a| a.reached));
        let reached = match (say(self.reached), first) {
            (Some(reached), Some(first)) => {
                format!(" It is {reached}, and {first} with all of them in int8.")
            }
            _ => String::new(),
        };
        let head = format!(
            "Precision of the layers of {model}, chosen for: {}.\n{float} of {} layers stay float.{reached}\n\
             Edit it (\"float\" or \"int8\"), and give it back: qcc compile MODEL --policy THIS_FILE",
            self.goal,
            self.policy.layers.len(),
        );
        let told: Vec<(String, String)> =
            self.sensitivity.iter().flat_map(|s| &s.layers).map(comment).collect();
        self.policy.text(&head, &told)
    }
}

fn comment(layer: &LayerSensitivity) -> (String, String) {
    let text = format!(
        "{}: {:.1} dB if it alone is int8, {:.1} if it alone is float",
        layer.op, layer.alone_db, layer.without_db
    );
    (layer.layer.clone(), text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Threads, bundled};
    use qcc_ir::{Graph, Tensor};

    fn compiler(threads: usize) -> Compiler {
        Compiler::new()
            .calibration(bundled::calibration().unwrap().limit(24))
            .preprocess(bundled::preprocess())
            .calibration_threads(Threads::new(threads).unwrap())
    }

    /// The bundled network in which one channel between two convolutions is 300 times what it was: the same in float, and
    /// a layer whose other channels have no codes left.
    fn broken() -> Graph {
        let mut graph = compiler(1).import_onnx(bundled::FASHION_RESNET8).unwrap();
        let (maker, reader) = ("/l2/b1/BatchNormalization", "/l2/c2/Conv");
        let mut scale = |name: &str, slot: usize, factor: f32, is_it: &dyn Fn(usize, &[usize]) -> bool| {
            let node = graph.find(name).unwrap();
            let old = graph.constant_value(graph.operand(node, slot)).unwrap();
            let dims = old.shape().dims().to_vec();
            let numbers = old.as_slice::<f32>().unwrap().iter().enumerate();
            let new = numbers.map(|(i, w)| if is_it(i, &dims) { w * factor } else { *w }).collect();
            let constant = Tensor::from_vec::<f32>(old.shape().clone(), new).unwrap();
            let constant = graph.constant(&format!("{name}_{slot}"), constant);
            graph.set_operand(node, slot, constant).unwrap();
        };
        scale(maker, 1, 300.0, &|i, _| i == 0);
        scale(maker, 2, 300.0, &|i, _| i == 0);
        scale(reader, 1, 1.0 / 300.0, &|i, dims| i / (dims[2] * dims[3]) % dims[1] == 0);
        graph
    }

    #[test]
    fn the_layers_around_a_spoilt_channel_are_found_and_no_more_stay_float_than_must() {
        let compiler = compiler(2);
        let sound = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
        let prepared = compiler.prepare(broken()).unwrap();
        let of_sound = compiler.sensitivity(&sound, &compiler.calibrate(&sound).unwrap()).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let goal = Goal { target: Some(Target::MinSqnr(of_sound.int8_db - 1.0)), is_latency: false };
        let found = compiler.mixed_precision(&prepared, &calibrated, &goal).unwrap();
        let sensitivity = found.sensitivity.as_ref().unwrap();
        assert!(sensitivity.int8_db < of_sound.int8_db - 6.0, "{sensitivity:?}");
        assert!(sensitivity.layers[0].layer == "/l2/c2/Conv", "{sensitivity:?}");
        let float: Vec<&str> = found.policy.float().collect();
        assert!(float.len() <= 2 && float.contains(&"/l2/c2/Conv"), "{float:?}");
        assert!(found.reached.unwrap() >= of_sound.int8_db - 1.0, "{found:?}");
        // None of them can be left out: that was measured.
        let trials = Trials::new(&compiler, &prepared, &calibrated).unwrap();
        for name in &float {
            let rest = float.iter().filter(|n| *n != name).map(|n| n.to_string()).collect();
            assert!(decibels(trials.without(&rest).unwrap()) < of_sound.int8_db - 1.0, "{name}");
        }
        // The file that is written makes the same program.
        let text = found.policy_text("fashion.onnx");
        let read = Policy::parse(&text).unwrap();
        assert_eq!(read, found.policy, "{text}");
        let program = |policy: Policy| {
            let own = compiler.clone().policy(policy);
            let program = own.program_of_prepared(&prepared, Some(&calibrated)).unwrap();
            qcc_ir::text::print(program.graph())
        };
        let mixed = program(read);
        assert_eq!(mixed, program(Policy::of_float(float.iter().map(|n| n.to_string()))));
        let line = mixed.lines().find(|l| l.contains("/l2/c2/Conv")).unwrap_or_default();
        assert!(!line.contains("QConv"), "{line}");
        // And whatever the threads.
        let one = self::compiler(1);
        assert_eq!(one.mixed_precision(&prepared, &calibrated, &goal).unwrap(), found);
    }

    #[test]
    fn all_layers_stay_int8_where_that_is_enough() {
        let compiler = compiler(2);
        let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let search = |target| {
            let goal = Goal { target: Some(target), is_latency: false };
            compiler.mixed_precision(&prepared, &calibrated, &goal)
        };
        let found = search(Target::MinSqnr(20.0)).unwrap();
        assert!(
            found.policy.float().count() == 0 && found.sensitivity.is_none() && found.attempts.len() == 1
        );
        let samples = || bundled::test_images().unwrap().limit(64);
        let found = search(Target::MaxDrop { points: 1.6, samples: samples() }).unwrap();
        assert_eq!((found.policy.float().count(), found.measure), (0, Some(Measure::PointsLost)));
        let unlabelled = Samples::from_arrays(vec![(
            "image".into(),
            Tensor::zeros(qcc_ir::DType::F32, qcc_ir::Shape::new([4, 1, 28, 28]).unwrap()),
        )]);
        let refused = search(Target::MaxDrop { points: 1.0, samples: unlabelled.unwrap() }).unwrap_err();
        assert!(refused.to_string().contains("no labels"), "{refused}");
        let out_of_reach = search(Target::MaxDrop { points: -100.0, samples: samples() }).unwrap_err();
        assert!(out_of_reach.to_string().contains("out of reach"), "{out_of_reach}");
    }

    #[test]
    fn a_policy_for_another_model_is_refused_with_what_is_near() {
        let policy = Policy::of_float(["/l2/c3/Conv".to_string()]);
        let refused = compiler(1).policy(policy).compile_onnx(bundled::FASHION_RESNET8).err();
        let text = refused.map_or_else(String::new, |e| e.to_string());
        assert!(text.contains("`/l2/c3/Conv`") && text.contains("did you mean"), "{text}");
    }

    #[test]
    fn without_samples_there_is_nothing_to_measure() {
        let compiler = Compiler::new();
        let prepared = compiler.prepare(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let refused = compiler.sensitivity(&prepared, &calibrated).unwrap_err();
        assert!(refused.to_string().contains("--calibrate"), "{refused}");
    }
}
