//! Panels: how the weights and epilogue constants of a dense microkernel lie in memory.
//!
//! A *panel* is NR channels of one tile. Its weights follow in the order in which the tile walks over K; its
//! epilogue constants are one block of regions, named by [`ParamLayout`], each aligned to [`ALIGN`] bytes if the
//! block is.
//!
//! The narrowing packs of x86 work within 128-bit lanes. The order of the columns inside a panel undoes that, so
//! that codes come out in the order of their channels: [`PanelFormat::channel_of_column`] is the one place that
//! knows it, [`PanelFormat::channel_of_word`] and [`PanelFormat::channel_of_wide`] follow from it. With one lane
//! (the 128-bit tiers) all three are the identity.

use super::{
    Weights,
    spec::{Epilogue, EpilogueForm, Product, RequantizeForm, RescaleForm},
};
use crate::tier::Isa;
use qcc_ir::{
    numerics::{Dequantizer, Requantizer, Rescale},
    ops::Clamp,
};
use std::ops::Range;

/// Alignment of packed weights, of parameter blocks and of the regions in them, in bytes.
pub const ALIGN: usize = 64;

/// How one tile wants its panels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PanelFormat {
    /// Element types.
    pub product: Product,
    /// The tile's instruction set.
    pub isa: Isa,
    /// NR: channels of a panel, a multiple of [`lanes`](Self::lanes).
    pub panel: usize,
    /// Whether results are floats, which are not narrowed.
    floats: bool,
}

impl PanelFormat {
    /// The panels of a tile whose results are of the product's own kind: codes of codes, floats of floats.
    pub fn new(product: Product, isa: Isa, panel: usize) -> PanelFormat {
        PanelFormat { product, isa, panel, floats: product == Product::F32 }
    }

    /// The same for results of this epilogue.
    pub fn with_results(self, epilogue: EpilogueForm) -> PanelFormat {
        PanelFormat { floats: epilogue.writes_floats(), ..self }
    }

    /// Bytes of a vector register.
    pub fn vector_bytes(self) -> usize {
        match self.isa {
            Isa::AmxInt8 | Isa::Avx512Vnni => 64,
            Isa::AvxVnni | Isa::Avx2 => 32,
            Isa::XmmVnni | Isa::Xmm => 16,
        }
    }

    /// Accumulators in a vector: its 32-bit lanes.
    pub fn lanes(self) -> usize {
        self.vector_bytes() / 4
    }

    /// Vectors in a panel.
    pub fn vectors(self) -> usize {
        self.panel / self.lanes()
    }

    /// Groups that the microkernel takes at once: a row of a matrix register holds 16.
    pub fn step_groups(self) -> usize {
        match self.isa {
            Isa::AmxInt8 => 16,
            _ => 1,
        }
    }

    /// Groups of a run of `run_len` elements, padding included.
    pub fn run_groups(self, run_len: usize) -> usize {
        run_len.div_ceil(self.product.group()).next_multiple_of(self.step_groups())
    }

    /// Panels that cover this many channels.
    pub fn panels(self, channels: usize) -> usize {
        channels.div_ceil(self.panel)
    }

    /// Bytes of one panel's weights: a group takes 4 bytes a channel, be it 4 codes or 1 float.
    pub fn weight_bytes(self, groups: usize) -> usize {
        groups * self.panel * 4
    }

    /// The channel, counted from the panel's first, whose accumulator is in 32-bit column `column`.
    ///
    /// Column 4·(lanes/4)·v + 4·l + i is element i of 128-bit lane l of vector v. Packing the vectors of a row
    /// twice puts, in each lane, 4 channels of vector 0, then 4 of vector 1, and so on; hence for codes
    /// channel = 4·vectors·l + 4·v + i. Floats are not packed: their order is natural.
    pub fn channel_of_column(self, column: usize) -> usize {
        match self.floats {
            true => column,
            false => {
                let (v, l, i) = (column / self.lanes(), column % self.lanes() / 4, column % 4);
                4 * self.vectors() * l + 4 * v + i
            }
        }
    }

    /// The channel of 16-bit element `word` once pairs of vectors were packed to words.
    ///
    /// The pairs are vectors (0, 1), (2, 3)…; an odd last vector is packed with itself, and a panel of one vector
    /// with that of the next pixel.
    pub fn channel_of_word(self, word: usize) -> usize {
        let (pair, l, j) = (word / (2 * self.lanes()), word % (2 * self.lanes()) / 8, word % 8);
        let v = (2 * pair + j / 4).min(self.vectors() - 1);
        4 * self.vectors() * l + 4 * v + j % 4
    }

    /// Words of [`channel_of_word`](Self::channel_of_word) for all pairs of a panel.
    pub fn words(self) -> usize {
        self.vectors().div_ceil(2) * 2 * self.lanes()
    }

    /// The channel of 64-bit element `wide`, for accumulators widened to 64 bits.
    ///
    /// `pmuldq` takes the even columns of a vector; the odd ones follow as a second vector. The 128-bit tiers widen
    /// in natural order instead.
    pub fn channel_of_wide(self, wide: usize) -> usize {
        match self.isa {
            Isa::XmmVnni | Isa::Xmm => wide,
            Isa::AmxInt8 | Isa::Avx512Vnni | Isa::AvxVnni | Isa::Avx2 => {
                let half = self.lanes() / 2;
                let (v, odd, i) = (wide / self.lanes(), wide % self.lanes() / half, wide % half);
                self.channel_of_column(v * self.lanes() + 2 * i + odd)
            }
        }
    }

    /// Whether codes are multiplied as 16-bit numbers, to which activations are widened before: where weights leave no
    /// exact product of bytes.
    pub fn is_widened(self) -> bool {
        self.product == Product::U8S8 && !self.isa.has_dot_product()
    }

    /// Bytes of an activation as tiles read it.
    pub fn activation_bytes(self) -> usize {
        if self.is_widened() { 2 } else { self.product.element() }
    }

    /// Where code `t` of column `column` lies in a group of int8 weights.
    ///
    /// Products of bytes take the 4 codes of a channel as a dword, `[NR][4]`; widened ones are of pairs: `[2][NR][2]`.
    fn code_offset(self, column: usize, t: usize) -> usize {
        match self.is_widened() {
            true => t / 2 * self.panel * 2 + column * 2 + t % 2,
            false => column * 4 + t,
        }
    }

    /// Whether pixels are narrowed in 128-bit lanes by the emitter of `asm`, with constants of its own.
    fn is_wide(self) -> bool {
        self.vector_bytes() > 16
    }
}

/// A weight as it is packed: `i8` or `f32`.
pub trait Weight: Copy + Default {
    /// Whether panels of a product hold it.
    fn is_of(product: Product) -> bool;
    /// Writes the weights of one column into groups that follow each other. The last group may get fewer than it holds.
    fn put(format: PanelFormat, groups: &mut [u8], column: usize, weights: &[Self]);
}

impl Weight for i8 {
    fn is_of(product: Product) -> bool {
        product.is_of_codes()
    }

    fn put(format: PanelFormat, groups: &mut [u8], column: usize, weights: &[i8]) {
        // This loop is most of what loading a large model takes: whole groups are numbers of constant size.
        let [low, high] = [0, 2].map(|t| format.code_offset(column, t));
        let groups = groups.chunks_exact_mut(4 * format.panel);
        let (whole, rest) = weights.as_chunks::<4>();
        let rest = Some(rest).filter(|r| !r.is_empty()).map(|rest| {
            let mut last = [0; 4];
            last[..rest.len()].copy_from_slice(rest);
            last
        });
        let all = whole.iter().copied().chain(rest).map(|codes| codes.map(|w| w.to_ne_bytes()[0]));
        if high == low + 2 {
            groups.zip(all).for_each(|(group, codes)| group[low..][..4].copy_from_slice(&codes));
        } else {
            for (group, [a, b, c, d]) in groups.zip(all) {
                group[low..][..2].copy_from_slice(&[a, b]);
                group[high..][..2].copy_from_slice(&[c, d]);
            }
        }
    }
}

impl Weight for f32 {
    fn is_of(product: Product) -> bool {
        product == Product::F32
    }

    fn put(format: PanelFormat, groups: &mut [u8], column: usize, weights: &[f32]) {
        for (group, weight) in groups.chunks_exact_mut(4 * format.panel).zip(weights) {
            group[4 * column..][..4].copy_from_slice(&weight.to_le_bytes());
        }
    }
}

/// Bytes of the packed weights of so many channels.
pub fn packed_bytes(format: PanelFormat, channels: usize, runs: usize, run_len: usize) -> usize {
    format.panels(channels) * format.weight_bytes(runs * format.run_groups(run_len))
}

/// Packs the weights of `channels` as `[panel][run][group][NR]` groups of [`Product::group`] elements.
///
/// `weight(channel, run, i)` is weight i of a run of `run_len`; runs are in the order of the tile's loops. Channels
/// beyond the range and elements beyond a run's length are zero. A matrix register of weights is 16 groups of 16
/// channels: rows of a panel's groups, as they lie.
///
/// # Panics
///
/// When the weights are not of the format's product.
pub fn pack_weights<W: Weight>(
    format: PanelFormat,
    channels: Range<usize>,
    runs: usize,
    run_len: usize,
    weight: impl Fn(usize, usize, usize) -> W,
) -> Vec<u8> {
    let mut bytes = vec![0; packed_bytes(format, channels.len(), runs, run_len)];
    let gather = Gather(weight);
    pack_weights_into(format, channels, runs, run_len, &mut bytes, &gather);
    bytes
}

/// Groups that are packed at once: those of a whole panel stay in the first cache, and so do the lines of all its
/// channels that they come from.
const GROUPS_AT_ONCE: usize = 16;

/// Weights to be packed.
pub trait WeightSource<W> {
    /// The weights of an output channel from element `start` of a run on, as many as `room` holds; there or elsewhere.
    fn take<'b>(&'b self, channel: usize, run: usize, start: usize, room: &'b mut [W]) -> &'b [W];
}

impl<W: Copy> WeightSource<W> for Weights<'_, W> {
    fn take<'b>(&'b self, channel: usize, run: usize, start: usize, room: &'b mut [W]) -> &'b [W] {
        Weights::take(self, channel, run, start, room)
    }
}

/// Weights that a function of channel, run and element gives.
struct Gather<F>(F);

impl<W, F: Fn(usize, usize, usize) -> W> WeightSource<W> for Gather<F> {
    fn take<'b>(&'b self, channel: usize, run: usize, start: usize, room: &'b mut [W]) -> &'b [W] {
        room.iter_mut().enumerate().for_each(|(i, w)| *w = (self.0)(channel, run, start + i));
        room
    }
}

/// Packs weights into [`packed_bytes`] of zeros.
///
/// # Panics
///
/// When the weights are not of the format's product, or there are not that many bytes.
pub fn pack_weights_into<W: Weight>(
    format: PanelFormat,
    channels: Range<usize>,
    runs: usize,
    run_len: usize,
    bytes: &mut [u8],
    weights: &impl WeightSource<W>,
) {
    assert!(W::is_of(format.product), "weights of another product");
    assert_eq!(bytes.len(), packed_bytes(format, channels.len(), runs, run_len), "bytes of other weights");
    let step = format.product.group();
    let group_bytes = 4 * format.panel;
    let run_bytes = format.run_groups(run_len) * group_bytes;
    let mut room = [W::default(); 4 * GROUPS_AT_ONCE];
    let mut rest = bytes;
    for first in channels.clone().step_by(format.panel) {
        let columns: Vec<(usize, usize)> = (0..format.panel)
            .map(|column| (column, first + format.channel_of_column(column)))
            .filter(|(_, channel)| *channel < channels.end)
            .collect();
        for run in 0..runs {
            let (of_run, behind) = rest.split_at_mut(run_bytes);
            rest = behind;
            for (start, groups) in (0..run_len)
                .step_by(step * GROUPS_AT_ONCE)
                .zip(of_run.chunks_mut(GROUPS_AT_ONCE * group_bytes))
            {
                let room = &mut room[..(run_len - start).min(step * GROUPS_AT_ONCE)];
                for &(column, channel) in &columns {
                    W::put(format, groups, column, weights.take(channel, run, start, room));
                }
            }
        }
    }
}

/// Byte offsets of the regions of one panel's parameter block.
///
/// Notation: `[NR] i32` is one value a column (in the order of [`PanelFormat::channel_of_column`]), `[words] i16` one
/// a word, `[wide] i64` one a 64-bit element; `splat` is one value repeated over a vector. A region that the
/// format does not need has no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamLayout {
    /// `[NR] i32` or `[NR] f32`: what accumulators start from. Codes: q_b − z_x·Σq_w plus what the mode folds in.
    pub bias: usize,
    /// `[lanes] u32`: dword permutation of narrowed codes that brings a pixel's bytes together. 256 and 512 bits only.
    pub permutation: usize,
    /// The constants of the epilogue.
    pub epilogue: EpilogueLayout,
    /// Bytes of a block, a multiple of [`ALIGN`].
    pub size: usize,
}

/// Regions of an epilogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EpilogueLayout {
    /// Nothing.
    PackOnly,
    /// Sums of codes to floats.
    Dequantize {
        /// `[NR] i32`: Σ q_w.
        sums: usize,
        /// `[NR] f32`.
        scale: usize,
        /// `[NR] f32`.
        bias: usize,
        /// splat f32: lower bound.
        lo: usize,
        /// splat f32: upper bound.
        hi: usize,
    },
    /// Floats.
    Float {
        /// splat f32: lower bound.
        lo: usize,
        /// splat f32: upper bound.
        hi: usize,
    },
    /// Codes.
    Requantize(RequantizeLayout),
}

/// Regions of a requantizing epilogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequantizeLayout {
    /// splat u8: smallest code.
    pub lo: usize,
    /// splat u8: largest code.
    pub hi: usize,
    /// splat i16: zero point of the result.
    pub zero_point: usize,
    /// `[lanes] u32`: dword permutation that gives each 128-bit lane the residual codes of its channels. 512
    /// bits only.
    pub residual_permutation: usize,
    /// Byte shuffles, one vector each, from a lane's residual codes to its columns (one a vector of the panel)
    /// or, in q15, to its words (one a pair; two for a panel of one vector: low half and high half). 256 and
    /// 512 bits only.
    pub residual_shuffle: usize,
    /// The constants of the mode.
    pub rescale: RescaleLayout,
}

/// Regions of a requantization mode. Names as in [`Requantizer::apply`]; those with `_r` only with a residual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RescaleLayout {
    /// v = (acc·m + q_r·m_r·2^k + add) >> n, with add = 2^(n−1) − z_r·m_r·2^k.
    Shift {
        /// `[NR] i32`; the 4 bytes behind it can be read, so that the odd columns are a vector at `m + 4`.
        m: usize,
        /// `[wide] i64`; on 256 bits, where right shifts of 64 bits are logical, plus 2^63.
        add: usize,
        /// `[wide] u64`.
        n: usize,
        /// `[NR] i32`: 2^(63−n), what the 2^63 in `add` became. 256 bits only.
        sign: usize,
        /// splat i32.
        m_r: usize,
        /// `[wide] u64`.
        k: usize,
    },
    /// The same where every n is 33 or more and there is no residual, on the high half of the product:
    /// v = (high32(acc·m) + 2^(n−33)) >> (n−32). The low half is less than a unit of either shift, and never carries.
    /// 256 and 512 bits only.
    ShiftHigh {
        /// `[NR] i32`; readable at `m + 4` likewise.
        m: usize,
        /// `[NR] i32`: 2^(n−33).
        half: usize,
        /// `[NR] u32`: n − 32.
        n: usize,
    },
    /// Two roundings.
    Tflite {
        /// `[NR] u32`.
        left: usize,
        /// `[NR] i32`; readable at `m + 4` likewise.
        m: usize,
        /// splat i64: 2^30.
        nudge: usize,
        /// `[NR] u32`: half a unit of the right shift, 2^(right−1), or 0.
        half: usize,
        /// `[NR] u32`.
        right: usize,
        /// splat i32.
        z_r: usize,
        /// splat u32.
        left_r: usize,
        /// splat i32.
        m_r: usize,
        /// splat u32.
        half_r: usize,
        /// splat u32.
        right_r: usize,
        /// splat u32: half a unit of the guard bits.
        guard_half: usize,
        /// splat u32: guard bits.
        guard: usize,
    },
    /// 16-bit lanes; the offset is in the bias. The zero point is not used.
    Q15 {
        /// `[NR] u32`.
        s1: usize,
        /// `[words] i16`.
        m: usize,
        /// splat u8 0x80: from s8 to u8.
        flip: usize,
        /// splat i16.
        z_r: usize,
        /// splat i16.
        m_r: usize,
    },
    /// v = (acc + q_r·m_r) >> n; rounding term and −z_r·m_r are in the bias.
    Pow2 {
        /// `[NR] u32`.
        n: usize,
        /// `[NR] i32`.
        m_r: usize,
    },
    /// v = round(min(f32(acc)·scale + f32(q_r − z_r)·scale_r, most)).
    Float {
        /// `[NR] f32`.
        scale: usize,
        /// splat f32: hi − z_y.
        most: usize,
        /// splat i32.
        z_r: usize,
        /// splat f32.
        scale_r: usize,
    },
}

/// Hands out aligned regions.
struct Regions {
    format: PanelFormat,
    end: usize,
}

impl Regions {
    fn take(&mut self, bytes: usize) -> usize {
        let start = self.end;
        self.end = (start + bytes).next_multiple_of(ALIGN);
        start
    }

    fn columns(&mut self) -> usize {
        self.take(4 * self.format.panel)
    }

    fn columns_if(&mut self, needed: bool) -> usize {
        if needed { self.columns() } else { self.end }
    }

    fn wide(&mut self) -> usize {
        self.take(8 * self.format.panel)
    }

    fn splat(&mut self) -> usize {
        self.take(self.format.vector_bytes())
    }

    fn splat_if(&mut self, needed: bool) -> usize {
        if needed { self.splat() } else { self.end }
    }

    fn rescale(&mut self, q: RequantizeForm) -> RescaleLayout {
        let residual = q.has_residual;
        match q.rescale {
            RescaleForm::Shift { is_high: true } if self.format.is_wide() && !residual => {
                RescaleLayout::ShiftHigh { m: self.columns(), half: self.columns(), n: self.columns() }
            }
            RescaleForm::Shift { .. } => RescaleLayout::Shift {
                m: self.columns(),
                add: self.wide(),
                n: self.wide(),
                sign: if has_logical_wide_shift(self.format) { self.columns() } else { self.end },
                m_r: self.splat_if(residual),
                k: if residual { self.wide() } else { self.end },
            },
            RescaleForm::Tflite { .. } => RescaleLayout::Tflite {
                left: self.columns(),
                m: self.columns(),
                nudge: self.splat(),
                half: self.columns(),
                right: self.columns(),
                z_r: self.splat_if(residual),
                left_r: self.splat_if(residual),
                m_r: self.splat_if(residual),
                half_r: self.splat_if(residual),
                right_r: self.splat_if(residual),
                guard_half: self.splat_if(residual),
                guard: self.splat_if(residual),
            },
            RescaleForm::Q15 { .. } => RescaleLayout::Q15 {
                s1: self.columns(),
                m: self.take(2 * self.format.words()),
                flip: self.splat(),
                z_r: self.splat_if(residual),
                m_r: self.splat_if(residual),
            },
            RescaleForm::Pow2 => RescaleLayout::Pow2 {
                n: self.columns(),
                m_r: if residual { self.columns() } else { self.end },
            },
            RescaleForm::Float { .. } => RescaleLayout::Float {
                scale: self.columns(),
                most: self.splat(),
                z_r: self.splat_if(residual),
                scale_r: self.splat_if(residual),
            },
        }
    }
}

/// AVX2 has no arithmetic right shift of 64-bit elements; its tiles add 2^63, shift and take 2^(63−n) off again.
fn has_logical_wide_shift(format: PanelFormat) -> bool {
    format.vector_bytes() == 32
}

/// How many shuffles spread a pixel's residual codes.
fn residual_shuffles(format: PanelFormat, rescale: RescaleForm) -> usize {
    match (rescale, format.vectors()) {
        (RescaleForm::Q15 { .. }, 1) => 2,
        (RescaleForm::Q15 { .. }, vectors) => vectors.div_ceil(2),
        (_, vectors) => vectors,
    }
}

impl ParamLayout {
    /// The regions that a tile of this format with this epilogue reads.
    pub fn new(format: PanelFormat, epilogue: EpilogueForm) -> ParamLayout {
        let codes = !format.floats;
        let mut regions = Regions { format, end: 0 };
        let bias = regions.columns();
        let permutation = regions.splat_if(codes && format.is_wide());
        let epilogue = match epilogue {
            EpilogueForm::PackOnly => EpilogueLayout::PackOnly,
            EpilogueForm::Dequantize { grids, bias, lo, hi, .. } => EpilogueLayout::Dequantize {
                sums: regions.columns_if(grids.has_zero_points()),
                scale: regions.columns(),
                bias: regions.columns_if(bias),
                lo: regions.splat_if(lo),
                hi: regions.splat_if(hi),
            },
            EpilogueForm::Float { .. } => EpilogueLayout::Float { lo: regions.splat(), hi: regions.splat() },
            EpilogueForm::Requantize(q) => {
                let shuffled = q.has_residual && format.is_wide();
                EpilogueLayout::Requantize(RequantizeLayout {
                    lo: regions.splat(),
                    hi: regions.splat(),
                    zero_point: regions.splat(),
                    residual_permutation: regions.splat_if(shuffled && format.vector_bytes() == 64),
                    residual_shuffle: if shuffled {
                        regions.take(residual_shuffles(format, q.rescale) * format.vector_bytes())
                    } else {
                        regions.end
                    },
                    rescale: regions.rescale(q),
                })
            }
        };
        ParamLayout { bias, permutation, epilogue, size: regions.end }
    }
}

/// One panel's block while it is written.
struct Block<'a> {
    format: PanelFormat,
    /// The panel's channels; fewer than NR in the last panel.
    channels: Range<usize>,
    bytes: &'a mut [u8],
}

impl Block<'_> {
    /// Writes `N`-byte values, given by channel; 0 for channels that do not exist.
    fn each<const N: usize>(
        &mut self,
        at: usize,
        count: usize,
        channel_of: impl Fn(usize) -> usize,
        value: impl Fn(usize) -> [u8; N],
    ) {
        for (i, slot) in self.bytes[at..].chunks_exact_mut(N).take(count).enumerate() {
            let channel = self.channels.start + channel_of(i);
            if channel < self.channels.end {
                slot.copy_from_slice(&value(channel));
            }
        }
    }

    fn columns(&mut self, at: usize, value: impl Fn(usize) -> u32) {
        let f = self.format;
        self.each(at, f.panel, |i| f.channel_of_column(i), |c| value(c).to_le_bytes());
    }

    fn words(&mut self, at: usize, value: impl Fn(usize) -> i16) {
        let f = self.format;
        self.each(at, f.words(), |i| f.channel_of_word(i), |c| value(c).to_le_bytes());
    }

    fn wide(&mut self, at: usize, value: impl Fn(usize) -> u64) {
        let f = self.format;
        self.each(at, f.panel, |i| f.channel_of_wide(i), |c| value(c).to_le_bytes());
    }

    fn splat<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        for slot in self.bytes[at..][..self.format.vector_bytes()].chunks_exact_mut(N) {
            slot.copy_from_slice(&value);
        }
    }

    /// A pixel's dwords of narrowed codes are spread over the lanes, beside those of other pixels: gather them.
    fn permutation(&mut self, at: usize) {
        let (lanes, vectors) = (self.format.lanes() / 4, self.format.vectors());
        for pixel in 0..4 / vectors {
            for lane in 0..lanes {
                for j in 0..vectors {
                    let (to, from) = ((pixel * lanes + lane) * vectors + j, 4 * lane + pixel * vectors + j);
                    self.bytes[at + 4 * to..][..4].copy_from_slice(&(from as u32).to_le_bytes());
                }
            }
        }
    }

    /// The other way round: lane l gets the dwords of its 4·vectors channels.
    fn residual_permutation(&mut self, at: usize) {
        let vectors = self.format.vectors();
        for lane in 0..self.format.lanes() / 4 {
            for j in 0..vectors {
                let (to, from) = (4 * lane + j, vectors * lane + j);
                self.bytes[at + 4 * to..][..4].copy_from_slice(&(from as u32).to_le_bytes());
            }
        }
    }

    /// `pshufb` masks that zero-extend codes `first..` of a lane to elements of `size` bytes; `elements` of them,
    /// from element `to` on.
    fn shuffle(&mut self, at: usize, size: usize, first: usize, elements: usize, to: usize) {
        const ZERO: u8 = 0x80;
        for lane in self.bytes[at..][..self.format.vector_bytes()].chunks_exact_mut(16) {
            lane.fill(ZERO);
            for i in 0..elements {
                lane[size * (to + i)] = (first + i) as u8;
            }
        }
    }

    fn residual_shuffle(&mut self, at: usize, rescale: RescaleForm) {
        let vector = self.format.vector_bytes();
        let count = residual_shuffles(self.format, rescale);
        for i in 0..count {
            let at = at + i * vector;
            match (rescale, self.format.vectors()) {
                (RescaleForm::Q15 { .. }, 1) => self.shuffle(at, 2, 0, 4, 4 * i),
                (RescaleForm::Q15 { .. }, _) => self.shuffle(at, 2, 8 * i, 8, 0),
                _ => self.shuffle(at, 4, 4 * i, 4, 0),
            }
        }
    }

    fn rescale(&mut self, layout: &RescaleLayout, q: &Requantizer) {
        let residual = q.has_residual;
        let z_r = q.residual_zero_point;
        match (&q.rescale, layout) {
            (
                Rescale::Shift { m, n, m_r, k },
                RescaleLayout::Shift { m: at_m, add, n: at_n, sign, m_r: at_m_r, k: at_k },
            ) => {
                self.columns(*at_m, |c| m[c] as u32);
                let bias = if has_logical_wide_shift(self.format) { 1 << 63 } else { 0 };
                let zero = |c: usize| i64::from(z_r * m_r) << k[c];
                self.wide(*add, |c| (1u64 << (n[c] - 1)).wrapping_sub(zero(c) as u64).wrapping_add(bias));
                self.wide(*at_n, |c| n[c].into());
                if has_logical_wide_shift(self.format) {
                    self.columns(*sign, |c| (1u64 << (63 - n[c])) as u32);
                }
                if residual {
                    self.splat(*at_m_r, m_r.to_le_bytes());
                    self.wide(*at_k, |c| k[c].into());
                }
            }
            (Rescale::Shift { m, n, .. }, RescaleLayout::ShiftHigh { m: at_m, half, n: at_n }) => {
                self.columns(*at_m, |c| m[c] as u32);
                self.columns(*half, |c| 1 << (n[c] - 33));
                self.columns(*at_n, |c| n[c] - 32);
            }
            (
                Rescale::Tflite { m, left, right, guard, residual: (m_r, left_r, right_r) },
                RescaleLayout::Tflite {
                    left: at_left,
                    m: at_m,
                    nudge,
                    half,
                    right: at_right,
                    z_r: at_z_r,
                    left_r: at_left_r,
                    m_r: at_m_r,
                    half_r,
                    right_r: at_right_r,
                    guard_half,
                    guard: at_guard,
                },
            ) => {
                let half_of = |shift: u32| (1u32 << shift) >> 1;
                self.columns(*at_left, |c| left[c]);
                self.columns(*at_m, |c| m[c] as u32);
                self.splat(*nudge, (1u64 << 30).to_le_bytes());
                self.columns(*half, |c| half_of(right[c]));
                self.columns(*at_right, |c| right[c]);
                if residual {
                    self.splat(*at_z_r, z_r.to_le_bytes());
                    self.splat(*at_left_r, left_r.to_le_bytes());
                    self.splat(*at_m_r, m_r.to_le_bytes());
                    self.splat(*half_r, half_of(*right_r).to_le_bytes());
                    self.splat(*at_right_r, right_r.to_le_bytes());
                    self.splat(*guard_half, half_of(*guard).to_le_bytes());
                    self.splat(*at_guard, guard.to_le_bytes());
                }
            }
            (
                Rescale::Q15 { s1, m, m_r, .. },
                RescaleLayout::Q15 { s1: at_s1, m: at_m, flip, z_r: at_z_r, m_r: at_m_r },
            ) => {
                self.columns(*at_s1, |c| s1[c]);
                self.words(*at_m, |c| m[c]);
                self.splat(*flip, [0x80]);
                if residual {
                    self.splat(*at_z_r, (z_r as i16).to_le_bytes());
                    self.splat(*at_m_r, m_r.to_le_bytes());
                }
            }
            (Rescale::Pow2 { n, m_r }, RescaleLayout::Pow2 { n: at_n, m_r: at_m_r }) => {
                self.columns(*at_n, |c| n[c]);
                if residual {
                    self.columns(*at_m_r, |c| m_r[c] as u32);
                }
            }
            (
                Rescale::Float { scale, scale_r },
                RescaleLayout::Float { scale: at_scale, most, z_r: at_z_r, scale_r: at_scale_r },
            ) => {
                self.columns(*at_scale, |c| scale[c].to_bits());
                self.splat(*most, ((q.grid.hi - q.grid.zero_point) as f32).to_le_bytes());
                if residual {
                    self.splat(*at_z_r, z_r.to_le_bytes());
                    self.splat(*at_scale_r, scale_r.to_le_bytes());
                }
            }
            _ => unreachable!("the layout was made for this requantizer"),
        }
    }
}

/// What the mode adds to the bias of channel `c`.
fn folded(q: &Requantizer, c: usize) -> i32 {
    match &q.rescale {
        Rescale::Q15 { offset, .. } => offset[c],
        Rescale::Pow2 { n, m_r } => {
            ((1i32 << n[c]) >> 1).wrapping_sub(q.residual_zero_point.wrapping_mul(m_r[c]))
        }
        Rescale::Shift { .. } | Rescale::Tflite { .. } | Rescale::Float { .. } => 0,
    }
}

/// Blocks of all panels of `channels`, one after the other, each `layout.size` bytes.
fn blocks(
    format: PanelFormat,
    layout: &ParamLayout,
    channels: Range<usize>,
    mut write: impl FnMut(&mut Block),
) -> Vec<u8> {
    let mut bytes = vec![0; format.panels(channels.len()) * layout.size];
    for (first, block) in channels.clone().step_by(format.panel).zip(bytes.chunks_exact_mut(layout.size)) {
        let channels = first..channels.end.min(first + format.panel);
        write(&mut Block { format, channels, bytes: block });
    }
    bytes
}

/// Packs the epilogue constants of an int8 product's `channels`, panel after panel.
///
/// `requantizer` is `None` for [`Epilogue::PackOnly`]. `bias` holds q_b − z_x·Σq_w for every channel of the op, as
/// the requantizer does; `channels` indexes both.
pub fn pack_params(
    format: PanelFormat,
    requantizer: Option<&Requantizer>,
    channels: Range<usize>,
    bias: &[i32],
) -> Vec<u8> {
    let form = requantizer.map_or(Epilogue::PackOnly, Epilogue::Requantize).form();
    let layout = ParamLayout::new(format, form);
    blocks(format, &layout, channels, |block| {
        block.columns(layout.bias, |c| bias[c].wrapping_add(requantizer.map_or(0, |q| folded(q, c))) as u32);
        if format.is_wide() {
            block.permutation(layout.permutation);
        }
        let (Some(q), EpilogueForm::Requantize(form)) = (requantizer, form) else { return };
        let EpilogueLayout::Requantize(at) = &layout.epilogue else { return };
        block.splat(at.lo, [q.grid.lo as u8]);
        block.splat(at.hi, [q.grid.hi as u8]);
        block.splat(at.zero_point, (q.grid.zero_point as i16).to_le_bytes());
        if q.has_residual && format.is_wide() {
            if format.vector_bytes() == 64 {
                block.residual_permutation(at.residual_permutation);
            }
            block.residual_shuffle(at.residual_shuffle, form.rescale);
        }
        block.rescale(&at.rescale, q);
    })
}

/// Packs the constants by which sums of codes become floats, of `channels`, panel after panel. `channels` indexes the
/// dequantizer's channels and `starts`, what sums start from.
pub fn pack_dequantizer(
    format: PanelFormat,
    epilogue: EpilogueForm,
    dequantizer: &Dequantizer,
    channels: Range<usize>,
    starts: &[i32],
) -> Vec<u8> {
    let layout = ParamLayout::new(format.with_results(epilogue), epilogue);
    let Dequantizer { sums, scales, bias, clamp } = dequantizer;
    blocks(format, &layout, channels, |block| {
        block.columns(layout.bias, |c| starts[c] as u32);
        // Sums of depthwise strips start in the order of codes, and are brought into that of floats.
        block.format = format.with_results(epilogue);
        let EpilogueForm::Dequantize { grids, lo: has_lo, hi: has_hi, .. } = epilogue else { return };
        let EpilogueLayout::Dequantize { sums: at_sums, scale, bias: at_bias, lo, hi } = layout.epilogue
        else {
            return;
        };
        if grids.has_zero_points() {
            block.columns(at_sums, |c| sums[c] as u32);
        }
        block.columns(scale, |c| scales[c].to_bits());
        if let Some(bias) = bias {
            block.columns(at_bias, |c| bias[c].to_bits());
        }
        for (_, at, bound) in [(has_lo, lo, clamp.lo), (has_hi, hi, clamp.hi)].iter().filter(|b| b.0) {
            block.splat(*at, bound.to_le_bytes());
        }
    })
}

/// Packs the epilogue constants of a float product's `channels`, panel after panel. `channels` indexes `bias`.
pub fn pack_bias(format: PanelFormat, clamp: Clamp, channels: Range<usize>, bias: &[f32]) -> Vec<u8> {
    let layout = ParamLayout::new(format, Epilogue::Float { clamp, residual: false }.form());
    blocks(format, &layout, channels, |block| {
        block.columns(layout.bias, |c| bias[c].to_bits());
        if let EpilogueLayout::Float { lo, hi } = layout.epilogue {
            block.splat(lo, clamp.lo.to_le_bytes());
            block.splat(hi, clamp.hi.to_le_bytes());
        }
    })
}
