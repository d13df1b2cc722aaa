"""Tables and the chart of what run.py measured."""

import math
import platform

PEERS = ["ONNX Runtime", "OpenVINO", "LiteRT"]


def key(case):
    return tuple(case[name] for name in ("model", "precision", "tier", "threads", "batch"))


def ratio(result):
    """The fastest peer's time over qcc's: above 1, qcc is faster. None without a peer."""
    peers = [ms for name, ms in result["ms"].items() if name != "qcc"]
    return min(peers) / result["ms"]["qcc"] if peers else None


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def figure(ms):
    if ms is None:
        return "–"
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def groups(results):
    """Results of one table, by what they have in common."""
    found = {}
    for result in results:
        found.setdefault((result["precision"], result["tier"], result["threads"], result["batch"]), []).append(result)
    return found


def title(group):
    precision, tier, threads, batch = group
    return f"{precision}, {tier}, {threads} thread{'s' if threads > 1 else ''}, batch {batch}"


def table(results):
    peers = [p for p in PEERS if any(p in r["ms"] for r in results)]
    lines = ["| model | qcc | " + " | ".join([*peers, "best peer / qcc"]) + " |"]
    lines.append("|---|" + "--:|" * (len(peers) + 2))
    for result in results:
        times = [figure(result["ms"].get(name)) for name in ["qcc", *peers]]
        against = ratio(result)
        lines.append(f"| {result['model']} | {' | '.join(times)} | {f'{against:.2f}' if against else '–'} |")
    return lines


def summary(results):
    lines = ["| | models | geometric mean | worst |", "|---|--:|--:|--:|"]
    for group, members in groups(results).items():
        ratios = [r for r in map(ratio, members) if r]
        if ratios:
            lines.append(f"| {title(group)} | {len(ratios)} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} |")
    return lines


def losses(results):
    lost = sorted((r for r in results if (ratio(r) or 1) < 1), key=ratio)
    lines = []
    for result in lost:
        peer = min((name for name in result["ms"] if name != "qcc"), key=result["ms"].get)
        lines.append(
            f"- {result['model']}, {title(key(result)[1:])}: {figure(result['ms']['qcc'])} ms, {peer} "
            f"{figure(result['ms'][peer])} ms ({ratio(result):.2f})"
        )
    return lines or ["Nothing in this run."]


def failures(results):
    lines = []
    for result in results:
        for peer, why in result["failures"].items():
            lines.append(f"- {peer} cannot run {result['model']}, {title(key(result)[1:])}: `{why}`")
    return lines


def document(results, tiers, version, options):
    versions = {}
    for result in results:
        versions |= result["versions"]
    best = tiers[0]
    command = "python bench/run.py" + (" --quick" if options.quick else "") + (" --models FOLDER" if options.models else "")
    lines = [
        "# qcc and its peers",
        "",
        f"Written by `{command}`; `bench/run.py` tells how it measures. Milliseconds of one run, the fastest round's median. "
        "The last column is the fastest peer's time over qcc's: above 1, qcc is faster. Weights of models that "
        "`qcc zoo` writes are random, and all ranges come from noise: this is about time only.",
        "",
        f"- CPU: {best['cpu']}; one core reaches {best['peaks']['int8'] / 1e9:.0f} GMAC/s in int8 and "
        f"{best['peaks']['float'] / 1e9:.0f} in float ({best['isa']}). Linux {platform.release()}.",
        "- " + ", ".join([version, *(f"{name} {versions[name]}" for name in PEERS if name in versions)])
        + ". The peers' int8 models are made by ONNX Runtime's quantizer (QDQ, u8 activations, s8 weights per channel); "
        "OpenVINO's float is held to f32.",
        "- Below the best tier of the CPU only OpenVINO is a peer, limited by `ONEDNN_MAX_CPU_ISA`: ONNX Runtime has no "
        "such switch, nor has LiteRT's XNNPACK.",
        "- Without VNNI, oneDNN adds pairs of products in 16 bits, which saturates: faster and, with weights beyond ±64, not "
        "always right. qcc multiplies twice as often and is exact; with `--weight-bits 7` it multiplies as often as oneDNN, and "
        "is exact, too, by the proof that each layer's weights fit.",
        "- LiteRT runs where there is a .tflite of the network, at batch 1.",
        "",
        "## Ratios",
        "",
        "![best peer's time over qcc's](results.svg)",
        "",
        *summary(results),
        "",
        "## What qcc loses",
        "",
        *losses(results),
    ]
    if failed := failures(results):
        lines += ["", "## What peers cannot run", "", *failed]
    for group, members in groups(results).items():
        lines += ["", f"## {title(group)[0].upper()}{title(group)[1:]}", "", *table(members)]
    return "\n".join(lines) + "\n"


def chart(path, results):
    """Ratios by model, a panel for each precision, of the first tier, thread count and batch."""
    import matplotlib

    matplotlib.use("svg")
    # The same bytes for the same figures, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "qcc", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    first = {}
    for group in groups(results):
        first.setdefault(group[0], group)
    panels = [(group, [r for r in members if ratio(r)]) for group, members in groups(results).items() if group in first.values()]
    panels = [(group, members) for group, members in panels if members]
    if not panels:
        return
    height = 0.9 + 0.34 * max(len(members) for _, members in panels)
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), height), squeeze=False, layout="constrained")
    for axis, (group, members) in zip(axes[0], panels):
        names, ratios = [r["model"] for r in members], [ratio(r) for r in members]
        bars = axis.barh(names, ratios, color=["#2a6f97" if r >= 1 else "#c8553d" for r in ratios])
        axis.bar_label(bars, [f"{r:.2f}" for r in ratios], padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.15 * max(1, *ratios))
        axis.invert_yaxis()
        axis.set_title(title(group), fontsize=10)
        axis.set_xlabel("best peer's time / qcc's", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def write(folder, results, tiers, version, options):
    (folder / "RESULTS.md").write_text(document(results, tiers, version, options))
    chart(folder / "results.svg", results)
