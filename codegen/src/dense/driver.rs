//! The step of a dense problem: it walks tiles and calls a microkernel for each.
//!
//! A unit is one tile. Its index is taken apart once, at the start of a thread's range; from then on counters and
//! addresses are carried from tile to tile.

use super::{
    Problem, Weights, asm,
    choose::{self, Cut, Order, Panel},
    clif_epilogue::Params,
    clif_tile::{Dot, TILE_PARAMETERS, TileArguments, emit_tile},
    pack::{self, PanelFormat},
    spec::{Epilogue, Product, TileSpec},
};
use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::{Emitter, FunctionKind, Location, MEM},
};
use cranelift_codegen::ir::{Block, BlockArg, InstBuilder, Value, condcodes::IntCC, types::I64};
use cranelift_frontend::Switch;
use cranelift_module::FuncId;
use qcc_ir::ops::Clamp;
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
}

/// The constants of a problem.
pub(crate) enum Coefficients<'a> {
    /// s8 weights, what the accumulators start at (bias − z_x·Σw), and the magnitude that none of them exceeds.
    Codes(Weights<'a, i8>, &'a [i32], i64),
    /// f32 weights and bias.
    Floats(Weights<'a, f32>, &'a [f32]),
}

impl Coefficients<'_> {
    /// The magnitude that no accumulator exceeds; 0 for floats, of which nothing depends on it.
    pub(crate) fn reach(&self) -> i64 {
        match self {
            Coefficients::Codes(_, _, reach) => *reach,
            Coefficients::Floats(..) => 0,
        }
    }
}

/// One tile function for each part of the image: interior, right edge, lower edge, corner.
const PARTS: usize = 4;
const RIGHT: usize = 1;
const LOWER: usize = 2;

/// The tile functions of one kind of panel, for the parts of the image that exist.
pub(crate) type PartFunctions = [Option<FuncId>; PARTS];

/// One panel of one group: what its tiles add to the addresses of a block, and which functions compute them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelEntry {
    /// Byte offset of its channels in a pixel of the input.
    pub(crate) a: u32,
    /// Offsets of its weights and constants in the model's weights.
    pub(crate) weights: u32,
    /// Constants.
    pub(crate) params: u32,
    /// Byte offset of its channels in a pixel of the result.
    pub(crate) y: u32,
    /// Index of its functions.
    pub(crate) class: u32,
}

impl PanelEntry {
    /// Bytes in the table that the walk reads: five words and padding.
    const BYTES: usize = 32;

    fn write(self, table: &mut Vec<u8>) {
        for word in [self.a, self.weights, self.params, self.y, self.class, 0, 0, 0] {
            table.extend(word.to_le_bytes());
        }
    }
}

/// Lowers a problem to one step.
pub(crate) fn lower(
    cx: &mut Lowering,
    kernel: &str,
    problem: &Problem,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_>,
    work: Work,
) -> Result<(), CodegenError> {
    let cut = choose::choose(problem, cx.options.tier);
    let name = kernel_name(kernel, problem.product, &cut, cut.rows * cut.cols);
    let residual = operands.r.is_some();
    let mut tiles = Tiles { cx, problem, epilogue, cut: &cut, name: &name, residual, coefficients };
    let classes = classes(&cut);
    let functions = classes.iter().map(|&c| tiles.define(c)).collect::<Result<Vec<_>, _>>()?;
    let entries = tiles.pack_all(&classes)?;
    step(cx, &name, problem, &cut, operands, &functions, &entries, work)
}

/// Adds the step that calls `functions` for every tile of a cut. The entries are those of all panels of all groups.
#[allow(clippy::too_many_arguments, reason = "all that a step is made of")]
pub(crate) fn step(
    cx: &mut Lowering,
    name: &str,
    problem: &Problem,
    cut: &Cut,
    operands: Operands,
    functions: &[PartFunctions],
    entries: &[PanelEntry],
    work: Work,
) -> Result<(), CodegenError> {
    let mut table = Vec::with_capacity(entries.len() * PanelEntry::BYTES);
    entries.iter().for_each(|e| e.write(&mut table));
    let table = cx.weights(&table, PanelEntry::BYTES)?;
    let walk = Walk::new(problem, cut, entries.len());
    cx.step(name, walk.units(), work, |e, ctx, begin, end| {
        walk.emit(e, operands, table, functions, ctx, begin, end);
        Ok(())
    })
}

/// The functions of one class: `define(rows, cols)` for the extents of the blocks in each part of the image.
pub(crate) fn for_each_part(
    problem: &Problem,
    cut: &Cut,
    mut define: impl FnMut(usize, usize) -> Result<FuncId, CodegenError>,
) -> Result<PartFunctions, CodegenError> {
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
    match product {
        Product::U8S8 => {
            let format = PanelFormat { product, isa, panel: width };
            format!("qu8qs8_{shape}c{}__{isa}", product.group() * format.step_groups())
        }
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

/// Makes the tile functions and packs what they read.
struct Tiles<'t, 'g, 'a> {
    cx: &'t mut Lowering<'g>,
    problem: &'t Problem,
    epilogue: Epilogue<'a>,
    cut: &'t Cut,
    name: &'t str,
    residual: bool,
    coefficients: &'t Coefficients<'t>,
}

impl Tiles<'_, '_, '_> {
    /// The functions of a class.
    fn define(&mut self, class: Class) -> Result<PartFunctions, CodegenError> {
        for_each_part(self.problem, self.cut, |rows, cols| self.define_tile(class, rows, cols))
    }

    fn define_tile(
        &mut self,
        (width, columns): Class,
        rows: usize,
        cols: usize,
    ) -> Result<FuncId, CodegenError> {
        let p = self.problem;
        let offsets = |row: usize, col: usize| -> Vec<i32> {
            (0..rows * cols).map(|i| (i / cols * row + i % cols * col) as i32).collect()
        };
        let y_offsets = offsets(p.y.row, p.y.col);
        let spec = TileSpec {
            product: p.product,
            panel: width,
            columns,
            a_offsets: offsets(p.a.row, p.a.col),
            r_offsets: if self.residual { y_offsets.clone() } else { Vec::new() },
            y_offsets,
            loops: p.loops.clone(),
            inner: self.format(width).run_groups(p.run) as u32,
            epilogue: self.epilogue,
            configured: 0,
        };
        let name = self.cx.step_name(&format!("{}_tile_{rows}x{cols}x{columns}", self.name));
        let isa = self.cut.isa;
        let Some(dot) = Dot::of_isa(p.product, isa) else {
            let code = asm::emit_tile(isa, &spec)
                .map_err(|e| CodegenError::Backend { function: name.clone(), reason: e.to_string() })?;
            return self.cx.define_bytes(&name, TILE_PARAMETERS, &code);
        };
        let reach = self.coefficients.reach();
        self.cx.define_function(&name, FunctionKind::Tile, TILE_PARAMETERS, |e| {
            let constants = Params::new(spec.epilogue, spec.panel, reach);
            let arguments = TileArguments::of(&e.params);
            emit_tile(&mut e.b, &spec, dot, &constants, arguments);
            Ok(())
        })
    }

    /// How the tiles want panels of this width.
    fn format(&self, panel: usize) -> PanelFormat {
        PanelFormat { product: self.problem.product, isa: self.cut.isa, panel }
    }

    /// Packs every panel of every group.
    fn pack_all(&mut self, classes: &[Class]) -> Result<Vec<PanelEntry>, CodegenError> {
        let (p, cut) = (self.problem, self.cut);
        let mut entries = Vec::with_capacity(p.groups * cut.panels.len());
        for group in 0..p.groups {
            for panel in &cut.panels {
                let (weights, params) = self.pack(group, panel)?;
                let class = classes.iter().position(|&c| c == class_of(panel)).unwrap_or(0);
                let y = group * p.y.group + panel.first * p.product.element();
                let a = group * p.a.group;
                entries.push(PanelEntry { a: a as u32, weights, params, y: y as u32, class: class as u32 });
            }
        }
        Ok(entries)
    }

    /// Offsets of one panel's weights and constants.
    fn pack(&mut self, group: usize, panel: &Panel) -> Result<(u32, u32), CodegenError> {
        let p = self.problem;
        let first = group * p.channels + panel.first;
        let channels = first..first + panel.columns;
        let format = self.format(panel.width);
        let runs = p.runs();
        let (weights, params) = match self.coefficients {
            Coefficients::Codes(weights, start, _) => (
                pack::pack_weights(format, channels.clone(), runs, p.run, |c, r, i| weights.at(c, r, i)),
                self.pack_code_params(format, channels, start),
            ),
            Coefficients::Floats(weights, bias) => (
                pack::pack_weights(format, channels.clone(), runs, p.run, |c, r, i| weights.at(c, r, i)),
                self.pack_float_params(format, channels, bias),
            ),
        };
        Ok((self.cx.weights(&weights, pack::ALIGN)?, self.cx.weights(&params, pack::ALIGN)?))
    }

    /// The constants of Cranelift's tiles; `None` where the tier's tiles are assembled.
    fn clif_params(&self, format: PanelFormat) -> Option<Params<'_>> {
        Dot::of_isa(format.product, format.isa)
            .map(|_| Params::new(self.epilogue, format.panel, self.coefficients.reach()))
    }

    fn pack_code_params(&self, format: PanelFormat, channels: Range<usize>, start: &[i32]) -> Vec<u8> {
        match (self.clif_params(format), self.epilogue) {
            (Some(params), _) => params.pack(channels, start),
            (None, Epilogue::Requantize(q)) => pack::pack_params(format, Some(q), channels, start),
            (None, _) => pack::pack_params(format, None, channels, start),
        }
    }

    fn pack_float_params(&self, format: PanelFormat, channels: Range<usize>, bias: &[f32]) -> Vec<u8> {
        match (self.clif_params(format), self.epilogue) {
            (Some(params), _) => params.pack_float(channels, bias),
            (None, Epilogue::Float { clamp, .. }) => pack::pack_bias(format, clamp, channels, bias),
            // A float product has no other epilogue.
            (None, _) => pack::pack_bias(format, Clamp::NONE, channels, bias),
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

/// One level of the walk.
#[derive(Clone, Copy, Debug)]
struct Level {
    count: usize,
    /// Bytes from one index to the next, in input and result.
    a: usize,
    y: usize,
}

/// The four nested loops over images, rows and columns of blocks, and panels, as one range of units.
struct Walk {
    /// The outermost first.
    levels: [Level; 4],
    /// Which level is which.
    row: usize,
    col: usize,
    panel: usize,
    /// Index of the last row and column of blocks if it is a smaller one.
    lower_edge: Option<usize>,
    right_edge: Option<usize>,
}

impl Walk {
    fn new(p: &Problem, cut: &Cut, panels: usize) -> Walk {
        let images = Level { count: p.images, a: p.a.image, y: p.y.image };
        let rows = Level { count: p.rows.div_ceil(cut.rows), a: p.a.row * cut.rows, y: p.y.row * cut.rows };
        let cols = Level { count: p.cols.div_ceil(cut.cols), a: p.a.col * cut.cols, y: p.y.col * cut.cols };
        // What panels add to addresses stands in their table.
        let panels = Level { count: panels, a: 0, y: 0 };
        let edge = |extent: usize, block: usize| (!extent.is_multiple_of(block)).then_some(extent / block);
        let (levels, row, col, panel) = match cut.order {
            Order::PanelsOuter => ([panels, images, rows, cols], 2, 3, 0),
            Order::PixelsOuter => ([images, rows, cols, panels], 1, 2, 3),
        };
        Walk {
            levels,
            row,
            col,
            panel,
            lower_edge: edge(p.rows, cut.rows),
            right_edge: edge(p.cols, cut.cols),
        }
    }

    fn units(&self) -> u64 {
        self.levels.iter().map(|l| l.count as u64).product()
    }

    #[allow(clippy::too_many_arguments, reason = "the step's parameters and what it refers to")]
    fn emit(
        &self,
        e: &mut Emitter,
        operands: Operands,
        table: u32,
        functions: &[PartFunctions],
        ctx: Value,
        begin: Value,
        end: Value,
    ) {
        let bases = Bases {
            a: e.address(ctx, operands.a),
            y: e.address(ctx, operands.y),
            r: operands.r.map(|r| e.address(ctx, r)),
            table: e.address(ctx, Location::Weights(table)),
            weights: e.address(ctx, Location::Weights(0)),
        };
        let (header, next, exit) = (e.b.create_block(), e.b.create_block(), e.b.create_block());
        let start = self.decode(e, begin);
        e.b.ins().jump(header, &start.arguments());
        for _ in 0..State::VALUES {
            e.b.append_block_param(header, I64);
        }
        e.b.switch_to_block(header);
        let state = State::of(e.b.block_params(header));
        self.call(e, &bases, functions, &state, next);
        e.b.switch_to_block(next);
        let unit = e.b.ins().iadd_imm_s(state.unit, 1);
        let more = e.b.ins().icmp(IntCC::UnsignedLessThan, unit, end);
        let carry = e.b.create_block();
        e.b.ins().brif(more, carry, &[], exit, &[]);
        e.b.switch_to_block(carry);
        self.carry(e, State { unit, ..state }, header);
        e.b.switch_to_block(exit);
    }

    /// The indices and byte offsets of a unit.
    fn decode(&self, e: &mut Emitter, unit: Value) -> State {
        let zero = e.b.ins().iconst(I64, 0);
        let (mut rest, mut index, mut a, mut y) = (unit, [zero; 4], zero, zero);
        for (slot, level) in index.iter_mut().zip(&self.levels).rev() {
            if level.count > 1 {
                *slot = e.b.ins().urem_imm_u(rest, level.count as i64);
                rest = e.b.ins().udiv_imm_u(rest, level.count as i64);
                let (step_a, step_y) = (
                    e.b.ins().imul_imm_s(*slot, level.a as i64),
                    e.b.ins().imul_imm_s(*slot, level.y as i64),
                );
                a = e.b.ins().iadd(a, step_a);
                y = e.b.ins().iadd(y, step_y);
            }
        }
        State { unit, a, y, index }
    }

    /// Loads the panel's entry, picks the function of the tile and calls it; goes on at `next`.
    fn call(&self, e: &mut Emitter, bases: &Bases, functions: &[PartFunctions], state: &State, next: Block) {
        let entry = e.b.ins().imul_imm_s(state.index[self.panel], PanelEntry::BYTES as i64);
        let entry = e.b.ins().iadd(bases.table, entry);
        let [a, w, params, y, class] = [0, 1, 2, 3, 4].map(|i| e.b.ins().uload32(MEM, entry, i * 4));
        let a = e.b.ins().iadd(a, state.a);
        let y = e.b.ins().iadd(y, state.y);
        let r = bases.r.map(|base| e.b.ins().iadd(base, y));
        let [a, y] = [(a, bases.a), (y, bases.y)].map(|(offset, base)| e.b.ins().iadd(base, offset));
        let [w, params] = [w, params].map(|offset| e.b.ins().iadd(bases.weights, offset));
        let arguments = [a, w, params, y, r.unwrap_or(y)];
        let all: Vec<(usize, FuncId)> =
            functions.iter().flatten().enumerate().filter_map(|(i, f)| f.map(|f| (i, f))).collect();
        if let [(_, only)] = all[..] {
            e.call(only, &arguments);
            e.b.ins().jump(next, &[]);
            return;
        }
        let mut kind = e.b.ins().imul_imm_s(class, PARTS as i64);
        let edges = [(self.lower_edge, self.row, LOWER), (self.right_edge, self.col, RIGHT)];
        for (edge, level, part) in edges {
            let Some(last) = edge else { continue };
            let is_edge = e.b.ins().icmp_imm_s(IntCC::Equal, state.index[level], last as i64);
            let wide = e.b.ins().uextend(I64, is_edge);
            let bits = e.b.ins().imul_imm_s(wide, part as i64);
            kind = e.b.ins().iadd(kind, bits);
        }
        let mut switch = Switch::new();
        let blocks: Vec<(Block, FuncId)> = all
            .into_iter()
            .map(|(i, f)| {
                let block = e.b.create_block();
                switch.set_entry(i as u128, block);
                (block, f)
            })
            .collect();
        // Every kind that occurs has a function.
        switch.emit(&mut e.b, kind, next);
        for (block, function) in blocks {
            e.b.switch_to_block(block);
            e.call(function, &arguments);
            e.b.ins().jump(next, &[]);
        }
    }

    /// Counts up the innermost index, and the next outer one where it is at its end, and so on.
    fn carry(&self, e: &mut Emitter, state: State, header: Block) {
        let zero = e.b.ins().iconst(I64, 0);
        let mut state = state;
        let (mut back_a, mut back_y) = (0, 0);
        let levels: Vec<usize> = (0..4).rev().filter(|&l| self.levels[l].count > 1).collect();
        for (i, &l) in levels.iter().enumerate() {
            let level = self.levels[l];
            let stepped = e.b.ins().iadd_imm_s(state.index[l], 1);
            let mut up = state;
            up.index[l] = stepped;
            up.a = e.b.ins().iadd_imm_s(state.a, level.a as i64 - back_a);
            up.y = e.b.ins().iadd_imm_s(state.y, level.y as i64 - back_y);
            if i + 1 == levels.len() {
                e.b.ins().jump(header, &up.arguments());
                return;
            }
            let inside = e.b.ins().icmp_imm_s(IntCC::UnsignedLessThan, stepped, level.count as i64);
            let outer = e.b.create_block();
            e.b.ins().brif(inside, header, &up.arguments(), outer, &[]);
            e.b.switch_to_block(outer);
            state.index[l] = zero;
            back_a += (level.count as i64 - 1) * level.a as i64;
            back_y += (level.count as i64 - 1) * level.y as i64;
        }
        // A single unit: never reached, as there is none behind it.
        e.b.ins().jump(header, &state.arguments());
    }
}

/// Addresses that do not change.
struct Bases {
    a: Value,
    y: Value,
    r: Option<Value>,
    table: Value,
    weights: Value,
}

/// Where the walk is.
#[derive(Clone, Copy)]
struct State {
    unit: Value,
    /// Byte offsets in input and result, without those of the panel.
    a: Value,
    y: Value,
    /// By level.
    index: [Value; 4],
}

impl State {
    const VALUES: usize = 7;

    fn arguments(&self) -> Vec<BlockArg> {
        [self.unit, self.a, self.y].iter().chain(&self.index).map(|&v| v.into()).collect()
    }

    fn of(values: &[Value]) -> State {
        let [unit, a, y, i0, i1, i2, i3] = [0, 1, 2, 3, 4, 5, 6].map(|i| values[i]);
        State { unit, a, y, index: [i0, i1, i2, i3] }
    }
}
