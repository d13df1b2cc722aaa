//! The placement, for people.

use crate::{NoteKind, Report};
use qcc_ir::Graph;
use std::{collections::BTreeMap, fmt::Write};

/// A table of a placed graph, one line an op in the order of execution: name, op, device, type of the result, and
/// what `report` has to say about why it is there.
pub fn plan(graph: &Graph, report: &Report) -> String {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let placing = ["insert_fake_quant", "lower_to_int8", "quantize_dynamic", "assign_devices"];
    for record in report.records.iter().filter(|r| placing.contains(&r.pass)) {
        for note in record.of(NoteKind::Declined) {
            reasons.entry(&note.node).or_default().push(&note.text);
        }
    }
    let mut rows = vec![["node", "op", "device", "result", "reason"].map(String::from)];
    for node in graph.order().into_iter().filter(|&n| graph.op(n).is_some()) {
        let n = graph.node(node);
        let result = &n.outputs()[0];
        rows.push([
            n.name.clone(),
            graph.mnemonic(node).into(),
            n.device.map_or("-".into(), |d| d.to_string()),
            format!("{}[{}]", result.dtype, result.shape),
            reasons.get(n.name.as_str()).map_or(String::new(), |r| r.join("; ")),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut table = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a string cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}
