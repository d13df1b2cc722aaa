//! Between real numbers and the integers of a grid.

use super::{Lowerer, Lowering, elementwise};
use crate::{
    CodegenError,
    kernels::{
        lanes::{Elementwise, Lanes},
        map::View,
        math::Grid,
        wide::{self, CodeGrid, Planes},
    },
    module::Location,
};
use qcc_ir::{DType, Graph, NodeId, Op, QuantParams};

pub(super) const QUANTIZE: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: quantize };
pub(super) const DEQUANTIZE: Lowerer = Lowerer { supported: dequantize_supported, lower: elementwise::chain };
pub(super) const FAKE_QUANT: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: elementwise::chain };

/// A grid and the bounds of its codes.
struct GridConstants {
    params: QuantParams,
    lo: i32,
    hi: i32,
}

impl GridConstants {
    /// Of a grid for each channel.
    const VIEWS: usize = 4;

    /// Those of a grid for each channel, as operands of the elementwise kernel; none of one grid for all.
    fn views(&self, cx: &mut Lowering, rank: usize) -> Result<Vec<View>, CodegenError> {
        if self.params.axis().is_none() {
            return Ok(vec![]);
        }
        let (scales, zeros) = (self.params.scales(), self.params.zero_points());
        let bound = |bound: i32| -> Vec<u8> {
            zeros.iter().flat_map(|&z| ((bound - z) as f32).to_le_bytes()).collect()
        };
        let tables: [_; GridConstants::VIEWS] = [
            (DType::F32, scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>()),
            (DType::S32, zeros.iter().flat_map(|z| z.to_le_bytes()).collect()),
            (DType::F32, bound(self.lo)),
            (DType::F32, bound(self.hi)),
        ];
        let axis = self.params.axis();
        tables
            .into_iter()
            .map(|(dtype, bytes)| {
                let at = Location::Weights(cx.weights(&bytes, 16)?);
                Ok(View::along(at, dtype, axis, rank))
            })
            .collect()
    }

    /// The grid as lanes, given the loaded views.
    fn at<L: Lanes>(&self, l: &mut L, loaded: &[L::Value]) -> Grid<L::Value> {
        match *loaded {
            [scale, zero, least, most] => Grid { scale, zero_point: Some(zero), least, most },
            _ => {
                let (scale, zero) = self.params.at(0);
                Grid {
                    scale: l.f32(scale),
                    zero_point: (zero != 0).then(|| l.i32(zero)),
                    least: l.f32((self.lo - zero) as f32),
                    most: l.f32((self.hi - zero) as f32),
                }
            }
        }
    }
}

/// From a real number to its code, back, or both.
enum Conversion {
    Quantize,
    Dequantize,
    FakeQuant,
}

/// A conversion by a grid: operands are the element, and the views of the grid.
pub(super) struct ByGrid {
    conversion: Conversion,
    grid: GridConstants,
}

impl ByGrid {
    /// `None` of a node that is no such conversion.
    pub(super) fn of(graph: &Graph, node: NodeId) -> Option<ByGrid> {
        let (conversion, params, (lo, hi)) = match graph.op(node)? {
            Op::Quantize(op) => (Conversion::Quantize, &op.params, range(op.dtype)),
            Op::FakeQuant(op) => (Conversion::FakeQuant, &op.params, (op.lo, op.hi)),
            Op::Dequantize(_) => {
                (Conversion::Dequantize, graph.ty(graph.operand(node, 0)).quant.as_ref()?, (0, 0))
            }
            _ => return None,
        };
        let grid = GridConstants { params: params.clone(), lo, hi };
        Some(ByGrid { conversion, grid })
    }

    /// Of the kernel of this conversion alone.
    pub(super) fn name(&self) -> &'static str {
        match self.conversion {
            Conversion::Quantize => "quantize",
            Conversion::Dequantize => "dequantize",
            Conversion::FakeQuant => "fake_quant",
        }
    }

    /// How many [`views`](Self::views) there are.
    pub(super) fn constants(&self) -> usize {
        if self.grid.params.axis().is_some() { GridConstants::VIEWS } else { 0 }
    }

    /// See [`GridConstants::views`].
    pub(super) fn views(&self, cx: &mut Lowering, rank: usize) -> Result<Vec<View>, CodegenError> {
        self.grid.views(cx, rank)
    }
}

impl Elementwise for ByGrid {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let x = operands[0];
        let grid = self.grid.at(l, &operands[1..]);
        match self.conversion {
            Conversion::Quantize => grid.quantize(l, x),
            Conversion::Dequantize => grid.dequantize(l, x),
            // Through an integer: a step of −0.0 becomes 0.
            Conversion::FakeQuant => {
                let steps = grid.steps(l, x);
                grid.real(l, steps)
            }
        }
    }
}

fn range(dtype: DType) -> (i32, i32) {
    dtype.integer_range().map_or((0, 0), |(lo, hi)| (lo as i32, hi as i32))
}

fn quantize(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    if elementwise::linked(cx, node, 0).is_none() && planes_to_codes(cx, node)? {
        return Ok(());
    }
    elementwise::chain(cx, node)
}

/// Adds the step of planes that become pixels of codes; `false` where it is nothing of the kind.
fn planes_to_codes(cx: &mut Lowering, node: NodeId) -> Result<bool, CodegenError> {
    let Some(Op::Quantize(op)) = cx.graph.op(node) else { return Ok(false) };
    let Some(grid) = CodeGrid::new(&op.params, op.dtype) else { return Ok(false) };
    let dims = cx.graph.shape(node.out()).to_vec();
    let (operand, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let Some(planes) = Planes::new(cx, &dims, &operand, &result) else { return Ok(false) };
    let work = cx.current_work();
    wide::quantize(cx, &planes, (&operand, &result), &grid, work).map(|()| true)
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

/// Whether the op maps each element of one operand, so that a transpose before or behind it can be part of its step.
pub(super) fn maps_elements(op: &Op) -> bool {
    matches!(
        op,
        Op::Normalize(_)
            | Op::Quantize(_)
            | Op::Dequantize(_)
            | Op::FakeQuant(_)
            | Op::Unary(_)
            | Op::QUnary(_)
            | Op::Cast(_)
    )
}
