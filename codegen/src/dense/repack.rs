//! Panels of matrices that are computed at run time: the second operands of products of two activations, which steps
//! pack before they are multiplied.
//!
//! Floats are copied. Codes are u8 q_b on one grid, and tiles multiply by s8: with q' = q_b − 128, which flips the top
//! bit, and d = z_b − 128,
//!
//! ```text
//! Σ (q_a − z_a)·(q_b − z_b) = Σ q_a·q' − z_a·Σ q' + K·z_a·d − d·Σ q_a
//! ```
//!
//! Σ q' is summed while q' is packed, and what accumulators start from is written before the panel's weights
//! ([`Start::Weights`](super::spec::Start)). The last term is there on asymmetric grids alone: it is a further run over
//! the same activations whose weights are all −d.

use super::{
    choose::Panel,
    clif_tile::multiply_add_pairs,
    pack::{self, ALIGN, PanelFormat},
    spec::Product,
};
use crate::{
    CodegenError,
    kernels::{
        map::{self, View, counted_loop, located},
        vector::{cast, constant, i8x16, i16x8, i32x4, load, shuffle},
    },
    lower::Lowering,
    model::Work,
    module::{Location, MEM},
    tier::Isa,
};
use cranelift_codegen::ir::{
    InstBuilder, Value,
    types::{I8X16, I32X4, I64, I64X2},
};
use cranelift_frontend::{FunctionBuilder, Variable};
use qcc_ir::DType;

/// The second operands of a batch of products.
pub(crate) struct SecondOperands {
    /// `[…, K, channels]`; of codes, either neighbours in a row or those in a column follow each other. Behind codes lies
    /// readable slack.
    pub(crate) view: View,
    /// Extents of the view.
    pub(crate) dims: Vec<usize>,
    /// The zero points of first and second operands of codes; `None` of floats.
    pub(crate) zero_points: Option<[i32; 2]>,
}

impl SecondOperands {
    /// Extents of the leading dimensions.
    fn lead(&self) -> &[usize] {
        &self.dims[..self.dims.len() - 2]
    }

    /// How many there are.
    pub(crate) fn matrices(&self) -> usize {
        self.lead().iter().product()
    }

    /// The weights of each further run over the activations. Their sum is −d, which itself need not be an s8.
    pub(crate) fn further_runs(&self) -> Vec<i8> {
        match self.zero_points.map_or(0, |[_, z_b]| 128 - z_b) {
            0 => vec![],
            128 => vec![64, 64],
            d => vec![d as i8],
        }
    }
}

/// Where packed matrices lie.
pub(crate) struct PackedMatrices {
    /// Byte offset of each panel in a matrix.
    pub(crate) panels: Vec<usize>,
    /// Bytes of a matrix.
    pub(crate) matrix_bytes: usize,
    /// The first matrix.
    pub(crate) location: Location,
}

/// Adds the steps that pack matrices of `inner` rows into panels. `params` are the panels' constants, which begin with
/// what accumulators start from.
///
/// Columns beyond the last channel keep what the arena held: tiles sum them, but store none of those sums.
pub(crate) fn pack(
    cx: &mut Lowering,
    isa: Isa,
    panels: &[Panel],
    params: &[Vec<u8>],
    b: &SecondOperands,
    inner: usize,
) -> Result<PackedMatrices, CodegenError> {
    let product = if b.zero_points.is_some() { Product::U8S8 } else { Product::F32 };
    let format = |panel: &Panel| PanelFormat::new(product, isa, panel.width);
    let start_groups = usize::from(b.zero_points.is_some());
    let groups = |f: PanelFormat| start_groups + (1 + b.further_runs().len()) * f.run_groups(inner);
    let bytes = |panel: &Panel| format(panel).weight_bytes(groups(format(panel))).next_multiple_of(ALIGN);
    let mut offsets = Vec::with_capacity(panels.len());
    let mut matrix_bytes = 0;
    for panel in panels {
        offsets.push(matrix_bytes);
        matrix_bytes += bytes(panel);
    }
    let location = cx.scratch(b.matrices() as u64 * matrix_bytes as u64)?;
    let [lead @ .., of_row, of_channel] = &b.view.strides[..] else {
        return Err(unpackable("not a batch of matrices"));
    };
    let (of_row, of_channel) = (*of_row, *of_channel);
    let packed = View::dense(location, DType::U8, &[b.lead(), &[matrix_bytes]].concat());
    let of_matrices = &packed.strides[..lead.len()];
    // Neighbours of one kind are one step.
    let mut at = 0;
    while let Some(first) = panels.get(at) {
        let same = panels[at..].iter().take_while(|p| (p.width, p.columns) == (first.width, first.columns));
        let count = same.count();
        let step = bytes(first) as i64;
        let source = View {
            offset: b.view.offset + first.first as i64 * of_channel,
            strides: [lead, &[of_channel * first.width as i64, of_row, of_channel]].concat(),
            ..b.view.clone()
        };
        let target = View {
            location,
            offset: offsets[at] as i64,
            strides: [of_matrices, &[step, first.width as i64 * 4, 4]].concat(),
            ..b.view.clone()
        };
        let panels = [b.lead(), &[count]].concat();
        let kind = Kind { format: format(first), columns: first.columns, panels, inner };
        match b.zero_points {
            None => {
                let dims = [&kind.panels[..], &[inner, first.columns]].concat();
                map::copy(cx, "pack", &dims, source, target)?;
            }
            Some([z_a, _]) => {
                let starts: Vec<u8> =
                    params[at..at + count].iter().flat_map(|p| &p[..4 * first.width]).copied().collect();
                kind.pack_codes(cx, &source, &target, &starts, z_a)?;
                kind.pack_further_runs(cx, &target, &b.further_runs())?;
            }
        }
        at += count;
    }
    Ok(PackedMatrices { panels: offsets, matrix_bytes, location })
}

fn unpackable(reason: &str) -> CodegenError {
    CodegenError::Backend { function: "pack".into(), reason: reason.into() }
}

/// Panels of one width and number of channels, in every matrix.
struct Kind {
    format: PanelFormat,
    columns: usize,
    /// Matrices, by their leading dimensions, and panels of each.
    panels: Vec<usize>,
    /// K.
    inner: usize,
}

/// Bytes of K, or channels, that are taken in one vector.
const VECTOR: usize = 16;
/// Channels whose groups fill a vector: neighbours in a panel, whatever the order of its columns.
const CHUNK: usize = 4;

impl Kind {
    /// Adds the step that packs these panels and writes what their accumulators start from.
    fn pack_codes(
        &self,
        cx: &mut Lowering,
        source: &View,
        target: &View,
        starts: &[u8],
        z_a: i32,
    ) -> Result<(), CodegenError> {
        let lead = self.panels.len();
        let lines = match source.strides[lead..] {
            [of_row, 1] => Lines::Rows { stride: of_row },
            [1, of_channel] => Lines::Columns { stride: of_channel },
            _ => return Err(unpackable("neither rows nor columns of a second operand are contiguous")),
        };
        let starts = Location::Weights(cx.weights(starts, ALIGN)?);
        let group = self.format.weight_bytes(1);
        let panels = self.panels.iter().product::<usize>();
        let work = Work {
            bytes_read: (panels * self.columns * self.inner) as u64,
            bytes_written: (panels * group * (1 + self.format.run_groups(self.inner))) as u64,
            ..Work::default()
        };
        let extents: Vec<u64> = self.panels.iter().map(|&n| n as u64).collect();
        // All matrices share what their accumulators start from.
        let mut of_starts = vec![0; lead];
        of_starts[lead - 1] = group as i64;
        let strides = [source.strides[..lead].to_vec(), target.strides[..lead].to_vec(), of_starts];
        cx.step("pack", panels as u64, work, |e, ctx, begin, end| {
            let places = [(source.location, source.offset), (target.location, target.offset), (starts, 0)];
            let bases = places.map(|(location, offset)| {
                let base = e.address(ctx, location);
                map::offset(&mut e.b, base, offset)
            });
            counted_loop(&mut e.b, begin, end, |b, unit| {
                let at = located(b, unit, &extents, &strides, &bases);
                let mut packer = Packer { kind: self, z_a, b };
                packer.panel(lines, [at[0], at[1], at[2]]);
            });
            Ok(())
        })
    }

    /// Adds the step that writes the further runs, which hold one weight each.
    fn pack_further_runs(
        &self,
        cx: &mut Lowering,
        target: &View,
        weights: &[i8],
    ) -> Result<(), CodegenError> {
        if weights.is_empty() {
            return Ok(());
        }
        let run = |_, run: usize, _| weights[run];
        let packed = pack::pack_weights(self.format, 0..self.columns, weights.len(), self.inner, run);
        let lead = self.panels.len();
        let dims = [&self.panels[..], &[packed.len()]].concat();
        let from = Location::Weights(cx.weights(&packed, ALIGN)?);
        let mut source = View::dense(from, DType::U8, &dims);
        source.strides[..lead].fill(0);
        let before = self.format.weight_bytes(1 + self.format.run_groups(self.inner));
        let target = View {
            offset: target.offset + before as i64,
            strides: [&target.strides[..lead], &[1]].concat(),
            ..target.clone()
        };
        map::copy(cx, "pack", &dims, source, target)
    }
}

/// How the codes of a matrix follow each other.
#[derive(Clone, Copy)]
enum Lines {
    /// Channels do; bytes from one element of K to the next.
    Rows { stride: i64 },
    /// Elements of K do; bytes from one channel to the next.
    Columns { stride: i64 },
}

/// Emits the packing of one panel.
struct Packer<'k, 'f, 'a> {
    kind: &'k Kind,
    z_a: i32,
    b: &'f mut FunctionBuilder<'a>,
}

/// Four channels on their way.
struct Chunk {
    /// Address of their weights in the first group.
    weights: Value,
    /// Addresses of what their accumulators start from: constants, and where the sum goes.
    starts: [Value; 2],
    /// Their sums of q'.
    sums: Variable,
}

impl Packer<'_, '_, '_> {
    /// From the panel's codes, to its place, with these constants.
    fn panel(&mut self, lines: Lines, [source, target, starts]: [Value; 3]) {
        let chunks = self.kind.columns.div_ceil(CHUNK);
        let at_once = match lines {
            Lines::Rows { .. } => (self.kind.format.panel / CHUNK).min(VECTOR / CHUNK),
            Lines::Columns { .. } => 1,
        };
        self.repeat(chunks.div_ceil(at_once), |packer, block| {
            let first = packer.b.ins().imul_imm_s(block, at_once as i64);
            let chunks: Vec<Chunk> = (0..at_once).map(|i| packer.chunk(first, i, target, starts)).collect();
            match lines {
                Lines::Rows { stride } => {
                    let channels = packer.b.ins().imul_imm_s(first, CHUNK as i64);
                    let from = packer.b.ins().iadd(source, channels);
                    packer.rows(from, stride, &chunks);
                }
                Lines::Columns { stride } => packer.columns(source, first, stride, &chunks[0]),
            }
            for chunk in &chunks {
                packer.finish(chunk);
            }
        });
    }

    /// Chunk `first + i` of the panel.
    fn chunk(&mut self, first: Value, i: usize, target: Value, starts: Value) -> Chunk {
        let format = self.kind.format;
        let b = &mut *self.b;
        // Channel 4·(vectors·lane + v) is column lanes·v + 4·lane: see `PanelFormat::channel_of_column`.
        let chunk = b.ins().iadd_imm_s(first, i as i64);
        let lane = b.ins().udiv_imm_u(chunk, format.vectors() as i64);
        let whole = b.ins().imul_imm_s(lane, format.vectors() as i64);
        let v = b.ins().isub(chunk, whole);
        let v = b.ins().imul_imm_s(v, format.lanes() as i64);
        let lane = b.ins().imul_imm_s(lane, CHUNK as i64);
        let column = b.ins().iadd(v, lane);
        let of_column = |b: &mut FunctionBuilder, base: Value, bytes: i64| {
            let at = b.ins().imul_imm_s(column, bytes);
            b.ins().iadd(base, at)
        };
        let weights = of_column(b, target, if format.is_widened() { 2 } else { 4 });
        let weights = b.ins().iadd_imm_s(weights, format.weight_bytes(1) as i64);
        let starts = [of_column(b, starts, 4), of_column(b, target, 4)];
        let sums = b.declare_var(I32X4);
        let zero = i32x4(b, 0);
        b.def_var(sums, zero);
        Chunk { weights, starts, sums }
    }

    /// All groups of these chunks, 4 rows at a time.
    fn rows(&mut self, from: Value, stride: i64, chunks: &[Chunk]) {
        let step = Product::U8S8.group();
        let group = self.kind.format.weight_bytes(1) as i64;
        let (whole, rest) = (self.kind.inner / step, self.kind.inner % step);
        self.repeat(whole, |packer, g| {
            let first = packer.b.ins().imul_imm_s(g, step as i64 * stride);
            let first = packer.b.ins().iadd(from, first);
            let at = packer.b.ins().imul_imm_s(g, group);
            packer.rows_of_group(first, stride, step, at, chunks);
        });
        if rest > 0 {
            let first = self.b.ins().iadd_imm_s(from, (whole * step) as i64 * stride);
            let at = self.b.ins().iconst(I64, whole as i64 * group);
            self.rows_of_group(first, stride, rest, at, chunks);
        }
        self.zeros(self.kind.inner.div_ceil(step), chunks);
    }

    /// The group at byte `at` from its first, of which so many rows exist.
    fn rows_of_group(&mut self, first: Value, stride: i64, rows: usize, at: Value, chunks: &[Chunk]) {
        let mut from = first;
        let rows: [Value; 4] = std::array::from_fn(|row| {
            if row >= rows {
                return i8x16(self.b, 0);
            }
            let codes = self.signed(from);
            from = self.b.ins().iadd_imm_s(from, stride);
            codes
        });
        let low = self.unpacked(1, [rows[0], rows[1]]);
        let high = self.unpacked(1, [rows[2], rows[3]]);
        let groups: Vec<Value> = (0..2).flat_map(|i| self.unpacked(2, [low[i], high[i]])).collect();
        for (chunk, codes) in chunks.iter().zip(groups) {
            self.store(chunk, at, codes);
        }
    }

    /// All groups of one chunk, 16 elements of its 4 columns at a time.
    fn columns(&mut self, source: Value, chunk: Value, stride: i64, to: &Chunk) {
        let last = self.b.ins().iconst(I64, self.kind.columns as i64 - 1);
        let channel = self.b.ins().imul_imm_s(chunk, CHUNK as i64);
        let lines: [Value; CHUNK] = std::array::from_fn(|i| {
            // Channels that do not exist are copies of the last one: behind it, nothing can be read.
            let channel = self.b.ins().iadd_imm_s(channel, i as i64);
            let channel = self.b.ins().umin(channel, last);
            let at = self.b.ins().imul_imm_s(channel, stride);
            self.b.ins().iadd(source, at)
        });
        let step = Product::U8S8.group();
        let (whole, rest) = (self.kind.inner / VECTOR, self.kind.inner % VECTOR);
        self.repeat(whole, |packer, block| {
            let at = packer.b.ins().imul_imm_s(block, VECTOR as i64);
            packer.columns_of_block(lines, at, VECTOR, to);
        });
        if rest > 0 {
            let at = self.b.ins().iconst(I64, (whole * VECTOR) as i64);
            self.columns_of_block(lines, at, rest, to);
        }
        self.zeros(self.kind.inner.div_ceil(step), std::slice::from_ref(to));
    }

    /// The groups of a block of elements of K that begins with element `k`, of which so many exist.
    fn columns_of_block(&mut self, lines: [Value; CHUNK], k: Value, elements: usize, to: &Chunk) {
        let exists: [u8; VECTOR] = std::array::from_fn(|i| if i < elements { 0xff } else { 0 });
        let codes = lines.map(|line| {
            let at = self.b.ins().iadd(line, k);
            let codes = self.signed(at);
            if elements == VECTOR {
                return codes;
            }
            let mask = constant(self.b, I8X16, &exists);
            self.b.ins().band(codes, mask)
        });
        let [a, b] = self.unpacked(4, [codes[0], codes[1]]);
        let [c, d] = self.unpacked(4, [codes[2], codes[3]]);
        let [low, high] = [self.unpacked(8, [a, c]), self.unpacked(8, [b, d])];
        let step = Product::U8S8.group();
        // A group is 4 elements.
        let at = self.b.ins().imul_imm_s(k, (self.kind.format.weight_bytes(1) / step) as i64);
        for (g, codes) in low.into_iter().chain(high).enumerate().take(elements.div_ceil(step)) {
            let at = self.b.ins().iadd_imm_s(at, self.kind.format.weight_bytes(g) as i64);
            self.store(to, at, codes);
        }
    }

    /// The groups that pad the run to what a tile takes at once.
    fn zeros(&mut self, first: usize, chunks: &[Chunk]) {
        let format = self.kind.format;
        let missing = format.run_groups(self.kind.inner) - first;
        self.repeat(missing, |packer, g| {
            let at = packer.b.ins().imul_imm_s(g, format.weight_bytes(1) as i64);
            let at = packer.b.ins().iadd_imm_s(at, format.weight_bytes(first) as i64);
            let zero = i8x16(packer.b, 0);
            for chunk in chunks {
                packer.place(chunk, at, zero);
            }
        });
    }

    /// Packs and sums a group of four channels.
    fn store(&mut self, chunk: &Chunk, at: Value, codes: Value) {
        self.place(chunk, at, codes);
        let b = &mut *self.b;
        // Σ q'·1, in 16 bits and then in 32: neither saturates.
        let ones = i8x16(b, 1);
        let pairs = b.ins().x86_pmaddubsw(codes, ones);
        let ones = i16x8(b, 1);
        let sums = multiply_add_pairs(b, pairs, ones);
        let before = b.use_var(chunk.sums);
        let sums = b.ins().iadd(before, sums);
        b.def_var(chunk.sums, sums);
    }

    /// Writes a group of four channels, `[4][4]`, where tiles want it.
    fn place(&mut self, chunk: &Chunk, at: Value, codes: Value) {
        let b = &mut *self.b;
        let to = b.ins().iadd(chunk.weights, at);
        if !self.kind.format.is_widened() {
            b.ins().store(MEM, codes, to, 0);
            return;
        }
        // Pairs of K apart: `[2][NR][2]`.
        let apart = constant(b, I8X16, &[0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]);
        let codes = b.ins().x86_pshufb(codes, apart);
        let codes = cast(b, I64X2, codes);
        for half in 0..2 {
            let pairs = b.ins().extractlane(codes, half);
            b.ins().store(MEM, pairs, to, i32::from(half) * self.kind.format.panel as i32 * 2);
        }
    }

    /// Writes what the accumulators of a chunk start from.
    fn finish(&mut self, chunk: &Chunk) {
        let b = &mut *self.b;
        let [from, to] = chunk.starts;
        let mut start = load(b, I32X4, from, 0);
        if self.z_a != 0 {
            let sums = b.use_var(chunk.sums);
            let z_a = i32x4(b, self.z_a);
            let correction = b.ins().imul(sums, z_a);
            start = b.ins().isub(start, correction);
        }
        b.ins().store(MEM, start, to, 0);
    }

    /// 16 codes minus 128.
    fn signed(&mut self, at: Value) -> Value {
        let codes = load(self.b, I8X16, at, 0);
        let top = i8x16(self.b, 0x80);
        self.b.ins().bxor(codes, top)
    }

    /// The low halves of two vectors, and their high halves, interleaved in units of `size` bytes.
    fn unpacked(&mut self, size: usize, [x, y]: [Value; 2]) -> [Value; 2] {
        [0, VECTOR / 2].map(|half| {
            let pick = std::array::from_fn(|i| {
                let (unit, byte) = (i / size, i % size);
                (half + unit / 2 * size + byte + unit % 2 * VECTOR) as u8
            });
            shuffle(self.b, x, y, pick)
        })
    }

    /// `for i in 0..count`, which may be none.
    fn repeat(&mut self, count: usize, body: impl FnOnce(&mut Packer<'_, '_, '_>, Value)) {
        let (kind, z_a) = (self.kind, self.z_a);
        let zero = self.b.ins().iconst(I64, 0);
        match count {
            0 => {}
            1 => body(self, zero),
            _ => {
                let count = self.b.ins().iconst(I64, count as i64);
                counted_loop(self.b, zero, count, |b, i| body(&mut Packer { kind, z_a, b }, i));
            }
        }
    }
}
