//! Accumulators to floats: the vector form of [`Dequantizer::apply`](qcc_ir::numerics::Dequantizer::apply).

use super::{EmitError, Tile, displaced, matrix, store, vector::Assembler};
use crate::dense::{
    pack::EpilogueLayout,
    spec::{EpilogueForm, RowGrid},
};
use iced_x86::code_asm::{AsmRegister64, qword_ptr, rax, rsp};

/// The grids of the tile's rows. Nothing else is counted in it any more.
const GRIDS: AsmRegister64 = rax;

/// Makes floats of the accumulators of these pixels and stores them.
pub(super) fn pixels(asm: &mut Assembler, tile: &Tile, pixels: &[usize]) -> Result<(), EmitError> {
    let (
        EpilogueForm::Dequantize { zero_points, bias, lo, hi, residual },
        EpilogueLayout::Dequantize { sums, scale, bias: at_bias, lo: at_lo, hi: at_hi },
    ) = (tile.spec.epilogue, &tile.layout.epilogue)
    else {
        return Err(EmitError::Epilogue(tile.spec.product));
    };
    let [of_row, zero, t] = [0, 1, 2].map(|i| tile.temporary(i));
    // Above the address to return to; tiles of matrix registers have moved the stack pointer.
    let argument = if tile.bands.is_some() { matrix::grids() } else { rsp + 8 };
    asm.asm.mov(GRIDS, qword_ptr(argument))?;
    for &pixel in pixels {
        let grid = tile.spec.g_offsets[pixel];
        asm.vbroadcastss(of_row, displaced(GRIDS, grid, 0)?)?;
        if zero_points {
            asm.vpbroadcastd(zero, displaced(GRIDS, grid, RowGrid::ZERO_POINT)?)?;
        }
        for v in 0..tile.stored_vectors() {
            let x = tile.accumulator(pixel, v);
            if zero_points {
                asm.vpmulld(t, zero, tile.param(*sums, v))?;
                asm.vpsubd(x, x, t)?;
            }
            asm.vcvtdq2ps(x, x)?;
            asm.vmulps(t, of_row, tile.param(*scale, v))?;
            asm.vmulps(x, x, t)?;
            if bias {
                asm.vaddps(x, x, tile.param(*at_bias, v))?;
            }
            if residual {
                store::add_residual(asm, tile, pixel, v)?;
            }
            // Bound first, as in `store::floats`.
            if lo {
                asm.vmovups(t, tile.param(*at_lo, 0))?;
                asm.vmaxps(x, t, x)?;
            }
            if hi {
                asm.vmovups(t, tile.param(*at_hi, 0))?;
                asm.vminps(x, t, x)?;
            }
            store::store_floats(asm, tile, pixel, v, t)?;
        }
    }
    Ok(())
}
