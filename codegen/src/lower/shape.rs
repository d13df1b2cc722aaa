//! Ops that move elements and compute none.

use super::{Lowerer, Lowering};
use crate::{
    CodegenError,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{InstBuilder, condcodes::IntCC, types};
use qcc_ir::NodeId;

/// Ops whose result is their operand's bytes. The plan gives both one place, so there is nothing to emit.
pub(super) const ALIAS: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: |_, _: NodeId| Ok(()) };

/// Bytes that one unit of a copy moves: enough to be worth a thread's while.
const COPY_UNIT: u64 = 4096;

/// A step that copies bytes.
pub(super) fn copy(
    cx: &mut Lowering,
    kernel: &str,
    from: Location,
    to: Location,
    bytes: u64,
) -> Result<(), CodegenError> {
    let work = Work { macs: 0, bytes_read: bytes, bytes_written: bytes };
    let units = bytes.div_ceil(COPY_UNIT);
    cx.step(kernel, units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let b = &mut e.b;
        let total = b.ins().iconst(types::I64, bytes as i64);
        let start = b.ins().imul_imm_s(begin, COPY_UNIT as i64);
        let stop = b.ins().imul_imm_s(end, COPY_UNIT as i64);
        let stop = b.ins().umin(stop, total);
        let vectors = b.ins().band_imm_s(stop, -16);
        let at = copy_loop(b, types::I8X16, source, target, start, vectors);
        copy_loop(b, types::I8, source, target, at, stop);
        Ok(())
    })
}

/// Copies elements of type `ty` from offset `start` up to `stop`; the offset where it ended.
fn copy_loop(
    b: &mut cranelift_frontend::FunctionBuilder,
    ty: types::Type,
    source: cranelift_codegen::ir::Value,
    target: cranelift_codegen::ir::Value,
    start: cranelift_codegen::ir::Value,
    stop: cranelift_codegen::ir::Value,
) -> cranelift_codegen::ir::Value {
    let (head, body, done) = (b.create_block(), b.create_block(), b.create_block());
    let at = b.append_block_param(head, types::I64);
    b.ins().jump(head, &[start.into()]);
    b.switch_to_block(head);
    let more = b.ins().icmp(IntCC::UnsignedLessThan, at, stop);
    b.ins().brif(more, body, &[], done, &[]);
    b.switch_to_block(body);
    let from = b.ins().iadd(source, at);
    let x = b.ins().load(ty, MEM, from, 0);
    let to = b.ins().iadd(target, at);
    b.ins().store(MEM, x, to, 0);
    let next = b.ins().iadd_imm_s(at, i64::from(ty.bytes()));
    b.ins().jump(head, &[next.into()]);
    b.switch_to_block(done);
    at
}
