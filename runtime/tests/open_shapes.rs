//! Models whose shapes are open: quantized row by row, and divided where shapes depend on data.

use onnx_protobuf::{
    GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};
use qcc_runtime::{
    Backend, Compiler, DynamicModel, JitOptions, Precision, ProgramFile, Tier, bench_dynamic,
    ir::{Shape, Tensor, onnx},
};

const FEATURES: usize = 32;

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: format!("{op} {output}"),
        input: inputs.iter().map(|&i| i.into()).collect(),
        output: vec![output.into()],
        ..Default::default()
    }
}

/// A matrix whose elements are of both signs and differ in size from column to column.
fn matrix(name: &str) -> TensorProto {
    let element = |i: usize| ((i * 37 % 64) as f32 - 31.0) / 64.0 * (1.0 + (i % FEATURES) as f32 / 8.0);
    TensorProto {
        name: name.into(),
        dims: vec![FEATURES as i64; 2],
        data_type: 1,
        float_data: (0..FEATURES * FEATURES).map(element).collect(),
        ..Default::default()
    }
}

/// A model of `x: f32[N x 32]` and two matrices `w`, `v`.
fn model(nodes: Vec<NodeProto>) -> onnx::Model {
    let dim = |value| Dimension { value: Some(value), ..Default::default() };
    let dims =
        vec![dim(dimension::Value::DimParam("N".into())), dim(dimension::Value::DimValue(FEATURES as i64))];
    let shape = TensorShapeProto { dim: dims, ..Default::default() };
    let tensor = type_proto::Tensor { elem_type: 1, shape: Some(shape).into(), ..Default::default() };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    let value = |name: &str| ValueInfoProto { name: name.into(), ..Default::default() };
    let graph = GraphProto {
        name: "rows".into(),
        node: nodes,
        initializer: vec![matrix("w"), matrix("v")],
        input: vec![ValueInfoProto { type_: Some(ty).into(), ..value("x") }],
        output: vec![value("y")],
        ..Default::default()
    };
    let opset = OperatorSetIdProto { version: 17, ..Default::default() };
    let model = ModelProto {
        ir_version: 8,
        opset_import: vec![opset],
        graph: Some(graph).into(),
        ..Default::default()
    };
    onnx::Model::parse(model.write_to_bytes().unwrap()).unwrap()
}

fn perceptron() -> onnx::Model {
    model(vec![node("MatMul", &["x", "w"], "h"), node("Tanh", &["h"], "a"), node("MatMul", &["a", "v"], "y")])
}

/// Rows of which each has a range of its own.
fn rows(count: usize) -> Tensor {
    let x = |i: usize| ((i * 29 % 101) as f32 / 50.0 - 1.0) * (1 + i / FEATURES) as f32;
    let elements: Vec<f32> = (0..count * FEATURES).map(x).collect();
    Tensor::from_vec(Shape::new([count, FEATURES]).unwrap(), elements).unwrap()
}

fn result(model: &DynamicModel, x: &Tensor) -> Vec<f32> {
    model.run(std::slice::from_ref(x)).unwrap().outputs[0].to_f32().unwrap()
}

#[test]
fn a_row_that_is_quantized_at_run_time_is_the_same_among_any_others() {
    let dynamic = Compiler::new().precision(Precision::Int8Dynamic);
    let compiled = DynamicModel::new(perceptron(), "rows", Backend::jit(dynamic.clone()));
    let float = DynamicModel::new(perceptron(), "rows", Backend::Interpreter);
    let all = result(&compiled, &rows(7));
    for count in [1, 3, 6] {
        assert_eq!(result(&compiled, &rows(count)), all[..count * FEATURES], "{count} rows");
    }
    let exact = result(&float, &rows(7));
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>().sqrt();
    let error = norm(&mut all.iter().zip(&exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    assert!(error > 0.0 && error < 0.02, "an error of {error}: float, or no 8 bits");
}

#[test]
fn a_file_keeps_that_rows_are_quantized_at_run_time() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file) = (dir.path().join("rows.onnx"), dir.path().join("rows.qcc"));
    let bytes = onnx::export(&perceptron().graph(&onnx::Bindings::default()).unwrap()).unwrap();
    std::fs::write(&model, bytes).unwrap();
    let compiler = Compiler::new().precision(Precision::Int8Dynamic);
    compiler.dynamic_program(&model).unwrap().save(&file).unwrap();
    let ProgramFile::Dynamic(program) = ProgramFile::load(&file, 1 << 30).unwrap() else { panic!("placed") };
    assert!(program.info().calibrated.is_none());
    let from_file = program.model_with(&Compiler::new(), "rows");
    let direct = DynamicModel::load(&model, Backend::jit(compiler), 1 << 30).unwrap();
    assert_eq!(result(&from_file, &rows(1)), result(&direct, &rows(1)));
}

#[test]
fn models_that_are_divided_by_data_are_timed_part_by_part() {
    // Rows that are picked by what is computed: how many there are is known at run time.
    let nodes = vec![
        node("MatMul", &["x", "w"], "h"),
        node("NonZero", &["h"], "places"),
        node("Transpose", &["places"], "pairs"),
        node("GatherND", &["h", "pairs"], "picked"),
        node("Relu", &["picked"], "y"),
    ];
    let compiler = |precision| Backend::jit(Compiler::new().precision(precision));
    let models = [Precision::Float, Precision::Int8Dynamic]
        .map(|p| DynamicModel::new(model(nodes.clone()), "picked", compiler(p)));
    // More elements than a graph is specialised to.
    let x = rows(200);
    assert_eq!(models[0].run(std::slice::from_ref(&x)).unwrap().compiled, 2);
    let jit = JitOptions::new(Tier::available()[0]);
    let report = bench_dynamic(&models, &jit, &[x], 2, &mut |_, _| {}).unwrap();
    assert_eq!(
        report.runs.iter().map(|r| r.precision).collect::<Vec<_>>(),
        [Precision::Float, Precision::Int8Dynamic]
    );
    for run in &report.runs {
        let layers: Vec<&str> = run.layers.iter().map(|l| &l.name[..]).collect();
        assert!(
            layers.iter().any(|l| l.contains("h")) && layers.iter().any(|l| l.contains("y")),
            "{layers:?}"
        );
    }
}
