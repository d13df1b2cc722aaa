//! Branches and loops.
//!
//! Import knows which branch is taken: its nodes stand for the whole. Where the condition is not known, the executor computes
//! it first. Loops of a known number of rounds are unrolled; the others, and long ones, run by their definition once the
//! values that they begin with are there.

use crate::{
    DType, OpError, Shape, Tensor,
    limits::{MAX_LOOP_NODES, MAX_SCANNED_NODES},
    onnx::{
        NodeError,
        attribute::Attribute,
        body::{Body, NodeDef},
        import::Node,
        splice::{constant, node as def, splice, with},
    },
};
use std::collections::BTreeMap;

/// The graph that the condition chooses.
pub(super) fn if_(node: &mut Node<'_, '_>) -> Result<Vec<NodeDef>, NodeError> {
    let condition = node.required(0, "cond")?;
    let (yes, no) = (node.graph_attribute("then_branch")?, node.graph_attribute("else_branch")?);
    let taken = if truth(&condition)? { yes } else { no };
    let outputs = node.result_names();
    if taken.outputs.len() < outputs.len() || !taken.inputs.is_empty() {
        return Err(OpError::shape(format!(
            "a branch takes {} inputs and has {} results, where the node has {}",
            taken.inputs.len(),
            taken.outputs.len(),
            outputs.len()
        ))
        .into());
    }
    let prefix = node.splice_prefix();
    Ok(splice(taken, &prefix, &[], &outputs))
}

fn truth(condition: &Tensor) -> Result<bool, NodeError> {
    match condition.as_slice::<u8>() {
        Ok([truth]) if condition.dtype() == DType::Bool => Ok(*truth != 0),
        _ => Err(OpError::dtype(format!("a condition must be one bool, got {}", condition.ty())).into()),
    }
}

/// What of a loop's body decides how often it runs.
fn is_counted(body: &Body) -> bool {
    // The condition that goes on is the one that came, or a constant truth.
    let (Some((out, _)), Some(given)) = (body.outputs.first(), body.inputs.get(1)) else { return false };
    let mut name = out.as_str();
    loop {
        if name == given {
            return true;
        }
        if let Some(t) = body.initializers.get(name) {
            return truth(t).unwrap_or(false);
        }
        let Some(producer) = body.nodes.iter().find(|n| n.outputs.iter().any(|o| o == name)) else {
            return false;
        };
        match (producer.op.as_str(), producer.attributes.get("value"), producer.inputs.first()) {
            ("Identity", _, Some(from)) => name = from,
            ("Constant", Some(Attribute::Tensor(t)), _) => return truth(t).unwrap_or(false),
            _ => return false,
        }
    }
}

/// Results of values that are carried from round to round, and those of each round, stacked.
pub(super) fn loop_(node: &mut Node<'_, '_>) -> Result<Vec<NodeDef>, NodeError> {
    let body = node.graph_attribute("body")?;
    let operands = node.operand_names();
    let carried = operands.len().saturating_sub(2);
    let outputs = node.result_names();
    if body.inputs.len() != carried + 2
        || body.outputs.len() < carried + 1
        || outputs.len() > body.outputs.len() - 1
    {
        return Err(OpError::shape(format!(
            "{carried} values are carried, but the body takes {} inputs and has {} results",
            body.inputs.len(),
            body.outputs.len()
        ))
        .into());
    }
    let counted = is_counted(body);
    let begins = match operands.get(1).copied().unwrap_or_default() {
        "" => Some(true),
        _ => node.if_known(1)?.map(|t| truth(&t)).transpose()?,
    };
    let rounds = match operands.first().copied().unwrap_or_default() {
        "" => None,
        // The number alone tells how a loop goes that nothing else ends.
        _ if counted => node.known(0, "M")?,
        _ => node.if_known(0)?,
    };
    let rounds = rounds.map(|t| scalar(&t)).transpose()?.map(|n| n.max(0) as u64);
    let nodes = body.nodes.len().max(1) as u64;
    let unrolled = match (begins, rounds) {
        (Some(false), _) => Some(0),
        (Some(true), Some(n)) if counted && n.saturating_mul(nodes) <= node.max_unrolled() as u64 => Some(n),
        _ => None,
    };
    match unrolled {
        Some(rounds) => Ok(unrolled_loop(node, body, rounds, &operands, &outputs)?),
        None => run_loop(node, body, rounds, &outputs),
    }
}

fn scalar(t: &Tensor) -> Result<i64, NodeError> {
    match t.to_i64().as_deref() {
        Some(&[n]) => Ok(n),
        _ => Err(OpError::dtype(format!("a number of rounds must be one integer, got {}", t.ty())).into()),
    }
}

fn vector(values: &[i64]) -> Result<Tensor, NodeError> {
    let shape = Shape::new([values.len()])?;
    Ok(Tensor::from_vec(shape, values.to_vec()).map_err(OpError::from)?)
}

fn bool_scalar(truth: bool) -> Result<Tensor, NodeError> {
    Ok(Tensor::from_vec_as::<u8>(DType::Bool, Shape::scalar(), vec![truth.into()]).map_err(OpError::from)?)
}

fn unrolled_loop(
    node: &mut Node<'_, '_>,
    body: &Body,
    rounds: u64,
    operands: &[&str],
    outputs: &[&str],
) -> Result<Vec<NodeDef>, NodeError> {
    let prefix = node.splice_prefix();
    let carried = operands.len().saturating_sub(2);
    let mut nodes = vec![constant(&format!("{prefix}true"), bool_scalar(true)?)];
    let mut values: Vec<String> = operands[operands.len().min(2)..].iter().map(|&s| s.to_owned()).collect();
    let mut stacked: Vec<Vec<String>> = vec![Vec::new(); body.outputs.len() - 1 - carried];
    for round in 0..rounds {
        let number = format!("{prefix}{round}/number");
        nodes.push(constant(&number, Tensor::scalar(round as i64)));
        let truth = format!("{prefix}true");
        let inputs: Vec<&str> =
            [number.as_str(), &truth].into_iter().chain(values.iter().map(String::as_str)).collect();
        let results: Vec<String> =
            (0..body.outputs.len()).map(|i| format!("{prefix}{round}/result {i}")).collect();
        let names: Vec<&str> = results.iter().map(String::as_str).collect();
        nodes.extend(splice(body, &format!("{prefix}{round}/"), &inputs, &names));
        values = results[1..=carried].to_vec();
        for (all, result) in stacked.iter_mut().zip(&results[carried + 1..]) {
            all.push(result.clone());
        }
    }
    for (value, output) in values.iter().zip(outputs).filter(|(_, o)| !o.is_empty()) {
        nodes.push(def("Identity", output, &[value], output));
    }
    for (i, (all, output)) in stacked.iter().zip(&outputs[carried.min(outputs.len())..]).enumerate() {
        if !output.is_empty() {
            nodes.extend(stack(all, output, 0, &prefix, body.outputs[carried + 1 + i].1)?);
        }
    }
    Ok(nodes)
}

/// Nodes that stack values along a new axis.
fn stack(
    values: &[String],
    output: &str,
    axis: i64,
    prefix: &str,
    dtype: Option<DType>,
) -> Result<Vec<NodeDef>, NodeError> {
    if values.is_empty() {
        let dtype = dtype
            .ok_or_else(|| OpError::unsupported("no round is run, and results have no declared type"))?;
        return Ok(vec![constant(output, Tensor::zeros(dtype, Shape::new([0])?))]);
    }
    let axes = format!("{prefix}axis of {output}");
    let mut nodes = vec![constant(&axes, vector(&[axis])?)];
    let rows: Vec<String> = values.iter().map(|v| format!("{v} as row of {output}")).collect();
    nodes.extend(values.iter().zip(&rows).map(|(v, row)| def("Unsqueeze", row, &[v, &axes], row)));
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    nodes.push(with(def("Concat", output, &rows, output), "axis", Attribute::Int(axis)));
    Ok(nodes)
}

/// Runs a loop by its definition; all that it reads must be known.
fn run_loop(
    node: &mut Node<'_, '_>,
    body: &Body,
    rounds: Option<u64>,
    outputs: &[&str],
) -> Result<Vec<NodeDef>, NodeError> {
    let values = node.all_known()?;
    let operands = node.operand_names();
    let carried = operands.len().saturating_sub(2);
    let named = |name: &str| values.get(name).cloned();
    let mut state = operands[operands.len().min(2)..]
        .iter()
        .map(|&name| named(name).ok_or(NodeError::MissingOperand { slot: 2, role: "v_initial" }))
        .collect::<Result<Vec<_>, _>>()?;
    let mut goes_on = match operands.get(1).and_then(|name| named(name)) {
        Some(t) => truth(&t)?,
        None => true,
    };
    let mut stacked: Vec<Vec<Tensor>> = vec![Vec::new(); body.outputs.len() - 1 - carried];
    if let Some(n) = rounds.filter(|&n| n > MAX_LOOP_NODES && goes_on && is_counted(body)) {
        return Err(
            OpError::too_large(format!("runs {n} rounds, above {MAX_LOOP_NODES}: give it fewer")).into()
        );
    }
    let mut round = 0;
    while goes_on && rounds.is_none_or(|n| round < n) {
        node.count_round()?;
        let mut given: BTreeMap<String, Tensor> =
            body.captures.iter().filter_map(|name| Some((name.clone(), named(name)?))).collect();
        let inputs = [Tensor::scalar(round as i64), bool_scalar(true)?].into_iter().chain(state);
        given.extend(body.inputs.iter().cloned().zip(inputs));
        let mut results = node.evaluate(body, given)?.into_iter();
        goes_on = results.next().map(|t| truth(&t)).transpose()?.unwrap_or(false);
        state = results.by_ref().take(carried).collect();
        for (all, result) in stacked.iter_mut().zip(results) {
            // A round's own memory is free again when it is over; what is stacked stays, and is copied into one.
            node.take_bytes(result.bytes().len().saturating_mul(2))?;
            all.push(result);
        }
        round += 1;
    }
    let mut nodes = Vec::new();
    for (value, output) in state.into_iter().zip(outputs).filter(|(_, o)| !o.is_empty()) {
        nodes.push(constant(output, value));
    }
    let prefix = node.splice_prefix();
    for (i, (all, output)) in stacked.into_iter().zip(&outputs[carried.min(outputs.len())..]).enumerate() {
        if output.is_empty() {
            continue;
        }
        nodes.extend(stack_known(all, output, 0, &prefix, body.outputs[carried + 1 + i].1)?);
    }
    Ok(nodes)
}

fn stack_known(
    values: Vec<Tensor>,
    output: &str,
    axis: i64,
    prefix: &str,
    dtype: Option<DType>,
) -> Result<Vec<NodeDef>, NodeError> {
    let names: Vec<String> = (0..values.len()).map(|i| format!("{prefix}round {i} of {output}")).collect();
    let constants = names.iter().zip(values).map(|(name, value)| constant(name, value));
    let mut nodes: Vec<NodeDef> = constants.collect();
    nodes.extend(stack(&names, output, axis, prefix, dtype)?);
    Ok(nodes)
}

/// How a scan goes through one of its inputs or outputs.
struct Way {
    axis: i64,
    reverse: bool,
}

/// A body that runs once for each slice of its inputs.
pub(super) fn scan(node: &mut Node<'_, '_>) -> Result<Vec<NodeDef>, NodeError> {
    let body = node.graph_attribute("body")?;
    let (operands, outputs) = (node.operand_names(), node.result_names());
    let scanned = node.int("num_scan_inputs", 0)?;
    let is_batched = node.opset() < 9;
    // Opset 8 has lengths of sequences as the first operand, and a batch.
    let operands = if is_batched { operands.get(1..).unwrap_or_default().to_vec() } else { operands };
    if is_batched && !node.is_left_out(0) {
        return Err(OpError::unsupported("sequence_lens are not supported").into());
    }
    let scanned = usize::try_from(scanned).ok().filter(|&n| n > 0 && n <= operands.len());
    let scanned =
        scanned.ok_or_else(|| NodeError::attribute("num_scan_inputs", "must be from 1 to the inputs"))?;
    let states = operands.len() - scanned;
    let fits = body.inputs.len() == operands.len() && outputs.len() <= body.outputs.len();
    let results = body.outputs.len().checked_sub(states).filter(|_| fits);
    let results = results.ok_or_else(|| {
        OpError::shape(format!(
            "{} operands and {} results, but the body takes {} inputs and has {} results",
            operands.len(),
            outputs.len(),
            body.inputs.len(),
            body.outputs.len()
        ))
    })?;
    let ways = |axes: Option<Vec<i64>>, directions: Option<Vec<i64>>, count: usize, name: &str| {
        let (axes, directions) = (axes.unwrap_or(vec![0; count]), directions.unwrap_or(vec![0; count]));
        if axes.len() != count || directions.len() != count || directions.iter().any(|d| !(0..=1).contains(d))
        {
            return Err(NodeError::attribute(
                name,
                format!("and directions must have {count} elements, 0 or 1"),
            ));
        }
        Ok(axes
            .into_iter()
            .zip(directions)
            .map(|(axis, d)| Way { axis, reverse: d == 1 })
            .collect::<Vec<_>>())
    };
    let (ins, outs) = match is_batched {
        true => {
            let directions = node.ints("directions")?;
            (ways(None, directions, scanned, "directions")?, ways(None, None, results, "directions")?)
        }
        false => (
            ways(
                node.ints("scan_input_axes")?,
                node.ints("scan_input_directions")?,
                scanned,
                "scan_input_axes",
            )?,
            ways(
                node.ints("scan_output_axes")?,
                node.ints("scan_output_directions")?,
                results,
                "scan_output_axes",
            )?,
        ),
    };
    let scan = Scan { body, operands: &operands, outputs: &outputs, states, ins, outs, is_batched };
    match is_batched {
        true => batched_scan(node, &scan),
        false => scan.unroll(node, &operands, &outputs, &mut 0),
    }
}

/// Fails where a scan has too many nodes, all rounds together.
fn check_unrolled(nodes: usize) -> Result<(), NodeError> {
    if nodes <= MAX_SCANNED_NODES {
        return Ok(());
    }
    Err(OpError::too_large(format!(
        "has {nodes} nodes unrolled, above {MAX_SCANNED_NODES}: scan shorter inputs"
    ))
    .into())
}

struct Scan<'a> {
    body: &'a Body,
    operands: &'a [&'a str],
    outputs: &'a [&'a str],
    states: usize,
    ins: Vec<Way>,
    outs: Vec<Way>,
    /// Whether the first dimension of all operands is a batch.
    is_batched: bool,
}

impl Scan<'_> {
    /// Number of slices, of which all inputs must have as many.
    fn rounds(&self, node: &Node<'_, '_>) -> Result<usize, NodeError> {
        let mut rounds = None;
        for (name, way) in self.operands[self.states..].iter().zip(&self.ins) {
            let shape = node.shape_of(name)?;
            let rank = shape.rank() as i64 - i64::from(self.is_batched);
            let axis = if way.axis < 0 { way.axis + rank } else { way.axis } + i64::from(self.is_batched);
            let length = usize::try_from(axis).ok().and_then(|a| shape.get(a)).copied();
            let length =
                length.ok_or_else(|| OpError::shape(format!("{shape:?} has no axis {}", way.axis)))?;
            if *rounds.get_or_insert(length) != length {
                return Err(OpError::shape("the scanned inputs have different lengths").into());
            }
        }
        Ok(rounds.unwrap_or(0))
    }

    /// All rounds, one after the other.
    fn unroll(
        &self,
        node: &mut Node<'_, '_>,
        operands: &[&str],
        outputs: &[&str],
        made: &mut usize,
    ) -> Result<Vec<NodeDef>, NodeError> {
        let rounds = self.rounds(node)?;
        // A slice of each input, the nodes, and what names the results.
        let each = self.operands.len() + self.body.nodes.len() + self.body.outputs.len();
        *made = made.saturating_add(rounds.saturating_mul(each.max(1)));
        check_unrolled(*made)?;
        let prefix = node.splice_prefix();
        let mut nodes = Vec::new();
        let mut values: Vec<String> = operands[..self.states].iter().map(|&s| s.to_owned()).collect();
        let mut stacked: Vec<Vec<String>> = vec![Vec::new(); self.outs.len()];
        for round in 0..rounds {
            let mut inputs = values.clone();
            for (i, (name, way)) in operands[self.states..].iter().zip(&self.ins).enumerate() {
                let index = if way.reverse { rounds - 1 - round } else { round };
                let (at, slice) =
                    (format!("{prefix}{round}/index {i}"), format!("{prefix}{round}/slice {i}"));
                nodes.push(constant(&at, Tensor::scalar(index as i64)));
                let gather = def("Gather", &slice, &[name, &at], &slice);
                nodes.push(with(gather, "axis", Attribute::Int(way.axis)));
                inputs.push(slice);
            }
            let results: Vec<String> =
                (0..self.body.outputs.len()).map(|i| format!("{prefix}{round}/result {i}")).collect();
            let names: Vec<&str> = results.iter().map(String::as_str).collect();
            let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
            nodes.extend(splice(self.body, &format!("{prefix}{round}/"), &inputs, &names));
            values = results[..self.states].to_vec();
            for (all, result) in stacked.iter_mut().zip(&results[self.states..]) {
                all.push(result.clone());
            }
        }
        for (value, output) in values.iter().zip(outputs).filter(|(_, o)| !o.is_empty()) {
            nodes.push(def("Identity", output, &[value], output));
        }
        let results = outputs.get(self.states..).unwrap_or_default();
        for (i, (mut all, output)) in stacked.into_iter().zip(results).enumerate() {
            if self.outs[i].reverse {
                all.reverse();
            }
            if !output.is_empty() {
                let dtype = self.body.outputs[self.states + i].1;
                nodes.extend(stack(&all, output, self.outs[i].axis, &prefix, dtype)?);
            }
        }
        Ok(nodes)
    }
}

/// Opset 8: the scan of each sample of a batch, stacked.
fn batched_scan(node: &mut Node<'_, '_>, scan: &Scan<'_>) -> Result<Vec<NodeDef>, NodeError> {
    let first = scan.operands.first().copied().unwrap_or_default();
    let samples = node.shape_of(first)?.first().copied().unwrap_or(0);
    // A batch of tensors without elements can have any length.
    check_unrolled(samples.saturating_mul(scan.operands.len().max(1)))?;
    let prefix = node.splice_prefix();
    let (mut nodes, mut made) = (Vec::new(), 0);
    let mut stacked: Vec<Vec<String>> = vec![Vec::new(); scan.outputs.len()];
    for sample in 0..samples {
        let index = format!("{prefix}sample {sample}");
        nodes.push(constant(&index, Tensor::scalar(sample as i64)));
        let mut inputs = Vec::new();
        for (i, name) in scan.operands.iter().enumerate() {
            let slice = format!("{index}/input {i}");
            nodes.push(with(def("Gather", &slice, &[name, &index], &slice), "axis", Attribute::Int(0)));
            inputs.push(slice);
        }
        let results: Vec<String> = (0..scan.outputs.len()).map(|i| format!("{index}/output {i}")).collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let names: Vec<&str> = results.iter().map(String::as_str).collect();
        nodes.extend(scan.unroll(node, &inputs, &names, &mut made)?);
        for (all, result) in stacked.iter_mut().zip(results) {
            all.push(result);
        }
    }
    for (i, (all, output)) in stacked.iter().zip(scan.outputs).enumerate() {
        if !output.is_empty() {
            nodes.extend(stack(all, output, 0, &prefix, scan.body.outputs[i].1)?);
        }
    }
    Ok(nodes)
}
