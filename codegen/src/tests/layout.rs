//! Values that lie in others, or with margins around them.

use super::{Random, check, compiled, placed, plain, tiers};
use crate::plan::{Margins, Plan};
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, OutputGrid, QuantParams, Shape, Tensor, ValueId,
    numerics::{RequantMode, Rescaling},
    ops::{
        Concat, Layout, Pool, PoolKind, QBinary, QBinaryKind, QConv, QUnary, Quantize, Slice, SliceSpec,
        Transpose, UnaryKind, Window,
    },
};
use std::collections::BTreeSet;

/// One grid for all values, so that they can be parts of one whole.
fn grid() -> OutputGrid {
    OutputGrid::full(DType::U8, 1.0, 100).unwrap()
}

struct Net {
    g: Graph,
    r: Random,
    count: usize,
}

impl Net {
    fn new(seed: u64) -> Net {
        Net { g: Graph::new("net"), r: Random::new(seed), count: 0 }
    }

    fn name(&mut self) -> String {
        self.count += 1;
        format!("n{}", self.count)
    }

    /// An f32 image, channels first, as codes channels last: one step that writes codes.
    fn image(&mut self, dims: [usize; 4]) -> ValueId {
        let [n, c, h, w] = dims;
        let x = self.g.input("x", plain(DType::F32, &[n, c, h, w])).unwrap();
        let t = self.g.add("t", Transpose { perm: vec![0, 2, 3, 1] }, &[x]).unwrap();
        let params = QuantParams::per_tensor(1.0, 100).unwrap();
        self.g.add("q", Quantize { dtype: DType::U8, params }, &[t.out()]).unwrap().out()
    }

    fn conv(&mut self, x: ValueId, outputs: usize, window: Window) -> ValueId {
        self.conv_plus(x, outputs, window, None)
    }

    /// A convolution that adds a residual.
    fn conv_plus(
        &mut self,
        x: ValueId,
        outputs: usize,
        window: Window,
        residual: Option<ValueId>,
    ) -> ValueId {
        let inputs = self.g.shape(x)[3];
        let dims = [outputs, inputs, window.kernel[0], window.kernel[1]];
        let shape = Shape::new(dims).unwrap();
        let codes = (0..shape.elements()).map(|_| (self.r.next() >> 56) as i8).collect();
        let scale = 1.0 / (90.0 * (dims[1..].iter().product::<usize>() as f32).sqrt());
        let params = QuantParams::per_axis(0, vec![scale; outputs], vec![0; outputs]).unwrap();
        let tensor = Tensor::from_vec(shape, codes).unwrap();
        let ty = qcc_ir::TensorType { quant: Some(params), ..tensor.ty() };
        let weights = self.g.quantized_constant("w", tensor, ty).unwrap();
        let op = QConv {
            window,
            groups: 1,
            layout: Layout::ChannelsLast,
            bias: false,
            residual: residual.is_some(),
            requant: RequantMode::Shift,
            output: grid(),
        };
        let name = self.name();
        let operands: Vec<ValueId> = [x, weights].into_iter().chain(residual).collect();
        self.g.add(&name, op, &operands).unwrap().out()
    }

    fn max_pool(&mut self, x: ValueId, window: Window) -> ValueId {
        let pool = Pool { kind: PoolKind::Max, window, ceil_mode: false, layout: Layout::ChannelsLast };
        let name = self.name();
        self.g.add(&name, pool, &[x]).unwrap().out()
    }

    fn concat(&mut self, parts: &[ValueId]) -> ValueId {
        let name = self.name();
        self.g.add(&name, Concat { axis: 3 }, parts).unwrap().out()
    }

    fn relu(&mut self, x: ValueId) -> ValueId {
        let name = self.name();
        self.g.add(&name, QUnary { kind: UnaryKind::Relu, output: grid() }, &[x]).unwrap().out()
    }

    fn add(&mut self, x: ValueId, y: ValueId) -> ValueId {
        let name = self.name();
        self.g
            .add(
                &name,
                QBinary { kind: QBinaryKind::Add, rescaling: Rescaling::FixedPoint, output: grid() },
                &[x, y],
            )
            .unwrap()
            .out()
    }
}

fn padded(kernel: usize) -> Window {
    Window::new([kernel, kernel]).pads([kernel / 2; 2], [kernel / 2; 2])
}

/// Squeeze, expand, and what else may stand beside it: parts that others read too, parts of parts, and a value that
/// is a part twice.
fn fire(seed: u64, image: [usize; 4], channels: [usize; 3]) -> Graph {
    let mut net = Net::new(seed);
    let x = net.image(image);
    let squeeze = net.conv(x, channels[0], padded(3));
    let one = net.conv(squeeze, channels[1], Window::new([1, 1]));
    let three = net.conv(squeeze, channels[2], padded(3));
    let pooled = net.max_pool(squeeze, padded(3));
    let lifted = net.relu(one);
    let inner = net.concat(&[three, pooled, lifted]);
    let pointwise = net.conv(inner, channels[1], Window::new([1, 1]));
    let sum = net.add(one, pointwise);
    let outer = net.concat(&[inner, sum, one, sum]);
    let y = net.max_pool(outer, Window::new([1, 2]).strides([2, 1]));
    net.g.output("y", y);
    net.g
}

/// A value that convolutions with different pads read, and others beside them.
fn surrounded(seed: u64, image: [usize; 4], channels: [usize; 3]) -> Graph {
    let mut net = Net::new(seed);
    let x = net.image(image);
    let s = net.conv(x, channels[0], Window::new([1, 1]));
    let small = net.conv(s, channels[1], padded(3));
    let uneven = Window::new([2, 5]).strides([2, 2]).pads([0, 3], [1, 2]);
    let large = net.conv(s, channels[2], uneven);
    let strided = net.conv(s, channels[1], Window::new([1, 1]).strides([2, 2]));
    let other = net.relu(s);
    for (i, v) in [small, large, strided, other].into_iter().enumerate() {
        net.g.output(format!("y{i}"), v);
    }
    net.g
}

/// Residual blocks: residuals with margins under results without, and the other way round.
fn residual_blocks(seed: u64, image: [usize; 4], channels: [usize; 3]) -> Graph {
    let mut net = Net::new(seed);
    let x = net.image(image);
    let c = channels[0];
    let stem = net.conv(x, c, padded(3));
    let inner = net.conv(stem, channels[1], padded(3));
    let first = net.conv_plus(inner, c, padded(3), Some(stem));
    let inner = net.conv(first, channels[2], Window::new([1, 1]));
    let second = net.conv_plus(inner, c, padded(5), Some(first));
    let third = net.conv_plus(second, c, Window::new([1, 1]), Some(first));
    let whole = net.concat(&[third, first]);
    let y = net.max_pool(whole, Window::new([2, 2]));
    net.g.output("y", y);
    net.g
}

fn image() -> impl Strategy<Value = [usize; 4]> {
    (1usize..3, 1usize..6, 2usize..20, prop_oneof![3usize..12, 60usize..80])
        .prop_map(|(n, c, h, w)| [n, c, h, w])
}

/// The bytes of a value, from the start of its host's buffer.
fn footprint(graph: &Graph, plan: &Plan, value: ValueId) -> BTreeSet<u64> {
    let layout = &plan.layouts[&value];
    let ty = graph.ty(value);
    let mut starts = vec![layout.offset];
    for (&n, &stride) in ty.shape.iter().zip(&layout.strides) {
        starts = starts.iter().flat_map(|s| (0..n as u64).map(move |i| s + i * stride)).collect();
    }
    starts.iter().flat_map(|s| *s..s + ty.dtype.size() as u64).collect()
}

fn check_plan(graph: &Graph) -> Result<(), TestCaseError> {
    let graph = placed(graph);
    let plan = Plan::new(&graph).unwrap();
    let all: Vec<(&ValueId, &crate::plan::Layout)> = plan.layouts.iter().collect();
    for (i, (value, layout)) in all.iter().enumerate() {
        let own = footprint(&graph, &plan, **value);
        prop_assert_eq!(own.len(), graph.ty(**value).bytes(), "two elements share bytes");
        let buffer = &plan.buffers[&layout.host];
        prop_assert!(own.last().is_none_or(|&last| last < buffer.bytes));
        for (other, its) in &all[..i] {
            // A part of a part lies in both.
            let holds = |a: ValueId, b: ValueId| graph.operands(a.node).contains(&b);
            if its.host == layout.host && !holds(**other, **value) && !holds(**value, **other) {
                let theirs = footprint(&graph, &plan, **other);
                prop_assert!(own.is_disjoint(&theirs), "{value} and {other} overlap");
            }
        }
    }
    let buffers: Vec<_> = plan.buffers.values().collect();
    for (i, a) in buffers.iter().enumerate() {
        for b in &buffers[..i] {
            let together = a.first <= b.last && b.first <= a.last;
            let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
            prop_assert!(!together || apart, "{a:?} {b:?}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn parts_and_margins_hold_what_they_should(
        image in image(), channels in [1usize..40, 1usize..40, 1usize..70], kind in 0..3, seed: u64,
    ) {
        let graph = [fire, surrounded, residual_blocks][kind as usize](seed, image, channels);
        check_plan(&graph)?;
        check(&graph, seed);
    }
}

/// Names of the kernels of all steps.
fn kernels(graph: &Graph) -> Vec<String> {
    compiled(&placed(graph), tiers()[0]).steps().iter().map(|s| s.kernel.clone()).collect()
}

#[test]
fn parts_are_written_where_they_belong() {
    let graph = fire(1, [1, 3, 9, 9], [8, 16, 16]);
    // All but what is a part for the second time.
    assert_eq!(kernels(&graph).iter().filter(|k| *k == "concat").count(), 1);
}

#[test]
fn margins_replace_copies() {
    let graph = surrounded(1, [1, 3, 9, 9], [8, 16, 16]);
    let kernels = kernels(&graph);
    assert!(!kernels.iter().any(|k| k == "pad"), "{kernels:?}");
    let plan = Plan::new(&placed(&graph)).unwrap();
    let margins: Vec<Margins> = plan.layouts.values().map(|l| l.margins).collect();
    // What both windows need: 1 all around, and 3 before and 2 behind in rows.
    assert_eq!(margins, [Margins { above: 1, below: 1, left: 3, right: 2 }]);
}

/// A part that is sliced, and a whole that is a result of the graph, which lies in the caller's memory.
#[test]
fn results_of_the_graph_are_no_hosts() {
    let mut net = Net::new(3);
    let x = net.image([1, 3, 8, 8]);
    let a = net.conv(x, 5, Window::new([1, 1]));
    let b = net.relu(x);
    let whole = net.concat(&[a, b]);
    let all = SliceSpec::all(8);
    let axes = vec![SliceSpec::all(1), SliceSpec { start: 7, len: 4, step: -2 }, all, SliceSpec::all(5)];
    let sliced = net.g.add("s", Slice { axes }, &[a]).unwrap();
    net.g.output("whole", whole);
    net.g.output("sliced", sliced.out());
    assert_eq!(kernels(&net.g).iter().filter(|k| *k == "concat").count(), 2);
    check(&net.g, 3);
}
