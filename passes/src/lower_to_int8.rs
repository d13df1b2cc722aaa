//! Ops between fake-quantizations become integer ops, fake-quantized constants become integers, and real numbers are
//! converted where integer ops meet float ones.
//! A product with weights whose result has no grid makes floats of its sums.
//!
//! The pattern is the whole contract: an op whose activations are all on grids and whose one user is a
//! fake-quantization to u8 (possibly behind a clamp), or a move of values on one grid. So a fake-quant graph from
//! anywhere can be lowered. The graph is built anew, in order; each old value is known as real numbers, as codes, or
//! as both.

mod exact;
mod to_float;

use crate::{
    Context, Pass, PassError, Record,
    edit::{Product, activations, channel_runs, clamp_of, has_weights, is_move},
    fold_normalize::pixels_are_codes,
    insert_fake_quant::clamp_behind,
    weight_parts::{self, WeightParts},
};
use qcc_ir::{
    DType, Graph, Kind, NodeId, Op, OpError, OutputGrid, QuantParams, Stage, Tensor, TensorType, ValueId,
    numerics::{self, RequantMode, Requantizer, Rescaling, WeightSums},
    ops::{
        Binary, BinaryKind, Clamp, Dequantize, FakeQuant, Pool, PoolKind, QAveragePool, QBinary, QBinaryKind,
        QConv, QMatMul, QResample, QUnary, Quantize, Unary, UnaryKind,
    },
};
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
pub(crate) const LOWER_TO_INT8: Pass = Pass { name: "lower_to_int8", run };

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    if graph.stage == Stage::Float && !ctx.options.precision.is_calibrated() {
        return Ok(());
    }
    let mut builder = Builder {
        old: graph,
        new: Graph::new(graph.name.clone()),
        ctx,
        real: BTreeMap::new(),
        codes: BTreeMap::new(),
        absorbed: BTreeSet::new(),
    };
    for &input in graph.inputs() {
        let name = &graph.node(input).name;
        let mut ty = graph.ty(input.out()).clone();
        if let Some(params) = pixel_params(graph, input) {
            record.applied(name, "its pixels are codes");
            ty.quant = Some(params);
        } else if let Some(params) = declared_params(graph, input) {
            ty.quant = Some(params);
        }
        let value = builder.new.input(name, ty)?;
        builder.real.insert(input.out(), value);
    }
    for node in graph.order() {
        if !builder.absorbed.contains(&node) {
            builder.visit(node, record)?;
        }
    }
    for output in graph.outputs() {
        let value = builder.as_real(output.value)?;
        builder.new.output(output.name.clone(), value);
    }
    let mut new = builder.new;
    new.remove_dead();
    new.stage = Stage::Int8;
    *graph = new;
    Ok(())
}

/// The grid on which the pixels of an input are their own codes, where they are normalised and rounded to it.
fn pixel_params(graph: &Graph, input: NodeId) -> Option<QuantParams> {
    graph.uses(input.out()).into_iter().find_map(|u| {
        let Some(Op::Normalize(n)) = graph.op(u.node) else { return None };
        graph.uses(u.node.out()).into_iter().find_map(|u| match graph.op(u.node) {
            Some(Op::FakeQuant(f)) if f.dtype == DType::U8 && full_range(f) => {
                f.params.as_per_tensor().filter(|&grid| pixels_are_codes(n, grid)).map(|_| f.params.clone())
            }
            _ => None,
        })
    })
}

/// The grid on which an input's integers are read, by the one op that takes them.
fn declared_params(graph: &Graph, input: NodeId) -> Option<QuantParams> {
    match graph.op(graph.sole_use(input.out())?.node)? {
        Op::AssumeGrid(grid) => grid.params.clone(),
        _ => None,
    }
}

/// A constant on a grid.
enum RoundedConstant<'a> {
    /// Numbers and what rounds them.
    Numbers(&'a Tensor, &'a FakeQuant),
    /// Codes, and a type with their grid.
    Codes(&'a Tensor, &'a TensorType),
}

impl RoundedConstant<'_> {
    fn dtype(&self) -> DType {
        match self {
            RoundedConstant::Numbers(_, f) => f.dtype,
            RoundedConstant::Codes(_, ty) => ty.dtype,
        }
    }

    fn codes(&self) -> Result<(Tensor, TensorType), OpError> {
        match *self {
            RoundedConstant::Numbers(tensor, f) => integers(tensor, f),
            RoundedConstant::Codes(tensor, ty) => Ok((tensor.clone(), ty.clone())),
        }
    }

    fn numbers(&self) -> Result<Tensor, OpError> {
        let (op, tensor, ty) = match *self {
            RoundedConstant::Numbers(tensor, f) => (Op::from(f.clone()), tensor, tensor.ty()),
            RoundedConstant::Codes(tensor, ty) => (Op::from(Dequantize {}), tensor, ty.clone()),
        };
        let results = op.infer(&[&ty])?;
        let numbers = op.eval(&[tensor], &[&ty], &results)?;
        numbers.into_iter().next().ok_or_else(|| OpError::unsupported("gave no result"))
    }
}

struct Builder<'a> {
    old: &'a Graph,
    new: Graph,
    ctx: &'a Context<'a>,
    /// Old values as real numbers (or plain integers, or what the model itself quantized).
    real: BTreeMap<ValueId, ValueId>,
    /// Old values as codes.
    codes: BTreeMap<ValueId, ValueId>,
    /// Clamps and fake-quantizations that the op before them took in.
    absorbed: BTreeSet<NodeId>,
}

/// Where the result of an op goes, when it is to be an integer op.
struct Target {
    fake_quant: NodeId,
    clamp: Option<NodeId>,
    grid: OutputGrid,
}

/// An integer op, or why there is none.
type Lowered = Result<(Op, Vec<ValueId>), String>;

impl Builder<'_> {
    fn name(&self, value: ValueId) -> &str {
        &self.old.node(value.node).name
    }

    fn visit(&mut self, node: NodeId, record: &mut Record) -> Result<(), PassError> {
        let name = self.old.node(node).name.clone();
        let op = match self.old.node(node).kind() {
            Kind::Input => return Ok(()),
            Kind::Constant(tensor) => {
                let ty = self.old.ty(node.out()).clone();
                let value = self.new.constant_of(&name, tensor.clone(), ty)?;
                self.real.insert(node.out(), value);
                return Ok(());
            }
            Kind::Op(op) => op,
        };
        match op {
            // Its users say what they need it as.
            Op::FakeQuant(_) | Op::Dequantize(_) if self.rounded_constant(node.out()).is_some() => {
                return Ok(());
            }
            Op::FakeQuant(f) => return self.convert(node, f),
            Op::Dequantize(_) if self.reads_codes(node)? => return Ok(()),
            Op::Quantize(q) if self.gives_codes(node, q)? => return Ok(()),
            Op::AssumeGrid(grid) => {
                let x = self.as_real(self.old.operand(node, 0))?;
                if self.new.ty(x).quant == grid.params {
                    self.real.insert(node.out(), x);
                    return Ok(());
                }
            }
            _ => {}
        }
        if self.unrounded(node, record)? {
            return Ok(());
        }
        if self.on_grids(node) {
            if is_move(op) {
                if self.lower_move(node, op)? {
                    record.applied(&name, "moves codes");
                    return Ok(());
                }
                record.declined(&name, "its operands are on different grids");
            } else if let Some(target) = self.target(node) {
                match self.lowered(node, op, &target, record)? {
                    Ok((lowered, operands)) => {
                        let mnemonic = lowered.mnemonic();
                        let value = self.new.add(&name, lowered, &operands)?.out();
                        self.codes.insert(target.fake_quant.out(), value);
                        self.absorbed.insert(target.fake_quant);
                        self.absorbed.extend(target.clamp);
                        record.applied(&name, format!("{} became {mnemonic}", op.mnemonic()));
                        return Ok(());
                    }
                    Err(why) => match self.exact_in_floats(node, &target)? {
                        Some(codes) => {
                            self.codes.insert(target.fake_quant.out(), codes);
                            self.absorbed.insert(target.fake_quant);
                            self.absorbed.extend(target.clamp);
                            record.declined(&name, format!("computes on its integers in floats: {why}"));
                            return Ok(());
                        }
                        None => record.declined(&name, format!("stays float: {why}")),
                    },
                }
            }
        }
        let operands =
            self.old.operands(node).into_iter().map(|v| self.as_real(v)).collect::<Result<Vec<_>, _>>()?;
        let own = self.new.add(&name, op.clone(), &operands)?;
        let ports = 0..self.old.node(node).outputs().len() as u16;
        self.real.extend(ports.map(|port| (node.port(port), own.port(port))));
        Ok(())
    }

    /// Whether all activations of the node are known as codes, and the user lets it be an integer op.
    fn on_grids(&self, node: NodeId) -> bool {
        let activations = activations(self.old, node);
        let has_codes = |v: ValueId| {
            self.codes.contains_key(&v) || self.rounded_constant(v).is_some_and(|c| c.dtype().size() == 1)
        };
        !self.ctx.options.keeps_float(self.old, node)
            && !activations.is_empty()
            && activations.iter().all(|(_, v)| has_codes(*v))
    }

    /// The constant behind a fake-quantization or dequantization of one.
    fn rounded_constant(&self, value: ValueId) -> Option<RoundedConstant<'_>> {
        let op = self.old.op(value.node)?;
        let constant = || {
            let x = self.old.operand(value.node, 0);
            Some((self.old.constant_value(x)?, self.old.ty(x)))
        };
        match op {
            Op::FakeQuant(f) => constant().map(|(tensor, _)| RoundedConstant::Numbers(tensor, f)),
            Op::Dequantize(_) => constant().map(|(tensor, ty)| RoundedConstant::Codes(tensor, ty)),
            _ => None,
        }
    }

    /// Takes the codes that a dequantization reads for those of its result, where they are on one grid of 8 bits.
    fn reads_codes(&mut self, node: NodeId) -> Result<bool, PassError> {
        let x = self.as_real(self.old.operand(node, 0))?;
        let ty = self.new.ty(x);
        let Some((scale, zero_point)) = ty.per_tensor() else { return Ok(false) };
        let codes = match ty.dtype {
            DType::U8 => x,
            DType::S8 => {
                let name = format!("{}_unsigned", self.name(self.old.operand(node, 0)));
                let fail = |e| PassError::op(&name, "QUnary", e);
                let output = OutputGrid::full(DType::U8, scale, zero_point + 128).map_err(fail)?;
                self.new.add(&name, QUnary { kind: UnaryKind::Identity, output }, &[x])?.out()
            }
            _ => return Ok(false),
        };
        self.codes.insert(node.out(), codes);
        Ok(true)
    }

    /// Gives codes that are known in the type that a quantization makes them in.
    fn gives_codes(&mut self, node: NodeId, q: &Quantize) -> Result<bool, PassError> {
        let Some(&codes) = self.codes.get(&self.old.operand(node, 0)) else { return Ok(false) };
        let ty = self.new.ty(codes);
        let value = match q.params.as_per_tensor().filter(|_| q.dtype.size() == 1) {
            Some(_) if ty.dtype == q.dtype && ty.quant.as_ref() == Some(&q.params) => codes,
            Some((scale, zero_point)) if matches!(q.dtype, DType::U8 | DType::S8) => {
                let name = self.old.node(node).name.clone();
                let fail = |e| PassError::op(&name, "QUnary", e);
                let output = OutputGrid::full(q.dtype, scale, zero_point).map_err(fail)?;
                self.new.add(&name, QUnary { kind: UnaryKind::Identity, output }, &[codes])?.out()
            }
            _ => return Ok(false),
        };
        self.real.insert(node.out(), value);
        Ok(true)
    }

    /// The fake-quantization that is the one user of the node, and the grid and bounds it stands for.
    fn target(&self, node: NodeId) -> Option<Target> {
        let clamp = clamp_behind(self.old, node);
        let end = clamp.unwrap_or(node);
        let u = self.old.sole_use(end.out())?;
        let Some(Op::FakeQuant(f)) = self.old.op(u.node) else {
            return None;
        };
        let (scale, zero_point) = f.params.as_per_tensor().filter(|_| f.dtype == DType::U8)?;
        let own = Product::of(self.old, node).map(|mut p| *p.clamp());
        let own = own.or_else(|| clamp_of(self.old, node)).unwrap_or(Clamp::NONE);
        let bounds = own.then(clamp.and_then(|c| clamp_of(self.old, c)).unwrap_or(Clamp::NONE));
        let code = |x: f32| numerics::quantize(x, scale, zero_point, f.lo, f.hi);
        let grid = OutputGrid { dtype: f.dtype, scale, zero_point, lo: code(bounds.lo), hi: code(bounds.hi) };
        Some(Target { fake_quant: u.node, clamp, grid })
    }

    /// A fake-quantization that no op took in: a conversion, or nothing where the codes are on its grid already.
    fn convert(&mut self, node: NodeId, f: &FakeQuant) -> Result<(), PassError> {
        let name = self.old.node(node).name.clone();
        let x = self.old.operand(node, 0);
        let per_tensor = f.params.as_per_tensor();
        if let Some(pixels) = per_tensor.filter(|_| full_range(f)).and_then(|grid| self.pixels_on(x, grid)) {
            self.codes.insert(node.out(), pixels);
            return Ok(());
        }
        let value = match (self.codes.get(&x).copied(), per_tensor) {
            (Some(codes), Some((scale, zero_point))) => {
                let ty = self.new.ty(codes);
                if ty.dtype == f.dtype && ty.per_tensor() == per_tensor && full_range(f) {
                    codes
                } else {
                    let output = OutputGrid { dtype: f.dtype, scale, zero_point, lo: f.lo, hi: f.hi };
                    self.new.add(&name, QUnary { kind: UnaryKind::Identity, output }, &[codes])?.out()
                }
            }
            _ => {
                let real = self.as_real(x)?;
                let quantize = Quantize { dtype: f.dtype, params: f.params.clone() };
                let source = format!("{}_quantize", self.name(x));
                let codes = self.new.add(&source, quantize, &[real])?.out();
                match per_tensor {
                    Some((scale, zero_point)) if !full_range(f) => {
                        let output = OutputGrid { dtype: f.dtype, scale, zero_point, lo: f.lo, hi: f.hi };
                        self.new.add(&name, QUnary { kind: UnaryKind::Identity, output }, &[codes])?.out()
                    }
                    _ => codes,
                }
            }
        };
        self.codes.insert(node.out(), value);
        Ok(())
    }

    /// The new input whose pixels, normalised to the old value, are its codes on this grid.
    fn pixels_on(&self, value: ValueId, grid: (f32, i32)) -> Option<ValueId> {
        let Some(Op::Normalize(_)) = self.old.op(value.node) else { return None };
        let &input = self.real.get(&self.old.operand(value.node, 0))?;
        (self.new.ty(input).per_tensor() == Some(grid)).then_some(input)
    }

    /// The old value as real numbers.
    fn as_real(&mut self, value: ValueId) -> Result<ValueId, PassError> {
        if let Some(&real) = self.real.get(&value) {
            return Ok(real);
        }
        let name = self.name(value).to_string();
        let real = match (self.codes.get(&value).copied(), self.rounded_constant(value)) {
            (Some(codes), None) => {
                let source = format!("{}_dequantize", self.new.node(codes.node).name);
                self.new.add(&source, Dequantize {}, &[codes])?.out()
            }
            (_, Some(constant)) => {
                let numbers = constant.numbers().map_err(|e| PassError::op(&name, "constant", e))?;
                self.new.constant(&name, numbers)
            }
            (None, None) => {
                let why = OpError::unsupported("its value was asked for before it was built");
                return Err(PassError::op(&name, self.old.mnemonic(value.node), why));
            }
        };
        self.real.insert(value, real);
        Ok(real)
    }

    /// The old value as codes, where [`on_grids`](Self::on_grids) said that it has some.
    fn as_codes(&mut self, value: ValueId) -> Result<ValueId, PassError> {
        if let Some(&codes) = self.codes.get(&value) {
            return Ok(codes);
        }
        let Some(constant) = self.rounded_constant(value) else {
            let why = OpError::unsupported("it has no codes");
            return Err(PassError::op(self.name(value), self.old.mnemonic(value.node), why));
        };
        let name = self.name(value).to_string();
        let (tensor, ty) = constant.codes().map_err(|e| PassError::op(&name, "constant", e))?;
        let codes = self.new.quantized_constant(&name, tensor, ty)?;
        self.codes.insert(value, codes);
        Ok(codes)
    }

    /// Whether the move could be done on codes.
    fn lower_move(&mut self, node: NodeId, op: &Op) -> Result<bool, PassError> {
        let moved: Vec<usize> = activations(self.old, node).into_iter().map(|(slot, _)| slot).collect();
        let mut operands = Vec::new();
        for (slot, v) in self.old.operands(node).into_iter().enumerate() {
            operands.push(if moved.contains(&slot) { self.as_codes(v)? } else { self.as_real(v)? });
        }
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.new.ty(v)).collect();
        if op.infer(&types).is_err() {
            return Ok(false);
        }
        let name = self.old.node(node).name.clone();
        let value = self.new.add(&name, op.clone(), &operands)?.out();
        self.codes.insert(node.out(), value);
        Ok(true)
    }

    /// The integer op for a node whose activations have codes.
    fn lowered(
        &mut self,
        node: NodeId,
        op: &Op,
        target: &Target,
        record: &mut Record,
    ) -> Result<Lowered, PassError> {
        let output = target.grid;
        let rescaling = match self.ctx.options.requant {
            RequantMode::Float => Rescaling::Float,
            _ => Rescaling::FixedPoint,
        };
        let mut lowered: Op = match op {
            Op::Conv(_) | Op::MatMul(_) => return self.product(node, output, record),
            Op::Unary(Unary { kind }) => QUnary { kind: *kind, output }.into(),
            Op::Binary(Binary { kind }) => {
                let kind = match *kind {
                    BinaryKind::Add => QBinaryKind::Add,
                    BinaryKind::Sub => QBinaryKind::Sub,
                    BinaryKind::Mul => QBinaryKind::Mul,
                    kind => return Ok(Err(format!("{kind:?} has no integer form"))),
                };
                QBinary { kind, rescaling, output }.into()
            }
            Op::Pool(Pool { kind: PoolKind::Average { count_include_pad }, window, ceil_mode, layout }) => {
                QAveragePool {
                    window: window.clone(),
                    ceil_mode: *ceil_mode,
                    count_include_pad: *count_include_pad,
                    layout: *layout,
                    rescaling,
                    output,
                }
                .into()
            }
            Op::Resample(r) => QResample { resample: r.clone(), output }.into(),
            op => return Ok(Err(format!("{} has no integer form", op.mnemonic()))),
        };
        let old = self.old.operands(node);
        let operands = old.into_iter().map(|v| self.as_codes(v)).collect::<Result<Vec<_>, _>>()?;
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.new.ty(v)).collect();
        let Err(refusal) = lowered.infer(&types) else { return Ok(Ok((lowered, operands))) };
        match &mut lowered {
            Op::QBinary(QBinary { rescaling: own @ Rescaling::Float, .. })
            | Op::QAveragePool(QAveragePool { rescaling: own @ Rescaling::Float, .. }) => {
                *own = Rescaling::FixedPoint;
            }
            _ => return Ok(Err(refusal.to_string())),
        }
        if let Err(why) = lowered.infer(&types) {
            return Ok(Err(why.to_string()));
        }
        record.declined(&self.old.node(node).name, format!("rescales in integers: {refusal}"));
        Ok(Ok((lowered, operands)))
    }

    /// Weights less their zero points have 9 bits. Those that leave s8 are two parts of 8 bits, w₁ + w₂, and
    /// x·(w₁ + w₂) is (x, x)·(w₁, w₂): the input channels that have a w₂ are there twice.
    fn split_weights(
        &mut self,
        node: NodeId,
        product: &Product,
        operands: &mut [ValueId],
    ) -> Result<Result<(), String>, PassError> {
        let name = self.old.node(node).name.clone();
        let fail = |e| PassError::op(&name, "constant", e);
        let ty = self.new.ty(operands[1]).clone();
        let (Some(params), Some(tensor)) = (ty.quant.clone(), self.new.constant_value(operands[1])) else {
            return Ok(Err("its weights are not constant".into()));
        };
        if ty.dtype == DType::S8 && params.zero_points().iter().all(|&z| z == 0) {
            return Ok(Ok(()));
        }
        let (out, inner, has_groups) = match product {
            Product::Conv(c) => (QConv::CHANNEL_AXIS, 1, c.groups > 1),
            Product::MatMul(_) => (QMatMul::CHANNEL_AXIS, 0, false),
        };
        if has_groups || params.axis().is_some_and(|a| a != out) {
            let what = if has_groups { "it has groups" } else { "scales are not by output channel" };
            return Ok(Err(format!("its weights less their zero points leave the range of s8, and {what}")));
        }
        let parts = WeightParts::of(tensor, &params, inner).map_err(fail)?;
        let Some(WeightParts { weights, twice }) = parts else {
            return Ok(Err("its weights less their zero points leave two times the range of s8".into()));
        };
        let scales = params.scales().to_vec();
        let params = match params.axis() {
            None => QuantParams::per_tensor(scales[0], 0),
            Some(axis) => QuantParams::per_axis(axis, scales.clone(), vec![0; scales.len()]),
        };
        let own = self.new.node(operands[1].node).name.clone();
        let ty = params
            .and_then(|p| TensorType::quantized(DType::S8, weights.shape().clone(), p))
            .map_err(fail)?;
        operands[1] = self.new.quantized_constant(&format!("{own}_parts"), weights, ty)?;
        let axis = product.channel_axis(self.new.shape(operands[0]).rank());
        operands[0] = weight_parts::with_channels_again(&mut self.new, &name, operands[0], axis, twice)?;
        Ok(Ok(()))
    }

    /// Makes sums of a product fit 32 bits where its bias takes them alone; see [`coarsened`].
    fn leave_room(
        &mut self,
        node: NodeId,
        operands: &mut [ValueId],
        record: &mut Record,
    ) -> Result<(), PassError> {
        let name = self.old.node(node).name.clone();
        let axis = match self.old.op(node) {
            Some(Op::Conv(_)) => QConv::CHANNEL_AXIS,
            _ => QMatMul::CHANNEL_AXIS,
        };
        let constant = |v: ValueId| self.new.constant_value(v).map(|tensor| (tensor, self.new.ty(v)));
        let (Some(weights), Some(bias)) = (constant(operands[1]), constant(operands[2])) else {
            return Ok(());
        };
        let coarsened = coarsened(weights, bias, axis).map_err(|e| PassError::op(&name, "constant", e))?;
        let Some(Coarsened { weights, bias, channels }) = coarsened else { return Ok(()) };
        for (slot, (tensor, ty)) in [(1, weights), (2, bias)] {
            let own = self.new.node(operands[slot].node).name.clone();
            operands[slot] = self.new.quantized_constant(&format!("{own}_coarse"), tensor, ty)?;
        }
        record.applied(
            &name,
            format!("{channels} channels have coarser weights, to leave room for their bias"),
        );
        Ok(())
    }

    /// A convolution or matrix product of integers, in the first requantization mode that can express it.
    fn product(
        &mut self,
        node: NodeId,
        output: OutputGrid,
        record: &mut Record,
    ) -> Result<Lowered, PassError> {
        let Some(mut product) = Product::of(self.old, node) else {
            return Ok(Err("it has no weights".into()));
        };
        let old = self.old.operands(node);
        let has_bias = *product.bias();
        let has_weights = has_weights(self.old, node);
        let parameters = &old[if has_weights { 1 } else { 2 }..2 + usize::from(has_bias)];
        let rounded: Option<Vec<DType>> =
            parameters.iter().map(|&v| self.rounded_constant(v).map(|c| c.dtype())).collect();
        let expected = [[DType::S8, DType::S32], [DType::U8, DType::S32]]
            .map(|types| types[if has_weights { 0 } else { 1 }..1 + usize::from(has_bias)].to_vec());
        if rounded.is_none_or(|dtypes| !expected.contains(&dtypes)) {
            let what = if has_weights { "weights and bias are" } else { "bias is" };
            return Ok(Err(format!("its {what} not constant, rounded to s8 and s32")));
        }
        let mut operands = old.iter().map(|&v| self.as_codes(v)).collect::<Result<Vec<_>, _>>()?;
        if has_weights && let Err(why) = self.split_weights(node, &product, &mut operands)? {
            return Ok(Err(why));
        }
        if has_weights && has_bias {
            self.leave_room(node, &mut operands, record)?;
        }
        let types: Vec<&TensorType> = operands.iter().map(|&v| self.new.ty(v)).collect();
        if has_bias && let Err(why) = bias_fits(&types) {
            return Ok(Err(why));
        }
        let constant = |slot: usize| self.new.constant_value(operands[slot]);
        let (weights, bias) =
            (has_weights.then(|| constant(1)).flatten(), has_bias.then(|| constant(2)).flatten());
        let name = &self.old.node(node).name;
        let mut refusals = Vec::new();
        for mode in modes(self.ctx.options.requant) {
            let (op, requantizer) = integer_product(&product, mode, output, &types, weights, bias);
            if let Err(why) = requantizer.and_then(|_| op.infer(&types)) {
                refusals.push(why.to_string());
                continue;
            }
            if !refusals.is_empty() {
                record.declined(name, format!("requantizes in mode {mode}: {}", refusals.join("; ")));
            }
            return Ok(Ok((op, operands)));
        }
        Ok(Err(refusals.join("; ")))
    }
}

/// The most that a sum may reach: a quarter of it is left for the zero point of the result.
const MOST_SUM: i64 = i32::MAX as i64 / 4 * 3;

/// Weights and bias of which some channels are on coarser grids.
struct Coarsened {
    weights: (Tensor, TensorType),
    bias: (Tensor, TensorType),
    /// How many channels.
    channels: usize,
}

/// Puts the weights of channels whose bias fills the 32 bits of a sum, as quantizers make them for channels of next to no
/// weight, on grids 2, 4, 8… times coarser, until products fit beside the bias. Beside such a bias a step of the
/// weights is nothing: half a step of each of K weights changes a result by K·255/2^30 of what the bias is, at most.
fn coarsened(
    (weights, weights_ty): (&Tensor, &TensorType),
    (bias, bias_ty): (&Tensor, &TensorType),
    axis: usize,
) -> Result<Option<Coarsened>, OpError> {
    let (Some(params), Some(bias_params)) = (&weights_ty.quant, &bias_ty.quant) else { return Ok(None) };
    let channels = bias.shape().elements();
    if params.axis() != Some(axis) || bias_params.axis() != Some(0) || channels == 0 {
        return Ok(None);
    }
    let inner: usize = weights.shape()[axis + 1..].iter().product();
    let channel = |i: usize| i / inner % channels;
    let (codes, offsets) = (weights.as_slice::<i8>()?, bias.as_slice::<i32>()?);
    let mut products = vec![0i64; channels];
    for (c, run) in channel_runs(codes, weights.shape(), axis) {
        products[c] += run.iter().map(|&w| i64::from(w).abs() * 255).sum::<i64>();
    }
    let shift = |(&b, &p): (&i32, &i64)| {
        let sum = i64::from(b).abs() + p;
        (0..31).find(|s| sum >> s <= MOST_SUM).unwrap_or(31)
    };
    let shifts: Vec<i32> = offsets.iter().zip(&products).map(shift).collect();
    let coarse = shifts.iter().filter(|&&s| s > 0).count();
    if coarse == 0 {
        return Ok(None);
    }
    let part = |x: f64, c: usize| (x / f64::from(1u32 << shifts[c])).round_ties_even();
    let scales = |p: &QuantParams| (0..channels).map(|c| p.at(c).0 * (1u32 << shifts[c]) as f32).collect();
    let finer = codes.iter().enumerate().map(|(i, &w)| part(w.into(), channel(i)) as i8).collect();
    let lower = offsets.iter().enumerate().map(|(c, &b)| part(b.into(), c) as i32).collect();
    let typed = |tensor: Tensor, params: &QuantParams, axis: usize| {
        let params = QuantParams::per_axis(axis, scales(params), vec![0; channels])?;
        let ty = TensorType::quantized(tensor.dtype(), tensor.shape().clone(), params)?;
        Ok::<_, OpError>((tensor, ty))
    };
    Ok(Some(Coarsened {
        weights: typed(Tensor::from_vec::<i8>(weights.shape().clone(), finer)?, params, axis)?,
        bias: typed(Tensor::from_vec::<i32>(bias.shape().clone(), lower)?, bias_params, 0)?,
        channels: coarse,
    }))
}

/// The wanted mode, then those that can express more.
fn modes(wanted: RequantMode) -> Vec<RequantMode> {
    let mut modes = vec![wanted];
    modes.extend([RequantMode::Shift, RequantMode::Float].into_iter().filter(|&m| m != wanted));
    modes
}

/// The integer op, and whether its mode can express it.
fn integer_product(
    product: &Product,
    requant: RequantMode,
    output: OutputGrid,
    types: &[&TensorType],
    weights: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> (Op, Result<Requantizer, OpError>) {
    let sums = |axis: usize| match weights {
        Some(weights) => WeightSums::by_channel(weights, axis).map_err(OpError::from),
        None => Err(OpError::unsupported("its weights are not constant")),
    };
    match product {
        Product::Conv(c) => {
            let q = QConv {
                window: c.window.clone(),
                groups: c.groups,
                layout: c.layout,
                bias: c.bias,
                residual: c.residual,
                requant,
                output,
            };
            let sums = sums(QConv::CHANNEL_AXIS);
            let requantizer = sums.and_then(|sums| q.requantizer(types, &sums, bias));
            (q.into(), requantizer)
        }
        Product::MatMul(m) => {
            let q = QMatMul { bias: m.bias, residual: m.residual, requant, output };
            let requantizer = match QMatMul::is_of_activations(types) {
                true => q.requantizer_of_activations(types, bias),
                false => sums(QMatMul::CHANNEL_AXIS).and_then(|sums| q.requantizer(types, &sums, bias)),
            };
            (q.into(), requantizer)
        }
    }
}

/// Whether the bias is in units of s_x·s_w, as integer ops take it.
fn bias_fits(types: &[&TensorType]) -> Result<(), String> {
    let (Some((s_x, _)), Some(w), Some(b)) = (types[0].per_tensor(), &types[1].quant, &types[2].quant) else {
        return Err("its input, weights or bias have no usable grid".into());
    };
    for c in 0..types[2].shape.elements() {
        let (unit, expected) = (f64::from(b.at(c).0), f64::from(s_x) * f64::from(w.at(c).0));
        if (unit / expected - 1.0).abs() > 1e-6 {
            return Err(format!("its bias is in steps of {unit}, not of {expected} (input times weights)"));
        }
    }
    Ok(())
}

fn full_range(f: &FakeQuant) -> bool {
    f.dtype.integer_range() == Some((f.lo.into(), f.hi.into()))
}

/// The codes of a constant, as its fake-quantization rounds it.
fn integers(tensor: &Tensor, f: &FakeQuant) -> Result<(Tensor, TensorType), OpError> {
    let shape = tensor.shape().clone();
    let elements = tensor.as_slice::<f32>()?;
    let tensor = match f.dtype {
        DType::U8 => Tensor::from_vec(shape, codes(elements, tensor.shape(), f, |q| q as u8))?,
        DType::S8 => Tensor::from_vec(shape, codes(elements, tensor.shape(), f, |q| q as i8))?,
        DType::S32 => Tensor::from_vec(shape, codes(elements, tensor.shape(), f, |q| q))?,
        other => return Err(OpError::unsupported(format!("constants of {other}"))),
    };
    let ty = TensorType::quantized(f.dtype, tensor.shape().clone(), f.params.clone())?;
    Ok((tensor, ty))
}

fn codes<T>(elements: &[f32], shape: &[usize], f: &FakeQuant, narrow: impl Fn(i32) -> T) -> Vec<T> {
    let mut codes = Vec::with_capacity(elements.len());
    let mut put = |channel: usize, run: &[f32]| {
        let (scale, zero_point) = f.params.at(channel);
        codes.extend(run.iter().map(|&x| narrow(numerics::quantize(x, scale, zero_point, f.lo, f.hi))));
    };
    match f.params.axis() {
        Some(axis) => channel_runs(elements, shape, axis).for_each(|(c, run)| put(c, run)),
        None => put(0, elements),
    }
    codes
}
