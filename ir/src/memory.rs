//! What a graph takes in memory, told before it is taken.

use crate::{Graph, TensorType, ValueId};
use std::{collections::BTreeMap, fmt};

/// A number of bytes as people read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let (mut scaled, mut unit) = (self.0 as f64, "bytes");
        for next in UNITS {
            if scaled < 1024.0 {
                break;
            }
            (scaled, unit) = (scaled / 1024.0, next);
        }
        if unit == "bytes" { write!(f, "{} bytes", self.0) } else { write!(f, "{scaled:.1} {unit}") }
    }
}

/// More memory than is allowed would be needed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{what} needs {} of memory, where {} are allowed: allow more with --max-memory (`max_memory` of the library), or \
     give smaller inputs",
    Bytes(*needed),
    Bytes(*allowed)
)]
pub struct MemoryError {
    /// What would take it.
    pub what: String,
    /// Bytes needed, at least.
    pub needed: u64,
    /// Bytes allowed.
    pub allowed: u64,
}

impl MemoryError {
    /// Fails where more is needed than is allowed.
    pub fn check(what: &str, needed: u64, allowed: u64) -> Result<(), MemoryError> {
        if needed <= allowed { Ok(()) } else { Err(MemoryError { what: what.into(), needed, allowed }) }
    }
}

/// Bytes that a run of a graph takes in the [interpreter](crate::interpreter).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryPlan {
    /// All constants.
    pub constants: u64,
    /// Inputs, results, and the most intermediate values that are there at once.
    pub values: u64,
}

impl MemoryPlan {
    /// The plan of a graph: each value is there from the node that computes it to the last one that reads it.
    pub fn of(graph: &Graph) -> MemoryPlan {
        let mut plan = MemoryPlan::default();
        let mut uses: BTreeMap<ValueId, usize> = BTreeMap::new();
        let operands = graph.nodes().flat_map(|(id, _)| graph.operands(id));
        for value in operands.chain(graph.outputs().iter().map(|o| o.value)) {
            *uses.entry(value).or_insert(0) += 1;
        }
        // Inputs are the caller's, and stay.
        let mut alive = signature_bytes(graph);
        plan.values = alive;
        for id in graph.order() {
            if let Some(constant) = graph.constant_value(id.out()) {
                plan.constants = plan.constants.saturating_add(constant.bytes().len() as u64);
                continue;
            }
            let is_op = graph.op(id).is_some();
            if is_op {
                for ty in graph.node(id).outputs() {
                    alive = alive.saturating_add(bytes(ty));
                }
                plan.values = plan.values.max(alive);
                for (port, ty) in (0..).zip(graph.node(id).outputs()) {
                    if !uses.contains_key(&id.port(port)) {
                        alive = alive.saturating_sub(bytes(ty));
                    }
                }
            }
            for value in graph.operands(id) {
                let Some(left) = uses.get_mut(&value) else { continue };
                *left -= 1;
                if *left == 0 && graph.op(value.node).is_some() {
                    alive = alive.saturating_sub(bytes(graph.ty(value)));
                }
            }
        }
        plan
    }

    /// Everything.
    pub fn total(&self) -> u64 {
        self.constants.saturating_add(self.values)
    }
}

/// Bytes of a graph's inputs and outputs, which every run takes whatever computes it.
pub fn signature_bytes(graph: &Graph) -> u64 {
    let inputs = graph.inputs().iter().map(|id| graph.ty(id.out()));
    let outputs = graph.outputs().iter().map(|o| graph.ty(o.value));
    inputs.chain(outputs).map(bytes).fold(0, u64::saturating_add)
}

fn bytes(ty: &TensorType) -> u64 {
    ty.bytes() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Tensor,
        ops::{Unary, UnaryKind},
    };

    #[test]
    fn values_count_while_they_are_used() {
        let mut g = Graph::new("chain");
        let x = g.input("x", TensorType::f32(&[256]).unwrap()).unwrap();
        let mut v = x;
        for i in 0..5 {
            v = g.add(&format!("n{i}"), Unary { kind: UnaryKind::Exp }, &[v]).unwrap().out();
        }
        let c = g.constant("c", Tensor::scalar(1f32));
        g.output("y", v);
        g.output("c", c);
        // Input and result, and of the chain two at once.
        let plan = MemoryPlan::of(&g);
        assert_eq!(plan, MemoryPlan { constants: 4, values: 4 + 2 * 1024 + 2 * 1024 });
        assert_eq!(plan.total(), 4104);
        let e = MemoryError::check("a run", plan.total(), 4000).unwrap_err().to_string();
        assert!(e.contains("a run needs 4.0 KiB") && e.contains("--max-memory"), "{e}");
    }

    #[test]
    fn bytes_read_well() {
        assert_eq!(Bytes(1023).to_string(), "1023 bytes");
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    }
}
