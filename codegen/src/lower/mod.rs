//! Lowering: each op of the graph becomes steps of machine code.
//!
//! Files mirror those of `qcc_ir::ops`. A family has a [`Lowerer`] for each op: what it supports and how it is
//! emitted stand next to each other. An op without one runs in the reference interpreter. `lowering.rs` goes through the
//! nodes and has what lowerers emit with, `packing.rs` puts weights in their memory.

mod conv;
mod dynamic;
mod elementwise;
mod lowering;
mod matmul;
mod norm;
mod packing;
mod pool;
mod product;
mod quantize;
mod recurrent;
mod reduce;
mod resample;
mod shape;

pub(crate) use lowering::{Lowered, Lowering, PendingCode, PendingStep, lower};

use crate::{
    CodegenError,
    plan::{Margins, is_alias},
};
use qcc_ir::{Device, Graph, NodeId, Op, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// How one op is lowered.
pub(crate) struct Lowerer {
    /// Whether this node can be emitted, or why not. Must be the whole truth, but for requantizations that cannot be
    /// expressed: `lower` may rely on it.
    pub(crate) supported: fn(&Graph, NodeId) -> Result<(), String>,
    /// Emits the steps of a supported node.
    pub(crate) lower: fn(&mut Lowering, NodeId) -> Result<(), CodegenError>,
}

/// The one table of lowerings. `None`: only the interpreter computes it.
fn lowerer(op: &Op) -> Option<&'static Lowerer> {
    Some(match op {
        Op::Unary(_) => &elementwise::UNARY,
        Op::Binary(_) => &elementwise::BINARY,
        Op::QUnary(_) => &elementwise::Q_UNARY,
        Op::QBinary(_) => &elementwise::Q_BINARY,
        Op::Where(_) => &elementwise::WHERE,
        Op::Cast(_) => &elementwise::CAST,
        Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_) => &conv::CONV,
        Op::MatMul(_) | Op::QMatMul(_) | Op::QMatMulToFloat(_) => &matmul::MATMUL,
        Op::DynamicQuantize(_) => &dynamic::DYNAMIC_QUANTIZE,
        Op::Resample(_) => &resample::RESAMPLE,
        Op::QResample(_) => &resample::Q_RESAMPLE,
        Op::Reshape(_) | Op::Transfer(_) | Op::AssumeGrid(_) => &shape::ALIAS,
        Op::Transpose(_) => &shape::TRANSPOSE,
        Op::Slice(_) => &shape::SLICE,
        Op::Concat(_) => &shape::CONCAT,
        Op::Pad(_) => &shape::PAD,
        Op::Expand(_) => &shape::EXPAND,
        Op::Gather(_) => &shape::GATHER,
        Op::Pool(_) => &pool::POOL,
        Op::QAveragePool(_) => &pool::Q_AVERAGE_POOL,
        Op::Normalize(_) => &norm::NORMALIZE,
        Op::Softmax(_) => &norm::SOFTMAX,
        Op::Lrn(_) => &norm::LRN,
        Op::Reduce(_) => &reduce::REDUCE,
        Op::Recurrent(_) => &recurrent::RECURRENT,
        Op::Quantize(_) => &quantize::QUANTIZE,
        Op::Dequantize(_) => &quantize::DEQUANTIZE,
        Op::FakeQuant(_) => &quantize::FAKE_QUANT,
        // Rare, and as fast as memory lets them be in the interpreter.
        Op::BitCast(_)
        | Op::CastSmall(_)
        | Op::ArgExtreme(_)
        | Op::TopK(_)
        | Op::Cumulate(_)
        | Op::Determinant(_)
        | Op::Inverse(_)
        | Op::ArgMaxPool(_)
        | Op::GridSample(_)
        | Op::RoiAlign(_)
        | Op::MaxRoiPool(_)
        | Op::LinearAttention(_)
        | Op::TreeEnsemble(_)
        | Op::CoupleProbabilities(_)
        | Op::GatherElements(_)
        | Op::GatherNd(_)
        | Op::ScatterElements(_)
        | Op::ScatterNd(_) => return None,
        // Folded by the passes, or products of integers that nothing says the meaning of.
        Op::BatchNorm(_) | Op::IntConv(_) | Op::PlainMatMul(_) => return None,
    })
}

/// Whether generated code can compute a node, or why not.
pub fn capability(graph: &Graph, node: NodeId) -> Result<(), String> {
    has_kernel(graph, node)?;
    product::check_requantization(graph, node)
}

/// Like [`capability`], but for what only the values of weights can tell, which the lowering finds out by itself.
fn has_kernel(graph: &Graph, node: NodeId) -> Result<(), String> {
    match graph.op(node) {
        None => Ok(()),
        Some(op) => match lowerer(op) {
            Some(l) => (l.supported)(graph, node),
            None => Err(format!("{} has no lowering", op.mnemonic())),
        },
    }
}

/// Whether a node has a device that runs generated code, and a lowering.
pub(crate) fn is_generated(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.node(node).device, Some(Device::Int8Jit | Device::FloatJit))
        && has_kernel(graph, node).is_ok()
}

/// Whether the steps of a node read this operand by its strides, whatever they are.
pub(crate) fn reads_strided(graph: &Graph, node: NodeId, slot: usize) -> bool {
    let takes = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) => conv::reads_strided(graph, node, slot),
        Some(Op::Gather(g)) => slot == 0 && shape::is_progression(graph, node, g.axis),
        Some(Op::Slice(_) | Op::Concat(_) | Op::Pad(_) | Op::Expand(_)) => true,
        Some(op) => writes_views(op),
        None => false,
    };
    takes && is_generated(graph, node)
}

/// Whether the steps of a node write its result by its strides, whatever they are, as long as channels (the last
/// dimension) follow each other.
pub(crate) fn writes_strided(graph: &Graph, node: NodeId) -> bool {
    let takes = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) => conv::writes_strided(graph, node),
        Some(Op::Slice(_) | Op::Concat(_) | Op::Pad(_) | Op::Expand(_)) => true,
        Some(op) => writes_views(op),
        None => false,
    };
    takes && is_generated(graph, node)
}

/// Ops that read all operands and write their result through a [`View`](crate::kernels::map::View).
fn writes_views(op: &Op) -> bool {
    quantize::maps_elements(op)
        || matches!(
            op,
            Op::Binary(_)
                | Op::Where(_)
                | Op::QBinary(_)
                | Op::Transpose(_)
                | Op::Pool(_)
                | Op::QAveragePool(_)
        )
}

/// Whether the step of a node reads this operand as the scales or zero points of rows.
pub(crate) fn reads_grids(graph: &Graph, node: NodeId, slot: usize) -> bool {
    product::grids_at_run_time(graph, node).is_some()
        && product::GRID_SLOTS.contains(&slot)
        && is_generated(graph, node)
}

/// The margins that a node needs around this operand, if it is one that is read with them in place.
pub(crate) fn reads_with_margins(graph: &Graph, node: NodeId, slot: usize) -> Option<Margins> {
    let margins = match graph.op(node) {
        Some(Op::Conv(_) | Op::QConv(_) | Op::QConvToFloat(_)) if slot == 0 => conv::margins(graph, node),
        _ => None,
    };
    margins.filter(|_| is_generated(graph, node))
}

/// Nodes that are computed within the step of another one, and that other one: a transpose before or behind an
/// elementwise op of one operand is only the order in which that op reads or writes. Every int8 model begins with such
/// a pair (f32 channels first to u8 channels last). Before a product of two values, as the heads of attention are, it is
/// the order in which operands are packed and read. Functions of elements are chained: [`elementwise::chains`].
pub(crate) fn fuse(graph: &Graph) -> BTreeMap<NodeId, NodeId> {
    let mut fused: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    let mut into = BTreeSet::new();
    for (node, _) in graph.nodes().filter(|(_, n)| n.op().is_some()) {
        let Some(&operand) = graph.operands(node).first() else { continue };
        let (Some(outer), Some(inner)) = (graph.op(node), graph.op(operand.node)) else { continue };
        let is_pair = match (outer, inner) {
            (Op::Transpose(_), inner) => quantize::maps_elements(inner) && !is_alias(graph, node),
            (outer, Op::Transpose(_)) => quantize::maps_elements(outer) && !is_alias(graph, operand.node),
            _ => false,
        };
        let is_free = |operand: ValueId, into: &BTreeSet<NodeId>| {
            graph.sole_use(operand).is_some()
                && !into.contains(&operand.node)
                && !is_alias(graph, operand.node)
                && !is_alias(graph, node)
                && is_generated(graph, operand.node)
        };
        if is_pair && !fused.contains_key(&node) && is_free(operand, &into) && is_generated(graph, node) {
            fused.insert(operand.node, node);
            into.insert(node);
        }
        for (slot, operand) in graph.operands(node).into_iter().enumerate() {
            if let Some(Op::Transpose(t)) = graph.op(operand.node)
                && matmul::reads_permuted(graph, node, slot, &t.perm)
                && !fused.contains_key(&operand.node)
                && is_free(operand, &into)
                && is_generated(graph, node)
            {
                fused.insert(operand.node, node);
                into.insert(node);
            }
        }
    }
    let chains = elementwise::chains(graph, |node| fused.contains_key(&node) || into.contains(&node));
    fused.extend(chains);
    fused
}
