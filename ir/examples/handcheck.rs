use qcc_ir::onnx::{Bindings, Model};
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let r = Model::load(std::path::Path::new(&path)).and_then(|m| m.graph(&Bindings::default()));
    match r {
        Ok(g) => println!("{} nodes, {} MACs", g.len(), g.nodes().map(|(id, _)| g.macs(id)).sum::<u64>()),
        Err(e) => {
            eprintln!("error: {e}");
            std::process::exit(1)
        }
    }
}
