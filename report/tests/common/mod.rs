//! Facts to make pages of.

use qcc_runtime::{
    Compiler, bundled,
    workbench::{Facts, Setup, facts},
};

/// Those of the bundled model, on few samples.
pub(crate) fn of_bundled_model() -> Facts {
    let compiler = Compiler::new()
        .calibration(bundled::calibration().unwrap().limit(16))
        .preprocess(bundled::preprocess());
    let graph = compiler.import_onnx(bundled::FASHION_RESNET8).unwrap();
    let setup = Setup {
        samples: 4,
        reps: 2,
        images: Some(bundled::test_images().unwrap().limit(20)),
        command: Some(["report", "my model.onnx"].map(String::from).to_vec()),
        ..Setup::new("fashion_resnet8", compiler)
    };
    facts(&setup, graph, &|_, _, _| {}).unwrap()
}

/// A name that does harm where it is not escaped: in text, attributes, scripts, charts and shells.
pub(crate) const HOSTILE: &str = "</script><script>document.title='harm'</script><img src=x onerror=\"document.title='harm'\"> `'\"; ${x} $(y)";

/// With a hostile name for one layer, the op of another, and wherever else a model or a file has a say.
pub(crate) fn hostile(mut facts: Facts) -> Facts {
    let old = facts.layers[3].name.clone();
    facts.layers[3].name = HOSTILE.into();
    facts.layers[4].op = HOSTILE.into();
    facts.layers[5].reason = Some(HOSTILE.into());
    facts.model = HOSTILE.into();
    facts.verdict.push(format!("`{HOSTILE}` {HOSTILE}"));
    facts.conditions.samples.origin = HOSTILE.into();
    facts.conditions.command = Some(vec!["report".into(), HOSTILE.into()]);
    facts.findings.push(qcc_runtime::workbench::Finding { subject: HOSTILE.into(), text: HOSTILE.into() });
    for conversion in &mut facts.time.conversions {
        conversion.name = conversion.name.replace(&old, HOSTILE);
    }
    facts
}

/// With so many layers, copies of those that there are one after the other.
pub(crate) fn with_layers(mut facts: Facts, count: usize) -> Facts {
    let (layers, edges) = (facts.layers.clone(), facts.edges.clone());
    let n = layers.len();
    while facts.layers.len() < count {
        let round = facts.layers.len() / n;
        for layer in &layers {
            let mut copy = layer.clone();
            copy.name = format!("/stage{round}/block/{}", layer.name);
            facts.layers.push(copy);
        }
        for edge in &edges {
            let mut copy = *edge;
            copy.from += round * n;
            copy.to += round * n;
            facts.edges.push(copy);
        }
        let joint = qcc_runtime::workbench::Edge { from: round * n - 1, to: round * n, converts: true };
        facts.edges.push(joint);
    }
    facts
}
