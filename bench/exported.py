"""Checks that what `qcc compile --emit onnx` writes runs int8 in ONNX Runtime and OpenVINO.

    exported.py [--qcc QCC] [--samples N] MODEL.onnx...

Each float model is quantized by qcc and written as ONNX with QuantizeLinear and DequantizeLinear. Of that file, printed
as JSON: how many convolutions and products ONNX Runtime fuses into integer ops, and how many it leaves in float; how many
OpenVINO runs in 8 bits; and on how many samples ONNX Runtime's first class is that of qcc's own int8.

Needs Python with numpy, onnx and onnxruntime, and openvino for its part; says what is missing.
"""
import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
except ImportError as missing:
    sys.exit(f"SKIPPED: {missing}; give a Python that has numpy, onnx and onnxruntime")

FLOAT = ("Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul", "FusedGemm")
INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat")


def fused(path, folder):
    """Counts of products in the graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ops = collections.Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    return session, {"integer": sum(ops[o] for o in INTEGER), "float": sum(ops[o] for o in FLOAT)}


def openvino_precisions(path):
    """Counts of the convolutions and products of OpenVINO's execution graph, by precision."""
    try:
        import openvino
    except ImportError as missing:
        return f"SKIPPED: {missing}"
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    counts = collections.Counter()
    for node in model.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
            counts[info["runtimePrecision"].astype(str)] += 1
    return dict(counts)


def check(args, path):
    with tempfile.TemporaryDirectory() as folder:
        exported, program = os.path.join(folder, "exported.onnx"), os.path.join(folder, "model.qcc")
        quiet = ["-q", "-q"]
        subprocess.run([args.qcc, "compile", path, "--emit", "onnx", "-o", exported] + quiet, check=True, capture_output=True)
        subprocess.run([args.qcc, "compile", path, "-o", program] + quiet, check=True, capture_output=True)
        session, result = fused(exported, folder)
        value = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in value.shape]
        outputs = [o.name for o in session.get_outputs()]
        rng = np.random.default_rng(11)
        agree = 0
        for _ in range(args.samples):
            x = rng.standard_normal(shape, dtype=np.float32)
            np.save(os.path.join(folder, "x.npy"), x)
            run = [args.qcc, "run", program, "--input", os.path.join(folder, "x.npy"), "--output-dir", folder]
            subprocess.run(run + quiet, check=True, capture_output=True)
            ours = np.load(os.path.join(folder, outputs[0].replace("/", "_") + ".npy"))
            agree += int(np.argmax(ours) == np.argmax(session.run(outputs, {value.name: x})[0]))
        return {
            "model": os.path.basename(path),
            "onnxruntime": result,
            "openvino": openvino_precisions(exported),
            "agree": agree / args.samples,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--qcc", default="target/release/qcc")
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    for path in args.models:
        print(json.dumps(check(args, path)), flush=True)


main()
