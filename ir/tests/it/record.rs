use crate::samples::every_op;
use qcc_ir::{Graph, GraphRecord, KindRecord, Stage, ValueRecord, text::print_inline};

#[test]
fn a_graph_survives_a_file() {
    let mut g = every_op();
    g.stage = Stage::Int8;
    let (record, blobs) = g.to_record();
    let bytes = postcard::to_stdvec(&record).unwrap();
    let read: GraphRecord = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(read, record);
    let again = Graph::from_record(read, &blobs).unwrap();
    assert_eq!(print_inline(&again), print_inline(&g));
    assert_eq!(again.to_record(), (record, blobs));
}

#[test]
fn damaged_records_are_refused() {
    let (record, blobs) = every_op().to_record();
    let refusal = |damage: &dyn Fn(&mut GraphRecord)| {
        let mut record = record.clone();
        damage(&mut record);
        Graph::from_record(record, &blobs).unwrap_err().to_string()
    };
    let operands = |r: &mut GraphRecord, v: ValueRecord| {
        let op = r.nodes.iter_mut().find_map(|n| match &mut n.kind {
            KindRecord::Op { operands, .. } => Some(operands),
            _ => None,
        });
        op.unwrap()[0] = v;
    };
    assert!(refusal(&|r| operands(r, ValueRecord { node: 500, port: 0 })).contains("not an earlier value"));
    assert!(refusal(&|r| operands(r, ValueRecord { node: 0, port: 1 })).contains("operand 0.1"));
    let all = record.nodes.len() as u32 - 1;
    assert!(refusal(&|r| operands(r, ValueRecord { node: all, port: 0 })).contains("not an earlier value"));
    assert!(refusal(&|r| r.nodes[1].name = r.nodes[0].name.clone()).contains("another node has this name"));
    assert!(refusal(&|r| r.outputs[0].value.node = 9999).contains("is not a value"));
    assert!(refusal(&|r| r.nodes.swap(0, 1)).contains("node"));
    assert!(Graph::from_record(record.clone(), &[]).unwrap_err().to_string().contains("is missing"));
    // Every byte of the file replaced in turn: refused, or a graph that holds what it says.
    let bytes = postcard::to_stdvec(&record).unwrap();
    for i in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[i] ^= flip;
            if let Ok(read) = postcard::from_bytes::<GraphRecord>(&damaged)
                && let Ok(g) = Graph::from_record(read, &blobs)
            {
                assert_eq!(g.order().len(), g.len());
            }
        }
    }
}
