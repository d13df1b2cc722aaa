"""One runtime that qcc is compared with, in a process of its own: threads that spin and limits on instructions stay inside.

Started by run.py with a JSON object on the command line; loads the model, prints `ready VERSION`, then answers each line
`N` of standard input with the median milliseconds of N runs, until the input ends.
"""

import json
import statistics
import sys
import time

import numpy as np


def onnxruntime(path, feed, threads):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return ort.__version__, lambda: session.run(None, feed)


def openvino(path, feed, threads):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    # Float is to mean float32 for everybody; on some CPUs the default would be bfloat16.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return ov.__version__.split("-")[0], lambda: request.infer(feed)


def litert(path, feed, threads):
    from importlib.metadata import version

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    for tensor in interpreter.get_input_details():
        values = np.random.default_rng(1).standard_normal(tensor["shape"])
        if tensor["dtype"] != np.float32:
            values = np.clip(40 * values, -128, 127)
        interpreter.set_tensor(tensor["index"], values.astype(tensor["dtype"]))
    return version("ai-edge-litert"), interpreter.invoke


PEERS = {"ONNX Runtime": onnxruntime, "OpenVINO": openvino, "LiteRT": litert}


def milliseconds(run, count):
    # The others have had the caches since.
    run()
    run()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main():
    case = json.loads(sys.argv[1])
    noise = np.random.default_rng(1)
    feed = {name: noise.standard_normal(shape, dtype=np.float32) for name, shape in case["inputs"].items()}
    version, run = PEERS[case["peer"]](case["path"], feed, case["threads"])
    run()
    print("ready", version, flush=True)
    for line in sys.stdin:
        print(milliseconds(run, int(line)), flush=True)


if __name__ == "__main__":
    main()
