//! Matrix products: with constant weights, and of two values that are computed at run time.

use super::{
    Lowerer, Lowering,
    product::{self, Extras, Kernel, Parts, with_slack},
};
use crate::{
    CodegenError,
    dense::{
        Problem, Strides, WeightOrder,
        driver::{self, Operands, Pair, Starts},
        repack::SecondOperands,
        spec::{Epilogue, Product},
    },
    kernels::map::View,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, Tensor, TensorError,
    numerics::ChannelBounds,
    ops::{Clamp, MatMul, QMatMul},
};

/// `MatMul` and `QMatMul`.
pub(super) const MATMUL: Lowerer = Lowerer { supported, lower };

/// `[rows, inner]` by `[inner, columns]`; leading dimensions are rows.
struct Matrices {
    product: Product,
    rows: usize,
    inner: usize,
    columns: usize,
    extras: Extras,
    clamp: Clamp,
}

impl Matrices {
    fn of(graph: &Graph, node: NodeId) -> Result<Matrices, String> {
        let (product, clamp, extras) = match graph.op(node) {
            Some(Op::MatMul(m)) => (Product::F32, m.clamp, Extras::new(m.bias, m.residual_slot())),
            Some(Op::QMatMul(m)) => (Product::U8S8, Clamp::NONE, Extras::new(m.bias, m.residual_slot())),
            _ => return Err("not a matrix product".into()),
        };
        let (a, b) = (graph.shape(graph.operand(node, 0)), graph.shape(graph.operand(node, 1)));
        let &[inner, columns] = &b[..] else {
            return Err(format!(
                "weights of rank {}: only one matrix for all of the batch has kernels",
                b.rank()
            ));
        };
        Ok(Matrices { product, rows: a.elements() / inner.max(1), inner, columns, extras, clamp })
    }

    fn problem(&self) -> Problem {
        let element = self.product.element();
        let strides = |col: usize| Strides { image: self.rows * col, row: self.rows * col, col, group: 0 };
        Problem {
            product: self.product,
            images: 1,
            rows: 1,
            cols: self.rows,
            groups: 1,
            channels: self.columns,
            a: strides(self.inner * element),
            y: strides(self.columns * element),
            r: strides(self.columns * element),
            loops: Vec::new(),
            run: self.inner,
        }
    }
}

/// Products whose second operand is no single constant matrix: a batch of pairs of matrices.
struct Batch {
    product: Product,
    rows: usize,
    inner: usize,
    columns: usize,
    /// Number of second operands.
    matrices: usize,
    pairs: Vec<Pair>,
    extras: Extras,
    clamp: Clamp,
}

impl Batch {
    /// `None` where there is one constant matrix.
    fn of(graph: &Graph, node: NodeId) -> Option<Batch> {
        let (a, b) = (graph.operand(node, 0), graph.operand(node, 1));
        let (a_shape, b_shape, y) = (graph.shape(a), graph.shape(b), graph.shape(node.out()));
        let (product, clamp, extras) = match graph.op(node)? {
            Op::MatMul(m) if graph.constant_value(b).is_none() || b_shape.rank() != 2 => {
                (Product::F32, m.clamp, Extras::new(m.bias, m.residual_slot()))
            }
            Op::QMatMul(m) if QMatMul::is_of_activations(&[graph.ty(a), graph.ty(b)]) => {
                (Product::U8S8, Clamp::NONE, Extras::new(m.bias, m.residual_slot()))
            }
            _ => return None,
        };
        let (inner, columns) = (a_shape[a_shape.rank() - 1], y[y.rank() - 1]);
        let matrices = b_shape[..b_shape.rank() - 2].iter().product();
        let (rows, pairs) = match matrices {
            // All matrices of a, one below the other, by the one of b.
            1 => (a_shape.elements() / inner.max(1), vec![Pair { a: 0, matrix: 0, y: 0 }]),
            _ => {
                let rows = a_shape[a_shape.rank() - 2];
                let pair = |i: usize| Pair {
                    a: MatMul::matrix_of_operand(a_shape, y, i) * rows * inner * product.element(),
                    matrix: MatMul::matrix_of_operand(b_shape, y, i),
                    y: i * rows * columns * product.element(),
                };
                (rows, (0..y[..y.rank() - 2].iter().product()).map(pair).collect())
            }
        };
        Some(Batch { product, rows, inner, columns, matrices, pairs, extras, clamp })
    }

    fn problem(&self) -> Problem {
        let strides = |columns: usize| {
            let col = columns * self.product.element();
            let all = self.rows * col;
            Strides { image: all, row: all, col, group: all }
        };
        Problem {
            product: self.product,
            images: 1,
            rows: 1,
            cols: self.rows,
            groups: self.pairs.len(),
            channels: self.columns,
            a: strides(self.inner),
            y: strides(self.columns),
            r: strides(self.columns),
            loops: Vec::new(),
            run: self.inner,
        }
    }

    /// Bytes of the second operands, packed: at most, of all tiers.
    fn packed_bytes(&self) -> u64 {
        // A panel is padded to at most 64 channels, and K to 64 codes; of these there are up to three runs and a start.
        let column = match self.product {
            Product::F32 => 4 * self.inner as u64,
            Product::U8S8 => 3 * (self.inner as u64 + 64) + 4,
        };
        (self.matrices as u64).saturating_mul(column.saturating_mul(self.columns as u64 + 64))
    }

    fn lower(&self, cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
        let work = cx.work(node);
        let r = self.extras.residual_location(cx, node)?;
        let [a, b] = [0, 1].map(|slot| cx.graph.operand(node, slot));
        let a_elements = cx.graph.shape(a).elements();
        let zero_points = match self.product {
            Product::F32 => None,
            Product::U8S8 => {
                let zero = |v| cx.graph.ty(v).per_tensor().map_or(0, |(_, z)| z);
                Some([zero(a), zero(b)])
            }
        };
        let mut location = |v| match self.product {
            Product::F32 => cx.location(v),
            Product::U8S8 => with_slack(cx, v),
        };
        let (a, b) = (location(a)?, location(b)?);
        let dtype = if self.product == Product::F32 { DType::F32 } else { DType::U8 };
        let view = View::dense(b, dtype, &[self.matrices, self.inner, self.columns]);
        let second = SecondOperands { view, matrices: self.matrices, zero_points };
        let operands = Operands { a, y: cx.location(node.out())?, r, w: None };
        let problem = self.problem();
        let refuse = |cx: &Lowering, e| cx.refuse(node, e);
        let bias = self.extras.bias.map(|slot| product::constant(cx.graph, node, slot)).transpose();
        let bias = bias.map_err(|e| refuse(cx, e))?;
        let pairs = &self.pairs;
        match cx.graph.op(node) {
            Some(Op::QMatMul(op)) => {
                let types = cx.operand_types(node);
                let requantizer = op.requantizer_of_activations(&types, bias).map_err(|e| refuse(cx, e))?;
                let bounds = QMatMul::bounds_of_activations(&types, bias).map_err(|e| refuse(cx, e))?;
                let reach = bounds.into_iter().map(ChannelBounds::reach).max().unwrap_or(0);
                let starts = self.starts(bias, zero_points.unwrap_or_default());
                let starts = starts.map_err(|e| refuse(cx, e.into()))?;
                let epilogue = match cx.options.measure_pack_only {
                    true => Epilogue::PackOnly,
                    false => Epilogue::Requantize(&requantizer),
                };
                let starts = Starts::Codes(&starts, reach);
                driver::lower_pairs(
                    cx, &problem, epilogue, operands, a_elements, &second, pairs, starts, work,
                )
            }
            _ => {
                let epilogue = Epilogue::Float { clamp: self.clamp, residual: r.is_some() };
                let bias = bias.map(|b| b.as_slice::<f32>()).transpose();
                let bias = bias.map_err(|e| refuse(cx, e.into()))?;
                let bias = bias.map_or_else(|| vec![0.0; self.columns], <[f32]>::to_vec);
                let starts = Starts::Floats(&bias);
                driver::lower_pairs(
                    cx, &problem, epilogue, operands, a_elements, &second, pairs, starts, work,
                )
            }
        }
    }

    /// What the sums of each column start from before those of its codes are known: q_bias + K·z_a·(z_b − 128).
    /// Wrapping: whole sums fit.
    fn starts(&self, bias: Option<&Tensor>, [z_a, z_b]: [i32; 2]) -> Result<Vec<i32>, TensorError> {
        let zeros = (self.inner as i32).wrapping_mul(z_a * (z_b - 128));
        let bias = bias.map(|b| b.as_slice::<i32>()).transpose()?;
        Ok((0..self.columns).map(|n| bias.map_or(0, |b| b[n]).wrapping_add(zeros)).collect())
    }
}

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    match Batch::of(graph, node) {
        Some(batch) => {
            product::check_extents(graph, node)?;
            product::check_constant(graph, node, batch.extras.bias, "bias")?;
            // Offsets of packed panels have 32 bits.
            match batch.packed_bytes() {
                0..=0x7fff_ffff => Ok(()),
                packed => Err(format!("its second operand takes {packed} bytes packed, more than 2^31 − 1")),
            }
        }
        None => product::check(graph, node, Matrices::of(graph, node)?.extras),
    }
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
    if let Some(batch) = Batch::of(cx.graph, node) {
        return batch.lower(cx, node);
    }
    let matrices = Matrices::of(cx.graph, node).map_err(|e| cx.refuse(node, OpError::Unsupported(e)))?;
    let problem = matrices.problem();
    let input = cx.graph.operand(node, 0);
    let a = match problem.overreads(cx.options.tier) {
        true => with_slack(cx, input)?,
        false => cx.location(input)?,
    };
    let parts = Parts {
        extras: matrices.extras,
        clamp: matrices.clamp,
        order: &WeightOrder::new(1, (0..matrices.inner).map(|k| k * matrices.columns).collect()),
    };
    product::lower(cx, node, &problem, &Kernel::Dense("gemm"), a, &parts)
}
