"""Fair timing: engines take turns in one process, with a reference workload between the turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from emo_kernels.measure.progress import Progress

_TURN = 0.04  # seconds: a shorter call is repeated within a turn
_MOST = 25  # calls of a turn
_LONG = 0.25  # seconds: a call this long needs no uncounted one in front of it
METHOD = (
    "Engines take turns in one process, after each agreed with an fp64 oracle, in an order in "
    "which each follows each other equally often. A turn is a pause of 20 ms, a call that "
    f"warms up and is not counted, and the median of up to {_MOST} calls; the call that built "
    "the engine and the one that was judged came before. Between turns a small product and a "
    "copy are timed, the reference workload: a turn beside one that took over 1.25 times its "
    "usual time does not count, whatever the engine did in it. Inputs rotate through copies, "
    "so that none is found in the caches. Threads are kept on as many processors. A ratio is "
    "the median over rounds of one engine's time over the other's in the same round, its "
    "interval holds it in 95 % of such runs. Peers that are far behind stop early, and all do "
    "when the ratio to the best is known to 1 %. Noisy is a row whose machine was busy, slow "
    "or changing, or whose ratio is known to no better than 3 %."
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


class Turns(NamedTuple):
    """One engine's turns, a value for each round.

    Attributes:
        seconds: of a call.
        probes: seconds of the reference workload, the slower of the two around the turn; empty
            without one.
    """

    seconds: list[float]
    probes: list[float]


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
    probe: Callable[[], float] | None = None,
    goes_on: Callable[[dict[str, Turns]], Collection[str]] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Turns]:
    """Seconds of every engine in every round, so that a busy moment hits all alike.

    Each turn begins with a pause, for the threads of the engine before (which spin for a while) to
    go to sleep, and with a call that is not counted, for caches to fill; then short calls are
    repeated, and their median is the round's. Ctrl-C ends the last round: what is there is
    returned.

    Args:
        calls: name -> call without arguments, warmed up.
        seconds: about how long all rounds together may take.
        device: where the calls run.
        label: for the progress bar.
        min_rounds, max_rounds: limits on the number of rounds; past twice ``seconds``, three do.
        pause: seconds.
        clock: seconds that pass.
        probe: a reference workload that tells its seconds, run between turns.
        goes_on: which engines take part in the next round, asked after each; none ends it all.
        on_failure: hears of an engine that raises, which then takes no more turns and is not in
            the result; without it the error is the caller's.
    """
    device = device or torch.device("cpu")
    taken = {name: Turns([], []) for name in calls}
    playing, start, rounds = list(calls), clock(), 0
    with Progress(label, max_rounds, unit="round") as progress:
        while rounds < max_rounds and playing:
            used = clock() - start
            if used >= seconds and (rounds >= min_rounds or (used >= 2 * seconds and rounds >= 3)):
                break
            try:
                order = balanced_order(playing, rounds)
                found, failed = _round(order, calls, device, pause, clock, probe, on_failure)
            except KeyboardInterrupt:
                if not rounds:
                    raise
                break
            for name in failed:
                del taken[name]
            for name, (turn, beside) in found.items():
                taken[name].seconds.append(turn)
                taken[name].probes.extend(beside)
            rounds += 1
            left = set(taken) if goes_on is None else set(goes_on(taken))
            playing = [name for name in playing if name in left & set(taken)]
            if rounds == 1:
                progress.expect(_rounds_within(seconds, clock() - start, min_rounds, max_rounds))
            progress.advance()
    return taken


def _round(
    order: list[str],
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    pause: float,
    clock: Clock,
    probe: Callable[[], float] | None,
    on_failure: Callable[[str, Exception], None] | None,
) -> tuple[dict[str, tuple[float, list[float]]], list[str]]:
    """A turn of each: seconds, and the slower probe of the two around it; and who failed."""
    found: dict[str, tuple[float, list[float]]] = {}
    failed = []
    before = probe() if probe else 0.0
    for name in order:
        try:
            turn = _turn(calls[name], device, pause, clock)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            failed.append(name)
            continue
        time.sleep(pause / 2 if probe else 0.0)  # the engine's own threads are not its neighbours
        after = probe() if probe else 0.0
        found[name] = turn, ([max(before, after)] if probe else [])
        before = after
    return found, failed


def balanced_order(names: list[str], by: int) -> list[str]:
    """Names in the order of round ``by``: over some rounds each follows each other equally often.

    What an engine leaves in the caches, in the clock frequency and in threads that still spin
    then reaches all the others alike (Williams' design: 0, n - 1, 1, n - 2, ... shifted by one
    each round; for an odd number also backwards).
    """
    n = len(names)
    zigzag = [i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]
    order = [names[(place + by) % n] for place in zigzag]
    return order[::-1] if n % 2 and by // n % 2 else order


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
