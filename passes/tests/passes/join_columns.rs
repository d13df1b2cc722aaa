use crate::common::*;
use qcc_ir::{Graph, Op, ops::Window};
use qcc_passes::{Options, Precision};

/// The placed float graph, which must compute what it did, and how many convolutions were joined.
fn joined(graph: &Graph) -> (Graph, usize) {
    let (_, placed, report) = compiled(graph, &Options { precision: Precision::Float, ..Options::default() });
    assert_same(graph, &placed);
    (placed, applied(&report, "join_columns"))
}

fn kernel_and_channels(graph: &Graph, name: &str) -> (Vec<usize>, usize) {
    let node = find(graph, name);
    let Some(Op::Conv(c)) = graph.op(node) else { panic!("{name} is no convolution") };
    (c.window.kernel.clone(), *graph.shape(node.out()).last().unwrap())
}

#[test]
fn few_channels_take_columns_along() {
    // Widths that the columns divide and ones that they do not; strides; windows beyond both edges; biases.
    for (width, stride, channels, bias) in
        [(32, 1, 1, true), (45, 2, 1, false), (29, 1, 8, true), (17, 1, 3, false)]
    {
        let mut net = Net::new(width as u64);
        let x = net.input("x", &[2, 3, 5, width]);
        let window = Window::new([3, 9]).strides([1, stride]).pads([1, 4], [1, 4]);
        let y = net.conv("conv", x, channels, window, 1, bias);
        let (after, count) = joined(&net.finish(y));
        assert_eq!(count, 1, "{channels} channels, width {width}");
        let (kernel, all) = kernel_and_channels(&after, "conv");
        let columns = all / channels;
        assert!(columns > 1 && kernel == [3, 9 + (columns - 1) * stride], "{kernel:?} of {all}");
    }
}

#[test]
fn a_window_of_one_image_row_is_that_of_a_signal() {
    let mut net = Net::new(5);
    let x = net.input("x", &[1, 1, 1, 700]);
    let y = net.conv("conv", x, 1, Window::new([1, 64]).strides([1, 2]), 1, false);
    let (after, count) = joined(&net.finish(y));
    assert_eq!(count, 1);
    assert!(kernel_and_channels(&after, "conv").1 >= 16);
}

#[test]
fn what_would_not_be_faster_stays() {
    let mut net = Net::new(6);
    let x = net.input("x", &[1, 8, 12, 12]);
    let wide = net.conv3x3("wide", x, 16, 1);
    let pointwise = net.conv1x1("pointwise", wide, 1);
    let apart = net.conv("apart", wide, 8, Window::new([3, 3]).pads([1, 1], [1, 1]), 4, false);
    let far = net.conv("far", apart, 1, Window::new([1, 3]).strides([1, 3]), 1, false);
    let mut graph = net.graph.clone();
    graph.output("y", pointwise);
    graph.output("z", far);
    assert_eq!(joined(&graph).1, 0);
}
