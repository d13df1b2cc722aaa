//! What one depthwise microkernel computes: a *strip* of output pixels by a panel of channels, straight from an image
//! without a border.
//!
//! ```text
//! extern "sysv64" fn strip(a: *const u8, w: *const u8, params: *const u8, y: *mut u8, r: *const u8, at: u64)
//! ```
//!
//! The first five parameters are those of a dense tile ([`spec`](super::spec)), but that `a` is the input pixel
//! (row·stride, column·stride) of the strip's first output pixel (row, column) as if there were no padding, and `at`
//! is `row | column << 32`: with it the strip knows which taps lie outside the image.
//!
//! A strip of codes works in two phases. The first *interleaves*: the rows that the strip reads are taken in groups of
//! 4 (2 where codes have to be widened), and for every input column the codes of a group that belong to one channel become
//! one dword of a scratch line on the stack; what lies outside the image becomes the zero point there. The second
//! phase multiplies: a dword of the line by a dword of weights is all taps of a group in one column. An interleaved
//! column serves all output columns that reach it, and several output rows: the weights of the second row are those of
//! the first, moved by the bytes that it starts lower. In a 3x3 of stride 1, the 4 rows of a group are the 4 rows that
//! two output rows read.
//!
//! Floats have no groups: taps are multiplied where they lie, and those outside the image are left out.

use super::{
    Weights,
    choose::Panel,
    pack::PanelFormat,
    spec::{EpilogueForm, Product},
};
use crate::tier::Isa;
use std::collections::BTreeSet;

/// Bytes of the scratch line: small enough to share the first cache with rows and weights, and for any stack.
const SCRATCH: usize = 16 << 10;
/// Output pixels of one row whose accumulators are held at once, at most: more is code without use.
const MAX_BLOCK: usize = 8;
/// Registers that hold no accumulators: weights, columns, products, and what the epilogue needs.
const TEMPORARIES: usize = 8;
/// Kernel rows of a float strip, which has a bit for each.
const MAX_MASKED_ROWS: usize = 32;
/// Blocks of a float strip that have code of their own because taps lie outside the image.
const MAX_EDGE_BLOCKS: usize = 8;

/// One axis of a window that moves over an unpadded image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Axis {
    /// Taps.
    pub(crate) taps: usize,
    /// Input pixels from one output pixel to the next.
    pub(crate) stride: usize,
    /// Input pixels from one tap to the next.
    pub(crate) dilation: usize,
    /// Padding before the first input pixel.
    pub(crate) before: usize,
    /// Input pixels.
    pub(crate) extent: usize,
    /// Bytes from one input pixel to the next.
    pub(crate) pitch: usize,
}

impl Axis {
    /// Input pixels that `outputs` neighbouring windows span.
    pub(crate) fn span(&self, outputs: usize) -> usize {
        (outputs - 1) * self.stride + (self.taps - 1) * self.dilation + 1
    }

    /// The tap of output `i` that meets input pixel `at`, counted from the first tap of output 0.
    pub(crate) fn tap(&self, i: usize, at: usize) -> Option<usize> {
        let offset = at.checked_sub(i * self.stride)?;
        let tap = offset / self.dilation;
        (offset.is_multiple_of(self.dilation) && tap < self.taps).then_some(tap)
    }

    /// Input pixels that a tap of one of these outputs meets, in order.
    pub(crate) fn reached(&self, outputs: usize) -> Vec<usize> {
        let of_output = |i: usize| (0..self.taps).map(move |tap| i * self.stride + tap * self.dilation);
        let all: BTreeSet<usize> = (0..outputs).flat_map(of_output).collect();
        all.into_iter().collect()
    }

    /// Where input pixel `at` of [`span`](Self::span) is in the image, for output 0 at `first`; `None` outside.
    pub(crate) fn inside(&self, first: usize, at: usize) -> Option<usize> {
        (first * self.stride + at).checked_sub(self.before).filter(|i| *i < self.extent)
    }
}

/// A depthwise convolution of one panel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct StripSpec {
    pub(crate) product: Product,
    pub(crate) isa: Isa,
    /// Channels of the panel: 1, 2 or 4 vectors.
    pub(crate) panel: usize,
    /// Channels that are stored.
    pub(crate) columns: usize,
    /// Output rows that the weights are laid out for.
    pub(crate) planned_rows: usize,
    /// Output rows and columns of this strip; of rows at most those planned.
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) window: [Axis; 2],
    /// Bytes from one row of results to the next, and from one pixel.
    pub(crate) y_row: usize,
    pub(crate) y_col: usize,
    pub(crate) epilogue: EpilogueForm,
}

/// A vector of weights: those of all rows of a group, for one output row and one column of taps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WeightVector {
    pub(crate) group: usize,
    pub(crate) vector: usize,
    pub(crate) col: usize,
    pub(crate) row: usize,
}

impl StripSpec {
    pub(crate) fn format(&self) -> PanelFormat {
        PanelFormat::new(self.product, self.isa, self.panel)
    }

    /// Rows that one multiplication takes.
    pub(crate) fn rows_at_once(&self) -> usize {
        rows_at_once(self.product, self.isa)
    }

    /// The input rows that output rows read, as offsets from the first tap, in groups that are multiplied at once.
    pub(crate) fn groups(&self) -> Vec<Vec<usize>> {
        groups(&self.window[0], self.planned_rows, self.rows_at_once())
    }

    /// Groups that the strip's own rows read: fewer at the lower edge than planned.
    pub(crate) fn read_groups(&self) -> usize {
        let reads = |group: &Vec<usize>| (0..self.rows).any(|r| meets(&self.window[0], r, group));
        self.groups().iter().rposition(reads).map_or(0, |last| last + 1)
    }

    /// Whether output row `row` has taps in a group.
    pub(crate) fn meets(&self, row: usize, group: &[usize]) -> bool {
        meets(&self.window[0], row, group)
    }

    /// The weights in the order of memory.
    pub(crate) fn weight_vectors(&self) -> Vec<WeightVector> {
        let mut vectors = Vec::new();
        for (group, offsets) in self.groups().iter().enumerate() {
            let rows: Vec<usize> = (0..self.planned_rows).filter(|&r| self.meets(r, offsets)).collect();
            for vector in 0..self.format().vectors() {
                for col in 0..self.window[1].taps {
                    vectors.extend(rows.iter().map(|&row| WeightVector { group, vector, col, row }));
                }
            }
        }
        vectors
    }

    /// Byte offset of weights behind the [`Header`].
    pub(crate) fn weights_at(&self) -> usize {
        if self.product.is_of_codes() { Header::BYTES } else { 0 }
    }

    /// Output columns whose accumulators are held at once.
    pub(crate) fn block(&self) -> usize {
        match self.product.is_of_codes() {
            // Whole blocks, and one smaller one behind them.
            true => block(self.isa, self.planned_rows, self.format().vectors()).min(self.cols),
            false => balanced(self.cols, MAX_BLOCK),
        }
    }

    /// Bytes of one column of the scratch line.
    pub(crate) fn line_column(&self) -> usize {
        self.read_groups() * self.panel * 4
    }

    /// Whether no tap of these output columns lies outside the image.
    pub(crate) fn is_interior(&self, first: usize, count: usize) -> bool {
        is_interior(&self.window[1], first, count)
    }

    /// Packs the weights of the channels from `first` on; `weights` has one tap a run.
    pub(crate) fn pack<T: Copy + Into<StripWeight>>(
        &self,
        first: usize,
        weights: &Weights<'_, T>,
        zero_point: u8,
    ) -> Vec<u8> {
        let (format, groups) = (self.format(), self.groups());
        let mut bytes = match self.product.is_of_codes() {
            true => Header::pack(zero_point, self.rows_at_once()),
            false => Vec::new(),
        };
        let channels: Vec<usize> = (0..self.panel).map(|column| format.channel_of_column(column)).collect();
        let at_once = self.rows_at_once();
        for at in self.weight_vectors() {
            let tap = |slot: usize| {
                let row = *groups[at.group].get(slot)?;
                Some(self.window[0].tap(at.row, row)? * self.window[1].taps + at.col)
            };
            let taps: [Option<usize>; MAX_AT_ONCE] = std::array::from_fn(tap);
            for &channel in &channels[at.vector * format.lanes()..][..format.lanes()] {
                let of_channel = weights.of_channel(first + channel.min(self.columns - 1));
                for tap in &taps[..at_once] {
                    let weight = tap.filter(|_| channel < self.columns).map(|tap| of_channel[tap].into());
                    StripWeight::put(weight, at_once, &mut bytes);
                }
            }
        }
        bytes
    }
}

/// A weight as strips hold it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StripWeight {
    Code(i8),
    Real(f32),
}

impl From<i8> for StripWeight {
    fn from(w: i8) -> StripWeight {
        StripWeight::Code(w)
    }
}

impl From<f32> for StripWeight {
    fn from(w: f32) -> StripWeight {
        StripWeight::Real(w)
    }
}

impl StripWeight {
    /// Appends a weight, or zero, as an element of which a dword holds `at_once`.
    fn put(weight: Option<StripWeight>, at_once: usize, bytes: &mut Vec<u8>) {
        match (weight, at_once) {
            (None, _) => bytes.resize(bytes.len() + 4 / at_once, 0),
            (Some(StripWeight::Real(w)), _) => bytes.extend(w.to_le_bytes()),
            (Some(StripWeight::Code(w)), 4) => bytes.extend(w.to_le_bytes()),
            (Some(StripWeight::Code(w)), _) => bytes.extend(i16::from(w).to_le_bytes()),
        }
    }
}

/// Constants in front of a panel's weights, a vector of 64 bytes each.
pub(crate) struct Header;

impl Header {
    /// The zero point as codes: what a row outside the image holds. Strips take it for such a row, so it is the first.
    pub(crate) const CODES: usize = 0;
    /// The zero point as elements of the scratch line, which are words where codes are widened.
    pub(crate) const ELEMENTS: usize = 64;
    /// Dwords that bring together the codes of four channels in four rows, for one vector of a panel...
    pub(crate) const GATHER_ONE: usize = 128;
    /// ...and for each of two.
    pub(crate) const GATHER_TWO: [usize; 2] = [192, 256];
    /// In each 128-bit lane, rows of four channels to channels of four rows.
    pub(crate) const TRANSPOSE: usize = 320;
    pub(crate) const BYTES: usize = 384;

    fn pack(zero_point: u8, at_once: usize) -> Vec<u8> {
        let mut bytes = vec![zero_point; 64];
        bytes.extend((0..64).map(|i| if i % (4 / at_once) == 0 { zero_point } else { 0 }));
        // Element e of lane l takes dword l of row e: rows are 4 dwords long for one vector, 8 for two.
        for (row_dwords, step, first) in [(4, 1, 0), (8, 2, 0), (8, 2, 1)] {
            let dwords = (0..16u32).map(|i| (i % 4) * row_dwords + i / 4 * step + first);
            bytes.extend(dwords.flat_map(u32::to_le_bytes));
        }
        bytes.extend((0..64u8).map(|i| i % 4 * 4 + i % 16 / 4));
        bytes
    }
}

/// The most rows of taps that one multiplication takes.
const MAX_AT_ONCE: usize = 4;

fn rows_at_once(product: Product, isa: Isa) -> usize {
    match (product, isa) {
        (Product::F32, _) => 1,
        (Product::U8S8, Isa::Avx2) => 2,
        (Product::U8S8 | Product::U8S7, _) => 4,
    }
}

fn groups(rows: &Axis, outputs: usize, at_once: usize) -> Vec<Vec<usize>> {
    rows.reached(outputs).chunks(at_once).map(<[usize]>::to_vec).collect()
}

fn meets(rows: &Axis, output: usize, group: &[usize]) -> bool {
    group.iter().any(|&at| rows.tap(output, at).is_some())
}

/// Output columns of codes whose accumulators are held at once.
fn block(isa: Isa, rows: usize, vectors: usize) -> usize {
    let registers = if is_zmm(isa) { 32 } else { 16 };
    ((registers - TEMPORARIES) / (rows * vectors)).min(MAX_BLOCK)
}

fn is_zmm(isa: Isa) -> bool {
    PanelFormat::new(Product::U8S8, isa, 1).vector_bytes() == 64
}

/// Vectors of panels, the widest first.
pub(crate) fn panel_vectors(isa: Isa, product: Product) -> &'static [usize] {
    match (product, is_zmm(isa)) {
        (Product::F32, _) => &[1],
        (Product::U8S8 | Product::U8S7, true) => &[4, 2, 1],
        // 8 channels take as many shuffles as 16.
        (Product::U8S8 | Product::U8S7, false) => &[4, 2],
    }
}

/// Whether loads reach beyond the last channel of a pixel, and so beyond the last pixel of the input: rows of a panel
/// are whole vectors of 32-bit lanes wide.
pub(crate) fn overreads(product: Product, isa: Isa, channels: usize) -> bool {
    let lanes = PanelFormat::new(product, isa, 1).lanes();
    let narrowest = panel_vectors(isa, product).iter().min().map_or(lanes, |v| v * lanes);
    !channels.is_multiple_of(narrowest)
}

/// The panels of an image, the widest first.
pub(crate) fn panels(product: Product, isa: Isa, channels: usize) -> Vec<Panel> {
    let lanes = PanelFormat::new(product, isa, 1).lanes();
    let widths = panel_vectors(isa, product).iter().map(|v| v * lanes);
    let narrowest = widths.clone().min().unwrap_or(lanes);
    let mut panels = Vec::new();
    let mut first = 0;
    while first < channels {
        let left = channels - first;
        let width = widths.clone().find(|&w| w <= left.next_multiple_of(narrowest)).unwrap_or(narrowest);
        panels.push(Panel { first, width, columns: left.min(width) });
        first += width;
    }
    panels
}

/// A depthwise convolution cut into strips.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Strips {
    /// How the window moves over the rows and columns of the input.
    pub(crate) window: [Axis; 2],
    /// The code that stands outside the image.
    pub(crate) padding: u8,
    /// Output rows and columns of a strip.
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Strips {
    /// Cuts an image of `outputs` rows and columns; `None` where strips do not reach: tiers whose tiles are Cranelift's,
    /// and windows that span too much.
    pub(crate) fn new(
        product: Product,
        isa: Isa,
        window: [Axis; 2],
        padding: u8,
        outputs: [usize; 2],
    ) -> Option<Strips> {
        if matches!(isa, Isa::Xmm | Isa::XmmVnni) {
            return None;
        }
        let [rows, cols] = match product {
            Product::U8S8 | Product::U8S7 => cut_codes(product, isa, &window, outputs)?,
            Product::F32 => cut_floats(&window, outputs)?,
        };
        Some(Strips { window, padding, rows, cols })
    }
}

/// As many rows as cost least, and as many columns as the scratch line holds, in equal strips.
fn cut_codes(product: Product, isa: Isa, window: &[Axis; 2], outputs: [usize; 2]) -> Option<[usize; 2]> {
    let widest = panel_vectors(isa, product)[0];
    let possible = (1..=outputs[0]).take_while(|&r| block(isa, r, widest) > 0);
    let rows = possible.min_by_key(|&r| strip_cost(product, isa, window, r, outputs[0]))?;
    let groups = groups(&window[0], rows, rows_at_once(product, isa)).len();
    let column = groups * widest * if is_zmm(isa) { 64 } else { 32 };
    let most = (1..=outputs[1]).take_while(|&n| window[1].span(n) * column <= SCRATCH).last()?;
    Some([rows, balanced(outputs[1], most)])
}

/// Single rows: taps of several would share loads, of which there are few.
fn cut_floats(window: &[Axis; 2], outputs: [usize; 2]) -> Option<[usize; 2]> {
    let [rows, cols] = window;
    let block = balanced(outputs[1], MAX_BLOCK);
    let starts = (0..outputs[1]).step_by(block);
    let edges = starts.filter(|&first| !is_interior(cols, first, block.min(outputs[1] - first))).count();
    (rows.taps <= MAX_MASKED_ROWS && edges <= MAX_EDGE_BLOCKS).then_some([1, outputs[1]])
}

/// The length of equal parts, none longer than `most`.
fn balanced(all: usize, most: usize) -> usize {
    all.div_ceil(all.div_ceil(most))
}

/// Whether no tap of these outputs lies outside the image.
fn is_interior(axis: &Axis, first: usize, count: usize) -> bool {
    axis.inside(first, 0).is_some() && axis.inside(first, axis.span(count) - 1).is_some()
}

/// What a column of `outputs` rows by one widest panel costs in strips of `rows`, in half cycles of two ports.
///
/// Every input column is interleaved; every tap column of a group is multiplied once for each output row that it
/// meets. 512-bit shuffles have one port where multiplications have two. Weights are loaded once for a block of pixels,
/// and so are the columns that it reaches.
fn strip_cost(product: Product, isa: Isa, window: &[Axis; 2], rows: usize, outputs: usize) -> usize {
    let vectors = panel_vectors(isa, product)[0];
    let at_once = rows_at_once(product, isa);
    // A product that is not fused is summed by an instruction of its own, or by two.
    let instructions = match (isa.has_dot_product(), product) {
        (true, _) => 1,
        (false, Product::U8S7) => 3,
        (false, _) => 2,
    };
    let pixels = block(isa, rows, vectors);
    let [of_rows, of_cols] = window;
    let strip = |own: usize| {
        let (mut shuffles, mut multiplications, mut columns) = (0, 0, 0);
        for group in groups(of_rows, rows, at_once) {
            let met = (0..own).filter(|&r| meets(of_rows, r, &group)).count();
            if met > 0 {
                multiplications += met * of_cols.taps * vectors;
                shuffles += interleaving(group.len(), vectors) * of_cols.stride;
                columns += vectors;
            }
        }
        let loads = (multiplications + columns * of_cols.span(pixels)).div_ceil(pixels);
        let shuffle_port = if is_zmm(isa) { 2 * shuffles } else { shuffles };
        (instructions * multiplications + shuffles).max(shuffle_port).max(loads)
    };
    outputs / rows * strip(rows) + strip(outputs % rows)
}

/// Shuffles that interleave so many rows of a panel.
fn interleaving(rows: usize, vectors: usize) -> usize {
    let bytes = vectors / 2;
    bytes + if rows > 2 { bytes } else { 0 } + vectors
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A padded square kernel on a square image of so many channels.
    fn strips(isa: Isa, size: usize, kernel: usize, stride: usize) -> Option<[usize; 2]> {
        let axis = Axis { taps: kernel, stride, dilation: 1, before: kernel / 2, extent: size, pitch: 64 };
        let outputs = [size.div_ceil(stride); 2];
        Strips::new(Product::U8S8, isa, [axis; 2], 0, outputs).map(|s| [s.rows, s.cols])
    }

    #[test]
    fn a_group_of_four_rows_serves_two_rows_of_a_3x3() {
        assert_eq!(strips(Isa::Avx512Vnni, 112, 3, 1), Some([2, 56]));
        assert_eq!(strips(Isa::AvxVnni, 14, 3, 1), Some([2, 14]));
        assert_eq!(strips(Isa::Avx512Vnni, 1, 3, 1), Some([1, 1]), "no more rows than there are");
        assert_eq!(strips(Isa::Xmm, 14, 3, 1), None, "Cranelift's");
        assert_eq!(strips(Isa::Avx512Vnni, 300, 129, 1), None, "one window is wider than the line");
    }

    #[test]
    fn every_channel_is_in_one_panel() {
        for channels in [1, 15, 16, 33, 48, 96, 100, 144] {
            for (isa, product) in
                [(Isa::Avx512Vnni, Product::U8S8), (Isa::Avx2, Product::U8S8), (Isa::Avx2, Product::F32)]
            {
                let panels = panels(product, isa, channels);
                let mut next = 0;
                for p in &panels {
                    assert_eq!(p.first, next);
                    assert!(p.columns > 0 && p.columns <= p.width);
                    next += p.columns;
                }
                assert_eq!(next, channels, "{isa:?} {product:?}");
            }
        }
    }

    #[test]
    fn taps_are_met_where_the_window_says() {
        let axis = Axis { taps: 3, stride: 2, dilation: 2, before: 1, extent: 6, pitch: 1 };
        assert_eq!(axis.span(2), 7);
        assert_eq!(axis.reached(2), [0, 2, 4, 6]);
        assert_eq!([0, 1, 2, 6].map(|at| axis.tap(1, at)), [None, None, Some(0), Some(2)]);
        // The first window begins one pixel outside.
        assert_eq!([0, 1, 6, 7].map(|at| axis.inside(0, at)), [None, Some(0), Some(5), None]);
    }
}
