//! The ONNX ops that import knows, and what they become.

mod attention;
mod compose;
mod constant;
mod conv;
mod conv_transpose;
mod elementwise;
mod matmul;
mod norm;
mod pool;
mod quantize;
mod reduce;
mod resize;
mod shape;
mod window;

use super::{NodeError, import::Node};
use crate::ValueId;

/// Makes IR ops of a node.
#[derive(Clone, Copy)]
pub(super) enum Import {
    /// A node of one result.
    One(fn(&mut Node<'_, '_>) -> Result<ValueId, NodeError>),
    /// A node of several results.
    Many(fn(&mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError>),
}

use Import::{Many, One};

/// Name, first version of the domain, import. Ordered by family. An op whose meaning changed with the opset asks for it.
type Table = &'static [(&'static str, i64, Import)];

/// The domains, ONNX's own spelled as files have it.
const DOMAINS: &[(&str, Table)] = &[("", ONNX), ("com.microsoft", MICROSOFT)];

#[rustfmt::skip]
const ONNX: Table = &[
    ("Conv", 1, One(conv::conv)),
    ("ConvTranspose", 1, One(conv_transpose::conv_transpose)),

    ("Gemm", 1, One(matmul::gemm)),
    ("MatMul", 1, One(matmul::matmul)),

    ("BatchNormalization", 1, One(norm::batch_normalization)),
    ("GroupNormalization", 18, One(norm::group_normalization)),
    ("InstanceNormalization", 1, One(norm::instance_normalization)),
    ("LayerNormalization", 17, Many(norm::layer_normalization)),
    ("LpNormalization", 1, One(norm::lp_normalization)),
    ("LRN", 1, One(norm::lrn)),
    ("MeanVarianceNormalization", 9, One(norm::mean_variance_normalization)),
    ("RMSNormalization", 23, One(norm::rms_normalization)),
    ("Softmax", 1, One(norm::softmax)),
    ("LogSoftmax", 1, One(norm::log_softmax)),

    ("Attention", 23, Many(attention::attention)),
    ("RotaryEmbedding", 23, One(attention::rotary_embedding)),

    ("MaxPool", 1, Many(pool::max_pool)),
    ("AveragePool", 1, One(pool::average_pool)),
    ("GlobalLpPool", 1, One(pool::global_lp_pool)),
    ("GlobalMaxPool", 1, One(pool::global_max_pool)),
    ("LpPool", 1, One(pool::lp_pool)),
    ("GlobalAveragePool", 1, One(pool::global_average_pool)),

    ("Abs", 1, One(elementwise::abs)),
    ("Ceil", 1, One(elementwise::ceil)),
    ("Clip", 1, One(elementwise::clip)),
    ("Cos", 7, One(elementwise::cos)),
    ("Elu", 1, One(elementwise::elu)),
    ("Erf", 9, One(elementwise::erf)),
    ("Exp", 1, One(elementwise::exp)),
    ("Floor", 1, One(elementwise::floor)),
    ("Gelu", 20, One(elementwise::gelu)),
    ("HardSigmoid", 1, One(elementwise::hard_sigmoid)),
    ("HardSwish", 14, One(elementwise::hard_swish)),
    ("LeakyRelu", 1, One(elementwise::leaky_relu)),
    ("Log", 1, One(elementwise::log)),
    ("Mish", 18, One(elementwise::mish)),
    ("Neg", 1, One(elementwise::neg)),
    ("Not", 1, One(elementwise::not)),
    ("Reciprocal", 1, One(elementwise::reciprocal)),
    ("Relu", 1, One(elementwise::relu)),
    ("Round", 11, One(elementwise::round)),
    ("Selu", 1, One(elementwise::selu)),
    ("Sigmoid", 1, One(elementwise::sigmoid)),
    ("Sign", 9, One(elementwise::sign)),
    ("Sin", 7, One(elementwise::sin)),
    ("Softplus", 1, One(elementwise::softplus)),
    ("Softsign", 1, One(elementwise::softsign)),
    ("Sqrt", 1, One(elementwise::sqrt)),
    ("Tanh", 1, One(elementwise::tanh)),

    ("Add", 1, One(elementwise::add)),
    ("And", 1, One(elementwise::and)),
    ("Div", 1, One(elementwise::div)),
    ("Equal", 1, One(elementwise::equal)),
    ("Greater", 1, One(elementwise::greater)),
    ("GreaterOrEqual", 12, One(elementwise::greater_or_equal)),
    ("Less", 1, One(elementwise::less)),
    ("LessOrEqual", 12, One(elementwise::less_or_equal)),
    ("Max", 1, One(elementwise::max)),
    ("Mean", 1, One(elementwise::mean)),
    ("Min", 1, One(elementwise::min)),
    ("Mul", 1, One(elementwise::mul)),
    ("Or", 1, One(elementwise::or)),
    ("Pow", 1, One(elementwise::pow)),
    ("Sub", 1, One(elementwise::sub)),
    ("Sum", 1, One(elementwise::sum)),
    ("Xor", 1, One(elementwise::xor)),

    ("Cast", 1, One(elementwise::cast)),
    ("CastLike", 15, One(elementwise::cast_like)),
    ("Dropout", 1, Many(elementwise::dropout)),
    ("Identity", 1, One(elementwise::identity)),

    ("ReduceL1", 1, One(reduce::l1)),
    ("ReduceL2", 1, One(reduce::l2)),
    ("ReduceLogSum", 1, One(reduce::log_sum)),
    ("ReduceLogSumExp", 1, One(reduce::log_sum_exp)),
    ("ReduceMax", 1, One(reduce::max)),
    ("ReduceMean", 1, One(reduce::mean)),
    ("ReduceMin", 1, One(reduce::min)),
    ("ReduceProd", 1, One(reduce::product)),
    ("ReduceSum", 1, One(reduce::sum)),
    ("ReduceSumSquare", 1, One(reduce::sum_square)),

    ("Resize", 10, One(resize::resize)),
    ("Upsample", 7, One(resize::upsample)),

    ("Concat", 4, One(shape::concat)),
    ("Expand", 8, One(shape::expand)),
    ("Flatten", 1, One(shape::flatten)),
    ("Gather", 1, One(shape::gather)),
    ("Pad", 2, One(shape::pad)),
    ("Reshape", 5, One(shape::reshape)),
    ("Slice", 1, One(shape::slice)),
    ("Split", 2, Many(shape::split)),
    ("Squeeze", 1, One(shape::squeeze)),
    ("Tile", 6, One(shape::tile)),
    ("Transpose", 1, One(shape::transpose)),
    ("Unsqueeze", 1, One(shape::unsqueeze)),

    ("Constant", 1, One(constant::constant)),
    ("ConstantOfShape", 9, One(constant::constant_of_shape)),
    ("Shape", 1, One(constant::shape)),
    ("Size", 1, One(constant::size)),

    ("QuantizeLinear", 10, One(quantize::quantize_linear)),
    ("DequantizeLinear", 10, One(quantize::dequantize_linear)),
];

/// Ops that ONNX Runtime adds, most of them for quantized networks.
#[rustfmt::skip]
const MICROSOFT: Table = &[
];

/// The import of an op, if it is supported and exists at this version of its domain.
pub(super) fn find(domain: &str, op: &str, version: i64) -> Option<Import> {
    let (_, table) = DOMAINS.iter().find(|(name, _)| *name == domain)?;
    table.iter().find(|(name, since, _)| *name == op && *since <= version).map(|(_, _, import)| *import)
}

/// Lengths, counts and places in a list of attributes; ONNX stores them as signed.
fn lengths(name: &str, values: &[i64]) -> Result<Vec<usize>, NodeError> {
    values
        .iter()
        .map(|&v| usize::try_from(v).map_err(|_| NodeError::attribute(name, format!("has negative {v}"))))
        .collect()
}
