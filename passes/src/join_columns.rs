//! Convolutions of few output channels compute several neighbouring columns at once, as channels.
//!
//! A kernel computes a vector of channels at a time, of which a convolution to one channel fills a single lane. Taking G
//! columns as G times the channels, it fills G lanes: the window grows to the columns that all of them read, and each has
//! its weights where its own window is and zeros elsewhere. Results lie in memory as before, so a reshape is all that is
//! left to do. Every sum has the same summands in the same order, and zeros (0·x is not 0 where x is infinite or NaN: these
//! spread to all columns that are computed at once).

use crate::{Context, Pass, PassError, Record, edit};
use qcc_ir::{
    Graph, NodeId, Op, OpError, Shape, ValueId,
    ops::{Conv, Layout, Reshape, Slice, SliceSpec, Window},
};

/// See the module.
pub(crate) const JOIN_COLUMNS: Pass = Pass { name: "join_columns", run };

/// Lanes of the widest vectors that kernels have.
const LANES: usize = 16;
/// What a tile of a single vector of channels takes beyond its multiplications, in vectors: it loads as much as it
/// multiplies.
const LOADING: f64 = 0.5;
/// Columns that are worth a try.
const JOINED: [usize; 6] = [2, 4, 8, 16, 32, 64];
/// Less than this much of the time must be left, of what a model of it says.
const WORTH: f64 = 0.8;
/// Elements that weights may grow to.
const MAX_WEIGHTS: usize = 1 << 20;

fn run(graph: &mut Graph, ctx: &Context<'_>, record: &mut Record) -> Result<(), PassError> {
    for node in graph.order() {
        let Some(joined) = edit::live_op(graph, node).and_then(|_| Joined::of(graph, node)) else { continue };
        let name = graph.node(node).name.clone();
        if ctx.options.pin(graph, node).is_some() {
            record.declined(&name, "pinned to a device");
            continue;
        }
        joined.apply(graph, node)?;
        let (columns, channels) = (joined.columns, joined.channels);
        record.applied(&name, format!("computes {columns} columns of {channels} channels at once"));
    }
    Ok(())
}

/// A convolution that is to compute several columns at once.
struct Joined {
    conv: Conv,
    columns: usize,
    channels: usize,
}

/// About what an output column takes where so many are joined, in vectors for each column of the window of one.
fn cost(columns: usize, channels: usize, taps: usize, stride: usize) -> f64 {
    let vectors = (columns * channels).div_ceil(LANES) as f64 + LOADING;
    let window = (taps + (columns - 1) * stride) as f64;
    vectors * window / (taps * columns) as f64
}

impl Joined {
    /// `None` where it does not pay, or is none that can.
    fn of(graph: &Graph, node: NodeId) -> Option<Joined> {
        let Some(Op::Conv(conv)) = graph.op(node) else { return None };
        let Window { kernel, strides, dilations, .. } = &conv.window;
        let (&[rows, taps], &[_, stride], &[_, dilation]) = (&kernel[..], &strides[..], &dilations[..])
        else {
            return None;
        };
        let is_plain = conv.layout == Layout::ChannelsLast && conv.groups == 1 && !conv.residual;
        let weights = graph.constant_value(graph.operand(node, 1))?;
        let &[channels, inputs, ..] = weights.shape().dims() else { return None };
        let width = graph.shape(node.out()).dims()[2];
        let grown = |columns: usize| {
            (columns * channels)
                .checked_mul(inputs)?
                .checked_mul(rows)?
                .checked_mul(taps + (columns - 1) * stride)
        };
        let is_biased_at_run_time = conv.bias && edit::f32_constant(graph, graph.operand(node, 2)).is_none();
        if !is_plain || dilation != 1 || is_biased_at_run_time || weights.as_slice::<f32>().is_err() {
            return None;
        }
        let alone = cost(1, channels, taps, stride);
        let best = JOINED
            .into_iter()
            .filter(|&c| c <= width && c * channels <= 4 * LANES)
            .filter(|&c| grown(c).is_some_and(|elements| elements <= MAX_WEIGHTS))
            .map(|c| (c, cost(c, channels, taps, stride)))
            .min_by(|a, b| a.1.total_cmp(&b.1))?;
        (best.1 < WORTH * alone).then(|| Joined { conv: conv.clone(), columns: best.0, channels })
    }

    fn apply(&self, graph: &mut Graph, node: NodeId) -> Result<(), PassError> {
        let name = graph.node(node).name.clone();
        let (columns, channels) = (self.columns, self.channels);
        let operands = graph.operands(node);
        let &[images, rows, width, _] = graph.shape(node.out()).dims() else { return Ok(()) };
        let blocks = width.div_ceil(columns);
        let mut window = self.conv.window.clone();
        let (taps, stride) = (window.kernel[1], window.strides[1]);
        window.kernel[1] = taps + (columns - 1) * stride;
        window.strides[1] = stride * columns;
        // The last block may reach beyond what the last column reads.
        let reach = (blocks - 1) * window.strides[1] + window.kernel[1];
        window.pads_end[1] = reach.saturating_sub(graph.shape(operands[0])[2] + window.pads_begin[1]);
        let mut joined = vec![operands[0], self.weights(graph, &name, operands[1], taps, stride)?];
        if self.conv.bias {
            joined.push(self.bias(graph, &name, operands[2])?);
        }
        let conv = Conv { window, ..self.conv.clone() };
        let joined = graph.add(&name, conv, &joined)?;
        let all = shape(&name, &[images, rows, blocks * columns, channels])?;
        let mut y = graph.add(&format!("{name}_columns"), Reshape { shape: all }, &[joined.out()])?.out();
        if blocks * columns > width {
            let whole = |len: usize| SliceSpec { start: 0, len, step: 1 };
            let axes = [images, rows, width, channels].map(whole).to_vec();
            y = graph.add(&format!("{name}_within"), Slice { axes }, &[y])?.out();
        }
        edit::replace(graph, node, y)?;
        // Now that its name is free.
        graph.rename(joined, &name);
        Ok(())
    }

    /// The weights of each column, behind each other: where its window is, of the window of all.
    fn weights(
        &self,
        graph: &mut Graph,
        name: &str,
        weights: ValueId,
        taps: usize,
        stride: usize,
    ) -> Result<ValueId, PassError> {
        let all = taps + (self.columns - 1) * stride;
        let dims = graph.shape(weights).dims().to_vec();
        let own = edit::f32_constant(graph, weights).unwrap_or_default();
        let lines = own.len() / (taps * self.channels);
        let mut joined = vec![0.0; self.columns * self.channels * lines * all];
        for column in 0..self.columns {
            for (i, line) in own.chunks(taps).enumerate() {
                let at = (column * self.channels * lines + i) * all + column * stride;
                joined[at..at + taps].copy_from_slice(line);
            }
        }
        let dims = [self.columns * self.channels, dims[1], dims[2], all];
        edit::add_f32(graph, &format!("{name}_joined_w"), &dims, joined)
    }

    fn bias(&self, graph: &mut Graph, name: &str, bias: ValueId) -> Result<ValueId, PassError> {
        let own = edit::f32_constant(graph, bias).unwrap_or_default();
        let joined = own.repeat(self.columns);
        edit::add_f32(graph, &format!("{name}_joined_b"), &[joined.len()], joined)
    }
}

fn shape(name: &str, dims: &[usize]) -> Result<Shape, PassError> {
    Shape::new(dims).map_err(|e| PassError::op(name, "Reshape", OpError::from(e)))
}
