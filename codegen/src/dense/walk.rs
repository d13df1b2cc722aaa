//! The walk over the tiles of a dense problem: one routine for every layer, which follows a description.
//!
//! A unit is one tile. The index of the first one of a range is taken apart; from then on counters and offsets are
//! carried from tile to tile. What differs from layer to layer is data, so that a layer costs no code but its tiles.
//!
//! Threads divide the tiles by pixels or by panels ([`Share`]), whatever the order in which each then goes through its
//! own: a core that wrote the upper half of an image should read the upper half in the next layer.

use super::{
    Problem, Strides,
    choose::{Cut, Order, Share},
    driver::Operands,
    spec::Next,
};
use crate::tier::Isa;
use std::cmp::Ordering;

/// A microkernel; [`spec`](super::spec) has its contract.
pub(crate) type TileFunction =
    extern "sysv64" fn(*const u8, *const u8, *const u8, *mut u8, *const u8, u64, *const u8);

/// Code that runs before the first or behind the last tile of a range.
pub(crate) type AroundFunction = extern "sysv64" fn();

/// Parts of the image: interior, right edge, lower edge, corner.
pub(crate) const PARTS: usize = 4;
/// Bits of a part.
pub(crate) const RIGHT: usize = 1;
pub(crate) const LOWER: usize = 2;

/// The tile functions of one kind of panel, for the parts of the image that exist.
pub(crate) type PartFunctions<T> = [Option<T>; PARTS];

/// One panel of one group: what its tiles add to the addresses of a block, and which functions compute them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelEntry {
    /// Byte offset of its channels in a pixel of the input.
    pub(crate) a: u32,
    /// Byte offset of its weights among the packed ones.
    pub(crate) weights: u32,
    /// Offset of its constants in the model's weights.
    pub(crate) params: u32,
    /// Byte offset of its channels in a pixel of the result.
    pub(crate) y: u32,
    /// Index of its functions.
    pub(crate) class: u32,
}

/// Functions that bring a core into the state that tiles ask for, and out of it again: both run once in every range of
/// units, on the thread that computes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around<F> {
    /// Before the first tile.
    pub(crate) enter: F,
    /// Behind the last one.
    pub(crate) leave: F,
}

/// The loops of a walk. Panels of all groups are one loop.
const AXES: usize = 4;
const IMAGE: usize = 0;
const ROW: usize = 1;
const COL: usize = 2;
const PANEL: usize = 3;

/// One loop.
#[derive(Clone, Copy, Debug)]
struct Axis {
    count: usize,
    /// Bytes from one index to the next, in input, result, residual and grids of rows.
    a: usize,
    y: usize,
    r: usize,
    g: usize,
}

/// The nested loops over images, rows and columns of blocks, and panels, as one range of units; and what a tile is given
/// in each. `T` and `A` are the functions: first their names in the module, then themselves.
#[derive(Clone, Debug)]
pub(crate) struct Walk<T, A> {
    pub(crate) operands: Operands,
    axes: [Axis; AXES],
    /// The axes, outermost first; those of one index come first of all.
    order: [usize; AXES],
    /// Index of the last row and column of blocks if it is a smaller one; an index that does not occur otherwise.
    lower_edge: usize,
    right_edge: usize,
    /// Rows and columns of a block.
    block: [usize; 2],
    /// Rows and columns of an image.
    extents: [usize; 2],
    /// Which loop is the outer one of `order`.
    outer: Share,
    /// Blocks of pixels whose tiles of all panels come before those of the next ones.
    round: usize,
    /// Which loop threads divide.
    share: Share,
    /// What tiles are told last.
    told: Told,
    /// The tiles that make a run with each panel's and follow it, itself among them, where panels are the innermost
    /// loop; and otherwise whether the tiles of a line make runs. `None` where a call computes one tile.
    runs: Option<Runs>,
    panels: Vec<PanelEntry>,
    /// By class.
    tiles: Vec<PartFunctions<T>>,
    around: Option<Around<A>>,
}

/// The last argument of a tile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    /// Row | column << 32 of its first pixel.
    Position,
    /// How many tiles of its panel have been called before, since another panel's, | tiles of the call << 32.
    Tiles,
}

/// Which tiles one call computes, where it computes more than one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Runs {
    /// Those of a panel inside of the image.
    Pixels,
    /// Those of so many panels from this one on.
    Panels(Vec<u32>),
}

/// Addresses of a walk's operands and of the model's weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bases {
    pub(crate) a: *const u8,
    pub(crate) y: *mut u8,
    /// The residual; anything where there is none.
    pub(crate) r: *const u8,
    /// The grids of rows; anything where there are none.
    pub(crate) g: *const u8,
    pub(crate) weights: *const u8,
    /// The packed weights: mostly the model's.
    pub(crate) w: *const u8,
}

/// The loops over all tiles of a cut with so many panels in all groups, and their order.
fn loops(problem: &Problem, cut: &Cut, panels: usize) -> ([Axis; AXES], [usize; AXES]) {
    let axis = |count: usize, stride: fn(&Strides) -> usize, pace: usize| {
        let [a, y, r, g] = [&problem.a, &problem.y, &problem.r, &problem.g].map(|s| stride(s) * pace);
        Axis { count, a, y, r, g }
    };
    let mut axes = [Axis { count: panels, a: 0, y: 0, r: 0, g: 0 }; AXES];
    axes[IMAGE] = axis(problem.images, |s| s.image, 1);
    axes[ROW] = axis(problem.rows.div_ceil(cut.rows), |s| s.row, cut.rows);
    axes[COL] = axis(problem.cols.div_ceil(cut.cols), |s| s.col, cut.cols);
    let mut order = match cut.order {
        Order::PanelsOuter | Order::RoundsOuter => [PANEL, IMAGE, ROW, COL],
        Order::PixelsOuter => [IMAGE, ROW, COL, PANEL],
    };
    // So that the innermost loop has more than one round, if any has.
    order.sort_by_key(|&axis| axes[axis].count > 1);
    (axes, order)
}

/// From one tile of the innermost loop to the next: bytes in input, result, residual and grids of rows, where that is a
/// loop over pixels; `None` where it is the one over panels.
pub(crate) fn pixels_to_next(problem: &Problem, cut: &Cut) -> Option<[usize; 4]> {
    let (axes, order) = loops(problem, cut, problem.groups * cut.panels.len());
    let inner = order[AXES - 1];
    let Axis { a, y, r, g, .. } = axes[inner];
    (inner != PANEL).then_some([a, y, r, g])
}

/// How many panels from each one on have their tiles where `next` says.
fn runs_of_panels(panels: &[PanelEntry], next: &Next) -> Vec<u32> {
    let moved = |to: u32, from: u32, by: i32| i64::from(to) - i64::from(from) == i64::from(by);
    let mut runs = vec![1; panels.len()];
    for i in (1..panels.len()).rev() {
        let (from, to) = (&panels[i - 1], &panels[i]);
        let follows = from.class == to.class
            && moved(to.a, from.a, next.a)
            && moved(to.weights, from.weights, next.w)
            && moved(to.params, from.params, next.params)
            && moved(to.y, from.y, next.y);
        if follows {
            runs[i - 1] = runs[i] + 1;
        }
    }
    runs
}

impl<T, A> Walk<T, A> {
    /// The walk over all tiles of a cut. `panels` are those of all groups, `tiles` the functions of their classes, which
    /// compute runs of tiles that are `next` to each other, if any.
    #[allow(clippy::too_many_arguments, reason = "all that a walk is made of")]
    pub(crate) fn new(
        problem: &Problem,
        cut: &Cut,
        share: Share,
        operands: Operands,
        panels: Vec<PanelEntry>,
        tiles: Vec<PartFunctions<T>>,
        next: Option<Next>,
        around: Option<Around<A>>,
    ) -> Walk<T, A> {
        let (axes, order) = loops(problem, cut, panels.len());
        let runs = next.map(|next| match order[AXES - 1] {
            PANEL => Runs::Panels(runs_of_panels(&panels, &next)),
            _ => Runs::Pixels,
        });
        let edge = |extent: usize, block: usize| match extent.is_multiple_of(block) {
            true => usize::MAX,
            false => extent / block,
        };
        Walk {
            operands,
            axes,
            order,
            lower_edge: edge(problem.rows, cut.rows),
            right_edge: edge(problem.cols, cut.cols),
            block: [cut.rows, cut.cols],
            extents: [problem.rows, problem.cols],
            outer: match cut.order {
                Order::PanelsOuter | Order::RoundsOuter => Share::Panels,
                Order::PixelsOuter => Share::Pixels,
            },
            round: cut.round(problem),
            share,
            told: if cut.isa == Isa::AmxInt8 { Told::Tiles } else { Told::Position },
            runs,
            panels,
            tiles,
            around,
        }
    }

    /// Number of tiles.
    pub(crate) fn units(&self) -> u64 {
        self.axes.iter().map(|axis| axis.count as u64).product()
    }

    /// The same walk with other functions.
    pub(crate) fn map<T2, A2>(self, tile: impl Fn(T) -> T2, around: impl Fn(A) -> A2) -> Walk<T2, A2> {
        let Walk { operands, axes, order, lower_edge, right_edge, block, extents, .. } = self;
        let Walk { outer, round, share, told, runs, panels, tiles, around: all, .. } = self;
        Walk {
            operands,
            axes,
            order,
            lower_edge,
            right_edge,
            block,
            extents,
            outer,
            round,
            share,
            told,
            runs,
            panels,
            tiles: tiles.into_iter().map(|parts| parts.map(|f| f.map(&tile))).collect(),
            around: all.map(|f| Around { enter: around(f.enter), leave: around(f.leave) }),
        }
    }

    /// Which loop threads divide.
    pub(crate) fn share(&self) -> Share {
        self.share
    }

    /// Blocks of pixels, of all images.
    fn blocks(&self) -> usize {
        self.axes[..PANEL].iter().map(|axis| axis.count).product()
    }

    /// The block of pixels before which there are at most this many pixels, and the part of it that completes them, as
    /// a numerator and a denominator.
    fn block_of_pixel(&self, pixel: usize) -> (usize, usize, usize) {
        let ([rows, cols], [block_rows, block_cols]) = (self.extents, self.block);
        let (image, rest) = (pixel / (rows * cols), pixel % (rows * cols));
        let (row, rest) = (rest / (block_rows * cols), rest % (block_rows * cols));
        let height = block_rows.min(rows - row * block_rows);
        let (col, rest) = (rest / (height * block_cols), rest % (height * block_cols));
        let width = block_cols.min(cols - col * block_cols);
        ((image * self.axes[ROW].count + row) * self.axes[COL].count + col, rest, height * width)
    }

    /// Where part `part` of `parts` begins: index in the loop that threads divide, and in the other one. Parts are
    /// equal in pixels times panels, up to a tile; those at the edges of an image are smaller ones.
    fn bound(&self, part: usize, parts: usize) -> [usize; 2] {
        let (pixels, panels) =
            (self.axes[IMAGE].count * self.extents[0] * self.extents[1], self.panels.len());
        let of_all = |all: usize| (all as u128 * part as u128, parts as u128);
        match self.share {
            Share::Pixels => {
                let (numerator, denominator) = of_all(pixels);
                let (block, rest, size) = self.block_of_pixel((numerator / denominator) as usize);
                [block, rest * panels / size]
            }
            Share::Panels => {
                let (numerator, denominator) = of_all(panels);
                let rest = (numerator % denominator) * pixels as u128 / denominator;
                let (block, rest, size) = self.block_of_pixel(rest as usize);
                [(numerator / denominator) as usize, block + usize::from(2 * rest > size)]
            }
        }
    }

    /// The indices of a unit, by axis.
    fn decode(&self, unit: u64) -> [usize; AXES] {
        let (mut rest, mut index) = (unit, [0; AXES]);
        for &axis in self.order.iter().rev() {
            if rest == 0 {
                break;
            }
            let count = self.axes[axis].count as u64;
            index[axis] = (rest % count) as usize;
            rest /= count;
        }
        index
    }
}

impl Walk<TileFunction, AroundFunction> {
    /// Computes part `part` of `parts`.
    ///
    /// The addresses only ever reach the tiles: they must be those of the operands and weights that the walk was made
    /// for, and the tiles those that were emitted for its strides.
    pub(crate) fn run(&self, bases: &Bases, part: usize, parts: usize) {
        if let Some(around) = &self.around {
            (around.enter)();
        }
        match parts {
            1 if self.round >= self.blocks() => self.tiles(bases, 0, self.units()),
            _ => self.between(bases, self.bound(part, parts), self.bound(part + 1, parts)),
        }
        if let Some(around) = &self.around {
            (around.leave)();
        }
    }

    /// The tiles between two positions in the loop that threads divide and the other one.
    fn between(&self, bases: &Bases, begin: [usize; 2], end: [usize; 2]) {
        let (blocks, panels) = (self.blocks() as u64, self.panels.len() as u64);
        let other = if self.share == Share::Pixels { panels } else { blocks };
        let [begin, end] = [begin, end].map(|at| at.map(|i| i as u64));
        if self.share == self.outer && self.round as u64 >= blocks {
            return self.tiles(bases, begin[0] * other + begin[1], end[0] * other + end[1]);
        }
        // The part of line `i` of the inner loop, be it the shared one or the other. The first and the last index of
        // the shared loop may be divided: only some lines of the other one begin or end with it.
        let line = |i: u64| match self.share == self.outer {
            false => (begin[0] + u64::from(i < begin[1]), end[0] + u64::from(i < end[1])),
            true => {
                let at = |bound: [u64; 2]| match i.cmp(&bound[0]) {
                    Ordering::Less => other,
                    Ordering::Equal => bound[1],
                    Ordering::Greater => 0,
                };
                (at(begin), at(end))
            }
        };
        let (lines, length) = if self.outer == Share::Panels { (panels, blocks) } else { (blocks, panels) };
        let round = if self.outer == Share::Panels { self.round as u64 } else { length };
        for start in (0..length).step_by(round as usize) {
            for i in 0..lines {
                let (first, last) = line(i);
                let (first, last) = (first.max(start), last.min(start + round));
                self.tiles(bases, i * length + first, i * length + last);
            }
        }
    }

    /// The tiles of a range of units.
    fn tiles(&self, bases: &Bases, begin: u64, end: u64) {
        if begin >= end {
            return;
        }
        let mut index = self.decode(begin);
        let mut left = (end - begin) as usize;
        let inner = self.order[AXES - 1];
        let step = self.axes[inner];
        // Mostly there is one range, and always one that begins here: multiplications would be much of its price.
        let mut before = 0;
        let [mut a, mut y, mut r, mut g] = if begin == 0 { [0; 4] } else { self.offsets(&index) };
        loop {
            let here = left.min(step.count - index[inner]);
            let end = index[inner] + here;
            while index[inner] < end {
                let panel = &self.panels[index[PANEL]];
                let part = if index[ROW] == self.lower_edge { LOWER } else { 0 }
                    + if index[COL] == self.right_edge { RIGHT } else { 0 };
                let run = self.run_at(&index, inner, end);
                let told = match self.told {
                    Told::Position => {
                        let [row, col] = [index[ROW] * self.block[0], index[COL] * self.block[1]];
                        row as u64 | (col as u64) << 32
                    }
                    Told::Tiles => before | (run as u64) << 32,
                };
                // Every part that occurs has a function.
                if let Some(tile) = self.tiles[panel.class as usize][part] {
                    tile(
                        bases.a.wrapping_add(a + panel.a as usize),
                        bases.w.wrapping_add(panel.weights as usize),
                        bases.weights.wrapping_add(panel.params as usize),
                        bases.y.wrapping_add(y + panel.y as usize),
                        bases.r.wrapping_add(r + panel.y as usize),
                        told,
                        bases.g.wrapping_add(g),
                    );
                }
                before += run as u64;
                index[inner] += run;
                (a, y, r, g) = (a + run * step.a, y + run * step.y, r + run * step.r, g + run * step.g);
            }
            left -= here;
            if left == 0 {
                return;
            }
            index[inner] = 0;
            let panel = index[PANEL];
            for &axis in self.order[..AXES - 1].iter().rev() {
                index[axis] += 1;
                if index[axis] < self.axes[axis].count {
                    break;
                }
                index[axis] = 0;
            }
            if index[PANEL] != panel {
                before = 0;
            }
            [a, y, r, g] = self.offsets(&index);
        }
    }

    /// How many tiles from this one on, before `end` in the innermost loop, one call computes.
    fn run_at(&self, index: &[usize; AXES], inner: usize, end: usize) -> usize {
        let most = end - index[inner];
        match &self.runs {
            None => 1,
            Some(Runs::Panels(runs)) => most.min(runs[index[PANEL]] as usize),
            Some(Runs::Pixels) => {
                let edge = match inner {
                    ROW => self.lower_edge,
                    COL => self.right_edge,
                    _ => usize::MAX,
                };
                // One that is an edge itself stands at the end.
                most.min(edge.wrapping_sub(index[inner])).max(1)
            }
        }
    }

    /// Byte offsets of a block in input, result, residual and grids of rows.
    fn offsets(&self, index: &[usize; AXES]) -> [usize; 4] {
        let sum = |[a, y, r, g]: [usize; 4], (axis, i): (&Axis, &usize)| {
            [a + axis.a * i, y + axis.y * i, r + axis.r * i, g + axis.g * i]
        };
        self.axes.iter().zip(index).fold([0; 4], sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dense::{Strides, choose::Panel, driver::PackedAt, spec::Product},
        module::Location,
    };
    use std::{cell::RefCell, ptr};

    thread_local! {
        /// What the functions below were called with.
        static CALLS: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
    }

    /// Which function, and its arguments.
    type Call = (&'static str, [usize; 7]);

    fn log(name: &'static str, arguments: [usize; 7]) {
        CALLS.with_borrow_mut(|calls| calls.push((name, arguments)));
    }

    macro_rules! tile {
        ($name:ident) => {
            extern "sysv64" fn $name(
                a: *const u8,
                w: *const u8,
                p: *const u8,
                y: *mut u8,
                r: *const u8,
                at: u64,
                g: *const u8,
            ) {
                let addresses = [a, w, p, y.cast_const(), r, g].map(|p| p as usize);
                let [a, w, p, y, r, g] = addresses;
                log(stringify!($name), [a, w, p, y, r, at as usize, g]);
            }
        };
    }
    tile!(interior);
    tile!(right);
    tile!(lower);
    tile!(corner);
    extern "sysv64" fn enter() {
        log("enter", [0; 7]);
    }
    extern "sysv64" fn leave() {
        log("leave", [0; 7]);
    }

    const ORDERS: [Order; 3] = [Order::PanelsOuter, Order::PixelsOuter, Order::RoundsOuter];
    /// Blocks of a round, where there are rounds.
    const ROUND: usize = 3;
    const IMAGES: usize = 2;
    const ROWS: usize = 5;
    const COLS: usize = 7;
    const A: Strides = Strides { image: 10_000, row: 700, col: 10, group: 0 };
    const Y: Strides = Strides { image: 50_000, row: 900, col: 30, group: 0 };
    const R: Strides = Strides { image: 60_000, row: 1100, col: 40, group: 0 };
    const G: Strides = Strides { image: 280, row: 56, col: 8, group: 0 };

    fn walk(
        rows: usize,
        cols: usize,
        order: Order,
        share: Share,
        panels: u32,
    ) -> Walk<TileFunction, AroundFunction> {
        let problem = Problem {
            product: Product::U8S8,
            images: IMAGES,
            rows: ROWS,
            cols: COLS,
            groups: 1,
            channels: 16 * panels as usize,
            a: A,
            y: Y,
            r: R,
            g: G,
            result_bytes: 1,
            loops: vec![],
            run: 4,
        };
        let cut_panels =
            (0..panels as usize).map(|i| Panel { first: 16 * i, width: 16, columns: 16 }).collect();
        let cut = Cut { isa: Isa::Avx512Vnni, rows, cols, panels: cut_panels, order };
        let operands =
            Operands { a: Location::Input(0), y: Location::Output(0), r: None, g: None, w: PackedAt::Model };
        let entries =
            (0..panels).map(|i| PanelEntry { a: i, weights: 64 * i, params: 7 * i, y: 3 * i, class: 0 });
        let tiles: PartFunctions<TileFunction> = [Some(interior), Some(right), Some(lower), Some(corner)];
        let around = Around { enter: enter as AroundFunction, leave: leave as AroundFunction };
        let mut walk =
            Walk::new(&problem, &cut, share, operands, entries.collect(), vec![tiles], None, Some(around));
        if order == Order::RoundsOuter {
            walk.round = ROUND;
        }
        walk
    }

    fn calls_of(walk: &Walk<TileFunction, AroundFunction>, part: usize, parts: usize) -> Vec<Call> {
        let at = |address: usize| ptr::without_provenance_mut::<u8>(address);
        let bases = Bases {
            a: at(1 << 20),
            y: at(2 << 20),
            r: at(3 << 20),
            weights: at(4 << 20),
            w: at(5 << 20),
            g: at(6 << 20),
        };
        walk.run(&bases, part, parts);
        CALLS.take()
    }

    /// All tiles, by four plain loops.
    fn expected(rows: usize, cols: usize, order: Order, panels: usize) -> Vec<Call> {
        let mut calls = Vec::new();
        let mut tile = |image: usize, row: usize, col: usize, panel: usize| {
            let name = match (row + rows > ROWS, col + cols > COLS) {
                (false, false) => "interior",
                (false, true) => "right",
                (true, false) => "lower",
                (true, true) => "corner",
            };
            let a = image * A.image + row * A.row + col * A.col + panel;
            let y = image * Y.image + row * Y.row + col * Y.col + 3 * panel;
            let r = image * R.image + row * R.row + col * R.col + 3 * panel;
            let g = image * G.image + row * G.row + col * G.col;
            let (w, p) = ((5 << 20) + 64 * panel, (4 << 20) + 7 * panel);
            let [a, y, r, g] = [a + (1 << 20), y + (2 << 20), r + (3 << 20), g + (6 << 20)];
            calls.push((name, [a, w, p, y, r, row | col << 32, g]));
        };
        let mut blocks = Vec::new();
        for image in 0..IMAGES {
            for row in (0..ROWS).step_by(rows) {
                blocks.extend((0..COLS).step_by(cols).map(|col| (image, row, col)));
            }
        }
        let round = match order {
            Order::PanelsOuter => blocks.len(),
            Order::PixelsOuter => 1,
            Order::RoundsOuter => ROUND,
        };
        for round in blocks.chunks(round) {
            for panel in 0..panels {
                round.iter().for_each(|&(image, row, col)| tile(image, row, col, panel));
            }
        }
        calls
    }

    const SHAPES: [(usize, usize, u32); 7] =
        [(2, 3, 3), (5, 7, 2), (1, 7, 1), (5, 1, 1), (3, 2, 1), (5, 7, 1), (1, 1, 5)];

    #[test]
    fn a_walk_is_its_tiles_in_order_between_enter_and_leave() {
        for order in ORDERS {
            for (rows, cols, panels) in SHAPES {
                let walk = walk(rows, cols, order, Share::Pixels, panels);
                let expected = expected(rows, cols, order, panels as usize);
                assert_eq!(walk.units(), expected.len() as u64);
                let calls = calls_of(&walk, 0, 1);
                assert_eq!(calls[0], ("enter", [0; 7]));
                assert_eq!(calls[1..=expected.len()], expected, "{rows}x{cols}, {panels} panels, {order:?}");
                assert_eq!(calls[expected.len() + 1..], [("leave", [0; 7])]);
            }
        }
    }

    #[test]
    fn parts_are_all_tiles_once_and_equal_up_to_two_tiles() {
        for (order, share) in
            ORDERS.into_iter().flat_map(|order| [Share::Panels, Share::Pixels].map(|share| (order, share)))
        {
            for (rows, cols, panels) in SHAPES {
                let walk = walk(rows, cols, order, share, panels);
                let case = format!("{rows}x{cols}, {panels} panels, {order:?}, {share:?}");
                let mut all = expected(rows, cols, order, panels as usize);
                let weight = |calls: &[Call]| -> usize {
                    let pixels = |&(name, ref arguments): &Call| {
                        let (row, col) = (arguments[5] & 0xffff_ffff, arguments[5] >> 32);
                        assert!(name != "enter" && name != "leave");
                        rows.min(ROWS - row) * cols.min(COLS - col)
                    };
                    calls.iter().map(pixels).sum()
                };
                let whole = weight(&all);
                all.sort_unstable();
                for parts in 2..=walk.units() as usize + 2 {
                    let mut together = Vec::new();
                    for part in 0..parts {
                        let mut calls = calls_of(&walk, part, parts);
                        assert_eq!(calls.remove(0).0, "enter");
                        assert_eq!(calls.pop().map(|c| c.0), Some("leave"));
                        let surplus = weight(&calls).abs_diff(whole / parts);
                        assert!(
                            surplus <= 2 * rows * cols + panels as usize,
                            "{case}: part {part} of {parts}: {surplus}"
                        );
                        together.extend(calls);
                    }
                    together.sort_unstable();
                    assert_eq!(together, all, "{case}, {parts} parts");
                }
            }
        }
    }

    #[test]
    fn threads_that_share_pixels_read_and_write_halves_of_the_image() {
        for order in ORDERS {
            let walk = walk(1, 7, order, Share::Pixels, 3);
            let calls = calls_of(&walk, 0, 2);
            // Half of ten rows of both images.
            assert!(calls.iter().all(|(_, arguments)| arguments[0] < (1 << 20) + A.image), "{order:?}");
            assert_eq!(calls.iter().filter(|c| c.0 == "interior").count(), 15);
        }
    }
}
