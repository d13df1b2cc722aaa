//! From planes to pixels: the elements of up to four channels, each a plane of f32, side by side for every pixel, as
//! they are or as codes of 8 bits. Every model that takes images channels first begins with it.

use super::{define, width};
use crate::{
    CodegenError,
    dense::asm::vector::{Assembler, Reg, Width},
    kernels::map::{self, View, counted_loop},
    lower::Lowering,
    model::Work,
    module::Location,
};
use cranelift_codegen::ir::{InstBuilder, condcodes::IntCC, types::I64};
use iced_x86::{
    IcedError,
    code_asm::{
        AsmMemoryOperand, AsmRegisterK, AsmRegisterZmm, eax, edx, k1, k2, k3, k4, k5, k6, rcx, rdi, rdx, rsi,
        zmmword_ptr,
    },
};
use qcc_ir::{DType, QuantParams};

/// Pixels of one unit of work where rows are long.
const CHUNK: i64 = 2048;

/// Four vectors of 32-bit lanes become one of bytes.
const SLOTS: usize = 4;

/// The most channels.
const MAX_CHANNELS: usize = SLOTS;

/// Planes of f32 to pixels.
#[derive(Clone)]
pub(crate) struct Planes {
    width: Width,
    channels: usize,
    /// Bytes between planes.
    plane: i32,
    /// Pixels of a row.
    pixels: i64,
    /// Everything around rows: extents, and strides of planes and of pixels.
    outer: Vec<u64>,
    strides: [Vec<i64>; 2],
    element: usize,
}

impl Planes {
    /// `None` where the views are nothing of the kind, or the tier has no wide vectors.
    pub(crate) fn new(cx: &Lowering, dims: &[usize], from: &View, to: &View) -> Option<Planes> {
        let width = width(cx.options.tier.isa)?;
        let mut merged = map::merged(dims, &[from, to])?;
        let (float, element) = (size_of::<f32>() as i64, to.size());
        // Channels follow each other in the result, and pixels in a plane.
        let channel = merged
            .iter()
            .position(|(n, s)| (2..=MAX_CHANNELS as u64).contains(n) && s[1] == element && s[0] != float);
        let (channels, plane) = match channel {
            Some(at) => {
                let (n, s) = merged.remove(at);
                (n as usize, s[0])
            }
            None => (1, 0),
        };
        let pixel = channels as i64 * element;
        let row = merged.iter().position(|(_, s)| s[0] == float && s[1] == pixel)?;
        let (pixels, _) = merged.remove(row);
        let planes = Planes {
            width,
            channels,
            plane: i32::try_from(plane * (MAX_CHANNELS as i64)).ok().map(|_| plane as i32)?,
            pixels: pixels as i64,
            outer: merged.iter().map(|(n, _)| *n).collect(),
            strides: [0, 1].map(|v| merged.iter().map(|(_, s)| s[v]).collect()),
            element: element as usize,
        };
        (planes.pixels >= planes.block() as i64).then_some(planes)
    }

    /// Channels, of which each is a plane.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    fn lanes(&self) -> usize {
        self.width.bytes() / size_of::<f32>()
    }

    /// Vectors of neighbouring pixels of one channel in a block.
    fn vectors(&self) -> usize {
        match (self.element, self.channels) {
            (1, 1) => 4,
            (1, 2) => 2,
            _ => 1,
        }
    }

    /// Pixels of a block.
    fn block(&self) -> usize {
        self.vectors() * self.lanes()
    }

    /// Adds the step: `code` gives the function of a row, `fn(planes, pixels, count, constants)`.
    fn step(
        &self,
        cx: &mut Lowering,
        kernel: &str,
        (from, to): (&View, &View),
        code: impl FnOnce(&Planes) -> Result<Vec<u8>, IcedError> + Send + 'static,
        constants: &[u8],
        work: Work,
    ) -> Result<(), CodegenError> {
        let planes = self.clone();
        let function = define(cx, &format!("{kernel}_row"), 4, move || code(&planes));
        let constants = Location::Weights(cx.weights(constants, 64)?);
        let chunks = (self.pixels / CHUNK).max(1);
        let units = self.outer.iter().product::<u64>() * chunks as u64;
        let pixel = (self.channels * self.element) as i64;
        cx.step(kernel, units, work, |e, ctx, begin, end| {
            let bases = [from, to].map(|v| {
                let base = e.address(ctx, v.location);
                map::offset(&mut e.b, base, v.offset)
            });
            let constants = e.address(ctx, constants);
            let function = e.import(function);
            counted_loop(&mut e.b, begin, end, |b, unit| {
                let row = b.ins().udiv_imm_u(unit, chunks);
                let whole = b.ins().imul_imm_s(row, chunks);
                let chunk = b.ins().isub(unit, whole);
                let at = map::located(b, row, &self.outer, &self.strides, &bases);
                let from = map::advanced(b, at[0], chunk, CHUNK * size_of::<f32>() as i64);
                let to = map::advanced(b, at[1], chunk, CHUNK * pixel);
                // The last chunk takes what is left: at least a chunk, less than two.
                let last = b.ins().icmp_imm_s(IntCC::Equal, chunk, chunks - 1);
                let rest = b.ins().iconst(I64, self.pixels - (chunks - 1) * CHUNK);
                let chunk = b.ins().iconst(I64, CHUNK);
                let count = b.ins().select(last, rest, chunk);
                b.ins().call(function, &[from, to, count, constants]);
            });
            Ok(())
        })
    }

    /// The loop over blocks of a row of at least one; the last block may overlap the one before.
    fn row(
        &self,
        asm: &mut Assembler,
        block: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let pixels = self.block() as i32;
        let pixel = (self.channels * self.element) as i32;
        let mut head = asm.asm.create_label();
        let mut done = asm.asm.create_label();
        asm.asm.set_label(&mut head)?;
        block(asm)?;
        asm.asm.sub(rdx, pixels)?;
        asm.asm.jz(done)?;
        asm.asm.add(rdi, pixels * size_of::<f32>() as i32)?;
        asm.asm.add(rsi, pixels * pixel)?;
        asm.asm.cmp(rdx, pixels)?;
        asm.asm.jae(head)?;
        // Back by what the last block would have too much.
        asm.asm.sub(rdx, pixels)?;
        asm.asm.lea(rdi, rdi + rdx * 4)?;
        asm.asm.imul_3(rdx, rdx, pixel)?;
        asm.asm.add(rsi, rdx)?;
        asm.asm.mov(edx, pixels)?;
        asm.asm.jmp(head)?;
        asm.asm.set_label(&mut done)
    }
}

/// A grid of 8-bit codes, one for all elements.
#[derive(Clone, Copy)]
pub(crate) struct CodeGrid {
    dtype: DType,
    scale: f32,
    zero_point: i32,
    /// The range of `dtype`.
    lo: i32,
    hi: i32,
}

impl CodeGrid {
    /// `None` of other grids, and where a step beyond the range is no finite number.
    pub(crate) fn new(params: &QuantParams, dtype: DType) -> Option<CodeGrid> {
        let (lo, hi) = match dtype {
            DType::U8 => (0, 255),
            DType::S8 => (-128, 127),
            _ => return None,
        };
        let (scale, zero_point) = params.axis().is_none().then(|| params.at(0))?;
        let grid = CodeGrid { dtype, scale, zero_point, lo, hi };
        [lo - 1, hi + 1].into_iter().all(|q| grid.real(q).is_finite()).then_some(grid)
    }

    fn real(&self, q: i32) -> f32 {
        (q - self.zero_point) as f32 * self.scale
    }
}

/// Whether for every x the nearest integer of q + (x − q·s)·r, where r = 1/s and q = x·r are rounded, is that of the
/// quotient x/s rounded to f32, as far as the bounds let it be seen.
///
/// Before its last rounding the refined quotient is off by less than 2^−21 of its last place: q by two places at most,
/// of which the two factors of the correction lose 2^−24 each. So it can round to another float than the quotient only
/// where that lies as close to the middle between two floats, and that float can have another nearest integer only if
/// one of the two is a half-integer. There are few such middles, and x is a float: it suffices to look at the float
/// next to middle·s.
fn reciprocal_is_exact(grid: &CodeGrid) -> bool {
    // Far from under- and overflow of all that is computed.
    let bounds = 2f32.powi(-60)..2f32.powi(60);
    let s = f64::from(grid.scale);
    let halves = grid.lo - grid.zero_point - 1..=grid.hi - grid.zero_point;
    bounds.contains(&grid.scale)
        && halves.map(|k| k as f32 + 0.5).all(|half| {
            [half.next_down(), half.next_up()].into_iter().all(|next| {
                let place = (f64::from(next) - f64::from(half)).abs();
                // Exact: 24 bits by 25.
                let x = (f64::from(next) + f64::from(half)) / 2.0 * s;
                (f64::from(x as f32) - x).abs() > s * place * 2f64.powi(-20)
            })
        })
}

/// Registers of [`quantize`] behind the four vectors that become bytes.
const LEAST: Reg = Reg(4);
const MOST: Reg = Reg(5);
const FACTOR: Reg = Reg(6);
const SCALE: Reg = Reg(7);
const ZERO: Reg = Reg(8);
const PICK: Reg = Reg(9);
const ORDER: Reg = Reg(10);
const QUOTIENT: Reg = Reg(11);

/// Adds a step that quantizes planes to pixels.
pub(crate) fn quantize(
    cx: &mut Lowering,
    planes: &Planes,
    views: (&View, &View),
    grid: &CodeGrid,
    work: Work,
) -> Result<(), CodegenError> {
    let own = *grid;
    let code = move |planes: &Planes| planes.quantize_row(&own, reciprocal_is_exact(&own));
    planes.step(cx, "quantize", views, code, &planes.quantize_constants(grid), work)
}

impl Planes {
    /// Bytes that a block of codes has.
    fn stored(&self) -> usize {
        self.block() * self.channels
    }

    fn slot(&self, i: usize) -> AsmMemoryOperand {
        // With three channels the last slot is never stored.
        let (plane, vector) = (i % self.channels, i / self.channels);
        let vector = vector % self.vectors();
        rdi + (plane as i32 * self.plane + (vector * self.width.bytes()) as i32)
    }

    /// `fn(planes, pixels, count, constants)`: clamps far enough out that rounding cannot tell, divides, rounds, packs
    /// four vectors into one of bytes, and brings these into order.
    fn quantize_row(&self, grid: &CodeGrid, has_reciprocal: bool) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        for (i, reg) in [LEAST, MOST, FACTOR, SCALE, ZERO, PICK, ORDER].into_iter().enumerate() {
            asm.vmovups(reg, rcx + i * self.width.bytes())?;
        }
        asm.set_masks(self.stored() / size_of::<u32>())?;
        self.row(&mut asm, |asm| {
            let slots: Vec<Reg> = (0..SLOTS).map(Reg).collect();
            let used = if self.channels == 3 { 3 } else { SLOTS };
            for (i, &x) in slots[..used].iter().enumerate() {
                // NaN passes the first and becomes the lower bound in the second.
                asm.vminps(x, MOST, self.slot(i))?;
                asm.vmaxps(x, x, LEAST)?;
                if has_reciprocal {
                    asm.vmulps(QUOTIENT, x, FACTOR)?;
                    asm.vfnmadd231ps(x, QUOTIENT, SCALE)?;
                    asm.vfmadd132ps(x, QUOTIENT, FACTOR)?;
                } else {
                    asm.vdivps(x, x, SCALE)?;
                }
                asm.vcvtps2dq(x, x)?;
            }
            let last = slots[used - 1];
            asm.vpackssdw(slots[0], slots[0], slots[1])?;
            asm.vpackssdw(slots[2], slots[2], last)?;
            asm.vpaddsw(slots[0], slots[0], ZERO)?;
            asm.vpaddsw(slots[2], slots[2], ZERO)?;
            match grid.dtype {
                DType::S8 => asm.vpacksswb(slots[0], slots[0], slots[2])?,
                _ => asm.vpackuswb(slots[0], slots[0], slots[2])?,
            }
            asm.vpshufb(slots[0], slots[0], PICK)?;
            asm.vpermd(slots[0], ORDER, slots[0])?;
            asm.store(rsi.into(), slots[0], 0, self.stored(), size_of::<u32>(), slots[1])
        })?;
        asm.finish()
    }

    fn quantize_constants(&self, grid: &CodeGrid) -> Vec<u8> {
        let lanes = self.lanes();
        let float = |x: f32| x.to_le_bytes().repeat(lanes);
        let zero = (grid.zero_point as i16).to_le_bytes().repeat(2 * lanes);
        // A packed 128-bit lane l holds four pixels of each slot: byte 4·slot + pixel.
        let pick: Vec<u8> = (0..16u8)
            .map(|byte| match self.channels {
                1 => byte,
                2 => byte / 8 * 8 + byte % 2 * 4 + byte % 8 / 2,
                3 if byte >= 12 => 0x80,
                n => byte % n as u8 * 4 + byte / n as u8,
            })
            .collect();
        let groups = lanes / 4;
        // Dwords in the order of pixels; those of the fourth slot of three channels come last and are not stored.
        let order = (0..lanes).map(|d| match self.channels {
            1 => d % groups * 4 + d / groups,
            2 => (d / 2 % groups * 2 + d / 2 / groups) * 2 + d % 2,
            3 if d < 3 * groups => d / 3 * 4 + d % 3,
            3 => (d - 3 * groups) * 4 + 3,
            _ => d,
        });
        [
            float(grid.real(grid.lo - 1)),
            float(grid.real(grid.hi + 1)),
            float(1.0 / grid.scale),
            float(grid.scale),
            zero,
            pick.repeat(groups),
            order.flat_map(|d| (d as u32).to_le_bytes()).collect(),
        ]
        .concat()
    }
}

/// Adds a step that copies planes of f32 to pixels.
pub(crate) fn interleave(
    cx: &mut Lowering,
    kernel: &str,
    planes: &Planes,
    views: (&View, &View),
    work: Work,
) -> Result<(), CodegenError> {
    planes.step(cx, kernel, views, Planes::interleave_row, &planes.interleave_constants(), work)
}

/// Masks of the lanes that a plane contributes, on 512 bits: two for each of three vectors are the most.
const MASKS: [AsmRegisterK; 6] = [k1, k2, k3, k4, k5, k6];

/// The register, written where mask `i` of [`MASKS`] has ones.
fn masked(register: AsmRegisterZmm, i: usize) -> AsmRegisterZmm {
    match i {
        0 => register.k1(),
        1 => register.k2(),
        2 => register.k3(),
        3 => register.k4(),
        4 => register.k5(),
        _ => register.k6(),
    }
}

impl Planes {
    /// Lanes of result vector `vector` that hold the elements of a channel.
    fn lanes_of(&self, vector: usize, channel: usize) -> u32 {
        let first = vector * self.lanes();
        (0..self.lanes()).filter(|l| (first + l) % self.channels == channel).map(|l| 1 << l).sum()
    }

    /// `fn(planes, pixels, count, constants)`: each result vector takes its lanes of every channel from a permutation.
    fn interleave_row(&self) -> Result<Vec<u8>, IcedError> {
        let mut asm = Assembler::new(self.width)?;
        let mut masks: Vec<u32> = Vec::new();
        for vector in 0..self.channels {
            for channel in 1..self.channels {
                let lanes = self.lanes_of(vector, channel);
                if self.width == Width::Zmm && !masks.contains(&lanes) {
                    asm.asm.mov(eax, lanes)?;
                    asm.asm.kmovw(MASKS[masks.len()], eax)?;
                    masks.push(lanes);
                }
            }
        }
        let (sum, own, order) = (Reg(0), Reg(1), Reg(2));
        self.row(&mut asm, |asm| {
            for vector in 0..self.channels {
                let at = |v: usize| rcx + v * self.width.bytes();
                asm.vmovups(order, at(vector))?;
                asm.vpermps(sum, order, rdi + 0)?;
                for channel in 1..self.channels {
                    // Pixel of each lane is the same whatever its channel.
                    let plane = rdi + channel as i32 * self.plane;
                    let lanes = self.lanes_of(vector, channel);
                    match masks.iter().position(|&m| m == lanes) {
                        Some(m) => {
                            asm.asm.vpermps(masked(sum.zmm(), m), order.zmm(), zmmword_ptr(plane))?;
                        }
                        None => {
                            asm.vpermps(own, order, plane)?;
                            asm.asm.vblendps(sum.ymm(), sum.ymm(), own.ymm(), lanes)?;
                        }
                    }
                }
                let all = self.width.bytes();
                asm.store(rsi + vector * all, sum, 0, all, size_of::<f32>(), own)?;
            }
            Ok(())
        })?;
        asm.finish()
    }

    /// For each result vector the pixel, within the block, of each lane.
    fn interleave_constants(&self) -> Vec<u8> {
        let lanes = self.lanes();
        let pixels = (0..self.channels * lanes).map(|e| e / self.channels);
        pixels.flat_map(|p| (p as u32).to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The refined quotient in the order of the kernel.
    fn refined(x: f32, s: f32) -> f32 {
        let r = 1.0 / s;
        let q = x * r;
        (-q).mul_add(s, x).mul_add(r, q).round_ties_even()
    }

    #[test]
    fn refined_quotients_round_like_quotients_where_the_check_says_so() {
        let mut seed = 7u32;
        let mut refused = 0;
        for _ in 0..400 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let s = f32::from_bits(0x3c00_0000 + (seed >> 8));
            let grid = CodeGrid { dtype: DType::U8, scale: s, zero_point: 114, lo: 0, hi: 255 };
            if !reciprocal_is_exact(&grid) {
                refused += 1;
                continue;
            }
            for half in -115..=141 {
                // The floats around each point where the code changes.
                let mut x = (half as f32 + 0.5) * s;
                (0..6).for_each(|_| x = x.next_down());
                for _ in 0..13 {
                    assert_eq!(refined(x, s), (x / s).round_ties_even(), "{x} / {s}");
                    x = x.next_up();
                }
            }
        }
        assert!(refused < 40, "{refused} of 400 scales are refused");
    }

    #[test]
    fn scales_near_the_ends_of_the_range_divide() {
        for scale in [f32::MIN_POSITIVE, 1e-40, 1e30, f32::MAX] {
            let grid = CodeGrid { dtype: DType::U8, scale, zero_point: 0, lo: 0, hi: 255 };
            assert!(!reciprocal_is_exact(&grid), "{scale}");
        }
    }
}
