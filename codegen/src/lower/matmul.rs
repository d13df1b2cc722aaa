//! Matrix products with constant weights.

use super::{
    Lowerer, Lowering,
    product::{self, Extras, Kernel, Parts, with_slack},
};
use crate::{
    CodegenError,
    dense::{Problem, Strides, WeightOrder, spec::Product},
};
use qcc_ir::{Graph, NodeId, Op, OpError, ops::Clamp};

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
            loops: Vec::new(),
            run: self.inner,
        }
    }
}

fn supported(graph: &Graph, node: NodeId) -> Result<(), String> {
    product::check(graph, node, Matrices::of(graph, node)?.extras)
}

fn lower(cx: &mut Lowering, node: NodeId) -> Result<(), CodegenError> {
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
        channel_axis: 1,
        order: &WeightOrder {
            channel: 1,
            offsets: (0..matrices.inner).map(|k| k * matrices.columns).collect(),
        },
    };
    product::lower(cx, node, &problem, &Kernel::Dense("gemm"), a, &parts)
}
