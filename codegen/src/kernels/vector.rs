//! 128-bit vectors in CLIF: constants, comparisons, widening and narrowing.
//!
//! The comparison idioms are those that Cranelift turns into one `minps` or `maxps`.

use crate::module::MEM;
use cranelift_codegen::ir::{
    ConstantData, Endianness, InstBuilder, MemFlagsData, Type, Value,
    condcodes::FloatCC,
    types::{F32X4, F64X2, I8X16, I16X8, I32X4, I64X2},
};
use cranelift_frontend::FunctionBuilder;
use qcc_ir::{DType, OutputGrid};

/// Lane order of casts between vector types.
const LANES: MemFlagsData = MemFlagsData::new().with_endianness(Endianness::Little);

/// The vector type whose lanes hold elements of `dtype`.
pub(crate) fn vector_type(dtype: DType) -> Type {
    match dtype {
        DType::F32 => F32X4,
        DType::F64 => F64X2,
        _ => raw_type(dtype.size()),
    }
}

/// The integer vector type with lanes of `size` bytes.
pub(crate) fn raw_type(size: usize) -> Type {
    match size {
        1 => I8X16,
        2 => I16X8,
        4 => I32X4,
        _ => I64X2,
    }
}

/// The same bits as another vector type.
pub(crate) fn cast(b: &mut FunctionBuilder, ty: Type, x: Value) -> Value {
    match b.func.dfg.value_type(x) == ty {
        true => x,
        false => b.ins().bitcast(ty, LANES, x),
    }
}

/// A vector from memory of any alignment.
///
/// Loaded as another type, so that Cranelift does not make it an operand of the next instruction: its packed float
/// compares without AVX would then demand alignment, whatever the flags of the load say.
pub(crate) fn load(b: &mut FunctionBuilder, ty: Type, pointer: Value, displacement: i32) -> Value {
    let other = if ty == I64X2 { I32X4 } else { I64X2 };
    let x = b.ins().load(other, MEM, pointer, displacement);
    cast(b, ty, x)
}

/// A vector of which `count` lanes are read; the others are 0.
pub(crate) fn load_lanes(b: &mut FunctionBuilder, ty: Type, pointer: Value, at: i32, count: i64) -> Value {
    let zero = constant(b, ty, &[0; 16]);
    load_filled(b, zero, pointer, at, count)
}

/// A vector of which `count` lanes are read; the others are those of `others`.
pub(crate) fn load_filled(
    b: &mut FunctionBuilder,
    others: Value,
    pointer: Value,
    at: i32,
    count: i64,
) -> Value {
    let ty = b.func.dfg.value_type(others);
    if count == i64::from(ty.lane_count()) {
        return load(b, ty, pointer, at);
    }
    let size = ty.lane_bits() as i32 / 8;
    (0..count as i32).fold(others, |vector, i| {
        let x = b.ins().load(ty.lane_type(), MEM, pointer, at + i * size);
        b.ins().insertlane(vector, x, i as u8)
    })
}

/// Stores `count` lanes of a vector.
pub(crate) fn store_lanes(b: &mut FunctionBuilder, x: Value, pointer: Value, at: i32, count: i64) {
    let ty = b.func.dfg.value_type(x);
    if count == i64::from(ty.lane_count()) {
        b.ins().store(MEM, x, pointer, at);
        return;
    }
    let size = ty.lane_bits() as i32 / 8;
    for i in 0..count as i32 {
        let lane = b.ins().extractlane(x, i as u8);
        b.ins().store(MEM, lane, pointer, at + i * size);
    }
}

/// A constant vector.
pub(crate) fn constant(b: &mut FunctionBuilder, ty: Type, bytes: &[u8]) -> Value {
    let handle = b.func.dfg.constants.insert(ConstantData::from(bytes));
    b.ins().vconst(ty, handle)
}

fn repeated<const N: usize>(b: &mut FunctionBuilder, ty: Type, lane: [u8; N]) -> Value {
    let bytes: Vec<u8> = lane.iter().copied().cycle().take(16).collect();
    constant(b, ty, &bytes)
}

/// A number in four lanes.
pub(crate) fn f32x4(b: &mut FunctionBuilder, x: f32) -> Value {
    repeated(b, F32X4, x.to_le_bytes())
}

/// A number in four lanes.
pub(crate) fn i32x4(b: &mut FunctionBuilder, x: i32) -> Value {
    repeated(b, I32X4, x.to_le_bytes())
}

/// A number in eight lanes.
pub(crate) fn i16x8(b: &mut FunctionBuilder, x: i16) -> Value {
    repeated(b, I16X8, x.to_le_bytes())
}

/// A byte in sixteen lanes.
pub(crate) fn i8x16(b: &mut FunctionBuilder, x: u8) -> Value {
    repeated(b, I8X16, [x])
}

/// Lanes of `yes` where the lanes of `mask` are all ones, of `no` where they are all zeros.
pub(crate) fn select(b: &mut FunctionBuilder, mask: Value, yes: Value, no: Value) -> Value {
    let ty = b.func.dfg.value_type(yes);
    let mask = cast(b, ty, mask);
    b.ins().bitselect(mask, yes, no)
}

/// `x < y` as a mask; false where one is NaN.
pub(crate) fn less(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    b.ins().fcmp(FloatCC::LessThan, x, y)
}

/// `if x > y { x } else { y }`: y where one is NaN. One `maxps`.
pub(crate) fn larger(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    let mask = less(b, y, x);
    select(b, mask, x, y)
}

/// `if x < y { x } else { y }`: y where one is NaN. One `minps`.
pub(crate) fn smaller(b: &mut FunctionBuilder, x: Value, y: Value) -> Value {
    let mask = less(b, x, y);
    select(b, mask, x, y)
}

/// 16 lanes of 8 bits as two vectors of 16 bits.
pub(crate) fn widen8(b: &mut FunctionBuilder, x: Value, signed: bool) -> [Value; 2] {
    match signed {
        true => [b.ins().swiden_low(x), b.ins().swiden_high(x)],
        false => [b.ins().uwiden_low(x), b.ins().uwiden_high(x)],
    }
}

/// 8 lanes of 16 bits as two vectors of 32 bits.
pub(crate) fn widen16(b: &mut FunctionBuilder, x: Value, signed: bool) -> [Value; 2] {
    widen8(b, x, signed)
}

/// 16 integers of at most 16 bits, or s32, as four vectors of s32.
pub(crate) fn to_i32(b: &mut FunctionBuilder, x: &[Value], dtype: DType) -> Vec<Value> {
    let signed = dtype.is_signed();
    let mut vectors = x.to_vec();
    let mut size = dtype.size();
    while size < 4 {
        vectors = vectors.iter().flat_map(|&v| widen8(b, v, signed)).collect();
        size *= 2;
    }
    vectors
}

/// Four vectors of s32 within the range of `dtype` (of at most 16 bits) as its lanes; values beyond it saturate at 8
/// or 16 bits.
pub(crate) fn from_i32(b: &mut FunctionBuilder, x: &[Value], dtype: DType) -> Vec<Value> {
    let signed = dtype.is_signed();
    match (dtype.size(), signed) {
        (2, true) => x.chunks(2).map(|p| b.ins().snarrow(p[0], p[1])).collect(),
        (2, false) => x.chunks(2).map(|p| b.ins().unarrow(p[0], p[1])).collect(),
        _ => {
            let halves: Vec<Value> = x.chunks(2).map(|p| b.ins().snarrow(p[0], p[1])).collect();
            vec![narrow16(b, halves[0], halves[1], signed)]
        }
    }
}

/// Two vectors of s16 as 16 lanes of 8 bits, saturating.
pub(crate) fn narrow16(b: &mut FunctionBuilder, low: Value, high: Value, signed: bool) -> Value {
    match signed {
        true => b.ins().snarrow(low, high),
        false => b.ins().unarrow(low, high),
    }
}

/// Rescaled values (four vectors of s32) as codes of a grid.
pub(crate) fn codes(b: &mut FunctionBuilder, values: &[Value], grid: OutputGrid) -> Value {
    let zero = i32x4(b, grid.zero_point);
    let shifted: Vec<Value> = values.iter().map(|&v| b.ins().iadd(v, zero)).collect();
    let halves: Vec<Value> = shifted.chunks(2).map(|p| b.ins().snarrow(p[0], p[1])).collect();
    let bytes = narrow16(b, halves[0], halves[1], grid.dtype == DType::S8);
    clamp_codes(b, bytes, grid.dtype, grid.lo, grid.hi)
}

/// Codes within inclusive bounds, as bytes.
fn clamp_codes(b: &mut FunctionBuilder, x: Value, dtype: DType, lo: i32, hi: i32) -> Value {
    let (least, most) = dtype.integer_range().unwrap_or((0, 0));
    let signed = dtype == DType::S8;
    let mut y = x;
    if i64::from(lo) > least {
        let lo = i8x16(b, lo as u8);
        y = if signed { b.ins().smax(y, lo) } else { b.ins().umax(y, lo) };
    }
    if i64::from(hi) < most {
        let hi = i8x16(b, hi as u8);
        y = if signed { b.ins().smin(y, hi) } else { b.ins().umin(y, hi) };
    }
    y
}

/// Bytes of two vectors picked by index 0..32.
pub(crate) fn shuffle(b: &mut FunctionBuilder, x: Value, y: Value, pick: [u8; 16]) -> Value {
    let mask = b.func.dfg.immediates.push(ConstantData::from(&pick[..]));
    let (x, y) = (cast(b, I8X16, x), cast(b, I8X16, y));
    b.ins().shuffle(x, y, mask)
}

/// The element at `pointer` in all lanes.
pub(crate) fn load_splat(b: &mut FunctionBuilder, ty: Type, pointer: Value) -> Value {
    let x = b.ins().load(ty.lane_type(), MEM, pointer, 0);
    b.ins().splat(ty, x)
}

/// A 256-entry table applied to 16 bytes: one `pshufb` for each high digit, of which just one gives a byte that is not
/// zero.
pub(crate) fn lookup(b: &mut FunctionBuilder, x: Value, table: &[u8; 256]) -> Value {
    let digit = i8x16(b, 0x70);
    let mut y = None;
    for (high, row) in table.chunks(16).enumerate() {
        let own = match high {
            0 => x,
            _ => {
                let h = i8x16(b, (high << 4) as u8);
                b.ins().bxor(x, h)
            }
        };
        // 0x70 + 0..16 keeps the top bit clear; with any other high digit the sum reaches 0x80, which picks 0.
        let index = b.ins().uadd_sat(own, digit);
        let row = constant(b, I8X16, row);
        let picked = b.ins().x86_pshufb(row, index);
        y = Some(match y {
            None => picked,
            Some(y) => b.ins().bor(y, picked),
        });
    }
    y.unwrap_or(x)
}
