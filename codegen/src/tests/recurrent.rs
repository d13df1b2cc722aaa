//! Recurrences.

use super::{Random, Threads, compiled, placed, plain, run, tiers};
use crate::{Parallel, Serial, capability};
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, QuantParams, Shape, Tensor, TensorType, ValueId, interpreter,
    ops::{Activation, Cell, Recurrent, UnaryKind},
};

const CELLS: [Cell; 7] = [
    Cell::Rnn,
    Cell::Gru { linear_before_reset: false },
    Cell::Gru { linear_before_reset: true },
    Cell::Lstm { peepholes: false, coupled: false },
    Cell::Lstm { peepholes: true, coupled: false },
    Cell::Lstm { peepholes: false, coupled: true },
    Cell::Lstm { peepholes: true, coupled: true },
];

const ACTIVATIONS: [Activation; 8] = [
    Activation::Unary(UnaryKind::Sigmoid),
    Activation::Unary(UnaryKind::Tanh),
    Activation::Unary(UnaryKind::Relu),
    Activation::Unary(UnaryKind::HardSigmoid { alpha: 0.2, beta: 0.5 }),
    Activation::Unary(UnaryKind::Softsign),
    Activation::Affine { alpha: 0.75, beta: -0.125 },
    Activation::ThresholdedRelu { alpha: 0.4 },
    Activation::ScaledTanh { alpha: 1.5, beta: 0.3 },
];

/// Numbers between −most and most, a power of two, of which sums and products are exact.
fn numbers(dims: &[usize], most: f32, r: &mut Random) -> Tensor {
    let shape = Shape::new(dims).unwrap();
    let numbers =
        (0..shape.elements()).map(|_| most * ((r.next() % 17) as f32 / 8.0 - 1.0)).collect::<Vec<f32>>();
    Tensor::from_vec(shape, numbers).unwrap()
}

fn eighths(dims: &[usize], r: &mut Random) -> Tensor {
    numbers(dims, 1.0, r)
}

#[derive(Clone)]
struct Case {
    cell: Cell,
    activations: Vec<Activation>,
    clip: Option<f32>,
    reverse: bool,
    lengths: Option<Vec<i32>>,
    /// Steps, sequences, state.
    extents: [usize; 3],
    /// Whether the weights of the state are codes.
    of_codes: bool,
}

/// Codes of all kinds, with a scale for each column.
fn codes(g: &mut Graph, hidden: usize, width: usize, r: &mut Random) -> ValueId {
    let shape = Shape::new([hidden, width]).unwrap();
    let codes: Vec<i8> = (0..shape.elements()).map(|_| (r.next() % 256) as u8 as i8).collect();
    let scales = (0..width).map(|_| 1e-3 * (1.0 + (r.next() % 64) as f32 / 64.0)).collect();
    let grid = QuantParams::per_axis(1, scales, vec![0; width]).unwrap();
    let ty = TensorType::quantized(DType::S8, shape.clone(), grid).unwrap();
    g.quantized_constant("R", Tensor::from_vec(shape, codes).unwrap(), ty).unwrap()
}

impl Case {
    /// The graph and its inputs: all operands but the weights.
    fn build(&self, seed: u64) -> (Graph, Vec<Tensor>) {
        let r = &mut Random::new(seed);
        let [steps, sequences, hidden] = self.extents;
        let width = self.cell.gates() * hidden;
        let mut g = Graph::new("recurrence");
        let mut inputs = vec![];
        let mut operands = vec![];
        let mut input = |g: &mut Graph, name: &str, tensor: Tensor| {
            let value = g.input(name, plain(tensor.dtype(), tensor.shape())).unwrap();
            inputs.push(tensor);
            value
        };
        operands.push(input(&mut g, "gates", eighths(&[steps, sequences, width], r)));
        // Larger ones would make the states chaotic: a last bit would not stay one.
        operands.push(match self.of_codes {
            true => codes(&mut g, hidden, width, r),
            false => g.constant("R", numbers(&[hidden, width], 0.125, r)),
        });
        operands.push(input(&mut g, "H", eighths(&[sequences, hidden], r)));
        if let Cell::Lstm { peepholes, .. } = self.cell {
            operands.push(input(&mut g, "C", eighths(&[sequences, hidden], r)));
            if peepholes {
                operands.push(input(&mut g, "P", eighths(&[3 * hidden], r)));
            }
        }
        if self.cell == (Cell::Gru { linear_before_reset: true }) {
            operands.push(g.constant("r", eighths(&[hidden], r)));
        }
        if let Some(lengths) = &self.lengths {
            let lengths = Tensor::from_vec(Shape::new([sequences]).unwrap(), lengths.clone()).unwrap();
            operands.push(input(&mut g, "lengths", lengths));
        }
        let op = Recurrent {
            cell: self.cell,
            activations: self.activations.clone(),
            clip: self.clip,
            reverse: self.reverse,
            lengths: self.lengths.is_some(),
        };
        let node = g.add("recurrence", op, &operands).unwrap();
        for (port, name) in ["all", "last", "cell"].iter().enumerate().take(g.node(node).outputs().len()) {
            g.output(*name, node.port(port as u16));
        }
        (g, inputs)
    }

    /// Compares with the interpreter on every tier, on one thread and on three.
    fn check(&self, seed: u64, tolerance: f32) {
        let (graph, inputs) = self.build(seed);
        let node = graph.outputs()[0].value.node;
        assert_eq!(capability(&graph, node), Ok(()));
        let expected = interpreter::run(&graph, &inputs).unwrap();
        let bytes: Vec<&[u8]> = inputs.iter().map(|t| &t.bytes()[..]).collect();
        let graph = placed(&graph);
        for tier in tiers() {
            let model = compiled(&graph, tier);
            assert!(model.steps().iter().all(|s| s.kernel != "interpreter"));
            for pool in [&Serial as &dyn Parallel, &Threads(3)] {
                let outputs = run(&model, &bytes, pool);
                for ((got, expected), (name, ty)) in outputs.iter().zip(&expected).zip(model.outputs()) {
                    let got = Tensor::from_bytes(ty.dtype, ty.shape.clone(), got.clone().into()).unwrap();
                    let pairs =
                        got.as_slice::<f32>().unwrap().iter().zip(expected.as_slice::<f32>().unwrap());
                    for (i, (a, b)) in pairs.enumerate() {
                        let is_near =
                            a.to_bits() == b.to_bits() || (a - b).abs() <= tolerance * (1.0 + b.abs());
                        assert!(is_near, "{name}[{i}] on {tier} with {}: {a} is not {b}", pool.threads());
                    }
                }
            }
        }
    }
}

fn activations(cell: Cell, first: usize) -> Vec<Activation> {
    (0..cell.activations()).map(|i| ACTIVATIONS[(first + 3 * i) % ACTIVATIONS.len()]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The sums of one step are exact, and so must be all that follows.
    #[test]
    fn one_step_is_bit_for_bit_the_interpreters(
        cell in 0usize..7, first in 0usize..8, clip in prop::option::of(0.25f32..2.0),
        sequences in 1usize..10, hidden in 1usize..45, reverse: bool, seed: u64,
    ) {
        let cell = CELLS[cell];
        // Where the state is multiplied after its reset, this is no number of eighths, so that sums depend on their order.
        let tolerance = if cell == (Cell::Gru { linear_before_reset: false }) { 1e-5 } else { 0.0 };
        let extents = [1, sequences, hidden];
        Case { cell, activations: activations(cell, first), clip, reverse, lengths: None, extents, of_codes: false }
            .check(seed, tolerance);
    }

    #[test]
    fn steps_follow_each_other(
        cell in 0usize..7, extents in (1usize..7, 1usize..6, 1usize..24), reverse: bool,
        lengths in prop::option::of(prop::collection::vec(0i32..7, 6)), seed: u64,
    ) {
        let cell = CELLS[cell];
        let (steps, sequences, hidden) = extents;
        let lengths = lengths.map(|l| l[..sequences].iter().map(|&n| n.min(steps as i32)).collect());
        let activations = activations(cell, 0)[..].iter().map(|_| ACTIVATIONS[1]).collect();
        Case { cell, activations, clip: None, reverse, lengths, extents: [steps, sequences, hidden], of_codes: false }
            .check(seed, 1e-4);
    }

    /// Sums of codes do not depend on their order.
    #[test]
    fn weights_of_codes_are_bit_for_bit_the_interpreters(
        cell in 0usize..7, first in 0usize..8, extents in (1usize..5, 1usize..10, 1usize..70), reverse: bool,
        lengths in prop::option::of(prop::collection::vec(0i32..5, 10)), seed: u64,
    ) {
        let cell = CELLS[cell];
        let (steps, sequences, hidden) = extents;
        let lengths = lengths.map(|l| l[..sequences].iter().map(|&n| n.min(steps as i32)).collect());
        let activations = activations(cell, first);
        let extents = [steps, sequences, hidden];
        Case { cell, activations, clip: Some(2.0), reverse, lengths, extents, of_codes: true }.check(seed, 0.0);
    }
}

#[test]
fn states_that_take_several_panels_are_shared_among_threads() {
    for cell in [CELLS[2], CELLS[3]] {
        let activations = [ACTIVATIONS[0], ACTIVATIONS[1], ACTIVATIONS[1]];
        let activations = activations[..cell.activations()].to_vec();
        Case {
            cell,
            activations,
            clip: None,
            reverse: false,
            lengths: None,
            extents: [3, 2, 131],
            of_codes: false,
        }
        .check(5, 1e-4);
    }
}

#[test]
fn a_length_beyond_the_steps_is_an_error_that_names_the_node() {
    let case = Case {
        cell: Cell::Rnn,
        activations: vec![ACTIVATIONS[1]],
        clip: None,
        reverse: false,
        lengths: Some(vec![2, 4]),
        extents: [3, 2, 5],
        of_codes: false,
    };
    let (graph, inputs) = case.build(1);
    let model = compiled(&placed(&graph), tiers()[0]);
    let bytes: Vec<&[u8]> = inputs.iter().map(|t| &t.bytes()[..]).collect();
    let mut buffers: Vec<Vec<u8>> = model.outputs().iter().map(|(_, ty)| vec![0; ty.bytes()]).collect();
    let mut outputs: Vec<&mut [u8]> = buffers.iter_mut().map(|b| &mut b[..]).collect();
    let refused =
        crate::Execution::new(model).run(&bytes, &mut outputs, &Serial, None).unwrap_err().to_string();
    assert!(refused.contains("recurrence") && refused.contains("length of 4, of 3 steps"), "{refused}");
}

#[test]
fn recurrences_in_f64_and_with_weights_of_run_time_are_interpreted() {
    let case = Case {
        cell: Cell::Rnn,
        activations: vec![ACTIVATIONS[1]],
        clip: None,
        reverse: false,
        lengths: None,
        extents: [1, 1, 2],
        of_codes: false,
    };
    let op = Recurrent {
        cell: case.cell,
        activations: case.activations,
        clip: None,
        reverse: false,
        lengths: false,
    };
    for (dtype, why) in [(DType::F32, "computed at run time"), (DType::F64, "F64")] {
        let mut g = Graph::new("recurrence");
        let shapes = [vec![1, 1, 2], vec![2, 2], vec![1, 2]];
        let x: Vec<_> = shapes
            .iter()
            .enumerate()
            .map(|(i, dims)| g.input(&format!("x{i}"), plain(dtype, dims)).unwrap())
            .collect();
        let y = g.add("y", op.clone(), &x).unwrap();
        let refused = capability(&g, y).unwrap_err().to_lowercase();
        assert!(refused.contains(&why.to_lowercase()) || dtype == DType::F64, "{refused}");
    }
}
