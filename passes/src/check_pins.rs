//! Refuses pins that name no node of the model.

use crate::{Context, Pass, PassError, Record};
use qcc_ir::Graph;

/// See the module.
pub(crate) const CHECK_PINS: Pass = Pass { name: "check_pins", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, _record: &mut Record) -> Result<(), PassError> {
    for pin in ctx.options.pins.keys() {
        if graph.find(pin).is_none_or(|n| graph.op(n).is_none()) {
            return Err(PassError::UnknownPin { pin: pin.clone(), near: near_names(graph, pin) });
        }
    }
    Ok(())
}

/// Names of at most three ops of a graph that are within a few typing errors of `name`, the closest first.
pub fn near_names(graph: &Graph, name: &str) -> Vec<String> {
    let most = 1 + name.chars().count() / 3;
    let mut names: Vec<(usize, &str)> = graph
        .nodes()
        .filter(|(_, n)| n.op().is_some())
        .map(|(_, n)| (edit_distance(name, &n.name), n.name.as_str()))
        .filter(|&(d, _)| d <= most)
        .collect();
    names.sort_unstable();
    names.into_iter().take(3).map(|(_, n)| n.to_string()).collect()
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
