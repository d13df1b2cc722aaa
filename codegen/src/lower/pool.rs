//! Pools.

use super::{Lowerer, Lowering, shape::attributes};
use crate::{
    CodegenError,
    kernels::{
        lanes::Lanes,
        map::View,
        pool::{self, Axis, Constants, Geometry, Pitch, Reducer},
        vector::{
            self, cast, codes, f32x4, i8x16, i32x4, larger, load_splat, shuffle, to_i32, widen8, widen16,
        },
        wide::{self, CodeAverage},
    },
    module::MEM,
};
use cranelift_codegen::ir::{
    InstBuilder, Type, Value,
    condcodes::FloatCC,
    types::{F32X4, I8X16, I32X4, I64, I64X2},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{
    DType, Graph, NodeId, Op, OutputGrid, Shape, TensorType,
    numerics::{Multiplier, Rescaling},
    ops::{AverageRescale, Layout, Pool, PoolKind, QAveragePool, Window},
};
use std::collections::BTreeMap;

pub(super) const POOL: Lowerer = Lowerer { supported: pool_supported, lower: lower_pool };
pub(super) const Q_AVERAGE_POOL: Lowerer =
    Lowerer { supported: q_average_supported, lower: lower_q_average_pool };

fn layout_supported(x: &TensorType, layout: Layout) -> Result<(), String> {
    match (layout, x.shape.rank()) {
        (Layout::ChannelsLast, 3 | 4) => Ok(()),
        (Layout::ChannelsLast, _) => Err("pools have one or two spatial dimensions".into()),
        (Layout::ChannelsFirst, _) => Err("pools work on channels last".into()),
    }
}

fn pool_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::Pool(op)) = graph.op(node) else { return Ok(()) };
    let x = graph.ty(graph.operand(node, 0));
    layout_supported(x, op.layout)?;
    match (op.kind, x.dtype) {
        (_, DType::F32) | (PoolKind::Max, DType::U8 | DType::S8) => Ok(()),
        (kind, dtype) => Err(format!("no vector form of a {kind:?} pool of {dtype}")),
    }
}

/// Largest step of the input in steps of the output: averages then fit 32 bits before they are clamped.
const MAX_RATIO: f32 = (1 << 20) as f32;

fn q_average_supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let Some(Op::QAveragePool(op)) = graph.op(node) else { return Ok(()) };
    let x = graph.ty(graph.operand(node, 0));
    layout_supported(x, op.layout)?;
    match x.per_tensor() {
        Some((scale, _)) if scale / op.output.scale < MAX_RATIO => Ok(()),
        _ => Err(format!("the step of {x} is {MAX_RATIO} times the output's or more")),
    }
}

fn geometry(window: &Window, (x, from): (&Shape, &View), (y, to): (&Shape, &View)) -> Geometry {
    let rank = window.rank();
    let axis = |d: usize| Axis {
        input: x[1 + d] as i64,
        output: y[1 + d] as i64,
        kernel: window.kernel[d] as i64,
        stride: window.strides[d] as i64,
        dilation: window.dilations[d] as i64,
        pad: window.pads_begin[d] as i64,
    };
    let y_axis = if rank == 2 { axis(0) } else { Axis::NONE };
    let pitch = |v: &View| Pitch {
        image: v.strides[0],
        row: if rank == 2 { v.strides[1] } else { 0 },
        pixel: v.strides[rank],
    };
    Geometry {
        batch: x[0] as i64,
        y: y_axis,
        x: axis(rank - 1),
        channels: x[x.rank() - 1] as i64,
        from: pitch(from),
        to: pitch(to),
    }
}

/// How many taps of one dimension of a window an average at `position` divides by.
fn count(window: &Window, d: usize, input: i64, position: i64, count_include_pad: bool) -> i64 {
    let one = |v: &[usize]| vec![v[d]];
    let window = Window {
        kernel: one(&window.kernel),
        strides: one(&window.strides),
        dilations: one(&window.dilations),
        pads_begin: one(&window.pads_begin),
        pads_end: one(&window.pads_end),
    };
    let kind = PoolKind::Average { count_include_pad };
    let pool = Pool { kind, window, ceil_mode: false, layout: Layout::ChannelsLast };
    pool.count(&[input as usize], &[position as usize]) as i64
}

/// Groups the rows and columns of the result by how many taps lie inside and how many are counted, and makes an entry
/// for each pair of groups from the products: `entry(inside, counted)`.
fn constants(
    g: &Geometry,
    window: &Window,
    include_pad: bool,
    entry: impl Fn(i64, i64) -> Vec<u8>,
) -> Constants {
    let classes = |axis: &Axis, dimension: Option<usize>| {
        let mut found: BTreeMap<(i64, i64), u16> = BTreeMap::new();
        let mut order = Vec::new();
        let mut of = Vec::with_capacity(axis.output as usize);
        for i in 0..axis.output {
            let key = dimension.map_or((1, 1), |d| {
                (count(window, d, axis.input, i, false), count(window, d, axis.input, i, include_pad))
            });
            of.push(*found.entry(key).or_insert_with(|| {
                order.push(key);
                (order.len() - 1) as u16
            }));
        }
        (of, order)
    };
    let last = window.rank() - 1;
    let (rows, row_order) = classes(&g.y, last.checked_sub(1));
    let (columns, column_order) = classes(&g.x, Some(last));
    let pairs = row_order.iter().flat_map(|r| column_order.iter().map(move |c| (r.0 * c.0, r.1 * c.1)));
    let entries = pairs.map(|(inside, counted)| entry(inside, counted)).collect();
    Constants { rows, columns, column_classes: column_order.len(), entries }
}

/// The largest element; padding takes no part.
struct Max(DType);

impl Reducer for Max {
    fn ty(&self) -> Type {
        vector::vector_type(self.0)
    }
    fn init(&self, b: &mut FunctionBuilder) -> Vec<Value> {
        match self.0 {
            // The largest number, and a mask of lanes that met a NaN.
            DType::F32 => vec![f32x4(b, f32::NEG_INFINITY), i32x4(b, 0)],
            DType::S8 => vec![i8x16(b, i8::MIN as u8)],
            _ => vec![i8x16(b, 0)],
        }
    }
    fn add(&self, b: &mut FunctionBuilder, max: &[Value], x: Value) -> Vec<Value> {
        match self.0 {
            DType::S8 => vec![b.ins().smax(max[0], x)],
            DType::U8 => vec![b.ins().umax(max[0], x)],
            _ => {
                let nan = b.ins().fcmp(FloatCC::Unordered, x, x);
                vec![larger(b, x, max[0]), b.ins().bor(max[1], nan)]
            }
        }
    }
    fn finish(&self, b: &mut FunctionBuilder, max: &[Value], _: Value) -> Value {
        match *max {
            [max, nan] => {
                // All bits set are a NaN.
                let bits = cast(b, I32X4, max);
                let bits = b.ins().bor(bits, nan);
                cast(b, F32X4, bits)
            }
            _ => max[0],
        }
    }
}

/// The sum of f32, in the order of the taps, divided by the count.
struct Average;

impl Reducer for Average {
    fn ty(&self) -> Type {
        F32X4
    }
    fn init(&self, b: &mut FunctionBuilder) -> Vec<Value> {
        vec![f32x4(b, 0.0)]
    }
    fn add(&self, b: &mut FunctionBuilder, sum: &[Value], x: Value) -> Vec<Value> {
        vec![b.ins().fadd(sum[0], x)]
    }
    fn finish(&self, b: &mut FunctionBuilder, sum: &[Value], constants: Value) -> Value {
        let count = load_splat(b, F32X4, constants);
        b.ins().fdiv(sum[0], count)
    }
}

/// The integer sum of codes, requantized by a [`Multiplier`] in 64 bits or in floats.
struct QAverage {
    /// Whether the sum fits 16 bits.
    short: bool,
    rescaling: Rescaling,
    output: OutputGrid,
}

impl Reducer for QAverage {
    fn ty(&self) -> Type {
        I8X16
    }
    fn vectors(&self) -> i64 {
        if self.short { 4 } else { 2 }
    }
    fn init(&self, b: &mut FunctionBuilder) -> Vec<Value> {
        match self.short {
            true => vec![vector::i16x8(b, 0); 2],
            false => vec![i32x4(b, 0); 4],
        }
    }
    fn add(&self, b: &mut FunctionBuilder, sum: &[Value], x: Value) -> Vec<Value> {
        let x = match self.short {
            true => widen8(b, x, false).to_vec(),
            false => to_i32(b, &[x], DType::U8),
        };
        sum.iter().zip(x).map(|(&s, x)| b.ins().iadd(s, x)).collect()
    }
    fn finish(&self, b: &mut FunctionBuilder, sum: &[Value], constants: Value) -> Value {
        let sums: Vec<Value> = match self.short {
            true => sum.iter().flat_map(|&s| widen16(b, s, false)).collect(),
            false => sum.to_vec(),
        };
        let offset = load_splat(b, I32X4, constants);
        let second = b.ins().iadd_imm_s(constants, 4);
        if self.rescaling == Rescaling::Float {
            let factor = load_splat(b, F32X4, second);
            let values: Vec<Value> = sums
                .into_iter()
                .map(|s| {
                    let s = b.ins().iadd(s, offset);
                    let x = b.to_f32(s);
                    let steps = b.fmul(x, factor);
                    b.round(steps)
                })
                .collect();
            return codes(b, &values, self.output);
        }
        let m = load_splat(b, I32X4, second);
        let third = b.ins().iadd_imm_s(constants, 8);
        let half = load_splat(b, I64X2, third);
        let n = b.ins().load(I64, MEM, constants, 16);
        // SSE has no arithmetic shift of 64 bits: with the sign bit flipped the value is never negative, and 2^63 >> n
        // too much afterwards.
        let sign = b.ins().iconst(I64, i64::MIN);
        let sign = b.ins().splat(I64X2, sign);
        let excess = b.ins().ushr(sign, n);
        let scaled = |b: &mut FunctionBuilder, x: Value, m: Value| {
            let product = b.ins().imul(x, m);
            let rounded = b.ins().iadd(product, half);
            let positive = b.ins().bxor(rounded, sign);
            let shifted = b.ins().ushr(positive, n);
            b.ins().isub(shifted, excess)
        };
        let (m_low, m_high) = (b.ins().swiden_low(m), b.ins().swiden_high(m));
        let values: Vec<Value> = sums
            .into_iter()
            .map(|s| {
                let s = b.ins().iadd(s, offset);
                let (low, high) = (b.ins().swiden_low(s), b.ins().swiden_high(s));
                let (low, high) = (scaled(b, low, m_low), scaled(b, high, m_high));
                // The averages fit the low halves.
                let pick = std::array::from_fn(|i| (i / 4 * 8 + i % 4) as u8);
                let both = shuffle(b, low, high, pick);
                cast(b, I32X4, both)
            })
            .collect();
        codes(b, &values, self.output)
    }
}

fn lower_pool(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op = attributes!(cx, node, Pool);
    let operand = cx.graph.operand(node, 0);
    let (x, y) = (cx.graph.ty(operand), cx.graph.ty(node.out()));
    let (from, to) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let g = geometry(&op.window, (&x.shape, &from), (&y.shape, &to));
    let places = (from.location, to.location);
    let work = cx.current_work();
    match op.kind {
        PoolKind::Max => {
            let none = Constants { rows: vec![], columns: vec![], column_classes: 0, entries: vec![] };
            if wide::pool(cx, "max_pool", &g, places, wide::PoolKind::Max(x.dtype), &none, work)? {
                return Ok(());
            }
            pool::pool(cx, "max_pool", &g, places, &Max(x.dtype), &none, work)
        }
        PoolKind::Average { count_include_pad } => {
            let constants = constants(&g, &op.window, count_include_pad, |_, counted| {
                // Windows of no element: the sum 0 stays 0.
                (counted.max(1) as f32).to_le_bytes().to_vec()
            });
            let kind = wide::PoolKind::Average;
            if wide::pool(cx, "average_pool", &g, places, kind, &constants, work)? {
                return Ok(());
            }
            pool::pool(cx, "average_pool", &g, places, &Average, &constants, work)
        }
    }
}

fn lower_q_average_pool(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let op: &QAveragePool = attributes!(cx, node, QAveragePool);
    let operand = cx.graph.operand(node, 0);
    let (x, y) = (cx.graph.ty(operand), cx.graph.ty(node.out()));
    let (from, to) = (cx.operand_view(node, 0)?, cx.result_view(node)?);
    let g = geometry(&op.window, (&x.shape, &from), (&y.shape, &to));
    let places = (from.location, to.location);
    let zero = x.per_tensor().map_or(0, |(_, z)| i64::from(z));
    let constants = constants(&g, &op.window, op.count_include_pad, |inside, counted| {
        let none = match op.rescaling {
            Rescaling::FixedPoint => AverageRescale::FixedPoint(Multiplier { m: 0, n: 1 }),
            Rescaling::Float => AverageRescale::Float(0.0),
        };
        let rescale = op.rescale(x, counted as usize).unwrap_or(none);
        CodeAverage { offset: (-zero * inside) as i32, rescale }.to_bytes(op.output)
    });
    let short = op.window.taps() * 255 <= usize::from(u16::MAX);
    let reducer = QAverage { short, rescaling: op.rescaling, output: op.output };
    let work = cx.current_work();
    let kind = wide::PoolKind::CodeAverage(op.output, op.rescaling);
    if reducer.short && wide::pool(cx, "q_average_pool", &g, places, kind, &constants, work)? {
        return Ok(());
    }
    pool::pool(cx, "q_average_pool", &g, places, &reducer, &constants, work)
}
