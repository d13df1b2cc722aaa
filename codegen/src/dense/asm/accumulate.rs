//! The sum over K: bias, then groups of K in the order of the loops.

use super::{
    EmitError, Tile, displaced, matrix,
    vector::{Assembler, Emit, Reg},
};
use crate::{dense::spec::Product, tier::Isa};
use iced_x86::code_asm::*;

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
    /// The even or the odd 2 of 4 codes by 2 weights, summed in a temporary.
    Pairs { odd: bool },
    /// One float.
    MultiplyAdd,
}

pub(super) fn emit(asm: &mut Assembler, tile: &Tile) -> Result<(), EmitError> {
    start_from_bias(asm, tile)?;
    let loops: Vec<(u32, i32)> = tile.spec.loops.iter().copied().filter(|l| l.0 != 1).collect();
    if loops.len() > COUNTERS.len() {
        return Err(EmitError::Loops(loops.len()));
    }
    let mut tops = vec![];
    for (&(trips, _), counter) in loops.iter().zip(COUNTERS) {
        asm.asm.mov(counter, trips)?;
        let mut top = asm.asm.create_label();
        asm.asm.set_label(&mut top)?;
        tops.push(top);
    }
    let mut moved = i64::from(run(asm, tile, !loops.is_empty())?);
    for ((&(trips, stride), top), counter) in loops.iter().zip(tops).zip(COUNTERS).rev() {
        advance(asm, rdi, i64::from(stride) - moved)?;
        asm.asm.dec(counter)?;
        asm.asm.jne(top)?;
        moved = i64::from(trips) * i64::from(stride);
    }
    Ok(())
}

fn start_from_bias(asm: &mut Assembler, tile: &Tile) -> Emit {
    if let Some(bands) = &tile.bands {
        return matrix::start_from_bias(asm, tile, bands);
    }
    for v in 0..tile.format.vectors() {
        asm.vmovups(tile.accumulator(0, v), tile.param(tile.layout.bias, v))?;
    }
    for pixel in 1..tile.spec.pixels() {
        for v in 0..tile.format.vectors() {
            asm.vmovaps(tile.accumulator(pixel, v), tile.accumulator(0, v))?;
        }
    }
    Ok(())
}

/// One contiguous run. Returns how far it moved rdi; rsi is moved to the next run's weights if there is one.
fn run(asm: &mut Assembler, tile: &Tile, more: bool) -> Result<i32, EmitError> {
    let step_groups = tile.format.step_groups();
    let steps = tile.spec.inner as usize / step_groups;
    let unroll = unroll(tile, steps);
    let (trips, rest) = (steps / unroll, steps % unroll);
    let step_bytes = 4 * step_groups;
    let weight_bytes = tile.format.weight_bytes(step_groups);
    let mut moved = 0;
    let mut straight = rest;
    if trips > 1 {
        asm.asm.mov(eax, trips as u32)?;
        let mut top = asm.asm.create_label();
        asm.asm.set_label(&mut top)?;
        for s in 0..unroll {
            step(asm, tile, s)?;
        }
        advance(asm, rdi, (unroll * step_bytes) as i64)?;
        advance(asm, rsi, (unroll * weight_bytes) as i64)?;
        asm.asm.dec(eax)?;
        asm.asm.jne(top)?;
        moved = trips * unroll * step_bytes;
    } else {
        straight += trips * unroll;
    }
    for s in 0..straight {
        step(asm, tile, s)?;
    }
    if more {
        advance(asm, rsi, (straight * weight_bytes) as i64)?;
    }
    i32::try_from(moved).map_err(|_| EmitError::Displacement)
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

fn advance(asm: &mut Assembler, pointer: AsmRegister64, by: i64) -> Result<(), EmitError> {
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
        (Product::U8S8, Isa::Avx2) => {
            half_group(asm, tile, g, Step::Pairs { odd: false })?;
            half_group(asm, tile, g, Step::Pairs { odd: true })
        }
        (Product::U8S8, _) => half_group(asm, tile, g, Step::DotProduct),
    }
}

fn half_group(asm: &mut Assembler, tile: &Tile, g: usize, step: Step) -> Result<(), EmitError> {
    let vectors = tile.format.vectors();
    let weights = |v: usize| tile.temporary(v);
    for v in 0..vectors {
        load_weights(asm, tile, g, step, v)?;
    }
    // Several registers in turn: the next activation can be loaded while the last one is used.
    let product = tile.temporary(vectors);
    let first = if matches!(step, Step::Pairs { .. }) { vectors + 1 } else { vectors };
    let in_turn = (tile.temporaries() - first).min(4);
    for (pixel, &offset) in tile.spec.a_offsets.iter().enumerate() {
        let a = tile.temporary(first + pixel % in_turn);
        load_activation(asm, tile, a, displaced(rdi, offset, 4 * g)?, step)?;
        for v in 0..vectors {
            let accumulator = tile.accumulator(pixel, v);
            match step {
                Step::DotProduct => asm.vpdpbusd(accumulator, a, weights(v))?,
                Step::MultiplyAdd => asm.vfmadd231ps(accumulator, a, weights(v))?,
                Step::Pairs { .. } => {
                    asm.vpmaddwd(product, a, weights(v))?;
                    asm.vpaddd(accumulator, accumulator, product)?;
                }
            }
        }
    }
    Ok(())
}

fn load_weights(asm: &mut Assembler, tile: &Tile, g: usize, step: Step, v: usize) -> Result<(), EmitError> {
    let group = g * tile.format.weight_bytes(1);
    let vector = tile.format.vector_bytes();
    let to = tile.temporary(v);
    match step {
        Step::DotProduct | Step::MultiplyAdd => asm.vmovups(to, displaced(rsi, 0, group + v * vector)?)?,
        Step::Pairs { odd } => {
            let half = if odd { 2 * tile.format.panel } else { 0 };
            asm.load_bytes_as_words(to, displaced(rsi, 0, group + half + v * vector / 2)?)?;
        }
    }
    Ok(())
}

fn load_activation(asm: &mut Assembler, tile: &Tile, a: Reg, from: AsmMemoryOperand, step: Step) -> Emit {
    match step {
        Step::DotProduct => asm.vpbroadcastd(a, from),
        Step::MultiplyAdd => asm.vbroadcastss(a, from),
        Step::Pairs { odd } => {
            asm.vpbroadcastd(a, from)?;
            if odd { asm.vpsrlw(a, a, 8) } else { asm.bitand(a, a, tile.param(tile.layout.even_bytes, 0)) }
        }
    }
}
