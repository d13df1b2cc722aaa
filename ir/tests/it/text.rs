use crate::samples::{every_op, f32s, shape};
use proptest::prelude::*;
use qcc_ir::{
    DType, Graph, Op, Tensor, interpreter,
    text::{parse, parse_with_blobs, print, print_inline, print_with_blobs, seeded},
};

const DIGITS: &str = r#"
qir 1   ; a comment
graph "digits" stage float
%0 = input "image" : f32[1x2x4x4]
%7 = const "w" : f32[3x2x3x3] = seed(7)
%8 = "conv" Conv(window: (kernel: [3,3], strides: [1,1], dilations: [1,1], pads_begin: [0,0], pads_end: [0,0]),
    groups: 1, layout: ChannelsFirst, bias: false, residual: false, clamp: (lo: 0.0, hi: inf))(%0, %7)
%9 = "sum" Reduce(kind: Sum, axes: [2, 3], keep_dims: false)(%8) : f32[1x3] @interpreter
output "features" = %9
"#;

#[test]
fn every_op_goes_through_print_and_parse() {
    let g = every_op();
    let (text, blobs) = print_with_blobs(&g);
    let again = parse_with_blobs(&text, &blobs).unwrap();
    assert_eq!(print_with_blobs(&again), (text, blobs));
    let inline = print_inline(&g);
    let again = parse(&inline).unwrap();
    assert_eq!(print_inline(&again), inline);
    // The same graph, not just the same text: it computes the same.
    let inputs: Vec<Tensor> =
        g.inputs().iter().map(|&i| seeded(g.ty(i.out()).dtype, g.shape(i.out()), i.index() as u64)).collect();
    assert_eq!(interpreter::run(&again, &inputs), interpreter::run(&g, &inputs));
}

#[test]
fn every_op_is_in_the_sample() {
    let text = print(&every_op());
    for op in Op::MNEMONICS {
        assert!(text.contains(&format!(" {op}(")), "{op}");
    }
}

#[test]
fn short_texts_by_hand() {
    let g = parse(DIGITS).unwrap();
    assert_eq!((g.name.as_str(), g.len()), ("digits", 4));
    let sum = g.find("sum").unwrap();
    assert_eq!(g.node(sum).device, Some(qcc_ir::Device::Interpreter));
    assert_eq!(g.outputs()[0].value, sum.out());
    assert_eq!(
        g.constant_value(g.operand(g.find("conv").unwrap(), 1)),
        Some(&seeded(DType::F32, &shape(&[3, 2, 3, 3]), 7))
    );
}

#[test]
fn nodes_print_in_dependency_order_after_edits() {
    let mut g = parse(DIGITS).unwrap();
    let conv = g.find("conv").unwrap();
    let late = g.constant("late", f32s(&[3, 2, 3, 3], &[0.5; 54]));
    g.set_operand(conv, 1, late).unwrap();
    g.remove_dead();
    let (text, blobs) = print_with_blobs(&g);
    assert!(text.find("\"late\"") < text.find("\"conv\""), "{text}");
    assert!(text.contains("f32[3x2x3x3] = splat(0.5)"), "{text}");
    assert_eq!(print_with_blobs(&parse_with_blobs(&text, &blobs).unwrap()).0, text);
}

#[test]
fn elements_of_all_types_keep_their_bits() {
    let mut g = Graph::new("constants");
    for dtype in DType::ALL {
        for dims in [&[][..], &[3], &[2, 10], &[0, 4]] {
            g.constant("c", seeded(dtype, &shape(dims), 3));
        }
    }
    let odd = [f32::NAN, f32::from_bits(0xffc0_1234), f32::INFINITY, -0.0, 1e-45, f32::MAX];
    g.constant("f32", f32s(&[6], &odd));
    g.constant("f64", Tensor::from_vec(shape(&[3]), vec![-f64::NAN, 0.1, 5e-324]).unwrap());
    let f16 = [half::f16::NEG_INFINITY, half::f16::from_bits(1), half::f16::from_bits(0x7e01)];
    g.constant("f16", Tensor::from_vec(shape(&[3]), f16.to_vec()).unwrap());
    g.constant("u64", Tensor::scalar(u64::MAX));
    g.constant("s64", Tensor::scalar(i64::MIN));
    let text = print_inline(&g);
    let again = parse(&text).unwrap();
    for ((_, a), (_, b)) in g.nodes().zip(again.nodes()) {
        assert_eq!(a.kind(), b.kind(), "{}", a.name);
    }
    assert_eq!(print_inline(&again), text);
}

#[test]
fn seeds_never_change() {
    // SplitMix64 from 0 begins with e220a839…, 6e789e6a…, 06c45d18…, f88bb8a8…, the fractions .88331, .43153, .02643
    // and .97088 of the range of 255.
    let s8 = seeded(DType::S8, &shape(&[4]), 0);
    assert_eq!(s8.as_slice::<i8>().unwrap(), [98, -17, -121, 120]);
    let u8s = seeded(DType::U8, &shape(&[1000]), 1);
    let u8s = u8s.as_slice::<u8>().unwrap();
    assert!(u8s.contains(&0) && u8s.contains(&255));
    let floats = seeded(DType::F32, &shape(&[10_000]), 1).to_f32().unwrap();
    let mean = floats.iter().sum::<f32>() / 1e4;
    let variance = floats.iter().map(|x| x * x).sum::<f32>() / 1e4;
    assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
}

#[test]
fn mistakes_are_located_and_named() {
    let broken = |from: &str, to: &str| {
        let text = DIGITS.replace(from, to);
        assert_ne!(text, DIGITS, "{from}");
        parse(&text).unwrap_err().to_string()
    };
    for (from, to, message) in [
        ("qir 1", "qir 2", "line 2, column 5: only version 1 is known"),
        ("stage float", "stage flaot", "line 3, column 22: unknown stage `flaot`"),
        (
            "f32[1x2x4x4]",
            "f33[1x2x4x4]",
            "line 4, column 22: expected an element type such as `f32`, found `f33[1x2x4x4]`",
        ),
        ("(%0, %7)", "(%0, %6)", "line 7, column 100: %6.0 is not a value defined above"),
        ("(%0, %7)", "(%0 %7)", "line 7, column 99: expected `,`, found `%7)`"),
        ("(%8)", "(%8.1)", "line 8, column 62: %8.1 is not a value defined above"),
        ("%9 =", "%8 =", "line 8, column 2: %8 is defined already"),
        (": f32[1x3]", ": f32[1x4]", "line 8, column 68: the type of \"sum\" is [f32[1x3]], not [f32[1x4]]"),
        ("@interpreter", "@gpu", "line 8, column 78: unknown device `gpu`"),
        ("seed(7)", "blob(7)", "line 5, column 33: blob(7) is not in the text and only 0 blobs came with it"),
        ("seed(7)", "[1, 2]", "line 5, column 33: a tensor f32[3x2x3x3] takes 216 bytes, got 8"),
        ("seed(7)", "splat(one)", "line 5, column 39: expected an element of f32, found `one)`"),
        ("\"w\"", "\"image\"", "line 5, column 6: record of node `image`: another node has this name"),
        ("\"w\"", "\"w", "line 5, column 12: a string that is not closed on its line"),
        (
            "output \"features\"",
            "outptu \"features\"",
            "line 9, column 1: expected `output`, found `outptu \"features\" = `",
        ),
    ] {
        assert_eq!(broken(from, to), message);
    }
    assert!(
        broken("groups: 1", "groups: 5")
            .contains("line 6, column 13: node `conv` (Conv): 5 groups do not divide")
    );
    let attributes = broken("axes: [2, 3]", "axes: [2, x]");
    assert!(attributes.contains("line 8, column 4") && attributes.contains("attributes: "), "{attributes}");
    assert!(broken("Reduce(", "Reducto(").contains("Reducto"));
}

#[test]
fn hostile_texts_are_refused() {
    for body in [
        "%0 = const \"a\" : f32[1073741824] = splat(0)".to_string(),
        format!("%0 = \"a\" {}", "(".repeat(200_000)),
        format!("%0 = \"a\" Reshape(shape:{}", "[".repeat(200_000)),
        "%0 = input \"a\" : f32[99999999999x99999999999]".into(),
        "%0 = input \"a\" : u8[4] {axis 0 scales [] zeros []}".into(),
        "%0 = input \"a\" : u8[4] {scale -1 zero 0}".into(),
        "%0 = input \"a\" : u8[1] {scale NaN zero 0}".into(),
        "%0 = input \"a\" : f32[1] %1 = \"q\" Quantize(dtype:u8,params:(scales:[],zero_points:[],axis:None))(%0)".into(),
        "%0 = input \"\\u{110000}\" : f32[1]".into(),
        "%99999999999999999999 = input \"a\" : f32[1]".into(),
        "%0 = \u{fffd}".into(),
    ] {
        assert!(parse(&format!("qir 1 graph \"x\" stage float\n{body}")).is_err(), "{:.60}", body);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Texts with bytes cut out, doubled or replaced may be graphs or not, but never crash the parser.
    #[test]
    fn damaged_texts_do_not_panic(at in 0usize..6000, length in 0usize..40, with in ".{0,6}") {
        let text = print_inline(&every_op());
        let chars: Vec<char> = text.chars().collect();
        let at = at % chars.len();
        let end = (at + length).min(chars.len());
        let damaged: String =
            chars[..at].iter().copied().chain(with.chars()).chain(chars[end..].iter().copied()).collect();
        if let Ok(g) = parse(&damaged) {
            prop_assert_eq!(print_inline(&parse(&print_inline(&g)).unwrap()), print_inline(&g));
        }
    }

    #[test]
    fn names_survive(name in any::<String>()) {
        let mut g = Graph::new(name.clone());
        let c = g.constant(&name, Tensor::scalar(1u8));
        g.output(name, c);
        let text = print(&g);
        prop_assert_eq!(print(&parse(&text).unwrap()), text);
    }
}
