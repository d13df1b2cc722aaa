//! What convolutions and matrix products have in common: bias, residual, epilogue, and what can be lowered.

use super::Lowering;
use crate::{
    CodegenError,
    dense::{
        Problem,
        depthwise::{self, Taps},
        driver::{self, Coefficients, Operands},
        pad::{self, Border},
        spec::{Epilogue, Product},
    },
    model::Work,
    module::Location,
};
use qcc_ir::{Graph, NodeId, OpError, Tensor, TensorError, ValueId, numerics::Requantizer, ops::Clamp};

/// Slots of the optional operands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extras {
    pub(super) bias: Option<usize>,
    residual: Option<usize>,
}

impl Extras {
    pub(super) fn new(bias: bool, residual: Option<usize>) -> Extras {
        Extras { bias: bias.then_some(2), residual }
    }

    /// Where the residual lies, with readable slack behind it: memory of the caller is copied.
    fn residual_location(&self, cx: &mut Lowering, node: NodeId) -> Result<Option<Location>, CodegenError> {
        let Some(slot) = self.residual else { return Ok(None) };
        with_slack(cx, cx.graph.operand(node, slot)).map(Some)
    }
}

/// Where a value lies, or a copy of it if it is the caller's memory.
pub(super) fn with_slack(cx: &mut Lowering, value: ValueId) -> Result<Location, CodegenError> {
    let location = cx.location(value)?;
    let bytes = cx.graph.ty(value).bytes();
    match location {
        Location::Arena(_) | Location::Weights(_) => Ok(location),
        Location::Input(_) | Location::Output(_) => {
            // Rows are only a unit of work here: the copy has no border.
            let rows = (1..=64usize).rev().find(|&n| bytes.is_multiple_of(n)).unwrap_or(1);
            let border = Border {
                images: 1,
                rows,
                row_bytes: bytes / rows,
                above: 0,
                below: 0,
                left: 0,
                right: 0,
                fill: 0,
            };
            pad::lower(cx, location, border)
        }
    }
}

/// The operand in `slot`, which must be a constant.
pub(super) fn constant(graph: &Graph, node: NodeId, slot: usize) -> Result<&Tensor, OpError> {
    graph
        .constant_value(graph.operand(node, slot))
        .ok_or_else(|| OpError::unsupported(format!("operand {slot} is not a constant")))
}

/// Fails unless the operand in `slot` is a constant.
pub(super) fn check_constant(graph: &Graph, node: NodeId, slot: usize, what: &str) -> Result<(), String> {
    match graph.constant_value(graph.operand(node, slot)) {
        Some(_) => Ok(()),
        None => Err(format!("the {what} are computed at run time: only constants are packed")),
    }
}

/// Fails for empty tensors and for those that 32-bit displacements do not span.
pub(super) fn check_extents(graph: &Graph, node: NodeId) -> Result<(), String> {
    let values = graph.operands(node).into_iter().chain([node.out()]);
    for ty in values.map(|v| graph.ty(v)) {
        if ty.shape.elements() == 0 {
            return Err(format!("an empty tensor {ty}"));
        }
        if ty.bytes() > i32::MAX as usize {
            return Err(format!("{ty} takes more than 2^31 − 1 bytes"));
        }
    }
    Ok(())
}

/// What a product is computed from, besides its problem.
pub(super) struct Parts<'a> {
    pub(super) extras: Extras,
    /// Of an int8 product.
    pub(super) requantizer: Option<&'a Requantizer>,
    /// Bounds of a float one.
    pub(super) clamp: Clamp,
    /// Index in the weights' tensor of element i of a run of K: `(channel, run, i)`.
    pub(super) weight_index: &'a dyn Fn(usize, usize, usize) -> usize,
}

/// The kernel that computes a product.
pub(super) enum Kernel<'a> {
    /// Tiles, under this name.
    Dense(&'a str),
    /// One input channel for each output channel.
    Depthwise(&'a Taps),
}

/// Lowers a product whose input lies at `a` to one step.
pub(super) fn lower(
    cx: &mut Lowering,
    node: NodeId,
    problem: &Problem,
    kernel: &Kernel<'_>,
    a: Location,
    parts: &Parts<'_>,
) -> Result<(), CodegenError> {
    let r = parts.extras.residual_location(cx, node)?;
    let operands = Operands { a, y: cx.location(node.out())?, r };
    let epilogue = match parts.requantizer {
        Some(_) if cx.options.measure_pack_only => Epilogue::PackOnly,
        Some(q) => Epilogue::Requantize(q),
        None => Epilogue::Float { clamp: parts.clamp, residual: r.is_some() },
    };
    let weights = constant(cx.graph, node, 1).map_err(|e| cx.refuse(node, e))?;
    let bias = parts.extras.bias.map(|slot| constant(cx.graph, node, slot)).transpose();
    let bias = bias.map_err(|e| cx.refuse(node, e))?;
    let index = parts.weight_index;
    let channels = problem.groups * problem.channels;
    let work = cx.work(node);
    let refuse = |cx: &Lowering, e: TensorError| cx.refuse(node, e.into());
    match problem.product {
        Product::U8S8 => {
            let w = weights.as_slice::<i8>().map_err(|e| refuse(cx, e))?;
            let bias = bias.map(|b| b.as_slice::<i32>()).transpose().map_err(|e| refuse(cx, e))?;
            let (_, zero) = cx.graph.ty(cx.graph.operand(node, 0)).per_tensor().unwrap_or((1.0, 0));
            let (mut starts, mut reach) = (Vec::with_capacity(channels), 0);
            for c in 0..channels {
                let (mut sum, mut magnitudes) = (0i32, 0i64);
                for (run, i) in (0..problem.runs()).flat_map(|run| (0..problem.run).map(move |i| (run, i))) {
                    let w = i32::from(w[index(c, run, i)]);
                    sum += w;
                    magnitudes += i64::from(w.abs());
                }
                let bias = bias.map_or(0, |b| b[c]);
                // Wrapping: the requantizer has checked that whole sums fit, and they do not depend on the order.
                starts.push(bias.wrapping_sub(zero.wrapping_mul(sum)));
                reach = reach.max(i64::from(bias).abs() + 255 * magnitudes);
            }
            let weight = |c: usize, run: usize, i: usize| w[index(c, run, i)];
            let coefficients = Coefficients::Codes(&weight, &starts, reach);
            emit(cx, problem, kernel, epilogue, operands, &coefficients, work)
        }
        Product::F32 => {
            let w = weights.as_slice::<f32>().map_err(|e| refuse(cx, e))?;
            let bias = bias.map(|b| b.as_slice::<f32>()).transpose().map_err(|e| refuse(cx, e))?;
            let starts = bias.map_or_else(|| vec![0.0; channels], <[f32]>::to_vec);
            let weight = |c: usize, run: usize, i: usize| w[index(c, run, i)];
            let coefficients = Coefficients::Floats(&weight, &starts);
            emit(cx, problem, kernel, epilogue, operands, &coefficients, work)
        }
    }
}

fn emit(
    cx: &mut Lowering,
    problem: &Problem,
    kernel: &Kernel<'_>,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_>,
    work: Work,
) -> Result<(), CodegenError> {
    match kernel {
        Kernel::Dense(name) => driver::lower(cx, name, problem, epilogue, operands, coefficients, work),
        Kernel::Depthwise(taps) => {
            depthwise::lower(cx, problem, taps, epilogue, operands, coefficients, work)
        }
    }
}
