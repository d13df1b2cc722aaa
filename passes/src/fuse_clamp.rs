//! ReLUs and clips become the clamp of the convolution or matrix product before them, also through moves.

use crate::{
    Context, Pass, PassError, Record,
    edit::{Sum, clamp_of, is_move, live_op, replace},
};
use qcc_ir::{
    Graph, NodeId, Op,
    ops::{Clamp, PadMode},
};

/// See the module.
pub(crate) const FUSE_CLAMP: Pass = Pass { name: "fuse_clamp", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(clamp) = live_op(graph, node).and_then(|_| clamp_of(graph, node)) else {
            continue;
        };
        let name = graph.node(node).name.clone();
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        match producer(graph, node, clamp) {
            Ok((source, mut product)) => {
                *product.clamp() = product.clamp().then(clamp);
                graph.set_op(source, product.op())?;
                let x = graph.operand(node, 0);
                replace(graph, node, x)?;
                record.applied(&name, format!("became the clamp of `{}`", graph.node(source).name));
            }
            Err(why) => record.declined(&name, why),
        }
    }
    Ok(())
}

/// The product whose every element, and nothing else, arrives at `node`.
fn producer(graph: &Graph, node: NodeId, clamp: Clamp) -> Result<(NodeId, Sum), String> {
    let mut at = node;
    loop {
        let x = graph.operand(at, 0);
        let name = &graph.node(x.node).name;
        if graph.sole_use(x).is_none() {
            return Err(format!("the result of `{name}` has other uses"));
        }
        if let Some(product) = Sum::of(graph, x.node) {
            return Ok((x.node, product));
        }
        match graph.op(x.node) {
            Some(op) if commutes(op, clamp) => at = x.node,
            _ => return Err(format!("`{name}` is no product and does not let a clamp through")),
        }
    }
}

/// Whether clamping before the op is the same as after it: of moves with one activation, where what they fill in is
/// a fixed point of the clamp. A maximum is a move here, as clamps are monotone.
fn commutes(op: &Op, clamp: Clamp) -> bool {
    match op {
        Op::Concat(_) => false,
        Op::Pad(p) => match p.mode {
            PadMode::Constant { value } => f64::from(clamp.apply(value as f32)) == value,
            _ => true,
        },
        op => is_move(op),
    }
}
