//! The dense family: convolutions and matrix products as tiles of one microkernel.
//!
//! An op becomes a [`Problem`] (extents and strides, nothing of its origin), [`choose`] cuts it into tiles, the tier's
//! emitter makes one function for each kind of tile, `driver` brings them together, and `walk` calls them.

pub mod asm;
pub mod choose;
mod clif_epilogue;
pub(crate) mod clif_tile;
pub(crate) mod depthwise;
pub(crate) mod driver;
pub(crate) mod margins;
pub mod pack;
pub(crate) mod pad;
pub(crate) mod repack;
pub mod spec;
pub(crate) mod strip;
pub(crate) mod walk;
pub(crate) mod widen;

use crate::Tier;
use pack::PanelFormat;
use rayon::prelude::*;
use spec::Product;

/// Byte strides of an operand or a result.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Strides {
    /// From one image of the batch to the next.
    pub(crate) image: usize,
    /// From one row of output pixels to the next.
    pub(crate) row: usize,
    /// From one output pixel to the next.
    pub(crate) col: usize,
    /// From the first channel of one group to that of the next.
    pub(crate) group: usize,
}

/// What remains of a convolution or matrix product: output pixels, channels, and where the summands lie.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Problem {
    /// Element types.
    pub(crate) product: Product,
    /// Images, output rows, output columns.
    pub(crate) images: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Columns.
    pub(crate) cols: usize,
    /// Groups of channels that do not see each other.
    pub(crate) groups: usize,
    /// Output channels of one group.
    pub(crate) channels: usize,
    /// The input: strides between first taps.
    pub(crate) a: Strides,
    /// The result.
    pub(crate) y: Strides,
    /// The residual; where there is none, the same as the result.
    pub(crate) r: Strides,
    /// The grids of rows; nothing where there are none, or one for all.
    pub(crate) g: Strides,
    /// Bytes of an element of the result.
    pub(crate) result_bytes: usize,
    /// Outer loops over K: trip count and byte stride in the input.
    pub(crate) loops: Vec<(u32, i32)>,
    /// Elements of K in one contiguous run.
    pub(crate) run: usize,
}

/// Where the weights of a problem lie in their tensor: those of a channel are a matrix of inputs × taps, in which K counts
/// the inputs of one tap after the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct WeightOrder {
    /// From the weights of one output channel (counted over all groups) to those of the next.
    pub(crate) channel: usize,
    /// Inputs of a tap.
    pub(crate) inputs: usize,
    /// From one input of a tap to the next; taps follow each other.
    pub(crate) input: usize,
}

impl WeightOrder {
    /// Whether the weights of a channel lie in the order of K.
    fn is_contiguous(self) -> bool {
        self.input == 1 || self.inputs == 1
    }

    /// Tap and input of element `k` of K.
    fn split(self, k: usize) -> (usize, usize) {
        (k / self.inputs, k % self.inputs)
    }
}

/// The weights of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<'a, T> {
    /// Their tensor, row-major.
    pub(crate) elements: &'a [T],
    /// Where they lie in it.
    pub(crate) order: WeightOrder,
    /// Elements of K in one run.
    pub(crate) run: usize,
}

impl<T: Copy> Weights<'_, T> {
    /// The weights of an output channel, as they lie: of one input, tap after tap.
    pub(crate) fn of_channel(&self, channel: usize) -> &[T] {
        &self.elements[channel * self.order.channel..]
    }

    /// The weight of an output channel at element i of a run.
    pub(crate) fn at(&self, channel: usize, run: usize, i: usize) -> T {
        let (tap, input) = self.order.split(run * self.run + i);
        self.of_channel(channel)[tap + input * self.order.input]
    }

    /// The weights of an output channel from element `start` of a run on, as many as `room` holds: where they lie, or
    /// brought together there.
    pub(crate) fn take<'b>(&'b self, channel: usize, run: usize, start: usize, room: &'b mut [T]) -> &'b [T] {
        let (order, mut k) = (self.order, run * self.run + start);
        let of_channel = self.of_channel(channel);
        if order.is_contiguous() {
            return &of_channel[k..][..room.len()];
        }
        let mut rest = &mut *room;
        while !rest.is_empty() {
            let (tap, input) = order.split(k);
            let (of_tap, behind) = rest.split_at_mut(rest.len().min(order.inputs - input));
            let weights = of_channel[tap + input * order.input..].iter().step_by(order.input);
            of_tap.iter_mut().zip(weights).for_each(|(out, weight)| *out = *weight);
            k += of_tap.len();
            rest = behind;
        }
        room
    }
}

/// Weights that are checked at a time.
const CHECKED: usize = 256;

impl Weights<'_, i8> {
    /// Whether [`Product::U8S7`] holds dense tiles of these weights: the sum of any two that follow each other in a run,
    /// from its start on, is [in 16 bits](Product::is_in_16_bits). Reads all of them, on all threads, until one pair
    /// is not.
    pub(crate) fn pairs_fit_16_bits(&self, channels: usize, runs: usize) -> bool {
        let of_run = |channel: usize, run: usize| {
            (0..self.run).step_by(CHECKED).all(|start| {
                let mut room = [0; CHECKED];
                let room = &mut room[..CHECKED.min(self.run - start)];
                let (pairs, last) = self.take(channel, run, start, room).as_chunks::<2>();
                // The last one of an odd run stands beside a zero.
                let last = last.iter().map(|&w| [w, 0]);
                pairs.iter().copied().chain(last).all(Product::is_in_16_bits)
            })
        };
        (0..channels).into_par_iter().all(|channel| (0..runs).all(|run| of_run(channel, run)))
    }
}

/// Whether [`Product::U8S7`] holds depthwise kernels of these weights, `taps` of each channel: the sum of any two of a
/// channel is [in 16 bits](Product::is_in_16_bits), however kernels put rows of taps together.
pub(crate) fn taps_fit_16_bits(weights: &[i8], taps: usize) -> bool {
    weights.chunks(taps).all(|taps| {
        let (mut largest, mut smallest) = ([0; 2], [0; 2]);
        for &w in taps {
            largest = [largest[0].max(w), largest[1].max(w.min(largest[0]))];
            smallest = [smallest[0].min(w), smallest[1].min(w.max(smallest[0]))];
        }
        Product::is_in_16_bits(largest) && Product::is_in_16_bits(smallest)
    })
}

impl Problem {
    /// Contiguous runs of K.
    pub(crate) fn runs(&self) -> usize {
        self.loops.iter().map(|l| l.0 as usize).product()
    }

    /// Whether tiles of this tier may read bytes behind the last run: where it ends within what they take at once.
    pub(crate) fn overreads(&self, tier: &Tier) -> bool {
        let step = |isa| PanelFormat::new(self.product, isa, 0).step_groups();
        tier.isas(self.product).any(|isa| !self.run.is_multiple_of(self.product.group() * step(isa)))
    }

    /// Bytes from the first that the tiles read to the last, padding of the runs included.
    pub(crate) fn reach(&self) -> usize {
        let last = |count: usize, stride: usize| (count - 1) * stride;
        let a = self.a;
        let outer: usize =
            self.loops.iter().map(|&(trips, stride)| last(trips as usize, stride as usize)).sum();
        let pixels = last(self.images, a.image) + last(self.rows, a.row) + last(self.cols, a.col);
        let run = self.run.next_multiple_of(self.product.group()) * self.product.element();
        last(self.groups, a.group) + pixels + outer + run
    }

    /// The same problem on a copy of the input in which each element takes `times` as many bytes.
    pub(crate) fn with_wider_input(&self, times: usize) -> Problem {
        let a = self.a;
        Problem {
            a: Strides {
                image: a.image * times,
                row: a.row * times,
                col: a.col * times,
                group: a.group * times,
            },
            loops: self.loops.iter().map(|&(trips, stride)| (trips, stride * times as i32)).collect(),
            ..self.clone()
        }
    }

    /// Bytes of the input.
    pub(crate) fn a_bytes(&self) -> usize {
        self.images * self.a.image
    }

    /// Takes images and rows that follow each other without a gap, in input, result and residual, as one long row.
    pub(crate) fn flattened(mut self) -> Problem {
        let places = [self.a, self.y, self.r];
        if places.iter().all(|s| s.row == self.cols * s.col) {
            self.cols *= self.rows;
            self.rows = 1;
            let images = match places.iter().all(|s| s.image == self.cols * s.col) {
                true => std::mem::replace(&mut self.images, 1),
                false => 1,
            };
            self.cols *= images;
            for strides in [&mut self.a, &mut self.y, &mut self.r] {
                strides.image *= images;
                strides.row = self.cols * strides.col;
            }
        }
        self
    }
}
