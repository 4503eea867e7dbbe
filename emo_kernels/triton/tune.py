"""The search behind ``python -m emo_kernels tune``: which launches a model makes, and what is best.

A model's calls are recorded (``record.py``). For every launch they make the parameters of its rule
are then moved one at a time, halved and doubled, as long as the call gets faster (:func:`search`).
A candidate counts only if the call still gives the results it gave with the rule's parameters, in
memory that was filled with NaN. Results go to disk after every launch, so a killed search loses one
at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels.triton import launch
from emo_kernels.triton.record import Call

Parameters = dict[str, int]
Measure = Callable[[Parameters], "float | None"]

SMALLEST_BLOCK, LARGEST_BLOCK, MOST_WARPS, MOST_OTHERS = 16, 2048, 16, 4096
FASTER = 0.99  # of the time so far: less is noise
# Against the results of the rule: other tiles sum in another order.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def neighbours(name: str, value: int) -> list[int]:
    """The values next to ``value`` that parameter ``name`` may take; none for one that is off."""
    if name == "num_stages":
        return [v for v in (value - 1, value + 1) if 1 <= v <= 6]
    if name == "num_warps":
        return [v for v in (value // 2, value * 2) if 1 <= v <= MOST_WARPS]
    if value == 0:
        return []
    blocks = name.startswith("BLOCK")
    least, most = (SMALLEST_BLOCK, LARGEST_BLOCK) if blocks else (1, MOST_OTHERS)
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
            return dict(parameters) if self._is_ours(kernel, sizes) else usual

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
