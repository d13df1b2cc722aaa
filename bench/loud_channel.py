#!/usr/bin/env python3
"""Makes one channel of an ONNX model so many times as large and divides what reads it by as much: float computes what it did, and
a grid that the channels share has hardly any codes left for the others. `docs/guide.md` finds and repairs it.

    loud_channel.py net.onnx broken.onnx --node /l2/c1/Conv --channel 5 --factor 100

The convolution, or the batch norm behind it, must be followed by a ReLU that one convolution alone reads.
"""

import argparse
import sys

import numpy as np
import onnx
from onnx import numpy_helper


def make_loud(model, name, channel, factor):
    graph = model.graph
    readers = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)

    def reader(node, kinds):
        found = readers.get(node.output[0], [])
        if len(found) != 1 or found[0].op_type not in kinds:
            sys.exit(f"`{node.name}` is not followed by one {' or '.join(kinds)} alone")
        return found[0]

    def scale(node, slot, axis, by):
        arrays = {t.name: t for t in graph.initializer}
        if node.input[slot] not in arrays:
            sys.exit(f"input {slot} of `{node.name}` is no constant")
        array = numpy_helper.to_array(arrays[node.input[slot]]).copy()
        array[(slice(None),) * axis + (channel,)] *= np.float32(by)
        # Exporters let equal initializers share one: this one gets its own.
        node.input[slot] = f"{node.name}_{slot}_loud"
        graph.initializer.append(numpy_helper.from_array(array, node.input[slot]))

    conv = next((n for n in graph.node if n.name == name and n.op_type == "Conv"), None)
    if conv is None:
        sys.exit(f"there is no convolution `{name}`")
    behind = reader(conv, ["Relu", "BatchNormalization"])
    if behind.op_type == "BatchNormalization":
        scale(behind, 1, 0, factor)
        scale(behind, 2, 0, factor)
        relu = reader(behind, ["Relu"])
    else:
        scale(conv, 1, 0, factor)
        if len(conv.input) > 2:
            scale(conv, 2, 0, factor)
        relu = behind
    scale(reader(relu, ["Conv"]), 1, 1, 1.0 / factor)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--node", required=True, help="the convolution")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--factor", type=float, default=100.0)
    args = parser.parse_args()
    model = onnx.load(args.model)
    make_loud(model, args.node, args.channel, args.factor)
    onnx.save(model, args.output)


if __name__ == "__main__":
    main()
