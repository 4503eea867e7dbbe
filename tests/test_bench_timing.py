"""Turns, intervals, pinned threads, noise and limits: fake clocks and results by hand."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter

import pytest
import torch
from bench_rows import Clock

from emo_kernels.measure import noise, pinning, timing
from emo_kernels.measure.limits import better, matmul_gflops, stream_gigabytes
from emo_kernels.measure.probe import Probe


def test_median_interval_by_hand() -> None:
    """Binomial(n, 1/2): 6 values are sure to 96.9 %; of 20 the 6th and the 15th hold 95.9 %."""
    assert timing.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert timing.median_interval([1.0] * 1) == (1.0, 1.0)
    assert timing.median_interval([float(i) for i in range(6)]) == (0.0, 5.0)
    assert timing.median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)
    assert timing.median_interval([float(i) for i in range(1, 101)]) == (40.0, 61.0)


def test_turns_count_no_first_call_of_short_ones() -> None:
    clock = Clock()
    calls = {"short": clock.takes(0.1, 0.01, 0.02, 0.03, 0.02), "long": clock.takes(1.0)}
    taken = timing.take_turns(calls, seconds=2.5, pause=0.0, min_rounds=1, clock=clock)
    assert taken["long"].seconds == pytest.approx([1.0, 1.0, 1.0])
    # 0.1 is not counted, then 0.01 and 0.02; 0.03 is not, then 0.02 twice
    assert taken["short"].seconds == pytest.approx([0.015, 0.02, 0.02])


def test_turns_end_in_time_and_have_their_rounds() -> None:
    clock = Clock()
    taken = timing.take_turns({"a": clock.takes(1.0)}, seconds=0.1, pause=0.0, clock=clock)
    assert len(taken["a"].seconds) == 3  # past twice the time three rounds are enough
    clock = Clock()
    taken = timing.take_turns({"a": clock.takes(1.0)}, seconds=3.5, pause=0.0, clock=clock)
    assert len(taken["a"].seconds) == 5
    clock = Clock()
    taken = timing.take_turns(
        {"a": clock.takes(0.3)}, seconds=1e9, pause=0.0, max_rounds=7, clock=clock
    )
    assert len(taken["a"].seconds) == 7


def test_ctrl_c_keeps_the_whole_rounds() -> None:
    clock, left = Clock(), [0, 0, 0]

    def interrupted() -> None:
        clock.now += 1.0
        if not left:
            raise KeyboardInterrupt
        left.pop()

    calls = {"a": clock.takes(1.0), "b": interrupted}
    taken = timing.take_turns(calls, seconds=1e9, pause=0.0, clock=clock)
    assert {name: len(turns.seconds) for name, turns in taken.items()} == {"a": 3, "b": 3}
    with pytest.raises(KeyboardInterrupt):
        timing.take_turns({"b": interrupted}, seconds=1.0, pause=0.0, clock=clock)


def test_each_follows_each_other_equally_often() -> None:
    for n in (2, 3, 4, 5, 6):
        names = list("abcdef"[:n])
        rounds = [timing.balanced_order(names, r) for r in range(n if n % 2 == 0 else 2 * n)]
        assert all(sorted(order) == names for order in rounds)
        pairs = Counter(pair for order in rounds for pair in itertools.pairwise(order))
        assert len(pairs) == n * (n - 1)
        assert len(set(pairs.values())) == 1
        firsts = Counter(order[0] for order in rounds)
        assert len(set(firsts.values())) == 1


def test_turns_have_the_slower_probe_beside_them() -> None:
    clock, told = Clock(), iter(range(1, 100))
    taken = timing.take_turns(
        {"a": clock.takes(1.0), "b": clock.takes(1.0)},
        seconds=4.0,
        pause=0.0,
        min_rounds=1,
        clock=clock,
        probe=lambda: float(next(told)),
    )
    assert taken["a"].probes == [2.0, 6.0]  # a b, then b a; one in front of each round
    assert taken["b"].probes == [3.0, 5.0]


def test_who_goes_on_takes_the_next_turns() -> None:
    clock = Clock()
    taken = timing.take_turns(
        {name: clock.takes(1.0) for name in "abc"},
        seconds=100.0,
        pause=0.0,
        clock=clock,
        goes_on=lambda taken: {2: "ab", 5: ""}.get(len(taken["a"].seconds), list(taken)),
    )
    assert {name: len(turns.seconds) for name, turns in taken.items()} == {"a": 5, "b": 5, "c": 2}


def test_an_engine_that_fails_takes_no_more_turns() -> None:
    clock, failed = Clock(), {}
    left = [0, 0]

    def fails() -> None:
        clock.now += 1.0
        if not left:
            raise RuntimeError("broke")
        left.pop()

    calls = {"a": clock.takes(1.0), "b": fails}
    taken = timing.take_turns(
        calls, seconds=8.0, pause=0.0, clock=clock, on_failure=failed.__setitem__
    )
    assert list(taken) == ["a"]
    assert len(taken["a"].seconds) == 5
    assert str(failed["b"]) == "broke"
    with pytest.raises(RuntimeError, match="broke"):
        timing.take_turns({"b": fails}, seconds=1.0, pause=0.0, clock=clock)


def test_threads_are_pinned_and_set_free() -> None:
    before = os.sched_getaffinity(0)
    waiting = threading.Event()
    other = threading.Thread(target=waiting.wait)
    other.start()
    try:
        with pinning.pinned(1):
            inside = [os.sched_getaffinity(one) for one in (0, other.native_id or 0)]
        after = [os.sched_getaffinity(one) for one in (0, other.native_id or 0)]
    finally:
        waiting.set()
        other.join()
    assert inside[0] == inside[1] == ({max(before)} if len(before) == 2 else inside[0])
    assert len(inside[0]) == 1
    assert after == [before, before]
    with pinning.pinned(len(before) + 1):
        assert os.sched_getaffinity(0) == before


def test_noise_sees_this_process() -> None:
    started = noise.Noise()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    report = started.report()
    assert report["load"] >= 0
    assert report["other_cores"] is None or report["other_cores"] < 64


def test_limits_are_rates() -> None:
    assert matmul_gflops(torch.float32, tries=1, side=64) > 0.01
    assert all(rate > 0.01 for rate in stream_gigabytes(tries=1, numbers=4096).values())
    assert better({"a": {"b": 1}, "c": 3}, {"a": {"b": 2}, "c": 1}) == {"a": {"b": 2}, "c": 3}


def test_the_reference_workload_is_a_fixed_one() -> None:
    probe = Probe(torch.device("cpu"))
    assert 0 < probe() < 10.0
    assert torch.equal(probe.product, torch.full_like(probe.a, probe.a.shape[0]))
    assert torch.equal(probe.target, probe.source)
