"""Writes a float ONNX model quantized in the ways that its users' tools do.

    producers.py MODEL.onnx FOLDER [--samples SAMPLES.npy] [--shape INPUT=1x3x224x224]... [--forms LIST]
    producers.py --list

Each form becomes FOLDER/MODEL.FORM.onnx. ONNX Runtime's quantizer makes them all; the forms named after other tools place
pairs of QuantizeLinear and DequantizeLinear where those tools do. SAMPLES.npy has float32 [N, ...] to calibrate with;
without it, normal noise. Shapes that are given become those of the file. A form that the quantizer itself refuses is reported and left out.

Needs Python with numpy, onnx and onnxruntime; matmul_nbits also onnx_ir, as ONNX Runtime's own quantizer does.
"""
import argparse
import json
import logging
import os
import sys
import tempfile

try:
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError as missing:
    sys.exit(f"SKIPPED: {missing}; give a Python that has numpy, onnx and onnxruntime")

U8, S8, U16, S16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16, QuantType.QInt16
QDQ, QOPERATOR = QuantFormat.QDQ, QuantFormat.QOperator
WEIGHTED = ["Conv", "MatMul", "Gemm"]


def static(activations=U8, weights=S8, per_channel=True, form=QDQ, reduce_range=False, **extra):
    """Arguments of quantize_static; `ops` limits it to some op types."""
    ops = extra.pop("ops", None)
    return dict(
        quant_format=form,
        activation_type=activations,
        weight_type=weights,
        per_channel=per_channel,
        reduce_range=reduce_range,
        op_types_to_quantize=ops,
        extra_options=extra,
    )


STATIC = {
    # ONNX Runtime's own options.
    "qdq": static(),
    "qdq_per_tensor": static(per_channel=False),
    "qdq_u8u8": static(weights=U8, per_channel=False),
    "qdq_u8u8_per_channel": static(weights=U8),
    "qdq_s8s8": static(activations=S8),
    "qdq_s8u8": static(activations=S8, weights=U8, per_channel=False),
    "qdq_reduce_range": static(reduce_range=True),
    "qdq_float_bias": static(QuantizeBias=False),
    "qdq_forced": static(ForceQuantizeNoInputCheck=True),
    "qdq_dedicated": static(DedicatedQDQPair=True),
    "qdq_weight_pairs": static(AddQDQPairToWeight=True),
    "qdq_contrib": static(UseQDQContribOps=True),
    "qdq_symmetric": static(activations=S8, ActivationSymmetric=True),
    "qdq_asymmetric_weights": static(WeightSymmetric=False, per_channel=False),
    "qdq_a16w8": static(activations=U16),
    "qdq_a16w8_contrib": static(activations=S16, UseQDQContribOps=True),
    "qdq_w4": static(weights=QuantType.QInt4),
    "qdq_w4_unsigned": static(weights=QuantType.QUInt4, per_channel=False),
    "qoperator": static(form=QOPERATOR),
    "qoperator_per_tensor": static(form=QOPERATOR, per_channel=False),
    "qoperator_u8u8": static(form=QOPERATOR, weights=U8, per_channel=False),
    "qoperator_s8s8": static(form=QOPERATOR, activations=S8),
    "qoperator_reduce_range": static(form=QOPERATOR, reduce_range=True),
    # NVIDIA ModelOpt, TensorRT: symmetric s8 before the ops with weights alone, pairs for each user, biases in float.
    "modelopt": static(
        activations=S8,
        ActivationSymmetric=True,
        QuantizeBias=False,
        DedicatedQDQPair=True,
        OpTypesToExcludeOutputQuantization=WEIGHTED,
        ops=WEIGHTED,
    ),
    # Intel NNCF, OpenVINO: FakeQuantize before ops with weights and before sums, biases in float.
    "nncf": static(
        QuantizeBias=False,
        AddQDQPairToWeight=True,
        OpTypesToExcludeOutputQuantization=WEIGHTED + ["Add", "Mul", "Concat"],
        ops=WEIGHTED + ["Add", "Mul", "Concat"],
    ),
    # TensorFlow by tf2onnx: pairs around weights, too, biases in float, s8 activations.
    "tensorflow": static(activations=S8, QuantizeBias=False, AddQDQPairToWeight=True),
    # PyTorch: activations of 7 bits, per tensor.
    "pytorch": static(reduce_range=True, per_channel=False, QuantizeBias=False, AddQDQPairToWeight=True),
}

DYNAMIC = {
    "dynamic": dict(weight_type=S8, per_channel=True),
    "dynamic_per_tensor": dict(weight_type=S8),
    "dynamic_u8": dict(weight_type=U8),
    "dynamic_reduce_range": dict(weight_type=S8, reduce_range=True),
    "dynamic_symmetric_u8": dict(weight_type=U8, per_channel=True),
}

# (bits, symmetric, as QDQ)
N_BITS = {
    "nbits4": (4, True, False),
    "nbits4_zero_points": (4, False, False),
    "nbits8": (8, True, False),
    "nbits8_zero_points": (8, False, False),
    "nbits4_qdq": (4, True, True),
    "nbits4_qdq_zero_points": (4, False, True),
    "nbits8_qdq": (8, True, True),
}

OTHER = ["bnb4", "cast_mul", "channels_dq"]
FORMS = [*STATIC, *DYNAMIC, *N_BITS, *OTHER]


def shape_of(value):
    return [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]


class Reader(CalibrationDataReader):
    """Samples for the first input; other inputs get ones of their type."""

    def __init__(self, model, samples):
        taken = {c.name for c in model.graph.initializer}
        self.inputs = [v for v in model.graph.input if v.name not in taken]
        self.samples = iter(samples)

    def get_next(self):
        sample = next(self.samples, None)
        return None if sample is None else feed(self.inputs, sample)


def feed(inputs, sample):
    """What a session takes: `sample` for a float input, token-like integers for the others."""
    fed = {}
    for value in inputs:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or (1 if i == 0 else LENGTH) for i, d in enumerate(value.type.tensor_type.shape.dim)]
        if dtype == np.float32:
            fed[value.name] = sample if len(sample.shape) == len(shape) else sample[None]
        elif "mask" in value.name:
            fed[value.name] = np.ones(shape, dtype)
        elif "type" in value.name:
            fed[value.name] = np.zeros(shape, dtype)
        else:
            rng = np.random.default_rng(int(abs(sample.ravel()[0]) * 1e6) % 2**31)
            fed[value.name] = rng.integers(1, 20000, shape).astype(dtype)
    return fed


# Of sequences whose length is open.
LENGTH = 32


def with_shapes(source, target, shapes):
    """The model with these shapes of inputs; what followed from others is forgotten."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    for value in model.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            del dims[:]
            for n in shapes[value.name]:
                dims.add().dim_value = n
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    onnx.save(onnx.shape_inference.infer_shapes(model), target)
    return target


def n_bits(source, target, bits, symmetric, as_qdq):
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    config = tool.DefaultWeightOnlyQuantConfig(
        block_size=32,
        is_symmetric=symmetric,
        bits=bits,
        quant_format=QDQ if as_qdq else QOPERATOR,
        op_types_to_quantize=("MatMul",),
    )
    made = tool.MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    made.process()
    made.model.save_model_to_file(target)


def bnb4(source, target):
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    made = MatMulBnb4Quantizer(onnx.load(source), MatMulBnb4Quantizer.NF4, 64)
    made.process()
    if not any(n.op_type == "MatMulBnb4" for n in made.model.graph().node):
        raise ValueError("no MatMul with constant weights")
    made.model.save_model_to_file(target)


def by_weights(source, target, dequantized):
    """Replaces the constant second operand of each MatMul by nodes that compute it from s8."""
    model = onnx.load(source)
    graph = model.graph
    constants = {c.name: c for c in graph.initializer}
    nodes, done = [], set()
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else None
        if name in constants and len(constants[name].dims) == 2:
            if name not in done:
                weights = onnx.numpy_helper.to_array(constants[name])
                scales = np.maximum(np.abs(weights).max(axis=0) / 127, 1e-12).astype(np.float32)
                codes = np.clip(np.rint(weights / scales), -127, 127).astype(np.int8)
                graph.initializer.append(onnx.numpy_helper.from_array(codes, f"{name}_codes"))
                nodes += dequantized(graph, name, scales)
                graph.initializer.remove(constants[name])
                done.add(name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    if not done:
        raise ValueError("no MatMul with constant weights")
    onnx.save(model, target)


def cast_mul(graph, name, scales):
    graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}_scales"))
    cast = onnx.helper.make_node("Cast", [f"{name}_codes"], [f"{name}_wide"], to=onnx.TensorProto.FLOAT)
    return [cast, onnx.helper.make_node("Mul", [f"{name}_wide", f"{name}_scales"], [name])]


def channels_dq(graph, name, scales):
    graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}_scales"))
    return [onnx.helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scales"], [name], axis=1)]


def at_least_opset(source, target, opset):
    """Some forms need a newer operator set than the model has."""
    model = onnx.load(source)
    if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) >= opset:
        return source
    onnx.save(onnx.version_converter.convert_version(model, opset), target)
    return target


def make(source, form, samples, target, folder):
    if form in STATIC:
        options = dict(STATIC[form], extra_options=dict(STATIC[form]["extra_options"]))
        narrow = form.startswith(("qdq_w4", "qdq_a16w8")) and "contrib" not in form
        opset = 21 if narrow else 13  # Before 13 a tensor has one scale.
        source = at_least_opset(source, os.path.join(folder, f"opset{opset}.onnx"), opset)
        quantize_static(source, target, Reader(onnx.load(source), samples), **options)
    elif form in DYNAMIC:
        quantize_dynamic(source, target, **DYNAMIC[form])
    elif form in N_BITS:
        bits, symmetric, as_qdq = N_BITS[form]
        if as_qdq:
            source = at_least_opset(source, os.path.join(folder, "opset21.onnx"), 21)
        n_bits(source, target, bits, symmetric, as_qdq)
    elif form == "bnb4":
        bnb4(source, target)
    else:
        by_weights(source, target, {"cast_mul": cast_mul, "channels_dq": channels_dq}[form])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--samples")
    parser.add_argument("--shape", action="append", default=[], metavar="INPUT=DIMS")
    parser.add_argument("--forms", help="comma-separated; all where it is not given")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        return print("\n".join(FORMS))
    logging.disable(logging.WARNING)
    os.makedirs(args.folder, exist_ok=True)
    base = os.path.splitext(os.path.basename(args.model))[0]
    with tempfile.TemporaryDirectory() as folder:
        shapes = {name: [int(n) for n in dims.split("x")] for name, dims in (s.rsplit("=", 1) for s in args.shape)}
        source = with_shapes(args.model, os.path.join(folder, "shaped.onnx"), shapes) if shapes else args.model
        prepared = os.path.join(folder, "prepared.onnx")
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        except Exception:  # Its shape inference does not know all ops; quantizers take such models as they are.
            prepared = source
        shape = shape_of(onnx.load(source).graph.input[0])
        noise = np.random.default_rng(0).standard_normal([8, *shape], dtype=np.float32)
        samples = np.load(args.samples)[:, None] if args.samples else noise
        for form in args.forms.split(",") if args.forms else FORMS:
            target = os.path.join(args.folder, f"{base}.{form}.onnx")
            try:
                make(prepared, form, samples, target, folder)
                print(json.dumps({"made": target}), flush=True)
            except Exception as e:  # Whatever the quantizer says: the form is not to be had of this model.
                print(json.dumps({"left_out": target, "why": f"{type(e).__name__}: {e}".splitlines()[0][:200]}), flush=True)


if __name__ == "__main__":
    main()
