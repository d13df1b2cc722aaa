//! Paddings with zeros become the pads of the convolution or average pool behind them.

use crate::{
    Context, Pass, PassError, Record,
    edit::{live_op, replace},
};
use qcc_ir::{
    Graph, NodeId, Op,
    ops::{Layout, Pad, PadMode, PoolKind, Window},
};

/// See the module.
pub(crate) const FUSE_PAD: Pass = Pass { name: "fuse_pad", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(Op::Pad(pad)) = live_op(graph, node).cloned() else {
            continue;
        };
        let name = graph.node(node).name.clone();
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        match fused(graph, node, &pad) {
            Ok((consumer, op)) => {
                let x = graph.operand(node, 0);
                let mut operands = graph.operands(consumer);
                operands[0] = x;
                graph.rewrite(consumer, op, &operands)?;
                // Nothing uses the padded value any more; `replace` then only removes it.
                replace(graph, node, x)?;
                record.applied(&name, format!("became the pads of `{}`", graph.node(consumer).name));
            }
            Err(why) => record.declined(&name, why),
        }
    }
    Ok(())
}

/// The consumer with the padding in its window.
fn fused(graph: &Graph, node: NodeId, pad: &Pad) -> Result<(NodeId, Op), String> {
    if pad.mode != (PadMode::Constant { value: 0.0 }) {
        return Err("it does not pad with zeros".into());
    }
    let u = graph
        .sole_use(node.out())
        .filter(|u| u.slot == 0)
        .ok_or("its result has several uses or is a result of the model")?;
    let name = &graph.node(u.node).name;
    let op = match graph.op(u.node) {
        Some(Op::Conv(c)) => {
            let mut conv = c.clone();
            grow(&mut conv.window, conv.layout, pad)?;
            conv.into()
        }
        Some(Op::Pool(p)) => {
            let mut pool = p.clone();
            match p.kind {
                PoolKind::Max => {
                    return Err(format!("`{name}` takes a maximum, for which padding is no zero"));
                }
                PoolKind::Average { count_include_pad } if !count_include_pad && !p.window.is_unpadded() => {
                    return Err(format!("`{name}` would count one padding but not the other"));
                }
                PoolKind::Average { .. } => pool.kind = PoolKind::Average { count_include_pad: true },
            }
            if p.ceil_mode {
                return Err(format!("`{name}` rounds its extent up, for which padding is no input"));
            }
            grow(&mut pool.window, pool.layout, pad)?;
            pool.into()
        }
        _ => return Err(format!("`{name}` has no pads")),
    };
    Ok((u.node, op))
}

/// Adds the padding of the spatial axes to the window's.
fn grow(window: &mut Window, layout: Layout, pad: &Pad) -> Result<(), String> {
    let rank = pad.before.len();
    let channels = layout.channel_axis(rank);
    if [0, channels].iter().any(|&d| pad.before[d] + pad.after[d] > 0) {
        return Err("it pads the batch or the channels".into());
    }
    for (i, d) in (1..rank).filter(|&d| d != channels).enumerate() {
        window.pads_begin[i] += pad.before[d];
        window.pads_end[i] += pad.after[d];
    }
    Ok(())
}
