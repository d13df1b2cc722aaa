//! Generated code has no instruction beyond its tier: the code of real models for every tier, those that this CPU lacks
//! too, is disassembled along every path, and each instruction's CPUID features are held against the tier's.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction};
use qcc_codegen::{Options, TIERS, Tier, assemble};
use qcc_ir::{
    Graph,
    numerics::RequantMode,
    onnx::{Bindings, Model},
};
use qcc_passes::{Collector, Precision, Ranges};
use std::collections::{BTreeMap, BTreeSet};

/// What an x86-64-v2 CPU has. Names are those of the psABI's levels: System V ABI, AMD64 supplement, table 3.1.
const V2: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::POPCNT,
];
const V3: &[CpuidFeature] = &[
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::LZCNT,
];
const AVX_VNNI: &[CpuidFeature] = &[CpuidFeature::AVX_VNNI];
const AVX512_VNNI: &[CpuidFeature] = &[
    CpuidFeature::AVX512F,
    CpuidFeature::AVX512BW,
    CpuidFeature::AVX512VL,
    CpuidFeature::AVX512DQ,
    CpuidFeature::AVX512_VNNI,
];

/// What a tier may use: what it is chosen by.
fn allowed(tier: &Tier) -> BTreeSet<CpuidFeature> {
    let levels: &[&[CpuidFeature]] = match tier.name {
        "avx512vnni" => &[V2, V3, AVX512_VNNI],
        "avxvnni" | "xmm-vnni" => &[V2, V3, AVX_VNNI],
        "avx2" => &[V2, V3],
        "x86-64-v2" => &[V2],
        other => panic!("what may tier {other} use?"),
    };
    levels.iter().copied().flatten().copied().collect()
}

/// The instructions of a function that can be reached. Behind its code lie its constants, which must not be read as
/// instructions.
fn reachable(function: &str, code: &[u8]) -> BTreeMap<u64, Instruction> {
    let mut found = BTreeMap::new();
    let mut pending = vec![0];
    while let Some(start) = pending.pop() {
        let mut decoder = Decoder::with_ip(64, &code[start as usize..], start, DecoderOptions::NONE);
        loop {
            let at = decoder.ip();
            if found.contains_key(&at) {
                break;
            }
            let instruction = decoder.decode();
            assert!(!instruction.is_invalid(), "{function}: no instruction at {at:#x}");
            found.insert(at, instruction);
            match instruction.flow_control() {
                FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => {}
                FlowControl::ConditionalBranch => pending.push(instruction.near_branch_target()),
                FlowControl::UnconditionalBranch => {
                    pending.push(instruction.near_branch_target());
                    break;
                }
                FlowControl::Return | FlowControl::Exception => break,
                other => panic!("{function}: {other:?} at {at:#x}: where it goes is not known"),
            }
        }
    }
    found
}

/// The bundled model, placed: in float, fake-quantized, and in int8 in every requantization mode.
fn graphs() -> Vec<(String, Graph)> {
    let model = Model::load(&qcc_tests::repository().join("models/fashion_resnet8.onnx")).unwrap();
    let shapes = [("image".to_string(), vec![2, 1, 28, 28])].into();
    let imported = model.graph(&Bindings { shapes, ..Bindings::default() }).unwrap();
    let options = |precision, requant| qcc_passes::Options {
        precision,
        requant,
        capability: qcc_codegen::capability,
        ..Default::default()
    };
    let mut prepared = imported;
    qcc_passes::prepare(&mut prepared, &options(Precision::Int8, RequantMode::Q15), &mut |_, _| {}).unwrap();
    let ranges = ranges(&prepared);
    let int8 = RequantMode::ALL.map(|mode| (Precision::Int8, mode));
    let others = [Precision::Float, Precision::FakeQuant].map(|p| (p, RequantMode::Q15));
    let place = |(precision, mode): (Precision, RequantMode)| {
        let mut graph = prepared.clone();
        let options = options(precision, mode);
        if precision != Precision::Float {
            qcc_passes::quantize(&mut graph, &ranges, &options, &mut |_, _| {}).unwrap();
        }
        qcc_passes::lower(&mut graph, &options, &mut |_, _| {}).unwrap();
        (format!("{} {mode}", precision.name()), graph)
    };
    int8.into_iter().chain(others).map(place).collect()
}

fn ranges(prepared: &Graph) -> Ranges {
    let mut collector = Collector::new(prepared, qcc_passes::Calibrator::MinMax);
    let inputs = qcc_tests::inputs(prepared, 1.0);
    qcc_ir::interpreter::run_observed(prepared, &inputs, &mut |value, tensor| {
        if let Ok(elements) = tensor.as_slice::<f32>() {
            collector.record(value, elements);
        }
    })
    .unwrap();
    collector.finish()
}

#[test]
fn no_instruction_is_beyond_its_tier() {
    for (what, graph) in graphs() {
        for tier in &TIERS {
            let allowed = allowed(tier);
            let functions = assemble(&graph, &Options::new(tier)).unwrap();
            assert!(!functions.is_empty());
            for (name, code) in &functions {
                for (at, instruction) in reachable(name, code) {
                    let beyond: Vec<_> =
                        instruction.cpuid_features().iter().filter(|f| !allowed.contains(f)).collect();
                    assert!(
                        beyond.is_empty(),
                        "{what} for {tier}, {name} at {at:#x}: {instruction} needs {beyond:?}"
                    );
                }
            }
        }
    }
}

/// The check itself would pass on nothing: each tier must use what sets it apart.
#[test]
fn tiers_use_what_they_have() {
    let (_, graph) = graphs().into_iter().next().unwrap();
    for tier in &TIERS {
        let functions = assemble(&graph, &Options::new(tier)).unwrap();
        let used: BTreeSet<CpuidFeature> = functions
            .iter()
            .flat_map(|(name, code)| reachable(name, code).into_values())
            .flat_map(|i| i.cpuid_features().iter().copied())
            .collect();
        let telling = match tier.name {
            "avx512vnni" => CpuidFeature::AVX512_VNNI,
            "avxvnni" | "xmm-vnni" => CpuidFeature::AVX_VNNI,
            "avx2" => CpuidFeature::AVX2,
            _ => CpuidFeature::SSE4_1,
        };
        assert!(used.contains(&telling), "{tier} uses {used:?}");
    }
}

#[test]
fn constants_behind_a_function_are_not_code() {
    // jmp over two bytes that would be `(bad)`; ret.
    let code = [0xeb, 0x02, 0x06, 0x06, 0xc3];
    let found: Vec<Code> = reachable("f", &code).values().map(|i| i.code()).collect();
    assert_eq!(found, [Code::Jmp_rel8_64, Code::Retnq]);
}
