//! Layers that integers do not make faster on this CPU.

use super::Policy;
use crate::{Calibrated, Compiler, Error, Precision, Prepared, Program, bench};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Runs of each program.
const REPS: usize = 60;
/// A layer is slower if it takes so much longer; a network faster if it takes so much less time.
const MARGIN: f64 = 0.01;
/// Layers that are tried one by one.
const MOST_SINGLE: usize = 8;

/// What was timed, by medians of runs in turn, on the tier and threads of the compiler.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Timing {
    /// The layers that stay float.
    pub float: BTreeSet<String>,
    /// Milliseconds of a run in float.
    pub float_ms: f64,
    /// With all layers in int8 that can be.
    pub int8_ms: f64,
    /// With these layers in float.
    pub mixed_ms: f64,
    /// Milliseconds in float and in int8 of the layers that looked slower in int8.
    pub slower: BTreeMap<String, [f64; 2]>,
}

/// The layers of `layers` that stay float.
pub(super) fn slower_in_int8(
    compiler: &Compiler,
    prepared: &Prepared,
    calibrated: &Calibrated,
    layers: &[String],
) -> Result<Timing, Error> {
    let silent = compiler.silent();
    let jit = silent.jit_options()?;
    let with = |float: &BTreeSet<String>| -> Result<Program, Error> {
        let policy = Policy::of_float(float.iter().cloned());
        silent.clone().precision(Precision::Int8).policy(policy).lower(prepared, Some(calibrated))
    };
    let medians = |programs: &[Program]| -> Result<Vec<f64>, Error> {
        let report = bench(programs, &jit, None, REPS, &mut |_, _| {})?;
        Ok(report.runs.iter().map(|r| r.latency_ms.median).collect())
    };
    let float = silent.clone().precision(Precision::Float).lower(prepared, None)?;
    let int8 = with(&BTreeSet::new())?;
    let report = bench(&[float.clone(), int8.clone()], &jit, None, REPS, &mut |_, _| {})?;
    let times = |run: usize| -> BTreeMap<&str, f64> {
        report.runs[run].layers.iter().map(|l| (l.name.as_str(), l.ms)).collect()
    };
    let (of_float, of_int8) = (times(0), times(1));
    let mut slower = BTreeMap::new();
    for name in layers {
        if let (Some(&f), Some(&i)) = (of_float.get(name.as_str()), of_int8.get(name.as_str()))
            && i > f * (1.0 + MARGIN)
        {
            slower.insert(name.clone(), [f, i]);
        }
    }
    let (mut best, mut best_program) = (BTreeSet::new(), int8);
    // Whether a set beats the best one so far, both timed in turn.
    let mut attempt = |float: BTreeSet<String>| -> Result<bool, Error> {
        let program = with(&float)?;
        let [old, new] = medians(&[best_program.clone(), program.clone()])?[..] else { return Ok(false) };
        let is_faster = new < old * (1.0 - MARGIN);
        if is_faster {
            (best, best_program) = (float, program);
        }
        Ok(is_faster)
    };
    // Where no layer gains, conversions do not pay either: all of it in float is a candidate like others.
    attempt(layers.iter().cloned().collect())?;
    if !slower.is_empty() && !attempt(slower.keys().cloned().collect())? {
        let mut single: Vec<(&String, &[f64; 2])> = slower.iter().collect();
        single.sort_by(|(_, a), (_, b)| (b[1] - b[0]).total_cmp(&(a[1] - a[0])));
        let mut so_far = BTreeSet::new();
        for (name, _) in single.into_iter().take(MOST_SINGLE) {
            let mut more: BTreeSet<String> = so_far.clone();
            more.insert(name.clone());
            if attempt(more.clone())? {
                so_far = more;
            }
        }
    }
    let int8 = with(&BTreeSet::new())?;
    let [float_ms, int8_ms, mixed_ms] = medians(&[float, int8, best_program])?[..] else {
        return Err(Error::Evaluation("programs could not be timed".into()));
    };
    Ok(Timing { float: best, float_ms, int8_ms, mixed_ms, slower })
}
