//! Tests of whole compiled graphs.

mod dense;
mod model;

use crate::{CompiledModel, Execution, Options, Parallel, Serial, Tier, compile};
use qcc_ir::{Graph, Stage};
use std::sync::Arc;

/// The tiers of this CPU; names those that cannot be tested on it.
pub(crate) fn tiers() -> Vec<&'static Tier> {
    for t in crate::TIERS.iter().filter(|t| !t.is_available()) {
        #[allow(clippy::print_stderr, reason = "a silent skip would look like a pass")]
        {
            eprintln!("skipped: this CPU has no {t}");
        }
    }
    Tier::available()
}

/// Compiles a graph that is said to be placed.
pub(crate) fn compiled(graph: &Graph, tier: &'static Tier) -> Arc<CompiledModel> {
    let mut graph = graph.clone();
    graph.stage = Stage::Placed;
    let options = Options { listing: true, ..Options::new(tier) };
    Arc::new(compile(&graph, &options).expect("the graph compiles"))
}

/// Runs a model on these inputs.
pub(crate) fn run(model: &Arc<CompiledModel>, inputs: &[&[u8]], pool: &dyn Parallel) -> Vec<Vec<u8>> {
    let mut outputs: Vec<Vec<u8>> = model.outputs().iter().map(|(_, ty)| vec![0xa5; ty.bytes()]).collect();
    let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    Execution::new(model.clone()).run(inputs, &mut slices, pool, None).expect("the model runs");
    outputs
}

pub(crate) fn run_serially(model: &Arc<CompiledModel>, inputs: &[&[u8]]) -> Vec<Vec<u8>> {
    run(model, inputs, &Serial)
}
