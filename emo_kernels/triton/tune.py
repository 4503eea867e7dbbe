"""The search behind ``python -m emo_kernels tune``: which launches a model makes, and what is best.

A model's calls of this namespace's functions are recorded as shapes (:func:`record`), with the
launches that each makes. For every launch the parameters of its rule are then moved one at a time,
halved and doubled, as long as the call that makes it gets faster (:func:`search`). A candidate
counts only if the call still gives the results it gave with the rule's parameters, in memory that
was filled with NaN. Results go to disk after every launch, so a killed search loses one at most.
"""

from __future__ import annotations

import functools
import inspect
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels.triton import launch

Parameters = dict[str, int]
Measure = Callable[[Parameters], "float | None"]

SMALLEST_BLOCK, LARGEST_BLOCK, MOST_WARPS = 16, 2048, 16
FASTER = 0.99  # of the time so far: less is noise
# Against the results of the rule: other tiles sum in another order.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class TensorSpec(NamedTuple):
    """A tensor of a recorded call, without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def fill(self, generator: torch.Generator) -> Tensor:
        """A tensor of this kind with small random numbers."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if not self.dtype.is_floating_point:
            return made.zero_()
        if self.dtype == torch.float64:  # sums and counts, which variances come from
            return made.uniform_(1.0, 2.0, generator=generator)
        pointwise = len(self.shape) == 4 and self.shape[2:] == (1, 1)
        std = max(self.shape[1], 1) ** -0.5 if pointwise else 0.5
        return made.normal_(0.0, std, generator=generator)


@dataclass
class Call:
    """One call of a function of this namespace, and the launches it made, in order."""

    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    launches: list[str] = field(default_factory=list)
    inner: bool = False  # made by another recorded call
    count: int = 1

    @property
    def identity(self) -> str:
        """Equal for calls that do the same work."""
        return repr((self.function, self.args, sorted(self.options.items())))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh arguments: the same numbers at each call."""
        device = next((a.device for a in self.args if isinstance(a, TensorSpec)), "cpu")
        generator = torch.Generator(device).manual_seed(0)
        fill = functools.partial(_map_specs, lambda spec: spec.fill(generator))
        return tuple(map(fill, self.args)), {k: fill(v) for k, v in self.options.items()}


def _map_specs(change: Callable[[TensorSpec], Any], value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return change(value)
    if isinstance(value, list):
        return [_map_specs(change, item) for item in value]
    return value


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.stride(), value.dtype, str(value.device))
    if isinstance(value, list | tuple):
        return [_spec(item) for item in value]
    return value


# --------------------------------------------------------------------------------------- recording


def functions(namespace: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions of a namespace that do work: public, neither a limit nor a launch rule."""
    return {
        name: value
        for name, value in vars(namespace).items()
        if inspect.isfunction(value)
        and name[0] != "_"
        and not name.endswith(("_unsupported", "_rule"))
    }


@contextmanager
def record(namespace: ModuleType) -> Iterator[list[Call]]:
    """Collect every call of the namespace's functions, in order, with the launches it makes."""
    calls: list[Call] = []
    active: list[Call] = []

    def listen(kernel: str, sizes: dict[str, int], parameters: Parameters) -> Parameters:
        if active:
            active[-1].launches.append(launch.key(kernel, launch.architecture(), **sizes))
        return parameters

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            specs = tuple(map(_spec, args)), {k: _spec(v) for k, v in options.items()}
            active.append(Call(name, *specs, inner=bool(active)))
            calls.append(active[-1])
            try:
                return function(*args, **options)
            finally:
                active.pop()

        return call

    replacements = {f: wrapped(name, f) for name, f in functions(namespace).items()}
    with _replaced(namespace.__name__, replacements), launch.listening(listen):
        yield calls


@contextmanager
def _replaced(package: str, replacements: Mapping[Any, Any]) -> Iterator[None]:
    """Other functions in their place, wherever a module of the package names them."""
    changed: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in replacements:
                    changed.append((module, attribute, value))
                    setattr(module, attribute, replacements[value])
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def distinct(calls: list[Call]) -> list[Call]:
    """One call of each kind, with the number of times it was made."""
    found: dict[str, Call] = {}
    for call in calls:
        first = found.setdefault(call.identity, call)
        if first is not call:
            first.count += 1
    return list(found.values())


def launches(calls: list[Call]) -> dict[str, Call]:
    """Every launch by its key in the table, with the first call that makes it."""
    return {key: call for call in reversed(distinct(calls)) for key in reversed(call.launches)}


# --------------------------------------------------------------------------------------- searching


def neighbours(name: str, value: int) -> list[int]:
    """The values next to ``value`` that parameter ``name`` may take; none for one that is off."""
    if name == "num_stages":
        return [v for v in (value - 1, value + 1) if 1 <= v <= 6]
    if name == "num_warps":
        return [v for v in (value // 2, value * 2) if 1 <= v <= MOST_WARPS]
    if value == 0:
        return []
    least, most = (SMALLEST_BLOCK, LARGEST_BLOCK) if name.startswith("BLOCK") else (1, 64)
    return [v for v in (value // 2, value * 2) if least <= v <= most]


class Found(NamedTuple):
    """What a search ended with."""

    parameters: Parameters
    milliseconds: float | None  # None: not even the rule's parameters run
    rule_milliseconds: float | None
    tried: int


def search(start: Parameters, measure: Measure, limit: int = 60) -> Found:
    """Coordinate descent from ``start``: move a parameter while that is faster, then the next.

    Args:
        start: the rule's parameters.
        measure: milliseconds, or ``None`` for parameters that do not run or give wrong results.
        limit: most parameters to measure.
    """
    known: dict[tuple[int, ...], float | None] = {}

    def time_of(parameters: Parameters) -> float | None:
        values = tuple(parameters.values())
        if values not in known and len(known) < limit:
            known[values] = measure(parameters)
        return known.get(values)

    best, first = dict(start), time_of(start)
    if first is None:
        return Found(best, None, None, 1)
    least, moved = first, True
    while moved:
        moved = False
        for name in start:
            for value in neighbours(name, best[name]):
                while value in neighbours(name, best[name]):
                    candidate = best | {name: value}
                    time = time_of(candidate)
                    if time is None or time > FASTER * least:
                        break
                    step = value - best[name]
                    best, least, moved = candidate, time, True
                    value = _further(name, value, step)
    return Found(best, least, first, len(known))


def _further(name: str, value: int, step: int) -> int:
    """The next value in the direction of a step that paid."""
    if name == "num_stages":
        return value + step
    return value * 2 if step > 0 else value // 2


class DeadGpuError(ValueError):
    """A candidate left the GPU unusable for this process; the text says how to go on."""


class Trial:
    """Runs one call with other parameters for one of its launches.

    Args:
        function: of the namespace.
        call: its arguments.
        key: of the launch.
        timer: milliseconds of a function without arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        call: Call,
        key: str,
        timer: Callable[[Callable[[], object]], float],
    ) -> None:
        self.function, self.call, self.key, self.timer = function, call, key, timer
        self.args, self.options = call.arguments()
        self.start: Parameters = {}
        with launch.listening(self._note_rule):
            self.expected = self._results()

    def measure(self, parameters: Parameters) -> float | None:
        """Milliseconds of the call, or ``None``: it does not run so, or its results differ."""

        def choose(kernel: str, sizes: dict[str, int], usual: Parameters) -> Parameters:
            return parameters if self._is_ours(kernel, sizes) else usual

        with launch.listening(choose):
            try:
                if not _agree(self._results(), self.expected):
                    return None
                return self.timer(self._run)
            except Exception as error:  # the compiler refuses in many ways, by many classes
                if _fatal(error):
                    raise DeadGpuError(
                        f"tune: {self.key} with {parameters} made an error after which this "
                        f"process cannot use the GPU ({str(error).splitlines()[0]}); run the "
                        "command again to go on with the next launch"
                    ) from error
                return None

    def _is_ours(self, kernel: str, sizes: dict[str, int]) -> bool:
        return launch.key(kernel, launch.architecture(), **sizes) == self.key

    def _note_rule(self, kernel: str, sizes: dict[str, int], usual: Parameters) -> Parameters:
        if self._is_ours(kernel, sizes):
            self.start = dict(usual)
        return usual

    def _run(self) -> Any:
        return self.function(*self.args, **self.options)

    def _results(self) -> list[Tensor]:
        """What the call returns, and what it changes, from the same arguments every time."""
        self.args, self.options = self.call.arguments()
        with _memory_filled_with_nan():
            returned = self._run()
        found = [*_tensors(returned), *_tensors(list(self.args))]
        return [t.detach().clone() for t in found]


def milliseconds(
    run: Callable[[], object],
    *,
    device: str = "cuda",
    budget: float = 40.0,
    flush_bytes: int = 256 << 20,
) -> float:
    """Median milliseconds on the GPU of ``run``, in about ``budget`` of them; its inputs cold.

    As triton.testing.do_bench (events, the L2 cache overwritten before each call), but of a CUDA
    graph, because a launch costs Python more time than many of these kernels take.
    """
    for _ in range(2):  # compile
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 100):
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _fatal(error: Exception) -> bool:
    text = str(error)
    signs = ("illegal memory access", "misaligned address", "unspecified launch failure")
    return any(sign in text for sign in signs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


def _agree(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two results differ by rounding only."""
    return len(results) == len(expected) and all(
        r.shape == e.shape and r.dtype == e.dtype and _near(r, e)
        for r, e in zip(results, expected, strict=True)
    )


def _near(result: Tensor, expected: Tensor) -> bool:
    if not result.dtype.is_floating_point:
        return torch.equal(result, expected)
    if not torch.equal(result.isnan(), expected.isnan()):
        return False
    got, want = (t.nan_to_num(0.0, 0.0, 0.0).float() for t in (result, expected))
    return bool((got - want).norm() <= CLOSE[result.dtype] * want.norm())


@contextmanager
def _memory_filled_with_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN: what a candidate leaves unwritten is not the last one's result."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
