//! The convolutions of ResNet-50, and depthwise ones of MobileNetV2, as whole steps against the peak of the tier.
//!
//! `cargo bench --bench layers [-- TIER [MODE [pack-only]]]`. All layers are one model, so that weights go through the
//! caches as they do in the network; inputs are separate, so that every layer stands for itself. That is also why no
//! library times them: it would run one layer again and again, with its weights in cache.

#![allow(clippy::print_stdout, reason = "the result of a benchmark")]

use qcc_codegen::{Execution, Options, Serial, Tier, compile, dense::spec::Product, peak};
use qcc_ir::{
    DType, Device, Graph, OutputGrid, QuantParams, Shape, Stage, Tensor, TensorType,
    numerics::RequantMode,
    ops::{Layout, QConv, QMatMul, Window},
};
use std::{error::Error, sync::Arc, time::Duration};

/// Rounds, of which the fastest counts for each step.
const ROUNDS: usize = 15;

/// A convolution.
#[derive(Clone, Copy)]
struct Layer {
    /// Rows and columns of the input.
    size: usize,
    inputs: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
    residual: bool,
}

impl Layer {
    fn new(size: usize, inputs: usize, outputs: usize, kernel: usize, stride: usize) -> Layer {
        Layer { size, inputs, outputs, kernel, stride, groups: 1, residual: false }
    }

    fn depthwise(size: usize, channels: usize, stride: usize) -> Layer {
        Layer { groups: channels, ..Layer::new(size, channels, channels, 3, stride) }
    }
}

fn mobilenet_depthwise() -> Vec<Layer> {
    [(112, 32, 1), (112, 96, 2), (56, 144, 1), (28, 192, 1), (14, 384, 1), (7, 960, 1)]
        .map(|(size, channels, stride)| Layer::depthwise(size, channels, stride))
        .to_vec()
}

fn resnet50() -> Vec<Layer> {
    let mut layers = vec![Layer::new(224, 3, 64, 7, 2)];
    let mut input = 64;
    for (stage, &(blocks, width, size)) in
        [(3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)].iter().enumerate()
    {
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            layers.push(Layer::new(size * stride, input, width, 1, 1));
            layers.push(Layer::new(size * stride, width, width, 3, stride));
            if block == 0 {
                layers.push(Layer::new(size * stride, input, 4 * width, 1, stride));
            }
            layers.push(Layer { residual: true, ..Layer::new(size, width, 4 * width, 1, 1) });
            input = 4 * width;
        }
    }
    layers
}

/// Pseudo-random bytes.
fn bytes(seed: usize, n: usize) -> Vec<u8> {
    let mut x = seed as u64 + 1;
    (0..n)
        .map(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 40) as u8
        })
        .collect()
}

struct Model {
    graph: Graph,
    inputs: Vec<Vec<u8>>,
}

impl Model {
    fn input(&mut self, dims: &[usize]) -> Result<qcc_ir::ValueId, Box<dyn Error>> {
        let ty = TensorType::quantized(DType::U8, Shape::new(dims)?, QuantParams::per_tensor(1.0, 128)?)?;
        self.inputs.push(bytes(self.inputs.len(), ty.bytes()));
        Ok(self.graph.input("x", ty)?)
    }

    fn weights(
        &mut self,
        dims: &[usize],
        axis: usize,
        terms: usize,
    ) -> Result<qcc_ir::ValueId, Box<dyn Error>> {
        let shape = Shape::new(dims)?;
        let codes = bytes(terms, shape.elements()).into_iter().map(|b| b as i8).collect();
        let (scale, channels) = (1.0 / (90.0 * (terms as f32).sqrt()), dims[axis]);
        // Powers of two, so that every mode takes them.
        let scale = 2f32.powi(scale.log2().round() as i32);
        let quant = QuantParams::per_axis(axis, vec![scale; channels], vec![0; channels])?;
        let ty = TensorType::quantized(DType::S8, shape.clone(), quant)?;
        Ok(self.graph.quantized_constant("w", Tensor::from_vec::<i8>(shape, codes)?, ty)?)
    }

    fn convolution(&mut self, layer: Layer, mode: RequantMode) -> Result<(), Box<dyn Error>> {
        let Layer { size, inputs, outputs, kernel, stride, groups, residual } = layer;
        let pad = kernel / 2;
        let out = (size + 2 * pad - kernel) / stride + 1;
        let mut operands = vec![
            self.input(&[1, size, size, inputs])?,
            self.weights(&[outputs, inputs / groups, kernel, kernel], 0, inputs / groups * kernel * kernel)?,
        ];
        if residual {
            operands.push(self.input(&[1, out, out, outputs])?);
        }
        let conv = QConv {
            window: Window::new([kernel; 2]).strides([stride; 2]).pads([pad; 2], [pad; 2]),
            groups,
            layout: Layout::ChannelsLast,
            bias: false,
            residual,
            requant: mode,
            output: OutputGrid::full(DType::U8, 1.0, 128)?,
        };
        let name = format!("{size}x{size} {inputs}->{outputs} {kernel}x{kernel}/{stride}");
        let node = self.graph.add(&name, conv, &operands)?;
        self.graph.set_device(node, Some(Device::Int8Jit));
        self.graph.output(name, node.out());
        Ok(())
    }

    fn classifier(&mut self, mode: RequantMode) -> Result<(), Box<dyn Error>> {
        let operands = [self.input(&[1, 2048])?, self.weights(&[2048, 1000], 1, 2048)?];
        let output = OutputGrid::full(DType::U8, 1.0, 128)?;
        let product = QMatMul { bias: false, residual: false, requant: mode, output };
        let node = self.graph.add("2048->1000", product, &operands)?;
        self.graph.set_device(node, Some(Device::Int8Jit));
        self.graph.output("classes", node.out());
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let tier = match arguments.first() {
        Some(name) => Tier::from_name(name).ok_or("no such tier")?,
        None => *Tier::available().first().ok_or("no tier for this CPU")?,
    };
    let mode = match arguments.get(1) {
        Some(name) => RequantMode::from_name(name).ok_or("no such mode")?,
        None => RequantMode::Q15,
    };
    let mut model = Model { graph: Graph::new("layers"), inputs: Vec::new() };
    for layer in resnet50().into_iter().chain(mobilenet_depthwise()) {
        model.convolution(layer, mode)?;
    }
    model.classifier(mode)?;
    model.graph.stage = Stage::Placed;
    let options = Options {
        measure_pack_only: arguments.get(2).is_some_and(|a| a == "pack-only"),
        ..Options::new(tier)
    };
    let compiled = Arc::new(compile(&model.graph, &options)?);
    let peak = peak::measure(tier, Product::U8S8)?;
    println!("{tier}, {mode}: peak {peak:.0} GMAC/s, {} bytes of code", compiled.code_bytes());

    let mut execution = Execution::new(compiled.clone());
    let inputs: Vec<&[u8]> = model.inputs.iter().map(Vec::as_slice).collect();
    let mut outputs: Vec<Vec<u8>> = compiled.outputs().iter().map(|(_, ty)| vec![0; ty.bytes()]).collect();
    let mut best = vec![Duration::MAX; compiled.steps().len()];
    for _ in 0..ROUNDS {
        let mut slices: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
        let mut times = vec![Duration::ZERO; best.len()];
        execution.run(&inputs, &mut slices, &Serial, Some(&mut times))?;
        best.iter_mut().zip(times).for_each(|(b, t)| *b = t.min(*b));
    }
    let mut sums = [0.0; 3];
    for (step, time) in compiled.steps().iter().zip(&best) {
        let micros = time.as_secs_f64() * 1e6;
        let macs = step.work.macs as f64;
        let rate = macs / micros / 1e3;
        let at_peak = macs / peak / 1e3;
        if !step.kernel.contains("dwconv") {
            sums[0] += micros;
            sums[1] += if macs > 0.0 { micros } else { 0.0 };
            sums[2] += at_peak;
        }
        let share = 100.0 * at_peak / micros;
        println!(
            "{:24} {:40} {:5} units {micros:8.1} us {rate:7.1} GMAC/s {share:5.1} %",
            step.name, step.kernel, step.units
        );
    }
    let [all, products, at_peak] = sums;
    println!(
        "ResNet-50: products {products:.0} us, with copies {all:.0} us; at peak {at_peak:.0} us: {:.1} %, {:.1} %",
        100.0 * at_peak / products,
        100.0 * at_peak / all
    );
    Ok(())
}
