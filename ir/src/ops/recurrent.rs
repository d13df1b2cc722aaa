//! Recurrent layers: what is left of them when the product of the input and its weights is taken out.

use super::{
    Operator, QMatMulToFloat, ToFloat, UnaryKind,
    conv::{check_weights, operand},
};
use crate::{
    DType, Element, OpError, Shape, Tensor, TensorType,
    numerics::{Dequantizer, DynamicGrid, WeightSums, math::Real},
};
use serde::{Deserialize, Serialize};

/// The recurrence of a layer, in one direction.
///
/// Operands, with s steps, b sequences, a state of h numbers and G gates:
///
/// | operand | shape | where |
/// |---|---|---|
/// | a: for each step and gate the product of the input and its weights, and the biases | `[s, b, G·h]` | |
/// | R: weights of the state, or s8 codes of them, symmetric, of one scale or one a column | `[h, G·h]` | |
/// | initial state H | `[b, h]` | |
/// | initial cell C | `[b, h]` | LSTM |
/// | peepholes P | `[3·h]`: i, o, f | LSTM with them |
/// | bias r_b of the state in the last gate | `[h]` | GRU that is linear before its reset |
/// | lengths of the sequences, s32 or s64 | `[b]` | [`lengths`](Self::lengths) |
///
/// Results: the state after each step `[s, b, h]`, 0 beyond a sequence's length; the last state `[b, h]`; the last cell of
/// an LSTM `[b, h]`. In f32 or f64; a product with R is summed from a gate's a on, the state's numbers in order.
///
/// With f, g, h the activations (the operands of f and g are clipped) and a_z… the parts of a, `∘` the product of elements:
///
/// ```text
/// RNN   H = f(a + H·R)
/// GRU   z = f(a_z + H·R_z)    r = f(a_r + H·R_r)
///       h̃ = g(a_h + (r∘H)·R_h), or g(a_h + r∘(r_b + H·R_h)) where linear before the reset
///       H = (1 − z)∘h̃ + z∘H
/// LSTM  i = f(a_i + H·R_i + P_i∘C)    f = f(a_f + H·R_f + P_f∘C), or 1 − i where coupled
///       C = f∘C + i∘g(a_c + H·R_c)    o = f(a_o + H·R_o + P_o∘C)    H = o∘h(C)
/// ```
///
/// Gates stand in ONNX's order: z, r, h and i, o, f, c.
///
/// Where R is codes, each product with it is one of codes: the row of numbers that it multiplies gets the [`DynamicGrid`] that
/// is chosen for it, in every step anew, and [`Dequantizer::apply`] makes numbers of the sums, to which a gate's a, or r_b, is
/// added. So layers are as ONNX Runtime's DynamicQuantizeLSTM, which shares the grid of a step among sequences.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Recurrent {
    /// What is computed in a step.
    pub cell: Cell,
    /// The activations f, g, h, as many as the cell has.
    pub activations: Vec<Activation>,
    /// Operands of the activations f and g are brought between −clip and clip.
    pub clip: Option<f32>,
    /// Whether steps are taken from the last one of a sequence to the first.
    pub reverse: bool,
    /// Whether there is an operand of lengths.
    pub lengths: bool,
}

/// What a [`Recurrent`] computes in a step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Cell {
    /// One gate and one activation.
    Rnn,
    /// Three gates and two activations.
    Gru {
        /// Whether the reset is applied to the product of the state rather than to the state.
        linear_before_reset: bool,
    },
    /// Four gates and three activations.
    Lstm {
        /// Whether gates see the cell.
        peepholes: bool,
        /// Whether forgetting is what the input leaves: 1 − i.
        coupled: bool,
    },
}

/// An activation of a [`Recurrent`].
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the formulas say it")]
pub enum Activation {
    /// One of the functions of elements.
    Unary(UnaryKind),
    /// alpha·x + beta.
    Affine { alpha: f32, beta: f32 },
    /// x above alpha, 0 elsewhere.
    ThresholdedRelu { alpha: f32 },
    /// alpha·tanh(beta·x).
    ScaledTanh { alpha: f32, beta: f32 },
}

impl Activation {
    fn apply<T: Real>(self, x: T) -> T {
        let of = |x: f32| T::of(x.into());
        match self {
            Activation::Unary(kind) => kind.apply_real(x),
            Activation::Affine { alpha, beta } => of(alpha) * x + of(beta),
            Activation::ThresholdedRelu { alpha } if x > of(alpha) => x,
            Activation::ThresholdedRelu { .. } => T::of(0.0),
            Activation::ScaledTanh { alpha, beta } => of(alpha) * (of(beta) * x).tanh(),
        }
    }
}

impl Cell {
    /// Number of gates.
    pub fn gates(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Gru { .. } => 3,
            Cell::Lstm { .. } => 4,
        }
    }

    /// Number of activations.
    pub fn activations(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Gru { .. } => 2,
            Cell::Lstm { .. } => 3,
        }
    }
}

/// Slots of the operands that not every cell has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slots {
    /// The initial cell.
    pub cell: Option<usize>,
    /// Weights of the cell in gates.
    pub peepholes: Option<usize>,
    /// The bias of the state in the last gate.
    pub bias: Option<usize>,
    /// The lengths of the sequences.
    pub lengths: Option<usize>,
    /// How many operands there are.
    pub count: usize,
}

/// y += x·R for so many columns of R as y has elements, from one on.
type Product<'a, T> = &'a dyn Fn(&mut [T], &[T], usize);

/// The operands of a [`Recurrent`], of elements of one type.
struct Operands<'a, T> {
    gates: &'a [T],
    add_product: Product<'a, T>,
    peepholes: Option<&'a [T]>,
    bias: Option<&'a [T]>,
}

/// What a sequence remembers, and room for a step.
struct State<T> {
    hidden: Vec<T>,
    cell: Vec<T>,
    /// G·h numbers: a, then also the products with R.
    gates: Vec<T>,
    /// h numbers.
    scratch: Vec<T>,
}

impl Recurrent {
    /// The length of sequence `b` among those of so many steps.
    ///
    /// # Errors
    /// Where it is negative or beyond the steps.
    pub fn length(b: usize, length: i64, steps: usize) -> Result<usize, OpError> {
        let inside = usize::try_from(length).ok().filter(|&n| n <= steps);
        inside
            .ok_or_else(|| OpError::shape(format!("sequence {b} has a length of {length}, of {steps} steps")))
    }

    /// The operand slot of R.
    pub const WEIGHTS_SLOT: usize = 1;

    /// What makes numbers of the sums of codes of R, which has this type.
    ///
    /// # Errors
    /// Where a sum could leave 32 bits.
    pub fn dequantizer(ty: &TensorType, weights: &Tensor) -> Result<Dequantizer, OpError> {
        let sums = WeightSums::by_channel(weights, QMatMulToFloat::CHANNEL_AXIS)?;
        ToFloat::plain(true).dequantizer(ty, &sums, None)
    }

    /// The slots of the operands that this recurrence has.
    pub fn slots(&self) -> Slots {
        let mut next = 3;
        let mut slot = |present: bool| {
            let at = next;
            next += usize::from(present);
            present.then_some(at)
        };
        let cell = slot(matches!(self.cell, Cell::Lstm { .. }));
        let peepholes = slot(matches!(self.cell, Cell::Lstm { peepholes: true, .. }));
        let bias = slot(matches!(self.cell, Cell::Gru { linear_before_reset: true }));
        let lengths = slot(self.lengths);
        Slots { cell, peepholes, bias, lengths, count: next }
    }

    fn activate<T: Real>(&self, index: usize, x: T) -> T {
        let x = match self.clip {
            Some(clip) => x.within(T::of(-f64::from(clip)), T::of(clip.into())),
            None => x,
        };
        self.activations[index].apply(x)
    }

    /// One step of one sequence; `state.gates` holds a.
    fn step<T: Real>(&self, state: &mut State<T>, operands: &Operands<'_, T>) {
        match self.cell {
            Cell::Rnn => {
                (operands.add_product)(&mut state.gates, &state.hidden, 0);
                for (h, &a) in state.hidden.iter_mut().zip(&state.gates) {
                    *h = self.activate(0, a);
                }
            }
            Cell::Gru { .. } => self.gru(state, operands),
            Cell::Lstm { coupled, .. } => self.lstm(state, operands, coupled),
        }
    }

    fn gru<T: Real>(&self, state: &mut State<T>, operands: &Operands<'_, T>) {
        let n = state.hidden.len();
        let State { hidden, gates, scratch, .. } = state;
        let (both, last) = gates.split_at_mut(2 * n);
        (operands.add_product)(both, hidden, 0);
        both.iter_mut().for_each(|a| *a = self.activate(0, *a));
        let reset = &both[n..];
        match operands.bias {
            Some(bias) => {
                scratch.copy_from_slice(bias);
                (operands.add_product)(scratch, hidden, 2 * n);
                for j in 0..n {
                    last[j] = last[j] + reset[j] * scratch[j];
                }
            }
            None => {
                for j in 0..n {
                    scratch[j] = reset[j] * hidden[j];
                }
                (operands.add_product)(last, scratch, 2 * n);
            }
        }
        for j in 0..n {
            let z = both[j];
            hidden[j] = (T::of(1.0) - z) * self.activate(1, last[j]) + z * hidden[j];
        }
    }

    fn lstm<T: Real>(&self, state: &mut State<T>, operands: &Operands<'_, T>, coupled: bool) {
        let n = state.hidden.len();
        let State { hidden, cell, gates, .. } = state;
        (operands.add_product)(gates, hidden, 0);
        let peep = |gate: usize, j: usize, c: T, a: T| match operands.peepholes {
            Some(p) => a + p[gate * n + j] * c,
            None => a,
        };
        for j in 0..n {
            let c = cell[j];
            let input = self.activate(0, peep(0, j, c, gates[j]));
            let forget = match coupled {
                true => T::of(1.0) - input,
                false => self.activate(0, peep(2, j, c, gates[2 * n + j])),
            };
            let c = forget * c + input * self.activate(1, gates[3 * n + j]);
            let output = self.activate(0, peep(1, j, c, gates[n + j]));
            cell[j] = c;
            // The cell is not clipped: so has ONNX Runtime read it.
            hidden[j] = output * self.activations[2].apply(c);
        }
    }

    fn run<T: Real + Element>(
        &self,
        operands: &[&Tensor],
        results: &[TensorType],
        add_product: Product<'_, T>,
    ) -> Result<Vec<Tensor>, OpError> {
        let slots = self.slots();
        let slice = |slot: usize| operands[slot].as_slice::<T>();
        let given = Operands {
            gates: slice(0)?,
            add_product,
            peepholes: slots.peepholes.map(slice).transpose()?,
            bias: slots.bias.map(slice).transpose()?,
        };
        let &[steps, sequences, hidden] = results[0].shape.dims() else {
            return Err(OpError::shape("the result has not 3 dimensions"));
        };
        let lengths = slots.lengths.and_then(|slot| operands[slot].to_i64());
        let (initial, initial_cell) = (slice(2)?, slots.cell.map(slice).transpose()?);
        let width = self.cell.gates() * hidden;
        let mut all = vec![T::of(0.0); steps * sequences * hidden];
        let (mut last, mut last_cell) = (Vec::with_capacity(initial.len()), vec![]);
        for b in 0..sequences {
            let own = b * hidden..(b + 1) * hidden;
            let mut state = State {
                hidden: initial[own.clone()].to_vec(),
                cell: initial_cell.map_or(vec![], |c| c[own].to_vec()),
                gates: vec![T::of(0.0); width],
                scratch: vec![T::of(0.0); hidden],
            };
            let length = match &lengths {
                None => steps,
                Some(lengths) => Recurrent::length(b, lengths[b], steps)?,
            };
            for i in 0..length {
                let t = if self.reverse { length - 1 - i } else { i };
                let row = t * sequences + b;
                state.gates.copy_from_slice(&given.gates[row * width..][..width]);
                self.step(&mut state, &given);
                all[row * hidden..][..hidden].copy_from_slice(&state.hidden);
            }
            last.extend(state.hidden);
            last_cell.extend(state.cell);
        }
        let mut tensors = vec![
            Tensor::from_vec(results[0].shape.clone(), all)?,
            Tensor::from_vec(results[1].shape.clone(), last)?,
        ];
        if let Some(ty) = results.get(2) {
            tensors.push(Tensor::from_vec(ty.shape.clone(), last_cell)?);
        }
        Ok(tensors)
    }
}

/// y += x·W for the columns of W, a matrix of as many rows as x has elements, from `first` on.
fn add_product<T: Real>(y: &mut [T], x: &[T], weights: &[T], first: usize) {
    if x.is_empty() {
        return;
    }
    for (&x, row) in x.iter().zip(weights.chunks(weights.len() / x.len())) {
        for (y, &w) in y.iter_mut().zip(&row[first..]) {
            *y = *y + x * w;
        }
    }
}

/// The same of codes of W, whose sums this makes numbers of.
fn add_product_of_codes(y: &mut [f32], x: &[f32], codes: &[i8], first: usize, dequantizer: &Dequantizer) {
    if x.is_empty() {
        return;
    }
    let grid = DynamicGrid::of(x);
    let mut sums = vec![0i32; y.len()];
    for (&x, row) in x.iter().zip(codes.chunks(codes.len() / x.len())) {
        let x = i32::from(grid.code(x));
        for (sum, &w) in sums.iter_mut().zip(&row[first..]) {
            *sum = sum.wrapping_add(x * i32::from(w));
        }
    }
    for (i, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
        *y = dequantizer.apply(sum, first + i, grid, Some(*y));
    }
}

impl Operator for Recurrent {
    fn infer(&self, operands: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        let slots = self.slots();
        if operands.len() != slots.count {
            return Err(OpError::Arity { expected: slots.count.to_string(), got: operands.len() });
        }
        if self.activations.len() != self.cell.activations() {
            let why = format!("{:?} takes {} activations", self.cell, self.cell.activations());
            return Err(OpError::attribute(why));
        }
        if self.clip.is_some_and(|c| c.is_nan() || c < 0.0) {
            return Err(OpError::attribute(format!("clip {:?}", self.clip)));
        }
        let x = operand(operands, 0)?;
        let dtype = x.dtype;
        if !matches!(dtype, DType::F32 | DType::F64) {
            return Err(OpError::dtype(format!("takes f32 or f64, got {x}")));
        }
        let (&[steps, sequences, width], &[_, hidden]) = (x.shape.dims(), operands[2].shape.dims()) else {
            return Err(OpError::shape(format!("gates {x} or state {} have other dimensions", operands[2])));
        };
        let expect = |slot: Option<usize>, dims: &[usize]| match slot {
            Some(slot) if operands[slot].dtype != dtype || operands[slot].shape.dims() != dims => {
                let expected = Shape::new(dims)?;
                Err(OpError::shape(format!(
                    "operand {slot} must be {dtype}[{expected}], got {}",
                    operands[slot]
                )))
            }
            _ => Ok(()),
        };
        let gates = hidden.checked_mul(self.cell.gates()).filter(|&n| n == width);
        let gates = gates.ok_or_else(|| {
            OpError::shape(format!("{x} does not hold {} gates of {hidden} numbers", self.cell.gates()))
        })?;
        let weights = operands[Recurrent::WEIGHTS_SLOT];
        match weights.dtype {
            DType::S8 if dtype == DType::F32 && weights.shape.dims() == [hidden, gates] => {
                check_weights(weights, QMatMulToFloat::CHANNEL_AXIS)?;
            }
            _ => expect(Some(Recurrent::WEIGHTS_SLOT), &[hidden, gates])?,
        }
        expect(Some(2), &[sequences, hidden])?;
        expect(slots.cell, &[sequences, hidden])?;
        expect(slots.peepholes, &[3 * hidden])?;
        expect(slots.bias, &[hidden])?;
        if let Some(lengths) = slots.lengths.map(|slot| operands[slot])
            && (!matches!(lengths.dtype, DType::S32 | DType::S64) || lengths.shape.dims() != [sequences])
        {
            return Err(OpError::shape(format!("lengths must be {sequences} integers, got {lengths}")));
        }
        let state = TensorType::new(dtype, Shape::new([sequences, hidden])?);
        let mut results =
            vec![TensorType::new(dtype, Shape::new([steps, sequences, hidden])?), state.clone()];
        results.extend(slots.cell.map(|_| state));
        Ok(results)
    }

    fn eval(
        &self,
        operands: &[&Tensor],
        types: &[&TensorType],
        results: &[TensorType],
    ) -> Result<Vec<Tensor>, OpError> {
        let weights = operands[Recurrent::WEIGHTS_SLOT];
        match (results[0].dtype, weights.dtype()) {
            (DType::F64, _) => {
                let weights = weights.as_slice::<f64>()?;
                self.run::<f64>(operands, results, &|y, x, first| add_product(y, x, weights, first))
            }
            (_, DType::S8) => {
                let dequantizer = Recurrent::dequantizer(types[Recurrent::WEIGHTS_SLOT], weights)?;
                let codes = weights.as_slice::<i8>()?;
                self.run::<f32>(operands, results, &|y, x, first| {
                    add_product_of_codes(y, x, codes, first, &dequantizer);
                })
            }
            _ => {
                let weights = weights.as_slice::<f32>()?;
                self.run::<f32>(operands, results, &|y, x, first| add_product(y, x, weights, first))
            }
        }
    }

    /// Those of the products with the state.
    fn macs(&self, operands: &[&TensorType], _results: &[TensorType]) -> u64 {
        let state = operands[2].shape.last().copied().unwrap_or(0);
        (operands[0].shape.elements() as u64).saturating_mul(state as u64)
    }
}
