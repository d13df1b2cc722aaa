"""Checks that what `qcc compile --emit onnx` writes runs int8 in ONNX Runtime and OpenVINO.

    exported.py [--qcc QCC] [--inputs SAMPLES.npy] [--samples N] [--shape INPUT=DIMS]... MODEL.onnx...

Each float model is quantized by qcc (calibrated on the samples, if there are any) and written as ONNX with QuantizeLinear
and DequantizeLinear. Of that file, printed as JSON: how many convolutions and products ONNX Runtime fuses into integer
ops, and how many it leaves in float; how many OpenVINO runs in 8 bits; on how many samples the first class of ONNX Runtime
and of OpenVINO is that of qcc's own int8, and the least cosine of the first outputs.

Needs Python with numpy, onnx and onnxruntime, and openvino for its part; says what is missing.
"""
import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from producers import feed
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


def in_openvino(path, names, samples):
    """Counts of the convolutions and products of OpenVINO's execution graph, by precision, and its first outputs."""
    try:
        import openvino
    except ImportError as missing:
        return f"SKIPPED: {missing}", []
    core = openvino.Core()
    try:
        model = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    except RuntimeError as refusal:
        return f"refused: {str(refusal).strip().splitlines()[-1][:200]}", []
    counts = collections.Counter()
    for node in model.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
            counts[info["runtimePrecision"].astype(str)] += 1
    return dict(counts), [model({n: fed[n] for n in names})[0] for fed in samples]


def agreement(ours, theirs):
    if not theirs:
        return None
    cosine = lambda a, b: float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, theirs)]
    same = [int(np.argmax(a) == np.argmax(b)) for a, b in pairs]
    return {"first_class": sum(same) / len(same), "cosine": min(cosine(a, b) for a, b in pairs)}


def check(args, path):
    with tempfile.TemporaryDirectory() as folder:
        exported, program = os.path.join(folder, "exported.onnx"), os.path.join(folder, "model.qcc")
        options = ["-q", "-q"] + [a for shape in args.shape for a in ("--shape", shape)]
        if args.calibrate:
            options += ["--calibrate", args.calibrate]
        for output in (["--emit", "onnx", "-o", exported], ["-o", program]):
            done = subprocess.run([args.qcc, "compile", path, *output, *options], capture_output=True, text=True)
            if done.returncode:
                return {"model": os.path.basename(path), "failed": done.stderr.strip().splitlines()[-1]}
        if args.keep:
            shutil.copy(exported, args.keep)
        session, result = fused(exported, folder)
        inputs = onnx.load(exported).graph.input
        shape = [d.dim_value or 1 for d in inputs[0].type.tensor_type.shape.dim]
        noise = np.random.default_rng(11).standard_normal([args.samples, *shape], dtype=np.float32)
        given = np.load(args.inputs)[: args.samples] if args.inputs else noise
        samples = [feed(inputs, x) for x in given]
        outputs = [o.name for o in session.get_outputs()]
        ours = []
        for fed in samples:
            run = [args.qcc, "run", program, "--output-dir", folder, "-q", "-q"]
            for i, (name, x) in enumerate(fed.items()):
                np.save(os.path.join(folder, f"in{i}.npy"), x)
                run += ["--input", f"{name}={os.path.join(folder, f'in{i}.npy')}"]
            subprocess.run(run, check=True, capture_output=True)
            ours.append(np.load(os.path.join(folder, outputs[0].replace("/", "_").replace(":", "_") + ".npy")))
        counts, others = in_openvino(exported, [i.name for i in inputs], samples)
        return {
            "model": os.path.basename(path),
            "onnxruntime": {**result, "agreement": agreement(ours, [session.run(outputs, fed)[0] for fed in samples])},
            "openvino": {"precisions": counts, "agreement": agreement(ours, others)},
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--qcc", default="target/release/qcc")
    parser.add_argument("--inputs")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibrate", help="what qcc compile takes: a file or folder of samples")
    parser.add_argument("--shape", action="append", default=[], metavar="INPUT=DIMS")
    parser.add_argument("--keep", metavar="FILE.onnx", help="keep what was exported")
    args = parser.parse_args()
    for path in args.models:
        print(json.dumps(check(args, path)), flush=True)


main()
