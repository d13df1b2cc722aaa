//! Samples as batches of a model's inputs.

use super::{
    DataError, array_for,
    noise::noise,
    preprocess::{ImageLayout, Preprocess, write_pixels},
    read_arrays,
};
use crate::TensorInfo;
use image::{DynamicImage, GrayImage, ImageReader, RgbImage};
use qcc_ir::{DType, Shape, Tensor, TensorType};
use rayon::prelude::*;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// How many samples of noise stand in for calibration data.
const NOISE_SAMPLES: usize = 8;

/// Samples fitted to a model's inputs, read one batch at a time.
#[derive(Clone, Debug)]
pub struct Feed {
    pub(super) inputs: Vec<TensorInfo>,
    pub(super) feeds: Vec<InputFeed>,
    pub(super) picked: Vec<usize>,
    pub(super) labels: Option<Vec<u32>>,
    pub(super) batch: usize,
    pub(super) preprocess: Preprocess,
    /// All batches, where they were read before.
    pub(super) kept: Option<Arc<Vec<Vec<Tensor>>>>,
}

/// Bytes of samples that are kept in memory to be run many times.
const MOST_KEPT: usize = 256 << 20;

#[derive(Clone, Debug)]
pub(super) enum InputFeed {
    Noise,
    Files(Vec<PathBuf>, ImageLayout),
    /// Files of arrays with a sample each.
    Arrays(Vec<PathBuf>),
    Pixels(Tensor, ImageLayout),
    /// Elements as they are, a sample a row.
    Rows(Tensor),
    /// Each row is a whole input, batch included.
    Batches(Tensor),
}

impl InputFeed {
    pub(super) fn of_array(
        array: &Tensor,
        input: &TensorInfo,
        pre: &Preprocess,
    ) -> Result<InputFeed, DataError> {
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
            (DType::F64 | DType::F16 | DType::BF16, DType::F32) => {
                let wide = array.to_f32().unwrap_or_default();
                Tensor::from_vec(array.shape().clone(), wide).map_err(|e| mismatch(input, e.to_string()))?
            }
            (found, wanted) if found == wanted => array.clone(),
            (found, wanted) => {
                return Err(mismatch(input, format!("expected {wanted}, the array holds {found}")));
            }
        };
        if (dims, wanted) == (&[], &[]) {
            // A number that is the same for all.
            return reshaped(input, &array, vec![1]).map(InputFeed::Batches);
        }
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
    pub(super) fn samples(&self, batch: usize) -> usize {
        match self {
            InputFeed::Noise => NOISE_SAMPLES.saturating_mul(batch),
            InputFeed::Files(files, _) | InputFeed::Arrays(files) => files.len(),
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

    /// Samples in one of the batches, without the copies that fill up the last one.
    pub fn samples_in(&self, index: usize) -> usize {
        self.batch.min(self.samples().saturating_sub(index.saturating_mul(self.batch)))
    }

    /// The class index of each sample, where it is known.
    pub fn labels(&self) -> Option<&[u32]> {
        self.labels.as_deref()
    }

    /// The number that a sample has in the data, before some of them were picked, and its file, where it has one of its own.
    pub fn place(&self, sample: usize) -> (u64, Option<String>) {
        let Some(&at) = self.picked.get(sample) else { return (sample as u64, None) };
        let file = self.feeds.iter().find_map(|feed| match feed {
            InputFeed::Files(files, _) | InputFeed::Arrays(files) => files.get(at),
            InputFeed::Noise | InputFeed::Pixels(..) | InputFeed::Rows(_) | InputFeed::Batches(_) => None,
        });
        (at as u64, file.map(|f| f.display().to_string()))
    }

    /// Whether the samples of an input are images, which are preprocessed.
    pub fn holds_pixels(&self, input: &str) -> bool {
        let is_image = |feed: &InputFeed| matches!(feed, InputFeed::Files(..) | InputFeed::Pixels(..));
        self.inputs.iter().zip(&self.feeds).any(|(i, feed)| i.name == input && is_image(feed))
    }

    /// The same, read once and kept in memory for who runs them many times, where they are of no more than 256 MiB: opening and
    /// resizing an image can take as long as a network.
    ///
    /// # Errors
    /// Where a sample cannot be read.
    pub fn kept(self) -> Result<Feed, DataError> {
        let bytes: usize = self.inputs.iter().map(|i| i.ty.bytes()).sum();
        if bytes.saturating_mul(self.batches()) > MOST_KEPT {
            return Ok(self);
        }
        let batches: Vec<_> = (0..self.batches()).into_par_iter().map(|i| self.batch(i)).collect();
        // The first error, whichever thread was first.
        let batches = batches.into_iter().collect::<Result<_, _>>()?;
        Ok(Feed { kept: Some(Arc::new(batches)), ..self })
    }

    /// The samples of one batch, for each input of the model. The last batch is filled up with its last sample.
    pub fn batch(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        if let Some(batch) = self.kept.as_ref().and_then(|kept| kept.get(index)) {
            return Ok(batch.clone());
        }
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
            InputFeed::Arrays(files) => {
                let mut data = Vec::new();
                for &i in picked {
                    data.extend_from_slice(self.of_file(input, &files[i])?.bytes());
                }
                finish(Tensor::from_bytes(input.ty.dtype, shape.clone(), data.into()))
            }
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

    /// The one sample of a file, with a batch of one or without it.
    fn of_file(&self, input: &TensorInfo, file: &Path) -> Result<Tensor, DataError> {
        let origin = file.display().to_string();
        let arrays = read_arrays(file)?;
        let array = array_for(&origin, &arrays, &input.name, self.inputs.len() == 1)?;
        let dims = input.ty.shape.dims();
        let one: Vec<usize> = dims.iter().take(1).map(|_| 1).chain(dims.iter().skip(1).copied()).collect();
        let array = match array.shape().dims() == one.get(1..).unwrap_or_default() {
            true => {
                reshaped(input, array, std::iter::once(1).chain(array.shape().iter().copied()).collect())?
            }
            false => array.clone(),
        };
        let shape = Shape::new(one).map_err(|e| mismatch(input, e.to_string()))?;
        let input = TensorInfo { name: input.name.clone(), ty: TensorType::new(input.ty.dtype, shape) };
        let feed = InputFeed::of_array(&array, &input, &self.preprocess)?;
        match feed.samples(1) {
            1 => self.read(0, &input, &feed, &[0]),
            n => Err(mismatch(&input, format!("`{origin}` has {n} samples; each file of a folder is one"))),
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

fn reshaped(input: &TensorInfo, array: &Tensor, dims: Vec<usize>) -> Result<Tensor, DataError> {
    let shape = Shape::new(dims).map_err(|e| mismatch(input, e.to_string()))?;
    let same = Tensor::from_bytes(array.dtype(), shape, array.bytes().clone());
    same.map_err(|e| mismatch(input, e.to_string()))
}

pub(super) fn mismatch(input: &TensorInfo, reason: String) -> DataError {
    DataError::Mismatch { input: input.name.clone(), reason }
}

pub(super) fn image_layout(input: &TensorInfo, preprocess: &Preprocess) -> Result<ImageLayout, DataError> {
    let takes_numbers = matches!(input.ty.dtype, DType::F32 | DType::U8);
    let layout = ImageLayout::of(&input.ty.shape).filter(|l| l.elements() > 0 && takes_numbers);
    let layout = layout.ok_or_else(|| {
        mismatch(input, format!("{} does not take images; give arrays of that type instead", input.ty))
    })?;
    preprocess.check(&layout)?;
    Ok(layout)
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
