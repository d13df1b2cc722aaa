//! Recurrences: for each time step a product of the state and its weights, by the tiles of every other product, and the
//! gates, by the kernel of every other function of elements. All of them work on fixed places, between which and the
//! operands and results `recurrence` moves rows.

use super::{Lowerer, Lowering, product, shape::attributes};
use crate::{
    CodegenError,
    dense::{
        Problem, Strides, WeightOrder, Weights,
        driver::{self, Coefficients, Elements, Operands, PackedAt, Starts},
        spec::{Epilogue, Product, RowGrid, RunTimeGrids},
    },
    kernels::{
        dynamic::{self, Rows},
        lanes::{Elementwise, Lanes},
        map::{self, View},
        math::{self, has_unary},
        wide,
    },
    model::Work,
    module::Location,
    recurrence::{Input, Lengths, Recurrence, State},
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, Tensor,
    numerics::Dequantizer,
    ops::{Activation, Cell, Clamp, Recurrent},
};

pub(super) const RECURRENT: Lowerer = Lowerer { supported, lower };

const WEIGHTS: usize = Recurrent::WEIGHTS_SLOT;
const SIZE: usize = size_of::<f32>();

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::Recurrent(op)) = graph.op(node) else { return Err("not a recurrence".into()) };
    product::check_extents(graph, node)?;
    product::check_constant(graph, node, Some(WEIGHTS), "weights of the state")?;
    product::check_constant(graph, node, op.slots().bias, "bias of the state")?;
    let ty = graph.ty(node.out());
    if ty.dtype != DType::F32 {
        return Err(format!("computes in {}", ty.dtype));
    }
    let weights = product::constant(graph, node, WEIGHTS).map_err(|e| e.to_string())?;
    if weights.dtype() == DType::S8 {
        let ty = graph.ty(graph.operand(node, WEIGHTS));
        Recurrent::dequantizer(ty, weights).map_err(|e| e.to_string())?;
    }
    match op.activations.iter().find(|a| matches!(a, Activation::Unary(kind) if !has_unary(*kind))) {
        Some(activation) => Err(format!("{activation:?} has no kernel")),
        None => Ok(()),
    }
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Recurrent);
    let [steps, sequences, hidden] = cx.graph.shape(node.out())[..] else {
        return Err(cx.refuse(node, OpError::shape("the result has not 3 dimensions")));
    };
    let slots = op.slots();
    let width = op.cell.gates() * hidden;
    let rows = |columns: usize| (sequences * columns * SIZE) as u64;
    let gates = cx.scratch(rows(width))?;
    let mut state = |slot: usize, port: u16| -> Result<State, CodegenError> {
        Ok(State {
            initial: cx.source(cx.graph.operand(node, slot))?,
            now: cx.scratch(rows(hidden))?,
            next: cx.scratch(rows(hidden))?,
            last: cx.location(node.port(port))?,
            row_bytes: hidden * SIZE,
        })
    };
    let mut states = vec![state(2, 1)?];
    if let Some(slot) = slots.cell {
        states.push(state(slot, 2)?);
    }
    let operand = |slot: usize| cx.graph.operand(node, slot);
    let lengths = match slots.lengths.map(operand) {
        Some(value) => Some(Lengths { at: cx.source(value)?, dtype: cx.graph.ty(value).dtype }),
        None => None,
    };
    let recurrence = Recurrence {
        steps,
        sequences,
        reverse: op.reverse,
        lengths,
        input: Input { from: cx.source(operand(0))?, to: gates, row_bytes: width * SIZE },
        states,
        all: cx.location(node.out())?,
    };
    let body = Body { node, op, sequences, hidden, gates };
    let (first, work) = (cx.steps_so_far(), cx.work(node));
    match op.cell {
        Cell::Rnn => body.rnn(cx, &recurrence)?,
        Cell::Gru { linear_before_reset: true } => body.linear_gru(cx, &recurrence)?,
        Cell::Gru { linear_before_reset: false } => body.gru(cx, &recurrence)?,
        Cell::Lstm { .. } => body.lstm(cx, &recurrence)?,
    }
    cx.repeat_steps(name(op.cell), first, recurrence, work);
    Ok(())
}

fn name(cell: Cell) -> &'static str {
    match cell {
        Cell::Rnn => "rnn",
        Cell::Gru { .. } => "gru",
        Cell::Lstm { .. } => "lstm",
    }
}

/// The steps of one time step.
struct Body<'a> {
    node: NodeId,
    op: &'a Recurrent,
    sequences: usize,
    hidden: usize,
    /// What the input adds to each gate: `[sequences, G·h]`.
    gates: Location,
}

/// Columns of a matrix of so many in a row.
#[derive(Clone, Copy)]
struct Columns {
    at: Location,
    first: usize,
    of: usize,
}

impl Columns {
    fn location(self) -> Location {
        moved(self.at, self.first * SIZE)
    }
}

/// So many bytes further in the arena.
fn moved(at: Location, bytes: usize) -> Location {
    match at {
        Location::Arena(offset) => Location::Arena(offset + bytes as u64),
        other => other,
    }
}

impl Body<'_> {
    fn width(&self) -> usize {
        self.op.cell.gates() * self.hidden
    }

    /// The columns of a gate of `[sequences, G·h]`, the first of those that follow.
    fn gate(&self, at: Location, gate: usize) -> Columns {
        Columns { at, first: gate * self.hidden, of: self.width() }
    }

    /// All columns of `[sequences, h]`.
    fn all(&self, at: Location) -> Columns {
        Columns { at, first: 0, of: self.hidden }
    }

    /// A view of h columns.
    fn view(&self, columns: Columns) -> View {
        let strides = vec![(columns.of * SIZE) as i64, SIZE as i64];
        View { location: columns.location(), offset: 0, dtype: DType::F32, strides }
    }

    fn gate_view(&self, at: Location, gate: usize) -> View {
        self.view(self.gate(at, gate))
    }

    fn state_view(&self, at: Location) -> View {
        self.view(self.all(at))
    }

    /// y = x·R for the columns of R that begin with those of gate `first` and are as many as `gates` have, and a bias; and
    /// what `residual` adds.
    #[allow(clippy::too_many_arguments, reason = "all that a product is made of")]
    fn product(
        &self,
        cx: &mut Lowering,
        x: Location,
        (first, gates): (usize, usize),
        bias: &[f32],
        residual: Option<Columns>,
        y: Columns,
    ) -> Result<(), CodegenError> {
        let tensor = product::constant(cx.graph, self.node, WEIGHTS).map_err(|e| cx.refuse(self.node, e))?;
        let of_codes = tensor.dtype() == DType::S8;
        let product = if of_codes { Product::U8S8 } else { Product::F32 };
        let strides = |col: usize| {
            let all = self.sequences * col;
            Strides { image: all, row: all, col, group: 0 }
        };
        let problem = Problem {
            product,
            images: 1,
            rows: 1,
            cols: self.sequences,
            groups: 1,
            channels: gates * self.hidden,
            a: strides(self.hidden * product.element()),
            y: strides(y.of * SIZE),
            r: strides(residual.map_or(y.of, |r| r.of) * SIZE),
            g: if of_codes && self.sequences > 1 { strides(RowGrid::BYTES) } else { Strides::default() },
            result_bytes: SIZE,
            loops: Vec::new(),
            run: self.hidden,
        };
        let macs = (self.sequences * self.hidden * gates * self.hidden) as u64;
        let work = Work { macs, weight_bytes: macs * product.element() as u64, ..Work::default() };
        let (y, r) = (y.location(), residual.map(Columns::location));
        let operands = Operands { a: x, y, r, g: None, w: PackedAt::Model };
        match of_codes {
            true => self.product_of_codes(cx, tensor, problem, operands, first, bias, work),
            false => self.product_of_numbers(cx, tensor, &problem, operands, first, bias, work),
        }
    }

    /// How the problem reads weights, and the first of them. Where only some columns are taken, they are packed as others of
    /// another number, so that no two are one for whoever shares them.
    fn weights<'s, T>(&self, elements: &'s [T], first: usize) -> Weights<'s, T> {
        let order = WeightOrder { channel: 1, inputs: self.hidden, input: self.width() };
        Weights { elements: &elements[first * self.hidden..], order, run: self.hidden }
    }

    #[allow(clippy::too_many_arguments, reason = "all that a product is made of")]
    fn product_of_numbers<'s>(
        &self,
        cx: &mut Lowering<'_, 's>,
        tensor: &'s Tensor,
        problem: &Problem,
        operands: Operands,
        first: usize,
        bias: &[f32],
        work: Work,
    ) -> Result<(), CodegenError> {
        let elements = tensor.as_slice::<f32>().map_err(|e| cx.refuse(self.node, e.into()))?;
        let weights = Elements::Floats(self.weights(elements, first));
        let coefficients = Coefficients { tensor, weights, starts: Starts::Floats(bias) };
        let epilogue = Epilogue::Float { clamp: Clamp::NONE, residual: operands.r.is_some() };
        driver::lower(cx, "state", problem, epilogue, operands, &coefficients, work)
    }

    /// The same of codes: first those of x are made.
    #[allow(clippy::too_many_arguments, reason = "all that a product is made of")]
    fn product_of_codes<'s>(
        &self,
        cx: &mut Lowering<'_, 's>,
        tensor: &'s Tensor,
        problem: Problem,
        operands: Operands,
        first: usize,
        bias: &[f32],
        work: Work,
    ) -> Result<(), CodegenError> {
        let columns = first * self.hidden..first * self.hidden + problem.channels;
        let ty = cx.graph.ty(cx.graph.operand(self.node, WEIGHTS));
        let all = Recurrent::dequantizer(ty, tensor).map_err(|e| cx.refuse(self.node, e))?;
        let dequantizer = &Dequantizer {
            sums: all.sums[columns.clone()].to_vec(),
            scales: all.scales[columns].to_vec(),
            // What is nothing is not added.
            bias: operands.r.is_none().then(|| bias.to_vec()),
            clamp: all.clamp,
        };
        let (codes, grids) = self.quantized(cx, operands.a)?;
        let elements = tensor.as_slice::<i8>().map_err(|e| cx.refuse(self.node, e.into()))?;
        let weights = self.weights(elements, first);
        let is_in_16_bits = cx.options.tier.has_faster_narrow_products()
            && weights.pairs_fit_16_bits(problem.channels, problem.runs());
        let product = cx.options.tier.product_of_codes(is_in_16_bits);
        let work = Work { by_narrow_weights: product == Product::U8S7, ..work };
        let starts = vec![0; problem.channels];
        // The largest magnitude of a code is 128.
        let starts = Starts::Codes(&starts, 255 * 128 * self.hidden as i64);
        let coefficients = Coefficients { tensor, weights: Elements::Codes(weights), starts };
        let read = RunTimeGrids::ScalesAndZeroPoints;
        let epilogue = Epilogue::Dequantize { dequantizer, grids: read, residual: operands.r.is_some() };
        let operands = Operands { a: codes, g: Some(grids), ..operands };
        driver::lower(cx, "state", &Problem { product, ..problem }, epilogue, operands, &coefficients, work)
    }

    /// Steps that make codes of rows of x, and their grids.
    fn quantized(&self, cx: &mut Lowering, x: Location) -> Result<(Location, Location), CodegenError> {
        let codes = cx.scratch((self.sequences * self.hidden) as u64)?;
        let grids = cx.scratch((self.sequences * RowGrid::BYTES) as u64)?;
        let rows = Rows {
            rows: self.sequences,
            len: self.hidden,
            x,
            codes,
            scales: grids,
            zeros: moved(grids, RowGrid::ZERO_POINT),
            stride: RowGrid::BYTES as i64,
        };
        let elements = (self.sequences * self.hidden) as u64;
        let work = Work { bytes_read: elements * SIZE as u64, bytes_written: elements, ..Work::default() };
        if !wide::quantize_rows(cx, &rows, work)? {
            dynamic::quantize_rows(cx, &rows, work)?;
        }
        Ok((codes, grids))
    }

    fn function(
        &self,
        cx: &mut Lowering,
        kernel: &str,
        operands: &[View],
        to: Location,
        function: impl Elementwise,
    ) -> Result<(), CodegenError> {
        let dims = [self.sequences, self.hidden];
        let bytes = (self.sequences * self.hidden * SIZE) as u64;
        let work =
            Work { bytes_read: operands.len() as u64 * bytes, bytes_written: bytes, ..Work::default() };
        map::elementwise(cx, kernel, &dims, operands, &self.state_view(to), work, function)
    }

    /// The sums of all gates: what the input adds, and the product of the state.
    fn sums(&self, cx: &mut Lowering, hidden: &State, gates: usize) -> Result<Location, CodegenError> {
        let sums = cx.scratch((self.sequences * self.width() * SIZE) as u64)?;
        let zeros = vec![0.0; gates * self.hidden];
        let residual = Some(self.gate(self.gates, 0));
        self.product(cx, hidden.now, (0, gates), &zeros, residual, self.gate(sums, 0))?;
        Ok(sums)
    }

    fn rnn(&self, cx: &mut Lowering, of: &Recurrence) -> Result<(), CodegenError> {
        let hidden = &of.states[0];
        let sums = self.sums(cx, hidden, 1)?;
        self.function(cx, "rnn_state", &[self.gate_view(sums, 0)], hidden.next, Plain(self.op))
    }

    fn gru(&self, cx: &mut Lowering, of: &Recurrence) -> Result<(), CodegenError> {
        let hidden = &of.states[0];
        let sums = self.sums(cx, hidden, 2)?;
        let reset = cx.scratch((self.sequences * self.hidden * SIZE) as u64)?;
        let (z, r, h) = (self.gate_view(sums, 0), self.gate_view(sums, 1), self.state_view(hidden.now));
        self.function(cx, "gru_reset", &[r, h.clone()], reset, Reset(self.op))?;
        let zeros = vec![0.0; self.hidden];
        let (own, last) = (self.gate(self.gates, 2), self.gate(sums, 2));
        self.product(cx, reset, (2, 1), &zeros, Some(own), last)?;
        self.function(cx, "gru_state", &[z, self.view(last), h], hidden.next, GruState(self.op))
    }

    fn linear_gru(&self, cx: &mut Lowering, of: &Recurrence) -> Result<(), CodegenError> {
        let hidden = &of.states[0];
        let products = cx.scratch((self.sequences * self.width() * SIZE) as u64)?;
        // Of z and r the sum with this is the same number, be it 0 or −0.
        let mut bias = vec![-0.0; self.width()];
        if let Some(slot) = self.op.slots().bias {
            let own = product::constant(cx.graph, self.node, slot).map_err(|e| cx.refuse(self.node, e))?;
            let own = own.as_slice::<f32>().map_err(|e| cx.refuse(self.node, e.into()))?;
            bias[2 * self.hidden..].copy_from_slice(own);
        }
        self.product(cx, hidden.now, (0, 3), &bias, None, self.gate(products, 0))?;
        let mut operands: Vec<View> = (0..3).map(|gate| self.gate_view(self.gates, gate)).collect();
        operands.extend((0..3).map(|gate| self.gate_view(products, gate)));
        operands.push(self.state_view(hidden.now));
        self.function(cx, "gru_state", &operands, hidden.next, LinearGruState(self.op))
    }

    fn lstm(&self, cx: &mut Lowering, of: &Recurrence) -> Result<(), CodegenError> {
        let [hidden, cell] = &of.states[..] else {
            return Err(cx.refuse(self.node, OpError::shape("has no cell")));
        };
        let sums = self.sums(cx, hidden, 4)?;
        let peepholes = match self.op.slots().peepholes {
            Some(slot) => Some(cx.location(cx.graph.operand(self.node, slot))?),
            None => None,
        };
        let peephole = |gate: usize| -> Option<View> {
            let view = View::along(peepholes?, DType::F32, Some(1), 2);
            Some(View { offset: (gate * self.hidden * SIZE) as i64, ..view })
        };
        let [i, o, f, c] = [0, 1, 2, 3].map(|gate| self.gate_view(sums, gate));
        let operands: Vec<View> =
            [i, f, c, self.state_view(cell.now)].into_iter().chain(peephole(0)).chain(peephole(2)).collect();
        self.function(cx, "lstm_cell", &operands, cell.next, LstmCell(self.op))?;
        let operands: Vec<View> = [o, self.state_view(cell.next)].into_iter().chain(peephole(1)).collect();
        self.function(cx, "lstm_state", &operands, hidden.next, LstmState(self.op))
    }
}

/// An activation of operands that are brought within the clip.
fn activated<L: Lanes>(l: &mut L, op: &Recurrent, index: usize, x: L::Value) -> L::Value {
    let x = match op.clip {
        Some(clip) => l.within(x, -clip, clip),
        None => x,
    };
    activation(l, op.activations[index], x)
}

fn activation<L: Lanes>(l: &mut L, of: Activation, x: L::Value) -> L::Value {
    match of {
        Activation::Unary(kind) => math::unary(l, kind, x),
        Activation::Affine { alpha, beta } => {
            let (alpha, beta) = (l.f32(alpha), l.f32(beta));
            let product = l.fmul(alpha, x);
            l.fadd(product, beta)
        }
        Activation::ThresholdedRelu { alpha } => {
            let (alpha, zero) = (l.f32(alpha), l.f32(0.0));
            let above = l.less(alpha, x);
            l.select(above, x, zero)
        }
        Activation::ScaledTanh { alpha, beta } => {
            let (alpha, beta) = (l.f32(alpha), l.f32(beta));
            let product = l.fmul(beta, x);
            let y = math::tanh(l, product);
            l.fmul(alpha, y)
        }
    }
}

/// f(a).
struct Plain<'a>(&'a Recurrent);

impl Elementwise for Plain<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        activated(l, self.0, 0, operands[0])
    }
}

/// f(r)∘H.
struct Reset<'a>(&'a Recurrent);

impl Elementwise for Reset<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let reset = activated(l, self.0, 0, operands[0]);
        l.fmul(reset, operands[1])
    }
}

/// Of z, h̃ and H, the first two before their activations: (1 − z)∘h̃ + z∘H.
struct GruState<'a>(&'a Recurrent);

impl Elementwise for GruState<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let z = activated(l, self.0, 0, operands[0]);
        let candidate = activated(l, self.0, 1, operands[1]);
        let one = l.f32(1.0);
        let rest = l.fsub(one, z);
        let new = l.fmul(rest, candidate);
        let old = l.fmul(z, operands[2]);
        l.fadd(new, old)
    }
}

/// The same of a_z, a_r, a_h, the products of the state for each, and H: h̃ is g(a_h + r∘product).
struct LinearGruState<'a>(&'a Recurrent);

impl Elementwise for LinearGruState<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let reset = l.fadd(operands[1], operands[4]);
        let reset = activated(l, self.0, 0, reset);
        let product = l.fmul(reset, operands[5]);
        let candidate = l.fadd(operands[2], product);
        let z = l.fadd(operands[0], operands[3]);
        GruState(self.0).apply(l, &[z, candidate, operands[6]])
    }
}

/// a + P∘C, where there are peepholes.
fn peeped<L: Lanes>(l: &mut L, a: L::Value, peephole: Option<&L::Value>, c: L::Value) -> L::Value {
    match peephole {
        Some(&peephole) => {
            let product = l.fmul(peephole, c);
            l.fadd(a, product)
        }
        None => a,
    }
}

/// Of i, f, c̃ before their activations, C, and the peepholes of i and f: f∘C + i∘c̃.
struct LstmCell<'a>(&'a Recurrent);

impl Elementwise for LstmCell<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let c = operands[3];
        let input = peeped(l, operands[0], operands.get(4), c);
        let input = activated(l, self.0, 0, input);
        let forget = match self.0.cell {
            Cell::Lstm { coupled: true, .. } => {
                let one = l.f32(1.0);
                l.fsub(one, input)
            }
            _ => {
                let forget = peeped(l, operands[1], operands.get(5), c);
                activated(l, self.0, 0, forget)
            }
        };
        let candidate = activated(l, self.0, 1, operands[2]);
        let old = l.fmul(forget, c);
        let new = l.fmul(input, candidate);
        l.fadd(old, new)
    }
}

/// Of o before its activation, the new C, and the peephole of o: o∘h(C).
struct LstmState<'a>(&'a Recurrent);

impl Elementwise for LstmState<'_> {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let output = peeped(l, operands[0], operands.get(2), operands[1]);
        let output = activated(l, self.0, 0, output);
        let cell = activation(l, self.0.activations[2], operands[1]);
        l.fmul(output, cell)
    }
}
