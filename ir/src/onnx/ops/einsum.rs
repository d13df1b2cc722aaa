//! Sums of products in Einstein's notation, as transposes, products of matrices and sums.

use super::{
    elementwise::{binary_part, cast_part},
    matmul::product_of,
    shape::reshape_part,
};
use crate::{
    DType, OpError, Shape, ValueId,
    limits::MAX_RANK,
    onnx::{NodeError, import::Node},
    ops::{BinaryKind, Reduce, ReduceKind, Slice, SliceSpec, Transpose},
};
use std::collections::BTreeMap;

/// What an axis runs over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Label {
    /// An axis of the ellipsis, counted from the last one.
    Ellipsis(std::cmp::Reverse<usize>),
    Letter(char),
}

/// The subscripts of an operand or the result.
struct Term {
    before: Vec<char>,
    /// What follows the ellipsis, if there is one.
    after: Option<Vec<char>>,
}

fn bad(equation: &str, why: &str) -> NodeError {
    NodeError::attribute("equation", format!("{equation:?} {why}"))
}

impl Term {
    fn parse(equation: &str, text: &str) -> Result<Term, NodeError> {
        let letters = |text: &str| -> Result<Vec<char>, NodeError> {
            match text.chars().all(|c| c.is_ascii_alphabetic()) && text.len() <= MAX_RANK {
                true => Ok(text.chars().collect()),
                false => Err(bad(equation, &format!("has {text:?} for letters"))),
            }
        };
        Ok(match text.split_once("...") {
            None => Term { before: letters(text)?, after: None },
            Some((before, after)) => Term { before: letters(before)?, after: Some(letters(after)?) },
        })
    }

    /// The labels of a tensor whose ellipsis stands for so many axes.
    fn labels(&self, ellipsis: usize) -> Vec<Label> {
        let axes = if self.after.is_some() { ellipsis } else { 0 };
        let before = self.before.iter().map(|&c| Label::Letter(c));
        let between = (0..axes).rev().map(|i| Label::Ellipsis(std::cmp::Reverse(i)));
        let after = self.after.iter().flatten().map(|&c| Label::Letter(c));
        before.chain(between).chain(after).collect()
    }

    fn letters(&self) -> usize {
        self.before.len() + self.after.as_ref().map_or(0, Vec::len)
    }
}

/// A tensor and what its axes run over, no two over the same.
struct Factor {
    value: ValueId,
    labels: Vec<Label>,
}

impl Factor {
    fn has(&self, label: Label) -> bool {
        self.labels.contains(&label)
    }
}

pub(super) fn einsum(node: &mut Node<'_, '_>) -> Result<ValueId, NodeError> {
    let operands = node.operands("Inputs")?;
    let equation: String = node.string("equation", "")?.split_whitespace().collect();
    let (inputs, output) = match equation.split_once("->") {
        Some((inputs, output)) => (inputs, Some(Term::parse(&equation, output)?)),
        None => (&equation[..], None),
    };
    let terms = inputs.split(',').map(|t| Term::parse(&equation, t)).collect::<Result<Vec<_>, _>>()?;
    if terms.len() != operands.len() {
        let why = format!("has {} terms for {} operands", terms.len(), operands.len());
        return Err(bad(&equation, &why));
    }
    let dtype = node.ty(operands[0]).dtype;
    if dtype == DType::Bool || operands.iter().any(|&x| node.ty(x).dtype != dtype) {
        let types: Vec<String> = operands.iter().map(|&x| node.ty(x).to_string()).collect();
        return Err(OpError::dtype(format!("takes numbers of one type, got {}", types.join(", "))).into());
    }
    let mut ellipsis = 0;
    let mut axes = Vec::with_capacity(terms.len());
    for (term, &x) in terms.iter().zip(&operands) {
        let rank = node.ty(x).shape.rank();
        let own = rank.checked_sub(term.letters()).filter(|&n| n == 0 || term.after.is_some());
        let own = own.ok_or_else(|| bad(&equation, &format!("does not fit operand {}", node.ty(x))))?;
        ellipsis = ellipsis.max(own);
        axes.push(term.labels(own));
    }
    let result = match output {
        Some(term) => term.labels(ellipsis),
        None => implied(&axes, ellipsis),
    };
    check(node, &equation, &operands, &axes, &result)?;
    let arithmetic = match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        // Sums that wrap do so the same in more bits.
        DType::S8 | DType::S16 | DType::U8 | DType::U16 => DType::S32,
        _ => dtype,
    };
    let mut factors = Vec::with_capacity(axes.len());
    for (i, (labels, &x)) in axes.into_iter().zip(&operands).enumerate() {
        let value = cast_part(node, &format!("{i}_wide"), x, arithmetic)?;
        factors.push(without_repeats(node, &i.to_string(), Factor { value, labels })?);
    }
    let product = contracted(node, factors, &result)?;
    let y = ordered(node, "result", product, &result)?.value;
    cast_part(node, "narrow", y, dtype)
}

/// The result where the equation does not say it: the ellipsis, then letters that stand once, in their order.
fn implied(axes: &[Vec<Label>], ellipsis: usize) -> Vec<Label> {
    let mut counts: BTreeMap<Label, usize> = BTreeMap::new();
    axes.iter().flatten().for_each(|&l| *counts.entry(l).or_default() += 1);
    let letters =
        counts.into_iter().filter(|&(l, n)| n == 1 && matches!(l, Label::Letter(_))).map(|(l, _)| l);
    (0..ellipsis).rev().map(|i| Label::Ellipsis(std::cmp::Reverse(i))).chain(letters).collect()
}

/// Checks that lengths agree, but for those of 1, and that the result's labels stand once there and in an operand.
fn check(
    node: &Node<'_, '_>,
    equation: &str,
    operands: &[ValueId],
    axes: &[Vec<Label>],
    result: &[Label],
) -> Result<(), NodeError> {
    let mut lengths: BTreeMap<Label, usize> = BTreeMap::new();
    for (labels, &x) in axes.iter().zip(operands) {
        for (&label, &d) in labels.iter().zip(node.ty(x).shape.iter()) {
            let length = lengths.entry(label).or_insert(d);
            match (*length, d) {
                (a, b) if a == b => {}
                (1, d) => *length = d,
                (_, 1) => {}
                (a, b) => return Err(bad(equation, &format!("has axes of {a} and {b} for one label"))),
            }
        }
    }
    if result.len() > MAX_RANK {
        return Err(bad(equation, "has a result of too many axes"));
    }
    for (i, label) in result.iter().enumerate() {
        if result[..i].contains(label) {
            return Err(bad(equation, "has a label twice in the result"));
        }
        if !lengths.contains_key(label) {
            return Err(bad(equation, "has a label in the result only"));
        }
    }
    Ok(())
}

/// The diagonal of axes that have one label.
fn without_repeats(node: &mut Node<'_, '_>, part: &str, factor: Factor) -> Result<Factor, NodeError> {
    let Factor { mut value, mut labels } = factor;
    let mut round = 0;
    let pair = |labels: &[Label]| {
        (1..labels.len()).find_map(|j| labels[..j].iter().position(|l| *l == labels[j]).map(|i| (i, j)))
    };
    while let Some((i, j)) = pair(&labels) {
        let shape = node.shape(value);
        let rank = shape.rank();
        let part = format!("{part}_{round}");
        round += 1;
        if shape[i] != shape[j] {
            // One of them is of length 1, and goes.
            let gone = if shape[i] == 1 { i } else { j };
            let mut dims = shape.to_vec();
            dims.remove(gone);
            value = reshape_part(node, &format!("{part}_squeezed"), value, dims)?;
            labels.remove(gone);
            continue;
        }
        let n = shape[i];
        let label = labels[i];
        let perm: Vec<usize> = (0..rank).filter(|&d| d != i && d != j).chain([i, j]).collect();
        let mut dims: Vec<usize> = perm[..rank - 2].iter().map(|&d| shape[d]).collect();
        labels = perm[..rank - 2].iter().map(|&d| labels[d]).chain([label]).collect();
        let last = node.emit_part(&format!("{part}_last"), Transpose { perm }, &[value])?;
        dims.push(n * n);
        let flat = reshape_part(node, &format!("{part}_flat"), last, dims.clone())?;
        let mut axes: Vec<SliceSpec> = dims.iter().map(|&d| SliceSpec::all(d)).collect();
        axes[rank - 2] = SliceSpec { start: 0, len: n, step: if n > 1 { n as isize + 1 } else { 1 } };
        value = node.emit_part(&format!("{part}_diagonal"), Slice { axes }, &[flat])?;
    }
    Ok(Factor { value, labels })
}

/// The product of all factors, summed over all labels that the result does not have; from the left.
fn contracted(node: &mut Node<'_, '_>, factors: Vec<Factor>, result: &[Label]) -> Result<Factor, NodeError> {
    // The last factor that has a label.
    let mut last: BTreeMap<Label, usize> = BTreeMap::new();
    for (i, factor) in factors.iter().enumerate() {
        last.extend(factor.labels.iter().map(|&l| (l, i)));
    }
    let mut product: Option<Factor> = None;
    for (round, next) in factors.into_iter().enumerate() {
        let is_needed = |l: Label| result.contains(&l) || last.get(&l).is_some_and(|&i| i > round);
        let part = format!("step{round}");
        product = Some(match product {
            None => summed(node, &part, next, &|l| !is_needed(l))?,
            Some(left) => {
                let [left, right] = without_ones(node, &part, [left, next])?;
                let left = summed(node, &format!("{part}_left"), left, &|l| !is_needed(l) && !right.has(l))?;
                let right =
                    summed(node, &format!("{part}_right"), right, &|l| !is_needed(l) && !left.has(l))?;
                multiplied(node, &part, left, right, &is_needed)?
            }
        });
    }
    // There is at least one operand.
    product.ok_or(NodeError::MissingOperand { slot: 0, role: "Inputs" })
}

/// The factor summed over some labels.
fn summed(
    node: &mut Node<'_, '_>,
    part: &str,
    factor: Factor,
    goes: &dyn Fn(Label) -> bool,
) -> Result<Factor, NodeError> {
    let axes: Vec<usize> = (0..factor.labels.len()).filter(|&d| goes(factor.labels[d])).collect();
    if axes.is_empty() {
        return Ok(factor);
    }
    let labels = factor.labels.into_iter().filter(|&l| !goes(l)).collect();
    let sum = Reduce { kind: ReduceKind::Sum, axes, keep_dims: false };
    Ok(Factor { value: node.emit_part(&format!("{part}_sum"), sum, &[factor.value])?, labels })
}

/// Both factors without those axes of length 1 that are longer in the other one: they are the same for all of it.
fn without_ones(node: &mut Node<'_, '_>, part: &str, factors: [Factor; 2]) -> Result<[Factor; 2], NodeError> {
    let lengths: Vec<BTreeMap<Label, usize>> = factors
        .iter()
        .map(|f| f.labels.iter().copied().zip(node.ty(f.value).shape.iter().copied()).collect())
        .collect();
    let [left, right] = factors;
    let mut squeezed =
        |side: &str, f: Factor, own: &BTreeMap<Label, usize>, other: &BTreeMap<Label, usize>| {
            let stays = |l: &Label| own[l] != 1 || other.get(l).is_none_or(|&d| d == 1);
            let labels: Vec<Label> = f.labels.iter().copied().filter(stays).collect();
            let dims = labels.iter().map(|l| own[l]).collect();
            let value = reshape_part(node, &format!("{part}_{side}_squeezed"), f.value, dims)?;
            Ok::<_, NodeError>(Factor { value, labels })
        };
    let left = squeezed("left", left, &lengths[0], &lengths[1])?;
    let right = squeezed("right", right, &lengths[1], &lengths[0])?;
    Ok([left, right])
}

/// The factor with its axes in this order.
fn ordered(
    node: &mut Node<'_, '_>,
    part: &str,
    factor: Factor,
    order: &[Label],
) -> Result<Factor, NodeError> {
    let perm: Vec<usize> =
        order.iter().filter_map(|l| factor.labels.iter().position(|own| own == l)).collect();
    if perm.is_sorted() {
        return Ok(factor);
    }
    let value = node.emit_part(&format!("{part}_ordered"), Transpose { perm }, &[factor.value])?;
    Ok(Factor { value, labels: order.to_vec() })
}

/// The product of two factors, summed over the labels that only they have: one product of matrices for each index of
/// the labels that stay common.
fn multiplied(
    node: &mut Node<'_, '_>,
    part: &str,
    left: Factor,
    right: Factor,
    is_needed: &dyn Fn(Label) -> bool,
) -> Result<Factor, NodeError> {
    let common = left.labels.iter().copied().filter(|&l| right.has(l));
    let (batch, inner): (Vec<Label>, Vec<Label>) = common.partition(|&l| is_needed(l));
    let rows: Vec<Label> = left.labels.iter().copied().filter(|&l| !right.has(l)).collect();
    let columns: Vec<Label> = right.labels.iter().copied().filter(|&l| !left.has(l)).collect();
    let mut lengths: BTreeMap<Label, usize> = BTreeMap::new();
    for f in [&left, &right] {
        lengths.extend(f.labels.iter().copied().zip(node.ty(f.value).shape.iter().copied()));
    }
    let count = |labels: &[Label]| -> Result<usize, NodeError> {
        Ok(Shape::new(labels.iter().map(|l| lengths[l]).collect::<Vec<_>>())?.elements())
    };
    let [b, m, n, k] = [count(&batch)?, count(&rows)?, count(&columns)?, count(&inner)?];
    let mut side = |name: &str, f: Factor, order: [&[Label]; 3], dims: &[usize]| {
        let f = ordered(node, &format!("{part}_{name}"), f, &order.concat())?;
        reshape_part(node, &format!("{part}_{name}_matrices"), f.value, dims.to_vec())
    };
    let product = if inner.is_empty() {
        let left = side("left", left, [&batch, &rows, &[]], &[b, m, 1])?;
        let right = side("right", right, [&batch, &[], &columns], &[b, 1, n])?;
        binary_part(node, &format!("{part}_product"), BinaryKind::Mul, left, right)?
    } else {
        let left = side("left", left, [&batch, &rows, &inner], &[b, m, k])?;
        let right = side("right", right, [&batch, &inner, &columns], &[b, k, n])?;
        product_of(node, &format!("{part}_product"), left, right)?
    };
    let labels = [batch, rows, columns].concat();
    let dims = labels.iter().map(|l| lengths[l]).collect();
    let value = reshape_part(node, &format!("{part}_apart"), product, dims)?;
    Ok(Factor { value, labels })
}
