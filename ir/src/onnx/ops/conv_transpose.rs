//! Transposed convolutions, as convolutions: what kernels exist for.

use super::{
    compose::Result,
    lengths,
    window::{kernel_shape, list},
};
use crate::{
    OpError, Shape, ValueId,
    limits::MAX_ELEMENTS,
    onnx::{NodeError, import::Node},
    ops::{Clamp, Conv, Layout, Pad, PadMode, Slice, SliceSpec, Window},
};

/// One spatial dimension of a transposed convolution, and of the convolution that it becomes.
///
/// With stride s, kernel K and padding p before, result o of a transposed convolution is, with o + p = s·q + r,
///
/// ```text
/// y[s·q + r − p] = Σ_j x[q − j]·w[s·j + r]        j = 0 … ⌈K/s⌉ − 1
/// ```
///
/// so each of the s phases r is a convolution of stride 1 by every s-th tap, in reverse: one convolution with s times the
/// channels, whose results are then put next to each other. Where s = 1, taps may be any distance apart; otherwise the
/// zeros between them are taps.
#[derive(Clone, Copy, Debug)]
struct Axis {
    /// Extent of the operand.
    input: usize,
    /// Extent of the result.
    output: usize,
    kernel: usize,
    dilation: usize,
    stride: usize,
    /// Taps of a phase.
    taps: usize,
    /// Distance of the taps of a phase.
    spread: usize,
    /// Padding of the convolution.
    before: usize,
    after: usize,
    /// Elements of the phases, side by side, that precede the result.
    crop: usize,
}

/// What the attributes say of one dimension.
struct Given {
    input: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    output_padding: usize,
    pads: (usize, usize),
}

/// How padding comes about.
#[derive(Clone, Copy)]
enum Padding<'a> {
    /// As the attribute says.
    Explicit,
    /// By these extents of the result, or by stride times the operand's; the odd element at the end or at the beginning.
    ForOutput { extents: Option<&'a [usize]>, odd_at_end: bool },
}

impl Axis {
    fn new(given: &Given, padding: Padding<'_>, d: usize) -> Result<Axis> {
        let Given { input, kernel, stride, dilation, output_padding, pads } = *given;
        let limit = 1 << 31;
        let bounded = [kernel, stride, dilation, output_padding, pads.0, pads.1];
        if bounded.iter().any(|&v| v >= limit) || [kernel, stride, dilation].contains(&0) {
            let why =
                format!("kernel {kernel}, stride {stride}, dilation {dilation} or a pad is out of range");
            return Err(OpError::attribute(why).into());
        }
        if input == 0 {
            return Err(OpError::shape(format!("spatial dimension {d} is empty")).into());
        }
        let too_large =
            || NodeError::from(OpError::too_large(format!("spatial dimension {d} of the result")));
        let span = (kernel - 1) * dilation + 1;
        // Below 2^40·2^31 + 2^62, so 128 bits hold it.
        let natural = (input as u128 - 1) * stride as u128 + output_padding as u128 + span as u128;
        let (begin, output) = match padding {
            Padding::Explicit => (pads.0, natural.checked_sub(pads.0 as u128 + pads.1 as u128)),
            Padding::ForOutput { extents, odd_at_end } => {
                let output = extents.map_or(input as u128 * stride as u128, |e| e[d] as u128);
                let total = natural.saturating_sub(output);
                let begin = if odd_at_end { total / 2 } else { total.div_ceil(2) };
                (usize::try_from(begin).map_err(|_| too_large())?, Some(output))
            }
        };
        let output = output.filter(|&n| n > 0).ok_or_else(|| {
            OpError::shape(format!(
                "padding leaves nothing of the {natural} results along spatial dimension {d}"
            ))
        })?;
        let output = usize::try_from(output).ok().filter(|&n| n <= MAX_ELEMENTS).ok_or_else(too_large)?;
        let (taps, spread) = if stride == 1 { (kernel, dilation) } else { (span.div_ceil(stride), 1) };
        let reach = (taps - 1) * spread;
        let before = reach.saturating_sub(begin / stride);
        let crop = begin - stride * (reach - before);
        let positions = (crop + output).div_ceil(stride);
        let after = (positions + reach).saturating_sub(input + before);
        Ok(Axis { input, output, kernel, dilation, stride, taps, spread, before, after, crop })
    }

    /// Results of the convolution.
    fn positions(&self) -> usize {
        self.input + self.before + self.after - (self.taps - 1) * self.spread
    }
}

pub(super) fn conv_transpose(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (x, w) = (node.operand(0, "X")?, node.operand(1, "W")?);
    let bias = node.optional(2);
    conv_transpose_of(node, x, w, bias, None)
}

/// The same of these values; pads are those of the attribute where they are not given.
pub(super) fn conv_transpose_of(
    node: &mut Node<'_, '_>,
    x: ValueId,
    w: ValueId,
    bias: Option<ValueId>,
    pads: Option<Vec<usize>>,
) -> Result<ValueId> {
    let (batch, channels, spatial) = Layout::ChannelsFirst.split(&node.ty(x).shape)?;
    let weights = node.shape(w);
    if weights.rank() != spatial.len() + 2 {
        let why = format!("weights {} do not have the rank of input {}", node.ty(w), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let groups = node.count("group")?.unwrap_or(1);
    if weights[0] != channels || !channels.is_multiple_of(groups) {
        let why = format!("weights {} in {groups} groups do not take input {}", node.ty(w), node.ty(x));
        return Err(OpError::shape(why).into());
    }
    let axes = axes(node, &spatial, &weights[2..], pads)?;
    let strides: Vec<usize> = axes.iter().map(|a| a.stride).collect();
    let phases = strides.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
    let phases = phases.ok_or_else(|| OpError::too_large(format!("strides {strides:?}")))?;
    let per_group = weights[1];
    let w = phase_weights(node, w, groups, &axes)?;
    let bias = bias.map(|b| phase_bias(node, b, groups, phases, per_group)).transpose()?;
    let of = |f: fn(&Axis) -> usize| axes.iter().map(f).collect::<Vec<usize>>();
    let conv = Conv {
        window: Window::new(of(|a| a.taps))
            .dilations(of(|a| a.spread))
            .pads(of(|a| a.before), of(|a| a.after)),
        groups,
        layout: Layout::ChannelsFirst,
        bias: bias.is_some(),
        residual: false,
        clamp: Clamp::NONE,
    };
    let operands: Vec<ValueId> = [x, w].into_iter().chain(bias).collect();
    let whole = axes.iter().all(|a| a.crop == 0 && a.positions() * a.stride == a.output);
    let part = |last: bool, name: &'static str| if last { "" } else { name };
    let mut y = node.step(part(whole && phases == 1, "phases"), conv, &operands)?;
    let channels = groups.checked_mul(per_group).ok_or_else(|| OpError::too_large("output channels"))?;
    if phases > 1 {
        y = side_by_side(node, part(whole, "interleaved"), y, (batch, groups, per_group), &axes)?;
    }
    if whole {
        return Ok(y);
    }
    let mut kept = vec![SliceSpec::all(batch), SliceSpec::all(channels)];
    kept.extend(axes.iter().map(|a| SliceSpec { start: a.crop, len: a.output, step: 1 }));
    node.emit(Slice { axes: kept }, &[y])
}

fn axes(
    node: &mut Node<'_, '_>,
    spatial: &[usize],
    kernel: &[usize],
    pads: Option<Vec<usize>>,
) -> Result<Vec<Axis>> {
    let n = spatial.len();
    if let Some(declared) = kernel_shape(node)?.filter(|k| k != kernel) {
        let why = format!("is {declared:?}, but the weights have {kernel:?}");
        return Err(NodeError::attribute("kernel_shape", why));
    }
    let strides = list(node, "strides", n, 1)?;
    let dilations = list(node, "dilations", n, 1)?;
    let output_padding = list(node, "output_padding", n, 0)?;
    let pads = match pads {
        None => list(node, "pads", 2 * n, 0)?,
        Some(pads) if pads.len() == 2 * n => pads,
        Some(pads) => return Err(OpError::shape(format!("{} pads for {n} dimensions", pads.len())).into()),
    };
    let wanted = match node.ints("output_shape")? {
        None => None,
        Some(dims) => {
            // Some exporters write batch and channels, too.
            let dims = lengths("output_shape", &dims)?;
            let spatial = if dims.len() == n + 2 { dims[2..].to_vec() } else { dims };
            if spatial.len() != n {
                return Err(NodeError::attribute(
                    "output_shape",
                    format!("has {} entries for {n}", spatial.len()),
                ));
            }
            Some(spatial)
        }
    };
    let auto_pad = node.string("auto_pad", "NOTSET")?;
    let extents = wanted.as_deref();
    let padding = match (auto_pad, extents) {
        ("SAME_UPPER", extents) => Padding::ForOutput { extents, odd_at_end: true },
        ("SAME_LOWER", extents) => Padding::ForOutput { extents, odd_at_end: false },
        ("NOTSET" | "VALID", Some(_)) => Padding::ForOutput { extents, odd_at_end: false },
        ("VALID", None) if pads.iter().any(|&p| p != 0) => {
            return Err(NodeError::attribute("auto_pad", "stands beside pads, which it would override"));
        }
        ("NOTSET" | "VALID", None) => Padding::Explicit,
        (other, _) => {
            return Err(NodeError::attribute("auto_pad", format!("is {other:?}, which does not exist")));
        }
    };
    (0..n)
        .map(|d| {
            let given = Given {
                input: spatial[d],
                kernel: kernel[d],
                stride: strides[d],
                dilation: dilations[d],
                output_padding: output_padding[d],
                pads: (pads[d], pads[n + d]),
            };
            Axis::new(&given, padding, d)
        })
        .collect()
}

/// `[in, out/groups, kernel…]` as `[groups·phases·out/groups, in/groups, taps…]`, taps in reverse.
fn phase_weights(node: &mut Node<'_, '_>, w: ValueId, groups: usize, axes: &[Axis]) -> Result<ValueId> {
    let shape = node.shape(w);
    let w = dilated(node, w, axes)?;
    let n = axes.len();
    let (mut after, mut split) = (vec![0; n + 2], vec![groups, shape[0] / groups, shape[1]]);
    for (d, a) in axes.iter().enumerate() {
        after[2 + d] = (a.taps * a.stride).saturating_sub(node.shape(w)[2 + d]);
        split.extend([a.taps, a.stride]);
    }
    let w = if after.iter().all(|&p| p == 0) {
        w
    } else {
        let before = vec![0; n + 2];
        node.emit_part("weights_whole", Pad { before, after, mode: PadMode::Constant { value: 0.0 } }, &[w])?
    };
    let w = node.shaped("weights_split", split.clone(), w)?;
    let reversed = split.iter().enumerate().map(|(i, &len)| match i >= 3 && i % 2 == 1 && len > 1 {
        true => SliceSpec { start: len - 1, len, step: -1 },
        false => SliceSpec::all(len),
    });
    let axes_reversed: Vec<SliceSpec> = reversed.collect();
    let w = match axes.iter().any(|a| a.taps > 1) {
        true => node.emit_part("weights_reversed", Slice { axes: axes_reversed }, &[w])?,
        false => w,
    };
    // Groups, phases, outputs of the group; inputs of the group, taps.
    let mut perm = vec![0];
    perm.extend((0..n).map(|d| 4 + 2 * d));
    perm.extend([2, 1]);
    perm.extend((0..n).map(|d| 3 + 2 * d));
    let w = node.permuted("weights_by_phase", perm, w)?;
    let outputs = node.shape(w)[..n + 2].iter().product();
    let mut dims = vec![outputs, shape[0] / groups];
    dims.extend(axes.iter().map(|a| a.taps));
    node.shaped("weights", dims, w)
}

/// Weights with zeros for taps between those that a dilation moves apart, along dimensions with phases.
fn dilated(node: &mut Node<'_, '_>, w: ValueId, axes: &[Axis]) -> Result<ValueId> {
    let mut w = w;
    for (d, a) in axes.iter().enumerate().filter(|(_, a)| a.stride > 1 && a.dilation > 1 && a.kernel > 1) {
        let axis = 2 + d;
        let mut dims = node.shape(w).to_vec();
        dims.insert(axis + 1, 1);
        w = node.shaped(&format!("weights_apart{d}"), dims.clone(), w)?;
        w = node.padded(&format!("weights_gaps{d}"), axis + 1, a.dilation - 1, 0.0, w)?;
        dims.remove(axis + 1);
        let spread =
            a.kernel.checked_mul(a.dilation).ok_or_else(|| OpError::too_large("the dilated kernel"))?;
        dims[axis] = spread;
        w = node.shaped(&format!("weights_dilated{d}"), dims, w)?;
        let len = (a.kernel - 1) * a.dilation + 1;
        w = node.sliced(&format!("weights_span{d}"), axis, SliceSpec { start: 0, len, step: 1 }, w)?;
    }
    Ok(w)
}

/// The bias of each channel for each of its phases.
fn phase_bias(
    node: &mut Node<'_, '_>,
    bias: ValueId,
    groups: usize,
    phases: usize,
    per_group: usize,
) -> Result<ValueId> {
    let channels = groups.checked_mul(per_group);
    if channels != Some(node.shape(bias).elements()) || node.shape(bias).rank() != 1 {
        let why = format!(
            "the bias must have one number for each of {groups}·{per_group} channels, got {}",
            node.ty(bias)
        );
        return Err(OpError::shape(why).into());
    }
    if phases == 1 {
        return Ok(bias);
    }
    let bias = node.shaped("bias_groups", [groups, 1, per_group], bias)?;
    let bias = node.expanded("bias_phases", [groups, phases, per_group], bias)?;
    let all = node.shape(bias).elements();
    node.shaped("bias", [all], bias)
}

/// The phases of a convolution, `[batch, groups·phases·out/groups, positions…]`, each in its place:
/// `[batch, groups·out/groups, positions·stride…]`.
fn side_by_side(
    node: &mut Node<'_, '_>,
    part: &str,
    y: ValueId,
    (batch, groups, per_group): (usize, usize, usize),
    axes: &[Axis],
) -> Result<ValueId> {
    let n = axes.len();
    let mut apart = vec![batch, groups];
    apart.extend(axes.iter().map(|a| a.stride));
    apart.push(per_group);
    apart.extend(axes.iter().map(Axis::positions));
    let y = node.shaped("phases_apart", apart, y)?;
    let mut perm = vec![0, 1, 2 + n];
    perm.extend((0..n).flat_map(|d| [3 + n + d, 2 + d]));
    let y = node.permuted("phases_beside", perm, y)?;
    let mut dims = vec![batch, groups * per_group];
    dims.extend(axes.iter().map(|a| a.positions() * a.stride));
    node.shaped(part, Shape::new(dims)?, y)
}
