"""Every operator at the layers of EMO-5M, plain and on the cpu kernels, each checked first.

    python -m pytest bench/bench_operators.py --benchmark-autosave
    python -m pytest bench/bench_operators.py --benchmark-compare --benchmark-compare-fail=median:5%

fp32, channels_last, forward and backward. Bytes are those of the tensors that go in and out; a
backward pass is counted as two forwards of arithmetic.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import shapes
import torch
from cases import CASES, STEMS, function
from numerics import check_operator, grad_output_like
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from emo_kernels import backends, ops, reference

ROWS = {row.name: row for rows in (shapes.TABLE, shapes.STEMS, shapes.HEADS) for row in rows}
LAYERS = [f"5m_stage{stage}" for stage in (1, 2, 3, 4)]
MAPS = ("x", "y", "local", "residual")


def _layers(stem: str) -> list[str]:
    """Every stage that has the operator; of the ends of a network, their first shape."""
    names = [row.name for row in shapes.VIEWS[stem]()]
    if "5m_stage4" not in names:
        return names[:1]
    return [n for n in LAYERS if stem != "window_attention" or ROWS[n].head_dim]


def _cases() -> list[Any]:
    """(operator, layer, backend, way): what a layer has and the cpu computes with kernels."""
    found = []
    for stem in STEMS:
        ways = ["forward"]
        if backends.has("cpu", f"{stem}_backward"):
            ways.append("backward")
        for layer in _layers(stem):
            found += [(stem, layer, b, way) for b in ("reference", "cpu") for way in ways]
    return found


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize(("stem", "layer", "backend", "way"), _cases())
def test_operator(
    benchmark: Any, rates: Any, stem: str, layer: str, backend: str, way: str
) -> None:
    reason = backends.unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = f"{stem} {layer} {way}"
    case, backward = CASES[stem](ROWS[layer]), way == "backward"
    kernel = function(stem, getattr(ops, stem), backend=backend)
    plain = function(stem, getattr(reference, stem))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: eager's error, the yardstick, is that of its sums
    compared = check_operator(
        kernel,
        plain,
        case,
        torch.float32,
        oracle=getattr(oracle, stem),
        gradients=backward,
        name=f"{stem} on {backend}",
    )
    torch.set_num_threads(threads)
    tensors = {name: _placed(name, tensor) for name, tensor in case.tensors.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = plain(**tensors, **case.options)
    if backward:
        leaves = [t.requires_grad_() for n, t in tensors.items() if n in case.differentiable()]
        got = kernel(**tensors, **case.options)
        grad = grad_output_like(got).to(got.dtype).contiguous(memory_format=torch.channels_last)
        benchmark(torch.autograd.grad, got, leaves, grad, retain_graph=True)
    else:
        with torch.no_grad():
            benchmark(kernel, **tensors, **case.options)
    moved = sum(4 * t.numel() for t in (*tensors.values(), out) if t is not None)
    rates(
        flops=counter.get_total_flops() * (2 if backward else 1),
        moved=moved * (2 if backward else 1),
        error=max(one.largest for one in compared),
    )


def _placed(name: str, tensor: Tensor | None) -> Any:
    """In fp32; maps in the layout the kernels take."""
    if tensor is None:
        return None
    tensor = tensor.float()
    return tensor.contiguous(memory_format=torch.channels_last) if name in MAPS else tensor
