//! What it costs to round single values, where they are read.

use super::{Ranges, observed_values, value_name};
use crate::{
    Context, Options, PassError,
    insert_fake_quant::{clamp_behind, fake_quant, grid_of, range_of},
};
use qcc_ir::{
    DType, Graph, NodeId, Stage, ValueId,
    ops::{Binary, BinaryKind, Reduce, ReduceKind},
};
use std::collections::{BTreeMap, BTreeSet};

/// A graph that computes what it did and beside it, for each value that may get a grid, what the ops that read it would make
/// of the rounded value, everything else being float. Its outputs are sums of squares, so that it takes little memory
/// however large the values are.
pub struct Trial {
    /// At [`Stage::FakeQuant`].
    pub graph: Graph,
    /// By the name of the value, for each of its readers the sums of squares of the difference that rounding makes and of
    /// the reader's own result.
    pub values: BTreeMap<String, Vec<[ValueId; 2]>>,
}

/// Readers of a value that are looked at: those of a value with many are alike.
const MOST_READERS: usize = 4;

/// A [`Trial`] of these ranges on a prepared float graph. Values that have none are left out.
///
/// # Errors
/// Where an op refuses what this makes of it.
pub fn trial(graph: &Graph, ranges: &Ranges) -> Result<Trial, PassError> {
    let options = Options::default();
    let ctx = Context::new(&options, ranges);
    let mut tried = graph.clone();
    let mut values = BTreeMap::new();
    let mut signals: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for value in observed_values(graph) {
        // What a clamp follows gets no grid: the result of the clamp does.
        let grid = range_of(graph, &ctx, value).ok().and_then(|range| grid_of(range).ok());
        let Some(grid) = grid.filter(|_| clamp_behind(graph, value.node).is_none()) else { continue };
        let name = value_name(graph, value);
        let op = fake_quant(&grid).map_err(|e| PassError::op(&name, "FakeQuant", e))?;
        let rounded = tried.add(&format!("{name}_tried"), op, &[value])?.out();
        let mut pairs = Vec::new();
        if graph.is_output(value) {
            pairs.push((rounded, value));
        }
        let readers: BTreeSet<NodeId> = graph.uses(value).into_iter().map(|u| u.node).collect();
        for reader in readers.into_iter().take(MOST_READERS) {
            let Some(op) = graph.op(reader).cloned() else { continue };
            if graph.ty(reader.out()).dtype != DType::F32 {
                continue;
            }
            let operands: Vec<ValueId> = graph
                .operands(reader)
                .into_iter()
                .map(|operand| if operand == value { rounded } else { operand })
                .collect();
            let copy = tried.add(&format!("{}_of_{name}_tried", graph.node(reader).name), op, &operands)?;
            pairs.push((copy.out(), reader.out()));
        }
        let mut sums = Vec::new();
        for (made, own) in pairs {
            let difference = tried.add("difference", Binary { kind: BinaryKind::Sub }, &[made, own])?.out();
            let noise = sum_of_squares(&mut tried, difference)?;
            let signal = match signals.get(&own) {
                Some(&signal) => signal,
                None => sum_of_squares(&mut tried, own)?,
            };
            signals.insert(own, signal);
            sums.push([noise, signal]);
        }
        values.insert(name, sums);
    }
    tried.stage = Stage::FakeQuant;
    Ok(Trial { graph: tried, values })
}

fn sum_of_squares(graph: &mut Graph, value: ValueId) -> Result<ValueId, PassError> {
    let axes = (0..graph.shape(value).rank()).collect();
    let op = Reduce { kind: ReduceKind::SumSquare, axes, keep_dims: false };
    Ok(graph.add("squares", op, &[value])?.out())
}
