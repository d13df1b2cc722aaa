use super::*;
use crate::onnx::{Dim, ImportError};
use onnx_protobuf::{
    StringStringEntryProto, TensorProto,
    attribute_proto::AttributeType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

fn relu() -> Draft {
    Draft::new(17, [node("Relu", &["x"], &["y"])]).input("x", &[2])
}

#[test]
fn graphs_that_are_none() {
    let mut d = relu();
    d.nodes.push(node("Neg", &["x"], &["y"]));
    d.refused("both write `y`");
    relu().outputs(&["ghost"]).refused("`ghost`");
    relu().outputs(&[]).refused("no outputs");
    relu().outputs(&["y", "y"]).refused("two outputs");
    relu().input("x", &[2]).refused("two inputs");
    let twice = relu().constant("c", iota(&[1])).constant("c", iota(&[1]));
    twice.refused("two initializers");
    Draft::new(17, [node("Add", &["x", "nowhere"], &["y"])]).input("x", &[2]).refused("`nowhere`");
    Draft::new(17, [node("Relu", &["x"], &["x"])]).input("x", &[2]).outputs(&["x"]).refused("writes `x`");
    let cycle =
        [node("Add", &["x", "b"], &["a"]), node("Relu", &["a"], &["b"]), node("Relu", &["b"], &["y"])];
    Draft::new(17, cycle).input("x", &[2]).refused("cycle");
    let own = Draft::new(17, [node("Add", &["x", "y"], &["y"])]).input("x", &[2]);
    own.refused("`y_node` → `y_node`");
}

#[test]
fn nodes_may_stand_in_any_order() {
    let d = Draft::new(17, [node("Neg", &["a"], &["y"]), node("Relu", &["x"], &["a"])]).input("x", &[2]);
    assert_eq!(d.floats(&[of(&[2], &[-1f32, 2.0])]), [-0.0, -2.0]);
}

#[test]
fn versions() {
    for (opset, word) in [(0, "opset 0"), (28, "1 to 27"), (-1, "opset -1"), (i64::MAX, "1 to 27")] {
        Draft { opset, ..relu() }.refused(word);
    }
    let mut p = relu().proto();
    p.opset_import.clear();
    refused(&p, "opset_import");
    p = relu().proto();
    p.ir_version = 9999;
    refused(&p, "IR version is 9999");
    p = relu().proto();
    p.opset_import.push(OperatorSetIdProto { domain: "ai.onnx".into(), version: 13, ..Default::default() });
    refused(&p, "opsets 17 and 13");
    p = relu().proto();
    p.graph.clear();
    refused(&p, "no graph");
}

#[test]
fn all_unsupported_ops_are_listed_at_once() {
    let mut foreign = node("FusedConv", &["a"], &["b"]);
    foreign.domain = "com.microsoft".into();
    let nodes = [node("Nonsense", &["x"], &["a"]), foreign, node("HardSwish", &["b"], &["y"])];
    let d = Draft::new(13, nodes).input("x", &[2]);
    let model = Model::parse(d.proto().write_to_bytes().unwrap()).unwrap();
    assert_eq!(model.op_histogram()["com.microsoft::FusedConv"], 1);
    let Err(ImportError::UnsupportedOps(ops)) = model.graph(&Bindings::default()) else {
        panic!("accepted");
    };
    let found: Vec<_> = ops.iter().map(|o| (o.node.as_str(), o.op.as_str(), o.version)).collect();
    // HardSwish came with opset 14.
    assert_eq!(
        found,
        [("a_node", "Nonsense", Some(13)), ("b_node", "FusedConv", None), ("y_node", "HardSwish", Some(13))]
    );
}

#[test]
fn attributes() {
    let leaky =
        |a: AttributeProto| Draft::new(17, [node("LeakyRelu", &["x"], &["y"]).with(a)]).input("x", &[2]);
    leaky(int("alpha", 1)).refused("must be a float, not an int");
    leaky(float("alpha", f32::NAN)).refused("NaN");
    leaky(float("beta", 1.0)).refused("`beta`");
    leaky(AttributeProto { ref_attr_name: "a".into(), ..float("alpha", 0.1) }).refused("function");
    leaky(AttributeProto { type_: AttributeType::UNDEFINED.into(), ..float("alpha", 0.1) })
        .refused("no type");
    leaky(AttributeProto { ints: vec![1], ..float("alpha", 0.1) }).refused("holds ints");
    leaky(AttributeProto { type_: AttributeType::TENSOR.into(), ..float("alpha", 0.1) })
        .refused("holds none");
    let mut twice = leaky(float("alpha", 0.1));
    twice.nodes[0].attribute.push(float("alpha", 0.2));
    twice.refused("given twice");
    let many = Draft::new(17, [node("Relu", &["x", "x"], &["y"])]).input("x", &[2]);
    many.refused("operand 1 (`x`)");
    Draft::new(17, [node("Add", &["x", ""], &["y"])]).input("x", &[2]).refused("operand 1 (B) is missing");
    let group = Draft::new(17, [node("Conv", &["x", "w"], &["y"]).with(int("group", -1))])
        .input("x", &[1, 1, 4])
        .constant("w", iota(&[1, 1, 2]));
    group.refused("`group`");
    Draft::new(17, [node("Concat", &["x", "x"], &["y"])]).input("x", &[2]).refused("`axis` is missing");
}

/// A model whose initializer `w` is this message.
fn with_tensor(t: TensorProto) -> ModelProto {
    let mut p = Draft::new(21, [node("Cast", &["w"], &["y"]).with(int("to", 1))]).proto();
    p.graph.mut_or_insert_default().initializer.push(TensorProto { name: "w".into(), ..t });
    p
}

#[test]
fn stored_tensors() {
    let t =
        |data_type: i32, dims: &[i64]| TensorProto { data_type, dims: dims.to_vec(), ..Default::default() };
    let raw = |data_type, dims: &[i64], n: usize| TensorProto { raw_data: vec![0; n], ..t(data_type, dims) };
    for (tensor, word) in [
        (raw(1, &[4], 12), "12 are stored"),
        (raw(1, &[4], 20), "20 are stored"),
        (raw(1, &[-4, -4], 64), "-4 is negative"),
        (t(1, &[1 << 32, 1 << 32]), "2^40"),
        (t(1, &[0, 1 << 62]), "2^40"),
        (t(1, &[1 << 31]), "limit"),
        (raw(1, &[1; 17], 4), "rank 17"),
        (t(0, &[1]), "undefined"),
        (t(8, &[1]), "0 are stored"),
        (t(999, &[1]), "999 does not exist"),
        (raw(22, &[33], 4), "17 bytes"),
        (raw(22, &[33], 33), "17 bytes"),
        (t(1, &[2]), "0 are stored"),
        (TensorProto { float_data: vec![1.0], ..t(7, &[1]) }, "has float_data"),
        (TensorProto { float_data: vec![1.0], ..raw(1, &[1], 4) }, "twice"),
        (TensorProto { int32_data: vec![128], ..t(3, &[1]) }, "128 is not a value of s8"),
        (TensorProto { int32_data: vec![-1], ..t(2, &[1]) }, "-1 is not a value of u8"),
        (TensorProto { int32_data: vec![1 << 16], ..t(10, &[1]) }, "16-bit float"),
        (TensorProto { uint64_data: vec![1 << 32], ..t(12, &[1]) }, "not a value of u32"),
        (TensorProto { segment: Some(Default::default()).into(), ..raw(1, &[1], 4) }, "segments"),
    ] {
        let p = with_tensor(tensor);
        refused(&p, word);
        refused(&p, "`w`");
    }
    for tensor in [
        raw(1, &[2], 8),
        TensorProto { float_data: vec![1.0, 2.0], ..t(1, &[2]) },
        TensorProto { int32_data: vec![-1, 2], ..t(3, &[2]) },
        TensorProto { int32_data: vec![1, 0], ..t(9, &[2]) },
        TensorProto { int32_data: vec![0x3c00, 0], ..t(10, &[2]) },
        TensorProto { int32_data: vec![0x21], ..t(22, &[2]) },
        TensorProto { uint64_data: vec![1, 2], ..t(12, &[2]) },
        t(1, &[0]),
    ] {
        import(&with_tensor(tensor)).unwrap();
    }
}

#[test]
fn sparse_tensors() {
    let sparse = |values: Tensor, indices: Tensor, dims: &[i64]| {
        let mut p = Draft::new(17, [node("Neg", &["w"], &["y"])]).proto();
        p.graph.mut_or_insert_default().sparse_initializer.push(onnx_protobuf::SparseTensorProto {
            values: Some(tensor("w", &values)).into(),
            indices: Some(tensor("", &indices)).into(),
            dims: dims.to_vec(),
            ..Default::default()
        });
        p
    };
    let two = || of(&[2], &[1f32, 2.0]);
    for indices in [i64s(&[1, 3]), of(&[2, 2], &[0i64, 1, 1, 1])] {
        let g = import(&sparse(two(), indices, &[2, 2])).unwrap();
        let y = interpreter::run(&g, &[]).unwrap();
        assert_eq!(y[0], of(&[2, 2], &[-0.0f32, -1.0, -0.0, -2.0]));
    }
    refused(&sparse(two(), i64s(&[1, 4]), &[2, 2]), "outside");
    refused(&sparse(two(), i64s(&[-1, 3]), &[2, 2]), "outside");
    refused(&sparse(two(), i64s(&[3, 1]), &[2, 2]), "ascending");
    refused(&sparse(two(), i64s(&[1, 1]), &[2, 2]), "twice");
    refused(&sparse(two(), i64s(&[1]), &[2, 2]), "cannot have indices");
    refused(&sparse(two(), i64s(&[1, 3]), &[1 << 20, 1 << 19]), "dense");
}

#[test]
fn integer_division_by_a_constant_zero_is_an_error() {
    let d = Draft::new(17, [node("Div", &["a", "b"], &["y"])]);
    d.constant("a", of(&[1], &[1i32])).constant("b", of(&[1], &[0i32])).refused("y_node");
}

fn symbolic(dims: &[Option<dimension::Value>]) -> Model {
    let mut p = relu().proto();
    let shape = &mut p.graph.mut_or_insert_default().input[0].type_.mut_or_insert_default().value;
    let Some(type_proto::Value::TensorType(t)) = shape else { panic!("the draft declares a tensor") };
    t.shape.mut_or_insert_default().dim =
        dims.iter().map(|value| Dimension { value: value.clone(), ..Default::default() }).collect();
    Model::parse(p.write_to_bytes().unwrap()).unwrap()
}

#[test]
fn symbolic_dimensions_are_bound() {
    use dimension::Value::{DimParam, DimValue};
    let model = symbolic(&[Some(DimParam("N".into())), Some(DimValue(3)), Some(DimParam("L".into())), None]);
    let expected = [Dim::Symbol("N".into()), Dim::Known(3), Dim::Symbol("L".into()), Dim::Unknown];
    assert_eq!(model.inputs()[0].dims.as_deref(), Some(&expected[..]));
    let dims = |b: &Bindings| {
        model.graph(b).map(|g| g.shape(g.inputs()[0].out()).to_vec()).map_err(|e| e.to_string())
    };
    let shape =
        |dims: &[usize]| Bindings { shapes: [("x".to_owned(), dims.to_vec())].into(), ..Bindings::default() };
    assert_eq!(dims(&shape(&[2, 3, 5, 7])), Ok(vec![2, 3, 5, 7]));
    for (bindings, word) in [
        (Bindings::default(), "dimension L of [N, 3, L, ?] is not known; say what it is with --shape x=..."),
        (Bindings { symbols: [("L".to_owned(), 5)].into(), ..Bindings::default() }, "dimension ?"),
        (shape(&[2, 4, 5, 7]), "the model declares 3"),
        (shape(&[2, 3, 5]), "3 dimensions"),
        (Bindings { shapes: [("z".to_owned(), vec![1])].into(), ..Bindings::default() }, "`x`"),
    ] {
        assert!(dims(&bindings).unwrap_err().contains(word), "{word}");
    }
    let same = symbolic(&[Some(DimParam("N".into())), Some(DimParam("N".into()))]);
    assert!(same.graph(&shape(&[2, 3])).unwrap_err().to_string().contains("dimension N is 3 here, but 2"));
    let g = same.graph(&Bindings::default()).unwrap();
    assert_eq!(g.shape(g.inputs()[0].out()).dims(), [1, 1]);
}

#[test]
fn metadata_does_not_matter() {
    let mut p = relu().proto();
    p.metadata_props.push(StringStringEntryProto {
        key: "k".into(),
        value: "v".into(),
        ..Default::default()
    });
    // A value_info that lies is no more than a comment.
    let lie = value_info("y", &TensorType::f32(&[9, 9]).unwrap(), None);
    p.graph.mut_or_insert_default().value_info.push(lie);
    assert!(import(&p).is_ok());
    let wrong = value_info("y", &TensorType::new(DType::S64, Shape::new([2]).unwrap()), None);
    p.graph.mut_or_insert_default().output[0] = wrong;
    refused(&p, "declared as s64, but is f32");
}
