//! From pixels to what a network takes.

use super::DataError;
use image::{DynamicImage, imageops::FilterType};
use qcc_ir::{Shape, numerics};
use qcc_passes::ImageInput;
use serde::{Deserialize, Serialize};

/// How pixels become the numbers that a model was trained on: y = (x − mean) / std, with x, mean and std in pixel
/// units (0 to 255).
///
/// The defaults leave pixels as they are: RGB order, 0 to 255, at the size of the model's input.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Preprocess {
    /// Mean of each channel, in the order in which the model takes channels; one for all; empty for 0.
    pub mean: Vec<f32>,
    /// Standard deviation, likewise; empty for 1.
    pub std: Vec<f32>,
    /// Height and width that images are brought to; that of the model's input where `None`.
    pub size: Option<(usize, usize)>,
    /// Whether the model takes blue first.
    pub bgr: bool,
}

/// Where the channels of an image input are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Channels {
    First,
    Last,
    /// `N x H x W`: grey, without an axis of its own.
    None,
}

/// How one image of a batch is laid out in a model's input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ImageLayout {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
    place: Channels,
}

impl ImageLayout {
    /// The layout of an input of this shape, if it can take images: `NxCxHxW`, `NxHxWxC` or `NxHxW` with C 1 or 3.
    pub(super) fn of(shape: &Shape) -> Option<ImageLayout> {
        match *shape.dims() {
            [_, channels @ (1 | 3), height, width] => {
                Some(ImageLayout { height, width, channels, place: Channels::First })
            }
            [_, height, width, channels @ (1 | 3)] => {
                Some(ImageLayout { height, width, channels, place: Channels::Last })
            }
            [_, height, width] => Some(ImageLayout { height, width, channels: 1, place: Channels::None }),
            _ => None,
        }
    }

    pub(super) fn elements(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Index of a channel of a pixel within the image.
    fn index(&self, channel: usize, pixel: usize) -> usize {
        match self.place {
            Channels::First | Channels::None => channel * self.height * self.width + pixel,
            Channels::Last => pixel * self.channels + channel,
        }
    }
}

impl Preprocess {
    /// Fails unless means and deviations are usable for images of so many channels.
    pub(super) fn check(&self, layout: &ImageLayout) -> Result<(), DataError> {
        let fits = |v: &[f32]| v.len() <= 1 || v.len() == layout.channels;
        if !fits(&self.mean) || !fits(&self.std) {
            return Err(DataError::Preprocess(format!(
                "{} means and {} standard deviations for {} channels; give one for all, or one each",
                self.mean.len(),
                self.std.len(),
                layout.channels
            )));
        }
        if self.std.iter().any(|s| !(s.is_finite() && *s > 0.0)) || self.mean.iter().any(|m| !m.is_finite()) {
            let why = "means must be finite and standard deviations above 0";
            return Err(DataError::Preprocess(why.into()));
        }
        match self.size {
            Some((h, w)) if (h, w) != (layout.height, layout.width) => Err(DataError::Preprocess(format!(
                "images of {h}x{w} do not fit the model's input of {}x{}; bind another shape, or leave the size away",
                layout.height, layout.width
            ))),
            _ => Ok(()),
        }
    }

    /// Writes one image into its place of a batch of floats.
    pub(super) fn write(&self, picture: DynamicImage, layout: &ImageLayout, out: &mut [f32]) {
        let pixels = pixels_of(picture, layout);
        for channel in 0..layout.channels {
            let pick = |v: &[f32], default| match v {
                [] => default,
                [one] => *one,
                many => many[channel],
            };
            let (mean, std) = (pick(&self.mean, 0.0), pick(&self.std, 1.0));
            let source = if self.bgr { layout.channels - 1 - channel } else { channel };
            for pixel in 0..layout.height * layout.width {
                let x = pixels[pixel * layout.channels + source];
                out[layout.index(channel, pixel)] = numerics::normalize(x, mean, std);
            }
        }
    }

    /// What a model that takes pixels is to do itself.
    pub(crate) fn image_input(&self) -> ImageInput {
        ImageInput { mean: self.mean.clone(), std: self.std.clone(), bgr: self.bgr }
    }
}

/// The pixels of an image brought to a layout's size: rows of grey, or of red, green and blue.
fn pixels_of(picture: DynamicImage, layout: &ImageLayout) -> Vec<u8> {
    let picture = fit(picture, layout.height, layout.width);
    match layout.channels {
        1 => picture.into_luma8().into_raw(),
        _ => picture.into_rgb8().into_raw(),
    }
}

/// Writes the pixels of one image into their place of a batch of bytes, as they are.
pub(super) fn write_pixels(picture: DynamicImage, layout: &ImageLayout, out: &mut [u8]) {
    for (i, pixel) in pixels_of(picture, layout).into_iter().enumerate() {
        out[layout.index(i % layout.channels, i / layout.channels)] = pixel;
    }
}

/// The share of a resized image that a centre crop keeps in the usual evaluation of ImageNet networks: 224 of 256.
const CROP: f64 = 0.875;

/// Brings an image to a size, keeping its proportions. An image that covers the size and is not more than 1/0.875 as
/// large is cropped about its centre and not resampled; a larger one is first reduced until the size is 0.875 of its
/// shorter side; a smaller one is first enlarged until it covers the size.
fn fit(picture: DynamicImage, height: usize, width: usize) -> DynamicImage {
    let (h, w) = (f64::from(picture.height()), f64::from(picture.width()));
    let cover = (height as f64 / h).max(width as f64 / w);
    let scale = match cover {
        c if c > 1.0 => c,
        // Rounding of sizes to whole pixels must not make 256 for 224 a case of resampling.
        c if c >= CROP - 1e-9 => 1.0,
        c => c / CROP,
    };
    let picture = if scale == 1.0 {
        picture
    } else {
        let to = |side: f64, least: usize| ((side * scale).round() as u32).max(least as u32);
        picture.resize_exact(to(w, width), to(h, height), FilterType::Triangle)
    };
    let (height, width) = (height as u32, width as u32);
    picture.crop_imm((picture.width() - width) / 2, (picture.height() - height) / 2, width, height)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, Luma, Rgb, RgbImage};

    fn layout(dims: [usize; 4]) -> ImageLayout {
        ImageLayout::of(&Shape::new(dims).unwrap()).unwrap()
    }

    fn numbered(width: u32, height: u32) -> DynamicImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 7])).into()
    }

    #[test]
    fn an_image_of_256_is_cropped_about_its_centre_without_resampling() {
        for (size, first) in [(224usize, 16u8), (227, 14), (256, 0)] {
            let l = layout([1, 3, size, size]);
            let mut out = vec![0.0; l.elements()];
            Preprocess::default().write(numbered(256, 256), &l, &mut out);
            assert_eq!((out[0], out[1]), (f32::from(first), f32::from(first) + 1.0), "{size}");
            assert_eq!(out[size * size + size], f32::from(first) + 1.0, "second row of green");
        }
    }

    #[test]
    fn large_and_small_images_are_resampled_to_cover_the_size() {
        for (w, h) in [(500, 400), (400, 500), (20, 31), (1, 1), (33, 1000)] {
            let p = fit(numbered(w, h), 24, 32);
            assert_eq!((p.width(), p.height()), (32, 24), "{w}x{h}");
        }
    }

    #[test]
    fn channels_are_normalised_in_the_order_of_the_model() {
        let picture: DynamicImage = RgbImage::from_pixel(1, 2, Rgb([10, 20, 30])).into();
        let pre = Preprocess { mean: vec![1.0, 2.0, 3.0], std: vec![2.0], size: None, bgr: true };
        let mut out = [0.0; 6];
        pre.write(picture.clone(), &layout([1, 3, 2, 1]), &mut out);
        assert_eq!(out, [14.5, 14.5, 9.0, 9.0, 3.5, 3.5]);
        pre.write(picture, &layout([1, 2, 1, 3]), &mut out);
        assert_eq!(out, [14.5, 9.0, 3.5, 14.5, 9.0, 3.5]);
    }

    #[test]
    fn grey_images_fit_one_channel_and_three() {
        let grey: DynamicImage = GrayImage::from_pixel(2, 2, Luma([9])).into();
        let mut one = [0.0; 4];
        Preprocess::default().write(grey.clone(), &layout([1, 1, 2, 2]), &mut one);
        assert_eq!(one, [9.0; 4]);
        let mut three = [0.0; 12];
        Preprocess::default().write(grey, &layout([1, 3, 2, 2]), &mut three);
        assert_eq!(three, [9.0; 12]);
    }

    #[test]
    fn unusable_settings_are_refused() {
        let l = layout([1, 3, 8, 8]);
        let refused = |p: Preprocess| p.check(&l).unwrap_err().to_string();
        assert!(refused(Preprocess { mean: vec![1.0, 2.0], ..Preprocess::default() }).contains("2 means"));
        assert!(refused(Preprocess { std: vec![0.0], ..Preprocess::default() }).contains("above 0"));
        assert!(refused(Preprocess { size: Some((9, 8)), ..Preprocess::default() }).contains("9x8"));
    }
}
