//! Normalisations. Batch normalisation never comes here: it is folded into weights or made a sum and a product.

use super::{Lowerer, Lowering, elementwise, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        lanes::{Elementwise, Lanes},
        line::{self, Line},
        map::{self, View},
        math, wide,
    },
    model::Work,
    module::Location,
};
use qcc_ir::{DType, Graph, NodeId, Op, ops::Normalize};

pub(super) const NORMALIZE: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: elementwise::chain };
pub(super) const SOFTMAX: Lowerer = Lowerer { supported: |_, _| Ok(()), lower: softmax };
pub(super) const LRN: Lowerer = Lowerer { supported: lrn_supported, lower: lrn };

/// How many [`constants`] there are.
pub(super) const CONSTANTS: usize = 2;

/// Mean and standard deviation of each channel, as operands of the elementwise kernel.
pub(super) fn constants(cx: &mut Lowering, op: &Normalize, rank: usize) -> Result<Vec<View>, CodegenError> {
    let tables: [_; CONSTANTS] = [&op.mean, &op.std];
    tables
        .into_iter()
        .map(|constants| {
            let bytes: Vec<u8> = constants.iter().flat_map(|x| x.to_le_bytes()).collect();
            let at = Location::Weights(cx.weights(&bytes, 16)?);
            Ok(View::along(at, DType::F32, Some(op.axis), rank))
        })
        .collect()
}

/// `ir::numerics::normalize`: (pixel − mean) / std, of a channel.
pub(super) struct Normalized;

impl Elementwise for Normalized {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let x = l.to_f32(operands[0]);
        let x = l.fsub(x, operands[1]);
        l.fdiv(x, operands[2])
    }
}

fn softmax(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Softmax);
    let operand = cx.graph.operand(node, 0);
    let Some(line) = Line::new(cx.graph.shape(operand), &[op.axis]) else { return Ok(()) };
    let places = (cx.location(operand)?, cx.location(node.out())?);
    let work = cx.current_work();
    if !op.log && wide::softmax(cx, line, places, work)? {
        return Ok(());
    }
    line::softmax(cx, line, op.log, places, work)
}

/// Widest neighbourhood of a local response normalisation: the kernel reads each neighbour on its own.
const MAX_LRN_SIZE: usize = 16;

fn lrn_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    match graph.op(node) {
        Some(Op::Lrn(op)) if op.size > MAX_LRN_SIZE => {
            Err(format!("a neighbourhood of {} channels is above {MAX_LRN_SIZE}", op.size))
        }
        _ => Ok(()),
    }
}

/// Squares go into scratch with a border of zeros along the channels, which add nothing to the sums; then each
/// result is a function of x and `size` neighbouring squares.
fn lrn(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Lrn);
    let dims = cx.graph.shape(node.out()).to_vec();
    let axis = op.layout.channel_axis(dims.len());
    let (before, after) = ((op.size - 1) / 2, op.size / 2);
    let mut padded = dims.clone();
    padded[axis] += before + after;
    let bytes = padded.iter().product::<usize>() as u64 * 4;
    let squares = View::dense(cx.scratch(bytes)?, DType::F32, &padded);
    let shifted =
        |channels: usize| View { offset: squares.strides[axis] * channels as i64, ..squares.clone() };
    let zero = Location::Weights(cx.weights(&0f32.to_le_bytes(), 4)?);
    let zero = View::along(zero, DType::F32, None, dims.len());
    for (first, count) in [(0, before), (before + dims[axis], after)] {
        let mut border = dims.clone();
        border[axis] = count;
        map::copy(cx, "lrn_border", &border, zero.clone(), shifted(first))?;
    }
    let (x, result) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let work = cx.current_work();
    let pass = Work { bytes_written: work.bytes_read, ..work };
    let squared = shifted(before);
    map::elementwise(cx, "lrn_squares", &dims, std::slice::from_ref(&x), &squared, pass, Square)?;

    let mut operands = vec![x];
    operands.extend((0..op.size).map(shifted));
    let function = Response { bias: op.bias, factor: op.alpha / op.size as f32, beta: op.beta };
    map::elementwise(cx, "lrn", &dims, &operands, &result, work, function)
}

struct Square;

impl Elementwise for Square {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        l.fmul(operands[0], operands[0])
    }
}

/// x·(bias + factor·Σ squares)^−beta.
struct Response {
    bias: f32,
    factor: f32,
    beta: f32,
}

impl Elementwise for Response {
    fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
        let sum = operands[2..].iter().fold(operands[1], |sum, &s| l.fadd(sum, s));
        let (bias, factor, exponent) = (l.f32(self.bias), l.f32(self.factor), l.f32(-self.beta));
        let scaled = l.fmul(factor, sum);
        let base = l.fadd(bias, scaled);
        let log = math::ln(l, base);
        let log = l.fmul(exponent, log);
        let power = math::exp(l, log);
        l.fmul(operands[0], power)
    }
}
