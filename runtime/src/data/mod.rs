//! Samples for calibration and evaluation: arrays, folders of images, or synthetic noise.

mod feed;
mod leaves;
mod noise;
mod npy;
mod preprocess;
mod safetensors;

pub use self::safetensors::read_safetensors;
pub use feed::Feed;
pub(crate) use leaves::dead_leaves;
pub use npy::{parse_npz, read_npy, read_npz, write_npy};
pub use preprocess::Preprocess;

use crate::TensorInfo;
use feed::{InputFeed, image_layout, mismatch};
use qcc_ir::{
    Tensor,
    onnx::{Bindings, Dim, InputInfo},
};
use std::{
    io::Cursor,
    path::{Path, PathBuf},
};

/// What can be wrong with data that the user brings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// A file or folder that cannot be read.
    #[error("cannot read `{file}`: {reason}")]
    Read {
        /// The path.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// A file that cannot be written.
    #[error("cannot write `{file}`: {reason}")]
    Write {
        /// The path.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// A file whose contents are not what they should be.
    #[error("`{file}`: {reason}")]
    Format {
        /// The path, or the array in it.
        file: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// Means, deviations or a size that do not fit.
    #[error("preprocessing: {0}")]
    Preprocess(String),
    /// Data that does not fit the model's input.
    #[error("input `{input}`: {reason}")]
    Mismatch {
        /// The model's input.
        input: String,
        /// What was expected and what there is.
        reason: String,
    },
    /// Nothing to work on.
    #[error("`{0}` holds no samples")]
    Empty(String),
}

impl DataError {
    pub(crate) fn read(path: &Path, e: impl std::fmt::Display) -> DataError {
        DataError::Read { file: path.display().to_string(), reason: e.to_string() }
    }
    fn format(file: impl Into<String>, reason: impl Into<String>) -> DataError {
        DataError::Format { file: file.into(), reason: reason.into() }
    }
}

/// Samples as they were found, not yet fitted to a model: see [`Samples::bind`].
#[derive(Clone, Debug)]
pub struct Samples {
    origin: String,
    source: Source,
    labels: Option<Vec<u32>>,
    every: usize,
    limit: usize,
    fold: Option<Fold>,
    /// Whether arrays were made up.
    is_made_up: bool,
}

/// A part of the samples that are left by all else.
#[derive(Clone, Copy, Debug)]
struct Fold {
    part: Part,
    /// At most so many, evenly spread.
    most: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Part {
    All,
    /// One of so many.
    HeldOut(usize),
    /// But for one of so many.
    Rest(usize),
}

#[derive(Clone, Debug)]
enum Source {
    Arrays(Vec<(String, Tensor)>),
    Images(Vec<PathBuf>),
    /// Files of arrays, a sample each.
    Files(Vec<PathBuf>),
    Noise,
}

impl Samples {
    /// Opens a `.npy`, `.npz` or `.safetensors` file, a folder of images, a single image, or a folder of files of arrays with
    /// a sample each, which may differ in shape where a model takes any.
    ///
    /// A file of several arrays may hold `labels` beside its samples. Images are `.jpg`, `.jpeg`, `.png` or `.bmp`, taken in the order
    /// of their names; where every name begins with a number (`123.jpg`, `7_cat.png`), those numbers are the labels.
    pub fn open(path: &Path) -> Result<Samples, DataError> {
        let origin = path.display().to_string();
        if path.is_dir() {
            return Samples::of_folder(path, origin);
        }
        match extension(path).as_deref() {
            Some("npz" | "npy" | "safetensors") => Samples::of_arrays(origin, read_arrays(path)?),
            _ if is_image(path) => Ok(Samples::of_files(origin, vec![path.to_owned()])),
            _ if !path.exists() => Err(DataError::read(path, "no such file or folder")),
            _ => Err(DataError::format(
                origin,
                "is neither .npy, .npz, .safetensors, an image nor a folder of images",
            )),
        }
    }

    /// Samples from the bytes of an `.npz` file. `origin` is for messages.
    pub fn from_npz_bytes(origin: &str, bytes: &[u8]) -> Result<Samples, DataError> {
        Samples::of_arrays(origin.into(), parse_npz(Cursor::new(bytes), origin)?)
    }

    /// Standard normal noise, the same on every host: enough for timing, worth nothing for accuracy.
    pub fn noise() -> Samples {
        Samples::new("synthetic noise".into(), Source::Noise, None)
    }

    /// Samples from arrays by name; several inputs are fed from arrays of their names.
    pub fn from_arrays(arrays: Vec<(String, Tensor)>) -> Result<Samples, DataError> {
        Samples::of_arrays("arrays".into(), arrays)
    }

    /// Arrays that are no data.
    fn made_up(origin: &str, arrays: Vec<(String, Tensor)>) -> Samples {
        Samples { is_made_up: true, ..Samples::new(origin.into(), Source::Arrays(arrays), None) }
    }

    fn new(origin: String, source: Source, labels: Option<Vec<u32>>) -> Samples {
        Samples { origin, source, labels, every: 1, limit: usize::MAX, fold: None, is_made_up: false }
    }

    fn of_arrays(origin: String, mut arrays: Vec<(String, Tensor)>) -> Result<Samples, DataError> {
        let at = arrays.iter().position(|(name, _)| name == "labels");
        let labels = match at {
            Some(i) => Some(labels_of(&origin, &arrays.remove(i).1)?),
            None => None,
        };
        if arrays.is_empty() {
            return Err(DataError::Empty(origin));
        }
        Ok(Samples::new(origin, Source::Arrays(arrays), labels))
    }

    fn of_folder(folder: &Path, origin: String) -> Result<Samples, DataError> {
        let (mut images, mut arrays) = (Vec::new(), Vec::new());
        for entry in folder.read_dir().map_err(|e| DataError::read(folder, e))? {
            let path = entry.map_err(|e| DataError::read(folder, e))?.path();
            match extension(&path).as_deref() {
                Some("npz" | "npy" | "safetensors") => arrays.push(path),
                _ if is_image(&path) => images.push(path),
                _ => {}
            }
        }
        images.sort();
        arrays.sort();
        match (images.is_empty(), arrays.is_empty()) {
            (true, true) => Err(DataError::Empty(origin)),
            (false, true) => Ok(Samples::of_files(origin, images)),
            (true, false) => Ok(Samples::new(origin, Source::Files(arrays), None)),
            (false, false) => {
                Err(DataError::format(origin, "holds both images and arrays; samples are one or the other"))
            }
        }
    }

    fn of_files(origin: String, files: Vec<PathBuf>) -> Samples {
        let labels = files.iter().map(|f| leading_number(f)).collect();
        Samples::new(origin, Source::Images(files), labels)
    }

    /// Takes the samples 0, k, 2k… only.
    pub fn every(self, k: usize) -> Samples {
        Samples { every: self.every.saturating_mul(k.max(1)), ..self }
    }

    /// Takes at most `n` samples (of those that [`every`](Self::every) leaves).
    pub fn limit(self, n: usize) -> Samples {
        Samples { limit: n, ..self }
    }

    /// Two parts that have no sample in common: one of `one_of`, from all over them, and of the others. Of either at most as many
    /// as are given, evenly spread.
    pub fn held_out(&self, one_of: usize, most: [usize; 2]) -> [Samples; 2] {
        let one_of = one_of.max(2);
        let part =
            |part, most: usize| Samples { fold: Some(Fold { part, most: most.max(1) }), ..self.clone() };
        [part(Part::HeldOut(one_of), most[0]), part(Part::Rest(one_of), most[1])]
    }

    /// At most so many of them, evenly spread; of a part that was held out, or is not, so many of that.
    pub fn spread(&self, most: usize) -> Samples {
        let fold = self.fold.unwrap_or(Fold { part: Part::All, most: usize::MAX });
        Samples { fold: Some(Fold { most: fold.most.min(most.max(1)), ..fold }), ..self.clone() }
    }

    /// Labels from a file: `.npy`, an `.npz` or `.safetensors` with `labels`, or text with one class index a line, in the order of the
    /// samples (for images: of their names).
    pub fn with_labels(self, path: &Path) -> Result<Samples, DataError> {
        let origin = path.display().to_string();
        let labels = match extension(path).as_deref() {
            Some("npy") => labels_of(&origin, &read_npy(path)?)?,
            Some("npz" | "safetensors") => {
                let arrays = read_arrays(path)?;
                let found = arrays.iter().find(|(name, _)| name == "labels");
                let (_, t) = found.ok_or_else(|| DataError::format(&origin, "has no array `labels`"))?;
                labels_of(&origin, t)?
            }
            _ => {
                let text = std::fs::read_to_string(path).map_err(|e| DataError::read(path, e))?;
                let parse = |(i, line): (usize, &str)| {
                    line.trim().parse().map_err(|_| {
                        DataError::format(&origin, format!("line {}: `{line}` is not a class index", i + 1))
                    })
                };
                text.lines()
                    .enumerate()
                    .filter(|(_, l)| !l.trim().is_empty())
                    .map(parse)
                    .collect::<Result<_, _>>()?
            }
        };
        Ok(Samples { labels: Some(labels), ..self })
    }

    /// Where the samples come from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether these are made up.
    pub fn is_noise(&self) -> bool {
        self.is_made_up || matches!(self.source, Source::Noise)
    }

    /// How many groups of samples there are that may differ in shape.
    pub(crate) fn groups(&self) -> usize {
        match &self.source {
            Source::Files(files) => files.iter().step_by(self.every).take(self.limit).count(),
            _ => 1,
        }
    }

    /// One of the [`groups`](Self::groups).
    pub(crate) fn group(&self, i: usize) -> Result<Samples, DataError> {
        match &self.source {
            Source::Files(files) => {
                Samples::open(files.get(i * self.every).ok_or_else(|| DataError::Empty(self.origin.clone()))?)
            }
            _ => Ok(self.clone()),
        }
    }

    /// Binds shapes of inputs that have none yet to those of the arrays for them. An array holds samples, of which a batch
    /// takes as many as the model declares, and else one; or whole inputs.
    pub(crate) fn bind_shapes(&self, inputs: &[InputInfo], bindings: &mut Bindings) {
        let Source::Arrays(arrays) = &self.source else { return };
        for input in inputs.iter().filter(|i| !bindings.shapes.contains_key(&i.name)).collect::<Vec<_>>() {
            let Ok(array) = array_for(&self.origin, arrays, &input.name, inputs.len() == 1) else { continue };
            let dims = array.shape().dims();
            let batch = match input.dims.as_ref().and_then(|d| d.first()) {
                Some(Dim::Known(n)) => *n,
                Some(Dim::Symbol(name)) => bindings.symbols.get(name).copied().unwrap_or(1),
                Some(Dim::Unknown) | None => 1,
            };
            let one: Vec<usize> = std::iter::once(batch).chain(dims.iter().skip(1).copied()).collect();
            let whole = dims.get(1..).unwrap_or_default();
            let fits = [&one[..], whole].into_iter().find(|dims| input.takes(array.dtype(), dims));
            if let Some(dims) = fits {
                bindings.shapes.insert(input.name.clone(), dims.to_vec());
            }
        }
    }

    /// Fits the samples to a model's inputs: checks element types and shapes of everything, and picks the arrays.
    ///
    /// * Floats and integers of an input's own type go in as they are: `[samples, …]` where `…` is the input's shape
    ///   without its batch, or with it.
    /// * `u8` arrays are images, `[samples, H, W]`, `[samples, H, W, C]` or `[samples, C, H, W]`, and are preprocessed like
    ///   image files.
    /// * For an input of `u8`, images are brought to its size; mean, deviation and order of channels are the model's own
    ///   business then.
    pub fn bind(&self, inputs: &[TensorInfo], preprocess: &Preprocess) -> Result<Feed, DataError> {
        let first = inputs.first().ok_or_else(|| DataError::Format {
            file: self.origin.clone(),
            reason: "the model has no inputs to feed".into(),
        })?;
        let batch = first.ty.shape.first().copied().unwrap_or(1).max(1);
        let feeds = match &self.source {
            Source::Noise => inputs.iter().map(|_| InputFeed::Noise).collect(),
            Source::Images(files) => match inputs {
                [input] => vec![InputFeed::Files(files.clone(), image_layout(input, preprocess)?)],
                _ => {
                    return Err(mismatch(
                        first,
                        "images can feed a model of one input only; use an .npz".into(),
                    ));
                }
            },
            Source::Files(files) => inputs.iter().map(|_| InputFeed::Arrays(files.clone())).collect(),
            Source::Arrays(arrays) => {
                let pick =
                    |input: &TensorInfo| array_for(&self.origin, arrays, &input.name, inputs.len() == 1);
                let feed = |input| InputFeed::of_array(pick(input)?, input, preprocess);
                inputs.iter().map(feed).collect::<Result<Vec<_>, _>>()?
            }
        };
        let mut counts = feeds.iter().map(|f| f.samples(batch));
        let found = counts.next().unwrap_or(0);
        if let Some((other, input)) = counts.zip(&inputs[1..]).find(|(n, _)| *n != found) {
            return Err(mismatch(input, format!("has {other} samples, but `{}` has {found}", first.name)));
        }
        if let Some(labels) = self.labels.as_ref().filter(|l| l.len() != found) {
            let why = format!("{} labels for {found} samples", labels.len());
            return Err(DataError::format(&self.origin, why));
        }
        let picked: Vec<usize> = (0..found).step_by(self.every).take(self.limit).collect();
        let picked = match self.fold {
            Some(fold) => fold.of(&picked),
            None => picked,
        };
        if picked.is_empty() {
            return Err(DataError::Empty(self.origin.clone()));
        }
        let labels = self.labels.as_ref().map(|l| picked.iter().map(|&i| l[i]).collect());
        let (inputs, preprocess) = (inputs.to_vec(), preprocess.clone());
        Ok(Feed { inputs, feeds, picked, labels, batch, preprocess, kept: None })
    }
}

impl Fold {
    fn of(self, samples: &[usize]) -> Vec<usize> {
        let is_held_out = |i: usize, one_of: usize| i % one_of == one_of / 2;
        let is_in = |i: usize| match self.part {
            Part::All => true,
            Part::HeldOut(one_of) => is_held_out(i, one_of),
            Part::Rest(one_of) => !is_held_out(i, one_of),
        };
        let part: Vec<usize> = samples.iter().enumerate().filter(|(i, _)| is_in(*i)).map(|s| *s.1).collect();
        let count = part.len().min(self.most);
        (0..count).map(|i| part[i * part.len() / count]).collect()
    }
}

/// The array for an input; a sole input takes whatever there is.
fn array_for<'a>(
    origin: &str,
    arrays: &'a [(String, Tensor)],
    input: &str,
    sole: bool,
) -> Result<&'a Tensor, DataError> {
    let named = |name: &str| arrays.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let usual = || named("images").or_else(|| named("x")).or(arrays.first().map(|(_, t)| t));
    named(input).or_else(|| usual().filter(|_| sole)).ok_or_else(|| {
        let names: Vec<&str> = arrays.iter().map(|(n, _)| n.as_str()).collect();
        DataError::format(origin, format!("has no array for input `{input}`, only {}", names.join(", ")))
    })
}

/// The arrays of an `.npz` or `.safetensors` file by their names, or the one of an `.npy` file, which is called `x`.
///
/// # Errors
/// Where the file cannot be read or is not what its name says.
pub fn read_arrays(path: &Path) -> Result<Vec<(String, Tensor)>, DataError> {
    match extension(path).as_deref() {
        Some("npy") => Ok(vec![("x".into(), read_npy(path)?)]),
        Some("safetensors") => read_safetensors(path),
        _ => read_npz(path),
    }
}

fn labels_of(origin: &str, array: &Tensor) -> Result<Vec<u32>, DataError> {
    let wide = array.to_i64().filter(|_| array.shape().rank() == 1);
    let wide = wide.ok_or_else(|| {
        DataError::format(origin, format!("labels must be one integer a sample, not {}", array.ty()))
    })?;
    let narrow = |l: i64| {
        u32::try_from(l).map_err(|_| DataError::format(origin, format!("label {l} is not a class index")))
    };
    wide.into_iter().map(narrow).collect()
}

fn extension(path: &Path) -> Option<String> {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase())
}

fn is_image(path: &Path) -> bool {
    matches!(extension(path).as_deref(), Some("jpg" | "jpeg" | "png" | "bmp"))
}

/// The number that a file's name begins with: the class index by a common habit.
fn leading_number(path: &Path) -> Option<u32> {
    let name = path.file_stem()?.to_string_lossy();
    let end = name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len());
    let rest_is_separate = name[end..].chars().next().is_none_or(|c| matches!(c, '_' | '-' | ' ' | '.'));
    name[..end].parse().ok().filter(|_| rest_is_separate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::{DType, Shape, TensorType};

    fn input(name: &str, dtype: DType, dims: &[usize]) -> TensorInfo {
        TensorInfo { name: name.into(), ty: TensorType::new(dtype, Shape::new(dims).unwrap()) }
    }

    fn bytes(dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let data = (0..shape.elements()).map(|i| i as u8).collect();
        Tensor::from_vec::<u8>(shape, data).unwrap()
    }

    fn floats(dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let data = (0..shape.elements()).map(|i| i as f32).collect();
        Tensor::from_vec::<f32>(shape, data).unwrap()
    }

    fn samples(arrays: &[(&str, Tensor)]) -> Samples {
        Samples::from_arrays(arrays.iter().map(|(n, t)| (n.to_string(), t.clone())).collect()).unwrap()
    }

    #[test]
    fn what_is_held_out_and_the_rest_are_all_samples_and_have_none_in_common() {
        let inputs = [input("a", DType::F32, &[1, 1])];
        let of = |s: &Samples| s.bind(&inputs, &Preprocess::default()).unwrap().picked;
        let all = samples(&[("x", floats(&[30, 1]))]).every(2).limit(13);
        let [held, rest] = all.held_out(4, [64, 64]);
        assert_eq!(of(&held), [4, 12, 20]);
        let mut both = [of(&held), of(&rest)].concat();
        both.sort_unstable();
        assert_eq!(both, of(&all));
        let [held, rest] = all.held_out(4, [2, 5]);
        assert_eq!((of(&held), of(&rest)), (vec![4, 12], vec![0, 6, 10, 16, 22]));
        assert_eq!(of(&rest.spread(2)), [0, 14]);
        assert_eq!(of(&all.spread(3)), [0, 8, 16]);
        // A single one is never held out.
        assert_eq!(of(&all.clone().limit(1).held_out(4, [9, 9])[1]), [0]);
    }

    #[test]
    fn float_rows_are_cut_into_batches_and_the_last_one_is_filled_up() {
        let feed = samples(&[("x", floats(&[5, 2]))])
            .bind(&[input("a", DType::F32, &[2, 2])], &Preprocess::default())
            .unwrap();
        assert_eq!((feed.samples(), feed.batches(), feed.batch_size()), (5, 3, 2));
        assert_eq!(feed.batch(0).unwrap()[0].to_f32().unwrap(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(feed.batch(2).unwrap()[0].to_f32().unwrap(), [8.0, 9.0, 8.0, 9.0]);
    }

    #[test]
    fn rows_may_hold_whole_batches() {
        let feed = samples(&[("x", floats(&[3, 1, 2]))])
            .bind(&[input("a", DType::F32, &[1, 2])], &Preprocess::default())
            .unwrap();
        assert_eq!(feed.samples(), 3);
        assert_eq!(feed.batch(1).unwrap()[0].to_f32().unwrap(), [2.0, 3.0]);
    }

    #[test]
    fn byte_arrays_are_images_of_either_channel_order() {
        let model = [input("a", DType::F32, &[1, 3, 1, 2])];
        for dims in [[2, 1, 2, 3], [2, 3, 1, 2]] {
            let feed = samples(&[("images", bytes(&dims))]).bind(&model, &Preprocess::default()).unwrap();
            let x = feed.batch(1).unwrap()[0].to_f32().unwrap();
            let wanted = if dims[3] == 3 { [6., 9., 7., 10., 8., 11.] } else { [6., 7., 8., 9., 10., 11.] };
            assert_eq!(x, wanted, "{dims:?}");
        }
    }

    #[test]
    fn selection_applies_to_labels_too() {
        let labels = Tensor::from_vec(Shape::new([6]).unwrap(), vec![9i64, 8, 7, 6, 5, 4]).unwrap();
        let s = samples(&[("x", floats(&[6, 1])), ("labels", labels)]).every(2).limit(2);
        let feed = s.bind(&[input("a", DType::F32, &[1, 1])], &Preprocess::default()).unwrap();
        assert_eq!(feed.labels(), Some(&[9, 7][..]));
        assert_eq!(feed.batch(1).unwrap()[0].to_f32().unwrap(), [2.0]);
    }

    #[test]
    fn several_inputs_are_fed_by_name() {
        let model = [input("a", DType::F32, &[1, 2]), input("b", DType::S64, &[1])];
        let b = Tensor::from_vec(Shape::new([3]).unwrap(), vec![4i64, 5, 6]).unwrap();
        let s = samples(&[("b", b.clone()), ("a", floats(&[3, 2]))]);
        let feed = s.bind(&model, &Preprocess::default()).unwrap();
        assert_eq!(feed.batch(2).unwrap()[1].to_i64().unwrap(), [6]);
        let missing = samples(&[("b", b)]).bind(&model, &Preprocess::default()).unwrap_err();
        assert!(missing.to_string().contains("no array for input `a`, only b"), "{missing}");
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_names_the_input() {
        let refused = |t: Tensor, dtype, dims: &[usize]| {
            let e =
                samples(&[("x", t)]).bind(&[input("a", dtype, dims)], &Preprocess::default()).unwrap_err();
            assert!(e.to_string().contains("input `a`"), "{e}");
            e.to_string()
        };
        assert!(refused(floats(&[4, 3]), DType::F32, &[1, 2]).contains("f32[1x2]"));
        assert!(refused(floats(&[4, 3]), DType::S64, &[1, 3]).contains("expected s64"));
        assert!(refused(bytes(&[4, 9]), DType::F32, &[1, 9]).contains("does not take images"));
        assert!(refused(Tensor::scalar(1.0f32), DType::F32, &[1, 2]).contains("f32[]"));
    }

    #[test]
    fn names_of_files_may_hold_the_class() {
        let number = |s: &str| leading_number(Path::new(s));
        assert_eq!((number("a/123.jpg"), number("007_cat.png")), (Some(123), Some(7)));
        assert_eq!((number("cat.jpg"), number("3d.png")), (None, None));
    }

    #[test]
    fn folders_are_read_in_the_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        for (name, grey) in [("2.png", 20u8), ("1.bmp", 10), ("10.png", 100)] {
            image::GrayImage::from_pixel(2, 2, image::Luma([grey])).save(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("notes.txt"), "no image").unwrap();
        let s = Samples::open(dir.path()).unwrap();
        let feed = s.bind(&[input("a", DType::F32, &[1, 1, 2, 2])], &Preprocess::default()).unwrap();
        assert_eq!(feed.labels(), Some(&[1, 10, 2][..]));
        assert_eq!(feed.batch(1).unwrap()[0].to_f32().unwrap(), [100.0; 4]);
        let kept = feed.kept().unwrap();
        std::fs::write(dir.path().join("3.png"), "not a png").unwrap();
        let s = Samples::open(dir.path()).unwrap();
        let feed = s.bind(&[input("a", DType::F32, &[1, 1, 2, 2])], &Preprocess::default()).unwrap();
        assert!(feed.batch(3).unwrap_err().to_string().contains("3.png"));
        assert!(feed.kept().unwrap_err().to_string().contains("3.png"));
        std::fs::remove_file(dir.path().join("10.png")).unwrap();
        assert_eq!(kept.batch(1).unwrap()[0].to_f32().unwrap(), [100.0; 4]);
    }

    #[test]
    fn files_of_a_folder_are_a_sample_each() {
        let dir = tempfile::tempdir().unwrap();
        for (name, dims) in [("b.npy", &[1, 3][..]), ("a.npy", &[3])] {
            write_npy(&dir.path().join(name), &floats(dims)).unwrap();
        }
        let folder = Samples::open(dir.path()).unwrap();
        let feed = folder.bind(&[input("x", DType::F32, &[2, 3])], &Preprocess::default()).unwrap();
        assert_eq!((feed.samples(), feed.batches()), (2, 1));
        assert_eq!(feed.batch(0).unwrap()[0].to_f32().unwrap(), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
        // Of other shapes, where a model takes any: by themselves.
        write_npy(&dir.path().join("c.npy"), &floats(&[1, 5])).unwrap();
        let dims = Some(vec![Dim::Symbol("N".into()), Dim::Unknown]);
        let kind = qcc_ir::onnx::ValueKind::TENSOR;
        let declared = [InputInfo { name: "x".into(), dtype: DType::F32, dims, kind }];
        let folder = Samples::open(dir.path()).unwrap();
        let shape = |i: usize| {
            let mut bindings = Bindings::default();
            folder.group(i).unwrap().bind_shapes(&declared, &mut bindings);
            bindings.shapes.remove("x")
        };
        assert_eq!((folder.groups(), shape(1), shape(2)), (3, Some(vec![1, 3]), Some(vec![1, 5])));
        let feed = folder.bind(&[input("x", DType::F32, &[1, 3])], &Preprocess::default()).unwrap();
        assert!(feed.batch(2).unwrap_err().to_string().contains("expected samples for f32"));
        write_npy(&dir.path().join("d.npy"), &floats(&[2, 3])).unwrap();
        let feed = Samples::open(dir.path()).unwrap();
        let feed = feed.bind(&[input("x", DType::F32, &[1, 3])], &Preprocess::default()).unwrap();
        assert!(feed.batch(3).unwrap_err().to_string().contains("has 2 samples"));
        assert_eq!(folder.every(2).groups(), 2);
    }

    #[test]
    fn safetensors_are_samples_like_any_arrays() {
        use ::safetensors::{Dtype, serialize_to_file, tensor::TensorView};
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, arrays: &[(&str, Dtype, &[usize], &[u8])]| {
            let view = |(n, t, s, d): &(&str, Dtype, &[usize], &'static [u8])| {
                (n.to_string(), TensorView::new(*t, s.to_vec(), d).unwrap())
            };
            let arrays: Vec<_> = arrays
                .iter()
                .map(|(n, t, s, d)| (*n, *t, *s, &*Box::leak(d.to_vec().into_boxed_slice())))
                .collect();
            serialize_to_file(arrays.iter().map(view), None, &dir.path().join(name)).unwrap();
        };
        // 1 in bf16, 2 in bf16.
        let halves = [0x80, 0x3f, 0x00, 0x40];
        write(
            "all.safetensors",
            &[("a", Dtype::BF16, &[2, 1], &halves), ("labels", Dtype::U8, &[2], &[3, 5])],
        );
        let model = [input("a", DType::F32, &[1, 1])];
        let path = dir.path().join("all.safetensors");
        let feed = Samples::open(&path).unwrap().bind(&model, &Preprocess::default()).unwrap();
        assert_eq!(feed.labels(), Some(&[3, 5][..]));
        assert_eq!(feed.batch(1).unwrap()[0].to_f32().unwrap(), [2.0]);
        assert!(Samples::open(&path).unwrap().with_labels(&path).is_ok());
        // A folder of them, a sample each.
        std::fs::remove_file(&path).unwrap();
        write("1.safetensors", &[("a", Dtype::BF16, &[1, 1], &halves[2..])]);
        write("0.safetensors", &[("a", Dtype::BF16, &[1], &halves[..2])]);
        let feed = Samples::open(dir.path()).unwrap().bind(&model, &Preprocess::default()).unwrap();
        assert_eq!((feed.samples(), feed.batch(1).unwrap()[0].to_f32().unwrap()), (2, vec![2.0]));
        std::fs::write(&path, [0xff; 20]).unwrap();
        let broken = Samples::open(&path).unwrap_err().to_string();
        assert!(broken.contains("all.safetensors") && broken.contains("damaged"), "{broken}");
    }

    #[test]
    fn labels_may_come_from_a_text_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("labels.txt");
        std::fs::write(&path, "3\n1\n\n").unwrap();
        let s = samples(&[("x", floats(&[2, 1]))]).with_labels(&path).unwrap();
        let feed = s.bind(&[input("a", DType::F32, &[1, 1])], &Preprocess::default()).unwrap();
        assert_eq!(feed.labels(), Some(&[3, 1][..]));
        std::fs::write(&path, "3\nx\n").unwrap();
        let bad = samples(&[("x", floats(&[2, 1]))]).with_labels(&path).unwrap_err();
        assert!(bad.to_string().contains("line 2"), "{bad}");
        std::fs::write(&path, "3\n").unwrap();
        let s = samples(&[("x", floats(&[2, 1]))]).with_labels(&path).unwrap();
        let few = s.bind(&[input("a", DType::F32, &[1, 1])], &Preprocess::default()).unwrap_err();
        assert!(few.to_string().contains("1 labels for 2 samples"), "{few}");
    }
}
