//! The commands, one file each, and what they share.

pub(crate) mod bench;
pub(crate) mod compile;
pub(crate) mod diff;
pub(crate) mod eval;
mod inputs;
pub(crate) mod inspect;
pub(crate) mod lint;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod sensitivity;
pub(crate) mod test;
mod values;
pub(crate) mod zoo;

use crate::{
    args::{CalibratorFor, CompileOptions, ImageOptions},
    failure::Failure,
    table::percent,
    terminal::Terminal,
};
use qcc_runtime::{
    Calibrators, Compiler, Error, IMPORT, Pixels, Policy, Preprocess, ProgramInfo, Samples, Threads, passes,
};
use std::{io::Write as _, path::Path, sync::Arc};

/// A compiler with the options of the command line, and the terminal that it reports to.
fn compiler(
    options: &CompileOptions,
    images: &ImageOptions,
    isa: Option<&str>,
    quiet: u8,
) -> Result<(Compiler, Arc<Terminal>), Failure> {
    for pass in &options.print_after {
        check_pass(pass, &["all"])?;
    }
    let terminal = Arc::new(Terminal::new(quiet, &options.print_after));
    let mut compiler = Compiler::new().preprocess(preprocess(images));
    compiler = compiler.calibrator(calibrators(&options.calibration.calibrator)?);
    if options.calibration.calibration_threads > 0 {
        let threads = Threads::new(options.calibration.calibration_threads).map_err(Error::from)?;
        compiler = compiler.calibration_threads(threads);
    }
    compiler = compiler.image_input(images.image_input);
    if let Some(isa) = isa {
        compiler = compiler.tier(isa);
    }
    for (input, dims) in &options.shape {
        compiler = compiler.shape(input, dims.clone());
    }
    for (symbol, length) in &options.dim {
        compiler = compiler.dimension(symbol, *length);
    }
    for (node, device) in &options.pin {
        compiler = compiler.pin(node, *device);
    }
    if let Some(path) = &options.policy {
        compiler = compiler.policy(Policy::load(path).map_err(Error::from)?);
    }
    if let Some(bytes) = options.memory.max_memory {
        compiler = compiler.max_memory(bytes);
    }
    compiler = compiler.weight_bits(options.weight_bits).repairs(options.calibration.repair);
    compiler = compiler.reestimate_batch_norms(options.calibration.reestimate_bn);
    compiler = options.allow.iter().fold(compiler, |c, &rule| c.allow(rule));
    if options.weights == "per-tensor" {
        compiler = compiler.weights(passes::WeightGrid::PerTensor);
    }
    if let Some(samples) = calibration_samples(options)? {
        compiler = compiler.calibration(samples);
    }
    let told = terminal.clone();
    Ok((compiler.observer(move |event| told.event(event)), terminal))
}

/// Which calibrator is for which value.
fn calibrators(given: &[CalibratorFor]) -> Result<Calibrators, Failure> {
    let mut calibrators = Calibrators::default();
    let mut all = None;
    for one in given {
        let known = match one {
            CalibratorFor::All(choice) => all.replace(*choice).map(|_| "all values"),
            CalibratorFor::Value(value, c) => {
                calibrators.values.insert(value.clone(), *c).map(|_| value.as_str())
            }
        };
        if let Some(what) = known {
            return Err(Failure::Usage(format!("--calibrator is given twice for {what}")));
        }
    }
    calibrators.all = all.unwrap_or(calibrators.all);
    Ok(calibrators)
}

fn calibration_samples(options: &CompileOptions) -> Result<Option<Samples>, Failure> {
    let calibration = &options.calibration;
    let Some(path) = &calibration.calibrate else { return Ok(None) };
    let samples = Samples::open(path)?.every(calibration.every);
    Ok(Some(match calibration.samples {
        Some(n) => samples.limit(n),
        None => samples,
    }))
}

fn preprocess(images: &ImageOptions) -> Preprocess {
    Preprocess { mean: images.mean.clone(), std: images.std.clone(), size: images.size, bgr: images.bgr }
}

/// What is given where it is anything, and else what a program was made with.
fn images_or(given: Preprocess, own: &Preprocess) -> Preprocess {
    if given == Preprocess::default() { own.clone() } else { given }
}

/// The preprocessing of the command line where it has any, and else what a program was made with.
fn preprocess_of(images: &ImageOptions, info: &ProgramInfo) -> Result<Preprocess, Failure> {
    let given = images_or(preprocess(images), &info.preprocess);
    let arithmetic = |p: &Preprocess| (p.mean.clone(), p.std.clone(), p.bgr);
    let is_own = arithmetic(&given) == arithmetic(&Preprocess::default());
    if info.pixels.is_some() && !is_own && arithmetic(&given) != arithmetic(&info.preprocess) {
        let why = "the model takes pixels and normalises them itself: leave --mean, --std and --bgr away, or compile it anew";
        return Err(Failure::Usage(why.into()));
    }
    Ok(given)
}

/// How a program that takes pixels normalises them, in one phrase.
fn pixels(pixels: &Pixels) -> String {
    match pixels {
        Pixels::Normalized => "takes pixels, normalised exactly when it runs".into(),
        Pixels::Codes => "takes pixels as they are (the same bits as with normalised images)".into(),
        Pixels::Folded { difference: None } => {
            "takes pixels as they are, normalised in the first convolution".into()
        }
        Pixels::Folded { difference: Some(d) } => format!(
            "takes pixels as they are, normalised in the first convolution; on {} samples {} agree with normalised images, \
             outputs differ by at most {:.3e} (their magnitude is {:.3e})",
            d.samples,
            percent(Some(d.agreement), 2),
            d.largest,
            d.magnitude
        ),
    }
}

/// Fails unless this is the name of a pass, `import`, or one of some other words.
fn check_pass(name: &str, others: &[&str]) -> Result<(), Failure> {
    let names = passes::pass_names();
    if name == IMPORT || others.contains(&name) || names.contains(&name) {
        return Ok(());
    }
    let known: Vec<&str> = [IMPORT].into_iter().chain(names).chain(others.iter().copied()).collect();
    Err(Failure::Usage(format!("there is no pass `{name}`; there are {}", known.join(", "))))
}

/// Writes a file of the command's own in one step: an existing one is replaced as a whole or stays as it is. What is no file, such as a
/// pipe, is written to.
fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), Failure> {
    let failed = |source| Failure::Write { path: path.display().to_string(), source };
    if path.metadata().is_ok_and(|m| !m.is_file()) {
        return std::fs::write(path, bytes).map_err(failed);
    }
    // Of a link, what it leads to.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // Not the owner's alone, as temporary files are: what the process makes files with.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(failed)?;
    file.write_all(bytes.as_ref()).map_err(failed)?;
    file.persist(&path).map_err(|e| failed(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn files_are_replaced_and_what_is_none_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("a.json"), folder.path().join("b.json"));
        write(&file, "one").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "two");
        assert!(link.symlink_metadata().unwrap().is_symlink());
        write(Path::new("/dev/null"), "three").unwrap();
        assert!(!Path::new("/dev/null").is_file());
        // Nothing is left behind where it cannot be written.
        let error = write(&folder.path().join("none/c.json"), "four").unwrap_err().to_string();
        assert!(error.contains("c.json"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
