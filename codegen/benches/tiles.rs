//! Tiles alone, operands in cache: M = 168 pixels, N = 64 channels, K = 576, by tile, tier and requantization mode.
//!
//! `cargo bench -p qcc-codegen --bench tiles [name part]`

#![allow(clippy::print_stdout, reason = "a benchmark's result is its table")]
#![allow(unsafe_code, reason = "calls emitted tiles")]

use qcc_codegen::{
    dense::{
        asm::{emit_enter, emit_leave, emit_tile, tile_name},
        pack::{PanelFormat, ParamLayout, pack_bias, pack_params, pack_weights},
        spec::{Epilogue, Product, SLACK, TileSpec},
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
use std::{error::Error, time::Instant};

const M: usize = 1344;
const N: usize = 64;
const K: usize = 576;
/// Rounds of one tile; each measures the peak anew, because the clock changes with the load of the whole machine.
const ROUNDS: usize = 5;
/// The fastest of so many repetitions in a round counts.
const REPETITIONS: usize = 500;

type AroundFn = extern "sysv64" fn();
type TileFn = unsafe extern "sysv64" fn(*const u8, *const u8, *const u8, *mut u8, *const u8);

/// Tiles worth comparing: pixels × channels.
fn shapes(isa: Isa, product: Product) -> &'static [(usize, usize)] {
    match (isa, product) {
        (Isa::AmxInt8, _) => &[(32, 32), (28, 32), (64, 16), (16, 64), (14, 64), (56, 16), (14, 32)],
        (Isa::Avx512Vnni, _) => &[(14, 32), (12, 32), (6, 64), (4, 64), (28, 16), (9, 48)],
        (Isa::Avx2, Product::U8S8) => &[(6, 16), (4, 16), (12, 8), (3, 24)],
        (Isa::AvxVnni | Isa::Avx2, _) => &[(6, 16), (4, 16), (4, 24), (12, 8), (2, 32)],
        (Isa::XmmVnni | Isa::Xmm, _) => &[],
    }
}

fn requantizer(mode: RequantMode, residual: bool) -> Result<Requantizer, Box<dyn Error>> {
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

/// What was measured of a tile.
struct Report {
    name: String,
    /// Of code.
    bytes: usize,
    /// GMAC/s in the best round.
    best: f64,
    /// Median over the rounds of the part of the peak.
    of_peak: f64,
}

/// One tile over the whole product.
fn measure(
    tier: &Tier,
    isa: Isa,
    (mr, nr): (usize, usize),
    product: Product,
    epilogue: Epilogue,
) -> Result<Report, Box<dyn Error>> {
    let format = PanelFormat { product, isa, panel: nr };
    let (element, wide) = (product.element(), N.div_ceil(nr) * nr);
    let residual = match &epilogue {
        Epilogue::Requantize(q) => q.has_residual,
        Epilogue::PackOnly => false,
        Epilogue::Float { residual, .. } => *residual,
    };
    // The first number of bands that holds the pixels evenly.
    let configured = match isa {
        Isa::AmxInt8 => mr / mr.div_ceil(16),
        _ => 0,
    };
    let rows = |pitch: usize| -> Vec<i32> { (0..mr).map(|i| (i * pitch * element) as i32).collect() };
    let spec = TileSpec {
        product,
        panel: nr,
        columns: nr,
        a_offsets: rows(K),
        y_offsets: rows(wide),
        r_offsets: if residual { rows(wide) } else { vec![] },
        loops: vec![],
        inner: (K / product.group()) as u32,
        epilogue,
        configured,
    };
    let bytes = emit_tile(isa, &spec)?;
    let code = Executable::new(&bytes)?;
    let layout = ParamLayout::new(format, &spec.epilogue);
    let (weights, params) = match product {
        Product::U8S8 => (
            pack_weights(format, 0..N, 1, K, |c, _, i| ((c * 37 + i * 11) % 255) as u8 as i8),
            match &spec.epilogue {
                Epilogue::Requantize(q) => pack_params(format, Some(q), 0..N, &[1000; N]),
                _ => pack_params(format, None, 0..N, &[1000; N]),
            },
        ),
        Product::F32 => (
            pack_weights(format, 0..N, 1, K, |c, _, i| (c * 37 + i) as f32 * 1e-3),
            pack_bias(format, Clamp::RELU, 0..N, &[0.5; N]),
        ),
    };
    // Aligned as the compiler aligns them, so that lines are not split.
    let aligned = |bytes: &[u8], slack: usize| -> (Vec<u8>, usize) {
        let mut buffer = vec![0u8; bytes.len() + slack + 64];
        let start = buffer.as_ptr().align_offset(64);
        buffer[start..start + bytes.len()].copy_from_slice(bytes);
        (buffer, start)
    };
    let (weights, w_at) = aligned(&weights, 0);
    let (params, p_at) = aligned(&params, 0);
    let activations: Vec<u8> =
        (0..M * K * element).map(|i| if element == 1 { (i * 31) as u8 } else { 0 }).collect();
    let (a, a_at) = aligned(&activations, SLACK);
    let (r, r_at) = aligned(&vec![0u8; M * wide * element], SLACK);
    let (mut y, y_at) = aligned(&vec![0u8; M * wide * element], 0);
    let (panels, tiles) = (N.div_ceil(nr), M / mr);
    let around = [emit_enter(configured)?, emit_leave()?];
    let around = [Executable::new(&around[0])?, Executable::new(&around[1])?];
    // SAFETY: functions of this signature; they are only called for tiers of this CPU.
    let [enter, leave] = [&around[0], &around[1]]
        .map(|code| unsafe { std::mem::transmute::<*const u8, AroundFn>(code.entry()) });
    // SAFETY: the code is a tile of this signature; it is only reached for tiers of this CPU.
    let tile: TileFn = unsafe { std::mem::transmute(code.entry()) };
    let mut pass = || {
        for (panel, i) in (0..panels).flat_map(|p| (0..tiles).map(move |i| (p, i))) {
            let (row, column) = (i * mr, panel * nr * element);
            let out = row * wide * element + column;
            // SAFETY: every buffer covers the tiles of the loop, with slack where tiles read beyond.
            unsafe {
                tile(
                    a.as_ptr().add(a_at + row * K * element),
                    weights.as_ptr().add(w_at + panel * format.weight_bytes(K / product.group())),
                    params.as_ptr().add(p_at + panel * layout.size),
                    y.as_mut_ptr().add(y_at + out),
                    r.as_ptr().add(r_at + out),
                );
            }
        }
    };
    let macs = (panels * nr * tiles * mr * K) as f64;
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        let peak = peak::measure(tier, product)?;
        let seconds = |_| {
            let start = Instant::now();
            pass();
            start.elapsed().as_secs_f64()
        };
        if configured > 0 {
            enter();
        }
        let speed = macs / (0..REPETITIONS).map(seconds).fold(f64::INFINITY, f64::min) / 1e9;
        if configured > 0 {
            leave();
        }
        rounds.push((speed / peak, speed));
    }
    rounds.sort_by(|x, y| x.0.total_cmp(&y.0));
    Ok(Report {
        name: tile_name(isa, &spec),
        bytes: bytes.len(),
        best: rounds.iter().map(|r| r.1).fold(0.0, f64::max),
        of_peak: rounds[ROUNDS / 2].0,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("{:<48} {:>6} {:>9} {:>7}", "tile", "bytes", "GMAC/s", "% peak");
    for tier in Tier::available() {
        for product in [Product::U8S8, Product::F32] {
            // Float tiles of a tier with a matrix form are those of the tier below.
            let Some(isa) = tier.isas(product).next().filter(|&isa| tier.matrix.is_none_or(|own| own == isa))
            else {
                continue;
            };
            let shapes = shapes(isa, product);
            if shapes.is_empty() {
                continue;
            }
            println!("peak of {tier} {product:?}: {:.1} GMAC/s", peak::measure(tier, product)?);
            let report = |shape, epilogue: Epilogue| -> Result<(), Box<dyn Error>> {
                let r = measure(tier, isa, shape, product, epilogue)?;
                if r.name.contains(&filter) {
                    println!("{:<48} {:>6} {:>9.1} {:>7.1}", r.name, r.bytes, r.best, 100.0 * r.of_peak);
                }
                Ok(())
            };
            for (i, &shape) in shapes.iter().enumerate() {
                if product == Product::F32 {
                    report(shape, Epilogue::Float { clamp: Clamp::RELU, residual: false })?;
                    continue;
                }
                report(shape, Epilogue::PackOnly)?;
                let modes = if i < 3 { RequantMode::ALL.as_slice() } else { &[RequantMode::Q15] };
                for &mode in modes {
                    report(shape, Epilogue::Requantize(&requantizer(mode, false)?))?;
                    if i == 0 {
                        report(shape, Epilogue::Requantize(&requantizer(mode, true)?))?;
                    }
                }
            }
        }
    }
    Ok(())
}
