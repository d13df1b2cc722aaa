//! Models that take pixels, against the same models fed with normalised images.

use qcc_runtime::{
    Compiler, Error, Model, Pixels, Precision, Preprocess, Program, Samples, Session, Tier, bundled,
    ir::{
        DType, Graph, Shape, Tensor, TensorType, numerics,
        ops::{Clamp, Conv, Layout, Pool, PoolKind, Reshape, Window},
    },
    passes::PassError,
};

/// Hashed bytes, of which some are 0 and some are 255.
fn pictures(dims: [usize; 4], seed: u32) -> Tensor {
    let shape = Shape::new(dims).unwrap();
    let byte = |i: u32| {
        let h = (i.wrapping_add(seed * 7919)).wrapping_mul(2_654_435_761);
        ((h ^ h >> 15).wrapping_mul(2_246_822_519) >> 24) as u8
    };
    let mut bytes: Vec<u8> = (0..shape.elements() as u32).map(byte).collect();
    bytes[0] = 0;
    bytes[1] = 255;
    bytes[shape.elements() - 1] = 255;
    bytes[shape.elements() - 2] = 0;
    Tensor::from_vec(shape, bytes).unwrap()
}

fn of(images: &Tensor) -> Samples {
    Samples::from_arrays(vec![("images".into(), images.clone())]).unwrap()
}

fn outputs(model: &Model, samples: &Samples, preprocess: &Preprocess) -> Vec<Vec<Tensor>> {
    let feed = samples.clone().bind(model.inputs(), preprocess).unwrap();
    let mut session = Session::new(model);
    (0..feed.batches()).map(|i| session.run(&[(&feed.batch(i).unwrap()[0]).into()]).unwrap()).collect()
}

/// A padded convolution and one more, over `channels` of `size`² pixels.
fn network(channels: usize, size: usize, layout: Layout) -> Graph {
    let mut graph = Graph::new("net");
    let dims = match layout {
        Layout::ChannelsFirst => [1, channels, size, size],
        Layout::ChannelsLast => [1, size, size, channels],
    };
    let mut x = graph.input("image", TensorType::f32(&dims).unwrap()).unwrap();
    for (i, (from, to)) in [(channels, 8), (8, 12)].into_iter().enumerate() {
        let shape = Shape::new([to, from, 3, 3]).unwrap();
        let weights = qcc_runtime::ir::text::seeded(DType::F32, &shape, i as u64 + 1);
        let w = graph.constant("w", weights);
        let b = graph.constant("b", qcc_runtime::ir::text::seeded(DType::F32, &Shape::new([to]).unwrap(), 9));
        let conv = Conv {
            window: Window::new([3, 3]).strides([2, 1]).pads([1, 2], [1, 0]),
            groups: 1,
            layout,
            bias: true,
            residual: false,
            clamp: Clamp::RELU,
        };
        x = graph.add("conv", conv, &[x, w, b]).unwrap().out();
    }
    let elements = graph.shape(x).elements();
    let flat = Reshape { shape: Shape::new([1, elements]).unwrap() };
    x = graph.add("flat", flat, &[x]).unwrap().out();
    graph.output("y", x);
    graph
}

fn preprocess(mean: &[f32], std: &[f32], bgr: bool) -> Preprocess {
    Preprocess { mean: mean.to_vec(), std: std.to_vec(), size: None, bgr }
}

/// The program that takes pixels and the one that takes normalised images, calibrated on the same images.
fn pair(graph: &Graph, pre: &Preprocess, images: &Tensor, precision: Precision) -> [Program; 2] {
    let compiler = Compiler::new().calibration(of(images)).preprocess(pre.clone()).precision(precision);
    [true, false].map(|pixels| compiler.clone().image_input(pixels).program_of_graph(graph.clone()).unwrap())
}

fn models(programs: &[Program; 2], tier: &'static Tier) -> [Model; 2] {
    [0, 1].map(|i| programs[i].jit(&qcc_runtime::JitOptions::new(tier)).unwrap())
}

#[test]
fn the_bundled_network_gives_the_same_bits_in_every_precision_on_every_tier() {
    let test = bundled::test_images().unwrap().limit(40);
    for precision in Precision::ALL {
        let compiler = Compiler::new()
            .calibration(bundled::calibration().unwrap().limit(64))
            .preprocess(bundled::preprocess())
            .precision(precision);
        let program = |pixels| {
            let compiler = compiler.clone().image_input(pixels);
            compiler.program_of_graph(compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()).unwrap()
        };
        let programs = [program(true), program(false)];
        let expected = match precision {
            Precision::Int8 => Pixels::Codes,
            Precision::Float | Precision::FakeQuant | Precision::Int8Dynamic => Pixels::Normalized,
        };
        assert_eq!(programs[0].info().pixels, Some(expected));
        assert_eq!(programs[1].info().pixels, None);
        for tier in Tier::available() {
            let [pixels, floats] = models(&programs, tier);
            assert_eq!(pixels.inputs()[0].ty.shape.dims(), [1, 28, 28, 1]);
            assert_eq!(pixels.inputs()[0].ty.dtype, DType::U8);
            let pre = bundled::preprocess();
            assert!(
                outputs(&pixels, &test, &pre) == outputs(&floats, &test, &pre),
                "{precision:?} on {tier}"
            );
        }
    }
}

#[test]
fn three_channels_on_one_grid_are_codes_in_either_order_of_axes_and_channels() {
    let images = pictures([6, 9, 9, 3], 1);
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        for bgr in [false, true] {
            let pre = preprocess(&[128.0], &[64.0], bgr);
            let programs = pair(&network(3, 9, layout), &pre, &images, Precision::Int8);
            assert_eq!(programs[0].info().pixels, Some(Pixels::Codes));
            for tier in Tier::available() {
                let [pixels, floats] = models(&programs, tier);
                let run = |m: &Model| outputs(m, &of(&images), &pre);
                assert!(run(&pixels) == run(&floats), "{layout:?} bgr {bgr} on {tier}");
            }
        }
    }
}

#[test]
fn a_folded_normalisation_differs_by_little_and_says_so() {
    let images = pictures([10, 12, 12, 3], 2);
    for (mean, bgr) in [([123.675, 116.28, 103.53], false), ([103.53, 116.28, 123.675], true)] {
        let pre = preprocess(&mean, &[58.395, 57.12, 57.375], bgr);
        for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
            let programs = pair(&network(3, 12, layout), &pre, &images, Precision::Int8);
            // In channels last, red and blue are exchanged by a step of its own, so that the convolution is not behind.
            let Some(Pixels::Folded { difference: Some(d) }) = programs[0].info().pixels.clone() else {
                assert!(
                    bgr && programs[0].info().pixels == Some(Pixels::Normalized),
                    "{:?}",
                    programs[0].info().pixels
                );
                continue;
            };
            assert_eq!(d.samples, 10);
            assert!(d.largest > 0.0 && d.largest < 0.03 * d.magnitude, "{d:?}");
            // Both are near the float network, the one that takes pixels no farther.
            let [float, _] = pair(&network(3, 12, layout), &pre, &images, Precision::Float);
            let tier = Tier::available()[0];
            let jit = qcc_runtime::JitOptions::new(tier);
            let exact = outputs(&float.jit(&jit).unwrap(), &of(&images), &pre);
            let noise = |m: &Model| -> f64 {
                let got = outputs(m, &of(&images), &pre);
                let pairs = got.iter().flatten().zip(exact.iter().flatten());
                let squares = pairs.flat_map(|(g, e)| {
                    let (g, e) = (g.to_f32().unwrap(), e.to_f32().unwrap());
                    g.into_iter().zip(e).map(|(g, e)| f64::from(g - e).powi(2)).collect::<Vec<_>>()
                });
                squares.sum()
            };
            let [pixels, floats] = models(&programs, tier);
            assert!(noise(&pixels) < 1.2 * noise(&floats), "{} {}", noise(&pixels), noise(&floats));
        }
    }
}

#[test]
fn a_border_of_whole_means_is_exact() {
    // An image of nothing but means is nothing but zeros, normalised: each result is the bias, in the border as inside.
    let mean = [124.0, 116.0, 104.0];
    let pre = preprocess(&mean, &[58.4, 57.1, 57.4], false);
    let calibration = pictures([6, 9, 9, 3], 3);
    let bytes = (0..9 * 9).flat_map(|_| mean.map(|m| m as u8)).collect();
    let flat = Tensor::from_vec(Shape::new([1, 9, 9, 3]).unwrap(), bytes).unwrap();
    let mut graph = network(3, 9, Layout::ChannelsFirst);
    // The first convolution alone.
    let first = graph.find("conv").unwrap().out();
    let dims = graph.shape(first).to_vec();
    graph.set_output(0, first);
    graph.remove_dead();
    let [pixels, _] = pair(&graph, &pre, &calibration, Precision::Int8);
    assert!(matches!(pixels.info().pixels, Some(Pixels::Folded { .. })));
    let model = pixels.jit(&qcc_runtime::JitOptions::new(Tier::available()[0])).unwrap();
    let y = Session::new(&model).run(&[(&flat).into()]).unwrap()[0].to_f32().unwrap();
    let area = dims[2] * dims[3];
    for channel in y.chunks_exact(area) {
        assert!(channel.iter().all(|v| *v == channel[0]), "{channel:?}");
    }
}

#[test]
fn what_cannot_take_pixels_is_refused_by_name() {
    let refused = |graph: Graph, pre: &Preprocess| {
        let compiler = Compiler::new().preprocess(pre.clone()).image_input(true);
        match compiler.prepare(graph) {
            Err(Error::Pass(e @ PassError::ImageInput { .. })) => e.to_string(),
            other => panic!("{:?}", other.map(|_| ())),
        }
    };
    let none = Preprocess::default();
    let mut two = network(3, 6, Layout::ChannelsFirst);
    two.input("mask", TensorType::f32(&[1, 4]).unwrap()).unwrap();
    assert!(refused(two, &none).contains("`image`, `mask` cannot take pixels"));
    let mut flat = Graph::new("flat");
    let x = flat.input("x", TensorType::f32(&[1, 7]).unwrap()).unwrap();
    flat.output("y", x);
    assert!(refused(flat, &none).contains("f32[1x7] is no image"));
    let uneven = preprocess(&[1.0, 2.0], &[], false);
    assert!(
        refused(network(3, 6, Layout::ChannelsFirst), &uneven)
            .contains("2 means and 0 deviations for 3 channels")
    );
}

#[test]
fn where_the_first_op_is_no_convolution_pixels_are_normalised_when_the_model_runs() {
    let mut graph = Graph::new("net");
    let x = graph.input("image", TensorType::f32(&[1, 3, 8, 8]).unwrap()).unwrap();
    let pool = Pool {
        kind: PoolKind::Max,
        window: Window::new([2, 2]).strides([2, 2]),
        ceil_mode: false,
        layout: Layout::ChannelsFirst,
    };
    let x = graph.add("pool", pool, &[x]).unwrap().out();
    let shape = Shape::new([5, 3, 1, 1]).unwrap();
    let w = graph.constant("w", qcc_runtime::ir::text::seeded(DType::F32, &shape, 1));
    let conv = Conv {
        window: Window::new([1, 1]),
        groups: 1,
        layout: Layout::ChannelsFirst,
        bias: false,
        residual: false,
        clamp: Clamp::NONE,
    };
    let x = graph.add("conv", conv, &[x, w]).unwrap().out();
    graph.output("y", x);
    let images = pictures([4, 8, 8, 3], 5);
    let pre = preprocess(&[123.7, 116.3, 103.5], &[58.4, 57.1, 57.4], true);
    // Of int8, which ops pay for a conversion depends on those around them; of float, nothing does.
    for precision in [Precision::Float, Precision::Int8] {
        let programs = pair(&graph, &pre, &images, precision);
        assert_eq!(programs[0].info().pixels, Some(Pixels::Normalized));
        let [pixels, floats] = models(&programs, Tier::available()[0]);
        let [got, expected] = [&pixels, &floats].map(|m| outputs(m, &of(&images), &pre));
        assert!(precision == Precision::Int8 || got == expected);
        for (g, e) in got.iter().flatten().zip(expected.iter().flatten()) {
            let (g, e) = (g.to_f32().unwrap(), e.to_f32().unwrap());
            let most = e.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(g.iter().zip(&e).all(|(g, e)| (g - e).abs() < 0.02 * most), "{g:?} {e:?}");
        }
    }
}

#[test]
fn normalisation_is_what_preprocessing_does() {
    let image = pictures([1, 1, 256, 1], 6);
    let pre = preprocess(&[72.93], &[90.015], false);
    let input = qcc_runtime::TensorInfo { name: "x".into(), ty: TensorType::f32(&[1, 1, 1, 256]).unwrap() };
    let batch = of(&image).bind(&[input], &pre).unwrap().batch(0).unwrap();
    let expected = image.as_slice::<u8>().unwrap().iter().map(|&p| numerics::normalize(p, 72.93, 90.015));
    assert!(batch[0].as_slice::<f32>().unwrap().iter().copied().eq(expected));
}
