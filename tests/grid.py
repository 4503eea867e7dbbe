"""Which (backend, row, dtype) combinations a test runs over; ``conftest.py`` turns them into cases.

A test method decorated with ``@over(...)`` and asking for ``backend``, ``row`` and ``dtype`` gets
one case for each combination that the backend says it supports, with ids such as
``cpu-5m_stage3-fp32``. What a backend refuses is tested by ``test_refuses_what_it_cannot_run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import pytest
import shapes
import torch
from cases import CASES, positional
from numerics import Case
from shapes import Row

from emo_kernels import backends
from emo_kernels.spec import IRMBWeights

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Grid:
    """Rows (None: all that differ for the operator) and dtypes of a test, by backend."""

    rows: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    reference_dtypes: tuple[str, ...]


def over(
    *rows: str, dtypes: Iterable[str] = tuple(DTYPES), reference: Iterable[str] = ("fp64",)
) -> Callable[[_Test], _Test]:
    """Run a test over ``rows`` (names, or lists of the class; none: all) in ``dtypes``.

    Rows from a list of the class whose name ends in ``_slow`` run with the slow tests.
    The reference runs in the dtypes ``reference`` only: in any other it is the very yardstick.
    """

    def mark(test: _Test) -> _Test:
        test.grid = Grid(rows or None, tuple(dtypes), tuple(reference))  # type: ignore[attr-defined]
        return test

    return mark


def reference_is_slow(test: _Test) -> _Test:
    """Run a test that costs a process on the kernels, and on the reference with the slow tests."""
    test.reference_is_slow = True  # type: ignore[attr-defined]
    return test


def device_of(backend: str) -> str:
    """Where the tensors of a backend live."""
    return "cuda" if backend in ("triton", "cuda") else "cpu"


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
        for row, slow in rows:
            for dtype in dtypes:
                if refusal_of_row(operator, backend, row, dtype) is None:
                    marks = [pytest.mark.slow] if slow else []
                    label = f"{backend}-{row.name}-{dtype}"
                    yield pytest.param(backend, row, DTYPES[dtype], id=label, marks=marks)
