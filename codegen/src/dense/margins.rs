//! Margins around the images of a value, which a padded convolution reads in place.
//!
//! A margin is a few bytes a row.

use crate::{
    kernels::map::View, lower::Lowering, model::Work, module::Location, plan::Margins, routine::Routine,
};
use std::ops::Range;

/// The margins of channels-last images in a buffer of their own, where one follows the other: all that lies between
/// the rows of pixels. A unit is such a gap. Those inside of an image hold the right margin of a row and the left one of
/// the next; the first and the last one the rows above and below as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    /// The buffer.
    pub(crate) location: Location,
    /// Bytes from it to the first image's margin.
    offset: i64,
    /// Rows of pixels of an image.
    rows: u64,
    image_stride: u64,
    row_stride: u64,
    /// Bytes of the first gap of an image.
    first: u64,
    /// Bytes of those between rows.
    between: u64,
    /// Bytes of the last one.
    last: u64,
    /// What all of them hold.
    byte: u8,
}

/// A step that fills the margins of images of this shape with `byte`.
pub(crate) fn surround(cx: &mut Lowering, images: &View, shape: &[usize], margins: Margins, byte: u8) {
    let [image_stride, row_stride, pixel_stride, _] = images.strides[..] else { return };
    let [left, right] = [margins.left, margins.right].map(|pixels| pixels as u64 * pixel_stride as u64);
    let [above, below] = [margins.above, margins.below].map(|rows| rows as u64 * row_stride as u64);
    let fill = Fill {
        location: images.location,
        offset: images.offset - (left + above) as i64,
        rows: shape[1] as u64,
        image_stride: image_stride as u64,
        row_stride: row_stride as u64,
        first: above + left,
        between: right + left,
        last: right + below,
        byte,
    };
    let count = shape[0] as u64;
    let bytes = count * (fill.first + fill.between * fill.rows.saturating_sub(1) + fill.last);
    let units = if fill.rows == 0 { 0 } else { count * fill.gaps() };
    cx.routine_step("margins", Routine::Fill(fill), units, Work { bytes_written: bytes, ..Work::default() });
}

impl Fill {
    /// Gaps of an image.
    fn gaps(&self) -> u64 {
        self.rows + 1
    }

    /// Fills the gaps of a range of units.
    ///
    /// # Safety
    /// `buffer` must be that of [`location`](Self::location), alive, and nobody else may use the gaps meanwhile.
    #[allow(unsafe_code, reason = "the arena is written by address, as machine code does")]
    pub(crate) unsafe fn run(&self, buffer: *mut u8, units: Range<u64>) {
        let (mut image, mut gap) = (units.start / self.gaps(), units.start % self.gaps());
        let mut left = units.end - units.start;
        while left > 0 {
            let gaps = gap..self.gaps().min(gap + left);
            left -= gaps.end - gaps.start;
            let at = self.offset + (image * self.image_stride) as i64;
            // SAFETY: the plan gives the images a buffer with these margins, in which all gaps lie.
            unsafe { self.fill_image(buffer.offset(at as isize), gaps) };
            (image, gap) = (image + 1, 0);
        }
    }

    /// Fills gaps of the image whose margin begins at `image`.
    ///
    /// # Safety
    /// See [`run`](Self::run).
    #[allow(unsafe_code, reason = "see `run`")]
    unsafe fn fill_image(&self, image: *mut u8, gaps: Range<u64>) {
        // A gap ends where the pixels of its row begin.
        let start = |gap: u64| (self.first + gap * self.row_stride - self.between) as usize;
        let vector = u128::from_ne_bytes([self.byte; VECTOR]);
        if gaps.start == 0 {
            // SAFETY: as promised by the caller; the same holds below.
            unsafe { image.write_bytes(self.byte, self.first as usize) };
        }
        let (first, end) = (gaps.start.max(1), gaps.end.min(self.rows));
        let length = self.between as usize;
        let (mut to, stride) = (image.wrapping_add(start(first)), self.row_stride as usize);
        for _ in first..end {
            // SAFETY: see above. Most gaps are shorter than a call of `memset` is worth.
            unsafe {
                match length {
                    VECTOR..LONG => fill_by_vectors(to, length, vector),
                    _ => to.write_bytes(self.byte, length),
                }
            }
            to = to.wrapping_add(stride);
        }
        if gaps.end > self.rows {
            // SAFETY: see above.
            unsafe { image.add(start(self.rows)).write_bytes(self.byte, self.last as usize) };
        }
    }
}

const VECTOR: usize = size_of::<u128>();
/// Gaps of so many bytes are worth a call.
const LONG: usize = 256;

/// Writes `vector` over and over to `length` bytes, at least one; the last may begin within the one before.
///
/// # Safety
/// The bytes must be writable.
#[allow(unsafe_code, reason = "see `Fill::run`")]
unsafe fn fill_by_vectors(to: *mut u8, length: usize, vector: u128) {
    let last = length - VECTOR;
    for at in (0..last).step_by(VECTOR) {
        // SAFETY: `at + VECTOR <= length`.
        unsafe { to.add(at).cast::<u128>().write_unaligned(vector) };
    }
    // SAFETY: see above.
    unsafe { to.add(last).cast::<u128>().write_unaligned(vector) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Images of 3 rows of 5 pixels of 2 bytes with margins of 2, 1, 3 and 0 pixels above, left, right and below, and
    /// of none at all, behind 7 bytes of something else: all that is no pixel is filled, whatever is done at once.
    #[test]
    fn gaps_are_all_that_is_no_pixel() {
        for (above, below, left, right) in
            [(2, 0, 1, 3), (0, 1, 0, 4), (1, 1, 8, 8), (0, 0, 1, 0), (30, 0, 9, 0)]
        {
            let (pixel, cols, rows, images) = (2_usize, 5, 3, 2);
            let row = pixel * (left + cols + right);
            let image = row * (above + rows + below);
            let fill = Fill {
                location: Location::Arena(0),
                offset: 7,
                rows: rows as u64,
                image_stride: image as u64,
                row_stride: row as u64,
                first: (above * row + left * pixel) as u64,
                between: ((left + right) * pixel) as u64,
                last: (right * pixel + below * row) as u64,
                byte: 9,
            };
            let expected: Vec<u8> = (0_usize..7 + images * image + 7)
                .map(|at| {
                    let Some(at) = at.checked_sub(7).filter(|&at| at < images * image) else { return 0 };
                    let (y, x) = (at % image / row, at % row / pixel);
                    let is_pixel = (above..above + rows).contains(&y) && (left..left + cols).contains(&x);
                    if is_pixel { 0 } else { 9 }
                })
                .collect();
            let units = images as u64 * fill.gaps();
            for split in 0..=units {
                let mut buffer = vec![0; expected.len()];
                for units in [0..split, split..units] {
                    // SAFETY: all gaps lie in the buffer.
                    #[allow(unsafe_code, reason = "what is tested")]
                    unsafe {
                        fill.run(buffer.as_mut_ptr(), units);
                    }
                }
                assert_eq!(buffer, expected, "{above} {below} {left} {right}, split at {split}");
            }
        }
    }
}
