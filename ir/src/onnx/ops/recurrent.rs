//! Recurrent layers: the products of all inputs by one matrix product, then a recurrence for each direction.

use super::compose::Result;
use crate::{
    DType, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        Activation, Cell, Clamp, DynamicQuantize, MatMul, QMatMulToFloat, Recurrent, SliceSpec, ToFloat,
        UnaryKind,
    },
};

pub(super) fn rnn(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    layer(node, Cell::Rnn)
}

pub(super) fn gru(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let linear_before_reset = node.int("linear_before_reset", 0)? != 0;
    layer(node, Cell::Gru { linear_before_reset })
}

pub(super) fn lstm(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let coupled = node.flag("input_forget", false)?;
    let peepholes = node.optional(7).is_some();
    layer(node, Cell::Lstm { peepholes, coupled })
}

/// What all directions of a layer share.
struct Layer {
    cell: Cell,
    activations: Vec<Activation>,
    clip: Option<f32>,
    directions: usize,
    hidden: usize,
    /// `[steps, sequences, size]`.
    x: ValueId,
    lengths: Option<ValueId>,
    /// Whether the sequences come first in operands and results, rather than the steps.
    sequences_first: bool,
    dtype: DType,
}

/// What multiplies the input and the state of a layer.
enum Matrices {
    /// `[directions, gates, size]` both.
    Numbers { input: ValueId, state: ValueId },
    /// Codes s8, `[size, gates]` for each direction; and those of the input, their scale and zero point, once they are there.
    Codes { input: Vec<ValueId>, state: Vec<ValueId>, x: Option<[ValueId; 3]> },
}

/// Operands of a layer that have a part for each direction.
struct Weights {
    matrices: Matrices,
    bias: Option<ValueId>,
    initial: Option<ValueId>,
    initial_cell: Option<ValueId>,
    peepholes: Option<ValueId>,
}

/// ONNX Runtime's LSTM of weights that are integers, `[directions, size, gates]`. The input of the layer gets a grid, and the
/// state of each sequence before every step. Weights that are no constants or have zero points become numbers, and all else
/// stays as it is.
pub(super) fn dynamic_quantize_lstm(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let coupled = node.flag("input_forget", false)?;
    let peepholes = node.optional(7).is_some();
    let x = node.operand(0, "X")?;
    let matrices = match (node.ty(x).dtype, coded(node, 1, "W", 8)?, coded(node, 2, "R", 10)?) {
        (DType::F32, Some(input), Some(state)) => Matrices::Codes { input, state, x: None },
        _ => Matrices::Numbers {
            input: real_weights(node, 1, "W", 8)?,
            state: real_weights(node, 2, "R", 10)?,
        },
    };
    layer_of(node, Cell::Lstm { peepholes, coupled }, matrices)
}

/// The codes of each direction, `[size, gates]`, if these are constants of s8 around 0.
fn coded(node: &mut Node<'_, '_>, slot: usize, name: &str, scale: usize) -> Result<Option<Vec<ValueId>>> {
    let (Some(codes), Some(scales)) = (node.if_known(slot)?, node.if_known(scale)?) else { return Ok(None) };
    let is_symmetric = match node.if_known(scale + 1)? {
        Some(zeros) => zeros.to_i64().is_some_and(|zeros| zeros.iter().all(|&z| z == 0)),
        None => node.is_left_out(scale + 1),
    };
    let (&[directions, size, gates], Ok(all), Ok(scales)) =
        (codes.shape().dims(), codes.as_slice::<i8>(), scales.as_slice::<f32>())
    else {
        return Ok(None);
    };
    let of_each = scales.len() / directions.max(1);
    if !is_symmetric
        || of_each == 0
        || directions * of_each != scales.len()
        || (of_each != 1 && of_each != gates)
    {
        return Ok(None);
    }
    let mut parts = vec![];
    for (d, scales) in scales.chunks(of_each).enumerate() {
        let params = match scales {
            [scale] => QuantParams::per_tensor(*scale, 0),
            _ => QuantParams::per_axis(QMatMulToFloat::CHANNEL_AXIS, scales.to_vec(), vec![0; gates]),
        };
        let shape = Shape::new([size, gates])?;
        let Ok(ty) = params.and_then(|p| TensorType::quantized(DType::S8, shape.clone(), p)) else {
            return Ok(None);
        };
        let own = &all[d * size * gates..][..size * gates];
        let plain = TensorType::new(DType::S8, shape.clone());
        let part =
            node.computed(&format!("{name}{d}"), &plain, || Ok(Tensor::from_vec(shape, own.to_vec())?))?;
        parts.extend(node.quantized_constant(part, ty)?);
    }
    Ok((parts.len() == directions).then_some(parts))
}

/// (codes − zero point)·scale as `[directions, gates, size]`. Scale and zero point are of a direction, or of each gate's
/// numbers.
fn real_weights(node: &mut Node<'_, '_>, slot: usize, name: &'static str, scale: usize) -> Result<ValueId> {
    let codes = node.operand(slot, name)?;
    let &[directions, _, gates] = node.shape(codes).dims() else {
        return Err(OpError::shape(format!("{name} must have 3 dimensions, got {}", node.ty(codes))).into());
    };
    let spread = |node: &mut Node<'_, '_>, part: &str, v: ValueId| {
        let dims = match node.shape(v).elements() {
            n if n == directions => [directions, 1, 1],
            _ => [directions, 1, gates],
        };
        node.shaped(&format!("{name}_{part}"), dims, v)
    };
    let (zero, scale) = (node.optional(scale + 1), node.operand(scale, "scale")?);
    let mut steps = node.cast_to(&format!("{name}_codes"), DType::S32, codes)?;
    if let Some(zero) = zero {
        let zero = node.cast_to(&format!("{name}_zero"), DType::S32, zero)?;
        let zero = spread(node, "zeros", zero)?;
        steps = node.sub(&format!("{name}_centred"), steps, zero)?;
    }
    let steps = node.cast_to(&format!("{name}_steps"), DType::F32, steps)?;
    let scale = spread(node, "scales", scale)?;
    let numbers = node.mul(&format!("{name}_numbers"), steps, scale)?;
    node.permuted(&format!("{name}_rows"), [0, 2, 1], numbers)
}

fn layer(node: &mut Node<'_, '_>, cell: Cell) -> Result<Vec<ValueId>> {
    let (input, state) = (node.operand(1, "W")?, node.operand(2, "R")?);
    layer_of(node, cell, Matrices::Numbers { input, state })
}

/// A layer of these weights; its other operands are at the places that ONNX gives them.
fn layer_of(node: &mut Node<'_, '_>, cell: Cell, matrices: Matrices) -> Result<Vec<ValueId>> {
    let x = node.operand(0, "X")?;
    let (bias, lengths, initial) = (node.optional(3), node.optional(4), node.optional(5));
    let is_lstm = matches!(cell, Cell::Lstm { .. });
    let initial_cell = if is_lstm { node.optional(6) } else { None };
    let peepholes = if is_lstm { node.optional(7) } else { None };
    node.check_float("X", x)?;
    let own = node.ty(x).dtype;
    let directions: &[bool] = match node.string("direction", "forward")? {
        "forward" => &[false],
        "reverse" => &[true],
        "bidirectional" => &[false, true],
        other => return Err(NodeError::attribute("direction", format!("is {other:?}"))),
    };
    let sequences_first = node.opset() >= 14 && node.flag("layout", false)?;
    let x = node.widened("x", x)?;
    let x = if sequences_first { node.permuted("by_step", [1, 0, 2], x)? } else { x };
    let &[_, sequences, size] = node.shape(x).dims() else {
        return Err(
            OpError::shape(format!("takes steps, sequences and input size, got {}", node.ty(x))).into()
        );
    };
    let (hidden, given) = match &matrices {
        Matrices::Numbers { state, .. } => {
            (node.shape(*state).last().copied().unwrap_or(0), node.ty(*state).to_string())
        }
        Matrices::Codes { state, .. } => {
            let ty = node.ty(state.first().copied().ok_or_else(|| OpError::shape("R has no directions"))?);
            (ty.shape[0], ty.to_string())
        }
    };
    if let Some(declared) = node.count("hidden_size")?.filter(|&n| n != hidden) {
        return Err(NodeError::attribute("hidden_size", format!("is {declared}, but R is {given}")));
    }
    let layer = Layer {
        cell,
        activations: activations(node, cell, directions.len())?,
        clip: clip(node)?,
        directions: directions.len(),
        hidden,
        x,
        lengths,
        sequences_first,
        dtype: node.ty(x).dtype,
    };
    let gates = hidden.checked_mul(cell.gates()).ok_or_else(|| OpError::too_large("the hidden size"))?;
    let matrices = match matrices {
        Matrices::Numbers { input, state } => Matrices::Numbers {
            input: layer.parts(node, "W", input, &[gates, size])?,
            state: layer.parts(node, "R", state, &[gates, hidden])?,
        },
        Matrices::Codes { input, state, .. } => {
            for (name, of, rows) in [("W", &input, size), ("R", &state, hidden)] {
                let ty = node.ty(of[0]);
                if of.len() != directions.len() || ty.shape.dims() != [rows, gates] {
                    let (given, wanted) = (of.len(), directions.len());
                    return Err(OpError::shape(format!(
                        "{name} must be [{wanted}, {rows}, {gates}], got {ty} of {given} directions"
                    ))
                    .into());
                }
            }
            let x = node.emit_parts("x_codes", DynamicQuantize { axis: 0 }, &[x])?;
            Matrices::Codes { input, state, x: Some(x) }
        }
    };
    let weights = Weights {
        matrices,
        bias: layer.optional_parts(node, "B", bias, &[2 * gates])?,
        initial: layer.initial(node, "initial_h", initial, sequences)?,
        initial_cell: layer.initial(node, "initial_c", initial_cell, sequences)?,
        peepholes: layer.optional_parts(node, "P", peepholes, &[3 * hidden])?,
    };
    let mut results = vec![vec![]; 2 + usize::from(is_lstm)];
    for (d, &reverse) in directions.iter().enumerate() {
        for (all, one) in results.iter_mut().zip(layer.direction(node, &weights, d, reverse)?) {
            all.push(one);
        }
    }
    let mut joined = vec![];
    for (name, parts) in ["Y", "Y_h", "Y_c"].into_iter().zip(results) {
        let y = layer.joined(node, name, &parts)?;
        joined.push(node.cast_to(&format!("{name}_narrow"), own, y)?);
    }
    Ok(joined)
}

fn clip(node: &mut Node<'_, '_>) -> Result<Option<f32>> {
    match node.optional_float("clip")? {
        Some(clip) if clip.is_nan() || clip <= 0.0 => {
            Err(NodeError::attribute("clip", format!("is {clip}, not above 0")))
        }
        clip => Ok(clip),
    }
}

impl Layer {
    /// An operand `[directions, …]`, in the type that is computed in.
    fn parts(&self, node: &mut Node<'_, '_>, part: &str, v: ValueId, dims: &[usize]) -> Result<ValueId> {
        let expected = Shape::new([&[self.directions], dims].concat())?;
        if node.shape(v) != expected {
            return Err(OpError::shape(format!("{part} must be [{expected}], got {}", node.ty(v))).into());
        }
        node.cast_to(&format!("{part}_wide"), self.dtype, v)
    }

    fn optional_parts(
        &self,
        node: &mut Node<'_, '_>,
        part: &str,
        v: Option<ValueId>,
        dims: &[usize],
    ) -> Result<Option<ValueId>> {
        v.map(|v| self.parts(node, part, v, dims)).transpose()
    }

    fn initial(
        &self,
        node: &mut Node<'_, '_>,
        part: &str,
        v: Option<ValueId>,
        sequences: usize,
    ) -> Result<Option<ValueId>> {
        let Some(v) = v else { return Ok(None) };
        let by_direction = match self.sequences_first && node.shape(v).rank() == 3 {
            true => node.permuted(&format!("{part}_by_direction"), [1, 0, 2], v)?,
            false => v,
        };
        self.parts(node, part, by_direction, &[sequences, self.hidden]).map(Some)
    }

    /// Direction `d` of an operand.
    fn part(&self, node: &mut Node<'_, '_>, name: &str, v: ValueId, d: usize) -> Result<ValueId> {
        let one = node.sliced(&format!("{name}{d}"), 0, SliceSpec { start: d, len: 1, step: 1 }, v)?;
        let dims = node.shape(one)[1..].to_vec();
        node.shaped(&format!("{name}{d}_part"), dims, one)
    }

    /// Direction `d` of weights, with a column for each number of a gate.
    fn columns(&self, node: &mut Node<'_, '_>, name: &str, v: ValueId, d: usize) -> Result<ValueId> {
        let part = self.part(node, name, v, d)?;
        node.permuted(&format!("{name}{d}_columns"), [1, 0], part)
    }

    /// Results of direction `d`: all states, the last one, and the last cell of an LSTM.
    fn direction(
        &self,
        node: &mut Node<'_, '_>,
        weights: &Weights,
        d: usize,
        reverse: bool,
    ) -> Result<Vec<ValueId>> {
        let (bias, state_bias) = self.biases(node, weights, d)?;
        let (gates, state) = match &weights.matrices {
            Matrices::Numbers { input, state } => {
                let input = self.columns(node, "W", *input, d)?;
                let product = MatMul { bias: bias.is_some(), residual: false, clamp: Clamp::NONE };
                let operands: Vec<ValueId> = [self.x, input].into_iter().chain(bias).collect();
                let gates = node.emit_part(&format!("gates{d}"), product, &operands)?;
                (gates, self.columns(node, "R", *state, d)?)
            }
            Matrices::Codes { input, state, x } => {
                let [x, scale, zero] = x.ok_or_else(|| OpError::quant("an input without codes"))?;
                let to = ToFloat { bias: bias.is_some(), ..ToFloat::plain(true) };
                let operands: Vec<ValueId> = [x, input[d], scale, zero].into_iter().chain(bias).collect();
                (node.emit_part(&format!("gates{d}"), QMatMulToFloat { to }, &operands)?, state[d])
            }
        };
        let mut operands = vec![gates, state, self.start(node, "initial_h", weights.initial, d)?];
        if let Cell::Lstm { .. } = self.cell {
            operands.push(self.start(node, "initial_c", weights.initial_cell, d)?);
        }
        if let Some(peepholes) = weights.peepholes {
            operands.push(self.part(node, "P", peepholes, d)?);
        }
        operands.extend(state_bias);
        operands.extend(self.lengths);
        let count = self.cell.activations();
        let recurrent = Recurrent {
            cell: self.cell,
            activations: self.activations[d * count..(d + 1) * count].to_vec(),
            clip: self.clip,
            reverse,
            lengths: self.lengths.is_some(),
        };
        node.emit_all(recurrent, &operands)
    }

    /// The bias that is added to all gates, and that of the state in the last gate of a GRU where it is not.
    fn biases(
        &self,
        node: &mut Node<'_, '_>,
        weights: &Weights,
        d: usize,
    ) -> Result<(Option<ValueId>, Option<ValueId>)> {
        let (gates, hidden) = (self.cell.gates() * self.hidden, self.hidden);
        let apart = self.cell == Cell::Gru { linear_before_reset: true };
        let Some(both) = weights.bias else {
            let none = if apart { Some(self.zeros(node, "Rb", &[hidden])?) } else { None };
            return Ok((None, none));
        };
        let both = self.part(node, "B", both, d)?;
        let mut cut = |name: &str, start, len| {
            node.sliced(&format!("{name}{d}"), 0, SliceSpec { start, len, step: 1 }, both)
        };
        let (input, state) = (cut("Wb", 0, gates)?, cut("Rb", gates, gates)?);
        if !apart {
            return Ok((Some(node.add(&format!("bias{d}"), input, state)?), None));
        }
        let last = cut("Rb_last", 2 * gates - hidden, hidden)?;
        let others = cut("Rb_others", gates, gates - hidden)?;
        let others = node.padded(&format!("Rb{d}_padded"), 0, hidden, 0.0, others)?;
        Ok((Some(node.add(&format!("bias{d}"), input, others)?), Some(last)))
    }

    /// What direction `d` begins with: 0 where nothing else is given.
    fn start(&self, node: &mut Node<'_, '_>, name: &str, v: Option<ValueId>, d: usize) -> Result<ValueId> {
        match v {
            Some(v) => self.part(node, name, v, d),
            None => {
                let sequences = node.shape(self.x)[1];
                self.zeros(node, name, &[sequences, self.hidden])
            }
        }
    }

    fn zeros(&self, node: &mut Node<'_, '_>, name: &str, dims: &[usize]) -> Result<ValueId> {
        let zero = node.constant_part(&format!("{name}_zero"), Tensor::zeros(self.dtype, Shape::scalar()));
        node.expanded(name, dims, zero)
    }

    /// A result of all directions, of which each is `[…, sequences, hidden]`, in the node's layout.
    fn joined(&self, node: &mut Node<'_, '_>, name: &str, parts: &[ValueId]) -> Result<ValueId> {
        let shape = node.shape(parts[0]);
        let axis = shape.rank() - 2;
        let mut apart = shape.to_vec();
        apart.insert(axis, 1);
        let mut columns = vec![];
        for (d, &part) in parts.iter().enumerate() {
            columns.push(node.shaped(&format!("{name}{d}"), apart.clone(), part)?);
        }
        let y = node.joined(&format!("{name}_directions"), axis, &columns)?;
        match (self.sequences_first, axis) {
            (false, _) => Ok(y),
            (true, 0) => node.permuted(&format!("{name}_by_sequence"), [1, 0, 2], y),
            (true, _) => node.permuted(&format!("{name}_by_sequence"), [2, 0, 1, 3], y),
        }
    }
}

/// The activations of all directions. Parameters are taken from two lists, in order, by those that have them.
fn activations(node: &mut Node<'_, '_>, cell: Cell, directions: usize) -> Result<Vec<Activation>> {
    let count = cell.activations() * directions;
    let defaults: &[&str] = match cell {
        Cell::Rnn => &["Tanh"],
        Cell::Gru { .. } => &["Sigmoid", "Tanh"],
        Cell::Lstm { .. } => &["Sigmoid", "Tanh", "Tanh"],
    };
    let names = node.strings("activations")?;
    let names = names.unwrap_or_else(|| defaults.iter().cycle().take(count).map(|&n| n.to_owned()).collect());
    if names.len() != count {
        return Err(NodeError::attribute("activations", format!("has {} entries, not {count}", names.len())));
    }
    let mut alphas = node.floats("activation_alpha")?.unwrap_or_default().into_iter();
    let mut betas = node.floats("activation_beta")?.unwrap_or_default().into_iter();
    let mut alpha = |default: f32| alphas.next().unwrap_or(default);
    let mut beta = |default: f32| betas.next().unwrap_or(default);
    names
        .iter()
        .map(|name| {
            // ONNX Runtime takes the names in any case.
            Ok(match name.to_ascii_lowercase().as_str() {
                "relu" => Activation::Unary(UnaryKind::Relu),
                "tanh" => Activation::Unary(UnaryKind::Tanh),
                "sigmoid" => Activation::Unary(UnaryKind::Sigmoid),
                "softsign" => Activation::Unary(UnaryKind::Softsign),
                "softplus" => Activation::Unary(UnaryKind::Softplus),
                "leakyrelu" => Activation::Unary(UnaryKind::LeakyRelu { alpha: alpha(0.01) }),
                "elu" => Activation::Unary(UnaryKind::Elu { alpha: alpha(1.0) }),
                "hardsigmoid" => {
                    Activation::Unary(UnaryKind::HardSigmoid { alpha: alpha(0.2), beta: beta(0.5) })
                }
                "thresholdedrelu" => Activation::ThresholdedRelu { alpha: alpha(1.0) },
                "affine" => Activation::Affine { alpha: alpha(1.0), beta: beta(0.0) },
                "scaledtanh" => Activation::ScaledTanh { alpha: alpha(1.0), beta: beta(1.0) },
                _ => {
                    return Err(NodeError::attribute(
                        "activations",
                        format!("has {name:?}, which does not exist"),
                    ));
                }
            })
        })
        .collect()
}
