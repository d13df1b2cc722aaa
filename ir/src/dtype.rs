use serde::{Deserialize, Serialize};
use std::fmt;

/// The type of one element of a tensor.
///
/// Values of fewer than 8 bits occupy one byte each in memory (sign- or zero-extended); only files pack several in a byte.
/// Floats of 8 bits and fewer are stored as their codes (see [`small_float`](crate::numerics::small_float)) and only moved
/// and converted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    F32,
    F16,
    BF16,
    F64,
    S8,
    U8,
    S16,
    U16,
    S32,
    U32,
    S64,
    U64,
    S4,
    U4,
    Bool,
    F8E4M3Fn,
    F8E4M3Fnuz,
    F8E5M2,
    F8E5M2Fnuz,
    F8E8M0,
    F4E2M1,
    S2,
    U2,
    /// A text, by its number: see [`Texts`](crate::onnx::Texts). Only moved and compared for being equal.
    Str,
}

impl DType {
    /// All types, in declaration order.
    pub const ALL: [DType; 24] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F64,
        DType::S8,
        DType::U8,
        DType::S16,
        DType::U16,
        DType::S32,
        DType::U32,
        DType::S64,
        DType::U64,
        DType::S4,
        DType::U4,
        DType::Bool,
        DType::F8E4M3Fn,
        DType::F8E4M3Fnuz,
        DType::F8E5M2,
        DType::F8E5M2Fnuz,
        DType::F8E8M0,
        DType::F4E2M1,
        DType::S2,
        DType::U2,
        DType::Str,
    ];

    /// Bits of an element: what it takes in a file.
    pub const fn bits(self) -> usize {
        match self {
            DType::S2 | DType::U2 => 2,
            DType::S4 | DType::U4 | DType::F4E2M1 => 4,
            DType::S8
            | DType::U8
            | DType::Bool
            | DType::F8E4M3Fn
            | DType::F8E4M3Fnuz
            | DType::F8E5M2
            | DType::F8E5M2Fnuz
            | DType::F8E8M0 => 8,
            DType::F16 | DType::BF16 | DType::S16 | DType::U16 => 16,
            DType::F32 | DType::S32 | DType::U32 => 32,
            DType::F64 | DType::S64 | DType::U64 | DType::Str => 64,
        }
    }

    /// Bytes an element takes in memory.
    pub const fn size(self) -> usize {
        self.bits().div_ceil(8)
    }

    /// Whether this is one of the floating-point types that are computed with.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
    }

    /// Whether this is an integer type (`Bool` and `Str` are not).
    pub const fn is_integer(self) -> bool {
        !self.is_float() && !self.is_small_float() && !matches!(self, DType::Bool | DType::Str)
    }

    /// Whether this is one of the floats of 8 bits and fewer.
    pub const fn is_small_float(self) -> bool {
        matches!(
            self,
            DType::F8E4M3Fn
                | DType::F8E4M3Fnuz
                | DType::F8E5M2
                | DType::F8E5M2Fnuz
                | DType::F8E8M0
                | DType::F4E2M1
        )
    }

    /// Whether this is an integer type with negative values.
    pub const fn is_signed(self) -> bool {
        matches!(self, DType::S2 | DType::S4 | DType::S8 | DType::S16 | DType::S32 | DType::S64)
    }

    /// Smallest and largest value of an integer type of at most 32 bits, the range a quantized value may take.
    pub const fn integer_range(self) -> Option<(i64, i64)> {
        Some(match self {
            DType::S2 => (-2, 1),
            DType::U2 => (0, 3),
            DType::S4 => (-8, 7),
            DType::U4 => (0, 15),
            DType::S8 => (-128, 127),
            DType::U8 => (0, 255),
            DType::S16 => (-32768, 32767),
            DType::U16 => (0, 65535),
            DType::S32 => (i32::MIN as i64, i32::MAX as i64),
            DType::U32 => (0, u32::MAX as i64),
            _ => return None,
        })
    }

    /// The spelling used in the text form and in messages, such as `f32` or `u8`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F64 => "f64",
            DType::S8 => "s8",
            DType::U8 => "u8",
            DType::S16 => "s16",
            DType::U16 => "u16",
            DType::S32 => "s32",
            DType::U32 => "u32",
            DType::S64 => "s64",
            DType::U64 => "u64",
            DType::S4 => "s4",
            DType::U4 => "u4",
            DType::Bool => "bool",
            DType::F8E4M3Fn => "f8e4m3fn",
            DType::F8E4M3Fnuz => "f8e4m3fnuz",
            DType::F8E5M2 => "f8e5m2",
            DType::F8E5M2Fnuz => "f8e5m2fnuz",
            DType::F8E8M0 => "f8e8m0",
            DType::F4E2M1 => "f4e2m1",
            DType::S2 => "s2",
            DType::U2 => "u2",
            DType::Str => "str",
        }
    }

    /// The type with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
