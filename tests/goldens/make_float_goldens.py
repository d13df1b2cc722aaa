"""Writes the float goldens: what ONNX Runtime answers for inputs that a test can generate again.

    make_float_goldens.py [--output DIR] [--batch 2] [--scale 1] MODEL.onnx ...

For each MODEL.onnx, DIR/MODEL.float.npz holds

    <output name>           f32, one array for each graph output
    __shape__<input name>   i64, the shape that each graph input was given
    __scale__               f32, a scalar: what the generated inputs were multiplied by

The inputs themselves are not stored: `pseudo_random` below is their definition. Its values lie in [-2, 2). A model that was
trained on a much wider range, such as that of unscaled pixels, takes --scale 64: with less, its answer hardly depends on
its input. A symbolic dimension 0 becomes --batch, every other symbolic dimension 1, and declared dimensions stay as they
are.

ONNX Runtime runs the graph as it stands, on one thread, with its own fusions switched off.

Needs numpy and onnxruntime (made with 1.32.0). The goldens in this folder are those of

    make_float_goldens.py fashion_resnet8.onnx efficientnet_lite0_bn.onnx mlperftiny_image_classification.onnx
    make_float_goldens.py --scale 64 squeezenet1_1.onnx mlperftiny_visual_wake_words.onnx \\
        mlperftiny_keyword_spotting.onnx mlperftiny_anomaly_detection.onnx
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

# Keeps the elements of different inputs apart.
INPUT_STRIDE = 1_000_003


def pseudo_random(shape, input_number):
    """A hash of each element's row-major index, as f32 in [-2, 2). No step rounds, so any language gives the same bits.

    All integer steps are modulo 2^32.
    """
    index = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64) + np.uint64(input_number * INPUT_STRIDE)
    low_32_bits = np.uint64(0xFFFF_FFFF)
    h = (index + np.uint64(1)) * np.uint64(2654435761) & low_32_bits
    h ^= h >> np.uint64(16)
    h = h * np.uint64(2246822519) & low_32_bits
    h ^= h >> np.uint64(13)
    unit = (h >> np.uint64(8)).astype(np.float32) / np.float32(1 << 24)
    return (unit * np.float32(4) - np.float32(2)).reshape(shape)


def concrete_shape(declared, batch):
    """ONNX Runtime spells a symbolic dimension as a string, and an unnamed one as None."""
    return [d if isinstance(d, int) else batch if axis == 0 else 1 for axis, d in enumerate(declared)]


def golden(model, batch, scale):
    """The arrays of one model's golden file by their names."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    arrays = {"__scale__": np.float32(scale)}
    feed = {}
    for number, value in enumerate(session.get_inputs()):
        if value.type != "tensor(float)":
            raise SystemExit(f"{model}: input {value.name} is {value.type}; only float inputs can be generated")
        shape = concrete_shape(value.shape, batch)
        feed[value.name] = pseudo_random(shape, number) * np.float32(scale)
        arrays[f"__shape__{value.name}"] = np.array(shape, dtype=np.int64)

    names = [value.name for value in session.get_outputs()]
    for name, output in zip(names, session.run(names, feed), strict=True):
        if output.dtype != np.float32:
            raise SystemExit(f"{model}: output {name} is {output.dtype}; only float outputs have goldens")
        arrays[name] = output
    return arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR", help="default: this script's folder")
    parser.add_argument("--batch", type=int, default=2, help="size of a symbolic dimension 0 (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the generated inputs (default: %(default)s)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        arrays = golden(model, args.batch, args.scale)
        path = args.output / f"{model.stem}.float.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {path.stat().st_size} bytes, " + ", ".join(f"{k} {list(v.shape)}" for k, v in arrays.items()))


if __name__ == "__main__":
    main()
