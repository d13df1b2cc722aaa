//! Matrix products: with constant weights, and of two values that are computed at run time.

use super::{
    Lowerer, Lowering,
    product::{self, Extras, Kernel, Parts, with_slack},
};
use crate::{
    CodegenError,
    dense::{
        Problem, Strides, WeightOrder,
        driver::{self, Operands, Pair},
        spec::{Epilogue, Product},
    },
    kernels::map::View,
};
use qcc_ir::{
    DType, Graph, NodeId, Op, OpError,
    ops::{Clamp, MatMul},
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

/// Products of floats whose second operand is no single constant matrix: a batch of pairs of matrices.
struct Batch<'g> {
    op: &'g MatMul,
    rows: usize,
    inner: usize,
    columns: usize,
    /// Number of second operands.
    matrices: usize,
    pairs: Vec<Pair>,
}

impl<'g> Batch<'g> {
    /// `None` where there is one constant matrix.
    fn of(graph: &'g Graph, node: NodeId) -> Option<Batch<'g>> {
        let Some(Op::MatMul(op)) = graph.op(node) else { return None };
        let (a, b) = (graph.operand(node, 0), graph.operand(node, 1));
        let (a_shape, b_shape, y) = (graph.shape(a), graph.shape(b), graph.shape(node.out()));
        if graph.constant_value(b).is_some() && b_shape.rank() == 2 {
            return None;
        }
        let (inner, columns) = (a_shape[a_shape.rank() - 1], y[y.rank() - 1]);
        let matrices = b_shape[..b_shape.rank() - 2].iter().product();
        let (rows, pairs) = match matrices {
            // All matrices of a, one below the other, by the one of b.
            1 => (a_shape.elements() / inner.max(1), vec![Pair { a: 0, matrix: 0 }]),
            _ => {
                let rows = a_shape[a_shape.rank() - 2];
                let pair = |i: usize| Pair {
                    a: MatMul::matrix_of_operand(a_shape, y, i) * rows * inner * 4,
                    matrix: MatMul::matrix_of_operand(b_shape, y, i),
                };
                (rows, (0..y[..y.rank() - 2].iter().product()).map(pair).collect())
            }
        };
        Some(Batch { op, rows, inner, columns, matrices, pairs })
    }

    fn extras(&self) -> Extras {
        Extras::new(self.op.bias, self.op.residual_slot())
    }

    fn problem(&self) -> Problem {
        let strides = |columns: usize| {
            let (col, all) = (columns * 4, self.rows * columns * 4);
            Strides { image: all, row: all, col, group: all }
        };
        Problem {
            product: Product::F32,
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

    fn lower(&self, cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
        let (extras, work) = (self.extras(), cx.work(node));
        let r = extras.residual_location(cx, node)?;
        let a = cx.location(cx.graph.operand(node, 0))?;
        let operands = Operands { a, y: cx.location(node.out())?, r, w: None };
        let epilogue = Epilogue::Float { clamp: self.op.clamp, residual: r.is_some() };
        let bias = match extras.bias {
            Some(slot) => {
                let bias = product::constant(cx.graph, node, slot).map_err(|e| cx.refuse(node, e))?;
                bias.as_slice::<f32>().map_err(|e| cx.refuse(node, e.into()))?.to_vec()
            }
            None => vec![0.0; self.columns],
        };
        let b = cx.location(cx.graph.operand(node, 1))?;
        let b = View::dense(b, DType::F32, &[self.matrices, self.inner, self.columns]);
        let (problem, b) = (self.problem(), (&b, self.matrices));
        driver::lower_pairs(cx, &problem, epilogue, operands, b, &self.pairs, &bias, work)
    }
}

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    match Batch::of(graph, node) {
        Some(batch) => {
            product::check_extents(graph, node)?;
            product::check_constant(graph, node, batch.extras().bias, "bias")?;
            // Offsets of packed panels have 32 bits; a panel is padded to at most 64 channels.
            let packed = batch.matrices as u64 * batch.inner as u64 * (batch.columns as u64 + 64) * 4;
            match packed {
                0..=0x7fff_ffff => Ok(()),
                _ => Err(format!("its second operand takes {packed} bytes packed, more than 2^31 − 1")),
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
        order: WeightOrder { channel: 1, inputs: matrices.inner, input: matrices.columns },
    };
    product::lower(cx, node, &problem, &Kernel::Dense("gemm"), a, &parts)
}
