"""What this machine can do, measured: large matrix products and streams through memory.

A share of these limits says how far a kernel is from what anyone gets here. The products are
``torch.mm`` on 1024 x 1024 matrices, the streams 256 MB arrays, far beyond any cache.
"""

from __future__ import annotations

import time
from typing import Any

import torch

_SIDE = 1024
_STREAM = 64 * 2**20  # fp32 numbers


def matmul_gflops(dtype: torch.dtype, *, tries: int = 8, side: int = _SIDE) -> float:
    """GFLOP/s of ``torch.mm`` in a type, with torch's threads: the best of several runs."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2e-9 * side**3 / _best(lambda: torch.mm(a, b), tries)


def stream_gigabytes(*, tries: int = 5, numbers: int = _STREAM) -> dict[str, float]:
    """GB/s of a copy and of the triad a = b + 3 c, what is read and written counted once each."""
    a, b, c = (torch.ones(numbers) for _ in range(3))
    copy = _best(lambda: a.copy_(b), tries)
    triad = _best(lambda: torch.add(b, c, alpha=3.0, out=a), tries)
    return {"copy": 8e-9 * numbers / copy, "triad": 12e-9 * numbers / triad}


def machine_limits() -> dict[str, Any]:
    """All of them, for the thread count that torch has."""
    return {
        "threads": torch.get_num_threads(),
        "matmul_gflops": {
            "fp32": matmul_gflops(torch.float32),
            "bf16": matmul_gflops(torch.bfloat16),
        },
        "stream_gigabytes": stream_gigabytes(),
    }


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The larger of each, of two measurements around a run: a limit is what was ever reached."""
    return {
        key: better(value, b[key]) if isinstance(value, dict) else max(value, b[key])
        for key, value in a.items()
    }


def _best(call: Any, tries: int) -> float:
    call()
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
