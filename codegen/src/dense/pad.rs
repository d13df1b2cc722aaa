//! Copies of an input with a border around it, and with readable slack behind it.
//!
//! A padded convolution would need a test for every tap at every border. A copy whose border holds the code of zero
//! needs none, moves far fewer bytes than the convolution multiplies, and stays in cache for it.

use crate::{
    CodegenError,
    kernels::map,
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
};
use cranelift_codegen::ir::{
    InstBuilder, Type, Value,
    condcodes::IntCC,
    types::{I8, I8X16, I64},
};
use cranelift_frontend::FunctionBuilder;

/// A batch of images of `[rows, row_bytes]`, and how much border a copy has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Border {
    /// Images of the batch.
    pub(crate) images: usize,
    /// Rows of one image.
    pub(crate) rows: usize,
    /// Bytes of one row.
    pub(crate) row_bytes: usize,
    /// Rows above and below.
    pub(crate) above: usize,
    /// Rows below.
    pub(crate) below: usize,
    /// Bytes before and behind each row.
    pub(crate) left: usize,
    /// Bytes behind each row.
    pub(crate) right: usize,
    /// What the border holds.
    pub(crate) fill: Fill,
}

/// A byte that is known, or lies at this many bytes from a place when the code runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill {
    Byte(u8),
    At(Location, i32),
}

impl Border {
    /// Whether the copy would be the input.
    pub(crate) fn is_empty(&self) -> bool {
        [self.above, self.below, self.left, self.right] == [0; 4]
    }

    /// Bytes of a row of the copy.
    pub(crate) fn padded_row_bytes(&self) -> usize {
        self.left + self.row_bytes + self.right
    }

    /// Rows of an image of the copy.
    pub(crate) fn padded_rows(&self) -> usize {
        self.above + self.rows + self.below
    }

    /// Bytes of an image of the copy; saturates, as pads are bounded by 2^31 only.
    pub(crate) fn padded_image_bytes(&self) -> usize {
        self.padded_rows().saturating_mul(self.padded_row_bytes())
    }

    /// Bytes of the copy.
    fn bytes(&self) -> u64 {
        (self.images as u64).saturating_mul(self.padded_image_bytes() as u64)
    }
}

/// A step that copies `from` into scratch memory with a border; the copy. A unit is a row of it.
pub(crate) fn lower(cx: &mut Lowering, from: Location, border: Border) -> Result<Location, CodegenError> {
    let to = cx.scratch(border.bytes())?;
    let work = Work {
        bytes_read: (border.images * border.rows * border.row_bytes) as u64,
        bytes_written: border.bytes(),
        ..Work::default()
    };
    let units = (border.images * border.padded_rows()) as u64;
    cx.step("pad", units, work, |e, ctx, begin, end| {
        let (source, target) = (e.address(ctx, from), e.address(ctx, to));
        let padded = border.padded_row_bytes();
        let behind = border.left + border.row_bytes;
        let byte = match border.fill {
            Fill::Byte(byte) => e.b.ins().iconst(I8, i64::from(byte)),
            Fill::At(place, offset) => {
                let place = e.address(ctx, place);
                e.b.ins().load(I8, MEM, place, offset)
            }
        };
        map::counted_loop(&mut e.b, begin, end, |b, unit| {
            let row_offset = b.ins().imul_imm_s(unit, padded as i64);
            let row = b.ins().iadd(target, row_offset);
            let y = b.ins().urem_imm_u(unit, border.padded_rows() as i64);
            let image = b.ins().udiv_imm_u(unit, border.padded_rows() as i64);
            inside_or_outside(
                b,
                (y, border.above, border.rows),
                |b, y| {
                    fill(b, row, 0, border.left, byte);
                    let first = b.ins().imul_imm_s(image, border.rows as i64);
                    let from_row = b.ins().iadd(first, y);
                    let from_offset = b.ins().imul_imm_s(from_row, border.row_bytes as i64);
                    let from = b.ins().iadd(source, from_offset);
                    let middle = b.ins().iadd_imm_s(row, border.left as i64);
                    sweep(b, border.row_bytes, &mut |b, ty, at, offset| {
                        let from = b.ins().iadd(from, at);
                        let x = b.ins().load(ty, MEM, from, offset);
                        let to = b.ins().iadd(middle, at);
                        b.ins().store(MEM, x, to, offset);
                    });
                    fill(b, row, behind, border.right, byte);
                },
                |b| fill(b, row, 0, padded, byte),
            );
        });
        Ok(())
    })?;
    Ok(to)
}

/// Runs `inside` for a row of an image of `rows`, with its number in the image, and `outside` for one of the border. `y`
/// counts from the border's first row, of which there are `above`.
fn inside_or_outside(
    b: &mut FunctionBuilder,
    (y, above, rows): (Value, usize, usize),
    inside: impl FnOnce(&mut FunctionBuilder, Value),
    outside: impl FnOnce(&mut FunctionBuilder),
) {
    let [of_image, of_border, next] = [(); 3].map(|()| b.create_block());
    let y = b.ins().iadd_imm_s(y, -(above as i64));
    // Rows above wrap to huge numbers.
    let is_inside = b.ins().icmp_imm_s(IntCC::UnsignedLessThan, y, rows as i64);
    b.ins().brif(is_inside, of_image, &[], of_border, &[]);
    b.switch_to_block(of_border);
    outside(b);
    b.ins().jump(next, &[]);
    b.switch_to_block(of_image);
    inside(b, y);
    b.ins().jump(next, &[]);
    b.switch_to_block(next);
}

/// Writes `byte` to `count` bytes from `base + start`.
fn fill(b: &mut FunctionBuilder, base: Value, start: usize, count: usize, byte: Value) {
    if count == 0 {
        return;
    }
    let base = b.ins().iadd_imm_s(base, start as i64);
    let vector = b.ins().splat(I8X16, byte);
    sweep(b, count, &mut |b, ty, at, offset| {
        let x = if ty == I8 { byte } else { vector };
        let to = b.ins().iadd(base, at);
        b.ins().store(MEM, x, to, offset);
    });
}

/// Vectors that one round of a sweep moves.
const UNROLL: usize = 4;

/// Visits `count` bytes in pieces of 16, the last of which may overlap the one before, or one by one if they are
/// fewer: `visit(type, byte offset, constant to add to it)`.
fn sweep(
    b: &mut FunctionBuilder,
    count: usize,
    visit: &mut dyn FnMut(&mut FunctionBuilder, Type, Value, i32),
) {
    let zero = b.ins().iconst(I64, 0);
    if count < 16 {
        (0..count as i32).for_each(|i| visit(b, I8, zero, i));
        return;
    }
    let rounds = count / (16 * UNROLL);
    let mut at = zero;
    if rounds > 0 {
        let (head, done) = (b.create_block(), b.create_block());
        let offset = b.append_block_param(head, I64);
        b.ins().jump(head, &[zero.into()]);
        b.switch_to_block(head);
        (0..UNROLL as i32).for_each(|i| visit(b, I8X16, offset, i * 16));
        let next = b.ins().iadd_imm_s(offset, 16 * UNROLL as i64);
        let more = b.ins().icmp_imm_s(IntCC::UnsignedLessThan, next, (rounds * 16 * UNROLL) as i64);
        b.ins().brif(more, head, &[next.into()], done, &[]);
        b.switch_to_block(done);
        at = next;
    }
    let left = count - rounds * 16 * UNROLL;
    (0..left / 16).for_each(|i| visit(b, I8X16, at, i as i32 * 16));
    if !left.is_multiple_of(16) {
        visit(b, I8X16, at, left as i32 - 16);
    }
}
