//! y = factor·x + shift for each channel, folded into the weights of a neighbour.

use crate::{
    PassError,
    edit::{Product, add_f32, f32_constant, has_weights},
};
use qcc_ir::{
    Graph, NodeId, Op, Shape, ValueId,
    ops::{Pad, PadMode},
};

/// y = factor\[c\]·x + shift\[c\], c the index on `axis` of a tensor of rank `rank`; one pair for all without an axis.
pub(crate) struct Affine {
    pub(crate) axis: Option<usize>,
    pub(crate) factor: Vec<f64>,
    pub(crate) shift: Vec<f64>,
}

/// Why an affine stays where it is.
pub(crate) type Declined = String;

/// A fold either happened (the name of the op that took it) or was declined.
pub(crate) type Folded = Result<String, Declined>;

impl Affine {
    fn at(&self, c: usize) -> (f64, f64) {
        let i = if self.axis.is_some() { c } else { 0 };
        (self.factor[i], self.shift[i])
    }

    fn scales(&self) -> bool {
        self.factor.iter().any(|&f| f != 1.0)
    }

    fn shifts(&self) -> bool {
        self.shift.iter().any(|&s| s != 0.0)
    }
}

/// The constants of a convolution or matrix product.
pub(crate) struct Parameters {
    product: Product,
    /// Shape of the weights.
    shape: Shape,
    weights: Vec<f32>,
    /// Zeros where the op has none.
    bias: Vec<f32>,
}

impl Parameters {
    pub(crate) fn of(graph: &Graph, node: NodeId) -> Result<Parameters, Declined> {
        let name = &graph.node(node).name;
        let mut product =
            Product::of(graph, node).ok_or_else(|| format!("`{name}` has no weights to take it"))?;
        let operands = graph.operands(node);
        let shape = graph.shape(operands[1]).clone();
        let weights = f32_constant(graph, operands[1])
            .ok_or_else(|| format!("the weights of `{name}` are not constant"))?
            .to_vec();
        let channels = match product {
            Product::Conv(_) => shape[0],
            Product::MatMul(_) if shape.rank() == 2 => shape[1],
            Product::MatMul(_) => return Err(format!("the weights of `{name}` are not a matrix")),
        };
        let bias = if *product.bias() {
            f32_constant(graph, operands[2])
                .ok_or_else(|| format!("the bias of `{name}` is not constant"))?
                .to_vec()
        } else {
            vec![0.0; channels]
        };
        Ok(Parameters { product, shape, weights, bias })
    }

    pub(crate) fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// One for each output channel.
    pub(crate) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// The output channel and the input channel of weight `i`.
    pub(crate) fn channels(&self, i: usize) -> (usize, usize) {
        match &self.product {
            Product::Conv(c) => {
                let taps: usize = self.shape[2..].iter().product();
                let (out, within) = (i / (self.shape[1] * taps), i / taps % self.shape[1]);
                let group = out / (self.shape[0] / c.groups);
                (out, group * self.shape[1] + within)
            }
            Product::MatMul(_) => (i % self.shape[1], i / self.shape[1]),
        }
    }

    /// The op with `weights` (unless they are the old ones) and `bias`, its other operands as they are.
    pub(crate) fn store(
        mut self,
        graph: &mut Graph,
        node: NodeId,
        weights: Option<Vec<f64>>,
        bias: Option<Vec<f64>>,
    ) -> Result<Folded, PassError> {
        let name = graph.node(node).name.clone();
        let narrow = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let (weights, bias) = (weights.map(narrow), bias.map(narrow));
        if weights.iter().chain(&bias).flatten().any(|x| !x.is_finite()) {
            return Ok(Err(format!("the weights of `{name}` would not be finite")));
        }
        let mut operands = graph.operands(node);
        if let Some(w) = weights {
            operands[1] = add_f32(graph, &format!("{name}_weight"), &self.shape, w)?;
        }
        if let Some(b) = bias {
            let b = add_f32(graph, &format!("{name}_bias"), &[b.len()], b)?;
            if std::mem::replace(self.product.bias(), true) {
                operands[2] = b;
            } else {
                operands.insert(2, b);
            }
        }
        graph.rewrite(node, self.product.op(), &operands)?;
        Ok(Ok(name))
    }
}

/// Folds an affine of `x` into the op that computes `x`. The caller then replaces the affine by `x`.
///
/// A factor of a product of two activations becomes one of its first operand, and may pass moves there: attention
/// divides its scores by the root of the length of a head, which the weights of the queries can do.
pub(crate) fn fold_into_producer(
    graph: &mut Graph,
    x: ValueId,
    affine: &Affine,
) -> Result<Folded, PassError> {
    if let (None, false, Some(Op::MatMul(m))) = (affine.axis, affine.shifts(), graph.op(x.node))
        && !has_weights(graph, x.node)
        && !m.bias
        && !m.residual
        && m.clamp.is_none()
        && graph.sole_use(x).is_some()
    {
        let mut first = graph.operand(x.node, 0);
        while let Some(Op::Reshape(_) | Op::Transpose(_)) = graph.op(first.node)
            && graph.sole_use(first).is_some()
        {
            first = graph.operand(first.node, 0);
        }
        return fold_into_producer(graph, first, affine);
    }
    let node = x.node;
    let mut p = match Parameters::of(graph, node) {
        Ok(p) => p,
        Err(why) => return Ok(Err(why)),
    };
    let name = &graph.node(node).name;
    if graph.sole_use(x).is_none() {
        return Ok(Err(format!("the result of `{name}` has other uses")));
    }
    if *p.product.residual() || !p.product.clamp().is_none() {
        return Ok(Err(format!("`{name}` adds a residual or clamps before it")));
    }
    let axis = p.product.channel_axis(graph.shape(x).rank());
    if affine.axis.is_some_and(|a| a != axis) {
        return Ok(Err(format!("it is not per channel of `{name}`")));
    }
    let weights = affine.scales().then(|| {
        let scaled = |(i, &w): (usize, &f32)| f64::from(w) * affine.at(p.channels(i).0).0;
        p.weights.iter().enumerate().map(scaled).collect()
    });
    let moved = |(c, &b): (usize, &f32)| {
        let (factor, shift) = affine.at(c);
        f64::from(b) * factor + shift
    };
    let bias = (*p.product.bias() || affine.shifts()).then(|| p.bias.iter().enumerate().map(moved).collect());
    p.store(graph, node, weights, bias)
}

/// Folds an affine whose result is `y` into the one op that consumes it, through a padding with zeros if `y` is
/// never shifted. The caller then replaces the affine by its operand.
pub(crate) fn fold_into_consumer(
    graph: &mut Graph,
    y: ValueId,
    affine: &Affine,
) -> Result<Folded, PassError> {
    let mut value = y;
    let mut padded = false;
    let consumer = loop {
        let Some(u) = graph.sole_use(value) else {
            return Ok(Err("its result has several uses or is a result of the model".into()));
        };
        match graph.op(u.node) {
            Some(Op::Pad(Pad { mode: PadMode::Constant { value: 0.0 }, .. })) => {
                padded = true;
                value = u.node.out();
            }
            _ if u.slot == 0 => break u.node,
            _ => return Ok(Err(format!("`{}` does not take it as its input", graph.node(u.node).name))),
        }
    };
    let p = match Parameters::of(graph, consumer) {
        Ok(p) => p,
        Err(why) => return Ok(Err(why)),
    };
    let name = &graph.node(consumer).name;
    if let Product::Conv(c) = &p.product {
        padded |= !c.window.is_unpadded();
    }
    if padded && affine.shifts() {
        return Ok(Err(format!("`{name}` sees zeros in its padding, not the shift")));
    }
    let axis = p.product.channel_axis(graph.shape(y).rank());
    if affine.axis.is_some_and(|a| a != axis) {
        return Ok(Err(format!("it is not per input channel of `{name}`")));
    }
    let mut bias: Vec<f64> = p.bias.iter().map(|&b| b.into()).collect();
    let mut weights = Vec::with_capacity(p.weights.len());
    for (i, &w) in p.weights.iter().enumerate() {
        let (out, input) = p.channels(i);
        let (factor, shift) = affine.at(input);
        bias[out] += f64::from(w) * shift;
        weights.push(f64::from(w) * factor);
    }
    p.store(graph, consumer, affine.scales().then_some(weights), affine.shifts().then_some(bias))
}
