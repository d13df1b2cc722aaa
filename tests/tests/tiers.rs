//! Generated code has no instruction beyond its tier: the code of real models for every tier, those that this CPU lacks
//! too, is disassembled along every path, and each instruction's CPUID features are held against the tier's.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use qcc_codegen::{Options, TIERS, Tier, assemble};
use qcc_ir::numerics::RequantMode;
use qcc_runtime::{Compiler, Precision, Program, Samples, WeightBits, bundled, experiment, zoo};
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

const AMX: &[CpuidFeature] = &[CpuidFeature::AMX_TILE, CpuidFeature::AMX_INT8];

/// What a tier may use: what it is chosen by.
fn allowed(tier: &Tier) -> BTreeSet<CpuidFeature> {
    let levels: &[&[CpuidFeature]] = match tier.name {
        "amx" => &[V2, V3, AVX512_VNNI, AMX],
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
                FlowControl::IndirectBranch => {
                    pending.extend(jump_table(code, decoder.ip()));
                    break;
                }
                FlowControl::Return | FlowControl::Exception => break,
                other => panic!("{function}: {other:?} at {at:#x}: where it goes is not known"),
            }
        }
    }
    found
}

/// Targets of the jump table that Cranelift puts right behind an indirect jump: 32-bit distances from the table's start.
/// It ends where the first of its targets begins, or with the code.
fn jump_table(code: &[u8], table: u64) -> Vec<u64> {
    let mut targets: Vec<u64> = Vec::new();
    for (i, entry) in code[table as usize..].as_chunks::<4>().0.iter().enumerate() {
        let nearest = targets.iter().copied().filter(|&t| t > table).min();
        if nearest.is_some_and(|t| table + 4 * i as u64 >= t) {
            break;
        }
        targets.push(table.wrapping_add_signed(i32::from_le_bytes(*entry).into()));
    }
    targets
}

/// The bundled model in every precision and requantization mode, and a network with depthwise convolutions, also with
/// weights of 7 bits.
fn programs() -> Vec<Program> {
    let trained = Compiler::new()
        .calibration(bundled::calibration().unwrap().limit(2))
        .preprocess(bundled::preprocess());
    let graph = trained.import_onnx(bundled::FASHION_RESNET8).unwrap();
    let mut programs = experiment::programs(&trained, graph, &Precision::ALL, &RequantMode::ALL).unwrap();
    let random = Compiler::new().calibration(Samples::noise().limit(1));
    let graph = zoo::build("mobilenetv2").unwrap();
    let precisions = [Precision::Float, Precision::Int8];
    let modes = [RequantMode::Q15, RequantMode::Shift];
    programs.extend(experiment::programs(&random, graph.clone(), &precisions, &modes).unwrap());
    let narrow = random.weight_bits(WeightBits::Seven);
    programs.extend(experiment::programs(&narrow, graph, &[Precision::Int8], &modes[..1]).unwrap());
    programs
}

#[test]
fn no_instruction_is_beyond_its_tier() {
    for program in programs() {
        let info = program.info();
        for tier in &TIERS {
            let allowed = allowed(tier);
            let functions = assemble(program.graph(), &Options::new(tier)).unwrap();
            assert!(!functions.is_empty());
            for (name, code) in &functions {
                for (at, instruction) in reachable(name, code) {
                    let beyond: Vec<_> =
                        instruction.cpuid_features().iter().filter(|f| !allowed.contains(f)).collect();
                    assert!(
                        beyond.is_empty(),
                        "{} {} for {tier}, {name} at {at:#x}: {instruction} needs {beyond:?}",
                        info.precision.name(),
                        info.requant
                    );
                }
            }
        }
    }
}

/// `vpmaddubsw` and `pmaddubsw` saturate: only weights of 7 bits may be multiplied by them, and those are, where there is
/// no dot product.
#[test]
fn bytes_are_multiplied_where_that_is_exact() {
    let is_of_bytes = |i: &Instruction| matches!(i.mnemonic(), Mnemonic::Pmaddubsw | Mnemonic::Vpmaddubsw);
    for program in programs().iter().filter(|p| p.info().precision == Precision::Int8) {
        let is_narrow = program.info().weight_bits == WeightBits::Seven;
        for tier in &TIERS {
            let functions = assemble(program.graph(), &Options::new(tier)).unwrap();
            let count = |of: &str| {
                let of_kind = functions.iter().filter(|(name, _)| name.contains(of));
                of_kind
                    .flat_map(|(name, code)| reachable(name, code).into_values())
                    .filter(is_of_bytes)
                    .count()
            };
            let is_used = is_narrow && tier.has_faster_narrow_products();
            for kind in ["_conv_", "_dwconv_"] {
                assert_eq!(count(kind) > 0, is_used, "{tier}, {kind} with weights of 7 bits: {is_narrow}");
            }
        }
    }
}

/// The check itself would pass on nothing: each tier must use what sets it apart.
#[test]
fn tiers_use_what_they_have() {
    let program = programs().into_iter().find(|p| p.info().precision == Precision::Int8).unwrap();
    for tier in &TIERS {
        let functions = assemble(program.graph(), &Options::new(tier)).unwrap();
        let used: BTreeSet<CpuidFeature> = functions
            .iter()
            .flat_map(|(name, code)| reachable(name, code).into_values())
            .flat_map(|i| i.cpuid_features().iter().copied())
            .collect();
        let telling = match tier.name {
            "amx" => CpuidFeature::AMX_INT8,
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
    // jmp rax; two entries; ret; ret; two bytes that would be `(bad)`.
    let code = [0xff, 0xe0, 9, 0, 0, 0, 8, 0, 0, 0, 0xc3, 0xc3, 0x06, 0x06];
    let found: Vec<u64> = reachable("f", &code).into_keys().collect();
    assert_eq!(found, [0, 10, 11]);
}
