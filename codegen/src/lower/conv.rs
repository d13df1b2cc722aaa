//! Convolutions: implicit matrix products on channels-last images, without a copy of patches.
//!
//! A tap row of a dense convolution is one contiguous run of kernel width × channels; with dilation or groups, each
//! tap is a run of its own. Row and tap displacements are constants of the emitted tiles.

use super::{
    Lowerer, Lowering,
    product::{self, Extras, Kernel, Parts, RowGrids},
};
use crate::{
    CodegenError,
    dense::{
        Problem, Strides, WeightOrder,
        depthwise::{self, Taps},
        pad::{self, Border, Fill},
        spec::{Product, RowGrid},
        strip::{self, Axis, Strips},
        taps_fit_16_bits,
    },
    kernels::map::View,
    module::Location,
    plan::Margins,
    tier::Isa,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError,
    ops::{Clamp, Layout, Window},
};

/// `Conv`, `QConv` and `QConvToFloat`.
pub(super) const CONV: Lowerer = Lowerer { supported, lower };

/// The extents of a convolution.
struct Extents {
    images: usize,
    /// Input rows, columns, channels.
    rows: usize,
    cols: usize,
    channels: usize,
    out_rows: usize,
    out_cols: usize,
    out_channels: usize,
    groups: usize,
}

/// What they have in common.
struct Convolution<'g> {
    product: Product,
    window: &'g Window,
    extents: Extents,
    extras: Extras,
    clamp: Clamp,
    writes_floats: bool,
    /// Whether the grid of the input is known when the code runs only.
    has_grid: bool,
}

impl<'g> Convolution<'g> {
    fn of(graph: &'g Graph, node: NodeId) -> Result<Convolution<'g>, String> {
        let (product, window, layout, groups, clamp, extras) = match graph.op(node) {
            Some(Op::Conv(c)) => {
                let extras = Extras::new(c.bias, c.residual_slot());
                (Product::F32, &c.window, c.layout, c.groups, c.clamp, extras)
            }
            Some(Op::QConv(c)) => {
                let extras = Extras::new(c.bias, c.residual_slot());
                (Product::U8S8, &c.window, c.layout, c.groups, Clamp::NONE, extras)
            }
            Some(Op::QConvToFloat(c)) => {
                let extras = Extras::of_floats(&c.to);
                (Product::U8S8, &c.window, c.layout, c.groups, Clamp::NONE, extras)
            }
            _ => return Err("not a convolution".into()),
        };
        if layout != Layout::ChannelsLast {
            return Err("the layout is channels-first: only channels-last has kernels".into());
        }
        let (x, y) = (graph.shape(graph.operand(node, 0)), graph.shape(node.out()));
        let (&[images, rows, cols, channels], &[_, out_rows, out_cols, out_channels]) = (&x[..], &y[..])
        else {
            return Err(format!("{} spatial dimensions: only 2 have kernels", window.rank()));
        };
        let extents = Extents { images, rows, cols, channels, out_rows, out_cols, out_channels, groups };
        let has_grid = product::grids_at_run_time(graph, node).is_some();
        let writes_floats = product == Product::F32 || product::to_float(graph, node).is_some();
        Ok(Convolution { product, window, extents, extras, clamp, writes_floats, has_grid })
    }

    /// The margins that the window needs.
    fn margins(&self) -> Margins {
        let w = self.window;
        Margins { above: w.pads_begin[0], below: w.pads_end[0], left: w.pads_begin[1], right: w.pads_end[1] }
    }

    /// The input with these margins.
    fn surrounded(&self, margins: Margins, fill: Fill) -> Border {
        let e = &self.extents;
        let pixel = e.channels * self.product.element();
        Border {
            images: e.images,
            rows: e.rows,
            row_bytes: e.cols * pixel,
            above: margins.above,
            below: margins.below,
            left: margins.left * pixel,
            right: margins.right * pixel,
            fill,
        }
    }

    /// One pixel of the input for one of the result.
    fn is_pointwise(&self) -> bool {
        self.window.taps() == 1 && self.window.is_unpadded() && self.extents.groups == 1
    }

    /// The problem with input and result where they lie.
    fn placed(&self, cx: &mut Lowering, node: NodeId, problem: Problem) -> Result<Problem, CodegenError> {
        let strides = |v: &View, pace: [usize; 2], group: usize| Strides {
            image: v.strides[0] as usize,
            row: v.strides[1] as usize * pace[0],
            col: v.strides[2] as usize * pace[1],
            group,
        };
        let y = strides(&cx.result_view(node)?, [1, 1], problem.y.group);
        let a = match self.is_pointwise() {
            true => {
                let pace = [self.window.strides[0], self.window.strides[1]];
                strides(&cx.operand_view(node, 0)?, pace, problem.a.group)
            }
            false => problem.a,
        };
        let r = match self.extras.residual(cx.graph, node) {
            Some(residual) => strides(&cx.view(residual)?, [1, 1], problem.r.group),
            None => y,
        };
        Ok(Problem { a, y, r, ..problem })
    }

    /// The problem on an input with this border.
    fn problem(&self, border: &Border) -> Problem {
        let (e, w, element) = (&self.extents, self.window, self.product.element());
        let (row, pixel) = (border.padded_row_bytes(), e.channels * element);
        let (kernel_rows, kernel_cols) = (w.kernel[0] as u32, w.kernel[1] as u32);
        let mut loops = vec![(kernel_rows, (w.dilations[0] * row) as i32)];
        let mut run = e.channels / e.groups;
        if self.has_contiguous_rows() {
            run *= w.kernel[1];
        } else {
            loops.push((kernel_cols, (w.dilations[1] * pixel) as i32));
        }
        loops.retain(|&(trips, _)| trips > 1);
        let group = e.channels / e.groups * element;
        let result = if self.writes_floats { DType::F32.size() } else { element };
        let out_pixel = e.out_channels * result;
        let out_row = e.out_cols * out_pixel;
        let y = Strides {
            image: e.out_rows * out_row,
            row: out_row,
            col: out_pixel,
            group: e.out_channels / e.groups * result,
        };
        Problem {
            product: self.product,
            images: e.images,
            rows: e.out_rows,
            cols: e.out_cols,
            groups: e.groups,
            channels: e.out_channels / e.groups,
            a: Strides {
                image: border.padded_image_bytes(),
                row: w.strides[0] * row,
                col: w.strides[1] * pixel,
                group,
            },
            y,
            r: y,
            g: Strides::default(),
            result_bytes: result,
            loops,
            run,
        }
    }

    /// Whether every channel is a group of its own and the kernel is one that is unrolled.
    fn is_depthwise(&self) -> bool {
        let e = &self.extents;
        let has_own_channels = e.groups > 1 && e.groups == e.channels && e.groups == e.out_channels;
        has_own_channels && self.window.taps() <= depthwise::MAX_TAPS
    }

    /// The strips of a depthwise convolution on an input with this border, if they reach. What is outside of that is
    /// `padding`.
    fn strips(&self, isa: Isa, border: &Border, padding: u8) -> Option<Strips> {
        let (e, w) = (&self.extents, self.window);
        let pixel = e.channels * self.product.element();
        let own = [border.above, border.left / pixel];
        let axis = |i: usize, extent: usize, pitch: usize| Axis {
            taps: w.kernel[i],
            stride: w.strides[i],
            dilation: w.dilations[i],
            before: w.pads_begin[i] - own[i],
            extent,
            pitch,
        };
        let (row, rows) = (border.padded_row_bytes(), border.padded_rows());
        let window = [axis(0, rows, row), axis(1, row / pixel, pixel)];
        Strips::new(self.product, isa, window, padding, [e.out_rows, e.out_cols])
    }

    /// The product of a depthwise convolution with its weights on the tier.
    fn depthwise_product(&self, cx: &Lowering, node: NodeId) -> Result<Product, OpError> {
        let tier = cx.options.tier;
        if self.product != Product::U8S8 || !tier.has_faster_narrow_products() {
            return Ok(self.product);
        }
        let weights = product::constant(cx.graph, node, 1)?.as_slice::<i8>()?;
        Ok(tier.product_of_codes(taps_fit_16_bits(weights, self.window.taps())))
    }

    /// The taps of a depthwise convolution in an input with this border.
    fn depthwise_taps(&self, border: &Border) -> Option<Taps> {
        let (e, w) = (&self.extents, self.window);
        self.is_depthwise().then(|| Taps {
            rows: w.kernel[0],
            cols: w.kernel[1],
            row_stride: w.dilations[0] * border.padded_row_bytes(),
            dilation: w.dilations[1],
            stride: w.strides[1],
            pixel: e.channels * self.product.element(),
        })
    }

    /// The same problem with all single-channel groups as one, and each tap as a run of K.
    fn depthwise_problem(&self, border: &Border) -> Problem {
        let problem = self.problem(border);
        Problem { groups: 1, channels: self.extents.channels, ..problem }
    }

    /// Whether the taps of one kernel row follow each other in memory.
    fn has_contiguous_rows(&self) -> bool {
        self.window.kernel[1] == 1 || (self.window.dilations[1] == 1 && self.extents.groups == 1)
    }

    /// Where the weights `[out, in/groups, rows, cols]` lie. The problems of a convolution sum over the inputs of one tap
    /// after the other, however they cut that into runs.
    fn weight_order(&self) -> WeightOrder {
        let taps = self.window.taps();
        let inputs = self.extents.channels / self.extents.groups;
        WeightOrder { channel: inputs * taps, inputs, input: taps }
    }
}

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    let conv = Convolution::of(graph, node)?;
    let image = conv.surrounded(conv.margins(), Fill::Byte(0)).padded_image_bytes();
    if image > i32::MAX as usize {
        return Err(format!("a padded image takes {image} bytes, more than 2^31 − 1"));
    }
    product::check(graph, node, conv.extras)?;
    product::check_grids(graph, node)
}

/// Whether an operand may have any strides: the input where it is read pixel by pixel and none is outside, and the
/// residual but for depthwise kernels, which read it by the strides of the result.
pub(super) fn reads_strided(graph: &Graph, node: NodeId, slot: usize) -> bool {
    Convolution::of(graph, node).is_ok_and(|c| match slot {
        0 => c.is_pointwise(),
        _ => c.extras.residual_slot() == Some(slot) && c.extents.groups == 1,
    })
}

/// Whether the result may have any strides.
pub(super) fn writes_strided(graph: &Graph, node: NodeId) -> bool {
    Convolution::of(graph, node).is_ok_and(|c| c.extras.residual_slot().is_none() || c.extents.groups == 1)
}

/// The margins that a dense convolution needs around its input.
pub(super) fn margins(graph: &Graph, node: NodeId) -> Option<Margins> {
    let conv = Convolution::of(graph, node).ok()?;
    (conv.extents.groups == 1 && !conv.window.is_unpadded() && !conv.has_grid).then(|| conv.margins())
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    let mut conv = Convolution::of(cx.graph, node).map_err(|e| cx.refuse(node, OpError::Unsupported(e)))?;
    if conv.is_depthwise() {
        conv.product = conv.depthwise_product(cx, node).map_err(|e| cx.refuse(node, e))?;
    }
    // Padding holds the code of zero.
    let zero = cx.graph.ty(cx.graph.operand(node, 0)).per_tensor().map_or(0, |(_, z)| z) as u8;
    let grids = match conv.has_grid {
        true => Some(product::grids_of_rows(cx, node, 1)?),
        false => None,
    };
    let fill = grids.map_or(Fill::Byte(zero), |g| Fill::At(g.location, RowGrid::ZERO_POINT as i32));
    let isa = cx.options.tier.isa;
    // Strips have what is outside of the image among their constants.
    let border = conv.surrounded(if conv.has_grid { conv.margins() } else { Margins::NONE }, fill);
    if conv.is_depthwise()
        && let Some(strips) = conv.strips(isa, &border, zero)
    {
        let problem = conv.placed(cx, node, conv.depthwise_problem(&border))?;
        let overreads = strip::overreads(conv.product, isa, conv.extents.channels);
        let a = conv.input(cx, node, overreads, border)?;
        return conv.lower_kernel(cx, node, &problem, &Kernel::Strips(&strips), a, grids);
    }
    let operand = cx.graph.operand(node, 0);
    let surrounding = cx.plan.layout(operand).map(|l| l.margins).filter(|&m| m != Margins::NONE);
    let border = conv.surrounded(surrounding.unwrap_or_else(|| conv.margins()), fill);
    let taps = conv.depthwise_taps(&border);
    let (problem, overreads, kernel) = match &taps {
        Some(taps) => {
            let problem = conv.depthwise_problem(&border);
            let problem = conv.placed(cx, node, problem)?;
            (problem, depthwise::overreads(conv.product, conv.extents.channels), Kernel::Depthwise(taps))
        }
        None => {
            let problem = conv.placed(cx, node, conv.problem(&border))?.flattened();
            let overreads = problem.overreads(cx.options.tier);
            (problem, overreads, Kernel::Dense("conv"))
        }
    };
    let a = conv.input(cx, node, overreads, border)?;
    conv.lower_kernel(cx, node, &problem, &kernel, a, grids)
}

impl Convolution<'_> {
    fn lower_kernel(
        &self,
        cx: &mut Lowering,
        node: NodeId,
        problem: &Problem,
        kernel: &Kernel<'_>,
        a: Location,
        grids: Option<RowGrids>,
    ) -> Result<(), CodegenError> {
        let parts = Parts { extras: self.extras, clamp: self.clamp, grids, order: self.weight_order() };
        product::lower(cx, node, problem, kernel, a, &parts)
    }

    /// Where the input lies: itself, or a copy where it needs a border or slack behind it.
    fn input(
        &self,
        cx: &mut Lowering,
        node: NodeId,
        overreads: bool,
        border: Border,
    ) -> Result<Location, CodegenError> {
        let view = cx.operand_view(node, 0)?;
        let x = view.location;
        let operand = cx.graph.operand(node, 0);
        if let (Some(layout), Location::Arena(first)) = (cx.plan.layout(operand), x) {
            // The margins hold at least what this window needs.
            let pads = &self.window.pads_begin;
            let before = pads[0] as u64 * layout.strides[1] + pads[1] as u64 * layout.strides[2];
            return Ok(Location::Arena(first - before));
        }
        let is_external = matches!(x, Location::Input(_) | Location::Output(_));
        if border.is_empty() && !(is_external && overreads) {
            return Ok(x);
        }
        pad::lower(cx, x, border)
    }
}
