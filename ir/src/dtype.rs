use serde::{Deserialize, Serialize};
use std::fmt;

/// The type of one element of a tensor.
///
/// `S4` and `U4` values occupy one byte each in memory (sign- or zero-extended); only files pack two in a byte.
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
}

impl DType {
    /// All types, in declaration order.
    pub const ALL: [DType; 15] = [
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
    ];

    /// Bytes an element takes in memory.
    pub const fn size(self) -> usize {
        match self {
            DType::S8 | DType::U8 | DType::S4 | DType::U4 | DType::Bool => 1,
            DType::F16 | DType::BF16 | DType::S16 | DType::U16 => 2,
            DType::F32 | DType::S32 | DType::U32 => 4,
            DType::F64 | DType::S64 | DType::U64 => 8,
        }
    }

    /// Whether this is one of the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
    }

    /// Whether this is an integer type (`Bool` is not).
    pub const fn is_integer(self) -> bool {
        !self.is_float() && !matches!(self, DType::Bool)
    }

    /// Whether this is an integer type with negative values.
    pub const fn is_signed(self) -> bool {
        matches!(self, DType::S4 | DType::S8 | DType::S16 | DType::S32 | DType::S64)
    }

    /// Smallest and largest value of an integer type of at most 32 bits, the range a quantized value may take.
    pub const fn integer_range(self) -> Option<(i64, i64)> {
        Some(match self {
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
