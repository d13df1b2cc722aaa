//! Dense microkernels in machine code: 512-bit and 256-bit tiles, and those of matrix registers, assembled for one
//! [`TileSpec`] each.
//!
//! A tile keeps MR pixels × NR channels of accumulators in registers: accumulator (pixel, vector) is register
//! pixel·vectors + vector. The registers behind them are temporaries: weights and activations while the tile sums
//! ([`accumulate`]), then those of the epilogue ([`requantize`], [`store`]). Everything that is known when the
//! tile is emitted (strides, trip counts, zero tests of constants) is part of the code; the code has no addresses.
//!
//! Arguments stay where the calling convention puts them: a = rdi, w = rsi, params = rdx, y = rcx, r = r8. Loops
//! count in rax, r9, r10 and r11, so nothing has to be saved. Tiles of matrix registers ([`matrix`]) differ in the sum:
//! their accumulators reach the registers of the epilogue through the stack.

mod accumulate;
mod depthwise;
mod dequantize;
mod matrix;
mod requantize;
mod run;
mod store;
pub(crate) mod vector;

#[cfg(test)]
mod tests;

use super::{
    pack::{PanelFormat, ParamLayout},
    spec::{EpilogueForm, Product, Start, TileSpec},
};
use crate::tier::Isa;
pub(crate) use depthwise::emit_strip;
use iced_x86::{
    IcedError,
    code_asm::{AsmMemoryOperand, AsmRegister64, rdx, rsi},
};
use matrix::Bands;
pub(crate) use matrix::configure;
use qcc_ir::DType;
pub(crate) use run::MOST_STEPS;
pub(crate) use vector::Reg;
use vector::{Assembler, Width};

/// Why a tile cannot be emitted. All but `Assembler` are a matter of asking for another tile.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EmitError {
    /// The tier's tiles are Cranelift's.
    #[error("{isa:?} tiles are not emitted as machine code; use the Cranelift tile")]
    Isa {
        /// The tier's instruction set.
        isa: Isa,
    },
    /// Not 1 to 4 vectors.
    #[error("a panel of {panel} channels is not 1 to 4 vectors of {lanes}")]
    Panel {
        /// NR.
        panel: usize,
        /// 32-bit lanes of a vector.
        lanes: usize,
    },
    /// Groups that are no whole steps.
    #[error("runs of {inner} groups are not padded to steps of {step}")]
    Steps {
        /// Groups of a run.
        inner: u32,
        /// Groups of a step.
        step: usize,
    },
    /// Pixels that are not in a few bands.
    #[error("the offsets of {pixels} pixels are not those of at most {most} bands of 16")]
    Bands {
        /// MR.
        pixels: usize,
        /// Bands that the registers hold.
        most: usize,
    },
    /// A run of tiles of another form.
    #[error("runs of tiles are those of matrix registers, with starts among the constants of a panel")]
    Run,
    /// No columns or more than the panel has.
    #[error("{columns} columns of a panel of {panel}")]
    Columns {
        /// Channels to store.
        columns: usize,
        /// NR.
        panel: usize,
    },
    /// No pixels or more than the registers hold.
    #[error("{pixels} pixels by {panel} channels do not fit the registers, which hold 1 to {most} pixels")]
    Pixels {
        /// MR.
        pixels: usize,
        /// NR.
        panel: usize,
        /// What [`max_pixels`] says.
        most: usize,
    },
    /// Offsets that do not match the pixels.
    #[error("{found} {what} offsets for {expected} pixels")]
    Offsets {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there must be.
        expected: usize,
    },
    /// A sum over nothing.
    #[error("the tile sums over no elements; write the bias instead")]
    EmptySum,
    /// More nested loops than counters.
    #[error("{0} nested loops over K, more than 3; merge runs that are contiguous")]
    Loops(usize),
    /// An epilogue of another product.
    #[error("the epilogue does not fit a {0:?} product")]
    Epilogue(Product),
    /// Codes that are not u8.
    #[error("results of type {0} are not written by dense tiles; shift the grid by 128 to u8")]
    Grid(DType),
    /// A displacement that x86 cannot encode.
    #[error("a tile spans more than 2 GiB")]
    Displacement,
    /// The assembler refused an instruction: a defect of the emitter.
    #[error("the assembler refused an instruction: {0}")]
    Assembler(String),
}

impl From<IcedError> for EmitError {
    fn from(error: IcedError) -> EmitError {
        EmitError::Assembler(error.to_string())
    }
}

/// Vectors in the widest panel.
const MAX_VECTORS: usize = 4;

/// The most pixels of a tile with panels of `panel` channels; 0 where the tier or the panel is not emitted.
pub fn max_pixels(isa: Isa, product: Product, panel: usize) -> usize {
    let registers = match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => 32,
        Isa::AvxVnni | Isa::Avx2 => 16,
        Isa::XmmVnni | Isa::Xmm => return 0,
    };
    let format = PanelFormat::new(product, isa, panel);
    let vectors = format.vectors();
    if !(1..=MAX_VECTORS).contains(&vectors) || !panel.is_multiple_of(format.lanes()) {
        return 0;
    }
    if isa == Isa::AmxInt8 {
        return if product == Product::U8S8 { matrix::max_pixels(vectors) } else { 0 };
    }
    if product == Product::U8S7 && isa.has_dot_product() {
        return 0;
    }
    let summing = match (product, isa.has_dot_product()) {
        // An activation, its product, and ones; weights come from memory.
        (Product::U8S7, _) => 3,
        // The weights of a group, an activation and its product.
        (Product::U8S8, false) => vectors + 2,
        _ => vectors + 1,
    };
    let epilogue = match product.is_of_codes() {
        true => requantize::TEMPORARIES,
        false => store::FLOAT_TEMPORARIES,
    };
    (registers - summing.max(epilogue)) / vectors
}

/// The tile's name after XNNPACK's convention: types, shape, elements of a group, tier, epilogue.
pub fn tile_name(isa: Isa, spec: &TileSpec) -> String {
    let (mr, nr) = (spec.pixels(), spec.panel);
    let shape = match spec.product {
        Product::U8S8 | Product::U8S7 => {
            let step = 4 * PanelFormat::new(spec.product, isa, nr).step_groups();
            let weights = if spec.product == Product::U8S7 { "s7" } else { "s8" };
            format!("qu8{weights}_gemm_{mr}x{nr}c{step}__{isa}")
        }
        Product::F32 => format!("f32_gemm_{mr}x{nr}__{isa}"),
    };
    let residual = if spec.r_offsets.is_empty() { "" } else { "_add" };
    match spec.epilogue {
        EpilogueForm::Requantize(q) => format!("{shape}_{}{residual}", q.mode()),
        EpilogueForm::PackOnly => format!("{shape}_packonly"),
        EpilogueForm::Dequantize { .. } => format!("{shape}_f32{residual}"),
        EpilogueForm::Float { lo: false, hi: false, .. } => format!("{shape}{residual}"),
        EpilogueForm::Float { .. } => format!("{shape}_minmax{residual}"),
    }
}

/// Assembles one tile as a position-independent function of the ABI in [`spec`](super::spec).
///
/// The weights and parameters it reads are those of [`pack`](super::pack) for
/// `PanelFormat::new(spec.product, isa, spec.panel)` with the results of its epilogue.
pub fn emit_tile(isa: Isa, spec: &TileSpec) -> Result<Vec<u8>, EmitError> {
    let tile = Tile::new(isa, spec)?;
    let mut asm = Assembler::new(tile.width())?;
    if let Some(bands) = &tile.bands {
        matrix::begin(&mut asm, &tile, bands)?;
    }
    match (&tile.bands, spec.next) {
        (Some(bands), Some(next)) => run::emit(&mut asm, &tile, bands, next)?,
        (bands, _) => {
            accumulate::emit(&mut asm, &tile)?;
            if let Some(bands) = bands {
                matrix::spill(&mut asm, &tile, bands)?;
            }
            match spec.epilogue {
                EpilogueForm::Float { .. } => store::floats(&mut asm, &tile)?,
                _ => store::sums_of_codes(&mut asm, &tile)?,
            }
        }
    }
    if let Some(bands) = &tile.bands {
        matrix::end(&mut asm, &tile, bands)?;
    }
    Ok(asm.finish()?)
}

/// Assembles `extern "sysv64" fn()`, which configures matrix registers for tiles whose
/// [`configured`](TileSpec::configured) is `rows`, on the thread that calls it.
pub fn emit_enter(rows: usize) -> Result<Vec<u8>, EmitError> {
    let mut asm = Assembler::new(Width::Zmm)?;
    matrix::enter(&mut asm, rows)?;
    Ok(asm.finish()?)
}

/// Assembles `extern "sysv64" fn()`, which releases matrix registers: a thread without any is cheaper to switch.
pub fn emit_leave() -> Result<Vec<u8>, EmitError> {
    let mut asm = Assembler::new(Width::Zmm)?;
    asm.asm.tilerelease()?;
    Ok(asm.finish()?)
}

/// Rows of the bands of a tile by `vectors` vectors whose pixels are `runs` of one stride each; `None` where the matrix
/// registers do not hold them. A tile that is called with these rows [`configured`](TileSpec::configured) need not
/// configure its own.
pub(crate) fn band_rows(runs: &[usize], vectors: usize, configured: usize) -> Option<usize> {
    matrix::band_rows(runs, matrix::max_bands(vectors), configured)
}

/// A checked specification with what the emitters derive from it.
struct Tile<'a> {
    spec: &'a TileSpec,
    format: PanelFormat,
    layout: ParamLayout,
    /// How matrix registers hold the pixels; `None` where vectors do.
    bands: Option<Bands>,
    /// Whether it is a block of a depthwise strip: the stack pointer has moved, as in tiles of matrix registers, and sums are in the
    /// order of codes whatever they become.
    is_strip: bool,
}

impl<'a> Tile<'a> {
    fn new(isa: Isa, spec: &'a TileSpec) -> Result<Tile<'a>, EmitError> {
        let format = PanelFormat::new(spec.product, isa, spec.panel).with_results(spec.epilogue);
        let (pixels, panel) = (spec.pixels(), spec.panel);
        if matches!(isa, Isa::XmmVnni | Isa::Xmm) {
            return Err(EmitError::Isa { isa });
        }
        let most = max_pixels(isa, spec.product, panel);
        if most == 0 {
            return Err(EmitError::Panel { panel, lanes: format.lanes() });
        }
        if !(1..=most).contains(&pixels) {
            return Err(EmitError::Pixels { pixels, panel, most });
        }
        if !(1..=panel).contains(&spec.columns) {
            return Err(EmitError::Columns { columns: spec.columns, panel });
        }
        match (spec.product, spec.epilogue) {
            (Product::U8S8 | Product::U8S7, EpilogueForm::Requantize(q)) if q.dtype != DType::U8 => {
                return Err(EmitError::Grid(q.dtype));
            }
            (
                Product::U8S8 | Product::U8S7,
                EpilogueForm::Requantize(_) | EpilogueForm::PackOnly | EpilogueForm::Dequantize { .. },
            )
            | (Product::F32, EpilogueForm::Float { .. }) => {}
            (product, _) => return Err(EmitError::Epilogue(product)),
        }
        if spec.next.is_some() && (isa != Isa::AmxInt8 || spec.start == Start::Weights) {
            return Err(EmitError::Run);
        }
        let has_residual = spec.epilogue.has_residual();
        // Timing without requantization may leave the offsets of a residual in place.
        let needs_residuals = has_residual || spec.epilogue != EpilogueForm::PackOnly;
        let offsets = |what, found, expected| {
            if found == expected { Ok(()) } else { Err(EmitError::Offsets { what, found, expected }) }
        };
        offsets("result", spec.y_offsets.len(), pixels)?;
        if needs_residuals {
            offsets("residual", spec.r_offsets.len(), if has_residual { pixels } else { 0 })?;
        }
        let has_grids = spec.epilogue.grids().has_scales();
        offsets("grid", spec.g_offsets.len(), if has_grids { pixels } else { 0 })?;
        if spec.groups() == 0 {
            return Err(EmitError::EmptySum);
        }
        if !(spec.inner as usize).is_multiple_of(format.step_groups()) {
            return Err(EmitError::Steps { inner: spec.inner, step: format.step_groups() });
        }
        let bands = match isa {
            Isa::AmxInt8 => {
                let most = matrix::max_bands(format.vectors());
                let bands = Bands::of(&spec.a_offsets, most, spec.configured);
                Some(bands.ok_or(EmitError::Bands { pixels, most })?)
            }
            _ => None,
        };
        let layout = ParamLayout::new(format, spec.epilogue);
        Ok(Tile { spec, format, layout, bands, is_strip: false })
    }

    fn width(&self) -> Width {
        if self.format.vector_bytes() == 64 { Width::Zmm } else { Width::Ymm }
    }

    /// Pixels whose accumulators are in vector registers at a time: all, or those that are narrowed together.
    fn resident(&self) -> usize {
        match self.bands {
            Some(_) => 4 / self.format.vectors(),
            None => self.spec.pixels(),
        }
    }

    /// The accumulator of a pixel and a vector of the panel.
    fn accumulator(&self, pixel: usize, vector: usize) -> Reg {
        Reg(pixel % self.resident() * self.format.vectors() + vector)
    }

    /// Vectors of the panel that hold channels which are stored.
    fn stored_vectors(&self) -> usize {
        self.spec.columns.div_ceil(self.format.lanes())
    }

    /// The i-th register that is no accumulator.
    fn temporary(&self, i: usize) -> Reg {
        Reg(self.resident() * self.format.vectors() + i)
    }

    /// Registers that are no accumulators.
    fn temporaries(&self) -> usize {
        let registers = if self.width() == Width::Zmm { 32 } else { 16 };
        registers - self.resident() * self.format.vectors()
    }

    /// What the accumulators of vector `v` of the panel start from, while rsi stands before the panel's weights.
    fn start(&self, v: usize) -> AsmMemoryOperand {
        match self.spec.start {
            Start::Params => self.param(self.layout.bias, v),
            Start::Weights => rsi + (v * self.format.vector_bytes()) as i32,
        }
    }

    /// Vector `i` of the parameter region at `offset`.
    fn param(&self, offset: usize, i: usize) -> AsmMemoryOperand {
        rdx + (offset + i * self.format.vector_bytes()) as i32
    }
}

/// `base + a + b`, or an error where the sum is no 32-bit displacement.
fn displaced(base: AsmRegister64, a: i32, b: usize) -> Result<AsmMemoryOperand, EmitError> {
    Ok(base + displacement(a, b)?)
}

/// `a + b` as 32 bits.
fn displacement(a: i32, b: usize) -> Result<i32, EmitError> {
    i32::try_from(b).ok().and_then(|b| a.checked_add(b)).ok_or(EmitError::Displacement)
}
