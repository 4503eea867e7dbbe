"""Fair timing: variants take turns in one process, and a median with its spread is reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from emo_kernels.cli.progress import Progress


class Timing(NamedTuple):
    """Milliseconds of one variant over all rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        """Summary of the seconds of each round."""
        ms = sorted(1e3 * s for s in seconds)
        last = len(ms) - 1
        return Timing(
            median=statistics.median(ms),
            p10=ms[round(0.1 * last)],
            p90=ms[round(0.9 * last)],
            rounds=len(ms),
        )


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, waiting for the GPU where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device,
    label: str,
    min_rounds: int = 7,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time the variants in turn, A B C A B C …, so that a busy moment of the host hits all alike.

    Args:
        variants: name -> call without arguments.
        seconds: about how long all rounds together may take.
        device: where the calls run.
        label: for the progress bar.
        min_rounds, max_rounds: limits on the number of rounds, which follows from a first one.

    Returns:
        name -> :class:`Timing`.
    """
    for call in variants.values():
        seconds_of(call, device)  # warm-up: packing, compilation, caches
    first = sum(seconds_of(call, device) for call in variants.values())
    rounds = min(max(min_rounds, int(seconds / first)), max_rounds)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with Progress(label, rounds, unit="round") as progress:
        for _ in range(rounds):
            for name, call in variants.items():
                taken[name].append(seconds_of(call, device))
            progress.advance()
    return {name: Timing.of(values) for name, values in taken.items()}
