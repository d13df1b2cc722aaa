//! Support vector machines: kernels between rows and support vectors by matrix products, and sums by those of coefficients.

use super::{
    compose::Result,
    matmul,
    ml::{Labels, PostTransform, constants, rows, two_columns},
};
use crate::{
    DType, OpError, ValueId,
    onnx::{NodeError, import::Node},
    ops::{BinaryKind, CoupleProbabilities, ReduceKind, UnaryKind},
};

/// The similarity of rows and vectors.
struct Kernel {
    kind: Kind,
    gamma: f32,
    offset: f32,
    degree: f32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Linear,
    Poly,
    Rbf,
    Sigmoid,
}

fn missing(name: &str) -> NodeError {
    NodeError::attribute(name, "is missing")
}

impl Kernel {
    fn of(node: &mut Node<'_, '_>) -> Result<Kernel> {
        let kind = match node.string("kernel_type", "LINEAR")? {
            "LINEAR" => Kind::Linear,
            "POLY" => Kind::Poly,
            "RBF" => Kind::Rbf,
            "SIGMOID" => Kind::Sigmoid,
            other => return Err(NodeError::attribute("kernel_type", format!("is {other:?}"))),
        };
        let parameters = node.floats("kernel_params")?.unwrap_or_default();
        let at = |i: usize| parameters.get(i).copied().unwrap_or(0.0);
        Ok(Kernel { kind, gamma: at(0), offset: at(1), degree: at(2) })
    }

    /// Between each row of x and each of `count` vectors: `[rows, count]`.
    fn between(&self, node: &mut Node<'_, '_>, x: ValueId, vectors: &[f32], count: usize) -> Result<ValueId> {
        let (dtype, shape) = (node.ty(x).dtype, node.shape(x));
        let features = shape[1];
        let vectors = constants(node, "vectors", [count, features], vectors, x)?;
        if self.kind == Kind::Rbf {
            let apart = node.shaped("rows_apart", [shape[0], 1, features], x)?;
            let vectors = node.shaped("vectors_apart", [1, count, features], vectors)?;
            let difference = node.sub("difference", apart, vectors)?;
            let squares = node.mul("squares", difference, difference)?;
            let distance = node.reduced("distance", ReduceKind::Sum, vec![2], squares)?;
            let distance = node.shaped("distances", [shape[0], count], distance)?;
            let gamma = node.number("gamma", f64::from(-self.gamma), dtype)?;
            let power = node.mul("power", distance, gamma)?;
            return node.unary("kernel", UnaryKind::Exp, power);
        }
        let columns = node.permuted("columns", [1, 0], vectors)?;
        let products = matmul::product_of(node, "products", x, columns)?;
        if self.kind == Kind::Linear {
            return Ok(products);
        }
        let (gamma, offset) = (
            node.number("gamma", self.gamma.into(), dtype)?,
            node.number("coef0", self.offset.into(), dtype)?,
        );
        let scaled = node.mul("scaled", products, gamma)?;
        let moved = node.add("moved", scaled, offset)?;
        match self.kind {
            Kind::Sigmoid => node.unary("kernel", UnaryKind::Tanh, moved),
            _ => {
                let degree = node.number("degree", self.degree.into(), dtype)?;
                node.binary("kernel", BinaryKind::Pow, moved, degree)
            }
        }
    }
}

pub(super) fn regressor(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = rows(node)?;
    let kernel = Kernel::of(node)?;
    node.ignore(&["n_targets"]);
    let count = super::lengths("n_supports", &[node.int("n_supports", 0)?])?[0];
    let coefficients = node.floats("coefficients")?.ok_or_else(|| missing("coefficients"))?;
    let rho = node.floats("rho")?.and_then(|r| r.first().copied()).unwrap_or(0.0);
    let vectors = node.floats("support_vectors")?.unwrap_or_default();
    let (one_class, post) = (node.flag("one_class", false)?, PostTransform::of(node)?);
    let kernels = match count {
        0 => x,
        _ => kernel.between(node, x, &vectors, count)?,
    };
    let weights = constants(node, "coefficients", [coefficients.len(), 1], &coefficients, x)?;
    let sum = matmul::product_of(node, "sum", kernels, weights)?;
    let dtype = node.ty(sum).dtype;
    let rho = node.number("rho", rho.into(), dtype)?;
    let mut y = node.add("score", sum, rho)?;
    if one_class {
        let zero = node.number("zero", 0.0, dtype)?;
        let (inside, outside) = (node.number("inside", 1.0, dtype)?, node.number("outside", -1.0, dtype)?);
        let is_inside = node.binary("is_inside", BinaryKind::Greater, y, zero)?;
        y = node.chosen("side", is_inside, inside, outside)?;
    }
    let y = post.apply(node, y)?;
    node.cast_to("", DType::F32, y)
}

/// The classes that vote against each other, the first ones first.
fn pairs(classes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..classes).flat_map(move |i| (i + 1..classes).map(move |j| (i, j)))
}

/// Every pair of classes decides by a sum over its support vectors; the class with the most decisions wins.
pub(super) fn classifier(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let x = rows(node)?;
    let labels = Labels::of(node, "classlabels_ints")?;
    let kernel = Kernel::of(node)?;
    let post = PostTransform::of(node)?;
    let coefficients = node.floats("coefficients")?.ok_or_else(|| missing("coefficients"))?;
    let rho = node.floats("rho")?.ok_or_else(|| missing("rho"))?;
    let vectors = node.floats("support_vectors")?.unwrap_or_default();
    let (prob_a, prob_b) =
        (node.floats("prob_a")?.unwrap_or_default(), node.floats("prob_b")?.unwrap_or_default());
    let per_class = node.ints("vectors_per_class")?.unwrap_or_default();
    let per_class = super::lengths("vectors_per_class", &per_class)?;
    let (classes, count) = (labels.count(), per_class.iter().fold(0usize, |n, &c| n.saturating_add(c)));
    if count == 0 {
        return linear(node, x, &labels, &coefficients, &rho, post);
    }
    let decisions = classes * classes.saturating_sub(1) / 2;
    let fits = per_class.len() == classes
        && coefficients.len() == count.saturating_mul(classes.saturating_sub(1))
        && rho.len() == decisions
        && classes >= 2;
    if !fits {
        let why = format!("{} coefficients of {count} vectors in {classes} classes", coefficients.len());
        return Err(OpError::attribute(why).into());
    }
    let kernels = kernel.between(node, x, &vectors, count)?;
    let sums = pair_sums(&per_class, &coefficients);
    let sums = constants(node, "pair_coefficients", [count, decisions], &sums, x)?;
    let scores = matmul::product_of(node, "pair_sums", kernels, sums)?;
    let rho = constants(node, "rho", [decisions], &rho, x)?;
    let scores = node.add("decisions", scores, rho)?;
    let votes = votes(node, scores, classes)?;
    if !prob_a.is_empty() {
        return probabilities(node, &labels, scores, (&prob_a, &prob_b));
    }
    let label = labels.of_largest(node, votes)?;
    let scores = if classes == 2 { two_columns(node, scores, false)? } else { scores };
    let scores = post.apply(node, scores)?;
    Ok(vec![label, node.cast_to("scores", DType::F32, scores)?])
}

/// What each vector adds to the sum of each pair, `[vectors, pairs]`. Coefficients are `[classes − 1, vectors]`.
fn pair_sums(per_class: &[usize], coefficients: &[f32]) -> Vec<f32> {
    let (classes, count) = (per_class.len(), per_class.iter().sum::<usize>());
    let decisions = pairs(classes).count();
    let start = |class: usize| per_class[..class].iter().sum::<usize>();
    let mut sums = vec![0.0; count * decisions];
    for (p, (i, j)) in pairs(classes).enumerate() {
        for (class, row) in [(i, j - 1), (j, i)] {
            for v in start(class)..start(class) + per_class[class] {
                sums[v * decisions + p] = coefficients[row * count + v];
            }
        }
    }
    sums
}

/// How many pairs each class wins.
fn votes(node: &mut Node<'_, '_>, scores: ValueId, classes: usize) -> Result<ValueId> {
    let dtype = node.ty(scores).dtype;
    let zero = node.number("even", 0.0, dtype)?;
    let wins = node.binary("wins", BinaryKind::Greater, scores, zero)?;
    let wins = node.cast_to("wins_number", dtype, wins)?;
    // A loss of the first class is a win of the second one.
    let decisions = pairs(classes).count();
    let mut gains = vec![0.0; decisions * classes];
    let mut losses = vec![0.0; classes];
    for (p, (i, j)) in pairs(classes).enumerate() {
        gains[p * classes + i] = 1.0;
        gains[p * classes + j] = -1.0;
        losses[j] += 1.0;
    }
    let gains = constants(node, "gains", [decisions, classes], &gains, scores)?;
    let losses = constants(node, "losses", [classes], &losses, scores)?;
    let won = matmul::product_of(node, "won", wins, gains)?;
    node.add("votes", won, losses)
}

/// The probabilities of classes from those of pairs: logistic functions of their decisions, within 1e-7 of 0 and 1.
fn probabilities(
    node: &mut Node<'_, '_>,
    labels: &Labels,
    scores: ValueId,
    (a, b): (&[f32], &[f32]),
) -> Result<Vec<ValueId>> {
    let (a, b) =
        (constants(node, "prob_a", [a.len()], a, scores)?, constants(node, "prob_b", [b.len()], b, scores)?);
    let scaled = node.mul("by_a", scores, a)?;
    let moved = node.add("by_b", scaled, b)?;
    let negated = node.unary("negated", UnaryKind::Neg, moved)?;
    let first = node.unary("probability", UnaryKind::Sigmoid, negated)?;
    let first = node.unary("within", UnaryKind::Clip { lo: 1e-7, hi: 1.0 - 1e-7 }, first)?;
    let first = node.cast_to("pairs", DType::F32, first)?;
    let all = node.emit_part("coupled", CoupleProbabilities { classes: labels.count() }, &[first])?;
    Ok(vec![labels.of_largest(node, all)?, all])
}

/// Without support vectors: one row of coefficients a class.
fn linear(
    node: &mut Node<'_, '_>,
    x: ValueId,
    labels: &Labels,
    coefficients: &[f32],
    rho: &[f32],
    post: PostTransform,
) -> Result<Vec<ValueId>> {
    let (classes, features) = (labels.count(), node.shape(x)[1]);
    let weights = constants(node, "coefficients", [classes, features], coefficients, x)?;
    let weights = node.permuted("weights", [1, 0], weights)?;
    let sums = matmul::product_of(node, "sums", x, weights)?;
    let rho = node.number("rho", rho.first().copied().unwrap_or(0.0).into(), node.ty(sums).dtype)?;
    let scores = node.add("decisions", sums, rho)?;
    let label = labels.of_largest(node, scores)?;
    let scores = post.apply(node, scores)?;
    Ok(vec![label, node.cast_to("scores", DType::F32, scores)?])
}
