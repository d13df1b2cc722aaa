//! Copies of int8 activations as 16-bit numbers, for tiles that multiply those.
//!
//! AVX2 has no exact product of bytes. Widening each activation once, instead of in every tile that reads it, leaves the
//! tile nothing but broadcasts: of the 64 vector instructions of a 6x16 tile, 12 were spent on it.

use super::pad::sweep;
use crate::{
    CodegenError,
    kernels::map::counted_loop,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder,
    condcodes::IntCC,
    types::{I8, I16},
};

/// Codes that one unit of the step widens.
const CHUNK: usize = 4096;

/// A step that widens `codes` u8 from `from` to u16 in scratch memory; the copy.
pub(crate) fn lower(cx: &mut Lowering, from: Location, codes: usize) -> Result<Location, CodegenError> {
    let to = cx.scratch(2 * codes as u64)?;
    let work = Work { bytes_read: codes as u64, bytes_written: 2 * codes as u64, ..Work::default() };
    cx.step("widen", codes.div_ceil(CHUNK) as u64, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        counted_loop(&mut e.b, begin, end, |b, unit| {
            let [whole, rest, next] = [(); 3].map(|()| b.create_block());
            let first = b.ins().imul_imm_s(unit, CHUNK as i64);
            let from = b.ins().iadd(source, first);
            let twice = b.ins().iadd(first, first);
            let to = b.ins().iadd(target, twice);
            let is_whole = b.ins().icmp_imm_s(IntCC::UnsignedLessThan, unit, (codes / CHUNK) as i64);
            b.ins().brif(is_whole, whole, &[], rest, &[]);
            for (block, count) in [(whole, CHUNK), (rest, codes % CHUNK)] {
                b.switch_to_block(block);
                sweep(b, count, &mut |b, ty, at, offset| {
                    let from = b.ins().iadd(from, at);
                    let to = b.ins().iadd(to, at);
                    let to = b.ins().iadd(to, at);
                    let x = b.ins().load(ty, MEM, from, offset);
                    if ty == I8 {
                        let x = b.ins().uextend(I16, x);
                        b.ins().store(MEM, x, to, 2 * offset);
                        return;
                    }
                    let halves = [b.ins().uwiden_low(x), b.ins().uwiden_high(x)];
                    for (half, at) in halves.into_iter().zip([0, 16]) {
                        b.ins().store(MEM, half, to, 2 * offset + at);
                    }
                });
                b.ins().jump(next, &[]);
            }
            b.switch_to_block(next);
        });
        Ok(())
    })?;
    Ok(to)
}
