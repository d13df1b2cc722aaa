//! Matrix products: with constant weights, and of two values that are computed at run time.

use super::{
    Lowerer, Lowering,
    product::{self, Extras, Kernel, Parts, with_slack},
};
use crate::{
    CodegenError,
    dense::{
        Problem, Strides, WeightOrder,
        driver::{self, Operands, PackedAt, Pair, Starts},
        repack::SecondOperands,
        spec::{Epilogue, Product, RowGrid},
    },
    kernels::map::View,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError, Tensor, TensorError,
    numerics::ChannelBounds,
    ops::{Clamp, MatMul, QMatMul},
};

/// `MatMul`, `QMatMul` and `QMatMulToFloat`.
pub(super) const MATMUL: Lowerer = Lowerer { supported, lower };

/// `[rows, inner]` by `[inner, columns]`; leading dimensions are rows.
struct Matrices {
    product: Product,
    rows: usize,
    inner: usize,
    columns: usize,
    extras: Extras,
    clamp: Clamp,
    /// Grids of rows that are known at run time: as many as rows, or one.
    grids: Option<usize>,
    writes_floats: bool,
}

impl Matrices {
    fn of(graph: &Graph, node: NodeId) -> Result<Matrices, String> {
        let (product, clamp, extras) = match graph.op(node) {
            Some(Op::MatMul(m)) => (Product::F32, m.clamp, Extras::new(m.bias, m.residual_slot())),
            Some(Op::QMatMul(m)) => (Product::U8S8, Clamp::NONE, Extras::new(m.bias, m.residual_slot())),
            Some(Op::QMatMulToFloat(m)) => (Product::U8S8, Clamp::NONE, Extras::of_floats(&m.to)),
            _ => return Err("not a matrix product".into()),
        };
        let (a, b) = (graph.shape(graph.operand(node, 0)), graph.shape(graph.operand(node, 1)));
        let &[inner, columns] = &b[..] else {
            return Err(format!(
                "weights of rank {}: only one matrix for all of the batch has kernels",
                b.rank()
            ));
        };
        let grids = product::grids_at_run_time(graph, node);
        let writes_floats = product == Product::F32 || product::to_float(graph, node).is_some();
        let rows = a.elements() / inner.max(1);
        Ok(Matrices { product, rows, inner, columns, extras, clamp, grids, writes_floats })
    }

    fn problem(&self) -> Problem {
        let element = self.product.element();
        let result_bytes = if self.writes_floats { DType::F32.size() } else { element };
        let strides = |col: usize| Strides { image: self.rows * col, row: self.rows * col, col, group: 0 };
        Problem {
            product: self.product,
            images: 1,
            rows: 1,
            cols: self.rows,
            groups: 1,
            channels: self.columns,
            a: strides(self.inner * element),
            y: strides(self.columns * result_bytes),
            r: strides(self.columns * result_bytes),
            g: self.grids.filter(|&n| n > 1).map_or_else(Strides::default, |_| strides(RowGrid::BYTES)),
            result_bytes,
            loops: Vec::new(),
            run: self.inner,
        }
    }
}

/// Products whose second operand is no single constant matrix: a batch of pairs of matrices.
struct Batch {
    product: Product,
    inner: usize,
    columns: usize,
    /// Number of second operands.
    matrices: usize,
    extras: Extras,
    clamp: Clamp,
}

/// The first operands and the results of a batch.
struct Rows {
    /// Rows of each product.
    rows: usize,
    /// Bytes from one row of a first operand to the next.
    stride: usize,
    pairs: Vec<Pair>,
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
        Some(Batch { product, inner, columns, matrices, extras, clamp })
    }

    /// The pairs of a batch whose first operands lie under this view.
    fn rows(&self, graph: &Graph, node: NodeId, a: &View) -> Rows {
        let element = self.product.element();
        let [a_shape, b_shape] = [0, 1].map(|slot| graph.shape(graph.operand(node, slot)));
        let y = graph.shape(node.out());
        let is_dense = a.strides == View::dense(a.location, self.dtype(), a_shape).strides;
        if self.matrices == 1 && is_dense {
            // All matrices of a, one below the other, by the one of b.
            let rows = a_shape.elements() / self.inner;
            return Rows { rows, stride: self.inner * element, pairs: vec![Pair { a: 0, matrix: 0, y: 0 }] };
        }
        let (rows, lead) = (a_shape[a_shape.rank() - 2], a_shape.rank() - 2);
        let pair = |i: usize| {
            // The place of the matrix of a, by the strides of its leading dimensions.
            let mut matrix = MatMul::matrix_of_operand(a_shape, y, i);
            let mut at = 0;
            for d in (0..lead).rev() {
                at += (matrix % a_shape[d]) * a.strides[d] as usize;
                matrix /= a_shape[d];
            }
            let matrix = MatMul::matrix_of_operand(b_shape, y, i);
            Pair { a: at, matrix, y: i * rows * self.columns * element }
        };
        let pairs = (0..y[..y.rank() - 2].iter().product()).map(pair).collect();
        Rows { rows, stride: a.strides[lead] as usize, pairs }
    }

    fn dtype(&self) -> DType {
        match self.product {
            Product::F32 => DType::F32,
            Product::U8S8 | Product::U8S7 => DType::U8,
        }
    }

    fn problem(&self, of: &Rows) -> Problem {
        let strides = |col: usize| {
            let all = of.rows * col;
            Strides { image: all, row: all, col, group: all }
        };
        let y = strides(self.columns * self.product.element());
        Problem {
            product: self.product,
            images: 1,
            rows: 1,
            cols: of.rows,
            groups: of.pairs.len(),
            channels: self.columns,
            a: strides(of.stride),
            y,
            r: y,
            g: Strides::default(),
            result_bytes: self.product.element(),
            loops: Vec::new(),
            run: self.inner,
        }
    }

    /// The view of an operand of which elements of K or channels follow each other, with readable slack behind codes.
    fn operand(&self, cx: &mut Lowering, node: NodeId, slot: usize) -> Result<View, CodegenError> {
        let view = cx.operand_view(node, slot)?;
        let value = cx.graph.operand(node, slot);
        let location = match (self.product, cx.plan.fused_into.get(&value.node)) {
            (Product::F32, _) => view.location,
            (_, Some(&into)) if into == node => with_slack(cx, cx.graph.operand(value.node, 0))?,
            (_, _) => with_slack(cx, value)?,
        };
        Ok(View { location, ..view })
    }

    /// Bytes of the second operands, packed: at most, of all tiers.
    fn packed_bytes(&self) -> u64 {
        // A panel is padded to at most 64 channels, and K to 64 codes; of these there are up to three runs and a start.
        let column = match self.product {
            Product::F32 => 4 * self.inner as u64,
            Product::U8S8 | Product::U8S7 => 3 * (self.inner as u64 + 64) + 4,
        };
        (self.matrices as u64).saturating_mul(column.saturating_mul(self.columns as u64 + 64))
    }

    fn lower(&self, cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
        let work = cx.work(node);
        let r = self.extras.residual_location(cx, node)?;
        let [a, b] = [0, 1].map(|slot| cx.graph.operand(node, slot));
        let zero_points = match self.product {
            Product::F32 => None,
            Product::U8S8 | Product::U8S7 => {
                let zero = |v| cx.graph.ty(v).per_tensor().map_or(0, |(_, z)| z);
                Some([zero(a), zero(b)])
            }
        };
        let [a_dims, b_dims] = [a, b].map(|v| cx.graph.shape(v).to_vec());
        let (a, view) = (self.operand(cx, node, 0)?, self.operand(cx, node, 1)?);
        let rows = self.rows(cx.graph, node, &a);
        // Bytes from the first element to the last.
        let reach =
            a_dims.iter().zip(&a.strides).map(|(&n, &stride)| (n - 1) * stride as usize).sum::<usize>();
        let a_elements = reach / self.product.element() + 1;
        let second = SecondOperands { view, dims: b_dims, zero_points };
        let operands =
            Operands { a: a.location, y: cx.location(node.out())?, r, g: None, w: PackedAt::Model };
        let problem = self.problem(&rows);
        let refuse = |cx: &Lowering, e| cx.refuse(node, e);
        let bias = self.extras.bias.map(|slot| product::constant(cx.graph, node, slot)).transpose();
        let bias = bias.map_err(|e| refuse(cx, e))?;
        let pairs = &rows.pairs;
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

/// Whether the step of a node, a product of two values, can read this operand through a transpose by `perm`.
pub(super) fn reads_permuted(graph: &Graph, node: NodeId, slot: usize, perm: &[usize]) -> bool {
    let rank = perm.len();
    let is_batch =
        matches!(graph.op(node), Some(Op::MatMul(_) | Op::QMatMul(_))) && Batch::of(graph, node).is_some();
    match slot {
        _ if !is_batch || rank < 2 => false,
        0 => perm[rank - 1] == rank - 1,
        1 => perm[rank - 2..].contains(&(rank - 1)),
        _ => false,
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
        None => {
            product::check(graph, node, Matrices::of(graph, node)?.extras)?;
            product::check_grids(graph, node)
        }
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
    let grids = matrices.grids.map(|count| product::grids_of_rows(cx, node, count)).transpose()?;
    let parts = Parts {
        grids,
        extras: matrices.extras,
        clamp: matrices.clamp,
        order: WeightOrder { channel: 1, inputs: matrices.inner, input: matrices.columns },
    };
    product::lower(cx, node, &problem, &Kernel::Dense("gemm"), a, &parts)
}
