//! Runs of tiles of matrix registers: while the products of one are summed, the accumulators of the one before, which are
//! on the stack, become codes.
//!
//! The first tile of a run is summed by the loops of any tile. The others are summed by straight code: their steps of K
//! are few, or there would be little to win, and between the products of each step stands its share of the codes. The
//! order of instructions is what makes them overlap: a core looks ahead by some hundreds of instructions, which is less
//! than the codes of a tile take.

use super::{
    EmitError, Tile, accumulate, accumulate::NextWeights, displacement, matrix, matrix::Bands, store,
    vector::Assembler,
};
use crate::dense::spec::Next;
use iced_x86::code_asm::*;

/// Addresses of the tile that is summed; of the one that becomes codes they are where the calling convention puts them.
pub(super) const A: AsmRegister64 = r13;
pub(super) const W: AsmRegister64 = r14;
/// Tiles that are left.
pub(super) const LEFT: AsmRegister64 = r15;

/// Steps of K up to which tiles make runs: with more, codes are a small part of the time, and straight code is long.
pub(crate) const MOST_STEPS: usize = 40;

/// Emits a run between [`matrix::begin`] and [`matrix::end`].
pub(super) fn emit(asm: &mut Assembler, tile: &Tile, bands: &Bands, next: Next) -> Result<(), EmitError> {
    let prefetch = NextWeights::of(tile, tile.spec.loops.len())?;
    asm.asm.mov(A, rdi)?;
    asm.asm.mov(W, rsi)?;
    asm.asm.mov(LEFT, r9)?;
    asm.asm.shr(LEFT, 32)?;
    accumulate::emit(asm, tile)?;
    matrix::spill(asm, tile, bands)?;
    store::set_masks(asm, tile)?;
    let (mut top, mut last) = (asm.asm.create_label(), asm.asm.create_label());
    asm.asm.dec(LEFT)?;
    asm.asm.jle(last)?;
    asm.asm.set_label(&mut top)?;
    accumulate::advance(asm, A, next.a.into())?;
    accumulate::advance(asm, W, next.w.into())?;
    asm.asm.mov(rdi, A)?;
    asm.asm.mov(rsi, W)?;
    sum_and_finish(asm, tile, bands, prefetch.as_ref())?;
    for (argument, by) in [(rdx, next.params), (rcx, next.y), (r8, next.r)] {
        accumulate::advance(asm, argument, by.into())?;
    }
    if next.g != 0 {
        asm.asm.add(qword_ptr(matrix::grids()), next.g)?;
    }
    matrix::spill(asm, tile, bands)?;
    asm.asm.dec(LEFT)?;
    asm.asm.jg(top)?;
    asm.asm.set_label(&mut last)?;
    matrix::load_starts(asm, tile)?;
    (0..store::groups(tile)).try_for_each(|group| store::finish_group(asm, tile, group))
}

/// Sums a tile; between its products, the codes of the tile before and prefetches.
fn sum_and_finish(
    asm: &mut Assembler,
    tile: &Tile,
    bands: &Bands,
    prefetch: Option<&NextWeights>,
) -> Result<(), EmitError> {
    matrix::start_from_zero(asm, tile, bands)?;
    matrix::load_starts(asm, tile)?;
    let starts = tile.spec.run_starts().ok_or(EmitError::Displacement)?;
    let steps = accumulate::steps(tile);
    let (groups, products) = (store::groups(tile), starts.len() * steps * matrix::products(tile, bands));
    let mut done = 0;
    let mut between = |asm: &mut Assembler| -> Result<(), EmitError> {
        let of = |all: usize| all * done / products..all * (done + 1) / products;
        of(groups).try_for_each(|group| store::finish_group(asm, tile, group))?;
        if let Some(weights) = prefetch {
            weights.lines_of_tile(asm, of(weights.lines()))?;
        }
        done += 1;
        Ok(())
    };
    for (i, start) in starts.iter().enumerate() {
        for s in 0..steps {
            let a = displacement(*start, s * matrix::ROW_BYTES)?;
            matrix::step_at(asm, tile, bands, a, i * steps + s, &mut between)?;
        }
    }
    prefetch.map_or(Ok(()), |weights| weights.advance_by_tile(asm))
}
