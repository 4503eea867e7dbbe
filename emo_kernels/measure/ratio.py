"""Ours against the best peer: which rounds count, the ratio, when it is known well enough.

A round counts for two engines where the reference workload beside both turns took no more than
:data:`CALM` times its usual time. Nothing else chooses among rounds: what an engine's own calls
took never does, so that no choice favours one. Where fewer than three rounds are calm, all count.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from typing import NamedTuple

from emo_kernels.measure.timing import Turns, median_interval

CALM = 1.25  # of the usual time of the reference workload
NARROW = 1.02  # upper over lower end of the interval: known to 1 %
_BEHIND = 1.2  # a peer whose interval begins so far above the best one's end is not the best
_LOOKS = (8, 12, 17, 24, 34, 48, 68, 96, 136)  # rounds: a look at each would stop at lucky ones
_FEWEST = 3


class Ratio(NamedTuple):
    """A peer's time over ours; ``low`` to ``high`` holds it with 95 %.

    Attributes:
        each: in every round that counts.
        rounds: there were, calm or not.
        calm: of them.
    """

    each: list[float]
    rounds: int
    calm: int

    @property
    def median(self) -> float:
        """The ratio."""
        return statistics.median(self.each)

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return median_interval(self.each)

    @property
    def width(self) -> float:
        """The upper over the lower end."""
        low, high = self.interval
        return high / low

    @property
    def drift(self) -> float:
        """The second half's median over the first's, where their intervals exclude each other.

        1 where they do not, or where six rounds are not in each.
        """
        middle = len(self.each) // 2
        halves = self.each[:middle], self.each[middle:]
        if middle < 6:
            return 1.0
        (low, high), (low_2, high_2) = map(median_interval, halves)
        apart = low > high_2 or low_2 > high
        return statistics.median(halves[1]) / statistics.median(halves[0]) if apart else 1.0


def usual(engines: Mapping[str, Turns]) -> float:
    """Seconds of the reference workload in the calmer half of the run: their lower quartile."""
    probes = sorted(p for turns in engines.values() for p in turns.probes)
    return probes[len(probes) // 4] if probes else 0.0


def calm(turns: Turns, limit: float) -> list[bool]:
    """For each round whether the reference workload beside this engine's turn kept the limit."""
    if not turns.probes:
        return [True] * len(turns.seconds)
    return [probe <= limit for probe in turns.probes]


def calm_seconds(turns: Turns, limit: float) -> list[float]:
    """The engine's seconds in its calm rounds; all where those are too few."""
    found = [s for s, good in zip(turns.seconds, calm(turns, limit), strict=True) if good]
    return found if len(found) >= min(_FEWEST, len(turns.seconds)) else list(turns.seconds)


def ratio(ours: Turns, peer: Turns, limit: float) -> Ratio:
    """Of the rounds both took part in."""
    rounds = list(zip(ours.seconds, peer.seconds, strict=False))
    good = [a and b for a, b in zip(calm(ours, limit), calm(peer, limit), strict=False)]
    each = [p / o for (o, p), counts in zip(rounds, good, strict=True) if counts]
    count = len(each)
    if count < min(_FEWEST, len(rounds)):
        each = [p / o for o, p in rounds]
    return Ratio(each, len(rounds), count)


def ratios(engines: Mapping[str, Turns], ours: str, peers: Collection[str]) -> dict[str, Ratio]:
    """Of each peer, the fastest first."""
    limit = CALM * usual(engines)
    found = {name: ratio(engines[ours], engines[name], limit) for name in peers}
    return dict(sorted(found.items(), key=lambda item: item[1].median))


def contenders(
    engines: Mapping[str, Turns], ours: str, peers: Collection[str], narrow: float = NARROW
) -> list[str]:
    """Who takes part in the next round: ours, and peers that may be the best; none when settled.

    All do where ours is not among them: then there is no ratio.
    """
    if ours not in engines:
        return list(engines)
    rounds = len(engines[ours].seconds)
    playing = [name for name, turns in engines.items() if len(turns.seconds) == rounds]
    here = [name for name in peers if name in playing]
    if rounds not in _LOOKS or not here:
        return playing
    found = ratios(engines, ours, here)
    best = next(iter(found.values()))
    enough = len(best.each) >= _LOOKS[0]
    if enough and best.width <= narrow:
        return []
    high = best.interval[1]
    near = [n for n, one in found.items() if one.interval[0] <= _BEHIND * high]
    return [ours, *near]
