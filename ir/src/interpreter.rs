//! Runs graphs by the definitions of their ops: slow, and what everything else is measured against.

use crate::{Error, Graph, Kind, NodeId, Tensor, TensorType, ValueId};
use std::collections::BTreeMap;

/// The results of a graph for these inputs, given in the order of [`Graph::inputs`].
///
/// Fails where an input is missing or has not its declared dtype and shape (a grid is the graph's business: quantized
/// inputs are given as codes), and where an op cannot be evaluated, such as a division by zero.
pub fn run(graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
    run_observed(graph, inputs, &mut |_, _| {})
}

/// Like [`run`]; `observe` sees every value (inputs and constants too) once, operands before results.
pub fn run_observed(
    graph: &Graph,
    inputs: &[Tensor],
    observe: &mut dyn FnMut(ValueId, &Tensor),
) -> Result<Vec<Tensor>, Error> {
    check_inputs(graph, inputs)?;
    let mut given: BTreeMap<NodeId, &Tensor> = graph.inputs().iter().copied().zip(inputs).collect();
    let mut pending = pending_uses(graph);
    let mut values: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for id in graph.order() {
        let operands = graph.operands(id);
        let results = match graph.node(id).kind() {
            Kind::Input => given.remove(&id).cloned().into_iter().collect(),
            Kind::Constant(value) => vec![value.clone()],
            Kind::Op(_) => {
                let tensors: Vec<&Tensor> = operands.iter().filter_map(|v| values.get(v)).collect();
                eval_node(graph, id, &tensors)?
            }
        };
        for (port, result) in (0..).zip(results) {
            let value = id.port(port);
            observe(value, &result);
            if pending.contains_key(&value) {
                values.insert(value, result);
            }
        }
        for v in operands {
            if let Some(uses) = pending.get_mut(&v) {
                *uses -= 1;
                if *uses == 0 {
                    values.remove(&v);
                }
            }
        }
    }
    // Being a result is a use that never ends, so every result is still there.
    Ok(graph.outputs().iter().filter_map(|o| values.get(&o.value).cloned()).collect())
}

/// The results of one op node for these operands.
pub fn eval_node(graph: &Graph, node: NodeId, operands: &[&Tensor]) -> Result<Vec<Tensor>, Error> {
    let Some(op) = graph.op(node) else {
        return Ok(vec![]);
    };
    let values = graph.operands(node);
    let types: Vec<&TensorType> = values.iter().map(|&v| graph.ty(v)).collect();
    let results = graph.node(node).outputs();
    let tensors = op.eval(operands, &types, results).map_err(|source| Error::Node {
        node: graph.node(node).name.clone(),
        op: op.mnemonic().into(),
        source,
    })?;
    debug_assert!(
        tensors.iter().map(Tensor::ty).eq(results.iter().map(|t| TensorType::new(t.dtype, t.shape.clone()))),
        "{} of `{}` gave {tensors:?} for {results:?}",
        op.mnemonic(),
        graph.node(node).name
    );
    Ok(tensors)
}

/// How many uses of each value are to come; results of the graph have one more.
fn pending_uses(graph: &Graph) -> BTreeMap<ValueId, usize> {
    let mut pending = BTreeMap::new();
    let operands = graph.nodes().flat_map(|(id, _)| graph.operands(id));
    for v in operands.chain(graph.outputs().iter().map(|o| o.value)) {
        *pending.entry(v).or_insert(0) += 1;
    }
    pending
}

fn check_inputs(graph: &Graph, inputs: &[Tensor]) -> Result<(), Error> {
    let refuse = |input: &str, reason: String| Err(Error::Input { input: input.into(), reason });
    for (i, &id) in graph.inputs().iter().enumerate() {
        let expected = graph.ty(id.out());
        let name = &graph.node(id).name;
        match inputs.get(i) {
            None => {
                return refuse(
                    name,
                    format!("expected {expected}, but only {} inputs were given", inputs.len()),
                );
            }
            Some(t) if t.dtype() != expected.dtype || *t.shape() != expected.shape => {
                return refuse(name, format!("expected {expected}, given {}", t.ty()));
            }
            Some(_) => {}
        }
    }
    match inputs.get(graph.inputs().len()) {
        Some(extra) => refuse(
            &format!("#{}", graph.inputs().len() + 1),
            format!(
                "the graph takes {} inputs, but was given one more: {}",
                graph.inputs().len(),
                extra.ty()
            ),
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Binary, BinaryKind, Unary, UnaryKind};
    use crate::{DType, Shape};

    fn f32s(values: &[f32]) -> Tensor {
        Tensor::from_vec(Shape::new([values.len()]).unwrap(), values.to_vec()).unwrap()
    }

    /// (x − 1)² / 2 as a graph, with a second result and a dead node.
    fn sample() -> Graph {
        let mut g = Graph::new("sample");
        let x = g.input("x", TensorType::f32(&[3]).unwrap()).unwrap();
        let one = g.constant("one", Tensor::scalar(1f32));
        let two = g.constant("two", Tensor::scalar(2f32));
        let d = g.add("d", Binary { kind: BinaryKind::Sub }, &[x, one]).unwrap().out();
        let s = g.add("s", Binary { kind: BinaryKind::Mul }, &[d, d]).unwrap().out();
        let h = g.add("h", Binary { kind: BinaryKind::Div }, &[s, two]).unwrap().out();
        g.add("dead", Unary { kind: UnaryKind::Exp }, &[h]).unwrap();
        g.output("half", h);
        g.output("difference", d);
        g
    }

    #[test]
    fn results_come_in_the_order_of_the_signature() {
        let results = run(&sample(), &[f32s(&[1.0, 3.0, -1.0])]).unwrap();
        assert_eq!(results, [f32s(&[0.0, 2.0, 2.0]), f32s(&[0.0, 2.0, -2.0])]);
    }

    #[test]
    fn every_value_is_observed_once_after_its_operands() {
        let g = sample();
        let mut seen = vec![];
        run_observed(&g, &[f32s(&[1.0, 3.0, -1.0])], &mut |v, t| {
            assert_eq!(t.shape(), g.shape(v));
            seen.push(v.node);
        })
        .unwrap();
        assert_eq!(seen, g.order());
    }

    #[test]
    fn wrong_inputs_are_named() {
        let g = sample();
        let message = |inputs: &[Tensor]| run(&g, inputs).unwrap_err().to_string();
        assert_eq!(message(&[]), "input `x`: expected f32[3], but only 0 inputs were given");
        assert_eq!(message(&[f32s(&[1.0])]), "input `x`: expected f32[3], given f32[1]");
        let ints = Tensor::zeros(DType::S32, Shape::new([3]).unwrap());
        assert_eq!(message(&[ints]), "input `x`: expected f32[3], given s32[3]");
        let x = f32s(&[0.0; 3]);
        assert!(message(&[x.clone(), x]).contains("the graph takes 1 inputs"));
    }

    #[test]
    fn an_op_that_fails_is_named() {
        let mut g = Graph::new("division");
        let x = g.input("x", TensorType::new(DType::S32, Shape::scalar())).unwrap();
        let q = g.add("quotient", Binary { kind: BinaryKind::Div }, &[x, x]).unwrap();
        g.output("q", q.out());
        let e = run(&g, &[Tensor::scalar(0i32)]).unwrap_err();
        assert_eq!(e.to_string(), "node `quotient` (Binary): 0 divided by zero");
        assert_eq!(run(&g, &[Tensor::scalar(7i32)]), Ok(vec![Tensor::scalar(1i32)]));
    }
}
