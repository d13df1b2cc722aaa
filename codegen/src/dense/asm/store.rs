//! From accumulators to memory.

use super::{
    EmitError, Tile, displaced, matrix, requantize,
    vector::{Assembler, Reg},
};
use crate::dense::spec::EpilogueForm;
use iced_x86::code_asm::{r8, rcx};

/// Temporary registers that the epilogue of floats needs: the bounds, and one for stores.
pub(super) const FLOAT_TEMPORARIES: usize = 3;

/// Codes: 4 vectors of accumulators become one of bytes, be they of one pixel, of two or of four.
pub(super) fn codes(asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
    asm.set_masks(tile.spec.columns)?;
    if tile.bands.is_some() {
        matrix::load_starts(asm, tile)?;
    }
    (0..groups(tile)).try_for_each(|group| codes_of_group(asm, tile, group))
}

/// Pixels whose codes fill a vector are a group: so many groups are in a tile.
pub(super) fn groups(tile: &Tile) -> usize {
    tile.spec.pixels().div_ceil(4 / tile.format.vectors())
}

/// The codes of a group's pixels.
pub(super) fn codes_of_group(asm: &mut Assembler, tile: &Tile, group: usize) -> Result<(), EmitError> {
    let (vectors, columns) = (tile.format.vectors(), tile.spec.columns);
    let most = 4 / vectors;
    let pixels: Vec<usize> = (group * most..tile.spec.pixels().min((group + 1) * most)).collect();
    for &pixel in &pixels {
        if let Some(bands) = &tile.bands {
            matrix::fetch(asm, tile, bands, pixel)?;
        }
        requantize::rescale(asm, tile, pixel)?;
    }
    let packed = narrow(asm, tile, &pixels)?;
    let index = tile.temporary(0);
    // One pixel of 4 vectors is in order already.
    if vectors < 4 {
        asm.vmovups(index, tile.param(tile.layout.permutation, 0))?;
        asm.vpermd(packed, index, packed)?;
    }
    for (i, &pixel) in pixels.iter().enumerate() {
        let to = displaced(rcx, tile.spec.y_offsets[pixel], 0)?;
        asm.store(to, packed, i * tile.format.panel, columns, 1, index)?;
    }
    Ok(())
}

/// Packs the accumulators of these pixels twice. What is missing for four vectors repeats the last one.
fn narrow(asm: &mut Assembler, tile: &Tile, pixels: &[usize]) -> Result<Reg, EmitError> {
    let vectors = tile.format.vectors();
    let all: Vec<(usize, usize)> = pixels.iter().flat_map(|p| (0..vectors).map(|v| (*p, v))).collect();
    let words = all
        .chunks(2)
        .map(|pair| {
            let (low, high) = (pair[0], pair[pair.len() - 1]);
            let [a, b] = [low, high].map(|(pixel, v)| tile.accumulator(pixel, v));
            asm.vpackssdw(a, a, b)?;
            requantize::words(asm, tile, a, low, high)?;
            Ok(a)
        })
        .collect::<Result<Vec<Reg>, EmitError>>()?;
    let (low, high) = (words[0], words[words.len() - 1]);
    requantize::bytes(asm, tile, low, low, high)?;
    Ok(low)
}

/// Floats: residual, bounds, store.
pub(super) fn floats(asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
    let EpilogueForm::Float { lo: has_lo, hi: has_hi, residual } = tile.spec.epilogue else {
        return Err(EmitError::Epilogue(tile.spec.product));
    };
    let (lanes, vector) = (tile.format.lanes(), tile.format.vector_bytes());
    let columns = tile.spec.columns;
    let [lo, hi, t] = [0, 1, 2].map(|i| tile.temporary(i));
    asm.set_masks(columns - (columns - 1) / lanes * lanes)?;
    if let super::super::pack::EpilogueLayout::Float { lo: at_lo, hi: at_hi } = tile.layout.epilogue {
        asm.vmovups(lo, tile.param(at_lo, 0))?;
        asm.vmovups(hi, tile.param(at_hi, 0))?;
    }
    for pixel in 0..tile.spec.pixels() {
        for v in 0..columns.div_ceil(lanes) {
            let x = tile.accumulator(pixel, v);
            if residual {
                asm.vaddps(x, x, displaced(r8, tile.spec.r_offsets[pixel], v * vector)?)?;
            }
            // Bound first: of two zeros, or with a NaN, these return the second operand, as `Clamp::apply` does.
            if has_lo {
                asm.vmaxps(x, lo, x)?;
            }
            if has_hi {
                asm.vminps(x, hi, x)?;
            }
            let bytes = 4 * lanes.min(columns - v * lanes);
            let to = displaced(rcx, tile.spec.y_offsets[pixel], v * vector)?;
            asm.store(to, x, 0, bytes, 4, t)?;
        }
    }
    Ok(())
}
