use crate::common::*;
use qcc_ir::ops::{Layout, PadMode, Pool, PoolKind, Window};

const ZERO: PadMode = PadMode::Constant { value: 0.0 };

#[test]
fn paddings_join_convolutions_and_average_pools() {
    let mut net = Net::new(1);
    let x = net.input("x", &[1, 3, 6, 6]);
    let y = net.pad("pad1", x, 1, ZERO);
    let y = net.conv3x3("conv", y, 4, 2);
    let y = net.pad("pad2", y, 1, ZERO);
    let pool = |include| Pool {
        kind: PoolKind::Average { count_include_pad: include },
        window: Window::new([2, 2]),
        ceil_mode: false,
        layout: Layout::ChannelsFirst,
    };
    let y = net.op("pool", pool(false), &[y]);
    let (after, report) = prepared(&net.finish(y));
    assert_eq!((applied(&report, "fuse_pad"), count(&after, "Pad")), (2, 0), "{report}");
}

#[test]
fn paddings_with_another_meaning_stay() {
    let average = |pads: usize, ceil_mode| Pool {
        kind: PoolKind::Average { count_include_pad: false },
        window: Window::new([3, 3]).pads([pads, pads], [pads, pads]),
        ceil_mode,
        layout: Layout::ChannelsFirst,
    };
    let max = Pool { kind: PoolKind::Max, ..average(0, false) };
    for (mode, pool, reason) in [
        (PadMode::Reflect, average(0, false), "does not pad with zeros"),
        (PadMode::Constant { value: 1.0 }, average(0, false), "does not pad with zeros"),
        (ZERO, max, "takes a maximum"),
        (ZERO, average(1, false), "would count one padding but not the other"),
        (ZERO, average(0, true), "rounds its extent up"),
    ] {
        let mut net = Net::new(2);
        let x = net.input("x", &[1, 3, 6, 6]);
        let y = net.pad("pad", x, 1, mode);
        let y = net.op("pool", pool, &[y]);
        let (after, report) = prepared(&net.finish(y));
        let why = declined(&report, "fuse_pad", "pad");
        assert!(why.contains(reason), "{why}");
        assert_eq!(count(&after, "Pad"), 1);
    }
}
