//! Samples for calibration and evaluation: arrays, folders of images, or synthetic noise.

mod npy;
mod preprocess;

pub use npy::{parse_npz, read_npy, read_npz, write_npy};
pub use preprocess::Preprocess;

use crate::TensorInfo;
use image::{DynamicImage, GrayImage, ImageReader, RgbImage};
use preprocess::{ImageLayout, write_pixels};
use qcc_ir::{DType, Shape, Tensor};
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
}

#[derive(Clone, Debug)]
enum Source {
    Arrays(Vec<(String, Tensor)>),
    Images(Vec<PathBuf>),
    Noise,
}

/// How many samples of noise stand in for calibration data.
const NOISE_SAMPLES: usize = 8;

impl Samples {
    /// Opens a `.npy` or `.npz` file, a folder of images, or a single image.
    ///
    /// An `.npz` may hold `labels` beside its samples. Images are `.jpg`, `.jpeg`, `.png` or `.bmp`, taken in the order
    /// of their names; where every name begins with a number (`123.jpg`, `7_cat.png`), those numbers are the labels.
    pub fn open(path: &Path) -> Result<Samples, DataError> {
        let origin = path.display().to_string();
        if path.is_dir() {
            return Samples::of_folder(path, origin);
        }
        match extension(path).as_deref() {
            Some("npz") => Samples::of_arrays(origin, read_npz(path)?),
            Some("npy") => Samples::of_arrays(origin, vec![("x".into(), read_npy(path)?)]),
            _ if is_image(path) => Ok(Samples::of_files(origin, vec![path.to_owned()])),
            _ if !path.exists() => Err(DataError::read(path, "no such file or folder")),
            _ => Err(DataError::format(origin, "is neither .npy, .npz, an image nor a folder of images")),
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

    fn new(origin: String, source: Source, labels: Option<Vec<u32>>) -> Samples {
        Samples { origin, source, labels, every: 1, limit: usize::MAX }
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
        let mut files = Vec::new();
        for entry in folder.read_dir().map_err(|e| DataError::read(folder, e))? {
            let path = entry.map_err(|e| DataError::read(folder, e))?.path();
            if is_image(&path) {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            return Err(DataError::Empty(origin));
        }
        Ok(Samples::of_files(origin, files))
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

    /// Labels from a file: `.npy`, an `.npz` with `labels`, or text with one class index a line, in the order of the
    /// samples (for images: of their names).
    pub fn with_labels(self, path: &Path) -> Result<Samples, DataError> {
        let origin = path.display().to_string();
        let labels = match extension(path).as_deref() {
            Some("npy") => labels_of(&origin, &read_npy(path)?)?,
            Some("npz") => {
                let arrays = read_npz(path)?;
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
        matches!(self.source, Source::Noise)
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
            Source::Arrays(arrays) => {
                let pick = |input| pick_array(&self.origin, arrays, input, inputs.len() == 1);
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
        if picked.is_empty() {
            return Err(DataError::Empty(self.origin.clone()));
        }
        let labels = self.labels.as_ref().map(|l| picked.iter().map(|&i| l[i]).collect());
        Ok(Feed { inputs: inputs.to_vec(), feeds, picked, labels, batch, preprocess: preprocess.clone() })
    }
}

/// Samples fitted to a model's inputs, read one batch at a time.
#[derive(Clone, Debug)]
pub struct Feed {
    inputs: Vec<TensorInfo>,
    feeds: Vec<InputFeed>,
    picked: Vec<usize>,
    labels: Option<Vec<u32>>,
    batch: usize,
    preprocess: Preprocess,
}

#[derive(Clone, Debug)]
enum InputFeed {
    Noise,
    Files(Vec<PathBuf>, ImageLayout),
    Pixels(Tensor, ImageLayout),
    /// Elements as they are, a sample a row.
    Rows(Tensor),
    /// Each row is a whole input, batch included.
    Batches(Tensor),
}

impl InputFeed {
    fn of_array(array: &Tensor, input: &TensorInfo, pre: &Preprocess) -> Result<InputFeed, DataError> {
        let dims = array.shape().dims();
        let wanted = input.ty.shape.dims();
        match (array.dtype(), input.ty.dtype, picture_axes(dims)) {
            (DType::U8, DType::F32, Some(_)) => {
                return Ok(InputFeed::Pixels(array.clone(), image_layout(input, pre)?));
            }
            (DType::U8, DType::F32, None) => {
                image_layout(input, pre)?;
                return Err(mismatch(input, format!("u8[{}] is not an array of images", array.shape())));
            }
            // Bytes that are no images go in as they are.
            (DType::U8, DType::U8, Some(_)) if ImageLayout::of(&input.ty.shape).is_some() => {
                return Ok(InputFeed::Pixels(array.clone(), image_layout(input, pre)?));
            }
            _ => {}
        }
        let array = match (array.dtype(), input.ty.dtype) {
            (DType::F64 | DType::F16, DType::F32) => {
                let wide = array.to_f32().unwrap_or_default();
                Tensor::from_vec(array.shape().clone(), wide).map_err(|e| mismatch(input, e.to_string()))?
            }
            (found, wanted) if found == wanted => array.clone(),
            (found, wanted) => {
                return Err(mismatch(input, format!("expected {wanted}, the array holds {found}")));
            }
        };
        match dims {
            [_, rest @ ..] if !wanted.is_empty() && rest == &wanted[1..] => Ok(InputFeed::Rows(array)),
            [_, rest @ ..] if rest == wanted => Ok(InputFeed::Batches(array)),
            _ => Err(mismatch(
                input,
                format!("expected samples for {}, the array is {}", input.ty, array.ty()),
            )),
        }
    }

    /// How many samples there are, of which a batch takes `batch`.
    fn samples(&self, batch: usize) -> usize {
        match self {
            InputFeed::Noise => NOISE_SAMPLES.saturating_mul(batch),
            InputFeed::Files(files, _) => files.len(),
            InputFeed::Pixels(t, _) | InputFeed::Rows(t) => t.shape()[0],
            InputFeed::Batches(t) => t.shape()[0].saturating_mul(batch),
        }
    }
}

impl Feed {
    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.picked.len()
    }

    /// Number of batches that hold them.
    pub fn batches(&self) -> usize {
        self.picked.len().div_ceil(self.batch)
    }

    /// Samples in one batch, the model's first dimension.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// The class index of each sample, where it is known.
    pub fn labels(&self) -> Option<&[u32]> {
        self.labels.as_deref()
    }

    /// The samples of one batch, for each input of the model. The last batch is filled up with its last sample.
    pub fn batch(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let at = |i: usize| self.picked[(index * self.batch + i).min(self.picked.len() - 1)];
        let picked: Vec<usize> = (0..self.batch).map(at).collect();
        self.inputs
            .iter()
            .zip(&self.feeds)
            .enumerate()
            .map(|(n, (i, f))| self.read(n, i, f, &picked))
            .collect()
    }

    fn read(
        &self,
        n: usize,
        input: &TensorInfo,
        feed: &InputFeed,
        picked: &[usize],
    ) -> Result<Tensor, DataError> {
        let shape = &input.ty.shape;
        let finish = |t: Result<Tensor, qcc_ir::TensorError>| t.map_err(|e| mismatch(input, e.to_string()));
        match feed {
            InputFeed::Noise => Ok(noise(input, (picked[0] / self.batch) as u64, n as u64)),
            InputFeed::Files(files, layout) => self.images(input, layout, picked, |i| open_image(&files[i])),
            InputFeed::Pixels(array, layout) => {
                let open = |i: usize| picture(array, i).ok_or_else(|| mismatch(input, "not an image".into()));
                self.images(input, layout, picked, open)
            }
            InputFeed::Rows(array) => {
                let row = array.bytes().len() / array.shape()[0];
                let data: Vec<u8> =
                    picked.iter().flat_map(|i| &array.bytes()[i * row..(i + 1) * row]).copied().collect();
                finish(Tensor::from_bytes(array.dtype(), shape.clone(), data.into()))
            }
            InputFeed::Batches(array) => {
                let row = array.bytes().len() / array.shape()[0];
                let i = picked[0] / self.batch;
                finish(Tensor::from_bytes(
                    array.dtype(),
                    shape.clone(),
                    array.bytes().slice(i * row..(i + 1) * row),
                ))
            }
        }
    }

    fn images(
        &self,
        input: &TensorInfo,
        layout: &ImageLayout,
        picked: &[usize],
        open: impl Fn(usize) -> Result<DynamicImage, DataError>,
    ) -> Result<Tensor, DataError> {
        let shape = input.ty.shape.clone();
        let length = picked.len() * layout.elements();
        let images = match input.ty.dtype {
            DType::U8 => Tensor::from_vec(shape, filled(length, layout, picked, open, write_pixels)?),
            _ => {
                let normalise =
                    |p, layout: &ImageLayout, place: &mut [f32]| self.preprocess.write(p, layout, place);
                Tensor::from_vec(shape, filled(length, layout, picked, open, normalise)?)
            }
        };
        images.map_err(|e| mismatch(input, e.to_string()))
    }
}

/// Images one behind the other.
fn filled<T: Clone + Default>(
    length: usize,
    layout: &ImageLayout,
    picked: &[usize],
    open: impl Fn(usize) -> Result<DynamicImage, DataError>,
    write: impl Fn(DynamicImage, &ImageLayout, &mut [T]),
) -> Result<Vec<T>, DataError> {
    let mut out = vec![T::default(); length];
    for (&i, place) in picked.iter().zip(out.chunks_exact_mut(layout.elements())) {
        write(open(i)?, layout, place);
    }
    Ok(out)
}

fn mismatch(input: &TensorInfo, reason: String) -> DataError {
    DataError::Mismatch { input: input.name.clone(), reason }
}

fn image_layout(input: &TensorInfo, preprocess: &Preprocess) -> Result<ImageLayout, DataError> {
    let takes_numbers = matches!(input.ty.dtype, DType::F32 | DType::U8);
    let layout = ImageLayout::of(&input.ty.shape).filter(|l| l.elements() > 0 && takes_numbers);
    let layout = layout.ok_or_else(|| {
        mismatch(input, format!("{} does not take images; give arrays of that type instead", input.ty))
    })?;
    preprocess.check(&layout)?;
    Ok(layout)
}

fn pick_array<'a>(
    origin: &str,
    arrays: &'a [(String, Tensor)],
    input: &TensorInfo,
    sole: bool,
) -> Result<&'a Tensor, DataError> {
    let named = |name: &str| arrays.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let usual = || named("images").or_else(|| named("x")).or(arrays.first().map(|(_, t)| t));
    named(&input.name).or_else(|| usual().filter(|_| sole)).ok_or_else(|| {
        let names: Vec<&str> = arrays.iter().map(|(n, _)| n.as_str()).collect();
        DataError::format(
            origin,
            format!("has no array for input `{}`, only {}", input.name, names.join(", ")),
        )
    })
}

/// Height, width and channels of the pictures in an array, and whether channels come first.
fn picture_axes(dims: &[usize]) -> Option<(usize, usize, usize, bool)> {
    match *dims {
        [_, h, w] => Some((h, w, 1, false)),
        [_, h, w, c @ (1 | 3)] => Some((h, w, c, false)),
        [_, c @ (1 | 3), h, w] => Some((h, w, c, true)),
        _ => None,
    }
    .filter(|(h, w, ..)| *h > 0 && *w > 0)
}

/// Picture `i` of an array of bytes.
fn picture(array: &Tensor, i: usize) -> Option<DynamicImage> {
    let (h, w, c, channels_first) = picture_axes(array.shape())?;
    let size = h * w * c;
    let bytes = &array.bytes()[i * size..(i + 1) * size];
    let pixels = match channels_first {
        true => (0..size).map(|j| bytes[j % c * h * w + j / c]).collect(),
        false => bytes.to_vec(),
    };
    let (w, h) = (u32::try_from(w).ok()?, u32::try_from(h).ok()?);
    match c {
        1 => GrayImage::from_raw(w, h, pixels).map(DynamicImage::from),
        _ => RgbImage::from_raw(w, h, pixels).map(DynamicImage::from),
    }
}

fn open_image(path: &Path) -> Result<DynamicImage, DataError> {
    let reader = ImageReader::open(path).map_err(|e| DataError::read(path, e))?;
    // By content: folders of downloaded images are full of wrong suffixes.
    let reader = reader.with_guessed_format().map_err(|e| DataError::read(path, e))?;
    let image = reader.decode().map_err(|e| DataError::format(path.display().to_string(), e.to_string()))?;
    match image.width() > 0 && image.height() > 0 {
        true => Ok(image),
        false => Err(DataError::format(path.display().to_string(), "has no pixels")),
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

/// Noise for one input: standard normal for floats, uniform for bytes, which are pixels, and zeros for other integers (any
/// index is then valid).
pub(crate) fn noise(input: &TensorInfo, sample: u64, number: u64) -> Tensor {
    let shape: &Shape = &input.ty.shape;
    let mut state = sample.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.wrapping_mul(0xD1B5_4A32_D192_ED03);
    let elements = 0..shape.elements();
    let noise = match input.ty.dtype {
        DType::F32 => Tensor::from_vec(shape.clone(), elements.map(|_| normal(&mut state)).collect()),
        DType::U8 => Tensor::from_vec(shape.clone(), elements.map(|_| next(&mut state) as u8).collect()),
        other => Ok(Tensor::zeros(other, shape.clone())),
    };
    noise.unwrap_or_else(|_| Tensor::zeros(input.ty.dtype, shape.clone()))
}

/// SplitMix64 (Steele et al., OOPSLA 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number of mean 0 and variance 1: the sum of twelve uniform ones (Irwin–Hall), which needs no function that
/// differs between hosts. The uniform ones are 16-bit pieces of [`next`].
fn normal(state: &mut u64) -> f32 {
    let mut sum = 0u64;
    for _ in 0..3 {
        let z = next(state);
        sum += (0..4).map(|i| (z >> (16 * i)) & 0xFFFF).sum::<u64>();
    }
    sum as f32 / 65536.0 - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcc_ir::TensorType;

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
            GrayImage::from_pixel(2, 2, image::Luma([grey])).save(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("notes.txt"), "no image").unwrap();
        let s = Samples::open(dir.path()).unwrap();
        let feed = s.bind(&[input("a", DType::F32, &[1, 1, 2, 2])], &Preprocess::default()).unwrap();
        assert_eq!(feed.labels(), Some(&[1, 10, 2][..]));
        assert_eq!(feed.batch(1).unwrap()[0].to_f32().unwrap(), [100.0; 4]);
        std::fs::write(dir.path().join("3.png"), "not a png").unwrap();
        let s = Samples::open(dir.path()).unwrap();
        let feed = s.bind(&[input("a", DType::F32, &[1, 1, 2, 2])], &Preprocess::default()).unwrap();
        assert!(feed.batch(3).unwrap_err().to_string().contains("3.png"));
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

    #[test]
    fn noise_has_mean_zero_and_variance_one_and_differs_between_samples() {
        let i = input("a", DType::F32, &[1, 10_000]);
        let x = noise(&i, 3, 0).to_f32().unwrap();
        let mean = x.iter().sum::<f32>() / 1e4;
        let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        assert_ne!(noise(&i, 3, 0), noise(&i, 4, 0));
        assert_eq!(noise(&i, 3, 0), noise(&i, 3, 0));
    }
}
