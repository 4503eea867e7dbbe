"""Stand-ins for the interface of a GPU, so that a dry run executes the campaign's own lines.

Only what the campaign uses, with PyTorch's own parameter names: a call that PyTorch would refuse
fails here too. Captured graphs run nothing when replayed; memory is always 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: _Event) -> float:
        assert self.timed and end_event.timed, "elapsed_time needs enable_timing=True"
        return 1e3 * (end_event.at - self.at)


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        assert isinstance(stream, _Stream)


class _Graph:
    captured = False

    def replay(self) -> None:
        assert self.captured, "replay before capture"


@contextmanager
def _stream(stream: _Stream) -> Iterator[None]:
    assert isinstance(stream, _Stream)
    yield


@contextmanager
def _graph(
    cuda_graph: _Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    yield
    cuda_graph.captured = True


def interpret_triton() -> None:
    """Run Triton's kernels in its interpreter, with the tests' repair of its bf16."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import interpreter

    interpreter.switch_on()
    if importlib.util.find_spec("triton") is not None:
        interpreter.install()


@contextmanager
def no_gpu_needed() -> Iterator[None]:
    """Replace what the campaign uses of ``torch.cuda``."""
    stream = _Stream()
    replacements: dict[str, Any] = {
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
        "graph": _graph,
        "stream": _stream,
        "current_stream": lambda device=None: stream,
        "device": lambda device: nullcontext(),
        "graph_pool_handle": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    with ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # The models' own graphs: on the CPU, whatever torch.cuda says of GPUs.
        stack.enter_context(mock.patch("emo_kernels.graphs.DEVICE", "cpu"))
        accelerate = importlib.import_module("emo_kernels.accelerate")
        stack.enter_context(mock.patch.object(accelerate, "check_capturable"))
        yield
