//! The search for a range of least cost, which the calibrators that have one share.

use super::Range;

/// Parts of the observed range on either side of 0 at which an end is tried.
const COARSE: u32 = 64;
/// Parts of a coarse one at which it is tried around the best.
const FINE: u32 = 16;
/// Rounds over both ends: each may make another place the best for the other one.
const ROUNDS: usize = 4;

/// The range within `seen` and about 0 for which `cost` is least, as far as this finds it: each end in turn is moved over
/// its side, coarsely and then finely around the best, until neither moves. Costs have no single valley, as grids are
/// nudged so that zero is a code; hence a scan and no descent. Of equal costs the wider range is taken. At most
/// 4·2·(64 + 31) costs are computed.
pub(super) fn least_cost(seen: Range, cost: impl Fn(Range) -> f64) -> Range {
    let seen = Range { min: seen.min.min(0.0), max: seen.max.max(0.0) };
    let mut best = seen;
    let mut least = cost(best);
    for _ in 0..ROUNDS {
        let before = best;
        for upper in [true, false] {
            let end = if upper { seen.max } else { seen.min };
            if end == 0.0 {
                continue;
            }
            let moved = |share: f64| {
                let end = (f64::from(end) * share) as f32;
                if upper { Range { max: end, ..best } } else { Range { min: end, ..best } }
            };
            // From wide to narrow: of equals the first is kept.
            let coarse = (1..=COARSE).rev().map(|k| f64::from(k) / f64::from(COARSE));
            let (mut share, mut found) = (None, least);
            let mut consider = |s: f64| {
                let c = cost(moved(s));
                if c < found {
                    (share, found) = (Some(s), c);
                }
                share
            };
            coarse.for_each(|s| _ = consider(s));
            let at = consider(1.0).unwrap_or_else(|| {
                let now = if upper { best.max } else { best.min };
                f64::from(now) / f64::from(end)
            });
            let step = 1.0 / f64::from(COARSE * FINE);
            let fine = (1..FINE).flat_map(|k| [at + f64::from(k) * step, at - f64::from(k) * step]);
            fine.filter(|s| *s > 0.0 && *s <= 1.0).for_each(|s| _ = consider(s));
            if let Some(share) = share {
                best = moved(share);
                least = found;
            }
        }
        if best == before {
            break;
        }
    }
    best
}
