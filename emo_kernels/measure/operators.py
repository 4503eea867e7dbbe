"""Where the time of a pass or a training step goes, torch operator by operator, each alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from emo_kernels.explain import format_table
from emo_kernels.measure.backward import BackwardWalk
from emo_kernels.measure.breakdown import REST, Loss, Part, floor_seconds

_OURS = "emo_kernels"


@dataclass
class Operator:
    """All calls of one torch operator in a forward pass, or a training step.

    Attributes:
        name: such as ``aten::convolution`` or ``emo_kernels::irmb``.
        backend: ours for our operators, else PyTorch.
        seconds: of all calls together, in each round.
        floors: of each call of the last round, seconds below which no program comes.
        flops, bytes: of all calls of a round; tensors in and out once, nothing for views.
    """

    name: str
    backend: str
    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)


class _Timer(TorchDispatchMode):
    """Times every operator that reaches the dispatcher, with whatever it calls inside.

    Args:
        parts: of the model, for the arithmetic of our operators: a block's, or the stem's.
        floor: seconds below which FLOPs and bytes let no program come.
        synchronize: waits for the device.
    """

    def __init__(
        self,
        parts: dict[str, Part],
        floor: Callable[[int, int], float],
        synchronize: Callable[[], None],
    ) -> None:
        super().__init__()
        self.parts, self.floor, self.synchronize = parts, floor, synchronize
        self.within: list[str] = []  # paths of the parts that the call is in
        self.operators: dict[tuple[str, str], Operator] = {}
        self.rounds = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # one that is a composition falls apart into its operators, timed each
            composed = func.decompose(*args, **(kwargs or {}))
        if composed is not NotImplemented:
            return composed
        self.synchronize()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.synchronize()
        seconds = time.perf_counter() - start
        name = func._schema.name
        ours = name.startswith(_OURS)
        backend = str(args[-1]) if ours and isinstance(args[-1], str) else "PyTorch"
        if ours:
            path = self.within[-1] if self.within else REST
            flops = _flops(name.split("::")[1], self.parts[path])
        else:
            flops = _torch_flops(func, args, kwargs or {}, out)
        self._add(name, backend, seconds, flops, _bytes(func, args, kwargs, out))
        return out

    def _add(self, name: str, backend: str, seconds: float, flops: int, moved: int) -> None:
        one = self.operators.setdefault((name, backend), Operator(name, backend))
        if len(one.seconds) < self.rounds:  # the first call of this round
            one.seconds += [0.0] * (self.rounds - len(one.seconds))
            one.flops, one.bytes, one.floors = 0, 0, []
        one.seconds[-1] += seconds
        one.flops += flops
        one.bytes += moved
        one.floors.append(self.floor(flops, moved))


def _flops(name: str, part: Part) -> int:
    """Of one of our operators in a part of the model: those of the layers that it computes.

    A backward pass costs two forwards of products, of which the stem's image needs one. A squeeze
    is a mean: the products with it are torch's.
    """
    if name.startswith("squeeze"):
        return 0
    passes = 1 if "backward" not in name or name.startswith("conv_norm_act") else 2
    if name.startswith(part.operator):
        return passes * part.flops
    fused = ("expand", "depthwise_conv2d") if name.startswith("expand_depthwise") else ()
    names = fused or [layer for layer in part.layers if name.startswith(layer)]
    return passes * sum(part.layers.get(layer, 0) for layer in names)


def _torch_flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Of a torch operator, as torch counts them.

    Not the gradients of a convolution: torch 2.13 counts those of a depthwise one as if it were
    dense.
    """
    if func._schema.name == "aten::convolution_backward":
        grad, _, weight, *_, wanted = args
        return sum(wanted[:2]) * 2 * grad.numel() * weight[0].numel()
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def measure(
    model: nn.Module,
    x: Tensor,
    parts: dict[str, Part],
    rounds: int,
    limits: dict[str, Any],
    loss: Loss | None = None,
) -> list[Operator]:
    """The operators of ``rounds`` forward passes, or with a loss training steps, longest first."""

    def floor(flops: int, moved: int) -> float:
        return floor_seconds(flops, moved, limits, "fp32")

    def synchronize() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    timer = _Timer(parts, floor, synchronize)
    walk = BackwardWalk(REST, timer.within.append, lambda path: timer.within.pop())
    paths = [path for path in parts if path != REST]
    with _paths(model, timer), walk.through(model, paths), timer:
        for _ in range(rounds):
            timer.rounds += 1
            out = model(x)
            if loss is not None:
                model.zero_grad(set_to_none=True)
                walk.backward(loss(out))
    return sorted(timer.operators.values(), key=lambda one: -one.median)


@contextmanager
def _paths(model: nn.Module, timer: _Timer) -> Iterator[None]:
    """Tell the timer which part of the model a call is in."""
    modules = dict(model.named_modules())
    handles = []

    def leave(*_: Any) -> None:
        timer.within.pop()

    for path in timer.parts:
        if path in modules:
            enter = _appender(timer.within, path)
            handles.append(modules[path].register_forward_pre_hook(enter))
            handles.append(modules[path].register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _appender(paths: list[str], path: str) -> Callable[..., None]:
    return lambda module, args: paths.append(path)


def _bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of the tensors that go in and out; a view moves nothing."""
    returns = func._schema.returns
    if returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write:
        return 0
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    distinct = {(t.data_ptr(), t.numel()): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def table(operators: list[Operator], most: int) -> str:
    """One line for each of the ``most`` longest, the others together, and the sum."""
    shown, others = operators[:most], operators[most:]
    total = sum(one.median for one in operators)
    lines = [_line(one.name, one.backend, [one], total) for one in shown]
    if others:
        lines.append(_line(f"({len(others)} others)", "", others, total))
    lines.append(_line("sum", "", operators, total))
    headers = ("operator", "backend", "calls", "ms", "%", "GFLOP/s", "GB/s", "% of floor")
    return format_table(headers, lines)


def _line(name: str, backend: str, some: list[Operator], total: float) -> tuple[str, ...]:
    seconds = sum(one.median for one in some)
    floor = sum(sum(one.floors) for one in some)
    return (
        name,
        backend,
        str(sum(len(one.floors) for one in some)),
        f"{1e3 * seconds:.3f}",
        f"{100 * seconds / total:.1f}",
        f"{1e-9 * sum(one.flops for one in some) / seconds:.1f}",
        f"{1e-9 * sum(one.bytes for one in some) / seconds:.2f}",
        f"{100 * floor / seconds:.0f}",
    )
