"""What this machine can do, measured: large matrix products and streams through memory.

A share of these limits says how far a kernel is from what anyone gets here. The products are
``torch.mm`` on 1024 x 1024 matrices (8192 on a GPU), the streams 256 MB arrays, beyond any cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from emo_kernels.measure.timing import seconds_of

_SIDE = 1024
_STREAM = 64 * 2**20  # fp32 numbers


CPU = torch.device("cpu")


def matmul_gflops(
    dtype: torch.dtype, *, device: torch.device = CPU, tries: int = 8, side: int = _SIDE
) -> float:
    """GFLOP/s of ``torch.mm`` in a type, with torch's threads: the best of several runs."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2e-9 * side**3 / _best(lambda: torch.mm(a, b), tries, device)


def stream_gigabytes(
    *, device: torch.device = CPU, tries: int = 5, numbers: int = _STREAM
) -> dict[str, float]:
    """GB/s of a copy and of the triad a = b + 3 c, what is read and written counted once each."""
    a, b, c = (torch.ones(numbers, device=device) for _ in range(3))
    copy = _best(lambda: a.copy_(b), tries, device)
    triad = _best(lambda: torch.add(b, c, alpha=3.0, out=a), tries, device)
    return {"copy": 8e-9 * numbers / copy, "triad": 12e-9 * numbers / triad}


def machine_limits(device: torch.device = CPU) -> dict[str, Any]:
    """All of them, for the thread count that torch has."""
    side = _SIDE if device.type == "cpu" else 8 * _SIDE
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "threads": torch.get_num_threads(),
        "matmul_gflops": {
            name: matmul_gflops(dtype, device=device, side=side) for name, dtype in types.items()
        },
        "stream_gigabytes": stream_gigabytes(device=device),
    }


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The larger of each, of two measurements around a run: a limit is what was ever reached."""
    return {
        key: better(value, b[key]) if isinstance(value, dict) else max(value, b[key])
        for key, value in a.items()
    }


def _best(call: Callable[[], object], tries: int, device: torch.device) -> float:
    call()
    return min(seconds_of(call, device) for _ in range(tries))
