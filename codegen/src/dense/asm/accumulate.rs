//! The sum over K: bias, then groups of K in the order of the loops.

use super::{
    EmitError, Tile, displaced, matrix,
    vector::{Assembler, Emit, Operand, Reg},
};
use crate::{
    dense::{
        pack::ALIGN,
        spec::{Product, Start},
    },
    tier::Isa,
};
use iced_x86::code_asm::*;
use std::ops::Range;

/// Vector instructions in the unrolled body of the innermost loop, about: enough to hide the loop's own, which take
/// slots of the multipliers' ports, and few enough for the decoded instruction cache.
const BODY: usize = 400;
/// The most groups in a body.
const MAX_UNROLL: usize = 8;
/// Steps of matrix registers in a body. They are long: the loop's own instructions hide behind one.
const MATRIX_UNROLL: usize = 4;

/// Counters of the loops around the innermost one.
const COUNTERS: [AsmRegister32; 3] = [r9d, r10d, r11d];

/// How one activation of a group reaches the accumulators.
#[derive(Clone, Copy)]
enum Step {
    /// Dword of 4 codes by 4 weights, summed into the accumulator.
    DotProduct,
    /// The first or the second 2 of 4 widened codes by 2 weights, summed in a temporary.
    Pairs { second: bool },
    /// Dword of 4 codes by 4 weights of which pairs fit 16 bits, summed in a temporary.
    Bytes,
    /// One float.
    MultiplyAdd,
}

impl Step {
    /// Whether it is the first one of its group.
    fn is_first(self) -> bool {
        !matches!(self, Step::Pairs { second: true })
    }
}

pub(super) fn emit(asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
    start_from_bias(asm, tile)?;
    set_ones(asm, tile)?;
    if tile.spec.start == Start::Weights {
        advance(asm, rsi, tile.format.weight_bytes(1) as i64)?;
    }
    let loops: Vec<(u32, i32)> = tile.spec.loops.iter().copied().filter(|l| l.0 != 1).collect();
    if loops.len() > COUNTERS.len() {
        return Err(EmitError::Loops(loops.len()));
    }
    let ahead = Ahead { results: Results::of(tile, &loops), weights: NextWeights::of(tile, loops.len())? };
    ahead.start(asm, tile)?;
    let mut tops = vec![];
    for (&(trips, _), counter) in loops.iter().zip(COUNTERS) {
        asm.asm.mov(counter, trips)?;
        let mut top = asm.asm.create_label();
        asm.asm.set_label(&mut top)?;
        tops.push(top);
    }
    let mut moved = i64::from(run(asm, tile, !loops.is_empty(), &ahead)?);
    for ((&(trips, stride), top), counter) in loops.iter().zip(tops).zip(COUNTERS).rev() {
        advance(asm, rdi, i64::from(stride) - moved)?;
        asm.asm.dec(counter)?;
        asm.asm.jne(top)?;
        moved = i64::from(trips) * i64::from(stride);
    }
    Ok(())
}

pub(super) fn start_from_bias(asm: &mut Assembler, tile: &Tile) -> Emit {
    if let Some(bands) = &tile.bands {
        return matrix::start_from_zero(asm, tile, bands);
    }
    for v in 0..tile.format.vectors() {
        asm.vmovups(tile.accumulator(0, v), tile.start(v))?;
    }
    for pixel in 1..tile.spec.pixels() {
        for v in 0..tile.format.vectors() {
            asm.vmovaps(tile.accumulator(pixel, v), tile.accumulator(0, v))?;
        }
    }
    Ok(())
}

/// One contiguous run. Returns how far it moved rdi; rsi is moved to the next run's weights if there is one.
fn run(asm: &mut Assembler, tile: &Tile, more: bool, ahead: &Ahead) -> Result<i32, EmitError> {
    let (unroll, trips) = body(tile);
    let rest = steps(tile) % unroll;
    let step_groups = tile.format.step_groups();
    let step_bytes = activation_bytes(tile) * step_groups;
    let weight_bytes = tile.format.weight_bytes(step_groups);
    let mut moved = 0;
    let mut straight = rest;
    let steps_and_prefetches = |asm: &mut Assembler, steps: usize| -> Result<(), EmitError> {
        for s in 0..steps {
            step(asm, tile, s)?;
            ahead.prefetch(asm, s, steps)?;
        }
        ahead.advance(asm)
    };
    if trips > 1 {
        asm.asm.mov(eax, trips as u32)?;
        let mut top = asm.asm.create_label();
        asm.asm.set_label(&mut top)?;
        steps_and_prefetches(asm, unroll)?;
        advance(asm, rdi, (unroll * step_bytes) as i64)?;
        advance(asm, rsi, (unroll * weight_bytes) as i64)?;
        asm.asm.dec(eax)?;
        asm.asm.jne(top)?;
        moved = trips * unroll * step_bytes;
        for s in 0..straight {
            step(asm, tile, s)?;
        }
    } else {
        straight += trips * unroll;
        steps_and_prefetches(asm, straight)?;
    }
    if more {
        advance(asm, rsi, (straight * weight_bytes) as i64)?;
    }
    i32::try_from(moved).map_err(|_| EmitError::Displacement)
}

/// Steps of a run: groups, or as many of them as a matrix register takes.
pub(super) fn steps(tile: &Tile) -> usize {
    tile.spec.inner as usize / tile.format.step_groups()
}

/// Steps in the body of the innermost loop, and how often it is run.
fn body(tile: &Tile) -> (usize, usize) {
    let unroll = unroll(tile, steps(tile));
    (unroll, steps(tile) / unroll)
}

/// Steps in the body of the innermost loop: a divisor of their number if a large one fits, so that no tail is left.
fn unroll(tile: &Tile, steps: usize) -> usize {
    let per_group = (tile.spec.pixels() + 1) * (tile.format.vectors() + 1);
    let most = match tile.bands {
        Some(_) => MATRIX_UNROLL,
        None => (BODY / per_group).clamp(1, MAX_UNROLL),
    };
    (most / 2 + 1..=most).rev().find(|u| steps.is_multiple_of(*u)).unwrap_or(most)
}

pub(super) fn advance(asm: &mut Assembler, pointer: AsmRegister64, by: i64) -> Result<(), EmitError> {
    let by = i32::try_from(by).map_err(|_| EmitError::Displacement)?;
    if by != 0 {
        asm.asm.add(pointer, by)?;
    }
    Ok(())
}

/// Step `g` behind rdi and rsi: a group, or as many as a matrix register takes.
fn step(asm: &mut Assembler, tile: &Tile, g: usize) -> Result<(), EmitError> {
    if let Some(bands) = &tile.bands {
        return matrix::step(asm, tile, bands, g);
    }
    match (tile.format.product, tile.format.isa) {
        (Product::F32, _) => half_group(asm, tile, g, Step::MultiplyAdd),
        (Product::U8S7, _) => half_group(asm, tile, g, Step::Bytes),
        (Product::U8S8, Isa::Avx2) => {
            half_group(asm, tile, g, Step::Pairs { second: false })?;
            half_group(asm, tile, g, Step::Pairs { second: true })
        }
        (Product::U8S8, _) => half_group(asm, tile, g, Step::DotProduct),
    }
}

/// Whether sums of pairs are summed in 32 bits by products with ones.
pub(super) fn has_ones(tile: &Tile) -> bool {
    tile.spec.product == Product::U8S7
}

/// The register of 16-bit ones: the last one, which is the same in tiles of any shape.
pub(super) fn ones(tile: &Tile) -> Reg {
    tile.temporary(tile.temporaries() - 1)
}

/// Sets them where they are used. Overwrites eax.
pub(super) fn set_ones(asm: &mut Assembler, tile: &Tile) -> Emit {
    const TWO_WORDS: u32 = 0x0001_0001;
    if has_ones(tile) { asm.splat(ones(tile), TWO_WORDS) } else { Ok(()) }
}

fn half_group(asm: &mut Assembler, tile: &Tile, g: usize, step: Step) -> Result<(), EmitError> {
    let vectors = tile.format.vectors();
    let weights = |v: usize| tile.temporary(v);
    for v in 0..vectors {
        load_weights(asm, tile, g, step, v)?;
        prefetch_weights(asm, tile, g, step, v)?;
    }
    // Several registers in turn: the next activation can be loaded while the last one is used.
    let (product, first) = match step {
        Step::Bytes => (tile.temporary(0), 1),
        Step::Pairs { .. } => (tile.temporary(vectors), vectors + 1),
        Step::DotProduct | Step::MultiplyAdd => (tile.temporary(vectors), vectors),
    };
    let in_turn = (tile.temporaries() - usize::from(has_ones(tile)) - first).min(4);
    for (pixel, &offset) in tile.spec.a_offsets.iter().enumerate() {
        let a = tile.temporary(first + pixel % in_turn);
        load_activation(asm, a, displaced(rdi, offset, activation_bytes(tile) * g)?, step)?;
        prefetch_activations(asm, tile, g, step, offset)?;
        for v in 0..vectors {
            let accumulator = tile.accumulator(pixel, v);
            match step {
                Step::DotProduct => asm.vpdpbusd(accumulator, a, weights(v))?,
                Step::MultiplyAdd => asm.vfmadd231ps(accumulator, a, weights(v))?,
                Step::Bytes => {
                    let weights = displaced(rsi, 0, whole_vector(tile, g, v))?;
                    multiply_add_bytes(asm, accumulator, a, weights, [product, ones(tile)])?;
                }
                Step::Pairs { .. } => {
                    asm.vpmaddwd(product, a, weights(v))?;
                    asm.vpaddd(accumulator, accumulator, product)?;
                }
            }
        }
    }
    Ok(())
}

/// Adds four products of each 32-bit lane, of codes by weights of which pairs fit 16 bits.
pub(super) fn multiply_add_bytes(
    asm: &mut Assembler,
    sum: Reg,
    codes: Reg,
    weights: impl Into<Operand>,
    [product, ones]: [Reg; 2],
) -> Emit {
    asm.vpmaddubsw(product, codes, weights)?;
    asm.vpmaddwd(product, product, ones)?;
    asm.vpaddd(sum, sum, product)
}

/// Byte offset of weights in vector `v` of group `g`, where a group is one row of vectors.
fn whole_vector(tile: &Tile, g: usize, v: usize) -> usize {
    tile.format.weight_bytes(g) + v * tile.format.vector_bytes()
}

fn load_weights(asm: &mut Assembler, tile: &Tile, g: usize, step: Step, v: usize) -> Result<(), EmitError> {
    let to = tile.temporary(v);
    match step {
        // Pixels read them from memory: with the ones, a register each would leave fewer pixels.
        Step::Bytes => {}
        Step::DotProduct | Step::MultiplyAdd => {
            asm.vmovups(to, displaced(rsi, 0, whole_vector(tile, g, v))?)?
        }
        Step::Pairs { second } => {
            let half = if second { 2 * tile.format.panel } else { 0 };
            let at = tile.format.weight_bytes(g) + half + v * tile.format.vector_bytes() / 2;
            asm.load_bytes_as_words(to, displaced(rsi, 0, at)?)?;
        }
    }
    Ok(())
}

fn load_activation(asm: &mut Assembler, a: Reg, from: AsmMemoryOperand, step: Step) -> Emit {
    match step {
        Step::DotProduct | Step::Bytes | Step::Pairs { second: false } => asm.vpbroadcastd(a, from),
        Step::Pairs { second: true } => asm.vpbroadcastd(a, from + 4),
        Step::MultiplyAdd => asm.vbroadcastss(a, from),
    }
}

/// Bytes of a group of a pixel's activations.
fn activation_bytes(tile: &Tile) -> usize {
    tile.format.product.group() * tile.format.activation_bytes()
}

/// The line that this load will be of, so many bytes later. Into the second level: it is wanted too late for the first,
/// which other weights and activations use meanwhile.
fn prefetch_weights(
    asm: &mut Assembler,
    tile: &Tile,
    g: usize,
    step: Step,
    v: usize,
) -> Result<(), EmitError> {
    let ahead = tile.spec.prefetch.weights as usize;
    let at = whole_vector(tile, g, v);
    if ahead > 0 && at.is_multiple_of(LINE) && step.is_first() {
        asm.asm.prefetcht1(byte_ptr(displaced(rsi, 0, at + ahead)?))?;
    }
    Ok(())
}

/// A line of a pixel for as many groups as one holds.
fn prefetch_activations(
    asm: &mut Assembler,
    tile: &Tile,
    g: usize,
    step: Step,
    offset: i32,
) -> Result<(), EmitError> {
    let ahead = tile.spec.prefetch.activations;
    let at = activation_bytes(tile) * g;
    if ahead != 0 && at.is_multiple_of(LINE) && step.is_first() {
        let offset = offset.checked_add(ahead).ok_or(EmitError::Displacement)?;
        asm.asm.prefetcht1(byte_ptr(displaced(rdi, offset, at)?))?;
    }
    Ok(())
}

/// Lines of cache, in which memory comes.
const LINE: usize = 64;

/// What is prefetched a part at a time in each run of the loop's body.
struct Ahead {
    results: Option<Results>,
    weights: Option<NextWeights>,
}

impl Ahead {
    fn start(&self, asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
        self.results.as_ref().map_or(Ok(()), |r| r.start(asm, tile))?;
        self.weights.as_ref().map_or(Ok(()), |w| w.start(asm))
    }

    /// Behind group `g` of a body of so many.
    fn prefetch(&self, asm: &mut Assembler, g: usize, groups: usize) -> Result<(), EmitError> {
        self.results.as_ref().map_or(Ok(()), |r| r.prefetch(asm, g, groups))?;
        self.weights.as_ref().map_or(Ok(()), |w| w.prefetch(asm, g, groups))
    }

    fn advance(&self, asm: &mut Assembler) -> Result<(), EmitError> {
        self.results.as_ref().map_or(Ok(()), |r| r.advance(asm))?;
        self.weights.as_ref().map_or(Ok(()), |w| w.advance(asm))
    }
}

/// Runs of the innermost loop's body in a tile.
fn bodies(tile: &Tile) -> usize {
    body(tile).1.max(1) * tile.spec.loops.iter().map(|l| l.0 as usize).product::<usize>()
}

/// Prefetching of the weights that lie behind the panel's, of which each tile of the panel asks for its part: while
/// one panel is multiplied, the next one comes to the second level. Of matrix forms.
pub(super) struct NextWeights {
    /// From the panel's first weight to the first that lies behind them.
    panel_bytes: i32,
    /// Lines that the whole tile asks for.
    lines: usize,
    /// Lines for each run of the loop's body.
    body_lines: usize,
}

/// The line that is prefetched next. The innermost one of the counters, which is free where at most two loops are around
/// the innermost.
const NEXT_WEIGHTS: AsmRegister64 = r11;

impl NextWeights {
    /// `None` where the tile is not asked to, or has no registers for it.
    pub(super) fn of(tile: &Tile, loops: usize) -> Result<Option<NextWeights>, EmitError> {
        let lines = tile.spec.prefetch.next_weights as usize;
        if lines == 0 || loops > 2 || tile.bands.is_none() {
            return Ok(None);
        }
        let panel = tile.format.weight_bytes(tile.spec.groups()).next_multiple_of(ALIGN);
        let panel_bytes = i32::try_from(panel).map_err(|_| EmitError::Displacement)?;
        Ok(Some(NextWeights { panel_bytes, lines, body_lines: lines.div_ceil(bodies(tile)) }))
    }

    pub(super) fn lines(&self) -> usize {
        self.lines
    }

    /// While rsi stands before the panel's weights, and the lower half of r9 is the number of tiles before.
    fn start(&self, asm: &mut Assembler) -> Result<(), EmitError> {
        let tile_bytes = i32::try_from(self.lines * LINE).map_err(|_| EmitError::Displacement)?;
        asm.asm.mov(r11d, r9d)?;
        asm.asm.imul_3(NEXT_WEIGHTS, NEXT_WEIGHTS, tile_bytes)?;
        asm.asm.lea(NEXT_WEIGHTS, rsi + NEXT_WEIGHTS + self.panel_bytes)?;
        Ok(())
    }

    /// Behind group `g` of a body of so many.
    fn prefetch(&self, asm: &mut Assembler, g: usize, groups: usize) -> Result<(), EmitError> {
        let at = |g: usize| (g * self.body_lines).div_ceil(groups);
        self.lines_of_tile(asm, at(g)..at(g + 1))
    }

    /// These of the next lines.
    pub(super) fn lines_of_tile(&self, asm: &mut Assembler, lines: Range<usize>) -> Result<(), EmitError> {
        for line in lines {
            asm.asm.prefetcht1(byte_ptr(displaced(NEXT_WEIGHTS, 0, line * LINE)?))?;
        }
        Ok(())
    }

    fn advance(&self, asm: &mut Assembler) -> Result<(), EmitError> {
        advance(asm, NEXT_WEIGHTS, (self.body_lines * LINE) as i64)
    }

    pub(super) fn advance_by_tile(&self, asm: &mut Assembler) -> Result<(), EmitError> {
        advance(asm, NEXT_WEIGHTS, (self.lines * LINE) as i64)
    }
}

/// Prefetching of the tile's results and residuals, pixel by pixel while it sums: results are written in parts of lines,
/// so their lines are fetched first. All at once would take every buffer of outstanding misses and stop the sum.
///
/// Lines are asked for as for reading, which no CPU of these tiers lacks: one that no other core holds comes writable.
///
/// Pixels are taken as equally far apart, as those of one row are; a block of several rows prefetches its first row and
/// what follows it.
struct Results {
    /// Bytes from one pixel to the next.
    stride: i32,
    /// Bytes of a pixel.
    bytes: usize,
    /// Pixels for each run of the loop's body.
    pixels: usize,
    residual: bool,
}

/// The pixel whose result, and whose residual, is prefetched next. The inner ones of the counters, which are free where
/// at most one loop is around the innermost.
const NEXT_RESULT: AsmRegister64 = r10;
const NEXT_RESIDUAL: AsmRegister64 = r11;

impl Results {
    /// `None` where the tile is not asked to, or has no registers for it.
    fn of(tile: &Tile, loops: &[(u32, i32)]) -> Option<Results> {
        let spec = tile.spec;
        if !spec.prefetch.results || loops.len() > 1 || tile.bands.is_some() {
            return None;
        }
        let offset = |i: usize| spec.y_offsets.get(i).copied().unwrap_or(0);
        Some(Results {
            stride: offset(1).checked_sub(offset(0))?,
            bytes: spec.columns * spec.epilogue.result_bytes(),
            pixels: spec.pixels().div_ceil(bodies(tile)),
            residual: !spec.r_offsets.is_empty(),
        })
    }

    fn start(&self, asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
        let first = |offsets: &[i32]| offsets.first().copied().unwrap_or(0);
        asm.asm.lea(NEXT_RESULT, displaced(rcx, first(&tile.spec.y_offsets), 0)?)?;
        if self.residual {
            asm.asm.lea(NEXT_RESIDUAL, displaced(r8, first(&tile.spec.r_offsets), 0)?)?;
        }
        Ok(())
    }

    /// Behind group `g` of a body of so many.
    fn prefetch(&self, asm: &mut Assembler, g: usize, groups: usize) -> Result<(), EmitError> {
        let at = |g: usize| (g * self.pixels).div_ceil(groups);
        for pixel in at(g)..at(g + 1) {
            let pixel = i32::try_from(pixel).ok().and_then(|p| p.checked_mul(self.stride));
            let pixel = pixel.ok_or(EmitError::Displacement)?;
            for byte in (0..self.bytes).step_by(LINE) {
                asm.asm.prefetcht0(byte_ptr(displaced(NEXT_RESULT, pixel, byte)?))?;
                if self.residual {
                    asm.asm.prefetcht0(byte_ptr(displaced(NEXT_RESIDUAL, pixel, byte)?))?;
                }
            }
        }
        Ok(())
    }

    fn advance(&self, asm: &mut Assembler) -> Result<(), EmitError> {
        let by = self.pixels as i64 * i64::from(self.stride);
        advance(asm, NEXT_RESULT, by)?;
        if self.residual { advance(asm, NEXT_RESIDUAL, by) } else { Ok(()) }
    }
}
