//! Questions and edits that several passes share.

use crate::PassError;
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, Shape, Tensor, ValueId,
    ops::{Clamp, Conv, MatMul, PoolKind, QConvToFloat, QMatMulToFloat, UnaryKind},
};

/// The elements of a constant f32 operand.
pub(crate) fn f32_constant(graph: &Graph, value: ValueId) -> Option<&[f32]> {
    graph.constant_value(value)?.as_slice::<f32>().ok()
}

/// The one number of a constant f32 operand that is a scalar, of any rank.
pub(crate) fn f32_scalar(graph: &Graph, value: ValueId) -> Option<f32> {
    match f32_constant(graph, value)? {
        [x] => Some(*x),
        _ => None,
    }
}

/// Adds a constant of f32 elements.
pub(crate) fn add_f32(
    graph: &mut Graph,
    name: &str,
    dims: &[usize],
    elements: Vec<f32>,
) -> Result<ValueId, PassError> {
    let tensor = Shape::new(dims)
        .map_err(OpError::from)
        .and_then(|shape| Ok(Tensor::from_vec(shape, elements)?))
        .map_err(|e| PassError::op(name, "constant", e))?;
    Ok(graph.constant(name, tensor))
}

/// The bounds of a node that is a ReLU or a clip of f32.
pub(crate) fn clamp_of(graph: &Graph, node: NodeId) -> Option<Clamp> {
    if graph.ty(node.out()).dtype != DType::F32 {
        return None;
    }
    match graph.op(node) {
        Some(Op::Unary(u)) => match u.kind {
            UnaryKind::Relu => Some(Clamp::RELU),
            UnaryKind::Clip { lo, hi } => Some(Clamp { lo, hi }),
            _ => None,
        },
        _ => None,
    }
}

/// A convolution or matrix product, as fusions see it.
#[derive(Clone)]
pub(crate) enum Product {
    Conv(Conv),
    MatMul(MatMul),
}

impl Product {
    /// The node as a product, if it is one.
    pub(crate) fn of(graph: &Graph, node: NodeId) -> Option<Product> {
        match graph.op(node)? {
            Op::Conv(c) => Some(Product::Conv(c.clone())),
            Op::MatMul(m) => Some(Product::MatMul(m.clone())),
            _ => None,
        }
    }

    pub(crate) fn op(self) -> Op {
        match self {
            Product::Conv(c) => c.into(),
            Product::MatMul(m) => m.into(),
        }
    }

    pub(crate) fn bias(&mut self) -> &mut bool {
        match self {
            Product::Conv(c) => &mut c.bias,
            Product::MatMul(m) => &mut m.bias,
        }
    }

    pub(crate) fn residual(&mut self) -> &mut bool {
        match self {
            Product::Conv(c) => &mut c.residual,
            Product::MatMul(m) => &mut m.residual,
        }
    }

    pub(crate) fn clamp(&mut self) -> &mut Clamp {
        match self {
            Product::Conv(c) => &mut c.clamp,
            Product::MatMul(m) => &mut m.clamp,
        }
    }

    /// The axis of input and result (of rank `rank`) that holds channels.
    pub(crate) fn channel_axis(&self, rank: usize) -> usize {
        match self {
            Product::Conv(c) => c.layout.channel_axis(rank),
            Product::MatMul(_) => rank - 1,
        }
    }
}

/// The bias of a product: a constant, possibly behind a fake-quantization.
pub(crate) struct Bias {
    pub(crate) numbers: Vec<f32>,
    /// The node and the slot that read the constant.
    reader: NodeId,
    slot: usize,
}

impl Bias {
    /// That of a node; `None` where it is no product, or has none.
    pub(crate) fn of(graph: &Graph, node: NodeId) -> Option<Bias> {
        let has_bias = *Product::of(graph, node)?.bias();
        let value = graph.operands(node).get(2).copied().filter(|_| has_bias)?;
        let (reader, slot, constant) = match graph.op(value.node) {
            Some(Op::FakeQuant(_)) => (value.node, 0, graph.operand(value.node, 0)),
            _ => (node, 2, value),
        };
        Some(Bias { numbers: f32_constant(graph, constant)?.to_vec(), reader, slot })
    }

    /// Adds a number to each.
    pub(crate) fn shift(
        self,
        graph: &mut Graph,
        node: NodeId,
        shifts: impl IntoIterator<Item = f64>,
    ) -> Result<(), PassError> {
        let shifted: Vec<f32> =
            self.numbers.iter().zip(shifts).map(|(b, s)| (f64::from(*b) + s) as f32).collect();
        let name = format!("{}_corrected", graph.node(node).name);
        let bias = add_f32(graph, &name, &[shifted.len()], shifted)?;
        graph.set_operand(self.reader, self.slot, bias)?;
        Ok(())
    }
}

/// The axis of output channels in the result of a convolution or matrix product with weights; `None` of other nodes.
pub fn product_channels(graph: &Graph, node: NodeId) -> Option<usize> {
    let product = Product::of(graph, node).filter(|_| has_weights(graph, node))?;
    let rank = graph.shape(node.out()).rank();
    (rank > 0).then(|| product.channel_axis(rank))
}

/// What adds a residual and clamps itself: a product of floats, or one of codes whose results are floats.
#[derive(Clone)]
pub(crate) enum Sum {
    Product(Product),
    ConvToFloat(QConvToFloat),
    MatMulToFloat(QMatMulToFloat),
}

impl Sum {
    /// The node as such, if it is one.
    pub(crate) fn of(graph: &Graph, node: NodeId) -> Option<Sum> {
        match graph.op(node)? {
            Op::QConvToFloat(c) => Some(Sum::ConvToFloat(c.clone())),
            Op::QMatMulToFloat(m) => Some(Sum::MatMulToFloat(m.clone())),
            _ => Product::of(graph, node).map(Sum::Product),
        }
    }

    pub(crate) fn op(self) -> Op {
        match self {
            Sum::Product(p) => p.op(),
            Sum::ConvToFloat(c) => c.into(),
            Sum::MatMulToFloat(m) => m.into(),
        }
    }

    pub(crate) fn residual(&mut self) -> &mut bool {
        match self {
            Sum::Product(p) => p.residual(),
            Sum::ConvToFloat(c) => &mut c.to.residual,
            Sum::MatMulToFloat(m) => &mut m.to.residual,
        }
    }

    pub(crate) fn clamp(&mut self) -> &mut Clamp {
        match self {
            Sum::Product(p) => p.clamp(),
            Sum::ConvToFloat(c) => &mut c.to.clamp,
            Sum::MatMulToFloat(m) => &mut m.to.clamp,
        }
    }
}

/// The convolution that alone takes a value as its input, through transposes, so that `axis` of the value is its channel
/// axis; or why there is none.
pub(crate) fn conv_behind(graph: &Graph, mut value: ValueId, mut axis: usize) -> Result<NodeId, String> {
    loop {
        let u = graph.sole_use(value).ok_or("it has several uses")?;
        let name = &graph.node(u.node).name;
        match graph.op(u.node) {
            Some(Op::Transpose(t)) => {
                axis = t.perm.iter().position(|&p| p == axis).unwrap_or(axis);
                value = u.node.out();
            }
            Some(Op::Conv(c)) if u.slot == 0 => {
                let channels = c.layout.channel_axis(graph.shape(value).rank());
                return match axis == channels {
                    true => Ok(u.node),
                    false => Err(format!("`{name}` has its channels on another axis")),
                };
            }
            _ => return Err(format!("`{name}`, which takes it, is no convolution")),
        }
    }
}

/// Whether the node moves or selects elements of its first operand and computes none: every code of the result is a
/// code of the operand (or zero), so on codes it is the same op.
pub(crate) fn is_move(op: &Op) -> bool {
    match op {
        Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Slice(_)
        | Op::Concat(_)
        | Op::Pad(_)
        | Op::Expand(_)
        | Op::Gather(_) => true,
        Op::Pool(p) => p.kind == PoolKind::Max,
        Op::Resample(r) => r.is_pick(),
        _ => false,
    }
}

/// The operands of a node that are activations: not its weights, bias or indices.
pub(crate) fn activations(graph: &Graph, node: NodeId) -> Vec<(usize, ValueId)> {
    let operands = graph.operands(node);
    let slots: Vec<usize> = match graph.op(node) {
        Some(Op::Conv(c)) => std::iter::once(0).chain(c.residual_slot()).collect(),
        Some(Op::MatMul(m)) if has_weights(graph, node) => {
            std::iter::once(0).chain(m.residual_slot()).collect()
        }
        Some(Op::MatMul(m)) => [0, 1].into_iter().chain(m.residual_slot()).collect(),
        Some(Op::Gather(_)) => vec![0],
        Some(_) => (0..operands.len()).collect(),
        None => vec![],
    };
    slots.into_iter().map(|s| (s, operands[s])).collect()
}

/// Whether the second operand of a convolution or matrix product is weights: constant, possibly behind a
/// fake-quantization, and of a matrix product one matrix. Otherwise that of a matrix product is an activation.
pub(crate) fn has_weights(graph: &Graph, node: NodeId) -> bool {
    let Some(&second) = graph.operands(node).get(1) else { return false };
    let source = match graph.op(second.node) {
        Some(Op::FakeQuant(_)) => graph.operand(second.node, 0),
        _ => second,
    };
    match graph.op(node) {
        Some(Op::Conv(_)) => true,
        Some(Op::MatMul(_)) => graph.constant_value(source).is_some() && graph.shape(second).rank() == 2,
        _ => false,
    }
}

/// Whether a transpose by `perm` leaves the row-major order of the elements as it is.
pub(crate) fn keeps_order(shape: &Shape, perm: &[usize]) -> bool {
    perm.iter().filter(|&&p| shape[p] != 1).is_sorted()
}

/// The op of a node in a list that was made before other nodes were removed; `None` where it is gone, or no op.
pub(crate) fn live_op(graph: &Graph, node: NodeId) -> Option<&Op> {
    graph.contains(node).then(|| graph.op(node)).flatten()
}

/// Replaces a node by a value that computes the same, and removes it with all that only it needed.
///
/// At once and not at the end of the pass: a dead consumer would hide that a value has one use.
pub(crate) fn replace(graph: &mut Graph, node: NodeId, value: ValueId) -> Result<(), PassError> {
    graph.replace_all_uses(node.out(), value)?;
    graph.remove_dead();
    Ok(())
}

/// The elements of a tensor in runs that belong to one channel, each with the channel, which is an index of `axis`.
pub fn channel_runs<'a, T>(
    elements: &'a [T],
    shape: &[usize],
    axis: usize,
) -> impl Iterator<Item = (usize, &'a [T])> {
    let inner = shape[axis + 1..].iter().product::<usize>().max(1);
    let block = inner.saturating_mul(shape[axis]).max(1);
    elements.chunks(block).flat_map(move |block| block.chunks(inner).enumerate())
}
