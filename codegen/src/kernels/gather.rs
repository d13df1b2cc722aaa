//! Rows picked by indices that are known at run time only: embeddings.

use crate::{
    CodegenError,
    lower::Lowering,
    model::Work,
    module::Location,
    routine::{Routine, Source},
};
use qcc_ir::{DType, OpError, ops::position};
use std::ops::Range;

/// y[o, i, …] = x[o, indices[i], …]. A unit is a row of the result.
#[derive(Clone, Debug)]
pub(crate) struct Gather {
    pub(crate) x: Source,
    /// s32 or s64.
    pub(crate) indices: Source,
    pub(crate) y: Location,
    pub(crate) index: DType,
    pub(crate) axis: usize,
    /// Length of the axis.
    pub(crate) extent: usize,
    /// Number of indices.
    pub(crate) count: usize,
    pub(crate) row_bytes: usize,
}

/// A step that gathers rows; `outer` is the number of elements before the axis.
pub(crate) fn lower(cx: &mut Lowering, gather: Gather, outer: usize) -> Result<(), CodegenError> {
    let units = outer * gather.count;
    let bytes = (units * gather.row_bytes) as u64;
    let work = Work { bytes_read: bytes, bytes_written: bytes, ..Work::default() };
    cx.routine_step("gather", Routine::Gather(Box::new(gather)), units as u64, work);
    Ok(())
}

impl Gather {
    /// Gathers the rows of a range of units.
    ///
    /// # Safety
    /// The pointers must be those of [`x`](Self::x), [`indices`](Self::indices) and [`y`](Self::y), alive, and nobody else may
    /// use these rows of `y` meanwhile.
    #[allow(unsafe_code, reason = "the arena is read and written by address, as machine code does")]
    pub(crate) unsafe fn run(
        &self,
        x: *const u8,
        indices: *const u8,
        y: *mut u8,
        units: Range<u64>,
    ) -> Result<(), OpError> {
        for unit in units.start as usize..units.end as usize {
            let (outer, i) = (unit / self.count, unit % self.count);
            // SAFETY: there are `count` indices, rows of `x` that they may name after the check, and `units` rows of `y`.
            unsafe {
                let index = match self.index {
                    DType::S32 => i64::from(indices.cast::<i32>().add(i).read_unaligned()),
                    _ => indices.cast::<i64>().add(i).read_unaligned(),
                };
                let row = outer * self.extent + position(index, self.extent, self.axis)?;
                let to = y.add(unit * self.row_bytes);
                to.copy_from_nonoverlapping(x.add(row * self.row_bytes), self.row_bytes);
            }
        }
        Ok(())
    }
}
