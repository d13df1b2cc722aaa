//! Depthwise strips in machine code; [`strip`](crate::dense::strip) says what they compute and how.
//!
//! Accumulators, parameters and epilogues are those of a dense tile whose pixels are the strip's rows × a block of its
//! columns, row by row.

use super::{
    EmitError, Tile, accumulate, displaced, displacement, store,
    vector::{Assembler, Emit, Operand, Reg, Width},
};
use crate::dense::{
    spec::{Prefetch, Product, Start, TileSpec},
    strip::{Axis, Header, StripSpec, WeightVector},
};
use iced_x86::code_asm::*;

/// Assembles a strip as a position-independent function.
pub(crate) fn emit_strip(spec: &StripSpec) -> Result<Vec<u8>, EmitError> {
    let blocks = Blocks::new(spec);
    let tiles = blocks.lengths().map(|cols| tile_spec(spec, cols)).collect::<Result<Vec<_>, _>>()?;
    let tile = |t| Tile::new(spec.isa, t).map(|tile| Tile { is_strip: true, ..tile });
    let tiles = tiles.iter().map(tile).collect::<Result<Vec<_>, _>>()?;
    let width = tiles.first().ok_or(EmitError::EmptySum)?.width();
    let mut strip = Strip { asm: Assembler::new(width)?, spec };
    match spec.product.is_of_codes() {
        true => strip.codes(&tiles)?,
        false => strip.floats(&blocks, &tiles)?,
    }
    Ok(strip.asm.finish()?)
}

/// The block of `cols` columns of a strip, as a dense tile: what its epilogue needs.
fn tile_spec(spec: &StripSpec, cols: usize) -> Result<TileSpec, EmitError> {
    let pixels = (0..spec.rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
    let y_offsets = pixels
        .map(|(row, col)| i32::try_from(row * spec.y_row + col * spec.y_col))
        .collect::<Result<Vec<i32>, _>>()
        .map_err(|_| EmitError::Displacement)?;
    Ok(TileSpec {
        product: spec.product,
        panel: spec.panel,
        columns: spec.columns,
        a_offsets: vec![0; y_offsets.len()],
        g_offsets: if spec.epilogue.grids().has_scales() { vec![0; y_offsets.len()] } else { Vec::new() },
        r_offsets: if spec.epilogue.has_residual() { y_offsets.clone() } else { Vec::new() },
        y_offsets,
        loops: Vec::new(),
        inner: 1,
        start: Start::Params,
        epilogue: spec.epilogue,
        prefetch: Prefetch::default(),
        configured: 0,
        next: None,
    })
}

/// A run of equal blocks of columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    /// First column.
    first: usize,
    /// Columns of a block.
    cols: usize,
    /// Blocks.
    count: usize,
}

/// The columns of a strip as runs of blocks.
struct Blocks(Vec<Run>);

impl Blocks {
    fn new(spec: &StripSpec) -> Blocks {
        let most = spec.block();
        let mut runs: Vec<Run> = Vec::new();
        for first in (0..spec.cols).step_by(most) {
            let cols = most.min(spec.cols - first);
            // Codes have their border in the scratch line, so all blocks are alike.
            let is_like = |run: &Run| {
                run.cols == cols
                    && (spec.product.is_of_codes()
                        || (spec.is_interior(run.first, cols) && spec.is_interior(first, cols)))
            };
            match runs.last_mut().filter(|run| is_like(run)) {
                Some(run) => run.count += 1,
                None => runs.push(Run { first, cols, count: 1 }),
            }
        }
        Blocks(runs)
    }

    fn lengths(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|run| run.cols)
    }
}

/// The pointers of the rows of a group while it is interleaved.
const ROWS: [AsmRegister64; 4] = [rax, rbx, r10, r11];
/// Bytes on the stack behind the scratch line: the steps of these pointers, and two counts.
const LOCALS: i32 = 64;
const BODY: i32 = 32;
const BEHIND: i32 = 40;
/// Bytes of the stack between touches, at most: the guard page below it must be met before anything under that. Half a
/// page, as alignment lowers the stack once more.
const TOUCH: i32 = 2048;

struct Strip<'a> {
    asm: Assembler,
    spec: &'a StripSpec,
}

impl Strip<'_> {
    fn codes(&mut self, tiles: &[Tile]) -> Result<(), EmitError> {
        let line = self.spec.window[1].span(self.spec.cols) * self.spec.line_column();
        let line = i32::try_from(line).map_err(|_| EmitError::Displacement)?;
        self.enter(line)?;
        self.interleave(line)?;
        if let Some(tile) = tiles.first() {
            accumulate::set_ones(&mut self.asm, tile)?;
        }
        self.asm.asm.mov(rdi, rsp)?;
        let blocks = Blocks::new(self.spec);
        for (run, tile) in blocks.0.iter().zip(tiles) {
            let line_step = run.cols * self.spec.window[1].stride * self.spec.line_column();
            self.repeat(run, line_step, |strip, _| {
                accumulate::start_from_bias(&mut strip.asm, tile)?;
                strip.multiply(tile, run.cols)?;
                store::sums_of_codes(&mut strip.asm, tile)
            })?;
        }
        self.leave()
    }

    /// Emits a run of blocks: `block(self, first column)` leaves rdi, rcx and r8 as they are and r9 alone.
    fn repeat(
        &mut self,
        run: &Run,
        input_step: usize,
        mut block: impl FnMut(&mut Self, usize) -> Result<(), EmitError>,
    ) -> Result<(), EmitError> {
        let mut top = self.asm.asm.create_label();
        if run.count > 1 {
            self.asm.asm.mov(r9d, run.count as u32)?;
            self.asm.asm.set_label(&mut top)?;
        }
        block(self, run.first)?;
        let y_step = run.cols * self.spec.y_col;
        for (pointer, step) in [(rdi, input_step), (rcx, y_step), (r8, y_step)] {
            self.asm.asm.add(pointer, displacement(0, step)?)?;
        }
        if run.count > 1 {
            self.asm.asm.dec(r9d)?;
            self.asm.asm.jne(top)?;
        }
        Ok(())
    }

    /// Makes room for the line at rsp, aligned to a cache line, and for locals behind it.
    fn enter(&mut self, line: i32) -> Emit {
        let asm = &mut self.asm.asm;
        asm.push(rbp)?;
        asm.mov(rbp, rsp)?;
        asm.push(rbx)?;
        asm.push(r12)?;
        asm.push(r13)?;
        asm.push(r14)?;
        let frame = line + LOCALS;
        for _ in 0..frame / TOUCH {
            asm.sub(rsp, TOUCH)?;
            asm.mov(qword_ptr(rsp), rsp)?;
        }
        asm.sub(rsp, frame % TOUCH)?;
        asm.and(rsp, -64)?;
        Ok(())
    }

    fn leave(&mut self) -> Result<(), EmitError> {
        let asm = &mut self.asm.asm;
        asm.lea(rsp, rbp - 32)?;
        asm.pop(r14)?;
        asm.pop(r13)?;
        asm.pop(r12)?;
        asm.pop(rbx)?;
        asm.pop(rbp)?;
        Ok(())
    }

    /// The first phase: fills the line at rsp, whose locals lie at rsp + `line`.
    fn interleave(&mut self, line: i32) -> Result<(), EmitError> {
        let (rows, cols) = (self.spec.window[0], self.spec.window[1]);
        let column = displacement(0, self.spec.line_column())?;
        let vectors = self.spec.line_column() / self.vector_bytes();
        self.first_tap(&rows, &cols)?;
        self.count_columns(line, &cols)?;
        let constants = Constants::load(&mut self.asm, self.spec)?;
        let asm = &mut self.asm.asm;
        // r14d columns in front; rdi moves to the first one inside.
        asm.mov(r13d, r14d)?;
        asm.imul_3(r13d, r13d, vectors as i32)?;
        asm.mov(r12, rsp)?;
        self.fill(constants.padding)?;
        let asm = &mut self.asm.asm;
        asm.imul_3(rax, r14, displacement(0, cols.pitch)?)?;
        asm.add(rdi, rax)?;
        asm.mov(r14, r12)?;
        let groups = self.spec.groups();
        for (i, group) in groups.iter().take(self.spec.read_groups()).enumerate() {
            self.interleave_group(line, i, group, &constants)?;
        }
        let asm = &mut self.asm.asm;
        asm.mov(r13d, dword_ptr(rsp + line + BODY))?;
        asm.imul_3(r13, r13, column)?;
        asm.lea(r12, r14 + r13)?;
        asm.mov(r13d, dword_ptr(rsp + line + BEHIND))?;
        asm.imul_3(r13d, r13d, vectors as i32)?;
        self.fill(constants.padding)
    }

    /// One group of rows, in all columns inside the image; r14 is the first of them in the line.
    fn interleave_group(
        &mut self,
        line: i32,
        index: usize,
        group: &[usize],
        constants: &Constants,
    ) -> Result<(), EmitError> {
        self.point_at_rows(line, group)?;
        let asm = &mut self.asm.asm;
        asm.lea(r12, r14 + displacement(0, index * self.spec.panel * 4)?)?;
        asm.mov(r13d, dword_ptr(rsp + line + BODY))?;
        let (mut top, mut done) = (asm.create_label(), asm.create_label());
        asm.test(r13d, r13d)?;
        asm.je(done)?;
        asm.set_label(&mut top)?;
        self.interleave_column(group.len(), constants)?;
        let asm = &mut self.asm.asm;
        for (i, row) in ROWS[..group.len()].iter().enumerate() {
            asm.add(*row, qword_ptr(rsp + line + 8 * i as i32))?;
        }
        asm.add(r12, displacement(0, self.spec.line_column())?)?;
        asm.dec(r13d)?;
        asm.jne(top)?;
        asm.set_label(&mut done)?;
        // An instruction can have one label only, and what follows may have its own.
        asm.nop()?;
        Ok(())
    }

    fn vector_bytes(&self) -> usize {
        self.spec.format().vector_bytes()
    }

    /// rdi = the first tap of the first pixel, be it in the image or not; r9d and r10d = its input row and column.
    fn first_tap(&mut self, rows: &Axis, cols: &Axis) -> Result<(), EmitError> {
        let border = rows.before * rows.pitch + cols.before * cols.pitch;
        let asm = &mut self.asm.asm;
        asm.sub(rdi, displacement(0, border)?)?;
        asm.mov(r10, r9)?;
        asm.shr(r10, 32)?;
        for (index, axis) in [(r9d, rows), (r10d, cols)] {
            asm.imul_3(index, index, displacement(0, axis.stride)?)?;
            asm.sub(index, displacement(0, axis.before)?)?;
        }
        Ok(())
    }

    /// Of the line's columns: r14 = those in front of the image; locals = those inside, and those behind.
    fn count_columns(&mut self, line: i32, cols: &Axis) -> Result<(), EmitError> {
        let all = displacement(0, cols.span(self.spec.cols))?;
        let extent = displacement(0, cols.extent)?;
        let asm = &mut self.asm.asm;
        asm.xor(r12d, r12d)?;
        asm.mov(r13d, extent)?;
        // rax = the first inside, rbx = the first behind.
        asm.mov(eax, r10d)?;
        asm.lea(ebx, r10 + all)?;
        for bound in [eax, ebx] {
            asm.test(bound, bound)?;
            asm.cmovs(bound, r12d)?;
            asm.cmp(bound, r13d)?;
            asm.cmovg(bound, r13d)?;
        }
        asm.mov(r14d, eax)?;
        asm.sub(r14d, r10d)?;
        asm.cmovs(r14d, r12d)?;
        asm.mov(r13d, all)?;
        asm.cmp(r14d, r13d)?;
        asm.cmovg(r14d, r13d)?;
        asm.sub(ebx, eax)?;
        asm.mov(dword_ptr(rsp + line + BODY), ebx)?;
        asm.sub(r13d, r14d)?;
        asm.sub(r13d, ebx)?;
        asm.mov(dword_ptr(rsp + line + BEHIND), r13d).map_err(EmitError::from)
    }

    /// Writes `r13d` vectors at r12, which moves behind them.
    fn fill(&mut self, padding: Reg) -> Result<(), EmitError> {
        let vector = displacement(0, self.vector_bytes())?;
        let (mut top, mut done) = (self.asm.asm.create_label(), self.asm.asm.create_label());
        self.asm.asm.test(r13d, r13d)?;
        self.asm.asm.je(done)?;
        self.asm.asm.set_label(&mut top)?;
        self.asm.store_vector(r12 + 0, padding)?;
        let asm = &mut self.asm.asm;
        asm.add(r12, vector)?;
        asm.dec(r13d)?;
        asm.jne(top)?;
        asm.set_label(&mut done)?;
        asm.nop()?;
        Ok(())
    }

    /// Points [`ROWS`] at the first column inside the image of each row, and their steps at one pixel; rows outside are
    /// a zero point that stays where it is.
    fn point_at_rows(&mut self, line: i32, group: &[usize]) -> Result<(), EmitError> {
        let (rows, cols) = (self.spec.window[0], self.spec.window[1]);
        // Where the weights begin.
        let outside = rsi;
        const { assert!(Header::CODES == 0) };
        let asm = &mut self.asm.asm;
        for (i, (&offset, row)) in group.iter().zip(ROWS).enumerate() {
            asm.lea(row, rdi + displacement(0, offset * rows.pitch)?)?;
            asm.mov(r13d, displacement(0, cols.pitch)?)?;
            asm.lea(r12d, r9 + displacement(0, offset)?)?;
            // A row above is a huge number.
            asm.cmp(r12d, displacement(0, rows.extent)?)?;
            asm.cmovae(row, outside)?;
            asm.mov(r12d, 0)?;
            asm.cmovae(r13d, r12d)?;
            asm.mov(qword_ptr(rsp + line + 8 * i as i32), r13)?;
        }
        Ok(())
    }

    /// One column of the rows of a group to one vector of dwords for each of the panel.
    fn interleave_column(&mut self, rows: usize, constants: &Constants) -> Emit {
        let vectors = self.spec.format().vectors();
        let done = if self.spec.rows_at_once() == 2 {
            self.pair_rows(rows, vectors, constants)?
        } else {
            match (self.asm.width, vectors) {
                (Width::Zmm, 1) => self.gather_one(rows, constants)?,
                (Width::Zmm, 2) => self.gather_two(rows, constants)?,
                _ => self.quadruple_rows(rows, vectors)?,
            }
        };
        for (v, reg) in done.into_iter().enumerate() {
            self.asm.store_vector(r12 + (v * self.vector_bytes()) as i32, reg)?;
        }
        Ok(())
    }

    /// Codes of one column of two rows in turn, as words: two vectors for a panel of four, one for one of two.
    fn interleave_two(
        &mut self,
        low: usize,
        high: usize,
        to: usize,
        vectors: usize,
    ) -> Result<Vec<Reg>, IcedError> {
        let asm = &mut self.asm;
        let [a, b, x, y] = [to, to + 1, to + 2, to + 3].map(Reg);
        if vectors == 4 {
            asm.vmovups(a, ROWS[low] + 0)?;
            asm.vmovups(b, ROWS[high] + 0)?;
        } else {
            // 16 channels in both lanes: the lower lane takes the first 8 of them, the upper lane the others.
            asm.asm.vbroadcasti128(a.ymm(), xmmword_ptr(ROWS[low]))?;
            asm.asm.vbroadcasti128(b.ymm(), xmmword_ptr(ROWS[high]))?;
        }
        asm.vpunpcklbw(x, a, b)?;
        asm.vpunpckhbw(y, a, b)?;
        if vectors == 4 {
            return Ok(vec![x, y]);
        }
        asm.asm.vpblendd(x.ymm(), x.ymm(), y.ymm(), 0xf0)?;
        Ok(vec![x])
    }

    /// Words of two rows and words of the next two in turn.
    fn quadruple_rows(&mut self, rows: usize, vectors: usize) -> Result<Vec<Reg>, IcedError> {
        let upper = self.interleave_two(0, 1.min(rows - 1), 0, vectors)?;
        let lower = match rows {
            ..=2 => upper.clone(),
            _ => self.interleave_two(2, rows - 1, 4, vectors)?,
        };
        let mut done = Vec::new();
        for (i, (upper, lower)) in upper.into_iter().zip(lower).enumerate() {
            let [low, high] = [8 + 2 * i, 9 + 2 * i].map(Reg);
            self.asm.vpunpcklwd(low, upper, lower)?;
            self.asm.vpunpckhwd(high, upper, lower)?;
            done.extend([low, high]);
        }
        Ok(done)
    }

    /// Two rows, widened to 16 bits.
    fn pair_rows(
        &mut self,
        rows: usize,
        vectors: usize,
        constants: &Constants,
    ) -> Result<Vec<Reg>, IcedError> {
        let pairs = self.interleave_two(0, rows - 1, 0, vectors)?;
        let mut done = Vec::new();
        for (i, pair) in pairs.into_iter().enumerate() {
            let [low, high] = [8 + 2 * i, 9 + 2 * i].map(Reg);
            self.asm.vpunpcklbw(low, pair, constants.zero)?;
            self.asm.vpunpckhbw(high, pair, constants.zero)?;
            done.extend([low, high]);
        }
        Ok(done)
    }

    /// 16 channels of four rows are one vector: transposed in blocks of 4 x 4 by two shuffles.
    fn gather_one(&mut self, rows: usize, constants: &Constants) -> Result<Vec<Reg>, IcedError> {
        let x = Reg(0);
        self.asm.asm.vmovdqu(x.xmm(), xmmword_ptr(ROWS[0]))?;
        for i in 1..4 {
            let row = ROWS[i.min(rows - 1)];
            self.asm.asm.vinserti32x4(x.zmm(), x.zmm(), xmmword_ptr(row), i as u32)?;
        }
        self.asm.vpermd(x, constants.gather[0], x)?;
        self.asm.vpshufb(x, x, constants.transpose)?;
        Ok(vec![x])
    }

    /// 32 channels of four rows are two vectors.
    fn gather_two(&mut self, rows: usize, constants: &Constants) -> Result<Vec<Reg>, IcedError> {
        let [x, y, copy] = [0, 1, 2].map(Reg);
        for (half, reg) in [x, y].into_iter().enumerate() {
            let [low, high] = [0, 1].map(|i| ROWS[(2 * half + i).min(rows - 1)]);
            self.asm.asm.vmovdqu(reg.ymm(), ymmword_ptr(low))?;
            self.asm.asm.vinserti64x4(reg.zmm(), reg.zmm(), ymmword_ptr(high), 1)?;
        }
        self.asm.vmovaps(copy, x)?;
        for (reg, gather) in [x, copy].into_iter().zip(constants.gather) {
            self.asm.asm.vpermt2d(reg.zmm(), gather.zmm(), y.zmm())?;
            self.asm.vpshufb(reg, reg, constants.transpose)?;
        }
        Ok(vec![x, copy])
    }

    /// The second phase of a block: all groups, vectors and taps.
    fn multiply(&mut self, tile: &Tile, cols: usize) -> Result<(), EmitError> {
        let order = self.spec.weight_vectors();
        let (vectors, taps) = (tile.format.vectors(), self.spec.window[1].taps);
        let own: Vec<(usize, WeightVector)> =
            order.into_iter().enumerate().filter(|(_, w)| w.row < self.spec.rows).collect();
        for group in 0..self.spec.read_groups() {
            for vector in 0..vectors {
                let mut columns = Columns::new(self.spec, tile, cols);
                for col in 0..taps {
                    let of_column: Vec<(usize, WeightVector)> = own
                        .iter()
                        .filter(|(_, w)| (w.group, w.vector, w.col) == (group, vector, col))
                        .copied()
                        .collect();
                    self.multiply_column(tile, cols, &of_column, &mut columns)?;
                }
            }
        }
        Ok(())
    }

    /// One column of taps, for every output row that meets the group.
    fn multiply_column(
        &mut self,
        tile: &Tile,
        cols: usize,
        weights: &[(usize, WeightVector)],
        columns: &mut Columns,
    ) -> Result<(), EmitError> {
        let axis = self.spec.window[1];
        let mut operands = Vec::with_capacity(weights.len());
        for (i, (index, _)) in weights.iter().enumerate() {
            let memory = displaced(rsi, 0, self.spec.weights_at() + index * self.vector_bytes())?;
            operands.push(match cols {
                1 => Operand::Mem(memory),
                _ => {
                    let reg = tile.temporary(1 + i);
                    self.asm.vmovups(reg, memory)?;
                    Operand::Reg(reg)
                }
            });
        }
        for pixel in 0..cols {
            let Some((_, first)) = weights.first() else { return Ok(()) };
            let x = columns.get(&mut self.asm, pixel * axis.stride + first.col * axis.dilation, first)?;
            for ((_, w), operand) in weights.iter().zip(&operands) {
                let sum = tile.accumulator(w.row * cols + pixel, w.vector);
                let product = tile.temporary(0);
                match (self.spec.isa.has_dot_product(), self.spec.product) {
                    (true, _) => self.asm.vpdpbusd(sum, x, *operand)?,
                    (false, Product::U8S7) => {
                        let temporaries = [product, accumulate::ones(tile)];
                        accumulate::multiply_add_bytes(&mut self.asm, sum, x, *operand, temporaries)?;
                    }
                    (false, _) => {
                        self.asm.vpmaddwd(product, x, *operand)?;
                        self.asm.vpaddd(sum, sum, product)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A strip of floats: r10 holds a bit for each kernel row that lies in the image.
    fn floats(&mut self, blocks: &Blocks, tiles: &[Tile]) -> Result<(), EmitError> {
        let (rows, cols) = (self.spec.window[0], self.spec.window[1]);
        self.first_tap(&rows, &cols)?;
        let asm = &mut self.asm.asm;
        asm.xor(r10d, r10d)?;
        for tap in (0..rows.taps).rev() {
            asm.lea(eax, r9 + displacement(0, tap * rows.dilation)?)?;
            asm.cmp(eax, displacement(0, rows.extent)?)?;
            asm.rcl(r10d, 1)?;
        }
        for (run, tile) in blocks.0.iter().zip(tiles) {
            let step = run.cols * cols.stride * cols.pitch;
            self.repeat(run, step, |strip, first| {
                accumulate::start_from_bias(&mut strip.asm, tile)?;
                for tap in 0..rows.taps {
                    strip.multiply_row(tile, tap, first, run.cols)?;
                }
                store::floats(&mut strip.asm, tile)
            })?;
        }
        Ok(())
    }

    /// One row of taps for the block of output columns from `first` on.
    fn multiply_row(&mut self, tile: &Tile, row: usize, first: usize, cols: usize) -> Result<(), EmitError> {
        let (rows, axis) = (self.spec.window[0], self.spec.window[1]);
        let mut skip = self.asm.asm.create_label();
        self.asm.asm.bt(r10d, row as u32)?;
        self.asm.asm.jae(skip)?;
        // The first register is left to columns, of which two in turn hide a load.
        let in_registers = axis.taps + 2 <= tile.temporaries();
        let mut weights = Vec::with_capacity(axis.taps);
        for tap in 0..axis.taps {
            let memory = displaced(rsi, 0, (row * axis.taps + tap) * self.vector_bytes())?;
            weights.push(match in_registers {
                false => Operand::Mem(memory),
                true => {
                    let reg = tile.temporary(tap);
                    self.asm.vmovups(reg, memory)?;
                    Operand::Reg(reg)
                }
            });
        }
        let free = if in_registers { axis.taps } else { 0 };
        let in_turn = (tile.temporaries() - free).min(6);
        let inside = axis.reached(cols).into_iter().filter(|&at| axis.inside(first, at).is_some());
        for (i, at) in inside.enumerate() {
            let x = tile.temporary(free + i % in_turn);
            let from = row * rows.dilation * rows.pitch + at * axis.pitch;
            self.asm.vmovups(x, displaced(rdi, 0, from)?)?;
            for pixel in 0..cols {
                if let Some(tap) = axis.tap(pixel, at) {
                    self.asm.vfmadd231ps(tile.accumulator(pixel, 0), x, weights[tap])?;
                }
            }
        }
        self.asm.asm.set_label(&mut skip)?;
        self.asm.asm.nop()?;
        Ok(())
    }
}

/// Constants of the first phase, in registers that it does not use otherwise.
struct Constants {
    padding: Reg,
    zero: Reg,
    gather: [Reg; 2],
    transpose: Reg,
}

impl Constants {
    fn load(asm: &mut Assembler, spec: &StripSpec) -> Result<Constants, IcedError> {
        let constants =
            Constants { padding: Reg(14), zero: Reg(15), gather: [16, 17].map(Reg), transpose: Reg(18) };
        asm.vmovups(constants.padding, rsi + Header::ELEMENTS as i32)?;
        if spec.rows_at_once() == 2 {
            asm.asm.vpxor(constants.zero.ymm(), constants.zero.ymm(), constants.zero.ymm())?;
        }
        let gathers: &[usize] = match (asm.width, spec.format().vectors()) {
            (Width::Zmm, 1) => &[Header::GATHER_ONE],
            (Width::Zmm, 2) => &Header::GATHER_TWO,
            _ => &[],
        };
        for (reg, &at) in constants.gather.into_iter().zip(gathers) {
            asm.vmovups(reg, rsi + at as i32)?;
            asm.vmovups(constants.transpose, rsi + Header::TRANSPOSE as i32)?;
        }
        Ok(constants)
    }
}

/// Columns of the line in registers: each is loaded once where there are enough of them.
struct Columns {
    /// Bytes from one column to the next.
    pitch: usize,
    vector_bytes: usize,
    group_bytes: usize,
    registers: Vec<Reg>,
    held: Vec<(usize, Reg)>,
}

impl Columns {
    fn new(spec: &StripSpec, tile: &Tile, cols: usize) -> Columns {
        let weights = if cols > 1 { spec.rows } else { 0 };
        // The last one holds ones.
        let reserved = usize::from(accumulate::has_ones(tile));
        Columns {
            pitch: spec.line_column(),
            vector_bytes: tile.format.vector_bytes(),
            group_bytes: spec.panel * 4,
            registers: (1 + weights..tile.temporaries() - reserved).map(|i| tile.temporary(i)).collect(),
            held: Vec::new(),
        }
    }

    /// The register that holds column `at` of the group and vector of `w`. The leftmost column makes room: taps go to
    /// the right.
    fn get(&mut self, asm: &mut Assembler, at: usize, w: &WeightVector) -> Result<Reg, EmitError> {
        if let Some((_, reg)) = self.held.iter().find(|(column, _)| *column == at) {
            return Ok(*reg);
        }
        let reg = match self.registers.pop() {
            Some(reg) => reg,
            None => {
                let leftmost = (0..self.held.len()).min_by_key(|&i| self.held[i].0).unwrap_or(0);
                self.held.swap_remove(leftmost).1
            }
        };
        let from = at * self.pitch + w.group * self.group_bytes + w.vector * self.vector_bytes;
        asm.vmovups(reg, displaced(rdi, 0, from)?)?;
        self.held.push((at, reg));
        Ok(reg)
    }
}
