"""Holds qcc to ONNX Runtime on models that are quantized already.

    quantized.py [--qcc QCC] [--inputs SAMPLES.npy] [--samples N] [--tensors] [--precision PRECISION] [--requant MODE] [--time]
                 MODEL.onnx...

Each file (producers.py makes some) is compiled by `qcc compile`, to int8 where its activations have grids, otherwise (weights
alone, or grids that are found at run time) to float, and run on the same inputs by both: samples of a float32 array
[N, ...], or normal noise. Outputs that a DequantizeLinear makes
are compared as codes of its grid: the share of equal codes, of those within a step, and the largest difference. Others are
compared as numbers: the largest difference by the largest magnitude, the cosine, and the share of equal arguments of the
maximum. With --tensors, all quantized values within the model are outputs, too, and compared as codes. With --time, both
are timed in turn on one thread; medians. Of `kernels`, those that qcc has for convolutions and products: how many compute
on integers, and how many on floats.

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
    from producers import feed
except ImportError as missing:
    sys.exit(f"SKIPPED: {missing}; give a Python that has numpy, onnx and onnxruntime")

QUIET = ["-q", "-q"]


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


# Where an op has the zero point of its result.
ZERO_POINTS = {"QuantizeLinear": 2, "QLinearConcat": 1, "QLinearSigmoid": 4, "QLinearLeakyRelu": 4, "QLinearSoftmax": 4}
ZERO_POINTS |= {"QLinearGlobalAveragePool": 4, "QLinearAveragePool": 4, "QLinearReduceMean": 4, "QGemm": 8}


def with_codes(model):
    """The model with all values that its nodes quantize as outputs, and their names."""
    constants = {c.name: c.data_type for c in model.graph.initializer}
    taken = {o.name for o in model.graph.output}
    names = []
    for node in model.graph.node:
        is_code = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear") or node.op_type == "QGemm"
        if not is_code or node.input[0] in constants or node.output[0] in taken:
            continue
        slot = ZERO_POINTS.get(node.op_type, 7)
        zero = node.input[slot] if slot < len(node.input) else ""
        elem = constants.get(zero, onnx.TensorProto.UINT8)
        names.append(node.output[0])
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], elem, None))
    return names


def samples(args, model):
    constants = {c.name for c in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    shape = [d.dim_value or 1 for d in inputs[0].type.tensor_type.shape.dim]
    if args.inputs:
        given = np.load(args.inputs)[: args.samples]
    else:
        given = np.random.default_rng(7).standard_normal([args.samples, *shape], dtype=np.float32)
    return [feed(inputs, x) for x in given]


def stored(folder, name):
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    return np.load(os.path.join(folder, ("_" + plain if plain.startswith(".") else plain) + ".npy"))


class Tally:
    """Of codes."""

    def __init__(self):
        self.equal = self.near = self.total = 0
        self.steps = 0.0

    def add(self, difference):
        difference = np.abs(difference)
        self.equal += int((difference == 0).sum())
        self.near += int((difference <= 1).sum())
        self.total += difference.size
        self.steps = max(self.steps, float(difference.max(initial=0)))

    def result(self):
        total = max(self.total, 1)
        return {"identical": self.equal / total, "within_step": self.near / total, "steps": self.steps}


def compare(args, path):
    model = onnx.load(path)
    inputs = samples(args, model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if args.unoptimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    scales = {o.name: output_scale(model, o.name) for o in model.graph.output}
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "model.qcc")
        codes, within = [], Tally()
        has_grids = bool(with_codes(onnx.load(path)))
        precision = args.precision or ("int8" if has_grids else "float")
        if args.tensors and has_grids:
            codes = with_codes(model)
            path = os.path.join(folder, "codes.onnx")
            onnx.save(model, path)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = [o.name for o in session.get_outputs()]
        build = [args.qcc, "compile", path, "-o", program, "--precision", precision, *QUIET]
        build += ["--requant", args.requant] if args.requant else []
        build += [a for name, x in inputs[0].items() for a in ("--shape", f"{name}={'x'.join(map(str, x.shape))}")] if args.shapes else []
        done = subprocess.run(build, capture_output=True, text=True)
        if done.returncode:
            return {"model": os.path.basename(path), "failed": done.stderr.strip().splitlines()[-1]}
        at_outputs, relative, agree, dots = Tally(), 0.0, 0, []
        worst = {}
        for fed in inputs:
            given = []
            for i, (name, x) in enumerate(fed.items()):
                np.save(os.path.join(folder, f"in{i}.npy"), x)
                given += ["--input", f"{name}={os.path.join(folder, f'in{i}.npy')}"]
            run = [args.qcc, "run", program, *given, "--output-dir", folder, *QUIET]
            subprocess.run(run, check=True, capture_output=True)
            for output, expected in zip(outputs, session.run(outputs, fed)):
                got = stored(folder, output).astype(np.float64)
                expected = np.asarray(expected)
                if output in codes:
                    difference = got - expected.astype(np.float64)
                    within.add(difference)
                    worst[output] = worst.get(output, 0) + int((difference != 0).sum())
                    continue
                scale = scales.get(output)
                if scale:
                    at_outputs.add(np.rint(got / scale) - np.rint(expected / scale))
                relative = max(relative, float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)))
                norms = np.linalg.norm(got) * np.linalg.norm(expected)
                dots.append(float((got * expected).sum() / norms) if norms else 1.0)
                agree += int(np.argmax(got) == np.argmax(expected))
        plain = max(len(dots), 1)
        result = {"model": os.path.basename(args.name), "agree": agree / plain, "relative": relative, "cosine": min(dots, default=1.0)}
        if at_outputs.total:
            result["outputs"] = at_outputs.result()
        if within.total:
            result["tensors"] = within.result()
            if args.verbose:
                result["differing"] = {k: v for k, v in worst.items() if v}
        result["precision"] = precision
        result["kernels"] = kernels(args, program)
        if args.time:
            result.update(timed(args, program, session, inputs[0], outputs))
    return result


def kernels(args, program):
    """How many convolutions and products compute on integers, and how many on floats: by the plan."""
    done = subprocess.run([args.qcc, "inspect", program, *QUIET], capture_output=True, text=True, check=True)
    counts = {"int8": 0, "float": 0}
    for line in done.stdout.splitlines():
        words = set(line.split())
        counts["int8"] += bool(words & {"QConv", "QMatMul"}) and bool(words & {"int8-jit"})
        counts["float"] += bool(words & {"Conv", "MatMul", "PlainMatMul", "IntConv"}) and bool(words & {"float-jit", "interpreter"})
    return counts


def timed(args, program, session, fed, outputs):
    """Medians of both in microseconds, in turn."""
    ours, theirs = [], []
    for _ in range(args.rounds):
        report = program + ".json"
        bench = [args.qcc, "bench", program, "--reps", "100", "--json", report, *QUIET]
        subprocess.run(bench, check=True, capture_output=True)
        with open(report) as file:
            ours.append(json.load(file)["runs"][0]["latency_ms"]["median"] * 1e3)
        times = []
        for _ in range(60):
            start = time.perf_counter()
            session.run(outputs, fed)
            times.append(time.perf_counter() - start)
        theirs.append(float(np.median(times[10:])) * 1e6)
    ratios = [t / o for o, t in zip(ours, theirs)]
    return {"qcc_us": float(np.median(ours)), "ort_us": float(np.median(theirs)), "speedup": float(np.median(ratios))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--qcc", default="target/release/qcc")
    parser.add_argument("--inputs")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--unoptimized", action="store_true", help="ONNX Runtime without its optimizations")
    parser.add_argument("--precision")
    parser.add_argument("--requant")
    parser.add_argument("--shapes", action="store_true", help="bind the inputs' shapes when compiling")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verbose", action="store_true", help="name the values whose codes differ")
    args = parser.parse_args()
    for path in args.models:
        args.name = path
        try:
            print(json.dumps(compare(args, path)), flush=True)
        except (subprocess.CalledProcessError, OSError, ValueError, RuntimeError) as e:
            detail = getattr(e, "stderr", None) or str(e)
            detail = detail.decode(errors="replace") if isinstance(detail, bytes) else detail
            print(json.dumps({"model": os.path.basename(path), "failed": detail.strip()[-300:]}), flush=True)


if __name__ == "__main__":
    main()
