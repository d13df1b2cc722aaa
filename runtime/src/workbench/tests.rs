use super::{observation::observe_layers, *};
use crate::{Session, TensorView, bundled, observe::Observed};
use qcc_ir::{Tensor, ValueId, numerics::RequantMode};
use qcc_passes::quantized_layers;

fn compiler(samples: usize) -> Compiler {
    Compiler::new()
        .calibration(bundled::calibration().unwrap().limit(samples))
        .preprocess(bundled::preprocess())
}

fn graph(compiler: &Compiler) -> Graph {
    compiler.import_onnx(bundled::FASHION_RESNET8).unwrap()
}

fn quick(compiler: Compiler) -> Setup {
    Setup { samples: 8, reps: 2, ..Setup::new("fashion", compiler) }
}

fn found(setup: &Setup) -> Facts {
    facts(setup, graph(&setup.compiler), &|_, _, _| {}).unwrap()
}

#[test]
fn facts_of_a_quantized_model_hold_together() {
    let images = bundled::test_images().unwrap().limit(40);
    let setup = Setup {
        images: Some(images),
        command: Some(vec!["report".into(), "x.onnx".into()]),
        ..quick(compiler(16))
    };
    let facts = found(&setup);
    let names: Vec<&str> = facts.contenders.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["float", "fake-quant", "int8 q15"]);
    for c in &facts.contenders {
        let accuracy = c.accuracy.unwrap();
        assert!(accuracy.samples == 40 && accuracy.agreement > 0.9 && accuracy.top1.unwrap() > 0.8, "{c:?}");
        assert!(c.latency_ms.median > 0.0 && c.file_bytes > c.weight_bytes / 2 && c.macs > 1_000_000);
    }
    let [float, _, int8] = &facts.contenders[..] else { panic!("three contenders") };
    assert!(2 * int8.file_bytes < float.file_bytes, "{} {}", int8.file_bytes, float.file_bytes);
    assert_eq!(float.accuracy.unwrap().sqnr, Some(crate::Decibels(f64::INFINITY)));

    let products: Vec<&LayerFacts> = facts.layers.iter().filter(|l| l.macs > 0).collect();
    assert!(products.len() >= 8 && facts.layers[0].op == "input", "{:?}", facts.layers[0]);
    for l in &products {
        let LayerError { local, causes, cumulative, cumulative_int8, saturation, codes, lsb } =
            l.error.clone();
        let (local, cumulative) = (local.unwrap().0, cumulative.unwrap().0);
        assert!(local > 20.0 && cumulative > 15.0, "{}: {local} {cumulative}", l.name);
        let causes = causes.unwrap();
        assert!((causes.inputs + causes.parameters + causes.result - 1.0).abs() < 1e-9);
        assert_eq!(
            (l.computed, l.lowered.as_deref().map(|o| o.starts_with('Q'))),
            (Computed::Int8, Some(true))
        );
        let weights = l.weights.as_ref().unwrap();
        assert!(
            weights.groups.len() <= MOST_PARTS
                && weights.groups.iter().all(|g| g.scale.is_some() && g.min <= g.max)
        );
        let values = l.values.as_ref().unwrap();
        assert_eq!(values.counts.iter().sum::<u64>(), values.elements);
        assert!(values.counts.len() <= MOST_PARTS && values.elements > 0);
        let (Some(grid), Some(saturation), Some(codes), Some(lsb)) = (l.grid, saturation, codes, lsb) else {
            panic!("{} has no grid", l.name)
        };
        // q15 is one step off in a percent of the codes; that travels, and a step of a residual may be two of the sum.
        assert!(
            lsb.equal > 0.8
                && lsb.beyond_one < 0.1
                && lsb.largest < 8
                && lsb.counts.iter().sum::<u64>() == values.elements,
            "{lsb:?}"
        );
        assert!((cumulative_int8.unwrap().0 - cumulative).abs() < 3.0, "{}", l.name);
        assert!(
            grid.min <= 0.0
                && grid.max > 0.0
                && codes.used > 1
                && codes.used <= codes.of
                && codes.bits <= 8.0
        );
        assert!(saturation.below + saturation.above < 0.05, "{saturation:?}");
        assert!(
            l.time.float_ms.unwrap() > 0.0 && l.time.quantized_ms.unwrap() > 0.0 && l.time.bound_ms > 0.0
        );
    }
    for e in &facts.edges {
        assert!(e.from < e.to && e.to < facts.layers.len());
    }
    assert!(facts.layers[1..].iter().enumerate().all(|(i, _)| facts.edges.iter().any(|e| e.to == i + 1)));
    let shares: f64 = facts.time.parts.iter().map(|p| p.share).sum();
    assert!((shares - 1.0).abs() < 1e-9 && !facts.time.sentences.is_empty(), "{:?}", facts.time);
    let [speed, accuracy, worst] = &facts.verdict[..] else { panic!("{:?}", facts.verdict) };
    assert!(
        speed.starts_with("int8 q15 is ") && accuracy.contains("of 40 images; top-1 is"),
        "{:?}",
        facts.verdict
    );
    assert!(worst.contains(&format!("`{}`", facts.by_local_error()[0].0.name)), "{worst}");
    // 16 samples are few.
    let more = facts.next.iter().find(|s| s.title == "Calibrate on more samples").unwrap();
    assert_eq!(
        more.command.as_ref().unwrap().join(" "),
        "report x.onnx --calibrate SAMPLES -o next.html --json next.json"
    );
}

#[test]
fn int8_is_seen_as_the_model_computes_it() {
    for mode in RequantMode::ALL {
        let compiler = compiler(16).requant(mode);
        let prepared = compiler.prepare(graph(&compiler)).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let (fake, _) = compiler.quantized(&prepared, Some(&calibrated)).unwrap();
        let layers = quantized_layers(&fake);
        let results: Vec<ValueId> = fake.outputs().iter().map(|o| o.value).collect();
        let values: Vec<ValueId> = layers.iter().map(|l| l.value).chain(results).collect();
        let shown =
            Observed::lowered(&compiler, &fake, &values, compiler.lowering_options(&prepared)).unwrap();
        let model = compiler.jit(&compiler.lower(&prepared, Some(&calibrated)).unwrap()).unwrap();
        let feed =
            bundled::test_images().unwrap().limit(5).bind(model.inputs(), &bundled::preprocess()).unwrap();
        let mut session = shown.session(Threads::one());
        for i in 0..feed.batches() {
            let inputs = feed.batch(i).unwrap();
            let seen = session.run(&inputs).unwrap();
            let views: Vec<TensorView<'_>> = inputs.iter().map(TensorView::from).collect();
            let expected: Vec<Tensor> = Session::new(&model).run(&views).unwrap();
            assert_eq!(seen[layers.len()..], expected, "{mode}, batch {i}");
        }
    }
}

#[test]
fn what_is_observed_does_not_depend_on_threads_nor_on_batches() {
    let observe = |threads: usize, batch: usize| {
        let compiler = compiler(16)
            .shape("image", [batch, 1, 28, 28])
            .calibration_threads(Threads::new(threads).unwrap());
        let prepared = compiler.prepare(graph(&compiler)).unwrap();
        let calibrated = compiler.calibrate(&prepared).unwrap();
        let feed = bundled::test_images().unwrap().limit(7);
        let feed = feed.bind(&graph_inputs(prepared.graph()), &bundled::preprocess()).unwrap();
        let mut last = (0, 0);
        let seen = observe_layers(&compiler, &prepared, Some(&calibrated), &feed, &mut |d, t| last = (d, t))
            .unwrap();
        assert_eq!(last, (2 * feed.batches(), 2 * feed.batches()));
        let names: Vec<String> = prepared.graph().nodes().map(|(_, n)| n.name.clone()).collect();
        let of = |n: &String| (seen.error(n), seen.grid(n), seen.distribution(n, 64), seen.channels(n, 64));
        names.iter().map(of).collect::<Vec<_>>()
    };
    let one = observe(1, 3);
    for threads in [2, 3] {
        assert_eq!(observe(threads, 3), one, "{threads} threads");
    }
    // Seven samples in batches of three: the two copies must not count. Sums of floats come in another order.
    for (a, b) in observe(2, 1).iter().zip(&one) {
        assert_eq!(
            (&a.1, &a.2, &a.3, &a.0.saturation, &a.0.lsb, &a.0.codes),
            (&b.1, &b.2, &b.3, &b.0.saturation, &b.0.lsb, &b.0.codes)
        );
        for (x, y) in [(a.0.local, b.0.local), (a.0.cumulative, b.0.cumulative)] {
            assert!(x == y || (x.unwrap().0 - y.unwrap().0).abs() < 1e-3, "{x:?} {y:?}");
        }
    }
}

/// Multiplies one channel of a convolution's weights by `factor`, and divides what reads it: the network computes the same.
fn with_a_loud_channel(factor: f32) -> (Graph, String, String) {
    let compiler = compiler(16);
    let mut graph = compiler.prepare(graph(&compiler)).unwrap().graph().clone();
    let is_conv = |graph: &Graph, n: NodeId| matches!(graph.op(n), Some(Op::Conv(c)) if c.groups == 1);
    let order = graph.order();
    // A convolution whose result one other convolution takes, and nothing else.
    let (first, second) = order
        .iter()
        .find_map(|&n| {
            let u = graph
                .sole_use(n.out())
                .filter(|u| u.slot == 0 && is_conv(&graph, n) && is_conv(&graph, u.node))?;
            Some((n, u.node))
        })
        .unwrap();
    let mut scale = |node: NodeId, slot: usize, axis: usize, by: f32| {
        let operand = graph.operand(node, slot);
        let tensor = graph.constant_value(operand).unwrap().clone();
        let (dims, mut elements) =
            (tensor.shape().dims().to_vec(), tensor.as_slice::<f32>().unwrap().to_vec());
        let inner: usize = dims[axis + 1..].iter().product();
        let channel = 3;
        for (i, w) in elements.iter_mut().enumerate() {
            if i / inner % dims[axis] == channel {
                *w *= by;
            }
        }
        let scaled = Tensor::from_vec(tensor.shape().clone(), elements).unwrap();
        let own = graph.constant("scaled", scaled);
        graph.set_operand(node, slot, own).unwrap();
    };
    scale(first, 1, 0, factor);
    scale(first, 2, 0, factor);
    scale(second, 1, 1, 1.0 / factor);
    graph.remove_dead();
    let names = [first, second].map(|n| graph.node(n).name.clone());
    let [first, second] = names;
    (graph, first, second)
}

#[test]
fn a_channel_that_is_a_hundred_times_louder_is_found_with_its_cause_and_cure() {
    let (graph, loud, reader) = with_a_loud_channel(100.0);
    let setup = quick(compiler(64));
    let facts = facts(&setup, graph, &|_, _, _| {}).unwrap();
    let (worst, db) = facts.outlier().unwrap();
    assert_eq!((worst.name.as_str(), db.0 < 20.0), (reader.as_str(), true), "{db}: {:?}", facts.verdict);
    assert!(worst.error.causes.unwrap().inputs > 0.9, "{:?}", worst.error);
    let source = facts.layers.iter().find(|l| l.name == loud).unwrap();
    let channels = source.channels.as_ref().unwrap();
    assert_eq!(channels.largest, 3);
    assert!(channels.unused_bits > 4.0, "{channels:?}");
    let said = remarks(&facts, worst).join(" ") + &remarks(&facts, source).join(" ");
    assert!(said.contains(&format!("the result of `{loud}`, whose channel 3 is")), "{said}");
    assert!(said.contains("Channel 3 sets the grid for all"), "{said}");
    let cure = facts.next.iter().find(|s| s.options == ["--repair", "auto"]).unwrap();
    assert!(cure.reason.contains(&format!("`{loud}`")), "{}", cure.reason);
    let pins = facts.next.iter().find(|s| s.options[0] == "--pin").unwrap();
    assert_eq!(pins.options[1], format!("{reader}=float-jit"));

    // And the cure works.
    let cured = Setup {
        compiler: setup
            .compiler
            .clone()
            .repairs(qcc_passes::Repairs { equalize: 1.0, ..qcc_passes::Repairs::NONE }),
        ..setup
    };
    let (graph, ..) = with_a_loud_channel(100.0);
    let cured = super::facts(&cured, graph, &|_, _, _| {}).unwrap();
    let local = |f: &Facts| f.layers.iter().find(|l| l.name == reader).unwrap().error.local.unwrap().0;
    assert!(local(&cured) > local(&facts) + 10.0, "{} {}", local(&cured), local(&facts));

    let compared = compare(facts, cured);
    assert_eq!(compared.layers[0].name, reader, "{:?}", compared.layers[0]);
    assert_eq!(compared.options, [("repairs".into(), "none".into(), "equalize:1".into())]);
    assert!(compared.only_before.is_empty() && compared.only_after.is_empty() && compared.verdict.len() >= 3);
}

#[test]
fn facts_without_samples_or_quantization_or_by_run_time_grids() {
    let data_free = found(&quick(Compiler::new().preprocess(bundled::preprocess())));
    assert!(
        data_free.conditions.samples.is_made_up
            && data_free.conditions.calibration.as_ref().unwrap().batch_norms > 0
    );
    assert_eq!(
        (data_free.grade, data_free.next[0].title.as_str()),
        (Grade::Unknown, "Calibrate on real inputs")
    );
    let float = found(&quick(compiler(4).precision(Precision::Float)));
    assert_eq!((float.grade, float.contenders.len()), (Grade::Float, 1));
    assert!(float.layers.iter().all(|l| l.error == LayerError::default() && l.grid.is_none()));
    assert!(float.layers.iter().any(|l| l.values.is_some() && l.weights.is_some()));
    assert!(float.time.slower.is_empty() && float.verdict[0].contains("in float"));
    let dynamic = found(&quick(compiler(4).precision(Precision::Int8Dynamic)));
    assert_eq!(dynamic.contenders.len(), 2);
    let products = dynamic.layers.iter().filter(|l| l.macs > 0 && l.op == "MatMul");
    assert!(products.clone().count() > 0);
    for l in products {
        assert!(l.error.cumulative.unwrap().0 > 20.0 && l.error.local.is_none(), "{:?}", l.error);
    }
}

#[test]
fn a_model_that_brings_its_grids_is_compared_with_itself_without_them() {
    let own = compiler(16).interchange(true);
    let prepared = own.prepare(graph(&own)).unwrap();
    let calibrated = own.calibrate(&prepared).unwrap();
    let (mut fake, _) = own.quantized(&prepared, Some(&calibrated)).unwrap();
    fake.remove_dead();
    let file = qcc_ir::onnx::export(&fake).unwrap();
    let compiler = compiler(8);
    let facts = facts(&quick(compiler.clone()), compiler.import_onnx(&file).unwrap(), &|_, _, _| {}).unwrap();
    assert!(facts.conditions.brings_grids && facts.conditions.calibration.is_none());
    assert!(facts.layers.iter().all(|l| l.op != "FakeQuant" && l.op != "Dequantize"), "{:?}", facts.layers);
    let products: Vec<&LayerFacts> = facts.layers.iter().filter(|l| l.macs > 0).collect();
    assert!(products.len() >= 8);
    for l in products {
        let (local, cumulative) = (l.error.local.unwrap().0, l.error.cumulative.unwrap().0);
        // ReLUs are in the grids: without their bounds nothing would be like it.
        assert!(local > 25.0 && cumulative > 15.0 && l.grid.is_some(), "{}: {local} {cumulative}", l.name);
        assert!(l.weights.as_ref().unwrap().groups.iter().all(|g| g.scale.is_some()));
    }
    assert!(facts.next.iter().all(|s| s.options[0] != "--calibrator" && s.options[0] != "--repair"));
}

#[test]
fn a_model_that_takes_pixels_is_observed_on_them() {
    for mean in [vec![72.93], vec![72.4]] {
        let preprocess = crate::Preprocess { mean, ..bundled::preprocess() };
        let compiler = compiler(16).preprocess(preprocess).image_input(true);
        let facts = facts(&quick(compiler.clone()), graph(&compiler), &|_, _, _| {}).unwrap();
        let (worst, db) = facts.by_local_error()[0];
        assert!(db.0 > 20.0, "{}: {db}", worst.name);
        assert!(facts.subject().unwrap().sqnr.unwrap().0 > 20.0);
    }
}
