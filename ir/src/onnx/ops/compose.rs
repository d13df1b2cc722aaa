//! How nodes are put together from several IR ops: each step has a name of its own behind the node's, and the last one,
//! whose part is `""`, the node's own.

use crate::{
    DType, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
    ops::{
        Binary, BinaryKind, Cast, Clamp, Concat, Expand, Gather, MatMul, Op, Pad, PadMode, Reduce,
        ReduceKind, Reshape, Slice, SliceSpec, Softmax, Transpose, Unary, UnaryKind, Where,
    },
};

pub(super) type Result<T, E = NodeError> = std::result::Result<T, E>;

impl Node<'_, '_> {
    /// Adds an op under the name of a part; under the node's own where that is `""`.
    pub(super) fn step(&mut self, part: &str, op: impl Into<Op>, operands: &[ValueId]) -> Result<ValueId> {
        if part.is_empty() { self.emit(op, operands) } else { self.emit_part(part, op, operands) }
    }

    pub(super) fn binary(&mut self, part: &str, kind: BinaryKind, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.step(part, Binary { kind }, &[a, b])
    }

    pub(super) fn add(&mut self, part: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(part, BinaryKind::Add, a, b)
    }

    pub(super) fn sub(&mut self, part: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(part, BinaryKind::Sub, a, b)
    }

    pub(super) fn mul(&mut self, part: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(part, BinaryKind::Mul, a, b)
    }

    pub(super) fn div(&mut self, part: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(part, BinaryKind::Div, a, b)
    }

    pub(super) fn unary(&mut self, part: &str, kind: UnaryKind, x: ValueId) -> Result<ValueId> {
        self.step(part, Unary { kind }, &[x])
    }

    /// Elements of `a` where the condition holds, of `b` elsewhere.
    pub(super) fn chosen(
        &mut self,
        part: &str,
        condition: ValueId,
        a: ValueId,
        b: ValueId,
    ) -> Result<ValueId> {
        self.step(part, Where {}, &[condition, a, b])
    }

    /// The plain product of matrices.
    pub(super) fn product(&mut self, part: &str, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.step(part, MatMul { bias: false, residual: false, clamp: Clamp::NONE }, &[a, b])
    }

    pub(super) fn softmax_along(&mut self, part: &str, axis: usize, x: ValueId) -> Result<ValueId> {
        self.step(part, Softmax { axis, log: false }, &[x])
    }

    /// A reduction along axes that stay with length 1.
    pub(super) fn reduced(
        &mut self,
        part: &str,
        kind: ReduceKind,
        axes: Vec<usize>,
        x: ValueId,
    ) -> Result<ValueId> {
        self.step(part, Reduce { kind, axes, keep_dims: true }, &[x])
    }

    /// The value in another type; itself where it has that type.
    pub(super) fn cast_to(&mut self, part: &str, to: DType, x: ValueId) -> Result<ValueId> {
        if self.ty(x).dtype == to { Ok(x) } else { self.step(part, Cast { to }, &[x]) }
    }

    /// The value in another shape of as many elements; itself where it has that shape.
    pub(super) fn shaped(&mut self, part: &str, dims: impl Into<Vec<usize>>, x: ValueId) -> Result<ValueId> {
        let shape = Shape::new(dims)?;
        if *self.shape(x) == *shape { Ok(x) } else { self.step(part, Reshape { shape }, &[x]) }
    }

    pub(super) fn permuted(
        &mut self,
        part: &str,
        perm: impl Into<Vec<usize>>,
        x: ValueId,
    ) -> Result<ValueId> {
        self.step(part, Transpose { perm: perm.into() }, &[x])
    }

    pub(super) fn expanded(
        &mut self,
        part: &str,
        dims: impl Into<Vec<usize>>,
        x: ValueId,
    ) -> Result<ValueId> {
        let shape = Shape::new(dims)?;
        if *self.shape(x) == *shape { Ok(x) } else { self.step(part, Expand { shape }, &[x]) }
    }

    /// The elements from `start` on, `len` of them, of one axis; the value itself where that is all.
    pub(super) fn sliced(&mut self, part: &str, axis: usize, spec: SliceSpec, x: ValueId) -> Result<ValueId> {
        let shape = self.shape(x);
        let mut axes: Vec<SliceSpec> = shape.iter().map(|&d| SliceSpec::all(d)).collect();
        match axes.get_mut(axis) {
            None => return Err(self.no_axis(axis, x)),
            Some(all) if *all == spec => return Ok(x),
            Some(all) => *all = spec,
        }
        self.step(part, Slice { axes }, &[x])
    }

    fn no_axis(&self, axis: usize, x: ValueId) -> NodeError {
        OpError::shape(format!("{} has no axis {axis}", self.ty(x))).into()
    }

    pub(super) fn joined(&mut self, part: &str, axis: usize, parts: &[ValueId]) -> Result<ValueId> {
        match parts {
            [only] => Ok(*only),
            _ => self.step(part, Concat { axis }, parts),
        }
    }

    /// `count` elements of this value behind the last one of an axis; the value itself where there are none.
    pub(super) fn padded(
        &mut self,
        part: &str,
        axis: usize,
        count: usize,
        value: f64,
        x: ValueId,
    ) -> Result<ValueId> {
        if count == 0 {
            return Ok(x);
        }
        let rank = self.shape(x).rank();
        let (before, mut after) = (vec![0; rank], vec![0; rank]);
        *after.get_mut(axis).ok_or_else(|| self.no_axis(axis, x))? = count;
        self.step(part, Pad { before, after, mode: PadMode::Constant { value } }, &[x])
    }

    pub(super) fn gathered(
        &mut self,
        part: &str,
        axis: usize,
        x: ValueId,
        indices: ValueId,
    ) -> Result<ValueId> {
        self.step(part, Gather { axis }, &[x, indices])
    }

    /// A number of a float type, rounded once.
    pub(super) fn number(&mut self, part: &str, value: f64, dtype: DType) -> Result<ValueId> {
        let tensor = float_tensor(dtype, Shape::scalar(), &[value])?;
        Ok(self.constant_part(part, tensor))
    }

    /// A constant whose elements are a function of their row-major index, as large as import may make one.
    pub(super) fn numbers(
        &mut self,
        part: &str,
        dtype: DType,
        shape: Shape,
        at: impl FnMut(usize) -> f64,
    ) -> Result<ValueId> {
        self.take_bytes(shape.elements() * DType::F64.size())?;
        let values: Vec<f64> = (0..shape.elements()).map(at).collect();
        let tensor = float_tensor(dtype, shape, &values)?;
        Ok(self.constant_part(part, tensor))
    }

    /// 0, 1, 2… as f32, which holds them, in this shape.
    pub(super) fn counting(
        &mut self,
        part: &str,
        dims: impl Into<Vec<usize>>,
        from: usize,
    ) -> Result<ValueId> {
        let shape = Shape::new(dims)?;
        let n = shape.elements();
        if from.saturating_add(n) > 1 << f32::MANTISSA_DIGITS {
            return Err(OpError::too_large(format!(
                "{n} positions from {from} on, which f32 does not count"
            ))
            .into());
        }
        let numbers: Vec<f32> = (from..from + n).map(|i| i as f32).collect();
        let tensor = Tensor::from_vec(shape, numbers).map_err(OpError::from)?;
        Ok(self.constant_part(part, tensor))
    }

    /// The narrower floats in f32, in which they are computed; others as they are.
    pub(super) fn widened(&mut self, part: &str, x: ValueId) -> Result<ValueId> {
        match self.ty(x).dtype {
            DType::F16 | DType::BF16 => self.cast_to(part, DType::F32, x),
            _ => Ok(x),
        }
    }

    /// Fails unless the value is of floats.
    pub(super) fn check_float(&self, role: &str, x: ValueId) -> Result<()> {
        let ty = self.ty(x);
        if ty.dtype.is_float() {
            return Ok(());
        }
        Err(OpError::dtype(format!("{role} must be of floats, got {ty}")).into())
    }

    /// An attribute that counts something, at least 1; `None` where it is absent.
    pub(super) fn count(&mut self, name: &'static str) -> Result<Option<usize>> {
        let Some(given) = self.optional_int(name)? else { return Ok(None) };
        match usize::try_from(given) {
            Ok(n) if n > 0 => Ok(Some(n)),
            _ => Err(NodeError::attribute(name, format!("is {given}, not at least 1"))),
        }
    }

    /// The axis that an attribute names, counted from the back where negative.
    pub(super) fn axis_of(&mut self, name: &'static str, default: i64, x: ValueId) -> Result<usize> {
        let axis = self.int(name, default)?;
        let ty = self.ty(x);
        ty.shape.axis(axis).ok_or_else(|| NodeError::attribute(name, format!("is {axis} for {ty}")))
    }
}

/// Numbers rounded once to a float type.
pub(super) fn float_tensor(dtype: DType, shape: Shape, values: &[f64]) -> Result<Tensor> {
    let tensor = match dtype {
        DType::F64 => Tensor::from_vec(shape, values.to_vec()),
        DType::F16 => Tensor::from_vec(shape, values.iter().map(|&x| half::f16::from_f64(x)).collect()),
        DType::BF16 => Tensor::from_vec(shape, values.iter().map(|&x| half::bf16::from_f64(x)).collect()),
        DType::F32 => Tensor::from_vec(shape, values.iter().map(|&x| x as f32).collect()),
        other => return Err(OpError::dtype(format!("takes floats, got {other}")).into()),
    };
    Ok(tensor.map_err(OpError::from)?)
}
