//! Quantization at run time and its products against their definitions.

use super::{Random, check, plain};
use qcc_ir::{
    DType, Graph, QuantParams, Shape, Tensor, TensorType, ValueId,
    ops::{Clamp, DynamicQuantize, QMatMulToFloat, ToFloat},
};

/// A product of `[…, M, K]` by `[K, columns]`.
struct Case<'a> {
    x: &'a [usize],
    columns: usize,
    /// The first dimension that shares a grid.
    axis: usize,
    /// Largest magnitude of a weight.
    weights: i32,
    bias: bool,
    residual: bool,
    clamp: Clamp,
}

const PLAIN: Case<'static> =
    Case { x: &[3, 8], columns: 16, axis: 1, weights: 127, bias: false, residual: false, clamp: Clamp::NONE };

impl Case<'_> {
    fn inner(&self) -> usize {
        self.x[self.x.len() - 1]
    }

    fn result(&self) -> TensorType {
        let mut dims = self.x.to_vec();
        dims[self.x.len() - 1] = self.columns;
        plain(DType::F32, &dims)
    }

    fn weights(&self, g: &mut Graph, r: &mut Random) -> ValueId {
        let shape = Shape::new([self.inner(), self.columns]).unwrap();
        let code = |r: &mut Random| (r.next() % (2 * self.weights as u64 + 1)) as i32 - self.weights;
        let codes: Vec<i8> = (0..shape.elements()).map(|_| code(r) as i8).collect();
        let scales = (0..self.columns).map(|_| 0.001 + (r.next() >> 40) as f32 * 1e-9).collect();
        let params = QuantParams::per_axis(1, scales, vec![0; self.columns]).unwrap();
        let ty = TensorType::quantized(DType::S8, shape.clone(), params).unwrap();
        g.quantized_constant("w", Tensor::from_vec(shape, codes).unwrap(), ty).unwrap()
    }

    /// The product of these codes, scales and zero points, as the graph's result.
    fn multiply(&self, g: &mut Graph, [codes, scale, zero]: [ValueId; 3], r: &mut Random) {
        let mut operands = vec![codes, self.weights(g, r), scale, zero];
        if self.bias {
            let bias = (0..self.columns).map(|_| (r.next() >> 40) as f32 * 1e-6 - 8.0).collect();
            let shape = Shape::new([self.columns]).unwrap();
            operands.push(g.constant("bias", Tensor::from_vec::<f32>(shape, bias).unwrap()));
        }
        if self.residual {
            operands.push(g.input("residual", self.result()).unwrap());
        }
        let to = ToFloat { grids: true, bias: self.bias, residual: self.residual, clamp: self.clamp };
        let y = g.add("y", QMatMulToFloat { to }, &operands).unwrap();
        g.output("y", y.out());
    }

    /// What is quantized, its product, and, if asked for, its grids.
    fn graph(&self, seed: u64, shows_grids: bool) -> Graph {
        let mut g = Graph::new("dynamic");
        let x = g.input("x", plain(DType::F32, self.x)).unwrap();
        let q = g.add("q", DynamicQuantize { axis: self.axis }, &[x]).unwrap();
        if shows_grids {
            for (port, name) in ["codes", "scale", "zero"].into_iter().enumerate() {
                g.output(name, q.port(port as u16));
            }
        }
        self.multiply(&mut g, [0, 1, 2].map(|port| q.port(port)), &mut Random::new(seed));
        g
    }
}

#[test]
fn rows_are_quantized_as_their_definition_has_it() {
    for (seed, x) in
        [&[1, 1][..], &[5, 3], &[2, 7, 15], &[4, 16], &[3, 17], &[2, 31], &[9, 64], &[3, 100], &[2, 770]]
            .into_iter()
            .enumerate()
    {
        for axis in 0..x.len() {
            let mut g = Graph::new("rows");
            let input = g.input("x", plain(DType::F32, x)).unwrap();
            let q = g.add("q", DynamicQuantize { axis }, &[input]).unwrap();
            for (port, name) in ["codes", "scale", "zero"].into_iter().enumerate() {
                g.output(name, q.port(port as u16));
            }
            check(&g, seed as u64);
        }
    }
}

#[test]
fn products_of_rows_equal_their_definition() {
    let clamps =
        [Clamp::NONE, Clamp::RELU, Clamp { lo: -1.5, hi: 2.5 }, Clamp { lo: f32::NEG_INFINITY, hi: 0.5 }];
    let shapes: [(&[usize], usize); 10] = [
        (&[1, 1], 1),
        (&[1, 33], 70),
        (&[4, 3], 5),
        (&[7, 16], 17),
        (&[3, 5, 20], 33),
        (&[17, 66], 130),
        (&[2, 13, 64], 64),
        (&[33, 48], 96),
        (&[64, 12], 31),
        (&[1, 200], 16),
    ];
    for (i, (x, columns)) in shapes.into_iter().enumerate() {
        for (weights, clamp) in [127, 64].into_iter().zip(clamps.into_iter().skip(i % 3)) {
            let case = Case {
                x,
                columns,
                axis: if i % 4 == 3 { 0 } else { x.len() - 1 },
                weights,
                bias: i % 2 == 0,
                residual: i % 3 != 1,
                clamp,
            };
            check(&case.graph(i as u64, false), i as u64);
        }
    }
}

#[test]
fn grids_that_somebody_else_reads_are_copied() {
    for axis in [0, 1] {
        check(&Case { axis, ..PLAIN }.graph(3, true), 3);
    }
}

#[test]
fn codes_and_grids_may_come_from_anywhere() {
    for (seed, grids) in [[1, 1], [3, 1]].into_iter().enumerate() {
        for constant_zero in [false, true] {
            let mut r = Random::new(seed as u64);
            let mut g = Graph::new("given");
            let codes = g.input("codes", plain(DType::U8, PLAIN.x)).unwrap();
            let scale = g.input("scale", plain(DType::F32, &grids)).unwrap();
            let zero = match constant_zero {
                true => g.constant("zero", Tensor::scalar(0i32)),
                false => g.input("zero", plain(DType::S32, &grids)).unwrap(),
            };
            PLAIN.multiply(&mut g, [codes, scale, zero], &mut r);
            check(&g, 5 + seed as u64);
        }
    }
}
