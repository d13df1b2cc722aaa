//! How a dense problem is cut into tiles: the one place that decides it, from a small model of the CPU.
//!
//! A tile is a block of output pixels by a panel of channels. Its accumulators stay in registers, so pixels × vectors
//! is bounded; within the bound, the model adds up what every group of K costs:
//!
//! * multiplying: pixels × vectors instructions, so many a cycle, but never less than their latency;
//! * loading: a vector of weights and a broadcast activation for each, so many a cycle;
//! * streaming: weights come from the nearest cache that holds what is read between two uses of them, so many bytes a
//!   cycle. Weights of a model that exceed the core's caches come from beyond them once in every run.
//!
//! Blocks that divide the image cost no edge tiles, which the sum over all tiles shows by itself; wide panels pay off
//! for few groups of K (fewer activations are loaded again), tall blocks for many (weights are streamed once for more
//! pixels), and the tallest where weights come from memory, so that it can keep up with the multipliers.

use super::{
    Problem, asm,
    clif_tile::{self, Dot},
    pack::PanelFormat,
    spec::{Prefetch, Product},
};
use crate::{
    sharing,
    tier::{Isa, Tier},
};
use std::{fmt, str::FromStr, sync::Arc};

/// A panel: channels that one tile computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Panel {
    /// First channel, in the group.
    pub(crate) first: usize,
    /// Channels of the weights' layout, padding included.
    pub(crate) width: usize,
    /// Channels that exist.
    pub(crate) columns: usize,
}

/// The order in which one thread goes through the tiles.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Order {
    /// All pixels of one panel, then the next panel: weights are read once.
    PanelsOuter,
    /// All panels of one block, then the next block: activations are read once.
    PixelsOuter,
    /// All panels of as many blocks as stay in the second level, then the next ones: activations come from beyond it
    /// once, and weights are read once a round. For batches, and for large images.
    RoundsOuter,
}

/// Which loop over tiles threads divide among themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Share {
    /// Each thread has all channels of its part of the images.
    Pixels,
    /// Each thread has its channels of all images.
    Panels,
}

/// A way to cut one convolution or matrix product into tiles, in the few numbers that determine it.
///
/// All tilings of a problem give the same bits on one tier, of floats too, since every accumulator adds its products in
/// the order of K. They differ in speed alone. [`Step::tilings`] lists those that a step can be compiled with and
/// [`Options::tilings`] asks for one.
///
/// [`Step::tilings`]: crate::Step::tilings
/// [`Options::tilings`]: crate::Options::tilings
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tiling {
    /// Rows of output pixels of a block.
    pub rows: usize,
    /// Columns of output pixels of a block.
    pub cols: usize,
    /// Channels of the first panel, which is the widest.
    pub panel: usize,
    /// Loop order.
    pub order: Order,
}

/// `ROWSxCOLSxPANEL/ORDER`, for example `2x7x32/panels`; read back by [`FromStr`].
impl fmt::Display for Tiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = match self.order {
            Order::PanelsOuter => "panels",
            Order::PixelsOuter => "pixels",
            Order::RoundsOuter => "rounds",
        };
        write!(f, "{}x{}x{}/{order}", self.rows, self.cols, self.panel)
    }
}

/// A text that is no [`Tiling`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no tiling; write one as ROWSxCOLSxPANEL/ and panels, pixels or rounds")]
pub struct ParseTilingError(String);

impl FromStr for Tiling {
    type Err = ParseTilingError;

    fn from_str(text: &str) -> Result<Tiling, ParseTilingError> {
        let parse = || {
            let (extents, order) = text.split_once('/')?;
            let mut extents = extents.split('x').map(|e| e.parse().ok());
            let mut next = || extents.next().flatten();
            let (rows, cols, panel) = (next()?, next()?, next()?);
            let order = match order {
                "panels" => Order::PanelsOuter,
                "pixels" => Order::PixelsOuter,
                "rounds" => Order::RoundsOuter,
                _ => return None,
            };
            extents.next().is_none().then_some(Tiling { rows, cols, panel, order })
        };
        parse().ok_or_else(|| ParseTilingError(text.into()))
    }
}

/// A problem cut into tiles.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cut {
    /// Form of the microkernels.
    pub(crate) isa: Isa,
    /// Rows and columns of output pixels of a block; smaller ones at the lower and right edge.
    pub(crate) rows: usize,
    /// Columns.
    pub(crate) cols: usize,
    /// Panels of one group, by channel; shared by the candidates that are compared.
    pub(crate) panels: Arc<[Panel]>,
    /// Loop order.
    pub(crate) order: Order,
}

impl Cut {
    /// What distinguishes this cut from the other candidates of its problem.
    pub(crate) fn tiling(&self) -> Tiling {
        let panel = self.panels.first().map_or(0, |p| p.width);
        Tiling { rows: self.rows, cols: self.cols, panel, order: self.order }
    }

    /// Blocks of pixels of a problem.
    fn blocks(&self, problem: &Problem) -> usize {
        problem.images * problem.rows.div_ceil(self.rows) * problem.cols.div_ceil(self.cols)
    }

    /// Blocks of a round: of all panels of which activations and results stay in the second level.
    pub(crate) fn round(&self, problem: &Problem) -> usize {
        let blocks = self.blocks(problem);
        match self.order {
            Order::RoundsOuter => {
                let bytes = problem.a_bytes() + problem.images * problem.y.image;
                (LEVEL2 / 2 * blocks / bytes.max(1)).clamp(1, blocks)
            }
            Order::PanelsOuter | Order::PixelsOuter => blocks,
        }
    }

    /// The same tiles in another order.
    fn reordered(&self, order: Order) -> Cut {
        Cut { order, ..self.clone() }
    }
}

/// What the model knows about the unit that multiplies.
#[derive(Clone, Copy)]
struct Unit {
    isa: Isa,
    product: Product,
    /// 32-bit lanes of a vector.
    lanes: usize,
    /// Panel widths to choose from, in vectors, the widest first.
    widths: &'static [usize],
    /// Multiplications of a group by a vector in a cycle.
    rate: f64,
    /// Cycles from one multiplication to the next into the same accumulator.
    latency: f64,
    /// Cycles of the ports that multiply and sum, for a group of an activation and for a vector of weights: to broadcast
    /// the one where loads do not, and to widen the other.
    broadcast: f64,
    widen: f64,
}

/// Cycles that a tile takes besides its loops over K: to be called, to finish an accumulator, to store a pixel.
const CALL: f64 = 30.0;
const FINISH: f64 = 4.0;
const STORE: f64 = 3.0;
/// Vector loads in a cycle.
const LOADS: f64 = 2.0;
/// Bytes of the level-1 and level-2 caches that one operand may take: about half of what servers and clients have.
const LEVEL1: usize = 24 << 10;
const LEVEL2: usize = 1 << 20;
/// Bytes after which addresses share a set of the level-1 cache, lines, and lines in a set (12 in newer cores).
const LEVEL1_SETS: usize = 4096;
const LINE: usize = 64;
const LEVEL1_WAYS: usize = 8;
/// Bytes in a cycle from the second level, as measured with a tile's stream of weights.
const FROM_LEVEL2: f64 = 16.0;
/// The same of weights of a single pixel, or of matrix registers: there are few other loads.
const UNDISTURBED_FROM_LEVEL2: f64 = 34.0;
/// Bytes in a cycle from beyond it: 30 GB/s for one core at 3.9 GHz, with prefetching, measured on a server.
const FROM_MEMORY: f64 = 7.5;

/// The clock of the CPU on which all this was measured.
const CYCLES_PER_NANOSECOND: f64 = 3.9;
/// Bytes in a cycle that a core reads of what another one has just written.
const FROM_OTHER_CORE: f64 = sharing::FROM_OTHER_CORE / CYCLES_PER_NANOSECOND;

/// The part of the shorter of multiplying and streaming that is not hidden behind the longer one while activations come
/// from memory; measured with the middle layers of VGG-16 in f32.
const WAITED: f64 = 0.1;
/// The same where weights come from memory for tile after tile: measured with a product of 512 by 1536 by 384 in f32, which
/// took 11 cycles where each of the two takes 8.
const WAITED_FOR_WEIGHTS: f64 = 0.3;
/// Cycles of a sum within which memory answers: results are prefetched by sums that take longer.
const LATENCY: f64 = 400.0;
/// How far ahead weights are prefetched, in bytes: about a microsecond of them.
const WEIGHTS_AHEAD: u32 = 16 << 10;

/// The same for matrix registers. A product of a band of few pixels takes as long as one of 8.
const MATRIX_LEAST: f64 = 9.5;
/// What the loads of operands delay each product.
const MATRIX_LOADS: f64 = 2.4;
/// To load a row of a register whose rows lie in two lines each.
const SPLIT_ROW: f64 = 2.0;
/// To write an accumulator to the stack, to finish a pixel's 16 channels from there, and to store a pixel.
const SPILL: f64 = 17.0;
const MATRIX_FINISH: f64 = 2.0;
const MATRIX_STORE: f64 = 2.5;
/// Bytes of the level-1 cache that activations of matrix registers may take: CPUs that have them have 48 KiB.
const MATRIX_LEVEL1: usize = 32 << 10;
/// To configure the registers.
const CONFIGURE: f64 = 180.0;
/// The part of the shorter of two things that take turns on the ports, or wait for each other's lines, which is hidden
/// behind the longer one: the sum of a tile and the codes of the tile before in its run; the use of one panel's weights
/// and the prefetching of the next one's. Measured with layers of ResNet-50 and MobileNetV2.
const HIDDEN: f64 = 0.6;

fn unit(isa: Isa, product: Product) -> Unit {
    let wide = Unit {
        isa,
        product,
        lanes: 16,
        widths: &[4, 3, 2, 1],
        rate: 2.0,
        latency: 5.0,
        broadcast: 0.0,
        widen: 0.0,
    };
    let half = Unit { lanes: 8, widths: &[2, 1], ..wide };
    let narrow = Unit { lanes: 4, ..half };
    match (isa, product) {
        (Isa::AmxInt8 | Isa::Avx512Vnni, _) => wide,
        (Isa::AvxVnni, _) | (Isa::Avx2, Product::F32) => half,
        // Three ports: pairs are multiplied apart, and summed by an instruction of their own.
        (Isa::Avx2, Product::U8S8) => Unit { rate: 0.75, ..half },
        // Two multiplications one after the other, and a sum.
        (Isa::Avx2, Product::U8S7) => Unit { rate: 1.0, ..half },
        (Isa::XmmVnni, _) => narrow,
        // A product and a sum, on three ports; SSE broadcasts by a shuffle.
        (Isa::Xmm, Product::F32) => {
            Unit { rate: 1.5, latency: 4.0, broadcast: 1.0 / 3.0, widths: wide.widths, ..narrow }
        }
        (Isa::Xmm, Product::U8S8) => {
            Unit { rate: 0.75, broadcast: 2.0 / 3.0, widen: 2.0 / 3.0, widths: wide.widths, ..narrow }
        }
        (Isa::Xmm, Product::U8S7) => Unit { rate: 1.0, broadcast: 1.0 / 3.0, widths: wide.widths, ..narrow },
    }
}

/// Where an operand comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Source {
    Level1,
    Level2,
    Memory,
}

impl Source {
    /// The cache that holds so many bytes from one use to the next.
    fn of(bytes: usize) -> Source {
        if bytes <= LEVEL1 {
            Source::Level1
        } else if bytes <= LEVEL2 {
            Source::Level2
        } else {
            Source::Memory
        }
    }

    /// Cycles that so many bytes take. Those of the first level are counted as instructions.
    fn cycles(self, bytes: f64) -> f64 {
        match self {
            Source::Level1 => 0.0,
            Source::Level2 => bytes / FROM_LEVEL2,
            Source::Memory => bytes / FROM_MEMORY,
        }
    }

    /// The same while next to nothing else is loaded: by tiles of one pixel, and into matrix registers.
    fn undisturbed_cycles(self, bytes: f64) -> f64 {
        match self {
            Source::Level2 => bytes / UNDISTURBED_FROM_LEVEL2,
            _ => self.cycles(bytes),
        }
    }
}

impl Unit {
    /// Pixels whose accumulators fit in registers.
    fn pixels(&self, vectors: usize) -> usize {
        match Dot::of_isa(self.product, self.isa) {
            Some(dot) => clif_tile::max_pixels(dot, vectors),
            None => asm::max_pixels(self.isa, self.product, vectors * self.lanes),
        }
    }

    /// Cycles of one tile whose weights come from a source; `None` if it cannot be had.
    fn tile(
        &self,
        matrix: Option<&Matrix>,
        block: Block,
        vectors: usize,
        groups: f64,
        weights: Source,
    ) -> Option<f64> {
        match matrix {
            Some(matrix) => matrix.tile(block, vectors, groups, weights),
            None => Some(self.vector_tile(block, vectors, groups, weights)),
        }
    }

    fn vector_tile(&self, block: Block, vectors: usize, groups: f64, weights: Source) -> f64 {
        let pixels = block.rows * block.cols;
        let multiply = ((pixels * vectors) as f64 / self.rate).max(self.latency)
            + pixels as f64 * self.broadcast
            + vectors as f64 * self.widen;
        let load = (pixels + vectors + block.crowded) as f64 / LOADS;
        let bytes = (vectors * self.lanes * 4) as f64;
        let stream = if pixels == 1 { weights.undisturbed_cycles(bytes) } else { weights.cycles(bytes) };
        let after = CALL + FINISH * (pixels * vectors) as f64 + STORE * pixels as f64;
        let compute = multiply.max(load);
        let waited = match weights {
            Source::Memory if pixels > 1 => WAITED_FOR_WEIGHTS,
            _ if block.streams => WAITED,
            _ => 0.0,
        };
        let waited = waited * compute.min(stream);
        groups * (compute.max(stream) + waited) + after
    }
}

/// How long two things take of which one is mostly hidden behind the other.
fn overlapped(a: f64, b: f64) -> f64 {
    a + b - HIDDEN * a.min(b)
}

/// A block of pixels of which a tile is computed.
#[derive(Clone, Copy)]
struct Block {
    rows: usize,
    cols: usize,
    /// Pixels whose lines are not in the first level; see [`crowded`]. Of vector forms.
    crowded: usize,
    /// Whether activations come from memory, and push the weights of a panel out of the second level again and again.
    streams: bool,
    /// Tiles of a run. Of matrix forms.
    run: usize,
}

/// What the tiles of a cut find where they are computed in matrix registers.
struct Matrix {
    /// The rows of the registers that are configured when a tile is called.
    configured: usize,
    /// Where activations come from.
    activations: Source,
    /// Whether 64 elements of a pixel lie in two lines.
    splits: bool,
    /// Where results go to.
    results: Source,
}

impl Matrix {
    /// `None` of vector forms.
    fn of(problem: &Problem, cut: &Cut) -> Option<Matrix> {
        if cut.isa != Isa::AmxInt8 {
            return None;
        }
        // What one panel after the other reads and writes of a block stays in the first level if that holds it; from
        // memory it comes only once, which `cost` counts.
        let near = |all: usize, of_block: usize| {
            let bytes = if cut.order == Order::PixelsOuter { of_block } else { all };
            if bytes <= MATRIX_LEVEL1 { Source::Level1 } else { Source::Level2 }
        };
        let loops = problem.loops.iter().map(|l| l.1 as usize);
        let mut steps = [problem.a.row, problem.a.col].into_iter().chain(loops);
        let all_results = problem.images * problem.y.image;
        let fills_lines = cut.panels.iter().all(|p| (p.width * problem.result_bytes).is_multiple_of(LINE));
        let in_order = cut.order == Order::PixelsOuter && fills_lines;
        let results = if all_results > 2 * LEVEL2 && !in_order {
            // Each panel writes lines, or parts of them, that are far apart, and reads those of a residual: nobody
            // foresees which.
            Source::Memory
        } else {
            near(all_results, cut.rows * cut.cols * problem.y.col)
        };
        Some(Matrix {
            configured: cut.configured(),
            activations: near(problem.a_bytes(), block_bytes(problem, cut.rows, cut.cols)),
            splits: !steps.all(|step| step.is_multiple_of(LINE)),
            results,
        })
    }

    /// Cycles of a tile, as measured on a server: a product takes a cycle for each pixel of its band, but not less than
    /// [`MATRIX_LEAST`]; its operands' loads delay it, whichever register is loaded. `None` for blocks of too many bands.
    fn tile(&self, block: Block, vectors: usize, groups: f64, weights: Source) -> Option<f64> {
        let Block { rows, cols, run, .. } = block;
        let band = band_rows(rows, cols, vectors, self.configured)?;
        let bands = rows * cols.div_ceil(band);
        let products = (bands * vectors) as f64;
        let multiply = products * ((band as f64 + 1.5).max(MATRIX_LEAST) + MATRIX_LOADS);
        // Both operands are loaded anew for every step of K.
        let stream = weights.undisturbed_cycles((vectors * 1024) as f64)
            + self.activations.undisturbed_cycles((bands * band * LINE) as f64);
        let load = if self.splits { (bands * band) as f64 * SPLIT_ROW } else { 0.0 };
        // What is configured for this tile is undone behind it.
        let is_configured = self.configured == band || self.configured == 0;
        let configure = if is_configured { 0.0 } else { 2.0 * CONFIGURE };
        // A panel that is narrower than a line touches as many lines as one that fills them.
        let lines = rows * cols * (vectors * 16).next_multiple_of(LINE);
        let pixels = (rows * cols) as f64;
        let finish = SPILL * products + MATRIX_FINISH * pixels * vectors as f64 + MATRIX_STORE * pixels;
        let after = CALL + finish.max(self.results.undisturbed_cycles(2.0 * lines as f64));
        let sum = groups / 16.0 * multiply.max(stream).max(load);
        let (alone, runs) = (sum + after, groups / 16.0 <= asm::MOST_STEPS as f64);
        let of_run = if runs { overlapped(sum, after) } else { alone };
        Some((alone + (run - 1) as f64 * of_run) / run as f64 + configure)
    }
}

/// Pixels of the bands that a block is taken in; `None` where it needs too many.
fn band_rows(rows: usize, cols: usize, vectors: usize, configured: usize) -> Option<usize> {
    // Each row of the image begins a band, and there are four at most.
    let runs = [cols; 4];
    asm::band_rows(runs.get(..rows)?, vectors, configured)
}

impl Cut {
    /// Rows of matrix registers that the step configures: those of the widest panels' tiles inside the image; 0 for
    /// vector forms.
    pub(crate) fn configured(&self) -> usize {
        match self.isa {
            Isa::AmxInt8 => {
                let vectors = self.panels.iter().map(|p| p.width / 16).max().unwrap_or(1);
                band_rows(self.rows, self.cols, vectors, 0).unwrap_or(0)
            }
            _ => 0,
        }
    }
}

/// Shapes of tiles that [`candidates`] offers, each in all orders that make a difference.
const SHAPES: usize = 6;

/// The ways to cut a problem that are worth timing on a tier: never empty, at most three times [`SHAPES`], the cheapest by the
/// model first. Of blocks with as many pixels, only the cheapest is offered, in the form that computes it fastest.
///
/// `weights` is what the whole model's weights take: if no cache of a core holds them, every problem's come from memory.
pub(crate) fn candidates(problem: &Problem, tier: &Tier, weights: usize) -> Vec<Cut> {
    let mut cheapest = Cheapest::default();
    let units = tier.isas(problem.product).map(|isa| unit(isa, problem.product));
    for unit in units {
        let mut seen: Vec<Arc<[Panel]>> = Vec::new();
        for &widest in unit.widths {
            let panels: Arc<[Panel]> = panels(problem.channels, widest, &unit).into();
            // Few channels: a narrower bound need not make other panels.
            if !seen.contains(&panels) {
                cheapest.compare(problem, &unit, &panels, weights);
                seen.push(panels);
            }
        }
    }
    let mut cuts = cheapest.into_sorted();
    cuts.truncate(SHAPES);
    let others = |c: &Cut| orders(problem, c).into_iter().filter(|o| *o != c.order).collect::<Vec<_>>();
    let reordered: Vec<Cut> =
        cuts.iter().flat_map(|c| others(c).into_iter().map(|order| c.reordered(order))).collect();
    cuts.extend(reordered);
    cuts
}

/// The cheapest cut of each shape: so many pixels by these panels. Of equal costs, the first counts.
#[derive(Default)]
struct Cheapest {
    /// Cuts that were compared.
    compared: usize,
    of_shape: Vec<Costed>,
}

/// A cut, what it costs, and which of all that were compared it was.
struct Costed {
    cost: f64,
    place: usize,
    cut: Cut,
}

impl Cheapest {
    /// Takes part: all blocks and orders of these panels.
    fn compare(&mut self, problem: &Problem, unit: &Unit, panels: &Arc<[Panel]>, weights: usize) {
        // All panels share the blocks, so the widest bounds them.
        let vectors = panels.iter().map(|p| p.width / unit.lanes).max().unwrap_or(1);
        let most = unit.pixels(vectors);
        let groups = k_groups(problem, unit.isa);
        let all_weights = panels.iter().map(|p| p.width * 4 * groups).sum::<usize>() * problem.groups;
        // Where the first level holds all weights, reading activations and writing whole pixels once is the better half
        // of the bargain.
        let orders = match Source::of(all_weights) {
            Source::Level1 => [Order::PixelsOuter, Order::PanelsOuter],
            _ => [Order::PanelsOuter, Order::PixelsOuter],
        };
        let rounds = has_rounds(problem, unit.isa).then_some(Order::RoundsOuter);
        // By pixels: where the shape stands. Another form may have had the same panels.
        let mut shapes: Vec<Option<usize>> = vec![None; most + 1];
        for (at, other) in self.of_shape.iter().enumerate().filter(|(_, o)| o.cut.panels == *panels) {
            if let Some(shape) = shapes.get_mut(other.cut.rows * other.cut.cols) {
                *shape = Some(at);
            }
        }
        let mut cut =
            Cut { isa: unit.isa, rows: 0, cols: 0, panels: panels.clone(), order: Order::PanelsOuter };
        for cols in 1..=most.min(problem.cols) {
            for rows in 1..=(most / cols).min(problem.rows) {
                for order in orders.into_iter().chain(rounds) {
                    (cut.rows, cut.cols, cut.order) = (rows, cols, order);
                    if let Some(cost) = cost(problem, unit, &cut, Source::of(weights)) {
                        self.keep(cost, &cut, &mut shapes[rows * cols]);
                    }
                }
            }
        }
    }

    /// Keeps a cut if it is the cheapest of its shape.
    fn keep(&mut self, cost: f64, cut: &Cut, shape: &mut Option<usize>) {
        let place = self.compared;
        self.compared += 1;
        match *shape {
            Some(at) if self.of_shape[at].cost <= cost => {}
            Some(at) => self.of_shape[at] = Costed { cost, place, cut: cut.clone() },
            None => {
                *shape = Some(self.of_shape.len());
                self.of_shape.push(Costed { cost, place, cut: cut.clone() });
            }
        }
    }

    /// The cheapest first.
    fn into_sorted(mut self) -> Vec<Cut> {
        self.of_shape.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.place.cmp(&b.place)));
        self.of_shape.into_iter().map(|costed| costed.cut).collect()
    }
}

/// The orders that differ for a cut.
fn orders(problem: &Problem, cut: &Cut) -> Vec<Order> {
    if cut.blocks(problem) == 1 || problem.groups * cut.panels.len() == 1 {
        return vec![cut.order];
    }
    let rounds = has_rounds(problem, cut.isa).then_some(Order::RoundsOuter);
    [Order::PanelsOuter, Order::PixelsOuter].into_iter().chain(rounds).collect()
}

/// Whether activations come from memory, so that to read them once pays. Vectors multiply for so long that activations
/// come meanwhile: in rounds, which read weights again, VGG-16 in f32 took 5 % longer.
fn has_rounds(problem: &Problem, isa: Isa) -> bool {
    isa == Isa::AmxInt8 && Source::of(problem.a_bytes()) == Source::Memory
}

/// The channels as panels of at most `widest` vectors, as few as there can be and as equal as they can be.
fn panels(channels: usize, widest: usize, unit: &Unit) -> Vec<Panel> {
    let mut panels = Vec::new();
    let mut first = 0;
    while first < channels {
        let left = channels - first;
        let vectors = left.div_ceil(unit.lanes);
        let width = vectors.div_ceil(vectors.div_ceil(widest)) * unit.lanes;
        panels.push(Panel { first, width, columns: left.min(width) });
        first += width;
    }
    panels
}

/// Groups in all of K, padding of the runs included.
pub(crate) fn k_groups(problem: &Problem, isa: Isa) -> usize {
    problem.runs() * PanelFormat::new(problem.product, isa, 1).run_groups(problem.run)
}

/// Cycles of the whole problem on one core; `first` is where weights come from when they are first read. `None` for
/// blocks that no tile computes.
fn cost(problem: &Problem, unit: &Unit, cut: &Cut, first: Source) -> Option<f64> {
    let matrix = Matrix::of(problem, cut);
    let k_groups = k_groups(problem, unit.isa);
    let groups = k_groups as f64;
    let bytes = |panel: &Panel| panel.width * 4 * k_groups;
    let all_weights = cut.panels.iter().map(bytes).sum::<usize>() * problem.groups;
    // Interior, right edge, lower edge, corner: how often, and how many pixels.
    let along = |extent: usize, block: usize| {
        [(extent / block, block), (usize::from(!extent.is_multiple_of(block)), extent % block)]
    };
    let streams = Source::of(problem.a_bytes()) == Source::Memory && cut.order != Order::RoundsOuter;
    let rounds = cut.blocks(problem).div_ceil(cut.round(problem));
    let block = |rows, cols, run| {
        let crowded = if matrix.is_some() { 0 } else { crowded(problem, rows, cols) };
        Block { rows, cols, crowded, streams, run }
    };
    let panels_follow = cut.order == Order::PixelsOuter || cut.blocks(problem) == 1;
    let mut cycles = 0.0;
    for same in cut.panels.chunk_by(|a, b| a.width == b.width) {
        let panel = &same[0];
        let vectors = panel.width / unit.lanes;
        let mut of_panel = 0.0;
        let again = match cut.order {
            Order::PanelsOuter | Order::RoundsOuter => Source::of(bytes(panel)),
            Order::PixelsOuter => Source::of(all_weights),
        };
        for (n_rows, tile_rows) in along(problem.rows, cut.rows) {
            for (n_cols, tile_cols) in along(problem.cols, cut.cols) {
                let tiles = n_rows * n_cols * problem.images;
                if tiles > 0 {
                    // The innermost loop that has more than one round.
                    let run = match problem.cols > cut.cols {
                        _ if panels_follow => same.len(),
                        true => n_cols,
                        false => n_rows,
                    };
                    let block = block(tile_rows, tile_cols, run);
                    of_panel += tiles as f64 * unit.tile(matrix.as_ref(), block, vectors, groups, again)?;
                }
            }
        }
        // The first tile's weights come from further away.
        if next_weights(problem, cut, Share::Panels) > 0 && first == Source::Memory {
            of_panel = overlapped(of_panel, first.cycles(bytes(panel) as f64));
        } else {
            let block = block(cut.rows, cut.cols, 1);
            let tile = |source| unit.tile(matrix.as_ref(), block, vectors, groups, source);
            of_panel += tile(first.max(again))? - tile(again)?;
        }
        // In the other rounds they come from where all of them are.
        let block = block(cut.rows, cut.cols, 1);
        let tile = |source| unit.tile(matrix.as_ref(), block, vectors, groups, source);
        let of_round = tile(Source::of(all_weights + LEVEL2 / 2).max(again))? - tile(again)?;
        of_panel += (rounds - 1) as f64 * of_round;
        cycles += same.len() as f64 * of_panel;
    }
    let activations = problem.a_bytes();
    let times = match cut.order {
        Order::PanelsOuter => cut.panels.len(),
        Order::PixelsOuter | Order::RoundsOuter => 1,
    };
    let source = Source::of(activations);
    // Those of the second level come while others are used; from memory, about half are waited for.
    let waited =
        if source == Source::Memory { times as f64 * source.cycles(activations as f64) / 2.0 } else { 0.0 };
    let configure = if matrix.is_some() { CONFIGURE } else { 0.0 };
    Some(cycles * problem.groups as f64 + waited + configure)
}

/// What has to be known of a step to tell how threads divide its tiles.
pub(crate) struct Sharing {
    /// How they divided what the input comes from.
    pub(crate) input: Share,
    /// The same of the residual, if there is one.
    pub(crate) residual: Option<Share>,
    /// Whether a panel needs all channels of a pixel.
    pub(crate) reads_all_channels: bool,
    /// Bytes of weights that are read between two uses of a step's own.
    pub(crate) weights: usize,
}

/// How threads divide the tiles of a cut. Those that share pixels each read all weights; those that share panels each
/// need what the other ones have written of the input, and leave results of which the next step needs what others wrote.
/// That is the dearer one where weights are not much more than activations: cores write to each other slowly.
pub(crate) fn share(problem: &Problem, cut: &Cut, sharing: &Sharing) -> Share {
    match (cut.blocks(problem), problem.groups * cut.panels.len()) {
        (1, _) => return Share::Panels,
        (_, 1) => return Share::Pixels,
        _ => {}
    }
    // Of two threads. Bytes of others: half of the input, or where halves cross each other, a half of a half.
    let crossing = |own: Share, of: Share, bytes: usize| if own == of { 0.0 } else { bytes as f64 / 4.0 };
    let others = |own: Share| {
        let input = match (own, sharing.reads_all_channels) {
            (Share::Panels, true) => problem.a_bytes() as f64 / 2.0,
            _ => crossing(own, sharing.input, problem.a_bytes()),
        };
        let results = problem.images * problem.y.image;
        let residual = sharing.residual.map_or(0.0, |of| crossing(own, of, results));
        // Whether the next step divides pixels is not known yet.
        input + residual + crossing(own, Share::Pixels, results) / 2.0
    };
    let unit = unit(cut.isa, problem.product);
    // What the half that the other thread would have read takes: more than the half of what both would read.
    let cycles = |first| cost(problem, &unit, cut, first).unwrap_or(0.0);
    let weights = (cycles(Source::of(sharing.weights)) - cycles(Source::Level1)) / 2.0;
    let pixels = weights + others(Share::Pixels) / FROM_OTHER_CORE;
    let panels = others(Share::Panels) / FROM_OTHER_CORE;
    if pixels <= panels { Share::Pixels } else { Share::Panels }
}

/// About how long a cut problem takes on one core; `weights` bytes are read between two uses of its own.
pub(crate) fn nanoseconds(problem: &Problem, cut: &Cut, weights: usize) -> f64 {
    let unit = unit(cut.isa, problem.product);
    cost(problem, &unit, cut, Source::of(weights)).unwrap_or(0.0) / CYCLES_PER_NANOSECOND
}

/// Bytes of activations that a block reads, each counted once.
fn block_bytes(problem: &Problem, rows: usize, cols: usize) -> usize {
    let run = problem.run * problem.product.element();
    let (trips, stride) =
        problem.loops.first().map_or((1, 0), |&(trips, stride)| (trips as usize, stride as usize));
    let starts = distinct_sums((rows, problem.a.row), (trips, stride));
    let inner: usize = problem.loops.iter().skip(1).map(|l| l.0 as usize).product();
    starts * inner * ((cols - 1) * problem.a.col.min(run) + run)
}

/// How many different numbers `i * a + j * b` there are for `i` and `j` below these counts.
///
/// Two pairs give the same number if they are a multiple of (b, −a) / gcd(a, b) apart, so every number is counted once
/// where only pairs are that have no such predecessor.
fn distinct_sums((rows, a): (usize, usize), (trips, b): (usize, usize)) -> usize {
    match gcd(a, b) {
        0 => rows.min(1) * trips.min(1),
        common => rows * trips - rows.saturating_sub(b / common) * trips.saturating_sub(a / common),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Pixels of a block whose activations lie in one set of the level-1 cache, beyond what it holds: with 1024 channels of
/// floats, or two pixels of 512 in a strided convolution, all pixels are multiples of a page apart.
fn crowded(problem: &Problem, rows: usize, cols: usize) -> usize {
    let mut sets = [0; LEVEL1_SETS / LINE];
    for i in 0..rows * cols {
        sets[(i / cols * problem.a.row + i % cols * problem.a.col) % LEVEL1_SETS / LINE] += 1;
    }
    sets.into_iter().filter(|pixels| *pixels > LEVEL1_WAYS).sum()
}

/// What the tiles of a problem prefetch: the weights if they come from memory, activations and results if they do.
pub(crate) fn prefetch(
    problem: &Problem,
    cut: &Cut,
    share: Share,
    weights: usize,
    residual: bool,
) -> Prefetch {
    let far = |bytes: usize| Source::of(bytes) == Source::Memory;
    if cut.isa == Isa::AmxInt8 {
        // Sums in matrix registers are too short to hide anything of their own.
        let next_weights = if far(weights) { next_weights(problem, cut, share) } else { 0 };
        return Prefetch { next_weights, ..Prefetch::default() };
    }
    let unit = unit(cut.isa, problem.product);
    let blocks_follow = problem.loops.is_empty() && problem.rows == 1;
    let results = problem.images * problem.y.image * if residual { 2 } else { 1 };
    let Tiling { rows, cols, panel, .. } = cut.tiling();
    let summing = (k_groups(problem, cut.isa) * rows * cols * panel) as f64 / (unit.lanes as f64 * unit.rate);
    let next = i32::try_from(cut.cols * problem.a.col).unwrap_or(0);
    Prefetch {
        weights: if far(weights) { WEIGHTS_AHEAD } else { 0 },
        activations: if far(problem.a_bytes()) && blocks_follow { next } else { 0 },
        // Input and results share the caches.
        results: far(problem.a_bytes() + results) && summing >= LATENCY,
        next_weights: 0,
    }
}

/// Lines of the next panel's weights that each tile of a panel asks for, where one panel is done before the next; 0
/// where it is not, and of vector forms.
fn next_weights(problem: &Problem, cut: &Cut, share: Share) -> u32 {
    let blocks = cut.blocks(problem);
    if cut.isa != Isa::AmxInt8 || cut.order == Order::PixelsOuter && blocks > 1 {
        return 0;
    }
    // Two threads that share pixels have half of a panel's tiles each.
    let tiles = if share == Share::Pixels { blocks.div_ceil(2) } else { blocks }.min(cut.round(problem));
    let width = cut.panels.iter().map(|p| p.width).max().unwrap_or(0);
    u32::try_from((width * 4 * k_groups(problem, cut.isa)).div_ceil(LINE).div_ceil(tiles)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TIERS, dense::Strides};

    fn vnni() -> &'static Tier {
        Tier::from_name("avx512vnni").unwrap()
    }

    /// A convolution of `kernel`² taps over an unpadded image of `size`² output pixels.
    fn problem(size: usize, kernel: usize, input: usize, channels: usize) -> Problem {
        let row = (size + kernel - 1) * input;
        let (rows, cols) = if kernel == 1 { (1, size * size) } else { (size, size) };
        Problem {
            product: Product::U8S8,
            images: 1,
            rows,
            cols,
            groups: 1,
            channels,
            a: Strides { image: row * (size + kernel - 1), row, col: input, group: 0 },
            y: Strides { image: size * size * channels, row: size * channels, col: channels, group: 0 },
            r: Strides { image: size * size * channels, row: size * channels, col: channels, group: 0 },
            g: Strides::default(),
            result_bytes: 1,
            loops: if kernel > 1 { vec![(kernel as u32, row as i32)] } else { vec![] },
            run: kernel * input,
        }
    }

    fn choose(problem: &Problem, tier: &Tier) -> Cut {
        candidates(problem, tier, 0).remove(0)
    }

    #[test]
    fn candidates_are_few_and_told_apart_by_their_tilings() {
        for channels in [1, 24, 64, 1000] {
            for tier in &TIERS {
                let tilings: Vec<Tiling> =
                    candidates(&problem(7, 3, 16, channels), tier, 0).iter().map(Cut::tiling).collect();
                assert!((1..=3 * SHAPES).contains(&tilings.len()), "{tilings:?}");
                for (i, t) in tilings.iter().enumerate() {
                    assert!(!tilings[..i].contains(t), "{t} twice in {tilings:?}");
                    assert_eq!(t.to_string().parse(), Ok(*t));
                }
            }
        }
    }

    #[test]
    fn sums_are_counted_once_each() {
        for (rows, a, trips, b) in
            [(4, 6, 3, 4), (1, 0, 5, 7), (5, 7, 1, 0), (3, 0, 3, 0), (6, 5, 4, 5), (8, 2, 3, 9), (0, 3, 2, 1)]
        {
            let sums: std::collections::BTreeSet<usize> =
                (0..rows).flat_map(|i| (0..trips).map(move |j| i * a + j * b)).collect();
            assert_eq!(distinct_sums((rows, a), (trips, b)), sums.len(), "{rows} of {a}, {trips} of {b}");
        }
    }

    #[test]
    fn a_text_that_is_no_tiling_is_refused() {
        for text in ["", "2x7x32", "2x7/panels", "2x7x32x1/panels", "2x7x-1/panels", "2x7x32/rows"] {
            assert!(text.parse::<Tiling>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_pixel_and_channel_is_in_one_tile() {
        for channels in [1, 3, 16, 24, 33, 40, 48, 64, 96, 100, 1000] {
            for tier in &TIERS {
                let cut = choose(&problem(7, 3, 16, channels), tier);
                let mut next = 0;
                for p in cut.panels.iter() {
                    assert_eq!(p.first, next);
                    assert!(p.columns > 0 && p.columns <= p.width);
                    next += p.columns;
                }
                assert_eq!(next, channels, "{tier}");
            }
        }
    }

    #[test]
    fn resnet_layers_get_the_tiles_that_were_measured_best() {
        let cut = |size, kernel, input, channels| {
            let c = choose(&problem(size, kernel, input, channels), vnni());
            (c.rows * c.cols, c.panels[0].width)
        };
        // Little K: a wide panel.
        assert_eq!(cut(56, 1, 64, 256), (6, 64));
        assert_eq!(cut(28, 1, 128, 512), (6, 64));
        // Much K: tall blocks of two vectors.
        assert_eq!(cut(14, 3, 256, 256), (14, 32));
        assert_eq!(cut(7, 3, 512, 512), (14, 32));
    }

    #[test]
    fn a_single_pixel_gets_the_widest_panel() {
        let cut = choose(&problem(1, 1, 2048, 1000), vnni());
        assert_eq!((cut.rows * cut.cols, cut.panels[0].width), (1, 64));
    }

    #[test]
    fn a_block_that_divides_the_width_is_preferred() {
        let cut = choose(&problem(28, 3, 128, 128), vnni());
        assert_eq!(28 % cut.cols, 0, "{cut:?}");
    }
}
