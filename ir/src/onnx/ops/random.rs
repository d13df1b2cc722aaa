//! Random numbers.
//!
//! They are made when the model is imported, so that a graph gives the same results each time. The generator is MT19937 with
//! 53-bit numbers from 0 to 1, the one of NumPy's `RandomState`: with a `seed` a node has the numbers that ONNX's reference
//! evaluator gives. Without one, the seed is a hash of the node's name.

use super::{compose::Result, elementwise, lengths};
use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{ArgExtreme, BinaryKind},
};
use rand_mt::Mt;

/// The numbers of a node.
pub(super) struct Generator {
    source: Mt,
    /// Normal numbers come in pairs.
    spare: Option<f64>,
}

impl Generator {
    pub(super) fn new(seed: u32) -> Generator {
        Generator { source: Mt::new(seed), spare: None }
    }

    /// By the attribute `seed`, which is a float.
    fn of(node: &mut Node<'_, '_>) -> Result<Generator> {
        let seed = match node.optional_float("seed")? {
            Some(seed) => seed as i64 as u32,
            None => hash(node.name()),
        };
        Ok(Generator::new(seed))
    }

    /// From 0 to below 1.
    pub(super) fn uniform(&mut self) -> f64 {
        let (high, low) = (self.source.next_u32() >> 5, self.source.next_u32() >> 6);
        (f64::from(high) * f64::from(1 << 26) + f64::from(low)) / (1u64 << 53) as f64
    }

    /// Of mean 0 and deviation 1, by Marsaglia's polar method.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        loop {
            let (x, y) = (2.0 * self.uniform() - 1.0, 2.0 * self.uniform() - 1.0);
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                let factor = (-2.0 * square.ln() / square).sqrt();
                self.spare = Some(factor * x);
                return factor * y;
            }
        }
    }
}

/// FNV-1a of 32 bits.
pub(super) fn hash(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}

/// The shape and type of the result of a node that has none, or those of its operand where attributes do not say.
fn wanted(node: &mut Node<'_, '_>, is_like: bool) -> Result<(Shape, DType)> {
    let code = node.optional_int("dtype")?;
    let dtype = code.map(|code| elementwise::dtype("dtype", code)).transpose()?;
    if is_like {
        let x = node.operand(0, "input")?;
        return Ok((node.shape(x), dtype.unwrap_or(node.ty(x).dtype)));
    }
    let dims = node.ints("shape")?.ok_or_else(|| NodeError::attribute("shape", "is missing"))?;
    Ok((Shape::new(lengths("shape", &dims)?)?, dtype.unwrap_or(DType::F32)))
}

fn normal_of(node: &mut Node<'_, '_>, is_like: bool) -> Result<ValueId> {
    let (shape, dtype) = wanted(node, is_like)?;
    let (mean, scale) = (f64::from(node.float("mean", 0.0)?), f64::from(node.float("scale", 1.0)?));
    let mut generator = Generator::of(node)?;
    node.numbers("numbers", dtype, shape, |_| mean + scale * generator.normal())
}

fn uniform_of(node: &mut Node<'_, '_>, is_like: bool) -> Result<ValueId> {
    let (shape, dtype) = wanted(node, is_like)?;
    let (low, high) = (f64::from(node.float("low", 0.0)?), f64::from(node.float("high", 1.0)?));
    let mut generator = Generator::of(node)?;
    node.numbers("numbers", dtype, shape, |_| low + (high - low) * generator.uniform())
}

pub(super) fn random_normal(node: &mut Node<'_, '_>) -> Result<ValueId> {
    normal_of(node, false)
}

pub(super) fn random_normal_like(node: &mut Node<'_, '_>) -> Result<ValueId> {
    normal_of(node, true)
}

pub(super) fn random_uniform(node: &mut Node<'_, '_>) -> Result<ValueId> {
    uniform_of(node, false)
}

pub(super) fn random_uniform_like(node: &mut Node<'_, '_>) -> Result<ValueId> {
    uniform_of(node, true)
}

/// 1 where a uniform number is below the operand.
pub(super) fn bernoulli(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let to = match node.optional_int("dtype")? {
        Some(code) => elementwise::dtype("dtype", code)?,
        None => node.ty(x).dtype,
    };
    let mut generator = Generator::of(node)?;
    let (shape, dtype) = (node.shape(x), node.ty(x).dtype);
    let drawn = node.numbers("drawn", dtype, shape, |_| generator.uniform())?;
    let is_below = node.binary("is_below", BinaryKind::Less, drawn, x)?;
    node.cast_to("", to, is_below)
}

/// Classes by their unnormalised log-probabilities: the largest of these and of a Gumbel number each.
pub(super) fn multinomial(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.operand(0, "input")?;
    node.check_float("input", x)?;
    let count = node.count("sample_size")?.unwrap_or(1);
    let to = elementwise::dtype("dtype", node.int("dtype", 6)?)?;
    let &[batch, classes] = node.shape(x).dims() else {
        return Err(OpError::shape(format!("takes batch and classes, got {}", node.ty(x))).into());
    };
    let mut generator = Generator::of(node)?;
    let dtype = node.ty(x).dtype;
    let noise = Shape::new([batch, count, classes])?;
    // −ln(−ln u), of a u above 0.
    let mut gumbel = || -(-(1.0 - generator.uniform()).ln()).max(f64::MIN_POSITIVE).ln();
    let noise = node.numbers("noise", dtype, noise, |_| gumbel())?;
    let x = node.shaped("classes", [batch, 1, classes], x)?;
    let noisy = node.add("noisy", x, noise)?;
    let best = ArgExtreme { largest: true, axis: 2, keep_dims: false, last: false };
    let best = node.emit_part("best", best, &[noisy])?;
    node.cast_to("", to, best)
}

/// Data of which a share is made 0, and the rest so much larger; and which elements were kept.
pub(super) fn dropped(node: &mut Node<'_, '_>, x: ValueId, ratio: f64, seed: u32) -> Result<Vec<ValueId>> {
    node.check_float("data", x)?;
    if !(0.0..1.0).contains(&ratio) {
        return Err(OpError::attribute(format!("ratio is {ratio}")).into());
    }
    let (shape, dtype) = (node.shape(x), node.ty(x).dtype);
    let mut generator = Generator::new(seed);
    let mut kept = || f64::from(u8::from(generator.uniform() >= ratio));
    let mask = node.numbers("kept", DType::F32, shape, |_| kept())?;
    let mask = node.cast_to("mask", DType::Bool, mask)?;
    let scale = node.number("scale", 1.0 / (1.0 - ratio), dtype)?;
    let scaled = node.mul("scaled", x, scale)?;
    let zero = node.constant_part("zero", Tensor::zeros(dtype, Shape::scalar()));
    let y = node.chosen("", mask, scaled, zero)?;
    Ok(vec![y, mask])
}
