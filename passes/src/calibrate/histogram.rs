//! Counts of values in bounded memory, whatever their number and magnitude, that do not depend on their order.

use super::Extremes;

/// Bins on either side of 0. The largest magnitude lies in the upper half of them, so that a grid of 255 steps over the
/// whole range has from 8 to 16 bins a step, twice that over both sides.
pub(crate) const BINS: usize = 4096;
/// The narrowest bins, 2^−120: below what any activation means, and far from subnormal arithmetic.
const NARROWEST: i32 = -120;
/// Elements whose bins are computed before they are counted: by vectors, into a corner of the first cache.
const BLOCK: usize = 512;
/// Elements between two flushes of counts of 32 bits.
const MOST_COUNTED: usize = 1 << 30;
/// 1.5·2^23: an f32 of magnitude below 2^22 that is added to it is rounded to an integer, which is then in its low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Counts of values in bins of width 2^exponent: bin i holds ⌊x·2^−exponent⌋ = i − [`BINS`].
///
/// When a magnitude does not fit, bins are merged by powers of two. ⌊⌊x/w⌋/2⌋ = ⌊x/(2w)⌋: a value ends up in the
/// bin it would have been put in at once, whenever it came. So counts depend on the multiset of values alone.
///
/// It takes 64 KiB ([`BINS`] counts of 8 bytes on either side).
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Histogram {
    exponent: i32,
    counts: Vec<u64>,
    total: u64,
}

/// Counters of one sample, used again for every histogram. Neighbours of a tensor often lie in one bin (most of all the
/// zeros behind a ReLU), and an increment has to wait for the last one of the same counter: so there are two, in turn.
pub(crate) struct Counters([Vec<u32>; 2]);

impl Counters {
    /// 64 KiB.
    pub(crate) fn new() -> Counters {
        Counters([(); 2].map(|()| vec![0; 2 * BINS]))
    }
}

impl Histogram {
    pub(crate) fn new() -> Histogram {
        Histogram { exponent: NARROWEST, counts: vec![0; 2 * BINS], total: 0 }
    }

    /// Width of a bin.
    pub(crate) fn width(&self) -> f64 {
        2f64.powi(self.exponent)
    }

    /// Counts of bins, of which number [`BINS`] begins at 0.
    pub(crate) fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Number of values.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The first and the last bin that are not empty.
    pub(crate) fn ends(&self) -> Option<(usize, usize)> {
        let first = self.counts.iter().position(|&n| n > 0)?;
        let last = self.counts.iter().rposition(|&n| n > 0)?;
        Some((first, last))
    }

    /// Counts finite elements. `seen` are their extremes.
    pub(crate) fn add(&mut self, elements: &[f32], seen: &Extremes, counters: &mut Counters) {
        if seen.min > seen.max {
            return;
        }
        let largest = seen.max.abs().max(seen.min.abs());
        // |x| < 2^(e + 1) for e its exponent: bins of 2^(e + 1)/BINS hold it.
        let e = ((largest.to_bits() >> 23) as i32) - 127;
        self.widen_to(e + 1 - BINS.ilog2() as i32);
        let per_width = 2f32.powi(-self.exponent);
        let mut bins = [0u32; BLOCK];
        for elements in elements.chunks(MOST_COUNTED) {
            for block in elements.chunks(BLOCK) {
                let bins = &mut bins[..block.len()];
                for (bin, &x) in bins.iter_mut().zip(block) {
                    *bin = bin_of(x, per_width);
                }
                if seen.not_finite == 0 {
                    count(bins, counters);
                } else {
                    let finite = bins.iter().zip(block).filter(|(_, x)| x.is_finite());
                    finite.for_each(|(bin, _)| count(&[*bin], counters));
                }
            }
            self.flush(counters, bin_of(seen.min, per_width), bin_of(seen.max, per_width));
        }
    }

    /// Takes over what was counted in bins from `first` to `last`, and sets it to 0.
    fn flush(&mut self, counters: &mut Counters, first: u32, last: u32) {
        let bins = first as usize..=(last as usize).min(2 * BINS - 1);
        let [a, b] = &mut counters.0;
        let [a, b] = [&mut a[bins.clone()], &mut b[bins.clone()]];
        for ((sum, a), b) in self.counts[bins].iter_mut().zip(a).zip(b) {
            let n = u64::from(std::mem::take(a)) + u64::from(std::mem::take(b));
            *sum += n;
            self.total += n;
        }
    }

    fn widen_to(&mut self, exponent: i32) {
        if exponent <= self.exponent {
            return;
        }
        let shift = (exponent - self.exponent).min(63);
        let mut counts = vec![0; self.counts.len()];
        let zero = BINS as i64;
        for (i, &n) in self.counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            counts[(((i as i64 - zero) >> shift) + zero) as usize] += n;
        }
        self.counts = counts;
        self.exponent = exponent;
    }

    pub(crate) fn merge(&mut self, mut other: Histogram) {
        let exponent = self.exponent.max(other.exponent);
        self.widen_to(exponent);
        other.widen_to(exponent);
        for (ours, theirs) in self.counts.iter_mut().zip(other.counts) {
            *ours += theirs;
        }
        self.total += other.total;
    }

    /// Edges of bins with at most `share` of all values below the first and above the second.
    pub(crate) fn tails(&self, share: f64) -> (f32, f32) {
        // A number that is whole but for rounding is meant to be whole.
        let most = (share * self.total as f64 + 1e-6) as u64;
        let mut below = 0;
        let first = self.counts.iter().position(|n| {
            below += n;
            below > most
        });
        let mut above = 0;
        let last = self.counts.iter().rposition(|n| {
            above += n;
            above > most
        });
        let edge = |bin: usize| ((bin as f64 - BINS as f64) * self.width()) as f32;
        (edge(first.unwrap_or(BINS)), edge(last.map_or(BINS, |bin| bin + 1)))
    }
}

/// ⌊x·per_width⌋ + [`BINS`], for a finite product within ±[`BINS`]. All of it is the same few operations on each element,
/// so that compilers make vectors of it.
fn bin_of(x: f32, per_width: f32) -> u32 {
    let y = x * per_width;
    let rounded = y + ROUNDER;
    let integer = rounded - ROUNDER;
    // A product that vanishes is of a magnitude far below a bin; it is on the side of 0 that x is on.
    let is_above = (integer > y) | ((x < 0.0) & (y == 0.0));
    rounded.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(BINS as u32 - u32::from(is_above))
}

fn count(bins: &[u32], counters: &mut Counters) {
    let [a, b] = &mut counters.0;
    let (a, b) = (&mut a[..2 * BINS], &mut b[..2 * BINS]);
    // The remainder is a no-op, and spares a check of bounds.
    let at = |bin: u32| bin as usize % (2 * BINS);
    let mut pairs = bins.chunks_exact(2);
    for pair in &mut pairs {
        a[at(pair[0])] += 1;
        b[at(pair[1])] += 1;
    }
    for &bin in pairs.remainder() {
        a[at(bin)] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::tests::Random;

    fn filled(parts: &[&[f32]]) -> Histogram {
        let mut h = Histogram::new();
        let mut counters = Counters::new();
        parts.iter().for_each(|part| h.add(part, &Extremes::of(part), &mut counters));
        h
    }

    #[test]
    fn a_histogram_does_not_depend_on_order_or_split() {
        let mut random = Random(3);
        for round in 0..40 {
            // Magnitudes over many powers of two, and what is special.
            let spread = 1 + round % 7;
            let mut values: Vec<f32> = (0..500)
                .map(|_| (random.uniform() - 0.5) * 2f32.powi((random.next() % (8 * spread)) as i32 - 20))
                .collect();
            values.extend([93.0, -1e-9, 0.0, -0.0, 1e-45, -1e-45, f32::NAN, f32::INFINITY]);
            let whole = filled(&[&values]);
            assert_eq!(whole.total(), 506);
            let one_by_one: Vec<&[f32]> = values.chunks(1).collect();
            assert_eq!(filled(&one_by_one), whole, "one by one");
            let mut shuffled = values.clone();
            for i in (1..shuffled.len()).rev() {
                shuffled.swap(i, random.next() as usize % (i + 1));
            }
            assert_eq!(filled(&[&shuffled]), whole, "shuffled");
            let cut = random.next() as usize % values.len();
            let (a, b) = values.split_at(cut);
            let mut merged = filled(&[b]);
            merged.merge(filled(&[a]));
            assert_eq!(merged, whole, "merged at {cut}");
        }
    }

    #[test]
    fn a_value_is_in_the_bin_of_its_floor() {
        for values in [&[-4.0f32, -3.75, 0.0, 1.0, 3.99, 2.5][..], &[-1e-30, 1e-30, 4.0], &[-0.1, 7.9]] {
            let h = filled(&[values]);
            for x in values {
                let bin = (f64::from(*x) / h.width()).floor() as i64 + BINS as i64;
                assert!(h.counts()[bin as usize] > 0, "{x} of {values:?}");
            }
        }
    }

    #[test]
    fn tails_cut_outliers_and_keep_the_rest() {
        let mut values: Vec<f32> = (0..9999).map(|i| i as f32 / 9999.0).collect();
        values.push(100.0);
        let h = filled(&[&values]);
        let (lo, hi) = h.tails(0.001);
        assert!(lo.abs() < 0.05 && (0.95..1.05).contains(&hi), "{lo} {hi}");
        assert!(h.tails(0.0).1 >= 100.0);
    }

    #[test]
    fn extreme_values_find_a_bin() {
        let h = filled(&[&[f32::MAX, f32::MIN, f32::MIN_POSITIVE, -1e-45, 0.0, -0.0, 1.0]]);
        assert_eq!((h.total(), h.counts().iter().sum::<u64>()), (7, 7));
        let (lo, hi) = h.tails(0.0);
        assert!(lo <= f32::MIN && hi >= f32::MAX, "{lo} {hi}");
        assert_eq!(filled(&[&[f32::NAN]]).ends(), None);
    }
}
