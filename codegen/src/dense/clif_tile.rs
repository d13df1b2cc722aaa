//! Dense microkernels in Cranelift's 128-bit vectors: the tier that runs on every CPU, and 128-bit VNNI.
//!
//! The instructions are a matter of patterns that Cranelift's selection knows. `iadd_pairwise(imul(swiden…))` is one
//! `pmaddwd`, and the tree in [`Dot::Vnni`] one `vpdpbusd`; any other order of its operands, or the optimiser sinking
//! parts of it, falls apart into a dozen instructions without a warning. Hence tiles are compiled at
//! `opt_level=none`, and a test disassembles them.

use super::{
    clif_epilogue::{Accumulator, Finisher, LANES, Params, cast, splat_i16},
    spec::{Product, Start, TileSpec},
};
use crate::{
    module::MEM,
    tier::{Isa, Tier},
};
use cranelift_codegen::ir::{
    BlockArg, InstBuilder, Type, Value,
    condcodes::IntCC,
    types::{F32, F32X4, I8X16, I16X8, I32X4, I64},
};
use cranelift_frontend::FunctionBuilder;

/// How a group of K is multiplied and summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dot {
    /// `vpdpbusd`: four products of u8 by s8.
    Vnni,
    /// Two `pmaddwd`: pairs of codes that are widened to 16 bits.
    Madd,
    /// `pmaddubsw` and a `pmaddwd` by ones: four products of u8 by s8 of which pairs fit 16 bits.
    Bytes,
    /// One fused multiply-add.
    Fma,
    /// A product and a sum.
    MulAdd,
}

impl Dot {
    /// The instructions of the tiles of an instruction set; `None` where they are not Cranelift's.
    pub(crate) fn of_isa(product: Product, isa: Isa) -> Option<Dot> {
        match (isa, product) {
            (Isa::XmmVnni, Product::U8S8 | Product::U8S7) => Some(Dot::Vnni),
            (Isa::XmmVnni, Product::F32) => Some(Dot::Fma),
            (Isa::Xmm, Product::U8S8) => Some(Dot::Madd),
            (Isa::Xmm, Product::U8S7) => Some(Dot::Bytes),
            (Isa::Xmm, Product::F32) => Some(Dot::MulAdd),
            (Isa::AmxInt8 | Isa::Avx512Vnni | Isa::AvxVnni | Isa::Avx2, _) => None,
        }
    }

    /// The best instructions that Cranelift may use on a tier, whoever emits its tiles.
    pub(crate) fn of_tier(product: Product, tier: &Tier) -> Dot {
        let has = |flag: &str| tier.cranelift_flags().any(|f| f == flag);
        match product {
            Product::U8S8 | Product::U8S7 if has("has_avx_vnni") || has("has_avx512vnni") => Dot::Vnni,
            Product::U8S8 => Dot::Madd,
            Product::U8S7 => Dot::Bytes,
            Product::F32 if has("has_fma") => Dot::Fma,
            Product::F32 => Dot::MulAdd,
        }
    }

    /// Dwords of an activation's group, which are multiplied one after the other.
    fn parts(self) -> i32 {
        if self == Dot::Madd { 2 } else { 1 }
    }

    pub(crate) fn accumulator(self) -> Type {
        match self {
            Dot::Vnni | Dot::Madd | Dot::Bytes => I32X4,
            Dot::Fma | Dot::MulAdd => F32X4,
        }
    }
}

/// Parameters of a tile function: addresses, as [`spec`](super::spec) names them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileArguments {
    pub(crate) a: Value,
    pub(crate) w: Value,
    pub(crate) params: Value,
    pub(crate) y: Value,
    pub(crate) r: Value,
    pub(crate) g: Value,
}

/// Parameters of a tile function: those of [`TileArguments`], and before the last of them where the tile is, for those who
/// ask.
pub(crate) const TILE_PARAMETERS: usize = 7;

impl TileArguments {
    /// The parameters of the function being emitted, in the order of the convention.
    pub(crate) fn of(params: &[Value]) -> TileArguments {
        let [a, w, params, y, r, g] = [0, 1, 2, 3, 4, 6].map(|i| params[i]);
        TileArguments { a, w, params, y, r, g }
    }
}

/// The most pixels of a tile with panels of `vectors` vectors, in 16 registers.
pub(crate) fn max_pixels(dot: Dot, vectors: usize) -> usize {
    // Besides accumulators: weights, an activation, a product, and ones.
    let others = match dot {
        Dot::Vnni | Dot::Fma => vectors + 1,
        Dot::MulAdd | Dot::Madd => vectors + 2,
        Dot::Bytes => vectors + 3,
    };
    (16 - others) / vectors
}

/// Most groups of a run that are unrolled.
const UNROLL: u32 = 4;

/// Emits the body of one tile and its return; the builder stands in the entry block.
///
/// Weights are `[groups][panel][4]` bytes, `[groups][2][panel][2]` where codes are widened, or `[groups][panel]` floats; `params` describes the constants.
pub(crate) fn emit_tile(
    b: &mut FunctionBuilder<'_>,
    spec: &TileSpec,
    dot: Dot,
    params: &Params<'_>,
    arguments: TileArguments,
) {
    let vectors = spec.panel / LANES;
    let TileArguments { a, mut w, params: p, y, r, g } = arguments;
    let from = if spec.start == Start::Weights { w } else { p };
    let first: Vec<Value> =
        (0..vectors).map(|v| b.ins().load(dot.accumulator(), MEM, from, (v * LANES * 4) as i32)).collect();
    if spec.start == Start::Weights {
        w = b.ins().iadd_imm_s(w, spec.panel as i64 * 4);
    }
    let mut finisher = Finisher { b, params, columns: spec.columns, p, y, r, g };
    let accumulators = (0..spec.pixels()).flat_map(|_| first.iter().copied()).collect();
    let state = State { a, w, accumulators };
    let sums = Sum::new(&mut *finisher.b, spec, dot).over(&spec.loops, state).accumulators;
    let done: Vec<Accumulator> = sums
        .into_iter()
        .enumerate()
        .map(|(i, value)| {
            let pixel = i / vectors;
            let [r_offset, g_offset] =
                [&spec.r_offsets, &spec.g_offsets].map(|o| o.get(pixel).copied().unwrap_or(0));
            let channel = i % vectors * LANES;
            Accumulator { value, channel, y_offset: spec.y_offsets[pixel], r_offset, g_offset }
        })
        .collect();
    finisher.finish(&done);
    b.ins().return_(&[]);
}

/// What changes from group to group.
struct State {
    a: Value,
    w: Value,
    /// By pixel, then vector of the panel.
    accumulators: Vec<Value>,
}

impl State {
    fn arguments(&self) -> Vec<BlockArg> {
        [self.a, self.w].iter().chain(&self.accumulators).map(|&v| BlockArg::from(v)).collect()
    }
}

/// The loops over K.
struct Sum<'s, 'f, 'a> {
    b: &'f mut FunctionBuilder<'a>,
    spec: &'s TileSpec,
    dot: Dot,
    vectors: usize,
    /// 16-bit ones, by which sums of pairs are summed.
    ones: Value,
}

impl<'s, 'f, 'a> Sum<'s, 'f, 'a> {
    fn new(b: &'f mut FunctionBuilder<'a>, spec: &'s TileSpec, dot: Dot) -> Sum<'s, 'f, 'a> {
        // One value for all: a constant of its own for each product would be loaded for each. Unused, it has no code.
        let ones = splat_i16(b, 1);
        Sum { b, spec, dot, vectors: spec.panel / LANES, ones }
    }

    /// Runs the loops, the outermost first, and in them the contiguous run.
    fn over(&mut self, loops: &[(u32, i32)], state: State) -> State {
        let Some((&(trips, stride), inner)) = loops.split_first() else { return self.run(state) };
        self.repeat(trips, state, |sum, state| {
            let a = state.a;
            let after = sum.over(inner, state);
            State { a: sum.advance(a, i64::from(stride)), ..after }
        })
    }

    fn run(&mut self, state: State) -> State {
        let (rounds, rest) = (self.spec.inner / UNROLL, self.spec.inner % UNROLL);
        let state = self.repeat(rounds, state, |sum, state| sum.groups(UNROLL, state));
        self.groups(rest, state)
    }

    /// A counted loop, or none for 0 and 1 trips.
    fn repeat(&mut self, trips: u32, state: State, body: impl FnOnce(&mut Self, State) -> State) -> State {
        match trips {
            0 => return state,
            1 => return body(self, state),
            _ => {}
        }
        let (header, exit) = (self.b.create_block(), self.b.create_block());
        let count = self.b.ins().iconst(I64, i64::from(trips));
        let mut arguments = state.arguments();
        arguments.push(count.into());
        self.b.ins().jump(header, &arguments);
        for block in [header, exit] {
            self.b.append_block_param(block, I64);
            self.b.append_block_param(block, I64);
            for _ in &state.accumulators {
                self.b.append_block_param(block, self.dot.accumulator());
            }
        }
        let left = self.b.append_block_param(header, I64);
        self.b.switch_to_block(header);
        let inside = self.state_of(header, state.accumulators.len());
        let after = body(self, inside);
        let left = self.b.ins().iadd_imm_s(left, -1);
        let leaving = after.arguments();
        let mut again = leaving.clone();
        again.push(left.into());
        let more = self.b.ins().icmp_imm_s(IntCC::NotEqual, left, 0);
        self.b.ins().brif(more, header, &again, exit, &leaving);
        self.b.seal_block(header);
        self.b.seal_block(exit);
        self.b.switch_to_block(exit);
        self.state_of(exit, state.accumulators.len())
    }

    fn state_of(&mut self, block: cranelift_codegen::ir::Block, accumulators: usize) -> State {
        let values = self.b.block_params(block);
        State { a: values[0], w: values[1], accumulators: values[2..2 + accumulators].to_vec() }
    }

    fn advance(&mut self, pointer: Value, bytes: i64) -> Value {
        if bytes == 0 { pointer } else { self.b.ins().iadd_imm_s(pointer, bytes) }
    }

    /// `count` groups that follow each other.
    fn groups(&mut self, count: u32, mut state: State) -> State {
        let parts = self.dot.parts();
        for g in 0..count as i32 {
            for part in 0..parts {
                self.part_of_group(parts * g + part, &mut state);
            }
        }
        let count = i64::from(count);
        State {
            a: self.advance(state.a, 4 * count * i64::from(parts)),
            w: self.advance(state.w, count * (self.spec.panel * 4) as i64),
            accumulators: state.accumulators,
        }
    }

    /// The 4 bytes of every pixel at dword `at`, by the weights that stand over them.
    fn part_of_group(&mut self, at: i32, state: &mut State) {
        let bytes = (self.spec.panel * 4) as i32 / self.dot.parts();
        let weights: Vec<Value> = (0..self.vectors as i32)
            .map(|v| {
                let vector = at * bytes + v * bytes / self.vectors as i32;
                match self.dot {
                    Dot::Madd => self.b.ins().sload8x8(MEM, state.w, vector),
                    Dot::Vnni | Dot::Bytes => self.b.ins().load(I8X16, MEM, state.w, vector),
                    Dot::Fma | Dot::MulAdd => self.b.ins().load(F32X4, MEM, state.w, vector),
                }
            })
            .collect();
        let spec = self.spec;
        for (pixel, rows) in spec.a_offsets.iter().zip(state.accumulators.chunks_mut(self.vectors)) {
            // A scalar load of f32 and a splat stay in vector registers; an integer one would not.
            let scalar = self.b.ins().load(F32, MEM, state.a, pixel + at * 4);
            let splat = self.b.ins().splat(F32X4, scalar);
            self.multiply(splat, &weights, rows);
        }
    }

    /// Adds the products of one pixel's bytes with every vector of the panel.
    fn multiply(&mut self, splat: Value, weights: &[Value], accumulators: &mut [Value]) {
        let operand = match self.dot {
            Dot::Vnni | Dot::Bytes => cast(self.b, I8X16, splat),
            Dot::Madd => cast(self.b, I16X8, splat),
            Dot::Fma | Dot::MulAdd => splat,
        };
        for (acc, &w) in accumulators.iter_mut().zip(weights) {
            *acc = match self.dot {
                Dot::Vnni => dot_accumulate(self.b, operand, w, *acc),
                Dot::Bytes => {
                    let products = multiply_add_bytes(self.b, operand, w, self.ones);
                    self.b.ins().iadd(*acc, products)
                }
                Dot::Madd => {
                    let products = multiply_add_pairs(self.b, operand, w);
                    self.b.ins().iadd(*acc, products)
                }
                Dot::Fma => self.b.ins().fma(operand, w, *acc),
                Dot::MulAdd => {
                    let product = self.b.ins().fmul(operand, w);
                    self.b.ins().fadd(*acc, product)
                }
            };
        }
    }
}

/// x₀·y₀ + x₁·y₁ of each pair of 16-bit lanes: one `pmaddwd`.
pub(crate) fn multiply_add_pairs(b: &mut FunctionBuilder<'_>, x: Value, y: Value) -> Value {
    let (x0, y0) = (b.ins().swiden_low(x), b.ins().swiden_low(y));
    let (x1, y1) = (b.ins().swiden_high(x), b.ins().swiden_high(y));
    let low = b.ins().imul(x0, y0);
    let high = b.ins().imul(x1, y1);
    b.ins().iadd_pairwise(low, high)
}

/// The sum of the four products u8·s8 of each 32-bit lane, of which pairs fit 16 bits: a `pmaddubsw`, and a `pmaddwd` by
/// 16-bit ones.
pub(crate) fn multiply_add_bytes(
    b: &mut FunctionBuilder<'_>,
    codes: Value,
    weights: Value,
    ones: Value,
) -> Value {
    let pairs = b.ins().x86_pmaddubsw(weights, codes);
    multiply_add_pairs(b, pairs, ones)
}

/// acc + the four products u8·s8 of each 32-bit lane: one `vpdpbusd` where the CPU has it.
pub(crate) fn dot_accumulate(b: &mut FunctionBuilder<'_>, codes: Value, weights: Value, acc: Value) -> Value {
    let (w0, a0) = (b.ins().swiden_low(weights), b.ins().uwiden_low(codes));
    let (w1, a1) = (b.ins().swiden_high(weights), b.ins().uwiden_high(codes));
    let low = b.ins().imul(w0, a0);
    let high = b.ins().imul(w1, a1);
    let (l0, l1) = (b.ins().swiden_low(low), b.ins().swiden_high(low));
    let (h0, h1) = (b.ins().swiden_low(high), b.ins().swiden_high(high));
    let low = b.ins().iadd_pairwise(l0, l1);
    let high = b.ins().iadd_pairwise(h0, h1);
    let sums = b.ins().iadd_pairwise(low, high);
    b.ins().iadd(sums, acc)
}
