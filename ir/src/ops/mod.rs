//! The ops: one file a family, and in it all that defines an op: attributes, inference, reference semantics.
//!
//! To add an op: a struct that implements [`Operator`] in the file of its family, and its name in the list at the
//! bottom of this file. The compiler then names the places that must know it.

mod conv;
mod dynamic;
mod elementwise;
mod grid_sample;
mod index;
mod integer;
mod lines;
mod matmul;
mod norm;
mod numbers;
mod pool;
mod quantize;
mod recurrent;
mod reduce;
mod resample;
mod roi_align;
mod roi_pool;
mod shape;
mod state;
mod svm;
mod to_float;
mod trees;
mod window;

pub use conv::{Clamp, Conv, Layout, QConv};
pub use dynamic::DynamicQuantize;
pub use elementwise::{
    Binary, BinaryKind, BitCast, Cast, CastSmall, QBinary, QBinaryKind, QBinaryRescale, QUnary, Unary,
    UnaryKind, Where,
};
pub use grid_sample::{GridSample, SampleMode, SamplePadding};
pub use index::{GatherElements, GatherNd, ScatterElements, ScatterNd, Update, position};
pub use integer::IntConv;
pub(crate) use lines::by_size;
pub use lines::{ArgExtreme, Cumulate, CumulateKind, TopK};
pub use matmul::{Determinant, Inverse, MatMul, PlainMatMul, QMatMul};
pub use norm::{BatchNorm, Lrn, Normalize, Softmax};
pub use pool::{ArgMaxPool, AverageRescale, Pool, PoolKind, QAveragePool};
pub use quantize::{AssumeGrid, Dequantize, FakeQuant, Quantize};
pub use recurrent::{Activation, Cell, Recurrent, Slots};
pub use reduce::{Reduce, ReduceKind};
pub use resample::{Coordinates, FixedTaps, Interpolation, Nearest, QResample, Resample, Taps};
pub use roi_align::RoiAlign;
pub use roi_pool::MaxRoiPool;
pub use shape::{Concat, Expand, Gather, Pad, PadMode, Reshape, Slice, SliceSpec, Transfer, Transpose};
pub use state::LinearAttention;
pub use svm::CoupleProbabilities;
pub use to_float::{QConvToFloat, QMatMulToFloat, ToFloat};
pub use trees::{Aggregate, TreeEnsemble};
pub use window::Window;

use crate::{OpError, Tensor, TensorType};
use serde::{Deserialize, Serialize};

/// What defines an op.
pub trait Operator {
    /// Types of the results from types of the operands, or why the op does not take them.
    ///
    /// Checks everything that [`eval`](Self::eval) and the kernels rely on: an op that infers can be run.
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError>;

    /// The results, by definition: this is what the op means. `types` are the operands' types (grids included) and
    /// `results` what [`infer`](Self::infer) made of them.
    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError>;

    /// Multiply-accumulate operations, as convolutions and matrix products count them.
    fn macs(&self, _operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        0
    }
}

macro_rules! ops {
    ($($(#[$doc:meta])* $op:ident),* $(,)?) => {
        /// Every op there is. Attributes serialise; operands and types are the graph's.
        #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
        pub enum Op { $($(#[$doc])* $op($op)),* }

        impl Op {
            /// The [`mnemonic`](Self::mnemonic) of every op.
            pub const MNEMONICS: &[&str] = &[$(stringify!($op)),*];

            /// The name used in the text form and in messages.
            pub const fn mnemonic(&self) -> &'static str {
                match self { $(Op::$op(_) => stringify!($op)),* }
            }
            fn operator(&self) -> &dyn Operator {
                match self { $(Op::$op(op) => op),* }
            }
        }

        $(impl From<$op> for Op {
            fn from(op: $op) -> Op { Op::$op(op) }
        })*
    };
}

impl Op {
    /// See [`Operator::infer`].
    pub fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        self.operator().infer(operands)
    }
    /// See [`Operator::eval`].
    pub fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        self.operator().eval(operands, types, results)
    }
    /// See [`Operator::macs`].
    pub fn macs(&self, operands: &[&TensorType], results: &[TensorType]) -> u64 {
        self.operator().macs(operands, results)
    }
}

/// Fails unless there are `n` operands.
fn arity<const N: usize>(operands: &[&TensorType]) -> Result<[TensorType; N], OpError> {
    let owned: Vec<TensorType> = operands.iter().map(|&t| t.clone()).collect();
    owned.try_into().map_err(|_| OpError::Arity { expected: N.to_string(), got: operands.len() })
}

ops! {
    /// Convolution of floats, with bias, residual and clamp fused into it.
    Conv,
    /// Convolution of u8 by s8, requantized.
    QConv,
    /// Convolution of u8 by s8, as floats.
    QConvToFloat,
    /// Matrix product of floats, with bias, residual and clamp fused into it.
    MatMul,
    /// Matrix product of u8 by s8, requantized.
    QMatMul,
    /// Matrix product of u8 by s8, as floats.
    QMatMulToFloat,
    /// Matrix product of f64 or integers.
    PlainMatMul,
    /// Determinants of matrices.
    Determinant,
    /// Inverses of matrices.
    Inverse,
    /// Convolution of s32, wrapping.
    IntConv,
    /// Batch normalisation with fixed statistics.
    BatchNorm,
    /// Local response normalisation across channels.
    Lrn,
    /// Pixels less a mean, by a deviation.
    Normalize,
    /// Softmax or its logarithm along an axis.
    Softmax,
    /// Maximum or average over windows; the maximum also of quantized values.
    Pool,
    /// Places of the largest elements of windows.
    ArgMaxPool,
    /// Elements around any places, interpolated.
    GridSample,
    /// Regions of images, brought to one size.
    RoiAlign,
    /// The recurrence of linear attention.
    LinearAttention,
    /// Probabilities of many classes from those of pairs.
    CoupleProbabilities,
    /// Decision trees over rows of features.
    TreeEnsemble,
    /// The recurrence of a recurrent layer, in one direction.
    Recurrent,
    /// Average over windows of quantized values, requantized.
    QAveragePool,
    /// A function of each element.
    Unary,
    /// A function of pairs of elements, with broadcasting.
    Binary,
    /// A function of each quantized element: a table of 256 entries.
    QUnary,
    /// Sum, difference or product of quantized elements, with broadcasting, requantized.
    QBinary,
    /// Elements of one or the other operand, as a condition says.
    Where,
    /// Conversion between element types.
    Cast,
    /// Conversion to floats of 8 bits and fewer.
    CastSmall,
    /// The same bits read as another type.
    BitCast,
    /// Sum, mean, maximum… along axes.
    Reduce,
    /// Where the largest or smallest element along an axis is.
    ArgExtreme,
    /// Where the largest or smallest few elements along an axis are.
    TopK,
    /// Running sums or products along an axis.
    Cumulate,
    /// Interpolation along an axis; of quantized values where it only picks elements.
    Resample,
    /// Interpolation along an axis of quantized values, requantized.
    QResample,
    /// Another shape for the same elements.
    Reshape,
    /// Dimensions in another order.
    Transpose,
    /// A strided part.
    Slice,
    /// Tensors one after the other along an axis.
    Concat,
    /// A border of constant, repeated or mirrored elements.
    Pad,
    /// Broadcast to a larger shape.
    Expand,
    /// Elements picked along an axis by index.
    Gather,
    /// Elements picked along an axis, each by an index of its own.
    GatherElements,
    /// Parts picked by tuples of indices.
    GatherNd,
    /// Elements replaced, or added to, along an axis, each by an index of its own.
    ScatterElements,
    /// Parts replaced, or added to, by tuples of indices.
    ScatterNd,
    /// Real numbers to the integers of a grid.
    Quantize,
    /// Real numbers to the integers of grids that are chosen for them.
    DynamicQuantize,
    /// Integers of a grid to real numbers.
    Dequantize,
    /// Real numbers rounded to a grid.
    FakeQuant,
    /// Integers read on another grid.
    AssumeGrid,
    /// A value handed from one device to another.
    Transfer,
    // Compiled files name ops by their places, so that new ones stand at the end.
    /// The largest elements of the parts of regions.
    MaxRoiPool,
}
