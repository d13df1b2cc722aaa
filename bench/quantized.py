"""Holds qcc to ONNX Runtime on models that are quantized already.

    quantized.py [--qcc QCC] [--samples N] [--requant MODE] [--time] MODEL.onnx...

Each file (QDQ, QOperator, dynamically quantized) is compiled by `qcc compile --precision int8` and run on the same
random inputs by both. Outputs that a DequantizeLinear makes are compared as codes of its grid: the share of equal codes,
and the largest difference in steps. Others are compared as numbers: the largest difference by the largest magnitude, and
the share of equal arguments of the maximum. With --time, both are timed in turn on one thread; medians.

Needs Python with numpy, onnx and onnxruntime; says what is missing.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
except ImportError as missing:
    sys.exit(f"SKIPPED: {missing}; give a Python that has numpy, onnx and onnxruntime")


def output_scale(model, name):
    """The scale of the DequantizeLinear that makes an output, through moves; None where it is made otherwise."""
    makers = {o: n for n in model.graph.node for o in n.output}
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    while name in makers:
        node = makers[name]
        if node.op_type == "DequantizeLinear":
            scale = constants.get(node.input[1])
            return float(scale) if scale is not None and scale.size == 1 else None
        if node.op_type not in ("Reshape", "Flatten", "Squeeze", "Transpose"):
            return None
        name = node.input[0]
    return None


def samples(model, count):
    rng = np.random.default_rng(7)
    value = model.graph.input[0]
    shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
    return value.name, [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]


def compare(args, path):
    model = onnx.load(path)
    name, inputs = samples(model, args.samples)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]
    equal = total = 0
    steps, relative, agree = 0.0, 0.0, 0
    coded = False
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "model.qcc")
        build = [args.qcc, "compile", path, "-o", program, "-q", "-q", "--precision", "int8"]
        build += ["--requant", args.requant] if args.requant else []
        done = subprocess.run(build, capture_output=True, text=True)
        if done.returncode:
            return {"model": path, "failed": done.stderr.strip().splitlines()[-1]}
        for x in inputs:
            np.save(os.path.join(folder, "x.npy"), x)
            run = [args.qcc, "run", program, "--input", os.path.join(folder, "x.npy"), "--output-dir", folder, "-q", "-q"]
            subprocess.run(run, check=True, capture_output=True)
            for output, expected in zip(outputs, session.run(outputs, {name: x})):
                got = np.load(os.path.join(folder, output.replace("/", "_") + ".npy")).astype(np.float64)
                scale = output_scale(model, output)
                if scale:
                    coded = True
                    difference = np.abs(np.rint(got / scale) - np.rint(expected / scale))
                    equal += int((difference == 0).sum())
                    total += difference.size
                    steps = max(steps, float(difference.max()))
                relative = max(relative, float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)))
                agree += int(np.argmax(got) == np.argmax(expected))
        result = {"model": os.path.basename(path), "agree": agree / len(inputs) / len(outputs), "relative": relative}
        if coded:
            result.update(identical=equal / total, steps=steps)
        if args.time:
            result.update(timed(args, program, session, name, inputs[0], outputs))
    return result


def timed(args, program, session, name, x, outputs):
    """Medians of both in microseconds, in turn."""
    ours, theirs = [], []
    for _ in range(3):
        report = program + ".json"
        bench = [args.qcc, "bench", program, "--reps", "100", "--json", report, "-q", "-q"]
        subprocess.run(bench, check=True, capture_output=True)
        with open(report) as file:
            ours.append(json.load(file)["runs"][0]["latency_ms"]["median"] * 1e3)
        times = []
        for _ in range(60):
            start = time.perf_counter()
            session.run(outputs, {name: x})
            times.append(time.perf_counter() - start)
        theirs.append(float(np.median(times[10:])) * 1e6)
    ours, theirs = float(np.median(ours)), float(np.median(theirs))
    return {"qcc_us": ours, "ort_us": theirs, "speedup": theirs / ours}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--qcc", default="target/release/qcc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--requant")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    for path in args.models:
        try:
            print(json.dumps(compare(args, path)), flush=True)
        except (subprocess.CalledProcessError, OSError, ValueError) as e:
            print(json.dumps({"model": os.path.basename(path), "failed": str(e)}), flush=True)


main()
