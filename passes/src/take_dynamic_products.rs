//! Products of integers that are scaled to floats, as files hold dynamic quantization, become products of codes with float
//! results: MatMulInteger or ConvInteger, its conversion, the product with the scales and the sum with a bias are one op.
//!
//! The bits of the result stay the same: integers are exact, and the float operations those of the file in its order.

use crate::{
    Context, Pass, PassError, Record,
    edit::{f32_constant, live_op},
    weight_parts::{self, WeightParts},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::WeightSums,
    ops::{Binary, BinaryKind, Cast, IntConv, Layout, QConvToFloat, QMatMulToFloat, Reshape, ToFloat},
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
                let is_product = matches!(graph.op(sums.node)?, Op::PlainMatMul(_) | Op::IntConv(_));
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

/// Which product it is.
enum Kind {
    MatMul,
    Conv(IntConv),
}

impl Kind {
    fn of(graph: &Graph, product: NodeId) -> Kind {
        match graph.op(product) {
            Some(Op::IntConv(c)) => Kind::Conv(c.clone()),
            _ => Kind::MatMul,
        }
    }

    /// The axis of the weights that the output channels are along, and that of the inputs.
    fn weight_axes(&self) -> (usize, usize) {
        match self {
            Kind::MatMul => (QMatMulToFloat::CHANNEL_AXIS, 0),
            Kind::Conv(_) => (QConvToFloat::CHANNEL_AXIS, 1),
        }
    }

    /// The axis of codes and results of this rank that holds channels.
    fn channel_axis(&self, rank: usize) -> usize {
        match self {
            Kind::MatMul => rank - 1,
            Kind::Conv(_) => Layout::ChannelsFirst.channel_axis(rank),
        }
    }

    /// Fails for weights that no such op takes.
    fn check(&self, weights: &Tensor) -> Result<(), String> {
        match self {
            _ if weights.shape().elements() == 0 => Err("its weights are empty".into()),
            Kind::MatMul if weights.shape().rank() != 2 => {
                Err("its second operand is no single matrix".into())
            }
            Kind::Conv(c) if !(1..=2).contains(&c.window.rank()) => {
                Err(format!("it has {} spatial dimensions", c.window.rank()))
            }
            _ => Ok(()),
        }
    }
}

/// What a product of codes is made of.
struct Found {
    kind: Kind,
    codes: ValueId,
    /// `None` of codes without a zero point.
    zero_point: Option<ValueId>,
    /// `None` where all scales are known.
    scale: Option<ValueId>,
    weights: Tensor,
    /// Channels of the codes that are multiplied twice, by two parts of weights of more than 8 bits.
    twice: Vec<i64>,
    params: QuantParams,
}

impl Found {
    fn in_graph(graph: &Graph, scaled: &Scaled) -> Result<Found, String> {
        let kind = Kind::of(graph, scaled.product);
        let [a, b] = [0, 1].map(|slot| graph.operand(scaled.product, slot));
        let (codes, zero_point) = codes_of(graph, a)?;
        if let Some(zero) = zero_point {
            check_grids(graph, &kind, zero, codes, "zero points")?;
        }
        let weights = integers(graph, b, 0).ok_or("its second operand is computed at run time")?;
        kind.check(&weights)?;
        let (out, inner) = kind.weight_axes();
        let channels = weights.shape()[out];
        // Zero points are taken off already.
        let plain = QuantParams::per_tensor(1.0, 0).map_err(|e| e.to_string())?;
        let parts = WeightParts::of(&weights, &plain, inner).map_err(|e| e.to_string())?;
        let WeightParts { weights, twice } =
            parts.ok_or("its weights less their zero points leave two times the range of s8")?;
        if let Kind::Conv(IntConv { groups: 2.., .. }) = kind
            && !twice.is_empty()
        {
            return Err("its weights less their zero points leave the range of s8, and it has groups".into());
        }
        let (scale, scales) = scales_of(graph, &kind, graph.shape(scaled.product.out()), scaled.factor)?;
        if let Some(scale) = scale {
            check_grids(graph, &kind, scale, codes, "scales")?;
        }
        let params = match scales[..] {
            [scale] => QuantParams::per_tensor(scale, 0),
            _ if scales.len() == channels => {
                let zeros = vec![0; scales.len()];
                QuantParams::per_axis(out, scales, zeros)
            }
            _ => return Err(format!("{} scales of {channels} channels", scales.len())),
        };
        let params = params.map_err(|e| e.to_string())?;
        let ty = TensorType::quantized(DType::S8, weights.shape().clone(), params.clone());
        let sums = WeightSums::by_channel(&weights, out).map_err(|e| e.to_string())?;
        let checked = ty.and_then(|ty| ToFloat::plain(true).dequantizer(&ty, &sums, None));
        checked.map_err(|e| e.to_string())?;
        Ok(Found { kind, codes, zero_point, scale, weights, twice, params })
    }

    /// Puts the op in the place of the scaled sums, and of the sum with a bias behind it; says what it took in.
    fn put(self, graph: &mut Graph, node: NodeId) -> Result<&'static str, PassError> {
        let name = graph.node(node).name.clone();
        let scalar =
            |tensor: Tensor, part: &str, graph: &mut Graph| graph.constant(&format!("{name}_{part}"), tensor);
        let scale = self.scale.unwrap_or_else(|| scalar(Tensor::scalar(1f32), "scale", graph));
        let zero = self.zero_point.unwrap_or_else(|| scalar(Tensor::scalar(0i32), "zero", graph));
        let axis = self.kind.channel_axis(graph.shape(self.codes).rank());
        let codes = weight_parts::with_channels_again(graph, &name, self.codes, axis, self.twice)?;
        let sum = bias_behind(graph, node, self.kind.channel_axis(graph.shape(node.out()).rank()));
        let bias = sum.map(|(_, bias)| bias);
        let last = sum.map_or(node, |(add, _)| add);
        let to = ToFloat { bias: bias.is_some(), ..ToFloat::plain(true) };
        let put = Put { name: &name, last, to, weights: (self.weights, self.params) };
        let operands = [Some(scale), Some(zero), bias].into_iter().flatten();
        match self.kind {
            Kind::MatMul => put.matrix_product(graph, codes, operands)?,
            Kind::Conv(conv) => put.convolution(graph, conv, codes, operands)?,
        }
        graph.remove_dead();
        Ok(if bias.is_some() { " with a bias" } else { "" })
    }
}

/// What goes into the graph.
struct Put<'a> {
    name: &'a str,
    /// The node that becomes the product.
    last: NodeId,
    to: ToFloat,
    weights: (Tensor, QuantParams),
}

impl Put<'_> {
    fn fail(&self, op: &'static str) -> impl Fn(OpError) -> PassError {
        move |e| PassError::op(self.name, op, e)
    }

    fn weights(&self, graph: &mut Graph, tensor: Tensor) -> Result<ValueId, PassError> {
        let ty = TensorType::quantized(DType::S8, tensor.shape().clone(), self.weights.1.clone());
        let ty = ty.map_err(self.fail("constant"))?;
        Ok(graph.quantized_constant(&format!("{}_weight", self.name), tensor, ty)?)
    }

    fn matrix_product(
        self,
        graph: &mut Graph,
        codes: ValueId,
        further: impl Iterator<Item = ValueId>,
    ) -> Result<(), PassError> {
        let weights = self.weights(graph, self.weights.0.clone())?;
        let operands: Vec<ValueId> = [codes, weights].into_iter().chain(further).collect();
        graph.rewrite(self.last, QMatMulToFloat { to: self.to }, &operands)?;
        Ok(())
    }

    /// A convolution over one dimension is one over two, the first of extent 1.
    fn convolution(
        self,
        graph: &mut Graph,
        IntConv { mut window, groups }: IntConv,
        mut codes: ValueId,
        further: impl Iterator<Item = ValueId>,
    ) -> Result<(), PassError> {
        let result = graph.shape(self.last.out()).clone();
        let mut weights = self.weights.0.clone();
        let is_narrow = window.rank() == 1;
        if is_narrow {
            let fail = self.fail("Reshape");
            let wide = |shape: &Shape| {
                let mut dims = shape.to_vec();
                dims.insert(2, 1);
                Shape::new(dims).map_err(OpError::from)
            };
            let shape = wide(graph.shape(codes)).map_err(&fail)?;
            codes = graph.add(&format!("{}_2d", self.name), Reshape { shape }, &[codes])?.out();
            let shape = wide(weights.shape()).map_err(&fail)?;
            weights = weights.reshaped(shape).map_err(|e| fail(e.into()))?;
            window = window.with_leading_dimension();
        }
        let weights = self.weights(graph, weights)?;
        let op = QConvToFloat { window, groups, layout: Layout::ChannelsFirst, to: self.to };
        let operands: Vec<ValueId> = [codes, weights].into_iter().chain(further).collect();
        if !is_narrow {
            graph.rewrite(self.last, op, &operands)?;
            return Ok(());
        }
        let product = graph.add(&format!("{}_product", self.name), op, &operands)?;
        graph.rewrite(self.last, Reshape { shape: result }, &[product.out()])?;
        Ok(())
    }
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

/// Fails unless there is one of these for all codes, or for each row of those of a matrix product.
fn check_grids(graph: &Graph, kind: &Kind, value: ValueId, codes: ValueId, what: &str) -> Result<(), String> {
    let (own, codes) = (graph.shape(value), graph.shape(codes));
    let mut of_rows = codes.to_vec();
    if let Some(last) = of_rows.last_mut() {
        *last = 1;
    }
    let has_rows = matches!(kind, Kind::MatMul);
    match own.elements() == 1 || has_rows && own.dims() == of_rows {
        true => Ok(()),
        false if has_rows => Err(format!("its {what} {own:?} are neither of rows nor of all of {codes:?}")),
        false => Err(format!("its {what} {own:?} are not one of all")),
    }
}

/// The factor of sums of this shape as scales of the first operand, where they are not known, and those of the channels.
fn scales_of(
    graph: &Graph,
    kind: &Kind,
    sums: &Shape,
    factor: ValueId,
) -> Result<(Option<ValueId>, Vec<f32>), String> {
    let known_scales = |v: ValueId| {
        let elements = f32_constant(graph, through_reshapes(graph, v))?;
        let is_scale = elements.len() == 1 || is_along(graph.shape(v), sums, kind.channel_axis(sums.rank()));
        is_scale.then(|| elements.to_vec())
    };
    if let Some(scales) = known_scales(factor) {
        return Ok((None, scales));
    }
    let unknown = || String::from("the scales of its second operand are computed at run time");
    let Some(Op::Binary(Binary { kind: BinaryKind::Mul })) = graph.op(factor.node) else {
        return Err(unknown());
    };
    let [a, b] = [0, 1].map(|slot| graph.operand(factor.node, slot));
    match (known_scales(a), known_scales(b)) {
        (_, Some(scales)) => Ok((Some(a), scales)),
        (Some(scales), None) => Ok((Some(b), scales)),
        (None, None) => Err(unknown()),
    }
}

/// Whether a tensor of this shape, broadcast to `whole`, has an element for each index of `axis` alone.
fn is_along(shape: &Shape, whole: &Shape, axis: usize) -> bool {
    let behind = whole.rank() - axis;
    shape.rank() >= behind && shape.elements() == whole[axis] && shape[shape.rank() - behind] == whole[axis]
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

/// The sum of a node's result with a constant of each index of `axis`, and that constant as a vector.
fn bias_behind(graph: &mut Graph, node: NodeId, axis: usize) -> Option<(NodeId, ValueId)> {
    let user = graph.sole_use(node.out())?;
    let Some(Op::Binary(Binary { kind: BinaryKind::Add })) = graph.op(user.node) else { return None };
    let other = graph.operands(user.node)[1 - usize::from(user.slot).min(1)];
    let y = graph.shape(node.out());
    // Its constant may lie behind reshapes, which are folded later.
    let constant = through_reshapes(graph, other);
    let is_bias = is_along(graph.shape(other), y, axis)
        && graph.shape(user.node.out()) == y
        && f32_constant(graph, constant).is_some();
    if !is_bias {
        return None;
    }
    if graph.shape(constant).rank() == 1 {
        return Some((user.node, constant));
    }
    let elements = f32_constant(graph, constant)?.to_vec();
    let vector = Tensor::from_vec(Shape::new([elements.len()]).ok()?, elements).ok()?;
    let name = format!("{}_bias", graph.node(user.node).name);
    Some((user.node, graph.constant(&name, vector)))
}
