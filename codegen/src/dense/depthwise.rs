//! Depthwise convolutions: assembled strips ([`strip`]) where they reach, and otherwise tiles in Cranelift's 128-bit
//! vectors, which every tier can run.
//!
//! A tile of Cranelift's is a run of output pixels of one row by 8 channels (4 at the end). Taps that lie above each
//! other share a vector: their codes are interleaved, so that one `pmaddwd` (two rows), or `vpdpbusd` or `pmaddubsw` (four rows), multiplies and sums
//! them for four channels. An interleaved input column serves every output pixel of a block that a tap of it reaches,
//! so several neighbouring pixels are computed at once.

use super::{
    Problem, Weights,
    choose::{Cut, Order, Panel, Share},
    clif_epilogue::{Accumulator, Finisher, LANES, Params, cast, splat_i16},
    clif_tile::{
        Dot, TILE_PARAMETERS, TileArguments, dot_accumulate, multiply_add_bytes, multiply_add_pairs,
    },
    driver::{
        Class, Coefficients, Elements, Operands, class_index, class_of, classes, for_each_part, kernel_name,
    },
    pack,
    spec::{Epilogue, Product},
    strip::{self, StripSpec, Strips},
    walk::{PanelEntry, Walk},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{FunctionKind, MEM},
    tier::Isa,
};
use cranelift_codegen::ir::{
    BlockArg, ConstantData, InstBuilder, Value,
    condcodes::IntCC,
    types::{F32X4, I8X16, I16X8, I64},
};
use cranelift_frontend::FunctionBuilder;
use std::{collections::BTreeSet, ops::Range};

/// Channels of a panel.
const WIDTH: usize = 2 * LANES;
/// Output pixels that are computed at once.
const PIXELS: usize = 4;
/// Output pixels of a tile: enough to pay for its call, few enough that rows are shared between threads.
const TILE_COLS: usize = 64;
/// Taps that are unrolled; larger kernels go the way of grouped convolutions.
pub(crate) const MAX_TAPS: usize = 128;

/// The taps of a depthwise convolution.
#[derive(Clone, Debug)]
pub(crate) struct Taps {
    /// Kernel rows and columns.
    pub(crate) rows: usize,
    /// Columns.
    pub(crate) cols: usize,
    /// Bytes of the input from one kernel row to the next.
    pub(crate) row_stride: usize,
    /// Pixels of the input from one kernel column to the next.
    pub(crate) dilation: usize,
    /// Pixels of the input from one output pixel to the next.
    pub(crate) stride: usize,
    /// Bytes of a pixel of the input.
    pub(crate) pixel: usize,
}

/// Whether a panel's loads reach beyond the last channel of a pixel, and so beyond the last pixel of the input: those of
/// codes are always of 16 bytes.
pub(crate) fn overreads(product: Product, channels: usize) -> bool {
    product.is_of_codes() || !channels.is_multiple_of(LANES)
}

/// Lowers a depthwise convolution to one step: a problem whose groups are single channels, as one group. A run of K
/// is one tap.
#[allow(clippy::too_many_arguments, reason = "all that a step is made of")]
pub(crate) fn lower(
    cx: &mut Lowering,
    problem: &Problem,
    taps: &Taps,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_, '_>,
    work: Work,
) -> Result<(), CodegenError> {
    let cut = cut(problem, cx.options.tier.isa);
    let name = kernel_name("dwconv", problem.product, &cut, PIXELS);
    let dot = Dot::of_tier(problem.product, cx.options.tier);
    let starts = coefficients.starts;
    let constants = |width: usize| Params::new(epilogue, width, starts.reach());
    let classes = classes(&cut);
    let mut functions = Vec::with_capacity(classes.len());
    for &class in &classes {
        functions.push(for_each_part(problem, &cut, |_, cols| {
            let tile_name = cx.step_name(&format!("{name}_tile_{cols}x{}", class.1));
            cx.define_function(&tile_name, FunctionKind::Tile, TILE_PARAMETERS, |e| {
                let arguments = TileArguments::of(&e.params);
                let params = &constants(class.0);
                Tile { taps, dot, class, problem, params }.emit(&mut e.b, cols, arguments);
                Ok(())
            })
        })?);
    }
    let entries = entries(cx, problem, &cut, &classes, |panel| {
        let weights = match &coefficients.weights {
            Elements::Codes(w) => pack_codes(panel, taps, dot, w),
            Elements::Floats(w) => pack_floats(panel, taps, w),
        };
        (weights, starts.pack_clif(&constants(panel.width), channels(panel)))
    })?;
    let share = share(cx, entries.len());
    let walk = Walk::new(problem, &cut, share, operands, entries, functions, None, None);
    cx.walk_step(&name, walk, work, cx.nanoseconds(&work));
    Ok(())
}

/// How threads divide so many panels: as they have divided the input, as each panel only needs its own channels.
fn share(cx: &Lowering, panels: usize) -> Share {
    if panels == 1 { Share::Pixels } else { cx.share_of_operand(0) }
}

fn channels(panel: &Panel) -> Range<usize> {
    panel.first..panel.first + panel.columns
}

/// The entries of all panels; `pack` gives the weights and constants of one.
fn entries(
    cx: &mut Lowering,
    problem: &Problem,
    cut: &Cut,
    classes: &[Class],
    mut pack: impl FnMut(&Panel) -> (Vec<u8>, Vec<u8>),
) -> Result<Vec<PanelEntry>, CodegenError> {
    let mut entries = Vec::with_capacity(cut.panels.len());
    for panel in cut.panels.iter() {
        let (weights, params) = pack(panel);
        entries.push(PanelEntry {
            a: (panel.first * problem.product.element()) as u32,
            weights: cx.weights(&weights, pack::ALIGN)?,
            params: cx.weights(&params, pack::ALIGN)?,
            y: (panel.first * problem.result_bytes) as u32,
            class: class_index(classes, panel),
        });
    }
    Ok(entries)
}

/// Lowers a depthwise convolution to one step of assembled strips, on an input without a border.
#[allow(clippy::too_many_arguments, reason = "all that a step is made of")]
pub(crate) fn lower_strips(
    cx: &mut Lowering,
    problem: &Problem,
    strips: &Strips,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_, '_>,
    work: Work,
) -> Result<(), CodegenError> {
    let isa = cx.options.tier.isa;
    let panels = strip::panels(problem.product, isa, problem.channels);
    let spec = |class: Class, rows: usize, cols: usize| StripSpec {
        product: problem.product,
        isa,
        panel: class.0,
        columns: class.1,
        planned_rows: strips.rows,
        rows,
        cols,
        window: strips.window,
        y_row: problem.y.row,
        y_col: problem.y.col,
        epilogue: epilogue.form(),
    };
    let mut cut =
        Cut { isa, rows: strips.rows, cols: strips.cols, panels: panels.into(), order: Order::PixelsOuter };
    let pixels = cut.panels.first().map_or(0, |p| strips.rows * spec(class_of(p), 1, strips.cols).block());
    let name = kernel_name("dwconv", problem.product, &cut, pixels);
    let classes = classes(&cut);
    let mut functions = Vec::with_capacity(classes.len());
    for &class in &classes {
        functions.push(for_each_part(problem, &cut, |rows, cols| {
            let tile_name = cx.step_name(&format!("{name}_strip_{rows}x{cols}x{}", class.1));
            Ok(cx.strip(&tile_name, spec(class, rows, cols)))
        })?);
    }
    let (starts, mut constant_bytes) = (coefficients.starts, 0);
    let entries = entries(cx, problem, &cut, &classes, |panel| {
        let spec = spec(class_of(panel), strips.rows, strips.cols);
        let weights = match &coefficients.weights {
            Elements::Codes(w) => spec.pack(panel.first, w, strips.padding),
            Elements::Floats(w) => spec.pack(panel.first, w, strips.padding),
        };
        let params = starts.pack(spec.format(), epilogue, channels(panel));
        constant_bytes += weights.len() + params.len();
        (weights, params)
    })?;
    // What is read again for every strip: constants if all panels of a strip follow each other, and otherwise what
    // neighbouring panels share of the rows' cache lines.
    if constant_bytes > strips.rows * problem.a.row {
        cut.order = Order::PanelsOuter;
    }
    let share = share(cx, entries.len());
    let walk = Walk::new(problem, &cut, share, operands, entries, functions, None, None);
    cx.walk_step(&name, walk, work, cx.nanoseconds(&work));
    Ok(())
}

/// Rows of at most [`TILE_COLS`] pixels, all of the same length as nearly as whole blocks allow.
fn cut(problem: &Problem, isa: Isa) -> Cut {
    let tiles = problem.cols.div_ceil(TILE_COLS);
    let cols = problem.cols.div_ceil(tiles).next_multiple_of(PIXELS).min(problem.cols);
    let panels = (0..problem.channels)
        .step_by(WIDTH)
        .map(|first| {
            let columns = (problem.channels - first).min(WIDTH);
            Panel { first, width: columns.next_multiple_of(LANES), columns }
        })
        .collect();
    // All channels of a row, then the next: the rows of the input stay in the first cache.
    Cut { isa, rows: 1, cols, panels, order: Order::PixelsOuter }
}

/// Rows of taps that one multiplication takes.
fn rows_at_once(dot: Dot) -> usize {
    match dot {
        Dot::Vnni | Dot::Bytes => 4,
        Dot::Madd => 2,
        Dot::Fma | Dot::MulAdd => 1,
    }
}

/// Weights in the order of the tile: `[rows of taps][column][vector][channel][row]`, one vector of 16 bytes each;
/// `put` gets channel and tap, or nothing where there is none.
fn pack_in_order(panel: &Panel, taps: &Taps, at_once: usize, mut put: impl FnMut(Option<(usize, usize)>)) {
    for rows in (0..taps.rows).step_by(at_once) {
        for col in 0..taps.cols {
            for channel in 0..panel.width {
                for row in rows..rows + at_once {
                    let exists = channel < panel.columns && row < taps.rows;
                    put(exists.then_some((panel.first + channel, row * taps.cols + col)));
                }
            }
        }
    }
}

fn pack_codes(panel: &Panel, taps: &Taps, dot: Dot, weights: &Weights<'_, i8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_in_order(panel, taps, rows_at_once(dot), |at| {
        let w = at.map_or(0, |(channel, tap)| weights.at(channel, tap, 0));
        match dot {
            Dot::Vnni | Dot::Bytes => bytes.extend(w.to_le_bytes()),
            _ => bytes.extend(i16::from(w).to_le_bytes()),
        }
    });
    bytes
}

fn pack_floats(panel: &Panel, taps: &Taps, weights: &Weights<'_, f32>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_in_order(panel, taps, 1, |at| {
        bytes.extend(at.map_or(0.0, |(channel, tap)| weights.at(channel, tap, 0)).to_le_bytes());
    });
    bytes
}

/// Emits one tile function.
struct Tile<'t> {
    taps: &'t Taps,
    dot: Dot,
    class: Class,
    problem: &'t Problem,
    params: &'t Params<'t>,
}

impl Tile<'_> {
    fn vectors(&self) -> usize {
        self.class.0 / LANES
    }

    /// A loop over blocks of [`PIXELS`], and what is left.
    fn emit(&self, b: &mut FunctionBuilder, cols: usize, arguments: TileArguments) {
        let (blocks, rest) = (cols / PIXELS, cols % PIXELS);
        let mut at = arguments;
        if blocks > 0 {
            let (head, exit) = (b.create_block(), b.create_block());
            for block in [head, exit] {
                for _ in 0..3 {
                    b.append_block_param(block, I64);
                }
            }
            let left = b.append_block_param(head, I64);
            let count = b.ins().iconst(I64, blocks as i64);
            b.ins().jump(head, &[at.a.into(), at.y.into(), at.r.into(), count.into()]);
            b.switch_to_block(head);
            let [a, y, r] = [0, 1, 2].map(|i| b.block_params(head)[i]);
            self.block(b, PIXELS, TileArguments { a, y, r, ..arguments });
            let step_a = (PIXELS * self.problem.a.col) as i64;
            let step_y = (PIXELS * self.problem.y.col) as i64;
            let [a, y, r] = [(a, step_a), (y, step_y), (r, step_y)].map(|(p, s)| b.ins().iadd_imm_s(p, s));
            let left = b.ins().iadd_imm_s(left, -1);
            let more = b.ins().icmp_imm_s(IntCC::NotEqual, left, 0);
            let leaving: [BlockArg; 3] = [a.into(), y.into(), r.into()];
            let again = [a.into(), y.into(), r.into(), left.into()];
            b.ins().brif(more, head, &again, exit, &leaving);
            b.switch_to_block(exit);
            let [a, y, r] = [0, 1, 2].map(|i| b.block_params(exit)[i]);
            at = TileArguments { a, y, r, ..arguments };
        }
        if rest > 0 {
            self.block(b, rest, at);
        }
        b.ins().return_(&[]);
    }

    /// `pixels` neighbouring output pixels.
    fn block(&self, b: &mut FunctionBuilder, pixels: usize, arguments: TileArguments) {
        let (taps, vectors) = (self.taps, self.vectors());
        let TileArguments { a, w, params: p, y, r, g } = arguments;
        let mut finisher = Finisher { b, params: self.params, columns: self.class.1, p, y, r, g };
        let start: Vec<Value> =
            (0..vectors).map(|v| finisher.start(self.dot.accumulator(), v * LANES)).collect();
        let mut sums: Vec<Value> = (0..pixels).flat_map(|_| start.iter().copied()).collect();
        // Input columns, in pixels, that a tap of some output pixel reaches.
        let reach = |pixel: usize, tap: usize| pixel * taps.stride + tap * taps.dilation;
        let columns: BTreeSet<usize> =
            (0..pixels).flat_map(|p| (0..taps.cols).map(move |t| reach(p, t))).collect();
        // Floats of one vector after the other: so the weights of a row of taps stay in registers. Interleaved codes are of
        // all vectors.
        let parts = if self.dot.accumulator() == F32X4 { vectors } else { 1 };
        let ones = splat_i16(finisher.b, 1);
        for part in 0..parts {
            let own = part * vectors / parts..(part + 1) * vectors / parts;
            for (group, first) in (0..taps.rows).step_by(rows_at_once(self.dot)).enumerate() {
                let mut weights = RowOfTaps { tile: self, group, w, loaded: vec![None; taps.cols * vectors] };
                for &column in &columns {
                    let at = (first * taps.row_stride + column * taps.pixel) as i32;
                    let inputs = self.load(finisher.b, a, at, taps.rows - first, own.clone());
                    for (pixel, sums) in sums.chunks_mut(vectors).enumerate() {
                        for tap in (0..taps.cols).filter(|&t| reach(pixel, t) == column) {
                            for (&x, v) in inputs.iter().zip(own.clone()) {
                                let weight = weights.get(finisher.b, tap, v);
                                sums[v] = self.multiply(finisher.b, x, weight, ones, sums[v]);
                            }
                        }
                    }
                }
            }
        }
        let done: Vec<Accumulator> = sums
            .iter()
            .enumerate()
            .map(|(i, &value)| {
                let offset = (i / vectors * self.problem.y.col) as i32;
                let channel = i % vectors * LANES;
                Accumulator { value, channel, y_offset: offset, r_offset: offset, g_offset: 0 }
            })
            .collect();
        finisher.finish(&done);
    }

    /// These vectors of one input column, of as many rows as are multiplied at once and exist; of codes all vectors.
    fn load(
        &self,
        b: &mut FunctionBuilder,
        a: Value,
        at: i32,
        rows_left: usize,
        own: Range<usize>,
    ) -> Vec<Value> {
        let row = |i: usize| at + (i * self.taps.row_stride) as i32;
        match self.dot {
            Dot::Fma | Dot::MulAdd => own.map(|v| b.ins().load(F32X4, MEM, a, at + v as i32 * 16)).collect(),
            Dot::Madd => {
                let pairs = match rows_left {
                    1 => {
                        let codes = self.load_codes(b, a, row(0));
                        let words = b.ins().uwiden_low(codes);
                        let low = b.ins().uwiden_low(words);
                        let high = b.ins().uwiden_high(words);
                        [low, high]
                    }
                    _ => {
                        let (r0, r1) = (self.load_codes(b, a, row(0)), self.load_codes(b, a, row(1)));
                        let bytes = interleave_low(b, r0, r1, 1);
                        [b.ins().uwiden_low(bytes), b.ins().uwiden_high(bytes)]
                    }
                };
                pairs[..self.vectors()].iter().map(|&v| cast(b, I16X8, v)).collect()
            }
            Dot::Vnni | Dot::Bytes => {
                let zero = b.func.dfg.constants.insert(ConstantData::from(vec![0; 16]));
                let zero = b.ins().vconst(I8X16, zero);
                let rows = [0, 1, 2, 3].map(|i| match i < rows_left {
                    true => self.load_codes(b, a, row(i)),
                    false => zero,
                });
                let upper = interleave_low(b, rows[0], rows[1], 1);
                let lower = interleave_low(b, rows[2], rows[3], 1);
                let quads = [interleave_low(b, upper, lower, 2), interleave_high_words(b, upper, lower)];
                quads[..self.vectors()].to_vec()
            }
        }
    }

    /// The codes of one pixel: as many as the panel is wide, and anything above. A load of so few would be followed by
    /// instructions that clear the rest.
    fn load_codes(&self, b: &mut FunctionBuilder, a: Value, at: i32) -> Value {
        b.ins().load(I8X16, MEM, a, at)
    }

    /// A sum with the products of one vector of inputs added.
    fn multiply(&self, b: &mut FunctionBuilder, x: Value, weights: Value, ones: Value, sum: Value) -> Value {
        let products = match self.dot {
            Dot::Vnni => return dot_accumulate(b, x, weights, sum),
            Dot::Fma => return b.ins().fma(x, weights, sum),
            Dot::Bytes => multiply_add_bytes(b, x, weights, ones),
            Dot::Madd => multiply_add_pairs(b, x, weights),
            Dot::MulAdd => {
                let product = b.ins().fmul(x, weights);
                return b.ins().fadd(sum, product);
            }
        };
        b.ins().iadd(sum, products)
    }
}

/// The weights of a row of taps, or of as many rows as are multiplied at once.
struct RowOfTaps<'t> {
    tile: &'t Tile<'t>,
    group: usize,
    /// Where the panel's weights lie.
    w: Value,
    /// By tap and vector: those that have been loaded already.
    loaded: Vec<Option<Value>>,
}

impl RowOfTaps<'_> {
    /// Loads a vector when it is first asked for. Floats are kept; the interleaved columns of codes take the registers
    /// for that.
    fn get(&mut self, b: &mut FunctionBuilder, tap: usize, vector: usize) -> Value {
        let (vectors, taps) = (self.tile.vectors(), self.tile.taps.cols);
        let (ty, is_kept) = match self.tile.dot {
            Dot::Vnni | Dot::Bytes => (I8X16, false),
            Dot::Madd => (I16X8, false),
            Dot::Fma | Dot::MulAdd => (F32X4, true),
        };
        let slot = &mut self.loaded[tap * vectors + vector];
        if let Some(kept) = slot.filter(|_| is_kept) {
            return kept;
        }
        let at = ((self.group * taps + tap) * vectors + vector) * 16;
        *slot.insert(b.ins().load(ty, MEM, self.w, at as i32))
    }
}

/// Elements of `size` bytes of the lower halves of two vectors, in turn.
fn interleave_low(b: &mut FunctionBuilder, x: Value, y: Value, size: u8) -> Value {
    interleave(b, x, y, size, 0)
}

/// 16-bit elements of the upper halves of two vectors, in turn.
fn interleave_high_words(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    interleave(b, x, y, 2, 8)
}

fn interleave(b: &mut FunctionBuilder, x: Value, y: Value, size: u8, first: u8) -> Value {
    let elements = (first..first + 8).step_by(size.into());
    let mask: Vec<u8> = elements.flat_map(|at| (at..at + size).chain(at + 16..at + 16 + size)).collect();
    let mask = b.func.dfg.immediates.push(ConstantData::from(mask));
    b.ins().shuffle(x, y, mask)
}
