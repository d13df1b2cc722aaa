//! Accumulators to floats: the vector form of [`Dequantizer::apply`](qcc_ir::numerics::Dequantizer::apply).

use super::{
    EmitError, Tile, displaced, matrix, store,
    vector::{Assembler, Emit, Width},
};
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
        EpilogueForm::Dequantize { grids, bias, lo, hi, residual },
        EpilogueLayout::Dequantize { sums, scale, bias: at_bias, lo: at_lo, hi: at_hi },
    ) = (tile.spec.epilogue, &tile.layout.epilogue)
    else {
        return Err(EmitError::Epilogue(tile.spec.product));
    };
    let [of_row, zero, t] = [0, 1, 2].map(|i| tile.temporary(i));
    if grids.has_scales() {
        // Above the address to return to; others have moved the stack pointer.
        let argument = if tile.bands.is_some() || tile.is_strip { matrix::grids() } else { rsp + 8 };
        asm.asm.mov(GRIDS, qword_ptr(argument))?;
    }
    for &pixel in pixels {
        if tile.is_strip {
            to_natural_order(asm, tile, pixel)?;
        }
        if grids.has_scales() {
            asm.vbroadcastss(of_row, displaced(GRIDS, tile.spec.g_offsets[pixel], 0)?)?;
        }
        if grids.has_zero_points() {
            asm.vpbroadcastd(zero, displaced(GRIDS, tile.spec.g_offsets[pixel], RowGrid::ZERO_POINT)?)?;
        }
        for v in 0..tile.stored_vectors() {
            let x = tile.accumulator(pixel, v);
            if grids.has_zero_points() {
                asm.vpmulld(t, zero, tile.param(*sums, v))?;
                asm.vpsubd(x, x, t)?;
            }
            asm.vcvtdq2ps(x, x)?;
            if grids.has_scales() {
                asm.vmulps(t, of_row, tile.param(*scale, v))?;
                asm.vmulps(x, x, t)?;
            } else {
                asm.vmulps(x, x, tile.param(*scale, v))?;
            }
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

/// Brings the accumulators of a pixel from the [order of codes](crate::dense::pack::PanelFormat::channel_of_column) into that of
/// channels: 128-bit lane l of vector v becomes lane v + vectors·l, counted over all vectors.
fn to_natural_order(asm: &mut Assembler, tile: &Tile, pixel: usize) -> Emit {
    let x = |v: usize| tile.accumulator(pixel, v);
    let [t, u] = [0, 1].map(|i| tile.temporary(i));
    match (asm.width, tile.format.vectors()) {
        (_, 1) => {}
        (Width::Ymm, vectors) => {
            // Lower lanes of neighbours, then their upper ones.
            for v in (0..vectors).step_by(2) {
                let (a, b) = (x(v), x(v + 1));
                asm.vmovaps(t, a)?;
                asm.asm.vperm2i128(a.ymm(), t.ymm(), b.ymm(), 0x20)?;
                asm.asm.vperm2i128(b.ymm(), t.ymm(), b.ymm(), 0x31)?;
            }
            if vectors == 4 {
                asm.vmovaps(t, x(1))?;
                asm.vmovaps(x(1), x(2))?;
                asm.vmovaps(x(2), t)?;
            }
        }
        (Width::Zmm, 2) => {
            let (a, b) = (x(0).zmm(), x(1).zmm());
            asm.asm.vshuff64x2(t.zmm(), a, b, 0x44)?;
            asm.asm.vshuff64x2(b, a, b, 0xee)?;
            asm.asm.vshuff64x2(a, t.zmm(), t.zmm(), 0xd8)?;
            asm.asm.vshuff64x2(b, b, b, 0xd8)?;
        }
        (Width::Zmm, _) => {
            let [a, b, c, d, t, u] = [x(0), x(1), x(2), x(3), t, u].map(|r| r.zmm());
            for (low, first, second) in [(t, a, b), (u, c, d)] {
                asm.asm.vshuff64x2(low, first, second, 0x44)?;
                asm.asm.vshuff64x2(first, first, second, 0xee)?;
            }
            // The upper result first: it takes the place of what is not read any more.
            for (lower, upper, first, second) in [(c, d, a, c), (a, b, t, u)] {
                asm.asm.vshuff64x2(upper, first, second, 0xdd)?;
                asm.asm.vshuff64x2(lower, first, second, 0x88)?;
            }
        }
    }
    Ok(())
}
