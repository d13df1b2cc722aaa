//! Branches, loops, scans, functions, and models of which a part only can be made a graph.

use super::{super::*, Draft, WithAttribute, i64s, int, ints, node, of, refused};
use crate::{DType, Shape, Tensor, interpreter, onnx::export::proto::float};
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, Message, NodeProto, OperatorSetIdProto,
    attribute_proto::AttributeType,
};
use std::collections::BTreeMap;

fn body(name: &str, inputs: &[&str], nodes: Vec<NodeProto>, outputs: &[&str]) -> AttributeProto {
    let values = |names: &[&str]| {
        let value = |&name: &&str| onnx_protobuf::ValueInfoProto { name: name.into(), ..Default::default() };
        names.iter().map(value).collect()
    };
    let graph =
        GraphProto { node: nodes, input: values(inputs), output: values(outputs), ..Default::default() };
    AttributeProto {
        name: name.into(),
        type_: AttributeType::GRAPH.into(),
        g: Some(graph).into(),
        ..Default::default()
    }
}

fn truth(value: bool) -> Tensor {
    Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![value.into()]).unwrap()
}

/// Runs a model as an executor does: graphs as far as they go, values that are wanted bound, eager computations between.
/// The results, and how many graphs it took.
fn execute(model: &Model, inputs: &[(&str, Tensor)]) -> (Vec<Tensor>, usize) {
    let mut values: BTreeMap<String, Tensor> =
        inputs.iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
    let mut bindings = Bindings::default();
    for (name, t) in &values {
        bindings.shapes.insert(name.clone(), t.shape().to_vec());
    }
    match model.import(&bindings).unwrap() {
        Imported::Whole(graph, _) => (run(&graph, &values), 1),
        Imported::Wants(names) => {
            for name in names {
                bindings.known.insert(name.clone(), values[&name].clone());
                bindings.shapes.remove(&name);
            }
            match model.import(&bindings).unwrap() {
                Imported::Whole(graph, _) => (run(&graph, &values), 1),
                Imported::Wants(again) => panic!("{again:?} are known"),
                Imported::Part(part) => go_on(*part, &mut values),
            }
        }
        Imported::Part(part) => go_on(*part, &mut values),
    }
}

fn run(graph: &crate::Graph, values: &BTreeMap<String, Tensor>) -> Vec<Tensor> {
    let inputs: Vec<Tensor> = graph.inputs().iter().map(|&id| values[&graph.node(id).name].clone()).collect();
    interpreter::run(graph, &inputs).unwrap()
}

fn go_on(part: Part, values: &mut BTreeMap<String, Tensor>) -> (Vec<Tensor>, usize) {
    let results = run(&part.graph, values);
    let mut found: BTreeMap<String, Tensor> =
        part.graph.outputs().iter().map(|o| o.name.clone()).zip(results).collect();
    let texts = part.rest.model(|_| None).texts();
    for eager in &part.eager {
        let given = eager.reads().iter().filter_map(|n| Some((n.clone(), found.get(n)?.clone())));
        found.extend(eager.run(given.collect(), &texts).unwrap());
    }
    let rest = part.rest.model(|name| found.get(name).map(Tensor::dtype));
    let inputs: Vec<(&str, Tensor)> =
        rest.inputs().iter().map(|i| (i.name.as_str(), found[&i.name].clone())).collect();
    let (results, graphs) = execute(&rest, &inputs);
    (results, graphs + 1)
}

fn model(draft: &Draft) -> Model {
    Model::parse(draft.proto().write_to_bytes().unwrap()).unwrap()
}

/// y = x + 1 where `c`, else -x.
fn branches() -> Draft {
    let yes = body("then_branch", &[], vec![node("Add", &["x", "one"], &["a"])], &["a"]);
    let no = body("else_branch", &[], vec![node("Neg", &["x"], &["a"])], &["a"]);
    let choice = node("If", &["c"], &["b"]).with(yes).with(no);
    Draft::new(17, [choice, node("Relu", &["b"], &["y"])])
        .input_of("c", DType::Bool, &[])
        .input("x", &[3])
        .constant("one", of(&[1], &[1f32]))
}

#[test]
fn a_branch_is_chosen_by_a_value_of_run_time() {
    let model = model(&branches());
    let x = of(&[3], &[1f32, -2.0, 0.5]);
    for (c, expected) in [(true, [2.0, 0.0, 1.5]), (false, [0.0, 2.0, 0.0])] {
        let (results, graphs) = execute(&model, &[("c", truth(c)), ("x", x.clone())]);
        assert_eq!(results, [of(&[3], &expected.map(|v: f32| v))], "{c}");
        assert_eq!(graphs, 1, "the condition is an input");
    }
    // Without the value there is one clear reason.
    branches().refused("operand 0 (cond, `c`) must be known");
}

#[test]
fn names_of_branches_may_be_the_same_and_may_be_nested() {
    let inner = |op: &str| node(op, &["a"], &["r"]);
    let nested = node("If", &["c"], &["r"])
        .with(body("then_branch", &[], vec![inner("Exp")], &["r"]))
        .with(body("else_branch", &[], vec![inner("Neg")], &["r"]));
    let yes = body("then_branch", &[], vec![node("Add", &["x", "x"], &["a"]), nested], &["r"]);
    let no = body("else_branch", &[], vec![node("Relu", &["x"], &["r"])], &["r"]);
    let d = Draft::new(17, [node("If", &["c"], &["y"]).with(yes).with(no)])
        .constant("c", truth(true))
        .input("x", &[1]);
    assert_eq!(d.floats(&[of(&[1], &[0f32])]), [1.0]);
}

/// Doubles `x` in each round, and gives the number of the round as a row: `m` rounds at most, while `x` is below 100 if
/// `is_open`.
fn looped(is_open: bool) -> Draft {
    let mut nodes = vec![node("Add", &["v", "v"], &["next"]), node("Identity", &["i"], &["number"])];
    nodes.push(match is_open {
        true => node("Less", &["next", "limit"], &["on"]),
        false => node("Identity", &["go"], &["on"]),
    });
    let body = body("body", &["i", "go", "v"], nodes, &["on", "next", "number"]);
    Draft::new(17, [node("Loop", &["m", "", "x"], &["y", "rounds"]).with(body)])
        .input("x", &[])
        .constant("limit", Tensor::scalar(100f32))
        .outputs(&["y", "rounds"])
}

#[test]
fn loops_of_known_rounds_are_unrolled() {
    let d = looped(false).constant("m", Tensor::scalar(3i64));
    assert_eq!(d.run(&[Tensor::scalar(1.5f32)]), [Tensor::scalar(12f32), i64s(&[0, 1, 2])]);
    let by_value = model(&looped(false).input_of("m", DType::S64, &[]));
    for (m, y) in [(1, 3.0f32), (4, 24.0)] {
        let inputs = [("x", Tensor::scalar(1.5f32)), ("m", Tensor::scalar(m as i64))];
        let numbers: Vec<i64> = (0..m as i64).collect();
        assert_eq!(execute(&by_value, &inputs), (vec![Tensor::scalar(y), i64s(&numbers)], 1));
    }
}

#[test]
fn loops_that_end_by_what_they_compute_run_by_their_definition() {
    let model = model(&looped(true).constant("m", Tensor::scalar(i64::MAX)));
    let (results, _) = execute(&model, &[("x", Tensor::scalar(3f32))]);
    assert_eq!(results, [Tensor::scalar(192f32), i64s(&[0, 1, 2, 3, 4, 5])]);
    // One that never ends is stopped.
    let (results, _) = execute(&model, &[("x", Tensor::scalar(100f32))]);
    assert_eq!(results[0], Tensor::scalar(200f32));
    let endless =
        Bindings { values: [("x".to_string(), Tensor::scalar(0f32))].into(), ..Bindings::default() };
    let why = model.graph(&endless).unwrap_err().to_string();
    assert!(why.contains("more than 262144 nodes"), "{why}");
}

#[test]
fn scans_go_both_ways() {
    let nodes = vec![node("Add", &["s", "e"], &["sum"]), node("Identity", &["sum"], &["row"])];
    let body = body("body", &["s", "e"], nodes, &["sum", "row"]);
    let scan = node("Scan", &["zero", "x"], &["y", "rows"]).with(body).with(int("num_scan_inputs", 1));
    let reversed = AttributeProto { ints: vec![1], ..ints("scan_input_directions", []) };
    let d = |scan: NodeProto| {
        Draft::new(17, [scan])
            .input("x", &[3, 2])
            .constant("zero", of(&[2], &[0f32, 0.0]))
            .outputs(&["y", "rows"])
    };
    let x = of(&[3, 2], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let forward = d(scan.clone()).run(std::slice::from_ref(&x));
    assert_eq!(forward[0], of(&[2], &[9f32, 12.0]));
    assert_eq!(forward[1], of(&[3, 2], &[1f32, 2.0, 4.0, 6.0, 9.0, 12.0]));
    let backward = d(scan.with(reversed)).run(&[x]);
    assert_eq!(backward[1], of(&[3, 2], &[5f32, 6.0, 8.0, 10.0, 9.0, 12.0]));
}

#[test]
fn bodies_must_fit_their_nodes() {
    let empty = body("body", &["i"], vec![node("Identity", &["i"], &["o"])], &["o"]);
    let d = Draft::new(17, [node("Loop", &["m", "", "x"], &["y"]).with(empty)]);
    d.constant("m", Tensor::scalar(1i64)).input("x", &[1]).refused("the body takes 1 inputs");
    let lost = body("then_branch", &[], vec![node("Relu", &["nowhere"], &["a"])], &["a"]);
    let fine = body("else_branch", &[], vec![node("Relu", &["x"], &["a"])], &["a"]);
    let d = Draft::new(17, [node("If", &["c"], &["y"]).with(lost).with(fine)]);
    d.constant("c", truth(true)).input("x", &[1]).refused("uses `nowhere`, which nothing defines");
    let d = Draft::new(17, [node("If", &["c"], &["y"])]).constant("c", truth(true));
    d.refused("attribute `then_branch` is missing");
}

#[test]
fn shapes_that_are_computed_divide_a_model() {
    // The places of what is above 0 in 5,000 elements are too many to be bound: they are computed between two graphs.
    let n = 5000;
    let nodes = [
        node("Neg", &["x"], &["a"]),
        node("NonZero", &["b"], &["places"]),
        node("Transpose", &["places"], &["columns"]),
        node("GatherND", &["a", "columns"], &["y"]),
        node("Relu", &["a"], &["b"]),
    ];
    let model = model(&Draft::new(17, nodes).input("x", &[n]));
    let x: Vec<f32> = (0..n).map(|i| if i % 1000 == 7 { -(i as f32) } else { 1.0 }).collect();
    let (results, graphs) = execute(&model, &[("x", of(&[n], &x))]);
    assert_eq!(results, [of(&[5], &[7f32, 1007.0, 2007.0, 3007.0, 4007.0])]);
    assert_eq!(graphs, 2);
    // A small value is bound: a second graph, for this value.
    let nodes =
        [node("ReduceMax", &["s"], &["m"]).with(int("keepdims", 1)), node("Expand", &["x", "m"], &["y"])];
    let model = self::model(&Draft::new(17, nodes).input_of("s", DType::S64, &[3]).input("x", &[1]));
    let inputs = [("s", i64s(&[1, 4, 2])), ("x", of(&[1], &[2f32]))];
    assert_eq!(execute(&model, &inputs), (vec![of(&[4], &[2f32; 4])], 1));
}

#[test]
fn what_is_computed_between_graphs_takes_constants_too() {
    // Boxes in a row, each over half of the next; all over the first are dropped, and only two are asked for.
    let n = 1500;
    let corners: Vec<f32> = (0..n).flat_map(|i| [0.0, i as f32, 1.0, i as f32 + 4.0]).collect();
    let scores: Vec<f32> = (0..n).map(|i| (n - i) as f32).collect();
    let nodes = [
        node("Abs", &["b"], &["boxes"]),
        node("NonMaxSuppression", &["boxes", "s", "most", "least"], &["y"]),
    ];
    let draft = Draft::new(11, nodes).input("b", &[1, n, 4]).input("s", &[1, 1, n]);
    let model = model(&draft.constant("most", i64s(&[2])).constant("least", of(&[1], &[0.5f32])));
    let inputs = [("b", of(&[1, n, 4], &corners)), ("s", of(&[1, 1, n], &scores))];
    let (results, graphs) = execute(&model, &inputs);
    assert_eq!(results, [of(&[2, 3], &[0i64, 0, 0, 0, 0, 2])]);
    assert_eq!(graphs, 2);
}

fn function(name: &str, nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "own".into(),
        input: vec!["p".into(), "q".into()],
        output: vec!["r".into()],
        attribute: vec!["alpha".into()],
        node: nodes,
        opset_import: vec![
            OperatorSetIdProto { version: 17, ..Default::default() },
            OperatorSetIdProto { domain: "own".into(), version: 1, ..Default::default() },
        ],
        ..Default::default()
    }
}

fn calling(call: NodeProto, functions: Vec<FunctionProto>) -> onnx_protobuf::ModelProto {
    let mut p = Draft::new(17, [NodeProto { domain: "own".into(), ..call }]).input("x", &[2]).proto();
    p.opset_import.push(OperatorSetIdProto { domain: "own".into(), version: 1, ..Default::default() });
    p.functions = functions;
    p
}

fn reference(name: &str, to: &str) -> AttributeProto {
    AttributeProto { ref_attr_name: to.into(), ..float(name, 0.0) }
}

#[test]
fn functions_are_their_nodes() {
    let inner = function("Leaky", vec![node("LeakyRelu", &["p"], &["r"]).with(reference("alpha", "alpha"))]);
    let call = NodeProto { domain: "own".into(), ..node("Leaky", &["p"], &["t"]) };
    let outer =
        function("Twice", vec![call.with(reference("alpha", "alpha")), node("Add", &["t", "t"], &["r"])]);
    let p =
        calling(node("Twice", &["x"], &["y"]).with(float("alpha", 0.5)), vec![inner.clone(), outer.clone()]);
    let model = Model::parse(p.write_to_bytes().unwrap()).unwrap();
    let graph = model.graph(&Bindings::default()).unwrap();
    let x = of(&[2], &[-1f32, 3.0]);
    assert_eq!(interpreter::run(&graph, std::slice::from_ref(&x)).unwrap(), [of(&[2], &[-1f32, 6.0])]);
    // Without the attribute, the op's own default holds.
    let p = calling(node("Twice", &["x"], &["y"]), vec![inner, outer]);
    let graph = Model::parse(p.write_to_bytes().unwrap()).unwrap().graph(&Bindings::default()).unwrap();
    assert_eq!(interpreter::run(&graph, &[x]).unwrap(), [of(&[2], &[-0.02f32, 6.0])]);
}

#[test]
fn functions_that_call_themselves_are_refused() {
    let call = |to: &str| NodeProto { domain: "own".into(), ..node(to, &["p"], &["r"]) };
    refused(&calling(node("A", &["x"], &["y"]), vec![function("A", vec![call("A")])]), "deep");
    let pair = vec![function("A", vec![call("B")]), function("B", vec![call("A")])];
    refused(&calling(node("A", &["x"], &["y"]), pair), "deep");
    // Two calls in each, so deep that all together would be 2^30.
    let fork = |to: &str| {
        let mut second = call(to);
        second.output = vec!["s".into()];
        vec![call(to), second]
    };
    let chain: Vec<FunctionProto> = (0..31)
        .map(|i| match i {
            30 => function("F30", vec![node("Relu", &["p"], &["r"])]),
            i => function(&format!("F{i}"), fork(&format!("F{}", i + 1))),
        })
        .collect();
    refused(&calling(node("F0", &["x"], &["y"]), chain), "nodes");
    let twice = vec![function("A", vec![node("Relu", &["p"], &["r"])]); 2];
    refused(&calling(node("A", &["x"], &["y"]), twice), "defined twice");
    let open = vec![function("A", vec![node("Relu", &["z"], &["r"])])];
    refused(&calling(node("A", &["x"], &["y"]), open), "`z`");
}

/// Rounds become part of the graph as long as what they become is not too much, and give the same in both ways.
#[test]
fn loops_that_become_too_many_ops_run_by_their_definition() {
    let mut normalized = vec![node("Identity", &["go"], &["go_on"])];
    let names = ["v", "a", "b", "c", "d", "e", "f"];
    normalized.extend(
        names.windows(2).map(|n| {
            node("GroupNormalization", &[n[0], "scale", "bias"], &n[1..]).with(int("num_groups", 1))
        }),
    );
    let rounds = |n: i64| {
        let body = body("body", &["i", "go", "v"], normalized.clone(), &["go_on", "f"]);
        let d = Draft::new(21, [node("Loop", &["n", "", "x"], &["y"]).with(body)]).input("x", &[1, 2, 2]);
        let d = d.constant("scale", of(&[2], &[1f32, 1.0])).constant("bias", of(&[2], &[0f32, 0.0]));
        let bytes = d.constant("n", Tensor::scalar(n)).proto().write_to_bytes().unwrap();
        Model::parse(bytes).unwrap()
    };
    let is_whole = |model: &Model| matches!(model.import(&Bindings::default()), Ok(Imported::Whole(..)));
    let (few, many) = (rounds(4), rounds(290));
    assert!(is_whole(&few) && !is_whole(&many));
    let x = of(&[1, 2, 2], &[1f32, -1.0, 3.0, 0.5]);
    let result = |model: &Model| execute(model, &[("x", x.clone())]).0[0].to_f32().unwrap();
    // Normalised numbers stay what they are, but for rounding and epsilon.
    let (few, many) = (result(&few), result(&many));
    assert!(few.iter().zip(&many).all(|(a, b)| (a - b).abs() < 0.02), "{few:?} {many:?}");
}
