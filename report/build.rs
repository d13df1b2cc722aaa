//! Packs plotly.js, which pages of reports hold so that they need no network.

use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compression, write::GzEncoder};
use std::{env, error::Error, fs, io::Write, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let sources = plotly::Plot::offline_js_sources();
    // Two elements: plotly.js, and MathJax for formulas.
    let scripts = sources.split("<script type=\"text/javascript\">").skip(1);
    let script = scripts
        .filter_map(|s| s.rsplit_once("</script>"))
        .map(|(script, _)| script)
        .find(|script| script.contains("* plotly.js v"))
        .ok_or("the crate plotly has no plotly.js")?;
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(script.as_bytes())?;
    let folder = env::var("OUT_DIR")?;
    fs::write(Path::new(&folder).join("plotly.js.gz.txt"), BASE64_STANDARD.encode(packed.finish()?))?;
    Ok(())
}
