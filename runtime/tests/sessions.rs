//! Sessions: binding, threads, profiles, memory of the caller.

use ndarray::{Array2, Array4};
use qcc_runtime::{
    Compiler, Error, Event, Model, Precision, Preprocess, Samples, Session, TensorView, Threads, WeightBits,
    bundled, evaluate, ir,
};
use std::sync::{Arc, Mutex};

fn compiler() -> Compiler {
    Compiler::new().calibration(bundled::calibration().unwrap().limit(16)).preprocess(bundled::preprocess())
}

fn model(precision: Precision) -> Model {
    compiler().precision(precision).compile_onnx(bundled::FASHION_RESNET8).unwrap()
}

fn image() -> Array4<f32> {
    Array4::from_shape_fn((1, 1, 28, 28), |(_, _, y, x)| ((y * 31 + x * 7) % 13) as f32 / 6.5 - 1.0)
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_expected_type() {
    let mut session = Session::new(&model(Precision::Float));
    let refused = |r: Result<_, Error>| match r {
        Err(e @ Error::Bind(_)) => e.to_string(),
        other => panic!("{:?}", other.map(|_: Vec<ir::Tensor>| ())),
    };
    let narrow = Array4::<f32>::zeros((1, 1, 28, 27));
    let text = refused(session.run(&[(&narrow).into()]));
    assert_eq!(text, "input `image`: expected f32[1x1x28x28], got f32[1x1x28x27]");
    let wrong = Array4::<i64>::zeros((1, 1, 28, 28));
    assert!(refused(session.run(&[(&wrong).into()])).contains("got s64[1x1x28x28]"));
    assert!(refused(session.run(&[])).contains("1 inputs (image), but 0 were given"));
    let mut short = Array2::<f32>::zeros((1, 9));
    let image = image();
    let e = session.run_into(&[(&image).into()], &mut [(&mut short).try_into().unwrap()]).unwrap_err();
    assert_eq!(e.to_string(), "output `logits`: expected f32[1x10], got f32[1x9]");
}

#[test]
fn results_do_not_depend_on_threads_or_on_how_memory_is_given() {
    for precision in Precision::ALL {
        let model = model(precision);
        let image = image();
        let expected = Session::new(&model).run(&[(&image).into()]).unwrap().swap_remove(0);
        for count in [2, 3] {
            let mut session = Session::with_threads(&model, Threads::new(count).unwrap());
            let got = session.run(&[(&image).into()]).unwrap().swap_remove(0);
            assert!(got == expected, "{precision:?} differs on {count} threads");
        }
        let mut logits = Array2::<f32>::zeros((1, 10));
        // The same pixels, but not in row-major order.
        let turned = image.clone().permuted_axes([0, 1, 3, 2]).as_standard_layout().into_owned();
        let view = TensorView::from(turned.view().permuted_axes([0, 1, 3, 2]));
        let mut session = Session::new(&model);
        session.run_into(&[view], &mut [(&mut logits).try_into().unwrap()]).unwrap();
        assert_eq!(logits.as_slice().unwrap(), expected.as_slice::<f32>().unwrap());
    }
}

#[test]
fn sessions_of_one_model_run_on_several_threads() {
    let model = model(Precision::Int8);
    let expected = Session::new(&model).run(&[(&image()).into()]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut session = Session::new(&model);
                for _ in 0..20 {
                    assert!(session.run(&[(&image()).into()]).unwrap() == expected);
                }
            });
        }
    });
}

#[test]
fn a_profile_has_every_layer_and_only_measured_runs() {
    let model = model(Precision::Int8);
    let mut session = Session::new(&model);
    let image = image();
    session.run(&[(&image).into()]).unwrap();
    assert!(session.profile().is_empty());
    session.start_profile();
    assert!(session.profile().is_empty());
    session.run(&[(&image).into()]).unwrap();
    let profile = session.profile();
    assert_eq!(profile.len(), model.steps().len());
    assert_eq!(profile.iter().map(|l| l.work.macs).sum::<u64>(), model.macs());
    assert!(profile.iter().any(|l| l.op == "QConv" && !l.time.is_zero()));
    session.stop_profile();
    assert!(session.profile().is_empty());
}

#[test]
fn int8_keeps_the_accuracy_of_float_and_threads_do_not_change_what_is_counted() {
    let compiler =
        Compiler::new().calibration(bundled::calibration().unwrap()).preprocess(bundled::preprocess());
    let float = compiler.clone().precision(Precision::Float).compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let int8 = compiler.compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let narrow = compiler.weight_bits(WeightBits::Seven).compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let feed = bundled::test_images().unwrap().bind(float.inputs(), &bundled::preprocess()).unwrap();
    let models = [float, int8, narrow];
    let found = evaluate(&models, &feed, &Threads::one(), &|_, _| {}).unwrap();
    assert_eq!(evaluate(&models, &feed, &Threads::new(3).unwrap(), &|_, _| {}).unwrap(), found);
    let [float, int8, narrow] = &found.scores[..] else { panic!("three models") };
    // ONNX Runtime gets 92.7 % of these images right.
    assert_eq!(float.top1, Some(0.927));
    assert!((int8.top1.unwrap() - 0.927).abs() <= 0.004 && int8.agreement >= 0.99, "{int8:?}");
    assert!(float.sqnr_db.is_infinite() && int8.sqnr_db > 25.0, "{int8:?}");
    // Steps of weights of 7 bits are twice as wide.
    assert!((narrow.top1.unwrap() - 0.927).abs() <= 0.006 && narrow.agreement >= 0.985, "{narrow:?}");
    assert!(narrow.sqnr_db > 25.0 && narrow.sqnr_db < int8.sqnr_db, "{narrow:?}");
}

#[test]
fn a_model_without_calibration_data_warns_and_says_so_ever_after() {
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = warnings.clone();
    let compiler = Compiler::new().observer(move |event| {
        if let Event::Warning(text) = event {
            heard.lock().unwrap().push(text.into());
        }
    });
    let model = compiler.compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let warnings = warnings.lock().unwrap();
    // Its batch norms stand in for data.
    let expected = "no calibration data: ranges come from made-up inputs";
    assert!(matches!(&warnings[..], [one] if one.contains(expected)), "{warnings:?}");
    let calibration = model.info().calibration.clone().unwrap();
    assert!(calibration.synthetic && calibration.batch_norms == 9, "{calibration:?}");
}

#[test]
fn raw_pixels_for_a_normalised_model_are_noticed() {
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = warnings.clone();
    let compiler = compiler().preprocess(Preprocess::default()).observer(move |event| {
        if let Event::Warning(text) = event {
            heard.lock().unwrap().push(text.into());
        }
    });
    compiler.compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let warnings = warnings.lock().unwrap();
    assert!(warnings.iter().any(|w| w.contains("not normalised")), "{warnings:?}");
}

#[test]
fn larger_batches_are_calibrated_and_evaluated_too() {
    let compiler = compiler().shape("image", [8, 1, 28, 28]);
    let batched = compiler.compile_onnx(bundled::FASHION_RESNET8).unwrap();
    let single = model(Precision::Int8);
    let samples = || bundled::test_images().unwrap().limit(20);
    let score = |model: Model| {
        let feed = samples().bind(model.inputs(), &bundled::preprocess()).unwrap();
        evaluate(&[model], &feed, &Threads::one(), &|_, _| {}).unwrap()
    };
    let (batched, single) = (score(batched), score(single));
    assert_eq!(batched.samples, 20);
    assert_eq!(batched.scores[0].top1, single.scores[0].top1);
}

#[test]
fn samples_that_do_not_fit_the_model_stop_the_compilation() {
    let tensor = ir::Tensor::zeros(ir::DType::F32, ir::Shape::new([4, 3]).unwrap());
    let samples = Samples::from_arrays(vec![("x".into(), tensor)]).unwrap();
    let e = Compiler::new().calibration(samples).compile_onnx(bundled::FASHION_RESNET8).err().unwrap();
    assert!(e.to_string().contains("input `image`: expected samples for f32[1x1x28x28]"), "{e}");
}

#[test]
fn callers_on_several_threads_share_a_model_and_its_pool() {
    fn shared<T: Send + Sync>(_: &T) {}
    let images =
        Array4::from_shape_fn((16, 1, 28, 28), |(n, _, y, x)| ((n + y * 31 + x * 7) % 13) as f32 / 6.5 - 1.0);
    let compiler = compiler().shape("image", images.shape().to_vec());
    let model = compiler.precision(Precision::Int8).compile_onnx(bundled::FASHION_RESNET8).unwrap();
    shared(&model);
    let expected = Session::new(&model).run(&[(&images).into()]).unwrap();
    let threads = Threads::new(2).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let mut session = Session::with_threads(&model, threads.clone());
            shared(&session);
            let (images, expected) = (&images, &expected);
            scope.spawn(move || {
                for _ in 0..50 {
                    assert!(session.run(&[images.into()]).unwrap() == *expected);
                }
            });
        }
    });
}

/// A product of rows that the model itself quantizes, and one of floats.
fn dynamically_quantized() -> ir::Graph {
    let text = r#"qir 1
graph "rows" stage float
%0 = input "x" : f32[3x32]
%1 = const "a" : s8[32x32] {scale 0.01 zero 0} = seed(1)
%2 = const "b" : f32[32x16] = seed(2)
%3 = "rows" DynamicQuantize(axis:0)(%0)
%4 = "first" QMatMulToFloat(to:(grids:true,bias:false,residual:false,clamp:(lo:-inf,hi:inf)))(%3, %1, %3.1, %3.2)
%5 = "second" MatMul(bias:false,residual:false,clamp:(lo:-inf,hi:inf))(%4, %2)
output "y" = %5
"#;
    ir::text::parse(text).unwrap()
}

#[test]
fn a_model_that_is_quantized_when_it_runs_is_not_calibrated_on_noise() {
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let heard = warnings.clone();
    let compiler = Compiler::new().observer(move |event| {
        if let Event::Warning(text) = event {
            heard.lock().unwrap().push(text.to_string());
        }
    });
    let program = compiler.program_of_graph(dynamically_quantized()).unwrap();
    assert_eq!(
        (program.info().precision, program.info().calibration.is_none()),
        (Precision::Int8Dynamic, true)
    );
    assert!(warnings.lock().unwrap()[0].contains("int8-dynamic"), "{warnings:?}");
}
