//! Graphs in code, random data, and comparisons, for the tests of the passes.

use qcc_ir::{
    Graph, NodeId, Op, Shape, Tensor, TensorType, ValueId, interpreter,
    ops::{
        BatchNorm, Binary, BinaryKind, Clamp, Concat, Conv, Layout, MatMul, Pad, PadMode, Pool, PoolKind,
        Reduce, ReduceKind, Reshape, Softmax, Transpose, Unary, UnaryKind, Window,
    },
};
use qcc_passes::{Calibrator, Collector, NoteKind, Options, Ranges, Report, lower, prepare, quantize};

/// A graph under construction with a source of random numbers (SplitMix64).
pub(crate) struct Net {
    pub(crate) graph: Graph,
    state: u64,
}

impl Net {
    pub(crate) fn new(seed: u64) -> Net {
        Net { graph: Graph::new("test"), state: seed }
    }

    /// Uniform in ±1.
    pub(crate) fn random(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn tensor(&mut self, dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let elements = (0..shape.elements()).map(|_| self.random()).collect();
        Tensor::from_vec::<f32>(shape, elements).unwrap()
    }

    pub(crate) fn input(&mut self, name: &str, dims: &[usize]) -> ValueId {
        self.graph.input(name, TensorType::f32(dims).unwrap()).unwrap()
    }

    pub(crate) fn constant(&mut self, name: &str, dims: &[usize], elements: Vec<f32>) -> ValueId {
        self.graph.constant(name, Tensor::from_vec(Shape::new(dims).unwrap(), elements).unwrap())
    }

    pub(crate) fn random_constant(&mut self, name: &str, dims: &[usize], magnitude: f32) -> ValueId {
        let elements: Vec<f32> =
            self.tensor(dims).as_slice::<f32>().unwrap().iter().map(|x| x * magnitude).collect();
        self.constant(name, dims, elements)
    }

    pub(crate) fn op(&mut self, name: &str, op: impl Into<Op>, operands: &[ValueId]) -> ValueId {
        self.graph.add(name, op, operands).unwrap().out()
    }

    pub(crate) fn unary(&mut self, name: &str, kind: UnaryKind, x: ValueId) -> ValueId {
        self.op(name, Unary { kind }, &[x])
    }

    pub(crate) fn binary(&mut self, name: &str, kind: BinaryKind, a: ValueId, b: ValueId) -> ValueId {
        self.op(name, Binary { kind }, &[a, b])
    }

    pub(crate) fn reshape(&mut self, name: &str, x: ValueId, dims: &[usize]) -> ValueId {
        self.op(name, Reshape { shape: Shape::new(dims).unwrap() }, &[x])
    }

    pub(crate) fn transpose(&mut self, name: &str, x: ValueId, perm: &[usize]) -> ValueId {
        self.op(name, Transpose { perm: perm.to_vec() }, &[x])
    }

    /// A convolution with random weights and, if asked for, bias.
    pub(crate) fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        out: usize,
        window: Window,
        groups: usize,
        bias: bool,
    ) -> ValueId {
        let channels = self.graph.shape(x)[1];
        let mut dims = vec![out, channels / groups];
        dims.extend(&window.kernel);
        let fan: usize = dims[1..].iter().product();
        let w = self.random_constant(&format!("{name}.w"), &dims, 2.0 / (fan as f32).sqrt());
        let mut operands = vec![x, w];
        if bias {
            operands.push(self.random_constant(&format!("{name}.b"), &[out], 0.5));
        }
        let op =
            Conv { window, groups, layout: Layout::ChannelsFirst, bias, residual: false, clamp: Clamp::NONE };
        self.op(name, op, &operands)
    }

    pub(crate) fn conv3x3(&mut self, name: &str, x: ValueId, out: usize, stride: usize) -> ValueId {
        let window = Window::new([3, 3]).strides([stride, stride]).pads([1, 1], [1, 1]);
        self.conv(name, x, out, window, 1, false)
    }

    pub(crate) fn conv1x1(&mut self, name: &str, x: ValueId, out: usize) -> ValueId {
        self.conv(name, x, out, Window::new([1, 1]), 1, true)
    }

    pub(crate) fn batch_norm(&mut self, name: &str, x: ValueId, axis: usize) -> ValueId {
        let c = self.graph.shape(x)[axis];
        let around = |net: &mut Net, what: &str, centre: f32| {
            let v = (0..c).map(|_| centre + 0.5 * net.random()).collect();
            net.constant(&format!("{name}.{what}"), &[c], v)
        };
        let operands = [
            x,
            around(self, "scale", 1.0),
            around(self, "bias", 0.0),
            around(self, "mean", 0.0),
            around(self, "variance", 1.0),
        ];
        self.op(name, BatchNorm { epsilon: 1e-5, axis }, &operands)
    }

    pub(crate) fn matmul(&mut self, name: &str, x: ValueId, out: usize) -> ValueId {
        let k = *self.graph.shape(x).last().unwrap();
        let w = self.random_constant(&format!("{name}.w"), &[k, out], 2.0 / (k as f32).sqrt());
        self.op(name, MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[x, w])
    }

    /// A product of two values.
    pub(crate) fn product(&mut self, name: &str, a: ValueId, b: ValueId) -> ValueId {
        self.op(name, MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[a, b])
    }

    pub(crate) fn max_pool(&mut self, name: &str, x: ValueId, size: usize) -> ValueId {
        let window = Window::new([size, size]).strides([size, size]);
        let op = Pool { kind: PoolKind::Max, window, ceil_mode: false, layout: Layout::ChannelsFirst };
        self.op(name, op, &[x])
    }

    pub(crate) fn pad(&mut self, name: &str, x: ValueId, border: usize, mode: PadMode) -> ValueId {
        let pads = vec![0, 0, border, border];
        self.op(name, Pad { before: pads.clone(), after: pads, mode }, &[x])
    }

    pub(crate) fn concat(&mut self, name: &str, operands: &[ValueId], axis: usize) -> ValueId {
        self.op(name, Concat { axis }, operands)
    }

    pub(crate) fn spatial_mean(&mut self, name: &str, x: ValueId) -> ValueId {
        self.op(name, Reduce { kind: ReduceKind::Mean, axes: vec![2, 3], keep_dims: false }, &[x])
    }

    pub(crate) fn softmax(&mut self, name: &str, x: ValueId) -> ValueId {
        let axis = self.graph.shape(x).rank() - 1;
        self.op(name, Softmax { axis, log: false }, &[x])
    }

    /// Declares the result and gives up the graph.
    pub(crate) fn finish(mut self, y: ValueId) -> Graph {
        self.graph.output("y", y);
        self.graph
    }
}

/// Random inputs for a graph.
pub(crate) fn inputs(graph: &Graph, seed: u64) -> Vec<Tensor> {
    let mut source = Net::new(seed);
    graph.inputs().iter().map(|n| source.tensor(graph.shape(n.out()))).collect()
}

pub(crate) fn run(graph: &Graph, inputs: &[Tensor]) -> Vec<f32> {
    let results = interpreter::run(graph, inputs).unwrap();
    results.iter().flat_map(|t| t.as_slice::<f32>().unwrap().to_vec()).collect()
}

/// Largest difference, relative to the largest magnitude of `expected`.
pub(crate) fn distance(expected: &[f32], got: &[f32]) -> f32 {
    assert_eq!(expected.len(), got.len());
    let most = expected.iter().fold(1e-20f32, |m, x| m.max(x.abs()));
    let differs = |(a, b): (&f32, &f32)| if a.to_bits() == b.to_bits() { 0.0 } else { (a - b).abs() };
    expected.iter().zip(got).map(differs).fold(0.0, |m: f32, d| if d > m || d.is_nan() { d } else { m })
        / most
}

/// Asserts that two graphs compute the same of random inputs, up to float rounding.
pub(crate) fn assert_same(before: &Graph, after: &Graph) {
    for seed in 0..3 {
        let x = inputs(before, 100 + seed);
        let d = distance(&run(before, &x), &run(after, &x));
        assert!(d < 1e-5, "results differ by {d}\n{after:?}");
    }
}

/// The prepared graph, which must compute what the given one does.
pub(crate) fn prepared(graph: &Graph) -> (Graph, Report) {
    prepared_with(graph, &Options::default())
}

pub(crate) fn prepared_with(graph: &Graph, options: &Options) -> (Graph, Report) {
    let mut after = graph.clone();
    let report = prepare(&mut after, options, &mut |_, _| {}).unwrap();
    assert_same(graph, &after);
    (after, report)
}

/// Ranges over a few random samples, as the runtime would collect them.
pub(crate) fn calibrated(graph: &Graph) -> Ranges {
    let mut collector = Collector::new(graph, Calibrator::MinMax);
    for seed in 0..8 {
        interpreter::run_observed(graph, &inputs(graph, seed), &mut |v, t| {
            if let Ok(elements) = t.as_slice::<f32>() {
                collector.record(v, seed, elements);
            }
        })
        .unwrap();
    }
    collector.finish()
}

/// The whole way, and the graph on the way: (fake-quant, placed).
pub(crate) fn compiled(graph: &Graph, options: &Options) -> (Graph, Graph, Report) {
    let (mut graph, report) = prepared_with(graph, options);
    let ranges = calibrated(&graph);
    let report = report.then(quantize(&mut graph, &ranges, options, &mut |_, _| {}).unwrap());
    let fake = graph.clone();
    let report = report.then(lower(&mut graph, options, &mut |_, _| {}).unwrap());
    (fake, graph, report)
}

/// How many nodes have this op.
pub(crate) fn count(graph: &Graph, mnemonic: &str) -> usize {
    graph.nodes().filter(|(id, _)| graph.mnemonic(*id) == mnemonic).count()
}

pub(crate) fn find(graph: &Graph, name: &str) -> NodeId {
    graph.find(name).unwrap_or_else(|| panic!("no node {name}"))
}

/// The one reason a pass gives for declining a node.
pub(crate) fn declined<'a>(report: &'a Report, pass: &str, node: &str) -> &'a str {
    let record = report.record(pass).unwrap();
    let mut notes = record.of(NoteKind::Declined).filter(|n| n.node == node);
    match (notes.next(), notes.next()) {
        (Some(n), None) => &n.text,
        _ => panic!("{pass} did not decline {node} once:\n{report}"),
    }
}

pub(crate) fn applied(report: &Report, pass: &str) -> usize {
    report.record(pass).map_or(0, |r| r.applied)
}
