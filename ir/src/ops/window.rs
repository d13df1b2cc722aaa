use crate::{OpError, limits::MAX_WINDOW_TAPS};
use serde::{Deserialize, Serialize};

/// How a window moves over the spatial dimensions: shared by convolutions and pools. One entry a spatial dimension.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Window {
    /// Extent of the window, in taps.
    pub kernel: Vec<usize>,
    /// Distance between neighbouring windows.
    pub strides: Vec<usize>,
    /// Distance between taps.
    pub dilations: Vec<usize>,
    /// Padding before the first element.
    pub pads_begin: Vec<usize>,
    /// Padding after the last element.
    pub pads_end: Vec<usize>,
}

impl Window {
    /// A window of stride and dilation 1 without padding.
    pub fn new(kernel: impl Into<Vec<usize>>) -> Window {
        let kernel = kernel.into();
        let n = kernel.len();
        Window {
            kernel,
            strides: vec![1; n],
            dilations: vec![1; n],
            pads_begin: vec![0; n],
            pads_end: vec![0; n],
        }
    }

    /// The same with these strides.
    pub fn strides(self, strides: impl Into<Vec<usize>>) -> Window {
        Window { strides: strides.into(), ..self }
    }

    /// The same with this padding before and after.
    pub fn pads(self, begin: impl Into<Vec<usize>>, end: impl Into<Vec<usize>>) -> Window {
        Window { pads_begin: begin.into(), pads_end: end.into(), ..self }
    }

    /// The same with these dilations.
    pub fn dilations(self, dilations: impl Into<Vec<usize>>) -> Window {
        Window { dilations: dilations.into(), ..self }
    }

    /// The same over one dimension more, the first, of which it takes one element after the other.
    pub fn with_leading_dimension(mut self) -> Window {
        for (entries, one) in [
            (&mut self.kernel, 1),
            (&mut self.strides, 1),
            (&mut self.dilations, 1),
            (&mut self.pads_begin, 0),
            (&mut self.pads_end, 0),
        ] {
            entries.insert(0, one);
        }
        self
    }

    /// Number of spatial dimensions.
    pub fn rank(&self) -> usize {
        self.kernel.len()
    }

    /// Number of taps.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Whether no padding is applied.
    pub fn is_unpadded(&self) -> bool {
        self.pads_begin.iter().chain(&self.pads_end).all(|&p| p == 0)
    }

    /// Elements spanned by the taps of spatial dimension `d`: (kernel − 1)·dilation + 1.
    pub fn span(&self, d: usize) -> usize {
        (self.kernel[d] - 1) * self.dilations[d] + 1
    }

    /// Output extents for these input extents. With `ceil`, a last window that starts inside the input or its
    /// leading padding but runs over the end is kept (ONNX `ceil_mode`).
    pub fn output(&self, input: &[usize], ceil: bool) -> Result<Vec<usize>, OpError> {
        let n = self.rank();
        let lengths = [&self.strides, &self.dilations, &self.pads_begin, &self.pads_end];
        if n == 0 || input.len() != n || lengths.iter().any(|v| v.len() != n) {
            return Err(OpError::attribute(format!(
                "kernel, strides, dilations and pads must have one entry for each of the {} spatial dimensions",
                input.len()
            )));
        }
        // 2^31 bounds every product below far from overflow.
        let limit = 1usize << 31;
        for (what, values, least) in [
            ("kernel size", &self.kernel, 1),
            ("stride", &self.strides, 1),
            ("dilation", &self.dilations, 1),
            ("pad", &self.pads_begin, 0),
            ("pad", &self.pads_end, 0),
        ] {
            if let Some(v) = values.iter().find(|&&v| v < least || v >= limit) {
                return Err(OpError::attribute(format!("{what} {v} is not between {least} and 2^31")));
            }
        }
        let taps = self.kernel.iter().try_fold(1usize, |n, &k| n.checked_mul(k));
        if taps.is_none_or(|n| n > MAX_WINDOW_TAPS) {
            return Err(OpError::too_large(format!(
                "a window of {:?} has more than {MAX_WINDOW_TAPS} taps",
                self.kernel
            )));
        }
        (0..n)
            .map(|d| {
                let span = (self.kernel[d] as u128 - 1) * self.dilations[d] as u128 + 1;
                let padded = input[d] as u128 + self.pads_begin[d] as u128 + self.pads_end[d] as u128;
                let Some(room) = padded.checked_sub(span) else {
                    return Err(OpError::shape(format!(
                        "a window that spans {span} does not fit spatial dimension {d} of {} padded to {padded}",
                        input[d]
                    )));
                };
                let stride = self.strides[d] as u128;
                let mut out = room / stride + 1;
                if ceil && room % stride != 0 && out * stride < input[d] as u128 + self.pads_begin[d] as u128 {
                    out += 1;
                }
                usize::try_from(out).map_err(|_| OpError::too_large(format!("{out} output positions")))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_extents() {
        let w = Window::new([3]).strides([2]).pads([1], [1]);
        assert_eq!(w.output(&[8], false), Ok(vec![4]));
        assert_eq!(w.output(&[8], true), Ok(vec![5]));
        assert_eq!(Window::new([2]).dilations([3]).output(&[7], false), Ok(vec![4]));
    }

    #[test]
    fn a_window_that_would_start_in_the_trailing_pad_is_dropped() {
        // ONNX: "sliding windows that would start in the right padded region are ignored".
        let w = Window::new([2]).strides([3]).pads([0], [1]);
        assert_eq!(w.output(&[5], true), Ok(vec![2]));
    }

    #[test]
    fn bad_attributes_are_refused() {
        assert!(Window::new([3]).strides([0]).output(&[8], false).is_err());
        assert!(Window::new([0]).output(&[8], false).is_err());
        assert!(Window::new([7]).output(&[2], false).is_err());
        assert!(Window::new([3, 3]).output(&[8], false).is_err());
        let huge = Window::new([3]).pads([1 << 40], [0]);
        assert!(huge.output(&[8], false).is_err());
    }
}
