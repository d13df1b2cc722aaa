//! The trained network and the images that come with qcc: see `models/README.md`.

use crate::{DataError, Preprocess, Samples};

/// A small residual network that tells the ten classes of Fashion-MNIST apart, in ONNX. Float, 28x28 grey images.
pub const FASHION_RESNET8: &[u8] = include_bytes!("../../models/fashion_resnet8.onnx");

/// 256 images of the training set, for calibration.
///
/// # Errors
/// None in practice: the data is part of the library.
pub fn calibration() -> Result<Samples, DataError> {
    let bytes = include_bytes!("../../models/fashion_mnist_calibration.npz");
    Samples::from_npz_bytes("256 images of Fashion-MNIST", bytes)
}

/// The first 1,000 images of the test set, with labels.
///
/// # Errors
/// None in practice: the data is part of the library.
pub fn test_images() -> Result<Samples, DataError> {
    let bytes = include_bytes!("../../models/fashion_mnist_test.npz");
    Samples::from_npz_bytes("1,000 test images of Fashion-MNIST", bytes)
}

/// (x/255 − 0.2860) / 0.3530, in pixel units.
pub fn preprocess() -> Preprocess {
    Preprocess { mean: vec![0.2860 * 255.0], std: vec![0.3530 * 255.0], ..Preprocess::default() }
}
