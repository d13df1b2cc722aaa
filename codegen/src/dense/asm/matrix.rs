//! Matrix registers (AMX): the sum over K of 16 pixels × 16 channels at a time.
//!
//! A register has up to 16 rows of 64 bytes. A row of pixels' codes is 64 elements of K of one pixel, as they lie in
//! the image; a row of weights is a group of 4 elements of K for 16 channels, as they lie in a panel; a row of
//! accumulators is a pixel's 16 channels. So neither operand is copied, and accumulators lie as those of a vector of
//! 512 bits do: written to the stack, they are finished by the epilogue of vectors.
//!
//! The pixels of a tile are taken in *bands*: registers that start at one pixel and go on at a constant stride. All
//! bands have as many rows, because rows are part of a configuration that is slow to change; where the pixels are no
//! multiple, bands overlap, and what is computed twice is used once.

use super::{
    EmitError, Reg, Tile, displacement, run,
    vector::{Assembler, Emit},
};
use crate::dense::spec::Start;
use iced_x86::{IcedError, code_asm::*};

/// Rows of a register.
const MAX_ROWS: usize = 16;
/// Bytes of a row: 64 codes, or 16 accumulators.
pub(super) const ROW_BYTES: usize = 64;

const ACCUMULATORS: [AsmRegisterTmm; 4] = [tmm0, tmm1, tmm2, tmm3];
/// Two registers for each operand do, however many are loaded: they are renamed.
const PIXELS: [AsmRegisterTmm; 2] = [tmm4, tmm5];
const WEIGHTS: [AsmRegisterTmm; 2] = [tmm6, tmm7];

/// Bytes from a band's pixel to its next.
const PIXEL_STRIDE: AsmRegister64 = rbx;
/// Bytes of a panel's group, which is also what a pixel's accumulators take on the stack.
const PANEL_STRIDE: AsmRegister64 = r12;

/// The most pixels of a tile with this many vectors of channels.
pub(super) const fn max_pixels(vectors: usize) -> usize {
    max_bands(vectors) * MAX_ROWS
}

/// The most bands of a tile with this many vectors of channels.
pub(super) const fn max_bands(vectors: usize) -> usize {
    ACCUMULATORS.len() / vectors
}

/// Pixels of a tile as registers hold them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bands {
    /// Pixels of each band.
    pub(super) rows: usize,
    /// Bytes from one pixel to the next.
    stride: i32,
    /// Index of each band's first pixel, ascending.
    starts: Vec<usize>,
}

impl Bands {
    /// Splits pixels at these offsets into at most `most` bands; into such as are `configured`, if that is possible.
    pub(super) fn of(a_offsets: &[i32], most: usize, configured: usize) -> Option<Bands> {
        let stride = match a_offsets {
            [first, second, ..] => second.checked_sub(*first)?,
            _ => 0,
        };
        let mut runs: Vec<usize> = Vec::new();
        for (i, offset) in a_offsets.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if a_offsets[i - 1].checked_add(stride) == Some(*offset) => *run += 1,
                _ => runs.push(1),
            }
        }
        let rows = band_rows(&runs, most, configured)?;
        let mut starts = Vec::new();
        let mut first = 0;
        for run in runs {
            let count = run.div_ceil(rows);
            starts.extend((0..count).map(|i| first + (i * rows).min(run - rows)));
            first += run;
        }
        Some(Bands { rows, stride, starts })
    }

    /// Where the accumulators of a pixel lie among those of all bands.
    fn slot(&self, pixel: usize) -> usize {
        let band = self.starts.partition_point(|start| *start <= pixel).saturating_sub(1);
        band * self.rows + pixel - self.starts[band]
    }
}

/// Rows of at most `most` bands that cover `runs` of pixels: those that are configured if they do, or else as many as
/// the fewest bands need.
pub(super) fn band_rows(runs: &[usize], most: usize, configured: usize) -> Option<usize> {
    let longest = runs.iter().copied().min()?.min(MAX_ROWS);
    let bands = |rows: &usize| -> usize { runs.iter().map(|run| run.div_ceil(*rows)).sum() };
    let fits = |rows: &usize| (1..=longest).contains(rows) && bands(rows) <= most;
    Some(configured).filter(fits).or_else(|| (1..=longest).filter(fits).min_by_key(bands))
}

/// Emits `fn()`: configures registers for bands of `rows` pixels.
pub(super) fn enter(asm: &mut Assembler, rows: usize) -> Emit {
    // The function calls nothing: what lies below the stack pointer is its own.
    configure(&mut asm.asm, rsp - ROW_BYTES as i32, rows)
}

/// Writes a configuration for bands of `rows` pixels to 64 bytes at `at` and loads it. Overwrites rax and zmm0.
pub(crate) fn configure(asm: &mut CodeAssembler, at: AsmMemoryOperand, rows: usize) -> Emit {
    // The format of ldtilecfg: palette, 16-bit bytes of a row from byte 16 on, rows from byte 48 on.
    const PALETTE: u32 = 1;
    let row_bytes =
        u64::from_le_bytes([ROW_BYTES as u8, 0, ROW_BYTES as u8, 0, ROW_BYTES as u8, 0, ROW_BYTES as u8, 0]);
    let (pixels, weights) = (rows as u8, MAX_ROWS as u8);
    let rows = u64::from_le_bytes([pixels, pixels, pixels, pixels, pixels, pixels, weights, weights]);
    asm.vpxord(zmm0, zmm0, zmm0)?;
    asm.vmovups(zmmword_ptr(at), zmm0)?;
    asm.mov(dword_ptr(at), PALETTE)?;
    asm.mov(rax, row_bytes)?;
    asm.mov(qword_ptr(at + 16), rax)?;
    asm.mov(qword_ptr(at + 24), rax)?;
    asm.mov(rax, rows)?;
    asm.mov(qword_ptr(at + 48), rax)?;
    asm.ldtilecfg(ptr(at))
}

/// Registers that a tile uses and its caller keeps: the last three by runs of tiles.
const SAVED: [AsmRegister64; 5] = [PIXEL_STRIDE, PANEL_STRIDE, run::A, run::W, run::LEFT];

/// Those that a tile saves.
fn saved(tile: &Tile) -> &'static [AsmRegister64] {
    if tile.spec.next.is_some() { &SAVED } else { &SAVED[..2] }
}

/// Makes room for accumulators on the stack, sets strides, and configures if the bands ask for it.
pub(super) fn begin(asm: &mut Assembler, tile: &Tile, bands: &Bands) -> Emit {
    let panel_stride = tile.format.weight_bytes(1) as u32;
    let scratch = bands.starts.len() * bands.rows * tile.format.vectors() * ROW_BYTES;
    let a = &mut asm.asm;
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    for &register in saved(tile) {
        a.push(register)?;
    }
    a.sub(rsp, scratch as i32)?;
    a.and(rsp, -(ROW_BYTES as i32))?;
    a.mov(PIXEL_STRIDE, i64::from(bands.stride))?;
    a.mov(PANEL_STRIDE, u64::from(panel_stride))?;
    if bands.rows != tile.spec.configured {
        configure(&mut asm.asm, rsp + 0, bands.rows)?;
    }
    Ok(())
}

/// Undoes [`begin`].
pub(super) fn end(asm: &mut Assembler, tile: &Tile, bands: &Bands) -> Emit {
    match tile.spec.configured {
        configured if configured == bands.rows => {}
        0 => asm.asm.tilerelease()?,
        configured => configure(&mut asm.asm, rsp + 0, configured)?,
    }
    let (a, saved) = (&mut asm.asm, saved(tile));
    // They lie below rbp.
    a.lea(rsp, rbp - 8 * saved.len() as i32)?;
    for &register in saved.iter().rev() {
        a.pop(register)?;
    }
    a.pop(rbp)
}

/// Where the seventh argument lies, the grids of rows, behind [`begin`]: above rbp and the address to return to. The memory
/// is the tile's.
pub(super) fn grids() -> AsmMemoryOperand {
    rbp + 16
}

/// The accumulator of a band and a vector of the panel.
fn accumulator(tile: &Tile, band: usize, vector: usize) -> AsmRegisterTmm {
    ACCUMULATORS[band * tile.format.vectors() + vector]
}

/// Accumulators start from zero; what they should have started from is added when they are fetched. To load it into
/// them would take sixteen loads each.
pub(super) fn start_from_zero(asm: &mut Assembler, tile: &Tile, bands: &Bands) -> Emit {
    for band in 0..bands.starts.len() {
        for v in 0..tile.format.vectors() {
            asm.asm.tilezero(accumulator(tile, band, v))?;
        }
    }
    match tile.spec.start {
        Start::Params => Ok(()),
        // While rsi stands before them.
        Start::Weights => (0..tile.format.vectors()).try_for_each(|v| load_start(asm, tile, v)),
    }
}

/// Loads what is added to accumulators when they are fetched, if it is not loaded yet.
pub(super) fn load_starts(asm: &mut Assembler, tile: &Tile) -> Emit {
    match tile.spec.start {
        Start::Params => (0..tile.format.vectors()).try_for_each(|v| load_start(asm, tile, v)),
        Start::Weights => Ok(()),
    }
}

fn load_start(asm: &mut Assembler, tile: &Tile, v: usize) -> Emit {
    asm.vmovups(start(tile, v), tile.start(v))
}

/// What the accumulators of a vector of the panel start from: the last registers, which the epilogue leaves alone.
fn start(tile: &Tile, vector: usize) -> Reg {
    tile.temporary(tile.temporaries() - 1 - vector)
}

/// Step `s` of 64 elements of K behind rdi and rsi.
pub(super) fn step(asm: &mut Assembler, tile: &Tile, bands: &Bands, s: usize) -> Result<(), EmitError> {
    let a = displacement(0, s * ROW_BYTES)?;
    step_at(asm, tile, bands, a, s, &mut |_| Ok(()))
}

/// The step whose activations are at this displacement from rdi, and whose weights are those of step `s` behind rsi;
/// with something between products.
pub(super) fn step_at(
    asm: &mut Assembler,
    tile: &Tile,
    bands: &Bands,
    a: i32,
    s: usize,
    between: &mut dyn FnMut(&mut Assembler) -> Result<(), EmitError>,
) -> Result<(), EmitError> {
    let weight_bytes = tile.format.weight_bytes(tile.format.step_groups());
    for v in 0..tile.format.vectors() {
        let weights = WEIGHTS[v % WEIGHTS.len()];
        let at = rsi + PANEL_STRIDE + displacement(0, s * weight_bytes + v * ROW_BYTES)?;
        asm.asm.tileloadd(weights, ptr(at))?;
        for (band, &start) in bands.starts.iter().enumerate() {
            let pixels = PIXELS[band % PIXELS.len()];
            if v == 0 || bands.starts.len() > PIXELS.len() {
                let offset = tile.spec.a_offsets[start].checked_add(a).ok_or(EmitError::Displacement)?;
                asm.asm.tileloadd(pixels, ptr(rdi + PIXEL_STRIDE + offset))?;
            }
            asm.asm.tdpbusd(accumulator(tile, band, v), pixels, weights)?;
            between(asm)?;
        }
    }
    Ok(())
}

/// Products of a step.
pub(super) fn products(tile: &Tile, bands: &Bands) -> usize {
    bands.starts.len() * tile.format.vectors()
}

/// Writes all accumulators to the stack: those of a pixel one behind the other.
pub(super) fn spill(asm: &mut Assembler, tile: &Tile, bands: &Bands) -> Result<(), IcedError> {
    let band_bytes = bands.rows * tile.format.vectors() * ROW_BYTES;
    for band in 0..bands.starts.len() {
        for v in 0..tile.format.vectors() {
            let to = rsp + PANEL_STRIDE + (band * band_bytes + v * ROW_BYTES) as i32;
            asm.asm.tilestored(ptr(to), accumulator(tile, band, v))?;
        }
    }
    Ok(())
}

/// Loads a pixel's accumulators to the vectors that the epilogue expects.
pub(super) fn fetch(asm: &mut Assembler, tile: &Tile, bands: &Bands, pixel: usize) -> Emit {
    let vectors = tile.format.vectors();
    for v in 0..vectors {
        let from = rsp + ((bands.slot(pixel) * vectors + v) * ROW_BYTES) as i32;
        asm.vpaddd(tile.accumulator(pixel, v), start(tile, v), from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(rows: usize, cols: usize, row: i32, col: i32) -> Vec<i32> {
        (0..rows * cols).map(|i| (i / cols) as i32 * row + (i % cols) as i32 * col).collect()
    }

    fn bands(a_offsets: &[i32], most: usize, configured: usize) -> Option<(usize, Vec<usize>)> {
        Bands::of(a_offsets, most, configured).map(|b| (b.rows, b.starts))
    }

    #[test]
    fn pixels_are_split_into_as_few_bands_as_hold_them() {
        assert_eq!(bands(&offsets(1, 32, 0, 8), 2, 0), Some((16, vec![0, 16])));
        assert_eq!(bands(&offsets(1, 28, 0, 8), 2, 0), Some((14, vec![0, 14])));
        assert_eq!(bands(&offsets(2, 14, 500, 8), 2, 0), Some((14, vec![0, 14])));
        assert_eq!(bands(&[5], 1, 0), Some((1, vec![0])));
        // The last one starts early enough to end with the pixels.
        assert_eq!(bands(&offsets(1, 49, 0, 8), 4, 0), Some((13, vec![0, 13, 26, 36])));
        // Rows that follow each other at the same stride are one.
        assert_eq!(bands(&offsets(4, 4, 32, 8), 1, 0), Some((16, vec![0])));
    }

    #[test]
    fn the_configured_rows_are_kept_where_they_do() {
        assert_eq!(bands(&offsets(1, 20, 0, 8), 2, 16), Some((16, vec![0, 4])));
        assert_eq!(bands(&offsets(1, 20, 0, 8), 2, 0), Some((10, vec![0, 10])));
        assert_eq!(bands(&offsets(1, 7, 0, 8), 2, 16), Some((7, vec![0])));
    }

    #[test]
    fn what_needs_more_bands_is_refused() {
        assert_eq!(bands(&offsets(1, 33, 0, 8), 2, 0), None);
        assert_eq!(bands(&offsets(3, 7, 100, 8), 2, 0), None);
        assert_eq!(bands(&[], 4, 0), None);
    }

    #[test]
    fn a_pixel_of_two_bands_has_one_slot() {
        let bands = Bands::of(&offsets(1, 20, 0, 8), 2, 16).unwrap();
        let slots: Vec<usize> = (0..20).map(|p| bands.slot(p)).collect();
        let expected: Vec<usize> = (0..4).chain(16..32).collect();
        assert_eq!(slots, expected);
    }
}
