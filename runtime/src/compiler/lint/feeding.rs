//! How an input is fed to a network, and how else it may have been meant: normalised otherwise, with channels exchanged.

use crate::{Compiler, Error, Feed};
use qcc_ir::{
    DType, Graph, NodeId, Op, Shape, Tensor, ValueId,
    ops::{Binary, BinaryKind, Slice, SliceSpec},
};
use qcc_passes::lint::Normalisation;

/// Means and deviations of pixels that networks are trained with, and where they come from.
const KNOWN: [(&[f64], &[f64]); 5] = [
    (&[0.0], &[1.0]),
    (&[0.0], &[255.0]),
    (&[127.5], &[127.5]),
    (&IMAGENET_MEAN, &IMAGENET_STD),
    // Caffe's networks, in the order of blue, green, red.
    (&[104.0, 117.0, 123.0], &[1.0]),
];
const IMAGENET_MEAN: [f64; 3] = [123.675, 116.28, 103.53];
const IMAGENET_STD: [f64; 3] = [58.395, 57.12, 57.375];

/// How the elements of an input come about, and where it has channels.
pub(super) struct Fed {
    /// What the network sees of it.
    value: ValueId,
    /// Axis and number of channels, where it has three.
    axis: Option<usize>,
    /// Of pixels that are normalised by these means and deviations, in the order of channels of the value; of arrays, none.
    pixels: Option<(Vec<f64>, Vec<f64>)>,
    /// Whether the value has the channels in the order of the picture, red first, though the model takes blue first.
    is_turned: bool,
}

/// Another way to feed an input: y = factor·x + shift for each channel (or all), with channels exchanged before.
pub(super) struct Way {
    exchanges: bool,
    factor: Vec<f64>,
    shift: Vec<f64>,
    /// Whether it is another order of channels alone.
    pub(super) is_order: bool,
    /// What to do, so that it comes so.
    pub(super) advice: String,
}

impl Fed {
    /// `None` of what takes no floats.
    pub(super) fn of(compiler: &Compiler, graph: &Graph, input: NodeId, feed: &Feed) -> Option<Fed> {
        let channels = |shape: &Shape| match *shape.dims() {
            [_, 3, _, _] => Some(1),
            [_, _, _, 3] => Some(3),
            _ => None,
        };
        let uses = graph.uses(input.out());
        if let [only] = uses[..]
            && let Some(Op::Normalize(n)) = graph.op(only.node)
        {
            let wide = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let value = only.node.out();
            return Some(Fed {
                value,
                axis: channels(graph.shape(value)).filter(|&axis| axis == n.axis),
                pixels: Some((wide(&n.mean), wide(&n.std))),
                is_turned: compiler.preprocess.bgr,
            });
        }
        if graph.ty(input.out()).dtype != DType::F32 {
            return None;
        }
        let axis = channels(graph.shape(input.out()));
        let count = if axis.is_some() { 3 } else { 1 };
        let each = |given: &[f32], default: f64| -> Option<Vec<f64>> {
            match given {
                [] => Some(vec![default; count]),
                [one] => Some(vec![f64::from(*one); count]),
                many if many.len() == count => Some(many.iter().map(|x| f64::from(*x)).collect()),
                _ => None,
            }
        };
        let pixels = match feed.holds_pixels(&graph.node(input).name) {
            true => Some((each(&compiler.preprocess.mean, 0.0)?, each(&compiler.preprocess.std, 1.0)?)),
            false => None,
        };
        Some(Fed { value: input.out(), axis, pixels, is_turned: false })
    }

    /// The same normalisation with red and blue exchanged, where there are such.
    pub(super) fn exchanged(&self, compiler: &Compiler) -> Option<Way> {
        self.axis?;
        let way = match &self.pixels {
            Some((mean, std)) => {
                let advice = match compiler.preprocess.bgr {
                    true => "leave --bgr away: the model takes red first".into(),
                    false => "give --bgr: the model takes blue first".into(),
                };
                self.normalised(mean, std, true, advice)
            }
            None => Way {
                exchanges: true,
                factor: vec![1.0; 3],
                shift: vec![0.0; 3],
                is_order: false,
                advice: "exchange the first and the last channel of the arrays".into(),
            },
        };
        Some(Way { is_order: true, ..way })
    }

    /// Pixels that are normalised otherwise: by means and deviations in the order of channels of the value.
    fn normalised(&self, mean: &[f64], std: &[f64], exchanges: bool, advice: String) -> Way {
        let Some((own_mean, own_std)) = &self.pixels else {
            return Way { exchanges, factor: Vec::new(), shift: Vec::new(), is_order: false, advice };
        };
        let count = own_mean.len();
        // Where the pixel of channel i comes from.
        let from = |i: usize| if exchanges { count - 1 - i } else { i };
        let factor = (0..count).map(|i| own_std[from(i)] / std[i]).collect();
        let shift = (0..count).map(|i| (own_mean[from(i)] - mean[i]) / std[i]).collect();
        Way { exchanges, factor, shift, is_order: false, advice }
    }

    /// All ways that are known.
    pub(super) fn ways(&self, compiler: &Compiler) -> Vec<Way> {
        let mut ways: Vec<Way> = self.exchanged(compiler).into_iter().collect();
        let count = if self.axis.is_some() { 3 } else { 1 };
        let orders: &[bool] = if self.axis.is_some() { &[false, true] } else { &[false] };
        match &self.pixels {
            Some(_) => {
                let known = KNOWN.iter().filter(|(mean, std)| mean.len().max(std.len()) <= count);
                for ((mean, std), &exchanges) in known.flat_map(|k| orders.iter().map(move |o| (k, o))) {
                    let all = |v: &[f64]| if v.len() == 1 { vec![v[0]; count] } else { v.to_vec() };
                    let (mut mean, mut std) = (all(mean), all(std));
                    let bgr = compiler.preprocess.bgr != exchanges;
                    // The list has them by colour: Caffe's with blue first, the others with red first.
                    let is_blue_first = mean[0] == 104.0;
                    if is_blue_first != bgr {
                        mean.reverse();
                        std.reverse();
                    }
                    ways.push(self.advised(&mean, &std, exchanges, bgr));
                }
            }
            None => {
                for &exchanges in orders {
                    ways.extend(array_ways(count).into_iter().map(|(factor, shift, what)| Way {
                        exchanges,
                        factor,
                        shift,
                        is_order: false,
                        advice: match exchanges {
                            true => format!("{what}, and exchange the first and the last channel"),
                            false => what,
                        },
                    }));
                }
            }
        }
        ways
    }

    /// A way by means and deviations in the order of the model, with the options for it.
    fn advised(&self, mean: &[f64], std: &[f64], exchanges: bool, bgr: bool) -> Way {
        let advice = match (mean.iter().all(|m| *m == 0.0), std.iter().all(|s| *s == 1.0)) {
            (true, true) => {
                "leave --mean and --std away: the model takes pixels as they are, and normalises them itself if at all".into()
            }
            _ => format!("give --mean {} --std {}", numbers(mean), numbers(std)),
        };
        let advice = match (bgr, exchanges) {
            (true, true) => format!("{advice}, and --bgr: it takes blue first"),
            (false, true) => format!("{advice}, and not --bgr: it takes red first"),
            _ => advice,
        };
        let turned = |v: &[f64]| match self.is_turned {
            true => v.iter().rev().copied().collect::<Vec<_>>(),
            false => v.to_vec(),
        };
        self.normalised(&turned(mean), &turned(std), exchanges, advice)
    }

    /// What was fitted to the model, on top of another way.
    pub(super) fn fitted(&self, compiler: &Compiler, base: Option<&Way>, fit: Normalisation) -> Way {
        let exchanges = base.is_some_and(|w| w.exchanges);
        let count = if self.axis.is_some() { 3 } else { 1 };
        let (factor, shift) =
            base.map_or((vec![1.0; count], vec![0.0; count]), |w| (w.factor.clone(), w.shift.clone()));
        let of = |values: &[f64], add: f64| values.iter().map(|v| v * fit.factor + add).collect::<Vec<_>>();
        let (factor, shift) = (of(&factor, 0.0), of(&shift, fit.shift));
        match &self.pixels {
            Some((mean, std)) => {
                // (p − m)/s becomes ((p − m)/s)·f + g, that is (p − (m − g·s/f))/(s/f).
                let std: Vec<f64> = std.iter().map(|s| s / fit.factor).collect();
                let mean: Vec<f64> = mean.iter().zip(&std).map(|(m, s)| m - fit.shift * s).collect();
                let turned = |v: &[f64]| match self.is_turned {
                    true => v.iter().rev().copied().collect::<Vec<_>>(),
                    false => v.to_vec(),
                };
                let (mean, std) = (rounded(&turned(&mean)), rounded(&turned(&std)));
                Way {
                    advice: format!(
                        "{} or near to it",
                        self.advised(&mean, &std, exchanges, compiler.preprocess.bgr != exchanges).advice
                    ),
                    exchanges,
                    factor,
                    shift,
                    is_order: false,
                }
            }
            None => {
                let (by, plus) = (fit.factor, fit.shift);
                let order = if exchanges { ", and exchange the first and the last channel" } else { "" };
                Way {
                    advice: format!("multiply them by about {by:.4} and add {plus:.3}{order}"),
                    exchanges,
                    factor,
                    shift,
                    is_order: false,
                }
            }
        }
    }

    /// The same number everywhere.
    pub(super) fn constant(&self, of: f64) -> Way {
        Way { exchanges: false, factor: vec![0.0], shift: vec![of], is_order: false, advice: String::new() }
    }

    /// The graph that feeds itself in another way.
    pub(super) fn feed(&self, graph: &Graph, way: &Way) -> Result<Graph, Error> {
        let mut graph = graph.clone();
        let uses = graph.uses(self.value);
        let shape = graph.shape(self.value).clone();
        let mut value = self.value;
        if let Some(axis) = self.axis.filter(|_| way.exchanges) {
            let mut axes: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
            axes[axis] = SliceSpec { start: shape[axis] - 1, len: shape[axis], step: -1 };
            value = graph.add("exchanged", Slice { axes }, &[value])?.out();
        }
        for (kind, numbers) in [(BinaryKind::Mul, &way.factor), (BinaryKind::Add, &way.shift)] {
            let mut dims = vec![1; shape.rank()];
            if let (Some(axis), true) = (self.axis, numbers.len() > 1) {
                dims[axis] = numbers.len();
            }
            let narrow: Vec<f32> = numbers.iter().map(|x| *x as f32).take(dims.iter().product()).collect();
            let refused = |reason: String| {
                Error::Graph(qcc_ir::Error::Input { input: graph.node(self.value.node).name.clone(), reason })
            };
            let tensor = Shape::new(dims).map_err(|e| refused(e.to_string()))?;
            let tensor = Tensor::from_vec(tensor, narrow).map_err(|e| refused(e.to_string()))?;
            let numbers = graph.constant("normalisation", tensor);
            value = graph.add("normalised", Binary { kind }, &[value, numbers])?.out();
        }
        for u in uses {
            graph.set_operand(u.node, u.slot.into(), value)?;
        }
        Ok(graph)
    }
}

/// What arrays of floats may have been and should be, each with what to do to them.
fn array_ways(channels: usize) -> Vec<(Vec<f64>, Vec<f64>, String)> {
    let same = |factor: f64, shift: f64, what: &str| {
        (vec![factor; channels], vec![shift; channels], what.to_string())
    };
    let mut ways = vec![
        same(1.0 / 255.0, 0.0, "divide them by 255"),
        same(255.0, 0.0, "multiply them by 255: the model takes pixels of 0 to 255"),
        same(2.0, -1.0, "bring them from 0…1 to −1…1: 2x − 1"),
        same(0.5, 0.5, "bring them from −1…1 to 0…1: (x + 1)/2"),
        same(1.0 / 127.5, -1.0, "bring them from 0…255 to −1…1: x/127.5 − 1"),
        same(127.5, 127.5, "bring them from −1…1 to 0…255: (x + 1)·127.5"),
    ];
    if channels == 3 {
        let each = |of: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            IMAGENET_MEAN.iter().zip(IMAGENET_STD).map(|(m, s)| of(*m, s)).collect()
        };
        let imagenet = "by the mean and deviation of ImageNet";
        ways.push((
            each(&|_, s| 255.0 / s),
            each(&|m, s| -m / s),
            format!("normalise them {imagenet}: (x − {})/{}", shares(&IMAGENET_MEAN), shares(&IMAGENET_STD)),
        ));
        ways.push((
            each(&|_, s| 1.0 / s),
            each(&|m, s| -m / s),
            format!(
                "normalise them {imagenet}: (x − {})/{}",
                numbers(&IMAGENET_MEAN),
                numbers(&IMAGENET_STD)
            ),
        ));
        ways.push((
            each(&|_, s| s / 255.0),
            each(&|m, _| m / 255.0),
            format!("do not normalise them {imagenet}: the model does that itself, or takes 0 to 1"),
        ));
        ways.push((
            each(&|_, s| s),
            each(&|m, _| m),
            format!("do not normalise them {imagenet}: the model does that itself, or takes 0 to 255"),
        ));
    }
    ways
}

/// Numbers as options take them.
fn numbers(of: &[f64]) -> String {
    let all = |v: &[f64]| v.iter().map(|x| format!("{x}")).collect::<Vec<_>>().join(",");
    if of.iter().all(|x| *x == of[0]) { all(&of[..1]) } else { all(of) }
}

/// Numbers of pixels as shares of 255.
fn shares(of: &[f64]) -> String {
    of.iter().map(|x| format!("{:.3}", x / 255.0)).collect::<Vec<_>>().join(",")
}

/// To a few digits.
fn rounded(of: &[f64]) -> Vec<f64> {
    let digits =
        |x: &f64| if x.abs() >= 10.0 { (x * 10.0).round() / 10.0 } else { (x * 1000.0).round() / 1000.0 };
    of.iter().map(digits).collect()
}
