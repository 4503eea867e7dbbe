"""Training steps that convolve by the CUDA kernels: here by their walk, the rest on the cpu's.

On a GPU Triton has the rest; ``test_irmb_training.py`` runs those where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import shapes
import torch
from numerics import check_operator
from shapes import Row
from test_irmb_training import STATISTICS, kernels, plain, statistics_of, training_case
from torch import Tensor

from emo_kernels import backends, cuda
from emo_kernels.ops.irmb_step import ALONE, Plan, Step
from emo_kernels.spec import BatchNormMode, IRMBWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = shapes.rows(
    "5m_stage1_down_small", "no_skip", "stride_2_13x9", "stride_2_8x15_k5", "batch_5"
)


def counting(name: str, run: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return run(*args, **options)

    return counted


@contextmanager
def walking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend ``cuda`` on this machine's tensors, completed by ``cpu``."""
    row = backends._TABLE["cuda"]._replace(
        devices=("cpu",), unmet_need=lambda: None, unproven=lambda: "walks", completed_by="cpu"
    )
    monkeypatch.setitem(backends._TABLE, "cuda", row)
    caches = (backends._unavailable, backends._unproven, backends._candidates)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(name="calls")
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of its kernels."""
    calls: list[str] = []
    for name in ("expand_depthwise_statistics", "expand_depthwise", "depthwise_conv2d_backward"):
        monkeypatch.setattr(cuda, name, counting(name, getattr(cuda, name), calls))
    with walking(monkeypatch):
        yield calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["batch", "known"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_step(calls: list[str], row: Row, which: str, dtype: str) -> None:
    batch = statistics_of(row, which)
    case = training_case(row)
    kind = DTYPES[dtype]
    check_operator(kernels("cuda", batch), plain(batch), case, kind, name="irmb_training on cuda")
    one = "expand_depthwise" + ("_statistics" if STATISTICS[which][1] else "")
    assert set(calls) == {"depthwise_conv2d_backward"} | (set() if row.skip else {one})


def step_of(row: Row) -> tuple[Step, Tensor]:
    weights = IRMBWeights._make(w if w is None else w.float() for w in shapes.weights(row))
    plan = Plan(row.spec(), BatchNormMode(row.norm == "batch"), BatchNormMode(True), "cuda")
    return Step(plan, weights, None), shapes.feature_map(row).float()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("5m_stage1_down_small", False),
        ("5m_stage3_down_small", False),
        ("dilated", True),
        ("v2_5m_stage1_small", True),  # the skip adds e to what the convolution gives
        ("kernel_7", True),
    ],
)
def test_when_the_expanded_map_is_written(calls: list[str], name: str, written: bool) -> None:
    step, x = step_of(shapes.rows(name)[0])
    maps = step.forward(x, ALONE)[2]
    assert (maps.e is not None) == written
    assert bool(calls) == (not written)


def test_what_completes_a_block(calls: list[str]) -> None:
    """The other backend's limits are this one's, its kernels are found, its operators stay its."""
    row = shapes.rows("grouped_v")[0]
    weights = IRMBWeights._make(w if w is None else w.float() for w in shapes.weights(row))
    x = shapes.feature_map(row).float()
    reason = backends.why_not("cuda", "irmb_training", "cpu", x, weights, row.spec())
    assert reason is not None
    assert reason.startswith("cuda takes cpu for the rest of a block: the cpu kernels have no grou")
    shrink = backends.function("cuda", "shrink_statistics")
    assert shrink is backends.function("cpu", "shrink_statistics")
    assert backends.provides("cuda", "shrink_statistics")
    assert backends.why_not("cuda", "shrink", "cpu", x, x) == "cuda has no shrink kernel"
    with pytest.raises(NotImplementedError, match="cpu has no window_shopping kernel"):
        backends.function("cuda", "window_shopping")
    assert not calls
