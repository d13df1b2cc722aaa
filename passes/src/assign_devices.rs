//! Says where every op runs, and puts a transfer on every edge between devices.
//!
//! Integer ops want the integer code generator and all others the float one; what the code generator cannot lower
//! runs in the interpreter; the user's pins come first.

use crate::{Context, Pass, PassError, Record, capability::int8_capability};
use qcc_ir::{Device, Graph, NodeId, Op, Stage, ValueId, ops::Transfer};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const ASSIGN_DEVICES: Pass = Pass { name: "assign_devices", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let order: Vec<NodeId> = graph.order().into_iter().filter(|&n| graph.op(n).is_some()).collect();
    for &node in &order {
        let device = device_of(graph, ctx, node, record)?;
        graph.set_device(node, Some(device));
    }
    for pin in ctx.options.pins.keys().filter(|pin| graph.find(pin).is_none()) {
        record.warning(pin, "its pin has no effect: the node does nothing or was computed at compile time");
    }
    for node in order {
        insert_transfers(graph, node, record)?;
    }
    graph.stage = Stage::Placed;
    Ok(())
}

fn device_of(
    graph: &Graph,
    ctx: &Context<'_>,
    node: NodeId,
    record: &mut Record,
) -> Result<Device, PassError> {
    let name = &graph.node(node).name;
    let wanted = if is_integer(graph, node) { Device::Int8Jit } else { Device::FloatJit };
    let refusal = (ctx.options.capability)(graph, node).err();
    let Some(device) = ctx.options.pin(graph, node) else {
        if let Some(why) = refusal {
            record.declined(name, format!("runs in the interpreter: {why}"));
            return Ok(Device::Interpreter);
        }
        record.applied += 1;
        return Ok(wanted);
    };
    let reason = match device {
        Device::Interpreter => None,
        _ if device != wanted => Some(not_of_kind(graph, node, device)),
        _ => refusal.map(|why| format!("the code generator cannot lower it: {why}")),
    };
    match reason {
        None => {
            record.applied(name, format!("pinned to {device}"));
            Ok(device)
        }
        Some(reason) => Err(PassError::Pin { node: name.clone(), device, reason }),
    }
}

/// Whether the op takes or makes codes.
fn is_integer(graph: &Graph, node: NodeId) -> bool {
    let quantized = |v: &ValueId| graph.ty(*v).quant.is_some();
    let makes_codes = matches!(graph.op(node), Some(Op::DynamicQuantize(_)));
    makes_codes
        || graph.node(node).outputs().iter().any(|t| t.quant.is_some())
        || graph.operands(node).iter().any(quantized)
}

fn not_of_kind(graph: &Graph, node: NodeId, device: Device) -> String {
    match device {
        Device::Int8Jit => match int8_capability(graph, node) {
            Err(why) => format!("it is a float op: {why}"),
            Ok(()) => "it is a float op: nothing around it is quantized".into(),
        },
        _ => "it is an op on integers of the model".into(),
    }
}

/// Puts transfers behind the node's results, one for each device that uses them and is not its own.
fn insert_transfers(graph: &mut Graph, node: NodeId, record: &mut Record) -> Result<(), PassError> {
    let (name, own) = (graph.node(node).name.clone(), graph.node(node).device);
    for port in 0..graph.node(node).outputs().len() {
        let value = node.port(port as u16);
        let mut transfers: BTreeMap<Device, ValueId> = BTreeMap::new();
        for u in graph.uses(value) {
            let Some(to) = graph.node(u.node).device.filter(|&d| Some(d) != own) else {
                continue;
            };
            if matches!(graph.op(u.node), Some(Op::Transfer(_))) {
                continue;
            }
            let transferred = match transfers.get(&to) {
                Some(&v) => v,
                None => {
                    let id = graph.add(&format!("{name}_to_{to}"), Transfer { to }, &[value])?;
                    graph.set_device(id, Some(to));
                    let bytes = graph.ty(value).bytes();
                    record.applied(&graph.node(id).name, format!("transfers {bytes} bytes"));
                    transfers.insert(to, id.out());
                    id.out()
                }
            };
            graph.set_operand(u.node, u.slot.into(), transferred)?;
        }
    }
    Ok(())
}
