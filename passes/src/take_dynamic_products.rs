//! Products of integers that are scaled to floats, as files hold dynamic quantization, become products of codes with float
//! results: MatMulInteger, its conversion, the product with the scales and the sum with a bias are one op.
//!
//! The bits of the result stay the same: integers are exact, and the float operations those of the file in its order.

use crate::{
    Context, Pass, PassError, Record,
    edit::{f32_constant, live_op},
    weight_parts::WeightParts,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::WeightSums,
    ops::{Binary, BinaryKind, Cast, Clamp, Concat, DynamicMatMul, Gather},
};

/// See the module.
pub(crate) const TAKE_DYNAMIC_PRODUCTS: Pass = Pass { name: "take_dynamic_products", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let is_product = matches!(live_op(graph, node), Some(Op::Binary(Binary { kind: BinaryKind::Mul })));
        let Some(scaled) = Scaled::of(graph, node).filter(|_| is_product) else { continue };
        let name = graph.node(node).name.clone();
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        match Found::in_graph(graph, &scaled) {
            Ok(found) => {
                let with = found.put(graph, node)?;
                record.applied(&name, format!("is a product of codes{with}"));
            }
            Err(why) => record.declined(&name, why),
        }
    }
    Ok(())
}

/// Sums of products of integers as floats, times scales.
struct Scaled {
    /// The product of integers.
    product: NodeId,
    /// What the sums are multiplied by.
    factor: ValueId,
}

impl Scaled {
    fn of(graph: &Graph, node: NodeId) -> Option<Scaled> {
        let [a, b] = graph.operands(node)[..] else { return None };
        let product_of = |v: ValueId| match graph.op(v.node)? {
            Op::Cast(Cast { to: DType::F32 }) => {
                let sums = graph.operand(v.node, 0);
                let is_product = matches!(graph.op(sums.node)?, Op::PlainMatMul(_));
                (is_product && graph.ty(sums).dtype == DType::S32 && graph.sole_use(v).is_some())
                    .then_some(sums.node)
            }
            _ => None,
        };
        match (product_of(a), product_of(b)) {
            (Some(product), _) => Some(Scaled { product, factor: b }),
            (None, Some(product)) => Some(Scaled { product, factor: a }),
            (None, None) => None,
        }
    }
}

/// What a product of codes is made of.
struct Found {
    codes: ValueId,
    /// `None` of codes without a zero point.
    zero_point: Option<ValueId>,
    /// `None` where all scales are known.
    scale: Option<ValueId>,
    weights: Tensor,
    /// Columns of the codes that are multiplied twice, by two parts of weights of more than 8 bits.
    twice: Vec<i64>,
    params: QuantParams,
}

impl Found {
    fn in_graph(graph: &Graph, scaled: &Scaled) -> Result<Found, String> {
        let [a, b] = [0, 1].map(|slot| graph.operand(scaled.product, slot));
        let (codes, zero_point) = codes_of(graph, a)?;
        if let Some(zero) = zero_point {
            check_of_rows(graph, zero, codes, "zero points")?;
        }
        let weights = integers(graph, b, 0).ok_or("its second operand is computed at run time")?;
        let &[_, columns] = weights.shape().dims() else {
            return Err("its second operand is no single matrix".into());
        };
        // Zero points are taken off already.
        let plain = QuantParams::per_tensor(1.0, 0).map_err(|e| e.to_string())?;
        let parts = WeightParts::of(&weights, &plain, 0).map_err(|e| e.to_string())?;
        let WeightParts { weights, twice } =
            parts.ok_or("its weights less their zero points leave two times the range of s8")?;
        let (scale, scales) = scales_of(graph, scaled.factor)?;
        if let Some(scale) = scale {
            check_of_rows(graph, scale, codes, "scales")?;
        }
        let params = match scales[..] {
            [scale] => QuantParams::per_tensor(scale, 0),
            _ if scales.len() == columns => {
                let zeros = vec![0; scales.len()];
                QuantParams::per_axis(DynamicMatMul::CHANNEL_AXIS, scales, zeros)
            }
            _ => return Err(format!("{} scales of {columns} columns", scales.len())),
        };
        let params = params.map_err(|e| e.to_string())?;
        let op = DynamicMatMul { bias: false, residual: false, clamp: Clamp::NONE };
        let ty = TensorType::quantized(DType::S8, weights.shape().clone(), params.clone());
        let sums =
            WeightSums::by_channel(&weights, DynamicMatMul::CHANNEL_AXIS).map_err(|e| e.to_string())?;
        let checked = ty.and_then(|ty| op.dequantizer(&ty, &sums, None));
        checked.map_err(|e| e.to_string())?;
        Ok(Found { codes, zero_point, scale, weights, twice, params })
    }

    /// Puts the op in the place of the scaled sums, and of the sum with a bias behind it; says what it took in.
    fn put(self, graph: &mut Graph, node: NodeId) -> Result<&'static str, PassError> {
        let name = graph.node(node).name.clone();
        let fail = |e: OpError| PassError::op(&name, "DynamicMatMul", e);
        let ty = TensorType::quantized(DType::S8, self.weights.shape().clone(), self.params.clone());
        let weights = graph.quantized_constant(&format!("{name}_weight"), self.weights, ty.map_err(fail)?)?;
        let scalar =
            |tensor: Tensor, part: &str, graph: &mut Graph| graph.constant(&format!("{name}_{part}"), tensor);
        let scale = self.scale.unwrap_or_else(|| scalar(Tensor::scalar(1f32), "scale", graph));
        let zero = self.zero_point.unwrap_or_else(|| scalar(Tensor::scalar(0i32), "zero", graph));
        let codes = with_columns_again(graph, &name, self.codes, self.twice)?;
        let mut operands = vec![codes, weights, scale, zero];
        let sum = bias_behind(graph, node);
        operands.extend(sum.map(|(_, bias)| bias));
        let op = DynamicMatMul { bias: sum.is_some(), residual: false, clamp: Clamp::NONE };
        let last = sum.map_or(node, |(add, _)| add);
        graph.rewrite(last, op, &operands)?;
        graph.remove_dead();
        Ok(if sum.is_some() { " with a bias" } else { "" })
    }
}

/// Codes with some of their columns once more behind them.
fn with_columns_again(
    graph: &mut Graph,
    name: &str,
    codes: ValueId,
    twice: Vec<i64>,
) -> Result<ValueId, PassError> {
    if twice.is_empty() {
        return Ok(codes);
    }
    let axis = graph.shape(codes).rank() - 1;
    let again = match twice.len() == graph.shape(codes)[axis] {
        true => codes,
        false => {
            let indices = Shape::new([twice.len()]).map_err(OpError::from);
            let indices = indices.and_then(|shape| Ok(Tensor::from_vec::<i64>(shape, twice)?));
            let indices = indices.map_err(|e| PassError::op(name, "constant", e))?;
            let indices = graph.constant(&format!("{name}_columns"), indices);
            graph.add(&format!("{name}_again"), Gather { axis }, &[codes, indices])?.out()
        }
    };
    Ok(graph.add(&format!("{name}_twice"), Concat { axis }, &[codes, again])?.out())
}

/// The codes and zero points of an operand: u8 as integers of 32 bits, less their zero points.
fn codes_of(graph: &Graph, a: ValueId) -> Result<(ValueId, Option<ValueId>), String> {
    let codes = |v: ValueId| match graph.op(v.node) {
        Some(Op::Cast(Cast { to: DType::S32 })) => {
            let codes = graph.operand(v.node, 0);
            let ty = graph.ty(codes);
            (ty.dtype == DType::U8 && ty.quant.is_none() && graph.constant_value(codes).is_none())
                .then_some(codes)
        }
        _ => None,
    };
    let found = match graph.op(a.node) {
        Some(Op::Binary(Binary { kind: BinaryKind::Sub })) => {
            let [q, zero] = [0, 1].map(|slot| graph.operand(a.node, slot));
            codes(q).map(|codes| (codes, Some(source_of_zero(graph, zero))))
        }
        _ => codes(a).map(|codes| (codes, None)),
    };
    found.ok_or_else(|| "its first operand is not codes of u8".into())
}

/// Where zero points come from, before they were made u8 and wide again: the result of quantization at run time.
fn source_of_zero(graph: &Graph, zero: ValueId) -> ValueId {
    let mut at = zero;
    loop {
        match graph.op(at.node) {
            Some(Op::Reshape(_) | Op::Cast(_)) => at = graph.operand(at.node, 0),
            Some(Op::DynamicQuantize(_)) if graph.ty(at).dtype == DType::S32 => return at,
            _ => return zero,
        }
    }
}

/// Fails unless there is one of these for each row of the codes or for all.
fn check_of_rows(graph: &Graph, value: ValueId, codes: ValueId, what: &str) -> Result<(), String> {
    let (own, codes) = (graph.shape(value), graph.shape(codes));
    let mut of_rows = codes.to_vec();
    if let Some(last) = of_rows.last_mut() {
        *last = 1;
    }
    match own.elements() == 1 || own.dims() == of_rows {
        true => Ok(()),
        false => Err(format!("its {what} {own:?} are neither of rows nor of all of {codes:?}")),
    }
}

/// The factor of sums as scales of the first operand, where they are not known, and those of the columns.
fn scales_of(graph: &Graph, factor: ValueId) -> Result<(Option<ValueId>, Vec<f32>), String> {
    if let Some(scales) = known_scales(graph, factor) {
        return Ok((None, scales));
    }
    let unknown = || String::from("the scales of its second operand are computed at run time");
    let Some(Op::Binary(Binary { kind: BinaryKind::Mul })) = graph.op(factor.node) else {
        return Err(unknown());
    };
    let [a, b] = [0, 1].map(|slot| graph.operand(factor.node, slot));
    match (known_scales(graph, a), known_scales(graph, b)) {
        (_, Some(scales)) => Ok((Some(a), scales)),
        (Some(scales), None) => Ok((Some(b), scales)),
        (None, None) => Err(unknown()),
    }
}

/// Constant scales of all columns or of each.
fn known_scales(graph: &Graph, value: ValueId) -> Option<Vec<f32>> {
    let constant = through_reshapes(graph, value);
    let shape = graph.shape(value);
    let along_columns = shape.elements() == shape.last().copied().unwrap_or(1);
    f32_constant(graph, constant).filter(|_| along_columns).map(<[f32]>::to_vec)
}

fn through_reshapes(graph: &Graph, mut value: ValueId) -> ValueId {
    while let Some(Op::Reshape(_)) = graph.op(value.node) {
        value = graph.operand(value.node, 0);
    }
    value
}

/// Ops between a constant and the integers that are multiplied: a conversion, a reshape, a difference, a transpose.
const MOST_STEPS: usize = 6;

/// The value as integers, where it is computed from constants.
fn integers(graph: &Graph, value: ValueId, depth: usize) -> Option<Tensor> {
    if let Some(tensor) = graph.constant_value(value) {
        return Some(tensor.clone());
    }
    let op = graph.op(value.node)?;
    let is_known = matches!(op, Op::Cast(_) | Op::Reshape(_) | Op::Transpose(_))
        || matches!(op, Op::Binary(Binary { kind: BinaryKind::Sub }));
    if !is_known || depth == MOST_STEPS {
        return None;
    }
    let operands = graph.operands(value.node);
    let tensors: Vec<Tensor> =
        operands.iter().map(|&v| integers(graph, v, depth + 1)).collect::<Option<_>>()?;
    let types: Vec<&TensorType> = operands.iter().map(|&v| graph.ty(v)).collect();
    let results = op.eval(&tensors.iter().collect::<Vec<_>>(), &types, graph.node(value.node).outputs());
    results.ok()?.into_iter().next()
}

/// The sum of a node's result with a constant of each column, and that constant as a vector.
fn bias_behind(graph: &mut Graph, node: NodeId) -> Option<(NodeId, ValueId)> {
    let user = graph.sole_use(node.out())?;
    let Some(Op::Binary(Binary { kind: BinaryKind::Add })) = graph.op(user.node) else { return None };
    let other = graph.operands(user.node)[1 - usize::from(user.slot).min(1)];
    let y = graph.shape(node.out());
    let columns = *y.last()?;
    let shape = graph.shape(other);
    let is_bias = shape.elements() == columns
        && shape.last() == Some(&columns)
        && graph.shape(user.node.out()) == y
        && f32_constant(graph, other).is_some();
    if !is_bias {
        return None;
    }
    if shape.rank() == 1 {
        return Some((user.node, other));
    }
    let elements = f32_constant(graph, other)?.to_vec();
    let vector = Tensor::from_vec(Shape::new([columns]).ok()?, elements).ok()?;
    let name = format!("{}_bias", graph.node(user.node).name);
    Some((user.node, graph.constant(&name, vector)))
}
