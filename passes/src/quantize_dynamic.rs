//! Matrix products with constant weights become products of codes, whose activations are quantized row by row when the
//! model runs. Nothing is calibrated.
//!
//! So do the products of states in recurrent layers: their op takes weights of codes, and quantizes states itself.
//!
//! Weights get a scale a column, as those of calibrated models do. Products of one activation, as those of queries, keys and
//! values, share its codes. What stays float: products of two activations, whose second operand would have to be quantized
//! by columns, against the order in which it is computed; convolutions, in which a pixel is read by many windows and in
//! each of them beside pixels of other grids, so that there can be one grid of a whole image only, whose range is not known
//! before the last pixel is computed; and what is too small to pay.

use crate::{
    Context, Options, Pass, PassError, Record, WeightGrid,
    edit::{f32_constant, has_weights, live_op},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, QuantParams, Tensor, TensorType, ValueId,
    numerics::{self, WeightSums},
    ops::{DynamicQuantize, MatMul, QMatMulToFloat, Recurrent, ToFloat},
};
use std::collections::BTreeMap;

/// See the module.
pub(crate) const QUANTIZE_DYNAMIC: Pass = Pass { name: "quantize_dynamic", run };

/// Columns of the fewest weights for which a product of codes pays: what is saved grows with them, and quantizing a row
/// costs about as much as four of them, in float.
const FEWEST_COLUMNS: usize = 16;
/// Rows of the fewest weights: a sum of fewer products takes less time than its scaling.
const FEWEST_PRODUCTS: usize = 16;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    let mut made = Made::default();
    for node in graph.order() {
        let name = graph.node(node).name.clone();
        let product = match live_op(graph, node) {
            Some(Op::MatMul(m)) => Some(m.clone()),
            Some(Op::Recurrent(_)) => None,
            Some(Op::Conv(_)) => {
                record.declined(&name, "convolutions have no grids of rows: calibrate for int8");
                continue;
            }
            _ => continue,
        };
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        match (weights_of(graph, node, ctx.options, &mut made), product) {
            (Ok(weights), Some(product)) => {
                let [codes, scale, zero] = quantized(graph, node, &mut made)?;
                put(graph, node, &product, [codes, weights, scale, zero])?;
                record.applied(&name, "multiplies codes that are quantized row by row");
            }
            (Ok(weights), None) => {
                graph.set_operand(node, Recurrent::WEIGHTS_SLOT, weights)?;
                graph.remove_dead();
                record.applied(&name, "multiplies codes of states");
            }
            (Err(why), _) => record.declined(&name, why),
        }
    }
    Ok(())
}

/// What several products share.
#[derive(Default)]
struct Made {
    /// Codes, scales and zero points of activations.
    activations: BTreeMap<ValueId, [ValueId; 3]>,
    /// Codes of weights.
    weights: BTreeMap<ValueId, ValueId>,
}

/// The codes of a product's weights, or why it stays float.
fn weights_of(
    graph: &mut Graph,
    node: NodeId,
    options: &Options,
    made: &mut Made,
) -> Result<ValueId, String> {
    if matches!(graph.op(node), Some(Op::MatMul(_))) && !has_weights(graph, node) {
        return Err(
            "it multiplies two activations, or a batch of weights: only one matrix of weights is packed"
                .into(),
        );
    }
    let source = graph.operand(node, 1);
    if let Some(&weights) = made.weights.get(&source) {
        return Ok(weights);
    }
    let shape = graph.shape(source).clone();
    let &[inner, columns] = shape.dims() else { return Err("its weights are no matrix".into()) };
    if inner < FEWEST_PRODUCTS || columns < FEWEST_COLUMNS {
        return Err(format!(
            "{inner}×{columns} weights are too few to pay for quantizing what they multiply"
        ));
    }
    let weights = f32_constant(graph, source).ok_or("its weights are not constant numbers of f32")?;
    if !weights.iter().all(|w| w.is_finite()) {
        return Err("its weights are not finite".into());
    }
    let (codes, params) = codes_of(weights, columns, options).map_err(|e| e.to_string())?;
    let codes = Tensor::from_vec::<i8>(shape.clone(), codes).map_err(|e| e.to_string())?;
    let ty = TensorType::quantized(DType::S8, shape, params).map_err(|e| e.to_string())?;
    let sums = WeightSums::by_channel(&codes, QMatMulToFloat::CHANNEL_AXIS).map_err(|e| e.to_string())?;
    ToFloat::plain(true).dequantizer(&ty, &sums, None).map_err(|e| e.to_string())?;
    let name = format!("{}_codes", graph.node(source.node).name);
    let weights = graph.quantized_constant(&name, codes, ty).map_err(|e| e.to_string())?;
    made.weights.insert(source, weights);
    Ok(weights)
}

/// Codes of weights `[K, columns]` and their grid: symmetric, the largest magnitude of a column its largest code.
fn codes_of(weights: &[f32], columns: usize, options: &Options) -> Result<(Vec<i8>, QuantParams), OpError> {
    let codes = options.weight_bits.largest();
    let mut largest = vec![0f32; columns];
    for row in weights.chunks(columns) {
        largest.iter_mut().zip(row).for_each(|(largest, w)| *largest = largest.max(w.abs()));
    }
    if options.weights == WeightGrid::PerTensor {
        let most = largest.iter().copied().fold(0.0, f32::max);
        largest = vec![most];
    }
    // Of zeros alone: their codes are 0, whatever the scale.
    let scale = |&most: &f32| if most == 0.0 { 1.0 } else { (most / codes as f32).max(f32::MIN_POSITIVE) };
    let scales: Vec<f32> = largest.iter().map(scale).collect();
    let code = |(&w, &scale): (&f32, &f32)| numerics::quantize(w, scale, 0, -codes, codes) as i8;
    let mut coded = Vec::with_capacity(weights.len());
    for row in weights.chunks(columns) {
        match scales[..] {
            [scale] => coded.extend(row.iter().map(|w| code((w, &scale)))),
            _ => coded.extend(row.iter().zip(&scales).map(code)),
        }
    }
    let params = match options.weights {
        WeightGrid::PerTensor => QuantParams::per_tensor(scales[0], 0),
        WeightGrid::PerAxis => {
            let zeros = vec![0; scales.len()];
            QuantParams::per_axis(QMatMulToFloat::CHANNEL_AXIS, scales, zeros)
        }
    };
    Ok((coded, params?))
}

/// The codes, scales and zero points of a product's first operand.
fn quantized(graph: &mut Graph, node: NodeId, made: &mut Made) -> Result<[ValueId; 3], PassError> {
    let x = graph.operand(node, 0);
    if let Some(&quantized) = made.activations.get(&x) {
        return Ok(quantized);
    }
    let axis = graph.shape(x).rank() - 1;
    let name = format!("{}_{}_rows", graph.node(x.node).name, x.port);
    let quantize = graph.add(&name, DynamicQuantize { axis }, &[x])?;
    let quantized = [0, 1, 2].map(|port| quantize.port(port));
    made.activations.insert(x, quantized);
    Ok(quantized)
}

/// Puts the product of codes in the place of a product of floats.
fn put(graph: &mut Graph, node: NodeId, product: &MatMul, operands: [ValueId; 4]) -> Result<(), PassError> {
    let MatMul { bias, residual, clamp } = *product;
    let extras = graph.operands(node).split_off(2);
    let operands: Vec<ValueId> = operands.into_iter().chain(extras).collect();
    let to = ToFloat { grids: true, bias, residual, clamp };
    graph.rewrite(node, QMatMulToFloat { to }, &operands)?;
    graph.remove_dead();
    Ok(())
}
