//! Ops of classical machine learning, by functions of elements and matrix products: features, linear models, and what all
//! models do with their scores. f32 and f64 are computed as they are, integers as f32.

use super::{
    compose::{Result, float_tensor},
    lengths, matmul,
};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{
        MapKey, NodeError,
        body::NodeDef,
        import::{Held, Node},
    },
    ops::{ArgExtreme, BinaryKind, ReduceKind, SliceSpec, UnaryKind},
};

/// Features in a float type that is computed in.
pub(super) fn features(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
    match node.ty(x).dtype {
        DType::F64 => Ok(x),
        _ => node.cast_to("features", DType::F32, x),
    }
}

/// Features as rows: a vector is one row.
pub(super) fn rows(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let x = features(node, x)?;
    let shape = node.shape(x);
    match shape.dims() {
        [n] => node.shaped("row", [1, *n], x),
        [_, _] => Ok(x),
        _ => Err(OpError::shape(format!("takes rows of features, got {}", node.ty(x))).into()),
    }
}

/// A constant of numbers in the type of a value.
pub(super) fn constants(
    node: &mut Node<'_, '_>,
    part: &str,
    dims: impl Into<Vec<usize>>,
    values: &[f32],
    like: ValueId,
) -> Result<ValueId> {
    let shape = Shape::new(dims)?;
    if shape.elements() != values.len() {
        return Err(OpError::shape(format!("{} numbers for {part} {shape:?}", values.len())).into());
    }
    let values: Vec<f64> = values.iter().map(|&x| x.into()).collect();
    let tensor = float_tensor(node.ty(like).dtype, shape, &values)?;
    Ok(node.constant_part(part, tensor))
}

/// Elements along the last axis, by index.
pub(super) fn array_feature_extractor(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, indices) = (node.operand(0, "X")?, node.operand(1, "Y")?);
    let count = node.shape(indices).elements();
    let indices = node.shaped("indices", [count], indices)?;
    let shape = node.shape(x);
    match shape.rank() {
        0 => Err(OpError::shape("takes features, got one number").into()),
        1 => {
            let picked = node.gathered("picked", 0, x, indices)?;
            node.shaped("", [1, count], picked)
        }
        rank => node.gathered("", rank - 1, x, indices),
    }
}

/// 1 above a threshold, 0 elsewhere.
pub(super) fn binarizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let own = node.ty(x).dtype;
    let wide = features(node, x)?;
    let threshold = node.float("threshold", 0.0)?;
    let threshold = node.number("threshold", threshold.into(), node.ty(wide).dtype)?;
    let is_above = node.binary("is_above", BinaryKind::Greater, wide, threshold)?;
    node.cast_to("", own, is_above)
}

/// (x − offset)·scale, of each feature or of all.
pub(super) fn scaler(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let x = node.cast_to("features", DType::F32, x)?;
    let mut y = x;
    if let Some(offset) = node.floats("offset")? {
        let offset = constants(node, "offset", [offset.len()], &offset, x)?;
        y = node.sub("centred", y, offset)?;
    }
    if let Some(scale) = node.floats("scale")? {
        let scale = constants(node, "scale", [scale.len()], &scale, x)?;
        y = node.mul("scaled", y, scale)?;
    }
    Ok(y)
}

/// Rows divided by their norm, which is at least 1e-30.
pub(super) fn normalizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let x = node.cast_to("features", DType::F32, x)?;
    let axis = node.shape(x).rank().saturating_sub(1);
    let (kind, of) = match node.string("norm", "MAX")? {
        // ONNX Runtime takes the largest number, not the largest magnitude.
        "MAX" => (ReduceKind::Max, x),
        "L1" => (ReduceKind::L1, x),
        "L2" => (ReduceKind::L2, x),
        other => return Err(NodeError::attribute("norm", format!("is {other:?}"))),
    };
    let norm = node.reduced("norm", kind, vec![axis], of)?;
    let zero = node.number("zero", 0.0, DType::F32)?;
    let none = node.binary("is_zero", BinaryKind::Equal, norm, zero)?;
    let one = node.number("one", 1.0, DType::F32)?;
    let norm = node.chosen("divisor", none, one, norm)?;
    node.div("", x, norm)
}

/// Other numbers for those that are missing: NaN, or one that the attributes name.
pub(super) fn imputer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let dtype = node.ty(x).dtype;
    let columns = node.shape(x).last().copied().unwrap_or(1);
    let fits = |n: usize| match n {
        1 => Ok(Shape::scalar()),
        n if n == columns => Shape::new([n]).map_err(NodeError::from),
        n => Err(OpError::shape(format!("{n} numbers for {columns} features")).into()),
    };
    let (floats, ints) = (node.floats("imputed_value_floats")?, node.ints("imputed_value_int64s")?);
    let (float, int) = (node.optional_float("replaced_value_float")?, node.int("replaced_value_int64", 0)?);
    match (floats, ints) {
        (Some(values), _) if dtype.is_float() => {
            let shape = fits(values.len())?;
            let values = constants(node, "values", shape.to_vec(), &values, x)?;
            let replaced = float.unwrap_or(0.0);
            let missing = match replaced.is_nan() {
                true => is_nan(node, "is_missing", x)?,
                false => {
                    let replaced = node.number("replaced", replaced.into(), dtype)?;
                    node.binary("is_missing", BinaryKind::Equal, x, replaced)?
                }
            };
            node.chosen("", missing, values, x)
        }
        (_, Some(values)) if dtype == DType::S64 => {
            let values = Tensor::from_vec(fits(values.len())?, values).map_err(OpError::from)?;
            let (values, replaced) =
                (node.constant_part("values", values), node.constant_part("replaced", Tensor::scalar(int)));
            let missing = node.binary("is_missing", BinaryKind::Equal, x, replaced)?;
            node.chosen("", missing, values, x)
        }
        _ => Err(OpError::attribute(format!("no numbers are given for {dtype}")).into()),
    }
}

/// Whether elements are not numbers: those are not equal to themselves.
fn is_nan(node: &mut Node<'_, '_>, part: &str, x: ValueId) -> Result<ValueId> {
    let same = node.binary(&format!("{part}_same"), BinaryKind::Equal, x, x)?;
    node.unary(part, UnaryKind::Not, same)
}

/// Operands next to each other, each cut or filled with zeros to the number of features that the attribute says.
pub(super) fn feature_vectorizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let operands = node.operands("X")?;
    let sizes = node.ints("inputdimensions")?.unwrap_or_default();
    let sizes = lengths("inputdimensions", &sizes)?;
    if sizes.len() != operands.len() {
        let why = format!("has {} entries for {} operands", sizes.len(), operands.len());
        return Err(NodeError::attribute("inputdimensions", why));
    }
    let mut parts = Vec::new();
    for (i, (x, size)) in operands.into_iter().zip(sizes).enumerate() {
        let x = node.cast_to(&format!("features{i}"), DType::F32, x)?;
        let shape = node.shape(x);
        let x = match *shape.dims() {
            [n] => node.shaped(&format!("column{i}"), [n, 1], x)?,
            [_, _] => x,
            _ => return Err(OpError::shape(format!("takes rows of features, got {}", node.ty(x))).into()),
        };
        let len = node.shape(x)[1].min(size);
        let x = node.sliced(&format!("cut{i}"), 1, SliceSpec { start: 0, len, step: 1 }, x)?;
        parts.push(node.padded(&format!("filled{i}"), 1, size - len, 0.0, x)?);
    }
    node.joined("", 1, &parts)
}

/// 1 where an element is a category, along a new last axis.
pub(super) fn one_hot_encoder(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    // Without, an element that is no category is an error, which only data can show.
    node.flag("zeros", true)?;
    let ints = node.ints("cats_int64s")?.filter(|c| !c.is_empty());
    let texts = node.strings("cats_strings")?.filter(|c| !c.is_empty());
    let categories = match (ints, texts) {
        (Some(ints), None) => Tensor::from_vec(Shape::new([ints.len()])?, ints).map_err(OpError::from)?,
        (None, Some(texts)) => text_tensor(node, &texts)?,
        _ => return Err(OpError::attribute("categories must be integers or texts").into()),
    };
    let mut dims = node.shape(x).to_vec();
    dims.push(1);
    let x = match node.ty(x).dtype {
        DType::Str => x,
        _ => node.cast_to("integers", DType::S64, x)?,
    };
    let x = node.shaped("apart", dims, x)?;
    let categories = node.constant_part("categories", categories);
    let hot = node.binary("hot", BinaryKind::Equal, x, categories)?;
    node.cast_to("", DType::F32, hot)
}

/// The numbers of texts of attributes.
fn text_tensor(node: &Node<'_, '_>, texts: &[String]) -> Result<Tensor> {
    let numbers: Vec<i64> = texts.iter().map(|text| node.texts().number(text)).collect();
    let tensor = Tensor::from_vec_as(DType::Str, Shape::new([texts.len()])?, numbers);
    Ok(tensor.map_err(OpError::from)?)
}

/// Keys, or what stands for them: of the attributes the one that is there.
fn column(
    node: &mut Node<'_, '_>,
    [floats, ints, texts, tensor]: [&'static str; 4],
    count: Option<usize>,
) -> Result<Tensor> {
    let vector = |n: usize| Shape::new([n]);
    let (given_floats, given_ints) = (node.floats(floats)?, node.ints(ints)?);
    let (given_texts, given) = (node.strings(texts)?, node.tensor(tensor)?);
    let column = if let Some(v) = given_floats.filter(|v| !v.is_empty()) {
        Tensor::from_vec(vector(v.len())?, v).map_err(OpError::from)?
    } else if let Some(v) = given_ints.filter(|v| !v.is_empty()) {
        Tensor::from_vec(vector(v.len())?, v).map_err(OpError::from)?
    } else if let Some(v) = given_texts.filter(|v| !v.is_empty()) {
        text_tensor(node, &v)?
    } else {
        given.ok_or_else(|| {
            OpError::attribute(format!("there is none of {floats}, {ints}, {texts} and {tensor}"))
        })?
    };
    match count.is_none_or(|n| column.shape().elements() == n) {
        true => Ok(column),
        false => Err(OpError::shape(format!("{ints}: {} for other keys", column.ty())).into()),
    }
}

/// Labels that stand for others, by where each is equal to one of the keys. Opset 1 of the domain has texts and their places.
pub(super) fn label_encoder(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let (float, int) = (node.optional_float("default_float")?, node.int("default_int64", -1)?);
    let text = node.string("default_string", "_Unused")?;
    if let Some(classes) = node.strings("classes_strings")? {
        return by_place(node, x, &classes, (text, int));
    }
    let keys = column(node, ["keys_floats", "keys_int64s", "keys_strings", "keys_tensor"], None)?;
    let count = keys.shape().elements();
    let names = ["values_floats", "values_int64s", "values_strings", "values_tensor"];
    let values = column(node, names, Some(count))?;
    let (given, dtype) = (node.tensor("default_tensor")?, values.dtype());
    let default = match (given, dtype) {
        (Some(given), _) if given.dtype() == dtype && given.shape().elements() == 1 => given,
        (_, DType::S64) => Tensor::scalar(int),
        (_, DType::Str) => text_tensor(node, &[text.to_owned()])?,
        (_, dtype) => float_tensor(dtype, Shape::scalar(), &[float.unwrap_or(-0.0).into()])?,
    };
    looked_up(node, x, &keys, values, default)
}

/// Texts to their places in a list, or places to texts.
fn by_place(
    node: &mut Node<'_, '_>,
    x: ValueId,
    texts: &[String],
    (text, int): (&str, i64),
) -> Result<ValueId> {
    let all = text_tensor(node, texts)?;
    let places = (0..texts.len() as i64).collect();
    let places = Tensor::from_vec(all.shape().clone(), places).map_err(OpError::from)?;
    match node.ty(x).dtype {
        DType::Str => looked_up(node, x, &all, places, Tensor::scalar(int)),
        _ => {
            let default = text_tensor(node, &[text.to_owned()])?;
            looked_up(node, x, &places, all, default)
        }
    }
}

/// Texts to integers, or integers to texts.
pub(super) fn category_mapper(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "X")?;
    let texts = node.strings("cats_strings")?.unwrap_or_default();
    let ints = node.ints("cats_int64s")?.unwrap_or_default();
    let (text, int) = (node.string("default_string", "_Unused")?, node.int("default_int64", -1)?);
    if texts.len() != ints.len() {
        return Err(OpError::shape(format!("{} texts for {} integers", texts.len(), ints.len())).into());
    }
    let all = text_tensor(node, &texts)?;
    let ints = Tensor::from_vec(all.shape().clone(), ints).map_err(OpError::from)?;
    match node.ty(x).dtype {
        DType::Str => looked_up(node, x, &all, ints, Tensor::scalar(int)),
        _ => {
            let default = text_tensor(node, &[text.to_owned()])?;
            looked_up(node, x, &ints, all, default)
        }
    }
}

/// The value at the first key that an element is equal to, or the default.
fn looked_up(
    node: &mut Node<'_, '_>,
    x: ValueId,
    keys: &Tensor,
    values: Tensor,
    default: Tensor,
) -> Result<ValueId> {
    let count = keys.shape().elements();
    if node.ty(x).dtype != keys.dtype() {
        return Err(OpError::dtype(format!("keys {} of {}", keys.ty(), node.ty(x))).into());
    }
    let mut dims = node.shape(x).to_vec();
    let axis = dims.len();
    dims.push(1);
    let apart = node.shaped("apart", dims.clone(), x)?;
    let keys_part = node.constant_part("keys", keys.clone());
    let keys_part = node.shaped("key_row", [count], keys_part)?;
    let mut is_key = node.binary("is_key", BinaryKind::Equal, apart, keys_part)?;
    if keys.dtype().is_float() && keys.to_f64().iter().any(|k| k.is_nan()) {
        let (x_nan, key_nan) = (is_nan(node, "x_nan", apart)?, is_nan(node, "key_nan", keys_part)?);
        let both = node.binary("both_nan", BinaryKind::And, x_nan, key_nan)?;
        is_key = node.binary("is_key_or_nan", BinaryKind::Or, is_key, both)?;
    }
    let found = node.cast_to("found", DType::S32, is_key)?;
    let place = ArgExtreme { largest: true, axis, keep_dims: false, last: false };
    let place = node.emit_part("place", place, &[found])?;
    let any = node.reduced("any", ReduceKind::Max, vec![axis], found)?;
    let any = node.cast_to("is_any", DType::Bool, any)?;
    dims.pop();
    let any = node.shaped("is_known", dims, any)?;
    let values = node.constant_part("values", values);
    let values = node.shaped("value_row", [count], values)?;
    let picked = node.gathered("picked", 0, values, place)?;
    let default = node.constant_part("default", default);
    let default = node.shaped("default_value", [], default)?;
    node.chosen("", any, picked, default)
}

/// Maps from labels of classes to scores, one for each row.
pub(super) fn zip_map(node: &mut Node<'_, '_>) -> Result<Vec<Held>> {
    let x = node.operand(0, "X")?;
    let labels = Labels::of(node, "classlabels_int64s")?;
    let shape = node.shape(x);
    if shape.rank() != 2 || shape[1] != labels.count() || node.ty(x).dtype != DType::F32 {
        return Err(OpError::shape(format!("{} labels of {}", labels.count(), node.ty(x))).into());
    }
    Ok(vec![Held::Maps(x, labels.keys())])
}

/// What is made of scores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PostTransform {
    None,
    Logistic,
    Softmax,
    /// Softmax of what is not 0.
    SoftmaxZero,
    Probit,
}

impl PostTransform {
    pub(super) fn of(node: &mut Node<'_, '_>) -> Result<PostTransform> {
        Ok(match node.string("post_transform", "NONE")? {
            "NONE" => PostTransform::None,
            "LOGISTIC" => PostTransform::Logistic,
            "SOFTMAX" => PostTransform::Softmax,
            "SOFTMAX_ZERO" => PostTransform::SoftmaxZero,
            "PROBIT" => PostTransform::Probit,
            other => return Err(NodeError::attribute("post_transform", format!("is {other:?}"))),
        })
    }

    /// Of scores `[rows, targets]`.
    pub(super) fn apply(self, node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
        match self {
            PostTransform::None => Ok(x),
            PostTransform::Logistic => node.unary("logistic", UnaryKind::Sigmoid, x),
            PostTransform::Softmax => softmax(node, x),
            PostTransform::SoftmaxZero => {
                let zero = node.number("no_score", 0.0, node.ty(x).dtype)?;
                let is_zero = node.binary("is_no_score", BinaryKind::Equal, x, zero)?;
                let shares = softmax(node, x)?;
                // 0 adds e^−max to the sum, but stays 0.
                node.chosen("shares_of_scores", is_zero, zero, shares)
            }
            PostTransform::Probit => probit(node, x),
        }
    }
}

fn softmax(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
    let dtype = node.ty(x).dtype;
    if dtype == DType::F32 {
        return node.softmax_along("softmax", 1, x);
    }
    let largest = node.reduced("largest", ReduceKind::Max, vec![1], x)?;
    let below = node.sub("below", x, largest)?;
    let powers = node.unary("powers", UnaryKind::Exp, below)?;
    let total = node.reduced("total", ReduceKind::Sum, vec![1], powers)?;
    node.div("softmax", powers, total)
}

/// √2·erf⁻¹(2x − 1), by Winitzki's approximation, as ONNX Runtime has it.
fn probit(node: &mut Node<'_, '_>, x: ValueId) -> Result<ValueId> {
    let dtype = node.ty(x).dtype;
    let mut number = |part: &str, value: f64| node.number(&format!("probit_{part}"), value, dtype);
    let (one, two) = (number("one", 1.0)?, number("two", 2.0)?);
    let (first, half) = (number("first", 2.0 / (std::f64::consts::PI * 0.147))?, number("half", 0.5)?);
    let (inverse, root_two) =
        (number("inverse", 1.0 / 0.147)?, number("root_two", std::f64::consts::SQRT_2)?);
    let twice = node.mul("probit_twice", x, two)?;
    let x = node.sub("probit_x", twice, one)?;
    let sign = node.unary("probit_sign", UnaryKind::Sign, x)?;
    let square = node.mul("probit_square", x, x)?;
    let rest = node.sub("probit_rest", one, square)?;
    let log = node.unary("probit_log", UnaryKind::Log, rest)?;
    let halved = node.mul("probit_halved", log, half)?;
    let v = node.add("probit_v", first, halved)?;
    let v2 = node.mul("probit_v2", log, inverse)?;
    let squared = node.mul("probit_squared", v, v)?;
    let below = node.sub("probit_below", squared, v2)?;
    let root = node.unary("probit_root", UnaryKind::Sqrt, below)?;
    let above = node.sub("probit_above", root, v)?;
    let y = node.unary("probit_size", UnaryKind::Sqrt, above)?;
    let y = node.mul("probit_signed", y, sign)?;
    node.mul("probit", y, root_two)
}

/// The labels of classes.
pub(super) enum Labels {
    Ints(Vec<i64>),
    Strings(Vec<String>),
}

impl Labels {
    pub(super) fn of(node: &mut Node<'_, '_>, ints: &'static str) -> Result<Labels> {
        let strings = node.strings("classlabels_strings")?.filter(|s| !s.is_empty());
        let ints = node.ints(ints)?.filter(|i| !i.is_empty());
        match (ints, strings) {
            (Some(ints), None) => Ok(Labels::Ints(ints)),
            (None, Some(strings)) => Ok(Labels::Strings(strings)),
            (None, None) => Err(OpError::attribute("there are no labels of classes").into()),
            _ => Err(OpError::attribute("labels of classes are both integers and strings").into()),
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Labels::Ints(ints) => ints.len(),
            Labels::Strings(strings) => strings.len(),
        }
    }

    fn keys(self) -> Vec<MapKey> {
        match self {
            Labels::Ints(ints) => ints.into_iter().map(MapKey::Int).collect(),
            Labels::Strings(texts) => texts.into_iter().map(|t| MapKey::Text(t.into())).collect(),
        }
    }

    /// The label of each class in a vector of them.
    pub(super) fn of_classes(&self, node: &mut Node<'_, '_>, classes: ValueId) -> Result<ValueId> {
        match self {
            Labels::Ints(ints) => {
                let shape = Shape::new([ints.len()])?;
                let labels = Tensor::from_vec(shape, ints.clone()).map_err(OpError::from)?;
                let labels = node.constant_part("labels", labels);
                node.gathered("label", 0, labels, classes)
            }
            Labels::Strings(texts) => {
                let labels = text_tensor(node, texts)?;
                let labels = node.constant_part("labels", labels);
                node.gathered("label", 0, labels, classes)
            }
        }
    }

    /// The label of the largest score of each row.
    pub(super) fn of_largest(&self, node: &mut Node<'_, '_>, scores: ValueId) -> Result<ValueId> {
        let best = ArgExtreme { largest: true, axis: 1, keep_dims: false, last: false };
        let best = node.emit_part("best", best, &[scores])?;
        self.of_classes(node, best)
    }
}

/// −x and x next to each other, of one column; or 1 − x and x.
pub(super) fn two_columns(node: &mut Node<'_, '_>, x: ValueId, by_one: bool) -> Result<ValueId> {
    let other = match by_one {
        true => {
            let one = node.number("all", 1.0, node.ty(x).dtype)?;
            node.sub("other", one, x)?
        }
        false => node.unary("other", UnaryKind::Neg, x)?,
    };
    node.joined("both", 1, &[other, x])
}

/// x·coefficientsᵀ + intercepts, coefficients `[targets, features]`.
fn linear(node: &mut Node<'_, '_>, x: ValueId, targets: Option<usize>) -> Result<ValueId> {
    let coefficients =
        node.floats("coefficients")?.ok_or_else(|| NodeError::attribute("coefficients", "is missing"))?;
    let intercepts = node.floats("intercepts")?.filter(|i| !i.is_empty());
    let features = node.shape(x)[1].max(1);
    let targets = targets.unwrap_or(coefficients.len() / features);
    let weights = constants(node, "coefficients", [targets, features], &coefficients, x)?;
    let weights = node.permuted("weights", [1, 0], weights)?;
    let y = matmul::product_of(node, "product", x, weights)?;
    match intercepts {
        None => Ok(y),
        Some(intercepts) => {
            let intercepts = constants(node, "intercepts", [intercepts.len()], &intercepts, x)?;
            node.add("scores", y, intercepts)
        }
    }
}

pub(super) fn linear_regressor(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = rows(node)?;
    let targets = node.count("targets")?.unwrap_or(1);
    let post = PostTransform::of(node)?;
    let y = linear(node, x, Some(targets))?;
    let y = post.apply(node, y)?;
    node.cast_to("", DType::F32, y)
}

pub(super) fn linear_classifier(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let x = rows(node)?;
    node.ignore(&["multi_class"]);
    let labels = Labels::of(node, "classlabels_ints")?;
    let post = PostTransform::of(node)?;
    let scores = linear(node, x, None)?;
    let scores = node.cast_to("scores_f32", DType::F32, scores)?;
    if node.shape(scores)[1] == 1 && labels.count() == 2 {
        let positive =
            node.number("half", if post == PostTransform::None { 0.0 } else { 0.5 }, DType::F32)?;
        let (own, both) = (post_of_one(node, post, scores)?, two_columns(node, scores, false)?);
        let shares = post.apply(node, both)?;
        let is_second = node.binary("is_second", BinaryKind::Greater, own, positive)?;
        let classes = node.cast_to("classes", DType::S64, is_second)?;
        let count = node.shape(classes)[0];
        let classes = node.shaped("class", [count], classes)?;
        let label = labels.of_classes(node, classes)?;
        return Ok(vec![label, shares]);
    }
    let label = labels.of_largest(node, scores)?;
    Ok(vec![label, post.apply(node, scores)?])
}

/// The score of the second class by itself, which is compared with ½ where it is a probability.
fn post_of_one(node: &mut Node<'_, '_>, post: PostTransform, score: ValueId) -> Result<ValueId> {
    match post {
        PostTransform::None => Ok(score),
        _ => node.unary("own_share", UnaryKind::Sigmoid, score),
    }
}

/// Ops of maps, which only come from outside: a map is as long as its caller likes, and a graph has fixed shapes.
pub(super) fn of_maps(_: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let why = "takes a map, which is no input of a model here: give it a tensor of the values in the order of their keys";
    Err(OpError::unsupported(why).into())
}
