//! Functions of elements.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        lanes::{Elementwise, FloatComparison, IntegerComparison, Lanes},
        map,
        math::{self, has_unary},
    },
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OutputGrid,
    ops::{BinaryKind, QBinaryRescale, UnaryKind},
};

pub(super) const UNARY: Lowerer = Lowerer { supported: unary_supported, lower: unary };
pub(super) const BINARY: Lowerer = Lowerer { supported: binary_supported, lower: binary };
pub(super) const Q_UNARY: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: q_unary };
pub(super) const Q_BINARY: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: q_binary };
pub(super) const CAST: Lowerer = Lowerer { supported: cast_supported, lower: cast };

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
    let kind = attributes!(cx, node, Unary).kind;
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    if kind == UnaryKind::Identity {
        return map::copy(cx, "identity", &dims, operand, result);
    }
    let work = cx.current_work();
    map::elementwise(cx, "unary", &dims, &[operand], &result, work, kind)
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
        (Div, DType::S32) => Err("an integer division may fail".into()),
        (_, DType::F32 | DType::S32) => Ok(()),
        (And | Or | Xor, DType::Bool) => Ok(()),
        (kind, _) => Err(format!("no vector form of {kind:?} of {dtype}")),
    }
}

fn binary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let kind = attributes!(cx, node, Binary).kind;
    let dims = cx.graph.shape(node.out()).to_vec();
    let dtype = cx.operand_types(node)[0].dtype;
    let operands = [cx.broadcast_view(node, 0, &dims)?, cx.broadcast_view(node, 1, &dims)?];
    let result = cx.result_view(node)?;
    let work = cx.current_work();
    map::elementwise(cx, "binary", &dims, &operands, &result, work, BinaryOf { kind, dtype })
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
        Pow | And | Or | Xor => x,
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
        Div | Pow => x,
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

fn q_binary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, QBinary);
    let types = cx.operand_types(node);
    let rescale = op.rescale(&types).map_err(|e| cx.refuse(node, e))?;
    let zero_points = [0, 1].map(|slot| types[slot].per_tensor().map_or(0, |(_, z)| z));
    let function = Rescaled { rescale, zero_points, output: op.output };
    let dims = cx.graph.shape(node.out()).to_vec();
    let operands = [cx.broadcast_view(node, 0, &dims)?, cx.broadcast_view(node, 1, &dims)?];
    let result = cx.result_view(node)?;
    let work = cx.current_work();
    map::elementwise(cx, "q_binary", &dims, &operands, &result, work, function)
}

/// A sum or a product of codes.
struct Rescaled {
    rescale: QBinaryRescale,
    zero_points: [i32; 2],
    output: OutputGrid,
}

impl Elementwise for Rescaled {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let [x, y] = [0, 1].map(|i| {
            let zero = l.i32(self.zero_points[i]);
            l.isub(operands[i], zero)
        });
        let (sum, shift) = match self.rescale {
            QBinaryRescale::Add(r) => (l.weighted_sum(x, y, r.m1, r.m2), r.s),
            QBinaryRescale::Mul(r) => {
                let product = l.imul(x, y);
                let m = l.i32(r.m.into());
                (l.imul(product, m), r.s)
            }
        };
        // (x + 2^(s−1)) >> s, then onto the grid.
        let half = l.i32(1 << (shift - 1));
        let sum = l.iadd(sum, half);
        let steps = l.shift_right(sum, shift);
        let zero = l.i32(self.output.zero_point);
        let code = l.iadd(steps, zero);
        let (lo, hi) = (l.i32(self.output.lo), l.i32(self.output.hi));
        let above = l.imax(code, lo);
        l.imin(above, hi)
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
    let to = attributes!(cx, node, Cast).to;
    let from = cx.operand_types(node)[0].dtype;
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    if from == to {
        return map::copy(cx, "cast", &dims, operand, result);
    }
    let work = cx.current_work();
    map::elementwise(cx, "cast", &dims, &[operand], &result, work, Conversion { from, to })
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
