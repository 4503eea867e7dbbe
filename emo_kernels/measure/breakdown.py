"""Where the time of a pass or a training step goes: stem, each block, all that is around them."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from emo_kernels.explain import explain, format_table
from emo_kernels.measure.backward import BackwardWalk

Loss = Callable[[Tensor], Tensor]  # of what a model gives
REST, TAIL = "(rest)", "norm_pool_linear"  # last norm, pooling, head
# Layer of a block -> the operator it is, or the longest part of.
_LAYERS = {
    "norm": "expand",
    "v": "expand",
    "qk": "window_attention",
    "conv_local": "depthwise_conv2d",
    "se": "squeeze",
    "proj": "shrink",
}


@dataclass
class Part:
    """The stem, one block, or the rest.

    Attributes:
        path: in the model.
        flops, bytes: of one call; the least it must move: input, output, weights.
        backend: that runs it.
        operator: what it is.
        layers: FLOPs of the operators that it is composed of.
        seconds: of each round's forward pass.
        backward: of each round's backward pass, in training.
    """

    path: str
    flops: int
    bytes: int
    backend: str
    operator: str = "irmb"
    layers: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds, forward and backward."""
        return sum(statistics.median(some) for some in (self.seconds, self.backward) if some)

    @property
    def useful(self) -> int:
        """FLOPs of all that is timed: a backward pass costs two forwards of products."""
        return self.flops * (3 if self.backward else 1)

    def floor(self, limits: dict[str, Any], dtype: str) -> float:
        """Seconds below which these limits let no program come."""
        return floor_seconds(self.useful, self.bytes, limits, dtype)


def floor_seconds(flops: int, moved: int, limits: dict[str, Any], dtype: str) -> float:
    """Seconds that so much arithmetic, or so many bytes, take at the least under these limits."""
    compute = flops / limits["matmul_gflops"][dtype]
    return 1e-9 * max(compute, moved / limits["stream_gigabytes"]["triad"])


def count(
    model: nn.Module, plain: nn.Module, x: Tensor, *, trains: bool = False
) -> dict[str, Part]:
    """The parts of ``model`` by path, nothing timed yet; counted on its ``plain`` twin."""
    rows = explain(model, x).rows
    backends = {row.path: row.training if trains else row.inference for row in rows}
    parts = {
        row.path: Part(row.path, 0, 0, backends[row.path], row.operator)
        for row in rows
        if row.operator != TAIL
    }
    tail = next((backends[row.path] for row in rows if row.operator == TAIL), "PyTorch")
    twin = copy.deepcopy(plain).eval()  # statistics stay as they are
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(x)
    counts, name = counter.get_flop_counts(), type(plain).__name__
    for path, part in parts.items():
        part.flops = sum(counts.get(f"{name}.{path}", {}).values())
        for layer, operator in _LAYERS.items():
            flops = sum(counts.get(f"{name}.{path}.{layer}", {}).values())
            part.layers[operator] = part.layers.get(operator, 0) + flops
        # the products with the softmax are in no layer
        part.layers["window_attention"] += part.flops - sum(part.layers.values())
    rest = counter.get_total_flops() - sum(part.flops for part in parts.values())
    return parts | {REST: Part(REST, rest, x.element_size() * x.numel(), tail, TAIL)}


def measure(
    model: nn.Module, x: Tensor, parts: dict[str, Part], rounds: int, loss: Loss | None = None
) -> None:
    """Add the seconds of every part in ``rounds`` forward passes; with a loss, training steps."""
    within = [part for path, part in parts.items() if path != REST]
    synchronize = torch.cuda.synchronize if x.is_cuda else _nothing
    walk = _timed_backward(parts, synchronize)
    with _timed(model, parts, synchronize), walk.through(model, [part.path for part in within]):
        for _ in range(rounds):
            before = sum(sum(part.seconds) for part in within)
            start = time.perf_counter()
            out = model(x)
            result = None if loss is None else loss(out)
            synchronize()
            whole = time.perf_counter() - start
            parts[REST].seconds.append(whole - (sum(sum(p.seconds) for p in within) - before))
            if result is not None:
                model.zero_grad(set_to_none=True)
                walk.backward(result)


def _nothing() -> None:
    """In place of waiting for a device."""


def _timed_backward(parts: dict[str, Part], synchronize: Callable[[], None]) -> BackwardWalk:
    """Fills ``backward`` of every part, and names its range in a trace: ``... backward``."""
    started: list[Any] = []

    def enter(path: str) -> None:
        synchronize()
        name = f"{parts[path].operator} {path} backward"
        started[:] = [record_function(name), time.perf_counter()]
        started[0].__enter__()

    def leave(path: str) -> None:
        synchronize()
        parts[path].backward.append(time.perf_counter() - started[1])
        started[0].__exit__(None, None, None)

    return BackwardWalk(REST, enter, leave)


@contextmanager
def _timed(
    model: nn.Module, parts: dict[str, Part], synchronize: Callable[[], None]
) -> Iterator[None]:
    """Hooks around every part but the rest that fill it and name its range in a trace.

    A range is named after the operator, then its place: ``irmb stage3.1``. The torch operators
    inside have their own names; in a plain block, its layers those of the operators they are.
    """

    trains = model.training

    def hooks(part: Part) -> tuple[Callable[..., None], Callable[..., None]]:
        started: list[Any] = []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            synchronize()
            started[:] = [record_function(f"{part.operator} {part.path}"), time.perf_counter()]
            started[0].__enter__()

        def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            synchronize()
            part.seconds.append(time.perf_counter() - started[1])
            started[0].__exit__(None, None, None)
            weights = sum(p.numel() for p in module.parameters())
            given, made = args[0].numel(), out.numel()
            # backward reads x, the gradient and the weights, writes their gradients
            numbers = 3 * (given + weights) + 2 * made if trains else given + made + weights
            part.bytes = args[0].element_size() * numbers

        return enter, leave

    handles = []
    for path, part in parts.items():
        if path == REST:
            continue
        enter, leave = hooks(part)
        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        if part.operator == "irmb" and part.backend == "reference":  # hooks undo a fused block
            handles += _named_layers(module, path)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named_layers(block: nn.Module, path: str) -> list[RemovableHandle]:
    """Ranges of the layers that make up an operator of ours; a fused block never calls them."""
    handles = []
    for name, operator in _LAYERS.items():
        layer = getattr(block, name, None)
        if not isinstance(layer, nn.Module) or isinstance(layer, nn.Identity):
            continue
        handles += _named(layer, f"{operator} {path}.{name}")
    return handles


def _named(layer: nn.Module, name: str) -> list[RemovableHandle]:
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def table(measured: dict[str, Part], limits: dict[str, Any], dtype: str) -> str:
    """One line for each part, and their sum."""
    parts = [part for part in measured.values() if part.seconds]
    total = sum(part.median for part in parts)
    trained = any(part.backward for part in parts)
    rows = [
        (
            part.path,
            part.backend,
            *(_halves(part) if trained else ()),
            f"{1e3 * part.median:.3f}",
            f"{100 * part.median / total:.1f}",
            f"{1e-9 * part.useful / part.median:.1f}",
            f"{1e-9 * part.bytes / part.median:.2f}",
            f"{100 * part.floor(limits, dtype) / part.median:.0f}",
        )
        for part in parts
    ]
    floor = sum(part.floor(limits, dtype) for part in parts)
    flops, moved = (sum(getattr(part, name) for part in parts) for name in ("useful", "bytes"))
    figures = (1e3 * total, 100.0, 1e-9 * flops / total, 1e-9 * moved / total, 100 * floor / total)
    formats = (".3f", ".1f", ".1f", ".2f", ".0f")
    split = ("", "") if trained else ()
    last = ("sum", "", *split, *(format(n, f) for n, f in zip(figures, formats, strict=True)))
    ways = ("forward", "backward") if trained else ()
    headers = ("block", "backend", *ways, "ms", "%", "GFLOP/s", "GB/s", "% of floor")
    return format_table(headers, [*rows, last])


def _halves(part: Part) -> tuple[str, str]:
    """Milliseconds of the forward and of the backward pass."""
    forward, backward = (1e3 * statistics.median(some) for some in (part.seconds, part.backward))
    return f"{forward:.3f}", f"{backward:.3f}"
