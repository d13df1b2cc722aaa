use super::*;
use onnx_protobuf::{StringStringEntryProto, tensor_proto::DataLocation};
use std::{fs, path::Path};

/// y = x + w, with w (f32[4]) outside of the file.
fn model(entries: &[(&str, &str)]) -> ModelProto {
    let mut p =
        Draft::new(17, [node("Add", &["x", "w"], &["y"])]).input("x", &[4]).constant("w", iota(&[4])).proto();
    let w = &mut p.graph.mut_or_insert_default().initializer[0];
    w.raw_data.clear();
    w.data_location = DataLocation::EXTERNAL.into();
    w.external_data = entries
        .iter()
        .map(|(k, v)| StringStringEntryProto {
            key: k.to_string(),
            value: v.to_string(),
            ..Default::default()
        })
        .collect();
    p
}

fn load(folder: &Path, entries: &[(&str, &str)]) -> Result<Graph, String> {
    let path = folder.join("model.onnx");
    fs::write(&path, model(entries).write_to_bytes().unwrap()).unwrap();
    Model::load(&path).and_then(|m| m.graph(&Bindings::default())).map_err(|e| e.to_string())
}

#[test]
fn external_data_stays_in_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir_all(folder.join("sub")).unwrap();
    let bytes: Vec<u8> = iota(&[6]).bytes().to_vec();
    for file in [folder.join("w.bin"), folder.join("sub/w.bin"), outer.path().join("secret.bin")] {
        fs::write(file, &bytes).unwrap();
    }
    for good in [
        &[("location", "w.bin")][..],
        &[("location", "./sub/w.bin"), ("offset", "8"), ("length", "16")],
        &[("location", "w.bin"), ("offset", "5"), ("checksum", "ignored")],
    ] {
        load(&folder, good).unwrap();
    }
    let g = load(&folder, &[("location", "sub/w.bin"), ("offset", "8")]).unwrap();
    assert_eq!(
        interpreter::run(&g, &[iota(&[4])]).unwrap()[0].as_slice::<f32>().unwrap(),
        [2.0, 4.0, 6.0, 8.0]
    );
    let secret = outer.path().join("secret.bin").display().to_string();
    for (bad, word) in [
        (&[("location", "../secret.bin")][..], "without `..`"),
        (&[("location", "sub/../../secret.bin")], "without `..`"),
        (&[("location", &secret)], "relative"),
        (&[("location", "..\\secret.bin")], "relative"),
        (&[("location", "")], "no location"),
        (&[], "no location"),
        (&[("location", "sub")], "regular"),
        (&[("location", "missing.bin")], "cannot read"),
        (&[("location", "w.bin"), ("location", "w.bin")], "twice"),
        (&[("location", "w.bin"), ("offset", "12")], "over the end"),
        (&[("location", "w.bin"), ("offset", "18446744073709551615")], "over the end"),
        (&[("location", "w.bin"), ("offset", "99999999999999999999999")], "not a number"),
        (&[("location", "w.bin"), ("offset", "-4")], "not a number"),
        (&[("location", "w.bin"), ("offset", "+4")], "not a number"),
        (&[("location", "w.bin"), ("length", "8")], "length 8"),
        (&[("location", "w.bin"), ("length", "1099511627776")], "length 1099511627776"),
    ] {
        let e = load(&folder, bad).unwrap_err();
        assert!(e.contains(word) && e.contains("`w`"), "{bad:?}: {e}");
    }
    let e = import(&model(&[("location", "w.bin")])).unwrap_err();
    assert!(e.contains("not read from a file"), "{e}");
}

#[cfg(unix)]
#[test]
fn external_data_follows_no_links() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir_all(&folder).unwrap();
    let secret = outer.path().join("secret.bin");
    fs::write(&secret, iota(&[4]).bytes()).unwrap();
    std::os::unix::fs::symlink(&secret, folder.join("soft.bin")).unwrap();
    std::os::unix::fs::symlink(outer.path(), folder.join("up")).unwrap();
    fs::hard_link(&secret, folder.join("hard.bin")).unwrap();
    for (location, word) in
        [("soft.bin", "symbolic"), ("up/secret.bin", "symbolic"), ("hard.bin", "hard links")]
    {
        let e = load(&folder, &[("location", location)]).unwrap_err();
        assert!(e.contains(word), "{location}: {e}");
    }
}

#[test]
fn overlapping_unaligned_tensors_do_not_multiply_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut p = model(&[("location", "w.bin"), ("offset", "1")]);
    let graph = p.graph.mut_or_insert_default();
    for i in 0..40 {
        let mut copy = graph.initializer[0].clone();
        copy.name = format!("w{i}");
        graph.initializer.push(copy);
    }
    fs::write(folder.path().join("w.bin"), [0; 17]).unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(&path, p.write_to_bytes().unwrap()).unwrap();
    let e = Model::load(&path).err().expect("is refused").to_string();
    assert!(e.contains("overlap"), "{e}");
}

#[test]
fn only_regular_files_are_models() {
    let folder = tempfile::tempdir().unwrap();
    for (path, word) in
        [(folder.path().to_path_buf(), "regular"), (folder.path().join("none.onnx"), "none.onnx")]
    {
        let e = Model::load(&path).err().expect("is refused").to_string();
        assert!(e.contains(word), "{e}");
    }
}
