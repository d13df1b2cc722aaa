//! Boxes of detectors.

use super::compose::Result;
use crate::{
    OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
};

/// The most comparisons of boxes that one node may take: seconds.
const MAX_COMPARISONS: u64 = 1 << 32;

/// A box by its corners: least and largest coordinate in either direction.
#[derive(Clone, Copy)]
struct Corners {
    low: [f32; 2],
    high: [f32; 2],
}

impl Corners {
    /// From two opposite corners, or from centre and size.
    fn new(b: &[f32], by_centre: bool) -> Corners {
        let pair = |i: usize| match by_centre {
            true => (b[i] - b[i + 2] / 2.0, b[i] + b[i + 2] / 2.0),
            false => (b[i].min(b[i + 2]), b[i].max(b[i + 2])),
        };
        let ((a, c), (b, d)) = (pair(0), pair(1));
        Corners { low: [a, b], high: [c, d] }
    }

    fn area(&self) -> f32 {
        (self.high[0] - self.low[0]) * (self.high[1] - self.low[1])
    }

    /// Whether intersection over union is above the threshold. Boxes without an area overlap nothing.
    fn overlaps(&self, other: &Corners, threshold: f32) -> bool {
        let side = |d: usize| (self.high[d].min(other.high[d]) - self.low[d].max(other.low[d])).max(0.0);
        let both = side(0) * side(1);
        let union = self.area() + other.area() - both;
        self.area() > 0.0 && other.area() > 0.0 && union > 0.0 && both / union > threshold
    }
}

/// One number that is known, of floats or integers; `None` where it is left out.
fn known_number(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<Option<Tensor>> {
    let Some(t) = node.known(slot, role)? else { return Ok(None) };
    if t.shape().elements() != 1 {
        return Err(OpError::shape(format!("{role} must be one number, got {}", t.ty())).into());
    }
    Ok(Some(t))
}

fn known_float(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<Option<f32>> {
    let Some(t) = known_number(node, slot, role)? else { return Ok(None) };
    let value = t.to_f32().and_then(|v| v.first().copied());
    value.map(Some).ok_or_else(|| OpError::dtype(format!("{role} must be a float, got {}", t.ty())).into())
}

/// Boxes of each class from the best score downwards, but for those that overlap a better one: `[selected, 3]` of image,
/// class and box. How many there are depends on the operands, which must be known.
pub(super) fn non_max_suppression(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (boxes, scores) = (node.required(0, "boxes")?, node.required(1, "scores")?);
    let most = known_number(node, 2, "max_output_boxes_per_class")?;
    let most = most.and_then(|t| t.to_i64()).and_then(|v| v.first().copied()).unwrap_or(0);
    let most = usize::try_from(most).unwrap_or(0);
    let threshold = known_float(node, 3, "iou_threshold")?.unwrap_or(0.0);
    let least = known_float(node, 4, "score_threshold")?;
    let by_centre = node.flag("center_point_box", false)?;
    if !(0.0..=1.0).contains(&threshold) {
        return Err(OpError::attribute(format!("iou_threshold is {threshold}, not between 0 and 1")).into());
    }
    let (&[images, count, 4], &[score_images, classes, score_count]) =
        (boxes.shape().dims(), scores.shape().dims())
    else {
        return Err(OpError::shape(format!("boxes {} and scores {}", boxes.ty(), scores.ty())).into());
    };
    if images != score_images || count != score_count {
        return Err(OpError::shape(format!("boxes {} do not have scores {}", boxes.ty(), scores.ty())).into());
    }
    let (Some(corners), Some(values)) = (boxes.to_f32(), scores.to_f32()) else {
        return Err(OpError::dtype(format!("takes floats, got {} and {}", boxes.ty(), scores.ty())).into());
    };
    let corners: Vec<Corners> = corners.chunks_exact(4).map(|b| Corners::new(b, by_centre)).collect();
    let (mut selected, mut comparisons) = (vec![], 0u64);
    for (group, scores) in values.chunks(count.max(1)).enumerate() {
        let (image, class) = (group / classes, group % classes);
        let own = &corners[image * count..][..count];
        for kept in best(own, scores, most, threshold, least, &mut comparisons)? {
            selected.extend([image as i64, class as i64, kept as i64]);
        }
    }
    let shape = Shape::new([selected.len() / 3, 3])?;
    let tensor = Tensor::from_vec(shape, selected).map_err(OpError::from)?;
    Ok(node.constant(tensor))
}

/// The boxes of one class that stay, best first; of equal scores the first.
fn best(
    boxes: &[Corners],
    scores: &[f32],
    most: usize,
    threshold: f32,
    least: Option<f32>,
    comparisons: &mut u64,
) -> Result<Vec<usize>, NodeError> {
    let mut candidates: Vec<usize> =
        (0..scores.len()).filter(|&i| least.is_none_or(|least| scores[i] > least)).collect();
    candidates.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut kept: Vec<usize> = vec![];
    for i in candidates {
        if kept.len() >= most {
            break;
        }
        *comparisons += kept.len() as u64;
        if *comparisons > MAX_COMPARISONS {
            let why = format!("takes more than {MAX_COMPARISONS} comparisons; raise score_threshold");
            return Err(OpError::too_large(why).into());
        }
        if kept.iter().all(|&k| !boxes[i].overlaps(&boxes[k], threshold)) {
            kept.push(i);
        }
    }
    Ok(kept)
}
