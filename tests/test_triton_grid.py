"""The interpreter's share of the default run leaves out only what is large."""

from __future__ import annotations

import grid
import pytest
import shapes
from grid import DTYPE_NAMES, INTERPRETED, Grid

from emo_kernels import backends

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton runs natively, or is not installed")

KERNELS = [name for name in shapes.VIEWS if backends.has("triton", name)] if INTERPRETED else []


@pytest.mark.parametrize("operator", KERNELS)
def test_every_affordable_row_and_every_dtype_is_in_the_default_run(operator: str) -> None:
    everything = Grid(None, ("fp32", "bf16", "fp16"), ("fp64",))
    light, heavy = grid.share_of(operator, everything)
    cases = [c for c in grid.combinations(operator, everything, {}) if c.values[0] == "triton"]
    default: dict[str, set[str]] = {}
    for case in cases:
        _, row, dtype = case.values
        if not case.marks:
            default.setdefault(row.name, set()).add(DTYPE_NAMES[dtype])
    rows = {case.values[1] for case in cases}
    affordable = {row for row in rows if grid.work(row) <= heavy and not row.slow}
    assert default.keys() == {row.name for row in affordable}
    assert len(default) > 20
    in_turn = {row.name for row in affordable if grid.work(row) > light}
    assert all(len(default[n]) == (1 if n in in_turn else 3) for n in default)
    assert set().union(*(default[n] for n in in_turn)) == {"fp32", "bf16", "fp16"}


def test_the_slow_run_leaves_out_nothing() -> None:
    for operator in KERNELS:
        for covered in (False, True):
            everything = Grid(None, ("fp32", "bf16", "fp16"), ("fp64",), covered)
            cases = [c.id for c in grid.combinations(operator, everything, {})]
            wanted = [
                f"triton-{row.name}-{dtype}"
                for row in shapes.VIEWS[operator]()
                for dtype in everything.dtypes
                if grid.refusal_of_row(operator, "triton", row, dtype) is None
            ]
            assert [c for c in cases if c.startswith("triton-")] == wanted
