"""The peers of a benchmark: the same module, weights and input in every engine, taking turns.

An engine is a function without arguments that returns the result as a tensor. One that is not
installed or fails to build is absent, with its reason; it is never left out in silence.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import emo_kernels as ek

OURS = "emo_kernels"
Engine = Callable[[], Tensor]


@dataclass
class Engines:
    """What takes part in one comparison, and why what does not does not."""

    run: dict[str, Engine] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def build_engines(module: nn.Module, x: Tensor, threads: int, *, backend: str = "cpu") -> Engines:
    """Every engine for one module in eval mode and one (N, C, H, W) input, at a thread count."""
    module = copy.deepcopy(module).eval()
    dense = x.contiguous()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    engines = Engines()
    builders: dict[str, Callable[[], Engine]] = {
        OURS: lambda: _ours(module, nhwc, backend),
        "eager": lambda: _torch_engine(copy.deepcopy(module), dense),
        "eager channels_last": lambda: _torch_engine(_channels_last(module), nhwc),
        "compile frozen": lambda: _compiled(_channels_last(module), nhwc),
        "onnxruntime": lambda: _onnxruntime(module, dense, threads),
        "openvino f32": lambda: _openvino(module, dense, threads),
    }
    torch.set_num_threads(threads)
    for name, build in builders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = build()
                engine()
            engines.run[name] = engine
        except ImportError as error:
            engines.absent[name] = f"not installed: {error}"
        except Exception as error:  # a peer that fails is reported, not fatal
            engines.absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if OURS in engines.absent:
        raise RuntimeError(f"{OURS}: {engines.absent[OURS]}")
    return engines


def _channels_last(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to(memory_format=torch.channels_last)


def _torch_engine(module: Callable[[Tensor], Tensor], x: Tensor) -> Engine:
    def run() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return run


def _ours(module: nn.Module, x: Tensor, backend: str) -> Engine:
    return _torch_engine(ek.accelerate(copy.deepcopy(module), backend=backend, strict=True), x)


def _compiled(module: nn.Module, x: Tensor) -> Engine:
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=False)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    return run


def _onnx_bytes(module: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    silenced, sys.stdout = sys.stdout, io.StringIO()  # the exporter prints its progress
    logging.disable(logging.WARNING)  # and that torchvision is not installed
    try:
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    finally:
        sys.stdout = silenced
        logging.disable(logging.NOTSET)
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


def _onnxruntime(module: nn.Module, x: Tensor, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        _onnx_bytes(module, x), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(module: nn.Module, x: Tensor, threads: int) -> Engine:
    os.environ.setdefault("OPENVINO_TELEMETRY_ENABLE", "0")
    import openvino

    model = openvino.Core().read_model(io.BytesIO(_onnx_bytes(module, x)))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    array = x.numpy()

    def run() -> Tensor:
        result = request.infer({0: array}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return run


def largest_difference(engines: Engines, want: Tensor) -> dict[str, float]:
    """Of every engine's result from an fp64 oracle, relative to the largest value."""
    scale = float(want.abs().max())
    return {
        name: float((run().double() - want).abs().max()) / scale
        for name, run in engines.run.items()
    }


@dataclass
class Timing:
    """Milliseconds of one engine over all rounds."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        return sorted(self.samples)[len(self.samples) // 10]


def take_turns(
    engines: Engines, threads: int, *, seconds: float, pause: float = 0.02
) -> dict[str, Timing]:
    """Time the engines round by round, a few calls each, the first of a turn not counted.

    The pause lets the threads of the engine before (which spin for a while) go to sleep.
    """
    timings: dict[str, Timing] = {name: Timing([]) for name in engines.run}
    torch.set_num_threads(threads)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(timings[OURS].samples) < 10:
        for name, run in engines.run.items():
            time.sleep(pause)
            started = time.perf_counter()
            run()
            first = time.perf_counter() - started
            for _ in range(max(2, min(25, int(0.03 / max(first, 1e-6))))):
                started = time.perf_counter()
                run()
                timings[name].samples.append((time.perf_counter() - started) * 1e3)
    return timings


def matmul_limit(threads: int) -> float:
    """GFLOP/s of torch.mm on large fp32 matrices: the best of several runs."""
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9
