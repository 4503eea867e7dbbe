"""Which (backend, row, dtype) combinations a test runs over; ``conftest.py`` turns them into cases.

A test method decorated with ``@over(...)`` and asking for ``backend``, ``row`` and ``dtype`` gets
one case for each combination that the backend says it supports, with ids such as
``cpu-5m_stage3-fp32``. What a backend refuses is tested by ``test_refuses_what_it_cannot_run``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import pytest
import shapes
import torch
from cases import CASES, positional
from numerics import Case
from shapes import Row
from torch import Tensor

from emo_kernels import backends
from emo_kernels.spec import IRMBWeights

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Triton runs in its interpreter, on the CPU (see interpreter.py).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and bool(importlib.util.find_spec("triton"))
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Grid:
    """Rows (None: all that differ for the operator) and dtypes of a test, by backend.

    ``covered``: whether another test makes the same checks and more.
    """

    rows: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    reference_dtypes: tuple[str, ...]
    covered: bool = False


def over(
    *rows: str,
    dtypes: Iterable[str] = tuple(DTYPES),
    reference: Iterable[str] = ("fp64",),
    covered: bool = False,
) -> Callable[[_Test], _Test]:
    """Run a test over ``rows`` (names, or lists of the class; none: all) in ``dtypes``.

    Rows from a list of the class whose name ends in ``_slow`` run with the slow tests.
    The reference runs in the dtypes ``reference`` only: in any other it is the very yardstick.
    Triton's interpreter takes large rows in one dtype by default, in turn; in none if ``covered``.
    """

    def mark(test: _Test) -> _Test:
        test.grid = Grid(rows or None, tuple(dtypes), tuple(reference), covered)
        return test

    return mark


def slow_with(*names: str) -> Callable[[_Test], _Test]:
    """Run a test that costs a process with these backends among the slow ones."""

    def mark(test: _Test) -> _Test:
        test.slow_with = names
        return test

    return mark


def device_of(backend: str) -> str:
    """Where the tensors of a backend live."""
    on_gpu = backend == "cuda" or (backend == "triton" and not INTERPRETED)
    return "cuda" if on_gpu else "cpu"


def slow_motion(backend: str) -> bool:
    """Whether the backend runs in an interpreter here, some 5 ms a program."""
    return backend == "triton" and INTERPRETED


class Share(NamedTuple):
    """What the default run has the interpreter do, in multiplications of a row's 1x1 convolutions:

    up to ``light`` in every dtype, up to ``heavy`` in one of them, in turn; the others are slow.
    """

    light: int
    heavy: int


ITS_OWN = Share(100_000, 6_000_000)  # the rows that differ for the operator
NAMED = Share(30_000, 300_000)  # rows that a test names, to repeat them in many ways
WHOLE_BLOCKS = Share(0, 150_000)  # five operators each, which have their own tests


def share_of(operator: str, grid: Grid) -> Share:
    """What is affordable of one test: 5 ms a program, and numpy's own time."""
    if operator == "irmb":
        return WHOLE_BLOCKS
    return ITS_OWN if grid.rows is None else NAMED


def work(row: Row) -> int:
    """Multiplications of the row's 1x1 convolutions."""
    return row.n * row.h * row.w * row.m * (row.c + row.o)


_WALKED = 50_000_000  # multiplications that take a walk of CUDA kernels some 2 s in fp32


def walk_marks(row: Row, dtype: str, times: int = 1) -> list[pytest.MarkDecorator]:
    """Of a row that CUDA kernels are walked over on a CPU: as matrices, 16 bits take a quarter.

    Args:
        times: as long as a row's plain walk this one takes.
    """
    affordable = _WALKED if dtype == "fp32" else 4 * _WALKED
    too_long = times * work(row) > affordable
    return [pytest.mark.slow] if too_long and not torch.cuda.is_available() else []


def placed(backend: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors where the backend wants them."""
    device = device_of(backend)
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def on_device_of(backend: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``call`` for tensors on any device; the result is where the first of them was."""
    device = device_of(backend)
    if device == "cpu":
        return call

    def moved(**arguments: Any) -> Tensor:
        home = next(a.device for a in arguments.values() if isinstance(a, Tensor))
        there = {n: a.to(device) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        return call(**there).to(home)

    return moved


def implementing(operator: str) -> list[str]:
    """The backends that are usable here and have the operator."""
    usable = [name for name in backends.NAMES if backends.unavailable(name) is None]
    return [name for name in reversed(usable) if backends.has(name, operator)]


def refusal(operator: str, backend: str, case: Case, dtype: torch.dtype) -> str | None:
    """Why the backend would not run the case in that dtype, or None if it would."""
    ordered, options = positional(operator, case)
    tensors: list[Any] = [None if t is None else t.to(dtype) for t in ordered]
    if operator == "irmb":
        tensors, options = [tensors[0], IRMBWeights(*tensors[1:]), options["spec"]], {}
    return backends.why_not(backend, operator, device_of(backend), *tensors, **options)


@cache
def refusal_of_row(operator: str, backend: str, row: Row, dtype: str) -> str | None:
    """:func:`refusal` of a row, judged by shapes alone."""
    return refusal(operator, backend, CASES[operator](row, data="empty"), DTYPES[dtype])


def combinations(operator: str, grid: Grid, named: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """The cases of one test, as pytest parameters; ``named`` has the lists of rows it may name."""
    rows = [(row, row.slow) for row in shapes.VIEWS[operator]()]
    if grid.rows is not None:
        listed = [
            (n, part.endswith("_slow")) for part in grid.rows for n in named.get(part, (part,))
        ]
        rows = [(shapes.rows(name)[0], slow) for name, slow in listed]
    for backend in implementing(operator):
        dtypes = grid.dtypes if backend != "reference" else grid.reference_dtypes
        for place, (row, slow) in enumerate(rows):
            taken = [d for d in dtypes if refusal_of_row(operator, backend, row, d) is None]
            for dtype in taken:
                marked = slow
                if slow_motion(backend):
                    light, heavy = share_of(operator, grid)
                    in_turn = dtype == taken[place % len(taken)] and not grid.covered
                    marked |= work(row) > (heavy if in_turn else light)
                marks = [pytest.mark.slow] if marked else []
                label = f"{backend}-{row.name}-{dtype}"
                yield pytest.param(backend, row, DTYPES[dtype], id=label, marks=marks)
