//! What was measured of the layers of a model, against what they could take.

use crate::{
    LayerTime,
    quantile::median,
    roofline::{Bound, Host},
};
use qcc_ir::Device;
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write, time::Duration};

/// One layer: a step of the generated code.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Layer {
    /// Name of the node.
    pub name: String,
    /// Its op.
    pub op: &'static str,
    /// Where it runs.
    pub device: &'static str,
    /// Name of the kernel.
    pub kernel: String,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Whether they are by weights that are multiplied as those of 7 bits: only on tiers that do this faster.
    pub by_narrow_weights: bool,
    /// Bytes that go through it.
    pub bytes: Traffic,
    /// Median time.
    pub ms: f64,
    /// Fastest time.
    pub min_ms: f64,
    /// Part of the time of all layers.
    pub share: f64,
    /// 10⁹ multiply-accumulates a second; 0 for ops that have none.
    pub gmacs: f64,
    /// The same as a share of the measured peak of the threads in use; `None` for ops that have none.
    pub peak_fraction: Option<f64>,
    /// Multiply-accumulates for each byte that is moved.
    pub intensity: f64,
    /// Time of its arithmetic at the measured peak.
    pub compute_ms: f64,
    /// Time of moving its bytes at the measured bandwidth.
    pub memory_ms: f64,
    /// What the layer takes beyond the longer of these two; 0 where it takes less, because the caches held more than
    /// was supposed.
    pub lost_ms: f64,
    /// What requantization takes of its time: the difference to the same kernel without, the fastest run of each. Where
    /// it was measured.
    pub requant_ms: Option<f64>,
}

/// Bytes of a layer, each counted once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Traffic {
    /// Operands that are computed.
    pub operands: u64,
    /// Constants.
    pub weights: u64,
    /// Results.
    pub results: u64,
}

impl Traffic {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.operands + self.weights + self.results
    }
}

impl Layer {
    /// Whether it multiplies codes by constant weights.
    pub(crate) fn is_product_of_codes(&self) -> bool {
        self.device == Device::Int8Jit.name() && self.macs > 0 && self.bytes.weights > 0
    }

    /// Whether moving its bytes takes longer, at best, than its arithmetic.
    pub fn is_memory_bound(&self) -> bool {
        self.bound().is_memory()
    }

    /// The least time that it could take.
    pub fn bound_ms(&self) -> f64 {
        self.bound().ms()
    }

    fn bound(&self) -> Bound {
        Bound { compute_ms: self.compute_ms, memory_ms: self.memory_ms }
    }
}

/// The times of one step, run after run.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Sampled {
    step: LayerTime,
    times: Vec<Duration>,
}

/// Collects the profiles of single runs.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Profiles {
    steps: Vec<Sampled>,
    /// What each run took beyond its steps.
    between: Vec<Duration>,
}

impl Profiles {
    /// Adds the profile of one run, which took `run` as a whole.
    pub(crate) fn add(&mut self, profile: Vec<LayerTime>, run: Duration) {
        self.between.push(run.saturating_sub(profile.iter().map(|l| l.time).sum()));
        if self.steps.is_empty() {
            self.steps = profile.into_iter().map(|step| Sampled { times: vec![step.time], step }).collect();
        } else {
            self.steps.iter_mut().zip(profile).for_each(|(s, step)| s.times.push(step.time));
        }
    }

    /// What a run takes beyond its layers, without what reading the clock costs: of the two readings of each step, the
    /// other one is in the step's time.
    pub(crate) fn between_layers_ms(&self, host: &Host) -> f64 {
        median_ms(&self.between, self.steps.len() as f64 * host.clock_ns / 1e6)
    }

    /// What the samples say. `bare` are those of the same model without requantization, and `footprint` is what a run
    /// touches, in bytes.
    pub(crate) fn layers(
        &self,
        bare: Option<&Profiles>,
        host: &Host,
        footprint: u64,
        threads: usize,
    ) -> Vec<Layer> {
        let clock = host.clock_ns / 1e6;
        let without: BTreeMap<Key<'_>, f64> =
            bare.map(|b| b.keyed().map(|(key, s)| (key, s.min_ms(clock))).collect()).unwrap_or_default();
        let total: f64 = self.steps.iter().map(|s| s.median_ms(clock)).sum();
        let layer = |(key, sampled): (Key<'_>, &Sampled)| {
            let LayerTime { name, op, device, kernel, work, .. } = &sampled.step;
            let (ms, min_ms) = (sampled.median_ms(clock), sampled.min_ms(clock));
            let bound = host.bound(work, *device, footprint, threads);
            let requantizes = *device == Device::Int8Jit && work.macs > 0;
            let bytes = Traffic {
                operands: work.bytes_read.saturating_sub(work.weight_bytes),
                weights: work.weight_bytes,
                results: work.bytes_written,
            };
            let per = |x: f64, of: f64| if of > 0.0 { x / of } else { 0.0 };
            Layer {
                name: name.clone(),
                op,
                device: device.name(),
                kernel: kernel.clone(),
                macs: work.macs,
                by_narrow_weights: work.by_narrow_weights,
                bytes,
                ms,
                min_ms,
                share: per(ms, total),
                gmacs: per(work.macs as f64 / 1e6, ms),
                peak_fraction: (work.macs > 0).then(|| per(bound.compute_ms, ms)),
                intensity: per(work.macs as f64, bytes.total() as f64),
                compute_ms: bound.compute_ms,
                memory_ms: bound.memory_ms,
                lost_ms: (ms - bound.ms()).max(0.0),
                requant_ms: without.get(&key).filter(|_| requantizes).map(|bare| (min_ms - bare).max(0.0)),
            }
        };
        self.keyed().map(layer).collect()
    }

    /// The steps with what they are found by in another compilation of the same model.
    fn keyed(&self) -> impl Iterator<Item = (Key<'_>, &Sampled)> {
        let mut seen: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        self.steps.iter().map(move |sampled| {
            let kind = (sampled.step.name.as_str(), sampled.step.kernel.as_str());
            let count = seen.entry(kind).or_default();
            *count += 1;
            ((kind.0, kind.1, *count), sampled)
        })
    }
}

/// Name of the node, kernel, and a number among steps that agree in both.
type Key<'s> = (&'s str, &'s str, usize);

impl Sampled {
    fn median_ms(&self, clock_ms: f64) -> f64 {
        median_ms(&self.times, clock_ms)
    }

    fn min_ms(&self, clock_ms: f64) -> f64 {
        let fastest = self.times.iter().min().copied().unwrap_or_default();
        (1e3 * fastest.as_secs_f64() - clock_ms).max(0.0)
    }
}

/// The median of some times, without what measuring them took.
fn median_ms(times: &[Duration], clock_ms: f64) -> f64 {
    let middle = median(times.iter().map(Duration::as_secs_f64)).unwrap_or(0.0);
    (1e3 * middle - clock_ms).max(0.0)
}

/// Where the time of a run is lost: what it takes beyond the bounds of its layers.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Losses {
    /// The least time of all layers together.
    pub bound_ms: f64,
    /// In layers whose arithmetic takes longer, at best, than moving their bytes.
    pub compute_bound: Loss,
    /// In layers where it is the other way round.
    pub memory_bound: Loss,
    /// What a run takes beyond its layers: checks, the walk over the steps, handing work to threads.
    pub between_layers_ms: f64,
}

/// A loss of some layers.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Loss {
    /// Layers that lose time.
    pub layers: usize,
    /// What they lose.
    pub ms: f64,
}

impl Losses {
    /// Of a run of these layers.
    pub(crate) fn of(layers: &[Layer], between_layers_ms: f64) -> Losses {
        let loss = |is_memory: bool| {
            let losing = layers.iter().filter(|l| l.is_memory_bound() == is_memory && l.lost_ms > 0.0);
            losing.fold(Loss::default(), |sum, l| Loss { layers: sum.layers + 1, ms: sum.ms + l.lost_ms })
        };
        Losses {
            bound_ms: layers.iter().map(Layer::bound_ms).sum(),
            compute_bound: loss(false),
            memory_bound: loss(true),
            between_layers_ms,
        }
    }

    /// In words: `41 % of the time is lost in 7 memory-bound layers (most in conv1: 12 %), …`. `layers` are
    /// those that the losses were taken of, and `run_ms` is what a run of them takes.
    pub fn sentence(&self, layers: &[Layer], run_ms: f64) -> String {
        let percent = |ms: f64| format!("{:.0} %", 100.0 * ms / run_ms.max(f64::MIN_POSITIVE));
        let mut kinds = [(self.compute_bound, "compute", false), (self.memory_bound, "memory", true)];
        kinds.sort_by(|a, b| b.0.ms.total_cmp(&a.0.ms));
        let mut text = String::new();
        for (loss, kind, is_memory) in kinds.into_iter().filter(|k| k.0.layers > 0) {
            let worst = layers
                .iter()
                .filter(|l| l.is_memory_bound() == is_memory)
                .max_by(|a, b| a.lost_ms.total_cmp(&b.lost_ms));
            let lead = if text.is_empty() { " of the time is lost" } else { "" };
            let plural = if loss.layers == 1 { "" } else { "s" };
            let _ = write!(text, "{}{lead} in {} {kind}-bound layer{plural}", percent(loss.ms), loss.layers);
            if let Some(worst) = worst {
                let _ = write!(text, " (most in {}: {})", worst.name, percent(worst.lost_ms));
            }
            text.push_str(", ");
        }
        let _ = write!(
            text,
            "{} passes between layers; at the bounds a run would take {:.3} of its {run_ms:.3} ms.",
            percent(self.between_layers_ms),
            self.bound_ms
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryLevel, Peaks, Work};

    fn host() -> Host {
        Host {
            cpu: String::new(),
            isa: String::new(),
            peaks: Peaks { int8: 100e9, int8_narrow: 100e9, float: 10e9 },
            memory: vec![MemoryLevel {
                name: "memory".into(),
                capacity_bytes: None,
                buffer_bytes: 0,
                gb_per_s: 1.0,
            }],
            clock_ns: 1000.0,
        }
    }

    /// `macs` in a tenth of a microsecond, at 100 GMAC/s.
    fn step(name: &str, macs: u64, bytes: u64, micros: u64) -> LayerTime {
        LayerTime {
            name: name.into(),
            op: "QConv",
            device: Device::Int8Jit,
            kernel: "k".into(),
            work: Work { macs, bytes_read: bytes, weight_bytes: bytes / 2, ..Work::default() },
            time: Duration::from_micros(micros),
        }
    }

    fn sampled(runs: &[Vec<LayerTime>]) -> Profiles {
        let mut samples = Profiles::default();
        for run in runs {
            let steps: Duration = run.iter().map(|l| l.time).sum();
            samples.add(run.clone(), steps + Duration::from_micros(7));
        }
        samples
    }

    #[test]
    fn layers_have_medians_and_bounds_and_the_clock_is_taken_off() {
        let run = |a, b| vec![step("a", 1_000_000, 1000, a), step("b", 0, 4000, b)];
        let sampled = sampled(&[run(21, 6), run(100, 5), run(31, 5)]);
        assert!((sampled.between_layers_ms(&host()) - 0.005).abs() < 1e-9);
        let layers = sampled.layers(None, &host(), 1, 1);
        let [a, b] = &layers[..] else { panic!("two layers") };
        assert!((a.ms - 0.030).abs() < 1e-9 && (a.min_ms - 0.020).abs() < 1e-9, "{a:?}");
        assert!((a.compute_ms - 0.010).abs() < 1e-9 && !a.is_memory_bound());
        assert!((a.lost_ms - 0.020).abs() < 1e-9 && (a.peak_fraction.unwrap() - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(a.bytes, Traffic { operands: 500, weights: 500, results: 0 });
        assert_eq!(a.intensity, 1000.0);
        assert!(b.is_memory_bound() && (b.bound_ms() - 0.004).abs() < 1e-9 && b.lost_ms.abs() < 1e-9);
        assert_eq!((b.gmacs, b.peak_fraction, b.requant_ms), (0.0, None, None));
        assert!((a.share + b.share - 1.0).abs() < 1e-9);
    }

    #[test]
    fn requantization_is_the_difference_to_the_same_step_without() {
        let full = sampled(&[vec![step("a", 10, 1, 9), step("a", 10, 1, 7), step("pad", 0, 1, 5)]]);
        // In another order, as another compilation might have them.
        let bare = sampled(&[vec![step("pad", 0, 1, 1), step("a", 10, 1, 6), step("a", 10, 1, 8)]]);
        let layers = full.layers(Some(&bare), &host(), 1, 1);
        let requant: Vec<Option<f64>> = layers.iter().map(|l| l.requant_ms).collect();
        assert!((requant[0].unwrap() - 0.003).abs() < 1e-9);
        // Noise: it was slower without.
        assert_eq!(requant[1..], [Some(0.0), None]);
        assert!(full.layers(None, &host(), 1, 1).iter().all(|l| l.requant_ms.is_none()));
    }

    #[test]
    fn the_sentence_names_the_larger_loss_first() {
        let run = vec![step("conv", 1_000_000, 1000, 31), step("fc", 0, 4000, 55), step("add", 0, 1000, 12)];
        let layers = sampled(&[run]).layers(None, &host(), 1, 1);
        let losses = Losses::of(&layers, 0.005);
        assert_eq!((losses.compute_bound.layers, losses.memory_bound.layers), (1, 2));
        assert_eq!(
            losses.sentence(&layers, 0.100),
            "60 % of the time is lost in 2 memory-bound layers (most in fc: 50 %), 20 % in 1 compute-bound layer \
             (most in conv: 20 %), 5 % passes between layers; at the bounds a run would take 0.015 of its 0.100 ms."
        );
    }
}
