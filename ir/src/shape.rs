use crate::limits::{MAX_ELEMENTS, MAX_RANK};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Deref};

/// A concrete shape: dimensions in row-major order. Symbolic dimensions are bound before a graph is built.
///
/// The product of the dimensions is checked on construction, so [`elements`](Self::elements) cannot overflow.
#[derive(Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<usize>", into = "Vec<usize>")]
pub struct Shape(Vec<usize>);

/// A shape that is not representable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// More than [`MAX_RANK`] dimensions.
    #[error("rank {0} is above the limit of {MAX_RANK}")]
    Rank(usize),
    /// More than [`MAX_ELEMENTS`] elements (or a product that overflows).
    #[error("shape {0:?} has more than 2^40 elements")]
    Elements(Vec<usize>),
}

impl Shape {
    /// A shape of these dimensions.
    pub fn new(dims: impl Into<Vec<usize>>) -> Result<Shape, ShapeError> {
        let dims = dims.into();
        if dims.len() > MAX_RANK {
            return Err(ShapeError::Rank(dims.len()));
        }
        // A zero makes the product zero however large the other dimensions are; they are bounded all the same.
        let product =
            dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)).filter(|&n| n <= MAX_ELEMENTS));
        match product {
            Some(_) => Ok(Shape(dims)),
            None => Err(ShapeError::Elements(dims)),
        }
    }

    /// The shape of a scalar.
    pub fn scalar() -> Shape {
        Shape(Vec::new())
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of elements: the product of the dimensions, 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// Row-major strides, in elements.
    pub fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.rank()];
        for i in (1..self.rank()).rev() {
            strides[i - 1] = strides[i] * self.0[i];
        }
        strides
    }

    /// The shape both broadcast to by NumPy's rules, or `None` where they do not.
    pub fn broadcast(&self, other: &Shape) -> Option<Shape> {
        let rank = self.rank().max(other.rank());
        let at = |s: &Shape, i: usize| {
            (i + s.rank()).checked_sub(rank).map_or(1, |i| s.0.get(i).copied().unwrap_or(1))
        };
        let mut dims = Vec::with_capacity(rank);
        for i in 0..rank {
            dims.push(match (at(self, i), at(other, i)) {
                (a, b) if a == b => a,
                (1, b) => b,
                (a, 1) => a,
                _ => return None,
            });
        }
        Shape::new(dims).ok()
    }

    /// An axis counted from the back when negative, as ONNX writes it.
    pub fn axis(&self, axis: i64) -> Option<usize> {
        let rank = self.rank() as i64;
        (-rank..rank).contains(&axis).then(|| axis.rem_euclid(rank) as usize)
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl TryFrom<Vec<usize>> for Shape {
    type Error = ShapeError;
    fn try_from(dims: Vec<usize>) -> Result<Shape, ShapeError> {
        Shape::new(dims)
    }
}

impl From<Shape> for Vec<usize> {
    fn from(shape: Shape) -> Vec<usize> {
        shape.0
    }
}

/// `1x3x224x224`; a scalar is the empty string.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("x")?;
            }
            write!(f, "{d}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_that_overflow_are_refused_even_with_a_zero() {
        assert!(Shape::new([1 << 32, 1 << 32]).is_err());
        assert!(Shape::new([usize::MAX, 0]).is_err());
        assert_eq!(Shape::new([3, 0, 5]).unwrap().elements(), 0);
        assert_eq!(Shape::new([1; 17]), Err(ShapeError::Rank(17)));
    }

    #[test]
    fn broadcast_follows_numpy() {
        let s = |d: &[usize]| Shape::new(d).unwrap();
        assert_eq!(s(&[2, 1, 4]).broadcast(&s(&[3, 1])), Some(s(&[2, 3, 4])));
        assert_eq!(s(&[]).broadcast(&s(&[3])), Some(s(&[3])));
        assert_eq!(s(&[2]).broadcast(&s(&[3])), None);
        assert_eq!(s(&[0]).broadcast(&s(&[1])), Some(s(&[0])));
    }

    #[test]
    fn negative_axes_count_from_the_back() {
        let s = Shape::new([2, 3, 4]).unwrap();
        assert_eq!(s.axis(-1), Some(2));
        assert_eq!(s.axis(-4), None);
        assert_eq!(s.axis(3), None);
        assert_eq!(Shape::scalar().axis(0), None);
    }
}
