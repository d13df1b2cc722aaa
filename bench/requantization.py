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


def times(reports):
    """Median milliseconds and the share of requantization, by mode; a pair of columns for each network and tier."""
    columns = [(r["isa"], model) for model in ("fashion_resnet8", "resnet50-cifar100") for r in reports]
    found = {(r["isa"], run["model"], run["requant"] or run["precision"]): run for r in reports for run in r["runs"]}
    lines = [row("", *(f"{model}, {isa}" for isa, model in columns)), "|---|" + "--:|" * len(columns)]
    for name in [*MODES, "float32", "fake-quant"]:
        cells = []
        for isa, model in columns:
            key = (isa, model, name) if name in MODES else (isa, model, {"float32": None}.get(name, name))
            run = found.get(key) if name != "float32" else next(
                r for r in next(x for x in reports if x["isa"] == isa)["runs"]
                if r["model"] == model and r["precision"] == "float"
            )
            share = run["requant_share"]
            cells.append(f"{run['latency_ms']['median']:.3f}" + (f" ({100 * share:.1f} %)" if share is not None else ""))
        lines.append(row(f"`{name}`" if name in MODES else name, *cells))
    return lines


def scores(experiment, others):
    """Top-1, and agreement with float, by mode; a column for each network."""
    columns = {"fashion_resnet8 (1,000)": {
        run["requant"] or run["precision"] + "32" * (run["precision"] == "float"): run["accuracy"]
        for run in experiment["runs"] if run["model"] == "fashion_resnet8"
    }}
    for name, report in others.items():
        columns[f"{name} ({report['samples']:,})"] = {
            s["model"].removeprefix("int8 ") if s["model"] != "float" else "float32": s["score"] for s in report["scores"]
        }
    lines = [row("", *columns), "|---|" + "--:|" * len(columns)]
    for name in [*MODES, "float32"]:
        cells = []
        for found in columns.values():
            score = found[name]
            noise = f", {score['sqnr_db']:.1f} dB" if score["sqnr_db"] is not None else ""
            cells.append(f"{100 * score['top1']:.2f} % ({100 * score['agreement']:.2f} %{noise})")
        lines.append(row(f"`{name}`" if name in MODES else name, *cells))
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
