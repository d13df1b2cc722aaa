#!/usr/bin/env python3
"""Resets the statistics of all batch norms of an ONNX model to those of initialisation, mean 0 and variance 1: a model as it
comes out of a training that never updated them. `docs/lint.md` shows what `--reestimate-bn` makes of it.

    reset_batch_norms.py net.onnx broken.onnx
"""

import argparse

import numpy as np
import onnx
from onnx import numpy_helper


def reset(model):
    """Gives each batch norm statistics of its own; returns how many there were."""
    graph = model.graph
    lengths = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}
    # Exporters let equal initializers share one, which others get as an identity.
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in lengths:
            lengths[node.output[0]] = lengths[node.input[0]]
    count = 0
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            continue
        for slot, value in ((3, 0.0), (4, 1.0)):
            array = np.full(lengths[node.input[slot]], value, np.float32)
            name = f"reset_{count}_{slot}"
            graph.initializer.append(numpy_helper.from_array(array, name))
            node.input[slot] = name
        count += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    args = parser.parse_args()
    model = onnx.load(args.model)
    print(f"{reset(model)} batch norms reset")
    onnx.save(model, args.output)


if __name__ == "__main__":
    main()
