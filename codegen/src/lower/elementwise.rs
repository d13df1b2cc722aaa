//! Functions of elements.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        map,
        math::{self, has_unary},
        vector::{
            codes, i8x16, i16x8, i32x4, larger, less, lookup, select, shuffle, smaller, to_i32, truth,
            vector_type, widen8, widen16,
        },
    },
};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    condcodes::{FloatCC, IntCC},
    types::{F32X4, I16X8, I32X4},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{
    DType, Graph, NodeId, Op,
    numerics::{AddRescale, MulRescale},
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
    let work = cx.current_work();
    map::map(cx, "unary", &dims, &[operand], &result, work, |b, loaded| {
        if kind == UnaryKind::Not {
            let one = i8x16(b, 1);
            let zero = i8x16(b, 0);
            let is_false = b.ins().icmp(IntCC::Equal, loaded[0][0], zero);
            return vec![b.ins().band(is_false, one)];
        }
        loaded[0].iter().map(|&x| math::unary(b, kind, x)).collect()
    })
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
    map::map(cx, "binary", &dims, &operands, &result, work, |b, loaded| {
        let values: Vec<Value> = loaded[0]
            .iter()
            .zip(&loaded[1])
            .map(|(&x, &y)| match dtype {
                DType::F32 => binary_f32(b, kind, x, y),
                DType::S32 => binary_s32(b, kind, x, y),
                _ => binary_bool(b, kind, x, y),
            })
            .collect();
        if kind.is_comparison() { vec![truth(b, &values)] } else { values }
    })
}

/// The lanes of a float function; masks for comparisons.
fn binary_f32(b: &mut FunctionBuilder, kind: BinaryKind, x: Value, y: Value) -> Value {
    use BinaryKind::*;
    let compare = |b: &mut FunctionBuilder, condition| b.ins().fcmp(condition, x, y);
    match kind {
        Add => b.ins().fadd(x, y),
        Sub => b.ins().fsub(x, y),
        Mul => b.ins().fmul(x, y),
        Div => b.ins().fdiv(x, y),
        // NaN if either operand is: `larger` and `smaller` give y where one is NaN.
        Max => {
            let z = larger(b, x, y);
            let nan = b.ins().fcmp(FloatCC::Unordered, x, x);
            select(b, nan, x, z)
        }
        Min => {
            let z = smaller(b, x, y);
            let nan = b.ins().fcmp(FloatCC::Unordered, x, x);
            select(b, nan, x, z)
        }
        Equal => compare(b, FloatCC::Equal),
        Less => less(b, x, y),
        LessOrEqual => compare(b, FloatCC::LessThanOrEqual),
        Greater => less(b, y, x),
        GreaterOrEqual => compare(b, FloatCC::GreaterThanOrEqual),
        Pow | And | Or | Xor => x,
    }
}

/// The lanes of an integer function, wrapping; masks for comparisons.
fn binary_s32(b: &mut FunctionBuilder, kind: BinaryKind, x: Value, y: Value) -> Value {
    use BinaryKind::*;
    match kind {
        Add => b.ins().iadd(x, y),
        Sub => b.ins().isub(x, y),
        Mul => b.ins().imul(x, y),
        Max => b.ins().smax(x, y),
        Min => b.ins().smin(x, y),
        Equal => b.ins().icmp(IntCC::Equal, x, y),
        Less => b.ins().icmp(IntCC::SignedLessThan, x, y),
        LessOrEqual => b.ins().icmp(IntCC::SignedLessThanOrEqual, x, y),
        Greater => b.ins().icmp(IntCC::SignedGreaterThan, x, y),
        GreaterOrEqual => b.ins().icmp(IntCC::SignedGreaterThanOrEqual, x, y),
        Div | Pow | And | Or | Xor => x,
    }
}

/// Of truth values, any byte but 0 being true.
fn binary_bool(b: &mut FunctionBuilder, kind: BinaryKind, x: Value, y: Value) -> Value {
    let one = i8x16(b, 1);
    let (x, y) = (b.ins().umin(x, one), b.ins().umin(y, one));
    match kind {
        BinaryKind::And => b.ins().band(x, y),
        BinaryKind::Or => b.ins().bor(x, y),
        _ => b.ins().bxor(x, y),
    }
}

fn q_unary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, QUnary);
    let table = op.table(cx.operand_types(node)[0]).map_err(|e| cx.refuse(node, e))?;
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let work = cx.current_work();
    map::map(cx, "q_unary", &dims, &[operand], &result, work, |b, loaded| {
        vec![lookup(b, loaded[0][0], &table)]
    })
}

fn q_binary(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, QBinary);
    let types = cx.operand_types(node);
    let rescale = op.rescale(&types).map_err(|e| cx.refuse(node, e))?;
    let zero = |slot: usize| types[slot].per_tensor().map_or(0, |(_, z)| z as i16);
    let (z1, z2, output) = (zero(0), zero(1), op.output);
    let dims = cx.graph.shape(node.out()).to_vec();
    let operands = [cx.broadcast_view(node, 0, &dims)?, cx.broadcast_view(node, 1, &dims)?];
    let result = cx.result_view(node)?;
    let work = cx.current_work();
    map::map(cx, "q_binary", &dims, &operands, &result, work, |b, loaded| {
        let (x, y) = (centred(b, loaded[0][0], z1), centred(b, loaded[1][0], z2));
        let sums: Vec<[Value; 2]> = x
            .into_iter()
            .zip(y)
            .map(|(x, y)| match rescale {
                QBinaryRescale::Add(r) => rescaled_sum(b, r, x, y),
                QBinaryRescale::Mul(r) => rescaled_product(b, r, x, y),
            })
            .collect();
        vec![codes(b, &sums.concat(), output)]
    })
}

/// u8 codes less their zero point, as two vectors of s16.
fn centred(b: &mut FunctionBuilder, x: Value, zero_point: i16) -> [Value; 2] {
    let zero = i16x8(b, zero_point);
    widen8(b, x, false).map(|x| b.ins().isub(x, zero))
}

/// [`AddRescale::apply`] on eight lanes.
fn rescaled_sum(b: &mut FunctionBuilder, r: AddRescale, x: Value, y: Value) -> [Value; 2] {
    let pair = u32::from(r.m1 as u16) | u32::from(r.m2 as u16) << 16;
    let factors = i32x4(b, pair as i32);
    let factors = crate::kernels::vector::cast(b, I16X8, factors);
    // Operands side by side: one `pmaddwd` multiplies and adds.
    let interleave = |b: &mut FunctionBuilder, first: u8| {
        let pick = std::array::from_fn(|i| {
            let lane = first + (i as u8 / 4);
            lane * 2 + i as u8 % 2 + if i % 4 < 2 { 0 } else { 16 }
        });
        let both = shuffle(b, x, y, pick);
        crate::kernels::vector::cast(b, I16X8, both)
    };
    [0, 4].map(|first| {
        let both = interleave(b, first);
        let sum = multiply_add(b, both, factors);
        rounded_shift(b, sum, r.s)
    })
}

/// `pmaddwd`: sums of products of neighbouring s16.
fn multiply_add(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    let (xl, yl) = (b.ins().swiden_low(x), b.ins().swiden_low(y));
    let (xh, yh) = (b.ins().swiden_high(x), b.ins().swiden_high(y));
    let (low, high) = (b.ins().imul(xl, yl), b.ins().imul(xh, yh));
    b.ins().iadd_pairwise(low, high)
}

/// [`MulRescale::apply`] on eight lanes.
fn rescaled_product(b: &mut FunctionBuilder, r: MulRescale, x: Value, y: Value) -> [Value; 2] {
    let (x, y) = (widen16(b, x, true), widen16(b, y, true));
    let m = i32x4(b, r.m.into());
    [0, 1].map(|i| {
        let product = b.ins().imul(x[i], y[i]);
        let product = b.ins().imul(product, m);
        rounded_shift(b, product, r.s)
    })
}

/// (x + 2^(s−1)) >> s.
fn rounded_shift(b: &mut FunctionBuilder, x: Value, s: u32) -> Value {
    let half = i32x4(b, 1 << (s - 1));
    let x = b.ins().iadd(x, half);
    b.ins().sshr_imm_u(x, i64::from(s))
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
    let work = cx.current_work();
    map::map(cx, "cast", &dims, &[operand], &result, work, |b, loaded| {
        if from == to {
            return loaded[0].clone();
        }
        if from == DType::F32 {
            // Truncates, saturates, and gives 0 for NaN.
            return loaded[0].iter().map(|&x| b.ins().fcvt_to_sint_sat(I32X4, x)).collect();
        }
        let mut x = loaded[0].clone();
        if from == DType::Bool {
            let one = i8x16(b, 1);
            x = vec![b.ins().umin(x[0], one)];
        }
        let integers = to_i32(b, &x, from);
        match to {
            DType::F32 => integers.into_iter().map(|x| b.ins().fcvt_from_sint(F32X4, x)).collect(),
            _ => integers.into_iter().map(|x| crate::kernels::vector::cast(b, vector_type(to), x)).collect(),
        }
    })
}
