use crate::samples::{every_op, quantized, shape};
use qcc_ir::{
    DType, Device, Graph, QuantParams, Stage, TensorType,
    ops::{BatchNorm, Dequantize, FakeQuant, QUnary, Quantize, Transfer, Transpose, Unary, UnaryKind},
    verify,
};

fn with(op: impl FnOnce(&mut Graph)) -> Graph {
    let mut g = Graph::new("g");
    op(&mut g);
    g
}

/// The stages at which the graph verifies.
fn stages(mut g: Graph) -> Vec<Stage> {
    let all = [Stage::Float, Stage::FakeQuant, Stage::Int8, Stage::Placed];
    all.into_iter()
        .filter(|&stage| {
            g.stage = stage;
            verify(&g).is_ok()
        })
        .collect()
}

#[test]
fn each_stage_allows_its_ops() {
    let real = TensorType::f32(&[1, 2, 3]).unwrap();
    let params = QuantParams::per_tensor(0.1, 3).unwrap();
    let plain = with(|g| {
        let x = g.input("x", real.clone()).unwrap();
        let q = g.add("q", Quantize { dtype: DType::U8, params: params.clone() }, &[x]).unwrap();
        let t = g.add("t", Transpose { perm: vec![0, 2, 1] }, &[q.out()]).unwrap();
        g.add("d", Dequantize {}, &[t.out()]).unwrap();
    });
    assert_eq!(stages(plain), [Stage::Float, Stage::FakeQuant, Stage::Int8]);
    let fake = with(|g| {
        let x = g.input("x", real.clone()).unwrap();
        let op = FakeQuant { dtype: DType::U8, lo: 0, hi: 255, params: params.clone() };
        g.add("f", op, &[x]).unwrap();
    });
    assert_eq!(stages(fake), [Stage::FakeQuant]);
    let integer = with(|g| {
        let x = g.input("x", quantized(DType::U8, &[4], 0.1, 0)).unwrap();
        let output = qcc_ir::OutputGrid::full(DType::U8, 0.2, 9).unwrap();
        g.add("u", QUnary { kind: UnaryKind::Exp, output }, &[x]).unwrap();
    });
    assert_eq!(stages(integer), [Stage::Int8]);
    let norm = with(|g| {
        let x = g.input("x", real.clone()).unwrap();
        let c = g.input("c", TensorType::new(DType::F32, shape(&[2]))).unwrap();
        g.add("n", BatchNorm { epsilon: 0.1, axis: 1 }, &[x, c, c, c, c]).unwrap();
    });
    assert_eq!(stages(norm.clone()), [Stage::Float, Stage::FakeQuant]);
    let e = verify(&{
        let mut norm = norm;
        norm.stage = Stage::Int8;
        norm
    });
    assert_eq!(e.unwrap_err().to_string(), "node `n` (BatchNorm): may not stand in a graph of stage int8");
    assert_eq!(stages(every_op()), []);
}

#[test]
fn placed_graphs_transfer_between_devices() {
    let mut g = Graph::new("g");
    g.stage = Stage::Placed;
    let x = g.input("x", TensorType::f32(&[4]).unwrap()).unwrap();
    let relu = Unary { kind: UnaryKind::Relu };
    let a = g.add("a", relu.clone(), &[x]).unwrap();
    let b = g.add("b", relu, &[a.out()]).unwrap();
    g.output("y", b.out());
    let message = |g: &Graph| verify(g).unwrap_err().to_string();
    assert_eq!(message(&g), "node `a` (Unary): has no device");
    g.set_device(a, Some(Device::FloatJit));
    g.set_device(b, Some(Device::FloatJit));
    assert_eq!(verify(&g), Ok(()));
    g.set_device(b, Some(Device::Interpreter));
    assert!(message(&g).contains("node `b` (Unary): is on interpreter and uses `a` of another device"));
    let t = g.add("t", Transfer { to: Device::Interpreter }, &[a.out()]).unwrap();
    g.set_operand(b, 0, t.out()).unwrap();
    g.set_device(t, Some(Device::Interpreter));
    assert_eq!(verify(&g), Ok(()));
    g.set_op(t, Transfer { to: Device::FloatJit }).unwrap();
    assert_eq!(message(&g), "node `t` (Transfer): is on interpreter, but hands its operand to float-jit");
}

#[test]
fn outputs_have_names_of_their_own() {
    let mut g = Graph::new("g");
    let x = g.input("x", TensorType::f32(&[4]).unwrap()).unwrap();
    g.output("y", x);
    assert_eq!(verify(&g), Ok(()));
    g.output("y", x);
    assert_eq!(verify(&g).unwrap_err().to_string(), "node `y` (output): another output has this name");
    g.set_outputs(vec![]);
    g.output("z", x.node.port(1));
    assert_eq!(verify(&g).unwrap_err().to_string(), "node `z` (output): value %0.1 does not exist");
}
