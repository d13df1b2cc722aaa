"""Measures the five requantization modes, time and accuracy, and puts the tables into docs/requantization.md.

    cargo build --release
    python bench/requantization.py [--labelled FILE.json]

Times, and the accuracy of the bundled network, are those of the founding experiment (`qcc bench`), run on each tier.
FILE.json names more networks with labelled images: a list of {"model": "net.onnx", "eval": [options of `qcc eval`]}.
Needs nothing but Python.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = ["shift", "tflite", "q15", "pow2", "float"]
BEGIN, END = "<!-- begin measured -->", "<!-- end measured -->"


def qcc(options, *words):
    """Runs a command of qcc that writes JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = {k: v for k, v in os.environ.items() if k != "QCC_ISA"}
        words = [str(options.qcc), *map(str, words), "-qq", "--json", str(out)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(out.read_text())


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def kind(run):
    """What a run computes with: a mode, `float32` or `fake-quant`."""
    return {"int8": run["requant"], "float": "float32"}.get(run["precision"], run["precision"])


def label(name):
    return f"`{name}`" if name in MODES else name


def times(reports):
    """Median milliseconds and the share of requantization, by mode; a column for each network and tier."""
    columns = [(model, r["isa"]) for model in ("fashion_resnet8", "resnet50-cifar100") for r in reports]
    found = {(run["model"], r["isa"], kind(run)): run for r in reports for run in r["runs"]}
    lines = [row("", *map(", ".join, columns)), "|---|" + "--:|" * len(columns)]
    for name in [*MODES, "float32", "fake-quant"]:
        cells = []
        for column in columns:
            run = found[(*column, name)]
            share = run["requant_share"]
            cells.append(f"{run['latency_ms']['median']:.3f}" + (f" ({100 * share:.1f} %)" if share is not None else ""))
        lines.append(row(label(name), *cells))
    return lines


def scores(experiment, others):
    """Top-1, and agreement with float, by mode; a column for each network."""
    trained = [run for run in experiment["runs"] if run["model"] == "fashion_resnet8"]
    columns = {"fashion_resnet8, 1,000 images": {kind(run): run["accuracy"] for run in trained}}
    for name, report in others.items():
        # `float` is the network in float; `int8 float` is a mode.
        names = {"float": "float32"}
        columns[f"{name}, {report['samples']:,} images"] = {
            names.get(s["model"], s["model"].removeprefix("int8 ")): s["score"] for s in report["scores"]
        }
    lines = [row("", *columns), "|---|" + "--:|" * len(columns)]
    for name in [*MODES, "float32"]:
        cells = []
        for found in columns.values():
            top1, agreement, noise = (found[name][k] for k in ("top1", "agreement", "sqnr_db"))
            against = "" if name == "float32" else f" ({100 * agreement:.2f} %, {noise:.1f} dB)"
            cells.append(f"{100 * top1:.2f} %{against}")
        lines.append(row(label(name), *cells))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qcc", type=Path, default=ROOT / "target/release/qcc")
    parser.add_argument("--tiers", default="avx512vnni,avx2")
    parser.add_argument("--reps", type=int, default=100)
    parser.add_argument("--labelled", type=Path)
    options = parser.parse_args()
    experiments = [qcc(options, "bench", "--isa", tier, "--reps", options.reps) for tier in options.tiers.split(",")]
    others = {}
    for item in json.loads(options.labelled.read_text()) if options.labelled else []:
        others[Path(item["model"]).stem] = qcc(options, "eval", item["model"], *item["eval"], "--requant", "all")
    measured = [
        f"On {experiments[0]['host']['cpu']}, one thread. Milliseconds of one run (median), and the share of it that "
        "requantization takes:",
        "",
        *times(experiments),
        "",
        "Top-1; in parentheses, how often the best class is float's, and the signal-to-noise ratio of the outputs against "
        "float's:",
        "",
        *scores(experiments[0], others),
    ]
    path = ROOT / "docs/requantization.md"
    head, rest = path.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text("\n".join([head + BEGIN, "", *measured, "", END]) + tail)


if __name__ == "__main__":
    main()
