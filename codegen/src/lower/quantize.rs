//! Between real numbers and the integers of a grid.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        map::{self, View},
        math::Grid,
        vector::{self, f32x4, from_i32, i32x4, to_i32},
        wide::{self, CodeGrid, Planes},
    },
    module::Location,
};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    types::{F32X4, I32X4},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{DType, Graph, NodeId, Op, QuantParams};

pub(super) const QUANTIZE: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: quantize };
pub(super) const DEQUANTIZE: Lowerer = Lowerer { supported: dequantize_supported, lower: dequantize };
pub(super) const FAKE_QUANT: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: fake_quant };

/// A grid as operands of the elementwise kernel: none for one grid for all, else one view for each constant.
struct GridViews {
    params: QuantParams,
    lo: i32,
    hi: i32,
    views: Vec<View>,
}

impl GridViews {
    fn new(
        cx: &mut Lowering,
        params: &QuantParams,
        (lo, hi): (i32, i32),
        rank: usize,
    ) -> Result<GridViews, CodegenError> {
        let mut views = Vec::new();
        if params.axis().is_some() {
            let zeros = params.zero_points();
            let bound = |bound: i32| -> Vec<u8> {
                zeros.iter().flat_map(|&z| ((bound - z) as f32).to_le_bytes()).collect()
            };
            let tables = [
                (DType::F32, params.scales().iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>()),
                (DType::S32, zeros.iter().flat_map(|z| z.to_le_bytes()).collect()),
                (DType::F32, bound(lo)),
                (DType::F32, bound(hi)),
            ];
            for (dtype, bytes) in tables {
                let at = Location::Weights(cx.weights(&bytes, 16)?);
                views.push(View::along(at, dtype, params.axis(), rank));
            }
        }
        Ok(GridViews { params: params.clone(), lo, hi, views })
    }

    /// The grid of vector `v` of a block, given the loaded views.
    fn at(&self, b: &mut FunctionBuilder, loaded: &[Vec<Value>], v: usize) -> Grid {
        match loaded {
            [scale, zero, least, most] => {
                Grid { scale: scale[v], zero_point: Some(zero[v]), least: least[v], most: most[v] }
            }
            _ => {
                let (scale, zero) = self.params.at(0);
                Grid {
                    scale: f32x4(b, scale),
                    zero_point: (zero != 0).then(|| i32x4(b, zero)),
                    least: f32x4(b, (self.lo - zero) as f32),
                    most: f32x4(b, (self.hi - zero) as f32),
                }
            }
        }
    }
}

fn range(dtype: DType) -> (i32, i32) {
    dtype.integer_range().map_or((0, 0), |(lo, hi)| (lo as i32, hi as i32))
}

fn quantize(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Quantize);
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let (dtype, work) = (op.dtype, cx.current_work());
    if let Some(grid) = CodeGrid::new(&op.params, dtype)
        && let Some(planes) = Planes::new(cx, &dims, &operand, &result)
    {
        return wide::quantize(cx, &planes, (&operand, &result), &grid, work);
    }
    let grid = GridViews::new(cx, &op.params, range(dtype), dims.len())?;
    let mut operands = vec![operand];
    operands.extend(grid.views.iter().cloned());
    map::map(cx, "quantize", &dims, &operands, &result, work, |b, loaded| {
        let codes: Vec<Value> = (0..4)
            .map(|v| {
                let at = grid.at(b, &loaded[1..], v);
                at.quantize(b, loaded[0][v])
            })
            .collect();
        from_i32(b, &codes, dtype)
    })
}

fn dequantize_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let x = graph.ty(graph.operand(node, 0));
    let zeros = x.quant.iter().flat_map(|q| q.zero_points());
    match x.dtype {
        DType::U8 | DType::S8 | DType::U4 | DType::S4 | DType::U16 | DType::S16 => Ok(()),
        DType::S32 if zeros.clone().all(|&z| z == 0) => Ok(()),
        _ => Err(format!("dequantizes 8 and 16 bits, and s32 with zero points 0, not {x}")),
    }
}

fn dequantize(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let x = cx.operand_types(node)[0];
    let Some(params) = &x.quant else { return Ok(()) };
    let dims = x.shape.to_vec();
    let grid = GridViews::new(cx, params, (0, 0), dims.len())?;
    let mut operands = vec![cx.operand_view(node, 0)?];
    operands.extend(grid.views.iter().cloned());
    let result = cx.result_view(node)?;
    let (dtype, work) = (x.dtype, cx.current_work());
    map::map(cx, "dequantize", &dims, &operands, &result, work, |b, loaded| {
        let codes = to_i32(b, &loaded[0], dtype);
        codes
            .into_iter()
            .enumerate()
            .map(|(v, q)| {
                let at = grid.at(b, &loaded[1..], v);
                let steps = at.zero_point.map_or(q, |z| b.ins().isub(q, z));
                let steps = b.ins().fcvt_from_sint(F32X4, steps);
                b.ins().fmul(steps, at.scale)
            })
            .collect()
    })
}

fn fake_quant(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, FakeQuant);
    let dims = cx.graph.shape(node.out()).to_vec();
    let grid = GridViews::new(cx, &op.params, (op.lo, op.hi), dims.len())?;
    let mut operands = vec![cx.operand_view(node, 0)?];
    operands.extend(grid.views.iter().cloned());
    let result = cx.result_view(node)?;
    let work = cx.current_work();
    map::map(cx, "fake_quant", &dims, &operands, &result, work, |b, loaded| {
        (0..4)
            .map(|v| {
                let at = grid.at(b, &loaded[1..], v);
                let steps = at.steps(b, loaded[0][v]);
                // Through an integer: a step of −0.0 becomes 0.
                let steps = b.ins().x86_cvtt2dq(I32X4, steps);
                let steps = b.ins().fcvt_from_sint(vector::vector_type(DType::F32), steps);
                b.ins().fmul(steps, at.scale)
            })
            .collect()
    })
}

/// Whether the op maps each element of one operand, so that a transpose before or behind it can be part of its step.
pub(super) fn maps_elements(op: &Op) -> bool {
    matches!(
        op,
        Op::Quantize(_) | Op::Dequantize(_) | Op::FakeQuant(_) | Op::Unary(_) | Op::QUnary(_) | Op::Cast(_)
    )
}
