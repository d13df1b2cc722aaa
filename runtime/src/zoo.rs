//! Well-known networks for measuring, untrained but well scaled.
//!
//! Timing and the size of quantization errors depend on shapes and on the spread of values, not on what a network has
//! learned. So weights are random with the variance that He et al. (2015) derive for ReLU networks, and the
//! statistics of batch normalisations are those that the activations are expected to have, give or take a tenth:
//! every channel of every layer gets a different mean, variance, scale and offset, and activations stay in range.
//!
//! All numbers come from one generator ([`Random`]) and are the same everywhere.

use qcc_ir::{
    Error, Graph, OpError, Shape, Tensor, TensorError, TensorType, ValueId,
    ops::{
        BatchNorm, Binary, BinaryKind, Clamp, Conv, Layout, MatMul, Pool, PoolKind, Reshape, Unary,
        UnaryKind, Window,
    },
};

/// The names that [`build`] knows.
pub const NAMES: [&str; 4] = ["resnet50", "resnet50-cifar100", "mobilenetv2", "vgg16"];

/// Why a network cannot be built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ZooError {
    /// Not one of [`NAMES`].
    #[error("there is no network `{0}`; known are {known}", known = NAMES.join(", "))]
    Unknown(String),
    /// The graph refuses a node.
    #[error(transparent)]
    Graph(#[from] Error),
    /// Shapes that cannot be.
    #[error(transparent)]
    Op(#[from] OpError),
}

impl From<TensorError> for ZooError {
    fn from(e: TensorError) -> ZooError {
        OpError::from(e).into()
    }
}

/// The network of this name, with batch 1.
pub fn build(name: &str) -> Result<Graph, ZooError> {
    match name {
        "resnet50" => resnet50(),
        "resnet50-cifar100" => resnet50_cifar100(),
        "mobilenetv2" => mobilenetv2(),
        "vgg16" => vgg16(),
        _ => Err(ZooError::Unknown(name.into())),
    }
}

/// ResNet-50 v1.5 (the stride of a block in its 3x3 convolution), 224x224, 1,000 classes: 4.1 G MACs.
pub fn resnet50() -> Result<Graph, ZooError> {
    let mut net = Net::new("resnet50");
    let x = net.image(224)?;
    let x = net.conv_bn("conv1", "bn1", &x, ConvSpec::square(64, 7, 2))?;
    let x = net.relu("relu", &x, Clamp::RELU)?;
    let x = net.max_pool("maxpool", &x, Window::new([3, 3]).strides([2, 2]).pads([1, 1], [1, 1]))?;
    let x = net.bottlenecks(x)?;
    let x = net.average_and_flatten(&x)?;
    let y = net.linear("fc", &x, 1000)?;
    Ok(net.finish(&y))
}

/// ResNet-50 as it is used for CIFAR-100: a 3x3 stem of stride 1, no max-pool, 32x32, 100 classes: 1.3 G MACs.
pub fn resnet50_cifar100() -> Result<Graph, ZooError> {
    let mut net = Net::new("resnet50-cifar100");
    let x = net.image(32)?;
    let x = net.conv_bn("conv1", "bn1", &x, ConvSpec::square(64, 3, 1))?;
    let x = net.relu("relu", &x, Clamp::RELU)?;
    let x = net.bottlenecks(x)?;
    let x = net.average_and_flatten(&x)?;
    let y = net.linear("fc", &x, 100)?;
    Ok(net.finish(&y))
}

/// MobileNetV2 1.0, 224x224, 1,000 classes: 0.30 G MACs.
pub fn mobilenetv2() -> Result<Graph, ZooError> {
    /// Expansion, channels, number of blocks, stride of the first (table 2 of Sandler et al., 2018).
    const STAGES: [(usize, usize, usize, usize); 7] = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ];
    let mut net = Net::new("mobilenetv2");
    let x = net.image(224)?;
    let mut x = net.conv_bn_relu6("features.0", &x, ConvSpec::square(32, 3, 2))?;
    let mut block = 1;
    for (expansion, channels, count, stride) in STAGES {
        for i in 0..count {
            let stride = if i == 0 { stride } else { 1 };
            x = net.inverted_residual(&format!("features.{block}"), &x, expansion, channels, stride)?;
            block += 1;
        }
    }
    let x = net.conv_bn_relu6("features.18", &x, ConvSpec::square(1280, 1, 1))?;
    let x = net.average_and_flatten(&x)?;
    let y = net.linear("classifier.1", &x, 1000)?;
    Ok(net.finish(&y))
}

/// VGG-16 with batch normalisation, 224x224, 1,000 classes: 15.5 G MACs.
pub fn vgg16() -> Result<Graph, ZooError> {
    const STAGES: [(usize, usize); 5] = [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)];
    let mut net = Net::new("vgg16");
    let mut x = net.image(224)?;
    for (stage, (count, channels)) in STAGES.into_iter().enumerate() {
        for i in 0..count {
            let name = |what: &str| format!("stage{stage}.{what}{i}");
            x = net.conv_bn(&name("conv"), &name("bn"), &x, ConvSpec::square(channels, 3, 1))?;
            x = net.relu(&name("relu"), &x, Clamp::RELU)?;
        }
        x = net.max_pool(&format!("stage{stage}.pool"), &x, Window::new([2, 2]).strides([2, 2]))?;
    }
    x = net.flatten(&x)?;
    for i in 0..2 {
        x = net.linear(&format!("classifier.fc{i}"), &x, 4096)?;
        x = net.relu(&format!("classifier.relu{i}"), &x, Clamp::RELU)?;
    }
    let y = net.linear("classifier.fc2", &x, 1000)?;
    Ok(net.finish(&y))
}

/// SplitMix64 (Steele, Lea, Flood 2014) from seed 0: state += 0x9E3779B97F4A7C15, then two xor-shift-multiplies.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [lo, hi), from the upper 24 bits of a number.
    fn uniform(&mut self, lo: f32, hi: f32) -> f32 {
        lo + (hi - lo) * ((self.next() >> 40) as f32 / (1u64 << 24) as f32)
    }

    /// Uniform with mean 0 and this variance: of ±√(3·variance).
    fn with_variance(&mut self, n: usize, variance: f32) -> Vec<f32> {
        let bound = (3.0 * variance).sqrt();
        (0..n).map(|_| self.uniform(-bound, bound)).collect()
    }
}

/// What the elements of an activation are expected to be like, over all channels and places.
#[derive(Clone, Copy)]
struct Moments {
    mean: f32,
    variance: f32,
}

impl Moments {
    /// E[x²].
    fn square(self) -> f32 {
        self.variance + self.mean * self.mean
    }

    /// Of a normal variable within bounds, by the midpoint rule over ±4 standard deviations.
    fn clamped(self, clamp: Clamp) -> Moments {
        const STEPS: usize = 256;
        let (mut weight, mut sum, mut squares) = (0.0, 0.0, 0.0);
        for i in 0..STEPS {
            let z = (i as f32 + 0.5) / STEPS as f32 * 8.0 - 4.0;
            let density = (-0.5 * z * z).exp();
            let y = clamp.apply(self.mean + z * self.variance.sqrt());
            weight += density;
            sum += density * y;
            squares += density * y * y;
        }
        let mean = sum / weight;
        Moments { mean, variance: squares / weight - mean * mean }
    }
}

/// A value and what is known of it.
#[derive(Clone, Copy)]
struct Activation {
    value: ValueId,
    moments: Moments,
}

/// A square convolution without bias, padded so that stride 1 keeps the extents.
#[derive(Clone, Copy)]
struct ConvSpec {
    channels: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
    /// Range of the batch normalisation's scales.
    gamma: (f32, f32),
}

impl ConvSpec {
    fn square(channels: usize, kernel: usize, stride: usize) -> ConvSpec {
        ConvSpec { channels, kernel, stride, groups: 1, gamma: (0.6, 1.4) }
    }

    fn depthwise(channels: usize, kernel: usize, stride: usize) -> ConvSpec {
        ConvSpec { groups: channels, ..ConvSpec::square(channels, kernel, stride) }
    }

    /// The last convolution of a residual branch: a small share of the sum, which so grows slowly with depth.
    fn ends_branch(self) -> ConvSpec {
        ConvSpec { gamma: (0.2, 0.6), ..self }
    }
}

/// A network being built.
struct Net {
    graph: Graph,
    random: Random,
}

impl Net {
    fn new(name: &str) -> Net {
        Net { graph: Graph::new(name), random: Random(0) }
    }

    /// The input: an image normalised to mean 0 and variance 1.
    fn image(&mut self, extent: usize) -> Result<Activation, ZooError> {
        let value = self.graph.input("input", TensorType::f32(&[1, 3, extent, extent])?)?;
        Ok(Activation { value, moments: Moments { mean: 0.0, variance: 1.0 } })
    }

    fn finish(mut self, y: &Activation) -> Graph {
        self.graph.output("output", y.value);
        self.graph
    }

    fn constant(&mut self, name: &str, dims: &[usize], elements: Vec<f32>) -> Result<ValueId, ZooError> {
        let shape = Shape::new(dims).map_err(OpError::from)?;
        Ok(self.graph.constant(name, Tensor::from_vec(shape, elements)?))
    }

    /// A convolution and a batch normalisation that knows its statistics.
    fn conv_bn(
        &mut self,
        conv: &str,
        bn: &str,
        x: &Activation,
        spec: ConvSpec,
    ) -> Result<Activation, ZooError> {
        let inputs = self.graph.shape(x.value)[1] / spec.groups;
        let fan_in = inputs * spec.kernel * spec.kernel;
        let weights = self.random.with_variance(spec.channels * fan_in, 2.0 / fan_in as f32);
        let (mut mean, mut variance) = (vec![], vec![]);
        for w in weights.chunks_exact(fan_in) {
            let sum: f32 = w.iter().sum();
            let squares: f32 = w.iter().map(|w| w * w).sum();
            // Of a sum of independent inputs; trained statistics are a little off, too.
            let deviation = (x.moments.variance * squares).sqrt();
            mean.push(x.moments.mean * sum + deviation * self.random.uniform(-0.1, 0.1));
            variance.push(x.moments.variance * squares * self.random.uniform(0.9, 1.1));
        }
        let dims = [spec.channels, inputs, spec.kernel, spec.kernel];
        let w = self.constant(&format!("{conv}.weight"), &dims, weights)?;
        let pad = [spec.kernel / 2; 2];
        let op = Conv {
            window: Window::new([spec.kernel; 2]).strides([spec.stride; 2]).pads(pad, pad),
            groups: spec.groups,
            layout: Layout::ChannelsFirst,
            bias: false,
            residual: false,
            clamp: Clamp::NONE,
        };
        let y = self.graph.add(conv, op, &[x.value, w])?;
        let (lo, hi) = spec.gamma;
        let gamma: Vec<f32> = (0..spec.channels).map(|_| self.random.uniform(lo, hi)).collect();
        let beta: Vec<f32> = (0..spec.channels).map(|_| self.random.uniform(-0.3, 0.3)).collect();
        let mut operands = vec![y.out()];
        for (role, elements) in
            [("weight", gamma), ("bias", beta), ("running_mean", mean), ("running_var", variance)]
        {
            operands.push(self.constant(&format!("{bn}.{role}"), &[spec.channels], elements)?);
        }
        let value = self.graph.add(bn, BatchNorm { epsilon: 1e-5, axis: 1 }, &operands)?.out();
        // Over all channels: offsets spread by 0.3²/3, scales by the mean of their squares.
        let variance = (lo * lo + lo * hi + hi * hi) / 3.0 + 0.03;
        Ok(Activation { value, moments: Moments { mean: 0.0, variance } })
    }

    fn relu(&mut self, name: &str, x: &Activation, clamp: Clamp) -> Result<Activation, ZooError> {
        let kind = match clamp {
            Clamp::RELU => UnaryKind::Relu,
            Clamp { lo, hi } => UnaryKind::Clip { lo, hi },
        };
        let value = self.graph.add(name, Unary { kind }, &[x.value])?.out();
        Ok(Activation { value, moments: x.moments.clamped(clamp) })
    }

    fn conv_bn_relu6(&mut self, name: &str, x: &Activation, spec: ConvSpec) -> Result<Activation, ZooError> {
        let x = self.conv_bn(&format!("{name}.conv"), &format!("{name}.bn"), x, spec)?;
        self.relu(&format!("{name}.relu6"), &x, Clamp { lo: 0.0, hi: 6.0 })
    }

    fn add(&mut self, name: &str, a: &Activation, b: &Activation) -> Result<Activation, ZooError> {
        let value = self.graph.add(name, Binary { kind: BinaryKind::Add }, &[a.value, b.value])?.out();
        let (a, b) = (a.moments, b.moments);
        Ok(Activation {
            value,
            moments: Moments { mean: a.mean + b.mean, variance: a.variance + b.variance },
        })
    }

    fn max_pool(&mut self, name: &str, x: &Activation, window: Window) -> Result<Activation, ZooError> {
        let op = Pool { kind: PoolKind::Max, window, ceil_mode: false, layout: Layout::ChannelsFirst };
        let value = self.graph.add(name, op, &[x.value])?.out();
        // Larger than the mean of all by about one deviation, and spread less.
        let Moments { mean, variance } = x.moments;
        Ok(Activation { value, moments: Moments { mean: mean + variance.sqrt(), variance: variance * 0.7 } })
    }

    /// The four stages of ResNet-50: 3, 4, 6 and 3 blocks.
    fn bottlenecks(&mut self, mut x: Activation) -> Result<Activation, ZooError> {
        for (stage, (blocks, width)) in [(3, 64), (4, 128), (6, 256), (3, 512)].into_iter().enumerate() {
            for block in 0..blocks {
                let stride = if block == 0 && stage > 0 { 2 } else { 1 };
                x = self.bottleneck(&format!("layer{}.{block}", stage + 1), &x, width, stride)?;
            }
        }
        Ok(x)
    }

    fn bottleneck(
        &mut self,
        name: &str,
        x: &Activation,
        width: usize,
        stride: usize,
    ) -> Result<Activation, ZooError> {
        let n = |part: &str| format!("{name}.{part}");
        let y = self.conv_bn(&n("conv1"), &n("bn1"), x, ConvSpec::square(width, 1, 1))?;
        let y = self.relu(&n("relu1"), &y, Clamp::RELU)?;
        let y = self.conv_bn(&n("conv2"), &n("bn2"), &y, ConvSpec::square(width, 3, stride))?;
        let y = self.relu(&n("relu2"), &y, Clamp::RELU)?;
        let y = self.conv_bn(&n("conv3"), &n("bn3"), &y, ConvSpec::square(4 * width, 1, 1).ends_branch())?;
        let shortcut = match self.graph.shape(x.value)[1] == 4 * width {
            true => *x,
            false => {
                let spec = ConvSpec::square(4 * width, 1, stride);
                self.conv_bn(&n("downsample.0"), &n("downsample.1"), x, spec)?
            }
        };
        let sum = self.add(&n("add"), &y, &shortcut)?;
        self.relu(&n("relu3"), &sum, Clamp::RELU)
    }

    fn inverted_residual(
        &mut self,
        name: &str,
        x: &Activation,
        expansion: usize,
        channels: usize,
        stride: usize,
    ) -> Result<Activation, ZooError> {
        let n = |part: &str| format!("{name}.{part}");
        let inputs = self.graph.shape(x.value)[1];
        let width = inputs * expansion;
        let y = match expansion {
            1 => *x,
            _ => self.conv_bn_relu6(&n("expand"), x, ConvSpec::square(width, 1, 1))?,
        };
        let y = self.conv_bn_relu6(&n("depthwise"), &y, ConvSpec::depthwise(width, 3, stride))?;
        let adds = stride == 1 && inputs == channels;
        let spec = ConvSpec::square(channels, 1, 1);
        let spec = if adds { spec.ends_branch() } else { spec };
        let y = self.conv_bn(&n("project.conv"), &n("project.bn"), &y, spec)?;
        if adds { self.add(&n("add"), x, &y) } else { Ok(y) }
    }

    fn average_and_flatten(&mut self, x: &Activation) -> Result<Activation, ZooError> {
        let window = Window::new(&self.graph.shape(x.value)[2..]);
        let kind = PoolKind::Average { count_include_pad: false };
        let op = Pool { kind, window, ceil_mode: false, layout: Layout::ChannelsFirst };
        let value = self.graph.add("avgpool", op, &[x.value])?.out();
        // Neighbouring places are alike, so an average keeps much of the variance between channels.
        let moments = Moments { variance: x.moments.variance * 0.25, ..x.moments };
        self.flatten(&Activation { value, moments })
    }

    fn flatten(&mut self, x: &Activation) -> Result<Activation, ZooError> {
        let features = self.graph.shape(x.value)[1..].iter().product();
        let shape = Shape::new([1, features]).map_err(OpError::from)?;
        let value = self.graph.add("flatten", Reshape { shape }, &[x.value])?.out();
        Ok(Activation { value, ..*x })
    }

    fn linear(&mut self, name: &str, x: &Activation, outputs: usize) -> Result<Activation, ZooError> {
        let inputs = self.graph.shape(x.value)[1];
        let weights = self.random.with_variance(inputs * outputs, 2.0 / inputs as f32);
        let w = self.constant(&format!("{name}.weight"), &[inputs, outputs], weights)?;
        let bias = self.random.with_variance(outputs, 0.01);
        let b = self.constant(&format!("{name}.bias"), &[outputs], bias)?;
        let op = MatMul { bias: true, residual: false, clamp: Clamp::NONE };
        let value = self.graph.add(name, op, &[x.value, w, b])?.out();
        Ok(Activation { value, moments: Moments { mean: 0.0, variance: 2.0 * x.moments.square() } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::{Kind, NodeId, interpreter};

    fn macs(graph: &Graph) -> f64 {
        graph.nodes().map(|(id, _)| graph.macs(id)).sum::<u64>() as f64
    }

    #[test]
    fn networks_have_the_published_sizes() {
        for (name, giga_macs, mega_params) in [
            ("resnet50", 4.09, 25.6),
            ("resnet50-cifar100", 1.30, 23.7),
            ("mobilenetv2", 0.30, 3.5),
            ("vgg16", 15.5, 138.4),
        ] {
            let g = build(name).unwrap();
            let (got, expected) = (macs(&g) / 1e9, giga_macs);
            assert!((got / expected - 1.0).abs() < 0.01, "{name}: {got} G MACs");
            let is_statistic = |name: &str| name.ends_with("running_mean") || name.ends_with("running_var");
            let params: usize = g
                .nodes()
                .filter(|(_, n)| matches!(n.kind(), Kind::Constant(_)) && !is_statistic(&n.name))
                .map(|(id, _)| g.shape(id.out()).elements())
                .sum();
            assert!((params as f64 / 1e6 / mega_params - 1.0).abs() < 0.01, "{name}: {params} parameters");
            qcc_ir::verify(&g).unwrap();
        }
    }

    #[test]
    fn networks_are_the_same_each_time() {
        let (a, b) = (mobilenetv2().unwrap(), mobilenetv2().unwrap());
        let constant = |g: &Graph, id: NodeId| g.constant_value(id.out()).cloned();
        for (id, node) in a.nodes() {
            assert_eq!(node.name, b.node(id).name);
            assert_eq!(constant(&a, id), constant(&b, id), "{}", node.name);
        }
    }

    #[test]
    fn activations_stay_in_range() {
        let g = mobilenetv2().unwrap();
        let shape = g.shape(g.inputs()[0].out()).clone();
        let pixels = Random(1).with_variance(shape.elements(), 1.0);
        let image = Tensor::from_vec(shape, pixels).unwrap();
        interpreter::run_observed(&g, &[image], &mut |value, t| {
            if g.op(value.node).is_none() {
                return;
            }
            let x = t.as_slice::<f32>().unwrap();
            let rms = (x.iter().map(|x| f64::from(x * x)).sum::<f64>() / x.len() as f64).sqrt();
            assert!((0.1..10.0).contains(&rms), "{}: root mean square {rms}", g.node(value.node).name);
        })
        .unwrap();
    }

    #[test]
    fn exported_networks_take_any_batch() {
        use qcc_ir::onnx::{Bindings, ExportOptions, Model, export_with};
        for build in [resnet50_cifar100, mobilenetv2] {
            let g = build().unwrap();
            let file = export_with(&g, &ExportOptions { batch: Some("N".into()) }).unwrap();
            let model = Model::parse(file).unwrap();
            let two = Bindings { symbols: [("N".to_owned(), 2)].into(), ..Bindings::default() };
            assert_eq!(macs(&model.graph(&two).unwrap()), 2.0 * macs(&g), "{}", g.name);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let e = build("alexnet").unwrap_err().to_string();
        assert!(NAMES.iter().all(|n| e.contains(n)), "{e}");
    }
}
