//! Decision trees: the attributes of nodes and leaves, as the operands of [`TreeEnsemble`].

use super::{
    compose::{Result, float_tensor},
    ml::{Labels, PostTransform, rows, two_columns},
};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{Aggregate, TreeEnsemble},
};
use std::collections::{BTreeMap, BTreeSet};

/// Where a branch leads: a node, or −1 − a leaf.
type Target = i32;

/// Nodes and leaves of all trees, by place.
#[derive(Default)]
struct Forest {
    features: Vec<i32>,
    modes: Vec<u8>,
    splits: Vec<f64>,
    yes: Vec<Target>,
    no: Vec<Target>,
    roots: Vec<Target>,
    /// Where the weights of each leaf begin, and where the last ones end.
    starts: Vec<i32>,
    targets: Vec<i32>,
    weights: Vec<f64>,
}

fn broken<T>(why: impl Into<String>) -> Result<T> {
    Err(OpError::attribute(why.into()).into())
}

fn place(i: i64) -> Result<i32> {
    i32::try_from(i).map_err(|_| OpError::too_large(format!("place {i} in a tree")).into())
}

impl Forest {
    /// The results of the trees for rows of features.
    fn run(
        &self,
        node: &mut Node<'_, '_>,
        x: ValueId,
        targets: usize,
        aggregate: Aggregate,
    ) -> Result<ValueId> {
        let dtype = node.ty(x).dtype;
        fn vector<T: crate::Element>(v: &[T]) -> Result<Tensor> {
            Ok(Tensor::from_vec(Shape::new([v.len()])?, v.to_vec()).map_err(OpError::from)?)
        }
        let floats = |v: &[f64]| -> Result<Tensor> { float_tensor(dtype, Shape::new([v.len()])?, v) };
        let tensors = [
            ("features", vector(&self.features)?),
            ("modes", vector(&self.modes)?),
            ("splits", floats(&self.splits)?),
            ("yes", vector(&self.yes)?),
            ("no", vector(&self.no)?),
            ("roots", vector(&self.roots)?),
            ("starts", vector(&self.starts)?),
            ("targets", vector(&self.targets)?),
            ("weights", floats(&self.weights)?),
        ];
        let mut operands = vec![x];
        for (part, tensor) in tensors {
            operands.push(node.constant_part(part, tensor));
        }
        node.emit_part("trees", TreeEnsemble { targets, aggregate }, &operands)
    }
}

/// How nodes compare, as opset 1 of the domain names it.
fn mode(name: &str) -> Result<Option<u8>> {
    Ok(Some(match name {
        "BRANCH_LEQ" => 0,
        "BRANCH_LT" => 1,
        "BRANCH_GTE" => 2,
        "BRANCH_GT" => 3,
        "BRANCH_EQ" => 4,
        "BRANCH_NEQ" => 5,
        "LEAF" => return Ok(None),
        other => return broken(format!("a node compares by {other:?}")),
    }))
}

/// Numbers that are an attribute of floats or of a tensor.
fn numbers(node: &mut Node<'_, '_>, [floats, tensor]: [&'static str; 2]) -> Result<Option<Vec<f64>>> {
    let floats = node.floats(floats)?.filter(|v| !v.is_empty());
    let tensor = node.tensor(tensor)?;
    Ok(match (floats, tensor) {
        (Some(floats), _) => Some(floats.into_iter().map(f64::from).collect()),
        (None, tensor) => tensor.map(|t| t.to_f64()),
    })
}

fn required<T>(name: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| NodeError::attribute(name, "is missing"))
}

/// Names of the attributes that give leaves their weights.
struct Weights {
    trees: &'static str,
    nodes: &'static str,
    ids: &'static str,
    values: [&'static str; 2],
}

const OF_CLASSES: Weights = Weights {
    trees: "class_treeids",
    nodes: "class_nodeids",
    ids: "class_ids",
    values: ["class_weights", "class_weights_as_tensor"],
};

const OF_TARGETS: Weights = Weights {
    trees: "target_treeids",
    nodes: "target_nodeids",
    ids: "target_ids",
    values: ["target_weights", "target_weights_as_tensor"],
};

/// The trees of opset 1 to 3, whose nodes and leaves are named by tree and node.
fn forest(node: &mut Node<'_, '_>, of: &Weights) -> Result<Forest> {
    node.ignore(&["nodes_hitrates", "nodes_hitrates_as_tensor"]);
    let modes = required("nodes_modes", node.strings("nodes_modes")?)?;
    let n = modes.len();
    let mut ints = |name: &'static str| -> Result<Vec<i64>> {
        let given = required(name, node.ints(name)?)?;
        if given.len() == n {
            Ok(given)
        } else {
            broken(format!("{name} has {} entries for {n} nodes", given.len()))
        }
    };
    let (trees, ids) = (ints("nodes_treeids")?, ints("nodes_nodeids")?);
    let (yes, no) = (ints("nodes_truenodeids")?, ints("nodes_falsenodeids")?);
    let features = ints("nodes_featureids")?;
    let missing = node.ints("nodes_missing_value_tracks_true")?.filter(|m| !m.is_empty());
    let splits = required("nodes_values", numbers(node, ["nodes_values", "nodes_values_as_tensor"])?)?;
    if splits.len() != n || missing.as_ref().is_some_and(|m| m.len() != n) {
        return broken(format!("{} numbers to compare with for {n} nodes", splits.len()));
    }
    // Weights by the leaf that they belong to.
    let mut weights: BTreeMap<(i64, i64), Vec<(i32, f64)>> = BTreeMap::new();
    let (of_trees, of_nodes) =
        (required(of.trees, node.ints(of.trees)?)?, required(of.nodes, node.ints(of.nodes)?)?);
    let of_ids = required(of.ids, node.ints(of.ids)?)?;
    let values = required(of.values[0], numbers(node, of.values)?)?;
    if of_trees.len() != values.len() || of_nodes.len() != values.len() || of_ids.len() != values.len() {
        return broken(format!("{} weights for {} leaves", values.len(), of_trees.len()));
    }
    for (((tree, id), target), value) in of_trees.into_iter().zip(of_nodes).zip(of_ids).zip(values) {
        weights.entry((tree, id)).or_default().push((place(target)?, value));
    }
    let mut forest = Forest::default();
    let mut places: BTreeMap<(i64, i64), Target> = BTreeMap::new();
    let mut branches = Vec::new();
    for i in 0..n {
        let key = (trees[i], ids[i]);
        let at = match mode(&modes[i])? {
            Some(mode) => {
                let tracks = missing.as_ref().is_some_and(|m| m[i] != 0);
                forest.features.push(place(features[i])?);
                forest.modes.push(mode | if tracks { 8 } else { 0 });
                forest.splits.push(splits[i]);
                branches.push((i, yes[i], no[i]));
                place(branches.len() as i64 - 1)?
            }
            None => {
                let leaf = place(forest.starts.len() as i64)?;
                forest.starts.push(place(forest.weights.len() as i64)?);
                for (target, weight) in weights.get(&key).into_iter().flatten() {
                    forest.targets.push(*target);
                    forest.weights.push(*weight);
                }
                !leaf
            }
        };
        if places.insert(key, at).is_some() {
            return broken(format!("tree {} has two nodes {}", key.0, key.1));
        }
    }
    forest.starts.push(place(forest.weights.len() as i64)?);
    let mut reached = BTreeSet::new();
    for (i, yes, no) in branches {
        for (id, list) in [(yes, &mut forest.yes), (no, &mut forest.no)] {
            let Some(&to) = places.get(&(trees[i], id)) else {
                return broken(format!("node {} of tree {} leads to no node {id}", ids[i], trees[i]));
            };
            reached.insert((trees[i], id));
            list.push(to);
        }
    }
    // A root is what nothing leads to; of the trees in the order of the file.
    for key in trees.iter().copied().zip(ids.iter().copied()).filter(|key| !reached.contains(key)) {
        forest.roots.push(places[&key]);
    }
    Ok(forest)
}

/// The attribute of numbers that all results begin with, as rows.
fn base(node: &mut Node<'_, '_>, y: ValueId) -> Result<ValueId> {
    let Some(base) = numbers(node, ["base_values", "base_values_as_tensor"])? else { return Ok(y) };
    let columns = node.shape(y)[1];
    if base.len() != columns && base.len() != 1 {
        return broken(format!("{} base values for {columns} targets", base.len()));
    }
    let base = float_tensor(node.ty(y).dtype, Shape::new([base.len()])?, &base)?;
    let base = node.constant_part("base", base);
    node.add("based", y, base)
}

pub(super) fn regressor(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = rows(node)?;
    let targets = node.count("n_targets")?.unwrap_or(1);
    let (aggregate, divides) = match node.string("aggregate_function", "SUM")? {
        "SUM" => (Aggregate::Sum, false),
        "AVERAGE" => (Aggregate::Sum, true),
        "MIN" => (Aggregate::Min, false),
        "MAX" => (Aggregate::Max, false),
        other => return Err(NodeError::attribute("aggregate_function", format!("is {other:?}"))),
    };
    let post = PostTransform::of(node)?;
    let forest = forest(node, &OF_TARGETS)?;
    finished(node, &forest, x, targets, (aggregate, divides), post)
}

fn finished(
    node: &mut Node<'_, '_>,
    forest: &Forest,
    x: ValueId,
    targets: usize,
    (aggregate, divides): (Aggregate, bool),
    post: PostTransform,
) -> Result<ValueId> {
    let mut y = forest.run(node, x, targets, aggregate)?;
    if divides {
        let count = node.number("trees_count", forest.roots.len().max(1) as f64, node.ty(y).dtype)?;
        y = node.div("average", y, count)?;
    }
    let y = base(node, y)?;
    let y = post.apply(node, y)?;
    // The older ops give f32 whatever the features are.
    node.cast_to("", if node.def_is("TreeEnsemble") { node.ty(x).dtype } else { DType::F32 }, y)
}

/// Where all weights are of one class, that score decides between two.
pub(super) fn classifier(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let x = rows(node)?;
    let labels = Labels::of(node, "classlabels_int64s")?;
    let post = PostTransform::of(node)?;
    let forest = forest(node, &OF_CLASSES)?;
    let classes: BTreeSet<i32> = forest.targets.iter().copied().collect();
    let count = labels.count();
    let is_binary = count <= 2 && classes.len() == 1;
    if !is_binary {
        let scores = forest.run(node, x, count, Aggregate::Sum)?;
        let scores = base(node, scores)?;
        let scores = node.cast_to("scores", DType::F32, scores)?;
        let label = labels.of_largest(node, scores)?;
        return Ok(vec![label, post.apply(node, scores)?]);
    }
    let target = classes.first().copied().unwrap_or(0);
    let single = Forest { targets: forest.targets.iter().map(|t| t - target).collect(), ..forest };
    let score = single.run(node, x, 1, Aggregate::Sum)?;
    let based = numbers(node, ["base_values", "base_values_as_tensor"])?;
    let score = match based.as_deref() {
        None => score,
        Some(&[.., value]) => {
            let value = node.number("base", value, node.ty(score).dtype)?;
            node.add("based", score, value)?
        }
        Some(_) => score,
    };
    let score = node.cast_to("score", DType::F32, score)?;
    let all_positive = single.weights.iter().all(|&w| w >= 0.0);
    let threshold = if all_positive { 0.5 } else { 0.0 };
    let threshold = node.number("threshold", threshold, DType::F32)?;
    let is_second = node.binary("is_second", crate::ops::BinaryKind::Greater, score, threshold)?;
    let rows = node.shape(score)[0];
    let class = node.cast_to("class_column", DType::S64, is_second)?;
    let class = node.shaped("class", [rows], class)?;
    let label = match (&labels, count) {
        (Labels::Ints(_), 1) => class,
        _ => labels.of_classes(node, class)?,
    };
    let by_one = all_positive && post == PostTransform::None || post == PostTransform::Probit;
    let both = two_columns(node, score, by_one)?;
    Ok(vec![label, post.apply(node, both)?])
}

/// The trees of opset 5, whose nodes and leaves are named by place. A node that asks for a member of a set is a chain of
/// nodes that each ask for one.
pub(super) fn ensemble(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = rows(node)?;
    node.ignore(&["nodes_hitrates"]);
    let modes = required("nodes_modes", node.tensor("nodes_modes")?)?;
    let modes = required("nodes_modes", modes.to_i64())?;
    let n = modes.len();
    let splits = required("nodes_splits", node.tensor("nodes_splits")?)?.to_f64();
    let mut ints = |name: &'static str, count: usize| -> Result<Vec<i64>> {
        let given = required(name, node.ints(name)?)?;
        match given.len() == count {
            true => Ok(given),
            false => broken(format!("{name} has {} entries, not {count}", given.len())),
        }
    };
    let features = ints("nodes_featureids", n)?;
    let branches = [ints("nodes_truenodeids", n)?, ints("nodes_falsenodeids", n)?];
    let leads_to_leaf = [ints("nodes_trueleafs", n)?, ints("nodes_falseleafs", n)?];
    let roots = required("tree_roots", node.ints("tree_roots")?)?;
    let missing = node.ints("nodes_missing_value_tracks_true")?.filter(|m| !m.is_empty());
    let weights = required("leaf_weights", node.tensor("leaf_weights")?)?.to_f64();
    let targets = required("leaf_targetids", node.ints("leaf_targetids")?)?;
    let members = node.tensor("membership_values")?.map(|t| t.to_f64()).unwrap_or_default();
    if splits.len() != n || missing.as_ref().is_some_and(|m| m.len() != n) || targets.len() != weights.len() {
        return broken(format!("{} numbers to compare with, for {n} nodes", splits.len()));
    }
    let mut forest = Forest { weights, ..Forest::default() };
    forest.targets = targets.into_iter().map(place).collect::<Result<_>>()?;
    forest.starts = (0..=forest.weights.len() as i64).map(place).collect::<Result<_>>()?;
    let target = |i: usize, way: usize| -> Result<Target> {
        let to = place(branches[way][i])?;
        if to < 0 {
            broken(format!("node {i} leads to {to}"))
        } else {
            Ok(if leads_to_leaf[way][i] != 0 { !to } else { to })
        }
    };
    let mut sets = members.split(|m| m.is_nan());
    // What further members of sets add stands behind the nodes of the file.
    let mut more: Vec<(i32, u8, f64, Target, Target)> = Vec::new();
    for i in 0..n {
        let tracks = if missing.as_ref().is_some_and(|m| m[i] != 0) { 8 } else { 0 };
        let feature = place(features[i])?;
        let (yes, no) = (target(i, 0)?, target(i, 1)?);
        let (mode, split, no) = match modes[i] {
            m @ 0..=5 => (m as u8, splits[i], no),
            6 => match sets.next() {
                // Nothing is equal to what is not a number.
                None | Some([]) => (4, f64::NAN, no),
                Some([first, rest @ ..]) => {
                    let mut next = no;
                    for &member in rest.iter().rev() {
                        more.push((feature, 4 | tracks, member, yes, next));
                        next = place((n + more.len() - 1) as i64)?;
                    }
                    (4, *first, next)
                }
            },
            other => return broken(format!("node {i} compares by {other}")),
        };
        forest.features.push(feature);
        forest.modes.push(mode | tracks);
        forest.splits.push(split);
        forest.yes.push(yes);
        forest.no.push(no);
    }
    for (feature, mode, split, yes, no) in more {
        forest.features.push(feature);
        forest.modes.push(mode);
        forest.splits.push(split);
        forest.yes.push(yes);
        forest.no.push(no);
    }
    forest.roots = roots.into_iter().map(place).collect::<Result<_>>()?;
    let targets = node.count("n_targets")?.unwrap_or(1);
    let aggregate = match node.int("aggregate_function", 1)? {
        0 => (Aggregate::Sum, true),
        1 => (Aggregate::Sum, false),
        2 => (Aggregate::Min, false),
        3 => (Aggregate::Max, false),
        other => return Err(NodeError::attribute("aggregate_function", format!("is {other}"))),
    };
    let post = match node.int("post_transform", 0)? {
        0 => PostTransform::None,
        1 => PostTransform::Softmax,
        2 => PostTransform::Logistic,
        3 => PostTransform::SoftmaxZero,
        4 => PostTransform::Probit,
        other => return Err(NodeError::attribute("post_transform", format!("is {other}"))),
    };
    finished(node, &forest, x, targets, aggregate, post)
}
