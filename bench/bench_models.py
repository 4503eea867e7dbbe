"""Whole models, plain and accelerated, inference and a training step, each checked first.

    python -m pytest bench/bench_models.py --benchmark-autosave

For peers, gates and believable ratios see bench_cpu.py: here engines do not take turns.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.engines import OURS, build_engines
from emo_kernels.measure.oracle import judge

CASES = [
    Case(model, mode, batch=batch, threads=os.cpu_count() or 1)
    for model in ("emo_1m", "emo_5m")
    for mode, batch in (("infer", 1), ("infer", 8), ("train", 4))
]


@pytest.mark.benchmark(max_time=1.0, min_rounds=5)
@pytest.mark.parametrize("engine", [OURS, "eager channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_model(benchmark: Any, rates: Any, case: Case, engine: str) -> None:
    benchmark.group = case.name
    work = Work(case)
    engines = build_engines(work, [engine] if engine != OURS else [])
    assert engine in engines.run, engines.absent
    verdict = judge(work, engines)[engine]
    assert verdict["match"], verdict
    benchmark(engines.run[engine].call)
    error = verdict.get("gradient_error", verdict["error"])
    # a step moves more than this: what it must at the least, nobody says without its plan
    moved = 0 if case.trains else work.least_bytes
    rates(flops=round(1e9 * work.gflop), moved=moved, error=float(error))
