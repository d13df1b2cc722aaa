#![allow(unsafe_code, reason = "runs emitted code on buffers that end at inaccessible pages")]

use super::*;
use crate::{
    dense::{
        WeightOrder, Weights,
        pack::{pack_bias, pack_dequantizer, pack_params, pack_weights},
        spec::{Epilogue, Next, Prefetch, RowGrid, RunTimeGrids, SLACK, Start},
        strip::{self, Axis, StripSpec, Strips},
    },
    executable::Executable,
    tier::{TIERS, Tier},
};
use iced_x86::{
    Decoder, DecoderOptions, EncodingKind, Mnemonic, Register,
    code_asm::{CodeAssembler, ptr, rdi},
};
use proptest::{prelude::*, test_runner::TestRunner};
use qcc_ir::{
    OutputGrid,
    numerics::{
        ChannelBounds, Dequantizer, DynamicGrid, RequantMode, Requantizer, ResidualInput, WeightSums,
    },
    ops::Clamp,
};
use region::{Allocation, Protection};
use std::cell::RefCell;

const ISAS: [Isa; 4] = [Isa::AmxInt8, Isa::Avx512Vnni, Isa::AvxVnni, Isa::Avx2];

/// The emitted forms of this CPU. What is missing is said aloud: a test that skips silently tests nothing.
#[allow(clippy::print_stderr, reason = "see above")]
fn isas(product: Product) -> Vec<Isa> {
    let (here, missing): (Vec<&Tier>, Vec<&Tier>) =
        TIERS.iter().filter(|t| ISAS.contains(&t.isa)).partition(|t| t.is_available());
    for tier in missing {
        eprintln!("skipped: this CPU has no {tier}");
    }
    let emitted = |isa: &Isa| here.iter().any(|t| t.isas(product).any(|own| own == *isa));
    ISAS.into_iter().filter(emitted).collect()
}

/// Bytes followed by `slack` readable ones and then a page that faults.
struct Guarded {
    memory: Allocation,
    start: usize,
    len: usize,
}

impl Guarded {
    fn new(bytes: &[u8], slack: usize) -> Guarded {
        let page = region::page::size();
        let usable = (bytes.len() + slack).next_multiple_of(page).max(page);
        let mut memory = region::alloc(usable + page, Protection::READ_WRITE).unwrap();
        let start = usable - bytes.len() - slack;
        // SAFETY: the last page of the allocation above, to which nothing refers.
        unsafe { region::protect(memory.as_ptr::<u8>().add(usable), page, Protection::NONE).unwrap() };
        // SAFETY: within the usable part of the allocation, which nothing else refers to yet.
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr::<u8>().add(start), bytes.len()) }
            .copy_from_slice(bytes);
        Guarded { memory, start, len: bytes.len() }
    }

    fn at(&mut self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len);
        self.memory.as_mut_ptr::<u8>().wrapping_add(self.start + offset)
    }

    fn bytes(&mut self) -> &[u8] {
        // SAFETY: initialised by `new`; `&mut self` excludes writers.
        unsafe { std::slice::from_raw_parts(self.at(0), self.len) }
    }
}

type TileFn = unsafe extern "sysv64" fn(*const u8, *const u8, *const u8, *mut u8, *const u8, u64, *const u8);

/// Marsaglia's xorshift64: data for a case from one number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In `range`, ends included.
    fn within(&mut self, low: i64, high: i64) -> i64 {
        low + (self.next() % (high - low + 1) as u64) as i64
    }

    fn real(&mut self, low: f64, high: f64) -> f64 {
        low + (self.next() >> 11) as f64 / (1u64 << 53) as f64 * (high - low)
    }
}

/// The shape of a tile.
#[derive(Clone, Debug)]
struct Geometry {
    pixels: usize,
    vectors: usize,
    columns: usize,
    loops: Vec<(u32, i32)>,
    run_len: usize,
    /// Channels of the op before this panel: constants must be picked from the middle of the op's.
    before: usize,
    seed: u64,
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (
        1..=40usize,
        1..=4usize,
        1..=64usize,
        prop::collection::vec((1..=3u32, -300..=300i32), 0..=2),
        prop_oneof![4 => 1..=40usize, 1 => 41..=160usize],
        prop::sample::select(vec![0usize, 3, 16]),
        1..u64::MAX,
    )
        .prop_map(|(pixels, vectors, columns, loops, run_len, before, seed)| Geometry {
            pixels,
            vectors,
            columns,
            loops,
            run_len,
            before,
            seed,
        })
}

/// A tile with its operands, laid out as a driver might.
struct Problem {
    format: PanelFormat,
    columns: usize,
    channels: usize,
    before: usize,
    loops: Vec<(u32, i32)>,
    run_len: usize,
    a_offsets: Vec<i32>,
    y_offsets: Vec<i32>,
    r_offsets: Vec<i32>,
    configured: usize,
    a_origin: usize,
    a_bytes: usize,
    y_bytes: usize,
    r_bytes: usize,
    rng: Random,
}

impl Problem {
    fn new(isa: Isa, product: Product, g: &Geometry) -> Problem {
        Problem::with_results(isa, product, g, product.element())
    }

    /// The same with results and residuals of so many bytes.
    fn with_results(isa: Isa, product: Product, g: &Geometry, result_bytes: usize) -> Problem {
        let mut rng = Random(g.seed);
        let lanes = PanelFormat::new(product, isa, 1).lanes();
        let format = PanelFormat::new(product, isa, g.vectors * lanes);
        let pixels = 1 + (g.pixels - 1) % max_pixels(isa, product, format.panel);
        let columns = 1 + (g.columns - 1) % format.panel;
        let element = product.element();
        let a_offsets: Vec<i32> = match isa {
            Isa::AmxInt8 => banded(&mut rng, pixels),
            _ => (0..pixels).map(|_| (rng.within(-200, 600) * element as i64) as i32).collect(),
        };
        let pixels = a_offsets.len();
        let configured = if isa == Isa::AmxInt8 { rng.within(0, 16) as usize } else { 0 };
        // Any order and any distance, aligned for floats only.
        let shuffled = |rng: &mut Random, pitch: usize| -> Vec<i32> {
            let mut offsets: Vec<i32> = (0..pixels).map(|i| (i * pitch) as i32).collect();
            for i in (1..pixels).rev() {
                offsets.swap(i, rng.within(0, i as i64) as usize);
            }
            offsets
        };
        let row = columns * result_bytes;
        let y_pitch = row + result_bytes * rng.within(0, 5) as usize;
        let r_pitch = row + result_bytes * rng.within(0, 5) as usize;
        let loops: Vec<(u32, i32)> = g.loops.iter().map(|(n, s)| (*n, s * element as i32)).collect();
        let reach = |pick: fn(i32, i32) -> i32| -> i32 {
            loops.iter().map(|(n, s)| pick(0, (*n as i32 - 1) * s)).sum()
        };
        let least = a_offsets.iter().min().unwrap() + reach(i32::min);
        let most = a_offsets.iter().max().unwrap() + reach(i32::max);
        let a_origin = (-least).max(0) as usize;
        Problem {
            format,
            columns,
            channels: g.before + columns,
            before: g.before,
            run_len: g.run_len,
            a_bytes: (a_origin as i32 + most.max(0)) as usize + g.run_len * element,
            a_offsets,
            y_offsets: shuffled(&mut rng, y_pitch),
            r_offsets: shuffled(&mut rng, r_pitch),
            configured,
            y_bytes: (pixels - 1) * y_pitch + row,
            r_bytes: (pixels - 1) * r_pitch + row,
            loops,
            a_origin,
            rng,
        }
    }

    /// How many times wider than the product's element tiles read activations.
    fn widening(&self) -> usize {
        self.format.activation_bytes() / self.format.product.element()
    }

    fn runs(&self) -> usize {
        self.loops.iter().map(|l| l.0 as usize).product()
    }

    fn spec(&self, epilogue: Epilogue<'_>, residual: bool) -> TileSpec {
        TileSpec {
            product: self.format.product,
            panel: self.format.panel,
            columns: self.columns,
            a_offsets: self.a_offsets.iter().map(|o| o * self.widening() as i32).collect(),
            y_offsets: self.y_offsets.clone(),
            r_offsets: if residual { self.r_offsets.clone() } else { vec![] },
            g_offsets: vec![],
            loops: self.loops.iter().map(|&(n, s)| (n, s * self.widening() as i32)).collect(),
            inner: self.format.run_groups(self.run_len) as u32,
            start: Start::Params,
            epilogue: epilogue.form(),
            prefetch: self.prefetch(),
            configured: self.configured,
            next: None,
        }
    }

    /// Nothing, or lines that no buffer holds: neither may show.
    fn prefetch(&self) -> Prefetch {
        match self.columns % 3 {
            0 => Prefetch::default(),
            1 => Prefetch { weights: 1 << 20, activations: -(1 << 20), results: true, next_weights: 1000 },
            _ => Prefetch { weights: 64, activations: 0, results: true, next_weights: 5 },
        }
    }

    /// Byte offset in `a` of each run of a pixel, in the order of the loops.
    fn run_starts(&self, pixel: usize) -> Vec<usize> {
        let mut starts = vec![self.a_origin as i32 + self.a_offsets[pixel]];
        for (trips, stride) in &self.loops {
            starts = starts.iter().flat_map(|s| (0..*trips).map(move |i| s + i as i32 * stride)).collect();
        }
        starts.into_iter().map(|s| s as usize).collect()
    }

    /// Runs the tile on guarded buffers; what `y`, filled with 0xc5, holds afterwards.
    fn execute(&self, spec: &TileSpec, a: &[u8], w: &[u8], params: &[u8], r: &[u8]) -> Vec<u8> {
        self.execute_run(1, spec, a, w, params, r, &[])
    }

    /// The same of a run of so many tiles, whose results follow each other, with grids of rows.
    #[allow(clippy::too_many_arguments, reason = "those of a tile")]
    fn execute_run(
        &self,
        tiles: usize,
        spec: &TileSpec,
        a: &[u8],
        w: &[u8],
        params: &[u8],
        r: &[u8],
        g: &[u8],
    ) -> Vec<u8> {
        let code = emit_tile(self.format.isa, spec).unwrap();
        check_encoding(self.format.isa, &code);
        let code = Executable::new(&code).unwrap();
        let widened: Vec<u8>;
        let a = match self.widening() {
            1 => a,
            _ => {
                widened = a.iter().flat_map(|&code| [code, 0]).collect();
                &widened
            }
        };
        let mut a = Guarded::new(a, SLACK);
        let mut w = Guarded::new(w, 0);
        let mut params = Guarded::new(params, 0);
        let mut y = Guarded::new(&vec![0xc5; tiles * self.y_bytes], 0);
        let mut r = Guarded::new(r, SLACK);
        let mut g = Guarded::new(g, 0);
        // SAFETY: the code is a tile of this signature for this CPU, and the buffers are those it was emitted for.
        let mut call = || unsafe {
            let tile: TileFn = std::mem::transmute(code.entry());
            let first = a.at(self.a_origin * self.widening());
            // As if seven tiles of the panel had been computed before.
            tile(first, w.at(0), params.at(0), y.at(0), r.at(0), 7 | (tiles as u64) << 32, g.at(0));
        };
        match self.format.isa {
            Isa::AmxInt8 => within_configuration(self.configured, call),
            _ => call(),
        }
        y.bytes().to_vec()
    }
}

/// Offsets of about so many pixels as matrix registers can hold them: one long row, or rows of a block.
fn banded(rng: &mut Random, pixels: usize) -> Vec<i32> {
    let stride = rng.within(1, 90) as i32;
    let rows = if rng.next().is_multiple_of(2) { 1 } else { pixels.div_ceil(16) };
    let cols = pixels / rows;
    let starts: Vec<i32> = (0..rows).map(|_| rng.within(-200, 600) as i32).collect();
    (0..rows * cols).map(|i| starts[i / cols] + (i % cols) as i32 * stride).collect()
}

/// Calls a tile as a step does, and checks that it left the matrix registers as it found them.
fn within_configuration(rows: usize, tile: impl FnOnce()) {
    let store = {
        let mut asm = CodeAssembler::new(64).unwrap();
        asm.sttilecfg(ptr(rdi)).unwrap();
        asm.ret().unwrap();
        Executable::new(&asm.assemble(0).unwrap()).unwrap()
    };
    let enter = Executable::new(&emit_enter(rows.max(1)).unwrap()).unwrap();
    let leave = Executable::new(&emit_leave().unwrap()).unwrap();
    // SAFETY: functions of these signatures for this CPU; the second writes the 64 bytes it is given.
    let [enter, leave] = [&enter, &leave]
        .map(|code| unsafe { std::mem::transmute::<*const u8, extern "sysv64" fn()>(code.entry()) });
    // SAFETY: as above.
    let store = unsafe { std::mem::transmute::<*const u8, extern "sysv64" fn(*mut [u8; 64])>(store.entry()) };
    let configuration = || {
        let mut bytes = [0; 64];
        store(&mut bytes);
        bytes
    };
    if rows > 0 {
        enter();
    }
    let before = configuration();
    assert_eq!(usize::from(before[48]), rows);
    tile();
    assert_eq!(configuration(), before);
    leave();
    assert_eq!(configuration(), [0; 64]);
}

/// A tier's code may hold only what its CPUs decode, and must give the upper halves of its registers back.
fn check_encoding(isa: Isa, code: &[u8]) {
    let instructions: Vec<_> = Decoder::new(64, code, DecoderOptions::NONE).iter().collect();
    for i in &instructions {
        assert!(!i.is_invalid(), "{isa:?}: undecodable");
        let evex = i.code().encoding() == EncodingKind::EVEX;
        let is_wide = matches!(isa, Isa::AmxInt8 | Isa::Avx512Vnni);
        assert!(is_wide || !evex, "{isa:?} has the EVEX instruction {:?}", i.code());
        let legacy_vector = i.code().encoding() == EncodingKind::Legacy
            && (0..i.op_count()).any(|o| i.op_register(o).is_vector_register());
        assert!(!legacy_vector, "{isa:?} mixes in {:?}", i.code());
        let vnni = i.mnemonic() == Mnemonic::Vpdpbusd;
        assert!(!vnni || !matches!(isa, Isa::AmxInt8 | Isa::Avx2));
        let matrix = (0..i.op_count()).any(|o| i.op_register(o).is_tmm());
        assert!(!matrix || isa == Isa::AmxInt8, "{isa:?} has {:?}", i.code());
        assert!(!vnni || evex == (isa == Isa::Avx512Vnni), "{isa:?} has {:?}", i.code());
    }
    let end: Vec<Mnemonic> = instructions.iter().rev().take(2).map(|i| i.mnemonic()).collect();
    assert_eq!(end, [Mnemonic::Ret, Mnemonic::Vzeroupper]);
}

/// What the codes of an int8 case are made of.
#[derive(Clone, Copy, Debug)]
struct Content {
    mode: RequantMode,
    activations: Fill,
    weights: Fill,
    bias: BiasFill,
    residual: Option<Fill>,
    zero_point: i32,
    full_range: bool,
    /// log2 of the largest result in output steps.
    reach: f64,
    /// log2 of the ratio of channel factors.
    spread: f64,
    residual_factor: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Any,
    Least,
    Most,
    Tiny,
}

#[derive(Clone, Copy, Debug)]
enum BiasFill {
    Zero,
    Any,
    /// So that accumulators come close to ±2^31.
    Huge,
}

fn fill() -> impl Strategy<Value = Fill> {
    prop_oneof![4 => Just(Fill::Any), 1 => Just(Fill::Least), 1 => Just(Fill::Most), 1 => Just(Fill::Tiny)]
}

fn content() -> impl Strategy<Value = Content> {
    let zero_point = prop_oneof![Just(0), Just(255), 0..=255i32];
    (
        prop::sample::select(RequantMode::ALL.to_vec()),
        fill(),
        fill(),
        prop_oneof![Just(BiasFill::Zero), Just(BiasFill::Any), Just(BiasFill::Huge)],
        prop::option::of(fill()),
        zero_point,
        any::<bool>(),
        prop_oneof![3 => 4.0..12.0, 1 => -40.0..29.9f64, 1 => 29.0..60.0f64],
        0.0..6.0f64,
        prop_oneof![3 => -3.0..1.0, 1 => -20.0..14.0f64, 1 => 12.0..16.0f64],
    )
        .prop_map(
            |(mode, activations, weights, bias, residual, zero_point, full_range, reach, spread, factor)| {
                Content {
                    mode,
                    activations,
                    weights,
                    bias,
                    residual,
                    zero_point,
                    full_range,
                    reach,
                    spread,
                    residual_factor: factor,
                }
            },
        )
}

fn code(rng: &mut Random, fill: Fill) -> u8 {
    match fill {
        Fill::Any => rng.next() as u8,
        Fill::Least => 0,
        Fill::Most => 255,
        Fill::Tiny => (rng.next() % 2) as u8,
    }
}

fn weight_of(rng: &mut Random, fill: Fill) -> i8 {
    match fill {
        Fill::Any => rng.next() as i8,
        Fill::Least => -127,
        Fill::Most => 127,
        Fill::Tiny => rng.within(-1, 1) as i8,
    }
}

/// Runs of weights of which pairs fit 16 bits, by a hair where they are the least or the most.
fn narrow_weights(rng: &mut Random, runs: usize, run_len: usize, fill: Fill) -> Vec<i8> {
    let mut weights = Vec::with_capacity(runs * run_len);
    let mut pair = || loop {
        let pair = match fill {
            Fill::Any | Fill::Tiny => [(); 2].map(|()| weight_of(rng, fill)),
            Fill::Least => [[-64, -64], [-128, 0], [-1, -127]][rng.within(0, 2) as usize],
            Fill::Most => [[64, 64], [127, 1], [1, 127]][rng.within(0, 2) as usize],
        };
        if Product::is_in_16_bits(pair) {
            return pair;
        }
    };
    for _ in 0..runs {
        let pairs: Vec<i8> = (0..run_len.div_ceil(2)).flat_map(|_| pair()).collect();
        weights.extend(&pairs[..run_len]);
    }
    weights
}

/// Runs one int8 case, of matrix registers a run of up to three tiles, each with operands, weights and constants of its
/// own; `None` where the mode refuses the factors.
fn run_codes(
    (isa, product): (Isa, Product),
    geometry: &Geometry,
    c: Content,
) -> Result<Option<bool>, TestCaseError> {
    let mut p = Problem::new(isa, product, geometry);
    let channels = p.channels;
    let k = p.runs() * p.run_len;
    let tiles = if isa == Isa::AmxInt8 { 1 + geometry.seed as usize % 3 } else { 1 };
    let of_first: Vec<i8> = match product {
        Product::U8S7 => {
            let runs = channels * p.runs();
            narrow_weights(&mut p.rng, runs, p.run_len, c.weights)
        }
        _ => (0..channels * k).map(|_| weight_of(&mut p.rng, c.weights)).collect(),
    };
    let of_second = of_first.iter().map(|w| !w).collect();
    let weights = [of_first, of_second];
    let input_zero_point = p.rng.within(0, 255) as i32;
    let mut biases = vec![];
    let mut bounds: Vec<ChannelBounds> = vec![];
    for channel in 0..channels {
        let [first, second] = [&weights[0], &weights[1]]
            .map(|w| WeightSums::of(&w[channel * k..][..k]).bounds(0, input_zero_point));
        let free = match tiles {
            1 => first,
            _ => ChannelBounds { min: first.min.min(second.min), max: first.max.max(second.max) },
        };
        let bias = match c.bias {
            BiasFill::Zero => 0,
            BiasFill::Any => p.rng.within(-100_000, 100_000),
            BiasFill::Huge if p.rng.next().is_multiple_of(2) => {
                i64::from(i32::MAX) - free.max - p.rng.within(0, 9)
            }
            BiasFill::Huge => i64::from(i32::MIN) - free.min + p.rng.within(0, 9),
        };
        bounds.push(ChannelBounds { min: free.min + bias, max: free.max + bias });
        biases.push(bias as i32);
    }
    let reach = bounds.iter().map(|b| b.max.max(-b.min)).max().unwrap_or(1).max(1) as f64;
    let factors: Vec<f64> = (0..channels)
        .map(|_| {
            let exact = (c.reach - p.rng.real(0.0, c.spread)).exp2() / reach;
            if c.mode == RequantMode::Pow2 { exact.log2().round().exp2() } else { exact }
        })
        .collect();
    let residual = c.residual.map(|_| ResidualInput {
        factor: c.residual_factor.exp2(),
        zero_point: [0, 255, p.rng.within(0, 255) as i32][p.rng.next() as usize % 3],
    });
    let (lo, hi) = if c.full_range {
        (0, 255)
    } else {
        let lo = p.rng.within(0, 255);
        (lo as i32, p.rng.within(lo, 255) as i32)
    };
    let grid = OutputGrid { dtype: DType::U8, scale: 1.0, zero_point: c.zero_point, lo, hi };
    let Ok(q) = Requantizer::new(c.mode, &factors, grid, residual, &bounds) else { return Ok(None) };

    let weight = |tile: usize, channel: usize, run: usize, i: usize| {
        weights[tile % 2][channel * k + run * p.run_len + i]
    };
    let own = p.before..channels;
    let (mut packed, mut params, mut corrected) = (vec![], vec![], vec![]);
    for tile in 0..tiles {
        let sum = |w: &[i8]| input_zero_point * w.iter().map(|w| i32::from(*w)).sum::<i32>();
        let starts: Vec<i32> =
            weights[tile % 2].chunks_exact(k).zip(&biases).map(|(w, b)| b.wrapping_sub(sum(w))).collect();
        let of_tile = |channel, run, i| weight(tile, channel, run, i);
        packed.push(pack_weights(p.format, own.clone(), p.runs(), p.run_len, of_tile));
        params.push(pack_params(p.format, Some(&q), own.clone(), &starts));
        corrected.push(starts);
    }
    let mut rng = Random(geometry.seed ^ 0x5555);
    let a: Vec<u8> = (0..tiles * p.a_bytes).map(|_| code(&mut rng, c.activations)).collect();
    let r: Vec<u8> =
        (0..tiles * p.r_bytes).map(|_| code(&mut rng, c.residual.unwrap_or(Fill::Any))).collect();
    let next = Next {
        a: p.a_bytes as i32,
        w: packed[0].len() as i32,
        params: params[0].len() as i32,
        y: p.y_bytes as i32,
        r: p.r_bytes as i32,
        g: 0,
    };
    let mut spec = p.spec(Epilogue::Requantize(&q), q.has_residual);
    // One tile may be a run, too.
    spec.next = (isa == Isa::AmxInt8 && !geometry.seed.is_multiple_of(5) || tiles > 1).then_some(next);
    let y = p.execute_run(tiles, &spec, &a, &packed.concat(), &params.concat(), &r, &[]);

    let mut expected = vec![0xc5u8; tiles * p.y_bytes];
    let mut saturated = true;
    for (tile, pixel) in (0..tiles).flat_map(|tile| (0..p.a_offsets.len()).map(move |pixel| (tile, pixel))) {
        let starts = p.run_starts(pixel);
        for (column, channel) in own.clone().enumerate() {
            let mut acc = corrected[tile][channel];
            for (run, start) in starts.iter().enumerate() {
                for i in 0..p.run_len {
                    let x = a[tile * p.a_bytes + start + i];
                    acc = acc.wrapping_add(i32::from(x) * i32::from(weight(tile, channel, run, i)));
                }
            }
            let res = r[tile * p.r_bytes + p.r_offsets[pixel] as usize + column].into();
            let code = q.apply(acc, channel, res);
            saturated &= code == lo || code == hi;
            expected[tile * p.y_bytes + p.y_offsets[pixel] as usize + column] = code as u8;
        }
    }
    let name = tile_name(isa, &spec);
    prop_assert_eq!(y, expected, "{} with {:?}", name, q);
    Ok(Some(!saturated))
}

/// The forms of products of codes that this CPU can run.
fn forms_of_codes() -> Vec<(Isa, Product)> {
    let of = |product| isas(product).into_iter().map(move |isa| (isa, product));
    of(Product::U8S8).chain(of(Product::U8S7)).collect()
}

#[test]
fn codes_equal_the_reference_in_every_mode() {
    for form in forms_of_codes() {
        // Cases, and those with a result within the bounds, for each mode.
        let counts = RefCell::new([(0, 0); RequantMode::ALL.len()]);
        let mut runner =
            TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) });
        runner
            .run(&(geometry(), content()), |(g, c)| {
                if let Some(telling) = run_codes(form, &g, c)? {
                    let mode = RequantMode::ALL.iter().position(|m| *m == c.mode).unwrap_or(0);
                    let count = &mut counts.borrow_mut()[mode];
                    count.0 += 1;
                    count.1 += usize::from(telling);
                }
                Ok(())
            })
            .unwrap();
        for (mode, (ran, telling)) in RequantMode::ALL.iter().zip(counts.into_inner()) {
            assert!(
                ran >= 20 && telling >= 8,
                "{form:?} {mode}: {ran} cases, {telling} of them within the bounds"
            );
        }
    }
}

#[test]
fn every_shape_of_tile_is_right() {
    // What random shapes may miss: each panel, each number of pixels, and each number of columns of the smallest.
    for (isa, product) in forms_of_codes() {
        for vectors in 1..=MAX_VECTORS {
            let lanes = PanelFormat::new(product, isa, 1).lanes();
            let panel = vectors * lanes;
            let most = max_pixels(isa, product, panel);
            let shapes = (1..=most).map(|p| (p, panel)).chain((1..=panel).map(|c| (most.min(5), c)));
            for (i, (pixels, columns)) in shapes.enumerate() {
                let g = Geometry {
                    pixels,
                    vectors,
                    columns,
                    loops: vec![(2, 37)],
                    run_len: 1 + i % 23,
                    before: i % 2,
                    seed: 1 + i as u64,
                };
                let c = Content {
                    mode: RequantMode::ALL[i % RequantMode::ALL.len()],
                    activations: Fill::Any,
                    weights: Fill::Any,
                    bias: BiasFill::Any,
                    residual: (i % 3 == 0).then_some(Fill::Any),
                    zero_point: 100,
                    full_range: i % 2 == 0,
                    reach: 7.5,
                    spread: 2.0,
                    residual_factor: -1.0,
                };
                assert!(
                    run_codes((isa, product), &g, c).unwrap().is_some(),
                    "{isa:?} {product:?} {g:?} {c:?} refused"
                );
            }
        }
    }
}

/// What the floats of a product of codes are made of.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    activations: Fill,
    weights: Fill,
    grids: RunTimeGrids,
    bias: bool,
    residual: bool,
    clamp: Clamp,
}

fn numbers() -> impl Strategy<Value = Numbers> {
    let bound = || prop_oneof![Just(f32::INFINITY), -1e3f32..1e3];
    let grids = prop::sample::select(vec![
        RunTimeGrids::None,
        RunTimeGrids::Scales,
        RunTimeGrids::ScalesAndZeroPoints,
    ]);
    (fill(), fill(), any::<[bool; 2]>(), grids, bound(), bound()).prop_map(
        |(activations, weights, [bias, residual], grids, lo, hi)| {
            let clamp = Clamp { lo: if lo.is_finite() { lo.min(hi) } else { -lo }, hi };
            Numbers { activations, weights, grids, bias, residual, clamp }
        },
    )
}

/// Runs one case of codes that become floats; of matrix registers a run of up to three tiles of pixels.
fn run_numbers((isa, product): (Isa, Product), geometry: &Geometry, n: Numbers) -> Result<(), TestCaseError> {
    let mut p = Problem::with_results(isa, product, geometry, 4);
    let tiles = if isa == Isa::AmxInt8 { 1 + geometry.seed as usize % 3 } else { 1 };
    let (pixels, k) = (p.a_offsets.len(), p.runs() * p.run_len);
    let weights: Vec<i8> = match product {
        Product::U8S7 => {
            let runs = p.channels * p.runs();
            narrow_weights(&mut p.rng, runs, p.run_len, n.weights)
        }
        _ => (0..p.channels * k).map(|_| weight_of(&mut p.rng, n.weights)).collect(),
    };
    let weight = |channel: usize, run: usize, i: usize| weights[channel * k + run * p.run_len + i];
    let sums: Vec<WeightSums> = weights.chunks_exact(k).map(WeightSums::of).collect();
    let mut rng = Random(geometry.seed ^ 0x3333);
    let mut reals =
        |count: usize, most: f64| -> Vec<f32> { (0..count).map(|_| rng.real(-most, most) as f32).collect() };
    let scales: Vec<f32> = reals(p.channels, 0.1).into_iter().map(f32::abs).collect();
    let bias = n.bias.then(|| reals(p.channels, 100.0));
    let rows: Vec<DynamicGrid> = reals(tiles * pixels, 0.1)
        .into_iter()
        .enumerate()
        .map(|(i, scale)| DynamicGrid {
            scale: match n.grids {
                RunTimeGrids::None => 1.0,
                _ if i % 11 == 10 => f32::NAN,
                _ => scale.abs(),
            },
            zero_point: if n.grids.has_zero_points() { (i * 97 % 256) as i32 } else { 0 },
        })
        .collect();
    let residual = reals(tiles * p.r_bytes / 4, 100.0);
    let dequantizer = Dequantizer::new(&sums, scales, bias, n.clamp).unwrap();
    let epilogue = Epilogue::Dequantize { dequantizer: &dequantizer, grids: n.grids, residual: n.residual };
    p.format = p.format.with_results(epilogue.form());
    let own = p.before..p.channels;
    let packed = pack_weights(p.format, own.clone(), p.runs(), p.run_len, weight);
    let params = pack_dequantizer(p.format, epilogue.form(), &dequantizer, own.clone(), &vec![0; p.channels]);
    let a: Vec<u8> = (0..tiles * p.a_bytes).map(|_| code(&mut p.rng, n.activations)).collect();
    let mut spec = p.spec(epilogue, n.residual);
    let row = |i: usize| (i * RowGrid::BYTES) as i32;
    spec.g_offsets = if n.grids.has_scales() { (0..pixels).map(row).collect() } else { vec![] };
    let (a_bytes, y, r) = (p.a_bytes as i32, p.y_bytes as i32, p.r_bytes as i32);
    let next =
        Next { a: a_bytes, w: 0, params: 0, y, r, g: if n.grids.has_scales() { row(pixels) } else { 0 } };
    spec.next = (isa == Isa::AmxInt8 && !geometry.seed.is_multiple_of(5) || tiles > 1).then_some(next);
    let bytes = |floats: &[f32]| -> Vec<u8> { floats.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let g: Vec<u8> =
        rows.iter().flat_map(|r| [r.scale.to_le_bytes(), r.zero_point.to_le_bytes()]).flatten().collect();
    let result = p.execute_run(tiles, &spec, &a, &packed, &params, &bytes(&residual), &g);

    let unwritten = f32::from_le_bytes([0xc5; 4]);
    let mut expected = vec![unwritten; tiles * p.y_bytes / 4];
    for (tile, pixel) in (0..tiles).flat_map(|tile| (0..pixels).map(move |pixel| (tile, pixel))) {
        let starts = p.run_starts(pixel);
        for (column, channel) in own.clone().enumerate() {
            let mut acc = 0i32;
            for (run, start) in starts.iter().enumerate() {
                for i in 0..p.run_len {
                    let x = a[tile * p.a_bytes + start + i];
                    acc = acc.wrapping_add(i32::from(x) * i32::from(weight(channel, run, i)));
                }
            }
            let r =
                n.residual.then(|| residual[(tile * p.r_bytes + p.r_offsets[pixel] as usize) / 4 + column]);
            let y = dequantizer.apply(acc, channel, rows[tile * pixels + pixel], r);
            expected[(tile * p.y_bytes + p.y_offsets[pixel] as usize) / 4 + column] = y;
        }
    }
    let canonical = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
    let result: Vec<u32> =
        result.as_chunks::<4>().0.iter().map(|&c| canonical(f32::from_le_bytes(c))).collect();
    let expected: Vec<u32> = expected.into_iter().map(canonical).collect();
    prop_assert_eq!(result, expected, "{} with {:?}", tile_name(isa, &spec), n);
    Ok(())
}

#[test]
fn floats_of_codes_equal_the_reference() {
    for form in forms_of_codes() {
        let mut runner =
            TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) });
        runner.run(&(geometry(), numbers()), |(g, n)| run_numbers(form, &g, n)).unwrap();
    }
}

#[test]
fn tflite_shifts_a_large_residual_left() {
    // A factor of 2^13 or more shifts left before the multiplier. Such a residual saturates unless the accumulator
    // cancels it, which random cases do not hit.
    let factor = 9000.0;
    let grid = OutputGrid { dtype: DType::U8, scale: 1.0, zero_point: 10, lo: 0, hi: 255 };
    for isa in isas(Product::U8S8) {
        let g = Geometry { pixels: 2, vectors: 1, columns: 8, loops: vec![], run_len: 1, before: 0, seed: 9 };
        let p = Problem::new(isa, Product::U8S8, &g);
        let bias: Vec<i32> = (0..p.channels as i32).map(|c| 20 * c - 9000).collect();
        let bounds: Vec<_> =
            bias.iter().map(|b| ChannelBounds { min: (*b).into(), max: (*b).into() }).collect();
        let residual = Some(ResidualInput { factor, zero_point: 4 });
        let q =
            Requantizer::new(RequantMode::Tflite, &vec![1.0; p.channels], grid, residual, &bounds).unwrap();
        let packed = pack_weights(p.format, 0..p.channels, 1, 1, |_, _, _| 0i8);
        let params = pack_params(p.format, Some(&q), 0..p.channels, &bias);
        let spec = p.spec(Epilogue::Requantize(&q), true);
        let y = p.execute(&spec, &vec![0; p.a_bytes], &packed, &params, &vec![5; p.r_bytes]);
        for y_offset in &p.y_offsets {
            for (c, b) in bias.iter().enumerate().take(p.columns) {
                let expected = q.apply(*b, c, 5);
                assert_eq!(i32::from(y[*y_offset as usize + c]), expected, "{isa:?} channel {c}");
                assert_eq!(expected, 10 + 20 * c as i32);
            }
        }
    }
}

#[test]
fn pack_only_narrows_with_saturation() {
    for isa in isas(Product::U8S8) {
        let g = Geometry {
            pixels: 3,
            vectors: 2,
            columns: 13,
            loops: vec![(3, 50)],
            run_len: 7,
            before: 0,
            seed: 77,
        };
        let p = Problem::new(isa, Product::U8S8, &g);
        let weight = |c: usize, run: usize, i: usize| ((c * 5 + run * 3 + i) % 7) as i8 - 3;
        let bias: Vec<i32> = (0..p.channels as i32).map(|c| 40_000 * (c % 3 - 1) + 9 * c).collect();
        let a: Vec<u8> = (0..p.a_bytes).map(|i| (i * 31 % 256) as u8).collect();
        let packed = pack_weights(p.format, 0..p.channels, p.runs(), p.run_len, weight);
        let params = pack_params(p.format, None, 0..p.channels, &bias);
        let y = p.execute(&p.spec(Epilogue::PackOnly, true), &a, &packed, &params, &[]);
        for pixel in 0..p.a_offsets.len() {
            for c in 0..p.columns {
                let sum: i32 = p
                    .run_starts(pixel)
                    .iter()
                    .enumerate()
                    .flat_map(|(run, s)| (0..p.run_len).map(move |i| (run, s + i, i)))
                    .map(|(run, at, i)| i32::from(a[at]) * i32::from(weight(c, run, i)))
                    .sum();
                let code = y[p.y_offsets[pixel] as usize + c];
                assert_eq!(
                    i32::from(code),
                    (bias[c] + sum).clamp(0, 255),
                    "{isa:?} pixel {pixel} channel {c}"
                );
            }
        }
    }
}

fn run_floats(isa: Isa, g: &Geometry, clamp: Clamp, residual: bool) -> Result<(), TestCaseError> {
    let mut p = Problem::new(isa, Product::F32, g);
    let k = p.runs() * p.run_len;
    let mut reals = |n: usize| -> Vec<f32> { (0..n).map(|_| p.rng.real(-2.0, 2.0) as f32).collect() };
    let (a, r) = (reals(p.a_bytes / 4), reals(p.r_bytes / 4));
    let (weights, bias) = (reals(p.channels * k), reals(p.channels));
    let weight = |c: usize, run: usize, i: usize| weights[c * k + run * p.run_len + i];
    let own = p.before..p.channels;
    let packed = pack_weights(p.format, own.clone(), p.runs(), p.run_len, weight);
    let params = pack_bias(p.format, clamp, own.clone(), &bias);
    let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let spec = p.spec(Epilogue::Float { clamp, residual }, residual);
    let y = p.execute(&spec, &bytes(&a), &packed, &params, &bytes(&r));
    let mut canary = vec![true; p.y_bytes];
    for pixel in 0..p.a_offsets.len() {
        for (column, channel) in own.clone().enumerate() {
            let mut terms = vec![f64::from(bias[channel])];
            for (run, start) in p.run_starts(pixel).into_iter().enumerate() {
                let products =
                    (0..p.run_len).map(|i| f64::from(a[start / 4 + i]) * f64::from(weight(channel, run, i)));
                terms.extend(products);
            }
            if residual {
                terms.push(r[p.r_offsets[pixel] as usize / 4 + column].into());
            }
            let sum: f64 = terms.iter().sum();
            let expected = sum.clamp(clamp.lo.into(), clamp.hi.into());
            // Higham: each of n additions errs by at most half an ulp of sums that the absolute terms bound.
            let bound =
                terms.len() as f64 * f64::from(f32::EPSILON) * terms.iter().map(|t| t.abs()).sum::<f64>();
            let at = p.y_offsets[pixel] as usize + 4 * column;
            let mut found = [0; 4];
            found.copy_from_slice(&y[at..at + 4]);
            canary[at..at + 4].fill(false);
            let found = f64::from(f32::from_le_bytes(found));
            prop_assert!(
                (found - expected).abs() <= bound,
                "{}: {} for {}",
                tile_name(isa, &spec),
                found,
                expected
            );
        }
    }
    prop_assert!(y.iter().zip(canary).all(|(byte, canary)| !canary || *byte == 0xc5));
    Ok(())
}

#[test]
fn floats_are_within_the_rounding_bound() {
    let clamp = prop::sample::select(vec![
        Clamp::NONE,
        Clamp::RELU,
        Clamp { lo: 0.0, hi: 6.0 },
        Clamp { lo: f32::NEG_INFINITY, hi: 1.5 },
    ]);
    for isa in isas(Product::F32) {
        let mut runner =
            TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) });
        runner
            .run(&(geometry(), clamp.clone(), any::<bool>()), |(g, clamp, residual)| {
                run_floats(isa, &g, clamp, residual)
            })
            .unwrap();
    }
}

#[test]
fn float_clamps_keep_nan_and_the_sign_of_zero() {
    for isa in isas(Product::F32) {
        let g = Geometry { pixels: 1, vectors: 1, columns: 8, loops: vec![], run_len: 1, before: 0, seed: 5 };
        let p = Problem::new(isa, Product::F32, &g);
        let bias = [f32::NAN, -0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY, -1.0, 2.5, 7.0];
        let clamp = Clamp { lo: 0.0, hi: 6.0 };
        // -0 · x keeps the sign of a zero bias.
        let packed = pack_weights(p.format, 0..8, 1, 1, |_, _, _| -0.0f32);
        let params = pack_bias(p.format, clamp, 0..8, &bias);
        let a: Vec<u8> = (0..p.a_bytes / 4).flat_map(|_| 1.0f32.to_le_bytes()).collect();
        let y =
            p.execute(&p.spec(Epilogue::Float { clamp, residual: false }, false), &a, &packed, &params, &[]);
        for (b, y) in bias.iter().zip(y.chunks_exact(4)) {
            assert_eq!(y, clamp.apply(*b).to_le_bytes(), "{isa:?}: bound of {b}");
        }
    }
}

fn small_spec(epilogue: Epilogue<'_>) -> TileSpec {
    TileSpec {
        product: Product::U8S8,
        panel: 16,
        columns: 16,
        a_offsets: vec![0, 64],
        y_offsets: vec![0, 16],
        r_offsets: vec![],
        g_offsets: vec![],
        loops: vec![],
        inner: 3,
        start: Start::Params,
        epilogue: epilogue.form(),
        prefetch: Prefetch::default(),
        configured: 0,
        next: None,
    }
}

#[test]
fn what_cannot_be_emitted_is_refused() {
    let good = small_spec(Epilogue::PackOnly);
    let refuse = |change: &dyn Fn(&mut TileSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        emit_tile(Isa::Avx2, &spec).unwrap_err()
    };
    assert!(emit_tile(Isa::Avx2, &good).is_ok());
    assert_eq!(emit_tile(Isa::Xmm, &good), Err(EmitError::Isa { isa: Isa::Xmm }));
    assert_eq!(refuse(&|s| s.panel = 12), EmitError::Panel { panel: 12, lanes: 8 });
    assert_eq!(refuse(&|s| s.panel = 40), EmitError::Panel { panel: 40, lanes: 8 });
    assert_eq!(refuse(&|s| s.columns = 0), EmitError::Columns { columns: 0, panel: 16 });
    assert_eq!(refuse(&|s| s.columns = 17), EmitError::Columns { columns: 17, panel: 16 });
    assert_eq!(refuse(&|s| s.a_offsets = vec![0; 7]), EmitError::Pixels { pixels: 7, panel: 16, most: 6 });
    let offsets = EmitError::Offsets { what: "result", found: 1, expected: 2 };
    assert_eq!(refuse(&|s| s.y_offsets = vec![0]), offsets);
    assert_eq!(refuse(&|s| s.inner = 0), EmitError::EmptySum);
    assert_eq!(refuse(&|s| s.loops = vec![(2, 8); 4]), EmitError::Loops(4));
    assert_eq!(refuse(&|s| s.a_offsets[1] = i32::MAX), EmitError::Displacement);
    let float = Epilogue::Float { clamp: Clamp::NONE, residual: false };
    assert_eq!(emit_tile(Isa::Avx2, &small_spec(float)), Err(EmitError::Epilogue(Product::U8S8)));
}

#[test]
fn names_tell_types_shape_tier_and_epilogue() {
    let grid = OutputGrid { dtype: DType::U8, scale: 1.0, zero_point: 0, lo: 0, hi: 255 };
    let bounds = [ChannelBounds { min: -1000, max: 1000 }];
    let q = Requantizer::new(RequantMode::Q15, &[0.01], grid, None, &bounds).unwrap();
    let name = tile_name(Isa::Avx512Vnni, &small_spec(Epilogue::Requantize(&q)));
    assert_eq!(name, "qu8s8_gemm_2x16c4__avx512vnni_q15");
    let float = Epilogue::Float { clamp: Clamp::RELU, residual: false };
    let spec = TileSpec { product: Product::F32, ..small_spec(float) };
    assert_eq!(tile_name(Isa::Avx2, &spec), "f32_gemm_2x16__avx2_minmax");
}

#[test]
fn emitting_twice_gives_the_same_bytes() {
    for isa in ISAS {
        let inner = if isa == Isa::AmxInt8 { 16 } else { 3 };
        let spec = TileSpec { inner, ..small_spec(Epilogue::PackOnly) };
        assert!(emit_tile(isa, &spec).is_ok());
        assert_eq!(emit_tile(isa, &spec), emit_tile(isa, &spec));
    }
}

type StripFn = unsafe extern "sysv64" fn(*const u8, *const u8, *const u8, *mut u8, *const u8, u64);

/// A depthwise convolution of an image between inaccessible pages, strip by strip.
fn run_strips(isa: Isa, product: Product, window: [Axis; 2], outputs: [usize; 2], channels: usize) {
    let zero_point = 9u8;
    let (element, taps) = (product.element(), window[0].taps * window[1].taps);
    let strips = Strips::new(product, isa, window, zero_point, outputs).unwrap();
    let mut rng = Random(1 + channels as u64);
    let weights: Vec<i8> = (0..channels * taps).map(|_| rng.within(-2, 2) as i8).collect();
    let bias: Vec<i32> = (0..channels).map(|_| rng.within(0, 250) as i32).collect();
    let image: Vec<u8> =
        (0..window[0].extent * window[1].extent * channels).map(|_| rng.next() as u8).collect();
    // Small integers: float sums of them are exact in any order.
    let float = |x: f32| x.to_le_bytes();
    let a_bytes: Vec<u8> = match product.is_of_codes() {
        true => image.clone(),
        false => image.iter().flat_map(|x| float(f32::from(*x))).collect(),
    };
    let order = WeightOrder { channel: taps, inputs: 1, input: taps };
    let [y_row, y_col] = [outputs[1] * channels * element, channels * element];
    let mut a = Guarded::new(&a_bytes, SLACK);
    let mut y = Guarded::new(&vec![0xc5; outputs[0] * y_row], 0);
    let clamp = Clamp::NONE;
    for panel in strip::panels(product, isa, channels) {
        let spec = |rows: usize, cols: usize| StripSpec {
            product,
            isa,
            panel: panel.width,
            columns: panel.columns,
            planned_rows: strips.rows,
            rows,
            cols,
            window,
            y_row,
            y_col,
            epilogue: match product.is_of_codes() {
                true => EpilogueForm::PackOnly,
                false => Epilogue::Float { clamp, residual: false }.form(),
            },
        };
        let whole = spec(strips.rows, strips.cols);
        let own = panel.first..panel.first + panel.columns;
        let reals: Vec<f32> = weights.iter().map(|w| f32::from(*w)).collect();
        let real_bias: Vec<f32> = bias.iter().map(|b| *b as f32).collect();
        let (w, params) = match product.is_of_codes() {
            true => (
                whole.pack(panel.first, &Weights { elements: &weights, order, run: 1 }, zero_point),
                pack_params(whole.format(), None, own, &bias),
            ),
            false => (
                whole.pack(panel.first, &Weights { elements: &reals, order, run: 1 }, 0),
                pack_bias(whole.format(), clamp, own, &real_bias),
            ),
        };
        let (mut w, mut params) = (Guarded::new(&w, 0), Guarded::new(&params, 0));
        for row in (0..outputs[0]).step_by(strips.rows) {
            for col in (0..outputs[1]).step_by(strips.cols) {
                let own = spec(strips.rows.min(outputs[0] - row), strips.cols.min(outputs[1] - col));
                let code = emit_strip(&own).unwrap();
                check_encoding(isa, &code);
                let code = Executable::new(&code).unwrap();
                let first = panel.first * element;
                // Of a window that begins outside the image, or behind its last pixel, only the address is made.
                let from =
                    row * window[0].stride * window[0].pitch + col * window[1].stride * window[1].pitch;
                let at = row as u64 | (col as u64) << 32;
                // SAFETY: the code is a strip of this signature for this CPU, and the buffers are those it was emitted
                // for.
                unsafe {
                    let strip: StripFn = std::mem::transmute(code.entry());
                    let to = y.at(row * y_row + col * y_col + first);
                    strip(a.at(0).wrapping_add(from + first), w.at(0), params.at(0), to, to, at);
                }
            }
        }
    }
    let outside = if product.is_of_codes() { i32::from(zero_point) } else { 0 };
    let mut expected = Vec::new();
    for (row, col) in (0..outputs[0]).flat_map(|row| (0..outputs[1]).map(move |col| (row, col))) {
        for channel in 0..channels {
            let mut sum = bias[channel];
            for tap in 0..taps {
                let at = |axis: usize, output: usize, tap: usize| {
                    window[axis].inside(output, tap * window[axis].dilation)
                };
                let x = match (at(0, row, tap / window[1].taps), at(1, col, tap % window[1].taps)) {
                    (Some(r), Some(c)) => image[(r * window[1].extent + c) * channels + channel].into(),
                    _ => outside,
                };
                sum += x * i32::from(weights[channel * taps + tap]);
            }
            match product.is_of_codes() {
                true => expected.push(sum.clamp(0, 255) as u8),
                false => expected.extend(float(sum as f32)),
            }
        }
    }
    assert!(y.bytes() == expected, "{isa:?} {product:?} {channels} channels, {window:?}");
}

#[test]
fn strips_read_and_write_nothing_but_their_buffers() {
    let axis =
        |taps, stride, dilation, before, extent| Axis { taps, stride, dilation, before, extent, pitch: 0 };
    // Windows, and how many of them: padded on all sides, strides that leave rows out, no padding, several strips.
    let windows = [
        ([axis(3, 1, 1, 1, 7), axis(3, 1, 1, 1, 9)], [7, 9]),
        ([axis(5, 2, 1, 2, 9), axis(5, 2, 1, 2, 8)], [5, 4]),
        ([axis(3, 1, 2, 0, 9), axis(2, 3, 1, 0, 11)], [5, 4]),
        ([axis(2, 1, 1, 0, 3), axis(3, 1, 1, 1, 130)], [2, 130]),
    ];
    for product in [Product::U8S8, Product::U8S7, Product::F32] {
        for isa in isas(product).into_iter().filter(|isa| *isa != Isa::AmxInt8) {
            for channels in [2, 16, 40, 64, 101] {
                for (mut window, outputs) in windows {
                    window[1].pitch = channels * product.element();
                    window[0].pitch = window[1].extent * window[1].pitch;
                    run_strips(isa, product, window, outputs, channels);
                }
            }
        }
    }
}

/// A tile of 2 rows of 14 pixels by 32 channels over a kernel of 3 rows of 3 · 64 elements.
fn matrix_spec() -> TileSpec {
    let offsets = |row: i32, col: i32| (0..28).map(|i| i / 14 * row + i % 14 * col).collect();
    TileSpec {
        product: Product::U8S8,
        panel: 32,
        columns: 32,
        a_offsets: offsets(1024, 64),
        y_offsets: offsets(448, 32),
        r_offsets: vec![],
        g_offsets: vec![],
        loops: vec![(3, 1024)],
        inner: 48,
        start: Start::Params,
        epilogue: EpilogueForm::PackOnly,
        prefetch: Prefetch::default(),
        configured: 14,
        next: None,
    }
}

#[test]
fn matrix_tiles_are_of_few_instructions() {
    let code = emit_tile(Isa::AmxInt8, &matrix_spec()).unwrap();
    check_encoding(Isa::AmxInt8, &code);
    let instructions: Vec<_> = Decoder::new(64, &code, DecoderOptions::NONE).iter().collect();
    let count = |m: Mnemonic| instructions.iter().filter(|i| i.mnemonic() == m).count();
    // A body of three steps, each with two registers of pixels and two of weights.
    assert_eq!((count(Mnemonic::Tdpbusd), count(Mnemonic::Tileloadd)), (3 * 4, 3 * 4));
    assert_eq!((count(Mnemonic::Tilestored), count(Mnemonic::Ldtilecfg)), (4, 0));
    for i in instructions.iter().filter(|i| i.mnemonic() == Mnemonic::Tdpbusd) {
        let all = [i.op0_register(), i.op1_register(), i.op2_register()];
        // The CPU refuses equal registers.
        assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2], "{all:?}");
        assert!(all[0] <= Register::TMM3 && all[1] <= Register::TMM5 && all[2] >= Register::TMM6);
    }
    // A tile of another number of pixels sets up its own registers, and the step's again.
    let offsets: Vec<i32> = matrix_spec().a_offsets[..5].to_vec();
    let edge = TileSpec { a_offsets: offsets.clone(), y_offsets: offsets, ..matrix_spec() };
    let code = emit_tile(Isa::AmxInt8, &edge).unwrap();
    let loads = Decoder::new(64, &code, DecoderOptions::NONE)
        .into_iter()
        .filter(|i| i.mnemonic() == Mnemonic::Ldtilecfg);
    assert_eq!(loads.count(), 2);
}

#[test]
fn codes_of_a_tile_stand_between_the_products_of_the_next() {
    let spec = TileSpec { next: Some(Next { a: 2048, y: 896, ..Next::default() }), ..matrix_spec() };
    let code = emit_tile(Isa::AmxInt8, &spec).unwrap();
    let mnemonics: Vec<_> =
        Decoder::new(64, &code, DecoderOptions::NONE).iter().map(|i| i.mnemonic()).collect();
    let packs = |m: &[Mnemonic]| m.iter().filter(|m| **m == Mnemonic::Vpackuswb).count();
    let products: Vec<usize> = (0..mnemonics.len()).filter(|i| mnemonics[*i] == Mnemonic::Tdpbusd).collect();
    // Nine steps of four products behind the loop of the first tile, and half of the codes by the middle of them.
    assert_eq!(products.len(), 3 * 4 + 9 * 4);
    let groups = 28 / 2;
    assert_eq!(packs(&mnemonics[products[12]..products[12 + 18]]), groups / 2);
    assert_eq!(packs(&mnemonics), 2 * groups);
}

#[test]
fn what_matrix_registers_cannot_do_is_refused() {
    let refuse = |change: &dyn Fn(&mut TileSpec)| {
        let mut spec = matrix_spec();
        change(&mut spec);
        emit_tile(Isa::AmxInt8, &spec).unwrap_err()
    };
    let run_of_own_starts = |s: &mut TileSpec| (s.next, s.start) = (Some(Next::default()), Start::Weights);
    assert_eq!(refuse(&run_of_own_starts), EmitError::Run);
    assert_eq!(refuse(&|s| s.inner = 47), EmitError::Steps { inner: 47, step: 16 });
    assert_eq!(refuse(&|s| s.a_offsets[3] += 1), EmitError::Bands { pixels: 28, most: 2 });
    let float = Epilogue::Float { clamp: Clamp::NONE, residual: false };
    assert_eq!(refuse(&|s| s.product = Product::F32), EmitError::Panel { panel: 32, lanes: 16 });
    assert_eq!(refuse(&|s| s.epilogue = float.form()), EmitError::Epilogue(Product::U8S8));
}
