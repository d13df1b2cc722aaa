//! What convolutions and matrix products have in common: bias, residual, epilogue, and what can be lowered.

use super::Lowering;
use crate::{
    CodegenError,
    dense::{
        Problem, WeightOrder, Weights,
        depthwise::{self, Taps},
        driver::{self, Coefficients, Elements, Operands, PackedAt, Starts},
        pad::{self, Border, Fill},
        spec::{Epilogue, Product, RowGrid, RunTimeGrids},
        strip::Strips,
    },
    kernels::map::{self, View},
    model::Work,
    module::Location,
};
use qcc_ir::{
    DType, Device, Graph, NodeId, Op, OpError, Tensor, TensorError, TensorType, ValueId,
    numerics::{Dequantizer, Requantizer, WeightSums},
    ops::{Clamp, QConv, QConvToFloat, QMatMul, QMatMulToFloat, ToFloat},
};
use rayon::prelude::*;
use std::collections::BTreeMap;

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

    pub(super) fn of_floats(to: &ToFloat) -> Extras {
        Extras { bias: to.bias_slot(), residual: to.residual_slot() }
    }

    pub(super) fn residual_slot(self) -> Option<usize> {
        self.residual
    }

    /// The residual of a node with these operands.
    pub(super) fn residual(self, graph: &Graph, node: NodeId) -> Option<ValueId> {
        self.residual.map(|slot| graph.operand(node, slot))
    }

    /// Where the residual lies, with readable slack behind it: memory of the caller is copied.
    pub(super) fn residual_location(
        &self,
        cx: &mut Lowering,
        node: NodeId,
    ) -> Result<Option<Location>, CodegenError> {
        let Some(residual) = self.residual(cx.graph, node) else { return Ok(None) };
        with_slack(cx, residual).map(Some)
    }
}

/// Where the first element of a value lies, or a copy of it if it is the caller's memory.
pub(super) fn with_slack(cx: &mut Lowering, value: ValueId) -> Result<Location, CodegenError> {
    let location = cx.view(value)?.location;
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
                fill: Fill::Byte(0),
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

/// The sums of an integer product's weights, by channel; `None` of a float one.
fn weight_sums(graph: &Graph, node: NodeId) -> Result<Option<Vec<WeightSums>>, OpError> {
    let axis = match graph.op(node) {
        Some(Op::QConv(_)) => QConv::CHANNEL_AXIS,
        Some(Op::QMatMul(_)) => QMatMul::CHANNEL_AXIS,
        Some(Op::QMatMulToFloat(_)) => QMatMulToFloat::CHANNEL_AXIS,
        Some(Op::QConvToFloat(_)) => QConvToFloat::CHANNEL_AXIS,
        _ => return Ok(None),
    };
    Ok(Some(WeightSums::by_channel(constant(graph, node, 1)?, axis)?))
}

/// What becomes of the sums of an integer product.
enum Output {
    /// Codes.
    Codes(Requantizer),
    /// Floats.
    Floats(Dequantizer),
}

/// How a product of codes becomes floats, if it does.
pub(super) fn to_float(graph: &Graph, node: NodeId) -> Option<ToFloat> {
    match graph.op(node)? {
        Op::QConvToFloat(c) => Some(c.to),
        Op::QMatMulToFloat(m) => Some(m.to),
        _ => None,
    }
}

/// What makes floats of sums; a scale that is known is part of it.
fn floats(
    to: &ToFloat,
    types: &[&TensorType],
    sums: &[WeightSums],
    bias: Option<&Tensor>,
) -> Result<Dequantizer, OpError> {
    let dequantizer = to.dequantizer(types[1], sums, bias)?;
    Ok(match types[0].per_tensor() {
        Some((scale, _)) => dequantizer.with_scale(scale),
        None => dequantizer,
    })
}

/// The output of an integer product with these sums of weights; `None` of a float one.
fn output(graph: &Graph, node: NodeId, sums: &[WeightSums]) -> Result<Option<Output>, OpError> {
    let types: Vec<_> = graph.operands(node).into_iter().map(|v| graph.ty(v)).collect();
    let bias = |slot: Option<usize>| slot.map(|slot| constant(graph, node, slot)).transpose();
    let second = |there: bool| bias(there.then_some(2));
    match graph.op(node) {
        Some(Op::QConv(c)) => c.requantizer(&types, sums, second(c.bias)?).map(Output::Codes).map(Some),
        Some(Op::QMatMul(m)) => m.requantizer(&types, sums, second(m.bias)?).map(Output::Codes).map(Some),
        _ => match to_float(graph, node) {
            Some(to) => floats(&to, &types, sums, bias(to.bias_slot())?).map(Output::Floats).map(Some),
            None => Ok(None),
        },
    }
}

/// What an integer product is computed with, besides its weights.
pub(crate) struct IntegerProduct {
    output: Output,
    /// What sums start from: bias − z_x·Σw; 0 where the zero point is not known.
    starts: Vec<i32>,
    /// The magnitude that no accumulator exceeds.
    reach: i64,
}

/// Those of a graph, or why they cannot be expressed.
pub(crate) type IntegerProducts = BTreeMap<NodeId, Result<IntegerProduct, OpError>>;

/// The integer products with constant weights that generated code computes. Reads all their weights, on all threads.
pub(super) fn integer_products(graph: &Graph) -> IntegerProducts {
    let is_wanted = |node: NodeId| {
        let n = graph.node(node);
        matches!(n.op(), Some(Op::QConv(_) | Op::QMatMul(_) | Op::QConvToFloat(_) | Op::QMatMulToFloat(_)))
            && matches!(n.device, Some(Device::Int8Jit | Device::FloatJit))
            && constant(graph, node, 1).is_ok()
    };
    let nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).filter(|&id| is_wanted(id)).collect();
    nodes.into_par_iter().map(|node| (node, integer_product(graph, node))).collect()
}

fn integer_product(graph: &Graph, node: NodeId) -> Result<IntegerProduct, OpError> {
    let refused = || OpError::unsupported("no integer product");
    let sums = weight_sums(graph, node)?.ok_or_else(refused)?;
    let output = output(graph, node, &sums)?.ok_or_else(refused)?;
    let has_bias = matches!(graph.op(node), Some(Op::QConv(c)) if c.bias)
        || matches!(graph.op(node), Some(Op::QMatMul(m)) if m.bias);
    let bias =
        has_bias.then(|| constant(graph, node, 2)?.as_slice::<i32>().map_err(OpError::from)).transpose()?;
    let (_, zero) = graph.ty(graph.operand(node, 0)).per_tensor().unwrap_or((1.0, 0));
    let (mut starts, mut reach) = (Vec::with_capacity(sums.len()), 0);
    for (c, own) in sums.into_iter().enumerate() {
        let bias = bias.map_or(0, |b| b[c]);
        // Wrapping: the requantizer has checked that whole sums fit, and they do not depend on the order.
        starts.push(bias.wrapping_sub(zero.wrapping_mul(own.total as i32)));
        reach = reach.max(i64::from(bias).abs() + 255 * own.magnitude);
    }
    Ok(IntegerProduct { output, starts, reach })
}

/// Fails for requantizations that cannot be expressed. Reads all weights.
pub(super) fn check_requantization(graph: &Graph, node: NodeId) -> Result<(), String> {
    let types: Vec<_> = graph.operands(node).into_iter().map(|v| graph.ty(v)).collect();
    let checked = match graph.op(node) {
        Some(Op::QMatMul(m)) if QMatMul::is_of_activations(&types) => {
            let bias = m.bias.then(|| constant(graph, node, 2)).transpose();
            bias.and_then(|bias| m.requantizer_of_activations(&types, bias).map(|_| ()))
        }
        _ => weight_sums(graph, node).and_then(|sums| match sums {
            Some(sums) => output(graph, node, &sums).map(|_| ()),
            None => Ok(()),
        }),
    };
    checked.map_err(|e| e.to_string())
}

/// Fails for operands that no product takes.
pub(super) fn check(graph: &Graph, node: NodeId, extras: Extras) -> Result<(), String> {
    check_extents(graph, node)?;
    check_constant(graph, node, Some(1), "weights")?;
    check_constant(graph, node, extras.bias, "bias")
}

/// Fails where an operand is there and no constant.
pub(super) fn check_constant(
    graph: &Graph,
    node: NodeId,
    slot: Option<usize>,
    what: &str,
) -> Result<(), String> {
    match slot.is_some_and(|slot| graph.constant_value(graph.operand(node, slot)).is_none()) {
        true => Err(format!("the {what} are computed at run time: only constants are packed")),
        false => Ok(()),
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

/// Operand slots of the scales and zero points of rows.
pub(super) const GRID_SLOTS: [usize; 2] = [ToFloat::SCALE_SLOT, ToFloat::ZERO_POINT_SLOT];

/// How many grids a product reads when it runs; `None` where they are constants.
pub(super) fn grids_at_run_time(graph: &Graph, node: NodeId) -> Option<usize> {
    to_float(graph, node).filter(|to| to.grids)?;
    GRID_SLOTS.into_iter().map(|slot| graph.shape(graph.operand(node, slot)).elements()).max()
}

/// Fails where scales or zero points are of another rank than can be brought to that of rows.
pub(super) fn check_grids(graph: &Graph, node: NodeId) -> Result<(), String> {
    let rank = graph.shape(node.out()).rank();
    let is_of_higher_rank = |slot: &usize| graph.shape(graph.operand(node, *slot)).rank() > rank;
    match grids_at_run_time(graph, node) {
        Some(_) if GRID_SLOTS.iter().any(is_of_higher_rank) => {
            Err("its scales or zero points have more dimensions than its result".into())
        }
        _ => Ok(()),
    }
}

/// The scales and zero points of a product as pairs, so many of them: where they lie so, or copied.
pub(super) fn grids_of_rows(cx: &mut Lowering, node: NodeId, count: usize) -> Result<RowGrids, CodegenError> {
    let [scale, zero] = GRID_SLOTS.map(|slot| cx.graph.operand(node, slot));
    let known = cx.graph.constant_value(zero).and_then(|z| z.as_slice::<i32>().ok());
    let zero_points = known.is_none_or(|zeros| zeros.iter().any(|&z| z != 0));
    if let Some(location) = cx.plan.pairs(scale, zero).filter(|_| cx.graph.shape(scale).elements() == count) {
        return Ok(RowGrids { location, zero_points });
    }
    let location = cx.scratch((count * RowGrid::BYTES) as u64)?;
    // Of rows, or one.
    let mut dims = cx.graph.shape(cx.graph.operand(node, 0)).to_vec();
    let leading = if count == 1 { 0 } else { dims.len() - 1 };
    dims[leading..].fill(1);
    let places = [(scale, 0), (zero, RowGrid::ZERO_POINT)];
    for (value, at) in places {
        let from = cx.view(value)?.broadcast_to(cx.graph.shape(value), &dims);
        let mut to = View::dense(location, cx.graph.ty(value).dtype, &dims);
        to.strides.iter_mut().for_each(|s| *s *= (RowGrid::BYTES / DType::F32.size()) as i64);
        map::copy(cx, "grids", &dims, from, View { offset: at as i64, ..to })?;
    }
    Ok(RowGrids { location, zero_points })
}

/// What a product is computed from, besides its problem.
pub(super) struct Parts {
    pub(super) extras: Extras,
    /// Bounds of a float one.
    pub(super) clamp: Clamp,
    /// Where the weights of the problem lie in their tensor.
    pub(super) order: WeightOrder,
    /// The grids of rows, where they are known at run time.
    pub(super) grids: Option<RowGrids>,
}

/// Grids of the rows of a first operand.
#[derive(Clone, Copy)]
pub(super) struct RowGrids {
    /// Where they lie, one behind the other or one for all.
    pub(super) location: Location,
    /// Whether some may have a zero point other than 0.
    pub(super) zero_points: bool,
}

/// The kernel that computes a product.
pub(super) enum Kernel<'a> {
    /// Tiles, under this name.
    Dense(&'a str),
    /// One input channel for each output channel, of an input with a border.
    Depthwise(&'a Taps),
    /// The same, of an input without one.
    Strips(&'a Strips),
}

/// Lowers a product whose input lies at `a` to one step.
pub(super) fn lower(
    cx: &mut Lowering,
    node: NodeId,
    problem: &Problem,
    kernel: &Kernel<'_>,
    a: Location,
    parts: &Parts,
) -> Result<(), CodegenError> {
    let r = parts.extras.residual_location(cx, node)?;
    let y = cx.result_view(node)?.location;
    let g = parts.grids.map(|g| g.location);
    let operands = Operands { a, y, r, g, w: PackedAt::Model };
    let tensor = constant(cx.graph, node, 1).map_err(|e| cx.refuse(node, e))?;
    let (order, run) = (parts.order, problem.run);
    let work = cx.work(node);
    let refuse = |cx: &Lowering, e: TensorError| cx.refuse(node, e.into());
    match problem.product {
        Product::U8S8 | Product::U8S7 => {
            let elements = tensor.as_slice::<i8>().map_err(|e| refuse(cx, e))?;
            let own = match cx.products.get(&node) {
                Some(Ok(own)) => own,
                Some(Err(e)) => return Err(cx.refuse(node, e.clone())),
                None => return Err(cx.refuse(node, OpError::unsupported("no integer product"))),
            };
            let epilogue = match &own.output {
                Output::Codes(_) if cx.options.measure_pack_only => Epilogue::PackOnly,
                Output::Codes(requantizer) => Epilogue::Requantize(requantizer),
                Output::Floats(dequantizer) => Epilogue::Dequantize {
                    dequantizer,
                    grids: match parts.grids {
                        None => RunTimeGrids::None,
                        Some(RowGrids { zero_points: false, .. }) => RunTimeGrids::Scales,
                        Some(RowGrids { zero_points: true, .. }) => RunTimeGrids::ScalesAndZeroPoints,
                    },
                    residual: r.is_some(),
                },
            };
            let weights = Weights { elements, order, run };
            let tier = cx.options.tier;
            let product = match kernel {
                Kernel::Dense(_) if tier.has_faster_narrow_products() => {
                    let channels = problem.groups * problem.channels;
                    tier.product_of_codes(weights.pairs_fit_16_bits(channels, problem.runs()))
                }
                // Those of depthwise convolutions are cut by their product, so that it is chosen before.
                _ => problem.product,
            };
            let problem = &Problem { product, ..problem.clone() };
            let work = Work { by_narrow_weights: product == Product::U8S7, ..work };
            let weights = Elements::Codes(weights);
            let starts = Starts::Codes(&own.starts, own.reach);
            let coefficients = Coefficients { tensor, weights, starts };
            emit(cx, problem, kernel, epilogue, operands, &coefficients, work)
        }
        Product::F32 => {
            let elements = tensor.as_slice::<f32>().map_err(|e| refuse(cx, e))?;
            let bias = parts.extras.bias.map(|slot| constant(cx.graph, node, slot)).transpose();
            let bias = bias.map_err(|e| cx.refuse(node, e))?;
            let bias = bias.map(|b| b.as_slice::<f32>()).transpose().map_err(|e| refuse(cx, e))?;
            let channels = problem.groups * problem.channels;
            let starts = bias.map_or_else(|| vec![0.0; channels], <[f32]>::to_vec);
            let epilogue = Epilogue::Float { clamp: parts.clamp, residual: r.is_some() };
            let weights = Elements::Floats(Weights { elements, order, run });
            let coefficients = Coefficients { tensor, weights, starts: Starts::Floats(&starts) };
            emit(cx, problem, kernel, epilogue, operands, &coefficients, work)
        }
    }
}

fn emit<'s>(
    cx: &mut Lowering<'_, 's>,
    problem: &Problem,
    kernel: &Kernel<'_>,
    epilogue: Epilogue<'_>,
    operands: Operands,
    coefficients: &Coefficients<'_, 's>,
    work: Work,
) -> Result<(), CodegenError> {
    match kernel {
        Kernel::Dense(name) => driver::lower(cx, name, problem, epilogue, operands, coefficients, work),
        Kernel::Depthwise(taps) => {
            depthwise::lower(cx, problem, taps, epilogue, operands, coefficients, work)
        }
        Kernel::Strips(strips) => {
            depthwise::lower_strips(cx, problem, strips, epilogue, operands, coefficients, work)
        }
    }
}
