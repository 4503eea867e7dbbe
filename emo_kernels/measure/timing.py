"""Fair timing: engines take turns in one process, and a median with its spread is reported."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from emo_kernels.measure.progress import Progress

_TURN = 0.04  # seconds: a shorter call is repeated within a turn
_MOST = 25  # calls of a turn
_LONG = 0.25  # seconds: a call this long needs no uncounted one in front of it
METHOD = (
    "Engines take turns in one process, in an order that rotates, after each agreed with an fp64 "
    "oracle. A turn is a pause of 20 ms, a call that warms up and is not counted, and the median "
    f"of up to {_MOST} calls; the call that built the engine and the one that was judged came "
    "before. Inputs rotate through copies, so that none is found in the caches. Threads are kept "
    "on as many processors. A median's interval holds it in 95 % of such runs; a ratio is the "
    "median over rounds of one engine's time over the other's in the same round."
)
Clock = Callable[[], float]


class Timing(NamedTuple):
    """Milliseconds of one engine over all rounds; ``low`` to ``high`` holds the median, 95 %."""

    median: float
    p10: float
    p90: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        """Summary of the seconds of each round."""
        ms = sorted(1e3 * s for s in seconds)
        last = len(ms) - 1
        low, high = median_interval(ms)
        return Timing(
            median=statistics.median(ms),
            p10=ms[round(0.1 * last)],
            p90=ms[round(0.9 * last)],
            low=low,
            high=high,
            rounds=len(ms),
        )


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """The order statistics between which the true median lies, whatever the distribution.

    With fewer than six values no two of them are that sure: then the smallest and the largest.
    """
    ordered, n = sorted(values), len(values)
    outside, tail, probability = (1 - confidence) / 2, 0.0, 0.5**n
    cut = 0
    for k in range(n // 2):  # the chance that at most k values are below the median
        tail += probability
        if tail > outside:
            break
        cut = k
        probability *= (n - k) / (k + 1)
    return ordered[cut], ordered[n - 1 - cut]


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keep every thread of the process on ``cores`` of its processors, the last ones.

    Each a core of its own where there are as many. The first processor serves most interrupts.
    Nothing happens where the system cannot pin, or has no more processors than that.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) <= cores:
        yield
        return
    _keep_threads_on(set(_spread(sorted(allowed))[-cores:]))
    try:
        yield
    finally:
        _keep_threads_on(allowed)


def _spread(processors: list[int]) -> list[int]:
    """Second threads of a core first, so that the end of the list has one of each core."""
    seen: dict[str, int] = {}
    for processor in reversed(processors):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        seen.setdefault(siblings.read_text() if siblings.exists() else str(processor), processor)
    alone = sorted(seen.values())
    return [p for p in processors if p not in alone] + alone


def _keep_threads_on(processors: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended
            os.sched_setaffinity(int(thread), processors)


def seconds_of(
    call: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter
) -> float:
    """Wall time of one call, waiting for the GPU where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device | None = None,
    label: str = "timing",
    min_rounds: int = 5,
    max_rounds: int = 200,
    pause: float = 0.02,
    clock: Clock = time.perf_counter,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every engine in every round, so that a busy moment hits all alike.

    The order rotates, A B C, B C A, …, for what an engine leaves in the caches and in the clock
    frequency to reach each of the others. Each turn begins with a pause, for the threads of the
    engine before (which spin for a while) to go to sleep, and with a call that is not counted, for
    caches to fill; then short calls are repeated, and their median is the round's. Ctrl-C ends the
    last round: what is there is returned.

    Args:
        calls: name -> call without arguments, warmed up.
        seconds: about how long all rounds together may take.
        device: where the calls run.
        label: for the progress bar.
        min_rounds, max_rounds: limits on the number of rounds; past twice ``seconds``, three do.
        pause: seconds.
        clock: seconds that pass.
        on_failure: hears of an engine that raises, which then takes no more turns and is not in
            the result; without it the error is the caller's.
    """
    device = device or torch.device("cpu")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = clock(), 0
    with Progress(label, max_rounds, unit="round") as progress:
        while rounds < max_rounds:
            used = clock() - start
            if used >= seconds and (rounds >= min_rounds or (used >= 2 * seconds and rounds >= 3)):
                break
            turns = {}
            try:
                for name in _rotated(list(taken), rounds):
                    try:
                        turns[name] = _turn(calls[name], device, pause, clock)
                    except Exception as error:
                        if on_failure is None:
                            raise
                        on_failure(name, error)
                        del taken[name]
            except KeyboardInterrupt:
                if not rounds:
                    raise
                break
            for name, turn in turns.items():
                taken[name].append(turn)
            rounds += 1
            if rounds == 1:
                progress.expect(_rounds_within(seconds, clock() - start, min_rounds, max_rounds))
            progress.advance()
    return taken


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % max(len(names), 1)
    return names[start:] + names[:start]


def _rounds_within(seconds: float, first: float, fewest: int, most: int) -> int:
    return min(max(fewest, round(seconds / max(first, 1e-9))), most)


def _turn(call: Callable[[], object], device: torch.device, pause: float, clock: Clock) -> float:
    """Seconds of a call in this round."""
    time.sleep(pause)
    first = seconds_of(call, device, clock)
    if first >= _LONG:
        return first
    count = max(2, min(_MOST, int(_TURN / max(first, 1e-6))))
    return statistics.median(seconds_of(call, device, clock) for _ in range(count))
