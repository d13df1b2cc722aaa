//! Pools over channels-last images: maxima, averages of f32, and averages of codes whose sums fit 16 bits.
//!
//! A unit is a row of the result. Its columns fall into runs whose windows meet the input in the same taps: one inside,
//! and a few at the borders. A function walks a run; it is emitted for the number of taps in a row, and gets the number
//! of rows.

use super::{define, width};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Emit, Reg, Width},
    kernels::{
        map::counted_loop,
        pool::{Axis, Constants, Geometry, Tables, affine, split, taps},
    },
    lower::Lowering,
    model::Work,
    module::Location,
};
use cranelift_codegen::ir::{InstBuilder, types::I64};
use iced_x86::{
    IcedError,
    code_asm::{r8, r9, r9d, r10, rax, rcx, rdi, rdx, rsi},
};
use qcc_ir::{
    DType, OutputGrid,
    numerics::{Multiplier, Rescaling},
    ops::AverageRescale,
};

/// What is made of a window.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    /// The largest element of f32, u8 or s8; NaN if one is.
    Max(DType),
    /// The sum of f32 in the order of the taps, divided by a count.
    Average,
    /// The sum of u8 codes, of at most 16 bits, as a code of the grid; constants are [`CodeAverage`]s.
    CodeAverage(OutputGrid, Rescaling),
}

/// How the sum of a window's codes becomes a code: the constants of a class of windows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeAverage {
    /// What is added to the sum: −zero point·taps.
    pub(crate) offset: i32,
    pub(crate) rescale: AverageRescale,
}

/// Offsets in the bytes of a [`CodeAverage`].
const AT_FACTOR: i32 = 4;
const AT_SHIFT: i32 = 16;
const AT_LIFTED: i32 = 24;
const AT_ZERO: i32 = 32;

impl CodeAverage {
    /// What a product is lifted by, so that a shift that ignores the sign does what one that keeps it does: products
    /// are within ±2^48, and 2^62 is a multiple of 2^n.
    const LIFT: i64 = 1 << 62;

    /// offset, m, 2^(n−1), n; then what the wide kernel adds before the shift and behind it. In floats: offset, factor, and
    /// in the last place the zero point.
    pub(crate) fn to_bytes(self, grid: OutputGrid) -> Vec<u8> {
        let Multiplier { m, n } = match self.rescale {
            AverageRescale::FixedPoint(multiplier) => multiplier,
            AverageRescale::Float(factor) => {
                let mut bytes = vec![0; 40];
                bytes[..4].copy_from_slice(&self.offset.to_le_bytes());
                bytes[AT_FACTOR as usize..][..4].copy_from_slice(&factor.to_le_bytes());
                bytes[AT_ZERO as usize..][..4].copy_from_slice(&grid.zero_point.to_le_bytes());
                return bytes;
            }
        };
        let half = 1i64 << (n - 1);
        let zero = grid.zero_point.wrapping_sub((CodeAverage::LIFT >> n) as i32);
        let mut bytes = Vec::with_capacity(40);
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(m.to_le_bytes());
        bytes.extend(half.to_le_bytes());
        bytes.extend(i64::from(n).to_le_bytes());
        bytes.extend((half + CodeAverage::LIFT).to_le_bytes());
        bytes.extend(i64::from(zero).to_le_bytes());
        bytes
    }
}

impl Kind {
    fn dtype(self) -> DType {
        match self {
            Kind::Max(dtype) => dtype,
            Kind::Average => DType::F32,
            Kind::CodeAverage(..) => DType::U8,
        }
    }
}

/// Neighbouring columns of the result with the same taps and constants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    /// The first column, and how many there are.
    first: i64,
    count: i64,
    /// Column of the first tap of the first window, and taps in a row.
    start: i64,
    taps: i64,
}

/// More runs than this are left to the general kernel.
const MAX_RUNS: usize = 9;

/// Cuts the columns of the result into runs, each within one class of constants.
fn runs(axis: &Axis, classes: &[u16]) -> Vec<Run> {
    let mut runs: Vec<(Run, i64, u16)> = Vec::new();
    for column in 0..axis.output {
        let origin = column * axis.stride - axis.pad;
        let up = |distance: i64| (distance.max(0) as u64).div_ceil(axis.dilation as u64) as i64;
        let skipped = up(-origin);
        let taps = (up(axis.input - origin).min(axis.kernel) - skipped).max(0);
        let class = classes.get(column as usize).copied().unwrap_or(0);
        match runs.last_mut() {
            Some((run, s, c)) if (run.taps, *s, *c) == (taps, skipped, class) => run.count += 1,
            _ => {
                let run = Run { first: column, count: 1, start: origin + skipped * axis.dilation, taps };
                runs.push((run, skipped, class));
            }
        }
    }
    runs.into_iter().map(|(run, ..)| run).collect()
}

/// Adds the step of a pool; `false` where it is one for the general kernel.
pub(crate) fn pool(
    cx: &mut Lowering,
    kernel: &str,
    geometry: &Geometry,
    (from, to): (Location, Location),
    kind: Kind,
    constants: &Constants,
    work: Work,
) -> Result<bool, CodegenError> {
    let Some(width) = width(cx.options.tier.isa) else { return Ok(false) };
    let pixel = geometry.channels as usize * kind.dtype().size();
    let runs = runs(&geometry.x, &constants.columns);
    let reach = geometry.x.kernel * geometry.x.dilation * geometry.from.pixel + pixel as i64;
    let strides = [geometry.y.dilation * geometry.from.row, geometry.x.stride * geometry.from.pixel];
    let is_small = strides.into_iter().chain([reach, geometry.to.pixel]).all(|s| i32::try_from(s).is_ok());
    let walk = Walk { width, kind, geometry: *geometry, pixel };
    if pixel < walk.span() || runs.len() > MAX_RUNS || !is_small {
        return Ok(false);
    }
    let mut functions = Vec::new();
    for run in &runs {
        if !functions.iter().any(|(taps, _)| *taps == run.taps) {
            let taps = run.taps;
            functions.push((taps, define(cx, &format!("{kernel}_run{taps}"), 5, move || walk.run(taps))));
        }
    }
    let tables = Tables::new(cx, constants)?;
    let Geometry { batch, y, from: source_pitch, to: target_pitch, .. } = *geometry;
    cx.step(kernel, (batch * y.output) as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let table = tables.map(|t| t.addresses(e, ctx));
        let callees: Vec<_> = functions.iter().map(|(taps, f)| (*taps, e.import(*f))).collect();
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let (image, oy) = split(b, unit, y.output);
            let (y_start, y_taps) = taps(b, &y, oy);
            let zero = b.ins().iconst(I64, 0);
            let y_taps = b.ins().smax(y_taps, zero);
            let p = affine(b, source, image, source_pitch.image);
            let p = affine(b, p, y_start, source_pitch.row);
            let q = affine(b, target, image, target_pitch.image);
            let q = affine(b, q, oy, target_pitch.row);
            for run in &runs {
                let column = b.ins().iconst(I64, run.first);
                let entry = match &table {
                    None => source,
                    Some(t) => t.entry(b, oy, column),
                };
                let p = b.ins().iadd_imm_s(p, run.start * source_pitch.pixel);
                let q = b.ins().iadd_imm_s(q, run.first * target_pitch.pixel);
                let count = b.ins().iconst(I64, run.count);
                for (_, callee) in callees.iter().filter(|(taps, _)| *taps == run.taps) {
                    b.ins().call(*callee, &[p, q, y_taps, count, entry]);
                }
            }
        });
        Ok(())
    })?;
    Ok(true)
}

/// Vectors of channels that are reduced together.
const VECTORS: usize = 4;

/// Accumulator v is register v; behind them what NaNs leave on 256 bits, and temporaries.
const NAN: usize = VECTORS;
const INITIAL: Reg = Reg(8);
const ONES: Reg = Reg(9);
const TAPS: [Reg; 2] = [Reg(10), Reg(11)];
const COUNT: Reg = Reg(12);

/// Registers of averages of codes; INITIAL is zero.
const OFFSET: Reg = Reg(4);
const FACTOR: Reg = Reg(5);
const LIFTED: Reg = Reg(6);
const SHIFT: Reg = Reg(7);
const ZERO: Reg = Reg(9);
const LEAST: Reg = Reg(12);
const MOST: Reg = Reg(13);
const ODD: Reg = Reg(14);

/// The function of a run: `fn(first tap, result, rows, columns, constants)`.
#[derive(Clone, Copy)]
struct Walk {
    width: Width,
    kind: Kind,
    geometry: Geometry,
    /// Bytes of the channels of a pixel, at least a vector.
    pixel: usize,
}

impl Walk {
    /// Bytes of the channels that one accumulator has.
    fn span(&self) -> usize {
        match self.kind {
            Kind::CodeAverage(..) => self.width.bytes() / 2,
            _ => self.width.bytes(),
        }
    }

    fn run(&self, taps: i64) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        self.constants(&mut asm)?;
        let vector = self.span();
        let block = VECTORS * vector;
        let whole = self.pixel / block;
        let mut column = asm.asm.create_label();
        asm.asm.set_label(&mut column)?;
        if whole > 0 {
            let mut channels = asm.asm.create_label();
            asm.asm.xor(r9d, r9d)?;
            asm.asm.set_label(&mut channels)?;
            let displacements: Vec<i32> = (0..VECTORS).map(|v| (v * vector) as i32).collect();
            self.block(&mut asm, taps, &displacements)?;
            asm.asm.add(r9, block as i32)?;
            asm.asm.cmp(r9, (whole * block) as i32)?;
            asm.asm.jb(channels)?;
        }
        if !self.pixel.is_multiple_of(block) {
            asm.asm.xor(r9d, r9d)?;
            // The last vector ends with the pixel.
            let rest = (whole * block..self.pixel).step_by(vector);
            let displacements: Vec<i32> = rest.map(|at| at.min(self.pixel - vector) as i32).collect();
            self.block(&mut asm, taps, &displacements)?;
        }
        let stride = self.geometry.x.stride * self.geometry.from.pixel;
        asm.asm.add(rdi, stride as i32)?;
        asm.asm.add(rsi, self.geometry.to.pixel as i32)?;
        asm.asm.dec(rcx)?;
        asm.asm.jnz(column)?;
        asm.finish()
    }

    fn constants(&self, asm: &mut Assembler) -> Emit {
        let initial = match self.kind {
            Kind::Max(DType::F32) => f32::NEG_INFINITY.to_bits(),
            Kind::Max(DType::S8) => 0x8080_8080,
            Kind::Max(_) | Kind::Average | Kind::CodeAverage(..) => 0,
        };
        asm.splat(INITIAL, initial)?;
        match self.kind {
            Kind::Max(DType::F32) => asm.splat(ONES, u32::MAX),
            Kind::Average => asm.vbroadcastss(COUNT, r8.into()),
            Kind::CodeAverage(grid, _) => {
                // What `rescale` merges by.
                asm.set_masks(1)?;
                let words = |x: i32| u32::from(x as u16) << 16 | u32::from(x as u16);
                asm.splat(LEAST, words(grid.lo))?;
                asm.splat(MOST, words(grid.hi))?;
                asm.vpbroadcastd(OFFSET, r8.into())?;
                asm.vpbroadcastd(FACTOR, r8 + AT_FACTOR)?;
                asm.broadcast_wide(SHIFT, r8 + AT_SHIFT)?;
                asm.broadcast_wide(LIFTED, r8 + AT_LIFTED)?;
                asm.vpbroadcastd(ZERO, r8 + AT_ZERO)
            }
            Kind::Max(_) => Ok(()),
        }
    }

    /// Reduces and stores the vectors at these displacements from the channel r9.
    fn block(&self, asm: &mut Assembler, taps: i64, displacements: &[i32]) -> Emit {
        let checks_nan = self.kind == Kind::Max(DType::F32);
        for v in 0..displacements.len() {
            asm.vmovaps(Reg(v), INITIAL)?;
            if checks_nan {
                asm.clear_mask(v, Reg(NAN + v))?;
            }
        }
        let mut rows = asm.asm.create_label();
        let mut finish = asm.asm.create_label();
        asm.asm.lea(rax, rdi + r9)?;
        asm.asm.mov(r10, rdx)?;
        asm.asm.test(r10, r10)?;
        asm.asm.jz(finish)?;
        asm.asm.set_label(&mut rows)?;
        let distance = self.geometry.x.dilation * self.geometry.from.pixel;
        for (v, &at) in displacements.iter().enumerate() {
            let places: Vec<i32> = (0..taps).map(|t| (t * distance) as i32 + at).collect();
            match checks_nan {
                true => max_f32(asm, v, &places)?,
                false => self.plain(asm, Reg(v), &places)?,
            }
        }
        asm.asm.add(rax, (self.geometry.y.dilation * self.geometry.from.row) as i32)?;
        asm.asm.dec(r10)?;
        asm.asm.jnz(rows)?;
        asm.asm.set_label(&mut finish)?;
        for (v, &at) in displacements.iter().enumerate() {
            if checks_nan {
                asm.set_masked(Reg(v), v, Reg(NAN + v), ONES)?;
            }
            if let Kind::CodeAverage(grid, rescaling) = self.kind {
                rescale(asm, Reg(v), rescaling)?;
                asm.store_words_as_bytes(rsi + r9 + at, Reg(v), grid.dtype == DType::S8)?;
                continue;
            }
            if self.kind == Kind::Average {
                asm.vdivps(Reg(v), Reg(v), COUNT)?;
            }
            let vector = self.width.bytes();
            asm.store(rsi + r9 + at, Reg(v), 0, vector, self.kind.dtype().size(), TAPS[0])?;
        }
        Ok(())
    }

    fn plain(&self, asm: &mut Assembler, sum: Reg, places: &[i32]) -> Emit {
        for &at in places {
            match self.kind {
                Kind::Max(DType::S8) => asm.vpmaxsb(sum, sum, rax + at)?,
                Kind::Max(_) => asm.vpmaxub(sum, sum, rax + at)?,
                Kind::Average => asm.vaddps(sum, sum, rax + at)?,
                Kind::CodeAverage(..) => {
                    asm.load_codes_as_words(TAPS[0], rax + at)?;
                    asm.vpaddw(sum, sum, TAPS[0])?;
                }
            }
        }
        Ok(())
    }
}

/// Sums of 16 bits as codes of 16 bits: [`AverageRescale::apply`] (in integers on even and odd elements), zero point and
/// bounds.
fn rescale(asm: &mut Assembler, sums: Reg, rescaling: Rescaling) -> Emit {
    let [low, high] = TAPS;
    asm.vpunpcklwd(low, sums, INITIAL)?;
    asm.vpunpckhwd(high, sums, INITIAL)?;
    for x in [low, high] {
        asm.vpaddd(x, x, OFFSET)?;
        match rescaling {
            Rescaling::FixedPoint => {
                asm.vpsrlq(ODD, x, 32)?;
                for half in [x, ODD] {
                    asm.vpmuldq(half, half, FACTOR)?;
                    asm.vpaddq(half, half, LIFTED)?;
                    asm.shift_right_wide_by(half, half, SHIFT)?;
                }
                asm.merge_even_as_odd(x, ODD)?;
            }
            Rescaling::Float => {
                asm.vcvtdq2ps(x, x)?;
                asm.vmulps(x, x, FACTOR)?;
                asm.vcvtps2dq(x, x)?;
            }
        }
        asm.vpaddd(x, x, ZERO)?;
    }
    asm.vpackssdw(sums, low, high)?;
    asm.vpmaxsw(sums, sums, LEAST)?;
    asm.vpminsw(sums, sums, MOST)
}

/// Like `if x > max { x } else { max }` for each tap; one comparison finds the NaNs of two.
fn max_f32(asm: &mut Assembler, v: usize, places: &[i32]) -> Emit {
    for pair in places.chunks(2) {
        for (&x, &at) in TAPS.iter().zip(pair) {
            asm.vmovups(x, rax + at)?;
            asm.vmaxps(Reg(v), x, Reg(v))?;
        }
        asm.mask_unordered(v, Reg(NAN + v), TAPS[0], TAPS[pair.len() - 1])?;
    }
    Ok(())
}
