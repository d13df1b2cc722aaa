//! Which steps threads share.
//!
//! Sharing a step halves its time (with two threads), less the time to hand a part over. But it also moves data: what one
//! core has written, another one reads at a fraction of the speed of its own caches. A step that is not shared, between
//! two that are, has half of its operands elsewhere, and so has the next one of its results. So steps are not judged one
//! by one: of all ways to share some of them, the one that takes least is chosen, by dynamic programming over the steps
//! in their order. A model of many tiny steps is not shared at all, and a tiny step in a large model is.

/// What has to be known of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// On one thread, with its operands in that core's caches.
    pub(crate) nanoseconds: f64,
    /// Bytes of operands that earlier steps have written.
    pub(crate) operands: u64,
    /// Bytes of the model's inputs. Who has written them, and how long ago, is not known: no core has them before the
    /// others.
    pub(crate) inputs: u64,
    /// Whether it has more than one unit.
    pub(crate) is_divisible: bool,
}

/// To hand a part over and to learn that it is done, 600 ns in `runtime/benches/overheads.rs`, and what else the two
/// parts take more than the whole: both load weights, they are not quite equal, and edges of parts come from each other.
const HAND_OVER: f64 = 2_000.0;
/// Bytes in a nanosecond that a core reads of what another one has written, as measured there.
pub(crate) const FROM_OTHER_CORE: f64 = 7.0;

/// Whether each of these steps, in their order, is worth sharing.
pub(crate) fn shared(steps: &[Cost]) -> Vec<bool> {
    // The least time up to here if the last operands were read by one thread, and if they were by both; and where each
    // comes from. Before the first step, nobody has anything.
    let mut least = [0.0; 2];
    let mut before: Vec<[usize; 2]> = Vec::with_capacity(steps.len());
    for step in steps {
        let halves = step.halves();
        if step.operands + step.inputs == 0 {
            // Such as margins that are filled: nothing is moved, and the next step finds its operands where they were.
            least = [least[0] + step.nanoseconds, least[1] + halves.min(step.nanoseconds)];
            before.push([0, 1]);
            continue;
        }
        let moved = step.operands as f64 / 2.0 / FROM_OTHER_CORE;
        let best = |own: usize, time: f64| {
            let (stays, changes) = (least[own], least[1 - own] + moved);
            if stays <= changes { (stays + time, own) } else { (changes + time, 1 - own) }
        };
        let (alone, before_alone) = best(0, step.nanoseconds);
        let (together, before_together) = best(1, halves);
        least = [alone, together];
        before.push([before_alone, before_together]);
    }
    let mut state = usize::from(least[1] < least[0]);
    let mut shared = vec![false; steps.len()];
    for (i, step) in steps.iter().enumerate().rev() {
        shared[i] = state == 1 && (step.operands + step.inputs > 0 || step.halves() < step.nanoseconds);
        state = before[i][state];
    }
    shared
}

impl Cost {
    /// What it takes two threads.
    fn halves(&self) -> f64 {
        if self.is_divisible { self.nanoseconds / 2.0 + HAND_OVER } else { f64::INFINITY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Cost = Cost { nanoseconds: 3_000.0, operands: 30_000, inputs: 0, is_divisible: true };
    const LARGE: Cost = Cost { nanoseconds: 40_000.0, operands: 100_000, inputs: 0, is_divisible: true };

    #[test]
    fn a_model_of_tiny_steps_is_not_shared() {
        assert_eq!(shared(&[SMALL; 30]), [false; 30]);
        assert!(shared(&[]).is_empty());
    }

    #[test]
    fn large_steps_are_shared_and_small_ones_between_them() {
        assert_eq!(shared(&[LARGE, SMALL, LARGE]), [true; 3]);
        assert_eq!(shared(&[LARGE]), [true]);
    }

    #[test]
    fn a_long_tail_of_tiny_steps_is_left_to_one_thread() {
        let steps = [vec![LARGE; 3], vec![Cost { operands: 100, ..SMALL }; 30]].concat();
        assert_eq!(shared(&steps), [vec![true; 3], vec![false; 30]].concat());
    }

    #[test]
    fn what_cannot_be_divided_is_not_shared() {
        let whole = Cost { is_divisible: false, ..LARGE };
        assert_eq!(shared(&[LARGE, whole, LARGE]), [true, false, true]);
    }

    #[test]
    fn what_reads_nothing_does_not_say_where_operands_are() {
        let margins = Cost { nanoseconds: 100.0, operands: 0, inputs: 0, is_divisible: true };
        // Sharing the second gains less than moving its operands costs, however it is looked at.
        let steps = [Cost { is_divisible: false, ..LARGE }, margins, Cost { nanoseconds: 16_000.0, ..LARGE }];
        assert_eq!(shared(&steps), [false; 3]);
        assert_eq!(shared(&[LARGE, margins, LARGE]), [true, false, true]);
    }

    #[test]
    fn inputs_of_the_model_are_as_far_from_every_thread() {
        // What it reads would cost more to move than sharing gains.
        let first = Cost { operands: 0, inputs: 600_000, nanoseconds: 20_000.0, is_divisible: true };
        assert_eq!(shared(&[first, LARGE]), [true; 2]);
        let later = Cost { operands: 600_000, inputs: 0, ..first };
        assert_eq!(shared(&[Cost { is_divisible: false, ..LARGE }, later]), [false; 2]);
    }

    #[test]
    fn no_other_choice_takes_less() {
        // All 2^n choices, by the same sums.
        let time = |steps: &[Cost], choice: u32| -> f64 {
            let mut was = false;
            let add = |(i, step): (usize, &Cost)| {
                let is = choice >> i & 1 == 1;
                // Before the first step nobody has anything.
                let moved =
                    if is == was || i == 0 { 0.0 } else { step.operands as f64 / 2.0 / FROM_OTHER_CORE };
                was = is;
                moved + if is { step.nanoseconds / 2.0 + HAND_OVER } else { step.nanoseconds }
            };
            steps.iter().enumerate().map(add).sum()
        };
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for _ in 0..50 {
            let steps: Vec<Cost> = (0..8)
                .map(|_| Cost {
                    nanoseconds: random(8_000) as f64,
                    operands: 1 + random(30_000),
                    inputs: 0,
                    is_divisible: true,
                })
                .collect();
            let chosen = shared(&steps).iter().rev().fold(0, |all, &s| all << 1 | u32::from(s));
            let least = (0..1 << 8).map(|choice| time(&steps, choice)).fold(f64::INFINITY, f64::min);
            assert!((time(&steps, chosen) - least).abs() < 1e-6, "{steps:?}");
        }
    }
}
