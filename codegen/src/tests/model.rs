//! The framework: aliases, outputs, errors.

use super::{compiled, placed, run_serially, tiers};
use qcc_ir::{
    DType, Device, Graph, Shape, TensorType,
    ops::{Reshape, Transfer},
};

#[test]
fn an_input_that_is_an_output_is_copied() {
    for len in [0, 1, 15, 16, 17, 10_000] {
        let mut g = Graph::new("copy");
        let x = g.input("x", TensorType::new(DType::U8, Shape::new([len]).unwrap())).unwrap();
        let y = g.add("y", Reshape { shape: Shape::new([1, len]).unwrap() }, &[x]).unwrap();
        let z = g.add("z", Transfer { to: Device::Int8Jit }, &[y.out()]).unwrap();
        g.output("a", z.out());
        g.output("b", x);
        let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
        for tier in tiers() {
            let outputs = run_serially(&compiled(&placed(&g), tier), &[&bytes]);
            assert_eq!(outputs, [bytes.clone(), bytes.clone()], "{len} on {tier}");
        }
    }
}
