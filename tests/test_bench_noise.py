"""Whether a ratio can be believed: a machine made up, quiet and with neighbours that are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from bench_rows import TINY, made_up

from emo_kernels.measure import noise, ratio, results
from emo_kernels.measure.engine import OURS
from emo_kernels.measure.ratio import Ratio
from emo_kernels.measure.timing import Turns, take_turns

TIMES = {OURS: 0.010, "near": 0.013, "far": 0.030}  # seconds
TRUTH = TIMES["near"] / TIMES[OURS]
CALM = {"load": 0.0, "other_cores": 0.0, "stolen": 0.0}
Slow = Callable[[float, str], float]


class Machine:
    """A clock, and calls that take their time, two per cent of chance, and what neighbours take."""

    def __init__(self, seed: int, slow: Slow = lambda now, who: 1.0, chance: float = 0.02) -> None:
        self.now, self.slow, self.chance = 0.0, slow, chance
        self.random = random.Random(seed)

    def call(self, who: str, seconds: float) -> float:
        took = seconds * self.random.lognormvariate(0.0, self.chance) * self.slow(self.now, who)
        self.now += took
        return took

    def measure(self, seconds: float = 10.0) -> dict[str, Turns]:
        return take_turns(
            {name: (lambda n=name, t=t: self.call(n, t)) for name, t in TIMES.items()},
            seconds=seconds,
            pause=0.0,
            clock=lambda: self.now,
            probe=lambda: self.call("probe", 0.004),
            goes_on=lambda taken: ratio.contenders(taken, OURS, PEERS),
        )


PEERS = ("near", "far")


def bursts(seed: int, share: float, factors: dict[str, float]) -> Slow:
    """A neighbour who comes for half a second to two, and is there for that share of the time."""
    draw, spans, at = random.Random(seed), list[tuple[float, float]](), 0.0
    while at < 100.0:
        long = draw.uniform(0.5, 2.0)
        at += draw.expovariate(share / (1 - share) / 1.25)
        spans.append((at, at + long))
        at += long

    def slow(now: float, who: str) -> float:
        there = any(start <= now < end for start, end in spans)
        return factors.get(who, 1.8) if there else 1.0

    return slow


def judged(taken: dict[str, Turns]) -> tuple[Ratio, list[str]]:
    best = ratio.ratios(taken, OURS, PEERS)["near"]
    return best, noise.complaints(CALM, {}, best, taken[OURS].probes)


def naive(taken: dict[str, Turns]) -> float:
    """The median over all rounds."""
    ours, peer = (taken[name].seconds for name in (OURS, "near"))
    each = sorted(p / o for o, p in zip(ours, peer, strict=True))
    return each[len(each) // 2]


def differences(values: Sequence[float]) -> float:
    return max(values) / min(values) - 1


# ------------------------------------------------------------------------- machines made up


def test_runs_on_a_quiet_machine_agree_and_are_not_marked() -> None:
    runs = [judged(Machine(seed).measure()) for seed in range(40)]
    assert differences([best.median for best, _ in runs]) < 0.04  # of any two among forty
    assert sum(bool(why) for _, why in runs) <= 2, [why for _, why in runs if why]


def test_a_quiet_run_ends_when_the_ratio_is_known() -> None:
    machine = Machine(0, chance=0.005)
    taken = machine.measure(seconds=1000.0)
    assert len(taken[OURS].seconds) == len(taken["near"].seconds) == 8
    assert judged(taken)[0].width <= ratio.NARROW
    taken = Machine(0, chance=0.05).measure(seconds=1000.0)
    assert len(taken["far"].seconds) == 8  # never the best: it takes no more time
    assert len(taken[OURS].seconds) == len(taken["near"].seconds) >= 17


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_neighbour_in_bursts_moves_no_ratio_or_the_row_is_marked(share: float) -> None:
    """One who slows ours more than the peer: the median of all rounds follows him."""
    factors = {OURS: 2.0, "near": 1.3, "far": 1.3, "probe": 1.6}
    followed, marked = 0, 0
    for seed in range(40):
        taken = Machine(seed, bursts(seed, share, factors)).measure()
        best, why = judged(taken)
        usual = made_up(TINY, name="usual", probe=1e3 * ratio.usual(Machine(seed).measure(1.0)))
        here = made_up(TINY, probe=1e3 * ratio.usual(taken), noisy=why)
        noise.mark_slow([usual, here])
        marked += bool(here["noisy"])
        followed += abs(naive(taken) / TRUTH - 1) > 0.05
        assert abs(best.median / TRUTH - 1) < 0.05 or here["noisy"], (seed, best)
    assert followed >= 3 or share == 0.1
    assert marked < 10 or share > 0.1


def test_a_neighbour_who_stays_half_the_run_is_marked() -> None:
    best, why = judged(Machine(1, lambda now, who: 1.5 if now > 5.0 else 1.0, chance=0.1).measure())
    assert best.median == pytest.approx(TRUTH, rel=0.08)
    assert any("was slowed down in" in one for one in why)


def test_a_machine_that_becomes_slower_is_marked() -> None:
    """By less than what makes a round not count."""
    _, why = judged(Machine(1, lambda now, who: 1.15 if now > 5.0 else 1.0, chance=0.1).measure())
    assert any("in the second half" in one for one in why)


def test_a_ratio_that_changes_is_marked() -> None:
    """Where the reference workload sees nothing: memory of ours alone, say."""
    _, why = judged(
        Machine(
            1, lambda now, who: 1.2 if who == OURS and now > 5.0 else 1.0, chance=0.05
        ).measure()
    )
    assert any("the ratio was 0.8" in one for one in why)


def test_a_ratio_that_is_not_known_is_marked() -> None:
    best, why = judged(Machine(1, chance=0.3).measure(seconds=2.0))
    assert best.width > noise.WIDTH
    assert any("known no better than" in one for one in why)


@pytest.mark.slow
def test_an_interval_holds_the_truth_although_the_end_is_chosen() -> None:
    """To stop when it is narrow may cost coverage: not below nine in ten."""
    runs = 300
    hits = 0
    for seed in range(runs):
        best, _ = judged(Machine(1000 + seed, chance=0.03).measure(seconds=20.0))
        low, high = best.interval
        hits += low <= TRUTH <= high
    assert hits / runs > 0.9


# --------------------------------------------------------------------------------- by hand


def test_only_the_reference_workload_chooses_rounds() -> None:
    ours = Turns([1.0, 5.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.3, 1.0, 1.0, 1.0])
    peer = Turns([2.0, 2.0, 9.0, 9.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.3, 1.2, 1.0])
    found = ratio.ratio(ours, peer, limit=1.25)
    assert found.each == [2.0, 0.4, 2.0, 2.0]  # ours' slow second round stays
    assert (found.rounds, found.calm) == (6, 4)
    assert ratio.ratio(ours, peer, limit=0.5).each == [2.0, 0.4, 9.0, 9.0, 2.0, 2.0]
    assert ratio.calm_seconds(peer, 1.25) == [2.0, 2.0, 9.0, 2.0, 2.0]
    assert ratio.usual({"a": ours, "b": peer}) == 1.0


def test_a_peer_that_left_early_is_compared_over_its_rounds() -> None:
    ours, peer = Turns([1.0, 1.0, 4.0], [1.0] * 3), Turns([2.0, 3.0], [1.0] * 2)
    assert ratio.ratio(ours, peer, 1.25).each == [2.0, 3.0]
    assert list(ratio.ratios({OURS: ours, "a": peer}, OURS, ["a"])) == ["a"]


def test_others_on_the_processors_are_complained_of() -> None:
    assert noise.complaints(CALM, {OURS: 1.1}) == []
    busy: dict[str, Any] = {**CALM, "other_cores": 0.5, "stolen": 0.1}
    assert len(noise.complaints(busy, {OURS: 1.5})) == 3
    assert noise.complaints({**CALM, "other_cores": None, "stolen": None}, {}) == []


def test_a_row_that_was_slow_throughout_is_marked_by_the_others() -> None:
    kept = results.Results(None)
    kept.put(made_up(TINY, name="first", probe=3.0))
    assert kept.rows[0]["noisy"] == []
    kept.put(made_up(TINY, name="second", probe=2.0))
    assert "1.50 times as long as in the fastest row" in kept.rows[0]["noisy"][0]
    kept.put(made_up(TINY, name="third", probe=2.2))
    assert kept.rows[2]["noisy"] == []
    kept.put(made_up(TINY, name="first", probe=2.1))  # measured again
    assert all(row["noisy"] == [] for row in kept.rows)
