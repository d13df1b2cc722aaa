//! One spelling for each computation: ops that do nothing go, chains of moves merge, spatial means are pools,
//! one-dimensional windows are two-dimensional ones of height 1, compositions with a name get it.

mod powers;
mod rows;

use crate::{
    Context, Pass, PassError, Record,
    edit::{add_f32, f32_constant, f32_scalar, keeps_order, live_op, replace},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, Shape, ValueId,
    ops::{
        Binary, BinaryKind, Cast, Clamp, Conv, Expand, FakeQuant, Layout, MatMul, Pad, Pool, PoolKind,
        Reduce, ReduceKind, Reshape, Slice, SliceSpec, Transpose, Unary, UnaryKind, Window,
    },
};

/// See the module.
pub(crate) const CANONICALISE: Pass = Pass { name: "canonicalise", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        // Producers come first, so that one sweep sees chains already merged above.
        if live_op(graph, node).is_none() || ctx.options.pin(graph, node).is_some() {
            continue;
        }
        let name = graph.node(node).name.clone();
        let mut did = Vec::new();
        // Merging may leave an op that does nothing, and a mean made a pool may have one dimension.
        for rule in RULES {
            did.extend(rule(graph, node)?);
        }
        if let Some(x) = no_op(graph, node) {
            did.push("does nothing");
            replace(graph, node, x)?;
        }
        if !did.is_empty() {
            graph.remove_dead();
            record.applied(&name, did.join(", "));
        }
    }
    Ok(())
}

/// What a rule did, if it applied.
type Did = Option<&'static str>;

type Rule = fn(&mut Graph, NodeId) -> Result<Did, PassError>;

const RULES: [Rule; 8] = [
    merge_moves,
    rows::rows,
    cast_before_expand,
    name_compositions,
    gelu,
    mean_to_pool,
    widen,
    float_product,
];

/// The operand that the node's result equals, if the node does nothing.
fn no_op(graph: &Graph, node: NodeId) -> Option<ValueId> {
    let operands = graph.operands(node);
    let x = *operands.first()?;
    let ty = graph.ty(x);
    let idle = match graph.op(node)? {
        Op::Unary(Unary { kind: UnaryKind::Identity }) => true,
        Op::Unary(Unary { kind: UnaryKind::Clip { lo, hi } }) => (Clamp { lo: *lo, hi: *hi }).is_none(),
        Op::Reshape(Reshape { shape }) | Op::Expand(Expand { shape }) => *shape == ty.shape,
        Op::Transpose(Transpose { perm }) => perm.is_sorted(),
        Op::Cast(Cast { to }) => *to == ty.dtype,
        Op::Concat(_) => operands.len() == 1,
        Op::Pad(Pad { before, after, .. }) => before.iter().chain(after).all(|&p| p == 0),
        Op::Slice(Slice { axes }) => axes.iter().zip(ty.shape.iter()).all(|(s, &d)| {
            let all = SliceSpec::all(d);
            (s.start, s.len) == (all.start, all.len) && (s.step == 1 || d <= 1)
        }),
        Op::Pool(Pool { window, .. }) => {
            window.is_unpadded() && window.kernel.iter().chain(&window.strides).all(|&n| n == 1)
        }
        Op::Reduce(Reduce { kind, axes, .. }) => {
            use ReduceKind::*;
            axes.is_empty() && matches!(kind, Sum | Mean | Max | Min | Product)
        }
        _ => false,
    };
    idle.then_some(x)
}

/// A reshape of a reshape, a transpose of a transpose; a transpose that only moves axes of length 1 is a reshape.
fn merge_moves(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let x = match graph.op(node) {
        Some(Op::Transpose(_) | Op::Reshape(_)) => graph.operand(node, 0),
        _ => return Ok(None),
    };
    let mut did = None;
    if let (Some(Op::Transpose(outer)), Some(Op::Transpose(inner))) = (graph.op(node), graph.op(x.node)) {
        let perm = outer.perm.iter().map(|&p| inner.perm[p]).collect();
        let source = graph.operand(x.node, 0);
        graph.rewrite(node, Transpose { perm }, &[source])?;
        did = Some("merged with the transpose before it");
    }
    let x = graph.operand(node, 0);
    if let Some(Op::Transpose(t)) = graph.op(node)
        && !t.perm.is_sorted()
        && keeps_order(graph.shape(x), &t.perm)
    {
        let shape = graph.shape(node.out()).clone();
        graph.set_op(node, Reshape { shape })?;
        did = Some("a transpose that keeps the order of elements is a reshape");
    }
    if let (Some(Op::Reshape(outer)), Some(Op::Reshape(_))) = (graph.op(node), graph.op(x.node)) {
        let outer = outer.clone();
        let source = graph.operand(x.node, 0);
        graph.rewrite(node, outer, &[source])?;
        did = Some("merged with the reshape before it");
    }
    Ok(did)
}

/// A conversion of what was broadcast is one of what was not yet: of fewer elements.
fn cast_before_expand(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let Some(Op::Cast(cast)) = graph.op(node) else { return Ok(None) };
    let (cast, wide) = (cast.clone(), graph.operand(node, 0));
    let Some(Op::Expand(expand)) = graph.op(wide.node) else { return Ok(None) };
    let (expand, narrow) = (expand.clone(), graph.operand(wide.node, 0));
    let name = format!("{}_converted", graph.node(wide.node).name);
    let converted = graph.add(&name, cast, &[narrow])?;
    graph.rewrite(node, expand, &[converted.out()])?;
    Ok(Some("converts before it is broadcast"))
}

/// A product of integers that becomes floats at once is one of floats: they hold codes less their zero points exactly, and
/// sums of up to 2^24; larger ones are rounded now and then, as the conversion of the whole sum would be.
fn float_product(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let Some(Op::Cast(Cast { to: DType::F32 })) = graph.op(node) else { return Ok(None) };
    let sums = graph.operand(node, 0);
    if graph.ty(sums).dtype != DType::S32 {
        return Ok(None);
    }
    if let Some(Op::Binary(Binary { kind: BinaryKind::Add })) = graph.op(sums.node) {
        return float_bias(graph, node, sums);
    }
    let product: Op = match graph.op(sums.node) {
        Some(Op::PlainMatMul(_)) => MatMul { bias: false, residual: false, clamp: Clamp::NONE }.into(),
        Some(Op::IntConv(c)) => Conv {
            window: c.window.clone(),
            groups: c.groups,
            layout: Layout::ChannelsFirst,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
        }
        .into(),
        _ => return Ok(None),
    };
    let mut operands = graph.operands(sums.node);
    if !operands.iter().all(|v| is_of_few_bits(graph, *v)) {
        return Ok(None);
    }
    for v in &mut operands {
        *v = as_numbers(graph, *v)?;
    }
    graph.rewrite(node, product, &operands)?;
    Ok(Some("a product of integers that becomes floats is one of floats"))
}

/// A bias that is added to such a product before the sum becomes floats is added behind it.
fn float_bias(graph: &mut Graph, node: NodeId, sums: ValueId) -> Result<Did, PassError> {
    let operands = graph.operands(sums.node);
    let is_product = |v: &ValueId| {
        matches!(graph.op(v.node), Some(Op::PlainMatMul(_) | Op::IntConv(_)))
            && graph.shape(*v) == graph.shape(sums)
            && graph.operands(v.node).iter().all(|v| is_of_few_bits(graph, *v))
    };
    if !operands.iter().any(is_product) {
        return Ok(None);
    }
    let mut numbers = Vec::new();
    for (i, v) in operands.into_iter().enumerate() {
        let name = format!("{}_numbers{i}", graph.node(sums.node).name);
        numbers.push(graph.add(&name, Cast { to: DType::F32 }, &[v])?.out());
    }
    graph.rewrite(node, Binary { kind: BinaryKind::Add }, &numbers)?;
    for v in numbers {
        float_product(graph, v.node)?;
    }
    Ok(Some("a bias of integers is added to a product as floats"))
}

/// Whether these are codes of 8 bits, or such less a zero point.
fn is_of_few_bits(graph: &Graph, value: ValueId) -> bool {
    if let Some(tensor) = graph.constant_value(value) {
        return tensor.to_i64().is_some_and(|v| v.iter().all(|q| q.abs() < 1 << 9));
    }
    let operands = graph.operands(value.node);
    match graph.op(value.node) {
        Some(Op::Cast(_)) => {
            let from = graph.ty(operands[0]).dtype;
            from.is_integer() && from.size() == 1
        }
        Some(Op::Binary(Binary { kind: BinaryKind::Sub })) => {
            operands.iter().all(|v| is_of_few_bits(graph, *v))
        }
        Some(Op::Reshape(_)) => is_of_few_bits(graph, operands[0]),
        _ => false,
    }
}

/// Integers [of a few bits](is_of_few_bits) as f32: without a way through integers where they were whole floats before, as codes are that a
/// model makes when it runs.
fn as_numbers(graph: &mut Graph, value: ValueId) -> Result<ValueId, PassError> {
    let name = format!("{}_numbers", graph.node(value.node).name);
    let is_narrow = |v: ValueId| graph.ty(v).dtype.is_integer() && graph.ty(v).dtype.size() == 1;
    match graph.op(value.node).cloned() {
        Some(Op::Cast(_)) => {
            let x = graph.operand(value.node, 0);
            if is_narrow(x) && graph.ty(value).dtype == DType::S32 {
                return as_numbers(graph, x);
            }
            if graph.ty(x).dtype == DType::F32 && is_narrow(value) && is_code(graph, x, graph.ty(value).dtype)
            {
                return Ok(x);
            }
        }
        Some(Op::Reshape(r)) => {
            let x = graph.operand(value.node, 0);
            let x = as_numbers(graph, x)?;
            return Ok(graph.add(&name, r, &[x])?.out());
        }
        Some(Op::Binary(Binary { kind: BinaryKind::Sub })) if graph.ty(value).dtype == DType::S32 => {
            let operands = graph.operands(value.node);
            let a = as_numbers(graph, operands[0])?;
            let b = as_numbers(graph, operands[1])?;
            return Ok(graph.add(&name, Binary { kind: BinaryKind::Sub }, &[a, b])?.out());
        }
        _ => {}
    }
    Ok(graph.add(&name, Cast { to: DType::F32 }, &[value])?.out())
}

/// Whether all these numbers, but for NaN, are whole and within the range of a type.
fn is_code(graph: &Graph, value: ValueId, dtype: DType) -> bool {
    let within = |lo: f32, hi: f32| {
        dtype.integer_range().is_some_and(|(least, most)| lo >= least as f32 && hi <= most as f32)
    };
    let x = || graph.operand(value.node, 0);
    match graph.op(value.node) {
        Some(Op::Unary(Unary { kind: UnaryKind::Clip { lo, hi } })) => {
            within(*lo, *hi) && lo.fract() == 0.0 && hi.fract() == 0.0 && is_whole(graph, x())
        }
        Some(Op::Unary(Unary { kind: UnaryKind::Round })) => match graph.op(x().node) {
            Some(Op::Unary(Unary { kind: UnaryKind::Clip { lo, hi } })) => within(*lo, *hi),
            _ => false,
        },
        _ => false,
    }
}

/// Whether all these numbers, but for NaN and infinities, are whole.
fn is_whole(graph: &Graph, value: ValueId) -> bool {
    let operands = graph.operands(value.node);
    match graph.op(value.node) {
        Some(Op::Unary(Unary { kind: UnaryKind::Round })) => true,
        Some(Op::Binary(Binary { kind: BinaryKind::Add })) => operands.iter().all(|v| is_whole(graph, *v)),
        Some(Op::Reshape(_)) => is_whole(graph, operands[0]),
        Some(Op::Cast(_)) => graph.ty(operands[0]).dtype.is_integer(),
        _ => false,
    }
}

/// max(x, c) and min(x, c) are clips, x/c is x·(1/c), x² is x·x ([`powers`]), x·sigmoid(x) is SiLU, x·hardsigmoid(x) is hard-swish;
/// and [`gelu`].
fn name_compositions(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let Some(Op::Binary(Binary { kind })) = graph.op(node).cloned() else {
        return Ok(None);
    };
    let [a, b] = graph.operands(node)[..] else {
        return Ok(None);
    };
    let commutes = matches!(kind, BinaryKind::Max | BinaryKind::Min | BinaryKind::Mul);
    let sides = if commutes { vec![(a, b), (b, a)] } else { vec![(a, b)] };
    for (x, other) in sides {
        let same_shape = graph.shape(node.out()) == graph.shape(x);
        if graph.ty(x).dtype != DType::F32 || !same_shape {
            continue;
        }
        if let (BinaryKind::Max | BinaryKind::Min, Some(c)) = (kind, f32_scalar(graph, other))
            && !c.is_nan()
        {
            let kind = match kind {
                BinaryKind::Max if c == 0.0 => UnaryKind::Relu,
                BinaryKind::Max => UnaryKind::Clip { lo: c, hi: f32::INFINITY },
                _ => UnaryKind::Clip { lo: f32::NEG_INFINITY, hi: c },
            };
            graph.rewrite(node, Unary { kind }, &[x])?;
            return Ok(Some("a maximum or minimum with a constant is a clip"));
        }
        if kind == BinaryKind::Div
            && let Some(c) = f32_constant(graph, other).filter(|c| c.iter().all(|c| c.recip().is_normal()))
        {
            let reciprocals = c.iter().map(|c| c.recip()).collect();
            let dims = graph.shape(other).clone();
            let name = format!("{}_reciprocal", graph.node(other.node).name);
            let r = add_f32(graph, &name, &dims, reciprocals)?;
            graph.rewrite(node, Binary { kind: BinaryKind::Mul }, &[x, r])?;
            return Ok(Some("a division by constants is a multiplication"));
        }
        if kind == BinaryKind::Pow
            && let Some(exponent) = f32_scalar(graph, other)
            && let Some(did) = powers::power(graph, node, x, exponent)?
        {
            return Ok(Some(did));
        }
        if let (BinaryKind::Mul, Some(Op::Unary(u))) = (kind, graph.op(other.node))
            && graph.operand(other.node, 0) == x
        {
            let kind = match u.kind {
                UnaryKind::Sigmoid => UnaryKind::Silu,
                UnaryKind::HardSigmoid { alpha, beta } if alpha == 1.0 / 6.0 && beta == 0.5 => {
                    UnaryKind::HardSwish
                }
                _ => continue,
            };
            graph.rewrite(node, Unary { kind }, &[x])?;
            return Ok(Some("x times its sigmoid is one function"));
        }
    }
    Ok(None)
}

/// ½·x·(1 + erf(x/√2)), in whatever order its three factors are multiplied.
fn gelu(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let mut factors = Vec::new();
    collect_factors(graph, node.out(), &mut factors, 3);
    let half = factors.iter().position(|&f| f32_scalar(graph, f) == Some(0.5));
    let Some(half) = half.filter(|_| factors.len() == 3) else { return Ok(None) };
    factors.remove(half);
    for [x, bell] in [[factors[0], factors[1]], [factors[1], factors[0]]] {
        let same_type = graph.ty(x) == graph.ty(node.out()) && graph.ty(x).dtype == DType::F32;
        if same_type && is_one_plus_erf(graph, bell, x) {
            graph.rewrite(node, Unary { kind: UnaryKind::Gelu }, &[x])?;
            return Ok(Some("½·x·(1 + erf(x/√2)) is one function"));
        }
    }
    Ok(None)
}

/// The factors of a product, at most so many of them; those of its operands where nothing else uses these.
fn collect_factors(graph: &Graph, value: ValueId, factors: &mut Vec<ValueId>, most: usize) {
    for operand in binary_operands(graph, value, BinaryKind::Mul).into_iter().flatten() {
        let is_product = binary_operands(graph, operand, BinaryKind::Mul).is_some();
        if factors.len() < most && is_product && graph.sole_use(operand).is_some() {
            collect_factors(graph, operand, factors, most);
        } else {
            factors.push(operand);
        }
    }
}

/// The operands of a sum, product or the like.
fn binary_operands(graph: &Graph, value: ValueId, kind: BinaryKind) -> Option<[ValueId; 2]> {
    match graph.op(value.node)? {
        Op::Binary(b) if b.kind == kind => graph.operands(value.node).try_into().ok(),
        _ => None,
    }
}

/// Whether a value is 1 + erf(x·c) with c = 1/√2, to the last digits of f32.
fn is_one_plus_erf(graph: &Graph, value: ValueId, x: ValueId) -> bool {
    let Some([a, b]) = binary_operands(graph, value, BinaryKind::Add) else { return false };
    let erf = match [a, b].map(|v| f32_scalar(graph, v)) {
        [Some(1.0), None] => b,
        [None, Some(1.0)] => a,
        _ => return false,
    };
    if !matches!(graph.op(erf.node), Some(Op::Unary(Unary { kind: UnaryKind::Erf }))) {
        return false;
    }
    let scaled = graph.operand(erf.node, 0);
    let Some(factors) = binary_operands(graph, scaled, BinaryKind::Mul) else { return false };
    let is_root = |v: ValueId| {
        f32_scalar(graph, v).is_some_and(|c| (c / std::f32::consts::FRAC_1_SQRT_2 - 1.0).abs() < 1e-6)
    };
    match factors {
        [a, b] if a == x => is_root(b),
        [a, b] if b == x => is_root(a),
        _ => false,
    }
}

/// A mean over exactly the spatial axes, channels first or last, is an average pool over all of them. One over the last
/// of three axes that keeps it is not: it is the mean of a token, in a layer normalisation, and not of a channel.
fn mean_to_pool(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let Some(Op::Reduce(Reduce { kind: ReduceKind::Mean, axes, keep_dims })) = graph.op(node).cloned() else {
        return Ok(None);
    };
    let x = graph.operand(node, 0);
    let ty = graph.ty(x);
    let rank = ty.shape.rank();
    if keep_dims && rank == 3 && axes == [2] {
        return Ok(None);
    }
    let spatial = |layout: Layout| (1..rank).filter(move |&d| d != layout.channel_axis(rank));
    let layout = [Layout::ChannelsFirst, Layout::ChannelsLast]
        .into_iter()
        .find(|&l| matches!(rank, 3 | 4) && axes.iter().copied().eq(spatial(l)));
    let (Some(layout), true) = (layout, ty.dtype == DType::F32 && ty.shape.elements() > 0) else {
        return Ok(None);
    };
    let kernel: Vec<usize> = axes.iter().map(|&a| ty.shape[a]).collect();
    let pool = Pool {
        kind: PoolKind::Average { count_include_pad: false },
        window: Window::new(kernel),
        ceil_mode: false,
        layout,
    };
    let shape = graph.shape(node.out()).clone();
    let name = graph.node(node).name.clone();
    let pooled = graph.add(&name, pool, &[x])?;
    graph.rewrite(node, Reshape { shape }, &[pooled.out()])?;
    give_name(graph, node, pooled);
    // The pool gets its turn here: it is not in the sweep's list.
    widen(graph, pooled)?;
    merge_moves(graph, node)?;
    Ok(Some("a mean over the spatial axes is an average pool"))
}

/// A convolution or pool over one spatial dimension becomes one over two, the first of extent 1.
fn widen(graph: &mut Graph, node: NodeId) -> Result<Did, PassError> {
    let op = graph.op(node).cloned();
    let (layout, window) = match &op {
        Some(Op::Conv(c)) => (c.layout, c.window.clone()),
        Some(Op::Pool(p)) => (p.layout, p.window.clone()),
        _ => return Ok(None),
    };
    if window.rank() != 1 || graph.ty(node.out()).dtype != DType::F32 {
        return Ok(None);
    }
    let window = window.with_leading_dimension();
    let name = graph.node(node).name.clone();
    let narrow = graph.shape(node.out()).clone();
    let spatial = 3 - layout.channel_axis(3);
    let mut operands = graph.operands(node);
    let has_bias = matches!(&op, Some(Op::Conv(c)) if c.bias);
    for (slot, v) in operands.iter_mut().enumerate() {
        let at = match slot {
            1 => 2,
            2 if has_bias => continue,
            _ => spatial,
        };
        let mut dims = graph.shape(*v).to_vec();
        dims.insert(at, 1);
        let reshape = reshape_to(&name, dims)?;
        // Weights that are rounded stay so, as a constant and its rounding.
        if let Some(Op::FakeQuant(f)) = graph.op(v.node).cloned()
            && slot == 1
        {
            let source = graph.operand(v.node, 0);
            let source = graph.add(&format!("{}_2d", graph.node(source.node).name), reshape, &[source])?;
            let params = f.params.axis().map_or_else(
                || f.params.clone(),
                |axis| f.params.on_axis(if axis < at { axis } else { axis + 1 }),
            );
            let rounded = FakeQuant { params, ..f };
            *v = graph.add(&format!("{}_2d", graph.node(v.node).name), rounded, &[source.out()])?.out();
            continue;
        }
        *v = graph.add(&format!("{}_2d", graph.node(v.node).name), reshape, &[*v])?.out();
        merge_moves(graph, v.node)?;
        *v = no_op(graph, v.node).unwrap_or(*v);
    }
    let wide: Op = match op {
        Some(Op::Conv(c)) => Conv { window, ..c }.into(),
        Some(Op::Pool(p)) => Pool { window, ..p }.into(),
        _ => return Ok(None),
    };
    let result = graph.add(&name, wide, &operands)?;
    graph.rewrite(node, Reshape { shape: narrow }, &[result.out()])?;
    give_name(graph, node, result);
    Ok(Some("a window over one dimension is one over two"))
}

/// Lets the node that now does the work have the name, and the reshape behind it another.
fn give_name(graph: &mut Graph, reshape: NodeId, worker: NodeId) {
    let name = graph.node(reshape).name.clone();
    graph.rename(reshape, &format!("{name}_shape"));
    graph.rename(worker, &name);
}

fn reshape_to(node: &str, dims: Vec<usize>) -> Result<Reshape, PassError> {
    let shape = Shape::new(dims).map_err(|e| PassError::op(node, "Reshape", OpError::from(e)))?;
    Ok(Reshape { shape })
}
