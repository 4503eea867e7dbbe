"""Peers whose libraries are not here: what they are asked is held against their documentation."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from bench_rows import TINY
from torch import Tensor

from emo_kernels.measure import engines
from emo_kernels.measure.case import Work
from emo_kernels.measure.gpu_peers import attend_with_natten


def window(place: int, length: int, kernel: int, stride: int, dilation: int) -> list[int]:
    """The keys of one query along one axis, as NATTEN documents it.

    Every ``dilation``-th pixel makes a group; in it, ``stride`` queries share the window of their
    leader, the middle one, which is moved until it lies inside.
    """
    residue, inside = place % dilation, place // dilation
    count = (length - residue + dilation - 1) // dilation
    leader = min(inside // stride * stride + stride // 2, count - 1)
    start = min(max(leader - kernel // 2, 0), count - kernel)
    return [residue + dilation * (start + i) for i in range(kernel)]


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    scale: float = 1.0,
) -> Tensor:
    """Neighbourhood attention by its definition: (N, H, W, heads, D) each."""
    out = torch.empty_like(v)
    height, width = q.shape[1:3]
    for y in range(height):
        rows = window(y, height, kernel_size[0], stride[0], dilation[0])
        for x in range(width):
            columns = window(x, width, kernel_size[1], stride[1], dilation[1])
            keys, values = (t[:, rows][:, :, columns].flatten(1, 2) for t in (k, v))
            weights = torch.einsum("nhd,nkhd->nhk", q[:, y, x], keys) * scale
            out[:, y, x] = torch.einsum("nhk,nkhd->nhd", weights.softmax(-1), values)
    return out


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("natten")
    monkeypatch.setattr(module, "na2d", na2d, raising=False)
    monkeypatch.setitem(sys.modules, "natten", module)


@pytest.mark.usefixtures("natten")
@pytest.mark.parametrize("mode", ["grid", "block", "both"])
@pytest.mark.parametrize(("window_size", "size"), [(3, (96, 96)), (4, (128, 64)), (0, (96, 64))])
def test_natten_computes_the_same(mode: str, window_size: int, size: tuple[int, int]) -> None:
    """Odd and even windows, one and several, with padding and without, the whole map."""
    settings = (("window_sizes", window_size), ("window_mode", mode))
    work = Work(replace(TINY, batch=1, size=size, settings=(*TINY.settings, *settings)))
    with torch.no_grad():
        want = work.copy(torch.float64)(work.x.double())
        got = attend_with_natten(work.copy(torch.float64))(work.x.double())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_natten_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "natten", None)
    found = engines.build_engines(Work(TINY), ["natten", "cuda graphs"]).absent
    assert found["natten"].startswith("not installed")
    assert found["cuda graphs"] == "a GPU's"


@pytest.mark.usefixtures("natten")
def test_natten_needs_attention() -> None:
    found = engines.build_engines(Work(replace(TINY, block="stage1.0")), ["natten"])
    assert found.absent["natten"] == "NotImplementedError: natten: the model has no attention"
