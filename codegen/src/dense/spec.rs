//! What one dense microkernel computes: the contract between drivers, packers and the two emitters.
//!
//! A convolution or matrix product is cut into *tiles* of MR result pixels × NR channels. One tile is one call
//!
//! ```text
//! extern "sysv64" fn tile(a: *const u8, w: *const u8, params: *const u8, y: *mut u8, r: *const u8, at: u64, g: *const u8)
//! ```
//!
//! * `a`: the first tap of the tile's first pixel; pixel i reads from `a + a_offsets[i]`. Elements are as wide as
//!   [`PanelFormat::activation_bytes`](super::pack::PanelFormat::activation_bytes) says,
//! * `w`: the weights of one panel (NR channels), packed by [`pack`](super::pack), behind what accumulators
//!   [start](Start) from if that is not in `params`,
//! * `params`: the panel's epilogue constants (bias, multipliers…), packed likewise,
//! * `y`: the first channel of the panel of the tile's first pixel; pixel i writes to `y + y_offsets[i]`,
//! * `r`: the same for the residual, with `r_offsets`; anything where none is fused,
//! * `at`: of depthwise strips, row | column << 32 of the first pixel in the image of results; of matrix forms, how many
//!   tiles of the panel have been computed before, which tells what they [prefetch](Prefetch::next_weights), and << 32 how
//!   many tiles this call computes: a tile that says where the [next](TileSpec::next) one is computes a run of them, of
//!   which each is multiplied while the one before is finished,
//! * `g`: where rows of activations have grids that are known at run time, that of the tile's first pixel, a [`RowGrid`];
//!   pixel i has the one at `g + g_offsets[i]`. Anything where they have not.
//!
//! The sum over K runs through `loops` (outer to inner) of contiguous runs of `inner` groups: a group is 4 codes
//! of an int8 product and 1 number of a float one. A run whose length is no multiple of a group reads beyond its end:
//! up to 3 bytes, and up to 63 where matrix instructions take whole steps of 64. The weights of these bytes are zero, so
//! what they hold does not matter, only that they can be read. Likewise
//! loads of residuals may read up to 63 bytes beyond the last channel: every buffer that a tile reads has at
//! least [`SLACK`] readable bytes behind it. Stores never go beyond `columns` channels.
//!
//! Matrix forms take the pixels in up to 4 *bands* of at most 16 pixels at one stride: `a_offsets` must be so. The
//! registers that hold pixels have as many rows as a band; the step configures them once
//! ([`emit_enter`](super::asm::emit_enter)) before its first tile and releases them behind its last.

use qcc_ir::{
    DType,
    numerics::{Dequantizer, RequantMode, Requantizer, Rescale},
    ops::Clamp,
};

/// Readable bytes behind every buffer that a tile reads.
pub const SLACK: usize = 64;

/// The grid of a row of activations, as tiles read it: an f32 scale, and behind it an s32 zero point.
pub struct RowGrid;

impl RowGrid {
    /// Bytes of one.
    pub const BYTES: usize = 8;
    /// Byte offset of the zero point.
    pub const ZERO_POINT: usize = 4;
}

/// The element types of a product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Product {
    /// u8 activations by s8 weights into s32.
    U8S8,
    /// The same of weights of which the two that an instruction sums in 16 bits never leave them:
    /// [`is_in_16_bits`](Product::is_in_16_bits). Weights of 7 bits, −64 to 64, are such. CPUs without a fused dot product
    /// multiply them faster.
    U8S7,
    /// f32 by f32.
    F32,
}

impl Product {
    /// Elements of K that one step of the innermost loop takes.
    pub fn group(self) -> usize {
        match self {
            Product::U8S8 | Product::U8S7 => 4,
            Product::F32 => 1,
        }
    }

    /// Bytes of an activation element.
    pub fn element(self) -> usize {
        match self {
            Product::U8S8 | Product::U8S7 => 1,
            Product::F32 => 4,
        }
    }

    /// Whether it is one of codes, summed in s32.
    pub fn is_of_codes(self) -> bool {
        matches!(self, Product::U8S8 | Product::U8S7)
    }

    /// Whether the products of two weights with any u8 activations have a sum within 16 bits. It is largest where the
    /// activations of positive weights are 255 and those of negative ones 0, and smallest the other way round.
    pub fn is_in_16_bits(weights: [i8; 2]) -> bool {
        let sum = |part: fn(i32) -> i32| weights.iter().map(|&w| 255 * part(w.into())).sum::<i32>();
        sum(|w| w.max(0)) <= i16::MAX.into() && sum(|w| w.min(0)) >= i16::MIN.into()
    }
}

/// What happens to the accumulators.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// To codes, by the one definition.
    Requantize(&'a Requantizer),
    /// Narrowed to 8 bits as they are. Wrong results, right timing: the difference to `Requantize` is its price.
    PackOnly,
    /// Sums of codes to floats, by the one definition.
    Dequantize {
        /// The constants.
        dequantizer: &'a Dequantizer,
        /// What is known of the first operand when the code runs only.
        grids: RunTimeGrids,
        /// Whether a residual is added.
        residual: bool,
    },
    /// Floats: residual added, then clamped, then stored.
    Float {
        /// Bounds.
        clamp: Clamp,
        /// Whether a residual is added.
        residual: bool,
    },
}

impl Epilogue<'_> {
    /// What assembled code depends on.
    pub fn form(&self) -> EpilogueForm {
        match self {
            Epilogue::Requantize(q) => EpilogueForm::Requantize(RequantizeForm::of(q)),
            Epilogue::PackOnly => EpilogueForm::PackOnly,
            Epilogue::Dequantize { dequantizer, grids, residual } => EpilogueForm::Dequantize {
                grids: *grids,
                bias: dequantizer.bias.is_some(),
                lo: dequantizer.clamp.lo > f32::NEG_INFINITY,
                hi: dequantizer.clamp.hi < f32::INFINITY,
                residual: *residual,
            },
            Epilogue::Float { clamp, residual } => EpilogueForm::Float {
                lo: clamp.lo > f32::NEG_INFINITY,
                hi: clamp.hi < f32::INFINITY,
                residual: *residual,
            },
        }
    }
}

/// What a tile reads of the [grids of rows](RowGrid).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RunTimeGrids {
    /// Nothing: they are part of the constants.
    None,
    /// Scales: no row has a zero point other than 0, or that is part of what sums start from.
    Scales,
    /// Scales and zero points.
    ScalesAndZeroPoints,
}

impl RunTimeGrids {
    /// Whether scales are read.
    pub fn has_scales(self) -> bool {
        self != RunTimeGrids::None
    }

    /// Whether zero points are read.
    pub fn has_zero_points(self) -> bool {
        self == RunTimeGrids::ScalesAndZeroPoints
    }
}

/// Where the accumulators of a tile start from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Start {
    /// The panel's constants.
    #[default]
    Params,
    /// NR values of 32 bits before the panel's weights, in the order of its columns: of weights that are packed at run
    /// time, whose sums are part of it.
    Weights,
}

/// An [`Epilogue`] without the constants that its code reads from memory: layers of one form can share their code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EpilogueForm {
    /// To codes.
    Requantize(RequantizeForm),
    /// Narrowed to 8 bits as they are.
    PackOnly,
    /// Sums of codes to floats.
    Dequantize {
        /// What is known of the first operand when the code runs only.
        grids: RunTimeGrids,
        /// Whether a bias is added.
        bias: bool,
        /// Whether there is a lower bound.
        lo: bool,
        /// Whether there is an upper bound.
        hi: bool,
        /// Whether a residual is added.
        residual: bool,
    },
    /// Floats.
    Float {
        /// Whether there is a lower bound.
        lo: bool,
        /// Whether there is an upper bound.
        hi: bool,
        /// Whether a residual is added.
        residual: bool,
    },
}

impl EpilogueForm {
    /// Whether a residual is added.
    pub fn has_residual(self) -> bool {
        match self {
            EpilogueForm::Requantize(q) => q.has_residual,
            EpilogueForm::Float { residual, .. } | EpilogueForm::Dequantize { residual, .. } => residual,
            EpilogueForm::PackOnly => false,
        }
    }

    /// What is read of the [grids of rows](RowGrid).
    pub fn grids(self) -> RunTimeGrids {
        match self {
            EpilogueForm::Dequantize { grids, .. } => grids,
            _ => RunTimeGrids::None,
        }
    }

    /// Whether results are floats, and not codes.
    pub fn writes_floats(self) -> bool {
        matches!(self, EpilogueForm::Float { .. } | EpilogueForm::Dequantize { .. })
    }

    /// Bytes of a result, and of an element of the residual.
    pub fn result_bytes(self) -> usize {
        if self.writes_floats() { 4 } else { 1 }
    }
}

/// What the code of a requantizing epilogue depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RequantizeForm {
    /// Type of the codes.
    pub dtype: DType,
    /// Whether codes have a lower bound above 0.
    pub lo: bool,
    /// Whether they have an upper bound below 255.
    pub hi: bool,
    /// Whether a residual is added.
    pub has_residual: bool,
    /// How sums are scaled.
    pub rescale: RescaleForm,
}

/// What the code of a [`Rescale`] depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RescaleForm {
    /// One rounding in 64 bits.
    Shift {
        /// Whether all shifts drop the whole low half of the product.
        is_high: bool,
    },
    /// Two roundings.
    Tflite {
        /// Whether some channel is shifted left.
        left: bool,
        /// Whether the residual is.
        residual_left: bool,
    },
    /// In 16 bits.
    Q15 {
        /// Guard bits.
        guard: u32,
    },
    /// A shift.
    Pow2,
    /// In floats.
    Float {
        /// Whether a scaled sum can be 2^31 or more. Conversion makes such a value the smallest integer, which is right
        /// for large negative ones only.
        can_exceed_i32: bool,
    },
}

impl RequantizeForm {
    fn of(q: &Requantizer) -> RequantizeForm {
        let rescale = match &q.rescale {
            Rescale::Shift { n, .. } => RescaleForm::Shift { is_high: n.iter().all(|n| *n > 32) },
            Rescale::Tflite { left, residual: (_, residual_left, _), .. } => RescaleForm::Tflite {
                left: left.iter().any(|left| *left > 0),
                residual_left: *residual_left > 0,
            },
            Rescale::Q15 { r, .. } => RescaleForm::Q15 { guard: *r },
            Rescale::Pow2 { .. } => RescaleForm::Pow2,
            Rescale::Float { scale, scale_r } => {
                let largest = scale.iter().copied().fold(0.0, f32::max);
                let reach = f64::from(largest) * 2f64.powi(31) + f64::from(*scale_r) * 255.0;
                RescaleForm::Float { can_exceed_i32: reach >= 2f64.powi(30) }
            }
        };
        RequantizeForm {
            dtype: q.grid.dtype,
            lo: q.grid.lo > 0,
            hi: q.grid.hi < 255,
            has_residual: q.has_residual,
            rescale,
        }
    }

    /// The mode.
    pub fn mode(&self) -> RequantMode {
        match self.rescale {
            RescaleForm::Shift { .. } => RequantMode::Shift,
            RescaleForm::Tflite { .. } => RequantMode::Tflite,
            RescaleForm::Q15 { .. } => RequantMode::Q15,
            RescaleForm::Pow2 => RequantMode::Pow2,
            RescaleForm::Float { .. } => RequantMode::Float,
        }
    }
}

/// One microkernel, and all that its code depends on. See the [module](self) for what the fields mean.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TileSpec {
    /// Element types.
    pub product: Product,
    /// NR: channels of the panel, a multiple of the emitter's vector.
    pub panel: usize,
    /// Channels that are stored, 1..=panel.
    pub columns: usize,
    /// Byte displacement of each pixel's first tap; as many as the tile has pixels.
    pub a_offsets: Vec<i32>,
    /// Byte displacement of each pixel's result.
    pub y_offsets: Vec<i32>,
    /// Byte displacement of each pixel's residual; empty without one.
    pub r_offsets: Vec<i32>,
    /// Byte displacement of the grid of each pixel's row; empty where they have none.
    pub g_offsets: Vec<i32>,
    /// Outer loops over K, the outermost first: trip count and byte stride in `a`. Weights follow in this order.
    pub loops: Vec<(u32, i32)>,
    /// Groups in one contiguous run.
    pub inner: u32,
    /// Where accumulators start from.
    pub start: Start,
    /// What happens to the accumulators.
    pub epilogue: EpilogueForm,
    /// What the tile asks the caches for ahead of time.
    pub prefetch: Prefetch,
    /// Rows of the matrix registers that hold pixels, as configured when the tile is called; 0 where none are
    /// configured. The tile leaves that configuration behind. Vector forms ignore it.
    pub configured: usize,
    /// Where the next tile of a run is; `None` computes one tile a call, as vector forms always do.
    pub next: Option<Next>,
}

/// From a tile to the next one of its run: what is added to each of its arguments, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Next {
    /// The first tap.
    pub a: i32,
    /// The panel's weights.
    pub w: i32,
    /// The panel's constants.
    pub params: i32,
    /// The result.
    pub y: i32,
    /// The residual.
    pub r: i32,
    /// The grids of rows.
    pub g: i32,
}

/// Lines that a tile prefetches. Nothing is computed from them, so they may lie beyond any buffer.
///
/// The emitters of wide tiles heed this; Cranelift has no instruction for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Prefetch {
    /// How far ahead of the weights that are read, in bytes; 0: not at all. For weights that no cache of the core holds.
    pub weights: u32,
    /// From a pixel's activations to those of the pixel that the next tiles read instead, in bytes; 0: not at all.
    pub activations: i32,
    /// The tile's own results and residuals, while it sums.
    pub results: bool,
    /// Lines behind the panel's weights, the part of a tile of matrix registers; 0: none. The tile that is called behind n
    /// others of the panel takes the n-th such part, so that one panel's weights come while the last one's are used.
    pub next_weights: u32,
}

impl TileSpec {
    /// MR: pixels of the tile.
    pub fn pixels(&self) -> usize {
        self.a_offsets.len()
    }

    /// Byte displacement of each contiguous run of K from the first one, in the order of the loops; `None` where one is
    /// more than 31 bits hold.
    pub fn run_starts(&self) -> Option<Vec<i32>> {
        let mut starts = vec![0i32];
        for &(trips, stride) in &self.loops {
            let of_trip = |start: i32, i: u32| start.checked_add(i32::try_from(i).ok()?.checked_mul(stride)?);
            starts =
                starts.iter().flat_map(|&s| (0..trips).map(move |i| of_trip(s, i))).collect::<Option<_>>()?;
        }
        Some(starts)
    }

    /// Groups of K in all.
    pub fn groups(&self) -> usize {
        self.loops.iter().map(|l| l.0 as usize).product::<usize>() * self.inner as usize
    }
}
