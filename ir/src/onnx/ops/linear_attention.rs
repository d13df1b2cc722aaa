//! Attention by a state, the convolutions before it, and attention with graphs of the model's own in it.

use super::{attention::split_heads, compose::Result};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{
        NodeError,
        attribute::Attribute,
        body::{Body, NodeDef},
        import::Node,
        splice::{constant, node as def, splice, with},
        tensor,
    },
    ops::{Clamp, Conv, Layout, LinearAttention, SliceSpec, UnaryKind, Window},
};

pub(super) fn linear_attention(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let roles = ["query", "key", "value"];
    let mut operands = Vec::new();
    for (slot, role) in roles.into_iter().enumerate() {
        let x = node.operand(slot, role)?;
        node.check_float(role, x)?;
        operands.push(x);
    }
    let (past, decay, rate) = (node.optional(3), node.optional(4), node.optional(5));
    let q_heads = super::contrib_attention::required_count(node, "q_num_heads")?;
    let kv_heads = super::contrib_attention::required_count(node, "kv_num_heads")?;
    // How much of the sequence is computed at once.
    node.ignore(&["chunk_size"]);
    let (decays, corrects) = match node.string("update_rule", "gated_delta")? {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return Err(NodeError::attribute("update_rule", format!("is {other:?}"))),
    };
    let own = node.ty(operands[0]).dtype;
    let mut heads = Vec::new();
    for ((x, part), count) in operands.into_iter().zip(roles).zip([q_heads, kv_heads, kv_heads]) {
        let x = node.cast_to(&format!("{part}_f32"), DType::F32, x)?;
        heads.push(split_heads(node, &format!("{part}_heads"), x, count)?);
    }
    let (q, k, v) = (node.shape(heads[0]), node.shape(heads[1]), node.shape(heads[2]));
    let scale = match node.float("scale", 0.0)? {
        0.0 => 1.0 / (q[3] as f64).sqrt(),
        scale => scale.into(),
    };
    let scale = node.number("scale", scale, DType::F32)?;
    heads[0] = node.mul("scaled", heads[0], scale)?;
    let state_type = past.map_or(own, |past| node.ty(past).dtype);
    let state = match past {
        Some(past) => node.cast_to("state_f32", DType::F32, past)?,
        None => {
            let zero = node.number("zero", 0.0, DType::F32)?;
            node.expanded("state", [k[0], kv_heads, k[3], v[3]], zero)?
        }
    };
    heads.push(state);
    if decays {
        let decay = decay.ok_or(NodeError::MissingOperand { slot: 4, role: "decay" })?;
        let decay = node.cast_to("decay_f32", DType::F32, decay)?;
        heads.push(split_heads(node, "decay_heads", decay, kv_heads)?);
    }
    if corrects {
        let rate = rate.ok_or(NodeError::MissingOperand { slot: 5, role: "beta" })?;
        heads.push(node.cast_to("beta_f32", DType::F32, rate)?);
    }
    let results = node.emit_all(LinearAttention { decays, corrects }, &heads)?;
    let [y, state] = results[..] else { return Ok(results) };
    let y = node.shaped("tokens", [q[0], q[1], q_heads * v[3]], y)?;
    Ok(vec![node.cast_to("output", own, y)?, node.cast_to("present_state", state_type, state)?])
}

/// A convolution of each channel that sees what came before: the elements of the last call, or zeros, stand in front.
pub(super) fn causal_conv(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let (x, w) = (node.operand(0, "input")?, node.operand(1, "weight")?);
    let (bias, past) = (node.optional(2), node.optional(3));
    let activates = match node.string("activation", "none")? {
        "none" => false,
        "silu" | "swish" => true,
        other => return Err(NodeError::attribute("activation", format!("is {other:?}"))),
    };
    let (&[batch, channels, _], &[_, _, taps]) = (node.shape(x).dims(), node.shape(w).dims()) else {
        return Err(OpError::shape(format!("takes sequences, got {} and {}", node.ty(x), node.ty(w))).into());
    };
    let before = taps.saturating_sub(1);
    let past = match past {
        _ if before == 0 => None,
        Some(past) => Some(past),
        None => {
            let zero = node.number("zero", 0.0, node.ty(x).dtype)?;
            Some(node.expanded("nothing", [batch, channels, before], zero)?)
        }
    };
    let all: Vec<ValueId> = past.into_iter().chain([x]).collect();
    let all = node.joined("all", 2, &all)?;
    let conv = Conv {
        window: Window::new([taps]),
        groups: channels,
        layout: Layout::ChannelsFirst,
        bias: bias.is_some(),
        residual: false,
        clamp: Clamp::NONE,
    };
    let operands: Vec<ValueId> = [all, w].into_iter().chain(bias).collect();
    let mut y = node.step(if activates { "sums" } else { "" }, conv, &operands)?;
    if activates {
        y = node.unary("", UnaryKind::Silu, y)?;
    }
    let length = node.shape(all)[2];
    let kept = SliceSpec { start: length - before, len: before, step: 1 };
    let state = node.sliced("state", 2, kept, all)?;
    Ok(vec![y, state])
}

/// Attention with graphs that change its scores and its probabilities: the nodes that ONNX defines it by, with those of the
/// graphs among them.
pub(super) fn flex_attention(node: &mut Node<'_, '_>) -> Result<Vec<NodeDef>> {
    let names = node.operand_names();
    let &[q, k, v] = &names[..] else {
        return Err(
            OpError::shape(format!("takes query, key and value, got {} operands", names.len())).into()
        );
    };
    let (q_shape, k_shape, v_shape) = (node.shape_of(q)?, node.shape_of(k)?, node.shape_of(v)?);
    let (&[batch, heads, rows, size], &[_, kv_heads, length, _], &[_, _, _, value_size]) =
        (q_shape.dims(), k_shape.dims(), v_shape.dims())
    else {
        return Err(
            OpError::shape(format!("takes 4 dimensions, got {q_shape:?}, {k_shape:?}, {v_shape:?}")).into()
        );
    };
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(OpError::shape(format!("{heads} heads of {kv_heads} keys")).into());
    }
    let own = node.operand(0, "Q").map(|q| node.ty(q).dtype)?;
    let precision = match node.optional_int("softmax_precision")? {
        Some(code) => i32::try_from(code).ok().and_then(|c| tensor::dtype(c).ok()).filter(|d| d.is_float()),
        None if own == DType::F64 => Some(DType::F64),
        None => Some(DType::F32),
    };
    let precision = precision.ok_or_else(|| NodeError::attribute("softmax_precision", "is no float type"))?;
    let scale = node.optional_float("scale")?.map_or_else(|| 1.0 / (size as f64).sqrt(), f64::from);
    let [score, probability] = ["score_mod", "prob_mod"].map(|name| node.optional_graph(name));
    let output = node.result_names().first().copied().unwrap_or_default();
    let prefix = node.splice_prefix();
    let mut steps = Steps { nodes: Vec::new(), prefix: &prefix };
    let factor = super::compose::float_tensor(own, Shape::scalar(), &[scale])?;
    let factor = steps.constant("factor", factor);
    let scaled = steps.add(def("Mul", "scaled", &[q, &factor], "scaled"));
    let group_rows = heads / kv_heads * rows;
    let scaled = steps.reshaped("query", &scaled, &[batch, kv_heads, group_rows, size])?;
    let transposed = with(def("Transpose", "key", &[k], "key"), "perm", Attribute::Ints(vec![0, 1, 3, 2]));
    let key = steps.add(transposed);
    let products = steps.add(def("MatMul", "products", &[&scaled, &key], "products"));
    let scores = steps.reshaped("scores", &products, &[batch, heads, rows, length])?;
    let mut scores = steps.cast("precise", &scores, precision);
    if let Some(body) = score? {
        scores = steps.through("score_mod", body, &scores)?;
    }
    let softmax = def("Softmax", "probabilities", &[&scores], "probabilities");
    let mut shares = steps.add(with(softmax, "axis", Attribute::Int(-1)));
    if let Some(body) = probability? {
        shares = steps.through("prob_mod", body, &shares)?;
    }
    let shares = steps.reshaped("shares", &shares, &[batch, kv_heads, group_rows, length])?;
    let values = steps.cast("values", v, precision);
    let y = steps.add(def("MatMul", "weighted", &[&shares, &values], "weighted"));
    let y = steps.reshaped("heads", &y, &[batch, heads, rows, value_size])?;
    let mut last = def("Cast", output, &[&y], output);
    last = with(last, "to", Attribute::Int(tensor::dtype_code(own).into()));
    steps.nodes.push(last);
    Ok(steps.nodes)
}

/// Nodes that stand for one, with names of their own.
struct Steps<'a> {
    nodes: Vec<NodeDef>,
    prefix: &'a str,
}

impl Steps<'_> {
    /// Adds a node of one result, and answers its name.
    fn add(&mut self, mut node: NodeDef) -> String {
        let name = format!("{}{}", self.prefix, node.name);
        node.outputs = vec![name.clone()];
        node.name = name.clone();
        self.nodes.push(node);
        name
    }

    fn constant(&mut self, name: &str, value: Tensor) -> String {
        self.add(constant(name, value))
    }

    fn reshaped(&mut self, name: &str, x: &str, dims: &[usize]) -> Result<String> {
        let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let shape = Tensor::from_vec(Shape::new([dims.len()])?, dims).map_err(OpError::from)?;
        let shape = self.constant(&format!("{name}_shape"), shape);
        Ok(self.add(def("Reshape", name, &[x, &shape], name)))
    }

    fn cast(&mut self, name: &str, x: &str, to: DType) -> String {
        self.add(with(def("Cast", name, &[x], name), "to", Attribute::Int(tensor::dtype_code(to).into())))
    }

    /// Adds the nodes of a graph of one input and one result.
    fn through(&mut self, name: &str, body: &Body, x: &str) -> Result<String> {
        if body.inputs.len() != 1 || body.outputs.len() != 1 {
            let why = format!("takes {} inputs and has {} results", body.inputs.len(), body.outputs.len());
            return Err(NodeError::attribute(name, why));
        }
        let result = format!("{}{name}_result", self.prefix);
        self.nodes.extend(splice(body, &format!("{}{name}/", self.prefix), &[x], &[&result]));
        Ok(result)
    }
}
