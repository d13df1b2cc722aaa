//! The ONNX ops that import knows, and what they become.

mod attention;
mod compose;
mod constant;
mod contrib;
mod contrib_attention;
mod control;
mod conv;
mod conv_transpose;
mod detection;
mod einsum;
mod elementwise;
mod experts;
mod fused;
mod gated;
mod gather_quantized;
mod index;
mod integer;
mod legacy;
mod linear_attention;
mod loss;
mod matmul;
mod ml;
mod norm;
mod pool;
mod qlinear;
mod quantize;
mod random;
mod recurrent;
mod reduce;
mod resize;
mod sequences;
mod shape;
mod signal;
mod strings;
mod svm;
mod tokens;
mod trees;
mod values;
mod vision;
mod weight_only;
mod window;

use super::{
    NodeError,
    body::NodeDef,
    import::{Held, Node},
};
use crate::ValueId;

/// Makes IR ops of a node.
#[derive(Clone, Copy)]
pub(super) enum Import {
    /// A node of one result.
    One(fn(&mut Node<'_, '_>) -> Result<ValueId, NodeError>),
    /// A node of several results.
    Many(fn(&mut Node<'_, '_>) -> Result<Vec<ValueId>, NodeError>),
    /// A node whose operands or results may be other things than tensors.
    Structure(fn(&mut Node<'_, '_>) -> Result<Vec<Held>, NodeError>),
    /// A node for which others stand, whose results have the names of its own.
    Nodes(fn(&mut Node<'_, '_>) -> Result<Vec<NodeDef>, NodeError>),
}

use Import::{Many, Nodes, One, Structure};

/// Name, first version of the domain, import. Ordered by family. An op whose meaning changed with the opset asks for it.
type Table = &'static [(&'static str, i64, Import)];

/// The domains, ONNX's own spelled as files have it.
const DOMAINS: &[(&str, Table)] =
    &[("", ONNX), ("com.microsoft", MICROSOFT), ("ai.onnx.ml", ML), ("ai.onnx.preview", PREVIEW)];

#[rustfmt::skip]
const ONNX: Table = &[
    ("Conv", 1, One(conv::conv)),
    ("ConvTranspose", 1, One(conv_transpose::conv_transpose)),

    ("Det", 11, One(matmul::det)),
    ("Einsum", 12, One(einsum::einsum)),
    ("Gemm", 1, One(matmul::gemm)),
    ("MatMul", 1, One(matmul::matmul)),

    ("BatchNormalization", 1, Many(norm::batch_normalization)),
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

    ("CausalConvWithState", 27, Many(linear_attention::causal_conv)),
    ("LinearAttention", 27, Many(linear_attention::linear_attention)),

    ("GRU", 7, Many(recurrent::gru)),
    ("LSTM", 7, Many(recurrent::lstm)),
    ("RNN", 7, Many(recurrent::rnn)),

    ("NegativeLogLikelihoodLoss", 12, One(loss::negative_log_likelihood)),
    ("SoftmaxCrossEntropyLoss", 12, Many(loss::softmax_cross_entropy)),

    ("AffineGrid", 20, One(vision::affine_grid)),
    ("Col2Im", 18, One(vision::col2im)),
    ("DeformConv", 19, One(vision::deform_conv)),
    ("MaxRoiPool", 1, One(vision::max_roi_pool)),
    ("RoiAlign", 10, One(vision::roi_align)),

    ("Bernoulli", 15, One(random::bernoulli)),
    ("Multinomial", 7, One(random::multinomial)),
    ("RandomNormal", 1, One(random::random_normal)),
    ("RandomNormalLike", 1, One(random::random_normal_like)),
    ("RandomUniform", 1, One(random::random_uniform)),
    ("RandomUniformLike", 1, One(random::random_uniform_like)),

    ("GridSample", 16, One(resize::grid_sample)),
    ("MaxUnpool", 9, One(pool::max_unpool)),
    ("NonMaxSuppression", 10, One(detection::non_max_suppression)),

    ("BlackmanWindow", 17, One(signal::blackman_window)),
    ("DFT", 17, One(signal::dft)),
    ("HammingWindow", 17, One(signal::hamming_window)),
    ("HannWindow", 17, One(signal::hann_window)),
    ("MelWeightMatrix", 17, One(signal::mel_weight_matrix)),
    ("STFT", 17, One(signal::stft)),

    // ONNX Runtime writes it, in this domain.
    ("SimplifiedLayerNormalization", 1, One(norm::rms_normalization)),

    ("MaxPool", 1, Many(pool::max_pool)),
    ("AveragePool", 1, One(pool::average_pool)),
    ("GlobalLpPool", 1, One(pool::global_lp_pool)),
    ("GlobalMaxPool", 1, One(pool::global_max_pool)),
    ("LpPool", 1, One(pool::lp_pool)),
    ("GlobalAveragePool", 1, One(pool::global_average_pool)),

    ("Affine", 1, One(legacy::affine)),
    ("Crop", 1, One(legacy::crop)),
    ("ImageScaler", 1, One(legacy::image_scaler)),
    ("ParametricSoftplus", 1, One(legacy::parametric_softplus)),
    ("Scale", 1, One(legacy::scale)),
    ("ScaledTanh", 1, One(legacy::scaled_tanh)),

    ("Abs", 1, One(elementwise::abs)),
    ("Acos", 7, One(elementwise::acos)),
    ("Acosh", 9, One(elementwise::acosh)),
    ("Asin", 7, One(elementwise::asin)),
    ("Asinh", 9, One(elementwise::asinh)),
    ("Atan", 7, One(elementwise::atan)),
    ("Atanh", 9, One(elementwise::atanh)),
    ("BitwiseNot", 18, One(elementwise::bitwise_not)),
    ("Ceil", 1, One(elementwise::ceil)),
    ("Celu", 12, One(elementwise::celu)),
    ("Clip", 1, One(elementwise::clip)),
    ("Cos", 7, One(elementwise::cos)),
    ("Cosh", 9, One(elementwise::cosh)),
    ("Elu", 1, One(elementwise::elu)),
    ("Erf", 9, One(elementwise::erf)),
    ("Exp", 1, One(elementwise::exp)),
    ("Floor", 1, One(elementwise::floor)),
    ("Gelu", 20, One(elementwise::gelu)),
    ("HardSigmoid", 1, One(elementwise::hard_sigmoid)),
    ("HardSwish", 14, One(elementwise::hard_swish)),
    ("IsInf", 10, One(elementwise::is_inf)),
    ("IsNaN", 9, One(elementwise::is_nan)),
    ("LeakyRelu", 1, One(elementwise::leaky_relu)),
    ("Log", 1, One(elementwise::log)),
    ("Mish", 18, One(elementwise::mish)),
    ("Neg", 1, One(elementwise::neg)),
    ("Not", 1, One(elementwise::not)),
    ("Reciprocal", 1, One(elementwise::reciprocal)),
    ("Relu", 1, One(elementwise::relu)),
    ("Round", 11, One(elementwise::round)),
    ("Selu", 1, One(elementwise::selu)),
    ("Shrink", 9, One(elementwise::shrink)),
    ("Sigmoid", 1, One(elementwise::sigmoid)),
    ("Sign", 9, One(elementwise::sign)),
    ("Sin", 7, One(elementwise::sin)),
    ("Sinh", 9, One(elementwise::sinh)),
    ("Softplus", 1, One(elementwise::softplus)),
    ("Softsign", 1, One(elementwise::softsign)),
    ("Sqrt", 1, One(elementwise::sqrt)),
    ("Swish", 24, One(elementwise::swish)),
    ("Tan", 7, One(elementwise::tan)),
    ("Tanh", 1, One(elementwise::tanh)),
    ("ThresholdedRelu", 1, One(elementwise::thresholded_relu)),

    ("Add", 1, One(elementwise::add)),
    ("And", 1, One(elementwise::and)),
    ("BitShift", 11, One(elementwise::bit_shift)),
    ("BitwiseAnd", 18, One(elementwise::bitwise_and)),
    ("BitwiseOr", 18, One(elementwise::bitwise_or)),
    ("BitwiseXor", 18, One(elementwise::bitwise_xor)),
    ("Div", 1, One(elementwise::div)),
    ("Equal", 1, One(elementwise::equal)),
    ("Greater", 1, One(elementwise::greater)),
    ("GreaterOrEqual", 12, One(elementwise::greater_or_equal)),
    ("Less", 1, One(elementwise::less)),
    ("LessOrEqual", 12, One(elementwise::less_or_equal)),
    ("Max", 1, One(elementwise::max)),
    ("Mean", 1, One(elementwise::mean)),
    ("Min", 1, One(elementwise::min)),
    ("Mod", 10, One(elementwise::modulo)),
    ("Mul", 1, One(elementwise::mul)),
    ("Or", 1, One(elementwise::or)),
    ("PRelu", 1, One(elementwise::prelu)),
    ("Pow", 1, One(elementwise::pow)),
    ("Sub", 1, One(elementwise::sub)),
    ("Sum", 1, One(elementwise::sum)),
    ("Where", 9, One(elementwise::select)),
    ("Xor", 1, One(elementwise::xor)),

    ("BitCast", 26, One(elementwise::bit_cast)),
    ("Cast", 1, One(elementwise::cast)),
    ("CastLike", 15, One(elementwise::cast_like)),
    ("Dropout", 1, Many(elementwise::dropout)),
    ("Identity", 1, Structure(sequences::identity)),

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

    ("ArgMax", 1, One(index::arg_max)),
    ("ArgMin", 1, One(index::arg_min)),
    ("CumProd", 26, One(index::cum_prod)),
    ("CumSum", 11, One(index::cum_sum)),
    ("Hardmax", 1, One(index::hardmax)),
    ("TopK", 1, Many(index::top_k)),

    ("Resize", 10, One(resize::resize)),
    ("Upsample", 1, One(resize::upsample)),

    ("CenterCropPad", 18, One(values::center_crop_pad)),
    ("Concat", 4, One(shape::concat)),
    ("DepthToSpace", 1, One(shape::depth_to_space)),
    ("Expand", 8, One(shape::expand)),
    ("Flatten", 1, One(shape::flatten)),
    ("Pad", 1, One(shape::pad)),
    ("Reshape", 1, One(shape::reshape)),
    ("Slice", 1, One(shape::slice)),
    ("SpaceToDepth", 1, One(shape::space_to_depth)),
    ("Split", 2, Many(shape::split)),
    ("Squeeze", 1, One(shape::squeeze)),
    ("Tile", 6, One(shape::tile)),
    ("Transpose", 1, One(shape::transpose)),
    ("Trilu", 14, One(shape::trilu)),
    ("Unsqueeze", 1, One(shape::unsqueeze)),

    ("Gather", 1, One(index::gather)),
    ("GatherElements", 11, One(index::gather_elements)),
    ("GatherND", 11, One(index::gather_nd)),
    ("OneHot", 9, One(index::one_hot)),
    ("ReverseSequence", 10, One(index::reverse_sequence)),
    ("Scatter", 9, One(index::scatter_elements)),
    ("ScatterElements", 11, One(index::scatter_elements)),
    ("ScatterND", 11, One(index::scatter_nd)),
    ("TensorScatter", 24, One(index::tensor_scatter)),

    ("Compress", 9, One(values::compress)),
    ("NonZero", 9, One(values::non_zero)),
    ("Range", 11, One(values::range)),
    ("Unique", 11, Many(values::unique)),

    ("Constant", 1, One(constant::constant)),
    ("ConstantOfShape", 9, One(constant::constant_of_shape)),
    ("EyeLike", 9, One(shape::eye_like)),
    ("Shape", 1, One(constant::shape)),
    ("Size", 1, One(constant::size)),

    ("If", 1, Nodes(control::if_)),
    ("Loop", 1, Nodes(control::loop_)),
    ("Scan", 8, Nodes(control::scan)),

    ("ConcatFromSequence", 11, Structure(sequences::concat_from_sequence)),
    ("Optional", 15, Structure(sequences::optional)),
    ("OptionalGetElement", 15, Structure(sequences::optional_get_element)),
    ("OptionalHasElement", 15, Structure(sequences::optional_has_element)),
    ("SequenceAt", 11, Structure(sequences::sequence_at)),
    ("SequenceConstruct", 11, Structure(sequences::sequence_construct)),
    ("SequenceEmpty", 11, Structure(sequences::sequence_empty)),
    ("SequenceErase", 11, Structure(sequences::sequence_erase)),
    ("SequenceInsert", 11, Structure(sequences::sequence_insert)),
    ("SequenceLength", 11, Structure(sequences::sequence_length)),
    ("SequenceMap", 17, Nodes(sequences::sequence_map)),
    ("SplitToSequence", 11, Structure(sequences::split_to_sequence)),

    ("RegexFullMatch", 20, One(strings::regex_full_match)),
    ("StringConcat", 20, One(strings::string_concat)),
    ("StringNormalizer", 10, One(strings::string_normalizer)),
    ("StringSplit", 20, Many(strings::string_split)),
    ("TfIdfVectorizer", 9, One(strings::tf_idf_vectorizer)),

    ("QuantizeLinear", 10, One(quantize::quantize_linear)),
    ("DequantizeLinear", 10, One(quantize::dequantize_linear)),
    ("DynamicQuantizeLinear", 11, Many(quantize::dynamic_quantize_linear)),
    ("QLinearConv", 10, One(qlinear::conv)),
    ("QLinearMatMul", 10, One(qlinear::matmul)),
    ("ConvInteger", 10, One(integer::conv_integer)),
    ("MatMulInteger", 10, One(integer::matmul_integer)),
];

/// Ops that ONNX Runtime adds, most of them for quantized networks.
#[rustfmt::skip]
const MICROSOFT: Table = &[
    ("QuantizeLinear", 1, One(quantize::microsoft_quantize_linear)),
    ("DequantizeLinear", 1, One(quantize::microsoft_dequantize_linear)),

    ("QLinearConv", 1, One(qlinear::microsoft_conv)),
    ("QGemm", 1, One(qlinear::gemm)),
    ("QLinearAdd", 1, One(qlinear::add)),
    ("QLinearMul", 1, One(qlinear::mul)),
    ("QLinearWhere", 1, One(qlinear::select)),
    ("QLinearSigmoid", 1, One(qlinear::sigmoid)),
    ("QLinearLeakyRelu", 1, One(qlinear::leaky_relu)),
    ("QLinearSoftmax", 1, One(qlinear::softmax)),
    ("QLinearAveragePool", 1, One(qlinear::average_pool)),
    ("QLinearGlobalAveragePool", 1, One(qlinear::global_average_pool)),
    ("QLinearReduceMean", 1, One(qlinear::reduce_mean)),
    ("QLinearConcat", 1, One(qlinear::concat)),

    ("FusedConv", 1, One(fused::conv)),
    ("FusedGemm", 1, One(fused::gemm)),
    ("FusedMatMul", 1, One(fused::matmul)),
    ("FusedMatMulActivation", 1, One(fused::matmul_activation)),
    ("GemmFastGelu", 1, One(fused::gemm_fast_gelu)),
    ("NhwcConv", 1, One(fused::nhwc_conv)),
    ("NhwcFusedConv", 1, One(fused::nhwc_conv)),
    ("TransposeMatMul", 1, One(fused::matmul)),
    ("BiasAdd", 1, One(fused::bias_add)),
    ("BiasDropout", 1, Many(fused::bias_dropout)),
    ("BiasGelu", 1, One(fused::bias_gelu)),
    ("BiasSoftmax", 1, One(fused::bias_softmax)),
    ("BiasSplitGelu", 1, One(fused::bias_split_gelu)),
    ("FastGelu", 1, One(fused::fast_gelu)),
    ("Gelu", 1, One(fused::gelu)),
    ("QuickGelu", 1, One(fused::quick_gelu)),
    ("EmbedLayerNormalization", 1, Many(fused::embed_layer_normalization)),
    ("GroupNorm", 1, One(fused::group_norm)),
    ("QEmbedLayerNormalization", 1, Many(fused::quantized_embed_layer_normalization)),
    ("SkipGroupNorm", 1, Many(fused::skip_group_norm)),
    ("SkipLayerNormalization", 1, Many(fused::skip_layer_normalization)),
    ("SkipSimplifiedLayerNormalization", 1, Many(fused::skip_simplified_layer_normalization)),

    ("BranchwiseRMSNorm", 1, One(gated::branchwise_rms_norm)),
    ("GatedAdd", 1, One(gated::gated_add)),
    ("GatedRMSNorm", 1, One(gated::gated_rms_norm)),
    ("LinearAttentionGate", 1, Many(gated::linear_attention_gate)),
    ("ScaledSiLU", 1, One(gated::scaled_silu)),

    ("MoE", 1, One(experts::mixture_of_experts)),
    ("QMoE", 1, One(experts::quantized_mixture_of_experts)),

    ("Attention", 1, Many(contrib_attention::attention)),
    ("DecoderMaskedMultiHeadAttention", 1, Many(contrib_attention::decoder_attention)),
    ("GroupQueryAttention", 1, Many(contrib_attention::group_query_attention)),
    ("MRotaryEmbedding", 1, One(contrib_attention::multimodal_rotary_embedding)),
    ("MultiHeadAttention", 1, Many(contrib_attention::multi_head_attention)),
    ("QAttention", 1, Many(contrib_attention::quantized_attention)),
    ("RelativePositionBias", 1, One(contrib::relative_position_bias)),
    ("RotaryEmbedding", 1, One(contrib_attention::rotary_embedding)),

    ("CDist", 1, One(contrib::cdist)),
    ("ConvTransposeWithDynamicPads", 1, One(contrib::conv_transpose_with_dynamic_pads)),
    ("CropAndResize", 1, One(contrib::crop_and_resize)),
    ("DynamicTimeWarping", 1, One(contrib::dynamic_time_warping)),
    ("ExpandDims", 1, One(contrib::expand_dims)),
    ("GatherND", 1, One(index::gather_nd)),
    ("GridSample", 1, One(resize::grid_sample)),
    ("Inverse", 1, One(contrib::inverse)),
    ("Irfft", 1, One(contrib::irfft)),
    ("MurmurHash3", 1, One(tokens::murmur_hash)),
    ("NGramRepeatBlock", 1, One(tokens::n_gram_repeat_block)),
    ("NhwcMaxPool", 1, One(pool::nhwc_max_pool)),
    ("Pad", 1, One(shape::pad)),
    ("Range", 1, One(values::range)),
    ("Rfft", 1, One(contrib::rfft)),
    ("SampleOp", 1, One(contrib::sample)),
    ("Tokenizer", 1, One(strings::tokenizer)),
    ("Trilu", 1, One(shape::trilu)),
    ("UnfoldTensor", 1, One(contrib::unfold_tensor)),
    ("Unique", 1, Many(contrib::unique)),
    ("WordConvEmbedding", 1, One(tokens::word_conv_embedding)),

    // Refused, with a reason.
    ("AttnLSTM", 1, Nodes(contrib::attention_lstm)),
    ("BeamSearch", 1, Nodes(contrib::generation)),
    ("BifurcationDetector", 1, Nodes(contrib::generation)),
    ("GatherPacked", 1, Nodes(contrib::one_kernels_layout)),
    ("GreedySearch", 1, Nodes(contrib::generation)),
    ("MatMulFpQ4", 1, Nodes(contrib::one_kernels_layout)),
    ("Sampling", 1, Nodes(contrib::generation)),
    ("SparseAttention", 1, Nodes(contrib::sparse_attention)),
    ("SparseToDenseMatMul", 1, Nodes(contrib::sparse_product)),
    ("WhisperBeamSearch", 1, Nodes(contrib::generation)),
    ("PackedAttention", 1, Nodes(contrib::packed)),
    ("PackedMultiHeadAttention", 1, Nodes(contrib::packed)),
    ("PagedAttention", 1, Nodes(contrib::packed)),
    ("RemovePadding", 1, Nodes(contrib::packed)),
    ("RestorePadding", 1, Nodes(contrib::packed)),

    ("MatMulIntegerToFloat", 1, One(integer::matmul_integer_to_float)),
    ("DynamicQuantizeMatMul", 1, One(integer::dynamic_quantize_matmul)),
    ("DynamicQuantizeLSTM", 1, Many(recurrent::dynamic_quantize_lstm)),
    ("GatherBlockQuantized", 1, One(gather_quantized::gather_block_quantized)),
    ("MatMulBnb4", 1, One(weight_only::matmul_bnb4)),
    ("MatMulInteger16", 1, One(integer::matmul_integer_16)),
    ("MatMulNBits", 1, One(weight_only::matmul_n_bits)),
];

/// Ops of classical machine learning.
#[rustfmt::skip]
const ML: Table = &[
    ("ArrayFeatureExtractor", 1, One(ml::array_feature_extractor)),
    ("Binarizer", 1, One(ml::binarizer)),
    ("CastMap", 1, Nodes(ml::of_maps)),
    ("CategoryMapper", 1, One(ml::category_mapper)),
    ("DictVectorizer", 1, Nodes(ml::of_maps)),
    ("FeatureVectorizer", 1, One(ml::feature_vectorizer)),
    ("Imputer", 1, One(ml::imputer)),
    ("LabelEncoder", 1, One(ml::label_encoder)),
    ("LinearClassifier", 1, Many(ml::linear_classifier)),
    ("LinearRegressor", 1, One(ml::linear_regressor)),
    ("Normalizer", 1, One(ml::normalizer)),
    ("OneHotEncoder", 1, One(ml::one_hot_encoder)),
    ("Scaler", 1, One(ml::scaler)),
    ("SVMClassifier", 1, Many(svm::classifier)),
    ("SVMRegressor", 1, One(svm::regressor)),
    ("TreeEnsemble", 5, One(trees::ensemble)),
    ("TreeEnsembleClassifier", 1, Many(trees::classifier)),
    ("TreeEnsembleRegressor", 1, One(trees::regressor)),
    ("ZipMap", 1, Structure(ml::zip_map)),
];

/// Ops that ONNX tries out.
const PREVIEW: Table = &[("FlexAttention", 1, Nodes(linear_attention::flex_attention))];

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
