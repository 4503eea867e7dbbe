"""When the triton backend works, why not, and that its interpreter runs only what asks for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from grid import INTERPRETED

import emo_kernels as ek
from emo_kernels import backends


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What backends.py remembers is forgotten, before the test and after it."""
    caches = (backends._unavailable, backends._has, backends._candidates)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def interpret(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if on else "0")


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_without_triton_it_says_how_to_get_it(no_memory: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    no_memory.setattr(importlib.util, "find_spec", lambda n: None if n == "triton" else find(n))
    for on in (False, True):
        interpret(no_memory, on)
        backends._unavailable.cache_clear()
        assert backends.available_backends()["triton"] == (
            "triton is not installed (pip install triton)"
        )
    with pytest.raises(NotImplementedError, match="'triton' is not usable here: triton is not in"):
        ek.accelerate(ek.nn.iRMB(8, 8, attn_s=False), backend="triton")


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        (None, "torch sees no CUDA device"),
        ((7, 0), "its kernels need a GPU of sm_80 or later, this one is sm_70"),
        ((7, 5), "its kernels need a GPU of sm_80 or later, this one is sm_75"),
        ((8, 0), None),
        ((9, 0), None),
        ((10, 0), None),
    ],
)
def test_it_needs_a_gpu_of_sm_80(
    no_memory: pytest.MonkeyPatch, capability: tuple[int, int] | None, reason: str | None
) -> None:
    interpret(no_memory, False)
    gpu(no_memory, capability)
    assert backends.available_backends()["triton"] == reason
    assert backends.only_by_name("triton") is None
    on_gpu = backends.candidates("expand", "cuda")
    assert ("triton" in on_gpu) == (reason is None and backends.has("triton", "expand"))
    assert "triton" not in backends.candidates("expand", "cpu")
    on_cpu = backends.why_not("triton", "expand", "cpu")
    assert on_cpu == (reason or "runs on cuda tensors, got cpu")


@needs_triton
def test_the_interpreter_runs_what_asks_for_it_and_nothing_else(
    no_memory: pytest.MonkeyPatch,
) -> None:
    interpret(no_memory, True)
    gpu(no_memory, None)
    assert backends.available_backends()["triton"] is None
    assert backends.only_by_name("cpu") is None
    reason = backends.only_by_name("triton")
    assert reason is not None and "asked for by name" in reason
    for device in ("cpu", "cuda"):
        for operator in ek.ops.__all__:
            assert "triton" not in backends.candidates(operator, device)
    assert backends.why_not("triton", "expand", "cuda") == "runs on cpu tensors, got cuda"
    report = ek.explain(ek.accelerate(ek.nn.iRMB(16, 16, attn_s=False).eval()))
    assert report.rows[0].inference != "triton"
    assert "asked for by name" in report.rows[0].reasons["triton"]


@pytest.mark.skipif(not INTERPRETED, reason="Triton runs natively, or is not installed")
def test_a_call_by_name_reaches_the_interpreter() -> None:
    """And without a name the same call goes elsewhere."""
    x, weight = torch.randn(1, 8, 6, 5), torch.randn(8, 1, 3, 3)
    for backend in (None, "triton"):
        chosen = backends.resolve(
            "depthwise_conv2d", backend, x, weight, stride=1, padding=1, dilation=1
        )
        assert (chosen == "triton") == (backend == "triton")
    with ek.use_backend("triton"):
        got = ek.ops.depthwise_conv2d(x, weight, stride=1, padding=1, dilation=1)
    want = torch.nn.functional.conv2d(x, weight, padding=1, groups=8)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_namespace_is_found_where_the_backend_looks() -> None:
    """A folder without __init__.py would shadow the installed triton for scripts beside it."""
    package = Path(backends.__file__).parent / "triton"
    assert (package / "__init__.py").is_file()
