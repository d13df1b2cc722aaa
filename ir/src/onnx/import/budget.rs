//! What an import may take: operations of loops that it runs, and bytes of constants that it makes.

use crate::onnx::{NodeError, body::NodeDef};
use crate::{
    Op, OpError, TensorType,
    limits::{MAX_LOOP_NODES, MAX_LOOP_OPERATIONS},
    memory::Bytes,
};
use std::cell::Cell;

/// What loops may take that run by their definition, all together.
pub(in crate::onnx) struct Work {
    nodes: Cell<u64>,
    operations: Cell<u64>,
}

impl Default for Work {
    fn default() -> Work {
        Work { nodes: Cell::new(MAX_LOOP_NODES), operations: Cell::new(MAX_LOOP_OPERATIONS) }
    }
}

impl Work {
    /// Takes from what is left.
    pub(super) fn take(&self, nodes: u64, operations: u64) -> Result<(), NodeError> {
        match (self.nodes.get().checked_sub(nodes), self.operations.get().checked_sub(operations)) {
            (Some(nodes), Some(operations)) => {
                self.nodes.set(nodes);
                self.operations.set(operations);
                Ok(())
            }
            _ => Err(OpError::too_large(format!(
                "the rounds of loops that run by their definition compute more than {MAX_LOOP_NODES} nodes or \
                 {MAX_LOOP_OPERATIONS} operations: give them fewer rounds"
            ))
            .into()),
        }
    }
}

/// Takes bytes of results from what import may make.
pub(super) fn take_bytes(budget: &mut usize, bytes: usize) -> Result<(), NodeError> {
    *budget = budget.checked_sub(bytes).ok_or_else(|| {
        OpError::too_large(format!(
            "its results take {}, where {} are left of what import may make: allow more with --max-memory \
             (`max_memory` of the library)",
            Bytes(bytes as u64),
            Bytes(*budget as u64)
        ))
    })?;
    Ok(())
}

/// About how many operations an op takes: a few thousand to be called, multiply-accumulates, and what takes the definition as
/// long: taps of windows, whose places are computed one by one, and elements read and made.
pub(super) fn operations(op: &Op, operands: &[&TensorType], results: &[TensorType]) -> u64 {
    let elements = |ty: &TensorType| ty.shape.elements() as u64;
    let made = results.iter().map(elements).fold(0, u64::saturating_add);
    let read = operands.iter().map(|ty| elements(ty)).fold(0, u64::saturating_add);
    const CALL: u64 = 4096;
    const TAP: u64 = 16;
    let each = match op {
        Op::Pool(pool) => TAP.saturating_mul(pool.window.taps() as u64),
        Op::ArgMaxPool(pool) => TAP.saturating_mul(pool.window.taps() as u64),
        Op::Lrn(lrn) => TAP.saturating_mul(lrn.size as u64),
        Op::Resample(resample) => TAP.saturating_mul(resample.taps_of_each() as u64),
        Op::GridSample(_) => 4 * TAP,
        _ => 1,
    };
    let elements = made.saturating_mul(each).saturating_add(read).saturating_add(CALL);
    op.macs(operands, results).saturating_add(elements)
}

/// About how many operations it takes to read a node with its attributes.
pub(super) fn reading(def: &NodeDef) -> u64 {
    const NODE: u64 = 1024;
    const ELEMENT: u64 = 64;
    let elements = def.attributes.values().map(|a| a.elements() as u64);
    NODE + ELEMENT * elements.sum::<u64>()
}
