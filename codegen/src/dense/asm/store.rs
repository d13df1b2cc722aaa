//! From accumulators to memory.

use super::{
    EmitError, Tile, dequantize, displaced, matrix, requantize,
    vector::{Assembler, Emit, Reg},
};
use crate::dense::spec::EpilogueForm;
use iced_x86::code_asm::{r8, rcx};

/// Temporary registers that the epilogue of floats needs: the bounds, and one for stores.
pub(super) const FLOAT_TEMPORARIES: usize = 3;

/// Results of sums of codes.
pub(super) fn sums_of_codes(asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
    set_masks(asm, tile)?;
    if tile.bands.is_some() {
        matrix::load_starts(asm, tile)?;
    }
    (0..groups(tile)).try_for_each(|group| finish_group(asm, tile, group))
}

/// Sets up the masks that results are stored by.
pub(super) fn set_masks(asm: &mut Assembler, tile: &Tile) -> Emit {
    let (columns, lanes) = (tile.spec.columns, tile.format.lanes());
    asm.set_masks(match tile.spec.epilogue.writes_floats() {
        // Of the last vector.
        true => columns - (columns - 1) / lanes * lanes,
        false => columns,
    })
}

/// Pixels whose codes fill a vector are a group: so many groups are in a tile.
pub(super) fn groups(tile: &Tile) -> usize {
    tile.spec.pixels().div_ceil(4 / tile.format.vectors())
}

/// The results of a group's pixels.
pub(super) fn finish_group(asm: &mut Assembler, tile: &Tile, group: usize) -> Result<(), EmitError> {
    let most = 4 / tile.format.vectors();
    let pixels: Vec<usize> = (group * most..tile.spec.pixels().min((group + 1) * most)).collect();
    if let Some(bands) = &tile.bands {
        pixels.iter().try_for_each(|&pixel| matrix::fetch(asm, tile, bands, pixel))?;
    }
    match tile.spec.epilogue {
        EpilogueForm::Dequantize { .. } => dequantize::pixels(asm, tile, &pixels),
        _ => codes(asm, tile, &pixels),
    }
}

/// Codes: 4 vectors of accumulators become one of bytes, be they of one pixel, of two or of four.
fn codes(asm: &mut Assembler, tile: &Tile, pixels: &[usize]) -> Result<(), EmitError> {
    let (vectors, columns) = (tile.format.vectors(), tile.spec.columns);
    for &pixel in pixels {
        requantize::rescale(asm, tile, pixel)?;
    }
    let packed = narrow(asm, tile, pixels)?;
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
    let [lo, hi, t] = [0, 1, 2].map(|i| tile.temporary(i));
    set_masks(asm, tile)?;
    if let super::super::pack::EpilogueLayout::Float { lo: at_lo, hi: at_hi } = tile.layout.epilogue {
        asm.vmovups(lo, tile.param(at_lo, 0))?;
        asm.vmovups(hi, tile.param(at_hi, 0))?;
    }
    for pixel in 0..tile.spec.pixels() {
        for v in 0..tile.stored_vectors() {
            let x = tile.accumulator(pixel, v);
            if residual {
                add_residual(asm, tile, pixel, v)?;
            }
            // Bound first: of two zeros, or with a NaN, these return the second operand, as `Clamp::apply` does.
            if has_lo {
                asm.vmaxps(x, lo, x)?;
            }
            if has_hi {
                asm.vminps(x, hi, x)?;
            }
            store_floats(asm, tile, pixel, v, t)?;
        }
    }
    Ok(())
}

/// Adds the residual of a vector of floats.
pub(super) fn add_residual(
    asm: &mut Assembler,
    tile: &Tile,
    pixel: usize,
    v: usize,
) -> Result<(), EmitError> {
    let x = tile.accumulator(pixel, v);
    let from = displaced(r8, tile.spec.r_offsets[pixel], v * tile.format.vector_bytes())?;
    Ok(asm.vaddps(x, x, from)?)
}

/// Stores a vector of floats, or what of it are channels. Overwrites `t`.
pub(super) fn store_floats(
    asm: &mut Assembler,
    tile: &Tile,
    pixel: usize,
    v: usize,
    t: Reg,
) -> Result<(), EmitError> {
    let (lanes, vector) = (tile.format.lanes(), tile.format.vector_bytes());
    let bytes = 4 * lanes.min(tile.spec.columns - v * lanes);
    let to = displaced(rcx, tile.spec.y_offsets[pixel], v * vector)?;
    Ok(asm.store(to, tile.accumulator(pixel, v), 0, bytes, 4, t)?)
}
