"""Peers that are no PyTorch: ONNX Runtime and OpenVINO, on the model exported once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import torch
from torch import Tensor

from emo_kernels.measure.case import Work
from emo_kernels.measure.engine import Engine, rotation


def onnxruntime_engine(work: Work) -> Engine:
    """Its CPU provider, on as many threads as the case has."""
    import onnxruntime

    if work.x.dtype != torch.float32:
        raise NotImplementedError("compared in fp32: its CPU provider has no bf16 convolution")
    inputs = rotation(work.x.contiguous())

    def build() -> Callable[[], Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = work.case.threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            work.onnx, options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda: torch.from_numpy(session.run(None, {name: next(inputs).numpy()})[0])

    return Engine(build(), again=build)


def openvino_engine(work: Work) -> Engine:
    """Its CPU plugin, for one call at a time, in the precision of the case."""
    os.environ.setdefault("OPENVINO_TELEMETRY_ENABLE", "0")
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16"}.get(work.case.dtype, "bf16"),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": work.case.threads,
    }
    inputs = rotation(work.x.float().contiguous())

    def build() -> Callable[[], Tensor]:
        model = openvino.Core().read_model(io.BytesIO(work.onnx))
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()

        def run() -> Tensor:
            arrays = {0: next(inputs).numpy()}
            result = request.infer(arrays, share_inputs=True, share_outputs=True)
            return torch.from_numpy(result[0])

        return run

    return Engine(build(), again=build)
