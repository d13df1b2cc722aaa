"""Times qcc against ONNX Runtime, OpenVINO and LiteRT on the same models, in turn, and writes RESULTS.md and a chart.

    python -m venv venv && venv/bin/pip install -r bench/requirements.txt
    cargo build --release
    venv/bin/python bench/run.py [--models FOLDER] [--quick]

Cases are models x precisions x tiers x threads x batches. Every contender of a case has a process of its own; they take
turns, a few rounds long, and of each the fastest round's median counts. What was measured is kept in --work, so that a
run which was interrupted goes on where it was; --fresh begins anew. Accuracy is not measured here: see `qcc eval`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ZOO = ["mobilenetv2", "resnet50", "resnet50-cifar100", "vgg16"]
LOWER_TIERS = ["avx512vnni", "avx2", "x86-64-v2"]
# Tiers without a dot product of bytes, where weights of 7 bits take fewer instructions. The peers' weights stay of 8 bits.
NARROW = "int8 with weights of 7 bits"
NARROW_TIERS = ["avx2", "x86-64-v2"]
# The limit for OpenVINO's oneDNN that is the same as a tier; at the host's best tier nobody is limited. ONNX Runtime and
# XNNPACK, below LiteRT, have no limit: at lower tiers they could use more than qcc, so they are left out.
ONEDNN = {
    "avx512vnni": "AVX512_CORE_VNNI",
    "avxvnni": "AVX2_VNNI",
    "avx2": "AVX2",
    "x86-64-v2": "SSE41",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qcc", type=Path, default=ROOT / "target/release/qcc", help="the binary")
    parser.add_argument("--models", type=Path, help="a folder of more .onnx; LiteRT takes NAME.int8.tflite and NAME.float.tflite beside")
    parser.add_argument("--zoo", default=",".join(ZOO), help="networks that `qcc zoo` writes, with random weights")
    parser.add_argument("--only", help="take models whose name contains this")
    parser.add_argument("--precisions", default="int8,float")
    parser.add_argument("--tiers", help="tiers besides the best of this CPU; default: " + ", ".join(LOWER_TIERS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a contender's turn")
    parser.add_argument("--quick", action="store_true", help="two models, one tier, one thread, batch 1, short turns")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qcc-bench", help="models and measurements")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--out", type=Path, default=HERE, help="where RESULTS.md and results.svg go")
    options = parser.parse_args()
    options.qcc = options.qcc.resolve()
    if options.quick:
        options.zoo, options.threads, options.batches = "mobilenetv2", "1", "1"
        options.rounds, options.seconds = 2, 0.1
    return options


def qcc(options, *words, tier=None):
    environment = {k: v for k, v in os.environ.items() if k != "QCC_ISA"}
    if tier:
        environment["QCC_ISA"] = tier
    subprocess.run([options.qcc, *map(str, words), "-qq"], check=True, stdout=subprocess.DEVNULL, env=environment)


def host(options):
    """What `qcc bench --peaks` measured, the best tier first."""
    path = options.work / "peaks.json"
    qcc(options, "bench", "--peaks", "--json", path)
    return json.loads(path.read_text())["tiers"]


def models(options):
    """Paths by name: the bundled model, those of the zoo, those of the folder."""
    found = {"fashion_resnet8": ROOT / "models/fashion_resnet8.onnx"}
    for name in filter(None, options.zoo.split(",")):
        found[name] = options.work / f"{name}.onnx"
        if not found[name].exists():
            qcc(options, "zoo", name, "-o", found[name])
    if options.models:
        for path in sorted(options.models.glob("*.onnx")):
            found.setdefault(path.stem, path)
    return {name: path for name, path in found.items() if not options.only or options.only in name}


def input_shapes(path, batch):
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    shapes = {}
    for value in graph.input:
        if value.name not in weights:
            dims = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
            shapes[value.name] = [batch, *dims[1:]]
    return shapes


def any_batch(path, out):
    """A copy whose batch is symbolic: some runtimes take no other than the one in the file."""
    model = onnx.load(path)
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, out)


def quantized(path, out):
    """The peers' int8 model, as their users make it: ONNX Runtime's static QDQ, u8 activations, s8 weights per channel.

    Ranges come from noise, for the figures are about time only.
    """
    import numpy as np
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    noise = np.random.default_rng(0)
    samples = [
        {name: noise.standard_normal(shape, dtype=np.float32) for name, shape in input_shapes(path, 1).items()}
        for _ in range(4)
    ]

    class Noise(q.CalibrationDataReader):
        def __init__(self):
            self.left = list(samples)

        def get_next(self):
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        q.quantize_static(
            prepared, out, Noise(), quant_format=q.QuantFormat.QDQ, per_channel=True,
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )


def peer_files(options, name, path):
    """What each peer loads, by precision."""
    base = options.work / name
    float_model, int8_model = base.with_suffix(".any-batch.onnx"), base.with_suffix(".qdq.onnx")
    if not float_model.exists():
        any_batch(path, float_model)
    if not int8_model.exists():
        print(f"quantizing {name} for the peers", file=sys.stderr)
        quantized(float_model, int8_model)
    files = {}
    for precision, file in (("float", float_model), ("int8", int8_model)):
        files[precision] = {"ONNX Runtime": file, "OpenVINO": file}
        lite = path.with_suffix(f".{precision}.tflite")
        if lite.exists():
            files[precision]["LiteRT"] = lite
    files[NARROW] = files["int8"]
    return files


class Peer:
    """A process of peer.py."""

    def __init__(self, peer, path, shapes, threads, onednn_limit):
        case = {"peer": peer, "path": str(path), "inputs": shapes, "threads": threads}
        environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
        if onednn_limit:
            environment["ONEDNN_MAX_CPU_ISA"] = onednn_limit
        self.process = subprocess.Popen(
            [sys.executable, HERE / "peer.py", json.dumps(case)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        # Runtimes print banners of their own.
        ready = next((line for line in self.process.stdout if line.startswith("ready ")), None)
        if ready is None:
            lines = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "it died without a word")
        self.version = ready.split()[1]

    def median(self, runs):
        print(runs, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("it died while running")
        return float(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Qcc:
    """qcc on one program."""

    def __init__(self, options, program, threads, tier):
        self.options, self.program, self.threads, self.tier = options, program, threads, tier

    def median(self, runs):
        out = self.options.work / "bench.json"
        qcc(self.options, "bench", self.program, "--threads", self.threads, "--reps", runs, "--json", out, tier=self.tier)
        return json.loads(out.read_text())["runs"][0]["latency_ms"]["median"]

    def close(self):
        pass


def contenders(options, case, path, files, is_best_tier):
    """Those that can run a case, and what kept the others from it."""
    shapes = input_shapes(path, case["batch"])
    program = options.work / f"{case['model']}.{case['precision'].replace(' ', '-')}.{case['batch']}.qcc"
    words = [word for name, dims in shapes.items() for word in ("--shape", f"{name}={'x'.join(map(str, dims))}")]
    precision = ["int8", "--weight-bits", "7"] if case["precision"] == NARROW else [case["precision"]]
    qcc(options, "compile", path, "--precision", *precision, *words, "-o", program)
    found, failures = {"qcc": Qcc(options, program, case["threads"], case["tier"])}, {}
    for peer, file in files[case["precision"]].items():
        limit = None if is_best_tier else ONEDNN.get(case["tier"])
        is_fair = is_best_tier or (peer == "OpenVINO" and limit)
        if not is_fair or (peer == "LiteRT" and case["batch"] != 1):
            continue
        try:
            found[peer] = Peer(peer, file, shapes, case["threads"], limit)
        except RuntimeError as error:
            failures[peer] = str(error)[:200]
    return found, failures


def measure(options, case, path, files, is_best_tier):
    found, failures = contenders(options, case, path, files, is_best_tier)
    times = {name: [] for name in found}
    runs = {}
    for name, contender in found.items():
        once = contender.median(3)
        runs[name] = int(min(max(1e3 * options.seconds / once, 3), 500))
    for _ in range(options.rounds):
        for name, contender in found.items():
            times[name].append(contender.median(runs[name]))
    versions = {name: c.version for name, c in found.items() if isinstance(c, Peer)}
    for contender in found.values():
        contender.close()
    return case | {"ms": {name: min(t) for name, t in times.items()}, "versions": versions, "failures": failures}


def cases(options, best, lower):
    """Precision, tier, threads, batch: all at the best tier, and single images on one thread at lower ones."""
    precisions = options.precisions.split(",")
    threads, batches = ([int(n) for n in words.split(",")] for words in (options.threads, options.batches))
    yield from itertools.product(precisions, [best], threads, batches)
    yield from itertools.product(precisions, lower, [1], [1])
    if "int8" in precisions:
        yield from itertools.product([NARROW], [tier for tier in lower if tier in NARROW_TIERS], [1], [1])


def main():
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    tiers = host(options)
    names = [tier["isa"] for tier in tiers]
    best = names[0]
    lower = options.tiers.split(",") if options.tiers else [] if options.quick else LOWER_TIERS
    lower = [name for name in lower if name in names[1:]]
    kept = options.work / ("quick.jsonl" if options.quick else "measured.jsonl")
    if options.fresh:
        kept.unlink(missing_ok=True)
    done = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            result = json.loads(line)
            done[report.key(result)] = result
    results = []
    for name, path in models(options).items():
        files = peer_files(options, name, path)
        for precision, tier, threads, batch in cases(options, best, lower):
            case = {"model": name, "precision": precision, "tier": tier, "threads": threads, "batch": batch}
            if report.key(case) not in done:
                result = measure(options, case, path, files, tier == best)
                done[report.key(case)] = result
                with kept.open("a") as out:
                    out.write(json.dumps(result) + "\n")
                print(json.dumps(result["ms"] | case), file=sys.stderr, flush=True)
            results.append(done[report.key(case)])
    version = subprocess.run([options.qcc, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    report.write(options.out, results, tiers, version, options)


if __name__ == "__main__":
    main()
