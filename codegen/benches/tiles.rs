//! Tiles alone, operands in cache: M = 1344 pixels, N = 64 channels, K = 576, by tile, tier and requantization mode.
//!
//! `cargo bench -p qcc-codegen --bench tiles [-- REGEX]`, of names such as
//! `avx512vnni/U8S8/qu8qs8_tile_12x32c4__avx512vnni_q15`. Criterion times them and remembers: the next run tells what has
//! changed, and `--save-baseline` and `--baseline` compare branches. An element is a multiply-accumulate. Behind each
//! stands its share of the peak, measured next to it, because the clock changes with the load of the whole machine.

#![allow(clippy::print_stdout, reason = "a benchmark's result is its table")]
#![allow(unsafe_code, reason = "calls emitted tiles")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qcc_codegen::{
    dense::{
        asm::{emit_enter, emit_leave, emit_tile, tile_name},
        pack::{PanelFormat, ParamLayout, pack_bias, pack_params, pack_weights},
        spec::{Epilogue, Prefetch, Product, SLACK, Start, TileSpec},
    },
    executable::Executable,
    peak,
    tier::{Isa, Tier},
};
use qcc_ir::{
    DType, OutputGrid,
    numerics::{ChannelBounds, RequantMode, Requantizer, ResidualInput},
    ops::Clamp,
};
use std::{
    error::Error,
    time::{Duration, Instant},
};

const M: usize = 1344;
const N: usize = 64;
const K: usize = 576;
type Failure = Box<dyn Error>;
type AroundFn = extern "sysv64" fn();
type TileFn = unsafe extern "sysv64" fn(*const u8, *const u8, *const u8, *mut u8, *const u8);

/// Tiles worth comparing: pixels × channels.
fn shapes(isa: Isa, product: Product) -> &'static [(usize, usize)] {
    match (isa, product) {
        (Isa::AmxInt8, _) => &[(32, 32), (28, 32), (64, 16), (16, 64), (14, 64), (56, 16), (14, 32)],
        (Isa::Avx512Vnni, _) => &[(14, 32), (12, 32), (6, 64), (4, 64), (28, 16), (9, 48)],
        (Isa::Avx2, Product::U8S8 | Product::U8S7) => &[(6, 16), (4, 16), (12, 8), (3, 24)],
        (Isa::AvxVnni | Isa::Avx2, _) => &[(6, 16), (4, 16), (4, 24), (12, 8), (2, 32)],
        (Isa::XmmVnni | Isa::Xmm, _) => &[],
    }
}

fn requantizer(mode: RequantMode, residual: bool) -> Result<Requantizer, Failure> {
    let grid = OutputGrid { dtype: DType::U8, scale: 1.0, zero_point: 100, lo: 0, hi: 255 };
    let residual = residual.then_some(ResidualInput { factor: 0.7, zero_point: 90 });
    let bounds = [ChannelBounds { min: -10_000_000, max: 10_000_000 }; N];
    let factors: Vec<f64> = (0..N)
        .map(|c| {
            if mode == RequantMode::Pow2 {
                2f64.powi(-10 - (c % 3) as i32)
            } else {
                1e-3 / (1 + c % 7) as f64
            }
        })
        .collect();
    Ok(Requantizer::new(mode, &factors, grid, residual, &bounds)?)
}

/// A tile with its operands.
struct Bench {
    name: String,
    code: Executable,
    /// What configures matrix registers and releases them, where the tile uses them.
    around: Option<[Executable; 2]>,
    /// Operands, weights and parameters, residual, result; aligned as the compiler aligns them, so that lines are not
    /// split.
    a: Aligned,
    weights: Aligned,
    params: Aligned,
    r: Aligned,
    y: Aligned,
    panels: usize,
    tiles: usize,
    /// Bytes: from one panel's weights and parameters to the next, from one tile's operands to the next, and from one
    /// tile or panel of the result to the next.
    weight_panel: usize,
    param_panel: usize,
    a_tile: usize,
    y_tile: usize,
    y_panel: usize,
    /// Multiply-accumulates of a pass.
    macs: u64,
}

/// Bytes from an address that is a multiple of 64, with room behind.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(bytes: &[u8], slack: usize) -> Aligned {
        let mut buffer = vec![0u8; bytes.len() + slack + 64];
        let start = buffer.as_ptr().align_offset(64);
        buffer[start..start + bytes.len()].copy_from_slice(bytes);
        Aligned { bytes: buffer, start }
    }

    fn first(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }
}

/// Makes one tile for the whole product.
fn prepare(
    isa: Isa,
    (mr, nr): (usize, usize),
    product: Product,
    epilogue: Epilogue,
) -> Result<Bench, Failure> {
    let format = PanelFormat::new(product, isa, nr);
    let (element, wide) = (product.element(), N.div_ceil(nr) * nr);
    let residual = epilogue.form().has_residual();
    // The first number of bands that holds the pixels evenly.
    let configured = match isa {
        Isa::AmxInt8 => mr / mr.div_ceil(16),
        _ => 0,
    };
    let rows = |pitch: usize| -> Vec<i32> { (0..mr).map(|i| (i * pitch * element) as i32).collect() };
    let a_element = format.activation_bytes();
    let spec = TileSpec {
        product,
        panel: nr,
        columns: nr,
        a_offsets: (0..mr).map(|i| (i * K * a_element) as i32).collect(),
        y_offsets: rows(wide),
        r_offsets: if residual { rows(wide) } else { vec![] },
        g_offsets: vec![],
        loops: vec![],
        inner: (K / product.group()) as u32,
        start: Start::Params,
        epilogue: epilogue.form(),
        prefetch: Prefetch::default(),
        configured,
        next: None,
    };
    let layout = ParamLayout::new(format, spec.epilogue);
    let weight = |c: usize, i: usize| match product {
        Product::U8S7 => ((c * 37 + i * 11) % 129) as i8 - 64,
        _ => ((c * 37 + i * 11) % 255) as u8 as i8,
    };
    let (weights, params) = match product {
        Product::U8S8 | Product::U8S7 => (
            pack_weights(format, 0..N, 1, K, |c, _, i| weight(c, i)),
            match epilogue {
                Epilogue::Requantize(q) => pack_params(format, Some(q), 0..N, &[1000; N]),
                _ => pack_params(format, None, 0..N, &[1000; N]),
            },
        ),
        Product::F32 => (
            pack_weights(format, 0..N, 1, K, |c, _, i| (c * 37 + i) as f32 * 1e-3),
            pack_bias(format, Clamp::RELU, 0..N, &[0.5; N]),
        ),
    };
    let activations: Vec<u8> =
        (0..M * K * a_element).map(|i| if a_element == 1 { (i * 31) as u8 } else { 0 }).collect();
    let (panels, tiles) = (N.div_ceil(nr), M / mr);
    let around = match isa {
        Isa::AmxInt8 => Some([Executable::new(&emit_enter(configured)?)?, Executable::new(&emit_leave()?)?]),
        _ => None,
    };
    Ok(Bench {
        name: tile_name(isa, &spec),
        code: Executable::new(&emit_tile(isa, &spec)?)?,
        around,
        a: Aligned::new(&activations, SLACK),
        weights: Aligned::new(&weights, 0),
        params: Aligned::new(&params, 0),
        r: Aligned::new(&vec![0u8; M * wide * element], SLACK),
        y: Aligned::new(&vec![0u8; M * wide * element], 0),
        panels,
        tiles,
        weight_panel: format.weight_bytes(K / product.group()),
        param_panel: layout.size,
        a_tile: mr * K * a_element,
        y_tile: mr * wide * element,
        y_panel: nr * element,
        macs: (panels * nr * tiles * mr * K) as u64,
    })
}

impl Bench {
    fn pass(&mut self) {
        // SAFETY: the code is a tile of this signature; it is only reached for tiers of this CPU.
        let tile: TileFn = unsafe { std::mem::transmute(self.code.entry()) };
        let operands = [&mut self.a, &mut self.weights, &mut self.params, &mut self.y, &mut self.r];
        let [a, weights, params, y, r] = operands.map(Aligned::first);
        // SAFETY: functions of this signature; they too are only reached for tiers of this CPU.
        let around = self.around.as_ref().map(|all| {
            [&all[0], &all[1]].map(|f| unsafe { std::mem::transmute::<*const u8, AroundFn>(f.entry()) })
        });
        if let Some([enter, _]) = around {
            enter();
        }
        for panel in 0..self.panels {
            for i in 0..self.tiles {
                let out = i * self.y_tile + panel * self.y_panel;
                // SAFETY: every buffer covers the tiles of the loop, with slack where tiles read beyond.
                unsafe {
                    tile(
                        a.add(i * self.a_tile),
                        weights.add(panel * self.weight_panel),
                        params.add(panel * self.param_panel),
                        y.add(out),
                        r.add(out),
                    );
                }
            }
        }
        if let Some([_, leave]) = around {
            leave();
        }
    }
}

/// The epilogues that a tile is timed with. All modes for the first tiles, which are the usual ones.
fn with_epilogues(
    product: Product,
    index: usize,
    report: &mut dyn FnMut(Epilogue) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if product == Product::F32 {
        return report(Epilogue::Float { clamp: Clamp::RELU, residual: false });
    }
    report(Epilogue::PackOnly)?;
    let modes = if index < 3 { RequantMode::ALL.as_slice() } else { &[RequantMode::Q15] };
    for &mode in modes {
        report(Epilogue::Requantize(&requantizer(mode, false)?))?;
        if index == 0 {
            report(Epilogue::Requantize(&requantizer(mode, true)?))?;
        }
    }
    Ok(())
}

fn tiles(criterion: &mut Criterion) {
    for tier in Tier::available() {
        for product in [Product::U8S8, Product::U8S7, Product::F32] {
            let Some(isa) = tier.isas(product).next() else { continue };
            // The vector form of a tier with a matrix form is that of the tier below.
            if tier.matrix.is_some_and(|own| own != isa) {
                continue;
            }
            let mut group = criterion.benchmark_group(format!("{tier}/{product:?}"));
            for (i, &shape) in shapes(isa, product).iter().enumerate() {
                with_epilogues(product, i, &mut |epilogue| {
                    let mut bench = prepare(isa, shape, product, epilogue)?;
                    let name = bench.name.clone();
                    let (macs, mut best) = (bench.macs, Duration::MAX);
                    group.throughput(Throughput::Elements(macs));
                    group.bench_function(&name, |b| {
                        b.iter_custom(|passes| {
                            let start = Instant::now();
                            (0..passes).for_each(|_| bench.pass());
                            let time = start.elapsed();
                            best = best.min(time.div_f64(passes as f64));
                            time
                        });
                    });
                    // Not where a filter left it out.
                    if best < Duration::MAX {
                        let peak = peak::measure(tier, product)?;
                        let speed = macs as f64 / best.as_secs_f64() / 1e9;
                        let share = 100.0 * speed / peak;
                        println!("{name}: at best {speed:.1} of {peak:.1} GMAC/s, {share:.1} % of the peak");
                    }
                    Ok(())
                })
                .expect("tiles of this CPU can be emitted and mapped");
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = all;
    // Tiles take some ten microseconds: half a second has samples enough.
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .without_plots();
    targets = tiles
}
criterion_main!(all);
