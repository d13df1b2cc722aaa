//! The step of a dense problem: a microkernel for each kind of tile, what they read, and the walk over the tiles.

use super::{
    Problem, Weights, asm,
    choose::{self, Cut, Panel, Share, Sharing, Tiling},
    clif_epilogue::Params,
    clif_tile::{Dot, TILE_PARAMETERS, TileArguments, emit_tile},
    pack::{self, PanelFormat, ParamLayout},
    repack::{self, SecondOperands},
    spec::{Epilogue, Next, Prefetch, Product, Start, TileSpec},
    walk::{self, Around, LOWER, PARTS, PanelEntry, PartFunctions, RIGHT, Walk},
    widen,
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{FunctionKind, Location},
    shared::PackKey,
    tier::Isa,
};
use cranelift_module::FuncId;
use qcc_ir::{Tensor, ops::Clamp};
use std::ops::Range;

/// Where the operands of a problem live.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// The input, with readable slack behind it if the problem overreads.
    pub(crate) a: Location,
    /// The result.
    pub(crate) y: Location,
    /// The residual, with readable slack behind it.
    pub(crate) r: Option<Location>,
    /// The grids of rows, one behind the other or one for all.
    pub(crate) g: Option<Location>,
    /// The packed weights.
    pub(crate) w: PackedAt,
}

/// Where packed weights lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PackedAt {
    /// Among the model's weights.
    Model,
    /// Where an earlier step has packed them.
    Value(Location),
    /// Among those that models share: which of the ones that this model uses.
    Shared(usize),
}

/// The constants of a problem. Its weights are packed at some time in `'s`.
pub(crate) struct Coefficients<'a, 's> {
    /// The tensor of the weights.
    pub(crate) tensor: &'s Tensor,
    /// The same as the problem reads it.
    pub(crate) weights: Elements<'s>,
    /// What sums start from.
    pub(crate) starts: Starts<'a>,
}

/// The weights of a problem.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'s> {
    /// s8.
    Codes(Weights<'s, i8>),
    /// f32.
    Floats(Weights<'s, f32>),
}

/// What accumulators start from, by channel.
#[derive(Clone, Copy)]
pub(crate) enum Starts<'a> {
    /// bias − z_x·Σw, and the magnitude that no accumulator exceeds.
    Codes(&'a [i32], i64),
    /// The bias.
    Floats(&'a [f32]),
}

impl Starts<'_> {
    /// The magnitude that no accumulator exceeds; 0 for floats, of which nothing depends on it.
    pub(crate) fn reach(self) -> i64 {
        match self {
            Starts::Codes(_, reach) => reach,
            Starts::Floats(_) => 0,
        }
    }

    /// The constants of these channels, as assembled microkernels with this epilogue read them.
    pub(crate) fn pack(self, format: PanelFormat, epilogue: Epilogue<'_>, channels: Range<usize>) -> Vec<u8> {
        match (self, epilogue) {
            (Starts::Codes(starts, _), Epilogue::Requantize(q)) => {
                pack::pack_params(format, Some(q), channels, starts)
            }
            (Starts::Codes(starts, _), Epilogue::Dequantize { dequantizer, .. }) => {
                pack::pack_dequantizer(format, epilogue.form(), dequantizer, channels, starts)
            }
            (Starts::Codes(starts, _), _) => pack::pack_params(format, None, channels, starts),
            (Starts::Floats(bias), Epilogue::Float { clamp, .. }) => {
                pack::pack_bias(format, clamp, channels, bias)
            }
            // A float product has no other epilogue.
            (Starts::Floats(bias), _) => pack::pack_bias(format, Clamp::NONE, channels, bias),
        }
    }

    /// The constants of these channels, as Cranelift's microkernels read them.
    pub(crate) fn pack_clif(self, params: &Params<'_>, channels: Range<usize>) -> Vec<u8> {
        match self {
            Starts::Codes(starts, _) => params.pack(channels, starts),
            Starts::Floats(bias) => params.pack_float(channels, bias),
        }
    }
}

/// Lowers a problem to one step.
pub(crate) fn lower<'s>(
    cx: &mut Lowering<'_, 's>,
    kernel: &str,
    problem: &Problem,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_, 's>,
    work: Work,
) -> Result<(), CodegenError> {
    let (problem, a) = &as_tiles_read_it(cx, problem, operands.a)?;
    let operands = Operands { a: *a, ..operands };
    let (weights, residual) = (cx.constant_bytes(), operands.r.is_some());
    let starts = (coefficients.starts, Start::Params);
    let tiles = Tiles::define(cx, kernel, problem, epilogue, starts, weights, residual)?;
    let Some(tiles) = tiles else { return Ok(()) };
    let (w, panels) = tiles.pack_all(cx, coefficients)?;
    tiles.step(cx, Operands { w, ..operands }, panels, work)
}

/// The functions that configure matrix registers of `rows` rows and release them; `None` for 0.
fn around(cx: &mut Lowering, name: &str, rows: usize) -> Option<Around<FuncId>> {
    if rows == 0 {
        return None;
    }
    let [enter, leave] = ["enter", "leave"].map(|part| cx.step_name(&format!("{name}_{part}")));
    let enter = cx.define_assembled(&enter, 0, move || asm::emit_enter(rows));
    Some(Around { enter, leave: cx.define_assembled(&leave, 0, asm::emit_leave) })
}

/// The problem on its input in the form that the tier's tiles read, and where that lies.
fn as_tiles_read_it(
    cx: &mut Lowering,
    problem: &Problem,
    a: Location,
) -> Result<(Problem, Location), CodegenError> {
    let (a, times) = widened(cx, problem.product, a, problem.reach())?;
    Ok((problem.with_wider_input(times), a))
}

/// Activations in the form that the tier's tiles read, and how many times wider they are.
fn widened(
    cx: &mut Lowering,
    product: Product,
    a: Location,
    bytes: usize,
) -> Result<(Location, usize), CodegenError> {
    // The same for every panel.
    let format = PanelFormat::new(product, cx.options.tier.isa, 0);
    match format.activation_bytes() / product.element() {
        1 => Ok((a, 1)),
        times => Ok((widen::lower(cx, a, bytes)?, times)),
    }
}

/// The cut of a problem, and all that there were to choose from. `weights` bytes are read between two uses of its own.
fn cut(cx: &mut Lowering, problem: &Problem, weights: usize) -> Option<(Cut, Vec<Tiling>)> {
    let cuts = cx.candidates(problem, weights);
    let tilings: Vec<Tiling> = cuts.iter().map(Cut::tiling).collect();
    let wanted = cx.wanted_tiling().and_then(|t| tilings.iter().position(|&own| own == t));
    cuts.get(wanted.unwrap_or(0)).map(|cut| (cut.clone(), tilings))
}

/// One matrix product of a batch: byte offsets of its first operand and of its result, and the matrix that is its
/// second operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) a: usize,
    pub(crate) matrix: usize,
    pub(crate) y: usize,
}

/// Lowers a problem, whose groups are the products of a batch, to steps that pack the second operands and one that
/// multiplies. The first operands are `a_elements` in all.
#[allow(clippy::too_many_arguments, reason = "all that the steps are made of")]
pub(crate) fn lower_pairs(
    cx: &mut Lowering,
    problem: &Problem,
    epilogue: Epilogue<'_>,
    operands: Operands,
    a_elements: usize,
    b: &SecondOperands,
    pairs: &[Pair],
    starts: Starts<'_>,
    work: Work,
) -> Result<(), CodegenError> {
    let further = b.further_runs();
    let run_padding = problem.run.next_multiple_of(problem.product.group()) - problem.run;
    let (a, times) = widened(cx, problem.product, operands.a, a_elements + run_padding)?;
    let mut problem = problem.with_wider_input(times);
    if !further.is_empty() {
        // Each run is over the same activations.
        problem.loops = vec![(1 + further.len() as u32, 0)];
    }
    let operands = Operands { a, ..operands };
    let weights = b.matrices() * problem.runs() * problem.run * problem.channels * problem.product.element();
    let residual = operands.r.is_some();
    let start = if b.zero_points.is_some() { Start::Weights } else { Start::Params };
    let tiles = Tiles::define(cx, "gemm", &problem, epilogue, (starts, start), weights, residual)?;
    let Some(tiles) = tiles else { return Ok(()) };
    // All products share the constants.
    let params: Vec<Vec<u8>> = tiles.cut.panels.iter().map(|p| tiles.params_of(0, p)).collect();
    let packed = repack::pack(cx, tiles.cut.isa, &tiles.cut.panels, &params, b, problem.run)?;
    let offsets: Vec<u32> = params.iter().map(|p| cx.weights(p, pack::ALIGN)).collect::<Result<_, _>>()?;
    let mut entries = Vec::with_capacity(pairs.len() * tiles.cut.panels.len());
    for pair in pairs {
        for (i, panel) in tiles.cut.panels.iter().enumerate() {
            entries.push(PanelEntry {
                a: (pair.a * times) as u32,
                weights: (pair.matrix * packed.matrix_bytes + packed.panels[i]) as u32,
                params: offsets[i],
                y: (pair.y + panel.first * problem.result_bytes) as u32,
                class: class_index(&tiles.classes, panel),
            });
        }
    }
    tiles.step(cx, Operands { w: PackedAt::Value(packed.location), ..operands }, entries, work)
}

/// The functions and panels of a dense problem before its code is placed.
pub(crate) type PendingWalk = Walk<FuncId, FuncId>;

/// The functions of one class: `define(rows, cols)` for the extents of the blocks in each part of the image.
pub(crate) fn for_each_part(
    problem: &Problem,
    cut: &Cut,
    mut define: impl FnMut(usize, usize) -> Result<FuncId, CodegenError>,
) -> Result<PartFunctions<FuncId>, CodegenError> {
    let mut functions = [None; PARTS];
    for (part, function) in functions.iter_mut().enumerate() {
        let rows = extent(problem.rows, cut.rows, part & LOWER != 0);
        let cols = extent(problem.cols, cut.cols, part & RIGHT != 0);
        if rows * cols > 0 {
            *function = Some(define(rows, cols)?);
        }
    }
    Ok(functions)
}

/// After XNNPACK: types, kernel, pixels × channels, elements of K in a step, instructions.
pub(crate) fn kernel_name(kernel: &str, product: Product, cut: &Cut, pixels: usize) -> String {
    let width = cut.panels.first().map_or(0, |p| p.width);
    let (isa, shape) = (cut.isa, format!("{kernel}_{pixels}x{width}"));
    let format = PanelFormat::new(product, isa, width);
    let step = product.group() * format.step_groups();
    match product {
        Product::U8S8 => format!("qu8qs8_{shape}c{step}__{isa}"),
        Product::U8S7 => format!("qu8qs7_{shape}c{step}__{isa}"),
        Product::F32 => format!("f32_{shape}__{isa}"),
    }
}

/// A kind of panel: all panels of one kind share their tile functions.
pub(crate) type Class = (usize, usize);

pub(crate) fn class_of(panel: &Panel) -> Class {
    (panel.width, panel.columns)
}

/// The kinds of panels, in the order in which they appear.
pub(crate) fn classes(cut: &Cut) -> Vec<Class> {
    let mut classes: Vec<Class> = Vec::new();
    for class in cut.panels.iter().map(class_of) {
        if !classes.contains(&class) {
            classes.push(class);
        }
    }
    classes
}

/// The index of a panel's kind.
pub(crate) fn class_index(classes: &[Class], panel: &Panel) -> u32 {
    classes.iter().position(|&c| c == class_of(panel)).unwrap_or(0) as u32
}

/// The microkernels of a problem, as it is cut.
struct Tiles<'t, 'a> {
    problem: &'t Problem,
    epilogue: Epilogue<'a>,
    starts: Starts<'a>,
    /// Where tiles find them.
    start: Start,
    cut: Cut,
    /// All cuts that there were to choose from.
    tilings: Vec<Tiling>,
    /// How threads divide them.
    share: Share,
    /// Bytes of weights that are read between two uses of its own.
    weights: usize,
    name: String,
    classes: Vec<Class>,
    /// By class.
    functions: Vec<PartFunctions<FuncId>>,
}

impl<'t, 'a> Tiles<'t, 'a> {
    /// Cuts a problem and emits its functions; `None` where there is nothing to cut. `weights` bytes are read between
    /// two uses of its own.
    fn define(
        cx: &mut Lowering,
        kernel: &str,
        problem: &'t Problem,
        epilogue: Epilogue<'a>,
        (starts, start): (Starts<'a>, Start),
        weights: usize,
        residual: bool,
    ) -> Result<Option<Tiles<'t, 'a>>, CodegenError> {
        let Some((cut, tilings)) = cut(cx, problem, weights) else { return Ok(None) };
        let sharing = Sharing {
            input: cx.share_of_operand(0),
            residual: residual.then(|| cx.share_of_residual()),
            reads_all_channels: problem.groups == 1,
            weights,
        };
        let share = choose::share(problem, &cut, &sharing);
        let prefetch = choose::prefetch(problem, &cut, share, weights, residual);
        let name = kernel_name(kernel, problem.product, &cut, cut.rows * cut.cols);
        let classes = classes(&cut);
        let mut tiles = Tiles {
            problem,
            epilogue,
            starts,
            start,
            cut,
            tilings,
            share,
            weights,
            name,
            classes,
            functions: Vec::new(),
        };
        for &class in &tiles.classes {
            let of_class = for_each_part(problem, &tiles.cut, |rows, cols| {
                let spec = tiles.spec(class, [rows, cols], prefetch, residual);
                let name = cx.step_name(&format!("{}_tile_{rows}x{cols}x{}", tiles.name, class.1));
                tiles.emit(cx, &name, spec)
            })?;
            tiles.functions.push(of_class);
        }
        Ok(Some(tiles))
    }

    /// The tile of a block of pixels by a panel of a class.
    fn spec(
        &self,
        (width, columns): Class,
        [rows, cols]: [usize; 2],
        prefetch: Prefetch,
        residual: bool,
    ) -> TileSpec {
        let p = self.problem;
        let offsets = |row: usize, col: usize| -> Vec<i32> {
            (0..rows * cols).map(|i| (i / cols * row + i % cols * col) as i32).collect()
        };
        TileSpec {
            product: p.product,
            panel: width,
            columns,
            a_offsets: offsets(p.a.row, p.a.col),
            r_offsets: if residual { offsets(p.r.row, p.r.col) } else { Vec::new() },
            g_offsets: match self.epilogue.form().grids().has_scales() {
                true => offsets(p.g.row, p.g.col),
                false => Vec::new(),
            },
            y_offsets: offsets(p.y.row, p.y.col),
            loops: p.loops.clone(),
            inner: self.format(width).run_groups(p.run) as u32,
            start: self.start,
            epilogue: self.epilogue.form(),
            prefetch,
            configured: self.cut.configured(),
            next: self.next((width, columns)),
        }
    }

    /// Where the next tile of a run is, if tiles make runs: those of matrix registers whose sums are short.
    fn next(&self, (width, columns): Class) -> Option<Next> {
        let (p, format) = (self.problem, self.format(width));
        let steps = choose::k_groups(p, self.cut.isa) / format.step_groups();
        if self.cut.isa != Isa::AmxInt8 || steps > asm::MOST_STEPS || self.start != Start::Params {
            return None;
        }
        let bytes = |n: usize| i32::try_from(n).ok();
        if let Some([a, y, r, g]) = walk::pixels_to_next(p, &self.cut) {
            let [a, y, r, g] = [bytes(a)?, bytes(y)?, bytes(r)?, bytes(g)?];
            return Some(Next { a, y, r, g, w: 0, params: 0 });
        }
        // Panels of one kind, one behind the other.
        let weights = pack::packed_bytes(format, columns, p.runs(), p.run).next_multiple_of(pack::ALIGN);
        let params = ParamLayout::new(format, self.epilogue.form()).size;
        let columns = bytes(columns * p.result_bytes)?;
        Some(Next { a: 0, w: bytes(weights)?, params: bytes(params)?, y: columns, r: columns, g: 0 })
    }

    fn emit(&self, cx: &mut Lowering, name: &str, spec: TileSpec) -> Result<FuncId, CodegenError> {
        let isa = self.cut.isa;
        let Some(dot) = Dot::of_isa(spec.product, isa) else { return Ok(cx.tile(name, isa, spec)) };
        cx.define_function(name, FunctionKind::Tile, TILE_PARAMETERS, |e| {
            let constants = Params::new(self.epilogue, spec.panel, self.starts.reach());
            let arguments = TileArguments::of(&e.params);
            emit_tile(&mut e.b, &spec, dot, &constants, arguments);
            Ok(())
        })
    }

    /// Adds the step that walks over the tiles.
    fn step(
        self,
        cx: &mut Lowering,
        operands: Operands,
        panels: Vec<PanelEntry>,
        work: Work,
    ) -> Result<(), CodegenError> {
        let around = around(cx, &self.name, self.cut.configured());
        let next = self.classes.first().and_then(|class| self.next(*class));
        let (problem, cut) = (self.problem, &self.cut);
        let walk = Walk::new(problem, cut, self.share, operands, panels, self.functions, next, around);
        let nanoseconds = choose::nanoseconds(self.problem, &self.cut, self.weights);
        cx.walk_step(&self.name, walk, work, nanoseconds);
        cx.offer_tilings(self.tilings);
        Ok(())
    }

    /// How the tiles want panels of this width.
    fn format(&self, panel: usize) -> PanelFormat {
        PanelFormat::new(self.problem.product, self.cut.isa, panel).with_results(self.epilogue.form())
    }

    /// The channels of a panel, counted over all groups.
    fn channels(&self, group: usize, panel: &Panel) -> Range<usize> {
        let first = group * self.problem.channels + panel.first;
        first..first + panel.columns
    }

    /// Byte offset of a panel's channels in a pixel of the result.
    fn result_offset(&self, group: usize, panel: &Panel) -> u32 {
        (group * self.problem.y.group + panel.first * self.problem.result_bytes) as u32
    }

    /// Packs every panel of every group.
    fn pack_all<'s>(
        &self,
        cx: &mut Lowering<'_, 's>,
        coefficients: &Coefficients<'_, 's>,
    ) -> Result<(PackedAt, Vec<PanelEntry>), CodegenError> {
        let (p, cut) = (self.problem, &self.cut);
        let panels: Vec<(usize, &Panel)> =
            (0..p.groups).flat_map(|group| cut.panels.iter().map(move |panel| (group, panel))).collect();
        let (at, weights) = self.pack_weights(cx, coefficients, &panels)?;
        let mut entries = Vec::with_capacity(panels.len());
        for ((group, panel), weights) in panels.into_iter().zip(weights) {
            entries.push(PanelEntry {
                a: (group * p.a.group) as u32,
                weights,
                params: self.pack_params(cx, group, panel)?,
                y: self.result_offset(group, panel),
                class: class_index(&self.classes, panel),
            });
        }
        Ok((at, entries))
    }

    /// The packed weights of these panels of groups, and the offsets of each.
    fn pack_weights<'s>(
        &self,
        cx: &mut Lowering<'_, 's>,
        coefficients: &Coefficients<'_, 's>,
        panels: &[(usize, &Panel)],
    ) -> Result<(PackedAt, Vec<u32>), CodegenError> {
        let (runs, run) = (self.problem.runs(), self.problem.run);
        let parts: Vec<(PanelFormat, Range<usize>)> = panels
            .iter()
            .map(|&(group, panel)| (self.format(panel.width), self.channels(group, panel)))
            .collect();
        let size = |(format, channels): &(PanelFormat, Range<usize>)| {
            pack::packed_bytes(*format, channels.len(), runs, run)
        };
        let sizes: Vec<usize> = parts.iter().map(size).collect();
        let tensor = coefficients.tensor;
        let all = parts.clone();
        let key = |order| move || PackKey::new(tensor.bytes(), order, all, runs, run);
        match coefficients.weights {
            Elements::Codes(weights) => cx.packed(tensor, key(weights.order), &sizes, move |i, bytes| {
                let (format, channels) = parts[i].clone();
                pack::pack_weights_into(format, channels, runs, run, bytes, &weights);
            }),
            Elements::Floats(weights) => cx.packed(tensor, key(weights.order), &sizes, move |i, bytes| {
                let (format, channels) = parts[i].clone();
                pack::pack_weights_into(format, channels, runs, run, bytes, &weights);
            }),
        }
    }

    /// Offset of one panel's constants.
    fn pack_params(&self, cx: &mut Lowering, group: usize, panel: &Panel) -> Result<u32, CodegenError> {
        cx.weights(&self.params_of(group, panel), pack::ALIGN)
    }

    /// One panel's constants. Those that accumulators start from come first.
    fn params_of(&self, group: usize, panel: &Panel) -> Vec<u8> {
        let (format, channels) = (self.format(panel.width), self.channels(group, panel));
        match Dot::of_isa(format.product, format.isa) {
            Some(_) => {
                let constants = Params::new(self.epilogue, format.panel, self.starts.reach());
                self.starts.pack_clif(&constants, channels)
            }
            None => self.starts.pack(format, self.epilogue, channels),
        }
    }
}

/// Extent of a block inside or at the end of an image; 0 where there is none.
fn extent(all: usize, block: usize, at_end: bool) -> usize {
    match at_end {
        true => all % block,
        false => {
            if all < block {
                0
            } else {
                block
            }
        }
    }
}
