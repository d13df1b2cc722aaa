//! Functions of elements.

use super::{
    Lowerer, Lowering, is_generated,
    norm::{self, Normalized},
    quantize::ByGrid,
    shape::attributes,
};
use crate::{
    CodegenError,
    kernels::{
        lanes::{Elementwise, FloatComparison, IntegerComparison, Lanes},
        map::{self, View},
        math::{self, has_unary},
    },
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OutputGrid,
    numerics::{AddRescale, MulRescale},
    ops::{BinaryKind, QBinaryRescale, UnaryKind},
};
use std::collections::BTreeMap;

pub(super) const UNARY: Lowerer = Lowerer { supported: unary_supported, lower: unary };
pub(super) const BINARY: Lowerer = Lowerer { supported: binary_supported, lower: chain };
pub(super) const Q_UNARY: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: q_unary };
pub(super) const Q_BINARY: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: chain };
pub(super) const WHERE: Lowerer = Lowerer { supported: where_supported, lower: chain };
pub(super) const CAST: Lowerer = Lowerer { supported: cast_supported, lower: cast };

/// One node as a function of elements: first its operands', then those of constants that it brings along.
enum Function {
    Unary(UnaryKind),
    Binary(BinaryOf),
    Rescaled(Rescaled),
    Where,
    Conversion(Conversion),
    ByGrid(ByGrid),
    Normalized,
}

impl Function {
    /// Of the kernel of this function alone.
    fn name(&self) -> &'static str {
        match self {
            Function::Unary(_) => "unary",
            Function::Binary(_) => "binary",
            Function::Rescaled(_) => "q_binary",
            Function::Where => "where",
            Function::Conversion(_) => "cast",
            Function::ByGrid(by_grid) => by_grid.name(),
            Function::Normalized => "normalize",
        }
    }

    /// The range of the result's type, where the function leaves it to saturate.
    fn bounds(&self) -> Option<(i32, i32)> {
        match self {
            Function::Rescaled(rescaled) => rescaled.output.dtype.integer_range(),
            _ => None,
        }
        .map(|(lo, hi)| (lo as i32, hi as i32))
    }
}

impl Elementwise for Function {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        match self {
            Function::Unary(kind) => kind.apply(l, operands),
            Function::Binary(binary) => binary.apply(l, operands),
            Function::Rescaled(rescaled) => rescaled.apply(l, operands),
            Function::Where => Choice.apply(l, operands),
            Function::Conversion(conversion) => conversion.apply(l, operands),
            Function::ByGrid(by_grid) => by_grid.apply(l, operands),
            Function::Normalized => Normalized.apply(l, operands),
        }
    }
}

/// Whether each element of the result is computed from one of each operand, by a [`Function`].
fn is_function(graph: &Graph, node: NodeId) -> bool {
    use Op::*;
    match graph.op(node) {
        Some(Unary(op)) => op.kind != UnaryKind::Identity,
        Some(Cast(op)) => graph.ty(graph.operand(node, 0)).dtype != op.to,
        Some(
            Binary(_) | Where(_) | QBinary(_) | Quantize(_) | Dequantize(_) | FakeQuant(_) | Normalize(_),
        ) => true,
        _ => false,
    }
}

/// Most nodes of a chain: what is beyond would have more values than registers.
const MAX_CHAIN: usize = 12;
/// Most elements that one of a chain is computed from.
const MAX_OPERANDS: usize = 8;

/// Of a chain that ends with a node.
#[derive(Clone, Copy)]
struct Extent {
    nodes: usize,
    operands: usize,
}

/// Nodes whose elements are used by one other function of elements only, and that one: their values never come to memory.
/// `is_taken` tells nodes that are part of something else.
pub(super) fn chains(graph: &Graph, is_taken: impl Fn(NodeId) -> bool) -> BTreeMap<NodeId, NodeId> {
    let is_free = |node: &NodeId| is_function(graph, *node) && !is_taken(*node) && is_generated(graph, *node);
    let mut chained = BTreeMap::new();
    let mut extents: BTreeMap<NodeId, Extent> = BTreeMap::new();
    for node in graph.order().into_iter().filter(is_free) {
        let operands = graph.operands(node);
        let mut own = Extent { nodes: 1, operands: operands.len() + constants(graph, node) };
        for operand in operands {
            let Some(&inner) = extents.get(&operand.node) else { continue };
            let nodes = own.nodes + inner.nodes;
            let operands = own.operands + inner.operands - 1;
            if nodes <= MAX_CHAIN
                && operands <= MAX_OPERANDS
                && graph.sole_use(operand).is_some()
                && graph.shape(operand) == graph.shape(node.out())
            {
                own = Extent { nodes, operands };
                chained.insert(operand.node, node);
            }
        }
        extents.insert(node, own);
    }
    chained
}

/// How many operands a node brings along beside its own.
fn constants(graph: &Graph, node: NodeId) -> usize {
    match graph.op(node) {
        Some(Op::Normalize(_)) => norm::CONSTANTS,
        _ => ByGrid::of(graph, node).map_or(0, |by_grid| by_grid.constants()),
    }
}

/// The node that is chained to this one and gives it this operand.
pub(super) fn linked(cx: &Lowering, node: NodeId, slot: usize) -> Option<NodeId> {
    let inner = cx.graph.operand(node, slot).node;
    (is_function(cx.graph, inner) && cx.plan.fused_into.get(&inner) == Some(&node)).then_some(inner)
}

/// The step of a node and of those that are chained to it.
pub(super) fn chain(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let dims = cx.graph.shape(node.out()).to_vec();
    let mut chain = Chain::default();
    chain.add(cx, node, &dims)?;
    let (result, work) = (cx.result_view(node)?, cx.current_work());
    let kernel = match &chain.links[..] {
        [(function, _)] => function.name(),
        _ => "elementwise",
    };
    let operands = std::mem::take(&mut chain.operands);
    map::elementwise(cx, kernel, &dims, &operands, &result, work, chain)
}

/// Functions of elements, each of elements in memory or of those before it. The last one's are the result.
#[derive(Default)]
struct Chain {
    operands: Vec<View>,
    links: Vec<(Function, Vec<Source>)>,
}

/// Where a function of a chain has an element from.
#[derive(Clone, Copy)]
enum Source {
    Operand(usize),
    Link(usize),
}

impl Chain {
    /// Adds a node, behind those whose results only it uses.
    fn add(&mut self, cx: &mut Lowering, node: NodeId, dims: &[usize]) -> Result<Source, CodegenError> {
        let mut sources = Vec::new();
        for slot in 0..cx.graph.operands(node).len() {
            sources.push(match linked(cx, node, slot) {
                Some(inner) => self.add(cx, inner, dims)?,
                None => {
                    let view = cx.broadcast_view(node, slot, dims)?;
                    self.operand(view)
                }
            });
        }
        let (function, constants) = function(cx, node)?;
        sources.extend(constants.into_iter().map(|view| self.operand(view)));
        self.links.push((function, sources));
        Ok(Source::Link(self.links.len() - 1))
    }

    fn operand(&mut self, view: View) -> Source {
        let known = self.operands.iter().position(|v| v.is_same_place(&view));
        Source::Operand(known.unwrap_or_else(|| {
            self.operands.push(view);
            self.operands.len() - 1
        }))
    }
}

impl Elementwise for Chain {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let mut results: Vec<L::Value> = Vec::with_capacity(self.links.len());
        for (function, sources) in &self.links {
            let sources: Vec<L::Value> = sources
                .iter()
                .map(|&source| match source {
                    Source::Operand(i) => operands[i],
                    Source::Link(i) => results[i],
                })
                .collect();
            let result = function.apply(l, &sources);
            let is_last = results.len() + 1 == self.links.len();
            results.push(match function.bounds() {
                // Saturates, as it would on its way to memory.
                Some((lo, hi)) if !is_last => {
                    let (lo, hi) = (l.i32(lo), l.i32(hi));
                    let above = l.imax(result, lo);
                    l.imin(above, hi)
                }
                _ => result,
            });
        }
        // A chain has at least the node that it ends with.
        results[results.len() - 1]
    }
}

/// A node as a function of elements, and the constants that it brings along.
fn function(cx: &mut Lowering, node: NodeId) -> Result<(Function, Vec<View>), CodegenError> {
    let types = cx.operand_types(node);
    let rank = cx.graph.shape(node.out()).len();
    let function = match cx.graph.op(node) {
        Some(Op::Unary(op)) => Function::Unary(op.kind),
        Some(Op::Binary(op)) => Function::Binary(BinaryOf { kind: op.kind, dtype: types[0].dtype }),
        Some(Op::QBinary(op)) => {
            let rescale = op.rescale(&types).map_err(|e| cx.refuse(node, e))?;
            let zero_points = [0, 1].map(|slot| types[slot].per_tensor().map_or(0, |(_, z)| z));
            let signed = [0, 1].map(|slot| types[slot].dtype.is_signed());
            Function::Rescaled(Rescaled { rescale, zero_points, signed, output: op.output })
        }
        Some(Op::Where(_)) => Function::Where,
        Some(Op::Cast(op)) => Function::Conversion(Conversion { from: types[0].dtype, to: op.to }),
        Some(Op::Normalize(op)) => return Ok((Function::Normalized, norm::constants(cx, op, rank)?)),
        op => match ByGrid::of(cx.graph, node) {
            Some(by_grid) => {
                let views = by_grid.views(cx, rank)?;
                return Ok((Function::ByGrid(by_grid), views));
            }
            None => {
                return Err(CodegenError::Unsupported {
                    node: cx.graph.node(node).name.clone(),
                    op: op.map_or("nothing", Op::mnemonic),
                    reason: "is no function of elements".into(),
                });
            }
        },
    };
    Ok((function, vec![]))
}

fn unary_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::Unary(op)) = graph.op(node) else { return Ok(()) };
    let x = graph.ty(graph.operand(node, 0));
    match (op.kind, x.dtype) {
        (UnaryKind::Identity, _) | (UnaryKind::Not, DType::Bool) => Ok(()),
        (kind, DType::F32) if has_unary(kind) => Ok(()),
        (kind, _) => Err(format!("no vector form of {kind:?} of {}", x.dtype)),
    }
}

fn unary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    match attributes!(cx, node, Unary).kind {
        UnaryKind::Identity => moved(cx, node, "identity"),
        _ => chain(cx, node),
    }
}

/// A function that changes nothing.
fn moved(cx: &mut Lowering, node: NodeId, kernel: &str) -> Result<(), CodegenError> {
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    map::copy(cx, kernel, &dims, operand, result)
}

impl Elementwise for UnaryKind {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        match self {
            UnaryKind::Not => {
                let one = l.i32(1);
                l.xor(operands[0], one)
            }
            _ => math::unary(l, *self, operands[0]),
        }
    }
}

fn binary_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    use BinaryKind::*;
    let Some(Op::Binary(op)) = graph.op(node) else { return Ok(()) };
    let dtype = graph.ty(graph.operand(node, 0)).dtype;
    match (op.kind, dtype) {
        (Pow, _) => Err("powers are computed by the library".into()),
        (Modulo | Remainder | ShiftLeft | ShiftRight, _) => Err(format!("no vector form of {:?}", op.kind)),
        (Div, DType::S32) => Err("an integer division may fail".into()),
        (_, DType::F32 | DType::S32) => Ok(()),
        (And | Or | Xor, DType::Bool) => Ok(()),
        (kind, _) => Err(format!("no vector form of {kind:?} of {dtype}")),
    }
}

/// A function of two elements of a type.
struct BinaryOf {
    kind: BinaryKind,
    dtype: DType,
}

impl Elementwise for BinaryOf {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let (x, y) = (operands[0], operands[1]);
        match self.dtype {
            DType::F32 => binary_f32(l, self.kind, x, y),
            _ => binary_integer(l, self.kind, x, y),
        }
    }
}

fn binary_f32<L: Lanes>(l: &mut L, kind: BinaryKind, x: L::Value, y: L::Value) -> L::Value {
    use BinaryKind::*;
    let compare = |l: &mut L, how, x, y| {
        let mask = l.compare_f32(how, x, y);
        l.truth(mask)
    };
    match kind {
        Add => l.fadd(x, y),
        Sub => l.fsub(x, y),
        Mul => l.fmul(x, y),
        Div => l.fdiv(x, y),
        // NaN if either operand is: `larger` and `smaller` give y where one is NaN.
        Max | Min => {
            let z = if kind == Max { l.larger(x, y) } else { l.smaller(x, y) };
            let nan = l.is_nan(x);
            l.select(nan, x, z)
        }
        Equal => compare(l, FloatComparison::Equal, x, y),
        Less => compare(l, FloatComparison::Less, x, y),
        LessOrEqual => compare(l, FloatComparison::LessOrEqual, x, y),
        Greater => compare(l, FloatComparison::Less, y, x),
        GreaterOrEqual => compare(l, FloatComparison::LessOrEqual, y, x),
        PRelu => {
            let product = l.fmul(x, y);
            let negative = l.is_negative(x);
            l.select(negative, product, x)
        }
        Pow | Modulo | Remainder | And | Or | Xor | ShiftLeft | ShiftRight => x,
    }
}

/// Of s32, wrapping, and of truth values.
fn binary_integer<L: Lanes>(l: &mut L, kind: BinaryKind, x: L::Value, y: L::Value) -> L::Value {
    use BinaryKind::*;
    let compare = |l: &mut L, how, x, y| {
        let mask = l.compare_i32(how, x, y);
        l.truth(mask)
    };
    let not_greater = |l: &mut L, x, y| {
        let greater = compare(l, IntegerComparison::Greater, x, y);
        let one = l.i32(1);
        l.xor(greater, one)
    };
    match kind {
        Add => l.iadd(x, y),
        Sub => l.isub(x, y),
        Mul => l.imul(x, y),
        Max => l.imax(x, y),
        Min => l.imin(x, y),
        Equal => compare(l, IntegerComparison::Equal, x, y),
        Less => compare(l, IntegerComparison::Greater, y, x),
        Greater => compare(l, IntegerComparison::Greater, x, y),
        LessOrEqual => not_greater(l, x, y),
        GreaterOrEqual => not_greater(l, y, x),
        And => l.and(x, y),
        Or => l.or(x, y),
        Xor => l.xor(x, y),
        PRelu => {
            let product = l.imul(x, y);
            let zero = l.i32(0);
            let negative = l.compare_i32(IntegerComparison::Greater, zero, x);
            l.select(negative, product, x)
        }
        Div | Pow | Modulo | Remainder | ShiftLeft | ShiftRight => x,
    }
}

fn where_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    match graph.ty(node.out()).dtype {
        dtype if dtype.size() <= 4 && !matches!(dtype, DType::F16 | DType::BF16 | DType::U32) => Ok(()),
        dtype => Err(format!("no vector form of Where of {dtype}")),
    }
}

/// One of two elements, as a truth value says.
struct Choice;

impl Elementwise for Choice {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let zero = l.i32(0);
        let is_false = l.compare_i32(IntegerComparison::Equal, operands[0], zero);
        l.select(is_false, operands[2], operands[1])
    }
}

fn q_unary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, QUnary);
    let table = op.table(cx.operand_types(node)[0]).map_err(|e| cx.refuse(node, e))?;
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let work = cx.current_work();
    map::lookup(cx, "q_unary", &dims, operand, &result, work, &table)
}

/// A sum or a product of codes.
struct Rescaled {
    rescale: QBinaryRescale,
    zero_points: [i32; 2],
    /// Whether operands are of a signed type.
    signed: [bool; 2],
    output: OutputGrid,
}

impl Elementwise for Rescaled {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let code = match self.rescale {
            QBinaryRescale::Add(r) => self.fixed_sum(l, operands, r),
            QBinaryRescale::Mul(r) => self.fixed_product(l, operands, r),
            QBinaryRescale::FloatAdd(r) => {
                let [x, y] = [0, 1].map(|i| l.to_f32(operands[i]));
                let (r1, r2, c) = (l.f32(r.r1), l.f32(r.r2), l.f32(r.c));
                let second = l.multiply_add(y, r2, c);
                let sum = l.multiply_add(x, r1, second);
                l.round(sum)
            }
            QBinaryRescale::FloatMul(r) => {
                let product = self.product(l, operands);
                let product = l.to_f32(product);
                let (factor, zero) = (l.f32(r.r), l.f32(r.z));
                let steps = l.fmul(product, factor);
                let code = l.fadd(steps, zero);
                l.round(code)
            }
        };
        self.clamped(l, code)
    }
}

impl Rescaled {
    fn fixed_sum<L: Lanes>(&self, l: &mut L, operands: &[L::Value], r: AddRescale) -> L::Value {
        // Zero points are part of a constant; that of a signed type is moved by half its range, and so are its codes, which
        // must not be negative here.
        let offset = self.signed.map(|signed| if signed { 128 } else { 0 });
        let [x, y] = [0, 1].map(|i| match offset[i] {
            0 => operands[i],
            offset => {
                let offset = l.i32(offset);
                l.iadd(operands[i], offset)
            }
        });
        let zero = |i: usize| self.zero_points[i] + offset[i];
        let sum = l.weighted_sum(x, y, r.m1, r.m2);
        let less = i32::from(r.m1) * zero(0) + i32::from(r.m2) * zero(1);
        let constant = l.i32((1 << (r.s - 1)) - less);
        let sum = l.iadd(sum, constant);
        self.shifted(l, sum, r.s)
    }

    fn fixed_product<L: Lanes>(&self, l: &mut L, operands: &[L::Value], r: MulRescale) -> L::Value {
        let product = self.product(l, operands);
        let m = l.i32(r.m.into());
        let product = l.imul(product, m);
        let half = l.i32(1 << (r.s - 1));
        let product = l.iadd(product, half);
        self.shifted(l, product, r.s)
    }

    /// Of the operands less their zero points.
    fn product<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let [x, y] = [0, 1].map(|i| {
            let zero = l.i32(self.zero_points[i]);
            l.isub(operands[i], zero)
        });
        l.imul(x, y)
    }

    fn shifted<L: Lanes>(&self, l: &mut L, sum: L::Value, shift: u32) -> L::Value {
        let steps = l.shift_right(sum, shift);
        let zero = l.i32(self.output.zero_point);
        l.iadd(steps, zero)
    }

    /// Within those bounds of the grid that the type does not have by itself.
    fn clamped<L: Lanes>(&self, l: &mut L, code: L::Value) -> L::Value {
        let OutputGrid { dtype, lo, hi, .. } = self.output;
        let (least, most) = dtype.integer_range().unwrap_or_default();
        let mut code = code;
        if i64::from(lo) > least {
            let lo = l.i32(lo);
            code = l.imax(code, lo);
        }
        if i64::from(hi) < most {
            let hi = l.i32(hi);
            code = l.imin(code, hi);
        }
        code
    }
}

fn cast_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::Cast(op)) = graph.op(node) else { return Ok(()) };
    let from = graph.ty(graph.operand(node, 0)).dtype;
    match (from, op.to) {
        (from, to) if from == to => Ok(()),
        (DType::U8 | DType::S8 | DType::U16 | DType::S16 | DType::S32 | DType::Bool, DType::F32) => Ok(()),
        (DType::F32, DType::S32) => Ok(()),
        (DType::U8 | DType::S8 | DType::U16 | DType::S16 | DType::Bool, DType::S32) => Ok(()),
        (from, to) => Err(format!("no vector form of {from} to {to}")),
    }
}

fn cast(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    match is_function(cx.graph, node) {
        true => chain(cx, node),
        false => moved(cx, node, "cast"),
    }
}

/// Between f32 and integers.
struct Conversion {
    from: DType,
    to: DType,
}

impl Elementwise for Conversion {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let x = operands[0];
        match (self.from, self.to) {
            (DType::F32, _) => saturated(l, x),
            (_, DType::F32) => l.to_f32(x),
            _ => x,
        }
    }
}

/// A float towards 0, within s32; 0 of NaN.
fn saturated<L: Lanes>(l: &mut L, x: L::Value) -> L::Value {
    // Below the range the conversion gives the least integer by itself.
    let integer = l.truncate(x);
    let beyond = l.f32(-(i32::MIN as f32));
    let fits = l.less(x, beyond);
    let most = l.i32(i32::MAX);
    let integer = l.select(fits, integer, most);
    let (zero, nan) = (l.i32(0), l.is_nan(x));
    l.select(nan, zero, integer)
}
