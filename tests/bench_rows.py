"""Rows of a benchmark's result file that were never measured, and a clock of one's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from emo_kernels.measure import row, timing
from emo_kernels.measure.case import Case
from emo_kernels.measure.engine import OURS

TINY = Case(
    "emo_1m",
    batch=2,
    size=(64, 64),
    settings=(
        ("depths", (1, 1, 2, 1)),
        ("dims", (16, 24, 40, 42)),
        ("dim_heads", (8, 8, 20, 21)),
        ("stem_dim", 8),
    ),
)


def made_up(case: Case, ours: float = 10.0, peer: float = 20.0, **more: Any) -> row.Row:
    """A row as ``measure`` gives it, with times that were never measured."""
    times = {OURS: ours, "eager": 3 * peer, "openvino": peer}
    entries = {
        name: {
            **timing.Timing.of([t / 1e3] * 6)._asdict(),
            "samples": [t] * 6,
            "probes": [2.0] * 6,
            "match": True,
            "error": 1e-6,
        }
        for name, t in times.items()
    }
    found = {
        "name": case.name,
        "case": asdict(case),
        "status": "ok",
        "engines": entries,
        "absent": {"onnxruntime": "not installed"},
        "gflop": 2.0,
        "parameters": 5_000_000,
        "bytes": 4_000_000,
        "limits": {
            "matmul_gflops": {"fp32": 400.0, "bf16": 800.0},
            "stream_gigabytes": {"copy": 20.0, "triad": 25.0},
        },
        "noise": {"load": 1.0, "other_cores": 0.0, "stolen": 0.0},
        "commit": "1234567",
        "wall_seconds": 1.0,
    }
    return found | row._summary(found, case) | more


class Clock:
    """Seconds that pass only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Any:
        """A call that takes these times in turn, the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call
