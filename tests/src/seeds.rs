//! Small models of many kinds, for mutation.

use crate::mutate::{graph_attribute, info};
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto,
    TensorProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType, type_proto,
};
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

const F32: i32 = 1;
const U8: i32 = 2;
const S8: i32 = 3;
const S32: i32 = 6;
const S64: i32 = 7;
const BOOL: i32 = 9;

/// A node; attributes are given as `axis=1`, `pads=[1,1]`, `alpha=0.5` or `mode='linear'`.
fn node(op: &str, inputs: &str, outputs: &str, attributes: &str) -> NodeProto {
    let names = |text: &str| text.split(',').map(|n| n.trim().to_owned()).collect();
    NodeProto {
        op_type: op.into(),
        name: format!("{op} of {outputs}"),
        input: if inputs.is_empty() { vec![] } else { names(inputs) },
        output: names(outputs),
        attribute: attributes.split(' ').filter(|a| !a.is_empty()).filter_map(attribute).collect(),
        ..Default::default()
    }
}

fn attribute(text: &str) -> Option<AttributeProto> {
    let (name, value) = text.split_once('=')?;
    let mut a = AttributeProto { name: name.into(), ..Default::default() };
    if let Some(list) = value.strip_prefix('[') {
        a.ints = list.trim_end_matches(']').split(',').filter_map(|n| n.parse().ok()).collect();
        a.type_ = AttributeType::INTS.into();
    } else if let Some(word) = value.strip_prefix('\'') {
        a.s = word.trim_end_matches('\'').into();
        a.type_ = AttributeType::STRING.into();
    } else if let Ok(i) = value.parse() {
        a.i = i;
        a.type_ = AttributeType::INT.into();
    } else {
        a.f = value.parse().ok()?;
        a.type_ = AttributeType::FLOAT.into();
    }
    Some(a)
}

fn with(mut node: NodeProto, attribute: AttributeProto) -> NodeProto {
    node.attribute.push(attribute);
    node
}

/// A tensor whose elements are small and differ.
fn weights(name: &str, dims: &[i64]) -> TensorProto {
    let n: i64 = dims.iter().product();
    let float_data = (0..n).map(|i| ((i * 37 % 64) as f32 - 31.0) / 64.0).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: F32, float_data, ..Default::default() }
}

fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: F32,
        float_data: values.to_vec(),
        ..Default::default()
    }
}

fn ints(name: &str, values: &[i64]) -> TensorProto {
    let dims = vec![values.len() as i64];
    TensorProto { name: name.into(), dims, data_type: S64, int64_data: values.to_vec(), ..Default::default() }
}

/// A scalar or tensor of bytes, truths, or 32-bit integers.
fn codes(name: &str, data_type: i32, dims: &[i64], first: i32) -> TensorProto {
    let n: i64 = dims.iter().product();
    let int32_data = (0..n as i32).map(|i| first + i % 7).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type, int32_data, ..Default::default() }
}

fn trips(name: &str, n: i64) -> TensorProto {
    TensorProto { name: name.into(), data_type: S64, int64_data: vec![n], ..Default::default() }
}

fn graph(
    inputs: Vec<ValueInfoProto>,
    initializer: Vec<TensorProto>,
    node: Vec<NodeProto>,
    outputs: &[&str],
) -> GraphProto {
    let output =
        outputs.iter().map(|&name| ValueInfoProto { name: name.into(), ..Default::default() }).collect();
    GraphProto { name: "seed".into(), node, initializer, input: inputs, output, ..Default::default() }
}

fn model(opset: i64, graph: GraphProto) -> ModelProto {
    let import =
        |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version, ..Default::default() };
    ModelProto {
        ir_version: 8,
        opset_import: vec![import("", opset), import("com.microsoft", 1)],
        graph: Some(graph).into(),
        ..Default::default()
    }
}

/// A model for each family of ops and each way that a file has to say something.
pub fn generated() -> Vec<ModelProto> {
    let mut models =
        vec![convolutions(), shapes(), dynamic(), qdq(), qoperator(), recurrent(), attention(), function()];
    models.extend([
        coded_recurrent(),
        branches(),
        loops(false),
        loops(true),
        scan(),
        sequences(),
        optional(),
    ]);
    models
}

fn convolutions() -> ModelProto {
    model(
        13,
        graph(
            vec![info("x", F32, &[1, 3, 9, 9])],
            vec![
                weights("w", &[8, 3, 3, 3]),
                weights("b", &[8]),
                weights("d", &[8, 1, 3, 3]),
                weights("g", &[5, 8]),
                floats("ones", &[8], &[1.0; 8]),
            ],
            vec![
                node("Conv", "x, w, b", "c", "pads=[1,1,1,1] strides=[2,2]"),
                node("BatchNormalization", "c, b, b, b, ones", "n", "epsilon=0.001"),
                node("Relu", "n", "r", ""),
                node("Conv", "r, d", "e", "group=8 auto_pad='SAME_UPPER'"),
                node("Clip", "e", "k", ""),
                node("Add", "k, r", "a", ""),
                node("MaxPool", "a", "p", "kernel_shape=[2,2] strides=[2,2]"),
                node("GlobalAveragePool", "p", "m", ""),
                node("Flatten", "m", "f", ""),
                node("Gemm", "f, g", "l", "transB=1 alpha=0.5"),
                node("Softmax", "l", "y", "axis=1"),
            ],
            &["y"],
        ),
    )
}

fn shapes() -> ModelProto {
    model(
        13,
        graph(
            vec![info("x", F32, &[2, 3, 4])],
            vec![
                ints("target", &[0, -1]),
                ints("starts", &[1]),
                ints("ends", &[i64::MAX]),
                ints("axes", &[1]),
                ints("pads", &[0, 1, 0, 2]),
                ints("repeats", &[1, 2]),
                ints("index", &[0, -1, 3]),
                floats("scales", &[2], &[1.0, 2.0]),
                ints("wide", &[3, 1, 1]),
            ],
            vec![
                node("Shape", "x", "s", ""),
                node("Reshape", "x, target", "r", ""),
                node("Slice", "r, starts, ends, axes", "c", ""),
                node("Pad", "c, pads", "p", "mode='reflect'"),
                node("Tile", "p, repeats", "t", ""),
                node("Gather", "t, index", "h", "axis=1"),
                node("Transpose", "h", "u", "perm=[1,0]"),
                node("Concat", "u, u", "v", "axis=-1"),
                node(
                    "Resize",
                    "v, , scales",
                    "z",
                    "mode='linear' coordinate_transformation_mode='half_pixel'",
                ),
                node("Unsqueeze", "z, axes", "q", ""),
                node("Expand", "q, wide", "k", ""),
                node("ReduceMean", "k", "m", "axes=[1] keepdims=0"),
                node("CumSum", "m, first", "d", "exclusive=1"),
                node("TopK", "d, one", "top, at", "axis=-1"),
                node("Cast", "at", "y", "to=1"),
                node("ConstantOfShape", "s", "o", ""),
            ]
            .into_iter()
            .collect(),
            &["y", "top", "o"],
        ),
    )
    .with_constants(vec![trips("first", 0), ints("one", &[1])])
}

trait WithConstants {
    fn with_constants(self, constants: Vec<TensorProto>) -> Self;
}

impl WithConstants for ModelProto {
    fn with_constants(mut self, constants: Vec<TensorProto>) -> ModelProto {
        self.graph.mut_or_insert_default().initializer.extend(constants);
        self
    }
}

/// Shapes that depend on data.
fn dynamic() -> ModelProto {
    model(
        17,
        graph(
            vec![info("x", F32, &[4, 5]), info("n", S64, &[])],
            vec![trips("zero", 0), trips("step", 1), ints("both", &[-1]), ints("axes", &[0])],
            vec![
                node("NonZero", "x", "nz", ""),
                node("Transpose", "nz", "t", ""),
                node("GatherND", "x, t", "g", ""),
                node("Unique", "g", "u, , inv", "sorted=1"),
                node("Range", "zero, n, step", "r", ""),
                node("Cast", "r", "f", "to=1"),
                node("Concat", "u, f", "y", "axis=0"),
                node("Unsqueeze", "n, axes", "shape", ""),
                node("ConstantOfShape", "shape", "c", ""),
                node("Reshape", "inv, both", "z", ""),
            ],
            &["y", "c", "z"],
        ),
    )
}

fn qdq() -> ModelProto {
    model(
        13,
        graph(
            vec![info("x", F32, &[1, 4, 6, 6])],
            vec![
                floats("s", &[], &[0.05]),
                codes("z", U8, &[], 128),
                codes("w", S8, &[6, 4, 3, 3], -3),
                floats("ws", &[6], &[0.1; 6]),
                TensorProto {
                    name: "wz".into(),
                    dims: vec![6],
                    data_type: S8,
                    int32_data: vec![0; 6],
                    ..Default::default()
                },
                codes("m", S8, &[6, 3], -2),
                floats("ms", &[], &[0.02]),
            ],
            vec![
                node("QuantizeLinear", "x, s, z", "q", ""),
                node("DequantizeLinear", "q, s, z", "d", ""),
                node("DequantizeLinear", "w, ws, wz", "wd", "axis=0"),
                node("Conv", "d, wd", "c", "pads=[1,1,1,1]"),
                node("Relu", "c", "r", ""),
                node("QuantizeLinear", "r, s, z", "rq", ""),
                node("DequantizeLinear", "rq, s, z", "rd", ""),
                node("GlobalAveragePool", "rd", "p", ""),
                node("Flatten", "p", "f", ""),
                node("DequantizeLinear", "m, ms", "md", ""),
                node("MatMul", "f, md", "l", ""),
                node("QuantizeLinear", "l, s, z", "lq", ""),
                node("DequantizeLinear", "lq, s, z", "y", ""),
            ],
            &["y"],
        ),
    )
}

fn qoperator() -> ModelProto {
    let microsoft = |mut n: NodeProto| {
        n.domain = "com.microsoft".into();
        n
    };
    model(
        13,
        graph(
            vec![info("x", F32, &[1, 4, 6, 6]), info("a", F32, &[3, 4])],
            vec![
                floats("s", &[], &[0.05]),
                codes("z", U8, &[], 128),
                codes("w", S8, &[6, 4, 1, 1], -3),
                floats("ws", &[6], &[0.1; 6]),
                TensorProto {
                    name: "wz".into(),
                    dims: vec![6],
                    data_type: S8,
                    int32_data: vec![0; 6],
                    ..Default::default()
                },
                codes("bias", S32, &[6], 5),
                codes("m", U8, &[4, 5], 3),
            ],
            vec![
                node("QuantizeLinear", "x, s, z", "q", ""),
                node("QLinearConv", "q, s, z, w, ws, wz, s, z, bias", "c", "kernel_shape=[1,1]"),
                microsoft(node("QLinearAdd", "c, s, z, c, s, z, s, z", "d", "")),
                node("DequantizeLinear", "d, s, z", "y", ""),
                node("DynamicQuantizeLinear", "a", "aq, as, az", ""),
                node("MatMulInteger", "aq, m, az, z", "i", ""),
                node("Cast", "i", "f", "to=1"),
                node("Mul", "f, as", "p", ""),
            ],
            &["y", "p"],
        ),
    )
}

fn recurrent() -> ModelProto {
    model(
        14,
        graph(
            vec![info("x", F32, &[3, 2, 4])],
            vec![
                weights("w", &[1, 20, 4]),
                weights("r", &[1, 20, 5]),
                weights("b", &[1, 40]),
                weights("gw", &[1, 15, 4]),
                weights("gr", &[1, 15, 5]),
            ],
            vec![
                node("LSTM", "x, w, r, b", "all, last, cell", "hidden_size=5"),
                node("GRU", "x, gw, gr", "y, state", "hidden_size=5 linear_before_reset=1"),
            ],
            &["all", "last", "cell", "y", "state"],
        ),
    )
}

/// A recurrent layer whose weights are codes, on grids of all or of gates.
fn coded_recurrent() -> ModelProto {
    let layer = |inputs, outputs| NodeProto {
        domain: "com.microsoft".into(),
        ..node("DynamicQuantizeLSTM", inputs, outputs, "hidden_size=5")
    };
    model(
        14,
        graph(
            vec![info("x", F32, &[3, 2, 4])],
            vec![
                codes("w", S8, &[1, 4, 20], -3),
                codes("r", S8, &[1, 5, 20], -2),
                weights("b", &[1, 40]),
                floats("s", &[1], &[0.05]),
                codes("z", S8, &[1], 1),
                floats("each", &[1, 20], &[0.03; 20]),
                TensorProto {
                    name: "none".into(),
                    dims: vec![1, 20],
                    data_type: S8,
                    int32_data: vec![0; 20],
                    ..Default::default()
                },
                codes("lengths", S32, &[2], 2),
            ],
            vec![
                layer("x, w, r, b, , , , , s, z, s, z", "all, last, cell"),
                layer("x, w, r, , lengths, last, cell, , each, none, each, none", "y, state, kept"),
            ],
            &["all", "y", "state", "kept"],
        ),
    )
}

fn attention() -> ModelProto {
    model(
        17,
        graph(
            vec![info("x", F32, &[1, 6, 8])],
            vec![
                weights("q", &[8, 8]),
                weights("k", &[8, 8]),
                weights("v", &[8, 8]),
                floats("scale", &[8], &[1.0; 8]),
                floats("root", &[], &[2.83]),
                floats("half", &[], &[0.5]),
                floats("one", &[], &[1.0]),
            ],
            vec![
                node("LayerNormalization", "x, scale, scale", "n", "axis=-1"),
                node("MatMul", "n, q", "nq", ""),
                node("MatMul", "n, k", "nk", ""),
                node("MatMul", "n, v", "nv", ""),
                node("Transpose", "nk", "kt", "perm=[0,2,1]"),
                node("MatMul", "nq, kt", "score", ""),
                node("Div", "score, root", "scaled", ""),
                node("Softmax", "scaled", "share", "axis=-1"),
                node("MatMul", "share, nv", "mixed", ""),
                node("Erf", "mixed", "erf", ""),
                node("Add", "erf, one", "above", ""),
                node("Mul", "mixed, above", "gelu", ""),
                node("Mul", "gelu, half", "y", ""),
                node("Einsum", "y, y", "e", "equation='bij,bkj->bik'"),
            ],
            &["y", "e"],
        ),
    )
}

fn function() -> ModelProto {
    let function = FunctionProto {
        name: "Scaled".into(),
        domain: "local".into(),
        input: vec!["a".into(), "b".into()],
        output: vec!["c".into()],
        attribute: vec!["alpha".into()],
        opset_import: vec![OperatorSetIdProto { version: 13, ..Default::default() }],
        node: vec![
            with(
                node("LeakyRelu", "a", "r", ""),
                AttributeProto {
                    name: "alpha".into(),
                    ref_attr_name: "alpha".into(),
                    type_: AttributeType::FLOAT.into(),
                    ..Default::default()
                },
            ),
            node("Mul", "r, b", "c", ""),
        ],
        ..Default::default()
    };
    let call = |inputs, outputs, attributes| NodeProto {
        domain: "local".into(),
        ..node("Scaled", inputs, outputs, attributes)
    };
    let mut m = model(
        13,
        graph(
            vec![info("x", F32, &[2, 3])],
            vec![weights("w", &[3])],
            vec![call("x, w", "h", "alpha=0.25"), call("h, x", "y", "")],
            &["y"],
        ),
    );
    m.opset_import.push(OperatorSetIdProto { domain: "local".into(), version: 1, ..Default::default() });
    m.functions.push(function);
    m
}

fn branches() -> ModelProto {
    let inner = |op: &str| graph(vec![], vec![weights("k", &[3])], vec![node(op, "x, k", "r", "")], &["r"]);
    let choice = with(
        with(node("If", "above", "y", ""), graph_attribute("then_branch", inner("Add"))),
        graph_attribute("else_branch", inner("Mul")),
    );
    model(
        13,
        graph(
            vec![info("x", F32, &[3])],
            vec![floats("limit", &[], &[0.5])],
            vec![
                node("ReduceSum", "x", "sum", "keepdims=0"),
                node("Greater", "sum, limit", "above", ""),
                choice,
            ],
            &["y"],
        ),
    )
}

/// A loop of a number of rounds, or one that ends when its condition does.
fn loops(is_conditional: bool) -> ModelProto {
    let mut nodes = vec![node("Add", "sum, x", "next", ""), node("Identity", "next", "row", "")];
    nodes.push(match is_conditional {
        true => node("Less", "i, most", "goes_on", ""),
        false => node("Identity", "go", "goes_on", ""),
    });
    let body = graph(
        vec![info("i", S64, &[]), info("go", BOOL, &[]), info("sum", F32, &[3])],
        vec![trips("most", 4)],
        nodes,
        &["goes_on", "next", "row"],
    );
    model(
        13,
        graph(
            vec![info("x", F32, &[3])],
            vec![
                trips("trips", if is_conditional { 50 } else { 5 }),
                codes("true", BOOL, &[], 1),
                weights("zero", &[3]),
            ],
            vec![with(node("Loop", "trips, true, zero", "y, rows", ""), graph_attribute("body", body))],
            &["y", "rows"],
        ),
    )
}

fn scan() -> ModelProto {
    let body = graph(
        vec![info("sum", F32, &[3]), info("row", F32, &[3])],
        vec![],
        vec![node("Add", "sum, row", "next", ""), node("Identity", "next", "out", "")],
        &["next", "out"],
    );
    model(
        11,
        graph(
            vec![info("x", F32, &[4, 3])],
            vec![weights("zero", &[3])],
            vec![with(
                node("Scan", "zero, x", "y, rows", "num_scan_inputs=1 scan_input_directions=[1]"),
                graph_attribute("body", body),
            )],
            &["y", "rows"],
        ),
    )
}

/// A type of this element type and shape, as an element of a sequence, which may be left out.
fn declared(
    name: &str,
    elem_type: i32,
    dims: &[i64],
    is_sequence: bool,
    is_optional: bool,
) -> ValueInfoProto {
    let mut info = info(name, elem_type, dims);
    let boxed = |ty: &mut Option<TypeProto>| Some(ty.take().unwrap_or_default()).into();
    let mut ty = info.type_.take();
    if is_sequence {
        let of = type_proto::Sequence { elem_type: boxed(&mut ty), ..Default::default() };
        ty = Some(TypeProto { value: Some(type_proto::Value::SequenceType(of)), ..Default::default() });
    }
    if is_optional {
        let of = type_proto::Optional { elem_type: boxed(&mut ty), ..Default::default() };
        ty = Some(TypeProto { value: Some(type_proto::Value::OptionalType(of)), ..Default::default() });
    }
    info.type_ = ty.into();
    info
}

/// Sequences: given, made, cut and joined.
fn sequences() -> ModelProto {
    model(
        17,
        graph(
            vec![declared("s", F32, &[2, 3], true, false), info("x", F32, &[4, 3])],
            vec![trips("at", 0), ints("parts", &[1, 3])],
            vec![
                node("SplitToSequence", "x,parts", "cut", "axis=0"),
                node("SequenceInsert", "s,x,at", "longer", ""),
                node("SequenceAt", "longer,at", "first", ""),
                node("SequenceErase", "longer,at", "shorter", ""),
                node("SequenceLength", "shorter", "n", ""),
                node("ConcatFromSequence", "cut", "again", "axis=0"),
                node("Add", "again,first", "y", ""),
                node("Identity", "shorter", "z", ""),
            ],
            &["y", "n", "z"],
        ),
    )
}

/// What may be left out.
fn optional() -> ModelProto {
    let read = graph(vec![], vec![], vec![node("OptionalGetElement", "o", "inner", "")], &["inner"]);
    let other = graph(vec![], vec![], vec![node("Neg", "x", "negated", "")], &["negated"]);
    model(
        18,
        graph(
            vec![declared("o", F32, &[2, 3], false, true), info("x", F32, &[2, 3])],
            vec![],
            vec![
                node("OptionalHasElement", "o", "is_there", ""),
                with(
                    with(node("If", "is_there", "y", ""), graph_attribute("then_branch", read)),
                    graph_attribute("else_branch", other),
                ),
                node("Optional", "y", "wrapped", ""),
                node("OptionalGetElement", "wrapped", "z", ""),
            ],
            &["y", "z"],
        ),
    )
}

/// The models of `goldens/ops.zip`: operators of other domains, texts, trees.
///
/// # Errors
/// Where the archive cannot be read.
pub fn op_cases() -> io::Result<Vec<ModelProto>> {
    let path = crate::repository().join("tests/goldens/ops.zip");
    let mut archive = zip::ZipArchive::new(File::open(path)?)?;
    let mut models = Vec::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i)?;
        if entry.name().ends_with(".onnx") {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            models.extend(ModelProto::parse_from_bytes(&bytes).ok());
        }
    }
    Ok(models)
}

/// The model that comes with the repository.
pub fn bundled() -> Vec<ModelProto> {
    read(&crate::repository().join("models/fashion_resnet8.onnx")).into_iter().collect()
}

/// A file as a message; `None` for what is none.
pub fn read(path: &Path) -> Option<ModelProto> {
    ModelProto::parse_from_bytes(&std::fs::read(path).ok()?).ok()
}

/// ONNX files at or below a path, by name.
pub fn find(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.into()];
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| !t.is_symlink()))
        .flat_map(|e| match e.path() {
            p if p.is_dir() => find(&p),
            p if p.extension().is_some_and(|x| x == "onnx") => vec![p],
            _ => vec![],
        })
        .collect();
    found.sort();
    found
}
