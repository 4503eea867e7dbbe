"""CUDA graphs on the CPU: a capture notes every operation with its memory, a replay repeats them.

As on a GPU, a replay reads and writes the tensors that were there at the capture, whatever the
model has become since; nothing of the model's Python runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emo_kernels import graphs


class RecordedGraph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.captured = False

    def replay(self) -> None:
        assert self.captured, "replay before capture"
        for function, args, kwargs, results in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        if "_local_scalar_dense" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph.steps.append((function, args, kwargs or {}, results))
        return results


class FakeStream:
    """In place of ``torch.cuda.Stream``: remembers what it waited for."""

    def __init__(self, device: Any = None) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, stream: FakeStream) -> None:
        self.waited.append(stream)


class Stand:
    """What the stand-ins saw: the captures, and the stream that is current."""

    def __init__(self) -> None:
        self.captures: list[RecordedGraph] = []
        self.pools: list[Any] = []
        self.stream = FakeStream()
        self.capturing = False

    @contextmanager
    def graph(
        self,
        cuda_graph: RecordedGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        assert isinstance(stream, FakeStream) and capture_error_mode in ("global", "thread_local")
        with _Recorder(cuda_graph):
            yield
        cuda_graph.captured = True
        self.captures.append(cuda_graph)
        self.pools.append(pool)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace what ``emo_kernels.graphs`` uses of ``torch.cuda``; models are on the CPU."""
        monkeypatch.setattr(graphs, "DEVICE", "cpu")
        for name, value in {
            "is_available": lambda: True,
            "CUDAGraph": RecordedGraph,
            "graph": self.graph,
            "graph_pool_handle": object,
            "Stream": FakeStream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device=None: self.stream,
            "device": lambda device: nullcontext(),
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
