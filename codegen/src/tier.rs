//! ISA tiers: what a CPU can do, as data. The emitters ask the tier; nothing else knows instruction sets.

use crate::{amx, dense::spec::Product};
use std::fmt;

/// Who emits the dense microkernels of a tier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Isa {
    /// AMX: 8-bit products of 16×64 by 64×16 tiles, finished in zmm registers.
    AmxInt8,
    /// zmm, EVEX, VNNI dot products, 32 registers.
    Avx512Vnni,
    /// ymm, VEX-encoded VNNI dot products, 16 registers.
    AvxVnni,
    /// ymm, products widened to 16 bits (`pmaddwd`), 16 registers.
    Avx2,
    /// Cranelift's 128-bit vectors with the VNNI dot product.
    XmmVnni,
    /// Cranelift's 128-bit vectors, SSE4.2 only.
    Xmm,
}

/// One ISA tier. All tiers give the same bits on integers; they differ in speed.
#[derive(Debug)]
pub struct Tier {
    /// The spelling of `QCC_ISA` and `--isa`.
    pub name: &'static str,
    /// Vector form of the dense microkernels.
    pub isa: Isa,
    /// Matrix form of those of 8-bit codes: used where it is faster than the vector form.
    pub matrix: Option<Isa>,
    /// Whether bytes can be picked out of several registers (AVX-512 VBMI).
    pub(crate) permutes_bytes: bool,
    /// Whether this CPU has it.
    detect: fn() -> bool,
    /// Levels of Cranelift's feature flags for the code around the microkernels, on top of x86-64.
    cranelift_flags: &'static [&'static [&'static str]],
}

/// What each level adds to the one below.
const V2: &[&str] = &["has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt"];
const V3: &[&str] = &["has_avx", "has_avx2", "has_fma", "has_bmi1", "has_bmi2", "has_lzcnt"];
const AVX_VNNI: &[&str] = &["has_avx_vnni"];
/// EVEX is used for the 128-bit dot product only: no `has_avx512dq`, whose 64-bit product is slower than `pmuldq`.
const AVX512_VNNI: &[&str] = &["has_avx512f", "has_avx512vl", "has_avx512vnni"];

/// All tiers, the best first. The last one runs on every CPU that qcc supports.
pub static TIERS: [Tier; 6] = [
    Tier {
        name: "amx",
        isa: Isa::Avx512Vnni,
        matrix: Some(Isa::AmxInt8),
        permutes_bytes: true,
        detect: || is_avx512vnni() && is_x86_feature_detected!("avx512vbmi") && amx::is_available(),
        cranelift_flags: &[V2, V3, AVX512_VNNI],
    },
    Tier {
        name: "avx512vnni",
        isa: Isa::Avx512Vnni,
        matrix: None,
        permutes_bytes: false,
        detect: is_avx512vnni,
        cranelift_flags: &[V2, V3, AVX512_VNNI],
    },
    Tier {
        name: "avxvnni",
        isa: Isa::AvxVnni,
        matrix: None,
        permutes_bytes: false,
        detect: || is_v3() && is_x86_feature_detected!("avxvnni"),
        cranelift_flags: &[V2, V3, AVX_VNNI],
    },
    Tier {
        name: "avx2",
        isa: Isa::Avx2,
        matrix: None,
        permutes_bytes: false,
        detect: is_v3,
        cranelift_flags: &[V2, V3],
    },
    Tier {
        name: "xmm-vnni",
        isa: Isa::XmmVnni,
        matrix: None,
        permutes_bytes: false,
        detect: || is_v3() && is_x86_feature_detected!("avxvnni"),
        cranelift_flags: &[V2, V3, AVX_VNNI],
    },
    Tier {
        name: "x86-64-v2",
        isa: Isa::Xmm,
        matrix: None,
        permutes_bytes: false,
        detect: || is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("popcnt"),
        cranelift_flags: &[V2],
    },
];

fn is_avx512vnni() -> bool {
    is_v3()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

fn is_v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
}

impl Isa {
    /// The tier whose best form this is.
    pub fn name(self) -> &'static str {
        match self {
            Isa::AmxInt8 => "amx",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx2 => "avx2",
            Isa::XmmVnni => "xmm-vnni",
            Isa::Xmm => "x86-64-v2",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Tier {
    /// Whether this CPU can run the tier.
    pub fn is_available(&self) -> bool {
        (self.detect)()
    }

    /// The forms of microkernels that compute a product, the one with the highest peak first.
    pub fn isas(&self, product: Product) -> impl Iterator<Item = Isa> {
        let matrix = if product == Product::U8S8 { self.matrix } else { None };
        matrix.into_iter().chain([self.isa])
    }

    /// About how many multiply-accumulates of floats a core makes in a nanosecond, in layers of middling size.
    pub(crate) fn macs_per_nanosecond(&self) -> u64 {
        match self.isa {
            Isa::AmxInt8 | Isa::Avx512Vnni => 100,
            Isa::AvxVnni | Isa::Avx2 => 50,
            Isa::XmmVnni | Isa::Xmm => 20,
        }
    }

    /// Cranelift's feature flags for the code around the microkernels, on top of x86-64.
    pub fn cranelift_flags(&self) -> impl Iterator<Item = &'static str> {
        self.cranelift_flags.iter().copied().flatten().copied()
    }

    /// The tier with this name.
    pub fn from_name(name: &str) -> Option<&'static Tier> {
        TIERS.iter().find(|t| t.name == name)
    }

    /// The tiers of this CPU, the best first; empty below x86-64-v2.
    pub fn available() -> Vec<&'static Tier> {
        TIERS.iter().filter(|t| t.is_available()).collect()
    }
}

/// Names are unique.
impl PartialEq for Tier {
    fn eq(&self, other: &Tier) -> bool {
        self.name == other.name
    }
}

impl Eq for Tier {}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
